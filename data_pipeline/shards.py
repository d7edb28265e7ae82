"""Arrow IPC shards, their indexes and their manifest: what is on disk. docs/data-format.md specifies it."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import ValidationError

from armillary.data_pipeline.folder import Folder, open_checked
from armillary.errors import DataError
from armillary.files import write_whole
from armillary.table import SealedTable, Table

MANIFEST = "manifest.json"
FORMAT = 4


class Shard(Table):
    """One shard and its index: names, counts (`batch_tokens`: of each batch), bytes and xxh3-64 checksums (hex)."""

    file: str
    documents: int
    tokens: int
    images: int
    batch_tokens: tuple[int, ...]
    bytes: int
    xxh3: str
    index_file: str
    index_bytes: int
    index_xxh3: str


class SubstringFile(Table):
    """An index of substrings of one part of a source, see substrings.py; `documents` is how many the part has."""

    file: str
    documents: int
    bytes: int
    xxh3: str


class SourceReport(Table):
    """What became of a source's documents; `dropped` counts by reason, `examples` name some that could not be used."""

    documents: int
    tokens: int
    images: int
    bytes: int
    dropped: dict[str, int]
    examples: tuple[str, ...]


class Manifest(SealedTable):
    """Written last: without it there are no shards. `built_from` holds the keys of `[data]` that shaped them."""

    format: int
    arrow_schema: str
    built_from: dict
    tokenizer: str
    tokenizer_xxh3: str
    sources: dict[str, tuple[Shard, ...]]
    reports: dict[str, SourceReport]
    substrings: dict[str, tuple[SubstringFile, ...]]


def schema_of(vocab_size: int) -> pa.Schema:
    """A record is a document. Token numbers take 16 bits where the vocabulary allows it."""
    token = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    return pa.schema(
        [
            ("tokens", pa.list_(token)),
            ("spans", SPANS),
            ("images", pa.list_(pa.struct([("at", pa.uint32()), ("data", pa.binary())]))),
            ("weight", pa.float32()),
            ("name", pa.string()),
        ]
    )


SPANS = pa.list_(pa.struct([("end", pa.uint32()), ("role", pa.uint8())]))
# Of each document all that planning and laying out need: how many tokens and images it has, where its first token
# stands in its batch's, its weight, the tokens that stand for its images, and its spans.
INDEX_SCHEMA = pa.schema(
    [
        ("tokens", pa.uint32()),
        ("images", pa.uint32()),
        ("first", pa.uint32()),
        ("weight", pa.float32()),
        ("image_at", pa.list_(pa.uint32())),
        ("spans", SPANS),
    ]
)


@dataclass(frozen=True)
class Columns:
    """A batch of documents as numpy views of its Arrow buffers. Document i's tokens are
    tokens[offsets[i]:offsets[i + 1]], and so on; an image's file is data[data_offsets[j]:data_offsets[j + 1]]."""

    tokens: np.ndarray  # uint16 or uint32
    offsets: np.ndarray  # int32 [documents + 1]
    span_ends: np.ndarray  # uint32
    span_roles: np.ndarray  # uint8
    span_offsets: np.ndarray  # int32 [documents + 1]
    image_at: np.ndarray  # uint32
    image_offsets: np.ndarray  # int32 [documents + 1]
    data: np.ndarray  # uint8
    data_offsets: np.ndarray  # int32 [images + 1]
    weight: np.ndarray  # float32 [documents]
    names: pa.StringArray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "Columns":
        tokens, spans, images, weights, names = batch.columns
        _, data_offsets, data = images.values.field(1).buffers()
        return cls(
            tokens.values.to_numpy(),
            tokens.offsets.to_numpy(),
            spans.values.field(0).to_numpy(),
            spans.values.field(1).to_numpy(),
            spans.offsets.to_numpy(),
            images.values.field(0).to_numpy(),
            images.offsets.to_numpy(),
            np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8),
            np.frombuffer(data_offsets, np.int32) if data_offsets is not None else np.zeros(1, np.int32),
            weights.to_numpy(),
            names,
        )

    def __len__(self) -> int:
        return len(self.weight)

    def image(self, number: int) -> memoryview:
        """An image's file."""
        data, ends, _ = self.files
        return data[ends[number] : ends[number + 1]]

    @functools.cached_property
    def files(self) -> tuple[memoryview, list[int], list[int]]:
        """The images' files one behind the other, where each ends, from 0 on, and the images before each document."""
        return memoryview(self.data), self.data_offsets.tolist(), self.image_offsets.tolist()


class ShardReader:
    """A memory-mapped shard: its documents' sizes at once, its batches when they are asked for.

    DataError where a file is missing or not what the manifest says.
    """

    def __init__(self, folder: Folder, shard: Shard, schema: pa.Schema):
        self._folder, self._shard, self._schema = folder, shard, schema
        content = open_checked(folder, shard.index_file, shard.index_bytes, shard.index_xxh3, "a shard's index")
        reader = pa.ipc.open_file(content)
        index = reader.get_batch(0)
        self.tokens: np.ndarray = index.column(0).to_numpy()  # uint32 [documents]
        self.images: np.ndarray = index.column(1).to_numpy()  # uint32 [documents]
        self.first: np.ndarray = index.column(2).to_numpy()  # uint32 [documents]
        self.weight: np.ndarray = index.column(3).to_numpy()  # float32 [documents]
        image_at, spans = index.column(4), index.column(5)
        self.image_at: np.ndarray = image_at.values.to_numpy()  # uint32 [images]
        self.image_offsets: np.ndarray = image_at.offsets.to_numpy()  # int32 [documents + 1]
        self.span_ends: np.ndarray = spans.values.field(0).to_numpy()  # uint32 [spans]
        self.span_roles: np.ndarray = spans.values.field(1).to_numpy()  # uint8 [spans]
        self.span_offsets: np.ndarray = spans.offsets.to_numpy()  # int32 [documents + 1]
        self.mixed = reader.schema.metadata[b"mixed"] == b"true"  # some document has images, roles or a weight
        self._batches = json.loads(reader.schema.metadata[b"batches"])
        ends = [batch["documents"] for batch in self._batches]
        inside = (0 <= one["start"] <= one["stop"] <= shard.bytes >= one["tokens_at"] for one in self._batches)
        if ends != sorted(ends) or [0, *ends][-1] != len(self.tokens) or not all(inside):
            raise self.inconsistent()
        self.batch_ends = np.array(ends, np.int64)
        self.batch_begins = np.concatenate([[0], self.batch_ends[:-1]])
        self.tokens_at = np.array([batch["tokens_at"] for batch in self._batches], np.int64)  # bytes
        self.checked = np.zeros(len(self._batches), bool)  # batches whose checksum was found right
        self.views: dict[int, Columns] = {}

    @property
    def address(self) -> int:
        """Where the file begins in memory; its tokens are where `tokens_at` says. It is fetched when it is first asked
        for."""
        return self._file.address

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return self._shard.bytes

    @functools.cached_property
    def plain(self) -> np.ndarray:
        """Which documents are of nothing but tokens, and have a weight of 1: bool [documents]."""
        return (np.diff(self.image_offsets) == 0) & (np.diff(self.span_offsets) == 0) & (self.weight == 1)

    def inconsistent(self) -> DataError:
        """What is wrong where the index does not agree with the file, or with itself."""
        return DataError(
            "a shard's index does not fit its shard", self._folder.at(self._shard.file), self._folder.remedy
        )

    @functools.cached_property
    def _file(self) -> pa.Buffer:
        shard = self._shard
        return self._folder.open(shard.file, shard.bytes, shard.xxh3)

    def columns(self, number: int) -> Columns:
        """Batch `number`; DataError where its bytes are not those that were written (checked once)."""
        self.check(number)
        return Columns.of(pa.ipc.read_record_batch(self._message(number), self._schema))

    def check(self, number: int) -> None:
        """DataError where the bytes of batch `number` are not those that were written. Their checksum is compared
        once."""
        if self.checked[number]:
            return
        found = xxhash.xxh3_64_hexdigest(self._message(number))
        if found != (wanted := self._batches[number]["xxh3"]):
            raise DataError(
                f"batch {number} of a shard is corrupted: checksum {found}, index {wanted}",
                self._folder.at(self._shard.file),
                self._folder.remedy,
            )
        self.checked[number] = True

    def _message(self, number: int) -> pa.Buffer:
        batch = self._batches[number]
        return self._file.slice(batch["start"], batch["stop"] - batch["start"])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder of shards, synced to disk."""
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1))


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a folder of shards; DataError where there is none or it is damaged."""
    path = folder.at(MANIFEST)
    try:
        tables = json.loads(folder.read_text(MANIFEST))
        if isinstance(tables, dict) and tables.get("format", FORMAT) != FORMAT:
            raise DataError(
                f"the shards are of format {tables['format']}, this version reads {FORMAT}",
                path,
                f"build them anew (a run goes on with the version that made it): {folder.build}",
            )
        manifest = Manifest.model_validate(tables)
    except FileNotFoundError:
        raise DataError("there are no shards here", folder.at(""), folder.build) from None
    except (ValidationError, ValueError) as error:
        raise DataError(f"the manifest cannot be read: {str(error).splitlines()[0]}", path, folder.remedy) from None
    if not manifest.intact:
        raise DataError("the manifest is damaged: its checksum does not fit", path, folder.remedy)
    if xxhash.xxh3_64_hexdigest(manifest.tokenizer.encode()) != manifest.tokenizer_xxh3:
        raise DataError("the tokenizer is not the one that the shards were built with", path, folder.remedy)
    names = [n for shards in manifest.sources.values() for shard in shards for n in (shard.file, shard.index_file)]
    for name in (*names, *(file.file for files in manifest.substrings.values() for file in files)):
        if Path(name).name != name:
            raise DataError(f"the manifest names a file outside its folder: {name}", path, folder.remedy)
    return manifest
