"""Causal self-attention: cuDNN's fused kernel where it applies, else plain XLA."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from jaxgpt.ops.dropout import dropout


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    *,
    implementation: str,
    rate: float = 0.0,
    seed: UInt[Array, ""] | None = None,
    docs: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q·k / sqrt(H)) v, where a token sees itself and what came before it.

    implementation: "cudnn" or "xla". rate: dropout of the attention weights, drawn from `seed`. docs: numbers the
    documents of each row; a token then sees its own document alone.
    """
    if implementation == "cudnn" and rate == 0.0:
        # a mask with is_causal: cuDNN takes it as a bias, at the cost of its memory
        mask = None if docs is None else (docs[:, None, :, None] == docs[:, None, None, :])
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    return _plain(q, k, v, rate, seed, docs)


def _plain(q, k, v, rate, seed, docs):
    """The twin in plain JAX: scores and softmax in float32, weights in the inputs' dtype."""
    t = q.shape[1]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    visible = jnp.tril(jnp.ones((t, t), bool))
    if docs is not None:
        visible = visible & (docs[:, None, :, None] == docs[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    if rate > 0.0 and seed is not None:
        weights = dropout(weights, rate, seed)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)
