"""What is shipped compiles well for GPUs that are not here. `pytest -m slow` has all of it, in two minutes."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import triton
import triton.language as tl

from benchmarks.kernels.ahead_of_time import TARGETS, compiled
from benchmarks.kernels.gate import examine
from benchmarks.kernels.shipped import shipped, wide

GOLDEN = Path(__file__).with_name("registers.json")  # python -m benchmarks.kernels.gate --golden
MORE = 8  # registers that a kernel may take beyond the golden number
SHORT = (
    "attention 128 causal",
    "attention 64 causal",
    "decode 128",
    "adamw",
    "cross_entropy",
    "rms_norm 4096",
    "rms_norm 16384",
    "swiglu",
    "rope 128",
)


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
    assert_fit(pool, [(one.name, "sm_90") for one in shipped("sm_90") if one.name.startswith(SHORT)])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_all_shipped_kernels_are_fit(pool, target):
    assert_fit(pool, [(one.name, target) for one in shipped(target)])


@triton.jit
def added(x_ptr):
    tl.atomic_add(x_ptr + tl.arange(0, 128), tl.load(x_ptr + 128 + tl.arange(0, 128)))


def control(change: str) -> list[str]:
    """The problems of a kernel that is not fit."""
    backward = next(one for one in shipped("sm_90") if one.name == "attention 128 causal backward, queries")
    if change == "more than the registers hold":
        backward = replace(backward, switches=backward.switches | {"BN": 128, "num_warps": 4})
    if change == "more than a block's shared memory":
        backward = replace(backward, switches=backward.switches | {"num_stages": 8})
    if change == "no matrices":
        swiglu = next(one for one in shipped("sm_90") if one.name == "swiglu forward")
        backward = replace(swiglu, asks={"dot": True})
    if change == "sums in any order":
        backward = replace(backward, kernel=added, arguments=(wide(1024),), switches={}, asks={})
    if change == "no TMA":
        asks = {"tma": True, "specialised": True}
        backward = replace(backward, switches=backward.switches | {"TMA": False}, asks=asks)
    return compiled(backward.kernel, "sm_90", backward.arguments, backward.switches).problems(**backward.asks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("more than the registers hold", "spills"),
        ("more than a block's shared memory", "a multiprocessor has no room"),
        ("no matrices", "matrices are multiplied by none"),
        ("sums in any order", "atomic operations"),
        ("no TMA", "no TMA; warps are not specialised"),
    ],
)
def test_a_kernel_that_is_not_fit_is_found(pool, change, said):
    assert said in "; ".join(pool.submit(control, change).result())
