"""Ends this process if it runs for too long without a sign, even while something holds the interpreter's lock.

No thread of Python can do that, and a timer of the system would count the time for which the process was stopped. So a
child process counts the seconds in which this one is not stopped (SIGSTOP, a debugger). At the limit the child has
faulthandler print every thread's stack, by a signal, which needs no lock; and writes to a pipe, upon which the C
library's asynchronous read calls `_exit`. Linux only.
"""

import contextlib
import ctypes
import faulthandler
import functools
import os
import signal
import subprocess
import sys
import threading

CHILD = """
import ctypes, os, select, sys, time
pid, number, linger = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
TICK = 1.0

def stopped():
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in b"Tt"
    except OSError:
        return False

left, last = float("inf"), time.monotonic()
while left >= 0:
    told = select.select([0], [], [], TICK)[0]
    now = time.monotonic()
    if told:
        words = os.read(0, 65536).split()
        if not words:  # closed: the process is over, or no longer watched
            sys.exit()
        left, thread, what = float(words[-3]), int(words[-2]), words[-1].decode().replace("_", " ")
    elif not stopped():
        left -= min(now - last, 2 * TICK)  # if more passed, this process did not run either: a suspended machine
    last = now
print(f"watchdog: no {what} finished in time; the interpreter's lock is held. Every thread's stack:", file=sys.stderr)
sys.stderr.flush()
ctypes.CDLL(None).tgkill(pid, thread, number)  # a thread that waits: the stalled one's system call goes on
time.sleep(linger)
os.write(1, b"x")
"""


class Sentinel:
    """The child process that watches this one. `allow` starts its clock or gives more time; `close` ends it.

    status: with which this process then ends. linger: seconds before, for the stacks, and for others that wait for it.
    """

    def __init__(self, status: int, linger: float):
        number = signal.SIGRTMAX - 1  # one that nobody uses
        faulthandler.register(number, file=sys.__stderr__ or 2, all_threads=True)
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CHILD, str(os.getpid()), str(int(number)), str(linger)],
            stdin=subprocess.PIPE,
            stdout=_exit_pipe(status),
            start_new_session=True,  # signals to this process's group are none of its business
        )

    def allow(self, seconds: float, what: str, thread: threading.Thread) -> None:
        """From now on the process may run for so many seconds, in which `what` finishes. `thread` gets the signal that
        prints the stacks: one that only waits, as the signal interrupts a system call."""
        line = f"{seconds} {thread.native_id} {what.replace(' ', '_')}\n"
        with contextlib.suppress(OSError):  # the child was killed
            os.write(self._child.stdin.fileno(), line.encode())  # pyright: ignore

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._child.stdin.close()  # pyright: ignore
        self._child.wait()


# --- a pipe that ends this process ---


class _Event(ctypes.Structure):
    """struct sigevent of 64-bit Linux."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_char * 32),
    ]


class _Read(ctypes.Structure):
    """struct aiocb of 64-bit Linux; what the C library keeps there for itself is `rest`."""

    _fields_ = [
        ("file", ctypes.c_int),
        ("operation", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("event", _Event),
        ("rest", ctypes.c_char * 256),
    ]


SIGEV_THREAD = 2  # call a function in a thread of its own


@functools.cache
def _exit_pipe(status: int) -> int:
    """The writing end of a pipe: a byte in it has this process call _exit(status), in C. There is one for good."""
    library = ctypes.CDLL(None)
    reading, writing = os.pipe()
    event = _Event(status, 0, SIGEV_THREAD, ctypes.cast(library._exit, ctypes.c_void_p))
    keep.append(buffer := ctypes.create_string_buffer(1))
    keep.append(request := _Read(reading, 0, 0, ctypes.addressof(buffer), 1, event))
    if library.aio_read(ctypes.byref(request)):
        raise OSError("aio_read failed")
    return writing


keep: list = []  # what the C library reads into as long as the process lives


def available() -> bool:
    """Whether this system has what a Sentinel needs."""
    return sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8 and hasattr(ctypes.CDLL(None), "aio_read")
