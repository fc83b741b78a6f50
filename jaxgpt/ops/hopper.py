"""What kernels for Hopper GPUs share, by Pallas' Mosaic backend: on each multiprocessor a program works on tiles.

Each program has three warpgroups, the last of which fetches what the others need. Those use wgmma, the instruction for
products that only compute capability 9.0 has.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

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


class Ring(NamedTuple):
    """A ring of stages: parts of two matrices that one warpgroup fetches and others multiply, `steps` in all."""

    a: Any  # references to shared memory: (stages, rows, DEPTH)
    b: Any  # (stages, columns, DEPTH)
    fetched: Any  # a barrier for each stage, or for each of each side's
    used: Any  # a barrier for each stage
    steps: Array

    def fetch(self, step: Array, a: Any, b: Any, side: Array | None = None) -> None:
        """Begins to fetch a step's parts, once those before them in the same stage are used."""
        from jax.experimental.pallas import mosaic_gpu as gpu

        stage = jax.lax.rem(step, self.a.shape[0])
        arrived = self._fetched(stage, side)

        @pl.when(step >= self.a.shape[0])
        def _():
            gpu.barrier_wait(self.used.at[stage])

        gpu.copy_gmem_to_smem(a, self.a.at[stage], arrived)
        gpu.copy_gmem_to_smem(b, self.b.at[stage], arrived)

    def multiply(
        self, first: Array, count: int, *, rows: Any = None, side: Array | None = None, end: Callable = lambda: None
    ) -> Float[Array, "R N"]:
        """The sum of a[rows] @ b.T over `count` steps from `first` on, in float32. rows: a `pl.ds`, by default all.

        side: the warpgroup, where they take turns and so have fetched-barriers of their own. end(): called once the
        last product has begun.
        """
        from jax.experimental.pallas import mosaic_gpu as gpu

        def sums(total):
            @pl.loop(0, count)
            def _step(i):
                step = first + i
                stage = jax.lax.rem(step, self.a.shape[0])
                gpu.barrier_wait(self._fetched(stage, side))
                gpu.wgmma(
                    total,
                    self.a.at[stage] if rows is None else self.a.at[stage, rows],
                    self.b.at[stage].transpose((1, 0)),
                )
                gpu.wgmma_wait(1)

                @pl.when(i > 0)
                def _():
                    self._release(step - 1)

            end()
            done = total[...]
            self._release(first + count - 1)
            return done

        shape = self.a.shape[1] if rows is None else rows.size, self.b.shape[1]
        return pl.run_scoped(sums, gpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def _fetched(self, stage, side):
        return self.fetched.at[stage if side is None else side * self.a.shape[0] + stage]

    def _release(self, step):
        from jax.experimental.pallas import mosaic_gpu as gpu

        @pl.when(step + self.a.shape[0] < self.steps)
        def _():
            gpu.barrier_arrive(self.used.at[jax.lax.rem(step, self.a.shape[0])])


def launch(kernel: Callable[..., None], *args: Array, out: Sequence[jax.ShapeDtypeStruct]) -> Sequence[Array]:
    """Runs kernel(*refs of args, *refs of what it returns) in every program; profiles show its name."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    options = gpu.CompilerParams(approx_math=True, lowering_semantics=gpu.LoweringSemantics.Warpgroup)
    grid: Any = {"grid": (count_programs(),), "grid_names": ("program",), "num_threads": 3, "thread_name": "group"}
    return gpu.kernel(kernel, out_type=list(out), **grid, compiler_params=options)(*args)
