"""What the submitter's pod shows, whatever becomes of the stream; under a real Ray in test_pods.py."""

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.errors import ClusterError, JobError
from armillary.launcher import submitter


async def stream(texts: list[str], until: int):
    """So many of these, then it breaks."""
    for text in texts[:until]:
        yield text
    if until < len(texts):
        raise RuntimeError("WebSocket connection closed unexpectedly")


@given(texts=st.lists(st.text(max_size=5), max_size=8), data=st.data())
def test_a_stream_that_breaks_is_read_again_and_nothing_is_said_twice_or_left_out(texts, data):
    said, shown = [], 0
    breaks = [*data.draw(st.lists(st.integers(0, len(texts)), max_size=4)), len(texts)]
    for until in breaks:
        chunks = data.draw(st.sampled_from([texts, ["".join(texts)], list("".join(texts))]))
        shown, whole = asyncio.run(submitter.show(stream(chunks, min(until, len(chunks))), shown, said.append))
        assert whole == (until >= len(chunks))
    assert asyncio.run(submitter.show(stream(texts, len(texts)), shown, said.append)) == (len("".join(texts)), True)
    assert "".join(said) == "".join(texts)


def test_a_stream_that_says_nothing_any_more_is_dead(monkeypatch):
    async def stuck():
        yield "one"
        await asyncio.sleep(60)

    monkeypatch.setattr(submitter, "SILENCE", 0.1)
    assert asyncio.run(submitter.show(stuck(), 0, lambda text: None)) == (3, False)


class Head:
    """Ray's head, as far as it is asked: `lives` are what the log is in each, before the head is lost, which takes
    `seconds`."""

    def __init__(self, lives: list[list[str]], ends: list[bool], seconds: float = 0.0):
        self.lives, self.ends, self.seconds, self.submitted, self.life = lives, ends, seconds, [], -1
        self.gone = False

    def __call__(self, address: str) -> "Head":
        if self.life >= 0 and not self.gone:
            self.gone = True
            raise ConnectionError("nobody answers until there is another one")
        self.life, self.gone = self.life + 1, False
        return self

    def list_jobs(self) -> list:
        return [SimpleNamespace(submission_id=job) for job, life in self.submitted if life == self.life]

    def submit_job(self, entrypoint: str, submission_id: str) -> None:
        self.submitted.append((submission_id, self.life))

    async def tail_job_logs(self, job: str):
        for text in self.lives[self.life]:
            yield text
        await asyncio.sleep(self.seconds)
        if not self.ends[self.life]:
            raise RuntimeError("closed")

    def get_job_status(self, job: str):
        return SimpleNamespace(is_terminal=lambda: self.ends[self.life])


def test_a_head_that_was_made_anew_gets_the_command_again(monkeypatch):
    head, said = Head([["one\n"], ["two\n", "three\n"]], [False, True], 0.3), []
    monkeypatch.setattr(submitter, "PATIENCE", 0.2)  # shorter than what went before
    monkeypatch.setattr(submitter, "JobSubmissionClient", head)
    monkeypatch.setattr(submitter, "AGAIN_SECONDS", 0.0)
    submitter.see_through("http://head", "job", "do it", said.append)
    assert head.submitted == [("job", 0), ("job", 1)]
    assert "".join(said) == "one\ntwo\nthree\n"


def test_a_head_that_never_answers_is_told(monkeypatch):
    monkeypatch.setattr(submitter, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(submitter, "PATIENCE", 0.2)
    with pytest.raises(ClusterError, match="Ray's head does not answer"):
        submitter.see_through("http://127.0.0.1:9", "job", "do it", print)


def test_outside_of_its_pod_it_says_so(monkeypatch):
    monkeypatch.delenv("RAY_DASHBOARD_ADDRESS", raising=False)
    with pytest.raises(JobError, match="RAY_DASHBOARD_ADDRESS"):
        submitter.submit("do it")
