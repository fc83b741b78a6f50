"""The plot of one or several runs, whole or still being written; and what is no run."""

import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt import UserError
from jaxgpt.plot import main, plot, read_metrics

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


def test_what_is_drawn():
    """Both losses and the rate of each run, at their steps; a value that was not finite is left out."""
    figure = plot({"a": [*ROWS, {"step": 11, "loss": None, "skipped": 1}], "b": ROWS[:3]})
    losses, rates = figure.axes
    loss, train, val = losses.lines[:3]
    assert loss.get_xydata().tolist() == [[row["step"], row["loss"]] for row in ROWS[1:]]
    assert (train.get_xydata().tolist(), val.get_xydata().tolist()) == ([[0, 4.0]], [[0, 4.1]])
    assert rates.lines[0].get_xydata().tolist() == [[row["step"], row["lr"]] for row in ROWS[1:]]
    assert len(losses.lines) == 6 and len({line.get_color() for line in losses.lines}) == 2
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["a train", "a val", "b train", "b val"]


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


@given(st.binary(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_rows_or_one_line(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + content)
    try:
        plot({"a": read_metrics(tmp_path)})
    except UserError as error:
        assert "metrics.jsonl" in str(error)


@pytest.mark.parametrize("out", ["no/such/folder/loss.png", "loss.docx", "folder.png"])
def test_where_it_cannot_be_written_is_one_line(tmp_path, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        main([run(tmp_path / "a"), "-o", out])
