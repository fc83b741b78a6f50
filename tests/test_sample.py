"""The command: what it prints and when, and one line for each of its user's mistakes."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt import sample
from jaxgpt.config import run_main, save_config
from jaxgpt.models.gpt2 import GPTConfig, init_params
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.sample import SEPARATOR, write_samples
from jaxgpt.tokenizer import CharTokenizer, meta_for, write_meta

MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=27)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config) -> Path:
    """A run's folder with an untrained model of 27 characters."""
    folder = tmp_path_factory.mktemp("run")
    save_config(tiny_config(out_dir=str(folder)), folder)
    write_meta(folder, meta_for(CharTokenizer("abcdefghijklmnopqrstuvwxyz "), "char"))
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, {"params": init_params(MODEL, jax.random.key(0))}, {})
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

    write_samples(chunks(), tokenizer, "c", 2, stop=".")
    assert [*shown, capsys.readouterr().out] == ["c", "aaa", f"aa\n{SEPARATOR}\ncbbbbb\n{SEPARATOR}\n"]


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
        (["--start=a", "--top_p=0"], "top_p=0.0 must be above 0"),
        (["--start=a", "--top_p=1.5"], "top_p=1.5 must be above 0 and at most 1"),
        (["--start=a", "--top_k=-1"], "top_k=-1 must be"),
        (["--start=a", "--max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["--start=a", "--num_samples=0"], "num_samples=0 must be at least 1"),
        (["--start=a", "--seed=-1"], "seed=-1 must be at least 0"),
        (["--start=a", "--checkpoint=newest"], "--checkpoint=newest is not best"),
        (["--start=a", "--init_from=gpt2"], "name one model"),
        (["--start=a", "--tempurature=1"], "did you mean --temperature"),
    ],
)
def test_mistakes_are_one_line(run, capsys, monkeypatch, arguments, complaint):
    monkeypatch.setattr("sys.argv", ["sample", f"--out_dir={run}", *arguments])
    with pytest.raises(SystemExit) as exit:
        run_main(sample.main)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and complaint in err
