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

from jaxgpt.ops.activation import ACTIVATIONS, activate
from jaxgpt.ops.cross_entropy import linear_cross_entropy, sampled_cross_entropy
from jaxgpt.ops.norm import Norm, add_norm

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
    softcap=st.sampled_from([0.0, 5.0]),
    dtype=dtypes,
    kernels=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@few
def test_cross_entropy_against_torch(m, c, vocab_size, padding, chunked, softcap, dtype, kernels, seed):
    x, w = normal(seed, m, c, dtype=dtype), normal(seed + 1, vocab_size + padding, c)
    targets = jnp.asarray(np.random.default_rng(seed).integers(vocab_size, size=m, dtype=np.int32))
    options = {"vocab_size": vocab_size, "softcap": softcap, "chunks": m if chunked else 1, "kernels": kernels}
    op = functools.partial(linear_cross_entropy, **options)
    loss, (dx, dw) = jax.jit(jax.value_and_grad(lambda x, w: 3 * op(x, w, targets), (0, 1)))(x, w)
    tx, tw = double(x), double(w.astype(dtype))
    logits = tx @ tw[:vocab_size].T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(np.asarray(targets, np.int64)))
    (3 * want).backward()
    logits_error = 1 if dtype == "float32" else 4  # logits are rounded to dtype
    assert_close(loss, 3 * want.detach(), dtype, logits_error)
    assert_close(jax.jit(op)(x, w, targets), want.detach(), dtype, logits_error)
    assert loss.dtype == dw.dtype == jnp.float32 and dx.dtype == dtype
    assert_close(dx, tx.grad, dtype, 2 * logits_error)
    assert_close(dw, tw.grad, dtype, 2 * logits_error)
    assert not dw[vocab_size:].any()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(("softcap", "want"), [(0.0, 300.0), (30.0, 30.0), (43.0, 43.0)])
def test_cross_entropy_of_large_logits_is_finite(kernels, softcap, want):
    x, w = jnp.array([[300.0], [-300.0]]), jnp.array([[1.0], [-1.0], [1e6]])
    op = functools.partial(linear_cross_entropy, vocab_size=2, softcap=softcap, kernels=kernels)
    loss, grad = jax.value_and_grad(op)(x, w, jnp.array([0, 0]))
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_rows_that_stand_for_several_tokens(kernels, softcap):
    """The last three count four times: as if they were there four times. A target of -1 adds nothing."""
    x, w = normal(0, 5, 8), normal(1, 300, 8)
    targets = jnp.array([3, 296, -1, 0, -1])
    options = {"softcap": softcap, "kernels": kernels}
    known = jnp.array([0, 1, 3])

    def found(x, w):
        return linear_cross_entropy(x, w, targets, vocab_size=300, rare=jnp.array([297.0, 2.0]), **options)

    def want(x, w):
        often = jnp.concatenate([w[:297], jnp.repeat(w[297:], 4, axis=0)])
        return 3 / 5 * linear_cross_entropy(x[known], often, targets[known], vocab_size=309, softcap=softcap)

    for a, b in zip(*(jax.tree.leaves(jax.value_and_grad(f, (0, 1))(x, w)) for f in (found, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_sample_of_the_vocabulary(kernels):
    """All of it gives the loss itself; of less the softmax's sum is right in the mean over draws."""
    x, w, targets = normal(0, 6, 8), normal(1, 1000, 8), jnp.array([5, 900, 7, 5, 999, 0])
    options = {"vocab_size": 1000, "softcap": 4.0, "kernels": kernels}
    exact = linear_cross_entropy(x, w, targets, **options)
    whole = sampled_cross_entropy(x, w, targets, sample=1000, seed=jnp.uint32(0), **options)
    np.testing.assert_allclose(whole, exact, rtol=1e-5)
    drawn = jax.jit(
        jax.vmap(
            lambda seed, row: sampled_cross_entropy(row, w, targets[:1], sample=256, seed=seed, **options), (0, None)
        )
    )
    losses = drawn(jnp.arange(64, dtype=jnp.uint32), x[:1])
    one = linear_cross_entropy(x[:1], w, targets[:1], **options)
    np.testing.assert_allclose(jnp.exp(losses - one).mean(), 1, atol=3 * jnp.exp(losses - one).std() / 8)
    assert len(set(losses.tolist())) == 64


def test_more_targets_than_the_sample_holds():
    """Those of the lowest numbers are kept; the other rows add nothing."""
    x, w, targets = normal(0, 300, 8), normal(1, 400, 8), jnp.arange(300)
    loss, dx = jax.value_and_grad(sampled_cross_entropy)(x, w, targets, vocab_size=400, sample=256, seed=jnp.uint32(0))
    assert np.isfinite(loss) and (jnp.abs(dx[:256]).sum(1) > 0).all() and not dx[256:].any()


@given(
    m=st.integers(1, 3),
    c=st.integers(1, 90),
    kind=st.sampled_from(["layer", "rms"]),
    with_branch=st.booleans(),
    with_scale=st.booleans(),
    with_bias=st.booleans(),
    dtype=dtypes,
    kernels=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@few
def test_add_norm_against_torch(m, c, kind, with_branch, with_scale, with_bias, dtype, kernels, seed):
    m, c = 4 * m, 7 * c
    x, branch, dy, dr = (normal(seed + i, m, c, dtype=dtype) for i in range(4))
    branch = branch if with_branch else None
    scale, bias = normal(seed, c) if with_scale else None, normal(seed + 5, c) if with_bias else None

    def op(x, branch, scale, bias):
        return add_norm(x, branch, Norm(kind, scale, bias), kernels=kernels)

    outs, vjp = jax.vjp(op, x, branch, scale, bias)
    grads = vjp((dr, dy))
    tx = double(x)
    ts, tb = (double(y if y is not None else np.full(c, default)) for y, default in ((scale, 1.0), (bias, 0.0)))
    residual = double(np.asarray(outs[0], np.float64))  # the sum as rounded
    if with_branch:
        assert_close(outs[0], (tx + double(branch)).detach(), dtype)
    else:
        assert (outs[0] == x).all()
    if kind == "layer":
        normed, spread = torch.nn.functional.layer_norm(residual, (c,), ts, tb, 1e-5), residual.var(1, unbiased=False)
    else:
        spread = residual.square().mean(1)
        normed = torch.nn.functional.rms_norm(residual, (c,), ts, 1e-5) + tb
    ((normed * double(dy).detach()).sum() + (residual * double(dr).detach()).sum()).backward()
    small_variance = 1 + 1 / float(spread.detach().min() + 1e-5)
    assert_close(outs[1], normed.detach(), dtype, small_variance)
    assert_close(grads[0], residual.grad, dtype, 2 * small_variance)
    assert (grads[1] is None) == (branch is None) and (branch is None or (grads[1] == grads[0]).all())
    assert (grads[2] is None) == (scale is None) and (grads[3] is None) == (bias is None)
    if with_scale:
        assert_close(grads[2], ts.grad, "float32", 4 * small_variance)
    assert bias is None or np.allclose(grads[3], tb.grad, atol=1e-4)
    assert [o.dtype for o in outs] == [dtype, dtype] and grads[0].dtype == dtype
    assert all(g is None or g.dtype == jnp.float32 for g in grads[2:])


def test_add_norm_gradient_sums_over_many_rows():
    """More rows than one round of programs holds, not a multiple of what a program takes."""
    m, c = 4 * 512 * 2 + 4, 8
    x, dy = normal(0, m, c), normal(1, m, c)

    def gradients(kernels):
        vjp = jax.vjp(lambda x, scale: add_norm(x, None, Norm("layer", scale), kernels=kernels), x, jnp.ones(c))[1]
        return vjp((jnp.zeros((m, c)), dy))

    got, want = (jax.jit(gradients, static_argnums=0)(kernels) for kernels in (True, False))
    assert_close(got[1], want[1], "float32", 4)
    assert_close(got[0], want[0], "float32")


@given(
    size=st.integers(1, 9000),
    name=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=dtypes,
    kernels=st.booleans(),
    std=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 2**32 - 1),
)
@few
def test_activations_against_torch(size, name, dtype, kernels, std, seed):
    h, dy = normal(seed, size, dtype=dtype, std=std), normal(seed + 1, size, dtype=dtype)
    y, vjp = jax.vjp(functools.partial(activate, name=name, kernels=kernels), h)
    th = double(h)
    want = torch.nn.functional.gelu(th, approximate="tanh") if name == "gelu" else torch.relu(th).square()
    want.backward(double(dy).detach())
    assert y.dtype == vjp(dy)[0].dtype == dtype
    assert_close(y, want.detach(), dtype, 0.5)
    assert_close(vjp(dy)[0], th.grad, dtype, 0.5)


@pytest.mark.parametrize("kernels", [False, True])
def test_gelu_at_the_far_ends(kernels):
    gelu = jax.value_and_grad(lambda h: activate(h[None], "gelu", kernels=kernels)[0])
    value, slope = jax.vmap(gelu)(jnp.array([-1e4, 0.0, 1e4]))
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
    for softcap in (0.0, 15.0):
        op = functools.partial(linear_cross_entropy, vocab_size=vocab_size, softcap=softcap, kernels=True)
        shapes = ((32, 64), dtype), ((padded, 64), jnp.float32), ((32,), jnp.int32)
        on_cuda(op, *shapes)
        on_cuda(jax.grad(op, (0, 1)), *shapes)
        rare = functools.partial(op, rare=jnp.array([60.0, 2.0]))
        on_cuda(jax.grad(rare, (0, 1)), *shapes)


@pytest.mark.parametrize("c", [384, 768, 1600])
@pytest.mark.parametrize(("kind", "scale", "bias"), [("layer", 1, 0), ("layer", 1, 1), ("rms", 0, 0), ("rms", 1, 0)])
def test_add_norm_lowers_for_cuda(c, kind, scale, bias):
    def f(x, branch, vector):
        norm = vector if scale else None, vector if bias else None
        out, vjp = jax.vjp(lambda x, b, norm: add_norm(x, b, Norm(kind, *norm), kernels=True), x, branch, norm)
        return out, vjp(out)

    on_cuda(f, ((64, c), jnp.bfloat16), ((64, c), jnp.bfloat16), ((c,), jnp.float32))
