"""Writing shards: documents to record batches to files, each with its index."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from armillary.data_pipeline.document import Encoded
from armillary.data_pipeline.folder import checksum
from armillary.data_pipeline.shards import INDEX_SCHEMA, Shard
from armillary.files import sync

BATCH_BYTES = 4 << 20  # of tokens and images; a batch is the least that is checked when a part of it is read
BATCH_DOCUMENTS = 16384


def record_batch(documents: list[Encoded], schema: pa.Schema) -> pa.RecordBatch:
    """Documents as one Arrow batch of `schema_of(...)`."""
    spans = [span for document in documents for span in document.spans]
    images = [image for document in documents for image in document.images]
    tokens = np.fromiter(itertools.chain.from_iterable(d.tokens for d in documents), np.uint32)
    columns = {
        "tokens": pa.array(tokens, schema.field("tokens").type.value_type),
        "spans": _structs(schema, "spans", spans),
        "images": _structs(schema, "images", images),
    }
    for name, values in columns.items():
        ends = np.cumsum([0] + [len(getattr(document, name)) for document in documents])
        columns[name] = pa.ListArray.from_arrays(ends.astype(np.int32), values)
    weights, names = [d.weight for d in documents], [d.name for d in documents]
    return pa.record_batch([*columns.values(), pa.array(weights, pa.float32()), pa.array(names)], schema=schema)


def _structs(schema: pa.Schema, column: str, rows: list[tuple]) -> pa.StructArray:
    fields = list(schema.field(column).type.value_type)
    arrays = [pa.array([row[i] for row in rows], field.type) for i, field in enumerate(fields)]
    return pa.StructArray.from_arrays(arrays, fields=fields)


def write_shards(
    folder: Path,
    stem: str,
    documents: Iterable[Encoded],
    schema: pa.Schema,
    shard_bytes: int,
    compression: str = "none",
) -> Iterator[Shard]:
    """Write documents as `stem`-00000.arrow, -00001.arrow, ... of about `shard_bytes` each, with their indexes.

    Each shard is given out when both its files are whole and synced. compression: "none" or "zstd".
    """
    batches = _batches(documents, min(BATCH_BYTES, -(-shard_bytes // 8)))
    number, batch = 0, next(batches, None)
    while batch is not None:
        path = folder / f"{stem}-{number:05d}.arrow"
        writer = _ShardWriter(path, schema, compression)
        while batch is not None and writer.bytes < shard_bytes:
            writer.write(batch)
            batch = next(batches, None)
        yield writer.close()
        number += 1


def _batches(documents: Iterable[Encoded], size: int) -> Iterator[list[Encoded]]:
    batch, held = [], 0
    for document in documents:
        batch.append(document)
        held += 4 * len(document.tokens) + sum(len(data) for _, data in document.images)
        if held >= size or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """One shard in the making. Its index says of each batch where its bytes are and what they must be."""

    def __init__(self, path: Path, schema: pa.Schema, compression: str):
        self._path, self._schema = path, schema
        self._file = pa.OSFile(str(path), "wb")
        options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
        self._writer = pa.ipc.new_file(self._file, schema, options=options)
        self._index: dict[str, list] = {name: [] for name in INDEX_SCHEMA.names}
        self._batch_tokens: list[int] = []
        self._ends: list[tuple[int, int]] = []  # bytes, documents

    @property
    def bytes(self) -> int:
        return self._file.tell()

    def write(self, documents: list[Encoded]) -> None:
        self._writer.write_batch(record_batch(documents, self._schema))
        at, index = 0, self._index
        for document in documents:
            index["tokens"].append(len(document.tokens))
            index["images"].append(len(document.images))
            index["first"].append(at)
            index["weight"].append(document.weight)
            index["image_at"].append([place for place, _ in document.images])
            index["spans"].append(document.spans)
            at += len(document.tokens)
        self._ends.append((self._file.tell(), len(index["tokens"])))
        self._batch_tokens.append(at)

    def close(self) -> Shard:
        self._writer.close()
        self._file.close()
        sync(self._path)
        raw = pa.memory_map(str(self._path)).read_buffer()
        start = 8 + self._schema.serialize().size  # behind the magic number and the schema's message
        batches = []
        for stop, documents in self._ends:
            digest = xxhash.xxh3_64_hexdigest(raw.slice(start, stop - start))
            batch = pa.ipc.read_record_batch(raw.slice(start, stop - start), self._schema)
            tokens_at = batch.column(0).values.buffers()[1].address - raw.address  # means nothing if compressed
            batches.append(
                {"start": start, "stop": stop, "documents": documents, "tokens_at": tokens_at, "xxh3": digest}
            )
            start = stop
        index_path = self._path.with_suffix(".index.arrow")
        index = self._index
        mixed = bool(index["images"][0]) or any(index["spans"]) or set(index["weight"]) != {1.0}
        schema = INDEX_SCHEMA.with_metadata({"batches": json.dumps(batches), "mixed": json.dumps(mixed)})
        with pa.OSFile(str(index_path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            arrays = [pa.array(index[field.name], field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        sync(index_path)
        return Shard(
            file=self._path.name,
            documents=len(index["tokens"]),
            tokens=sum(index["tokens"]),
            images=sum(index["images"]),
            batch_tokens=tuple(self._batch_tokens),
            bytes=self._path.stat().st_size,
            xxh3=checksum(self._path),
            index_file=index_path.name,
            index_bytes=index_path.stat().st_size,
            index_xxh3=checksum(index_path),
        )
