"""`python -m jaxgpt.convert`: folders that transformers opens, safetensors of our own names, and runs made of them."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from compiled import fresh_params, logits_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_nanogpt import SHAPE, checkpoint, corpus, reference
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from jaxgpt import Unavailable, UserError, convert, train
from jaxgpt.config import default_config, save_config
from jaxgpt.decoding import Generator, Sampling
from jaxgpt.keys import take
from jaxgpt.models import bind, find_model
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.sharding import make_mesh
from jaxgpt.tokenizer import CharTokenizer, Meta, meta_for, read_meta, write_meta
from jaxgpt.weights.opening import open_model

torch.set_num_threads(1)  # the models are too small for more, and waiting threads take the cores from JAX
ROOT = Path(__file__).parents[1]
GREEDY = Sampling(temperature=0.0)
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
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
        params = jax.tree.map(lambda x: 5 * x, fresh_params(gpt, jax.random.key(step)))
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


@pytest.mark.parametrize("text", ["Ünknown", "line\nö", "日本"])
def test_a_character_without_an_id_is_an_error_in_the_export_too(tmp_path, text):
    tokenizer = CharTokenizer(["\n", *sorted(set("Unkowlie"))])
    make_run(tmp_path / "run", tokenizer, "char", bias=False)
    convert.main([f"--out_dir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'hf'}"])
    with pytest.raises(UserError, match="lacks"):
        tokenizer.encode(text)
    with pytest.raises(Exception, match="WordLevel error"):  # the library raises nothing narrower
        AutoTokenizer.from_pretrained(tmp_path / "hf")(text)


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["a", "ab", "abc", "b ", ".", "\n"]), max_size=12).map("".join))
def test_words_are_exported_as_they_are_encoded(words_folder, text):
    tokenizer, theirs = words_folder
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory):
    """A vocabulary of words with an id without text, as a nanoGPT meta.pkl may have; of a text the longest counts."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = CharTokenizer(["a", "ab", "", "abc", "b ", ".", "\n", "b", " "])
    make_run(folder / "run", tokenizer, "words", bias=False)
    convert.main([f"--out_dir={folder / 'run'}", f"--to_hf={folder / 'hf'}"])
    return tokenizer, AutoTokenizer.from_pretrained(folder / "hf")


def test_the_exported_tokenizer_does_what_ours_does_and_no_more(hf_folder, tmp_path):
    """Its file asks for truncation, padding and an end-of-text token around each text: ours encodes none of it."""
    bpe = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    bpe.enable_truncation(4)
    bpe.enable_padding(length=10)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((hf_folder / name).read_bytes())
    bpe.save(str(folder / "tokenizer.json"))
    convert.main([f"--from_hf={folder}", f"--out_dir={tmp_path / 'run'}"])
    convert.main([f"--out_dir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'back'}"])
    ours = open_model(str(tmp_path / "run"), mesh=make_mesh()).tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert len(ours.encode(TEXT)) > 10 and theirs(TEXT).input_ids == ours.encode(TEXT)
    assert theirs(TEXT + "<|endoftext|>").input_ids == ours.encode(TEXT + "<|endoftext|>", special=True)


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
    expected = 5 * fresh_params(config, jax.random.key(step))["wte"]["embedding"][:3]
    written = load_file(tmp_path / "hf" / "model.safetensors")["transformer.wte.weight"]
    np.testing.assert_array_equal(written, expected)


# --- safetensors of our own names ---

BIGRAM = """
import dataclasses
import jax.numpy as jnp
import optax
from flax import nnx
from jaxgpt.keys import key
from jaxgpt.models import ModelConfig, Role

@dataclasses.dataclass(frozen=True)
class BigramConfig(ModelConfig):
    init_std: float = key(0.02, "standard deviation of the initial logits")
    ROLES = (Role("table/embedding", "head", decay=False), Role("scale", "vector", float32=True))
    def build(self, rngs):
        return Bigram(self, rngs=rngs)

class Bigram(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config, v = config, config.padded_vocab_size
        self.table = nnx.Embed(v, v, embedding_init=nnx.initializers.normal(config.init_std), rngs=rngs)
        self.scale = nnx.Param(jnp.full((), 1.1))
    def hidden(self, tokens, *, seed=None, cache=None):
        return self.table(tokens.reshape(-1)) * self.scale[...], cache
    def logits(self, x):
        return x.astype(jnp.float32)[..., : self.config.vocab_size]
    def loss(self, tokens, targets, *, seed=None):
        x, _ = self.hidden(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(x), targets.reshape(-1)).mean()
"""


def make_bigram_run(folder: Path, file: Path) -> None:
    """A run of a user's own model, with metrics."""
    file.write_text(BIGRAM)
    model, tokenizer = find_model(str(file)), CharTokenizer("abc \n")
    config = default_config(str(file))
    config.update(
        block_size=8, init_std=0.5, max_iters=20, dataset="mine", data_dir="/home/me", eval_tasks="x=/home/me"
    )
    folder.mkdir()
    save_config(config, folder, model_source=model.source, environment={"jaxgpt": "9.9", "host": "mine"}, data={})
    write_meta(folder, meta_for(tokenizer, "char"))
    shape = take(model.config, config, vocab_size=tokenizer.vocab_size)
    store = Checkpoints(folder)
    store.save(20, {"params": fresh_params(shape, jax.random.key(1))}, {"val_loss": 1.25})
    assert store.wait()
    rows = [{"step": 10, "val_loss": 2.0}, {"step": 20, "loss": 1.0, "mfu": 0.4}, {"step": 20, "val_loss": 1.25}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 2')


def test_any_model_goes_out_as_safetensors_and_comes_back_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_bigram_run(Path("run"), Path("mine.py"))
    named = ["--model=mine.py"]
    convert.main(["--out_dir=run", "--to_safetensors=out", *named])
    convert.main(["--from_safetensors=out", "--out_dir=back", *named])
    first, out, back = (open_model(init_from=x, mesh=make_mesh(), model="mine.py") for x in ("run", "out", "back"))
    assert sorted(load_file("out/model.safetensors")) == ["scale", "table.embedding"]
    for other in (out, back):
        jax.tree.map(np.testing.assert_array_equal, first.params, other.params)
        assert other.config == first.config and other.tokenizer.identity == first.tokenizer.identity
        assert other.run_config.init_std == 0.5
    changed = {k for k in first.run_config if first.run_config[k] != back.run_config[k]}
    assert changed == {"out_dir", "init_from", "data_dir", "eval_tasks"}
    assert "/home/me" not in Path("out/config.json").read_text() and "host" not in Path("out/config.json").read_text()
    tokens = np.array([[0, 1, 2, 4]], np.int32)
    np.testing.assert_array_equal(*[logits_of(model.config, model.params, tokens) for model in (first, out)])


def test_a_runs_average_is_what_goes_out(tmp_path, monkeypatch):
    """Also where its newest checkpoint is older than the average: then its parameters."""
    monkeypatch.chdir(tmp_path)
    config = make_run(Path("run"), CharTokenizer("abc"), "char", bias=True, checkpoints=())
    keys = default_config()
    keys.update({name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "bias")})
    keys.average_decay = 0.9
    save_config(keys, Path("run"))
    params, average = (fresh_params(config, jax.random.key(i)) for i in (0, 1))
    store = Checkpoints("run")
    for step, state in (1, {"params": params}), (2, {"params": params, "average": average}):
        store.save(step, state, {})
        assert store.wait()
    for step, expected in (1, params), (2, average):
        assert_equal(open_model("run", mesh=make_mesh(), dtype="float32", which=step).params, expected)
        convert.main(["--out_dir=run", f"--checkpoint={step}", f"--to_safetensors=out{step}"])
        convert.main([f"--from_safetensors=out{step}", f"--out_dir=back{step}"])
        assert_equal(open_model(f"back{step}", mesh=make_mesh(), dtype="float32").params, expected)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_computes_in_float32_stays_so_in_bfloat16(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_bigram_run(Path("run"), Path("mine.py"))
    convert.main(["--out_dir=run", "--to_safetensors=out", "--model=mine.py", "--dtype=bfloat16"])
    written = load_file("out/model.safetensors")
    assert {name: x.dtype for name, x in written.items()} == {"scale": torch.float32, "table.embedding": torch.bfloat16}
    params = open_model(init_from="out", mesh=make_mesh(), model="mine.py", dtype="float32").params
    assert params["scale"] == np.float32(1.1) and params["table"]["embedding"].dtype == np.float32


def test_another_model_is_one_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_bigram_run(Path("run"), Path("mine.py"))
    convert.main(["--out_dir=run", "--to_safetensors=out", "--model=mine.py"])
    with pytest.raises(UserError, match=r"run is of model=mine.py, .* GPT-2's alone; use --to_safetensors"):
        convert.main(["--out_dir=run", "--to_hf=hf", "--model=mine.py"])
    with pytest.raises(UserError, match="model file mine.py, whose code is not run by itself; name it"):
        open_model(init_from="out", mesh=make_mesh())
    with pytest.raises(UserError, match="has model=mine.py, not gpt2"):
        open_model(init_from="out", mesh=make_mesh(), model="gpt2")
    Path("mine.py").write_text(BIGRAM.replace("1.1", "1.2"))
    with pytest.raises(UserError, match="mine.py is not what the run in out was started with"):
        open_model(init_from="out", mesh=make_mesh(), model="mine.py")
    Path("mine.py").write_text(BIGRAM)
    sound = load_file("out/model.safetensors")
    table = sound["table.embedding"]
    for tensors, complaint in (
        ({"scale": sound["scale"]}, "parameter table.embedding is missing"),
        (sound | {"head": table}, "parameter head is unknown"),
        (sound | {"table.embedding": table[:5]}, r"table.embedding is F32\[5, 128\], the model's \[128, 128\]"),
        (sound | {"table.embedding": table.int()}, "table.embedding is I32"),
    ):
        save_file({k: v.clone() for k, v in tensors.items()}, "out/model.safetensors")
        with pytest.raises(UserError, match=complaint):
            _ = open_model(init_from="out", mesh=make_mesh(), model="mine.py").params
    assert not Path("hf").exists()


def test_the_model_card_tells_results_and_settings_but_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_bigram_run(Path("run"), Path("mine.py"))
    convert.main(["--out_dir=run", f"--to_safetensors={tmp_path / 'a-model'}", f"--model={tmp_path / 'mine.py'}"])
    card = Path("a-model/README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert head == "library_name: jaxgpt\npipeline_tag: text-generation\ntags: [jaxgpt]\n"
    assert body.startswith("\n# a-model\n") and "16,385 parameters" in body and "trained with jaxgpt 9.9" in body
    for row in ("step | 20", "val_loss | 1.25", "init_std | 0.5", "dataset | mine", "model | mine.py"):
        assert f"| {row} |" in body
    assert "mfu" not in body and str(tmp_path) not in card and "--init_from=a-model --model=mine.py" in body


def test_the_model_card_of_a_hugging_face_export_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), CharTokenizer("xyz"), "char", bias=True)
    convert.main(["--out_dir=run", "--to_hf=hf"])
    card = Path("hf/README.md").read_text()
    assert f"{AutoModelForCausalLM.from_pretrained('hf').num_parameters():,} parameters" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace("max_new_tokens=100", "max_new_tokens=5")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=OFFLINE, timeout=120)
    assert done.returncode == 0 and set(done.stdout.strip()) <= set("xyz"), done.stderr


# --- nanoGPT ---


def test_a_checkpoint_of_nanogpts_becomes_a_run_that_trains_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = reference("gelu_new", bias=False, **SHAPE)
    torch.save(checkpoint(model, bias=False, **SHAPE), "ckpt.pt")
    data_dir = corpus(tmp_path / "corpus")
    convert.main(["--from_nanogpt=ckpt.pt", f"--data_dir={data_dir}", "--out_dir=run"])
    ours = open_model("run", mesh=make_mesh(), dtype="float32")
    prompt = ours.tokenizer.encode("a b")
    generated = Generator(ours.config, ours.params)(prompt, 16, key=jax.random.key(0), sampling=GREEDY)
    ids = torch.tensor([prompt])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert prompt + np.concatenate(list(generated), axis=1)[0].tolist() == expected[0].tolist()
    assert (ours.info["iter_num"], ours.info["best_val_loss"], ours.step) == (250, 1.5, 0)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        rng.integers(0, 4, 2000).astype(np.uint16).tofile(f"corpus/{split}.bin")
    sizes = ["block_size=16", "eval_iters=4", "max_iters=10", "learning_rate=0.003", f"data_dir={data_dir}"]
    argv = [f"--config={ROOT}/configs/finetune_shakespeare.py:run", *(f"--config.{s}" for s in sizes)]
    assert train.main([*argv, "--config.out_dir=tuned", "--config.bias=false"]) == 0
    rows = [json.loads(line) for line in Path("tuned/metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.5


# --- mistakes ---


@pytest.mark.parametrize("way", ["to_hf", "to_safetensors"])
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, way):
    """The limit on a file's size stands for the disk: safetensors words both alike, and raises no OSError."""
    make_run(tmp_path / "run", CharTokenizer("abc"), "char", bias=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*: File too large; make room"):
            convert.main([f"--out_dir={tmp_path / 'run'}", f"--{way}={tmp_path / 'new'}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_disk_without_room_for_an_import_is_one_error(hf_folder, tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10**4))
    with pytest.raises(Unavailable, match="no room for a checkpoint: 10,000 bytes are free, .* make room"):
        convert.main([f"--from_hf={hf_folder}", f"--out_dir={tmp_path / 'new'}"])
    assert not list(tmp_path.iterdir()) and not caplog.messages


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
        (["--out_dir=new"], "give one of --from_hf"),
        (["--out_dir=new", "--from_hf=hf", "--to_hf=x"], "give one of --from_hf"),
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
        (["--out_dir=run", "--to_safetensors=hf"], "hf exists already"),
        (["--out_dir=run", "--to_safetensors=loop"], "cannot write loop"),
        (["--out_dir=a[1]", "--from_hf=hf"], r"with \[ in its path"),
        (["--out_dir=run", "--to_safetensors=new", "--dtype=float16"], "wpe.embedding has values too large"),
        (["--out_dir=hf", "--to_safetensors=new"], "hf is a Hugging Face model already"),
        (["--out_dir=new", "--from_safetensors=hf"], "hf is not for --from_safetensors"),
        (["--out_dir=new", "--from_safetensors=run"], "run is a jaxgpt run already"),
        (["--out_dir=new", "--from_nanogpt=hf"], "ckpt.pt is missing"),
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
    Path("loop").symlink_to("loop")
    config = make_run(Path("run"), CharTokenizer("abc"), "char", bias=True, checkpoints=())
    store, params = Checkpoints("run"), fresh_params(config, jax.random.key(0))
    params["wpe"]["embedding"] = params["wpe"]["embedding"].at[0, 0].set(1e6)
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
    """nanoGPT's fine-tuning preset, on its weights, its tokenizer and its text; only as small as they are. The same
    command goes on, its sizes of 0 being the run's."""
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
    for init_from in ([], ["--config.init_from=resume"]):
        more = ["--config.out_dir=tuned", f"--config.max_iters={11 + len(init_from)}"]
        assert train.main([*argv, *init_from, *more]) == 0
    lines = Path("tuned/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == list(range(1, 13))
