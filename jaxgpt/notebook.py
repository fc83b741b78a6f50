"""A trained model in a notebook or a script.

A run's folder (or gpt2, or the folder of a model) to text in three lines:

    >>> from jaxgpt import generate, load_model
    >>> model = load_model("out")
    >>> text = generate(model, "the ", max_new_tokens=20)
    >>> text[:4], len(text)
    ('the ', 24)

and to logits in four:

    >>> tokens = model.tokenizer.encode("the end")
    >>> logits = model.logits([tokens])
    >>> logits.shape == (1, len(tokens), model.config.vocab_size)
    True
"""

import itertools

import jax

from jaxgpt import UserError
from jaxgpt.decoding import Generator, Sampling
from jaxgpt.sharding import make_mesh
from jaxgpt.step import random_key
from jaxgpt.tokenizer import Stream
from jaxgpt.weights.opening import OpenedModel, Which, open_model


def load_model(
    source: str,
    *,
    checkpoint: Which = "best",
    dtype: str = "auto",
    block_size: int | None = None,
    model: str = "",
    model_changed: bool = False,
) -> OpenedModel:
    """A model on this process's first device, from a run's folder, gpt2 … gpt2-xl, or the folder of an export.

    checkpoint: of a run, best, latest or a step. dtype: of the computation, bfloat16 or float32, say; auto takes what
    is fast here. block_size: fewer positions than it has. model, model_changed: the file of a run's own model, and
    whether it may differ from the run's. UserError if there is no such model.

    >>> model = load_model("out", dtype="float32")
    >>> model.config.n_layer, model.tokenizer.vocab_size
    (1, 27)
    >>> sorted(model.params)
    ['h', 'ln_f', 'wpe', 'wte']
    """
    mesh = make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
    return open_model(
        init_from=source, mesh=mesh, dtype=dtype, which=checkpoint, block_size=block_size, model=model,
        model_changed=model_changed,
    )  # fmt: skip


def generate(
    model: OpenedModel,
    prompt: str = "\n",
    *,
    max_new_tokens: int = 500,
    num_samples: int = 1,
    temperature: float = 0.8,
    top_k: int = 200,
    top_p: float = 1.0,
    seed: int = 1337,
    stop: str = "",
) -> str | list[str]:
    """The prompt and what the model makes of it; with several samples a list. `sample` prints the same for a seed.

    temperature: 0 always takes the likeliest token. top_k: among the k likeliest alone; 0: among all. top_p: among the
    likeliest with this probability in all. stop: a text that ends a sample and is left out. UserError on a prompt
    without tokens, or settings that make no sense.

    >>> model = load_model("out")
    >>> generate(model, "the ", temperature=0) == generate(model, "the ", temperature=0, seed=2)
    True
    >>> len(generate(model, "the ", num_samples=3, max_new_tokens=5))
    3
    """
    if max_new_tokens < 1 or num_samples < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} and num_samples={num_samples} must be at least 1")
    ids = model.encode(prompt)
    sampling = Sampling(temperature, top_k, top_p)
    generator = Generator(model.config, model.params, vocab_size=model.tokenizer.vocab_size)
    chunks = generator(ids, max_new_tokens, key=random_key(seed, "sample"), num_samples=num_samples, sampling=sampling)
    streams, texts = [Stream(model.tokenizer, stop, ids) for _ in range(num_samples)], [prompt] * num_samples
    for chunk in itertools.chain(chunks, [None]):
        for i, stream in enumerate(streams):
            if not stream.done:
                texts[i] += stream.flush() if chunk is None else stream.push(chunk[i].tolist())
        if all(stream.done for stream in streams):
            break
    return texts[0] if num_samples == 1 else texts
