"""Where a step's GPU time goes, by kind of kernel, beside the least work of each kind."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxgpt.config import Parts
from jaxgpt.metrics import peak_bytes, peak_flops
from jaxgpt.models import Params, count_params
from jaxgpt.optim import ADAMW_BYTES
from jaxgpt.sharding import data_shards

COLLECTIVES = r"nccl|all-?reduce|all-?gather|reduce-?scatter"
# First match in a kernel's name decides its kind
KINDS = (
    ("collectives", COLLECTIVES),
    ("attention", r"flash|fmha|sdpa|attention|cudnn"),
    ("matrix products", r"gemm|cublas|nvjet|cutlass|matmul|product|xmma|splitk"),
    ("loss", r"_row_kernel|loss"),
    ("normalization", r"norm"),
    ("optimizer", r"select|adam"),
    ("copies", r"memcpy|memset|copy|transpose"),
)


def least_work(parts: Parts, mesh: Mesh, params: Params) -> dict[str, tuple[float, str]]:
    """What a step must do on a device at least, by kind of kernel: FLOPs, or bytes of memory read and written.

    Products: 6 FLOPs a weight and token. Attention: 7·T²·C a layer and sequence, of which the causal mask leaves 2
    forward and 5 backward (FlashAttention-2, arXiv 2307.08691). Of bytes every array counts once: the logits read and
    their gradient written; 4 vectors of n_embd each way around a normalization and its residual.
    """
    model, tensor = parts.model, mesh.shape["tensor"]
    sequences = parts.data.batch_size * parts.data.gradient_accumulation_steps // data_shards(mesh)
    tokens, size, width = sequences * model.block_size, jnp.dtype(model.dtype).itemsize, model.n_embd
    weights, all_weights = count_params(model, params), count_params(model, params, all=True)
    return {
        "matrix products": (6 * tokens * weights / tensor, "FLOP"),
        "attention": (7 * tokens * model.block_size * width * model.n_layer / tensor, "FLOP"),
        "loss": (2 * tokens * model.padded_vocab_size * size / tensor, "byte"),
        "normalization": (8 * tokens * width * size * (2 * model.n_layer + 1), "byte"),
        "optimizer": (ADAMW_BYTES * all_weights / mesh.shape["fsdp"] / tensor, "byte"),
    }


def kernels(trace_dir: str) -> list[tuple[str, float, float]]:
    """Name, start and duration in ns of every kernel that the first device ran in a trace."""
    path = max(Path(trace_dir).rglob("*.xplane.pb"))
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    plane = next(p for p in planes if p.name.startswith("/device:"))
    streams = [line for line in plane.lines if line.name.startswith("Stream")]
    return [(event.name, event.start_ns, event.duration_ns) for line in streams for event in line.events]


def profile_table(trace_dir: str, steps: int, least: dict[str, tuple[float, str]]) -> str:
    """GPU time a step by kind of kernel, beside the least work and its time at data sheets' peaks; largest kernels."""
    events = kernels(trace_dir)

    def totals(name_of: Callable[[str], str]) -> list[tuple[str, float, int]]:
        """Names with ms and kernels a step, the largest first."""
        ms, count = defaultdict(float), Counter()
        for kernel, _, duration_ns in events:
            name = name_of(kernel)
            ms[name] += duration_ns / 1e6 / steps
            count[name] += 1
        ordered = sorted(ms.items(), key=lambda item: -item[1])
        return [(name, total, count[name] // steps) for name, total in ordered]

    def kind(kernel: str) -> str:
        return next((k for k, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "other elementwise")

    span = (max(start + ns for _, start, ns in events) - min(start for _, start, _ in events)) / 1e6 / steps
    rows = totals(kind)
    rows += [("idle", span - sum(ms for _, ms, _ in rows), 0), ("total", span, 0)]
    peaks = {"FLOP": peak_flops(jax.devices()[0]), "byte": peak_bytes(jax.devices()[0])}

    def floor(name: str) -> str:
        if name not in least:
            return ""
        work, unit = least[name]
        amount = f"{work / 1e12:>8.2f} TFLOP" if unit == "FLOP" else f"{work / 1e9:>8.2f} GB   "
        peak = peaks[unit]
        return amount + (f"{1e3 * work / peak:>10.3f} ms at {peak / 1e12:g} T{unit}/s" if peak else "")

    lines = [f"{name:<20}{ms:>10.3f} ms a step {count:>8} kernels{floor(name)}" for name, ms, count in rows]
    lines += [f"  {ms:>8.3f} ms {count:>5} × {name[:110]}" for name, ms, count in totals(str)[:30]]
    return "\n".join(lines)
