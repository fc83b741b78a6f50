"""The processes of a run: they connect, compare their settings before the first step, and end together.

jax.distributed connects them; process 0 runs its coordinator, a key-value store. A process that fails publishes the
cause there; the others poll for it and exit. At each poll a process gives a sign of life, by a Python thread; one that
gives none for a while (killed, stopped, cut off) is lost, and the others exit. Time for which the observer itself did
not run does not count: processes that are all stopped, or whose machine is suspended, go on together.
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

from jaxgpt import Unavailable, UserError, __version__, user_error
from jaxgpt.console import complain, settle
from jaxgpt.run import coordinator
from jaxgpt.run.clock import RunClock
from jaxgpt.run.launchers import find_cluster

joined: Any = distributed.global_state  # its client, the only way to the coordinator's keys, has no public name

SILENT_S = 40.0  # a silent process is given up after this: all others end within a minute
HEARTBEAT_S = 10**6  # of JAX's own heartbeats, which count time for which all were stopped: 11 days, out of the way
POLL_S = 1.0  # how often a process asks whether another one failed, and gives its sign of life
LINGER_S = 3.0  # the delay before an exit that takes the coordinator along: three polls, for the others to learn why
STALLED = 76  # the exit status where a process is lost, as where no step is finished: see guard.Exit
# in errors of gloo's and NCCL's collectives, where a peer is gone
PEER_GONE = r"(closed|reset) by peer|[Ss]ocket closed|[Bb]roken pipe|remote process exited"
FAILURE = "jaxgpt/failure"  # the key of the first failure's cause
ALIVE = "jaxgpt/alive"  # the folder of keys with the processes' signs of life: a host's name and a count, or LEFT
LEFT = "left"  # of a process that is done and waits for the others, or is no more
LAUNCHER = "JAXGPT_LAUNCHER_PIPE"  # of scripts/launch_local: a pipe that closes when the launcher ends, however it ends
LAST_ACTS: list[Callable[[], None]] = []  # cleanup before os._exit, which another process's failure may lead to
# JAX's settings that change results
SETTINGS = (
    "jax_default_prng_impl", "jax_threefry_partitionable", "jax_enable_x64", "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
)  # fmt: skip
VARIABLES = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
# Flags that may differ between processes
OWN_FLAGS = "--xla_dump|--xla_force_host_platform_device_count|--xla_gpu_per_fusion_autotune_cache_dir"


class Processes:
    """A context in which the processes of a run are connected and end together. A process that runs alone stays as is.

    Within it process 0 alone writes to stdout, and the others log no warnings. With several processes an exception does
    not leave it: every process exits with the status of the first failure. JAXGPT_START_TIMEOUT is the number of
    seconds to wait for the others, by default 300. Raises UserError, and Unavailable where the coordinator's port is
    taken.
    """

    def __init__(self):
        self._left, self._ending, self._clock = threading.Event(), threading.Lock(), RunClock()
        self._heard: dict[int, tuple[str, float]] = {}  # each watched one's last sign, and when
        self._threads = [threading.Thread(target=x, name="processes", daemon=True) for x in (self._poll, self._watch)]
        self._several = False

    def __enter__(self) -> "Processes":
        _outlive_no_launcher()
        cluster = find_cluster()
        self._several = cluster is not None and _connect(cluster, start_timeout(), self._lose_coordinator)
        if self._several:
            watched = range(1, joined.num_processes) if joined.process_id == 0 else [0]
            self._heard = dict.fromkeys(watched, ("", self._clock.now()))
            for thread in self._threads:
                thread.start()
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
            for thread in self._threads:
                thread.join(SILENT_S)
        elif problem := user_error(error):
            self._end(problem.status, str(problem))
        elif re.search(PEER_GONE, str(error)) and not isinstance(error, OSError):  # that is a pipe of our own
            self._end(STALLED, f"another process went away: {error}")
        else:
            self._end(130 if isinstance(error, KeyboardInterrupt) else 1, f"{type(error).__name__}: {error}", error)

    def _poll(self) -> None:
        """Each second: a sign of life, the others' signs, and whether one of them failed. The coordinator may keep it
        waiting for good, which `_watch` notices."""
        client, count, left = joined.client, 0, False
        while not left:
            left, count = self._left.wait(POLL_S), count + 1
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # no such key; or no coordinator: JAX ends us
                sign = LEFT if left else f"{socket.gethostname()} {count}"
                client.key_value_set(f"{ALIVE}/{joined.process_id}", sign, allow_overwrite=True)
                signs = client.key_value_dir_get(ALIVE) if joined.process_id == 0 else [("0", sign)]  # it answers
                for process, sign in ((int(key.rpartition("/")[2]), sign) for key, sign in signs):
                    if process in self._heard and self._heard[process][0] != sign:
                        self._heard[process] = sign, self._clock.now()
                if not left:
                    client.key_value_try_get(FAILURE)
                    self._end(1, "another process failed")

    def _watch(self) -> None:
        """Ends this process when another one is lost."""
        while not self._clock.wait(self._left, POLL_S):
            for process, (sign, at) in self._heard.items():
                if sign != LEFT and self._clock.now() - at > SILENT_S:
                    on = f" on {sign.partition(' ')[0]}" if sign and process else ""
                    why = f"gave no sign of life for {SILENT_S:.0f} s: it was killed, stopped or cut off"
                    self._end(STALLED, f"process {process}{on} {why}", publish=process > 0)

    def _lose_coordinator(self) -> None:
        """By a thread of JAX's client, when its connection breaks."""
        late = threading.Timer(LINGER_S, os._exit, (STALLED,))  # should another thread be ending this process, in vain
        late.daemon = True
        late.start()
        at = joined.coordinator_address
        self._end(STALLED, f"process 0 went away (the coordinator, {at}): it ended or was cut off", publish=False)

    def _end(self, status: int, message: str, error: BaseException | None = None, publish: bool = True) -> None:
        """Exits with the cause of the first failure: this one, unless another process has published its own.

        publish: False where the coordinator does not answer.
        """
        self._ending.acquire()  # for good
        cause = [joined.process_id, socket.gethostname(), status, " ".join(message.split())]
        try:
            if publish:
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
    """When the launcher is gone, even by SIGKILL, has this process save and stop: by SIGTERM, from a thread."""
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


def _connect(cluster: dict[str, Any], timeout: float, lost: Callable[[], object] = os.abort) -> bool:
    """Connects this process to the others. False where there are none: a TPU need not belong to a pod. lost: called by
    a thread when the coordinator is lost."""
    # JAX aborts the process when its own time is up; ours comes first and says why
    known: dict[str, Any] = {"process_id": cluster.get("process_id")}
    alarm = threading.Timer(timeout, _nobody_came, (timeout, known))
    alarm.daemon = True
    alarm.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from guard.Stop
    try:
        known |= _resolve(cluster, timeout)
        if None not in (known["coordinator_address"], known["num_processes"], known["process_id"]):
            _check_numbers(known["coordinator_address"], known["num_processes"], known["process_id"])
        if known["process_id"] == 0:
            _check_port(known["coordinator_address"])
        with coordinator.watched(lost):
            jax.distributed.initialize(
                **known,
                cluster_detection_method="deactivate",
                initialization_timeout=int(timeout) + 60,
                heartbeat_timeout_seconds=HEARTBEAT_S,
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
    """All arguments of jax.distributed.initialize: those of `cluster`, completed by JAX's detection."""
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    method = cluster.get("cluster_detection_method")
    if method == "deactivate":
        return {name: cluster.get(name) for name in names}
    logging.getLogger("jax._src.clusters.cluster").setLevel(logging.CRITICAL)  # what it finds missing is in our error
    told = (cluster.get(name) for name in names)
    detect: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params
    found = detect(*told, method or None, int(timeout))
    return dict(zip(names, found, strict=True))


def _check_numbers(address: str, count: int, index: int) -> None:
    """Raises UserError on numbers that JAX would wait for, or crash at."""
    port = address.rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"the coordinator's address, {address}, does not end in a port, 1 to 65535; mend it")
    if index >= count:
        raise UserError(f"this is process {index} of {count}, and they are counted from 0; mend its number")


def _check_port(address: str) -> None:
    """Raises UserError where there is no such port of the coordinator, Unavailable where another program listens there:
    jaxlib then often crashed."""
    port = int(address.rpartition(":")[2])
    if port >= 2**16:
        raise UserError(f"port {port}, the coordinator's, must be below 65536; choose another")
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
    """Exits as Unavailable after a start that took `timeout` seconds, saying whether the coordinator can be reached."""
    who = f"process {known.get('process_id')} of {known.get('num_processes') or 'several'}"
    at = known.get("coordinator_address") or ":"
    host, _, port = at.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()  # of IPv6
        found = "it answers, but not all processes came: see which did not start, or started with another number"
    except (OSError, ValueError) as error:
        found = f"nothing answers there ({error}): see whether process 0 started, and its port can be reached"
    complain(f"error: {who} waited {timeout:g} s for the others, coordinator {at}; {found}")
    os._exit(Unavailable("").status)


def start_timeout() -> float:
    """Seconds to wait for other processes at the start. Raises UserError where the variable is no number."""
    text = os.environ.get("JAXGPT_START_TIMEOUT", "300")
    try:
        if 0 < float(text) < 1e6:
            return float(text)
    except ValueError:
        pass
    raise UserError(f"JAXGPT_START_TIMEOUT={text} is not a number of seconds")


def numerics() -> dict[str, Any]:
    """What decides, besides its config, its device and its data, what this process computes."""
    flags = sorted(x for x in os.environ.get("XLA_FLAGS", "").split() if not re.match(OWN_FLAGS, x))
    versions = {"jaxgpt": __version__} | {name: version(name) for name in ("jax", "jaxlib", "optax")}
    settings = {name: getattr(jax.config, name) for name in SETTINGS}
    variables = {name: os.environ.get(name) for name in VARIABLES}
    return versions | settings | variables | {"XLA_FLAGS": " ".join(flags)}


def least(topic: str, value: int) -> int:
    """The smallest of the values that the processes give for a topic, the same in each; a barrier, as `agree`."""
    if not jax.distributed.is_initialized():
        return value
    client, limit_ms = joined.client, int(1000 * start_timeout())
    key = f"jaxgpt/least/{topic}"
    try:
        client.key_value_set(f"{key}/{joined.process_id}", str(int(value)))
        return min(int(client.blocking_key_value_get(f"{key}/{i}", limit_ms)) for i in range(joined.num_processes))
    except jax.errors.JaxRuntimeError as error:
        raise _late(error, topic, limit_ms) from None


def _late(error: Exception, topic: str, limit_ms: int) -> Exception:
    """What to raise where a process did not come to an agreement: the error itself, unless it is that."""
    if "DEADLINE_EXCEEDED" not in str(error):
        return error
    waited = f"waited {limit_ms / 1000:g} s for all processes to agree on {topic}"
    return Unavailable(f"{waited}; see which is late, or give them longer: JAXGPT_START_TIMEOUT")


def agree(topic: str, facts: Mapping[str, Any]) -> None:
    """A barrier at which every process compares `facts` with process 0's; {}: a plain barrier.

    Raises UserError where they differ, Unavailable where a process does not arrive within the start's timeout. It
    belongs between work that takes processes differently long, as compiling, and collectives, which wait less long.
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
        raise _late(error, topic, limit_ms) from None
