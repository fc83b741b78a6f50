"""Every key with its default and its help; presets, command-line overrides, and one-line errors for mistakes.

A model's own keys are in its file, the optimizer's in optim.py; all are flat: `--config.KEY=VALUE`.
"""

import argparse
import dataclasses
import itertools
import json
import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxgpt import PATHS, UserError, atomic_write, check_ordinary, from_json, local_path, one_line, shipped
from jaxgpt.cli import Parser, boolean, integer, nearest
from jaxgpt.cli import run_main as run_main  # its first home, which scripts outside of this repository import it from
from jaxgpt.keys import check, key, keys, take
from jaxgpt.models import ModelConfig, describe_slip, find_model
from jaxgpt.ops import fp8
from jaxgpt.optim import OptimizerConfig
from jaxgpt.sharding import check_heads
from jaxgpt.store import AnyPath, away
from jaxgpt.trackers import TrackerConfig

# layers, heads, width of OpenAI's four releases; each has block_size 1024, vocabulary 50257 and biases
GPT2_SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data: which tokens a step gets."""

    dataset: str = key("openwebtext", "a corpus under data/, or a mixture: a:0.7,b:0.3")
    data_dir: str = key("", "folder of train.bin and val.bin, or gs://…, s3://…; empty: data/DATASET")
    data_cache: str = key("", "where files from such a store are kept on each host; empty: ~/.cache/jaxgpt/data")
    data_cache_gb: float = key(100.0, "its bound, in 10^9 bytes", least=0.0)
    data_order: str = key(
        "shuffle",
        "shuffle: every window once an epoch; random: with replacement, as nanoGPT",
        choices=("shuffle", "random"),
    )
    doc_mask: bool = key(False, "attention does not cross the end-of-text token")
    batch_size: int = key(
        12,
        "sequences per micro-step and data shard; auto: as many as memory holds, for as many tokens a step",
        least=1,
    )
    auto_batch_size: bool = key(False, "what batch_size=auto sets, for presets")
    gradient_accumulation_steps: int = key(40, "micro-steps per optimizer step, over all data shards", least=1)
    eval_iters: int = key(200, "batches in each evaluation's estimate; 0: the whole validation split", below=1_000_001)
    seed: int = key(1337, "of the initial weights, the data's order, dropout", below=2**32)


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """Devices: precision, fast paths, the mesh."""

    dtype: str = key(
        "auto",
        "of the computation; auto: bfloat16 where it is fast",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    matmul_dtype: str = key("auto", "fp8: products with weights in training", choices=("auto", "fp8"))
    attention: str = key("auto", "implementation of attention", choices=("auto", "cudnn", "splash", "xla"))
    kernels: str = key("auto", "fast paths of jaxgpt/ops where they apply", choices=("auto", "on", "off"))
    remat: str = key(
        "none", "block: recompute each block in the backward pass, to save memory", choices=("none", "block")
    )
    mesh_data: int = key(-1, "devices over which the batch is split; -1: what is left", least=-1)
    mesh_fsdp: int = key(1, "devices over which parameters and optimizer state are split too", least=-1)
    mesh_tensor: int = key(1, "devices over which each layer is split", least=-1)
    steps_per_call: int = key(
        0, "optimizer steps in one call of the compiled function; 0: chosen by the model's size", below=10_001
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Run: its folder, evaluations, checkpoints, logs, and what keeps it safe."""

    out_dir: str = key("out", "the run's folder, or gs://BUCKET/PATH, s3://BUCKET/PATH")
    init_from: str = key(
        "scratch",
        "scratch, resume, auto (resume if there is a checkpoint), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a "
        "folder: a run or a Hugging Face model",
    )
    model: str = key("gpt2", "gpt2, modern, or the path of a model file: see jaxgpt/models/__init__.py")
    model_changed: bool = key(False, "accept a model file that differs from the one the run was started with")
    eval_interval: int = key(2000, "steps between evaluations, each followed by a checkpoint", least=1)
    eval_only: bool = key(False, "evaluate once and stop")
    sample_interval: int = key(0, "steps between samples of text; 0: never")
    sample_prompt: str = key("\n", "what these samples begin with")
    eval_tasks: str = key("", "also score these at each evaluation: hellaswag=FILE")
    always_save_checkpoint: bool = key(True, "False: only when the validation loss improves")
    keep_checkpoints: int = key(2, "the newest so many are kept, and the best one", least=1)
    log_interval: int = key(1, "steps between log lines", least=1)
    max_bad_steps: int = key(10, "stop after so many non-finite steps in a row", least=1)
    stall_timeout: float = key(1800.0, "seconds without a finished step before the run ends itself; 0 disables")


class Parts(NamedTuple):
    """A run's config, resolved once: rooms take the part they need."""

    model: ModelConfig  # resolved for the devices and the corpus's vocabulary
    optimizer: OptimizerConfig
    data: DataConfig
    devices: DeviceConfig
    run: RunConfig


PARTS = (RunConfig, DataConfig, OptimizerConfig, DeviceConfig, TrackerConfig)
SAME_ON_RESUME = ("seed", "data_order")  # and all keys of the model: with other values it would be another run


def all_keys(model: str = "gpt2") -> dict[str, dict[str, dataclasses.Field]]:
    """{title: {name: key}} of every part, the model's among them. Raises UserError where its own keys clash."""
    parts = {(part.__doc__ or "").partition(":")[0].lower(): keys(part) for part in PARTS}
    own = keys(find_model(model).config)
    for title, others in parts.items():
        if clash := own.keys() & others.keys():
            raise UserError(
                f"model={model}: its key {min(clash)} is a key of the {title} already; give it another name"
            )
    return {"model": own} | parts


def _flat(model: str) -> dict[str, dataclasses.Field]:
    return {name: field for part in all_keys(model).values() for name, field in part.items()}


def default_config(model: str = "gpt2") -> ConfigDict:
    """Every key of every part and of `model`, with its default; locked, so that an unknown key is an error."""
    config = ConfigDict({name: field.default for name, field in _flat(model).items()})
    config.model = model
    return config.lock()


def with_model(config: ConfigDict, model: str) -> ConfigDict:
    """The config for another model: its keys' defaults, and the values of all keys that both have."""
    other = default_config(model)
    other.update({name: value for name, value in config.items() if name in other and name != "model"})
    return other


def validate(config: ConfigDict, *, together: bool = True) -> None:
    """Raises UserError, naming the key, on a value that no run could use. together: beside the other keys' values."""
    for name, field in _flat(config.model).items():
        check(field, config[name])
        if name.startswith("mesh_") and config[name] == 0:
            raise UserError(f"{name}=0 must be a number of devices, or -1 for what is left")
    for name in ("n_layer", "n_head", "n_embd"):
        if config[name] < (config.init_from == "scratch"):
            raise UserError(f"{name}={config[name]} must be at least 1, or 0 for that of the weights init_from names")
    if together:
        take(OptimizerConfig, config)
    check_tokens(config)
    if not config.out_dir or not config.out_dir.isprintable():  # bytes that are no UTF-8 come as lone surrogates
        raise UserError(f"out_dir={config.out_dir!r} names no folder: it is empty or cannot be printed; choose another")


def resolve(config: ConfigDict, mesh: Mesh, vocab_size: int, eot: int | None = None) -> Parts:
    """The parts of a config, its "auto" keys decided for the devices of the mesh.

    vocab_size, eot: the corpus's number of tokens, and the one that ends a document. Raises UserError where the devices
    or the corpus do not have what a key asks for.
    """
    wanted, device = take(DeviceConfig, config), mesh.devices.flat[0]
    nvidia = device.platform == "gpu" and hasattr(device, "compute_capability")
    ampere = nvidia and float(device.compute_capability) >= 8
    dtype = wanted.dtype
    if dtype == "auto":
        dtype = "bfloat16" if ampere or device.platform == "tpu" else "float16" if nvidia else "float32"
    if config.doc_mask and eot is None:
        raise UserError("doc_mask needs an end-of-text token and this corpus has none; set --config.doc_mask=false")
    check_heads(config.n_head, mesh)
    check_parameters(config, vocab_size)
    model = take(
        find_model(config.model).config,
        config,
        vocab_size=vocab_size,
        dtype=dtype,
        kernels=ampere if wanted.kernels == "auto" else wanted.kernels == "on",
        remat=wanted.remat,
        doc_mask=eot if config.doc_mask else -1,
    )
    cudnn = ampere and dtype != "float32" and model.head_size <= 128
    if wanted.attention == "cudnn" and not cudnn:
        raise UserError(
            "attention=cudnn needs an NVIDIA GPU of the Ampere generation or newer, bfloat16 or float16, and heads "
            "no larger than 128; leave it at auto"
        )
    if wanted.attention == "splash" and device.platform != "tpu":
        raise UserError("attention=splash needs a TPU; leave it at auto")
    if wanted.matmul_dtype == "fp8":
        check_fp8(config, dtype, nvidia and float(device.compute_capability) >= 8.9, mesh)
    fastest = "cudnn" if cudnn and not config.doc_mask else "splash" if device.platform == "tpu" else "xla"
    model = dataclasses.replace(model, attention=fastest if wanted.attention == "auto" else wanted.attention)
    return Parts(model, take(OptimizerConfig, config), take(DataConfig, config), wanted, take(RunConfig, config))


# Sizes that no machine holds are found by arithmetic: to try them takes minutes, or ends in a crash. The bounds are a
# hundred times or more what has been trained by 2026: 10^13 parameters, 2^31 tokens or 2^20 sequences in a step.


def check_tokens(config: ConfigDict) -> None:
    """Raises UserError on more tokens in a step or an evaluation than any machine takes."""
    rows = config.batch_size * config.gradient_accumulation_steps
    if rows > 2**20 or rows * config.block_size >= 2**31:
        raise UserError(
            f"batch_size={config.batch_size} × gradient_accumulation_steps={config.gradient_accumulation_steps} × "
            f"block_size={config.block_size} are {rows * config.block_size:.1e} tokens a step; choose fewer"
        )
    if (tokens := rows * config.block_size * config.steps_per_call) >= 2**33:
        raise UserError(f"steps_per_call={config.steps_per_call} are {tokens:.1e} tokens a call; choose fewer")
    if (tokens := config.eval_iters * config.batch_size * config.block_size) >= 2**33:
        raise UserError(f"eval_iters={config.eval_iters} are {tokens:.1e} tokens an evaluation; choose fewer")


def check_parameters(config: ConfigDict, vocab_size: int) -> None:
    """Raises UserError on more parameters than any machine holds."""
    count = 12 * config.n_layer * config.n_embd**2 + (vocab_size + config.block_size) * config.n_embd
    if count > 10**13:
        raise UserError(
            f"n_layer={config.n_layer}, n_embd={config.n_embd} and block_size={config.block_size} make about "
            f"{count:.1e} parameters; choose a smaller model"
        )


def check_fp8(config: ConfigDict, dtype: str, hardware: bool, mesh: Mesh) -> None:
    """Raises UserError where FP8 products cannot run, or not by the kernels."""
    rows = config.batch_size * config.block_size
    if not hardware or dtype != "bfloat16" or mesh.shape["tensor"] > 1:
        raise UserError(
            "matmul_dtype=fp8 needs NVIDIA GPUs of compute capability 8.9 or more (Ada, Hopper, newer), bfloat16 and "
            "mesh_tensor=1; leave it at auto"
        )
    if config.n_embd % fp8.MULTIPLE or rows % fp8.MULTIPLE:
        raise UserError(
            f"matmul_dtype=fp8 needs n_embd={config.n_embd} and batch_size × block_size={rows} to be multiples of "
            f"{fp8.MULTIPLE}; choose such sizes, or leave it at auto"
        )


preset_texts: list[str] = []  # of those that this process has run: they may do more than make a config


def load_preset(spec: str) -> ConfigDict:
    """The preset in a file, `configs/gpt2.py` or `configs/gpt2.py:gpt2-xl`. Raises UserError if there is no such."""
    # a file's own colons, as in C:\\gpt2.py or run:1/gpt2.py, come before the .py
    parts = re.fullmatch(r"(.+?\.py):(.*)", spec, re.DOTALL)
    path, argument = parts.groups() if parts else (spec, "")
    presets = shipped("configs/*.py")
    file = presets.get(path) or local_path(path)
    if not file.is_file():
        raise UserError(f"no preset file {path}; there are {', '.join(presets)}")
    try:
        preset_texts.append(file.read_text(encoding="utf-8", errors="replace"))
        get_config = runpy.run_path(str(file)).get("get_config") if path.endswith(".py") else None
        if get_config is None:
            what = "defines no get_config(), as presets do" if path.endswith(".py") else "is no Python file (.py)"
            raise UserError(f"{what}; copy one of {', '.join(presets)}")
        config = get_config(argument) if argument else get_config()
    except BaseException as error:  # a slip in the user's own code, which may also want to exit
        if isinstance(error, KeyboardInterrupt):
            raise
        if isinstance(error, UserError | ValueError | RuntimeError) and str(error):  # what code raises to be read
            text = one_line(error)
        else:
            text = describe_slip(error, str(file)) if isinstance(error, Exception) else repr(error)
        unknown = re.search(r"(?:[Kk]ey[: ]+|instead of )[\"'](\w+)", text)  # as ml_collections words it
        if unknown and unknown[1] not in default_config():
            text = unknown_key(unknown[1])
        raise UserError(f"{path}: {text}") from None
    if not isinstance(config, ConfigDict) or "model" not in config or set(config) != set(_flat(config.model)):
        raise UserError(f"{path}: get_config() returned no config; make it with default_config(), change it, return it")
    return config


# What other trainers call keys that have another name here, and what to use for those that have none
ELSEWHERE = {
    "device": "JAX takes the fastest devices it finds; JAX_PLATFORMS=cpu in the environment chooses",
    "compile": "every step is compiled",
    "backend": "processes find each other: docs/multihost.md",
    "lr": "use learning_rate",
    "steps": "use max_iters",
    "max_steps": "use max_iters",
    "grad_accum": "use gradient_accumulation_steps",
    "warmup_steps": "use warmup_iters",
    "seq_len": "use block_size",
    "precision": "use dtype",
    "fp8": "use matmul_dtype=fp8",
    "resume": "use init_from=resume, or auto",
}


def unknown_key(name: str, known: Iterable[str] | None = None) -> str:
    """The message for a key that does not exist."""
    hint = f": {ELSEWHERE[name]}" if name in ELSEWHERE else nearest(name, known or _flat("gpt2"))
    return f"there is no key {name}{hint or '; python -m jaxgpt.train --help lists the keys'}"


class Parsed(NamedTuple):
    """A command line."""

    config: ConfigDict  # the preset's values, and those given on the command line
    given: dict[str, Any]  # the latter alone
    args: argparse.Namespace  # all else


def parse_config(argv: Sequence[str], parser: Parser) -> Parsed:
    """The config from `--config FILE[:ARGUMENT]` (or FILE alone) and `--config.KEY=VALUE`, validated.

    A model named by the preset or the command line brings its own keys.
    """
    parser.unknown_key = unknown_key
    parser.usage = f"{parser.prog} [--config] FILE[:ARGUMENT] [--config.KEY=VALUE …] [other options]"
    about = "a preset, such as configs/gpt2.py:gpt2-xl; --config may be left out"
    parser.add_argument("--config", metavar="FILE[:ARGUMENT]", help=about)
    parser.add_argument("preset", nargs="?", help=argparse.SUPPRESS)
    helping = any(word in ("-h", "--help") for word in argv)
    finder = Parser(add_help=False)
    finder.add_argument("--config", dest="preset")
    finder.add_argument("--config.model", dest="model")
    first, rest = finder.parse_known_args(argv)
    named = first.preset or next((word for word in rest if not word.startswith("-")), None)
    if named is None and not helping:
        raise UserError(f"name a preset: {parser.prog} --config configs/gpt2.py; {parser.prog} --help lists all keys")
    config = load_preset(named) if named else default_config()
    if first.model:
        config = with_model(config, first.model)
    for title, part in all_keys(config.model).items():
        group = parser.add_argument_group(title)
        for name, field in part.items():
            choices = f" [{' | '.join(field.metadata['choices'])}]" if field.metadata["choices"] else ""
            how: dict[str, Any] = {"type": {bool: boolean, int: integer}.get(type(field.default), type(field.default))}
            if name == "batch_size":
                how["type"] = integer_or_auto
            how |= {
                "metavar": type(field.default).__name__.upper(),
                "help": field.metadata["help"].replace("%", "%%") + choices,
            }
            if isinstance(field.default, bool):  # a flag alone, `--config.bias`, means true
                how |= {"nargs": "?", "const": True}
            group.add_argument(f"--config.{name}", default=config[name], **how)
    args = parser.parse(argv)
    if args.preset and args.config:
        raise UserError(parser.too_many(args.preset))
    words = {word.partition("=")[0] for word in argv}
    given = {name: getattr(args, f"config.{name}") for name in config if f"--config.{name}" in words}
    if given.get("batch_size") == AUTO:
        given = {name: value for name, value in given.items() if name != "batch_size"} | {"auto_batch_size": True}
    config.update(given)
    validate(config, together=config.init_from not in ("resume", "auto"))  # else the run's values count: see prepare
    return Parsed(config, given, args)


AUTO = "auto"


def integer_or_auto(text: str) -> int | str:
    """The value of --config.batch_size."""
    return AUTO if text == AUTO else integer(text)


# (key, the values of it with which others have no effect, those others)
WITHOUT_EFFECT = (
    ("optimizer", ("adamw",), ("embedding_lr", "head_lr", "vector_lr", "momentum", "momentum_warmup_iters")),
    ("decay_lr", (False,), ("lr_schedule", "warmup_iters", "lr_decay_iters", "min_lr")),
    ("lr_schedule", ("cosine", "constant"), ("cooldown",)),
    ("lr_schedule", ("constant",), ("lr_decay_iters", "min_lr")),
    ("sample_interval", (0,), ("sample_prompt",)),
    ("wandb_log", (False,), ("wandb_project", "wandb_run_name")),
)


def without_effect(config: ConfigDict, given: Mapping[str, Any]) -> list[str]:
    """A line for each key that was given on the command line and changes nothing beside the others' values.

    Raises UserError on a dataset that was given where data_dir names another folder.
    """
    if "dataset" in given and "data_dir" not in given and config.data_dir:
        raise UserError(
            f"dataset={config.dataset} would not count: data_dir={config.data_dir} names the corpus; add "
            "--config.data_dir= to take the dataset"
        )
    idle = [(name, f"{key}={config[key]}") for key, values, names in WITHOUT_EFFECT if config[key] in values
            for name in names if name in given]  # fmt: skip
    return [f"{name} has no effect with {other}" for name, other in idle]


def save_config(config: ConfigDict, folder: AnyPath, **about: Any) -> None:
    """Writes config.json: the keys, and beside them what else is known of the run. Raises UserError if it cannot."""
    with atomic_write(folder / "config.json") as f:
        f.write(json.dumps({**config.to_dict(), **about}, indent=1).encode() + b"\n")


def read_saved(folder: AnyPath) -> dict[str, Any]:
    """What config.json in a run's folder holds. Raises UserError."""
    path = folder / "config.json"
    check_ordinary(path)
    try:
        saved = from_json(path.read_bytes())
        if not isinstance(saved, dict):
            raise TypeError("no JSON object")
        return saved
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no run: it has no config.json; check out_dir") from None
    except (OSError, ValueError, TypeError) as e:
        if away(e):
            raise
        if isinstance(e, OSError) and e.errno in PATHS:  # sound, for all that is known
            raise UserError(f"{path} cannot be read: {e.strerror}; mend its permissions, or check out_dir") from None
        raise UserError(f"{path} is damaged ({one_line(e)}); restore it or start another run") from None


def read_config(folder: AnyPath, *, model: str = "", model_changed: bool = False) -> ConfigDict:
    """The config of a run's folder; keys added since it was written take their defaults. Raises UserError.

    model: the model that the user names, by default the run's. A run of a user's file needs it, as code stored in a run
    is never executed; where the file's text is not what the run recorded, model_changed accepts it.
    """
    saved = read_saved(folder)
    name, source = saved.get("model", "gpt2"), saved.get("model_source", "")
    if not isinstance(name, str) or not isinstance(source, str):
        raise UserError(f"{folder / 'config.json'} is damaged (model is {name!r}); restore it or start another run")
    if not model and source:
        raise UserError(
            f"the run in {folder} is of the model file {name}, whose code is not run by itself; name it: --model={name}"
        )
    file = find_model(model or name)
    if bool(file.source) != bool(source) or not source and file.name != name:
        raise UserError(f"the run in {folder} has model={name}, not {file.name}; name the same model")
    if file.source != source and not model_changed:
        raise UserError(
            f"{file.name} is not what the run in {folder} was started with: {_first_difference(source, file.source)}"
        )
    config = default_config(file.name)
    try:
        config.update({k: v for k, v in saved.items() if k in config and k not in ("model", "model_changed")})
    except (ValueError, TypeError, AttributeError) as e:
        path, why = folder / "config.json", one_line(e)
        raise UserError(f"{path} is damaged ({why}); restore it or start another run") from None
    validate(config)
    return config


def _first_difference(recorded: str, found: str) -> str:
    pairs = itertools.zip_longest(recorded.splitlines(True), found.splitlines(True), fillvalue="(end of the file)")
    number, (old, new) = next((i, pair) for i, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
    if (ends := (old.rstrip("\r\n"), new.rstrip("\r\n")))[0] != ends[1]:
        old, new = ends
    return (
        f"line {number} was {old!r} and is {new!r}; put it back, or accept the new file with "
        "--model_changed (of train: --config.model_changed)"
    )


def resumed_config(
    config: ConfigDict, given: Mapping[str, Any] | None, saved: ConfigDict
) -> tuple[ConfigDict, list[str]]:
    """The config of a run that goes on, and a line for each key whose value is not the run's or not the preset's.

    saved: the run's own, which counts but for what was `given` on the command line; None: all of `config` was given.
    Raises UserError where a key differs that makes it another run.
    """
    # of this start, not of the run
    here = ("out_dir", "eval_only", "model", "model_changed", "auto_batch_size")
    given = dict(config.items()) if given is None else dict(given)
    fixed = (*SAME_ON_RESUME, *keys(find_model(saved.model).config))
    result, lines = saved.copy_and_resolve_references(), []
    for name in saved:
        value = given.get(name, saved[name])
        if name == "init_from":
            continue  # what the run began from
        if name in here:
            result[name] = config[name]
        elif name in given and value != saved[name]:
            if name in fixed and value == 0 and name.startswith("n_"):
                continue  # 0: that of the run
            if name in fixed:
                raise UserError(
                    f"{name}={value}, but the run in {config.out_dir} has {name}={saved[name]}; resume with the same, "
                    "or choose another out_dir"
                )
            result[name] = value
            lines.append(f"{name} {saved[name]} → {value}")
        elif config[name] != saved[name] and not (name.startswith("n_") and config[name] == 0):
            runs, presets = (repr(x) if x == "\n" else x for x in (saved[name], config[name]))
            take_it = f"the preset has {presets}" if name in fixed else f"--config.{name}={presets} is the preset's"
            lines.append(f"{name} stays {runs}, as in the run; {take_it}")
    validate(result)
    return result, lines
