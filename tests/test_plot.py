"""The plot of one or several runs, whole or still being written; and what is no run."""

import contextlib
import io
import json
import math
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt import UserError, report
from jaxgpt.plot import main, plot, read_metrics, thin

ROWS = [{"step": 0, "train_loss": 4.0, "val_loss": 4.1, "val_ppl": 60.0}] + [
    {"step": i, "loss": 4.0 - i / 10, "lr": i / 100, "grad_norm": 1.0, "step_ms": 5.0} for i in range(1, 11)
]


def run(folder, rows=ROWS, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return str(folder)


def size_of_png(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_a_png_of_several_runs(tmp_path, capsys):
    out = tmp_path / "loss.png"
    main([run(tmp_path / "a"), run(tmp_path / "b", ROWS[:5], tail='{"step": 6, "lo'), "-o", str(out)])
    assert size_of_png(out) == (960, 720)
    assert capsys.readouterr().out == f"{out}\n"


def test_what_is_drawn(tmp_path):
    """Both losses and the rate of each run, at their steps; a value that was not finite is left out."""
    one, two = run(tmp_path / "a", [*ROWS, {"step": 11, "loss": None, "skipped": 1}]), run(tmp_path / "b", ROWS[:3])
    figure = plot(one, two)
    losses, rates = figure.axes
    loss, train, val = losses.lines[:3]
    assert loss.get_xydata().tolist() == [[row["step"], row["loss"]] for row in ROWS[1:]]
    assert (train.get_xydata().tolist(), val.get_xydata().tolist()) == ([[0, 4.0]], [[0, 4.1]])
    assert rates.lines[0].get_xydata().tolist() == [[row["step"], row["lr"]] for row in ROWS[1:]]
    assert len(losses.lines) == 6 and len({line.get_color() for line in losses.lines}) == 2
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == [f"{one} train", f"{one} val", f"{two} train", f"{two} val"]


@pytest.mark.parametrize("x, column, label", [("tokens", "tokens", "tokens"), ("seconds", "wall_s", "time (s)")])
def test_any_axes(tmp_path, x, column, label):
    rows = [{**row, "tokens": 100.0 * row["step"], "wall_s": 0.5 * row["step"]} for row in ROWS]
    out = tmp_path / "plot.svg"
    main([run(tmp_path / "a", rows), f"--x={x}", "--y=grad_norm,loss", "-o", str(out)])
    assert label in plot(run(tmp_path / "a", rows), x=x).axes[-1].get_xlabel() and out.read_text().startswith("<?xml")
    (norm,) = plot(run(tmp_path / "a", rows), x=x, y=["grad_norm"]).axes
    assert norm.lines[0].get_xydata().tolist() == [[row[column], 1.0] for row in rows[1:]]
    assert norm.get_ylabel() == "gradient norm"


def test_a_notebook_shows_it(tmp_path):
    assert plot(run(tmp_path))._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--x=tokens"], "does not record tokens .*; use --x=step"),
        (
            ["--y=loss,accuracy"],
            "no run records 'accuracy'; their columns are grad_norm, loss, lr, step_ms",
        ),
        (["--y="], "names columns"),
        (["--x=epoch"], "invalid choice: 'epoch'"),
    ],
)
def test_what_is_not_recorded_is_one_line(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main([run(tmp_path / "a"), "-o", str(tmp_path / "loss.png"), *arguments])
    assert not (tmp_path / "loss.png").exists()


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 50))
def test_long_series_are_means(values, points):
    xs, ys = thin(list(range(len(values))), values, points)
    assert len(xs) == len(ys) <= points and xs == sorted(xs)
    assert thin(xs, ys, None) == (xs, ys)
    if values:
        assert min(values) - 1e-6 <= min(ys) and max(ys) <= max(values) + 1e-6


def test_a_line_still_being_written_is_left_out(tmp_path):
    run(tmp_path, tail='{"step": 11, "loss": 3')
    assert read_metrics(tmp_path) == ROWS


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "holds no metrics.jsonl; name the folder of a run"),
        (b"", "holds no losses yet"),
        (b'{"step": 1, "lr": 0.1}\n', "holds no losses yet"),
        (b'{"step": 1, "loss": 2.0}\n{"ste\n{"step": 2, "loss": 1.0}\n', "line 2 is not"),
        (b'{"step": 1, "loss": 2.0}\n3\n', "line 2 is not"),
        (b'{"loss": 2.0}\n', "line 1 is not"),
        (b'{"step": 1, "loss": "high"}\n', "line 1 is not"),
        (b"\xff\xfe\n", "line 1 is not"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    out = tmp_path / "out" / "loss.png"
    with pytest.raises(UserError, match=message):
        main([str(tmp_path), "-o", str(out)])
    assert not out.exists()


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["step", "loss", "val_loss", "lr", "wall_s", "tokens", "tokens_per_s", "val_ppl"]),
            st.none() | st.floats() | st.integers() | st.sampled_from([1e308, 1e29, math.inf, 10**25]),
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["step", "tokens", "seconds"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_any_numbers_are_drawn_or_one_line(tmp_path, rows, x):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, "loss": 1.0, **row}) + "\n" for row in rows))
    (tmp_path / "config.json").write_text('{"out_dir": "x"}')
    with contextlib.suppress(UserError):
        plot(tmp_path, x=x, y=["loss", "lr"]).savefig(io.BytesIO(), format="svg")
    with contextlib.suppress(UserError):
        report.render([report.read_run(tmp_path)])


HOSTILE = [b"[" * 10**5, b'{"step": 1e400, "loss": 1}\n', b'{"step": 1, "loss": ' + b"9" * 999 + b"}\n"]


@given(st.binary(max_size=60) | st.sampled_from(HOSTILE))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_rows_or_one_line(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + content)
    try:
        plot(tmp_path)
    except UserError as error:
        assert "metrics.jsonl" in str(error)


@pytest.mark.parametrize("out", ["a/metrics.jsonl/loss.png", "loss.docx", "folder.png"])
def test_where_it_cannot_be_written_is_one_line(tmp_path, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        main([run(tmp_path / "a"), "-o", out])
