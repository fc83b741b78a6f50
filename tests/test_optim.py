"""Learning rates against nanoGPT's formula in float64, and the optimizer against torch's AdamW and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.config import default_config, load_preset
from jaxgpt.models.gpt2 import GPTConfig, abstract_params
from jaxgpt.optim import decay_mask, learning_rate, make_optimizer


def config_with(**values):
    config = default_config()
    config.update(values)
    return config


# --- schedules ---


def nanogpt_rates(config, it):
    """get_lr of nanoGPT's train.py for an array of steps, in float64."""
    it = np.asarray(it, np.float64)
    if not config.decay_lr:
        return np.full(it.shape, config.learning_rate)
    warming = config.learning_rate * (it + 1) / (config.warmup_iters + 1)
    # 0 / 0 there where both are equal; here the decay has then ended
    ratio = (it - config.warmup_iters) / max(config.lr_decay_iters - config.warmup_iters, 1e-300)
    cosine = 0.5 * (1 + np.cos(np.pi * np.minimum(ratio, 1)))
    after = config.min_lr + cosine * (config.learning_rate - config.min_lr)
    after = np.where(it >= config.lr_decay_iters, config.min_lr, after)
    return np.where(
        it < config.warmup_iters, warming, config.learning_rate if config.lr_schedule == "constant" else after
    )


def rates(config, steps):
    return np.asarray(jax.vmap(lambda step: learning_rate(config, step))(jnp.asarray(steps)))


PRESETS = ["configs/shakespeare_char.py", "configs/shakespeare_char.py:cpu", "configs/gpt2.py"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bits, within", [(32, 1e-6), (64, 1e-12)])
def test_every_rate_of_a_run_is_nanogpts(preset, bits, within, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    config = load_preset(preset)
    steps = np.arange(config.max_iters + 100)
    with jax.enable_x64(bits == 64):
        got = rates(config, steps)
    assert got.dtype == f"float{bits}"
    np.testing.assert_allclose(got, nanogpt_rates(config, steps), rtol=within)


@given(
    warmup_iters=st.integers(0, 40),
    lr_decay_iters=st.integers(0, 60),
    learning_rate=st.floats(1e-6, 1.0),
    part=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    decay_lr=st.booleans(),
    lr_schedule=st.sampled_from(["cosine", "constant"]),
)
def test_rates_of_any_settings(part, learning_rate, **settings):
    """min_lr = 0, no warm-up, a decay that ends before the warm-up: finite, never negative, and as nanoGPT's."""
    config = config_with(**settings, learning_rate=learning_rate, min_lr=part * learning_rate)
    with jax.enable_x64(True):
        got = rates(config, np.arange(70))
    np.testing.assert_allclose(got, nanogpt_rates(config, range(70)), rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(rates(config, np.arange(70)), got, rtol=1e-6)


def test_decay_to_zero_is_exact_to_the_end():
    """Just before its end the cosine is 10^-11 of the highest rate, which float32 must not round away."""
    config = config_with(min_lr=0.0, warmup_iters=100, lr_decay_iters=600_000)
    steps = np.arange(599_000, 600_002)
    np.testing.assert_allclose(rates(config, steps), nanogpt_rates(config, steps), rtol=1e-6, atol=1e-24)


def test_constant_rates():
    constant = config_with(lr_schedule="constant", warmup_iters=3, learning_rate=0.5)
    np.testing.assert_allclose(rates(constant, np.arange(6)), [0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert (rates(config_with(decay_lr=False, learning_rate=0.5), np.arange(6)) == 0.5).all()


# --- the optimizer ---


@pytest.mark.parametrize("bias", [True, False])
def test_decay_applies_to_what_nanogpt_calls_matrices(bias):
    """Of two or more dimensions there: (3C,) is one, though kept as (3, C) here."""
    params = abstract_params(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=2, bias=bias))
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params))
        if decays
    }
    kernels = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert decayed == {"wte.embedding", "wpe.embedding"} | {f"h.0.{name}.kernel" for name in kernels}


def torch_run(config, params, grads_of_steps):
    """Parameters after each update of torch.optim.AdamW after clip_grad_norm_, its rate set as nanoGPT sets it."""
    tensors = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in params.items()}
    groups = [
        {"params": [tensors["kernel"], tensors["embedding"]], "weight_decay": config.weight_decay},
        {"params": [tensors["scale"], tensors["bias"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=1e-8)
    for step, grads in enumerate(grads_of_steps):
        for name, x in tensors.items():
            x.grad = torch.tensor(grads[name])
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = float(nanogpt_rates(config, step))
        optimizer.step()
        yield {name: x.detach().numpy().copy() for name, x in tensors.items()}


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_updates_are_torchs(grad_clip, weight_decay):
    """Over steps with gradients under and far over the clip; after the first, Adam's moments make clipping show."""
    config = config_with(
        grad_clip=grad_clip,
        weight_decay=weight_decay,
        learning_rate=0.02,
        min_lr=0.002,
        warmup_iters=3,
        lr_decay_iters=10,
    )
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 3, 4), "embedding": (7, 4), "scale": (4,), "bias": (3, 4)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    sizes = [0.01, 100.0, 0.1, 1.0, 1e4, 1e-3, 1.0, 1.0, 0.1, 1.0, 10.0, 1.0]
    history = [{k: (s * rng.normal(size=v)).astype(np.float32) for k, v in shapes.items()} for s in sizes]
    optimizer = make_optimizer(config)

    @jax.jit
    def update(params, state, grads, step):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + learning_rate(config, step) * u, params, updates), state

    ours, state = params, optimizer.init(params)
    for step, (grads, theirs) in enumerate(zip(history, torch_run(config, params, history), strict=True)):
        ours, state = update(ours, state, grads, step)
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
        np.testing.assert_allclose(state[0], norm, rtol=1e-5)  # before clipping
        for name in shapes:
            np.testing.assert_allclose(ours[name], theirs[name], atol=2e-6, err_msg=f"{name} after step {step}")
    unclipped = list(torch_run(config_with(**{**config.to_dict(), "grad_clip": 0.0}), params, history))[-1]
    assert np.allclose(ours["kernel"], unclipped["kernel"], atol=1e-4) == (grad_clip == 0.0)
