"""Text files: each is one document."""

import functools
from collections.abc import Iterator
from pathlib import Path

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.sources.part import Part, files_of, grouped, name_in, read_file
from armillary.data_pipeline.sources.record import Record


def parts(source: SourceConfig) -> list[Part]:
    """Whole files, in groups of about 64 MiB."""
    return grouped(files_of(source))


def read(source: SourceConfig, part: Part) -> Iterator[Record]:
    """A record a file."""
    for file in map(Path, part.files):
        yield Record(name_in(source, file), file.parent, functools.partial(_fields, file, source))


def _fields(file: Path, source: SourceConfig) -> dict:
    return {source.text_field: read_file(file).decode("utf-8-sig")}
