"""Measures a model: loss over a whole split, HellaSwag, LAMBADA; opens runs and Hugging Face models for all modules.

`python -m jaxgpt.evaluate --out_dir=out --tasks=val,hellaswag=FILE` or `--init_from=gpt2 --data_dir=data/openwebtext`.
"""

import functools
import gzip
import json
import math
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxgpt import UserError, hf
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import GPT2_SIZES, Parser, default_config, read_config, run_main
from jaxgpt.data import Corpus
from jaxgpt.model import GPTConfig, Params, abstract_params, bind
from jaxgpt.sharding import (
    BATCH_AXES,
    configure_jax,
    data_shards,
    make_mesh,
    tree_shardings,
    with_whole_params,
)
from jaxgpt.step import make_model_config
from jaxgpt.tokenizer import GPT2_VOCAB_SIZE, Meta, Tokenizer, load_tokenizer, read_meta

# --- opening a model ---


def is_run(folder: Path) -> bool:
    """Whether config.json there is a run's. One of Hugging Face has a model_type."""
    path = folder / "config.json"
    return path.is_file() and "model_type" not in hf.read_json(path)


class OpenedModel:
    """A model to use: its shape is known; parameters and tokenizer are loaded when first asked for.

    So whatever is wrong with the tokenizer, the corpus or the settings shows before gigabytes are read.
    """

    source: str  # the name or folder it came from
    config: GPTConfig
    run_config: ConfigDict  # a run's, or the defaults with the shape of a Hugging Face model
    meta: Meta
    step: int | None = None  # of a run's checkpoint, once `params` have been read; likewise its info

    def __init__(
        self, source: str, *, mesh: Mesh, dtype: str, which: str | int, param_dtype: str | None, block_size: int | None
    ):
        self.source, self.mesh, self.which, self.info = source, mesh, which, {}
        self.weights: hf.Weights | None = None
        if source in GPT2_SIZES or not is_run(Path(source)):
            self.weights = hf.open_weights(source)
            self.folder, self.meta, run = self.weights.folder, self.weights.meta, default_config()
            run.update({key: value for key, value in self.weights.fields.items() if key in run})
        else:
            self.folder, run = Path(source), read_config(Path(source))
            self.meta = read_meta(self.folder) or Meta(GPT2_VOCAB_SIZE, eot=GPT2_VOCAB_SIZE - 1)
        self.run_config = run.copy_and_resolve_references()
        # what the run's own machine decided does not bind this one
        run.update(dtype=dtype, attention="auto", kernels="auto", remat="none")
        self._stored = make_model_config(run, self.meta.vocab_size, mesh, self.meta.eot)
        if block_size is not None:
            if block_size > self._stored.block_size:
                limit = self._stored.block_size
                raise UserError(f"block_size={block_size} is more than the {limit} positions of {source}; lower it")
            run.block_size = block_size
        self.config = make_model_config(run, self.meta.vocab_size, mesh, self.meta.eot)
        self._param_dtype = param_dtype or self.config.dtype

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
        if not theirs.vocab_size <= ours.vocab_size <= padded or (
            ours.itos and theirs.itos and ours.itos != theirs.itos
        ):
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
            return x.dtype if "ln_" in jax.tree_util.keystr(path) else jnp.dtype(self._param_dtype)

        def described(config: GPTConfig, dtype: Callable) -> Params:
            shapes = abstract_params(config)
            shardings = tree_shardings(shapes, self.mesh)
            return jax.tree_util.tree_map_with_path(
                lambda path, x, s: jax.ShapeDtypeStruct(x.shape, dtype(path, x), sharding=s), shapes, shardings
            )

        if self.weights is not None:
            return self.weights.params(described(self.config, dtype_of))
        abstract = {"params": described(self._stored, lambda _, x: x.dtype)}
        state, self.info, self.step = Checkpoints(self.folder).restore(abstract, self.which)  # type: ignore[arg-type]
        params = jax.tree_util.tree_map_with_path(lambda path, x: x.astype(dtype_of(path, x)), state["params"])
        params["wpe"]["embedding"] = params["wpe"]["embedding"][: self.config.block_size]
        return params


def open_model(
    out_dir: str | None = None,
    init_from: str | None = None,
    *,
    mesh: Mesh,
    dtype: str = "auto",
    which: Literal["best", "latest"] | int = "best",
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
    return OpenedModel(source, mesh=mesh, dtype=dtype, which=which, param_dtype=param_dtype, block_size=block_size)


def which_checkpoint(text: str) -> Literal["best", "latest"] | int:
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

    loss: Float[np.ndarray, " rows"]
    count: Int[np.ndarray, " rows"]
    greedy: Bool[np.ndarray, " rows"]


class Scorer:
    """Scores rows of any length; one compiled function for each of a few lengths that rows are padded to.

    Every device always computes the same number of rows, so where it holds the whole model, a row's score is the same
    to the bit on any number of devices. Rows longer than block_size + 1 lose their beginning.
    """

    MIN_LENGTH = 32  # lengths are this, doubled up to block_size: six of them for 1,024

    def __init__(self, config: GPTConfig, mesh: Mesh, tokens_per_device: int | None = None):
        self.config, self.mesh = config, mesh
        cpu = mesh.devices.flat[0].platform == "cpu"
        self.tokens_per_device = tokens_per_device or (4096 if cpu else 65536)
        self.sharding = NamedSharding(mesh, P(BATCH_AXES, None))
        score = functools.partial(score_tokens, config)
        score = with_whole_params(score, mesh, config.dtype, P(BATCH_AXES, None), P(BATCH_AXES, None))
        self._score = jax.jit(score, out_shardings=NamedSharding(mesh, P()))

    def __call__(
        self, params: Params, rows: Sequence[Row], *, label: str = "", check: Callable[[], None] = lambda: None
    ) -> Scores:
        """label: of a progress bar, where there is a terminal; none if empty. check: called before each batch."""
        scores = Scores(np.zeros(len(rows)), np.zeros(len(rows), np.int64), np.zeros(len(rows), bool))
        hidden = True if not label or jax.process_index() else None  # None: shown on a terminal
        with tqdm(total=len(rows), desc=label, disable=hidden, file=sys.stderr, dynamic_ncols=True) as bar:
            running = deque()
            for indices, length, batch in self._batches(rows):
                check()
                tokens = jax.make_array_from_callback(batch.shape, self.sharding, batch.__getitem__)
                running.append((indices, length, self._score(params, tokens)))
                if len(running) == 2:  # the host reads one batch while the device computes the next
                    bar.update(self._collect(scores, rows, *running.popleft()))
            while running:
                bar.update(self._collect(scores, rows, *running.popleft()))
        return scores

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], int, Int[np.ndarray, "B T1"]]]:
        """Batches of padded rows of similar length, with these rows' indices."""
        lengths = [min(len(row.tokens) - 1, self.config.block_size) for row in rows]
        of_length: dict[int, list[int]] = {}
        for i, n in enumerate(lengths):
            padded = max(self.MIN_LENGTH, 1 << (n - 1).bit_length())
            of_length.setdefault(min(padded, self.config.block_size), []).append(i)
        for length, members in sorted(of_length.items(), reverse=True):  # the one that needs most memory first
            # few rows are spread over up to 8 devices; how many there are must not matter here
            per_device = max(1, min(self.tokens_per_device // length, -(-len(members) // 8)))
            size = per_device * data_shards(self.mesh)
            for start in range(0, len(members), size):
                indices = members[start : start + size]
                batch = np.zeros((size, length + 1), np.int32)
                for line, i in zip(batch, indices, strict=False):
                    line[: lengths[i] + 1] = rows[i].tokens[-lengths[i] - 1 :]
                yield indices, length, batch

    @staticmethod
    def _collect(scores: Scores, rows: Sequence[Row], indices: list[int], length: int, result) -> int:
        losses, likeliest = (np.asarray(x) for x in result)
        for line, i in enumerate(indices):
            n = len(rows[i].tokens)
            cut = max(0, n - length - 1)
            scored = slice(max(rows[i].first - cut, 1) - 1, n - cut - 1)
            scores.loss[i] = losses[line, scored].sum(dtype=np.float64)
            scores.count[i] = scored.stop - scored.start
            scores.greedy[i] = likeliest[line, scored].all()
        return len(indices)


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
    fitting = max(1, LOGITS_AT_ONCE // (b * config.padded_vocab_size))
    parts = next(n for n in range(1, t + 1) if t % n == 0 and t // n <= fitting)

    def part(of):
        logits = model.logits(of[0])
        at_target = jnp.take_along_axis(logits, of[1][..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - at_target, at_target >= logits.max(axis=-1)

    def split(y):  # (B, T, …) -> (parts, B, T/parts, …)
        return y.reshape(b, parts, t // parts, *y.shape[2:]).swapaxes(0, 1)

    results = jax.lax.map(part, (split(x.reshape(b, t, -1)), split(tokens[:, 1:])))
    return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(b, t), results)


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
    starts = np.arange(0, len(corpus) - 1, block_size)
    widths = np.minimum(block_size + 1, len(corpus) - starts)
    rows = [Row(corpus.read(starts[i : i + 1], int(widths[i]))[0], 1) for i in range(len(starts))]

    def summarize(scores: Scores) -> dict[str, float]:
        loss = math.fsum(scores.loss) / int(scores.count.sum())
        return {"loss": loss, "ppl": math.exp(min(loss, 700.0))}

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
    perplexity = math.exp(min(float(scores.loss.mean()), 700.0))
    return {"acc": float(scores.greedy.mean()), "ppl": perplexity}


# HellaSwag (arXiv 1905.07830) and LAMBADA (arXiv 1606.06031), zero-shot, with where `datasets` finds them
SUITES = {
    "hellaswag": (hellaswag_item, hellaswag_metrics, ("Rowan/hellaswag", None, "validation")),
    "lambada": (lambada_item, lambada_metrics, ("EleutherAI/lambada_openai", "en", "test")),
}


def parse_tasks(text: str, also: Sequence[str] = ()) -> dict[str, str]:
    """{name: file or ""} of `hellaswag=FILE,lambada`. UserError on a name that is neither a suite's nor in `also`."""
    words = [word.strip().partition("=") for word in text.split(",") if word.strip()]
    tasks = {name: file for name, _, file in words}
    names = (*also, *SUITES)
    if unknown := [name for name in tasks if name not in names]:
        raise UserError(f"there is no task {unknown[0]!r}; choose of {', '.join(names)}")
    return tasks


def load_task(name: str, file: str, tokenizer: Tokenizer) -> Task:
    """A suite from a local file (.jsonl, .jsonl.gz) or, without one, through `datasets`; all of it tokenized.

    UserError: no such file, a line of it that is no item, no data set to be had.
    """
    parse, metrics, hub = SUITES[name]
    items = []
    for number, record in enumerate(_read_records(Path(file)) if file else _fetch(*hub), start=1):
        try:
            items.append(parse(record))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file or hub[0]}: item {number} is none of {name}'s ({error!r})") from None
    if not items:
        raise UserError(f"{file or hub[0]} holds no items; fetch it again")
    rows = []
    for item in items:
        shared = len(tokenizer.encode(item.context))
        for ending in item.endings:  # encoded with its context, as the tokenizer would meet it
            tokens = tokenizer.encode(f"{item.context} {ending}")
            rows.append(Row(np.array(tokens, np.int32), max(1, min(shared, len(tokens) - 1))))
    return Task(name, rows, functools.partial(metrics, items))


def _read_records(path: Path) -> list[Any]:
    try:
        content = path.read_bytes()
        text = gzip.decompress(content) if path.suffix == ".gz" else content
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON lines ({error}); name a .jsonl or .jsonl.gz file") from None


def _fetch(dataset: str, subset: str | None, split: str) -> list[Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{dataset} needs the datasets library: pip install 'jaxgpt[data]', or name a file") from None
    try:
        return list(load_dataset(dataset, subset, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{dataset} cannot be fetched ({reason}); name a local file: TASK=FILE") from None


# --- the entry point ---


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m jaxgpt.evaluate", description="Measures a model on a corpus and on task suites.")
    parser.add_argument("--out_dir", help="folder of a run")
    parser.add_argument("--init_from", help=f"{', '.join(GPT2_SIZES)}, or a folder: a run or a Hugging Face model")
    parser.add_argument("--tasks", default="val", help="of val, hellaswag[=FILE], lambada[=FILE], with commas between")
    parser.add_argument("--data_dir", help="where val.bin is; default: the run's")
    parser.add_argument("--split", default="val", help="which split `val` reads")
    parser.add_argument("--checkpoint", default="best", help="of a run: best, latest or a step")
    parser.add_argument("--block_size", type=int, help="length of `val`'s windows; default: the model's")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse(argv)
    wanted, which = parse_tasks(args.tasks, also=["val"]), which_checkpoint(args.checkpoint)
    if not wanted or wanted.get("val"):
        raise UserError("--tasks names one task at least, and no file for val: that is in --data_dir")
    configure_jax()
    mesh = make_mesh()
    model = open_model(
        args.out_dir, args.init_from, mesh=mesh, dtype=args.dtype, which=which, block_size=args.block_size
    )
    tasks = []  # all read and tokenized before the parameters
    for name, file in wanted.items():
        if name != "val":
            tasks.append(load_task(name, file, model.tokenizer))
            continue
        run = model.run_config
        if not args.data_dir and model.weights is not None:
            raise UserError(f"which corpus? {model.source} comes without one: add --data_dir=FOLDER with its val.bin")
        folder = args.data_dir or str(run.data_dir) or f"data/{run.dataset}"
        corpus = Corpus.open(folder, args.split, block_size=1, vocab_size=model.config.vocab_size)
        model.check_corpus(corpus.meta)
        tasks.append(validation(corpus, model.config.block_size))
    scorer = Scorer(model.config, mesh)
    results: dict[str, float] = {}
    for task in tasks:
        results |= {f"{task.name}_{key}": value for key, value in task.run(scorer, model.params).items()}
    if jax.process_index() == 0 and args.json:
        print(json.dumps({"model": model.source, "step": model.step, **results}))
    elif jax.process_index() == 0:
        print(f"{model.source}" + ("" if model.step is None else f", step {model.step}"))
        for name, value in results.items():
            print(f"  {name:<20}{value:>12.4f}  {METRICS[name]}")


if __name__ == "__main__":
    run_main(main)
