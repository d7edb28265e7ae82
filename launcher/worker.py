"""One rank as a Ray actor: runs training.loop, and answers the driver meanwhile."""

import os
import socket
import sys
import threading
import traceback
from pathlib import Path

import ray

from armillary.errors import ArmillaryError, CheckpointError, RunError
from armillary.launcher.placement import Failure
from armillary.training.checkpoint.manifest import State

COMMIT_TIMEOUT = 600.0
NEWS_SECONDS = 1.0  # that figures of steps may wait: each answer to the driver takes time from the training


class Worker:
    """Methods other than `run` are called while it runs, in other threads of the actor."""

    def __init__(self, rank: int, log: Path):
        self._rank = rank
        self._stop = threading.Event()
        self._committed, self._problem = threading.Event(), None
        self._messages: list[dict] = []
        self._heard = 0  # messages that the driver has taken in, and that are forgotten here
        self._news = threading.Condition()
        self._urgent = self._over = False  # whether the driver shall hear now, and whether there is nothing to wait for
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file, 1)
        os.dup2(file, 2)

    def where(self) -> dict:
        """This rank's node, address and process."""
        context = ray.get_runtime_context()
        return {"node": context.get_node_id(), "address": ray.util.get_node_ip_address(), "pid": os.getpid()}

    def free_port(self, address: str) -> int:
        """A port on `address` that was free just now."""
        with socket.socket() as probe:
            probe.bind((address, 0))
            return probe.getsockname()[1]

    def run(self, assignment: dict) -> Failure | int:
        """Train; the last step done, or how it failed. The traceback of anything unforeseen is in the log."""
        try:
            from armillary.launcher.fitting import peak_flops
            from armillary.training.config import TrainJob
            from armillary.training.loop import Assignment, run
            from armillary.training.process_group import Rank, join, leave

            job = TrainJob.model_validate(assignment.pop("job"))
            timeout = assignment.pop("start_timeout")
            rank = Rank(**assignment.pop("rank"))
            join(rank, job.parallel, timeout)
            peak = peak_flops(job.training.precision)
            step = run(Assignment(job=job, rank=rank, peak_flops=peak, **assignment), self, self._serving)
            leave()
            return step
        except ArmillaryError as error:
            print(error, file=sys.stderr, flush=True)
            return Failure(self._rank, type(error).__name__, "\0".join((error.what, error.where, error.fix)))
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            return Failure(self._rank, type(error).__name__, str(error).strip().splitlines()[0] if str(error) else "")
        finally:
            self._ended()

    def messages(self, since: int) -> list[dict]:
        """What this rank had to say after its first `since` messages; those are the driver's now.

        Answers as soon as there is something to act on; without that, after NEWS_SECONDS.
        """
        with self._news:
            del self._messages[: since - self._heard]
            self._heard = since
            self._news.wait_for(lambda: self._urgent, NEWS_SECONDS)
            self._urgent = self._over
            return list(self._messages)

    def stop(self) -> None:
        """End after the step in hand, with a checkpoint."""
        self._stop.set()

    def committed(self, problem: str | None) -> None:
        """The driver has committed the checkpoint that `saved` announced, or could not."""
        self._problem = problem
        self._committed.set()

    # What training.saves.Observer asks for.

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def step_done(self, record: dict) -> None:
        self._say({"kind": "step", **record})

    def saved(self, name: str, state: State) -> None:
        self._committed.clear()
        self._say({"kind": "saved", "name": name, "state": state.model_dump(mode="json")}, urgent=True)
        if not self._committed.wait(COMMIT_TIMEOUT):
            raise RunError("the driver did not commit a checkpoint", name, "see the driver's output")
        if self._problem is not None:
            raise CheckpointError(f"the checkpoint could not be committed: {self._problem}", name, "see to the storage")

    def not_saved(self, step: int, reason: str) -> None:
        self._say({"kind": "not saved", "step": step, "reason": reason}, urgent=True)

    def _serving(self, address: str) -> None:
        self._say({"kind": "serving", "address": address}, urgent=True)

    def _say(self, message: dict, urgent: bool = False) -> None:
        with self._news:
            self._messages.append(message)
            if urgent:
                self._hurry()

    def _ended(self) -> None:
        with self._news:
            self._over = True
            self._hurry()

    def _hurry(self) -> None:
        self._urgent = True
        self._news.notify_all()
