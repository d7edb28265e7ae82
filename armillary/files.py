"""Writing files that a crash leaves whole: the old one, or the new one."""

import os
from pathlib import Path

PIECE = 8 << 20  # bytes of one write


def put_whole(path: Path, content: bytes | bytearray | memoryview) -> None:
    """Write a file beside `path`, sync it to disk, and put it in place by one rename, which is synced too."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left[:PIECE]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(temporary, path)
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """`put_whole` of a text."""
    put_whole(path, text.encode())


def sync(path: Path) -> None:
    """Make a file's bytes, or a rename inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
