"""Compiled steps that are kept: what is read is what was compiled, and another program is another file."""

import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt import UserError, config
from jaxgpt.config import resolve
from jaxgpt.models import count_users_files
from jaxgpt.ops import paths
from jaxgpt.sharding import make_mesh
from jaxgpt.step import abstract_state, create_state
from jaxgpt.tools import programs
from jaxgpt.tools.memory import abstract_tokens

VOCAB = 27


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where steps are kept, as on a GPU."""
    monkeypatch.setattr(programs, "_folder", lambda: tmp_path)
    monkeypatch.setattr(programs, "count_users_files", lambda: 0)  # of other tests
    before = jax.config.jax_enable_compilation_cache
    # a CPU's program that was read from JAX's cache cannot be kept: it would lack functions
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


@pytest.fixture
def asked(tiny_config):
    """asked(**values): what the step of a config on two devices is asked with."""
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])

    def make(**values):
        parts = resolve(tiny_config(dtype="bfloat16", **values), mesh, VOCAB)
        return parts, mesh, abstract_state(parts, mesh), abstract_tokens(parts, mesh)

    return make


def prepare(asked):
    parts, mesh, state, tokens = asked
    return programs.prepare_step(*asked, lambda: create_state(parts, mesh))


def after(step, tokens):
    """The state and the metrics after two steps, as bits."""
    batch = np.random.default_rng(0).integers(VOCAB, size=tokens.shape).astype(tokens.dtype)
    state = step.beside
    for _ in range(2):
        state, metrics = step.run(state, jax.device_put(batch, tokens.sharding))
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), (state, metrics))


def test_a_step_that_is_read_is_the_one_compiled(folder, asked):
    question = asked()
    first = prepare(question)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    second = prepare(question)
    assert first.trace_s > 0 == second.trace_s
    assert first.paths == second.paths
    assert second.run.memory_analysis().temp_size_in_bytes == first.run.memory_analysis().temp_size_in_bytes
    wanted = after(first, question[-1])
    assert after(second, question[-1]) == wanted
    assert paths.describe(second.paths).startswith("attention: ")
    file.write_bytes(content[:40] + b"\0" + content[41:])  # damaged: it is compiled again, and kept
    assert prepare(question).trace_s > 0 == prepare(question).trace_s
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_another_program_is_another_file(folder, asked, monkeypatch, tmp_path):
    names = set()

    def is_new(question):
        name = programs._file(*question[:2], question[3]).name
        new = name not in names
        names.add(name)
        return new

    assert is_new(asked()) and not is_new(asked(out_dir="elsewhere", log_interval=7))
    for values in (
        {"seed": 1}, {"learning_rate": 2e-2}, {"max_iters": 7}, {"n_layer": 3}, {"dropout": 0.1}, {"bias": True},
        {"kernels": "off"}, {"gradient_accumulation_steps": 4}, {"batch_size": 2}, {"average_decay": 0.9},
    ):  # fmt: skip
        assert is_new(asked(**values)), values
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
        assert is_new(asked())
    with jax.default_matmul_precision("highest"):
        assert is_new(asked())
    parts, _, state, tokens = asked()
    assert is_new((parts, make_mesh(1, 1, 1, devices=jax.devices()[1:2]), state, tokens))
    with monkeypatch.context() as patch:  # a fork's change
        patch.setattr(programs, "SOURCES", "others")
        assert is_new(asked())
    for text in ("", "# changed"):
        preset = tmp_path / "mine.py"
        preset.write_text(f"from jaxgpt.config import default_config as get_config{text}")
        with monkeypatch.context() as patch:
            patch.setattr(config, "preset_texts", texts := [])
            patch.setattr(programs, "preset_texts", texts)
            config.load_preset(str(preset))
            assert is_new(asked())
    assert not is_new(asked())


def test_what_others_code_has_a_part_in_is_always_traced(folder, asked, monkeypatch):
    parts, mesh, _, tokens = asked()
    with monkeypatch.context() as patch:
        patch.setitem(programs.SCHEDULES, "mine", lambda config, step: 1.0)
        assert programs._file(parts, mesh, tokens) is None
    assert programs._file(parts, mesh, tokens)
    monkeypatch.setattr(programs, "count_users_files", lambda: 1)  # though the model of this run is built in
    assert programs._file(parts, mesh, tokens) is None


def test_files_of_users_are_counted(asked, tmp_path):
    model, before = tmp_path / "mine.py", count_users_files()
    model.write_text((Path(programs.jaxgpt.__file__).parent / "models" / "gpt2.py").read_text() + f"# {tmp_path}")
    asked(model=str(model))
    assert count_users_files() == before + 1


def test_those_unused_for_longest_go(folder, asked, monkeypatch):
    """And no file of anyone else's."""
    monkeypatch.setattr(programs, "KEPT", 2)
    names = [f"step-{letter * 32}" for letter in "abc"]
    (folder / "step-000100").write_text("another's")
    question = asked()
    parts, mesh, _, tokens = question
    step = prepare(question)
    used = programs._file(parts, mesh, tokens)
    programs._write(folder / names[0], step.run, {})
    for path in (used, folder / names[0]):
        os.utime(path, (1, 1) if path == used else (2, 2))
    assert prepare(question).trace_s == 0  # used now
    programs._write(folder / names[1], step.run, {})
    assert sorted(path.name for path in folder.iterdir()) == sorted([used.name, names[1], "step-000100"])


@pytest.mark.skipif(not hasattr(os, "chown") or os.getuid() != 0, reason="only root can give files away")
def test_what_another_user_wrote_is_not_read(folder, asked):
    prepare(asked())
    (file,) = folder.iterdir()
    os.chown(file, 65534, 65534)
    assert prepare(asked()).trace_s > 0


def test_a_step_that_needs_too_much_is_refused_when_it_is_read_too(folder, asked, monkeypatch):
    prepare(asked())
    monkeypatch.setattr("jaxgpt.tools.memory.limit_of", lambda device: 1000)
    with pytest.raises(UserError, match="out of memory"):
        prepare(asked())


def test_nothing_is_kept_where_it_cannot_be(folder, asked, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setattr(programs, "_folder", lambda: folder / "file")
    assert prepare(asked()).trace_s > 0


def test_where_steps_are_kept(monkeypatch, tmp_path):
    main = types.SimpleNamespace(__spec__=None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(programs.jax, "config", types.SimpleNamespace(
        jax_compilation_cache_dir=str(tmp_path), jax_enable_compilation_cache=True
    ))  # fmt: skip
    assert programs._folder() is None  # in a program of someone's own
    main.__spec__ = types.SimpleNamespace(name="jaxgpt.train")
    assert programs._folder() == tmp_path
    for name, value in (
        ("process_count", lambda: 2), ("default_backend", lambda: "cpu"),
        ("config.jax_compilation_cache_dir", "gs://bucket/cache"), ("config.jax_compilation_cache_dir", None),
        ("config.jax_enable_compilation_cache", False),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(f"jax.{name}", value)
            assert programs._folder() is None, name
    monkeypatch.undo()


def test_a_run_that_goes_on_reads_its_step_too(folder, asked):
    """What is begun beside it is nothing then."""
    question = asked()
    assert programs.prepare_step(*question).trace_s > 0 == programs.prepare_step(*question).trace_s
