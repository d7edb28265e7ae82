"""What the screen shows of a run: one live view on a terminal, plain lines elsewhere."""

import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

PLAIN_SECONDS = 10.0


@dataclass
class Pace:
    """tokens/s and time left from the last steps. Pure: the time of each step comes with it."""

    steps: int
    recent: collections.deque = field(default_factory=lambda: collections.deque(maxlen=50))

    def add(self, step: int, tokens: int, at: float) -> None:
        self.recent.append((step, tokens, at))

    @property
    def tokens_per_second(self) -> float:
        """Over the last 50 steps; 0 until there are two."""
        if len(self.recent) < 2:
            return 0.0
        (_, before, start), (_, after, end) = self.recent[0], self.recent[-1]
        return (after - before) / max(end - start, 1e-9)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the last step at the present pace; None until it is known."""
        if len(self.recent) < 2:
            return None
        (before, _, start), (now, _, end) = self.recent[0], self.recent[-1]
        return (self.steps - now) * (end - start) / max(now - before, 1)


def clock(seconds: float | None) -> str:
    """1:02:03, 2:03, or -- where unknown."""
    if seconds is None:
        return "--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class View:
    """Shows a launch from its first to its last step; use as a context."""

    def __init__(self, title: str, until: int, console: Console, now: Callable[[], float] = time.monotonic):
        self._console = console
        self._title, self._until, self._now = title, until, now
        self._pace = Pace(until)
        self._last: dict = {}
        self._saved: int | None = None
        self._printed = -PLAIN_SECONDS
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=False)

    def __enter__(self) -> "View":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line above the view."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def launched(self, text: str) -> None:
        """New ranks: the pace of earlier ones says nothing of theirs."""
        self._pace = Pace(self._until)
        self.say(text)

    def step(self, record: dict) -> None:
        """A step is done; record has step, tokens, loss and the time it ended."""
        self._last = record
        self._pace.add(record["step"], record["tokens"], record["time"])
        due = self._now() - self._printed >= PLAIN_SECONDS or record["step"] >= self._until
        if not self._console.is_terminal and due:
            self._printed = self._now()
            self.say(self._line())

    def saved(self, step: int) -> None:
        """A checkpoint is committed."""
        self._saved = step
        if not self._console.is_terminal:
            self.say(f"checkpoint at step {step} committed")

    def _line(self) -> str:
        return (
            f"step {self._last['step']}/{self._until}  loss {self._last['loss']:.4f}  "
            f"{self._pace.tokens_per_second:,.0f} tokens/s  ETA {clock(self._pace.eta_seconds)}"
        )

    def _render(self) -> Table:
        table = Table(title=self._title, title_justify="left", box=None)
        for heading in ("step", "", "loss", "tokens/s", "ETA", "last checkpoint"):
            table.add_column(heading)
        step = self._last.get("step", 0)
        table.add_row(
            f"{step}/{self._until}",
            ProgressBar(total=self._until, completed=step, width=30),
            f"{self._last['loss']:.4f}" if self._last else "--",
            f"{self._pace.tokens_per_second:,.0f}",
            clock(self._pace.eta_seconds),
            "--" if self._saved is None else f"step {self._saved}",
        )
        return table
