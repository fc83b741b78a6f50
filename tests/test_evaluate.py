"""Losses and task scores, against transformers and an independent scorer written over it."""

import dataclasses
import gzip
import json
import math
import os
import pydoc_data.topics
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
from compiled import fresh_params
from conftest import xla_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from transformers import GPT2Config, GPT2LMHeadModel

from jaxgpt import UserError, evaluate
from jaxgpt.config import default_config, save_config
from jaxgpt.data import Corpus
from jaxgpt.models import bind
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.scoring import scorer as scoring
from jaxgpt.scoring import tasks
from jaxgpt.scoring.scorer import Row, Scorer
from jaxgpt.scoring.tasks import load_task
from jaxgpt.sharding import AXES, make_mesh
from jaxgpt.tokenizer import CharTokenizer, Meta, meta_for, token_bytes, write_meta
from jaxgpt.weights.opening import open_model

torch.set_num_threads(1)  # the models are too small for more, and waiting threads take the cores from JAX
ROOT = Path(__file__).parents[1]
BLOCK = 64
KINDS = ["safetensors", "sharded", "bin"]
# Real text that every Python has: the language reference's topics.
TEXT = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


class Trained:
    """A small GPT-2 trained with transformers on real text, and that text's tokens, which it has not all seen."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bpe = bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator([TEXT[:200_000]], vocab_size=384, special_tokens=["<|endoftext|>"])
        self.tokens = np.array(bpe.encode(TEXT[:300_000]).ids, np.uint16)
        self.held_out = self.tokens[-3000:]
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 48, "n_positions": BLOCK, "vocab_size": 384}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, embd_pdrop=0, resid_pdrop=0))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        data, rng = torch.tensor(self.tokens[:-3000].astype(np.int64)), np.random.default_rng(0)
        for _ in range(150):
            x = torch.stack([data[i : i + BLOCK] for i in rng.integers(0, len(data) - BLOCK, 16)])
            optimizer.zero_grad()
            self.model(x, labels=x).loss.backward()
            optimizer.step()
        self.model.eval()
        for kind in KINDS:
            self.model.save_pretrained(folder / kind, max_shard_size="100KB" if kind == "sharded" else "1GB")
            bpe.save(str(folder / kind / "tokenizer.json"))
        (folder / "bin" / "model.safetensors").unlink()
        torch.save(self.model.state_dict(), folder / "bin" / "pytorch_model.bin")
        self.corpus = folder / "corpus"
        self.corpus.mkdir()
        self.held_out.tofile(self.corpus / "val.bin")

    def losses(self, tokens) -> tuple[np.ndarray, np.ndarray]:
        """transformers' loss of each token but the first, float64 (T - 1,), and whether it is the likeliest."""
        with torch.no_grad():
            logits = self.model(torch.tensor(np.asarray(tokens, np.int64)[None, :-1])).logits[0].double()
        target = torch.tensor(np.asarray(tokens, np.int64)[1:, None])
        loss = -torch.log_softmax(logits, -1).gather(1, target)[:, 0]
        return loss.numpy(), (logits.argmax(-1) == target[:, 0]).numpy()

    def open(self, kind: str = "safetensors", mesh=None, **options):
        return open_model(init_from=str(self.folder / kind), mesh=mesh or make_mesh(), dtype="float32", **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def model(trained):
    return trained.open()


@pytest.fixture(scope="module")
def scorer(model) -> Scorer:
    return Scorer(model.config, model.mesh)


def logits(model, tokens) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, x: bind(model.config, p)(x)[0])(model.params, tokens))


def some_devices(n: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:n]).reshape(n, 1, 1), AXES)


# --- the loss over a whole split ---


@pytest.mark.parametrize("kind", KINDS)
def test_validation_loss_equals_transformers(trained, scorer, kind):
    held_out = trained.held_out
    losses = [trained.losses(held_out[i : i + BLOCK + 1])[0] for i in range(0, len(held_out) - 1, BLOCK)]
    expected = np.concatenate(losses).mean()
    assert len(np.concatenate(losses)) == len(held_out) - 1
    assert expected < 0.7 * math.log(384), "it has learnt something"
    model = trained.open(kind)
    corpus = Corpus.open(trained.corpus, "val", block_size=1, vocab_size=384)
    result = tasks.validation(corpus, BLOCK).run(scorer, model.params)
    assert result["loss"] == pytest.approx(expected, abs=1e-4)
    assert result["ppl"] == pytest.approx(math.exp(result["loss"])) and "bpb" not in result


def test_bits_per_byte(trained, scorer, model, tmp_path):
    """The nats of the targets that are text, over the bytes of that text, as the library decodes it."""
    tokens = trained.held_out.copy()
    whole = [i for i in range(100, 3000, 97) if "\ufffd" not in trained.bpe.decode(tokens[i : i + 1].tolist())]
    tokens[whole] = 0  # ends of documents, none of them inside a character
    tokens.tofile(tmp_path / "val.bin")
    losses = [trained.losses(tokens[i : i + BLOCK + 1])[0] for i in range(0, len(tokens) - 1, BLOCK)]
    is_text = tokens[1:] != 0
    nats, text = np.concatenate(losses)[is_text].sum(), trained.bpe.decode(tokens[1:][is_text].tolist())
    corpus = Corpus.open(tmp_path, "val", block_size=1, vocab_size=384)
    result = tasks.validation(corpus, BLOCK, token_bytes(model.tokenizer)).run(scorer, model.params)
    assert "\ufffd" not in text[3:-3]
    assert result["bpb"] == pytest.approx(nats / math.log(2) / len(text.encode()), abs=1e-3)
    no_text = tasks.Validation("val", tasks.validation(corpus, BLOCK).rows[:1], np.zeros(384, np.int32))
    assert "bpb" not in no_text.run(scorer, model.params)


def test_scores_are_the_same_to_the_bit_on_any_number_of_devices(trained):
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, 2000, 50), rng.integers(2, 100, 50)
    rows = [Row(trained.held_out[i : i + n], int(rng.integers(1, n))) for i, n in zip(starts, lengths, strict=True)]
    results = []
    for mesh in (some_devices(1), some_devices(2), some_devices(8), make_mesh(2, 2, 2)):
        model = trained.open(mesh=mesh)
        results.append(Scorer(model.config, mesh, tokens_per_device=300)(model.params, rows))
    for result in results[1:3]:
        np.testing.assert_array_equal(results[0].loss, result.loss)
    np.testing.assert_allclose(results[0].loss, results[3].loss, rtol=1e-5)
    for row, loss, count, greedy in zip(rows, *results[0], strict=True):  # rows too long lose their beginning
        cut = max(0, len(row.tokens) - BLOCK - 1)
        scored = slice(max(row.first - cut, 1) - 1, None)
        losses, likeliest = (x[scored] for x in trained.losses(row.tokens[cut:]))
        assert (count, greedy) == (len(losses), likeliest.all())
        assert loss == pytest.approx(losses.sum(), rel=1e-5)


def test_the_logits_made_in_parts_give_what_all_at_once_give(trained, model, monkeypatch):
    tokens = jnp.asarray(trained.held_out[: 4 * 65].reshape(4, 65).astype(np.int32))
    whole = logits(model, tokens[:, :-1])
    expected = -jnp.take_along_axis(jax.nn.log_softmax(whole), tokens[:, 1:, None], -1)[..., 0]
    for limit in (2**28, 4 * 384 * 16, 1):
        monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", limit)
        losses, likeliest = jax.jit(lambda p, x: scoring.score_tokens(model.config, p, x))(model.params, tokens)
        np.testing.assert_allclose(losses, expected, atol=2e-6)
        np.testing.assert_array_equal(likeliest, whole.argmax(-1) == tokens[:, 1:])


# --- tasks ---


def independent_score(trained, context: str, ending: str) -> tuple[float, int, bool]:
    """Loss of ` ending` after `context`, its tokens, and whether greedy decoding finds it: one text, no batch."""
    n, tokens = len(trained.bpe.encode(context).ids), trained.bpe.encode(f"{context} {ending}").ids
    start = max(0, len(tokens) - BLOCK - 1)
    losses, likeliest = trained.losses(tokens[start:])
    first = max(n - start, 1) - 1
    return losses[first:].sum(), len(losses[first:]), bool(likeliest[first:].all())


@pytest.fixture(scope="module")
def hellaswag_records() -> list[dict]:
    """Real sentences broken in two, three endings out of four from elsewhere."""
    words, rng = TEXT[300_000:400_000].split(), np.random.default_rng(0)
    records = []
    for i in range(40):
        at, n = int(rng.integers(0, len(words) - 300)), int(rng.integers(3, 60))
        starts = [at + n, *rng.integers(0, len(words) - 30, 3)]
        endings = [" ".join(words[s : s + int(rng.integers(2, 20))]) for s in starts]
        records.append({"ind": i, "ctx": " ".join(words[at : at + n]), "label": i % 4, "endings": endings})
        endings[0], endings[i % 4] = endings[i % 4], endings[0]
    return records


def test_hellaswag_equals_an_independent_scorer_item_by_item(trained, model, scorer, hellaswag_records, tmp_path):
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, hellaswag_records)).encode()))
    task = load_task("hellaswag", str(path), model.tokenizer)
    scores = scorer(model.params, task.rows)
    expected = [independent_score(trained, r["ctx"], e) for r in hellaswag_records for e in r["endings"]]
    np.testing.assert_allclose(scores.loss, [loss for loss, _, _ in expected], rtol=1e-5)
    np.testing.assert_array_equal(scores.count, [count for _, count, _ in expected])
    losses = np.array([loss for loss, _, _ in expected]).reshape(-1, 4)
    lengths = np.array([[len(e) for e in r["endings"]] for r in hellaswag_records])
    labels = np.array([r["label"] for r in hellaswag_records])
    result = task.run(scorer, model.params)
    assert result["acc"] == np.mean(losses.argmin(1) == labels)
    assert result["acc_norm"] == np.mean((losses / lengths).argmin(1) == labels)
    assert result["acc_token"] == np.mean((losses.ravel() / scores.count).reshape(-1, 4).argmin(1) == labels)
    assert 0 < result["acc_norm"] < 1


def test_lambada_equals_an_independent_scorer_item_by_item(trained, model, scorer, tmp_path):
    words = TEXT[300_000:400_000].split()
    texts = [" ".join(words[i : i + 4 + i % 37]) for i in range(0, 12_000, 80)]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    task = load_task("lambada", str(path), model.tokenizer)
    scores = scorer(model.params, task.rows)
    expected = [independent_score(trained, *text.rsplit(" ", 1)) for text in texts]
    np.testing.assert_allclose(scores.loss, [loss for loss, _, _ in expected], rtol=1e-5)
    np.testing.assert_array_equal(scores.greedy, [greedy for _, _, greedy in expected])
    result = task.summarize(scores)
    assert result["acc"] == np.mean([greedy for _, _, greedy in expected]) > 0
    assert result["ppl"] == pytest.approx(math.exp(np.mean([loss for loss, _, _ in expected])), rel=1e-5)


def test_hellaswag_from_the_hub_is_prepared_as_in_lm_evaluation_harness(monkeypatch):
    record = {
        "ind": 1, "activity_label": "Roof removal", "ctx_a": "A man [header] sits.", "ctx_b": "he", "ctx": "unused",
        "endings": ["starts.", " goes [title] Stops  now", "c", "d"], "label": "1",
    }  # fmt: skip
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((a, k)) or [record])
    tokenizer = CharTokenizer(sorted({chr(i) for i in range(32, 127)}))
    task = load_task("hellaswag", "", tokenizer)
    assert asked == [(("Rowan/hellaswag", None), {"split": "validation"})]
    tokens, first = task.rows[1].tokens.tolist(), task.rows[1].first
    assert tokenizer.decode(tokens) == "Roof removal: A man sits. He goes. Stops now"
    assert tokenizer.decode(tokens[first:]) == " goes. Stops now"


def test_no_network_is_one_error(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match="lambada_openai cannot be fetched .*reach the Hub"):
        load_task("lambada", "", CharTokenizer("ab"))


@pytest.mark.parametrize(
    "name, content",
    [
        ("hellaswag", b'{"ctx": "a", "endings": ["b", "c"], "label": 0}'),
        ("hellaswag", b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": ""}'),
        ("hellaswag", b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}'),
        ("hellaswag", b'{"ctx": "a", "endings": ["b", "c", "d", ""], "label": 1}'),
        ("hellaswag", b'{"ctx": "a", "endings": ["b", "c", "d", 5], "label": 1}'),
        ("hellaswag", b'{"endings": []}'),
        ("hellaswag", b"[]"),
        ("lambada", b'{"text": "word"}'),
        ("lambada", b'{"text": 3}'),
        ("lambada", b"{"),
        ("lambada", b"\xff\xfe"),
        ("lambada", b""),
    ],
)
def test_what_is_no_item_is_one_error_that_names_the_file(tmp_path, name, content):
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="items.jsonl"):
        load_task(name, str(path), CharTokenizer("abcde "))
    with pytest.raises(UserError, match="absent.jsonl"):
        load_task(name, str(tmp_path / "absent.jsonl"), CharTokenizer("abcde "))
    (tmp_path / "items.jsonl.gz").write_bytes(b"\x1f\x8bnot gzip" + content)
    with pytest.raises(UserError, match="items.jsonl.gz"):
        load_task(name, str(tmp_path / "items.jsonl.gz"), CharTokenizer("abcde "))


# --- opening a model ---


RUN = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=10)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with two checkpoints, the older the better."""
    folder = tmp_path_factory.mktemp("run")
    config = default_config()
    config.update(n_layer=2, n_head=2, n_embd=16, block_size=32, dropout=0.1, attention="cudnn", dtype="bfloat16")
    save_config(config, folder)
    write_meta(folder, meta_for(CharTokenizer("abcdefgh \n"), "char"))
    checkpoints = Checkpoints(folder)
    for step, loss in ((10, 1.0), (20, 2.0)):
        params = fresh_params(RUN, jax.random.key(step))
        checkpoints.save(step, {"params": params, "step": jnp.asarray(step)}, {"val_loss": loss})
        assert checkpoints.wait()
    return folder


@pytest.mark.parametrize("which, step", [("best", 10), ("latest", 20), (20, 20), (10, 10)])
def test_a_run_opens_at_the_checkpoint_asked_for(run, which, step):
    model = open_model(str(run), mesh=make_mesh(2, 2, 2), dtype="float32", which=which)
    jax.tree.map(np.testing.assert_array_equal, model.params, fresh_params(RUN, jax.random.key(step)))
    assert (model.step, model.config.vocab_size, model.config.attention) == (step, 10, "xla")
    assert model.tokenizer.decode(model.tokenizer.encode("bad head")) == "bad head"


def test_a_run_is_also_an_init_from_and_its_positions_can_be_cropped(run):
    whole = open_model(init_from=str(run), mesh=make_mesh(), dtype="float32")
    part = open_model(init_from=str(run), mesh=make_mesh(), dtype="float32", block_size=8)
    np.testing.assert_array_equal(logits(whole, jnp.arange(8)[None]), logits(part, jnp.arange(8)[None]))
    assert part.params["wpe"]["embedding"].shape == (8, 16)
    with pytest.raises(UserError, match="block_size=33 is more than the 32 positions"):
        open_model(str(run), mesh=make_mesh(), block_size=33)


@pytest.mark.parametrize("source", ["run", "hf"])
def test_parameters_kept_in_bfloat16_compute_the_same_to_the_bit(run, trained, source):
    where = run if source == "run" else trained.folder / "safetensors"
    narrow, wide = (
        open_model(init_from=str(where), mesh=make_mesh(), dtype="bfloat16", param_dtype=d) for d in (None, "float32")
    )
    assert narrow.params["wte"]["embedding"].dtype == jnp.bfloat16
    assert wide.params["wte"]["embedding"].dtype == narrow.params["ln_f"]["scale"].dtype == jnp.float32
    tokens = jnp.arange(10)[None]
    np.testing.assert_array_equal(logits(narrow, tokens), logits(wide, tokens))


def test_weights_decide_a_new_runs_sizes_and_refuse_others(trained):
    model = trained.open(block_size=32)
    config = default_config()
    config.update(n_layer=0, n_head=0, n_embd=0, bias=True, block_size=32, dropout=0.1)
    model.adopt(config)
    assert (config.n_layer, config.n_head, config.n_embd, config.dropout) == (2, 2, 48, 0.1)
    for key, value in (("n_layer", 3), ("n_head", 4), ("n_embd", 96), ("bias", False)):
        changed = config.copy_and_resolve_references()
        changed[key] = value
        with pytest.raises(UserError, match=f"{key}={value} contradicts the weights"):
            model.adopt(changed)


def test_a_corpus_must_have_the_models_vocabulary(trained, run, caplog):
    """Sizes alone prove nothing: an identity does, and where one is unknown that is said."""
    model, characters = trained.open(), open_model(str(run), mesh=make_mesh())
    model.check_corpus(dataclasses.replace(model.language, vocab_size=380))
    characters.check_corpus(meta_for(CharTokenizer("abcdefgh \n"), "char"))
    assert not caplog.records
    model.check_corpus(Meta(384, "tokenizer.json"))
    assert "which tokenizer made the tokens of the corpus" in caplog.text
    for opened, meta in (
        (model, meta_for(CharTokenizer("abc"), "char")),
        (model, Meta(384, "gpt2")),
        (model, Meta(384, "tokenizer.json", identity="another")),
        (model, Meta(385, "tokenizer.json")),
        (characters, meta_for(CharTokenizer("abcdefgx \n"), "char")),
    ):
        with pytest.raises(UserError, match="the corpus has .*prepare it with the model's tokenizer"):
            opened.check_corpus(meta)


@pytest.mark.parametrize(
    "out_dir, init_from, complaint",
    [
        (None, None, "name one model"), ("a", "b", "name one model"), ("nowhere", None, "nowhere"),
        (None, "nowhere", "nowhere is neither gpt2, .* nor a folder"), ("gpt2", None, "./gpt2 is neither"),
    ],
)  # fmt: skip
def test_no_model_is_one_error(tmp_path, monkeypatch, out_dir, init_from, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        open_model(out_dir, init_from, mesh=make_mesh())


# --- the command ---


def test_command_prints_a_table_or_json(trained, hellaswag_records, tmp_path, capsys):
    items = tmp_path / "h.jsonl"
    items.write_text("\n".join(map(json.dumps, hellaswag_records[:8])))
    source = str(trained.folder / "safetensors")
    argv = [f"--init_from={source}", f"--tasks=val,hellaswag={items}", f"--data_dir={trained.corpus}"]
    evaluate.main([*argv, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"model", "step", "val_loss", "val_ppl", "val_bpb"} | {
        k for k in tasks.METRICS if "hella" in k
    }
    evaluate.main(argv)
    table = capsys.readouterr().out
    assert source in table and f"{result['val_loss']:.4f}" in table
    evaluate.main([*argv, f"--per_token={tmp_path}/losses.jsonl"])
    rows = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    of = {task: [row for row in rows if row["task"] == task] for task in ("val", "hellaswag")}
    assert (len(of["val"]), len(of["hellaswag"])) == (-(-(len(trained.held_out) - 1) // BLOCK), 8 * 4)
    assert np.concatenate([row["tokens"] for row in of["val"]]).tolist() == trained.held_out[1:].tolist()
    assert np.concatenate([row["loss"] for row in of["val"]]).mean() == pytest.approx(result["val_loss"], abs=1e-5)
    assert of["val"][3]["loss"] == pytest.approx(
        trained.losses(trained.held_out[3 * BLOCK : 4 * BLOCK + 1])[0], abs=1e-4
    )
    assert of["val"][0]["text"] == [trained.bpe.decode([token]) for token in trained.held_out[1 : BLOCK + 1].tolist()]
    # two processes of two devices each: the same to the bit, and the first alone prints
    env = os.environ | {"XLA_FLAGS": xla_flags(2), "PYTHON": sys.executable}
    both = [ROOT / "scripts" / "launch_local", "2", "jaxgpt.evaluate", *argv, "--json"]
    output = subprocess.run(both, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=100).stdout
    printed = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert printed == [result]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--tasks=val"], "which corpus"),
        (["--tasks=mmlu"], "there is no task 'mmlu'"),
        (["--tasks="], "one task at least"),
        (["--tasks=val=x"], "no file for val"),
        (["--tasks=val", "--data_dir=nowhere"], "nowhere"),
        (["--checkpoint=newest", "--data_dir=x"], "newest is not best"),
        (["--task=val"], "did you mean --tasks"),
        (["--tasks=val", "--data_dir=x", "--block_size=0"], "block_size=0 must be at least 1"),
    ],
)
def test_command_mistakes_are_one_error(trained, arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        evaluate.main([f"--init_from={trained.folder / 'safetensors'}", *arguments])


def test_a_mixtures_validation_asks_which_corpus(trained, monkeypatch):
    model = open_model(init_from=str(trained.folder / "safetensors"), mesh=make_mesh())
    monkeypatch.setattr(model, "weights", None)
    model.run_config.dataset = "a:0.7,b:0.3"
    with pytest.raises(UserError, match="was trained on several: add --data_dir"):
        tasks.open_validation(model, None)


def test_a_runs_corpus_is_found_from_another_folder(run, tmp_path, monkeypatch):
    """A relative data_dir means the folder in which the run was started."""
    copy, there = tmp_path / "run", tmp_path / "there"
    shutil.copytree(run, copy)
    (there / "data" / "letters").mkdir(parents=True)
    np.array([1, 2, 3, 4] * 20, np.uint16).tofile(there / "data" / "letters" / "val.bin")
    write_meta(there / "data" / "letters", meta_for(CharTokenizer("abcdefgh \n"), "char"))
    config = default_config()
    config.update(json.loads((run / "config.json").read_text()) | {"dataset": "letters"})
    save_config(config, copy)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="was trained on data/letters, which is not there; add --data_dir"):
        tasks.open_validation(open_model(str(copy), mesh=make_mesh()), None)
    save_config(config, copy, environment={"folder": str(there)})
    assert len(tasks.open_validation(open_model(str(copy), mesh=make_mesh()), None).rows) == 3


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 400), block=st.integers(1, 70))
def test_windows_predict_every_token_but_the_first_once(tmp_path_factory, n, block):
    folder = tmp_path_factory.mktemp("corpus")
    np.arange(n, dtype=np.uint16).tofile(folder / "val.bin")
    rows = tasks.validation(Corpus.open(folder, "val", block_size=1, vocab_size=400), block).rows
    assert [t for row in rows for t in row.tokens[row.first :]] == list(range(1, n))
    assert all(len(row.tokens) <= block + 1 for row in rows)
