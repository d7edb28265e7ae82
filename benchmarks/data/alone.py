"""Figures of ours that no peer has: `python -m benchmarks.data.alone FOLDER`, one JSON line.

resume: milliseconds from nothing but a cursor in the middle of an epoch to the first batch, in a process that runs
already, and whether the rows are those of the run that was not interrupted. memory: MB of this process that no file
backs, after a twentieth of an epoch and after a whole one. build: documents to shards in one process, as a share of
the tokenizer's own rate on the same texts.
"""

import json
import re
import shutil
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as BPE

from armillary.data_pipeline.build import build
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.tokenizer import Tokenizer
from benchmarks.data import ours, peers

ROUNDS = 11
TEXT_BYTES = 30_000_000


def resume(folder: Path, packing: str) -> dict:
    loader = ours.loader(folder / "armillary", packing, "text")
    epoch = loader.plan.mixture.orders[0].size
    block = loader.plan.mixture.block_of(0, epoch // 2)
    middle = Cursor(block=block, row=len(loader.plan.block(block).packed.row_ends) // 2)
    expected = loader.batch(loader.plan.rows(middle, peers.BATCH)[0])
    seconds, same = [], True
    for _ in range(ROUNDS):
        started = time.perf_counter()
        fresh = ours.loader(folder / "armillary", packing, "text")
        batch = fresh.batch(fresh.plan.rows(middle, peers.BATCH)[0])
        seconds.append(time.perf_counter() - started)
        same &= np.array_equal(batch.tokens_T, expected.tokens_T) and np.array_equal(batch.labels_T, expected.labels_T)
    return {"milliseconds": 1000 * statistics.median(seconds), "same": same}


def memory(folder: Path, packing: str) -> dict:
    loader, cursor = ours.loader(folder / "armillary", packing, "text"), Cursor()
    positions = sum(corpus.tokens for corpus in loader.corpora)
    done, early = 0, 0.0
    while done < positions:
        rows, cursor = loader.plan.rows(cursor, peers.BATCH)
        done += len(loader.batch(rows).tokens_T)
        early = early or (own_memory() if done > positions / 20 else 0.0)
    return {"twentieth": early, "epoch": own_memory()}


def own_memory() -> float:
    """MB of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1000


def texts(folder: Path) -> Path:
    """Python's own library as JSON lines."""
    path = folder / "texts" / "library.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True)
        left = TEXT_BYTES
        with open(path, "w") as file:
            for source in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
                text = source.read_bytes().decode(errors="ignore")
                if not text.strip():
                    continue
                left -= len(text)
                file.write(json.dumps({"text": text}) + "\n")
                if left < 0:
                    break
    return path


def building(folder: Path) -> dict:
    path = texts(folder)
    documents = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    trained = folder / "tokenizer.json"
    if not trained.exists():
        trained.write_text(Tokenizer.train(iter(documents[::4]), 32_000).to_json())
    tokenizer, rates = BPE.from_file(str(trained)), {"tokenizer": [], "build": []}
    config = DataConfig.model_validate({
        "path": str(folder / "built"), "sources": [{"kind": "jsonl", "path": str(path)}],
        "tokenizer": str(trained), "vocab_size": 32_000,
    })  # fmt: skip
    for _ in range(3):
        started = time.perf_counter()
        tokens = sum(len(text.ids) for text in tokenizer.encode_batch_fast(documents, add_special_tokens=False))
        rates["tokenizer"].append(tokens / (time.perf_counter() - started))
        shutil.rmtree(folder / "built", ignore_errors=True)
        started = time.perf_counter()
        manifest = build(config)
        rates["build"].append(manifest.reports["jsonl"].tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return medians | {"share": medians["build"] / medians["tokenizer"]}


def main() -> None:
    folder = Path(sys.argv[1])
    ours.Armillary().prepare_text(folder)
    found = {
        packing: {"resume": resume(folder, packing), "memory": memory(folder, packing)}
        for packing in ("windows", "greedy")
    }
    print(json.dumps(found | {"build": building(folder)}))


if __name__ == "__main__":
    main()
