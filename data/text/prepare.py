"""Your own text in tokens: train_*.bin, val_*.bin and meta.json. Run again after a stop, it goes on where it was.

python data/text/prepare.py notes/ books/*.txt.gz posts.jsonl --field=body --out_dir=data/mine
"""

from collections.abc import Sequence
from pathlib import Path

from jaxgpt.cli import run_main
from jaxgpt.corpus import shards, sources


def main(argv: Sequence[str], folder: Path = Path(__file__).parent) -> None:
    parser = shards.parser(__doc__, folder)
    parser.add_argument(
        "inputs", nargs="+", help=".txt, .md, .jsonl (also .gz, .zst), .parquet files, folders or globs"
    )
    parser.add_argument("--val", nargs="+", default=[], help="the same for validation; by default a part of all")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="that part")
    parser.add_argument("--field", default="text", help="the text's name in .jsonl and .parquet")
    parser.add_argument(
        "--tokenizer", default="gpt2", help="gpt2, or a tokenizer.json, or the folder of a run with one"
    )
    parser.add_argument("--eot", help="the tokenizer's token that ends a document; by default the usual ones")
    args = vars(parser.parse(argv))
    source = sources.Files(*(args.pop(key) for key in ("inputs", "val", "field", "val_fraction")))
    shards.build(source, **args)


if __name__ == "__main__":
    run_main(main)
