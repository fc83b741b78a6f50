"""The optimizer: nanoGPT's learning-rate schedule; AdamW with weight decay on matrices alone, clipping before it."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

# AdamW, a parameter: it, its gradient and two moments read, all but the gradient written, in float32
ADAMW_BYTES = 7 * 4


def learning_rate(config: ConfigDict, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of update number `step` (from 0): nanoGPT's get_lr, whose first update already moves.

    lr·(step+1)/(warmup+1) while step < warmup_iters; then half a cosine from learning_rate down to min_lr at
    lr_decay_iters, and min_lr after; or constant. decay_lr=False: constant throughout.
    """
    top, low = config.learning_rate, config.min_lr
    if not config.decay_lr:
        return jnp.asarray(top, jnp.result_type(float))
    warm = top * (step + 1) / (config.warmup_iters + 1)
    if config.lr_schedule == "constant":
        after = top
    else:
        left = (config.lr_decay_iters - step) / max(1, config.lr_decay_iters - config.warmup_iters)
        # (1 + cos(pi - x)) / 2 as a square: float32 then keeps its precision where the cosine is near -1
        cosine = low + jnp.sin(jnp.pi / 2 * left) ** 2 * (top - low)
        after = jnp.where(left > 0, cosine, low)
    return jnp.where(step < config.warmup_iters, warm, after)


def decay_mask(params):
    """True where weight decay applies: matrices and embeddings; not biases and normalization scales."""

    def decays(path, _) -> bool:
        return getattr(path[-1], "key", None) in ("kernel", "embedding")

    return jax.tree_util.tree_map_with_path(decays, params)


def record_norm() -> optax.GradientTransformation:
    """Passes gradients through and keeps their global norm as its state, for logs and the test for finite values."""

    def update(updates, state, params=None):
        return updates, optax.tree.norm(updates)

    return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Gradients in, updates for a learning rate of 1 out; state[0] is the gradients' norm before clipping.

    The step multiplies the updates by `learning_rate(step)`: the schedule follows the step count even where an update
    was dropped.
    """
    adamw = optax.adamw(1.0, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay_mask)
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip > 0 else optax.identity()
    return optax.chain(record_norm(), clip, adamw)
