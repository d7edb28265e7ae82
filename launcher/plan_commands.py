"""`armillary plan`: memory and time of a job's layout, or of every layout, before anything runs."""

import json
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from armillary.errors import DataError, JobError
from armillary.launcher.arguments import AsJson, Overrides

GPUS = 8  # in a node, as most have
AXES = ("world_size", "data", "tensor", "pipeline", "virtual", "context", "expert", "first_stage_layers",
        "last_stage_layers", "zero", "offload", "recompute")  # fmt: skip
PLOTTED = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
DETECTION = 30.0  # seconds until a failure is noticed (assumed)
STRAGGLERS, SLOWDOWN, JITTER = (
    0.005,
    1.1,
    0.02,
)  # assumed: one rank in 200 a tenth slower (Jiang et al. 2024, section 5)

OptionalJob = Annotated[
    Path | None, typer.Argument(metavar="JOB.toml", help="the job file; with --calibrate the one to compare with")
]


def plan(
    job_file: OptionalJob = None,
    overrides: Overrides = (),
    gpus: Annotated[int | None, typer.Option(help="how many; default: the ranks of the job's layout")] = None,
    gpu: Annotated[str, typer.Option(help="a100-40, a100-80, h100, h200, b200, mi300x, or a file: FILE.toml")] = "h100",
    node_gpus: Annotated[int, typer.Option(help="GPUs of a node, which the fast link joins")] = GPUS,
    interconnect: Annotated[
        str, typer.Option(help="between nodes: ib-hdr, ib-ndr, ib-xdr, roce-200, roce-400, efa-400, tcp-25")
    ] = "",
    tokens: Annotated[float, typer.Option(help="positions to train on; 0: what the job's steps come to")] = 0.0,
    images: Annotated[
        float | None, typer.Option(help="of a row, on average; default: as in the job's shards, if they are built")
    ] = None,
    document: Annotated[
        float | None,
        typer.Option(help="positions of a document, on average; default: as in the shards, or a whole row"),
    ] = None,
    search_all: Annotated[
        bool, typer.Option("--all", help="rank every layout, whatever the job's parallel table says")
    ] = False,
    top: Annotated[int, typer.Option(help="how many of the ranked layouts to show")] = 10,
    explain: Annotated[bool, typer.Option("--explain", help="what binds, and what would help")] = False,
    goodput: Annotated[bool, typer.Option("--goodput", help="long runs of 1,000 to 100,000 GPUs that fail")] = False,
    mtbf_hours: Annotated[float, typer.Option(help="of one GPU, between failures")] = 50_000.0,
    restart_seconds: Annotated[float, typer.Option(help="from when a failure is noticed to the next step")] = 600.0,
    plot: Annotated[Path | None, typer.Option(help="draw goodput over the number of GPUs into this PNG")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="measure this machine into a hardware file")] = False,
    output: Annotated[Path | None, typer.Option(help="the file that --calibrate writes; default: in the cache")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what memory and time a job takes on given GPUs, before anything runs.

    A job whose parallel table gives a layout is planned with it; its `data` follows from --gpus if it is not set. Else
    every layout that is allowed is planned, and those that fit are shown, the fastest first. How far such figures are
    from measured ones is in docs/results/planner.md.

    armillary plan job.toml --gpus 1024 --gpu h100 --tokens 2e12

    armillary plan job.toml --gpus 64 --gpu a100-80 parallel.tensor=8 --explain

    armillary plan job.toml --gpus 1024 --goodput --plot goodput.png

    armillary plan --calibrate --output this-machine.toml
    """
    if calibrate:
        from armillary.launcher.calibration import calibrate as measured

        measured(job_file, output, as_json)
        return
    if job_file is None:
        raise JobError("there is no job to plan", "command line", "name a job file: armillary plan JOB.toml --gpus 64")
    _refuse_numbers({"--tokens": tokens, "--images": images or 0, "--document": document or 0}, 1e18, zero=True)
    _refuse_numbers({"--top": top, "--mtbf-hours": mtbf_hours, "--restart-seconds": restart_seconds}, 1e9, zero=False)
    from armillary.planner.hardware import cluster, find_gpu

    kind = find_gpu(gpu)
    if gpus is not None:
        cluster(kind, gpus, node_gpus, interconnect)  # refused before the job is read
    job, given = _read(job_file, overrides, gpus, search_all)
    machines = cluster(kind, gpus or job.parallel.world_size, node_gpus, interconnect)
    found = rows_of(job)
    _refuse_rows(job, images or 0.0, document or 0.0)
    rows = Rows(
        found.images if images is None else images, document or found.document,
        found.assumed and (images is None or document is None),
    )  # fmt: skip
    _answer(job, given, machines, rows, tokens or job.tokens_per_step * job.training.steps, top,
            explain, (mtbf_hours, restart_seconds, plot) if goodput or plot else None, as_json)  # fmt: skip


def _refuse_numbers(options: dict[str, float], below: float, zero: bool) -> None:
    """JobError where one is negative or absurd, or is zero and must not be."""
    for option, value in options.items():
        if not (0 < value < below or (zero and value == 0)):
            raise JobError(f"{option} {value} makes no sense", "command line", "give a positive number")


def _refuse_rows(job, images: float, document: float) -> None:
    """JobError where a row cannot hold what was said of it."""
    length, room = job.data.seq_length, job.data.seq_length // job.image_shape.positions
    if document > length:
        raise JobError(f"--document {document:g} is more than a row has", f"data.seq_length = {length:,}", "say less")
    if images > room:
        positions = job.image_shape.positions
        raise JobError(
            f"--images {images:g} is more than a row holds: {room:,} of {positions:,} positions each",
            f"data.seq_length = {length:,}", "say less",
        )  # fmt: skip


def _answer(job, given, machines, rows, tokens, top, explain, failing, as_json) -> None:
    from armillary.launcher.plan_view import print_explanation, print_plan, print_ranking
    from armillary.planner.explain import explain as explained
    from armillary.planner.plan import plan_job, plan_layout, step_of
    from armillary.planner.search import search

    console, found = Console(width=None if sys.stdout.isatty() else 120), None
    if given:
        plans = [plan_job(job, machines, rows.document, rows.images)]
    else:
        step = step_of(job, rows.document, rows.images)
        found = search(job.model, step, machines, job.checkpoint.every)
        refuse_none(found, job, machines)
        plans = [plan_layout(job.model, one.layout, step, machines, job.checkpoint.every) for one in found.ranked[:top]]
    best = plans[0]
    said = explained(best) if explain else None
    sizes = goodput_of(best, *failing) if failing else None
    if as_json:
        answer = {"plans": [one.as_dict(tokens) for one in plans], "rows": rows._asdict()}
        answer |= {"allowed": found.allowed, "fitting": len(found.ranked)} if found else {}
        if said:
            answer["explanation"] = {
                "bindings": {one.resource: one.saved for one in said.bindings},
                "changes": [
                    {"change": one.change, "layout": one.layout.model_dump(mode="json"), "seconds": one.seconds,
                     "peak_bytes": one.peak_bytes, "fits": one.fits}
                    for one in said.changes
                ],
            }  # fmt: skip
        if sizes:
            answer["goodput"] = sizes
        print(json.dumps(answer))
        return
    if found:
        print_ranking(console, found, plans)
    print_plan(console, best, tokens, rows.assumed)
    if said:
        print_explanation(console, best, said)
    if sizes:
        from armillary.launcher.goodput_view import print_sizes

        print_sizes(console, sizes, failing[2])


def refuse_none(found, job, machines) -> None:
    """JobError where no layout is allowed, or none fits: with the smallest, and by how much it is too large."""
    from armillary.planner.plan import GIB, described
    from armillary.planner.search import usable

    where = f"{machines.gpus:,} x {machines.name}"
    if found.ranked:
        return
    if found.smallest is None:
        raise JobError(
            "no layout of so many GPUs can run this model and batch: sizes that divide neither "
            f"training.global_batch = {job.training.global_batch} nor model.depth = {job.model.depth} nor the heads",
            where, "choose another --gpus, or a training.global_batch that it divides",
        )  # fmt: skip
    room, needed = usable(machines) / GIB, found.smallest.peak_bytes / GIB
    raise JobError(
        f"the job fits in no layout; the smallest of {found.allowed:,} is {described(found.smallest.layout)}: it needs "
        f"{needed:.1f} GiB a GPU, {needed - room:.1f} GiB more than the {room:.1f} GiB that a plan may take",
        where, "take more GPUs or larger ones, a smaller model, or shorter rows (data.seq_length)",
    )  # fmt: skip


def _read(job_file: Path, overrides: list[str], gpus: int | None, search_all: bool):
    """The job, and whether its [parallel] gives a layout: `data` follows from the GPUs where it is not set."""
    from armillary.launcher.job import apply_overrides, read_toml, resolve

    tables = apply_overrides(read_toml(job_file), overrides)
    parallel = tables.get("parallel", {})
    given = isinstance(parallel, dict) and any(parallel.get(key) for key in AXES) and not search_all
    if not given:
        if gpus is None:
            raise JobError("how many GPUs are there?", "--gpus", "say so: --gpus 64, or give a layout in [parallel]")
        return resolve({key: table for key, table in tables.items() if key != "parallel"}, str(job_file)), False
    if gpus is not None and not parallel.get("data") and not parallel.get("world_size"):
        tables["parallel"] = parallel | {"world_size": gpus}
    job = resolve(tables, str(job_file))
    if gpus is not None and job.parallel.world_size != gpus:
        raise JobError(
            f"the job's layout is of {job.parallel.world_size} ranks, not of {gpus}", f"{job_file}, --gpus",
            "leave parallel.data out, so that it follows; or plan every layout: --all",
        )  # fmt: skip
    return job, True


class Rows(NamedTuple):
    """Images of a row, positions of a document, and whether that is no more than an assumption."""

    images: float
    document: float
    assumed: bool = False


def rows_of(job) -> Rows:
    """What the job's shards have; no images and documents of a whole row are assumed where there are none.

    The mean length stands for that of the document a position is in: documents of even length.
    """
    from armillary.data_pipeline.folder import open_folder
    from armillary.data_pipeline.shards import read_manifest
    from armillary.storage import is_url

    data, length = job.data, float(job.data.seq_length)
    if is_url(data.path) or not Path(data.path).exists():
        return Rows(0.0, length, assumed=True)
    try:
        reports = read_manifest(open_folder(data.path)).reports
    except DataError:  # planned without; `armillary train` refuses them
        return Rows(0.0, length, assumed=True)
    weights = {source.name: source.weight for source in data.sources if source.name in reports}
    images = document = 0.0
    for name, weight in weights.items():
        report, share = reports[name], weight / (sum(weights.values()) or 1.0)
        positions = report.tokens + report.images * job.image_shape.positions
        if positions:
            images += share * length * report.images / positions
            document += share * min(length, positions / report.documents)
    return Rows(images, document or length)


def goodput_of(plan, mtbf_hours: float, restart_seconds: float, plot: Path | None) -> list[dict]:
    """How a long run of the plan's replicas fares from 1,000 to 100,000 GPUs."""
    from armillary.launcher.goodput_view import draw
    from armillary.planner.goodput import over_sizes
    from armillary.planner.simulate import Variation, slowed
    from armillary.planner.time import checkpoint_time

    replica = plan.cluster.gpus // plan.layout.data
    replicas = [max(1, round(gpus / replica)) for gpus in PLOTTED]
    sizes = over_sizes(
        {n * replica: checkpoint_time(plan.model, plan.layout, plan.cluster.of(n * replica)) for n in replicas},
        mtbf_hours, DETECTION, restart_seconds,
    )  # fmt: skip
    sharing = plan.layout.tensor * plan.layout.context  # ranks of a stage, which wait for the slowest of them
    vary = Variation(JITTER, 1 - (1 - STRAGGLERS) ** sharing, SLOWDOWN)
    count = plan.step.global_batch // plan.layout.data // plan.layout.micro_batch
    found = []
    for size, number in zip(sizes, replicas, strict=True):
        slower = slowed(plan.layout.pipeline, plan.layout.virtual, count, vary, number)
        found.append(vars(size) | {"slowed": slower, "total": size.goodput / slower})
    if plot is not None:
        draw(found, plot)
    return found
