"""Products that end in an activation, or in its derivative, as one kernel: for Hopper GPUs, by Pallas' Mosaic backend.

cuBLAS computes GELU after a product, and at the cost of a slow one where GELU's input is wanted too; its derivative
would be a pass of its own over two matrices of the MLP's hidden width. Here two warpgroups take tiles in turn: one
multiplies while the other works on its tile's elements (ping-pong; CUTLASS has the schedule by that name), and a third
fetches what both need.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxgpt.ops import hopper
from jaxgpt.ops.activation import ACTIVATIONS, activate
from jaxgpt.ops.activation import supports as in_cublas
from jaxgpt.ops.hopper import DEPTH, shared
from jaxgpt.ops.paths import note

ROWS = 128  # of a tile of the result
# Columns of a tile: (parts fetched that are on their way, columns that are worked on at a time). With the elements'
# buffers the parts take 224 of a multiprocessor's 227 KiB
COLUMNS = {160: (4, 32), 128: (5, 64)}


def supports(m: int, k: int, n: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether there is a kernel for (M, K) times (K, N) on these devices: of 16 bits, in whole tiles, on Hopper.

    And K at most 1,024 unless tiles are wide: of longer sums the kernel of narrow ones, which fetch more for each
    product, is no quicker than cuBLAS and a pass over its result.
    """
    return n % 128 == 0 and (k <= 1024 or n % max(COLUMNS) == 0) and hopper.supports(m, k, dtype, rows=ROWS)


class Activated:
    """An activation's result, with its input: the product that takes it sends its gradient through both at once.

    No pytree, so that JAX refuses it wherever an array is meant.
    """

    def __init__(self, before: Float[Array, "M N"], value: Float[Array, "M N"], activation: str):
        """activation: a key of ACTIVATIONS."""
        self.before, self.value, self.activation = before, jax.lax.stop_gradient(value), activation

    def array(self) -> Float[Array, "M N"]:
        """The value, with its gradient."""
        return _attach(self.before, self.value, self.activation)


def activated_product(
    x: Float[Array, "M K"], w: Float[Array, "K N"], b: Float[Array, " N"] | None, activation: str
) -> Activated:
    """activation(x @ w + b), a key of ACTIVATIONS; w and b are in x's dtype."""
    note("activation", "kernel")
    if b is None and not in_cublas(activation) and x.shape[1] <= 1024:
        before, value = _activated_product(x, w, activation)  # pyright: ignore[reportGeneralTypeIssues]
    else:  # cuBLAS takes less time, of longer sums too: 0.53 ms for GELU in 124M's MLP, where the kernel takes 0.61
        before = x @ w if b is None else x @ w + b
        value = activate(before, activation, kernels=True)
    return Activated(before, value, activation)


def product(x: Activated, w: Float[Array, "N K"]) -> Float[Array, "M K"]:
    """x @ w; w is in x's dtype."""
    return _product_of_activated(x.before, x.value, w, x.activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _activated_product(x, w, activation: str) -> tuple[Array, Array]:
    before = x @ w
    return before, activate(before, activation)


def _activated_product_backward(activation, saved, gradients):
    return jax.vjp(jnp.matmul, *saved)[1](gradients[0])


_activated_product.defvjp(
    lambda x, w, activation: (activate_in_product(x, w, activation), (x, w)), _activated_product_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product_of_activated(before, value, w, activation: str):
    return value @ w


def _product_of_activated_backward(activation, saved, dy):
    before, value, w = saved
    if supports(dy.shape[0], dy.shape[1], w.shape[0], dy.dtype):
        d_before = gradient_in_product(dy, w, before, activation)
    else:
        d_before = _gradient(before, dy @ w.T, activation)
    return d_before, None, jax.vjp(lambda w: value @ w, w)[1](dy)[0]


_product_of_activated.defvjp(
    lambda before, value, w, activation: (value @ w, (before, value, w)), _product_of_activated_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attach(before, value, activation: str):
    """value, with a gradient."""
    return value


_attach.defvjp(
    lambda before, value, activation: (value, before),
    lambda activation, before, dy: (_gradient(before, dy, activation), None),
)


def _gradient(before, dy, activation):
    return ACTIVATIONS[activation].gradient(before.astype(jnp.float32), dy.astype(jnp.float32)).astype(before.dtype)


# jitted so that a model traces and lowers each once, not once a layer
@functools.partial(jax.jit, static_argnames="activation")
def activate_in_product(
    x: Float[Array, "M K"], w: Float[Array, "K N"], activation: str
) -> tuple[Float[Array, "M N"], Float[Array, "M N"]]:
    """x @ w, and its activation; in x's dtype, from float32."""

    def end(total):
        before = total.astype(x.dtype).astype(jnp.float32)
        return before, ACTIVATIONS[activation].value(before, _sigmoid)

    before, value = _launch(x, w.T, None, end, outs=2)
    return before, value


@functools.partial(jax.jit, static_argnames="activation")
def gradient_in_product(
    dy: Float[Array, "M K"], w: Float[Array, "N K"], before: Float[Array, "M N"], activation: str
) -> Float[Array, "M N"]:
    """The gradient of `before`, whose activation's gradient is dy @ w.T; in dy's dtype, from float32."""

    def end(total, before):
        return (ACTIVATIONS[activation].gradient(before, total, _sigmoid),)

    return _launch(dy, w, before, end, outs=1)[0]


def _sigmoid(x):
    # two instructions of the special function unit, where a division would take many of others: error 2^-21
    root = jax.lax.rsqrt(1 + jnp.exp(-x))
    return root * root


def _launch(
    a: Float[Array, "M K"],
    b: Float[Array, "N K"],
    extra: Float[Array, "M N"] | None,
    end: Callable[..., Sequence[Array]],
    outs: int,
) -> Sequence[Float[Array, "M N"]]:
    """end(a @ b.T, extra), of parts of tiles in float32; `outs` matrices in a's dtype, one if there is extra."""
    from jax.experimental.pallas import mosaic_gpu as gpu  # 0.2 s, for those who need it

    (m, k), n, dtype = a.shape, b.shape[0], a.dtype
    columns, (stages, width) = next(item for item in COLUMNS.items() if n % item[0] == 0)
    parts, steps = columns // width, k // DEPTH

    def kernel(a_ref, b_ref, *refs):
        extra_ref, out_refs = (None, refs) if extra is None else (refs[0], refs[1:])

        @functools.partial(
            pl.run_scoped,
            a_parts=shared(dtype, stages, ROWS, DEPTH),
            b_parts=shared(dtype, stages, columns, DEPTH),
            elements=shared(dtype, 2, parts, ROWS, width),  # for each multiplying warpgroup: extra, or parts of results
            # a barrier counts its phases in each warpgroup that waits: so one of each stage for each of the two
            fetched=gpu.Barrier(num_arrivals=2, num_barriers=2 * stages),
            used=gpu.Barrier(num_barriers=stages),
            extra_fetched=gpu.Barrier(num_arrivals=parts, num_barriers=2),
            stored=gpu.Barrier(num_barriers=2),
            turn=gpu.Barrier(num_barriers=2),
            collective_axes="group",
        )
        def scope(a_parts, b_parts, elements, fetched, used, extra_fetched, stored, turn):
            count_tiles, place = hopper.tiles(m, n, ROWS, columns)
            ring = hopper.Ring(stages, fetched, used, count_tiles * steps)

            def fetch(tile):
                row, column = place(tile)
                side = jax.lax.rem(tile, 2)

                @pl.loop(0, steps)
                def _step(i):
                    def copy(stage, fetched):
                        depth = pl.ds(i * DEPTH, DEPTH)
                        gpu.copy_gmem_to_smem(a_ref.at[pl.ds(row, ROWS), depth], a_parts.at[stage], fetched)
                        gpu.copy_gmem_to_smem(b_ref.at[pl.ds(column, columns), depth], b_parts.at[stage], fetched)

                    ring.fetch(tile * steps + i, copy, side)

                    if (source := extra_ref) is None:
                        return

                    # late enough that its buffer, that of the tile before the last one, is free by then
                    @pl.when(i == min(stages, steps - 1))
                    def _():
                        @pl.when(tile >= 2)
                        def _():
                            gpu.barrier_wait(stored.at[side])

                        for j in range(parts):
                            part = source.at[pl.ds(row, ROWS), pl.ds(column + j * width, width)]
                            gpu.copy_gmem_to_smem(part, elements.at[side, j], extra_fetched.at[side])

            def multiply(group):
                @pl.loop(0, jax.lax.div(count_tiles - group + 1, 2))
                def _tile(pair):
                    tile = 2 * pair + group
                    row, column = place(tile)

                    @pl.when(tile > 0)
                    def _():
                        gpu.barrier_wait(turn.at[group])

                    def pass_on():
                        @pl.when(tile + 1 < count_tiles)
                        def _():
                            gpu.barrier_arrive(turn.at[1 - group])

                    def factors(stage):
                        return [(a_parts.at[stage], b_parts.at[stage].transpose((1, 0)))]

                    (total,) = ring.multiply(tile * steps, steps, factors, (ROWS, columns), side=group, end=pass_on)
                    if extra_ref is not None:
                        gpu.barrier_wait(extra_fetched.at[group])
                    for j in range(parts):
                        part = total[:, j * width : (j + 1) * width]
                        if extra_ref is None:
                            results, buffers = end(part), range(outs)
                            gpu.wait_smem_to_gmem(0, wait_read_only=True)
                        else:
                            results, buffers = end(part, elements[group, j].astype(jnp.float32)), [j]
                        for buffer, result in zip(buffers, results, strict=True):
                            elements[group, buffer] = result.astype(dtype)
                        gpu.commit_smem()
                        for buffer, out in zip(buffers, out_refs, strict=True):
                            to = out.at[pl.ds(row, ROWS), pl.ds(column + j * width, width)]
                            gpu.copy_smem_to_gmem(elements.at[group, buffer], to)
                    if extra_ref is None:
                        return

                    @pl.when(tile + 2 < count_tiles)
                    def _():
                        gpu.wait_smem_to_gmem(0, wait_read_only=True)
                        gpu.barrier_arrive(stored.at[group])

            hopper.share_out(count_tiles, fetch, multiply)

    kernel.__name__ = "product_activated" if extra is None else "product_and_gradient"
    out = [jax.ShapeDtypeStruct((m, n), dtype)] * outs
    return hopper.launch(kernel, a, b, *([] if extra is None else [extra]), out=out)
