"""The compiled step: traced and compiled, or read where the very same one was compiled before.

JAX's cache of compiled programs is asked with a traced program, and tracing takes a second of a start on a GPU. Here
the question is what the program follows from: this package's files and the versions below it, the preset's text, the
config, the devices, the settings of JAX and XLA. Other code may depend on anything, or change anything: where a model
comes from a user's file, an optimizer or a schedule from elsewhere, or this package is used by another program, the
step is traced each time. What a preset imports is not looked at beyond that: it should not patch this package.
"""

import contextlib
import hashlib
import os
import pickle
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import jaxgpt
from jaxgpt import UserError, atomic_write
from jaxgpt.config import Parts, preset_texts
from jaxgpt.models import count_users_files
from jaxgpt.ops import paths
from jaxgpt.optim import OPTIMIZERS, SCHEDULES
from jaxgpt.step import TrainState, make_train_step
from jaxgpt.tools.memory import check_fits, compile_step, need_of

KEPT = 16  # programs; GPT-2 124M's has 2.6 MB
SETTINGS = ("XLA_", "JAX_", "CUDA_", "CUDNN_", "NVIDIA_", "NCCL_", "TF_", "LIBTPU_")  # how variables of theirs begin


def _sources() -> str:
    """The digest of this package's files."""
    digest = hashlib.sha256()
    for path in sorted(Path(jaxgpt.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


SOURCES = _sources()  # as they are imported: they may be others by the time that a step is traced


class Step(NamedTuple):
    """The compiled step, and what is known of how it came to be."""

    run: Callable
    paths: paths.Paths  # that its ops take
    beside: Any  # what was begun beside the compilation
    trace_s: float
    compile_s: float  # or to read it


def prepare_step(
    parts: Parts, mesh: Mesh, state: TrainState, tokens: jax.ShapeDtypeStruct, beside: Callable[[], Any] = lambda: None
) -> Step:
    """The step compiled for these arguments. Raises UserError where a device has not enough memory for it.

    state: step.abstract_state. beside(): begins what can go on meanwhile, such as step.begin_state; beside the tracing
    it would wait for the same interpreter.
    """
    began = time.perf_counter()
    file = _file(parts, mesh, tokens)
    begun = None
    if file and os.path.exists(file):  # Path.exists raises where the folder may not be entered
        begun = beside()
        if found := _read(file, state, tokens, mesh):
            run, taken = found
            check_fits(parts, mesh, run, need_of(run))
            return Step(run, taken, begun, 0.0, time.perf_counter() - began)
    with paths.watch() as taken:
        lowered = make_train_step(parts, mesh).lower(state, tokens)
    traced = time.perf_counter()
    begun = begun or beside()
    run = compile_step(lowered, parts, mesh, state)
    if file:
        _write(file, run, taken)
    return Step(run, taken, begun, traced - began, time.perf_counter() - traced)


def _file(parts: Parts, mesh: Mesh, tokens: jax.ShapeDtypeStruct) -> Path | None:
    """Where the step is, or will be; None where it is not kept."""
    rules = [*OPTIMIZERS.values(), *SCHEDULES.values()]
    ours = all(rule.__module__.startswith("jaxgpt.") for rule in rules) and not count_users_files()
    if not ours or not (folder := _folder()):
        return None
    devices = [(x.id, x.device_kind, x.client.platform_version) for x in mesh.devices.flat]
    return folder / f"step-{_digest(parts, mesh.shape, tokens, devices)}"


def _folder() -> Path | None:
    """JAX's own cache, for this package's commands on GPUs of one process: CPUs' programs are small, and several
    processes would have to agree."""
    if not getattr(sys.modules["__main__"].__spec__, "name", "").startswith("jaxgpt."):
        return None
    folder: str = jax.config.jax_compilation_cache_dir or ""  # pyright: ignore
    used = folder and "://" not in folder and jax.config.jax_enable_compilation_cache  # pyright: ignore
    return Path(folder) if used and jax.default_backend() == "gpu" and jax.process_count() == 1 else None


def _digest(parts: Parts, *further: Any) -> str:
    """Of all that the program follows from."""
    asked = [parts.model, type(parts.model).__module__, parts.optimizer, parts.devices, parts.data.seed, *further]
    asked += [sys.version, *(metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax"))]
    asked += sorted((name, value) for name, value in os.environ.items() if name.startswith(SETTINGS))
    asked += sorted((name, repr(value)) for name, value in jax.config.values.items())
    return hashlib.sha256(repr([*asked, SOURCES, preset_texts]).encode()).hexdigest()[:32]


def _read(file: Path, state: TrainState, tokens: Any, mesh: Mesh) -> tuple[Any, paths.Paths] | None:
    """The program in a file and the paths that its ops take; None if it is not whole, not ours or not this JAX's."""
    with contextlib.suppress(Exception):
        if hasattr(os, "getuid") and file.stat().st_uid != os.getuid():  # what is unpickled may do anything
            return None
        content = file.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            program, taken, names = pickle.loads(content[32:])
            trees = jax.tree.structure(((state, tokens), {})), jax.tree.structure((state, dict.fromkeys(names, 0)))
            run = serialize_executable.deserialize_and_load(program, *trees, execution_devices=list(mesh.devices.flat))
            with contextlib.suppress(OSError):  # a folder that may only be read
                os.utime(file)
            return run, taken
    return None


def _write(file: Path, run: Any, taken: paths.Paths) -> None:
    """Keeps the program, if this JAX can give it, and drops those that were not used for longest."""
    try:
        program, *_ = serialize_executable.serialize(run)
    except Exception:  # not every JAX can, of every program
        return
    _, metrics = jax.tree.unflatten(run.out_tree, range(run.out_tree.num_leaves))
    content = pickle.dumps((program, taken, list(metrics)))
    with contextlib.suppress(UserError, OSError):  # a full disk, a folder that cannot be written: as for JAX's own
        with atomic_write(file) as f:
            f.write(hashlib.sha256(content).digest() + content)
        for path in sorted(file.parent.glob("step-" + "[0-9a-f]" * 32), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            path.unlink(missing_ok=True)
