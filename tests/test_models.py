"""Models as files: the protocol, its smallest example, and a stranger's model through everything that a run does."""

import ast
import dataclasses
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import extended, fresh_params, logits_of
from flax import nnx

import jaxgpt.models
from jaxgpt import UserError, bench, convert, evaluate, sample, train
from jaxgpt.config import all_keys, default_config, read_config, resolve, with_model
from jaxgpt.models import (
    ModelConfig,
    Role,
    abstract_params,
    bind,
    cast_params,
    count_params,
    find_model,
    init_params,
    path_name,
    pure,
    role_of,
    roles,
    traced_once,
)
from jaxgpt.ops.paths import watch
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.sharding import BATCH_AXES, data_shards, make_mesh
from jaxgpt.step import abstract_state, create_state, make_train_step

STRANGER = str(Path(__file__).parent / "models" / "stranger.py")
MODELS = [*jaxgpt.models.BUILT_IN, STRANGER]
VOCAB = 27


def tiny(name: str, **values) -> ModelConfig:
    sizes = dict(block_size=16, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16)
    sizes |= dict(value_embeds=1) if name == "modern" else {}
    return find_model(name).config(**{**sizes, **values})


# --- the table of roles ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bias", [False, True])
def test_each_parameter_matches_one_row_and_each_row_a_parameter(name, bias):
    try:
        config = tiny(name, bias=bias)
    except UserError as error:  # a model without biases
        assert bias and "bias" in str(error)
        return
    params = abstract_params(config)
    used = {role_of(config, path_name(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert {role.pattern for role in config.ROLES if not role.pattern.endswith("bias")} <= {r.pattern for r in used}
    assert all(
        role.group == "vector" or x.ndim > 1
        for role, x in zip(*map(jax.tree.leaves, (roles(config, params), params)), strict=True)
    )


def test_rows_that_overlap_or_lack_are_said():
    config = dataclasses.replace(tiny(STRANGER))
    with pytest.raises(UserError, match="parameter h/0/attn/new/kernel matches none of the rows of ROLES"):
        role_of(config, "h/0/attn/new/kernel")

    class Twice(type(config)):
        ROLES = (*type(config).ROLES, Role("norm/*", "vector"))

    jaxgpt.models._FILES[Twice] = config.file
    with pytest.raises(UserError, match=r"parameter norm/scale matches norm/scale, norm/\* of the rows"):
        role_of(Twice(**dataclasses.asdict(config)), "norm/scale")


@pytest.mark.parametrize("name", MODELS)
def test_the_module_has_the_parameters_that_init_makes(name):
    """`build` and `init`, which may compile less for the same numbers."""
    config, key = tiny(name), jax.random.key(5)
    built, made = pure(config.build(nnx.Rngs(key))), jax.jit(lambda: init_params(config, key))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), built, made)


def test_an_init_without_what_build_makes_is_said():
    config = tiny(STRANGER)
    params = jax.tree.map(jnp.zeros_like, abstract_params(config))
    del params["norm"]
    with pytest.raises(UserError, match=r"stranger\.py: init makes no norm/scale, which build does; make it there"):
        bind(config, params)


@pytest.mark.parametrize("name", MODELS)
def test_casts_follow_roles(name):
    config = tiny(name)
    params = abstract_params(config)
    for role, x in zip(
        *map(jax.tree.leaves, (roles(config, params), cast_params(config, params, "bfloat16"))), strict=True
    ):
        assert x.dtype == ("float32" if role.float32 else "bfloat16")


def test_gpt2_counts_and_flops_are_nanogpts():
    config = find_model("gpt2").config(bias=True, vocab_size=50257)
    params = abstract_params(config)
    padding = (config.padded_vocab_size - 50257) * 768
    assert count_params(config, params, all=True) - padding == 124_439_808  # OpenAI's 124M
    assert count_params(config, params) == count_params(config, params, all=True) - 1024 * 768
    assert config.flops_per_token(params) == 6 * count_params(config, params) + 12 * 12 * 768 * 1024


# --- layers that are traced once ---


@pytest.mark.parametrize(("name", "kinds"), [("gpt2", 2), ("modern", 3)])
def test_a_block_is_traced_once_a_program_not_once_a_layer(name, kinds, monkeypatch):
    """The first has no branch before it, modern's at both ends have value embeddings: no more kinds than these. And
    each program notes its paths: one that took another's trace would lose those of its blocks."""
    block, calls = sys.modules[find_model(name).config.__module__].Block, []
    whole = block.__call__
    monkeypatch.setattr(block, "__call__", lambda *args, **options: calls.append(1) or whole(*args, **options))
    for remat in ("none", "block"):
        config = tiny(name, n_layer=6, remat=remat)
        params, tokens = abstract_params(config), jax.ShapeDtypeStruct((2, 8), jnp.int32)

        def loss(params, tokens, config=config):
            return bind(config, params).loss(tokens, tokens)

        for f in (loss, jax.grad(loss)):
            calls.clear()
            with watch() as paths:
                jax.jit(f).lower(params, tokens)
            assert len(calls) == kinds
            assert paths == {"attention": {"plain"}, "loss": {"plain"}, "norm": {"plain"}, "products": {"float32"}}


class Times(nnx.Module):
    def __init__(self, by: int):
        self.by = by

    def __call__(self, x):
        return x * self.by


def test_layers_that_differ_have_their_own_traces():
    calls = []

    def layers(x):
        run = traced_once(lambda layer, x: calls.append(1) or layer(x))
        for by in (2, 3, 2, 3):
            x = run(Times(by), x)
        return x

    assert jax.jit(layers)(1.0) == 36 == layers(1.0)
    assert len(calls) == 2 + 4  # nothing is traced by the second


@pytest.mark.parametrize("name", ["by", "new"])
def test_what_a_layer_sets_and_loses_is_said(name):
    def remember(layer, x):
        setattr(layer, name, x)
        return x

    with pytest.raises(UserError, match=f"Times sets {name} in its call, where it is lost; return it"):
        jax.jit(lambda x: traced_once(remember)(Times(2), x))(1.0)
    times = Times(2)
    times.seen = []
    with pytest.raises(UserError, match="Times sets seen in its call"):
        jax.jit(lambda x: traced_once(lambda layer, x: layer.seen.append(x) or x)(times, x))(1.0)


# --- finding a model's file ---


def example() -> str:
    """The smallest complete model, as models/__init__.py shows it."""
    doc = jaxgpt.models.__doc__ or ""
    code = textwrap.dedent("\n".join(line for line in doc.splitlines() if line.startswith("    ") or not line.strip()))
    imports = (
        "import dataclasses\nimport jax.numpy as jnp\nimport optax\nfrom flax import nnx\n"
        "from jaxgpt.keys import key\nfrom jaxgpt.models import ModelConfig, Role, count_params\n"
    )
    return imports + code


BROKEN = {
    "syntax": ("def f(:\n", r"line 1: SyntaxError"),
    "exits": ("import sys\nsys.exit(0)\n", r"line 2: SystemExit: 0"),
    "raises": ("import os\nx = 1 / 0\n", r"line 2: ZeroDivisionError: division by zero"),
    "nothing": ("x = 1\n", "must define one subclass of ModelConfig; it defines none"),
    "no roles": (
        "import dataclasses\nfrom jaxgpt.models import ModelConfig\n@dataclasses.dataclass(frozen=True)\n"
        "class C(ModelConfig): pass\n",
        "C needs @dataclasses.dataclass",
    ),
    "unknown group": (example().replace('"head"', '"tail"'), "ROLES has group 'tail'; choose matrix, embedding"),
    "clash": (
        example().replace("init_std: float", "weight_decay: float"),
        "its key weight_decay is a key of the optimizer already",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_mistake_in_a_model_file_is_one_line(how, tmp_path):
    text, message = BROKEN[how]
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        all_keys(str(tmp_path / "mine.py"))
    assert "\n" not in str(error.value) and "mine.py" in str(error.value)


@pytest.mark.parametrize("name", ["gpt3", "nowhere.py", "jaxgpt", "."])
def test_a_model_that_is_not_there(name):
    with pytest.raises(UserError, match=f"model={re.escape(name)}"):
        find_model(name)


def test_its_keys_are_known_once_the_model_is():
    config = default_config(STRANGER)
    assert config.n_kv_head == 1 and "n_kv_head" not in default_config()
    config.n_kv_head, config.n_layer = 2, 3
    assert with_model(config, "gpt2").n_layer == 3
    assert with_model(with_model(config, "gpt2"), STRANGER).n_kv_head == 1


def test_common_keys_that_a_model_ignores_are_refused():
    with pytest.raises(UserError, match=r"dropout=0.1, but model=.*stranger.py has no dropout"):
        tiny(STRANGER, dropout=0.1)


# --- a stranger's model: as one function ---


@pytest.fixture(scope="module")
def config_of(tiny_config):
    def make(**values):
        config = with_model(tiny_config(), STRANGER)
        config.update({**dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, warmup_iters=0), **values})
        return config

    return make


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)]


def losses_on(config, sizes, rows=16, steps=4):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    per_step = rows // data_shards(mesh)
    config.update(batch_size=1, gradient_accumulation_steps=rows)
    parts = resolve(config, mesh, VOCAB)
    step, state, losses = make_train_step(parts, mesh), create_state(parts, mesh), []
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, BATCH_AXES, None))
    for i in range(steps):
        tokens = np.random.default_rng(i).integers(9, size=(rows, 17), dtype=np.uint16)
        state, metrics = step(state, jax.device_put(tokens.reshape(1, per_step, -1, 17), sharding))
        losses.append(float(metrics["loss"][0]))
    return losses


def test_a_strangers_losses_do_not_depend_on_the_mesh(config_of):
    alone = losses_on(config_of(), (1, 1, 1))
    assert alone[-1] < alone[0] - 0.1, "nothing was learned"
    for sizes in MESHES:
        np.testing.assert_allclose(losses_on(config_of(), sizes), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_strangers_accumulation_is_one_batch(config_of, optimizer):
    values = dict(optimizer=optimizer, learning_rate=1e-2, min_lr=0.0)
    by_sum, by_multisteps = (
        losses_on(config_of(accumulation=how, **values), (2, 1, 1)) for how in ("sum", "multisteps")
    )
    np.testing.assert_allclose(by_sum, by_multisteps, rtol=0, atol=1e-5)


def test_a_strangers_cache_changes_nothing():
    """Logits of a sequence at once, and in parts through the cache."""
    config = tiny(STRANGER)
    params = fresh_params(config, jax.random.key(1))
    tokens = np.random.default_rng(0).integers(VOCAB, size=(3, 12), dtype=np.int32)
    cache, parts = config.empty_cache(3, 16), []
    for lo, hi in ((0, 5), (5, 6), (6, 12)):
        logits, cache = extended(config, params, tokens[:, lo:hi], cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), logits_of(config, params, tokens), atol=2e-5)
    assert int(cache.length) == 12


def test_a_strangers_token_sees_nothing_after_it():
    """Other tokens from the ninth on change no logits before it."""
    config = tiny(STRANGER)
    params = fresh_params(config, jax.random.key(1))
    one = np.random.default_rng(0).integers(VOCAB, size=(1, 12), dtype=np.int32)
    other = np.where(np.arange(12) < 8, one, (one + 1) % VOCAB)
    a, b = (np.asarray(logits_of(config, params, tokens))[0] for tokens in (one, other))
    np.testing.assert_array_equal(a[:8], b[:8])
    assert not np.array_equal(a[8:], b[8:])


# --- a stranger's model: as a run ---


@pytest.fixture(scope="module")
def arguments(token_folder):
    def make(out, *more, model=STRANGER):
        values = dict(model=model, data_dir=token_folder, out_dir=out, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
        values |= dict(
            block_size=16, batch_size=1, gradient_accumulation_steps=8, eval_iters=2, eval_interval=4, log_interval=1
        )
        values |= dict(
            log_interval=1,
            max_iters=8,
            lr_decay_iters=8,
            warmup_iters=2,
            learning_rate=1e-2,
            min_lr=1e-3,
            dtype="float32",
        )
        preset = Path(__file__).parents[1] / "configs" / "gpt2.py"
        return ["--config", str(preset), *(f"--config.{key}={value}" for key, value in values.items()), *more]

    return make


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("stranger") / "run"
    assert train.main(arguments(out)) == 0
    return out


def test_it_resumes_to_the_bit(trained, arguments, tmp_path, mesh):
    half = tmp_path / "half"
    train.main(arguments(half, "--config.max_iters=4"))
    train.main(arguments(half, "--config.init_from=resume"))
    states = []
    for out in (trained, half):
        parts = resolve(read_config(out, model=STRANGER), mesh, VOCAB)
        states.append(Checkpoints(out).restore(abstract_state(parts, mesh))[0])
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, states))


def test_it_evaluates_samples_and_benches(trained, arguments, token_folder, tmp_path, capfd):
    named = [f"--out_dir={trained}", f"--model={STRANGER}", f"--data_dir={token_folder}"]
    evaluate.main([*named, "--json"])
    scores = json.loads(capfd.readouterr().out)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert scores["val_loss"] == pytest.approx([row["val_loss"] for row in rows if "val_loss" in row][-1], abs=0.3)
    sample.main([*named[:2], "--start=ab", "--num_samples=2", "--max_new_tokens=30", "--temperature=0"])
    one, two, _ = capfd.readouterr().out.split("---------------\n")
    assert one == two and one.startswith("ab") and len(one.strip("\n")) == 32
    bench.main([*arguments(tmp_path / "none"), "--steps=1"])
    assert json.loads(capfd.readouterr().out)["params"] > 0


def test_what_comes_next_names_its_file():
    config = default_config(STRANGER)
    _, *after, report = train.next_commands(config, 9, train.Progress(evaluated=config.max_iters))
    assert len(after) == 2 and all(line.endswith(f" --out_dir=out --model={STRANGER}") for line in after)
    assert "--model" not in report + "".join(train.next_commands(default_config(), 9, train.Progress()))


def test_a_dry_run_describes_it(arguments, tmp_path, capfd):
    assert train.main(arguments(tmp_path / "none", "--dry_run")) == 0
    assert "parameters" in capfd.readouterr().out and not (tmp_path / "none").exists()


MLP_LINE = "        self.mlp = MLP(config, rngs=rngs)\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('Norm("layer",', 'Norm("rmsnorm",', "Norm has kind 'rmsnorm'; choose layer or rms"),
        ('activation="gelu"', 'activation="swiglu"', "activation='swiglu' is not there; choose gelu, relu2"),
        ("    def loss(", "    def the_loss(", "GPT has no loss; write it"),
        ('"wte/embedding", "embedding", tensor=0', '"wte/embedding", "embedding", tensor=5', "has tensor=5"),
        ("(y.reshape(batch, -1, c.n_head, c.head_size) for y in qkv)", "(y[:, : 12 * n].reshape(batch, -1, n, 12) "
         "for y, n in zip(qkv, (4, 3, 3)))", "4 heads of queries cannot share 3 of keys"),
        ("tensor=-1, stack=-2)", "tensor=-1, stack=3)", "stack=3, no dimension of h/0/attn/c_attn/kernel, which has 3"),
        ("        return linear_cross_entropy(", "        return jnp.zeros(3) + linear_cross_entropy(",
         r"mine.py: loss returns an array of shape \(3,\); return one number, the mean"),
        ("        return linear_cross_entropy(x,", "        return 1.0, linear_cross_entropy(x,",
         "loss returns a tuple; return one number"),
        ('Role("ln_f/*", "vector", decay=False, float32=True)', '("ln_f/*", "vector")',
         r"ROLES has a row .*; each is a Role\(pattern, group"),
        (MLP_LINE, MLP_LINE + "        self.gain = jnp.ones(3)\n", "Block.gain is an array and no parameter; make"),
        (MLP_LINE, MLP_LINE + "        self.gain = __import__('numpy').ones(3)\n", "Block.gain is an array and no"),
        (MLP_LINE, MLP_LINE + "        self.drop = nnx.Dropout(0.1, rngs=rngs)\n", "drop/rngs/.* is of nnx.s class"),
    ],
)  # fmt: skip
def test_an_authors_mistake_is_one_line(tmp_path, old, new, message):
    source = (Path(__file__).parents[1] / "jaxgpt" / "models" / "gpt2.py").read_text()
    assert source.count(old) == 1
    (tmp_path / "mine.py").write_text(source.replace(old, new))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with pytest.raises(UserError, match=message):
        config = default_config(str(tmp_path / "mine.py"))
        config.update(n_layer=1, n_head=4, n_embd=48, block_size=16, batch_size=1, gradient_accumulation_steps=1)
        parts = resolve(config, mesh, VOCAB)
        state = abstract_state(parts, mesh)
        make_train_step(parts, mesh).lower(state, jax.ShapeDtypeStruct((1, 1, 1, 17), np.uint16))


def changed(folder: Path) -> str:
    """A copy of the stranger's file with another norm's epsilon."""
    copy = folder / "stranger.py"
    copy.write_text(Path(STRANGER).read_text().replace("nnx.RMSNorm(size,", "nnx.RMSNorm(size, epsilon=1e-5,"))
    return str(copy)


def test_opening_a_run_with_another_model_is_one_line(trained, arguments, tmp_path):
    go_on = "--config.init_from=resume", "--config.max_iters=9"
    mistakes = {
        "has model=.*stranger.py, not gpt2": lambda: evaluate.main([f"--out_dir={trained}", "--model=gpt2"]),
        "whose code is not run by itself; name it": lambda: sample.main([f"--out_dir={trained}"]),
        r"n_head=1, but the run in .* has n_head=2": lambda: train.main(
            arguments(trained, *go_on, "--config.n_head=1")
        ),
        r"line \d+ was '    return nnx.RMSNorm\(size, dtype": lambda: train.main(
            arguments(trained, *go_on, model=changed(tmp_path))
        ),
        "Hugging Face|name it": lambda: convert.main([f"--out_dir={trained}", f"--to_hf={tmp_path / 'hf'}"]),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(UserError, match=message) as error:
            mistake()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "hf").exists()


def test_a_changed_model_file_is_accepted_when_asked(trained, arguments, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    accepted = "--config.init_from=resume", "--config.max_iters=9", "--config.model_changed"
    assert train.main(arguments(out, *accepted, model=changed(tmp_path))) == 0
    assert "epsilon=1e-5" in json.loads((out / "config.json").read_text())["model_source"]


def test_code_stored_in_a_run_is_never_executed(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    saved = json.loads((out / "config.json").read_text())
    saved["model_source"] = f"open({str(tmp_path / 'hacked')!r}, 'w')\n" + saved["model_source"]
    (out / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="line 1 was"):
        read_config(out, model=STRANGER)
    with pytest.raises(UserError, match="name it"):
        read_config(out)
    assert not (tmp_path / "hacked").exists()


def test_the_smallest_example_trains(arguments, tmp_path):
    """The protocol's own documentation, run as it stands."""
    file = tmp_path / "bigram.py"
    file.write_text(example())
    ast.parse(example())
    out = tmp_path / "run"
    words = [word for word in arguments(out, model=str(file)) if "n_kv_head" not in word]
    assert train.main(words) == 0
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in losses if "loss" in row]
    assert losses[-1] < losses[0] - 0.02
