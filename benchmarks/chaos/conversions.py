"""Every layout's checkpoint into every other layout."""

import json
import tempfile
from collections import Counter
from pathlib import Path

from armillary.data_pipeline.build import build
from armillary.data_pipeline.config import DataConfig
from tests.chaos.conversions import convert
from tests.conftest import MODEL, SOURCES, free_port
from tests.groups import in_group
from tests.training.sweep import CASES, LAYOUTS, train_layouts

HEAD = """## Any layout to any layout

{layouts} layouts of up to four ranks (tensor with and without sequence parallelism, pipeline, virtual and uneven
stages, context, expert and data parallelism, ZeRO-1 to -3 with and without offload, both engines, fp32 and bf16) train
five steps and save; each checkpoint is loaded into every layout of the same model and saved again. Every fp32 weight
and both moments are compared.

| model | layouts | conversions | tensors compared | not equal, bit for bit |
|---|---|---|---|---|
"""


def chaos() -> str:
    """The section of the report."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        data = DataConfig(path=str(root / "data"), sources=SOURCES, seq_length=128)
        build(data)
        tables = {"model": MODEL, "data": data.model_dump(mode="json"), "checkpoint": {"every": 100}}
        for ranks in LAYOUTS:
            in_group(ranks, free_port(), train_layouts, tables, root)
        for ranks in LAYOUTS:
            in_group(ranks, free_port(), convert, tables, root)
        found = [pair for ranks in LAYOUTS for pair in json.loads((root / f"converted-{ranks}.json").read_text())]
    pairs, tensors, wrong = Counter(), Counter(), Counter()
    for old, new, count, different in found:
        model = new.partition(":")[0]
        pairs[model] += 1
        tensors[model] += count
        wrong[model] += different
        if different:
            print(f"WRONG: {old} -> {new}: {different} of {count}", flush=True)
    cases = Counter(case.model for case in CASES)
    rows = [f"| {m} | {cases[m]} | {pairs[m]:,} | {tensors[m]:,} | {wrong[m]} |\n" for m in cases]
    total = f"| all | {len(CASES)} | {pairs.total():,} | {tensors.total():,} | {wrong.total()} |\n"
    return HEAD.format(layouts=len(CASES)) + "".join(rows) + total
