"""Building shards: sources -> tokenizer -> Arrow files -> manifest, committed by one rename."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash

from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.document import Encoded
from armillary.data_pipeline.shards import (
    FORMAT,
    MANIFEST,
    Manifest,
    read_manifest,
    schema_of,
    write_manifest,
    write_shards,
)
from armillary.data_pipeline.sources import documents
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.errors import DataError

Progress = Callable[[str, int], None]


def built_from(config: DataConfig) -> dict:
    """The part of `[data]` that the shards depend on; the rest may change without a new build."""
    sources = [source.model_dump(exclude={"weight", "augment"}) for source in config.sources]
    keys = ("vocab_size", "shard_bytes", "compression")
    return {"sources": sources} | {key: getattr(config, key) for key in keys}


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
    texts = (text for source in config.sources for document in documents(source) for text in document.texts)
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    schema, sources = schema_of(tokenizer.size), {}
    for source in config.sources:
        encoded = _counted(map(tokenizer.encode_document, documents(source)), lambda n, s=source: progress(s.name, n))
        sources[source.name] = tuple(
            write_shards(folder, source.name, encoded, schema, config.shard_bytes, config.compression)
        )
        if not sources[source.name]:
            raise DataError(f"the source {source.name} holds no documents", source.path, "remove it from data.sources")
    text = tokenizer.to_json()
    manifest = Manifest(
        format=FORMAT,
        arrow_schema=str(schema),
        built_from=built_from(config),
        tokenizer=text,
        tokenizer_xxh3=xxhash.xxh3_64_hexdigest(text.encode()),
        sources=sources,
    ).sealed()
    write_manifest(folder, manifest)
    return manifest


def _counted(items: Iterable[Encoded], say: Callable[[int], None], every: int = 8192) -> Iterator[Encoded]:
    """The items; say(how many so far) now and then, and at the end."""
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        if count % every == 0:
            say(count)
    say(count)
