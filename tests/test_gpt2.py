"""The model against a second GPT-2, written here in numpy and float64; what it must not see; dropout; precision."""

import dataclasses
import functools
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
from hypothesis import given
from hypothesis import strategies as st

import jaxgpt.models.gpt2
import jaxgpt.ops.attention
from jaxgpt import UserError
from jaxgpt.models import abstract_params, bind, count_params
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.ops.dropout import dropout, keep_mask

SMALL = GPTConfig(block_size=12, vocab_size=27, n_layer=2, n_head=2, n_embd=16, bias=True)
replace = dataclasses.replace


# --- the reference: GPT-2 as its paper and its published weights define it ---


def numpy_hidden(config: GPTConfig, params, tokens, keep=lambda x: x):
    """Final hidden states (B, T, C); `keep` is called on what dropout applies to, in the order of computation."""
    t, head = tokens.shape[1], config.n_embd // config.n_head

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p["scale"] + p.get("bias", 0.0)

    x = keep(params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][:t])
    for i in range(config.n_layer):
        p = params["h"][i]
        y = norm(x, p["ln_1"])
        q, k, v = (
            y @ p["attn"]["c_attn"]["kernel"][:, j] + p["attn"]["c_attn"].get("bias", [0, 0, 0])[j] for j in range(3)
        )
        q, k, v = (a.reshape(*tokens.shape, config.n_head, head).transpose(0, 2, 1, 3) for a in (q, k, v))
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(head)
        scores[..., np.triu(np.ones((t, t), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = keep(weights / weights.sum(-1, keepdims=True))
        y = (weights @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + keep(y @ p["attn"]["c_proj"]["kernel"] + p["attn"]["c_proj"].get("bias", 0.0))
        y = norm(x, p["ln_2"]) @ p["mlp"]["c_fc"]["kernel"] + p["mlp"]["c_fc"].get("bias", 0.0)
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + keep(y @ p["mlp"]["c_proj"]["kernel"] + p["mlp"]["c_proj"].get("bias", 0.0))
    return norm(x, params["ln_f"])


def numpy_logits(config, params, tokens, keep=lambda x: x):
    return numpy_hidden(config, params, tokens, keep) @ params["wte"]["embedding"][: config.vocab_size].T


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def numpy_loss(config, params, tokens, targets, keep=lambda x: x):
    log_p = log_softmax(numpy_logits(config, params, tokens, keep))
    return -np.take_along_axis(log_p, targets[..., None], -1).mean()


# --- the same function ---

SHAPES = [
    (SMALL, 3, 12),
    (replace(SMALL, bias=False), 3, 12),
    (GPTConfig(block_size=7, vocab_size=131, n_layer=3, n_head=3, n_embd=21, bias=True), 2, 5),
    (GPTConfig(block_size=9, vocab_size=128, n_layer=1, n_head=1, n_embd=8), 1, 9),
]


@pytest.mark.parametrize("config, rows, time", SHAPES)
def test_logits_and_loss_are_those_of_the_reference(config, rows, time):
    params, (tokens, targets) = random_params(config), random_tokens(config, rows, time)
    logits, loss = logits_and_loss(config, params, tokens, targets)
    assert logits.shape == (rows, time, config.vocab_size) and logits.dtype == loss.dtype == jnp.float32
    tokens, targets = np.asarray(tokens), np.asarray(targets)
    np.testing.assert_allclose(logits, numpy_logits(config, float64(params), tokens), atol=1e-4, rtol=0)
    np.testing.assert_allclose(loss, numpy_loss(config, float64(params), tokens, targets), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_every_gradient_is_that_of_the_reference(bias):
    """Every element of every parameter against central differences of the float64 reference, exact to 1e-9."""
    config = GPTConfig(block_size=5, vocab_size=7, n_layer=2, n_head=2, n_embd=6, bias=bias)
    params, (tokens, targets) = random_params(config), random_tokens(config, 2, 5)
    _, grads = loss_and_grads(config, params, tokens, targets)
    exact, tokens, targets, step = float64(params), np.asarray(tokens), np.asarray(targets), 1e-5
    checked = 0
    for (path, leaf), grad in zip(jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(grads), strict=True):
        want = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            if path[0].key == "wte" and index[0] >= config.vocab_size:
                continue  # padding: the gradient is exactly zero
            value, losses = leaf[index], []
            for leaf[index] in (value + step, value - step):
                losses.append(numpy_loss(config, exact, tokens, targets))
            leaf[index] = value
            want[index] = (losses[0] - losses[1]) / (2 * step)
            checked += 1
        np.testing.assert_allclose(grad, want, atol=2e-6, rtol=1e-4, err_msg=jax.tree_util.keystr(path))
    assert checked == count_params(config, params, all=True) - (128 - 7) * 6


def test_fused_kernels_change_nothing():
    """The interpreted kernels inside the whole model; tests/test_ops.py has each against its twin."""
    params, (tokens, targets) = random_params(SMALL), random_tokens(SMALL, 2, 12)
    plain = loss_and_grads(SMALL, params, tokens, targets)
    kernels = loss_and_grads(replace(SMALL, kernels=True), params, tokens, targets)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), kernels, plain)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_recomputing_blocks_changes_nothing(rate):
    config = replace(SMALL, dropout=rate)
    params, (tokens, targets) = random_params(config), random_tokens(config, 2, 12)
    stored, again = (
        loss_and_grads(replace(config, remat=remat), params, tokens, targets, jnp.uint32(5))
        for remat in ("none", "block")
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5), stored, again)


@pytest.mark.parametrize("dtype, within", [("bfloat16", 2e-2), ("float16", 5e-3)])
def test_half_precision_is_close(dtype, within):
    """At the scale of a fresh model; and a halved mantissa costs a gradient its length and direction but little."""
    params, (tokens, targets) = fresh_params(SMALL, jax.random.key(0)), random_tokens(SMALL, 8, 12)
    loss, grads = loss_and_grads(SMALL, params, tokens, targets)
    half_loss, half_grads = loss_and_grads(replace(SMALL, dtype=dtype), params, tokens, targets)
    np.testing.assert_allclose(half_loss, loss, rtol=within / 10)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(half_grads))
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(half_grads), strict=True):
        if "c_attn" in str(path) and "bias" in str(path):
            want, got = want[::2], got[::2]  # a bias of the keys shifts all scores alike: its true gradient is zero
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < within, f"{jax.tree_util.keystr(path)}: {error}"


# --- a fresh model ---


def test_initial_loss_is_that_of_guessing():
    """Within 0.1 nats of ln(vocab), and no closer than the spread of initial logits, C · 0.02² / 2, lets it be."""
    for config in (SMALL, GPTConfig(block_size=32, vocab_size=1000, n_layer=2, n_head=4, n_embd=128)):
        tokens, targets = random_tokens(config, 16, config.block_size)
        loss = loss_of(config, fresh_params(config, jax.random.key(1)), tokens, targets)
        assert abs(loss - math.log(config.vocab_size)) < 0.1
        assert loss - math.log(config.vocab_size) == pytest.approx(config.n_embd * 0.02**2 / 2, abs=0.02)


def test_initial_statistics():
    config = GPTConfig(block_size=64, vocab_size=500, n_layer=2, n_head=4, n_embd=64, bias=True)
    for path, x in jax.tree_util.tree_leaves_with_path(fresh_params(config, jax.random.key(2))):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name == "wte.embedding":
            assert not x[500:].any()
            x = x[:500]
        if name.endswith("bias") or name.endswith("scale"):
            assert (x == name.endswith("scale")).all()
            continue
        std = 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02
        # five standard errors of the mean and of the standard deviation of a normal sample
        assert abs(x.mean()) < 5 * std / math.sqrt(x.size), name
        assert abs(x.std() - std) < 5 * std / math.sqrt(2 * x.size), name


def test_parameter_count_is_nanogpts():
    """nanoGPT counts 123.59M for its default GPT-2 of 50,304 ids, 124.44M of GPT-2 being 50,257 ids and biases."""
    assert count_params(GPTConfig(), abstract_params(GPTConfig())) == 123_587_328
    config = GPTConfig(bias=True)
    padding = (50304 - 50257) * 768
    assert count_params(config, abstract_params(config), all=True) - padding == 124_439_808


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(n_embd=10, n_head=4), r"n_embd=10 is not divisible by n_head=4; choose a multiple, such as n_embd=8"),
        (dict(n_layer=0), "n_layer=0 must be at least 1"),
        (dict(dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
    ],
)
def test_impossible_shapes_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**wrong)


@given(st.integers(1, 100), st.integers(1, 64))
def test_the_suggested_width_is_possible(n_embd, n_head):
    try:
        GPTConfig(n_embd=n_embd, n_head=n_head)
    except UserError as error:
        GPTConfig(n_embd=int(str(error).rpartition("n_embd=")[2]), n_head=n_head)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="13 tokens exceed block_size=12"):
        logits_of(SMALL, random_params(SMALL), jnp.zeros((1, 13), jnp.int32))


# --- what a token does not see ---


def influences(config, tokens):
    """(T, T): how strongly the logits of a row (1, T) at each position depend on each position's embedding."""
    params = random_params(config)

    def logits(wpe):
        return bind(config, {**params, "wpe": {"embedding": wpe}})(tokens)[0][0]

    return influence(logits, params["wpe"]["embedding"])[:, : tokens.shape[1]]


def test_no_gradient_flows_from_the_future():
    """Exactly zero from every later position, and from no earlier one: the whole mask, at once and for any input."""
    tokens, _ = random_tokens(SMALL, 1, 12)
    sees = influences(SMALL, tokens) > 0
    assert np.array_equal(sees, np.tril(np.ones((12, 12), bool)))


def documents(tokens, eot: int):
    """The slices of a row's documents; the end-of-text token is the last of its own."""
    ends = [i + 1 for i, token in enumerate(tokens) if token == eot]
    bounds = [0, *ends, *([len(tokens)] if ends[-1:] != [len(tokens)] else [])]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


PACKED = [[3, 5, 0, 7, 8, 9, 1, 0, 0, 4, 2, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]]  # 0 ends a document


@pytest.mark.parametrize("row", PACKED)
def test_no_gradient_crosses_a_document(row):
    config = replace(SMALL, doc_mask=0)
    want = np.zeros((12, 12), bool)
    for part in documents(row, 0):
        want[part, part] = True
    sees = influences(config, jnp.asarray([row])) > 0
    assert np.array_equal(sees, np.tril(want))


def test_packed_documents_are_as_if_alone():
    """Each document of a packed row has the hidden states and losses of the document in a row of its own.

    Positions go on through a row, so the one alone gets the position embeddings from its place in the row on.
    """
    config = replace(SMALL, doc_mask=0)
    params, tokens = random_params(config), jnp.asarray(PACKED)
    targets = random_tokens(config, *tokens.shape)[1]
    packed, alone = np.asarray(logits_of(config, params, tokens)), np.zeros((*tokens.shape, 27))
    wpe = np.asarray(params["wpe"]["embedding"])
    for row in range(len(PACKED)):
        for part in documents(PACKED[row], 0):
            there = {**params, "wpe": {"embedding": np.roll(wpe, -part.start, axis=0)}}
            alone[row, part] = logits_of(SMALL, there, np.array([PACKED[row][part]], np.int32))[0]
    np.testing.assert_allclose(packed, alone, atol=1e-4)
    loss = -np.mean(np.take_along_axis(log_softmax(alone), np.asarray(targets)[..., None], -1))
    np.testing.assert_allclose(loss_of(config, params, tokens, targets), loss, rtol=1e-5)
    assert abs(loss_of(SMALL, params, tokens, targets) - loss) > 1e-3  # without the mask it differs


@pytest.mark.parametrize("doc_mask", [-1, 0])
def test_the_cache_changes_nothing(doc_mask):
    """A prompt, then tokens one by one, across documents' ends too, give the logits of the whole at once."""
    config = replace(SMALL, doc_mask=doc_mask)
    params, tokens = random_params(config), jnp.asarray(PACKED)
    logits, cache = extended(config, params, tokens[:, :4], config.empty_cache(2, 16))
    pieces = [logits]
    for i in range(4, 12):
        logits, cache = extended(config, params, tokens[:, i : i + 1], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), logits_of(config, params, tokens), atol=1e-4)


def test_padding_is_never_predicted_and_never_learned():
    params, (tokens, targets) = random_params(SMALL), random_tokens(SMALL, 3, 12)
    loss, grads = loss_and_grads(SMALL, params, tokens, targets)
    table = params["wte"]["embedding"]
    assert not np.asarray(grads["wte"]["embedding"])[27:].any()
    huge = {**params, "wte": {"embedding": table.at[27:].set(1e4)}}
    assert loss_of(SMALL, huge, tokens, targets) == loss_of(SMALL, params, tokens, targets)
    assert np.array_equal(logits_of(SMALL, huge, tokens), logits_of(SMALL, params, tokens))


# --- dropout ---


def test_no_seed_no_dropout():
    params, (tokens, targets) = random_params(SMALL), random_tokens(SMALL, 2, 12)
    off = loss_of(SMALL, params, tokens, targets)
    assert loss_of(replace(SMALL, dropout=0.5), params, tokens, targets) == off
    assert loss_of(SMALL, params, tokens, targets, jnp.uint32(1)) == off  # nor does a seed alone turn it on


def test_dropout_acts_where_nanogpt_has_it(monkeypatch):
    """On the embeddings, then in each block on attention weights and both branches: the reference, given the masks
    that were drawn, gives the same loss. No two masks are alike, and they keep what they should."""
    config, batch, time, rate = replace(SMALL, dropout=0.25), 8, 12, 0.25
    params, (tokens, targets) = random_params(config), random_tokens(config, batch, time)
    masks = []

    def recording(x, rate, seed):
        masks.append(keep_mask(x.shape, rate, seed))
        return dropout(x, rate, seed)

    monkeypatch.setattr(jaxgpt.models.gpt2, "dropout", recording)
    monkeypatch.setattr(jaxgpt.ops.attention, "dropout", recording)
    loss = bind(config, params).loss(tokens, targets, seed=jnp.uint32(7))  # not compiled: blocks would be traced once
    states, weights = (batch * time, 16), (batch, 2, time, time)
    assert [m.shape for m in masks] == [states] + 2 * [weights, states, states]
    kept = np.concatenate([np.asarray(m).ravel() for m in masks])
    assert abs(kept.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / kept.size)
    alike = [np.mean(np.asarray(a == b)) for i, a in enumerate(masks) for b in masks[:i] if a.shape == b.shape]
    assert len(alike) == 11 and max(alike) < 0.72  # 0.75² + 0.25² = 0.625 by chance

    left = iter(masks)

    def keep(x):
        return np.where(np.asarray(next(left)).reshape(x.shape), x / (1 - rate), 0.0)

    want = numpy_loss(config, float64(params), np.asarray(tokens), np.asarray(targets), keep)
    np.testing.assert_allclose(loss, want, atol=1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_at_its_scale(rate):
    """Over 2^20 elements, within five standard errors; neither position nor seed shows in what is kept."""
    x = jnp.full((1024, 1024), 3.0)
    one, other = (np.asarray(jax.jit(dropout, static_argnums=1)(x, rate, jnp.uint32(seed))) for seed in (1, 2))
    kept = one > 0
    np.testing.assert_allclose(one[kept], 3.0 / (1 - rate), rtol=1e-6)
    assert abs(kept.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / x.size)
    assert np.abs(kept.mean(0) - (1 - rate)).max() < 6 * math.sqrt(rate * (1 - rate) / 1024)
    for shifted in (other > 0, np.roll(kept, 1, 0), np.roll(kept, 1, 1)):
        assert abs(np.corrcoef(kept.ravel(), shifted.ravel())[0, 1]) < 6 / 1024
