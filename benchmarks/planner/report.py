"""The benchmark's figures as a page and two pictures."""

from pathlib import Path

TABLES = {
    "all": "**all rows**",
    "given": "all but MegaScale's",
    "narayanan2021_table1": "Narayanan et al. 2021, table 1 (Megatron-LM, A100, 32 to 3,072)",
    "korthikanti2022_table5": "Korthikanti et al. 2022, table 5 (Megatron-LM, A100, 8 to 512)",
    "korthikanti2022_table4": "Korthikanti et al. 2022, table 4 (one layer)",
    "megascale_table2": "MegaScale 2024, table 2 (A100, 256 to 8,192)",
    "torchtitan_2024_t1_t3": "torchtitan 2024, tables 1 and 3 (FSDP, H100, 8 and 128)",
    "torchtitan_2024_t2": "torchtitan 2024, table 2 (context parallel, fp8, to 262,144 positions)",
    "mosaic_mpt": "MosaicML MPT 2023 (FSDP, A100 and H100, 8 to 512)",
    "nanotron_best": "nanotron 2024 (3D, H100, 8 to 512)",
}


def markdown(answer: dict) -> str:
    """The page docs/results/planner.md, written by the benchmark."""
    lines = [
        "# The planner beside published runs",
        "",
        "Written by `make bench-planner`; the rows are in [planner.json](planner.json). How the planner works, and",
        "what these figures can and cannot say, is in [planner.md](../planner.md).",
        "",
        "Of each table every second row, beginning with the first, was there to fit; the others are scored. The",
        f"constants ({', '.join(answer['fitted'])})",
        "were fitted on the first half, once. An error is |planned / published - 1|.",
        "",
        "What a table leaves out is from its paper's text or its codebase's files (`benchmarks/planner/rows.py` says",
        "where), but for MegaScale's micro-batch, which is printed nowhere and assumed to be one row. How four",
        "codebases go about a step was corrected after a look at all rows, the scored ones too.",
        "",
        *_time(answer),
        "## Memory",
        "",
        "Of the fullest GPU, as PyTorch's allocator counts (GiB). The share that fragmentation takes is fitted, all",
        "else is counted.",
        "",
        *_table(answer["memory"]),
        "",
        "![memory, planned and published](planner-memory.png)",
        "",
        *_long_runs(answer["goodput"]),
        "## The worst rows",
        "",
        "| row | half | error |",
        "|---|---|---|",
        *_worst(answer["rows"]),
        "",
        "## Search",
        "",
        *(
            f"- every layout of 16,384 H100s, {name}: {one['allowed']:,} allowed, {one['kept']:,} kept that fit, in "
            f"{one['seconds']:.1f} s of one processor"
            for name, one in answer["search"].items()
        ),
        "",
    ]
    return "\n".join(lines)


def _time(answer: dict) -> list[str]:
    return [
        "## Time of a step",
        "",
        *_table(answer["time"]),
        "",
        "One utilisation for all rows, fitted on the same half, would be wrong by "
        f"{answer['rule_of_thumb']['median']:.0%} in the median and {answer['rule_of_thumb']['worst']:.0%} at worst.",
        "",
        "![time of a step, planned and published](planner-time.png)",
        "",
        "### Tables that were not seen",
        "",
        "Each table under constants that were fitted on all others: what to expect of a codebase and a cluster that",
        "the constants know nothing of.",
        "",
        "| table | rows | median | worst | signed median |",
        "|---|---|---|---|---|",
        *(
            f"| {TABLES[table]} | {one['rows']} | {one['median']:.1%} | {one['worst']:.1%} | {one['bias']:+.1%} |"
            for table, one in answer["unseen"].items()
        ),
        "",
    ]


def _long_runs(sizes: list[dict]) -> list[str]:
    return [
        "## Long runs",
        "",
        "Simulated, not measured: `benchmarks/planner/goodput.toml` on H100s, with 64 micro-batches for each replica",
        "of 64 GPUs however many there are. Minutes; a failure costs what was done since the last checkpoint, half a",
        "minute until it is noticed, and ten until the next step.",
        "",
        "| GPUs | between failures | a save | best interval | Young | Daly | goodput | with slow ranks |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {one['gpus']:,} | {60 * one['mtbf_hours']:,.0f} | "
            + " | ".join(f"{one[key] / 60:.3g}" for key in ("checkpoint_cost", "interval", "young", "daly"))
            + f" | {one['goodput']:.1%} | {one['total']:.1%} |"
            for one in sizes
        ),
        "",
        "![goodput from 1,000 to 100,000 H100s](planner-goodput.png)",
        "",
    ]


def _table(halves: dict) -> list[str]:
    lines = [
        "| table | scored: rows | median | worst | signed median | fitted: rows | median | worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for table, scored in halves["scored"].items():
        fitted = halves["fit"][table]
        lines.append(
            f"| {TABLES[table]} | {scored['rows']} | {scored['median']:.1%} | {scored['worst']:.1%} | "
            f"{scored['bias']:+.1%} | {fitted['rows']} | {fitted['median']:.1%} | {fitted['worst']:.1%} |"
        )
    return lines


def _worst(rows: list[dict]) -> list[str]:
    return [
        f"| {row['table']} {row['number']}: {row['label']} | {'scored' if row['scored'] else 'fitted'} | "
        f"{row['time_error']:+.0%} |"
        for row in sorted(rows, key=lambda row: -abs(row["time_error"]))[:8]
    ]


def draw(rows: list[dict], folder: Path) -> None:
    """planner-time.png and planner-memory.png: planned over published, each table in its colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, unit, scale in (("seconds", "s", "log"), ("gib", "GiB", "linear")):
        figure, axes = pyplot.subplots(figsize=(6.5, 6), layout="constrained")
        shown = [row for row in rows if row[f"measured_{name}"]]
        for colour, table in enumerate(dict.fromkeys(row["table"] for row in shown)):
            for scored, marker in ((True, "o"), (False, "x")):
                points = [r for r in shown if r["table"] == table and r["scored"] == scored]
                axes.plot(
                    [r[f"measured_{name}"] for r in points], [r[f"planned_{name}"] for r in points], marker,
                    markersize=5, color=f"C{colour}", fillstyle="none", label=table if scored else None,
                )  # fmt: skip
        ends = [f([row[f"measured_{name}"] for row in shown]) for f in (min, max)]
        axes.plot(ends, ends, color="grey", linewidth=1)
        axes.fill_between(ends, [0.9 * x for x in ends], [1.1 * x for x in ends], color="grey", alpha=0.15)
        axes.set(
            xscale=scale, yscale=scale, xlabel=f"published, {unit}", ylabel=f"planned, {unit}",
            title="o scored, x fitted; grey: 10 %",
        )  # fmt: skip
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(folder / f"planner-{'time' if name == 'seconds' else 'memory'}.png", dpi=110)
        pyplot.close(figure)
