"""Finds a run's processes by their launcher's variables: torchrun, Open MPI, SLURM, TPU pods, Kubernetes Jobs, ours."""

import glob
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxgpt import UserError

# Variables: the number of processes, this one's index; the number on this host, this one's index there
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID")  # the third is the host's index


def find_cluster(env: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """The arguments of jax.distributed.initialize; None for a process that runs alone.

    The first launcher whose variables are set counts: JAX_NUM_PROCESSES with JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS
    (JAX_NUM_PROCESSES=1: alone, whatever else is set); torchrun; Open MPI; SLURM; a TPU pod; an indexed Kubernetes Job.
    JAX detects the arguments that are missing. Processes of one host get equal shares of its GPUs.

    Raises UserError where a variable is missing, is no number or contradicts another, and where the processes of a host
    cannot share its GPUs equally.
    """
    if "JAX_NUM_PROCESSES" in env or "JAX_PROCESS_ID" in env:
        count = _number(env, "JAX_NUM_PROCESSES")
        if count == 1:
            return None
        if not (address := env.get("JAX_COORDINATOR_ADDRESS")):
            hint = "set it to HOST:PORT of process 0"
            raise UserError(f"JAX_NUM_PROCESSES is set but not JAX_COORDINATOR_ADDRESS; {hint}")
        if not re.fullmatch(r".+:[0-9]{1,5}", address):
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address} is not HOST:PORT of process 0")
        index = _number(env, "JAX_PROCESS_ID")
        if index >= count:
            raise UserError(f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}; mend them, or unset both")
        known = {"num_processes": count, "process_id": index}
        return known | {"coordinator_address": address, "cluster_detection_method": "deactivate"}

    if "RANK" in env and "MASTER_ADDR" in env:
        env = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", **env}  # some set no more than the four of the whole
        port = _number(env, "MASTER_PORT") + ("TORCHELASTIC_RUN_ID" in env)  # at MASTER_PORT torchrun's agent listens
        address = f"{env['MASTER_ADDR']}:{_port(env, port)}"
        return _cluster(env, (_number(env, name) for name in TORCHRUN), address)

    if "OMPI_COMM_WORLD_RANK" in env:
        address = None
        if launcher := re.fullmatch(r"prterun-(.+)-(\d+)@\d+", env.get("PMIX_NAMESPACE", "")):  # Open MPI 5
            address = f"{launcher[1]}:{_port(env, 61440 + int(launcher[2][-9:]) % 4096)}"
        return _cluster(env, (_number(env, name) for name in OPEN_MPI), address, "ompi")

    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        count, index, node, local = (_number(env, name) for name in SLURM)
        runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # 8(x2),4 is 8, 8, 4
        tasks = [int(n[:9]) for n, times in runs for _ in range(int((times or "1")[:6]))] or [1]
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
    """The number in a variable. Raises UserError where there is none."""
    if not re.fullmatch(r"[0-9]{1,9}", env.get(name, "")):
        found = f"is {env[name][:80]!r}, not a number" if name in env else "is not set"
        hint = "set them all, or none, or JAX_NUM_PROCESSES=1 to run alone"
        raise UserError(f"{name} {found}; the launcher's other variables are there: {hint}")
    return int(env[name])


def _port(env: Mapping[str, str], default: int) -> int:
    """The coordinator's port."""
    return _number(env, "JAX_COORDINATOR_PORT") if "JAX_COORDINATOR_PORT" in env else default


def _cluster(
    env: Mapping[str, str], numbers: Iterable[int], address: str | None = None, method: str = ""
) -> dict[str, Any] | None:
    """The arguments, of which `numbers` are the four above. Without an address JAX finds it by its `method`."""
    count, index, here, local = numbers
    if count == 1:
        return None
    if not (index < count and local < max(here, 1)):
        raise UserError(
            f"the launcher's variables make this process {index} of {count}, {local} of {here} on its host; mend them, "
            "or set JAX_NUM_PROCESSES=1 to run alone"
        )
    known = {"num_processes": count, "process_id": index, "local_device_ids": _own_gpus(env, here, local)}
    return known | {"coordinator_address": address, "cluster_detection_method": "deactivate" if address else method}


def _own_gpus(env: Mapping[str, str], here: int, local: int) -> list[int] | None:
    """Indices of this process's GPUs: its share of those that all processes of the host see. None leaves it to JAX:
    without GPUs, or where JAX_LOCAL_DEVICE_IDS says. (JAX's default is one, also for a process alone on its host.)"""
    gpus = count_gpus(env)
    if not gpus or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    if gpus == 1 and "CUDA_VISIBLE_DEVICES" in env:  # the launcher has shared them out
        return [0]
    share, rest = divmod(gpus, max(here, 1))
    if rest:
        hint = f"start a number that divides {gpus}"
        raise UserError(f"{here} processes cannot share this host's {gpus} GPUs evenly; {hint}")
    return list(range(local * share, (local + 1) * share))


def count_gpus(env: Mapping[str, str] = os.environ) -> int:
    """The number of NVIDIA GPUs this process may use. Starts no backend of JAX."""
    if env.get("JAX_PLATFORMS") == "cpu":
        return 0
    visible = env.get("CUDA_VISIBLE_DEVICES")
    return len(glob.glob("/dev/nvidia[0-9]*")) if visible is None else len([x for x in visible.split(",") if x])


def has_tpu() -> bool:
    """Whether this machine has TPU chips. Starts no backend of JAX."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
