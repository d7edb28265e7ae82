"""Files in a folder of this machine or behind a URL. Each is there whole, or not at all."""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import fsspec
import numpy as np
from pydantic import AfterValidator

from armillary.errors import ArmillaryError, CheckpointError
from armillary.files import put_whole, sync

TRIES = 5
FIRST_WAIT = 0.5  # seconds before the second try, twice as long before each further one
DEADLINE = 60  # seconds that an answer of S3 may take to come, and a part of it to follow
CREDENTIALS = "check the credentials, which come from the environment (AWS_PROFILE, for S3) on every machine"
Bytes = bytes | bytearray | memoryview
PROBE = ".writable"
Result = TypeVar("Result")


class Storage(Protocol):
    """A folder's files, by names relative to it ("step-00000010/manifest.json")."""

    def at(self, name: str = "") -> str:
        """Where a file is, for messages; the folder itself without a name."""

    def put(self, name: str, content: Bytes) -> None:
        """Write a file, durably. What was there stays until the new one is whole."""

    def read(self, name: str, offset: int = 0, size: int | None = None) -> Bytes:
        """`size` bytes from `offset` on, fewer where the file ends; to its end without `size`. FileNotFoundError."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every file in the folder, and in folders of it, by name; empty where it is not there."""

    def remove(self, name: str) -> None:
        """Remove a file that may not be there, and a folder that it leaves empty."""

    def free(self) -> int | None:
        """Bytes that can be written; None where nobody can tell."""

    def folder(self, name: str) -> "Storage":
        """A folder in this one."""


SECRET = re.compile(r"[?&][^=&]*(secret|password|token|key)[^=&]*=", re.IGNORECASE)


def is_url(path: str) -> bool:
    """Whether a path is on another machine."""
    return "://" in path


def has_secret(url: str) -> bool:
    """Whether there is a password or another secret in a URL, which everybody sees who sees the URL."""
    return re.search(r"://[^/]*:[^/]*@", url) is not None or SECRET.search(url) is not None


def checked(path: str) -> str:
    """The path or URL; ValueError where it is meant for a URL and is none, or shows a secret."""
    if re.match(r"[\w+.-]*:/", path) and not re.match(r"([\w+.-]+://[^/\s?#][^\s]*|file:///.*)$", path):
        raise ValueError("it is no URL: SCHEME://BUCKET/FOLDER, as s3://bucket/folder")
    if has_secret(path):
        raise ValueError("there is a secret in it, which all would see who see the job: give it by the environment")
    return path


Location = Annotated[str, AfterValidator(checked)]


def open_storage(location: str | Path, error: type[ArmillaryError]) -> Storage:
    """The folder at a path, or at a URL that fsspec reads and writes (s3://bucket/folder). `error` is raised where the
    URL cannot be used, and where its storage does not do what it is asked to in TRIES tries."""
    if is_url(str(location)):
        return RemoteStorage(str(location), error)
    return LocalStorage(Path(location))


def check_writable(storage: Storage) -> None:
    """CheckpointError where nothing can be written into a folder, before it matters."""
    try:
        storage.put(PROBE, b"")
        storage.remove(PROBE)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints' folder cannot be written: {error.strerror}", error.filename or storage.at(),
            "free some space, see to its permissions, or set checkpoint.path to another",
        ) from None  # fmt: skip


class LocalStorage:
    """A folder of this machine. Failures are OSErrors, as the system raises them."""

    def __init__(self, path: Path):
        self._path = path

    def at(self, name: str = "") -> str:
        return str(self._path / name)

    def put(self, name: str, content: Bytes) -> None:
        path = self._path / name
        for folder in (self._path, path.parent):
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                sync(folder.parent)
        put_whole(path, content)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> Bytes:
        with open(self._path / name, "rb", buffering=0) as file:
            left = max(0, os.fstat(file.fileno()).st_size - offset)
            out = np.empty(left if size is None else min(size, left), np.uint8).data
            file.seek(offset)
            done = 0
            while done < len(out) and (count := file.readinto(out[done:])):
                done += count
            return out[:done]

    def sizes(self) -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(self._path):
            for name in names:
                path = Path(folder) / name
                with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
                    found[path.relative_to(self._path).as_posix()] = path.lstat().st_size
        return found

    def remove(self, name: str) -> None:
        path = self._path / name
        path.unlink(missing_ok=True)
        if path.parent.exists():
            sync(path.parent)  # or it could come back after what is removed next
            with contextlib.suppress(OSError):  # there are other files in it
                path.parent.rmdir()

    def free(self) -> int | None:
        there = next(path for path in (self._path, *self._path.parents) if path.exists())
        return shutil.disk_usage(there).free

    def folder(self, name: str) -> Storage:
        return LocalStorage(self._path / name)


class RemoteStorage:
    """A folder behind a URL. What fails is tried again, later and later.

    Credentials, endpoints and the like are those that the protocol's own variables and files give (AWS_PROFILE,
    AWS_ENDPOINT_URL, ...).
    """

    def __init__(self, url: str, error: type[ArmillaryError]):
        self._url, self._error = url.rstrip("/"), error
        self._files, self._root = connect(self._url, error)

    def at(self, name: str = "") -> str:
        return f"{self._url}/{name}" if name else self._url

    def put(self, name: str, content: Bytes) -> None:
        try:
            self._do(name, "written", lambda path: self._files.pipe_file(path, bytes(content)))
        except FileNotFoundError:
            raise self._error("there is no such bucket", self._url, "create it, or name another") from None

    def read(self, name: str, offset: int = 0, size: int | None = None) -> Bytes:
        part = {} if size is None and not offset else {"start": offset, "end": None if size is None else offset + size}
        return self._do(name, "fetched", lambda path: self._files.cat_file(path, **part))

    def sizes(self) -> dict[str, int]:
        found = self._do("", "listed", lambda _: self._files.find(self._root, detail=True))
        return {name.removeprefix(f"{self._root}/"): entry["size"] for name, entry in found.items()}

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._do(name, "removed", self._files.rm_file)

    def free(self) -> int | None:
        return None

    def folder(self, name: str) -> Storage:
        return RemoteStorage(self.at(name), self._error)

    def _do(self, name: str, done: str, action: Callable[[str], Result]) -> Result:
        return tried(lambda: action(f"{self._root}/{name}"), f"it could not be {done}", self.at(name), self._error)


def connect(url: str, error: type[ArmillaryError]) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a URL and the path in it; `error` where it cannot be used."""
    if has_secret(url):
        raise error("the URL has a password in it", "", "give credentials through the environment")
    options = {"use_listings_cache": False}
    if url.startswith("s3://"):
        options["config_kwargs"] = {"connect_timeout": DEADLINE, "read_timeout": DEADLINE}
    try:
        return fsspec.url_to_fs(url, **options)
    except Exception as problem:  # each protocol has its own kinds
        raise error(
            f"no such storage can be read or written: {problem}", url, "check the URL, and the package for it"
        ) from None


def tried(action: Callable[[], Result], said: str, where: str, error: type[ArmillaryError]) -> Result:
    """Do it, and again after a while where it fails, TRIES times; then `error`, which begins with `said`.

    A file that is not there, or not ours, and a full disk are no failures that pass.
    """
    for number in range(TRIES):
        try:
            return action()
        except (FileNotFoundError, ArmillaryError):
            raise
        except PermissionError as problem:
            raise error(f"the storage refuses it: {problem}", where, CREDENTIALS) from None
        except Exception as problem:  # each protocol has its own kinds
            if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = str(problem).strip() or type(problem).__name__
            if type(problem).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise error(f"the storage has no credentials: {reason}", where, CREDENTIALS) from None
        if number < TRIES - 1:
            time.sleep(FIRST_WAIT * 2**number)
    raise error(f"{said}, in {TRIES} tries: {reason}", where, "check the storage and the network")
