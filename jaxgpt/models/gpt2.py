"""GPT-2 as a flax.nnx module: the model alone; no optimizer, no flags, no files.

Letters in shapes: B batch, T time (query), S key time, C n_embd, N heads, H head size, F MLP hidden, V padded
vocabulary, L layers. Activations are 2-D, (B·T, C), everywhere but inside attention: XLA then makes no transposed
copies of them for the weight gradients.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt

from jaxgpt import UserError
from jaxgpt.ops import fp8
from jaxgpt.ops.attention import attention
from jaxgpt.ops.cross_entropy import linear_cross_entropy
from jaxgpt.ops.dropout import dropout
from jaxgpt.ops.gelu import gelu
from jaxgpt.ops.layer_norm import add_layer_norm

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT and how it computes. Raises UserError on values that make no model."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    dtype: str = "float32"  # of the computation; parameters are always float32
    attention: str = "xla"  # xla | cudnn
    kernels: bool = False  # the GPU kernels of jaxgpt/ops in place of their plain twins
    remat: str = "none"  # none | block: recompute each block in the backward pass
    matmul_dtype: str = "auto"  # auto: dtype | fp8: 8 bits in the products of the MLP and of the vocabulary
    doc_mask: int = -1  # this token ends a document and attention does not cross it; -1: no boundaries

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; choose a multiple, such as "
                f"n_embd={self.n_head * max(1, round(self.n_embd / self.n_head))}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1")

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128, the width of matrix-unit tiles."""
        return -(-self.vocab_size // 128) * 128


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; `length` of the S slots are filled (the same for every row).

    An array for each layer, so that the compiler can add to each in place.
    """

    k: tuple[Float[Array, "B S N H"], ...]
    v: tuple[Float[Array, "B S N H"], ...]
    docs: Int[Array, "B S+1"] | None  # the number of each slot's document, if the model keeps documents apart
    length: Int[Array, ""]

    @staticmethod
    def empty(config: GPTConfig, batch: int, slots: int) -> "KVCache":
        shape = (batch, slots, config.n_head, config.n_embd // config.n_head)
        k, v = (tuple(jnp.zeros(shape, config.dtype) for _ in range(config.n_layer)) for _ in range(2))
        docs = jnp.zeros((batch, slots + 1), jnp.int32) if config.doc_mask >= 0 else None
        return KVCache(k, v, docs, jnp.zeros((), jnp.int32))


def _layer_norm(config: GPTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.n_embd, use_bias=config.bias, rngs=rngs)


def _linear(
    config: GPTConfig, n_in: int, n_out: int | tuple[int, ...], std: float, rngs: nnx.Rngs
) -> nnx.LinearGeneral:
    init = nnx.initializers.normal(std)
    return nnx.LinearGeneral(n_in, n_out, use_bias=config.bias, dtype=config.dtype, kernel_init=init, rngs=rngs)


@jax.custom_vjp
def _fan_out(x: Float[Array, "BT C"]):
    """x three times. Its gradients are added in turn, so that each matrix product adds to the last one's."""
    return x, x, x


def _fan_in(_, gradients):
    total, *others = gradients
    for gradient in others:
        total = jax.lax.optimization_barrier(total) + gradient
    return (total,)


_fan_out.defvjp(lambda x: ((x, x, x), None), _fan_in)


class Attention(nnx.Module):
    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        # (C, 3, C) is GPT-2's fused (C, 3C) with queries, keys and values apart, so that heads can be sharded
        self.c_attn = _linear(config, config.n_embd, (3, config.n_embd), 0.02, rngs)
        self.c_proj = _linear(config, config.n_embd, config.n_embd, 0.02 / math.sqrt(2 * config.n_layer), rngs)

    def __call__(self, x: Float[Array, "BT C"], batch: int, *, seed=None, docs=None, cache=None):
        """Returns the output (B·T, C), and the layer's updated (keys, values) if it was given a cache's."""
        c = self.config
        heads = (batch, -1, c.n_head, c.n_embd // c.n_head)
        kernel, bias = self.c_attn.kernel[...].astype(c.dtype), self.c_attn.bias
        # three products rather than one: their outputs are what attention takes, where slices would be copies
        q, k, v = (y @ kernel[:, i] for i, y in enumerate(_fan_out(x)))
        if bias is not None:
            q, k, v = (y + bias[i].astype(c.dtype) for i, y in enumerate((q, k, v)))
        q, k, v = (y.reshape(heads) for y in (q, k, v))
        if cache is not None:
            keys, values, length = cache
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k, length, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v, length, axis=1)
            y = _cached_attention(q, keys, values, length, docs)
            return self.c_proj(y.reshape(x.shape)), (keys, values)
        rate = 0.0 if seed is None else c.dropout
        y = attention(q, k, v, implementation=c.attention, rate=rate, seed=seed, docs=docs, kernel=c.kernels)
        return self.c_proj(y.reshape(x.shape)), None


def _cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    length: Int[Array, ""],
    docs: Int[Array, "B S+1"] | None,
) -> Float[Array, "B T N H"]:
    """Causal attention of T new tokens, already written at k, v[:, length : length+T], over all that came before."""
    t, s = q.shape[1], k.shape[1]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    visible = jnp.arange(s)[None, :] <= length + jnp.arange(t)[:, None]
    if docs is not None:
        own = jax.lax.dynamic_slice_in_dim(docs, length, t, axis=1)
        visible = visible & (own[:, None, :, None] == docs[:, None, None, :s])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


class MLP(nnx.Module):
    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.c_fc = _linear(config, config.n_embd, 4 * config.n_embd, 0.02, rngs)
        self.c_proj = _linear(config, 4 * config.n_embd, config.n_embd, 0.02 / math.sqrt(2 * config.n_layer), rngs)

    def __call__(self, x: Float[Array, "BT C"]) -> Float[Array, "BT C"]:
        if self.config.matmul_dtype == "fp8":
            b_fc, b_proj = (None if b is None else b[...] for b in (self.c_fc.bias, self.c_proj.bias))
            y = fp8.mlp(x, self.c_fc.kernel[...], b_fc, self.c_proj.kernel[...], kernel=self.config.kernels)
            return y if b_proj is None else y + b_proj.astype(y.dtype)
        return self.c_proj(gelu(self.c_fc(x), kernel=self.config.kernels))


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

    def __call__(self, x, branch, batch: int, seeds=None, docs=None, cache=None):
        """x, branch: (B·T, C); seeds: 3 dropout seeds or None. Returns the same pair after the block, and the cache."""
        rate = self.config.dropout
        x, y = _add_norm(self.ln_1, x, branch, self.config)
        y, cache = self.attn(y, batch, seed=None if seeds is None else seeds[0], docs=docs, cache=cache)
        y = y if seeds is None else dropout(y, rate, seeds[1])
        x, y = _add_norm(self.ln_2, x, y, self.config)
        y = self.mlp(y)
        y = y if seeds is None else dropout(y, rate, seeds[2])
        return x, y, cache


def _add_norm(norm: nnx.LayerNorm, x, branch, config: GPTConfig):
    bias = None if norm.bias is None else norm.bias[...]
    assert norm.scale is not None
    return add_layer_norm(x, branch, norm.scale[...], bias, kernel=config.kernels)


class GPT(nnx.Module):
    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(0.02)
        self.wte = nnx.Embed(config.padded_vocab_size, config.n_embd, embedding_init=normal, rngs=rngs)
        self.wpe = nnx.Embed(config.block_size, config.n_embd, embedding_init=normal, rngs=rngs)
        self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        self.ln_f = _layer_norm(config, rngs)

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
        docs = None
        if c.doc_mask >= 0:  # a token belongs to the document that began after the last boundary
            ends = (tokens == c.doc_mask).astype(jnp.int32)
            docs = jnp.cumsum(ends, axis=1)
            if cache is None:
                docs = docs - ends
            elif cache.docs is not None:  # an end counts from the next slot on
                docs = docs + jax.lax.dynamic_slice_in_dim(cache.docs, start, 1, axis=1)
                docs = jax.lax.dynamic_update_slice_in_dim(cache.docs, docs, start + 1, axis=1)
        branch = None
        layers_k, layers_v = [], []
        for i, block in enumerate(self.h):
            layer_seeds = None if seeds is None else seeds[3 * i : 3 * i + 3]
            layer_cache = None if cache is None else (cache.k[i], cache.v[i], cache.length)
            run = nnx.remat(Block.__call__, static_argnums=(3,)) if c.remat == "block" else Block.__call__
            x, branch, new = run(block, x, branch, batch, layer_seeds, docs, layer_cache)
            if new is not None:
                layers_k.append(new[0])
                layers_v.append(new[1])
        x = _add_norm(self.ln_f, x, branch, c)[1]
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
        table = self.wte.embedding[...].astype(self.config.dtype)
        return jnp.einsum("...c,vc->...v", x, table, preferred_element_type=jnp.float32)[..., : self.config.vocab_size]

    def loss(
        self, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], *, seed: UInt[Array, ""] | None = None
    ) -> Float[Array, ""]:
        """Mean cross-entropy in nats over all B·T targets, without float32 logits in memory."""
        x, _ = self.hidden(tokens, seed=seed)
        c = self.config
        table = self.wte.embedding[...]  # float32: its gradient is then not rounded to the computation's dtype
        fast = {"kernel": c.kernels, "in_fp8": c.matmul_dtype == "fp8"}
        return linear_cross_entropy(x, table, targets.reshape(-1), vocab_size=c.vocab_size, **fast)


def init_params(config: GPTConfig, key: Array, dtype: str = "float32") -> Params:
    """Fresh parameters as a nested dict: GPT-2's initialization, the padded rows of the vocabulary zero."""

    def init(module: Callable[..., nnx.Module], config: GPTConfig, key: Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(module(config, rngs=nnx.Rngs(key)), nnx.Param))
        return jax.tree.map(lambda x: x.astype(dtype), params)

    # All layers at once, and the barrier keeps it so: a few kernels of random numbers to compile, not some a layer
    outer, *layers = jax.random.split(key, 1 + config.n_layer)
    params = init(GPT, dataclasses.replace(config, n_layer=1), outer)
    blocks = jax.lax.optimization_barrier(jax.vmap(partial(init, Block, config))(jnp.stack(layers)))
    params["h"] = {i: jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(config.n_layer)}
    table = params["wte"]["embedding"]
    params["wte"]["embedding"] = jnp.where(jnp.arange(table.shape[0])[:, None] < config.vocab_size, table, 0)
    return params


def abstract_params(config: GPTConfig) -> Params:
    """The shapes and dtypes of `init_params`, without computing anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def bind(config: GPTConfig, params: Params) -> GPT:
    """The module over these parameters (of any float dtype)."""
    graphdef, state = _structure(config)
    state = jax.tree.map(lambda x: x, state)  # a copy
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


@functools.lru_cache(maxsize=8)  # over a second for 48 layers
def _structure(config: GPTConfig):
    return nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))), nnx.Param)


def count_params(params: Params, *, non_embedding: bool = True) -> int:
    """Number of parameters, position embeddings left out by default as nanoGPT counts them (padding included)."""
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return total - math.prod(params["wpe"]["embedding"].shape) if non_embedding else total
