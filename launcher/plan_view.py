"""How plans are shown to people."""

from rich.console import Console
from rich.table import Table

from armillary.model.flops import parameters
from armillary.planner.explain import Explanation
from armillary.planner.plan import GIB, Plan, described
from armillary.planner.search import Found


def print_plan(console: Console, plan: Plan, tokens: float, assumed: bool = False) -> None:
    """One plan, whole: what, how fast, memory and time by part, and what a budget of tokens takes. assumed: there were
    no shards to know images and documents from."""
    counted, cluster, step = parameters(plan.model), plan.cluster, plan.step
    active = f" ({_number(counted.active)} active)" if counted.active < counted.total else ""
    rows = {
        "model": f"{_number(counted.total)} parameters{active}",
        "machines": f"{cluster.gpus:,} x {cluster.name}, {cluster.node_gpus} a node",
        "layout": described(plan.layout) or "one rank",
        "rows": f"{step.images:.3g} images a row, documents of {step.document:,.0f} positions"
                + (" (assumed, there are no shards yet: say --images, --document)" if assumed else ""),
        "step": f"{_seconds(plan.time.total)} for {plan.tokens:,} positions",
        "rate": f"{plan.tokens_per_second:,.0f} positions/s, {plan.tflops:,.3g} TFLOP/s a GPU, "
                f"MFU {plan.mfu:.1%}, HFU {plan.hfu:.1%}",
        "memory": f"{plan.peak_bytes / GIB:,.1f} of {cluster.memory_bytes / GIB:,.1f} GiB on the fullest GPU"
                  + ("" if plan.fits else ": it does not fit"),
    }  # fmt: skip
    if tokens:
        budget = plan.budget(tokens)
        cost = f", {_figure(budget.cost)} dollars" if budget.cost else ""
        energy = f", {_figure(budget.kwh)} kWh" if budget.kwh else ""
        rows["budget"] = (
            f"{tokens:,.0f} positions: {_days(budget.days)}, {_figure(budget.gpu_hours)} GPU hours{cost}{energy}"
        )
    for name, value in rows.items():
        console.print(f"{name:>9}  {value}", markup=False, highlight=False, soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_time_table(plan))


def print_ranking(console: Console, found: Found, plans: list[Plan]) -> None:
    """The best layouts, one a line."""
    table = Table(
        title=f"{found.allowed:,} layouts are allowed, {len(found.ranked):,} were kept that fit with 5 % to spare:"
    )
    for heading in ("#", "step", "MFU", "GiB", "layout"):
        table.add_column(heading, justify="left" if heading == "layout" else "right", overflow="fold")
    for number, plan in enumerate(plans, 1):
        table.add_row(
            str(number), _seconds(plan.time.total), f"{plan.mfu:.1%}", f"{plan.peak_bytes / GIB:,.1f}",
            described(plan.layout) or "one rank",
        )  # fmt: skip
    console.print(table)


def print_explanation(console: Console, plan: Plan, said: Explanation) -> None:
    """What binds, and what would help."""
    parts = {part: size for part, size in plan.fullest.as_dict().items() if part != "total"}
    most = sorted(parts, key=parts.__getitem__, reverse=True)[:3]
    shares = ", ".join(f"{part} {parts[part] / plan.peak_bytes:.0%}" for part in most)
    console.print(f"memory of the fullest GPU is {shares}", highlight=False)
    table = Table(title="what binds: a tenth more of it would save, of the step's time")
    for heading in ("resource", "saves"):
        table.add_column(heading, justify="right" if heading == "saves" else "left")
    for binding in said.bindings:
        table.add_row(binding.resource, f"{binding.saved:.2%}")
    console.print(table)
    if not said.changes:
        best = "faster that fits" if plan.fits else "smaller"
        console.print(f"of {said.tried} layouts that differ by one step of one key, none is {best}", highlight=False)
        return
    table = Table(title=f"what would help, of {said.tried} layouts that differ by one step of one key")
    for heading in ("change", "step", "GiB", "fits"):
        table.add_column(heading, justify="left" if heading == "change" else "right", overflow="fold")
    for change in said.changes[:8]:
        faster, less = change.seconds / plan.time.total - 1, change.peak_bytes / plan.peak_bytes - 1
        table.add_row(
            change.change, f"{_seconds(change.seconds)} ({faster:+.1%})",
            f"{change.peak_bytes / GIB:,.1f} ({less:+.1%})", "yes" if change.fits else "no",
        )  # fmt: skip
    console.print(table)


def _memory_table(plan: Plan) -> Table:
    stages = plan.as_dict()["memory_bytes"]["stages"]
    table = Table(title="memory of a GPU by part, GiB")
    table.add_column("part")
    for stage in stages:
        table.add_column(f"{stage['kind']} stage" if len(stages) > 1 else "every GPU", justify="right")
    for part in (key for key in stages[0] if key not in ("stage", "kind")):
        if any(stage[part] for stage in stages):
            table.add_row(part, *(f"{stage[part] / GIB:,.2f}" for stage in stages), end_section=part == "fragmentation")
    return table


def _time_table(plan: Plan) -> Table:
    table = Table(title="time of a step by part")
    for heading in ("part", "time", "share"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, seconds in plan.time.as_dict().items():
        if seconds:
            share = f"{seconds / plan.time.total:.1%}"
            table.add_row(part, _seconds(seconds), share, end_section=part == "checkpoint")
    return table


def _seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 10 else f"{value * 1e3:,.0f} ms" if value >= 0.1 else f"{value * 1e3:,.2f} ms"


def _number(value: int) -> str:
    return f"{value / 1e9:,.3g} B" if value >= 1e9 else f"{value / 1e6:.3g} M"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} hours" if days >= 1 / 24 else f"{days * 86400:,.0f} s"
