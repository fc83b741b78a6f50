"""GPT-2's own weights: the names, layouts and files of Hugging Face models, read into our parameters and written back.

Nothing is read before every tensor of the model has been accounted for by name, shape and kind, and then one at a time.
"""

import json
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxgpt import UserError
from jaxgpt.config import GPT2_SIZES
from jaxgpt.tokenizer import GPT2_VOCAB_SIZE, Meta

Shapes = dict[str, tuple[int, ...]]  # by the name that a tensor is stored under
Reader = Callable[[str], np.ndarray]
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# GPT-2's name, our path, GPT-2's shape: V vocabulary, T positions, C n_embd. Both keep matrices as (in, out), GPT-2's
# Conv1D. Ours differ in shape alone: c_attn is (C, 3, C), wte has rows of zeros up to a multiple of 128.
TABLE = (
    ("wte.weight", "wte.embedding", "V C"),
    ("wpe.weight", "wpe.embedding", "T C"),
    ("h.{i}.ln_1.weight", "h.{i}.ln_1.scale", "C"),
    ("h.{i}.ln_1.bias", "h.{i}.ln_1.bias", "C"),
    ("h.{i}.attn.c_attn.weight", "h.{i}.attn.c_attn.kernel", "C 3C"),
    ("h.{i}.attn.c_attn.bias", "h.{i}.attn.c_attn.bias", "3C"),
    ("h.{i}.attn.c_proj.weight", "h.{i}.attn.c_proj.kernel", "C C"),
    ("h.{i}.attn.c_proj.bias", "h.{i}.attn.c_proj.bias", "C"),
    ("h.{i}.ln_2.weight", "h.{i}.ln_2.scale", "C"),
    ("h.{i}.ln_2.bias", "h.{i}.ln_2.bias", "C"),
    ("h.{i}.mlp.c_fc.weight", "h.{i}.mlp.c_fc.kernel", "C 4C"),
    ("h.{i}.mlp.c_fc.bias", "h.{i}.mlp.c_fc.bias", "4C"),
    ("h.{i}.mlp.c_proj.weight", "h.{i}.mlp.c_proj.kernel", "4C C"),
    ("h.{i}.mlp.c_proj.bias", "h.{i}.mlp.c_proj.bias", "C"),
    ("ln_f.weight", "ln_f.scale", "C"),
    ("ln_f.bias", "ln_f.bias", "C"),
)
NOT_WEIGHTS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old files carry as buffers
HEAD = "lm_head.weight"  # tied to wte: absent, or the same again

# What config.json must say, where it says anything, for its weights to mean what our model computes.
OUR_ARCHITECTURE = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of GELU's tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def _table(fields: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """GPT-2's name -> (our path, GPT-2's shape) for a model of these fields, every layer spelled out."""
    c = fields["n_embd"]
    sizes = {"V": fields["vocab_size"], "T": fields["block_size"], "C": c, "3C": 3 * c, "4C": 4 * c}
    return {
        name.format(i=i): (tuple(path.format(i=i).split(".")), tuple(sizes[s] for s in shape.split()))
        for name, path, shape in TABLE
        for i in range(fields["n_layer"] if "{i}" in name else 1)
    }


@dataclass(frozen=True)
class Weights:
    """A GPT-2 in a folder of files: its shape is known, its tensors are read when asked for."""

    source: str  # as the user named it
    folder: Path
    fields: dict[str, Any]  # of GPTConfig: block_size vocab_size n_layer n_head n_embd bias
    meta: Meta  # the tokenizer it goes with
    read: Reader  # GPT-2's name -> that tensor on the host

    def params(self, abstract: Any) -> Any:
        """The parameters: `abstract` gives shape, dtype and, optionally, sharding of each (see model.abstract_params).

        wpe may ask for fewer positions than there are. One tensor at a time is on the host, and goes from there
        straight onto the devices' shards.
        """
        names = {path: name for name, (path, _) in _table(self.fields).items()}

        def place(path, leaf) -> jax.Array:
            name = names[tuple(str(p.key) for p in path)]
            tensor = self.read(name)
            if name == "wte.weight":
                tensor = np.pad(tensor, ((0, leaf.shape[0] - len(tensor)), (0, 0)))
            elif name == "wpe.weight":
                tensor = tensor[: leaf.shape[0]]
            ours = tensor.reshape(leaf.shape).astype(leaf.dtype, copy=False)
            sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: ours[index])

        return jax.tree_util.tree_map_with_path(place, abstract)


def open_weights(source: str) -> Weights:
    """The weights of gpt2, gpt2-medium, gpt2-large, gpt2-xl (fetched from the hub or its cache) or of a local folder.

    Reads names and shapes, and compares lm_head with wte where both are stored; no weight is placed anywhere yet.
    UserError: not there, damaged, not GPT-2's architecture, a tensor missing, unknown or of the wrong shape.
    """
    folder = _download(source) if source in GPT2_SIZES else Path(source)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{source} is neither {', '.join(GPT2_SIZES)} nor a folder with a run or a model (config.json)")
    config = read_json(path)
    fields = _fields(config, path)
    shapes, read = _open_files(folder)
    names = {name.removeprefix("transformer."): name for name in shapes}
    wanted = _table(fields)
    problems = [f"{n} is given twice" for n in names if n in shapes and f"transformer.{n}" in shapes]
    problems += [f"{n} is missing" for n in wanted if n not in names]
    for name, stored in names.items():
        if name in wanted or name == HEAD:
            shape = wanted["wte.weight" if name == HEAD else name][1]
            if shapes[stored] != shape:
                problems.append(f"{stored} has shape {shapes[stored]}, its config.json means {shape}")
        elif not NOT_WEIGHTS.fullmatch(name):
            problems.append(f"{stored} is no tensor of GPT-2")
    if problems:
        more = f" (and {len(problems) - 1} problems more)" if problems[1:] else ""
        raise UserError(f"{folder}: {problems[0]}{more}; these are not a whole GPT-2's weights")
    if HEAD in names and not np.array_equal(read(names[HEAD]), read(names["wte.weight"])):
        raise UserError(f"{folder}: {HEAD} differs from wte.weight; GPT-2 ties them, untied weights cannot be used")
    return Weights(source, folder, fields, _meta(folder, config), lambda name: read(names[name]))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return value


def _fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """GPTConfig's fields out of config.json; UserError if this is not the architecture that we have."""
    for key, allowed in OUR_ARCHITECTURE.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"{path}: {key}={value!r}, but only GPT-2's {key}={allowed[0]!r} is supported")
    names = {"block_size": "n_positions"} | {k: k for k in ("vocab_size", "n_layer", "n_head", "n_embd")}
    fields = {ours: config.get(theirs) for ours, theirs in names.items()}
    for ours, value in fields.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {names[ours]}={value!r} is not a positive number; fetch the file again")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{path}: n_inner={config['n_inner']!r}, but only GPT-2's 4·n_embd is supported")
    return fields | {"bias": True}


def _meta(folder: Path, config: Mapping[str, Any]) -> Meta:
    """The tokenizer of a model's folder: its own tokenizer.json, or GPT-2's where the vocabulary is as large."""
    size, eot = config["vocab_size"], config.get("eos_token_id", GPT2_VOCAB_SIZE - 1)
    eot = eot if type(eot) is int and 0 <= eot < size else None
    if size == GPT2_VOCAB_SIZE and not (folder / "tokenizer.json").is_file():
        return Meta(size, "gpt2", eot=eot)
    return Meta(size, "tokenizer.json", "uint16" if size <= 1 << 16 else "uint32", eot=eot)


def _download(name: str) -> Path:
    """The hub's files of one of OpenAI's models, in huggingface_hub's cache. UserError without network or library."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError(f"{name} needs huggingface_hub to be fetched: pip install 'jaxgpt[hf]'") from None
    http_error: Any = HfHubHTTPError.__bases__[0]  # of the client underneath: httpx in 1.x, httpx2 in 2.x
    wanted = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=wanted))
    except (OSError, http_error) as error:
        raise UserError(
            f"{name} cannot be fetched from huggingface.co and is not in its cache ({_first_line(error)}); "
            "connect, or copy the model's folder here and name that"
        ) from None


def _open_files(folder: Path) -> tuple[Shapes, Reader]:
    """Shapes by stored name, and a function that reads one tensor."""
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no weights: none of {', '.join(FILES)}; copy them there")
    paths = [found]
    if found.suffix == ".json":
        shards = read_json(found).get("weight_map")
        if not isinstance(shards, dict) or any(Path(str(s)).name != s for s in shards.values()):
            raise UserError(f"{found} is no index of weights; fetch it again")
        paths = [folder / name for name in sorted(set(shards.values()))]
    open_file = _open_torch if paths[0].suffix == ".bin" else _open_safetensors
    shapes, readers = {}, {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing, but {found.name} lists it; fetch it again")
        of_file, read = open_file(path)
        if twice := shapes.keys() & of_file.keys():
            raise UserError(f"{path} holds {min(twice)}, as another file of {found.name} does; fetch them again")
        shapes |= of_file
        readers |= dict.fromkeys(of_file, read)
    return shapes, lambda name: readers[name](name)


def _open_safetensors(path: Path) -> tuple[Shapes, Reader]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path} needs the safetensors library: pip install 'jaxgpt[hf]'") from None
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); fetch it again") from None
    for name, (_, dtype) in described.items():
        if dtype not in ("F32", "F16", "BF16", "F64") and not NOT_WEIGHTS.search(name):
            raise UserError(f"{path}: {name} is stored as {dtype}; only float weights are supported")

    def read(name: str) -> np.ndarray:
        with safe_open(path, framework="numpy") as file:  # opened each time: closing it gives the pages read back
            return file.get_tensor(name)

    return {name: shape for name, (shape, _) in described.items()}, read


def _open_torch(path: Path) -> tuple[Shapes, Reader]:
    """A torch file, unpickled by torch's reader of tensors alone: code in it is refused, never run."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs PyTorch: pip install torch, or convert it to model.safetensors") from None
    try:
        with path.open("rb") as f:
            mmap = f.read(2) == b"PK"  # torch's format since 1.6, a zip file
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged, or asks for code besides tensors and is not safe to read") from None
    except (RuntimeError, OSError, ValueError, EOFError, LookupError, AttributeError, TypeError, struct.error) as error:
        raise UserError(f"{path} is truncated or damaged ({_first_line(error)}); fetch it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UserError(f"{path} is not a model's state: a dictionary of tensors")

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].contiguous()
        if tensor.dtype == torch.bfloat16:  # unknown to torch's numpy bridge
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not NOT_WEIGHTS.search(name):
            raise UserError(f"{path}: {name} is stored as {tensor.dtype}; only float weights are supported")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, read


def save_weights(folder: Path, params: Any, fields: Mapping[str, Any], *, dtype: str, eot: int | None) -> None:
    """Writes model.safetensors, config.json and generation_config.json as transformers does.

    params: ours, on the host or on devices. fields: of GPTConfig. A model without biases gets zeros for them: the same
    function. UserError if a weight does not fit dtype.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise UserError("writing a Hugging Face model needs safetensors: pip install 'jaxgpt[hf]'") from None
    tensors = {}
    for name, (path, shape) in _table(fields).items():
        ours: Any = params
        for key in path:
            ours = None if ours is None else ours.get(int(key) if key.isdigit() else key)
        tensor = np.zeros(shape, np.float32) if ours is None else np.asarray(ours)
        tensor = np.ascontiguousarray(tensor.reshape(-1, *shape[1:])[: shape[0]])
        with np.errstate(over="ignore"):
            tensors["transformer." + name] = cast = tensor.astype(DTYPES[dtype], copy=False)
        if cast is not tensor and np.isfinite(tensor).all() and not np.isfinite(cast).all():
            raise UserError(f"{name} has values too large for {dtype}; choose bfloat16 or float32")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": eot, "eos_token_id": eot}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in OUR_ARCHITECTURE.items() if values[0] is not None},
        "n_positions": fields["block_size"],
        **{key: fields[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), fields.get("dropout", 0.0)),
        "dtype": dtype,
        **ids,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
