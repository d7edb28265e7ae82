"""What one worker does with one part of a source: scan it for copies, or encode it into shards.

Both leave a file of their results in the work folder, with a checksum, and take it instead of working again.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.dedup import BANDS, exact_key, near_keys
from armillary.data_pipeline.document import Document, Encoded, Picture, Text
from armillary.data_pipeline.filters import length_problem, quality_problem
from armillary.data_pipeline.prefetch import prefetch
from armillary.data_pipeline.shards import Shard, SubstringFile, schema_of
from armillary.data_pipeline.sources import read_part
from armillary.data_pipeline.sources.part import Part
from armillary.data_pipeline.substrings import SubstringWriter
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.data_pipeline.write import write_shards
from armillary.errors import DataError
from armillary.files import write_whole
from armillary.table import SealedTable

AT_ONCE, BYTES_AT_ONCE = 256, 16 << 20  # documents, and bytes of theirs, that are tokenized together


class PartReport(SealedTable):
    """What became of a part: its shards, and how many documents were dropped for which reason.

    `examples` name the first that could not be used and say why; no text of a document is in them.
    """

    shards: tuple[Shard, ...]
    dropped: dict[str, int]
    examples: tuple[str, ...] = ()
    substrings: SubstringFile | None = None


@dataclass(frozen=True)
class Scan:
    """Find the keys of a part's documents; `near`: those of MinHash too."""

    work: Path
    source: SourceConfig
    number: int
    part: Part
    near: bool


@dataclass(frozen=True)
class Encode:
    """Encode a part without the documents that `doubled` (bool [documents]) marks as copies."""

    work: Path
    source: SourceConfig
    number: int
    part: Part
    doubled: np.ndarray | None
    shard_bytes: int
    compression: str
    substrings: bool


def kept_documents(
    source: SourceConfig, part: Part, dropped: dict[str, int], examples: list[str] | None = None
) -> Iterator[tuple[int, Document]]:
    """(number in the part, document) of those worth keeping; `dropped` counts the others by reason.

    DataError at the first that cannot be used, where the source says to stop.
    """
    for number, document in enumerate(read_part(source, part)):
        if isinstance(document, DataError):
            if source.bad == "stop":
                raise DataError(document.what, f"source {source.name}: {document.where}", document.fix)
            reason = "could not be used"
            if examples is not None and len(examples) < 10:
                examples.append(f"{document.where}: {document.what}")
        else:
            reason = _problem(document, source)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            yield number, document


def _problem(document: Document, source: SourceConfig) -> str:
    text = "".join(document.texts)
    pictured = any(isinstance(part, Picture) for part in document.parts)
    problem = length_problem(text, 0 if pictured else source.min_chars, source.max_chars)
    prose = all(isinstance(part, Text) and part.learned for part in document.parts)
    return problem or (quality_problem(text) if source.quality and prose else "")


def scan_part(task: Scan) -> tuple[tuple[str, int], np.ndarray]:
    """(source and number, keys of the part's documents): uint64 [documents, 2 (+ BANDS)], see dedup.py; zeros for
    those that are dropped anyway."""
    name = task.source.name, task.number
    path = task.work / f"{task.source.name}-{task.number:05d}.keys.part"
    width = 2 + (BANDS if task.near else 0)
    if path.exists():
        with pa.memory_map(str(path)) as file:
            return name, pa.ipc.open_file(file).get_batch(0).column(0).to_numpy().reshape(-1, width).copy()
    rows, total = {}, 0
    for number, document in kept_documents(task.source, task.part, {}):
        keys = near_keys(document) if task.near else np.empty(0, np.uint64)
        rows[number] = np.concatenate([np.array(exact_key(document), np.uint64), keys])
        total = number + 1
    # What is dropped is alike to nothing: its keys are its own number.
    found = np.arange(total, dtype=np.uint64)[:, None] + np.uint64(task.number << 40) + np.zeros(width, np.uint64)
    for number, keys in rows.items():
        found[number] = keys
    batch = pa.record_batch([pa.array(found.ravel())], names=["keys"])
    temporary = path.with_suffix(".tmp")
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    temporary.rename(path)
    return name, found


def encode_part(task: Encode) -> tuple[tuple[str, int], PartReport]:
    """(source and number, report of the part); its shards are in the work folder."""
    stem = f"{task.source.name}-{task.number:05d}"
    path = task.work / f"{stem}.report.part"
    try:
        report = PartReport.model_validate_json(path.read_bytes())
        if report.intact:
            return (task.source.name, task.number), report
    except (FileNotFoundError, ValidationError):
        pass  # not done yet, or not to its end
    tokenizer = Tokenizer.from_json((task.work / "tokenizer.json").read_text())
    dropped: dict[str, int] = {}
    examples: list[str] = []
    index = SubstringWriter() if task.substrings else None
    encoded = _encoded(task, tokenizer, dropped, examples, index)
    shards = tuple(
        write_shards(task.work, stem, encoded, schema_of(tokenizer.size), task.shard_bytes, task.compression)
    )
    substrings = None
    if index is not None:
        substrings = index.write(task.work / f"{stem}.substrings.arrow", sum(shard.documents for shard in shards))
    report = PartReport(shards=shards, dropped=dropped, examples=tuple(examples), substrings=substrings).sealed()
    write_whole(path, report.model_dump_json())
    return (task.source.name, task.number), report


def _encoded(
    task: Encode, tokenizer: Tokenizer, dropped: dict[str, int], examples: list[str], index: SubstringWriter | None
) -> Iterator[Encoded]:
    """The part's documents as shards hold them; each is put into `index` too. They are read and tokenized in a thread,
    while those before them are written."""
    tokenized = ((batch, tokenizer.encode_documents(batch)) for batch in _batches(task, dropped, examples))
    kept = 0
    with contextlib.closing(prefetch(tokenized, ahead=1)) as ready:
        for document, encoded in itertools.chain.from_iterable(zip(*pair, strict=True) for pair in ready):
            size = 4 * len(encoded.tokens) + sum(len(data) for _, data in encoded.images)
            if size <= task.shard_bytes:
                if index is not None:
                    index.add(kept, document)
                kept += 1
                yield encoded
            elif task.source.bad == "stop":
                raise DataError(
                    f"a document of {size:,} bytes is larger than a shard", document.name, "raise data.shard_bytes"
                )
            else:
                dropped["larger than a shard"] = dropped.get("larger than a shard", 0) + 1


def _batches(task: Encode, dropped: dict[str, int], examples: list[str]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    held = 0
    for number, document in kept_documents(task.source, task.part, dropped, examples):
        if task.doubled is not None and number < len(task.doubled) and task.doubled[number]:
            dropped["copies"] = dropped.get("copies", 0) + 1
            continue
        batch.append(document)
        held += sum(len(part.data if isinstance(part, Picture) else part.text) for part in document.parts)
        if len(batch) == AT_ONCE or held >= BYTES_AT_ONCE:
            yield batch
            batch, held = [], 0
    yield batch
