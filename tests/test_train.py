"""Whole runs: resuming to the bit, exact counts, what is printed and written, and what a user gets wrong."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import UserError
from jaxgpt.cli import run_main
from jaxgpt.config import read_config, resolve
from jaxgpt.metrics import Reporter, Stopwatch
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.step import abstract_state
from jaxgpt.train import StepLog, choose_steps_per_call, main, train

CPU = f"{Path(__file__).parents[1] / 'configs' / 'shakespeare_char.py'}:cpu"
TINY = dict(block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.2, batch_size=1, gradient_accumulation_steps=8)
TINY |= dict(eval_iters=2, eval_interval=3, log_interval=1, learning_rate=1e-2, min_lr=1e-3, warmup_iters=2)
TINY |= dict(max_iters=8, lr_decay_iters=8, dtype="float32")


@pytest.fixture(scope="session")
def arguments(token_folder):
    """arguments(out_dir, **values): the command line of a run of eight small steps, with dropout."""

    def make(out_dir, **values):
        values = {**TINY, "data_dir": token_folder, "out_dir": out_dir, **values}
        return ["--config", CPU, *(f"--config.{key}={value}" for key, value in values.items())]

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory, arguments):
    """The folder of a finished run, and what was printed; tests read it or copy it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(arguments(out)) == 0
    return out


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def logged(out) -> dict[int, tuple]:
    """Step to exactly what was logged of it but for its speed; no step may be logged twice."""
    found = [row for row in rows(out) if "loss" in row]
    assert len({row["step"] for row in found}) == len(found)
    return {row["step"]: (row["loss"], row["lr"], row["grad_norm"]) for row in found}


def state_of(out, mesh):
    """The newest checkpoint's state, its info and its step."""
    config = read_config(out)
    return Checkpoints(out).restore(abstract_state(resolve(config, mesh, 27), mesh))


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def contents(folder: Path) -> dict:
    """Every file below it with its bytes, and every folder."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# --- the same run ---


def test_stopping_and_resuming_changes_no_bit(finished, arguments, tmp_path, mesh):
    """Half the steps, then the other half: parameters, optimizer state and what is logged, dropout being on."""
    out = tmp_path / "run"
    main(arguments(out, max_iters=4))
    assert int(state_of(out, mesh)[0].step) == 4
    main(arguments(out, init_from="resume"))
    whole, info, step = state_of(finished, mesh)
    halves, halves_info, halves_step = state_of(out, mesh)
    assert step == halves_step == int(halves.step) == 8
    assert bits(whole) == bits(halves)
    assert logged(out) == logged(finished) and list(logged(out)) == list(range(1, 9))
    assert halves_info["val_loss"] == info["val_loss"]


def test_the_best_is_remembered_across_a_resume(arguments, tmp_path, mesh):
    """Four good steps, then four that spoil it: the best loss, its step and its checkpoint are those of before."""
    out = tmp_path / "run"
    main(arguments(out, max_iters=4, always_save_checkpoint=False))
    best = state_of(out, mesh)[1]["val_loss"]
    main(arguments(out, init_from="resume", always_save_checkpoint=False, learning_rate=1.0, keep_checkpoints=1))
    _, info, step = state_of(out, mesh)
    assert step == 8 and info["val_loss"] > best
    assert (info["best_val_loss"], info["best_step"]) == (best, 4)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"4", "8"}


def test_evaluating_changes_no_training_loss(finished, arguments, tmp_path):
    for interval, iters in ((1, 1), (8, 5)):
        out = tmp_path / f"every{interval}"
        main(arguments(out, eval_interval=interval, eval_iters=iters))
        assert logged(out) == logged(finished)
        assert [row["step"] for row in rows(out) if "val_loss" in row] == list(range(0, 9, interval))


def test_several_steps_a_call_are_the_same_steps(arguments, tmp_path, mesh):
    """Every step is logged, and stopping between calls changes no bit; one step a call may round otherwise."""
    one, four, halves = tmp_path / "one", tmp_path / "four", tmp_path / "halves"
    main(arguments(one, eval_interval=4))
    main(arguments(four, eval_interval=4, steps_per_call=4))
    main(arguments(halves, eval_interval=4, steps_per_call=4, max_iters=4))
    main(arguments(halves, eval_interval=4, steps_per_call=4, init_from="resume"))
    assert logged(four).keys() == logged(one).keys()
    np.testing.assert_allclose(list(logged(four).values()), list(logged(one).values()), rtol=1e-4)
    assert logged(halves) == logged(four)
    assert bits(state_of(halves, mesh)[0]) == bits(state_of(four, mesh)[0])


def test_a_terminated_run_goes_on_to_the_same_end(arguments, tmp_path, mesh):
    """SIGTERM to a real process among its steps: it saves and exits with 75, and the same command finishes the run."""
    long = dict(max_iters=150, lr_decay_iters=150, eval_interval=150, init_from="auto")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(arguments(whole, **long))
    command = [sys.executable, "-W", "error", "-m", "jaxgpt.train", *arguments(parts, **long)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("iter 5:"):
                process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == "SIGTERM: saving, then stopping; once more stops at once\n"
    assert process.returncode == 75
    state, info, step = state_of(parts, mesh)
    assert 5 <= step < 150 and int(state.step) == step and info["val_loss"] is None
    main(arguments(parts, **long))
    assert bits(state_of(parts, mesh)[0]) == bits(state_of(whole, mesh)[0])
    assert logged(parts) == logged(whole)


# --- a run's course ---


def test_exactly_max_iters_updates(finished, mesh):
    state, info, step = state_of(finished, mesh)
    counts = [int(x) for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state) if "count" in str(p[-1])]
    assert set(counts) == {8} and step == int(state.step) == 8
    assert list(logged(finished)) == list(range(1, 9))
    assert [row["step"] for row in rows(finished) if "val_loss" in row] == [0, 3, 6, 8]
    losses = {row["step"]: row["val_loss"] for row in rows(finished) if "val_loss" in row}
    assert losses[8] < losses[0]  # it learns
    assert info["best_val_loss"] == min(losses.values()) and losses[info["best_step"]] == info["best_val_loss"]


def test_the_runs_folder(finished, token_folder):
    """All that sampling needs is in it; and nothing that is left over."""
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "metrics.jsonl", "events.jsonl", "meta.json", "checkpoints"
    }  # fmt: skip
    assert read_config(finished).n_embd == 16
    ours, corpus = (json.loads((folder / "meta.json").read_text()) for folder in (finished, token_folder))
    assert (ours["itos"], ours["vocab_size"]) == (corpus["itos"], 27)
    assert {path.name for path in (finished / "checkpoints").iterdir()} <= {"3", "6", "8"}


def test_what_metrics_jsonl_says(finished):
    for row in rows(finished):
        if "val_loss" in row:
            assert set(row) == {"step", "train_loss", "val_loss", "val_ppl", "val_bpb", "tokens", "wall_s"}
            assert row["val_ppl"] == pytest.approx(np.exp(row["val_loss"]))
            assert row["val_bpb"] == pytest.approx(row["val_loss"] / np.log(2))  # characters of one byte each
        else:
            speed = set(row) - {"step", "loss", "lr", "grad_norm", "tokens", "wall_s"}
            assert speed in (set(), {"step_ms", "tokens_per_s"})
            if speed:
                assert row["tokens_per_s"] * row["step_ms"] == pytest.approx(8 * 16 * 1e3)
        assert row["tokens"] == 8 * 16 * row["step"]
    assert rows(finished)[1]["lr"] == pytest.approx(1e-2 / 3)


def test_what_is_printed(arguments, tmp_path, capsys):
    """nanoGPT's lines, at the steps asked for."""
    main(arguments(tmp_path / "run", log_interval=2, eval_interval=4))
    out, err = capsys.readouterr()
    assert err == ""
    assert "2,880 parameters" not in out and "128 tokens per step, 1 micro-step\n" in out
    assert "tensor=1, float32\nattention: plain · loss: plain · norm: plain · products: float32\n" in out
    assert f"starting at step 0 of 8, in {tmp_path / 'run'}" in out
    number = r"\d\.\d{4}"
    steps = re.findall(rf"^step (\d+): train loss {number}, val loss {number}, val bpb {number}$", out, re.MULTILINE)
    iters = re.findall(rf"^iter (\d+): loss {number}(?:, time \d+\.\d\dms)?$", out, re.MULTILINE)
    assert steps == ["0", "4", "8"] and iters == ["2", "4", "6", "8"]
    assert re.search(r"^iter 4: .*, time ", out, re.MULTILINE)
    main(arguments(tmp_path / "run", init_from="auto", max_iters=9))
    assert f"resuming at step 8 of 9, in {tmp_path / 'run'}" in capsys.readouterr().out


def test_what_a_run_tells_of_itself(arguments, tmp_path, capsys):
    """Saves, samples and what comes next, on the console and in its folder; sampling changes no training."""
    run = tmp_path / "run"
    options = dict(sample_interval=2, sample_prompt="the ", eval_interval=4)
    main(arguments(run, **options, max_iters=6))
    out = capsys.readouterr().out
    assert "step 4: evaluating\n" in out and "step 4: saved, the best so far\n" in out  # no terminal, so no bar
    assert re.search(rf"^finished; the best val loss was .*\n.*sample --out_dir={run}\n.*\n.*report {run}$", out, re.M)

    def lines(name):
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    samples = lines("samples.jsonl")
    assert [row["step"] for row in samples] == [2, 4, 6] and all(row["text"].startswith("the ") for row in samples)
    main(arguments(run, **options, init_from="resume"))
    assert lines("samples.jsonl")[:3] == samples and lines("samples.jsonl")[3]["step"] == 8  # each step once
    events = [(row["step"], row["event"]) for row in lines("events.jsonl")]
    assert [event for event in events if event[1] != "saved"] == [
        (0, "started"), (6, "finished"), (6, "resumed"), (8, "finished")
    ]  # fmt: skip
    assert {step for step, event in events if event == "saved"} == {4, 6, 8}
    seconds = [row["wall_s"] for row in rows(run)]
    assert seconds == sorted(seconds) and rows(run)[-1]["tokens"] == 8 * 128
    main(arguments(tmp_path / "other", eval_interval=4, max_iters=6))
    assert logged(tmp_path / "other") == {step: row for step, row in logged(run).items() if step <= 6}


def test_training_needs_no_tokenizer(arguments, tmp_path, monkeypatch):
    """Tokens of a vocabulary that cannot be fetched, or of one that nobody knows, are trained on all the same."""
    unreachable = property(lambda data: pytest.fail("the tokenizer was loaded"))
    monkeypatch.setattr("jaxgpt.data.RunData.tokenizer", unreachable)
    assert main(arguments(tmp_path / "run", max_iters=3)) == 0


def test_auto_begins_where_there_is_nothing(finished, arguments, tmp_path, monkeypatch):
    """In the home folder, which no shell puts in place of a ~ after a =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    main(arguments("~/run", init_from="auto"))
    assert logged(tmp_path / "run") == logged(finished)


def test_a_finished_run_resumed_stays_as_it_is(finished, arguments, tmp_path, mesh):
    out = shutil.copytree(finished, tmp_path / "run")
    before = contents(out)
    assert main(arguments(out, init_from="resume")) == 0
    after = contents(out)
    assert {path for path in after if after[path] != before.get(path)} <= {Path("config.json"), Path("events.jsonl")}
    assert set(before) == set(after)


def test_eval_only_writes_nothing(finished, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(arguments(tmp_path / "fresh", eval_only=True))
    assert re.fullmatch(r"eval: train loss 3\.\d{4}, val loss 3\.\d{4}, val bpb 4\.\d{4}\n", capsys.readouterr().out)
    out = shutil.copytree(finished, tmp_path / "run")
    before = contents(tmp_path)
    main(arguments(out, eval_only=True, init_from="resume"))
    (last,) = [row for row in rows(out) if row["step"] == 8 and "val_loss" in row]
    shown = ", ".join(f"{key.replace('_', ' ')} {last[key]:.4f}" for key in ("train_loss", "val_loss", "val_bpb"))
    assert capsys.readouterr().out == f"eval: {shown}\n"
    assert contents(tmp_path) == before


def test_a_run_keeps_where_it_began(arguments, tmp_path):
    out = tmp_path / "run"
    for values in ({"init_from": "auto", "max_iters": 4}, {"init_from": "auto"}):
        main(arguments(out, **values))
        assert json.loads((out / "config.json").read_text())["init_from"] == "scratch"
    for other in ("gpt2", "no such thing", str(tmp_path)):
        with pytest.raises(UserError, match="began with init_from=scratch; go on with --config.init_from=auto"):
            main(arguments(out, init_from=other))


def test_a_run_that_diverges_ends_and_says_so(arguments, tmp_path, capsys):
    begin_again = "3 steps in a row up to .*; nothing was saved: begin again in .*run, with a lower learning_rate"
    with pytest.raises(UserError, match=begin_again) as error:
        main(arguments(tmp_path / "run", learning_rate=1e38, warmup_iters=0, max_bad_steps=3, max_iters=30))
    assert error.value.status == 77
    dropped = [row for row in rows(tmp_path / "run") if "skipped" in row]
    assert [row["skipped"] for row in dropped][-3:] == [1, 2, 3]
    assert re.search(r"^step \d+: loss .*: update dropped", capsys.readouterr().out, re.MULTILINE)


def test_steps_per_call(tiny_config, monkeypatch):
    """As many as divide every stretch between evaluations, in calls of about 50 ms by the device's peak."""
    config = tiny_config(eval_interval=250, max_iters=5000)
    assert choose_steps_per_call(config, 0, 1e9) == 1  # a CPU, whose peak is not known
    monkeypatch.setattr("jaxgpt.train.peak_flops", lambda device: 1e12 / 8)
    assert choose_steps_per_call(config, 0, 0.4e12 / 1000) == 50  # 1 ms a step
    assert choose_steps_per_call(config, 0, 0.4e12 / 100) == 5
    assert choose_steps_per_call(config, 20, 0.4e12 / 1000) == 10
    assert choose_steps_per_call(config, 0, 0.4e12) == 1
    config.steps_per_call = 25
    assert choose_steps_per_call(config, 75, 1e9) == 25
    with pytest.raises(UserError, match="steps_per_call=25 must divide eval_interval=250.* start from, 30; 10 does"):
        choose_steps_per_call(config, 30, 1e9)


def test_the_time_in_a_line_is_the_devices(tiny_config, monkeypatch):
    """The last one's before an evaluation, too: nothing follows it, and what came before it was seen late."""
    ends = iter([10.0, 10.1, 10.2])
    monkeypatch.setattr("jaxgpt.train.when_done", lambda metrics: mock.Mock(result=partial(float, next(ends))))
    reporter = mock.Mock(spec=Reporter)
    log = StepLog(tiny_config(log_interval=1), reporter, Stopwatch(1e12, 100))
    for step in (1, 2, 3):
        log.add(step, {"loss": jnp.ones(1), "finite": jnp.ones(1, bool), "bad_steps": jnp.zeros(1, int)})
    log.flush()
    assert [call.args[1].get("step_ms") for call in reporter.record.mock_calls] == [None, *[pytest.approx(100.0)] * 2]


def test_a_checkpoint_that_is_another_runs_is_refused(finished, arguments, tmp_path):
    """Of the same shapes, moved by hand. A copy of the whole folder is the same run."""
    out, other = shutil.copytree(finished, tmp_path / "run"), tmp_path / "other"
    main(arguments(other, max_iters=9))
    shutil.move(other / "checkpoints" / "9", out / "checkpoints" / "9")
    with pytest.raises(UserError, match="checkpoints/9 is another run's .*; move it back to where it came from"):
        main(arguments(out, init_from="resume", max_iters=9))


def test_lines_of_metrics_that_are_lost_are_said(finished, arguments, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join(lines[:5]) + b"\0" * 20)
    main(arguments(out, init_from="resume", max_iters=9))
    assert "metrics.jsonl has 5 of the 12 lines up to step 8" in capsys.readouterr().out


def test_a_start_that_fails_leaves_nothing_and_can_be_made_again(finished, arguments, tmp_path, monkeypatch):
    """A disk that is full at the last of the run's files; the same command then starts, as if nothing had been."""
    from jaxgpt import Unavailable, train

    def full(*_, **__):
        raise Unavailable("cannot write config.json: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_config", full)
        with pytest.raises(Unavailable):
            main(arguments(tmp_path / "a" / "run"))
    assert list(tmp_path.iterdir()) == []
    run = tmp_path / "a" / "run"
    main(arguments(run))
    assert logged(run) == logged(finished)
    config = (run / "config.json").read_bytes()
    (run / "events.jsonl").rename(run / "events")
    (run / "events.jsonl").mkdir()
    with pytest.raises(UserError, match="events.jsonl cannot be written: Is a directory; move it away"):
        main(arguments(run, init_from="resume", max_iters=9, learning_rate=0.5))
    assert (run / "config.json").read_bytes() == config


def test_a_disk_without_room_for_one_checkpoint_is_said_at_the_start(arguments, tmp_path, monkeypatch):
    from jaxgpt import Unavailable

    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10**5))
    with pytest.raises(
        Unavailable, match="no room for a checkpoint: 100,000 bytes are free, [0-9,]+ needed; make room"
    ):
        main(arguments(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_an_update_that_is_not_finite_is_dropped(arguments, tmp_path, mesh):
    """The gradients are, the parameters would not be: they stay as they were, and none comes to disk."""
    out = tmp_path / "run"
    main(arguments(out, max_iters=3))
    before = bits(state_of(out, mesh)[0].params)
    with pytest.raises(UserError, match="their loss, gradient or update not finite") as error:
        main(arguments(out, init_from="resume", learning_rate=3e38, min_lr=3e38, weight_decay=10.0, max_bad_steps=2))
    assert error.value.status == 77 and bits(state_of(out, mesh)[0].params) == before


# --- what a user gets wrong: one line, status 2, nothing made or changed ---


class Mistakes:
    """Each method makes a mistake in its folder and returns the command line that commits it."""

    def __init__(self, folder: Path, tokens: Path, finished: Path, arguments):
        self.folder, self.tokens, self.finished, self.arguments = folder, tokens, finished, arguments

    def run(self, **values):
        return self.arguments(**{"out_dir": self.folder / "out" / "run", **values})

    def corpus(self, **files):
        """The command line over a copy of the corpus with these files' contents, or without those that are None."""
        copy = shutil.copytree(self.tokens, self.folder / "corpus")
        for name, content in files.items():
            path = copy / name.replace("_", ".")
            path.write_bytes(content) if content is not None else path.unlink()
        return self.run(data_dir=copy)

    def larger_vocabulary(self):
        self.corpus(meta_json=b'{"vocab_size": 300}')
        return self.folder / "corpus"

    def preset(self, line):
        path = self.folder / "preset.py"
        path.write_text(
            f"from jaxgpt.config import default_config\ndef get_config():\n c = default_config()\n {line}\n return c\n"
        )
        return ["--config", str(path)]

    def holding(self, name):
        """The command line for a folder that already holds a file of this name."""
        path = self.folder / "out" / "run" / name
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        return self.run()

    def piped(self, name):
        """The command line for a folder in which this name is a pipe's."""
        (self.folder / "out" / "run").mkdir(parents=True)
        os.mkfifo(self.folder / "out" / "run" / name)
        return self.run()

    def linked(self, name, target="nowhere"):
        """The command line for a folder in which a link of this name leads nowhere, or to `target`."""
        (self.folder / "out" / "run").mkdir(parents=True)
        (self.folder / "out" / "run" / name).symlink_to(target)
        return self.run()

    def spoiled(self, name, text):
        """The command line that goes on with a copy of the finished run, of which one file's text is this."""
        argv = self.existing(init_from="resume")
        (self.folder / "old" / name).write_text(text)
        return argv

    def existing(self, **values):
        return self.arguments(shutil.copytree(self.finished, self.folder / "old"), **values)


def ids(*tokens) -> bytes:
    return np.array([0] * 100 + list(tokens) + [0] * 100, "<u2").tobytes()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


MISTAKES = {
    "misspelt key in a preset": (lambda m: m.preset("c.n_layers = 2"), "no key n_layers; did you mean n_layer?"),
    "misspelt key": (lambda m: m.run() + ["--config.n_layers=2"], "no key n_layers; did you mean n_layer?"),
    "wrong type in a preset": (lambda m: m.preset("c.n_layer = 'two'"), "n_layer"),
    "wrong type": (lambda m: m.run(n_layer="two"), "invalid integer value: 'two'"),
    "no such preset": (lambda m: ["--config", "configs/nothing.py"], "no preset file configs/nothing.py"),
    "no data": (lambda m: m.run(data_dir="nowhere"), "nowhere/train.bin does not exist; run its prepare.py"),
    "no such corpus": (lambda m: m.run(data_dir="", dataset="openwebtex"), "holds it; did you mean openwebtext?"),
    "no validation data": (lambda m: m.corpus(val_bin=None), "val.bin does not exist; run its prepare.py"),
    "empty file": (lambda m: m.corpus(train_bin=b""), "train.bin is missing or empty"),
    "truncated file": (lambda m: m.corpus(train_bin=ids(1)[:-1]), "train.bin has 401 bytes, not 2 for each token"),
    "short file": (lambda m: m.corpus(val_bin=bytes(32)), "val has 16 tokens, fewer than one window of"),
    "token outside": (lambda m: m.corpus(train_bin=ids(27)), "train.bin: token 100 is 27, outside the vocab"),
    "validation token outside": (lambda m: m.corpus(val_bin=ids(9, 500)), "val.bin: token 101 is 500, outside the voc"),
    "damaged meta.json": (lambda m: m.corpus(meta_json=b'{"vocab_size": 2'), "meta.json is damaged"),
    "hostile meta.pkl": (
        lambda m: m.corpus(meta_json=None, meta_pkl=pickle.dumps({"vocab_size": 27, "itos": Hostile()})),
        "meta.pkl is damaged (it asks for posix.system; only plain data is read)",
    ),
    "heads": (lambda m: m.run(n_head=3), "n_embd=16 is not divisible by n_head=3; choose a multiple"),
    "accumulation": (lambda m: m.run(gradient_accumulation_steps=12), "=12 is not divisible by the 8 devices"),
    "mesh": (lambda m: m.run(mesh_data=3), "mesh_data=3, mesh_fsdp=1, mesh_tensor=1 do not multiply to the 8 devices"),
    "attention": (lambda m: m.run(attention="cudnn"), "attention=cudnn needs an NVIDIA GPU"),
    "steps per call": (lambda m: m.run(steps_per_call=2), "steps_per_call=2 must divide eval_interval=3"),
    "documents": (lambda m: m.run(doc_mask=True), "doc_mask needs an end-of-text token and this corpus has none"),
    "tracker": (lambda m: m.run(wandb_log=True), "wandb_log needs wandb; run: pip install"),
    "task": (lambda m: m.run(eval_tasks="trivia"), "there is no task 'trivia'"),
    "task file": (lambda m: m.run(eval_tasks="hellaswag=no.jsonl"), "no.jsonl cannot be read"),
    "out_dir under a file": (lambda m: m.run(out_dir=m.tokens / "val.bin" / "run"), "cannot be written"),
    "out_dir is a file": (lambda m: m.run(out_dir=m.tokens / "val.bin"), "cannot be written"),
    "out_dir of the corpus": (lambda m: m.run(out_dir=m.tokens), "is the corpus's own folder; choose another out_dir"),
    "unwritable out_dir": (lambda m: m.run(out_dir="/proc/jaxgpt"), "out_dir /proc/jaxgpt cannot be written"),
    "existing run": (lambda m: m.existing(), "already holds a run; go on with --config.init_from=auto"),
    "nothing to resume": (lambda m: m.run(init_from="resume"), "nothing to resume"),
    "another model": (lambda m: m.existing(init_from="resume", n_embd=32), "n_embd=32, but the run in"),
    "another vocabulary": (
        lambda m: m.existing(init_from="resume", data_dir=m.larger_vocabulary()),
        "has GPT-2's tokens, the run in",
    ),
    "past its end": (lambda m: m.existing(init_from="resume", max_iters=6), "is at step 8 already; raise max_iters=6"),
    "a model's folder": (lambda m: m.holding("model.safetensors"), "holds a model (model.safetensors)"),
    "another program's folder": (lambda m: m.holding("config.json"), "holds a config.json that is no run's"),
    "checkpoints that are a file": (lambda m: m.holding("checkpoints"), "checkpoints is no folder"),
    "checkpoints that are a link to nowhere": (lambda m: m.linked("checkpoints"), "checkpoints is no folder"),
    "metrics that are a folder": (lambda m: m.holding("metrics.jsonl/x"), "metrics.jsonl cannot be read: Is a direct"),
    "a schedule beyond int32": (lambda m: m.run(lr_decay_iters=2**31), "lr_decay_iters=2147483648 must be below"),
    "out_dir that TensorStore reads as a pattern": (lambda m: m.run(out_dir=m.folder / "a[1]"), "with [ in its path"),
    "out_dir that TensorStore takes for a lock": (lambda m: m.run(out_dir=m.folder / "a.__lock"), "with .__lock in it"),
    "a config.json that is a pipe": (lambda m: m.piped("config.json"), "config.json is a pipe; move it away"),
    "metrics that are a device": (lambda m: m.linked("metrics.jsonl", "/dev/zero"), "metrics.jsonl is a device; move"),
    "a model of nobody's": (lambda m: m.run(model="~nobody-there/x.py"), "there is no home folder that ~ could mean"),
    "out_dir that is no text": (lambda m: m.run(out_dir="\udcff"), "out_dir='\\udcff' names no folder"),
    "a preset that asserts": (lambda m: m.preset("assert c.n_layer == 1"), "preset.py: line 4: AssertionError"),
    "a preset that raises": (lambda m: m.preset("raise RuntimeError('no such size')"), "preset.py: no such size"),
    "config.json nested deep": (lambda m: m.spoiled("config.json", "[" * 10**5), "config.json is damaged"),
    "a billion layers": (lambda m: m.run(n_layer=10**9), "n_layer=1000000000 must be below 1001"),
    "a model that no machine holds": (lambda m: m.run(n_embd=10**9), "make about 1.2e+19 parameters; choose a smaller"),
    "a step that no machine holds": (lambda m: m.run(batch_size=10**9), "are 1.3e+11 tokens a step; choose fewer"),
    "an evaluation that never ends": (lambda m: m.run(eval_iters=10**9), "eval_iters=1000000000 must be below 1000001"),
    "too many micro-steps": (lambda m: m.run(gradient_accumulation_steps=10**8), "1.6e+09 tokens a step; choose fewer"),
    "a number too long to print": (lambda m: m.preset("c.n_layer = 10**5000"), "n_layer is a number of 16610 bits"),
    "a rate that overflows": (lambda m: m.run(learning_rate=1e300, min_lr=0), "learning_rate=1e+300"),
    "no such weights": (lambda m: m.run(init_from="nowhere"), "nowhere is neither gpt2, gpt2-medium"),
}  # fmt: skip


def test_a_step_that_may_not_be_compiled_is_refused_before_anything_is_written(tiny_config, tmp_path):
    with jax.disable_jit(), pytest.raises(UserError, match="JAX_DISABLE_JIT is set"):
        train(tiny_config(out_dir=str(tmp_path / "run")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(
    name, tmp_path, token_folder, finished, arguments, monkeypatch, capfd
):
    mistake, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    argv = mistake(Mistakes(tmp_path, token_folder, finished, arguments))
    before = contents(tmp_path), contents(token_folder)
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    with pytest.raises(SystemExit) as end:
        run_main(main)
    out, err = capfd.readouterr()
    assert end.value.code == 2, err
    assert out == "" and re.fullmatch(r"error: .+\n", err) and message in err
    assert (contents(tmp_path), contents(token_folder)) == before
