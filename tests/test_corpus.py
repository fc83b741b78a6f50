"""Text to shards: the tokens of a plain loop, whatever the workers, kills and file formats; bad input is one line."""

import gzip
import hashlib
import json
import os
import pydoc_data.topics
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import made

from jaxgpt import UserError
from jaxgpt.corpus import shards, sources
from jaxgpt.corpus.shards import build
from jaxgpt.corpus.sources import Files
from jaxgpt.data import Corpus
from jaxgpt.tokenizer import gpt2, read_meta

ROOT = Path(__file__).parents[1]
# Real text that every Python has: its manual, 700 kB of English and code, of which each topic is a document.
DOCUMENTS = [text + " naïve 日本語 🙂\r\n" * (i % 3) for i, text in enumerate(pydoc_data.topics.topics.values())]
CHILD = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
from jaxgpt.cli import run_main
from jaxgpt.corpus.shards import build
from jaxgpt.corpus.sources import Files
def main(argv):
    build(Files(argv[:1]), argv[1], **json.loads(argv[2]))
    print(open("/proc/self/status").read())
run_main(main)
"""


def tokens_of(folder: Path, split: str) -> list[int]:
    meta = read_meta(folder)
    assert meta is not None
    assert sorted(p.name for p in folder.glob("*.bin")) == sorted(s["file"] for ss in meta.shards.values() for s in ss)
    files = [folder / shard["file"] for shard in meta.shards[split]]
    assert [f.stat().st_size // 2 for f in files] == [shard["tokens"] for shard in meta.shards[split]]
    return np.concatenate([np.fromfile(f, "<u2") for f in files]).tolist()


def plain_loop(documents: list[str]) -> list[int]:
    """nanoGPT's algorithm."""
    return [i for text in documents for i in [*gpt2().encode(text), gpt2().eot]]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "id": 1}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def jsonl(gpt2_files, tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("jsonl") / "manual.jsonl", DOCUMENTS)


@pytest.fixture(scope="module")
def expected(gpt2_files) -> dict[str, list[int]]:
    """The tokens of each split of `jsonl`."""
    drawn = [sources._draw(i) < 0.1 for i in range(len(DOCUMENTS))]
    return {
        split: plain_loop([text for text, d in zip(DOCUMENTS, drawn, strict=True) if d == (split == "val")])
        for split in ("train", "val")
    }


# ---- The tokens


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("shard_tokens", [10_007, 10**8])
def test_tokens_are_those_of_a_plain_loop(jsonl, expected, tmp_path, monkeypatch, workers, shard_tokens):
    if workers > 1 and shard_tokens == 10**8:
        return  # one shard says nothing new
    monkeypatch.setattr(shards, "PIECE", 50_000)  # many chunks
    build(Files([str(jsonl)], val_fraction=0.1), tmp_path, shard_tokens=shard_tokens, workers=workers)
    for split in ("train", "val"):
        assert tokens_of(tmp_path, split) == expected[split]
        assert len(Corpus.open(tmp_path, split, block_size=64, vocab_size=50257)) == len(expected[split])
    meta = read_meta(tmp_path)
    assert meta and meta.tokenizer == "gpt2" and meta.eot == 50256 and meta.dtype == "uint16"
    for shard in [*meta.shards["train"], *meta.shards["val"]]:
        assert hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / shards.PROGRESS).exists()


PIECES = st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "\xa0", "\u3000", "\x1c", "\x85", "\u200b", "a", "Ab", "'s", "7"]
)
SPACED = st.lists(PIECES | st.sampled_from(["é", "語", "🙂", ".", "'", "'ll", "<|endoftext|>", "!?"]), max_size=80)


def blocks(text: str, limit: int) -> list[str]:
    return [text[i : i + limit] for i in range(0, len(text), limit)]


@given(SPACED.map("".join), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_long_documents_keep_their_tokens(gpt2_files, text, limit):
    """Wherever there is a place to cut, the parts' tokens are the whole's, in every kind of white space."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", limit)
        parts = list(sources.split_text(blocks(text, limit)))
    assert "".join(part.text for part in parts) == text
    assert [part.end for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(len(part.text) <= limit for part in parts)
    apart, start = [], 0
    for part in parts:
        assert text[:start].endswith(part.before) and text[start + len(part.text) :].startswith(part.after)
        apart += gpt2().encode(part.text)
        start += len(part.text)
        safe = start == len(text) or (re.match(r"\S[ \t\r\n]", text[start - 1 : start + 1]))
        if not safe:  # no white space in `limit` characters: the cut must be anywhere
            return
    assert apart == gpt2().encode(text)


@given(SPACED.map("".join), st.integers(1, 30), st.floats(0.01, 0.99))
@settings(max_examples=80, deadline=None)
def test_files_are_read_in_parts(tmp_path_factory, text, limit, fraction):
    """However small the parts: one document, or at most two, of which the second has the last part of the text."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("a.txt", "b.txt"):
        (folder / name).write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", limit)
        named = list(Files([str(folder / "a.txt")], val=[str(folder / "b.txt")]).pieces({}))
        cut = list(Files([str(folder / "a.txt")], val_fraction=fraction).pieces({}))
    assert "".join(piece.text for piece in cut) == text
    assert "".join(piece.text for piece in named) == 2 * text
    for pieces in (named, cut):
        assert all(len(piece.text) <= limit for piece in pieces)
        for split in ("train", "val"):
            mine = [piece for piece in pieces if piece.split == split]
            assert [piece.number for piece in mine] == list(range(len(mine)))
            assert [piece.end for piece in mine] == [False] * (len(mine) - 1) + [True] * bool(mine)
    assert len("".join(piece.text for piece in cut if piece.split == "train")) == int(len(text) * (1 - fraction))


def test_every_format_gives_the_same(jsonl, expected, tmp_path):
    rows = pyarrow.table({"body": DOCUMENTS, "n": range(len(DOCUMENTS))})
    pyarrow.parquet.write_table(rows, tmp_path / "b.parquet", row_group_size=20, compression="gzip")
    content = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS, "body").read_bytes()
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as f:
        f.write(content[:1000])
    with gzip.open(tmp_path / "c.jsonl.gz", "ab") as f:  # a second member, as of `cat a.gz b.gz`
        f.write(content[1000:])
    with pyarrow.output_stream(tmp_path / "d.jsonl.zst", compression="zstd") as f:
        f.write(content)
    for name in ("a.jsonl", "b.parquet", "c.jsonl.gz", "d.jsonl.zst"):
        build(Files([str(tmp_path / name)], field="body", val_fraction=0.1), tmp_path / f"of-{name}", workers=1)
        assert tokens_of(tmp_path / f"of-{name}", "train") == expected["train"]
        assert tokens_of(tmp_path / f"of-{name}", "val") == expected["val"]


def test_folders_of_text_files(gpt2_files, tmp_path):
    """Few: the end of each is validation. Many: some of them are. Named: these."""
    few = tmp_path / "few"
    (few / "deep").mkdir(parents=True)
    (few / "b.txt").write_text(DOCUMENTS[0], encoding="utf-8", newline="")
    with gzip.open(few / "deep" / "c.md.gz", "wb") as f:
        f.write(DOCUMENTS[1].encode())
    (few / "ignored.pdf").write_bytes(b"\xff")
    build(Files([str(few)], val_fraction=0.2), tmp_path / "out", workers=1)
    val = gpt2().decode(tokens_of(tmp_path / "out", "val")).split("<|endoftext|>")
    train = gpt2().decode(tokens_of(tmp_path / "out", "train")).split("<|endoftext|>")
    assert train.pop() == val.pop() == ""
    assert [a + b for a, b in zip(train, val, strict=True)] == DOCUMENTS[:2]
    assert all(0.19 < len(b) / len(a + b) < 0.22 for a, b in zip(train, val, strict=True))

    build(Files([str(few)], val=[str(few / "b.*")]), tmp_path / "named", workers=1)
    assert tokens_of(tmp_path / "named", "val") == plain_loop(DOCUMENTS[:1])
    assert tokens_of(tmp_path / "named", "train") == plain_loop(DOCUMENTS[1:2])

    many = tmp_path / "many"
    many.mkdir()
    for i in range(100):
        (many / f"{i:03}.txt").write_text(f"{i}")
    build(Files([str(many)], val_fraction=0.3), tmp_path / "drawn", workers=1)
    val = gpt2().decode(tokens_of(tmp_path / "drawn", "val")).split("<|endoftext|>")[:-1]
    train = gpt2().decode(tokens_of(tmp_path / "drawn", "train")).split("<|endoftext|>")[:-1]
    assert sorted(val + train, key=int) == [str(i) for i in range(100)] and 20 < len(val) < 40


@pytest.mark.parametrize("workers", [1, 2])
def test_fast(jsonl, expected, tmp_path, workers):
    build(Files([str(jsonl)], val_fraction=0.1), tmp_path / "out", workers=workers, fast=True)
    for split in ("train", "val"):
        assert tokens_of(tmp_path / "out", split) == expected[split]
    build(Files([str(jsonl)], val_fraction=0.1), tmp_path / "out", workers=1)  # finds the same corpus
    odd = [*DOCUMENTS[:3], "not the <|endoftext|> end", "half a pair: \ud83d"]  # a chunk that tiktoken has to take
    build(
        Files([str(write_jsonl(tmp_path / "odd.jsonl", odd))], val_fraction=1e-9),
        tmp_path / "odd",
        workers=workers,
        fast=True,
        first_shard_is_val=True,
        shard_tokens=9,
    )
    assert tokens_of(tmp_path / "odd", "val") + tokens_of(tmp_path / "odd", "train") == plain_loop(odd)
    with pytest.raises(UserError, match="--eot=</s> is for a tokenizer.json"):
        build(Files([str(jsonl)]), tmp_path / "other", eot="</s>")
    with pytest.raises(UserError, match="there is no tokenizer gpt3; give gpt2, or a tokenizer.json or a folder"):
        build(Files([str(jsonl)]), tmp_path / "other", tokenizer="gpt3")
    with pytest.raises(UserError, match="--fast is for GPT-2's tokens"):
        build(Files([str(jsonl)]), tmp_path / "other", tokenizer="t.json", fast=True)


def test_other_tokenizers(jsonl, tmp_path):
    """A tokenizer.json of more than 65,536 tokens: uint32, and the file goes with the corpus."""
    words = sorted({word for text in DOCUMENTS for word in text.split()})
    vocab = {"</s>": 0, "?": 1, **{w: i + 70_000 for i, w in enumerate(words)}}
    bpe = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    bpe.save(str(tmp_path / "words.json"))
    for workers, named in ((1, "words.json"), (2, "words.json"), (1, "out2-words.json")):  # the last by its folder
        out = tmp_path / f"out{workers}-{named}"
        build(Files([str(jsonl)], val_fraction=0.1), out, tokenizer=str(tmp_path / named), workers=workers)
        meta = read_meta(out)
        assert meta and (meta.dtype, meta.tokenizer, meta.eot) == ("uint32", "tokenizer.json", 0)
        read = Corpus.open(out, "train", block_size=8, vocab_size=meta.vocab_size)
        drawn = [text for i, text in enumerate(DOCUMENTS) if sources._draw(i) >= 0.1]
        loop = [i for text in drawn for i in [*bpe.encode(text).ids, 0]]
        assert read.read(np.array([0]), len(read))[0].tolist() == loop
        assert (out / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    bpe = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    bpe.save(str(tmp_path / "few.json"))
    with pytest.raises(UserError, match="no usual end-of-text token"):
        build(Files([str(jsonl)]), tmp_path / "out3", tokenizer=str(tmp_path / "few.json"))
    few = Files([str(jsonl)], val_fraction=0.1)
    build(few, tmp_path / "out3", tokenizer=str(tmp_path / "few.json"), eot="b", workers=1)
    assert set(tokens_of(tmp_path / "out3", "train")) == {0, 1}


def test_first_shard_for_validation(jsonl, tmp_path):
    source = Files([str(jsonl)], val_fraction=1e-12)
    build(source, tmp_path, shard_tokens=20_000, workers=1, first_shard_is_val=True)
    loop = plain_loop(DOCUMENTS)
    assert tokens_of(tmp_path, "val") == loop[:20_000] and tokens_of(tmp_path, "train") == loop[20_000:]
    build(source, tmp_path, shard_tokens=20_000, workers=1, first_shard_is_val=True)
    with pytest.raises(UserError, match="too short to give any to train"):
        build(source, tmp_path / "one", workers=1, first_shard_is_val=True)


# ---- Stops of every kind


def start(jsonl: Path, out: Path, **how) -> subprocess.Popen:
    settings = json.dumps({"shard_tokens": 20_000, "workers": 2} | how)
    command = [sys.executable, "-c", CHILD, str(jsonl), str(out), settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def at_work(out: Path, since: float = 0.0) -> bool:
    """Whether a shard is being written, by a run that began then: killed ones leave theirs behind."""
    try:
        return any(path.stat().st_mtime >= since for path in out.glob("*.bin.partial"))
    except OSError:
        return False


def test_killed_at_random_points(gpt2_files, tmp_path):
    """Each run is killed (no signal handler runs) and the next goes on; finished shards stay as they are."""
    documents = DOCUMENTS * 8
    big = write_jsonl(tmp_path / "big.jsonl", documents)
    drawn = [sources._draw(i) < 0.01 for i in range(len(documents))]
    out, seen, rng = tmp_path / "out", {}, random.Random(1)
    kills = 0
    while kills < 4:
        began, finished = time.time(), len(list(out.glob("*.bin")))
        child = start(big, out, workers=1 + kills % 2)
        while child.poll() is None and not at_work(out, began):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.12))
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.communicate()
        for path in out.glob("*.bin"):
            state = (path.stat().st_ino, path.stat().st_mtime_ns)
            recorded = (out / shards.PROGRESS).read_text() if (out / shards.PROGRESS).exists() else ""
            if path.name in recorded:
                assert seen.setdefault(path.name, state) == state
        assert len(list(out.glob("*.bin"))) >= finished
        if (out / "meta.json").exists():  # finished before the kills were used up: begin again
            for path in out.iterdir():
                path.unlink()
            seen = {}
    child = start(big, out)
    assert child.communicate()[1] == "" and child.returncode == 0
    for split in ("train", "val"):
        loop = plain_loop([text for text, d in zip(documents, drawn, strict=True) if d == (split == "val")])
        assert tokens_of(out, split) == loop


def test_workers_end_with_a_killed_run(gpt2_files, tmp_path):
    big = write_jsonl(tmp_path / "big.jsonl", DOCUMENTS * 8)
    child = start(big, tmp_path / "out")
    while not at_work(tmp_path / "out"):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.communicate(timeout=60)  # returns when the last worker has closed its copy of stderr


def test_ctrl_c(gpt2_files, tmp_path):
    big = write_jsonl(tmp_path / "big.jsonl", DOCUMENTS * 8)
    child = start(big, tmp_path / "out")
    while not list((tmp_path / "out").glob("*.bin")):
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does, to the workers too
    error = child.communicate(timeout=60)[1]
    assert child.returncode == 2 and re.fullmatch(r"error: stopped; .*same command.*\n", error)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_full_disk(jsonl, expected, tmp_path):
    """A limit on file sizes stands in for it: the system call fails in the same place."""
    limited = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))\n"
    how = json.dumps({"shard_tokens": 20_000, "workers": 1})
    command = [sys.executable, "-c", limited + CHILD, str(jsonl), str(tmp_path / "out"), how]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert re.fullmatch(r"error: cannot write .*train_000000.bin: File too large; make room.*\n", run.stderr)
    assert not (tmp_path / "out").exists()
    build(Files([str(jsonl)], val_fraction=0.1), tmp_path / "out", shard_tokens=20_000, workers=1)
    assert tokens_of(tmp_path / "out", "train") == expected["train"]


FAST = """
import numpy as np
from jaxgpt.corpus import shards
shards._encode = lambda pieces: np.zeros(sum(len(piece.text) for piece in pieces) // 4, "<u2")
"""


def test_memory_is_bounded(gpt2_files, tmp_path):
    """One document of 8 and of 64 MB, with a stand-in for the tokenizer: the peaks differ by far less than the text."""
    peaks = []
    for megabytes in (8, 64):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text(("".join(DOCUMENTS) * 140)[: megabytes * 1_000_000], encoding="utf-8")
        command = [sys.executable, "-c", FAST + CHILD, str(path), str(tmp_path / f"out{megabytes}"), '{"workers": 1}']
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peak = re.search(r"VmHWM:\s*(\d+) kB", run.stdout)
        assert peak and path.stat().st_size > megabytes * 1_000_000
        peaks.append(int(peak[1]) / 1000)
    assert peaks[1] - peaks[0] < 28 and peaks[1] < 300  # half of the 56 MB more, for what the allocator keeps


# ---- Folders that hold something already


def test_a_second_run_finds_the_work_done_and_mends_it(jsonl, expected, tmp_path, capsys):
    def run():
        build(Files([str(jsonl)], val_fraction=0.1), tmp_path, shard_tokens=20_000, workers=1)

    run()
    states = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capsys.readouterr()
    run()
    assert "is complete" in capsys.readouterr().out
    assert states == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    altered, deleted = tmp_path / "train_000002.bin", tmp_path / "train_000004.bin"
    altered.write_bytes(b"\1" + altered.read_bytes()[1:])
    deleted.unlink()
    run()
    assert tokens_of(tmp_path, "train") == expected["train"] and tokens_of(tmp_path, "val") == expected["val"]
    untouched = tmp_path / "train_000001.bin"
    assert untouched.stat().st_mtime_ns == states[untouched]


def test_another_corpus_is_left_alone(jsonl, tmp_path):
    build(Files([str(jsonl)], val_fraction=0.1), tmp_path / "out", workers=1)
    contents = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    other = write_jsonl(tmp_path / "other.jsonl", ["hello"] * 300)
    for source, shard_tokens in (
        (Files([str(other)]), 10**8),
        (Files([str(jsonl)], val_fraction=0.2), 10**8),
        (Files([str(jsonl)], val_fraction=0.1), 10**7),
    ):
        with pytest.raises(UserError, match="holds another corpus"):
            build(source, tmp_path / "out", shard_tokens=shard_tokens, workers=1)
    assert contents == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "train.bin").write_bytes(b"ab")
    with pytest.raises(UserError, match="holds another corpus"):
        build(Files([str(other)]), tmp_path / "bare", workers=1)


def test_what_is_the_same_corpus(gpt2_files, tmp_path, capsys):
    """Inputs that were touched, moved or named otherwise are; one letter changed is not."""
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:20])
    build(Files([str(path)], val_fraction=0.2), tmp_path / "out", workers=1)
    os.utime(path, (1, 1))
    (tmp_path / "b").mkdir()
    for name in (path, path.rename(tmp_path / "b" / "c.jsonl"), tmp_path / "b"):
        source = Files([str(name)], val_fraction=0.2) if name != path or path.exists() else None
        if source:
            build(source, tmp_path / "out", workers=1)
            assert "is complete" in capsys.readouterr().out
    moved = tmp_path / "b" / "c.jsonl"
    moved.write_text(moved.read_text().replace("a", "e", 1))
    with pytest.raises(UserError, match="holds another corpus"):
        build(Files([str(moved)], val_fraction=0.2), tmp_path / "out", workers=1)


def test_a_text_too_short_leaves_nothing(gpt2_files, tmp_path):
    """So that the same command does it with the text mended; a folder that was there before stays, and its files."""
    few = write_jsonl(tmp_path / "few.jsonl", ["a", "b"])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").write_text("mine")
    for out in (tmp_path / "new" / "out", tmp_path / "there"):
        with pytest.raises(UserError, match="too short to give any to val"):
            build(Files([str(few)]), out, workers=1)
    assert not (tmp_path / "new").exists() and [p.name for p in (tmp_path / "there").iterdir()] == ["notes"]
    write_jsonl(few, ["a", "b"] * 300)
    build(Files([str(few)]), tmp_path / "there", workers=1)
    assert len(tokens_of(tmp_path / "there", "train")) > 1000


def test_a_mended_text_is_begun_again(gpt2_files, tmp_path, capsys):
    """After an error in the middle, with shards finished: the same command, its text mended, makes the whole corpus."""
    path, documents = tmp_path / "a.jsonl", DOCUMENTS[:30]
    write_jsonl(path, documents)
    whole = path.read_bytes()
    path.write_bytes(whole + b"{broken\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PIECE", 20_000)
        with pytest.raises(UserError, match="line 31 .* is not a JSON object"):
            build(Files([str(path)], val_fraction=0.2), tmp_path / "out", workers=1, shard_tokens=5000)
    assert list((tmp_path / "out").glob("*.bin")) and (tmp_path / "out" / shards.PROGRESS).exists()
    with pytest.raises(UserError, match="is half made"):
        Corpus.open(tmp_path / "out", "train", block_size=8, vocab_size=50257)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="with other settings"):  # which are no mended text
        build(Files([str(path)], val_fraction=0.2), tmp_path / "out", workers=1, shard_tokens=6000)
    build(Files([str(path)], val_fraction=0.2), tmp_path / "out", workers=1, shard_tokens=5000)
    assert "beginning again" in capsys.readouterr().out
    drawn = [text for i, text in enumerate(documents) if sources._draw(i) >= 0.2]
    assert tokens_of(tmp_path / "out", "train") == plain_loop(drawn)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"settings": {}}', b'{"settings": {}, "shards": [1]}'])
def test_a_damaged_progress_file_is_one_line(jsonl, tmp_path, content):
    (tmp_path / shards.PROGRESS).write_bytes(content)
    with pytest.raises(UserError, match="progress.json is damaged|holds another corpus"):
        build(Files([str(jsonl)]), tmp_path, workers=1)
    assert (tmp_path / shards.PROGRESS).read_bytes() == content


# ---- Which files are read


def test_a_name_that_exists_is_that_file(tmp_path):
    """Brackets and all; else it is a glob, of files and of folders."""
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    names = ["book1.txt", "book[1].txt", "a*.txt", "B.TXT", "c: d.Md", "deep/e.JSONL.GZ"]
    for name in names:
        (tmp_path / "docs" / name).write_text(name)
    (tmp_path / "docs" / ".git").mkdir()

    def found(*inputs: str) -> list[str]:
        return sorted(os.path.relpath(path, tmp_path / "docs") for path in sources.Finder().find(inputs))

    docs = f"{tmp_path}/docs"
    assert found(docs) == found(f"{docs}/*") == found(f"{docs}/**") == sorted(names)
    assert found(docs, *(f"{docs}/{name}" for name in names), docs) == sorted(names)  # each once
    for name in names:
        assert found(f"{docs}/{name}") == [name]
    assert found(f"{docs}/b*.txt") == ["book1.txt", "book[1].txt"]
    assert found(f"{docs}/book[12].txt") == ["book1.txt"]
    (tmp_path / "docs" / "deep" / "f.pdf").write_text("")
    finder = sources.Finder()
    assert len(finder.find([docs])) == len(names)
    assert finder.notes() == [
        f"passed over, hidden: {docs}/.git",
        f"passed over, of another kind: {docs}/deep/f.pdf",
    ]


def test_links_do_not_multiply_files(tmp_path):
    """To the folder itself, to a sibling, to a file, to nothing, in circles; a hard link is the same file as well."""
    docs, other = tmp_path / "docs", tmp_path / "other"
    docs.mkdir()
    other.mkdir()
    (docs / "b.txt").write_text("b")
    (other / "c.txt").write_text("c")
    for name, target in {
        "a": ".", "file.txt": "b.txt", "nothing.txt": "none", "circle": "circle", "others": other, "up": ".."
    }.items():  # fmt: skip
        (docs / name).symlink_to(target)
    os.link(docs / "b.txt", docs / "z.txt")
    finder = sources.Finder()
    assert finder.find([str(docs)]) == [f"{docs}/b.txt", f"{docs}/others/c.txt"]
    notes = "\n".join(finder.notes())
    assert "passed over, the same again" in notes and f"{docs}/a (it is {docs})" in notes
    assert f"of another kind: {docs}/circle, {docs}/nothing.txt" in notes
    assert finder.find([str(other)]) == []  # found by the link


def test_home_and_odd_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b:c.txt").write_text("x")
    assert sources.Finder().find(["~/a b:c.txt"]) == [f"{tmp_path}/a b:c.txt"]
    assert sources.read_text("~/a b:c.txt") == "x"


def test_what_is_passed_over_is_said(gpt2_files, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some text " * 100)
    for i in range(5):
        (tmp_path / "in" / f"{i}.pdf").write_text("")
    build(Files([str(tmp_path / "in")], val_fraction=0.1), tmp_path / "out", workers=1)
    said = capsys.readouterr().out
    assert re.search(r"passed over, of another kind: .*0.pdf, .*1.pdf, .*2.pdf and 2 more\n", said)


# ---- What text is


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_byte_order_mark_is_no_text_and_line_ends_stay(gpt2_files, tmp_path, monkeypatch, name):
    """The same of a file that is prepared and of one that is read whole, as a prompt; in blocks of any size."""
    text = "one\r\ntwo\rthree\n\ufeff four " * 20
    content = b"\xef\xbb\xbf" + text.encode()
    if name == "a.jsonl":
        content = b"\xef\xbb\xbf" + json.dumps({"text": text}).encode() + b"\r\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for piece in (1, 7, 1 << 20):
        monkeypatch.setattr(sources, "PIECE", piece)
        pieces = list(Files([str(tmp_path / name)], val=[], val_fraction=0.5).pieces({"train": 0, "val": 0}))
        assert "".join(piece.text for piece in pieces) == text
        if name == "a.txt":
            assert sources.read_text(tmp_path / name) == text
    (tmp_path / "b.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(UserError, match="byte 0 is not UTF-8 text"):
        sources.read_text(tmp_path / "b.txt")
    for missing in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(UserError, match="cannot read"):
            sources.read_text(missing)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused(tmp_path, encoding):
    """Without a byte order mark too, where every second byte is NUL, which alone is UTF-8."""
    for name, text in ("a.txt", "plain words"), ("a.jsonl", '{"text": "plain words"}\n'):
        (tmp_path / name).write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match="is not UTF-8 text|is not a JSON object"):
            list(Files([str(tmp_path / name)]).pieces({"train": 0, "val": 0}))
    with pytest.raises(UserError, match="byte . is not UTF-8 text; convert the file to UTF-8"):
        sources.read_text(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"one NUL\0 is text")
    assert sources.read_text(tmp_path / "a.txt") == "one NUL\0 is text"


def test_names_that_are_no_text(gpt2_files, tmp_path):
    """A file whose name is no UTF-8 is prepared like any other; an empty name, as of an unset variable, is none."""
    path = tmp_path / os.fsdecode(b"bad\xff.txt")
    path.write_text("plain text " * 200)
    for _ in ("made", "found"):
        build(Files([str(path)], val_fraction=0.2), tmp_path / "out", workers=1)
    meta = read_meta(tmp_path / "out")
    assert meta and meta.source == str(path)
    with pytest.raises(UserError, match="the name of a file or folder is empty"):
        Files([""])


# ---- Bad input


def complaint_about(path: Path, content: bytes, **how) -> str:
    path.write_bytes(content)
    out = path.parent / "out"
    with pytest.raises(UserError) as error:
        build(Files([str(path)], **how), out, workers=1)
    assert "\n" not in str(error.value) and (not out.exists() or not list(out.glob("*.bin*")))
    assert str(path) in str(error.value)
    return str(error.value)


def test_bad_input_is_located(gpt2_files, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 1000)
    good = "Müller\n".encode() * 1000
    assert "byte 7,000 is not UTF-8" in complaint_about(tmp_path / "a.txt", good[:7000] + b"\xff" + good[7000:])
    assert "byte 7,993 is not UTF-8" in complaint_about(tmp_path / "a.txt", good[:7994] + b"x")
    assert "byte 0 is not UTF-8" in complaint_about(tmp_path / "junk.md", b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    assert "cannot read" in complaint_about(tmp_path / "a.txt.gz", b"not gzip")
    assert "cannot read" in complaint_about(tmp_path / "a.txt.gz", gzip.compress(good)[:-9])
    assert "cannot read" in complaint_about(tmp_path / "a.md.zst", b"not zstd")
    packed = pyarrow.compress(os.urandom(5000) + good, codec="zstd", asbytes=True)
    assert "cannot read" in complaint_about(tmp_path / "a.jsonl.zst", packed[:-9])
    assert "cannot read" in complaint_about(tmp_path / "a.parquet", b"PAR1 but no more")

    line = b'{"text": "a"}\n'
    assert "line 3 (byte 28) is not" in complaint_about(tmp_path / "a.jsonl", line * 2 + b"{broken\n" + line)
    assert "line 3 (byte 15) is not" in complaint_about(tmp_path / "a.jsonl", line + b"\n" + b'{"body": "a"}\n')
    assert "line 1 (byte 0) is not" in complaint_about(tmp_path / "a.jsonl", b'["text"]')
    assert "line 1 (byte 0) is not" in complaint_about(tmp_path / "a.jsonl", b'{"text": 3}')
    assert "under 'body'" in complaint_about(tmp_path / "a.jsonl", line, field="body")
    assert "byte 24 is not UTF-8" in complaint_about(tmp_path / "a.jsonl", line + b'{"text": "\xff"}\n')

    for name, column in (("b.parquet", ["a", None]), ("c.parquet", [1, 2])):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / name)
        number = 0 if 1 in column else 1
        assert f"row {number} of 'text' is not" in complaint_about(tmp_path / name, (tmp_path / name).read_bytes())
    assert "no column 'x'; set --field to one of ['text']" in complaint_about(
        tmp_path / "c.parquet", (tmp_path / "c.parquet").read_bytes(), field="x"
    )


def test_bad_arguments(gpt2_files, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.pdf").write_text("hello")
    (tmp_path / "a.parquet.gz").write_text("hello")
    a = str(tmp_path / "a.txt")
    for inputs, how, complaint in (
        ([str(tmp_path / "empty")], {}, "holds no text"),
        ([str(tmp_path / "none.txt")], {}, "missing or of another kind"),
        ([str(tmp_path / "a.pdf")], {}, "missing or of another kind"),
        ([str(tmp_path / "a.parquet.gz")], {}, "missing or of another kind"),
        ([str(tmp_path / "*.bin")], {}, "missing or of another kind"),
        ([str(tmp_path / "a.*")], {}, r"a\.parquet\.gz .* of another kind"),
        ([a], {"val": [a]}, "every input is in --val"),
        ([a], {"val_fraction": 0.0}, "not between 0 and 1"),
        ([a], {"val_fraction": 1.0}, "not between 0 and 1"),
    ):
        with pytest.raises(UserError, match=complaint):
            Files(inputs, **how)
    for how in ({"workers": 0}, {"shard_tokens": 0}, {"workers": 10**6}):
        with pytest.raises(UserError, match="at least 1|at most 1024"):
            build(Files([a]), tmp_path / "out", **how)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        build(Files([a]), tmp_path / "file" / "out", workers=1)


def test_text_that_cannot_be_encoded_is_located(tmp_path):
    """A lone surrogate is U+FFFD, as for tiktoken; a word outside a vocabulary is one line with its place."""
    byte_level = made("byte-level", special=("<|endoftext|>",))
    byte_level.save(str(tmp_path / "t.json"))
    (tmp_path / "d.jsonl").write_text('{"text": "a document"}\n' * 300 + '{"text": "half: \\ud83d and on"}\n')
    build(Files([str(tmp_path / "d.jsonl")]), tmp_path / "out", tokenizer=str(tmp_path / "t.json"), workers=1)
    ids = tokens_of(tmp_path / "out", "train") + tokens_of(tmp_path / "out", "val")
    assert byte_level.decode(ids).count("half: \ufffd and on") == 1

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "world": 1, "</s>": 2}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "w.json"))
    good = ["hello world"] * 50
    write_jsonl(tmp_path / "e.jsonl", [*good, "hello there"])
    pyarrow.parquet.write_table(pyarrow.table({"text": [*good, "hello </s>"]}), tmp_path / "f.parquet")
    how = {"tokenizer": str(tmp_path / "w.json")}
    for name, where in (("e.jsonl", "line 51 (byte 1,650)"), ("f.parquet", "row 50")):
        for workers in (1, 2):
            with pytest.raises(UserError) as error:
                build(Files([str(tmp_path / name)]), tmp_path / "o", workers=workers, **how)
            assert f"{name}: {where}: the tokenizer cannot encode it" in str(error.value)
            assert not (tmp_path / "o").exists()
