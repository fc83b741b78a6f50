"""Real processes over loopback: the losses of one process with as many devices; and when one fails, all end and say why.

Models are tiny: gloo gives up where one process compiles 30 s longer than another (jax issue 40831).
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.checkpoint import Checkpoints, digests
from jaxgpt.data import RunData
from jaxgpt.processes import HEARTBEAT_TIMEOUT_S
from jaxgpt.sharding import make_mesh
from jaxgpt.step import abstract_state, create_state, make_model_config, make_train_step

ROOT = Path(__file__).parents[1]
PATIENCE_S = 240  # for what takes a few seconds on an idle machine
LIMIT_S = 60  # from a process's end to the others'


def environment(devices=1, **more):
    """One of a test's own processes: no launcher's variables but those given, `devices` virtual devices."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COORD", "JAX_NUM_P", "JAX_PROC", "SLURM_"))}
    flags = f"--xla_force_host_platform_device_count={devices}"
    return env | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | {k: str(v) for k, v in more.items()}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def preset(tiny_config, tmp_path_factory):
    """The preset file of a run of 8 steps on a 2 × 2 × 1 mesh."""
    values = tiny_config(mesh_data=2, mesh_fsdp=2, always_save_checkpoint=True).to_dict()
    path = tmp_path_factory.mktemp("preset") / "tiny.py"
    path.write_text(
        "from jaxgpt.config import default_config\n\n\ndef get_config():\n    c = default_config()\n"
        f"    c.update(**{values!r})\n    return c\n"
    )
    return path


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], key): row[key] for row in rows for key in ("loss", "val_loss", "grad_norm") if key in row}


def launch(count, preset, out, devices):
    """A run of launch_local, or of one process alone; its stdout."""
    program = [sys.executable, ROOT / "scripts" / "launch_local", str(count)] if count > 1 else [sys.executable, "-m"]
    command = [*program, *(["jaxgpt.train"] if count == 1 else []), "--config", preset, f"--config.out_dir={out}"]
    env = environment(devices) | ({"PYTHON": sys.executable} if count > 1 else {})
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(preset, tmp_path_factory):
    """The folder of the run in one process of four devices."""
    out = tmp_path_factory.mktemp("alone") / "run"
    launch(1, preset, out, devices=4)
    return out


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_as_one(count, alone, preset, tmp_path):
    stdout = launch(count, preset, tmp_path / "run", devices=4 // count)
    expected, found = losses(alone), losses(tmp_path / "run")
    assert list(found) == list(expected) and len(found) >= 19
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=0, atol=1e-5)
    assert len(re.findall("^iter 8: ", stdout, re.MULTILINE)) == 1, "only process 0 talks"
    assert Checkpoints(tmp_path / "run").steps()[-1] == 8


RESTORE = """
import json, sys
import jax
from jaxgpt.checkpoint import Checkpoints, digests
from jaxgpt.config import load_preset
from jaxgpt.data import RunData
from jaxgpt.processes import Processes
from jaxgpt.sharding import make_mesh
from jaxgpt.step import abstract_state, make_model_config, make_train_step
with Processes():
    config, mesh = load_preset(sys.argv[1]), make_mesh(1, 2, 1)
    data = RunData(config, mesh)
    model_config = make_model_config(config, data.vocab_size, mesh)
    state, _, step = Checkpoints(sys.argv[2]).restore(abstract_state(config, model_config, mesh))
    sums = digests({jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state.params)})
    _, metrics = make_train_step(config, model_config, mesh)(state, data.batch(step, 2))
    print(json.dumps({"sums": sums, "losses": jax.device_get(metrics["loss"]).tolist()}))
"""


def test_two_processes_go_on_from_one(preset, tiny_config, tmp_path):
    """Saved by this process on 8 × 1 × 1, restored by two on 1 × 2 × 1: the same bits, the same next losses."""
    config, mesh = tiny_config(), make_mesh()
    data = RunData(config, mesh)
    model_config = make_model_config(config, data.vocab_size, mesh)
    step = make_train_step(config, model_config, mesh)
    state, _ = step(create_state(config, model_config, mesh), data.batch(0, 2))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state, {})
    assert checkpoints.wait()
    sums = digests({jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state.params)})
    _, metrics = step(state, data.batch(2, 2))
    port = free_port()
    command = [sys.executable, "-c", RESTORE, preset, tmp_path]
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(
                subprocess.Popen(command, env=worker(i, port), cwd=ROOT, stdout=subprocess.PIPE, text=True)
            )
            for i in range(2)
        )
        output = first.communicate(timeout=PATIENCE_S)[0]
        assert (second.communicate(timeout=PATIENCE_S)[0], first.returncode, second.returncode) == ("", 0, 0)
    found = json.loads(output.splitlines()[-1])
    assert found["sums"] == sums
    np.testing.assert_allclose(found["losses"], metrics["loss"], rtol=0, atol=1e-5)


def worker(index, port, **more):
    """One of two processes, by explicit variables."""
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": index}
    return environment(**address, **more)


# --- failures ---

ENDLESS = (
    "mesh_data=-1",
    "mesh_fsdp=1",
    "max_iters=10000000",
    "eval_interval=10000000",
    "log_interval=50",
    "steps_per_call=1",
)


class Pair:
    """Two processes of one run, of which the second may get arguments and variables of its own."""

    def __init__(self, preset, folder, *arguments, **variables):
        self.folder, port = folder, free_port()
        folder.mkdir()
        keys = [f"--config.{key}" for key in (*ENDLESS, f"out_dir={folder / 'run'}")]
        command = [sys.executable, "-m", "jaxgpt.train", "--config", preset, *keys]
        self.processes = []
        for i in range(2):
            with open(folder / f"{i}.out", "w") as out, open(folder / f"{i}.err", "w") as err:
                own = [command, worker(i, port)] if i == 0 else [[*command, *arguments], worker(i, port, **variables)]
                self.processes.append(subprocess.Popen(own[0], env=own[1], cwd=ROOT, stdout=out, stderr=err))

    def said(self, index):
        return (self.folder / f"{index}.err").read_text()

    def wait_for_steps(self):
        deadline = time.monotonic() + PATIENCE_S
        while "iter 50:" not in (self.folder / "0.out").read_text():
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.said(0)
            time.sleep(0.2)

    def end(self, *indices, within):
        """Statuses of these processes, which end within so many seconds."""
        deadline = time.monotonic() + within
        return [self.processes[i].wait(max(0.1, deadline - time.monotonic())) for i in indices]


@pytest.fixture(scope="module")
def pairs(preset, tmp_path_factory, token_folder):
    """The pairs of all failures, started at once; whatever is left of them goes at the end."""
    folder = tmp_path_factory.mktemp("pairs")
    other = folder / "other data"
    shutil.copytree(token_folder, other)
    with open(other / "train.bin", "r+b") as file:
        file.write(b"\1\0")
        (other / "meta.json").unlink()  # which knows the digest
        shutil.copy(token_folder / "meta.json", other)
    started = {
        "config": Pair(preset, folder / "config", "--config.learning_rate=0.5"),
        "mesh": Pair(preset, folder / "mesh", "--config.mesh_fsdp=2"),
        "data": Pair(preset, folder / "data", f"--config.data_dir={other}"),
        "devices": Pair(preset, folder / "devices", XLA_FLAGS="--xla_force_host_platform_device_count=2"),
        "kill": Pair(preset, folder / "kill"),
        "stop": Pair(preset, folder / "stop"),
    }
    yield started
    for process in [process for pair in started.values() for process in pair.processes]:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "what, message",
    [
        ("config", "learning_rate=0.5 here, 0.01 in process 0; start every process with the same"),
        ("mesh", "mesh_fsdp=2 here, 1 in process 0; start every process with the same"),
        ("devices", "devices=2 here, 1 in process 0; start every process with the same"),
        ("data", "bytes, digest [0-9a-f]+ here, .* in process 0; start every process with the same"),
    ],
)
def test_processes_that_differ_end_before_the_first_step(pairs, what, message):
    pair = pairs[what]
    assert pair.end(0, 1, within=PATIENCE_S) == [2, 2]
    assert re.fullmatch(f"error: process 1 on .*: .*{message}\n", pair.said(0)), pair.said(0)
    assert re.fullmatch(f"error: .*{message}\n", pair.said(1)), pair.said(1)
    assert not (pair.folder / "run").exists(), "something was written"
    assert (pair.folder / "1.out").read_text() == ""


def test_a_killed_process_ends_the_other(pairs):
    pair = pairs["kill"]
    pair.wait_for_steps()
    pair.processes[1].kill()
    assert pair.end(0, within=LIMIT_S) != [0]
    assert re.search("another process went away|unhealthy|died", pair.said(0)), pair.said(0)


def test_a_stopped_process_ends_the_other(pairs):
    """The stopped one cannot end; it is missed by its heartbeats."""
    pair = pairs["stop"]
    pair.wait_for_steps()
    pair.processes[1].send_signal(signal.SIGSTOP)
    assert HEARTBEAT_TIMEOUT_S < LIMIT_S
    assert pair.end(0, within=LIMIT_S) != [0]
    assert "stopped sending heartbeats" in pair.said(0), pair.said(0)


def test_a_process_that_nobody_joins_says_where_it_waited(preset, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "jaxgpt.train", "--config", preset, f"--config.out_dir={tmp_path / 'run'}"]
    started = [
        subprocess.Popen(
            command, env=worker(i, port + i, JAXGPT_START_TIMEOUT=3), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=PATIENCE_S)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert f"process 0 of 2 waited 3 s for the others, coordinator 127.0.0.1:{port}; it answers" in said[0]
    assert (
        f"process 1 of 2 waited 3 s for the others, coordinator 127.0.0.1:{port + 1}; nothing answers there" in said[1]
    )
    assert all(text.count("\n") == 1 for text in said)
