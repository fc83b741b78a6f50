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
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed

from jaxgpt import UserError
from jaxgpt.run.launchers import find_cluster

joined: Any = distributed.global_state  # its client, the only way to the coordinator's keys, has no public name

HEARTBEAT_TIMEOUT_S = 40  # a silent process is given up after this: all others end within a minute
POLL_S = 1.0  # how often a process asks whether another one failed
LINGER_S = 3.0  # how long one whose end ends others lives on, so that they hear of it, or tell theirs
PEER_GONE = r"(closed|reset) by peer|[Ss]ocket closed|[Bb]roken pipe"  # in what collectives raise then
FAILURE = "jaxgpt/failure"  # the coordinator's key of the first failure


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
