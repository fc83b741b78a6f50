"""Drawing a token: the distribution against numpy's, the kernel (interpreted) against its plain twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.ops import choose as module
from jaxgpt.ops.choose import Rule, choose

jitted = jax.jit(choose, static_argnames=("rule", "kernels"))


def draw(logits, rule, *, temperature=1.0, top_k=0, top_p=1.0, position=7, first_seed=0, kernels=False):
    """One token for each row, its seed the row's number."""
    batch = logits.shape[0]
    knobs = jnp.array([temperature, top_k, top_p], jnp.float32)
    out = jitted(
        jnp.asarray(logits, jnp.float32),
        jnp.arange(first_seed, first_seed + batch, dtype=jnp.uint32),
        jnp.int32(position),
        knobs,
        rule=rule,
        out=jnp.full((batch, 3), -1, jnp.int32),
        column=jnp.int32(0),
        kernels=kernels,
    )
    assert (np.asarray(out)[:, [0, 2]] == -1).all()  # only the column asked for was written
    return np.asarray(out[:, 1])


def kept(logits, temperature, top_k, top_p):
    """The probabilities after both cuts, by sorting: ties with the last token kept are kept."""
    x = np.asarray(logits, np.float64) / temperature
    if top_k:
        x = np.where(x >= np.sort(x)[::-1][min(top_k, len(x)) - 1], x, -np.inf)
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_p < 1:
        descending = np.sort(p)[::-1]
        last = np.flatnonzero(np.cumsum(descending) >= top_p)[0]
        p = np.where(p >= descending[last], p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.75), (1.5, 5, 0.6), (1.0, 1, 1.0)],
)
def test_frequencies_are_the_distribution(temperature, top_k, top_p):
    """Over 40,000 draws every frequency lies within 4.5 standard deviations of numpy's probability."""
    n, logits = 40_000, np.array([0.1, 1.2, -0.7, 2.0, 0.9, -3.0, 1.7, 0.3])
    rule = Rule(len(logits), False, top_k > 0, top_p < 1)
    tokens = draw(np.tile(logits, (n, 1)), rule, temperature=temperature, top_k=top_k, top_p=top_p)
    p = kept(logits, temperature, top_k, top_p)
    frequency = np.bincount(tokens, minlength=len(p)) / n
    assert (frequency[p == 0] == 0).all()
    assert (np.abs(frequency - p) <= 4.5 * np.sqrt(p * (1 - p) / n) + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(-40, 40), min_size=12, max_size=12),  # integers: many ties
    scale=st.sampled_from([1e-3, 0.25, 1.0, 30.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1.0, 0.999, 0.5, 1e-6]),
    temperature=st.sampled_from([1e-6, 0.8, 50.0]),
)
def test_only_what_the_cuts_keep(values, scale, top_k, top_p, temperature):
    logits = np.array(values, np.float32) * np.float32(scale)
    rule = Rule(12, False, 0 < top_k < 12, top_p < 1)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens = draw(np.tile(logits, (64, 1)), rule, **knobs)
    # a token whose neighbours in rank add up to top_p within rounding may fall on either side of the cut
    generous = kept(logits, temperature, top_k, min(1.0, top_p * (1 + 1e-5)))
    assert (generous[tokens] > 0).all()


@pytest.mark.parametrize(
    "rule", [Rule(300, True, False, False), Rule(300, False, True, False), Rule(299, False, True, True)]
)
def test_kernel_is_its_twin(rule):
    logits = np.random.default_rng(0).normal(size=(5, 384)) * 3
    logits[:, 300:] = 100.0  # the padding, which must never be chosen
    got, want = (draw(logits, rule, temperature=0.7, top_k=40, top_p=0.9, kernels=kernels) for kernels in (True, False))
    assert (got == want).all() and (want < rule.vocab_size).all()
    if rule.greedy:
        assert (want == logits[:, :300].argmax(1)).all()


def test_noise_depends_on_seed_and_position_alone():
    logits, rule = np.zeros((4, 1000)), Rule(1000, False, False, False)
    here = draw(logits, rule)
    assert len(set(here)) == 4 and (draw(logits[1:3], rule, first_seed=1) == here[1:3]).all()
    assert not (draw(logits, rule, position=8) == here).any()


@pytest.mark.parametrize("top_k", [1, 40, 200, 3000])
def test_top_k_of_a_large_vocabulary_is_its_twin(top_k, monkeypatch):
    """Rows that the best of columns decide; rows with more large logits in a column, or more equal ones, than those."""
    monkeypatch.setattr(module, "_COLUMNS", 128)
    logits = np.random.default_rng(1).normal(size=(4, 2048)).astype(np.float32) * 3
    logits[1, 5::128] += 20.0
    logits[2] = np.round(logits[2] / 4)
    logits[3] = 0.0
    logits[:, 2000:] = 100.0  # the padding, which must never be chosen
    rule, draws = Rule(2000, False, True, False), []
    knobs, out = jnp.array([0.9, top_k, 1.0], jnp.float32), jnp.zeros((4, 2), jnp.int32)
    rows, seeds, column = jnp.asarray(logits), jnp.arange(4, dtype=jnp.uint32), jnp.int32(0)
    both = [
        jax.jit(lambda p, kernels=kernels: choose(rows, seeds, p, knobs, rule, out=out, column=column, kernels=kernels))
        for kernels in (True, False)
    ]
    for position in range(8):
        got, want = (np.asarray(draw(jnp.int32(position)))[:, 1] for draw in both)
        assert (got == want).all()
        draws.append(got)
    least = np.sort(logits[:, :2000], axis=1)[:, -min(top_k, 2000)]
    assert (np.take_along_axis(logits, np.array(draws).T, axis=1) >= least[:, None]).all()
    assert np.array(draws).max() < 2000 and (top_k == 1 or len(set(np.array(draws)[:, 0])) > 1)
