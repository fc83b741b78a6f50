"""OpenWebText (8,013,769 documents) in GPT-2 tokens, split as nanoGPT does: 9,035,582,198 for training, 4,434,897 for
validation. Needs 54 GB for the hub's cache and 18 GB for the tokens. Run again after a stop, it goes on where it was.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxgpt.cli import run_main
from jaxgpt.corpus import shards, sources


def main(argv: Sequence[str], folder: Path = Path(__file__).parent) -> None:
    parser = shards.parser(__doc__, folder)
    parser.add_argument("--input", nargs="+", help="its .parquet files, or their folder; by default from the hub")
    args = vars(parser.parse(argv))
    rows = sources.load_rows("Skylion007/openwebtext", None, args.pop("input"), rows=8_013_769)
    parts = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    shards.build(sources.Rows("openwebtext", {"val": parts["test"], "train": parts["train"]}), **args)


if __name__ == "__main__":
    run_main(main)
