"""Arrow IPC shards and their manifest: what is on disk."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import ValidationError

from armillary.errors import DataError
from armillary.table import SealedTable, Table

MANIFEST = "manifest.json"
FORMAT = 2
SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.uint8())),
        ("images", pa.list_(pa.binary())),
    ]
)


class Shard(Table):
    """One file: its counts, bytes and xxh3-64 checksum (hex)."""

    file: str
    documents: int
    tokens: int
    learned_tokens: int
    images: int
    bytes: int
    xxh3: str


class Manifest(SealedTable):
    """Written last: without it there are no shards. `built_from` holds the keys of `[data]` that shaped them."""

    format: int
    arrow_schema: str
    built_from: dict
    tokenizer: str
    sources: dict[str, tuple[Shard, ...]]


def checksum(path: Path) -> str:
    """xxh3-64 of a file, as 16 hex digits."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_shard(path: Path, rows: list[tuple[np.ndarray, np.ndarray, list[bytes]]]) -> Shard:
    """Write documents (tokens int32 [n], learned uint8 [n], images) as one Arrow IPC file, synced to disk."""
    tokens, learned, images = zip(*rows, strict=True)
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).astype(np.int32)
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(tokens), pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(learned), pa.uint8())),
        pa.array(images, SCHEMA.field("images").type),
    ]
    with open(path, "wb") as file:
        with pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        file.flush()
        os.fsync(file.fileno())
    return Shard(
        file=path.name,
        documents=len(rows),
        tokens=int(offsets[-1]),
        learned_tokens=int(sum(int(x.sum()) for x in learned)),
        images=sum(map(len, images)),
        bytes=path.stat().st_size,
        xxh3=checksum(path),
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder of shards, synced to disk."""
    with open(folder / MANIFEST, "w") as file:
        file.write(manifest.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards; DataError where there is none or it is damaged."""
    rebuild = "run `armillary data build JOB.toml --force`"
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("there are no shards here", folder, "run `armillary data build JOB.toml`") from None
    except (ValidationError, ValueError) as error:
        raise DataError(f"the manifest cannot be read: {str(error).splitlines()[0]}", path, rebuild) from None
    if manifest.format != FORMAT:
        raise DataError(f"the shards are of format {manifest.format}, this version reads {FORMAT}", path, rebuild)
    if not manifest.intact:
        raise DataError("the manifest is damaged: its checksum does not fit", path, rebuild)
    for shards in manifest.sources.values():
        for shard in shards:
            if Path(shard.file).name != shard.file:
                raise DataError(f"the manifest names a file outside its folder: {shard.file}", path, rebuild)
    return manifest


def open_shard(folder: Path, shard: Shard) -> pa.RecordBatch:
    """Memory-map one shard after checking its size and checksum against the manifest."""
    path, rebuild = folder / shard.file, "restore the file, or run `armillary data build JOB.toml --force`"
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError("a shard is missing", path, rebuild) from None
    if size != shard.bytes:
        raise DataError(f"a shard has {size} bytes where its manifest says {shard.bytes}", path, rebuild)
    found = checksum(path)
    if found != shard.xxh3:
        raise DataError(f"a shard is corrupted: checksum {found}, manifest {shard.xxh3}", path, rebuild)
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if not reader.schema.equals(SCHEMA):
        raise DataError("a shard has another schema than this version writes", path, rebuild)
    return reader.get_batch(0)
