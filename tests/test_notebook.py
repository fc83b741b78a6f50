"""What a notebook imports: `from jaxgpt import GPT, GPTConfig, load_model, generate`."""

import doctest
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgpt
from jaxgpt import UserError, notebook, sample, train
from jaxgpt.models import init_params, pure


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config):
    """The folder of a run, `out`, in a working folder of its own."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.train(tiny_config(out_dir="out"))
    return folder / "out"


@pytest.mark.parametrize("module", [jaxgpt, notebook])
def test_the_docstrings_examples_run(module, run, monkeypatch):
    monkeypatch.chdir(run.parent)
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 4


def test_importing_the_package_is_cheap():
    code = "import sys, jaxgpt; print(sorted({'jax', 'numpy', 'flax'} & set(sys.modules)), len(jaxgpt.__all__))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[] 5\n"
    with pytest.raises(AttributeError, match="no attribute 'generated'"):
        _ = jaxgpt.generated


def test_a_module_starts_as_init_params_does():
    config = jaxgpt.GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=20, bias=True)
    module, params = jaxgpt.GPT(config, rngs=nnx.Rngs(jax.random.key(7))), init_params(config, jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, pure(module), params)
    assert not np.any(params["wte"]["embedding"][20:])


def test_generate_writes_what_sample_prints(run, capsys):
    model = jaxgpt.load_model(str(run), dtype="float32")
    texts = jaxgpt.generate(model, "the ", max_new_tokens=30, num_samples=2, seed=5)
    arguments = [f"--out_dir={run}", "--start=the ", "--max_new_tokens=30", "--num_samples=2", "--seed=5"]
    sample.main([*arguments, "--dtype=float32"])
    assert capsys.readouterr().out == "".join(f"{text}\n{sample.SEPARATOR}\n" for text in texts)
    first = texts[0][4:]
    stopped = jaxgpt.generate(model, "the ", max_new_tokens=30, num_samples=2, seed=5, stop=first[3:5])[0]
    assert stopped == "the " + first.partition(first[3:5])[0]


def test_logits_are_the_modules(run):
    model = jaxgpt.load_model(str(run), dtype="float32", block_size=8)
    tokens = model.encode("the end")
    expected = model.module(jnp.array([tokens]))[0]
    np.testing.assert_allclose(model.logits("the end"), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model.logits([tokens, tokens])[1:], expected, rtol=1e-6, atol=1e-6)
    assert model.step == 8 and "val_loss" in model.info


def test_mistakes_are_user_errors(run):
    model = jaxgpt.load_model(str(run))
    for make, complaint in (
        (lambda: jaxgpt.load_model("nowhere"), "nowhere is neither"),
        (lambda: jaxgpt.load_model(str(run), block_size=99), "block_size=99 is more than the 16"),
        (lambda: jaxgpt.generate(model, ""), "has no tokens"),
        (lambda: jaxgpt.generate(model, "ÄÖ"), "lacks"),
        (lambda: jaxgpt.generate(model, max_new_tokens=0), "max_new_tokens=0"),
        (lambda: jaxgpt.generate(model, "a", temperature=-1.0), "temperature=-1.0"),
    ):
        with pytest.raises(UserError, match=complaint):
            make()


def test_types_are_there_for_checkers():
    """py.typed says so; every name of the package resolves, and functions say what they return."""
    for name in ("load_model", "generate"):
        assert "return" in typing.get_type_hints(getattr(jaxgpt, name))
