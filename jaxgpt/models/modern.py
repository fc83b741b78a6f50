"""GPT-2's blocks with what has since been found to reach a loss sooner: the model of configs/speedrun.py.

RMS norms without parameters, QK-norm, rotary positions, ReLU², projections that begin at zero, value embeddings, an
untied head that begins at zero, soft-capped logits. Each is from modded-nanogpt unless it names a paper
(https://github.com/KellerJordan/modded-nanogpt); docs/speedrun.md has what each is worth.

Letters in shapes: B batch, T time (query), S key time, C n_embd, N heads, H head size, F MLP hidden, V padded
vocabulary, L layers. Activations are 2-D, (B·T, C), everywhere but inside attention.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt

from jaxgpt import UserError
from jaxgpt.keys import key
from jaxgpt.models import KVCache, ModelConfig, Params, Role, count_params, documents, normal, traced_once
from jaxgpt.ops.attention import attention, cached_attention
from jaxgpt.ops.cross_entropy import linear_cross_entropy, sampled_cross_entropy
from jaxgpt.ops.dropout import dropout
from jaxgpt.ops.linear import Fast, add_norm_linear, linear
from jaxgpt.ops.norm import Norm, add_norm
from jaxgpt.sharding import rows, whole

RMS = Norm("rms")
QK_SCALE = 0.12  # of queries' products with keys when both are normalized; for heads of 128 it is 1.36 / √128
LONGEST = 1024.0  # the slowest rotation's wavelength is 2π times this many tokens


@dataclasses.dataclass(frozen=True)
class ModernConfig(ModelConfig):
    """The model's shape, its pieces, and how it computes."""

    qk_norm: bool = key(True, "normalize queries and keys (arXiv 2010.04245)")
    rope: float = key(0.5, "part of each head that turns with the position (arXiv 2104.09864); 0: no positions")
    activation: str = key("relu2", "of the MLP: relu2 (arXiv 2109.08668) or gelu", choices=("relu2", "gelu"))
    zero_init: bool = key(True, "projections back to the residual stream begin at zero")
    value_embeds: int = key(3, "tables of value embeddings (arXiv 2410.17897): each for a layer at both ends")
    tied: bool = key(False, "the head is the token embedding")
    softcap: float = key(
        15.0, "logits are softcap·tanh(logits / softcap) (arXiv 2408.00118); 0: as they are", below=43.5
    )
    sampled_softmax: int = key(0, "estimate the training loss from so many rows of the head; 0: from all")

    ROLES = (
        Role("wte/embedding", "embedding", tensor=0, product=False, whole=False),
        Role("value_embeds/*/embedding", "embedding", tensor=0, product=False, whole=False),
        Role("lm_head/embedding", "head", tensor=0, whole=False),
        Role("h/*/attn/c_attn/kernel", "matrix", tensor=-1, stack=-2),
        Role("h/*/attn/c_proj/kernel", "matrix", tensor=0),
        Role("h/*/attn/value_mix", "vector", decay=False, float32=True),
        Role("h/*/mlp/c_fc/kernel", "matrix", tensor=-1),
        Role("h/*/mlp/c_proj/kernel", "matrix", tensor=0),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.bias:
            raise UserError("bias=True: model=modern has no biases; set --config.bias=false")
        if not 0 <= self.rope <= 1:
            raise UserError(f"rope={self.rope} must be between 0 and 1")
        if self.rope and self.head_size % 4:
            raise UserError(f"n_embd / n_head = {self.head_size} features of a head must be a multiple of 4 to turn")
        if self.rope and not round(self.rope * (self.head_size // 2)):
            raise UserError(f"rope={self.rope} of {self.head_size // 2} pairs of features is none; set 0, or more")
        if self.sampled_softmax % 128:
            raise UserError(f"sampled_softmax={self.sampled_softmax} must be a multiple of 128, or 0")
        if 2 * self.value_embeds > self.n_layer:
            raise UserError(f"value_embeds={self.value_embeds} must be at most half of n_layer={self.n_layer}")

    def build(self, rngs: nnx.Rngs) -> "Modern":
        return Modern(self, rngs=rngs)

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        return KVCache.empty(self, batch, slots, self.n_head)

    def flops_per_token(self, params: Params) -> float:
        """6N + 12·L·C·T, as for GPT-2; N: what tokens are multiplied with."""
        return 6.0 * count_params(self, params) + self.attention_flops_per_token()

    def attention_flops_per_token(self) -> float:
        return 12.0 * self.n_layer * self.n_embd * self.block_size

    @property
    def stochastic(self) -> bool:
        return self.dropout > 0 or 0 < self.sampled_softmax < self.vocab_size

    def table_of(self, layer: int) -> int | None:
        """Which table of value embeddings a layer has: with 3 of 12 layers 0, 1, 2 are layers 0, 1, 2 and 9, 10, 11."""
        n, last = self.value_embeds, self.n_layer - self.value_embeds
        return layer if layer < n else layer - last if layer >= last else None


def _linear(config: ModernConfig, n_in: int, n_out: int | tuple[int, ...], *, back: bool, rngs: nnx.Rngs):
    """A matrix of standard deviation 0.5/√n_in; one back to the residual stream begins at 0, or smaller by √(2L)."""
    std = 0.5 / math.sqrt(n_in) * (0.0 if config.zero_init else 1 / math.sqrt(2 * config.n_layer)) ** back
    return nnx.LinearGeneral(n_in, n_out, use_bias=False, kernel_init=normal(std), rngs=rngs)


def rotate(x: Float[Array, "B T N H"], start: Int[Array, ""] | int, part: float) -> Float[Array, "B T N H"]:
    """Turns feature i of the first half with feature i of the second, by an angle that grows with the position.

    `part` of these pairs turn, with wavelengths from 2π to 2π·1024 tokens; the others keep still. `start`: the first
    position.
    """
    pairs = x.shape[-1] // 2
    turning = round(part * pairs)
    speed = jnp.pad(LONGEST ** -jnp.linspace(0, 1, turning), (0, pairs - turning))
    angle = (start + jnp.arange(x.shape[1]))[:, None, None] * speed
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def rms_norm(x: Float[Array, "*rows H"]) -> Float[Array, "*rows H"]:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + RMS.eps)


class Attention(nnx.Module):
    def __init__(self, config: ModernConfig, *, has_values: bool, rngs: nnx.Rngs):
        self.config = c = config
        self.c_attn = _linear(c, c.n_embd, (3, c.n_embd), back=False, rngs=rngs)
        self.c_proj = _linear(c, c.n_embd, c.n_embd, back=True, rngs=rngs)
        self.value_mix = nnx.Param(jnp.full(2, 0.5)) if has_values else None

    def __call__(self, x, branch, embedded, batch: int, fast: Fast, *, seed=None, docs=None, cache=None):
        """The residual stream, this branch (see `linear`'s residual) and the updated (keys, values) of a cache.

        embedded: the tokens' value embeddings (B·T, C), or None.
        """
        c = self.config
        x, (q, k, v) = add_norm_linear(x, branch, RMS, self.c_attn.kernel[...], fast=fast)
        if self.value_mix is not None:
            mix = self.value_mix[...].astype(v.dtype)
            v = mix[0] * v + mix[1] * embedded
        q, k, v = (y.reshape(batch, -1, c.n_head, c.head_size) for y in (q, k, v))
        start = 0 if cache is None else cache[2]
        q, k = (self.place(y, start) for y in (q, k))
        options = {"docs": docs, "scale": QK_SCALE if c.qk_norm else None, "kernels": fast.kernels}
        if cache is None:
            rate = 0.0 if seed is None else c.dropout
            y = attention(q, k, v, implementation=c.attention, rate=rate, seed=seed, **options)
        else:
            y, cache = cached_attention(q, k, v, cache, **options)
        x, y = linear(y.reshape(x.shape), self.c_proj.kernel[...], residual=x, fast=fast)
        return x, y, cache

    def place(self, x: Float[Array, "B T N H"], start) -> Float[Array, "B T N H"]:
        """Queries or keys normalized and turned by their positions, in float32 and back."""
        y = x.astype(jnp.float32)
        y = rms_norm(y) if self.config.qk_norm else y
        return (rotate(y, start, self.config.rope) if self.config.rope else y).astype(x.dtype)


class MLP(nnx.Module):
    def __init__(self, config: ModernConfig, *, rngs: nnx.Rngs):
        self.config = c = config
        self.c_fc = _linear(c, c.n_embd, 4 * c.n_embd, back=False, rngs=rngs)
        self.c_proj = _linear(c, 4 * c.n_embd, c.n_embd, back=True, rngs=rngs)

    def __call__(self, x, branch, fast: Fast):
        """The residual stream and this branch, (B·T, C) both: see `linear`'s residual."""
        options = {"activation": self.config.activation, "to_linear": True}
        x, y = add_norm_linear(x, branch, RMS, self.c_fc.kernel[...], **options, fast=fast)
        return linear(y, self.c_proj.kernel[...], residual=x, fast=fast)


class Block(nnx.Module):
    """A transformer block that takes the residual stream and the previous branch's output still unadded, as GPT-2's."""

    def __init__(self, config: ModernConfig, *, has_values: bool, rngs: nnx.Rngs):
        self.config = config
        self.attn = Attention(config, has_values=has_values, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, branch, embedded, seeds=None, docs=None, cache=None, *, batch: int):
        """x, branch, embedded: (B·T, C); seeds: 3 dropout seeds or None. Returns x, branch after it, and the cache."""
        c = self.config
        fast = Fast(c.kernels, fp8=c.matmul_dtype == "fp8", decode=cache is not None and len(x) == batch)
        seed = None if seeds is None else seeds[0]
        x, y, cache = self.attn(x, branch, embedded, batch, fast, seed=seed, docs=docs, cache=cache)
        y = y if seeds is None else dropout(y, c.dropout, seeds[1])
        x, y = self.mlp(x, y, fast)
        y = y if seeds is None else dropout(y, c.dropout, seeds[2])
        return x, y, cache


class Modern(nnx.Module):
    def __init__(self, config: ModernConfig, *, rngs: nnx.Rngs):
        self.config = c = config
        self.wte = self._table(1.0, rngs)
        self.value_embeds = nnx.List([self._table(1.0, rngs) for _ in range(c.value_embeds)])
        self.h = nnx.List([Block(c, has_values=c.table_of(i) is not None, rngs=rngs) for i in range(c.n_layer)])
        self.lm_head = None if c.tied else self._table(0.0, rngs)

    def _table(self, std: float, rngs: nnx.Rngs) -> nnx.Embed:
        c, init = self.config, normal(std)
        return nnx.Embed(c.padded_vocab_size, c.n_embd, embedding_init=init, rngs=rngs)

    @property
    def head(self) -> Float[Array, "V P"]:
        return (self.wte if self.lm_head is None else self.lm_head).embedding[...]

    def whole_head(self) -> Float[Array, "V C"]:
        return whole(self.head, self.config.n_embd, self.config.dtype)

    def hidden(
        self, tokens: Int[Array, "B T"], *, seed: UInt[Array, ""] | None = None, cache: KVCache | None = None
    ) -> tuple[Float[Array, "BT C"], KVCache | None]:
        """The final, normalized hidden states, and the cache after these tokens if one was given.

        seed: where dropout's randomness comes from; None turns dropout off. cache.length + T must not pass the cache's
        slots.
        """
        c = self.config
        batch, time = tokens.shape
        flat = tokens.reshape(-1)
        # looked up before the cast: the gradient then adds up in float32, where frequent tokens would swamp bfloat16
        tables = [table.embedding[...] for table in (self.wte, *self.value_embeds)]
        x, *tables = rows(tables, flat, c.n_embd, c.dtype)
        x = add_norm(x, None, RMS, kernels=c.kernels)[1]
        seeds = None
        if seed is not None and c.dropout > 0:
            seeds = jax.random.bits(jax.random.key(seed), (3 * c.n_layer + 1,), jnp.uint32)
            x = dropout(x, c.dropout, seeds[-1])
        docs = documents(c, tokens, cache)
        run = traced_once(Block.__call__, remat=c.remat == "block", batch=batch)
        branch, keys, values = None, [], []
        for i, block in enumerate(self.h):
            layer_seeds = None if seeds is None else seeds[3 * i : 3 * i + 3]
            layer_cache = None if cache is None else (cache.k[i], cache.v[i], cache.length)
            table = c.table_of(i)
            embedded = None if table is None else tables[table]
            x, branch, new = run(block, x, branch, embedded, layer_seeds, docs, layer_cache)
            if new is not None:
                keys.append(new[0])
                values.append(new[1])
        x = add_norm(x, branch, RMS, kernels=c.kernels)[1]
        if cache is not None:
            cache = KVCache(tuple(keys), tuple(values), docs, cache.length + time)
        return x, cache

    def __call__(
        self, tokens: Int[Array, "B T"], *, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T vocab_size"], KVCache | None]:
        """Next-token logits in float32 over the true vocabulary (padding cut off), without dropout, and the cache."""
        x, cache = self.hidden(tokens, cache=cache)
        return self.logits(x).reshape(*tokens.shape, -1), cache

    def logits(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows vocab_size"]:
        """Float32 logits of hidden states, padding cut off."""
        c = self.config
        options = {"columns": c.vocab_size, "dtype": jnp.float32, "fast": Fast(c.kernels, decode=True)}
        logits = linear(x.reshape(-1, x.shape[-1]), self.whole_head().T, **options).reshape(*x.shape[:-1], -1)
        return c.softcap * jnp.tanh(logits / c.softcap) if c.softcap else logits

    def loss(
        self, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], *, seed: UInt[Array, ""] | None = None
    ) -> Float[Array, ""]:
        """Mean cross-entropy in nats over all B·T targets, without float32 logits in memory.

        With a seed: that of training, estimated if sampled_softmax says so.
        """
        c, (x, _) = self.config, self.hidden(tokens, seed=seed)
        options = {"vocab_size": c.vocab_size, "softcap": c.softcap, "kernels": c.kernels}
        options["in_fp8"] = c.matmul_dtype == "fp8"
        if seed is not None and 0 < c.sampled_softmax < c.vocab_size:
            sampled = {"sample": c.sampled_softmax, "seed": seed}
            return sampled_cross_entropy(x, self.head, targets.reshape(-1), **sampled, **options)
        return linear_cross_entropy(x, self.whole_head(), targets.reshape(-1), **options)
