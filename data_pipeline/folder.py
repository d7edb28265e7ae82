"""Where shards are: a folder of this machine, or a URL with a bounded cache on this machine before it."""

import contextlib
import fcntl
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol, TypeVar

import pyarrow as pa
import xxhash

from armillary.errors import DataError
from armillary.files import sync
from armillary.storage import connect, is_url, tried

CACHE_BYTES = 100 << 30
KEPT = re.compile(r"[0-9a-f]{16}-.+")  # a file of the cache: its checksum and its name
PART = re.compile(r"\..+\.(\d+)\.part")  # one that is being fetched, with its size
Result = TypeVar("Result")


class Folder(Protocol):
    """The files of a data set, by name."""

    remedy: str  # what to do about a file that is damaged
    build: str  # how shards come to be there

    def at(self, name: str) -> str:
        """Where a file is, for messages."""

    def read_text(self, name: str) -> str:
        """A small file's text; FileNotFoundError where it is not there."""

    def check_size(self, name: str, size: int) -> None:
        """DataError unless the file is there with so many bytes."""

    def fetch(self, name: str, size: int, xxh3: str) -> Path:
        """A file of this machine with its content, of so many bytes. DataError where there is none."""

    def open(self, name: str, size: int, xxh3: str) -> pa.Buffer:
        """The same, mapped into memory."""


def open_folder(path: str | Path, cache: str = "", cache_bytes: int = CACHE_BYTES) -> Folder:
    """The folder at a path, or at a URL that fsspec reads (s3://bucket/folder), see RemoteFolder."""
    if is_url(str(path)):
        return RemoteFolder(str(path), Path(cache or "~/.cache/armillary/shards").expanduser(), cache_bytes)
    return LocalFolder(Path(path))


def open_checked(folder: Folder, name: str, size: int, xxh3: str, what: str) -> pa.Buffer:
    """A file mapped into memory; DataError, which says `what` it is, unless it has the checksum `xxh3`."""
    content = folder.open(name, size, xxh3)
    if (found := xxhash.xxh3_64_hexdigest(content)) != xxh3:
        raise DataError(f"{what} is corrupted: checksum {found}, manifest {xxh3}", folder.at(name), folder.remedy)
    return content


def checksum(path: Path) -> str:
    """xxh3-64 of a file, as 16 hex digits."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class LocalFolder:
    """A folder of this machine. What is in a file is checked by who reads it."""

    remedy = "restore the file, or run `armillary data build JOB.toml --force`"
    build = "run `armillary data build JOB.toml`"

    def __init__(self, path: Path):
        self._path = path

    def at(self, name: str) -> str:
        return str(self._path / name)

    def read_text(self, name: str) -> str:
        try:
            return (self._path / name).read_text()
        except NotADirectoryError:
            raise FileNotFoundError(name) from None

    def check_size(self, name: str, size: int) -> None:
        path = self._path / name
        _check_size(path.stat().st_size if path.exists() else None, size, str(path), self.remedy)

    def fetch(self, name: str, size: int, xxh3: str) -> Path:
        self.check_size(name, size)
        return self._path / name

    def open(self, name: str, size: int, xxh3: str) -> pa.Buffer:
        return pa.memory_map(str(self.fetch(name, size, xxh3))).read_buffer()


class RemoteFolder:
    """A folder behind a URL. Files are fetched whole, with a checksum, into `cache`, a folder that all processes of
    this machine share; the ones that were not used for longest make room when it would hold more than `limit` bytes.
    On top come, for as long as they are, files that are being fetched, and those that were removed while a process had
    them open.

    Credentials, endpoints and the like are those that the protocol's own variables and files give (AWS_PROFILE,
    AWS_ENDPOINT_URL, ...). DataError where a package for the protocol is missing, the storage cannot be reached, or
    the cache cannot be written.
    """

    build = "build shards into a folder of this machine, then copy that folder there"

    def __init__(self, url: str, cache: Path, limit: int):
        self.remedy = f"remove its copy in {cache}; if it comes back, copy the data set to that place again"
        self._url, self._cache, self._limit = url.rstrip("/"), cache, limit
        self._storage, self._root = connect(self._url, DataError)
        with self._writing():
            cache.mkdir(parents=True, exist_ok=True)

    def at(self, name: str) -> str:
        return f"{self._url}/{name}"

    def read_text(self, name: str) -> str:
        return self._tried(name, lambda: self._storage.cat_file(f"{self._root}/{name}").decode())

    def check_size(self, name: str, size: int) -> None:
        _check_size(self._sizes.get(name), size, self.at(name), self.remedy)

    def fetch(self, name: str, size: int, xxh3: str) -> Path:
        path = self._cache / f"{xxh3}-{name}"
        with self._writing():
            if not _used(path, size):
                if size > self._limit:
                    raise DataError(
                        f"a file of {size:,} bytes does not fit into a cache of {self._limit:,}",
                        self.at(name),
                        "raise data.cache_bytes",
                    )
                with _held(path.with_name(f".{path.name}.{size}.part")) as part:
                    if not _used(path, size):  # nor has another process fetched it meanwhile
                        self._make_room()
                        self._tried(name, lambda: self._get(part, name, size, xxh3))
                        sync(part)
                        part.rename(path)
                        self._make_room()
        return path

    def open(self, name: str, size: int, xxh3: str) -> pa.Buffer:
        while True:
            path = self.fetch(name, size, xxh3)
            with contextlib.suppress(FileNotFoundError):  # another process made room just then
                return pa.memory_map(str(path)).read_buffer()

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """The size of every file."""
        listed = self._tried("", lambda: self._storage.ls(self._root, detail=True))
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed}

    def _get(self, part: Path, name: str, size: int, xxh3: str) -> None:
        try:
            self._storage.get_file(f"{self._root}/{name}", str(part))
        except FileNotFoundError:
            raise DataError("a shard's file is missing", self.at(name), self.remedy) from None
        if (found := part.stat().st_size) != size:
            raise _Failed(f"it came with {found} bytes where the manifest says {size}")
        if (digest := checksum(part)) != xxh3:
            raise _Failed(f"it came with checksum {digest}, manifest {xxh3}")

    def _make_room(self) -> None:
        """Remove files until all fit. Those that are being fetched count with the size they will have; what a dead
        process left of them is removed."""
        with open(self._cache / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            total, held = 0, []
            for path in self._cache.iterdir():
                if part := PART.fullmatch(path.name):
                    total += 0 if _removed_if_dead(path) else int(part[1])
                elif KEPT.fullmatch(path.name):
                    stat = path.stat()
                    held.append((stat.st_mtime_ns, stat.st_size, path))
                    total += stat.st_size
            for _, freed, path in sorted(held):
                if total <= self._limit:
                    return
                path.unlink()
                total -= freed

    def _tried(self, name: str, action: Callable[[], Result]) -> Result:
        return tried(action, "it could not be fetched", self.at(name), DataError)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """DataError where the cache cannot be written."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the cache cannot be written: {error.strerror or error}",
                self._cache,
                "free some space, or choose another data.cache",
            ) from None


class _Failed(Exception):
    """What came is not what the manifest says."""


def _used(path: Path, size: int) -> bool:
    """Mark a file of the cache as used now; False where it is not there, or not whole."""
    try:
        os.utime(path)
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _held(part: Path) -> Iterator[Path]:
    """Be the only one, of all processes and threads, that writes a file: its lock is a lock on itself. It is removed at
    the end, unless it was renamed."""
    while True:
        with open(part, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _same(file, part):  # its last holder removed or renamed it
                continue
            try:
                yield part
            finally:
                if _same(file, part):
                    part.unlink()
            return


def _removed_if_dead(part: Path) -> bool:
    """Remove a file in the making that no process is making."""
    try:
        with open(part, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


def _same(file: IO, path: Path) -> bool:
    """Whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _check_size(found: int | None, size: int, where: str, remedy: str) -> None:
    if found is None:
        raise DataError("a shard's file is missing", where, remedy)
    if found != size:
        raise DataError(f"a shard's file has {found} bytes where the manifest says {size}", where, remedy)
