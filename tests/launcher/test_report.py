"""The page of a run: its figures against the events, and that it is whole in itself."""

import html.parser
import json
import re

import pytest

from armillary.launcher.job import resolve
from armillary.launcher.report import html as page
from armillary.launcher.report import idle, thinned, time_spent
from armillary.launcher.run import Run
from tests.conftest import refused

STEPS = 2000
NASTY = "<script>alert(1)</script>&\"'"


def step(number: int) -> dict:
    return {
        "time": 100.0 + number, "event": "step", "step": number, "loss": 5 - number / 1000,
        "source_loss": {"text": 2.0}, "grad_norm": 1.0 + number % 3, "learning_rate": 1e-3, "tokens": 512 * number,
        "seconds": 0.9,
        "compute_seconds": 0.5, "collective_wait_seconds": 0.1, "reduce_seconds": 0.2, "data_wait_seconds": 0.05,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Two launches; the first one's last hundred steps were lost."""
    made = Run(tmp_path / "the-run")
    (made.path / "checkpoints").mkdir(parents=True)
    sources = [{"kind": "pydoc", "name": "text", "weight": 3.0}, {"kind": "easy_vqa", "weight": 1.0}]
    made.write_job(resolve({"data": {"sources": sources}, "training": {"steps": STEPS}}, "test"))
    layout = {"world_size": 1}
    verdict = {"time": 1205.0, "event": "verdict", "kind": "lost node", "what": NASTY, "remedy": "none"}
    events = [
        {"time": 100.0, "event": "launch", "generation": 0, "layout": layout, "from_step": 0, "until": STEPS},
        *map(step, range(1, 1101)),
        verdict,
        {"time": 1210.0, "event": "launch", "generation": 1, "layout": layout, "from_step": 1000, "until": STEPS},
        *(step(number) | {"time": 300.0 + number} for number in range(1001, STEPS + 1)),
        {"time": 2310.0, "event": "ended", "generation": 1, "step": STEPS, "interrupted": False},
    ]
    made.events_file.write_text("".join(json.dumps(event) + "\n" for event in events))
    return made


class Reader(html.parser.HTMLParser):
    """Tags, and the text of each table's rows by its id."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.tables, self._table = [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href") and value]
        if tag == "table":
            self._table = self.tables.setdefault(found.get("id", ""), [])
        if tag == "tr":
            self._table.append([])
        if tag in ("td", "th"):
            self._table[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None

    def handle_data(self, data):
        if self._table and self._table[-1]:
            self._table[-1][-1] += data.strip()


def test_the_page_is_whole_in_itself_and_shows_what_was(run):
    text = page(run)
    read = Reader(text)
    assert read.tags.count("svg") == 5
    assert not [link for link in read.links if not link.startswith("#")], "nothing is fetched from anywhere"
    assert not re.search(r"url\((?!#)", text)
    assert "script" not in read.tags, "what an event says is text"
    assert ["step", "2,000 of 2,000"] in read.tables["status"]
    assert [row[1:] for row in read.tables["events"][1:]] == [
        ["launch", "1 rank from step 0"], ["verdict", f"lost node: {NASTY}; to do: none"],
        ["launch", "1 rank from step 1000"], ["ended", "ended at step 2000"],
    ]  # fmt: skip
    assert read.tables["data"][1:] == [["text", "pydoc", "75.0%", "2.0000"], ["easy_vqa", "easy_vqa", "25.0%", "--"]]
    assert len(text) < 400_000


def test_where_the_time_went_adds_up(run):
    spent = dict((what, seconds) for what, seconds, _ in time_spent(run.curve(), list(run.events())))
    assert spent["forward and backward passes"] == pytest.approx(0.5 * STEPS)
    assert spent["waiting for data"] == pytest.approx(0.05 * STEPS)
    assert spent["the rest of the steps"] == pytest.approx(0.05 * STEPS)
    assert sum(spent.values()) == pytest.approx(2310 - 100)


def test_a_night_between_two_launches_is_told_apart_from_a_fault(run):
    def events(*kinds: str) -> list[dict]:
        return [{"time": 100.0 * at, "event": kind, "interrupted": True} for at, kind in enumerate(kinds)]

    assert idle(events("launch", "ended", "launch", "failed", "launch")) == 200.0
    assert idle(events("launch", "failed", "restart", "launch", "verdict", "launch")) == 0.0
    assert idle(events("launch", "ended")) == 0.0
    night = [{"time": 2400.0, "event": "ended", "interrupted": True}, {"time": 9400.0, "event": "launch"}]
    spent = dict((what, seconds) for what, seconds, _ in time_spent(run.curve(), [*run.events(), *night]))
    assert spent["suspended, or failed"] == 7000.0
    assert sum(spent.values()) == pytest.approx(9400 - 100)


def test_few_points_stand_for_many():
    assert thinned([1.0, 2.0, 3.0], 600) == [1.0, 2.0, 3.0]
    many = thinned(list(range(10_000)), 600)
    assert len(many) <= 600
    assert many[0] == pytest.approx(8.0)


def test_a_run_without_a_step_has_a_page_too(run):
    run.events_file.unlink()
    assert "No step has been done yet" in page(run)


def test_the_command_writes_it(run, armillary, tmp_path):
    done = armillary("report", "the-run")
    assert done.returncode == 0, done.stderr
    assert (run.path / "report.html").read_text().startswith("<!DOCTYPE html>")
    refused(armillary("report", "the-run", "--out", "no/such/place.html"), "cannot be written", "--out")
    refused(armillary("report", "nothing"), "there is no run here")
