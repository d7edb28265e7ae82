"""From a job file to what is handed to a cluster: checked first, so that nothing starts there that cannot work."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from armillary.errors import JobError
from armillary.k8s.lints import DIGEST, LONGEST_NAME, NAME, lint
from armillary.k8s.rayjob import ROOT, Submission, ray_job
from armillary.launcher.job import Job
from armillary.storage import is_url

STAMP = "%Y%m%d-%H%M%S"
LONGEST_RUN = LONGEST_NAME - len("-r99")  # a run that is resumed gets a new RayJob, whose name is longer


def new_name(job: Job) -> str:
    """A run's name from the job's, with the time."""
    clean = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    stamp = time.strftime(STAMP)
    return (
        f"{clean if clean[:1].isalpha() else f'run-{clean}'}"[: LONGEST_RUN - len(stamp) - 1].rstrip("-") + f"-{stamp}"
    )


def rayjob_of(job: Job, run: str, name: str, where: str, allow_tag: bool = False, force: bool = False) -> dict:
    """The RayJob `name` of a run. JobError where it could not work in any cluster, or, unless `force`d, where the
    planner says that it does not fit its GPUs. where: the job file."""
    if len(run) > LONGEST_RUN or not NAME.fullmatch(run):
        raise JobError(f"a run cannot be named {run!r} in a cluster", "--run", f"take at most {LONGEST_RUN} lower-case "
                       "letters, digits and dashes; the first a letter, the last no dash")  # fmt: skip
    made, layout = time.strftime(STAMP), job.parallel
    submission = Submission(
        name, made, run, job.to_toml(), layout.world_size, layout.tensor, job.cluster.grace, job.kubernetes
    )
    if wrong := list(_problems(job, allow_tag)) or lint(ray_job(submission), allow_tag):
        fix = "`armillary job explain` says what every key takes"
        if any(key == "kubernetes.image" for key, _ in wrong):
            fix = "`docker buildx imagetools inspect IMAGE` tells an image's digest; --allow-tag takes one without"
        raise JobError("; ".join(f"{key}: {reason}" for key, reason in wrong), where, fix)
    if not force:
        refuse_what_does_not_fit(job, submission.pods[1])
    return ray_job(submission)


def _problems(job: Job, allow_tag: bool) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it in a pod)."""
    if not job.kubernetes.image:
        yield "kubernetes.image", "a cluster needs an image to run"
    elif not allow_tag and not DIGEST.fullmatch(job.kubernetes.image):
        yield "kubernetes.image", f"{job.kubernetes.image!r} is not named by its digest: NAME@sha256:..."
    if job.cluster.address:
        yield "cluster.address", "a run in Kubernetes has a Ray cluster of its own: leave it out"
    if job.kubernetes.priority and not job.kubernetes.queue:
        yield "kubernetes.priority", "is Kueue's, who needs kubernetes.queue too"
    paths = {"checkpoint.path": job.checkpoint.path, "data.path": job.data.path}
    if job.checkpoint.start:
        paths["checkpoint.start"] = job.checkpoint.start
    for key, path in paths.items():  # not sources': where their shards are built already, nobody reads them
        if is_url(path):
            continue
        if not job.kubernetes.volume:
            yield key, "pods without kubernetes.volume share no folder, and keep none: it has to be a URL"
        elif not Path(os.path.normpath(Path(ROOT, path))).is_relative_to(ROOT):
            yield key, f"{path} is not on the volume, which pods have at {ROOT}"


def refuse_what_does_not_fit(job: Job, ranks_per_pod: int) -> None:
    """JobError where the planner says that the layout needs more memory than `kubernetes.gpu_model` has."""
    if not job.kubernetes.gpu_model:
        return
    from armillary.launcher.plan_commands import rows_of
    from armillary.planner.hardware import cluster, find_gpu
    from armillary.planner.plan import fits

    machine = cluster(find_gpu(job.kubernetes.gpu_model), job.parallel.world_size, ranks_per_pod)
    rows = rows_of(job)
    fits(job, machine, rows.document, rows.images)


class _Dumper(yaml.SafeDumper):
    """Text of several lines as it is."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def to_yaml(thing: dict) -> str:
    """As `kubectl apply -f -` takes it."""
    return yaml.dump(thing, Dumper=_Dumper, sort_keys=False, width=120)
