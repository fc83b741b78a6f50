"""Causal attention on TPUs by JAX's splash attention kernel, which keeps no scores.

Its plain twin is attention._plain; docs/tpu.md has what it saves. It has no dropout.
"""

import functools
import importlib
import importlib.util
import math
from typing import Any

import jax
from jaxtyping import Array, Float, Int

LIBRARY = "jax.experimental.pallas.ops.tpu.splash_attention"
LANES = 128  # of a TPU's registers: the last dimension of an array is padded to a multiple of them
BLOCK, PART = 1024, 512  # keys in a core's memory at a time; queries, and keys in each turn


@functools.cache
def available() -> bool:
    """Whether this JAX has the library."""
    return importlib.util.find_spec(LIBRARY) is not None


def supports(shape: tuple[int, ...], kv_heads: int) -> bool:
    """Whether the kernel covers queries (B, T, N, H) with that many heads of keys and values."""
    _, time, heads, _ = shape
    return time % LANES == 0 and heads % kv_heads == 0 and available()


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    docs: Int[Array, "B T"] | None = None,
    *,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """softmax(scale q·k) v as in `attention.attention`. On a CPU the kernel is interpreted, for the tests."""
    library = importlib.import_module(LIBRARY)  # here: it takes 0.3 s, which other devices need not wait for
    q = (q * scale).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))

    def run(q, k, v, docs, interpret: bool):
        kernel = _kernel(library, q.shape[1:], window, interpret)
        return jax.vmap(kernel)(q, k, v, None if docs is None else library.SegmentIds(docs, docs))

    interpreted = functools.partial(run, interpret=True)
    y = jax.lax.platform_dependent(q, k, v, docs, cpu=interpreted, default=functools.partial(run, interpret=False))
    return y.swapaxes(1, 2)


def _kernel(library: Any, shape: tuple[int, ...], window: int | None, interpret: bool):
    """The library's kernel for queries (N, T, H) of one row."""
    heads, time, size = shape
    block, part = math.gcd(time, BLOCK), math.gcd(time, PART)
    # Heads of fewer than 128 features lie with time last, where nothing is padded
    layout = library.QKVLayout.SEQ_MINOR if size % LANES else library.QKVLayout.HEAD_DIM_MINOR
    sizes = library.BlockSizes(
        block_q=part,
        block_kv=block,
        block_kv_compute=part,
        block_q_dkv=part,
        block_kv_dkv=block,
        block_kv_dkv_compute=part,
        use_fused_bwd_kernel=True,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    mask = library.CausalMask((time, time)) if window is None else library.LocalMask((time, time), (window - 1, 0), 0)
    masks = library.MultiHeadMask([mask] * heads)
    return library.make_splash_mha_single_device(masks, block_sizes=sizes, interpret=interpret)
