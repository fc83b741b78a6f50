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
from jax.sharding import Mesh
from tiktoken.load import read_file_cached

from jaxgpt import UserError, optional
from jaxgpt.config import Parser, run_main, save_config
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.launchers import find_cluster
from jaxgpt.sharding import make_mesh
from jaxgpt.tokenizer import ENDOFTEXT, GPT2_FILES, GPT2_URL, CharTokenizer, copy_tokenizer
from jaxgpt.weights import hf
from jaxgpt.weights.opening import OpenedModel, Which, add_checkpoint_argument, open_model


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


def import_hf(source: str, out_dir: Path, mesh: Mesh) -> None:
    """Writes a run's folder that holds a Hugging Face model's parameters as checkpoint 0 and its tokenizer."""
    model = open_model(init_from=source, mesh=mesh, dtype="float32")
    if model.weights is None:
        raise UserError(f"{source} is a jaxgpt run already")
    with new_folder(out_dir) as folder:
        model.run_config.update(out_dir=str(out_dir), init_from=source)
        save_config(model.run_config, folder)
        copy_tokenizer(model.meta, model.folder, folder)
        checkpoints = Checkpoints(folder)
        checkpoints.save(0, {"params": model.params}, {"source": source})
        if not checkpoints.wait():
            raise UserError(f"the checkpoint could not be written in {out_dir}; see the line above")


def export_hf(out_dir: str, which: Which, folder: Path, dtype: str, mesh: Mesh) -> None:
    """Writes a folder that transformers.AutoModelForCausalLM and AutoTokenizer open."""
    model = open_model(out_dir, mesh=mesh, dtype="float32", which=which)
    if model.weights is not None:
        raise UserError(f"{out_dir} is a Hugging Face model already")
    with new_folder(folder) as partial:
        write_tokenizer(model, partial)
        fields = dataclasses.asdict(model.config)
        hf.save_weights(partial, model.params, fields, dtype=dtype, eot=model.meta.eot)


def write_tokenizer(model: OpenedModel, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, for whatever tokenizer the model has."""
    tokenizers = optional("tokenizers", "jaxgpt[hf]", "writing a tokenizer.json")
    ours, target = model.tokenizer, folder / "tokenizer.json"
    if isinstance(ours, CharTokenizer):
        ids = {c: i for i, c in enumerate(ours.itos)}
        chars = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=ours.itos[0]))
        chars.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        chars.decoder = tokenizers.decoders.Fuse()
        chars.save(str(target))
    elif model.meta.tokenizer == "gpt2":
        merges, vocab = (read_file_cached(GPT2_URL + name, sha256).decode() for name, sha256 in GPT2_FILES.items())
        pairs = [tuple(line.split()) for line in merges.splitlines()[1:]]
        bpe = tokenizers.ByteLevelBPETokenizer(json.loads(vocab), pairs)
        bpe.add_special_tokens([ENDOFTEXT])
        bpe.save(str(target))
    else:
        shutil.copy(model.folder / model.meta.tokenizer, target)
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if ours.eot is not None:
        content |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), ours.decode([ours.eot]))
    content["model_max_length"] = model.config.block_size
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str]) -> None:
    with contextlib.suppress(UserError):  # of what several need and this does not
        if (find_cluster() or {}).get("process_id"):
            return  # the first process of several does it all
    parser = Parser(prog="python -m jaxgpt.convert", description="Hugging Face's GPT-2 folders to runs and back.")
    parser.add_argument("--from_hf", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder; written to --out_dir")
    parser.add_argument("--to_hf", help="folder to write the run in --out_dir to")
    parser.add_argument("--out_dir", required=True, help="folder of a run: made by --from_hf, read by --to_hf")
    add_checkpoint_argument(parser)
    parser.add_argument("--dtype", default="float32", choices=hf.DTYPES, help="of the weights in --to_hf")
    args = parser.parse(argv)
    if (args.from_hf is None) == (args.to_hf is None):
        raise UserError("give either --from_hf=MODEL or --to_hf=FOLDER")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and host memory is what there is most of
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    if args.from_hf:
        import_hf(args.from_hf, Path(args.out_dir), mesh)
    else:
        export_hf(args.out_dir, args.checkpoint, Path(args.to_hf), args.dtype, mesh)
    print(f"wrote {args.out_dir if args.from_hf else args.to_hf}")


if __name__ == "__main__":
    run_main(main)
