"""The run directory: one run's job, events, logs and checkpoints. Only the driver writes here.

job.toml             the resolved job          job.hash   its hash
events.jsonl         what happened, one JSON object a line, appended
ray.log              what Ray has to say of its processes
lock                 held by the driver at work, with its process's number
generations/000/     one launch of the ranks: their logs
checkpoints/         a folder for each, and `latest`, which names the one to go on from; elsewhere by checkpoint.path
data_manifest.json   the manifest of the shards that the run trains on, their tokenizer in it
metrics_targets.json where the ranks' metrics are, for Prometheus' file_sd
"""

import collections
import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import xxhash
from pydantic import ValidationError

from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.shards import Manifest
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.errors import ArmillaryError, CheckpointError, JobError
from armillary.files import put_whole, write_whole
from armillary.launcher.job import Job, apply_overrides, read_toml, resolve
from armillary.storage import Storage, check_writable, open_storage
from armillary.training.checkpoint.catalog import kept, listed
from armillary.training.checkpoint.commit import commit, remove, sweep
from armillary.training.checkpoint.manifest import MANIFEST, State, folder_name, read_manifest
from armillary.training.config import CheckpointConfig
from armillary.training.health import Verdict

DATA_MANIFEST = "data_manifest.json"
LATEST = "latest"
LOCK_SECONDS = 1.0
KEPT = ("job.toml", "job.hash", DATA_MANIFEST, "events.jsonl")  # beside checkpoints elsewhere, to restore the run from


@dataclass(frozen=True)
class Run:
    """A run by its directory."""

    path: Path

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """JobError where a run directory cannot be made because something is there."""
        if path.exists():
            raise JobError(
                "the run directory exists already", path, "resume it with `armillary resume`, or name another --run-dir"
            )

    @classmethod
    def create(cls, path: Path, job: Job, data: Manifest) -> "Run":
        """Make the directory of a new run. JobError where it exists already, or another run's checkpoints lie where its
        own would; CheckpointError where nothing could be saved; then there is no directory."""
        cls.refuse_existing(path)
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise JobError(
                f"the run directory cannot be made: {error.strerror}", path, "name another --run-dir"
            ) from None
        run = cls(path.resolve())
        write_whole(run.path / DATA_MANIFEST, data.model_dump_json(indent=1))
        run.write_job(job)
        try:
            store = run.store()
            check_writable(store)
            if LATEST in store.sizes():
                raise JobError(
                    "another run has its checkpoints there", store.at(), "name another --run-dir or checkpoint.path"
                )
        except ArmillaryError:
            run.remove()
            raise
        return run

    @classmethod
    def restored(cls, path: Path, job: Job) -> "Run | None":
        """A run whose directory is gone, from what lies beside its checkpoints elsewhere; None where nothing does."""
        run = cls(path.resolve())
        if not job.checkpoint.path:
            return None
        store = open_storage(run.store_location(job.checkpoint), CheckpointError)
        if LATEST not in store.sizes():
            return None
        run.path.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            put_whole(run.path / name, store.read(name))
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """An existing run; CheckpointError where there is none."""
        if not (path / "job.toml").exists():
            raise CheckpointError("there is no run here", path, "start one with `armillary train JOB.toml`")
        return cls(path.resolve())

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def targets_file(self) -> Path:
        return self.path / "metrics_targets.json"

    def data(self) -> Manifest:
        """The manifest of the run's shards; CheckpointError where it is missing or damaged."""
        file = self.path / DATA_MANIFEST
        try:
            manifest = Manifest.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            manifest = None
        if manifest is None or not manifest.intact:
            raise CheckpointError(
                "the manifest of the run's data cannot be read", file, "copy it from the shards' folder"
            )
        return manifest

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run's tokens are of."""
        return Tokenizer.from_json(self.data().tokenizer)

    def write_job(self, job: Job) -> None:
        write_whole(self.path / "job.toml", job.to_toml())
        write_whole(self.path / "job.hash", job.hash() + "\n")

    def written_hash(self) -> str:
        """The hash of the job as it was written."""
        return (self.path / "job.hash").read_text().strip()

    def job(self, overrides: list[str] = ()) -> Job:
        """The run's job, with overrides. A new layout's world size and engine follow from it unless
        they are given."""
        tables = read_toml(self.path / "job.toml")
        keys = {override.partition("=")[0].strip() for override in overrides}
        if any(key.startswith("parallel.") for key in keys):
            tables["parallel"].pop("world_size", None)
        if keys & {"parallel.zero", "parallel.offload"}:
            tables["parallel"].pop("engine", None)
        if "parallel.world_size" in keys:
            tables["parallel"].pop("data", None)
        return resolve(apply_overrides(tables, overrides), str(self.path / "job.toml"))

    def event(self, kind: str, /, **fields) -> None:
        """Append one event on a line of its own, also behind a line that a crash cut off."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **fields}) + "\n"
        with open(self.events_file, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())

    def events(self, kind: str = "") -> Iterator[dict]:
        """Events in order, of one kind or of all; a line cut off by a crash is passed over."""
        if not self.events_file.exists():
            return
        for line in self.events_file.read_text().splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not kind or event["event"] == kind:
                yield event

    def curve(self) -> list[dict]:
        """The step events that count, in order: a launch drops the steps beyond the checkpoint it started from."""
        curve: list[dict] = []
        for event in self.events():
            if event["event"] == "launch":
                curve = [step for step in curve if step["step"] <= event["from_step"]]
            elif event["event"] == "step":
                curve.append(event)
        return curve

    def new_generation(self) -> tuple[int, Path]:
        """The number and folder of the next launch of ranks. What earlier ones left half-saved is removed."""
        store = self.store()
        check_writable(store)
        sweep(store)
        launched = [event["generation"] for event in self.events("launch")]  # elsewhere, if this directory is a new one
        number = max([sum(1 for _ in (self.path / "generations").glob("[0-9]*")), *(one + 1 for one in launched)])
        folder = self.path / "generations" / f"{number:03d}"
        (folder / "logs").mkdir(parents=True)
        return number, folder

    def store(self) -> Storage:
        """The folder of the run's checkpoints."""
        return open_storage(self.store_location(self.job().checkpoint), CheckpointError)

    def store_location(self, config: CheckpointConfig) -> str:
        """Where that is."""
        return f"{config.path.rstrip('/')}/{self.path.name}" if config.path else str(self.path / "checkpoints")

    @property
    def last_event(self) -> str:
        """The kind of the last thing that happened to it; "" where nothing has."""
        return next(reversed([event["event"] for event in self.events()]), "")

    @property
    def cancelled(self) -> bool:
        return self.last_event == "cancelled"

    def failed(self, error: ArmillaryError) -> None:
        """Tell that it cannot go on, where that was not told yet."""
        if self.last_event != "failed":
            self.event("failed", error=str(error))

    @property
    def has_checkpoint(self) -> bool:
        return LATEST in self.store().sizes()

    @contextlib.contextmanager
    def locked(self, patience: float = LOCK_SECONDS) -> Iterator[None]:
        """Hold the run for one driver; JobError where another has it for longer than `patience` seconds. A dead
        driver's hold ends with it."""
        deadline = time.monotonic() + patience
        with open(self.path / "lock", "a+") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # who only looks holds it for a moment
                    if time.monotonic() > deadline:
                        raise JobError(
                            "the run is being trained already", self.path, "wait for it, or stop it"
                        ) from None
                    time.sleep(0.05)
            file.truncate(0)
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}))
            file.flush()
            yield

    def driver(self) -> dict | None:
        """{"host", "pid", "here"} of the process that holds the run; None where none does. here: on this machine."""
        try:
            with open(self.path / "lock") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return None
                except BlockingIOError:
                    found = json.loads(file.read() or '{"host": "?", "pid": 0, "began": 0}')
        except FileNotFoundError:
            return None
        here = found["host"] == socket.gethostname() and _began(found["pid"]) == found["began"]
        return {"host": found["host"], "pid": found["pid"], "here": here}

    def latest(self) -> Storage:
        """The checkpoint to go on from; CheckpointError where there is none."""
        store, other = self.store(), "`armillary checkpoint list` has the others"
        try:
            pointer = bytes(store.read(LATEST))
        except FileNotFoundError:
            raise CheckpointError(
                "the run has no checkpoint yet", self.path, "start again with `armillary train`, in another directory"
            ) from None
        name = pointer.decode("ascii", "replace").partition(" ")[0]
        if pointer != _pointer(name) or "/" in name or f"{name}/{MANIFEST}" not in store.sizes():
            raise CheckpointError("`latest` names no complete checkpoint", store.at(LATEST), other)
        return store.folder(name)

    def latest_step(self) -> int:
        return read_manifest(self.latest()).state.step

    def checkpoint(self, step: int) -> Storage:
        """Where the checkpoint of `step` is, if there is one."""
        return self.store().folder(folder_name(step))

    def rewind(self, step: int) -> None:
        """Let `latest` name the checkpoint of `step`."""
        self.store().put(LATEST, _pointer(folder_name(step)))
        self.event("rewound", step=step)

    def leave_out(self, step: int, bad_step: int, cursor: dict) -> None:
        """Let who goes on from the checkpoint of `step` (0: the start), or from one between that and the bad step,
        leave out the data up to `cursor`."""
        self.event("rewind", from_step=step, bad_step=bad_step, cursor=cursor)

    def beyond(self, step: int) -> Cursor:
        """Where the data goes on at least for who goes on from the checkpoint of `step`, see `leave_out`. A
        `resume --from-step` in between begins anew."""
        cursor = Cursor()
        for event in self.events():
            if event["event"] == "rewound":
                cursor = Cursor()
            elif event["event"] == "rewind" and event["from_step"] <= step < event["bad_step"]:
                cursor = Cursor(**event["cursor"])
        return cursor

    def last_bad_step(self) -> dict | None:
        """The last verdict of the last launch that says what was done about a bad step."""
        found = None
        for event in self.events():
            if event["event"] == "launch":
                found = None
            elif event["event"] == "verdict" and "action" in event:
                found = event
        return found

    def verdict(self, verdict: Verdict) -> None:
        self.event("verdict", **verdict.as_dict())

    def verdicts(self) -> dict[str, int]:
        """How many of each kind there were."""
        return dict(collections.Counter(event["kind"] for event in self.events("verdict")))

    def commit(self, name: str, state: State, generation: int, ranks: int, keep: CheckpointConfig) -> None:
        """Make a checkpoint of what `ranks` ranks of a generation wrote into the folder `name` of the store, point
        `latest` to it, and remove those that need not be kept."""
        store = self.store()
        commit(store.folder(name), state, generation, ranks)
        self.event("checkpoint", step=state.step, path=store.at(name))
        for file in KEPT if keep.path else ():
            store.put(file, (self.path / file).read_bytes())
        store.put(LATEST, _pointer(name))
        if keep.keep_last:
            self.prune(keep)

    def prune(self, keep: CheckpointConfig, dry_run: bool = False) -> list[str]:
        """Remove the checkpoints that `keep` does not want, never the one that `latest` names; the folders of those."""
        store, latest = self.store(), self.latest().at()
        found = listed(store)
        wanted = kept(found, keep.keep_last, keep.keep_every, keep.keep_best)
        gone = [one.name for one in found if one.name not in wanted and store.at(one.name) != latest]
        for name in () if dry_run else gone:
            remove(store.folder(name))
            self.event("pruned", path=store.at(name))
        return [store.at(name) for name in gone]

    def write_targets(self, driver: str, ranks: list[str]) -> None:
        """Tell Prometheus (file_sd) where the driver's metrics are, and each rank's."""
        exporters = {"driver": driver} | {str(rank): address for rank, address in enumerate(ranks)}
        targets = [
            # `instance` would follow the port, which each launch changes: series go on under a name of their own.
            {"targets": [address], "labels": {"instance": f"{self.path.name}/{name}"}}
            for name, address in exporters.items()
        ]
        write_whole(self.targets_file, json.dumps(targets, indent=1) + "\n")

    def remove_begun(self) -> None:
        """Remove the directory of a start that was cut off, if there is one; JobError where something else is in it."""
        if not self.path.exists():
            return
        found = {path.name for path in self.path.iterdir()}
        if not found <= {DATA_MANIFEST, f".{DATA_MANIFEST}.tmp", ".job.toml.tmp"}:
            raise JobError("a directory of that name is no run", self.path, "name the run otherwise")
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _began(pid: int) -> float | None:
    """When a process of this machine did, which names it together with its number; None where there is none."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def _pointer(name: str) -> bytes:
    """What `latest` holds: a name, and a checksum that no other name has."""
    return f"{name} {xxhash.xxh3_64_hexdigest(name.encode())}\n".encode()
