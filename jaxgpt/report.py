"""One page about one or several runs: `python -m jaxgpt.report RUN [RUN …] -o report.html`. It opens without a network.

Everything is read from the runs' folders: config.json, metrics.jsonl and, where a run has them, samples.jsonl and
events.jsonl. The page holds its own style and pictures; its text is in report.html.jinja.
"""

import base64
import dataclasses
import datetime
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from jaxgpt import __version__, from_json, local_path, output, store
from jaxgpt.cli import Parser, run_main
from jaxgpt.config import default_config, read_saved
from jaxgpt.models import BUILT_IN
from jaxgpt.plot import COLORS, LOSSES, Rows, X, Y, draw, read_metrics, series
from jaxgpt.store import AnyPath

PANELS = [  # of each picture: y, x, caption
    ("loss", "step", "Loss by steps"),
    ("loss", "tokens", "Loss by tokens"),
    ("loss", "seconds", "Loss by time"),
    ("lr", "step", "Learning rate"),
    ("tokens_per_s", "step", "Throughput"),
    ("grad_norm", "step", "Gradient norm, before clipping"),
]
NO_KEYS = ("model_source", "run_id")  # what config.json holds besides the keys
POINTS = 400  # in a curve: as many as a narrow picture can show


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder says of it."""

    name: str
    color: str
    config: dict[str, Any]
    environment: dict[str, Any]  # versions, command, host, …; empty for runs before jaxgpt 0.2.0
    rows: Rows
    samples: list[dict[str, Any]]  # step, prompt, text
    events: list[dict[str, Any]]  # time, step, event, detail

    @property
    def changed(self) -> set[str]:
        """Keys that are not at their defaults, and those of a user's model file, which is not executed here."""
        model = self.config.get("model")
        defaults = default_config(model if model in BUILT_IN else "gpt2").to_dict()
        return {key for key, value in self.config.items() if key not in defaults or value != defaults[key]}

    @property
    def evaluations(self) -> Rows:
        return [row for row in self.rows if row.get("val_loss") is not None]

    @property
    def columns(self) -> list[str]:
        """Of its evaluations."""
        return list(dict.fromkeys(key for row in self.evaluations for key in row))

    @property
    def result(self) -> dict[str, str]:
        """What the page begins with: titles and values, which are empty where the run has none."""
        best = min(self.evaluations, key=lambda row: row["val_loss"], default={})
        losses, speeds = (series(self.rows, "step", key)[1] for key in ("loss", "tokens_per_s"))
        tokens, seconds = (max((row.get(key) or 0 for row in self.rows), default=0) for key in ("tokens", "wall_s"))
        return {
            "best validation loss": f"{best['val_loss']:.4f} at step {best['step']:,.0f}" if best else "not evaluated",
            "perplexity": f"{best['val_ppl']:.2f}" if best.get("val_ppl") else "",
            "bits per byte": f"{best['val_bpb']:.4f}" if best.get("val_bpb") else "",
            "last training loss": f"{losses[-1]:.4f}" if losses else "",
            "steps": f"{max(row['step'] for row in self.rows):,.0f} of {number(self.config.get('max_iters', '?'))}",
            "tokens": f"{tokens:,.0f}" if tokens else "",
            "time": str(datetime.timedelta(seconds=round(seconds))) if 0 < seconds < 1e13 else "",
            "median throughput": f"{statistics.median(speeds):,.0f} tokens/s" if speeds else "",
        }


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m jaxgpt.report", description="Writes one page about one or several runs.")
    parser.add_argument("runs", nargs="+", type=store.folder, metavar="RUN", help="folders of runs")
    parser.add_argument("-o", "--output", type=local_path, default=Path("report.html"), help="the page to write")
    args = parser.parse(argv)
    page = render([read_run(run, COLORS[i % len(COLORS)]) for i, run in enumerate(args.runs)])
    with output(args.output) as f:
        f.write(page.encode(errors="backslashreplace"))  # half a surrogate pair, of a sample or a folder's name
    print(args.output)


def read_run(folder: AnyPath, color: str = COLORS[0]) -> Run:
    """Raises UserError if the folder holds no run, or none that has logged a loss."""
    rows, saved = read_metrics(folder), read_saved(folder)
    config = {key: saved.get(key) for key in saved if not isinstance(saved[key], dict | list) and key not in NO_KEYS}
    environment = saved.get("environment")
    samples, events = (read_jsonl(folder / f"{name}.jsonl") for name in ("samples", "events"))
    if not events:  # steps dropped are in metrics.jsonl as well
        events = [{"step": row["step"], "event": "dropped"} for row in rows if "skipped" in row]
    return Run(str(folder), color, config, environment if isinstance(environment, dict) else {}, rows, samples, events)


def read_jsonl(path: AnyPath) -> list[dict[str, Any]]:
    """The objects of a file of one a line, which may be missing; what is no object with a `step` is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = from_json(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, LookupError, OverflowError):  # cut short by a kill
            continue
    return rows


def render(runs: Sequence[Run]) -> str:
    """The page's HTML."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    return environment.get_template("report.html.jinja").render(
        runs=runs,
        pictures=pictures(runs),
        titles=[title for title in runs[0].result if any(run.result[title] for run in runs)],
        different=[key for key in keys if key != "out_dir" and len({repr(run.config.get(key)) for run in runs}) > 1],
        changed=[key for key in keys if any(key in run.changed for run in runs)],
        keys=keys,
        facts=list(dict.fromkeys(key for run in runs for key in run.environment)),
        version=__version__,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def number(value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return "not finite"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.5g}"
    return str(value)


def pictures(runs: Sequence[Run]) -> list[dict[str, str]]:
    """{caption, source} of each panel that some run has values for; source: an SVG as a data URI."""
    found = []
    for y, x, caption in PANELS:
        named = {run.name: run.rows for run in runs}
        columns = LOSSES if y == "loss" else (y,)
        drawn = {name for name, rows in named.items() if any(series(rows, X[x][0], column)[0] for column in columns)}
        if not drawn:
            continue
        without = [name for name in named if name not in drawn]
        note = f" ({', '.join(without)} did not record it)" if without else ""
        # small, so that its letters have their size on a phone, where it is 360 pixels wide
        with matplotlib.rc_context({"font.size": 8.5, "svg.fonttype": "none", "svg.hashsalt": "jaxgpt"}):
            figure = Figure(figsize=(4.1, 3.0), layout="constrained")
            draw(figure.subplots(), named, x, y, points=POINTS)
            figure.savefig(svg := io.BytesIO(), format="svg", transparent=True, metadata={"Date": None})
        source = "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
        found.append({"caption": caption + note, "source": source, "alt": f"{Y.get(y, y)} by {X[x][1]}"})
    return found


if __name__ == "__main__":
    run_main(main)
