"""`armillary kernels ...`: which implementation of an operation runs."""

import json

import typer
from rich.console import Console
from rich.table import Table

from armillary.kernels.forced import OPERATIONS, VARIABLE
from armillary.launcher.arguments import AsJson

app = typer.Typer(help="Look at the kernels.", no_args_is_help=True)


@app.callback()
def kernels() -> None:
    """Look at the kernels."""


@app.command("list")
def list_kernels(as_json: AsJson = False) -> None:
    """Each operation: what runs on this machine and why, and how to have the other implementation."""
    import torch

    from armillary.kernels.choose import choose

    found = []
    for operation in OPERATIONS:
        choice = choose(operation, torch.cuda.is_available(), torch.bfloat16)
        other = f"{VARIABLE}=reference:{operation}" if choice.implementation == "triton" else ""
        if choice.implementation == "reference":
            other = f"leave {VARIABLE} out" if choice.forced else "TRITON_INTERPRET=1, slow, for tests"
        found.append({"operation": operation, "runs": choice.implementation, "why": choice.reason, "the other": other})
    if as_json:
        print(json.dumps(found))
        return
    table = Table(*found[0])
    for one in found:
        table.add_row(*one.values())
    Console().print(table)
