"""One matrix times several: the kernel of its gradient, interpreted, and what a model makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from test_matmul import assert_near, in_float64, interpreted
from test_ops import normal

from jaxgpt.ops import fan_out, hopper
from jaxgpt.ops.linear import Fast, linear


@interpreted
@pytest.mark.parametrize(
    ("m", "k", "n", "count", "dtype"),
    [
        (768, 64, 256, 3, "bfloat16"),  # one step of each product; three tiles for each of two programs
        (256, 320, 160, 2, "float16"),  # wide tiles; more steps than stages; no tile for one program
    ],
)
def test_kernel(m, k, n, count, dtype):
    xs, w = [normal(i, m, k, dtype=dtype) for i in range(count)], normal(9, n, count, k, dtype=dtype)
    with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
        got = fan_out.sum_of_products(xs, w)
    assert_near(got, sum(in_float64(x, w[:, i].T) for i, x in enumerate(xs)), dtype)


@interpreted
@pytest.mark.parametrize(
    ("m", "k", "n", "count", "dtype"),
    [
        (64, 192, 320, 3, "bfloat16"),  # one step; a last tile, and last chunks, that begin sooner; no chunk beside one
        (384, 128, 256, 1, "float16"),  # more steps than stages; no tile for one program
    ],
)
def test_kernel_of_the_weights(m, k, n, count, dtype):
    x, dys = normal(9, m, k, dtype=dtype), [normal(i, m, n, dtype=dtype) for i in range(count)]
    with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
        got = fan_out.weight_gradients(x, dys)
    for i, dy in enumerate(dys):
        assert_near(got[:, i], in_float64(x.T, dy), dtype)


def test_the_weights_have_a_kernel_where_products_one_by_one_leave_multiprocessors_idle(monkeypatch):
    monkeypatch.setattr(hopper, "count_programs", lambda: 132)
    for width, kernel in {768: False, 1024: False, 1280: False, 1536: True, 1600: True, 2048: False}.items():
        assert fan_out.supports_weights(16384, (width, 3, width)) == kernel
    assert not fan_out.supports_weights(16384, (2624, 3, 2624))  # as many rounds as apart
    assert not fan_out.supports_weights(16384 + 32, (1600, 3, 1600))


def test_where_there_is_a_kernel(monkeypatch):
    assert not fan_out.supports(1024, 768, 768, "bfloat16")  # on a CPU
    monkeypatch.setattr(hopper, "on_hopper", lambda: True)
    assert fan_out.supports(1024, 768, 768, "bfloat16")
    assert fan_out.supports(1024, 1600, 1600, "float16")
    for m, k, n, dtype in [
        (1000, 768, 768, "bfloat16"), (1024, 700, 768, "bfloat16"), (1024, 768, 700, "bfloat16"),
        (1024, 768, 768, "float32"),
    ]:  # fmt: skip
        assert not fan_out.supports(m, k, n, dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # the kernel has no float32
def test_queries_keys_and_values_with_the_kernel_are_those_without(bias, weights, dtype, monkeypatch):
    calls = []

    def sum_of_products(xs, w):
        calls.append(len(xs))
        total = jnp.zeros(())
        for i, x in enumerate(xs):
            total = total + jnp.matmul(x, w[:, i].T, preferred_element_type=jnp.float32)
        return total.astype(w.dtype)

    def weight_gradients(x, dys):
        calls.append(-len(dys))
        return jnp.stack([jnp.matmul(x.T, dy, preferred_element_type=jnp.float32) for dy in dys], 1).astype(x.dtype)

    monkeypatch.setattr(hopper, "on_hopper", lambda: True)
    monkeypatch.setattr(fan_out, "sum_of_products", sum_of_products)
    monkeypatch.setattr(fan_out, "supports_weights", lambda *shape: weights)
    monkeypatch.setattr(fan_out, "weight_gradients", weight_gradients)
    x, w, b = normal(0, 256, 128, dtype=dtype), normal(1, 128, 3, 64), normal(2, 3, 64) if bias else None

    def with_gradients(fast):
        ys, vjp = jax.vjp(lambda x, w, b: linear(x, w, b, fast=fast), x, w, b)
        return ys, vjp(tuple(normal(3 + i, *y.shape, dtype=dtype) for i, y in enumerate(ys)))

    got = with_gradients(Fast(kernels=True))
    assert sorted(calls) == ([] if dtype == "float32" else [-3, 3] if weights else [3])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(with_gradients(Fast())), strict=True):
        assert_near(a, b, b.dtype, terms=2)
        assert np.abs(np.asarray(b, np.float64)).max() > 0
