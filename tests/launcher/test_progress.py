import io

import pytest
from rich.console import Console

from armillary.launcher.plot import smooth
from armillary.launcher.progress import Pace, View, clock


def test_pace_is_that_of_the_last_steps():
    pace = Pace(100)
    assert pace.tokens_per_second == 0
    assert pace.eta_seconds is None
    for step in range(1, 61):
        pace.add(step, step * 1000, at=step * 0.5)
    assert pace.tokens_per_second == pytest.approx(2000)
    assert pace.eta_seconds == pytest.approx(20)


@pytest.mark.parametrize(("seconds", "shown"), [(None, "--"), (0, "0:00"), (61.4, "1:01"), (3661, "1:01:01")])
def test_clock(seconds, shown):
    assert clock(seconds) == shown


def record(step):
    return {"step": step, "loss": 1.5, "tokens": 100 * step, "time": float(step)}


def test_plain_lines_come_now_and_then_where_there_is_no_terminal():
    out, now = io.StringIO(), [0.0]
    with View("run", 50, Console(file=out, width=100), now=lambda: now[0]) as view:
        for step in range(1, 51):
            now[0] += 1
            view.step(record(step))
        view.saved(50)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/50", "11/50", "21/50", "31/50", "41/50", "50/50"]
    assert "loss 1.5000" in lines[1]
    assert "100 tokens/s" in lines[1]
    assert "ETA 0:39" in lines[1]
    assert lines[-1] == "checkpoint at step 50 committed"


def test_a_terminal_shows_one_view_with_everything():
    out = io.StringIO()
    with View("the run", 50, Console(file=out, force_terminal=True, width=120)) as view:
        view.step(record(1))
        view.step(record(2))
        view.saved(2)
    shown = out.getvalue()
    for word in ("the run", "2/50", "1.5000", "100", "0:48", "step 2"):
        assert word in shown


def test_smooth_is_a_trailing_mean():
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
