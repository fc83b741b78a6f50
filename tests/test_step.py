"""The compiled training step: accumulation, dropped updates, loss scaling, dropout, and what a call leaves behind."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import loss_and_grads, loss_of
from jax.sharding import AxisType

import jaxgpt.step
from jaxgpt import UserError
from jaxgpt.config import resolve
from jaxgpt.models import abstract_params
from jaxgpt.sharding import AXES, make_mesh
from jaxgpt.step import (
    LossScale,
    abstract_state,
    complete_state,
    create_state,
    loss_fn,
    make_eval_step,
    make_train_step,
    random_key,
    rounded_matrices,
)

VOCAB = 27


class Setup:
    """A config with its compiled step, which is traced at its first call."""

    def __init__(self, config, mesh):
        self.config, self.mesh = config, mesh
        self.parts = resolve(config, mesh, VOCAB)
        self.model = self.parts.model
        self.step = make_train_step(self.parts, mesh)

    @functools.cached_property
    def initial(self):
        return create_state(self.parts, self.mesh)

    def state(self):
        """A fresh state of its own, for a step to use up."""
        return jax.tree.map(jnp.copy, self.initial)

    def run(self, *calls):
        """The state after calls with these tokens, from a fresh state, and the metrics of all steps."""
        state, rows = self.state(), []
        for tokens in calls:
            state, metrics = self.step(state, tokens)
            rows.append(jax.device_get(metrics))
        return state, {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture(scope="module")
def setup(tiny_config, mesh):
    """setup(**values): a Setup on eight devices, made once for each set of values."""
    return functools.cache(lambda **values: Setup(tiny_config(**values), mesh))


def random_tokens(*shape: int, seed: int = 0, below: int = VOCAB):
    return np.random.default_rng(seed).integers(below, size=shape).astype(np.uint16)


def close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), jax.device_get(a), jax.device_get(b))


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def adam_count(state) -> int:
    """How many updates Adam has made."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    (count,) = {int(x) for path, x in leaves if jax.tree_util.keystr(path).endswith(".count")}
    return count


# --- accumulation ---


def test_micro_batches_are_one_batch(setup):
    """Three updates, each of 4 micro-batches of 8 rows, or of their 32 rows at once."""
    tokens = [random_tokens(1, 4, 8, 17, seed=i) for i in range(3)]
    several, m = setup().run(*tokens)
    one, n = setup().run(*[t.reshape(1, 1, 32, 17) for t in tokens])
    close(several.params, one.params, atol=1e-4)  # Adam magnifies rounding where gradients are near 0
    close(several.opt_state, one.opt_state, atol=1e-5)
    close(m, n, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_multisteps_is_the_sum(setup, dropout):
    """optax.MultiSteps, which this module otherwise does without, makes the same updates, dropout's masks included."""
    tokens = [random_tokens(1, 4, 8, 17, seed=i) for i in range(3)]
    by_sum, m = setup(dropout=dropout).run(*tokens)
    by_multisteps, n = setup(accumulation="multisteps", dropout=dropout).run(*tokens)
    close(by_sum, by_multisteps, atol=1e-5)
    close(m, n, rtol=1e-5)


def test_several_steps_in_a_call_are_as_many_calls(setup):
    """The same batches, rates, masks and counts, however a run is cut into calls."""
    tokens = random_tokens(4, 2, 8, 17)
    together, m = setup(dropout=0.2).run(tokens)
    apart, n = setup(dropout=0.2).run(*tokens[:, None])
    close(together, apart, atol=1e-5)
    close(m, n, rtol=1e-5)
    assert int(together.step) == adam_count(together) == 4


def test_the_update_is_the_optimizers_for_the_mean_gradient(setup):
    """The step against its parts, each tested alone: gradient of the mean loss of all rows, one optimizer update."""
    s, tokens = setup(), random_tokens(1, 2, 8, 17)
    state, metrics = s.run(tokens)
    params, rows = s.initial.params, tokens.reshape(16, 17).astype(np.int32)
    loss, grads = loss_and_grads(s.model, params, rows[:, :-1], rows[:, 1:])
    norm = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["loss"], [loss], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], [norm], rtol=1e-4)
    np.testing.assert_allclose(metrics["lr"], [1e-2 / 3], rtol=1e-6)
    # Adam's first update is the gradient's sign, if the gradient is well above its epsilon
    decayed = params["wte"]["embedding"] * (1 - 1e-2 / 3 * s.config.weight_decay)
    grad = grads["wte"]["embedding"]
    want = np.where(jnp.abs(grad) > 1e-5, decayed - 1e-2 / 3 * jnp.sign(grad), state.params["wte"]["embedding"])
    np.testing.assert_allclose(state.params["wte"]["embedding"], want, atol=1e-5)


# --- dropped updates ---

POISON = {25: np.nan, 26: np.inf}  # by the first token of a row


@jax.custom_vjp
def poisoned(x, factor):
    """x, its gradient times `factor`."""
    return x


poisoned.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor)))


@pytest.fixture(scope="module")
def poisonable(tiny_config, mesh):
    """A Setup for a dtype; one element of its gradient is not finite where a row starts with a token of POISON."""

    @functools.cache
    def make(dtype):
        def loss(model, params, tokens, seed=None):
            factor = jnp.float32(1.0)
            for token, value in POISON.items():
                factor = jnp.where((tokens[:, 0] == token).any(), value, factor)
            table = params["wpe"]["embedding"]
            table = table.at[0, 0].set(poisoned(table[0, 0], factor))
            return loss_fn(model, {**params, "wpe": {"embedding": table}}, tokens, seed)

        s = Setup(tiny_config(dtype=dtype), mesh)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jaxgpt.step, "loss_fn", loss)
            s.step = s.step.lower(s.state(), random_tokens(1, 2, 8, 17)).compile()
        return s

    return make


def good_and_bad(*poison):
    """For each None a good batch, for each token of POISON one with a bad gradient in one row of one micro-step."""
    calls = [random_tokens(1, 2, 8, 17, seed=i, below=25) for i in range(len(poison))]
    for tokens, token in zip(calls, poison, strict=True):
        if token is not None:
            tokens[0, 1, 5, 0] = token
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_bad_gradient_changes_nothing(poisonable, dtype):
    """One NaN or infinity in one row on one device: parameters and optimizer state keep every bit; it is counted."""
    state, bad_steps = poisonable(dtype).state(), []
    for i, tokens in enumerate(good_and_bad(None, 25, 26, None, 26, None)):
        before, scale = bits((state.params, state.opt_state.groups)), float(state.loss_scale.scale)
        state, metrics = poisonable(dtype).step(state, tokens)
        bad = i in (1, 2, 4)
        assert (bits((state.params, state.opt_state.groups)) == before) == bad
        assert np.isfinite(metrics["loss"]).all() and np.isfinite(metrics["grad_norm"]).all() == (not bad)
        assert float(state.loss_scale.scale) == (scale / 2 if bad and dtype == "float16" else scale)
        assert int(state.step) == i + 1
        bad_steps.append(int(state.bad_steps))
        assert metrics["bad_steps"].tolist() == bad_steps[-1:]
    assert bad_steps == [0, 1, 2, 0, 1, 0]
    assert adam_count(state) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_loss_changes_nothing(poisonable, dtype, value):
    state = poisonable(dtype).state()
    spoilt = jax.tree.map(jnp.copy, state.params)
    spoilt["h"][0]["mlp"]["c_fc"]["kernel"] = spoilt["h"][0]["mlp"]["c_fc"]["kernel"].at[3, 5].set(value)
    spoilt = jax.device_put(spoilt, jax.tree.map(lambda x: x.sharding, state.params))
    s = poisonable(dtype)
    state = complete_state(s.parts, state._replace(params=spoilt, rounded=None), abstract_state(s.parts, s.mesh))
    before = bits((state.params, state.opt_state))
    state, metrics = poisonable(dtype).step(state, *good_and_bad(None))
    assert not np.isfinite(metrics["loss"]).any()
    assert bits((state.params, state.opt_state)) == before
    assert (int(state.step), int(state.bad_steps), adam_count(state)) == (1, 1, 0)


def test_float16_finds_a_scale_and_unscales(poisonable):
    """From a scale that overflows, halving ends at one that does not, with the gradient of float32."""
    (tokens,) = good_and_bad(None)
    _, wanted = poisonable("float32").step(poisonable("float32").state(), tokens)
    state = poisonable("float16").state()
    assert float(state.loss_scale.scale) == 2.0**15
    scale = jax.device_put(np.float32(2.0**28), state.loss_scale.scale.sharding)
    state = state._replace(loss_scale=state.loss_scale._replace(scale=scale))
    for dropped in range(28):
        state, metrics = poisonable("float16").step(state, tokens)
        if int(state.bad_steps) == 0:
            break
        assert int(state.bad_steps) == dropped + 1 and float(state.loss_scale.scale) == 2.0 ** (27 - dropped)
    assert 1 <= dropped < 20
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics["grad_norm"], wanted["grad_norm"], rtol=1e-2)


def test_loss_scale_doubles_after_2000_good_steps():
    """Played through for a run in which every gradient is finite at scales up to 2^17."""
    step = jax.jit(lambda s, finite: s.next(finite, "float16"))
    scale, seen = LossScale.create(), []
    for i in range(8000):
        seen.append(float(scale.scale))
        scale = step(scale, jnp.asarray(seen[-1] <= 2.0**17))
        assert seen[-1] == 2.0**15 * 2 ** min(i // 2000, 2) or i == 6000
    assert seen[6000:6002] == [2.0**18, 2.0**17]
    smallest = LossScale(jnp.float32(1.0), jnp.int32(0))
    assert float(step(smallest, jnp.asarray(False)).scale) == 1.0
    assert smallest.next(jnp.asarray(False), "bfloat16") is smallest


# --- state ---


def test_the_state_is_donated(setup):
    state, tokens = setup().state(), random_tokens(1, 4, 8, 17)
    after, _ = setup().step(state, tokens)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(after))


def test_the_state_is_made_as_described(setup):
    s = setup()
    state, abstract = s.state(), abstract_state(s.parts, s.mesh)

    def described(x):
        return x.shape, x.dtype, x.sharding

    assert jax.tree.map(described, state) == jax.tree.map(described, abstract)
    assert all(x.dtype in ("float32", "int32") for x in jax.tree.leaves(state))
    assert bits(s.state()) == bits(state)
    after, _ = s.step(s.state(), random_tokens(1, 4, 8, 17))
    assert jax.tree.map(described, after) == jax.tree.map(described, abstract)


def test_the_state_around_given_parameters(setup):
    s = setup()
    params = jax.tree.map(lambda x: 2 * x, s.state().params)
    wanted = bits(params)
    state = create_state(s.parts, s.mesh, params)
    assert bits(state.params) == wanted
    assert bits(state.opt_state) == bits(s.state().opt_state) and int(state.step) == 0


def test_matrices_are_rounded_as_they_are_updated(tiny_config, monkeypatch):
    """To the bit as where each step rounds them itself; and a restored state rounds as one that was carried."""
    config = tiny_config(dtype="bfloat16", mesh_fsdp=2, average_decay=0.9, bias=True, spike_threshold=3.0)
    mesh, tokens = make_mesh(1, 2, 1, devices=jax.devices()[:2]), random_tokens(3, 2, 2, 17)
    s = Setup(config, mesh)
    state, _ = s.run(tokens)
    rounded = jax.tree.leaves(state.rounded)
    assert len(rounded) == 4 * config.n_layer and {x.dtype for x in rounded} == {jnp.dtype("bfloat16")}
    assert bits(rounded_matrices(s.parts, state.params)) == bits(rounded)
    restored = state.saved._replace(average=None)
    assert restored.rounded is None
    restored = complete_state(s.parts, restored, abstract_state(s.parts, mesh))
    assert bits(restored.rounded) == bits(rounded) and bits(restored.average) == bits(state.params)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)

    abstract_state.cache_clear()
    monkeypatch.setattr(jaxgpt.step, "rounded_matrices", lambda parts, params: None)
    plain, _ = Setup(config, mesh).run(tokens)
    abstract_state.cache_clear()
    assert plain.rounded is None and bits(plain) == bits(state.saved)


def test_nothing_is_rounded_in_float32_or_fp8(setup):
    parts = setup().parts
    params = abstract_params(parts.model)
    assert rounded_matrices(parts, params) is None
    parts = parts._replace(
        model=dataclasses.replace(parts.model, dtype="bfloat16"),
        devices=dataclasses.replace(parts.devices, matmul_dtype="fp8"),
    )
    assert rounded_matrices(parts, params) is None


def test_seeds_and_purposes_draw_different_numbers(tiny_config, mesh):
    keys = [random_key(seed, purpose) for seed in (0, 1, 2**32 - 1) for purpose in ("init", "dropout", "sample")]
    assert len({bits(jax.random.key_data(key))[0] for key in keys}) == 9


# --- dropout and evaluation ---


def test_dropout_draws_anew_for_each_step_and_micro_step_and_device(setup, tiny_config):
    """With a rate of 0 and the same row everywhere, losses differ only through the masks."""
    frozen = dict(learning_rate=0.0, min_lr=0.0)
    row = random_tokens(17)
    same = np.broadcast_to(row, (6, 1, 8, 17))
    _, steady = setup(**frozen).run(same)
    np.testing.assert_allclose(steady["loss"], steady["loss"][0], rtol=1e-6)
    with_dropout = setup(**frozen, dropout=0.3)
    _, first = with_dropout.run(same)
    _, again = with_dropout.run(same)
    assert len(set(first["loss"].tolist())) == 6
    assert first["loss"].tolist() == again["loss"].tolist()
    # twice the same micro-batch, one mask: the mean would be the loss of one
    _, twice = with_dropout.run(np.broadcast_to(row, (1, 2, 8, 17)))
    assert abs(twice["loss"][0] - first["loss"][0]) > 1e-4
    # the same row on eight devices, one mask: the mean would be the loss on one
    alone = jax.make_mesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    _, one = Setup(tiny_config(dropout=0.3, **frozen), alone).run(np.broadcast_to(row, (1, 1, 1, 17)))
    assert abs(one["loss"][0] - first["loss"][0]) > 1e-4


def test_evaluation_is_the_loss_without_dropout(setup):
    s = setup(dropout=0.3)
    params, tokens = s.state().params, random_tokens(1, 3, 8, 17)
    losses = make_eval_step(s.model, s.mesh)(params, tokens)
    for i in range(3):
        rows = tokens[0, i].astype(np.int32)
        want = loss_of(setup().model, params, rows[:, :-1], rows[:, 1:])
        np.testing.assert_allclose(losses[i], want, rtol=1e-5)


# --- what the machine decides ---


def test_auto_on_a_cpu(tiny_config, mesh):
    chosen = resolve(tiny_config(dtype="auto"), mesh, VOCAB).model
    assert (chosen.dtype, chosen.attention, chosen.kernels, chosen.doc_mask) == ("float32", "xla", False, -1)
    assert resolve(tiny_config(doc_mask=True), mesh, VOCAB, eot=26).model.doc_mask == 26
    assert resolve(tiny_config(kernels="on"), mesh, VOCAB).model.kernels


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(doc_mask=True), "doc_mask needs an end-of-text token and this corpus has none"),
        (dict(n_embd=15), "n_embd=15 is not divisible by n_head=2"),
        (dict(attention="cudnn"), "attention=cudnn needs"),
    ],
)
def test_what_cannot_run_here_is_said(tiny_config, mesh, values, message):
    with pytest.raises(UserError, match=message):
        resolve(tiny_config(**values), mesh, VOCAB)
