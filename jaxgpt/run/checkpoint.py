"""Checkpoints: Orbax writes the arrays, digests prove them. The only module that touches Orbax.

`out_dir/checkpoints/<step>/` holds `state/`, the state as Orbax wrote it, a flat tree {path: array}; and `record.json`,
its manifest: {format, run, step, info, arrays: {path: [dtype, shape, digest]}, files: {name: [bytes, sha256 of small
ones]}, seal}. A folder gets its name after all of it has been written, synced and read back, and only then are older
ones removed. In an object store it is a little otherwise: see objects.py. No pickle is involved.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from jaxgpt import Unavailable, UserError, atomic_write, from_json, store
from jaxgpt.run.digests import differing, digests, host_digest
from jaxgpt.run.guard import RunLock, everywhere
from jaxgpt.run.objects import Objects
from jaxgpt.run.processes import joined

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

# Where one write of a save fails, Orbax closes its event loop; TensorStore's other writes then have none to report to,
# and Python prints a traceback of each; so it does of a loop that could not be made, for want of file descriptors. The
# save has failed by the first, and been reported. What asyncio logs of the other writes has tracebacks as well; of
# those not begun Python warns.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
_unraisable: Callable = sys.unraisablehook
sys.unraisablehook = lambda x: None if re.search("Event loop is closed|'_ssock'", str(x.exc_value)) else _unraisable(x)

FORMAT = 2  # of the state's tree and of the record; 1, which says none, had unnamed optimizer states
TMP = ".tmp"  # ends the name of a folder that is being written or removed, or that a kill left behind
SAVE_TIMEOUT_S = 600  # bounds a save in the background
_numbers = itertools.count(1)  # of saves, by which processes know them: each makes the same
BARRIERS = 2  # of Orbax in a save's background: when all have written, and when process 0 has given the folder its name
SPARE = 2**18  # bytes that a checkpoint may take besides its arrays: measured 10 to 40 KiB for 15 to 150 arrays
SPARE_FILES = 64  # files and folders that it may take: measured 21 for one process, 4 more for each other
SMALL_FILE = 2**20  # files up to this many bytes are hashed whole; larger ones hold arrays, which have their digests
# What Orbax, TensorStore and json are known to raise over a damaged file, a full disk or a mount that went away.
FAILURES = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, UserError)
GONE = (errno.ENOENT, errno.ENOTDIR)  # a file is not there


class PendingSave(NamedTuple):
    """A save under way, or one that failed at its beginning."""

    step: int
    info: dict
    future: Future | None  # of the part in the background
    error: Exception | None  # of the beginning: there is no future then, or it only waits for other processes


class Saved(NamedTuple):
    """The newest checkpoint that is known to be on disk, saved or restored."""

    step: int
    info: dict


class Checkpoints:
    """The checkpoints of a run's folder. Restoring writes nothing; saving needs the run's lock, by `begin`.

    With several processes each calls every method, in the same order. The best checkpoint is the one whose
    `info["val_loss"]` is lowest; it is kept besides the newest `keep`. A record carries the identity of its run, as
    config.json does: a checkpoint of another run is refused.
    """

    def __init__(self, out_dir: str | os.PathLike | store.StorePath, *, keep: int = 2):
        self.folder, self.keep = _absolute(store.folder(out_dir)) / "checkpoints", max(1, keep)
        self._place = Disk(self.folder) if isinstance(self.folder, Path) else Objects(self.folder, _sealed)
        self.before_commit: Callable[[], None] = lambda: None  # called, on process 0, before a checkpoint counts
        self.on_save: Callable[[int, dict], None] = lambda step, info: None  # told, on process 0, what is on disk
        self.failure = ""  # why the last save failed; "" if it did not, or another process knows
        self._lock: RunLock | None = None
        self._run = run_id(self.folder.parent)
        self._first = jax.process_index() == 0
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: PendingSave | None = None
        self._left_out, self._slow = False, False  # a save, since the last one begun; since the one before: it was said
        self._saved = Saved(-1, {})
        self._ok = True  # whether the last save succeeded
        self._unsound: set[int] = set()

    def begin(self, lock: RunLock, run: str) -> None:
        """For a run that holds its folder's lock, at its start: removes what killed saves and removals left.

        From then on nothing is written once the lock is lost. run: the run's identity, for the records. Raises
        UserError where there can be no checkpoints.
        """
        self._lock, self._run = lock, run
        if isinstance(self.folder, Path):
            self.check_path()
            if not self.folder.is_dir() and (self.folder.exists() or self.folder.is_symlink()):
                raise UserError(f"{self.folder} is no folder, as a run's checkpoints need; move it away")
            if self.folder.is_dir() and not os.access(self.folder, os.W_OK | os.X_OK):
                raise UserError(f"{self.folder} cannot be written; mend its permissions, or choose another out_dir")
        if self._first:
            self._place.tidy()

    def check_path(self) -> None:
        """Raises UserError where every save would fail for what is in the folder's path."""
        if not isinstance(self.folder, Path):
            return
        try:
            _spec({"driver": "file", "path": f"{self.folder}/"})
            bad = min(set(str(self.folder)) & set("[]\\"), default="")
        except ValueError:
            bad = ".__lock"
        if bad:
            why = f"TensorStore finds no files in a folder with {bad} in its path; choose another"
            raise UserError(f"out_dir {self.folder.parent}: {why}")

    def check_room(self, state: Any) -> None:
        """Raises Unavailable where a new run's disk has no room for one checkpoint of `state`, a pytree of shapes."""
        run = self.folder.parent
        if self._first and isinstance(run, Path) and (lacks := _lacks(run, _need(state))):
            raise Unavailable(f"{self.folder.parent} has no room for a checkpoint: {lacks}; make room")

    # --- what is there ---

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending, sound or not: empty means that there is nothing to resume."""
        return _from_first(self._steps())

    def _steps(self) -> list[int]:
        return sorted(int(name) for name in self._place.names() if re.fullmatch(r"0|[1-9]\d{0,8}", name))

    def _whole(self) -> tuple[list[int], list[int], dict[int, ValueError]]:
        """Steps, ascending, whose record is whole; if any has a validation loss, the one with the lowest; and what is
        wrong with other steps' records."""
        losses, wrong = {}, {}
        for step in self._steps():
            try:
                record = self._record(step)
            except ValueError as error:
                wrong[step] = error
                continue
            if step not in self._unsound:
                losses[step] = record["info"].get("val_loss")
        finite = sorted((x, step) for step, x in losses.items() if x is not None and math.isfinite(x))
        return [*losses], [step for _, step in finite[:1]], wrong

    def _record(self, step: int) -> dict:
        """The checkpoint's record, its seal checked. Raises ValueError."""
        try:
            record = from_json(self._place.record(step))
            whole = record["seal"] == _seal(record) and record["step"] == step
        except FAILURES as error:
            self._check_reachable(error)
            kind = _Unread if isinstance(error, OSError) and error.errno not in GONE else ValueError
            raise kind(f"record.json cannot be read ({_brief(error)})") from None
        if not whole:
            raise ValueError("record.json does not match its seal")
        return record

    def _check_reachable(self, error: Exception) -> None:
        """Raises Unavailable where the store could not be had: that says nothing of a checkpoint."""
        if isinstance(self.folder, store.StorePath) and (why := store.away(error)):
            raise Unavailable(f"{self.folder} cannot be read now: {why}") from None

    # --- saving ---

    def save(self, step: int, state: Any, info: dict, *, last: bool = True) -> None:
        """Saves `state`, a pytree of jax arrays, in the background; it may be donated as soon as this returns.

        `info` is a small JSON dictionary; `val_loss` in it ranks the checkpoint. A failure is logged, here or by the
        next call, the run goes on, and older checkpoints stay. A step that is on disk already is not saved again; if
        `info` brings a validation loss that it lacks there, `info` replaces what its record says. Raises UserError
        where processes no longer hold the same state.

        last: False where the run goes on and saves again. To an object store, which may be slower than the run, such a
        save is left out while the one before it is still being written, which is said once, until it no longer happens.
        """
        if not last and self._place.may_be_slow and self._pending:
            future, under_way = self._pending.future, self._pending.step
            if not everywhere(future is None or future.done()):
                if self._first and not self._slow:
                    log.warning(
                        "no checkpoint at %d, while %d is still being written to %s", step, under_way, self.folder
                    )
                self._left_out = self._slow = True
                return
        self._slow, self._left_out = self._left_out, False
        self.wait()
        info = json.loads(json.dumps(info, default=lambda x: x.item()))
        on_disk = self._saved.step == step
        if on_disk and (info.get("val_loss") is None or self._saved.info.get("val_loss") is not None):
            self._ok = True
            return
        arrays = _flat(state)[0]
        sums = {} if on_disk else digests(arrays)
        self._check_replicas(sums, step)
        error = None
        if self._first:  # a folder that cannot be written is found out before any process waits for another
            try:
                self._check_lock()
                if on_disk:
                    self.before_commit()
                    self._place.rewrite(step, {**self._record(step), "info": info})
                else:
                    self._place.make_room(step, _need(arrays))
            except FAILURES as raised:
                error = raised
        if on_disk or not everywhere(error is None):
            self._pending = PendingSave(step, info, None, error)
            self.wait()
            return
        try:
            self._place.write(step, arrays)
        except FAILURES as raised:
            error = raised
        record = {"format": FORMAT, "run": self._run, "step": step, "info": info}
        record |= {"arrays": {k: [*_kind(x), sums[k]] for k, x in arrays.items()}}
        future = self._background.submit(self._finish, record, error)
        self._pending = PendingSave(step, info, future, error)

    def check_replicas(self, state: Any, step: int) -> None:
        """Raises UserError where processes do not hold the same state, as replicas of the same shards must."""
        if jax.process_count() > 1:
            self._check_replicas(digests(_flat(state)[0]), step)

    def _check_replicas(self, sums: dict[str, str], step: int) -> None:
        if names := differing(sums):
            more = f" and {len(names) - 1} more arrays" if len(names) > 1 else ""
            kept = f"; checkpoint {self._saved.step} is sound: resume from it" if self._saved.step >= 0 else ""
            raise UserError(
                f"processes do not hold the same {names[0]}{more} at step {step}: a device computes wrongly, or a "
                f"process runs something else{kept}",
                status=1,
            )

    def _check_lock(self) -> None:
        """Raises OSError where the run's folder is no longer this run's."""
        if self._lock and (why := self._lock.lost()):
            raise OSError(why)

    def _finish(self, record: dict, error: Exception | None) -> None:
        """In the background: awaits the writes of all processes, then process 0 commits. error: of the beginning."""
        done = False
        try:
            self._place.finish(error)
            if self._first and error is None:
                self._commit(record)
            done = error is None
        finally:
            if self._first and not done and not (self._lock and self._lock.lost()):
                with contextlib.suppress(OSError):
                    self._place.abandon(record["step"])  # a full disk needs the room
            if self._first and isinstance(self.folder, store.StorePath):
                (store.succeeded if done else store.failed)(self.folder)
            self._place.part(done)

    def _commit(self, record: dict) -> None:
        """Reads the new checkpoint back, gives it its record and name, then removes what is no longer kept."""
        step = record["step"]
        for name, array in self._place.written(record["arrays"]):
            if host_digest(array) != record["arrays"][name][2]:
                raise ValueError(f"array {name} reads back differently")
        self.before_commit()
        self._place.commit(step, record, self._check_lock)
        self._unsound.discard(step)
        self.on_save(step, record["info"])
        # After resuming from an earlier step, newer checkpoints are stale and are deleted.
        try:
            self._unsound.update(later for later in self._steps() if later > step)
            whole, best, wrong = self._whole()
        except (OSError, Unavailable) as error:
            log.warning("what is no longer needed in %s stays until the next save: %s", self.folder, _brief(error))
            return
        for old in {*self._steps()} - {step, *whole[-self.keep :], *best}:
            if old < step and isinstance(wrong.get(old), _Unread):  # it may be sound, and the best
                continue
            try:
                self._place.remove(old)
            except OSError as error:
                log.warning("checkpoint %d is no longer needed but cannot be removed: %s", old, _brief(error))

    def wait(self) -> bool:
        """Waits for the save in the background; whether the last save succeeded, on all processes."""
        if self._pending is None:
            return self._ok
        step, info, future, error = self._pending
        late = future.exception() if future else None  # waits, also after an error at the beginning
        error = error or late
        # with a store all processes fail alike, and a save that fails after another is of the same outage: said once
        told = self._first and self._ok if self._place.may_be_slow else self._first or error is not None
        self._ok = everywhere(error is None)
        self.failure = "" if error is None else _brief(error)
        if self._ok:
            self._saved = Saved(step, info)
        elif told:
            why = self.failure or "another process failed"
            kept = self._saved.step
            then = f"the newest on disk is {kept}" if kept >= 0 else "there is none on disk yet"
            log.error("CHECKPOINT %d NOT SAVED in %s: %s; the run goes on, %s", step, self.folder, why, then)
        self._pending = None
        return self._ok

    def close(self) -> None:
        """Lets a save in the background end, asking no other process: for the way out after an error."""
        self._background.shutdown()

    # --- restoring ---

    def restore(
        self,
        abstract_state: Any,
        which: Literal["latest", "best"] | int = "latest",
        *,
        optional: Collection[str] = (),
    ) -> tuple[Any, dict, int]:
        """(state, info, step) of the checkpoint asked for, or of the newest sound one, saying what was passed over.

        `abstract_state` is the saved pytree, or some of its top-level fields ({"params": …} leaves the optimizer state
        unread), as ShapeDtypeStructs whose shardings (default: the first local device) need not be those it was saved
        with. A field named in `optional` that the checkpoint lacks is None in the result, which is said. Every array is
        checked against its digest. Raises UserError if nothing sound fits, or if a checkpoint is another run's.
        """
        self.wait()
        wanted = _flat(abstract_state)[0]
        there = self.steps()
        steps = [step for step in reversed(there) if isinstance(which, str) or step == which]
        best, problems, other_model = [], [], ""
        if which == "best":
            _, best, wrong = self._whole()
            best = _from_first(best)
            for step in sorted(wrong, reverse=True) if self._first else ():  # it might be the best: its loss is unknown
                problems.append(f"checkpoint {step} passed over: {_brief(wrong[step])}")
        for step in dict.fromkeys(best + steps):
            try:
                record, arrays = self._read(step, wanted, optional)
            except ValueError as error:
                other_model = other_model or (str(error) if isinstance(error, _OtherModel) else "")
                problems.append(f"checkpoint {step} passed over: {_brief(error)}")
                self._unsound.add(step)
                continue
            there, here = ({path.split(".")[0] for path in names} for names in (record["arrays"], wanted))
            missing, rest = sorted(here - there), sorted(there - here) if "opt_state" in here else []
            notes = [f"{text}; using checkpoint {step}" for text in dict.fromkeys(problems)]
            if missing:
                notes.append(f"checkpoint {step} has no {', '.join(missing)}, which begins at its parameters")
            if rest:
                notes.append(f"checkpoint {step} also holds {', '.join(rest)}, which this run does not use")
            for note in notes if self._first else ():
                log.warning(note)
            self._saved = Saved(step, record["info"])
            state = _without(abstract_state, missing)
            leaves, treedef = _flat(state)
            return treedef.unflatten(arrays[path] for path in leaves), record["info"], step
        if other_model:
            what = "another optimizer's state" if other_model.startswith("opt_state") else "another model"
            raise UserError(f"{self.folder} holds {what}: {other_model}; give the settings it was trained with")
        if problems:
            raise UserError(f"no sound checkpoint in {self.folder}: {'; '.join(dict.fromkeys(problems))}")
        named = "" if isinstance(which, str) else f" {which}"
        hint = f"those there are {', '.join(map(str, there[-10:]))}" if there else "check out_dir"
        raise UserError(f"no checkpoint{named} in {self.folder}; {hint}")

    def _read(self, step: int, wanted: dict[str, Any], optional: Collection[str]) -> tuple[dict, dict[str, jax.Array]]:
        """The record and the wanted arrays, all checked. Raises ValueError, on every process if on any; UserError where
        the checkpoint is sound, but not for this program or this run."""
        folder, record, arrays, failure = self.folder / str(step), {}, {}, None
        try:
            record = self._record(step)
            _check_format(record, wanted, folder)
            if self._run and record.get("run") and record["run"] != self._run:
                ids = f"{record['run']}, not {self._run}"
                raise UserError(f"{folder} is another run's ({ids}); move it back to where it came from")
            wanted = {k: x for k, x in wanted.items() if k.split(".")[0] not in _lacking(record, optional)}
            _check_fits(record, wanted)
            found = self._place.files(step, record)
            if damaged := [name for name, of in record["files"].items() if found.get(name) != of]:
                raise ValueError(f"file {damaged[0]} is {'altered' if damaged[0] in found else 'missing'}")
            arrays = _load(self._place.open(step, record, wanted), wanted, self._place.READ_AHEAD)
        except FAILURES as error:
            failure = error if isinstance(error, ValueError | UserError) else ValueError(_brief(error))
            try:
                self._check_reachable(error)
            except Unavailable as unavailable:
                failure = unavailable
        if not everywhere(failure is None):
            raise failure or ValueError("another process cannot read it")
        for path, digest in digests(arrays).items():  # from here on every process sees the same
            if digest != record["arrays"][path][2]:
                raise ValueError(f"array {path} does not match its digest")
        return record, arrays


# --- names, records, files ---


def run_id(run: store.AnyPath) -> str:
    """The identity in a run's config.json, which survives copying the folder; "" where there is none."""
    try:
        found = from_json((run / "config.json").read_bytes()).get("run_id", "")
    except (OSError, ValueError, AttributeError) as error:  # whoever needs the config says what is wrong
        if isinstance(run, store.StorePath) and store.away(error):
            raise
        return ""
    return found if isinstance(found, str) else ""


def _absolute(folder: Any) -> Any:
    """The folder's absolute path, without .. and // at its beginning, which TensorStore does not take."""
    path = folder.absolute()
    if not isinstance(path, Path) or not {"..", "//"} & set(path.parts):
        return path
    path = Path(os.path.realpath(path))
    return Path("/", *path.parts[1:]) if os.name == "posix" else path


def _flat(tree: Any) -> tuple[dict[str, Any], Any]:
    """({"params.h.0.ln_1.scale": leaf, …}, treedef): names that do not depend on the containers' types."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}, treedef


def _kind(x: Any) -> tuple[str, list[int]]:
    return np.dtype(x.dtype).name, list(x.shape)


def _without(state: Any, fields: Collection[str]) -> Any:
    """The NamedTuple or dictionary with these fields None."""
    if not fields:
        return state
    gone = dict.fromkeys(fields)
    return {**state, **gone} if isinstance(state, dict) else state._replace(**gone)


def _lacking(record: dict, optional: Collection[str]) -> set[str]:
    """Those of the optional fields that the checkpoint has no array of."""
    return set(optional) - {path.split(".")[0] for path in record["arrays"]}


def _check_format(record: dict, wanted: dict[str, Any], folder: store.AnyPath) -> None:
    """Raises UserError where the record's format is not this program's. Parameters alone are the same in all."""
    version = record.get("format", 1)
    if version > FORMAT:
        raise UserError(f"{folder} is of format {version}, and this jaxgpt reads up to {FORMAT}; use a newer jaxgpt")
    if version < FORMAT and any(path.split(".")[0] != "params" for path in wanted):
        raise UserError(
            f"{folder} was saved by an older jaxgpt (format {version}) and cannot be resumed by this one; start a new "
            f"run from its parameters: --config.init_from={folder.parent.parent} and another out_dir"
        )


class _Unread(ValueError):
    """The file is there, or may be, and cannot be read now, as for want of file descriptors."""


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


def _sealed(record: dict) -> bytes:
    return json.dumps({**record, "seal": _seal(record)}).encode()


def _write_record(folder: Path, record: dict) -> None:
    with atomic_write(folder / "record.json") as file:
        file.write(_sealed(record))


def _make_room(working: Path, need: int) -> None:
    """An empty folder with `need` bytes free. Raises OSError; Orbax would, with the tracebacks of all its writes."""
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    if lacks := _lacks(working, need):
        working.rmdir()
        raise OSError(errno.ENOSPC, lacks)


def _need(tree: Any) -> int:
    """Bytes that a checkpoint of these arrays, or shapes, takes at most."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)) + SPARE


def _lacks(folder: Path, need: int) -> str:
    """What a folder's disk lacks for a checkpoint of `need` bytes; "" if nothing."""
    if (free := shutil.disk_usage(folder).free) < need:
        return f"{free:,} bytes are free, {need:,} needed"
    if hasattr(os, "statvfs"):
        there = os.statvfs(folder)
        if there.f_files and there.f_favail < SPARE_FILES:  # 0: a file system without a bound on inodes
            return f"{there.f_favail:,} more files may be made (inodes), {SPARE_FILES} needed"
    return ""


def _sync_metrics(run: Path) -> None:
    """Has metrics.jsonl outlive a power cut, before a checkpoint commits: all its lines up to that step are written."""
    if (run / "metrics.jsonl").is_file():
        _sync(run / "metrics.jsonl")
        _sync(run)


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
    text = store.away(error) or str(error) or type(error).__name__
    return kind + re.split(r"\n| in OCDBT | \[tensorstore", text)[0][:300]


# --- arrays on disk ---


class Disk:
    """A run's checkpoints on a file system that all its processes share; Orbax writes them."""

    may_be_slow, READ_AHEAD = False, 0

    def __init__(self, folder: Path):
        self.folder = folder
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
        # If Orbax makes folders in the background and one cannot be made, its threads wait for it for five minutes
        options = ocp.AsyncOptions(
            create_directories_asynchronously=False, timeout_secs=SAVE_TIMEOUT_S, barrier_sync_fn=self._meet
        )
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        self._working = folder  # of the save under way
        self._number, self._phase = 0, 0  # of the save under way, and of its next barrier

    def names(self) -> list[str]:
        """What the checkpoints' folder holds."""
        return [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []

    def record(self, step: int) -> bytes:
        return (self.folder / str(step) / "record.json").read_bytes()

    def files(self, step: int, record: dict) -> dict[str, list]:
        """Those that are there, as the record has them."""
        return _files(self.folder / str(step))

    def open(self, step: int, record: dict, names: Iterable[str]) -> dict[str, ts.TensorStore]:
        """Each named array of a checkpoint. Raises ValueError."""
        return _open(self.folder / str(step), names)

    def tidy(self) -> None:
        """Removes what killed saves and removals left."""
        for path in self.folder.glob(f"*{TMP}"):
            shutil.rmtree(path, ignore_errors=True)

    def make_room(self, step: int, need: int) -> None:
        """Raises OSError where a new checkpoint of `need` bytes cannot be written. By process 0, before `write`."""
        _make_room(self._temporary(step), need)

    def _temporary(self, step: int) -> Path:
        return self.folder / f"{step}{TMP}"

    def write(self, step: int, arrays: dict[str, jax.Array]) -> None:
        """Begins a save, by every process; the arrays may be donated when this returns."""
        self._working = self._temporary(step)
        self._number, self._phase = next(_numbers), 0
        if jax.process_index() == 0 and jax.process_count() > 1:  # all have left the barriers of the save before
            joined.client.key_value_delete(f"jaxgpt/save/{self._number - 1}")
        self._orbax.save(self._working / "state", args=ocp.args.PyTreeSave(arrays))

    def finish(self, error: Exception | None) -> None:
        """In the background: awaits the writes of all processes. error: of this one's `write`."""
        try:
            self._orbax.wait_until_finished()
        except Exception as raised:
            error = raised
            raise
        finally:
            if error is not None and jax.process_count() > 1:
                while self._phase < BARRIERS:
                    self._arrive(f"process {jax.process_index()} failed: {_brief(error)}")

    def _meet(self, key: str, timeout_ms: int) -> None:
        """Orbax's barrier in the background. Raises OSError as soon as a process has failed; Orbax's own waits for it
        until the timeout. (`key` is Orbax's name of the barrier; the same save has the same number everywhere.)"""
        client, name = joined.client, self._arrive("")
        if jax.process_index() == 0:
            said = (client.blocking_key_value_get(f"{name}/{i}", timeout_ms) for i in range(jax.process_count()))
            client.key_value_set(f"{name}/all", next(filter(None, said), ""))
        if failure := client.blocking_key_value_get(f"{name}/all", timeout_ms):
            raise OSError(failure)

    def _arrive(self, failure: str) -> str:
        """Publishes that this process is at the next barrier, or has failed before it. Returns the barrier's name."""
        name, me = f"jaxgpt/save/{self._number}/{self._phase}", jax.process_index()
        self._phase += 1
        joined.client.key_value_set(f"{name}/{me}", failure)
        if failure and me == 0:
            joined.client.key_value_set(f"{name}/all", failure)
        return name

    def part(self, done: bool) -> None:
        """In the background, the last: the processes part. done: whether all went well here."""

    def written(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """The arrays of the save under way, read back: one at a time, in memory for the largest alone."""
        yield from ((name, np.asarray(array.read().result())) for name, array in _open(self._working, names).items())

    def commit(self, step: int, record: dict, check: Callable[[], None]) -> None:
        """Gives the save its record and name, which make it a checkpoint. check: whether it still may, else raises."""
        _write_record(self._working, {**record, "files": _files(self._working)})
        for path in (*self._working.rglob("*"), self._working):
            _sync(path)
        check()
        _sync_metrics(self.folder.parent)
        final = self.folder / str(step)
        if final.exists():  # damaged and passed over, or stale: see Checkpoints
            self.remove(step)
        self._working.rename(final)
        _sync(self.folder)  # before older ones go

    def rewrite(self, step: int, record: dict) -> None:
        """Another record for a checkpoint."""
        _sync_metrics(self.folder.parent)
        _write_record(self.folder / str(step), record)

    def remove(self, step: int) -> None:
        """Renames first: a removal cut short must not leave half a checkpoint."""
        shutil.rmtree((self.folder / str(step)).rename(self.folder / f"{step}-old{TMP}"))

    def abandon(self, step: int) -> None:
        """Removes what a failed save has left."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)


def _open(folder: Path, names: Iterable[str]) -> dict[str, ts.TensorStore]:
    """Each named array as Orbax laid it out: zarr in one OCDBT database. Raises ValueError.

    TensorStore reads here rather than Orbax: over a damaged file, Orbax's event loop ends before its reads do and fills
    the terminal with their tracebacks; and any array can be read alone, on any process, at any time.
    """
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/state/"}}
    context, spec = ts.Context(), {"driver": "zarr", "open": True, "fill_missing_data_reads": False}
    opening = {name: ts.open({**spec, "kvstore": {**database, "path": f"{name}/"}}, context=context) for name in names}
    return {name: future.result() for name, future in opening.items()}


def _load(stores: Mapping[str, ts.TensorStore], wanted: Mapping[str, Any], ahead: int) -> dict[str, jax.Array]:
    """The arrays on the devices, each process reading what its own devices hold, and that once.

    ahead: how many bytes are asked for before those of the array in hand have come.
    """
    arrays: dict[str, jax.Array] = {}
    asked: deque[tuple[str, Any, dict[str, ts.Future], int]] = deque()

    def take() -> None:
        name, sharding, blocks, _ = asked.popleft()
        read = {index: future.result() for index, future in blocks.items()}
        arrays[name] = jax.make_array_from_callback(stores[name].shape, sharding, lambda index: read[str(index)])

    for name, array in stores.items():
        sharding = getattr(wanted[name], "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        indices = {str(index): index for index in sharding.addressable_devices_indices_map(array.shape).values()}
        blocks = {key: array[index].read() for key, index in indices.items()}
        asked.append((name, sharding, blocks, array.size * array.dtype.numpy_dtype.itemsize))
        while asked and sum(size for *_, size in asked) > ahead:
            take()
    while asked:
        take()
    return arrays


def _from_first(steps: list[int]) -> list[int]:
    """Process 0's steps (the last 64) on every process, so that all decide alike, whatever their file systems show."""
    if jax.process_count() == 1:
        return steps
    table = np.array(([-1] * 64 + steps)[-64:], np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(table) if step >= 0]
