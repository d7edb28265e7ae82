"""Documents by number, from memory-mapped shards."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from armillary.data_pipeline.batch import ImageShape, Sequence, lay_out
from armillary.data_pipeline.shards import Manifest, open_shard
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.errors import DataError


class Corpus:
    """One source's shards. Nothing is read until it is asked for; tokens come as views of the mapped file."""

    def __init__(self, folder: Path, manifest: Manifest, source: str, shape: ImageShape, tokenizer: Tokenizer):
        self._image_positions, self._image = shape.positions, tokenizer.image
        self._shards = [_Columns.of(open_shard(folder, shard)) for shard in manifest.sources[source]]
        self._ends = np.cumsum([len(shard.offsets) - 1 for shard in self._shards])
        text = np.concatenate([np.diff(shard.offsets) for shard in self._shards])
        images = np.concatenate([np.diff(shard.image_offsets) for shard in self._shards])
        self.lengths = text - 1 + images * (self._image_positions - 1)  # int64 [documents]: positions
        self.has_images = images > 0  # bool [documents]
        self.learned = np.concatenate([shard.learned_counts() for shard in self._shards])  # int64 [documents]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def check_fits(self, source: str, seq_length: int) -> None:
        """DataError if a document that cannot be cut is longer than a row."""
        longest = int((self.lengths * self.has_images).max())
        if longest > seq_length:
            raise DataError(
                f"a document with images takes {longest} positions and cannot be cut into rows of {seq_length}",
                source,
                f"set data.seq_length to at least {longest}, or take larger patches (model.patch_size)",
            )

    def sequence(self, document: int) -> Sequence:
        """Document number `document` of the source, from 0, laid out on positions."""
        number = int(np.searchsorted(self._ends, document, side="right"))
        shard = self._shards[number]
        row = document - (int(self._ends[number - 1]) if number else 0)
        text = slice(shard.offsets[row], shard.offsets[row + 1])
        images = [shard.images[i].as_py() for i in range(shard.image_offsets[row], shard.image_offsets[row + 1])]
        return lay_out(shard.tokens[text], shard.learned[text], images, self._image, self._image_positions)


@dataclass(frozen=True)
class _Columns:
    """A shard's buffers: numpy views of the mapped file; images stay in Arrow."""

    tokens: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray
    images: pa.Array
    image_offsets: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "_Columns":
        tokens, learned, images = batch.columns
        return cls(
            tokens.values.to_numpy(),
            learned.values.to_numpy(),
            tokens.offsets.to_numpy().astype(np.int64),
            images.values,
            images.offsets.to_numpy().astype(np.int64),
        )

    def learned_counts(self) -> np.ndarray:
        """Learned tokens of each document; the first token of a document is never predicted."""
        total = np.concatenate([[0], np.cumsum(self.learned, dtype=np.int64)])
        return total[self.offsets[1:]] - total[self.offsets[:-1]] - self.learned[self.offsets[:-1]]
