"""How a run stands, by its events, and what its driver tells Prometheus of them."""

import json
import threading
import time

import pytest
from prometheus_client import CollectorRegistry

from armillary.launcher.follow import Reader, follow
from armillary.launcher.job import resolve
from armillary.launcher.run import Run
from armillary.launcher.run_metrics import RunCollector, serving
from armillary.launcher.standing import STATES, Standing, rows, told
from armillary.training.config import MetricsConfig
from tests.training.test_metrics import scrape

LAYOUT = {"world_size": 2}


def event(kind: str, at: float = 0.0, /, **fields) -> dict:
    return {"time": 1000.0 + at, "event": kind} | fields


def step(number: int, at: float) -> dict:
    return event("step", at, step=number, loss=3.0 - number / 10, tokens=100 * number, seconds=1.0)


LAUNCH = event("launch", generation=0, layout=LAYOUT, from_step=0, until=10)
LOST = event("verdict", 5, kind="lost node", what="it is gone", remedy="nothing")
STORY = [  # (what happens next, the state then, the step then)
    (LAUNCH, "starting", 0),
    (step(1, 1), "training", 1),
    (step(2, 2), "training", 2),
    (event("checkpoint", 3, step=2, path="/c"), "training", 2),
    (step(3, 4), "training", 3),
    (LOST, "training", 3),
    (event("failed", 5, generation=0, error="it is gone"), "failed", 3),
    (event("restart", 6, seconds=1.0, from_step=2, reason="it is gone"), "waiting", 3),
    (event("waiting", 7, reason="too few"), "waiting", 3),
    (event("launch", 8, generation=1, layout={"world_size": 1}, from_step=2, until=10), "starting", 2),
    (step(3, 9), "training", 3),
    (event("verdict", 9, kind="spike", what="high", remedy="wait", action="skip"), "training", 3),
    (event("ended", 10, generation=1, step=5, interrupted=True), "stopped", 5),
    (event("launch", 20, generation=2, layout=LAYOUT, from_step=5, until=10), "starting", 5),
    (event("ended", 30, generation=2, step=10, interrupted=False), "done", 10),
]


def test_each_event_leads_on():
    standing = Standing(10)
    assert standing.state == "new"
    for number, (what, state, at) in enumerate(STORY):
        standing.add(what)
        assert (standing.state, standing.step) == (state, at), number
        assert standing.state in STATES
        told(what)
    assert (standing.restarts, standing.generation, standing.ranks) == (1, 2, 2)
    assert standing.verdict["kind"] == "spike"


def test_figures_are_of_the_launch_at_work():
    standing = Standing(10)
    for what, _, _ in STORY[:5]:
        standing.add(what)
    known = standing.as_dict(now=1013.0)
    assert known["tokens_per_second"] == pytest.approx(200 / 3, abs=0.1), "steps 1 to 3, from second 1 to 4"
    assert known["eta_seconds"] == pytest.approx(7 * 1.5)
    assert known["checkpoint_age_seconds"] == 10
    assert rows(known)["pace"] == "67 tokens/s, ETA 0:10"
    assert json.loads(json.dumps(known)) == known
    standing.add(STORY[9][0])
    assert standing.as_dict(now=1013.0)["tokens_per_second"] is None


def test_steps_that_are_told_at_once_took_their_time_all_the_same():
    standing = Standing(10)
    for what in (LAUNCH, step(1, 4), step(2, 4), step(3, 4)):
        standing.add(what)
    assert standing.as_dict(now=1005.0)["tokens_per_second"] == 100.0


@pytest.fixture
def run(tmp_path):
    """One with a job and no events."""
    made = Run(tmp_path / "the-run")
    made.path.mkdir()
    made.write_job(resolve({"parallel": {"data": 3}, "training": {"global_batch": 9}}, "test"))
    return made


def write(run: Run, *events: dict) -> None:
    with open(run.events_file, "a") as file:
        file.writelines(json.dumps(one) + "\n" for one in events)


def values(registry: CollectorRegistry) -> dict:
    """By name, and by the label that is not the run."""
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            assert sample.labels.pop("run") == "the-run"
            found[sample.name, *sample.labels.values()] = sample.value
    return found


def test_the_drivers_metrics_are_what_the_events_come_to_and_never_go_back(run):
    def registry():
        one = CollectorRegistry()
        one.register(RunCollector(run, 10, 3))
        return one

    ours, before = registry(), {}
    for what, state, at in STORY:
        write(run, what)
        found = values(ours)
        assert found["armillary_run_state", state] == 1
        assert sum(found["armillary_run_state", one] for one in STATES) == 1
        assert found["armillary_run_step",] == at
        fallen = [key for key in before if key[0].endswith("_total") and found[key] < before[key]]
        assert not fallen
        assert values(registry()) == found, "another process, which reads from the start, says the same"
        before = found
    assert found["armillary_run_restarts_total",] == 1
    assert found["armillary_run_launches_total",] == 3
    assert found["armillary_run_verdicts_total", "lost node"] == 1
    assert found["armillary_run_verdicts_total", "hung rank"] == 0
    assert found["armillary_run_skipped_steps_total",] == found["armillary_run_spike_steps_total",] == 1
    assert found["armillary_run_checkpoint_step",] == 2
    assert found["armillary_run_checkpoint_last_success_timestamp_seconds",] == 1003
    assert found["armillary_run_ranks",] == 0
    assert found["armillary_run_ranks_planned",] == 3


def test_they_are_served_and_signed_in_where_there_is_a_place_for_it(run, tmp_path, monkeypatch):
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv("ARMILLARY_METRICS", str(tmp_path / "metrics"))
    write(run, LAUNCH)
    with serving(run, MetricsConfig(), 10, 3) as address:
        assert scrape(address)["armillary_run_ranks"][0].value == 2
        assert json.loads((tmp_path / "metrics" / "run").read_text())["address"] == address
    assert not (tmp_path / "metrics" / "run").exists()


def test_events_are_read_once_and_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    reader = Reader(path)
    assert list(reader.events()) == [], "there is no file yet"
    path.write_text('{"a": 1}\n{"a": ')
    assert list(reader.events()) == [{"a": 1}]
    with open(path, "a") as file:
        file.write('2}\n{"a": cut off\n{"a": 3}\n')
    assert list(reader.events()) == [{"a": 2}, {"a": 3}]


def test_who_follows_sees_what_comes_until_the_end(tmp_path):
    path, ended, seen = tmp_path / "events.jsonl", threading.Event(), []

    def read():
        seen.extend(one for one in follow(path, ended) if one is not None)

    thread = threading.Thread(target=read)
    thread.start()
    path.write_text('{"a": 1}\n')
    time.sleep(0.1)
    with open(path, "a") as file:
        file.write('{"a": 2}\n')
    ended.set()
    thread.join(5)
    assert seen == [{"a": 1}, {"a": 2}]
