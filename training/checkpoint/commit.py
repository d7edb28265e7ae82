"""Saving, second half: one process makes a checkpoint of what the ranks wrote. Needs no PyTorch."""

import itertools
import math
import shutil
from pathlib import Path

from armillary.errors import CheckpointError
from armillary.files import sync, write_whole
from armillary.training.checkpoint.manifest import (
    CHUNKS,
    FORMAT,
    MANIFEST,
    MOMENTS,
    Chunk,
    Manifest,
    State,
    fragment_name,
)


def commit(staging: Path, target: Path, state: State, ranks: int) -> None:
    """Make a checkpoint of what `ranks` ranks wrote: check that it is whole, write the manifest, rename.

    Called by one process, after every rank is done. CheckpointError where something is missing or `target` exists.
    """
    chunks: list[Chunk] = []
    for rank in range(ranks):
        try:
            chunks += CHUNKS.validate_json((staging / fragment_name(rank)).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"rank {rank} did not write its part: {error}", staging, "see its log") from None
    _check_whole(chunks, staging)
    manifest = Manifest(format=FORMAT, dtype="float32", state=state, chunks=tuple(chunks)).sealed()
    write_whole(staging / MANIFEST, manifest.model_dump_json())
    for rank in range(ranks):
        (staging / fragment_name(rank)).unlink()
    sync(staging)
    if target.exists():
        raise CheckpointError("a checkpoint of this step exists already", target, "keep it, or move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging.rename(target)
    sync(target.parent)


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
