"""Parts: what one worker reads at a time."""

import os
from pathlib import Path

from armillary.data_pipeline.config import SourceConfig
from armillary.errors import DataError
from armillary.table import Table

PART_BYTES = 64 << 20
ENDINGS = {  # of the files that a kind reads, by kind
    "text": (".txt", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz"),
    "parquet": (".parquet",),
    "huggingface": (".arrow",),
    "webdataset": (".tar",),
    "images": (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
}


class Part(Table):
    """Some files of a source, or a stretch of one file: [start, stop) of its bytes, rows or items; stop 0: all."""

    files: tuple[str, ...]
    start: int = 0
    stop: int = 0


def files_of(source: SourceConfig) -> list[Path]:
    """The source's file, or all files under its folder with an ending of its kind, by name; DataError where there is no
    such path, or the file is one of another kind."""
    root, endings = Path(source.path), ENDINGS[source.kind]
    if root.is_file():
        others = [kind for kind, its in ENDINGS.items() if root.name.lower().endswith(its)]
        if others and source.kind not in others:
            raise DataError(
                f"the source is of kind {source.kind}, its file of kind {others[0]}",
                root,
                "correct its `kind` or `path`",
            )
        return [root]
    if not root.is_dir():
        raise DataError("the source's path is neither a file nor a folder", root, "correct its `path`")
    return sorted(f for f in root.rglob("*") if f.name.lower().endswith(endings) and f.is_file())


def name_in(source: SourceConfig, file: Path) -> str:
    """What a file of a source is called in messages and shards: its path from the source's own on."""
    root = Path(source.path)
    return file.relative_to(root).as_posix() if root.is_dir() else file.name


def grouped(files: list[Path], size: int = PART_BYTES) -> list[Part]:
    """Whole files in parts of about `size` bytes."""
    parts, group, held = [], [], 0
    for file in files:
        group.append(str(file))
        held += file.stat().st_size
        if held >= size:
            parts.append(Part(files=tuple(group)))
            group, held = [], 0
    return [*parts, Part(files=tuple(group))] if group else parts


def inside(root: Path, name: str) -> Path:
    """The path of a file that another file names; DataError where it leads out of `root`."""
    path = root / name
    if not os.path.realpath(path).startswith(os.path.realpath(root) + os.sep):
        raise DataError("a file is named that lies outside the source's folder", name, "name files inside it only")
    return path


def read_file(path: Path) -> bytes:
    """A file's bytes; DataError where they cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"a file cannot be read: {error.strerror}", path, "check the path and its permissions"
        ) from None
