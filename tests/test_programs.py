"""Compiled steps that are kept: what is read is what was compiled, and another program is another file."""

import sys
import types

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt.config import resolve
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
    # a CPU's program that was read from JAX's cache cannot be kept: it would lack functions
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_enable_compilation_cache", True)
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
    for damaged in (b"", content[:40] + b"\0" + content[41:]):  # it is compiled again, and kept
        file.write_bytes(damaged)
        assert prepare(question).trace_s > 0 == prepare(question).trace_s
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_another_program_is_another_file(folder, asked, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("sys.argv", ["train"])
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
    with monkeypatch.context() as patch:  # a preset may register an optimizer
        preset = tmp_path_factory.mktemp("presets") / "mine.py"
        patch.setattr("sys.argv", ["train", f"--config={preset}:tiny"])
        assert not is_new(asked())
        for text in ("a = 1", "a = 2"):
            preset.write_text(text)
            assert is_new(asked())
    with monkeypatch.context() as patch:  # a fork's change
        package = tmp_path_factory.mktemp("package")
        (package / "step.py").write_text("other")
        patch.setattr(programs.jaxgpt, "__file__", str(package / "__init__.py"))
        assert is_new(asked())
    assert not is_new(asked())


def test_a_users_model_is_always_traced(folder, asked, tmp_path):
    model = tmp_path / "mine.py"
    model.write_text((programs.Path(programs.jaxgpt.__file__).parent / "models" / "gpt2.py").read_text())
    parts, mesh, _, tokens = asked(model=str(model))
    assert programs._file(parts, mesh, tokens) is None


def test_those_unused_for_longest_go(folder, asked, monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 2)
    step = prepare(asked())
    (first,) = folder.iterdir()
    for name in ("step-b", "step-c"):
        programs._write(folder / name, step.run, {})
    assert sorted(path.name for path in folder.iterdir()) == ["step-b", "step-c"]


def test_nothing_is_kept_where_it_cannot_be(folder, asked, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setattr(programs, "_folder", lambda: folder / "file")
    assert prepare(asked()).trace_s > 0


def test_where_steps_are_kept(monkeypatch):
    monkeypatch.setattr("sys.modules", {**sys.modules, "__main__": types.SimpleNamespace(__spec__=None)})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert programs._folder() is None  # in a program of someone's own
    sys.modules["__main__"].__spec__ = types.SimpleNamespace(name="jaxgpt.train")
    folder = programs._folder()
    assert str(folder) == jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert programs._folder() is None
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert programs._folder() is None


def test_a_run_that_goes_on_reads_its_step_too(folder, asked):
    """What is begun beside it is nothing then."""
    question = asked()
    assert programs.prepare_step(*question).trace_s > 0 == programs.prepare_step(*question).trace_s
