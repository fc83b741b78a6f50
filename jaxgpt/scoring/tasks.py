"""What a model is measured on: a whole validation split, HellaSwag, LAMBADA."""

import functools
import gzip
import hashlib
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxgpt import UserError, from_json, local_path, optional, silence, store
from jaxgpt.cache import Cache
from jaxgpt.config import DataConfig, read_saved
from jaxgpt.data import Corpus, corpus_folders
from jaxgpt.keys import take
from jaxgpt.metrics import perplexity
from jaxgpt.models import Params
from jaxgpt.scoring.scorer import Row, Scorer, Scores
from jaxgpt.tokenizer import Tokenizer, token_bytes
from jaxgpt.weights.files import first_line
from jaxgpt.weights.opening import OpenedModel

METRICS = {
    "val_loss": "nats per token",
    "val_ppl": "exp(val_loss)",
    "val_bpb": "bits per byte of text",
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

    def digest(self) -> str:
        """The same where the rows are."""
        rows = hashlib.sha256()
        for row in self.rows:
            rows.update(np.array([len(row.tokens), row.first, *row.tokens], np.int32).tobytes())
        return rows.hexdigest()[:16]


class Validation(NamedTuple):
    """The loss of every token of a split but the first, in windows laid end to end; each token weighs the same.

    Bits per byte are their losses over the UTF-8 bytes of their text, without special tokens, which are no text:
    comparable over tokenizers. They are left out where token_bytes is None (tokenizer.token_bytes says why).
    """

    name: str
    rows: list[Row]
    token_bytes: Int[np.ndarray, " vocab"] | None

    def run(self, scorer: Scorer, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        losses = np.concatenate(scorer.per_token(params, self.rows, label=self.name)).astype(np.float64)
        loss = math.fsum(losses) / len(losses)
        scores = {"loss": loss, "ppl": perplexity(loss)}
        if self.token_bytes is not None:
            targets = np.concatenate([row.tokens[1:] for row in self.rows])
            known = np.pad(self.token_bytes, (0, max(0, int(targets.max()) + 1 - len(self.token_bytes))))
            count = known[targets]
            if count.any():
                scores["bpb"] = math.fsum(losses[count > 0]) / (math.log(2) * int(count.sum()))
        return scores


def validation(corpus: Corpus, block_size: int, token_bytes: Int[np.ndarray, " vocab"] | None = None) -> Validation:
    """The task of a split; token_bytes: of its tokenizer."""
    starts = range(0, len(corpus) - 1, block_size)
    rows = [Row(corpus.read(np.array([i]), min(block_size + 1, len(corpus) - i))[0], 1) for i in starts]
    return Validation("val", rows, token_bytes)


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
            silence("datasets", "huggingface_hub")
            return list(datasets.load_dataset(dataset, subset, split=split))
        path = local_path(file)
        with gzip.open(path) if file.endswith(".gz") else open(path, "rb") as lines:
            return [from_json(line) for line in lines if line.strip()]
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        what = f"{file} cannot be read as JSON lines" if file else f"{dataset} cannot be fetched"
        raise UserError(f"{what} ({first_line(error)}); name a .jsonl or .jsonl.gz file: TASK=FILE") from None


def open_validation(model: OpenedModel, data_dir: str | None) -> Validation:
    """The validation split in data_dir, by default the one of a run."""
    if not data_dir and model.weights:
        raise UserError(f"which corpus? {model.source} comes without one: add --data_dir=FOLDER with its val.bin")
    folders = [store.folder(data_dir)] if data_dir else corpus_folders(take(DataConfig, model.run_config))
    if len(folders) > 1:
        raise UserError(f"which corpus? {model.source} was trained on several: add --data_dir=FOLDER of one of them")
    folder, began = folders[0], read_saved(model.folder).get("environment") if not data_dir else None
    if isinstance(folder, Path) and not folder.exists() and isinstance(began, dict) and "folder" in began:
        folder = Path(began["folder"], folder)  # as it was named where the run was started
    if data_dir and not folder.exists():
        raise UserError(f"--data_dir={data_dir} is not there; name a folder with a val.bin")
    if not folder.exists():
        raise UserError(
            f"{model.source} was trained on {folder}, which is not there; add --data_dir=FOLDER of its corpus"
        )
    cache = Cache(model.run_config.data_cache, model.run_config.data_cache_gb)
    corpus = Corpus.open(folder, "val", block_size=1, vocab_size=model.config.vocab_size, cache=cache)
    model.check_corpus(corpus.meta)
    try:
        lengths = token_bytes(model.tokenizer)
    except UserError:  # nothing turns its ids into text
        lengths = None
    return validation(corpus, model.config.block_size, lengths)
