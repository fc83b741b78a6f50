"""Attention with dropout: the fused kernel (interpreted) and its plain twin against float64 torch, and their masks."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from test_ops import assert_close, double, dtypes, normal, on_cuda

from jaxgpt import UserError
from jaxgpt.ops.attention import attention, cached_attention
from jaxgpt.ops.dropout import dropout, keep_mask

NO_DROPOUT = 1e-12  # rounds to none, but takes the same way through the code


def op(rate, kernel, seed):
    return functools.partial(attention, implementation="xla", rate=rate, seed=jnp.uint32(seed), kernels=kernel)


def torch_attention(q, k, v, keep, rate):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1) * double(keep).detach() / (1 - rate)
    return (weights @ v).transpose(1, 2)


@given(
    batch=st.integers(1, 3),
    blocks=st.integers(1, 2),
    heads=st.integers(1, 3),
    size=st.sampled_from([16, 32]),
    rate=st.sampled_from([NO_DROPOUT, 0.2, 0.7]),
    std=st.sampled_from([1.0, 4.0]),
    dtype=dtypes,
    kernel=st.booleans(),
    seed=st.integers(0, 2**32 - 4),
)
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])  # each example compiles
def test_attention_against_torch(batch, blocks, heads, size, rate, std, dtype, kernel, seed):
    shape = batch, 64 * blocks, heads, size
    q, k, v, dy = (normal(seed + i, *shape, dtype=dtype, std=s) for i, s in enumerate((std, 1, 1, 1)))
    y, grads = jax.jit(lambda *args: (lambda y, vjp: (y, vjp(dy)))(*jax.vjp(op(rate, kernel, seed), *args)))(q, k, v)
    tq, tk, tv = double(q), double(k), double(v)
    keep = keep_mask((batch, heads, shape[1], shape[1]), rate, jnp.uint32(seed))
    want = torch_attention(tq, tk, tv, keep, rate)
    want.backward(double(dy).detach())
    assert_close(y, want.detach(), dtype, 2)
    for got, x in zip(grads, (tq, tk, tv), strict=True):
        assert got.dtype == dtype
        assert_close(got, x.grad, dtype, 4 * std)


def test_attention_kernel_equals_its_twin():
    """In float32 to a few roundings: no weight is dropped by one and kept by the other."""
    q, k, v, dy = (normal(i, 3, 256, 2, 16) for i in range(4))
    (y, vjp), (twin_y, twin_vjp) = (jax.vjp(op(0.2, kernel, 2**32 - 1), q, k, v) for kernel in (True, False))
    for got, want in zip((y, *vjp(dy)), (twin_y, *twin_vjp(dy)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 65, 1, 16), (1, 64, 1, 24), (1, 1088, 1, 16)])
def test_other_shapes_take_the_twin(shape):
    q, k, v = (normal(i, *shape) for i in range(3))
    assert (op(0.2, True, 5)(q, k, v) == op(0.2, False, 5)(q, k, v)).all()


def test_documents_take_the_twin():
    q, k, v = (normal(i, 1, 64, 1, 16) for i in range(3))
    docs = jnp.arange(64)[None] // 10
    got, want = (op(0.2, kernel, 5)(q, k, v, docs=docs) for kernel in (True, False))
    assert (got == want).all()


def test_a_cache_of_other_heads_is_said():
    """A user's model with fewer heads of keys, whose empty_cache is the default: annotations are unchecked there."""
    q, k, cache = (normal(i, 1, 1, heads, 16) for i, heads in enumerate((4, 2, 4)))
    message = r"keys have \(heads, size\) \(2, 16\) and the cache \(4, 16\); make the model's empty_cache like its keys"
    with pytest.raises(UserError, match=message):
        inspect.unwrap(cached_attention)(q, k, k, (cache, cache, jnp.int32(0)))


def test_attention_kernel_in_a_shard_map(mesh):
    """Each device's rows, with its own seed, as if it were alone."""
    q, k, v = (normal(i, 8, 64, 1, 16) for i in range(3))

    def local(q, k, v):
        return op(0.2, True, 0)(q, k, v, seed=jax.lax.axis_index("data").astype(jnp.uint32))

    loss = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    y, vjp = jax.vjp(jax.jit(loss), q, k, v)
    for i, got in enumerate(zip(y, *vjp(y), strict=True)):
        row = [x[i : i + 1] for x in (q, k, v)]
        want, want_vjp = jax.vjp(op(0.2, False, i), *row)
        for a, b in zip(got, (want, *want_vjp(want)), strict=True):
            np.testing.assert_allclose(a, b[0], atol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 64), ("bfloat16", 128), ("float16", 16), ("float32", 64)])
def test_attention_lowers_for_cuda(dtype, size):
    def f(q, k, v, seed):
        dropping = functools.partial(attention, implementation="cudnn", rate=0.2, seed=seed, kernels=True)
        y, vjp = jax.vjp(dropping, q, k, v)
        return vjp(y)

    shape = (2, 128, 3, size), dtype
    on_cuda(f, shape, shape, shape, ((), jnp.uint32))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_dropout_gradient_redraws_the_mask(rate):
    """It is the forward pass' own, and nothing of the mask's size is kept between the two."""
    x, dy, seed = normal(0, 30, 7), normal(1, 30, 7), jnp.uint32(9)
    y, vjp = jax.vjp(lambda x: dropout(x, rate, seed), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(vjp)) <= 1
    np.testing.assert_array_equal(jax.jit(vjp)(dy)[0], dropout(dy, rate, seed))
    assert ((vjp(dy)[0] == 0) == (y == 0)).all()
