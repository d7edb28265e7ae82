"""A rank's share of a checkpoint as a copy in host memory, which training does not touch."""

from collections.abc import Iterable, Iterator

import torch
import xxhash

from armillary.model.coordinates import Block
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
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # to be made: where to, of what
        self._ready: torch.cuda.Event | None = None  # when what is to be copied is there

    def plan(self, state: Iterable[tuple[str, Block]], live: bool) -> None:
        """Find a place for every block of a state (see Engine.state), and copy it: at once, or where it is live, when
        `copy` is called."""
        self._used, self._chunks, self._copies = [], [], []
        for part, block in state:
            size, shape = 4 * block.tensor.numel(), tuple(block.tensor.shape)
            at = self._room(size)
            self._chunks[-1].append({
                "key": f"{part}/{block.name}", "global_shape": block.shape, "start": block.start, "shape": shape,
                "file": self._name(len(self._used) - 1), "offset": at, "bytes": size,
            })  # fmt: skip
            room = self._memory[len(self._used) - 1][at : at + size].view(torch.float32).view(shape)
            if live:
                self._copies.append((room, block.tensor))
            else:
                room.copy_(block.tensor, non_blocking=True)
        if self._pinned:
            self._ready = torch.cuda.Event()
            self._ready.record()
            if not live:
                self._ready.synchronize()

    def copy(self) -> None:
        """Make the copies that are left; from any thread."""
        if self._pinned and self._copies:
            stream = torch.cuda.Stream(self._copies[0][1].device)
            with torch.cuda.stream(stream):
                stream.wait_event(self._ready)
                for room, tensor in self._copies:
                    room.copy_(tensor, non_blocking=True)
            stream.synchronize()
        else:
            for room, tensor in self._copies:
                room.copy_(tensor)
        self._copies = []

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
