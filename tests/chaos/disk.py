"""A disk that fails: at any operation the process is dead, or the power is gone and with it what was not synced."""

import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BEFORE, HALF, AFTER, POWER = "before", "half", "after", "power"  # how the operation ends at which all ends
PATCHED = ("open", "close", "write", "fsync", "rename", "unlink", "mkdir", "rmdir")
MODES = (BEFORE, HALF, AFTER, POWER)


class Killed(BaseException):
    """What every operation of a dead process raises, so that it has no more effect."""


class Disk:
    """Counts the operations that change something below `root`, of all threads, and dies at the one of number `end`.

    Syncing takes no time here: what it is for is kept in mind. With POWER, writes to files that were not synced since
    are cut off, and of the renames, removals and new folders whose folder was not synced since, some (by `seed`) have
    not happened.
    """

    def __init__(self, root: Path, end: int = 0, mode: str = BEFORE, seed: int = 0):
        self.count, self.dead, self.died_at, self._lock = 0, False, "", threading.Lock()
        self._root, self._end, self._mode, self._random = str(root), end, mode, random.Random(seed)
        self._opened: dict[int, str] = {}  # names of descriptors
        self._unsynced: set[str] = set()  # files
        self._undo: list[tuple[str, str, str, str]] = []  # folder, what, path, other path
        self._kept = 0

    @contextmanager
    def patched(self) -> Iterator["Disk"]:
        """Within, `os` is this disk's."""
        self._real = {name: getattr(os, name) for name in PATCHED}
        patch = pytest.MonkeyPatch()
        for name in PATCHED:
            patch.setattr(os, name, getattr(self, f"_{name}"))
        try:
            yield self
        finally:
            patch.undo()
            if self.dead and self._mode == POWER:
                self._lose()

    def _operation(self, name: str, path: str, act, half=None):
        """One operation that changes something."""
        if not path.startswith(self._root):
            return act()
        with self._lock:
            if self.dead:
                raise Killed
            self.count += 1
            last = self.count == self._end
            if last:
                self.dead, self.died_at = True, f"{name} {path.removeprefix(self._root)}"
        if not last:
            return act()
        if self._mode == HALF and half is not None:
            half()
        if self._mode in (AFTER, POWER):
            act()
        raise Killed

    def _path(self, path) -> str:
        return os.fspath(path)

    def _rename(self, source, target):
        source, target = self._path(source), self._path(target)

        def rename() -> None:
            backup = self._keep(target) if os.path.exists(target) else ""
            self._real["rename"](source, target)
            self._undo.append((os.path.dirname(target), "rename", target, backup or source))
            if source in self._unsynced:
                self._unsynced.discard(source)
                self._unsynced.add(target)

        return self._operation("rename", target, rename)

    def _unlink(self, path, **options):
        path = self._path(path)

        def unlink() -> None:
            backup = self._keep(path)
            self._real["unlink"](path)
            self._undo.append((os.path.dirname(path), "unlink", path, backup))

        if not os.path.lexists(path) or not path.startswith(self._root):
            return self._real["unlink"](path, **options)
        return self._operation("unlink", path, unlink)

    def _mkdir(self, path, mode=0o777, **options):
        path = self._path(path)

        def mkdir() -> None:
            self._real["mkdir"](path, mode, **options)
            self._undo.append((os.path.dirname(path), "mkdir", path, ""))

        return self._operation("mkdir", path, mkdir)

    def _rmdir(self, path, **options):
        path = self._path(path)
        return self._operation("rmdir", path, lambda: self._real["rmdir"](path, **options))

    def _open(self, path, flags, mode=0o777, **options):
        name = self._path(path)

        def opened() -> int:
            descriptor = self._real["open"](path, flags, mode, **options)
            if name.startswith(self._root):
                self._opened[descriptor] = name
            return descriptor

        if flags & (os.O_CREAT | os.O_TRUNC):
            return self._operation("open", name, opened)
        return opened()

    def _close(self, descriptor):
        self._opened.pop(descriptor, None)
        return self._real["close"](descriptor)

    def _write(self, descriptor, content):
        name = self._opened.get(descriptor, "")

        def write(part) -> int:
            self._unsynced.add(name)
            return self._real["write"](descriptor, part)

        return self._operation(
            "write", name, lambda: write(content), lambda: write(memoryview(content)[: len(content) // 2])
        )

    def _fsync(self, descriptor):
        name = self._opened.get(descriptor, "")

        def sync() -> None:
            self._unsynced.discard(name)
            self._undo = [one for one in self._undo if one[0] != name]

        return self._operation("fsync", name, sync)

    def _keep(self, path: str) -> str:
        """A copy of what an operation destroys, beside the root."""
        self._kept += 1
        backup = f"{self._root}.kept-{self._kept}"
        shutil.copy2(path, backup)
        return backup

    def _lose(self) -> None:
        for folder, what, path, other in reversed(self._undo):
            if self._random.random() < 0.5 or not os.path.isdir(folder):
                continue
            if what == "mkdir":
                shutil.rmtree(path, ignore_errors=True)
            elif what == "rename" and not other.startswith(f"{self._root}.kept"):
                if os.path.exists(path):
                    os.rename(path, other)
            else:
                shutil.copy2(other, path)
        for path in self._unsynced:
            if os.path.exists(path):
                os.truncate(path, os.path.getsize(path) // 2)
