"""Saving: every rank writes its chunks into a staging folder, then one process commits them with a rename."""

import itertools
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from megatron.core import parallel_state
from pydantic import TypeAdapter

from armillary.errors import CheckpointError
from armillary.model.coordinates import Placement
from armillary.training.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    MOMENTS,
    Chunk,
    Manifest,
    State,
    fragment_name,
    sync_folder,
    write_json,
)

ALIGNMENT = 64
_chunks = TypeAdapter(tuple[Chunk, ...])


def write_rank(folder: Path, rank: int, states: Iterator[tuple[Placement, dict[str, torch.Tensor]]]) -> None:
    """Write this rank's chunks of `states` (see Engine.state) and the list of them. Collective over data ranks.

    Of the ranks that hold the same values one writes: tensor rank 0 what is replicated over tensor ranks, and
    data-parallel ranks take turns.
    """
    data_rank = parallel_state.get_data_parallel_rank()
    data_ranks = parallel_state.get_data_parallel_world_size()
    first_tensor = parallel_state.get_tensor_model_parallel_rank() == 0
    path, chunks = folder / f"rank-{rank:05d}.bin", []
    with open(path, "wb") as file:
        for number, (place, parts) in enumerate(states):
            if number % data_ranks != data_rank or (place.replicated and not first_tensor):
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
    write_json(folder / fragment_name(rank), _chunks.dump_json(tuple(chunks)).decode())


def commit(staging: Path, target: Path, state: State, ranks: int) -> None:
    """Make a checkpoint of what `ranks` ranks wrote: check that it is whole, write the manifest, rename.

    Called by one process, after every rank is done. CheckpointError where something is missing or `target` exists.
    """
    chunks: list[Chunk] = []
    for rank in range(ranks):
        try:
            chunks += _chunks.validate_json((staging / fragment_name(rank)).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"rank {rank} did not write its part: {error}", staging, "see its log") from None
    _check_whole(chunks, staging)
    manifest = Manifest(format=FORMAT, dtype="float32", state=state, chunks=tuple(chunks)).sealed()
    write_json(staging / MANIFEST, manifest.model_dump_json())
    for rank in range(ranks):
        (staging / fragment_name(rank)).unlink()
    sync_folder(staging)
    if target.exists():
        raise CheckpointError("a checkpoint of this step exists already", target, "keep it, or move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging.rename(target)
    sync_folder(target.parent)


def discard(staging: Path) -> None:
    """Remove a checkpoint that was not committed."""
    shutil.rmtree(staging, ignore_errors=True)


def _check_whole(chunks: list[Chunk], staging: Path) -> None:
    """Every tensor's chunks must tile it, and each weight have its moments: a missing part is noticed here."""
    by_key: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_key.setdefault(chunk.key, []).append(chunk)
    for key, parts in by_key.items():
        size, held = math.prod(parts[0].global_shape), sum(math.prod(part.shape) for part in parts)
        if held != size or any(_overlap(a, b) for a, b in itertools.combinations(parts, 2)):
            raise CheckpointError(
                f"the chunks of {key} do not tile it: {held} of {size} numbers", staging, "save again"
            )
    names: dict[str, set[str]] = {}
    for key in by_key:
        part, _, name = key.partition("/")
        names.setdefault(name, set()).add(part)
    for name, parts_of_name in names.items():
        if parts_of_name != {"weight", *MOMENTS}:
            raise CheckpointError(f"of {name} there is only {', '.join(sorted(parts_of_name))}", staging, "save again")


def _overlap(a: Chunk, b: Chunk) -> bool:
    return all(max(p, q) < min(p + n, q + m) for p, n, q, m in zip(a.start, a.shape, b.start, b.shape, strict=True))
