"""Plot runs: `python -m jaxgpt.plot RUN [RUN …] -o loss.png` draws their losses and learning rates."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from jaxgpt import UserError
from jaxgpt.config import Parser, run_main


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m jaxgpt.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("loss.png"), help="the PNG to write")
    args = parser.parse(argv)
    figure = plot({str(run): read_metrics(run) for run in args.runs})
    try:
        figure.savefig(args.output, dpi=120)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {args.output}: {e}; choose another --output") from None
    print(args.output)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The objects of a run's metrics.jsonl; a line still being written is left out. UserError if there are none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} holds no metrics.jsonl; name the folder of a run (its out_dir)")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = {key: value if value is None else float(value) for key, value in json.loads(line).items()}
            rows.append({"step": row.pop("step"), **row})
        except (ValueError, TypeError, AttributeError, LookupError):
            if line.endswith(b"\n"):
                raise UserError(f"{path}: line {number} is not of a run's metrics; remove it") from None
    if not any("loss" in row or "val_loss" in row for row in rows):
        raise UserError(f"{path} holds no losses yet; wait for the run's first log line")
    return rows


def plot(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Training and validation loss over the learning rate, one colour a run."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 6), layout="constrained")
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for i, (name, rows) in enumerate(runs.items()):

        def series(key: str, rows=rows) -> tuple[list[float], list[float]]:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            return [step for step, _ in points], [value for _, value in points]

        color = f"C{i}"
        losses.plot(*series("loss"), color=color, alpha=0.35, linewidth=0.8)
        losses.plot(*series("train_loss"), color=color, linestyle="--", label=f"{name} train")
        losses.plot(*series("val_loss"), color=color, marker="o", markersize=3, label=f"{name} val")
        rates.plot(*series("lr"), color=color)
    losses.set(ylabel="loss (nats per token)")
    losses.legend()
    rates.set(xlabel="step", ylabel="learning rate")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_main(main)
