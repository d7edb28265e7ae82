"""When a run starts again, and when it is given up."""

from hypothesis import given
from hypothesis import strategies as st

from armillary.launcher.placement import Failure, is_fault
from armillary.launcher.recovery import LONGEST_PAUSE, pause


@given(st.integers(0, 50), st.integers(0, 50))
def test_pauses_grow_and_end(in_vain, most):
    seconds = pause(in_vain, most)
    assert (seconds is None) == (in_vain > most or most == 0)
    if seconds is not None:
        assert 1 <= seconds <= LONGEST_PAUSE
        assert (pause(in_vain + 1, 100) or 0) >= seconds


def test_faults_are_of_machines_and_not_of_programs():
    assert is_fault(Failure(0, "died", "its process ended"))
    assert is_fault(Failure(0, "RuntimeError", "[gloo] Connection closed by peer"))
    assert not is_fault(Failure(0, "IndexError", "list index out of range"))
