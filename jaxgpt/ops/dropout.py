"""Dropout whose mask is a hash of (seed, element index): nothing random is stored, and any sharding gives the same."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt


def hash_bits(seed: UInt[Array, ""], index: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """32 well-mixed bits per index: two rounds of `lowbias32` by Chris Wellons (hash-prospector), keyed by seed."""
    x = index ^ seed
    for _ in range(2):
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        x = (x ^ (x >> 16)) + seed
    return x


def keep_at(index: UInt[Array, "..."], rate: float, seed: UInt[Array, ""]) -> Bool[Array, "..."]:
    """True with probability 1 - rate (to 2^-32), a function of the seed and the index alone."""
    return hash_bits(seed, index) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def keep_mask(shape: tuple[int, ...], rate: float, seed: UInt[Array, ""]) -> Bool[Array, "..."]:
    """`keep_at` of each element's position in an array of this shape, counted modulo 2^32."""
    strides = [math.prod(shape[i + 1 :]) % 2**32 for i in range(len(shape))]
    index = jnp.zeros(shape, jnp.uint32)
    for i, stride in enumerate(strides):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(stride)
    return keep_at(index, rate, seed)


def dropout(x: Float[Array, "..."], rate: float, seed: UInt[Array, ""]) -> Float[Array, "..."]:
    """x with each element zeroed with probability `rate`, the others divided by 1 - rate."""
    return _dropout(x, rate, seed) if rate > 0.0 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _dropout(x, rate: float, seed):
    return jnp.where(keep_mask(x.shape, rate, seed), x / (1.0 - rate), 0.0).astype(x.dtype)


def _backward(rate, seed, dy):
    # the barrier makes it another seed to the compiler, which would keep the forward pass' mask rather than redo it
    return _dropout(dy, rate, jax.lax.optimization_barrier(seed)), None


_dropout.defvjp(lambda x, rate, seed: (_dropout(x, rate, seed), seed), _backward)
