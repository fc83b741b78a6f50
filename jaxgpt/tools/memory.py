"""Whether a compiled step fits its devices, and which settings would: by the compiler's own figures, before it runs."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt import UserError
from jaxgpt.config import Parts
from jaxgpt.models import abstract_params, count_params
from jaxgpt.sharding import data_shards
from jaxgpt.tools.estimate import step_bytes


def check_fits(compiled: Any, parts: Parts, mesh: Mesh, limit: int | None = None) -> None:
    """Raises UserError where a step needs more memory than a device has, naming settings for as many tokens that fit.

    compiled: the step. limit: bytes that arrays may take on a device; by default what the device's allocator says, and
    nothing is checked where it does not say, as on CPUs.
    """
    if limit is None:
        limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    figures = compiled.memory_analysis()
    if not limit or figures is None:
        return
    state = figures.argument_size_in_bytes + figures.output_size_in_bytes - figures.alias_size_in_bytes
    if (need := state + figures.temp_size_in_bytes) <= limit:
        return
    ways = settings_that_fit(parts, mesh, limit - state, figures.temp_size_in_bytes)
    raise UserError(
        f"out of memory: a step needs {need / 2**30:.1f} GiB and a device has {limit / 2**30:.1f}; "
        + (f"as many tokens fit with {', or '.join(ways)}" if ways else "it takes more devices: raise mesh_fsdp")
    )


def settings_that_fit(parts: Parts, mesh: Mesh, room: int, temporaries: int) -> list[str]:
    """Settings for as many tokens a step whose temporaries fit into `room` bytes, by scaling those of this step.

    Temporaries grow with the micro-batch, but for float32 sums of gradients, which accumulation adds; recomputing a
    block saves the part of them that `dryrun.step_bytes` counts.
    """
    data, shards = parts.data, data_shards(mesh)
    n_params = count_params(parts.model, abstract_params(parts.model), all=True)
    sums = 4 * n_params // mesh.shape["tensor"] if data.gradient_accumulation_steps == shards else 0
    remat = parts._replace(model=dataclasses.replace(parts.model, remat="block"))
    saved = step_bytes(remat, mesh, n_params) / step_bytes(parts, mesh, n_params)
    rows, ways = data.batch_size * data.gradient_accumulation_steps, []
    for size in range(data.batch_size - 1, 0, -1):
        if rows % (size * shards) == 0 and temporaries * size / data.batch_size + sums <= room:
            ways.append(f"batch_size={size} gradient_accumulation_steps={rows // size}")
            break
    if parts.model.remat == "none" and "remat" not in parts.model.LACKS and temporaries * saved <= room:
        ways.append("remat=block")
    if mesh.shape["fsdp"] == 1 < jax.device_count():
        ways.append(f"mesh_fsdp={jax.device_count()}, which splits the state as well")
    return ways
