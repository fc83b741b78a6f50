"""Opens a model for whoever uses one: a run, an export of ours, a Hugging Face folder, or one of OpenAI's names."""

import argparse
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jaxgpt import UserError, store
from jaxgpt.cli import Parser
from jaxgpt.config import GPT2_SIZES, DataConfig, DeviceConfig, default_config, read_config, resolve
from jaxgpt.data import RunData, corpus_folders
from jaxgpt.keys import keys, take
from jaxgpt.models import ModelConfig, Params, abstract_params, bind, cast_params, find_model, roles
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.sharding import param_specs
from jaxgpt.step import OPTIONAL
from jaxgpt.store import AnyPath
from jaxgpt.tokenizer import Meta, Tokenizer, check_same_language, corpus_meta, identified, load_tokenizer
from jaxgpt.weights import hf
from jaxgpt.weights.files import ParamsFile, read_json

SAFETENSORS = "model.safetensors"  # in place of checkpoints/ in the folder of an exported model
Which = Literal["best", "latest"] | int  # a checkpoint of a run


@dataclasses.dataclass
class OpenedModel:
    """A model to use. Its shape is known; parameters and tokenizer are loaded when first asked for, so that mistakes
    about the tokenizer, the corpus or the settings show before gigabytes are read.
    """

    source: str  # the name or folder it came from
    folder: AnyPath
    meta: Meta  # of its tokenizer
    run_config: ConfigDict  # a run's or an export's, or the defaults with the shape of a Hugging Face model
    config: ModelConfig
    weights: hf.Weights | ParamsFile | None  # a Hugging Face model's or an export's; a run has checkpoints
    mesh: Mesh
    which: Which
    param_dtype: str
    step: int | None = None  # of a run's checkpoint, once `params` have been read
    info: dict[str, Any] = dataclasses.field(default_factory=dict)  # and what it records: val_loss, source

    def adopt(self, config: ConfigDict) -> None:
        """Fits the config of a run that starts from these weights: sizes that are 0 there become the weights'.

        UserError, naming the key and both values, where it contradicts them.
        """
        if config.model != self.run_config.model:
            raise UserError(
                f"{self.source} is of model={self.run_config.model}, not {config.model}; name the same model"
            )
        for name in keys(type(self.config)).keys() - {"block_size", "dropout"}:
            if config[name] == 0 and name.startswith("n_"):
                config[name] = self.run_config[name]
            if config[name] != self.run_config[name]:
                raise UserError(
                    f"{name}={config[name]} contradicts the weights of {self.source}; set "
                    f"{name}={self.run_config[name]}"
                )

    def check_corpus(self, meta: Meta) -> None:
        """UserError unless the corpus's tokens mean what they mean to the model."""
        check_same_language(self.language, meta, "the corpus", self.source)

    @functools.cached_property
    def language(self) -> Meta:
        """The tokenizer's meta with its identity, which a Hugging Face folder does not tell."""
        return identified(self.meta, self.folder)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises UserError if it is not there."""
        vocabulary, own = self.folder / "vocab.json", self.folder / self.meta.tokenizer
        if own.name.endswith(".json") and not own.is_file() and vocabulary.is_file():
            raise UserError(
                f"{vocabulary} is not GPT-2's, and there is no tokenizer.json; write one: in Python, transformers."
                f"AutoTokenizer.from_pretrained({str(self.folder)!r}).save_pretrained({str(self.folder)!r})"
            )
        return load_tokenizer(self.meta, self.folder)

    @functools.cached_property
    def params(self) -> Params:
        """The parameters on the mesh, in param_dtype but for those that stay float32; a run's average if it has one.

        A model of fewer positions than the stored one takes the first rows of what is longer there.
        """
        stored_config = dataclasses.replace(self.config, block_size=self.run_config.block_size)
        wanted, stored = placed_params(self.config, self.mesh), placed_params(stored_config, self.mesh)
        if self.weights is None:
            field = "average" if self.run_config.average_decay else "params"
            checkpoints = Checkpoints(self.folder)
            state, self.info, self.step = checkpoints.restore({field: stored}, self.which, optional=OPTIONAL)
            if state[field] is None:  # saved before the run had an average
                field, (state, _, _) = "params", checkpoints.restore({"params": stored}, self.step)
            params = cast_params(self.config, state[field], self.param_dtype)
        else:
            stored = cast_params(self.config, stored, self.param_dtype)
            params = self.weights.params(stored)
        return jax.tree.map(lambda x, to: x[tuple(map(slice, to.shape))] if x.shape != to.shape else x, params, wanted)

    @property
    def module(self) -> Any:
        """The nnx.Module over the parameters."""
        return bind(self.config, self.params)

    def logits(self, tokens: Any) -> Float[Array, "B T vocab_size"]:
        """Float32 logits of the token after each. tokens: ids (B, T), or a text, which is one row."""
        ids = jnp.asarray([self.encode(tokens)] if isinstance(tokens, str) else tokens, jnp.int32)
        return self._logits(self.params, ids)

    @functools.cached_property
    def _logits(self) -> Any:
        def logits(params: Params, tokens: Array) -> Array:
            module = bind(self.config, params)
            return module.logits(module.hidden(tokens)[0]).reshape(*tokens.shape, -1)

        return jax.jit(logits)

    def encode(self, prompt: str) -> list[int]:
        """A prompt's tokens, special ones by their names. UserError if there are none of the model's."""
        tokens = self.tokenizer.encode(prompt, special=True)
        if not tokens or max(tokens) >= self.config.vocab_size:
            raise UserError(f"{prompt!r} has no tokens of the model's {self.config.vocab_size}; give another prompt")
        return tokens


def placed_params(config: ModelConfig, mesh: Mesh) -> Params:
    """The shapes, dtypes and shardings of a model's parameters."""
    shapes = abstract_params(config)
    specs = param_specs(shapes, roles(config, shapes), mesh)
    return jax.tree.map(lambda x, spec: x.update(sharding=NamedSharding(mesh, spec)), shapes, specs)


def open_model(
    out_dir: str | None = None,
    init_from: str | None = None,
    *,
    mesh: Mesh,
    dtype: str = "auto",
    which: Which = "best",
    param_dtype: str | None = None,
    block_size: int | None = None,
    model: str = "",
    model_changed: bool = False,
    weights: hf.Weights | None = None,
) -> OpenedModel:
    """The model in out_dir, a run's folder, or the one that init_from names: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a
    folder (a run, what `convert --to_safetensors` wrote, or a Hugging Face GPT-2).

    dtype: of the computation. param_dtype: in which the parameters are kept, by default the same: the computation casts
    them to it anyway, so that the results are the same to the bit. which: the checkpoint of a run. block_size: fewer
    positions than the model has. model, model_changed: the file that a run's model is in, and whether it may differ
    from the run's (config.read_config). weights: GPT-2's that are open already, which init_from only names then.
    UserError if there is no such model.
    """
    if (not out_dir) == (not init_from):
        raise UserError("name one model: --out_dir=FOLDER of a run, or --init_from=gpt2 or a folder")
    source = f"./{out_dir}" if out_dir in GPT2_SIZES else str(out_dir or init_from)
    folder = store.folder(source)
    source = str(folder) if source.startswith("~") else source
    has_config = not weights and source not in GPT2_SIZES and (folder / "config.json").is_file()
    if has_config and "block_size" in read_json(folder / "config.json"):  # ours; GPT-2's is called n_positions
        run, meta = read_config(folder, model=model, model_changed=model_changed), corpus_meta(folder)
        exported = (folder / SAFETENSORS).is_file() and not (folder / "checkpoints").exists()
        stored = ParamsFile(_local(folder) / SAFETENSORS) if exported else None
    else:
        if not isinstance(folder, Path):
            raise UserError(f"{folder} holds no run: it has no config.json of ours; check its name, or copy it here")
        stored = weights or hf.open_weights(source)
        run, folder, meta = default_config(), stored.folder, stored.meta
        run.update({key: value for key, value in stored.fields.items() if key in run})
    block_size = run.block_size if block_size is None else block_size
    if block_size > run.block_size:
        raise UserError(f"block_size={block_size} is more than the {run.block_size} positions of {source}; lower it")
    here = run.copy_and_resolve_references()  # what the run's own machine decided does not bind this one
    here.update(dtype=dtype, matmul_dtype="auto", attention="auto", kernels="auto", remat="none", block_size=block_size)
    config = resolve(here, mesh, meta.vocab_size, meta.eot).model
    return OpenedModel(source, folder, meta, run, config, stored, mesh, which, param_dtype or config.dtype)


def open_weights(config: ConfigDict, mesh: Mesh) -> OpenedModel:
    """The model that a run starts from, its sizes taken into the run's config."""
    model = open_model(
        init_from=config.init_from,
        mesh=mesh,
        dtype=config.dtype,
        param_dtype="float32",
        block_size=config.block_size,
        model=config.model if find_model(config.model).source else "",
        model_changed=config.model_changed,
    )
    model.adopt(config)
    return model


def open_data(config: ConfigDict, mesh: Mesh, weights: OpenedModel | None) -> RunData:
    """A run's corpora, for the vocabulary of the weights that it starts from, if any."""
    return RunData(take(DataConfig, config), config.block_size, mesh, weights and weights.meta.vocab_size)


def check_data(config: ConfigDict, meta: Meta, weights: OpenedModel | None) -> None:
    """Raises UserError unless a run with these tokens can start from these weights and write into its out_dir."""
    corpora = [os.path.realpath(str(folder)) for folder in corpus_folders(take(DataConfig, config))]
    if os.path.realpath(config.out_dir) in corpora:
        raise UserError(f"out_dir={config.out_dir} is the corpus's own folder; choose another out_dir")
    if weights:
        weights.check_corpus(meta)


def _local(folder: AnyPath) -> Path:
    """Raises UserError on a folder in a store: of what is there, runs alone can be opened."""
    if isinstance(folder, Path):
        return folder
    raise UserError(f"{folder} is no run but an export; copy it here and name the copy")


def add_model_arguments(parser: Parser) -> None:
    """The arguments that name a model for open_model."""
    parser.add_argument("--out_dir", help="folder of a run")
    parser.add_argument(
        "--init_from", help=f"{', '.join(GPT2_SIZES)}, or a folder: a run, an export, a Hugging Face model"
    )
    parser.add_argument("--model", default="", help="the model file of a run of one's own model")
    parser.add_argument("--model_changed", action="store_true", help="accept it where it differs from the run's")
    add_checkpoint_argument(parser)
    dtype = keys(DeviceConfig)["dtype"].metadata
    parser.add_argument("--dtype", default="auto", choices=dtype["choices"], help=dtype["help"])


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What open_model takes from these arguments, but for out_dir."""
    names = {"init_from": "init_from", "dtype": "dtype", "checkpoint": "which"}
    return {to: getattr(args, name) for name, to in names.items()} | {
        "model": args.model,
        "model_changed": args.model_changed,
    }


def add_checkpoint_argument(parser: Parser) -> None:
    """--checkpoint: open_model's `which`."""
    parser.add_argument("--checkpoint", type=which_checkpoint, default="best", help="of a run: best, latest or a step")


def which_checkpoint(text: str) -> Which:
    """best, latest or a step. UserError on anything else."""
    if text == "best" or text == "latest":
        return text
    if text.isdecimal():
        return int(text)
    raise UserError(f"--checkpoint={text} is not best, latest or a step")
