"""Runs and corpora in object stores, against real servers on loopback: tests/stores.py says which, and why.

S3 by moto's server, GCS by a small server of our own, each behind a proxy that fails as a test asks. The whole forms,
with 20 kills and a checkpoint of 124M, are `scripts/faults store`.
"""

import contextlib
import errno
import fcntl
import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import BUCKET, stores

from jaxgpt import Unavailable, UserError, convert, store, user_error
from jaxgpt.cache import Cache
from jaxgpt.corpus import shards
from jaxgpt.corpus.sources import Files
from jaxgpt.data import Corpus
from jaxgpt.plot import read_metrics
from jaxgpt.report import read_run
from jaxgpt.run import lease
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.guard import Exit, trim_jsonl
from jaxgpt.sharding import make_mesh
from jaxgpt.store import ABSENT, Appender
from jaxgpt.train import train
from jaxgpt.weights.opening import open_model

SCHEMES = ("s3", "gs")


@pytest.fixture(scope="module")
def servers():
    """{scheme: proxy}; failed requests are repeated once, a tenth of a second later."""
    with pytest.MonkeyPatch.context() as patch, stores() as (s3, gs, _):
        patch.setattr(store, "RETRIES", 1)
        patch.setattr(store, "RETRY_S", 0.1)
        yield {"s3": s3, "gs": gs}


@pytest.fixture(params=SCHEMES)
def proxy(request, servers):
    """The proxy of one store, without faults."""
    servers[request.param].fault = lambda method, path: None
    yield servers[request.param]
    servers[request.param].fault = lambda method, path: None


@pytest.fixture
def out(request, proxy, servers):
    """A folder of this test's own, in the proxy's store."""
    scheme = next(scheme for scheme, server in servers.items() if server is proxy)
    return store.folder(f"{scheme}://{BUCKET}/{request.node.name.replace('[', '-').rstrip(']')}/run")


@pytest.fixture
def quick(monkeypatch):
    """A lease of a second, lines sent at once, and soon again."""
    monkeypatch.setenv("JAXGPT_LEASE", "1")
    monkeypatch.setattr(store, "APPEND_S", 0.02)
    monkeypatch.setattr(store, "AGAIN_S", 0.05)


def state(value=0.0):
    """Arrays of several types and shapes, one of them split over all devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = {
        "split": jax.device_put(jnp.arange(2**14, dtype=jnp.float32).reshape(128, 128) + value, split),
        "whole": jax.device_put(jnp.full((3, 5), value, jnp.bfloat16), whole),
        "count": jax.device_put(jnp.int32(7), whole),
        "flags": jax.device_put(jnp.array([True, False]), whole),
    }
    return {"params": arrays}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def save(checkpoints, *steps, **info):
    for step in steps:
        checkpoints.save(step, state(step), info)
        assert checkpoints.wait(), checkpoints.failure


# --- names ---


@pytest.mark.parametrize(
    "name",
    ["s3://bucket", "gs://bucket/", "s3:///run", "s3://bucket/a/../b", "gs://bucket/./a", "s3://bucket/a//b", "s3://B/a",
     "http://bucket/a", "s3://bucket/a\tb", "s3:/bucket/a", "gs:a"],
)  # fmt: skip
def test_bad_names_are_one_line(name):
    with pytest.raises(UserError, match="write|gs://BUCKET/PATH") as error:
        store.folder(name)
    assert "\n" not in str(error.value).strip()


@given(st.lists(st.from_regex(r"[A-Za-z0-9_.-]{1,9}", fullmatch=True).filter(lambda x: x.strip(".")), min_size=1))
def test_names_survive(parts):
    path = store.folder("s3://bucket/" + "/".join(parts))
    assert str(path) == "s3://bucket/" + "/".join(parts)
    assert path.name == parts[-1] and (path / "x").parent == path and store.folder(path) is path
    assert isinstance(store.folder("/".join(parts)), Path)


def test_local_runs_import_no_more():
    """Checkpoints on a disk need TensorStore in any case: what opens a local path does not."""
    code = "import sys, jaxgpt.plot, jaxgpt.corpus.shards as x; x.store.folder('out').exists(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert "jaxgpt.store" in found and not {*found} & {"tensorstore", "configparser", "boto3", "gcsfs", "s3fs"}


# --- objects ---


def test_the_servers_heed_conditions(proxy, out):
    path = out / "object"
    first = path.put(b"one", replacing=ABSENT)
    assert first and path.put(b"two", replacing=ABSENT) is None and path.read_bytes() == b"one"
    second = path.put(b"two", replacing=first)
    assert second and path.put(b"three", replacing=first) is None and path.read_bytes() == b"two"
    assert path.put(b"two", replacing=ABSENT) == second  # as if the answer had been lost


def test_objects_are_files(proxy, out):
    (out / "a").write_bytes(b"0123456789")
    (out / "sub" / "b").write_bytes(b"")
    assert (out / "a").is_file() and (out / "sub" / "b").is_file() and not (out / "sub").is_file()
    assert out.is_dir() and (out / "sub").exists() and not (out / "c").exists()
    assert [path.name for path in out.iterdir()] == ["a", "sub"] and [path.name for path in out.glob("?")] == ["a"]
    assert (out / "a").read_range(2, 5) == b"234"
    with pytest.raises(FileNotFoundError):
        (out / "c").read_bytes()
    (out / "a").unlink()
    (out / "a").unlink()
    assert out.objects() == ["sub/b"]


@pytest.mark.parametrize("fault", [500, 503, "drop", "late"])
def test_a_fault_that_passes_is_not_noticed(proxy, out, fault):
    failures = [fault]
    proxy.fault = lambda method, path: failures.pop() if failures else None
    stamp = (out / "a").put(b"x", replacing=ABSENT)
    assert not failures and stamp and (out / "a").get() == (b"x", stamp)


@pytest.mark.parametrize(
    "fault,kind,text", [(403, UserError, "credentials"), (500, Unavailable, "retry"), (507, Unavailable, "make room")]
)
def test_a_fault_that_stays_is_one_line(proxy, out, fault, kind, text):
    proxy.fault = lambda method, path: fault
    with pytest.raises(OSError) as error:
        (out / "a").write_bytes(b"x")
    told = user_error(error.value)
    assert type(told) is kind and text in str(told) and str(out) in str(told) and "not-to-be-logged" not in str(told)


# --- files that grow ---


def test_lines_arrive_each_once(proxy, out, quick, monkeypatch):
    monkeypatch.setattr(store, "PART_BYTES", 300)
    path = out / "metrics.jsonl"
    with store.append(path) as file:
        for step in range(100):
            file.write(json.dumps({"step": step}) + "\n")
            if step % 10 == 0:
                file.sync()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(100))
    assert len(path.parts()[1]) > 2


def test_a_store_that_is_away_costs_no_line(proxy, out, quick, caplog):
    path = out / "metrics.jsonl"
    with store.append(path) as file:
        file.write("1\n")
        file.sync()
        proxy.fault = lambda method, path: 403
        file.write("2\n")
        with pytest.raises(OSError, match="credentials"):
            file.sync()
        file.write("3\n")
        proxy.fault = lambda method, path: None
        file.sync()
        file.write("4\n")
    assert path.read_text() == "1\n2\n3\n4\n" and caplog.text.count("stays in memory") == 1


def test_an_outage_is_said_once(proxy, out, quick, caplog):
    """And its end, by the last file or checkpoint that can be written again; and the first checkpoint that is lost."""
    checkpoints = Checkpoints(out)
    with store.append(out / "events.jsonl") as events, store.append(out / "metrics.jsonl") as metrics:
        proxy.fault = lambda method, path: 503
        for file in (events, metrics):
            file.write("1\n")
            with pytest.raises(OSError, match="503"):
                file.sync()
        for step in (1, 2):
            checkpoints.save(step, state(step), {})
            assert not checkpoints.wait()
        proxy.fault = lambda method, path: None
        events.sync()
        save(checkpoints, 3)
        metrics.sync()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("jaxgpt")]
    assert len(said) == 3 and "events.jsonl" in said[0] and said[0].endswith("stays in memory until it can be")
    assert "CHECKPOINT 1 NOT SAVED" in said[1] and "Errno" not in said[1]
    assert f"{out} is written to again, after " in said[2]


def test_a_write_whose_answer_was_lost_doubles_no_line(proxy, out, quick):
    path = out / "metrics.jsonl"
    with store.append(path) as file:
        for lost in (False, True, True, False):
            proxy.fault = lambda method, path, lost=lost: "late" if lost else None
            file.write(f"{file._total}\n")
            with contextlib.nullcontext() if not lost else pytest.raises(OSError):
                file.sync()
    assert path.read_text() == "0\n2\n4\n6\n"


def test_a_resumed_run_begins_a_generation(proxy, out, quick):
    """A writer that was taken for dead goes on writing: nothing of it counts."""
    path = out / "metrics.jsonl"
    dead = Appender(path)
    for step in range(10):
        dead.write(json.dumps({"step": step}) + "\n")
    dead.sync()
    assert trim_jsonl(path, 5) == 6
    dead.write(json.dumps({"step": 10}) + "\n")
    dead.sync()
    with store.append(path) as file:
        file.write(json.dumps({"step": 6}) + "\n")
    dead.write(json.dumps({"step": 11}) + "\n")
    dead.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(7))


# --- checkpoints ---


def test_checkpoints_are_kept_as_on_a_disk(proxy, out):
    checkpoints = Checkpoints(out, keep=1)
    save(checkpoints, 1, val_loss=1.0)
    save(checkpoints, 2, 3, val_loss=2.0)
    assert checkpoints.steps() == [1, 3]
    for which, step in (("latest", 3), ("best", 1), (1, 1)):
        restored, info, found = Checkpoints(out).restore(abstract(state()), which)
        assert found == step and same(restored, state(step)), which
    one_device = {"params": {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in state()["params"].items()}}
    assert same(Checkpoints(out).restore(one_device)[0], state(3))
    parts = [name.split("/") for name in out.objects()]
    assert {part[1] for part in parts if "d" in part} == {"1", "3"}  # the data: in one file or, seldom, in two
    others = sorted((part[1], part[-1]) for part in parts if "d" not in part)
    assert others == [(step, name) for step in ("1", "3") for name in ("manifest.ocdbt", "record.json")]


def test_what_is_not_sound_is_passed_over(proxy, out, caplog):
    save(Checkpoints(out), 1, 2)
    (data,) = [name for name in out.objects() if name.startswith("checkpoints/2/") and "/d/" in name]
    content = bytearray((out / data).read_bytes())
    place = content.index(np.float32(2 + 6000).tobytes())
    content[place] ^= 1
    (out / data).write_bytes(bytes(content))
    _, _, step = Checkpoints(out).restore(abstract(state()))
    assert step == 1 and "checkpoint 2 passed over: array params.split does not match its digest" in caplog.text
    (out / data).unlink()
    assert Checkpoints(out).restore(abstract(state()))[2] == 1
    checkpoints = Checkpoints(out)
    assert checkpoints.restore(abstract(state()))[2] == 1
    save(checkpoints, 2)  # over the damaged one
    assert Checkpoints(out).restore(abstract(state()))[2] == 2
    (out / "checkpoints/2/record.json").unlink()  # as a save that was killed before it counted
    (out / "checkpoints/notes/1").write_bytes(b"somebody's")
    assert Checkpoints(out).restore(abstract(state()))[2] == 1
    with lease.lock(out) as lock:
        Checkpoints(out).begin(lock, "")
    assert {name.split("/")[1] for name in out.objects()} == {"1", "notes"}


def test_a_failed_save_costs_no_older_one(proxy, out, caplog):
    checkpoints = Checkpoints(out)
    save(checkpoints, 1)
    proxy.fault = lambda method, path: 507 if method in ("PUT", "POST") else None
    checkpoints.save(2, state(2), {})
    assert not checkpoints.wait() and "CHECKPOINT 2 NOT SAVED" in caplog.text and "HTTP 507" in caplog.text
    proxy.fault = lambda method, path: None
    save(checkpoints, 3)
    assert Checkpoints(out).steps() == [1, 3] and not any("/2/" in name for name in out.objects())


def test_a_record_whose_answer_was_lost_is_taken_back(proxy, out, monkeypatch):
    """It was written, and the save has failed: what it names goes, and so must it."""
    checkpoints, written = Checkpoints(out), []
    abandon = checkpoints._place.abandon

    def fault(method, path):
        if "record.json" in path and (written or method in ("PUT", "POST")):
            written.append(path)
            return "late"

    def abandoning(step):
        proxy.fault = lambda method, path: None
        assert Checkpoints(out).steps() == [1, 2]
        abandon(step)

    save(checkpoints, 1)
    proxy.fault = fault
    monkeypatch.setattr(checkpoints._place, "abandon", abandoning)
    checkpoints.save(2, state(2), {})
    assert not checkpoints.wait() and written
    assert Checkpoints(out).steps() == [1] and not any("/2/" in name for name in out.objects())


def test_a_store_that_is_away_is_no_damage(proxy, out):
    save(Checkpoints(out), 1, 2)
    proxy.fault = lambda method, path: 503
    with pytest.raises(OSError):
        Checkpoints(out).restore(abstract(state()))
    proxy.fault = lambda method, path: 503 if "/2/" in path or "%2F2%2F" in path else None
    with pytest.raises(Unavailable, match="cannot be read now"):
        Checkpoints(out).restore(abstract(state()))


def test_a_slow_save_lets_the_next_one_go(proxy, out, caplog):
    checkpoints, going_on = Checkpoints(out), threading.Event()
    proxy.fault = lambda method, path: None if going_on.is_set() else 0.05 if going_on.wait(20) else None
    checkpoints.save(1, state(1), {}, last=False)
    began = time.monotonic()
    checkpoints.save(2, state(2), {}, last=False)
    checkpoints.save(3, state(3), {}, last=False)
    assert time.monotonic() - began < 5 and caplog.text.count("no checkpoint at ") == 1
    assert "no checkpoint at 2, while 1 is still being written to" in caplog.text
    going_on.set()
    checkpoints.save(4, state(4), {})
    assert checkpoints.wait() and checkpoints.steps() == [1, 4]


def test_a_copied_run_is_a_run(proxy, out, tmp_path):
    """From a disk to a store, object by object, and back."""
    save(Checkpoints(tmp_path), 1)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        (out / path.relative_to(tmp_path).as_posix()).write_bytes(path.read_bytes())
    assert same(Checkpoints(out).restore(abstract(state()))[0], state(1))
    (out / "checkpoints/1/state/manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="file state/manifest.ocdbt is missing"):
        Checkpoints(out).restore(abstract(state()))


# --- one writer ---


def test_a_lease_is_exclusive_and_leaves_nothing(proxy, out, quick, caplog):
    with lease.lock(out) as lock:
        assert not lock.lost()
        with pytest.raises(Unavailable, match=f"in use by process {os.getpid()} on "):
            lease.lock(out).__enter__()
        with lock.starting():
            (out / "kept").write_bytes(b"")
        with pytest.raises(ValueError), lock.starting():
            (out / "gone").write_bytes(b"")
            raise ValueError
    assert out.objects() == ["kept"] and "watching for up to 1 s" in caplog.text


def test_a_dead_holder_is_succeeded_and_knows_it(proxy, out, quick, monkeypatch):
    dead = lease.lock(out)
    dead.__enter__()
    paused = threading.Event()
    write = dead._write
    monkeypatch.setattr(dead, "_write", lambda *x: paused.wait(30) and write(*x))
    began = time.monotonic()
    with lease.lock(out) as lock:
        assert 1 <= time.monotonic() - began < 5
        assert "was not renewed for 1 s" in dead.lost() and not lock.lost()
        paused.set()
        while "no longer this run's" not in dead.lost():
            time.sleep(0.05)
        dead.close()
        time.sleep(0.5)
        assert not lock.lost() and out.objects() == [".lock"]
    assert out.objects() == []


def test_a_lease_outlives_a_short_outage(proxy, out, quick):
    with lease.lock(out) as lock:
        proxy.fault = lambda method, path: 503
        while not lock.lost():
            time.sleep(0.05)
        proxy.fault = lambda method, path: None
        deadline = time.monotonic() + 10
        while lock.lost() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not lock.lost()


def test_a_store_without_conditions_is_refused(proxy, out, quick):
    proxy.drop_conditions = True
    try:
        with pytest.raises(UserError, match="without conditional writes"):
            lease.lock(out).__enter__()
    finally:
        proxy.drop_conditions = False
    assert out.objects() == []


# --- whole runs ---


@pytest.mark.parametrize("proxy", ["s3"], indirect=True)
def test_a_run_in_a_store_is_the_run_on_a_disk(proxy, out, quick, tiny_config, tmp_path, monkeypatch):
    """Data, checkpoints, metrics; stopped halfway and gone on, to the bit."""
    data = out.parent / "data"
    for path in Path(tiny_config().data_dir).iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    there = dict(out_dir=str(out), data_dir=str(data), data_cache=str(tmp_path / "cache"), init_from="auto")
    assert train(tiny_config(out_dir=str(tmp_path / "disk"), init_from="auto")) == Exit.DONE
    assert train(tiny_config(**there, max_iters=4, lr_decay_iters=8)) == Exit.DONE
    assert train(tiny_config(**there)) == Exit.DONE
    ours, theirs = (read_metrics(folder) for folder in (out, tmp_path / "disk"))
    columns = ("step", "loss", "lr", "grad_norm", "train_loss", "val_loss", "tokens")
    assert [[row.get(c) for c in columns] for row in ours] == [[row.get(c) for c in columns] for row in theirs]
    a, b = (json.loads(Checkpoints(folder)._place.record(8))["arrays"] for folder in (out, tmp_path / "disk"))
    assert a == b  # types, shapes, digests
    assert Checkpoints(out).steps() == Checkpoints(tmp_path / "disk").steps()
    names = {name.split("/")[0] for name in out.objects()}
    assert names == {"checkpoints", "config.json", "events.jsonl", "meta.json", "metrics.jsonl"}
    assert "not-to-be-logged" not in (out / "config.json").read_text()
    with pytest.raises(UserError, match="already holds a run"):
        train(tiny_config(**{**there, "init_from": "scratch"}))
    assert len(read_run(out).rows) == len(ours)
    export = out.parent / "export"
    convert.main([f"--out_dir={out}", f"--to_safetensors={export}"])
    assert "model.safetensors" in export.objects()
    with pytest.raises(UserError, match="no run but an export; copy it here"):
        open_model(init_from=str(export), mesh=make_mesh(), dtype="float32")


@pytest.mark.parametrize("proxy", ["gs"], indirect=True)
def test_a_run_goes_on_while_its_store_is_away(proxy, out, quick, tiny_config, caplog):
    failed = []

    def fault(method, path):
        if "checkpoints" in path and method in ("PUT", "POST") and len(failed) < 2:  # tried twice
            failed.append(path)
            return 503

    proxy.fault = fault
    assert train(tiny_config(out_dir=str(out), max_iters=16, lr_decay_iters=16)) == Exit.DONE
    assert "NOT SAVED" in caplog.text and Checkpoints(out).steps()[-1] == 16
    assert [row["step"] for row in read_metrics(out) if "loss" in row] == list(range(1, 17))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bad_input_is_one_line_before_anything_is_compiled(servers, scheme, tiny_config, monkeypatch, quick):
    monkeypatch.setattr("jaxgpt.tools.programs.make_train_step", None)
    servers[scheme].fault = lambda method, path: None
    with pytest.raises((UserError, OSError)) as error:
        train(tiny_config(out_dir=f"{scheme}://no-such-bucket/run"))
    assert "bucket does not exist" in str(user_error(error.value))
    servers[scheme].fault = lambda method, path: 403
    with pytest.raises((UserError, OSError)) as error:
        train(tiny_config(out_dir=f"{scheme}://{BUCKET}/run"))
    assert "check the credentials" in str(user_error(error.value))
    servers[scheme].fault = lambda method, path: 403 if method == "DELETE" else None
    with pytest.raises(UserError, match="objects cannot be deleted there"):
        train(tiny_config(out_dir=f"{scheme}://{BUCKET}/run"))
    servers[scheme].fault = lambda method, path: None
    with monkeypatch.context() as patch:
        patch.setattr(servers[scheme], "drop_conditions", True)
        with pytest.raises(UserError, match="without conditional writes"):
            train(tiny_config(out_dir=f"{scheme}://{BUCKET}/run"))
    with pytest.raises(UserError, match=r"no \.\."):
        train(tiny_config(out_dir=f"{scheme}://{BUCKET}/../run"))
    with pytest.raises(UserError, match="does not exist"):
        train(tiny_config(out_dir=f"{scheme}://{BUCKET}/run", data_dir=f"{scheme}://{BUCKET}/no-data"))
    assert store.folder(f"{scheme}://{BUCKET}/run").objects() == []


def test_killed_processes_go_on_from_a_store(servers, tmp_path, monkeypatch):
    """Two, killed at once. A second life does again what the first did after its checkpoint, to the bit.

    `scripts/faults store` kills at random moments, and compares the end with a run on a disk.
    """
    loader = importlib.machinery.SourceFileLoader("faults", str(Path(__file__).parents[1] / "scripts" / "faults"))
    faults = importlib.util.module_from_spec(importlib.util.spec_from_loader("faults", loader))
    loader.exec_module(faults)
    monkeypatch.setenv("JAXGPT_LEASE", "3")
    values = dict(eval_interval=15, eval_iters=2, lr_decay_iters=100)
    folder, data = store.folder(f"s3://{BUCKET}/killed/run"), faults.make_tokens(tmp_path / "data")
    run = faults.Run(folder, data, 2, faults={"pace": 0.05}, max_iters=10_000, **values).start()
    try:
        assert run.wait_for(r"^step \d+: saved") and run.wait_for(rf"^step (?!{run.steps()[0]}:)\d+: saved"), run.errors
    finally:
        statuses = run.end(signal.SIGKILL)
    assert set(statuses) == {-signal.SIGKILL}
    before, end = run.steps()[-2:]
    arrays, rows = run.record(end)["arrays"], [row for row in run.rows() if row["step"] <= end]
    (folder / f"checkpoints/{end}/record.json").unlink()  # as if they had been killed before it counted
    run.faults, run.flags = {}, [f"--config.max_iters={end}"]
    run.complete()
    assert f"resuming at step {before} of {end}" in "\n".join(run.lines[0])
    assert run.record(end)["arrays"] == arrays and run.rows() == rows
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, end + 1))
    faults.require_tidy(run)


# --- corpora ---


def corpus(folder, tokens=5000):
    """Two shards and a validation file with their digests, in a store."""
    import hashlib

    found, rng = {}, np.random.default_rng(0)
    for name in ("train_000000.bin", "train_000001.bin", "val_000000.bin"):
        content = rng.integers(0, 100, tokens).astype("<u2").tobytes()
        (folder / name).write_bytes(content)
        record = {"file": name, "tokens": tokens, "sha256": hashlib.sha256(content).hexdigest()}
        found.setdefault(name.split("_")[0], []).append(record)
    (folder / "meta.json").write_bytes(json.dumps({"vocab_size": 100, "tokenizer": "none", "shards": found}).encode())
    return folder


def test_shards_are_fetched_once_and_checked(proxy, out, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PIECE_BYTES", 3000)
    opened = dict(block_size=8, vocab_size=100)
    folder = corpus(out)
    there = Corpus.open(folder, "train", **opened, cache=Cache(str(tmp_path)))
    assert len(there) == 10_000 and all(path.is_relative_to(tmp_path) for path in there.paths)
    before = proxy.received
    again = Corpus.open(folder, "train", **opened, cache=Cache(str(tmp_path)))
    assert again.facts() == there.facts() and proxy.received - before < 5000  # the list, meta.json, a byte of each
    with pytest.raises(UserError, match="more than data_cache_gb"):
        Corpus.open(folder, "train", **opened, cache=Cache(str(tmp_path / "small"), 1e-5))
    content = bytearray((folder / "val_000000.bin").read_bytes())
    content[77] ^= 1
    (folder / "val_000000.bin").write_bytes(bytes(content))
    with pytest.raises(UserError, match="was altered"):
        Corpus.open(folder, "val", **opened, cache=Cache(str(tmp_path)))
    (folder / "val_000000.bin").write_bytes(bytes(content[:-2]))
    with pytest.raises(UserError, match="truncated or damaged"):
        Corpus.open(folder, "val", **opened, cache=Cache(str(tmp_path)))


def test_a_corpus_is_read_while_it_is_fetched(proxy, out, tmp_path, monkeypatch):
    """From the store, range by range, what its local files hold; a shard that was altered ends it once it is here."""
    monkeypatch.setattr("jaxgpt.data.DIGEST_LIMIT_BYTES", 100)
    opened, folder, going_on = dict(block_size=8, vocab_size=100), corpus(out), threading.Event()
    one = Cache._one
    monkeypatch.setattr(Cache, "_one", lambda *args: going_on.wait(60) and one(*args))
    early = Corpus.open(folder, "train", **opened, cache=Cache(str(tmp_path)))
    starts = np.array([0, 17, 4995, 9991])  # the third goes over from one shard into the next
    rows, facts = early.read(starts, 9), early.facts()
    assert not list(tmp_path.rglob("*.bin"))
    going_on.set()
    early.verify()
    late = Corpus.open(folder, "train", **opened, cache=Cache(str(tmp_path)))
    late.verify()
    assert len(list(tmp_path.rglob("train*.bin"))) == 2 and facts == late.facts() and len(early) == len(late)
    for each in (early, late):
        assert np.array_equal(rows, each.read(starts, 9))
    (folder / "train_000001.bin").write_bytes(b"\1\0" * 5000)
    altered = Corpus.open(folder, "train", **opened, cache=Cache(str(tmp_path)))
    with pytest.raises(UserError, match="was altered"):
        while True:
            altered.read(starts, 9)
    (folder / "train_000001.bin").unlink()
    with pytest.raises(UserError, match="is missing"):
        Corpus.open(folder, "train", **opened, cache=Cache(str(tmp_path)))


def test_the_cache_is_bounded(proxy, out, tmp_path):
    """What nobody uses goes, the longest unused first; what is in use stays."""
    opened = dict(block_size=8, vocab_size=100)
    first, second = corpus(out / "1"), corpus(out / "2")
    for folder in (first, second):
        Corpus.open(folder, "val", **opened, cache=Cache(str(tmp_path)))  # 10,000 bytes each
    assert len(list(tmp_path.rglob("*.bin"))) == 2
    script = (
        "import sys\nfrom jaxgpt import store\nfrom jaxgpt.cache import Cache\n"
        "cache = Cache(sys.argv[1], 25e-6)\n"
        "name = 'train_000000.bin'\n"
        "print(cache.fetch([store.folder(sys.argv[2]) / name], {}, {name: 10000}).result())\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(first)]
    held = subprocess.run(command, capture_output=True, text=True)
    assert held.returncode and "would hold" in held.stderr  # both are in use by this process


def test_a_cache_that_cannot_be_used_is_one_line(proxy, out, tmp_path, monkeypatch):
    folder, opened = corpus(out), dict(block_size=8, vocab_size=100)
    (tmp_path / "file").touch()
    for place in (str(tmp_path / "file"), "/proc/cache"):
        with pytest.raises(UserError, match=f"data_cache {place} cannot be used: .*; name another"):
            Corpus.open(folder, "val", **opened, cache=Cache(place))
    monkeypatch.setattr(os, "fsync", lambda file: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(Unavailable, match="cannot be used: No space left on device .*; make room"):
        Corpus.open(folder, "val", **opened, cache=Cache(str(tmp_path)))
    assert not list(tmp_path.rglob("*.bin*"))


def test_a_cache_without_locks_is_shared_and_mended(proxy, out, tmp_path, monkeypatch, caplog):
    """As on some network file systems: two hosts fetch at once, and nothing is removed. An altered copy is replaced."""

    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder, opened = corpus(out), dict(block_size=8, vocab_size=100)
    meeting, read = threading.Barrier(2, timeout=20), store.StorePath.read_range

    def together(self, start, stop):
        if self.name.startswith("val") and not start and stop > 1:
            meeting.wait()
        return read(self, start, stop)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as hosts:
        patch.setattr(store.StorePath, "read_range", together)
        each = [hosts.submit(Corpus.open, folder, "val", **opened, cache=Cache(str(tmp_path))) for _ in range(2)]
        first, second = (future.result() for future in each)
    facts = first.facts()
    assert first.paths == second.paths and facts == second.facts()
    (copy,), (there,) = first.paths, tmp_path.rglob("*.bin*")
    assert copy == there
    copy.write_bytes(b"\0" * copy.stat().st_size)
    assert Corpus.open(folder, "val", **opened, cache=Cache(str(tmp_path))).facts() == facts
    assert f"{copy} was altered; it is fetched again" in caplog.text
    with pytest.raises(UserError, match="would hold"):
        Corpus.open(folder, "train", **opened, cache=Cache(str(tmp_path), 25e-6))


def test_prepare_uploads_as_it_goes_and_resumes(proxy, out, tmp_path, gpt2_files, monkeypatch):
    (tmp_path / "text.txt").write_text("some words about nothing much, in lines\n" * 400)
    how = dict(shard_tokens=1000, workers=1)
    end, ended = shards._Shards.end_shard, []

    def dying(self, following):
        end(self, following)
        ended.append(following)
        if len(ended) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards._Shards, "end_shard", dying)
        with pytest.raises(UserError, match="run the same command to go on"):
            shards.build(Files([str(tmp_path / "text.txt")]), out, **how)
    assert "progress.json" in out.objects() and len(out.glob("train_*.bin")) == 2
    shards.build(Files([str(tmp_path / "text.txt")]), out, **how)
    shards.build(Files([str(tmp_path / "text.txt")]), tmp_path / "disk", **how)
    for path in (tmp_path / "disk").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert set(out.objects()) == {path.name for path in (tmp_path / "disk").iterdir()}
