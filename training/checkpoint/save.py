"""Saving, first half: every rank writes its chunks into a staging folder. See commit.py for the second."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash

from armillary.files import write_whole
from armillary.model.coordinates import Placement
from armillary.training.checkpoint.manifest import CHUNKS, Chunk, fragment_name

ALIGNMENT = 64


def write_rank(folder: Path, rank: int, states: Iterator[tuple[Placement, dict[str, torch.Tensor]]]) -> None:
    """Write this rank's chunks of `states` (see Engine.state) and the list of them. Collective over data ranks.

    Ranks that hold the same values take turns.
    """
    path, chunks = folder / f"rank-{rank:05d}.bin", []
    with open(path, "wb") as file:
        for number, (place, parts) in enumerate(states):
            if number % place.turns != place.turn:
                continue
            for part, tensor in parts.items():
                for piece in place.pieces:
                    block = tensor.narrow(place.axis, piece.at, piece.size).contiguous().cpu()
                    raw = block.float().numpy().tobytes()
                    file.write(b"\0" * (-file.tell() % ALIGNMENT))
                    start = [0] * block.ndim
                    start[place.axis] = piece.start
                    chunks.append(
                        Chunk(
                            key=f"{part}/{place.name}",
                            global_shape=place.shape,
                            start=tuple(start),
                            shape=tuple(block.shape),
                            file=path.name,
                            offset=file.tell(),
                            bytes=len(raw),
                            xxh3=xxhash.xxh3_64_hexdigest(raw),
                        )
                    )
                    file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    write_whole(folder / fragment_name(rank), CHUNKS.dump_json(tuple(chunks)).decode())
