"""Reading a run's events while its driver appends to them."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

LOOK_SECONDS = 0.5


class Reader:
    """Remembers how far it has read."""

    def __init__(self, path: Path):
        self._path, self._position, self._rest = path, 0, b""

    def events(self) -> Iterator[dict]:
        """Those that came since the last call; the file may come later. A line that a crash cut off is passed over."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._position)
                found = file.read()
        except FileNotFoundError:
            return
        self._position += len(found)
        *lines, self._rest = (self._rest + found).split(b"\n")
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def follow(path: Path, ended: threading.Event) -> Iterator[dict | None]:
    """The events from the first one on, as they come, and None at each look that brought none; what is there when
    `ended` is set is the last."""
    reader = Reader(path)
    while True:
        last, quiet = ended.is_set(), True  # before the look: what was written before it was set is read
        for event in reader.events():
            quiet = False
            yield event
        if last:
            return
        if quiet:
            yield None
            ended.wait(LOOK_SECONDS)
