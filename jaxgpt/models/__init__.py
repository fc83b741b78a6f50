"""What a model file provides, and how one is found: `--config.model=gpt2`, `modern`, or `path/to/mine.py`.

A model is one file. It defines one subclass of ModelConfig and the nnx.Module that this builds:

    @dataclasses.dataclass(frozen=True)
    class BigramConfig(ModelConfig):
        \"\"\"The smallest model: the next token follows from the last one alone.\"\"\"

        init_std: float = key(0.02, "standard deviation of the initial logits")  # becomes --config.init_std

        ROLES = (Role("table/embedding", "head", decay=False),)
        LACKS = ("dropout", "bias", "doc_mask", "remat")

        def build(self, rngs):
            return Bigram(self, rngs=rngs)

        def flops_per_token(self, params):
            return 6.0 * count_params(self, params)

    class Bigram(nnx.Module):
        def __init__(self, config, *, rngs):
            self.config, v = config, config.padded_vocab_size
            self.table = nnx.Embed(v, v, embedding_init=nnx.initializers.normal(config.init_std), rngs=rngs)

        def hidden(self, tokens, *, seed=None, cache=None):
            return self.table(tokens.reshape(-1)), cache

        def logits(self, x):
            return x.astype(jnp.float32)[..., : self.config.vocab_size]

        def loss(self, tokens, targets, *, seed=None):
            x, _ = self.hidden(tokens)
            losses = optax.softmax_cross_entropy_with_integer_labels(self.logits(x), targets.reshape(-1))
            return losses.mean()

The module's three methods, with B rows of T tokens and C features:
- `hidden(tokens (B, T), *, seed=None, cache=None)` gives hidden states (B·T, C) and the cache after these tokens. seed:
  a uint32 scalar from which dropout derives; None turns dropout off. cache: what `empty_cache` made, or None.
- `logits(x (…, C))` gives float32 logits (…, vocab_size), the vocabulary's padding cut off.
- `loss(tokens (B, T), targets (B, T), *, seed=None)` gives the mean cross-entropy in nats.

Layers that are alike may go through `traced_once`, as gpt2.py's and modern.py's do: a start is then quicker.

Everything else follows from the config's ROLES, one row for each kind of parameter: how a mesh splits it, which
optimizer group it is in, whether it decays, in which dtype it computes, and whether it counts in FLOPs.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxgpt import UserError, check_ordinary, local_path, one_line
from jaxgpt.keys import key
from jaxgpt.sharding import path_name

Params = dict[str, Any]
BUILT_IN = ("gpt2", "modern")
GROUPS = ("matrix", "embedding", "head", "vector")


@dataclasses.dataclass(frozen=True)
class Role:
    """What one kind of parameter is.

    pattern: its path in the parameters, `h/*/attn/c_attn/kernel`; `*` stands for one name.
    group: the optimizer's: matrix, embedding, head or vector. Vectors are replicated; `fsdp` splits all others. In
        training and evaluation a matrix reaches the module in the computation's dtype, in which gradients of several
        uses add up, all else in float32; in sampling all does but what stays in float32.
    tensor: the dimension that the mesh axis `tensor` splits; None: it is replicated there.
    decay: whether weight decay applies.
    float32: whether it stays in float32 where the model computes in bfloat16: a matrix with several uses, say.
    product: whether every token is multiplied with it, so that it counts in FLOPs; looked-up tables are not.
    stack: the dimension along which it stacks several matrices (or their biases), such as those of q, k and v.
    whole: whether each device fetches all of it over `fsdp` before a step. If False the module is given the device's
        part of its last dimension, and fetches what it needs: `sharding.rows` of a table, or `sharding.whole`.
    """

    pattern: str
    group: str
    tensor: int | None = None
    decay: bool = True
    float32: bool = False
    product: bool = True
    stack: int | None = None
    whole: bool = True

    @property
    def rounded(self) -> bool:
        """Whether a module that is trained or evaluated gets it in the computation's dtype."""
        return self.group == "matrix" and not self.float32


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The keys that every model has, and what is resolved for it with the devices and the corpus.

    A subclass adds keys of its own with `key`, the table ROLES, and the methods below. Raises UserError on values that
    make no model.
    """

    n_layer: int = key(12, "transformer blocks", below=1001)  # each is traced and compiled: more would take hours
    n_head: int = key(12, "attention heads")
    n_embd: int = key(768, "width of the residual stream")
    dropout: float = key(0.0, "dropout rate", below=1)
    bias: bool = key(False, "biases in linear layers and normalizations")
    block_size: int = key(1024, "tokens in a sequence", least=1)
    # resolved, not keys
    vocab_size: int = 50257
    dtype: str = "float32"  # of the computation; parameters are always float32
    attention: str = "xla"  # xla | cudnn | splash
    kernels: bool = False  # the fast paths of jaxgpt/ops where they support the case
    remat: str = "none"  # none | block: recompute each block in the backward pass
    matmul_dtype: str = "auto"  # auto: dtype | fp8: 8 bits in products with weights
    doc_mask: int = -1  # this token ends a document and attention does not cross it; -1: no boundaries

    ROLES: ClassVar[tuple[Role, ...]]
    LACKS: ClassVar[tuple[str, ...]] = ()  # fields above that the model ignores: setting one is an error

    def __post_init__(self):
        for name in self.LACKS:
            if getattr(self, name) != ModelConfig.__dataclass_fields__[name].default:
                raise UserError(f"{name}={getattr(self, name)}, but model={self.file.name} has no {name}; leave it out")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; choose a multiple, such as "
                f"n_embd={self.n_head * max(1, round(self.n_embd / self.n_head))}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1")

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128, the width of matrix-unit tiles."""
        return -(-self.vocab_size // 128) * 128

    @property
    def stochastic(self) -> bool:
        """Whether the training loss draws random numbers: `loss` gets a seed only then."""
        return self.dropout > 0

    @property
    def file(self) -> "ModelFile":
        """The file that defines this model."""
        return _FILES[type(self)]

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module with fresh parameters."""
        raise NotImplementedError

    def init(self, rng: Array) -> Params:
        """Fresh parameters as a nested dict."""
        return pure(self.build(nnx.Rngs(rng)))

    def empty_cache(self, batch: int, slots: int) -> "KVCache":
        """A cache for `batch` rows of up to `slots` tokens: any NamedTuple that has `length`, by default a KVCache."""
        return KVCache.empty(self, batch, slots, self.n_head)

    def flops_per_token(self, params: Params) -> float:
        """FLOPs of forward and backward for one token of a sequence of block_size tokens."""
        raise NotImplementedError

    def attention_flops_per_token(self) -> float:
        """Those that scores and weighted sums take, all T² pairs of tokens counted."""
        return 0.0

    def strict_flops_per_token(self, params: Params) -> float:
        """flops_per_token with the half of the pairs that a causal mask leaves: what strict MFU goes by."""
        return self.flops_per_token(params) - self.attention_flops_per_token() / 2


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; `length` of the S slots are filled (the same for every row).

    An array for each layer, so that the compiler can add to each in place.
    """

    k: tuple[Float[Array, "B S N H"], ...]
    v: tuple[Float[Array, "B S N H"], ...]
    docs: Int[Array, "B S+1"] | None  # the number of each slot's document, if the model keeps documents apart
    length: Int[Array, ""]

    @staticmethod
    def empty(config: ModelConfig, batch: int, slots: int, heads: int) -> "KVCache":
        shape = (batch, slots, heads, config.head_size)
        k, v = (tuple(jnp.zeros(shape, config.dtype) for _ in range(config.n_layer)) for _ in range(2))
        docs = jnp.zeros((batch, slots + 1), jnp.int32) if config.doc_mask >= 0 else None
        return KVCache(k, v, docs, jnp.zeros((), jnp.int32))


def documents(config: ModelConfig, tokens: Int[Array, "B T"], cache: KVCache | None) -> Int[Array, "B _"] | None:
    """The number of each token's document, where attention keeps documents apart (doc_mask), else None.

    A document begins after the last boundary. With a cache: the numbers of all its slots and one more, those of these
    tokens filled in.
    """
    if config.doc_mask < 0:
        return None
    ends = (tokens == config.doc_mask).astype(jnp.int32)
    docs = jnp.cumsum(ends, axis=1)
    if cache is None or cache.docs is None:
        return docs - ends
    docs = docs + jax.lax.dynamic_slice_in_dim(
        cache.docs, cache.length, 1, axis=1
    )  # an end counts from the next slot on
    return jax.lax.dynamic_update_slice_in_dim(cache.docs, docs, cache.length + 1, axis=1)


class ModelFile(NamedTuple):
    """Where a model comes from: what a checkpoint records of it."""

    name: str  # gpt2, modern, or the path of a user's file
    source: str  # a user's file: its text; empty for the built-in models
    config: type[ModelConfig]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()


_FILES: dict[type[ModelConfig], ModelFile] = {}


def find_model(name: str) -> ModelFile:
    """The model called `name`: a built-in one, or the file at a path that ends in .py. Raises UserError."""
    if name in BUILT_IN:
        return _register(name, "", importlib.import_module(f"jaxgpt.models.{name}"))
    path = local_path(name)
    if path.suffix != ".py":
        raise UserError(f"model={name} is neither {', '.join(BUILT_IN)} nor a file that ends in .py")
    check_ordinary(path)
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"model={name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return _load(name, source)


def count_users_files() -> int:
    """How many files of users this process has executed to find a model: they may have changed more than that."""
    return _load.cache_info().currsize


@functools.lru_cache(maxsize=32)
def _load(name: str, source: str) -> ModelFile:
    """The model in a user's file, executed once for each text of it."""
    module = ModuleType(f"jaxgpt_model_{hashlib.sha256(source.encode()).hexdigest()[:16]}")
    module.__file__ = name
    sys.modules[module.__name__] = module  # where dataclasses look annotations up
    try:
        exec(compile(source, name, "exec"), module.__dict__)
    except BaseException as error:  # whatever the user's code raises, exits included
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f"model={name}: {describe_slip(error, name)}") from None
    return _register(name, source, module)


def _register(name: str, source: str, module: ModuleType) -> ModelFile:
    own = [
        x
        for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, ModelConfig) and x.__module__ == module.__name__
    ]
    if len(own) != 1:
        found = ", ".join(x.__name__ for x in own) or "none"
        raise UserError(f"model={name} must define one subclass of ModelConfig; it defines {found}")
    (config,) = own
    if not dataclasses.is_dataclass(config) or "ROLES" not in vars(config):
        raise UserError(f"model={name}: {config.__name__} needs @dataclasses.dataclass(frozen=True) and a table ROLES")
    if strays := [row for row in config.ROLES if not isinstance(row, Role)]:
        raise UserError(f"model={name}: ROLES has a row {strays[0]!r:.60}; each is a Role(pattern, group, …)")
    if unknown := {role.group for role in config.ROLES} - {*GROUPS}:
        raise UserError(f"model={name}: ROLES has group {min(unknown)!r}; choose {', '.join(GROUPS)}")
    return _FILES.setdefault(config, ModelFile(name, source, config))


def describe_slip(error: BaseException, name: str) -> str:
    """`line 12: NameError: name 'x' is not defined`, of an error that a user's file made."""
    text = one_line(error)
    return f"{line_of(error, name)}{type(error).__name__}{f': {text}' if text else ''}"


def line_of(error: BaseException, name: str) -> str:
    """`line 12: ` of the user's file, where the error came from there."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    trace, line = error.__traceback__, 0
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == name else line
        trace = trace.tb_next
    return f"line {line}: " if line else ""


# --- parameters ---


def pure(module: nnx.Module) -> Params:
    """A module's parameters as a nested dict."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def init_params(config: ModelConfig, rng: Array, dtype: str = "float32") -> Params:
    """Fresh parameters as a nested dict, in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype), config.init(rng))


def abstract_params(config: ModelConfig) -> Params:
    """The shapes and dtypes of `init_params`, without computing anything."""
    return jax.tree.map(lambda x: x, _shapes(config))  # a copy


@functools.lru_cache(maxsize=8)  # a start asks for them some five times
def _shapes(config: ModelConfig) -> Params:
    if type(config).init is ModelConfig.init:  # what `bind` asks for has them
        state = nnx.to_pure_dict(_structure(config)[1])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), state)
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def bind(config: ModelConfig, params: Params) -> Any:
    """The module over these parameters (of any float dtype)."""
    graphdef, state = _structure(config)
    built, given = (
        {path_name(path) for path, _ in jax.tree.leaves_with_path(x)} for x in (nnx.to_pure_dict(state), params)
    )
    if built - given:
        raise UserError(
            f"model={config.file.name}: init makes no {min(built - given)}, which build does; make it there"
        )
    state = jax.tree.map(lambda x: x, state)  # a copy
    nnx.replace_by_pure_dict(state, params)
    module = nnx.merge(graphdef, state)
    if lacking := [name for name in ("hidden", "logits", "loss") if not hasattr(module, name)]:
        raise UserError(f"model={config.file.name}: {type(module).__name__} has no {lacking[0]}; write it")
    return module


@functools.lru_cache(maxsize=8)  # over a second for 48 layers
def _structure(config: ModelConfig):
    module = nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))
    arrays = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    for _, part in nnx.iter_modules(module):
        if stray := [name for name, value in vars(part).items() if isinstance(value, arrays)]:
            raise UserError(
                f"model={config.file.name}: {type(part).__name__}.{stray[0]} is an array and no parameter; make it an "
                "nnx.Param, or compute it where it is used"
            )
    graphdef, params, others = nnx.split(module, nnx.Param, ...)
    if found := nnx.to_flat_state(others):
        path, value = next(iter(found))
        name, kind = "/".join(map(str, path)), type(value).__name__
        raise UserError(
            f"model={config.file.name}: {name} is of nnx's class {kind}, and a model holds parameters alone, "
            "nnx.Param; random numbers come from the seed that `loss` is given"
        )
    return graphdef, params


def traced_once(f: Callable, *, remat: bool = False, policy: Any = None, **options: Any) -> Callable:
    """`f(module, x, …, **options)` for every layer of a model, which JAX traces and lowers once for all that are alike.

    Layers are alike if their modules and arguments differ in arrays' values alone; others have traces of their own.
    Make it in each call of `hidden`: every program then has its own traces, and notes its paths (ops/paths.py). What f
    computes it returns: raises UserError if it sets anything of its module.

    remat: recompute f in the backward pass, but for what a policy keeps (jax.checkpoint_policies).
    """

    def layer(module, *args):
        before = _attributes(module)
        result = f(module, *args, **options)
        for at, (value, size) in _attributes(module).items():
            if at not in before or before[at][0] is not value or before[at][1] != size:
                raise UserError(f"{at[1]} sets {at[2]} in its call, where it is lost; return it")
        return result

    jitted = jax.jit(jax.checkpoint(layer, policy=policy) if remat else layer)
    # where nothing is traced, a jitted function would be compiled at each call of `hidden`
    return lambda module, x, *args: (jitted if isinstance(x, Tracer) else layer)(module, x, *args)


def _attributes(module: nnx.Module) -> dict[tuple[Any, str, str], tuple[Any, int]]:
    """The attributes of a module and its parts, by path, class and name, and what each holds as a list or a dict."""
    parts = [(path, type(part).__name__, vars(part)) for path, part in nnx.iter_modules(module)]
    return {
        (path, of, name): (value, len(value) if isinstance(value, list | dict | set) else 0)
        for path, of, values in parts
        for name, value in values.items()
        if not name.startswith("_pytree__")  # Flax's own
    }


# the same function for the same standard deviation: a module holds it, and layers with others would not be alike
normal = functools.cache(nnx.initializers.normal)


# --- roles ---


def role_of(config: ModelConfig, path: str) -> Role:
    """The one row of ROLES that a parameter's path matches. Raises UserError if none or several do."""
    found = [role for role in config.ROLES if _regex(role.pattern).fullmatch(path)]
    if len(found) != 1:
        rows = ", ".join(role.pattern for role in found) or "none"
        raise UserError(f"model={config.file.name}: parameter {path} matches {rows} of the rows of ROLES; give it one")
    return found[0]


@functools.cache
def _regex(pattern: str) -> re.Pattern:
    return re.compile(re.escape(pattern).replace(r"\*", "[^/]+"))


def roles(config: ModelConfig, params: Params) -> Any:
    """The Role of every parameter, in the parameters' structure: by it sharding, optimizer and casts decide."""
    return jax.tree_util.tree_map_with_path(lambda path, _: role_of(config, path_name(path)), params)


def cast_params(config: ModelConfig, params: Params, dtype: str) -> Params:
    """Parameters (or their ShapeDtypeStructs) in `dtype`, but for those whose role is to stay in float32."""

    def cast(role: Role, x):
        wanted = x.dtype if role.float32 else jnp.dtype(dtype)
        return x.update(dtype=wanted) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(wanted)

    return jax.tree.map(cast, roles(config, params), params)


def count_params(config: ModelConfig, params: Params, *, all: bool = False) -> int:
    """Number of parameters, vocabulary padding included, without those that are only looked up, as nanoGPT counts."""
    counts = jax.tree.map(
        lambda role, x: math.prod(x.shape) if all or role.product else 0, roles(config, params), params
    )
    return sum(jax.tree.leaves(counts))
