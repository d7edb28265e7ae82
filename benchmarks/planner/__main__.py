"""`python -m benchmarks.planner`: the planner held against published runs; --fit: its constants fitted before that.

Writes docs/results/planner.md, .json and three pictures. Without the reference data it says so and ends.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from armillary.launcher.job import load_job
from armillary.launcher.plan_commands import goodput_of
from armillary.planner.hardware import cluster, find_gpu
from armillary.planner.plan import plan_job
from armillary.planner.search import search
from armillary.planner.software import Constants, constants
from armillary.planner.stages import Step
from benchmarks.planner.fit import FITTED, fit, halves, write
from benchmarks.planner.report import draw, markdown
from benchmarks.planner.rows import Row, read, reference_file, text_model
from benchmarks.planner.score import errors, planned, planned_gib, rule_of_thumb

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
# Where a fit begins: what one would guess. `link` is not fitted: NCCL's own tests reach about 0.8 of NVLink.
START = Constants(
    gemm=0.9, traffic=0.7, memory=0.7, flash2=0.7, flash1=0.5, link=0.8, network=0.5, overlapped=0.3, jitter=0.01,
    fragmentation=0.03,
)  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--fit", action="store_true", help="fit the constants first, and write planner/constants.toml")
    options.add_argument("--output", type=Path, default=RESULTS)
    args = options.parse_args()
    path = reference_file()
    if not path.exists():
        sys.exit(f"there is no {path}: set ARMILLARY_REFERENCE_DATA to the folder of performance_tables.json")
    rows = read(path)
    fitting, scored = halves(rows)
    if args.fit:
        write(fit(fitting, START))
        constants.cache_clear()
    c = constants()
    args.output.mkdir(parents=True, exist_ok=True)
    answer = {
        "constants": vars(c),
        "fitted": [*FITTED, "fragmentation"],
        "time": {"fit": by_table(fitting, c), "scored": by_table(scored, c)},
        "memory": {"fit": by_table(fitting, c, gib=True), "scored": by_table(scored, c, gib=True)},
        "unseen": unseen(rows),
        "rule_of_thumb": rule_of_thumb(fitting, scored),
        "search": search_seconds(),
        "goodput": long_runs(args.output),
    }
    shown = [one_row(row, c, row in scored) for row in rows]
    answer["rows"] = [errors_alone(row) for row in shown]
    (args.output / "planner.json").write_text(json.dumps(answer, indent=1) + "\n")
    (args.output / "planner.md").write_text(markdown(answer))
    draw(shown, args.output)
    print(markdown(answer))


def long_runs(folder: Path) -> list[dict]:
    """Goodput of goodput.toml on 1,000 to 100,000 H100s, a GPU failing every 50,000 hours; and its picture."""
    job = load_job(Path(__file__).with_name("goodput.toml"))
    plan = plan_job(job, cluster(find_gpu("h100"), job.parallel.world_size))
    return goodput_of(plan, 50_000.0, 600.0, folder / "planner-goodput.png")


PARTLY_KNOWN = "megascale_table2"  # the only one whose table leaves a part of its setting out


def by_table(rows: list[Row], c: Constants, gib: bool = False) -> dict[str, dict]:
    """Errors of each table, of all rows, and of those whose setting is given whole."""
    pairs: dict[str, list] = {"all": [], "given": []}
    for row in rows:
        if gib and not row.gib:
            continue
        pair = (planned_gib(row, c), row.gib) if gib else (planned(row, c), row.seconds)
        pairs.setdefault(row.table, []).append(pair)
        pairs["all"].append(pair)
        if row.table != PARTLY_KNOWN and not gib:
            pairs["given"].append(pair)
    return {table: errors(found) for table, found in pairs.items() if found}


def unseen(rows: list[Row]) -> dict[str, dict]:
    """Errors of each table's time under constants that were fitted on all other tables."""
    tables = dict.fromkeys(row.table for row in rows)
    return {
        table: by_table([row for row in rows if row.table == table], c)[table]
        for table in tables
        for c in [fit([row for row in rows if row.table != table], START)]
    }


def one_row(row: Row, c: Constants, scored: bool) -> dict:
    return {
        "table": row.table, "number": row.number, "label": row.label, "scored": scored,
        "planned_seconds": planned(row, c), "measured_seconds": row.seconds,
        "planned_gib": planned_gib(row, c) if row.gib else None, "measured_gib": row.gib or None,
    }  # fmt: skip


def errors_alone(row: dict) -> dict:
    """A row without its figures: the published ones stay where they are."""
    kept = {key: row[key] for key in ("table", "number", "label", "scored")}
    kept["time_error"] = round(row["planned_seconds"] / row["measured_seconds"] - 1, 4)
    if row["measured_gib"]:
        kept["memory_error"] = round(row["planned_gib"] / row["measured_gib"] - 1, 4)
    return kept


def search_seconds() -> dict:
    """How long every layout of 16,384 GPUs takes, for a dense model and for one with experts."""
    dense = replace_dims(text_model(12288, 96, 96, 128000, num_query_groups=8, ffn_hidden_size=32768))
    sparse = dense.model_copy(
        update={"depth": 48, "hidden_size": 6144, "num_heads": 48, "ffn_hidden_size": 8192, "num_experts": 64}
    )
    found = {}
    for name, model in (("dense", dense), ("experts", sparse)):
        begin = time.perf_counter()
        result = search(model, Step(8192, 2048, 8192.0, 2.0, "bf16"), cluster(find_gpu("h100"), 16384))
        found[name] = {"seconds": time.perf_counter() - begin, "allowed": result.allowed, "kept": len(result.ranked)}
    return found


def replace_dims(model):
    """The image encoder of a large model, so that tensor parallelism divides it too."""
    return model.model_copy(
        update={"vision_layers": 32, "vision_hidden_size": 1280, "vision_num_heads": 16, "vision_ffn_hidden_size": 5120,
                "image_size": 448, "patch_size": 14, "patch_merge": 2}
    )  # fmt: skip


if __name__ == "__main__":
    main()
