"""The layouts that are compared with the plain model, and how: used by the tests and by `benchmarks.layouts`."""

import itertools
import json
import math
import operator
from pathlib import Path
from typing import NamedTuple

import torch

from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.loader import Loader
from armillary.launcher.job import resolve
from armillary.model.config import ModelConfig
from armillary.model.coordinates import placements
from armillary.model.flops import Work, model_flops
from armillary.storage import LocalStorage
from armillary.training import cpu_runtime
from armillary.training.checkpoint.load import Reader
from armillary.training.layout import Layout
from armillary.training.loop import Assignment, Trainer, build_model
from armillary.training.process_group import Rank, join
from armillary.training.support import FEATURES, Setting, problems
from tests.conftest import MODEL
from tests.groups import checkpoint_of
from tests.reference import Reference

STEPS = 5
SP = {"tensor": 2, "sequence_parallel": True}
UNEVEN = {"first_stage_layers": 1, "last_stage_layers": 3}
ZERO = {"engine": "deepspeed"}
MODELS = {
    "dense": {},
    "deep": {"depth": 6},
    "tied": {"tied_embeddings": True},
    "experts": {"num_experts": 4},
    "capacity": {"num_experts": 4, "experts_per_token": 1, "capacity_factor": 1.0},
    "tied experts": {"num_experts": 4, "experts_per_token": 1, "capacity_factor": 1.0, "tied_embeddings": True},
}
LAYOUTS = {  # by ranks, then by model
    1: {
        "dense": [{}, {"micro_batch": 4}, {"recompute": "selective"}, {"recompute": "full", **ZERO}, {"compile": True}],
        "tied": [{}],
        "experts": [{}, {"recompute": "full", "micro_batch": 2}],
        "capacity": [{}, {"micro_batch": 2, **ZERO}],
    },
    2: {
        "dense": [
            {"data": 2},
            {"data": 2, **ZERO},
            {"data": 2, "zero": 2, "micro_batch": 2},
            {"data": 2, "zero": 3},
            {"data": 2, "offload": True},
            {"data": 2, "precision": "bf16"},
            {"data": 2, "zero": 2, "precision": "bf16"},
            {"data": 2, "zero": 3, "offload": True, "recompute": "full"},
            {"tensor": 2},
            {**SP, "micro_batch": 2},
            {**SP, "compile": True, "recompute": "full"},
            {"pipeline": 2},
            {"pipeline": 2, "virtual": 2},
            {"pipeline": 2, **UNEVEN, **ZERO},
            {"context": 2},
            {"context": 2, "micro_batch": 2, "zero": 2},
        ],
        "deep": [{"pipeline": 2, "virtual": 2, "first_stage_layers": 2, "last_stage_layers": 4}],
        "tied": [{"pipeline": 2}, {"pipeline": 2, **ZERO}, {"data": 2, "zero": 3}],
        "experts": [
            {"data": 2, "expert": 2},
            {"context": 2, "expert": 2},
            {**SP, "expert": 2},
            {**SP, "expert": 2, "precision": "bf16"},
            {**SP, **ZERO},
            {"data": 2, "zero": 3},
            {"pipeline": 2, "virtual": 2, "recompute": "selective"},
        ],
        "capacity": [{"data": 2, "expert": 2}, SP, {"context": 2, "micro_batch": 2}],
    },
    4: {
        "dense": [
            {**SP, "pipeline": 2},
            {**SP, "data": 2, "zero": 3, "offload": True},
            {**SP, "data": 2, "recompute": "selective", **ZERO},
            {"data": 2, "pipeline": 2, "virtual": 2},
            {"data": 2, "pipeline": 2, "offload": True, "recompute": "full"},
            {"data": 2, "context": 2, "zero": 3},
            {"context": 4},
            {"pipeline": 4},
            {"data": 4, "zero": 2},
        ],
        "tied": [{"data": 2, "pipeline": 2}, {**SP, "pipeline": 2}],
        "experts": [
            {**SP, "data": 2, "expert": 4},
            {"data": 4, "expert": 2},
            {"data": 2, "pipeline": 2, "expert": 2, "recompute": "full"},
            {"context": 2, "pipeline": 2, "virtual": 2, "expert": 2},
        ],
        "capacity": [{**SP, "context": 2, "expert": 2}],
    },
}


class Case(NamedTuple):
    """One layout of one model; with `precision` and `compile`, which are keys of [training]."""

    ranks: int
    model: str
    layout: dict

    @property
    def name(self) -> str:
        said = [key if value is True else f"{key}={value}" for key, value in self.layout.items()]
        return f"{self.model}: {' '.join(said) or 'one process'}"

    @property
    def limits(self) -> "Errors":
        return BF16 if self.layout.get("precision") == "bf16" else TOLERANCE


CHOICES = (  # of which every allowed combination is made, for `covering`
    ({}, {"tensor": 2}, SP),
    ({}, {"pipeline": 2}, {"pipeline": 2, "virtual": 2}, {"pipeline": 2, **UNEVEN}),
    ({}, {"context": 2}),
    ({}, {"data": 2}),
    ({}, {"expert": 2}),
    ({}, ZERO, {"zero": 2}, {"zero": 3}, {"offload": True}, {"zero": 2, "offload": True}),
    ({}, {"recompute": "full"}),
    ({}, {"precision": "bf16"}),
)


def pairs(case: Case) -> set[tuple[str, str]] | None:
    """The pairs of features that a case has; None where it is not allowed."""
    dims = ModelConfig(**MODEL | {"depth": 4, "vocab_size": 512} | MODELS[case.model])
    layout = Layout(**{key: value for key, value in case.layout.items() if key not in ("compile", "precision")})
    setting = Setting(layout, dims, 128, 4, "precision" in case.layout, False, "compile" in case.layout)
    if layout.world_size > 4 or problems(setting):
        return None
    return set(itertools.combinations(sorted(name for name in FEATURES if FEATURES[name].used(setting)), 2))


def covering(given: list[Case]) -> list[Case]:
    """Layouts of CHOICES beside the given ones, as few as a greedy choice needs to have every pair of features that is
    allowed, in fp32 where it can be."""
    keys = [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*CHOICES)]
    every = [
        Case(Layout(**{key: one[key] for key in one if key != "precision"}).world_size, model, one)
        for model in ("tied", "tied experts") for one in keys
    ]  # fmt: skip
    found = [(case, own) for case in every if (own := pairs(case))]
    left = set().union(*(own for _, own in found)) - set().union(*map(pairs, given))
    chosen = []
    while left:
        case, own = max(found, key=lambda one: (len(one[1] & left), "precision" not in one[0].layout, -one[0].ranks))
        chosen.append(case)
        left -= own
    return chosen


CASES = [
    Case(ranks, model, layout)
    for ranks, models in LAYOUTS.items()
    for model, layouts in models.items()
    for layout in layouts
]
CASES += covering(CASES)


class Errors(NamedTuple):
    """How far a layout is from the plain model: relative, the worst of five steps, or of all weights after them."""

    loss: float
    source_loss: float
    norm: float
    weights: float


# In fp32, the same along every axis: some ten times what docs/results/layouts.md has of any. Weights are furthest,
# since Adam divides small gradients by themselves.
TOLERANCE = Errors(loss=5e-7, source_loss=1e-6, norm=2e-6, weights=2e-5)
BF16 = Errors(loss=2e-3, source_loss=4e-3, norm=4e-2, weights=6e-2)  # activations have eight bits


def job_of(tables, model, compile=False, precision="fp32", **parallel):
    # Adam's step from a gradient far below eps is as small as that; above it, rounding may turn its sign.
    tables = tables | {
        "model": tables["model"] | {"depth": 4} | MODELS[model],
        "parallel": parallel,
        "optimizer": {"learning_rate": 3e-3, "clip_grad": 0.5, "warmup_steps": 2, "eps": 1e-6},
        "training": {"steps": 6, "global_batch": 4, "compile": compile, "precision": precision},
    }
    return resolve(tables, "test").train_job()


def train_layouts(rank, tables, out):
    """In a group: train each layout of this world size, and write its record and checkpoint."""
    for case in (case for case in CASES if case.ranks == rank.world_size):
        job = job_of(tables, case.model, **case.layout)
        torch.compiler.reset()  # what an earlier layout compiled
        join(rank, job.parallel)
        folder = folder_of(out, case)
        trainer = Trainer(Assignment("test", job, "hash", rank, folder, None, STEPS))
        records = [trainer.train_step()[0] for _ in range(STEPS)]
        checkpoint_of(trainer, folder / "checkpoint")
        trainer.close()
        compiled = torch._dynamo.utils.counters.pop("stats", {})
        assert bool(compiled.get("unique_graphs")) == job.training.compile
        if rank.rank == 0:
            (folder / "records.json").write_text(json.dumps(records))
            (folder / "hits.json").write_text(json.dumps([list(hit) for hit in cpu_runtime.HITS]))


def folder_of(out: Path, case: Case) -> Path:
    return out / f"{case.ranks} {case.name}"


def plain(tables, model, micro_batch):
    """(Losses, gradient norms, losses by source and model FLOPs of each step; the weights after the last one; the
    cursor behind it) of the plain model under plain AdamW, in float64."""
    job = job_of(tables, model)
    join(Rank(), Layout())
    initial = {place.name: p.detach().double() for p, place in placements(build_model(job, torch.device("cpu")))}
    reference = Reference(job.model, initial)
    weights = list(reference.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": job.optimizer.weight_decay},
            {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(job.optimizer.beta1, job.optimizer.beta2),
        eps=job.optimizer.eps,
    )
    records, after = [], Cursor()
    steps = Loader(job.data, job.image_shape).steps(after, job.training.global_batch, micro_batch, 0, 1)
    for step in range(STEPS):
        batches, after = operator.attrgetter("micro_batches", "after")(next(steps))
        by_source = _source_losses(reference, batches, [source.name for source in job.data.sources])
        loss, own = reference.loss(batches, sum(batch.loss_mask_T.sum() for batch in batches))
        optimizer.zero_grad()
        (loss + own).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, job.optimizer.clip_grad)
        assert norm > job.optimizer.clip_grad, "clipping must be at work"
        for group in optimizer.param_groups:
            group["lr"] = job.optimizer.rate(step, job.training.steps)
        optimizer.step()
        records.append((loss.item(), norm.item(), by_source, model_flops(job.model, _work(batches))))
    return records, reference.state(), after


def _work(batches):
    """What goes through the model, document by document."""
    lengths = [int(n) for batch in batches for n in batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]]
    return Work(sum(lengths), sum(n * n / 2 for n in lengths), sum(len(batch.patches_IND) for batch in batches))


@torch.no_grad()
def _source_losses(reference, batches, kinds):
    """The mean loss over each source's learned tokens alone, of the sources that the batches have tokens of."""
    found = {}
    for number, kind in enumerate(kinds):
        masks = [batch.loss_mask_T * (batch.source_ids_T == number) for batch in batches]
        if total := sum(mask.sum() for mask in masks):
            masked = [
                batch._replace(mask_bounds=range(len(mask) + 1), mask_values=mask)
                for batch, mask in zip(batches, masks, strict=True)
            ]
            found[kind] = reference.loss(masked, total)[0].item()
    return found


def errors(out: Path, case: Case, expected) -> Errors:
    """Of a trained case, from what `plain` gave for its model and micro-batch."""
    wanted, weights, after = expected
    folder = folder_of(out, case)
    records, reader = json.loads((folder / "records.json").read_text()), Reader(LocalStorage(folder / "checkpoint"))
    assert reader.manifest.state.cursor == after
    assert {key.partition("/")[2] for key in reader.keys} == set(weights)
    by_source = []
    for record, (_, _, of_sources, flops) in zip(records, wanted, strict=True):
        assert record["model_flops"] == flops
        assert set(record["source_loss"]) == set(of_sources)
        by_source += [_relative(record["source_loss"][kind], loss) for kind, loss in of_sources.items()]
    return Errors(
        max(_relative(record["loss"], loss) for record, (loss, *_) in zip(records, wanted, strict=True)),
        max(by_source),
        max(_relative(record["grad_norm"], norm) for record, (_, norm, *_) in zip(records, wanted, strict=True)),
        max(((reader.whole(f"weight/{name}") - w).norm() / w.norm()).item() for name, w in weights.items()),
    )


def _relative(found: float, wanted: float) -> float:
    return math.inf if math.isnan(found) else abs(found / wanted - 1)
