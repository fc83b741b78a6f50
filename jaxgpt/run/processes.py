"""Several processes as one program: they find each other, agree before the first step, and end together.

jax.distributed connects them; process 0 runs its coordinator. A process that fails tells the others why through the
coordinator, and each ends itself. One that goes silent (killed, stopped, cut off) is missed by jax.distributed's
heartbeats, which then end the others.
"""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import stat
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from types import TracebackType
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed

from jaxgpt import Unavailable, UserError, user_error
from jaxgpt.console import complain, settle
from jaxgpt.run.launchers import find_cluster

joined: Any = distributed.global_state  # its client, the only way to the coordinator's keys, has no public name

HEARTBEAT_TIMEOUT_S = 40  # a silent process is given up after this: all others end within a minute
POLL_S = 1.0  # how often a process asks whether another one failed
LINGER_S = 3.0  # how long one whose end ends others lives on: three polls, so that they hear of it or tell theirs
PEER_GONE = r"(closed|reset) by peer|[Ss]ocket closed|[Bb]roken pipe"  # in what collectives raise then
FAILURE = "jaxgpt/failure"  # the coordinator's key of the first failure
LAUNCHER = "JAXGPT_LAUNCHER_PIPE"  # scripts/launch_local's: a file descriptor that closes when the launcher is gone
LAST_ACTS: list[Callable[[], None]] = []  # what a process does that another one's failure ends, as it cannot unwind
# JAX's settings that change what is computed
SETTINGS = (
    "jax_default_prng_impl", "jax_threefry_partitionable", "jax_enable_x64", "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
)  # fmt: skip
VARIABLES = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
OWN_FLAGS = "--xla_dump|--xla_force_host_platform_device_count|--xla_gpu_per_fusion_autotune_cache_dir"  # may differ


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
        _outlive_no_launcher()
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
        elif problem := user_error(error):
            self._end(problem.status, str(problem))
        elif re.search(PEER_GONE, str(error)) and not isinstance(error, OSError):  # that is a pipe of our own
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
        if process == joined.process_id and error is not None:
            traceback.print_exception(error)
        by = "" if process == joined.process_id else f"process {process} on {host}: "
        complain(f"error: {by}{message}")
        for act in LAST_ACTS[::-1]:
            with contextlib.suppress(OSError, ValueError):
                act()
        settle()
        if joined.process_id == 0:
            time.sleep(LINGER_S)
        os._exit(status)


def _outlive_no_launcher() -> None:
    """Sends this process SIGTERM, upon which it saves and stops, when its launcher is gone, even by SIGKILL."""
    try:
        pipe = int(os.environ.get(LAUNCHER, ""))
        os.set_inheritable(pipe, False)
        if pipe < 3 or not stat.S_ISFIFO(os.fstat(pipe).st_mode):
            return
    except (ValueError, OSError, OverflowError):  # no such launcher; or a process that inherited its variables alone
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _connect(cluster: dict[str, Any], timeout: float) -> bool:
    """Whether there are others, with which this process is then connected; a TPU may turn out to be of no pod."""
    # JAX aborts the process when its own time is up; ours comes first and says why
    known: dict[str, Any] = {"process_id": cluster.get("process_id")}
    alarm = threading.Timer(timeout, _nobody_came, (timeout, known))
    alarm.daemon = True
    alarm.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from guard.Stop
    try:
        known |= _resolve(cluster, timeout)
        if known["process_id"] == 0:
            _check_port(known["coordinator_address"])
        jax.distributed.initialize(
            **known,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
        return True
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        if not cluster and known.get("coordinator_address") is None:
            return False
        hint = "set JAX_NUM_PROCESSES=1 if it is to run alone"
        raise UserError(f"this process cannot join the others ({_brief(error)}); {hint}") from None
    finally:
        alarm.cancel()


def _resolve(cluster: dict[str, Any], timeout: float) -> dict[str, Any]:
    """`cluster`, and what it leaves out as JAX finds it."""
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    method = cluster.get("cluster_detection_method")
    if method == "deactivate":
        return {name: cluster.get(name) for name in names}
    told = (cluster.get(name) for name in names)
    detect: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params
    found = detect(*told, method or None, int(timeout))
    return dict(zip(names, found, strict=True))


def _check_port(address: str) -> None:
    """Raises Unavailable where another program listens at the coordinator's port: jaxlib then often crashed."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as look:
        look.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an old connection's port is free
        try:
            look.bind(("", port))
        except OSError as error:
            raise Unavailable(
                f"port {port}, the coordinator's, cannot be used on this host ({error.strerror}); stop what uses it, "
                "or choose another: JAX_COORDINATOR_PORT, or that of JAX_COORDINATOR_ADDRESS"
            ) from None


def _brief(error: Exception) -> str:
    missing = isinstance(error, KeyError) and re.fullmatch(r"'\w+'", str(error))
    return f"{str(error)[1:-1]} is not set" if missing else str(error)


def _nobody_came(timeout: float, known: Mapping[str, Any]) -> NoReturn:
    who = f"process {known.get('process_id')} of {known.get('num_processes') or 'several'}"
    at = known.get("coordinator_address") or ":"
    host, _, port = at.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        found = "it answers, but not all processes came: see which did not start, or started with another number"
    except (OSError, ValueError) as error:
        found = f"nothing answers there ({error}): see whether process 0 started, and its port can be reached"
    complain(f"error: {who} waited {timeout:g} s for the others, coordinator {at}; {found}")
    os._exit(Unavailable("").status)


def start_timeout() -> float:
    """Seconds to wait for other processes at the start."""
    text = os.environ.get("JAXGPT_START_TIMEOUT", "300")
    try:
        if 0 < float(text) < 1e6:
            return float(text)
    except ValueError:
        pass
    raise UserError(f"JAXGPT_START_TIMEOUT={text} is not a number of seconds")


def numerics() -> dict[str, Any]:
    """What decides, besides the program, the device and its inputs, what this process computes."""
    flags = sorted(x for x in os.environ.get("XLA_FLAGS", "").split() if not re.match(OWN_FLAGS, x))
    versions = {name: version(name) for name in ("jax", "jaxlib")}
    settings = {name: getattr(jax.config, name) for name in SETTINGS}
    variables = {name: os.environ.get(name) for name in VARIABLES}
    return versions | settings | variables | {"XLA_FLAGS": " ".join(flags)}


def agree(topic: str, facts: Mapping[str, Any]) -> None:
    """Returns when all processes came here with the same facts. UserError on each whose facts are not process 0's,
    Unavailable where one does not come.

    Without facts it is a barrier, before computing together: collectives themselves wait less long.
    """
    if not jax.distributed.is_initialized():
        return
    client, limit_ms = joined.client, int(1000 * start_timeout())
    ours = {"processes": str(joined.num_processes)} | {key: str(x) for key, x in facts.items()}
    try:
        if joined.process_id == 0:
            client.key_value_set(f"jaxgpt/{topic}", json.dumps(ours))
        theirs = json.loads(client.blocking_key_value_get(f"jaxgpt/{topic}", limit_ms))
        differing = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
        if differing:
            shown = "; ".join(f"{key}={ours.get(key)} here, {theirs.get(key)} in process 0" for key in differing[:3])
            raise UserError(f"{shown}; start every process with the same")
        client.wait_at_barrier(f"jaxgpt/{topic}", limit_ms)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        waited = f"waited {limit_ms / 1000:g} s for all processes to agree on {topic}"
        raise Unavailable(f"{waited}; see which is late, or give them longer: JAXGPT_START_TIMEOUT") from None
