"""Text while training: what the command would print, on any mesh."""

import jax
import pytest

from jaxgpt import UserError
from jaxgpt.config import resolve
from jaxgpt.decoding import Generator, Sampling
from jaxgpt.scoring.samples import Samples
from jaxgpt.sharding import make_mesh
from jaxgpt.step import create_state, random_key
from jaxgpt.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz ")


def parts(tiny_config, mesh, **values):
    return resolve(tiny_config(sample_interval=4, sample_prompt="hello ", **values), mesh, TOKENIZER.vocab_size)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_it_is_the_text_that_the_command_prints(tiny_config, sizes):
    mesh = make_mesh(*sizes, devices=jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
    resolved = parts(tiny_config, mesh)
    text = Samples(resolved, TOKENIZER, mesh)(create_state(resolved, mesh).params)
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    alone = parts(tiny_config, one)
    generator = Generator(alone.model, create_state(alone, one).params, vocab_size=TOKENIZER.vocab_size)
    prompt = TOKENIZER.encode("hello ")
    chunks = generator(prompt, Samples.TOKENS, key=random_key(alone.data.seed, "sample"), sampling=Sampling())
    assert text == "hello " + "".join(TOKENIZER.decode(chunk[0].tolist()) for chunk in chunks)


@pytest.mark.parametrize("prompt, message", [("", "sample_prompt is empty"), ("É", "lacks 'É'")])
def test_a_prompt_that_is_none_is_found_before_training(tiny_config, mesh, prompt, message):
    with pytest.raises(UserError, match=message):
        Samples(resolve(tiny_config(sample_interval=4, sample_prompt=prompt), mesh, 27), TOKENIZER, mesh)
    Samples(resolve(tiny_config(sample_prompt=prompt), mesh, 27), TOKENIZER, mesh)  # which no one asks for
