"""`python -m jaxgpt.convert`: folders that transformers opens, and runs made of such folders."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from jaxgpt import UserError, convert, train
from jaxgpt.config import default_config, save_config
from jaxgpt.decoding import Generator, Sampling
from jaxgpt.models import bind, init_params
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.sharding import make_mesh
from jaxgpt.tokenizer import CharTokenizer, Meta, meta_for, read_meta, write_meta
from jaxgpt.weights.opening import open_model

torch.set_num_threads(1)  # the models are too small for more, and waiting threads take the cores from JAX
ROOT = Path(__file__).parents[1]
GREEDY = Sampling(temperature=0.0)
TEXT = """How doth the little crocodile
Improve his shining tail,
And pour the waters of the Nile
On every golden scale!
"""


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    """A random GPT-2 that does not repeat itself, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("hf")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT * 5], vocab_size=300, special_tokens=["<|endoftext|>"])
    size = bpe.get_vocab_size()
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=size, n_positions=64, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(p + 0.3 * torch.randn_like(p) if "ln_" in name or "bias" in name else 4 * p)
        model.transformer.wpe.weight.mul_(20)
    model.save_pretrained(folder)
    bpe.save(str(folder / "tokenizer.json"))
    return folder


def make_run(folder: Path, tokenizer, name: str, *, bias: bool, checkpoints=((1, 1.0),)) -> GPTConfig:
    """A run's folder as train leaves it; checkpoint n holds parameters drawn with key n."""
    folder.mkdir()
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, "bias": bias}
    config = default_config()
    config.update(shape)
    save_config(config, folder)
    write_meta(folder, meta_for(tokenizer, name))
    gpt = GPTConfig(**shape, vocab_size=tokenizer.vocab_size)
    store = Checkpoints(folder)
    for step, loss in checkpoints:
        params = jax.tree.map(lambda x: 5 * x, init_params(gpt, jax.random.key(step)))
        store.save(step, {"params": params, "opt_state": jnp.ones(3)}, {"val_loss": loss})
        assert store.wait()
    return gpt


def our_logits(model, tokens) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, x: bind(model.config, p)(x)[0])(model.params, jnp.asarray(tokens)))


def their_logits(folder: Path, tokens) -> np.ndarray:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(tokens)).logits.float().numpy()


def test_hf_to_run_to_hf_is_exact_and_generates_the_same(hf_folder, tmp_path):
    run, back = tmp_path / "run", tmp_path / "back"
    convert.main([f"--from_hf={hf_folder}", f"--out_dir={run}"])
    convert.main([f"--out_dir={run}", f"--to_hf={back}"])
    before, after = load_file(hf_folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name].view(torch.int32), after[name].view(torch.int32), err_msg=name)
    config = json.loads((hf_folder / "config.json").read_text())
    for key, value in json.loads((back / "config.json").read_text()).items():
        assert config[key] == value or "pdrop" in key, key

    tokenizer, theirs = AutoTokenizer.from_pretrained(back), AutoModelForCausalLM.from_pretrained(back)
    ours = open_model(str(run), mesh=make_mesh(), dtype="float32")
    prompt = ours.tokenizer.encode("the golden")
    assert tokenizer("the golden").input_ids == prompt
    generated = Generator(ours.config, ours.params)(prompt, 50, key=jax.random.key(0), sampling=GREEDY)
    tokens = np.concatenate(list(generated), axis=1)[0].tolist()
    ids = torch.tensor([prompt])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert prompt + tokens == expected[0].tolist()
    assert len(set(tokens)) > 10


def test_a_character_run_opens_in_transformers(tmp_path):
    """Without biases, which GPT-2 has: as zeros."""
    tokenizer = CharTokenizer(sorted(set(TEXT)))
    make_run(tmp_path / "run", tokenizer, "char", bias=False)
    convert.main([f"--out_dir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'hf'}"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
    tokens = np.array([tokenizer.encode(TEXT[:24])])
    model = open_model(str(tmp_path / "run"), mesh=make_mesh(), dtype="float32")
    np.testing.assert_allclose(their_logits(tmp_path / "hf", tokens), our_logits(model, tokens), rtol=2e-5, atol=2e-5)
    again = open_model(init_from=str(tmp_path / "hf"), mesh=make_mesh(), dtype="float32")
    np.testing.assert_allclose(our_logits(again, tokens), our_logits(model, tokens), rtol=2e-5, atol=2e-5)
    assert again.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)


def test_gpt2s_tokenizer_goes_along(gpt2_files, tmp_path):
    from jaxgpt.tokenizer import gpt2

    make_run(tmp_path / "run", gpt2(), "gpt2", bias=True)
    convert.main([f"--out_dir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'hf'}", "--dtype=bfloat16"])
    text = "Hello  world, it's 1234 \n\n  naïve 日本 🦀<|endoftext|> don't\t" + TEXT
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(text).input_ids == gpt2().encode(text, special=True)
    assert theirs.decode(gpt2().encode(text, special=True)) == text
    assert (theirs.eos_token_id, AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype) == (50256, torch.bfloat16)


@pytest.mark.parametrize("which, step", [("best", 1), ("2", 2)])
def test_the_checkpoint_asked_for_is_the_one_written(tmp_path, which, step):
    tokenizer = CharTokenizer("abc")
    config = make_run(tmp_path / "run", tokenizer, "char", bias=True, checkpoints=((1, 1.0), (2, 1.5)))
    convert.main([f"--out_dir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={which}"])
    expected = 5 * init_params(config, jax.random.key(step))["wte"]["embedding"][:3]
    written = load_file(tmp_path / "hf" / "model.safetensors")["transformer.wte.weight"]
    np.testing.assert_array_equal(written, expected)


def test_of_several_processes_the_first_does_the_work(hf_folder, tmp_path, monkeypatch):
    launcher = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for rank, done in (("1", False), ("0", True)):
        for name, value in {**launcher, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        convert.main([f"--from_hf={hf_folder}", f"--out_dir={tmp_path / 'run'}"])
        assert (tmp_path / "run").exists() == done


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "--out_dir"),
        (["--out_dir=new"], "either --from_hf"),
        (["--out_dir=new", "--from_hf=hf", "--to_hf=x"], "either --from_hf"),
        (["--out_dir=taken", "--from_hf=hf"], "taken exists already"),
        (["--out_dir=file", "--from_hf=hf"], "file exists already"),
        (["--out_dir=new", "--from_hf=run"], "run is a jaxgpt run already"),
        (["--out_dir=hf", "--to_hf=new"], "hf is a Hugging Face model already"),
        (["--out_dir=new", "--from_hf=nowhere"], "nowhere"),
        (["--out_dir=new", "--from_hf=cut"], "model.safetensors is truncated"),
        (["--out_dir=new", "--from_hf=llama"], "model_type='llama'"),
        (["--out_dir=run", "--to_hf=hf"], "hf exists already"),
        (["--out_dir=run", "--to_hf=new", "--dtype=int8"], "int8"),
        (["--out_dir=run", "--to_hf=new", "--dtype=float16"], "too large for float16"),
        (["--out_dir=run", "--to_hf=new", "--checkpoint=7"], "no checkpoint 7"),
        (["--out_dir=run", "--to_hf=file/new"], "cannot write"),
    ],
)
def test_mistakes_are_one_error_and_change_nothing(hf_folder, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "cut", "llama", "taken"):
        Path(name).mkdir()
        for file in hf_folder.iterdir():
            (Path(name) / file.name).write_bytes(file.read_bytes())
    Path("cut/model.safetensors").write_bytes(Path("cut/model.safetensors").read_bytes()[:-5])
    Path("llama/config.json").write_text('{"model_type": "llama"}')
    Path("file").touch()
    config = make_run(Path("run"), CharTokenizer("abc"), "char", bias=True, checkpoints=())
    store, params = Checkpoints("run"), init_params(config, jax.random.key(0))
    params["h"][0]["ln_1"]["scale"] = params["h"][0]["ln_1"]["scale"].at[0].set(1e6)
    store.save(1, {"params": params}, {})
    assert store.wait()
    before = everything(tmp_path)
    with pytest.raises(UserError, match=complaint):
        convert.main(arguments)
    assert everything(tmp_path) == before
    assert not Path("new").exists() and not Path("new.partial").exists()


def test_a_model_without_a_tokenizer_converts_and_says_what_is_missing(hf_folder, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((hf_folder / name).read_bytes())
    convert.main([f"--from_hf={folder}", f"--out_dir={tmp_path / 'run'}"])
    meta = read_meta(tmp_path / "run")
    assert isinstance(meta, Meta) and meta.tokenizer == "tokenizer.json"
    model = open_model(str(tmp_path / "run"), mesh=make_mesh())
    assert model.params["wte"]["embedding"].shape[0] % 128 == 0
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        _ = model.tokenizer
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        convert.main([f"--out_dir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'back'}"])
    assert not (tmp_path / "back").exists()


def test_fine_tuning_a_converted_model_runs_end_to_end_and_its_loss_falls(hf_folder, tmp_path, monkeypatch):
    """nanoGPT's fine-tuning preset, on its weights, its tokenizer and its text; only as small as they are."""
    monkeypatch.chdir(tmp_path)
    convert.main([f"--from_hf={hf_folder}", "--out_dir=start"])
    tokenizer = open_model("start", mesh=make_mesh()).tokenizer
    (tmp_path / "corpus").mkdir()
    meta = read_meta(tmp_path / "start")
    assert meta is not None
    write_meta(tmp_path / "corpus", meta)
    (tmp_path / "corpus" / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    for split in ("train", "val"):
        np.array(tokenizer.encode(TEXT * 20), np.uint16).tofile(tmp_path / "corpus" / f"{split}.bin")
    sizes = ["block_size=32", "eval_iters=4", "max_iters=10", "learning_rate=0.003", "data_dir=corpus"]
    argv = [f"--config={ROOT}/configs/finetune_shakespeare.py:start", *(f"--config.{s}" for s in sizes)]
    assert train.main([*argv, "--config.out_dir=tuned"]) == 0
    rows = [json.loads(line) for line in Path("tuned/metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5
    tuned = open_model("tuned", mesh=make_mesh())
    assert (tuned.config.n_layer, tuned.config.block_size, tuned.run_config.n_embd) == (2, 32, 32)
    assert tuned.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    with pytest.raises(UserError, match="n_layer=3 contradicts the weights of start"):
        train.main([*argv, "--config.out_dir=other", "--config.n_layer=3"])
    assert not Path("other").exists()
