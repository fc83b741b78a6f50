"""Checkpoints: Orbax writes the arrays, digests prove them. The only module that touches Orbax and TensorStore.

`out_dir/checkpoints/<step>/` holds `state/`, the state as Orbax wrote it, a flat tree {path: array}; and `record.json`:
{step, info, arrays: {path: [dtype, shape, digest]}, files: {name: [bytes, sha256 of small ones]}, seal}. A folder gets
its name after all of it has been written, synced and read back, and only then older ones go. No pickle is involved.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from jaxgpt import UserError, atomic_write
from jaxgpt.run.digests import digests, host_digest
from jaxgpt.run.guard import LOCK, everywhere

log = logging.getLogger(__name__)
# Orbax narrates each save through absl's logger, failures with a traceback; they all reach us as exceptions, see below.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


# TensorStore (0.1.80 to 0.1.86 at least) never frees what it returns as JSON. At each save Orbax asks it for all
# counters, as telemetry, and for each array for the same folder's spec: 28 KiB lost for 20 arrays. Now it gets no
# counters, and a spec that it asked for last from memory, which takes a hash.
ts.experimental_collect_matching_metrics = lambda *args, **kwargs: []
_spec: Any = ts.KvStore.Spec
_spec.__hash__ = lambda spec: hash(repr(spec))
_to_json = functools.lru_cache(1)(_spec.to_json)
_spec.to_json = lambda spec, include_defaults=False: copy.deepcopy(_to_json(spec, include_defaults))

TMP = ".tmp"  # ends the name of a folder that is being written or removed, or that a kill left behind
SAVE_TIMEOUT_S = 600  # bounds a save in the background, and the wait for a process that failed to write its part
SPARE = 2**18  # bytes that a checkpoint may take besides its arrays
SMALL_FILE = 2**20  # files up to this many bytes are hashed whole; larger ones hold arrays, which have their digests
# What Orbax, TensorStore and json are known to raise over a damaged file, a full disk or a mount that went away.
FAILURES = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, UserError)


class Checkpoints:
    """The checkpoints of a run's folder. Restoring writes nothing; saving needs the run's lock (guard.RunLock).

    With several processes each calls every method, in the same order. The best checkpoint is the one whose
    `info["val_loss"]` is lowest; it is kept besides the newest `keep`.
    """

    def __init__(self, out_dir: str | os.PathLike, *, keep: int = 2):
        self.folder, self.keep = Path(out_dir).absolute() / "checkpoints", max(1, keep)
        self._lock, self._locked = self.folder.with_name(LOCK), False
        self._first = jax.process_index() == 0
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
        self._orbax = ocp.AsyncCheckpointer(handler, timeout_secs=SAVE_TIMEOUT_S)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._finishing: Future | None = None  # what is left of the save under way
        self._error: Exception | None = None  # of its beginning
        self._saving: tuple[int, dict] | None = None  # its step and info
        self._saved: tuple[int, dict] = -1, {}  # of the newest known to be on disk, saved or restored
        self._ok = True  # whether the last save succeeded
        self._unsound: set[int] = set()

    # --- what is there ---

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending, sound or not: empty means that there is nothing to resume."""
        return _from_first(self._steps())

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d{0,8}", name))

    def _whole(self) -> tuple[list[int], list[int]]:
        """Steps, ascending, whose record is whole; and, if any has a validation loss, the one with the lowest."""
        losses = {}
        for step in set(self._steps()) - self._unsound:
            with contextlib.suppress(ValueError):
                losses[step] = self._record(step)["info"].get("val_loss")
        finite = sorted((x, step) for step, x in losses.items() if x is not None and math.isfinite(x))
        return sorted(losses), [step for _, step in finite[:1]]

    def _record(self, step: int) -> dict:
        """The checkpoint's record, its seal checked. Raises ValueError."""
        try:
            record = json.loads((self.folder / str(step) / "record.json").read_text())
            whole = record["seal"] == _seal(record) and record["step"] == step
        except FAILURES as error:
            raise ValueError(f"record.json cannot be read ({_brief(error)})") from None
        if not whole:
            raise ValueError("record.json does not match its seal")
        return record

    # --- saving ---

    def save(self, step: int, state: Any, info: dict) -> None:
        """Saves `state`, a pytree of jax arrays, in the background; it may be donated as soon as this returns.

        `info` is a small JSON dictionary; `val_loss` in it ranks the checkpoint. A failure is logged, here or by the
        next call, the run goes on, and older checkpoints stay. A step that is on disk already is not saved again; if
        `info` brings a validation loss that it lacks there, `info` replaces what its record says.
        """
        self.wait()
        info = json.loads(json.dumps(info, default=lambda x: x.item()))
        on_disk = self._saved[0] == step
        if on_disk and (info.get("val_loss") is None or self._saved[1].get("val_loss") is not None):
            self._ok = True
            return
        arrays, working = _flat(state)[0], self.folder / f"{step}{TMP}"
        sums = {} if on_disk else digests(arrays)
        self._saving = step, info
        with self._noting_failure():
            if self._first:  # a folder that cannot be written is found out before any process waits for another
                self._check_folder()
                if on_disk:
                    _write_record(self.folder / str(step), {**self._record(step), "info": info})
                else:
                    _make_room(working, sum(x.nbytes for x in arrays.values()) + SPARE)
        if on_disk or not everywhere(self._error is None):
            self.wait()
            return
        with self._noting_failure():
            self._orbax.save(working / "state", args=ocp.args.PyTreeSave(arrays))
        record = {"step": step, "info": info, "arrays": {k: [*_kind(x), sums[k]] for k, x in arrays.items()}}
        self._finishing = self._background.submit(self._finish, record, working)

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """Within it a failure is not raised, but kept for `wait`: the first one of a save."""
        try:
            yield
        except FAILURES as error:
            self._error = self._error or error

    def _check_folder(self) -> None:
        """Raises OSError where the run's folder was moved or its disk unmounted: what is saved to the same path then
        would hide what is there, or be hidden, when it comes back."""
        if self._locked and not self._lock.exists():
            raise OSError(f"{self._lock}, there since the run began, is gone: was its disk unmounted?")

    def _finish(self, record: dict, working: Path) -> None:
        """In the background: awaits the writes of all processes, then process 0 commits."""
        try:
            self._orbax.wait_until_finished()
            if self._first and self._error is None:
                self._commit(record, working)
        finally:
            if self._first:
                shutil.rmtree(working, ignore_errors=True)  # after a failure: a full disk needs the room

    def _commit(self, record: dict, working: Path) -> None:
        """Reads the new checkpoint back, gives it its record and name, then removes what is no longer kept."""
        for name, store in _open(working, record["arrays"]).items():  # one at a time: memory for the largest alone
            if host_digest(np.asarray(store.read().result())) != record["arrays"][name][2]:
                raise ValueError(f"array {name} reads back differently")
        _write_record(working, {**record, "files": _files(working)})
        for path in (*working.rglob("*"), working):
            _sync(path)
        self._check_folder()
        step, final = record["step"], self.folder / str(record["step"])
        if final.exists():  # damaged and passed over, or of a branch that the run has left
            self._remove(step)
        working.rename(final)
        _sync(self.folder)  # before older ones go
        self._unsound.discard(step)
        # Later steps than the one just saved belong to a branch that the run has left by resuming before them: they go.
        self._unsound.update(later for later in self._steps() if later > step)
        whole, best = self._whole()
        for old in {*self._steps()} - {*whole[-self.keep :], *best}:
            try:
                self._remove(old)
            except OSError as error:
                log.warning("checkpoint %d is no longer needed but cannot be removed: %s", old, _brief(error))

    def _remove(self, step: int) -> None:
        """Renames first: a removal cut short must not leave half a checkpoint."""
        shutil.rmtree((self.folder / str(step)).rename(self.folder / f"{step}-old{TMP}"))

    def wait(self) -> bool:
        """Waits for the save in the background; whether the last save succeeded, on all processes."""
        if self._saving is None:
            return self._ok
        late = self._finishing.exception() if self._finishing else None  # waits, also after an earlier error
        error = self._error or late
        self._ok = everywhere(error is None)
        if self._ok:
            self._saved = self._saving
        elif error is not None or self._first:
            why = "another process failed" if error is None else _brief(error)
            kept = self._saved[0]
            then = f"the newest on disk is {kept}" if kept >= 0 else "there is none on disk yet"
            log.error("CHECKPOINT %d NOT SAVED in %s: %s; the run goes on, %s", self._saving[0], self.folder, why, then)
        self._saving = self._finishing = self._error = None
        return self._ok

    def close(self) -> None:
        """Lets a save in the background end, asking no other process: for the way out after an error."""
        self._background.shutdown()

    def remove_leftovers(self) -> None:
        """Removes what killed saves and removals left. For a run that holds its folder's lock, at its start."""
        self._locked = self._lock.exists()
        for path in self.folder.glob(f"*{TMP}") if self._first else ():
            shutil.rmtree(path, ignore_errors=True)

    # --- restoring ---

    def restore(self, abstract_state: Any, which: Literal["latest", "best"] | int = "latest") -> tuple[Any, dict, int]:
        """(state, info, step) of the checkpoint asked for, or of the newest sound one, saying what was passed over.

        `abstract_state` is the saved pytree, or some of its top-level fields ({"params": …} leaves the optimizer state
        unread), as ShapeDtypeStructs whose shardings (default: the first local device) need not be those it was saved
        with. Every array is checked against its digest. Raises UserError if nothing sound fits.
        """
        self.wait()
        wanted, treedef = _flat(abstract_state)
        steps = [step for step in reversed(self.steps()) if isinstance(which, str) or step == which]
        best = _from_first(self._whole()[1]) if which == "best" else []
        problems, other_model = [], ""
        for step in dict.fromkeys(best + steps):
            try:
                record, arrays = self._read(step, wanted)
            except ValueError as error:
                other_model = other_model or (str(error) if isinstance(error, _OtherModel) else "")
                problems.append(f"checkpoint {step} passed over: {_brief(error)}")
                self._unsound.add(step)
                continue
            for text in problems if self._first else ():
                log.warning("%s; using checkpoint %d", text, step)
            self._saved = step, record["info"]
            return treedef.unflatten(arrays[path] for path in wanted), record["info"], step
        if other_model:
            raise UserError(f"{self.folder} holds another model: {other_model}; give the settings it was trained with")
        if problems:
            raise UserError(f"no sound checkpoint in {self.folder}: {'; '.join(problems)}")
        raise UserError(f"no checkpoint{'' if isinstance(which, str) else f' {which}'} in {self.folder}; check out_dir")

    def _read(self, step: int, wanted: dict[str, Any]) -> tuple[dict, dict[str, jax.Array]]:
        """The record and the wanted arrays, all checked. Raises ValueError, on every process if on any."""
        folder, record, arrays, failure = self.folder / str(step), {}, {}, None
        try:
            record = self._record(step)
            _check_fits(record, wanted)
            found = _files(folder)
            if damaged := [name for name, of in record["files"].items() if found.get(name) != of]:
                raise ValueError(f"file {damaged[0]} is {'altered' if damaged[0] in found else 'missing'}")
            arrays = {name: _load(store, wanted[name]) for name, store in _open(folder, wanted).items()}
        except FAILURES as error:
            failure = error if isinstance(error, ValueError) else ValueError(_brief(error))
        if not everywhere(failure is None):
            raise failure or ValueError("another process cannot read it")
        for path, digest in digests(arrays).items():  # from here on every process sees the same
            if digest != record["arrays"][path][2]:
                raise ValueError(f"array {path} does not match its digest")
        return record, arrays


# --- names, records, files ---


def _flat(tree: Any) -> tuple[dict[str, Any], Any]:
    """({"params.h.0.ln_1.scale": leaf, …}, treedef): names that do not depend on the containers' types."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}, treedef


def _kind(x: Any) -> tuple[str, list[int]]:
    return np.dtype(x.dtype).name, list(x.shape)


class _OtherModel(ValueError):
    """Where the arrays on record first differ from the wanted ones."""


def _check_fits(record: dict, wanted: dict[str, Any]) -> None:
    """Raises _OtherModel if the arrays on record differ from the wanted ones in name, type or shape."""
    fields = {path.split(".")[0] for path in wanted}
    there = {path: (of[0], of[1]) for path, of in record["arrays"].items() if path.split(".")[0] in fields}
    here = {path: _kind(x) for path, x in wanted.items()}
    for path in {**here, **there}:
        if here.get(path) != there.get(path):
            one, other = ("{}{}".format(*of[path]) if path in of else "absent" for of in (there, here))
            raise _OtherModel(f"{path} is {one} there, {other} here")


def _seal(record: dict) -> str:
    text = json.dumps({k: v for k, v in record.items() if k != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_record(folder: Path, record: dict) -> None:
    with atomic_write(folder / "record.json") as file:
        file.write(json.dumps({**record, "seal": _seal(record)}).encode())


def _make_room(working: Path, need: int) -> None:
    """An empty folder with `need` bytes free. Raises OSError; Orbax would, with the tracebacks of all its writes."""
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    free = shutil.disk_usage(working).free
    if free < need:
        working.rmdir()
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free, {need:,} needed")


def _sync(path: Path) -> None:
    """Has a file or folder outlive a power cut."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _files(folder: Path) -> dict[str, list]:
    """{name: [bytes, sha256 or None]} of every file below folder/state."""
    files = {}
    for path in (path for path in (folder / "state").rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if size <= SMALL_FILE else None
        files[path.relative_to(folder).as_posix()] = [size, digest]
    return files


def _brief(error: BaseException) -> str:
    kind = "" if isinstance(error, OSError | ValueError | UserError) else f"{type(error).__name__}: "
    return kind + re.split(r"\n| in OCDBT | \[tensorstore", str(error) or type(error).__name__)[0][:300]


# --- arrays on disk ---


def _open(folder: Path, names: Iterable[str]) -> dict[str, ts.TensorStore]:
    """Each named array as Orbax laid it out: zarr in one OCDBT database. Raises ValueError.

    TensorStore reads here rather than Orbax: over a damaged file, Orbax's event loop ends before its reads do and fills
    the terminal with their tracebacks; and any array can be read alone, on any process, at any time.
    """
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/state/"}}
    context, spec = ts.Context(), {"driver": "zarr", "open": True, "fill_missing_data_reads": False}
    opening = {name: ts.open({**spec, "kvstore": {**database, "path": f"{name}/"}}, context=context) for name in names}
    return {name: future.result() for name, future in opening.items()}


def _load(store: ts.TensorStore, wanted: Any) -> jax.Array:
    """The array on the devices, each process reading what its own devices hold, and that once."""
    sharding = getattr(wanted, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    blocks: dict[str, np.ndarray] = {}

    def block(index: Any) -> np.ndarray:
        if str(index) not in blocks:
            blocks[str(index)] = store[index].read().result()
        return blocks[str(index)]

    return jax.make_array_from_callback(store.shape, sharding, block)


def _from_first(steps: list[int]) -> list[int]:
    """Process 0's steps (the last 64) on every process, so that all decide alike, whatever their file systems show."""
    if jax.process_count() == 1:
        return steps
    table = np.array(([-1] * 64 + steps)[-64:], np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(table) if step >= 0]
