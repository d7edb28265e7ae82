"""Every layout computes what a plain PyTorch model computes in one process: loss, gradient norm, weights."""

import json
from pathlib import Path

import pytest
import torch

from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.loader import Loader
from armillary.launcher.job import resolve
from armillary.model.coordinates import placements
from armillary.training import cpu_runtime
from armillary.training.checkpoint.load import Reader
from armillary.training.layout import Layout
from armillary.training.loop import Assignment, Trainer, build_model
from armillary.training.process_group import Rank, join
from tests.conftest import free_port
from tests.groups import checkpoint_of, in_group
from tests.reference import Reference

STEPS = 5
TOLERANCE = 1e-5  # relative, fp32
LAYOUTS = {
    1: [{}, {"micro_batch": 4}],
    2: [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True, "micro_batch": 2},
        {"pipeline": 2},
        {"data": 2},
        {"data": 2, "micro_batch": 2},
    ],
    4: [
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "data": 2},
        {"tensor": 2, "data": 2, "sequence_parallel": True},
        {"pipeline": 2, "data": 2},
        {"pipeline": 4},
    ],
}
CASES = [(world, number) for world, layouts in LAYOUTS.items() for number in range(len(layouts))]


def job_of(tables, **parallel):
    tables = tables | {
        "model": tables["model"] | {"depth": 4},
        "parallel": parallel,
        "optimizer": {"learning_rate": 3e-3, "clip_grad": 0.5, "warmup_steps": 2},
    }
    return resolve(tables, "test").train_job()


def train_layouts(rank, tables, out):
    """In a group: train each layout of this world size, and write its record and checkpoint."""
    for number, parallel in enumerate(LAYOUTS[rank.world_size]):
        job = job_of(tables, **parallel)
        join(rank, job.parallel)
        folder = out / f"{rank.world_size}-{number}"
        trainer = Trainer(Assignment("test", job, "hash", rank, folder / "staging", None, STEPS))
        records = [trainer.train_step(False)[0] for _ in range(STEPS)]
        checkpoint_of(trainer, folder / "staging", folder / "checkpoint")
        trainer.close()
        if rank.rank == 0:
            (folder / "records.json").write_text(json.dumps(records))
            (folder / "hits.json").write_text(json.dumps([list(hit) for hit in cpu_runtime.HITS]))


@pytest.fixture(scope="module")
def trained(tables, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("equality")
    for world in LAYOUTS:
        in_group(world, free_port(), train_layouts, tables, out)
    return out


@pytest.fixture(scope="module")
def reference(tables):
    """Losses, gradient norms and final weights of the plain model under plain AdamW."""
    job = job_of(tables)
    join(Rank(), Layout())
    initial = {place.name: p.detach() for p, place in placements(build_model(job, torch.device("cpu")))}
    model = Reference(job.model, initial)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": job.optimizer.weight_decay},
            {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(job.optimizer.beta1, job.optimizer.beta2),
        eps=job.optimizer.eps,
    )
    loader, cursor, records = Loader(job.data, job.image_shape), Cursor(), []
    for step in range(STEPS):
        rows, cursor = loader.plan.rows(cursor, job.training.global_batch)
        batch = loader.batch(rows)
        by_source = source_losses(model, batch, [source.name for source in job.data.sources])
        loss = model.loss(batch, batch.loss_mask_T.sum())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, job.optimizer.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = job.optimizer.rate(step, job.training.steps)
        optimizer.step()
        records.append((loss.item(), norm.item(), by_source))
    return records, model.state(), cursor


@torch.no_grad()
def source_losses(model, batch, kinds):
    """The mean loss over each source's learned tokens alone, of the sources that the batch has tokens of."""
    masks = {kind: batch.loss_mask_T * (batch.source_ids_T == number) for number, kind in enumerate(kinds)}
    return {
        kind: model.loss(batch._replace(mask_bounds=range(len(mask) + 1), mask_values=mask), mask.sum()).item()
        for kind, mask in masks.items()
        if mask.any()
    }


def named(case):
    world, number = case
    return "-".join(f"{key}{value}" for key, value in LAYOUTS[world][number].items()) or "one"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_layout_equals_the_plain_model(case, trained, reference):
    folder = trained / "{}-{}".format(*case)
    expected, weights, cursor = reference
    records = json.loads((folder / "records.json").read_text())
    for record, (loss, norm, by_source) in zip(records, expected, strict=True):
        assert norm > 0.5, "clipping must be at work"
        assert record["loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert record["source_loss"] == pytest.approx(by_source, rel=TOLERANCE)
        assert record["grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
    reader = Reader(folder / "checkpoint")
    assert reader.manifest.state.cursor == cursor
    assert {key.partition("/")[2] for key in reader.keys} == set(weights)
    for name, weight in weights.items():
        got = reader.whole(f"weight/{name}")
        assert (got - weight).norm() <= TOLERANCE * weight.norm(), name


def test_the_cpu_stand_ins_are_called_where_they_are_known_to_be(trained):
    """A new Megatron-core that calls CUDA elsewhere shows here before it shows in a wrong result."""
    called = {
        (where.rpartition(":")[0], what)
        for path in trained.glob("*/hits.json")
        for where, what in json.loads(path.read_text())
    }
    assert called == KNOWN_CALLS


KNOWN_CALLS = {
    ("pipeline_parallel/p2p_communication.py", "torch.cuda.current_device"),
    ("pipeline_parallel/p2p_communication.py", "torch.cuda.synchronize"),
    ("pipeline_parallel/schedules.py", "torch.zeros"),
    ("tensor_parallel/layers.py", "torch.cuda.current_device"),
    ("tensor_parallel/mappings.py", "torch.cuda.current_device"),
    ("tensor_parallel/random.py", "torch.cuda.get_rng_state"),
    ("tensor_parallel/random.py", "torch.cuda.manual_seed"),
    ("utils.py", "torch.cuda.current_device"),
}
