"""A run's own evaluations: mean losses of fixed batches of each split, or of the whole validation split; eval_tasks."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxgpt.config import Parts
from jaxgpt.data import RunData
from jaxgpt.metrics import bar_hidden, perplexity
from jaxgpt.models import Params
from jaxgpt.run.processes import agree
from jaxgpt.scoring.scorer import Scorer
from jaxgpt.scoring.tasks import load_task, parse_tasks
from jaxgpt.step import make_eval_step


class Evaluation:
    """Mean losses of fixed batches of every split, and the scores of eval_tasks.

    Raises UserError where a task cannot be loaded, or is not the same on every process.
    """

    def __init__(self, parts: Parts, data: RunData, mesh: Mesh):
        self._data, self._batches, self._weights = data, None, data.eval_weights()
        self._bytes_per_target: float | None = None
        self._step = make_eval_step(parts.model, mesh)
        files = parse_tasks(parts.run.eval_tasks)
        self._tasks = {name: load_task(name, file, data.tokenizer) for name, file in files.items()}
        agree("eval_tasks", {name: task.digest() for name, task in self._tasks.items()})
        self._scorer = Scorer(parts.model, mesh)

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The scores by name. `check` is called every few batches, and may raise."""
        if self._batches is None:
            self._batches = self._data.eval_batches()
            self._bytes_per_target = self._data.bytes_per_target()
            self._step = self._step.lower(params, self._batches["val"][0]).compile()
            agree("compiled evaluation", {})
        scores, total = {}, sum(map(len, self._batches.values()))
        style = {"unit": "batch", "leave": False, "disable": bar_hidden(), "dynamic_ncols": True}
        with tqdm(total=total, desc="evaluating", **style) as bar:
            for split, calls in self._batches.items():
                losses = []
                for tokens in calls:
                    check()
                    losses.append(jax.device_get(self._step(params, tokens)))
                    bar.update()
                scores[f"{split}_loss"] = float(np.sum(self._weights[split] * np.array(losses, np.float64)))
        scores["val_ppl"] = perplexity(scores["val_loss"])
        if self._bytes_per_target:  # unlike evaluate's with the losses of special tokens, which have no bytes
            scores["val_bpb"] = scores["val_loss"] / math.log(2) / self._bytes_per_target
        for name, task in self._tasks.items():
            scores |= {f"{name}_{k}": v for k, v in task.run(self._scorer, params, check).items()}
        return scores

    @staticmethod
    def line(title: str, scores: dict[str, float]) -> str:
        """`step 250: train loss 1.9804, val loss 2.0776`."""
        return f"{title}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in scores.items() if k != "val_ppl")
