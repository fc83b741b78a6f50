"""Every key with its default; presets, command-line overrides and one-line errors for the user's mistakes."""

import argparse
import difflib
import json
import logging
import math
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from jaxgpt import UserError, atomic_write

# layers, heads, width of OpenAI's four releases; each has block_size 1024, vocabulary 50257 and biases
GPT2_SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def default_config() -> ConfigDict:
    """All keys with their defaults, locked: an unknown key is an error. nanoGPT's names and values if it has them."""
    c = ConfigDict()
    # run
    c.out_dir = "out"
    c.init_from = "scratch"  # scratch | resume | auto | gpt2 | gpt2-medium | gpt2-large | gpt2-xl | a folder
    c.seed = 1337
    c.eval_interval = 2000  # steps between evaluations, each followed by a checkpoint
    c.eval_iters = 200  # batches in each evaluation's estimate
    c.eval_only = False  # evaluate once and stop
    c.eval_tasks = ""  # also score these at each evaluation: hellaswag=FILE
    c.always_save_checkpoint = True  # False: only when the validation loss improves
    c.keep_checkpoints = 2  # the newest N are kept, and the best one
    c.log_interval = 1
    c.tensorboard_log = False  # also write TensorBoard events into out_dir
    c.wandb_log = False
    c.wandb_project = "jaxgpt"
    c.wandb_run_name = "gpt2"
    # data
    c.dataset = "openwebtext"  # a name under data/, or a mixture: a:0.7,b:0.3
    c.data_dir = ""  # where train.bin and val.bin are; empty: data/<dataset>
    c.data_order = "shuffle"  # shuffle: every window once an epoch | random: with replacement, as nanoGPT
    c.doc_mask = False  # attention does not cross the end-of-text token
    c.batch_size = 12  # sequences per micro-step and data shard
    c.gradient_accumulation_steps = 40  # micro-steps per optimizer step, counted over all data shards
    c.block_size = 1024
    # model
    c.n_layer = 12
    c.n_head = 12
    c.n_embd = 768
    c.dropout = 0.0
    c.bias = False
    # optimizer
    c.learning_rate = 6e-4
    c.max_iters = 600_000  # optimizer steps in the whole run
    c.weight_decay = 1e-1
    c.beta1 = 0.9
    c.beta2 = 0.95
    c.grad_clip = 1.0  # global norm; 0 disables
    c.decay_lr = True  # False: a constant learning rate from the first step
    c.lr_schedule = "cosine"  # after warm-up: cosine (to min_lr) | constant
    c.warmup_iters = 2000
    c.lr_decay_iters = 600_000
    c.min_lr = 6e-5
    # hardware
    c.dtype = "auto"  # auto (bfloat16 where it is fast) | bfloat16 | float16 | float32
    c.matmul_dtype = "auto"  # auto: dtype | fp8: the MLP's and the vocabulary's products while training
    c.attention = "auto"  # auto | cudnn | xla
    c.kernels = "auto"  # the GPU kernels in jaxgpt/ops: auto | on | off
    c.accumulation = "auto"  # auto | multisteps (optax.MultiSteps) | sum
    c.remat = "none"  # none | block: recompute each block in the backward pass to save memory
    c.mesh_data = -1  # devices over which the batch is split; -1: what is left
    c.mesh_fsdp = 1  # devices over which parameters and optimizer state are split too
    c.mesh_tensor = 1  # devices over which each layer is split
    c.steps_per_call = 0  # optimizer steps in one call of the compiled function; 0: chosen by the model's size
    # reliability
    c.max_bad_steps = 10  # stop after this many non-finite steps in a row
    c.spike_threshold = 0.0  # drop a step whose loss or gradient norm is this many standard deviations up; 0: none
    c.stall_timeout = 1800.0  # seconds without a finished step before the run ends itself; 0 disables
    return c.lock()


CHOICES = {
    "data_order": ("shuffle", "random"),
    "lr_schedule": ("cosine", "constant"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "matmul_dtype": ("auto", "fp8"),
    "attention": ("auto", "cudnn", "xla"),
    "kernels": ("auto", "on", "off"),
    "accumulation": ("auto", "multisteps", "sum"),
    "remat": ("none", "block"),
}
# numbers that are at least 1; the others are at least 0
POSITIVE = (
    "batch_size", "gradient_accumulation_steps", "block_size", "eval_interval", "eval_iters", "log_interval",
    "keep_checkpoints", "max_iters", "max_bad_steps",
)  # fmt: skip
BELOW = {"dropout": 1, "beta1": 1, "beta2": 1, "seed": 2**32}


def validate(config: ConfigDict) -> None:
    """Raises UserError, naming the key, on a value that no run could use."""
    for key, default in default_config().items():
        value = config[key]
        if type(value) is not type(default):
            raise UserError(f"{key}={value!r} is not of type {type(default).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} is not a finite number")
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{key}={value!r} is not one of {', '.join(CHOICES[key])}")
        if key in BELOW and value >= BELOW[key]:
            raise UserError(f"{key}={value} must be below {BELOW[key]}")
        if key.startswith("mesh_"):
            if value < 1 and value != -1:
                raise UserError(f"{key}={value} must be a number of devices, or -1 for what is left")
        elif isinstance(value, int | float) and value < (key in POSITIVE):
            raise UserError(f"{key}={value} must be at least {int(key in POSITIVE)}")
    for key in ("n_layer", "n_head", "n_embd"):
        if config[key] < (config.init_from in ("scratch", "resume", "auto")):
            raise UserError(f"{key}={config[key]} must be at least 1, or 0 for that of the weights init_from names")
    if config.min_lr > config.learning_rate and config.decay_lr and config.lr_schedule == "cosine":
        raise UserError(f"min_lr={config.min_lr} is above learning_rate={config.learning_rate}; lower min_lr")
    if not config.out_dir:
        raise UserError("out_dir is empty; name the run's folder")


# what a slip in the user's own code raises
PRESET_ERRORS = (
    ArithmeticError, AttributeError, ImportError, LookupError, NameError, OSError, SyntaxError, TypeError, ValueError
)  # fmt: skip


def load_preset(spec: str) -> ConfigDict:
    """The preset in a file, `configs/gpt2.py` or `configs/gpt2.py:gpt2-xl`. Raises UserError if there is no such."""
    path, _, argument = spec.partition(":")
    if not Path(path).is_file():
        found = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py"))) or "none"
        raise UserError(f"no preset file {path}; those in configs/: {found}")
    try:
        get_config = runpy.run_path(path).get("get_config") if path.endswith(".py") else None
        if get_config is None:
            raise UserError(f"{path} is not a Python file (.py) with get_config(), as presets are")
        config = get_config(argument) if argument else get_config()
    except PRESET_ERRORS as error:
        text = " ".join(str(error).split())
        key = re.search(r"(?:[Kk]ey[: ]+|instead of )[\"'](\w+)", text)  # as ml_collections words it
        if key and key[1] not in default_config():
            text = unknown_key(key[1])
        raise UserError(f"{path}: {text}") from None
    if not isinstance(config, ConfigDict) or set(config) != set(default_config()):
        raise UserError(f"{path}: get_config() returned no config; make it with default_config(), change it, return it")
    return config


def unknown_key(name: str) -> str:
    """The message for a key that does not exist."""
    return f"there is no key {name}{nearest(name, default_config()) or '; jaxgpt/config.py lists the keys'}"


def nearest(word: str, words: Iterable[str]) -> str:
    """What to say of the one of `words` that was probably meant."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "yes")


def integer(text: str) -> int:
    """An int, also written 1e5 or 600_000."""
    value = float(text.replace("_", ""))
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


class Parser(argparse.ArgumentParser):
    """argparse, its errors raised as UserError."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the arguments")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses argv whole: an unknown argument is an error that names the nearest known one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            if name.startswith("--config."):
                raise UserError(unknown_key(name.removeprefix("--config.")))
            raise UserError(f"unknown argument {name}{nearest(name, self._option_string_actions)}")
        return args


def parse_config(argv: Sequence[str], parser: Parser) -> tuple[ConfigDict, argparse.Namespace]:
    """The config from `--config FILE[:ARGUMENT]` and `--config.KEY=VALUE`, validated, and the parser's arguments."""
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARGUMENT]", help="preset, such as configs/gpt2.py:gpt2-xl"
    )
    first, _ = parser.parse_known_args([w for w in argv if w not in ("-h", "--help")])
    config = load_preset(first.config)
    keys = parser.add_argument_group("keys of the preset and their values")
    for key, value in config.items():
        how = {"type": {bool: boolean, int: integer}.get(type(value), type(value)), "metavar": type(value).__name__}
        if isinstance(value, bool):  # a flag alone, `--config.bias`, means true
            how |= {"nargs": "?", "const": True}
        keys.add_argument(f"--config.{key}", dest=f"config.{key}", default=value, **how)
    args = parser.parse(argv)
    config.update({key: getattr(args, f"config.{key}") for key in config})
    validate(config)
    return config, args


def save_config(config: ConfigDict, folder: Path) -> None:
    """Writes config.json, whole or not at all. Raises UserError if it cannot."""
    with atomic_write(folder / "config.json") as f:
        f.write(json.dumps(config.to_dict(), indent=1).encode() + b"\n")


def read_config(folder: Path) -> ConfigDict:
    """The config of a run's folder; keys added since it was written take their defaults. Raises UserError."""
    path = folder / "config.json"
    config = default_config()
    try:
        values = json.loads(path.read_text())
        config.update({k: v for k, v in values.items() if k in config})
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run: it has no config.json; check out_dir") from None
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({' '.join(str(e).split())}); restore it or start another run") from None
    validate(config)
    return config


def run_main(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Runs an entry point, which gives the exit status: a UserError becomes one line, `error: …`, and its status."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    try:
        status = main(sys.argv[1:])
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(e.status)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells do
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        sys.exit(1)
    sys.exit(status)
