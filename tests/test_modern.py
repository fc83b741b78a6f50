"""The modern model against a second one, written here in numpy and float64; what it must not see; cache, meshes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import (
    extended,
    float64,
    fresh_params,
    influence,
    logits_and_loss,
    logits_of,
    loss_and_grads,
    loss_of,
    random_params,
    random_tokens,
)

from jaxgpt import UserError
from jaxgpt.models import abstract_params, bind, count_params, find_model, roles
from jaxgpt.models.modern import QK_SCALE, ModernConfig

SMALL = ModernConfig(block_size=12, vocab_size=27, n_layer=3, n_head=2, n_embd=16, value_embeds=1)
replace = dataclasses.replace


# --- the reference ---


def numpy_logits(config: ModernConfig, params, tokens):
    (b, t), head, pairs = tokens.shape, config.head_size, config.head_size // 2

    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def turn(x):  # as complex numbers: feature i and i + H/2 are one, times e^(-i·position·speed)
        turning = round(config.rope * pairs)
        speed = np.array([1024.0 ** -(i / max(1, turning - 1)) for i in range(turning)] + [0.0] * (pairs - turning))
        z = (x[..., :pairs] + 1j * x[..., pairs:]) * np.exp(-1j * np.arange(t)[:, None, None] * speed)
        return np.concatenate([z.real, z.imag], -1)

    x = norm(params["wte"]["embedding"][tokens])
    for i in range(config.n_layer):
        p = params["h"][i]
        q, k, v = (norm(x) @ p["attn"]["c_attn"]["kernel"][:, j] for j in range(3))
        n = config.value_embeds
        if i < n or i >= config.n_layer - n:
            table = params["value_embeds"][i if i < n else i - (config.n_layer - n)]["embedding"]
            own, embedded = p["attn"]["value_mix"]
            v = own * v + embedded * table[tokens]
        q, k, v = (a.reshape(b, t, config.n_head, head) for a in (q, k, v))
        scale = 1 / math.sqrt(head)
        if config.qk_norm:
            q, k, scale = norm(q), norm(k), QK_SCALE
        q, k = turn(q), turn(k)
        scores = scale * np.einsum("btnh,bsnh->bnts", q, k)
        scores[..., np.triu(np.ones((t, t), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        y = np.einsum("bnts,bsnh->btnh", weights, v).reshape(b, t, -1)
        x = x + y @ p["attn"]["c_proj"]["kernel"]
        y = norm(x) @ p["mlp"]["c_fc"]["kernel"]
        gelu = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        y = np.maximum(y, 0) ** 2 if config.activation == "relu2" else gelu
        x = x + y @ p["mlp"]["c_proj"]["kernel"]
    logits = norm(x) @ params["wte" if config.tied else "lm_head"]["embedding"][: config.vocab_size].T
    return config.softcap * np.tanh(logits / config.softcap) if config.softcap else logits


def numpy_loss(config, params, tokens, targets):
    logits = numpy_logits(config, params, tokens)
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[..., None], -1).mean()


# --- the same function ---

OPTIONS = [
    {},
    {"qk_norm": False},
    {"rope": 0.0},
    {"rope": 1.0},
    {"activation": "gelu"},
    {"zero_init": False},
    {"value_embeds": 0},
    {"tied": True},
    {"softcap": 0.0},
    {"softcap": 2.0, "n_layer": 5, "value_embeds": 2, "n_head": 1, "n_embd": 12, "vocab_size": 131},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_and_loss_are_those_of_the_reference(options):
    config = replace(SMALL, **options)
    params, (tokens, targets) = random_params(config), random_tokens(config, 3, 12)
    logits, loss = logits_and_loss(config, params, tokens, targets)
    assert logits.shape == (3, 12, config.vocab_size) and logits.dtype == loss.dtype == jnp.float32
    tokens, targets = np.asarray(tokens), np.asarray(targets)
    np.testing.assert_allclose(logits, numpy_logits(config, float64(params), tokens), atol=1e-4, rtol=0)
    np.testing.assert_allclose(loss, numpy_loss(config, float64(params), tokens, targets), atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "softcap": 0.0, "tied": True}], ids=str)
def test_every_gradient_is_that_of_the_reference(options):
    """Each parameter along five random directions, against central differences of the float64 reference."""
    config = replace(SMALL, block_size=5, vocab_size=7, n_layer=2, n_embd=8, **options)
    params, (tokens, targets) = random_params(config), random_tokens(config, 2, 5)
    _, grads = loss_and_grads(config, params, tokens, targets)
    exact, tokens, targets, step = float64(params), np.asarray(tokens), np.asarray(targets), 1e-5
    rng = np.random.default_rng(1)
    for (path, leaf), grad in zip(jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(grads), strict=True):
        for _ in range(5):
            direction, start = rng.normal(size=leaf.shape), leaf.copy()
            leaf[...] = start + step * direction
            above = numpy_loss(config, exact, tokens, targets)
            leaf[...] = start - step * direction
            below = numpy_loss(config, exact, tokens, targets)
            leaf[...] = start
            found = np.sum(np.asarray(grad, np.float64) * direction)
            want = (above - below) / (2 * step)
            np.testing.assert_allclose(found, want, atol=1e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def test_kernels_change_nothing():
    config = replace(SMALL, n_embd=64, block_size=8)
    params, (tokens, targets) = random_params(config, std=0.1), random_tokens(config, 2, 8)
    plain = loss_and_grads(config, params, tokens, targets)
    fast = loss_and_grads(replace(config, kernels=True), params, tokens, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, fast)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_recomputing_blocks_changes_nothing(rate):
    config = replace(SMALL, dropout=rate)
    params, (tokens, targets) = random_params(config), random_tokens(config, 2, 12)
    seed = jnp.uint32(1) if rate else None
    whole = loss_and_grads(config, params, tokens, targets, seed)
    again = loss_and_grads(replace(config, remat="block"), params, tokens, targets, seed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, again)


def test_dropout_needs_a_seed_and_draws_by_it():
    config = replace(SMALL, dropout=0.3)
    params, (tokens, targets) = random_params(config), random_tokens(config, 2, 12)
    losses = [loss_of(config, params, tokens, targets, seed) for seed in (None, *map(jnp.uint32, (1, 1, 2)))]
    assert losses[0] == loss_of(SMALL, params, tokens, targets)
    assert losses[1] == losses[2] and len({float(x) for x in losses}) == 3


def test_a_sampled_softmax_is_for_training_alone():
    config = replace(SMALL, vocab_size=1000, sampled_softmax=128)
    params, (tokens, targets) = random_params(config, std=0.1), random_tokens(config, 2, 12)
    exact = loss_of(replace(config, sampled_softmax=0), params, tokens, targets)
    assert config.stochastic and loss_of(config, params, tokens, targets) == exact
    drawn = [float(loss_of(config, params, tokens, targets, jnp.uint32(seed))) for seed in range(3)]
    assert len(set(drawn)) == 3 and np.allclose(drawn, exact, atol=0.1)


# --- its beginning ---


def test_it_begins_by_guessing():
    """With zero projections and a zero head every token is as likely, and the gradient of the head is the only one."""
    params, (tokens, targets) = fresh_params(SMALL, jax.random.key(0)), random_tokens(SMALL, 2, 12)
    loss, grads = loss_and_grads(SMALL, params, tokens, targets)
    assert loss == pytest.approx(math.log(27), abs=1e-5)
    moved = {path[0].key for path, x in jax.tree_util.tree_leaves_with_path(grads) if jnp.any(x != 0)}
    assert moved == {"lm_head"}
    assert jnp.std(params["wte"]["embedding"]) == pytest.approx(1, abs=0.1)
    assert jnp.std(params["h"][0]["attn"]["c_attn"]["kernel"]) == pytest.approx(0.5 / 4, rel=0.1)


def test_the_124m_class():
    """85M in the matrices of the blocks, as GPT-2's; the head and each table of the vocabulary are 38.6M more."""
    config = ModernConfig(n_head=6)
    params = abstract_params(config)
    blocks, table = 12 * 12 * 768**2, 50304 * 768
    assert count_params(config, params, all=True) == blocks + 5 * table + 6 * 2
    assert count_params(config, params) == blocks + table + 6 * 2  # multiplied with
    assert config.flops_per_token(params) == 6 * (blocks + table + 6 * 2) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_has_one_role(options):
    config = replace(SMALL, **options)
    groups = {role.group for role in jax.tree.leaves(roles(config, abstract_params(config)))}
    assert groups >= {"matrix", "embedding"} and ("head" in groups) == (not config.tied)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"bias": True}, "bias=True: model=modern has no biases"),
        ({"rope": 0.01}, "rope=0.01 of .* pairs of features is none; set 0, or more"),
        ({"rope": 1.5}, "rope=1.5 must be between 0 and 1"),
        ({"n_head": 8}, "n_embd / n_head = 2 features of a head must be a multiple of 4"),
        ({"sampled_softmax": 100}, "sampled_softmax=100 must be a multiple of 128, or 0"),
        ({"value_embeds": 2}, "value_embeds=2 must be at most half of n_layer=3"),
    ],
)
def test_impossible_shapes_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **wrong)


# --- what it must not see ---


def test_no_gradient_flows_from_the_future():
    config = replace(SMALL, value_embeds=0)
    params, (tokens, _) = random_params(config), random_tokens(config, 1, 12)

    def logits(rows):
        table = jnp.concatenate([rows, jnp.zeros((config.padded_vocab_size - len(rows), 16))])
        return bind(config, {**params, "wte": {"embedding": table}})(jnp.arange(len(rows))[None])[0][0]

    found = influence(logits, params["wte"]["embedding"][tokens[0]])
    past = np.tril(np.ones((12, 12), bool))
    assert (found[past] > 0).all() and (found[~past] == 0).all()


def test_packed_documents_are_as_if_alone():
    """Rotations depend on distances alone, so a document's logits do not depend on where it lies."""
    config = replace(SMALL, doc_mask=0)
    params = random_params(config)
    first, second = jnp.array([[3, 4, 5, 6, 0]]), jnp.array([[7, 8, 9, 10, 11, 12]])
    packed = logits_of(config, params, jnp.concatenate([first, second], axis=1))
    np.testing.assert_allclose(packed[:, :5], logits_of(config, params, first), atol=1e-4)
    np.testing.assert_allclose(packed[:, 5:], logits_of(config, params, second), atol=1e-4)


@pytest.mark.parametrize("doc_mask", [-1, 0])
@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "rope": 1.0, "value_embeds": 0}], ids=str)
def test_the_cache_changes_nothing(doc_mask, options):
    """A prompt at once, then token by token."""
    config = replace(SMALL, doc_mask=doc_mask, **options)
    params, (tokens, _) = random_params(config), random_tokens(config, 2, 12)
    whole = logits_of(config, params, tokens)

    cache, parts = config.empty_cache(2, 12), []
    for start, end in [(0, 5), *((i, i + 1) for i in range(5, 12))]:
        logits, cache = extended(config, params, tokens[:, start:end], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-4)


def test_it_is_found_by_its_name():
    assert find_model("modern").config is ModernConfig
