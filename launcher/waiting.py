"""Waiting for Ray, in a way that a request to stop cuts short."""

import contextlib
import signal
import time
from collections.abc import Iterator

from armillary.errors import PreemptedError, RunError

POLL_SECONDS = 0.1


class Stop:
    """Counts Ctrl-C and SIGTERM: the first asks for a checkpoint and an end, the second ends at once. A SIGTERM says
    too that there is only so much time; platforms repeat it, so that all of them count as one."""

    def __init__(self):
        self.count = 0
        self.terminated_at: float | None = None  # monotonic

    def listen(self) -> dict:
        """Take over both signals; returns the handlers that were there."""
        return {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}

    def _heard(self, number, frame) -> None:
        if number == signal.SIGINT or self.terminated_at is None:
            self.count += 1
        if number == signal.SIGTERM and self.terminated_at is None:
            self.terminated_at = time.monotonic()

    def error(self, what: str, where: str = "", fix: str = "resume from the last checkpoint") -> RunError:
        """What a run ends with that was stopped before it could save."""
        return (RunError if self.terminated_at is None else PreemptedError)(what, where, fix)


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    stop = Stop()
    before = stop.listen()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_all(refs: list, seconds: float, stop: Stop) -> list:
    """ray.get with a time limit."""
    import ray

    deadline, pending = time.monotonic() + seconds, list(refs)
    while pending:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_SECONDS)
        if stop.count:
            raise stop.error("stopped before the ranks had begun", "", "start it again, or resume what it has saved")
        if pending and time.monotonic() > deadline:
            raise ray.exceptions.GetTimeoutError(f"no answer within {seconds:.0f} s")
    return ray.get(refs)


def sleep(seconds: float, stop: Stop) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if stop.count:
            raise stop.error("stopped between two launches")
        time.sleep(POLL_SECONDS)
