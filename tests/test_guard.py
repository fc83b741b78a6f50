"""Locks, signals, stalls and torn metrics, most of them in real processes that are really killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import UserError
from jaxgpt.run import guard
from jaxgpt.run.guard import Exit, RunLock, Stop, Watchdog, trim_jsonl


def spawn(code, *args):
    env = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, word):
    assert process.stdout.readline() == f"{word}\n", process.communicate()[1]


# --- one writer ---


def test_lock_is_exclusive_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    with RunLock(folder):
        assert folder.is_dir()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
            RunLock(folder).__enter__()
        with RunLock(tmp_path / "a" / "c"):
            pass
    assert list(tmp_path.iterdir()) == []
    with RunLock(folder):
        (folder / "config.json").write_text("{}")
    assert [p.name for p in folder.iterdir()] == ["config.json"]


def test_lock_of_a_killed_process_is_free(tmp_path):
    holder = spawn(
        "import sys, time; from jaxgpt.run.guard import RunLock\n"
        "with RunLock(sys.argv[1]): print('held', flush=True); time.sleep(100)",
        tmp_path,
    )
    wait_for(holder, "held")
    with pytest.raises(UserError, match=f"process {holder.pid} "):
        RunLock(tmp_path).__enter__()
    holder.kill()
    holder.communicate()
    with RunLock(tmp_path):
        pass


def test_lock_never_has_two_holders(tmp_path):
    """Many come and go at once: the file that each removes must not let two in through two inodes."""
    holders, most, entries = [], [], []

    def contend():
        for _ in range(200):
            try:
                with RunLock(tmp_path):
                    holders.append(1)
                    most.append(len(holders))
                    holders.pop()
                    entries.append(1)
            except UserError:
                pass

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(entries) >= 8


def test_lock_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out_dir .*/file/run cannot be written: .*; choose another out_dir"):
        RunLock(tmp_path / "file" / "run").__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_goes_away_amid_the_locking_is_a_user_error(tmp_path, monkeypatch):
    """Its last holder, which made it, removes it between our opening and our locking the file."""
    monkeypatch.setattr(guard.fcntl, "flock", lambda *_: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(UserError, match="out_dir .*/run cannot be written"):
        RunLock(tmp_path / "run").__enter__()


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_handlers_are_put_back(number, capfd):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while not stop.requested():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert stop.requested()
    assert signal.getsignal(number) is before
    assert "saving, then stopping" in capfd.readouterr().err
    with Stop() as stop:
        assert not stop.requested()


STOPPABLE = """
import hashlib, sys, time
from jaxgpt.run.guard import Exit, Stop
with Stop() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(float(sys.argv[1]) * 1_000_000))  # C code that runs no Python, as XLA's
    print("computed", flush=True)
    while not stop.requested():
        time.sleep(0.01)
    print("saved", flush=True)
    sys.exit(Exit.STOPPED)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_saves_second_stops_at_once_even_amid_a_compilation(number):
    patient, hasty = spawn(STOPPABLE, 0.5), spawn(STOPPABLE, 60)
    for process in (patient, hasty):
        wait_for(process, "ready")
        process.send_signal(number)
    out, err = patient.communicate(timeout=60)
    assert patient.returncode == Exit.STOPPED and out.split() == ["computed", "saved"], err
    assert err == f"{signal.Signals(number).name}: saving, then stopping; once more stops at once\n"
    time.sleep(0.2)
    assert hasty.poll() is None
    hasty.send_signal(number)
    assert hasty.wait(timeout=5) == 128 + number
    assert hasty.communicate()[0] == ""


PAIR = """
import os, sys, time, jax
port, rank = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jax.experimental import multihost_utils
from jaxgpt.run.guard import Exit, RunLock, Stop
with RunLock(sys.argv[3]), Stop() as stop:
    for step in range(10_000):
        if stop.requested():
            break
        multihost_utils.process_allgather(jax.numpy.ones(()))
        if (step, rank) == (20, 1):
            os.kill(os.getpid(), int(sys.argv[4]))
        time.sleep(0.1)
    assert stop.requested()
print("stopped", step, flush=True)
sys.exit(Exit.STOPPED)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_at_the_same_step(number, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [spawn(PAIR, port, rank, tmp_path / "run", int(number)) for rank in (0, 1)]
    ends = [process.communicate(timeout=60) for process in pair]
    assert [process.returncode for process in pair] == [Exit.STOPPED] * 2, ends
    lines = [[line for line in out.splitlines() if line.startswith("stopped")] for out, _ in ends]
    assert lines[0] == lines[1] and lines[0][0] in ("stopped 21", "stopped 22"), "after the step in hand, or one more"
    assert list(tmp_path.iterdir()) == []


# --- stalls ---

STALL = """
import ctypes, sys, time
from jaxgpt.run import guard
guard.LOCK_HELD_GRACE_S = 0.3
def stalled_step(how):
    if how == "sleep": time.sleep(60)
    if how == "locked": ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock
with guard.Watchdog(0.4) as watchdog:
    for _ in range(8):
        time.sleep(0.1)
        watchdog.beat()
    with watchdog.allow("compilation", 5):
        time.sleep(1)
    with watchdog.allow("evaluation", 0.1):
        time.sleep(0.2)
    print("alive", flush=True)
    stalled_step(sys.argv[1])
print("done")
"""


def test_watchdog_ends_a_stalled_process_with_stacks():
    ends = {how: spawn(STALL, how) for how in ("sleep", "locked", "none")}
    outputs = {how: process.communicate(timeout=30) for how, process in ends.items()}
    assert all(out.startswith("alive") for out, _ in outputs.values()), outputs
    assert ends["sleep"].returncode == Exit.STALLED
    assert "watchdog: no step finished in time" in outputs["sleep"][1] and "in stalled_step" in outputs["sleep"][1]
    assert ends["locked"].returncode == Exit.FAILURE and "in stalled_step" in outputs["locked"][1]
    assert ends["none"].returncode == 0 and outputs["none"][1] == ""


def test_watchdog_of_zero_is_off():
    threads = threading.active_count()
    with Watchdog(0.0) as watchdog:
        watchdog.beat()
        with watchdog.allow("compilation", 1.0):
            assert threading.active_count() == threads


# --- metrics ---


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=12),
    st.integers(-1, 9),
    st.sampled_from([b"", b'{"step": 1', b'{"step": 1}', b"\0" * 9, b"\xff\n", b"[1]\n", b'{"loss": 1}\n', b"\n"]),
)
def test_trim_drops_torn_and_later_lines_only(tmp_path_factory, steps, last, tail):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": i / 3}).encode() + b"\n" for i, step in enumerate(steps)]
    path.write_bytes(b"".join(lines) + tail)
    before = path.stat()
    trim_jsonl(path, last)
    kept = b"".join(line for step, line in zip(steps, lines, strict=True) if step <= last)
    assert path.read_bytes() == kept and [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]
    if len(kept) == before.st_size:
        assert path.stat().st_ino == before.st_ino, "nothing to drop, nothing written"


def test_trim_of_no_file(tmp_path):
    trim_jsonl(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_exit_statuses_are_distinct_and_clear_of_signals():
    assert len(set(Exit)) == 6 and all(status < 128 for status in Exit)
    assert guard.Exit.USER_ERROR == 2
