"""GPT-2's GELU (the tanh form) that keeps only its input for the backward pass, and computes in float32.

With u = sqrt(2/pi) (h + 0.044715 h^3) it is 0.5 h (1 + tanh u) = h sigmoid(2u), which costs one exponential and one
division, and whose derivative is made of the same sigmoid.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxgpt.ops.launch import launch, load, sigmoid, store

BLOCK, NUM_WARPS = 4096, 4  # elements a program handles: 4 times 16 bytes of bfloat16 for each thread
SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def gelu(h: Float[Array, "..."], *, kernel: bool = False) -> Float[Array, "..."]:
    """GELU(h) in h's dtype, computed in float32."""
    return _gelu(h, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gelu(h, kernel: bool):
    if kernel:  # in this very form XLA gives it to cuBLAS, to do (in float32) with the matrix product before it
        return jax.nn.gelu(h, approximate=True)
    return gelu_value(h.astype(jnp.float32)).astype(h.dtype)


def _forward(h, kernel):
    return _gelu(h, kernel), h


def _backward(kernel, h, dy):
    if kernel:
        return (_launch(gelu_gradient, h, dy),)
    return (gelu_gradient(h.astype(jnp.float32), dy.astype(jnp.float32)).astype(h.dtype),)


_gelu.defvjp(_forward, _backward)


def gelu_value(h, sigmoid=jax.nn.sigmoid):
    return h * sigmoid(h * (SLOPE + SLOPE * CUBIC * (h * h)))


def gelu_gradient(h, dy, sigmoid=jax.nn.sigmoid):
    square = h * h
    s = sigmoid(h * (SLOPE + SLOPE * CUBIC * square))
    return dy * (s + (s - s * s) * (h * (SLOPE + 3 * SLOPE * CUBIC * square)))


@functools.partial(jax.jit, static_argnums=0)  # so that a model traces and lowers it once, not once a layer
def _launch(function, *arrays):
    """function of float32 blocks of the arrays."""
    like = arrays[0]

    def kernel(*refs, interpret):
        index = pl.program_id(0) * BLOCK + jnp.arange(BLOCK)
        mask = None if like.size % BLOCK == 0 else index < like.size
        blocks = [load(ref.at[index], mask=mask).astype(jnp.float32) for ref in refs[:-1]]
        result = function(*blocks, functools.partial(sigmoid, interpret=interpret))
        store(refs[-1].at[index], result.astype(like.dtype), mask=mask)

    kernel.__name__ = function.__name__  # what profiles show
    flat = [a.reshape(-1) for a in arrays]
    out = launch(kernel, *flat, out=[(flat[0].shape, like.dtype)], grid=pl.cdiv(like.size, BLOCK), num_warps=NUM_WARPS)
    return out[0].reshape(like.shape)
