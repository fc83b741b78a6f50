"""Generation: the cache against none, batches against single rows, chunks against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import UserError
from jaxgpt import decoding as generate
from jaxgpt.decoding import Generator, Sampling
from jaxgpt.models import abstract_params, bind
from jaxgpt.models.gpt2 import GPTConfig

GREEDY = Sampling(temperature=0.0)
CONFIG = GPTConfig(block_size=12, vocab_size=50, n_layer=2, n_head=2, n_embd=16, bias=True)
PROMPT = [3, 1, 4]


def noisy_params(config):
    """Parameters whose every part matters, and with which greedy tokens do not settle into a loop."""
    rng = np.random.default_rng(1)

    def leaf(path, x):
        name, noise = jax.tree_util.keystr(path), rng.normal(size=x.shape).astype(np.float32)
        return jnp.asarray(1 + 0.2 * noise if "scale" in name else (0.3 if "embedding" in name else 0.5) * noise)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


PARAMS = noisy_params(CONFIG)


def run(generator, prompt=PROMPT, n=36, sampling=GREEDY, seed=0, **options):
    chunks = list(generator(prompt, n, key=jax.random.key(seed), sampling=sampling, **options))
    tokens = np.concatenate(chunks, axis=1)
    assert tokens.shape[1] == n
    return tokens


def without_cache(config, prompt, n):
    """Greedy tokens, each from a forward pass over the last block_size tokens (padded: causality hides the padding)."""
    forward = jax.jit(lambda tokens: bind(config, PARAMS)(tokens)[0])
    ids = list(prompt)
    for _ in range(n):
        window = ids[-config.block_size :]
        padded = np.zeros((1, config.block_size), np.int32)
        padded[0, : len(window)] = window
        ids.append(int(jnp.argmax(forward(padded)[0, len(window) - 1])))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def generator():
    return Generator(CONFIG, PARAMS)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("doc_mask", [-1, 40])  # 40: a token that this model makes often
def test_greedy_equals_decoding_without_a_cache(kernels, doc_mask):
    config = dataclasses.replace(CONFIG, doc_mask=doc_mask)
    want = without_cache(config, PROMPT, 3 * config.block_size)
    assert len(set(want)) > 5 and (doc_mask < 0 or doc_mask in want[:-12])
    got = run(Generator(dataclasses.replace(config, kernels=kernels), PARAMS), chunk=5)
    assert got.tolist() == [want]


@pytest.mark.parametrize("kernels", [False, True])
def test_a_donated_model_is_there_once(monkeypatch, kernels):
    """By the bytes of all arrays alive as each weight is made; the weights are those of parameters that stay."""
    config = dataclasses.replace(CONFIG, kernels=kernels, dtype="bfloat16")
    wanted, params = Generator(config, PARAMS), jax.tree.map(jnp.copy, PARAMS)
    alive, peak = sum(x.nbytes for x in jax.live_arrays()), []
    ready = jax.block_until_ready

    def watch(x):
        peak.append(sum(x.nbytes for x in jax.live_arrays()) - alive)
        return ready(x)

    monkeypatch.setattr(jax, "block_until_ready", watch)
    donated = Generator(config, params, donate=True)
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    assert 0 < max(peak) <= max(sizes) and sum(x.nbytes for x in jax.live_arrays()) - alive <= 0
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (wanted.weights, donated.weights)), strict=True))


@pytest.mark.parametrize("prompt_length", [12, 30])
def test_long_prompt_is_cropped(generator, prompt_length):
    prompt = [int(i) for i in np.random.default_rng(0).integers(50, size=prompt_length)]
    assert run(generator, prompt, 4, chunk=5).tolist() == [without_cache(CONFIG, prompt, 4)]


def test_chunks_change_nothing(generator):
    """36 tokens reach past block_size in every case; 5 divides neither part, 32 is longer than the cache."""
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9)
    first, *others = [run(generator, sampling=sampling, num_samples=2, chunk=chunk) for chunk in (1, 5, 32)]
    assert all((tokens == first).all() for tokens in others)
    assert (run(generator, n=7, sampling=sampling, num_samples=2, chunk=5) == first[:, :7]).all()
    assert (first[0] != first[1]).any()


def test_rows_do_not_depend_on_each_other(generator):
    sampling = Sampling(temperature=1.0, top_k=0)
    three = run(generator, sampling=sampling, num_samples=3, chunk=5)
    assert (run(generator, sampling=sampling, num_samples=1, chunk=5) == three[:1]).all()
    assert (run(generator, sampling=sampling, num_samples=1, chunk=5, seed=1) != three[:1]).any()


def test_kernels_draw_the_same(generator):
    """float32 both ways, so that no token is close enough to another for rounding to matter."""
    fused = Generator(dataclasses.replace(CONFIG, kernels=True), PARAMS)
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9)
    got, want = (run(g, n=10, sampling=sampling, num_samples=2, chunk=5) for g in (fused, generator))
    assert (got == want).all()


def test_no_token_beyond_the_vocabulary():
    tokens = run(Generator(CONFIG, PARAMS, vocab_size=7), sampling=Sampling(temperature=5.0), num_samples=4, chunk=5)
    assert tokens.max() == 6


def test_lengths_and_values_do_not_recompile(generator):
    run(generator, PROMPT, 3, chunk=5, sampling=Sampling(1.0, 5))
    compiled = generate._prefill._cache_size(), generate._decode._cache_size()
    for length, sampling in (1, Sampling(0.5, 6)), (2, Sampling(0.6, 7)), (9, Sampling(0.7, 8)):
        run(generator, [1] * length, 3, chunk=5, sampling=sampling)
    assert (generate._prefill._cache_size(), generate._decode._cache_size()) == compiled


def test_bfloat16_weights_are_cast_once():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    generator = Generator(config, PARAMS)
    assert generator.weights["wte"]["embedding"].dtype == jnp.bfloat16
    assert generator.weights["ln_f"]["scale"].dtype == jnp.float32
    uncast = Generator(config, PARAMS)
    uncast.weights = PARAMS
    assert (run(generator, n=8, chunk=5) == run(uncast, n=8, chunk=5)).all()


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_bad_values_name_themselves(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values)
