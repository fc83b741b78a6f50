"""A run that goes on with one key changed: the new value counts from the next step and is said, or it is refused."""

import dataclasses
import json
import re
import shutil
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import UserError, train
from jaxgpt.config import all_keys, default_config, load_preset, read_config, resolve, resumed_config
from jaxgpt.keys import keys, take
from jaxgpt.models import Role
from jaxgpt.optim import OptimizerConfig, make_optimizer
from jaxgpt.scoring import evaluation
from jaxgpt.sharding import make_mesh
from jaxgpt.tools import programs

CPU = f"{Path(__file__).parents[1] / 'configs' / 'shakespeare_char.py'}:cpu"
SMALL = dict(block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.2, batch_size=1, gradient_accumulation_steps=8)
SMALL |= dict(eval_iters=2, eval_interval=4, log_interval=1, learning_rate=1e-2, min_lr=1e-3, warmup_iters=2)
SMALL |= dict(lr_decay_iters=8, dtype="float32", sample_prompt="a")
MUON = dict(optimizer="muon", lr_schedule="linear", cooldown=0.5, lr_decay_iters=10, momentum_warmup_iters=8)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """What is compiled for one start serves the next of the same program."""
    compiled = {}

    def once(make, key_of):
        def step(*arguments):
            def lower(*inputs):
                shapes = [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(inputs)]
                key = (make, *key_of(*arguments), str(shapes))
                if key not in compiled:
                    compiled[key] = make(*arguments).lower(*inputs).compile()
                return types.SimpleNamespace(compile=lambda: compiled[key])

            return types.SimpleNamespace(lower=lower)

        return step

    def of_training(parts, mesh):
        optimizer = dataclasses.replace(parts.optimizer, max_iters=1)
        return parts.model, optimizer, parts.data.seed, parts.devices.matmul_dtype, mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "make_train_step", once(programs.make_train_step, of_training))
        patch.setattr(evaluation, "make_eval_step", once(evaluation.make_eval_step, lambda *arguments: arguments))
        yield


class Run:
    """A run's folder after a start, and what was printed."""

    def __init__(self, folder: Path, capsys=None, **values):
        self.folder = folder
        arguments = [f"--config.{key}={value}" for key, value in {**values, "out_dir": folder}.items()]
        assert train.main(["--config", CPU, *arguments]) == 0
        self.printed = capsys.readouterr().out if capsys else ""
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.steps = {row["step"]: row for row in rows if "loss" in row}
        self.evaluations = {row["step"]: row for row in rows if "val_loss" in row}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, token_folder):
    """The folder of a run that has done four steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    return Run(folder, **SMALL, data_dir=token_folder, max_iters=4).folder


@pytest.fixture(scope="module")
def unchanged(stopped, tmp_path_factory):
    """The same after two steps more."""
    folder = shutil.copytree(stopped, tmp_path_factory.mktemp("unchanged") / "run")
    return Run(folder, max_iters=6, init_from="resume")


# --- what a change does: each is given the run, the same without the change ---


def other_rate(run, plain):
    assert run.steps[5]["lr"] != plain.steps[5]["lr"] and run.steps[5]["loss"] == plain.steps[5]["loss"]
    assert run.steps[6]["loss"] != plain.steps[6]["loss"]  # by the update of step 5


def other_windows(run, plain):
    """The next step has more; the tokens of earlier ones are counted as they were read."""
    assert run.steps[5]["loss"] != plain.steps[5]["loss"]
    assert [run.steps[step]["tokens"] for step in (4, 5, 6)] == [4 * 128, 6 * 128, 8 * 128]


def close(run, plain):
    """Another precision, or another dropout mask on each device. In float16 no step is lost to its loss scale."""
    for step in (5, 6):
        assert run.steps[step]["loss"] == pytest.approx(plain.steps[step]["loss"], rel=0.02)
    assert run.steps[5]["loss"] != plain.steps[5]["loss"]
    assert run.steps[5]["grad_norm"] == pytest.approx(plain.steps[5]["grad_norm"], rel=0.5)


def same(run, plain):
    for step in (5, 6):
        assert run.steps[step]["loss"] == pytest.approx(plain.steps[step]["loss"], rel=1e-5)


def other_evaluations(run, plain):
    same(run, plain)
    assert run.evaluations[6]["val_loss"] != plain.evaluations[6]["val_loss"]


def longer(run, plain):
    assert max(run.steps) == 7


def more_evaluations(run, plain):
    same(run, plain)
    assert list(run.evaluations) == [0, 4, 5, 6]


def fewer_lines(run, plain):
    assert list(run.steps) == [1, 2, 3, 4, 6]


def fewer_checkpoints(run, plain):
    names = [{path.name for path in (each.folder / "checkpoints").iterdir()} for each in (run, plain)]
    assert names[0] < names[1] and "6" in names[0]


def tensorboard(run, plain):
    assert len(list(run.folder.glob("*tfevents*"))) == 1


def wandb(run, plain):
    logged = sys.modules["wandb"].init.return_value.log.call_args_list
    assert {call.kwargs["step"] for call in logged} == {5, 6}


def nothing(run, plain):
    same(run, plain)
    assert re.search(r"^momentum has no effect with optimizer=adamw$", run.printed, re.M)


# A text: the message of the refusal. A function: what a whole run shows. UPDATE: the next update is another.
# TAKEN: the value comes to where it is used; that it acts there, the module's own tests show.
UPDATE, TAKEN = object(), object()
CHANGES = {
    "n_layer": (2, "n_layer=2, but the run in"),
    "n_head": (4, "n_head=4, but the run in"),
    "n_embd": (32, "n_embd=32, but the run in"),
    "dropout": (0.1, "dropout=0.1, but the run in"),
    "bias": (True, "bias=True, but the run in"),
    "block_size": (8, "block_size=8, but the run in"),
    "seed": (1, "seed=1, but the run in"),
    "data_order": ("random", "data_order=random, but the run in"),
    "model": ("modern", "has model=gpt2, not modern; name the same model"),
    "dataset": ("other", "dataset=other would not count: data_dir="),
    "data_dir": ("OTHER", "was trained on another corpus: train.bin was .* digest"),
    "doc_mask": (True, "doc_mask needs an end-of-text token"),
    "optimizer": ("muon", "holds another optimizer's state: opt_state"),
    "matmul_dtype": ("fp8", "matmul_dtype=fp8 needs NVIDIA GPUs"),
    "attention": ("cudnn", "attention=cudnn needs an NVIDIA GPU"),
    "mesh_data": (4, "do not multiply to the 8 devices"),
    "learning_rate": (5e-3, other_rate),
    "min_lr": (5e-3, UPDATE),
    "warmup_iters": (7, UPDATE),
    "lr_decay_iters": (20, UPDATE),
    "decay_lr": (False, UPDATE),
    "lr_schedule": ("constant", UPDATE),
    "weight_decay": (10.0, UPDATE),
    "beta1": (0.5, UPDATE),
    "beta2": (0.5, UPDATE),
    "grad_clip": (1e-3, UPDATE),
    "batch_size": (2, other_windows),
    "gradient_accumulation_steps": (16, other_windows),
    "dtype": ("float16", close),
    "mesh_fsdp": (2, same),
    "mesh_tensor": (2, close),
    "average_decay": (0.9, other_evaluations),
    "max_iters": (7, longer),
    "eval_iters": (3, other_evaluations),
    "eval_interval": (1, more_evaluations),
    "log_interval": (2, fewer_lines),
    "keep_checkpoints": (1, fewer_checkpoints),
    "tensorboard_log": (True, tensorboard),
    "wandb_log": (True, wandb),
    "momentum": (0.5, nothing),
    "momentum_warmup_iters": (5, TAKEN),
    "cooldown": (0.3, TAKEN),
    "data_cache": ("cache", TAKEN),
    "data_cache_gb": (5.0, TAKEN),
    "embedding_lr": (0.1, TAKEN),
    "head_lr": (0.1, TAKEN),
    "vector_lr": (0.1, TAKEN),
    "accumulation": ("multisteps", TAKEN),
    "spike_threshold": (5.0, TAKEN),
    "kernels": ("off", TAKEN),
    "remat": ("block", TAKEN),
    "steps_per_call": (2, TAKEN),
    "always_save_checkpoint": (True, TAKEN),
    "max_bad_steps": (5, TAKEN),
    "stall_timeout": (900.0, TAKEN),
    "eval_tasks": ("lambada=x", TAKEN),
    "sample_interval": (1, TAKEN),
    "sample_prompt": ("the", TAKEN),
    "wandb_project": ("p", TAKEN),
    "wandb_run_name": ("r", TAKEN),
}
OF_MUON = {
    "embedding_lr": 0.1,
    "head_lr": 0.1,
    "vector_lr": 0.1,
    "momentum": 0.5,
    "momentum_warmup_iters": 1,
    "cooldown": 0.9,
}
OF_THIS_START = {"auto_batch_size", "out_dir", "init_from", "eval_only", "model_changed"}


def named(effect) -> list[str]:
    return [name for name, (_, what) in CHANGES.items() if (what is effect if effect else isinstance(what, str))]


def test_every_key_is_here():
    """A key that is added has to say what a change of it does."""
    every = {name for part in all_keys().values() for name in part}
    assert set(CHANGES) == every - OF_THIS_START


def resumed(stopped, name, value):
    """What the run was, what it is with one key changed, and what is said of that."""
    config = load_preset(CPU)
    config.out_dir, config[name] = str(stopped), value
    saved = read_config(stopped)
    now, said = resumed_config(config, {name: value}, saved)
    return saved, now, said


@pytest.mark.parametrize("name", named(UPDATE) + named(TAKEN))
def test_a_changed_value_is_taken_and_said(name, stopped):
    value = CHANGES[name][0]
    saved, now, said = resumed(stopped, name, value)
    assert f"{name} {saved[name]} → {value}" in said
    assert {key for key in now if now[key] != saved[key]} == {name}
    parts = resolve(now, make_mesh(), 27)
    held = [getattr(part, name) for part in parts if name in keys(type(part))]
    assert (held or [now[name]]) == [value]  # trackers' keys are in no part: they read the config


def next_update(config):
    """The update of step 5 to a matrix, an embedding, a head and a vector, by gradients that say what each key does."""
    optimizer = make_optimizer(
        take(OptimizerConfig, config),
        [Role(group, group, decay=group != "vector") for group in ("matrix", "embedding", "head", "vector")],
    )
    random = np.random.default_rng(0)
    params, *grads = ([jnp.asarray(random.normal(size=(4, 4)), jnp.float32) for _ in range(4)] for _ in range(3))
    _, state = optimizer.update(grads[0], optimizer.init(params), params, step=jnp.int32(3))
    updates, _ = optimizer.update(grads[1], state, params, step=jnp.int32(4))
    return np.asarray(updates)


@pytest.mark.parametrize("name", named(UPDATE))
def test_the_next_update_is_by_the_new_value(name, stopped):
    saved, now, _ = resumed(stopped, name, CHANGES[name][0])
    assert (next_update(now) != next_update(saved)).any()


def test_the_next_update_of_muon_is_by_the_new_value():
    config = default_config()
    config.update({**SMALL, **MUON})
    before = next_update(config)
    for name, value in OF_MUON.items():
        other = config.copy_and_resolve_references()
        other[name] = value
        assert (next_update(other) != before).any(), name


@pytest.mark.parametrize("name", named(None))
def test_what_would_be_another_run_is_refused(name, stopped, token_folder, tmp_path):
    """In one line, with nothing changed on disk."""
    value, message = CHANGES[name]
    if name == "data_dir":
        value = shutil.copytree(token_folder, tmp_path / "other")
        np.fromfile(value / "train.bin", "<u2")[::-1].tofile(value / "train.bin")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        Run(stopped, **{"max_iters": 6, "init_from": "resume", name: value})
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", [name for name, (_, what) in CHANGES.items() if callable(what)])
def test_a_run_goes_on_with_one_key_changed(name, stopped, unchanged, tmp_path, capsys, monkeypatch):
    value, effect = CHANGES[name]
    if name == "wandb_log":
        library = types.ModuleType("wandb")
        library.init = library.login = mock.Mock()
        library.Error = RuntimeError
        monkeypatch.setitem(sys.modules, "wandb", library)
    folder = shutil.copytree(stopped, tmp_path / "run")
    old = read_config(folder)[name]
    run = Run(folder, capsys, **{"max_iters": 6, "init_from": "resume", name: value})
    assert f"\n{name} {old} → {value}\n" in run.printed
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (detail,) = [event["detail"] for event in events if event["event"] == "resumed"]
    assert f"{name} {old} → {value}" in detail and read_config(folder)[name] == value
    assert all(run.steps[step] == unchanged.steps[step] for step in range(1, 5))
    effect(run, unchanged)
