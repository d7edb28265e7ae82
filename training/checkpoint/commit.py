"""Saving, second half: one process makes a checkpoint of what the ranks wrote. Needs no PyTorch."""

import math
from collections.abc import Iterable

import numpy as np

from armillary.errors import CheckpointError
from armillary.storage import Storage
from armillary.training.checkpoint.manifest import (
    CHUNKS,
    FOLDER,
    FORMAT,
    MANIFEST,
    MOMENTS,
    WRITTEN,
    Chunk,
    Manifest,
    State,
    fragment_name,
    read_manifest,
    to_bytes,
)


def commit(folder: Storage, state: State, generation: int, ranks: int) -> None:
    """Make a checkpoint of what `ranks` ranks of a generation wrote into a folder: check that it is whole, and put its
    manifest there, which is read back. A checkpoint that was in the folder stays one until that moment.

    Called by one process, after every rank is done. CheckpointError where something is missing.
    """
    sizes, chunks = folder.sizes(), []
    for rank in range(ranks):
        fragment = fragment_name(generation, rank)
        try:
            chunks += CHUNKS.validate_json(bytes(folder.read(fragment)))
        except (OSError, ValueError) as error:
            where = folder.at(fragment)
            raise CheckpointError(f"rank {rank} did not write its part: {error}", where, "see its log") from None
    ends: dict[str, int] = {}
    for chunk in chunks:
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.bytes)
    for file, end in ends.items():
        if sizes.get(file) != end:
            found = f"a file has {sizes.get(file, 'no')} bytes where {end} were written"
            raise CheckpointError(found, folder.at(file), "check the storage")
    _check_whole(chunks, folder.at())
    manifest = Manifest(format=FORMAT, dtype="float32", state=state, chunks=tuple(chunks))
    folder.put(MANIFEST, to_bytes(manifest))
    if read_manifest(folder) != manifest:
        raise CheckpointError("the manifest is another one than was written", folder.at(), "check the storage")
    _remove(folder, sizes.keys() - {*ends, MANIFEST})


def remove(folder: Storage) -> None:
    """Remove a checkpoint, or what a save that did not end has left."""
    _remove(folder, folder.sizes())


def sweep(store: Storage) -> None:
    """Remove what saves that did not end have left in the checkpoints' folders of a store: what no manifest names."""
    by_folder: dict[str, set[str]] = {}
    for file in store.sizes():
        folder, _, name = file.rpartition("/")
        if FOLDER.fullmatch(folder):
            by_folder.setdefault(folder, set()).add(name)
    for name, files in by_folder.items():
        folder, held = store.folder(name), set()
        if MANIFEST in files:
            try:
                held = {MANIFEST, *(chunk.file for chunk in read_manifest(folder).chunks)}
            except CheckpointError:
                continue  # damaged: what is left of it may still be of use to someone
        _remove(folder, files - held)


def _remove(folder: Storage, files: Iterable[str]) -> None:
    """The manifest first: what a crash leaves is no checkpoint. What somebody else has put there stays."""
    for file in sorted(filter(WRITTEN.fullmatch, files), key=lambda file: (file != MANIFEST, file)):
        folder.remove(file)


def _check_whole(chunks: list[Chunk], where: str) -> None:
    """Every tensor's chunks must tile it, and each weight have its moments: a missing part is noticed here."""
    by_key: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_key.setdefault(chunk.key, []).append(chunk)
    for key, parts in by_key.items():
        size, held = math.prod(parts[0].global_shape), sum(math.prod(part.shape) for part in parts)
        if held != size or _overlap(parts):
            raise CheckpointError(f"the chunks of {key} do not tile it: {held} of {size} numbers", where, "save again")
    names: dict[str, set[str]] = {}
    for key in by_key:
        part, _, name = key.partition("/")
        names.setdefault(name, set()).add(part)
    for name, parts_of_name in names.items():
        if parts_of_name != {"weight", *MOMENTS}:
            raise CheckpointError(f"of {name} there is only {', '.join(sorted(parts_of_name))}", where, "save again")


def _overlap(parts: list[Chunk]) -> bool:
    """Whether any two of a tensor's chunks do."""
    starts, sizes = (np.array([getattr(part, key) for part in parts]) for key in ("start", "shape"))
    ends = starts + sizes
    for number in range(len(parts)):
        common = np.minimum(ends, ends[number]) > np.maximum(starts, starts[number])
        if common.all(axis=1).sum() > 1:
            return True
    return False
