"""Shakespeare in GPT-2 tokens: train.bin, val.bin and meta.json in this folder. --help: its sources."""

import runpy
from collections.abc import Sequence
from pathlib import Path

from jaxgpt.cli import run_main


def main(argv: Sequence[str], folder: Path = Path(__file__).parent) -> None:
    characters = runpy.run_path(str(Path(__file__).parent.with_name("shakespeare_char") / "prepare.py"))
    characters["prepare"](argv, "gpt2", folder)


if __name__ == "__main__":
    run_main(main)
