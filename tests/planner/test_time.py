"""Seconds by part: what must hold whatever the constants are."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.model.flops import hardware_flops, work
from armillary.planner.collective import Group, all_to_all, exposed, gather, groups, send
from armillary.planner.explain import RESOURCES
from armillary.planner.plan import plan_layout
from armillary.planner.simulate import pipeline as simulated
from armillary.planner.software import constants
from armillary.planner.time import bubble, step_time
from armillary.training.layout import Layout
from tests.planner.jobs import EXPERTS, MODEL, STEP, layout, machines

SHAPES = [
    {},
    {"data": 8},
    {"tensor": 8},
    {"tensor": 2, "pipeline": 4, "data": 4},
    {"tensor": 4, "pipeline": 2, "virtual": 3, "data": 8, "micro_batch": 2, "recompute": "full"},
    {"data": 16, "zero": 3, "recompute": "selective"},
    {"data": 4, "context": 8, "tensor": 2, "offload": True},
]


def seconds(model=MODEL, gpu="h100", step=STEP, **keys):
    shape = layout(**keys)
    return step_time(model, shape, step, machines(shape.world_size, gpu), checkpoint_every=100)


@pytest.mark.parametrize("keys", SHAPES, ids=str)
def test_the_parts_add_up_and_nothing_beats_the_peak(keys):
    shape = layout(**keys)
    time = seconds(**keys)
    parts = time.as_dict()
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert min(parts.values()) >= 0
    done = hardware_flops(MODEL, work(STEP.global_batch * STEP.seq_length, STEP.document, STEP.global_batch))
    assert time.total > done / shape.world_size / machines(8).peak("bf16")


def test_one_gpu_waits_for_nobody():
    time = seconds()
    for part in ("tensor", "context", "expert", "pipeline", "data", "bubble", "jitter"):
        assert getattr(time, part) == 0, part


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        ("tensor", {"tensor": 2}),
        ("pipeline", {"pipeline": 2}),
        ("bubble", {"pipeline": 2}),
        ("data", {"data": 2}),
        ("context", {"context": 2}),
        ("recompute", {"recompute": "full"}),
    ],
)
def test_each_axis_has_its_cost(part, keys):
    assert getattr(seconds(**keys), part) > 0 == getattr(seconds(), part)


def test_experts_on_other_ranks_cost_an_exchange():
    far, near = (seconds(EXPERTS, data=8, expert=e, engine="megatron") for e in (8, 1))
    assert far.expert > 0 == near.expert
    assert far.data < near.data


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([2, 3, 6]), st.sampled_from([1, 2]), st.sampled_from([8, 16, 32, 64]))
def test_more_micro_batches_shrink_the_bubbles_share(pipeline, virtual, rows):
    step = STEP._replace(global_batch=rows * 6)
    fewer, more = (
        seconds(step=step._replace(global_batch=factor * step.global_batch), pipeline=pipeline, virtual=virtual)
        for factor in (1, 2)
    )
    assert more.bubble / more.total < fewer.bubble / fewer.total
    interleaved = seconds(step=step, pipeline=pipeline, virtual=2 * virtual)
    assert interleaved.bubble < fewer.bubble


@pytest.mark.parametrize(("stages", "virtual", "count"), [(4, 1, 8), (4, 3, 8), (8, 2, 32)])
def test_the_bubble_is_that_of_the_simulated_schedule(stages, virtual, count):
    """3 a micro-batch and stage, in whole numbers of parts, so that nothing rounds."""
    each = 3.0 * virtual
    whole = simulated(virtual, 2 * virtual, stages, virtual, count)[0]
    assert whole == count * each + bubble([each] * stages, virtual)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(sorted(RESOURCES)), st.floats(1.01, 4))
def test_a_better_machine_is_never_slower(keys, resource, factor):
    shape = layout(**keys)
    machine = machines(shape.world_size)
    changes = {}
    for name in RESOURCES[resource]:
        value = getattr(machine, name)
        changes[name] = (
            value._replace(bytes_s=value.bytes_s * factor) if isinstance(value, tuple)
            else value / factor if name == "kernel_s" else value * factor
        )  # fmt: skip
    now, then = (step_time(MODEL, shape, STEP, one).total for one in (replace(machine, **changes), machine))
    assert now <= then * (1 + 1e-12)


def test_utilisation_is_what_the_seconds_say():
    shape = layout(tensor=4, data=4, recompute="full")
    plan = plan_layout(MODEL, shape, STEP, machines(16))
    assert 0 < plan.mfu < plan.hfu < 1
    assert plan.tokens_per_second == STEP.global_batch * STEP.seq_length / plan.time.total
    budget = plan.budget(1e12)
    assert budget.days * 86400 == pytest.approx(1e12 / plan.tokens_per_second)
    assert budget.gpu_hours == pytest.approx(budget.days * 24 * 16)
    assert budget.kwh == pytest.approx(budget.gpu_hours * 0.7)


def test_groups_lie_in_nodes_as_ranks_are_numbered():
    shape = Layout(tensor=4, context=2, data=4, pipeline=2)
    found = groups(shape, 8)
    for axis, others in (("tensor", ()), ("context", ("tensor",)), ("pipeline", ("tensor", "context", "data"))):
        ranks = [r for r in range(64) if all(getattr(shape.coordinates(r), a) == 0 for a in
                 ("tensor", "context", "data", "pipeline") if a != axis)]  # fmt: skip
        assert found[axis].ranks == len(ranks)
        assert found[axis].inside == sum(rank < 8 for rank in ranks), (axis, others)
    sharing = [r for r in range(64) if shape.coordinates(r)[1:3] == (0, 0)]
    assert found["data"] == Group(len(sharing), sum(rank < 8 for rank in sharing))


def test_collectives_cost_what_their_bytes_take():
    machine, c = machines(64), replace(constants(), link=1.0, network=1.0)
    quiet = replace(machine, link=machine.link._replace(latency_s=0), network=machine.network._replace(latency_s=0))
    size = 1e9
    assert gather(size, Group(1, 1), quiet, c) == 0 == send(size, Group(1, 1), quiet, c)
    assert gather(size, Group(8, 8), quiet, c) == pytest.approx(size * 7 / 8 / quiet.link.bytes_s)
    assert gather(size, Group(4, 1), quiet, c) == pytest.approx(size * 3 / 4 / quiet.network.bytes_s)
    two_cards = gather(size, Group(8, 2), quiet, c)
    assert two_cards == pytest.approx(size * 3 / 4 / (2 * quiet.network.bytes_s))
    assert all_to_all(size, Group(16, 8), quiet, c) == pytest.approx(size / 2 / quiet.network.bytes_s)
    assert exposed(5.0, 3.0, replace(c, overlapped=0.1)) == 2.0
    assert exposed(1.0, 3.0, replace(c, overlapped=0.1)) == pytest.approx(0.1)
