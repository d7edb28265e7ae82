"""Saving while training goes on: a rank's share is copied at once, and written in the background."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from armillary.errors import CheckpointError
from armillary.model.coordinates import Block
from armillary.storage import Storage
from armillary.training.checkpoint.manifest import CHUNKS, Chunk, State, fragment_name, part_name
from armillary.training.checkpoint.snapshot import Snapshot, sealed
from armillary.training.health import heartbeat

WRITERS = 4  # files at once
LOOK_SECONDS = 0.2  # between looks for what the other ranks have written
SLOWEST = 3600.0  # seconds that the other ranks may take longer than the first


class Saver:
    """Saves one checkpoint at a time. `announce` is called on the first rank, from the background, when all ranks have
    written theirs: commit it."""

    def __init__(
        self, store: Storage, generation: int, rank: int, ranks: int, pinned: bool,
        announce: Callable[[str, State], None],
    ):  # fmt: skip
        self._store, self._generation, self._rank, self._ranks = store, generation, rank, ranks
        self._announce = announce
        self._snapshot = Snapshot(part_name(generation, rank), pinned)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._whole = False  # whether there is a plan for all tensors
        self._given_up, self._copied, self._written = threading.Event(), threading.Event(), threading.Event()

    def save(self, name: str, tensors: Iterable[tuple[str, Block]], live: bool, state: State) -> None:
        """Begin to save `tensors` (see Engine.state) and `state` into the folder `name`. Those that are `live` must not
        change until `wait_copied` has returned. Collective over data ranks."""
        assert not self.busy
        self._copied.clear()
        self._given_up.clear()
        self._written.clear()
        self._whole = False
        planned = threading.Event()  # a thread that starts takes its time before it lets the one go on that started it
        self._thread = threading.Thread(target=self._run, args=(name, state, planned), name=f"save {name}", daemon=True)
        self._thread.start()
        try:
            self._snapshot.plan(tensors, live)
            self._whole = True
        finally:
            planned.set()

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the last save failed, and nobody was told yet."""
        return self._error is not None

    @property
    def bytes(self) -> int:
        """What this rank writes of a checkpoint."""
        return self._snapshot.bytes

    def failure(self) -> Exception | None:
        """What made the last save fail, told once."""
        error, self._error = self._error, None
        return error

    def give_up(self) -> None:
        """Wait no longer for other ranks: one of them has failed."""
        self._given_up.set()

    def wait_copied(self) -> None:
        """Until live tensors may change."""
        if self._thread is not None:
            self._copied.wait()

    def wait_written(self) -> None:
        """Until this rank has written its own share, or failed to."""
        if self._thread is not None:
            self._written.wait()

    def wait(self) -> None:
        """Until no save is under way."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, name: str, state: State, planned: threading.Event) -> None:
        planned.wait()
        if not self._whole:  # whose failure `save` has raised
            return
        folder = self._store.folder(name)
        try:
            self._snapshot.copy()
            self._copied.set()
            with ThreadPoolExecutor(WRITERS) as pool:
                files = pool.map(lambda file: _write(folder, *file), self._snapshot.files())
                chunks = [chunk for file in files for chunk in file]
            folder.put(fragment_name(self._generation, self._rank), CHUNKS.dump_json(tuple(chunks)))
            self._written.set()
            if self._rank == 0:
                self._await_others(folder)
                self._announce(name, state)
        except Exception as error:  # raised where training hears of it, see failure()
            self._error = error
        finally:
            self._copied.set()
            self._written.set()

    def _await_others(self, folder: Storage) -> None:
        wanted = {fragment_name(self._generation, rank): rank for rank in range(self._ranks)}
        deadline = time.monotonic() + SLOWEST
        while missing := wanted.keys() - folder.sizes().keys():
            if self._given_up.wait(LOOK_SECONDS) or time.monotonic() > deadline:
                rank = wanted[min(missing)]
                raise CheckpointError(f"rank {rank} did not write its part", folder.at(min(missing)), "see its log")


def _write(folder: Storage, file: str, content: memoryview, chunks: list[dict]) -> list[Chunk]:
    folder.put(file, content)
    heartbeat.beat()
    return sealed(content, chunks)
