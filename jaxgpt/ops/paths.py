"""Which path each op takes in a program, noted while JAX traces it: what a run says of itself at its start.

with watch() as paths:
    lowered = train_step.lower(state, batch)
print(describe(paths))  # attention: cudnn · loss: kernel · norm: kernel · products: bfloat16
"""

import contextlib
import contextvars
from collections.abc import Iterator

Paths = dict[str, set[str]]
_watching: contextvars.ContextVar[Paths | None] = contextvars.ContextVar("watching", default=None)


@contextlib.contextmanager
def watch() -> Iterator[Paths]:
    """Collects what is noted in this thread: the paths that each op took, by the op's name."""
    paths: Paths = {}
    token = _watching.set(paths)
    try:
        yield paths
    finally:
        _watching.reset(token)


def note(op: str, path: str) -> None:
    paths = _watching.get()
    if paths is not None:
        paths.setdefault(op, set()).add(path)


def describe(paths: Paths) -> str:
    return " · ".join(f"{op}: {' and '.join(sorted(taken))}" for op, taken in sorted(paths.items()))
