"""What each launcher's variables lead to, through JAX's own detection, nothing started: test_multiprocess.py does."""

import importlib.util
import os
import socket
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest
from jax._src import distributed
from jax._src.clusters import cloud_tpu_cluster, cluster, k8s_cluster

from jaxgpt import Unavailable, UserError
from jaxgpt.run import digests, launchers, processes
from jaxgpt.run.launchers import count_gpus, find_cluster
from jaxgpt.run.processes import Processes, agree, least

LAUNCHERS = ("JAX_", "OMPI_", "PMIX_", "SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "TORCHELASTIC_", "JOB_COMPLETION")
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def connect(monkeypatch):
    """connect(variables, gpus): the (processes, index, coordinator, device ids) that JAX ends up with; None: alone."""

    def resolve(variables, gpus=0):
        for name in list(os.environ):
            if name.startswith(LAUNCHERS) or name in TORCH:
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        if "CUDA_VISIBLE_DEVICES" not in variables:
            monkeypatch.setattr(launchers.glob, "glob", lambda pattern: [""] * gpus if "nvidia" in pattern else [])
        kwargs = find_cluster()
        if kwargs is None:
            return None
        state, config = distributed.State(), MagicMock()
        monkeypatch.setattr(distributed, "_jax", MagicMock())
        monkeypatch.setattr(distributed, "config", config)
        state.initialize(**kwargs)
        visible = [call.args[1] for call in config.update.call_args_list if "cuda" in call.args[0]]
        return state.num_processes, state.process_id, state.coordinator_address, *visible

    return resolve


def slurm(index, *, tasks, nodes, per_node, step="gpu[017-018,021]"):
    local = {"SLURM_LOCALID": index % per_node, "SLURM_NODEID": index // per_node}
    counts = {"SLURM_NTASKS": tasks, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_NUM_NODES": nodes}
    shape = {"SLURM_STEP_NODELIST": step, "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})"}
    return {"SLURM_JOB_ID": 5000, "SLURM_PROCID": index} | local | counts | shape


def test_slurm_one_process_a_node(connect):
    """It gets all of the node's GPUs, where JAX by itself would take one."""
    port = 5000 % 4096 + 61440
    assert connect(slurm(1, tasks=2, nodes=2, per_node=1), gpus=8) == (2, 1, f"gpu017:{port}", "0,1,2,3,4,5,6,7")


def test_slurm_one_process_a_gpu(connect):
    found = connect(slurm(5, tasks=8, nodes=2, per_node=4), gpus=4)
    assert found == (8, 5, "gpu017:62344", "1")
    # --gpus-per-task=1: each sees its own alone, as number 0
    assert connect(slurm(5, tasks=8, nodes=2, per_node=4) | {"CUDA_VISIBLE_DEVICES": "3"})[3] == "0"
    assert connect(slurm(3, tasks=4, nodes=2, per_node=2), gpus=8)[3] == "4,5,6,7"
    with pytest.raises(UserError, match="3 processes cannot share this host's 8 GPUs evenly"):
        connect(slurm(0, tasks=3, nodes=1, per_node=3), gpus=8)


def test_slurm_without_several_tasks_is_alone(connect):
    assert connect(slurm(0, tasks=1, nodes=1, per_node=1), gpus=8) is None
    assert connect({"SLURM_JOB_ID": 7, "SLURM_PROCID": 0, "SLURM_NTASKS": 4}) is None, "a batch script without srun"
    # an interactive shell: the job has four tasks, the step one
    assert connect(slurm(0, tasks=4, nodes=1, per_node=4) | {"SLURM_STEP_NUM_TASKS": 1}) is None
    assert connect(slurm(1, tasks=2, nodes=2, per_node=1) | {"JAX_NUM_PROCESSES": 1}) is None


def open_mpi(index, **more):
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    return {f"OMPI_COMM_WORLD_{name}": x for name, x in zip(names, (4, index, 2, index % 2), strict=True)} | more


def test_open_mpi(connect):
    """Variables as Open MPI 4.1.8 and 5.0.11 set them."""
    four = open_mpi(3, OMPI_MCA_orte_hnp_uri="368836608.0;tcp://192.0.2.2:54863;tcp6://[fd00::2]:54877")
    assert connect(four, gpus=2) == (4, 3, f"192.0.2.2:{61440 + 368836608 // 4096 % 4096}", "1")
    five = open_mpi(2, OMPI_VERSION="5.0.11", PMIX_NAMESPACE="prterun-node-1-7268@1")
    assert connect(five, gpus=2) == (4, 2, f"node-1:{61440 + 7268 % 4096}", "0")
    assert connect(five | {"JAX_COORDINATOR_PORT": "1234"})[2] == "node-1:1234"
    assert connect(five | slurm(0, tasks=2, nodes=2, per_node=1))[:2] == (4, 2), "mpirun inside a SLURM job"


def test_torchrun(connect):
    variables = {
        "RANK": 5,
        "WORLD_SIZE": 8,
        "LOCAL_RANK": 1,
        "LOCAL_WORLD_SIZE": 4,
        "MASTER_ADDR": "a",
        "MASTER_PORT": 29500,
    }
    assert connect(variables, gpus=4) == (8, 5, "a:29500", "1")
    assert connect(variables | {"TORCHELASTIC_RUN_ID": "none"})[2] == "a:29501", "its agent listens at MASTER_PORT"
    assert connect(variables | slurm(1, tasks=2, nodes=2, per_node=1))[:2] == (8, 5), "torchrun inside a SLURM job"
    assert connect({k: v for k, v in variables.items() if "LOCAL" not in k}, gpus=4)[3] == "0,1,2,3"
    assert connect(variables | {"WORLD_SIZE": 1}) is None
    with pytest.raises(UserError, match="WORLD_SIZE is not set"):
        connect({k: v for k, v in variables.items() if k != "WORLD_SIZE"})


def test_explicit(connect):
    variables = {
        "JAX_COORDINATOR_ADDRESS": "h:1",
        "JAX_NUM_PROCESSES": 3,
        "JAX_PROCESS_ID": 2,
        "JAX_LOCAL_DEVICE_IDS": "2,3",
    }
    assert connect(variables) == (3, 2, "h:1", "2,3")
    with pytest.raises(UserError, match="JAX_PROCESS_ID is not set"):
        connect({k: v for k, v in variables.items() if k != "JAX_PROCESS_ID"})
    with pytest.raises(UserError, match="not JAX_COORDINATOR_ADDRESS; set it to HOST:PORT of process 0"):
        connect({k: v for k, v in variables.items() if k != "JAX_COORDINATOR_ADDRESS"})
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'two', not a number"):
        connect(variables | {"JAX_NUM_PROCESSES": "two"})


@pytest.fixture
def tpu(monkeypatch):
    """A machine with TPU chips and libtpu."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "libtpu" or find_spec(name, *a))
    monkeypatch.setattr(launchers, "has_tpu", lambda: True)
    for module in (cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)


def test_tpu_pod_on_kubernetes(connect, tpu):
    hosts = {"TPU_WORKER_HOSTNAMES": "localhost,127.0.0.2,127.0.0.3,127.0.0.4", "TPU_SKIP_MDS_QUERY": "true"}
    one_slice = hosts | {"TPU_WORKER_ID": 2, "MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "1"}
    assert connect(one_slice | {"MEGASCALE_SLICE_ID": "0"}) == (4, 2, "localhost:8482")
    two = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080"}
    assert connect(one_slice | two) == (8, 6, "localhost:8482")
    assert connect({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": 0}) is None, "one host"


def test_tpu_pod_on_compute_engine(connect, tpu, monkeypatch):
    metadata = {
        "agent-worker-number": "3",
        "worker-network-endpoints": "u:0:127.0.0.1,u:1:b,u:2:c,u:3:d",
        "tpu-env": "",
    }
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    assert connect({}) == (4, 3, "127.0.0.1:8482")
    assert connect({"TPU_SKIP_MDS_QUERY": "1"}) is None


def test_kubernetes(connect, monkeypatch):
    """An indexed Job of four pods with a headless service, as its API describes it."""
    metadata = SimpleNamespace(name="jaxgpt", labels={})
    job = SimpleNamespace(metadata=metadata, spec=SimpleNamespace(parallelism=4))
    fakes = {"is_env_present": lambda: True, "_job": lambda: job, "_controller": lambda: SimpleNamespace(kind="Job")}
    fakes["_pod"] = lambda: SimpleNamespace(spec=SimpleNamespace(subdomain="peers"))
    for name, value in fakes.items():
        monkeypatch.setattr(k8s_cluster.K8sCluster, name, value)
    monkeypatch.setattr(k8s_cluster.socket, "gethostbyname", lambda host: "127.0.0.1")
    variables = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name == "kubernetes" else None)
    assert connect(variables, gpus=8) == (4, 3, "jaxgpt-0.peers:55527"), "a pod has its GPUs to itself"
    assert connect({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None, "a pod of no Job"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(UserError, match="needs pip install kubernetes; set JAX_NUM_PROCESSES=1"):
        connect(variables)
    assert connect(variables | {"JAX_NUM_PROCESSES": 1}) is None


def test_a_plain_machine_is_alone(connect, monkeypatch):
    assert connect({}, gpus=8) is None
    with Processes():  # does nothing, and does not swallow what is raised
        assert not jax.distributed.is_initialized()
        agree("anything", {"a": 1})
    with pytest.raises(KeyError), Processes():
        raise KeyError


def test_the_least_of_all_processes_values(monkeypatch):
    """This is process 1 of two; the coordinator's store holds what process 0 gave, or not yet."""
    held = {"jaxgpt/least/memory/0": "5", "jaxgpt/least/room/0": "-1"}

    def get(name, timeout_ms):
        if name not in held:
            raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: no {name} within {timeout_ms} ms")
        return held[name]

    assert least("memory", 7) == 7
    client = SimpleNamespace(key_value_set=held.__setitem__, blocking_key_value_get=get)
    monkeypatch.setattr(processes, "joined", SimpleNamespace(client=client, process_id=1, num_processes=2))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert least("memory", 7) == 5 and held["jaxgpt/least/memory/1"] == "7"
    assert least("room", True) == -1
    with pytest.raises(Unavailable, match="for all processes to agree on late; see which is late"):
        least("late", 3)


@pytest.mark.parametrize("visible, gpus", [("", 0), ("0", 1), ("2,3", 2), ("GPU-8932f937,MIG-1", 2)])
def test_visible_gpus_are_counted(visible, gpus):
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}) == gpus
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible, "JAX_PLATFORMS": "cpu"}) == 0


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": 0, "JAX_COORDINATOR_ADDRESS": "host"}, "host is not HOST:PORT"),
        (
            {"JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": 2, "JAX_COORDINATOR_ADDRESS": "host:1"},
            "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2",
        ),
        ({"OMPI_COMM_WORLD_RANK": 0}, "OMPI_COMM_WORLD_SIZE is not set; .* JAX_NUM_PROCESSES=1 to run alone"),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": 0}, "SLURM_STEP_NUM_TASKS is not set"),
        ({"RANK": 3, "MASTER_ADDR": "a", "MASTER_PORT": 1, "WORLD_SIZE": 2}, "make this process 3 of 2"),
        ({"RANK": "9" * 5000, "MASTER_ADDR": "a", "MASTER_PORT": 1, "WORLD_SIZE": 2}, "not a number"),
        (
            {"RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1, "WORLD_SIZE": 2, "JAX_COORDINATOR_PORT": "x"},
            "JAX_COORDINATOR_PORT is 'x', not a number",
        ),
    ],
)
def test_variables_that_are_half_set_are_one_line(connect, variables, message):
    with pytest.raises(UserError, match=message):
        connect(variables)


def test_a_coordinators_port_that_is_taken_is_one_line():
    """jaxlib crashed there in 7 of 20 starts."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"port {port}, the coordinator's, cannot be used on this host"):
            processes._check_port(f"here:{port}")
    processes._check_port(f"here:{port}")
    with pytest.raises(UserError, match="port 65536, the coordinator's, must be below 65536"):
        processes._check_port("here:65536")


@pytest.mark.parametrize(
    "address, index, message",
    [("h:0", 0, "a port, 1 to 65535"), ("h:70000", 1, "a port, 1 to 65535"), ("h:1", 2, "this is process 2 of 2")],
)
def test_numbers_that_cannot_be_are_one_line(monkeypatch, address, index, message):
    cluster = {"coordinator_address": address, "num_processes": 2, "process_id": index}
    with pytest.raises(UserError, match=message):
        processes._connect(cluster | {"cluster_detection_method": "deactivate"}, 9.0)


def test_what_differs_between_processes_is_named(monkeypatch):
    sums = {"a": "0123456789abcdef", "b": "00000000ffffffff"}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for bad in ([], ["b"], ["a", "b"]):

        def gather(table, bad=bad):
            other = table.copy()
            other[[list(sums).index(name) for name in bad]] ^= 1
            return np.stack([table, table, other])

        monkeypatch.setattr(digests.multihost_utils, "process_allgather", gather)
        assert digests.differing(sums) == bad


def test_numerics_name_what_changes_results_and_leave_out_what_is_each_hosts_own(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true --xla_dump_to=/tmp/x")
    found = processes.numerics()
    assert found["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true" and found["jax"] == jax.__version__
    with jax.enable_x64(not found["jax_enable_x64"]):
        assert processes.numerics()["jax_enable_x64"] != found["jax_enable_x64"]


def test_start_timeout_must_be_a_number(monkeypatch):
    monkeypatch.setenv("JAXGPT_START_TIMEOUT", "soon")
    with pytest.raises(UserError, match="JAXGPT_START_TIMEOUT=soon is not a number of seconds"):
        processes.start_timeout()
