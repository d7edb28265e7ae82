"""What is in a checkpoint: the manifest, written last. Without it there is no checkpoint."""

import json
import math
import re
from pathlib import PurePosixPath

import xxhash
from pydantic import TypeAdapter, ValidationError

from armillary.data_pipeline.cursor import Cursor
from armillary.errors import CheckpointError
from armillary.storage import Storage
from armillary.table import Table

FORMAT = 4
MANIFEST = "manifest.json"
FOLDER = re.compile(r"step-\d{8,}")  # see folder_name
WRITTEN = re.compile(r"manifest\.json|g\d{3,}-r\d{5,}(-\d{3,}\.bin|\.json)|\..+\.tmp")  # the files that saves make
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, saved with every weight


class Chunk(Table):
    """A block of one global tensor: rows [start, start + shape) of it, as raw little-endian bytes in a file.

    `key` is "<part>/<global name>", part being weight, exp_avg or exp_avg_sq; `xxh3` is the bytes' checksum (hex).
    """

    key: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    bytes: int
    xxh3: str


CHUNKS = TypeAdapter(tuple[Chunk, ...])  # what a fragment holds, as JSON


class State(Table):
    """All of a run's state that is not a tensor. Random numbers are drawn from (seed, step) only, so
    the seed in `job` and the step are the whole random state, under every layout."""

    step: int
    cursor: Cursor
    data_order: int  # see data_pipeline.mixture.ORDER
    tokens: int
    loss: float | None  # of the last good step
    run: str
    job_hash: str
    job: dict
    saved_at: float
    skipped: int = 0  # of the steps, those whose update was left out
    recent: tuple[tuple[float, float], ...] = ()  # loss and gradient norm of the last good steps, to know a spike by


class Manifest(Table):
    """Chunks of dtype float32, which together tile every tensor, and the state."""

    format: int
    dtype: str
    state: State
    chunks: tuple[Chunk, ...]


OTHER = "take another one: `armillary checkpoint list RUN` shows those of a run"
SEAL = b',"xxh3":"'  # the last key of the text: the checksum of all before it


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def part_name(generation: int, rank: int) -> str:
    """How the files that a rank of a generation writes begin."""
    return f"g{generation:03d}-r{rank:05d}"


def fragment_name(generation: int, rank: int) -> str:
    """The file that lists a rank's chunks until the commit."""
    return f"{part_name(generation, rank)}.json"


def to_bytes(manifest: Manifest) -> bytes:
    """What is written: JSON, sealed by a checksum of its own bytes."""
    body = manifest.model_dump_json().encode()[:-1]
    return body + SEAL + _end(body)


def _end(body: bytes) -> bytes:
    return f'{xxhash.xxh3_64_hexdigest(body)}"}}'.encode()


def read_manifest(checkpoint: Storage) -> Manifest:
    """The manifest of a committed checkpoint; CheckpointError where there is none or a byte of it has changed."""
    where = checkpoint.at(MANIFEST)
    try:
        content = bytes(checkpoint.read(MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError("there is no complete checkpoint here", checkpoint.at(), OTHER) from None
    except OSError as error:
        raise CheckpointError(f"the manifest cannot be read: {error.strerror}", where, "check the storage") from None
    if (found := re.match(rb'\{"format":(\d+),', content)) and int(found[1]) != FORMAT:
        raise CheckpointError(
            f"the checkpoint is of format {int(found[1])}, this version reads {FORMAT}", where,
            "use the version that wrote it, or start a new run",
        )  # fmt: skip
    body, _, end = content.rpartition(SEAL)
    if end != _end(body):
        raise CheckpointError("the manifest is damaged: its checksum does not fit", where, OTHER)
    try:
        manifest = Manifest.model_validate(json.loads(body + b"}"))
    except (ValidationError, ValueError) as error:
        raise CheckpointError(f"the manifest cannot be read: {str(error).splitlines()[0]}", where, OTHER) from None
    for chunk in manifest.chunks:
        if chunk.bytes != 4 * math.prod(chunk.shape) or chunk.offset < 0:
            raise CheckpointError(f"the manifest contradicts itself: {chunk.key}", where, OTHER)
        if PurePosixPath(chunk.file).name != chunk.file:
            raise CheckpointError(f"the manifest names a file outside its folder: {chunk.file}", where, OTHER)
    return manifest
