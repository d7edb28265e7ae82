"""How fast a job's data comes, measured on the machine it is asked on."""

import time
from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.loader import Loader


@dataclass(frozen=True)
class Speed:
    """Rates are those of one process after its first step; `utilisation` is the share of positions that hold a
    token."""

    first_seconds: float
    resume_seconds: float  # a new loader's first step, from the middle of the run so far
    positions_per_second: float
    images_per_second: float
    utilisation: float


def measure(config: DataConfig, shape: ImageShape, rows: int, micro_batch: int, seconds: float) -> Speed:
    """Build steps of `rows` rows for about `seconds` seconds as the only rank of a run. DataError as of Loader."""
    started = time.perf_counter()
    loader = Loader(config, shape, config.threads)
    steps = loader.steps(Cursor(), rows, micro_batch, 0, 1)
    reached = [next(steps).after]
    first = time.perf_counter() - started
    positions = images = filled = 0
    begun = time.perf_counter()
    while (spent := time.perf_counter() - begun) < seconds:
        step = next(steps)
        reached.append(step.after)
        for batch in step.micro_batches:
            lengths = np.diff(batch.cu_seqlens)
            positions += int(lengths.sum())
            filled += int(lengths[batch.piece_sources >= 0].sum())
            images += len(batch.patches_IND)
    loader.close()
    middle = reached[len(reached) // 2]
    started = time.perf_counter()
    next(Loader(config, shape, config.threads).steps(middle, rows, micro_batch, 0, 1))
    resume = time.perf_counter() - started
    return Speed(first, resume, positions / spent, images / spent, filled / positions)
