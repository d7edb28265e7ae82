"""When a run starts again, with how many ranks, from where; when it is given up, and what is said of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.launcher.job import resolve
from armillary.launcher.placement import Failure, Node, is_fault
from armillary.launcher.recovery import (
    LONGEST_PAUSE,
    Outcome,
    hung,
    largest,
    lost,
    outcome,
    pause,
    rewind_to,
    still_there,
)
from tests.conftest import MODEL, SOURCES


@given(st.integers(0, 50), st.integers(0, 50))
def test_pauses_grow_and_end(in_vain, most):
    seconds = pause(in_vain, most)
    assert (seconds is None) == (in_vain > most or most == 0)
    if seconds is not None:
        assert (seconds == 0) == (in_vain == 0), "who got on loses no time"
        assert seconds <= LONGEST_PAUSE
        assert (pause(in_vain + 1, 100) or 0) >= seconds


def test_faults_are_of_machines_and_not_of_programs():
    assert is_fault(Failure(0, "died", "its process ended"))
    assert is_fault(Failure(0, "RuntimeError", "[gloo] Connection closed by peer"))
    assert is_fault(Failure(0, "FaultError", "rank 1 could not meet the other 3: address in use"))
    assert is_fault(Failure(0, "RuntimeError", "CUDA error: uncorrectable ECC error encountered"))
    assert not is_fault(Failure(0, "OutOfMemoryError", "CUDA out of memory"))
    assert not is_fault(Failure(0, "IndexError", "list index out of range"))
    assert not is_fault(Failure(0, "DataError", "the storage refused the connection"))
    assert not is_fault(Failure(0, "RunError", "three checkpoints could not be saved: connection timed out"))


def nothing_fits(job):
    """What has no room for a larger share of the model."""
    return False


def a_job(data=4, tensor=1, batch=8, least=1, pipeline=1, virtual=1, sequence_parallel=False, **training):
    return resolve(
        {
            "model": MODEL,
            "data": {"path": "nowhere", "sources": SOURCES, "seq_length": 128},
            "parallel": {
                "data": data,
                "tensor": tensor,
                "pipeline": pipeline,
                "virtual": virtual,
                "sequence_parallel": sequence_parallel,
            },
            "training": {"global_batch": batch, **training},
            "cluster": {"min_ranks": least},
        },
        "a test",
    )


def nodes(*rooms):
    return [Node(f"node-{number}", room) for number, room in enumerate(rooms)]


@pytest.mark.parametrize(
    ("job", "rooms", "data"),
    [
        (a_job(), (2, 1, 1), 4),
        (a_job(), (8,), 4),
        (a_job(), (2, 1), 2),  # three do not divide the batch
        (a_job(batch=12), (2, 1), 3),
        (a_job(batch=12, deterministic=True), (2, 1), 2),  # three would change bits
        (a_job(), (1,), 1),
        (a_job(least=2), (1,), None),
        (a_job(tensor=2), (4, 3), 2),  # pairs stay on a node, and two of them divide the batch
        (a_job(tensor=2), (1, 1, 1), None),
        (a_job(), (), None),
    ],
)
def test_the_largest_layout_that_there_is_room_for(job, rooms, data):
    found = largest(job, nodes(*rooms), job.cluster.min_ranks, nothing_fits)
    if data is None:
        assert found is None
        return
    smaller, bundles = found
    assert smaller.parallel.data == data
    assert sum(bundle.count for bundle in bundles) == smaller.parallel.world_size == data * job.parallel.tensor
    same = {"parallel"}
    assert smaller.model_dump(exclude=same) == job.model_dump(exclude=same)
    others = {"data", "world_size"}
    assert smaller.parallel.model_dump(exclude=others) == job.parallel.model_dump(exclude=others)


@pytest.mark.parametrize(
    ("sizes", "rooms", "found"),
    [
        ({"tensor": 2, "pipeline": 2, "data": 2}, (2, 2), (2, 2, 1)),  # one copy is left: nothing else changes
        ({"tensor": 2, "pipeline": 2, "data": 2}, (2, 1), (2, 1, 1)),  # of two ranks, the larger tensor size
        ({"tensor": 2, "pipeline": 2, "data": 2}, (1, 1, 1), (1, 2, 1)),  # three copies do not divide the batch
        ({"tensor": 2, "pipeline": 2, "virtual": 1, "data": 1}, (1,), (1, 1, 1)),
        ({"tensor": 2, "sequence_parallel": True}, (1,), (1, 1, 1)),
    ],
)
def test_where_no_copy_has_room_it_is_shared_out_to_fewer_ranks(sizes, rooms, found):
    job = a_job(**sizes)
    smaller, bundles = largest(job, nodes(*rooms), 1, lambda job: True)
    layout = smaller.parallel
    assert (layout.tensor, layout.pipeline, layout.data) == found
    assert sum(bundle.count for bundle in bundles) == layout.world_size
    fewer = found[:2] != (sizes["tensor"], sizes.get("pipeline", 1))
    assert (largest(job, nodes(*rooms), 1, nothing_fits) is None) == fewer, "a larger share needs memory"


@given(st.lists(st.integers(0, 8), max_size=6), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_more_room_never_gives_fewer_ranks(rooms, data, tensor):
    job = a_job(data, tensor)
    found, more = (largest(job, nodes(*room), 1, nothing_fits) for room in (rooms, (*rooms, 2)))
    sizes = [0 if one is None else one[0].parallel.world_size for one in (found, more)]
    assert sizes[0] <= sizes[1] <= job.parallel.world_size


def test_each_rewind_in_vain_goes_one_checkpoint_further_back():
    steps = [10, 30, 20, 50, 40]
    assert rewind_to(steps, 50, None) == 50, "the first, whatever faults there were"
    assert rewind_to(steps, 50, 50) == 40
    assert rewind_to(steps, 40, 40) == 30
    assert rewind_to(steps, 10, 10) == 10, "there is none before it: again, without more of the data"
    assert rewind_to([*steps, 60], 60, 30) == 60, "a new checkpoint is a new beginning"
    assert rewind_to([], 0, None) == rewind_to([], 0, 0) == 0


def test_how_a_launch_ended():
    assert outcome(9, 9, True, True, True) == Outcome(9, False), "it was done"
    assert outcome(5, 9, False, True, False) == Outcome(5, True)
    assert outcome(5, 9, False, True, True) == Outcome(5, True, preempted=True)
    assert outcome(5, 9, True, False, False) == Outcome(5, False, growing=True)
    assert outcome(5, 9, True, True, False) == Outcome(5, True), "Ctrl-C while it grew"
    assert outcome(5, 9, True, False, True) == Outcome(5, True, preempted=True), "a rank was preempted while it grew"


def test_ranks_of_every_launch_before_are_ended_where_none_came_after_them():
    first = [{"node": "a", "pid": 1}, {"node": "b", "pid": 2}]
    second = [{"node": "a", "pid": 3}]
    assert still_there([], first) == first
    assert still_there(first, second) == [*second, first[1]]
    assert still_there(first, []) == first, "a launch that came to nothing"


DIED = Failure(2, "died", "its process ended")
PEER = Failure(0, "RuntimeError", "Connection closed by peer", "reduce", 41)
NODES = ["a", "a", "b"]


def test_what_was_lost_is_told_apart_with_the_phase_that_peers_saw():
    verdict = lost([DIED, PEER], NODES, {"a", "b"})
    assert (verdict.kind, verdict.rank, verdict.node) == ("lost process", 2, "b")
    assert (verdict.phase, verdict.step) == ("reduce", 41)
    assert verdict.what == "rank 2 of 3 died"
    assert "memory" in verdict.remedy
    verdict = lost([DIED], NODES, {"a"})
    assert (verdict.kind, verdict.rank, verdict.node, verdict.phase) == ("lost node", 2, "b", None)
    verdict = lost([PEER], NODES, {"a"})
    assert (verdict.kind, verdict.rank, verdict.phase) == ("lost node", 2, "reduce"), "which only its peers noticed"
    verdict = lost([PEER], NODES, {"a", "b"})
    assert (verdict.kind, verdict.rank, verdict.node) == ("lost contact", 0, "a")


def test_a_hung_rank_is_named_with_what_the_others_wait_in():
    report = {"step": 7, "phase": "reduce", "silent": 9.0, "waits": "all_reduce", "line": "x.py:1 f: g()"}
    verdict = hung([1], [report, None], ["a", "b"], 5.0)
    assert (verdict.rank, verdict.node, verdict.phase, verdict.step) == (1, "b", "reduce", 7)
    assert "rank 1 does not answer" in verdict.what
    assert "all_reduce" in verdict.what
    alone = report | {"waits": "", "phase": "data", "line": "delivery.py:82 __next__: next(parcels)"}
    verdict = hung([0], [alone, report], ["a", "b"], 5.0)
    assert (verdict.rank, verdict.phase) == (0, "data")
    assert "delivery.py:82" in verdict.what
    verdict = hung([], [report, report], ["a", "b"], 5.0)
    assert verdict.rank is None
    assert "all are in all_reduce" in verdict.what
    assert "does not answer" in hung([0, 1], [None, None], ["a", "b"], 5.0).what
