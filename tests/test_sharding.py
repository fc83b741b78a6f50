"""Any mesh gives the same training; and each sends, and holds, only what its layout should."""

import functools
import math
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import UserError, sharding
from jaxgpt.config import GPT2_SIZES, default_config, resolve
from jaxgpt.models import Role, abstract_params, role_of, roles
from jaxgpt.models.gpt2 import GPTConfig
from jaxgpt.ops.cross_entropy import sampled_cross_entropy
from jaxgpt.ops.paths import watch
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.sharding import (
    AXES,
    BATCH_AXES,
    check_heads,
    data_shards,
    device_map,
    make_mesh,
    param_specs,
    partition_spec,
    path_name,
    split_heads,
    with_whole_params,
)
from jaxgpt.step import abstract_state, create_state, make_eval_step, make_train_step
from jaxgpt.tools.dryrun import collectives
from jaxgpt.tools.memory import bytes_per_device

VOCAB, STEPS, ROWS = 300, 10, 16
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)]


def mesh_of(*sizes):
    return make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


class Run:
    """The compiled step of a mesh, with its text; every step's ROWS rows are the same on all meshes."""

    def __init__(self, config, sizes):
        self.config, self.mesh = config, mesh_of(*sizes)
        self.parts = resolve(config, self.mesh, VOCAB)
        self.abstract = abstract_state(self.parts, self.mesh)
        self.sharding = NamedSharding(self.mesh, P(None, None, BATCH_AXES, None))
        step = make_train_step(self.parts, self.mesh)
        self.step = step.lower(
            self.abstract, jax.ShapeDtypeStruct(self.shape, np.uint16, sharding=self.sharding)
        ).compile()
        self.collectives = collectives(self.step.as_text())

    @property
    def shape(self):
        rows = self.config.batch_size * data_shards(self.mesh)
        return 1, ROWS // rows, rows, self.config.block_size + 1

    def tokens(self, step):
        tokens = np.random.default_rng(step).integers(10, size=self.shape, dtype=np.uint16)
        return jax.device_put(tokens, self.sharding)

    def go_on(self, state, steps):
        """The state after these steps, and their losses."""
        losses = []
        for step in steps:
            state, metrics = self.step(state, self.tokens(step))
            losses.append(float(metrics["loss"][0]))
        return state, losses

    @functools.cached_property
    def trained(self):
        return self.go_on(create_state(self.parts, self.mesh), range(STEPS))

    def matrix_bytes(self):
        """Of the parameters that fsdp splits, on one device of tensor."""
        return sum(x.size * 4 for x in jax.tree.leaves(self.abstract.params) if x.ndim > 1) // self.mesh.shape["tensor"]


@pytest.fixture(scope="module")
def run(tiny_config):
    """run(data, fsdp, tensor): two micro-steps a step on 8 shards of the batch."""
    config = tiny_config(n_head=4, n_embd=32, gradient_accumulation_steps=ROWS, bias=False)
    return functools.cache(lambda *sizes: Run(config, sizes))


@pytest.mark.parametrize("sizes", MESHES)
def test_losses_and_parameters_do_not_depend_on_the_mesh(run, sizes):
    alone, here = run(1, 1, 1).trained, run(*sizes).trained
    np.testing.assert_allclose(here[1], alone[1], rtol=0, atol=1e-5)
    assert here[1][-1] < here[1][0] - 0.1, "nothing was learned"
    for a, b in zip(jax.tree.leaves(here[0].params), jax.tree.leaves(alone[0].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)  # Adam magnifies rounding where gradients are near 0


@pytest.mark.parametrize("bias", [False, True])
def test_kernels_run_on_each_devices_rows_over_tensor(run, tiny_config, bias):
    """Interpreted here. The norms outside the blocks are the compiler's to split, and so plain."""
    alone, losses = run(1, 1, 1), {}
    for kernels, sizes in (("off", (1, 1, 1)), ("on", (1, 1, 2))):
        config = tiny_config(n_head=4, n_embd=32, batch_size=2, gradient_accumulation_steps=8, bias=bias)
        config.kernels = kernels
        with watch() as paths:
            here = Run(config, sizes)
        losses[kernels] = here.go_on(create_state(here.parts, here.mesh), range(3))[1]
        assert (paths["loss"], paths["norm"]) == (
            ({"kernel"}, {"kernel", "plain"}) if kernels == "on" else ({"plain"},) * 2
        )
    np.testing.assert_allclose(losses["on"], losses["off"], rtol=0, atol=1e-5)
    assert bias or losses["off"] == pytest.approx(alone.trained[1][:3], abs=1e-5)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_evaluation_does_not_depend_on_the_mesh(run, sizes):
    tokens = np.random.default_rng(0).integers(VOCAB, size=(1, 3, 8, 17), dtype=np.uint16)
    losses = [
        make_eval_step(here.parts.model, here.mesh)(here.trained[0].params, jax.device_put(tokens, here.sharding))
        for here in (run(1, 1, 1), run(*sizes))
    ]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


# --- what is sent, read off the compiled program ---


def test_data_parallel_reduces_gradients_once_a_step(run):
    """However many micro-steps: the bytes reduced are those of one float32 gradient and the loss."""
    here = run(8, 1, 1)
    assert here.shape[1] == 2
    n_params = sum(x.size for x in jax.tree.leaves(here.abstract.params))
    assert set(here.collectives) == {"all-reduce"}
    assert here.collectives["all-reduce"][1] == 4 * (n_params + 1)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_module_gets_what_its_roles_say(parts):
    """Matrices in the computation's dtype, and what stays in float32 in that, to the bit, however it travels."""
    kinds = {"matrix": "matrix", "wide": "matrix", "table": "embedding", "exact": "embedding", "gain": "vector"}
    by_role = {name: Role(name, group, float32=name in ("wide", "exact")) for name, group in kinds.items()}
    params = {name: jax.random.normal(jax.random.key(i), (4, 3)) for i, name in enumerate(kinds)}
    mesh = make_mesh(1, parts, 1, devices=jax.devices()[:parts])
    given = with_whole_params(lambda params, rows: params, by_role, mesh, "bfloat16", P(BATCH_AXES), P())
    found = jax.jit(given)(params, jnp.zeros(2))
    assert [name for name, x in found.items() if x.dtype == "bfloat16"] == ["matrix"]
    assert {x.dtype.name for name, x in found.items() if name != "matrix"} == {"float32"}
    same = [name for name in kinds if np.array_equal(found[name].astype("float32"), params[name])]
    assert same == (["wide", "table", "exact", "gain"] if parts == 1 else ["wide", "exact", "gain"])


def test_what_cannot_be_split_is_said():
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    with pytest.raises(
        UserError, match=r"gain of shape \(\) has no dimension for mesh_fsdp to split; give it the group"
    ):
        partition_spec("gain", (), Role("gain", "matrix"), mesh)


def test_fsdp_gathers_parameters_and_scatters_gradients_once_a_step(run):
    here = run(1, 8, 1)
    matrices = here.matrix_bytes()
    assert here.shape[1] == 2
    assert set(here.collectives) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert here.collectives["all-gather"][1] == here.collectives["reduce-scatter"][1] == matrices
    assert here.collectives["all-reduce"][1] < 0.05 * matrices  # vectors and scalars


def tensor_bytes(here):
    """Scattered over tensor: each branch's sums once forward and once back, and the gradient of the vocabulary."""
    _, micro_steps, rows, _ = here.shape
    c = here.parts.model
    tokens = rows // data_shards(here.mesh) * c.block_size
    return 4 * micro_steps * (4 * c.n_layer * tokens * c.n_embd + c.padded_vocab_size * c.n_embd)


@pytest.mark.parametrize("sizes", [(1, 1, 4), (2, 2, 2)])
def test_tensor_gathers_and_scatters_each_branch_once_each_way(run, sizes):
    """A full rematerialization would show as an all-to-all, a permutation, or more gathered. Gathered besides: the
    gradient of the embedded tokens, and their numbers."""
    here = run(*sizes)
    params = 0
    if sizes[1] > 1:  # as with fsdp alone; tensor does not split the positions
        params = here.matrix_bytes() + here.abstract.params["wpe"]["embedding"].size * 4 // 2
    assert set(here.collectives) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert here.collectives["reduce-scatter"][1] == params + tensor_bytes(here)
    assert here.collectives["all-gather"][1] < params + 1.2 * tensor_bytes(here)


@pytest.fixture(scope="module")
def table():
    """A table of 300 rows of 32 features, and 24 numbers of rows for each of 8 devices."""
    random = np.random.default_rng(0)
    return jnp.asarray(random.normal(size=(300, 32)), jnp.float32), jnp.asarray(random.integers(300, size=8 * 24))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1)])
@pytest.mark.parametrize("use", ["rows", "whole", "sampled", "sampled_fp8"])
def test_a_part_of_the_features_gives_what_the_whole_table_does(table, sizes, use):
    """Values, and gradients summed over the devices, which get other rows each."""
    mesh, (w, ids) = mesh_of(*sizes), table
    x = jnp.sin(jnp.arange(8 * 24 * 32.0)).reshape(-1, 32)

    def loss(w, ids, x):
        if use == "rows":
            return jnp.sum(sharding.rows([w], ids, 32, "float32")[0] * x)
        if use == "whole":
            return jnp.sum((x @ sharding.whole(w, 32, "float32").T) ** 2)
        options = {"vocab_size": 300, "sample": 128, "seed": jnp.uint32(7), "in_fp8": use == "sampled_fp8"}
        return sampled_cross_entropy(x, w, ids, **options)

    def local(w, ids, x):
        value, gradient = jax.value_and_grad(loss)(w, ids, x)
        over = BATCH_AXES if whole else "data"  # over fsdp the parts' have been added up on their way
        return jax.lax.psum(value, BATCH_AXES), jax.lax.psum(gradient, over)

    found = {}
    for whole in (True, False):
        spec = P() if whole else P(None, "fsdp")
        f = device_map(local, mesh, (spec, P(BATCH_AXES), P(BATCH_AXES)), (P(), spec))
        found[whole] = jax.jit(f)(w, ids, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found[True], found[False])
    assert np.any(found[True][1])


def test_tables_of_the_modern_model_stay_where_they_lie(tiny_config):
    """Rows are exchanged: what is gathered over fsdp is the matrices and the tokens' numbers, and rows' gradients never
    are reduced as a table."""
    config = tiny_config(model="modern", n_layer=2, value_embeds=1, n_embd=32, sampled_softmax=128)
    config.gradient_accumulation_steps = ROWS
    here = Run(config, (1, 8, 1))
    tables = sum(
        4 * x.size for path, x in jax.tree.leaves_with_path(here.abstract.params) if "embedding" in path_name(path)
    )
    assert here.shape[1] == 2
    matrices = here.matrix_bytes() - tables
    assert tables > matrices
    assert here.collectives["all-to-all"][0] and here.collectives["reduce-scatter"][1] == matrices
    assert matrices < here.collectives["all-gather"][1] < 1.1 * matrices
    losses = here.trained[1]
    assert losses[-1] < losses[0] - 0.1, "nothing was learned"


def test_one_device_sends_nothing(run):
    assert run(1, 1, 1).collectives == {}


# --- what is held ---


def test_fsdp_holds_an_eighth():
    config = default_config()
    sizes = {}
    for fsdp in (1, 8):
        mesh = mesh_of(8 // fsdp, fsdp, 1)
        sizes[fsdp] = bytes_per_device(abstract_state(resolve(config, mesh, 50257), mesh))
    assert sizes[8] * 8 == pytest.approx(sizes[1], rel=0.05)


def test_a_state_lies_where_its_shardings_say(run):
    state, _ = run(2, 2, 2).trained
    expected = run(2, 2, 2).abstract
    for x, described in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert x.sharding.is_equivalent_to(described.sharding, x.ndim)
    mu = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        moments = [m for name, m in mu.items() if name.endswith(path_name(path))]
        assert len(moments) == 2 and all(m.sharding.is_equivalent_to(x.sharding, x.ndim) for m in moments)


@given(
    st.sampled_from(sorted(GPT2_SIZES)),
    st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16, 64]),
    st.sampled_from([1, 2, 3, 4, 5, 8]),
)
def test_every_array_is_split_evenly_or_refused_with_the_arithmetic(size, fsdp, tensor):
    layers, heads, width = GPT2_SIZES[size]
    config = GPTConfig(n_layer=1, n_head=heads, n_embd=width, bias=True)
    params = abstract_params(config)
    mesh = AbstractMesh((1, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)
    try:
        check_heads(heads, mesh)
        specs = param_specs(params, roles(config, params), mesh)
    except UserError as error:
        assert "left over" in str(error) or "leaves" in str(error)
        return
    for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True):
        local = NamedSharding(mesh, spec).shard_shape(x.shape)
        split = x.size // math.prod(local)
        assert split * math.prod(local) == x.size
        role = role_of(config, path_name(path))
        if role.group != "vector":
            assert split % fsdp == 0, f"{path_name(path)} is whole on every device of fsdp"
        assert (split % tensor == 0) or not partition_spec(path_name(path), x.shape, role, mesh).count("tensor")
    assert heads % tensor == 0


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, 1, 1), "do not multiply to the 8 devices found"),
        ((-1, 3, 1), "mesh_fsdp=3, mesh_tensor=1 do not multiply to the 8 devices"),
        ((-1, -1, 1), "only one size may be -1"),
        ((16, 1, 1), "mesh_data=16"),
    ],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(*sizes)


def test_minus_one_takes_what_is_left():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert data_shards(make_mesh(2, 2, 2)) == 4


def test_uneven_sizes_name_the_array_and_what_would_do(tiny_config):
    with pytest.raises(
        UserError, match=r"c_attn/kernel of shape \(12, 3, 12\) cannot be split: 12 / mesh_fsdp=8 leaves 4"
    ):
        abstract_state(resolve(tiny_config(n_embd=12), make_mesh(1, 8, 1), VOCAB), make_mesh(1, 8, 1))
    with pytest.raises(
        UserError, match="n_head=6 heads cannot be split over mesh_tensor=4.*choose mesh_tensor of 1, 2, 3, 6"
    ):
        resolve(tiny_config(n_head=6, n_embd=12), make_mesh(2, 1, 4), VOCAB)


def test_split_heads_runs_each_head_where_it_lies():
    mesh = make_mesh(2, 1, 4)
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 8, 4)).astype(np.float32)

    def local_heads(q, k, v):
        assert q.shape == (1, 5, 2, 4)
        return q * k + v

    f = device_map(lambda *args: split_heads(local_heads)(*args), mesh, (P(BATCH_AXES),) * 3, P(BATCH_AXES))
    np.testing.assert_allclose(jax.jit(f)(q, k, v), q * k + v, rtol=1e-5, atol=1e-6)
    whole = jax.jit(split_heads(lambda q, k, v: q * k + v))  # no mesh around it
    np.testing.assert_allclose(whole(q, k, v), q * k + v, rtol=1e-5, atol=1e-6)


# --- one checkpoint, any mesh ---


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1)])
def test_a_checkpoint_goes_on_on_another_mesh(run, sizes, tmp_path):
    saved, here = run(8, 1, 1), run(*sizes)
    state, _ = saved.go_on(create_state(saved.parts, saved.mesh), range(3))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {})
    assert checkpoints.wait()
    restored, _, step = Checkpoints(tmp_path).restore(here.abstract)
    assert step == 3
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding.mesh.size == math.prod(sizes)
    _, there = here.go_on(restored, range(3, 6))
    _, expected = saved.go_on(jax.tree.map(jnp.copy, state), range(3, 6))
    np.testing.assert_allclose(there, expected, rtol=0, atol=1e-5)


def test_specs_follow_roles():
    mesh = make_mesh(2, 2, 2)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
    params = abstract_params(config)
    specs = param_specs(params, roles(config, params), mesh)
    assert specs["h"][0]["mlp"]["c_proj"]["kernel"] == P("tensor", "fsdp")
    assert specs["wte"]["embedding"] == P("tensor", "fsdp")
    specs = param_specs(params, roles(config, params), make_mesh(1, 8, 1))
    assert specs["wte"]["embedding"] == P("fsdp", None) and specs["h"][0]["ln_1"]["scale"] == P(None)


def test_a_step_on_the_cpu_does_not_fault_its_pages_in_again():
    """The fewest page faults of four calls of a program with 64 MB in between, with keep_freed_memory and without."""
    code = """
import resource, jax, jax.numpy as jnp
from jaxgpt.sharding import keep_freed_memory
{first}

@jax.jit
def f(x):
    return jax.lax.optimization_barrier(x[:, None] * x[None]) @ x

x, counts = jnp.ones(4096), []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4): f(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts))
"""

    def faults(first: str) -> int:
        command = [sys.executable, "-c", code.format(first=first)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    assert faults("keep_freed_memory()") < faults("") / 4


def test_without_a_home_folder_programs_are_cached_in_the_temporary_one(monkeypatch):
    """In a container a user may have no HOME and no line in the system's list."""

    def nobody(uid):
        raise KeyError(uid)

    kept = {}
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(sharding, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(jax.config, "update", kept.__setitem__)
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    sharding.configure_jax()
    assert kept["jax_compilation_cache_dir"].startswith(tempfile.gettempdir())
