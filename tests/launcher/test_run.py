import pytest

from armillary.errors import CheckpointError, JobError
from armillary.launcher.job import resolve
from armillary.launcher.run import Run
from tests.data_pipeline.test_tokenizer import TOKENIZER


@pytest.fixture
def run(tables, tmp_path):
    return Run.create(tmp_path / "run", resolve(tables | {"parallel": {"tensor": 2}}, "test"), TOKENIZER.to_json())


def test_a_run_is_made_once(run, tables):
    with pytest.raises(JobError, match="exists already"):
        Run.create(run.path, resolve(tables, "test"), "")
    assert Run.open(run.path) == run
    assert run.tokenizer().encode("blue") == TOKENIZER.encode("blue")


def test_nothing_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no run here"):
        Run.open(tmp_path)
    with pytest.raises(CheckpointError, match="no run here"):
        Run.open(tmp_path / "missing")


def test_a_run_without_checkpoint_says_so(run):
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        run.latest()
    (run.path / "latest").write_text("../../elsewhere\n")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run.latest()


def test_overrides_change_the_layout_and_the_world_size_follows(run):
    assert run.job().parallel.world_size == 2
    assert run.job(["parallel.tensor=1"]).parallel.world_size == 1
    assert run.job(["parallel.data=2"]).parallel.world_size == 4
    job = run.job(["parallel.world_size=4"]).parallel
    assert (job.data, job.tensor, job.world_size) == (2, 2, 4)
    with pytest.raises(JobError, match="world_size=3"):
        run.job(["parallel.world_size=3"])


def test_a_torn_last_event_is_passed_over_and_a_redone_step_counts_once(run):
    for step, loss in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5)):
        run.event("step", step=step, loss=loss)
    run.event("checkpoint", step=2)
    with open(run.events_file, "a") as file:
        file.write('{"event": "step", "st')
    assert [(e["step"], e["loss"]) for e in run.curve()] == [(1, 5.0), (2, 4.5), (3, 3.0)]
    assert [e["step"] for e in run.events("checkpoint")] == [2]


def test_generations_count_up(run):
    numbers = [run.new_generation() for _ in range(3)]
    assert [number for number, _ in numbers] == [0, 1, 2]
    assert [folder.name for _, folder in numbers] == ["000", "001", "002"]
