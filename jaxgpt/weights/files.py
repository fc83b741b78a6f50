"""Tensors in files: safetensors, and torch's pickles without running code in them. Each is read when asked for."""

import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import UserError, from_json, optional
from jaxgpt.store import AnyPath

# weights_only=True could be escaped before torch 2.6 (GHSA-53q9-r3pm-6pq6) and before 2.10 (GHSA-63cw-57p8-fm3p)
SAFE_TORCH = (2, 10)


FLOATS = re.compile(r"(B?F|torch\.b?float)(16|32|64)")  # as safetensors and torch name them


class Tensor(NamedTuple):
    """A tensor in a file. `read` brings it onto the host."""

    shape: tuple[int, ...]
    dtype: str  # as the file names it: F32, torch.float32
    read: Callable[[], np.ndarray]


def open_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a .safetensors file with their names. UserError if it is damaged."""
    safetensors = optional("safetensors", "jaxgpt[hf]", path)

    def read(name: str) -> np.ndarray:
        with safetensors.safe_open(path, framework="numpy") as file:  # each time: closing it gives the pages read back
            return file.get_tensor(name)

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                described = file.get_slice(name)
                yield name, Tensor(tuple(described.get_shape()), described.get_dtype(), partial(read, name))
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); fetch it again") from None


def save_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes contiguous arrays. Raises OSError if it cannot, a full disk included."""
    safetensors = optional("safetensors", "jaxgpt[hf]", path.name)
    numpy = optional("safetensors.numpy", "jaxgpt[hf]", path.name)
    path.touch()
    mode = path.stat().st_mode
    try:
        numpy.save_file(dict(tensors), path, metadata={"format": "pt"})  # transformers asks for a format
        path.chmod(mode)  # safetensors' own file is for the user alone, which a server may not be
    except safetensors.SafetensorError as error:  # whatever the disk said, in words: "… (os error 28)"
        said = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(said[1]), os.strerror(int(said[1]))) if said else OSError(first_line(error))) from None


def save_params(path: Path, params: Any, dtypes: Any) -> None:
    """Writes parameters by our names, `h.0.attn.c_attn.kernel`, in the dtypes of `dtypes`' leaves.

    UserError if a value is too large for its dtype; OSError if they cannot be written.
    """
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(dtypes), strict=True)
    save_safetensors(path, {_name(keys): cast(_name(keys), np.asarray(x), to.dtype) for (keys, x), to in leaves})


def cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """A contiguous array in another dtype. UserError, naming it, if finite values become infinite."""
    with np.errstate(over="ignore"):
        result = np.asarray(array.astype(dtype, copy=False), order="C")
    if np.isfinite(array).all() and not np.isfinite(result).all():
        raise UserError(f"{name} has values too large for {np.dtype(dtype).name}; choose bfloat16 or float32")
    return result


class ParamsFile(NamedTuple):
    """Parameters in a file of `save_params`."""

    path: Path

    def params(self, abstract: Any) -> Any:
        """The parameters: `abstract` gives shape, dtype and sharding of each.

        UserError, naming the first one, where a parameter is missing, unknown, of another shape or no float.
        """
        stored = dict(open_safetensors(self.path))
        wanted = {_name(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(abstract)}
        for name in wanted | stored:
            if name not in stored or name not in wanted:
                how = "unknown" if name in stored else "missing"
                raise UserError(f"{self.path}: parameter {name} is {how}; the file is of another model")
            if stored[name].shape != wanted[name].shape or not FLOATS.fullmatch(stored[name].dtype):
                there = f"{stored[name].dtype}{[*stored[name].shape]}"
                raise UserError(f"{self.path}: parameter {name} is {there}, the model's {[*wanted[name].shape]}")
        return jax.tree_util.tree_map_with_path(lambda keys, x: place(stored[_name(keys)].read(), x), abstract)


def place(array: np.ndarray, abstract: Any) -> jax.Array:
    """An array of the host on the devices, with the dtype and sharding of `abstract`; each shard goes there alone."""
    array = array.astype(abstract.dtype, copy=False)
    return jax.make_array_from_callback(abstract.shape, abstract.sharding, lambda index: array[index])


def _name(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def load_torch(path: Path) -> Any:
    """What torch.save wrote: tensors and plain data; UserError for anything else, and no code in it runs."""
    torch = optional("torch", "torch", path)
    if torch.__version__ < SAFE_TORCH:
        raise UserError(
            f"{path} is a pickle, and torch {torch.__version__} cannot read one safely; "
            "run: pip install 'torch>=2.10', or use the model's .safetensors"
        )
    try:
        mmap = zipfile.is_zipfile(path)  # as torch writes since 1.6
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged, or asks for code besides tensors and is not safe to read") from None
    except (RuntimeError, OSError, ValueError, EOFError, LookupError, AttributeError, TypeError, struct.error) as error:
        raise UserError(f"{path} is truncated or damaged ({first_line(error)}); fetch it again") from None


def torch_tensors(path: Path, state: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, nn.Parameters included. `path` is where it came from. UserError if it is none."""
    torch = optional("torch", "torch", path)
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path} is not a model's state: a dictionary of tensors")

    def read(tensor) -> np.ndarray:
        tensor = tensor.detach()  # an nn.Parameter
        if tensor.dtype == torch.bfloat16:  # unknown to torch's numpy bridge
            return tensor.contiguous().view(torch.uint16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    for name, t in state.items():
        if t.is_meta or t.is_nested or t.layout != torch.strided:
            kind = "meta" if t.is_meta else "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
            raise UserError(f"{path}: {name} is a {kind} tensor; only dense weights are supported")
        yield str(name), Tensor(tuple(t.shape), str(t.dtype), partial(read, t))


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file. UserError if there is none."""
    try:
        value = from_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; mend its permissions") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return value


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
