"""GPT-2's weights in and out, against transformers' GPT2LMHeadModel."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from safetensors.torch import load_file, save_file, save_model
from tiktoken.load import read_file_cached
from torch.torch_version import TorchVersion
from transformers import GPT2Config, GPT2LMHeadModel

from jaxgpt import UserError
from jaxgpt.models import bind
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.sharding import make_mesh
from jaxgpt.tokenizer import GPT2_URL
from jaxgpt.weights import hf
from jaxgpt.weights.files import save_safetensors
from jaxgpt.weights.opening import open_model, placed_params

torch.set_num_threads(1)  # the models are too small for more, and waiting threads take the cores from JAX
EOT = 0


def random_gpt2(seed: int = 0, **sizes) -> GPT2LMHeadModel:
    """A GPT-2 whose biases are not zero and whose layer norms do something, so that nothing can be left out unseen."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24, "vocab_size": 131, "n_positions": 40} | sizes
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=EOT, eos_token_id=EOT)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(p + 0.3 * torch.randn_like(p) if "ln_" in name or "bias" in name else 4 * p)
    return model


def write(model: GPT2LMHeadModel, folder: Path, kind: str) -> Path:
    """`model` in `folder` as one of the kinds of files that people have."""
    model.save_pretrained(folder, max_shard_size="20KB" if kind == "sharded" else "1GB")
    if kind in ("bin", "legacy bin"):
        (folder / "model.safetensors").unlink()
        state = dict(model.state_dict())  # with lm_head, tied
        if kind == "legacy bin":  # as OpenAI's were: no prefix, no head, the causal mask as buffers
            state = {k.removeprefix("transformer."): v for k, v in state.items() if k != "lm_head.weight"}
            t = model.config.n_positions
            for i in range(model.config.n_layer):
                state[f"h.{i}.attn.bias"] = torch.tril(torch.ones(t, t, dtype=torch.uint8)).view(1, 1, t, t)
                state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    return folder


def load(folder: Path, mesh=None, **changes):
    weights = hf.open_weights(str(folder))
    config = GPTConfig(**(weights.fields | changes))
    return config, weights.params(placed_params(config, mesh or make_mesh(devices=jax.devices()[:1])))


def logits(config, params, tokens) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, x: bind(config, p)(x)[0])(params, jnp.asarray(tokens)))


def torch_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


sizes = st.fixed_dictionaries(
    {
        "n_layer": st.integers(1, 3),
        "n_head": st.sampled_from([1, 2, 3]),
        "n_embd": st.sampled_from([12, 24, 48]),
        "vocab_size": st.integers(2, 300),
        "n_positions": st.integers(2, 40),
    }
)


@settings(max_examples=5, deadline=None)
@given(sizes, st.integers(0, 2**31), st.sampled_from(["safetensors", "sharded", "bin", "legacy bin"]))
def test_logits_equal_transformers(tmp_path_factory, sizes, seed, kind):
    model = random_gpt2(seed, **sizes)
    config, params = load(write(model, tmp_path_factory.mktemp("hf"), kind))
    tokens = np.random.default_rng(seed).integers(0, sizes["vocab_size"], (2, sizes["n_positions"]))
    np.testing.assert_allclose(logits(config, params, tokens), torch_logits(model, tokens), rtol=0, atol=2e-5)


def test_bfloat16_agrees_to_its_precision(tmp_path):
    """bfloat16 keeps 8 bits. The error in units of the logits' spread, here and in transformers' own bfloat16."""
    model = random_gpt2(3, n_layer=4, n_embd=48)
    config, params = load(write(model, tmp_path / "hf", "safetensors"), dtype="bfloat16")
    tokens = np.random.default_rng(3).integers(0, 131, (4, 40))
    exact = torch_logits(model, tokens)
    ours = np.sqrt(np.mean((logits(config, params, tokens) - exact) ** 2)) / exact.std()
    theirs = np.sqrt(np.mean((torch_logits(model.bfloat16(), tokens) - exact) ** 2)) / exact.std()
    assert ours < 0.01
    assert ours < 1.2 * theirs


def test_greedy_continuations_of_200_tokens_are_identical(tmp_path):
    model = random_gpt2(5, n_positions=208, n_embd=48, n_layer=3)
    with torch.no_grad():  # positions that matter keep it from saying one thing over and over
        model.transformer.wpe.weight.mul_(20)
    config, params = load(write(model, tmp_path / "hf", "safetensors"))
    prompt = np.random.default_rng(5).integers(1, 131, (4, 8))
    step = jax.jit(lambda p, x, n: bind(config, p)(x)[0][:, n - 1].argmax(-1))
    tokens = np.pad(prompt, ((0, 0), (0, 200)))
    for n in range(8, 208):
        tokens[:, n] = step(params, tokens, n)
    theirs = model.generate(
        torch.tensor(prompt), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=200, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, theirs.numpy())
    assert len(np.unique(tokens[:, 8:])) > 40, "a continuation that says one thing over and over shows little"


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_weights_land_on_the_shards_of_any_mesh(tmp_path, mesh):
    folder = write(random_gpt2(n_embd=32), tmp_path / "hf", "safetensors")
    mesh = make_mesh(*mesh)
    (_, here), (_, there) = load(folder), load(folder, mesh)
    jax.tree.map(np.testing.assert_array_equal, here, there)
    assert all(isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh for x in jax.tree.leaves(there))


def test_positions_can_be_cropped(tmp_path):
    model = random_gpt2()
    folder = write(model, tmp_path / "hf", "safetensors")
    ours = open_model(init_from=str(folder), mesh=make_mesh(devices=jax.devices()[:1]), dtype="float32", block_size=16)
    tokens = np.arange(16)[None]
    ours_logits = logits(ours.config, ours.params, tokens)
    np.testing.assert_allclose(ours_logits, torch_logits(model, tokens), rtol=0, atol=2e-5)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_there_and_back_is_exact_to_the_bit(tmp_path, dtype, kind):
    """Also for the numbers that arithmetic would change: negative zero and denormal numbers."""
    model = random_gpt2().to(getattr(torch, dtype))
    with torch.no_grad():
        odd = torch.tensor([-0.0, torch.finfo(model.dtype).tiny / 4, -torch.finfo(model.dtype).tiny / 8])
        for p in model.parameters():
            p.view(-1)[:3] = odd
    folder = write(model, tmp_path / "hf", kind)
    config, params = load(folder)
    hf.save_weights(tmp_path, params, vars(config), dtype=dtype, eot=EOT)
    back = load_file(tmp_path / "model.safetensors")
    expected = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert back.keys() == expected.keys()
    for name, value in expected.items():
        assert back[name].dtype == value.dtype and back[name].shape == value.shape
        np.testing.assert_array_equal(bits(back[name]), bits(value), err_msg=name)


def test_weights_can_be_read_by_whoever_can_read_other_files(tmp_path):
    """A server is often another user."""
    (tmp_path / "other").touch()
    for _ in range(2):
        save_safetensors(tmp_path / "weights", {"x": np.zeros(3, np.float32)})
        assert (tmp_path / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_too_large_for_float16_is_an_error_and_not_infinity(tmp_path):
    config, params = load(write(random_gpt2(), tmp_path / "hf", "safetensors"))
    params["ln_f"]["scale"] = params["ln_f"]["scale"].at[3].set(1e5)
    with pytest.raises(UserError, match="ln_f.weight has values too large for float16"):
        hf.save_weights(tmp_path, params, vars(config), dtype="float16", eot=None)
    assert not (tmp_path / "model.safetensors").exists()


# --- what is refused ---


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write(random_gpt2(), tmp_path_factory.mktemp("hf") / "sound", "safetensors")


def copy_of(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "hf", dirs_exist_ok=True))


NAMES = sorted(
    f"transformer.{name}" for name in hf._table(dict(n_embd=24, vocab_size=131, block_size=40, n_layer=2, bias=True))
)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(["missing", "renamed", "grown", "flattened", "integers", "twice"]))
def test_every_tensor_is_accounted_for_by_name(sound, tmp_path_factory, name, damage):
    folder = copy_of(sound, tmp_path_factory.mktemp("damaged"))
    tensors = load_file(folder / "model.safetensors")
    value = tensors.pop(name)
    if damage != "missing":
        named = {"renamed": name + "_", "twice": name.removeprefix("transformer.")}.get(damage, name)
        changed = {"grown": torch.cat([value, value]), "flattened": value[None], "integers": value.to(torch.int32)}
        tensors[named] = changed.get(damage, value)
        if damage == "twice":
            tensors[name] = value.clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        hf.open_weights(str(folder))
    assert name.removeprefix("transformer.") in str(error.value)


def change(folder: Path, *, remove=(), add=None, **config) -> Path:
    """Changes a folder's tensors and config.json: names to remove, tensors to add, values to set (Ellipsis removes)."""
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in remove} | (add or {})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    new = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in new.items() if v is not ...}))
    return folder


WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


def as_saved_by_save_model(folder: Path, table: torch.Tensor) -> None:
    """Of tied tensors it keeps lm_head.weight."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    assert WTE not in load_file(folder / "model.safetensors")


# What others write that computes the same. transformers must read each alike, or the test says nothing.
SAME_FUNCTION = {
    "save_model": as_saved_by_save_model,
    "head twice": lambda f, table: change(f, add={HEAD: table}),
    "untied flag, equal head": lambda f, table: change(f, add={HEAD: table}, tie_word_embeddings=False),
    "no flag": lambda f, table: change(f, tie_word_embeddings=...),
    "prefixed head": lambda f, table: change(f, add={"transformer.lm_head.weight": table}),
    "other heads": lambda f, table: change(
        f, add={"multiple_choice_head.summary.weight": torch.ones(1, 24), "score.weight": torch.ones(2, 24)}
    ),
    "masks": lambda f, table: change(f, add={"transformer.h.0.attn.bias": torch.ones(1, 1, 40, 40).tril()}),
    "n_inner": lambda f, table: change(f, n_inner=4 * 24),
    "n_ctx": lambda f, table: change(f, n_ctx=1024),
    "upcast": lambda f, table: change(f, reorder_and_upcast_attn=True),
    "eos list": lambda f, table: change(f, eos_token_id=[EOT, EOT]),
    "float64": lambda f, table: change(
        f, add={k: v.double() for k, v in load_file(f / "model.safetensors").items()}, dtype="float32"
    ),
    "other names": lambda f, table: change(
        f, n_embd=..., n_positions=..., n_head=..., n_layer=..., hidden_size=24, max_position_embeddings=40,
        num_attention_heads=2, num_hidden_layers=2,
    ),
    "default n_head": lambda f, table: change(f, n_head=...),  # 12, whatever it was trained with
    **{
        gelu: partial(lambda f, table, gelu: change(f, activation_function=gelu), gelu=gelu)
        for gelu in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME_FUNCTION)
def test_what_computes_the_same_is_read_as_transformers_reads_it(sound, tmp_path, kind):
    folder = copy_of(sound, tmp_path)
    SAME_FUNCTION[kind](folder, load_file(folder / "model.safetensors")[WTE].clone())
    tokens = np.arange(40)[None]
    config, params = load(folder)
    theirs = torch_logits(GPT2LMHeadModel.from_pretrained(folder).eval(), tokens)
    np.testing.assert_allclose(logits(config, params, tokens), theirs, rtol=0, atol=2e-5)
    assert hf.open_weights(str(folder)).meta.eot == EOT


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"add": {HEAD: torch.ones(131, 24)}}, "lm_head.weight differs"),
        ({"add": {HEAD: torch.ones(131, 24)}, "remove": [WTE], "tie_word_embeddings": False}, "wte.weight is missing"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False, but lm_head.weight is missing"),
        ({"remove": [WTE]}, "wte.weight is missing"),
        ({"num_hidden_layers": 1}, "n_layer=2 contradicts num_hidden_layers=1"),
        ({"n_head": 5}, "n_embd=24 is not divisible by n_head=5"),
        ({"n_layer": ...}, "h.2.ln_1.weight is missing"),  # GPT-2's 12
        ({"n_layer": 10**9}, "n_layer=1000000000, but only 28 tensors are stored"),
        ({"add": {"transformer.h.0.attn.lora_A": torch.ones(2, 2)}}, "lora_A is no tensor of GPT-2"),
        ({"add": {"_orig_mod.transformer.wte.weight": torch.ones(131, 24)}, "remove": [WTE]}, "_orig_mod"),
    ],
)
def test_what_is_another_function_is_refused_by_name(sound, tmp_path, changes, complaint):
    folder = change(copy_of(sound, tmp_path), **changes)
    with pytest.raises(UserError, match=complaint):
        hf.open_weights(str(folder))


def test_an_adapter_is_not_left_out(sound, tmp_path):
    folder = copy_of(sound, tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="has an adapter"):
        hf.open_weights(str(folder))


@pytest.mark.parametrize("ids, eot", [([7, 7], 7), ([7], 7), ([7, 8], None), ([], None), (None, None), (131, None)])
def test_an_end_of_text_is_one_id(sound, tmp_path, ids, eot):
    assert hf.open_weights(str(change(copy_of(sound, tmp_path), eos_token_id=ids))).meta.eot == eot


def test_only_gpt2s_own_vocabulary_is_taken_for_gpt2s(tmp_path, gpt2_files):
    """As transformers wrote it for years: vocab.json and merges.txt, no tokenizer.json."""
    folder = write(random_gpt2(vocab_size=50257, n_embd=4, n_layer=1), tmp_path / "hf", "safetensors")
    vocabulary, merges = (read_file_cached(GPT2_URL + name, None).decode() for name in ("encoder.json", "vocab.bpe"))

    def tokenizer() -> str:
        return hf.open_weights(str(folder)).meta.tokenizer

    assert tokenizer() == "gpt2", "OpenAI's weights come without"
    ids = json.loads(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(dict(reversed(ids.items())), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(merges.rstrip("\n"), encoding="utf-8")
    assert tokenizer() == "gpt2"
    (folder / "merges.txt").write_text(merges.replace("Ġ t\n", "t Ġ\n", 1), encoding="utf-8")
    assert tokenizer() == "tokenizer.json"
    (folder / "merges.txt").unlink()
    (folder / "vocab.json").write_text(json.dumps(ids | {"Ġthe": ids["Ġa"], "Ġa": ids["Ġthe"]}))
    assert tokenizer() == "tokenizer.json"
    with pytest.raises(UserError, match="vocab.json is not GPT-2's, and there is no tokenizer.json"):
        _ = open_model(init_from=str(folder), mesh=make_mesh()).tokenizer
    (folder / "vocab.json").write_text("[")
    assert tokenizer() == "tokenizer.json"


@pytest.mark.parametrize("kind", ["bin", "legacy bin"])
def test_parameters_are_read_like_tensors(tmp_path, kind):
    """torch.save(dict(model.named_parameters())) pickles nn.Parameter, which asks for its gradient."""
    model = random_gpt2()
    folder = write(model, tmp_path / "hf", kind)
    state = {name: torch.nn.Parameter(p) for name, p in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    config, params = load(folder)
    tokens = np.arange(40)[None]
    np.testing.assert_allclose(logits(config, params, tokens), torch_logits(model, tokens), rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "kind, make",
    [
        ("sparse_coo", lambda t: t.to_sparse()),
        ("sparse_csr", lambda t: t.to_sparse_csr()),
        ("meta", lambda t: t.to("meta")),
        ("nested", lambda t: torch.nested.nested_tensor([t, t])),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta:UserWarning")
def test_tensors_without_dense_values_are_one_error(tmp_path, kind, make):
    folder = write(random_gpt2(), tmp_path / "hf", "bin")
    state = torch.load(folder / "pytorch_model.bin")
    torch.save(state | {WTE: make(state[WTE])}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"transformer.wte.weight is a {kind} tensor; only dense"):
        hf.open_weights(str(folder))


@pytest.mark.parametrize("version", ["2.5.1", "2.9.1+cu128"])
def test_a_torch_whose_unpickler_can_be_escaped_is_refused(tmp_path, monkeypatch, version):
    folder = write(random_gpt2(), tmp_path / "hf", "bin")
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with pytest.raises(UserError, match=rf"torch {re.escape(version)} cannot read one safely; run: pip install"):
        hf.open_weights(str(folder))


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "llama"), ("activation_function", "gelu"), ("activation_function", "relu"), ("n_inner", 100),
        ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("layer_norm_epsilon", 1e-6),
        ("add_cross_attention", True), ("tie_word_embeddings", None), ("quantization_config", {"bits": 8}),
        ("n_layer", 0), ("n_embd", "24"), ("vocab_size", None),
    ],
)  # fmt: skip
def test_only_gpt2_is_accepted(sound, tmp_path, key, value):
    folder = copy_of(sound, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=key):
        hf.open_weights(str(folder))


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(0, 200))
KEYS = [*hf.OUR_ARCHITECTURE, *hf.GPT2_SMALL, *hf.OTHER_NAMES.values(), "n_inner", "eos_token_id"]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_whatever_config_json_says_is_read_or_one_error(sound, tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("config")
    (folder / "model.safetensors").symlink_to(sound / "model.safetensors")
    config = json.loads((sound / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    try:
        assert hf.open_weights(str(folder)).fields["vocab_size"] == 131
    except UserError as error:
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["safetensors", "bin", "legacy bin"]))
def test_a_truncated_file_is_one_error(sound, tmp_path_factory, share, kind):
    folder = write(random_gpt2(n_layer=1), tmp_path_factory.mktemp("cut") / "hf", kind)
    path = folder / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=path.name):
        hf.open_weights(str(folder))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("the-code-ran"),))


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_code_in_a_pickle_is_refused_and_does_not_run(sound, tmp_path, monkeypatch, how, protocol):
    monkeypatch.chdir(tmp_path)
    folder = copy_of(sound, tmp_path)
    (folder / "model.safetensors").unlink()
    if how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Evil()}, protocol=protocol))
    else:
        torch.save({"wte.weight": Evil()}, folder / "pytorch_model.bin", pickle_protocol=protocol)
    with pytest.raises(UserError, match="pytorch_model.bin is damaged, or asks for code"):
        hf.open_weights(str(folder))
    assert not Path("the-code-ran").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe", "[" * 100_000])
def test_a_damaged_config_is_one_error(sound, tmp_path, text):
    folder = copy_of(sound, tmp_path)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="config.json"):
        hf.open_weights(str(folder))


def test_a_missing_or_hostile_index_is_one_error(tmp_path):
    folder = write(random_gpt2(), tmp_path / "hf", "sharded")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["transformer.ln_f.weight"]
    for name, complaint in (("gone.safetensors", "gone.safetensors is missing"), ("../x", "no index"), (3, "no index")):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {"transformer.ln_f.weight": name}}))
        with pytest.raises(UserError, match=complaint):
            hf.open_weights(str(folder))
    (folder / shard).unlink()
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{shard} is missing"):
        hf.open_weights(str(folder))
    index.unlink()
    with pytest.raises(UserError, match="has no weights"):
        hf.open_weights(str(folder))


def test_a_missing_library_is_one_error(sound, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"model.safetensors needs safetensors; run: pip install 'jaxgpt\[hf\]'"):
        hf.open_weights(str(sound))


def test_a_name_that_cannot_be_had_is_one_error(tmp_path):
    """In a process that has imported nothing but what jaxgpt imports."""
    code = (
        "import sys; from jaxgpt.cli import run_main; from jaxgpt.weights import hf; "
        "run_main(lambda names: hf.open_weights(*names))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    for name, said in (("gpt2-medium", "gpt2-medium cannot be fetched"), ("gpt3", "gpt3 is neither")):
        done = subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1


def test_a_name_is_fetched_from_openais_folder_of_the_hub(sound, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.append(name) or str(sound))
    assert hf.open_weights("gpt2-xl").fields["n_embd"] == 24
    assert asked == ["openai-community/gpt2-xl"]
