"""FineWeb-Edu's sample of 10 billion tokens, in GPT-2 tokens: shards of 100 million, the first for validation.
Needs 50 GB for the hub's cache and 20 GB for the tokens. Run again after a stop, it goes on where it was.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxgpt.cli import run_main
from jaxgpt.corpus import shards, sources


def main(argv: Sequence[str], folder: Path = Path(__file__).parent) -> None:
    parser = shards.parser(__doc__, folder)
    parser.add_argument("--input", nargs="+", help="its .parquet files, or their folder; by default from the hub")
    args = vars(parser.parse(argv))
    rows = sources.load_rows("HuggingFaceFW/fineweb-edu", "sample-10BT", args.pop("input"))
    shards.build(sources.Rows("fineweb-edu sample-10BT", {"train": rows}), first_shard_is_val=True, **args)


if __name__ == "__main__":
    run_main(main)
