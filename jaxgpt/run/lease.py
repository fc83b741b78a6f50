"""One writer per folder in an object store, where there are no locks: a lease, taken and renewed by conditional writes.

The folder's `.lock` names the holder and how long the lease lasts. The holder writes it again every sixth of that time,
each time in place of just what it wrote before. Whoever finds it watches it, by its own clock alone: if it changes, the
folder is in use; if it has not changed for the whole time, its holder is dead or cut off, and it is replaced, again
only if it still is what was watched. A holder that could not renew its lease in time writes nothing more until it can.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path

import jax

from jaxgpt import Unavailable, UserError, from_json, user_error
from jaxgpt.run.guard import LOCK, RunLock
from jaxgpt.run.processes import agree
from jaxgpt.store import ABSENT, AnyPath, StorePath

log = logging.getLogger(__name__)

LEASE_S = 60.0  # how long a lease lasts unrenewed: JAXGPT_LEASE
BEATS = 6  # renewals in that time


def now() -> float:
    """Seconds from some moment on, those in which the machine is suspended among them, where the system tells."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def lease_seconds() -> float:
    text = os.environ.get("JAXGPT_LEASE", str(LEASE_S))
    try:
        if 1 <= float(text) < 1e5:
            return float(text)
    except ValueError:
        pass
    raise UserError(f"JAXGPT_LEASE={text} is not a number of seconds, at least 1")


def lock(folder: AnyPath) -> RunLock:
    """The lock of a run's folder, wherever that is."""
    return RunLock(folder) if isinstance(folder, Path) else Lease(folder)


class Lease(RunLock):
    """As RunLock, for a folder in a store. Raises UserError where the store does not heed conditions."""

    def __init__(self, folder: StorePath):
        super().__init__(folder)
        self._seconds, self._beat = lease_seconds(), 0
        self._id = {"holder": f"process {os.getpid()} on {socket.gethostname()}", "id": secrets.token_hex(8)}
        self._generation: bytes = ABSENT
        self._until = 0.0  # on our clock, the lease is surely ours
        self._held, self._taken, self._why = False, "", ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        problem = self._take() if jax.process_index() == 0 else None
        agree("lock", {})  # process 0 may watch another's lease for longer than a collective waits
        self._settle(problem)
        return self

    def lost(self) -> str:
        if not self._held:
            return ""
        if self._taken:
            return self._taken
        if now() > self._until:
            return f"the lease on {self._path.parent} was not renewed for {self._seconds:g} s ({self._why})"
        return ""

    def _names(self) -> set[str] | None:
        return set(self._path.parent.objects()) if self._held else None

    def _undo_start(self) -> None:
        before = self._before
        if before is None or self.lost():
            return
        with contextlib.suppress(OSError):
            folder = self._path.parent
            folder.remove_all([key for key in folder.objects() if key not in before and key != LOCK])

    def _take(self) -> UserError | None:
        try:
            self._path.objects()  # tells a bucket that is not there, which to S3's reads is an object that is not there
            found = self._read()
            if found is not None and (problem := self._watch(*found)):
                return problem
            if problem := self._check_deletes():
                return problem
            began, expected = now(), self._generation
            if not self._write(expected):
                return Unavailable(
                    f"{self._path.parent} was taken by another run at this moment; choose another out_dir"
                )
            if expected == ABSENT and self._path.put(b"{}", replacing=ABSENT) is not None:
                self._path.unlink()
                return UserError(
                    f"{self._path.parent} is in a store without conditional writes (If-None-Match), so that two runs "
                    "could write there at once; choose another out_dir"
                )
        except OSError as error:
            return user_error(error)
        self._held, self._until = True, began + self._seconds
        self._thread.start()
        self.callback(self._remove)
        return None

    def _check_deletes(self) -> UserError | None:
        """The error where nothing can be deleted: the lease would stay, and a resumed run could not be saved."""
        try:
            with contextlib.suppress(FileNotFoundError):
                self._path.with_name(f"{LOCK}-{self._id['id']}").unlink()  # there is none
        except PermissionError as error:
            why = f"objects cannot be deleted there, as older checkpoints are ({error.strerror})"
            return UserError(f"{self._path.parent}: {why}; allow it, or choose another out_dir")
        return None

    def _read(self) -> tuple[dict, bytes] | None:
        try:
            content, self._generation = self._path.get()
        except FileNotFoundError:
            self._generation = ABSENT
            return None
        try:
            found = from_json(content)
            return {"holder": str(found["holder"]), "seconds": float(found["seconds"])}, self._generation
        except (ValueError, TypeError, LookupError):
            return {"holder": "another process", "seconds": self._seconds}, self._generation

    def _watch(self, found: dict, generation: bytes) -> UserError | None:
        """Returns when the lease that was found has run out or is gone; the error if it is renewed."""
        seconds, since = min(max(1.0, found["seconds"]), 3600.0), now()
        log.warning("%s is leased by %s: watching for up to %g s", self._path.parent, found["holder"], seconds)
        while now() - since <= seconds:
            time.sleep(min(1.0, seconds / BEATS / 2))
            if self._read() is None:
                return None
            if self._generation != generation:
                hint = "wait for it, stop it, or choose another out_dir"
                return Unavailable(f"{self._path.parent} is in use by {found['holder']}; {hint}")
        return None

    def _write(self, replacing: bytes) -> bool:
        """The lease, in place of what `replacing` is; whether it was."""
        self._beat += 1
        content = json.dumps({**self._id, "seconds": self._seconds, "beat": self._beat}).encode()
        generation = self._path.put(content, replacing=replacing, retries=0, timeout=self._seconds / 2)
        if generation is None:
            return False
        self._generation = generation
        return True

    def _renew(self) -> None:
        while not self._over.wait(self._seconds / BEATS):
            began = now()
            try:
                if not self._write(self._generation) and not self._ours():
                    self._taken = f"{self._path} is no longer this run's: another run took it over, or it was removed"
                    return
                self._until, self._why = began + self._seconds, ""
            except OSError as error:
                self._why = error.strerror or "no answer in time"

    def _ours(self) -> bool:
        """Whether what is there is an earlier write of ours whose answer was lost."""
        try:
            content, generation = self._path.get()
            ours = from_json(content).get("id") == self._id["id"]
        except (FileNotFoundError, ValueError, AttributeError):
            return False
        if ours:
            self._generation = generation
        return ours

    def _remove(self) -> None:
        self._over.set()
        self._thread.join()
        if not self.lost():
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._held = False
