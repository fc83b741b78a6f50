"""The house's one direction: a module imports only from its own layer or below, read from the source itself."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxgpt"

# Lowest first; `ops.` is every module of the folder. Within a layer imports make no circle.
LAYERS = (
    ("keys", "console"),
    ("tokenizer", "sharding", "metrics", "ops."),
    ("models", "models."),
    ("optim",),
    ("config",),
    ("data", "corpus", "corpus."),
    ("step", "decoding"),
    ("run", "run."),
    ("weights", "weights."),
    ("scoring", "scoring."),
    ("tools", "tools."),
    ("train", "sample", "evaluate", "convert", "prepare", "bench", "plot", "report", "__main__"),
)
# what opens no file and parses no flag must not come to need what does, whatever its layer
APART = {"models": ("config", "tokenizer", "data"), "decoding": ("config", "run"), "ops": ("models", "config")}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def layer_of(module: str) -> int:
    room = module.partition(".")[0] + "."
    found = [i for i, layer in enumerate(LAYERS) if module in layer or ("." in module and room in layer)]
    assert len(found) == 1, f"give {module} a layer in {__file__}"
    return found[0]


def imports(source: str) -> set[str]:
    """The modules of jaxgpt that this source imports anywhere, in functions too: `config`, `ops.gelu`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            # `from jaxgpt import x` is the module x, where there is one, else a name of the package
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}"[7:] in SOURCES else base for alias in node.names}
    return {name.removeprefix("jaxgpt.") for name in found if name.startswith("jaxgpt.")}


IMPORTS = {module: imports(path.read_text()) for module, path in SOURCES.items()}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downward(module):
    for other in IMPORTS[module]:
        assert layer_of(other) <= layer_of(module), f"{module} imports {other}, which lies above it"


def test_imports_make_no_circle():
    left = dict(IMPORTS)
    while left:
        free = {module for module, needs in left.items() if not needs & left.keys()}
        assert free, f"among {sorted(left)} each needs another"
        left = {module: needs for module, needs in left.items() if module not in free}


def test_one_module_touches_orbax():
    for name, path in SOURCES.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        roots = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        roots |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert name == "run.checkpoint" or not {root.split(".")[0] for root in roots} & {"orbax", "tensorstore"}, name


@pytest.mark.parametrize("room", APART)
def test_what_stays_apart(room):
    modules = [module for module in SOURCES if module.partition(".")[0] == room]
    assert modules
    for module in modules:
        assert not {other.partition(".")[0] for other in IMPORTS[module]} & set(APART[room]), module


def test_the_walk_sees_every_form_of_import():
    source = (
        "import jaxgpt.models.gpt2\nfrom jaxgpt import UserError, step\nfrom jaxgpt.ops import fp8\n"
        "def f():\n    from jaxgpt.ops.gelu import gelu\n"
    )
    assert imports(source) == {"models.gpt2", "step", "ops.fp8", "ops.gelu"}
