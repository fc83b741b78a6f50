"""Imports a model as a run, or exports a run's model.

    python -m jaxgpt.convert --from_hf=gpt2 --out_dir=out-gpt2
    python -m jaxgpt.convert --from_nanogpt=nanoGPT/out/ckpt.pt --data_dir=nanoGPT/data/shakespeare_char --out_dir=out
    python -m jaxgpt.convert --from_safetensors=my-model --out_dir=out
    python -m jaxgpt.convert --out_dir=out --to_hf=my-gpt2
    python -m jaxgpt.convert --out_dir=out --to_safetensors=my-model

A run made of weights holds them as checkpoint 0: sample from it, evaluate it, or train from it with init_from.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxgpt import FULL, Unavailable, UserError, local_path, store
from jaxgpt.cli import Parser, run_main
from jaxgpt.config import save_config
from jaxgpt.models import find_model
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.launchers import find_cluster
from jaxgpt.sharding import make_mesh
from jaxgpt.store import AnyPath
from jaxgpt.tokenizer import copy_tokenizer
from jaxgpt.weights import export, hf
from jaxgpt.weights.files import ParamsFile
from jaxgpt.weights.nanogpt import open_checkpoint
from jaxgpt.weights.opening import OpenedModel, add_checkpoint_argument, open_model


@contextlib.contextmanager
def new_folder(path: AnyPath) -> Iterator[Path]:
    """A folder to fill, which gets its name when all went well and is removed when not. A store gets it at the end.

    UserError if it exists or cannot be written; Unavailable on a full disk.
    """
    if not isinstance(path, Path):
        if path.is_dir():
            raise UserError(f"{path} exists already; name another folder, or remove it first")
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
            files = [file for file in Path(temporary).rglob("*") if file.is_file()]
            # what makes the others count comes last: a checkpoint's record, a folder's config.json
            for file in sorted(files, key=lambda file: (file.name == "config.json", file.name == "record.json")):
                (path / file.relative_to(temporary).as_posix()).write_bytes(file.read_bytes())
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; name another folder, or remove it first")
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        text = f"cannot write {path}: {error.strerror or error}; make room or choose another folder"
        raise (Unavailable(text) if error.errno in FULL else UserError(text)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_run(model: OpenedModel, write: Callable[..., None], folder: AnyPath, dtype: str) -> None:
    """Writes a run's model by one of export's functions."""
    if isinstance(model.weights, hf.Weights):
        raise UserError(f"{model.source} is a Hugging Face model already")
    with new_folder(folder) as partial:
        write(model, partial, Path(os.path.realpath(folder)).name if isinstance(folder, Path) else folder.name, dtype)


def import_model(model: OpenedModel, out_dir: AnyPath, known: Mapping[str, Any]) -> None:
    """Writes a run's folder that holds a model's parameters as checkpoint 0 and its tokenizer.

    known: what else there is to say of the model, for the checkpoint's record.
    """
    Checkpoints(out_dir).check_path()
    with new_folder(out_dir) as folder:
        # an average of the parameters, if the run had one, is what its parameters are from here on
        model.run_config.update(out_dir=str(out_dir), init_from=model.source, average_decay=0.0)
        save_config(model.run_config, folder, model_source=find_model(model.run_config.model).source)
        copy_tokenizer(model.language, model.folder, folder)
        checkpoints = Checkpoints(folder)
        checkpoints.check_room({"params": model.params})
        checkpoints.save(0, {"params": model.params}, {"source": model.source, **known})
        if not checkpoints.wait():
            raise UserError(f"the checkpoint could not be written in {out_dir}; see the line above")


EXPORTS = {"to_hf": export.write_hf, "to_safetensors": export.write_safetensors}
IMPORTS = {"from_hf": hf.Weights, "from_nanogpt": hf.Weights, "from_safetensors": ParamsFile}


def main(argv: Sequence[str]) -> None:
    with contextlib.suppress(UserError):  # of what several need and this does not
        if (find_cluster() or {}).get("process_id"):
            return  # the first process of several does it all
    parser = Parser(prog="python -m jaxgpt.convert", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--from_hf", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder of Hugging Face's GPT-2")
    parser.add_argument("--from_nanogpt", help="nanoGPT's ckpt.pt, or the folder with it")
    parser.add_argument("--data_dir", help="with --from_nanogpt: its corpus, for meta.pkl; without one: GPT-2's tokens")
    parser.add_argument("--from_safetensors", help="a folder that --to_safetensors wrote")
    parser.add_argument("--to_hf", help="folder to write, which transformers opens; for model=gpt2 alone")
    parser.add_argument("--to_safetensors", help="folder to write: safetensors of our own names, for any model")
    parser.add_argument("--out_dir", required=True, help="the run: made by --from_…, read by --to_…")
    parser.add_argument("--model", default="", help="the model file of a run of one's own model")
    parser.add_argument("--model_changed", action="store_true", help="accept it where it differs from the run's")
    add_checkpoint_argument(parser)
    parser.add_argument("--dtype", default="float32", choices=hf.DTYPES, help="of the weights that --to_… writes")
    args = parser.parse(argv)
    given = {name: getattr(args, name) for name in (*IMPORTS, *EXPORTS) if getattr(args, name) is not None}
    if len(given) != 1:
        raise UserError(f"give one of {', '.join(f'--{name}' for name in (*IMPORTS, *EXPORTS))}")
    ((way, other),) = given.items()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and host memory is what there is most of
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    how = {"mesh": mesh, "dtype": "float32", "model": args.model, "model_changed": args.model_changed}
    corpus = args.data_dir and str(local_path(args.data_dir))
    if way in EXPORTS:
        target = store.folder(other)
        export_run(open_model(args.out_dir, which=args.checkpoint, **how), EXPORTS[way], target, args.dtype)
    else:
        weights, known = open_checkpoint(local_path(other), corpus) if way == "from_nanogpt" else (None, {})
        model = open_model(init_from=other, weights=weights, **how)
        if not isinstance(model.weights, IMPORTS[way]):
            raise UserError(f"{other} is {'a jaxgpt run already' if model.weights is None else f'not for --{way}'}")
        import_model(model, store.folder(args.out_dir), known)
    print(f"wrote {other if way in EXPORTS else args.out_dir}")


if __name__ == "__main__":
    run_main(main)
