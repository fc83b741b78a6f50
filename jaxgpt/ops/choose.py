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
from jaxgpt.ops.launch import launch, load


class Rule(NamedTuple):
    """What is compiled in; the values come with each call."""

    vocab_size: int  # ids from here on are never chosen
    greedy: bool
    top_k: bool
    top_p: bool


def choose(
    logits: Float[Array, "B V"],
    seeds: UInt[Array, " B"],
    position: Int[Array, ""],
    knobs: Float[Array, "3"],
    rule: Rule,
    *,
    out: Int[Array, "B W"],
    column: Int[Array, ""],
    kernel: bool = False,
) -> Int[Array, "B W"]:
    """`out` with the chosen token of each row in the column after `column`, in place. knobs: temperature, top_k, top_p.

    Tokens whose logit equals the smallest one kept are kept too, as in nanoGPT. position: the new token's own.
    """
    noise = logits if rule.greedy else _gumbel(seeds, position, logits.shape[1])
    if kernel:
        return _choose_kernel(logits, noise, knobs, rule, out, column)
    x = jnp.where(jnp.arange(logits.shape[1]) < rule.vocab_size, logits, -jnp.inf)
    tokens = jax.vmap(lambda x, noise: _choose_row(x, noise, knobs, rule))(x, noise)
    return jax.lax.dynamic_update_slice(out, tokens[:, None], (0, column + 1))


def _gumbel(seeds, position, width: int) -> Float[Array, "B V"]:
    """Independent standard Gumbel noise, -log(-log(u)) of a uniform u."""
    ids, position = jnp.arange(width, dtype=jnp.uint32), position.astype(jnp.uint32)
    bits = jax.vmap(lambda seed: hash_bits(hash_bits(seed, position), ids))(seeds)
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
