"""WebDataset tars: files of one name with different endings are one sample, an image with a caption or a record."""

import functools
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.sources.part import ENDINGS, Part, files_of, name_in
from armillary.data_pipeline.sources.record import Record
from armillary.errors import DataError


def parts(source: SourceConfig) -> list[Part]:
    """A tar each."""
    return [Part(files=(str(file),)) for file in files_of(source)]


def read(source: SourceConfig, part: Part) -> Iterator[Record]:
    """A record a sample: its `.json`, or its `.txt` caption, with its image."""
    path, seen = Path(part.files[0]), set()
    for key, members in itertools.groupby(_members(path), key=lambda member: member[0]):
        if key in seen:
            raise DataError(
                f"the files of {key} are not next to each other", path, "write the tar anew: tar --sort=name ..."
            )
        seen.add(key)
        files = {ending: data for _, ending, data in members}
        yield Record(f"{name_in(source, path)}, {key}", path.parent, functools.partial(_record, files, source))


def _record(files: dict[str, bytes], source: SourceConfig) -> dict:
    record = json.loads(files["json"]) if "json" in files else {}
    if isinstance(record, dict):
        if "txt" in files:
            record[source.text_field] = files["txt"].decode()
        if pictures := [data for ending, data in files.items() if f".{ending}" in ENDINGS["images"]]:
            record[source.image_field] = pictures[0]
    return record


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(key, ending, bytes) of each file in the tar, in its order; nothing is unpacked to disk."""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                key, _, ending = name.name.partition(".")
                if member.isfile() and ending:
                    yield str(name.parent / key), ending.lower(), tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"a tar cannot be read: {str(error).splitlines()[0]}", path, "restore or remove the file"
        ) from None
