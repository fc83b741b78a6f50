"""Train a model: `python -m jaxgpt.train --config configs/gpt2.py [--config.KEY=VALUE …]`."""

import math
import secrets
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxgpt import Unavailable, UserError, console, store
from jaxgpt.cli import Parser, run_main
from jaxgpt.config import (
    DataConfig,
    Parts,
    parse_config,
    read_config,
    read_saved,
    resolve,
    resumed_config,
    save_config,
    without_effect,
)
from jaxgpt.data import RunData, check_same_corpora, prefetch
from jaxgpt.keys import take
from jaxgpt.metrics import Reporter, Stopwatch, environment, peak_flops, when_done
from jaxgpt.models import count_params, find_model
from jaxgpt.ops import paths
from jaxgpt.optim import OptimizerConfig, check_schedule, unfinished
from jaxgpt.run import guard, lease
from jaxgpt.run.checkpoint import Checkpoints, run_id
from jaxgpt.run.processes import Processes, agree, numerics
from jaxgpt.scoring.evaluation import Evaluation
from jaxgpt.scoring.samples import Samples
from jaxgpt.scoring.tasks import parse_tasks
from jaxgpt.sharding import begin_devices, configure_jax, configured_mesh
from jaxgpt.step import OPTIONAL, TrainState, abstract_state, begin_state, complete_state, create_state
from jaxgpt.store import AnyPath
from jaxgpt.tokenizer import check_same_language, corpus_meta
from jaxgpt.tools.dryrun import dry_run
from jaxgpt.tools.memory import choose_batch, limit_of, smallest_batch
from jaxgpt.tools.programs import prepare_step
from jaxgpt.trackers import check_trackers
from jaxgpt.weights.opening import OpenedModel, check_data, open_data, open_weights

SLOW_LIMIT_S = 3600.0  # for what is slower than a step (compilation, evaluation, saves), where stall_timeout is shorter


def main(argv: Sequence[str]) -> int:
    configure_jax()
    parser = Parser(prog="python -m jaxgpt.train", description=__doc__)
    explained = (
        "compile for this mesh, print what it takes, and stop; DEVICES, if not this machine's: a number, or a name "
        "such as v5e:4x4 (a TPU slice) or h100:8"
    )
    parser.add_argument("--dry_run", nargs="?", type=number_or_name, const=0, metavar="DEVICES", help=explained)
    with Processes():
        config, given, args = parse_config(argv, parser)
        config.out_dir = str(store.folder(config.out_dir))
        if args.dry_run is not None:
            return describe_only(config, args.dry_run)
        begin_devices()
        source = find_model(config.model).digest[:16]
        own = {"data_dir": "each host's own", "data_cache": "", "model_source": source}
        agree("config", {**numerics(), **config, **own})
        agree("devices", {"devices": jax.local_device_count(), "kind": jax.local_devices()[0].device_kind})
        return train(config, given)


class Progress(NamedTuple):
    """How far a run has come besides its state: what a checkpoint's record says."""

    samples: int = 0  # windows of the training data read before this step
    evaluated: int = -1  # the last step that was evaluated
    val_loss: float | None = None  # at this step, if it was evaluated
    best_step: int = -1
    best_val_loss: float = math.inf
    metrics_lines: int = 0  # of metrics.jsonl up to this step

    def after(self, step: int, val_loss: float) -> "Progress":
        """The progress after an evaluation at `step`, whose loss may be the best so far."""
        best = (step, val_loss) if val_loss < self.best_val_loss else (self.best_step, self.best_val_loss)
        return self._replace(evaluated=step, val_loss=val_loss, best_step=best[0], best_val_loss=best[1])

    def record(self, step: int, **now: int) -> dict[str, Any]:
        """The info of a checkpoint at `step`. now: values of fields that have not been kept up."""
        here = self._replace(**now, val_loss=self.val_loss if self.evaluated == step else None)
        return {key: value for key, value in here._asdict().items() if value is None or math.isfinite(value)}


class Prepared(NamedTuple):
    """All that is known of a run before anything is computed or written."""

    config: ConfigDict
    changes: list[str]  # a line for each value that is not the command's
    resume: bool
    weights: OpenedModel | None  # to start from
    data: RunData
    parts: Parts
    abstract: TrainState
    evaluate: Evaluation
    write_sample: Samples | None  # where sample_interval asks for text


def prepare(config: ConfigDict, given: Mapping[str, Any] | None, mesh: Mesh, checkpoints: Checkpoints) -> Prepared:
    """Decides and checks all that a user can get wrong. Raises UserError; writes nothing."""
    resume, config, changes = decide_resume(config, given, checkpoints)
    changes += without_effect(config, given or {})
    optimizer = take(OptimizerConfig, config)
    if not config.eval_only:
        check_schedule(optimizer)
    weights = None if resume or config.init_from in ("scratch", "auto") else open_weights(config, mesh)
    fitting = config.auto_batch_size and not config.eval_only
    data = open_data(smallest_batch(config, mesh) if fitting else config, mesh, weights)
    check_data(config, data.meta, weights)
    if resume:
        ours, corpus = corpus_meta(config.out_dir, data.vocab_size), config.data_dir or config.dataset
        check_same_language(ours, data.meta, corpus, f"the run in {config.out_dir}")
        check_same_corpora(read_saved(store.folder(config.out_dir)).get("data", {}), data.facts(), config.out_dir)
    agree("data", data.facts())
    if fitting:
        limit = limit_of(mesh.local_devices[0])
        config, line = choose_batch(config, mesh, data.vocab_size, data.meta.eot, limit)
        changes.append(line)
        data = data.resized(take(DataConfig, config))
    parts = resolve(config, mesh, data.vocab_size, data.meta.eot)
    evaluate = Evaluation(parts, data, mesh)
    # tokens alone can be trained on: the tokenizer is loaded where text is asked for
    write_sample = Samples(parts, data.tokenizer, mesh) if config.sample_interval else None
    abstract = abstract_state(parts, mesh)
    return Prepared(config, changes, resume, weights, data, parts, abstract, evaluate, write_sample)


def train(config: ConfigDict, given: Mapping[str, Any] | None = None) -> guard.Exit:
    """The whole run: lock, mesh, data, state, step, loop. A start that fails leaves nothing.

    given: what the command line says, which a run that goes on takes over; None: all of the config.
    """
    check_trackers(config)
    if jax.config.jax_disable_jit:  # pyright: ignore
        raise UserError("JAX_DISABLE_JIT is set, and a training step is compiled; unset it")
    mesh = configured_mesh(config)
    run = store.folder(config.out_dir)
    if config.eval_only:
        return evaluate_only(config, given, mesh)
    with (
        guard.Stop() as stop,
        lease.lock(run) as lock,
        closing(Checkpoints(run, keep=config.keep_checkpoints)) as checkpoints,
        guard.Watchdog(config.stall_timeout) as watchdog,
        ExitStack() as opened,
    ):
        with watchdog.allow("start", SLOW_LIMIT_S), lock.starting():
            plan = prepare(config, given, mesh, checkpoints)
            config, changes, resume, weights, data, parts, abstract, evaluate, write_sample = plan
            identity = run_id(run) or secrets.token_hex(8)
            checkpoints.begin(lock, identity)
            if not resume:
                checkpoints.check_room(abstract.saved)
            state, info, step = checkpoints.restore(abstract.saved, optional=OPTIONAL) if resume else (abstract, {}, 0)
            progress = Progress(**{key: info[key] for key in Progress._fields if key in info})
            flops = data.tokens_per_step * parts.model.flops_per_token(abstract.params)
            k = choose_steps_per_call(config, step, flops)
            data.begin(step, progress.samples)

            def begin() -> Any:
                return None if resume else begin_state(parts, mesh, weights and weights.params)

            prepared = prepare_step(parts, mesh, abstract, data.abstract_batch(k), begin)
            train_step, making = prepared.run, prepared.beside
            state = making.result() if making else complete_state(parts, state, abstract)
            checkpoints.check_replicas(state, step)
            lines = write_run_files(run, data, step, evaluated=progress.evaluated == step)
            if lines < progress.metrics_lines:
                changes.append(f"metrics.jsonl has {lines} of the {progress.metrics_lines} lines up to step {step}")
            reporter = opened.enter_context(
                Reporter(
                    run,
                    config,
                    first_step=step,
                    tokens=lambda step: data.samples(step) * config.block_size,
                    run_id=identity,
                    lines=lines,
                )
            )
            agree("compiled", {})
            write_config(run, config, data, identity)
        batches = opened.enter_context(prefetch(lambda n: data.batch(n * k, k), step // k, config.max_iters // k))
        reporter.say("\n".join([*describe(parts, mesh, data, abstract, step, prepared.paths), *changes]))
        reporter.event(step, "resumed" if resume else "started", ", ".join(changes))
        checkpoints.before_commit, checkpoints.on_save = reporter.sync, reporter.saved
        log = StepLog(config, reporter, Stopwatch(flops, data.tokens_per_step))

        def save(last: bool = False) -> None:
            log.flush()
            record = progress.record(step, samples=data.samples(step), metrics_lines=reporter.lines)
            checkpoints.save(step, state.saved, record, last=last)

        while True:
            if (step % config.eval_interval == 0 or step == config.max_iters) and progress.evaluated != step:
                log.flush()
                reporter.waiting(f"step {step}: evaluating")
                with watchdog.allow("evaluation and save", SLOW_LIMIT_S):
                    try:
                        scores = evaluate(state.best_params, stop.check)
                    except guard.Stopped:  # the evaluation is begun again when the run goes on
                        break
                    reporter.say(evaluate.line(f"step {step}", scores))
                    reporter.record(step, scores)
                    progress = progress.after(step, scores["val_loss"])
                    if step > 0 and (progress.best_step == step or config.always_save_checkpoint):
                        save(last=step == config.max_iters)
            if write_sample and step and step % config.sample_interval == 0:
                log.flush()
                with watchdog.allow("sample", SLOW_LIMIT_S):
                    reporter.sample(step, config.sample_prompt, write_sample(state.best_params))
            if step == config.max_iters or stop.requested():
                break
            state, metrics = train_step(state, next(batches)[1])
            step += k
            log.add(step, metrics)
            watchdog.beat()
        with watchdog.allow("save", SLOW_LIMIT_S):
            save(last=True)
            saved = checkpoints.wait()
        if saved:
            finished = progress.evaluated == config.max_iters
            reporter.event(step, "finished" if finished else "stopped")
            reporter.say("\n".join(next_commands(config, step, progress)))
        else:
            reporter.event(step, "save failed", checkpoints.failure)
    if not saved:
        why = checkpoints.failure or "see the other processes' messages"
        raise Unavailable(f"the last checkpoint is not saved in {run} ({why}); mend it and go on with init_from=auto")
    return guard.Exit.DONE if progress.evaluated == config.max_iters else guard.Exit.STOPPED


def next_commands(config: ConfigDict, step: int, progress: Progress) -> list[str]:
    """How a run ended and what can be done with it, for people."""
    if progress.evaluated < config.max_iters:
        return [f"stopped at step {step} of {config.max_iters} and saved; to go on: --config.init_from=auto"]
    out_dir, file = shlex.quote(config.out_dir), find_model(config.model)
    model = f" --model={shlex.quote(file.name)}" if file.source else ""
    return [
        f"finished; the best val loss was {progress.best_val_loss:.4f}, at step {progress.best_step}; next:",
        f"  python -m jaxgpt.sample --out_dir={out_dir}{model}",
        f"  python -m jaxgpt.evaluate --out_dir={out_dir}{model}",
        f"  python -m jaxgpt.report {out_dir}",
    ]


def evaluate_only(config: ConfigDict, given: Mapping[str, Any] | None, mesh: Mesh) -> guard.Exit:
    """Prints one evaluation: of the best checkpoint, of the weights that init_from names, or of fresh ones."""
    checkpoints = Checkpoints(config.out_dir)
    plan = prepare(config, given, mesh, checkpoints)
    source = checkpoints if plan.resume else plan.weights
    console.say(plan.evaluate.line("eval", plan.evaluate(params_to_evaluate(plan.parts, mesh, source))))
    return guard.Exit.DONE


def number_or_name(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def describe_only(config: ConfigDict, devices: int | str) -> int:
    """The dry run for a mesh of `devices`; its exit status."""
    checks = (
        lambda: check_trackers(config),
        lambda: decide_resume(config, None, Checkpoints(config.out_dir)),
        lambda: check_schedule(take(OptimizerConfig, config)),
        lambda: choose_steps_per_call(config, 0, 0.0),
        lambda: parse_tasks(config.eval_tasks),
    )
    return dry_run(config, devices, checks)


def decide_resume(
    config: ConfigDict, given: Mapping[str, Any] | None, checkpoints: Checkpoints
) -> tuple[bool, ConfigDict, list[str]]:
    """Whether to go on from a checkpoint, with which config, and a line for each value that is not the command's.

    A run that began from weights goes on by the same command. Raises UserError where init_from and the folder do not go
    together.
    """
    run, steps = store.folder(config.out_dir), checkpoints.steps()
    how = config.init_from
    if how == "resume" and not steps:
        raise UserError(f"nothing to resume: {run} holds no checkpoint; check out_dir, or use init_from=auto")
    if not steps:
        check_empty(run)
        if how == "auto":  # config.json says what a run began from
            config = config.copy_and_resolve_references()
            config.init_from = "scratch"
        return False, config, []
    if how == "scratch" and not config.eval_only:
        raise UserError(f"{run} already holds a run; go on with --config.init_from=auto, or choose another out_dir")
    saved = read_config(run, model=(given or {}).get("model", config.model), model_changed=config.model_changed)
    if how not in ("scratch", "resume", "auto"):
        if config.eval_only:
            return False, config, []
        if saved.init_from != how:
            raise UserError(
                f"{run} holds a run that began with init_from={saved.init_from}; go on with "
                "--config.init_from=auto, or choose another out_dir"
            )
    config, changes = resumed_config(config, given, saved)
    if steps[-1] > config.max_iters:
        raise UserError(f"the run in {run} is at step {steps[-1]} already; raise max_iters={config.max_iters}")
    return True, config, changes


def check_empty(run: AnyPath) -> None:
    """Raises UserError where a folder holds what a new run would spoil. A run that saved nothing is none of it."""
    models = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "ckpt.pt")
    if found := [name for name in models if (run / name).exists()]:
        raise UserError(f"{run} holds a model ({found[0]}); choose another out_dir")
    if (run / "config.json").exists() and "out_dir" not in read_saved(run):
        raise UserError(f"{run} holds a config.json that is no run's; choose another out_dir")


def params_to_evaluate(parts: Parts, mesh: Mesh, source: Checkpoints | OpenedModel | None) -> Any:
    """The parameters that eval_only evaluates: of the best checkpoint, of weights, or fresh ones."""
    if isinstance(source, Checkpoints):
        name = "average" if parts.optimizer.average_decay else "params"
        return source.restore({name: getattr(abstract_state(parts, mesh), name)}, "best")[0][name]
    return source.params if source else create_state(parts, mesh).params


def write_run_files(run: AnyPath, data: RunData, step: int, *, evaluated: bool) -> int:
    """Writes the tokenizer's files, so that the folder alone is enough to sample from, and drops lines of metrics.jsonl
    and samples.jsonl after `step`. Returns how many lines metrics.jsonl has."""
    if jax.process_index():
        return 0
    data.copy_tokenizer(run)
    guard.trim_jsonl(run / "samples.jsonl", step, without="text")
    return guard.trim_jsonl(run / "metrics.jsonl", step, without="" if evaluated else "val_loss")


def write_config(run: AnyPath, config: ConfigDict, data: RunData, identity: str) -> None:
    """config.json, as the last of a start: a folder with one holds a run, and a start that fails changes no run's."""
    if not jax.process_index():
        about = {"model_source": find_model(config.model).source, "data": data.facts(), "environment": environment()}
        save_config(config, run, run_id=identity, **about)


def choose_steps_per_call(config: ConfigDict, step: int, flops_per_step: float) -> int:
    """How many optimizer steps one call of the compiled function takes.

    By default enough that a call takes about 50 ms, so that the device does not wait for the host between short steps.
    Evaluations, samples, the end and the step to go on from fall between calls: it divides them all.
    """
    common = math.gcd(config.eval_interval, config.sample_interval, config.max_iters, step)
    if config.steps_per_call:
        if common % config.steps_per_call:
            raise UserError(
                f"steps_per_call={config.steps_per_call} must divide eval_interval={config.eval_interval}, "
                f"sample_interval={config.sample_interval}, max_iters={config.max_iters} and the step to start from, "
                f"{step}; {common} does"
            )
        return config.steps_per_call
    peak = peak_flops(jax.devices()[0])
    step_s = flops_per_step / (0.4 * peak * jax.device_count()) if peak else math.inf
    return max(k for k in range(1, 101) if common % k == 0 and (k == 1 or k * step_s <= 0.05))


def describe(parts: Parts, mesh: Mesh, data: RunData, state: TrainState, step: int, taken: paths.Paths) -> list[str]:
    """What is about to run, for people. taken: the paths that the step's ops took, fast or plain."""
    model, run = parts.model, parts.run
    shape = " × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"{count_params(model, state.params):,} parameters, {data.tokens_per_step:,} tokens per step, "
        f"{data.micro_steps} micro-step{'s' * (data.micro_steps != 1)}",
        f"{jax.device_count()} × {jax.devices()[0].device_kind}, mesh {shape}, {model.dtype}",
        f"{paths.describe(taken)}{memory_limit()}",
        *data.notes,
        f"{'resuming at' if step else 'starting at'} step {step} of {parts.optimizer.max_iters}, in {run.out_dir}",
        *unfinished(parts.optimizer),
    ]
    return lines


def memory_limit() -> str:
    """How much of a device's memory arrays may take, where it tells."""
    limit = limit_of(jax.local_devices()[0])
    return f", up to {limit / 2**30:.1f} GiB a device" if limit else ""


class StepLog:
    """Reads each call's metrics after the next call has started, so that the device never waits for the host."""

    def __init__(self, config: ConfigDict, reporter: Reporter, stopwatch: Stopwatch):
        self._config, self._reporter, self._stopwatch = config, reporter, stopwatch
        self._pending: tuple[int, dict[str, jax.Array], Future[float]] | None = None

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the call that ended at `step`, and reports the one before."""
        self._report()
        self._pending = step, metrics, when_done(metrics)

    def flush(self) -> None:
        """Reports what is left, and stops the clock: what follows is no training."""
        self._report()
        self._pending = None
        self._stopwatch.pause()

    def _report(self) -> None:
        if self._pending is None:
            return
        last, metrics, done = self._pending
        speed, values = self._stopwatch.lap(last, done.result()), jax.device_get(metrics)
        for i, step in enumerate(range(last - len(values["loss"]) + 1, last + 1)):
            row = {key: float(x[i]) for key, x in values.items()}
            finite = bool(row.pop("finite"))
            if bad := int(row.pop("bad_steps")):
                why = f"loss {row['loss']:.4f}, gradient norm {row['grad_norm']:.4f}"
                self._reporter.say(f"step {step}: {why}: update dropped")
                self._reporter.event(step, "dropped", why)
                self._reporter.record(step, {"skipped": bad})
                if bad >= self._config.max_bad_steps and not finite:  # spikes end by themselves: see step.Spikes
                    self._reporter.event(step, "diverged", f"{bad} steps in a row were not finite")
                    saved = Checkpoints(self._config.out_dir).steps()
                    raise UserError(
                        f"{bad} steps in a row up to {step} were dropped, their loss, gradient or update not finite; "
                        f"{f'resume from step {saved[-1]}, saved' if saved else 'nothing was saved: begin again'} in "
                        f"{self._config.out_dir}, with a lower learning_rate",
                        status=guard.Exit.DIVERGED,
                    )
            elif step % self._config.log_interval == 0:
                mfu = f", mfu {100 * speed['mfu']:.2f}%" if "mfu" in speed else ""
                ms = f", time {speed['step_ms']:.2f}ms" if speed else ""
                self._reporter.say(f"iter {step}: loss {row['loss']:.4f}{ms}{mfu}")
                self._reporter.record(step, row | speed)
        rate = {"tok/s": tqdm.format_sizeof(speed["tokens_per_s"])} if speed else {}
        self._reporter.progress(last, loss=f"{row['loss']:.4f}", **rate)


if __name__ == "__main__":
    run_main(main)
