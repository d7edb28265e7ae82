"""What is shipped compiles well for GPUs that are not here. `pytest -m slow` has all of it, in about five minutes."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.kernels.ahead_of_time import compiled
from benchmarks.kernels.gate import examine
from benchmarks.kernels.shipped import shipped

GOLDEN = Path(__file__).with_name("registers.json")  # python -m benchmarks.kernels.gate --golden
MORE = 8  # registers that a kernel may take beyond the golden number
SHORT = ("attention 128 causal", "attention 64 causal", "rms_norm 4096", "rms_norm 16384", "swiglu", "rope 128")


@pytest.fixture(scope="module")
def pool():
    """Processes of their own: the compiler's driver is one that has no device."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield pool


def assert_fit(pool: ProcessPoolExecutor, jobs: list[tuple[str, str]]) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert jobs
    for found in pool.map(examine, jobs):
        assert not found["problems"], found
        assert found["registers"] <= golden[found["name"]][found["target"]] + MORE, found


def test_shipped_kernels_are_fit_for_hopper(pool):
    assert_fit(pool, [(one.name, "sm_90") for one in shipped() if one.name.startswith(SHORT)])


@pytest.mark.slow
def test_what_was_fit_for_a_target_stays_so(pool):
    """Every shipped kernel for Hopper; for the others, so far, those that the golden file names."""
    golden = json.loads(GOLDEN.read_text())
    assert all("sm_90" in golden[one.name] for one in shipped())
    assert_fit(pool, [(name, target) for name, targets in golden.items() for target in targets])


def control(change: str) -> list[str]:
    """The problems of a kernel that is not fit."""
    forward = next(one for one in shipped() if one.name == "attention 128 causal forward")
    if change == "more than the registers hold":
        forward = replace(forward, switches=forward.switches | {"BN": 128, "num_warps": 4})
    if change == "more than a block's shared memory":
        forward = replace(forward, switches=forward.switches | {"BN": 128, "num_stages": 5})
    if change == "no matrices":
        forward = replace(next(one for one in shipped() if one.name == "swiglu forward"), asks={"dot": True})
    return compiled(forward.kernel, "sm_90", forward.arguments, forward.switches).problems(**forward.asks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("more than the registers hold", "spills"),
        ("more than a block's shared memory", "a multiprocessor has no room"),
        ("no matrices", "matrices are multiplied by none"),
    ],
)
def test_a_kernel_that_is_not_fit_is_found(pool, change, said):
    assert said in "; ".join(pool.submit(control, change).result())
