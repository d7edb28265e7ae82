"""JSON lines: a record a line; plain or gzip."""

import functools
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.sources.part import PART_BYTES, Part, files_of, name_in
from armillary.data_pipeline.sources.record import Record
from armillary.errors import DataError


def parts(source: SourceConfig) -> list[Part]:
    """Stretches of about 64 MiB; a gzip file is one part, for it can be read from its beginning only."""
    found = []
    for file in files_of(source):
        size = file.stat().st_size
        if file.suffix == ".gz":
            found.append(Part(files=(str(file),)))
        else:
            starts = range(0, max(size, 1), PART_BYTES)
            found += [Part(files=(str(file),), start=s, stop=min(s + PART_BYTES, size)) for s in starts]
    return found


def read(source: SourceConfig, part: Part) -> Iterator[Record]:
    """The lines that begin in the part's stretch of bytes."""
    path = Path(part.files[0])
    name = name_in(source, path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if part.start:
                file.seek(part.start - 1)
                file.readline()  # the line that began before, or the end of one that ends just there
            at = file.tell()
            while (not part.stop or at < part.stop) and (line := file.readline()):
                if line.strip():
                    yield Record(f"{name}, byte {at}", path.parent, functools.partial(json.loads, line))
                at = file.tell()
    except (OSError, EOFError) as error:
        raise DataError(f"a file cannot be read: {error}", path, "restore or remove the file") from None
