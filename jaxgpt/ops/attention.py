"""Causal self-attention: a library's fused kernel where one applies, one with dropout of our own, else plain XLA."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxgpt import UserError
from jaxgpt.ops import decode, splash
from jaxgpt.ops.dropout import dropout, keep_at
from jaxgpt.ops.launch import available, exp2, launch, load, store
from jaxgpt.ops.paths import note
from jaxgpt.sharding import split_heads

# Of our kernels: queries (or keys) of a program, keys (or queries) for each turn. A float32 sum of 64 queries and 64
# features is 32 registers for each of a program's 128 threads; the backward pass holds two, and the operands
BLOCK, STEP, NUM_WARPS = 64, 32, 4
LOG2_E = math.log2(math.e)


def supports(shape: tuple[int, ...], kv_heads: int, dtype: jax.typing.DTypeLike, *, plain_mask: bool = True) -> bool:
    """Whether our kernel, which drops weights out, covers queries (B, T, N, H) and a mask that is causal alone."""
    _, t, n, h = shape
    fits = t % BLOCK == 0 and t <= 1024 and h in (16, 32, 64, 128) and h * jnp.dtype(dtype).itemsize <= 256
    return fits and n == kv_heads and plain_mask and available()


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    implementation: str = "xla",
    rate: float = 0.0,
    seed: UInt[Array, ""] | None = None,
    docs: Int[Array, "B T"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    kernels: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(scale q·k) v, where a token sees itself and what came before it. N heads share K of keys and values.

    implementation: "cudnn", "splash" (splash.py) or "xla". rate: dropout of the attention weights, drawn from `seed`.
    docs: numbers the documents of each row; a token then sees its own document alone. window: it sees the last `window`
    tokens alone, itself included. scale: by default 1 / sqrt(H). kernels: use our dropout kernel if `supports` says so.
    Raises UserError where N is no multiple of K.
    """
    if q.shape[2] % k.shape[2]:
        raise UserError(f"{q.shape[2]} heads of queries cannot share {k.shape[2]} of keys; make the first a multiple")
    if seed is None:
        rate = 0.0
    if implementation == "cudnn" and rate == 0.0:
        note("attention", "cudnn")
        # a mask with is_causal: cuDNN takes it as a bias, at the cost of its memory
        mask = None if docs is None else (docs[:, None, :, None] == docs[:, None, None, :])
        # is_causal with a window too, or cuDNN's reads the future
        options = {"mask": mask, "is_causal": True, "local_window_size": None if window is None else (window - 1, 0)}
        cudnn = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn", **options)
        return split_heads(cudnn)(q, k, v)
    if implementation == "splash" and rate == 0.0 and splash.supports(q.shape, k.shape[2]):
        note("attention", "splash")
        options = {"window": window, "scale": 1 / math.sqrt(q.shape[-1]) if scale is None else scale}
        return split_heads(functools.partial(splash.splash, **options))(q, k, v, docs)
    plain_mask = docs is None and window is None
    if kernels and rate > 0.0 and supports(q.shape, k.shape[2], q.dtype, plain_mask=plain_mask):
        note("attention", "kernel")
        return _fused(q, k, v, seed, rate, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    note("attention", "plain")
    t = q.shape[1]
    visible = _visible(jnp.arange(t)[:, None], jnp.arange(t)[None, :], window)
    if docs is not None:
        visible = visible & (docs[:, None, :, None] == docs[:, None, None, :])
    return _plain(q, k, v, visible, scale, rate, seed)


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"], Int[Array, ""]],
    *,
    docs: Int[Array, "B S1"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    kernels: bool = False,
) -> tuple[Float[Array, "B T N H"], tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]]:
    """Attention of T new tokens over those of the cache and each other, and the cache's (keys, values) with them in.

    cache: keys, values and the number of slots filled, the same for every row. docs: for every slot the number of its
    document, the new tokens' filled in. kernels: use the one for a single new token if `decode.supports` says so.
    Raises UserError where keys and cache differ in heads.
    """
    keys, values, length = cache
    if k.shape[2:] != keys.shape[2:]:  # or too few heads would be written, and the others read as zeros
        raise UserError(
            f"keys have (heads, size) {k.shape[2:]} and the cache {keys.shape[2:]}; make the model's empty_cache like "
            "its keys"
        )
    t, s = q.shape[1], keys.shape[1]
    if kernels and t == 1 and docs is None and decode.supports(q.shape[0], q.dtype):
        note("attention", "kernel")
        new = q[:, 0], k[:, 0], v[:, 0]
        y, keys, values = decode.attend(*new, keys, values, length, window=window, scale=scale)
        return y[:, None], (keys, values)
    note("attention", "plain")
    keys = jax.lax.dynamic_update_slice_in_dim(keys, k, length, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(values, v, length, axis=1)
    visible = _visible(length + jnp.arange(t)[:, None], jnp.arange(s)[None, :], window)
    if docs is not None:
        own = jax.lax.dynamic_slice_in_dim(docs, length, t, axis=1)
        visible = visible & (own[:, None, :, None] == docs[:, None, None, :s])
    return _plain(q, keys, values, visible, scale), (keys, values)


def _visible(query: Int[Array, "T 1"], key: Int[Array, "1 S"], window: int | None) -> Bool[Array, "T S"]:
    past = key <= query
    return past if window is None else past & (key > query - window)


def _plain(q, k, v, visible, scale, rate=0.0, seed=None):
    """The twin in plain JAX: scores and softmax in float32, weights in the inputs' dtype."""
    shared = q.shape[2] // k.shape[2]
    if shared > 1:
        k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1]) if scale is None else scores * scale
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    if rate > 0.0 and seed is not None:
        weights = dropout(weights, rate, seed)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


# The kernels follow FlashAttention-2 (arXiv 2307.08691): each program makes the weights of one block of queries and one
# of keys at a time, and the backward pass makes them again, from the scores and their saved logsumexp, mask included.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(q, k, v, seed, rate: float, scale: float):
    return _forward(q, k, v, seed, rate, scale)[0]


def _forward(q, k, v, seed, rate, scale):
    out, lse = _launch(_attention_forward, q, k, v, seed=seed, rate=rate, scale=scale, outs=(q, None))
    return out, (q, k, v, out, lse, seed)


def _backward(rate, scale, saved, dy):
    q, k, v, y, lse, seed = saved
    options = {"seed": seed, "rate": rate, "scale": scale}
    dq, delta = _launch(_attention_dq, q, k, v, y, dy, lse, outs=(q, None), **options)
    dk, dv = _launch(_attention_dkv, q, k, v, dy, lse, delta, outs=(k, v), **options)
    return dq, dk, dv, None


_fused.defvjp(_forward, _backward)


# jitted so that a model traces and lowers each once, not once a layer
@functools.partial(jax.jit, static_argnums=0, static_argnames=("rate", "scale"))
def _launch(program, q, *arrays, seed, rate, scale, outs):
    """program for each block of each head; outs: arrays to shape its outputs like, None for a float32 (B·N, T)."""
    batch, time, heads, _ = q.shape
    outs = [((batch * heads, time), jnp.float32) if out is None else (out.shape, out.dtype) for out in outs]

    def kernel(seed_ref, *refs, interpret):
        program(_Block(q.shape, rate, scale, seed_ref[0], interpret), *refs)

    kernel.__name__ = program.__name__  # what profiles show
    grid = batch * heads * (time // BLOCK)
    return launch(kernel, seed.reshape(1), q, *arrays, out=outs, grid=grid, num_warps=NUM_WARPS)


class _Block:
    """The part of one head of one row that a program handles, from `start` on, and what it needs of the others."""

    def __init__(self, shape, rate: float, scale: float, seed, interpret: bool):
        _, self.time, heads, _ = shape
        blocks = self.time // BLOCK
        self.pair, self.start = pl.program_id(0) // blocks, pl.program_id(0) % blocks * BLOCK
        self.row, self.head = self.pair // heads, self.pair % heads
        self.rate, self.seed, self.interpret, self.scale = rate, seed, interpret, scale

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
        """exp(scale * scores) / 2**shift."""
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
