"""The schedule as events, and long runs that fail."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.planner.goodput import Failures, best_interval, daly, goodput, over_sizes, young
from armillary.planner.simulate import Operation, Variation, pipeline, schedule, slowed


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_without_variation_it_is_the_formula_exactly(stages, virtual, groups, forward, backward):
    """Narayanan et al. 2021, sections 2.2.1 and 2.2.2: (count + (stages - 1) / virtual) micro-batches. Whole numbers of
    each part, so that nothing rounds."""
    count = stages * groups
    found = pipeline(virtual * forward, virtual * backward, stages, virtual, count)
    assert found.tolist() == [(count * virtual + stages - 1) * (forward + backward)]


@pytest.mark.parametrize(("stages", "count"), [(4, 2), (4, 5), (8, 3)])
def test_any_number_of_micro_batches_goes_through_1f1b(stages, count):
    assert pipeline(1, 2, stages, 1, count)[0] == (count + stages - 1) * 3


@pytest.mark.parametrize(("stages", "virtual", "count"), [(1, 1, 3), (4, 1, 6), (4, 3, 8), (4, 2, 4)])
def test_every_operation_comes_once_and_backward_after_forward(stages, virtual, count):
    for stage in range(stages):
        order = schedule(stage, stages, virtual, count)
        assert len(order) == len(set(order)) == 2 * count * virtual
        for operation in order:
            if operation.backward:
                forward = Operation(False, operation.micro_batch, operation.part)
                assert order.index(forward) < order.index(operation)


def test_sending_costs_at_least_the_way_there_and_back():
    quick, slow = (pipeline(1, 2, 4, 1, 8, send=send)[0] for send in (0, 0.25))
    assert slow >= quick + 2 * 3 * 0.25


def test_variation_is_the_seeds_and_slows():
    vary = Variation(jitter=0.1)
    once, again, other = (pipeline(1, 2, 4, 2, 8, vary=vary, replicas=32, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    even = pipeline(1, 2, 4, 2, 8)[0]
    assert once.mean() > even
    assert np.unique(once).size == 32


def test_a_straggler_holds_up_its_replica():
    vary = Variation(stragglers=1.0, slowdown=1.5)
    assert pipeline(1, 2, 4, 1, 8, vary=vary)[0] == pytest.approx(1.5 * pipeline(1, 2, 4, 1, 8)[0])
    few = Variation(stragglers=0.05, slowdown=1.5)
    one, many = (slowed(4, 1, 32, few, replicas, seed=3) for replicas in (1, 512))
    assert 1.0 <= one <= many
    assert many > 1.3


def test_a_run_that_never_fails_pays_for_its_checkpoints_alone():
    never = Failures(mtbf=1e30, detection=0, restart=0)
    assert goodput(100, 10, never, useful=1000) == pytest.approx(1000 / 1100)
    assert goodput(300, 10, never, useful=1000) == pytest.approx(1000 / 1040)


def test_a_run_that_always_fails_gets_nowhere():
    assert goodput(1000, 10, Failures(mtbf=10, detection=0, restart=0), useful=10_000) < 1e-3


def plain(interval, cost, failures, useful, seed):
    """The same run, one interval after the other."""
    random = np.random.default_rng(seed)
    clock = saved = 0.0
    failing = random.exponential(failures.mtbf)
    while saved < useful:
        work = min(interval, useful - saved)
        if clock + work + cost <= failing:
            clock, saved = clock + work + cost, saved + work
            continue
        clock = failing
        restarted = False
        while not restarted:
            failing = clock + random.exponential(failures.mtbf)
            restarted = clock + failures.detection + failures.restart <= failing
            clock = clock + failures.detection + failures.restart if restarted else failing
    return useful / clock


@settings(max_examples=60, deadline=None)
@given(st.floats(20, 500), st.floats(0, 30), st.floats(100, 3000), st.floats(0, 200), st.integers(0, 99))
def test_leaping_over_whole_intervals_changes_nothing(interval, cost, mtbf, restart, seed):
    failures = Failures(mtbf, 5.0, restart)
    expected = plain(interval, cost, failures, 20_000, seed)
    assert goodput(interval, cost, failures, 20_000, seed) == pytest.approx(expected, rel=1e-9)


def test_the_best_interval_is_near_youngs_and_dalys():
    failures = Failures(mtbf=4 * 3600, detection=30, restart=600)
    interval, share = best_interval(60, failures, seed=1)
    assert young(60, failures.mtbf) / 1.5 < interval < young(60, failures.mtbf) * 1.5
    for other in (interval / 3, interval * 3):
        assert goodput(other, 60, failures, 2000 * failures.mtbf, seed=1) < share
    assert best_interval(60, failures, seed=1) == (interval, share)


def test_the_formulas_are_those_of_their_papers():
    assert young(30, 60_000) == math.sqrt(2 * 30 * 60_000)
    assert daly(30, 60_000) == pytest.approx(young(30, 60_000) - 30 + 30 / 3, rel=1e-3)
    assert daly(100, 50) == 50


def test_larger_clusters_fare_worse():
    found = over_sizes({1000: 48.0, 10_000: 4.8, 100_000: 4.0}, 50_000, 30, 600)
    assert [size.gpus for size in found] == [1000, 10_000, 100_000]
    shares = [size.goodput for size in found]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < shares[2] < shares[0] < 1
    assert [size.young for size in found] == [young(s.checkpoint_cost, s.mtbf_hours * 3600) for s in found]
