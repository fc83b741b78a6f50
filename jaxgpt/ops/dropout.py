"""Dropout whose mask is a hash of (seed, element index): nothing random is stored, and any sharding gives the same."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt


def hash_bits(seed: UInt[Array, ""], index: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """32 well-mixed bits for each index: two rounds of `lowbias32` by Chris Wellons (hash-prospector), keyed by seed."""
    x = index ^ seed
    for _ in range(2):
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        x = (x ^ (x >> 16)) + seed
    return x


def keep_mask(shape: tuple[int, ...], rate: float, seed: UInt[Array, ""]) -> Bool[Array, "..."]:
    """True with probability 1 - rate (to 2^-32), a function of the seed and the position in `shape` alone."""
    strides = [math.prod(shape[i + 1 :]) % 2**32 for i in range(len(shape))]
    index = sum(jax.lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(s) for i, s in enumerate(strides))
    return hash_bits(seed, index) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))  # type: ignore[arg-type]


def dropout(x: Float[Array, "..."], rate: float, seed: UInt[Array, ""]) -> Float[Array, "..."]:
    """x with each element zeroed with probability `rate`, the others divided by 1 - rate."""
    if rate == 0.0:
        return x
    return jnp.where(keep_mask(x.shape, rate, seed), x / (1.0 - rate), 0.0).astype(x.dtype)
