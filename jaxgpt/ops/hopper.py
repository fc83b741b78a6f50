"""What kernels for Hopper GPUs share, by Pallas' Mosaic backend: on each multiprocessor a program works on tiles.

Each program has three warpgroups, the last of which fetches what the others need. Those use wgmma, the instruction for
products that only compute capability 9.0 has.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxgpt.ops.launch import available

DEPTH = 64  # of the summed dimension, what is fetched at a time
BAND = 8  # tiles of rows that are worked on at a time, so that what they share is found in the L2 cache


def supports(m: int, k: int, dtype: jax.typing.DTypeLike, *, rows: int) -> bool:
    """Whether these devices multiply (M, K) by tiles of `rows`: of 16 bits, in whole tiles, on Hopper."""
    return m % rows == k % DEPTH == 0 < k and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and on_hopper()


def on_hopper() -> bool:
    return _on_hopper() and available()


@functools.cache
def _on_hopper() -> bool:
    hopper = getattr(jax.local_devices()[0], "compute_capability", None) == "9.0"
    return hopper and importlib.util.find_spec("jax.experimental.pallas.mosaic_gpu") is not None


def count_programs() -> int:
    """One for each multiprocessor; interpreted, two."""
    return getattr(jax.local_devices()[0], "core_count", 2)


def shared(dtype: jax.typing.DTypeLike, *shape: int) -> Any:
    """Shared memory for arrays whose rows are as wide as the swizzle."""
    from jax.experimental.pallas import mosaic_gpu as gpu  # 0.2 s, for those who need it

    layout = gpu.TilingTransform((8, shape[-1])), gpu.SwizzleTransform(2 * shape[-1])
    return gpu.SMEM(shape, dtype, transforms=layout)


def tiles(m: int, n: int, rows: int, columns: int) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """How many tiles of an (M, N) matrix are this program's, and the row and column where one of them begins."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    program, programs, across = jax.lax.axis_index("program"), count_programs(), (m // rows, n // columns)

    def place(tile):
        row, column = gpu.planar_snake(program + tile * programs, across, 0, BAND)
        return row * rows, column * columns

    return jax.lax.div(across[0] * across[1] - program + programs - 1, programs), place


def launch(kernel: Callable[..., None], *args: Array, out: Sequence[jax.ShapeDtypeStruct]) -> Sequence[Array]:
    """Runs kernel(*refs of args, *refs of what it returns) in every program; profiles show its name."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    options = gpu.CompilerParams(approx_math=True, lowering_semantics=gpu.LoweringSemantics.Warpgroup)
    grid: Any = {"grid": (count_programs(),), "grid_names": ("program",), "num_threads": 3, "thread_name": "group"}
    return gpu.kernel(kernel, out_type=list(out), **grid, compiler_params=options)(*args)
