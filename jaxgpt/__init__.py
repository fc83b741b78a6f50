"""jaxgpt: train, fine-tune, evaluate and sample GPT-2 in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake the user can mend. Entry points print it as one line, `error: …`, and exit with its status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def optional(module: str, package: str, purpose: Any) -> Any:
    """A module that not every installation has. UserError, saying what needs it and how to get it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{purpose} needs {module.partition('.')[0]}; run: pip install '{package}'") from None
