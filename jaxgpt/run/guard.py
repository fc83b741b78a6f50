"""What keeps a long run safe from its surroundings: one writer per folder, signals, stalls, torn metrics."""

import contextlib
import enum
import faulthandler
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt import FULL, Unavailable, UserError, atomic_write, check_ordinary, from_json, store
from jaxgpt.console import complain
from jaxgpt.run import processes, sentinel
from jaxgpt.run.clock import RunClock
from jaxgpt.run.processes import LAST_ACTS, LAUNCHER, LINGER_S, joined

try:
    import fcntl
except ImportError:  # Windows: one writer per folder is then up to the user
    fcntl = None

log = logging.getLogger(__name__)

LOCK = ".lock"  # the file of a run's folder that is there as long as the run holds it
HOLDER = "jaxgpt/lock"  # the coordinator's key of what process 0 wrote into it
FOREVER_MS = 10**12
SHARED_S = 10.0  # how long a network file system may take to show another host's new file
LOCK_HELD_GRACE_S = 30.0  # beyond the timeout, where no thread of Python can run: compilations have held it for 10 s
REPEAT_S = 1.0  # a signal repeated within it is the same wish: a launcher and a process group deliver it twice


class Exit(enum.IntEnum):
    """Exit statuses of a run, for schedulers. A second signal ends it with 128 + the signal's number, as shells do."""

    DONE = 0
    FAILURE = 1  # a bug or a broken machine: a traceback tells
    USER_ERROR = 2  # one line, `error: …`; starting it again changes nothing
    UNAVAILABLE = 69  # likewise, but it may pass: a full disk, a folder in use, a late host (EX_UNAVAILABLE)
    STOPPED = 75  # by a signal, saved: start it again with init_from=auto (EX_TEMPFAIL of sysexits.h)
    STALLED = processes.STALLED  # no step within stall_timeout, or a process lost: start it again with init_from=auto
    DIVERGED = 77  # max_bad_steps non-finite steps in a row


class RunLock(contextlib.ExitStack):
    """A context in which this run alone writes to `folder`, made if it does not exist.

    Whatever depends on what the folder holds is decided within it. The system drops the lock when the process ends,
    however it ends. With several processes each enters; process 0 holds the lock for all. Raises Unavailable if another
    run holds it, UserError if the folder cannot be written, having changed nothing.
    """

    def __init__(self, folder: str | os.PathLike | store.StorePath):
        super().__init__()  # what is put on the stack is undone at the end, the last first
        self._path: Any = store.folder(folder).absolute() / LOCK
        self._handle: int | None = None
        self._before: set[str] | None = None  # what was in the folder before the start that is under way

    def __enter__(self) -> "RunLock":
        self._settle(self._take() if jax.process_index() == 0 else None)
        return self

    def _settle(self, problem: UserError | None) -> None:
        """Ends the taking of the lock, on all processes alike."""
        on_disk, several = isinstance(self._path, Path), jax.process_count() > 1 and fcntl is not None
        if on_disk and several and problem is None and jax.process_index() == 0:
            joined.client.key_value_set(HOLDER, self._path.read_text(), allow_overwrite=True)
        if not everywhere(problem is None):
            self.close()
            raise problem or UserError("process 0 could not lock the run's folder; see its message")
        if on_disk and several and not everywhere(self._shared()):
            self.close()
            raise UserError(
                f"out_dir {self._path.parent} is not one folder for all hosts (here: process {jax.process_index()}, "
                f"{socket.gethostname()}), and each writes its part of a checkpoint; name a folder that all hosts "
                "share, or one in a store: gs://BUCKET/PATH, s3://BUCKET/PATH"
            )
        LAST_ACTS.append(self._abandon)
        self.callback(LAST_ACTS.remove, self._abandon)

    def _shared(self) -> bool:
        """Whether this process sees the lock that process 0 holds."""
        holder, deadline = joined.client.blocking_key_value_get(HOLDER, FOREVER_MS), time.monotonic() + SHARED_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if self._path.read_text() == holder:
                    return True
            time.sleep(0.2)
        return False

    def lost(self) -> str:
        """Why the folder is no longer this run's; "" if it is.

        The folder was moved or its disk unmounted, and perhaps another run began at the same path. What is saved there
        then would mix two runs, hide what was there, or be hidden when it comes back.
        """
        if self._handle is None:  # another process holds it; or Windows
            return ""
        try:
            there = self._path.stat(follow_symlinks=False)
        except OSError:
            return f"{self._path}, there since the run began, is gone: was its disk unmounted, or the folder moved?"
        if not os.path.samestat(there, os.fstat(self._handle)):
            return f"{self._path} is no longer this run's: the folder was moved, and another run began in its place"
        return ""

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Within it, an exception removes from the folder what was not there before: a failed start leaves nothing."""
        self._before = self._names()
        try:
            yield
        except BaseException:
            self._undo_start()
            raise
        self._before = None

    def _names(self) -> set[str] | None:
        """What the folder holds; None on a process that does not hold the lock."""
        return None if self._handle is None else {path.name for path in self._path.parent.iterdir()}

    def _undo_start(self) -> None:
        if self._before is None or self.lost():
            return
        for path in [path for path in self._path.parent.iterdir() if path.name not in self._before]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                _quietly(path.unlink)

    def _abandon(self) -> None:
        """What leaving the context does, for a process that another one's failure ends."""
        self._undo_start()
        self.close()

    def _take(self) -> UserError | None:
        """Takes the lock; the error if it cannot."""
        folder = self._path.parent
        try:
            for path in (*reversed(folder.parents), folder):
                if not path.exists():
                    self.callback(_quietly, path.rmdir)  # if it is still empty then
            folder.mkdir(parents=True, exist_ok=True)
            try:
                for path in folder.iterdir():
                    check_ordinary(path)
            except UserError as error:
                return error
            while fcntl:
                with contextlib.ExitStack() as opened:
                    how = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                    handle = os.open(self._path, how, 0o644)
                    opened.callback(os.close, handle)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        holder = os.read(handle, 200).decode(errors="replace") or "another process"
                        hint = "wait for it, stop it, or choose another out_dir"
                        return Unavailable(f"{folder} is in use by {holder}; {hint}")
                    except OSError as error:  # a network file system without locks
                        log.warning("%s cannot be locked (%s): let no other run write there", folder, error.strerror)
                    with contextlib.suppress(FileNotFoundError):
                        if os.path.samestat(self._path.stat(), os.fstat(handle)):
                            # before it is closed: whoever has opened it meanwhile sees that it is gone
                            opened.callback(self._remove)
                            os.ftruncate(handle, 0)
                            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                            self._handle = handle
                            self.push(opened.pop_all())
                            break
                    # its last holder removed the file between our opening and locking it: again
        except OSError as error:
            text = f"out_dir {folder} cannot be written: {error.strerror or error}; choose another out_dir"
            return Unavailable(text) if error.errno in FULL else UserError(text)
        return None

    def _remove(self) -> None:
        """Removes the lock file, if it is this run's."""
        if not self.lost():
            _quietly(self._path.unlink)
        self._handle = None


def _quietly(remove: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):  # not empty, or its mount went away
        remove()


def everywhere(ok: bool) -> bool:
    """Whether `ok` on every process, each of which must call."""
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


class Stopped(Exception):
    """A stop was asked for."""


class Stop:
    """A context in which SIGTERM, SIGINT and SIGHUP ask the run to stop, and a later one ends the process at once.

    Enter it after `jax.distributed.initialize`. A thread handles the signals, so that a compilation cannot hold them
    up. With several processes, the one that gets a signal tells all through the coordinator. Every process publishes
    how many times it has called `requested`; all stop at the largest count plus one. (JAX's preemption service does the
    same, but looks for signals once a second.)

    A signal repeated within REPEAT_S is the same wish. Under scripts/launch_local no repetition counts: it hears a
    second wish itself, where a loaded machine cannot delay what it passes on.
    """

    def __init__(self) -> None:
        self._calls, self._stop_at = 0, math.inf  # calls of `requested`, and the first of them that says yes
        self._counting = threading.Lock()
        self._put_back = contextlib.ExitStack()
        self._several = jax.process_count() > 1
        self._agreeing = threading.Thread(target=self._agree, name="stop", daemon=True)

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            ear, bell = socket.socketpair()  # C writes a byte, the signal's number, as soon as a signal arrives
            bell.setblocking(False)
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
                numbers.append(signal.SIGHUP)
            listening = threading.Thread(target=self._listen, args=(ear, numbers), name="signals", daemon=True)
            listening.start()
            self._put_back.callback(listening.join, REPEAT_S)  # its line is printed, unless stderr takes none
            self._put_back.callback(bell.close)  # ends the thread
            old_fd = signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
            self._put_back.callback(signal.set_wakeup_fd, old_fd)
            for number in numbers:  # a handler must be there, but the bell does the work
                self._put_back.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        if self._several:
            self._agreeing.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._put_back.close()
        if self._several and exception[0] is None:  # else this process is ended, not left
            self._tell()  # stops none: all call `requested` equally often, so that none calls it again
            self._agreeing.join()  # a process cannot end in peace while a thread waits for a key

    def requested(self) -> bool:
        """Whether to stop now: save, and exit with Exit.STOPPED. With several processes each calls it equally often,
        and at least once a step; all get True at the same call, and from then on."""
        with self._counting:
            self._calls += 1
            return self._calls >= self._stop_at

    def check(self) -> None:
        """Raises Stopped if it is time to stop; counts as a call of `requested`."""
        if self.requested():
            raise Stopped

    def _listen(self, ear: socket.socket, numbers: list[signal.Signals]) -> None:
        first, launched = math.inf, LAUNCHER in os.environ
        with ear:
            while heard := ear.recv(1):  # empty: closed, the run is over
                if heard[0] not in numbers:  # of somebody else's handler
                    continue
                if first == math.inf:
                    first = time.monotonic()
                    if self._several:  # by a thread of its own: should that take long, later signals are heard
                        threading.Thread(target=self._tell, daemon=True).start()
                    else:
                        self._stop_at = 0
                    more = "" if launched else "; once more stops at once"
                    complain(f"{signal.Signals(heard[0]).name}: saving, then stopping{more}")
                elif time.monotonic() - first > REPEAT_S and not launched:
                    os._exit(128 + heard[0])

    def _tell(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone: JAX ends this process
            joined.client.key_value_set("jaxgpt/stop", "", allow_overwrite=True)

    def _agree(self) -> None:
        client = joined.client
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.blocking_key_value_get("jaxgpt/stop", FOREVER_MS)
            with self._counting:
                client.key_value_set(f"jaxgpt/calls/{jax.process_index()}", str(self._calls), allow_overwrite=True)
                keys = (f"jaxgpt/calls/{process}" for process in range(jax.process_count()))
                self._stop_at = 1 + max(int(client.blocking_key_value_get(key, FOREVER_MS)) for key in keys)


class Watchdog:
    """A context that ends the process with Exit.STALLED, every thread's stack printed, if no step finishes in time.

    `beat` at each finished step allows `timeout` more seconds; 0 disables. Waits of other lengths (compilation,
    evaluation) go under `allow`. Time for which the process did not run does not count: a suspended machine, SIGSTOP, a
    debugger.
    """

    def __init__(self, timeout: float):
        self._timeout, self._clock = timeout, RunClock()  # seconds
        self.beat()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._sentinel: sentinel.Sentinel | None = None

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            if sentinel.available():
                self._sentinel = sentinel.Sentinel(Exit.STALLED, LINGER_S)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._timeout:
            self._thread.join()
            if self._sentinel:
                self._sentinel.close()

    def beat(self) -> None:
        """A step finished."""
        self._deadline, self._what = self._clock.now() + self._timeout, "step"

    @contextlib.contextmanager
    def allow(self, what: str, seconds: float) -> Iterator[None]:
        """Within it, `what` may take `seconds` (or `timeout`, if that is more) without a finished step."""
        self._deadline, self._what = self._clock.now() + max(seconds, self._timeout), what
        yield
        self.beat()
        self._tell_sentinel()  # of the nearer deadline, before anything holds the interpreter's lock

    def _tell_sentinel(self) -> None:
        """Where something keeps the interpreter's lock, this thread is stuck too, and the sentinel ends the run."""
        left = max(0.0, self._deadline - self._clock.now()) + LOCK_HELD_GRACE_S
        if self._sentinel:
            self._sentinel.allow(left, self._what, self._thread)
        elif self._timeout:  # there the status is 1, and time for which the process was stopped counts
            faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)

    def _watch(self) -> None:
        while (left := self._deadline - self._clock.now()) >= 0:
            self._tell_sentinel()
            if self._clock.wait(self._ended, min(left, self._timeout / 4, 10.0)):
                faulthandler.cancel_dump_traceback_later()
                return
        complain(f"watchdog: no {self._what} finished in time; every thread's stack:")
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if jax.distributed.is_initialized():
            time.sleep(LINGER_S)  # others end with this one, and what all wait for may be in another
        os._exit(Exit.STALLED)


def trim_jsonl(path: store.AnyPath, step: int, without: str = "") -> int:
    """Drops from a file of one JSON object a line those with a `step` above `step`, and torn lines; atomically.

    `without`: a key that drops a line of `step` itself. Returns how many lines are left. UserError where it cannot be
    read or written.
    """

    def stays(line: bytes) -> bool:
        try:
            row = from_json(line)
            return line.endswith(b"\n") and (row["step"] < step or row["step"] == step and without not in row)
        except (ValueError, TypeError, KeyError):  # cut short by a kill, or blanks after a power cut
            return False

    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; move it away") from None
    kept = [line for line in lines if stays(line)]
    if kept != lines or kept and isinstance(path, store.StorePath):  # there the file begins anew: see store.py
        with atomic_write(path) as file:
            file.writelines(kept)
    return len(kept)
