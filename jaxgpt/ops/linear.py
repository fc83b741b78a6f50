"""Products with a weight matrix, and what surrounds them: residual addition and normalization before, activation after.

`linear` and `add_norm_linear` are what models are written in. In training they are plain products, or FP8's (fp8.py),
after the norm's kernel (norm.py). When one new token for each of a few rows is decoded they are one kernel (decode.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxgpt.ops import decode, fp8, matmul
from jaxgpt.ops.activation import activate
from jaxgpt.ops.fan_out import products
from jaxgpt.ops.norm import Norm, add_norm
from jaxgpt.ops.paths import note
from jaxgpt.sharding import on_parts, splits


class Fast(NamedTuple):
    """Which fast paths a caller wishes; each op's `supports` says whether it has one for the case at hand."""

    kernels: bool = False  # GPU kernels in place of their plain twins
    fp8: bool = False  # products and their gradients in 8-bit floats
    decode: bool = False  # each row is one new token and no gradient is wanted


PLAIN = Fast()


def linear(
    x: Float[Array, "M K"] | fp8.Quantized | matmul.Activated,
    w: Float[Array, "K *G N"],
    b: Float[Array, "*G N"] | None = None,
    *,
    activation: str | None = None,
    to_linear: bool = False,
    residual: Float[Array, "M N"] | None = None,
    columns: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    fast: Fast = PLAIN,
) -> Any:
    """activation(x @ w + b), (M, N) in `dtype`, by default x's; a w of (K, G, N) gives a tuple of G such matrices.

    activation: a key of activation.ACTIVATIONS. to_linear: its result goes to `linear` alone, which may get it as
    Quantized or Activated then, and be quicker. columns: the first so many columns of the result alone, for a w of
    (K, N).

    residual: the residual stream, to which this is a branch. The result then is the pair (stream, branch) that
    `add_norm_linear` takes next: with the branch unadded, or, decoding, with it in the stream and None in its place.
    """
    plain = w.ndim == 2 and columns is dtype is None and not fast.fp8
    if isinstance(x, matmul.Activated):
        if plain:
            y = _finish(matmul.product(x, w.astype(x.value.dtype)), b, activation, fast)
            return y if residual is None else (residual, y)
        x = x.array()
    if residual is not None:
        if _decodes(x, fast):
            return _decoded(x, None, w, b, activation, dtype, columns, residual), None
        if not isinstance(x, fp8.Quantized) and columns is None and splits(x.shape[0], w.shape[0]):
            return residual, _rows_split(x, w, b, activation, dtype, fast)
        options = {"activation": activation, "to_linear": to_linear, "columns": columns, "dtype": dtype}
        return residual, linear(x, w, b, **options, fast=fast)
    if isinstance(x, fp8.Quantized) or _in_fp8(x, w, fast):
        assert columns is None and dtype is None
        note("products", "fp8")
        y = fp8.linear(x, w, b, activation=activation, kernels=fast.kernels)
        if to_linear or activation is None:
            return y
        return y.value if isinstance(y, fp8.Quantized) else tuple(part.value for part in y)
    if _decodes(x, fast):
        return _decoded(x, None, w, b, activation, dtype, columns)
    note("products", x.dtype.name)
    w = w.astype(x.dtype)
    if (
        activation
        and to_linear
        and plain
        and fast.kernels
        and matmul.supports(x.shape[0], x.shape[1], w.shape[1], x.dtype)
    ):
        return matmul.activated_product(x, w, None if b is None else b.astype(x.dtype), activation)
    if w.ndim == 2:
        return _finish(jnp.matmul(x, w, preferred_element_type=dtype), b, activation, fast)[:, :columns]
    ys = products(x, w, dtype, kernels=fast.kernels)
    return tuple(_finish(y, None if b is None else b[i], activation, fast) for i, y in enumerate(ys))


def add_norm_linear(
    x: Float[Array, "M K"],
    branch: Float[Array, "M K"] | None,
    norm: Norm,
    w: Float[Array, "K *G N"],
    b: Float[Array, "*G N"] | None = None,
    *,
    activation: str | None = None,
    to_linear: bool = False,
    fast: Fast = PLAIN,
) -> tuple[Float[Array, "M K"], Any]:
    """x + branch, and `linear` of its normalization: what begins every branch of a pre-norm transformer.

    branch: the previous branch's output, or None. Taking it unadded lets one kernel add and normalize.
    """
    if _decodes(x, fast):
        x = x if branch is None else x + branch
        return x, _decoded(x, norm, w, b, activation)
    if splits(x.shape[0], w.shape[-1]):
        return _columns_split(x, branch, norm, w, b, activation, fast)
    if _in_fp8(x, w, fast):
        x, y = fp8.add_norm(x, branch, norm, kernels=fast.kernels)
    else:
        x, y = add_norm(x, branch, norm, kernels=fast.kernels)
    return x, linear(y, w, b, activation=activation, to_linear=to_linear, fast=fast)


# Over `tensor` a branch is split as Megatron-LM splits it, with sequence parallelism (arXiv 2205.05198): each device
# normalizes its share of the rows, gathers all of them, and multiplies them with its columns of the first matrix; the
# products with its rows of the last one are then added up, and each device gets its share of those rows. The compiler
# alone would send the gradients of queries, keys and values one by one, and it cannot split a kernel.


def _columns_split(x, branch, norm, w, b, activation, fast):
    def run(x, branch, scale, bias, w, b):
        x, y = add_norm(x, branch, norm._replace(scale=scale, bias=bias), kernels=fast.kernels)
        y = jax.lax.all_gather(y, "tensor", axis=0, tiled=True)
        return x, linear(y, w, b, activation=activation, fast=fast)

    rows, columns = P("tensor"), P(*[None] * (w.ndim - 1), "tensor")
    specs = rows, rows, P(), P(), columns, P(*columns[1:])
    return on_parts(run, specs, (rows, P(None, "tensor")))(x, branch, norm.scale, norm.bias, w, b)


def _rows_split(x, w, b, activation, dtype, fast):
    def run(x, w, b):
        y = jax.lax.psum_scatter(linear(x, w, dtype=dtype, fast=fast), "tensor", scatter_dimension=0, tiled=True)
        return _finish(y, b, activation, fast)

    specs = P(None, "tensor"), P("tensor"), P()
    return on_parts(run, specs, P("tensor"))(x, w, b)


def _finish(y, b, activation, fast):
    y = y if b is None else y + b.astype(y.dtype)
    return activate(y, activation, kernels=fast.kernels) if activation else y


def _in_fp8(x, w, fast: Fast) -> bool:
    return fast.fp8 and not fast.decode and fp8.supports(x.shape, w.shape)


def _decodes(x, fast: Fast) -> bool:
    return not isinstance(x, fp8.Quantized) and fast.decode and fast.kernels and decode.supports(x.shape[0], x.dtype)


def _decoded(x, norm, w, b, activation, dtype=None, columns=None, residual=None):
    note("products", "kernel")
    # weights that are prepared for decoding lie transposed already, and the compiler cancels the two transpositions
    rows = w.astype(x.dtype).reshape(w.shape[0], -1).T
    sizes = (columns or w.shape[-1],) * (1 if w.ndim == 2 else w.shape[1])
    b = None if b is None else b.reshape(-1)
    options = {"norm": norm, "activation": activation, "residual": residual, "sizes": sizes, "dtype": dtype}
    ys = decode.product(x, rows, b, **options)
    return ys[0] if w.ndim == 2 else ys
