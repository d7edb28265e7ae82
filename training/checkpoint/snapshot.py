"""A rank's share of a checkpoint as a copy in host memory, which training does not touch."""

from collections.abc import Iterable, Iterator

import torch
import xxhash

from armillary.model.coordinates import Placement
from armillary.training.checkpoint.manifest import Chunk

FILE_BYTES = 64 << 20  # of a file, or one chunk where that is larger: what is written, and tried again, as one
ALIGNMENT = 64


class Snapshot:
    """Takes one copy after another, in the same memory: as large as what this rank writes.

    Files are named `<prefix>-<number>.bin`.
    """

    def __init__(self, prefix: str, pinned: bool):
        self._prefix, self._pinned = prefix, pinned
        self._memory: list[torch.Tensor] = []  # uint8, of a file each
        self._used: list[int] = []  # bytes of them that hold something
        self._chunks: list[list[dict]] = []  # of each file, all but their checksums

    def take(self, states: Iterable[tuple[Placement, dict[str, torch.Tensor]]]) -> None:
        """Copy this rank's share of `states` (see Engine.state). Collective over data ranks.

        Ranks that hold the same values take turns.
        """
        self._used, self._chunks = [], []
        for number, (place, parts) in enumerate(states):
            if number % place.turns != place.turn:
                continue
            for part, tensor in parts.items():
                for piece in place.pieces:
                    block = tensor.narrow(place.axis, piece.at, piece.size)
                    start = [0] * block.ndim
                    start[place.axis] = piece.start
                    at = self._room(4 * block.numel())
                    self._chunks[-1].append({
                        "key": f"{part}/{place.name}", "global_shape": place.shape, "start": tuple(start),
                        "shape": tuple(block.shape), "file": self._name(len(self._used) - 1), "offset": at,
                        "bytes": 4 * block.numel(),
                    })  # fmt: skip
                    room = self._memory[len(self._used) - 1][at : at + 4 * block.numel()]
                    room.view(torch.float32).view(block.shape).copy_(block, non_blocking=True)
        if self._pinned:
            torch.cuda.current_stream().synchronize()

    @property
    def bytes(self) -> int:
        """Of the last copy."""
        return sum(self._used)

    def files(self) -> Iterator[tuple[str, memoryview, list[dict]]]:
        """Each file's name, content and chunks without their checksums."""
        for number, (used, chunks) in enumerate(zip(self._used, self._chunks, strict=True)):
            yield self._name(number), memoryview(self._memory[number].numpy())[:used], chunks

    def _name(self, number: int) -> str:
        return f"{self._prefix}-{number:03d}.bin"

    def _room(self, size: int) -> int:
        """Where in the last file `size` bytes go; a new file where it is full."""
        at = -(-self._used[-1] // ALIGNMENT) * ALIGNMENT if self._used else FILE_BYTES
        if at + size > FILE_BYTES:
            number, at = len(self._used), 0
            if number == len(self._memory):
                self._memory.append(torch.zeros(0, dtype=torch.uint8))
            if len(self._memory[number]) < size:
                self._memory[number] = torch.zeros(max(size, FILE_BYTES), dtype=torch.uint8, pin_memory=self._pinned)
            self._used.append(0)
            self._chunks.append([])
        self._used[-1] = at + size
        return at


def sealed(content: memoryview, chunks: list[dict]) -> list[Chunk]:
    """The chunks of a file with the checksums of their bytes."""
    return [
        Chunk(**chunk, xxh3=xxhash.xxh3_64_hexdigest(content[chunk["offset"] : chunk["offset"] + chunk["bytes"]]))
        for chunk in chunks
    ]
