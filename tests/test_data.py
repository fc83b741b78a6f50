"""The reader: every window once, the same batch on any machines, and no bad file gets through."""

import hashlib
import itertools
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
from conftest import xla_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from jaxgpt import UserError, data
from jaxgpt.config import DataConfig
from jaxgpt.data import (
    Batches,
    Corpus,
    RunData,
    Windows,
    _mix,
    _permute,
    check_same_corpora,
    parse_mixture,
    place,
    prefetch,
)
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
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(4)}
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


# ---- The data's position is a number of samples


PLANS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=6)


@given(st.integers(40, 700), PLANS, st.integers(0, 99))
def test_a_run_of_changing_batch_sizes_reads_the_same_samples(folder, n, plan, seed):
    """(rows, steps) one after the other, each going on where the one before ended: sample by sample what a run of one
    row a step reads, so that no window of an epoch is read twice or never."""
    corpus = corpus_of(folder / "resumed", np.arange(n), block_size=4)
    step, sample, read = 0, 0, []
    for rows, steps in plan:
        batches = Batches(corpus, seed=seed, rows=rows, block_size=4)
        batches.begin(step, sample)
        for _ in range(steps):
            read += batches.rows_at(step).tolist()
            step += 1
        sample = batches.samples(step)
    one_by_one = Batches(corpus, seed=seed, rows=1, block_size=4)
    assert sample == len(read) and read == [one_by_one.rows_at(i)[0].tolist() for i in range(sample)]
    windows = max(1, (n - 4) // 4)
    for epoch in range(sample // windows):
        starts = [row[0] for row in read[epoch * windows : (epoch + 1) * windows]]
        assert len(set(starts)) == windows


@pytest.mark.parametrize("plan", [[(8, 128)], [(8, 64), (16, 32)], [(16, 32), (8, 64)], [(8, 3), (24, 41), (2, 8)]])
def test_no_window_twice_and_none_left_out(folder, plan):
    """A report of 2026: after a batch size changed on resume, 237 windows of 1,024 were read twice and 237 never."""
    corpus = corpus_of(folder / "reported", np.arange(16 * 1025 + 1) // 16, block_size=16)
    step, sample, seen = 0, 0, Counter()
    for rows, steps in plan:
        batches = Batches(corpus, seed=1, rows=rows, block_size=16)
        batches.begin(step, sample)
        for _ in range(steps):
            seen.update(batches.rows_at(step)[:, 5].tolist())
            step += 1
        sample = batches.samples(step)
    assert sample == 1024 and set(seen.values()) == {1}


MESHES = st.sampled_from([(8, 1, 1), (2, 4, 1), (1, 1, 8), (2, 2, 2)])


@given(st.lists(st.tuples(MESHES, st.integers(1, 12), st.booleans()), min_size=1, max_size=6))
@settings(max_examples=10, deadline=None)
def test_placed_batches_go_on_too(folder, plan):
    """Mesh, batch size and micro-steps changed at any step: the rows of a step are those of its samples, over several
    steps in a call. So with `shuffle` no window of an epoch is read twice or never."""
    corpus = corpus_of(folder / "placed", np.arange(3000), block_size=8)
    auto = (jax.sharding.AxisType.Auto,) * 3
    spec = PartitionSpec(None, None, ("data", "fsdp"), None)
    samples = Batches(corpus, seed=3, rows=6 * 12 * 16, block_size=8).rows_at(0)
    step, sample, starts = 0, 0, []
    for mesh, rows, twice in plan:
        sharding = NamedSharding(jax.make_mesh(mesh, ("data", "fsdp", "tensor"), axis_types=auto), spec)
        batches = Batches(corpus, seed=3, rows=rows * 8, block_size=8)
        batches.begin(step, sample)
        micro_steps = 1 + twice * (rows % 2 == 0)
        placed = np.asarray(place(batches, step, steps=2, micro_steps=micro_steps, sharding=sharding)).reshape(-1, 9)
        assert np.array_equal(placed, samples[sample : sample + rows * 16])
        starts += placed[:, 0].tolist()
        step, sample = step + 2, batches.samples(step + 2)
    windows = (3000 - 8) // 8
    for epoch in range(len(starts) // windows):
        assert len({*starts[epoch * windows : (epoch + 1) * windows]}) == windows


# ---- Evaluation over the whole split


@given(st.integers(2, 400), st.integers(1, 9), st.integers(1, 7), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_weights_make_the_mean_over_all_windows(folder, n, block, micro_rows, micro_steps):
    """However many windows there are: every one counts the same, though window 0 fills the last calls."""
    block = min(block, n - 1)
    corpus = corpus_of(folder / "whole", np.arange(n) * 7 % 1000, block_size=block, split="val")
    windows = Windows(corpus, rows=micro_rows * micro_steps, micro_rows=micro_rows, block_size=block)
    rows = np.stack([windows.rows_at(call, 0, windows.rows) for call in range(windows.calls)])
    tokens = np.arange(n) * 7 % 1000
    expected = [tokens[i * block : (i + 1) * block + 1].tolist() for i in range((n - 1) // block)]
    assert rows.reshape(-1, block + 1)[: windows.count].tolist() == expected
    losses = np.sin(rows.astype(float)).sum(-1)  # any function of a row
    means = losses.reshape(windows.calls, micro_steps, micro_rows).mean(-1)
    assert windows.weights.shape == means.shape and np.isclose(windows.weights.sum(), 1)
    assert np.isclose((windows.weights * means).sum(), np.sin(np.array(expected, float)).sum(-1).mean())


def config_of(**values) -> DataConfig:
    return DataConfig(**({"batch_size": 3, "gradient_accumulation_steps": 8, "seed": 1} | values))


@pytest.mark.parametrize("eval_iters", [0, 1, 7, 30])
def test_evaluations_of_a_run(folder, tmp_path, mesh, monkeypatch, eval_iters):
    """eval_iters=0: the whole validation split, not a window twice, and nothing of the training split."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("ab"):
        for split, n in (("train", 500), ("val", 4 * 663 + 2)):
            corpus_of(tmp_path / "data" / name, np.arange(n) + 3000 * i, block_size=4, split=split)
    data = RunData(config_of(dataset="a", eval_iters=eval_iters), 4, mesh)
    batches, weights = data.eval_batches(), data.eval_weights()
    assert batches.keys() == weights.keys() == ({"val"} if eval_iters == 0 else {"train", "val"})
    for split, calls in batches.items():
        assert len({(call.shape, call.dtype) for call in calls}) == 1 and weights[split].shape[0] == len(calls)
        rows = np.stack([np.asarray(call)[0] for call in calls])
        mean = (weights[split] * rows[..., 0].mean(-1)).sum()  # of each window's first token
        if eval_iters == 0:
            assert len(np.unique(rows[..., 0])) == 663 and np.isclose(mean, 4 * 331)
        else:
            assert weights[split].size == eval_iters and np.isclose(mean, rows[..., 0].mean())

    both = RunData(config_of(dataset="a:0.75,b:0.25", eval_iters=eval_iters), 4, mesh)
    batches, weights = both.eval_batches(), both.eval_weights()
    assert batches.keys() - {"train"} == {"val", "val_a", "val_b"}
    means = {}
    for split, calls in batches.items():
        firsts = np.stack([np.asarray(call)[0, ..., 0] for call in calls]).astype(float)
        assert np.isclose(weights[split].sum(), 1)
        means[split] = (weights[split] * firsts.mean(-1)).sum()
    if eval_iters == 0:
        assert np.isclose(means["val"], 0.75 * means["val_a"] + 0.25 * means["val_b"])


@pytest.mark.parametrize("eval_iters", [0, 7])
def test_bytes_of_an_evaluations_targets(folder, tmp_path, mesh, eval_iters):
    """The text of the targets, in bytes for each of them, special tokens having none; of tokens without a text none."""
    itos = ["a", "é", "語", "🙂", "", "b", "c"]
    tokens = np.random.default_rng(0).integers(0, len(itos), 1001)
    for split in ("train", "val"):
        corpus_of(tmp_path, tokens, block_size=4, split=split)
    config = config_of(data_dir=str(tmp_path), eval_iters=eval_iters)
    assert RunData(config, 4, mesh, vocab_size=7).bytes_per_target() is None
    write_meta(tmp_path, Meta(7, "words", itos=itos))
    data = RunData(config, 4, mesh)
    targets = [np.asarray(call)[0, ..., 1:].reshape(len(w), -1) for call, w in zip(
        data.eval_batches()["val"], data.eval_weights()["val"], strict=True)]  # fmt: skip
    lengths = np.array([len(text.encode()) for text in itos])
    mean = sum(
        float(w @ lengths[of_call].mean(-1)) for of_call, w in zip(targets, data.eval_weights()["val"], strict=True)
    )
    assert data.bytes_per_target() == pytest.approx(mean)
    if eval_iters == 0:
        assert mean == pytest.approx(lengths[tokens[1:1001]].mean())


# ---- What a run was trained on


def test_a_run_tells_its_corpora_from_others(tmp_path, mesh, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def facts(dataset: str = "a", **values) -> dict[str, str]:
        return RunData(config_of(dataset=dataset, **values), 4, mesh).facts()

    for name in "ab":
        for split in ("train", "val"):
            corpus_of(tmp_path / "data" / name, np.arange(500), block_size=4, split=split)
        write_meta(tmp_path / "data" / name, Meta(VOCAB, "none"))
    recorded = facts()
    assert set(recorded) == {"tokens", "train.bin", "val.bin"}
    (tmp_path / "data" / "b" / "meta.json").unlink()
    assert RunData(config_of(dataset="a"), 4, mesh).notes == []
    for size, what in (None, "GPT-2's tokens"), (1000, "tokens of an unknown tokenizer"):
        (note,) = RunData(config_of(dataset="b"), 4, mesh, size).notes
        assert note == f"data/b does not say whose its tokens are: taken for {what}"
    (tmp_path / "data" / "a").rename(tmp_path / "data" / "moved")
    for found in (facts("moved"), facts("x", data_dir="data/moved")):
        check_same_corpora(recorded, found, "run")
        check_same_corpora({}, found, "run")  # of before runs recorded any
    corpus_of(tmp_path / "data" / "moved", np.arange(500)[::-1], block_size=4, split="val")
    with pytest.raises(UserError, match="corpus: val.bin was 1,000 bytes, digest .* and is 1,000 bytes, digest"):
        check_same_corpora(recorded, facts("moved"), "run")
    write_meta(tmp_path / "data" / "b", meta_for(CharTokenizer([chr(0x4E00 + i) for i in range(500)]), "char"))
    with pytest.raises(UserError, match="tokens was unknown and is [0-9a-f]{64} now; put that one back, or .*=run"):
        check_same_corpora(recorded, facts("b"), "run")
    corpus_of(tmp_path / "data" / "c", np.arange(500), block_size=4, split="train")
    corpus_of(tmp_path / "data" / "c", np.arange(500), block_size=4, split="val")
    write_meta(tmp_path / "data" / "c", Meta(VOCAB, "none"))
    mixed = facts("moved:0.5,c:0.5")
    assert "moved/train.bin" in mixed and mixed["c/share"] == "1/2"
    with pytest.raises(UserError, match="moved/share was 1/2 and is 1/4 now"):
        check_same_corpora(mixed, facts("moved:0.25,c:0.75"), "run")


# ---- FineWeb10B's files


def fineweb(path: Path, tokens: np.ndarray, count: int | None = None, version: int = 1) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def test_fineweb_files_are_read_as_they_are(tmp_path):
    tokens = np.arange(5000) % 50257
    for i, part in enumerate(np.split(tokens, [1700, 1701]), start=1):
        fineweb(tmp_path / f"fineweb_train_{i:06}.bin", part)
    fineweb(tmp_path / "fineweb_val_000000.bin", tokens[:100])
    train = Corpus.open(tmp_path, "train", block_size=16, vocab_size=50257)
    assert len(train) == 5000 and train.meta.tokenizer == "gpt2" and train.meta.eot == 50256
    starts = np.arange(5000 - 17)
    assert np.array_equal(train.read(starts, 17), np.lib.stride_tricks.sliding_window_view(tokens, 17)[:-1])
    assert len(Corpus.open(tmp_path, "val", block_size=16, vocab_size=50257)) == 100
    record = {"file": "fineweb_val_000000.bin", "tokens": 100, "sha256": ""}
    record["sha256"] = hashlib.sha256((tmp_path / record["file"]).read_bytes()).hexdigest()
    write_meta(tmp_path, Meta(50257, shards={"val": [record]}))
    assert len(Corpus.open(tmp_path, "val", block_size=16, vocab_size=50257)) == 100
    (tmp_path / "meta.json").unlink()

    path = tmp_path / "fineweb_val_000000.bin"
    for how, complaint in (
        ({"count": 99}, "its header says 99 tokens, but 100 follow"),
        ({"count": 101}, "its header says 101 tokens, but 100 follow"),
        ({"version": 2}, "its header says version 2"),
    ):
        fineweb(path, tokens[:100], **how)
        with pytest.raises(UserError, match=complaint):
            Corpus.open(tmp_path, "val", block_size=16, vocab_size=50257)
    fineweb(path, tokens[:100])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="its header says 100 tokens, but 99 follow"):
        Corpus.open(tmp_path, "val", block_size=16, vocab_size=50257)
    (tmp_path / "val.bin").write_bytes(bytes(200))
    with pytest.raises(UserError, match="holds both val.bin and fineweb_val_000000.bin"):
        Corpus.open(tmp_path, "val", block_size=16, vocab_size=50257)


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


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8"])
def test_tokens_that_were_written_with_more_bits_are_refused(tmp_path, dtype):
    """As numpy does by itself: they read as tokens too, every other one, or three of four, being 0."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, 500)
    assert len(corpus_of(tmp_path, tokens)) == 500
    tokens.astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="train.bin: its tokens are numbers of 32 or 64 bits.* as np.uint16"):
        Corpus.open(tmp_path, "train", block_size=4, vocab_size=VOCAB)


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
        (f"a:1/{10**30},b:{10**30 - 1}/{10**30}", "finer than a billionth; round them"),
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


def test_other_sizes_of_batches_of_the_same_corpora(tmp_path, mesh, monkeypatch):
    """As from a config of that size, without opening anything again."""
    monkeypatch.chdir(tmp_path)
    for name, split in itertools.product("ab", ("train", "val")):
        corpus_of(tmp_path / "data" / name, np.arange(500), block_size=4, split=split)
    config, other = (config_of(dataset="a:0.75,b:0.25", eval_iters=2, batch_size=size) for size in (1, 3))
    data, wanted = RunData(config, 4, mesh), RunData(other, 4, mesh)
    monkeypatch.setattr(Corpus, "open", None)
    found = data.resized(other)
    for step in range(3):
        np.testing.assert_array_equal(found.batch(step), wanted.batch(step))
    assert found.tokens_per_step == wanted.tokens_per_step and data.train.rows != found.train.rows
    for split, batches in wanted.eval_batches().items():
        for a, b in zip(batches, found.eval_batches()[split], strict=True):
            np.testing.assert_array_equal(a, b)


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
    with pytest.raises(UserError, match="vocabulary of 50, the model one of 49; prepare it with the model.s tokenizer"):
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


def test_a_file_that_is_cut_short_while_it_is_read_is_one_line(tmp_path):
    """Else the system ends the process by SIGBUS, without a word."""
    path = tmp_path / "train.bin"
    np.zeros(10_000, "<u2").tofile(path)
    corpus = Corpus.open(tmp_path, "train", block_size=8, vocab_size=1)
    assert corpus.read(np.array([9_000]), 8).shape == (1, 8)
    os.truncate(path, 100)
    with pytest.raises(UserError, match="train.bin was cut short while it was read; put it back, and go on with"):
        corpus.read(np.array([9_000]), 8)
