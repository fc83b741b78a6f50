"""The optimizer: learning-rate schedules, and groups of parameters, each with an update rule and a rate of its own.

A schedule is a function in SCHEDULES, an optimizer one in OPTIMIZERS; a file that adds to either makes the new name a
value of `lr_schedule` or `optimizer`. Which parameter is in which group follows from its role alone.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxgpt import UserError
from jaxgpt.keys import key
from jaxgpt.models import Role

# AdamW, a parameter: it, its gradient and two moments read, all but the gradient written, in float32
ADAMW_BYTES = 7 * 4


# --- schedules ---


def constant(config: "OptimizerConfig", step: Int[Array, ""]) -> Float[Array, ""]:
    """learning_rate to the end."""
    return jnp.asarray(config.learning_rate, jnp.result_type(float))


def cosine(config: "OptimizerConfig", step: Int[Array, ""]) -> Float[Array, ""]:
    """Half a cosine from learning_rate, where the warm-up ends, down to min_lr at lr_decay_iters; min_lr after."""
    top, low = config.learning_rate, config.min_lr
    left = (config.lr_decay_iters - step) / max(1, config.lr_decay_iters - config.warmup_iters)
    # (1 + cos(pi - x)) / 2 as a square: float32 then keeps its precision where the cosine is near -1
    return jnp.where(left > 0, low + jnp.sin(jnp.pi / 2 * left) ** 2 * (top - low), low)


def linear(config: "OptimizerConfig", step: Int[Array, ""]) -> Float[Array, ""]:
    """learning_rate, then a straight line to min_lr over the last `cooldown` of lr_decay_iters (arXiv 2405.18392)."""
    left = (config.lr_decay_iters - step) / max(1, config.cooldown * config.lr_decay_iters)
    return config.min_lr + jnp.clip(left, 0, 1) * (config.learning_rate - config.min_lr)


# name -> the rate of update number `step` (from 0) once the warm-up is over
SCHEDULES: dict[str, Callable[["OptimizerConfig", Int[Array, ""]], Float[Array, ""]]] = {
    "cosine": cosine,
    "constant": constant,
    "linear": linear,
}


def learning_rate(config: "OptimizerConfig", step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of update number `step`, from 0. As nanoGPT's, its first update already moves.

    learning_rate·(step+1)/(warmup_iters+1) while step < warmup_iters, lr_schedule from there on; decay_lr=False:
    learning_rate throughout.
    """
    if not config.decay_lr:
        return constant(config, step)
    warm = config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    rate = SCHEDULES[config.lr_schedule](config, step)
    if rate is None or jnp.shape(rate):
        raise UserError(f"lr_schedule={config.lr_schedule} returns {rate}; return one number, the rate of a step")
    return jnp.where(step < config.warmup_iters, warm, rate)


# --- optimizers ---


class Group(NamedTuple):
    """Parameters that share an update rule and a rate."""

    takes: Callable[[Role], bool]  # whether a parameter of this role is in the group
    rule: optax.GradientTransformation  # gradients in, updates for a rate of 1 out; told the `step`, if it takes that
    learning_rate: float  # at the top of the schedule
    bound: float = math.inf  # of an update at a rate of 1, whatever finite gradients there were; inf: not known


def adam_bound(beta1: float, beta2: float) -> float:
    """What no element of Adam's update passes, the rate being 1; inf if there is no such bound.

    By Cauchy and Schwarz |m| ≤ (1 - β1) √(v / ((1 - β2) (1 - β1² / β2))), and the correction of bias makes 1 - β1 at
    most 1.
    """
    return (1 / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))) if beta1**2 < beta2 else math.inf


def adamw(config: "OptimizerConfig") -> dict[str, Group]:
    """AdamW in nanoGPT's two groups."""
    betas, rate = (config.beta1, config.beta2), config.learning_rate
    with_decay = optax.adamw(1.0, *betas, weight_decay=config.weight_decay)
    return {
        "decay": Group(lambda role: role.decay, with_decay, rate, adam_bound(*betas)),
        "no_decay": Group(lambda role: not role.decay, optax.adam(1.0, *betas), rate, adam_bound(*betas)),
    }


def muon(config: "OptimizerConfig") -> dict[str, Group]:
    """Muon for matrices, with learning_rate and weight decay; Adam without decay for all else, with other rates."""
    # eps as in modded-nanogpt: the rows of rare tokens have gradients far below 1e-8
    adam, bound = optax.adam(1.0, config.beta1, config.beta2, eps=1e-10), adam_bound(config.beta1, config.beta2)
    orthogonal = optax.chain(scale_by_muon(config), cautious_decay(config.weight_decay), optax.scale(-1.0))
    groups = {
        "embedding": (adam, config.embedding_lr, bound),
        "head": (adam, config.head_lr, bound),
        "vector": (adam, config.vector_lr, bound),
        # of a matrix with singular values near 1 no element is above them; √(out/in) is far below 1e4
        "matrix": (orthogonal, config.learning_rate, 1e4),
    }
    return {name: Group(lambda role, name=name: role.group == name, *how) for name, how in groups.items()}


# name -> the optimizer's groups; a role must be in exactly one
OPTIMIZERS: dict[str, Callable[["OptimizerConfig"], dict[str, Group]]] = {"adamw": adamw, "muon": muon}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: its update rules, rates and schedules. Raises UserError on values that make no optimizer."""

    optimizer: str = key("adamw", "muon: matrices by Muon, all else by Adam", choices=OPTIMIZERS)
    learning_rate: float = key(6e-4, "highest learning rate; muon: of matrices")
    max_iters: int = key(600_000, "optimizer steps in the whole run", least=1)
    weight_decay: float = key(
        1e-1, "decoupled, times the learning rate; muon: of matrices, where update and parameter have one sign"
    )
    beta1: float = key(0.9, "Adam's decay of the gradients' mean", below=1)
    beta2: float = key(0.95, "Adam's decay of the gradients' mean square", below=1)
    grad_clip: float = key(1.0, "largest global gradient norm; 0: no clipping")
    decay_lr: bool = key(True, "false: a constant learning rate from the first step")
    lr_schedule: str = key("cosine", "after the warm-up; linear: constant, then a linear cooldown", choices=SCHEDULES)
    warmup_iters: int = key(2000, "steps over which the rate rises")
    lr_decay_iters: int = key(600_000, "step at which the rate has fallen to min_lr")
    min_lr: float = key(6e-5, "lowest learning rate; other groups' fall in proportion")
    cooldown: float = key(0.6, "part of lr_decay_iters over which lr_schedule=linear falls")
    embedding_lr: float = key(0.3, "muon: highest rate of embeddings")
    head_lr: float = key(0.006, "muon: highest rate of the head")
    vector_lr: float = key(0.01, "muon: highest rate of vectors and scalars")
    momentum: float = key(0.95, "muon: decay of the gradients' mean, Nesterov's", below=1)
    momentum_warmup_iters: int = key(0, "muon: steps over which momentum rises from 0.85")
    accumulation: str = key(
        "auto", "of gradients over micro-steps; multisteps: optax.MultiSteps; sum: in one scan",
        choices=("auto", "multisteps", "sum"),
    )  # fmt: skip
    average_decay: float = key(
        0.0, "decay of a running average of the parameters, which is then evaluated and sampled; 0: none", below=1
    )
    spike_threshold: float = key(
        0.0, "drop a step whose loss or gradient norm is this many standard deviations above its mean; 0: none"
    )

    def __post_init__(self):
        if self.min_lr > self.learning_rate and self.decay_lr and self.lr_schedule != "constant":
            raise UserError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}; lower min_lr")
        if self.cooldown > 1:
            raise UserError(f"cooldown={self.cooldown} is a part of lr_decay_iters: at most 1")
        for name in ("learning_rate", "embedding_lr", "head_lr", "vector_lr"):
            if self.optimizer == "muon" and getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0 with optimizer=muon")


def make_groups(config: OptimizerConfig) -> dict[str, Group]:
    """The optimizer's groups. Raises UserError where it returns anything else."""
    groups = OPTIMIZERS[config.optimizer](config)
    if not isinstance(groups, dict) or not all(isinstance(group, Group) for group in groups.values()):
        found = type(groups).__name__ if not isinstance(groups, dict) else f"a dict of {groups!r:.80}"
        raise UserError(f"optimizer={config.optimizer} returns {found}; return a dict of names and Groups")
    return groups


def keeps_finite(config: OptimizerConfig) -> bool:
    """Whether finite gradients always leave the parameters finite, so that no step needs to look at them.

    So it is where 2^31 updates together stay below 1e30, and weight decay makes parameters smaller.
    """
    groups = make_groups(config).values()
    top = max(group.learning_rate for group in groups)
    return top * config.weight_decay <= 1 and all(group.learning_rate * group.bound <= 1e20 for group in groups)


def check_schedule(config: OptimizerConfig) -> None:
    """Raises UserError where the warm-up ends after the rate has begun to fall: the rate would jump there.

    It is for what is about to be trained: a run that was trained so can still be read.
    """
    warm, end = config.warmup_iters, config.lr_decay_iters
    if not config.decay_lr:
        return
    if config.lr_schedule == "cosine" and warm >= end:
        raise UserError(
            f"warmup_iters={warm} must be below lr_decay_iters={end}, or the rate jumps to min_lr as the warm-up ends"
        )
    if config.lr_schedule == "linear" and warm > end - max(1, config.cooldown * end):
        raise UserError(
            f"warmup_iters={warm} reaches into the cooldown, the last {config.cooldown:g} of lr_decay_iters={end}, and "
            "the rate jumps where the warm-up ends; choose fewer"
        )


def unfinished(config: OptimizerConfig) -> list[str]:
    """A line where a run ends before its rate has fallen, as with max_iters lowered alone."""
    if config.max_iters >= config.lr_decay_iters:
        return []
    ends = jnp.asarray([config.max_iters - 1, config.lr_decay_iters])
    last, low = (float(learning_rate(config, step)) for step in ends)
    if abs(last - low) <= 0.01 * config.learning_rate:
        return []
    return [
        f"max_iters={config.max_iters} ends this run at a learning rate of {last:.2g}; its schedule goes on to "
        f"{low:.2g} at lr_decay_iters={config.lr_decay_iters}"
    ]


class OptimizerState(NamedTuple):
    norm: Float[Array, ""]  # the last gradients' global norm, before clipping
    groups: dict[str, Any]  # name -> the state of the group's rule, in the parameters' structure where it has moments


def make_optimizer(
    config: OptimizerConfig, roles: Any, mesh: Mesh | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer for parameters with these roles: a tree of their structure.

    `update(grads, state, params, step=…)` gives updates to be added to the parameters, their rates those of that step:
    schedules follow the step count even where an update was dropped. mesh: the devices that share Muon's work.
    """
    groups = make_groups(config)

    def label(role: Role) -> str:
        names = [name for name, group in groups.items() if group.takes(role)]
        if len(names) != 1:
            found = ", ".join(names) or "none"
            raise UserError(f"optimizer={config.optimizer}: {role.pattern} is in groups {found}; put it in one")
        return names[0]

    labels = jax.tree.map(label, roles)
    present = set(jax.tree.leaves(labels))
    groups = {name: group for name, group in groups.items() if name in present}
    rules = {
        name: optax.masked(
            optax.with_extra_args_support(group.rule), jax.tree.map(lambda x, name=name: x == name, labels)
        )
        for name, group in groups.items()
    }
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip > 0 else optax.identity()

    def rate(group: Group, step) -> Float[Array, ""]:
        top = group.learning_rate
        if top == config.learning_rate:
            return learning_rate(config, step)
        low = config.min_lr * top / config.learning_rate
        return learning_rate(dataclasses.replace(config, learning_rate=top, min_lr=low), step)

    def init(params) -> OptimizerState:
        return OptimizerState(jnp.zeros(()), {name: rule.init(params) for name, rule in rules.items()})

    def update(updates, state: Any, params: Any = None, **extra):
        step, norm = extra["step"], optax.tree.norm(updates)
        updates, _ = clip.update(updates, optax.EmptyState())
        states = {}
        for name, rule in rules.items():  # each changes its own group's leaves alone
            updates, states[name] = rule.update(updates, state.groups[name], params, mesh=mesh, **extra)
        rates = {name: rate(group, step) for name, group in groups.items()}
        return jax.tree.map(lambda name, u: rates[name] * u, labels, updates), OptimizerState(norm, states)

    return optax.GradientTransformationExtraArgs(init, update)


# --- Muon ---

# Polar Express (arXiv 2505.16932): the five quintics that, in turn, best take singular values in [1e-3, 1] to 1, with
# modded-nanogpt's safety factor for bfloat16: https://github.com/KellerJordan/modded-nanogpt
POLAR_EXPRESS = (
    (8.15655, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
)
FIRST_MOMENTUM = 0.85  # modded-nanogpt's


class MuonState(NamedTuple):
    momentum: Any


def scale_by_muon(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Nesterov momentum, each matrix of it replaced by the nearest orthogonal one times √max(1, out/in).

    https://kellerjordan.github.io/posts/muon. A parameter's first dimension is a matrix's inputs and its last one the
    outputs; those between number matrices: GPT-2's c_attn, (C, 3, C), is three.
    """

    def init(params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state: Any, params: Any = None, **extra):
        part = jnp.minimum(1.0, (extra["step"] + 1) / max(1, config.momentum_warmup_iters))
        decay = FIRST_MOMENTUM + part * (config.momentum - FIRST_MOMENTUM)

        def mix(grad, momentum):
            return grad + decay * (momentum - grad)

        momentum = jax.tree.map(mix, updates, state.momentum)
        leaves, structure = jax.tree.flatten(jax.tree.map(mix, updates, momentum))
        return jax.tree.unflatten(structure, orthogonalize_all(leaves, extra.get("mesh"))), MuonState(momentum)

    return optax.GradientTransformationExtraArgs(init, update)


def cautious_decay(weight_decay: float) -> optax.GradientTransformation:
    """Adds weight_decay times those weights whose size the update reduces as well (arXiv 2510.12402)."""

    def add(updates, params):
        return jax.tree.map(lambda u, p: u + jnp.where(u * p > 0, weight_decay * p, 0), updates, params)

    return optax.stateless(add) if weight_decay else optax.identity()


def orthogonalize_all(kernels: list[Array], mesh: Mesh | None = None) -> list[Array]:
    """Every matrix of every kernel, (in, …, out), orthogonalized and times √max(1, out/in).

    Matrices of one shape, or of its transpose, go through together. Over a mesh each device takes its share of them:
    the result is gathered, where whole kernels lie, or sent to whom its parts belong to.
    """
    batches: dict[tuple[int, ...], list[tuple[int, Array]]] = {}
    for i, x in enumerate(kernels):
        if x.ndim < 2:
            raise UserError(f"optimizer=muon: a parameter of shape {x.shape} has the role matrix; give it vector")
        matrices = jnp.moveaxis(x.reshape(x.shape[0], -1, x.shape[-1]), 1, 0)
        matrices = matrices if x.shape[0] <= x.shape[-1] else matrices.mT
        batches.setdefault(matrices.shape[1:], []).append((i, matrices))
    done = list(kernels)
    for parts in batches.values():
        found = _orthogonalize_batch(jnp.concatenate([matrices for _, matrices in parts]), mesh)
        ends = [sum(len(matrices) for _, matrices in parts[: n + 1]) for n in range(len(parts) - 1)]
        for (i, _), matrices in zip(parts, jnp.split(found, ends), strict=True):
            x = kernels[i]
            matrices = matrices if x.shape[0] <= x.shape[-1] else matrices.mT
            scale = math.sqrt(max(1.0, x.shape[-1] / x.shape[0]))
            done[i] = jnp.moveaxis(matrices, 0, 1).reshape(x.shape).astype(x.dtype) * scale
    return done


def _orthogonalize_batch(x: Float[Array, "K M N"], mesh: Mesh | None) -> Float[Array, "K M N"]:
    """`orthogonalize` in bfloat16, on CPUs in float32, shared by the devices of the mesh."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    x = x if device.platform == "cpu" else x.astype(jnp.bfloat16)
    if mesh is None or mesh.size == 1:
        return orthogonalize(x)
    shares, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    padding = -len(x) % mesh.size  # to an even share
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:  # each has all of them, and takes its share without a word
        x = jax.lax.with_sharding_constraint(x, whole)
    x = jax.lax.with_sharding_constraint(jnp.pad(x, ((0, padding), (0, 0), (0, 0))), shares)
    # one all-gather: left to itself the compiler sends each kernel's part in turn, three times as many bytes
    return jax.lax.with_sharding_constraint(orthogonalize(x), whole)[: len(x) - padding]


def orthogonalize(x: Float[Array, "*K M N"]) -> Float[Array, "*K M N"]:
    """Nearly U·Vᵀ of x = U·S·Vᵀ, M ≤ N, in x's dtype: matrix products alone, by which its singular values go to 1."""
    size = jnp.linalg.norm(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=(-2, -1), keepdims=True)
    x = x / (1.02 * size + 1e-6).astype(x.dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x
