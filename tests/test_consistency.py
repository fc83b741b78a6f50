"""Whether a model file agrees with itself: check_consistency."""

from pathlib import Path

import jax
import pytest

from jaxgpt import UserError
from jaxgpt.config import default_config, resolve
from jaxgpt.sharding import make_mesh
from jaxgpt.tools.consistency import check_consistency

ROOT = Path(__file__).parents[1]


def model_of(name: str, **values):
    config = default_config(name)
    config.update({"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 16, "dtype": "bfloat16"} | values)
    return resolve(config, make_mesh(1, 1, 1, devices=jax.devices()[:1]), 65).model


def changed(folder: Path, *changes: tuple[str, str]) -> str:
    """A copy of gpt2.py with these changes."""
    source = (ROOT / "jaxgpt" / "models" / "gpt2.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / "mine.py").write_text(source)
    return str(folder / "mine.py")


@pytest.mark.parametrize(
    "name, values",
    [
        ("gpt2", {"dropout": 0.2, "bias": True, "remat": "block"}),
        ("gpt2", {"block_size": 3}),
        ("modern", {"value_embeds": 1}),
        ("tests/models/stranger.py", {}),
    ],
)
def test_ours_agree(name, values, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check_consistency(model_of(name, **values)) == []


CAP = '"columns": c.vocab_size,', '"columns": c.vocab_size, "softcap": 30.0,'
LOSS_CAP = "targets.reshape(-1), vocab_size", "targets.reshape(-1), softcap=30.0, vocab_size"


@pytest.mark.parametrize(
    "change",
    [
        LOSS_CAP,
        ("        x, _ = self.hidden(tokens, seed=seed)\n", "        x = 1.1 * self.hidden(tokens, seed=seed)[0]\n"),
    ],
)
def test_a_loss_that_is_not_of_the_logits_is_said(tmp_path, change):
    (line,) = check_consistency(model_of(changed(tmp_path, change)))
    assert "mine.py: `loss` gives" in line and "where the cross-entropy of its `logits`" in line


@pytest.mark.parametrize(
    "change",
    [
        ("            y, cache = cached_attention(", "            y, cache = lambda_attention("),
        ("KVCache(tuple(layers_k), tuple(layers_v), docs, cache.length + time)",
         "KVCache(tuple(layers_k), tuple(layers_v), docs, cache.length)"),
        ("start = jnp.zeros((), jnp.int32) if cache is None else cache.length", "start = jnp.zeros((), jnp.int32)"),
    ],
)  # fmt: skip
def test_a_cache_that_changes_the_logits_is_an_error(tmp_path, change):
    other = (
        "def lambda_attention(*a, **k):\n    y, cache = cached_attention(*a, **k)\n    return -y, cache\n\n\nclass MLP("
    )
    name = changed(tmp_path, change, ("class MLP(", other))
    with pytest.raises(UserError, match=r"mine\.py: with a cache the logits differ by up to .*; look at what `hidden`"):
        check_consistency(model_of(name))


def test_what_is_too_large_is_not_computed(tmp_path):
    name = changed(tmp_path)
    (line,) = check_consistency(model_of(name, n_layer=40, n_embd=2048))
    assert "is not computed with, for its" in line
