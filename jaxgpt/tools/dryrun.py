"""`train --dry_run`: the step compiled for a mesh that need not be there, what it takes, and every problem at once."""

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxgpt import UserError
from jaxgpt.config import DataConfig, Parts, resolve
from jaxgpt.data import corpus_folders
from jaxgpt.keys import take
from jaxgpt.models import count_params
from jaxgpt.run.launchers import count_gpus
from jaxgpt.sharding import AXES, BATCH_AXES, configured_mesh, data_shards, make_mesh
from jaxgpt.step import TrainState, abstract_state, make_train_step
from jaxgpt.tokenizer import GPT2_VOCAB_SIZE, token_dtype
from jaxgpt.weights.opening import check_data, open_data, open_weights

GPUS_PER_HOST = 8  # of described hosts


def dry_run(config: ConfigDict, devices: int, checks: Sequence[Callable] = ()) -> int:
    """Prints parameters, tokens per step, memory per device and collectives; then every problem, for a status of 2.

    devices: of the described mesh; 0: the product of its sizes or, where one is -1, this machine's devices. Where those
    are not this machine's they exist for the compiler alone. checks: what else may raise UserError.
    """
    if jax.distributed.is_initialized():
        raise UserError("dry_run describes all devices by itself; run it in one process")
    problems: list[str] = []

    def attempt(f: Callable[[], Any]) -> Any:
        try:
            return f()
        except UserError as error:
            problems.append(str(error))

    sizes = [config[f"mesh_{axis}"] for axis in AXES]
    devices = devices or (0 if -1 in sizes else math.prod(sizes))
    described = 0 < devices != count_gpus()
    found = describe_devices(devices) if described else jax.devices()
    for check in checks:
        attempt(check)
    mesh = attempt(lambda: configured_mesh(config, found))
    where = mesh or make_mesh(1, 1, 1, devices=found[:1])  # a value that will not do must not hide what else is wrong
    fresh = config.init_from in ("scratch", "auto", "resume")
    weights = None if fresh else attempt(lambda: open_weights(config, where))
    fitting, shards = config.copy_and_resolve_references(), data_shards(where)
    fitting.gradient_accumulation_steps = max(1, config.gradient_accumulation_steps // shards) * shards
    if fitting.gradient_accumulation_steps != config.gradient_accumulation_steps:
        attempt(lambda: open_data(config, where, weights))
    folders = attempt(lambda: corpus_folders(take(DataConfig, fitting))) or []
    absent = [folder for folder in folders if not config.data_dir and not any(folder.glob("*.bin"))]  # no mistake yet
    data = None if absent else attempt(lambda: open_data(fitting, where, weights))
    if data:
        attempt(lambda: check_data(config, data.meta, weights))
    if described and config.dtype == "auto":
        fitting.dtype = "bfloat16"
    vocab_size = data.vocab_size if data else weights.meta.vocab_size if weights else GPT2_VOCAB_SIZE
    eot = data.meta.eot if data else GPT2_VOCAB_SIZE - 1
    parts = attempt(lambda: resolve(fitting, where, vocab_size, eot))
    state = mesh and parts and attempt(lambda: abstract_state(parts, mesh))
    if state:
        print("\n".join(report(parts, mesh, state, described)))
        if absent:
            print(f"{absent[0]} holds no tokens yet: a vocabulary of {vocab_size:,} is assumed")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


def describe_devices(count: int) -> Sequence[Any]:
    """`count` devices that only the compiler sees: GPUs like this machine's, else CPUs."""
    if count_gpus():
        hosts, rest = divmod(count, GPUS_PER_HOST)
        shape = f"1x1x{count}" if rest else f"1x{hosts}x{GPUS_PER_HOST}"
        return topologies.get_topology_desc(platform="cuda", topology_name="", topology=shape).devices
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # it will never run
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count} {quick}"
    jax.config.update("jax_platforms", "cpu")
    return jax.devices()


def report(parts: Parts, mesh: Mesh, state: TrainState, described: bool) -> list[str]:
    """Lines for people on the step compiled for this mesh."""
    model, data, shards = parts.model, parts.data, data_shards(mesh)
    micro_steps, rows = data.gradient_accumulation_steps // shards, data.batch_size * shards
    tokens = jax.ShapeDtypeStruct(
        (1, micro_steps, rows, model.block_size + 1),
        token_dtype(model.vocab_size),
        sharding=NamedSharding(mesh, P(None, None, BATCH_AXES, None)),
    )
    compiled = make_train_step(parts, mesh).lower(state, tokens).compile()
    platform = mesh.devices.flat[0].platform
    state_gib = bytes_per_device(state) / 2**30
    if described and platform == "cpu":
        step_gib = step_bytes(parts, mesh, count_params(model, state.params, all=True)) / 2**30
        origin = "estimated for accelerators with fused attention"
    else:
        step_gib, origin = compiled.memory_analysis().temp_size_in_bytes / 2**30, "as compiled"
    shape = " × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kind = f"{'described ' if described else ''}{mesh.devices.flat[0].device_kind}"
    return [
        f"{count_params(model, state.params):,} parameters, {micro_steps * rows * model.block_size:,} tokens per step: "
        f"{micro_steps} micro-steps of {rows} sequences of {model.block_size:,}",
        f"mesh {shape} on {mesh.size} × {kind}, {model.dtype}, attention by {model.attention}",
        f"memory per device: {state_gib + step_gib:.2f} GiB: state {state_gib:.2f}, step {step_gib:.2f} ({origin})",
        *(
            f"{name} per step: {count:,} of {size / 1e6:,.1f} MB in all"
            for name, (count, size) in sorted(collectives(compiled.as_text()).items())
        ),
    ]


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of arrays with shardings that each device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def step_bytes(parts: Parts, mesh: Mesh | AbstractMesh, n_params: int) -> float:
    """About what a step needs on a device besides the state, with kernels and fused attention, which keep no scores.

    A token leaves 16 vectors of n_embd for the backward pass in each block: 2 inputs and 2 outputs of normalization, q,
    k, v, the output of attention, 4 + 4 around GELU; with remat 2 and one block's 16; and its logits. Besides: the
    parameters in the computation's dtype and, with micro-steps, a float32 sum of gradients. For GPT-2 124M at 64
    sequences and 1.5B at 16 this gives 24.4 and 42.0 GiB, where XLA's memory analysis for an H200 says 25.6 and 42.5.
    """
    c, size, tensor = parts.model, jnp.dtype(parts.model.dtype).itemsize, mesh.shape["tensor"]
    block = (6 + 10 / tensor) * c.n_embd  # normalization and the residual stream are whole on every device of tensor
    kept = c.n_layer * block if c.remat == "none" else 2 * c.n_layer * c.n_embd + block
    activations = parts.data.batch_size * c.block_size * size * (kept + c.padded_vocab_size / tensor)
    sums = 4 if parts.data.gradient_accumulation_steps > data_shards(mesh) else 0
    return activations + (size + sums) * n_params / tensor


KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Of a compiled program's text: kind of collective -> how often it runs, and bytes in all.

    Bytes are those of the larger side on one device: the whole array, which an all-gather makes and a reduce-scatter
    takes. Bodies of loops count as often as the compiler knows them to run.
    """
    computations: dict[str, list[re.Match]] = {}
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY|%?[\w.\-]+) .*\{$", line):
            computation = computations[header[1].lstrip("%")] = []
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line):
            computation.append(instruction)
    found: dict[str, tuple[int, int]] = {}

    def count(computation: str, times: int) -> None:
        size_of = {}
        for instruction in computations.get(computation, ()):
            result, shape, operation, rest = instruction.groups()
            size_of[result] = _bytes(shape)
            if kind := re.fullmatch(rf"({KINDS})(-start)?", operation):
                operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
                taken = sum(size_of.get(x, 0) for x in operands)
                made = size_of[result] - (taken if kind[2] else 0)  # -start also holds its operands
                calls, size = found.get(kind[1], (0, 0))
                found[kind[1]] = calls + times, size + times * max(taken, made)
            loop = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            called = re.findall(r"(?:body|calls|to_apply|\w+_computations?)=(\{.*?\}|[^ ,]+)", rest)
            for name in re.findall(r"[\w.\-]+", " ".join(called)):
                count(name, times * int(loop[1]) if loop else times)

    count("ENTRY", 1)
    return found


def _bytes(shape: str) -> int:
    """Of `f32[8,16]{1,0}` or a tuple of such."""
    arrays = re.findall(r"\b[a-z]+(\d*)[a-z0-9]*\[([\d,]*)\]", shape)
    return sum(max(1, int(bits or 8) // 8) * math.prod(int(n) for n in dims.split(",") if n) for bits, dims in arrays)
