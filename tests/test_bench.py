"""The benchmark runs where there is no GPU and prints one line of JSON."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from jaxgpt import UserError, bench, metrics
from jaxgpt.bench import main
from jaxgpt.config import load_preset, resolve
from jaxgpt.models import abstract_params
from jaxgpt.sharding import make_mesh
from jaxgpt.tools import profile

ROOT = Path(__file__).parents[1]
CPU = f"{ROOT / 'configs' / 'shakespeare_char.py'}:cpu"
TINY = dict(block_size=16, n_layer=1, n_head=2, n_embd=16, batch_size=1, gradient_accumulation_steps=8)


@pytest.fixture
def arguments(token_folder):
    return [
        "--config",
        CPU,
        *(f"--config.{key}={value}" for key, value in TINY.items()),
        f"--config.data_dir={token_folder}",
    ]


def test_one_line_of_json(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 1e9)
    main([*arguments, "--steps=2"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    result = json.loads(out, parse_constant=pytest.fail)
    assert (result["what"], result["tokens_per_step"]) == ("train", 128)
    assert result["params"] == 16 * (128 + 12 * 16 + 3)
    per_token, attention = 6 * result["params"] + 12 * 16 * 16, 12 * 16 * 16  # PaLM's formula; T is 16 as well
    assert result["mfu"] == pytest.approx(result["tokens_per_s"] * per_token / 8e9, rel=1e-2)
    assert result["mfu_strict"] == pytest.approx(result["mfu"] * (1 - attention / 2 / per_token), rel=1e-2)
    assert result["step_ms"] > 0 and result["step_ms_fixed_batch"] > 0
    assert result["tokens_per_s"] == pytest.approx(128 / result["step_ms"] * 1e3, rel=1e-2)
    assert abs(result["loss_first"] - math.log(27)) < 0.1 and result["loss_last"] < result["loss_first"]
    assert {"jax", "jaxlib", "flax", "optax", "host"} <= set(result) and result["devices"] == "8 × cpu"
    assert list(tmp_path.iterdir()) == []


def test_beside_nanogpt_a_job_that_fails_is_said_and_the_others_go_on(tmp_path):
    """Each fails here at once: for lack of nanoGPT."""
    script = ROOT / "scripts" / "bench_vs_nanogpt"
    run = subprocess.run([sys.executable, script, tmp_path, "--gpu", "--only=generate"], capture_output=True, text=True)
    failed = [line for line in run.stdout.splitlines() if "failed: " in line]
    assert [line.split("  ")[0] for line in failed] == ["generate gpt2 x1", "generate gpt2 x10", "generate gpt2-xl x1"]
    assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith("error: failed: generate gpt2 x1, ")


class Device:
    """A device with a clock of its own that takes 10 ms a step, one after the other. It runs nothing.

    queue: how far behind the host it may be, in seconds: a call that would leave it more to do waits.
    """

    def __init__(self, queue: float):
        self.now, self.busy_until, self.queue = 0.0, 0.0, queue

    def step(self, state, tokens):
        self.now += 1e-3  # the host's part
        self.busy_until = max(self.now, self.busy_until) + 10e-3
        self.now = max(self.now, self.busy_until - self.queue)
        return state + 1, {"loss": Loss(self, self.busy_until, [0.0, state])}


class Loss(NamedTuple):
    """An array on it, computed at `done`."""

    device: Device
    done: float
    values: list[float]

    def result(self) -> float:
        self.device.now = max(self.device.now, self.done)
        return self.done


@pytest.mark.parametrize("queue", [1.0, 2e-3])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_the_time_of_a_step_is_the_same_however_many_are_measured(steps, queue, monkeypatch):
    device = Device(queue)
    monkeypatch.setattr(bench, "when_done", lambda loss: loss)
    monkeypatch.setattr(bench.jax, "device_get", lambda loss: loss.values)
    state, loss, ms = bench.time_steps(device.step, 5, [None] * (steps + 1))
    assert (state, loss, ms) == (steps + 6, steps + 5, pytest.approx(10.0))


def test_a_profile_needs_a_device(arguments):
    with pytest.raises(UserError, match="--profile needs a GPU"):
        main([*arguments, "--steps=2", "--profile"])


def test_sampling_and_reading(arguments, capsys):
    main([*arguments, "--what=sample", "--num_samples=2", "--max_new_tokens=8"])
    main([*arguments, "--what=data", "--steps=3"])
    sample, data = (json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines())
    assert (sample["what"], sample["num_samples"], sample["max_new_tokens"]) == ("sample", 2, 8)
    assert data["what"] == "data" and sample["tokens_per_s"] > 0 and data["tokens_per_s"] > 0


@pytest.mark.parametrize("wrong", ["--steps=0", "--steps=-3", "--steps=many", "--num_samples=0", "--what=dreams"])
def test_what_measures_nothing_is_one_line(arguments, wrong):
    with pytest.raises(UserError, match=wrong.partition("=")[0]):
        main([*arguments, wrong])


PLANE = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #1"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000000 }
    events { metadata_id: 2 offset_ps: 5000000000 duration_ps: 1000000000 }
    events { metadata_id: 1 offset_ps: 6000000000 duration_ps: 2000000000 }
  }
  lines { name: "XLA Ops" events { metadata_id: 2 offset_ps: 0 duration_ps: 9000000000 } }
  event_metadata { key: 1 value { id: 1 name: "nvjet_sm90_tst" } }
  event_metadata { key: 2 value { id: 2 name: "_row_kernel" } }
}
"""


def test_a_profile_is_a_table_of_kinds_beside_their_floors(tmp_path, monkeypatch):
    (tmp_path / "t.xplane.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(PLANE))
    monkeypatch.setattr(profile, "peak_flops", lambda device: 1e12)
    least = {"matrix products": (2e10, "FLOP"), "loss": (3e9, "byte")}
    products, loss, idle, total, *kernels = profile.profile_table(str(tmp_path), 2, least).splitlines()
    assert " ".join(products.split()) == "matrix products 3.000 ms a step 1 kernels 0.02 TFLOP 20.000 ms at 1 TFLOP/s"
    assert " ".join(loss.split()) == "loss 0.500 ms a step 0 kernels 3.00 GB"  # no peak is made up
    assert (idle.split()[:2], total.split()[:2]) == (["idle", "0.500"], ["total", "4.000"])
    assert [line.split()[-1] for line in kernels] == ["nvjet_sm90_tst", "_row_kernel"]


def test_the_least_work_of_gpt2_is_what_is_known_of_it():
    """124M, 64 × 1,024: 6 FLOPs a weight and token; 20 GB around 25 normalizations, 3.5 in AdamW."""
    config = load_preset(str(ROOT / "configs" / "gpt2.py"))
    config.update(batch_size=64, gradient_accumulation_steps=8)
    config.dtype = "bfloat16"
    mesh = make_mesh(8, 1, 1)
    parts = resolve(config, mesh, 50257)
    found = profile.least_work(parts, mesh, abstract_params(parts.model))
    expected = {"matrix products": 48.59e12, "attention": 4.329e12, "loss": 13.19e9, "normalization": 20.13e9,
                "optimizer": 3.48e9}  # fmt: skip
    assert {kind: work for kind, (work, _) in found.items()} == pytest.approx(expected, rel=1e-3)
