"""Train a GPT: `python -m jaxgpt.train --config configs/gpt2.py [--config.KEY=VALUE …]`."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxgpt import UserError
from jaxgpt.config import Parser, parse_config, read_config, run_main, save_config
from jaxgpt.data import RunData, prefetch
from jaxgpt.metrics import Reporter, Stopwatch, check_trackers, flops_per_token, peak_flops, perplexity
from jaxgpt.models.gpt2 import GPTConfig, Params, count_params
from jaxgpt.run import guard
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.processes import Processes, agree
from jaxgpt.scoring.scorer import Scorer
from jaxgpt.scoring.tasks import load_task, parse_tasks
from jaxgpt.sharding import configure_jax, make_mesh
from jaxgpt.step import abstract_state, begin_state, create_state, make_eval_step, make_model_config, make_train_step
from jaxgpt.tools.dryrun import dry_run
from jaxgpt.weights.opening import OpenedModel, open_model

SLOW_LIMIT_S = 3600.0  # for what is slower than a step (compilation, evaluation, saves), where stall_timeout is shorter
SAME_ON_RESUME = ("block_size", "n_layer", "n_head", "n_embd", "bias")


def main(argv: Sequence[str]) -> int:
    configure_jax()
    parser = Parser(prog="python -m jaxgpt.train", description=__doc__)
    explained = "compile for this mesh (of so many devices, if not this machine's), print what it takes, and stop"
    parser.add_argument("--dry_run", nargs="?", type=int, const=0, metavar="DEVICES", help=explained)
    with Processes():
        config, args = parse_config(argv, parser)
        if args.dry_run is not None:
            return rehearse(config, args.dry_run)
        agree("config", {"jax": jax.__version__, **config, "data_dir": "each host's own"})
        agree("devices", {"devices": jax.local_device_count(), "kind": jax.local_devices()[0].device_kind})
        return train(config)


def train(config: ConfigDict) -> guard.Exit:
    """The whole run: mesh, data, state, step, loop. Writes nothing before all that a user can get wrong is checked."""
    check_trackers(config)
    mesh = make_mesh(config.mesh_data, config.mesh_fsdp, config.mesh_tensor)
    run = Path(config.out_dir)
    checkpoints = Checkpoints(run, keep=config.keep_checkpoints)
    resume = decide_resume(config, run, checkpoints)
    weights = None if resume or config.init_from in ("scratch", "auto") else open_weights(config, mesh)
    data = RunData(config, mesh, weights and weights.meta.vocab_size)
    if weights:
        weights.check_corpus(data.meta)
    agree("data", data.facts())
    model_config = make_model_config(config, data.vocab_size, mesh, data.meta.eot)
    abstract = abstract_state(config, model_config, mesh)
    evaluate = Evaluation(config, data, model_config, mesh)
    if config.eval_only:
        params = checkpoints.restore({"params": abstract.params})[0]["params"] if resume else weights and weights.params
        print(evaluate.line("eval", evaluate(params or create_state(config, model_config, mesh).params)))
        return guard.Exit.DONE

    with (
        guard.RunLock(run),
        closing(checkpoints),
        guard.Stop() as stop,
        guard.Watchdog(config.stall_timeout) as watchdog,
    ):
        with watchdog.allow("start", SLOW_LIMIT_S):
            checkpoints.remove_leftovers()
            state, info, step = checkpoints.restore(abstract) if resume else (abstract, {}, 0)
            making = None if resume else begin_state(config, model_config, mesh, weights and weights.params)
            n_params = count_params(abstract.params)
            flops = data.tokens_per_step * flops_per_token(n_params, config.n_layer, config.n_embd, config.block_size)
            k = choose_steps_per_call(config, step, flops)
            train_step = make_train_step(config, model_config, mesh).lower(abstract, data.abstract_batch(k)).compile()
            state = making.result() if making else state
            write_run_files(run, config, data, step, evaluated=info.get("evaluated") == step)
            agree("compiled", {})
        with (
            Reporter(run, config, first_step=step) as reporter,
            prefetch(lambda n: data.batch(n * k, k), step // k, config.max_iters // k) as batches,
        ):
            reporter.say(describe(config, model_config, mesh, data, n_params, step))
            log = StepLog(config, reporter, Stopwatch(flops, data.tokens_per_step))
            while True:
                if (step % config.eval_interval == 0 or step == config.max_iters) and info.get("evaluated") != step:
                    log.flush()
                    with watchdog.allow("evaluation and save", SLOW_LIMIT_S):
                        try:
                            scores = evaluate(state.params, stop.check)
                        except guard.Stopped:  # the evaluation is begun again when the run goes on
                            break
                        reporter.say(evaluate.line(f"step {step}", scores))
                        reporter.record(step, scores)
                        info = judge(info, step, scores["val_loss"])
                        if step > 0 and (info.get("best_step") == step or config.always_save_checkpoint):
                            checkpoints.save(step, state, info)
                if step == config.max_iters or stop.requested():
                    break
                state, metrics = train_step(state, next(batches)[1])
                step += k
                log.add(step, metrics)
                watchdog.beat()
            log.flush()
            with watchdog.allow("save", SLOW_LIMIT_S):
                checkpoints.save(step, state, info if info.get("evaluated") == step else info | {"val_loss": None})
                saved = checkpoints.wait()
    if not saved:
        raise UserError(f"the last checkpoint is not saved in {run}; make room and resume", guard.Exit.FAILURE)
    return guard.Exit.DONE if info.get("evaluated") == config.max_iters else guard.Exit.STOPPED


def judge(info: dict[str, Any], step: int, val_loss: float) -> dict[str, Any]:
    """A checkpoint's info after an evaluation at `step`, whose loss may be the best so far."""
    if val_loss < info.get("best_val_loss", math.inf):
        info = info | {"best_val_loss": val_loss, "best_step": step}
    return info | {"evaluated": step, "val_loss": val_loss}


def rehearse(config: ConfigDict, devices: int) -> int:
    """The dry run for a mesh of `devices`; its exit status."""
    checks = (
        lambda: check_trackers(config),
        lambda: decide_resume(config, Path(config.out_dir), Checkpoints(config.out_dir)),
        lambda: choose_steps_per_call(config, 0, 0.0),
        lambda: parse_tasks(config.eval_tasks),
    )
    return dry_run(config, devices, open_weights, checks)


def decide_resume(config: ConfigDict, run: Path, checkpoints: Checkpoints) -> bool:
    """Whether to go on from a checkpoint. Raises UserError where init_from and the folder do not go together."""
    steps = checkpoints.steps()
    if config.init_from == "resume" and not steps:
        raise UserError(f"nothing to resume: {run} holds no checkpoint; check out_dir, or use init_from=scratch")
    if config.init_from not in ("resume", "auto"):
        if not config.eval_only and (steps or (run / "config.json").exists()):
            raise UserError(f"{run} already holds a run; go on with init_from=resume, or choose another out_dir")
        return False
    if steps:
        saved = read_config(run)
        for key in SAME_ON_RESUME:
            if saved[key] != config[key]:
                raise UserError(
                    f"{key}={config[key]}, but the run in {run} has {key}={saved[key]}; resume with the same model"
                )
        if steps[-1] > config.max_iters:
            raise UserError(f"the run in {run} is at step {steps[-1]} already; raise max_iters={config.max_iters}")
    return bool(steps)


def open_weights(config: ConfigDict, mesh: Mesh) -> OpenedModel:
    """The model to start from, its sizes taken into the config."""
    model = open_model(
        init_from=config.init_from, mesh=mesh, dtype=config.dtype, param_dtype="float32", block_size=config.block_size
    )
    model.adopt(config)
    return model


def write_run_files(run: Path, config: ConfigDict, data: RunData, step: int, *, evaluated: bool) -> None:
    """config.json and the tokenizer's files, so that the folder alone is enough to sample from; trims metrics.jsonl."""
    if jax.process_index() == 0:
        save_config(config, run)
        data.copy_tokenizer(run)
        guard.trim_jsonl(run / "metrics.jsonl", step, without="" if evaluated else "val_loss")


def choose_steps_per_call(config: ConfigDict, step: int, flops_per_step: float) -> int:
    """How many optimizer steps one call of the compiled function takes.

    By default enough that a call takes about 50 ms, so that the device does not wait for the host between short steps.
    Evaluations, the end and the step to go on from fall between calls: it divides them all.
    """
    common = math.gcd(config.eval_interval, config.max_iters, step)
    if config.steps_per_call:
        if common % config.steps_per_call:
            raise UserError(
                f"steps_per_call={config.steps_per_call} must divide eval_interval={config.eval_interval}, "
                f"max_iters={config.max_iters} and the step to start from, {step}; {common} does"
            )
        return config.steps_per_call
    peak = peak_flops(jax.devices()[0])
    step_s = flops_per_step / (0.4 * peak * jax.device_count()) if peak else math.inf
    return max(k for k in range(1, 101) if common % k == 0 and (k == 1 or k * step_s <= 0.05))


def describe(config: ConfigDict, model_config: GPTConfig, mesh: Mesh, data: RunData, n_params: int, step: int) -> str:
    """What is about to run, for people."""
    shape = " × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"{n_params:,} parameters, {data.tokens_per_step:,} tokens per step, {data.micro_steps} micro-steps",
        f"{jax.device_count()} × {jax.devices()[0].device_kind}, mesh {shape}, {model_config.dtype}, "
        f"attention by {model_config.attention}, {'fused' if model_config.kernels else 'plain'} kernels",
        f"{'resuming at' if step else 'starting at'} step {step} of {config.max_iters}, in {config.out_dir}",
    ]
    if jax.default_backend() == "gpu" and (model_config.attention != "cudnn" or not model_config.kernels):
        lines.insert(2, "warning: the fastest attention or kernels do not apply to this GPU, dtype, dropout or mesh")
    return "\n".join(lines)


class Evaluation:
    """Mean losses of fixed batches of every split, and the scores of eval_tasks."""

    def __init__(self, config: ConfigDict, data: RunData, model_config: GPTConfig, mesh: Mesh):
        self._data, self._batches = data, None
        self._step = make_eval_step(model_config, mesh)
        files = parse_tasks(config.eval_tasks)
        self._tasks = {name: load_task(name, file, data.tokenizer) for name, file in files.items()}
        self._scorer = Scorer(model_config, mesh)

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The scores by name. `check` is called every few batches, and may raise."""
        if self._batches is None:
            self._batches = self._data.eval_batches()
            self._step = self._step.lower(params, self._batches["val"][0]).compile()
            agree("compiled evaluation", {})
        scores = {}
        for split, calls in self._batches.items():
            losses = []
            for tokens in calls:
                check()
                losses.append(jax.device_get(self._step(params, tokens)))
            scores[f"{split}_loss"] = float(np.mean(losses, dtype=np.float64))
        scores["val_ppl"] = perplexity(scores["val_loss"])
        for name, task in self._tasks.items():
            scores |= {f"{name}_{k}": v for k, v in task.run(self._scorer, params, check).items()}
        return scores

    @staticmethod
    def line(title: str, scores: dict[str, float]) -> str:
        """`step 250: train loss 1.9804, val loss 2.0776`."""
        return f"{title}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in scores.items() if k != "val_ppl")


class StepLog:
    """Reads each call's metrics after the next call has started, so that the device never waits for the host."""

    def __init__(self, config: ConfigDict, reporter: Reporter, stopwatch: Stopwatch):
        self._config, self._reporter, self._stopwatch = config, reporter, stopwatch
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the call that ended at `step`, and reports the one before."""
        self._report()
        self._pending = step, metrics

    def flush(self) -> None:
        """Reports what is left, and stops the clock: what follows is no training."""
        self._report()
        self._pending = None
        self._stopwatch.pause()

    def _report(self) -> None:
        if self._pending is None:
            return
        last, values = jax.device_get(self._pending)
        speed = self._stopwatch.lap(last)
        for i, step in enumerate(range(last - len(values["loss"]) + 1, last + 1)):
            row = {key: float(x[i]) for key, x in values.items()}
            if bad := int(row.pop("bad_steps")):
                self._reporter.say(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}: update dropped")
                self._reporter.record(step, {"skipped": bad})
                finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
                if bad >= self._config.max_bad_steps and not finite:  # spikes end by themselves: see step.Spikes
                    raise UserError(
                        f"{bad} steps in a row up to {step} were dropped, their loss or gradient not finite; the "
                        f"last good checkpoint is in {self._config.out_dir}: resume from it with a lower learning_rate",
                        status=guard.Exit.DIVERGED,
                    )
            elif step % self._config.log_interval == 0:
                mfu = f", mfu {100 * speed['mfu']:.2f}%" if "mfu" in speed else ""
                ms = f", time {speed['step_ms']:.2f}ms" if speed else ""
                self._reporter.say(f"iter {step}: loss {row['loss']:.4f}{ms}{mfu}")
                self._reporter.record(step, row | speed)
        self._reporter.progress(last, loss=f"{row['loss']:.4f}")


if __name__ == "__main__":
    run_main(main)
