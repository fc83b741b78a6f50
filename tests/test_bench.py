"""The benchmark runs where there is no GPU and prints one line of JSON."""

import json
import math
from pathlib import Path

import pytest

from jaxgpt import UserError
from jaxgpt.bench import main

CPU = f"{Path(__file__).parents[1] / 'configs' / 'shakespeare_char.py'}:cpu"
TINY = dict(block_size=16, n_layer=1, n_head=2, n_embd=16, batch_size=1, gradient_accumulation_steps=8)


@pytest.fixture
def arguments(token_folder):
    return [
        "--config",
        CPU,
        *(f"--config.{key}={value}" for key, value in TINY.items()),
        f"--config.data_dir={token_folder}",
    ]


def test_one_line_of_json(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([*arguments, "--steps=2"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    result = json.loads(out, parse_constant=pytest.fail)
    assert (result["what"], result["tokens_per_step"], result["devices"], result["mfu"]) == ("train", 128, 8, None)
    assert result["params"] == 16 * (128 + 12 * 16 + 3)
    assert result["step_ms"] > 0 and result["step_ms_fixed_batch"] > 0
    assert result["tokens_per_s"] == pytest.approx(128 / result["step_ms"] * 1e3, rel=1e-2)
    assert abs(result["loss_first"] - math.log(27)) < 0.1 and result["loss_last"] < result["loss_first"]
    assert {"device", "jax", "jaxlib", "flax", "optax"} <= set(result)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_needs_a_device(arguments):
    with pytest.raises(UserError, match="--profile needs a GPU"):
        main([*arguments, "--steps=2", "--profile"])


def test_sampling_and_reading(arguments, capsys):
    main([*arguments, "--what=sample", "--num_samples=2", "--max_new_tokens=8"])
    main([*arguments, "--what=data", "--steps=3"])
    sample, data = (json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines())
    assert (sample["what"], sample["num_samples"], sample["max_new_tokens"]) == ("sample", 2, 8)
    assert data["what"] == "data" and sample["tokens_per_s"] > 0 and data["tokens_per_s"] > 0


@pytest.mark.parametrize("wrong", ["--steps=0", "--steps=-3", "--steps=many", "--num_samples=0", "--what=dreams"])
def test_what_measures_nothing_is_one_line(arguments, wrong):
    with pytest.raises(UserError, match=wrong.partition("=")[0]):
        main([*arguments, wrong])
