"""What is in a checkpoint: the manifest, written last. Without it there is no checkpoint."""

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from armillary.data_pipeline.cursor import Cursor
from armillary.errors import CheckpointError
from armillary.table import SealedTable, Table

FORMAT = 3
MANIFEST = "manifest.json"
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
    loss: float
    run: str
    job_hash: str
    job: dict
    saved_at: float


class Manifest(SealedTable):
    """Chunks of dtype float32, which together tile every tensor, and the state."""

    format: int
    dtype: str
    state: State
    chunks: tuple[Chunk, ...]


def fragment_name(rank: int) -> str:
    """The file that lists rank `rank`'s chunks until the commit."""
    return f"rank-{rank:05d}.json"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed checkpoint; CheckpointError where there is none or it is damaged."""
    path, other = folder / MANIFEST, "resume from another checkpoint of the run"
    try:
        tables = json.loads(path.read_text())
        if isinstance(tables, dict) and tables.get("format", FORMAT) != FORMAT:
            raise CheckpointError(
                f"the checkpoint is of format {tables['format']}, this version reads {FORMAT}", path,
                "use the version that wrote it, or start a new run",
            )  # fmt: skip
        manifest = Manifest.model_validate(tables)
    except FileNotFoundError:
        raise CheckpointError("there is no complete checkpoint here", folder, other) from None
    except (ValidationError, ValueError) as error:
        raise CheckpointError(f"the manifest cannot be read: {str(error).splitlines()[0]}", path, other) from None
    if not manifest.intact:
        raise CheckpointError("the manifest is damaged: its checksum does not fit", path, other)
    for chunk in manifest.chunks:
        if Path(chunk.file).name != chunk.file:
            raise CheckpointError(f"the manifest names a file outside its folder: {chunk.file}", path, other)
    return manifest
