"""Matrix products of 8-bit floats, e4m3 for values and e5m2 for gradients, summed in float32.

The hardware takes both operands with the summed dimension contiguous, so what a weight's gradient sums over rows is
needed in both orders. One kernel applies a pointwise function, rounds, and writes both. Formats and their uses:
Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv 2209.05433.

Each matrix is multiplied with a power of two before it is rounded. A weight's takes its largest magnitude just below
the format's. That of activations and of gradients leaves a factor of 4 above the largest magnitude in a sample of their
rows; what is larger still saturates. A NaN stays one. An infinity in a weight or in the sample makes the whole product
non-finite. One in another row saturates, which hides none: layer norms, where activations come from, turn infinities
into NaN, and what is not finite in a gradient goes around the MLP, too, along the residual stream.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxgpt.ops.gelu import gelu_gradient, gelu_value
from jaxgpt.ops.launch import launch, load, sigmoid, store

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MULTIPLE = 64  # of rows and columns, for the kernel; cuBLAS wants 16
SAMPLED, HEADROOM = 64, 4.0  # every 64th row, or more where these are fewer than 1,024
NUM_WARPS = 4


def scale_for(x: Float[Array, "M N"], dtype, headroom: float = 1.0) -> Float[Array, ""]:
    """The largest power of two that leaves x `headroom` times below dtype's top; 0 if x holds an infinity.

    Exact, being exponent bits alone: one in 16 values of bfloat16 lies halfway between two of e4m3, and an error in the
    last place, as exp2 has, would round all of these in one direction.
    """
    largest = jnp.maximum(jnp.max(jnp.abs(x)).astype(jnp.float32), 1e-30)
    bits = jax.lax.bitcast_convert_type(float(jnp.finfo(dtype).max) / headroom / largest, jnp.int32)
    return jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)


def round_to(x: Float[Array, "M N"], scale: Float[Array, ""] | float, dtype) -> Float[Array, "M N"]:
    """x * scale in an FP8 dtype, saturating."""
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) * scale, -top, top).astype(dtype)


def round_weight(w: Float[Array, "K N"]) -> tuple[Float[Array, "K N"], Float[Array, ""]]:
    """w in e4m3 and the factor that it was multiplied with."""
    scale = scale_for(w, E4M3)
    return round_to(w, scale, E4M3), scale


def identity(x, _sigmoid=None):
    return x


def both_orders(
    function, dtype, *arrays: Float[Array, "M N"], kernel: bool
) -> tuple[Float[Array, "M N"], Float[Array, "N M"], Float[Array, ""]]:
    """function(*arrays) in an FP8 dtype, that transposed, and the factor. function takes and gives float32."""
    m, n = arrays[0].shape
    step = max(1, min(SAMPLED, m // 1024))
    scale = scale_for(function(*(a[::step].astype(jnp.float32) for a in arrays)), dtype, HEADROOM)
    if kernel and fits(m, n, arrays[0].dtype.itemsize):
        return *_tiles(function, dtype, scale, *arrays), scale
    q = round_to(function(*(a.astype(jnp.float32) for a in arrays)), scale, dtype)
    q = jax.lax.optimization_barrier(q)  # or function would be computed for each order
    return q, q.T, scale


def transpose(x: Float[Array, "M N"], *, kernel: bool) -> Float[Array, "N M"]:
    """x.T as an array of its own."""
    m, n = x.shape
    return _tiles(identity, x.dtype, None, x)[0] if kernel and fits(m, n, x.dtype.itemsize) else x.T


def fits(m: int, n: int, itemsize: int) -> bool:
    """Whole tiles alone, and Pallas' offsets, in bytes, have 31 bits."""
    return m % MULTIPLE == n % MULTIPLE == 0 and m * n * itemsize < 2**31


@functools.partial(jax.jit, static_argnums=(0, 1))  # so that a model traces and lowers it once, not once a layer
def _tiles(function, dtype, scale, *arrays):
    """function(*arrays) * scale and that transposed; with no scale, the (only) array transposed as it is."""
    m, n = arrays[0].shape
    rows, columns = MULTIPLE, math.gcd(n, 128)

    def kernel(*refs, interpret):
        tile = pl.program_id(0)
        row = tile // (n // columns) * rows + jnp.arange(rows)[:, None]
        column = tile % (n // columns) * columns + jnp.arange(columns)[None, :]
        row, column = jnp.broadcast_arrays(row, column)
        blocks = [load(ref.at[row, column]) for ref in refs[: len(arrays)]]
        q = blocks[0]
        if scale is not None:
            y = function(*(b.astype(jnp.float32) for b in blocks), functools.partial(sigmoid, interpret=interpret))
            # compiled, the cast itself saturates and NaN stays NaN, which the minimum in a kernel would not keep
            factor = refs[len(arrays)][0]
            q = round_to(y, factor, dtype) if interpret else (y * factor).astype(dtype)
            store(refs[-2].at[row, column], q)
        store(refs[-1].at[column, row], q)

    kernel.__name__ = "fp8_" + ("transpose" if scale is None else function.__name__)  # what profiles show
    outs = [((m, n), dtype)] * (scale is not None) + [((n, m), dtype)]
    args = arrays if scale is None else (*arrays, scale.reshape(1))
    return launch(kernel, *args, out=outs, grid=m * n // (rows * columns), num_warps=NUM_WARPS)


def dot(
    a: Float[Array, "M K"], b: Float[Array, "N K"], scale: Float[Array, ""], dtype: jax.typing.DTypeLike
) -> Float[Array, "M N"]:
    """a @ b.T / scale in dtype, in the form by which XLA knows an FP8 product. scale: the product of the operands' two.

    Sums of more than 4,096 terms are in float32; cuBLAS adds up shorter ones faster, to some 14 bits.
    """
    b = b.astype(jnp.bfloat16) * (1 / scale).astype(jnp.bfloat16)
    return jax.lax.dot_general(
        a.astype(jnp.bfloat16),
        b,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.shape[1] > 4096 else None,
        preferred_element_type=dtype,
    )


def mlp(
    x: Float[Array, "M C"],
    w_fc: Float[Array, "C F"],
    b_fc: Float[Array, " F"] | None,
    w_proj: Float[Array, "F C"],
    *,
    kernel: bool = False,
) -> Float[Array, "M C"]:
    """gelu(x @ w_fc + b_fc) @ w_proj in x's dtype, the two products and the four of its gradient in FP8."""
    w_fc, w_proj = w_fc.astype(jnp.float32), w_proj.astype(jnp.float32)
    return _mlp(x, w_fc, None if b_fc is None else b_fc.astype(jnp.float32), w_proj, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _mlp(x, w_fc, b_fc, w_proj, kernel: bool):
    return _forward(x, w_fc, b_fc, w_proj, kernel)[0]


def _forward(x, w_fc, b_fc, w_proj, kernel):
    (w1, w1_scale), (w2, w2_scale) = round_weight(w_fc), round_weight(w_proj)
    xq, xq_t, x_scale = both_orders(identity, E4M3, x, kernel=kernel)
    h = dot(xq, w1.T, w1_scale * x_scale, x.dtype)
    if b_fc is not None:
        h = h + b_fc.astype(x.dtype)
    aq, aq_t, a_scale = both_orders(gelu_value, E4M3, h, kernel=kernel)
    y = dot(aq, w2.T, w2_scale * a_scale, x.dtype)
    return y, (h, xq_t, x_scale, aq_t, a_scale, w1, w1_scale, w2, w2_scale, b_fc is not None)


def _backward(kernel, saved, dy):
    h, xq_t, x_scale, aq_t, a_scale, w1, w1_scale, w2, w2_scale, has_bias = saved
    dq, dq_t, dy_scale = both_orders(identity, E5M2, dy, kernel=kernel)
    da = dot(dq, w2, w2_scale * dy_scale, dy.dtype)
    dw2 = dot(aq_t, dq_t, a_scale * dy_scale, jnp.float32)
    dhq, dhq_t, dh_scale = both_orders(gelu_gradient, E5M2, h, da, kernel=kernel)
    dx = dot(dhq, w1, w1_scale * dh_scale, dy.dtype)
    dw1 = dot(xq_t, dhq_t, x_scale * dh_scale, jnp.float32)
    db = dhq_t.astype(jnp.float32).sum(1) / dh_scale if has_bias else None
    return dx, dw1, db, dw2


_mlp.defvjp(_forward, _backward)
