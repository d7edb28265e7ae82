"""`armillary train` and `armillary resume`: everything between the command line and the driver."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from armillary.data_pipeline.build import built, ensure_built
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.folder import open_folder
from armillary.data_pipeline.loader import Loader
from armillary.data_pipeline.mixture import BLOCK_ROWS, ORDER
from armillary.data_pipeline.shards import read_manifest as read_data_manifest
from armillary.data_pipeline.sources.easy_vqa import easy_vqa_questions
from armillary.data_pipeline.verify import check_files
from armillary.errors import ArmillaryError, CheckpointError, DataError, JobError, PreemptedError
from armillary.kernels.forced import VARIABLE, forced
from armillary.launcher.driver import drive
from armillary.launcher.fitting import refuse_what_does_not_fit
from armillary.launcher.job import Job
from armillary.launcher.plot import plot_loss
from armillary.launcher.progress import View
from armillary.launcher.recovery import Outcome
from armillary.launcher.run import Run
from armillary.launcher.run_metrics import serving
from armillary.storage import Storage, is_url, open_storage
from armillary.training.checkpoint.manifest import State, read_manifest

KEPT_BY_RESUME = ("model", "data")  # a change would make the checkpoint's tensors or cursor mean something else
FREE = ("data.path", "data.threads", "data.cache", "data.cache_bytes")  # of their keys, these may change


@dataclass
class Summary:
    """How a run stands when a command ends. Rates are of this launch; losses of the whole run.

    Tokens are positions of the packed rows: text, image positions and padding.
    """

    run: str
    steps: int
    total_steps: int
    interrupted: bool
    tokens: int
    tokens_per_second: float
    first_loss: float | None
    last_loss: float | None
    checkpoint: str
    metrics: str
    plot: str
    accuracy: float | None = None
    blind_accuracy: float | None = None
    questions: int | None = None
    preempted: bool = False

    def as_dict(self) -> dict:
        return asdict(self)

    def print(self, console: Console) -> None:
        """The summary for people."""
        rows = {
            "steps": f"{self.steps} of {self.total_steps}" + (" (interrupted)" if self.interrupted else ""),
            "tokens": f"{self.tokens:,} at {self.tokens_per_second:,.0f} tokens/s",
            "loss": "no step that counts"
            if self.first_loss is None
            else f"{self.first_loss:.4f} at the first step, {self.last_loss:.4f} at the last",
            "run": self.run,
            "checkpoint": self.checkpoint,
            "metrics": self.metrics,
            "plot": self.plot,
        }
        if self.accuracy is not None:
            rows["accuracy"] = (
                f"{self.accuracy:.4f} on {self.questions:,} held-out questions; "
                f"blind baseline {self.blind_accuracy:.4f}"
            )
        for name, value in rows.items():
            console.print(f"{name:>12}  {value}", markup=False, highlight=False, soft_wrap=True)


def check_data(run: Run, job: Job, state: State | None) -> None:
    """DataError where the order of the data is another one than the run's, or its shards are. state: of the run's
    checkpoint, if there is one."""
    order = ORDER if state is None else state.data_order
    if order != ORDER:
        raise DataError(
            f"the run's data came in order {order}, this version has {ORDER}", run.path,
            "use the version that the run was made with, or start a new run",
        )  # fmt: skip
    elsewhere = "restore those shards, or say where they are: data.path=..."
    if not is_url(job.data.path) and not os.path.exists(job.data.path):
        raise DataError("the run's shards are not here", job.data.path, elsewhere)
    if built(job.data) != run.data():
        raise DataError("these are not the shards that the run was trained on", job.data.path, elsewhere)


def start(job: Job, run_dir: Path | None, stop_at: int, console: Console, force: bool = False) -> Summary:
    """Train a new run; a start that the user can put right leaves no directory behind."""
    forced(os.environ.get(VARIABLE, ""))
    until, job = until_step(job, stop_at, done=0), job.with_absolute_paths()
    for warning in job.warnings():
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    path = run_dir or Path("runs") / f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    Run.refuse_existing(path)
    refuse_what_does_not_fit(job, force)
    manifest = ensure_built(job.data, say_built(console))
    check_readable(job)
    refuse_what_does_not_fit(job, force)  # again, now that it is known how many images rows have
    run = Run.create(path, job, manifest)
    with run.locked():
        try:
            return _train(run, job, until, None, console)
        except ArmillaryError as error:
            if error.exit_code == 2 and not run.curve():
                run.remove()
            raise


def resume(
    path: Path,
    overrides: list[str],
    stop_at: int,
    console: Console,
    force: bool = False,
    from_step: int | None = None,
    allow: Sequence[str] = (),
) -> Summary:
    """Go on with a run from its latest checkpoint, or from that of a step, on the layout that the overrides ask for."""
    forced(os.environ.get(VARIABLE, ""))
    run = Run.open(path)
    with run.locked():
        if from_step is None and run.cancelled:
            raise JobError("the run was cancelled", path, "name the checkpoint to go on from with --from-step")
        checkpoint = run.latest() if from_step is None else run.checkpoint(from_step)
        state = read_manifest(checkpoint).state
        check_edits(run, allow, state)
        job = resumable_job(run, run.job(overrides).with_absolute_paths(), state)
        refuse_what_does_not_fit(job, force)
        until = until_step(job, stop_at, state.step)
        if from_step is not None:
            run.rewind(from_step)
        return _train(run, job, until, checkpoint, console)


def go_on(path: Path, job: Job, console: Console, fewer: bool, patience: float) -> Summary:
    """Train this job in the run directory `path`: a new run where there is none, else the one that is there, from its
    latest checkpoint if it has one, on `fewer` ranks if need be. For whoever starts runs again without a look.

    patience: seconds that a driver elsewhere, which was told to end, may take to save."""
    run = Run.open(path) if (path / "job.toml").exists() else Run.restored(path, job)
    if run is not None:
        if (other := run.driver()) is not None:
            console.print(f"waiting until the driver on {other['host']} has saved", markup=False, highlight=False)
        with run.locked(patience):
            try:
                return _again(run, job, console, fewer)
            except ArmillaryError as error:
                if not isinstance(error, PreemptedError):
                    run.failed(error)
                raise
    Run(path).remove_begun()
    return start(job, path, 0, console)


def _again(run: Run, job: Job, console: Console, fewer: bool) -> Summary:
    checkpoint = run.latest() if run.has_checkpoint else None
    state = read_manifest(checkpoint).state if checkpoint else None
    if state is not None and state.step >= job.training.steps:
        return _summarise(run, job, Outcome(state.step, False))
    job = resumable_job(run, job.with_absolute_paths(), state)
    until = until_step(job, 0, state.step if state else 0)
    return _train(run, job, until, checkpoint, console, fewer)


def check_edits(run: Run, allow: Sequence[str], state: State) -> None:
    """JobError where job.toml was changed by hand since it was written, in keys that are not in `allow`. state: of the
    checkpoint to go on from."""
    job = run.job()
    if job.hash() == run.written_hash():
        return
    found = [key for key in different(state.job, job.model_dump(mode="json")) if not key.startswith("parallel.")]
    if rest := [key for key in found if key not in allow]:
        raise JobError(
            f"job.toml is not what the checkpoint was made with: {', '.join(rest)}", run.path / "job.toml",
            f"set {'it' if len(rest) == 1 else 'them'} back, or say that it is meant: "
            + " ".join(f"--allow {key}" for key in rest),
        )  # fmt: skip


def different(some: dict, others: dict, prefix: str = "") -> list[str]:
    """The keys that two tables both have, with another value."""
    found = []
    for key in (key for key in some if key in others):
        if isinstance(some[key], dict) and isinstance(others[key], dict):
            found += different(some[key], others[key], f"{prefix}{key}.")
        elif some[key] != others[key]:
            found.append(f"{prefix}{key}")
    return found


def resumable_job(run: Run, job: Job, state: State | None) -> Job:
    """`job` if the run can go on with it; JobError or DataError if its model or data would be other ones. state: of the
    checkpoint to go on from, if there is one."""
    before, cursor = run.job(), state.cursor if state is not None else Cursor()
    free = {*FREE, "data.schedule"} if _planned(before, cursor) == _planned(job, cursor) else set(FREE)
    changed = ["checkpoint.path"] if before.checkpoint.path != job.checkpoint.path else []
    for table in KEPT_BY_RESUME:
        old, new = getattr(before, table).model_dump(), getattr(job, table).model_dump()
        changed += [name for key in new if new[key] != old[key] and (name := f"{table}.{key}") not in free]
    if changed:
        raise JobError(
            f"a run cannot be resumed with another {', '.join(changed)}", run.path / "job.toml",
            "leave it as it was, or start a new run",
        )  # fmt: skip
    check_data(run, job, state)
    check_readable(job)
    return job


def _planned(job: Job, cursor: Cursor) -> list:
    """What the schedule says of the data up to the cursor's block: that much of it cannot change any more."""
    return [stage for stage in job.data.stages() if stage[0] <= cursor.block * BLOCK_ROWS * job.data.seq_length]


def check_readable(job: Job) -> None:
    """Refuse incomplete shards, and held-out questions that cannot be scored, before any rank starts."""
    Loader(job.data, job.image_shape)
    folder = open_folder(job.data.path, job.data.cache, job.data.cache_bytes)
    check_files(folder, read_data_manifest(folder))
    if job.checkpoint.start:
        read_manifest(open_storage(job.checkpoint.start, CheckpointError))
    for source in job.data.sources if job.training.evaluate else ():
        if source.kind == "easy_vqa" and not easy_vqa_questions("test", source.path):
            raise DataError("there are no held-out questions", source.path, "add some, or set training.evaluate=false")


def say_built(console: Console) -> Callable[[str], None]:
    """What tells a user how far a build of shards is."""
    return lambda line: console.print(f"building shards: {line}", highlight=False, markup=False, soft_wrap=True)


def until_step(job: Job, stop_at: int, done: int) -> int:
    """The step to stop after."""
    until = stop_at or job.training.steps
    if until > job.training.steps:
        raise JobError(f"--stop-at {stop_at} is beyond training.steps = {job.training.steps}", "command line",
                       "raise training.steps, or stop earlier")  # fmt: skip
    if until <= done:
        raise JobError(f"step {until} is done already: the run is at step {done}", "command line",
                       "raise training.steps or --stop-at")  # fmt: skip
    return until


def _train(
    run: Run, job: Job, until: int, checkpoint: Storage | None, console: Console, fewer: bool = False
) -> Summary:
    ranks = job.parallel.world_size
    with (
        View(run.path.name, until, console) as view,
        serving(run, job.metrics, job.training.steps, ranks) as address,
    ):
        outcome = drive(run, job, until, checkpoint, view, address, fewer)
    summary = _summarise(run, job, outcome)
    if job.training.evaluate and outcome.step >= job.training.steps:
        from armillary.evals.vqa import evaluate, has_questions

        if has_questions(job):
            console.print("scoring held-out questions", highlight=False)
            try:
                score = evaluate(run.latest(), run.tokenizer())
            except ArmillaryError as error:  # the training is done all the same
                console.print(f"not scored: {error}", markup=False, highlight=False)
                return summary
            summary.accuracy, summary.blind_accuracy = score.accuracy, score.blind
            summary.questions = score.total
            run.event("evaluated", suite="easy-vqa", **asdict(score))
    return summary


def _summarise(run: Run, job: Job, outcome: Outcome) -> Summary:
    curve, events = run.curve(), list(run.events())
    launch = max(i for i, event in enumerate(events) if event["event"] == "launch")
    steps = [event for event in events[launch:] if event["event"] == "step"]
    seconds = sum(event["seconds"] for event in steps[1:])
    return Summary(
        run=str(run.path),
        steps=outcome.step,
        total_steps=job.training.steps,
        interrupted=outcome.interrupted,
        preempted=outcome.preempted,
        tokens=curve[-1]["tokens"] if curve else 0,
        tokens_per_second=round((len(steps) - 1) * job.tokens_per_step / seconds, 1) if seconds else 0.0,
        first_loss=curve[0]["loss"] if curve else None,
        last_loss=curve[-1]["loss"] if curve else None,
        checkpoint=run.latest().at(),
        metrics=str(run.targets_file),
        plot=str(plot_loss(run)),
    )
