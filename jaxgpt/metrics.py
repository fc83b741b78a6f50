"""What a run reports: FLOPs and MFU; console lines, metrics.jsonl, events.jsonl, and its trackers."""

import contextlib
import json
import logging
import math
import os
import platform
import shlex
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxgpt import FULL, Unavailable, UserError, __version__
from jaxgpt.console import say
from jaxgpt.store import AnyPath, Appender, append
from jaxgpt.trackers import Tracker, chosen, seconds_so_far

log = logging.getLogger(__name__)

# Dense bf16 FLOP/s of one device by `device_kind`; the makers' data sheets
PEAK_FLOPS = {
    "NVIDIA V100": 125e12,  # fp16
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}

PEAK_BYTES = {  # bytes/s of device memory, likewise
    "NVIDIA V100": 900e9,
    "Tesla V100": 900e9,
    "Tesla T4": 320e9,
    "NVIDIA A10": 600e9,
    "NVIDIA A100-SXM4-40GB": 1555e9,
    "NVIDIA A100-SXM4-80GB": 2039e9,
    "NVIDIA L4": 300e9,
    "NVIDIA L40": 864e9,
    "NVIDIA H100": 3350e9,
    "NVIDIA H200": 4800e9,
    "NVIDIA GH200": 4000e9,
    "NVIDIA B200": 8000e9,
    "TPU v4": 1228e9,  # TPUs: cloud.google.com/tpu/docs/v4, …/v5e, …/v5p, …/v6e
    "TPU v5 lite": 819e9,
    "TPU v5e": 819e9,
    "TPU v5": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU v6e": 1640e9,
}

MEMORY_GIB = {  # of device memory, likewise; of NVIDIA's less what the driver keeps for itself (nvidia-smi)
    "Tesla V100": 15.8,
    "Tesla T4": 15.0,
    "NVIDIA A10": 22.5,
    "NVIDIA A100-SXM4-40GB": 40.0,
    "NVIDIA A100-SXM4-80GB": 80.0,
    "NVIDIA L4": 22.5,
    "NVIDIA L40": 45.0,
    "NVIDIA H100": 79.6,
    "NVIDIA H200": 140.4,
    "NVIDIA GH200": 95.6,
    "NVIDIA B200": 179.1,
    "TPU v4": 32.0,
    "TPU v5 lite": 16.0,
    "TPU v5e": 16.0,
    "TPU v5": 95.0,
    "TPU v6 lite": 32.0,
    "TPU v6e": 32.0,
}


def perplexity(loss: float) -> float:
    """exp(loss), held finite: JSON has no infinity."""
    return math.exp(min(loss, 700.0))


def peak_flops(device: Any) -> float | None:
    """The jax.Device's dense bf16 FLOP/s, or None where it is not known (a CPU)."""
    return _of_kind(PEAK_FLOPS, device)


def peak_bytes(device: Any) -> float | None:
    """The bytes/s of the jax.Device's memory, or None where it is not known."""
    return _of_kind(PEAK_BYTES, device)


def memory_gib(device: Any) -> float | None:
    """The jax.Device's memory in GiB, or None where it is not known."""
    return _of_kind(MEMORY_GIB, device)


def _of_kind(peaks: dict[str, float], device: Any) -> float | None:
    known = [name for name in peaks if device.device_kind.startswith(name)]
    return peaks[max(known, key=len)] if known else None


def peak_memory_gib() -> float:
    """Peak memory in GiB in use on the first device, 0 where the device does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 2**30


def environment() -> dict[str, Any]:
    """Where and with what this process runs: versions, command, host, devices, git revision of the working folder."""
    found: dict[str, Any] = {"jaxgpt": __version__, "python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        found[package] = version(package)
    found["command"] = shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])
    found |= {"folder": os.getcwd(), "host": socket.gethostname()}
    found |= {"devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}"}
    found["processes"] = jax.process_count()
    checkout = Path(__file__).parents[1]
    if (checkout / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = partial(subprocess.check_output, cwd=checkout, text=True, stderr=subprocess.DEVNULL, timeout=10)
            changed = " (changed)" if git(["git", "status", "--porcelain", "--untracked-files=no"]).strip() else ""
            found["git"] = git(["git", "rev-parse", "HEAD"]).strip() + changed
    return found | {"started": datetime.now(UTC).isoformat(timespec="seconds")}


_waiter = ThreadPoolExecutor(1, "when_done")


def when_done(arrays: Any) -> Future[float]:
    """When these arrays are computed, in perf_counter's seconds, by a thread that waits for them.

    The host's time between two calls says something else: a call keeps its caller where the device's queue is full, and
    comes back when a step of many kernels, as of many micro-steps, is nearly done.
    """

    def wait() -> float:
        jax.block_until_ready(arrays)
        return time.perf_counter()

    return _waiter.submit(wait)


class Stopwatch:
    """Times steps: each call of `lap` gives the speed since the one before. Seconds are perf_counter's."""

    def __init__(self, flops_per_step: float, tokens_per_step: int):
        self._flops, self._tokens = flops_per_step, tokens_per_step
        peak = peak_flops(jax.devices()[0])
        self._peak = peak and peak * jax.device_count()
        self._last: tuple[int, float] | None = None

    def lap(self, step: int, done: float) -> dict[str, float]:
        """step_ms, tokens_per_s and (if the peak is known) mfu of the steps since the last lap; empty on the first.

        done: when the step was (when_done).
        """
        last, self._last = self._last, (step, done)
        if last is None or step <= last[0]:
            return {}
        return self.speed((done - last[1]) / (step - last[0]))

    def speed(self, seconds: float) -> dict[str, float]:
        """The same of steps that take so long."""
        speed = {"step_ms": 1e3 * seconds, "tokens_per_s": self._tokens / seconds}
        return speed | ({"mfu": self._flops / seconds / self._peak} if self._peak else {})

    def pause(self) -> None:
        """Leaves out what comes before the next lap: an evaluation or a compilation."""
        self._last = None


def bar_hidden() -> bool | None:
    """tqdm's `disable`: True hides a progress bar, None shows it where stderr is a terminal."""
    if jax.process_index():
        return True
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stdout without a file
        # in `train … | tee log` lines come to the terminal through a pipe, and a bar would tear them
        if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            return True
    return None


class Reporter:
    """Writes a run's metrics wherever they go; on other processes than the first, nowhere.

    metrics.jsonl gets one object a line, with the tokens and seconds of the run so far; events.jsonl what happened to
    the run, over all its lives; samples.jsonl the text that it wrote. All are opened at the start: in a folder that is
    moved they go along, and nothing is added to a new run's at the old path. What fails here is said once, and the run
    goes on. Secrets never pass here: trackers read their own environment variables.

    tokens: how many tokens have been read by a step. run_id: the run's identity, by which W&B knows it again. lines: of
    metrics.jsonl, as the run starts.
    """

    def __init__(
        self,
        folder: AnyPath,
        config: ConfigDict,
        *,
        first_step: int,
        tokens: Callable[[int], int] = lambda step: 0,
        run_id: str = "",
        lines: int = 0,
    ):
        self.lines = lines  # of metrics.jsonl
        self._file: IO[str] | Appender | None = None
        self._events: IO[str] | Appender | None = None
        self._samples: IO[str] | Appender | None = None
        self._trackers: dict[str, Tracker] = {}
        self._tokens, self._failed = tokens, set[str]()
        self._closing = contextlib.ExitStack()
        hidden = bar_hidden()
        style = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.1, "disable": hidden}
        self._bar = tqdm(total=config.max_iters, initial=first_step, **style)
        self._closing.enter_context(self._surviving("the progress bar"))  # its end, too
        self._closing.callback(self._bar.close)
        if jax.process_index():
            return
        for tracker in chosen(config):
            self._trackers[tracker.name] = started = tracker(folder, config, run_id)
            self._closing.enter_context(self._surviving(tracker.name))
            self._closing.callback(started.close)
        self._began = time.monotonic() - seconds_so_far(folder / "metrics.jsonl")
        self._closing.enter_context(contextlib.suppress(OSError))  # of a full disk, which `record` has told of
        self._events = self._open(folder / "events.jsonl")
        self._file = self._open(folder / "metrics.jsonl")
        if config.sample_interval:
            self._samples = self._open(folder / "samples.jsonl")

    def _open(self, path: AnyPath) -> IO[str] | Appender:
        try:
            return self._closing.enter_context(append(path))
        except OSError as error:
            text, full = f"{path} cannot be written: {error.strerror or error}", error.errno in FULL
            raise Unavailable(f"{text}; make room") if full else UserError(f"{text}; move it away") from None

    def say(self, line: str) -> None:
        """Prints a line for people, above the progress bar."""
        if not self._file:
            return
        if self._bar.disable:
            say(line)
            return
        with self._surviving("the progress bar"):
            self._bar.clear()
        say(line)
        with self._surviving("the progress bar"):
            self._bar.refresh()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes one object of metrics for `step` to metrics.jsonl and the trackers."""
        if not self._file:
            return
        values = {**values, "tokens": self._tokens(step), "wall_s": round(time.monotonic() - self._began, 3)}
        row = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        with self._surviving("metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
            self.lines += 1
        numbers = {k: v for k, v in row.items() if v is not None}
        for name, tracker in self._trackers.items():
            if name not in self._failed:
                with self._surviving(name):
                    tracker.add(step, numbers, time.time())

    def sync(self) -> None:
        """Returns when the lines of metrics.jsonl so far are in the store, if they go to one. Raises OSError."""
        if isinstance(self._file, Appender):
            self._file.sync()

    def event(self, step: int, event: str, detail: str = "") -> None:
        """Writes to events.jsonl what happened to the run at `step`: `saved`, `stopped`. detail: a line for people."""
        if not self._events:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._surviving("events.jsonl"):
            row = {"time": now, "step": step, "event": event} | ({"detail": detail} if detail else {})
            self._events.write(json.dumps(row) + "\n")
            self._events.flush()

    def saved(self, step: int, info: dict[str, Any]) -> None:
        """A checkpoint is on disk; any thread may tell."""
        detail = "the best so far" if info.get("best_step") == step else ""
        self.say(f"step {step}: saved" + (f", {detail}" if detail else ""))
        self.event(step, "saved", detail)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Shows text that the model wrote, and keeps it in samples.jsonl."""
        self.say(f"step {step}: sample\n{text}\n---")
        if self._samples:
            with self._surviving("samples.jsonl"):
                row = {"step": step, "prompt": prompt, "text": text}
                self._samples.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._samples.flush()

    def waiting(self, line: str) -> None:
        """Says what takes a while, where no bar shows it."""
        if self._bar.disable:
            self.say(line)

    def progress(self, step: int, **shown: str) -> None:
        """Moves the progress bar to `step`."""
        if not self._bar.disable:
            with self._surviving("the progress bar"):
                self._bar.set_postfix(shown, refresh=False)
                self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Within it, whatever a disk, a terminal or a tracker raises is said once, and ends no run."""
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                log.warning("%s: %s; the run goes on without it", what, error)
            if what == "the progress bar":
                self._bar.disable = True

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()
