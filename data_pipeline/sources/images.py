"""Folders of images with captions: NAME.jpg beside NAME.txt, or all captions in a metadata.jsonl."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.sources.part import Part, files_of, grouped, inside, name_in, read_file
from armillary.data_pipeline.sources.record import Record
from armillary.errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
METADATA = "metadata.jsonl"


def parts(source: SourceConfig) -> list[Part]:
    """Images in groups of about 64 MiB; and the metadata.jsonl, for what it names beside them."""
    metadata = Path(source.path) / METADATA
    listed = [Part(files=(str(metadata),))] if metadata.is_file() else []
    return grouped(files_of(source.path, ENDINGS)) + listed


def read(source: SourceConfig, part: Part) -> Iterator[Record]:
    """A record an image, with its caption as a text to learn."""
    root = Path(source.path)
    captions = _captions(root)
    files = [Path(file) for file in part.files]
    if files == [root / METADATA]:
        files = [file for file in captions if not (file.is_file() and file.suffix.lower() in ENDINGS)]
    for file in files:
        yield Record(name_in(source, file), file.parent, functools.partial(_fields, file, captions.get(file), source))


def _fields(file: Path, caption: dict | None, source: SourceConfig) -> dict:
    caption = caption or {source.text_field: read_file(file.with_suffix(".txt")).decode("utf-8-sig")}
    return caption | {source.image_field: read_file(file)}


def _captions(root: Path) -> dict[Path, dict]:
    """Records of the folder's metadata.jsonl, by the file that their `file_name` names; none where it is missing."""
    if not (root / METADATA).is_file():
        return {}
    found = {}
    try:
        for line in read_file(root / METADATA).decode().splitlines():
            record = json.loads(line)
            found[inside(root, record["file_name"])] = record
    except (ValueError, KeyError, TypeError):
        raise DataError("a line is no record with a `file_name`", root / METADATA, "correct it") from None
    return found
