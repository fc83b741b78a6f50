"""Pointwise activations that keep only their input for the backward pass, and compute in float32.

gelu: GPT-2's tanh form. With u = sqrt(2/pi) (h + 0.044715 h^3) it is 0.5 h (1 + tanh u) = h sigmoid(2u), which costs
one exponential and one division, and whose derivative is made of the same sigmoid. relu2: max(h, 0)^2 (Primer, arXiv
2109.08668).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt import UserError

SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


class Activation(NamedTuple):
    """Of float32 arrays: value(h) and gradient(h, dy). A kernel passes a faster sigmoid as the last argument."""

    value: Callable[..., Array]
    gradient: Callable[..., Array]


def gelu_value(h, sigmoid=jax.nn.sigmoid):
    return h * sigmoid(h * (SLOPE + SLOPE * CUBIC * (h * h)))


def gelu_gradient(h, dy, sigmoid=jax.nn.sigmoid):
    square = h * h
    s = sigmoid(h * (SLOPE + SLOPE * CUBIC * square))
    return dy * (s + (s - s * s) * (h * (SLOPE + 3 * SLOPE * CUBIC * square)))


def relu2_value(h, sigmoid=None):
    return jnp.where(h < 0, 0.0, h * h)  # a maximum would drop NaN in a kernel


def relu2_gradient(h, dy, sigmoid=None):
    return dy * jnp.where(h < 0, 0.0, 2 * h)


ACTIVATIONS = {"gelu": Activation(gelu_value, gelu_gradient), "relu2": Activation(relu2_value, relu2_gradient)}


def supports(name: str) -> bool:
    """Whether cuBLAS computes this activation together with the product before it."""
    return name == "gelu"


def activate(h: Float[Array, "..."], name: str, *, kernels: bool = False) -> Float[Array, "..."]:
    """The activation `name` (a key of ACTIVATIONS) of h, in h's dtype. Raises UserError on another name."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"activation={name!r} is not there; choose {', '.join(ACTIVATIONS)}, or compute it from `linear`"
        )
    return _activate(h, name, kernels and supports(name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _activate(h, name: str, in_product: bool):
    if in_product:  # in this very form XLA gives it to cuBLAS, which computes it in float32
        return jax.nn.gelu(h, approximate=True)
    return ACTIVATIONS[name].value(h.astype(jnp.float32)).astype(h.dtype)


def _forward(h, name, in_product):
    return _activate(h, name, in_product), h


def _backward(name, _, h, dy):
    return (ACTIVATIONS[name].gradient(h.astype(jnp.float32), dy.astype(jnp.float32)).astype(h.dtype),)


_activate.defvjp(_forward, _backward)
