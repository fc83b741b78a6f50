"""64-bit digests of arrays' bits, the same on the device and on the host, on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def _fold(xp, words, index):
    """Two 32-bit sums over elements, each mixed with its position (murmur3's finalizer). The order of summing is free,
    so any mesh gives the same; a change of one element always changes both."""
    h = words ^ (index * np.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    h = h ^ (h >> np.uint32(16))
    return xp.sum(h, dtype=np.uint32), xp.sum(h * (index * np.uint32(2) + np.uint32(1)), dtype=np.uint32)


def _unsigned(dtype) -> Any:
    return {1: np.uint8, 2: np.uint16}.get(np.dtype(dtype).itemsize, np.uint32)


@jax.jit
def _device_sums(x: jax.Array):
    bits = x.astype(np.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, _unsigned(x.dtype))
    index, stride = jnp.zeros(bits.shape, np.uint32), 1  # row-major position modulo 2^32
    for axis in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(np.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return _fold(jnp, bits.astype(np.uint32), index)


def digests(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """64-bit digest of each array's bits, computed where it lies; the same on any mesh and any number of processes."""
    # One after the other: with CPU devices, the reductions of several arrays at once can wait for each other forever.
    sums = {path: jax.device_get(_device_sums(x)) for path, x in arrays.items()}
    return {path: f"{a:08x}{b:08x}" for path, (a, b) in sums.items()}


def differing(sums: dict[str, str]) -> list[str]:
    """Names of arrays whose digests are not the same on all processes, each of which must call.

    A replicated array is digested from each process's own replica, so that replicas which have drifted apart show.
    """
    if jax.process_count() == 1 or not sums:
        return []
    table = np.array([[int(x[:8], 16), int(x[8:], 16)] for x in sums.values()], np.uint32)
    tables = multihost_utils.process_allgather(table)
    return [name for name, bad in zip(sums, (tables != tables[0]).any((0, 2)), strict=True) if bad]


def host_digest(x: np.ndarray) -> str:
    """`digests` of an array in host memory, block by block to stay in cache."""
    bits, sums = np.ascontiguousarray(x).reshape(-1).view(_unsigned(x.dtype)), np.zeros(2, np.uint32)
    for start in range(0, bits.size, 2**18):
        words = bits[start : start + 2**18].astype(np.uint32)
        index = (np.arange(start, start + words.size) % 2**32).astype(np.uint32)
        sums += np.array(_fold(np, words, index), np.uint32)
    return f"{sums[0]:08x}{sums[1]:08x}"
