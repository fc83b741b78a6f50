"""Lines for people: what cannot be printed costs the line, and the process ends with its own status."""

import importlib.machinery
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxgpt
from jaxgpt import UserError, console, from_json, user_error
from jaxgpt.config import read_saved
from jaxgpt.models import find_model
from jaxgpt.sharding import FORBIDDING, configure_jax
from jaxgpt.tokenizer import read_meta

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


def test_all_three_closed(tmp_path):
    """As some daemons start programs: Python has no streams then, and a progress bar would end the run."""
    code = PROGRAM.replace("    if argv", "    sys.stderr.write('x')\n    sys.stdout.write('x')\n    if argv")
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -W error -c "$1" <&- >&- 2>&-', sys.executable, code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    "command", [["-m", "jaxgpt.sample"], ["-m", "jaxgpt.train"], ["jaxgpt-sample"], ["-c", PROGRAM, "wait()"]]
)
def test_ctrl_c_prints_nothing(command, tmp_path):
    """While libraries are imported, by either name of an entry point, and later."""
    waiting = "import time; print('there', flush=True); time.sleep(60)"
    (tmp_path / "jax.py").write_text(waiting)
    (tmp_path / "jaxgpt-sample").write_text("from jaxgpt.__main__ import main\nmain()\n")  # as pip makes it
    command = [x.replace("wait()", f"exec({waiting!r})") for x in command]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    kinds = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a child inherits SIG_IGN, which background jobs may have
    try:
        process = subprocess.Popen([sys.executable, *command], env=env, **kinds)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        while process.stdout.readline() != "there\n":  # pyright: ignore
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            assert process.communicate(timeout=60) == ("", "")
        finally:
            process.kill()
    assert process.returncode in (-signal.SIGINT, 130)


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
        ("OSError(24, 'Too many open files')", 69, "error: [Errno 24] Too many open files; allow more: ulimit -n"),
        ("RuntimeError('can' + chr(39) + 't start new thread')", 69, "error: can't start new thread; allow more"),
        ("ValueError('Disable jit is not supported in the AOT path')", 2, "error: JAX_DISABLE_JIT is set"),
        ("RuntimeError('Unable to initialize backend x')", 2, "error: Unable to initialize backend x; unset JAX_PLAT"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, status, line):
    done = program(error)
    assert done.returncode == status and done.stderr.count("\n") == 1 and done.stderr.startswith(line), done.stderr


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_json_from_anywhere(value):
    assert from_json(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "", "{", b"\xff", "9" * 5000])
def test_json_that_is_none_is_a_value_error(text):
    """Also where it is nested so deeply that json raises a RecursionError; so nothing else may call json.loads."""
    with pytest.raises(ValueError):
        from_json(text)
    own = ("__init__.py", "run/processes.py", "run/checkpoint.py")  # the last two read what they have just written
    root = Path(jaxgpt.__file__).parent
    assert not [p for p in root.rglob("*.py") if "json.load" in p.read_text() and not str(p).endswith(own)]


def test_a_backend_that_is_not_installed_is_one_line(monkeypatch):
    """JAX asserts that there is one."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for module, found in ("jax._src.xla_bridge", True), ("mine", False):
        try:
            exec("assert False", {"__name__": module})
        except AssertionError as error:
            told = user_error(error)
            assert (told is not None and "JAX_PLATFORMS=cuda, but no such backend" in str(told)) is found


REFUSED = {"JAX_ENABLE_X64": "train", "JAX_LOGGING_LEVEL": "sample", "JAXTYPING_DISABLE": "bench", "MPLBACKEND": "plot",
           "TQDM_MININTERVAL": "train", "JAX_DEFAULT_DEVICE": "train"}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_variable_that_a_library_refuses_is_one_line(name):
    """As it is imported, before anything of ours runs."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), name: "banana"}
    command = [sys.executable, "-m", f"jaxgpt.{REFUSED[name]}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    line = f"error: {name}=banana in the environment: .*; mend it or unset it\n"
    assert done.returncode == 2 and re.fullmatch(line, done.stderr)


def test_a_backend_that_there_is_not_is_one_line():
    error = RuntimeError("Unknown backend tpu. Available backends are ['cpu']")
    assert "Available backends are ['cpu']; unset JAX_PLATFORMS and" in str(user_error(error))


def test_settings_of_jax_that_forbid_it_to_compute_are_one_line():
    """Here for as long as the test lasts; in the environment they are in force from the start."""
    with jax.no_tracing(), pytest.raises(RuntimeError) as error:
        jax.jit(lambda x: 3 * x)(1.0)
    assert str(user_error(error.value)) == "JAX_NO_TRACING is set, and this is to compute; unset it"
    execution = RuntimeError("JAX tried to execute function jit(f), but the no_execution config option is set")
    assert str(user_error(execution)) == "JAX_NO_EXECUTION is set, and this is to compute; unset it"


def test_a_variable_whose_path_or_pattern_cannot_be_used_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_DUMP_IR_TO", str(tmp_path / "none"))
    monkeypatch.setenv("JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX", "(")
    for fails, found in (
        (lambda: (tmp_path / "none" / "x").read_text(), "JAX_DUMP_IR_TO=.*none in the environment: No such file"),
        (lambda: re.compile("("), r"JAX_HLO_\w+=\( in the environment: missing \)"),
        (lambda: (tmp_path / "nonesuch").read_text(), None),
        (lambda: re.compile("[("), None),
    ):
        with pytest.raises((OSError, re.error)) as error:
            fails()
        told = user_error(error.value)
        assert re.match(found, str(told)) if found else told is None


@pytest.mark.parametrize("name", [name for name in FORBIDDING if hasattr(jax.config, name)])
def test_a_setting_under_which_jax_refuses_what_is_done_is_one_line(name, monkeypatch):
    before, value = getattr(jax.config, name), FORBIDDING[name][-1]
    jax.config.update(name, value)
    try:
        with pytest.raises(UserError, match=f"{name.upper()}={value}: under it JAX refuses"):
            configure_jax()
    finally:
        jax.config.update(name, before)


def test_a_device_or_pipe_in_place_of_a_file_is_one_line(tmp_path):
    """To read one would be to wait for good, or until no memory is left."""
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "mine.py")
    (tmp_path / "meta.json").symlink_to("/dev/zero")
    for reads in read_saved, read_meta, lambda folder: find_model(str(folder / "mine.py")):
        with pytest.raises(UserError, match="is a (pipe|device); move it away"):
            reads(tmp_path)


def test_a_bug_is_no_refused_variable(monkeypatch):
    monkeypatch.setenv("SOME_NAME", "7")
    for text, found in ("SOME_NAME is wrong", True), ("some_name is 7", False), ("7", False):
        try:
            raise ValueError(text)
        except ValueError as error:
            assert (user_error(error) is not None) is found


def test_what_the_cpu_cannot_do_for_a_variable_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "BF16_BF16_F32_X9")
    with jax.default_matmul_precision("BF16_BF16_F32_X9"), pytest.raises(ValueError) as error:
        jax.jit(lambda x: x @ x).lower(jax.numpy.ones((2, 2)))
    assert str(user_error(error.value)).startswith("JAX_DEFAULT_MATMUL_PRECISION=BF16_BF16_F32_X9 in the environment")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "0")
    none = RuntimeError("Unable to initialize backend 'cpu': INVALID_ARGUMENT: Could not determine process_index")
    assert "; mend or unset JAX_NUM_CPU_DEVICES=0" in str(user_error(none))


def test_a_working_folder_that_is_gone_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as error:
        os.getcwd()
    assert str(user_error(error.value)) == "the working folder is gone; change to another"


def test_stdin_that_is_closed_or_no_text(monkeypatch):
    closed, junk = None, io.TextIOWrapper(io.BytesIO(b"a\xff\n"), "utf-8")
    for stdin, line in (closed, ""), (junk, "a\udcff\n"):
        monkeypatch.setattr(sys, "stdin", stdin)
        console.prepare()
        assert sys.stdin.readline() == line


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


# --- scripts ---

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    path for path in sorted((ROOT / "scripts").iterdir()) if path.is_file() and "run_main(main)" in path.read_text()
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_mistake_on_a_scripts_command_line_is_one_line(path, monkeypatch):
    """It comes as UserError, which run_main prints."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which a script may set
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    loader.exec_module(module)
    with pytest.raises(UserError):
        module.main(["--banana"])


def test_a_launchers_mistake_is_one_line(capfd):
    for argv in [], ["train"], ["0"], ["--restarts=x", "2"]:
        assert subprocess.run([sys.executable, ROOT / "scripts" / "launch_local", *argv]).returncode == 2
        out, err = capfd.readouterr()
        assert not out and re.fullmatch("error: .*\n", err)
