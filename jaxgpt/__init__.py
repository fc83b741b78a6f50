"""jaxgpt: train, fine-tune, evaluate and sample GPT-2 in JAX."""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake the user can mend. Entry points print it as one line, `error: …`, and exit with its status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status
