"""What a run may change when it goes on."""

import pytest
from rich.console import Console

from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.folder import LocalFolder
from armillary.data_pipeline.mixture import BLOCK_ROWS, ORDER
from armillary.data_pipeline.shards import read_manifest
from armillary.errors import DataError, JobError
from armillary.launcher.job import resolve
from armillary.launcher.run import Run
from armillary.launcher.train import check_edits, go_on, resumable_job
from armillary.training.checkpoint.manifest import State
from armillary.training.checkpoint.manifest import read_manifest as read_checkpoint

BLOCK = BLOCK_ROWS * 128  # positions of a block of the tiny job


@pytest.fixture
def run(tables, shards, tmp_path):
    """A run whose checkpoint stands in the third block."""
    run = Run.create(tmp_path / "run", resolve(tables, "test"), read_manifest(LocalFolder(shards)))
    checkpoint_of(run, ORDER)
    return run


def checkpoint_of(run, order, job=None):
    state = State(
        step=5, cursor=Cursor(block=2, row=7), data_order=order, tokens=1, loss=1.0, run="run", job_hash="",
        job=job or {}, saved_at=0.0,
    )  # fmt: skip
    run.store().put("step-00000005/g000-r00000.json", b"[]")
    run.commit("step-00000005", state, 0, 1, run.job().checkpoint)


def changed(run, *overrides):
    return resumable_job(run, run.job(list(overrides)), state_of(run))


def state_of(run):
    return read_checkpoint(run.latest()).state


def schedule(position):
    return f"data.schedule=[{{from_positions={position}, weights={{pydoc=9.0}}}}]"


def test_the_schedule_may_change_where_no_data_was_drawn_yet(run):
    assert changed(run, schedule(2 * BLOCK + 1)).data.schedule[0].weights == {"pydoc": 9.0}
    for position in (1, BLOCK, 2 * BLOCK):
        with pytest.raises(JobError, match=r"another data\.schedule"):
            changed(run, schedule(position))


def test_a_checkpoint_of_another_order_of_the_data_is_refused(run):
    checkpoint_of(run, ORDER - 1)
    with pytest.raises(DataError, match=f"came in order {ORDER - 1}, this version has {ORDER}"):
        changed(run)


def test_a_job_that_was_changed_by_hand_is_refused_until_it_is_meant(tables, shards, tmp_path):
    job = resolve(tables, "test")
    run = Run.create(tmp_path / "run", job, read_manifest(LocalFolder(shards)))
    checkpoint_of(run, ORDER, job.train_job().model_dump(mode="json"))
    check_edits(run, (), state_of(run))
    file = run.path / "job.toml"
    text = file.read_text()
    file.write_text(text.replace("learning_rate = 0.01", "learning_rate = 0.02").replace("every = 100", "every = 50"))
    with pytest.raises(JobError, match=r"made with: optimizer\.learning_rate, checkpoint\.every"):
        check_edits(run, (), state_of(run))
    with pytest.raises(JobError, match=r"made with: checkpoint\.every"):
        check_edits(run, ["optimizer.learning_rate"], state_of(run))
    check_edits(run, ["optimizer.learning_rate", "checkpoint.every"], state_of(run))
    run.write_job(run.job())
    check_edits(run, (), state_of(run))


def test_a_resume_builds_nothing(run, tmp_path):
    with pytest.raises(DataError, match="the run's shards are not here"):
        changed(run, f'data.path="{tmp_path}/nowhere"')
    assert not (tmp_path / "nowhere").exists()


def test_threads_may_change_and_what_makes_the_data_may_not(run):
    assert changed(run, "data.threads=7").data.threads == 7
    for override in (
        "data.vocab_size=300",
        "data.packing=best_fit",
        "data.shuffle_shards=2",
        "data.seq_length=256",
        "model.depth=4",
    ):
        with pytest.raises(JobError, match="cannot be resumed with another"):
            changed(run, override)


def test_where_nobody_looks_a_refusal_is_an_event(run):
    other = run.job(["model.depth=4"])
    for _ in range(2):
        with pytest.raises(JobError, match=r"another model\.depth"):
            go_on(run.path, other, Console(quiet=True), fewer=False, patience=1)
    assert run.last_event == "failed"
    assert len(list(run.events("failed"))) == 1
    with run.locked(), pytest.raises(JobError, match="being trained already"):
        go_on(run.path, run.job(), Console(quiet=True), fewer=False, patience=0.1)
    assert len(list(run.events("failed"))) == 1, "whoever holds it goes on"
