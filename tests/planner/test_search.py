"""The search leaves nothing out, and its best is the best."""

import itertools

import pytest

from armillary.errors import JobError
from armillary.launcher.job import resolve
from armillary.planner.explain import bindings, explain, neighbours
from armillary.planner.plan import described, fits, plan_job, plan_layout
from armillary.planner.search import divisors, families, layouts, search, usable
from armillary.planner.stages import Step, setting
from armillary.training.layout import Layout
from armillary.training.support import problems
from tests.planner.jobs import EXPERTS, MODEL, STEP, machines

SMALL = MODEL.model_copy(update={"depth": 6})
SPARSE = EXPERTS.model_copy(update={"depth": 6})


def every_layout(model, step, gpus):
    """All combinations of keys that the rules allow, within what `families` says that it leaves out."""
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0]
    cuts = (0, 1, 2, 3, 4, 5, 6)
    for tensor, pipeline, context in itertools.product(sizes, sizes, sizes):
        if gpus % (tensor * pipeline * context) or (context > 1 and step.seq_length / context < 256):
            continue
        data = gpus // (tensor * pipeline * context)
        for virtual, first, last in itertools.product((1, 2, 3, 6), cuts, cuts):
            layers = [first or 0, last or 0]
            even = (model.depth + (first > 0) + (last > 0)) / pipeline
            if any(given and given != even - 1 for given in layers) or (pipeline == 2 and first and last):
                continue  # two stages of one layer less are even ones
            for rows, zero, expert, offload, recompute in itertools.product(
                range(1, step.global_batch + 1), (1, 2, 3), (1, 2, 4, 8), (False, True), ("none", "selective", "full")
            ):
                if zero > 1 and data * context == 1:
                    continue  # as ZeRO-1
                made = []
                for sequence in (True, False):
                    layout = Layout(
                        data=data, tensor=tensor, pipeline=pipeline, context=context, virtual=virtual,
                        first_stage_layers=first, last_stage_layers=last, micro_batch=rows, zero=zero, expert=expert,
                        offload=offload, recompute=recompute, sequence_parallel=sequence,
                    )  # fmt: skip
                    if not problems(setting(layout, model, step)):
                        made.append(layout)
                yield from made[:1]


@pytest.mark.parametrize(("model", "gpus"), [(SMALL, 6), (SPARSE, 4)], ids=["dense", "experts"])
def test_no_allowed_layout_is_left_out(model, gpus):
    step = Step(1024, 12, 1024.0, 0.0, "bf16")
    found = list(layouts(model, step, machines(gpus)))
    assert len(found) == len(set(found))
    assert set(found) == set(every_layout(model, step, gpus))


@pytest.mark.parametrize("model", [SMALL, SPARSE], ids=["dense", "experts"])
def test_the_best_is_the_best_of_all(model):
    step, machine = STEP._replace(global_batch=16), machines(8)
    plans = [plan_layout(model, one, step, machine) for one in layouts(model, step, machine)]
    best = min(plan.time.total for plan in plans if plan.peak_bytes <= usable(machine))
    found = search(model, step, machine)
    assert found.allowed == len(plans)
    assert found.ranked[0].seconds == best
    assert [one.seconds for one in found.ranked] == sorted(one.seconds for one in found.ranked)
    assert all(one.peak_bytes <= usable(machine) for one in found.ranked)


def test_of_a_family_the_fastest_that_fits_is_kept():
    step, machine = STEP._replace(global_batch=64), machines(16)
    kept = {one.layout for one in search(MODEL, step, machine).ranked}
    for family in families(MODEL, step, machine):
        plans = [plan_layout(MODEL, layout, step, machine) for layout in family]
        fitting = [plan for plan in plans if plan.peak_bytes <= usable(machine)]
        if fitting:
            assert min(fitting, key=lambda plan: plan.time.total).layout in kept


def test_where_nothing_fits_the_smallest_is_named():
    step, machine = STEP._replace(global_batch=8), machines(1, "a100-40")
    found = search(MODEL, step, machine)
    plans = [plan_layout(MODEL, one, step, machine) for one in layouts(MODEL, step, machine)]
    assert not found.ranked
    assert found.smallest.peak_bytes == min(plan.peak_bytes for plan in plans) > usable(machine)


def test_where_nothing_is_allowed_nothing_is_found():
    found = search(MODEL, STEP._replace(global_batch=7), machines(64 * 1024))
    assert (found.ranked, found.smallest, found.allowed) == ([], None, 0)


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(16, 4) == [1, 2, 4]
    assert divisors(1) == [1]


def plan_of(**keys):
    layout = Layout(**keys)
    return plan_layout(MODEL, layout, STEP, machines(layout.world_size))


def test_bindings_are_what_a_better_machine_saves():
    found = {one.resource: one.saved for one in bindings(plan_of(tensor=8, sequence_parallel=True, micro_batch=2))}
    assert found["network between nodes"] == 0
    assert min(found["products of matrices"], found["links inside a node"], found["memory bandwidth"]) > 0.01
    far = {one.resource: one.saved for one in bindings(plan_of(data=64, zero=3))}
    assert far["network between nodes"] > found["network between nodes"]


@pytest.mark.parametrize(
    ("gpu", "keys"),
    [
        ("h100", {"data": 16, "micro_batch": 4, "recompute": "full"}),
        ("h100", {"data": 2, "pipeline": 8}),
        ("a100-40", {"data": 16}),
    ],
)
def test_what_would_help_does(gpu, keys):
    plan = plan_layout(MODEL, Layout(**keys), STEP, machines(16, gpu))
    assert plan.fits == (gpu == "h100")
    said = explain(plan)
    assert said.tried == len(list(neighbours(plan))) > 3
    for change in said.changes:
        assert not problems(setting(change.layout, MODEL, STEP))
        again = plan_layout(MODEL, change.layout, STEP, plan.cluster)
        assert (again.time.total, again.peak_bytes, again.fits) == (change.seconds, change.peak_bytes, change.fits)
        if plan.fits:
            assert again.fits
            assert again.time.total < plan.time.total
        else:
            assert again.peak_bytes < plan.peak_bytes
    assert said.changes


def job(**parallel):
    tables = {"model": MODEL.model_dump(), "data": {"seq_length": 4096}, "parallel": parallel}
    return resolve(tables | {"training": {"global_batch": 64, "precision": "bf16"}}, "test")


def test_a_layout_that_does_not_fit_is_refused_with_one_that_does():
    given = job(data=8)
    with pytest.raises(JobError) as caught:
        fits(given, machines(8, "a100-40"))
    assert "GiB on a GPU with 40.0 GiB" in caught.value.what
    said = caught.value.fix.partition("would fit: ")[2].partition(";")[0]
    keys = dict(word.split("=") for word in said.split())
    other = job(
        **{key: {"true": True}.get(value, int(value) if value.isdigit() else value) for key, value in keys.items()}
    )
    plan = fits(other, machines(8, "a100-40"))
    assert plan.fits
    assert described(plan.layout) == said


def test_a_layout_that_fits_is_planned():
    assert fits(job(tensor=8, sequence_parallel=True, recompute="full"), machines(8, "h200")).fits
    assert plan_job(job(data=8), machines(8, "a100-40")).fits is False
