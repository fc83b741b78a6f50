"""FP8 products: what rounding costs, that sizes of inputs do not matter, infinities, and training with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import fresh_params
from test_ops import normal, on_cuda

from jaxgpt import UserError
from jaxgpt.config import check_fp8, resolve
from jaxgpt.data import DataConfig, RunData
from jaxgpt.keys import take
from jaxgpt.models import bind
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.ops import fp8
from jaxgpt.ops.activation import activate, gelu_gradient, gelu_value, relu2_gradient, relu2_value
from jaxgpt.ops.cross_entropy import linear_cross_entropy
from jaxgpt.ops.linear import Fast, add_norm_linear, linear
from jaxgpt.ops.norm import Norm
from jaxgpt.step import create_state, make_eval_step, make_train_step

C, F = 128, 512


def fp8_mlp(x, w_fc, b_fc, w_proj, *, activation="gelu", kernels):
    fast = Fast(kernels, fp8=True)
    return linear(linear(x, w_fc, b_fc, activation=activation, to_linear=True, fast=fast), w_proj, fast=fast)


MLP = {kernels: functools.partial(fp8_mlp, kernels=kernels) for kernels in (False, True)}
kernels = pytest.mark.parametrize("kernel", [False, True])


def mlp_inputs(rows: int) -> list[jax.Array]:
    """x, w_fc, b_fc, w_proj and a gradient of the output, of the sizes that they have in training."""
    shapes = (rows, C, 1.0), (C, F, 0.05), (F, 0.1), (F, C, 0.05), (rows, C, 1e-6)
    return [normal(i, *shape, std=std) for i, (*shape, std) in enumerate(shapes)]


def plain_mlp(x, w_fc, b_fc, w_proj, activation="gelu"):
    return activate(x @ w_fc + b_fc, activation) @ w_proj


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(f, *inputs):
    """y, dx, dw_fc, db_fc, dw_proj."""
    y, vjp = jax.vjp(f, *inputs[:-1])
    return y, *vjp(inputs[-1])


def error(got, want) -> float:
    """The norm of the difference, relative."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# --- the kernel ---


@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize(
    "function, dtype, parts",
    [
        (fp8.identity, fp8.E4M3, 1),
        (fp8.identity, fp8.E5M2, 3),
        (gelu_value, fp8.E4M3, 1),
        (gelu_gradient, fp8.E5M2, 1),
        (relu2_value, fp8.E4M3, 1),
        (relu2_gradient, fp8.E5M2, 2),
    ],
)
def test_the_kernel_is_its_twin(function, dtype, parts, n):
    count = parts * (2 if function in (gelu_gradient, relu2_gradient) else 1)
    arrays = [normal(i, 128, n, dtype="bfloat16", std=3.0) for i in range(count)]
    (q, q_t, scale), (want, want_t, want_scale) = (
        jax.jit(functools.partial(fp8.both_orders, function, dtype, kernel=kernel, parts=parts))(*arrays)
        for kernel in (True, False)
    )
    assert scale == want_scale and q.dtype == q_t.dtype == dtype
    assert (q_t == q.T).all() and (want_t == want.T).all() and (fp8.transpose(q, kernel=True) == q_t).all()
    # sigmoids that differ by 1e-7 may round otherwise
    assert np.mean(np.asarray(q != want)) <= (1e-3 if function in (gelu_value, gelu_gradient) else 0.0)


NORMS = [("layer", 1, 1, 1), ("layer", 1, 0, 0), ("rms", 0, 0, 1), ("rms", 1, 0, 1)]


@pytest.mark.parametrize("n", [64, 192])
@pytest.mark.parametrize(("kind", "scale", "bias", "branch"), NORMS)
def test_a_norm_rounded_in_its_kernel_is_its_twin(kind, scale, bias, branch, n):
    arrays = [normal(i, 128, n, std=3.0) for i in range(2 if branch else 1)]
    vectors = [normal(5 + i, n) if there else None for i, there in enumerate((scale, bias))]
    dys = [normal(8 + i, 128, n) for i in range(2)]

    def run(kernels, arrays, vectors, dys):
        def f(arrays, vectors):
            x, q = fp8.add_norm(arrays[0], arrays[1] if branch else None, Norm(kind, *vectors), kernels=kernels)
            return (x, q.value), q

        y, vjp, q = jax.vjp(f, arrays, vectors, has_aux=True)
        return y, q, vjp(tuple(dys))

    (y, q, grads), (want, want_q, want_grads) = (
        jax.jit(run, static_argnums=0)(kernels, arrays, vectors, dys) for kernels in (True, False)
    )
    assert (y[0] == want[0]).all() and q.scale == want_q.scale and (q.columns == q.rows.T).all()
    assert np.mean(np.asarray(q.rows != want_q.rows)) < 1e-4  # statistics that differ by 1e-7 may round otherwise
    for got, wanted in zip(jax.tree.leaves((y, grads)), jax.tree.leaves((want, want_grads)), strict=True):
        assert error(got, wanted) < 1e-5


def test_large_and_odd_shapes_take_the_twin():
    bf16, small, fits = jnp.bfloat16, fp8.E5M2, fp8.tiles_support
    assert fits(65536, 6400, bf16) and fits(32768, 50304, small) and fits(65536, 4800, bf16, 3)
    assert not fits(65536, 50304, small) and not fits(65536, 1000, small) and not fits(1000, 128, small)
    assert not fits(65536, 6400, bf16, 3)
    odd = normal(0, 24, 40)
    q, q_t, scale = fp8.both_orders(fp8.identity, fp8.E4M3, odd, kernel=True)
    assert (q_t == q.T).all() and error(q.astype(jnp.float32) / scale, odd) < 0.03


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_lowers_for_cuda(dtype):
    def f(x, w_fc, w_proj, table, targets):
        fast = Fast(kernels=True, fp8=True)
        x, y = add_norm_linear(x, x, Norm("layer", table[0]), w_fc, activation="gelu", to_linear=True, fast=fast)
        y = x + linear(y, w_proj, fast=fast)
        return linear_cross_entropy(y, table, targets, vocab_size=1200, kernels=True, in_fp8=True)

    shapes = ((192, C), dtype), ((C, F), jnp.float32), ((F, C), jnp.float32), ((1280, C), jnp.float32)
    on_cuda(jax.grad(f, (0, 1, 2, 3)), *shapes, ((192,), jnp.int32))


# --- precision ---


@kernels
def test_the_error_is_that_of_the_formats(kernel):
    """Relative errors of roundings, 2.6% (e4m3) and 5.3% (e5m2) of normal numbers, add up in quadrature."""
    inputs = mlp_inputs(256)
    got, want = value_and_gradients(MLP[kernel], *inputs), value_and_gradients(plain_mlp, *inputs)
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert all(e < limit for e, limit in zip(errors, (0.07, 0.11, 0.11, 0.11, 0.09), strict=True)), errors


@pytest.mark.parametrize("kernels", [False, True])
def test_relu2_is_as_exact(kernels):
    inputs = mlp_inputs(256)
    got = value_and_gradients(functools.partial(fp8_mlp, activation="relu2", kernels=kernels), *inputs)
    want = value_and_gradients(functools.partial(plain_mlp, activation="relu2"), *inputs)
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert all(e < limit for e, limit in zip(errors, (0.09, 0.11, 0.11, 0.11, 0.10), strict=True)), errors


@pytest.mark.parametrize("kernels", [False, True])
def test_three_products_of_one_input(kernels):
    """A weight of (K, 3, N), as of queries, keys and values: three outputs, their gradients rounded together."""
    x, w, b = normal(0, 256, C), normal(1, C, 3, C, std=0.05), normal(2, 3, C, std=0.1)
    dys = tuple(normal(3 + i, 256, C, std=size) for i, size in enumerate((1e-6, 3e-7, 2e-6)))

    def run(fast):
        ys, vjp = jax.vjp(lambda x, w, b: linear(x, w, b, fast=fast), x, w, b)
        return *ys, *vjp(dys)

    got, want = jax.jit(run, static_argnums=0)(Fast(kernels, fp8=True)), jax.jit(run, static_argnums=0)(Fast())
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert all(e < limit for e, limit in zip(errors, (0.04, 0.04, 0.04, 0.07, 0.07, 1e-5), strict=True)), errors
    assert got[4].shape == w.shape and got[5].shape == b.shape


def test_sizes_that_cublas_does_not_take_are_not_rounded():
    x, w = normal(0, 40, C), normal(1, C, 24)
    assert (linear(x, w, fast=Fast(fp8=True)) == linear(x, w)).all()
    assert fp8.supports((64, C), (C, 3, 48)) and not fp8.supports((64, C), (C, 3, 40))


def test_rounding_has_no_bias():
    """Exact results are on average what they were rounded to: the error is orthogonal to what is computed.

    The projection on the exact result is then 1 minus the squared error, 0.993: the same factor for a whole gradient,
    which Adam takes out, and no sign of a part that is lost.
    """
    inputs = mlp_inputs(2048)
    got, want = value_and_gradients(MLP[False], *inputs), value_and_gradients(plain_mlp, *inputs)
    for i in (0, 1, 2, 4):  # db_fc, a sum over rows, has noise of its own
        assert abs(np.vdot(got[i], want[i]) / np.vdot(got[i], got[i]) - 1) < 2e-3


@pytest.mark.parametrize("which", [1, 3, 4])
@pytest.mark.parametrize("power", [-20, 10])
def test_sizes_do_not_matter(which, power):
    """Weights or gradients 2^20 times smaller or 2^10 larger: the same error, where constant scales lose all."""
    inputs = mlp_inputs(256)
    inputs[2] = None
    if which == 1:  # x too, so that what goes into GELU keeps its size
        inputs[0] = inputs[0] * 2.0**-power
    inputs[which] = inputs[which] * 2.0**power

    def plain(x, w_fc, b_fc, w_proj):
        return plain_mlp(x, w_fc, 0.0, w_proj)

    got, want = value_and_gradients(MLP[False], *inputs), value_and_gradients(plain, *inputs)
    errors = [error(a, b) for a, b in zip(got, want, strict=True) if b is not None]
    assert all(e < limit for e, limit in zip(errors, (0.07, 0.11, 0.11, 0.09), strict=True)), errors


@pytest.mark.parametrize("std", [2.0**-60, 0.9, 1.0, 1.1, 1e20])
@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_scales_are_exact_powers_of_two_below_the_top(std, dtype):
    x, top = normal(0, 64, 64, std=std), float(jnp.finfo(dtype).max)
    for headroom in (1.0, fp8.HEADROOM):
        scale = float(jax.jit(fp8.scale_for, static_argnums=(1, 2))(x, dtype, headroom))
        assert np.frexp(scale)[0] == 0.5
        assert top / 2 < headroom * scale * float(jnp.abs(x).max()) <= top


@kernels
@pytest.mark.parametrize("chunks", [1, 2])
def test_the_loss_and_its_gradients(kernel, chunks):
    x, w = normal(0, 256, C, dtype="bfloat16"), normal(1, 1280, C, std=0.1)
    targets = jnp.asarray(np.random.default_rng(0).integers(1200, size=256, dtype=np.int32))

    def run(**kw):
        f = functools.partial(linear_cross_entropy, targets=targets, vocab_size=1200, **kw)
        loss, gradients = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w)
        assert (loss == jax.jit(f)(x, w)) and not np.asarray(gradients[1])[1200:].any()
        return loss, *gradients

    got, want = run(kernels=kernel, chunks=chunks, in_fp8=True), run()
    assert error(got[0], want[0]) < 1e-3
    assert error(got[1], want[1]) < 0.04 and error(got[2], want[2]) < 0.04
    assert got[1].dtype == jnp.bfloat16 and got[2].dtype == jnp.float32


# --- what is not finite ---

MODEL = GPTConfig(block_size=16, vocab_size=27, n_layer=1, n_head=2, n_embd=64, bias=True, matmul_dtype="fp8")


@functools.cache
def loss_and_norm(kernel: bool):
    """A jitted function of parameters: the loss and the norm of its gradient."""
    config = GPTConfig(**(vars(MODEL) | {"kernels": kernel}))
    tokens = jnp.asarray(np.random.default_rng(0).integers(20, size=(4, 17), dtype=np.int32))

    def run(params):
        loss, grads = jax.value_and_grad(lambda p: bind(config, p).loss(tokens[:, :-1], tokens[:, 1:]))(params)
        return loss, jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))

    return jax.jit(run)


@kernels
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_bad_weight_reaches_the_loss_or_the_gradient(kernel, value):
    """So that the step's guard drops the update. One element, of each array; of embeddings one that no input reads."""
    params = fresh_params(MODEL, jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    assert np.isfinite(loss_and_norm(kernel)(params)).all()
    for i, leaf in enumerate(leaves):
        index = (25, 3) if leaf.shape == (128, 64) else (1,) * leaf.ndim
        spoilt = np.array(leaf)
        spoilt[index] = value
        loss, norm = loss_and_norm(kernel)(structure.unflatten([*leaves[:i], spoilt, *leaves[i + 1 :]]))
        assert not (np.isfinite(loss) and np.isfinite(norm)), jax.tree_util.tree_leaves_with_path(params)[i][0]


@kernels
@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("which", [0, 4])
def test_a_bad_activation_or_gradient_stays_bad(kernel, value, which):
    """A NaN in any row; an infinity in the sampled ones (here every second) in all that its product gives."""
    inputs = mlp_inputs(2048)
    for row in (1, 2) if np.isnan(value) else (2,):
        spoilt = list(inputs)
        spoilt[which] = inputs[which].at[row, 5].set(value)
        y, dx, *gradients = value_and_gradients(MLP[kernel], *spoilt)
        if np.isnan(value):
            assert np.isnan((y, dx)[which == 4][row]).any()
            assert all(np.isnan(g).any() for g in (gradients if which == 0 else gradients[2:]))
        else:
            assert not np.isfinite((y, dx)[which == 4]).any()


# --- training ---


def test_training_ends_where_it_does_without(tiny_config, mesh):
    """With dropout, two micro-steps, recomputed blocks and biases on eight devices: the same masks, the same loss."""
    values = dict(n_embd=64, learning_rate=3e-3, max_iters=60, lr_decay_iters=60, warmup_iters=6)
    values |= dict(dropout=0.1, remat="block", bias=True, batch_size=4, gradient_accumulation_steps=16)
    config = tiny_config(**values)
    data = RunData(take(DataConfig, config), config.block_size, mesh)
    parts = resolve(config, mesh, data.vocab_size)
    evaluate, losses = make_eval_step(parts.model, mesh), {}
    for matmul_dtype in ("auto", "fp8"):
        devices = dataclasses.replace(parts.devices, matmul_dtype=matmul_dtype)
        step = make_train_step(parts._replace(devices=devices), mesh)
        state = create_state(parts, mesh)
        assert ("f8E4M3" in step.lower(state, data.batch(0, 20)).as_text()) == (matmul_dtype == "fp8")
        for start in range(0, 60, 20):
            state, metrics = step(state, data.batch(start, 20))
        losses[matmul_dtype] = np.mean(metrics["loss"]), np.mean(evaluate(state.params, data.eval_batches()["val"][0]))
    assert losses["auto"][1] < 3.0
    np.testing.assert_allclose(losses["fp8"], losses["auto"], atol=0.02)


@pytest.mark.parametrize(
    "values, hardware, dtype, message",
    [
        ({}, False, "bfloat16", "matmul_dtype=fp8 needs NVIDIA GPUs of compute capability 8.9"),
        ({}, True, "float16", "bfloat16 and mesh_tensor=1; leave it at auto"),
        ({}, True, "bfloat16", "n_embd=16 and batch_size × block_size=16 to be multiples of 64"),
        ({"n_embd": 64}, True, "bfloat16", "n_embd=64 and batch_size × block_size=16 to be multiples of 64"),
    ],
)
def test_what_cannot_run_is_said(tiny_config, mesh, values, hardware, dtype, message):
    with pytest.raises(UserError, match=message) as error:
        check_fp8(tiny_config(**values), dtype, hardware, mesh)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="needs NVIDIA"):
        resolve(tiny_config(matmul_dtype="fp8"), mesh, 27)


def test_sizes_that_fit(tiny_config, mesh):
    check_fp8(tiny_config(n_embd=64, batch_size=4), "bfloat16", True, mesh)
