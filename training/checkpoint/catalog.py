"""The checkpoints of a store: which there are, whether one is whole, how two differ, which are to be kept."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from armillary.errors import CheckpointError
from armillary.storage import Storage
from armillary.training.checkpoint.manifest import FOLDER, MANIFEST, Chunk, State, read_manifest

READERS = 4  # chunks at once


@dataclass(frozen=True)
class Entry:
    """A committed checkpoint; `problem` says why its manifest cannot be read, and then there is no `state`."""

    name: str
    state: State | None = None
    bytes: int = 0
    problem: str = ""


class Difference(NamedTuple):
    """How one tensor differs: `kind` is "changed", "shape", "first only" or "second only"; `largest` is the largest
    absolute difference of its numbers, `norm` that of all, relative to the first's."""

    key: str
    kind: str
    largest: float = 0.0
    norm: float = 0.0


def listed(store: Storage) -> list[Entry]:
    """The committed checkpoints of a store, by step; damaged ones last."""
    found = []
    for file in store.sizes():
        name, _, last = file.rpartition("/")
        if last == MANIFEST and FOLDER.fullmatch(name):
            try:
                manifest = read_manifest(store.folder(name))
            except CheckpointError as error:
                found.append(Entry(name, problem=error.what))
            else:
                found.append(Entry(name, manifest.state, sum(chunk.bytes for chunk in manifest.chunks)))
    return sorted(found, key=lambda one: (one.state is None, one.state.step if one.state else 0, one.name))


def kept(found: Iterable[Entry], last: int, every: int, best: int) -> set[str]:
    """Which of the committed checkpoints are to be kept, by name: the newest `last` (all where that is 0), those whose
    step `every` divides (none where it is 0), the `best` of lowest loss, and damaged ones, for who looks into them."""
    found = list(found)
    whole = sorted((one for one in found if one.state is not None), key=lambda one: one.state.saved_at)
    if not last:
        return {one.name for one in found}
    chosen = [one for one in found if one.state is None] + whole[-last:]
    chosen += [one for one in whole if every and one.state.step % every == 0]
    chosen += sorted(whole, key=lambda one: math.inf if one.state.loss is None else one.state.loss)[:best]
    return {one.name for one in chosen}


def verify(checkpoint: Storage, tell: Callable[[int, int], None] = lambda done, total: None) -> tuple[int, list[str]]:
    """Read every byte of a checkpoint: (bytes, what is wrong). `tell` hears of bytes read, of how many.

    CheckpointError where there is no manifest that can be read.
    """
    chunks = read_manifest(checkpoint).chunks
    by_file: dict[str, list[Chunk]] = {}
    for chunk in sorted(chunks, key=lambda one: (one.file, one.offset)):
        by_file.setdefault(chunk.file, []).append(chunk)
    total, done, problems = sum(chunk.bytes for chunk in chunks), 0, []
    sizes = checkpoint.sizes()
    with ThreadPoolExecutor(READERS) as pool:
        for name, parts in by_file.items():
            if name not in sizes:
                problems.append(f"{name} is missing")
                continue
            end = parts[-1].offset + parts[-1].bytes
            if sizes[name] != end:
                problems.append(f"{name} has {sizes[name]:,} bytes, not {end:,}")
            ends = [0, *(part.offset + part.bytes for part in parts[:-1])]
            for part, wrong in zip(parts, pool.map(_wrong, [checkpoint] * len(parts), parts, ends), strict=True):
                problems += wrong
                done += part.bytes
                tell(done, total)
    return total, problems


def _wrong(checkpoint: Storage, chunk: Chunk, begin: int) -> list[str]:
    """What is wrong with a chunk, and the zeros between it and what ends at `begin`."""
    try:
        content = memoryview(checkpoint.read(chunk.file, begin, chunk.offset + chunk.bytes - begin))
    except OSError as error:
        return [f"{chunk.file}: {error.strerror or error}"]
    filling = chunk.offset - begin
    found = [f"{chunk.file}: bytes that belong to nothing before {chunk.key}"] if any(content[:filling]) else []
    if xxhash.xxh3_64_hexdigest(content[filling:]) != chunk.xxh3:
        found.append(f"{chunk.file}: {chunk.key} is corrupted")
    return found


def differences(first: Storage, second: Storage) -> tuple[int, Iterator[Difference]]:
    """(tensors compared, those that differ), of two checkpoints, whatever layouts wrote them."""
    from armillary.training.checkpoint.load import Reader

    one, other = Reader(first), Reader(second)
    keys = list(dict.fromkeys([*one.keys, *other.keys]))
    return len(keys), (found for key in keys if (found := _difference(one, other, key)) is not None)


def _difference(one, other, key: str) -> Difference | None:
    if key not in one.keys or key not in other.keys:
        return Difference(key, "first only" if key in one.keys else "second only")
    if one.shape(key) != other.shape(key):
        return Difference(key, "shape")
    if one.content(key) == other.content(key):  # not one byte has to be read
        return None
    a, b = one.whole(key).double(), other.whole(key).double()
    away = (a - b).abs()
    if not bool(away.any()):
        return None
    return Difference(key, "changed", away.max().item(), (away.norm() / (a.norm() or 1.0)).item())
