"""Whether a job's layout fits the GPUs of this machine, before anything starts."""

from pathlib import Path

import psutil

from armillary.launcher.job import Job
from armillary.planner.hardware import Cluster, cluster, gpu_of_device

DEVICES = ("nvidia[0-9]*", "kfd")  # what a GPU's driver leaves in /dev


def refuse_what_does_not_fit(job: Job, force: bool = False) -> None:
    """JobError where the planner says that the layout needs more memory than a GPU of this machine has.

    Nothing is said where there is no GPU here, or one that the planner does not know; nor if `force`d.
    """
    if force or (machine := this_machine(job.parallel.world_size)) is None:
        return
    from armillary.launcher.plan_commands import rows_of
    from armillary.planner.plan import fits

    rows = rows_of(job)
    fits(job, machine, rows.document, rows.images)


def peak_flops(precision: str) -> float:
    """Dense FLOP/s of the current GPU in "bf16" or "fp32"; 0 where there is none, or one that the planner does not
    know."""
    import torch

    if not torch.cuda.is_available() or (gpu := gpu_of_device(torch.cuda.get_device_name())) is None:
        return 0.0
    return cluster(gpu, 1, 1).peak(precision)


def memory_of_rank(neighbours: int) -> float:
    """Bytes of the current GPU; without one, of this machine, shared out to so many ranks."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties().total_memory)
    return psutil.virtual_memory().total / neighbours


def this_machine(gpus: int, dev: Path = Path("/dev")) -> Cluster | None:
    """`gpus` GPUs like this machine's, with the memory that they have, or None where the planner does not know them."""
    if not any(any(dev.glob(pattern)) for pattern in DEVICES):
        return None  # PyTorch, which takes seconds to import, would say no more
    import torch

    if not torch.cuda.is_available() or (gpu := gpu_of_device(torch.cuda.get_device_name())) is None:
        return None
    nodes_gpus = torch.cuda.device_count()
    whole = cluster(gpu, max(1, -(-gpus // nodes_gpus)) * nodes_gpus, nodes_gpus)
    return whole.of(gpus, memory_bytes=float(torch.cuda.get_device_properties(0).total_memory))
