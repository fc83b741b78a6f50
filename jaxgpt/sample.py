"""Sample from a model: `python -m jaxgpt.sample --out_dir=out-shakespeare-char` or `--init_from=gpt2`.

--interactive asks for prompts; --prompts=FILE takes one a line (- reads stdin); --jsonl reads and writes JSON lines.
"""

import argparse
import codecs
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxgpt import UserError, from_json
from jaxgpt.cli import Parser, integer, run_main
from jaxgpt.corpus.sources import decode_text, read_text
from jaxgpt.decoding import Generator, Sampling
from jaxgpt.models import Params
from jaxgpt.run.processes import Processes
from jaxgpt.scoring.scorer import Row, Scorer
from jaxgpt.sharding import configure_jax, make_mesh
from jaxgpt.step import random_key
from jaxgpt.tokenizer import Stream, Tokenizer
from jaxgpt.weights.opening import OpenedModel, add_model_arguments, model_arguments, open_model

SEPARATOR = "---------------"  # nanoGPT's, after each sample
SEEDS = 2**32

Chunks = Iterator[Int[np.ndarray, "B n"]]  # tokens of B samples, as they are made


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    # everything a user can get wrong comes before the weights are read
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    records = read_prompts(args)
    configure_jax()
    with Processes():
        if args.interactive and jax.process_count() > 1:
            raise UserError("--interactive is for one process; start it without the launcher")
        mesh = make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
        model = open_model(args.out_dir, mesh=mesh, **model_arguments(args))
        prompts = [model.encode(record["prompt"]) for record in records]
        # --jsonl scores with the parameters themselves
        generator = Generator(model.config, model.params, vocab_size=model.tokenizer.vocab_size, donate=not args.jsonl)

        def generate(prompt: list[int], seed: int) -> Chunks:
            key = random_key(seed, "sample")
            return generator(prompt, args.max_new_tokens, key=key, num_samples=args.num_samples, sampling=sampling)

        seeds = ((args.seed + i) % SEEDS for i in itertools.count())  # another for each prompt
        if args.interactive:
            converse(model, generate, seeds, args.num_samples, args.stop)
            return
        scorer = Scorer(model.config, mesh)
        for record, prompt, seed in zip(records, prompts, seeds, strict=False):
            chunks = generate(prompt, seed)
            if args.jsonl:
                write_records(chunks, model, scorer, record, prompt, seed, args.stop)
            else:
                write_samples(chunks, model.tokenizer, prompt, args.num_samples, args.stop)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m jaxgpt.sample", description=__doc__)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--start", default="\n", help="the prompt, or FILE:path of a file that holds it")
    add("--prompts", metavar="FILE", help="a file of prompts, one a line, or - for stdin; with --jsonl a JSON object "
        'a line, {"prompt": …}, whose other fields are handed through')  # fmt: skip
    add("--interactive", action="store_true", help="ask for prompts; Ctrl-C stops a text, Ctrl-D ends")
    add("--jsonl", action="store_true", help="write a JSON object for each sample: prompt, text, tokens, logprobs (of "
        "the tokens, in nats, under the model itself: temperature 1, all tokens), seed, sample")  # fmt: skip
    add("--num_samples", type=integer, help="samples of each prompt; default: 10 of --start, else 1")
    add("--max_new_tokens", type=integer, default=500, help="tokens in each")
    add("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    add("--top_k", type=integer, default=200, help="draw from the k likeliest alone; 0: from all")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest with this probability in all")
    add("--seed", type=integer, default=1337, help="of the first prompt; the next ones count up from it")
    add("--stop", default="", help="text that ends a sample, such as '<|endoftext|>'; not printed")
    args = parser.parse(argv)
    if args.num_samples is None:
        args.num_samples = 1 if args.prompts or args.interactive else 10
    for name, least in {"num_samples": 1, "max_new_tokens": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise UserError(f"{name}={getattr(args, name)} must be at least {least}")
    for name, below in {"num_samples": 2**20, "max_new_tokens": 2**31, "seed": SEEDS}.items():
        if getattr(args, name) >= below:
            raise UserError(f"{name}={getattr(args, name)} must be below {below}")
    if not args.out_dir and not args.init_from:
        runs = ", ".join(f"--out_dir={path.parent}" for path in sorted(Path().glob("*/config.json")))
        raise UserError(
            f"which model? {runs or 'No folder here is a run: --out_dir=FOLDER of one'}, or --init_from=gpt2"
        )
    if args.interactive and (args.prompts or args.jsonl):
        raise UserError("--interactive asks for the prompts; leave out --prompts and --jsonl")
    return args


def read_prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Objects with a `prompt`, none of it empty. Raises UserError where --start or --prompts name none."""
    if args.interactive:
        return []
    if not args.prompts:
        start = args.start
        start = read_text(start.removeprefix("FILE:")) if start.startswith("FILE:") else start
        if not start:
            raise UserError(r"the prompt is empty; give --start some text (by default a line break)")
        return [{"prompt": start}]
    records = []
    text = decode_text(sys.stdin.buffer.read(), "stdin") if args.prompts == "-" else read_text(args.prompts)
    lines = (line.removesuffix("\r") for line in text.split("\n"))  # not splitlines, which ends lines at U+2028 too
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if not args.jsonl and line.startswith('{"prompt":'):
                raise UserError(f"{args.prompts}: line {number} is a JSON object; add --jsonl")
            record = from_json(line) if args.jsonl else {"prompt": line}
            if not isinstance(record["prompt"], str) or not record["prompt"]:
                raise ValueError
        except (ValueError, TypeError, LookupError):
            raise UserError(f'{args.prompts}: line {number} is not {{"prompt": "some text", …}}') from None
        records.append(record)
    if not records:
        raise UserError(f"{args.prompts} holds no prompts; write one a line")
    return records


def write_samples(
    chunks: Chunks, tokenizer: Tokenizer, prompt: list[int], num_samples: int, stop: str, *, echo: bool = True
) -> None:
    """Prints samples, the first one not finished as it is made: the others grow beside it and appear in their turn.

    echo: the prompt before each.
    """
    texts, current = [Stream(tokenizer, stop, prompt) for _ in range(num_samples)], 0
    waiting = [tokenizer.decode(prompt) if echo else ""] * num_samples  # what is not shown yet of each
    nothing = np.zeros((num_samples, 0), np.int32)  # so that the prompt shows at once
    for chunk in itertools.chain([nothing], chunks, [None]):
        for i, text in enumerate(texts):
            waiting[i] += text.flush() if chunk is None else text.push(chunk[i].tolist())
        while current < num_samples:
            sys.stdout.write(waiting[current])
            waiting[current] = ""
            if not texts[current].done:
                break
            print(f"\n{SEPARATOR}")
            current += 1
        sys.stdout.flush()
        if current == num_samples:
            break


def write_records(
    chunks: Chunks,
    model: OpenedModel,
    scorer: Scorer,
    record: dict[str, Any],
    prompt: list[int],
    seed: int,
    stop: str,
) -> None:
    """Prints one JSON object for each sample: the record's fields and what was made of its prompt."""
    rows = np.concatenate(list(chunks), axis=1).tolist()
    texts, rows = zip(*(cut(model.tokenizer, prompt, row, stop) for row in rows), strict=True)
    logprobs = log_probabilities(scorer, model.params, prompt, rows)
    for i, (text, tokens, of_tokens) in enumerate(zip(texts, rows, logprobs, strict=True)):
        made = {"text": text, "tokens": tokens, "logprobs": of_tokens, "seed": seed, "sample": i}
        # where stdout is not UTF-8, in ASCII: JSON is UTF-8
        as_ascii = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
        print(json.dumps(record | made, ensure_ascii=as_ascii), flush=True)


def cut(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], stop: str) -> tuple[str, list[int]]:
    """The text before `stop`, and the tokens up to the one that completes it."""

    def text(n: int) -> str:
        stream = Stream(tokenizer, prompt=prompt)
        return stream.push(tokens[:n]) + stream.flush()

    if not stop or stop not in text(len(tokens)):
        return text(len(tokens)), tokens
    needed = next(n for n in range(1, len(tokens) + 1) if stop in text(n))
    return text(needed).partition(stop)[0], tokens[:needed]


def log_probabilities(
    scorer: Scorer, params: Params, prompt: list[int], rows: Sequence[list[int]]
) -> list[list[float]]:
    """The natural logarithm of each token's probability after the prompt and the tokens before it.

    From the model itself, whatever temperature, top_k and top_p drew them, and seeing what the generator saw: the last
    block_size tokens.
    """
    block_size = scorer.config.block_size
    prompt = prompt[-block_size:]
    parts, of = [], []  # of: the sample that each part belongs to
    for i, row in enumerate(rows):
        tokens = np.array(prompt + row, np.int32)
        parts.append(Row(tokens[: block_size + 1], len(prompt)))
        parts += [Row(tokens[end - block_size : end + 1], block_size) for end in range(block_size + 1, len(tokens))]
        of += [i] * (len(parts) - len(of))
    logprobs: list[list[float]] = [[] for _ in rows]
    for i, losses in zip(of, scorer.per_token(params, parts), strict=True):
        logprobs[i] += [round(-float(loss), 6) for loss in losses]
    return logprobs


def converse(
    model: OpenedModel, generate: Callable[[list[int], int], Chunks], seeds: Iterator[int], num_samples: int, stop: str
) -> None:
    """Asks for prompts until stdin ends, and prints what follows each as it is made."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then has a history, and keys that move and delete
    print(f"{model.source}: type a prompt (an empty one is a line break); Ctrl-C stops a text, Ctrl-D ends")
    while True:
        try:
            prompt = input("> ") or "\n"
            tokens = model.encode(prompt)
        except UserError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\nCtrl-D ends")
        except EOFError:
            print()
            return
        else:
            with stoppable() as stopped:
                chunks = itertools.takewhile(lambda _: not stopped(), generate(tokens, next(seeds)))
                write_samples(chunks, model.tokenizer, tokens, num_samples, stop, echo=False)


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """A context whose value says whether Ctrl-C was pressed in it; pressed twice, it ends the program."""
    pressed = []

    def handle(*_: object) -> None:
        if pressed:
            os._exit(130)  # 128 + SIGINT; an exception here would surface anywhere, also inside a compilation
        pressed.append(True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    run_main(main)
