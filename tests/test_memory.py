"""A step that does not fit is said before it runs, with settings that do, and batch_size=auto chooses one: all by the
compiled programs' own figures."""

import jax
import pytest

from jaxgpt import UserError, train
from jaxgpt.cli import Parser
from jaxgpt.config import load_preset, parse_config, read_config, resolve, resumed_config
from jaxgpt.sharding import configure_jax, make_mesh
from jaxgpt.step import abstract_state
from jaxgpt.tools.memory import (
    Need,
    bytes_per_device,
    choose_batch,
    compile_step,
    lower_step,
    need_of,
    smallest_batch,
    try_compile,
    with_batch,
)

VOCAB = 27


@pytest.fixture(scope="module")
def lowered(tiny_config):
    """lowered(**values): a step on one device, with its parts, its mesh and its state."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def make(**values):
        parts = resolve(tiny_config(n_embd=32, block_size=64, **values), mesh, VOCAB)
        state = abstract_state(parts, mesh)
        return lower_step(parts, mesh, state), parts, mesh, state

    return make


def need(step) -> int:
    found = need_of(step[0].compile())
    assert found is not None
    return found.total


def test_what_fits_is_not_said(lowered):
    step = lowered(batch_size=8, gradient_accumulation_steps=1)
    compile_step(*step, limit=need(step))
    compile_step(*step)  # a CPU does not say what it has


def test_the_settings_named_do_fit(lowered):
    """The micro-batch named is compiled in turn, and its own figures are within the limit."""
    step = lowered(batch_size=32, gradient_accumulation_steps=1)
    limit = int(0.6 * need(step))
    with pytest.raises(
        UserError, match=r"out of memory: a step needs .* GiB and a device has .*; as many tokens"
    ) as error:
        compile_step(*step, limit=limit)
    words = dict(word.split("=") for word in str(error.value).split("fit with ")[1].split(",")[0].split())
    size, micro_steps = int(words["batch_size"]), int(words["gradient_accumulation_steps"])
    assert size < 32 and size * micro_steps == 32
    assert need(lowered(batch_size=size, gradient_accumulation_steps=micro_steps)) <= limit


def test_where_nothing_fits_more_devices_are_named(lowered):
    with pytest.raises(UserError, match="mesh_fsdp"):
        compile_step(*lowered(batch_size=1, gradient_accumulation_steps=1), limit=1000)


class Refuses:
    """A lowered step whose compiler says this."""

    def __init__(self, said):
        self.said = said

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.said)


def test_what_a_tpu_compiler_says_of_memory_becomes_settings(tiny_config):
    mesh = make_mesh()
    parts = resolve(tiny_config(batch_size=16, n_layer=8), mesh, VOCAB)
    state = abstract_state(parts, mesh)
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded …"
    with pytest.raises(UserError) as error:
        compile_step(Refuses(said), parts, mesh, state)
    line = str(error.value)
    assert line.startswith("out of memory: a step needs 20.0 GiB and a device has 15.8; as many tokens fit with ")
    assert "batch_size=8 gradient_accumulation_steps=16, or remat=block, or mesh_fsdp=8" in line
    said = "the total memory required for HLO temporaries (27.47G) exceeds available HBM (15.75G). See …"
    _, need = try_compile(Refuses(said), state)
    assert need == Need(bytes_per_device(state), int(27.47 * 2**30), int(15.75 * 2**30))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        try_compile(Refuses("INTERNAL: no\nmore"), state)


# --- batch_size=auto ---


@pytest.fixture(scope="module")
def auto(tiny_config):
    """auto(limit, **values): the config chosen, and its line, on one device of this much memory."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def choose(limit, need_at=None, **values):
        values = {"n_embd": 32, "block_size": 64, "gradient_accumulation_steps": 1, "auto_batch_size": True} | values
        return choose_batch(tiny_config(**values), mesh, VOCAB, None, limit, need_at)

    return choose


def test_auto_is_the_largest_that_fits_and_divides(auto, lowered):
    """Of 25 rows, 1 × 25, 5 × 5 or 25 × 1: to a byte what the compiled step of 5 takes, and one less."""
    needed = need(lowered(batch_size=5, gradient_accumulation_steps=5))
    for limit, size in ((needed, 5), (needed - 1, 1)):
        config, line = auto(limit, batch_size=25)
        assert (config.batch_size, config.gradient_accumulation_steps) == (size, 25 // size)
        assert line.startswith(f"batch_size=auto is {size}, gradient_accumulation_steps {25 // size}: a step takes ")


@pytest.mark.parametrize("fixed, a_row", [(0, 1000), (5000, 10), (10**6, 1)])
@pytest.mark.parametrize("rows", [1, 7, 480])
def test_auto_whatever_a_step_takes(auto, fixed, a_row, rows):
    """Few steps are compiled, however far the estimate is from what they take."""
    tried = []

    def need_at(parts):
        tried.append(parts.data.batch_size)
        return Need(100, fixed + a_row * parts.data.batch_size)

    for most in (1, 3, rows):
        tried.clear()
        given = {"batch_size": 1, "gradient_accumulation_steps": rows}
        config, _ = auto(100 + fixed + a_row * most, need_at, **given)
        best = max(n for n in range(1, most + 1) if rows % n == 0)
        assert config.batch_size == best and config.gradient_accumulation_steps == rows // best
        assert len(tried) <= 6, tried


def test_auto_where_nothing_fits_or_divides(auto, tiny_config):
    with pytest.raises(UserError, match="out of memory: a step needs .* it takes more devices"):
        auto(1000, batch_size=4)
    with pytest.raises(UserError, match=r"batch_size=auto keeps the 15 sequences of a step .* multiple of 8"):
        smallest_batch(tiny_config(batch_size=3, gradient_accumulation_steps=5, auto_batch_size=True), make_mesh())


def test_auto_stays_where_memory_is_not_known(auto):
    for limit, need_at in ((None, None), (10**9, lambda parts: None)):
        config, line = auto(limit, need_at, batch_size=3, gradient_accumulation_steps=4)
        assert config.batch_size == 3 and config.gradient_accumulation_steps == 4
        assert line == "batch_size=auto stays 3: a cpu does not say how much memory it has"


def test_auto_on_the_command_line(tmp_path):
    argv = ["configs/gpt2.py", "--config.batch_size=auto", "--config.gradient_accumulation_steps=16"]
    config, given, _ = parse_config(argv, Parser())
    assert config.auto_batch_size and (config.batch_size, config.gradient_accumulation_steps) == (12, 16)
    assert given == {"gradient_accumulation_steps": 16, "auto_batch_size": True}
    with pytest.raises(UserError, match="batch_size"):
        parse_config(["configs/gpt2.py", "--config.batch_size=most"], Parser())


def test_auto_belongs_to_a_start_and_not_to_the_run():
    saved = with_batch(load_preset("configs/gpt2.py"), 60)
    saved.auto_batch_size = True
    config, _ = resumed_config(load_preset("configs/gpt2.py"), {}, saved)
    assert (config.batch_size, config.gradient_accumulation_steps, config.auto_batch_size) == (60, 8, False)
    asked = load_preset("configs/gpt2.py")
    asked.auto_batch_size = True
    config, _ = resumed_config(asked, {"auto_batch_size": True}, saved)
    assert config.auto_batch_size and config.batch_size * config.gradient_accumulation_steps == 480


def test_a_run_with_auto(tiny_config, tmp_path, monkeypatch, capsys):
    """It trains, resumes by the same command and records the sizes chosen; on eight devices, 16 rows in all."""
    values = {
        "batch_size": 1,
        "gradient_accumulation_steps": 16,
        "auto_batch_size": True,
        "max_iters": 4,
        "eval_interval": 2,
    }
    monkeypatch.setattr(train, "limit_of", lambda device: 2**40)
    config = tiny_config(out_dir=str(tmp_path / "out"), **values)
    assert train.train(config) == 0
    saved = read_config(tmp_path / "out")
    assert (saved.batch_size, saved.gradient_accumulation_steps) == (2, 8)
    assert (
        "batch_size=auto is 2, gradient_accumulation_steps 8: a step takes 0.0 GiB of 1024.0" in capsys.readouterr().out
    )
    config.update(init_from="auto", max_iters=6)
    assert train.train(config, {"auto_batch_size": True, "max_iters": 6}) == 0
    saved = read_config(tmp_path / "out")
    assert (saved.batch_size, saved.gradient_accumulation_steps, saved.max_iters) == (2, 8, 6)


@pytest.mark.parametrize("value", ["1.5", "0", "-1", "half", "nan"])
def test_no_fraction_of_memory(monkeypatch, value):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", value)
    with pytest.raises(UserError, match=f"XLA_PYTHON_CLIENT_MEM_FRACTION={value} must be a part"):
        configure_jax()
