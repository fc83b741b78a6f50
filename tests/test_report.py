"""The page about runs: what it says, that it needs no network, and that any folder is a page or one line."""

import fcntl
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt import UserError, output
from jaxgpt.config import default_config
from jaxgpt.report import main, read_run, render

ROWS = [{"step": 0, "train_loss": 4.0, "val_loss": 4.1, "val_ppl": 60.34, "tokens": 0, "wall_s": 0.5}]
ROWS += [{"step": i, "loss": 4 - i / 10, "lr": 1e-3, "tokens_per_s": 10.0 * i, "tokens": i} for i in range(1, 11)]
ROWS += [{"step": 10, "train_loss": 2.9, "val_loss": 3.05, "val_ppl": 21.12, "tokens": 10_000, "wall_s": 3725.0}]


def run(folder, rows=ROWS, samples="", events="", **values):
    """A run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**default_config().to_dict(), "max_iters": 10, **values}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in ("samples", samples), ("events", events):
        if content:
            (folder / f"{name}.jsonl").write_text(content)
    return folder


class Page(HTMLParser):
    """The words and links of a page; an element left open is an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.links, self.text, self.cells = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.cells.append(data)

    def row(self, key: str, runs: int = 1) -> list[str]:
        at = self.cells.index(key)
        return self.cells[at + 1 : at + 1 + runs]


def test_what_the_page_says(tmp_path, capsys):
    samples = "".join(json.dumps({"step": s, "prompt": "\n", "text": f"text of {s}"}) + "\n" for s in (5, 10))
    events = '{"time": "2026-11-26T00:50:00+00:00", "step": 5, "event": "saved", "detail": "best so far"}\n{"step": 7'
    one = run(tmp_path / "one", samples=samples, events=events, environment={"jax": "0.10.2", "command": "train a&b"})
    two = run(tmp_path / "two", ROWS[:3] + [{"step": 3, "skipped": 1}], learning_rate=0.25)
    out = tmp_path / "report.html"
    main([str(one), str(two), "-o", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    page = Page(out.read_text())
    assert page.row("best validation loss", 2) == ["3.0500 at step 10", "4.1000 at step 0"]
    assert page.row("steps", 2) == ["10 of 10", "3 of 10"]
    assert page.row("time") == ["1:02:05"] and page.row("tokens") == ["10,000"]
    assert page.row("median throughput", 2) == ["55 tokens/s", "15 tokens/s"]
    assert page.row("learning_rate", 2) == ["0.0006", "0.25"]  # the first table with it is that of the differences
    assert page.row("command") == ["train a&b"]
    assert "text of 10" in page.text and "text of 5" in page.text
    assert "best so far" in page.text and "dropped" in page.text
    assert page.text.index("Result") < page.text.index("Curves") < page.text.index("Samples")


def test_a_run_of_a_model_file_needs_no_such_file(tmp_path):
    """Its code is not executed; its own keys are shown."""
    folder = run(tmp_path / "a", model="gone/mine.py", model_source="raise SystemExit", width_of_mine=7)
    page = Page(render([read_run(folder)]))
    assert page.row("width_of_mine") == ["7"] and page.row("model") == ["gone/mine.py"]
    assert "raise SystemExit" not in page.text


def test_it_opens_without_a_network(tmp_path):
    text = render([read_run(run(tmp_path / "a"))])
    links = Page(text).links
    assert sum(link.startswith("data:image/svg") for link in links) == 5  # no run has a gradient norm
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"url\(|@import|<script", text)


def test_a_runs_text_is_no_html(tmp_path):
    samples = json.dumps({"step": 1, "prompt": "", "text": "<script>alert(1)</script>"}) + "\n"
    assert "<script" not in render([read_run(run(tmp_path / "<b>", samples=samples))])


HOSTILE = [b"[" * 10**5, b'{"step": 1e400}', b'{"step": ' + b"9" * 999 + b"}"]


@given(st.binary(max_size=60) | st.sampled_from(HOSTILE))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_beside_a_run_are_a_page(tmp_path, content):
    folder = run(tmp_path / "a")
    good = b'{"step": 3, "text": "here", "event": "saved"}\n'
    for name in ("samples", "events"):
        (folder / f"{name}.jsonl").write_bytes(content + b"\n" + good)
    assert "here" in Page(render([read_run(folder)])).text


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metrics.jsonl", None, "holds no metrics.jsonl; name the folder of a run"),
        ("metrics.jsonl", "", "holds no losses yet"),
        ("config.json", None, "it has no config.json"),
        ("config.json", "{", "is damaged"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, name, content, message):
    folder, out = run(tmp_path / "a"), tmp_path / "report.html"
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        main([str(folder), "-o", str(out)])
    assert not out.exists()


def test_where_it_cannot_be_written_is_one_line(tmp_path):
    folder = run(tmp_path / "a")
    for out in (folder, folder / "config.json" / "report.html"):
        with pytest.raises(UserError, match="cannot write"):
            main([str(folder), "-o", str(out)])


def test_what_is_no_file_is_written_not_replaced(tmp_path):
    """/dev/null was a plain file once root had written a report there; a pipe and /dev/stdout are written through."""
    folder, pipe, link = run(tmp_path / "a"), tmp_path / "pipe", tmp_path / "link"
    (folder / "samples.jsonl").write_text('{"step": 1, "prompt": "", "text": "\\ud800"}\n')
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1 << 20)
    main([str(folder), "-o", str(pipe)])
    assert pipe.is_fifo() and b"\\ud800" in os.read(reader, 1 << 20)
    with open(tmp_path / "opened", "wb") as file:
        opened = Path(f"/proc/self/fd/{file.fileno()}")
        with output(opened) as through:
            through.write(b"x")
        assert opened.is_symlink() and (tmp_path / "opened").read_bytes() == b"x"
    link.symlink_to(tmp_path / "opened")
    with output(link) as other:
        other.write(b"y")
    assert not link.is_symlink() and (tmp_path / "opened").read_bytes() == b"x", "no other link is followed"
