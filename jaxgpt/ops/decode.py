"""One new token for each of a few rows: products and attention in as few kernels as possible, as starting kernels is
what costs then. No gradients.

A product's weights come as (out, in): a program then reads whole rows of them, and each weight is read once for all B
rows. The residual addition and the normalization before a product, and the activation after it, are in its kernel. Sums
are float32.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxgpt.ops.activation import ACTIVATIONS
from jaxgpt.ops.launch import available, launch, load, sigmoid, store
from jaxgpt.ops.norm import Norm, add_norm

MAX_ROWS = 64  # from here on tensor cores are busy enough without these kernels


def supports(rows: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether the kernels cover `rows` rows of one new token each: of any width, in float32 or 16 bits."""
    return rows <= MAX_ROWS and jnp.dtype(dtype).itemsize <= 4 and available()


# traced and lowered once, not once a layer
@functools.partial(jax.jit, static_argnames=("kind", "eps", "activation", "sizes", "dtype"))
def _product(x, w, bias, residual, scale, shift, *, kind, eps, activation, sizes, dtype):
    (batch, k), o = x.shape, w.shape[0]
    # tensor cores multiply 16 rows at least; for one row they would be of no use
    rows = 1 if batch == 1 else max(16, pl.next_power_of_2(batch))
    if kind and (rows > 16 or rows > 1 and k > 1024):  # too much for the registers of each program
        x = add_norm(x, None, Norm(kind, scale, shift, eps), kernels=True)[1]
        kind = scale = shift = None
    tile = _tile(batch, o, k, kind is not None)
    width = min(256, max(16, pl.next_power_of_2(k)))
    chunks, at_once = pl.cdiv(k, width), batch == 1 or (rows == 16 and k <= 1024)
    optional = {"bias": bias, "residual": residual, "scale": scale, "shift": shift}
    given = {name: array for name, array in optional.items() if array is not None}
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def kernel(x_ref, w_ref, *refs, interpret):
        ref, program = dict(zip(given, refs, strict=False)), pl.program_id(0)
        outs = refs[len(given) :]

        def columns(i):
            return i * width + jnp.arange(width)

        def chunk(source, row, limit, i):
            """Where columns i of these rows are, and which of them there are."""
            at = tuple(jnp.broadcast_arrays(row[:, None], columns(i)[None, :]))
            return source.at[at], (row < limit)[:, None] & (columns(i) < k)[None, :]

        def matrix(*which) -> Array:
            at, mask = chunk(*which)
            return load(at, mask=mask, other=0.0)

        def vector(name, i):
            return load(ref[name].at[columns(i)], mask=columns(i) < k, other=0.0)[None, :]

        def inputs(source, i):
            return matrix(source, jnp.arange(rows), batch, i)

        def some_rows(j, xs: list | None):
            """Rows j of w in this program's share. Every load comes before the first use: memory answers once.

            The inputs come first: behind w they would arrive last, and their normalization would wait for all of it.
            """
            row = (program * tile.groups + j) * tile.block + jnp.arange(tile.block)
            raw = to_normalize() if at_once and xs is None else ()
            ws = [matrix(w_ref, row, o, i) for i in range(chunks)] if at_once else []
            more = load(ref["bias"].at[row], mask=row < o, other=0.0) if bias is not None else None
            real = (jnp.arange(rows) < batch)[:, None] & (row < o)[None, :]
            at = tuple(jnp.broadcast_arrays(jnp.arange(rows)[:, None], row[None, :]))
            old = load(ref["residual"].at[at], mask=real, other=0.0) if residual is not None else None
            xs = normalized(*raw) if raw else xs or []
            if batch == 1:
                products = [a.astype(jnp.float32) * b.astype(jnp.float32) for a, b in zip(xs, ws, strict=True)]
                y = jnp.sum(functools.reduce(jnp.add, products), axis=1)[None, :]
            elif at_once:
                y = functools.reduce(jnp.add, [_dot(a, b) for a, b in zip(xs, ws, strict=True)])
            else:
                y, ws = jnp.zeros((rows, tile.block), jnp.float32), functools.partial(matrix, w_ref, row, o)
                y = jax.lax.fori_loop(0, chunks, lambda i, y: y + _dot(inputs(x_ref, i), ws(i)), y)
            y = y + more.astype(jnp.float32)[None, :] if more is not None else y
            if activation:
                y = ACTIVATIONS[activation].value(y, functools.partial(sigmoid, interpret=interpret))
            y = y + old.astype(jnp.float32) if old is not None else y
            for out, size, end in zip(outs, sizes, ends, strict=True):
                at = tuple(jnp.broadcast_arrays(jnp.arange(rows)[:, None], (row - (end - size))[None, :]))
                mask = real if len(sizes) == 1 and size == o else real & ((row >= end - size) & (row < end))[None, :]
                store(out.at[at], y.astype(out.dtype), mask=mask)

        def to_normalize():
            """x, and scale and shift if there are any, in chunks."""
            xs = [inputs(x_ref, i) for i in range(chunks)]
            scales = [vector("scale", i) if "scale" in ref else 1.0 for i in range(chunks)]
            shifts = [vector("shift", i) if "shift" in ref else 0.0 for i in range(chunks)]
            return xs, scales, shifts

        def normalized(xs, scales, shifts):
            if kind is None:
                return xs
            xs = [x.astype(jnp.float32) for x in xs]
            if kind == "layer":
                mean = jnp.sum(functools.reduce(jnp.add, xs), axis=1, keepdims=True) / k
                xs = [jnp.where((columns(i) < k)[None, :], x - mean, 0.0) for i, x in enumerate(xs)]
            square = jnp.sum(functools.reduce(jnp.add, [x * x for x in xs]), axis=1, keepdims=True)
            xs = [x * jax.lax.rsqrt(square / k + eps) for x in xs]
            return [(x * a + b).astype(w.dtype) for x, a, b in zip(xs, scales, shifts, strict=True)]

        if tile.groups == 1:
            some_rows(0, None)
        else:  # the rows of x are read, and normalized, once for all
            xs = normalized(*to_normalize())
            jax.lax.fori_loop(0, tile.groups, lambda j, _: some_rows(j, xs), None)

    outs = launch(
        kernel,
        x,
        w,
        *given.values(),
        out=[((batch, size), dtype) for size in sizes],
        grid=pl.cdiv(o, tile.block * tile.groups),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return tuple(outs)


def product(
    x: Float[Array, "B K"],
    w: Float[Array, "O K"],
    bias: Float[Array, " O"] | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Float[Array, "B O"] | None = None,
    sizes: Sequence[int] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Float[Array, "B _"], ...]:
    """residual + activation(norm(x) @ w.T + bias), each part but the product optional.

    In `dtype`, by default x's, in parts of the `sizes`, by default one; columns past their sum are left out.
    """
    scale, shift, kind, eps = (norm.scale, norm.bias, norm.kind, norm.eps) if norm else (None, None, None, 1e-5)
    options = {"kind": kind, "eps": eps, "activation": activation, "sizes": tuple(sizes or w.shape[:1])}
    return _product(x, w, bias, residual, scale, shift, dtype=jnp.dtype(dtype or x.dtype), **options)


def _dot(x, w):
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


class Tile(NamedTuple):
    """A program's share of w: `groups` times `block` rows, one after the other."""

    block: int
    groups: int = 1
    num_warps: int = 1
    num_stages: int = 3  # chunks of K on their way at a time, in the loop over K


def _tile(batch: int, o: int, k: int, normalizes: bool) -> Tile:
    """Small enough programs to fill the GPU, enough of w on its way from memory in each, few enough registers.

    Of those a thread has 255: a warp's share of a row of w takes k / 64, and of a norm's x, scale and shift k · 5 / 64.
    An H100 has 132 multiprocessors: 512 programs are four warps for each of them, 2,048 are sixteen. Four warps share
    the rows of middling width, and a norm is then their work, once for eight rows of w: gpt2-xl's queries, keys and
    values take 8.6 us, where programs of one warp and two rows take 11.2.
    """
    if batch == 1 and 1024 < k <= 4096:
        return Tile(2, groups=min(4, pl.cdiv(o, 1024)), num_warps=4) if normalizes else Tile(1, num_warps=4)
    if batch == 1:  # one warp owns whole rows, so nothing waits for another warp
        block = next(n for n in (4, 2, 1) if n == 1 or (k <= 1024 and o >= n * 512))
        return Tile(block, groups=max(1, o // (block * 2048)))
    # what a program reads of x, and normalizes, is for as many rows of w as its registers hold
    block = 32 if o > (1024 if k <= 1024 and batch <= 16 else 8192) else 16
    return Tile(block, num_warps=4 if k <= 1024 or batch > 16 else 2, num_stages=6 if batch <= 16 else 3)


def attend(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    length: Int[Array, ""],
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Attention of one new token a row over the `length` before it and itself; the caches, with it added in place.

    N heads share K heads of keys and values, N / K each. window: over the last `window` tokens alone, itself included.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _attend(q, k, v, keys, values, length, window=window, scale=scale)


@functools.partial(jax.jit, static_argnames=("window", "scale"))
def _attend(q, k, v, keys, values, length, *, window, scale):
    batch, slots, kv_heads, size = keys.shape
    heads = q.shape[1]
    width, h_pad = min(256, pl.next_power_of_2(slots)), pl.next_power_of_2(size)

    def kernel(q_ref, k_ref, v_ref, keys_ref, values_ref, length_ref, y_ref, keys_out, values_out, *, interpret):
        b, n = pl.program_id(0) // heads, pl.program_id(0) % heads
        shared = n // (heads // kv_heads)
        h, seen = jnp.arange(h_pad), jnp.minimum(length_ref[0], slots - 1)
        real = h < size
        q = load(q_ref.at[b, n, h], mask=real, other=0.0).astype(jnp.float32) * scale
        k_new, v_new = (load(ref.at[b, shared, h], mask=real, other=0.0) for ref in (k_ref, v_ref))
        store(keys_out.at[b, seen, shared, h], k_new, mask=real)  # heads that share it write the same
        store(values_out.at[b, seen, shared, h], v_new, mask=real)
        first_seen = 0 if window is None else jnp.maximum(seen - (window - 1), 0)

        def chunk(i, carry):
            top, total, y = carry
            s = i * width + jnp.arange(width)
            at = (b, *jnp.broadcast_arrays(s[:, None], shared, h[None, :]))
            visible = (s < seen) & (s >= first_seen)
            mask = visible[:, None] & real[None, :]
            ks, vs = (load(ref.at[at], mask=mask, other=0.0).astype(jnp.float32) for ref in (keys_ref, values_ref))
            scores = jnp.where(visible, jnp.sum(ks * q[None, :], axis=1), -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores))
            p, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            y = y * shrink + jnp.sum(p[:, None] * vs, axis=0)
            return new_top, total * shrink + jnp.sum(p), y

        first = jnp.sum(q * k_new.astype(jnp.float32)), jnp.float32(1.0), v_new.astype(jnp.float32)
        _, total, y = jax.lax.fori_loop(first_seen // width, pl.cdiv(seen, width), chunk, first)
        store(y_ref.at[b, n, h], (y / total).astype(y_ref.dtype), mask=real)

    out = [(q.shape, q.dtype), (keys.shape, keys.dtype), (values.shape, values.dtype)]
    args = q, k, v, keys, values, jnp.reshape(length, 1)
    return tuple(launch(kernel, *args, out=out, grid=batch * heads, num_warps=8, aliases={3: 1, 4: 2}))
