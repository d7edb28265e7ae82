"""`armillary data ...`: making shards, looking at them, checking them."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from armillary.errors import DataError, JobError
from armillary.launcher.arguments import Address, AsJson, JobFile, Overrides, RunPath, counted

app = typer.Typer(help="Make data ready, and look at it.", no_args_is_help=True)
Shards = Annotated[str, typer.Argument(metavar="PATH", help="the folder of the shards, or its URL")]


@app.command()
def build(
    job_file: JobFile,
    overrides: Overrides = (),
    force: Annotated[bool, typer.Option("--force", help="replace shards that are there")] = False,
    workers: Annotated[int, typer.Option(help="processes at once; 0: one a processor", min=0)] = 0,
    address: Address = "",
    as_json: AsJson = False,
) -> None:
    """Tokenize and encode the job's sources into Arrow shards. A build that was killed goes on where it stopped."""
    from armillary.data_pipeline.build import build as build_shards
    from armillary.data_pipeline.build import ensure_built
    from armillary.data_pipeline.folder import open_folder
    from armillary.data_pipeline.shards import MANIFEST
    from armillary.data_pipeline.verify import check_files
    from armillary.launcher.job import load_job
    from armillary.launcher.spread import spread
    from armillary.launcher.train import say_built
    from armillary.storage import is_url

    job, console = load_job(job_file, overrides).with_absolute_paths(), Console(stderr=True)
    if not force and (is_url(job.data.path) or (Path(job.data.path) / MANIFEST).exists()):
        manifest = ensure_built(job.data)
        check_files(open_folder(job.data.path, job.data.cache, job.data.cache_bytes), manifest)
        console.print("the shards are there already", highlight=False)
    else:
        try:
            with spread(address or job.cluster.address, workers or os.cpu_count() or 1) as each:
                manifest = build_shards(job.data, say_built(console), force, each)
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on where it stopped", highlight=False)
            raise typer.Exit(130) from None
    if as_json:
        reports = {source: report.model_dump() for source, report in manifest.reports.items()}
        print(json.dumps({"path": job.data.path, "sources": reports}))
        return
    for source, report in manifest.reports.items():
        kept = ", ".join(counted(getattr(report, key + "s"), key) for key in ("document", "token", "image", "byte"))
        print(f"{source}: {kept}")
        for reason, count in report.dropped.items():
            print(f"  dropped {count:,}: {reason}")
        for example in report.examples:
            print(f"    {example}")
    print(f"shards are in {job.data.path}")


@app.command()
def verify(path: Shards, as_json: AsJson = False) -> None:
    """Read every byte of the shards and compare it with their checksums."""
    from rich.progress import Progress

    from armillary.data_pipeline.folder import open_folder
    from armillary.data_pipeline.shards import read_manifest
    from armillary.data_pipeline.verify import verify as verify_shards

    console = Console(stderr=True)
    shown = Progress(console=console, transient=True, disable=not console.is_terminal)
    with tempfile.TemporaryDirectory() as place, shown as progress:
        manifest = read_manifest(open_folder(path, place))
        sizes = [shard.bytes + shard.index_bytes for shards in manifest.sources.values() for shard in shards]
        folder = open_folder(path, place, 2 * max(sizes))  # what the cache of this machine holds is another matter
        task = progress.add_task("bytes", total=None)
        found = verify_shards(folder, manifest, lambda done, total: progress.update(task, completed=done, total=total))
    shards = sum(map(len, manifest.sources.values()))
    if as_json:
        print(json.dumps({"shards": shards, "damaged": [{"what": e.what, "where": e.where} for e in found]}))
    elif not found:
        print(f"{counted(shards, 'shard')} read and compared: nothing is damaged")
    if found:
        reasons = "".join(f"\n  {error.where}: {error.what}" for error in found)
        raise DataError(
            f"{counted(len(found), 'damaged file')} in {counted(shards, 'shard')}:{reasons}", path, found[0].fix
        )


@app.command()
def inspect(
    path: Shards,
    source: Annotated[str, typer.Option(help="only this source")] = "",
    count: Annotated[int, typer.Option(help="documents to show of each source", min=0)] = 3,
    seed: Annotated[int, typer.Option(help="which ones are drawn", min=0)] = 0,
    sheet: Annotated[Path | None, typer.Option(help="write a PNG of pictures with their captions")] = None,
    as_json: AsJson = False,
) -> None:
    """What shards hold: figures, a few documents, a sheet of their pictures."""
    from armillary.data_pipeline.folder import open_folder
    from armillary.data_pipeline.inspect import contact_sheet, samples, statistics
    from armillary.data_pipeline.shards import read_manifest

    folder = open_folder(path)
    manifest = read_manifest(folder)
    if source and source not in manifest.sources:
        raise JobError(f"there is no source {source}", path, f"the sources are: {', '.join(manifest.sources)}")
    figures = {name: one for name, one in statistics(folder, manifest).items() if source in ("", name)}
    shown = {name: samples(folder, manifest, name, count, seed) for name in figures}
    if sheet is not None:
        pictured = [d for name in figures for d in samples(folder, manifest, name, max(count, 24), seed)]
        image = contact_sheet(pictured)
        if image is None:
            raise JobError("there are no pictures to show", path, "leave --sheet out")
        try:
            image.save(sheet, "png")
        except OSError as error:
            raise JobError(f"the sheet cannot be written: {error.strerror}", sheet, "choose another path") from None
        Console(stderr=True).print(f"the sheet is in {sheet}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        texts = {name: [d | {"images": len(d["images"])} for d in drawn] for name, drawn in shown.items()}
        print(json.dumps({"sources": figures, "samples": texts}))
        return
    for name, one in figures.items():
        print(
            f"{name}: "
            + ", ".join(counted(one[key + "s"], key) for key in ("document", "token", "image", "byte", "shard"))
        )
        print("  tokens a document: " + ", ".join(f"{q} {n:,}" for q, n in one["tokens_per_document"].items()))
        for reason, dropped in one["dropped"].items():
            print(f"  dropped {dropped:,}: {reason}")
        for document in shown[name]:
            text = " ".join(document["text"].split())
            print(f"  #{document['number']} {document['name']} ({document['tokens']} tokens)")
            print(f"    {text[:300]}{'...' if len(text) > 300 else ''}")


@app.command()
def bench(
    job_file: JobFile,
    overrides: Overrides = (),
    seconds: Annotated[float, typer.Option(help="how long to measure", min=0.1)] = 5.0,
    as_json: AsJson = False,
) -> None:
    """How fast this machine makes a job's batches, as one rank without a model, and how full their rows are."""
    from armillary.data_pipeline.build import ensure_built
    from armillary.data_pipeline.measure import measure
    from armillary.launcher.job import load_job
    from armillary.launcher.train import say_built

    job, console = load_job(job_file, overrides).with_absolute_paths(), Console(stderr=True)
    ensure_built(job.data, say_built(console))
    share = job.training.global_batch // job.parallel.data
    speed = measure(job.data, job.image_shape, share, job.parallel.micro_batch, seconds)
    if as_json:
        print(json.dumps(asdict(speed)))
        return
    print(f"{speed.positions_per_second:,.0f} positions/s, {speed.images_per_second:,.0f} images/s")
    print(f"first step after {speed.first_seconds:.3f} s, after a resume {speed.resume_seconds:.3f} s")
    print(f"rows are filled to {speed.utilisation:.2%} (data.packing = {job.data.packing})")


@app.command()
def find(
    path: Shards,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="at least 50 letters and digits")],
    as_json: AsJson = False,
) -> None:
    """Which documents hold a stretch of text, its spaces and symbols aside. Needs shards with data.substrings=true."""
    from armillary.data_pipeline.folder import open_folder
    from armillary.data_pipeline.shards import read_manifest
    from armillary.data_pipeline.substrings import SubstringIndex

    folder = open_folder(path)
    found = [f"{source}:{number}" for source, number in SubstringIndex(folder, read_manifest(folder)).find(text)]
    print(json.dumps({"documents": found}) if as_json else "\n".join(found) or "no document")


@app.command()
def where(
    run: RunPath,
    overrides: Overrides = (),
    step: Annotated[int | None, typer.Option(help="the documents that this step saw", min=1)] = None,
    document: Annotated[str | None, typer.Option(help="SOURCE:NUMBER, the steps that saw this document")] = None,
    as_json: AsJson = False,
) -> None:
    """Which documents a step of a run saw, or which steps saw a document."""
    if (step is None) == (document is None):
        raise JobError("either a step or a document is needed", "command line", "give --step 5, or --document pydoc:17")
    from armillary.launcher.run import Run
    from armillary.launcher.where import Where

    found = Where(Run.open(run), list(overrides))
    if step is not None:
        documents = found.step(step)
        if as_json:
            print(json.dumps({"step": step, "documents": documents}))
            return
        print("row  document  its positions  name")
        for one in documents:
            print(f"{one['row']}  {one['source']}:{one['number']}  {one['start']}-{one['stop']}  {one['name']}")
        return
    source, _, number = document.rpartition(":")
    if not number.isdigit():
        raise JobError(
            f"a document is not of the form SOURCE:NUMBER: {document}", "command line", "for example pydoc:17"
        )
    steps = list(found.document(source, int(number)))
    print(json.dumps({"document": document, "steps": steps}) if as_json else " ".join(map(str, steps)) or "no step yet")
