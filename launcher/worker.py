"""One rank as a Ray actor: runs training.loop, and answers the driver meanwhile."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from armillary.data_pipeline.cursor import Cursor
from armillary.errors import ArmillaryError, CheckpointError, RunError
from armillary.launcher.cluster import reaches
from armillary.launcher.placement import Failure
from armillary.training.checkpoint.manifest import State
from armillary.training.health import Verdict, heartbeat

COMMIT_TIMEOUT = 600.0
FENCE_SECONDS = 0.5  # between two looks at the parent
HEAD_EVERY = 10  # of these looks, one for the head of the cluster
CUT_OFF_LOOKS = 4
FENCE_TIMEOUT = 30.0
NEWS_SECONDS = 1.0  # that figures of steps may wait: each answer to the driver takes time from the training


@dataclass(frozen=True)
class Ended:
    """A rank that ended well: the last step done, and whether a SIGTERM to it was the reason."""

    step: int
    preempted: bool


class Worker:
    """Methods other than `run` are called while it runs, in other threads of the actor."""

    def __init__(self):
        self._rank = -1
        self._stop = threading.Event()
        self._preempted = False
        self._committed, self._problem = threading.Event(), None
        self._messages: list[dict] = []
        self._heard = 0  # messages that the driver has taken in, and that are forgotten here
        self._news = threading.Condition()
        self._urgent = self._over = False  # whether the driver shall hear now, and whether there is nothing to wait for
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        threading.Thread(target=_fence, args=(os.getppid(), (host, int(port))), daemon=True).start()
        on_sigterm(self._preempt)

    def warm(self) -> None:
        """Do the imports, which take seconds."""
        import armillary.launcher.fitting
        import armillary.training.loop  # noqa: F401

    def prepare(self, rank: int, log: Path, before: list[dict]) -> dict:
        """Become a rank whose output goes to `log`, once those of `before` on this machine are gone; its own place."""
        self._rank, self._preempted = rank, False
        self._stop.clear()  # what was told to a process that waits is not told to a rank
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file, 1)
        os.dup2(file, 2)
        here = place()
        end_processes((one["pid"], one["began"]) for one in before if one["node"] == here["node"])
        if interface := interface_of(here["address"]):  # else gloo takes that of the host's name
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        return here

    def free_port(self, address: str) -> int:
        """A port on `address` that was free just now."""
        with socket.socket() as probe:
            probe.bind((address, 0))
            return probe.getsockname()[1]

    def run(self, assignment: dict) -> Failure | Ended:
        """Train; how far, or how it failed. The traceback of anything unforeseen is in the log."""
        heartbeat.enter("start")
        try:
            from armillary.launcher.fitting import memory_of_rank, peak_flops
            from armillary.training.config import TrainJob
            from armillary.training.loop import Assignment, run
            from armillary.training.process_group import Rank, join, leave

            job = TrainJob.model_validate(assignment.pop("job"))
            timeout = assignment.pop("start_timeout")
            rank, beyond = Rank(**assignment.pop("rank")), Cursor(**assignment.pop("beyond"))
            join(rank, job.parallel, timeout)
            peak, memory = peak_flops(job.training.precision), memory_of_rank(assignment.pop("neighbours"))
            assigned = Assignment(job=job, rank=rank, peak_flops=peak, beyond=beyond, **assignment)
            step = run(assigned, self, lambda address: self._serving(address, memory))
            leave()
            return Ended(step, self._preempted)
        except ArmillaryError as error:
            print(error, file=sys.stderr, flush=True)
            return self._failure(error, "\0".join((error.what, error.where, error.fix)))
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            return self._failure(error, str(error).strip().splitlines()[0] if str(error) else "")
        finally:
            self._ended()

    def _failure(self, error: Exception, message: str) -> Failure:
        report = self.report()
        return Failure(self._rank, type(error).__name__, message, report["phase"], report["step"])

    def report(self) -> dict:
        """How far this rank is: see training.health.Heartbeat.report."""
        return heartbeat.report()

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

    def verdict(self, verdict: Verdict) -> None:
        self._say({"kind": "verdict", "verdict": verdict.as_dict()}, urgent=True)

    def not_saved(self, step: int, reason: str) -> None:
        self._say({"kind": "not saved", "step": step, "reason": reason}, urgent=True)

    def _preempt(self) -> None:
        print("SIGTERM: ending after this step, with a checkpoint", file=sys.stderr, flush=True)
        self._preempted = True
        self._stop.set()

    def _serving(self, address: str, memory: float) -> None:
        self._say({"kind": "serving", "address": address, "memory": memory}, urgent=True)

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


def on_sigterm(act: Callable[[], None]) -> None:
    """Let `act` be called, in a thread, when a SIGTERM comes. To be called in the main thread.

    Python runs a signal's handler in the main thread alone, which is in Ray's own loop: the handler below is only there
    to have the signal written into a pipe.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGTERM:
                act()

    threading.Thread(target=listen, daemon=True).start()


def _fence(parent: int, head: tuple[str, int]) -> None:
    """End this process at once when the node's agent, which is its parent, ends, or when the cluster's head was out of
    reach CUT_OFF_LOOKS times in a row: by then the run goes on without it. (An agent that is cut off takes minutes.)
    """
    missed, looks = 0, 0
    while os.getppid() == parent and missed < CUT_OFF_LOOKS:
        time.sleep(FENCE_SECONDS)
        looks += 1
        if looks % HEAD_EVERY == 0:
            missed = 0 if reaches(*head) else missed + 1
    os._exit(1)


def place() -> dict:
    """This process's node, address and number, which names it only together with when it began."""
    process, context = psutil.Process(), ray.get_runtime_context()
    address, began = ray.util.get_node_ip_address(), process.create_time()
    return {"node": context.get_node_id(), "address": address, "pid": process.pid, "began": began}


def interface_of(address: str) -> str | None:
    """The network interface that has this address."""
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(one.address == address for one in addresses)), None)


def end_processes(processes: Iterable[tuple[int, float]]) -> None:
    """Kill these (number, when it began) and wait until they are gone: they hold the GPU that is to be ours."""
    for pid, began in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == began:
                process.kill()
                process.wait(FENCE_TIMEOUT)
