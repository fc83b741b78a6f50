"""Measure speed: `python -m jaxgpt.bench --config configs/gpt2.py [--what=train|sample|data]` prints one JSON line."""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxgpt import UserError
from jaxgpt.cli import Parser, run_main
from jaxgpt.config import DataConfig, parse_config, resolve
from jaxgpt.data import RunData, prefetch
from jaxgpt.decoding import Generator
from jaxgpt.keys import take
from jaxgpt.metrics import Stopwatch, environment, peak_memory_gib, when_done
from jaxgpt.models import count_params, init_params
from jaxgpt.run.processes import Processes
from jaxgpt.sharding import begin_devices, configure_jax, configured_mesh
from jaxgpt.step import abstract_state, begin_state
from jaxgpt.tokenizer import GPT2_VOCAB_SIZE
from jaxgpt.tools.memory import choose_batch, limit_of, smallest_batch
from jaxgpt.tools.profile import least_work, profile_table
from jaxgpt.tools.programs import prepare_step


def main(argv: Sequence[str]) -> None:
    begin = time.perf_counter()
    parser = Parser(prog="python -m jaxgpt.bench", description=__doc__)
    parser.add_argument("--what", choices=("train", "sample", "data"), default="train", help="what to measure")
    parser.add_argument("--steps", type=int, default=20, help="measured optimizer steps, or batches, after a warm-up")
    parser.add_argument("--num_samples", type=int, default=1, help="sequences that --what=sample makes at once")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="their length")
    parser.add_argument("--profile", action="store_true", help="also print GPU time by kind of kernel")
    configure_jax()
    with Processes():
        config, _, args = parse_config(argv, parser)
        for name in ("steps", "num_samples", "max_new_tokens"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
        begin_devices()
        if args.what == "train":
            result = bench_train(config, args.steps, args.profile, begin)
        elif args.what == "sample":
            result = bench_sample(config, args.num_samples, args.max_new_tokens)
        else:
            result = bench_data(config, args.steps)
        print(json.dumps(result | environment()))


def bench_train(config: ConfigDict, steps: int, profile: bool, begin: float) -> dict[str, Any]:
    """Whole optimizer steps: ms a step, tokens/s, MFU, peak GiB, seconds from `begin` to the first one.

    Batches come through the loader, as in a run; `step_ms_fixed_batch` is on one batch that stays on the devices. Three
    rounds of each, in turn; medians.
    """
    if profile and jax.default_backend() != "gpu":
        raise UserError("--profile needs a GPU")
    mesh = configured_mesh(config)
    data = RunData(take(DataConfig, smallest_batch(config, mesh)), config.block_size, mesh)
    if config.auto_batch_size:
        limit = limit_of(mesh.local_devices[0])
        config, line = choose_batch(config, mesh, data.vocab_size, data.meta.eot, limit)
        print(line, file=sys.stderr)
        data = data.resized(take(DataConfig, config))
    parts = resolve(config, mesh, data.vocab_size, data.meta.eot)
    abstract = abstract_state(parts, mesh)
    prepared = prepare_step(parts, mesh, abstract, data.abstract_batch(), lambda: begin_state(parts, mesh))
    train_step = prepared.run
    state, metrics = train_step(prepared.beside.result(), data.batch(0))
    loss_first = float(metrics["loss"][-1])
    first_step_s = time.perf_counter() - begin

    fixed = [data.batch(0)] * (steps + 1)
    state, loss, _ = time_steps(train_step, state, fixed)
    times = []
    for n in range(3):
        with prefetch(data.batch, n * len(fixed), (n + 1) * len(fixed)) as batches:
            state, loss, ms = time_steps(train_step, state, (tokens for _, tokens in batches))
        state, loss, fixed_ms = time_steps(train_step, state, fixed)
        times.append((ms, fixed_ms))
    step_ms, fixed_ms = (statistics.median(column) for column in zip(*times, strict=True))
    n = count_params(parts.model, state.params)
    flops = parts.model.flops_per_token(state.params)
    speed = Stopwatch(flops * data.tokens_per_step, data.tokens_per_step).speed(step_ms / 1e3)
    strict = parts.model.strict_flops_per_token(state.params) / flops
    result = {
        "what": "train",
        "batch_size": parts.data.batch_size,
        "step_ms": round(step_ms, 3),
        "step_ms_fixed_batch": round(fixed_ms, 3),
        "tokens_per_s": round(speed["tokens_per_s"]),
        "mfu": round(speed["mfu"], 4) if "mfu" in speed else None,  # nanoGPT's
        "mfu_strict": round(speed["mfu"] * strict, 4) if "mfu" in speed else None,  # what the causal mask leaves
        "peak_gib": round(peak_memory_gib(), 2),
        "trace_s": round(prepared.trace_s, 1),
        "compile_s": round(prepared.compile_s, 1),
        "first_step_s": round(first_step_s, 1),
        "loss_first": loss_first,
        "loss_last": loss,
        "tokens_per_step": data.tokens_per_step,
        "params": n,
    }
    if profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(3):
                    state, _ = train_step(state, fixed[0])
                jax.block_until_ready(state)
            least = least_work(parts, mesh, state.params)
            print(profile_table(folder, 3, least), file=sys.stderr)
    return result


def time_steps(train_step: Callable, state: Any, batches: Iterable[Any]) -> tuple[Any, float, float]:
    """The state and the loss after these steps, and milliseconds a step, from the end of the first to that of the last.

    A run fills its queue but once. As in a run, a step is dispatched before the last one's metrics are read.
    """
    ends = []
    for tokens in batches:
        state, metrics = train_step(state, tokens)
        ends.append(when_done(metrics["loss"]))
        if len(ends) > 1:
            ends[-2].result()
    seconds = ends[-1].result() - ends[0].result()
    return state, float(jax.device_get(metrics["loss"])[-1]), 1e3 * seconds / (len(ends) - 1)


def bench_sample(config: ConfigDict, num_samples: int, max_new_tokens: int) -> dict[str, Any]:
    """Tokens/s of random weights writing num_samples × max_new_tokens tokens from one (top-k 200): median of five."""
    mesh = configured_mesh(config)
    model = resolve(config, mesh, GPT2_VOCAB_SIZE).model
    begin = time.perf_counter()
    # as `sample` opens a model: made in the dtype it computes in
    init = jax.jit(init_params, static_argnums=(0, 2))
    generate = Generator(model, init(model, jax.random.key(0), model.dtype), donate=True)
    ends = []
    for i in range(6):
        for _ in generate([0], max_new_tokens, key=jax.random.key(i), num_samples=num_samples):
            pass
        ends.append(time.perf_counter())
    seconds = statistics.median(end - start for start, end in pairwise(ends))
    return {
        "what": "sample",
        "tokens_per_s": round(num_samples * max_new_tokens / seconds, 1),
        "num_samples": num_samples,
        "max_new_tokens": max_new_tokens,
        "first_s": round(ends[0] - begin, 1),
        "peak_gib": round(peak_memory_gib(), 2),
    }


def bench_data(config: ConfigDict, steps: int) -> dict[str, Any]:
    """Tokens/s that the reader alone supplies, after one pass over the same steps to fill the page cache."""
    mesh = configured_mesh(config)
    data = RunData(take(DataConfig, config), config.block_size, mesh)
    times = []
    for step in [*range(steps), *range(steps)]:
        start = time.perf_counter()
        data.train.rows_at(step)
        times.append(time.perf_counter() - start)
    return {"what": "data", "tokens_per_s": round(data.tokens_per_step / statistics.median(times[steps:]))}


if __name__ == "__main__":
    run_main(main)
