"""GPT-2's own weights: the names, layouts and files of Hugging Face models, read into our parameters and written back.

Nothing is read before every tensor of the model has been accounted for by name, shape and kind, and then one at a time.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import UserError, from_json, optional
from jaxgpt.config import GPT2_SIZES
from jaxgpt.tokenizer import GPT2_FILES, GPT2_VOCAB_SIZE, Meta, token_dtype
from jaxgpt.weights.files import (
    FLOATS,
    Tensor,
    cast,
    first_line,
    load_torch,
    open_safetensors,
    place,
    read_json,
    save_safetensors,
    torch_tensors,
)

# Of each module: its name, GPT-2's and ours; what we call its weight; GPT-2's shape of that, with V vocabulary,
# T positions, C n_embd. All but the embeddings have a bias as well, of the last dimension's size. Matrices are (in,
# out), as in GPT-2's Conv1D. Ours differ in shape alone: c_attn is (C, 3, C), wte has zeros up to a multiple of 128.
TABLE = (
    ("wte", "embedding", "V C"),
    ("wpe", "embedding", "T C"),
    ("h.{i}.ln_1", "scale", "C"),
    ("h.{i}.attn.c_attn", "kernel", "C 3C"),
    ("h.{i}.attn.c_proj", "kernel", "C C"),
    ("h.{i}.ln_2", "scale", "C"),
    ("h.{i}.mlp.c_fc", "kernel", "C 4C"),
    ("h.{i}.mlp.c_proj", "kernel", "4C C"),
    ("ln_f", "scale", "C"),
)
# Not part of the language model: the causal mask, which old files carry as buffers, and the heads of the other GPT-2
# classes of transformers and TRL, which transformers leaves out as well when it opens a language model.
NOT_WEIGHTS = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)|(multiple_choice_head|score|classifier|qa_outputs|v_head)\..+"
)
EMBEDDING, HEAD = "wte.weight", "lm_head.weight"  # one tied parameter: stored under either name or twice

# What config.json must say, where it says anything, for its weights to mean what our model computes: what we write,
# then what computes the same. Absent keys have these values in transformers' GPT2Config too.
OUR_ARCHITECTURE = {
    "model_type": ("gpt2",),
    # GELU's tanh form has five names in transformers' activations.py
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),  # False: the head is stored, and must equal the table
    "quantization_config": (None,),
}
SIZES = {k: k for k in ("vocab_size", "n_layer", "n_head", "n_embd")} | {"block_size": "n_positions"}  # ours: GPT-2's
# GPT2Config's other names for sizes (its attribute_map), and the sizes of a config.json that gives none
OTHER_NAMES = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
               "n_layer": "num_hidden_layers"}  # fmt: skip
GPT2_SMALL = {"vocab_size": GPT2_VOCAB_SIZE, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = ("float32", "float16", "bfloat16")


def _table(fields: Mapping[str, Any]) -> dict[str, tuple[tuple[str | int, ...], tuple[int, ...]]]:
    """GPT-2's name of each tensor -> our path and GPT-2's shape, for a model of these fields."""
    c = fields["n_embd"]
    sizes = {"V": fields["vocab_size"], "T": fields["block_size"], "C": c, "3C": 3 * c, "4C": 4 * c}
    table = {}
    for module, leaf, letters in TABLE:
        shape = tuple(sizes[letter] for letter in letters.split())
        for i in range(fields["n_layer"] if "{i}" in module else 1):
            name = module.format(i=i)
            path = tuple(int(key) if key.isdigit() else key for key in name.split("."))
            table[f"{name}.weight"] = (*path, leaf), shape
            if leaf != "embedding" and fields["bias"]:
                table[f"{name}.bias"] = (*path, "bias"), shape[-1:]
    return table


class Weights(NamedTuple):
    """A GPT-2 in a folder of files: its shape is known, its tensors are read when asked for."""

    folder: Path
    fields: dict[str, Any]  # of GPTConfig: block_size vocab_size n_layer n_head n_embd bias
    meta: Meta  # the tokenizer it goes with
    tensors: dict[str, Tensor]  # by GPT-2's name

    def params(self, abstract: Any) -> Any:
        """The parameters: `abstract` gives shape, dtype and sharding of each (see opening.placed_params).

        One tensor at a time is on the host, and goes from there straight onto the devices' shards.
        """
        names = {path: name for name, (path, _) in _table(self.fields).items()}

        def read(path, leaf) -> jax.Array:
            name = names[tuple(p.key for p in path)]
            tensor = self.tensors[name].read()
            if name == EMBEDDING:  # the padding of the vocabulary
                tensor = np.pad(tensor, ((0, leaf.shape[0] - len(tensor)), (0, 0)))
            return place(tensor.reshape(leaf.shape), leaf)

        return jax.tree_util.tree_map_with_path(read, abstract)


def open_weights(source: str) -> Weights:
    """The weights of gpt2, gpt2-medium, gpt2-large, gpt2-xl (fetched from the hub or its cache) or of a local folder.

    Reads names and shapes, and compares lm_head with wte where both are stored; no weight is placed on a device yet.
    UserError: not there, damaged, not GPT-2's architecture, a tensor missing, unknown or of the wrong shape.
    """
    folder = _download(source) if source in GPT2_SIZES else Path(source)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{source} is neither {', '.join(GPT2_SIZES)} nor a folder with a run or a model (config.json)")
    config = read_json(path)
    fields = _fields(config, path)
    if (folder / "adapter_config.json").is_file():  # which transformers adds to the weights, where peft is installed
        raise UserError(f"{folder} has an adapter (adapter_config.json); merge it into the weights first")
    tied = config.get("tie_word_embeddings", True)
    tensors = account(_open_files(folder), fields, str(folder), tied=tied)
    return Weights(folder, fields, _meta(folder, fields["vocab_size"], config), tensors)


def account(
    stored: Iterable[tuple[str, Tensor]], fields: Mapping[str, Any], source: str, *, tied: bool = True
) -> dict[str, Tensor]:
    """Every tensor of a GPT-2 by its name, taken out of what is stored under these names, with `transformer.` or not.

    tied: whether lm_head.weight may stand for wte.weight. UserError, naming `source` and the tensor: one is missing,
    unknown, given twice, of another shape or no float, or lm_head is not wte.
    """
    found = list(stored)
    if fields["n_layer"] > len(found):  # before a name is made for each of a billion layers
        raise UserError(f"{source}: n_layer={fields['n_layer']}, but only {len(found)} tensors are stored")
    wanted = _table(fields)
    wanted[HEAD] = wanted[EMBEDDING]
    tensors: dict[str, Tensor] = {}
    problems = []
    for full_name, tensor in found:
        name = full_name.removeprefix("transformer.")
        if NOT_WEIGHTS.fullmatch(name):
            continue
        if name in tensors:
            problems.append(f"{name} is given twice")
        elif name not in wanted:
            problems.append(f"{full_name} is no tensor of GPT-2")
        elif tensor.shape != wanted[name][1]:
            problems.append(f"{full_name} has shape {tensor.shape}, its config means {wanted[name][1]}")
        elif not FLOATS.fullmatch(tensor.dtype):
            problems.append(f"{full_name} is stored as {tensor.dtype}; only float weights are supported")
        tensors[name] = tensor
    if HEAD in tensors and tied:  # safetensors.torch.save_model keeps this one of the two names
        tensors.setdefault(EMBEDDING, tensors[HEAD])
    elif not tied and HEAD not in tensors:
        problems.append(f"tie_word_embeddings=False, but {HEAD} is missing")
    problems += [f"{name} is missing" for name in wanted if name not in tensors and name != HEAD]
    if problems:
        more = f" (and {len(problems) - 1} problems more)" if problems[1:] else ""
        raise UserError(f"{source}: {problems[0]}{more}; these are not a whole GPT-2's weights")
    head, table = tensors.pop(HEAD, None), tensors[EMBEDDING]
    if head and head is not table and not np.array_equal(head.read(), table.read(), equal_nan=True):
        raise UserError(f"{source}: {HEAD} differs from {EMBEDDING}; GPT-2 ties them, untied weights cannot be used")
    return tensors


def _fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """GPTConfig's fields out of config.json; UserError if this is not the architecture that we have."""
    for key, allowed in OUR_ARCHITECTURE.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key}={config[key]!r}, but only GPT-2's {key}={allowed[0]!r} is supported")
    sizes = {}
    for key, default in GPT2_SMALL.items():
        given = {name: config[name] for name in (key, OTHER_NAMES.get(key, key)) if name in config} or {key: default}
        for name, size in given.items():
            if type(size) is not int or size < 1:
                raise UserError(f"{path}: {name}={size!r} is not a positive number; fetch the file again")
            if size != next(iter(given.values())):
                raise UserError(f"{path}: {key}={given[key]} contradicts {name}={size}; remove one")
            sizes[key] = size
    if config.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise UserError(f"{path}: n_inner={config['n_inner']!r}, but only GPT-2's 4·n_embd is supported")
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(f"{path}: n_embd={sizes['n_embd']} is not divisible by n_head={sizes['n_head']}")
    return {ours: sizes[theirs] for ours, theirs in SIZES.items()} | {"bias": True}


def _meta(folder: Path, size: int, config: Mapping[str, Any]) -> Meta:
    """The tokenizer of a model's folder: its own tokenizer.json, or GPT-2's unless other vocabulary files are there."""
    eot = config.get("eos_token_id", GPT2_VOCAB_SIZE - 1)
    if isinstance(eot, list) and eot and eot.count(eot[0]) == len(eot):  # of several different ones none is *the* one
        eot = eot[0]
    own = (folder / "tokenizer.json").is_file() or not _vocabulary_is_gpt2(folder)
    name = "gpt2" if size == GPT2_VOCAB_SIZE and not own else "tokenizer.json"
    eot = eot if type(eot) is int and 0 <= eot < size else None
    return Meta(size, name, token_dtype(size), eot=eot)


def _vocabulary_is_gpt2(folder: Path) -> bool:
    """Whether vocab.json and merges.txt, so far as they are there, say what OpenAI's encoder.json and vocab.bpe do."""

    def same(name: str, original: str, normalize: Callable[[str], str]) -> bool:
        try:
            text = normalize((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return True
        except (OSError, ValueError, TypeError, AttributeError):
            return False  # damaged: whatever it was
        return hashlib.sha256(text.encode()).hexdigest() == GPT2_FILES[original]

    def vocabulary(text: str) -> str:  # in the order of ids and escaped to ASCII, as OpenAI wrote it
        return json.dumps(dict(sorted(from_json(text).items(), key=lambda item: item[1])))

    def merges(text: str) -> str:
        lines = [line for line in text.splitlines() if not line.startswith("#version")]
        return "\n".join(["#version: 0.2", *lines, ""])

    return same("vocab.json", "encoder.json", vocabulary) and same("merges.txt", "vocab.bpe", merges)


def _download(name: str) -> Path:
    """The hub's files of one of OpenAI's models, in huggingface_hub's cache. UserError without network or library."""
    hub = optional("huggingface_hub", "jaxgpt[hf]", f"fetching {name}")
    errors = optional("huggingface_hub.errors", "jaxgpt[hf]", f"fetching {name}")
    http_error = errors.HfHubHTTPError.__bases__[0]  # of the client underneath: httpx in 1.x, httpx2 in 2.x
    wanted = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    try:
        return Path(hub.snapshot_download(f"openai-community/{name}", allow_patterns=wanted))
    except (OSError, http_error) as error:
        raise UserError(
            f"{name} cannot be fetched from huggingface.co and is not in its cache ({first_line(error)}); "
            "connect, or copy the model's folder here and name that"
        ) from None


def _open_files(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model with the names that they are stored under."""
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no weights: none of {', '.join(FILES)}; copy them there")
    names = [found.name]
    if found.suffix == ".json":
        shards = read_json(found).get("weight_map")
        if not isinstance(shards, dict) or any(Path(str(s)).name != s for s in shards.values()):
            raise UserError(f"{found} is no index of weights; fetch it again")
        names = sorted(set(shards.values()))
    for path in [folder / name for name in names]:
        if not path.is_file():
            raise UserError(f"{path} is missing, but {found.name} lists it; fetch it again")
        yield from torch_tensors(path, load_torch(path)) if path.suffix == ".bin" else open_safetensors(path)


def save_weights(folder: Path, params: Any, fields: Mapping[str, Any], *, dtype: str, eot: int | None) -> None:
    """Writes model.safetensors, config.json and generation_config.json as transformers does.

    params: ours, on the host or on devices. fields: of GPTConfig. A model without biases gets zeros for them: the same
    function. UserError if a weight does not fit dtype; OSError if they cannot be written.
    """
    ours = {tuple(p.key for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    tensors = {}
    for name, (path, shape) in _table({**fields, "bias": True}).items():
        tensor = np.asarray(ours.get(path, np.zeros(shape, np.float32)))
        tensors["transformer." + name] = cast(name, tensor.reshape(-1, *shape[1:])[: shape[0]], dtype)
    save_safetensors(folder / "model.safetensors", tensors)
    ids = {"bos_token_id": eot, "eos_token_id": eot}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in OUR_ARCHITECTURE.items() if values[0] is not None},
        **{theirs: fields[ours] for ours, theirs in SIZES.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), fields.get("dropout", 0.0)),
        "dtype": dtype,
        **ids,
    }
    for name, content in {"config.json": config, "generation_config.json": ids}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
