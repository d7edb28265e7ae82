"""Where shards are: a folder of this machine, or a URL with a bounded cache on this machine before it."""

import contextlib
import fcntl
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import fsspec
import xxhash

from armillary.errors import DataError

CACHE_BYTES = 100 << 30
TRIES = 5
FIRST_WAIT = 0.5  # seconds before the second try, twice as long before each further one
CACHED = re.compile(r"[0-9a-f]{16}-[^/]+")  # a file of the cache: its checksum and its name
Result = TypeVar("Result")


class Folder(Protocol):
    """The files of a data set, by name."""

    remedy: str  # what to do about a file that is damaged

    def at(self, name: str) -> str:
        """Where a file is, for messages."""

    def read_text(self, name: str) -> str:
        """A small file's text; FileNotFoundError where it is not there."""

    def check_size(self, name: str, size: int) -> None:
        """DataError unless the file is there with so many bytes."""

    def fetch(self, name: str, size: int, xxh3: str) -> Path:
        """A file of this machine with its content, of so many bytes. DataError where there is none."""


def open_folder(path: str | Path, cache: str = "", cache_bytes: int = CACHE_BYTES) -> Folder:
    """The folder at a path, or at a URL that fsspec reads (s3://bucket/folder), see RemoteFolder."""
    if is_url(str(path)):
        return RemoteFolder(str(path), Path(cache or "~/.cache/armillary/shards").expanduser(), cache_bytes)
    return LocalFolder(Path(path))


def is_url(path: str) -> bool:
    """Whether a path is on another machine."""
    return "://" in path


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


class RemoteFolder:
    """A folder behind a URL. Files are fetched whole, with a checksum, into `cache`, a folder that all processes of
    this machine share; the ones that were not used for longest make room when it holds more than `limit` bytes.

    Credentials, endpoints and the like are those that the protocol's own variables and files give (AWS_PROFILE,
    AWS_ENDPOINT_URL, ...). DataError where a package for the protocol is missing, or the storage cannot be reached.
    """

    def __init__(self, url: str, cache: Path, limit: int):
        self.remedy = f"remove its copy in {cache}; if it comes back, copy the data set to that place again"
        self._url, self._cache, self._limit = url.rstrip("/"), cache, limit
        try:
            self._storage, self._root = fsspec.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise DataError(f"no such storage can be read: {error}", url, "install the package that it names") from None
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the cache cannot be made: {error.strerror}", cache, "choose another data.cache") from None

    def at(self, name: str) -> str:
        return f"{self._url}/{name}"

    def read_text(self, name: str) -> str:
        return self._tried(name, lambda: self._storage.cat_file(f"{self._root}/{name}").decode())

    def check_size(self, name: str, size: int) -> None:
        _check_size(self._sizes.get(name), size, self.at(name), self.remedy)

    def fetch(self, name: str, size: int, xxh3: str) -> Path:
        path = self._cache / f"{xxh3}-{name}"
        if not self._used(path):
            if size > self._limit:
                raise DataError(
                    f"a file of {size:,} bytes does not fit into a cache of {self._limit:,}", self.at(name),
                    "raise data.cache_bytes",
                )  # fmt: skip
            with _held(path.with_name(f".{path.name}.lock")):
                if not self._used(path):  # nor has another process fetched it meanwhile
                    self._fetch(path, name, size, xxh3)
        return path

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """The size of every file."""
        listed = self._tried("", lambda: self._storage.ls(self._root, detail=True))
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed}

    def _used(self, path: Path) -> bool:
        """Mark a file of the cache as used now; False where it is not there."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, path: Path, name: str, size: int, xxh3: str) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

        def get() -> None:
            self._storage.get_file(f"{self._root}/{name}", str(temporary))
            if (found := temporary.stat().st_size) != size:
                raise OSError(f"it came with {found} bytes where the manifest says {size}")
            if (digest := checksum(temporary)) != xxh3:
                raise OSError(f"it came with checksum {digest}, manifest {xxh3}")

        try:
            self._make_room(size)
            self._tried(name, get)
            temporary.rename(path)
        except FileNotFoundError:
            raise DataError("a shard's file is missing", self.at(name), self.remedy) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove files until `size` bytes fit. A process that has one of them open keeps it until it is done."""
        held = []
        for path in self._cache.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if CACHED.fullmatch(path.name):
                    held.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = size + sum(bytes_ for _, bytes_, _ in held)
        for _, bytes_, path in sorted(held):
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= bytes_

    def _tried(self, name: str, action: Callable[[], Result]) -> Result:
        """Do it, and again after a while where it fails; a file that is not there, or not ours to read, is no failure
        that passes."""
        for number in range(TRIES):
            try:
                return action()
            except FileNotFoundError:
                raise
            except PermissionError as error:
                raise DataError(
                    f"the storage refuses to give it: {error}", self.at(name), "check the credentials"
                ) from None
            except Exception as error:  # each protocol has its own kinds
                reason = str(error).strip() or type(error).__name__
            if number < TRIES - 1:
                time.sleep(FIRST_WAIT * 2**number)
        raise DataError(
            f"it could not be fetched, in {TRIES} tries: {reason}", self.at(name), "check the storage and the network"
        )


def _check_size(found: int | None, size: int, where: str, remedy: str) -> None:
    if found is None:
        raise DataError("a shard's file is missing", where, remedy)
    if found != size:
        raise DataError(f"a shard's file has {found} bytes where the manifest says {size}", where, remedy)


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Keep other processes of this machine out. The lock's file goes with its holder."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
