"""The one place that names Pallas' Triton backend: runs a kernel compiled on a GPU, interpreted on a CPU.

JAX 0.12 still has the backend and warns that a later release will not. Where it is missing a warning says
so, once, and every op runs its plain twin.
"""

import functools
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxgpt.sharding import tensor_parts

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

# MLIR asks for the Python module of a value's dialect until it finds one, and Triton's has none there: looking for it,
# 400 times in a step, took 0.06 to 0.1 s of a start. One that a later jaxlib may have is left alone
_DIALECT = "jaxlib.mlir.dialects.tt"
if triton and _DIALECT not in sys.modules and importlib.util.find_spec(_DIALECT) is None:
    sys.modules[_DIALECT] = ModuleType(_DIALECT)

# Said at each lowering of a kernel. To be removed with the backend: `available` then is false, and warns in its stead.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def available() -> bool:
    """Whether a kernel can run: this JAX has what they are written in, and the compiler need not split them."""
    return tensor_parts() == 1 and _installed()


@functools.cache  # one warning
def _installed() -> bool:
    if triton is None:
        warnings.warn(f"jax {jax.__version__} has no Pallas Triton backend: plain JAX runs instead", stacklevel=2)
    return triton is not None


def launch(
    kernel: Callable[..., None],
    *args: Array,
    out: Sequence[tuple[tuple[int, ...], jax.typing.DTypeLike]],
    grid: int,
    in_specs: Sequence[pl.BlockSpec] | None = None,
    out_specs: Sequence[pl.BlockSpec] | None = None,
    num_warps: int,
    num_stages: int = 3,
    aliases: dict[int, int] | None = None,
) -> Sequence[Array]:
    """Runs `grid` programs of `kernel`; out: the outputs' shapes and dtypes; aliases: input index -> output index.

    Triton computes on blocks whose sizes are powers of two, so kernels load and store with masks, through `load` and
    `store` below. On a CPU the same kernel is interpreted, for the tests; it is told so by the keyword `interpret`.
    """
    assert triton is not None, "ask `available` first"
    params = triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)

    def call(*args: Array, interpret: bool):
        return pl.pallas_call(
            functools.partial(kernel, interpret=interpret),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out],
            grid=(grid,),
            in_specs=in_specs or [pl.BlockSpec()] * len(args),
            out_specs=out_specs or [pl.BlockSpec()] * len(out),
            input_output_aliases=aliases or {},
            compiler_params=params,
            interpret=interpret,
        )(*args)

    if jax.default_backend() == "gpu":  # or each kernel would be traced twice
        return call(*args, interpret=False)
    interpreted = functools.partial(call, interpret=True)
    return jax.lax.platform_dependent(*args, cpu=interpreted, default=functools.partial(call, interpret=False))


def load(ref, **options) -> Array:
    """A block from memory; options: mask, and `other` where it is false."""
    assert triton is not None
    return triton.load(ref, **options)


def store(ref, x: Array, **options) -> None:
    """A block to memory; options: mask."""
    assert triton is not None
    triton.store(ref, x, **options)


def barrier(interpret: bool) -> None:
    """All threads of a program wait for each other; what they stored is then seen by all."""
    if not interpret:
        assert triton is not None
        triton.debug_barrier()


def exp2(x: Array, scale: float, shift: Array, interpret: bool) -> Array:
    """2 ** (x * scale + shift) in float32, for kernels: two instructions where jnp.exp2 compiles to six.

    Relative error 2^-22; results below 2^-126 are 0.
    """
    shift = jnp.broadcast_to(shift, x.shape)
    if interpret:
        return jnp.exp2(x * scale + shift)
    return _asm(f"fma.rn.f32 t, $1, {_literal(scale)}, $2; ex2.approx.ftz.f32 $0, t;", x, shift)


def sigmoid(x: Array, interpret: bool) -> Array:
    """1 / (1 + exp(-x)) in float32, for kernels: four instructions, relative error 2^-20."""
    if interpret:
        return 1 / (1 + jnp.exp(-x))
    power = f"mul.f32 t, $1, {_literal(-math.log2(math.e))}; ex2.approx.ftz.f32 t, t;"
    return _asm(f"{power} add.f32 t, t, {_literal(1.0)}; rcp.approx.ftz.f32 $0, t;", x)


def log2(x: Array, interpret: bool) -> Array:
    """log2 in float32, for kernels: one instruction, error 2^-22 (PTX ISA, lg2.approx.f32)."""
    return jnp.log2(x) if interpret else _asm("lg2.approx.ftz.f32 $0, $1;", x)


def _asm(code: str, *args: Array) -> Array:
    assert triton is not None
    like = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    return triton.elementwise_inline_asm(
        f"{{ .reg .f32 t; {code} }}",
        args=args,
        constraints=",".join(["=f"] + ["f"] * len(args)),
        pack=1,
        result_shape_dtypes=[like],
    )[0]


def _literal(x: float) -> str:
    return f"0f{np.float32(x).view(np.uint32):08X}"
