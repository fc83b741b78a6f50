"""A model's functions, compiled once for each config and shape; random parameters and tokens to call them with."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.models import ModelConfig, Params, abstract_params, bind, init_params

fresh_params = jax.jit(init_params, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: ModelConfig, params, tokens):
    model = bind(config, params)
    return model.logits(model.hidden(tokens)[0]).reshape(*tokens.shape, -1)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(config: ModelConfig, params, tokens, targets, seed=None):
    return bind(config, params).loss(tokens, targets, seed=seed)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_loss(config: ModelConfig, params, tokens, targets):
    model = bind(config, params)
    return model(tokens)[0], model.loss(tokens, targets)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(config: ModelConfig, params, tokens, targets, seed=None):
    return jax.value_and_grad(lambda p: bind(config, p).loss(tokens, targets, seed=seed))(params)


@functools.partial(jax.jit, static_argnums=0)
def extended(config: ModelConfig, params, tokens, cache):
    """The logits of these tokens, and the cache with them."""
    model = bind(config, params)
    x, cache = model.hidden(tokens, cache=cache)
    return model.logits(x).reshape(*tokens.shape, -1), cache


def random_params(config: ModelConfig, seed: int = 0, std: float = 0.3) -> Params:
    """Large enough that no part of the model is nearly linear; garbage in the padding of the vocabulary."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        around = 1.0 if path[-1].key == "scale" else 0.0
        return (around + std * rng.normal(size=x.shape)).astype(np.float32)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, abstract_params(config)))


def random_tokens(config: ModelConfig, rows: int, time: int, seed: int = 0):
    """Tokens and targets, (rows, time) each."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.integers(config.vocab_size, size=(rows, time)), jnp.int32) for _ in range(2))


def float64(params) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def influence(logits, inputs: jax.Array) -> np.ndarray:
    """(T, T): how strongly logits(inputs) (T, V) at each position depend on the inputs (T, C) at each, by gradients."""
    return np.abs(jax.jit(jax.jacrev(logits))(inputs)).sum((1, 3))
