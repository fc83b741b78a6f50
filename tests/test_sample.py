"""The command: what it prints and when, and one line for each of its user's mistakes."""

import io
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import fresh_params, logits_of

from jaxgpt import UserError, sample
from jaxgpt.cli import run_main
from jaxgpt.config import save_config
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.sample import SEPARATOR, write_samples
from jaxgpt.sharding import make_mesh
from jaxgpt.tokenizer import CharTokenizer, meta_for, write_meta
from jaxgpt.weights.opening import open_model

MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=27)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config) -> Path:
    """A run's folder with an untrained model of 27 characters."""
    folder = tmp_path_factory.mktemp("run")
    save_config(tiny_config(out_dir=str(folder)), folder)
    write_meta(folder, meta_for(CharTokenizer("abcdefghijklmnopqrstuvwxyz "), "char"))
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, {"params": fresh_params(MODEL, jax.random.key(0))}, {})
    checkpoints.close()
    return folder


def output(capsys, run, *arguments) -> str:
    sample.main([f"--out_dir={run}", "--max_new_tokens=40", *arguments])
    return capsys.readouterr().out


def test_samples_in_nanogpts_form(run, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("hello ")
    text = output(capsys, run, f"--start=FILE:{tmp_path}/prompt.txt", "--num_samples=3")
    samples = text.split(f"\n{SEPARATOR}\n")
    assert samples.pop() == "" and len(set(samples)) == 3
    assert all(s.startswith("hello ") and len(s) == len("hello ") + 40 for s in samples)
    assert output(capsys, run, "--start=hello ", "--num_samples=3") == text  # the same seed, the same text
    assert output(capsys, run, "--start=hello ", "--num_samples=3", "--seed=1") != text
    # the first sample stays what it is when fewer are drawn; the stop text cuts it
    stop = samples[0][20:22]
    cut = output(capsys, run, "--start=hello ", "--num_samples=1", f"--stop={stop}")
    assert cut == "hello " + samples[0].removeprefix("hello ").split(stop)[0] + f"\n{SEPARATOR}\n"


def test_temperature_0_ignores_the_seed(run, capsys):
    arguments = ["--start=a", "--num_samples=1", "--temperature=0", "--top_k=0", "--top_p=0.5"]
    assert output(capsys, run, *arguments) == output(capsys, run, *arguments, "--seed=5")


def test_text_appears_as_it_is_made(capsys):
    """The first unfinished sample streams; the others wait for it, those done by then appear at once."""
    tokenizer, shown = CharTokenizer("abc."), []

    def chunks():
        for rows in ("aaa", "bbb"), ("aa.", "bb."):
            shown.append(capsys.readouterr().out)
            yield np.array([tokenizer.encode(row) for row in rows])
        raise AssertionError("asked for more after every sample was done")

    write_samples(chunks(), tokenizer, tokenizer.encode("c"), 2, stop=".")
    assert [*shown, capsys.readouterr().out] == ["c", "aaa", f"aa\n{SEPARATOR}\ncbbbbb\n{SEPARATOR}\n"]


def test_prompts_from_a_file_and_from_stdin(run, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("hello\n\nbye\n")
    text = output(capsys, run, f"--prompts={tmp_path}/prompts.txt")
    first, second, rest = text.split(f"\n{SEPARATOR}\n")
    assert first.startswith("hello") and second.startswith("bye") and rest == ""
    # the second prompt's seed is the next one
    assert output(capsys, run, "--start=bye", "--num_samples=1", "--seed=1338") == f"{second}\n{SEPARATOR}\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\nbye\n")))
    assert output(capsys, run, "--prompts=-") == text


def test_json_lines_in_and_out(run, capsys, tmp_path):
    """Text and tokens are those of the plain form; log-probabilities are the model's, also past block_size."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello", "id": 7}\n{"prompt": "a"}\n')
    arguments = [f"--prompts={tmp_path}/in.jsonl", "--jsonl", "--num_samples=2"]
    rows = [json.loads(line) for line in output(capsys, run, *arguments).splitlines()]
    assert [(row["prompt"], row["sample"], row["seed"]) for row in rows] == [
        ("hello", 0, 1337), ("hello", 1, 1337), ("a", 0, 1338), ("a", 1, 1338)
    ]  # fmt: skip
    assert [row.get("id") for row in rows] == [7, 7, None, None]
    plain = output(capsys, run, "--start=hello", "--num_samples=2").split(f"\n{SEPARATOR}\n")
    assert plain == ["hello" + rows[0]["text"], "hello" + rows[1]["text"], ""]

    model = open_model(str(run), mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    tokens = model.tokenizer.encode("hello") + rows[0]["tokens"]
    assert model.tokenizer.decode(tokens) == plain[0]
    for i, logprob in enumerate(rows[0]["logprobs"], start=5):
        seen = tokens[max(0, i - MODEL.block_size) : i]
        padded = np.array([seen + [0] * (MODEL.block_size - len(seen))], np.int32)  # of one length: one program
        logits = np.asarray(logits_of(model.config, model.params, padded), np.float64)[0, len(seen) - 1]
        assert logprob == pytest.approx(logits[tokens[i]] - np.log(np.exp(logits).sum()), abs=2e-5)

    stop = rows[0]["text"][20:22]
    (row, *_) = [json.loads(line) for line in output(capsys, run, *arguments, f"--stop={stop}").splitlines()]
    made = row["text"] + stop
    assert row["tokens"] == rows[0]["tokens"][: len(made)] == model.tokenizer.encode(made)
    assert row["logprobs"] == pytest.approx(rows[0]["logprobs"][: len(made)], abs=2e-5)


def test_json_lines_want_their_flag(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    with pytest.raises(UserError, match=r"in\.jsonl: line 1 is a JSON object; add --jsonl"):
        sample.main([f"--out_dir={run}", f"--prompts={tmp_path}/in.jsonl"])
    with pytest.raises(UserError, match="out-x is one argument too many; did you mean --out_dir=out-x?"):
        sample.main(["out-x"])


def test_interactive(run, capsys, monkeypatch):
    """Each prompt is answered as --start would be; a mistake or Ctrl-C does not end the program, Ctrl-D does."""
    lines = iter(["hello", "Hé", KeyboardInterrupt(), "", "bye"])

    def answer(shown):
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    text = output(capsys, run, "--interactive")
    for prompt, seed in ("hello", 1337), ("bye", 1338):
        expected = output(capsys, run, f"--start={prompt}", "--num_samples=1", f"--seed={seed}")
        assert expected.removeprefix(prompt) in text
    assert "error: the vocabulary lacks 'Hé'" in text and "Ctrl-D ends" in text
    assert "error: the vocabulary lacks '\\n'" in text  # what an empty prompt means


def test_ctrl_c_stops_a_text_and_not_the_program(run, capsys, monkeypatch):
    lines = iter(["hello", "bye"])
    monkeypatch.setattr("builtins.input", lambda shown: next(lines))
    model = open_model(str(run), mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]))

    def generate(prompt, seed):
        for i in range(100):
            if i == 3 and seed == 0:
                signal.raise_signal(signal.SIGINT)
            if i == 5 and seed == 1:  # twice: the program
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            yield np.array([[i % 26]])

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", leave)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="130"):
        sample.converse(model, generate, iter([0, 1]), 1, "")
    assert f"abc\n{SEPARATOR}\nabcde" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--start=Hé"], "lacks 'Hé'"),
        ([], r"lacks '\n'"),  # the default prompt, of which this model knows nothing
        (["--start="], "the prompt is empty"),
        (["--start=FILE:nowhere.txt"], "cannot read 'nowhere.txt': No such file"),
        (["--start=FILE:."], "cannot read '.': Is a directory"),
        (["--start=a", "--temperature=-1"], "temperature=-1.0 must be 0"),
        (["--start=a", "--temperature=hot"], "--temperature: invalid float value: 'hot'"),
        (["--start=a", "--temperature=1e-38"], "temperature=1e-38 is taken for 0 in float32; set 0"),
        (["--start=a", "--temperature=1e39"], "temperature=1e+39 rounds to inf in float32"),
        (["--start=a", "--temperature=nan"], "temperature=nan must be 0"),
        (["--start=a", "--top_p=nan"], "top_p=nan must be above 0"),
        (["--start=a", "--top_k=nan"], "--top_k: invalid integer value: 'nan'"),
        (["--start=a", "--num_samples=1e9"], "num_samples=1000000000 must be below 1048576"),
        (["--start=a", "--max_new_tokens=1e300"], "must be below 2147483648"),
        (["--start=a", "--seed=1e10"], "seed=10000000000 must be below 4294967296"),
        (["--start=a", "--top_p=0"], "top_p=0.0 must be above 0"),
        (["--start=a", "--top_p=1.5"], "top_p=1.5 must be above 0 and at most 1"),
        (["--start=a", "--top_k=-1"], "top_k=-1 must be"),
        (["--start=a", "--max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["--start=a", "--num_samples=0"], "num_samples=0 must be at least 1"),
        (["--start=a", "--seed=-1"], "seed=-1 must be at least 0"),
        (["--start=a", "--checkpoint=newest"], "--checkpoint=newest is not best"),
        (["--start=a", "--init_from=gpt2"], "name one model"),
        (["--prompts=nowhere.txt"], "cannot read 'nowhere.txt': No such file"),
        (["--prompts=PROMPTS"], "holds no prompts"),
        (["--prompts=PROMPTS", "--jsonl", "--start=a"], "holds no prompts"),
        (["--interactive", "--jsonl"], "leave out --prompts and --jsonl"),
        (["--start=a", "--tempurature=1"], "did you mean --temperature"),
    ],
)
def test_mistakes_are_one_line(run, capsys, monkeypatch, tmp_path, arguments, complaint):
    (tmp_path / "empty.txt").write_text("\n")
    arguments = [argument.replace("PROMPTS", f"{tmp_path}/empty.txt") for argument in arguments]
    monkeypatch.setattr("sys.argv", ["sample", f"--out_dir={run}", *arguments])
    with pytest.raises(SystemExit) as exit:
        run_main(sample.main)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and complaint in err


def test_lines_of_prompts_end_at_line_breaks_alone(run, capsys, tmp_path, monkeypatch):
    """CRLF is one; U+2028, which JSON may hold, is none. A byte order mark is no text."""
    args = sample.parse([f"--out_dir={run}", f"--prompts={tmp_path}/p"])
    (tmp_path / "p").write_bytes("\ufeffa\u2028b\r\n\r\nc\x0cd".encode())
    assert [record["prompt"] for record in sample.read_prompts(args)] == ["a\u2028b", "c\x0cd"]
    args.jsonl = True
    (tmp_path / "p").write_bytes('{"prompt": "a\u2028b"}\r\n'.encode())
    assert sample.read_prompts(args) == [{"prompt": "a\u2028b"}]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_json_lines_are_json_whatever_stdout_is(run, tmp_path, monkeypatch, encoding):
    (tmp_path / "p").write_text('{"prompt": "a", "from": "naïve 日本"}\n', encoding="utf-8")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", stdout)
    sample.main([f"--out_dir={run}", f"--prompts={tmp_path}/p", "--jsonl", "--max_new_tokens=2"])
    stdout.flush()
    assert json.loads(stdout.buffer.getvalue().decode("utf-8"))["from"] == "naïve 日本"


def test_the_home_folder(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert output(capsys, f"~/{run.name}", "--start=a", "--num_samples=1").startswith("a")
    with pytest.raises(UserError, match="nobodyhere: there is no home folder"):
        output(capsys, "~nobodyhere", "--start=a")


@pytest.mark.parametrize("line", ["hello", "3", '"hello"', "{}", '{"prompt": 3}', '{"prompt": ""}', '{"prompt": "a"'])
def test_what_is_no_prompt_is_one_line(run, tmp_path, line):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match="in.jsonl: line 2 is not"):
        sample.main([f"--out_dir={run}", f"--prompts={tmp_path}/in.jsonl", "--jsonl"])


def test_without_a_model_it_says_which_there_are(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    with pytest.raises(UserError, match=f"which model\\? .*--out_dir={run.name}.*, or --init_from=gpt2"):
        sample.main([])
    monkeypatch.chdir(run)
    with pytest.raises(UserError, match="No folder here is a run"):
        sample.main([])
