"""Arguments that several commands share, and the wording of what they print."""

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="the job file")]
Overrides = Annotated[list[str], typer.Argument(metavar="[TABLE.KEY=VALUE]...", help="keys set over the job file's")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="the run's directory")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON line on standard output")]
StopAt = Annotated[int, typer.Option(help="stop after this step, with a checkpoint; 0: train to the end", min=0)]
Force = Annotated[
    bool, typer.Option("--force", help="start a layout that the planner says does not fit the GPUs' memory")
]
Address = Annotated[str, typer.Option(help="Ray cluster to join; sets cluster.address")]


def counted(number: int, what: str) -> str:
    """1 shard, 2,000 shards."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
