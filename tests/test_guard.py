"""Locks, signals, stalls and torn metrics, most of them in real processes that are really killed."""

import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import xla_flags
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import Unavailable, UserError
from jaxgpt.run import guard
from jaxgpt.run.guard import Exit, RunLock, Stop, Watchdog, trim_jsonl


def spawn(code, *args):
    env = {
        **os.environ,
        "XLA_FLAGS": xla_flags(1),
        "JAX_COMPILATION_CACHE_DIR": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
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


def test_a_lock_whose_folder_was_moved_is_lost_and_takes_nobody_elses_file(tmp_path):
    """`mv out old` and a new run in `out`; `rm out/.lock` and a new run in the same folder."""
    for how in ("moved", "removed"):
        run = tmp_path / how
        first, second = RunLock(run), RunLock(run)
        with first:
            assert first.lost() == ""
            if how == "moved":
                run.rename(tmp_path / "old")
            else:
                (run / ".lock").unlink()
            assert "is gone: was its disk unmounted, or the folder moved?" in first.lost()
            second.__enter__()
            assert "another run began in its place" in first.lost() and second.lost() == ""
        assert (run / ".lock").exists() and second.lost() == "", "the second's file stays"
        with pytest.raises(UserError, match="in use"):
            RunLock(run).__enter__()
        second.close()
        assert not (run / ".lock").exists()


def test_a_lock_follows_no_link(tmp_path):
    (tmp_path / "precious").write_text("data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written"):
        RunLock(tmp_path / "run").__enter__()
    assert (tmp_path / "precious").read_text() == "data"


@pytest.mark.parametrize("target", ["precious", "nowhere"])
def test_a_file_that_is_being_written_follows_no_link(tmp_path, target):
    """Whoever may write to the folder could else have a run of another user's overwrite any of that user's files."""
    (tmp_path / "precious").write_text("data")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "metrics.jsonl.partial").symlink_to(tmp_path / target)
    assert trim_jsonl(tmp_path / "metrics.jsonl", 1) == 1
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"metrics.jsonl": '{"step": 1}\n', "precious": "data"}


@pytest.mark.parametrize("fresh", [True, False])
def test_a_start_that_fails_leaves_nothing(tmp_path, fresh):
    run = tmp_path / "a" / "run"
    if not fresh:
        run.mkdir(parents=True)
        (run / "notes.txt").write_text("mine")
    with pytest.raises(KeyError), RunLock(run) as lock, lock.starting():
        (run / "config.json").write_text("{}")
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "x").write_text("")
        raise KeyError
    assert [p.name for p in tmp_path.rglob("*")] == ([] if fresh else ["a", "run", "notes.txt"])


def interleave(seed, folder, body):
    """Two threads run `body(i, lock)` in one folder, one system call of guard at a time, in an order drawn from `seed`.

    What each returns, or its UserError. A turn goes to a thread that is not waiting for the other.
    """
    turn, rng, done, results = threading.Condition(), random.Random(seed), [False, False], [None, None]
    now, me = [rng.randrange(2)], threading.local()

    def step(function):
        def stepped(*args, **kwargs):
            if hasattr(me, "index"):
                with turn:
                    turn.wait_for(lambda: now[0] == me.index or done[1 - me.index], timeout=60)
                    result = function(*args, **kwargs)
                    now[0] = rng.randrange(2)
                    turn.notify_all()
                    return result
            return function(*args, **kwargs)

        return stepped

    def run(index):
        me.index = index
        try:
            results[index] = body(index, RunLock(folder))
        except UserError as error:
            results[index] = error
        with turn:
            done[index] = True
            turn.notify_all()

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "close", "ftruncate", "write", "read", "fstat", "stat", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, step(getattr(os, name)))
        patch.setattr(guard.fcntl, "flock", step(guard.fcntl.flock))
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def test_two_starts_of_one_folder_are_one_run_and_one_refusal(tmp_path):
    """200 orders of their system calls. Whoever is in sees whether there is a run; half of them wait for the other."""
    with RunLock(tmp_path / "first"):  # else JAX's backend begins amid one start, under a lock that the other waits for
        pass
    outcomes = []
    for seed in range(200):
        run, told = tmp_path / str(seed), threading.Event()

        def body(index, lock, run=run, told=told, patience=0.05 * (seed % 2)):
            try:
                with lock:
                    if (run / "config.json").exists():
                        return "refused"
                    (run / "config.json").write_text(str(index))
                    told.wait(patience)
                    assert lock.lost() == "" and (run / "config.json").read_text() == str(index)
                    return "ran"
            finally:
                told.set()

        results = ["refused" if isinstance(x, UserError) else x for x in interleave(seed, run, body)]
        assert sorted(results) == ["ran", "refused"], (seed, results)
        assert [p.name for p in run.iterdir()] == ["config.json"]
        outcomes.append(results[0])
    assert 20 < outcomes.count("ran") < 180, "both orders were tried"


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_and_handlers_are_put_back(number, capfd, request):
    request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
    before = signal.default_int_handler
    signal.signal(number, before)  # SIGHUP may be ignored here, as it is under nohup
    with Stop() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 30
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
from jaxgpt.console import settle
from jaxgpt.run.guard import Exit, Stop
with Stop() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(float(sys.argv[1]) * 1_000_000))  # C code that runs no Python, as XLA's
    print("computed", flush=True)
    while not stop.requested():
        time.sleep(0.01)
    print("saved", flush=True)
    settle()
    sys.exit(Exit.STOPPED)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_saves_second_stops_at_once_even_amid_a_compilation(number):
    patient, hasty = spawn(STOPPABLE, 0.5), spawn(STOPPABLE, 60)
    for process in (patient, hasty):
        wait_for(process, "ready")
        process.send_signal(number)
        time.sleep(0.01)
        process.send_signal(number)  # the same wish: a launcher and a process group deliver it twice
    out, err = patient.communicate(timeout=60)
    assert patient.returncode == Exit.STOPPED and out.split() == ["computed", "saved"], err
    assert err == f"{signal.Signals(number).name}: saving, then stopping; once more stops at once\n"
    time.sleep(guard.REPEAT_S + 0.2)
    assert hasty.poll() is None
    hasty.send_signal(number)
    assert hasty.wait(timeout=30) == 128 + number
    assert hasty.communicate()[0] == ""


def test_a_closed_terminal_saves_and_one_that_was_to_be_ignored_is(tmp_path):
    """Under nohup SIGHUP stays ignored; and what cannot be printed, as the terminal is gone, stops nothing."""
    kept = spawn("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + STOPPABLE, 0.001)
    wait_for(kept, "ready")
    wait_for(kept, "computed")
    kept.send_signal(signal.SIGHUP)
    open_terminal = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    closed = spawn(f"{open_terminal}sys.stderr.close(); sys.stderr = open('/dev/full', 'w')\n" + STOPPABLE, 0.001)
    wait_for(closed, "ready")
    closed.send_signal(signal.SIGHUP)
    assert closed.wait(timeout=60) == Exit.STOPPED and closed.communicate()[0].endswith("saved\n")
    assert kept.poll() is None
    kept.send_signal(signal.SIGTERM)
    assert kept.wait(timeout=60) == Exit.STOPPED and kept.communicate()[0] == "saved\n"


def test_another_handlers_signal_is_no_wish_to_stop():
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGUSR1, old)


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
    if sys.argv[1] == "stopped":
        print("alive", flush=True)
        with watchdog.allow("evaluation", 3.0):
            time.sleep(2.0)
    else:
        with watchdog.allow("evaluation", 3600.0):
            time.sleep(0.2)
        print("alive", flush=True)
    stalled_step(sys.argv[1])
print("done")
"""


def test_watchdog_ends_a_stalled_process_with_stacks():
    ends = {how: spawn(STALL, how) for how in ("sleep", "locked", "none")}
    outputs = {how: process.communicate(timeout=60) for how, process in ends.items()}
    assert all(out.startswith("alive") for out, _ in outputs.values()), outputs
    assert ends["sleep"].returncode == Exit.STALLED
    assert "watchdog: no step finished in time" in outputs["sleep"][1] and "in stalled_step" in outputs["sleep"][1]
    assert ends["locked"].returncode == Exit.STALLED and "in stalled_step" in outputs["locked"][1]
    assert ends["none"].returncode == 0 and outputs["none"][1] == ""


def test_time_in_which_the_process_is_stopped_is_no_stall():
    """SIGSTOP for longer than the watchdog and its sentinel allow, as by a terminal, a scheduler, a debugger."""
    process = spawn(STALL, "stopped")
    wait_for(process, "alive")
    process.send_signal(signal.SIGSTOP)
    time.sleep(5.0)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "done\n", "")


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
    assert len(set(Exit)) == 7 and all(status < 128 for status in Exit)
    assert UserError("").status == Exit.USER_ERROR and Unavailable("").status == Exit.UNAVAILABLE
