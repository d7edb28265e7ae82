"""Every layout's checkpoint into every other layout of the same model, and out again."""

import json
import shutil
from pathlib import Path

import torch.distributed as dist

from armillary.storage import LocalStorage
from armillary.training.checkpoint.catalog import differences
from armillary.training.checkpoint.load import Reader
from armillary.training.loop import Assignment, Trainer
from armillary.training.process_group import join
from tests.groups import checkpoint_of
from tests.training.sweep import CASES, STEPS, folder_of, job_of


def convert(rank, tables, out: Path) -> None:
    """In a group: load what sweep.train_layouts has written into each layout of this world size, save it again, and
    compare every weight and moment; out/converted-RANKS.json has [old, new, tensors, of which differ] of each pair."""
    found = []
    for new in (case for case in CASES if case.ranks == rank.world_size):
        job = job_of(tables, new.model, **new.layout)
        join(rank, job.parallel)
        trainer = Trainer(Assignment("test", job, "hash", rank, out, None, STEPS))
        for old in (case for case in CASES if case.model == new.model):
            source, target = folder_of(out, old) / "checkpoint", out / "converted" / "checkpoint"
            trainer._load(Reader(LocalStorage(source)))
            checkpoint_of(trainer, target)
            if rank.rank == 0:
                count, different = differences(LocalStorage(source), LocalStorage(target))
                found.append([old.name, new.name, count, len(list(different))])
                shutil.rmtree(target)
            dist.barrier()
        trainer.close()
    if rank.rank == 0:
        (out / f"converted-{rank.world_size}.json").write_text(json.dumps(found))
