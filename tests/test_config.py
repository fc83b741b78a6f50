"""Presets, flags and what a user gets wrong: always one line that helps, never a traceback."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import UserError
from jaxgpt.cli import Parser, run_main
from jaxgpt.config import (
    ELSEWHERE,
    GPT2_SIZES,
    all_keys,
    default_config,
    load_preset,
    parse_config,
    read_config,
    resumed_config,
    save_config,
    unknown_key,
    validate,
    without_effect,
)
from jaxgpt.keys import check
from jaxgpt.models import abstract_params, count_params
from jaxgpt.models.gpt2 import GPTConfig

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = f"{CONFIGS / 'shakespeare_char.py'}:cpu"
SIZES = {"gpt2": GPT2_SIZES, "shakespeare_char": ("full", "cpu")}
PRESETS = [
    f"{path}:{size}" if size else str(path)
    for path in sorted(CONFIGS.glob("*.py"))
    for size in ("", *SIZES.get(path.stem, ()))
]


def parse(*argv: str):
    return parse_config(argv, Parser(prog="test"))[0]


def preset(folder: Path, body: str) -> str:
    path = folder / "preset.py"
    path.write_text(
        f"from jaxgpt.config import default_config\n\n\ndef get_config():\n    c = default_config()\n{body}\n"
    )
    return str(path)


# --- presets ---


@pytest.mark.parametrize("spec", PRESETS, ids=lambda spec: Path(spec).name)
def test_every_preset_is_a_valid_config(spec):
    config = parse("--config", spec)
    assert set(config) == set(default_config(config.model))
    assert config.dataset and config.out_dir.startswith("out")


def test_the_values_of_nanogpts_own_presets():
    """From its config/train_shakespeare_char.py, its README's CPU recipe and config/train_gpt2.py."""
    full = load_preset(str(CONFIGS / "shakespeare_char.py"))
    assert (full.n_layer, full.n_head, full.n_embd, full.block_size, full.batch_size) == (6, 6, 384, 256, 64)
    assert (full.dropout, full.learning_rate, full.min_lr, full.beta2, full.warmup_iters) == (
        0.2,
        1e-3,
        1e-4,
        0.99,
        100,
    )
    assert (full.max_iters, full.lr_decay_iters, full.eval_interval, full.eval_iters) == (5000, 5000, 250, 200)
    cpu = load_preset(CPU)
    assert (cpu.n_layer, cpu.n_head, cpu.n_embd, cpu.block_size, cpu.batch_size) == (4, 4, 128, 64, 12)
    assert (cpu.max_iters, cpu.lr_decay_iters, cpu.dropout, cpu.eval_iters) == (2000, 2000, 0.0, 20)
    gpt2 = load_preset(str(CONFIGS / "gpt2.py"))
    assert gpt2.batch_size * gpt2.gradient_accumulation_steps * gpt2.block_size == 491_520
    assert (gpt2.learning_rate, gpt2.min_lr, gpt2.weight_decay, gpt2.warmup_iters) == (6e-4, 6e-5, 0.1, 2000)
    assert gpt2.max_iters == gpt2.lr_decay_iters == 600_000


@pytest.mark.parametrize(
    "size, millions", [("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)]
)
def test_sizes_are_openais(size, millions):
    """Each takes the same tokens a step. OpenAI's have biases and no padding, which the presets leave to the model."""
    config = load_preset(f"{CONFIGS / 'gpt2.py'}:{size}")
    assert config.batch_size * config.gradient_accumulation_steps == 480
    shapes = [GPTConfig(n_layer=n, n_head=config.n_head, n_embd=config.n_embd, bias=True) for n in (1, 2)]
    one, two = (count_params(shape, abstract_params(shape), all=True) for shape in shapes)
    total = one + (config.n_layer - 1) * (two - one)
    assert round(total / 1e6) == millions


@pytest.mark.parametrize(
    "body, message",
    [
        ("    c.n_layers = 3\n    return c", "there is no key n_layers; did you mean n_layer?"),
        ("    c.learning_rte = 3\n    return c", "did you mean learning_rate?"),
        ("    c['drop_out'] = 0.1\n    return c", "did you mean dropout?"),
        ("    c.update(blocksize=8)\n    return c", "did you mean block_size?"),
        ("    c.max_iters = c.maxiters\n    return c", "did you mean max_iters?"),
        ("    c.n_layer = 'six'\n    return c", "n_layer"),
        ("    c.n_layer = 6.5\n    return c", "n_layer"),
        ("    return c +", "invalid syntax"),
        ("    return d", "preset.py: line 6: NameError: name 'd' is not defined"),
        ("    return {}['a']", "preset.py: line 6: KeyError: 'a'"),
        ("    assert not c", "preset.py: line 6: AssertionError"),
        ("    import no_such_module\n    return c", "no_such_module"),
        ("    return 1 / 0", "division by zero"),
        ("    raise SystemExit(3)", "preset.py: SystemExit(3)"),
        ("    exit(0)", "preset.py: SystemExit(0)"),
        ("    pass", "get_config() returned no config"),
        ("    return dict(n_layer=3)", "get_config() returned"),
        ("    return type(c)({'n_layer': 3})", "get_config() returned"),
    ],
)
def test_a_mistake_in_a_preset_is_one_line(tmp_path, body, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse("--config", preset(tmp_path, body))
    assert "preset.py" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("configs/gpt3.py", "no preset file configs/gpt3.py; there are configs"),
        ("configs", "no preset file configs"),
        ("configs/gpt2.py:gpt2-huge", "gpt2 has no size 'gpt2-huge'; choose gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
        ("pyproject.toml", "pyproject.toml: is no Python file"),
        ("jaxgpt/config.py", "get_config"),
    ],
)
def test_a_preset_that_is_none(spec, message, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    with pytest.raises(UserError, match=re.escape(message)):
        parse("--config", spec)


def test_a_presets_path_may_have_colons(tmp_path, monkeypatch):
    """As of a drive, and of a folder; what follows .py is the argument."""
    for folder in ("C:\\presets", "run:1", "a b"):
        (tmp_path / folder).mkdir()
        path = preset(tmp_path / folder, "    c.out_dir = 'here'\n    return c")
        assert parse("--config", path).out_dir == "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--config=~/run:1/preset.py").out_dir == "here"
    assert parse("--config", CPU).n_layer == 4
    with pytest.raises(UserError, match="no preset file run:1/gone.py"):
        parse("--config", "run:1/gone.py:size")


# --- flags ---


def test_flags_override_the_preset():
    config = parse("--config", CPU, "--config.n_layer=2", "--config.learning_rate", "1e-4", "--config.max_iters=1e5")
    assert (config.n_layer, config.learning_rate, config.max_iters, config.n_head) == (2, 1e-4, 100_000, 4)
    assert parse("--config", CPU, "--config.max_iters=600_000").max_iters == 600_000
    assert parse("--config", CPU, "--config.bias").bias is True
    assert parse("--config", CPU, "--config.decay_lr=False").decay_lr is False
    assert parse("--config", CPU, "--config.out_dir=out=x").out_dir == "out=x"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config.n_layr=3"], "there is no key n_layr; did you mean n_layer?"),
        (["--config.batchsize", "3"], "did you mean batch_size?"),
        (["--config.qqqqqq=3"], "there is no key qqqqqq; python -m jaxgpt.train --help lists the keys"),
        (["--n_layer=3"], "unknown argument --n_layer; keys of the config are written --config.n_layer"),
        (["n_layer=3"], "n_layer=3 is one argument too many; keys are written --config.KEY=VALUE"),
        (["cpu"], "cpu is one argument too many; a preset's size follows its name"),
        (["--compile=False"], "there is no key compile: every step is compiled"),
        (["--config.lr=1"], "there is no key lr: use learning_rate"),
        (["--config.n_layer=four"], "--config.n_layer: invalid integer value: 'four'"),
        (["--config.n_layer=2.5"], "invalid integer value: '2.5'"),
        (["--config.n_layer"], "expected one argument"),
        (["--config.learning_rate=fast"], "invalid float value: 'fast'"),
        (["--config.bias=maybe"], "invalid boolean value: 'maybe'"),
        (["--config.dtype=fp8"], "dtype='fp8' is not one of auto, bfloat16, float16, float32"),
        (["--config.learning_rate=nan"], "learning_rate=nan is not a finite number"),
        (["--config.batch_size=0"], "batch_size=0 must be at least 1"),
        (["--config.dropout=1"], "dropout=1.0 must be below 1"),
        (["--config.mesh_data=0"], "mesh_data=0 must be a number of devices, or -1"),
        (["--config.min_lr=1"], "min_lr=1.0 is above learning_rate"),
        (["--config.out_dir="], "out_dir='' names no folder"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse("--config", CPU, *argv)


def test_no_preset_is_one_line():
    with pytest.raises(UserError, match="name a preset: test --config configs/gpt2.py; test --help lists all keys"):
        parse("--config.n_layer=3")


def test_a_preset_needs_no_flag():
    """nanoGPT's habit: `train.py config/x.py`."""
    assert parse(CPU, "--config.n_layer=2").n_layer == 2


def test_every_key_is_documented_and_its_default_is_allowed():
    for part in all_keys().values():
        for name, field in part.items():
            rules = field.metadata
            assert len(rules["help"]) > 3 and not rules["help"].endswith("."), name
            assert not rules["choices"] or field.default in rules["choices"]
    validate(default_config())


@pytest.mark.parametrize("name", ELSEWHERE)
def test_keys_of_other_trainers_have_an_answer(name):
    with pytest.raises(UserError, match=re.escape(ELSEWHERE[name])):
        parse("--config", CPU, f"--config.{name}=1")


@given(st.sampled_from(sorted(default_config())), st.integers(0, 20), st.sampled_from(["drop", "double", "swap"]))
def test_the_nearest_key_is_found(key, place, how):
    """Any one slip of the pen leads back to the key, or to another one as near."""
    i = place % (len(key) - 1)
    wrong = {
        "drop": key[:i] + key[i + 1 :],
        "double": key[: i + 1] + key[i:],
        "swap": key[:i] + key[i + 1] + key[i] + key[i + 2 :],
    }[how]
    if wrong not in default_config():
        assert "did you mean" in unknown_key(wrong)


WORDS = st.one_of(
    st.sampled_from([f"--config.{key}" for key in default_config()]),
    st.sampled_from(["--config", "--", "-", "--config.", "-x", "--conf", "=", "1e400", "-1", "true", "0", "1_0", "١"]),
    st.text(max_size=8),
    st.builds("--config.{}={}".format, st.sampled_from(sorted(default_config())), st.text(max_size=8)),
    st.builds(
        "--config.{}={}".format,
        st.sampled_from(sorted(default_config())),
        st.one_of(st.integers(), st.floats(), st.booleans()),
    ),
)


@given(st.lists(WORDS, max_size=4))
def test_any_arguments_make_a_config_or_one_line(words):
    argv = ["--config", CPU, *(word for word in words if not word.startswith(("-h", "--h")))]
    try:
        config = parse(*argv)
    except UserError as error:
        assert str(error)
        return
    validate(config)
    assert all(type(config[key]) is type(value) for key, value in default_config().items())


NUMBERS = {
    name: field
    for part in all_keys("modern").values()
    for name, field in part.items()
    if type(field.default) in (int, float)
}


@given(st.sampled_from(sorted(NUMBERS)), st.floats() | st.integers(-(2**70), 2**70))
@settings(max_examples=500)
def test_a_number_is_what_devices_take_it_for(name, value):
    """Every key at its limits: refused, or in float32 (int32) finite, within the limits, and 0 only if it is 0."""
    field = NUMBERS[name]
    value = type(field.default)(value) if math.isfinite(value) else float(value)
    try:
        check(field, value)
    except UserError as error:
        assert str(error).startswith(name)
        return
    if isinstance(value, float):
        with np.errstate(all="ignore"):
            found = float(np.float32(value))
        assert (abs(found) >= 2.0**-126) == (value != 0)
    else:
        found = value
        assert name == "seed" or value < 2**31  # seeds are unsigned
    assert math.isfinite(found) and found >= (field.metadata["least"] or 0)
    assert field.metadata["below"] is None or found < field.metadata["below"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", 1e-50, "is taken for 0 in float32"),
        ("beta2", 0.99999999, "rounds to 1 in float32; set less"),  # Adam would divide by 0
        ("average_decay", 0.99999999, "rounds to 1 in float32"),  # the average would stay at the first parameters
        ("dropout", 0.99999999, "rounds to 1 in float32"),
        ("weight_decay", 3.5e38, "must be below"),
        ("grad_clip", math.inf, "is not a finite number"),
        ("min_lr", math.nan, "is not a finite number"),
        ("eval_iters", 2**31, "must be below"),
        ("warmup_iters", -1, "must be at least 0"),
        ("steps_per_call", 10**6, "must be below 10001"),
    ],
)
def test_limits(name, value, message):
    with pytest.raises(UserError, match=f"{name}=.* {message}"):
        check(NUMBERS[name], value)


def test_what_has_no_effect_is_said():
    config = load_preset(CPU)
    given = {"momentum": 0.5, "cooldown": 0.2, "learning_rate": 1.0, "sample_prompt": "a", "min_lr": 0.0}
    assert without_effect(config, given) == [
        "momentum has no effect with optimizer=adamw",
        "cooldown has no effect with lr_schedule=cosine",
        "sample_prompt has no effect with sample_interval=0",
    ]
    config.update(optimizer="muon", lr_schedule="linear", sample_interval=1)
    assert without_effect(config, given) == []
    config.decay_lr = False
    assert without_effect(config, given) == ["min_lr has no effect with decay_lr=False"]
    config.update(data_dir="data/a", dataset="b")
    with pytest.raises(UserError, match="dataset=b would not count: data_dir=data/a names the corpus"):
        without_effect(config, {"dataset": "b"})
    assert without_effect(config, {"dataset": "b", "data_dir": "data/a"}) == []


@given(st.text(max_size=40))
def test_any_preset_name_is_a_config_or_one_line(text):
    for spec in (text, f"{CPU.partition(':')[0]}:{text}"):
        try:
            parse(f"--config={spec}")
        except UserError as error:
            assert str(error)


@pytest.mark.parametrize("argv", [["--help"], [CPU, "--help"]])
def test_help_lists_every_key_with_its_meaning_and_value(capsys, argv):
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in all_keys().values():
        assert all(f"--config.{name}" in shown and field.metadata["help"] in shown for name, field in part.items())
    assert "[auto | bfloat16 | float16 | float32]" in shown and "(default: None)" not in shown
    assert ("(default: 2000)" in shown) and ("n_embd INT width of the residual stream (default: 128)" in shown) == (
        len(argv) == 2
    )


# --- a run's config.json ---


def test_config_json_round_trip(tmp_path):
    config = load_preset(CPU)
    save_config(config, tmp_path)
    assert read_config(tmp_path).to_dict() == config.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    older = config.to_dict()
    del older["dropout"]
    (tmp_path / "config.json").write_text(json.dumps({**older, "key_of_a_later_version": 1}))
    assert read_config(tmp_path).to_dict() == {**config.to_dict(), "dropout": default_config().dropout}


@given(
    st.one_of(st.binary(max_size=30), st.recursive(st.one_of(st.none(), st.floats(), st.text(max_size=5)), st.lists))
)
def test_any_config_json_is_a_config_or_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("run")
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_config(folder)


@pytest.mark.parametrize(
    "key, value", [("n_layer", "six"), ("n_layer", 0), ("dtype", "fp8"), ("bias", None), ("seed", [])]
)
def test_a_wrong_value_in_config_json_is_one_line(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({key: value}))
    with pytest.raises(UserError, match=key):
        read_config(tmp_path)


def test_a_config_json_that_may_not_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(UserError, match=r"config.json cannot be read: Too many .*; mend its permissions"):
        read_config(tmp_path)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run: it has no config.json; check out_dir"):
        read_config(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        read_config(tmp_path / "file")


# --- going on ---


def test_the_runs_values_count_but_for_those_given():
    """The command line wins over the run, the run over the preset; each difference is a line."""
    saved, preset_now = load_preset(CPU), load_preset(CPU)
    saved.learning_rate, saved.warmup_iters = 3e-4, 50
    preset_now.grad_clip, preset_now.log_interval = 0.5, 7
    config, lines = resumed_config(preset_now, {"log_interval": 7}, saved)
    assert (config.learning_rate, config.warmup_iters, config.grad_clip, config.log_interval) == (3e-4, 50, 1.0, 7)
    assert sorted(lines) == [
        "grad_clip stays 1.0, as in the run; --config.grad_clip=0.5 is the preset's",
        "learning_rate stays 0.0003, as in the run; --config.learning_rate=0.001 is the preset's",
        "log_interval 10 → 7",
        "warmup_iters stays 50, as in the run; --config.warmup_iters=100 is the preset's",
    ]


FIXED = dict(seed=1, data_order="random", block_size=32, n_layer=3, n_head=2, n_embd=64, bias=True)


@pytest.mark.parametrize("name", FIXED)
def test_what_makes_another_run_is_refused(name):
    with pytest.raises(UserError, match=f"{name}={FIXED[name]}, but the run in out-shakespeare-char"):
        resumed_config(load_preset(CPU), {name: FIXED[name]}, load_preset(CPU))


def test_sizes_of_zero_are_the_runs():
    preset_now = load_preset(CPU)
    preset_now.n_layer = preset_now.n_head = preset_now.n_embd = 0
    config, lines = resumed_config(preset_now, {"n_layer": 0}, load_preset(CPU))
    assert (config.n_layer, config.n_head, config.n_embd, lines) == (4, 4, 128, [])


# --- entry points ---


def end_of(main, monkeypatch, capsys):
    """Status, stdout and stderr of an entry point."""
    monkeypatch.setattr(sys, "argv", ["prog", "a", "b"])
    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code, *capsys.readouterr()


def test_run_main(monkeypatch, capsys):
    seen = []
    assert end_of(lambda argv: seen.append(argv), monkeypatch, capsys) == (0, "", "")
    assert seen == [["a", "b"]]
    assert end_of(lambda argv: 75, monkeypatch, capsys) == (75, "", "")

    def mistake(argv):
        raise UserError("two\n  lines; mend them")

    assert end_of(mistake, monkeypatch, capsys) == (2, "", "error: two lines; mend them\n")

    def diverged(argv):
        raise UserError("gone", status=77)

    assert end_of(diverged, monkeypatch, capsys) == (77, "", "error: gone\n")

    def bug(argv):
        raise ZeroDivisionError

    status, out, err = end_of(bug, monkeypatch, capsys)
    assert (status, out) == (1, "") and err.startswith("Traceback") and "ZeroDivisionError" in err
