"""Mean cross-entropy of a linear layer's logits, its gradient made in the forward pass while the logits are at hand.

Nothing of the logits outlives the forward pass, and no float32 copy of them is ever in memory. The kernel holds a row
of logits in registers: it is read once and overwritten by its gradient.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt

from jaxgpt.ops import fp8
from jaxgpt.ops.launch import available, exp2, launch, load, log2, sigmoid, store
from jaxgpt.ops.paths import note
from jaxgpt.sharding import on_parts, rows, splits

LOG2_E = math.log2(math.e)
DLOGITS = 2.0**14  # factor of FP8 gradients of logits, which are at most 1


def linear_cross_entropy(
    x: Float[Array, "M C"],
    w: Float[Array, "V C"],
    targets: Int[Array, " M"],
    *,
    vocab_size: int,
    softcap: float = 0.0,
    chunks: int = 1,
    kernels: bool = False,
    in_fp8: bool = False,
    rare: Float[Array, " 2"] | None = None,
) -> Float[Array, ""]:
    """Mean over rows of -log softmax(logits)[target] in nats, float32, with logits = x @ w.T.

    The product is computed in x's dtype. Rows of w from vocab_size on are padding: probability 0, gradient 0. The
    gradient of w comes in w's dtype, so a float32 w gets an unrounded one. softcap: logits are softcap * tanh(x @ w.T /
    softcap), if above 0 (Gemma 2, arXiv 2408.00118). chunks: compute that many row blocks in turn, to hold the logits
    of one at a time; it must divide M. in_fp8: the product and its gradients' two in FP8. rare: (first, weight): every
    row of w from `first` on stands for 2^weight tokens with these logits. A target of -1 adds no loss and no gradient.
    """
    options: Any = {"vocab_size": vocab_size, "softcap": softcap, "chunks": chunks, "in_fp8": in_fp8}
    if splits(x.shape[0], w.shape[0]):
        # each device takes its share of the rows, with the whole of w, which is fetched in x's dtype
        def part(x, w, targets, rare):
            w = jax.lax.all_gather(w.astype(x.dtype), "tensor", axis=0, tiled=True).astype(w.dtype)
            targets = jax.lax.dynamic_slice_in_dim(targets, jax.lax.axis_index("tensor") * len(x), len(x))
            return jax.lax.pmean(linear_cross_entropy(x, w, targets, rare=rare, kernels=kernels, **options), "tensor")

        rows = P("tensor")
        return on_parts(part, (rows, rows, P(), P()), P())(x, w, targets, rare)
    kernels = kernels and supports(w.shape[0])
    note("loss", "kernel" if kernels else "plain")
    return _mean_loss(x, w, targets, rare, Rows(vocab_size, softcap, kernels, in_fp8), chunks)


def supports(width: int) -> bool:
    """Whether the kernel covers rows of `width` logits of any dtype: a row must fit the registers of 512 threads.

    A multiprocessor has 65,536, 128 for each; GPT-2's 50,304 logits take 98. One that spilled took three times as long.
    """
    return width <= 110 * 512 and available()


def sampled_cross_entropy(
    x: Float[Array, "M C"],
    w: Float[Array, "V P"],
    targets: Int[Array, " M"],
    *,
    vocab_size: int,
    sample: int,
    seed: UInt[Array, ""],
    **options: Any,
) -> Float[Array, ""]:
    """linear_cross_entropy, estimated from `sample` rows of w: those of all targets and others drawn at random.

    A drawn one stands for as many tokens as there are for each draw, so that the sum in the softmax is right in the
    mean (Bengio and Senécal 2008, "Adaptive importance sampling …"). Of more than `sample` different targets those with
    the highest numbers add nothing. w may be the device's part of the features: see `sharding.rows`.
    """
    is_target = jnp.zeros(vocab_size, bool).at[targets].set(True)
    draw = jax.random.bits(jax.random.key(seed), (vocab_size,), jnp.uint32) >> 1
    ids = jnp.argsort(jnp.where(is_target, 0, 1 + draw))[:sample]  # stable: targets by their numbers
    place = jnp.full(vocab_size, -1).at[ids].set(jnp.arange(sample))
    first = is_target.sum().astype(jnp.float32)
    rare = jnp.stack([first, jnp.log2((vocab_size - first) / jnp.maximum(sample - first, 1))])
    (some,) = rows([w], ids, x.shape[1], w.dtype)
    return linear_cross_entropy(x, some, place[targets], vocab_size=sample, rare=rare, **options)


class Rows(NamedTuple):
    """What is done with a row of logits."""

    vocab_size: int
    softcap: float
    kernels: bool
    in_fp8: bool

    def __call__(self, logits, targets, rare, grad: bool):
        """Each row's loss and, if asked for, its gradient with respect to the product, in its dtype or FP8."""
        return (_rows_kernel if self.kernels else _rows_plain)(logits, targets, rare, self, grad)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _mean_loss(x, w, targets, rare, rows: Rows, chunks: int):
    return _chunked(x, w, targets, rare, rows, chunks, grad=False)[0]


def _forward(x, w, targets, rare, rows, chunks):
    loss, dx, dw = _chunked(x, w, targets, rare, rows, chunks, grad=True)
    return loss, (dx, dw.astype(w.dtype))  # their sums over rows, not yet means


def _backward(rows, chunks, residuals, cotangent):
    dx, dw = residuals
    scale = cotangent / dx.shape[0]
    return (dx * scale).astype(dx.dtype), (dw * scale).astype(dw.dtype), None, None


_mean_loss.defvjp(_forward, _backward)


def _chunked(x, w, targets, rare, rows, chunks, grad) -> tuple[Array, Any, Any]:
    """The mean loss and, if asked for, the gradients of the summed loss: dx in x's dtype and dw in float32."""
    if rows.in_fp8:
        return _chunked_in_fp8(x, w, targets, rare, rows, chunks, grad)
    w = w.astype(x.dtype)

    def chunk(dw, x_and_targets):
        x, targets = x_and_targets
        logits = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))  # in x's dtype, summed in float32
        loss, *dlogits = rows(logits, targets, rare, grad)
        if not grad:
            return dw, (loss, None)
        dx = dlogits[0] @ w
        part = jax.lax.dot_general(dlogits[0], x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return part if dw is None else dw + part, (loss, dx)

    if chunks == 1:
        dw, (loss, dx) = chunk(None, (x, targets))
    else:
        parts = x.reshape(chunks, -1, x.shape[1]), targets.reshape(chunks, -1)
        dw, (loss, dx) = jax.lax.scan(chunk, jnp.zeros(w.shape, jnp.float32) if grad else None, parts)
    return loss.mean(), None if dx is None else dx.reshape(x.shape), dw


def _chunked_in_fp8(x, w, targets, rare, rows, chunks, grad) -> tuple[Array, Any, Any]:
    """The same with its products in FP8."""
    wq, w_scale = fp8.round_weight(w)
    while x.shape[0] // chunks * w.shape[0] >= 2**31 and x.shape[0] // chunks % (2 * fp8.MULTIPLE) == 0:
        chunks *= 2  # or they would not fit the kernel that transposes
    losses, dxs, dw = [], [], None
    for part, part_targets in zip(jnp.split(x, chunks), jnp.split(targets, chunks), strict=True):
        xq, xq_t, x_scale = fp8.both_orders(fp8.identity, fp8.E4M3, part, kernel=rows.kernels)
        logits = fp8.dot(xq, wq, w_scale * x_scale, x.dtype)
        loss, *dlogits = rows(logits, part_targets, rare, grad)
        losses.append(loss)
        if grad:
            dxs.append(fp8.dot(dlogits[0], wq.T, w_scale * DLOGITS, x.dtype))
            more = fp8.dot(fp8.transpose(dlogits[0], kernel=rows.kernels), xq_t, x_scale * DLOGITS, jnp.float32)
            dw = more if dw is None else dw + more
    return jnp.concatenate(losses).mean(), jnp.concatenate(dxs) if grad else None, dw


def _rows_plain(logits, targets, rare, rows: Rows, grad):
    columns, x = jnp.arange(logits.shape[1]), logits.astype(jnp.float32)
    tanh = jnp.tanh(x / rows.softcap) if rows.softcap else None
    x = x if tanh is None else rows.softcap * tanh
    at_target = _at(x, jnp.maximum(targets, 0), gather=logits.dtype == jnp.float32)
    x = x if rare is None else x + jnp.where(columns >= rare[0], rare[1] / LOG2_E, 0.0)
    masked = jnp.where(columns < rows.vocab_size, x, -jnp.inf)
    lse, known = jax.nn.logsumexp(masked, axis=1), targets >= 0
    loss = jnp.where(known, lse - at_target, 0.0)
    if not grad:
        return [loss]
    gradient = (jnp.exp(masked - lse[:, None]) - (columns == targets[:, None])) * known[:, None]
    gradient = gradient if tanh is None else gradient * (1 - tanh * tanh)
    return [loss, fp8.round_to(gradient, DLOGITS, fp8.E5M2) if rows.in_fp8 else gradient.astype(logits.dtype)]


def _at(x, targets, gather: bool):
    """x at each row's target. gather: x is in memory; else it need not be, for the sum becomes part of another one's
    pass over what x is computed from (on TPUs the gather took 3.1 GiB, and a ninth of the traffic of a step)."""
    if gather:
        return jnp.take_along_axis(x, targets[:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where(jnp.arange(x.shape[1]) == targets[:, None], x, 0.0), axis=1)


def _rows_kernel(logits, targets, rare, rows: Rows, grad):
    """The gradient in place of the logits if in their dtype."""
    m, v = logits.shape
    num_warps = min(16, max(1, pl.next_power_of_2(v) // 256))
    row = pl.BlockSpec((None, v), lambda i: (i, 0))
    one = pl.BlockSpec((1,), lambda i: (i,))
    both = pl.BlockSpec((2,), lambda i: (0,))
    return launch(
        functools.partial(_row_kernel if rare is None else _rare_row_kernel, rows=rows, width=num_warps * 256),
        logits,
        targets.astype(jnp.int32),
        *([] if rare is None else [rare]),
        out=[((m,), jnp.float32)] + [((m, v), fp8.E5M2 if rows.in_fp8 else logits.dtype)] * grad,
        grid=m,
        in_specs=[row, one] + ([] if rare is None else [both]),
        out_specs=[one] + [row] * grad,
        num_warps=num_warps,
        aliases={0: 1} if grad and not rows.in_fp8 else {},
    )


def _rare_row_kernel(logits, target, rare, loss, dlogits=None, **static):
    _row_kernel(logits, target, loss, dlogits, rare, **static)


def _row_kernel(logits, target, loss, dlogits=None, rare=None, *, rows: Rows, width: int, interpret: bool):
    """One row as tiles of `width` columns, 8 per thread (16 bytes) in each; registers hold one value for each column.

    That is exp(logit - the largest). With a soft cap it is exp(z - softcap) of the capped logit z, which must be a
    float32: up to softcap=43. With s = sigmoid(2 logit / softcap), z = softcap (2s - 1), and dz/dlogit = 4s(1 - s): the
    value's logarithm gives s again.
    """
    target, v, cap, vocab_size = target[0], logits.shape[0], rows.softcap, rows.vocab_size
    at_target = load(logits.at[jnp.maximum(target, 0)]).astype(jnp.float32)
    iota, starts, slope = jnp.arange(width), range(0, v, width), 2 * cap * LOG2_E

    def weights(start):
        """log2 of how many tokens a column stands for."""
        if rare is None:
            return jnp.float32(0.0)
        return jnp.where(iota + start >= rare[0].astype(jnp.int32), rare[1], 0.0)

    tiles = []
    for start in starts:
        mask = None if start + width <= v else iota < v - start
        tile = load(logits.at[iota + start], mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)
        if cap:
            tile = exp2(sigmoid(tile * (2 / cap), interpret), slope, weights(start) - slope, interpret)
        none = 0.0 if cap else -jnp.inf
        tiles.append(tile if start + width <= vocab_size else jnp.where(iota < vocab_size - start, tile, none))
    if cap:
        top, at_target = cap * LOG2_E, cap * (2 / (1 + jnp.exp(-2 / cap * at_target)) - 1)
    else:
        top = jnp.max(functools.reduce(jnp.maximum, tiles)) * LOG2_E
        tiles = [exp2(t, LOG2_E, weights(start) - top, interpret) for t, start in zip(tiles, starts, strict=True)]
    total = jnp.sum(functools.reduce(jnp.add, tiles))
    loss[0] = jnp.where(target >= 0, (top + jnp.log2(total)) / LOG2_E - at_target, 0.0)
    if dlogits is None:
        return
    factor = jnp.minimum(target + 1, 1).astype(jnp.float32) * (DLOGITS if rows.in_fp8 else 1.0)
    for start, tile in zip(starts, tiles, strict=True):
        p = jnp.where(iota == target - start, tile * (1 / total) - 1, tile * (1 / total)) * factor
        if cap:  # below: s - 1; at least -1, where the value was rounded to 0
            less = jnp.maximum((log2(tile, interpret) - weights(start)) * (1 / slope), -1.0)
            p = p * (-4 * less * (1 + less))
        mask = None if start + width <= v else iota < v - start
        store(dlogits.at[iota + start], p.astype(dlogits.dtype), mask=mask)
