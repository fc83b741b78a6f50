"""jaxgpt: train, fine-tune, evaluate and sample GPT-2 in JAX.

For a notebook: `from jaxgpt import GPT, GPTConfig, load_model, generate` (jaxgpt/notebook.py, jaxgpt/models/gpt2.py). A
model is an nnx.Module; a trained one brings its tokenizer:

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxgpt import GPT, GPTConfig
    >>> config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=27)
    >>> logits, _ = GPT(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 16), int))
    >>> logits.shape
    (1, 16, 27)

Importing jaxgpt alone imports nothing else: the names come when they are first used.
"""

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from jaxgpt.models.gpt2 import GPT, GPTConfig
    from jaxgpt.notebook import generate, load_model

__all__ = ["GPT", "GPTConfig", "UserError", "generate", "load_model"]

__version__ = "0.2.0"


def die_by_interrupt() -> None:
    """From now on Ctrl-C ends the process at once, without a traceback: before and after `cli.run_main`'s work."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody's own
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def before_imports() -> None:
    """For the start of a program, whose imports take seconds: Ctrl-C ends it at once, and a variable of the environment
    that a library refuses as it is imported is one line. Garbage is looked for less often: of what imports and traces
    make nearly all stays, and looking through it, after every 700 objects, took 0.4 s of a start. CUDA's driver, which
    takes some 0.15 s, starts beside the imports, where there is one."""
    die_by_interrupt()
    sys.excepthook = _end_by_line
    gc.set_threshold(100_000)
    threading.Thread(target=_start_cuda, daemon=True).start()


def _start_cuda() -> None:
    with contextlib.suppress(OSError):  # none is installed
        ctypes.CDLL("libcuda.so.1").cuInit(0)  # whether it fails JAX finds out


def _end_by_line(kind: Any, error: Any, trace: Any) -> None:
    if problem := user_error(error):
        print(f"error: {one_line(problem)}", file=sys.stderr, flush=True)
        os._exit(problem.status)
    sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # python -m jaxgpt.…
    before_imports()


class UserError(Exception):
    """A mistake the user can mend. Entry points print it as one line, `error: …`, and exit with its status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class Unavailable(UserError):
    """What may be gone when the same command is started again later: a full disk, a folder in use, a host that is late.

    Its status is EX_UNAVAILABLE of sysexits.h, so that schedulers can tell it from a mistake.
    """

    def __init__(self, message: str):
        super().__init__(message, status=69)


FULL = (errno.ENOSPC, errno.EDQUOT)  # bytes or inodes, of the disk or of a quota
# what is wrong with a path that the user named, or with its disk
PATHS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
)


def one_line(error: BaseException) -> str:
    """What it says, for a message of one line."""
    return " ".join(str(error).split())


def user_error(error: BaseException) -> UserError | None:
    """What a user can do about an exception that is no UserError itself but comes from the machine; None: a bug."""
    text = one_line(error)
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in FULL:
        return Unavailable(f"{error.filename or 'a file'} cannot be written: {error.strerror}; make room")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return Unavailable(f"{text}; allow more: ulimit -n 4096")
    if isinstance(error, RuntimeError) and text == "can't start new thread":
        return Unavailable(f"{text}; allow more processes, ulimit -u, or end some")
    if unusable := _unusable_variable(error):
        return unusable
    if isinstance(error, OSError) and error.errno == errno.ECONNABORTED and error.filename is not None:
        return Unavailable(f"{error.filename}: {error.strerror}; the store cannot be had now: start again later")
    if isinstance(error, OSError) and error.errno in PATHS and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}; name another, or mend its permissions")
    if isinstance(error, FileNotFoundError) and error.filename is None:  # of os.getcwd
        return UserError("the working folder is gone; change to another")
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        found = text.partition("RESOURCE_EXHAUSTED: ")[2][:200] or "no memory is left"
        return UserError(f"out of memory ({found}); choose a smaller batch_size or remat=block, or more devices")
    if isinstance(error, RuntimeError) and re.search("Unable to initialize backend|^Unknown backend", text):
        hint = "unset JAX_PLATFORMS and JAX_PLATFORM_NAME, or name what this machine has: cpu"
        counts = [f"{x}={os.environ[x]}" for x in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS") if os.environ.get(x)]
        if counts and "backend 'cpu'" in text:  # such as none
            hint = f"mend or unset {', '.join(counts)}"
        return UserError(f"{text[:300]}; {hint}")
    if isinstance(error, ValueError) and "Disable jit is not supported" in text:
        return UserError("JAX_DISABLE_JIT is set, and this compiles what it computes; unset it")
    if isinstance(error, RuntimeError) and (forbids := re.search(r"\b(no_(?:execution|tracing))'? .*is set", text)):
        return UserError(f"JAX_{forbids[1].upper()} is set, and this is to compute; unset it")
    modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, AssertionError) and modules[-1:] == ["jax._src.xla_bridge"]:  # a plugin is missing, as cuda's
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        return UserError(f"{asked}, but no such backend is installed; run: pip install 'jaxgpt[cuda]', or unset it")
    return _refused_variable(error)


def _refused_variable(error: BaseException) -> UserError | None:
    """Where a library refuses the value of a variable of the environment: JAX_ENABLE_X64=banana, MPLBACKEND=x.

    The error names the variable; or it has its value, and JAX's option, or the line of the library that reads the
    environment, has its name.
    """
    text = re.sub(r"\bjax\.(\w+)", lambda x: f"JAX_{x[1]}".upper(), str(error))  # jax.default_device
    frames = list(traceback.walk_tb(error.__traceback__))
    if not isinstance(error, ValueError) or not frames:
        return None
    lines = [line for *_, line in traceback.extract_tb(error.__traceback__) if line and "env" in line]
    options = [x for x in frames[-1][0].f_locals.values() if isinstance(x, str)]
    library = frames[-1][0].f_globals.get("__name__", "").partition(".")[0]
    options += [f"{library}_{x}".upper() for x in options]  # TQDM_MININTERVAL, read by tqdm as mininterval
    names = re.findall(r"[A-Z][A-Z0-9_]+|jax_\w+", " ".join([text, *lines, *options]))
    names += ["JAX_DEFAULT_MATMUL_PRECISION"] * ("precision '" in text)
    for name in dict.fromkeys(name.upper() for name in names):
        value = os.environ.get(name)
        told = name in text or (value.lower() in text.lower() if value else re.search("''|\"\"", text))
        if value is not None and told:
            return UserError(f"{name}={value} in the environment: {error}; mend it or unset it")
    return None


def _unusable_variable(error: BaseException) -> UserError | None:
    """Where a value of JAX's in the environment is a path that cannot be used or a pattern that is none."""
    used = str(getattr(error, "filename", None) or getattr(error, "pattern", None) or "")
    if isinstance(error, OSError | re.error) and used:
        for name, value in os.environ.items():
            if name.startswith("JAX_") and value and (used == value or used.startswith(value.rstrip("/") + "/")):
                why = getattr(error, "strerror", None) or str(error)
                return UserError(f"{name}={value} in the environment: {why}; mend it or unset it")
    return None


def __getattr__(name: str) -> Any:
    """The names of __all__ that are not defined here, on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "models.gpt2" if name.startswith("GPT") else "notebook"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def optional(module: str, package: str, purpose: Any) -> Any:
    """A module that not every installation has. UserError, saying what needs it and how to get it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{purpose} needs {module.partition('.')[0]}; run: pip install '{package}'") from None


def silence(*libraries: str) -> None:
    """Takes what these libraries log, retries and the errors that they raise besides, from stderr."""
    for name in libraries:
        importlib.import_module(f"{name}.utils.logging")  # sets the level itself, when it is first imported
        logging.getLogger(name).setLevel(logging.CRITICAL)


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
    """The path that `name` is, ~ being the home folder, which no shell replaces after a `=`.

    UserError without a home folder; on an empty name, such as a variable that is not set: it is no folder's; and on a
    name in a store, which store.folder takes.
    """
    if not os.fspath(name):
        raise UserError("the name of a file or folder is empty; give one")
    if os.fspath(name).startswith(("gs://", "s3://")):
        raise UserError(f"{name} is in a store, and this has to be on a disk; name a local path")
    try:
        return Path(name).expanduser()
    except (RuntimeError, ValueError):  # ValueError: a name that no user can have
        raise UserError(f"{name}: there is no home folder that ~ could mean; write the path in full") from None


def check_ordinary(path: Any) -> None:
    """UserError on a pipe or a device in place of a file: who reads one waits for good, or never comes to its end."""
    if isinstance(path, Path) and path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a {'pipe' if path.is_fifo() else 'device'}; move it away")


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text that may come from anywhere. Raises ValueError if it is none or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextlib.contextmanager
def output(path: Path) -> Iterator[BinaryIO]:
    """atomic_write for a path that the user named for output: a device, a pipe, /dev/stdout are written as they are.

    There is nothing to replace there, and root's replacement would be a plain file in place of /dev/null.
    """
    opened = path.is_symlink() and Path(os.path.realpath(path.parent)).parts[1:2] in (("dev",), ("proc",))
    if opened or (path.exists() and not path.is_file() and not path.is_dir()):
        with open(path, "wb") as file:
            yield file
    elif path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    else:
        with atomic_write(path) as file:
            yield file


@contextlib.contextmanager
def atomic_write(path: Any) -> Iterator[BinaryIO]:
    """A binary file that appears under `path`, local or in a store, complete and synced, or not at all.

    Raises UserError where it cannot be written; Unavailable on a full disk.
    """
    if not isinstance(path, Path):
        with path.writing() as f:
            yield f
        return
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # of a process that was killed, or a link: neither is written through
        with open(partial, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except OSError as error:
        text = f"cannot write {path}: {error.strerror or error}; make room or choose another folder"
        raise (Unavailable(text) if error.errno in FULL else UserError(text)) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
