"""Hugging Face's GPT-2 folders to runs and back.

`python -m jaxgpt.convert --from_hf=gpt2 --out_dir=out-gpt2` and `--out_dir=out --to_hf=my-gpt2 [--dtype=bfloat16]`.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import UserError, hf
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import Parser, run_main, save_config
from jaxgpt.evaluate import OpenedModel, open_model, which_checkpoint
from jaxgpt.sharding import AXES
from jaxgpt.tokenizer import ENDOFTEXT, GPT2_FILES, GPT2_URL, CharTokenizer, write_meta


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all went well and is removed when not. UserError if it exists."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; name another folder, or remove it first")
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room or choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def import_hf(model: OpenedModel, out_dir: Path) -> None:
    """Writes a run's folder that holds a Hugging Face model's parameters as checkpoint 0 and its tokenizer."""
    assert model.weights is not None
    with new_folder(out_dir) as folder:
        config = model.run_config
        config.update(out_dir=str(out_dir), init_from=model.source)
        save_config(config, folder)
        write_meta(folder, model.meta)
        if (tokenizer := model.folder / model.meta.tokenizer).is_file():
            shutil.copy(tokenizer, folder)
        checkpoints = Checkpoints(folder)
        checkpoints.save(0, {"params": model.params}, {"source": model.source})
        if not checkpoints.wait():
            raise UserError(f"the checkpoint could not be written in {out_dir}; see the line above")


def export_hf(model: OpenedModel, folder: Path, *, dtype: str) -> None:
    """Writes a folder that transformers.AutoModelForCausalLM and AutoTokenizer open."""
    with new_folder(folder) as partial:
        write_tokenizer(model, partial)
        fields = dataclasses.asdict(model.config)
        hf.save_weights(partial, model.params, fields, dtype=dtype, eot=model.meta.eot)


def write_tokenizer(model: OpenedModel, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, for whatever tokenizer the model has."""
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers
    except ImportError:
        raise UserError("writing a tokenizer.json needs the tokenizers library: pip install 'jaxgpt[hf]'") from None
    ours, target = model.tokenizer, folder / "tokenizer.json"
    if isinstance(ours, CharTokenizer):
        chars = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(ours.itos)}, unk_token=ours.itos[0]))
        chars.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        chars.decoder = decoders.Fuse()
        chars.save(str(target))
    elif model.meta.tokenizer == "gpt2":
        from tiktoken.load import read_file_cached

        merges, vocab = (read_file_cached(GPT2_URL + name, sha256).decode() for name, sha256 in GPT2_FILES.items())
        pairs = [(left, right) for left, right in (line.split() for line in merges.splitlines()[1:] if line)]
        bpe = tokenizers.ByteLevelBPETokenizer(json.loads(vocab), pairs)
        bpe.add_special_tokens([ENDOFTEXT])
        bpe.save(str(target))
    else:
        shutil.copy(model.folder / model.meta.tokenizer, target)
    eot = None if ours.eot is None else ours.decode([ours.eot])
    special = {"bos_token": eot, "eos_token": eot, "unk_token": eot} if eot else {}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(content | {"model_max_length": model.config.block_size}, indent=2) + "\n"
    )


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m jaxgpt.convert", description="Hugging Face's GPT-2 folders to runs and back.")
    parser.add_argument("--from_hf", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder; written to --out_dir")
    parser.add_argument("--to_hf", help="folder to write the run in --out_dir to")
    parser.add_argument("--out_dir", required=True, help="folder of a run: made by --from_hf, read by --to_hf")
    parser.add_argument("--checkpoint", default="best", help="the run's: best, latest or a step")
    parser.add_argument("--dtype", default="float32", choices=tuple(hf.DTYPES), help="of the weights in --to_hf")
    args = parser.parse(argv)
    if (args.from_hf is None) == (args.to_hf is None):
        raise UserError("give either --from_hf=MODEL or --to_hf=FOLDER")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and host memory is what there is most of
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    which = which_checkpoint(args.checkpoint)
    source = {"init_from": args.from_hf} if args.from_hf else {"out_dir": args.out_dir}
    model = open_model(**source, mesh=mesh, dtype="float32", which=which)
    if args.from_hf and model.weights is None:
        raise UserError(f"{args.from_hf} is a jaxgpt run already")
    if args.to_hf and model.weights is not None:
        raise UserError(f"{args.out_dir} is a Hugging Face model already")
    if args.from_hf:
        import_hf(model, Path(args.out_dir))
    else:
        export_hf(model, Path(args.to_hf), dtype=args.dtype)
    print(f"wrote {args.out_dir if args.from_hf else args.to_hf}")


if __name__ == "__main__":
    run_main(main)
