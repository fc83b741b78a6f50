"""Several processes as one program: they find each other, agree before the first step, and end together.

jax.distributed connects them; process 0 runs its coordinator. A process that fails tells the others why through the
coordinator, and each ends itself. One that goes silent (killed, stopped, cut off) is missed by jax.distributed's
heartbeats, which then end the others.
"""

import contextlib
import glob
import importlib.util
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed

from jaxgpt import UserError

joined: Any = distributed.global_state  # its client, the only way to the coordinator's keys, has no public name

HEARTBEAT_TIMEOUT_S = 40  # a silent process is given up after this: all others end within a minute
POLL_S = 1.0  # how often a process asks whether another one failed
LINGER_S = 3.0  # how long one whose end ends others lives on, so that they hear of it, or tell theirs
PEER_GONE = r"(closed|reset) by peer|[Ss]ocket closed|[Bb]roken pipe"  # in what collectives raise then
FAILURE = "jaxgpt/failure"  # the coordinator's key of the first failure

# Launchers' variables: the number of processes and this one's index; the same on this host alone
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID")  # the third: the host's index


def find_cluster(env: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """What jax.distributed.initialize needs to be told here; None for a process that runs alone.

    The first that is there counts: JAX_NUM_PROCESSES with JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS (a number of 1:
    alone, whatever else is there); torchrun; Open MPI; SLURM; a TPU pod; an indexed Kubernetes Job. What the result
    leaves out, JAX finds. Where several processes share a host, each gets an equal part of its GPUs. Raises UserError.
    """
    if "JAX_NUM_PROCESSES" in env or "JAX_PROCESS_ID" in env:
        count = _number(env, "JAX_NUM_PROCESSES")
        if count == 1:
            return None
        if not (address := env.get("JAX_COORDINATOR_ADDRESS")):
            hint = "set it to HOST:PORT of process 0"
            raise UserError(f"JAX_NUM_PROCESSES is set but not JAX_COORDINATOR_ADDRESS; {hint}")
        known = {"num_processes": count, "process_id": _number(env, "JAX_PROCESS_ID")}
        return known | {"coordinator_address": address, "cluster_detection_method": "deactivate"}

    if "RANK" in env and "MASTER_ADDR" in env:
        env = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", **env}  # some set no more than the four of the whole
        port = _number(env, "MASTER_PORT") + ("TORCHELASTIC_RUN_ID" in env)  # at MASTER_PORT torchrun's agent listens
        address = f"{env['MASTER_ADDR']}:{env.get('JAX_COORDINATOR_PORT', port)}"
        return _cluster(env, (_number(env, name) for name in TORCHRUN), address)

    if "OMPI_COMM_WORLD_RANK" in env:
        address = None
        if launcher := re.fullmatch(r"prterun-(.+)-(\d+)@\d+", env.get("PMIX_NAMESPACE", "")):  # Open MPI 5
            address = f"{launcher[1]}:{env.get('JAX_COORDINATOR_PORT', 61440 + int(launcher[2]) % 4096)}"
        return _cluster(env, (_number(env, name) for name in OPEN_MPI), address, "ompi")

    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        count, index, node, local = (_number(env, name) for name in SLURM)
        runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # 8(x2),4 is 8, 8, 4
        tasks = [int(n) for n, times in runs for _ in range(int(times or 1))]
        return _cluster(env, (count, index, tasks[min(node, len(tasks) - 1)], local), method="slurm")

    if importlib.util.find_spec("libtpu"):
        hosts = (env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or "").split(",")
        several = len(hosts) > 1 or env.get("MEGASCALE_NUM_SLICES", "1") != "1"
        asks_cloud = hosts == [""] and "TPU_SKIP_MDS_QUERY" not in env and has_tpu()
        if several or asks_cloud:
            return {}

    if "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env:
        if not importlib.util.find_spec("kubernetes"):
            hint = "needs pip install kubernetes; set JAX_NUM_PROCESSES=1 if it is to train alone"
            raise UserError(f"this pod is of an indexed Kubernetes Job, and finding the others {hint}")
        return {}
    return None


def _number(env: Mapping[str, str], name: str) -> int:
    if not env.get(name, "").isdecimal():
        found = f"is {env[name]!r}, not a number" if name in env else "is not set"
        raise UserError(f"{name} {found}; the launcher's other variables are there: set them all, or none")
    return int(env[name])


def _cluster(
    env: Mapping[str, str], numbers: Iterable[int], address: str | None = None, method: str = ""
) -> dict[str, Any] | None:
    """numbers: of all processes and this one's index; the same on this host. method: JAX's, to find the address."""
    count, index, here, local = numbers
    if count == 1:
        return None
    known = {"num_processes": count, "process_id": index, "local_device_ids": _own_gpus(env, here, local)}
    return known | {"coordinator_address": address, "cluster_detection_method": "deactivate" if address else method}


def _own_gpus(env: Mapping[str, str], here: int, local: int) -> list[int] | None:
    """This process's share of the GPUs that all on this host see; None, where there are none or it is set: JAX finds
    out. By itself JAX takes one, even where a process has the host to itself."""
    gpus = count_gpus(env)
    if not gpus or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    if gpus == 1 and "CUDA_VISIBLE_DEVICES" in env:  # the launcher has shared them out
        return [0]
    share, rest = divmod(gpus, here)
    if rest:
        hint = f"start a number that divides {gpus}"
        raise UserError(f"{here} processes cannot share this host's {gpus} GPUs evenly; {hint}")
    return list(range(local * share, (local + 1) * share))


def count_gpus(env: Mapping[str, str] = os.environ) -> int:
    """How many NVIDIA GPUs this process may use, found out without starting JAX's backends."""
    if env.get("JAX_PLATFORMS") == "cpu":
        return 0
    visible = env.get("CUDA_VISIBLE_DEVICES")
    return len(glob.glob("/dev/nvidia[0-9]*")) if visible is None else len([x for x in visible.split(",") if x])


def has_tpu() -> bool:
    """Whether this machine has TPU chips, found out without starting JAX's backends."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


class Processes:
    """A context in which the processes of a run are connected and end together; for one that runs alone, nothing.

    Within it only process 0 writes to stdout, and the others' warnings are left out. It does not return from an error
    in one of several processes: each ends with that error's status. JAXGPT_START_TIMEOUT: how many seconds to wait for
    the others, 300 by default.
    """

    def __init__(self):
        self._left, self._ending = threading.Event(), threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="processes", daemon=True)
        self._several = False

    def __enter__(self) -> "Processes":
        cluster = find_cluster()
        self._several = cluster is not None and _connect(cluster, start_timeout())
        if self._several:
            self._watcher.start()
            if joined.process_id > 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._several:
            return
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._left.set()
            self._watcher.join()
        elif isinstance(error, UserError):
            self._end(error.status, str(error))
        elif re.search(PEER_GONE, str(error)):
            self._end(1, f"another process went away: {error}")
        else:
            self._end(130 if isinstance(error, KeyboardInterrupt) else 1, f"{type(error).__name__}: {error}", error)

    def _watch(self) -> None:
        while not self._left.wait(POLL_S):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # no such key; or no coordinator: JAX deals with that
                joined.client.key_value_try_get(FAILURE)
                self._end(1, "another process failed")

    def _end(self, status: int, message: str, error: BaseException | None = None) -> None:
        """Ends this process with the first failure's cause: this one, unless another was there before."""
        self._ending.acquire()  # for good
        cause = [joined.process_id, socket.gethostname(), status, " ".join(message.split())]
        try:
            joined.client.key_value_set(FAILURE, json.dumps(cause))
        except jax.errors.JaxRuntimeError:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone
                cause = json.loads(joined.client.key_value_try_get(FAILURE))
        process, host, status, message = cause
        sys.stdout.flush()
        if process == joined.process_id and error is not None:
            traceback.print_exception(error)
        by = "" if process == joined.process_id else f"process {process} on {host}: "
        print(f"error: {by}{message}", file=sys.stderr, flush=True)
        if joined.process_id == 0:
            time.sleep(LINGER_S)
        os._exit(status)


def _connect(cluster: dict[str, Any], timeout: float) -> bool:
    """Whether there are others, with which this process is then connected; a TPU may turn out to be of no pod."""
    # JAX aborts the process when its own time is up; ours comes first and says why
    alarm = threading.Timer(timeout, _nobody_came, (timeout,))
    alarm.daemon = True
    alarm.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from guard.Stop
    try:
        jax.distributed.initialize(
            **cluster, initialization_timeout=int(timeout) + 60, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
        )
        return True
    except (RuntimeError, ValueError, OSError) as error:
        if not cluster and joined.coordinator_address is None:
            return False
        hint = "set JAX_NUM_PROCESSES=1 if it is to run alone"
        raise UserError(f"this process cannot join the others ({error}); {hint}") from None
    finally:
        alarm.cancel()


def _nobody_came(timeout: float) -> None:
    who = f"process {joined.process_id} of {joined.num_processes or 'several'}"
    at = joined.coordinator_address or ":"
    host, _, port = at.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        found = "it answers, but not all processes came: see which did not start, or started with another number"
    except (OSError, ValueError) as error:
        found = f"nothing answers there ({error}): see whether process 0 started, and its port can be reached"
    print(f"error: {who} waited {timeout:g} s for the others, coordinator {at}; {found}", file=sys.stderr, flush=True)
    os._exit(2)


def start_timeout() -> float:
    """Seconds to wait for other processes at the start."""
    text = os.environ.get("JAXGPT_START_TIMEOUT", "300")
    try:
        return float(text)
    except ValueError:
        raise UserError(f"JAXGPT_START_TIMEOUT={text} is not a number of seconds") from None


def agree(topic: str, facts: Mapping[str, Any]) -> None:
    """Returns when all processes came here with the same facts. UserError on each whose facts are not process 0's.

    Without facts: a place to wait for the slowest, before computing together: collectives themselves wait less long.
    """
    if not jax.distributed.is_initialized():
        return
    client, limit_ms = joined.client, int(1000 * start_timeout())
    ours = {"processes": str(joined.num_processes)} | {key: str(x) for key, x in facts.items()}
    if joined.process_id == 0:
        client.key_value_set(f"jaxgpt/{topic}", json.dumps(ours))
    theirs = json.loads(client.blocking_key_value_get(f"jaxgpt/{topic}", limit_ms))
    differing = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    if differing:
        shown = "; ".join(f"{key}={ours.get(key)} here, {theirs.get(key)} in process 0" for key in differing[:3])
        raise UserError(f"{shown}; start every process with the same")
    client.wait_at_barrier(f"jaxgpt/{topic}", limit_ms)
