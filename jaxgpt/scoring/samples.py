"""Text that a model writes while it is trained."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import UserError
from jaxgpt.config import Parts
from jaxgpt.decoding import Generator, Sampling
from jaxgpt.models import Params
from jaxgpt.step import random_key
from jaxgpt.tokenizer import Tokenizer


class Samples:
    """Continues sample_prompt, by `sample`'s defaults and the run's seed: the same parameters give the same text."""

    TOKENS = 200

    def __init__(self, parts: Parts, tokenizer: Tokenizer, mesh: Mesh):
        self._config, self._tokenizer, self._key = parts.model, tokenizer, random_key(parts.data.seed, "sample")
        self._prompt = tokenizer.encode(parts.run.sample_prompt, special=True) if parts.run.sample_interval else []
        if parts.run.sample_interval and not self._prompt:
            raise UserError("sample_prompt is empty; give it some text, or leave it at a line break")
        self._gather = jax.jit(lambda params: params, out_shardings=NamedSharding(mesh, P()))

    def __call__(self, params: Params) -> str:
        """Prompt and text. With several processes all call it: parameters are gathered, and each has the same text."""
        params = jax.tree.map(lambda x: x.addressable_data(0), self._gather(params))
        generator = Generator(self._config, params, vocab_size=self._tokenizer.vocab_size)
        chunks = generator(self._prompt, self.TOKENS, key=self._key, sampling=Sampling())
        return self._tokenizer.decode(self._prompt + np.concatenate(list(chunks), axis=1)[0].tolist())
