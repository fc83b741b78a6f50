"""Sample from a model: `python -m jaxgpt.sample --out_dir=out` (the default) or `--init_from=gpt2`."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from jaxgpt import UserError
from jaxgpt.config import Parser, integer, run_main
from jaxgpt.decoding import Generator, Sampling
from jaxgpt.run.processes import Processes
from jaxgpt.sharding import configure_jax, make_mesh
from jaxgpt.step import random_key
from jaxgpt.tokenizer import Stream, Tokenizer
from jaxgpt.weights.opening import add_model_arguments, model_arguments, open_model

SEPARATOR = "---------------"  # nanoGPT's, after each sample


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m jaxgpt.sample", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--start", default="\n", help="the prompt, or FILE:path of a file that holds it")
    parser.add_argument("--num_samples", type=integer, default=10, help="samples to draw")
    parser.add_argument("--max_new_tokens", type=integer, default=500, help="tokens in each")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=integer, default=200, help="draw from the k likeliest alone; 0: from all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest with this probability in all")
    parser.add_argument("--seed", type=integer, default=1337)
    parser.add_argument("--stop", default="", help="text that ends a sample, such as '<|endoftext|>'; not printed")
    args = parser.parse(argv)
    # everything a user can get wrong comes before the weights are read
    for name, least in {"num_samples": 1, "max_new_tokens": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise UserError(f"{name}={getattr(args, name)} must be at least {least}")
    if args.seed >= 2**32:
        raise UserError(f"seed={args.seed} must be below 2^32")
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    start = read_start(args.start)
    configure_jax()
    with Processes():
        mesh = make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
        out_dir = args.out_dir or (None if args.init_from else "out")
        model = open_model(out_dir, mesh=mesh, **model_arguments(args))
        tokenizer = model.tokenizer
        prompt = tokenizer.encode(start, special=True)
        if not prompt or max(prompt) >= model.config.vocab_size:
            raise UserError(
                f"start={start!r} has no tokens of the model's {model.config.vocab_size}; give another prompt"
            )
        generator = Generator(model.config, model.params, vocab_size=tokenizer.vocab_size)
        key = random_key(args.seed, "sample")
        chunks = generator(prompt, args.max_new_tokens, key=key, num_samples=args.num_samples, sampling=sampling)
        write_samples(chunks, tokenizer, tokenizer.decode(prompt), args.num_samples, args.stop)


def read_start(start: str) -> str:
    """The prompt that --start means. Raises UserError if it is empty or its file cannot be read."""
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        try:
            start = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text; convert it") from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            why = getattr(error, "strerror", error)
            raise UserError(f"cannot read {str(path)!r}: {why}; check --start=FILE:path") from None
    if not start:
        raise UserError(r"the prompt is empty; give --start some text (by default a line break)")
    return start


def write_samples(
    chunks: Iterator[Int[np.ndarray, "B n"]], tokenizer: Tokenizer, start: str, num_samples: int, stop: str
) -> None:
    """Prints samples, the first one not finished as it is made: the others grow beside it and appear in their turn."""
    texts, current = [Stream(tokenizer, stop) for _ in range(num_samples)], 0
    waiting = [start] * num_samples  # what is not shown yet of each
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


if __name__ == "__main__":
    run_main(main)
