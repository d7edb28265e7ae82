"""Every layout computes what a plain PyTorch model computes in one process: loss, gradient norm, weights."""

import functools
import itertools
import json

import pytest

from armillary.training.support import FEATURES, together
from tests.conftest import free_port
from tests.groups import in_group
from tests.training.sweep import CASES, LAYOUTS, errors, pairs, plain, train_layouts


@pytest.fixture(scope="module")
def trained(tables, tmp_path_factory):
    out = tmp_path_factory.mktemp("equality")
    for ranks in LAYOUTS:
        in_group(ranks, free_port(), train_layouts, tables, out)
    return out


@pytest.fixture(scope="module")
def reference(tables):
    return functools.cache(lambda model, micro_batch: plain(tables, model, micro_batch))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_the_plain_model(case, trained, reference):
    found = errors(trained, case, reference(case.model, case.layout.get("micro_batch", 1)))
    assert all(got <= limit for got, limit in zip(found, case.limits, strict=True)), found


def test_every_pair_that_the_matrix_allows_is_among_them():
    """But for deterministic sums, whose tests compare bits, and for compilation, which is a rank's own affair."""
    covered = set().union(*map(pairs, CASES))
    for pair in itertools.combinations([name for name in FEATURES if name not in ("deterministic", "compile")], 2):
        assert together(*pair) != [] or tuple(sorted(pair)) in covered, pair


def test_the_cpu_stand_ins_are_called_where_they_are_known_to_be(trained):
    """A new Megatron-core that calls CUDA elsewhere shows here before it shows in a wrong result."""
    called = {
        (where.rpartition(":")[0], what)
        for path in trained.glob("*/hits.json")
        for where, what in json.loads(path.read_text())
    }
    assert called == KNOWN_CALLS


KNOWN_CALLS = {
    ("distributed/param_and_grad_buffer.py", "torch.cuda.current_device"),
    ("pipeline_parallel/p2p_communication.py", "torch.cuda.current_device"),
    ("pipeline_parallel/p2p_communication.py", "torch.cuda.synchronize"),
    ("pipeline_parallel/schedules.py", "torch.zeros"),
    ("tensor_parallel/layers.py", "torch.cuda.current_device"),
    ("tensor_parallel/mappings.py", "torch.cuda.current_device"),
    ("tensor_parallel/random.py", "torch.cuda.get_rng_state"),
    ("tensor_parallel/random.py", "torch.cuda.manual_seed"),
    ("utils.py", "torch.cuda.current_device"),
}
