"""The run directory: one run's job, events, logs and checkpoints. Only the driver writes here.

job.toml             the resolved job          job.hash   its hash
events.jsonl         what happened, one JSON object a line, appended
lock                 held by the driver at work
generations/000/     one launch of the ranks: their logs, and checkpoints in the making
checkpoints/         committed checkpoints     latest     the name of the newest
data_manifest.json   the manifest of the shards that the run trains on, their tokenizer in it
metrics_targets.json where the ranks' metrics are, for Prometheus' file_sd
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from armillary.data_pipeline.shards import Manifest
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.errors import CheckpointError, JobError
from armillary.files import sync, write_whole
from armillary.launcher.job import Job, apply_overrides, read_toml, resolve
from armillary.training.checkpoint.commit import commit, discard
from armillary.training.checkpoint.manifest import MANIFEST, State

DATA_MANIFEST = "data_manifest.json"


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
        """Make the directory of a new run; JobError where it exists already."""
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

    def event(self, kind: str, **fields) -> None:
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
        for staging in (self.path / "generations").glob("*/checkpoints"):
            discard(staging)
        number = sum(1 for _ in (self.path / "generations").glob("[0-9]*"))
        folder = self.path / "generations" / f"{number:03d}"
        (folder / "logs").mkdir(parents=True)
        (folder / "checkpoints").mkdir()
        return number, folder

    @property
    def has_checkpoint(self) -> bool:
        return (self.path / "latest").exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for one driver; JobError where another has it. A dead driver's hold ends with it."""
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobError("the run is being trained already", self.path, "wait for it, or stop it") from None
            yield

    def latest(self) -> Path:
        """The newest committed checkpoint; CheckpointError where there is none."""
        pointer = self.path / "latest"
        try:
            name = pointer.read_text().strip()
        except FileNotFoundError:
            raise CheckpointError(
                "the run has no checkpoint yet", self.path, "start again with `armillary train`, in another directory"
            ) from None
        checkpoint = self.path / "checkpoints" / name
        if Path(name).name != name or not (checkpoint / MANIFEST).exists():
            raise CheckpointError("`latest` names no complete checkpoint", checkpoint, "see checkpoints/ for another")
        return checkpoint

    def commit(self, staging: Path, state: State, ranks: int) -> Path:
        """Commit a checkpoint that `ranks` ranks wrote, and point `latest` to it."""
        target = self.path / "checkpoints" / staging.name
        if target.exists():  # a run resumed from an older checkpoint comes by this step again
            shutil.rmtree(target)
        commit(staging, target, state, ranks)
        write_whole(self.path / "latest", target.name + "\n")
        sync(self.path)
        self.event("checkpoint", step=state.step, path=str(target.relative_to(self.path)))
        return target

    def write_targets(self, addresses: list[str]) -> None:
        """Tell Prometheus (file_sd) where each rank's metrics are."""
        targets = [
            # `instance` would follow the port, which each launch changes: series go on under a name of their own.
            {
                "targets": [address],
                "labels": {"run": self.path.name, "rank": str(rank), "instance": f"{self.path.name}/{rank}"},
            }
            for rank, address in enumerate(addresses)
        ]
        write_whole(self.targets_file, json.dumps(targets, indent=1) + "\n")

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
