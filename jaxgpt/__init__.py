"""jaxgpt: train, fine-tune, evaluate and sample GPT-2 in JAX."""

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__version__ = "0.2.0"


class UserError(Exception):
    """A mistake the user can mend. Entry points print it as one line, `error: …`, and exit with its status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def optional(module: str, package: str, purpose: Any) -> Any:
    """A module that not every installation has. UserError, saying what needs it and how to get it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{purpose} needs {module.partition('.')[0]}; run: pip install '{package}'") from None


def shipped(pattern: str) -> dict[str, Path]:
    """Where files of configs/ and data/ are, by name: `shipped("configs/*.py")["configs/gpt2.py"]`.

    In the working folder; if one is not there, in the checkout; if there is none, in the wheel, which carries them.
    """
    package = Path(__file__).parent
    found: dict[str, Path] = {}
    for root in (Path(), package.parent, package / "presets"):
        for path in sorted(root.glob(pattern)):
            found.setdefault(path.relative_to(root).as_posix(), path)
    return found


def local_path(name: str | os.PathLike[str]) -> Path:
    """The path that `name` is, ~ being the home folder, which no shell replaces after a `=`. UserError without one."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name}: there is no home folder that ~ could mean; write the path in full") from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` complete and synced, or not at all. UserError on a full disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
