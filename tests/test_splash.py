"""Attention of TPUs, interpreted, against its plain twin: values and gradients, in models and on meshes too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_ops import assert_close, normal

from jaxgpt.models import find_model, init_params
from jaxgpt.ops import paths, splash
from jaxgpt.ops.attention import attention
from jaxgpt.sharding import BATCH_AXES, device_map, make_mesh
from jaxgpt.step import loss_fn

DOCS = np.stack([np.arange(128) // 50, np.arange(128) // 7])


def with_gradients(f, *args):
    y, vjp = jax.vjp(f, *args)
    return y, *vjp(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))


@pytest.mark.parametrize(
    ("time", "heads", "kv_heads", "size", "dtype", "docs", "window", "scale"),
    [
        (128, 2, 2, 64, "float32", None, None, None),
        (128, 4, 2, 64, "float32", DOCS, 33, 0.12),
        (128, 1, 1, 128, "bfloat16", DOCS, None, None),
        (1280, 1, 1, 16, "float32", None, 300, None),  # several blocks of keys, and of queries
    ],
)
def test_it_equals_its_plain_twin(time, heads, kv_heads, size, dtype, docs, window, scale):
    docs = None if docs is None else jnp.asarray(docs)
    q = normal(0, 2, time, heads, size, dtype=dtype)
    k, v = (normal(i, 2, time, kv_heads, size, dtype=dtype) for i in (1, 2))
    got, want = (
        jax.jit(
            functools.partial(
                with_gradients,
                functools.partial(attention, implementation=implementation, docs=docs, window=window, scale=scale),
            )
        )(q, k, v)
        for implementation in ("splash", "xla")
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, dtype, 4)


@pytest.mark.parametrize("shape", [(1, 100, 2, 64), (1, 128, 3, 64)])
def test_other_shapes_and_dropout_take_the_twin(shape):
    assert not splash.supports(shape, 2)
    q, k = normal(0, 1, 128, 2, 16), normal(1, 1, 128, 2, 16)
    with paths.watch() as taken:
        attention(q, k, k, implementation="splash", rate=0.2, seed=jnp.uint32(1))
    assert taken == {"attention": {"plain"}}


def test_without_the_library_the_twin_runs(monkeypatch):
    monkeypatch.setattr(splash, "LIBRARY", "jax.no_such_library")
    splash.available.cache_clear()
    try:
        assert not splash.supports((1, 128, 2, 64), 2)
    finally:
        splash.available.cache_clear()


@pytest.mark.parametrize("sizes", [(2, 1, 4), (4, 2, 1)])
def test_each_device_its_rows_and_heads(sizes):
    mesh = make_mesh(*sizes)
    q, k, v = (normal(i, 8, 128, 4, 16) for i in range(3))
    docs = jnp.tile(jnp.asarray(DOCS), (4, 1))
    f = functools.partial(attention, implementation="splash")
    split = device_map(lambda q, k, v, docs: f(q, k, v, docs=docs), mesh, (P(BATCH_AXES),) * 4, P(BATCH_AXES))
    got = jax.jit(lambda *args: with_gradients(lambda *a: split(*a, docs), *args))(q, k, v)
    want = with_gradients(functools.partial(attention, docs=docs), q, k, v)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, "float32", 4)


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_models_compute_the_same(name):
    config = find_model(name).config(
        block_size=128,
        vocab_size=27,
        n_layer=1,
        n_head=2,
        n_embd=32,
        doc_mask=3,
        **({"zero_init": False, "value_embeds": 0} if name == "modern" else {}),
    )
    params = init_params(config, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 27, (2, 129)), jnp.int32)
    (loss, grads), (twin_loss, twin_grads) = (
        jax.jit(jax.value_and_grad(functools.partial(loss_fn, dataclasses.replace(config, attention=path))))(
            params, tokens
        )
        for path in ("splash", "xla")
    )
    assert float(loss) == pytest.approx(float(twin_loss), abs=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), grads, twin_grads)
