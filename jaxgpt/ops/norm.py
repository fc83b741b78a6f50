"""Residual addition and normalization as one pass over memory, and their gradients as another.

What the backward pass needs is the sum alone, which is alive anyway: mean and variance are computed from it again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxgpt import UserError
from jaxgpt.ops.launch import available, launch, load, store
from jaxgpt.ops.paths import note

ROWS = 4  # rows a program handles at a time, one per warp: sums over columns then stay inside a warp
WIDTH = 256  # columns a warp handles at a time: 8 (16 bytes of bfloat16) per lane


class Norm(NamedTuple):
    """A normalization along the last axis: `layer` subtracts the mean, `rms` (arXiv 1910.07467) does not.

    Then it divides by the root of the mean square plus eps, multiplies with scale and adds bias, where there are any.
    """

    kind: str
    scale: Float[Array, " C"] | None = None
    bias: Float[Array, " C"] | None = None
    eps: float = 1e-5


def supports() -> bool:
    """Whether there is a kernel: of any shape and float dtype."""
    return available()


def add_norm(
    x: Float[Array, "M C"], branch: Float[Array, "M C"] | None, norm: Norm, *, kernels: bool = False
) -> tuple[Float[Array, "M C"], Float[Array, "M C"]]:
    """x + branch (x alone if that is None) and its normalization, both in x's dtype; statistics in float32.

    Raises UserError on another kind of norm.
    """
    if norm.kind not in ("layer", "rms"):
        raise UserError(f"Norm has kind {norm.kind!r}; choose layer or rms")
    kernels = kernels and supports()
    note("norm", "kernel" if kernels else "plain")
    return _add_norm(x, branch, norm.scale, norm.bias, norm.kind, norm.eps, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _add_norm(x, branch, scale, bias, kind: str, eps: float, kernel: bool):
    return _forward(x, branch, scale, bias, kind, eps, kernel)[0]


def _forward(x, branch, scale, bias, kind, eps, kernel):
    residual, normed = (_add_norm_kernel if kernel else add_norm_plain)(x, branch, scale, bias, kind, eps)
    return (residual, normed), (residual, branch is not None, scale, bias)


def add_norm_gradient(kind, eps, kernel, saved, cotangents):
    """The gradients of x, branch, scale and bias. saved: the sum, whether there was a branch, scale, bias."""
    residual, has_branch, scale, bias = saved
    d_residual, d_normed = cotangents
    gradient = _gradient_kernel if kernel else _gradient_plain
    dx, dscale, dbias = gradient(residual, d_residual, d_normed, scale, kind, eps, bias is not None)
    return (
        dx,
        dx if has_branch else None,
        None if dscale is None else dscale.astype(scale.dtype),
        None if dbias is None else dbias.astype(bias.dtype),
    )


_add_norm.defvjp(_forward, add_norm_gradient)


def add_norm_plain(x, branch, scale, bias, kind, eps):
    residual = x if branch is None else x + branch
    y = _normalize(residual, kind, eps)[0]
    y = y if scale is None else y * scale
    return residual, (y if bias is None else y + bias).astype(x.dtype)


def _normalize(x, kind, eps):
    """x in float32 with mean square 1 (and mean 0 for `layer`) along the last axis, and the factor that made it so."""
    x = x.astype(jnp.float32)
    centered = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    rstd = jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    return centered * rstd, rstd


def _gradient_plain(residual, d_residual, d_normed, scale, kind, eps, has_bias):
    normal, rstd = _normalize(residual, kind, eps)
    dy = d_normed.astype(jnp.float32)
    g = dy if scale is None else dy * scale
    mean = g.mean(-1, keepdims=True) if kind == "layer" else 0.0
    dx = rstd * (g - mean - normal * (g * normal).mean(-1, keepdims=True))
    dx = (d_residual.astype(jnp.float32) + dx).astype(residual.dtype)
    return dx, None if scale is None else (dy * normal).sum(0), dy.sum(0) if has_bias else None


# the kernels' callers are jitted so that a model traces and lowers each once, not once a layer
@functools.partial(jax.jit, static_argnums=(4, 5))
def _add_norm_kernel(x, branch, scale, bias, kind, eps):
    outs = [(x.shape, x.dtype)] * (1 if branch is None else 2)
    options = {"kind": kind, "eps": eps}
    normed, *residual = _launch(_norm_forward, [x, branch, scale, bias], outs, pl.cdiv(x.shape[0], ROWS), **options)
    return x if branch is None else residual[0], normed


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _gradient_kernel(residual, d_residual, d_normed, scale, kind, eps, has_bias):
    m, c = residual.shape
    sums = (scale is not None) + has_bias
    # the sums over rows want few programs: up to 512, four for each multiprocessor
    steps = pl.next_power_of_2(pl.cdiv(m, ROWS * 512)) if sums else 1
    programs = pl.cdiv(m, ROWS * steps)
    outs = [((m, c), residual.dtype)] + [((programs, c), jnp.float32)] * sums
    arrays = [residual, d_residual, d_normed, scale]
    options = {"kind": kind, "eps": eps, "steps": steps, "has_bias": has_bias}
    dx, *parts = _launch(_norm_backward, arrays, outs, programs, **options)
    parts = [p.sum(0) for p in parts]
    dscale = None if scale is None else parts.pop(0)
    return dx, dscale, parts[0] if has_bias else None


def _launch(program, arrays, outs, grid, **static):
    given = [a is not None for a in arrays]

    def kernel(*refs, interpret):
        refs = iter(refs)
        program(*[next(refs) if g else None for g in given], *refs, **static)

    kernel.__name__ = program.__name__  # what profiles show
    return launch(kernel, *[a for a in arrays if a is not None], out=outs, grid=grid, num_warps=ROWS)


def _norm_forward(x, branch, scale, bias, normed, residual=None, *, kind: str, eps: float):
    tiles = _Tiles(pl.program_id(0) * ROWS, *x.shape, bounded=x.shape[0] % ROWS > 0)
    total = tiles.load(x)
    if branch is not None:
        total = [(a + b).astype(x.dtype) for a, b in zip(total, tiles.load(branch), strict=True)]
        tiles.store(residual, total)
    y, _ = tiles.normalize([t.astype(jnp.float32) for t in total], kind, eps)
    if scale is not None:
        y = [n * s for n, s in zip(y, tiles.load_row(scale), strict=True)]
    if bias is not None:
        y = [a + b for a, b in zip(y, tiles.load_row(bias), strict=True)]
    tiles.store(normed, y)


def _norm_backward(
    residual, d_residual, d_normed, scale, dx, *sums_out, kind: str, eps: float, steps: int, has_bias: bool
):
    """steps * ROWS rows; their part of the gradients of scale and bias goes to this program's row of those."""
    program = pl.program_id(0)

    def step(i, sums):
        tiles = _Tiles((program * steps + i) * ROWS, *residual.shape, bounded=residual.shape[0] % (steps * ROWS) > 0)
        x, dy, direct = tiles.load(residual), tiles.load(d_normed), tiles.load(d_residual)
        normal, rstd = tiles.normalize(x, kind, eps)
        g = dy if scale is None else [a * s for a, s in zip(dy, tiles.load_row(scale), strict=True)]
        mean = tiles.mean(g) if kind == "layer" else 0.0
        slope = tiles.mean([a * n for a, n in zip(g, normal, strict=True)])
        tiles.store(dx, [d + rstd * (a - mean - n * slope) for d, a, n in zip(direct, g, normal, strict=True)])
        parts = [a * n for a, n in zip(dy, normal, strict=True)] if scale is not None else []
        parts = parts + (dy if has_bias else [])
        return [s + p for s, p in zip(sums, parts, strict=True)]

    count = pl.cdiv(residual.shape[1], WIDTH)
    zeros = [jnp.zeros((ROWS, WIDTH), jnp.float32)] * (count * len(sums_out))
    sums = jax.lax.fori_loop(0, steps, step, zeros) if zeros else step(0, [])
    for i, part in enumerate(sums):
        column = i % count * WIDTH + jnp.arange(WIDTH)
        store(sums_out[i // count].at[program, column], part.sum(0), mask=column < residual.shape[1])


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

    def normalize(self, tiles, kind, eps):
        if kind == "layer":
            mean, masks = self.mean(tiles), self.masks
            tiles = [t - mean if m is None else jnp.where(m, t - mean, 0.0) for t, m in zip(tiles, masks, strict=True)]
        rstd = jax.lax.rsqrt(self.mean([t * t for t in tiles]) + eps)
        return [t * rstd for t in tiles], rstd


def _load(ref, mask):
    return load(ref, mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)
