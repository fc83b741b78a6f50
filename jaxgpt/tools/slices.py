"""Devices by name, for the compiler alone: `v5e:4x4` and `v5p:4x4x4` are TPU slices, `h100:8` are GPUs."""

import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jaxgpt import UserError
from jaxgpt.cli import nearest

# Names of kinds -> device_kind, as the tables of metrics.py have it
TPUS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
GPUS = {
    "t4": "Tesla T4",
    "v100": "Tesla V100",
    "a10": "NVIDIA A10",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "l4": "NVIDIA L4",
    "l40s": "NVIDIA L40S",
    "h100": "NVIDIA H100",
    "h200": "NVIDIA H200",
    "gh200": "NVIDIA GH200",
    "b200": "NVIDIA B200",
}
# Of GPUs, CUDA's compute capability (developer.nvidia.com/cuda-gpus)
CAPABILITY = {
    "t4": 7.5,
    "v100": 7.0,
    "a10": 8.6,
    "a100": 8.0,
    "a100-40gb": 8.0,
    "l4": 8.9,
    "l40s": 8.9,
    "h100": 9.0,
    "h200": 9.0,
    "gh200": 9.0,
    "b200": 10.0,
}
# Slices of v5e and v6e that Cloud TPU has (cloud.google.com/tpu/docs/v5e, …/v6e); those of v4 and v5p have three sides
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Or libtpu asks the metadata server of a cloud machine which slice it is on, and waits for it; the type only keeps a
# warning away
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Name(NamedTuple):
    """Devices as a command line names them."""

    kind: str  # of TPUS or GPUS
    shape: str  # of a TPU slice: "4x4"
    slices: int  # of TPUs
    count: int  # devices in all

    @property
    def device_kind(self) -> str:
        return (TPUS | GPUS)[self.kind]


def parse(text: str) -> Name:
    """The devices that `v5e:4x4`, `2*v5e:4x4` (two slices) or `h100:8` (one where no number is given) names.

    Raises UserError, with the nearest name, where there are none of that name.
    """
    match = re.fullmatch(r"(?:([1-9]\d{0,3})\*)?([\w-]+)(?::([\dx]+))?", text.lower())
    if not match:
        raise UserError(f"{text!r} names no devices; write v5e:4x4, or h100:8")
    slices, kind, shape = match.groups("")
    if kind not in TPUS | GPUS:
        hint = nearest(kind, TPUS | GPUS) or f"; there are {', '.join(TPUS | GPUS)}"
        raise UserError(f"{text}: {kind!r} is no kind of device that is known{hint}")
    if kind in GPUS:
        if slices or not re.fullmatch(r"[1-9]\d{0,5}", shape or "1"):
            raise UserError(f"{text} is no number of GPUs; write {kind}:8 for eight")
        return Name(kind, "", 1, int(shape or 1))
    if shape not in shapes(kind):
        raise UserError(
            f"{text}: there is no {kind} slice of {shape or 'no shape'}; the nearest is {closest(shape, kind)}"
        )
    return Name(kind, shape, int(slices or 1), int(slices or 1) * math.prod(map(int, shape.split("x"))))


def shapes(kind: str) -> Sequence[str]:
    """Of slices. Those of v4 and v5p: 2x2x1, and sides of 2 or multiples of 4 in ascending order, up to 16x16x24."""
    if kind in ("v5e", "v6e"):
        return FLAT
    sides = (2, 4, 8, 12, 16, 20, 24)
    cubes = itertools.combinations_with_replacement(sides, 3)
    return ["2x2x1", "2x2x2", "2x2x4", "2x4x4", *("x".join(map(str, c)) for c in cubes if c[0] >= 4 and c[1] <= 16)]


def closest(shape: str, kind: str) -> str:
    """The name of the slice whose number of chips, then whose sides, come nearest to those of `shape`."""
    wanted = [int(side) for side in shape.split("x") if side] or [1]

    def distance(name: str) -> tuple[float, int]:
        sides = [int(side) for side in name.split("x")]
        chips = abs(math.log(max(1, math.prod(wanted)) / math.prod(sides)))
        return chips, sum(abs(a - b) for a, b in zip(sorted(wanted), sorted(sides), strict=False))

    return f"{kind}:{min(shapes(kind), key=distance)}"


def describe_tpus(name: Name) -> Sequence[Any]:
    """The devices of TPU slices, for libtpu's compiler. Call it before JAX looks for devices.

    Raises UserError where libtpu is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {name.kind}:{name.shape} takes libtpu, on any x86-64 Linux: pip install 'jax[tpu]'"
        )
    for key, value in ALONE.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")  # all but the compiler is this machine's own
    options: dict[str, Any] = {"num_slices": name.slices} if name.slices > 1 else {}
    options |= {"chip_config_name": "megacore"} if name.kind == "v4" else {}  # a chip's two cores as one device
    try:
        shape = f"{name.kind}:{name.shape}"
        return topologies.get_topology_desc(platform="tpu", topology_name=shape, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu cannot describe {name.kind}:{name.shape}: {str(error).splitlines()[0]}") from None
