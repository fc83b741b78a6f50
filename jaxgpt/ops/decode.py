"""One token's way through a GPT in as few kernels as possible: when a few rows decode, starting kernels is what costs.

A layer is five of them (`linear` four times, `attend` once), a token 5 L + 3. Weights come as (out, in): a program then
reads whole rows of them, and each weight is read once for all B rows. Sums are float32.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxgpt.ops.launch import launch, load, store

Norm = tuple[Float[Array, " K"], Float[Array, " K"] | None]  # scale and bias of a layer norm


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
    k_pad = pl.next_power_of_2(k)
    block, num_warps = _tile(o, k_pad)
    optional = {"scale": norm and norm[0], "shift": norm and norm[1], "bias": bias, "residual": residual}
    given = {name: array for name, array in optional.items() if array is not None}

    def kernel(x_ref, w_ref, *refs, interpret):
        ref = dict(zip(given, refs, strict=False))
        rows, columns = pl.program_id(0) * block + jnp.arange(block), jnp.arange(k_pad)
        inside, in_rows = columns < k, rows < o
        both = in_rows[:, None] & inside[None, :]
        at = jnp.broadcast_arrays(rows[:, None], columns[None, :])
        weights = load(w_ref.at[tuple(at)], mask=both, other=0.0).astype(jnp.float32)

        def read(name, index, mask):
            return load(ref[name].at[index], mask=mask, other=0.0).astype(jnp.float32)

        def one_row(b, _):
            row = load(x_ref.at[b, columns], mask=inside, other=0.0).astype(jnp.float32)
            if norm is not None:
                row = jnp.where(inside, row - jnp.sum(row) / k, 0.0)
                row = row * jax.lax.rsqrt(jnp.sum(row * row) / k + 1e-5) * read("scale", columns, inside)
                row = row + read("shift", columns, inside) if "shift" in ref else row
                row = row.astype(x.dtype).astype(jnp.float32)
            y = jnp.sum(weights * row[None, :], axis=1)
            y = y + read("bias", rows, in_rows) if "bias" in ref else y
            if activation:
                y = jax.nn.gelu(y, approximate=True)
            y = y + read("residual", (b, rows), in_rows) if "residual" in ref else y
            store(refs[-1].at[b, rows], y.astype(refs[-1].dtype), mask=in_rows)
            return 0

        jax.lax.fori_loop(0, batch, one_row, 0)

    out = [((batch, o), dtype or x.dtype)]
    return launch(kernel, x, w, *given.values(), out=out, grid=pl.cdiv(o, block), num_warps=num_warps)[0]


def _tile(o: int, k: int) -> tuple[int, int]:
    """Rows of w for a program, and its warps: enough programs to fill the GPU, enough of w in flight in each."""
    block = 4 if o * k <= 1 << 22 else 8
    return block, min(8, max(1, block * k // 1024))


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
