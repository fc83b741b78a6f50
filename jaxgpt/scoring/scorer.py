"""Losses of rows of tokens under a model."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer
from tqdm import tqdm

from jaxgpt.metrics import bar_hidden
from jaxgpt.models import ModelConfig, Params, abstract_params, bind, roles
from jaxgpt.sharding import BATCH_AXES, data_shards, with_whole_params


class Row(NamedTuple):
    """Tokens of which those from `first` on are scored, each given all before it. first is at least 1."""

    tokens: Integer[np.ndarray, " n"]
    first: int


class Scores(NamedTuple):
    """Of each row: the sum of its scored tokens' losses in nats, their number, and whether each was the likeliest."""

    loss: Float[np.ndarray | Array, " rows"]
    count: Int[np.ndarray | Array, " rows"]
    greedy: Bool[np.ndarray | Array, " rows"]


class Scorer:
    """Scores rows of any length; one compiled function for each of a few lengths that rows are padded to.

    Every device always computes the same number of rows, so where it holds the whole model, a row's score is the same
    to the bit on any number of devices. Rows longer than block_size + 1 lose their beginning.
    """

    MIN_LENGTH = 32  # lengths are this, doubled up to block_size: six of them for 1,024

    def __init__(self, config: ModelConfig, mesh: Mesh, tokens_per_device: int | None = None):
        self.config, self.mesh, self.sharding = config, mesh, NamedSharding(mesh, P(BATCH_AXES))
        cpu = mesh.devices.flat[0].platform == "cpu"
        self.tokens_per_device = tokens_per_device or (4096 if cpu else 65536)

        def losses(params: Params, batch: tuple[Int[Array, "B T1"], Bool[Array, "B T"]]):
            return score_tokens(config, params, batch[0])

        def score(params: Params, batch: tuple[Int[Array, "B T1"], Bool[Array, "B T"]]) -> Scores:
            (losses, likeliest), scored = score_tokens(config, params, batch[0]), batch[1]
            return Scores(jnp.where(scored, losses, 0).sum(1), scored.sum(1), (likeliest | ~scored).all(1))

        by_role = roles(config, abstract_params(config))
        self._losses, self._score = (
            jax.jit(
                with_whole_params(of_batch, by_role, mesh, config.dtype, P(BATCH_AXES), P(BATCH_AXES)),
                out_shardings=NamedSharding(mesh, P()),
            )
            for of_batch in (losses, score)
        )

    def __call__(
        self, params: Params, rows: Sequence[Row], *, label: str = "", check: Callable[[], None] = lambda: None
    ) -> Scores:
        """label: of a progress bar, where there is a terminal; none if empty. check: called before each batch."""
        scores = Scores(np.zeros(len(rows)), np.zeros(len(rows), int), np.zeros(len(rows), bool))
        for indices, result in self._run(self._score, params, rows, label, check):
            for of_all, of_batch in zip(scores, result, strict=True):
                of_all[indices] = of_batch[: len(indices)]
        return scores

    def per_token(self, params: Params, rows: Sequence[Row], *, label: str = "") -> list[Float[np.ndarray, " n"]]:
        """The loss in nats of each row's scored tokens, of those kept of it."""
        losses: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
        for indices, (of_batch, _) in self._run(self._losses, params, rows, label, lambda: None):
            for i, of_row in zip(indices, of_batch, strict=False):
                first, end = scored_span(rows[i], of_row.shape[0])
                losses[i] = of_row[first:end]
        return losses

    def _run(self, of_batch: Callable, params: Params, rows: Sequence[Row], label: str, check: Callable[[], None]):
        """Yields the indices of each batch's rows and what `of_batch` says of them."""
        batches, pending = self._batches(rows), None
        style = {"desc": label, "unit": "batch", "disable": not label or bar_hidden(), "dynamic_ncols": True}
        for indices, size, length in tqdm(batches, **style):
            check()
            result = of_batch(params, self._padded([rows[i] for i in indices], size, length))
            if pending:  # the host prepares one batch while the device computes another
                yield pending[0], jax.device_get(pending[1])
            pending = indices, result
        if pending:
            yield pending[0], jax.device_get(pending[1])

    def _batches(self, rows: Sequence[Row]) -> list[tuple[list[int], int, int]]:
        """Indices of up to `size` rows of similar length, `size`, and the length that they are padded to."""
        of_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            padded = max(self.MIN_LENGTH, 1 << (len(row.tokens) - 2).bit_length())
            of_length.setdefault(min(padded, self.config.block_size), []).append(i)
        batches = []
        for length, members in sorted(of_length.items(), reverse=True):  # the one that needs most memory first
            # few rows are spread over up to 8 devices; how many there are must not matter here
            per_device = max(1, min(self.tokens_per_device // length, -(-len(members) // 8)))
            size = per_device * data_shards(self.mesh)
            batches += [(members[start : start + size], size, length) for start in range(0, len(members), size)]
        return batches

    def _padded(self, rows: Sequence[Row], size: int, length: int) -> tuple[Int[Array, "B T1"], Bool[Array, "B T"]]:
        """The rows' tokens on the devices, and which of all but the first are scored."""
        tokens, scored = np.zeros((size, length + 1), np.int32), np.zeros((size, length), bool)
        for i, row in enumerate(rows):
            kept, (first, end) = row.tokens[-length - 1 :], scored_span(row, length)
            tokens[i, : len(kept)] = kept
            scored[i, first:end] = True
        x, y = (jax.make_array_from_callback(x.shape, self.sharding, x.__getitem__) for x in (tokens, scored))
        return x, y


def scored_span(row: Row, length: int) -> tuple[int, int]:
    """Which of `length` predictions, of all tokens kept but the first, are the row's scored ones: from, to."""
    kept = min(len(row.tokens), length + 1)
    return max(row.first - (len(row.tokens) - kept), 1) - 1, kept - 1


LOGITS_AT_ONCE = 2**28  # a float32 GiB


def score_tokens(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T1"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Loss in nats of each token but the first, given those before it, and whether it is the likeliest.

    Float32 logits are made for some of the time steps at a time, LOGITS_AT_ONCE of them at most.
    """
    model = bind(config, params)
    b, t = tokens.shape[0], tokens.shape[1] - 1
    x, _ = model.hidden(tokens[:, :-1])

    def at_step(inputs):  # hidden states (B, C) and targets (B,)
        logits = model.logits(inputs[0])
        at_target = jnp.take_along_axis(logits, inputs[1][:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - at_target, at_target >= logits.max(axis=-1)

    steps = max(1, LOGITS_AT_ONCE // (b * config.padded_vocab_size))
    losses, likeliest = jax.lax.map(
        at_step, (x.reshape(b, t, -1).swapaxes(0, 1), tokens[:, 1:].T), batch_size=min(steps, t)
    )
    return losses.T, likeliest.T
