"""Each kernel against its plain twin (interpreted, so on any machine) and both against float64 numpy or torch."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxgpt.ops.cross_entropy import linear_cross_entropy
from jaxgpt.ops.gelu import gelu
from jaxgpt.ops.layer_norm import add_layer_norm

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
dtypes = st.sampled_from(sorted(TOLERANCE))
few = settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])  # each example compiles


def normal(seed: int, *shape: int, dtype: str = "float32", std: float = 1.0) -> jax.Array:
    return (np.random.default_rng(seed).normal(size=shape) * std).astype(dtype) + jnp.zeros((), dtype)


def double(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x, np.float64), requires_grad=True)


def assert_close(got, want, dtype, scale: float = 1.0):
    """Within a few roundings of `dtype`, relative to the largest element (or to 0.1, where that is larger)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= scale * TOLERANCE[str(dtype)] * max(np.abs(want).max(), 0.1)


@given(
    m=st.integers(1, 9),
    c=st.integers(1, 40),
    vocab_size=st.integers(1, 700),
    padding=st.integers(0, 130),
    chunked=st.booleans(),
    dtype=dtypes,
    kernel=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@few
def test_cross_entropy_against_torch(m, c, vocab_size, padding, chunked, dtype, kernel, seed):
    x, w = normal(seed, m, c, dtype=dtype), normal(seed + 1, vocab_size + padding, c)
    targets = jnp.asarray(np.random.default_rng(seed).integers(vocab_size, size=m, dtype=np.int32))
    op = functools.partial(linear_cross_entropy, vocab_size=vocab_size, chunks=m if chunked else 1, kernel=kernel)
    loss, (dx, dw) = jax.jit(jax.value_and_grad(lambda x, w: 3 * op(x, w, targets), (0, 1)))(x, w)
    tx, tw = double(x), double(w.astype(dtype))
    want = torch.nn.functional.cross_entropy(tx @ tw[:vocab_size].T, torch.tensor(np.asarray(targets, np.int64)))
    (3 * want).backward()
    logits_error = 1 if dtype == "float32" else 4  # logits are rounded to dtype
    assert_close(loss, 3 * want.detach(), dtype, logits_error)
    assert_close(jax.jit(op)(x, w, targets), want.detach(), dtype, logits_error)
    assert loss.dtype == dw.dtype == jnp.float32 and dx.dtype == dtype
    assert_close(dx, tx.grad, dtype, 2 * logits_error)
    assert_close(dw, tw.grad, dtype, 2 * logits_error)
    assert not dw[vocab_size:].any()


@pytest.mark.parametrize("kernel", [False, True])
def test_cross_entropy_of_large_logits_is_finite(kernel):
    x, w = jnp.array([[300.0], [-300.0]]), jnp.array([[1.0], [-1.0], [1e6]])
    loss, grad = jax.value_and_grad(linear_cross_entropy)(x, w, jnp.array([0, 0]), vocab_size=2, kernel=kernel)
    assert loss == 300.0 and np.isfinite(grad).all()


@given(
    m=st.integers(1, 3),
    c=st.integers(1, 90),
    with_delta=st.booleans(),
    with_bias=st.booleans(),
    dtype=dtypes,
    kernel=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@few
def test_add_layer_norm_against_torch(m, c, with_delta, with_bias, dtype, kernel, seed):
    m, c = 4 * m, 7 * c
    x, delta, dy, dr = (normal(seed + i, m, c, dtype=dtype) for i in range(4))
    delta = delta if with_delta else None
    scale, bias = normal(seed, c), normal(seed + 5, c) if with_bias else None
    outs, vjp = jax.vjp(functools.partial(add_layer_norm, kernel=kernel), x, delta, scale, bias)
    grads = vjp((dr, dy))
    tx, ts, tb = double(x), double(scale), double(np.zeros(c) if bias is None else bias)
    residual = double(np.asarray(outs[0], np.float64))  # the sum as rounded
    if with_delta:
        assert_close(outs[0], (tx + double(delta)).detach(), dtype)
    else:
        assert (outs[0] == x).all()
    normed = torch.nn.functional.layer_norm(residual, (c,), ts, tb, 1e-5)
    ((normed * double(dy).detach()).sum() + (residual * double(dr).detach()).sum()).backward()
    small_variance = 1 + 1 / float(residual.detach().var(1, unbiased=False).min() + 1e-5)
    assert_close(outs[1], normed.detach(), dtype, small_variance)
    assert_close(grads[0], residual.grad, dtype, 2 * small_variance)
    assert (grads[1] is None) == (delta is None) and (delta is None or (grads[1] == grads[0]).all())
    assert_close(grads[2], ts.grad, "float32", 4 * small_variance)
    assert bias is None or np.allclose(grads[3], tb.grad, atol=1e-4)
    assert [o.dtype for o in outs] == [dtype, dtype] and grads[0].dtype == dtype and grads[2].dtype == jnp.float32


def test_add_layer_norm_gradient_sums_over_many_rows():
    """More rows than one round of programs holds, not a multiple of what a program takes."""
    m, c = 4 * 512 * 2 + 4, 8
    x, dy = normal(0, m, c), normal(1, m, c)

    def gradients(kernel):
        vjp = jax.vjp(functools.partial(add_layer_norm, kernel=kernel), x, None, jnp.ones(c), None)[1]
        return vjp((jnp.zeros((m, c)), dy))

    got, want = (jax.jit(gradients, static_argnums=0)(kernel) for kernel in (True, False))
    assert_close(got[2], want[2], "float32", 4)
    assert_close(got[0], want[0], "float32")


@given(
    size=st.integers(1, 9000),
    dtype=dtypes,
    kernel=st.booleans(),
    std=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 2**32 - 1),
)
@few
def test_gelu_against_torch(size, dtype, kernel, std, seed):
    h, dy = normal(seed, size, dtype=dtype, std=std), normal(seed + 1, size, dtype=dtype)
    y, vjp = jax.vjp(functools.partial(gelu, kernel=kernel), h)
    th = double(h)
    want = torch.nn.functional.gelu(th, approximate="tanh")
    want.backward(double(dy).detach())
    assert y.dtype == vjp(dy)[0].dtype == dtype
    assert_close(y, want.detach(), dtype, 0.5)
    assert_close(vjp(dy)[0], th.grad, dtype, 0.5)


@pytest.mark.parametrize("kernel", [False, True])
def test_gelu_at_the_far_ends(kernel):
    value, slope = jax.vmap(jax.value_and_grad(lambda h: gelu(h[None], kernel=kernel)[0]))(jnp.array([-1e4, 0.0, 1e4]))
    assert value.tolist() == [0.0, 0.0, 1e4] and slope.tolist() == [0.0, 0.5, 1.0]


def on_cuda(f, *shapes_and_dtypes):
    """Lowers f for an NVIDIA GPU, which none need be there for: what Pallas cannot translate fails here."""
    args = [jax.ShapeDtypeStruct(*a) for a in shapes_and_dtypes]
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H100", 132, "gpu"))
    with warnings.catch_warnings(), jax.sharding.use_abstract_mesh(mesh):
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("vocab_size", "padded"), [(65, 128), (50257, 50304)])
def test_cross_entropy_lowers_for_cuda(dtype, vocab_size, padded):
    op = functools.partial(linear_cross_entropy, vocab_size=vocab_size, kernel=True)
    shapes = ((32, 64), dtype), ((padded, 64), jnp.float32), ((32,), jnp.int32)
    on_cuda(op, *shapes)
    on_cuda(jax.grad(op, (0, 1)), *shapes)


@pytest.mark.parametrize("c", [384, 768, 1600])
@pytest.mark.parametrize("bias", [False, True])
def test_add_layer_norm_lowers_for_cuda(c, bias):
    def f(x, delta, scale):
        op = functools.partial(add_layer_norm, kernel=True)
        out, vjp = jax.vjp(op, x, delta, scale, scale if bias else None)
        return out, vjp(out)

    on_cuda(f, ((64, c), jnp.bfloat16), ((64, c), jnp.bfloat16), ((c,), jnp.float32))


def test_gelu_lowers_for_cuda():
    on_cuda(jax.vmap(jax.grad(lambda h: gelu(h, kernel=True).sum())), ((64, 3072), jnp.bfloat16))
