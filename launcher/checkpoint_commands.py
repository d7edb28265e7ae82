"""`armillary checkpoint ...`: which there are, whether they are whole, how two differ, and fewer of them."""

import json
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from armillary.errors import CheckpointError
from armillary.launcher.arguments import AsJson, RunPath, counted
from armillary.storage import Storage, open_storage

app = typer.Typer(help="Look after checkpoints.", no_args_is_help=True)
RunOrCheckpoint = Annotated[
    str, typer.Argument(metavar="RUN|CHECKPOINT", help="a run: its latest one; or a checkpoint's folder or URL")
]
Layouts = Enum("Layouts", {"hugging_face": "hugging-face", "safetensors": "safetensors"})
Dtypes = Enum("Dtypes", {"float32": "float32", "bfloat16": "bfloat16"})
MOST_SHOWN = 5  # problems in one message


def checkpoint_at(location: str) -> Storage:
    """The checkpoint at a path or URL, or the latest one of the run there; CheckpointError where there is neither."""
    from armillary.launcher.run import Run
    from armillary.training.checkpoint.manifest import MANIFEST

    if (Path(location) / "job.toml").exists():
        return Run.open(Path(location)).latest()
    checkpoint = open_storage(location, CheckpointError)
    if MANIFEST not in checkpoint.sizes():
        raise CheckpointError(
            "there is no run and no checkpoint here", location, "name a run, or one of those that `list` shows of it"
        )
    return checkpoint


@app.command("list")
def list_(run: RunPath, as_json: AsJson = False) -> None:
    """A run's checkpoints; the one that a resume goes on from is marked."""
    from armillary.launcher.run import Run
    from armillary.training.checkpoint.catalog import listed

    opened = Run.open(run)
    store, found = opened.store(), listed(opened.store())
    latest = opened.latest().at() if opened.has_checkpoint else ""
    if as_json:
        rows = [
            {"path": store.at(one.name), "latest": store.at(one.name) == latest, "bytes": one.bytes}
            | ({"problem": one.problem} if one.state is None else {})
            | ({} if one.state is None else one.state.model_dump(include={"step", "loss", "tokens", "saved_at"}))
            for one in found
        ]
        print(json.dumps({"checkpoints": rows}))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "loss", "tokens", "saved", "GB", "folder"):
        table.add_column(heading, justify="left" if heading == "folder" else "right", no_wrap=True)
    for one in found:
        if one.state is None:
            table.add_row("", "", "", "", "", f"{one.name}: {one.problem}")
            continue
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.state.saved_at))
        folder = one.name + (" (latest)" if store.at(one.name) == latest else "")
        numbers = (f"{one.state.step:,}", _loss(one.state.loss), f"{one.state.tokens:,}", saved)
        table.add_row(*numbers, f"{one.bytes / 1e9:.3f}", folder)
    Console(soft_wrap=True).print(table)
    print(f"{counted(len(found), 'checkpoint')} in {store.at()}")


@app.command()
def show(checkpoint: RunOrCheckpoint, as_json: AsJson = False) -> None:
    """What a checkpoint holds: its state, and the shape of every weight."""
    from armillary.training.checkpoint.manifest import MOMENTS, read_manifest

    storage = checkpoint_at(checkpoint)
    manifest = read_manifest(storage)
    shapes = {chunk.key: list(chunk.global_shape) for chunk in manifest.chunks}
    state = manifest.state.model_dump(mode="json")
    if as_json:
        print(json.dumps({"path": storage.at(), "state": state, "tensors": shapes}))
        return
    print(f"{'path':>9}  {storage.at()}")
    for key in ("run", "step", "tokens", "loss", "job_hash", "cursor"):
        print(f"{key:>9}  {state[key]}")
    print(f"{'layout':>9}  {_said(state['job']['parallel'])}")
    weights = {key.partition("/")[2]: shape for key, shape in shapes.items() if key.startswith("weight/")}
    for name, shape in weights.items():
        print(f"{' x '.join(map(str, shape)):>18}  {name}")
    print(f"{counted(len(weights), 'weight')}, each with its {' and '.join(MOMENTS)}")


@app.command()
def verify(checkpoint: RunOrCheckpoint, as_json: AsJson = False) -> None:
    """Read every byte of a checkpoint, and compare it with its checksums."""
    from rich.progress import Progress

    from armillary.training.checkpoint.catalog import verify as verified

    storage, console = checkpoint_at(checkpoint), Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("bytes", total=None)
        size, problems = verified(storage, lambda done, total: progress.update(task, completed=done, total=total))
    if as_json:
        print(json.dumps({"path": storage.at(), "bytes": size, "problems": problems}))
    elif not problems:
        print(f"{storage.at()} is whole: {counted(size, 'byte')} of tensors")
    if problems:
        more = len(problems) - MOST_SHOWN
        shown = "; ".join(problems[:MOST_SHOWN]) + (f"; and {more:,} more" if more > 0 else "")
        raise CheckpointError(
            f"the checkpoint is damaged: {shown}", storage.at(),
            "resume from another one: `armillary resume RUN --from-step N`",
        )  # fmt: skip


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="a checkpoint, or a run: its latest one")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="another")],
    as_json: AsJson = False,
) -> None:
    """Which tensors of two checkpoints differ, and how much. Two of other steps with the same bits: exit code 1."""
    from armillary.training.checkpoint.catalog import differences
    from armillary.training.checkpoint.manifest import read_manifest

    storages = [checkpoint_at(location) for location in (first, second)]
    steps = [read_manifest(storage).state.step for storage in storages]
    count, found = differences(*storages)
    found = list(found)
    if as_json:
        print(json.dumps({"steps": steps, "tensors": count, "differences": [one._asdict() for one in found]}))
    else:
        for one in found:
            how = f"{one.largest:.3e} at most, {one.norm:.3e} of its norm" if one.kind == "changed" else one.kind
            print(f"{one.key}: {how}")
        print(f"{len(found):,} of {counted(count, 'tensor')} differ between step {steps[0]} and step {steps[1]}")
    if not found and steps[0] != steps[1]:
        Console(stderr=True).print(
            f"WARNING: steps {steps[0]} and {steps[1]} have the same bits: nothing was trained between them, or one "
            "of them was saved wrongly", style="bold red", soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(1)


@app.command()
def prune(
    run: RunPath,
    keep_last: Annotated[int, typer.Option(help="keep so many of the newest", min=1)],
    keep_every: Annotated[int, typer.Option(help="and those whose step this divides; 0: none", min=0)] = 0,
    keep_best: Annotated[int, typer.Option(help="and so many with the lowest loss", min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and leave it")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove checkpoints that need not be kept; never the one that a resume goes on from."""
    from armillary.launcher.run import Run
    from armillary.training.config import CheckpointConfig

    opened = Run.open(run)
    keep = CheckpointConfig(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
    with opened.locked():
        removed = opened.prune(keep, dry_run)
    if as_json:
        print(json.dumps({"removed": removed, "dry_run": dry_run}))
        return
    for path in removed:
        print(f"{'would remove' if dry_run else 'removed'} {path}")
    print(f"{counted(len(removed), 'checkpoint')} {'would go' if dry_run else 'removed'}")


@app.command()
def export(
    checkpoint: RunOrCheckpoint,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where to; must not be there yet")],
    layout: Annotated[
        Layouts, typer.Option("--format", help="Llama's names, for transformers; or our own")
    ] = Layouts.hugging_face,
    dtype: Annotated[Dtypes, typer.Option(help="of the weights")] = Dtypes.float32,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's weights as safetensors: a folder that transformers loads, or one in our own layout."""
    from armillary.launcher.exchange import export as exported
    from armillary.launcher.run import Run

    storage = checkpoint_at(checkpoint)
    path = Path(checkpoint)
    tokenizer = Run.open(path).tokenizer() if (path / "job.toml").exists() else None
    config = exported(storage, tokenizer, folder, layout is Layouts.hugging_face, dtype.value)
    print(json.dumps({"path": str(folder), "config": config}) if as_json else f"{storage.at()} exported to {folder}")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="an exported folder, or a Llama of transformers")],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="where to; must not be there yet")],
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of weights in safetensors, for a new run to begin with: checkpoint.start=CHECKPOINT."""
    from armillary.launcher.exchange import import_ as imported

    model = imported(folder, checkpoint)
    if as_json:
        print(json.dumps({"path": str(checkpoint), "model": model.model_dump()}))
    else:
        print(f"{folder} is a checkpoint now: {checkpoint}; begin with it: checkpoint.start={checkpoint}")


def _loss(loss: float | None) -> str:
    return "--" if loss is None else f"{loss:.4f}"


def _said(layout: dict) -> str:
    from armillary.training.layout import Layout

    plain = Layout.model_fields
    return " ".join(f"{key}={value}" for key, value in layout.items() if value != plain[key].default) or "one process"
