"""Devices: the mesh, which array lies where, and what devices send each other in a step.

A step is written for one device: its rows of the batch, its part of the parameters (`device_map`). Over `data` devices
hold the same parameters and average their gradients once an optimizer step. Over `fsdp` each holds a part, fetches the
others' once an optimizer step and gets its own part of the summed gradients; of tables that rows are looked up in they
send each other those rows. Over `tensor` the compiler splits each layer, following how its parameters lie.
"""

import contextlib
import ctypes
import importlib
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxgpt import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # rows of a batch are split over both

# Compiler flags for NVIDIA GPUs; docs/performance.md has what each gained
XLA_GPU_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false",  # cuBLAS for all matrix products
    "--xla_gpu_dot_merger_threshold_mb=0",  # products of queries, keys, values stay apart: slicing a merged one copies
    # gradients sent at once when they are all there, parameters fetched at once before the forward pass: what is sent
    # beside products takes their multiprocessors and slows them down by more
    *(f"--xla_gpu_{kind}_combine_threshold_bytes={1 << 32}" for kind in ("all_reduce", "reduce_scatter", "all_gather")),
    "--xla_disable_hlo_passes=all-reduce-contiguous",  # it copies gradients into one array and out of it
)

# JAX's default allocator takes 75% of a card in one piece, in which GPT-2 XL's step at 16 × 1024 then lacks one hole of
# 40 GiB. The stream-ordered one maps memory where it is needed: docs/performance.md
GPU_FRACTION = 0.95
GPU_MEMORY = {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async", "XLA_CLIENT_MEM_FRACTION": str(GPU_FRACTION)}
MEM_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
GPU_MEMORY_OF_USER = {*GPU_MEMORY, *MEM_FRACTIONS, "XLA_PYTHON_CLIENT_PREALLOCATE"}


# Settings of JAX, and their values, that turn what is done here into an error: keys as Flax's Rngs use them, a program
# compiled twice (the bytes differ), a batch sent to the devices, a function mapped over Rngs
FORBIDDING = {
    "jax_debug_key_reuse": (True,),
    "jax_compilation_cache_check_contents": (True,),
    "jax_transfer_guard": ("disallow", "disallow_explicit"),
    **{f"jax_error_checking_behavior_{kind}": ("raise",) for kind in ("nan", "divide", "oob")},
}


def configure_jax() -> None:
    """Sets what must be set before JAX looks for devices: compiler flags and the cache of compiled programs.

    Raises UserError on a fraction of a GPU's memory, in the user's own variables, that there is not.
    """
    for name in MEM_FRACTIONS:
        if not is_fraction(os.environ.get(name, "1")):
            raise UserError(f"{name}={os.environ[name]} must be a part of a GPU's memory: above 0 and at most 1")
    for name, values in FORBIDDING.items():
        if (value := getattr(jax.config, name, None)) in values:
            raise UserError(f"{name.upper()}={value}: under it JAX refuses what is done here; unset it")
    flags = os.environ.get("XLA_FLAGS", "")
    ours = [f for f in XLA_GPU_FLAGS if f.partition("=")[0] not in flags] if has_nvidia_gpu() else []
    os.environ["XLA_FLAGS"] = " ".join([flags, *ours]).strip()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jaxgpt", "xla")
    except RuntimeError:  # no HOME, and no such user in the system's list: containers
        cache = Path(tempfile.gettempdir(), f"jaxgpt-{os.getuid()}", "xla")
    # small programs too: a run has a dozen, which take a second or two
    for key, value in (("jax_compilation_cache_dir", str(cache)), ("jax_persistent_cache_min_compile_time_secs", 0)):
        if key.upper() not in os.environ:
            jax.config.update(key, value)
    if has_nvidia_gpu():
        if not GPU_MEMORY_OF_USER & set(os.environ):  # else the user has decided
            os.environ.update(GPU_MEMORY)
    else:
        keep_freed_memory()


def begin_devices() -> None:
    """Has JAX look for GPUs in a thread, and imports meanwhile what kernels need: each takes some 0.3 s of a start.

    For a program that asks for devices next: what is wrong with them is said then. The thread goes on beside the
    tracing with a product of two matrices, for the first one waits for cuBLAS to be loaded.
    """
    if not has_nvidia_gpu():
        return

    def begin() -> None:
        with contextlib.suppress(Exception):
            x = jnp.zeros((64, 64), jnp.bfloat16)
            jax.block_until_ready(x @ x)

    threading.Thread(target=begin, daemon=True).start()
    with contextlib.suppress(ImportError):  # Pallas' Triton backend, too, is lowered with it
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def is_fraction(text: str) -> bool:
    """Whether the text is a number above 0 and at most 1."""
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def keep_freed_memory(size: int = 1 << 30) -> None:
    """Has glibc's malloc keep up to `size` freed bytes, in place of giving each large block back to the system.

    On CPUs a step frees its buffers at its end, and getting their pages again took 40% of a small model's step. Call it
    before there are other threads: they are to share one arena, as arenas of their own hold no large blocks. Nothing
    happens where the C library is another. Numbers from glibc's malloc.h.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform != "win32" else None
    if mallopt:
        for option, value in ((m_trim_threshold, size), (m_mmap_threshold, size), (m_arena_max, 1)):
            mallopt(option, value)


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA driver, found out without starting JAX's backends."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


# --- the mesh ---


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh over all devices with axes data, fsdp, tensor; one size may be -1, which takes what is left."""
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    keys = ", ".join(f"mesh_{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1:
        raise UserError(f"{keys}: only one size may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        how = f", which are no multiple of {known}" if -1 in sizes else "; set one to -1 to take what is left"
        raise UserError(f"{keys} do not multiply to the {len(devices)} devices found{how}")
    # Auto: the compiler spreads shardings from the arrays to everything between them
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    # TPU slices are joined by the slow network alone: what crosses it is the mean over `data`
    count = len({getattr(device, "slice_index", None) for device in devices})
    if sizes[0] % count:
        raise UserError(f"mesh_data={sizes[0]} must be a multiple of the {count} slices, which only data is split over")
    inside, slices, split = (sizes[0] // count, *sizes[1:]), (count, 1, 1), {"allow_split_physical_axes": True}
    if count == 1:
        return Mesh(mesh_utils.create_device_mesh(inside, devices, **split), AXES, axis_types=types)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, slices, devices, **split), AXES, axis_types=types)


def configured_mesh(config: Any, devices: Sequence | None = None) -> Mesh:
    """The mesh of a config's keys mesh_AXIS (config.DeviceConfig). Raises UserError as make_mesh."""
    return make_mesh(**{axis: config[f"mesh_{axis}"] for axis in AXES}, devices=devices)


def data_shards(mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_heads(n_head: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError where attention heads do not divide over `tensor`."""
    if n_head % mesh.shape["tensor"]:
        fitting = ", ".join(str(n) for n in range(1, n_head + 1) if n_head % n == 0)
        raise UserError(
            f"n_head={n_head} heads cannot be split over mesh_tensor={mesh.shape['tensor']} devices, "
            f"{n_head % mesh.shape['tensor']} are left over; choose mesh_tensor of {fitting}"
        )


# --- where arrays lie ---


def path_name(path: tuple) -> str:
    """`h/0/attn/c_attn/kernel` for a pytree path."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def partition_spec(name: str, shape: tuple[int, ...], role: Any, mesh: Mesh | AbstractMesh) -> P:
    """How the parameter with this role (models.Role) is split: `tensor` where the role says, `fsdp`, for all but
    vectors, the first dimension that is free and divides evenly, or the last one if the role is not whole. Raises
    UserError where a dimension does not divide or is not there."""
    entries: list[str | None] = [None] * len(shape)
    for key in ("tensor", "stack"):
        if (i := getattr(role, key)) is not None and i not in range(-len(shape), len(shape)):
            raise UserError(f"ROLES: {role.pattern} has {key}={i!r}, no dimension of {name}, which has {len(shape)}")
    if role.tensor is not None and mesh.shape["tensor"] > 1:
        entries[role.tensor] = "tensor"
    if role.group != "vector" and mesh.shape["fsdp"] > 1:
        free = [i for i, entry in enumerate(entries) if entry is None][:: 1 if role.whole else -1]
        if not free:
            raise UserError(
                f"ROLES: {name} of shape {shape} has no dimension for mesh_fsdp to split; give it the group vector"
            )
        entries[next((i for i in free if shape[i] % mesh.shape["fsdp"] == 0), free[0])] = "fsdp"
    for size, axis in zip(shape, entries, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} of shape {shape} cannot be split: {size} / mesh_{axis}={mesh.shape[axis]} leaves "
                f"{size % mesh.shape[axis]} over; choose a mesh_{axis} that divides {size}"
            )
    return P(*entries)


def param_specs(params: Any, roles: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The PartitionSpec of every parameter; `roles` has their structure. Raises UserError, see partition_spec."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x, role: partition_spec(path_name(path), x.shape, role, mesh), params, roles
    )


def state_specs(state: Any, params: Any, roles: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The PartitionSpec of every array of a state that holds `params` and whatever the optimizer keeps.

    An array lies as the parameter does whose path its own ends in, if it has that shape, as an optimizer's moments do;
    all others are replicated.
    """
    specs = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(param_specs(params, roles, mesh)):
        specs[path_name(path)] = spec
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}

    def spec_of(path, x) -> P:
        names = path_name(path).split("/")
        endings = ("/".join(names[i:]) for i in range(len(names)))
        return next((specs[name] for name in endings if shapes.get(name) == x.shape), P())

    return jax.tree_util.tree_map_with_path(spec_of, state)


# --- what devices send each other ---


def device_map(f: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`f` run by every device on its part over data and fsdp. `tensor`, if it splits anything, is the compiler's."""
    axes = AXES if mesh.shape["tensor"] == 1 else BATCH_AXES
    in_specs, out_specs = jax.tree.map(lambda spec: _without("tensor", spec), (in_specs, out_specs))
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)


def with_whole_params(f: Callable, roles: Any, mesh: Mesh, dtype: str, in_spec: P, out_spec: P) -> Callable:
    """`f(params, rows)` run by every device on its own rows, with all parameters (over tensor: its part of them).

    They are in the dtypes that a step gives a module (Role.rounded).
    """

    def run(params, rows):
        specs = param_specs(params, roles, mesh)

        def local(params, rows):
            params = gather_params(params, roles, specs, mesh, dtype)
            return f(jax.tree.map(lambda role, x: x.astype(dtype) if role.rounded else x, roles, params), rows)

        return device_map(local, mesh, (specs, in_spec), out_spec)(params, rows)

    return run


def gather_params(params: Any, roles: Any, specs: Any, mesh: Mesh, dtype: str) -> Any:
    """Within device_map: whole parameters from the shards over fsdp, gathered in `dtype`, the computation's.

    Matrices stay in it; embeddings and heads return to float32, so that their gradients add up in it. What stays in
    float32 by its role is gathered in it, and what is not to be whole stays the device's part. For the gradients see
    mean_gradients.
    """

    def gather(spec: P, role: Any, x):
        if "fsdp" not in spec or _in_parts(spec, role, mesh):
            return x
        sent = x if role.float32 else x.astype(dtype)
        found = jax.lax.all_gather(sent, "fsdp", axis=spec.index("fsdp"), tiled=True)
        return found if role.rounded else found.astype(x.dtype)

    def gather_all(params):
        return jax.tree.map(gather, specs, roles, params)

    return params if mesh.shape["fsdp"] == 1 else _on_parts_over_tensor(gather_all, specs, mesh)(params)


def mean_gradients(gradients: Any, roles: Any, specs: Any, mesh: Mesh) -> Any:
    """Within device_map: the mean over all rows of gradients of what gather_params gave, of each the device's part."""

    def mean(spec: P, role: Any, g):
        if "fsdp" not in spec:
            return mean_over(g, mesh, *BATCH_AXES)
        if not _in_parts(spec, role, mesh):  # else it has been added up over the devices on its way back
            g = jax.lax.psum_scatter(g, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
        return mean_over(g / mesh.shape["fsdp"], mesh, "data")

    return _on_parts_over_tensor(partial(jax.tree.map, mean, specs, roles), specs, mesh)(gradients)


def _in_parts(spec: P, role: Any, mesh: Mesh) -> bool:
    """Whether a module is given the device's part over fsdp; where `tensor` splits it too, it is given all of that."""
    return not role.whole and spec[-1] == "fsdp" and mesh.shape["tensor"] == 1


def rows(
    tables: Sequence[Float[Array, "V P"]], ids: Int[Array, " M"], features: int, dtype: Any
) -> list[Float[Array, "M C"]]:
    """Each table's rows of these numbers, in `dtype`.

    Where a table is the device's part of `features` (Role.whole), each device looks up all devices' rows in its part
    and they exchange them: for a batch's tokens a small part of what the tables are, and so are the gradients, which
    add up in the tables' dtype.
    """
    parts = features // tables[0].shape[1]
    if parts == 1:
        return [table[ids].astype(dtype) for table in tables]
    ids = jax.lax.all_gather(ids, "fsdp", tiled=True)
    exchange = partial(jax.lax.all_to_all, axis_name="fsdp", split_axis=0, concat_axis=1, tiled=True)
    return [exchange(table[ids].astype(dtype)) for table in tables]


def whole(table: Float[Array, "V P"], features: int, dtype: Any) -> Float[Array, "V C"]:
    """All features of a table, fetched in `dtype`, where it is the device's part of them (Role.whole)."""
    return table if table.shape[1] == features else _fetched(table, jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fetched(part, dtype):
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=1, tiled=True).astype(part.dtype)


# gradients are added up in the table's own dtype, not in the one it was fetched in
_fetched.defvjp(
    lambda part, dtype: (_fetched(part, dtype), None),
    lambda dtype, _, g: (jax.lax.psum_scatter(g, "fsdp", scatter_dimension=1, tiled=True),),
)


def mean_over(x: Any, mesh: Mesh, *axes: str) -> Any:
    """Within device_map: the mean of each array over these axes."""
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return jax.lax.pmean(x, axes) if axes else x


def tensor_parts() -> int:
    """Over how many devices of `tensor` what is traced now is split by the compiler: 1 within `on_parts`, too."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if "tensor" in mesh.manual_axes else mesh.shape.get("tensor", 1)


def splits(*sizes: int) -> bool:
    """Whether `tensor` splits what is traced now, and each of these sizes evenly."""
    parts = tensor_parts()
    return parts > 1 and not any(size % parts for size in sizes)


def on_parts(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`f` that each device over `tensor` runs on its part of the arrays: what f sends is then f's own."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names={"tensor"}, check_vma=False)


def on_all_parts(x: Array) -> Array:
    """x whole on each device over `tensor`, where the compiler would split it."""
    return x if tensor_parts() == 1 else jax.lax.with_sharding_constraint(x, P())


def split_heads(f: Callable[..., Float[Array, "B T N H"]]) -> Callable[..., Float[Array, "B T N H"]]:
    """`f` that each device runs on its own heads of arrays (B, T, N, H) and on whole arrays (B, T) or None, for an `f`
    that the compiler cannot split."""
    if tensor_parts() == 1:
        return f
    spec = P(None, None, "tensor")
    return lambda *arrays: on_parts(f, jax.tree.map(lambda x: spec if x.ndim == 4 else P(), arrays), spec)(*arrays)


def _on_parts_over_tensor(f: Callable, specs: Any, mesh: Mesh) -> Callable:
    """`f` of a tree split like `specs`, run on tensor's parts as they lie: the compiler would gather them first."""
    if mesh.shape["tensor"] == 1:
        return f
    specs = jax.tree.map(lambda spec: _without("fsdp", spec), specs)
    return on_parts(f, (specs,), specs)


def _without(axis: str, spec: P) -> P:
    return P(*(None if entry == axis else entry for entry in spec))
