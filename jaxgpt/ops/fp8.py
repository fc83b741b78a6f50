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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxgpt.ops.activation import ACTIVATIONS
from jaxgpt.ops.launch import available, barrier, launch, load, sigmoid, store
from jaxgpt.ops.norm import Norm, add_norm_gradient, add_norm_plain
from jaxgpt.ops.norm import add_norm as add_norm_unrounded
from jaxgpt.ops.paths import note

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MULTIPLE = 64  # of rows and columns, for the kernel; cuBLAS wants 16
SAMPLED, HEADROOM = 64, 4.0  # every 64th row, or more where these are fewer than 1,024
# Of a program that rounds. On an H100 ten shapes of 32 to 128 rows and 64 to 256 columns are within 9% of each other
TILE_ROWS, TILE_COLUMNS, TILE_WARPS = 64, 128, 4
# Of a program that normalizes as well: 0.187 ms for 65,536 × 768, where 64 × 128 by 4 warps takes 0.208
NORM_ROWS, NORM_COLUMNS, NORM_WARPS = 64, 256, 8


def scale_for(x: Float[Array, "M *N"], dtype, headroom: float = 1.0) -> Float[Array, ""]:
    """The largest power of two that leaves x `headroom` times below dtype's top; 0 if x holds an infinity.

    Exact, being exponent bits alone: one in 16 values of bfloat16 lies halfway between two of e4m3, and an error in the
    last place, as exp2 has, would round all of these in one direction.
    """
    largest = jnp.maximum(jnp.max(jnp.abs(x)).astype(jnp.float32), 1e-30)
    bits = jax.lax.bitcast_convert_type(float(jnp.finfo(dtype).max) / headroom / largest, jnp.int32)
    return jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)


def round_to(x: Float[Array, "M *N"], scale: Float[Array, ""] | float, dtype) -> Float[Array, "M *N"]:
    """x * scale in an FP8 dtype, saturating."""
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) * scale, -top, top).astype(dtype)


def round_weight(w: Float[Array, "K *N"]) -> tuple[Float[Array, "K *N"], Float[Array, ""]]:
    """w in e4m3 and the factor that it was multiplied with."""
    scale = scale_for(w, E4M3)
    return round_to(w, scale, E4M3), scale


def identity(x, _sigmoid=None):
    return x


def both_orders(
    function, dtype, *arrays: Float[Array, "M N"], kernel: bool, parts: int = 1, sampled: bool = True
) -> tuple[Float[Array, "M N2"], Float[Array, "N2 M"], Float[Array, ""]]:
    """function(*arrays) in an FP8 dtype, that transposed, and the factor. function takes and gives float32.

    parts: function of arrays[0::parts], of arrays[1::parts] and so on, the results beside each other in one matrix.
    sampled: the factor comes from a sample of the rows, with headroom; else from all, with none.
    """

    def apply(arrays):
        arrays = [a.astype(jnp.float32) for a in arrays]
        results = [function(*arrays[i::parts]) for i in range(parts)]
        return results[0] if parts == 1 else jnp.concatenate(results, axis=1)

    m, n = arrays[0].shape
    step = max(1, min(SAMPLED, m // 1024)) if sampled else 1
    scale = scale_for(apply([a[::step] for a in arrays]), dtype, HEADROOM if sampled else 1.0)
    if kernel and tiles_support(m, n, arrays[0].dtype, parts):
        return *_tiles(arrays, scale, function=function, dtype=dtype, parts=parts), scale
    q = round_to(apply(arrays), scale, dtype)
    q = jax.lax.optimization_barrier(q)  # or function would be computed for each order
    return q, q.T, scale


def transpose(x: Float[Array, "M N"], *, kernel: bool) -> Float[Array, "N M"]:
    """x.T as an array of its own."""
    m, n = x.shape
    if kernel and tiles_support(m, n, x.dtype):
        return _tiles((x,), None, function=identity, dtype=x.dtype)[0]
    return x.T


def tiles_support(m: int, n: int, dtype: jax.typing.DTypeLike, parts: int = 1) -> bool:
    """Whether the kernel covers (m, n) matrices: whole tiles alone, and Pallas' offsets, in bytes, have 31 bits."""
    small = m * n * parts * jnp.dtype(dtype).itemsize < 2**31
    return m % MULTIPLE == n % MULTIPLE == 0 and small and available()


# jitted so that a model traces and lowers it once, not once a layer
@functools.partial(jax.jit, static_argnames=("function", "dtype", "parts"))
def _tiles(arrays, scale, *, function, dtype, parts=1):
    """function(*arrays) * scale and that transposed; with no scale, the (only) array transposed as it is."""
    m, n = arrays[0].shape
    rows, columns = math.gcd(m, TILE_ROWS), math.gcd(n, TILE_COLUMNS)

    def kernel(*refs, interpret):
        tile = pl.program_id(0)
        row = tile // (n // columns) * rows + jnp.arange(rows)[:, None]
        column = tile % (n // columns) * columns + jnp.arange(columns)[None, :]
        row, column = jnp.broadcast_arrays(row, column)
        blocks = [load(ref.at[row, column]) for ref in refs[: len(arrays)]]
        for i in range(parts):
            q, to = blocks[i], column + i * n
            if scale is not None:
                inputs = [block.astype(jnp.float32) for block in blocks[i::parts]]
                y = function(*inputs, functools.partial(sigmoid, interpret=interpret))
                q = _round_in_kernel(y, refs[len(arrays)][0], dtype, interpret)
                store(refs[-2].at[row, to], q)
            store(refs[-1].at[to, row], q)

    kernel.__name__ = "fp8_" + ("transpose" if scale is None else function.__name__)  # what profiles show
    outs = [((m, n * parts), dtype)] * (scale is not None) + [((n * parts, m), dtype)]
    args = arrays if scale is None else (*arrays, scale.reshape(1))
    return launch(kernel, *args, out=outs, grid=m * n // (rows * columns), num_warps=TILE_WARPS)


def _round_in_kernel(y, factor, dtype, interpret):
    # compiled, the cast itself saturates and NaN stays NaN, which the minimum in a kernel would not keep
    return round_to(y, factor, dtype) if interpret else (y * factor).astype(dtype)


def dot(
    a: Float[Array, "M K"],
    b: Float[Array, "N K"],
    scale: Float[Array, ""],
    dtype: jax.typing.DTypeLike,
    exact: bool = False,
) -> Float[Array, "M N"]:
    """a @ b.T / scale in dtype, in the form by which XLA knows an FP8 product. scale: the product of the operands' two.

    Sums of more than 4,096 terms, or all if exact, are in float32; cuBLAS adds up shorter ones faster, to some 14 bits.
    """
    # A slice would be moved behind the conversion, and the product be one of bfloat16
    a, b = jax.lax.optimization_barrier((a, b))
    b = b.astype(jnp.bfloat16) * (1 / scale).astype(jnp.bfloat16)
    return jax.lax.dot_general(
        a.astype(jnp.bfloat16),
        b,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact or a.shape[1] > 4096 else None,
        preferred_element_type=dtype,
    )


class Quantized(NamedTuple):
    """A matrix in e4m3, as it is and transposed, for the products that take it and for those of their gradients.

    value: the matrix in the computation's dtype, which carries its gradient. XLA computes it only where it is read.
    """

    value: Float[Array, "M N"]
    rows: Float[Array, "M N"]
    columns: Float[Array, "N M"]
    scale: Float[Array, ""]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def quantize(x: Float[Array, "M N"], kernels: bool) -> Quantized:
    """x in e4m3, once for all products that take it."""
    return Quantized(x, *both_orders(identity, E4M3, x, kernel=kernels))


quantize.defvjp(lambda x, kernels: (quantize(x, kernels), None), lambda kernels, _, dy: (dy.value,))


def add_norm(
    x: Float[Array, "M C"], branch: Float[Array, "M C"] | None, norm: Norm, *, kernels: bool
) -> tuple[Float[Array, "M C"], Quantized]:
    """`norm.add_norm` with its normalization rounded, in one pass over memory if the kernel covers the shape."""
    m, c = x.shape
    if not (kernels and tiles_support(m, c, x.dtype)):
        residual, normed = add_norm_unrounded(x, branch, norm, kernels=kernels)
        return residual, quantize(normed, kernels)
    note("norm", "kernel")
    return _add_norm(x, branch, norm.scale, norm.bias, norm.kind, norm.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _add_norm(x, branch, scale, bias, kind: str, eps: float):
    return _add_norm_forward(x, branch, scale, bias, kind, eps)[0]


def _add_norm_forward(x, branch, scale, bias, kind, eps):
    step = max(1, min(SAMPLED, x.shape[0] // 1024))
    sample = add_norm_plain(x[::step], None if branch is None else branch[::step], scale, bias, kind, eps)[1]
    factor = scale_for(sample, E4M3, HEADROOM)
    residual, rows, columns = _add_norm_kernel(x, branch, scale, bias, factor, kind=kind, eps=eps)
    value = add_norm_plain(residual, None, scale, bias, kind, eps)[1]
    return (residual, Quantized(value, rows, columns, factor)), (residual, branch is not None, scale, bias)


def _add_norm_backward(kind, eps, saved, cotangents):
    d_residual, d_normed = cotangents
    return add_norm_gradient(kind, eps, True, saved, (d_residual, d_normed.value))


_add_norm.defvjp(_add_norm_forward, _add_norm_backward)


@functools.partial(jax.jit, static_argnames=("kind", "eps"))
def _add_norm_kernel(x, branch, scale, bias, factor, *, kind, eps):
    """x + branch, and its normalization times factor in e4m3, as it is and transposed."""
    m, c = x.shape
    width = math.gcd(c, NORM_COLUMNS)
    optional = {"branch": branch, "scale": scale, "bias": bias}
    given = {name: array for name, array in optional.items() if array is not None}

    def kernel(x_ref, factor_ref, *refs, interpret):
        ref, outs = dict(zip(given, refs, strict=False)), refs[len(given) :]
        rows_ref, columns_ref, *residual_ref = outs
        row = pl.program_id(0) * NORM_ROWS + jnp.arange(NORM_ROWS)[:, None]

        def at(i):
            return tuple(jnp.broadcast_arrays(row, i * width + jnp.arange(width)[None, :]))

        def add(i, carry):
            """Adds a tile and merges its mean and squared deviations with those before it (Chan et al. 1979)."""
            mean, square = carry
            tile = load(x_ref.at[at(i)])
            if residual_ref:
                tile = (tile + load(ref["branch"].at[at(i)])).astype(x.dtype)
                store(residual_ref[0].at[at(i)], tile)
            tile = tile.astype(jnp.float32)
            if kind == "rms":
                return mean, square + jnp.sum(tile * tile, 1)
            own = jnp.sum(tile, 1) * (1 / width)
            centered, away = tile - own[:, None], own - mean
            share = 1 / (i + 1).astype(jnp.float32)
            square = square + jnp.sum(centered * centered, 1) + away * away * (width * i.astype(jnp.float32) * share)
            return mean + away * share, square

        zeros = jnp.zeros(NORM_ROWS, jnp.float32)
        mean, square = jax.lax.fori_loop(0, c // width, add, (zeros, zeros))
        rstd = jax.lax.rsqrt(square * (1 / c) + eps)
        barrier(interpret)  # what other threads stored is read below

        def normalize(i, _):
            tile = load((residual_ref[0] if residual_ref else x_ref).at[at(i)]).astype(jnp.float32)
            y = (tile - mean[:, None]) * rstd[:, None]
            column = i * width + jnp.arange(width)
            if scale is not None:
                y = y * load(ref["scale"].at[column])[None, :]
            if bias is not None:
                y = y + load(ref["bias"].at[column])[None, :]
            y = y.astype(x.dtype).astype(jnp.float32)  # rounded as without this kernel
            q = _round_in_kernel(y, factor_ref[0], E4M3, interpret)
            r, column = at(i)
            store(rows_ref.at[r, column], q)
            store(columns_ref.at[column, r], q)

        jax.lax.fori_loop(0, c // width, normalize, None)

    kernel.__name__ = "norm_to_fp8"  # what profiles show
    outs = [((m, c), E4M3), ((c, m), E4M3)] + [((m, c), x.dtype)] * (branch is not None)
    args = x, factor.reshape(1), *given.values()
    rows, columns, *residual = launch(kernel, *args, out=outs, grid=m // NORM_ROWS, num_warps=NORM_WARPS)
    return residual[0] if residual else x, rows, columns


def supports(x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> bool:
    """Whether (M, K) times (K, *G, N) can be done in FP8: cuBLAS takes multiples of 16."""
    return all(size % 16 == 0 for size in (*x_shape, w_shape[0], w_shape[-1]))


def linear(
    x: Float[Array, "M K"] | Quantized,
    w: Float[Array, "K *G N"],
    b: Float[Array, "*G N"] | None = None,
    *,
    activation: str | None = None,
    kernels: bool = False,
) -> Any:
    """activation(x @ w + b), the product and its gradients' two in FP8; a w of (K, G, N) gives G matrices (M, N).

    With an activation (a key of ACTIVATIONS) the result is Quantized: rounded in the pass that activates. The next
    product's gradient goes through the activation in the pass that rounds it.
    """
    x = x if isinstance(x, Quantized) else quantize(x, kernels)
    w = w.astype(jnp.float32)
    if activation is None:
        ys: Any = _linear(x, w, None, None, kernels)
        biases = [None] * len(ys) if b is None else [b] if w.ndim == 2 else list(b)
        ys = tuple(y if b is None else y + b.astype(y.dtype) for y, b in zip(ys, biases, strict=True))
    else:  # the bias is in the same pass as the activation, and its gradient the sum of what that pass gives
        ys: Any = _linear(x, w, None if b is None else b.astype(jnp.float32), activation, kernels)
    return ys[0] if w.ndim == 2 else ys


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(x, w, b, activation: str | None, kernels: bool):
    return _forward(x, w, b, activation, kernels)[0]


def _forward(x, w, b, activation, kernels):
    n = w.shape[-1]
    flat = w.reshape(w.shape[0], -1)
    wq, wq_t, w_scale = both_orders(identity, E4M3, flat, kernel=kernels, sampled=False)
    parts = [wq_t[i : i + n] for i in range(0, flat.shape[1], n)]
    # Several at once are queries, keys and values: added up to 14 bits they left 124M's loss after 1,200 steps 0.014
    # above bfloat16's, so 0.004 (docs/performance.md), in no more time
    exact = len(parts) > 1
    hs = tuple(dot(x.rows, part, w_scale * x.scale, x.value.dtype, exact) for part in parts)
    if b is not None:
        hs = tuple(h + part.astype(h.dtype) for h, part in zip(hs, b.reshape(len(hs), -1), strict=True))
    saved = x.columns, x.scale, wq, w_scale, None if activation is None else hs, w.shape[1:], b is not None
    if activation is None:
        return hs, saved
    value = ACTIVATIONS[activation].value
    values = [value(h.astype(jnp.float32)).astype(h.dtype) for h in hs]
    rounded = [both_orders(value, E4M3, h, kernel=kernels) for h in hs]
    return tuple(Quantized(v, *r) for v, r in zip(values, rounded, strict=True)), saved


def _backward(activation, kernels, saved, dys):
    x_columns, x_scale, wq, w_scale, hs, shape, has_bias = saved
    if activation is None:
        function, arrays = identity, dys
    else:
        dys = [dy.value for dy in dys]
        function, arrays = ACTIVATIONS[activation].gradient, [*hs, *dys]
    dq, dq_t, scale = both_orders(function, E5M2, *arrays, kernel=kernels, parts=len(dys))
    dx = dot(dq, wq, w_scale * scale, dys[0].dtype)
    dw = dot(x_columns, dq_t, x_scale * scale, jnp.float32).reshape(-1, *shape)
    db = (dq_t.astype(jnp.float32).sum(1) / scale).reshape(shape) if has_bias else None
    return Quantized(dx, None, None, None), dw, db  # type: ignore[arg-type]  # None: no gradient


_linear.defvjp(_forward, _backward)
