"""One source's documents by number, from memory-mapped shards."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from armillary.data_pipeline.shards import Columns, Manifest, ShardReader, schema_of
from armillary.data_pipeline.tokenizer import Tokenizer

OPEN = 4096  # shards, and batches, that are held open: views of mapped files, a few kilobytes each


class Corpus:
    """A source's shards. What is held in memory grows with their number, not with that of the documents."""

    def __init__(self, folder: Path, manifest: Manifest, source: str, tokenizer: Tokenizer):
        self._folder, self._shards = folder, manifest.sources[source]
        self._schema = schema_of(tokenizer.size)
        self._ends = np.cumsum([shard.documents for shard in self._shards])
        self.documents = int(self._ends[-1])
        self.tokens = sum(shard.tokens for shard in self._shards)
        self.images = sum(shard.images for shard in self._shards)
        self.reader = functools.lru_cache(OPEN)(self._reader)
        self.columns = functools.lru_cache(OPEN)(self._columns)

    def sizes(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many tokens and images each of `documents` (int64 [n]) has, int64 [n] each."""
        tokens, images = np.empty(len(documents), np.int64), np.empty(len(documents), np.int64)
        for shard, which, rows in self._by_shard(documents):
            reader = self.reader(shard)
            tokens[which], images[which] = reader.tokens[rows], reader.images[rows]
        return tokens, images

    def locate(self, documents: np.ndarray) -> Iterator[tuple[np.ndarray, Columns, np.ndarray]]:
        """(which of `documents`, their batch, their rows in it), batch by batch."""
        for shard, which, rows in self._by_shard(documents):
            ends = self.reader(shard).batch_ends
            for batch, within in groups(np.searchsorted(ends, rows, side="right")):
                begin = int(ends[batch - 1]) if batch else 0
                yield which[within], self.columns(shard, batch), rows[within] - begin

    def _by_shard(self, documents: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for shard, which in groups(np.searchsorted(self._ends, documents, side="right")):
            begin = int(self._ends[shard - 1]) if shard else 0
            yield shard, which, documents[which] - begin

    def _reader(self, shard: int) -> ShardReader:
        return ShardReader(self._folder, self._shards[shard], self._schema)

    def _columns(self, shard: int, batch: int) -> Columns:
        return self.reader(shard).columns(batch)


def groups(keys: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(key, where it stands in `keys`) of each distinct key, in order."""
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    for which in np.split(order, cuts) if len(keys) else ():
        yield int(keys[which[0]]), which
