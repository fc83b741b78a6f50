"""The speedrun's recipe, small: modern model, Muon and schedule through the trainer; meshes, accumulation, resume."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgpt.evaluate
import jaxgpt.sample
from jaxgpt import UserError
from jaxgpt.config import load_preset, resolve, validate
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.sharding import BATCH_AXES, make_mesh
from jaxgpt.step import abstract_state, create_state, make_train_step
from jaxgpt.train import main

PRESET = str(Path(__file__).parents[1] / "configs" / "speedrun.py")
VOCAB = 27
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=1, gradient_accumulation_steps=8, max_iters=6)
TINY |= dict(lr_decay_iters=6, warmup_iters=1, momentum_warmup_iters=4, eval_interval=6, eval_iters=2, log_interval=1)
STEPS = 3


def tiny(**values):
    config = load_preset(f"{PRESET}:d2")
    config.update(TINY | values)
    return config


@functools.cache
def trained(sizes=(1, 1, 1), **values):
    """The state after a few steps on a mesh of these sizes, and their losses; eight rows a step, whatever the mesh."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    parts = resolve(tiny(**values), mesh, VOCAB)
    state, step = create_state(parts, mesh), make_train_step(parts, mesh)
    rows = sizes[0] * sizes[1]
    losses = []
    for n in range(STEPS):
        tokens = np.random.default_rng(n).integers(10, size=(1, 8 // rows, rows, 17), dtype=np.uint16)
        state, metrics = step(state, jax.device_put(tokens, NamedSharding(mesh, P(None, None, BATCH_AXES, None))))
        losses.append(float(metrics["loss"][0]))
    return state, losses


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_losses_and_parameters_do_not_depend_on_the_mesh(sizes):
    alone, here = trained(), trained(sizes)
    np.testing.assert_allclose(here[1], alone[1], rtol=0, atol=1e-5)
    assert here[1][-1] < here[1][0] - 0.03, "nothing was learned"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), here[0].params, alone[0].params
    )  # an orthogonalized momentum magnifies rounding


def test_multisteps_is_the_sum():
    a, b = trained(), trained(accumulation="multisteps")
    np.testing.assert_allclose(a[1], b[1], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), a[0].params, b[0].params)


def test_a_dropped_step_changes_neither_momentum_nor_moments():
    mesh = make_mesh(devices=jax.devices()[:1])
    parts = resolve(tiny(), mesh, VOCAB)
    step, state = make_train_step(parts, mesh), jax.tree.map(jnp.copy, trained()[0])
    state.params["wte"]["embedding"] = state.params["wte"]["embedding"].at[3].set(jnp.nan)
    before = jax.device_get((state.params, state.opt_state.groups))
    after, metrics = step(state, np.full((1, 8, 1, 17), 3, np.uint16))
    assert not np.isfinite(metrics["loss"][0]) and int(after.bad_steps) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((after.params, after.opt_state.groups)), before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, token_folder):
    """finished(steps of each call): the folder of a run of six steps, stopped and resumed between the calls."""

    def run(*parts):
        out = tmp_path_factory.mktemp("runs") / "speedrun"
        for until in parts:
            values = {**TINY, "data_dir": token_folder, "out_dir": out, "init_from": "auto", "max_iters": until}
            assert main(["--config", f"{PRESET}:d2", *(f"--config.{k}={v}" for k, v in values.items())]) == 0
        return out

    return functools.cache(run)


def test_stopping_and_resuming_changes_no_bit(finished, mesh):
    states = []
    for out in (finished(6), finished(3, 6)):
        parts = resolve(tiny(), mesh, VOCAB)
        state, _, step = Checkpoints(out, keep=2).restore(abstract_state(parts, mesh))
        assert step == 6
        states.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_its_run_samples_and_evaluates(finished, capsys):
    out = str(finished(6))
    jaxgpt.sample.main(
        ["--out_dir", out, "--start=abc", "--num_samples=1", "--max_new_tokens=30"]
    )  # past the 16 of a window
    assert len(capsys.readouterr().out.strip()) > 20
    jaxgpt.evaluate.main(["--out_dir", out, "--json"])
    found = json.loads(capsys.readouterr().out)
    last = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()][-1]
    assert found["val_loss"] == pytest.approx(last["val_loss"], abs=0.1)


# --- the dial ---


@pytest.mark.parametrize("depth, heads, width", [(4, 2, 256), (7, 4, 512), (8, 4, 512), (12, 6, 768), (24, 12, 1536)])
def test_the_depth_decides(depth, heads, width):
    config = load_preset(f"{PRESET}:d{depth}")
    validate(config)
    assert (config.n_layer, config.n_head, config.n_embd) == (depth, heads, width)
    assert config.n_embd // config.n_head == 128 and 2 * config.value_embeds <= depth


@pytest.mark.parametrize("size", ["12", "d1", "d25", "d", "dx", "gpt2"])
def test_a_size_that_is_none(size):
    with pytest.raises(UserError, match=f"speedrun has no size '{size}'; choose d2 to d24"):
        load_preset(f"{PRESET}:{size}")
