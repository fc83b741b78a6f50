"""The house's one direction: a module imports only from layers below its own, read from the source itself."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxgpt"

# Lowest first; no module imports from its own layer. The package itself, which holds UserError, lies below all.
LAYERS = (
    ("config", "tokenizer", "sharding", "processes", "metrics", "texts", "ops.launch", "ops.dropout"),
    ("guard", "ops.attention", "ops.choose", "ops.gelu", "ops.layer_norm"),
    ("ops.decode", "ops.fp8"),
    ("ops.cross_entropy",),
    ("model", "data", "corpus", "optim", "hf"),
    ("step", "generate"),
    ("checkpoint", "dryrun"),
    ("evaluate",),
    ("train", "sample", "bench", "convert", "plot"),
)
LAYER = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
# the parts that touch no flags and no files must not come to need those that do, whatever their layers
APART = {"model": ("config", "tokenizer", "data"), "generate": ("config", "checkpoint"), "ops": ("model", "config")}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"}


def imports(source: str) -> set[str]:
    """The modules of jaxgpt that this source imports anywhere, in functions too: `model`, `ops.gelu`."""
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


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downward(module):
    assert module in LAYER, f"give {module} a layer in {__file__}"
    for other in imports(SOURCES[module].read_text()):
        assert LAYER[other] < LAYER[module], f"{module} imports {other}, which is not below it"


def test_the_table_names_no_ghosts():
    assert set(LAYER) == set(SOURCES)


def test_the_package_itself_imports_nothing():
    assert imports((PACKAGE / "__init__.py").read_text()) == set()
    assert imports((PACKAGE / "ops" / "__init__.py").read_text()) == set()


def test_one_module_touches_orbax():
    for name, path in SOURCES.items():
        roots = {
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        }
        roots |= {a.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names}
        assert name == "checkpoint" or not {root.split(".")[0] for root in roots} & {"orbax", "tensorstore"}


@pytest.mark.parametrize("module", APART)
def test_what_stays_apart(module):
    for name in (name for name in SOURCES if name.split(".")[0] == module):
        assert not imports(SOURCES[name].read_text()) & set(APART[module])


def test_the_walk_sees_every_form_of_import():
    source = (
        "import jaxgpt.models.gpt2\nfrom jaxgpt import UserError, hf\ndef f():\n    from jaxgpt.ops.gelu import gelu\n"
    )
    assert imports(source) == {"model", "hf", "ops.gelu"}
