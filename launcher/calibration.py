"""`armillary plan --calibrate`: this machine as a hardware file, and the planner's step beside a measured one."""

import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from armillary.errors import JobError

DEMO = Path(__file__).resolve().parents[1] / "examples" / "easy_vqa.toml"
WARM_UP, STEPS = 3, 8


def calibrate(job_file: Path | None, output: Path | None, as_json: bool) -> None:
    """Measure, write the file, then plan the job (the demo's if none is named) on one rank and run some steps of it."""
    from armillary.planner.calibrate import default_path, measure, write
    from armillary.planner.hardware import cluster, read_gpu

    path, console = output or default_path(), Console(stderr=True)
    if path.suffix != ".toml":
        raise JobError("a hardware file ends in .toml", path, "name it so: --output this-machine.toml")
    tables = measure(lambda line: console.print(line, highlight=False, markup=False))
    try:
        write(tables, path)
    except OSError as error:
        raise JobError(f"the hardware file cannot be written: {error.strerror}", path, "choose another") from None
    planned, measured = compare(job_file or DEMO, cluster(read_gpu(path), 1), console)
    if as_json:
        print(json.dumps({"file": str(path), "planned_seconds": planned, "measured_seconds": measured}))
        return
    print(
        f"a step of {(job_file or DEMO).name} on one rank: planned {planned * 1e3:,.0f} ms, "
        f"measured {measured * 1e3:,.0f} ms ({planned / measured - 1:+.0%})"
    )
    print(f"armillary plan JOB.toml --gpu {path}")


def compare(job_file: Path, machine, console: Console) -> tuple[float, float]:
    """Seconds of a step of the job on one rank: (planned, the median of those measured)."""
    from armillary.data_pipeline.build import ensure_built
    from armillary.launcher.job import read_toml, resolve
    from armillary.launcher.plan_commands import rows_of
    from armillary.launcher.train import say_built
    from armillary.planner.plan import plan_job
    from armillary.training.layout import Layout
    from armillary.training.loop import Assignment, Trainer
    from armillary.training.process_group import Rank, join, leave

    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder)
        tables = read_toml(job_file)
        micro_batch = tables.get("parallel", {}).get("micro_batch", 1)
        shards = {} if job_file != DEMO else {"data": tables["data"] | {"path": str(staging / "shards")}}
        job = resolve(tables | shards | {"parallel": {"micro_batch": micro_batch}}, str(job_file)).with_absolute_paths()
        ensure_built(job.data, say_built(console))
        rows = rows_of(job)
        planned = plan_job(job, machine, rows.document, rows.images).time.total
        join(Rank(), Layout())
        trainer = None
        try:
            trainer = Trainer(Assignment("calibration", job.train_job(), "", Rank(), staging, None, WARM_UP + STEPS))
            seconds = [trainer.train_step()[0]["seconds"] for _ in range(WARM_UP + STEPS)]
        finally:
            if trainer is not None:
                trainer.close()
            leave()
    return planned, statistics.median(seconds[WARM_UP:])
