"""What to do about a fault: pure decisions."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds


def pause(in_vain: int, most: int) -> float | None:
    """Seconds to wait before the next launch, when `in_vain` in a row ended without a new checkpoint; None: give up.

    most: how many launches may end so and still be followed by one.
    """
    if in_vain > most or not most:
        return None
    return min(FIRST_PAUSE * 2 ** max(in_vain - 1, 0), LONGEST_PAUSE)
