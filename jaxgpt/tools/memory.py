"""Whether a step fits its devices, which settings would, and the largest micro-batch that does, all before it runs.

The figures are the compiled program's own; where a device's compiler is not at hand, those of estimate.step_bytes.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxgpt import UserError
from jaxgpt.config import Parts, resolve, validate
from jaxgpt.metrics import memory_gib
from jaxgpt.models import abstract_params, count_params
from jaxgpt.run.processes import agree, least
from jaxgpt.sharding import BATCH_AXES, GPU_FRACTION, data_shards
from jaxgpt.step import TrainState, abstract_state, make_train_step
from jaxgpt.tokenizer import token_dtype
from jaxgpt.tools.estimate import step_bytes


class Need(NamedTuple):
    """Bytes that a step takes on a device."""

    state: int
    temporaries: int
    limit: int | None = None  # what the compiler says that the device has, where it refuses the step

    @property
    def total(self) -> int:
        return self.state + self.temporaries


def limit_of(device: Any) -> int | None:
    """Bytes that arrays may take on a device of this machine, as its allocator says; None: it does not, as a CPU's."""
    return (device.memory_stats() or {}).get("bytes_limit")


def limit_of_kind(kind: Any) -> int | None:
    """The same of a device that is not there; None: its kind is not known. kind: what has a `device_kind`."""
    gib = memory_gib(kind)
    share = 1.0 if kind.device_kind.startswith("TPU") else GPU_FRACTION
    return None if gib is None else int(share * gib * 2**30)


def abstract_tokens(parts: Parts, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The batch of a call that takes one optimizer step."""
    data, shards = parts.data, data_shards(mesh)
    shape = 1, data.gradient_accumulation_steps // shards, data.batch_size * shards, parts.model.block_size + 1
    sharding = NamedSharding(mesh, P(None, None, BATCH_AXES, None))
    return jax.ShapeDtypeStruct(shape, token_dtype(parts.model.vocab_size), sharding=sharding)


def lower_step(parts: Parts, mesh: Mesh, state: TrainState) -> Any:
    """The step on abstract arguments, for one optimizer step a call. state: step.abstract_state."""
    return make_train_step(parts, mesh).lower(state, abstract_tokens(parts, mesh))


def need_of(compiled: Any) -> Need | None:
    """What a compiled step says that it takes; None: it does not."""
    figures = compiled.memory_analysis()
    if figures is None:
        return None
    state = figures.argument_size_in_bytes + figures.output_size_in_bytes - figures.alias_size_in_bytes
    return Need(state, figures.temp_size_in_bytes)


def try_compile(lowered: Any, state: TrainState) -> tuple[Any, Need | None]:
    """The compiled step and what it takes, or None and that, where a TPU's compiler refuses it for lack of memory."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm", str(error))
        beside = re.search(r"HLO temporaries \(([\d.]+)([MG])\) exceeds available HBM \(([\d.]+)([MG])\)", str(error))
        if not (found := used or beside):
            raise
        held, (size, limit) = (
            bytes_per_device(state),
            (int(float(x) * 2 ** (30 if unit == "G" else 20)) for x, unit in (found.groups()[:2], found.groups()[2:])),
        )
        return None, Need(held, max(0, size - held) if used else size, limit)
    return compiled, need_of(compiled)


def compile_step(lowered: Any, parts: Parts, mesh: Mesh, state: TrainState, limit: int | None = None) -> Any:
    """The compiled step. Raises UserError, naming settings for as many tokens that fit, where a device has not enough
    memory for it.

    limit: bytes that arrays may take on a device; by default as its allocator says, and nothing is checked where it
    does not say, as on CPUs.
    """
    compiled, need = try_compile(lowered, state)
    check_fits(parts, mesh, compiled, need, limit)
    return compiled


def check_fits(parts: Parts, mesh: Mesh, compiled: Any, need: Need | None, limit: int | None = None) -> None:
    """Raises UserError, as compile_step does, of a compiled step that needs too much; None: the compiler refused it."""
    limit = limit or (need and need.limit) or limit_of(mesh.local_devices[0])
    if need and limit and (compiled is None or need.total > limit):
        raise out_of_memory(parts, mesh, need, limit)


def out_of_memory(parts: Parts, mesh: Mesh, need: Need, limit: int) -> UserError:
    """What to say of a step that needs more than the limit, in bytes on a device."""
    ways = settings_that_fit(parts, mesh, limit - need.state, need.temporaries)
    return UserError(
        f"out of memory: a step needs {need.total / 2**30:.1f} GiB and a device has {limit / 2**30:.1f}; "
        + (f"as many tokens fit with {', or '.join(ways)}" if ways else "it takes more devices: raise mesh_fsdp")
    )


def settings_that_fit(parts: Parts, mesh: Mesh, room: int, temporaries: int) -> list[str]:
    """Settings for as many tokens a step whose temporaries fit into `room` bytes, by scaling those of this step.

    Temporaries grow with the micro-batch, but for float32 sums of gradients, which accumulation adds; recomputing a
    block saves the part of them that `step_bytes` counts.
    """
    data, shards = parts.data, data_shards(mesh)
    n_params = count_params(parts.model, abstract_params(parts.model), all=True)
    sums = 4 * n_params // mesh.shape["tensor"] if data.gradient_accumulation_steps == shards else 0
    remat = parts._replace(model=dataclasses.replace(parts.model, remat="block"))
    state = abstract_state(parts, mesh)
    rounded = bytes_per_device(state) - bytes_per_device(state.saved)  # which step_bytes counts
    saved = (step_bytes(remat, mesh, n_params) - rounded) / (step_bytes(parts, mesh, n_params) - rounded)
    rows, ways = data.batch_size * data.gradient_accumulation_steps, []
    for size in range(data.batch_size - 1, 0, -1):
        if rows % (size * shards) == 0 and temporaries * size / data.batch_size + sums <= room:
            ways.append(f"batch_size={size} gradient_accumulation_steps={rows // size}")
            break
    if parts.model.remat == "none" and "remat" not in parts.model.LACKS and temporaries * saved <= room:
        ways.append("remat=block")
    if mesh.shape["fsdp"] == 1 < mesh.size:
        ways.append(f"mesh_fsdp={mesh.size}, which splits the state as well")
    return ways


# --- batch_size=auto ---


def with_batch(config: ConfigDict, size: int) -> ConfigDict:
    """The config for micro-batches of `size` rows, with as many tokens in a step."""
    rows, config = config.batch_size * config.gradient_accumulation_steps, config.copy_and_resolve_references()
    config.update(batch_size=size, gradient_accumulation_steps=rows // size)
    return config


def smallest_batch(config: ConfigDict, mesh: Mesh) -> ConfigDict:
    """With batch_size=auto, the config for micro-batches of one row; else the config itself.

    Raises UserError where no micro-batch divides the rows of a step over the devices.
    """
    if not config.auto_batch_size:
        return config
    rows, shards = config.batch_size * config.gradient_accumulation_steps, data_shards(mesh)
    if rows % shards:
        raise UserError(
            f"batch_size=auto keeps the {rows} sequences of a step (batch_size={config.batch_size} × "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}), which the {shards} devices that share "
            f"the batch cannot divide; choose a gradient_accumulation_steps that is a multiple of {shards}"
        )
    return with_batch(config, 1)


def choose_batch(
    config: ConfigDict,
    mesh: Mesh,
    vocab_size: int,
    eot: int | None,
    limit: int | None,
    need_at: Callable[[Parts], Need | None] | None = None,
) -> tuple[ConfigDict, str]:
    """What batch_size=auto stands for, and a line on it: the largest micro-batch that fits into the limit, in bytes on
    a device, and divides the rows of a step, whose number stays.

    All processes choose alike. need_at: what a step takes, None where nobody knows; by default it is compiled. Where
    the limit or that is not known, as on CPUs, the config stays as it is. Raises UserError where nothing divides, or
    fits.
    """
    one = smallest_batch(config, mesh)
    limit = least("memory", limit or 0)
    kind = mesh.devices.flat[0].device_kind
    stays = f"batch_size=auto stays {config.batch_size}: a {kind} does not say how much memory it has"
    if not limit:
        return config, stays
    rows, found, refused = one.gradient_accumulation_steps // data_shards(mesh), {}, None
    for size in [n for n in range(1, rows + 1) if rows % n == 0]:
        sized = with_batch(config, size)
        try:
            validate(sized)
            found[size] = resolve(sized, mesh, vocab_size, eot)
        except UserError as error:  # FP8, say, which takes multiples of 16 tokens
            refused = error
    if not found:
        raise refused or AssertionError
    any_parts = next(iter(found.values()))
    state = bytes_per_device(abstract_state(any_parts, mesh).saved)
    n_params = count_params(any_parts.model, abstract_params(any_parts.model), all=True)
    estimates = {size: state + step_bytes(parts, mesh, n_params) for size, parts in found.items()}
    low, high, needs = 0, rows + 1, {}

    def guess(size: int) -> float:
        """By the estimate, by what it is off for one step, or on a line through the two that are nearest."""
        near = [(n, needs[n].total) for n in sorted(needs, key=lambda n: abs(n - size))[:2]]
        if len(near) == 2:
            (x, y), (x2, y2) = near
            return y + (y2 - y) / (x2 - x) * (size - x)
        return estimates[size] * (near[0][1] / estimates[near[0][0]] if near else 1)

    while between := [size for size in found if low < size < high]:
        fitting = [size for size in between if guess(size) <= limit]
        size = max(fitting, default=min(between))
        need = need_at(found[size]) if need_at else _compiled_need(mesh, found[size])
        fits = least(f"batch_size={size}", -1 if need is None else need.total <= min(limit, need.limit or limit))
        if need is None or fits < 0:
            return config, stays
        needs[size] = need
        low, high = (size, high) if fits else (low, size)
    if not low:
        raise out_of_memory(found[high], mesh, needs[high], needs[high].limit or limit)
    agree("batch_size", {"batch_size": low})
    chosen = with_batch(config, low)
    return chosen, (
        f"batch_size=auto is {low}, gradient_accumulation_steps {chosen.gradient_accumulation_steps}: a step takes "
        f"{needs[low].total / 2**30:.1f} GiB of {limit / 2**30:.1f}"
    )


def _compiled_need(mesh: Mesh, parts: Parts) -> Need | None:
    state = abstract_state(parts, mesh)
    return try_compile(lower_step(parts, mesh, state), state)[1]


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of arrays with shardings that each device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
