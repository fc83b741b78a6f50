"""One token's way through a GPT in as few kernels as possible: when a few rows decode, starting kernels is what costs.

A layer is five of them (`linear` four times, `attend` once), a token 5 L + 3. Weights come as (out, in): a program then
reads whole rows of them, and each weight is read once for all B rows. Sums are float32.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxgpt.ops.launch import launch, load, store

Norm = tuple[Float[Array, " K"], Float[Array, " K"] | None]  # scale and bias of a layer norm


@functools.partial(jax.jit, static_argnames=("activation", "dtype"))  # traced and lowered once, not once a layer
def linear(
    x: Float[Array, "B K"],
    w: Float[Array, "O K"],
    bias: Float[Array, " O"] | None = None,
    *,
    norm: Norm | None = None,
    activation: bool = False,
    residual: Float[Array, "B O"] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "B O"]:
    """residual + gelu(layer_norm(x) @ w.T + bias), each part but the product optional; in `dtype`, by default x's."""
    (batch, k), o = x.shape, w.shape[0]
    # tensor cores multiply 16 rows at least; for one row they would be of no use
    rows = 1 if batch == 1 else max(16, pl.next_power_of_2(batch))
    if norm is not None and (rows > 16 or rows > 1 and k > 1024):  # too much for the registers of each program
        x, norm = _layer_norm(x, norm), None
    tile = _tile(batch, o, k)
    width = min(256, max(16, pl.next_power_of_2(k)))
    chunks, at_once = pl.cdiv(k, width), batch == 1 or (rows == 16 and k <= 1024)
    optional = {"scale": norm and norm[0], "shift": norm and norm[1], "bias": bias, "residual": residual}
    given = {name: array for name, array in optional.items() if array is not None}

    def kernel(x_ref, w_ref, *refs, interpret):
        ref, program = dict(zip(given, refs, strict=False)), pl.program_id(0)

        def columns(i):
            return i * width + jnp.arange(width)

        def matrix(source, row, limit, i):
            at = jnp.broadcast_arrays(row[:, None], columns(i)[None, :])
            mask = (row < limit)[:, None] & (columns(i) < k)[None, :]
            return load(source.at[tuple(at)], mask=mask, other=0.0)

        def vector(name, i):
            return load(ref[name].at[columns(i)], mask=columns(i) < k, other=0.0)[None, :]

        def inputs(i):
            return matrix(x_ref, jnp.arange(rows), batch, i)

        def some_rows(j, xs):
            """Rows j of w in this program's share. Every load comes before the first use: memory answers once."""
            row = (program * tile.groups + j) * tile.block + jnp.arange(tile.block)
            at = tuple(jnp.broadcast_arrays(jnp.arange(rows)[:, None], row[None, :]))
            mask = (jnp.arange(rows) < batch)[:, None] & (row < o)[None, :]
            ws = [matrix(w_ref, row, o, i) for i in range(chunks)] if at_once else []
            shift = load(ref["bias"].at[row], mask=row < o, other=0.0) if bias is not None else None
            old = load(ref["residual"].at[at], mask=mask, other=0.0) if residual is not None else None
            xs = normalized() if at_once and xs is None else xs
            if batch == 1:
                products = [a.astype(jnp.float32) * b.astype(jnp.float32) for a, b in zip(xs, ws, strict=True)]
                y = jnp.sum(functools.reduce(jnp.add, products), axis=1)[None, :]
            elif at_once:
                y = functools.reduce(jnp.add, [_dot(a, b) for a, b in zip(xs, ws, strict=True)])
            else:
                y = jnp.zeros((rows, tile.block), jnp.float32)
                y = jax.lax.fori_loop(0, chunks, lambda i, y: y + _dot(inputs(i), matrix(w_ref, row, o, i)), y)
            y = y + shift.astype(jnp.float32)[None, :] if shift is not None else y
            if activation:
                y = jax.nn.gelu(y, approximate=True)
            y = y + old.astype(jnp.float32) if old is not None else y
            store(refs[-1].at[at], y.astype(refs[-1].dtype), mask=mask)

        def normalized():
            xs = [inputs(i) for i in range(chunks)]
            if norm is None:
                return xs
            scales = [vector("scale", i) for i in range(chunks)]
            shifts = [vector("shift", i) if "shift" in ref else 0.0 for i in range(chunks)]
            xs = [x.astype(jnp.float32) for x in xs]
            mean = jnp.sum(functools.reduce(jnp.add, xs), axis=1, keepdims=True) / k
            xs = [jnp.where((columns(i) < k)[None, :], x - mean, 0.0) for i, x in enumerate(xs)]
            square = jnp.sum(functools.reduce(jnp.add, [x * x for x in xs]), axis=1, keepdims=True)
            xs = [x * jax.lax.rsqrt(square / k + 1e-5) for x in xs]
            return [(x * a + b).astype(w.dtype) for x, a, b in zip(xs, scales, shifts, strict=True)]

        if tile.groups == 1:
            some_rows(0, None)
        else:  # the rows of x are read, and normalized, once for all
            xs = normalized()
            jax.lax.fori_loop(0, tile.groups, lambda j, _: some_rows(j, xs), None)

    return launch(
        kernel,
        x,
        w,
        *given.values(),
        out=[((batch, o), dtype or x.dtype)],
        grid=pl.cdiv(o, tile.block * tile.groups),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )[0]


def _dot(x, w):
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _layer_norm(x, norm: Norm):
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=1, keepdims=True)
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + 1e-5) * norm[0]
    return (y if norm[1] is None else y + norm[1]).astype(x.dtype)


class Tile(NamedTuple):
    """A program's share of w: `groups` times `block` rows, one after the other."""

    block: int
    groups: int = 1
    num_warps: int = 1
    num_stages: int = 3  # chunks of K on their way at a time, in the loop over K


def _tile(batch: int, o: int, k: int) -> Tile:
    """Small enough programs to fill the GPU, enough of w on its way from memory in each, few enough registers."""
    if batch == 1:  # one warp owns whole rows, so nothing waits for another warp
        block = next(n for n in (4, 2, 1) if n == 1 or (o >= n * 512 and n * k <= 8192))
        return Tile(block, groups=max(1, o // (block * 2048)))
    block = 32 if o > 8192 else 16
    return Tile(block, num_warps=4 if k <= 1024 or batch > 16 else 2, num_stages=6 if batch <= 16 else 3)


@jax.jit
def attend(
    qkv: Float[Array, "B _"], k: Float[Array, "B S N H"], v: Float[Array, "B S N H"], length: Int[Array, ""]
) -> tuple[Float[Array, "B C"], Float[Array, "B S N H"], Float[Array, "B S N H"]]:
    """Attention of one new token a row over the `length` before it and itself; the caches, with it added in place."""
    batch, slots, heads, size = k.shape
    width, h_pad = min(256, pl.next_power_of_2(slots)), pl.next_power_of_2(size)

    def kernel(qkv_ref, k_ref, v_ref, length_ref, y_ref, k_out, v_out, *, interpret):
        b, n = pl.program_id(0) // heads, pl.program_id(0) % heads
        h, seen = jnp.arange(h_pad), jnp.minimum(length_ref[0], slots - 1)
        real = h < size
        q, k_new, v_new = (load(qkv_ref.at[b, (i * heads + n) * size + h], mask=real, other=0.0) for i in range(3))
        store(k_out.at[b, seen, n, h], k_new, mask=real)
        store(v_out.at[b, seen, n, h], v_new, mask=real)
        q = q.astype(jnp.float32) / math.sqrt(size)

        def chunk(i, carry):
            top, total, y = carry
            s = i * width + jnp.arange(width)
            at = (b, *jnp.broadcast_arrays(s[:, None], n, h[None, :]))
            mask = (s < seen)[:, None] & real[None, :]
            keys, values = (load(ref.at[at], mask=mask, other=0.0).astype(jnp.float32) for ref in (k_ref, v_ref))
            scores = jnp.where(s < seen, jnp.sum(keys * q[None, :], axis=1), -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores))
            p, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            y = y * shrink + jnp.sum(p[:, None] * values, axis=0)
            return new_top, total * shrink + jnp.sum(p), y

        first = jnp.sum(q * k_new.astype(jnp.float32)), jnp.float32(1.0), v_new.astype(jnp.float32)
        _, total, y = jax.lax.fori_loop(0, pl.cdiv(seen, width), chunk, first)
        store(y_ref.at[b, n * size + h], (y / total).astype(y_ref.dtype), mask=real)

    out = [((batch, heads * size), qkv.dtype), (k.shape, k.dtype), (v.shape, v.dtype)]
    args = qkv, k, v, jnp.reshape(length, 1)
    y, k, v = launch(kernel, *args, out=out, grid=batch * heads, num_warps=8, aliases={1: 1, 2: 2})
    return y, k, v
