"""One matrix times several: queries, keys and values. Its gradient is a sum of products, for Hopper GPUs one kernel.

The compiler has cuBLAS add each product to the last one's result, which is written and read again in between. The
kernel, of Pallas' Mosaic backend, keeps a tile's sums in registers through all of them: two warpgroups multiply half of
its rows each, and a third fetches what both need. The several weights' gradients are another such kernel, where cuBLAS,
one by one, would leave multiprocessors idle.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxgpt.ops import hopper
from jaxgpt.ops.hopper import DEPTH, shared
from jaxgpt.ops.paths import note

ROWS = 256  # of a tile of the result
COLUMNS = 128, 160  # of such a tile: the first that divides
STAGES = 4  # parts on their way: with the results' buffers up to 224 of a multiprocessor's 227 KiB
PART = 32  # columns that are stored at a time
WEIGHT_TILE = 128, 256  # of the weights' gradients


def supports(m: int, k: int, n: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether there is a kernel for the sum of (M, K) times (K, N): of 16 bits, in whole tiles, on Hopper."""
    return any(n % columns == 0 for columns in COLUMNS) and hopper.supports(m, k, dtype, rows=ROWS)


def supports_weights(m: int, shape: tuple[int, ...]) -> bool:
    """Whether the gradient of weights of this shape, (K, G, N), from M rows is one kernel's if that of x is one's.

    That is where one kernel takes fewer rounds of tiles than G products, which leave multiprocessors idle, and is
    itself busy for at least four fifths of them. Smaller products cuBLAS splits in the summed dimension.
    """
    (k, g, n), (tile_k, tile_n), programs = shape, WEIGHT_TILE, hopper.count_programs()
    chunks = pl.cdiv(n, tile_n // 2)  # of one product: no chunk has columns of two
    alone, joint = (pl.cdiv(pl.cdiv(k, tile_k) * pl.cdiv(c, 2), programs) for c in (chunks, g * chunks))
    busy = k * g * n / (tile_k * tile_n * programs * joint)
    return m % DEPTH == k % 64 == n % 64 == 0 and min(k, n) >= 128 and joint < g * alone and busy >= 0.8


def products(
    x: Float[Array, "M K"], w: Float[Array, "K G N"], dtype: jax.typing.DTypeLike | None = None, *, kernels: bool
) -> tuple[Float[Array, "M N"], ...]:
    """x @ w[:, i] for each i, in `dtype`, by default x's; w is in x's. kernels: use ours if `supports` says so.

    Several products rather than one: their outputs are what attention takes, where slices would be copies.
    """
    if kernels and dtype is None and supports(x.shape[0], w.shape[2], w.shape[0], x.dtype):
        note("qkv gradient", "kernel")
        return _with_kernel(x, w)
    return _products(_fan_out(x, w.shape[1]), w, dtype)


def _products(xs, w, dtype=None):
    return tuple(jnp.matmul(x, w[:, i], preferred_element_type=dtype) for i, x in enumerate(xs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fan_out(x: Float[Array, "M K"], count: int):
    """x `count` times. Its gradients are added in turn, so that each matrix product adds to the last one's."""
    return (x,) * count


def _fan_in(count, _, gradients):
    total, *others = gradients
    for gradient in others:
        total = jax.lax.optimization_barrier(total) + gradient
    return (total,)


_fan_out.defvjp(lambda x, count: (_fan_out(x, count), None), _fan_in)


@jax.custom_vjp
def _with_kernel(x, w):
    return _products((x,) * w.shape[1], w)


def _backward(saved, dys):
    x, w = saved
    if supports_weights(x.shape[0], w.shape):
        dw = weight_gradients(x, dys)
    else:
        dw = jax.vjp(functools.partial(_products, (x,) * w.shape[1]), w)[1](dys)[0]
    return sum_of_products(dys, w), dw


_with_kernel.defvjp(lambda x, w: (_with_kernel(x, w), (x, w)), _backward)


# jitted so that a model traces and lowers it once, not once a layer
@jax.jit
def sum_of_products(xs: Sequence[Float[Array, "M K"]], w: Float[Array, "N G K"]) -> Float[Array, "M N"]:
    """The sum over i of xs[i] @ w[:, i].T, in their dtype, from float32."""
    from jax.experimental.pallas import mosaic_gpu as gpu  # 0.2 s, for those who need it

    (m, k), n, dtype = xs[0].shape, w.shape[0], w.dtype
    columns = next(c for c in COLUMNS if n % c == 0)
    half, each = ROWS // 2, k // DEPTH  # each: steps of one product
    steps = len(xs) * each

    def kernel(*refs):
        *x_refs, w_ref, out_ref = refs

        @functools.partial(
            pl.run_scoped,
            x_parts=shared(dtype, STAGES, ROWS, DEPTH),
            w_parts=shared(dtype, STAGES, columns, DEPTH),
            results=shared(dtype, 2, half, PART),
            fetched=gpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            used=gpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            collective_axes="group",
        )
        def scope(x_parts, w_parts, results, fetched, used):
            count_tiles, place = hopper.tiles(m, n, ROWS, columns)
            ring = hopper.Ring(STAGES, fetched, used, count_tiles * steps)

            def fetch(tile):
                row, column = place(tile)
                for i, x_ref in enumerate(x_refs):

                    @pl.loop(0, each)
                    def _step(j, i=i, x_ref=x_ref):
                        def copy(stage, fetched):
                            depth = pl.ds(j * DEPTH, DEPTH)
                            gpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, ROWS), depth], x_parts.at[stage], fetched)
                            w_part = w_ref.at[pl.ds(column, columns), i, depth]
                            gpu.copy_gmem_to_smem(w_part, w_parts.at[stage], fetched)

                        ring.fetch(tile * steps + i * each + j, copy)

            def multiply(group):
                @pl.loop(0, count_tiles)
                def _tile(tile):
                    row, column = place(tile)

                    def factors(stage):
                        rows = pl.ds(group * half, half)
                        return [(x_parts.at[stage, rows], w_parts.at[stage].transpose((1, 0)))]

                    (total,) = ring.multiply(tile * steps, steps, factors, (half, columns))
                    for i in range(0, columns, PART):
                        gpu.wait_smem_to_gmem(0, wait_read_only=True)
                        results[group] = total[:, i : i + PART].astype(dtype)
                        gpu.commit_smem()
                        to = out_ref.at[pl.ds(row + group * half, half), pl.ds(column + i, PART)]
                        gpu.copy_smem_to_gmem(results.at[group], to)

            hopper.share_out(count_tiles, fetch, multiply)

    kernel.__name__ = "product_sum"
    return hopper.launch(kernel, *xs, w, out=[jax.ShapeDtypeStruct((m, n), dtype)])[0]


@jax.jit
def weight_gradients(x: Float[Array, "M K"], dys: Sequence[Float[Array, "M N"]]) -> Float[Array, "K G N"]:
    """x.T @ dys[i] for each i, in their dtype, from float32.

    The columns of all dys are cut into chunks of 128, of which a tile has two. Where 128 does not divide, a last tile
    or chunk begins 64 sooner, and what the one before it has as well is not stored.
    """
    from jax.experimental.pallas import mosaic_gpu as gpu  # 0.2 s, for those who need it

    (m, k), n, count, dtype = x.shape, dys[0].shape[1], len(dys), x.dtype
    rows, chunk, half, steps = WEIGHT_TILE[0], WEIGHT_TILE[1] // 2, WEIGHT_TILE[0] // 2, m // DEPTH
    chunks = pl.cdiv(n, chunk)  # of one dy

    def kernel(x_ref, *refs):
        *dy_refs, out_ref = refs

        @functools.partial(
            pl.run_scoped,
            x_parts=shared(dtype, STAGES, 2, DEPTH, half),
            dy_parts=shared(dtype, STAGES, 2, DEPTH, chunk),
            results=shared(dtype, 2, half, half),
            fetched=gpu.Barrier(num_arrivals=4, num_barriers=STAGES),
            used=gpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            collective_axes="group",
        )
        def scope(x_parts, dy_parts, results, fetched, used):
            count_tiles, place = hopper.tiles(k, count * chunks, rows, 2)
            ring = hopper.Ring(STAGES, fetched, used, count_tiles * steps)

            def find(chunk_number):
                """The dy that a chunk is of, its column there, and the first one that is its alone."""
                first = jax.lax.rem(chunk_number, chunks) * chunk
                return jax.lax.div(chunk_number, chunks), jnp.minimum(first, n - chunk), first

            def fetch(tile):
                first, number = place(tile)
                row = jnp.minimum(first, k - rows)
                found = [find(jnp.minimum(number + j, count * chunks - 1))[:2] for j in range(2)]

                @pl.loop(0, steps)
                def _step(i):
                    def copy(stage, fetched):
                        depth = pl.ds(i * DEPTH, DEPTH)
                        for j, (which, column) in enumerate(found):
                            x_part = x_ref.at[depth, pl.ds(row + j * half, half)]
                            gpu.copy_gmem_to_smem(x_part, x_parts.at[stage, j], fetched)
                            for dy, dy_ref in enumerate(dy_refs):

                                @pl.when(which == dy)
                                def _(j=j, dy_ref=dy_ref, column=column):
                                    dy_part = dy_ref.at[depth, pl.ds(column, chunk)]
                                    gpu.copy_gmem_to_smem(dy_part, dy_parts.at[stage, j], fetched)

                    ring.fetch(tile * steps + i, copy)

            def multiply(group):
                @pl.loop(0, count_tiles)
                def _tile(tile):
                    first_row, number = place(tile)
                    row = jnp.minimum(first_row, k - rows) + group * half

                    def factors(stage):
                        x_part = x_parts.at[stage, group].transpose((1, 0))
                        return [(x_part, dy_parts.at[stage, j]) for j in range(2)]

                    totals = ring.multiply(tile * steps, steps, factors, (half, chunk), (half, chunk))
                    for j, total in enumerate(totals):
                        which, column, first = find(number + j)
                        for i in range(0, chunk, half):
                            gpu.wait_smem_to_gmem(0, wait_read_only=True)
                            results[group] = total[:, i : i + half].astype(dtype)
                            gpu.commit_smem()

                            @pl.when((which < count) & (row >= first_row) & (column + i >= first))
                            def _(which=which, column=column, i=i):
                                to = out_ref.at[pl.ds(row, half), which, pl.ds(column + i, half)]
                                gpu.copy_smem_to_gmem(results.at[group], to)

            hopper.share_out(count_tiles, fetch, multiply)

    kernel.__name__ = "weight_gradients"
    return hopper.launch(kernel, x, *dys, out=[jax.ShapeDtypeStruct((k, count, n), dtype)])[0]
