"""Causal self-attention: cuDNN's fused kernel where it applies, one with dropout of our own, else plain XLA."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, UInt

from jaxgpt.ops.dropout import dropout, keep_at
from jaxgpt.ops.launch import exp2, launch, load, store
from jaxgpt.sharding import split_heads

BLOCK, STEP, NUM_WARPS = 64, 32, 4  # of our kernels: queries (or keys) of a program, keys (or queries) for each turn
LOG2_E = math.log2(math.e)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    *,
    implementation: str,
    rate: float = 0.0,
    seed: UInt[Array, ""] | None = None,
    docs: Int[Array, "B T"] | None = None,
    kernel: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(q·k / sqrt(H)) v, where a token sees itself and what came before it.

    implementation: "cudnn" or "xla". rate: dropout of the attention weights, drawn from `seed`. docs: numbers the
    documents of each row; a token then sees its own document alone. kernel: drop out in our kernel, shapes allowing.
    """
    if seed is None:
        rate = 0.0
    if implementation == "cudnn" and rate == 0.0:
        # a mask with is_causal: cuDNN takes it as a bias, at the cost of its memory
        mask = None if docs is None else (docs[:, None, :, None] == docs[:, None, None, :])
        cudnn = functools.partial(jax.nn.dot_product_attention, mask=mask, is_causal=True, implementation="cudnn")
        return split_heads(cudnn)(q, k, v)
    if kernel and rate > 0.0 and docs is None and _fits(q):
        return _fused(q, k, v, seed, rate)
    return _plain(q, k, v, rate, seed, docs)


def _plain(q, k, v, rate, seed, docs):
    """The twin in plain JAX: scores and softmax in float32, weights in the inputs' dtype."""
    t = q.shape[1]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    visible = jnp.tril(jnp.ones((t, t), bool))
    if docs is not None:
        visible = visible & (docs[:, None, :, None] == docs[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    if rate > 0.0:
        weights = dropout(weights, rate, seed)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


# The kernels follow FlashAttention-2 (arXiv 2307.08691): each program makes the weights of one block of queries and one
# of keys at a time, and the backward pass makes them again, from the scores and their saved logsumexp, mask included.


def _fits(q) -> bool:
    t, h = q.shape[1], q.shape[3]
    return t % BLOCK == 0 and t <= 1024 and h in (16, 32, 64, 128) and h * q.dtype.itemsize <= 256


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(q, k, v, seed, rate: float):
    return _forward(q, k, v, seed, rate)[0]


def _forward(q, k, v, seed, rate):
    out, lse = _launch(_attention_forward, q, k, v, seed=seed, rate=rate, outs=(q, None))
    return out, (q, k, v, out, lse, seed)


def _backward(rate, saved, dy):
    q, k, v, y, lse, seed = saved
    dq, delta = _launch(_attention_dq, q, k, v, y, dy, lse, seed=seed, rate=rate, outs=(q, None))
    dk, dv = _launch(_attention_dkv, q, k, v, dy, lse, delta, seed=seed, rate=rate, outs=(k, v))
    return dq, dk, dv, None


_fused.defvjp(_forward, _backward)


# jitted so that a model traces and lowers each once, not once a layer
@functools.partial(jax.jit, static_argnums=0, static_argnames="rate")
def _launch(program, q, *arrays, seed, rate, outs):
    """program for each block of each head; outs: arrays to shape its outputs like, None for a float32 (B·N, T)."""
    batch, time, heads, _ = q.shape
    outs = [((batch * heads, time), jnp.float32) if out is None else (out.shape, out.dtype) for out in outs]

    def kernel(seed_ref, *refs, interpret):
        program(_Block(q.shape, rate, seed_ref[0], interpret), *refs)

    kernel.__name__ = program.__name__  # what profiles show
    grid = batch * heads * (time // BLOCK)
    return launch(kernel, seed.reshape(1), q, *arrays, out=outs, grid=grid, num_warps=NUM_WARPS)


class _Block:
    """The part of one head of one row that a program handles, from `start` on, and what it needs of the others."""

    def __init__(self, shape, rate: float, seed, interpret: bool):
        _, self.time, heads, size = shape
        blocks = self.time // BLOCK
        self.pair, self.start = pl.program_id(0) // blocks, pl.program_id(0) % blocks * BLOCK
        self.row, self.head = self.pair // heads, self.pair % heads
        self.rate, self.seed, self.interpret, self.scale = rate, seed, interpret, 1 / math.sqrt(size)

    def load(self, ref, start=None, size: int = BLOCK):
        """`size` rows of this head from `start` on, by default the program's own."""
        return load(self._at(ref, self.start if start is None else start, size))

    def store(self, ref, x):
        store(self._at(ref, self.start, BLOCK), x.astype(ref.dtype))

    def _at(self, ref, start, size):
        rows = pl.ds(start, size)
        return ref.at[self.pair, rows] if len(ref.shape) == 2 else ref.at[self.row, rows, self.head, :]

    def masks(self, query, key):
        """What a query sees of the keys, and which weights dropout keeps: as the twin's tril and `keep_mask`."""
        query, key = jnp.broadcast_arrays(query, key)
        index = (self.pair * self.time + query).astype(jnp.uint32) * self.time + key.astype(jnp.uint32)
        return query >= key, keep_at(index, self.rate, self.seed)

    def exp2(self, scores, shift):
        """exp(scores / sqrt(H)) / 2**shift."""
        return exp2(scores, LOG2_E * self.scale, -shift, self.interpret)


def _dot(a, b, transposed: bool = False):
    """a @ b, or a @ b.T, summed in float32."""
    return jax.lax.dot_general(a, b, (((1,), (int(transposed),)), ((), ())), preferred_element_type=jnp.float32)


def _attention_forward(block, q_ref, k_ref, v_ref, out_ref, lse_ref):
    """lse: logarithms to base 2."""
    q, query = block.load(q_ref), block.start + jnp.arange(BLOCK)[:, None]

    def step(j, carry):
        top, total, y = carry
        k, v = block.load(k_ref, j * STEP, STEP), block.load(v_ref, j * STEP, STEP)
        visible, keep = block.masks(query, j * STEP + jnp.arange(STEP)[None, :])
        scores = jnp.where(visible, _dot(q, k, transposed=True), -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, 1) * (LOG2_E * block.scale))
        p, shrink = block.exp2(scores, new_top[:, None]), jnp.exp2(top - new_top)
        y = y * shrink[:, None] + _dot(jnp.where(keep, p, 0.0).astype(v.dtype), v)
        return new_top, total * shrink + jnp.sum(p, 1), y

    first = jnp.full(BLOCK, -jnp.inf), jnp.zeros(BLOCK), jnp.zeros(q.shape)
    top, total, y = jax.lax.fori_loop(0, (block.start + BLOCK) // STEP, step, first)
    block.store(out_ref, y * (1 / ((1 - block.rate) * total))[:, None])
    block.store(lse_ref, top + jnp.log2(total))


def _attention_dq(block, q_ref, k_ref, v_ref, y_ref, dy_ref, lse_ref, dq_ref, delta_ref):
    """delta: for each query the sum over keys of weights times their gradients, equal to that of y times dy."""
    q, dy, lse = block.load(q_ref), block.load(dy_ref), block.load(lse_ref)
    query = block.start + jnp.arange(BLOCK)[:, None]
    delta = jnp.sum(block.load(y_ref).astype(jnp.float32) * dy.astype(jnp.float32), 1)
    block.store(delta_ref, delta)

    def step(j, dq):
        k, v = block.load(k_ref, j * STEP, STEP), block.load(v_ref, j * STEP, STEP)
        visible, keep = block.masks(query, j * STEP + jnp.arange(STEP)[None, :])
        p = jnp.where(visible, block.exp2(_dot(q, k, transposed=True), lse[:, None]), 0.0)
        dp = _dot(dy, v, transposed=True) * (1 / (1 - block.rate))
        ds = p * (jnp.where(keep, dp, 0.0) - delta[:, None])
        return dq + _dot(ds.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, (block.start + BLOCK) // STEP, step, jnp.zeros(q.shape))
    block.store(dq_ref, dq * block.scale)


def _attention_dkv(block, q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, dk_ref, dv_ref):
    """All that is keys by queries is transposed here."""
    k, v, key = block.load(k_ref), block.load(v_ref), block.start + jnp.arange(BLOCK)[:, None]

    def step(i, carry):
        dk, dv = carry
        q, dy = block.load(q_ref, i * STEP, STEP), block.load(dy_ref, i * STEP, STEP)
        lse, delta = block.load(lse_ref, i * STEP, STEP), block.load(delta_ref, i * STEP, STEP)
        visible, keep = block.masks(i * STEP + jnp.arange(STEP)[None, :], key)
        p = jnp.where(visible, block.exp2(_dot(k, q, transposed=True), lse[None, :]), 0.0)
        dv = dv + _dot(jnp.where(keep, p, 0.0).astype(dy.dtype), dy)
        dp = _dot(v, dy, transposed=True) * (1 / (1 - block.rate))
        ds = p * (jnp.where(keep, dp, 0.0) - delta[None, :])
        return dk + _dot(ds.astype(q.dtype), q), dv

    first = jnp.zeros(k.shape), jnp.zeros(v.shape)
    dk, dv = jax.lax.fori_loop(block.start // STEP, block.time // STEP, step, first)
    block.store(dk_ref, dk * block.scale)
    block.store(dv_ref, dv * (1 / (1 - block.rate)))
