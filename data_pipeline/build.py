"""Building shards: sources -> documents worth keeping -> tokens -> Arrow files -> manifest, committed by one rename.

The work is cut into parts that are independent and each leave a file when they are done, so that they may run on many
processors and a build that was killed goes on where it stopped.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.dedup import copies
from armillary.data_pipeline.encode import Encode, PartReport, Scan, encode_part, kept_documents, scan_part
from armillary.data_pipeline.folder import open_folder
from armillary.data_pipeline.shards import (
    FORMAT,
    MANIFEST,
    Manifest,
    SourceReport,
    read_manifest,
    schema_of,
    write_manifest,
)
from armillary.data_pipeline.sources import parts_of
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.errors import DataError
from armillary.files import write_whole
from armillary.storage import is_url

Say = Callable[[str], None]  # a line on what was done
Each = Callable[[Callable, Iterable], Iterable]  # `map`, or one that works on many processors; any order
PLAN, TOKENIZER = "plan.json", "tokenizer.json"
TRAINING_CHARACTERS = 100_000_000  # that a tokenizer is trained on, over all sources


def built_from(config: DataConfig) -> dict:
    """The part of `[data]` that the shards depend on; the rest may change without a new build."""
    sources = [source.model_dump(exclude={"weight", "augment"}) for source in config.sources]
    keys = ("tokenizer", "dedup", "vocab_size", "shard_bytes", "compression", "substrings")
    return {"sources": sources} | {key: getattr(config, key) for key in keys}


def build(config: DataConfig, say: Say = lambda line: None, force: bool = False, each: Each = map) -> Manifest:
    """Write the shards of `config` into `config.path`.

    Everything is written beside the target and renamed at the end: a build that fails or is killed leaves an
    earlier one untouched, and what it did is taken up by the next build of the same keys and files. Raises
    DataError where the target exists (unless `force`) or a source is bad.
    """
    if is_url(config.path):
        raise DataError(
            "shards are built on this machine",
            config.path,
            "build them with data.path=FOLDER, then copy that folder there",
        )
    target = Path(config.path)
    if target.exists() and not target.is_dir():
        raise DataError("there is a file where the shards should be", target, "choose another data.path")
    if target.exists() and not (target / MANIFEST).exists() and any(target.iterdir()):
        raise DataError("the folder exists and holds something else than shards", target, "choose another data.path")
    if (target / MANIFEST).exists() and not force:
        raise DataError("there are shards here already", target, "add --force to replace them")
    work = target.with_name(f".{target.name}.building")
    made = [folder for folder in work.parents if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the folder cannot be made: {error.strerror}", work.parent, "choose another data.path"
        ) from None
    try:
        with _held(work):
            manifest = _build_into(work, config, say, each)
            for scrap in (*work.glob("*.part"), work / PLAN, work / TOKENIZER, work / "lock"):
                scrap.unlink(missing_ok=True)
            if target.exists():
                shutil.rmtree(target)
            work.rename(target)
    except _Busy:
        raise
    except DataError:  # what puts it right changes the files or the keys, and so the work
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else was put there meanwhile
            for folder in made:
                folder.rmdir()
        raise
    except OSError as error:
        raise DataError(
            f"the shards cannot be written: {error.strerror}", work, "free some space, then build again"
        ) from None
    return manifest


def ensure_built(config: DataConfig, say: Say = lambda line: None) -> Manifest:
    """The manifest of the shards that `config` asks for; they are built where there are none."""
    if not is_url(config.path) and not Path(config.path).exists():
        build(config, say)
    return built(config)


def built(config: DataConfig) -> Manifest:
    """The manifest of the shards that are at `config.path`; DataError where they are none, or other ones than `config`
    asks for."""
    folder = open_folder(config.path, config.cache, config.cache_bytes)
    manifest = read_manifest(folder)
    wanted = json.loads(json.dumps(built_from(config)))
    if manifest.built_from != wanted:
        changed = [key for key, value in wanted.items() if manifest.built_from.get(key) != value]
        raise DataError(
            f"the shards were built with another {' and '.join('data.' + key for key in changed)}",
            config.path,
            "choose another data.path"
            + ("" if is_url(config.path) else ", or replace them with `armillary data build JOB.toml --force`"),
        )
    return manifest


class _Busy(DataError):
    """Another build has the folder."""


@contextlib.contextmanager
def _held(work: Path) -> Iterator[None]:
    """Hold the folder for one build at a time; a dead one's hold ends with it."""
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _Busy("these shards are being built already", work, "wait for it") from None
        yield


def _build_into(work: Path, config: DataConfig, say: Say, each: Each) -> Manifest:
    parts = {source.name: parts_of(source) for source in config.sources}
    _take_up(work, config, parts)
    tokenizer = _tokenizer(work, config, parts, say)
    tasks = [(source, number, part) for source in config.sources for number, part in enumerate(parts[source.name])]
    doubled = _copies(work, config, tasks, say, each) if config.dedup != "none" else [None] * len(tasks)
    encodes = [
        Encode(work, source, number, part, drop, config.shard_bytes, config.compression, config.substrings)
        for (source, number, part), drop in zip(tasks, doubled, strict=True)
    ]
    done = {name: 0 for name in parts}
    reports = {}
    for task_name, report in each(encode_part, encodes):
        reports[task_name] = report
        done[task_name[0]] += 1
        say(f"{task_name[0]}: {done[task_name[0]]} of {len(parts[task_name[0]])} parts written")
    sources = {name: [reports[name, number] for number in range(len(parts[name]))] for name in parts}
    for source in config.sources:
        if not any(report.shards for report in sources[source.name]):
            summed = _summed(sources[source.name])
            dropped = "; ".join(f"{count:,} dropped: {reason}" for reason, count in summed.dropped.items())
            raise DataError(
                f"the source {source.name} holds no documents" + (f" ({dropped})" if dropped else ""), source.path,
                f"see {summed.examples[0]}" if summed.examples else "correct its keys, or remove it from data.sources",
            )  # fmt: skip
    text = tokenizer.to_json()
    manifest = Manifest(
        format=FORMAT,
        arrow_schema=str(schema_of(tokenizer.size)),
        built_from=json.loads(json.dumps(built_from(config))),
        tokenizer=text,
        tokenizer_xxh3=xxhash.xxh3_64_hexdigest(text.encode()),
        sources={name: tuple(shard for report in found for shard in report.shards) for name, found in sources.items()},
        reports={name: _summed(found) for name, found in sources.items()},
        substrings={name: tuple(r.substrings for r in found if r.substrings) for name, found in sources.items()},
    ).sealed()
    write_manifest(work, manifest)
    return manifest


def _take_up(work: Path, config: DataConfig, parts: dict) -> None:
    """Keep what an earlier build of the same keys and files did; anything else is removed."""
    files = {file: os.stat(file) for found in parts.values() for part in found for file in part.files}
    plan = {
        "built_from": built_from(config),
        "parts": {name: [part.model_dump() for part in found] for name, found in parts.items()},
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()},
    }
    text = json.dumps(plan, sort_keys=True)
    if (work / PLAN).exists() and (work / PLAN).read_text() == text:
        return
    for old in work.iterdir():
        if old.name != "lock":
            old.unlink()
    write_whole(work / PLAN, text)


def _tokenizer(work: Path, config: DataConfig, parts: dict, say: Say) -> Tokenizer:
    """The tokenizer that the job names, or one trained on the beginning of each source."""
    path = work / TOKENIZER
    if path.exists():
        return Tokenizer.from_json(path.read_text())
    if config.tokenizer:
        tokenizer = Tokenizer.from_file(Path(config.tokenizer))
        if tokenizer.size > config.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.size} entries, data.vocab_size is {config.vocab_size}",
                config.tokenizer,
                f"set data.vocab_size={tokenizer.size}",
            )
    else:
        say(f"training a tokenizer of {config.vocab_size:,} entries")
        tokenizer = Tokenizer.train(_training_texts(config, parts), config.vocab_size)
    write_whole(path, tokenizer.to_json())
    return tokenizer


def _training_texts(config: DataConfig, parts: dict) -> Iterator[str]:
    for source in config.sources:
        left = TRAINING_CHARACTERS // len(config.sources)
        for part in parts[source.name]:
            for _, document in kept_documents(source, part, {}):
                yield from document.texts
                left -= sum(map(len, document.texts))
                if left <= 0:
                    break
            if left <= 0:
                break


def _copies(work: Path, config: DataConfig, tasks: list, say: Say, each: Each) -> list[np.ndarray]:
    """Of each part, which of its documents (by their number in it) are copies of earlier ones."""
    scans = [Scan(work, source, number, part, config.dedup == "near") for source, number, part in tasks]
    keys = {}
    for name, found in each(scan_part, scans):
        keys[name] = found
        say(f"{len(keys)} of {len(scans)} parts compared")
    found = [keys[source.name, number] for source, number, _ in tasks]
    everything = np.concatenate(found)
    _, exact = np.unique(everything[:, :2], axis=0, return_inverse=True)
    doubled = copies(np.column_stack([exact.ravel().astype(np.uint64), everything[:, 2:]]))
    return np.split(doubled, np.cumsum([len(part) for part in found])[:-1])


def _summed(reports: list[PartReport]) -> SourceReport:
    """What became of a source's documents."""
    dropped: dict[str, int] = {}
    for report in reports:
        for reason, count in report.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    shards = [shard for report in reports for shard in report.shards]
    return SourceReport(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        images=sum(shard.images for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        dropped=dict(sorted(dropped.items())),
        examples=tuple(example for report in reports for example in report.examples)[:10],
    )
