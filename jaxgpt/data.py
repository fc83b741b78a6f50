"""Token files to batches: the batch of step n is a function of (seed, n), whatever the processes, devices and resumes.

A corpus is one split of one folder: memory-mapped shards of little-endian uint16 or uint32, read as one row of tokens.
Sample k of a run (k = step · rows + row) is a window of block_size + 1 tokens: x is all but the last, y all but the
first. `shuffle` reads every window of an epoch once. Its order is a keyed permutation of the windows' numbers, computed
where it is needed and never stored, so it costs the same for 10^4 and for 10^11 tokens.
"""

import contextlib
import dataclasses
import hashlib
import math
import mmap
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Integer, UInt64

from jaxgpt import UserError
from jaxgpt.config import DataConfig
from jaxgpt.sharding import BATCH_AXES, data_shards
from jaxgpt.tokenizer import (
    GPT2_VOCAB_SIZE,
    Meta,
    Tokenizer,
    check_same_language,
    copy_tokenizer,
    corpus_meta,
    load_tokenizer,
)

T = TypeVar("T")
U64 = np.uint64

# Windows are small and far apart. Unadvised, the kernel reads far ahead at each, 8 MB on some machines; told of all of
# a batch's windows beforehand, it reads just these, at once. 480 rows that are not in memory: 2,200 ms become 14.
ADVISE = hasattr(mmap, "MADV_WILLNEED")  # not on Windows
DIGEST_LIMIT_BYTES = 64 << 20  # a split up to this size has its digests checked when it is opened (about 50 ms)


class Corpus:
    """One split, memory-mapped. `len` is its number of tokens."""

    def __init__(self, paths: Sequence[Path], meta: Meta, vocab_size: int):
        self.paths, self.meta, self.vocab_size = list(paths), meta, vocab_size
        self.dtype = np.dtype(meta.dtype)
        self._maps = []
        for path in self.paths:
            with open(path, "rb") as f:
                self._maps.append(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
            if ADVISE:
                self._maps[-1].madvise(mmap.MADV_RANDOM)
        self._shards = [np.frombuffer(each, self.dtype.newbyteorder("<")) for each in self._maps]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards]).tolist()

    @classmethod
    def open(
        cls, data_dir: str | Path, split: str, *, block_size: int, vocab_size: int, meta: Meta | None = None
    ) -> "Corpus":
        """The shards that meta.json lists for `split` ("train", "val"), else `split`.bin, else `split`_*.bin by name.

        meta: the folder's, where it has been read already.
        UserError: nothing there; a file that is missing, truncated, foreign or altered (by digest, for small splits:
        see `verify`); fewer tokens than a window of block_size + 1; a vocabulary larger than vocab_size.
        """
        folder = Path(data_dir)
        meta = meta or corpus_meta(folder, vocab_size)
        single = folder / f"{split}.bin"
        found = [single] * single.exists() + sorted(folder.glob(f"{split}_*.bin"))
        tokens = {folder / shard["file"]: shard["tokens"] for shard in meta.shards.get(split, [])}
        paths = list(tokens) or found
        if not paths:
            raise UserError(f"{single} does not exist; run its prepare.py, or set data_dir to a folder that holds it")
        if foreign := set(found) - set(paths):
            raise UserError(
                f"{min(foreign)} is not of the corpus in meta.json; move it away or prepare the corpus again"
            )
        if single in paths and len(paths) > 1:
            raise UserError(f"{folder} holds both {single.name} and {paths[1].name}; move one corpus away")
        width = np.dtype(meta.dtype).itemsize
        for path in paths:
            size = path.stat().st_size if path.is_file() else 0
            if size == 0 or size != width * tokens.get(path, size // width):
                expected = f"the {width * tokens[path]:,} of meta.json" if path in tokens else f"{width} for each token"
                what = f"has {size:,} bytes, not {expected}" if size else "is missing or empty"
                raise UserError(f"{path} {what}: it is truncated or damaged; run its prepare.py again")
        if meta.vocab_size > vocab_size:
            raise UserError(
                f"{folder} has a vocabulary of {meta.vocab_size:,}, the model one of {vocab_size:,}; "
                f"train a model with vocab_size={meta.vocab_size} or prepare the corpus with the model's tokenizer"
            )
        corpus = cls(paths, meta, vocab_size)
        if len(corpus) < block_size + 1:
            raise UserError(
                f"{paths[0]}: {split} has {len(corpus):,} tokens, fewer than one window of block_size + 1 = "
                f"{block_size + 1:,}; use more text or a smaller block_size"
            )
        if len(corpus) * width <= DIGEST_LIMIT_BYTES:
            corpus.verify()
        return corpus

    def __len__(self) -> int:
        return self._starts[-1]

    def verify(self) -> None:
        """Reads all; UserError on a shard that differs from its digest in meta.json, or an id outside vocab_size."""
        digests = {shard["file"]: shard["sha256"] for shards in self.meta.shards.values() for shard in shards}
        for path, start, shard in zip(self.paths, self._starts, self._shards, strict=False):
            if path.name in digests:
                with open(path, "rb") as f:
                    found = hashlib.file_digest(f, "sha256").hexdigest()
                if found != digests[path.name]:
                    raise UserError(f"{path} was altered (its sha256 is not meta.json's); run its prepare.py again")
            self.read(np.array([start + int(shard.argmax())]), 1)

    def facts(self) -> dict[str, str]:
        """What tells each file from another: its size, and a digest of 64 samples of 4 KiB from end to end."""
        found = {}
        for path, file in zip(self.paths, self._maps, strict=True):
            starts = [max(0, len(file) - 4096) * i // 63 for i in range(64)]
            digest = hashlib.sha256(b"".join(file[start : start + 4096] for start in starts)).hexdigest()
            found[path.name] = f"{len(file):,} bytes, digest {digest[:16]}"
        return found

    def read(self, starts: Integer[np.ndarray, " rows"], width: int) -> Integer[np.ndarray, "rows width"]:
        """Rows of `width` tokens from the given token offsets; a row may go over from one shard into the next.

        UserError naming file and offset if an id is not below vocab_size.
        """
        rows = np.empty((len(starts), width), self.dtype)
        places = [self._locate(start) for start in starts.tolist()]
        for shard, offset in places if ADVISE else ():
            begin = offset * self.dtype.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
            end = (offset + width) * self.dtype.itemsize
            self._maps[shard].madvise(mmap.MADV_WILLNEED, begin, end - begin)
        for row, (shard, offset) in zip(rows, places, strict=True):
            done = 0
            while done < width:
                piece = self._shards[shard][offset : offset + width - done]
                row[done : done + len(piece)] = piece
                done, shard, offset = done + len(piece), shard + 1, 0
        if rows.size and rows.max() >= self.vocab_size:
            r, column = np.argwhere(rows >= self.vocab_size)[0].tolist()
            shard, offset = self._locate(int(starts[r]) + column)
            raise UserError(
                f"{self.paths[shard]}: token {offset:,} is {rows[r, column]}, outside the vocabulary "
                f"of {self.vocab_size:,}; prepare the corpus with the model's tokenizer"
            )
        return rows

    def _locate(self, position: int) -> tuple[int, int]:
        """The shard with this token of the corpus, and the token's offset in it."""
        shard = bisect_right(self._starts, position) - 1
        return shard, position - self._starts[shard]


def parse_mixture(dataset: str) -> list[tuple[str, Fraction]]:
    """`a` is [(a, 1)]; `a:0.7,b:0.3` is both with their weights. UserError unless these are positive and sum to 1."""
    if ":" not in dataset and "," not in dataset:
        return [(dataset, Fraction(1))]
    mixture = []
    for part in dataset.split(","):
        name, _, weight = part.strip().partition(":")
        try:
            mixture.append((name, Fraction(weight)))
        except (ValueError, ZeroDivisionError):
            raise UserError(f"dataset={dataset}: {part!r} is not NAME:WEIGHT; write for example a:0.7,b:0.3") from None
    names, weights = zip(*mixture, strict=True)
    if len({*names} - {""}) < len(names):
        raise UserError(f"dataset={dataset}: name each corpus once; write for example a:0.7,b:0.3")
    if min(weights) <= 0 or sum(weights) != 1:
        raise UserError(
            f"dataset={dataset}: the weights sum to {float(sum(weights)):g}; make them positive and sum to 1"
        )
    return mixture


class Batches:
    """The global batch of every step. `rows`: sequences per optimizer step, over all processes.

    order "shuffle": every window of an epoch once. An epoch lays windows end to end from a start of its own (a function
    of seed and epoch), so that other tokens share a window each time; less than two windows at the ends are left out.
    order "random": nanoGPT's sampling with replacement, at any offset.

    weights: of several corpora, summing to 1. Every P samples (P: their common denominator) hold each corpus exactly
    weight · P times, in shuffled order, and each counts its own epochs. UserError if their tokenizers differ.
    """

    def __init__(
        self,
        corpora: Corpus | Sequence[Corpus],
        weights: Sequence[Fraction | str | int] = (1,),
        *,
        seed: int,
        rows: int,
        block_size: int,
        order: str = "shuffle",
    ):
        self.corpora = [corpora] if isinstance(corpora, Corpus) else list(corpora)
        self.rows, self.block_size, self.order = rows, block_size, order
        first, *others = self.corpora
        for corpus in others:
            check_same_language(
                first.meta, corpus.meta, str(corpus.paths[0].parent), f"{first.paths[0].parent}, mixed with it,"
            )
        shares = [Fraction(weight) for weight in weights]
        self._period = math.lcm(*(share.denominator for share in shares))
        self._bounds = np.cumsum([0] + [int(share * self._period) for share in shares]).astype(U64)
        self._origin = 0, 0
        self._seed = _mix(np.array([seed % (1 << 64)], U64))
        self.dtype = np.result_type(*(corpus.dtype for corpus in self.corpora))

    def begin(self, step: int, sample: int) -> None:
        """Has step `step` begin with sample number `sample`, as where a run goes on with another number of rows."""
        self._origin = step, sample

    def samples(self, step: int) -> int:
        """How many samples come before this step's."""
        return self._origin[1] + (step - self._origin[0]) * self.rows

    def rows_at(self, step: int, lo: int = 0, hi: int | None = None) -> Integer[np.ndarray, "rows width"]:
        """Rows lo … hi-1 of step's `rows`, each of block_size + 1 tokens, in the files' dtype."""
        hi = self.rows if hi is None else hi
        first = self.samples(step)
        samples = np.arange(first + lo, first + hi, dtype=U64)
        if len(self.corpora) == 1:
            return self._read(0, samples)
        cycles, places = np.divmod(samples, U64(self._period))
        places = _permute(places, self._period, self._keys(len(self.corpora), cycles))
        which = np.searchsorted(self._bounds, places, side="right") - 1
        rows = np.empty((len(samples), self.block_size + 1), self.dtype)
        for c in np.unique(which).tolist():
            at, (low, high) = which == c, self._bounds[c : c + 2]
            rows[at] = self._read(c, cycles[at] * (high - low) + (places[at] - low))
        return rows

    def _read(self, c: int, samples: UInt64[np.ndarray, " rows"]) -> Integer[np.ndarray, "rows width"]:
        """The given samples of corpus c, which are counted over this corpus alone."""
        corpus, width = self.corpora[c], self.block_size + 1
        if self.order == "random":
            return corpus.read(self._keys(c, samples) % U64(len(corpus) - self.block_size), width)
        # One window fewer than would fit leaves at least a whole window's room for the epoch's start.
        windows = max(1, (len(corpus) - self.block_size) // self.block_size)
        room = len(corpus) - windows * self.block_size  # starts to choose from
        epochs, places = np.divmod(samples, U64(windows))
        keys = self._keys(c, epochs)
        return corpus.read(_permute(places, windows, keys) * U64(self.block_size) + _mix(keys) % U64(room), width)

    def _keys(self, purpose: int, counts: UInt64[np.ndarray, " rows"]) -> UInt64[np.ndarray, " rows"]:
        """Keys from the seed, what they are for (a corpus, or the mixture) and counts (of epochs, say)."""
        return _mix(_mix(self._seed ^ U64(purpose)) ^ counts)


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """A bijection of 64-bit numbers without visible pattern: splitmix64's step (Steele, Lea & Flood 2014)."""
    x = x + U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def _permute(places: UInt64[np.ndarray, " m"], n: int, keys: UInt64[np.ndarray, " m"]) -> UInt64[np.ndarray, " m"]:
    """For each place its image under the permutation of 0 … n-1 that its key draws.

    Eight Feistel rounds on pairs (left, right) of numbers below a = ceil(sqrt(n)), mixing by addition modulo a, permute
    0 … a²-1. Images of n and above go through them again until they fall below n: few, as a² - n is at most 2·sqrt(n).
    Both steps keep it a permutation (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    a = U64(math.isqrt(n - 1) + 1)
    images, todo = places.copy(), np.arange(len(places))
    while len(todo):
        left, right = np.divmod(images[todo], a)
        for r in range(8):
            left, right = right, (left + _mix(right ^ _mix(keys[todo] + U64(r))) % a) % a
        images[todo] = left * a + right
        todo = todo[images[todo] >= n]
    return images


def place(
    batches: Batches, step: int, *, steps: int = 1, micro_steps: int, sharding: jax.sharding.Sharding
) -> Integer[jax.Array, "K A B T1"]:
    """The rows of K=steps steps from `step` on, each as A=micro_steps of B rows; a process reads only its own rows."""
    per_micro = batches.rows // micro_steps

    def read(index) -> np.ndarray:  # index: the slices of one device's part
        lo, hi, _ = index[2].indices(per_micro)
        micro = range(0, batches.rows, per_micro)[index[1]]
        parts = [[batches.rows_at(n, m + lo, m + hi) for m in micro] for n in range(step, step + steps)[index[0]]]
        return np.array(parts)[..., index[3]]

    shape = (steps, micro_steps, per_micro, batches.block_size + 1)
    return jax.make_array_from_callback(shape, sharding, read)


def corpus_folders(config: DataConfig) -> list[Path]:
    """Where the corpora of `dataset` are, in its order. Raises UserError where data_dir is to be several."""
    names = [name for name, _ in parse_mixture(config.dataset)]
    if config.data_dir and len(names) > 1:
        raise UserError("data_dir names one corpus but dataset is a mixture; leave data_dir empty")
    return [Path(config.data_dir or f"data/{name}") for name in names]


class RunData:
    """The corpora of a config as batches on a mesh. Raises UserError on files or sizes that do not fit."""

    def __init__(self, config: DataConfig, block_size: int, mesh: Mesh, vocab_size: int | None = None):
        shards = data_shards(mesh)
        self.micro_steps, rest = divmod(config.gradient_accumulation_steps, shards)
        if rest:
            raise UserError(
                f"gradient_accumulation_steps={config.gradient_accumulation_steps} is not divisible by the {shards} "
                f"devices that share the batch (mesh_data × mesh_fsdp); choose a multiple of {shards}"
            )
        names, weights = zip(*parse_mixture(config.dataset), strict=True)
        folders = corpus_folders(config)
        metas = [corpus_meta(folder, vocab_size or GPT2_VOCAB_SIZE) for folder in folders]
        self._names, self._folder = names, folders[0]
        self.meta, self.vocab_size = metas[0], vocab_size or max(meta.vocab_size for meta in metas)
        size, rows = block_size, config.batch_size * config.gradient_accumulation_steps
        opened = {"block_size": size, "vocab_size": self.vocab_size}
        train, val = (
            [Corpus.open(folder, split, meta=meta, **opened) for folder, meta in zip(folders, metas, strict=True)]
            for split in ("train", "val")
        )
        self.tokens_per_step = rows * size
        self.train = Batches(train, weights, seed=config.seed, rows=rows, block_size=size, order=config.data_order)
        self._sharding = NamedSharding(mesh, P(None, None, BATCH_AXES, None))
        # batches in one call of an evaluation: between calls it can be stopped
        self._eval_micro_steps = max(n for n in range(1, 11) if config.eval_iters % n == 0)
        self._eval_calls = config.eval_iters // self._eval_micro_steps
        # the same windows at every evaluation, none of them from the training stream
        rows = self._eval_micro_steps * config.batch_size * shards
        drawn = {"seed": config.seed + 1, "rows": rows, "block_size": size, "order": "random"}
        self._eval = {"train": Batches(train, weights, **drawn), "val": Batches(val, weights, **drawn)}
        if len(names) > 1:
            self._eval |= {f"val_{name}": Batches(c, **drawn) for name, c in zip(names, val, strict=True)}

    def batch(self, step: int, steps: int = 1) -> Integer[jax.Array, "K A B T1"]:
        """The training batches of K=steps optimizer steps from `step` on."""
        return place(self.train, step, steps=steps, micro_steps=self.micro_steps, sharding=self._sharding)

    def begin(self, step: int, sample: int) -> None:
        """Has the training batch of `step` begin with sample number `sample`: the next one that a run has not read."""
        self.train.begin(step, sample)

    def samples(self, step: int) -> int:
        """How many training samples a run has read before this step: the data's position."""
        return self.train.samples(step)

    def abstract_batch(self, steps: int = 1) -> jax.ShapeDtypeStruct:
        """The shape, dtype and sharding of `batch`."""
        shape = (steps, self.micro_steps, self.train.rows // self.micro_steps, self.train.block_size + 1)
        return jax.ShapeDtypeStruct(shape, self.train.dtype, sharding=self._sharding)

    def eval_batches(self) -> dict[str, list[Integer[jax.Array, "1 A B T1"]]]:
        """For each split the eval_iters batches of its estimate, A=10 or a few less in an array; of a mixture, each
        validation corpus alone as well."""
        how = {"micro_steps": self._eval_micro_steps, "sharding": self._sharding}
        calls = range(self._eval_calls)
        return {split: [place(batches, n, **how) for n in calls] for split, batches in self._eval.items()}

    def facts(self) -> dict[str, str]:
        """What tells these corpora from others, file by file."""
        named = zip(self._names * 2, self.train.corpora + self._eval["val"].corpora, strict=True)
        return {f"{name}/{file}": fact for name, corpus in named for file, fact in corpus.facts().items()}

    @property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.meta, self._folder)

    def copy_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer's files into a run's folder."""
        copy_tokenizer(dataclasses.replace(self.meta, vocab_size=self.vocab_size, shards={}), self._folder, folder)


@contextlib.contextmanager
def prefetch(batch_at: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[Iterator[tuple[int, T]]]:
    """Gives an iterator over (step, batch_at(step)) for start ≤ step < stop; a thread works `depth` batches ahead.

    What batch_at raises comes out of `next`. The end of the `with` waits for the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        jobs = ((step, pool.submit(batch_at, step)) for step in range(start, stop))
        ahead = deque(islice(jobs, depth))

        def batches() -> Iterator[tuple[int, T]]:
            while ahead:
                step, future = ahead.popleft()
                batch = future.result()
                ahead.extend(islice(jobs, 1))
                yield step, batch

        try:
            yield batches()
        finally:
            pool.shutdown(cancel_futures=True)
