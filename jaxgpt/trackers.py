"""Programs that get a run's metrics besides metrics.jsonl: each a class here, a key and a row of TRACKERS."""

import contextlib
import dataclasses
import importlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxgpt import UserError, from_json, optional
from jaxgpt.keys import key
from jaxgpt.store import AnyPath


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
    """Trackers: who gets the metrics besides metrics.jsonl."""

    tensorboard_log: bool = key(False, "also write TensorBoard events into out_dir")
    wandb_log: bool = key(False, "also log to Weights & Biases")
    wandb_project: str = key("jaxgpt", "project of Weights & Biases")
    wandb_run_name: str = key("gpt2", "the run's name there")


class Tracker:
    """What Reporter tells. What it raises after its start is said once, and the run goes on without it."""

    name = ""  # for people
    module = ""  # that it needs
    on_disk = False  # whether it writes files into the run's folder, which then must not be in a store

    @classmethod
    def check(cls) -> None:
        """Raises UserError where it will not start: before anything is compiled or written."""

    def __init__(self, folder: Any, config: ConfigDict, run_id: str):
        """folder: the run's. run_id: its identity, the same when it is resumed. Raises UserError."""
        raise NotImplementedError

    def add(self, step: int, values: dict[str, float], time_s: float) -> None:
        """Metrics of `step`, all finite. time_s: when they were made, since the epoch."""
        raise NotImplementedError

    def close(self) -> None:
        """The run has ended, or stops."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """A run's event file for TensorBoard: the rows of metrics.jsonl, and those that are added.

    Each start writes it anew (0.1 ms a row), as TensorBoard's readers do not agree on when a later event replaces an
    earlier one of the same step. Event files of others in the folder stay.
    """

    name, module, on_disk = "TensorBoard", "tensorboard", True
    SUFFIX = ".jaxgpt"  # of the names of our files

    def __init__(self, folder: Path, config: Any = None, run_id: str = ""):
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._event, self._summary, self._tensor = (
            importlib.import_module(f"tensorboard.compat.proto.{name}_pb2") for name in ("event", "summary", "tensor")
        )
        for path in folder.glob(f"events.out.tfevents.*{self.SUFFIX}"):
            # emptied at one start, removed at the next: a TensorBoard that reads it goes no further where it is missing
            if path.is_symlink() or not path.stat().st_size:
                path.unlink()
            else:
                os.truncate(path, 0)
        self._file = writer.EventFileWriter(str(folder), filename_suffix=self.SUFFIX)
        # a TensorBoard that is watching forgets what it has read of the file before
        begun = self._event.SessionLog(status=self._event.SessionLog.START)
        self._file.add_event(self._event.Event(wall_time=time.time(), step=0, session_log=begun))
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="scalars")
        kind = self._summary.DATA_CLASS_SCALAR
        self._scalar = self._summary.SummaryMetadata(plugin_data=plugin, data_class=kind)
        metrics = folder / "metrics.jsonl"
        began = time.time() - seconds_so_far(metrics)
        with contextlib.suppress(FileNotFoundError), metrics.open(encoding="utf-8") as rows:
            for row in map(from_json, rows):
                values = {k: v for k, v in row.items() if k != "step" and v is not None}
                self.add(row["step"], values, began + values["wall_s"])

    def add(self, step: int, values: dict[str, float], time_s: float) -> None:
        """Scalars of `step`. time_s: when they were made, since the epoch."""
        event = self._event.Event(wall_time=time_s, step=step)
        for name, value in values.items():
            tensor = self._tensor.TensorProto(dtype="DT_FLOAT", float_val=[value])
            event.summary.value.add(tag=name, tensor=tensor, metadata=self._scalar)
        self._file.add_event(event)

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def wandb_errors() -> Iterator[Any]:
    """The module; what it raises within becomes a UserError."""
    wandb = importlib.import_module("wandb")
    try:
        yield wandb
    except wandb.Error as error:
        raise UserError(f"wandb_log: {error}") from None


class WandB(Tracker):
    """Weights & Biases, which knows a run that goes on by its run_id."""

    name, module = "W&B", "wandb"

    @classmethod
    def check(cls) -> None:
        with wandb_errors() as wandb:
            wandb.login()  # on a terminal it asks for a key that is missing

    def __init__(self, folder: Any, config: ConfigDict, run_id: str):
        known = {"id": run_id, "resume": "allow"} if run_id else {}
        how = {"project": config.wandb_project, "name": config.wandb_run_name, "config": config.to_dict()}
        with wandb_errors() as wandb:
            self._run = wandb.init(**how, **known)

    def add(self, step: int, values: dict[str, float], time_s: float) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard_log": TensorBoard, "wandb_log": WandB}  # by the key that asks for it


def check_trackers(config: ConfigDict) -> None:
    """Raises UserError where a tracker that is asked for is not installed or, on the first process, will not start."""
    for tracker in chosen(config):
        if tracker.on_disk and "://" in config.out_dir:
            raise UserError(
                f"{tracker.name} writes no files to {config.out_dir}; leave it off, or take a local out_dir"
            )
        if not jax.process_index():
            tracker.check()


def chosen(config: ConfigDict) -> list[type[Tracker]]:
    """The trackers that a config asks for. Raises UserError where one is not installed."""
    asked = {name: tracker for name, tracker in TRACKERS.items() if config[name]}
    for name, tracker in asked.items():
        optional(tracker.module, "jaxgpt[track]", name)
    return list(asked.values())


def seconds_so_far(metrics: AnyPath) -> float:
    """The last line's wall_s; 0 where there is none."""
    try:
        with metrics.open("rb") if isinstance(metrics, Path) else io.BytesIO(metrics.read_bytes()) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))  # lines are a few hundred bytes
            return float(from_json(file.read().splitlines()[-1])["wall_s"])
    except (OSError, ValueError, TypeError, LookupError):
        return 0.0
