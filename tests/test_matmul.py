"""Products that end in an activation or its derivative: the kernel, interpreted, and what a model makes of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from test_ops import normal

from jaxgpt.ops import hopper, matmul
from jaxgpt.ops.activation import ACTIVATIONS, activate
from jaxgpt.ops.dropout import dropout
from jaxgpt.ops.linear import Fast, linear
from jaxgpt.ops.norm import Norm, add_norm
from jaxgpt.ops.paths import watch


def in_float64(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


def assert_near(got, want, dtype, terms=1.0):
    """Within half a unit in the last place, and float32's error of the sum, of the largest."""
    want = np.asarray(want, np.float64)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=terms * np.abs(want).max() * 2**-8)


# JAX's interpreter before 0.11 knows no transposed operand
interpreted = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11")


@interpreted
@pytest.mark.parametrize(
    ("m", "k", "n", "activation", "dtype"),
    [
        (384, 64, 256, "relu2", "bfloat16"),  # one step; three tiles for each of two programs
        (128, 448, 128, "gelu", "float16"),  # more steps than stages; no tile for one program
        (128, 320, 320, "gelu", "bfloat16"),  # wide tiles
    ],
)
def test_kernels(m, k, n, activation, dtype):
    x, w, h = normal(0, m, k, dtype=dtype), normal(1, k, n, dtype=dtype), normal(2, m, n, dtype=dtype)
    with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
        before, value = matmul.activate_in_product(x, w, activation)
        gradient = matmul.gradient_in_product(x, w.T, h, activation)
    total, pointwise = in_float64(x, w), ACTIVATIONS[activation]
    assert_near(before, total, dtype)
    assert_near(value, pointwise.value(before.astype(jnp.float32)), dtype)
    assert_near(gradient, pointwise.gradient(h.astype(jnp.float32), jnp.asarray(total, jnp.float32)), dtype)


def test_where_there_is_a_kernel(monkeypatch):
    assert not matmul.supports(1024, 768, 3072, "bfloat16")  # on a CPU
    monkeypatch.setattr(hopper, "on_hopper", lambda: True)
    assert matmul.supports(1024, 768, 3072, "bfloat16")
    for m, k, n, dtype in [
        (1000, 768, 3072, "bfloat16"), (1024, 700, 3072, "bfloat16"), (1024, 768, 3000, "bfloat16"),
        (1024, 2048, 8192, "bfloat16"), (1024, 768, 3072, "float32"),
    ]:  # fmt: skip
        assert not matmul.supports(m, k, n, dtype)
    assert matmul.supports(1024, 1600, 6400, "bfloat16")  # in wide tiles


@pytest.fixture
def plain_kernels(monkeypatch):
    """The kernels' part played by what they compute, so that a model takes them on a CPU."""

    def activate_in_product(x, w, activation):
        return x @ w, activate(x @ w, activation)

    def gradient_in_product(dy, w, before, activation):
        return matmul._gradient(before, dy @ w.T, activation)

    monkeypatch.setattr(hopper, "on_hopper", lambda: True)
    monkeypatch.setattr(matmul, "activate_in_product", activate_in_product)
    monkeypatch.setattr(matmul, "gradient_in_product", gradient_in_product)


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("narrow", [False, True])  # a second product that the kernel does not cover
def test_an_mlp_with_the_kernels_is_one_without(activation, bias, narrow, plain_kernels):
    x, w, w2 = normal(0, 128, 64, dtype="bfloat16"), normal(1, 64, 128), normal(2, 128, 40 if narrow else 64)
    b = normal(3, 128) if bias else None

    def mlp(fast, x, w, w2, b):
        return linear(linear(x, w, b, activation=activation, to_linear=True, fast=fast), w2, fast=fast)

    def with_gradients(fast):
        y, vjp = jax.vjp(lambda *inputs: mlp(fast, *inputs), x, w, w2, b)
        return y, vjp(normal(4, *y.shape, dtype="bfloat16"))

    with watch() as taken:
        got = with_gradients(Fast(kernels=True))
    assert taken["activation"] == {"kernel"}
    want = with_gradients(Fast())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_near(a, b, b.dtype, terms=2)


def gradient_of(use, x, w, fast, **options):
    """Of the sum of use(an activated product)."""

    def run(w):
        results = use(linear(x, w, activation="gelu", fast=fast, **options))
        return sum(jnp.sum(part.astype(jnp.float32)) for part in jax.tree.leaves(results))

    return jax.value_and_grad(run)(w)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda y: y * y,
        lambda y: dropout(y, 0.3, jnp.uint32(1)),
        lambda y: add_norm(y, y * 2, Norm("rms")),
        lambda y: jax.tree.map(jnp.tanh, y),
        lambda y: linear(y, jnp.ones((128, 16)), fast=Fast(kernels=True)),
    ],
)
def test_an_activation_is_an_array_unless_it_goes_to_linear(use, fp8, plain_kernels):
    x, w = normal(0, 128, 64, dtype="bfloat16"), normal(1, 64, 128) / 8
    got, want = (gradient_of(use, x, w, Fast(kernels=kernels, fp8=fp8 and kernels)) for kernels in (True, False))
    if fp8:
        assert np.linalg.norm(got[1] - want[1]) < 0.15 * np.linalg.norm(want[1])
    else:  # in bfloat16 GELU itself is coarse on a CPU, in the form that cuBLAS knows
        assert_near(got[1], want[1], "float32", terms=4)


@pytest.mark.parametrize("options", [{"fast": Fast(fp8=True)}, {"columns": 10}, {"dtype": jnp.float32}], ids=str)
def test_a_product_that_the_kernel_has_not_takes_the_array(options, plain_kernels):
    x, w, w2 = normal(0, 128, 64, dtype="bfloat16"), normal(1, 64, 128), normal(2, 128, 16)
    got = gradient_of(lambda y: linear(y, w2, **options), x, w, Fast(kernels=True), to_linear=True)
    want = gradient_of(lambda y: linear(y, w2, **options), x, w, Fast())
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, b.dtype, terms=4)


def test_an_activated_matrix_is_refused_where_an_array_is_meant(plain_kernels):
    x, w = normal(0, 128, 64, dtype="bfloat16"), normal(1, 64, 128)
    y: Any = linear(x, w, activation="gelu", to_linear=True, fast=Fast(kernels=True))
    assert type(y).__name__ == "Activated"
    with pytest.raises(TypeError):
        jnp.sum(y)
    with pytest.raises((TypeError, AttributeError)):
        dropout(y, 0.3, jnp.uint32(1))
