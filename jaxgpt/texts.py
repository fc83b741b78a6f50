"""Where a corpus's text comes from: files of the user's, or Hugging Face datasets, as pieces of bounded length.

A document longer than PIECE comes in parts, cut where the tokens stay those of the whole. What cannot be read is a
UserError naming the file and the byte, line or row.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

from jaxgpt import UserError

PIECE = 1 << 20  # characters; also the bytes read at a time
Position = tuple[int, int]  # of a piece: its document's number in the split, its own number in the document


class Piece(NamedTuple):
    split: str  # train | val
    position: Position
    text: str
    end: bool  # the document ends here
    size: float  # of the input read for it, in the source's unit


@runtime_checkable
class Source(Protocol):
    name: str  # for people
    fingerprint: str  # another one where the text may be another
    total: float  # size of the whole input
    unit: str  # of sizes: B | doc

    def pieces(self, start: Mapping[str, Position]) -> Iterator[Piece]:
        """The pieces in order. Those before `start` in their split may be left out."""
        ...


class Files:
    """Text files, folders of them, globs. A .txt or .md is one document, as is a line of .jsonl, or a row of .parquet.

    Validation: the files of `val`; else about `val_fraction` of the documents, drawn by their number; but of fewer than
    100 files, all .txt or .md, the last `val_fraction` of each.
    """

    unit = "B"

    def __init__(self, inputs: Sequence[str], val: Sequence[str] = (), field: str = "text", val_fraction: float = 0.01):
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction={val_fraction} is not between 0 and 1; or name validation files with --val")
        self._val, self._field, self._fraction = set(_expand(val)), field, 0.0 if val else val_fraction
        self._paths = sorted({*_expand(inputs), *self._val})
        if not set(self._paths) - self._val:
            raise UserError("every input is in --val; name other files for training")
        self._tail = (
            not val and len(self._paths) < 100 and all(_kind(path)[0] in (".txt", ".md") for path in self._paths)
        )
        stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in self._paths]
        self.name, self.total = " ".join(inputs), float(sum(size for _, size, _ in stats))
        self.fingerprint = _digest([stats, sorted(self._val), field, val_fraction])

    def pieces(self, start: Mapping[str, Position]) -> Iterator[Piece]:
        numbers, part, split = Counter(), 0, ""
        for path in self._paths:
            try:
                for text, end, in_tail, size in self._parts(path):
                    if part == 0:
                        drawn = in_tail if self._tail else _draw(numbers.total()) < self._fraction
                        split = "val" if drawn or path in self._val else "train"
                    yield Piece(split, (numbers[split], part), text, end, size)
                    numbers[split] += end
                    part = 0 if end else part + 1
            except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: pyarrow's
                raise UserError(f"cannot read {path} ({error}); mend it or leave it out") from None

    def _parts(self, path: str) -> Iterator[tuple[str, bool, bool, float]]:
        """(text, its document ends, it is in the validation tail, bytes of the file read for it)."""
        kind, compression = _kind(path)
        if kind == ".parquet":
            for document, size in _read_parquet(path, self._field):
                for text, end in split_text(document):
                    yield text, end, False, size * end
            return
        turn = None
        if self._tail:
            with _opened(path, compression) as (_, f):
                turn = int(sum(map(len, iter(lambda: f.read(PIECE), b""))) * (1 - self._fraction))
        with _opened(path, compression) as (raw, f):
            if kind == ".jsonl":
                parts = ((*part, False) for text in _read_jsonl(f, path, self._field) for part in split_text(text))
            else:
                parts = read_text(f, path, turn)
            done = 0
            for text, end, in_tail in parts:
                yield text, end, in_tail, raw.tell() - done
                done = raw.tell()


class Rows:
    """The texts of `datasets.Dataset`s, one for each split; a row is a document."""

    unit = "doc"

    def __init__(self, name: str, splits: Mapping[str, Any], field: str = "text"):
        self.name, self._splits, self._field = name, splits, field
        self.total = float(sum(map(len, splits.values())))
        ends = [[len(rows), rows[0][field], rows[-1][field]] for rows in splits.values() if len(rows)]
        self.fingerprint = _digest([name, field, ends])

    def pieces(self, start: Mapping[str, Position]) -> Iterator[Piece]:
        for split, rows in self._splits.items():
            first = min(start[split][0], len(rows))
            size = first + 1.0  # the first document accounts for those left out
            for i in range(first, len(rows), 64):
                for number, document in enumerate(rows[i : i + 64][self._field], i):
                    for part, (text, end) in enumerate(split_text(document)):
                        yield Piece(split, (number, part), text, end, size * end)
                    size = 1.0


def load_rows(hub: str, config: str | None, inputs: Sequence[str] | None, *, rows: int | None = None) -> Any:
    """A hub dataset's `train` split, or local .parquet files in its place, as a datasets.Dataset.

    UserError if it cannot be had, or has not `rows` rows. A dataset whose main branch holds a script, which `datasets`
    no longer runs, is taken from the branch where the hub converts it to parquet.
    """
    datasets = _module("datasets")
    if inputs:
        return datasets.load_dataset("parquet", data_files=_expand(inputs), split="train")
    try:
        try:
            data = datasets.load_dataset(hub, config, split="train")
        except RuntimeError:
            data = datasets.load_dataset(hub, config, split="train", revision="refs/convert/parquet")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot get {hub} ({error}); copy its .parquet files here and name them with --input"
        ) from None
    if rows and len(data) != rows:
        raise UserError(f"{hub} has {len(data):,} rows instead of {rows:,}; name all its .parquet files with --input")
    return data


# ---- Documents into parts

_UP_TO_SPACE = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def _cut(text: str) -> int:
    """The last place between a character and white space, else the end.

    GPT-2's pattern never matches over such a place nor looks back over it: both sides keep the tokens of the whole.
    """
    return match.end() if (match := _UP_TO_SPACE.match(text)) else len(text)


def split_text(text: str) -> Iterator[tuple[str, bool]]:
    """A document as (part, it is the last)."""
    start = 0
    while len(text) - start > PIECE:
        end = start + _cut(text[start : start + PIECE])
        yield text[start:end], False
        start = end
    yield text[start:], True


def read_text(f: io.BufferedIOBase, path: str, turn: int | None = None) -> Iterator[tuple[str, bool, bool]]:
    """A UTF-8 file as (part, its document ends, it is after `turn`). A second document begins at about byte `turn`."""
    decoder, text, count, after = codecs.getincrementaldecoder("utf-8")(), "", 0, False
    while True:
        block = f.read(PIECE if turn is None or after else min(PIECE, turn - count))
        pending = len(decoder.getstate()[0])
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, count - pending + error.start) from None
        count += len(block)
        turns = not after and count == turn
        last = not block and not turns
        cut = len(text) if last else _cut(text) if turns or len(text) >= PIECE else 0
        if turns or last or cut:
            yield text[:cut], turns or last, after
        if last:
            return
        text, after = text[cut:], after or turns


def _read_jsonl(f: io.BufferedIOBase, path: str, field: str) -> Iterator[str]:
    count = 0
    for number, line in enumerate(f, 1):
        if line.strip():
            try:
                text = json.loads(line)[field]
            except UnicodeDecodeError as error:
                raise _not_utf8(path, count + error.start) from None
            except (ValueError, TypeError, LookupError, RecursionError):
                text = None
            if not isinstance(text, str):
                where = f"{path}: line {number:,} (byte {count:,})"
                raise UserError(f"{where} is not a JSON object with a text under {field!r}; mend it or set --field")
            yield text
        count += len(line)


def _read_parquet(path: str, field: str) -> Iterator[tuple[str, float]]:
    """Texts, each with its share of the file's bytes."""
    with _module("pyarrow.parquet").ParquetFile(path, buffer_size=PIECE) as table:
        if field not in table.schema_arrow.names:
            raise UserError(f"{path} has no column {field!r}; set --field to one of {table.schema_arrow.names}")
        size = os.path.getsize(path) / max(1, table.metadata.num_rows)
        rows = (row for batch in table.iter_batches(16, columns=[field]) for row in batch.column(0))
        for number, row in enumerate(rows):
            try:
                text = row.as_py()
            except UnicodeDecodeError:
                text = None
            if not isinstance(text, str):
                raise UserError(f"{path}: row {number:,} of {field!r} is not a UTF-8 text; remove it or set --field")
            yield text, size


# ---- Files

_KIND = re.compile(r"\.(?:txt|md|jsonl|parquet(?!\.))(?=(\.gz|\.zst)?$)")


def _kind(path: str) -> tuple[str, str | None]:
    """The suffix that says what the file is, and the one of its compression; "" for an unknown kind."""
    match = _KIND.search(path)
    return (match[0], match[1]) if match else ("", None)


def _expand(inputs: Sequence[str]) -> list[str]:
    """Files, those of folders (of known kinds, however deep), and those that globs match; these sorted."""
    paths = []
    for name in inputs:
        inside = f"{glob.escape(name)}/**" if os.path.isdir(name) else name
        found = [path for path in glob.glob(inside, recursive=True) if os.path.isfile(path)] or [name]
        known = [path for path in found if _kind(path)[0] and os.path.isfile(path)]
        if not known or (len(known) < len(found) and not os.path.isdir(name)):
            what = f"{name} holds no text" if os.path.isdir(name) else f"{found[0]} is missing or of another kind"
            raise UserError(
                f"{what}; name .txt, .md, .jsonl (also with .gz, .zst) or .parquet files, or folders of them"
            )
        paths += sorted(known)
    return paths


@contextlib.contextmanager
def _opened(path: str, compression: str | None) -> Iterator[tuple[BinaryIO, Any]]:
    """The file as it is, and its decompressed content."""
    with open(path, "rb") as raw:
        if compression == ".zst":  # through pyarrow, which unlike the zstandard package reports a truncated file
            pyarrow = _module("pyarrow")
            yield raw, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
        else:
            yield raw, gzip.GzipFile(fileobj=raw) if compression else raw


def _not_utf8(path: str, byte: int) -> UserError:
    return UserError(f"{path}: byte {byte:,} is not UTF-8 text; convert the file to UTF-8 or leave it out")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this input needs {name.split('.')[0]}; run: pip install 'jaxgpt[data]'") from None


def _draw(number: int) -> float:
    """A number in [0, 1) for each integer."""
    return int.from_bytes(hashlib.sha256(b"%d" % number).digest()[:6], "big") / (1 << 48)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
