"""Text from a model: the prompt goes into a key-value cache at once, then token follows token in a loop on the device.

The host gets a chunk of tokens at a time and starts the next chunk before it reads the last, so the device never waits.
Past block_size no cache is of use, because every position moves with every token: each token then costs a forward pass
over the last block_size tokens, as in nanoGPT.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jaxgpt import UserError
from jaxgpt.keys import check_float32
from jaxgpt.models import KVCache, ModelConfig, Params, abstract_params, bind, cast_params, roles
from jaxgpt.ops.choose import Rule, choose


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises UserError on values that make no sense."""

    temperature: float = 0.8  # 0: the likeliest token
    top_k: int = 200  # only among the k likeliest; 0: all
    top_p: float = 1.0  # only among the likeliest that together have this probability

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be 0 (the likeliest token) or above")
        check_float32("temperature", self.temperature)
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")


class Generator:
    """A model ready to generate: its weights cast to the compute dtype and laid out for decoding, once.

    vocab_size: ids from here on are never chosen; by default the model's. config.kernels: what the model takes from
    jaxgpt/ops runs in the kernels of ops/decode.py where they support it; all parameters must be on one device.
    donate: each parameter is deleted once its weight is made, so that a model is not there twice.
    """

    def __init__(self, config: ModelConfig, params: Params, *, vocab_size: int | None = None, donate: bool = False):
        self.config = dataclasses.replace(config, dropout=0.0, remat="none")
        self.vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
        self.weights = _prepare(self.config, params, donate)

    def __call__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        key: Array,
        num_samples: int = 1,
        sampling: Sampling = Sampling(),
        chunk: int | None = None,
    ) -> Iterator[Int[np.ndarray, "B n"]]:
        """Yields the next tokens of B = num_samples continuations of one prompt, max_new_tokens each in all.

        The randomness of a token is a function of (key, sample, position) alone: neither chunk, the number of tokens
        made in one call, nor the other samples change it.
        """
        block_size, devices = self.config.block_size, jax.tree.leaves(self.weights)[0].devices()
        # on a CPU a call costs little beside a token, and the text should not come in bursts
        chunk = chunk or (8 if next(iter(devices)).platform == "cpu" else 32)
        prompt = prompt[-block_size:]
        rule = Rule(
            self.vocab_size,
            greedy=sampling.temperature == 0,
            top_k=0 < sampling.top_k < self.vocab_size,
            top_p=sampling.top_p < 1,
        )
        knobs = jnp.array([sampling.temperature, sampling.top_k, sampling.top_p], jnp.float32)
        rows = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_samples))
        seeds = jax.vmap(lambda row: jax.random.bits(row, (), jnp.uint32))(rows)
        # few lengths, few compilations: what the padding leaves in the cache is overwritten before it is seen
        padded = np.zeros((1, min(block_size, max(16, 1 << (len(prompt) - 1).bit_length()))), np.int32)
        padded[0, : len(prompt)] = prompt
        tokens, cache = _prefill(self.config, rule, self.weights, padded, jnp.int32(len(prompt)), seeds, knobs)
        history = [np.tile(padded[:, : len(prompt)], (num_samples, 1))]
        count, made, window = 1, 1, None  # count: how many of `tokens` are wanted
        while made < max_new_tokens:
            room = block_size - len(prompt) + 1 - made  # in the cache
            if room > 0:
                last = tokens[:, count - 1]
                following, cache = _decode(self.config, rule, chunk, self.weights, cache, last, seeds, knobs)
                wanted = min(chunk, room, max_new_tokens - made)
            else:
                if window is None:
                    window = np.concatenate([*history, np.asarray(tokens[:, :count])], axis=1)[:, -block_size:]
                position = jnp.int32(len(prompt) + made)
                following, window = _slide(self.config, rule, chunk, self.weights, window, position, seeds, knobs)
                wanted = min(chunk, max_new_tokens - made)
            history.append(np.asarray(tokens)[:, :count])
            yield history[-1]
            tokens, count, made = following, wanted, made + wanted
        yield np.asarray(tokens)[:, :count]


def _prepare(config: ModelConfig, params: Params, donate: bool) -> Params:
    """The weights in the compute dtype, as the forward pass would cast them; for the kernels matrices lie (out, in).

    donate: deletes each parameter before the next one's weight is made.
    """

    def prepare(role, x, to):
        weight = _out_in(x, to.dtype) if config.kernels and role.group == "matrix" else x.astype(to.dtype)
        if donate and weight is not x:
            jax.block_until_ready(weight)
            x.delete()
        return weight

    wanted = cast_params(config, jax.eval_shape(lambda: params), config.dtype)
    return jax.tree.map(prepare, roles(config, params), params, wanted)


@functools.partial(jax.jit, static_argnums=1)
def _out_in(x: Float[Array, "in ..."], dtype: np.dtype) -> Float[Array, "out in"]:
    return x.reshape(x.shape[0], -1).T.astype(dtype)


def _model(config: ModelConfig, weights: Params):
    """The module over prepared weights."""
    abstract = abstract_params(config)

    def restore(role, like, x):
        return x.T.reshape(like.shape) if config.kernels and role.group == "matrix" else x

    return bind(config, jax.tree.map(restore, roles(config, abstract), abstract, weights))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(config, rule, weights, prompt: Int[Array, "1 T"], length, seeds: UInt[Array, " B"], knobs):
    """The first new token of each row, (B, 1), and the cache of B rows; the prompt is the first `length` tokens."""
    model, batch = _model(config, weights), seeds.shape[0]
    x, cache = model.hidden(prompt, cache=config.empty_cache(1, config.block_size))
    assert cache is not None
    logits = jnp.repeat(model.logits(jax.lax.dynamic_slice_in_dim(x, length - 1, 1)), batch, axis=0)
    cache = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0) if x.ndim else x, cache)._replace(length=length)
    out = jnp.zeros((batch, 2), jnp.int32)
    out = choose(logits, seeds, length, knobs, rule, out=out, column=jnp.int32(0), kernels=config.kernels)
    return out[:, 1:], cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(config, rule, steps: int, weights, cache: KVCache, last: Int[Array, " B"], seeds, knobs):
    """`steps` tokens that follow `last`, (B, steps), and the cache."""
    model = _model(config, weights)

    def step(i, carry):
        out, cache = carry
        position = cache.length + 1
        x, cache = model.hidden(out[:, i, None], cache=cache)
        return choose(model.logits(x), seeds, position, knobs, rule, out=out, column=i, kernels=config.kernels), cache

    out = jnp.zeros((last.shape[0], steps + 1), jnp.int32).at[:, 0].set(last)
    out, cache = jax.lax.fori_loop(0, steps, step, (out, cache))
    return out[:, 1:], cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _slide(config, rule, steps: int, weights, window: Int[Array, "B S"], position, seeds, knobs):
    """`steps` tokens that follow a full window, (B, steps), and the window after them."""
    model = _model(config, weights)

    def step(i, carry):
        out, window = carry
        x, _ = model.hidden(window)
        logits = model.logits(x.reshape(*window.shape, -1)[:, -1])
        out = choose(logits, seeds, position + i, knobs, rule, out=out, column=i, kernels=config.kernels)
        new = jax.lax.dynamic_slice_in_dim(out, i + 1, 1, axis=1)
        return out, jnp.concatenate([window[:, 1:], new], axis=1)

    out = jnp.zeros((window.shape[0], steps + 1), jnp.int32)
    out, window = jax.lax.fori_loop(0, steps, step, (out, window))
    return out[:, 1:], window
