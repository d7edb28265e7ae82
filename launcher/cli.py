"""The command line. Each command reads its arguments, calls one function, and prints what came out."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from armillary import __version__
from armillary.errors import ArmillaryError, JobError, PreemptedError
from armillary.launcher import run_commands
from armillary.launcher.arguments import Address, AsJson, Force, JobFile, Overrides, RunPath, StopAt, counted
from armillary.launcher.checkpoint_commands import app as checkpoint_app
from armillary.launcher.data_commands import app as data_app
from armillary.launcher.kernel_commands import app as kernels_app
from armillary.launcher.plan_commands import plan
from armillary.launcher.run_commands import Context, Namespace

app = typer.Typer(
    help="Train large image+text transformers from one job file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
job_app = typer.Typer(help="Look at job files.", no_args_is_help=True)
eval_app = typer.Typer(help="Measure a trained model.", no_args_is_help=True)
app.add_typer(job_app, name="job")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(eval_app, name="eval")
app.add_typer(kernels_app, name="kernels")
app.command()(plan)
for command in (run_commands.submit, run_commands.render, run_commands.status, run_commands.logs):
    app.command()(command)
app.command("list")(run_commands.list_)
for command in (run_commands.suspend, run_commands.cancel, run_commands.report):
    app.command()(command)


@app.command()
def train(
    job_file: JobFile,
    overrides: Overrides = (),
    run_dir: Annotated[Path | None, typer.Option(help="directory of the run; default runs/NAME-TIME")] = None,
    stop_at: StopAt = 0,
    address: Address = "",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a new run on Ray: shards are built if there are none, checkpoints saved as it goes."""
    from armillary.launcher.job import load_job

    job = load_job(job_file, _with_address(overrides, address))
    from armillary.launcher.train import start

    _finish(start(job, run_dir, stop_at, _console(), force), as_json)


@app.command()
def resume(
    run: RunPath,
    overrides: Overrides = (),
    stop_at: StopAt = 0,
    from_step: Annotated[
        int | None, typer.Option(help="go on from this step's checkpoint instead of the latest")
    ] = None,
    allow: Annotated[list[str], typer.Option(help="a key of job.toml that was changed by hand; repeatable")] = (),
    address: Address = "",
    force: Force = False,
    context: Context = "",
    namespace: Namespace = "",
    detach: Annotated[bool, typer.Option("--detach", help="do not follow a run in a cluster")] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run from its latest checkpoint, on any layout: parallel.tensor=1 parallel.pipeline=2. A run in a
    cluster goes on as it was submitted."""
    if not run_commands.is_here(str(run), context, namespace):
        if overrides or stop_at or from_step is not None or allow or address or force:
            raise JobError("a run in a cluster goes on as it was submitted", str(run),
                           f"with other keys: `armillary submit JOB.toml --run {run} TABLE.KEY=VALUE`")  # fmt: skip
        run_commands.resume_in_cluster(str(run), context, namespace, detach, as_json)
        return
    from armillary.launcher.train import resume as go_on

    _finish(go_on(run, _with_address(overrides, address), stop_at, _console(), force, from_step, allow), as_json)


@job_app.command()
def check(job_file: JobFile, overrides: Overrides = (), as_json: AsJson = False) -> None:
    """Say whether a job file is right, and what it comes to."""
    from armillary.launcher.job import load_job

    job = load_job(job_file, overrides)
    warnings = job.warnings()
    if as_json:
        print(json.dumps({"hash": job.hash(), "job": job.model_dump(mode="json"), "warnings": warnings}))
        return
    print(job.to_toml())
    for warning in warnings:
        print(f"# warning: {warning}")
    print(f"# {job_file} is right; {counted(job.parallel.world_size, 'rank')}, hash {job.hash()}")


@job_app.command()
def explain(as_json: AsJson = False) -> None:
    """Every key of a job file: type, default, meaning."""
    from armillary.launcher.job import explain as keys

    rows = list(keys())
    if as_json:
        print(json.dumps([dict(zip(("key", "type", "default", "meaning"), row, strict=True)) for row in rows]))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("key", "type", "default", "meaning"):
        table.add_column(heading, no_wrap=heading == "key", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="a question about the image, or text to continue")],
    image: Annotated[Path | None, typer.Option(help="an image file")] = None,
    max_tokens: Annotated[int, typer.Option(help="tokens to write at most", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time; above: sampled", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling", min=0, max=2**63 - 1)] = 0,
    as_json: AsJson = False,
) -> None:
    """Let a run's latest checkpoint answer a question about an image, or go on with a text."""
    if not prompt.strip():
        raise JobError("the prompt is empty", "--prompt", "ask something")
    from armillary.data_pipeline.sources.easy_vqa import read_image

    data = read_image(image) if image is not None else None
    from armillary.launcher.run import Run

    Run.open(run).latest()  # a run that is not there is refused before PyTorch is imported
    from armillary.launcher.answer import Answerer

    answer = Answerer(run).answer(prompt, data, max_tokens, temperature, seed)
    print(json.dumps({"answer": answer}) if as_json else answer)


@eval_app.command("run")
def run_eval(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="easy-vqa")],
    model: Annotated[Path, typer.Option(help="the run's directory")],
    limit: Annotated[int, typer.Option(help="only the first so many questions; 0: all", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Score a run's latest checkpoint on held-out questions."""
    if suite != "easy-vqa":
        raise JobError(f"there is no suite {suite}", "command line", "the suites are: easy-vqa")
    from rich.progress import Progress

    from armillary.launcher.run import Run

    run = Run.open(model)
    checkpoint, tokenizer = run.latest(), run.tokenizer()  # refused, if at all, before PyTorch is imported
    from armillary.evals.vqa import evaluate

    with Progress(console=_console(), transient=True) as progress:
        task = progress.add_task("questions", total=None)
        score = evaluate(
            checkpoint, tokenizer, limit, lambda done, total: progress.update(task, completed=done, total=total)
        )
    if as_json:
        print(json.dumps({"suite": suite, "accuracy": score.accuracy, "blind_accuracy": score.blind,
                          "correct": score.correct, "questions": score.total}))  # fmt: skip
    else:
        print(f"accuracy {score.accuracy:.4f} on {score.total:,} questions; blind baseline {score.blind:.4f}")


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: an ArmillaryError is one message and its exit code; anything else is a bug, with its traceback."""
    import warnings

    warnings.filterwarnings("ignore")  # of Megatron-core and DeepSpeed about packages that are not needed here
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    try:
        app()
    except ArmillaryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _console() -> Console:
    return Console(stderr=True)


def _with_address(overrides: list[str], address: str) -> list[str]:
    return [*overrides, f'cluster.address="{address}"'] if address else list(overrides)


def _finish(summary, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary.as_dict()))
    else:
        summary.print(Console())
    if summary.interrupted:
        print(f"{'preempted' if summary.preempted else 'interrupted'}; go on with: armillary resume {summary.run}",
              file=sys.stderr)  # fmt: skip
        sys.exit(PreemptedError.exit_code if summary.preempted else 130)
