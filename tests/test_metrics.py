"""Peaks by device, the clock, and every place that metrics are written to."""

import contextlib
import io
import json
import math
import os
import sys
import threading
import time
import types
import warnings
from datetime import UTC, datetime
from unittest import mock

import jax
import pytest

from jaxgpt import UserError, console, metrics
from jaxgpt.metrics import Reporter, Stopwatch, peak_flops, peak_memory_gib, when_done
from jaxgpt.run.guard import trim_jsonl
from jaxgpt.trackers import TensorBoard, check_trackers


def device(kind: str):
    return mock.Mock(spec=jax.Device, device_kind=kind)


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks_are_the_makers(kind, tflops):
    assert peak_flops(device(kind)) == tflops * 1e12


def test_no_peak_is_made_up():
    assert peak_flops(jax.devices()[0]) is None
    assert peak_flops(device("NVIDIA GeForce GTX 1080")) is None
    assert peak_memory_gib() == 0.0


def test_the_stopwatch(monkeypatch):
    """Speed between laps: per step, leaving out pauses. MFU is of the peak of all eight devices, where it is known."""
    plain = Stopwatch(flops_per_step=2e12, tokens_per_step=500)
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e12)
    watch = Stopwatch(flops_per_step=2e12, tokens_per_step=500)
    assert watch.lap(100, 10.0) == {}
    assert watch.lap(110, 11.0) == pytest.approx({"step_ms": 100.0, "tokens_per_s": 5000.0, "mfu": 2e12 / 0.1 / 8e12})
    watch.pause()
    assert watch.lap(120, 13.0) == {}
    assert watch.lap(121, 14.0)["step_ms"] == pytest.approx(1000.0)
    assert watch.lap(121, 14.5) == {}  # no step, no speed
    plain.lap(0, 0.0)
    assert set(plain.lap(1, 1.0)) == {"step_ms", "tokens_per_s"}


def test_arrays_are_done_when_they_are_not_when_that_is_asked():
    class Late:
        there = threading.Event()

        def block_until_ready(self):
            self.there.wait()

    asked = time.perf_counter()
    late, soon = when_done({"loss": Late()}), when_done(jax.numpy.ones(8) * 2)  # a device's work is done in turn
    time.sleep(0.05)
    assert not late.done() and not soon.done()
    Late.there.set()
    late.result()
    time.sleep(0.1)
    assert asked + 0.05 <= late.result() <= soon.result() < time.perf_counter() - 0.05


# --- the reporter ---


def lines(folder):
    """metrics.jsonl, by a parser that takes JSON only: NaN is an error."""
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_metrics_jsonl(tmp_path, tiny_config, capsys):
    config = tiny_config(out_dir=str(tmp_path))
    with Reporter(tmp_path, config, first_step=0, tokens=lambda step: 10 * step) as reporter:
        reporter.say("a line")
        reporter.record(1, {"loss": 3.25, "grad_norm": math.inf})
        reporter.record(2, {"loss": math.nan})
        assert len(lines(tmp_path)) == reporter.lines == 2  # at once, for whoever watches
        reporter.progress(2, loss="3.25")
        reporter.event(2, "saved", "the best so far")
        time.sleep(0.1)
        reporter.record(2, {})
    with Reporter(tmp_path, config, first_step=2, tokens=lambda step: 10 * step, lines=3) as reporter:
        reporter.record(3, {"val_loss": 1.0})
        reporter.event(3, "stopped")
        assert reporter.lines == 4
    rows = lines(tmp_path)
    seconds = [row.pop("wall_s") for row in rows]
    assert rows == [
        {"step": 1, "loss": 3.25, "grad_norm": None, "tokens": 10},
        {"step": 2, "loss": None, "tokens": 20},
        {"step": 2, "tokens": 20},
        {"step": 3, "val_loss": 1.0, "tokens": 30},
    ]
    assert seconds == sorted(seconds) and seconds[3] >= seconds[2] >= 0.1, "of all lives of the run"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [datetime.fromisoformat(event.pop("time")).tzinfo for event in events] == [UTC, UTC]
    assert events == [{"step": 2, "event": "saved", "detail": "the best so far"}, {"step": 3, "event": "stopped"}]
    assert capsys.readouterr() == ("a line\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def test_a_progress_bar_on_a_terminal(tmp_path, tiny_config, monkeypatch, capsys):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Reporter(tmp_path, tiny_config(max_iters=8), first_step=2) as reporter:
        reporter.progress(6, loss="1.5")
        reporter.say("above it")
        reporter.progress(8, loss="1.25")
    assert "2/8" in terminal.getvalue() and "8/8" in terminal.getvalue() and "loss=1.25" in terminal.getvalue()
    assert capsys.readouterr().out == "above it\n"


def test_other_processes_write_nothing(tmp_path, tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Reporter(tmp_path, tiny_config(tensorboard_log=True, wandb_log=True), first_step=0) as reporter:
        reporter.say("a line")
        reporter.record(1, {"loss": 1.0})
        reporter.progress(1)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_whatever_fails_is_said_once_and_the_run_goes_on(tmp_path, tiny_config, monkeypatch, capsys, caplog):
    """A full disk, a tracker whose server is gone, a stdout that nobody reads."""
    monkeypatch.setattr(console, "_failed", set())
    wandb = types.ModuleType("wandb")
    wandb.init = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wandb.init.return_value.log.side_effect = ConnectionError("gone")
    with Reporter(tmp_path, tiny_config(wandb_log=True, tensorboard_log=True), first_step=0) as reporter:
        reporter._trackers["TensorBoard"].close()  # what it is told from now on is an error
        file, full = reporter._file, mock.Mock()
        full.write.side_effect = OSError(28, "No space left on device")
        reporter._file = full
        for step in range(3):
            reporter.record(step, {"loss": 1.0})
        reporter._file = file
        reporter.record(3, {"loss": 1.0})
        with open("/dev/full", "w") as nobody:
            monkeypatch.setattr(sys, "stdout", nobody)
            reporter.say("a line")
            reporter.say("a line")
            monkeypatch.undo()
            with contextlib.suppress(OSError):
                nobody.close()
    told = [message.partition(":")[0] for message in caplog.messages]
    assert told == ["metrics.jsonl", "TensorBoard", "W&B"], caplog.messages
    assert [row["step"] for row in lines(tmp_path)] == [3] and reporter.lines == 1
    assert wandb.init.return_value.log.call_count == 1
    err = capsys.readouterr().err
    assert err == "stdout cannot be written ([Errno 28] No space left on device); the run goes on without it\n"


def test_tensorboard(tmp_path, tiny_config):
    with Reporter(tmp_path, tiny_config(tensorboard_log=True), first_step=0) as reporter:
        reporter.record(5, {"loss": 3.25, "grad_norm": math.nan})
        reporter.record(6, {"loss": 3.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own imports
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    paths = sorted(tmp_path.glob("*tfevents*.jaxgpt"))
    events = [event for path in paths for event in EventFileLoader(str(path)).Load()]
    values = [(e.step, v.tag, v.tensor.float_val[0]) for e in events for v in e.summary.value]
    assert [x for x in values if x[1] == "loss"] == [(5, "loss", 3.25), (6, "loss", 3.0)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path, tiny_config):
    """A run killed at step 8 goes on from a checkpoint at 5: what it told of 6, 7 and 8 goes, for both of TensorBoard's
    readers, and for one that was watching. Others' event files stay."""
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    theirs = tmp_path / "events.out.tfevents.1.theirs"
    theirs.write_bytes(b"")
    readers = [x.EventAccumulator(str(tmp_path), {"tensors": 0}) for x in (plugin_event_accumulator, event_accumulator)]
    watching = plugin_event_accumulator.EventAccumulator(str(tmp_path), {"tensors": 0})
    for first, last in ((0, 8), (5, 9)):
        trim_jsonl(tmp_path / "metrics.jsonl", first)
        with Reporter(tmp_path, tiny_config(tensorboard_log=True), first_step=first) as reporter:
            for step in range(first + 1, last + 1):
                reporter.record(step, {"loss": float(first), "grad_norm": math.nan})
        watching.Reload()
        time.sleep(1.1)  # files are named by the second
    for reader in (*readers, watching):
        seen = reader.Reload().Tensors("loss")
        assert [(x.step, x.tensor_proto.float_val[0]) for x in seen] == [(i, 5.0 * (i > 5)) for i in range(1, 10)]
        times = [x.wall_time for x in seen]
        assert times == sorted(times) and times[-1] == pytest.approx(time.time(), abs=60)
        assert "grad_norm" not in reader.Tags()["tensors"]
    assert [path.stat().st_size > 0 for path in sorted(tmp_path.glob("*tfevents*"))] == [False, False, True]
    TensorBoard(tmp_path).close()
    assert len(list(tmp_path.glob("*tfevents*"))) == 3 and theirs.exists()


def test_wandb(tmp_path, tiny_config, monkeypatch):
    """What it is told: the names and the config. Its key it takes from its own environment variable."""
    wandb = types.ModuleType("wandb")
    wandb.init = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tiny_config(wandb_log=True, wandb_project="p", wandb_run_name="r")
    with Reporter(tmp_path, config, first_step=0, run_id="abc") as reporter:
        reporter.record(5, {"loss": 3.25, "grad_norm": math.nan})
    assert wandb.init.call_args.kwargs["project"] == "p" and wandb.init.call_args.kwargs["name"] == "r"
    assert (wandb.init.call_args.kwargs["id"], wandb.init.call_args.kwargs["resume"]) == ("abc", "allow")
    assert wandb.init.call_args.kwargs["config"] == config.to_dict()
    (logged, finished) = wandb.init.return_value.mock_calls
    assert logged.args[0]["loss"] == 3.25 and "grad_norm" not in logged.args[0] and logged.kwargs == {"step": 5}
    assert finished == mock.call.finish()


def test_wandb_without_a_key_is_one_line(tmp_path, tiny_config, monkeypatch):
    """And it comes before anything is compiled or written."""
    wandb = types.ModuleType("wandb")
    wandb.Error = type("Error", (Exception,), {})
    refused = mock.Mock(side_effect=wandb.Error("No API key configured. Use `wandb login` to log in."))
    wandb.login = wandb.init = refused
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (check_trackers, lambda config: Reporter(tmp_path, config, first_step=0)):
        with pytest.raises(UserError, match="wandb_log: No API key configured. Use `wandb login`"):
            start(tiny_config(wandb_log=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key, module", [("tensorboard_log", "tensorboard"), ("wandb_log", "wandb")])
def test_a_missing_tracker_is_one_line(tiny_config, monkeypatch, key, module):
    monkeypatch.setitem(sys.modules, module, None)
    check_trackers(tiny_config())
    with pytest.raises(UserError, match=rf"{key} needs {module}; run: pip install 'jaxgpt\[track\]'"):
        check_trackers(tiny_config(**{key: True}))


def test_no_bar_into_a_pipe(monkeypatch, tmp_path):
    """In `train | tee log` lines reach the terminal through a pipe, and a bar beside them would tear them."""
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "w") as pipe, (tmp_path / "log").open("w") as file:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert metrics.bar_hidden() is True
        monkeypatch.setattr(sys, "stdout", file)
        assert metrics.bar_hidden() is None  # as tqdm decides: by stderr
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        assert metrics.bar_hidden() is True


def test_saves_and_samples_are_told_and_kept(tmp_path, tiny_config, capsys):
    with Reporter(tmp_path, tiny_config(sample_interval=8), first_step=0) as reporter:
        reporter.saved(4, {"best_step": 4})
        reporter.saved(8, {"best_step": 4})
        reporter.sample(8, "é", "é and on")
    assert capsys.readouterr().out.splitlines() == [
        "step 4: saved, the best so far", "step 8: saved", "step 8: sample", "é and on", "---"
    ]  # fmt: skip
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["event"], e.get("detail")) for e in events] == [
        (4, "saved", "the best so far"), (8, "saved", None)
    ]  # fmt: skip
    sample = json.loads((tmp_path / "samples.jsonl").read_text())
    assert sample == {"step": 8, "prompt": "é", "text": "é and on"}


def test_a_folder_that_is_moved_takes_its_files_along(tmp_path, tiny_config):
    """A new run at the old path gets nothing of the old one's."""
    run = tmp_path / "run"
    run.mkdir()
    with Reporter(run, tiny_config(sample_interval=1), first_step=0) as reporter:
        run.rename(tmp_path / "old")
        run.mkdir()
        reporter.record(1, {"loss": 1.0})
        reporter.event(1, "saved")
        reporter.sample(1, "", "text")
    assert not list(run.iterdir())
    lines = {path.name: path.read_text().count("\n") for path in (tmp_path / "old").iterdir()}
    assert lines == {"metrics.jsonl": 1, "events.jsonl": 1, "samples.jsonl": 1}
