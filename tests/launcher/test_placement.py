import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.launcher.placement import Failure, Node, blame, no_room, place

rooms = st.lists(st.integers(0, 9), max_size=8)


@given(rooms, st.integers(1, 4), st.integers(1, 12))
def test_ranks_are_placed_once_in_whole_tensor_groups_or_refused(rooms, tensor, groups):
    nodes = [Node(f"n{i}", room) for i, room in enumerate(rooms)]
    world = tensor * groups
    if sum(room // tensor * tensor for room in rooms) < world:
        assert not place(nodes, world, tensor)
        assert f"needs {world} ranks" in no_room(nodes, world, tensor).what
        return
    bundles = place(nodes, world, tensor)
    assert [rank for b in bundles for rank in range(b.first, b.first + b.count)] == list(range(world))
    assert len({b.node for b in bundles}) == len(bundles)
    room = {node.id: node.room for node in nodes}
    assert all(b.count % tensor == 0 and 0 < b.count <= room[b.node] for b in bundles)


def test_the_fewest_roomiest_nodes_are_taken():
    bundles = place([Node("a", 2), Node("b", 8), Node("c", 4)], 8, 2)
    assert [b.node for b in bundles] == ["b"]


LOST = Failure(0, "RuntimeError", "[gloo] Connection closed by peer")
OWN = Failure(2, "IndexError", "list index out of range")
DIED = Failure(3, "died", "its process ended")
USER = Failure(1, "DataError", "a shard is missing")


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([LOST, OWN], OWN),
        ([LOST, OWN, DIED], DIED),
        ([LOST, OWN, DIED, USER], USER),
        ([LOST], LOST),
        ([USER, Failure(0, "DataError", "the same")], Failure(0, "DataError", "the same")),
    ],
)
def test_the_cause_is_blamed_and_not_its_consequences(failures, first):
    assert blame(failures, {"DataError"}) == first
    assert blame(failures[::-1], {"DataError"}) == first
