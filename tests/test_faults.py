"""Whole runs under faults, in the short forms of scripts/faults; the spike guard, interrupted evaluations, secrets."""

import importlib.machinery
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import UserError
from jaxgpt.config import resolve
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.guard import Exit, Stop, trim_jsonl
from jaxgpt.step import SPIKE_STEPS, Spikes, create_state, make_train_step
from jaxgpt.tokenizer import Meta, read_meta, write_meta
from jaxgpt.train import train

SCRIPT = Path(__file__).parents[1] / "scripts" / "faults"
SHORT = {"steps": 60, "every": 20}


@pytest.fixture(scope="module")
def faults():
    """scripts/faults as a module."""
    loader = importlib.machinery.SourceFileLoader("faults", str(SCRIPT))
    spec = importlib.util.spec_from_loader("faults", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared, so that the undisturbed runs to compare with are made once."""
    return tmp_path_factory.mktemp("faults")


# --- whole runs ---


def test_killed_runs_end_in_the_same_bits(faults, folder):
    faults.kill(folder, times=2, **SHORT, seed=3)


def test_a_stopped_run_saves_at_once_and_ends_in_the_same_bits(faults, folder):
    faults.term(folder, times=2, **SHORT, processes=1)


def test_two_processes_stop_together_and_a_sleeper_ends_both(faults, folder):
    faults.term(folder, times=1, **SHORT, processes=2)
    faults.stall(folder, timeout=6.0, **SHORT, times=1, brief=True)


def test_a_signal_to_a_process_group_saves(faults, tmp_path):
    faults.groups(tmp_path, times=1)


def test_killed_processes_are_started_again_and_none_outlives_its_launcher(faults, folder):
    faults.restarts(folder, times=1, **SHORT)


def test_two_starts_are_one_run_and_one_refusal(faults, tmp_path):
    faults.starts(tmp_path, times=1, steps=20)


def test_no_line_is_lost_in_a_power_cut(faults, tmp_path):
    """Where mounting is not to be had, the script says so in one line."""
    try:
        faults.power(tmp_path, times=1, steps=80)
    except (faults.Failed, subprocess.CalledProcessError) as error:
        assert "loop" in str(error) or "mount" in str(error), error


def test_entry_points_end_in_one_line(faults, folder):
    faults.entries(folder, cases=8, **SHORT)


def test_harm_to_a_checkpoint_is_seen(faults, folder):
    faults.corrupt(folder, flips=1, times=2, **SHORT)


def test_everything_runs_the_parts_side_by_side_and_says_which_is_bad(faults, tmp_path, capfd):
    bad = ["term", "--processes=0", "--flips=1"]  # an option it does not take
    with pytest.raises(faults.Failed, match="a part is bad"):
        faults.everything(tmp_path, jobs=2, but="fuzz", parts=[["fuzz"], ["corrupt", "--times=1", "--flips=1"], bad])
    good, wrong = capfd.readouterr().out.splitlines()[-2:]
    assert "corrupt --times=1 --flips=1" in good and " good " in good and " BAD " in wrong and "--flips" in wrong


def test_bad_numbers_in_one_of_two_processes_change_nothing(faults, tmp_path):
    faults.nonfinite(tmp_path, dtypes=("bfloat16",), kinds=("gradient",), processes=(2,), steps=12)


def test_a_disk_that_fills_costs_no_older_checkpoint(faults, folder):
    """Where mounting is not to be had, the script says so in one line."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "true"]
    if shutil.which("unshare") and subprocess.run(namespace, capture_output=True).returncode == 0:
        faults.disk(folder, **SHORT, times=1)
    else:
        with pytest.raises(faults.Failed, match="user namespaces"):
            faults.disk(folder, **SHORT, times=1)


def test_hostile_files_and_flags_are_user_errors(faults, tmp_path):
    faults.fuzz(tmp_path, cases=60)


def test_a_long_run_leaves_no_threads_and_files(faults, tmp_path):
    faults.soak(tmp_path, steps=400, every=20, memory=False)


def test_the_script_compares_every_bit(faults, folder):
    """Its verdicts rest on `differs_from`: a changed bit or log line must show."""
    data = faults.make_tokens(folder / "data")
    run = faults.Run(folder / "whole1", data, max_iters=60, eval_interval=20).complete()
    other = folder / "other"
    shutil.copytree(run.folder, other)
    copy = faults.Run(other, data)
    assert copy.differs_from(run) == ""
    metrics = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(metrics.replace('"loss": 3', '"loss": 2', 1))
    assert "metrics" in copy.differs_from(run)
    (other / "metrics.jsonl").write_text(metrics + metrics.splitlines()[-1] + "\n")
    assert "lines" in copy.differs_from(run)
    state, info, step = run.arrays(60), run.record(60)["info"], 60
    (name,) = [k for k in state if k.endswith("wpe.embedding") and k.startswith("params")]
    state[name] = state[name].copy()
    state[name].view(np.uint32).flat[7] ^= 1
    shutil.rmtree(other / "checkpoints")
    (other / "metrics.jsonl").write_text(metrics)
    checkpoints = Checkpoints(other)
    checkpoints.save(step, {k: jnp.asarray(x) for k, x in state.items()}, info)
    assert checkpoints.wait() and name in copy.differs_from(run)


# --- the spike guard ---


@given(
    st.lists(
        st.tuples(st.floats(0, 10, width=32), st.sampled_from(["", "", "", "", "spike", "nan", "inf"])), max_size=40
    ),
    st.sampled_from([3.0, 6.0]),
)
def test_spikes_are_those_of_a_plain_running_statistic(values, threshold):
    """Against NumPy in float64: which steps are spikes, and mean and variance after each."""
    next_ = jax.jit(lambda s, x, norm: s.next(x, norm, jnp.isfinite(x) & jnp.isfinite(norm), threshold))
    rng, state, count, mean, var = np.random.default_rng(0), Spikes.create(), 0, np.zeros(2), np.zeros(2)
    early = [(float(x), "") for x in rng.normal(5, 1, SPIKE_STEPS)]
    for loss, kind in early + values:
        loss = {"spike": 1e6, "nan": math.nan, "inf": math.inf}.get(kind, loss)
        x = np.array([loss, 2.0 + loss / 8], np.float32)
        highest = mean + threshold * np.sqrt(var) if count >= SPIKE_STEPS else np.full(2, np.inf)
        spike, state = next_(state, x[0], x[1])
        if np.isfinite(x).all():
            if np.abs(x - highest).min() > 1e-3:
                assert bool(spike) == bool((x > highest).any())
            count += 1
            weight = 1 / min(count, SPIKE_STEPS)
            delta = np.minimum(x, highest) - mean
            mean, var = mean + weight * delta, (1 - weight) * (var + weight * delta**2)
        else:
            assert not spike, "not finite is not a spike"
        assert int(state.count) == count
        np.testing.assert_allclose(state.mean, mean, rtol=1e-3)
        np.testing.assert_allclose(state.var, var, rtol=1e-2, atol=1e-4)


def test_a_lasting_change_is_soon_accepted():
    next_ = jax.jit(lambda s, x: s.next(x, x, jnp.asarray(True), 4.0))
    rng, state, spikes = np.random.default_rng(0), Spikes.create(), []
    for level in [2.0] * 300 + [8.0] * 200:
        spike, state = next_(state, jnp.float32(level + 0.1 * rng.normal()))
        spikes.append(bool(spike))
    assert not any(spikes[:300]) and spikes[300] and not any(spikes[340:])


def test_a_spike_changes_no_parameter(tiny_config, mesh):
    config = tiny_config(spike_threshold=3.0)
    parts = resolve(config, mesh, 27)
    step = make_train_step(parts, mesh)
    tokens = np.random.default_rng(0).integers(0, 27, (1, 1, 8, 17)).astype(np.uint16)

    def after(mean: float):
        """One step from statistics that expect `mean` and next to no change."""
        state = create_state(parts, mesh)
        spikes = Spikes(jnp.int32(SPIKE_STEPS), jnp.full(2, mean), jnp.full(2, 1e-4))
        state = state._replace(spikes=jax.device_put(spikes, jax.tree.map(lambda x: x.sharding, state.spikes)))
        before = [np.array(x) for x in jax.tree.leaves((state.params, state.opt_state))]
        state, metrics = step(state, tokens)
        now = jax.tree.leaves((state.params, state.opt_state))
        same = all((a == b).all() for a, b in zip(before, now, strict=True))
        return same, int(metrics["bad_steps"][0]), int(state.step), int(state.spikes.count)

    assert after(0.1) == (True, 1, 1, SPIKE_STEPS + 1)
    assert after(100.0) == (False, 0, 1, SPIKE_STEPS + 1)


# --- evaluations that are interrupted ---


def test_a_stop_amid_an_evaluation_is_heard_and_nothing_is_told_twice(tiny_config, tmp_path, monkeypatch):
    """Stopped amid an evaluation, after it, and amid the last one, the run ends with the metrics of one left alone."""

    def rows(config):
        lines = (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(x).items() if k not in ("step_ms", "tokens_per_s", "wall_s")} for x in lines
        ]

    sizes = {"max_iters": 2, "eval_interval": 2, "eval_iters": 20, "lr_decay_iters": 2, "warmup_iters": 1}
    calm = tiny_config(out_dir=str(tmp_path / "calm"), **sizes)
    assert train(calm) == Exit.DONE
    config, asked, requested = tiny_config(out_dir=str(tmp_path / "run"), init_from="auto", **sizes), 0, Stop.requested
    last = 0

    def counting(self):
        nonlocal asked
        asked += 1
        return requested(self) or asked > last

    monkeypatch.setattr(Stop, "requested", counting)
    for last in (2, 4, 3, 100):
        asked = 0
        status = train(config)
        assert status == (Exit.DONE if last == 100 else Exit.STOPPED) and asked <= last + 1
    assert rows(config) == rows(calm)
    best = [
        Checkpoints(c.out_dir).restore({"step": jax.ShapeDtypeStruct((), jnp.int32)}, "best")[1:]
        for c in (config, calm)
    ]
    assert best[0] == best[1] and best[0][1] == 2


def test_trim_drops_an_evaluation_that_is_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 0, "val_loss": 4.0},
        {"step": 1, "loss": 3.0},
        {"step": 1, "val_loss": 2.0},
        {"step": 2, "loss": 1.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trim_jsonl(path, 1, without="val_loss")
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:2]


# --- secrets and paths ---


def test_secrets_reach_no_file_and_no_console(tiny_config, tmp_path, monkeypatch, capfd):
    names = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    for name in names:
        monkeypatch.setenv(name, f"secret-{name}")
    told, seen = [], types.ModuleType("wandb")

    class Tracker:
        log = staticmethod(lambda *args, **kwargs: told.append((args, kwargs)))
        finish = staticmethod(lambda: None)

    seen.login = lambda: True  # pyright: ignore
    seen.init = lambda **kwargs: told.append(kwargs) or Tracker()  # pyright: ignore
    seen.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", seen)
    config = tiny_config(out_dir=str(tmp_path / "run"), max_iters=2, eval_interval=1, eval_iters=1, wandb_log=True)
    assert train(config) == Exit.DONE
    assert len(told) > 3
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    outputs = [*files, repr(told).encode(), *(text.encode() for text in capfd.readouterr())]
    assert not any(b"secret-" in text for text in outputs)
    assert not any("key" in key or "token" in key for key in config)


@pytest.mark.parametrize(
    "name", ["../x.json", "/x.json", "a/b.json", "..", "config.json", "meta.json", ".lock", "x.bin"]
)
def test_a_tokenizer_is_a_json_file_of_the_same_folder(tmp_path, name):
    write_meta(tmp_path, Meta(3, name))
    with pytest.raises(UserError, match="tokenizer"):
        read_meta(tmp_path)
