"""Checking shards against their manifest."""

from collections.abc import Callable

import xxhash

from armillary.data_pipeline.folder import Folder, open_checked
from armillary.data_pipeline.shards import Manifest, ShardReader, schema_of
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.errors import DataError

Progress = Callable[[int, int], None]


def check_files(folder: Folder, manifest: Manifest) -> None:
    """DataError unless every shard and every index is there with its size; their bytes are not read."""
    for shards in manifest.sources.values():
        for shard in shards:
            folder.check_size(shard.file, shard.bytes)
            folder.check_size(shard.index_file, shard.index_bytes)
    for files in manifest.substrings.values():
        for file in files:
            folder.check_size(file.file, file.bytes)


def verify(folder: Folder, manifest: Manifest, progress: Progress = lambda done, total: None) -> list[DataError]:
    """Read every byte; what is wrong, each with its file and, where it can be told, its batch. Empty: nothing is.

    progress(bytes read, bytes in all) is called after each shard.
    """
    found: list[DataError] = []
    schema = schema_of(Tokenizer.from_json(manifest.tokenizer).size)
    shards = [shard for shards in manifest.sources.values() for shard in shards]
    substrings = [file for files in manifest.substrings.values() for file in files]
    done, total = 0, sum(shard.bytes + shard.index_bytes for shard in shards) + sum(file.bytes for file in substrings)
    for shard in shards:
        try:
            reader = ShardReader(folder, shard, schema)
            for number in range(len(reader.batch_ends)):
                reader.columns(number)
            if (digest := xxhash.xxh3_64_hexdigest(folder.open(shard.file, shard.bytes, shard.xxh3))) != shard.xxh3:
                raise DataError(
                    f"a shard is corrupted outside its batches: checksum {digest}, manifest {shard.xxh3}",
                    folder.at(shard.file),
                    folder.remedy,
                )
        except DataError as error:
            found.append(error)
        done += shard.bytes + shard.index_bytes
        progress(done, total)
    for file in substrings:
        try:
            open_checked(folder, file.file, file.bytes, file.xxh3, "an index of substrings")
        except DataError as error:
            found.append(error)
        done += file.bytes
        progress(done, total)
    return found
