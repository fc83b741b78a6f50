"""A step that does not fit is said before it runs, with settings that do: computed from the compiled program."""

import jax
import pytest

from jaxgpt import UserError
from jaxgpt.config import DataConfig, resolve
from jaxgpt.data import RunData
from jaxgpt.keys import take
from jaxgpt.sharding import make_mesh
from jaxgpt.step import abstract_state, make_train_step
from jaxgpt.tools.memory import check_fits


@pytest.fixture(scope="module")
def compiled(tiny_config):
    """compiled(**values): a step on one device, with its parts and its mesh."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def make(**values):
        config = tiny_config(n_embd=32, block_size=64, **values)
        data = RunData(take(DataConfig, config), config.block_size, mesh)
        parts = resolve(config, mesh, data.vocab_size)
        return (
            make_train_step(parts, mesh).lower(abstract_state(parts, mesh), data.abstract_batch()).compile(),
            parts,
            mesh,
        )

    return make


def need(step) -> int:
    figures = step.memory_analysis()
    state = figures.argument_size_in_bytes + figures.output_size_in_bytes - figures.alias_size_in_bytes
    return state + figures.temp_size_in_bytes


def test_what_fits_is_not_said(compiled):
    step, parts, mesh = compiled(batch_size=8, gradient_accumulation_steps=1)
    check_fits(step, parts, mesh, limit=need(step))
    check_fits(step, parts, mesh)  # a CPU does not say what it has


def test_the_settings_named_do_fit(compiled):
    """The micro-batch named is compiled in turn, and its own figures are within the limit."""
    step, parts, mesh = compiled(batch_size=32, gradient_accumulation_steps=1)
    limit = int(0.6 * need(step))
    with pytest.raises(
        UserError, match=r"out of memory: a step needs .* GiB and a device has .*; as many tokens"
    ) as error:
        check_fits(step, parts, mesh, limit=limit)
    words = dict(word.split("=") for word in str(error.value).split("fit with ")[1].split(",")[0].split())
    size, micro_steps = int(words["batch_size"]), int(words["gradient_accumulation_steps"])
    assert size < 32 and size * micro_steps == 32
    smaller, _, _ = compiled(batch_size=size, gradient_accumulation_steps=micro_steps)
    assert need(smaller) <= limit


def test_where_nothing_fits_more_devices_are_named(compiled):
    step, parts, mesh = compiled(batch_size=1, gradient_accumulation_steps=1)
    with pytest.raises(UserError, match="mesh_fsdp"):
        check_fits(step, parts, mesh, limit=1000)
