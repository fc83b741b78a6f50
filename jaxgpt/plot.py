"""Plot runs: `python -m jaxgpt.plot RUN [RUN …] -o loss.png` draws their losses and learning rates.

In a notebook, `jaxgpt.plot.plot("out-a", "out-b", x="tokens", y=["loss", "grad_norm"])` is a figure that shows itself.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from jaxgpt import UserError, from_json, local_path, output
from jaxgpt.cli import Parser, run_main
from jaxgpt.store import AnyPath, folder

Rows = list[dict[str, float]]  # of a metrics.jsonl: each has a step

X = {"step": ("step", "step"), "tokens": ("tokens", "tokens"), "seconds": ("wall_s", "time (s)")}  # column, label
Y = {  # labels of columns, with their units; any other column is called by its name
    "loss": "loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "step_ms": "time of a step (ms)",
    "tokens_per_s": "throughput (tokens/s)",
    "mfu": "model FLOPs utilization",
    "val_ppl": "validation perplexity",
    "val_bpb": "validation (bits per byte)",
}
# of the runs in turn; Okabe and Ito's, told apart by everyone
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LOSSES = {  # columns of the panel "loss", and how they are drawn
    "loss": {"alpha": 0.35, "linewidth": 0.8},
    "train_loss": {"linestyle": "--", "linewidth": 1.2, "label": " train"},
    "val_loss": {"marker": "o", "markersize": 3, "linewidth": 1.2, "label": " val"},
}


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m jaxgpt.plot", description="Draws the metrics of one or several runs.")
    parser.add_argument("runs", nargs="+", type=folder, metavar="RUN", help="folders of runs")
    parser.add_argument(
        "-o", "--output", type=local_path, default=Path("loss.png"), help="the .png, .svg or .pdf to write"
    )
    parser.add_argument("--x", choices=X, default="step", help="the horizontal axis")
    parser.add_argument("--y", default="loss,lr", help="columns of metrics.jsonl, a panel each, with commas between")
    args = parser.parse(argv)
    figure = plot(*args.runs, x=args.x, y=[name for name in args.y.split(",") if name])
    kind = args.output.suffix[1:] or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"cannot write {args.output}: {kind} is no format of figures; choose .png, .svg or .pdf")
    with output(args.output) as file:
        figure.savefig(file, format=kind, dpi=120)
    print(args.output)


class Plot(Figure):
    """A figure that a notebook shows, with or without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        self.savefig(content := io.BytesIO(), format="png", dpi=96)
        return content.getvalue()


def plot(*runs: str | os.PathLike | AnyPath, x: str = "step", y: Sequence[str] = ("loss", "lr")) -> Plot:
    """Panels of the columns `y` over `x` (step, tokens or seconds), one colour for each run's folder.

    The panel "loss" has the training loss of each logged step and the mean losses of both splits at evaluations. Raises
    UserError if a folder is no run, or if no run has such a column.
    """
    metrics = {str(run): read_metrics(folder(run)) for run in runs}
    if x not in X or not y:
        raise UserError(f"x={x!r}, y={y!r}: x is one of {', '.join(X)}, and y names columns of metrics.jsonl")
    column = X[x][0]
    for name, rows in metrics.items():
        if not any(column in row for row in rows):
            raise UserError(f"{name} does not record {column} (it was made before jaxgpt 0.2.0); use --x=step")
    known = {key for rows in metrics.values() for row in rows for key in row} - {column, "step"}
    if missing := [name for name in y if name not in known | {"loss", "lr"}]:
        raise UserError(f"no run records {missing[0]!r}; their columns are {', '.join(sorted(known))}")
    with matplotlib.rc_context({"font.size": 9}):
        heights = [3 if name == "loss" else 1.5 for name in y]
        figure = Plot(figsize=(8, 0.6 + 1.2 * sum(heights)), layout="constrained")
        panels = figure.subplots(len(y), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for panel, name in zip(panels, y, strict=True):
            draw(panel, metrics, x, name)
            panel.set_xlabel("")
        panels[-1].set_xlabel(X[x][1])
        if panels[0].get_legend_handles_labels()[1]:  # a run that was never evaluated has no line with a name
            panels[0].legend(fontsize="small")
    return figure


def draw(panel: Axes, runs: Mapping[str, Rows], x: str, y: str, *, points: int | None = None) -> None:
    """One panel, its axes labelled. points: of longer series, this many means of neighbours are drawn."""
    styles = LOSSES if y == "loss" else {y: {"linewidth": 1.2, "label": ""}}
    for i, (name, rows) in enumerate(runs.items()):
        for column, style in styles.items():
            xs, ys = thin(*series(rows, X[x][0], column), points)
            if not xs:
                continue
            label = {"label": name + style["label"]} if "label" in style else {}
            panel.plot(xs, ys, color=COLORS[i % len(COLORS)], **style | label)
    panel.set(xlabel=X[x][1], ylabel=Y.get(y, y))
    panel.xaxis.set_major_locator(MaxNLocator(6))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    if y in ("tokens_per_s", "val_ppl"):
        panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)


def series(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    """The rows that have both columns, by x."""
    points = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    return [p[0] for p in points], [p[1] for p in points]


def thin(xs: list[float], ys: list[float], points: int | None) -> tuple[list[float], list[float]]:
    """At most `points` means of neighbours in place of the points themselves."""
    size = max(1, -(-len(xs) // points)) if points else 1
    parts = [slice(i, i + size) for i in range(0, len(xs), size)]
    xs, ys = ([sum(values[part]) / len(values[part]) for part in parts] for values in (xs, ys))
    return xs, ys


def finite(value: Any) -> float | None:
    """A number of a row; None if it is not finite, or beyond what axes can be drawn for."""
    return None if value is None or not abs(float(value)) < 1e30 else float(value)


def read_metrics(run: AnyPath) -> Rows:
    """The objects of a run's metrics.jsonl; a line still being written is left out. UserError if there are none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} holds no metrics.jsonl; name the folder of a run (its out_dir)")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = {key: finite(value) for key, value in from_json(line).items()}
            rows.append({"step": float(row.pop("step")), **row})  # pyright: ignore  # None is none
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError):
            if line.endswith(b"\n"):
                raise UserError(f"{path}: line {number} is not of a run's metrics; remove it") from None
    if not any("loss" in row or "val_loss" in row for row in rows):
        raise UserError(f"{path} holds no losses yet; wait for the run's first log line")
    return rows


if __name__ == "__main__":
    run_main(main)
