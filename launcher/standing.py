"""How a run stands, by its events: the same for one on this machine and for one in a cluster. Pure."""

import time
from dataclasses import dataclass, field, fields

from armillary.launcher.arguments import counted
from armillary.launcher.progress import Pace, clock

STATES = ("new", "starting", "training", "waiting", "stopped", "done", "failed", "cancelled")


@dataclass
class Standing:
    """What its events come to, fed in order.

    state: of STATES; "waiting" is for machines, or to start again.
    Times are Unix times; `step` is the last one that counts, `at` when the last event was.
    """

    steps: int
    state: str = "new"
    step: int = 0
    tokens: int = 0
    loss: float | None = None
    ranks: int = 0
    generation: int = 0
    restarts: int = 0
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    verdict: dict | None = None
    error: str | None = None
    at: float | None = None
    _pace: Pace = field(init=False)
    _stepped: float = field(init=False, default=0.0)

    def __post_init__(self):
        self._pace = Pace(self.steps)

    def add(self, event: dict) -> None:
        """Take in the next event."""
        self.at = event["time"]
        match event["event"]:
            case "launch":
                self.state, self.error, self._pace = "starting", None, Pace(self.steps)
                self.step, self.generation = event["from_step"], event["generation"]
                self.ranks = event["layout"]["world_size"]
            case "step":
                self.state, self.step, self.loss = "training", event["step"], event["loss"]
                self.tokens = event["tokens"]
                self._stepped = max(self._stepped + event["seconds"], event["time"])  # several are told at once
                self._pace.add(event["step"], event["tokens"], self._stepped)
            case "checkpoint":
                self.checkpoint_step, self.checkpoint_time = event["step"], event["time"]
            case "waiting":
                self.state = "waiting"
            case "restart":
                self.state, self.error, self.restarts = "waiting", None, self.restarts + 1
            case "verdict":
                self.verdict = event
            case "failed":
                self.state, self.error = "failed", event["error"]
            case "cancelled":
                self.state = "cancelled"
            case "ended":
                self.step = event["step"]
                self.state = "stopped" if event["interrupted"] or event["step"] < self.steps else "done"

    def as_dict(self, now: float | None = None) -> dict:
        """All of it, with the pace, and the checkpoint's age in seconds."""
        now = time.time() if now is None else now
        known = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        training = self.state == "training"
        return known | {
            "tokens_per_second": round(self._pace.tokens_per_second, 1) if training else None,
            "eta_seconds": self._pace.eta_seconds if training else None,
            "checkpoint_age_seconds": None if self.checkpoint_time is None else round(now - self.checkpoint_time, 1),
        }


def rows(standing: dict) -> dict[str, str]:
    """For people: a name and a value for each line of `armillary status`. standing: see Standing.as_dict."""
    found = {"state": standing["state"], "step": f"{standing['step']:,} of {standing['steps']:,}"}
    if standing["loss"] is not None:
        found["loss"] = f"{standing['loss']:.4f}"
    if standing["tokens_per_second"] is not None:
        found["pace"] = f"{standing['tokens_per_second']:,.0f} tokens/s, ETA {clock(standing['eta_seconds'])}"
    if standing["ranks"]:
        found["ranks"] = f"{standing['ranks']:,}, launched {standing['generation'] + 1} times"
    if standing["checkpoint_step"] is not None:
        age = clock(standing["checkpoint_age_seconds"])
        found["checkpoint"] = f"of step {standing['checkpoint_step']:,}, {age} ago"
    found["restarts"] = str(standing["restarts"])
    if standing["verdict"] is not None:
        found["last verdict"] = told(standing["verdict"])
    if standing["error"]:
        found["error"] = standing["error"]
    return found


def told(event: dict) -> str:
    """An event in a line of text."""
    match event["event"]:
        case "progress":
            return ", ".join(f"{name} {value}" for name, value in rows(event).items()
                             if name in ("state", "step", "loss", "pace", "ranks"))  # fmt: skip
        case "launch":
            return f"{counted(event['layout']['world_size'], 'rank')} from step {event['from_step']}"
        case "checkpoint":
            return f"checkpoint of step {event['step']}: {event['path']}"
        case "verdict":
            return f"{event['kind']}: {event['what']}; to do: {event['remedy']}"
        case "failed":
            return f"failed: {event['error']}"
        case "waiting":
            return f"waiting for more machines: {event['reason']}"
        case "restart":
            return f"{event['reason']}; starting again from step {event['from_step']}"
        case "ended":
            return f"ended at step {event['step']}"
        case kind:
            rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
            return f"{kind}: {rest}"
