"""Saves of a run with two ranks whose every number tells which save it is of, and what is left when one is killed."""

import time
from collections.abc import Callable, Iterator

import torch

from armillary.data_pipeline.cursor import Cursor
from armillary.launcher.run import Run
from armillary.model.coordinates import Block, Placement, blocks, split_axis
from armillary.training.checkpoint.catalog import listed, verify
from armillary.training.checkpoint.load import Reader
from armillary.training.checkpoint.manifest import MOMENTS, State, folder_name
from armillary.training.checkpoint.saver import Saver
from armillary.training.config import CheckpointConfig

RANKS = 2
PARTS = ("weight", *MOMENTS)
SHAPES = {"split": (8, 5), "whole": (3, 7)}


def numbers(name: str, part: str, value: int) -> torch.Tensor:
    """A whole tensor of the save `value`."""
    count = torch.Size(SHAPES[name]).numel()
    return (torch.arange(count) + 1000.0 * value + 100_000.0 * PARTS.index(part)).view(SHAPES[name])


def states(rank: int, value: int) -> Iterator[tuple[str, Block]]:
    """What an engine gives: one tensor that is split by rows, gate and up apart, and one in flat shards."""
    pieces = split_axis(8, RANKS, rank, stride=2)
    rows = torch.cat([torch.arange(piece.start, piece.start + piece.size) for piece in pieces])
    split = Placement("split", SHAPES["split"], 0, pieces, 0, 1, False)
    whole = Placement("whole", SHAPES["whole"], 0, split_axis(3, 1, 0, 1), 0, 1, True)
    shard = slice(0, 10) if rank == 0 else slice(10, 21)
    for part in PARTS:
        yield from ((part, block) for block in blocks(split, numbers("split", part, value)[rows].view(-1)))
        flat = numbers("whole", part, value).view(-1)[shard]
        yield from ((part, block) for block in blocks(whole, flat, shard.start))


def save(run: Run, generation: int, step: int, value: int, keep: CheckpointConfig, dead: Callable[[], bool]) -> None:
    """Save as training does: all ranks at once, then the commit. `dead`: whether the process is."""

    def announce(name: str, state: State) -> None:
        run.commit(name, state, generation, RANKS, keep)

    store = run.store()
    savers = [Saver(store, generation, rank, RANKS, False, announce) for rank in range(RANKS)]
    state = State(
        step=step, cursor=Cursor(), data_order=1, tokens=value, loss=1.0, run="run", job_hash="", job={}, saved_at=0.0
    )
    for rank, saver in enumerate(savers):
        saver.save(folder_name(step), states(rank, value), False, state)
    while any(saver.busy for saver in savers):
        if dead():
            for saver in savers:
                saver.give_up()
        time.sleep(0.001)
    if not dead():
        for error in filter(None, [saver.failure() for saver in savers]):
            raise error


def found(run: Run) -> dict[int, int]:
    """The value of the checkpoint of each step, every number of which was read and is right."""
    values, store = {}, run.store()
    for entry in listed(store):
        assert not entry.problem, entry
        assert verify(store.folder(entry.name))[1] == []
        reader, value = Reader(store.folder(entry.name)), entry.state.tokens
        for name in SHAPES:
            for part in PARTS:
                assert torch.equal(reader.whole(f"{part}/{name}"), numbers(name, part, value)), (entry.name, name, part)
        values[entry.state.step] = value
    return values


def latest(run: Run) -> tuple[int, int]:
    """Step and value of the checkpoint that a resume goes on from."""
    state = Reader(run.latest()).manifest.state
    return state.step, state.tokens
