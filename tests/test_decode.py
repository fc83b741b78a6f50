"""The decoding kernels, interpreted, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.ops import decode
from jaxgpt.ops.decode import attend, linear

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def normal(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.normal(size=shape), dtype)


def double(x):
    return np.asarray(x, np.float64)


@pytest.mark.parametrize(
    ("batch", "k", "o", "bias", "norm", "activation", "residual", "dtype"),
    [
        (1, 16, 12, True, "both", False, False, "float32"),
        (3, 37, 9, True, "none", False, True, "float32"),
        (2, 40, 8, True, "scale", True, False, "float32"),
        (2, 24, 17, False, "both", True, True, "bfloat16"),
        (1, 1, 1, False, "none", False, False, "float32"),
        # more than one chunk of K; one row, the tensor cores' 16 and more; K too long to be read at once
        (1, 600, 33, True, "both", True, True, "float32"),
        (10, 600, 33, True, "both", True, True, "bfloat16"),
        (16, 300, 20, True, "scale", False, False, "float32"),
        (17, 40, 20, False, "both", True, True, "float32"),
        (2, 1100, 5, True, "both", False, True, "float32"),
        (5, 1100, 18, True, "none", False, True, "bfloat16"),
        (33, 300, 7, True, "none", True, False, "float32"),
    ],
)
def test_linear(batch, k, o, bias, norm, activation, residual, dtype):
    rng = np.random.default_rng(batch)
    x, w = normal(rng, batch, k, dtype=dtype), normal(rng, o, k, dtype=dtype)
    b = normal(rng, o, dtype=dtype) if bias else None
    scale, shift = normal(rng, k), normal(rng, k) if norm == "both" else None
    r = normal(rng, batch, o, dtype=dtype) if residual else None
    ln = None if norm == "none" else (scale, shift)
    got = jax.jit(lambda: linear(x, w, b, norm=ln, activation=activation, residual=r))()
    y = double(x)
    if ln:
        y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5) * double(scale)
        y = y + double(shift) if shift is not None else y
    want = y @ double(w).T + (double(b) if bias else 0)
    size = np.abs(want).max()
    if activation:
        want = 0.5 * want * (1 + np.tanh(np.sqrt(2 / np.pi) * (want + 0.044715 * want**3)))
    want = want + (double(r) if residual else 0)
    assert got.dtype == dtype and got.shape == (batch, o)
    # an error of the product passes GELU at most 1.13 times as large
    assert np.abs(double(got) - want).max() <= TOLERANCE[dtype] * max(1, 1.2 * size, np.abs(want).max())


@pytest.mark.parametrize("length", [0, 1, 4, 299])  # 300 slots are two chunks of keys
@pytest.mark.parametrize(("heads", "size", "dtype"), [(2, 8, "float32"), (3, 5, "float32"), (2, 8, "bfloat16")])
def test_attend(length, heads, size, dtype):
    rng, batch, slots = np.random.default_rng(length), 2, 300
    k, v = (normal(rng, batch, slots, heads, size, dtype=dtype) for _ in range(2))
    qkv = normal(rng, batch, 3 * heads * size, dtype=dtype)
    y, k_new, v_new = jax.jit(attend)(qkv, k, v, jnp.int32(length))
    q, key, value = np.split(double(qkv).reshape(batch, 3 * heads, size), 3, axis=1)
    for new, old, added in ((k_new, k, key), (v_new, v, value)):
        want = double(old)
        want[:, length] = added
        assert (double(new) == want).all()
    scores = np.einsum("bnh,bsnh->bns", q, double(k_new)[:, : length + 1]) / np.sqrt(size)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bns,bsnh->bnh", weights / weights.sum(-1, keepdims=True), double(v_new)[:, : length + 1])
    assert np.abs(double(y) - want.reshape(batch, -1)).max() <= TOLERANCE[dtype]


def test_attend_past_the_last_slot_stays_inside():
    """The loop on the device may run on past a full cache, its results unused: it must not write elsewhere."""
    k = jnp.zeros((2, 4, 1, 8))
    _, k_new, _ = jax.jit(attend)(jnp.ones((2, 24)), k, k, jnp.int32(6))
    assert (np.asarray(k_new)[:, :3] == 0).all() and (np.asarray(k_new)[:, 3] == 1).all()


@pytest.mark.parametrize("batch", range(2, 18))
def test_rows_of_a_batch_are_the_rows_alone(batch):
    rng = np.random.default_rng(batch)
    x, w, norm = normal(rng, batch, 40), normal(rng, 24, 40), (normal(rng, 40), normal(rng, 40))
    apply = jax.jit(lambda x: linear(x, w, norm=norm))
    together, alone = apply(x), np.concatenate([apply(x[i : i + 1]) for i in range(batch)])
    assert np.abs(together - alone).max() <= 2e-5 * np.abs(alone).max()


def test_groups_of_rows_share_one_reading_of_x(monkeypatch):
    rng = np.random.default_rng(0)
    x, w, norm = normal(rng, 1, 40), normal(rng, 50, 40), (normal(rng, 40), None)
    want = linear(x, w, norm=norm)
    monkeypatch.setattr(decode, "_tile", lambda batch, o, k: decode.Tile(4, groups=3))
    assert np.abs(linear(x, w, norm=norm) - want).max() <= 1e-5
