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
    """Shared memory for arrays of 16 bits whose rows are as wide as the swizzle, or a multiple of its 128 bytes."""
    from jax.experimental.pallas import mosaic_gpu as gpu  # 0.2 s, for those who need it

    width = min(shape[-1], 64)
    return gpu.SMEM(shape, dtype, transforms=(gpu.TilingTransform((8, width)), gpu.SwizzleTransform(2 * width)))


def tiles(m: int, n: int, rows: int, columns: int) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """How many tiles of an (M, N) matrix are this program's, and the row and column where one of them begins."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    program, programs, across = jax.lax.axis_index("program"), count_programs(), (pl.cdiv(m, rows), pl.cdiv(n, columns))

    def place(tile):
        row, column = gpu.planar_snake(program + tile * programs, across, 0, BAND)
        return row * rows, column * columns

    return jax.lax.div(across[0] * across[1] - program + programs - 1, programs), place


class Ring(NamedTuple):
    """A ring of stages in shared memory: parts of matrices that one warpgroup fetches and others multiply."""

    stages: int
    fetched: Any  # a barrier for each stage, or for each of each side's
    used: Any  # a barrier for each stage
    steps: Array  # in all: each fills one stage

    def fetch(self, step: Array, copy: Callable[[Array, Any], None], side: Array | None = None) -> None:
        """copy(stage, barrier) begins to fetch a step's parts, once those before them in the same stage are used."""
        from jax.experimental.pallas import mosaic_gpu as gpu

        stage = jax.lax.rem(step, self.stages)

        @pl.when(step >= self.stages)
        def _():
            gpu.barrier_wait(self.used.at[stage])

        copy(stage, self._fetched(stage, side))

    def multiply(
        self,
        first: Array,
        count: int,
        factors: Callable[[Array], Sequence[tuple[Any, Any]]],
        *shapes: tuple[int, int],
        side: Array | None = None,
        end: Callable = lambda: None,
    ) -> Sequence[Float[Array, "R N"]]:
        """For each of `shapes` the sum of a @ b over `count` steps from `first` on, in float32.

        factors(stage): a and b of each sum, (R, DEPTH) and (DEPTH, N). side: the warpgroup, where they take turns and
        so have fetched-barriers of their own. end(): called once the last product has begun.
        """
        from jax.experimental.pallas import mosaic_gpu as gpu

        def sums(*totals):
            @pl.loop(0, count)
            def _step(i):
                step = first + i
                stage = jax.lax.rem(step, self.stages)
                gpu.barrier_wait(self._fetched(stage, side))
                for total, (a, b) in zip(totals, factors(stage), strict=True):
                    gpu.wgmma(total, a, b)
                gpu.wgmma_wait(len(totals))

                @pl.when(i > 0)
                def _():
                    self._release(step - 1)

            end()
            done = [total[...] for total in totals]
            self._release(first + count - 1)
            return done

        return pl.run_scoped(sums, *(gpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes))

    def _fetched(self, stage, side):
        return self.fetched.at[stage if side is None else side * self.stages + stage]

    def _release(self, step):
        from jax.experimental.pallas import mosaic_gpu as gpu

        @pl.when(step + self.stages < self.steps)
        def _():
            gpu.barrier_arrive(self.used.at[jax.lax.rem(step, self.stages)])


def share_out(count_tiles: Array, fetch: Callable[[Array], None], multiply: Callable[[Array], None]) -> None:
    """Has one warpgroup fetch(tile) each tile's parts, and the two others multiply(their number) and store."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    group = jax.lax.axis_index("group")

    @pl.when(group == 2)
    def _fetch():
        gpu.set_max_registers(40, action="decrease")
        pl.loop(0, count_tiles)(fetch)

    @pl.when(group < 2)
    def _multiply():
        gpu.set_max_registers(232, action="increase")
        multiply(group)
        gpu.wait_smem_to_gmem(0)


def launch(kernel: Callable[..., None], *args: Array, out: Sequence[jax.ShapeDtypeStruct]) -> Sequence[Array]:
    """Runs kernel(*refs of args, *refs of what it returns) in every program; profiles show its name."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    options = gpu.CompilerParams(approx_math=True, lowering_semantics=gpu.LoweringSemantics.Warpgroup)
    grid: Any = {"grid": (count_programs(),), "grid_names": ("program",), "num_threads": 3, "thread_name": "group"}
    return gpu.kernel(kernel, out_type=list(out), **grid, compiler_params=options)(*args)
