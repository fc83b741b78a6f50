"""Text of any size to token shards: tokenized in parallel, written in order, resumable.

Processes tokenize chunks of a source's pieces, and the tokens go, in the source's order, into shards of one size: the
output does not depend on the number of workers. A shard appears whole or not at all, and is recorded with its digest
and the place in the source where the next one begins, so that the same command, run again, goes on there.

Memory: about 150 MB for each process, and 2·workers + 2 chunks of at most 2 million characters under way. Only a line
of a .jsonl file, and 16 rows of a .parquet file or 64 of a dataset, are held whole whatever their size.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from argparse import ArgumentParser
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, count, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer
from tqdm import tqdm

from jaxgpt import UserError
from jaxgpt.texts import PIECE, Piece, Position, Source
from jaxgpt.tokenizer import JsonTokenizer, Tokenizer, atomic_write, gpt2, meta_for, read_meta, write_meta

PROGRESS = "progress.json"  # in the corpus's folder: the finished shards, as long as there is no meta.json
Chunk = tuple[list[Piece], float]  # pieces to tokenize, and the size of the input read for them
Tokens = tuple[Integer[np.ndarray, " n"], Int[np.ndarray, " pieces"]]  # of a chunk, and how many each piece has
Record = dict[str, Any]  # of a shard: "file", "tokens", "sha256", "next": document, part and token of the next shard


def build(
    source: Source,
    out_dir: str | Path,
    *,
    tokenizer: str = "gpt2",
    eot: str | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    first_shard_is_val: bool = False,
) -> None:
    """Writes train_*.bin, val_*.bin and meta.json into `out_dir`, or what is still missing of them.

    `tokenizer`: gpt2, or the path of a tokenizer.json. With `first_shard_is_val`, the source has but a train split.
    UserError, with the finished shards kept: bad input, a full disk, a folder that holds another corpus, too little
    text for both splits, Ctrl-C.
    """
    out = Path(out_dir)
    workers = int(getattr(os, "process_cpu_count", os.cpu_count)() or 1) if workers is None else workers
    if shard_tokens < 1 or workers < 1:
        raise UserError(f"shard_tokens={shard_tokens} and workers={workers} must be at least 1")
    made, name = make_tokenizer(tokenizer, eot), "gpt2"
    settings = {
        "source_sha256": source.fingerprint,
        "shard_tokens": shard_tokens,
        "first_shard_is_val": first_shard_is_val,
    }
    if isinstance(made, JsonTokenizer):
        name, content = "tokenizer.json", Path(tokenizer).read_bytes()
        settings |= {"tokenizer_sha256": hashlib.sha256(content).hexdigest(), "eot": made.eot}
    records, complete = _recorded(out, settings)
    if complete and all(_sound(out, record) for record in records):
        print(f"{out} is complete, and every file has the digest that meta.json records")
        return
    if isinstance(made, JsonTokenizer):
        with atomic_write(out / name) as f:
            f.write(content)

    def finished() -> list[Record]:
        return [record for writer in writers.values() for record in writer.records]

    def save() -> None:
        with atomic_write(out / PROGRESS) as f:
            f.write(json.dumps({"settings": settings, "shards": finished()}).encode())

    writers: dict[str, _Shards] = {}
    with contextlib.ExitStack() as stack:
        for split in ("train",) if first_shard_is_val else ("train", "val"):
            paths = (out / f"{split}_{i:06d}.bin" for i in count())
            paths = chain([out / "val_000000.bin"], paths) if first_shard_is_val else paths
            mine = (record for record in records if first_shard_is_val or record["file"].startswith(split))
            sound = list(takewhile(lambda record: _sound(out, record), mine))
            writers[split] = stack.enter_context(_Shards(paths, shard_tokens, sound, save))
        start = {split: writer.start for split, writer in writers.items()}
        chunks = _chunks(source.pieces(start), start)
        encoded = stack.enter_context(contextlib.closing(_encoded(chunks, workers, tokenizer, eot)))
        bar = tqdm(total=source.total, unit=source.unit, unit_scale=True, desc="tokenizing", disable=None)
        total = sum(record["tokens"] for record in finished())
        try:
            for (pieces, size), (ids, counts) in encoded:
                splits = np.array([piece.split for piece in pieces])
                for split, writer in writers.items():
                    positions = [piece.position for piece in pieces if piece.split == split]
                    of_split = splits == split
                    writer.add(ids[np.repeat(of_split, counts)], counts[of_split], positions)
                total += len(ids)
                bar.set_postfix_str(f"{total:,} tokens", refresh=False)
                bar.update(size)
            for writer in writers.values():
                writer.close()
        except KeyboardInterrupt:
            raise UserError("stopped; finished shards are kept: run the same command to go on") from None
        finally:
            bar.close()
    shards = {
        split: [record for record in finished() if record["file"].startswith(split)] for split in ("train", "val")
    }
    for split in shards:
        if not shards[split]:
            raise UserError(
                f"the text is too short to give any of it to {split}; see --help for how validation is drawn"
            )
    write_meta(out, meta_for(made, name, source=source.name, shards=shards, settings=settings))
    (out / PROGRESS).unlink(missing_ok=True)
    for split in shards:
        print(f"{out}: {split} has {sum(r['tokens'] for r in shards[split]):,} tokens in {len(shards[split])} files")


def make_tokenizer(name: str, eot: str | None = None) -> Tokenizer:
    """gpt2, or the tokenizer.json of that path. UserError if it has no end-of-text token and `eot` names none."""
    tokenizer = gpt2() if name == "gpt2" else JsonTokenizer(Path(name), eot)
    if tokenizer.eot is None:
        raise UserError(f"{name} has no usual end-of-text token; name its token that ends a document with --eot")
    return tokenizer


def parser(description: str | None, folder: Path) -> ArgumentParser:
    """The arguments of `build` that every prepare.py has."""
    made = ArgumentParser(description=description)
    made.add_argument("--out_dir", type=Path, default=folder, help="default: the script's folder")
    made.add_argument("--workers", type=int, help="processes; default: one for each core")
    made.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens in a file; default: %(default)s")
    return made


def _recorded(out: Path, settings: dict[str, Any]) -> tuple[list[Record], bool]:
    """The shards that earlier runs recorded, and whether they completed. UserError if they made another corpus."""
    meta, progress = read_meta(out), out / PROGRESS
    old, records = (None if any(out.glob("*.bin")) else settings), []
    if meta:
        old, records = meta.settings, list(chain.from_iterable(meta.shards.values()))
    elif progress.is_file():
        content = json.loads(progress.read_bytes())
        old, records = content["settings"], content["shards"]
    if old != settings:
        raise UserError(f"{out} holds another corpus, or this one with other settings; move it away or set --out_dir")
    for left in out.glob("*.partial"):  # by a killed run
        left.unlink()
    return records, meta is not None


def _sound(out: Path, record: Record) -> bool:
    try:
        with open(out / record["file"], "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() == record["sha256"]
    except OSError:
        return False


class _Shards:
    """Writes one split's tokens into files of `limit` tokens, from where the `records` of finished ones end."""

    def __init__(self, paths: Iterator[Path], limit: int, records: list[Record], save: Callable[[], None]):
        self.records = records
        document, part, self._skip = records[-1]["next"] if records else (0, 0, 0)
        self.start: Position = (document, part)
        self._paths, self._limit, self._save = islice(paths, len(records), None), limit, save
        self._files = contextlib.ExitStack()
        self._tokens = 0  # in the open file

    def add(
        self, ids: Integer[np.ndarray, " n"], counts: Int[np.ndarray, " pieces"], positions: Sequence[Position]
    ) -> None:
        """The tokens of consecutive pieces."""
        done = min(self._skip, len(ids))  # tokens of the first piece that the last finished shard holds
        self._skip -= done
        while done < len(ids):
            if not self._tokens:
                self._path, self._hash = next(self._paths), hashlib.sha256()
                self._file = self._files.enter_context(atomic_write(self._path))
            part = ids[done : done + self._limit - self._tokens]
            self._file.write(part.data)
            self._hash.update(part.data)
            self._tokens += len(part)
            done += len(part)
            if self._tokens == self._limit:
                i = int(np.searchsorted(counts.cumsum(), done, side="right"))  # the piece with the next token
                document, part = positions[-1]
                self.close(
                    (*positions[i], done - int(counts[:i].sum())) if i < len(counts) else (document, part + 1, 0)
                )

    def close(self, following: tuple[int, int, int] = (1 << 62, 0, 0)) -> None:
        """Ends the open file. `following`: document, part and token that come next, by default none."""
        if self._tokens:
            self._files.close()
            record = {
                "file": self._path.name,
                "tokens": self._tokens,
                "sha256": self._hash.hexdigest(),
                "next": following,
            }
            self.records.append(record)
            self._tokens = 0
            self._save()

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)


def _chunks(pieces: Iterator[Piece], start: Mapping[str, Position]) -> Iterator[Chunk]:
    chunk, length, size = [], 0, 0.0
    for piece in pieces:
        size += piece.size
        if piece.position >= start[piece.split]:
            chunk.append(piece)
            length += len(piece.text) + 64
        if length >= PIECE:
            yield chunk, size
            chunk, length, size = [], 0, 0.0
    yield chunk, size


def _encoded(chunks: Iterator[Chunk], workers: int, *tokenizer: Any) -> Generator[tuple[Chunk, Tokens], None, None]:
    """The chunks in order, each with its tokens; 2·workers + 2 at most are under way."""
    if workers == 1:
        _set_tokenizer(*tokenizer)
        yield from ((chunk, _encode([(piece.text, piece.end) for piece in chunk[0]])) for chunk in chunks)
        return
    # spawn: to fork a process that has threads, as pyarrow's, may hang
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, tokenizer)
    try:
        jobs = ((c, _submit(pool, [(piece.text, piece.end) for piece in c[0]])) for c in chunks)
        ahead = deque(islice(jobs, 2 * workers + 1))
        while ahead:
            chunk, job = ahead.popleft()
            yield chunk, job.result()
            ahead.extend(islice(jobs, 1))
    except BrokenProcessPool:
        raise UserError("a worker process was killed, as happens when memory runs out; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, texts: Sequence[tuple[str, bool]]) -> Future[Tokens]:
    """Processes that this starts inherit the mask: Ctrl-C, which a terminal sends to all, is for the main one alone."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode, texts)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_tokenizer: tuple[Tokenizer, np.dtype]  # of this process, with the dtype of its files


def _set_tokenizer(name: str, eot: str | None) -> None:
    global _tokenizer
    tokenizer = make_tokenizer(name, eot)
    _tokenizer = tokenizer, np.dtype(meta_for(tokenizer, name).dtype).newbyteorder("<")


def _start_worker(name: str, eot: str | None) -> None:
    _set_tokenizer(name, eot)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Otherwise the workers of a killed main process would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode(texts: Sequence[tuple[str, bool]]) -> Tokens:
    """Of each (text, whether EOT follows)."""
    tokenizer, dtype = _tokenizer
    eot = np.array([tokenizer.eot], np.uint32)
    arrays = [(tokenizer.encode_array(text), eot[: int(end)]) for text, end in texts]
    counts = np.array([len(ids) + len(after) for ids, after in arrays], np.int64)
    return np.concatenate([eot[:0], *chain.from_iterable(arrays)]).astype(dtype), counts
