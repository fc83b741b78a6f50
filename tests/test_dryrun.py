"""What a dry run counts and says: collectives of a compiled program, memory, all problems at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import UserError
from jaxgpt.config import GPT2_SIZES, default_config, resolve
from jaxgpt.sharding import make_mesh
from jaxgpt.tools.dryrun import bytes_per_device, collectives, dry_run, step_bytes

ROOT = Path(__file__).parents[1]

HLO = """
HloModule jit_f

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add
  %ag-start = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%all-reduce.1), dimensions={0}
  %ag = f32[16,8]{1,0} all-gather-done(%ag-start)
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %x)
}

ENTRY %main (a: bf16[4,8], b: f32[4,8]) -> f32[1,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[4,8]{1,0} parameter(1)
  %w = (s32[], f32[4,8]{1,0}) while(%tuple), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %both = (bf16[4,8]{1,0}, f32[4,8]{1,0}) all-reduce(%a, %b), to_apply=%add
  ROOT %rs = f32[1,8]{1,0} reduce-scatter(%b), dimensions={0}, to_apply=%add
}
"""


def test_collectives_are_counted_with_their_loops():
    assert collectives(HLO) == {
        "all-reduce": (6, 5 * 128 + 64 + 128),
        "all-gather": (5, 5 * 512),
        "reduce-scatter": (1, 128),
    }


def test_collectives_of_a_compiled_loop():
    mesh = make_mesh()

    def f(x):
        def body(_, total):
            return total + jax.lax.psum(x * total, "data")

        return jax.lax.fori_loop(0, 3, body, x)

    f = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    x = jax.ShapeDtypeStruct((16, 10), np.float32, sharding=NamedSharding(mesh, P("data")))
    assert collectives(jax.jit(f).lower(x).compile().as_text()) == {"all-reduce": (3, 3 * 2 * 10 * 4)}


@pytest.mark.parametrize("size, rows, by_xla", [("gpt2", 64, 26_176), ("gpt2", 12, 5_515), ("gpt2-xl", 16, 43_496)])
def test_the_memory_of_a_step_is_close_to_what_xla_says(size, rows, by_xla):
    """by_xla: MiB, from jax 0.11.2's memory analysis of the same step compiled for one H200; 12 with micro-steps."""
    layers, heads, width = GPT2_SIZES[size]
    config = default_config()
    config.update(batch_size=rows, gradient_accumulation_steps=10 if rows == 12 else 1, dtype="bfloat16", bias=False)
    config.update(n_layer=layers, n_head=heads, n_embd=width)
    n_params = 12 * layers * width**2 + (50304 + 1024) * width
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    assert step_bytes(resolve(config, mesh, 50257), mesh, n_params) / 2**20 == pytest.approx(by_xla, rel=0.1)


def test_bytes_per_device():
    mesh = make_mesh(2, 2, 2)
    tree = {
        "whole": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=NamedSharding(mesh, P())),
        "split": jax.ShapeDtypeStruct((8, 8), np.float16, sharding=NamedSharding(mesh, P("fsdp", "tensor"))),
    }
    assert bytes_per_device(tree) == 8 * 8 * 4 + 8 * 8 * 2 // 4


def test_a_mesh_larger_than_the_machine(tiny_config, tmp_path):
    """In a process of its own, as devices are described before JAX finds any."""
    preset = tmp_path / "tiny.py"
    values = tiny_config(
        mesh_data=8, mesh_fsdp=4, mesh_tensor=2, gradient_accumulation_steps=64, dtype="auto"
    ).to_dict()
    preset.write_text(
        "from jaxgpt.config import default_config\n\n\ndef get_config():\n    c = default_config()\n"
        f"    c.update(**{values!r})\n    return c\n"
    )
    command = [
        sys.executable,
        "-m",
        "jaxgpt.train",
        "--config",
        preset,
        "--dry_run",
        f"--config.out_dir={tmp_path / 'o'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    first, mesh, memory, *sent = done.stdout.splitlines()
    assert re.fullmatch(r"[\d,]+ parameters, 1,024 tokens per step: 2 micro-steps of 32 sequences of 16", first)
    assert "data=8 × fsdp=4 × tensor=2 on 64 × described cpu, bfloat16" in mesh
    assert re.match(r"memory per device: [\d.]+ GiB: state [\d.]+, step [\d.]+ \(estimated", memory)
    assert [line.split(" per step: ")[0] for line in sent] == ["all-gather", "all-reduce", "reduce-scatter"]
    assert not (tmp_path / "o").exists()


def test_every_problem_at_once(tiny_config, tmp_path, capsys):
    config = tiny_config(
        mesh_fsdp=8, n_embd=20, n_head=3, gradient_accumulation_steps=9, data_dir=str(tmp_path / "none")
    )

    def check():
        raise UserError("the caller's own check")

    assert dry_run(config, 0, (check,)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for problem in (
        "the caller's own check",
        "gradient_accumulation_steps=9 is not divisible by the 8 devices",
        "none/train.bin does not exist",
        "n_embd=20 is not divisible by n_head=3",
    ):
        assert len(re.findall(f"^error: .*{re.escape(problem)}", err, re.MULTILINE)) == 1, problem
    assert err.count("\n") == 4


def test_it_needs_no_corpus(tiny_config, tmp_path, monkeypatch, capsys):
    """Its tokens may be made later; a data_dir that the user names should be there (above)."""
    monkeypatch.chdir(tmp_path)
    assert dry_run(tiny_config(dataset="later", data_dir=""), 0) == 0
    out, err = capsys.readouterr()
    assert out.endswith("data/later holds no tokens yet: a vocabulary of 50,257 is assumed\n") and err == ""


def test_sizes_that_do_not_divide(tiny_config, capsys):
    assert dry_run(tiny_config(mesh_fsdp=8, n_embd=12, n_head=2), 0) == 2
    assert "kernel of shape (12, 3, 12) cannot be split: 12 / mesh_fsdp=8 leaves 4" in capsys.readouterr().err
    assert dry_run(tiny_config(mesh_fsdp=3), 0) == 2
    assert "do not multiply to the 8 devices found" in capsys.readouterr().err


def test_the_tables_of_the_plan_are_those_of_its_script():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "plan"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (ROOT / "docs" / "scaling.md").read_text()
