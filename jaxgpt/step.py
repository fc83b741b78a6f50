"""The training state and the compiled steps: everything that changes parameters happens here."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxgpt import UserError
from jaxgpt.config import Parts
from jaxgpt.models import ModelConfig, Params, Role, abstract_params, bind, init_params, roles
from jaxgpt.optim import keeps_finite, learning_rate, make_optimizer
from jaxgpt.sharding import (
    BATCH_AXES,
    device_map,
    gather_params,
    mean_gradients,
    mean_over,
    on_all_parts,
    param_specs,
    state_specs,
    with_whole_params,
)

Metrics = dict[str, Array]
SPIKE_STEPS = 100  # over which the spike guard's statistics run


class LossScale(NamedTuple):
    """float16's dynamic loss scale: halved when gradients overflow, doubled after 2,000 steps without."""

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]

    @staticmethod
    def create() -> "LossScale":
        """The same for every dtype: only float16 uses it, and a run may go on in float16."""
        return LossScale(jnp.asarray(2.0**15, jnp.float32), jnp.zeros((), jnp.int32))

    def next(self, finite: Bool[Array, ""], dtype: str) -> "LossScale":
        if dtype != "float16":
            return self
        good = jnp.where(finite, self.good_steps + 1, 0)
        grow = good >= 2000
        scale = jnp.where(finite, jnp.where(grow, self.scale * 2, self.scale), jnp.maximum(self.scale / 2, 1.0))
        return LossScale(scale, jnp.where(grow, 0, good))


class Spikes(NamedTuple):
    """The spike guard's running mean and variance, over some 100 steps, of finite losses and gradient norms."""

    count: Int[Array, ""]  # finite steps so far
    mean: Float[Array, " 2"]  # of loss and gradient norm
    var: Float[Array, " 2"]

    @staticmethod
    def create() -> "Spikes":
        return Spikes(jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.float32), jnp.zeros(2, jnp.float32))

    def next(
        self, loss: Float[Array, ""], norm: Float[Array, ""], finite: Bool[Array, ""], threshold: float
    ) -> tuple[Bool[Array, ""], "Spikes"]:
        """Whether either is more than `threshold` standard deviations above its mean, and the statistics with both in.

        A spike counts as the largest value allowed: alone it moves little, but a lasting change is soon the new mean.
        Nothing is a spike in the first 100 finite steps. Mean and variance are updated as in Finch 2009, "Incremental
        calculation of weighted mean and variance": with equal weights up to 100 steps, exponential ones from there on.
        """
        highest = jnp.where(self.count >= SPIKE_STEPS, self.mean + threshold * jnp.sqrt(self.var), jnp.inf)
        x = jnp.stack([loss, norm])
        delta = jnp.minimum(x, highest) - self.mean
        weight = 1.0 / jnp.minimum(self.count + 1, SPIKE_STEPS)
        new = Spikes(self.count + 1, self.mean + weight * delta, (1 - weight) * (self.var + weight * delta**2))
        return finite & jnp.any(x > highest), jax.tree.map(partial(jnp.where, finite), new, self)


class TrainState(NamedTuple):
    """All that a run carries from step to step: with the config, its whole future follows from it.

    A field that is None takes no part in a run; one that has come to a run later is made when an older checkpoint is
    restored (`OPTIONAL`).
    """

    step: Int[Array, ""]  # optimizer steps taken, dropped ones included
    params: Params
    opt_state: Any
    loss_scale: LossScale
    bad_steps: Int[Array, ""]  # dropped steps in a row
    spikes: Spikes
    average: Params | None = None  # of the parameters, exponentially weighted, where average_decay asks for it
    rounded: Params | None = None  # matrices as a step multiplies them (`rounded_matrices`); no checkpoint holds them

    @property
    def saved(self) -> "TrainState":
        """What a checkpoint holds: all but what follows from it."""
        return self._replace(rounded=None)

    @property
    def multiplied(self) -> Params:
        """The parameters that a step computes with: the rounded copy of a matrix where there is one."""
        if self.rounded is None:
            return self.params
        return jax.tree.map(lambda x, rounded: x if rounded is None else rounded, self.params, self.rounded)

    @property
    def best_params(self) -> Params:
        """What is evaluated and sampled: the average, if there is one."""
        return self.params if self.average is None else self.average


OPTIONAL = ("average",)  # fields of TrainState that a checkpoint may lack


def random_key(seed: int, purpose: str) -> Array:
    """The key of one use of randomness: everything random derives from (seed, step, purpose)."""
    return jax.random.fold_in(jax.random.key(seed), {"init": 0, "dropout": 1, "sample": 2}[purpose])


def init_state(parts: Parts, mesh: Mesh, params: Params | None = None) -> TrainState:
    """A fresh state, around `params` if given. Run it under `jax.jit` with out_shardings, to make it where it lies."""
    if params is None:
        params = init_params(parts.model, random_key(parts.data.seed, "init"))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=make_optimizer(parts.optimizer, roles(parts.model, params), mesh).init(params),
        loss_scale=LossScale.create(),
        bad_steps=zero,
        spikes=Spikes.create(),
        average=jax.tree.map(jnp.copy, params) if parts.optimizer.average_decay else None,
        rounded=rounded_matrices(parts, params),
    )


def carries_rounded(parts: Parts) -> bool:
    """Whether the state carries matrices rounded (`rounded_matrices`)."""
    return parts.model.dtype != "float32" and parts.devices.matmul_dtype != "fp8"


def rounded_matrices(parts: Parts, params: Params) -> Params | None:
    """Matrices in the computation's dtype, None in place of all else; None for a computation in float32 or FP8.

    A step that rounds them while it updates them reads 4 bytes of each element less.
    """
    if not carries_rounded(parts):
        return None

    def rounded(role: Role, x):
        return x.astype(parts.model.dtype) if role.rounded else None

    return jax.tree.map(rounded, roles(parts.model, params), params)


@lru_cache(maxsize=8)  # a start asks for it three times
def abstract_state(parts: Parts, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every array of the state, nothing computed."""
    shapes = jax.eval_shape(partial(init_state, parts, mesh), abstract_params(parts.model))
    specs = state_specs(shapes, shapes.params, roles(parts.model, shapes.params), mesh)
    return jax.tree.map(lambda x, spec: x.update(sharding=NamedSharding(mesh, spec)), shapes, specs)


def create_state(parts: Parts, mesh: Mesh, params: Params | None = None) -> TrainState:
    """A fresh state made sharded, never whole on one device; with `params` (placed already, donated), around those."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(parts, mesh))
    make = jax.jit(
        partial(init_state, parts, mesh), out_shardings=shardings, donate_argnums=() if params is None else 0
    )
    return make() if params is None else make(params)


def complete_state(parts: Parts, state: TrainState, abstract: TrainState) -> TrainState:
    """A restored state with what its checkpoint lacked: an average begins at the parameters."""
    makers = {"average": partial(jax.tree.map, jnp.copy), "rounded": partial(rounded_matrices, parts)}
    for name, make in makers.items():
        wanted = getattr(abstract, name)
        if wanted is not None and getattr(state, name) is None:
            shardings = jax.tree.map(lambda x: x.sharding, wanted)
            state = state._replace(**{name: jax.jit(make, out_shardings=shardings)(state.params)})
    return state


def begin_state(parts: Parts, mesh: Mesh, params: Params | None = None) -> "Future[TrainState]":
    """create_state in a thread, for it takes seconds and so does compiling the step.

    On a CPU the state is there at the return: both at once took half as much memory again, and no less time.
    """
    beside = ThreadPoolExecutor(1)
    state = beside.submit(create_state, parts, mesh, params)
    beside.shutdown(wait=jax.default_backend() == "cpu")
    return state


def loss_fn(model: ModelConfig, params: Params, tokens: Integer[Array, "B T1"], seed=None) -> Float[Array, ""]:
    """Mean cross-entropy in nats of predicting tokens[:, 1:] from tokens[:, :-1]. UserError if it is no number."""
    tokens = tokens.astype(jnp.int32)
    inputs, targets = on_all_parts(tokens[:, :-1]), on_all_parts(tokens[:, 1:])
    loss = bind(model, params).loss(inputs, targets, seed=seed)
    if not isinstance(loss, jax.Array) or loss.shape:
        found = f"an array of shape {loss.shape}" if isinstance(loss, jax.Array) else f"a {type(loss).__name__}"
        raise UserError(f"model={model.file.name}: loss returns {found}; return one number, the mean over all targets")
    return loss


def split_stacks(params_roles: Any, params: Params) -> Params:
    """The parameters with every array that stacks matrices (Role.stack) as a list of them. params_roles: theirs."""

    def split(role, x):
        if role.stack is None:
            return x
        return [jax.lax.index_in_dim(x, i, role.stack, keepdims=False) for i in range(x.shape[role.stack])]

    return jax.tree.map(split, params_roles, params)


def join_stacks(params_roles: Any, params: Params) -> Params:
    """The inverse of split_stacks."""

    def join(role, x):
        return x if role.stack is None else jnp.stack(x, axis=role.stack)

    return jax.tree.map(join, params_roles, params)


def gradients(
    model: ModelConfig, params: Params, scale: Float[Array, ""], seed, tokens: Integer[Array, "B T1"]
) -> tuple[Float[Array, ""], Params]:
    """Loss and gradients of one device's rows of a micro-batch, in float32, without the loss scale."""
    scaled = model.dtype == "float16"

    def scaled_loss(params):
        loss = loss_fn(model, params, tokens, seed)
        return loss * scale if scaled else loss

    found = jax.tree.map(lambda x: x.astype(jnp.float32), jax.value_and_grad(scaled_loss)(params))
    return jax.tree.map(lambda x: x / scale, found) if scaled else found


def summed_gradients(
    model: ModelConfig, params: Params, scale: Float[Array, ""], seeds, tokens: Integer[Array, "A B T1"]
) -> tuple[Float[Array, ""], Params]:
    """Mean loss and mean gradients of one device's rows, over micro-steps, added up in a scan."""
    micro_steps = tokens.shape[0]
    if micro_steps == 1:
        return gradients(model, params, scale, None if seeds is None else seeds[0], tokens[0])
    # Queries', keys' and values' weights are apart in the loop: the model slices them and their gradients are joined,
    # each a copy that the compiler drops where the slices come from, and go back to, parts.
    by_role = roles(model, params)
    parts = split_stacks(by_role, params)

    def add(total, xs):
        loss, grads = gradients(model, join_stacks(by_role, parts), scale, *xs)
        return jax.tree.map(jnp.add, total, (loss, split_stacks(by_role, grads))), None

    zeros = (jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), parts))
    (loss, grads), _ = jax.lax.scan(add, zeros, (seeds, tokens))
    return jax.tree.map(lambda x: x / micro_steps, (loss, join_stacks(by_role, grads)))


def mean_loss_and_gradients(
    model: ModelConfig, mesh: Mesh, params: Params, scale: Float[Array, ""], seeds, tokens
) -> tuple[Float[Array, ""], Params]:
    """summed_gradients on each device's rows alone, then one mean over devices."""
    by_role = roles(model, params)
    specs = param_specs(params, by_role, mesh)

    def local(params, scale, seeds, tokens):
        if seeds is not None:  # other rows, other masks
            seeds = seeds + jax.lax.axis_index(BATCH_AXES).astype(jnp.uint32)
        whole = gather_params(params, by_role, specs, mesh, model.dtype)
        loss, grads = summed_gradients(model, whole, scale, seeds, tokens)
        return mean_over(loss, mesh, *BATCH_AXES), mean_gradients(grads, by_role, specs, mesh)

    in_specs = (specs, P(), P(), P(None, BATCH_AXES, None))
    return device_map(local, mesh, in_specs, (P(), specs))(params, scale, seeds, tokens)


def updates_by_sum(
    loss_and_gradients: Callable, optimizer: optax.GradientTransformationExtraArgs, state: TrainState, seeds, tokens
) -> tuple[Array, Any, Any]:
    """Loss, updates and the optimizer's next state, from gradients summed over micro-steps before one mean."""
    loss, grads = loss_and_gradients(state.multiplied, state.loss_scale.scale, seeds, tokens)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
    return loss, updates, opt_state


def updates_by_multisteps(
    loss_and_gradients: Callable, optimizer: optax.GradientTransformationExtraArgs, state: TrainState, seeds, tokens
) -> tuple[Array, Any, Any]:
    """The same through optax.MultiSteps. Its accumulator is zero between steps: no checkpoint needs it."""
    accumulating = optax.MultiSteps(optimizer, every_k_schedule=tokens.shape[0])
    empty = accumulating.init(state.params)._replace(inner_opt_state=state.opt_state)

    def micro(carry, xs):
        multi_state, _, total = carry
        seed, micro_tokens = xs
        seed = None if seed is None else seed[None]
        loss, grads = loss_and_gradients(state.multiplied, state.loss_scale.scale, seed, micro_tokens[None])
        updates, multi_state = accumulating.update(grads, multi_state, state.params, step=state.step)
        return (multi_state, updates, total + loss), None

    carry = (empty, jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()))
    (multi_state, updates, total), _ = jax.lax.scan(micro, carry, (seeds, tokens))
    return total / tokens.shape[0], updates, multi_state.inner_opt_state


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no element is NaN or infinite. (x · 0 is 0 for all others; its sum, as the norm's, is one reduction.)"""
    return jnp.isfinite(sum(jnp.sum(x * 0.0, dtype=jnp.float32) for x in jax.tree.leaves(tree)))


def make_train_step(
    parts: Parts, mesh: Mesh
) -> Callable[[TrainState, Integer[Array, "K A B T1"]], tuple[TrainState, Metrics]]:
    """The compiled function that takes K optimizer steps, each of A micro-steps of B sequences; the state is donated.

    Its metrics are arrays of K: loss, grad_norm (before clipping), lr, bad_steps, finite. Where the loss, the gradient
    or an updated parameter is not finite (`finite` is False then), or there is a spike (spike_threshold), the update is
    dropped on the device: parameters and optimizer state stay, the step counts, and bad_steps says how many such steps
    there were in a row; it is 0 after a good one. Parameters are not looked at where `keeps_finite` answers for them.
    """
    config = parts.optimizer
    model = dataclasses.replace(parts.model, matmul_dtype=parts.devices.matmul_dtype)  # FP8 is for training alone
    optimizer = make_optimizer(config, roles(model, abstract_params(parts.model)), mesh)
    get_updates = partial(
        updates_by_multisteps if config.accumulation == "multisteps" else updates_by_sum,
        partial(mean_loss_and_gradients, model, mesh),
        optimizer,
    )

    def seeds_of(step, micro_steps):
        if not model.stochastic:
            return None
        key = jax.random.fold_in(random_key(parts.data.seed, "dropout"), step)
        return jax.random.bits(key, (micro_steps,), jnp.uint32)

    def one_step(state: TrainState, tokens: Integer[Array, "A B T1"]) -> tuple[TrainState, Metrics]:
        loss, updates, opt_state = get_updates(state, seeds_of(state.step, tokens.shape[0]), tokens)
        norm = opt_state.norm
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if not keeps_finite(config):  # one more pass over parameters and moments: 1.8% of a step of GPT-2
            finite &= all_finite(params)
        good, spikes = finite, state.spikes
        if config.spike_threshold:
            spike, spikes = spikes.next(loss, norm, finite, config.spike_threshold)
            good = finite & ~spike
        average = state.average
        if average is not None:
            average = optax.incremental_update(params, average, 1 - config.average_decay)
        keep = partial(jax.tree.map, partial(jnp.where, good))
        params = keep(params, state.params)
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=keep(opt_state, state.opt_state),
            loss_scale=state.loss_scale.next(finite, model.dtype),
            bad_steps=jnp.where(good, 0, state.bad_steps + 1),
            spikes=spikes,
            average=keep(average, state.average),
            rounded=rounded_matrices(parts, params),
        )
        lr = learning_rate(config, state.step)
        return new, {"loss": loss, "grad_norm": norm, "lr": lr, "bad_steps": new.bad_steps, "finite": finite}

    def train_step(state: TrainState, tokens: Integer[Array, "K A B T1"]) -> tuple[TrainState, Metrics]:
        if tokens.shape[0] == 1:  # a loop would copy what it carries
            state, metrics = one_step(state, tokens[0])
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(one_step, state, tokens)

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(parts, mesh))
    batch = NamedSharding(mesh, P(None, None, BATCH_AXES, None))
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def make_eval_step(
    model: ModelConfig, mesh: Mesh
) -> Callable[[Params, Integer[Array, "1 A B T1"]], Float[Array, " A"]]:
    """The compiled function that gives the mean loss in nats of each of A batches, dropout off."""

    def losses(params, tokens):
        means = jax.lax.map(partial(loss_fn, model, params), tokens[0])
        return mean_over(means, mesh, *BATCH_AXES)

    by_role, rows = roles(model, abstract_params(model)), P(None, None, BATCH_AXES, None)
    return jax.jit(with_whole_params(losses, by_role, mesh, model.dtype, rows, P()))
