"""nanoGPT's ckpt.pt, built here from its documented layout, against transformers' GPT-2 with the same weights."""

import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from jaxgpt import UserError
from jaxgpt.models import bind
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.sharding import make_mesh
from jaxgpt.tokenizer import CharTokenizer, meta_for, write_meta
from jaxgpt.weights.nanogpt import open_checkpoint
from jaxgpt.weights.opening import placed_params

torch.set_num_threads(1)
CHARACTERS = "\n abcdefghijklm"
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 24, "block_size": 20, "vocab_size": len(CHARACTERS)}


def reference(gelu: str, *, bias: bool, seed: int = 0, **shape) -> GPT2LMHeadModel:
    """GPT-2 with weights that do something; without biases, zeros for them."""
    torch.manual_seed(seed)
    sizes = {k: shape[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=shape["block_size"], activation_function=gelu)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(p + 0.3 * torch.randn_like(p) if "ln_" in name or "bias" in name else 4 * p)
            if "bias" in name and not bias:
                p.zero_()
    return model


def checkpoint(model: GPT2LMHeadModel, *, bias: bool, prefix: str = "_orig_mod.", mask: bool = False, **shape) -> dict:
    """What nanoGPT's train.py hands to torch.save for a model with these weights."""
    state = {}
    for name, p in model.state_dict().items():
        matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        if bias or not name.endswith("bias"):
            state[prefix + name] = p.T.contiguous() if matrix else p
    t = shape["block_size"]
    for i in range(shape["n_layer"] if mask else 0):  # registered before PyTorch 2
        state[f"{prefix}transformer.h.{i}.attn.bias"] = torch.ones(t, t).tril().view(1, 1, t, t)
    weights = [torch.nn.Parameter(p) for p in state.values()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    optimizer.step()
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": shape | {"bias": bias, "dropout": 0.1},
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3, "compile": True, "device": "cpu"},
    }


def corpus(folder: Path, characters: str = CHARACTERS) -> str:
    """A corpus' folder with nanoGPT's meta.pkl."""
    folder.mkdir(parents=True, exist_ok=True)
    itos = dict(enumerate(characters))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return str(folder)


def our_logits(path: Path, data_dir: str | None, tokens: np.ndarray) -> np.ndarray:
    weights, _ = open_checkpoint(path, data_dir)
    config = GPTConfig(**weights.fields)
    params = weights.params(placed_params(config, make_mesh(devices=jax.devices()[:1])))
    return np.asarray(jax.jit(lambda p, x: bind(config, p)(x)[0])(params, tokens))


def their_logits(model: GPT2LMHeadModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@settings(max_examples=8, deadline=None)
@given(st.booleans(), st.booleans(), st.sampled_from(["", "_orig_mod."]), st.integers(0, 2**31), st.integers(1, 3))
def test_logits_equal_the_references(tmp_path_factory, bias, mask, prefix, seed, layers):
    folder, shape = tmp_path_factory.mktemp("nanogpt"), SHAPE | {"n_layer": layers}
    model = reference("gelu_new", bias=bias, seed=seed, **shape)
    torch.save(checkpoint(model, bias=bias, prefix=prefix, mask=mask, **shape), folder / "ckpt.pt")
    tokens = np.random.default_rng(seed).integers(0, len(CHARACTERS), (2, 20))
    logits = our_logits(folder, corpus(folder / "corpus"), tokens)
    np.testing.assert_allclose(logits, their_logits(model, tokens), rtol=0, atol=2e-5)


def test_nanogpts_exact_gelu_is_close_to_ours(tmp_path):
    """nanoGPT computes GELU by erf. The difference in units of the logits' spread: bfloat16's is some 0.005."""
    model = reference("gelu", bias=True, **SHAPE)
    torch.save(checkpoint(model, bias=True, **SHAPE), tmp_path / "ckpt.pt")
    tokens = np.random.default_rng(0).integers(0, len(CHARACTERS), (8, 20))
    ours, theirs = our_logits(tmp_path, corpus(tmp_path / "corpus"), tokens), their_logits(model, tokens)
    assert 1e-6 < np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std() < 2e-3
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_gpt2s_padded_vocabulary_is_cut_to_its_tokens(tmp_path):
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 8, "vocab_size": 50304}
    model = reference("gelu_new", bias=False, **shape)
    torch.save(checkpoint(model, bias=False, **shape), tmp_path / "ckpt.pt")
    weights, known = open_checkpoint(tmp_path / "ckpt.pt", None)
    assert (weights.meta.tokenizer, weights.meta.eot, weights.fields["vocab_size"]) == ("gpt2", 50256, 50257)
    assert known == {"iter_num": 250, "best_val_loss": 1.5}
    tokens = np.array([[50256, 0, 7, 50255]])
    logits = our_logits(tmp_path / "ckpt.pt", None, tokens)
    np.testing.assert_allclose(logits, their_logits(model, tokens)[..., :50257], rtol=0, atol=2e-5)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("the-code-ran"),))


def test_what_is_no_checkpoint_of_nanogpts_is_one_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sound = checkpoint(reference("gelu_new", bias=True, **SHAPE), bias=True, **SHAPE)
    data_dir, state = corpus(tmp_path / "corpus"), sound["model"]
    write_meta(tmp_path, meta_for(CharTokenizer("abc"), "char"))
    name = "_orig_mod.transformer.h.1.mlp.c_fc.weight"
    cases = [
        (sound, None, "a vocabulary of 15 is not GPT-2's; .* --data_dir=nanoGPT/data/shakespeare_char"),
        (sound, str(tmp_path), "vocabulary of 15 and .* one of 3 "),
        (state, data_dir, "no checkpoint of nanoGPT"),
        ([1], data_dir, "no checkpoint of nanoGPT"),
        (sound | {"model": [1]}, data_dir, "not a model's state"),
        (sound | {"model_args": SHAPE | {"n_layer": "2"}}, data_dir, "n_layer='2'"),
        (sound | {"model_args": SHAPE | {"n_layer": 3}}, data_dir, "h.2.ln_1.weight is missing"),
        (sound | {"model": {k: v for k, v in state.items() if k != name}}, data_dir, "h.1.mlp.c_fc.weight is missing"),
        (sound | {"model": state | {name: state[name].T}}, data_dir, "c_fc.weight has shape"),
        (sound | {"config": Evil()}, data_dir, "asks for code"),
    ]
    for content, folder, complaint in cases:
        torch.save(content, "ckpt.pt")
        with pytest.raises(UserError, match=complaint):
            open_checkpoint(Path("ckpt.pt"), folder)
    assert not Path("the-code-ran").exists()
    Path("ckpt.pt").write_bytes(Path("ckpt.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match="ckpt.pt is truncated or damaged"):
        open_checkpoint(Path("ckpt.pt"), data_dir)
    with pytest.raises(UserError, match="name nanoGPT's ckpt.pt"):
        open_checkpoint(tmp_path / "corpus", data_dir)
