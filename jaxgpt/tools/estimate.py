"""Bytes that a training step takes on a device, by arithmetic: for devices whose compiler is not at hand."""

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxgpt.config import Parts
from jaxgpt.sharding import data_shards
from jaxgpt.step import carries_rounded


def step_bytes(parts: Parts, mesh: Mesh | AbstractMesh, n_params: int) -> float:
    """About what a step needs on a device besides what is saved, with kernels and attention that keep no scores.

    A token leaves 16 vectors of n_embd for the backward pass in each block: 2 inputs and 2 outputs of
    normalization, q, k, v, the output of attention, 4 + 4 around GELU; with remat 2 and one block's 16; and its
    logits. Besides: the parameters in the computation's dtype (with fsdp the device's part of them too, which the
    state carries: TrainState.rounded) and, with micro-steps, a float32 sum of gradients. For GPT-2 124M at 64
    sequences and 1.5B at 16 this gives 24.4 and 42.0 GiB, where XLA's memory analysis for an H200 says 25.6 and
    42.5.
    """
    c, size, tensor = parts.model, jnp.dtype(parts.model.dtype).itemsize, mesh.shape["tensor"]
    block = (6 + 10 / tensor) * c.n_embd  # normalization and the residual stream are whole on every device of tensor
    kept = c.n_layer * block if c.remat == "none" else 2 * c.n_layer * c.n_embd + block
    activations = parts.data.batch_size * c.block_size * size * (kept + c.padded_vocab_size / tensor)
    sums = 4 if parts.data.gradient_accumulation_steps > data_shards(mesh) else 0
    fsdp = mesh.shape["fsdp"]
    carried = size / fsdp if fsdp > 1 and carries_rounded(parts) else 0
    return activations + (size + carried + sums) * n_params / tensor
