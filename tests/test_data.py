"""The reader: every window once, the same batch on any machines, and no bad file gets through."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from jaxgpt import UserError, data
from jaxgpt.data import Batches, Corpus, _mix, _permute, parse_mixture, place, prefetch
from jaxgpt.tokenizer import CharTokenizer, Meta, meta_for, write_meta

VOCAB = 60_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora")


def corpus_of(
    folder: Path, *shards: np.ndarray, block_size: int = 1, split: str = "train", dtype: str = "<u2"
) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{split}*"):
        old.unlink()
    names = [f"{split}_{i:06d}.bin" for i in range(len(shards))] if len(shards) > 1 else [f"{split}.bin"]
    for name, tokens in zip(names, shards, strict=True):
        np.asarray(tokens).astype(dtype).tofile(folder / name)
    if dtype == "<u4":
        write_meta(folder, Meta(VOCAB, dtype="uint32"))
    return Corpus.open(folder, split, block_size=block_size, vocab_size=VOCAB)


# ---- The order


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, key):
    images = _permute(np.arange(n, dtype=np.uint64), n, np.full(n, key, np.uint64))
    assert np.array_equal(np.sort(images), np.arange(n))


@pytest.mark.parametrize("n", [1_000_003, 3 * 2**18, 2**20, 999_999])
def test_permute_of_many(n):
    images = _permute(np.arange(n, dtype=np.uint64), n, np.full(n, 7, np.uint64))
    assert np.bincount(images.astype(np.int64), minlength=n).tolist() == [1] * n


@pytest.mark.parametrize("n", [2, 3, 5, 12, 100])
def test_every_image_is_equally_likely(n):
    """Chi-square over keys that differ by one: for the first places, and for pairs of neighbours' distances."""
    keys = _mix(np.arange(200 * n, dtype=np.uint64))
    images = np.stack([_permute(np.full(len(keys), i, np.uint64), n, keys) for i in range(min(n, 12))]).astype(int)
    for row in images:
        assert stats.chisquare(np.bincount(row, minlength=n)).pvalue > 1e-4
    for row in (images[1:] - images[:-1]) % n:
        distances = np.bincount(row, minlength=n)
        assert distances[0] == 0 and (n == 2 or stats.chisquare(distances[1:]).pvalue > 1e-4)


def test_order_has_no_serial_structure():
    """Of one long epoch: no correlation of neighbours at small lags, nor of place with image; distances are uniform."""
    n = 1_000_003
    images = _permute(np.arange(n, dtype=np.uint64), n, np.full(n, 3, np.uint64)).astype(float)
    centred = (images - images.mean()) / images.std()
    for lag in (1, 2, 3, 7, 64, 1000, 1001):  # 1001 is about ceil(sqrt(n)), the width of the Feistel halves
        assert abs(np.mean(centred[lag:] * centred[:-lag])) < 5 / np.sqrt(n)
    assert abs(np.mean(centred * np.linspace(-np.sqrt(3), np.sqrt(3), n))) < 5 / np.sqrt(n)
    distances = np.diff(images) % n
    assert stats.kstest(distances / n, "uniform").pvalue > 1e-4


@given(st.integers(2, 5000), st.integers(1, 70), st.integers(1, 99), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_an_epoch_has_every_window_once(folder, n, block, rows, seed):
    """Counted over two epochs that are not aligned with the steps."""
    block, rows = min(block, n - 1), max(rows, n // block // 20)
    corpus = corpus_of(folder / "epoch", np.arange(n), block_size=block)
    windows = max(1, (n - block) // block)
    batches = Batches(corpus, seed=seed, rows=rows, block_size=block)
    steps = -(-2 * windows // rows)
    read = np.concatenate([batches.rows_at(step) for step in range(steps)])[: 2 * windows]
    assert (np.diff(read.astype(int)) == 1).all()  # whole windows of the text
    for epoch in (read[:windows], read[windows:]):
        starts = np.sort(epoch[:, 0].astype(int))
        assert (np.diff(starts) == block).all()  # each once, end to end: all tokens are read but the ends
        assert starts[0] <= max(block, 2 * block - 1) and n - 1 - (starts[-1] + block) < 2 * block


def test_epochs_differ_in_order_and_boundaries(folder):
    corpus = corpus_of(folder / "epochs", np.arange(50_000), block_size=100)
    windows = (50_000 - 100) // 100
    batches = Batches(corpus, seed=1, rows=windows, block_size=100)
    starts = [batches.rows_at(epoch)[:, 0].astype(int) for epoch in range(40)]
    shifts = {int(s.min()) for s in starts}
    assert len(shifts) > 30 and max(shifts) > 60
    assert all((np.argsort(a) == np.argsort(b)).mean() < 0.05 for a, b in zip(starts, starts[1:], strict=False))
    other = Batches(corpus, seed=2, rows=windows, block_size=100).rows_at(0)[:, 0]
    assert (other.argsort() == starts[0].argsort()).mean() < 0.05


def test_random_order_is_uniform_over_all_offsets(folder):
    corpus = corpus_of(folder / "random", np.arange(105), block_size=5)
    batches = Batches(corpus, seed=1, rows=50_000, block_size=5, order="random")
    starts = batches.rows_at(0)[:, 0].astype(int)
    assert stats.chisquare(np.bincount(starts, minlength=100)).pvalue > 1e-4  # 0 … 99: nanoGPT's range
    assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 5 / np.sqrt(50_000)
    assert not np.array_equal(starts, batches.rows_at(1)[:, 0])


def test_start_up_on_200_gigabytes(folder):
    """A sparse file, the last token set: opening, the first batch and one in the far future take under a second."""
    path = folder / "huge"
    path.mkdir()
    size = 200 * 10**9
    with open(path / "train.bin", "wb") as f:
        f.seek(size - 2)
        f.write(b"\7\0")
    began = time.monotonic()
    corpus = Corpus.open(path, "train", block_size=1024, vocab_size=50257)
    batches = Batches(corpus, seed=1, rows=8, block_size=1024)
    for step in (0, 10**9):
        assert batches.rows_at(step).shape == (8, 1025)
    assert time.monotonic() - began < 1
    assert len(corpus) == size // 2 and corpus.read(np.array([len(corpus) - 2]), 2).tolist() == [[0, 7]]
    os.remove(path / "train.bin")


def test_the_reader_outruns_the_accelerator(folder):
    """Asserted: 10 million tokens a second at block 1024, 20 times an H200's use. Measured: some 400 million."""
    corpus = corpus_of(folder / "fast", np.zeros(20_000_000), block_size=1024)
    batches = Batches(corpus, seed=1, rows=480, block_size=1024)
    batches.rows_at(0)
    began = time.monotonic()
    for step in range(20):
        batches.rows_at(step)
    assert 20 * 480 * 1024 / (time.monotonic() - began) > 10_000_000


# ---- The same on any machines


@given(st.integers(0, 50), st.integers(0, 24), st.integers(0, 24), st.sampled_from(["shuffle", "random"]))
@settings(deadline=None, max_examples=50)
def test_rows_are_parts_of_the_step(folder, step, a, b, order):
    corpora = [corpus_of(folder / name, np.arange(1000) + 2000 * i, block_size=16) for i, name in enumerate("xyz")]
    for batches in (
        Batches(corpora[0], seed=5, rows=24, block_size=16, order=order),
        Batches(corpora, ["0.5", "0.125", "0.375"], seed=5, rows=24, block_size=16, order=order),
    ):
        lo, hi = min(a, b), max(a, b)
        assert np.array_equal(batches.rows_at(step, lo, hi), batches.rows_at(step)[lo:hi])


@pytest.mark.parametrize("mesh", [(8, 1, 1), (4, 2, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_place_is_the_same_on_any_mesh(folder, mesh):
    corpus = corpus_of(folder / "mesh", np.arange(5000), block_size=16)
    batches = Batches(corpus, seed=5, rows=48, block_size=16)
    auto = (jax.sharding.AxisType.Auto,) * 3
    spec = PartitionSpec(None, None, ("data", "fsdp"), None)
    sharding = NamedSharding(jax.make_mesh(mesh, ("data", "fsdp", "tensor"), axis_types=auto), spec)
    placed = place(batches, 7, steps=2, micro_steps=3, sharding=sharding)
    expected = np.stack([batches.rows_at(7), batches.rows_at(8)]).reshape(2, 3, 16, 17)
    assert placed.dtype == np.uint16 and placed.sharding == sharding
    assert np.array_equal(placed, expected)


PROCESS = """
import sys, numpy as np, jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxgpt.data import Batches, Corpus, place
me, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, me)
assert jax.process_count() == 2 and jax.device_count() == 8
corpus = Corpus.open(folder, "train", block_size=16, vocab_size=60000)
rows = []
read = corpus.read
corpus.read = lambda starts, width: rows.append(len(starts)) or read(starts, width)
batches = Batches(corpus, seed=5, rows=48, block_size=16)
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
placed = place(batches, 7, micro_steps=3, sharding=NamedSharding(mesh, PartitionSpec(None, None, "data", None)))
assert sum(rows) == 24, rows  # half of the step's rows
for shard in placed.addressable_shards:
    print(shard.index[2].start, np.asarray(shard.data).ravel().tolist(), sep="|")
"""


def test_two_processes_read_the_same_batch_each_its_half(folder):
    corpus = corpus_of(folder / "mesh", np.arange(5000), block_size=16)
    expected = Batches(corpus, seed=5, rows=48, block_size=16).rows_at(7).reshape(1, 3, 16, 17)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    port = str(20_000 + os.getpid() % 10_000)
    command = [sys.executable, "-c", PROCESS]
    both = [
        subprocess.Popen([*command, str(i), port, folder / "mesh"], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    lines = "".join(process.communicate(timeout=100)[0] for process in both).splitlines()
    assert [process.returncode for process in both] == [0, 0]
    merged = np.full_like(expected, 0)
    for line in lines:
        start, tokens = line.split("|")
        merged[:, :, int(start) : int(start) + 2] = np.reshape(json.loads(tokens), (1, 3, 2, 17))
    assert len(lines) == 8 and np.array_equal(merged, expected)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(2, 30))
@settings(deadline=None)
def test_many_shards_are_one_corpus(folder, sizes, width):
    whole = np.arange(sum(sizes))
    if len(whole) < width:
        return
    corpus = corpus_of(folder / "shards", *np.split(whole, np.cumsum(sizes)[:-1]), block_size=width - 1)
    starts = np.arange(len(whole) - width + 1)
    assert np.array_equal(corpus.read(starts, width), np.lib.stride_tricks.sliding_window_view(whole, width))
    assert len(corpus) == len(whole) and len(corpus.paths) == len(sizes)


def test_uint32_corpora(folder):
    corpus = corpus_of(folder / "wide", np.arange(100), dtype="<u4", block_size=8)
    batches = Batches(corpus, seed=1, rows=4, block_size=8)
    assert batches.rows_at(0).dtype == np.uint32 and (np.diff(batches.rows_at(0).astype(int)) == 1).all()


# ---- Mixtures


def test_mixture_is_exact_and_each_corpus_keeps_its_epochs(folder):
    sizes, weights = (3000, 5000, 1000), ["0.7", "0.2", "0.1"]
    corpora = [corpus_of(folder / f"m{i}", np.arange(n) + 10_000 * i, block_size=10) for i, n in enumerate(sizes)]
    batches = Batches(corpora, weights, seed=3, rows=25, block_size=10)
    starts = np.concatenate([batches.rows_at(step)[:, 0] for step in range(400)]).astype(int)
    which = starts // 10_000
    assert Counter(which.tolist()) == {0: 7000, 1: 2000, 2: 1000}
    per_ten = np.stack([(which.reshape(-1, 10) == i).sum(1) for i in range(3)])
    assert (per_ten.T == [7, 2, 1]).all()  # P = 10
    assert len({tuple(run) for run in which.reshape(-1, 10)[:50].tolist()}) > 30  # in ever another order
    for i, n in enumerate(sizes):
        mine = starts[which == i]
        # the same samples as that corpus alone would give, in its first len(mine): its epochs, one after another
        starts_of_all = batches._read(i, np.arange(len(mine), dtype=np.uint64))[:, 0]
        assert sorted(mine) == sorted(starts_of_all.astype(int))
        first_epoch = np.sort(starts_of_all[: (n - 10) // 10].astype(int))
        assert (np.diff(first_epoch) == 10).all()


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("a", [("a", 1)]),
        ("a:0.7,b:0.3", [("a", Fraction(7, 10)), ("b", Fraction(3, 10))]),
        ("a:1/3, b:2/3", [("a", Fraction(1, 3)), ("b", Fraction(2, 3))]),
        ("a:1", [("a", 1)]),
    ],
)
def test_parse_mixture(dataset, expected):
    assert parse_mixture(dataset) == expected


@pytest.mark.parametrize(
    ("dataset", "complaint"),
    [
        ("a:0.7,b:0.4", "sum to 1.1"),
        ("a:1.5,b:-0.5", "make them positive"),
        ("a:1,b:0", "make them positive"),
        ("a:0.5,a:0.5", "each corpus once"),
        (":0.5,a:0.5", "each corpus once"),
        ("a,b", "NAME:WEIGHT"),
        ("a:x,b:0.5", "NAME:WEIGHT"),
        ("a:nan,b:0.5", "NAME:WEIGHT"),
        ("a:1/0,b:0.5", "NAME:WEIGHT"),
        ("a:0.5,b:0.5,", "NAME:WEIGHT"),
    ],
)
def test_bad_mixtures(dataset, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_mixture(dataset)


def test_mixtures_need_one_tokenizer(folder):
    corpora = []
    for i, chars in enumerate(("abc", "abd")):
        corpus_of(folder / f"t{i}", np.zeros(100))
        write_meta(folder / f"t{i}", meta_for(CharTokenizer(chars), "char"))
        corpora.append(Corpus.open(folder / f"t{i}", "train", block_size=4, vocab_size=3))
    with pytest.raises(UserError, match=r"t1 has 3 characters, .*t0, mixed with it, other 3 characters: id 2 is 'd'"):
        Batches(corpora, ["0.5", "0.5"], seed=1, rows=2, block_size=4)


# ---- Bad files


def open_corpus(folder: Path, block_size: int = 8, vocab_size: int = 50) -> Corpus:
    return Corpus.open(folder, "train", block_size=block_size, vocab_size=vocab_size)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"train.bin does not exist; run its prepare.py"):
        open_corpus(tmp_path)
    path = tmp_path / "train.bin"
    for content, complaint in (
        (b"", "is missing or empty"),
        (b"abc", "has 3 bytes, not 2 for each token"),
        (bytes(16), "has 8 tokens, fewer than one window of block_size . 1 = 9"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"train.bin.*{complaint}"):
            open_corpus(tmp_path)
    path.write_bytes(bytes(18))
    assert open_corpus(tmp_path).read(np.array([0]), 9).tolist() == [[0] * 9]
    (tmp_path / "train_000000.bin").write_bytes(bytes(18))
    with pytest.raises(UserError, match="both train.bin and train_000000.bin"):
        open_corpus(tmp_path)


def test_a_token_outside_the_vocabulary_is_located(folder, monkeypatch):
    """In a small corpus when it is opened, in a large one when it is read."""
    tokens = np.arange(100) % 50
    tokens[77] = 50
    complaint = r"train_000001.bin: token 17 is 50, outside the vocabulary of 50"
    corpus_of(folder / "outside", tokens[:60], tokens[60:])
    with pytest.raises(UserError, match=complaint):
        open_corpus(folder / "outside")
    monkeypatch.setattr(data, "DIGEST_LIMIT_BYTES", 0)
    corpus = open_corpus(folder / "outside")
    corpus.read(np.array([0, 60]), 9)
    with pytest.raises(UserError, match=complaint):
        corpus.read(np.array([0, 72]), 9)
    batches = Batches(corpus, seed=1, rows=8, block_size=8)
    with pytest.raises(UserError, match=complaint), prefetch(batches.rows_at, 0, 30) as ahead:
        list(ahead)


def test_recorded_shards_are_checked(folder):
    tokens = np.arange(100) % 50
    path = folder / "recorded"
    corpus = corpus_of(path, tokens[:60], tokens[60:])
    shards = [
        {"file": p.name, "tokens": p.stat().st_size // 2, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in corpus.paths
    ]
    write_meta(path, Meta(50, shards={"train": shards}))
    assert len(open_corpus(path)) == 100
    with pytest.raises(UserError, match="vocabulary of 50, the model one of 49; .*vocab_size=50"):
        open_corpus(path, vocab_size=49)

    second, content = corpus.paths[1], corpus.paths[1].read_bytes()
    second.write_bytes(content[:10] + b"\1" + content[11:])
    with pytest.raises(UserError, match="train_000001.bin was altered"):
        open_corpus(path)
    second.write_bytes(content[:-2])
    with pytest.raises(UserError, match="train_000001.bin has 78 bytes"):
        open_corpus(path)
    second.unlink()
    with pytest.raises(UserError, match="train_000001.bin is missing"):
        open_corpus(path)
    second.write_bytes(content)
    (path / "train_000002.bin").write_bytes(content)
    with pytest.raises(UserError, match="train_000002.bin is not of the corpus"):
        open_corpus(path)


# ---- Prefetch


def test_prefetch_gives_all_in_order_and_works_ahead():
    made, at_most = [], []

    def batch_at(step):
        made.append(step)
        return step * 10

    with prefetch(batch_at, 5, 20, depth=3) as ahead:
        for i, (step, batch) in enumerate(ahead):
            assert (step, batch) == (5 + i, 50 + 10 * i)
            at_most.append(len(made) - i)
    assert made == list(range(5, 20)) and max(at_most) <= 1 + 3


def test_prefetch_raises_in_the_consumer_and_stops_cleanly():
    before = threading.active_count()

    def batch_at(step):
        if step == 2:
            raise UserError("bad batch")
        return step

    with pytest.raises(UserError, match="bad batch"), prefetch(batch_at, 0, 10) as ahead:
        for step, _ in ahead:
            assert step < 2
    release, made = threading.Event(), []
    with prefetch(lambda step: made.append(step) or release.wait(5), 0, 10**9, depth=3) as slow:
        release.set()
        next(slow)
    assert len(made) <= 4 and threading.active_count() == before
