"""Whether what a model file says thrice, in `loss`, in `logits` and with a cache, is one model."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxgpt import UserError
from jaxgpt.models import ModelConfig, Params, Role, abstract_params, bind, count_params, init_params, roles
from jaxgpt.scoring.scorer import score_tokens

CACHED, FOLLOWING = 6, 3  # tokens that enter the cache at once, and that follow one by one
MOST_PARAMS = 200_000_000  # of a model that is computed with: some seconds on a CPU
WITHIN = 1e-3  # of the loss, and of the largest logit: what float32 rounds is far below


def check_consistency(model: ModelConfig) -> list[str]:
    """Computes with the model in float32 on a few random tokens. Returns a line where its `loss` is not the
    cross-entropy of its `logits`, as a further term in it makes it, or where there is too much to compute.

    Raises UserError where a cache changes the logits.
    """
    name, size = model.file.name, min(model.block_size, CACHED + FOLLOWING)
    if (n := count_params(model, abstract_params(model), all=True)) > MOST_PARAMS:
        return [f"{name} is not computed with, for its {n:,} parameters; a dry run of a smaller size does that"]
    plain = {"dtype": "float32", "attention": "xla", "kernels": False, "matmul_dtype": "auto", "doc_mask": -1}
    model = dataclasses.replace(model, **plain)
    first = max(1, size - FOLLOWING)
    tokens = jax.random.randint(jax.random.key(0), (1, size + 1), 0, model.vocab_size)

    def compute(params, tokens):
        module, inputs, targets = bind(model, params), tokens[:, :-1], tokens[:, 1:]
        logits = module.logits(module.hidden(inputs)[0]).reshape(size, -1)
        x, cache = module.hidden(inputs[:, :first], cache=model.empty_cache(1, model.block_size))
        cached = [module.logits(x).reshape(first, -1)]
        for i in range(first, size):
            x, cache = module.hidden(inputs[:, i : i + 1], cache=cache)
            cached.append(module.logits(x).reshape(1, -1))
        expected = score_tokens(model, params, tokens)[0].mean()
        away = jnp.abs(jnp.concatenate(cached) - logits).max()
        return module.loss(inputs, targets), expected, away, jnp.abs(logits).max()

    params = jax.jit(lambda: _telling(model, init_params(model, jax.random.key(1))))()
    with jax.default_matmul_precision("highest"):  # a GPU's usual one would round more than WITHIN
        loss, expected, away, largest = (float(x) for x in jax.jit(compute)(params, tokens))
    if not away <= WITHIN * max(1.0, largest):
        raise UserError(
            f"model={name}: with a cache the logits differ by up to {away:.2g}, so that sampling would not write what "
            "the model was trained to; look at what `hidden` does with its cache"
        )
    if math.isclose(loss, expected, rel_tol=WITHIN):
        return []
    return [
        f"{name}: `loss` gives {loss:.4f} where the cross-entropy of its `logits`, by which evaluate and sample go, is "
        f"{expected:.4f}"
    ]


def _telling(model: ModelConfig, params: Params) -> Params:
    """Parameters whose errors show: what is zero is drawn, and logits are large enough for a soft cap to matter."""
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))

    def draw(role: Role, x):
        other = 0.02 * jax.random.normal(next(keys), x.shape, x.dtype)
        return jnp.where(jnp.any(x != 0), x, other) * (10 if role.group in ("embedding", "head") else 1)

    return jax.tree.map(draw, roles(model, params), params)
