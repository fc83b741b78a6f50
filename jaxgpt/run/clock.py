"""A clock that stands still while this process does: stopped (SIGSTOP, a debugger), or on a suspended machine."""

import threading
import time

SUSPENDED_S = 1.0  # a thread that wakes so much too late was stopped, with its process or the whole machine


class RunClock:
    """Seconds for which this process has run. One thread has to `wait` by it, as it finds out by waking late."""

    def __init__(self) -> None:
        self._not_run = 0.0

    def now(self) -> float:
        """Seconds, from some moment on."""
        return time.monotonic() - self._not_run

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """`event.wait(seconds)`: whether the event came."""
        began = time.monotonic()
        if event.wait(seconds):
            return True
        late = time.monotonic() - began - seconds
        if late > SUSPENDED_S:
            self._not_run += late
        return False
