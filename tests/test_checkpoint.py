"""Checkpoints: what comes back is bit for bit what was saved, or an older checkpoint, or an error; nothing else."""

import errno
import gc
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import xla_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import UserError
from jaxgpt.run import checkpoint
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.digests import digests
from jaxgpt.run.guard import RunLock

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "uint16", "int8", "bool"]


def mesh_of(*sizes):
    axes, devices = ("data", "fsdp", "tensor")[: len(sizes)], jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, axes, (AxisType.Auto,) * len(sizes), devices=devices)


def random_bits(rng, shape, dtype):
    """Any bit pattern: NaNs with payloads, infinities, denormals, negative zeros."""
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    dtype = jnp.dtype(dtype)
    return np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def sample_state(seed, mesh=None):
    """Nested, with int keys, tuples, scalars, a random key and every dtype; sharded over `mesh` if given."""
    rng = np.random.default_rng(seed)
    state = {
        "params": {"h": {i: {"kernel": random_bits(rng, (8, 16), d)} for i, d in enumerate(DTYPES)}},
        "opt_state": ({"mu": random_bits(rng, (16, 8), "float32")}, (), [random_bits(rng, (8,), "float32")]),
        "key": np.array([seed, 2**32 - 1], np.uint32),
        "step": np.int32(seed),
    }
    if mesh is None:
        return jax.tree.map(jnp.asarray, state)
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x, mesh))), state)


def spec(x, mesh):
    return P(*mesh.axis_names[: min(np.ndim(x), 2)]) if np.ndim(x) == 2 else P()


def abstract(state, mesh=None):
    def leaf(x):
        sharding = NamedSharding(mesh, spec(x, mesh)) if mesh is not None else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_all(folder, states, *, keep=9, infos=None):
    ckpts = Checkpoints(folder, keep=keep)
    for step, state in states.items():
        ckpts.save(step, state, (infos or {}).get(step, {}))
    assert ckpts.wait()
    return ckpts


def snapshot(folder):
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in Path(folder).rglob("*")}


# --- digests ---


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from([(), (1,), (8,), (8, 16), (16, 4, 8)]), st.randoms())
def test_digest_sees_every_bit_and_position_but_no_mesh(dtype, shape, rnd):
    x = random_bits(np.random.default_rng(rnd.getrandbits(32)), shape, dtype)
    digest = checkpoint.host_digest(x)
    placed = [jnp.asarray(x)]
    if len(shape) > 1:
        placed += [jax.device_put(x, NamedSharding(mesh_of(4, 2), p)) for p in (P("data"), P("fsdp", "data"), P())]
    for array in placed:
        assert digests({"x": array}) == {"x": digest}

    raw = bytearray(x.tobytes())
    at = rnd.randrange(len(raw))
    raw[at] ^= 1 if dtype == "bool" else 1 << rnd.randrange(8)
    assert checkpoint.host_digest(np.frombuffer(bytes(raw), x.dtype).reshape(shape)) != digest

    flat = x.reshape(-1).copy()
    i, j = rnd.randrange(x.size), rnd.randrange(x.size)
    flat[i], flat[j] = flat[j].copy(), flat[i].copy()
    assert (checkpoint.host_digest(flat.reshape(shape)) == digest) == (flat.tobytes() == x.tobytes())


def test_digest_of_blocks_joins_up():
    """The host goes block by block, the device all at once."""
    x = np.random.default_rng(0).standard_normal(2**18 + 77, np.float32)
    assert digests({"x": jnp.asarray(x)}) == {"x": checkpoint.host_digest(x)}
    eight_bytes = x[: 2**10].astype(np.float64)
    assert checkpoint.host_digest(eight_bytes) == checkpoint.host_digest(eight_bytes.view(np.uint32))


def test_digests_of_many_sharded_arrays_do_not_wait_for_each_other():
    """With all of them under way at once, eight CPU devices on two cores stop forever."""
    x = jax.device_put(np.ones((64, 4096), np.float32), NamedSharding(mesh_of(8), P("data")))
    assert len(set(digests({str(i): x for i in range(50)}).values())) == 1


# --- there and back ---


@pytest.mark.parametrize("source, target", [((8, 1), (2, 2, 2)), (None, (4, 2)), ((1, 8), None)])
def test_restores_every_bit_on_any_mesh(tmp_path, source, target):
    state = sample_state(3, source and mesh_of(*source))
    info = {"val_loss": 1.25, "best_val_loss": float("inf"), "note": "é", "np": np.float32(0.5)}
    save_all(tmp_path, {7: state}, infos={7: info})
    wanted = abstract(state, target and mesh_of(*target))
    restored, got, step = Checkpoints(tmp_path).restore(wanted)
    assert_same_bits(restored, state)
    assert (got, step) == ({**info, "np": 0.5}, 7)
    if target:
        for x, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            assert x.sharding == want.sharding


def test_saved_state_may_be_donated_and_restored_state_too(tmp_path):
    """The step donates the state right after `save` returns; the copy being written must not see what comes after."""
    mesh = mesh_of(4, 2)
    ckpts = Checkpoints(tmp_path, keep=9)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"w": jax.device_put(np.zeros((512, 256), np.float32), NamedSharding(mesh, P("data", "fsdp")))}
    for step in range(4):
        ckpts.save(step, state, {})
        state = advance(advance(state))
    assert ckpts.wait()
    for step in range(4):
        restored, _, _ = ckpts.restore(abstract(state, mesh), step)
        assert np.all(np.asarray(restored["w"]) == 2 * step)
        advance(restored)


@pytest.mark.parametrize("name", ["../run", "link/../run", "/{}/run"])
def test_a_path_that_tensorstore_does_not_take_is_another_name_of_one_that_it_does(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "deep").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to("deep")
    monkeypatch.chdir(tmp_path / "here")
    state = {"step": jnp.int32(1)}
    save_all(name.format(tmp_path), {1: state})
    place = tmp_path / "here" / "run" if "link" in name else tmp_path / "run"
    assert place.is_dir()
    assert_same_bits(Checkpoints(name.format(tmp_path)).restore(abstract(state))[0], state)


def test_opens_params_alone_without_reading_the_rest(tmp_path):
    state = sample_state(1)
    save_all(tmp_path, {5: state})
    asked = []
    open_arrays = checkpoint._open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_open", lambda path, names: asked.extend(names) or open_arrays(path, names))
        before = snapshot(tmp_path)
        restored, _, _ = Checkpoints(tmp_path).restore({"params": abstract(state)["params"]})
    assert asked and all(name.startswith("params.") for name in asked)
    assert_same_bits(restored, {"params": state["params"]})
    assert snapshot(tmp_path) == before, "restoring writes nothing"


def test_what_asyncio_adds_to_a_failed_save_is_not_printed(caplog):
    """Its log of the save's other writes; all else that it logs is."""
    for line in "Task exception was never retrieved\nfuture: <Task …>", "something else":
        logging.getLogger("asyncio").error(line)
    assert caplog.messages == ["something else"]


def test_a_step_without_a_checkpoint_is_told_those_that_have_one(tmp_path):
    state, ckpts = sample_state(0), Checkpoints(tmp_path)
    for step in (3, 5):
        ckpts.save(step, state, {})
    assert ckpts.wait()
    with pytest.raises(UserError, match="no checkpoint 17 in .*; those there are 3, 5"):
        ckpts.restore(abstract(state), 17)


def test_opening_nothing_writes_nothing(tmp_path):
    ckpts = Checkpoints(tmp_path / "absent")
    assert ckpts.steps() == []
    with pytest.raises(UserError, match="no checkpoint in .*absent"):
        ckpts.restore(abstract(sample_state(0)))
    assert list(tmp_path.iterdir()) == []


# --- which are kept ---


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([None, math.nan, 1.0, 2.0, 3.0, math.inf]), min_size=1, max_size=6), st.integers(1, 3))
def test_keeps_the_newest_and_the_best(tmp_path_factory, losses, keep):
    folder = tmp_path_factory.mktemp("run")
    finite = [(loss, step) for step, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    best = min(finite)[1] if finite else None
    for step, loss in enumerate(losses):  # each in a process of its own, so to speak
        save_all(folder, {step: {"x": jnp.full(3, step)}}, keep=keep, infos={step: {"val_loss": loss}})
    expected = set(range(len(losses))[-keep:]) | ({best} if best is not None else set())
    ckpts = Checkpoints(folder)
    assert set(ckpts.steps()) == expected
    assert sorted(p.name for p in ckpts.folder.iterdir()) == sorted(map(str, expected))
    if best is not None:
        restored, info, step = ckpts.restore({"x": jax.ShapeDtypeStruct((3,), jnp.int32)}, "best")
        assert step == best and int(restored["x"][0]) == best and info["val_loss"] == losses[best]


def test_a_record_that_cannot_be_read_for_a_while_costs_no_checkpoint(tmp_path, monkeypatch):
    """It may be sound, and the best; so may the one just saved, whose record is read as well."""
    state, read = {"step": jnp.int32(1)}, checkpoint.Disk.record
    ckpts = save_all(tmp_path, {1: state}, keep=1, infos={1: {"val_loss": 1.0}})

    def fails(place, step):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(checkpoint.Disk, "record", fails)
    for step in 2, 3:
        ckpts.save(step, state, {"val_loss": 2.0})
        assert ckpts.wait() and ckpts.steps() == list(range(1, step + 1))
    monkeypatch.setattr(checkpoint.Disk, "record", read)
    ckpts.save(4, state, {"val_loss": 2.0})
    assert ckpts.wait() and ckpts.steps() == [1, 4]


def test_a_step_is_saved_once_and_gets_its_validation_loss_later(tmp_path):
    ckpts = save_all(tmp_path, {4: {"x": jnp.zeros(3)}})
    arrays = snapshot(ckpts.folder / "4" / "state")
    for info, kept in (({"a": 1}, {}), ({"val_loss": 2.0}, {"val_loss": 2.0}), ({"val_loss": 1.0}, {"val_loss": 2.0})):
        ckpts.save(4, {"x": jnp.zeros(3)}, info)
        assert ckpts.wait() and snapshot(ckpts.folder / "4" / "state") == arrays
        assert ckpts.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})[1:] == (kept, 4)


# --- damage ---


def damages(size, rng):
    """(name, how to change a file's bytes): None deletes."""
    yield "deleted", lambda data: None
    yield "emptied", lambda data: b""
    for at in sorted({1, size // 2, size - 1} & set(range(size))):
        yield f"truncated to {at} bytes", lambda data, at=at: data[:at]
    for at, bit in [(rng.randrange(size), rng.randrange(8)) for _ in range(10 if size else 0)]:
        yield (
            f"bit {bit} of byte {at} flipped",
            lambda data, at=at, bit=bit: data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :],
        )


def test_damage_to_any_file_never_goes_unseen(tmp_path, caplog):
    states = {1: sample_state(1), 2: sample_state(2)}
    ckpts = save_all(tmp_path, states)
    wanted, rng, reasons = abstract(states[1]), random.Random(0), []
    for file in sorted(p for p in (ckpts.folder / "2").rglob("*") if p.is_file()):
        sound = file.read_bytes()
        for name, damage in damages(len(sound), rng):
            data = damage(sound)
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            caplog.clear()
            restored, _, step = Checkpoints(tmp_path).restore(wanted)
            assert step == 1, f"{file} {name}"
            assert_same_bits(restored, states[1])
            (line,) = caplog.messages
            assert line.startswith("checkpoint 2 passed over: ") and line.endswith("; using checkpoint 1"), line
            reasons.append(line)
            file.write_bytes(sound)
    assert len(reasons) > 100
    assert_same_bits(Checkpoints(tmp_path).restore(wanted)[0], states[2])


def test_damage_to_array_bytes_is_seen_by_the_digests_alone(tmp_path, caplog):
    """In files too large to be hashed whole the arrays' digests stand guard, and TensorStore's own checks."""
    states = {step: {"w": jnp.full((256, 256), step, jnp.float32), "b": jnp.full(5, step)} for step in (1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SMALL_FILE", -1)
        ckpts = save_all(tmp_path, states)
        rng, reasons = random.Random(0), []
        for file in sorted(p for p in (ckpts.folder / "2" / "state").rglob("*") if p.is_file()):
            sound = file.read_bytes()
            for _, damage in damages(len(sound), rng):
                data = damage(sound)
                file.unlink()
                if data is not None:
                    file.write_bytes(data)
                caplog.clear()
                restored, _, step = Checkpoints(tmp_path).restore(abstract(states[1]))
                assert_same_bits(restored, states[step])  # step 2 where the byte serves no array
                reasons += caplog.messages
                file.write_bytes(sound)
    for reason in ("array w does not match its digest", "altered", "missing", "driver"):
        assert any(reason in line for line in reasons), reason


def test_arrays_of_another_step_or_place_are_not_taken(tmp_path):
    """Files that are each whole, in the wrong place."""
    states = {1: sample_state(1), 2: sample_state(2)}
    folder = save_all(tmp_path, states).folder
    record = (folder / "2" / "record.json").read_text()
    shutil.rmtree(folder / "2")
    shutil.copytree(folder / "1", folder / "2")  # a copy under another step's name
    assert Checkpoints(tmp_path).restore(abstract(states[1]))[2] == 1
    (folder / "2" / "record.json").write_text(record)  # another step's record over these arrays
    assert Checkpoints(tmp_path).restore(abstract(states[1]))[2] == 1


def test_a_best_checkpoint_whose_record_is_damaged_is_named(tmp_path, caplog):
    """Its loss is in the record: without it, another is taken for the best."""
    ckpts, states = Checkpoints(tmp_path), [sample_state(n) for n in range(3)]
    for step in 1, 2:
        assert ckpts.save(step, states[step], {"val_loss": 3.0 - step}, last=True) is None and ckpts.wait()
    (tmp_path / "checkpoints" / "2" / "record.json").write_text("{")
    assert Checkpoints(tmp_path).restore(abstract(states[1]), "best")[2] == 1
    assert [line for line in caplog.messages if line.startswith("checkpoint 2 passed over")] == caplog.messages != []


def test_nothing_sound_is_an_error_that_names_each(tmp_path):
    states = {1: sample_state(1), 2: sample_state(2)}
    folder = save_all(tmp_path, states).folder
    (folder / "1" / "record.json").write_text("{}")
    shutil.rmtree(folder / "2")
    (folder / "2").mkdir()
    ckpts = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="no sound checkpoint in .*: checkpoint 2 passed .*; checkpoint 1 passed over"):
        ckpts.restore(abstract(states[1]))
    assert ckpts.steps() == [1, 2], "there is something to resume: a run must not start from scratch over it"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s["params"]["h"][0].update(kernel=jnp.zeros((8, 8))), r"is float32\[8, 16\] there, float32\[8, 8\]"),
        (lambda s: s["params"]["h"].pop(7), r"params.h.7.kernel is bool\[8, 16\] there, absent here"),
        (lambda s: s["params"]["h"].update({8: jnp.zeros(2)}), r"params.h.8 is absent there, float32\[2\] here"),
        (lambda s: s.update(step=jnp.float32(0)), r"step is int32\[\] there, float32\[\] here"),
    ],
)
def test_another_model_is_an_error_that_names_the_difference(tmp_path, change, message):
    save_all(tmp_path, {3: sample_state(0)})
    wanted = sample_state(0)
    change(wanted)
    with pytest.raises(UserError, match=f"holds another model: .*{message}"):
        Checkpoints(tmp_path).restore(abstract(wanted))


def test_a_run_past_a_damaged_checkpoint_replaces_it(tmp_path):
    """Resuming before the damage, the run saves the damaged step anew and does not count damaged ones as kept."""
    states = {step: sample_state(step) for step in (1, 2, 3, 4)}
    folder = save_all(tmp_path, states).folder
    for step in (2, 3, 4):
        (folder / f"{step}" / "state" / "manifest.ocdbt").write_bytes(b"")
    ckpts = Checkpoints(tmp_path, keep=2)
    assert ckpts.restore(abstract(states[1]))[2] == 1
    ckpts.save(3, states[3], {})
    assert ckpts.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "3"]
    assert Checkpoints(tmp_path).restore(abstract(states[1]))[2] == 3


# --- saves that fail ---


@pytest.fixture
def tiny_files():
    """No file may grow beyond 4 KiB: what a full disk looks like from a write."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(on):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]) if on else old)

    yield limit
    limit(False)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_one_save_and_no_older_one(tmp_path, tiny_files, caplog):
    states = {step: {"w": jnp.full((64, 64), step, jnp.float32)} for step in (1, 2, 3)}
    ckpts = save_all(tmp_path, {1: states[1]}, keep=1)
    tiny_files(True)
    ckpts.save(2, states[2], {})
    ok = ckpts.wait()
    tiny_files(False)
    assert not ok and [p.name for p in ckpts.folder.iterdir()] == ["1"], "no debris takes up the full disk"
    assert "CHECKPOINT 2 NOT SAVED" in caplog.text and "the newest on disk is 1" in caplog.text
    assert Checkpoints(tmp_path).restore(abstract(states[1]))[2] == 1
    ckpts.save(3, states[3], {})
    assert ckpts.wait() and ckpts.steps() == [3]


def test_a_folder_that_cannot_be_written_costs_one_save(tmp_path, caplog):
    ckpts = Checkpoints(tmp_path / "run")
    (tmp_path / "run").write_text("a file is in the way")
    ckpts.save(1, {"w": jnp.zeros(3)}, {})
    assert not ckpts.wait() and "CHECKPOINT 1 NOT SAVED" in caplog.text and "there is none on disk yet" in caplog.text
    assert ckpts.steps() == []
    (tmp_path / "run").unlink()
    ckpts.save(2, {"w": jnp.zeros(3)}, {})
    assert ckpts.wait() and ckpts.steps() == [2]


@pytest.mark.parametrize("when", ["before a save", "amid a save"])
def test_a_folder_that_goes_away_costs_the_saves_till_it_is_back(tmp_path, caplog, when):
    """As when its disk is unmounted: the bare path beneath must not get what then hides, or is hidden by, the rest."""
    run, away = tmp_path / "run", tmp_path / "away"
    state, copy = {"w": jnp.ones((64, 64))}, shutil.disk_usage
    with RunLock(run) as lock:
        ckpts = Checkpoints(run)
        ckpts.begin(lock, "")
        ckpts.save(1, state, {})
        assert ckpts.wait()

        def go_away(*_):
            run.rename(away)
            run.mkdir()
            return copy(tmp_path)

        with pytest.MonkeyPatch.context() as patch:
            if when == "amid a save":
                patch.setattr(checkpoint.shutil, "disk_usage", go_away)
            else:
                go_away()
            ckpts.save(2, state, {})
            assert not ckpts.wait()
        ckpts.save(3, state, {})
        assert not ckpts.wait() and not list(run.rglob("record.json"))
        assert "CHECKPOINT 2 NOT SAVED" in caplog.text and "the newest on disk is 1" in caplog.text
        assert "CHECKPOINT 3 NOT SAVED" in caplog.text and "was its disk unmounted" in caplog.text
        assert "was its disk unmounted" in ckpts.failure
        shutil.rmtree(run)
        away.rename(run)
        ckpts.save(4, state, {})
        assert ckpts.wait() and ckpts.steps() == [1, 4]
    assert_same_bits(Checkpoints(run).restore(abstract(state), 1)[0], state)


def test_a_save_that_reads_back_differently_is_a_failed_save(tmp_path, caplog):
    ckpts = save_all(tmp_path, {1: {"w": jnp.zeros(3)}}, keep=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "host_digest", lambda x: "0" * 16)
        ckpts.save(2, {"w": jnp.ones(3)}, {})
        assert not ckpts.wait()
    assert "array w reads back differently" in caplog.text and ckpts.steps() == [1]


def test_a_save_that_ends_in_an_error_that_nobody_foresaw_is_a_failed_save(tmp_path, caplog):
    def out_of_memory(x):
        raise MemoryError

    ckpts = save_all(tmp_path, {1: {"w": jnp.zeros(3)}}, keep=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "host_digest", out_of_memory)
        ckpts.save(2, {"w": jnp.ones(3)}, {})
        assert not ckpts.wait()
    assert "CHECKPOINT 2 NOT SAVED" in caplog.text and "MemoryError" in caplog.text and ckpts.steps() == [1]


def test_a_save_that_failed_at_its_start_has_cleaned_up_when_it_was_waited_for(tmp_path, caplog):
    """Or it would remove what the next save of the same step writes."""
    ckpts, remove = Checkpoints(tmp_path), shutil.rmtree

    def slow(path, **how):
        time.sleep(0.3)
        remove(path, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", slow)
        patch.setattr(ckpts._place._orbax, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("no")))
        ckpts.save(1, {"w": jnp.zeros(3)}, {})
        assert not ckpts.wait()
    assert list(ckpts.folder.glob("*.tmp")) == []
    ckpts.save(1, {"w": jnp.zeros(3)}, {})
    assert ckpts.wait()


def test_saves_leave_nothing_in_memory(tmp_path):
    """Blocks that Python still holds after a save: some 380 with what TensorStore leaks, under 100 without."""
    ckpts, state, counts = Checkpoints(tmp_path, keep=1), {str(i): jnp.ones(4) for i in range(20)}, []
    for step in range(18):
        ckpts.save(step, state, {})
        assert ckpts.wait()
        gc.collect()
        counts.append(sys.getallocatedblocks())
    assert np.median(np.diff(counts[6:])) < 200


def test_a_folder_that_another_run_took_is_left_to_it(tmp_path, caplog):
    """`mv out old` and a new run in `out`: the first, which goes on, writes and removes nothing there."""
    run, old = tmp_path / "run", tmp_path / "old"
    with RunLock(run) as lock:
        first = Checkpoints(run, keep=1)
        first.begin(lock, "")
        first.save(1, {"w": jnp.zeros(3)}, {})
        assert first.wait()
        run.rename(old)
        with RunLock(run) as other:
            second = Checkpoints(run, keep=1)
            second.begin(other, "")
            second.save(1, {"w": jnp.ones(3)}, {})
            assert second.wait()
            (second.folder / "2.tmp").mkdir()  # its save under way
            first.save(2, {"w": jnp.zeros(3)}, {})
            assert not first.wait() and "another run began in its place" in first.failure
            assert sorted(p.name for p in second.folder.iterdir()) == ["1", "2.tmp"]
    assert [p.name for p in (old / "checkpoints").iterdir()] == ["1"]


def test_a_disk_without_inodes_costs_one_save_and_no_minute(tmp_path, caplog, monkeypatch):
    ckpts = save_all(tmp_path, {1: {"w": jnp.zeros(3)}})
    statvfs = os.statvfs

    def few(path):
        there = statvfs(path)
        found = {name: getattr(there, name) for name in dir(there) if name.startswith("f_")}
        return types.SimpleNamespace(**found | {"f_files": 100, "f_favail": checkpoint.SPARE_FILES - 1})

    monkeypatch.setattr(os, "statvfs", few)
    ckpts.save(2, {"w": jnp.zeros(3)}, {})
    assert not ckpts.wait() and "63 more files may be made (inodes), 64 needed" in ckpts.failure
    assert [p.name for p in ckpts.folder.iterdir()] == ["1"]


def test_a_save_takes_fewer_files_than_are_asked_for(tmp_path):
    folder = save_all(tmp_path, {1: {str(i): jnp.zeros(3) for i in range(50)}}).folder
    assert len(list(folder.rglob("*"))) < checkpoint.SPARE_FILES / 2


def test_a_save_whose_folder_cannot_be_made_leaves_no_thread_waiting(tmp_path, capfd):
    """Orbax's own mkdir fails, after ours: no thread may then wait for the folder, and no traceback be printed."""
    code = f"""
import threading, jax.numpy as jnp, orbax.checkpoint as ocp
from jaxgpt.run import checkpoint
from jaxgpt.run.guard import RunLock
make_room = checkpoint._make_room
def full(working, need):
    make_room(working, need)
    (working / "state").write_text("")
    working.chmod(0o500)
checkpoint._make_room = full
ckpts = checkpoint.Checkpoints({str(tmp_path)!r})
ckpts.save(1, {{"w": jnp.zeros(3)}}, {{}})
assert not ckpts.wait()
ckpts.close()
"""
    begun = time.monotonic()
    process = spawn(code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "CHECKPOINT 1 NOT SAVED" in err and "Traceback" not in err and time.monotonic() - begun < 50


# --- whose they are, and of which form ---


def rewrite(folder, **change):
    """Another record, its seal renewed."""
    record = json.loads((folder / "record.json").read_text())
    for key, value in change.items():
        record.pop(key) if value is None else record.update({key: value})
    checkpoint._write_record(folder, record)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Of the same shapes: moved there by hand. A copy of the whole folder is the same run."""
    state = {"w": jnp.zeros(3)}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"run_id": name}))
        with RunLock(tmp_path / name) as lock:
            ckpts = Checkpoints(tmp_path / name)
            ckpts.begin(lock, name)
            ckpts.save(1 + (name == "b"), state, {})
            assert ckpts.wait()
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert Checkpoints(tmp_path / "copy").restore(abstract(state))[2] == 1
    shutil.move(tmp_path / "b" / "checkpoints" / "2", tmp_path / "a" / "checkpoints" / "2")
    with pytest.raises(UserError, match=r"checkpoints/2 is another run's \(b, not a\); move it back"):
        Checkpoints(tmp_path / "a").restore(abstract(state))
    assert Checkpoints(tmp_path / "a").restore(abstract(state), 1)[2] == 1


def test_an_older_format_gives_its_parameters_alone_and_a_newer_one_nothing(tmp_path):
    state = {"params": {"w": jnp.zeros(3)}, "opt_state": jnp.zeros(3)}
    folder = save_all(tmp_path, {1: state}).folder / "1"
    rewrite(folder, format=None)
    with pytest.raises(UserError, match=r"older jaxgpt \(format 1\) .* from its parameters: .*init_from="):
        Checkpoints(tmp_path).restore(abstract(state))
    assert Checkpoints(tmp_path).restore({"params": abstract(state)["params"]})[2] == 1
    rewrite(folder, format=checkpoint.FORMAT + 1)
    with pytest.raises(UserError, match="use a newer jaxgpt"):
        Checkpoints(tmp_path).restore({"params": abstract(state)["params"]})


def test_an_optional_field_that_is_not_there_is_none_and_said(tmp_path, caplog):
    state = {"params": jnp.ones(3), "opt_state": jnp.zeros(3)}
    save_all(tmp_path, {1: state})
    wanted = abstract(state) | {"average": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(UserError, match="average is absent there"):
        Checkpoints(tmp_path).restore(wanted)
    restored, _, step = Checkpoints(tmp_path).restore(wanted, optional=("average",))
    assert restored["average"] is None and step == 1
    assert_same_bits({k: restored[k] for k in state}, state)
    assert caplog.messages == ["checkpoint 1 has no average, which begins at its parameters"]
    caplog.clear()
    save_all(tmp_path, {2: state | {"average": jnp.zeros(3)}})
    assert Checkpoints(tmp_path).restore(abstract(state) | {"average": None}, optional=("average",))[2] == 2
    assert caplog.messages == ["checkpoint 2 also holds average, which this run does not use"]


def test_metrics_are_synced_before_a_checkpoint_commits(tmp_path, monkeypatch):
    synced, rename = [], Path.rename
    sync = checkpoint._sync
    monkeypatch.setattr(checkpoint, "_sync", lambda path: synced.append(path.name) or sync(path))
    monkeypatch.setattr(Path, "rename", lambda self, to: synced.append(f"→ {to.name}") or rename(self, to))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    save_all(tmp_path, {1: {"w": jnp.zeros(3)}})
    assert synced.index("metrics.jsonl") < synced.index("→ 1")


# --- processes ---

WRITER = """
import sys, jax.numpy as jnp
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.guard import RunLock
ckpts = Checkpoints(sys.argv[1], keep=2)
lock = RunLock(sys.argv[1]).__enter__()
ckpts.begin(lock, "")
step, abstract = 0, {"w": jnp.zeros((64, 64)), "step": jnp.int32(0)}
if ckpts.steps():
    state, _, step = ckpts.restore(abstract)
    assert int(state["step"]) == step and (state["w"] == step).all()
print("ready", step, flush=True)
while True:
    step += 1
    ckpts.save(step, {"w": jnp.full((64, 64), step, jnp.float32), "step": jnp.int32(step)}, {})
"""


def spawn(code, *args, **env):
    env = {
        **os.environ,
        "XLA_FLAGS": xla_flags(1),
        "JAX_COMPILATION_CACHE_DIR": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **env,
    }
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_saves_leave_a_sound_latest(tmp_path):
    """SIGKILL in the middle of saving, over and over: the next start goes on from the newest whole checkpoint."""
    rng, reached = random.Random(1), 0
    for wait_for_progress in (False, True, True):
        writer = spawn(WRITER, tmp_path)
        assert writer.stdout is not None
        word, _, step = writer.stdout.readline().partition(" ")
        assert word == "ready", writer.communicate()[1]
        assert int(step) >= reached
        while wait_for_progress and max(Checkpoints(tmp_path).steps(), default=0) <= int(step):
            time.sleep(0.01)
        time.sleep(0.5 * rng.random())
        writer.kill()
        assert writer.communicate()[1] == ""
        reached = max(Checkpoints(tmp_path).steps(), default=0)
    assert reached >= 2
    restored, _, step = Checkpoints(tmp_path).restore(
        {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    )
    assert int(restored["step"]) == step >= reached - 1 and (np.asarray(restored["w"]) == step).all()


PAIR = """
import resource, sys, time, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
out, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jaxgpt.run.checkpoint import Checkpoints
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)
specs = {"w": P(("data", "fsdp")), "r": P(), "f": P("fsdp")}
shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
shape = {"w": (8, 4), "r": (5,), "f": (4, 3)}
abstract = {k: jax.ShapeDtypeStruct(shape[k], jnp.float32, sharding=s) for k, s in shardings.items()}
make = jax.jit(lambda x: {k: x + jnp.arange(np.prod(shape[k]), dtype=jnp.float32).reshape(shape[k]) for k in shape},
               out_shardings=shardings)
ckpts = Checkpoints(out, keep=1)
state, _, step = ckpts.restore(abstract)
assert step == 1, step
for step in (2, 3):
    ckpts.save(step, make(float(step)), {"val_loss": float(step)})
assert ckpts.wait()
damaged = ckpts.folder / "3" / "state" / "manifest.ocdbt"
sound = damaged.read_bytes()
jax.experimental.multihost_utils.sync_global_devices("read")
if rank == 0:
    damaged.write_bytes(b"")
jax.experimental.multihost_utils.sync_global_devices("damaged")
state, info, step = Checkpoints(out).restore(abstract)
assert step == 2 and info == {"val_loss": 2.0}, (step, info)
same = jax.jit(lambda a, b: jnp.array([(x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]).all())
assert same(state, make(2.0))
if rank == 0:
    damaged.write_bytes(sound)

def limit_files(size):  # what process 1 may write: the disk of one host fails
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

limit_files(0)
begun = time.monotonic()
ckpts.save(4, make(4.0), {})
assert not ckpts.wait() and "process 1 failed" in ckpts.failure + "process 1 failed" * rank, ckpts.failure
assert time.monotonic() - begun < 30, "the others waited for it"
limit_files(resource.RLIM_INFINITY)
ckpts.save(5, make(5.0), {})
assert ckpts.wait()
print("done", rank)
"""


def test_two_processes_share_checkpoints_with_one(tmp_path):
    def state(step):
        shapes = {"w": (8, 4), "r": (5,), "f": (4, 3)}
        return {k: jnp.asarray(step + np.arange(math.prod(s), dtype=np.float32).reshape(s)) for k, s in shapes.items()}

    save_all(tmp_path, {1: state(1)})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [spawn(PAIR, tmp_path, port, rank, XLA_FLAGS=xla_flags(2)) for rank in (0, 1)]
    ends = [process.communicate(timeout=100) for process in pair]
    assert [out.splitlines()[-1:] for out, _ in ends] == [["done 0"], ["done 1"]], ends
    assert "checkpoint 3 passed over" in ends[0][1] and "passed over" not in ends[1][1], "only process 0 talks"
    assert all("CHECKPOINT 4 NOT SAVED" in err and "Traceback" not in err for _, err in ends), ends
    restored, _, step = Checkpoints(tmp_path).restore(abstract(state(5)))
    assert step == 5
    assert_same_bits(restored, state(5))


def test_leftovers_go_and_only_leftovers(tmp_path):
    ckpts = save_all(tmp_path, {1: {"w": jnp.zeros(3)}})
    for name in ("2.tmp", "1-old.tmp"):
        (ckpts.folder / name).mkdir()
        (ckpts.folder / name / "x").write_text("")
    (ckpts.folder / "notes.txt").write_text("mine")
    assert Checkpoints(tmp_path).steps() == [1]
    with RunLock(tmp_path) as lock:
        ckpts.begin(lock, "")
    assert sorted(p.name for p in ckpts.folder.iterdir()) == ["1", "notes.txt"]


def test_the_record_is_plain_json_and_no_file_is_a_pickle(tmp_path):
    folder = save_all(tmp_path, {1: sample_state(1)}).folder
    record = json.loads((folder / "1" / "record.json").read_text())
    assert record["arrays"]["params.h.1.kernel"][:2] == ["bfloat16", [8, 16]]
    for file in (p for p in folder.rglob("*") if p.is_file()):
        assert not file.read_bytes().startswith(b"\x80"), f"{file} opens like a pickle"
