"""Corpora from object stores in a local folder: each file fetched once a host, its digest checked, then memory-mapped.

`data_cache/<hash of the folder's name and the object's generation>/<file>`: another content under the same name is
another entry. Processes take turns at an entry by file locks. The whole is kept below a bound: entries that no process
uses go, those longest unused first. On a file system without locks none goes, and a file may be fetched twice at once.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from jaxgpt import FULL, Unavailable, UserError, local_path, store
from jaxgpt.store import StorePath

try:
    import fcntl
except ImportError:  # Windows: let one process at a time use a cache
    fcntl = None

log = logging.getLogger(__name__)

THREADS = 8  # that fetch at a time
CHECKED_BYTES = 64 << 20  # a local copy up to this size has its digest checked each time it is found (about 50 ms)
USED = ".used"  # an entry's file that whoever uses it holds a shared lock on; its time is that of the last use


def default_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jaxgpt", "data")
    except RuntimeError:  # there is no home folder
        return Path(tempfile.gettempdir(), f"jaxgpt-{os.getuid()}", "data")


class Cache:
    """folder: "" for the user's own. limit_gb: what it may take, in 10^9 bytes."""

    def __init__(self, folder: str = "", limit_gb: float = 100.0):
        self.folder = local_path(folder) if folder else default_folder()
        self.limit = int(limit_gb * 1e9)
        self._held: dict[Path, int] = {}  # entries in use by this process, and their open files
        self._lock = threading.Lock()

    def fetch(self, files: Sequence[StorePath], sha256: dict[str, str], sizes: dict[str, int]) -> Future[list[Path]]:
        """Begins to make local copies of the files, where they are not there yet. sha256, sizes: by name, if known.

        Raises UserError where they do not fit the bound. The result raises it where they are altered or no longer fit,
        and where the folder cannot be used; OSError where the store fails.
        """
        if (needed := sum(sizes.get(file.name, 0) for file in files)) > self.limit:
            raise UserError(
                f"{files[0].parent} has {needed / 1e9:.1f} GB, more than data_cache_gb={self.limit / 1e9:g}; raise it, "
                "and name a data_cache with that room"
            )
        fetched, found, todo, lock = Future(), dict[StorePath, Path](), deque(files), threading.Lock()

        def work() -> None:
            try:
                while not fetched.done():
                    with lock:
                        if not todo:
                            return
                        file = todo.popleft()
                    path = self._one(file, sha256.get(file.name, ""), sizes.get(file.name))
                    with lock:
                        found[file] = path
                        if len(found) == len(files):
                            fetched.set_result([found[file] for file in files])
            except BaseException as error:
                with lock:
                    if not fetched.done():
                        fetched.set_exception(error)

        for _ in range(min(THREADS, len(files))):  # no pool: its threads would finish all before a process ends
            threading.Thread(target=work, name="fetch").start()
        return fetched

    def _one(self, file: StorePath, sha256: str, size: int | None) -> Path:
        try:
            return self._copy(file, sha256, size)
        except OSError as error:
            if not error.filename or "://" in str(error.filename):  # the store's
                raise
            text = f"data_cache {self.folder} cannot be used: {error.strerror} ({error.filename})"
            full = error.errno in FULL
            raise (Unavailable(f"{text}; make room") if full else UserError(f"{text}; name another")) from None

    def _copy(self, file: StorePath, sha256: str, size: int | None) -> Path:
        generation = file.generation()
        entry = self.folder / hashlib.sha256(f"{file.parent}\n{generation.hex()}".encode()).hexdigest()[:32]
        path = entry / file.name
        self._hold(entry)
        with _alone(entry):
            if path.is_file() and (size is None or path.stat().st_size == size):
                if not sha256 or path.stat().st_size > CHECKED_BYTES or _sha256(path) == sha256:
                    return path
                log.warning("%s was altered; it is fetched again", path)
            self._make_room(size or 0)

            def check(found: str) -> None:
                if sha256 and found != sha256:
                    raise UserError(f"{file} was altered (its sha256 is not meta.json's); run its prepare.py again")

            store.fetch(file, path, size, check)
            self._make_room(0)
        return path

    def _hold(self, entry: Path) -> None:
        """Marks an entry as in use until this process ends."""
        with self._lock:
            while entry not in self._held:
                entry.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # removed at this moment: again
                    handle = os.open(entry / USED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                    _locked(handle, "LOCK_SH")
                    if not (entry / USED).exists():
                        os.close(handle)
                        continue
                    self._held[entry] = handle
            os.utime(entry / USED)

    def _make_room(self, size: int) -> None:
        """Removes entries that nobody uses until `size` more bytes fit. Raises UserError where they do not."""
        with self._lock:
            entries = sorted(self.folder.glob(f"*/{USED}"), key=lambda path: path.stat().st_mtime)
            taken = {path.parent: _bytes(path.parent) for path in entries}
            for entry in [entry for entry in taken if entry not in self._held]:
                if sum(taken.values()) + size <= self.limit:
                    return
                if _remove(entry):
                    del taken[entry]
            if (total := sum(taken.values()) + size) > self.limit:
                raise UserError(
                    f"{self.folder} would hold {total / 1e9:.1f} GB in use, more than data_cache_gb="
                    f"{self.limit / 1e9:g}; raise it"
                )


def _bytes(entry: Path) -> int:
    total = 0
    for path in entry.iterdir():
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _remove(entry: Path) -> bool:
    """Removes an entry unless a process uses it."""
    with contextlib.suppress(OSError):
        handle = os.open(entry / USED, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _locked(handle, "LOCK_EX", "LOCK_NB"):
                shutil.rmtree(entry)
                return True
        finally:
            os.close(handle)
    return False


def _locked(handle: int, *how: str) -> bool:
    """Locks an open file. False where its file system has no locks. Raises BlockingIOError."""
    try:
        if fcntl:
            fcntl.flock(handle, sum(getattr(fcntl, each) for each in how))
        return True
    except BlockingIOError:
        raise
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _alone(entry: Path) -> Iterator[None]:
    """Within it no other process of this host fetches into the entry."""
    handle = os.open(entry / ".fetching", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        for left in entry.glob("*.partial") if _locked(handle, "LOCK_EX") else ():  # by a process that was killed
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)
