"""Products with what surrounds them: in training they are what one would write, and each op says which path it took."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import fresh_params
from test_ops import normal

from jaxgpt.config import resolve
from jaxgpt.models import bind
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.ops import launch
from jaxgpt.ops.activation import activate
from jaxgpt.ops.linear import Fast, add_norm_linear, linear
from jaxgpt.ops.norm import Norm, add_norm
from jaxgpt.ops.paths import describe, note, watch
from jaxgpt.sharding import make_mesh
from jaxgpt.step import create_state, make_train_step

KERNELS = Fast(kernels=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("groups", "activation"), [(0, None), (0, "gelu"), (3, None), (2, "relu2")])
def test_a_branch_is_a_norm_a_product_and_an_activation(groups, activation, dtype):
    x, branch = normal(0, 12, 16, dtype=dtype), normal(1, 12, 16, dtype=dtype)
    shape = (groups, 24) if groups else (24,)
    w, b, norm = normal(2, 16, *shape), normal(3, *shape), Norm("rms", normal(4, 16))
    got_x, got = jax.jit(lambda: add_norm_linear(x, branch, norm, w, b, activation=activation))()

    @jax.jit
    def written_out():
        total, y = add_norm(x, branch, norm)
        parts = [(w, b)] if not groups else [(w[:, i], b[i]) for i in range(groups)]
        ys = [y @ w.astype(dtype) + b.astype(dtype) for w, b in parts]
        return total, [activate(y, activation) if activation else y for y in ys]

    want_x, want = written_out()
    assert (got_x == want_x).all()
    for a, b in zip(got if groups else [got], want, strict=True):
        assert a.dtype == dtype and (a == b).all()


def test_columns_and_dtype():
    x, w = normal(0, 5, 16, dtype="bfloat16"), normal(1, 16, 24)
    got = linear(x, w, columns=20, dtype=jnp.float32)
    assert got.shape == (5, 20) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, (x @ w.astype("bfloat16"))[:, :20].astype(jnp.float32), rtol=1e-2, atol=0.05)


def test_a_branch_is_added_where_it_costs_least():
    """In training it comes unadded, for the next norm's kernel; decoding, it is in the stream already."""
    x, w, h, norm = normal(0, 4, 16), normal(1, 24, 16), normal(2, 4, 24), Norm("layer", normal(3, 16))
    stream, branch = linear(h, w, residual=x)
    assert (stream == x).all() and (branch == h @ w).all()
    added, none = linear(h, w, residual=x, fast=Fast(True, decode=True))
    assert none is None
    np.testing.assert_allclose(added, x + h @ w, atol=1e-5)
    want = add_norm_linear(x, branch, norm, w.T)
    for pair in ((stream, branch), (added, none)):
        got = add_norm_linear(*pair, norm, w.T, fast=Fast(True, decode=True))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_one_gradient_of_several_products():
    """Through three products of one input: the sum of what each gives."""
    x, w, dys = normal(0, 12, 16), normal(1, 16, 3, 8), tuple(normal(2 + i, 12, 8) for i in range(3))
    dx, dw = jax.vjp(linear, x, w)[1](dys)
    np.testing.assert_allclose(dx, sum(dy @ w[:, i].T for i, dy in enumerate(dys)), atol=1e-5)
    np.testing.assert_allclose(dw, jnp.stack([x.T @ dy for dy in dys], 1), atol=1e-5)


@pytest.mark.parametrize(
    ("fast", "shape", "said"),
    [
        (Fast(), (64, 32), "norm: plain · products: bfloat16"),
        (KERNELS, (64, 32), "norm: kernel · products: bfloat16"),
        (KERNELS, (65, 32), "norm: kernel · products: bfloat16"),
        (Fast(True, fp8=True), (64, 32), "norm: kernel · products: fp8"),
        (Fast(True, fp8=True), (64, 24), "norm: kernel · products: bfloat16"),
        (Fast(True, decode=True), (4, 24), "products: kernel"),
        (Fast(True, decode=True), (65, 24), "norm: kernel · products: bfloat16"),
    ],
)
def test_each_says_which_path_it_takes(fast, shape, said):
    x, w = jnp.zeros(shape, "bfloat16"), jnp.zeros((shape[1], 16))
    with watch() as paths:
        jax.eval_shape(lambda x, w: add_norm_linear(x, None, Norm("rms"), w, fast=fast), x, w)
    assert describe(paths) == said


def test_nothing_is_noted_where_nobody_watches():
    note("norm", "plain")
    with watch() as paths:
        pass
    note("norm", "kernel")
    assert paths == {} and describe({"a": {"y", "x"}}) == "a: x and y"


# --- without Pallas' Triton backend ---


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(launch, "triton", None)
    launch._installed.cache_clear()
    yield
    launch._installed.cache_clear()


def test_where_the_backend_is_gone_all_runs_plain(without_triton):
    """One warning, whatever asks; losses and gradients of a model with dropout, and those of FP8, are the twins'."""
    config = dict(block_size=64, vocab_size=40, n_layer=1, n_head=2, n_embd=64, dropout=0.2, bias=True)
    tokens = jnp.asarray(np.random.default_rng(0).integers(40, size=(1, 65)), jnp.int32)

    def run(kernels, matmul_dtype):
        model = GPTConfig(**config, kernels=kernels, matmul_dtype=matmul_dtype)
        params = fresh_params(model, jax.random.key(0))
        loss = jax.value_and_grad(lambda p: bind(model, p).loss(tokens[:, :-1], tokens[:, 1:], seed=jnp.uint32(1)))
        cache = model.empty_cache(1, 8)
        return jax.jit(loss)(params), jax.jit(lambda: bind(model, params)(tokens[:, :1], cache=cache))()

    with pytest.warns(UserWarning, match="has no Pallas Triton backend: plain JAX runs instead") as warned:
        got = [run(True, matmul_dtype) for matmul_dtype in ("auto", "fp8")]
    assert len(warned) == 1
    want = [run(False, matmul_dtype) for matmul_dtype in ("auto", "fp8")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_the_import_may_fail():
    code = (
        "import sys, warnings; sys.modules['jax.experimental.pallas.triton'] = None; warnings.simplefilter('ignore')\n"
        "from jaxgpt.ops import choose, linear, attention, cross_entropy, launch\nassert not launch.available()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- a training step with kernels ---


@pytest.mark.parametrize(("dropout", "matmul_dtype"), [(0.2, "auto"), (0.0, "fp8")])
def test_training_steps_with_kernels(tiny_config, dropout, matmul_dtype):
    """Interpreted: two steps end where they do without, in a shard_map and donated as in a run."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    values = dict(n_embd=64, block_size=64, batch_size=1, gradient_accumulation_steps=1, dropout=dropout, bias=True)
    tokens = jnp.asarray(np.random.default_rng(0).integers(27, size=(2, 1, 1, 65)), jnp.int32)
    ends = []
    for kernels in ("on", "off"):
        parts = resolve(tiny_config(**values, kernels=kernels), mesh, 27)
        parts = parts._replace(devices=parts.devices.__class__(**vars(parts.devices) | {"matmul_dtype": matmul_dtype}))
        state, metrics = make_train_step(parts, mesh)(create_state(parts, mesh), tokens)
        ends.append((metrics["loss"], metrics["grad_norm"]))
    # in FP8 a last bit of a norm may round an activation otherwise
    np.testing.assert_allclose(*ends, rtol=2e-5 if matmul_dtype == "auto" else 2e-3)
