"""What a dry run counts and says: collectives of a compiled program, memory, all problems at once."""

import dataclasses
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import UserError
from jaxgpt.config import GPT2_SIZES, default_config, resolve
from jaxgpt.metrics import memory_gib, peak_bytes, peak_flops
from jaxgpt.sharding import make_mesh
from jaxgpt.tools import slices
from jaxgpt.tools.dryrun import async_pairs, collectives, dry_run, loops_factor, memory_bytes
from jaxgpt.tools.estimate import step_bytes
from jaxgpt.tools.memory import bytes_per_device

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


@pytest.mark.parametrize(
    "dtype, matmul_dtype, times", [("bfloat16", "auto", 1), ("bfloat16", "fp8", 0), ("float32", "auto", 0)]
)
def test_the_estimate_counts_what_a_state_carries_over_fsdp(tiny_config, dtype, matmul_dtype, times):
    """A device's half of the rounded parameters, beside the whole ones that it has fetched."""
    found, n = [], 10**6
    for fsdp in (1, 2):
        mesh = make_mesh(1, fsdp, 1, devices=jax.devices()[:fsdp])
        parts = resolve(tiny_config(dtype=dtype, gradient_accumulation_steps=fsdp), mesh, 27)
        devices = dataclasses.replace(parts.devices, matmul_dtype=matmul_dtype)
        found.append(step_bytes(parts._replace(devices=devices), mesh, n))
    assert found[1] - found[0] == times * 2 * n / 2


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [("v5e:4x4", "TPU v5 lite", 16), ("2*v5p:4x4x4", "TPU v5", 128), ("V6E:8x8", "TPU v6 lite", 64)]
    + [("h100:8", "NVIDIA H100", 8), ("a100-40gb", "NVIDIA A100-SXM4-40GB", 1), ("v4:2x2x1", "TPU v4", 4)],
)
def test_devices_by_name(text, kind, count):
    name = slices.parse(text)
    assert (name.device_kind, name.count) == (kind, count)
    assert all(table(name) for table in (peak_flops, peak_bytes, memory_gib))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:4x5", "there is no v5e slice of 4x5; the nearest is v5e:4x4"),
        ("v5p:4x4x5", "there is no v5p slice of 4x4x5; the nearest is v5p:4x4x4"),
        ("v6e", "there is no v6e slice of no shape; the nearest is v6e:1x1"),
        ("v5:4x4", "'v5' is no kind of device that is known; did you mean v5p"),
        ("h100:eight", "'h100:eight' names no devices; write v5e:4x4, or h100:8"),
        ("h100:2x2", "is no number of GPUs; write h100:8 for eight"),
        ("potato", "'potato' is no kind of device that is known; there are v4, v5e"),
    ],
)
def test_names_of_no_devices(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        slices.parse(text)


@pytest.mark.parametrize("count", [-1, 2**17 + 1, 10**400])
def test_a_number_that_is_none_of_devices(tiny_config, count):
    with pytest.raises(UserError, match="is no number of devices, 1 to 131,072"):
        dry_run(tiny_config(), count)


def test_every_kind_has_its_figures():
    for kind in (slices.TPUS | slices.GPUS).values():
        device = SimpleNamespace(device_kind=kind)
        assert all(table(device) for table in (peak_flops, peak_bytes, memory_gib)), kind


def test_without_libtpu_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(slices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"takes libtpu.*pip install 'jax\[tpu\]'"):
        slices.describe_tpus(slices.parse("v5e:4x4"))


def meshes(code: str) -> str:
    """What this code about described slices prints, in a process of its own, as libtpu is loaded; where it is there."""
    pytest.importorskip("libtpu")
    code = f"from jaxgpt.tools import slices; from jaxgpt.sharding import make_mesh\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_is_over_slices():
    code = (
        "mesh = make_mesh(-1, 4, 1, devices=slices.describe_tpus(slices.parse('2*v5e:2x4')))\n"
        "print(dict(mesh.shape), [{x.slice_index for x in row.flat} for row in mesh.devices])"
    )
    assert meshes(code) == "{'data': 4, 'fsdp': 4, 'tensor': 1} [{0}, {0}, {1}, {1}]\n"


def test_meshes_of_described_slices():
    """Of each kind; also sizes that divide no side of the slice: 8 of 4 × 4 × 4."""
    code = (
        "for name in 'v4:2x2x4', 'v5e:4x4', 'v5p:4x4x4', 'v6e:8x8':\n"
        "    print(make_mesh(-1, 8, 1, devices=slices.describe_tpus(slices.parse(name))).devices.shape)"
    )
    assert meshes(code) == "(2, 8, 1)\n(2, 8, 1)\n(8, 8, 1)\n(8, 8, 1)\n"


def test_gpus_by_name(tiny_config, capsys):
    assert dry_run(tiny_config(), "h100:8") == 0
    out, err = capsys.readouterr()
    assert re.search(r"memory per device: [\d.]+ GiB of 75.6 \(fits\): state", out) and err == ""
    assert "ms at 989 TFLOP/s; its memory traffic is not known, for lack of that device's compiler" in out


def test_what_does_not_fit_a_named_gpu(tiny_config, capsys):
    """Status 2 and settings that would; with batch_size=auto, the largest that fits."""
    given = {"block_size": 1024, "n_layer": 4, "batch_size": 8192, "gradient_accumulation_steps": 8}
    given |= {"data_dir": "", "dataset": "later", "dtype": "auto"}
    assert dry_run(tiny_config(**given), "t4") == 2
    out, err = capsys.readouterr()
    assert " GiB of 14.2 (does not fit): state" in out and "float16" in out
    fits = re.fullmatch(
        r"error: out of memory: .* and a device has 14.2; as many tokens fit with batch_size=(\d+) .*\n", err
    )
    assert fits and 8192 % int(fits[1]) == 0, err
    assert dry_run(tiny_config(**given, auto_batch_size=True), "t4") == 0
    out, err = capsys.readouterr()
    assert f"batch_size=auto is {fits[1]}, " in out and " of 14.2 (fits)" in out and err == ""


@pytest.mark.parametrize("card, has", [("a100", False), ("l4", True), ("h100", True)])
def test_fp8_on_a_named_gpu(tiny_config, capsys, card, has):
    assert dry_run(tiny_config(matmul_dtype="fp8", dtype="auto", n_embd=64, block_size=64), card) == (0 if has else 2)
    assert ("matmul_dtype=fp8 needs NVIDIA GPUs of compute capability 8.9" in capsys.readouterr().err) != has


def test_auto_of_many_problems(tiny_config, capsys):
    config = tiny_config(batch_size=3, gradient_accumulation_steps=5, auto_batch_size=True, mesh_data=8, n_head=3)
    assert dry_run(config, 0) == 2
    out, err = capsys.readouterr()
    assert "batch_size=auto keeps the 15 sequences" in err and "n_embd=16 is not divisible" in err
    assert out == "" and err.count("\n") == 2


def test_a_loop_counts_as_often_as_it_runs():
    """Of HLO's weights the loop's body has 5 times 800 bytes in place of once."""
    body = (128 + 128) + (128 + 128 + 512) + (128 + 512 + 512)
    rest = (64 + 128 + 64 + 128) + (32 + 128)
    assert loops_factor(HLO) == pytest.approx((5 * body + rest) / (body + rest))


def test_a_loop_whose_condition_alone_has_its_bound():
    """As TPUs' compiler writes it."""
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    condition = (
        "%c (q: (s32[], f32[4,8])) -> pred[] {\n  %n = s32[]{:T(128)} constant(5)\n  %i = s32[] get-tuple-element(%q)\n"
    )
    condition += "  ROOT %lt = pred[] compare(%i, %n), direction=LT\n}\n\n"
    assert known in HLO
    hlo = HLO.replace(known, "").replace("ENTRY", condition + "ENTRY")
    assert collectives(hlo) == collectives(HLO) and loops_factor(hlo) == loops_factor(HLO)
    assert collectives(hlo.replace("constant(5)", "parameter(0)"))["all-gather"] == (1, 512)


def test_asynchronous_collectives_are_counted():
    assert async_pairs(HLO) == 1


# Of what TPUs' compiler makes of GPT-2 XL over fsdp=8: one gather beside two products, one scatter with its padding
TPU_HLO = """
%started (p: bf16[200,1600]) -> (bf16[200,1600], bf16[1600,1600]) {
  %p = bf16[200,1600]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1600,1600]{1,0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[200,1600], bf16[1600,1600]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q: bf16[200,1600]) -> bf16[1600,1600] {
  %q = bf16[200,1600]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[1600,1600]{1,0} all-gather(%q), dimensions={0}, frontend_attributes={chain_id="0"}
}

%done (r: bf16[200,1600]) -> bf16[1600,1600] {
  %r = bf16[200,1600]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.3 = bf16[1600,1600]{1,0} all-gather(%r), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %d = bf16[1600,1600]{1,0} custom-call(%r, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (s: f32[1600,1600]) -> f32[224,1600] {
  %s = f32[1600,1600]{1,0} parameter(0)
  %pad = f32[1792,1600]{1,0} pad(%s, %zero), padding=0_192x0_0
  %all-reduce.1 = f32[1792,1600]{1,0} all-reduce(%pad), to_apply=%add
  ROOT %part = f32[224,1600]{1,0} dynamic-slice(%all-reduce.1, %i, %zero), dynamic_slice_sizes={224,1600}
}

ENTRY %main (x: bf16[200,1600], g: f32[1600,1600]) -> f32[224,1600] {
  %x = bf16[200,1600]{1,0} parameter(0)
  %g = f32[1600,1600]{1,0} parameter(1)
  %f = (bf16[200,1600]{1,0}, bf16[1600,1600]{1,0}) fusion(%x), kind=kCustom, calls=%started
  %h = bf16[1600,1600]{1,0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1
  %e = bf16[1600,1600]{1,0} fusion(%x), kind=kCustom, calls=%done
  ROOT %o = f32[224,1600]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_collectives_as_a_tpu_compiler_writes_them():
    assert collectives(TPU_HLO) == {"all-gather": (1, 2 * 1600 * 1600), "reduce-scatter": (1, 4 * 1792 * 1600)}
    assert async_pairs(TPU_HLO) == 1


def test_arrays_in_a_tpu_core_are_not_in_its_memory():
    """A slice is fetched, used in the core, and one result in memory written."""
    hlo = """
ENTRY %main (x: f32[64,128]) -> f32[8,128] {
  %x = f32[64,128]{1,0:T(8,128)} parameter(0)
  %s = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:8], [0:128]}
  %d = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s)
  %f = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%d), kind=kLoop, calls=%cast
  ROOT %r = f32[8,128]{1,0:T(8,128)} fusion(%d, %f), kind=kLoop, calls=%sum
}
"""
    assert memory_bytes(hlo) == pytest.approx(2 * 4 * 8 * 128, abs=8)  # and a flag of the fetch
    assert memory_bytes(HLO) == 5 * (256 + 128 + 512) + 2 * (64 + 128) + (32 + 128)  # loops as they run


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


def test_figures_are_those_of_a_sound_config_alone(tiny_config, capsys):
    def check():
        raise UserError("another mistake")

    assert dry_run(tiny_config(), 0, (check,)) == 2
    assert capsys.readouterr() == ("", "error: another mistake\n")


def test_what_a_dry_run_says_of_ones_own_file(tiny_config, tmp_path, capsys):
    """A mistake that shows while the step is traced, where loss and logits differ, and a run that ends too soon."""
    source = (ROOT / "jaxgpt" / "models" / "gpt2.py").read_text()
    cases = {
        "wrong.py": ("        return x, y, cache\n\n\nclass MLP", "        return x, y\n\n\nclass MLP", 2),
        "capped.py": ("targets.reshape(-1), vocab_size", "targets.reshape(-1), softcap=9.0, vocab_size", 0),
    }
    for name, (old, new, status) in cases.items():
        assert source.count(old) == 1
        (tmp_path / name).write_text(source.replace(old, new))
        values = {key: value for key, value in tiny_config(max_iters=4).items() if key != "model"}
        config = default_config(str(tmp_path / name))
        config.update(values)
        assert dry_run(config, 0) == status
        out, err = capsys.readouterr()
        if status:
            assert re.fullmatch(r"error: model=.*wrong\.py: line \d+: ValueError: not enough values to unpack.*\n", err)
        else:
            assert "capped.py: `loss` gives" in out and "max_iters=4 ends this run at a learning rate of" in out


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


def test_the_table_of_one_card_is_that_of_its_script():
    script = runpy.run_path(str(ROOT / "scripts" / "plan_card"))
    table = script["table"](script["read"](script["FILE"]))
    assert table.count("\n") == len(script["JOBS"]) + 1 and table in (ROOT / "docs" / "plan.md").read_text()


def test_the_tables_of_the_plan_are_those_of_its_script():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "plan"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (ROOT / "docs" / "scaling.md").read_text()
