"""Measures a model: loss over a whole split, HellaSwag, LAMBADA; opens runs and Hugging Face models for all modules.

`python -m jaxgpt.evaluate --out_dir=out --tasks=val,hellaswag=FILE` or `--init_from=gpt2 --data_dir=data/openwebtext`.
"""

import dataclasses
import functools
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import tree_map_with_path
from jaxtyping import Array, Bool, Float, Int, Integer
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxgpt import UserError, hf, optional
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import CHOICES, GPT2_SIZES, Parser, default_config, read_config, run_main
from jaxgpt.data import Corpus, corpus_folders
from jaxgpt.metrics import perplexity
from jaxgpt.model import GPTConfig, Params, abstract_params, bind
from jaxgpt.processes import Processes
from jaxgpt.sharding import BATCH_AXES, configure_jax, data_shards, make_mesh, tree_shardings, with_whole_params
from jaxgpt.step import make_model_config
from jaxgpt.tokenizer import Meta, Tokenizer, corpus_meta, load_tokenizer

# --- opening a model ---

Which = Literal["best", "latest"] | int  # a checkpoint of a run


@dataclasses.dataclass
class OpenedModel:
    """A model to use: its shape is known; parameters and tokenizer are loaded when first asked for.

    So whatever is wrong with the tokenizer, the corpus or the settings shows before gigabytes are read.
    """

    source: str  # the name or folder it came from
    folder: Path
    meta: Meta  # of its tokenizer
    run_config: ConfigDict  # a run's, or the defaults with the shape of a Hugging Face model
    config: GPTConfig
    weights: hf.Weights | None  # of a Hugging Face model; a run has none
    mesh: Mesh
    which: Which
    param_dtype: str
    step: int | None = None  # of a run's checkpoint, once `params` have been read

    def adopt(self, config: ConfigDict) -> None:
        """Fits the config of a run that starts from these weights: sizes that are 0 there become the weights'.

        UserError, naming the key and both values, where it contradicts them.
        """
        for key in ("n_layer", "n_head", "n_embd", "bias"):
            if key != "bias" and config[key] == 0:
                config[key] = self.run_config[key]
            if config[key] != self.run_config[key]:
                raise UserError(
                    f"{key}={config[key]} contradicts the weights of {self.source}; set {key}={self.run_config[key]}"
                )

    def check_corpus(self, meta: Meta) -> None:
        """UserError unless the corpus has the model's vocabulary, of which the model may have padded the size."""
        ours, theirs = self.meta, meta
        padded = -(-theirs.vocab_size // 128) * 128
        other_characters = ours.itos and theirs.itos and ours.itos != theirs.itos
        if other_characters or not theirs.vocab_size <= ours.vocab_size <= padded:
            raise UserError(
                f"the corpus has a vocabulary of {theirs.vocab_size:,} ({theirs.tokenizer}), {self.source} another of "
                f"{ours.vocab_size:,} ({ours.tokenizer}); prepare the corpus with the model's tokenizer"
            )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises UserError if it is not there."""
        return load_tokenizer(self.meta, self.folder)

    @functools.cached_property
    def params(self) -> Params:
        """The parameters on the mesh, in param_dtype but for those of layer norms, which compute in float32."""

        def dtype_of(path, x) -> jnp.dtype:
            return x.dtype if "ln_" in jax.tree_util.keystr(path) else jnp.dtype(self.param_dtype)

        stored = dataclasses.replace(self.config, block_size=self.run_config.block_size)
        shapes = abstract_params(self.config if self.weights else stored)
        shapes = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, tree_shardings(shapes, self.mesh))
        if self.weights:
            return self.weights.params(tree_map_with_path(lambda path, x: x.update(dtype=dtype_of(path, x)), shapes))
        state, _, self.step = Checkpoints(self.folder).restore({"params": shapes}, self.which)
        params = tree_map_with_path(lambda path, x: x.astype(dtype_of(path, x)), state["params"])
        params["wpe"]["embedding"] = params["wpe"]["embedding"][: self.config.block_size]
        return params


def open_model(
    out_dir: str | None = None,
    init_from: str | None = None,
    *,
    mesh: Mesh,
    dtype: str = "auto",
    which: Which = "best",
    param_dtype: str | None = None,
    block_size: int | None = None,
) -> OpenedModel:
    """A run's folder (out_dir), or what init_from names: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder of either.

    dtype: of the computation. param_dtype: in which the parameters are kept, by default the same: the computation casts
    them to it anyway, so that the results are the same to the bit. which: the checkpoint of a run. block_size: fewer
    positions than the model has. UserError if there is no such model.
    """
    if (not out_dir) == (not init_from):
        raise UserError("name one model: --out_dir=FOLDER of a run, or --init_from=gpt2 or a folder")
    source = f"./{out_dir}" if out_dir in GPT2_SIZES else str(out_dir or init_from)
    folder = Path(source)
    has_config = source not in GPT2_SIZES and (folder / "config.json").is_file()
    if has_config and "model_type" not in hf.read_json(folder / "config.json"):
        weights, run = None, read_config(folder)
        meta = corpus_meta(folder)
    else:
        weights, run = hf.open_weights(source), default_config()
        folder, meta = weights.folder, weights.meta
        run.update({key: value for key, value in weights.fields.items() if key in run})
    block_size = run.block_size if block_size is None else block_size
    if block_size > run.block_size:
        raise UserError(f"block_size={block_size} is more than the {run.block_size} positions of {source}; lower it")
    here = run.copy_and_resolve_references()  # what the run's own machine decided does not bind this one
    here.update(dtype=dtype, matmul_dtype="auto", attention="auto", kernels="auto", remat="none", block_size=block_size)
    config = make_model_config(here, meta.vocab_size, mesh, meta.eot)
    return OpenedModel(source, folder, meta, run, config, weights, mesh, which, param_dtype or config.dtype)


def add_model_arguments(parser: Parser) -> None:
    """The arguments that name a model for open_model."""
    parser.add_argument("--out_dir", help="folder of a run")
    parser.add_argument("--init_from", help=f"{', '.join(GPT2_SIZES)}, or a folder: a run or a Hugging Face model")
    add_checkpoint_argument(parser)
    parser.add_argument("--dtype", default="auto", choices=CHOICES["dtype"])


def add_checkpoint_argument(parser: Parser) -> None:
    """--checkpoint: open_model's `which`."""
    parser.add_argument("--checkpoint", type=which_checkpoint, default="best", help="of a run: best, latest or a step")


def which_checkpoint(text: str) -> Which:
    """best, latest or a step. UserError on anything else."""
    if text == "best" or text == "latest":
        return text
    if text.isdecimal():
        return int(text)
    raise UserError(f"--checkpoint={text} is not best, latest or a step")


# --- losses ---


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

    def __init__(self, config: GPTConfig, mesh: Mesh, tokens_per_device: int | None = None):
        self.config, self.mesh, self.sharding = config, mesh, NamedSharding(mesh, P(BATCH_AXES))
        cpu = mesh.devices.flat[0].platform == "cpu"
        self.tokens_per_device = tokens_per_device or (4096 if cpu else 65536)

        def score(params: Params, batch: tuple[Int[Array, "B T1"], Bool[Array, "B T"]]) -> Scores:
            tokens, scored = batch
            losses, likeliest = score_tokens(config, params, tokens)
            return Scores(jnp.where(scored, losses, 0).sum(1), scored.sum(1), (likeliest | ~scored).all(1))

        score = with_whole_params(score, mesh, config.dtype, P(BATCH_AXES), P(BATCH_AXES))
        self._score = jax.jit(score, out_shardings=NamedSharding(mesh, P()))

    def __call__(
        self, params: Params, rows: Sequence[Row], *, label: str = "", check: Callable[[], None] = lambda: None
    ) -> Scores:
        """label: of a progress bar, where there is a terminal; none if empty. check: called before each batch."""
        batches, results = self._batches(rows), []
        hidden = True if not label or jax.process_index() else None  # None: shown on a terminal
        for indices, size, length in tqdm(batches, desc=label, disable=hidden, dynamic_ncols=True):
            check()
            results.append(self._score(params, self._padded([rows[i] for i in indices], size, length)))
            jax.block_until_ready(results[-2:-1])  # the host prepares one batch while the device computes another
        scores = Scores(np.zeros(len(rows)), np.zeros(len(rows), int), np.zeros(len(rows), bool))
        for (indices, _, _), result in zip(batches, jax.device_get(results), strict=True):
            for of_all, of_batch in zip(scores, result, strict=True):
                of_all[indices] = of_batch[: len(indices)]
        return scores

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
            kept = row.tokens[-length - 1 :]
            first = row.first - (len(row.tokens) - len(kept))
            tokens[i, : len(kept)] = kept
            scored[i, max(first, 1) - 1 : len(kept) - 1] = True
        x, y = (jax.make_array_from_callback(x.shape, self.sharding, x.__getitem__) for x in (tokens, scored))
        return x, y


LOGITS_AT_ONCE = 2**28  # a float32 GiB


def score_tokens(
    config: GPTConfig, params: Params, tokens: Int[Array, "B T1"]
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


# --- tasks ---

METRICS = {
    "val_loss": "nats per token",
    "val_ppl": "exp(val_loss)",
    "hellaswag_acc": "highest log-likelihood",
    "hellaswag_acc_norm": "… per character, as lm-evaluation-harness",
    "hellaswag_acc_token": "… per token, as llm.c",
    "lambada_acc": "last word predicted greedily",
    "lambada_ppl": "perplexity of the last word",
}


class Task(NamedTuple):
    """Rows to score, and the metrics that follow from their scores."""

    name: str
    rows: list[Row]
    summarize: Callable[[Scores], dict[str, float]]

    def run(self, scorer: Scorer, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        return self.summarize(scorer(params, self.rows, label=self.name, check=check))


def validation(corpus: Corpus, block_size: int) -> Task:
    """Every token of the split but the first, in windows of block_size laid end to end; each token weighs the same."""
    starts = range(0, len(corpus) - 1, block_size)
    rows = [Row(corpus.read(np.array([i]), min(block_size + 1, len(corpus) - i))[0], 1) for i in starts]

    def summarize(scores: Scores) -> dict[str, float]:
        loss = math.fsum(scores.loss) / int(scores.count.sum())
        return {"loss": loss, "ppl": perplexity(loss)}

    return Task("val", rows, summarize)


class Item(NamedTuple):
    """A context, the texts that may follow it (after a space), and which of them does."""

    context: str
    endings: list[str]
    label: int


def hellaswag_item(record: Mapping[str, Any]) -> Item:
    """{"ctx", "endings", "label"} with ctx as it is to be read, or a record of the data set itself.

    The latter as lm-evaluation-harness prepares it (lm_eval/tasks/hellaswag/utils.py).
    """
    texts = [record["ctx"], *record["endings"]]
    if "activity_label" in record:
        texts[0] = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        texts = [re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ") for text in texts]
    item = Item(texts[0], texts[1:], int(record["label"]))
    if len(item.endings) != 4 or item.label not in range(4) or not all(isinstance(t, str) and t for t in texts):
        raise ValueError("not four endings and one of them right")
    return item


def hellaswag_metrics(items: Sequence[Item], scores: Scores) -> dict[str, float]:
    loss, tokens = scores.loss.reshape(-1, 4), scores.count.reshape(-1, 4)
    characters = np.array([[len(ending) for ending in item.endings] for item in items])
    labels = np.array([item.label for item in items])
    by = {"acc": loss, "acc_norm": loss / characters, "acc_token": loss / tokens}
    return {name: float(np.mean(x.argmin(axis=1) == labels)) for name, x in by.items()}


def lambada_item(record: Mapping[str, Any]) -> Item:
    """The last word of {"text"} and all before it."""
    context, _, word = record["text"].strip().rpartition(" ")
    if not context or not word:
        raise ValueError("fewer than two words")
    return Item(context, [word], 0)


def lambada_metrics(items: Sequence[Item], scores: Scores) -> dict[str, float]:
    return {"acc": float(scores.greedy.mean()), "ppl": perplexity(float(scores.loss.mean()))}


# HellaSwag (arXiv 1905.07830) and LAMBADA (arXiv 1606.06031), zero-shot, with where `datasets` finds them
SUITES = {
    "hellaswag": (hellaswag_item, hellaswag_metrics, ("Rowan/hellaswag", None, "validation")),
    "lambada": (lambada_item, lambada_metrics, ("EleutherAI/lambada_openai", "en", "test")),
}


def parse_tasks(text: str, also: Sequence[str] = ()) -> dict[str, str]:
    """{name: file or ""} of `hellaswag=FILE,lambada`. UserError on a name that is neither a suite's nor in `also`."""
    tasks, names = {}, (*also, *SUITES)
    for word in [word.strip() for word in text.split(",") if word.strip()]:
        name, _, file = word.partition("=")
        if name not in names:
            raise UserError(f"there is no task {name!r}; choose of {', '.join(names)}")
        tasks[name] = file
    return tasks


def load_task(name: str, file: str, tokenizer: Tokenizer) -> Task:
    """A suite from a local file (.jsonl, .jsonl.gz) or, without one, through `datasets`; all of it tokenized.

    UserError: no such file, a line of it that is no item, no data set to be had.
    """
    parse, metrics, hub = SUITES[name]
    items, rows = [], []
    for number, record in enumerate(_records(file, *hub), start=1):
        try:
            items.append(item := parse(record))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file or hub[0]}: item {number} is none of {name}'s ({error!r})") from None
        shared = len(tokenizer.encode(item.context))
        for ending in item.endings:  # encoded with its context, as the tokenizer would meet it
            tokens = tokenizer.encode(f"{item.context} {ending}")
            rows.append(Row(np.array(tokens, np.int32), max(1, min(shared, len(tokens) - 1))))
    if not items:
        raise UserError(f"{file or hub[0]} holds no items; fetch it again")
    return Task(name, rows, functools.partial(metrics, items))


def _records(file: str, dataset: str, subset: str | None, split: str) -> list[Any]:
    """Those of a local file or, without one, of a data set of the hub."""
    try:
        if not file:
            datasets = optional("datasets", "jaxgpt[data]", f"fetching {dataset}, unless a file is named,")
            return list(datasets.load_dataset(dataset, subset, split=split))
        with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        what = f"{file} cannot be read as JSON lines" if file else f"{dataset} cannot be fetched"
        raise UserError(f"{what} ({hf.first_line(error)}); name a .jsonl or .jsonl.gz file: TASK=FILE") from None


def open_validation(model: OpenedModel, data_dir: str | None) -> Task:
    """The validation split in data_dir, by default the one of a run."""
    if not data_dir and model.weights:
        raise UserError(f"which corpus? {model.source} comes without one: add --data_dir=FOLDER with its val.bin")
    folders = [Path(data_dir)] if data_dir else corpus_folders(model.run_config)
    if len(folders) > 1:
        raise UserError(f"which corpus? {model.source} was trained on several: add --data_dir=FOLDER of one of them")
    corpus = Corpus.open(folders[0], "val", block_size=1, vocab_size=model.config.vocab_size)
    model.check_corpus(corpus.meta)
    return validation(corpus, model.config.block_size)


# --- the entry point ---


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m jaxgpt.evaluate", description="Measures a model on a corpus and on task suites.")
    add_model_arguments(parser)
    parser.add_argument("--tasks", default="val", help="of val, hellaswag[=FILE], lambada[=FILE], with commas between")
    parser.add_argument("--data_dir", help="where val.bin is; default: the run's")
    parser.add_argument("--block_size", type=int, help="length of `val`'s windows; default: the model's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse(argv)
    files = parse_tasks(args.tasks, also=["val"])
    if not files or files.get("val"):
        raise UserError("--tasks names one task at least, and no file for val: that is in --data_dir")
    configure_jax()
    with Processes():  # of which the first alone prints
        mesh, which = make_mesh(), args.checkpoint
        model = open_model(
            args.out_dir, args.init_from, mesh=mesh, dtype=args.dtype, which=which, block_size=args.block_size
        )
        tasks = [  # all read and tokenized before the parameters
            open_validation(model, args.data_dir) if name == "val" else load_task(name, file, model.tokenizer)
            for name, file in files.items()
        ]
        scorer, results = Scorer(model.config, mesh), {}
        for task in tasks:
            results |= {f"{task.name}_{key}": value for key, value in task.run(scorer, model.params).items()}
        if args.json:
            print(json.dumps({"model": model.source, "step": model.step, **results}))
            return
        print(model.source if model.step is None else f"{model.source}, step {model.step}")
        for name, value in results.items():
            print(f"  {name:<20}{value:>12.4f}  {METRICS[name]}")


if __name__ == "__main__":
    run_main(main)
