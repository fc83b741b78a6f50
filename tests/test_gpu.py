"""On an NVIDIA GPU (`scripts/test_gpu`): every compiled kernel against its plain twin, training and decoding with both.

The other tests have the same kernels interpreted; what Triton makes of them is seen here alone.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import default_config, resolve
from jaxgpt.decoding import Generator, Sampling
from jaxgpt.models import bind, init_params
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.ops import choose, decode, fan_out, fp8, matmul
from jaxgpt.ops.activation import ACTIVATIONS, gelu_gradient, gelu_value, relu2_gradient, relu2_value
from jaxgpt.ops.attention import attention, cached_attention
from jaxgpt.ops.attention import supports as attention_supports
from jaxgpt.ops.cross_entropy import linear_cross_entropy
from jaxgpt.ops.launch import available
from jaxgpt.ops.linear import Fast, add_norm_linear, linear
from jaxgpt.ops.norm import Norm, add_norm
from jaxgpt.sharding import make_mesh
from jaxgpt.step import create_state, make_train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
BF16, F16, F32 = "bfloat16", "float16", "float32"
ROUNDING = {BF16: 2**-8, F16: 2**-11, F32: 1e-6}  # of one number, relative


def normal(seed: int, *shape: int, dtype: str = BF16, std: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * std, dtype)


def error(got, want) -> float:
    """The norm of the difference, relative."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def assert_alike(got, want, limit: float):
    """Every array of two trees, finite, of the same dtype and within `limit` of each other."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and np.isfinite(np.asarray(a, np.float64)).all()
        assert error(a, b) <= limit, (a.shape, a.dtype)


def with_gradients(f, *inputs, seed=99):
    """f's results and gradients, for cotangents drawn at random."""

    @jax.jit
    def run(*inputs):
        y, vjp = jax.vjp(f, *inputs)
        leaves, structure = jax.tree.flatten(y)
        dys = [jax.random.normal(jax.random.key(seed + i), a.shape, a.dtype) for i, a in enumerate(leaves)]
        return y, vjp(structure.unflatten(dys))

    return run(*inputs)


def test_this_jax_has_kernels():
    assert available() and jax.default_backend() == "gpu"


NORMS = [("layer", True, False), ("layer", True, True), ("rms", False, False), ("rms", True, False)]


@pytest.mark.parametrize(("kind", "scale", "bias"), NORMS)
@pytest.mark.parametrize(("m", "c", "dtype"), [(1, 7, F32), (4108, 768, BF16), (65, 1600, F16)])
def test_add_norm(kind, scale, bias, m, c, dtype):
    x, branch = normal(0, m, c, dtype=dtype), normal(1, m, c, dtype=dtype)
    vectors = [normal(2 + i, c, dtype=F32) if there else None for i, there in enumerate((scale, bias))]
    for with_branch in (True, False):

        def f(x, branch, vectors, kernels, with_branch=with_branch):
            return add_norm(x, branch if with_branch else None, Norm(kind, *vectors), kernels=kernels)

        got, want = (with_gradients(functools.partial(f, kernels=k), x, branch, vectors) for k in (True, False))
        assert_alike(got, want, 4 * ROUNDING[dtype])


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize(
    ("m", "vocab_size", "padded", "dtype", "in_fp8"),
    [
        (1, 65, 128, F32, False),
        (33, 65, 128, BF16, False),
        (7, 50257, 50304, BF16, False),
        (5, 50257, 50304, F16, False),
        (3, 50257, 50304, F32, False),
        (256, 50257, 50304, BF16, True),
        (128, 100_000, 100_096, BF16, False),
    ],
)
def test_loss(softcap, m, vocab_size, padded, dtype, in_fp8):
    x, w = normal(0, m, 128, dtype=dtype), normal(1, padded, 128, dtype=F32, std=0.3)
    targets = jnp.asarray(np.random.default_rng(2).integers(vocab_size, size=m), jnp.int32)

    def f(x, w, kernels):
        options = {"vocab_size": vocab_size, "softcap": softcap, "in_fp8": in_fp8}
        return linear_cross_entropy(x, w, targets, kernels=kernels, **options)

    got, want = (with_gradients(functools.partial(f, kernels=k), x, w) for k in (True, False))
    # XLA may leave the twin's logits unrounded, and another bfloat16 makes another e5m2
    assert_alike(got[0], want[0], 1e-5 if dtype == F32 else 2e-3)
    assert_alike(got[1], want[1], 0.06 if in_fp8 else max(4e-3 if softcap else 0.0, 4 * ROUNDING[dtype]))
    assert not np.asarray(got[1][1])[vocab_size:].any()


@pytest.mark.parametrize(
    ("time", "size", "dtype"),
    [
        (64, 16, BF16),
        (256, 64, BF16),
        (1024, 64, BF16),
        (192, 128, F16),
        (128, 32, F32),
        (64, 64, F32),
        (128, 128, BF16),
    ],
)
def test_attention_with_dropout(time, size, dtype):
    q, k, v = (normal(i, 2, time, 3, size, dtype=dtype) for i in range(3))
    assert attention_supports(q.shape, 3, dtype)

    def f(q, k, v, kernels):
        return attention(q, k, v, rate=0.2, seed=jnp.uint32(7), kernels=kernels)

    got, want = (with_gradients(functools.partial(f, kernels=kernels), q, k, v) for kernels in (True, False))
    assert_alike(got, want, 2e-2 if dtype == BF16 else 4e-3)  # float32 products are TF32's, both ways


@pytest.mark.parametrize(("window", "heads"), [(None, 2), (100, 4), (None, 4)])
def test_cudnn_attention(window, heads):
    """cuDNN's with fewer key heads and with a window: what it sees is what the plain one sees."""
    q, (k, v) = normal(0, 2, 512, 4, 64), (normal(i, 2, 512, heads, 64) for i in (1, 2))
    f = functools.partial(attention, window=window)
    got, want = (with_gradients(functools.partial(f, implementation=i), q, k, v) for i in ("cudnn", "xla"))
    assert_alike(got, want, 2e-2)


@pytest.mark.parametrize(
    ("function", "dtype", "count", "parts"),
    [
        (fp8.identity, fp8.E4M3, 1, 1),
        (fp8.identity, fp8.E5M2, 3, 3),
        (gelu_value, fp8.E4M3, 1, 1),
        (gelu_gradient, fp8.E5M2, 2, 1),
        (relu2_value, fp8.E4M3, 1, 1),
        (relu2_gradient, fp8.E5M2, 2, 1),
    ],
)
@pytest.mark.parametrize(("m", "n"), [(64, 192), (4096, 768)])
def test_rounding_to_fp8(function, dtype, count, parts, m, n):
    arrays = [normal(i, m, n, std=3.0) for i in range(count)]
    if m == 4096:  # in rows that are not sampled
        arrays = [a.at[5, 7].set(jnp.nan).at[6, 3].set(1e4) for a in arrays]
    (q, q_t, scale), (want, _, want_scale) = (
        jax.jit(functools.partial(fp8.both_orders, function, dtype, kernel=k, parts=parts))(*arrays)
        for k in (True, False)
    )
    q, q_t, want = (np.asarray(a.astype(jnp.float32)) for a in (q, q_t, want))
    np.testing.assert_array_equal(q_t, q.T)
    assert scale == want_scale or np.isnan(scale) and np.isnan(want_scale)
    assert (np.isnan(q) == np.isnan(want)).all()
    assert np.mean((q != want) & ~np.isnan(want)) <= (0 if function is fp8.identity else 2e-3)


@pytest.mark.parametrize(("kind", "scale", "bias"), NORMS)
@pytest.mark.parametrize(("m", "c"), [(4096, 768), (576, 1600)])
def test_norm_rounded_to_fp8(kind, scale, bias, m, c):
    x, branch = normal(0, m, c), normal(1, m, c)
    norm = Norm(kind, *(normal(2 + i, c, dtype=F32) if there else None for i, there in enumerate((scale, bias))))
    for more in (branch, None):
        run = functools.partial(fp8.add_norm, norm=norm)
        (x_got, got), (x_want, want) = (jax.jit(functools.partial(run, kernels=k))(x, more) for k in (True, False))
        assert (x_got == x_want).all() and got.scale == want.scale and (got.columns == got.rows.T).all()
        # XLA leaves the twin's sum unrounded before it normalizes, and another bfloat16 may make another e4m3
        assert error(got.rows, want.rows) < 0.02


@pytest.mark.parametrize("activation", [None, "gelu", "relu2"])
def test_fp8_block(activation):
    """A norm, a product, an activation and a product, in FP8 with kernels, beside float32."""
    x, branch = normal(0, 1024, 256), normal(1, 1024, 256)
    w, w2 = normal(2, 256, 512, dtype=F32, std=0.05), normal(3, 512, 256, dtype=F32, std=0.05)

    def f(x, branch, w, w2, fast):
        x, y = add_norm_linear(x, branch, Norm("rms"), w, activation=activation, to_linear=True, fast=fast)
        return x, linear(y, w2, fast=fast)

    got = with_gradients(functools.partial(f, fast=Fast(True, fp8=True)), x, branch, w, w2)
    want = with_gradients(functools.partial(f, fast=Fast()), x, branch, w, w2)
    assert_alike(got, want, 0.12)


def test_no_product_of_fp8_is_made_in_bfloat16():
    """Of queries, keys and values and of an MLP, forward and backward, as XLA compiles them."""
    x, w, w2 = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1024, 256), (256, 3, 256), (256, 1024)])
    w3, fast = jax.ShapeDtypeStruct((1024, 256), jnp.float32), Fast(True, fp8=True)

    def loss(x, w, w2, w3):
        x = x.astype(jnp.bfloat16)
        x, (q, k, v) = add_norm_linear(x, None, Norm("rms"), w, fast=fast)
        x, y = add_norm_linear(x, q * k + v, Norm("rms"), w2, activation="gelu", to_linear=True, fast=fast)
        return jnp.sum(linear(y, w3, fast=fast).astype(jnp.float32) ** 2)

    # of products as small as these the compiler would give some to Triton, which are of FP8 as well
    options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
    lowered = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, w, w2, w3)
    program = str(lowered.compile(compiler_options=options).as_text())
    products = re.findall(r'custom_call_target="(__cublas.*?)"|(?<= )(dot|fusion.*__triton_gemm)\(', program)
    # forward 3, 1 and 1; backward that of queries, keys and values is one product for x, and one for its weights
    assert products == [("__cublas$lt$matmul$f8", "")] * 11


@pytest.mark.skipif(not matmul.supports(128, 64, 128, BF16), reason="wgmma is Hopper's")
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("m", "k", "n"), [(16896, 768, 384), (128, 64, 128), (4992, 1600, 640)])
def test_product_that_ends_in_an_activation(m, k, n, dtype, activation):
    x, w, h = normal(0, m, k, dtype=dtype), normal(1, k, n, dtype=dtype, std=k**-0.5), normal(2, m, n, dtype=dtype)
    total, pointwise = jnp.matmul(x, w, preferred_element_type=F32), ACTIVATIONS[activation]
    before, value = matmul.activate_in_product(x, w, activation)
    assert_alike(before, total.astype(dtype), ROUNDING[dtype])
    assert_alike(value, pointwise.value(before.astype(F32)).astype(dtype), ROUNDING[dtype])
    gradient = matmul.gradient_in_product(x, w.T, h, activation)
    assert_alike(gradient, pointwise.gradient(h.astype(F32), total).astype(dtype), ROUNDING[dtype])


@pytest.mark.skipif(not fan_out.supports(256, 64, 128, BF16), reason="wgmma is Hopper's")
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("m", "k", "n", "count"), [(16896, 768, 768, 3), (256, 64, 128, 1), (4864, 1600, 1600, 3)])
def test_sum_of_products(m, k, n, count, dtype):
    xs, w = [normal(i, m, k, dtype=dtype) for i in range(count)], normal(9, n, count, k, dtype=dtype, std=k**-0.5)
    total = jnp.zeros((m, n), F32)
    for i, x in enumerate(xs):
        total += jnp.matmul(x, w[:, i].T, preferred_element_type=F32)
    assert_alike(fan_out.sum_of_products(xs, w), total.astype(dtype), ROUNDING[dtype])


@pytest.mark.skipif(not fan_out.supports(256, 64, 128, BF16), reason="wgmma is Hopper's")
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("m", "k", "n", "count"), [(16384, 1600, 1600, 3), (64, 128, 128, 1), (1088, 192, 320, 2)])
def test_weight_gradients(m, k, n, count, dtype):
    x, dys = normal(9, m, k, dtype=dtype), [normal(i, m, n, dtype=dtype, std=m**-0.5) for i in range(count)]
    wanted = jnp.stack([jnp.matmul(x.T, dy, preferred_element_type=F32) for dy in dys], 1)
    assert_alike(fan_out.weight_gradients(x, dys), wanted.astype(dtype), ROUNDING[dtype])


@pytest.mark.parametrize("batch", [1, 10, 33])
@pytest.mark.parametrize(
    ("k", "o", "kind", "activation", "dtype"),
    [
        (768, 2304, "layer", None, BF16),
        (1600, 6400, "layer", "gelu", BF16),
        (6400, 1600, None, None, BF16),
        (768, 50304, None, None, BF16),
        (300, 77, "rms", "relu2", F16),
        (100, 40, "rms", None, F32),
    ],
)
def test_decoded_product(batch, k, o, kind, activation, dtype):
    x, w = normal(0, batch, k, dtype=dtype), normal(1, o, k, dtype=dtype, std=0.05)
    norm = kind and Norm(kind, normal(2, k, dtype=F32), normal(3, k, dtype=F32) if kind == "layer" else None)
    stream, bias = normal(4, batch, o, dtype=dtype), normal(5, o, dtype=F32)
    out = jnp.float32 if o > 50_000 else None

    @functools.partial(jax.jit, static_argnums=0)
    def run(fast, x, w, stream, bias, norm_arrays):
        if kind:
            norm = Norm(kind, *norm_arrays)
            return add_norm_linear(x, None, norm, w.T, bias, activation=activation, fast=fast)
        if out:
            return linear(x, w.T, bias, columns=o - 47, dtype=out, fast=fast)
        total, branch = linear(x, w.T, bias, residual=stream, fast=fast)
        return total if branch is None else total + branch

    arrays = (norm.scale, norm.bias) if norm else (None, None)
    got, want = (run(Fast(kernels, decode=True), x, w, stream, bias, arrays) for kernels in (True, False))
    assert_alike(got, want, 8e-3 if dtype == BF16 else 2e-3)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "slots"), [(12, 12, 64, 1024), (6, 2, 128, 300), (4, 4, 40, 16)])
@pytest.mark.parametrize("window", [None, 70])
def test_attention_of_one_token(batch, heads, kv_heads, size, slots, window):
    cache = [normal(i, batch, slots, kv_heads, size) for i in range(2)]
    q, k, v = (normal(3 + i, batch, 1, n, size) for i, n in enumerate((heads, kv_heads, kv_heads)))
    run = jax.jit(cached_attention, static_argnames=("window", "kernels"))
    for length in (0, 1, slots // 2 + 3, slots - 1):
        (got, after), (want, want_after) = (
            run(q, k, v, (*cache, jnp.int32(length)), window=window, kernels=kernels) for kernels in (True, False)
        )
        assert_alike(got, want, 1e-2)
        assert all((a == b).all() for a, b in zip(after, want_after, strict=True))


@pytest.mark.parametrize(
    "rule",
    [(50257, True, False, False), (50257, False, True, False), (50257, False, True, True), (300, False, True, False)],
)
def test_choice_of_a_token(rule):
    width = 50304 if rule[0] > 300 else 384
    logits = normal(0, 8, width, dtype=F32, std=3.0).at[:, rule[0] :].set(100.0)
    knobs, out = jnp.array([0.8, 200, 0.9], jnp.float32), jnp.zeros((8, 2), jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def draw(kernels, position):
        seeds, column = jnp.arange(8, dtype=jnp.uint32), jnp.int32(0)
        options = {"out": out, "column": column, "kernels": kernels}
        return choose.choose(logits, seeds, position, knobs, choose.Rule(*rule), **options)

    draws = [[np.asarray(draw(k, jnp.int32(i))) for i in range(20)] for k in (True, False)]
    # logarithms that differ in the last place may make another token the largest
    assert np.mean(np.array(draws[0]) != np.array(draws[1])) <= 0.01 and np.array(draws).max() < rule[0]


@pytest.mark.parametrize(("dropout", "matmul_dtype"), [(0.0, "auto"), (0.2, "auto"), (0.0, "fp8")])
def test_training_with_and_without_kernels(dropout, matmul_dtype):
    """20 steps in bfloat16, side by side: the same losses but for rounding."""
    config, mesh = default_config(), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    config.update(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=8, gradient_accumulation_steps=1)
    config.update(dropout=dropout, bias=True, learning_rate=1e-3, warmup_iters=2, dtype=BF16, matmul_dtype=matmul_dtype)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(1000, size=(20, 1, 8, 257)) // np.arange(1, 258) * 3, jnp.int32)
    losses = {}
    for kernels in ("on", "off"):
        config.kernels = kernels
        parts = resolve(config, mesh, 3000)
        step, state = make_train_step(parts, mesh), create_state(parts, mesh)
        state, metrics = step(state, tokens)
        losses[kernels] = np.asarray(metrics["loss"])
    assert losses["on"][-1] < losses["on"][0] - 1
    np.testing.assert_allclose(losses["on"], losses["off"], atol=0.05)
    assert np.abs(losses["on"] - losses["off"])[:5].max() < 0.01


MODEL = GPTConfig(block_size=128, vocab_size=1000, n_layer=3, n_head=4, n_embd=256, bias=True)


@pytest.mark.parametrize("rows", [1, 10, 64])
def test_decoding_with_and_without_kernels(rows):
    """Logits of a bfloat16 model, token by token; and the same greedy text in float32."""
    params = jax.tree.map(lambda x: x * 3, init_params(MODEL, jax.random.key(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1000, size=(rows, 40)), jnp.int32)

    def logits(dtype, kernels):
        config = dataclasses.replace(MODEL, dtype=dtype, kernels=kernels)
        model = jax.jit(lambda tokens, cache: bind(config, params)(tokens, cache=cache))
        cache, found = config.empty_cache(rows, 64), []
        for i in range(40):
            y, cache = model(tokens[:, i : i + 1], cache)
            found.append(y)
        return jnp.concatenate(found, 1)

    with jax.default_matmul_precision("highest"):
        exact = logits(F32, False)
    with_kernels, without = error(logits(BF16, True), exact), error(logits(BF16, False), exact)
    assert with_kernels < 1.2 * without < 0.05, "as far from float32 as bfloat16 is anyway"
    with jax.default_matmul_precision("highest"):
        text = [
            np.concatenate(
                list(
                    Generator(dataclasses.replace(MODEL, kernels=kernels), params)(
                        [1, 2, 3], 60, key=jax.random.key(0), num_samples=rows, sampling=Sampling(temperature=0.0)
                    )
                ),
                axis=1,
            )
            for kernels in (True, False)
        ]
    if rows == 1:  # with more the kernels multiply in TF32
        assert (text[0] == text[1]).all()


def test_supports_is_asked():
    """What no kernel covers runs all the same."""
    x, w = normal(0, 65, 96), normal(1, 96, 80, dtype=F32)
    assert not decode.supports(65, BF16)
    assert (linear(x, w, fast=Fast(True, decode=True)) == linear(x, w)).all()
    odd = normal(2, 5, 96)
    assert_alike(add_norm(odd, None, Norm("rms"), kernels=True), add_norm(odd, None, Norm("rms")), 4 * ROUNDING[BF16])
