"""Folders of images with captions: NAME.jpg beside NAME.txt, or all captions in a metadata.jsonl."""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.sources.part import ENDINGS, Part, files_of, grouped, inside, name_in, read_file
from armillary.data_pipeline.sources.record import Record
from armillary.errors import DataError

METADATA = "metadata.jsonl"


def parts(source: SourceConfig) -> list[Part]:
    """Images in groups of about 64 MiB; and the metadata.jsonl, for what it names beside them."""
    metadata = Path(source.path) / METADATA
    listed = [Part(files=(str(metadata),))] if metadata.is_file() else []
    return grouped(files_of(source)) + listed


def read(source: SourceConfig, part: Part) -> Iterator[Record]:
    """A record an image, with its caption as a text to learn."""
    root = Path(source.path)
    captions = _captions(root)
    files = [Path(file) for file in part.files]
    if files == [root / METADATA]:
        real = os.path.realpath(root)
        listed = [root / os.path.relpath(file, real) for file in captions]
        files = [file for file in listed if not (file.is_file() and file.name.lower().endswith(ENDINGS["images"]))]
    for file in files:
        caption = captions.get(os.path.realpath(file))
        yield Record(name_in(source, file), file.parent, functools.partial(_fields, file, caption, source))


def _fields(file: Path, caption: dict | None, source: SourceConfig) -> dict:
    caption = caption or {source.text_field: read_file(file.with_suffix(".txt")).decode("utf-8-sig")}
    return caption | {source.image_field: read_file(file)}


def _captions(root: Path) -> dict[str, dict]:
    """Records of the folder's metadata.jsonl, by the real path of the file that their `file_name` names; none where it
    is missing."""
    if not (root / METADATA).is_file():
        return {}
    found = {}
    try:
        for line in read_file(root / METADATA).decode().splitlines():
            record = json.loads(line)
            found[os.path.realpath(inside(root, record["file_name"]))] = record
    except (ValueError, KeyError, TypeError):
        raise DataError("a line is no record with a `file_name`", root / METADATA, "correct it") from None
    return found
