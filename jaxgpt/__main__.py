"""The installed commands: `jaxgpt-train …` is `python -m jaxgpt.train …`, and so on; `python -m jaxgpt` lists them."""

import runpy
import sys
from pathlib import Path

from jaxgpt import before_imports

COMMANDS = {
    "train": "trains a model; fine-tunes, goes on with a run, evaluates once",
    "sample": "text from a model",
    "evaluate": "loss over a split, HellaSwag, LAMBADA",
    "plot": "curves of runs",
    "report": "one page about runs",
    "convert": "weights in and out",
    "prepare": "tokens of a corpus: python -m jaxgpt.prepare NAME",
    "bench": "speed of a training step",
}


def main() -> None:
    name = Path(sys.argv[0]).stem.removeprefix("jaxgpt-")
    if name in COMMANDS:
        before_imports()
        runpy.run_module(f"jaxgpt.{name}", run_name="__main__", alter_sys=True)
        return
    for name, about in COMMANDS.items():
        print(f"python -m jaxgpt.{name:<10}{about}")


if __name__ == "__main__":
    main()
