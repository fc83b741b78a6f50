"""Residual addition and layer normalization as one pass over memory, and their gradients as another.

What the backward pass needs is the sum alone, which is alive anyway: mean and variance are computed from it again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxgpt.ops.launch import launch, load, store

ROWS = 4  # rows a program handles at a time, one per warp: sums over columns then stay inside a warp
WIDTH = 256  # columns a warp handles at a time: 8 (16 bytes of bfloat16) per lane


def add_layer_norm(
    x: Float[Array, "M C"],
    delta: Float[Array, "M C"] | None,
    scale: Float[Array, " C"],
    bias: Float[Array, " C"] | None,
    *,
    eps: float = 1e-5,
    kernel: bool = False,
) -> tuple[Float[Array, "M C"], Float[Array, "M C"]]:
    """x + delta in x's dtype, and its layer normalization times scale plus bias; statistics in float32.

    No delta adds nothing, no bias likewise. The kernel takes rows four at a time; for other M the plain twin runs.
    """
    return _add_norm(x, delta, scale, bias, eps, kernel and x.shape[0] % ROWS == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _add_norm(x, delta, scale, bias, eps: float, kernel: bool):
    return _forward(x, delta, scale, bias, eps, kernel)[0]


def _forward(x, delta, scale, bias, eps, kernel):
    residual, normed = (_add_norm_kernel if kernel else _add_norm_plain)(x, delta, scale, bias, eps)
    return (residual, normed), (residual, delta is not None, scale, bias)


def _backward(eps, kernel, saved, cotangents):
    residual, has_delta, scale, bias = saved
    d_residual, d_normed = cotangents
    gradient = _gradient_kernel if kernel else _gradient_plain
    dx, dscale, dbias = gradient(residual, d_residual, d_normed, scale, eps, bias is not None)
    return (
        dx,
        dx if has_delta else None,
        dscale.astype(scale.dtype),
        None if dbias is None else dbias.astype(scale.dtype),
    )


_add_norm.defvjp(_forward, _backward)


def _add_norm_plain(x, delta, scale, bias, eps):
    residual = x if delta is None else x + delta
    y = _normalize(residual, eps)[0] * scale
    return residual, (y if bias is None else y + bias).astype(x.dtype)


def _normalize(x, eps):
    """x in float32 with mean 0 and variance 1 along the last axis, and the factor that made it so."""
    x = x.astype(jnp.float32)
    centered = x - x.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    return centered * rstd, rstd


def _gradient_plain(residual, d_residual, d_normed, scale, eps, has_bias):
    normal, rstd = _normalize(residual, eps)
    dy = d_normed.astype(jnp.float32)
    g = dy * scale
    dx = rstd * (g - g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True))
    dx = (d_residual.astype(jnp.float32) + dx).astype(residual.dtype)
    return dx, (dy * normal).sum(0), dy.sum(0) if has_bias else None


# the kernels' callers are jitted so that a model traces and lowers each once, not once a layer
@functools.partial(jax.jit, static_argnums=4)
def _add_norm_kernel(x, delta, scale, bias, eps):
    outs = [(x.shape, x.dtype)] * (1 if delta is None else 2)
    normed, *residual = _launch(_layer_norm_forward, [x, delta, scale, bias], outs, x.shape[0] // ROWS, eps=eps)
    return x if delta is None else residual[0], normed


@functools.partial(jax.jit, static_argnums=(4, 5))
def _gradient_kernel(residual, d_residual, d_normed, scale, eps, has_bias):
    m, c = residual.shape
    steps = pl.next_power_of_2(pl.cdiv(m, ROWS * 512))  # hence up to 512 programs, four for each multiprocessor
    programs = pl.cdiv(m, ROWS * steps)
    outs = [((m, c), residual.dtype)] + [((programs, c), jnp.float32)] * (2 if has_bias else 1)
    dx, *sums = _launch(
        _layer_norm_backward, [residual, d_residual, d_normed, scale], outs, programs, eps=eps, steps=steps
    )
    dscale, dbias = [s.sum(0) for s in sums] + [None] * (not has_bias)
    return dx, dscale, dbias


def _launch(program, arrays, outs, grid, **static):
    given = [a is not None for a in arrays]

    def kernel(*refs, interpret):
        refs = iter(refs)
        program(*[next(refs) if g else None for g in given], *refs, **static)

    kernel.__name__ = program.__name__  # what profiles show
    return launch(kernel, *[a for a in arrays if a is not None], out=outs, grid=grid, num_warps=ROWS)


def _layer_norm_forward(x, delta, scale, bias, normed, residual=None, *, eps: float):
    tiles = _Tiles(pl.program_id(0) * ROWS, *x.shape)
    total = tiles.load(x)
    if delta is not None:
        total = [(a + b).astype(x.dtype) for a, b in zip(total, tiles.load(delta), strict=True)]
        tiles.store(residual, total)
    normal, _ = tiles.normalize([t.astype(jnp.float32) for t in total], eps)
    y = [n * s for n, s in zip(normal, tiles.load_row(scale), strict=True)]
    if bias is not None:
        y = [a + b for a, b in zip(y, tiles.load_row(bias), strict=True)]
    tiles.store(normed, y)


def _layer_norm_backward(residual, d_residual, d_normed, scale, dx, dscale, dbias=None, *, eps: float, steps: int):
    """steps * ROWS rows; their part of the gradients of scale and bias goes to this program's row of those."""
    program = pl.program_id(0)

    def step(i, sums):
        tiles = _Tiles((program * steps + i) * ROWS, *residual.shape, bounded=residual.shape[0] % (steps * ROWS) > 0)
        x, dy, direct = tiles.load(residual), tiles.load(d_normed), tiles.load(d_residual)
        normal, rstd = tiles.normalize(x, eps)
        g = [a * s for a, s in zip(dy, tiles.load_row(scale), strict=True)]
        mean, slope = tiles.mean(g), tiles.mean([a * n for a, n in zip(g, normal, strict=True)])
        tiles.store(dx, [d + rstd * (a - mean - n * slope) for d, a, n in zip(direct, g, normal, strict=True)])
        parts = [a * n for a, n in zip(dy, normal, strict=True)] + (dy if dbias is not None else [])
        return [s + p for s, p in zip(sums, parts, strict=True)]

    count = pl.cdiv(residual.shape[1], WIDTH)
    zeros = [jnp.zeros((ROWS, WIDTH), jnp.float32)] * (count if dbias is None else 2 * count)
    sums = jax.lax.fori_loop(0, steps, step, zeros)
    for i, part in enumerate(sums):
        column = i % count * WIDTH + jnp.arange(WIDTH)
        target = dscale if dbias is None or i < count else dbias
        store(target.at[program, column], part.sum(0), mask=column < residual.shape[1])


class _Tiles:
    """ROWS rows of a matrix as WIDTH-wide tiles in float32, 0 past its right edge (and, if `bounded`, its bottom)."""

    def __init__(self, row, height: int, width: int, bounded: bool = False):
        rows, column = row + jnp.arange(ROWS)[:, None], jnp.arange(WIDTH)[None, :]
        self.width, self.index, self.masks = width, [], []
        for start in range(0, width, WIDTH):
            self.index.append(tuple(jnp.broadcast_arrays(rows, column + start)))
            inside = [column < width - start] * (start + WIDTH > width) + [rows < height] * bounded
            self.masks.append(functools.reduce(jnp.logical_and, inside) if inside else None)

    def load(self, ref):
        return [_load(ref.at[index], mask) for index, mask in zip(self.index, self.masks, strict=True)]

    def load_row(self, ref):
        """A vector, in every row of the tiles: so that its elements are where those of a matrix are."""
        return [_load(ref.at[index[1]], mask) for index, mask in zip(self.index, self.masks, strict=True)]

    def store(self, ref, tiles):
        for index, mask, tile in zip(self.index, self.masks, tiles, strict=True):
            store(ref.at[index], tile.astype(ref.dtype), mask=mask)

    def mean(self, tiles):
        return functools.reduce(jnp.add, tiles).sum(1, keepdims=True) * (1 / self.width)

    def normalize(self, tiles, eps):
        mean = self.mean(tiles)
        tiles = [t - mean if m is None else jnp.where(m, t - mean, 0.0) for t, m in zip(tiles, self.masks, strict=True)]
        rstd = jax.lax.rsqrt(self.mean([t * t for t in tiles]) + eps)
        return [t * rstd for t in tiles], rstd


def _load(ref, mask):
    return load(ref, mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)
