"""Lines for people. They are worth less than a run: where a stream fails, the program goes on and says so once.

A full disk under `> log`, a terminal that was closed, a reader that went away, an encoding that lacks a letter.
"""

import contextlib
import io
import os
import sys

_failed: set[str] = set()  # streams whose failure has been told


def prepare() -> None:
    """For the start of a program: the three files and their streams are there, and all can be read and written."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed, as by `>&-`: the next file opened would get its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:  # as the file was closed; libraries write there all the same
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if number else "surrogateescape")


def say(line: str) -> None:
    """Prints a line on stdout."""
    _write("stdout", line)


def complain(line: str) -> None:
    """Prints a line on stderr."""
    _write("stderr", line)


def _write(name: str, line: str) -> None:
    try:
        print(line, file=getattr(sys, name), flush=True)
    except (OSError, ValueError) as error:  # ValueError: the file was closed
        if name not in _failed:
            _failed.add(name)
            if name == "stdout":
                complain(f"stdout cannot be written ({error}); the run goes on without it")


def settle() -> None:
    """For the end of a program: what cannot be flushed is dropped, or Python ends with status 120 and a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # ValueError: a stream without a file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
