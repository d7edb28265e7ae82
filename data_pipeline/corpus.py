"""One source's documents by number, from memory-mapped shards."""

import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.folder import Folder
from armillary.data_pipeline.shards import Columns, Manifest, ShardReader, schema_of
from armillary.data_pipeline.tokenizer import Tokenizer

OPEN = 1024  # shards that are held open: views of mapped files, a few kilobytes for each batch
OPEN_COMPRESSED = 256  # batches that are held unpacked: about 4 MiB each


class Corpus:
    """A source's shards. What is held in memory grows with their number, not with that of the documents.

    `reader(shard)` and `columns(shard, batch)` open what they are asked for, and keep the last `open_shards` open.
    """

    def __init__(self, folder: Folder, manifest: Manifest, source: str, tokenizer: Tokenizer, open_shards: int = OPEN):
        self._folder, self._shards = folder, manifest.sources[source]
        self._schema = schema_of(tokenizer.size)
        self.shard_sizes = tuple(shard.documents for shard in self._shards)
        self._ends = np.cumsum(self.shard_sizes)
        self.documents = int(self._ends[-1])
        self.tokens = sum(shard.tokens for shard in self._shards)
        self.images = sum(shard.images for shard in self._shards)
        self.compressed = manifest.built_from.get("compression", "none") != "none"
        self.reader = functools.lru_cache(open_shards)(self._reader)
        self._alive: weakref.WeakValueDictionary[int, ShardReader] = weakref.WeakValueDictionary()
        self.columns = functools.lru_cache(OPEN_COMPRESSED)(self._unpack) if self.compressed else self._view

    def _unpack(self, shard: int, batch: int) -> Columns:
        return self.reader(shard).columns(batch)

    def _view(self, shard: int, batch: int) -> Columns:
        """Views of a shard's file go with its reader."""
        reader = self.reader(shard)
        if batch not in reader.views:
            reader.views[batch] = reader.columns(batch)
        return reader.views[batch]

    def shards_of(self, documents: np.ndarray) -> np.ndarray:
        """The shards that hold `documents` (int64 [n]), each once."""
        return np.unique(np.searchsorted(self._ends, documents, side="right"))

    def bytes_of(self, shard: int) -> int:
        """The size of a shard and its index."""
        return self._shards[shard].bytes + self._shards[shard].index_bytes

    def fetch(self, shard: int, index_only: bool) -> None:
        """Have a shard's index, or both its files, on this machine."""
        entry = self._shards[shard]
        self._folder.fetch(entry.index_file, entry.index_bytes, entry.index_xxh3)
        if not index_only:
            self._folder.fetch(entry.file, entry.bytes, entry.xxh3)

    def look_up(self, documents: np.ndarray) -> "Entries":
        """What the indexes say of `documents` (int64 [n]); no batch is read."""
        found = Entries(*(np.empty(len(documents), np.int64) for _ in range(6)))
        for shard, which, rows in self._by_shard(documents):
            reader = self.reader(shard)
            batch = np.searchsorted(reader.batch_ends, rows, side="right")
            found.tokens[which], found.images[which] = reader.tokens[rows], reader.images[rows]
            found.first[which] = reader.first[rows]
            found.shard[which], found.batch[which] = shard, batch
            found.row[which] = rows - reader.batch_begins[batch]
        return found

    def _by_shard(self, documents: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for shard, which in groups(np.searchsorted(self._ends, documents, side="right")):
            begin = int(self._ends[shard - 1]) if shard else 0
            yield shard, which, documents[which] - begin

    def _reader(self, shard: int) -> ShardReader:
        """One that somebody still holds is not opened again, so that what was checked is what is read."""
        reader = self._alive.get(shard)
        if reader is None:
            reader = self._alive[shard] = ShardReader(self._folder, self._shards[shard], self._schema)
        return reader


@dataclass(frozen=True)
class Entries:
    """Documents as the indexes know them, int64 [n] each: see shards.INDEX_SCHEMA, and where each is."""

    tokens: np.ndarray
    images: np.ndarray
    first: np.ndarray
    shard: np.ndarray
    batch: np.ndarray
    row: np.ndarray  # in its batch


def groups(keys: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(key, where it stands in `keys`) of each distinct key, in order."""
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    for which in np.split(order, cuts) if len(keys) else ():
        yield int(keys[which[0]]), which
