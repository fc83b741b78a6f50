"""The next token from its logits: greedy, or drawn at a temperature from the top k or the top-p nucleus.

Nothing is sorted. Both cuts are a threshold, found by bisection over the bits of a float; the draw is a Gumbel maximum
whose noise is a hash of (seed, position, token), so that it depends on nothing else. On a GPU one kernel does it, one
program a row, but for the noise, which would keep that program busy longest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, UInt

from jaxgpt.ops.dropout import hash_bits
from jaxgpt.ops.launch import available, launch, load, store

# Of the top-k kernels below, for vocabularies of 2 _DEPTH _COLUMNS ids and more. The best of columns are 8 values for
# each thread of 32 warps. Of top_k=200 a column of 2,048 has four (and so may hide a fifth) once in 140 tokens
_COLUMNS, _DEPTH, _WARPS = 2048, 4, 32


class Rule(NamedTuple):
    """What is compiled in; the values come with each call."""

    vocab_size: int  # ids from here on are never chosen
    greedy: bool
    top_k: bool
    top_p: bool


def supports(width: int) -> bool:
    """Whether the kernels cover rows of `width` logits: one program holds a row, and Triton's blocks end at 2^20."""
    return width <= 2**20 and available()


def choose(
    logits: Float[Array, "B V"],
    seeds: UInt[Array, " B"],
    position: Int[Array, ""],
    knobs: Float[Array, "3"],
    rule: Rule,
    *,
    out: Int[Array, "B W"],
    column: Int[Array, ""],
    kernels: bool = False,
) -> Int[Array, "B W"]:
    """`out` with the chosen token of each row in the column after `column`, in place. knobs: temperature, top_k, top_p.

    Tokens whose logit equals the smallest one kept are kept too, as in nanoGPT. position: the new token's own.
    """
    kernels = kernels and supports(logits.shape[1])
    if kernels and rule.top_k and not (rule.greedy or rule.top_p) and rule.vocab_size >= 2 * _DEPTH * _COLUMNS:
        return _top_k_kernel(logits, seeds, position, knobs, rule, out, column)
    noise = logits if rule.greedy else _gumbel(seeds, position, logits.shape[1])
    if kernels:
        return _choose_kernel(logits, noise, knobs, rule, out, column)
    x = jnp.where(jnp.arange(logits.shape[1]) < rule.vocab_size, logits, -jnp.inf)
    tokens = jax.vmap(lambda x, noise: _choose_row(x, noise, knobs, rule))(x, noise)
    return jax.lax.dynamic_update_slice(out, tokens[:, None], (0, column + 1))


def _gumbel(seeds, position, width: int) -> Float[Array, "B V"]:
    """Independent standard Gumbel noise."""
    ids, position = jnp.arange(width, dtype=jnp.uint32), position.astype(jnp.uint32)
    return jax.vmap(lambda seed: _gumbel_at(hash_bits(seed, position), ids))(seeds)


def _gumbel_at(seed: UInt[Array, ""], ids: Int[Array, "..."] | UInt[Array, "..."]) -> Float[Array, "..."]:
    """-log(-log(u)) of a uniform u that is a hash of the id."""
    bits = hash_bits(seed, ids.astype(jnp.uint32))
    # 1 - u, whose steps are finest near 0, where the largest noise comes from
    rest = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-rest))


def _choose_row(x, noise, knobs, rule: Rule):
    """x: the logits of one row, -inf where nothing may be chosen."""
    if rule.greedy:
        return jnp.argmax(x).astype(jnp.int32)
    x = (x - jnp.max(x)) / knobs[0]
    floor = jnp.float32(-jnp.inf)
    if rule.top_k:
        floor = _threshold(x, jnp.ones_like(x), knobs[1])
    if rule.top_p:
        p = jnp.where(x >= floor, jnp.exp(x), 0.0)
        floor = jnp.maximum(floor, _threshold(x, p, knobs[2] * jnp.sum(p)))
    return jnp.argmax(jnp.where(x >= floor, x + noise, -jnp.inf)).astype(jnp.int32)


def _threshold(x, weights, target):
    """A t such that weights where x >= t add up to `target` or more, but to less for every t above. x is at most 0."""

    def to_float(key):  # keys are integers in the order of the floats
        return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)

    def halve(carry):
        low, high, _ = carry
        middle = low + ((high - low) >> 1)
        mass = jnp.sum(jnp.where(x >= to_float(middle), weights, 0.0))
        enough = mass >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), mass

    lowest = jnp.int32(-0x7F800001)  # the key of -inf
    low, _, _ = jax.lax.while_loop(
        lambda carry: (carry[1] - carry[0] > 1) & (carry[2] != target), halve, (lowest, jnp.int32(1), jnp.float32(-1.0))
    )
    return to_float(low)


def _choose_kernel(logits, noise, knobs, rule, out, column):
    batch, width = logits.shape
    block = pl.next_power_of_2(width)

    def kernel(x_ref, noise_ref, knobs_ref, column_ref, _, out_ref, *, interpret):
        b, ids = pl.program_id(0), jnp.arange(block)
        inside = ids < rule.vocab_size
        x, noise = (load(ref.at[b, ids], mask=inside, other=-jnp.inf) for ref in (x_ref, noise_ref))
        out_ref[b, column_ref[0] + 1] = _choose_row(x, noise, [knobs_ref[i] for i in range(3)], rule)

    args = logits, noise, knobs, column.reshape(1), out
    num_warps = min(32, max(1, block // 512))
    return launch(kernel, *args, out=[(out.shape, out.dtype)], grid=batch, num_warps=num_warps, aliases={4: 0})[0]


def _best_of_columns(logits, rule: Rule):
    """The _DEPTH largest logits of each column and their ids, (B, _DEPTH, _COLUMNS) both; column j has j, j + _COLUMNS…

    What single programs cannot do in time: they look at all the logits.
    """
    batch, width = logits.shape
    block = min(64, _COLUMNS)
    share = _COLUMNS // block

    def kernel(x_ref, best_ref, id_ref, *, interpret):
        b, column = pl.program_id(0) // share, pl.program_id(0) % share * block + jnp.arange(block)
        starts = range(0, min(width, rule.vocab_size), _COLUMNS)
        xs = [load(x_ref.at[b, i + column], mask=i + column < rule.vocab_size, other=-jnp.inf) for i in starts]
        best = [jnp.full((block,), -jnp.inf)] * _DEPTH
        ids = [column] * _DEPTH
        for start, x in zip(starts, xs, strict=True):
            at = start + column
            for rank in range(_DEPTH):  # the larger one stays, the smaller one is carried on to the next rank
                larger = x > best[rank]
                best[rank], x = jnp.where(larger, x, best[rank]), jnp.where(larger, best[rank], x)
                ids[rank], at = jnp.where(larger, at, ids[rank]), jnp.where(larger, ids[rank], at)
        for rank in range(_DEPTH):
            store(best_ref.at[b, rank, column], best[rank])
            store(id_ref.at[b, rank, column], ids[rank])

    shape = (batch, _DEPTH, _COLUMNS)
    out = [(shape, jnp.float32), (shape, jnp.int32)]
    return launch(kernel, logits, out=out, grid=batch * share, num_warps=max(1, block // 32))


def _top_k_kernel(logits, seeds, position, knobs, rule: Rule, out, column):
    """Top-k by the best of columns alone, which hold all k nearly always; where they may not, by all the logits."""
    batch, width = logits.shape
    best, ids = _best_of_columns(logits, rule)
    block = pl.next_power_of_2(width)

    def kernel(x_ref, best_ref, id_ref, seeds_ref, position_ref, knobs_ref, column_ref, _, out_ref, *, interpret):
        b, flat = pl.program_id(0), jnp.arange(_DEPTH * _COLUMNS)
        rank, j = flat // _COLUMNS, flat % _COLUMNS
        best, ids = (load(ref.at[b, rank, j]) for ref in (best_ref, id_ref))
        knobs, seed = [knobs_ref[i] for i in range(3)], hash_bits(seeds_ref[b], position_ref[0].astype(jnp.uint32))
        top = jnp.max(best)
        x = (best - top) / knobs[0]
        floor = _threshold(x, jnp.ones_like(x), knobs[1])
        # a column whose last place is taken by a logit that is kept may have more of them
        full = jnp.max(jnp.where(rank == _DEPTH - 1, x, -jnp.inf)) >= floor

        def from_all():
            ids = jnp.arange(block)
            x = load(x_ref.at[b, ids], mask=ids < rule.vocab_size, other=-jnp.inf)
            return _choose_row(x, _gumbel_at(seed, ids), knobs, rule)

        def from_best():
            score = jnp.where(x >= floor, x + _gumbel_at(seed, ids), -jnp.inf)
            return jnp.min(jnp.where(score == jnp.max(score), ids, width))

        out_ref[b, column_ref[0] + 1] = jax.lax.cond(full, from_all, from_best)

    args = logits, best, ids, seeds, position.reshape(1), knobs, column.reshape(1), out
    return launch(kernel, *args, out=[(out.shape, out.dtype)], grid=batch, num_warps=_WARPS, aliases={7: 0})[0]
