"""Lines for people: what cannot be printed costs the line, and the process ends with its own status."""

import os
import subprocess
import sys

import pytest

from jaxgpt import UserError

PROGRAM = """
import sys
from jaxgpt import UserError, console
from jaxgpt.cli import run_main
def main(argv):
    for _ in range(3):
        console.say("— a line")
    if argv:
        raise eval(argv[0])
run_main(main)
"""


def program(*argv, redirect="", **env):
    command = f'exec "$0" -W error -c "$1" {" ".join(map(repr, argv))} {redirect}'
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env}
    return subprocess.run(["sh", "-c", command, sys.executable, PROGRAM], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-", "| true", "1<&0 </dev/null"])
def test_a_stdout_that_fails_is_said_once_and_ends_nothing(redirect):
    done = program(redirect=redirect)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    told = done.stderr.splitlines()
    assert all(line.startswith("stdout cannot be written (") for line in told) and len(told) <= 1
    assert len(told) == 1 or redirect != ">/dev/full"


def test_an_encoding_without_the_letter():
    done = program(PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u2014 a line\n" * 3, "")


@pytest.mark.parametrize(
    "error, status, line",
    [
        ("UserError('no such key')", 2, "error: no such key"),
        (
            "OSError(28, 'No space left on device', 'out/config.json')",
            69,
            "error: out/config.json cannot be written",
        ),
        ("PermissionError(13, 'Permission denied', 'out')", 2, "error: out: Permission denied; name another"),
        ("MemoryError()", 2, "error: out of memory (no memory is left); choose a smaller batch_size"),
        (
            "RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')",
            2,
            "error: out of memory (Out of",
        ),
        ("RuntimeError('Unable to initialize backend x')", 2, "error: Unable to initialize backend x; unset JAX_PLAT"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, status, line):
    done = program(error)
    assert done.returncode == status and done.stderr.count("\n") == 1 and done.stderr.startswith(line), done.stderr


def test_a_bug_is_a_traceback():
    done = program("ZeroDivisionError()")
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "ZeroDivisionError" in done.stderr
    assert UserError("").status == 2


def test_a_thread_that_never_ends_keeps_a_failed_program_for_half_a_minute():
    """As a library's that waits for a file that will not come; here the half minute is a second."""
    code = PROGRAM.replace("def main", "import jaxgpt.cli, threading\njaxgpt.cli.EXIT_S = 1\ndef main").replace(
        "    if argv", "    threading.Thread(target=threading.Event().wait).start()\n    if argv"
    )
    command = [sys.executable, "-c", code, "UserError('x')"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == "error: x\n"
