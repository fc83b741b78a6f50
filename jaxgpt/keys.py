"""Configuration keys: a default, what it means and which values it takes, in a field of a frozen dataclass.

Such a dataclass is one part of a run's config (`data.DataConfig`, `optim.OptimizerConfig`, a model's config). Its keys
are flat flags, `--config.KEY=VALUE`, whichever part they belong to.
"""

import dataclasses
import math
import struct
from collections.abc import Collection
from typing import Any, TypeVar

from jaxgpt import UserError

Part = TypeVar("Part")
FLOAT32_LIMIT = 2.0**128 * (1 - 2**-25)  # from here on a number rounds to infinity in float32
FLOAT32_LEAST = 2.0**-126  # what is smaller, devices take for 0


def key(
    default: Any, help: str, *, choices: Collection[str] = (), least: float | None = None, below: float | None = None
) -> Any:
    """A field of a part: a key with its default. Numbers are at least `least`, 0 by default, and below `below`."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "least": least, "below": below}
    )


def keys(part: type) -> dict[str, dataclasses.Field]:
    """The keys of a part by name. Fields that are not made by `key` are not the user's to set."""
    return {field.name: field for field in dataclasses.fields(part) if "help" in field.metadata}


def take(part: type[Part], config: Any, **resolved: Any) -> Part:
    """The part with its keys' values from a config (a mapping by name), and values for the fields that are no keys."""
    return part(**{name: config[name] for name in keys(part)}, **resolved)


def check(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError, naming the key, on a value that the key does not take."""
    name, default, rules = field.name, field.default, field.metadata
    if type(value) is not type(default):
        raise UserError(f"{name}={value!r} is not of type {type(default).__name__}")
    if isinstance(value, str) and rules["choices"] and value not in rules["choices"]:
        raise UserError(f"{name}={value!r} is not one of {', '.join(rules['choices'])}")
    if isinstance(value, int) and value.bit_length() > 1000:  # too long to print or to become a float
        raise UserError(f"{name} is a number of {value.bit_length()} bits; choose a smaller one")
    if isinstance(value, int | float) and not isinstance(value, bool):
        least = 0 if rules["least"] is None else rules["least"]
        if not math.isfinite(value):
            raise UserError(f"{name}={value} is not a finite number")
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}")
        below = rules["below"] or (2**31 if isinstance(value, int) else FLOAT32_LIMIT)  # devices count in int32
        if value >= below:
            raise UserError(f"{name}={value} must be below {below}")
        if isinstance(value, float):
            check_float32(name, value, below)


def check_float32(name: str, value: float, below: float = math.inf) -> None:
    """Raises UserError where devices, which compute in float32, would take a positive value for 0, `below` or inf."""
    if value >= FLOAT32_LIMIT or struct.unpack("f", struct.pack("f", value))[0] >= below:
        raise UserError(f"{name}={value} rounds to {below} in float32; set less")
    if 0 < value < FLOAT32_LEAST:
        raise UserError(f"{name}={value} is taken for 0 in float32; set 0, or at least 1.2e-38")
