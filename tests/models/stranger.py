"""A model as someone who forks this would write it: RMSNorm, rotary positions, QK-norm, SwiGLU, grouped-query
attention, an untied head. Nothing but this file changes: `--config.model=tests/models/stranger.py`.

Letters in shapes: B batch, T time, C n_embd, N heads, K key-value heads, H head size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt import UserError
from jaxgpt.keys import key
from jaxgpt.models import KVCache, ModelConfig, Role, count_params
from jaxgpt.ops.cross_entropy import linear_cross_entropy


@dataclasses.dataclass(frozen=True)
class StrangerConfig(ModelConfig):
    n_kv_head: int = key(1, "key-value heads, shared by n_head / n_kv_head heads each", least=1)
    rope_base: float = key(10_000.0, "longest wavelength of the rotary positions")

    ROLES = (
        Role("wte/embedding", "embedding", tensor=1, product=False),
        Role("lm_head/embedding", "head", tensor=0),
        Role("h/*/attn/q/kernel", "matrix", tensor=1),
        Role("h/*/attn/kv/kernel", "matrix"),
        Role("h/*/attn/out/kernel", "matrix", tensor=0),
        Role("h/*/gate/kernel", "matrix", tensor=1),
        Role("h/*/up/kernel", "matrix", tensor=1),
        Role("h/*/down/kernel", "matrix", tensor=0),
        Role("h/*/*/scale", "vector", decay=False, float32=True),
        Role("h/*/attn/*/scale", "vector", decay=False, float32=True),
        Role("norm/scale", "vector", decay=False, float32=True),
    )

    LACKS = ("dropout", "bias", "doc_mask", "remat")

    def __post_init__(self):
        super().__post_init__()
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}; choose one that does")

    def build(self, rngs):
        return Stranger(self, rngs=rngs)

    def empty_cache(self, batch, slots):
        return KVCache.empty(self, batch, slots, self.n_kv_head)

    def flops_per_token(self, params):
        return 6.0 * count_params(self, params) + 12 * self.n_layer * self.n_embd * self.block_size


def linear(config, n_in, n_out, rngs):
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(n_in, n_out, use_bias=False, dtype=config.dtype, kernel_init=init, rngs=rngs)


def norm(config, size, rngs):
    return nnx.RMSNorm(size, dtype=config.dtype, rngs=rngs)


def rotate(x, positions, base):
    """Rotary positions (arXiv 2104.09864) on (B, T, N, H)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * base ** -(jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config, size = config, config.head_size
        self.q = linear(config, config.n_embd, config.n_embd, rngs)
        self.kv = linear(config, config.n_embd, 2 * config.n_kv_head * size, rngs)
        self.out = linear(config, config.n_embd, config.n_embd, rngs)
        self.q_norm, self.k_norm = norm(config, size, rngs), norm(config, size, rngs)

    def __call__(self, x, start, cache):
        """x: (B, T, C); start: the first token's position; cache: this layer's keys and values (B, S, K, H)."""
        c, (batch, time, _) = self.config, x.shape
        positions = start + jnp.arange(time)
        q = self.q(x).reshape(batch, time, c.n_head, c.head_size)
        k, v = jnp.split(self.kv(x).reshape(batch, time, 2 * c.n_kv_head, c.head_size), 2, axis=2)
        q, k = rotate(self.q_norm(q), positions, c.rope_base), rotate(self.k_norm(k), positions, c.rope_base)
        if cache is not None:
            k, v = cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
        visible = jnp.arange(k.shape[1])[None, :] <= positions[:, None]
        y = jax.nn.dot_product_attention(q, k, v, mask=visible[None, None])
        return self.out(y.reshape(x.shape)), cache


class Block(nnx.Module):
    def __init__(self, config, *, rngs):
        hidden = 4 * config.n_embd
        self.norm_1, self.norm_2 = norm(config, config.n_embd, rngs), norm(config, config.n_embd, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.gate, self.up = linear(config, config.n_embd, hidden, rngs), linear(config, config.n_embd, hidden, rngs)
        self.down = linear(config, hidden, config.n_embd, rngs)

    def __call__(self, x, start, cache):
        y, cache = self.attn(self.norm_1(x), start, cache)
        x = x + y
        y = self.norm_2(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), cache


class Stranger(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config, shape = config, (config.padded_vocab_size, config.n_embd)
        normal = nnx.initializers.normal(0.02)
        self.wte = nnx.Embed(*shape, embedding_init=normal, rngs=rngs)
        self.lm_head = nnx.Embed(*shape, embedding_init=normal, rngs=rngs)
        self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        self.norm = norm(config, config.n_embd, rngs)

    def hidden(self, tokens, *, seed=None, cache=None):
        c, start = self.config, 0 if cache is None else cache.length
        x, keys, values = self.wte.embedding[...][tokens].astype(c.dtype), [], []
        for i, block in enumerate(self.h):
            x, new = block(x, start, None if cache is None else (cache.k[i], cache.v[i]))
            if new is not None:
                keys.append(new[0])
                values.append(new[1])
        if cache is not None:
            cache = cache._replace(k=tuple(keys), v=tuple(values), length=start + tokens.shape[1])
        return self.norm(x).reshape(-1, c.n_embd), cache

    def logits(self, x):
        table = self.lm_head.embedding[...].astype(self.config.dtype)
        return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)[..., : self.config.vocab_size]

    def loss(self, tokens, targets, *, seed=None):
        x, _ = self.hidden(tokens)
        c, table = self.config, self.lm_head.embedding[...]
        return linear_cross_entropy(x, table, targets.reshape(-1), vocab_size=c.vocab_size, kernels=c.kernels)
