"""GPT-2: tanh GELU, LayerNorm with epsilon 1e-5, learned positions, tied embeddings, init 0.02 and 0.02/√(2L).

Letters in shapes: B batch, T time (query), S key time, C n_embd, N heads, H head size, F MLP hidden, V padded
vocabulary, L layers. Activations are 2-D, (B·T, C), everywhere but inside attention: XLA then makes no transposed
copies of them for the weight gradients.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt

from jaxgpt.models import KVCache, ModelConfig, Params, Role, count_params, documents, normal, traced_once
from jaxgpt.ops.attention import attention, cached_attention
from jaxgpt.ops.cross_entropy import linear_cross_entropy
from jaxgpt.ops.dropout import dropout
from jaxgpt.ops.linear import Fast, add_norm_linear, linear
from jaxgpt.ops.norm import Norm, add_norm


@dataclasses.dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """GPT-2's shape and how it computes."""

    # `tensor` splits the vocabulary, the heads and the MLP's hidden units, as Megatron-LM does (arXiv 1909.08053).
    # wte is tied to the logits: looked up, and multiplied.
    ROLES = (
        Role("wte/embedding", "embedding", tensor=0),
        Role("wpe/embedding", "embedding", product=False),
        Role("h/*/attn/c_attn/kernel", "matrix", tensor=-1, stack=-2),
        Role("h/*/attn/c_attn/bias", "vector", tensor=-1, decay=False, stack=-2),
        Role("h/*/attn/c_proj/kernel", "matrix", tensor=0),
        Role("h/*/attn/c_proj/bias", "vector", decay=False),
        Role("h/*/mlp/c_fc/kernel", "matrix", tensor=-1),
        Role("h/*/mlp/c_fc/bias", "vector", tensor=-1, decay=False),
        Role("h/*/mlp/c_proj/kernel", "matrix", tensor=0),
        Role("h/*/mlp/c_proj/bias", "vector", decay=False),
        Role("h/*/ln_1/*", "vector", decay=False, float32=True),
        Role("h/*/ln_2/*", "vector", decay=False, float32=True),
        Role("ln_f/*", "vector", decay=False, float32=True),
    )

    def build(self, rngs: nnx.Rngs) -> "GPT":
        return GPT(self, rngs=rngs)

    def flops_per_token(self, params: Params) -> float:
        """6N + 12·L·C·T (PaLM, arXiv 2204.02311, appendix B; nanoGPT's), N without position embeddings."""
        return 6.0 * count_params(self, params) + self.attention_flops_per_token()

    def attention_flops_per_token(self) -> float:
        return 12.0 * self.n_layer * self.n_embd * self.block_size


def _layer_norm(config: GPTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.n_embd, use_bias=config.bias, rngs=rngs)


def _linear(
    config: GPTConfig, n_in: int, n_out: int | tuple[int, ...], std: float, rngs: nnx.Rngs
) -> nnx.LinearGeneral:
    init = normal(std)
    return nnx.LinearGeneral(n_in, n_out, use_bias=config.bias, dtype=config.dtype, kernel_init=init, rngs=rngs)


def _norm(layer: nnx.LayerNorm) -> Norm:
    return Norm("layer", _value(layer.scale), _value(layer.bias))


def _weights(layer: nnx.LinearGeneral):
    return layer.kernel[...], _value(layer.bias)


def _value(param: nnx.Param | None):
    return None if param is None else param[...]


class Attention(nnx.Module):
    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        # (C, 3, C) is GPT-2's fused (C, 3C) with queries, keys and values apart, so that heads can be sharded
        self.c_attn = _linear(config, config.n_embd, (3, config.n_embd), 0.02, rngs)
        self.c_proj = _linear(config, config.n_embd, config.n_embd, 0.02 / math.sqrt(2 * config.n_layer), rngs)

    def __call__(self, x, branch, norm: Norm, batch: int, fast: Fast, *, seed=None, docs=None, cache=None):
        """The residual stream, this branch (see `linear`'s residual) and the updated (keys, values) of a cache."""
        c = self.config
        x, qkv = add_norm_linear(x, branch, norm, *_weights(self.c_attn), fast=fast)
        q, k, v = (y.reshape(batch, -1, c.n_head, c.head_size) for y in qkv)
        if cache is None:
            rate, kernels = 0.0 if seed is None else c.dropout, fast.kernels
            y = attention(q, k, v, implementation=c.attention, rate=rate, seed=seed, docs=docs, kernels=kernels)
        else:
            y, cache = cached_attention(q, k, v, cache, docs=docs, kernels=fast.kernels)
        x, y = linear(y.reshape(x.shape), *_weights(self.c_proj), residual=x, fast=fast)
        return x, y, cache


class MLP(nnx.Module):
    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.c_fc = _linear(config, config.n_embd, 4 * config.n_embd, 0.02, rngs)
        self.c_proj = _linear(config, 4 * config.n_embd, config.n_embd, 0.02 / math.sqrt(2 * config.n_layer), rngs)

    def __call__(self, x, branch, norm: Norm, fast: Fast):
        """The residual stream and this branch, (B·T, C) both: see `linear`'s residual."""
        x, y = add_norm_linear(x, branch, norm, *_weights(self.c_fc), activation="gelu", to_linear=True, fast=fast)
        return linear(y, *_weights(self.c_proj), residual=x, fast=fast)


class Block(nnx.Module):
    """A transformer block that takes the residual stream and the previous branch's output still unadded.

    Adding it here lets one kernel do the addition and the normalization that follows.
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.ln_1 = _layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = _layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, branch, seeds=None, docs=None, cache=None, *, batch: int):
        """x, branch: (B·T, C); seeds: 3 dropout seeds or None. Returns the same pair after the block, and the cache."""
        c = self.config
        fast = Fast(c.kernels, fp8=c.matmul_dtype == "fp8", decode=cache is not None and len(x) == batch)
        seed = None if seeds is None else seeds[0]
        x, y, cache = self.attn(x, branch, _norm(self.ln_1), batch, fast, seed=seed, docs=docs, cache=cache)
        y = y if seeds is None else dropout(y, c.dropout, seeds[1])
        x, y = self.mlp(x, y, _norm(self.ln_2), fast)
        y = y if seeds is None else dropout(y, c.dropout, seeds[2])
        return x, y, cache


class GPT(nnx.Module):
    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config

        def padded(rng, shape, dtype):  # the vocabulary's padding is zero, and stays so
            return jnp.where(jnp.arange(shape[0])[:, None] < config.vocab_size, normal(0.02)(rng, shape, dtype), 0)

        keys = jax.random.split(rngs.params.key[...], 1 + config.n_layer)
        outer = nnx.Rngs(keys[0])
        self.wte = nnx.Embed(config.padded_vocab_size, config.n_embd, embedding_init=padded, rngs=outer)
        self.wpe = nnx.Embed(config.block_size, config.n_embd, embedding_init=normal(0.02), rngs=outer)
        # All blocks at once, and the barrier keeps it so: a few kernels of random numbers, not some a layer
        blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys[1:])
        blocks = jax.lax.optimization_barrier(blocks)
        self.h = nnx.List([jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(config.n_layer)])
        self.ln_f = _layer_norm(config, outer)

    def hidden(
        self, tokens: Int[Array, "B T"], *, seed: UInt[Array, ""] | None = None, cache: KVCache | None = None
    ) -> tuple[Float[Array, "BT C"], KVCache | None]:
        """The final, normalized hidden states, and the cache after these tokens if one was given.

        seed: where dropout's randomness comes from; None turns dropout off. T must not pass block_size, nor
        cache.length + T the cache's slots.
        """
        c = self.config
        batch, time = tokens.shape
        if time > c.block_size:
            raise ValueError(f"{time} tokens exceed block_size={c.block_size}")
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        positions = jax.lax.dynamic_slice_in_dim(self.wpe.embedding[...], start, time).astype(c.dtype)
        # looked up before the cast: the gradient then adds up in float32, where frequent tokens would swamp bfloat16
        x = self.wte.embedding[...][tokens].astype(c.dtype) + positions
        x = x.reshape(batch * time, c.n_embd)
        seeds = None
        if seed is not None and c.dropout > 0:
            seeds = jax.random.bits(jax.random.key(seed), (3 * c.n_layer + 1,), jnp.uint32)
            x = dropout(x, c.dropout, seeds[-1])
        docs = documents(c, tokens, cache)
        run = traced_once(Block.__call__, remat=c.remat == "block", batch=batch)
        branch = None
        layers_k, layers_v = [], []
        for i, block in enumerate(self.h):
            layer_seeds = None if seeds is None else seeds[3 * i : 3 * i + 3]
            layer_cache = None if cache is None else (cache.k[i], cache.v[i], cache.length)
            x, branch, new = run(block, x, branch, layer_seeds, docs, layer_cache)
            if new is not None:
                layers_k.append(new[0])
                layers_v.append(new[1])
        x = add_norm(x, branch, _norm(self.ln_f), kernels=c.kernels)[1]
        if cache is not None:
            cache = KVCache(tuple(layers_k), tuple(layers_v), docs, cache.length + time)
        return x, cache

    def __call__(
        self, tokens: Int[Array, "B T"], *, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T vocab_size"], KVCache | None]:
        """Next-token logits in float32 over the true vocabulary (padding cut off), without dropout, and the cache."""
        x, cache = self.hidden(tokens, cache=cache)
        return self.logits(x).reshape(*tokens.shape, -1), cache

    def logits(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows vocab_size"]:
        """Float32 logits of hidden states, padding cut off."""
        c, rows = self.config, x.reshape(-1, x.shape[-1])
        # few rows are a step of decoding
        options = {"columns": c.vocab_size, "dtype": jnp.float32, "fast": Fast(c.kernels, decode=True)}
        return linear(rows, self.wte.embedding[...].T, **options).reshape(*x.shape[:-1], -1)

    def loss(
        self, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], *, seed: UInt[Array, ""] | None = None
    ) -> Float[Array, ""]:
        """Mean cross-entropy in nats over all B·T targets, without float32 logits in memory."""
        x, _ = self.hidden(tokens, seed=seed)
        c = self.config
        table = self.wte.embedding[...]  # float32: its gradient is then not rounded to the computation's dtype
        fast: Any = {"kernels": c.kernels, "in_fp8": c.matmul_dtype == "fp8"}
        return linear_cross_entropy(x, table, targets.reshape(-1), vocab_size=c.vocab_size, **fast)
