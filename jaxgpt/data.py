"""Token files to batches: the batch of step n is a function of (seed, n), whatever the processes, devices and resumes.

A corpus is one split of one folder: memory-mapped shards of little-endian uint16 or uint32, read as one row of tokens.
Sample k of a run is a window of block_size + 1 tokens: x is all but the last, y all but the first. A step takes as many
samples as it has rows, from where the step before it ended. `shuffle` reads every window of an epoch once. Its order is
a keyed permutation of the windows' numbers, computed where it is needed and never stored, so it costs the same for 10^4
and for 10^11 tokens.
"""

import contextlib
import copy
import dataclasses
import hashlib
import math
import mmap
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Integer, UInt64

from jaxgpt import UserError, shipped, store
from jaxgpt.cache import Cache
from jaxgpt.cli import nearest
from jaxgpt.config import DataConfig
from jaxgpt.sharding import BATCH_AXES, data_shards
from jaxgpt.store import AnyPath, StorePath
from jaxgpt.tokenizer import (
    GPT2_VOCAB_SIZE,
    Meta,
    Tokenizer,
    check_same_language,
    copy_tokenizer,
    corpus_meta,
    known_token_bytes,
    load_tokenizer,
    read_meta,
)

T = TypeVar("T")
U64 = np.uint64

# Windows are small and far apart. Unadvised, the kernel reads far ahead at each, 8 MB on some machines; told of all of
# a batch's windows beforehand, it reads just these, at once. 480 rows that are not in memory: 2,200 ms become 14.
ADVISE = hasattr(mmap, "MADV_WILLNEED")  # not on Windows
HEADER_BYTES, HEADER_MAGIC = 1024, 20240520  # of FineWeb10B's files (llm.c): 256 int32, of which magic, version, count
DIGEST_LIMIT_BYTES = 64 << 20  # a split up to this size has its digests checked when it is opened (about 50 ms)


class Corpus:
    """One split, memory-mapped. `len` is its number of tokens."""

    def __init__(self, paths: Sequence[Path], meta: Meta, vocab_size: int, headers: Sequence[int]):
        """headers: bytes before the first token of each file."""
        self.paths, self.meta, self.vocab_size, self._headers = list(paths), meta, vocab_size, headers
        self.dtype = np.dtype(meta.dtype)
        self._maps = []
        for path in self.paths:
            with open(path, "rb") as f:
                self._maps.append(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
            if ADVISE:
                self._maps[-1].madvise(mmap.MADV_RANDOM)
        dtype = self.dtype.newbyteorder("<")
        self._shards = [np.frombuffer(x, dtype, offset=h) for x, h in zip(self._maps, headers, strict=True)]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards]).tolist()

    @classmethod
    def open(
        cls,
        data_dir: str | AnyPath,
        split: str,
        *,
        block_size: int,
        vocab_size: int,
        meta: Meta | None = None,
        cache: Cache | None = None,
    ) -> "Corpus":
        """The shards that meta.json lists for `split` ("train", "val"), else `split`.bin, else `split`_*.bin by name,
        else *_`split`_*.bin, as FineWeb10B's are named.

        meta: the folder's, where it has been read already. cache: for files that are in a store.
        UserError: nothing there; a file that is missing, truncated, foreign or altered (by digest, for small splits:
        see `verify`); fewer tokens than a window of block_size + 1; a vocabulary larger than vocab_size.
        """
        folder = store.folder(data_dir)
        meta = meta or corpus_meta(folder, vocab_size)
        single = folder / f"{split}.bin"
        named: list[list[Any]] = [
            [single] * single.exists(),
            *(sorted(folder.glob(f"{how}{split}_*.bin")) for how in ("", "*_")),
        ]
        found = list(chain(*named))
        tokens: dict[Any, int] = {folder / shard["file"]: shard["tokens"] for shard in meta.shards.get(split, [])}
        paths: list[Any] = list(tokens) or found
        if not paths:
            others = [Path(name).parent.name for name in shipped("data/*/prepare.py")]  # known by name, as dataset=NAME
            near = nearest(folder.name, others) if folder.parent == Path("data") and folder.name not in others else ""
            known = f"python -m jaxgpt.prepare {folder.name}" if folder.name in others else "its prepare.py"
            hint = f"run {known}, or set data_dir to a folder that holds it{near}"
            raise UserError(f"{single} does not exist; {hint}")
        if foreign := set(found) - set(paths):
            raise UserError(
                f"{min(foreign)} is not of the corpus in meta.json; move it away or prepare the corpus again"
            )
        firsts = [files[0].name for files in named if files]
        if not tokens and len(firsts) > 1:
            raise UserError(f"{folder} holds both {firsts[0]} and {firsts[1]}; move one corpus away")
        width, headers = np.dtype(meta.dtype).itemsize, []
        if meta.vocab_size > vocab_size:
            raise UserError(
                f"{folder} has a vocabulary of {meta.vocab_size:,}, the model one of {vocab_size:,}; "
                "prepare it with the model's tokenizer, which prepare's --tokenizer names"
            )
        arriving = None
        if not isinstance(folder, Path):
            if missing := {*paths} - {*found}:
                raise UserError(f"{min(missing)} is missing or empty: it is damaged; run its prepare.py again")
            sha256 = {shard["file"]: shard["sha256"] for shard in meta.shards.get(split, [])}
            sizes = {path.name: width * count for path, count in tokens.items()}
            fetching = (cache or Cache()).fetch(paths, sha256, sizes)
            if sum(sizes.values()) > DIGEST_LIMIT_BYTES:
                arriving = Arriving(paths, list(tokens.values()), meta, vocab_size, fetching)
            else:  # small, or of unknown size
                copies = fetching.result()
                tokens = {copy: tokens[path] for path, copy in zip(paths, copies, strict=True) if path in tokens}
                paths = copies
        for path in () if arriving else paths:
            size = path.stat().st_size if path.is_file() else 0
            plain = path in tokens and size == width * tokens[path]
            headers.append(0 if plain or width != 2 or size < HEADER_BYTES else header_bytes(path, size))
            count: int = tokens.get(path) or (size - headers[-1]) // width
            if size == 0 or size != headers[-1] + width * count:
                expected = f"the {width * tokens[path]:,} of meta.json" if path in tokens else f"{width} for each token"
                what = f"has {size:,} bytes, not {expected}" if size else "is missing or empty"
                raise UserError(f"{path} {what}: it is truncated or damaged; run its prepare.py again")
            if path not in tokens and width == 2 and _is_wider(path, headers[-1]):
                why = "its tokens are numbers of 32 or 64 bits, and without meta.json 16 are read"
                raise UserError(f"{path}: {why}; write them as np.uint16")
        corpus = arriving or cls(paths, meta, vocab_size, headers)
        if len(corpus) < block_size + 1:
            raise UserError(
                f"{paths[0]}: {split} has {len(corpus):,} tokens, fewer than one window of block_size + 1 = "
                f"{block_size + 1:,}; use more text, a smaller block_size, or for val prepare's --val_fraction"
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
        """What tells each file from another: its size, a digest of 64 samples of 4 KiB from end to end, and the sha256
        that meta.json records."""
        sha256 = {shard["file"]: shard["sha256"] for shards in self.meta.shards.values() for shard in shards}
        found = {}
        for i, path in enumerate(self.paths):
            size = self._bytes(i)
            spans = [(start, min(start + 4096, size)) for start in (max(0, size - 4096) * i // 63 for i in range(64))]
            digest = hashlib.sha256(b"".join(self._pieces([(i, *span) for span in spans]))).hexdigest()
            recorded = f", sha256 {sha256[path.name][:16]}" if path.name in sha256 else ""
            found[path.name] = f"{size:,} bytes, digest {digest[:16]}{recorded}"
        return found

    def _bytes(self, shard: int) -> int:
        return len(self._maps[shard])

    def _pieces(self, spans: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Bytes of files, each span a shard, a start and a stop."""
        return [self._maps[shard][start:stop] for shard, start, stop in spans]

    def read(self, starts: Integer[np.ndarray, " rows"], width: int) -> Integer[np.ndarray, "rows width"]:
        """Rows of `width` tokens from the given token offsets; a row may go over from one shard into the next.

        UserError naming file and offset if an id is not below vocab_size, or if a file was cut short meanwhile.
        """
        rows = np.empty((len(starts), width), self.dtype)
        places = [self._locate(start) for start in starts.tolist()]
        for shard in {shard for shard, _ in places}:
            if self._maps[shard].size() < len(self._maps[shard]):  # to read beyond its end would be SIGBUS
                text = (
                    f"{self.paths[shard]} was cut short while it was read; put it back, and go on with init_from=auto"
                )
                raise UserError(text)
        for shard, offset in places if ADVISE else ():
            start = self._headers[shard] + offset * self.dtype.itemsize
            begin, end = start // mmap.PAGESIZE * mmap.PAGESIZE, start + width * self.dtype.itemsize
            self._maps[shard].madvise(mmap.MADV_WILLNEED, begin, end - begin)
        for row, (shard, offset) in zip(rows, places, strict=True):
            done = 0
            while done < width:
                piece = self._shards[shard][offset : offset + width - done]
                row[done : done + len(piece)] = piece
                done, shard, offset = done + len(piece), shard + 1, 0
        return self._checked(rows, starts)

    def _checked(self, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """`rows`, as `read` from `starts`. UserError if an id is not below vocab_size."""
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


class Arriving(Corpus):
    """A split whose shards are being fetched from a store: until all are local, it is read from there by ranges."""

    def __init__(
        self,
        paths: Sequence[StorePath],
        tokens: Sequence[int],
        meta: Meta,
        vocab_size: int,
        fetching: Future[list[Path]],
    ):
        self.paths, self.meta, self.vocab_size = list(paths), meta, vocab_size
        self.dtype, self._starts = np.dtype(meta.dtype), np.cumsum([0, *tokens]).tolist()
        self._fetching, self._here = fetching, None

    def _bytes(self, shard: int) -> int:
        return self.dtype.itemsize * (self._starts[shard + 1] - self._starts[shard])

    def _pieces(self, spans: Sequence[tuple[int, int, int]]) -> list[bytes]:
        return store.read_ranges([(self.paths[shard], start, stop) for shard, start, stop in spans])

    def verify(self) -> None:
        """Waits for the shards, whose digests were checked as they came, and reads all. UserError as for a Corpus."""
        self._fetching.result()
        if here := self._arrived():
            here.verify()

    def _arrived(self) -> Corpus | None:
        """The local corpus, once it is there. UserError where a shard was altered; OSError where one cannot be had."""
        if self._here is None and self._fetching.done():
            self._here = Corpus(self._fetching.result(), self.meta, self.vocab_size, [0] * len(self.paths))
        return self._here

    def read(self, starts: Integer[np.ndarray, " rows"], width: int) -> Integer[np.ndarray, "rows width"]:
        if here := self._arrived():
            return here.read(starts, width)
        spans, size = [], self.dtype.itemsize
        for start in starts.tolist():
            stop = start + width
            while start < stop:
                shard, offset = self._locate(start)
                count = min(stop, self._starts[shard + 1]) - start
                spans.append((shard, size * offset, size * (offset + count)))
                start += count
        tokens = np.frombuffer(b"".join(self._pieces(spans)), self.dtype.newbyteorder("<"))
        return self._checked(tokens.astype(self.dtype).reshape(len(starts), width), starts)


def _is_wider(path: Path, start: int) -> bool:
    """Whether numbers of 32 or 64 bits lie there: read as uint16, every other one of the first 200 is 0."""
    first = np.fromfile(path, "<u2", 200, offset=start)
    return not first[1::2].any() and int(np.count_nonzero(first[::4])) >= 25


def header_bytes(path: Path, size: int) -> int:
    """Bytes before the first token. UserError where a FineWeb10B file's own count of tokens is not its length."""
    with open(path, "rb") as f:
        magic, version, count = np.frombuffer(f.read(12), "<i4").tolist()
    if magic != HEADER_MAGIC:
        return 0
    if version != 1 or size != HEADER_BYTES + 2 * count:
        what = f"{count:,} tokens, but {(size - HEADER_BYTES) // 2:,} follow" if version == 1 else f"version {version}"
        raise UserError(f"{path}: its header says {what}: it is truncated or damaged; download it again")
    return HEADER_BYTES


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
    if math.lcm(*(weight.denominator for weight in weights)) > 10**9:  # of samples that hold each corpus its times
        raise UserError(f"dataset={dataset}: the weights are finer than a billionth; round them")
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


class Windows:
    """The consecutive windows of a split: window i has tokens i · block_size … (i + 1) · block_size.

    They are read in calls of `rows`, in micro-batches of `micro_rows`; window 0 fills the last ones. `weights` (calls,
    micro-batches) makes the mean over all windows of the micro-batches' means: the last micro-batch with other windows
    counts in full, and one of window 0 alone takes off what that counted of it.
    """

    def __init__(self, corpus: Corpus, *, rows: int, micro_rows: int, block_size: int):
        self.corpus, self.rows, self.block_size, self.dtype = corpus, rows, block_size, corpus.dtype
        self.count = (len(corpus) - 1) // block_size
        whole, rest = divmod(self.count, micro_rows)
        shares = [micro_rows / self.count] * (whole + bool(rest)) + [(rest - micro_rows) / self.count] * bool(rest)
        self.calls = -(-len(shares) * micro_rows // rows)
        shares += [0.0] * (self.calls * rows // micro_rows - len(shares))
        self.weights = np.array(shares).reshape(self.calls, -1)

    def rows_at(self, call: int, lo: int, hi: int) -> Integer[np.ndarray, "rows width"]:
        """Rows lo … hi-1 of a call's `rows`, each of block_size + 1 tokens."""
        windows = np.arange(call * self.rows + lo, call * self.rows + hi)
        return self.corpus.read(np.where(windows < self.count, windows, 0) * self.block_size, self.block_size + 1)


def place(
    batches: Batches | Windows, step: int, *, steps: int = 1, micro_steps: int, sharding: jax.sharding.Sharding
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


def corpus_folders(config: DataConfig) -> list[AnyPath]:
    """Where the corpora of `dataset` are, in its order. Raises UserError where data_dir is to be several."""
    names = [name for name, _ in parse_mixture(config.dataset)]
    if config.data_dir and len(names) > 1:
        raise UserError("data_dir names one corpus but dataset is a mixture; leave data_dir empty")
    return [store.folder(config.data_dir or f"data/{name}") for name in names]


def check_same_corpora(recorded: Mapping[str, str], found: Mapping[str, str], run: str | Path) -> None:
    """UserError naming the first of RunData.facts that is not what the run recorded. Older runs recorded none."""
    for name in [*recorded, *found] if recorded else []:
        if recorded.get(name) != found.get(name):
            raise UserError(
                f"the run in {run} was trained on another corpus: {name} was {recorded.get(name, 'not there')} and is "
                f"{found.get(name, 'not there')} now; put that one back, or start a new run with init_from={run}"
            )


def _micro_steps(config: DataConfig, mesh: Mesh) -> int:
    """Micro-steps of an optimizer step for each data shard. Raises UserError where they do not divide."""
    shards = data_shards(mesh)
    micro_steps, rest = divmod(config.gradient_accumulation_steps, shards)
    if rest:
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} is not divisible by the {shards} "
            f"devices that share the batch (mesh_data × mesh_fsdp); choose a multiple of {shards}"
        )
    return micro_steps


class RunData:
    """The corpora of a config as batches on a mesh. Raises UserError on files or sizes that do not fit."""

    def __init__(self, config: DataConfig, block_size: int, mesh: Mesh, vocab_size: int | None = None):
        self._block_size, self._mesh, self.micro_steps = block_size, mesh, _micro_steps(config, mesh)
        names, weights = zip(*parse_mixture(config.dataset), strict=True)
        folders = corpus_folders(config)
        metas = [corpus_meta(folder, vocab_size or GPT2_VOCAB_SIZE) for folder in folders]
        # for people: what is taken for granted
        self.notes = [f"{folder} does not say whose its tokens are: taken for {meta.describe()}"
                      for folder, meta in zip(folders, metas, strict=True) if read_meta(folder) is None]  # fmt: skip
        self._names, self._weights, self._folder = names, weights, folders[0]
        self.meta, self.vocab_size = metas[0], vocab_size or max(meta.vocab_size for meta in metas)
        cache = Cache(config.data_cache, config.data_cache_gb)
        opened = {"block_size": block_size, "vocab_size": self.vocab_size, "cache": cache}
        self._train, self._val = (
            [Corpus.open(folder, split, meta=meta, **opened) for folder, meta in zip(folders, metas, strict=True)]
            for split in ("train", "val")
        )
        self._lay_out(config)

    def resized(self, config: DataConfig) -> "RunData":
        """The same corpora in batches of another size. config: as this one's but for that. Raises UserError."""
        other = copy.copy(self)
        other.micro_steps = _micro_steps(config, self._mesh)
        other._lay_out(config)
        return other

    def _lay_out(self, config: DataConfig) -> None:
        """The batches of training and of evaluations."""
        names, weights, train, val, size = self._names, self._weights, self._train, self._val, self._block_size
        rows = config.batch_size * config.gradient_accumulation_steps
        self.tokens_per_step = rows * size
        self.train = Batches(train, weights, seed=config.seed, rows=rows, block_size=size, order=config.data_order)
        self._sharding = NamedSharding(self._mesh, P(None, None, BATCH_AXES, None))
        # The same windows at every evaluation, none of them from the training stream. Between calls it can be stopped.
        micro_rows, shares = config.batch_size * data_shards(self._mesh), [float(weight) for weight in weights]
        if iters := config.eval_iters:
            a = max(n for n in range(1, 11) if iters % n == 0)
            alike = np.full((iters // a, a), 1 / iters)

            def drawn(corpora: list[Corpus], weights: Sequence[Fraction | int] = (1,)) -> tuple[Batches, np.ndarray]:
                seed = config.seed + 1
                rows = a * micro_rows
                return Batches(corpora, weights, seed=seed, rows=rows, block_size=size, order="random"), alike

            of_val = [drawn([corpus]) for corpus in val]
            self._eval = {"train": [drawn(train, weights)], "val": [drawn(val, weights)]}
        else:
            needed = max((len(corpus) - 1) // size // micro_rows + 2 for corpus in val)  # micro-batches
            how = {"rows": min(10, needed) * micro_rows, "micro_rows": micro_rows, "block_size": size}
            whole = [Windows(corpus, **how) for corpus in val]
            of_val = [(windows, windows.weights) for windows in whole]
            self._eval = {"val": [(x, share * w) for (x, w), share in zip(of_val, shares, strict=True)]}
        if len(names) > 1:
            self._eval |= {f"val_{name}": [each] for name, each in zip(names, of_val, strict=True)}

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
        """For each split the batches of its estimate, A=10 or a few less in an array.

        These are eval_iters random ones of each split or, with eval_iters=0, all windows of the validation split. Of a
        mixture, each validation corpus alone comes as well.
        """
        return {
            split: [
                place(batches, call, micro_steps=weights.shape[1], sharding=self._sharding)
                for batches, weights in parts
                for call in range(len(weights))
            ]
            for split, parts in self._eval.items()
        }

    def eval_weights(self) -> dict[str, Float[np.ndarray, "calls A"]]:
        """For each split the weights of its batches' mean losses in the split's loss; they sum to 1."""
        return {split: np.concatenate([weights for _, weights in parts]) for split, parts in self._eval.items()}

    def bytes_per_target(self) -> float | None:
        """The mean UTF-8 bytes of the text of an evaluation's targets, weighted as their losses are.

        None where that is not known: see tokenizer.known_token_bytes.
        """
        lengths, mean = known_token_bytes(self.meta, self._folder), 0.0
        if lengths is None:
            return None
        for batches, weights in self._eval["val"]:
            for call, of_call in enumerate(weights):
                targets = batches.rows_at(call, 0, batches.rows)[:, 1:]
                mean += float(lengths.take(targets, mode="clip").reshape(len(of_call), -1).mean(axis=1) @ of_call)
        return mean or None

    def facts(self) -> dict[str, str]:
        """What tells these corpora from others: what their ids mean, their share of a mixture, and each file."""
        found = {}
        corpora = zip(self._names, self._weights, self.train.corpora, self._val, strict=True)
        for name, weight, train, val in corpora:
            prefix = f"{name}/" if len(self._names) > 1 else ""
            found[f"{prefix}tokens"] = train.meta.identity or "unknown"
            if prefix:
                found[f"{prefix}share"] = str(weight)
            found |= {prefix + file: fact for file, fact in (train.facts() | val.facts()).items()}
        return found

    @property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.meta, self._folder)

    def copy_tokenizer(self, folder: AnyPath) -> None:
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
