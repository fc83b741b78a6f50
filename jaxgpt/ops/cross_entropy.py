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
from jaxtyping import Array, Float, Int

from jaxgpt.ops import fp8
from jaxgpt.ops.launch import available, exp2, launch, load, sigmoid, store, tanh

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
) -> Float[Array, ""]:
    """Mean over rows of -log softmax(logits)[target] in nats, float32, with logits = x @ w.T.

    The product is computed in x's dtype. Rows of w from vocab_size on are padding: probability 0, gradient 0. The
    gradient of w comes in w's dtype, so a float32 w gets an unrounded one. softcap: logits are softcap * tanh(x @ w.T /
    softcap), if above 0 (Gemma 2, arXiv 2408.00118). chunks: compute that many row blocks in turn, to hold the logits
    of one at a time; it must divide M. in_fp8: the product and its gradients' two in FP8.
    """
    kernels = kernels and available()
    return _mean_loss(x, w, targets, Rows(vocab_size, softcap, kernels, in_fp8), chunks)


class Rows(NamedTuple):
    """What is done with a row of logits."""

    vocab_size: int
    softcap: float
    kernels: bool
    in_fp8: bool

    def __call__(self, logits, targets, grad: bool):
        """Each row's loss and, if asked for, its gradient with respect to the product, in its dtype or FP8."""
        return (_rows_kernel if self.kernels else _rows_plain)(logits, targets, self, grad)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _mean_loss(x, w, targets, rows: Rows, chunks: int):
    return _chunked(x, w, targets, rows, chunks, grad=False)[0]


def _forward(x, w, targets, rows, chunks):
    loss, dx, dw = _chunked(x, w, targets, rows, chunks, grad=True)
    return loss, (dx, dw.astype(w.dtype))  # their sums over rows, not yet means


def _backward(rows, chunks, residuals, cotangent):
    dx, dw = residuals
    scale = cotangent / dx.shape[0]
    return (dx * scale).astype(dx.dtype), (dw * scale).astype(dw.dtype), None


_mean_loss.defvjp(_forward, _backward)


def _chunked(x, w, targets, rows, chunks, grad) -> tuple[Array, Any, Any]:
    """The mean loss and, if asked for, the gradients of the summed loss: dx in x's dtype and dw in float32."""
    if rows.in_fp8:
        return _chunked_in_fp8(x, w, targets, rows, chunks, grad)
    w = w.astype(x.dtype)

    def chunk(dw, x_and_targets):
        x, targets = x_and_targets
        logits = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))  # in x's dtype, summed in float32
        loss, *dlogits = rows(logits, targets, grad)
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


def _chunked_in_fp8(x, w, targets, rows, chunks, grad) -> tuple[Array, Any, Any]:
    """The same with its products in FP8."""
    wq, w_scale = fp8.round_weight(w)
    while x.shape[0] // chunks * w.shape[0] >= 2**31 and x.shape[0] // chunks % (2 * fp8.MULTIPLE) == 0:
        chunks *= 2  # or they would not fit the kernel that transposes
    losses, dxs, dw = [], [], None
    for part, part_targets in zip(jnp.split(x, chunks), jnp.split(targets, chunks), strict=True):
        xq, xq_t, x_scale = fp8.both_orders(fp8.identity, fp8.E4M3, part, kernel=rows.kernels)
        logits = fp8.dot(xq, wq, w_scale * x_scale, x.dtype)
        loss, *dlogits = rows(logits, part_targets, grad)
        losses.append(loss)
        if grad:
            dxs.append(fp8.dot(dlogits[0], wq.T, w_scale * DLOGITS, x.dtype))
            more = fp8.dot(fp8.transpose(dlogits[0], kernel=rows.kernels), xq_t, x_scale * DLOGITS, jnp.float32)
            dw = more if dw is None else dw + more
    return jnp.concatenate(losses).mean(), jnp.concatenate(dxs) if grad else None, dw


def _rows_plain(logits, targets, rows: Rows, grad):
    columns, x = jnp.arange(logits.shape[1]), logits.astype(jnp.float32)
    at_target = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0].astype(jnp.float32)
    if cap := rows.softcap:
        x, at_target = cap * jnp.tanh(x / cap), cap * jnp.tanh(at_target / cap)
    masked = jnp.where(columns < rows.vocab_size, x, -jnp.inf)
    lse = jax.nn.logsumexp(masked, axis=1)
    loss = lse - at_target
    if not grad:
        return [loss]
    gradient = jnp.exp(masked - lse[:, None]) - (columns == targets[:, None])
    gradient = gradient * (1 - jnp.square(x / cap)) if cap else gradient
    return [loss, fp8.round_to(gradient, DLOGITS, fp8.E5M2) if rows.in_fp8 else gradient.astype(logits.dtype)]


def _rows_kernel(logits, targets, rows: Rows, grad):
    """The gradient in place of the logits if in their dtype."""
    m, v = logits.shape
    num_warps = min(16, max(1, pl.next_power_of_2(v) // 256))
    row = pl.BlockSpec((None, v), lambda i: (i, 0))
    one = pl.BlockSpec((1,), lambda i: (i,))
    return launch(
        functools.partial(_row_kernel, rows=rows, width=num_warps * 256),
        logits,
        targets.astype(jnp.int32),
        out=[((m,), jnp.float32)] + [((m, v), fp8.E5M2 if rows.in_fp8 else logits.dtype)] * grad,
        grid=m,
        in_specs=[row, one],
        out_specs=[one] + [row] * grad,
        num_warps=num_warps,
        aliases={0: 1} if grad and not rows.in_fp8 else {},
    )


def _row_kernel(logits, target, loss, dlogits=None, *, rows: Rows, width: int, interpret: bool):
    """One row as tiles of `width` columns, 8 per thread (16 bytes) in each.

    Without a soft cap the tiles are exp(logit - the largest). With one they are its tanh, and the cap takes the place
    of the largest: exp(2 softcap) must be a float32, and is up to softcap=43.
    """
    target, v, cap = target[0], logits.shape[0], rows.softcap
    at_target = load(logits.at[target]).astype(jnp.float32)
    iota, vocab_size = jnp.arange(width), rows.vocab_size
    starts = range(0, v, width)

    def squash(x):
        if logits.dtype == jnp.float32:
            return 2 * sigmoid(x * (2 / cap), interpret) - 1
        return tanh(x, 1 / cap, interpret)  # as exact as 16 bits are

    tiles = []
    for start in starts:
        mask = None if start + width <= v else iota < v - start
        tile = load(logits.at[iota + start], mask=mask, other=None if mask is None else -jnp.inf).astype(jnp.float32)
        tile = squash(tile) if cap else tile
        tiles.append(
            tile if start + width <= rows.vocab_size else jnp.where(iota < rows.vocab_size - start, tile, -jnp.inf)
        )
    top = cap * LOG2_E if cap else jnp.max(functools.reduce(jnp.maximum, tiles)) * LOG2_E

    def power(tile):
        return exp2(tile, (cap or 1.0) * LOG2_E, jnp.float32(-top), interpret)

    if not cap:
        tiles = [power(tile) for tile in tiles]
    total = jnp.sum(functools.reduce(jnp.add, [power(tile) for tile in tiles] if cap else tiles))
    at_target = cap * jnp.tanh(at_target / cap) if cap else at_target
    loss[0] = (top + jnp.log2(total)) / LOG2_E - at_target
    if dlogits is None:
        return
    for start, tile in zip(starts, tiles, strict=True):
        p = (power(tile) if cap else tile) * (1 / total)
        p = jnp.where(iota == target - start, p - 1, p)
        if cap:
            p = p * (1 - tile * tile)
            if start + width > vocab_size:  # there the tile is -inf
                p = jnp.where(iota < vocab_size - start, p, 0.0)
        mask = None if start + width <= v else iota < v - start
        p = p * DLOGITS if rows.in_fp8 else p
        store(dlogits.at[iota + start], p.astype(dlogits.dtype), mask=mask)
