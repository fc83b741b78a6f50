"""Text of any size to token shards: tokenized in parallel, written in order, resumable.

Processes, or a thread where there is to be one worker, tokenize chunks of a source's pieces, and the tokens go, in the
source's order, into shards of one size: the output does not depend on the number of workers. A shard appears whole or
not at all, and is recorded with its digest and the place in the source where the next one begins, so that the same
command, run again, goes on there.

Memory: about 150 MB for each process (gigatoken takes up to 0.5 GB more where words hardly repeat), and 2·workers + 4
chunks of at most 2 million characters under way. Only a line of a .jsonl file, and 16 rows of a .parquet file or 64 of
a dataset, are held whole whatever their size.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from tqdm import tqdm

from jaxgpt import UserError, atomic_write, from_json, local_path, store
from jaxgpt.cli import Parser, integer
from jaxgpt.corpus.sources import PIECE, Piece, Source
from jaxgpt.store import AnyPath
from jaxgpt.tokenizer import (
    DAMAGE,
    ENDOFTEXT,
    PROGRESS,
    FastGPT2Tokenizer,
    JsonTokenizer,
    Tokenizer,
    gpt2,
    meta_for,
    read_meta,
    token_dtype,
    write_meta,
)

Tokens = Integer[np.ndarray, " n"]
# Of a shard: "file", "tokens", "sha256", and "next", where the one after it begins: the number of a piece, and how many
# tokens after that piece's first
Record = dict[str, Any]
MOST_WORKERS = 1024  # each takes 150 MB
END = (1 << 62, 0)  # as "next": nowhere


def build(
    source: Source,
    out_dir: str | AnyPath,
    *,
    tokenizer: str = "gpt2",
    eot: str | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    first_shard_is_val: bool = False,
    fast: bool = False,
) -> None:
    """Writes train_*.bin, val_*.bin and meta.json into `out_dir`, or what is still missing of them.

    `tokenizer`: gpt2, or the path of a tokenizer.json. `fast`: GPT-2's by gigatoken, the same tokens. With
    `first_shard_is_val`, the source has but a train split.

    UserError: bad input, a full disk, Ctrl-C, with the finished shards kept; a folder that holds another corpus; too
    little text for both splits, of which nothing is kept.
    """
    out = store.folder(out_dir)
    if workers is None:  # the fast tokenizer keeps up with the process that reads, so half of them would wait
        cores = int(getattr(os, "process_cpu_count", os.cpu_count)() or 1)
        workers = max(1, cores // 2) if fast else cores
    for key, value in {"shard_tokens": shard_tokens, "workers": workers}.items():
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    if workers > MOST_WORKERS:
        raise UserError(f"workers={workers} must be at most {MOST_WORKERS}; one for each core is best")
    bpe, name = make_tokenizer(tokenizer, eot, fast), "gpt2"
    settings = {
        "source_sha256": source.fingerprint,
        "shard_tokens": shard_tokens,
        "first_shard_is_val": first_shard_is_val,
    }
    content = None
    if tokenizer != name:
        name, content = "tokenizer.json", tokenizer_file(tokenizer).read_bytes()
        settings |= {"tokenizer_sha256": hashlib.sha256(content).hexdigest(), "eot": bpe.eot}
    records, complete = recorded(out, source.name, settings)
    for note in source.notes:
        print(note)
    if complete and all(_sound(out, record) for record in records):
        print(f"{out} is complete, and every file has the digest that meta.json records")
        (out / PROGRESS).unlink(missing_ok=True)  # of a run that was killed in between
        return
    splits = ("train",) if first_shard_is_val else ("train", "val")
    of_split = [[r for r in records if first_shard_is_val or r["file"].startswith(split)] for split in splits]
    sound = [list(takewhile(lambda record: _sound(out, record), each)) for each in of_split]
    with contextlib.ExitStack() as stack:
        save = stack.enter_context(half_made(out, source.name, settings, list(chain(*sound))))
        if content:
            with atomic_write(out / name) as f:
                f.write(content)

        def finished() -> list[Record]:
            return [record for writer in writers.values() for record in writer.records]

        writers: dict[str, _Shards] = {}
        for split, each in zip(splits, sound, strict=True):
            first = "val" if first_shard_is_val else split
            writers[split] = _Shards(out, (first, split), shard_tokens, each, lambda: save(finished()))
            stack.push(writers[split].opened)  # an error leaves no file of its own
        start = {split: writer.start for split, writer in writers.items()}
        chunks = _chunks(source.pieces(start), start)
        encoded = stack.enter_context(contextlib.closing(_encoded(chunks, workers, tokenizer, eot, fast)))
        bar = stack.enter_context(
            tqdm(total=source.total, unit=source.unit, unit_scale=True, desc="tokenizing", disable=None)
        )
        try:
            for piece, ids in encoded:
                writers[piece.split].add(ids, piece.number)
                bar.update(source.done - bar.n)
            for writer in writers.values():
                writer.end_shard(END)
        except KeyboardInterrupt:
            raise UserError("stopped; finished shards are kept: run the same command to go on") from None
        shards = {split: [r for r in finished() if r["file"].startswith(split)] for split in ("train", "val")}
        for split in shards:
            if not shards[split]:
                _remove(out, save, finished())
                raise UserError(f"the text is too short to give any to {split}; see --help for how validation is drawn")
        write_meta(out, meta_for(bpe, name, source=source.name, shards=shards, settings=settings))
    for split in shards:
        print(f"{out}: {split} has {in_files(shards[split])}")


def in_files(records: list[Record]) -> str:
    """How many tokens shards have, for people."""
    return f"{sum(r['tokens'] for r in records):,} tokens in {len(records)} file{'s' * (len(records) != 1)}"


def tokenizer_file(name: str) -> Path:
    """The tokenizer.json that `--tokenizer` names by its path or its folder."""
    path = local_path(name)
    return path / "tokenizer.json" if path.is_dir() else path


def make_tokenizer(name: str, eot: str | None = None, fast: bool = False) -> Tokenizer:
    """gpt2, or that tokenizer.json (`tokenizer_file`). UserError if none of its tokens ends a text, `eot` neither."""
    if name == "gpt2" and eot not in (None, ENDOFTEXT):
        raise UserError(f"--eot={eot} is for a tokenizer.json; with GPT-2's tokens documents end with {ENDOFTEXT}")
    if fast and name != "gpt2":
        raise UserError(f"--fast is for GPT-2's tokens, not for {name}; leave it out")
    if name != "gpt2" and not tokenizer_file(name).is_file():
        raise UserError(f"there is no tokenizer {name}; give gpt2, or a tokenizer.json or a folder that has one")
    tokenizer = FastGPT2Tokenizer() if fast else gpt2() if name == "gpt2" else JsonTokenizer(tokenizer_file(name), eot)
    if tokenizer.eot is None:
        raise UserError(f"{name} has no usual end-of-text token; name its token that ends a document with --eot")
    return tokenizer


def parser(description: str | None, folder: Path) -> Parser:
    """The arguments of `build` that every prepare.py has."""
    made = Parser(description=description)
    made.add_argument("--out_dir", type=store.folder, default=folder, help="where the tokens go")
    made.add_argument("--workers", type=int, help="processes; by default one for each core")
    made.add_argument("--shard_tokens", type=integer, default=100_000_000, help="tokens in a file")
    made.add_argument("--fast", action="store_true", help="GPT-2's tokens by gigatoken (pip install 'jaxgpt[fast]')")
    return made


@contextlib.contextmanager
def half_made(
    out: AnyPath, source: str, settings: dict[str, Any], records: list[Record]
) -> Iterator[Callable[[list[Record]], None]]:
    """Marks the folder as half made, by progress.json, until the block has written its meta.json.

    Gives the function that records finished shards there, as `recorded` finds them. An error before the first of them
    leaves the folder as it was.
    """
    new_folders = [path for path in (out, *out.parents) if not path.exists()] if isinstance(out, Path) else []
    kept = records

    def save(finished: list[Record]) -> None:
        nonlocal kept
        kept = finished
        with atomic_write(out / PROGRESS) as f:
            f.write(json.dumps({"source": source, "settings": settings, "shards": finished}).encode())

    try:
        save(records)
        yield save
    except BaseException:
        if not kept and not (out / "meta.json").exists():
            with contextlib.suppress(OSError):
                for name in (PROGRESS, *["tokenizer.json"] * ("tokenizer_sha256" in settings)):
                    (out / name).unlink(missing_ok=True)
                for folder in new_folders:
                    folder.rmdir()
        raise
    (out / PROGRESS).unlink()


def recorded(out: AnyPath, source: str, settings: dict[str, Any]) -> tuple[list[Record], bool]:
    """The shards that earlier runs finished, and whether they completed. UserError if they made another corpus.

    One that is not complete is begun again if its `source`, what the command names, holds another text since.
    """
    meta, progress = read_meta(out), out / PROGRESS
    try:
        if meta:
            old, records, begun = meta.settings, list(chain.from_iterable(meta.shards.values())), None
        elif progress.is_file():
            content = from_json(progress.read_bytes())
            old, records, begun = content["settings"], list(content["shards"]), content.get("source")
            _ = [(out / record["file"], record["tokens"], *record["next"]) for record in records]
        else:
            old, records, begun = None if any(out.glob("*.bin")) else settings, [], None
    except DAMAGE as error:
        raise UserError(f"{progress} is damaged ({error!r}); remove the folder or set another --out_dir") from None
    text = ("source_sha256", "text_sha256")
    others = {key for key in {*settings, *(old or {})} if (old or {}).get(key) != settings.get(key)}
    if begun == source and others and others <= {*text}:
        print(f"{out}: the text is another one than when this was stopped; beginning again")
        for record in records:
            (out / record["file"]).unlink(missing_ok=True)
        records, old = [], settings
    if old != settings:
        raise UserError(f"{out} holds another corpus, or this one with other settings; move it away or set --out_dir")
    for left in out.glob("*.partial"):  # by a killed run
        left.unlink()
    return records, meta is not None


def _remove(out: AnyPath, save: Callable[[list[Record]], None], records: list[Record]) -> None:
    """Takes finished shards back."""
    save([])
    for record in records:
        (out / record["file"]).unlink(missing_ok=True)


def _sound(out: AnyPath, record: Record) -> bool:
    """In a store, whether it is there: objects appear whole, and whoever fetches one checks its digest."""
    if not isinstance(out, Path):
        return (out / record["file"]).is_file()
    try:
        with open(out / record["file"], "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() == record["sha256"]
    except OSError:
        return False


class _Shards:
    """Writes one split's tokens into files of `limit` tokens, from where the `records` of finished ones end.

    `names`: what the name of the first file begins with, and those of the others.
    """

    def __init__(
        self, out: AnyPath, names: tuple[str, str], limit: int, records: list[Record], save: Callable[[], None]
    ):
        self.records = records
        self.start, self._skip = records[-1]["next"] if records else (0, 0)
        self._out, self._names, self._limit, self._save = out, names, limit, save
        self.opened = contextlib.ExitStack()  # holds the open file
        self._tokens = 0  # in the open file

    def add(self, ids: Tokens, number: int) -> None:
        """The tokens of the chunk that begins with piece `number`."""
        done = min(self._skip, len(ids))  # the last finished shard holds them
        self._skip -= done
        while done < len(ids):
            if not self._tokens:
                i = len(self.records)
                self._path, self._hash = self._out / f"{self._names[i > 0]}_{i:06}.bin", hashlib.sha256()
                self._write = self.opened.enter_context(atomic_write(self._path)).write
            part = ids[done : done + self._limit - self._tokens]
            self._write(part.data)
            self._hash.update(part.data)
            self._tokens += len(part)
            done += len(part)
            if self._tokens == self._limit:
                self.end_shard((number, done))

    def end_shard(self, following: tuple[int, int]) -> None:
        if self._tokens:
            self.opened.close()
            sha256 = self._hash.hexdigest()
            self.records.append({"file": self._path.name, "tokens": self._tokens, "sha256": sha256, "next": following})
            self._tokens = 0
            self._save()


def _chunks(pieces: Iterator[Piece], start: Mapping[str, int]) -> Iterator[list[Piece]]:
    """Consecutive pieces of a split together, PIECE characters or somewhat more; none before `start`."""
    chunks, lengths = {split: [] for split in start}, Counter()
    for piece in pieces:
        split = piece.split
        if piece.number >= start[split]:
            chunks[split].append(piece)
            lengths[split] += len(piece.text) + 64  # an empty one takes memory too
        if lengths[split] >= PIECE:
            yield chunks[split]
            chunks[split], lengths[split] = [], 0
    yield from filter(None, chunks.values())


def _encoded(
    chunks: Iterator[list[Piece]], workers: int, *tokenizer: Any
) -> Generator[tuple[Piece, Tokens], None, None]:
    """The first piece of each chunk, and the chunk's tokens; in order; 2·workers + 2 chunks at most are under way."""
    pool: Executor
    if workers == 1:  # a thread: tokenizers let go of the GIL
        _set_tokenizer(*tokenizer)
        pool = ThreadPoolExecutor(1)
    else:  # spawn: to fork a process that has threads, as pyarrow's, may hang
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, tokenizer)
    try:
        jobs = ((chunk[0], _submit(pool, chunk)) for chunk in chunks)
        ahead = deque(islice(jobs, 2 * workers + 1))
        while ahead:
            first, job = ahead.popleft()
            yield first, job.result()
            ahead.extend(islice(jobs, 1))
    except BrokenProcessPool:
        raise UserError("a worker process was killed, as happens when memory runs out; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: Executor, chunk: list[Piece]) -> Future[Tokens]:
    """Processes that this starts inherit the mask: Ctrl-C, which a terminal sends to all, is for the main one alone."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode, chunk)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_tokenizer: Tokenizer  # of this process


def _set_tokenizer(*how: Any) -> None:
    global _tokenizer
    _tokenizer = make_tokenizer(*how)


def _start_worker(*how: Any) -> None:
    _set_tokenizer(*how)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Otherwise the workers of a killed main process would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode(chunk: list[Piece]) -> Tokens:
    """In the type of the files."""
    arrays, dtype = [], np.dtype(token_dtype(_tokenizer.vocab_size)).newbyteorder("<")
    if (ids := _tokenizer.encode_documents([(piece.text, piece.end) for piece in chunk])) is not None:
        return ids.astype(dtype)
    for piece in chunk:
        try:
            arrays.append(_tokenizer.encode_array(piece.text, piece.before, piece.after))
        except UserError as error:
            raise UserError(f"{piece.where}: {error}; mend it or leave it out") from None
        if piece.end:
            arrays.append(np.array([_tokenizer.eot]))
    return np.concatenate(arrays, dtype=dtype, casting="unsafe")
