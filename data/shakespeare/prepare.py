"""Shakespeare in GPT-2 tokens: train.bin, val.bin and meta.json in this folder. --help: its sources."""

from collections.abc import Sequence
from pathlib import Path

from jaxgpt.config import run_main
from jaxgpt.shakespeare import prepare


def main(argv: Sequence[str]) -> None:
    prepare(argv, "gpt2", Path(__file__).parent)


if __name__ == "__main__":
    run_main(main)
