"""The decoding kernels, interpreted, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ops import on_cuda

from jaxgpt.ops import decode
from jaxgpt.ops.attention import cached_attention
from jaxgpt.ops.norm import Norm

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def normal(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.normal(size=shape), dtype)


def double(x):
    return np.asarray(x, np.float64)


def gelu(y):
    return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))


NORMS = {"layer": (1, 1), "scale": (1, 0), "rms": (1, 0), "bare": (0, 0)}  # of which there are scale and bias


@pytest.mark.parametrize(
    ("batch", "k", "o", "bias", "kind", "activation", "residual", "dtype"),
    [
        (1, 16, 12, True, "layer", None, False, "float32"),
        (3, 37, 9, True, None, None, False, "float32"),
        (2, 40, 8, True, "scale", "gelu", False, "float32"),
        (2, 24, 17, False, "rms", "relu2", True, "bfloat16"),
        (1, 1, 1, False, None, None, False, "float32"),
        # more than one chunk of K; one row, the tensor cores' 16 and more; K too long to be read at once
        (1, 600, 33, True, "layer", "gelu", True, "float32"),
        (10, 600, 33, True, "layer", "gelu", True, "bfloat16"),
        (16, 300, 20, True, "scale", None, False, "float32"),
        (17, 40, 20, False, "bare", "gelu", True, "float32"),
        (2, 1100, 5, True, "layer", None, True, "float32"),
        (5, 1100, 18, True, None, None, False, "bfloat16"),
        (33, 300, 7, True, None, "gelu", False, "float32"),
        (1, 300, 24, False, "bare", None, True, "float16"),
    ],
)
def test_product(batch, k, o, bias, kind, activation, residual, dtype):
    rng = np.random.default_rng(batch)
    x, w = normal(rng, batch, k, dtype=dtype), normal(rng, o, k, dtype=dtype)
    b = normal(rng, o, dtype=dtype) if bias else None
    r = normal(rng, batch, o, dtype=dtype) if residual else None
    scale, shift = (normal(rng, k) if there else None for there in NORMS.get(kind, (0, 0)))
    norm = kind and Norm("rms" if kind in ("rms", "bare") else "layer", scale, shift)
    sizes = (o // 3, o - o // 3) if o > 3 else None
    options = {"norm": norm, "activation": activation, "residual": r, "sizes": sizes}
    parts = jax.jit(lambda: decode.product(x, w, b, **options))()
    got = np.concatenate([double(part) for part in parts], axis=1)
    y = double(x)
    if norm:
        y = y - (y.mean(1, keepdims=True) if norm.kind == "layer" else 0)
        y = y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-5)
        y = y * (1 if scale is None else double(scale)) + (0 if shift is None else double(shift))
    want = y @ double(w).T + (double(b) if bias else 0)
    size = np.abs(want).max()
    if activation:
        want = gelu(want) if activation == "gelu" else np.maximum(want, 0) ** 2
    want = want + (double(r) if residual else 0)
    # an error of the product passes GELU at most 1.13 times as large, and a square twice its root
    limit = TOLERANCE[dtype] * (max(1, 1.2 * size) if activation != "relu2" else max(1, 2 * size * size))
    assert all(part.dtype == dtype for part in parts) and got.shape == (batch, o)
    assert np.abs(got - want).max() <= limit


@pytest.mark.parametrize("window", [None, 1, 3, 280])
@pytest.mark.parametrize("length", [0, 1, 4, 299])  # 300 slots are two chunks of keys
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype"), [(2, 2, 8, "float32"), (6, 2, 5, "float32"), (2, 1, 8, "bfloat16")]
)
def test_attend_is_its_twin(window, length, heads, kv_heads, size, dtype):
    rng, batch, slots = np.random.default_rng(length), 2, 300
    keys, values = (normal(rng, batch, slots, kv_heads, size, dtype=dtype) for _ in range(2))
    q, k, v = (normal(rng, batch, 1, n, size, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    attention = jax.jit(cached_attention, static_argnames=("window", "kernels"))
    cache = keys, values, jnp.int32(length)
    (got, got_cache), (want, want_cache) = (
        attention(q, k, v, cache, window=window, kernels=kernels) for kernels in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, got_cache, want_cache)
    assert np.abs(double(got) - double(want)).max() <= TOLERANCE[dtype]


def test_attend_past_the_last_slot_stays_inside():
    """The loop on the device may run on past a full cache, its results unused: it must not write elsewhere."""
    k, new = jnp.zeros((2, 4, 1, 8)), jnp.ones((2, 1, 8))
    _, k_new, _ = decode.attend(new, new, new, k, k, jnp.int32(6))
    assert (np.asarray(k_new)[:, :3] == 0).all() and (np.asarray(k_new)[:, 3] == 1).all()


@pytest.mark.parametrize("batch", range(2, 18))
def test_rows_of_a_batch_are_the_rows_alone(batch):
    rng = np.random.default_rng(batch)
    x, w, norm = normal(rng, batch, 40), normal(rng, 24, 40), Norm("layer", normal(rng, 40), normal(rng, 40))
    apply = jax.jit(lambda x: decode.product(x, w, norm=norm)[0])
    together, alone = apply(x), np.concatenate([apply(x[i : i + 1]) for i in range(batch)])
    assert np.abs(together - alone).max() <= 2e-5 * np.abs(alone).max()


def test_groups_of_rows_share_one_reading_of_x(monkeypatch):
    rng = np.random.default_rng(0)
    x, w, norm = normal(rng, 1, 40), normal(rng, 50, 40), Norm("layer", normal(rng, 40))
    want = decode.product(x, w, norm=norm)[0]
    monkeypatch.setattr(decode, "_tile", lambda batch, o, k, normalizes: decode.Tile(4, groups=3))
    decode._product.clear_cache()
    assert np.abs(decode.product(x, w, norm=norm)[0] - want).max() <= 1e-5


def test_columns_that_nobody_wants_are_not_written():
    rng = np.random.default_rng(0)
    x, w = normal(rng, 2, 16), normal(rng, 9, 16)
    (got,) = decode.product(x, w, sizes=(7,))
    assert got.shape == (2, 7) and np.abs(got - decode.product(x, w)[0][:, :7]).max() == 0


@pytest.mark.parametrize("batch", [1, 10, 33])
@pytest.mark.parametrize(("k", "o", "kind"), [(768, 2304, "layer"), (1600, 6400, "rms"), (6400, 1600, None)])
def test_it_lowers_for_cuda(batch, k, o, kind):
    bf16, f32 = jnp.bfloat16, jnp.float32

    def f(x, w, bias, residual, scale):
        norm = kind and Norm(kind, scale)
        options = {"norm": norm, "activation": "gelu", "residual": residual, "sizes": (o // 3, o - o // 3)}
        return decode.product(x, w, bias, **options)

    on_cuda(f, ((batch, k), bf16), ((o, k), bf16), ((o,), f32), ((batch, o), bf16), ((k,), f32))
    cache, new = ((batch, 300, 2, 64), bf16), ((batch, 2, 64), bf16)
    on_cuda(decode.attend, ((batch, 4, 64), bf16), new, new, cache, cache, ((), jnp.int32))
