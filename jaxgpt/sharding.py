"""Devices: start-up of several processes, the mesh, and the rules that say which array lies where."""

import math
import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # rows of a batch are split over both

# Path of a parameter -> PartitionSpec; the first match counts, all others are replicated. fsdp splits each matrix over
# one dimension; tensor splits heads, MLP hidden units and the vocabulary (Megatron-LM, arXiv 1909.08053). Optimizer
# moments end in the same paths and so lie with their parameters.
RULES = (
    (r"wte/embedding$", P("tensor", "fsdp")),
    (r"wpe/embedding$", P(None, "fsdp")),
    (r"c_attn/kernel$", P("fsdp", None, "tensor")),
    (r"c_attn/bias$", P(None, "tensor")),
    (r"c_fc/kernel$", P("fsdp", "tensor")),
    (r"c_fc/bias$", P("tensor")),
    (r"c_proj/kernel$", P("tensor", "fsdp")),
)


# Compiler flags for NVIDIA GPUs; docs/performance.md has what each gained
XLA_GPU_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false",  # cuBLAS for all matrix products
    "--xla_gpu_dot_merger_threshold_mb=0",  # do not merge the products of queries, keys, values: slices are copies
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices with axes data, fsdp, tensor; one size may be -1, which takes what is left."""
    devices = jax.device_count()
    sizes = [data, fsdp, tensor]
    keys = ", ".join(f"mesh_{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1:
        raise UserError(f"{keys}: only one size may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise UserError(f"{keys} do not multiply to the {devices} devices found; set one to -1 to take what is left")
    # Auto: the compiler spreads shardings from the arrays to everything between them
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def is_data_parallel(mesh: Mesh) -> bool:
    """Whether every device holds the whole model."""
    return mesh.shape["fsdp"] == mesh.shape["tensor"] == 1


def path_name(path: tuple) -> str:
    """`h/0/attn/c_attn/kernel` for a pytree path."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def partition_spec(path: str) -> P:
    """The PartitionSpec of the array with this path."""
    return next((spec for pattern, spec in RULES if re.search(pattern, path)), P())


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf. Raises UserError where a dimension cannot be split evenly."""

    def sharding(path, leaf) -> NamedSharding:
        name = path_name(path)
        spec = partition_spec(name)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"{name} of shape {leaf.shape} cannot be split: {size} / mesh_{axis}={mesh.shape[axis]} leaves "
                    f"{size % mesh.shape[axis]} over; choose a mesh_{axis} that divides {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def configure_jax() -> None:
    """Sets what must be set before JAX looks for devices: compiler flags and the cache of compiled programs."""
    flags = os.environ.get("XLA_FLAGS", "")
    ours = [f for f in XLA_GPU_FLAGS if f.partition("=")[0] not in flags] if has_nvidia_gpu() else []
    os.environ["XLA_FLAGS"] = " ".join([flags, *ours]).strip()
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache, "jaxgpt", "xla")))


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA driver, found out without starting JAX's backends."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()
