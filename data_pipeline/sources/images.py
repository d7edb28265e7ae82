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
    captions, bad = _captions(root)
    files = [Path(file) for file in part.files]
    if files != [root / METADATA]:
        for file in files:
            caption = captions.get(os.path.realpath(file))
            yield Record(name_in(source, file), file.parent, functools.partial(_fields, file, caption, source))
        return
    real = os.path.realpath(root)
    for path, caption in captions.items():
        file = root / os.path.relpath(path, real)
        if not (file.is_file() and file.name.lower().endswith(ENDINGS["images"])):
            name = f"{METADATA}, {name_in(source, file)}"
            yield Record(name, file.parent, functools.partial(_fields, file, caption, source))
    for line, reason in bad:
        yield Record(f"{METADATA}, line {line}", root, functools.partial(_refuse, reason))


def _fields(file: Path, caption: dict | None, source: SourceConfig) -> dict:
    if caption is None:
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            raise ValueError(f"it has no caption, neither {beside.name} nor a line in {METADATA}")
        caption = {source.text_field: read_file(beside).decode("utf-8-sig")}
    return caption | {source.image_field: read_file(file)}


def _refuse(reason: str) -> None:
    raise ValueError(reason)


def _captions(root: Path) -> tuple[dict[str, dict], list[tuple[int, str]]]:
    """Records of the folder's metadata.jsonl by the real path of the file that their `file_name` names, and (line, why)
    of those that cannot be used."""
    found: dict[str, dict] = {}
    bad = []
    lines = read_file(root / METADATA).splitlines() if (root / METADATA).is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8-sig"))
            path = os.path.realpath(inside(root, record["file_name"]))
        except DataError as error:
            bad.append((number, error.what))
        except (ValueError, KeyError, TypeError, RecursionError):
            bad.append((number, "it is no record with a `file_name`"))
        else:
            if path in found:
                bad.append((number, "its file has a caption already"))
            found.setdefault(path, record)
    return found, bad
