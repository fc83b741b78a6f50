"""What happens where the coordinator is lost: JAX's client would abort the process, with the stacks of C++ and Python.

The client calls `missed_heartbeat_callback` then, with a C++ status that no Python callable can take (jaxlib 0.10 to
0.12): the call ends in std::bad_cast, and that in std::terminate, whose handler is ours. Where there is no libstdc++,
as on macOS, JAX aborts.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from jax._src import distributed

_called_by_cxx: list[Any] = []  # which keeps no reference itself


@contextlib.contextmanager
def watched(lost: Callable[[], object]) -> Iterator[None]:
    """Within it, jax.distributed.initialize makes a client that calls `lost`, which must not return, when it has lost
    the coordinator."""
    module: Any = distributed._jax  # pyright: ignore
    make = module.get_distributed_runtime_client
    if "missed_heartbeat_callback" not in (make.__doc__ or "") or not _on_bad_cast(lost):
        yield
        return
    module.get_distributed_runtime_client = partial(make, missed_heartbeat_callback=lambda *_: lost())
    try:
        yield
    finally:
        module.get_distributed_runtime_client = make


def _on_bad_cast(act: Callable[[], object]) -> bool:
    """Has std::terminate call `act` for a std::bad_cast that nobody catches. Whether it can be had."""
    try:
        cxx = ctypes.CDLL("libstdc++.so.6")
        set_terminate, current = cxx._ZSt13set_terminatePFvvE, cxx.__cxa_current_exception_type
    except (OSError, AttributeError):
        return False
    handler = ctypes.CFUNCTYPE(None)
    set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [handler]
    current.restype = ctypes.POINTER(ctypes.c_char_p * 2)  # std::type_info: a pointer to its methods, the type's name

    def terminate() -> None:
        kind = current()
        if kind and kind.contents[1] == b"St8bad_cast":
            act()
        before()

    _called_by_cxx.append(handler(terminate))
    before = handler(set_terminate(_called_by_cxx[-1]))
    return True
