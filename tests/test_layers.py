"""The house's one direction: a module imports only from layers below its own, read from the source itself."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxgpt"

# Rooms from the ground up, each a pattern of modules' names. A module imports from rooms below its own, and from its
# own, where no circle of imports may arise. The package itself, which holds UserError, lies below all.
ROOMS = (
    r"keys|console|cli|store|cache|tokenizer|sharding",
    r"ops(\..+)?",
    r"models(\..+)?",
    r"optim|trackers",
    r"config",
    r"data|step|decoding|metrics",
    r"run\..+",
    r"corpus\..+",
    r"weights\..+",
    r"scoring\..+",
    r"tools\..+",
    r"__main__|notebook|train|sample|evaluate|convert|prepare|bench|plot|report",
)
# the parts that touch no flags and no files must not come to need those that do, whatever their rooms
APART = {"models": ("config", "tokenizer", "data"), "decoding": ("config", "run"), "ops": ("models", "config")}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"}
SOURCES |= {"models": PACKAGE / "models" / "__init__.py"}  # the one package whose own module is more than a docstring


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


def room_of(module: str) -> int:
    (room,) = [i for i, pattern in enumerate(ROOMS) if re.fullmatch(pattern, module)]
    return room


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downward(module):
    for other in imports(SOURCES[module].read_text()):
        assert room_of(other) <= room_of(module), f"{module} imports {other}, which lies above it"


def test_no_circle_of_imports():
    graph = {name: imports(path.read_text()) & SOURCES.keys() - {name} for name, path in SOURCES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(SOURCES)


def test_the_package_itself_imports_nothing():
    lazy = {"models.gpt2", "notebook"}  # for type checkers; they come when they are first used
    assert imports((PACKAGE / "__init__.py").read_text()) == lazy
    assert imports((PACKAGE / "ops" / "__init__.py").read_text()) == set()


def test_orbax_and_tensorstore_stay_where_they_are():
    allowed = {"orbax": {"run.checkpoint"}, "tensorstore": {"run.checkpoint", "run.objects", "store"}}
    for name, path in SOURCES.items():
        roots = {
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        }
        roots |= {a.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names}
        for library, modules in allowed.items():
            assert name in modules or library not in {root.split(".")[0] for root in roots}


@pytest.mark.parametrize("module", APART)
def test_what_stays_apart(module):
    for name in (name for name in SOURCES if name.split(".")[0] == module):
        found = {other.split(".")[0] for other in imports(SOURCES[name].read_text())}
        assert not found & set(APART[module])


def test_the_walk_sees_every_form_of_import():
    source = (
        "import jaxgpt.optim\nfrom jaxgpt.run import guard\nfrom jaxgpt.models import Role\n"
        "def f():\n    from jaxgpt.ops.gelu import gelu\n    from jaxgpt import UserError\n"
    )
    assert imports(source) == {"optim", "run.guard", "models", "ops.gelu"}
