"""Writing files that a crash leaves whole: the old one, or the new one."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file beside `path`, sync it to disk, and put it in place by one rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def sync(path: Path) -> None:
    """Make a file's bytes, or a rename inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
