"""A bad step leaves no trace in the weights, under every engine; too many end the launch."""

import json
import math
import threading
import time

import pytest
import torch
import torch.distributed as dist

from armillary.data_pipeline.cursor import Cursor
from armillary.errors import LossError
from armillary.launcher.job import resolve
from armillary.storage import LocalStorage
from armillary.training.checkpoint.load import Reader
from armillary.training.health import MOST_SKIPPED, heartbeat, stuck
from armillary.training.layout import Layout
from armillary.training.loop import Assignment, Trainer
from armillary.training.metrics import Metrics
from armillary.training.process_group import Rank, join
from armillary.training.watch import Watch
from tests.conftest import free_port
from tests.groups import checkpoint_of, in_group

CASES = [
    ({"data": 2}, {}),
    ({"data": 2}, {"deterministic": True}),
    ({"data": 2}, {"precision": "bf16"}),
    ({"data": 2, "engine": "deepspeed"}, {}),
    ({"data": 2, "engine": "deepspeed"}, {"deterministic": True}),
    ({"data": 2, "zero": 2}, {}),
    ({"data": 2, "zero": 2, "offload": True}, {"precision": "bf16"}),
    ({"data": 2, "zero": 3}, {"precision": "bf16"}),
    ({"data": 2, "zero": 3}, {"deterministic": True}),
    ({"tensor": 2}, {}),
    ({"pipeline": 2}, {}),
]


class Poisoned:
    """A rank's data, of which the labels of one micro-batch weigh nothing that is a number."""

    def __init__(self, data):
        self._data = data

    def __next__(self):
        step = next(self._data)
        return step.__class__(**vars(step) | {"micro_batches": self._spoil(step.micro_batches)})

    def _spoil(self, batches):
        for batch in batches:
            batch.mask_values.fill_(math.nan)
            yield batch


def trainer_of(tables, rank, parallel, training, folder, **assigned):
    tables = tables | {"parallel": parallel, "training": tables["training"] | training}
    job = resolve(tables, "test").train_job()
    join(rank, job.parallel)
    return Trainer(Assignment("test", job, "hash", rank, folder, assigned.pop("resume", None), 6, **assigned))


def skip_one(rank, tables, out):
    """Two good steps, one that is no number, a spike, and a good one; the state before and after the bad ones. The last
    step too by a trainer that begins there and is told to leave out the bad ones' data."""
    for number, (parallel, training) in enumerate(CASES):
        folder = out / str(number)
        trainer = trainer_of(tables, rank, parallel, training, folder)
        records = [trainer.train_step()[0] for _ in range(2)]
        checkpoint_of(trainer, folder / "before")
        good, trainer.data = trainer.data, Poisoned(trainer.data) if rank.rank == 1 else trainer.data
        records += [trainer.train_step()[0]]
        trainer.data = good
        judge, trainer._bad = trainer._bad, lambda loss, grad_norm: "spike"
        records += [trainer.train_step()[0]]
        trainer._bad = judge
        checkpoint_of(trainer, folder / "after")
        after = trainer.cursor
        records += [trainer.train_step()[0] for _ in range(2)]
        trainer.close()
        again = trainer_of(tables, rank, parallel, training, folder, resume=folder / "after")
        records += [again.train_step()[0] for _ in range(2)]
        again.close()
        other = trainer_of(tables, rank, parallel, training, folder, resume=folder / "before", beyond=after)
        records += [other.train_step()[0]]
        other.close()
        if rank.rank == 0:
            (folder / "records.json").write_text(json.dumps(records))
    tell_where(rank, out)


def tell_where(rank, out):
    """Rank 1 is busy with something of its own, rank 0 waits for it: what both tell meanwhile."""
    heartbeat.enter("reduce" if rank.rank == 0 else "data")
    teller = threading.Timer(1.0, lambda: (out / f"{rank.rank}.json").write_text(json.dumps(heartbeat.report())))
    teller.start()
    if rank.rank == 1:
        time.sleep(5.0)
    dist.all_reduce(torch.zeros(1))
    teller.join()


def test_of_ranks_that_wait_the_one_that_waits_for_nobody_is_stuck(skipped):
    reports = [json.loads((skipped / f"{rank}.json").read_text()) for rank in range(2)]
    assert [report["phase"] for report in reports] == ["reduce", "data"]
    assert reports[0]["waits"] == "all_reduce"
    assert "test_watch.py" in reports[0]["line"]
    assert reports[1]["waits"] == ""
    assert "time.sleep(5.0)" in reports[1]["line"]
    assert min(report["silent"] for report in reports) > 0.5
    assert stuck(reports, 0.5) == [1]
    assert stuck(reports, 60.0) is None


@pytest.fixture(scope="module")
def skipped(tables, tmp_path_factory):
    out = tmp_path_factory.mktemp("skipped")
    in_group(2, free_port(), skip_one, tables, out)
    return out


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_bad_step_changes_no_bit(skipped, number):
    folder = skipped / str(number)
    *good, bad, spike, after, last, again, last_again, other = json.loads((folder / "records.json").read_text())
    assert [record["bad"] for record in (bad, spike)] == ["non-finite", "spike"]
    assert math.isfinite(spike["loss"] + spike["grad_norm"])
    assert not any(record["bad"] for record in (*good, after, last, other))
    for one, resumed in ((after, again), (last, last_again)):  # whose optimizer has counted its updates alike
        assert (one["loss"], one["grad_norm"], one["cursor"]) == (
            resumed["loss"],
            resumed["grad_norm"],
            resumed["cursor"],
        )
    before, later = (Reader(LocalStorage(folder / name)) for name in ("before", "after"))
    assert before.keys
    assert before.keys == later.keys
    assert all(before.content(key) == later.content(key) for key in before.keys)
    assert math.isfinite(after["loss"])
    assert after["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert after["cursor"] == other["cursor"]
    assert later.manifest.state.loss == good[-1]["loss"], "of the last step that counts"


class Told:
    def __init__(self):
        self.verdicts = []

    def verdict(self, verdict):
        self.verdicts.append(verdict)


@pytest.mark.parametrize("action", ["stop", "skip", "rewind"])
def test_what_follows_a_bad_step_is_the_jobs_to_say(tables, tmp_path, action):
    trainer = trainer_of(tables, Rank(), {}, {"bad_step": action}, tmp_path)
    told, metrics = Told(), Metrics("run", 0, Layout(), 0)
    watch, good = Watch(trainer, told, metrics), trainer.data
    trainer.data = Poisoned(good)
    if action == "skip":
        for _ in range(MOST_SKIPPED):
            watch.after_step(trainer.train_step()[0])
        trainer.data = good
        watch.after_step(trainer.train_step()[0])
        trainer.data = Poisoned(good)
        for _ in range(MOST_SKIPPED):
            watch.after_step(trainer.train_step()[0])
        assert {one.action for one in told.verdicts} == {"skip"}
    with pytest.raises(LossError, match="the loss is nan"):
        watch.after_step(trainer.train_step()[0])
    last = told.verdicts[-1]
    assert (last.kind, last.step) == ("non-finite", trainer.step)
    assert last.action == ("rewind" if action == "rewind" else "stop")
    assert Cursor(**last.cursor) == trainer.cursor
    good.close()


def test_recent_steps_are_saved_so_that_a_resumed_run_sees_the_same_spikes(tables, tmp_path):
    trainer = trainer_of(tables, Rank(), {}, {"spike": 5.0}, tmp_path)
    records = [trainer.train_step()[0] for _ in range(3)]
    checkpoint_of(trainer, tmp_path / "saved")
    trainer.close()
    assert trainer.state().recent == tuple((record["loss"], record["grad_norm"]) for record in records)
    other = trainer_of(tables, Rank(), {}, {"spike": 5.0}, tmp_path, resume=tmp_path / "saved")
    assert other.state().recent == trainer.state().recent
    other.close()
