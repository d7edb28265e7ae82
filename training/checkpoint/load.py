"""Loading: any layout takes from a checkpoint the parts that it holds."""

from collections.abc import Iterable, KeysView
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash

from armillary.errors import CheckpointError
from armillary.model.coordinates import Placement
from armillary.storage import Storage
from armillary.training.checkpoint.manifest import MOMENTS, OTHER, Chunk, Manifest, read_manifest
from armillary.training.health import heartbeat

READERS = 4  # tensors at once
MOST_SHOWN = 5  # weights in one message


class Reader:
    """Tensors of a committed checkpoint, by key and region; a chunk's checksum is verified each time it is read.

    For several threads at once.
    """

    def __init__(self, checkpoint: Storage):
        self._files = checkpoint
        self.manifest: Manifest = read_manifest(checkpoint)
        self._by_key: dict[str, list[Chunk]] = {}
        for chunk in self.manifest.chunks:
            self._by_key.setdefault(chunk.key, []).append(chunk)

    @property
    def keys(self) -> KeysView[str]:
        """`<part>/<global name>` of every tensor."""
        return self._by_key.keys()

    def states(self, places: Iterable[Placement]) -> dict[str, dict[str, torch.Tensor]]:
        """What a rank holds of the weights and moments at `places`, for Engine.load_state. CheckpointError where they
        are another model's."""
        places = list(places)
        self._check_model(places)
        wanted = [(place, part) for place in places for part in ("weight", *MOMENTS)]
        found: dict[str, dict[str, torch.Tensor]] = {}
        with ThreadPoolExecutor(READERS) as pool:
            tensors = pool.map(lambda one: self.local(one[1], one[0]), wanted)
            for (place, part), tensor in zip(wanted, tensors, strict=True):
                found.setdefault(place.name, {})[part] = tensor
        return found

    def content(self, key: str) -> frozenset:
        """Two tensors with the same content are equal; with another, they may be."""
        return frozenset((chunk.start, chunk.shape, chunk.xxh3) for chunk in self._chunks(key))

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a global tensor."""
        return self._chunks(key)[0].global_shape

    def whole(self, key: str) -> torch.Tensor:
        """The whole of a global tensor, float32."""
        shape = self.shape(key)
        return self.region(key, (0,) * len(shape), shape)

    def local(self, part: str, place: Placement) -> torch.Tensor:
        """What a rank holds of a global tensor, float32; CheckpointError where the shapes differ."""
        key = f"{part}/{place.name}"
        shape = self.shape(key)
        if shape != place.shape:
            self._check_model([place])
        blocks = []
        for piece in place.pieces:
            start, size = [0] * len(shape), list(shape)
            start[place.axis], size[place.axis] = piece.start, piece.size
            blocks.append(self.region(key, tuple(start), tuple(size)))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, place.axis)

    def region(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Rows [start, start + shape) of a global tensor, float32, gathered from the chunks that overlap it."""
        chunks = self._chunks(key)
        for chunk in chunks:
            if (chunk.start, chunk.shape) == (start, shape):
                return torch.from_numpy(self._read(chunk))
        out = np.empty(shape, np.float32)
        for chunk in chunks:
            low = [max(a, b) for a, b in zip(start, chunk.start, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, chunk.start, chunk.shape, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                to = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
                of = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, chunk.start, strict=True))
                out[to] = self._read(chunk)[of]
        return torch.from_numpy(out)

    def _check_model(self, places: list[Placement]) -> None:
        wanted = {place.name: place.shape for place in places}
        held = {key.removeprefix("weight/"): self.shape(key) for key in self.keys if key.startswith("weight/")}
        other = [(name, held.get(name), shape) for name, shape in wanted.items() if held.get(name) != shape]
        if other:
            rows = "".join(
                f"\n    {name}: {list(had) if had else 'not there'} in the checkpoint, {list(shape)} in the model"
                for name, had, shape in other[:MOST_SHOWN]
            )
            more = f"\n    and {len(other) - MOST_SHOWN:,} more" if len(other) > MOST_SHOWN else ""
            raise CheckpointError(
                f"the checkpoint is of another model:{rows}{more}", self._files.at(), "take the model's own dimensions"
            )

    def _chunks(self, key: str) -> list[Chunk]:
        if key not in self._by_key:
            where = self._files.at()
            raise CheckpointError(f"the checkpoint has no {key}", where, "resume with the model's own dimensions")
        return self._by_key[key]

    def _read(self, chunk: Chunk) -> np.ndarray:
        try:
            raw = self._files.read(chunk.file, chunk.offset, chunk.bytes)
        except OSError as error:
            reason = error.strerror or "there is none"
            where = self._files.at(chunk.file)
            raise CheckpointError(f"a checkpoint's file cannot be read: {reason}", where, OTHER) from None
        heartbeat.beat()
        found = xxhash.xxh3_64_hexdigest(raw)
        if found != chunk.xxh3:
            where = self._files.at(chunk.file)
            raise CheckpointError(f"{chunk.key} is corrupted: checksum {found}, manifest {chunk.xxh3}", where, OTHER)
        numbers = np.frombuffer(raw, np.float32).reshape(chunk.shape)
        return numbers if numbers.flags.writeable else numbers.copy()
