"""Building shards: sources -> tokenizer -> Arrow files -> manifest, committed by one rename."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.shards import (
    FORMAT,
    MANIFEST,
    SCHEMA,
    Manifest,
    read_manifest,
    write_manifest,
    write_shard,
)
from armillary.data_pipeline.sources import documents
from armillary.data_pipeline.tokenizer import Tokenizer, document_texts
from armillary.errors import DataError

Progress = Callable[[str, int], None]


def built_from(config: DataConfig) -> dict:
    """The part of `[data]` that the shards depend on; the rest may change without a new build."""
    sources = [source.model_dump(exclude={"weight", "augment"}) for source in config.sources]
    return {"sources": sources, "vocab_size": config.vocab_size, "documents_per_shard": config.documents_per_shard}


def build(config: DataConfig, progress: Progress = lambda source, count: None, force: bool = False) -> Manifest:
    """Write the shards of `config` into `config.path`; progress(source, documents so far) is called now and then.

    Everything is written beside the target and renamed at the end, so a failed build leaves nothing behind
    and an earlier one untouched. Raises DataError where the target exists (unless `force`) or a source is bad.
    """
    target = Path(config.path)
    if target.exists() and not target.is_dir():
        raise DataError("there is a file where the shards should be", target, "choose another data.path")
    if target.exists() and not (target / MANIFEST).exists() and any(target.iterdir()):
        raise DataError("the folder exists and holds something else than shards", target, "choose another data.path")
    if (target / MANIFEST).exists() and not force:
        raise DataError("there are shards here already", target, "add --force to replace them")
    work = target.with_name(f".{target.name}.building-{os.getpid()}")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"the folder cannot be made: {error.strerror}", work.parent, "choose another data.path"
        ) from None
    try:
        manifest = _build_into(work, config, progress)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    except OSError as error:
        raise DataError(f"the shards cannot be written: {error.strerror}", work, "free some space") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def ensure_built(config: DataConfig, progress: Progress = lambda source, count: None) -> Manifest:
    """The manifest of the shards that `config` asks for; they are built where there are none."""
    target = Path(config.path)
    if not target.exists():
        build(config, progress)
    manifest = read_manifest(target)
    wanted = built_from(config)
    if manifest.built_from != wanted:
        changed = [key for key, value in wanted.items() if manifest.built_from.get(key) != value]
        raise DataError(
            f"the shards were built with another {' and '.join('data.' + key for key in changed)}",
            target,
            "run `armillary data build JOB.toml --force`, or choose another data.path",
        )
    return manifest


def _build_into(folder: Path, config: DataConfig, progress: Progress) -> Manifest:
    texts = (text for source in config.sources for doc in documents(source) for text in document_texts(doc))
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    sources = {}
    for source in config.sources:
        shards, done = [], 0
        for batch in _batched(map(tokenizer.encode_document, documents(source)), config.documents_per_shard):
            shards.append(write_shard(folder / f"{source.kind}-{len(shards):05d}.arrow", batch))
            done += len(batch)
            progress(source.kind, done)
        if not done:
            raise DataError(f"the source {source.kind} holds no documents", source.path, "remove it from data.sources")
        sources[source.kind] = tuple(shards)
    manifest = Manifest(
        format=FORMAT,
        arrow_schema=str(SCHEMA),
        built_from=built_from(config),
        tokenizer=tokenizer.to_json(),
        sources=sources,
    ).sealed()
    write_manifest(folder, manifest)
    return manifest


def _batched(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(items, size)):
        yield batch
