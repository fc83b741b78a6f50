"""What keeps a long run safe from its surroundings: one writer per folder, signals, stalls, torn metrics."""

import contextlib
import enum
import faulthandler
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt import UserError, atomic_write
from jaxgpt.run.processes import LINGER_S, joined

try:
    import fcntl
except ImportError:  # Windows: one writer per folder is then up to the user
    fcntl = None

log = logging.getLogger(__name__)

LOCK = ".lock"  # the file of a run's folder that is there as long as the run holds it
FOREVER_MS = 10**12
LOCK_HELD_GRACE_S = 30.0  # how long the watchdog's thread may wait for the interpreter's lock


class Exit(enum.IntEnum):
    """Exit statuses of a run, for schedulers. A second signal ends it with 128 + the signal's number, as shells do."""

    DONE = 0
    FAILURE = 1  # a bug or a broken machine: a traceback tells
    USER_ERROR = 2  # one line, `error: …`; starting it again changes nothing
    STOPPED = 75  # by a signal, saved: start it again with init_from=auto (EX_TEMPFAIL of sysexits.h)
    STALLED = 76  # no step within stall_timeout: start it again with init_from=auto
    DIVERGED = 77  # max_bad_steps non-finite steps in a row


class RunLock(contextlib.ExitStack):
    """A context in which this run alone writes to `folder`, made if it does not exist.

    The system drops the lock when its process ends, however it ends. With several processes each enters; process 0
    holds the lock for all. Raises UserError, having changed nothing, if another run holds it or the folder cannot be
    written.
    """

    def __init__(self, folder: str | os.PathLike):
        super().__init__()  # what is put on the stack is undone at the end, the last first
        self._path = Path(folder).absolute() / LOCK

    def __enter__(self) -> "RunLock":
        problem = self._take() if jax.process_index() == 0 else ""
        if not everywhere(not problem):
            self.close()
            raise UserError(problem or "process 0 could not lock the run's folder; see its message")
        return self

    def _take(self) -> str:
        """Takes the lock; says why if it cannot."""
        folder = self._path.parent
        try:
            for path in (*reversed(folder.parents), folder):
                if not path.exists():
                    self.callback(_quietly, path.rmdir)  # if it is still empty then
            folder.mkdir(parents=True, exist_ok=True)
            while fcntl:
                with contextlib.ExitStack() as opened:
                    handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                    opened.callback(os.close, handle)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        holder = os.read(handle, 200).decode(errors="replace") or "another process"
                        return f"{folder} is in use by {holder}; wait for it, stop it, or choose another out_dir"
                    except OSError as error:  # a network file system without locks
                        log.warning("%s cannot be locked (%s): let no other run write there", folder, error.strerror)
                    with contextlib.suppress(FileNotFoundError):
                        if os.path.samestat(self._path.stat(), os.fstat(handle)):
                            # before it is closed: whoever has opened it meanwhile sees that it is gone
                            opened.callback(_quietly, self._path.unlink)
                            os.ftruncate(handle, 0)
                            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                            self.push(opened.pop_all())
                            break
                    # its last holder removed the file between our opening and locking it: again
        except OSError as error:
            return f"out_dir {folder} cannot be written: {error.strerror or error}; choose another out_dir"
        return ""


def _quietly(remove: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):  # not empty, or its mount went away
        remove()


def everywhere(ok: bool) -> bool:
    """Whether `ok` on every process, each of which must call."""
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


class Stopped(Exception):
    """A stop was asked for."""


class Stop:
    """A context in which SIGTERM and SIGINT ask the run to stop, and a second one ends the process at once.

    Enter it after `jax.distributed.initialize`. A thread handles the signals, so that a compilation cannot hold them
    up. With several processes, the one that gets a signal tells all through the coordinator. Each then holds its next
    call of `requested` until it knows how many calls every one has made, and all stop at the first that none has made.
    (JAX's preemption service does the same, but looks for signals once a second.)
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
            self._put_back.callback(bell.close)  # ends the thread
            old_fd = signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
            self._put_back.callback(signal.set_wakeup_fd, old_fd)
            for number in (signal.SIGINT, signal.SIGTERM):  # a handler must be there, but the bell does the work
                self._put_back.callback(signal.signal, number, signal.signal(number, lambda *_: None))
            threading.Thread(target=self._listen, args=(ear,), name="signals", daemon=True).start()
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

    def _listen(self, ear: socket.socket) -> None:
        with ear:
            if not (first := ear.recv(1)):  # closed: the run is over
                return
            print(f"{signal.Signals(first[0]).name}: saving, then stopping; once more stops at once", file=sys.stderr)
            if self._several:  # by a thread of its own: should that take long, a second signal is heard all the same
                threading.Thread(target=self._tell, daemon=True).start()
            else:
                self._stop_at = 0
            if second := ear.recv(1):
                os._exit(128 + second[0])

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
    evaluation) go under `allow`.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self.beat()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._timeout:
            self._thread.join()

    def beat(self) -> None:
        """A step finished."""
        self._deadline, self._what = time.monotonic() + self._timeout, "step"

    @contextlib.contextmanager
    def allow(self, what: str, seconds: float) -> Iterator[None]:
        """Within it, `what` may take `seconds` (or `timeout`, if that is more) without a finished step."""
        self._deadline, self._what = time.monotonic() + max(seconds, self._timeout), what
        yield
        self.beat()

    def _watch(self) -> None:
        left = self._timeout
        while not self._ended.wait(min(left, self._timeout / 4, 10.0)):
            left = self._deadline - time.monotonic()
            if left < 0:
                print(f"watchdog: no {self._what} finished in time; every thread's stack:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
                if jax.distributed.is_initialized():
                    time.sleep(LINGER_S)  # others end with this one, and what all wait for may be in another
                os._exit(Exit.STALLED)
            # If something keeps the interpreter's lock, this thread is stuck too: then faulthandler's own ends the run.
            faulthandler.dump_traceback_later(left + LOCK_HELD_GRACE_S, exit=True, file=sys.__stderr__ or 2)
        faulthandler.cancel_dump_traceback_later()


def trim_jsonl(path: Path, step: int, without: str = "") -> None:
    """Drops from a file of one JSON object a line those with a `step` above `step`, and torn lines; atomically.

    `without`: a key that drops a line of `step` itself. UserError on a full disk.
    """

    def stays(line: bytes) -> bool:
        try:
            row = json.loads(line)
            return line.endswith(b"\n") and (row["step"] < step or row["step"] == step and without not in row)
        except (ValueError, TypeError, KeyError):  # cut short by a kill, or blanks after a power cut
            return False

    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if stays(line)]
    if kept != lines:
        with atomic_write(path) as file:
            file.writelines(kept)
