"""Measures the data side: the pipeline against nanoGPT's, and the reader. Figures are in docs/data.md.

python scripts/bench_data.py pipeline --text FILE.parquet --nanogpt DIR   # DIR: a checkout of karpathy/nanoGPT
python scripts/bench_data.py reader
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from jaxgpt import UserError
from jaxgpt.cli import Parser, run_main
from jaxgpt.data import Batches, Corpus

ROOT = Path(__file__).parents[1]
# nanoGPT's own prepare.py, given our text in the place of the hub's
NANOGPT = """
import datasets, runpy, sys
text = datasets.load_dataset("parquet", data_files=sys.argv[1], split="train")
datasets.load_dataset = lambda *_, **__: datasets.DatasetDict(train=text)
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pipeline", "reader"])
    parser.add_argument("--text", type=Path, help="a parquet file with a column `text`")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse(argv)
    if args.what == "reader":
        print(json.dumps(reader()))
        return
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            theirs = Path(folder, "theirs")
            theirs.mkdir()
            script = theirs / "prepare.py"
            source = (args.nanogpt / "data/openwebtext/prepare.py").read_text()
            # in 1,024 batches it fails on a validation split of fewer documents
            script.write_text(source.replace("total_batches = 1024", "total_batches = 16"))
            ours = {name: Path(folder, name) for name in ("jaxgpt", "jaxgpt --fast", "text --fast")}
            owt, text = (str(ROOT / "data" / name / "prepare.py") for name in ("openwebtext", "text"))
            figures: dict[str, Any] = {"nanogpt": timed(["-c", NANOGPT, str(args.text), str(script)])}
            for name, out in ours.items():
                inputs = [text, str(args.text)] if name.startswith("text") else [owt, "--input", str(args.text)]
                figures[name] = timed([*inputs, "--out_dir", str(out), *["--fast"] * name.endswith("--fast")])
            for name, out in ours.items():
                found = {split: tokens_of(out, f"{split}_*.bin") for split in ("train", "val")}
                wanted = {split: tokens_of(theirs, f"{split}.bin") for split in found}
                if name.startswith("text"):  # other documents for validation: the same tokens in all
                    found, wanted = ({"all": np.bincount(np.concatenate([*x.values()]))} for x in (found, wanted))
                for split in found:
                    assert np.array_equal(found[split], wanted[split]), (name, split)
        for key in ("wall_s", "cpu_s"):
            figures[f"{key} ratios"] = {name: round(figures["nanogpt"][key] / figures[name][key], 2) for name in ours}
        print(json.dumps(figures))


def tokens_of(folder: Path, names: str) -> np.ndarray:
    return np.concatenate([np.fromfile(path, np.uint16) for path in sorted(folder.glob(names))])


def timed(arguments: Sequence[str]) -> dict[str, float]:
    """Wall and CPU seconds of a Python process with its children, and the peak of their summed resident memory."""
    with tempfile.TemporaryDirectory() as home:  # no cache from an earlier run
        before, began, peak = os.times(), time.monotonic(), 0
        with open(Path(home, "log"), "wb") as log:
            env = {**os.environ, "HF_HOME": home}
            process = psutil.Popen([sys.executable, *arguments], env=env, stdout=log, stderr=log)
        while process.poll() is None:
            resident = 0
            for each in [process, *process.children(recursive=True)]:
                try:
                    resident += each.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, resident)
            time.sleep(0.1)
        if process.returncode:
            raise UserError(f"{arguments} failed: {Path(home, 'log').read_text()[-500:]}")
        after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": round(time.monotonic() - began, 2), "cpu_s": round(cpu, 2), "peak_mb": peak // 1_000_000}


def reader(gigabytes: float = 2.0, block_size: int = 1024, rows: int = 480) -> dict[str, float]:
    """Tokens a second from the page cache, for each order; seconds to open and read from 200 sparse GB."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        np.random.default_rng(0).integers(0, 50257, int(gigabytes * 5e8), np.uint16).tofile(Path(folder, "train.bin"))
        corpus = Corpus.open(folder, "train", block_size=block_size, vocab_size=50257)
        for name, corpora, weights, order in (
            ("shuffle", [corpus], [1], "shuffle"),
            ("random", [corpus], [1], "random"),
            ("mixture", [corpus] * 2, ["0.7", "0.3"], "shuffle"),
        ):
            batches = Batches(corpora, weights, seed=0, rows=rows, block_size=block_size, order=order)
            steps = len(corpus) // (rows * block_size)
            for step in range(steps):  # into the page cache
                batches.rows_at(step)
            began = time.perf_counter()
            for step in range(steps):
                batches.rows_at(step)
            figures[f"{name}_mtok_s"] = round(steps * rows * block_size / (time.perf_counter() - began) / 1e6)
        with open(Path(folder, "val.bin"), "wb") as f:
            f.truncate(200 * 10**9)
        began = time.perf_counter()
        sparse = Corpus.open(folder, "val", block_size=block_size, vocab_size=50257)
        Batches(sparse, seed=0, rows=rows, block_size=block_size).rows_at(10**9)
        figures["sparse_200gb_s"] = round(time.perf_counter() - began, 4)
    return figures


if __name__ == "__main__":
    run_main(main)
