"""A model written for others: Hugging Face's GPT-2, or safetensors of our own names; tokenizer and model card."""

import json
import math
import re
from pathlib import Path
from typing import Any

from tiktoken.load import read_file_cached

from jaxgpt import UserError, __version__, from_json, optional
from jaxgpt.config import DataConfig, read_saved
from jaxgpt.keys import keys
from jaxgpt.models import abstract_params, cast_params
from jaxgpt.optim import OptimizerConfig
from jaxgpt.tokenizer import ENDOFTEXT, GPT2_FILES, GPT2_URL, CharTokenizer, copy_tokenizer
from jaxgpt.weights import hf
from jaxgpt.weights.files import open_safetensors, save_params
from jaxgpt.weights.opening import SAFETENSORS, OpenedModel

UNKNOWN = "[UNK]"  # in no vocabulary: a character without an id is an error, as it is for `sample`
# what a row of metrics.jsonl says of the machine and of single steps, not of the model
NOT_RESULTS = {"step", "loss", "lr", "grad_norm", "step_ms", "tokens_per_s", "mfu", "wall_s"}

# keys that name places on this machine, and what an export says in their stead
PRIVATE = {"out_dir": "out", "data_dir": "", "init_from": "scratch", "eval_tasks": ""}

USE_HF = """```python
from transformers import pipeline

generate = pipeline("text-generation", "{title}")
print(generate({prompt}, max_new_tokens=100, do_sample=False)[0]["generated_text"])
```"""
USE_OWN = """```bash
python -m jaxgpt.sample --init_from={title}{model}
python -m jaxgpt.convert --from_safetensors={title}{model} --out_dir=out-{title}   # a run again
```"""


def write_hf(model: OpenedModel, folder: Path, title: str, dtype: str) -> None:
    """Fills a folder that transformers' AutoModelForCausalLM and AutoTokenizer open.

    UserError if the model is not gpt2, as GPT2LMHeadModel would compute something else with its weights, or if a weight
    is too large for dtype; OSError if it cannot be written.
    """
    if model.config.file.name != "gpt2":
        raise UserError(
            f"{model.source} is of model={model.config.file.name}, and Hugging Face's format here is GPT-2's alone; "
            "use --to_safetensors"
        )
    write_tokenizer(model, folder)
    hf.save_weights(folder, model.params, vars(model.config), dtype=dtype, eot=model.meta.eot)
    write_card(model, folder, title, "transformers", USE_HF)


def write_safetensors(model: OpenedModel, folder: Path, title: str, dtype: str) -> None:
    """Fills a folder laid out as a run's, with model.safetensors in place of checkpoints: open_model opens it like one.

    config.json is the run's, without what tells of its machine. Parameters whose role is float32 stay so. Errors as in
    `write_hf`.
    """
    copy_tokenizer(model.meta, model.folder, folder)
    wanted = cast_params(model.config, abstract_params(model.config), dtype)
    save_params(folder / SAFETENSORS, model.params, wanted)
    saved = read_saved(model.folder)
    about = {name: value for name, value in saved.get("environment", {}).items() if name not in ("host", "command")}
    saved = {name: value for name, value in saved.items() if name in model.run_config or name == "model_source"}
    content = saved | PRIVATE | {"environment": about}
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_card(model, folder, title, "jaxgpt", USE_OWN)


def write_tokenizer(model: OpenedModel, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, encoding text as ours does, for whatever tokenizer the model has."""
    tokenizers = optional("tokenizers", "jaxgpt[hf]", "writing a tokenizer.json")
    ours = model.tokenizer
    if isinstance(ours, CharTokenizer):  # characters or words, of which the longest that matches counts
        ids = {text: i for i, text in reversed(list(enumerate(ours.itos))) if text}
        theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN))
        words = [re.escape(text) for text in sorted(ids, key=len, reverse=True)]
        pattern = r"[\s\S]" if all(len(text) == 1 for text in ids) else "|".join([*words, r"[\s\S]"])
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        theirs.decoder = tokenizers.decoders.Fuse()
    elif model.meta.tokenizer == "gpt2":
        merges, vocab = (read_file_cached(GPT2_URL + name, sha256).decode() for name, sha256 in GPT2_FILES.items())
        pairs = [tuple(line.split()) for line in merges.splitlines()[1:]]
        theirs = tokenizers.ByteLevelBPETokenizer(from_json(vocab), pairs)
        theirs.add_special_tokens([ENDOFTEXT])
    else:
        theirs = tokenizers.Tokenizer.from_str((model.folder / model.meta.tokenizer).read_text("utf-8"))
        theirs.no_truncation()
        theirs.no_padding()
        plain, adding = (theirs.encode("a", add_special_tokens=add).ids for add in (False, True))
        if plain != adding:  # around each text: the model has not seen them there
            theirs.post_processor = tokenizers.processors.Sequence([])
    (folder / "tokenizer.json").write_text(theirs.to_str(pretty=True), encoding="utf-8")
    content: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if ours.eot is not None:
        content |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), ours.decode([ours.eot]))
    content["model_max_length"] = model.config.block_size
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")


def write_card(model: OpenedModel, folder: Path, title: str, library: str, use: str) -> None:
    """README.md, a model card in the hub's format: what the model is, its scores, how to use it, how it was trained.

    Of the config only what made the model: no paths, no hosts.
    """
    config, run = model.config, model.run_config
    count = sum(math.prod(tensor.shape) for _, tensor in open_safetensors(folder / SAFETENSORS))
    made = "converted" if "source" in model.info else "trained"
    version = read_saved(model.folder).get("environment", {}).get("jaxgpt", __version__)
    size = f"{count:,} parameters: {config.n_layer} layers of width "
    size += f"{config.n_embd}, {config.n_head} heads, contexts of {config.block_size:,} tokens, {model.meta.describe()}"
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [jaxgpt]", "---", ""]
    lines += [f"# {title}", "", f"A language model of {size}; {made} with jaxgpt {version}.", ""]
    if run.doc_mask:
        lines += ["In training no token saw another document than its own: give it one document at a time.", ""]
    if scores := _scores(model):
        lines += ["## Results", "", *_table({"step": model.step, **scores}), ""]
    file = f" --model={Path(run.model).name}" if config.file.source else ""
    lines += ["## Use", "", use.format(title=title, model=file, prompt=json.dumps(_example(model))), ""]
    if made == "trained":
        parts = {**keys(type(config)), **keys(OptimizerConfig), **keys(DataConfig)}
        values = {"model": Path(run.model).name} | {name: run[name] for name in parts if name != "data_dir"}
        lines += ["## Training", "", *_table(values), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _example(model: OpenedModel) -> str:
    """A prompt that has tokens."""
    prompt = "Once upon a time"
    try:
        model.encode(prompt)
    except UserError:  # a vocabulary of fewer characters
        prompt = model.tokenizer.decode([0])
    return prompt


def _scores(model: OpenedModel) -> dict[str, Any]:
    """The results in metrics.jsonl at the step of the model's checkpoint."""
    scores: dict[str, Any] = {}
    path = model.folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = from_json(line)
            scores |= {k: v for k, v in row.items() if k not in NOT_RESULTS} if row["step"] == model.step else {}
        except (ValueError, TypeError, LookupError, AttributeError):
            continue  # a line that a crash cut short
    return scores


def _table(values: dict[str, Any]) -> list[str]:
    def shown(value: Any) -> str:
        return f"{value:,}" if type(value) is int else f"{value:.6g}" if isinstance(value, float) else str(value)

    return ["| | |", "|---|---|", *(f"| {name} | {shown(value)} |" for name, value in values.items())]
