"""Learning rates against nanoGPT's formula in float64; AdamW against torch's, Muon against NumPy, in every mesh."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from compiled import fresh_params
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import UserError
from jaxgpt.config import load_preset
from jaxgpt.keys import take
from jaxgpt.models import Role, abstract_params, roles
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.optim import (
    FIRST_MOMENTUM,
    OPTIMIZERS,
    POLAR_EXPRESS,
    SCHEDULES,
    Group,
    OptimizerConfig,
    adam_bound,
    check_schedule,
    keeps_finite,
    learning_rate,
    make_optimizer,
    orthogonalize,
    orthogonalize_all,
    unfinished,
)
from jaxgpt.sharding import make_mesh, param_specs, state_specs

# --- finite updates ---


@given(
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0.5, 0.999),
    seed=st.integers(0, 2**32 - 1),
    exponents=st.lists(st.integers(-45, 18), min_size=1, max_size=12),
)
def test_no_update_of_adam_passes_its_bound(beta1, beta2, seed, exponents):
    """Gradients of any sizes that float32 can square, in any order: after tiny ones, and with signs that agree."""
    rule = optax.adam(1.0, beta1, beta2)
    rng, x = np.random.default_rng(seed), np.zeros(16, np.float32)
    state, bound = rule.init(x), adam_bound(beta1, beta2)
    with jax.disable_jit():
        for n in range(24):
            size = np.float64(10.0) ** exponents[n % len(exponents)]
            grad = (size * np.where(np.arange(16) < 8, 1, rng.standard_normal(16))).astype(np.float32)
            update, state = rule.update(jnp.asarray(grad), state)
            assert np.all(np.abs(update) <= bound * 1.001)


def test_parameters_are_looked_at_where_an_update_could_overflow():
    def keeps(**keys):
        return keeps_finite(OptimizerConfig(**keys))

    assert keeps() and keeps(optimizer="muon") and keeps(beta2=0.82)
    assert not keeps(learning_rate=1e20) and not keeps(optimizer="muon", embedding_lr=1e20)
    assert not keeps(beta2=0.81), "β1² = β2: no bound"
    assert not keeps(learning_rate=1.0, weight_decay=1.5), "decay may make parameters larger"


def test_an_optimizer_without_a_bound_is_looked_at(monkeypatch):
    monkeypatch.setitem(
        OPTIMIZERS, "sgd", lambda config: {"all": Group(lambda role: True, optax.sgd(1.0), config.learning_rate)}
    )
    assert not keeps_finite(OptimizerConfig(optimizer="sgd"))


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
    config = take(OptimizerConfig, load_preset(preset))
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
    config = OptimizerConfig(**settings, learning_rate=learning_rate, min_lr=part * learning_rate)
    with jax.enable_x64(True):
        got = rates(config, np.arange(70))
    np.testing.assert_allclose(got, nanogpt_rates(config, range(70)), rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(rates(config, np.arange(70)), got, rtol=1e-6)


def test_decay_to_zero_is_exact_to_the_end():
    """Just before its end the cosine is 10^-11 of the highest rate, which float32 must not round away."""
    config = OptimizerConfig(min_lr=0.0, warmup_iters=100, lr_decay_iters=600_000)
    steps = np.arange(599_000, 600_002)
    np.testing.assert_allclose(rates(config, steps), nanogpt_rates(config, steps), rtol=1e-6, atol=1e-24)


def test_constant_rates():
    constant = OptimizerConfig(lr_schedule="constant", warmup_iters=3, learning_rate=0.5)
    np.testing.assert_allclose(rates(constant, np.arange(6)), [0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert (rates(OptimizerConfig(decay_lr=False, learning_rate=0.5), np.arange(6)) == 0.5).all()


def test_linear_cooldown():
    """Constant up to the last 60% of the steps, then a straight line that reaches min_lr one step after the last."""
    config = OptimizerConfig(
        lr_schedule="linear", learning_rate=1.0, min_lr=0.1, cooldown=0.6, lr_decay_iters=10, warmup_iters=1
    )
    expected = [0.5, 1, 1, 1, 1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1, 0.1]
    np.testing.assert_allclose(rates(config, np.arange(12)), expected, rtol=1e-6)


@given(
    st.integers(0, 12),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from(["cosine", "linear"]),
)
def test_a_rate_that_would_jump_is_refused(warmup_iters, lr_decay_iters, cooldown, lr_schedule):
    """After the warm-up the rate is the highest one, unless that is said to be an error."""
    values = dict(warmup_iters=warmup_iters, lr_decay_iters=lr_decay_iters, cooldown=cooldown, lr_schedule=lr_schedule)
    config = OptimizerConfig(**values, learning_rate=1.0, min_lr=0.1)
    top = rates(config, np.array([warmup_iters])) == 1
    if not top:
        with pytest.raises(UserError, match=f"warmup_iters={warmup_iters} .*lr_decay_iters={lr_decay_iters}"):
            check_schedule(config)
        check_schedule(dataclasses.replace(config, decay_lr=False))
        check_schedule(dataclasses.replace(config, lr_schedule="constant"))
    else:
        check_schedule(config)


@pytest.mark.parametrize(
    "values, line",
    [
        ({}, []),
        ({"max_iters": 20}, ["0.00095; its schedule goes on to 0.0001 at lr_decay_iters=100"]),
        ({"max_iters": 20, "lr_decay_iters": 20}, []),
        ({"max_iters": 99}, []),
        ({"max_iters": 20, "lr_schedule": "linear"}, ["0.001; its schedule goes on to 0.0001 at lr_decay_iters=100"]),
        ({"max_iters": 20, "lr_schedule": "constant"}, []),
        ({"max_iters": 20, "decay_lr": False}, []),
    ],
)
def test_a_run_that_ends_before_its_rate_has_fallen_is_said(values, line):
    config = OptimizerConfig(
        **{"max_iters": 100, "lr_decay_iters": 100, "warmup_iters": 5, "learning_rate": 1e-3, "min_lr": 1e-4} | values
    )
    assert unfinished(config) == [f"max_iters=20 ends this run at a learning rate of {text}" for text in line]


@pytest.mark.parametrize("made, found", [(None, "NoneType"), (optax.sgd(1.0), "GradientTrans"), ({"all": 3}, "a dict")])
def test_an_optimizer_without_groups_is_said(monkeypatch, made, found):
    monkeypatch.setitem(OPTIMIZERS, "mine", lambda config: made)
    for use in (keeps_finite, lambda config: make_optimizer(config, {"w": Role("w", "matrix")})):
        with pytest.raises(UserError, match=f"optimizer=mine returns {found}.*; return a dict of names and Groups"):
            use(OptimizerConfig(optimizer="mine"))


@pytest.mark.parametrize("rate", [None, np.ones(3)])
def test_a_schedule_without_a_number_is_said(monkeypatch, rate):
    monkeypatch.setitem(SCHEDULES, "mine", lambda config, step: rate)
    with pytest.raises(UserError, match="lr_schedule=mine returns .*; return one number, the rate of a step"):
        learning_rate(OptimizerConfig(lr_schedule="mine"), jnp.int32(0))


def test_a_schedule_of_ones_own(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "halves", lambda config, step: config.learning_rate * 0.5**step)
    config = OptimizerConfig(lr_schedule="halves", learning_rate=1.0, warmup_iters=0)
    np.testing.assert_allclose(rates(config, np.arange(3)), [1, 0.5, 0.25])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"min_lr": 1e-2}, "min_lr=0.01 is above learning_rate=0.0006; lower min_lr"),
        ({"optimizer": "muon", "learning_rate": 0.0, "min_lr": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"cooldown": 1.5}, "cooldown=1.5 is a part of lr_decay_iters: at most 1"),
        ({"optimizer": "muon", "head_lr": 0.0}, "head_lr=0.0 must be above 0 with optimizer=muon"),
    ],
)
def test_rates_that_make_no_optimizer(values, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**values)


# --- AdamW ---

ROLES = {
    "kernel": Role("kernel", "matrix"),
    "embedding": Role("embedding", "embedding"),
    "scale": Role("scale", "vector", decay=False),
    "bias": Role("bias", "vector", decay=False),
}
SHAPES = {"kernel": (4, 3, 4), "embedding": (7, 4), "scale": (4,), "bias": (3, 4)}


def random_tree(seed: int, shapes=SHAPES, size: float = 1.0):
    rng = np.random.default_rng(seed)
    return {name: (size * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def compiled(optimizer):
    """The jitted function (params, state, grads, step) -> (params, state)."""

    @jax.jit
    def update(params, state, grads, step):
        updates, state = optimizer.update(grads, state, params, step=step)
        return optax.apply_updates(params, updates), state

    return update


@pytest.mark.parametrize("bias", [True, False])
def test_decay_applies_to_what_nanogpt_calls_matrices(bias):
    """Of two or more dimensions there: (3C,) is one, though kept as (3, C) here."""
    config = GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=2, bias=bias)
    params = abstract_params(config)
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, role in jax.tree_util.tree_leaves_with_path(roles(config, params))
        if role.decay
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


SIZES = [0.01, 100.0, 0.1, 1.0, 1e4, 1e-3, 1.0, 1.0, 0.1, 1.0, 10.0, 1.0]  # of gradients: under and over the clip


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_updates_are_torchs(grad_clip, weight_decay):
    """Over steps with gradients under and far over the clip; after the first, Adam's moments make clipping show."""
    config = OptimizerConfig(
        grad_clip=grad_clip,
        weight_decay=weight_decay,
        learning_rate=0.02,
        min_lr=0.002,
        warmup_iters=3,
        lr_decay_iters=10,
    )
    params = random_tree(0)
    history = [random_tree(1 + i, size=size) for i, size in enumerate(SIZES)]
    optimizer = make_optimizer(config, ROLES)
    update = compiled(optimizer)
    ours, state = params, optimizer.init(params)
    for step, (grads, theirs) in enumerate(zip(history, torch_run(config, params, history), strict=True)):
        ours, state = update(ours, state, grads, step)
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
        np.testing.assert_allclose(state.norm, norm, rtol=1e-5)  # before clipping
        for name in SHAPES:
            np.testing.assert_allclose(ours[name], theirs[name], atol=2e-6, err_msg=f"{name} after step {step}")
    unclipped = list(torch_run(dataclasses.replace(config, grad_clip=0.0), params, history))[-1]
    assert np.allclose(ours["kernel"], unclipped["kernel"], atol=1e-4) == (grad_clip == 0.0)


def test_a_constant_rate_of_1_is_optax_adamw():
    """Bit for bit: groups change no number. One operation at a time: what a compiler fuses it may round otherwise."""
    config = OptimizerConfig(learning_rate=1.0, decay_lr=False, weight_decay=0.3, grad_clip=0.0)
    params, mask = random_tree(0), {name: role.decay for name, role in ROLES.items()}
    ours, theirs = make_optimizer(config, ROLES), optax.adamw(1.0, 0.9, 0.95, weight_decay=0.3, mask=mask)
    state, their_state = ours.init(params), theirs.init(params)
    for step in range(5):
        grads = random_tree(1 + step)
        updates, state = ours.update(grads, state, params, step=jnp.int32(step))
        expected, their_state = theirs.update(grads, their_state, params)
        assert all((updates[name] == expected[name]).all() for name in SHAPES)


def test_an_optimizer_of_ones_own(monkeypatch):
    """Two groups, two rates; the second falls in proportion to the first."""

    def sign(config):
        rule = optax.chain(optax.stateless(lambda grads, _: jax.tree.map(jnp.sign, grads)), optax.scale(-1.0))
        return {
            "large": Group(lambda role: role.group != "vector", rule, config.learning_rate),
            "small": Group(lambda role: role.group == "vector", rule, 10 * config.learning_rate),
        }

    monkeypatch.setitem(OPTIMIZERS, "sign", sign)
    config = OptimizerConfig(optimizer="sign", lr_schedule="linear", learning_rate=1.0, min_lr=0.5, cooldown=1.0)
    config = dataclasses.replace(config, warmup_iters=0, lr_decay_iters=2, grad_clip=0.0)
    optimizer = make_optimizer(config, ROLES)
    params, grads, update = random_tree(0), random_tree(1), jax.jit(optimizer.update)
    for step, rate in enumerate([1.0, 0.75, 0.5]):
        updates, _ = update(grads, optimizer.init(params), params, step=step)
        np.testing.assert_allclose(updates["kernel"], -rate * np.sign(grads["kernel"]))
        np.testing.assert_allclose(updates["bias"], -10 * rate * np.sign(grads["bias"]))


def test_a_role_in_two_groups_or_in_none_is_said(monkeypatch):
    def groups(**takes):
        return lambda config: {name: Group(take, optax.identity(), 1.0) for name, take in takes.items()}

    for takes, found in (
        (dict(all=lambda role: True, vectors=lambda role: role.group == "vector"), "groups all, vectors"),
        (dict(matrices=lambda role: role.group == "matrix"), "groups none"),
    ):
        monkeypatch.setitem(OPTIMIZERS, "own", groups(**takes))
        with pytest.raises(UserError, match=f"optimizer=own: bias is in {found}; put it in one"):
            make_optimizer(OptimizerConfig(optimizer="own"), ROLES)


# --- Muon ---

BF16 = 2.0**-8  # bfloat16's relative rounding error


def polar_express(s):
    """What the quintics make of singular values, in float64: U·S·Vᵀ becomes U·polar_express(S)·Vᵀ."""
    s = s / (1.02 * np.sqrt(np.sum(s**2)) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return s


SHAPES_OF_A_MATRIX = st.sampled_from([(1, 1), (1, 13), (5, 5), (7, 20), (12, 32)])  # few: each compiles


@given(size=SHAPES_OF_A_MATRIX, power=st.integers(-6, 6), seed=st.integers(0, 99))
def test_orthogonalization_is_that_of_the_svd(size, power, seed):
    """In float64 and float32, of any size: the scale of a gradient does not matter."""
    x = np.random.default_rng(seed).normal(size=size) * 10.0**power
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    expected = (u * polar_express(s)) @ vt
    with jax.enable_x64(True):
        np.testing.assert_allclose(orthogonalize(jnp.asarray(x)), expected, atol=1e-8)
    np.testing.assert_allclose(orthogonalize(jnp.asarray(x, jnp.float32)), expected, atol=2e-4)


@pytest.mark.parametrize("dtype, within", [("float32", 1e-3), ("bfloat16", 10 * BF16)])
def test_singular_values_come_near_one(dtype, within):
    """All that are at least 1/1000 of the norm: within 0.142 of 1, as the quintics' paper says."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(64, 64)))[0] for _ in range(2))
    s = np.geomspace(1, 1e-2, 64)
    found = orthogonalize(jnp.asarray((u * s) @ v.T, dtype)).astype(jnp.float32)
    values = np.linalg.svd(np.asarray(found), compute_uv=False)
    assert values.min() > 0.858 - within and values.max() < 1.142 + within


def test_a_vector_is_no_matrix():
    with pytest.raises(UserError, match=r"a parameter of shape \(3,\) has the role matrix; give it vector"):
        orthogonalize_all([jnp.ones(3)])


def test_a_zero_gradient_stays_zero():
    assert (orthogonalize(jnp.zeros((3, 4, 5))) == 0).all()


def test_matrices_go_through_together_as_alone():
    """Square, wide, tall and stacked ones: each as its own SVD says, times √max(1, out/in)."""
    shapes = [(4, 3, 4), (4, 4), (4, 16), (16, 4), (4, 16)]
    kernels = list(random_tree(0, dict(enumerate(shapes))).values())
    for x, y in zip(kernels, orthogonalize_all([jnp.asarray(x) for x in kernels]), strict=True):
        assert y.shape == x.shape
        for i in range(x.size // x.shape[0] // x.shape[-1]):
            matrix, found = (a.reshape(a.shape[0], -1, a.shape[-1])[:, i] for a in (x, y))
            u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
            scale = np.sqrt(max(1, x.shape[-1] / x.shape[0]))
            np.testing.assert_allclose(found, scale * (u * polar_express(s)) @ vt, atol=1e-4)


MUON = OptimizerConfig(
    optimizer="muon",
    learning_rate=0.02,
    min_lr=0.0,
    weight_decay=0.1,
    grad_clip=0.0,
    lr_schedule="linear",
    warmup_iters=2,
    lr_decay_iters=20,
    momentum_warmup_iters=10,
)


def numpy_muon(x, grads_of_steps):
    """One matrix (in, out) after each of Muon's updates under MUON, in float64, the polar factor by the SVD."""
    x, momentum = x.astype(np.float64), np.zeros(x.shape)
    for step, grad in enumerate(grads_of_steps):
        beta = FIRST_MOMENTUM + min(1, (step + 1) / 10) * (0.95 - FIRST_MOMENTUM)
        momentum = beta * momentum + (1 - beta) * grad
        u, s, vt = np.linalg.svd(beta * momentum + (1 - beta) * grad, full_matrices=False)
        update = np.sqrt(max(1, x.shape[1] / x.shape[0])) * (u * polar_express(s)) @ vt
        decayed = np.where(update * x > 0, 0.1 * x, 0)
        rate = 0.02 * min(1, (step + 1) / 3, (20 - step) / 12)
        x = x - rate * (update + decayed)
        yield x


def test_updates_are_those_of_a_plain_muon():
    shapes = {"wide": (5, 12), "tall": (12, 5), "three": (6, 3, 6)}
    params = random_tree(0, shapes)
    history = [random_tree(1 + step, shapes) for step in range(20)]
    optimizer = make_optimizer(MUON, {name: Role(name, "matrix") for name in shapes})
    update = compiled(optimizer)
    split = {"wide": lambda t: t["wide"], "tall": lambda t: t["tall"]}
    split |= {f"three {i}": lambda t, i=i: t["three"][:, i] for i in range(3)}
    expected = {name: list(numpy_muon(of(params), map(of, history))) for name, of in split.items()}
    ours, state = params, optimizer.init(params)
    for step, grads in enumerate(history):
        ours, state = update(ours, state, grads, step)
        for name, of in split.items():
            np.testing.assert_allclose(of(ours), expected[name][step], atol=1e-5, err_msg=f"{name} after step {step}")


TINY = GPTConfig(block_size=4, vocab_size=128, n_layer=2, n_head=2, n_embd=16)


@functools.cache
def tiny_params():
    return fresh_params(TINY, jax.random.key(0))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_any_mesh_gives_the_update_of_one_device(sizes):
    """Parameters, gradients and state as training places them; of one shape there are only 4 matrices."""
    params, by_role = tiny_params(), roles(TINY, tiny_params())
    mesh = make_mesh(*sizes)
    alone, spread = make_optimizer(MUON, by_role), make_optimizer(MUON, by_role, mesh)
    state = alone.init(params)
    specs = param_specs(params, by_role, mesh), state_specs(state, params, by_role, mesh)
    param_places, state_places = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)

    @functools.partial(jax.jit, out_shardings=(param_places, state_places))
    def spread_update(params, state, grads, step):
        updates, state = spread.update(grads, state, params, step=step)
        return optax.apply_updates(params, updates), state

    expected, found = (params, state), (jax.device_put(params, param_places), jax.device_put(state, state_places))
    for step in range(3):
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(step), len(leaves))
        grads = structure.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
        expected = compiled(alone)(*expected, grads, step)
        found = spread_update(*found, jax.device_put(grads, param_places), step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_devices_share_the_work():
    """Each multiplies its share of the matrices: 8 of (16, 16) over 8 devices, 4 of (16, 64) likewise with padding.

    Where all have all parameters, the results alone are sent.
    """
    by_role, step = roles(TINY, tiny_params()), jnp.int32(0)

    def flops(devices: int) -> float:
        mesh = make_mesh(devices, devices=jax.devices()[:devices])
        optimizer = make_optimizer(MUON, by_role, mesh)
        grads = jax.tree.map(jnp.ones_like, tiny_params())
        places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        args = jax.device_put((grads, optimizer.init(grads), grads), places)
        program: Any = jax.jit(lambda g, s, p: optimizer.update(g, s, p, step=step)).lower(*args).compile()
        assert not re.search("all-to-all|collective-permute|all-reduce", program.as_text())
        return program.cost_analysis()["flops"]

    assert flops(8) < 0.3 * flops(1)  # elementwise work is not shared where parameters are replicated
