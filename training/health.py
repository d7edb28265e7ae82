"""Where a rank is, which rank is slow, and which steps are bad: what recovery decides by. Decisions are pure."""

import math
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from armillary.data_pipeline.cursor import Cursor

PHASES = ("start", "data", "compute", "reduce", "checkpoint", "end")

KINDS = ("lost process", "lost node", "lost contact", "hung rank", "straggler", "full storage", "failed save",
         "non-finite", "spike")  # fmt: skip
WAITING = (".wait(", ".item()", ".tolist()", "synchronize(")  # calls in which a rank stands until others have come

PROBES = 8  # in a row that are looked at together
SLOW = 1.5  # times the median rank's time, on average
MOST_SLOW = 2.5  # times that one probe counts for: two that were disturbed make no straggler

RECENT = 128  # steps that a spike is compared with
LEAST_RECENT = 32  # fewer say nothing
SPREAD = 1.4826  # median absolute deviations of a normal distribution in its standard deviation
MOST_SKIPPED = 8  # steps in a row


@dataclass(frozen=True)
class Verdict:
    """What went wrong, where, and what to do about it; a number or name that nobody knows is left out.

    kind: one of KINDS.
    action: what was done about a bad step; cursor: the data after it.
    """

    kind: str
    what: str
    remedy: str
    rank: int | None = None
    node: str | None = None
    phase: str | None = None
    step: int | None = None
    action: str | None = None
    cursor: dict | None = None

    def line(self) -> str:
        """For people."""
        where = ", ".join(f"{name} {value}" for name, value in (("rank", self.rank), ("node", (self.node or "")[:8]),
                          ("phase", self.phase), ("step", self.step)) if value not in (None, ""))  # fmt: skip
        return f"{self.kind}: {self.what} ({where}); to do: {self.remedy}"

    def as_dict(self) -> dict:
        """What is known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class Heartbeat:
    """How far this process's rank is. `beat` at whatever moves: a silence says that the rank is stuck, or waits."""

    step: int = 0
    phase: str = "start"
    _moved: float = field(default_factory=time.monotonic)
    _thread: int = 0

    def enter(self, phase: str) -> None:
        """A phase begins, in the calling thread."""
        assert phase in PHASES
        self.phase, self._thread = phase, threading.get_ident()
        self.beat()

    def beat(self) -> None:
        self._moved = time.monotonic()

    @property
    def silent(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._moved

    def report(self) -> dict:
        """For whoever asks, from any thread: step, phase, seconds of silence, what the rank waits in for others ("" if
        for nobody), and its line of code."""
        waits, line = _position(self._thread)
        return {"step": self.step, "phase": self.phase, "silent": self.silent, "waits": waits, "line": line}


heartbeat = Heartbeat()  # a process has one rank


def _position(thread: int) -> tuple[str, str]:
    """What a thread waits in, or another one that runs its backward pass; and the last line that is not PyTorch's own.

    On a GPU an operation is only begun by its call, and waited for where a number of it is needed.
    """
    frames = sys._current_frames()
    stacks = [traceback.extract_stack(frames[thread])] if thread in frames else []
    stacks += [stack for key in frames if key != thread and _collective(stack := traceback.extract_stack(frames[key]))]
    waits = next(filter(None, map(_collective, stacks)), "")
    lines = [frame for frame in stacks[0] if "/torch/" not in frame.filename] if stacks else []
    if not lines:
        return waits, ""
    last = lines[-1]
    if not waits and any(word in (last.line or "") for word in WAITING):
        waits = last.name
    return waits, f"{'/'.join(last.filename.split('/')[-3:])}:{last.lineno} {last.name}: {last.line}"


def _collective(stack: traceback.StackSummary) -> str:
    return next((frame.name for frame in stack if frame.filename.endswith("/distributed_c10d.py")), "")


def stuck(reports: Sequence[dict | None], seconds: float) -> list[int] | None:
    """The ranks that the others wait for, where none has moved for `seconds`; None where one has.

    reports: of each rank, None where it gave no answer. Those are stuck that do not answer; else those that wait for
    nobody; of these, or of ranks that all wait, those that got least far. None of them, if all are alike.
    """
    answers = {rank: report for rank, report in enumerate(reports) if report is not None}
    if any(report["silent"] < seconds for report in answers.values()):
        return None
    if silent := [rank for rank in range(len(reports)) if rank not in answers]:
        return silent
    suspects = [rank for rank, report in answers.items() if not report["waits"]] or list(answers)
    places = {rank: (answers[rank]["step"], PHASES.index(answers[rank]["phase"])) for rank in suspects}
    behind = [rank for rank, place in places.items() if place == min(places.values())]
    return behind if len(behind) < len(reports) else []


def stragglers(probes: Iterable[Sequence[float]]) -> dict[int, float]:
    """Ranks that took SLOW times as long as the median rank or longer, over the last PROBES probes; and how many times.
    probes: seconds by rank, the latest last. Of two ranks' the smaller one is the median."""
    last = list(probes)[-PROBES:]
    if len(last) < PROBES:
        return {}
    ratios = [[min(seconds / statistics.median_low(one), MOST_SLOW) for seconds in one] for one in last]
    means = map(statistics.fmean, zip(*ratios, strict=True))
    return {rank: mean for rank, mean in enumerate(means) if mean >= SLOW}


def bad_step(loss: float, grad_norm: float, recent: Sequence[tuple[float, float]], spike: float) -> str:
    """ "non-finite", "spike" or "" for a step that is neither.

    A spike is a loss or a gradient norm more than `spike` standard deviations above the median of those of the `recent`
    good steps, their deviation taken from the median absolute one, which earlier spikes move little; 0: nothing is.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return "non-finite"
    if not spike or len(recent) < LEAST_RECENT:
        return ""
    for number, others in zip((loss, grad_norm), zip(*recent, strict=True), strict=True):
        middle = statistics.median(others)
        deviation = SPREAD * statistics.median(abs(other - middle) for other in others)
        if number > middle + spike * deviation:
            return "spike"
    return ""


def bad_verdict(kind: str, loss: float, grad_norm: float, step: int, action: str, after: Cursor) -> Verdict:
    """What is said of a bad step."""
    what = f"{kind} at step {step}: the loss is {loss:.4g} and the gradient norm {grad_norm:.4g}"
    remedy = {
        "stop": "resume with training.bad_step=skip or =rewind, or a lower optimizer.learning_rate",
        "skip": "nothing: its update was left out; if it happens often, lower optimizer.learning_rate",
        "rewind": "nothing: the run goes back to a checkpoint and leaves this data out",
    }[action]
    return Verdict(kind, what, remedy, phase="compute", step=step, action=action, cursor=after.model_dump())


def failed_save(step: int, reason: str, full: bool) -> Verdict:
    """What is said of a checkpoint that could not be saved; training goes on."""
    kind, remedy = (
        ("full storage", "free some space, or set checkpoint.keep_last: `armillary checkpoint prune`")
        if full
        else ("failed save", "see to the storage: after three in a row the run ends")
    )
    return Verdict(kind, f"no checkpoint of step {step}: {reason}", remedy, phase="checkpoint", step=step)
