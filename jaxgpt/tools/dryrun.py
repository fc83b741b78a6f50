"""`train --dry_run`: the step compiled for a mesh that need not be there, what it takes, and every problem at once."""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxgpt import UserError
from jaxgpt.config import DataConfig, Parts, check_fp8, resolve
from jaxgpt.data import corpus_folders
from jaxgpt.keys import take
from jaxgpt.metrics import peak_bytes, peak_flops
from jaxgpt.models import abstract_params, count_params, describe_slip, find_model, line_of
from jaxgpt.optim import unfinished
from jaxgpt.run.launchers import count_gpus
from jaxgpt.sharding import AXES, configured_mesh, data_shards, make_mesh
from jaxgpt.step import TrainState, abstract_state
from jaxgpt.tokenizer import GPT2_VOCAB_SIZE
from jaxgpt.tools import slices
from jaxgpt.tools.consistency import check_consistency
from jaxgpt.tools.estimate import step_bytes
from jaxgpt.tools.memory import (
    Need,
    bytes_per_device,
    choose_batch,
    limit_of,
    limit_of_kind,
    lower_step,
    out_of_memory,
    smallest_batch,
    try_compile,
)
from jaxgpt.weights.opening import check_data, open_data, open_weights

GPUS_PER_HOST = 8  # of described hosts
MOST_DEVICES = 2**17  # more than any program has run on; what XLA cannot count ends the process


def dry_run(config: ConfigDict, devices: int | str, checks: Sequence[Callable] = ()) -> int:
    """Prints parameters, tokens, memory, roofline and collectives of a step; then every problem, for a status of 2.

    devices: of the described mesh: their number, or a name as slices.parse takes it; 0: the product of its sizes or,
    where one is -1, this machine's devices. Where they are not this machine's they exist for the compiler alone.
    checks: what else may raise UserError.
    """
    if jax.distributed.is_initialized():
        raise UserError("dry_run describes all devices by itself; run it in one process")
    if not isinstance(devices, str) and not 0 <= devices <= MOST_DEVICES:
        raise UserError(f"dry_run={str(devices)[:20]} is no number of devices, 1 to {MOST_DEVICES:,}")
    problems: list[str] = []
    file = find_model(config.model)

    def attempt(f: Callable[[], Any]) -> Any:
        try:
            return f()
        except UserError as error:
            problems.append(str(error))
        except Exception as error:  # of a user's file, when it is traced; the run itself has the whole traceback
            if not (file.source and line_of(error, file.name)):
                raise
            problems.append(f"model={file.name}: {describe_slip(error, file.name):.400}")

    sizes = [config[f"mesh_{axis}"] for axis in AXES]
    name, count = (slices.parse(devices), 0) if isinstance(devices, str) else (None, devices)
    count = name.count if name else count or (0 if -1 in sizes else math.prod(sizes))
    described = name is not None or 0 < count != count_gpus()
    if name and name.kind in slices.TPUS:
        found = slices.describe_tpus(name)
    else:
        found = describe_devices(count) if described else jax.devices()
    for check in checks:
        attempt(check)
    mesh = attempt(lambda: configured_mesh(config, found))
    where = mesh or make_mesh(1, 1, 1, devices=found[:1])  # a value that will not do must not hide what else is wrong
    fresh = config.init_from in ("scratch", "auto", "resume")
    weights = None if fresh else attempt(lambda: open_weights(config, where))
    fitting, shards = config.copy_and_resolve_references(), data_shards(where)
    if described and config.dtype == "auto":
        fitting.dtype = "bfloat16"
    if name and name.kind in slices.GPUS:
        attempt(lambda: take_as_supported(fitting, name, where))
    auto = config.auto_batch_size and attempt(lambda: smallest_batch(fitting, where))
    if not auto:
        fitting.gradient_accumulation_steps = max(1, config.gradient_accumulation_steps // shards) * shards
    if fitting.gradient_accumulation_steps != config.gradient_accumulation_steps and not config.auto_batch_size:
        attempt(lambda: open_data(config, where, weights))
    folders = attempt(lambda: corpus_folders(take(DataConfig, fitting))) or []
    absent = [folder for folder in folders if not config.data_dir and not any(folder.glob("*.bin"))]  # no mistake yet
    data = None if absent else attempt(lambda: open_data(auto or fitting, where, weights))
    if data:
        attempt(lambda: check_data(config, data.meta, weights))
    vocab_size = data.vocab_size if data else weights.meta.vocab_size if weights else GPT2_VOCAB_SIZE
    eot = data.meta.eot if data else GPT2_VOCAB_SIZE - 1
    device, chosen = where.devices.flat[0], None
    limit = limit_of_kind(name or device) if described else limit_of(device)
    if auto and mesh:
        need_at = partial(estimated_need, mesh) if described and device.platform == "cpu" else None
        chosen = attempt(lambda: choose_batch(fitting, mesh, vocab_size, eot, limit, need_at))
    parts = attempt(lambda: resolve(chosen[0] if chosen else auto or fitting, where, vocab_size, eot))
    state = mesh and parts and (chosen or not auto) and attempt(lambda: abstract_state(parts, mesh))
    sound = not problems  # else these figures would be another run's
    if reported := state and attempt(lambda: report(parts, mesh, state, described, name, limit)):
        lines, lacking = reported
        problems += [str(lacking)] if lacking else []
        if sound:
            lines += [chosen[1]] if chosen else []
            lines += unfinished(parts.optimizer)
            lines += attempt(lambda: check_consistency(parts.model)) or [] if file.source else []
            lines += [f"{absent[0]} holds no tokens yet: a vocabulary of {vocab_size:,} is assumed"] if absent else []
            print("\n".join(lines))
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


def take_as_supported(config: ConfigDict, gpu: slices.Name, mesh: Mesh) -> None:
    """Has the config leave out what no compiler at hand compiles and that GPU has: FP8, cuDNN, bfloat16.

    Raises UserError where that GPU does not have it either.
    """
    capability = slices.CAPABILITY[gpu.kind]
    if config.matmul_dtype == "fp8":
        config.matmul_dtype = "auto"
        check_fp8(config, config.dtype, capability >= 8.9, mesh)
    if config.attention == "cudnn" and capability >= 8:
        config.attention = "auto"
    if config.dtype == "bfloat16" and capability < 8:
        config.dtype = "float16"


def estimated_need(mesh: Mesh, parts: Parts) -> Need:
    """What a step takes by arithmetic."""
    temporaries = step_bytes(parts, mesh, count_params(parts.model, abstract_params(parts.model), all=True))
    return Need(bytes_per_device(abstract_state(parts, mesh).saved), int(temporaries))


def report(
    parts: Parts, mesh: Mesh, state: TrainState, described: bool, name: slices.Name | None, limit: int | None
) -> tuple[list[str], UserError | None]:
    """Lines for people on the step compiled for this mesh; and what to say where it does not fit into the limit, in
    bytes on a device. Raises UserError where the compiler refuses the step."""
    model, data, shards = parts.model, parts.data, data_shards(mesh)
    micro_steps, rows = data.gradient_accumulation_steps // shards, data.batch_size * shards
    device = mesh.devices.flat[0]
    try:
        compiled, need = try_compile(lower_step(parts, mesh, state), state)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the compiler refuses this step: {str(error).splitlines()[0][:300]}") from None
    origin = "as compiled"
    if described and device.platform == "cpu":
        need, origin = estimated_need(mesh, parts), "estimated for accelerators with fused attention"
    assert need is not None  # CPUs', GPUs' and TPUs' compilers all tell
    limit = need.limit or limit
    lacking = out_of_memory(parts, mesh, need, limit) if limit and need.total > limit else None
    if compiled is None:
        raise lacking or AssertionError
    hlo, kind = compiled.as_text(), name or device
    room = f" of {limit / 2**30:.1f} ({'does not fit' if lacking else 'fits'})" if limit else ""
    shape = " × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    total, saved = micro_steps * rows * model.block_size, bytes_per_device(state.saved)
    lines = [
        f"{count_params(model, state.params):,} parameters, {total:,} tokens per step: "
        f"{micro_steps} micro-step{'s' * (micro_steps != 1)} of {rows} sequences of {model.block_size:,}",
        f"mesh {shape} on {mesh.size} × {'described ' if described else ''}{kind.device_kind}, {model.dtype}, "
        f"attention by {model.attention}",
        f"memory per device: {need.total / 2**30:.2f} GiB{room}: state {saved / 2**30:.2f}, step "
        f"{(need.total - saved) / 2**30:.2f} ({origin})",
        *roofline(model.flops_per_token(state.params) * total / mesh.size, compiled, hlo, kind, device),
        *(
            f"{name} per step: {count:,} of {size / 1e6:,.1f} MB in all"
            for name, (count, size) in sorted(collectives(hlo).items())
        ),
        *([f"asynchronous collectives: {pairs}"] if (pairs := async_pairs(hlo)) else []),
    ]
    return lines, lacking


def roofline(flops: float, compiled: Any, hlo: str, kind: Any, device: Any) -> list[str]:
    """A line on the time that arithmetic, or memory traffic, takes on a device of this kind, if that is known.

    flops: of a step on a device, by the formula that MFU goes by. device: one that the step was compiled for.
    """
    peak, rate = peak_flops(kind), peak_bytes(kind)
    if peak is None or rate is None:
        return []
    compute = f"{flops / 1e12:.2f} TFLOP per device and step, {1e3 * flops / peak:.1f} ms at {peak / 1e12:g} TFLOP/s"
    if device.platform == "cpu":
        return [f"{compute}; its memory traffic is not known, for lack of that device's compiler"]
    size = compiled.cost_analysis()["bytes accessed"] * loops_factor(hlo)
    traffic = f"{size / 1e9:.1f} GB of memory traffic"
    if device.platform == "tpu":
        traffic, size = f"{size / 1e9:.1f} GB moved", min(size, memory_bytes(hlo))
        traffic += f", {size / 1e9:.1f} of them to and from memory"
    seconds = max(flops / peak, size / rate)
    return [
        f"{compute}; {traffic}, {1e3 * size / rate:.1f} ms at {rate / 1e9:g} GB/s: "
        f"roofline {1e3 * seconds:.1f} ms, MFU up to {100 * flops / peak / seconds:.0f}%"
    ]


KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Of a compiled program's text: kind of collective -> how often it runs, and bytes in all.

    Bytes are those of the larger side on one device: the whole array, which an all-gather makes and a reduce-scatter
    takes. Bodies of loops count as often as the compiler knows them to run. TPUs' compiler names a collective that goes
    on beside several products in the fusion of each, as one chain, which counts once; and some reduce-scatters it
    writes as a fusion `all-reduce-scatter`.
    """
    computations = _computations(hlo)
    found: dict[str, tuple[int, int]] = {}
    chains: set[tuple[str, int]] = set()

    def count(computation: str, times: int) -> None:
        size_of = {}
        for instruction in computations.get(computation, ()):
            result, shape, operation, rest = instruction.groups()
            size_of[result] = _bytes(shape)
            if kind := re.fullmatch(rf"({KINDS})(-start)?", operation):
                operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
                taken = sum(size_of.get(x, 0) for x in operands)
                made = size_of[result] - (taken if kind[2] else 0)  # -start also holds its operands
                chain = re.search(r'chain_id="\d+"', rest)
                if chain and (chain[0], made) in chains:
                    continue
                if chain:
                    chains.add((chain[0], made))
                name = "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind[1]
                calls, size = found.get(name, (0, 0))
                found[name] = calls + times, size + times * max(taken, made)
            trips = _trips(computations, rest) if operation == "while" else 1
            called = re.findall(r"(?:body|calls|to_apply|\w+_computations?)=(\{.*?\}|[^ ,]+)", rest)
            for name in re.findall(r"[\w.\-]+", " ".join(called)):
                count(name, times * trips)

    count("ENTRY", 1)
    return found


def async_pairs(hlo: str) -> int:
    """How many of a compiled program's collectives have a start and an end apart, with work between them."""
    started = re.findall(rf" (?:{KINDS})-start\(", hlo)
    fused = re.findall(rf" async-start\(.*calls=%?[\w.\-]*(?:{KINDS})", hlo)
    return len(started) + len(fused) + hlo.count('custom_call_target="AsyncCollectiveStart"')  # the last: TPUs'


def loops_factor(hlo: str) -> float:
    """By how much the bytes of a compiled program exceed those that it has with each loop's body counted once.

    XLA's cost analysis counts so. Here an instruction's bytes are those of its operands and results, as a weight.
    """
    weights = [
        (times, sum(map(_bytes, [shape, *operands]))) for times, _, shape, operands in _executed(_computations(hlo))
    ]
    once = sum(weight for _, weight in weights)
    return sum(times * weight for times, weight in weights) / once if once else 1.0


def memory_bytes(hlo: str) -> int:
    """Bytes that a TPU's compiled program reads from its memory and writes there, without the padding of arrays.

    XLA's analysis counts arrays in a core's own memory too, `S(1)` in their layouts. Loops count as they run.
    """
    total = 0
    for times, operation, shape, operands in _executed(_computations(hlo)):
        arrays = " ".join([shape] if operation.endswith("-start") else [shape, *operands])  # -start holds its operands
        if operation in ("copy-start", "slice-start"):  # between the two
            total += times * (_bytes(shape) - sum(map(_bytes, operands)))
        elif not operation.endswith("-done"):
            total += times * _bytes(re.sub(r"\w+\[[\d,]*\]\{[^}]*S\([1-9]\d*\)\}", "", arrays))
    return total


def _executed(
    computations: dict[str, list[re.Match]], computation: str = "ENTRY", times: int = 1
) -> Iterator[tuple[int, str, str, list[str]]]:
    """What runs, bodies of loops too: how often, the operation, its result's shape and its operands'."""
    shape_of = {}
    for instruction in computations.get(computation, ()):
        result, shape, operation, rest = instruction.groups()
        shape_of[result] = shape
        if operation == "while":
            if body := re.search(r"body=%?([\w.\-]+)", rest):
                yield from _executed(computations, body[1], times * _trips(computations, rest))
        elif operation not in ("parameter", "get-tuple-element", "tuple", "bitcast", "constant"):
            operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
            yield times, operation, shape, [shape_of.get(x, "") for x in operands]


def _trips(computations: dict[str, list[re.Match]], rest: str) -> int:
    """How often a while loop runs, as the compiler knows it, or as its condition says (TPUs'); 1 where neither does."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    bounds = [
        int(number[1])
        for instruction in computations.get(condition[1] if condition else "", ())
        if instruction[3] == "constant" and (number := re.match(r"(\d+)\)", instruction[4]))
    ]
    return bounds[0] if len(bounds) == 1 else 1


def _computations(hlo: str) -> dict[str, list[re.Match]]:
    """Each computation's instructions, as matches of (result, shape, operation, rest)."""
    computations: dict[str, list[re.Match]] = {}
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY|%?[\w.\-]+) .*\{$", line):
            computation = computations[header[1].lstrip("%")] = []
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line):
            computation.append(instruction)
    return computations


def _bytes(shape: str) -> int:
    """Of `f32[8,16]{1,0}` or a tuple of such."""
    arrays = re.findall(r"\b[a-z]+(\d*)[a-z0-9]*\[([\d,]*)\]", shape)
    return sum(max(1, int(bits or 8) // 8) * math.prod(int(n) for n in dims.split(",") if n) for bits, dims in arrays)
