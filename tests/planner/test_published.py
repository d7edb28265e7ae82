"""The planner beside published runs: the half of the rows that its constants were not fitted on."""

from collections import defaultdict
from statistics import median

import pytest

from armillary.planner.software import constants
from benchmarks.planner.__main__ import START
from benchmarks.planner.fit import fit, halves
from benchmarks.planner.rows import FORMULA, read, reference_file
from benchmarks.planner.score import planned, planned_gib

pytestmark = pytest.mark.skipif(
    not reference_file().exists(), reason=f"the published rows are not at hand: {reference_file()}"
)


@pytest.fixture(scope="module")
def rows():
    return read(reference_file())


def test_every_measured_row_is_read_and_the_halves_share_none(rows):
    fitting, scored = halves(rows)
    assert len(rows) == len(fitting) + len(scored) == 162
    assert not {row.number for row in fitting} & {row.number for row in scored}
    assert {row.table for row in fitting} == {row.table for row in scored}
    assert not {row.table for row in rows} & set(FORMULA)


def test_the_constants_are_what_the_fit_gives(rows):
    found = fit(halves(rows)[0], START)
    for name, value in vars(found).items():
        assert getattr(constants(), name) == pytest.approx(value, rel=1e-3), name


def test_time_is_within_the_bounds_that_are_promised(rows):
    by_table = defaultdict(list)
    for row in halves(rows)[1]:
        by_table[row.table].append(abs(planned(row, constants()) / row.seconds - 1))
    assert median(error for found in by_table.values() for error in found) < 0.10
    for table, found in by_table.items():
        assert median(found) < 0.20, table


def test_memory_is_within_the_bounds_that_are_promised(rows):
    errors = [abs(planned_gib(row, constants()) / row.gib - 1) for row in halves(rows)[1] if row.gib]
    assert len(errors) > 10
    assert median(errors) < 0.10
