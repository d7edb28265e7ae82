"""The same training under plain torchrun, where there is no Ray: rank 0 does the driver's part.

    torchrun --nproc-per-node 2 -m armillary.launcher.torchrun JOB.toml --run-dir RUN [table.key=value ...]

A run directory that exists is resumed from its latest checkpoint, so an elastic restart goes on.
"""

import argparse
import contextlib
import os
import signal
import sys
import warnings
from pathlib import Path

from rich.console import Console

from armillary.data_pipeline.build import ensure_built
from armillary.errors import ArmillaryError, JobError, PreemptedError
from armillary.launcher.fitting import peak_flops, refuse_what_does_not_fit
from armillary.launcher.job import Job, load_job
from armillary.launcher.progress import View
from armillary.launcher.run import Run
from armillary.launcher.run_metrics import serving as serving_run
from armillary.launcher.train import check_readable, resumable_job, until_step
from armillary.training.checkpoint.manifest import State, read_manifest
from armillary.training.health import Verdict


class LocalObserver:
    """Rank 0 keeps the run's events and commits its checkpoints; every rank listens for SIGINT and SIGTERM."""

    def __init__(self, run: Run, job: Job, generation: int, view: View):
        self._run, self._job, self._generation, self._view, self._stop = run, job, generation, view, False
        self.terminated = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request_stop)

    def _request_stop(self, number, frame) -> None:
        self._stop, self.terminated = True, self.terminated or number == signal.SIGTERM

    def stop_requested(self) -> bool:
        return self._stop

    def step_done(self, record: dict) -> None:
        self._run.event("step", **{key: value for key, value in record.items() if key not in ("time", "bad")})
        self._view.step(record)

    def saved(self, name: str, state: State) -> None:
        self._run.commit(name, state, self._generation, self._job.parallel.world_size, self._job.checkpoint)
        self._view.saved(state.step)

    def verdict(self, verdict: Verdict) -> None:
        self._run.verdict(verdict)
        self._view.say(verdict.line())
        if verdict.action == "rewind":
            step = self._run.latest_step() if self._run.has_checkpoint else 0
            self._run.leave_out(step, verdict.step, verdict.cursor)

    def not_saved(self, step: int, reason: str) -> None:
        self._run.event("not_saved", step=step, reason=reason)
        self._view.say(f"warning: no checkpoint of step {step}: {reason}")


def main() -> None:
    """Entry point of every rank."""
    warnings.filterwarnings("ignore")
    options = argparse.ArgumentParser(prog="armillary.launcher.torchrun")
    options.add_argument("job", type=Path)
    options.add_argument("--run-dir", type=Path, required=True)
    options.add_argument("--force", action="store_true", help="start what the planner says does not fit the GPUs")
    options.add_argument("overrides", nargs="*")
    args = options.parse_intermixed_args()
    try:
        train(args.job, args.run_dir, args.overrides, args.force)
    except ArmillaryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def train(job_file: Path, run_dir: Path, overrides: list[str], force: bool = False) -> None:
    """This rank's part of a new or resumed run."""
    import torch
    import torch.distributed as dist

    from armillary.training.loop import Assignment, run
    from armillary.training.process_group import Rank, join, leave

    environment = {key: int(os.environ.get(key, default)) for key, default in
                   (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("MASTER_PORT", 0))}  # fmt: skip
    # torchrun's own store listens on MASTER_PORT: ours takes the next.
    rank = Rank(environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"],
                os.environ.get("MASTER_ADDR", "127.0.0.1"), environment["MASTER_PORT"] + 1)  # fmt: skip
    job = load_job(job_file, overrides).with_absolute_paths()
    if job.parallel.world_size != rank.world_size:
        raise JobError(
            f"the layout has {job.parallel.world_size} ranks, torchrun started {rank.world_size}", job_file,
            "set parallel.world_size, or --nproc-per-node",
        )  # fmt: skip
    refuse_what_does_not_fit(job, force)
    join(rank, job.parallel, job.cluster.start_timeout)
    opened = Run(run_dir.resolve())
    with contextlib.ExitStack() as stack:
        plan = torch.zeros(2, dtype=torch.long, device=rank.device)  # generation, and whether there is a checkpoint
        if rank.rank == 0:
            opened = _open(run_dir, job)
            stack.enter_context(opened.locked())
            number, _ = opened.new_generation()
            plan += torch.tensor([number, opened.has_checkpoint], device=rank.device)
        dist.broadcast(plan, 0)
        generation, resumed = plan.tolist()
        resume, until = opened.latest() if resumed else None, job.training.steps
        if rank.rank == 0:
            done = read_manifest(resume).state.step if resume else 0
            until_step(job, 0, done)
            opened.event("launch", generation=generation, layout=job.parallel.model_dump(), from_step=done, until=until)
        console = Console(stderr=True, quiet=rank.rank > 0)
        view = stack.enter_context(View(opened.path.name, until, console))
        if rank.rank == 0:
            view.say(f"resuming from step {done}" if resume else f"a new run: {opened.path}")
        observer = LocalObserver(opened, job, generation, view)

        def serving(address: str) -> None:
            addresses = _gathered(address, rank)
            if rank.rank == 0:
                served = stack.enter_context(serving_run(opened, job.metrics, job.training.steps, rank.world_size))
                opened.write_targets(served, addresses)

        peak = peak_flops(job.training.precision)
        beyond = opened.beyond(read_manifest(resume).state.step if resume else 0)
        step = run(
            Assignment(opened.path.name, job.train_job(), job.hash(), rank, opened.store_location(job.checkpoint),
                       resume.at() if resume else None, until, generation, peak, beyond),
            observer,
            serving,
        )  # fmt: skip
        if rank.rank == 0:
            opened.event("ended", generation=generation, step=step, interrupted=step < until)
    leave()
    if observer.terminated and step < until:
        raise PreemptedError(f"stopped by SIGTERM after step {step}, with a checkpoint", run_dir, "start it again")


def _gathered(address: str, rank) -> list[str]:
    """Every rank's address, on all of them."""
    import torch
    import torch.distributed as dist

    mine = torch.zeros(256, dtype=torch.uint8, device=rank.device)
    mine[: len(address)] = torch.tensor(list(address.encode()), dtype=torch.uint8)
    every = [torch.zeros_like(mine) for _ in range(rank.world_size)]
    dist.all_gather(every, mine)
    return [bytes(one.tolist()).rstrip(b"\0").decode() for one in every]


def _open(run_dir: Path, job: Job) -> Run:
    """The run to go on with, or a new one."""
    if run_dir.exists():
        opened = Run.open(run_dir)
        state = read_manifest(opened.latest()).state if opened.has_checkpoint else None
        opened.write_job(resumable_job(opened, job, state))
        return opened
    manifest = ensure_built(job.data)
    check_readable(job)
    return Run.create(run_dir, job, manifest)


if __name__ == "__main__":
    main()
