"""Who is stuck, who is slow, which step is bad: the decisions, and the reports that they are made from."""

import math
import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.training.health import (
    LEAST_RECENT,
    PROBES,
    RECENT,
    Heartbeat,
    Verdict,
    bad_step,
    stragglers,
    stuck,
)


def report(silent=10.0, waits="all_reduce", step=5, phase="reduce"):
    return {"step": step, "phase": phase, "silent": silent, "waits": waits, "line": "a.py:1 f: g()"}


def test_a_run_is_stuck_only_when_no_rank_moves():
    assert stuck([report(), report(silent=1.0)], 5.0) is None
    assert stuck([report(), None], 5.0) == [1], "which does not answer"
    assert stuck([report(silent=1.0), None], 5.0) is None, "a rank that moves may be about to hear of it"
    assert stuck([None, None], 5.0) == [0, 1]


def test_the_stuck_rank_is_the_one_that_waits_for_nobody_or_is_behind():
    assert stuck([report(), report(waits="", phase="data"), report()], 5.0) == [1]
    assert stuck([report(step=6, phase="data"), report(step=5, phase="reduce")], 5.0) == [1]
    assert stuck([report(phase="reduce"), report(phase="compute")], 5.0) == [1]
    assert stuck([report(), report()], 5.0) == [], "each waits for the other: the network"
    assert stuck([report(waits=""), report(waits="", step=4), report()], 5.0) == [1], "of two that wait for nobody"
    assert stuck([report(waits="")] * 2, 5.0) == [], "both are in something that they share"


def test_a_heartbeat_tells_where_its_thread_is_from_another_thread():
    beat, held = Heartbeat(), threading.Event()

    def work():
        beat.enter("data")
        held.wait()

    thread = threading.Thread(target=work)
    thread.start()
    while beat.phase != "data":
        time.sleep(0.01)
    time.sleep(0.05)
    found = beat.report()
    held.set()
    thread.join()
    assert found["phase"] == "data"
    assert found["silent"] >= 0.05
    assert found["waits"] == ""
    assert "wait" in found["line"]


def test_a_straggler_is_slow_over_many_probes_and_not_in_one():
    even, slow = [0.010, 0.011, 0.010, 0.012], [0.010, 0.020, 0.010, 0.012]
    assert stragglers([slow] * (PROBES - 1)) == {}
    assert stragglers([slow] * PROBES) == {1: pytest.approx(2.0)}
    assert stragglers([*[slow] * PROBES, *[even] * PROBES]) == {}
    assert stragglers([*[even] * PROBES, *[slow] * PROBES]) == {1: pytest.approx(2.0)}
    assert stragglers([*[even] * (PROBES - 2), [0.01, 9.0, 0.01, 0.01], [0.01, 9.0, 0.01, 0.01]]) == {}, "disturbed"
    assert set(stragglers([slow[:2]] * PROBES)) == {1}, "of two, the slower one"


@given(st.lists(st.lists(st.floats(0.009, 0.013), min_size=3, max_size=3), min_size=PROBES, max_size=12))
def test_noise_makes_no_straggler(probes):
    assert stragglers(probes) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_bad_whatever_came_before(bad):
    assert bad_step(bad, 1.0, [], 0.0) == "non-finite"
    assert bad_step(1.0, bad, [(1.0, 1.0)] * RECENT, 5.0) == "non-finite"


def test_a_spike_is_far_above_the_last_steps_and_needs_enough_of_them():
    chance = random.Random(0)
    recent = [(chance.gauss(3.0, 0.1), chance.gauss(1.0, 0.2)) for _ in range(RECENT)]
    assert bad_step(3.2, 1.0, recent, 6.0) == ""
    assert bad_step(4.0, 1.0, recent, 6.0) == "spike"
    assert bad_step(3.0, 3.0, recent, 6.0) == "spike", "of the gradient norm"
    assert bad_step(1.0, 0.1, recent, 6.0) == "", "better is no spike"
    assert bad_step(4.0, 1.0, recent, 0.0) == "", "switched off"
    assert bad_step(4.0, 1.0, recent[: LEAST_RECENT - 1], 6.0) == ""
    spoiled = recent[:-10] + [(50.0, 50.0)] * 10
    assert bad_step(4.0, 1.0, spoiled, 6.0) == "spike", "earlier ones hide it not"


def test_a_verdict_says_what_is_known():
    verdict = Verdict("hung rank", "rank 3 is stuck", "look", rank=3, node="abcdefghij", phase="data", step=7)
    assert verdict.line() == "hung rank: rank 3 is stuck (rank 3, node abcdefgh, phase data, step 7); to do: look"
    assert set(verdict.as_dict()) == {"kind", "what", "remedy", "rank", "node", "phase", "step"}
