"""nanoGPT's checkpoint, `ckpt.pt`: its weights and tokenizer; the optimizer's state is left where it is.

The file is a dictionary of torch.save: `model`, a state dict whose names may begin with `_orig_mod.` (torch.compile);
`model_args`, the shape; `config`, train.py's settings; `iter_num`; `best_val_loss`; `optimizer`. Its matrices are
(out, in), as in torch's Linear, GPT-2's (in, out). Its GELU is the exact one, ours GPT-2's tanh form: for a model of 4
layers that nanoGPT trained on Shakespeare, logits differ by 0.0003 of their spread (bfloat16: about 0.005), and five
greedy texts of 500 characters are the same.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt import UserError
from jaxgpt.tokenizer import GPT2_VOCAB_SIZE, Meta, corpus_meta
from jaxgpt.weights.files import Tensor, load_torch, torch_tensors
from jaxgpt.weights.hf import EMBEDDING, Weights, account

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
PADDED_GPT2 = 50304  # the vocabulary that nanoGPT gives a model whose corpus has no meta.pkl
MATRIX = re.compile(r"(transformer\.)?h\.\d+\.(attn|mlp)\.\w+\.weight")


def open_checkpoint(path: Path, data_dir: str | None) -> tuple[Weights, dict[str, Any]]:
    """The weights in ckpt.pt, or in a folder with one, and what is known of the run: iter_num, best_val_loss.

    data_dir: the corpus it was trained on, for its meta.pkl or meta.json; None: GPT-2's tokenizer. Rows of the
    vocabulary that the tokenizer has no token for are padding and are left out. UserError: no such file, not nanoGPT's,
    or another vocabulary.
    """
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} is missing; name nanoGPT's ckpt.pt or its out_dir")
    content = load_torch(path)
    args = content.get("model_args") if isinstance(content, dict) else None
    if not isinstance(args, dict) or "model" not in content:
        raise UserError(f"{path} is no checkpoint of nanoGPT: it lacks `model` and `model_args`")
    for name in SIZES:
        if type(args.get(name)) is not int or args[name] < 1:
            raise UserError(f"{path}: model_args has {name}={args.get(name)!r}, which is not a positive number")
    fields = {name: args[name] for name in SIZES} | {"bias": bool(args.get("bias", True))}
    meta = _meta(path, content, fields["vocab_size"], data_dir)
    stored = _gpt2_layout(path, content["model"])
    tensors = account(stored, fields, str(path))
    table, used = tensors[EMBEDDING], meta.vocab_size
    tensors[EMBEDDING] = Tensor((used, table.shape[1]), table.dtype, lambda: table.read()[:used])
    known = {key: float(content[key]) for key in ("iter_num", "best_val_loss") if key in content}
    return Weights(Path(data_dir or path.parent), fields | {"vocab_size": used}, meta, tensors), known


def _gpt2_layout(path: Path, state: Any) -> Iterator[tuple[str, Tensor]]:
    """A state dict's tensors by GPT-2's names and in its layout."""
    for stored, tensor in torch_tensors(path, state):
        name = stored.removeprefix("_orig_mod.")
        if MATRIX.fullmatch(name):
            tensor = Tensor(tensor.shape[::-1], tensor.dtype, lambda read=tensor.read: read().T)
        yield name, tensor


def _meta(path: Path, content: dict[str, Any], size: int, data_dir: str | None) -> Meta:
    """The tokenizer of a checkpoint with a vocabulary of `size`."""
    if data_dir:
        meta = corpus_meta(data_dir)
    elif size in (GPT2_VOCAB_SIZE, PADDED_GPT2):
        meta = Meta(GPT2_VOCAB_SIZE, eot=GPT2_VOCAB_SIZE - 1)
    else:
        config = content.get("config")
        name = config.get("dataset", "NAME") if isinstance(config, dict) else "NAME"
        raise UserError(
            f"{path}: a vocabulary of {size} is not GPT-2's; name the corpus with its meta.pkl: "
            f"--data_dir=nanoGPT/data/{name}"
        )
    if size != meta.vocab_size and (size, meta.tokenizer) != (PADDED_GPT2, "gpt2"):
        raise UserError(
            f"{path} has a vocabulary of {size:,} and {data_dir} one of {meta.vocab_size:,} ({meta.tokenizer}); "
            "name the corpus that it was trained on"
        )
    return meta
