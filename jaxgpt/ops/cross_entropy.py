"""Mean cross-entropy of a linear layer's logits, its gradient made in the forward pass while the logits are at hand.

Nothing of the logits outlives the forward pass, and no float32 copy of them is ever in memory. The kernel holds a row
of logits in registers: it is read once and overwritten by its gradient.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxgpt.ops import fp8
from jaxgpt.ops.launch import exp2, launch, load, store

LOG2_E = math.log2(math.e)
DLOGITS = 2.0**14  # factor of FP8 gradients of logits, which are at most 1


def linear_cross_entropy(
    x: Float[Array, "M C"],
    w: Float[Array, "V C"],
    targets: Int[Array, " M"],
    *,
    vocab_size: int,
    chunks: int = 1,
    kernel: bool = False,
    in_fp8: bool = False,
) -> Float[Array, ""]:
    """Mean over rows of -log softmax(x @ w.T)[target] in nats, float32.

    The product is computed in x's dtype. Rows of w from vocab_size on are padding: probability 0, gradient 0. The
    gradient of w comes in w's dtype, so a float32 w gets an unrounded one. chunks: compute that many row blocks in
    turn, to hold the logits of one at a time; it must divide M. in_fp8: the product and its gradients' two in FP8.
    """
    return _mean_loss(x, w, targets, vocab_size, chunks, kernel, in_fp8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _mean_loss(x, w, targets, vocab_size: int, chunks: int, kernel: bool, in_fp8: bool):
    return _chunked(x, w, targets, vocab_size, chunks, kernel, in_fp8, grad=False)[0]


def _forward(x, w, targets, vocab_size, chunks, kernel, in_fp8):
    loss, dx, dw = _chunked(x, w, targets, vocab_size, chunks, kernel, in_fp8, grad=True)
    return loss, (dx, dw.astype(w.dtype))  # their sums over rows, not yet means


def _backward(vocab_size, chunks, kernel, in_fp8, residuals, cotangent):
    dx, dw = residuals
    scale = cotangent / dx.shape[0]
    return (dx * scale).astype(dx.dtype), (dw * scale).astype(dw.dtype), None


_mean_loss.defvjp(_forward, _backward)


def _chunked(x, w, targets, vocab_size, chunks, kernel, in_fp8, grad) -> tuple[Array, Any, Any]:
    """The mean loss and, if asked for, the gradients of the summed loss: dx in x's dtype and dw in float32."""
    if in_fp8:
        return _chunked_in_fp8(x, w, targets, vocab_size, chunks, kernel, grad)
    w = w.astype(x.dtype)
    rows = _rows_kernel if kernel else _rows_plain

    def chunk(dw, x_and_targets):
        x, targets = x_and_targets
        logits = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))  # in x's dtype, summed in float32
        loss, *dlogits = rows(logits, targets, vocab_size, grad)
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


def _chunked_in_fp8(x, w, targets, vocab_size, chunks, kernel, grad) -> tuple[Array, Any, Any]:
    """The same with its products in FP8."""
    rows = _rows_kernel if kernel else _rows_plain
    wq, w_scale = fp8.round_weight(w)
    while x.shape[0] // chunks * w.shape[0] >= 2**31 and x.shape[0] // chunks % (2 * fp8.MULTIPLE) == 0:
        chunks *= 2  # or they would not fit the kernel that transposes
    losses, dxs, dw = [], [], None
    for part, part_targets in zip(jnp.split(x, chunks), jnp.split(targets, chunks), strict=True):
        xq, xq_t, x_scale = fp8.both_orders(fp8.identity, fp8.E4M3, part, kernel=kernel)
        logits = fp8.dot(xq, wq, w_scale * x_scale, x.dtype)
        loss, *dlogits = rows(logits, part_targets, vocab_size, grad, in_fp8=True)
        losses.append(loss)
        if grad:
            dxs.append(fp8.dot(dlogits[0], wq.T, w_scale * DLOGITS, x.dtype))
            more = fp8.dot(fp8.transpose(dlogits[0], kernel=kernel), xq_t, x_scale * DLOGITS, jnp.float32)
            dw = more if dw is None else dw + more
    return jnp.concatenate(losses).mean(), jnp.concatenate(dxs) if grad else None, dw


def _rows_plain(logits, targets, vocab_size, grad, in_fp8=False):
    """Each row's loss and, if asked for, its gradient with respect to the logits, in their dtype or FP8."""
    columns = jnp.arange(logits.shape[1])
    masked = jnp.where(columns < vocab_size, logits.astype(jnp.float32), -jnp.inf)
    lse = jax.nn.logsumexp(masked, axis=1)
    loss = lse - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0].astype(jnp.float32)
    if not grad:
        return [loss]
    gradient = jnp.exp(masked - lse[:, None]) - (columns == targets[:, None])
    return [loss, fp8.round_to(gradient, DLOGITS, fp8.E5M2) if in_fp8 else gradient.astype(logits.dtype)]


def _rows_kernel(logits, targets, vocab_size, grad, in_fp8=False):
    """The same, the gradient in place of the logits if in their dtype."""
    m, v = logits.shape
    num_warps = min(16, max(1, pl.next_power_of_2(v) // 256))
    row = pl.BlockSpec((None, v), lambda i: (i, 0))
    one = pl.BlockSpec((1,), lambda i: (i,))
    return launch(
        functools.partial(_row_kernel, vocab_size=vocab_size, width=num_warps * 256, factor=DLOGITS if in_fp8 else 1.0),
        logits,
        targets.astype(jnp.int32),
        out=[((m,), jnp.float32)] + [((m, v), fp8.E5M2 if in_fp8 else logits.dtype)] * grad,
        grid=m,
        in_specs=[row, one],
        out_specs=[one] + [row] * grad,
        num_warps=num_warps,
        aliases={0: 1} if grad and not in_fp8 else {},
    )


def _row_kernel(logits, target, loss, dlogits=None, *, vocab_size: int, width: int, factor: float, interpret: bool):
    """One row as tiles of `width` columns, 8 per thread (16 bytes) in each."""
    target, v = target[0], logits.shape[0]
    at_target = load(logits.at[target]).astype(jnp.float32)
    iota = jnp.arange(width)
    tiles = []
    for start in range(0, v, width):
        mask = None if start + width <= v else iota < v - start
        tile = load(logits.at[iota + start], mask=mask, other=None if mask is None else -jnp.inf).astype(jnp.float32)
        tiles.append(tile if start + width <= vocab_size else jnp.where(iota < vocab_size - start, tile, -jnp.inf))
    top = jnp.max(functools.reduce(jnp.maximum, tiles)) * LOG2_E
    tiles = [exp2(tile, LOG2_E, -top, interpret) for tile in tiles]
    total = jnp.sum(functools.reduce(jnp.add, tiles))
    loss[0] = (top + jnp.log2(total)) / LOG2_E - at_target
    if dlogits is not None:
        for start, tile in zip(range(0, v, width), tiles, strict=True):
            p = tile * (1 / total)
            p = jnp.where(iota == target - start, p - 1, p)
            mask = None if start + width <= v else iota < v - start
            p = p if factor == 1.0 else p * factor
            store(dlogits.at[iota + start], p.astype(dlogits.dtype), mask=mask)
