"""Every way to load the same tensors."""

import multiprocessing
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from armillary.model.coordinates import Placement, split_axis
from armillary.storage import LocalStorage
from armillary.training.checkpoint.load import Reader


def timed(act: Callable[[Path], object], path: Path) -> tuple[float, object]:
    before = time.perf_counter()
    answer = act(path)
    return time.perf_counter() - before, answer


def load_armillary(path: Path, shapes: dict) -> dict:
    names = dict.fromkeys(key.partition("/")[2] for key in shapes)
    places = [_whole(name, shapes[f"weight/{name}"]) for name in names]
    states = Reader(LocalStorage(path)).states(places)
    return {f"{part}/{name}": tensor for name, parts in states.items() for part, tensor in parts.items()}


def _whole(name: str, shape: tuple[int, ...]) -> Placement:
    return Placement(name, shape, 0, split_axis(shape[0], 1, 0, 1), 0, 1, False)


def load_torch(path: Path, shapes: dict) -> dict:
    return torch.load(path, weights_only=True)


def load_safetensors(path: Path, shapes: dict) -> dict:
    return {key: tensor.clone() for key, tensor in load_file(path).items()}  # mapped, or not a byte would be read


def load_dcp(path: Path, shapes: dict) -> dict:
    found = {key: torch.empty(shape) for key, shape in shapes.items()}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return found


LOADERS = {"armillary": load_armillary, "torch": load_torch, "safetensors": load_safetensors, "dcp": load_dcp}


def load_anew(name: str, path: Path, shapes: dict) -> tuple[float, float]:
    """Seconds to load, and the sum of a tensor; in a process of its own, whose memory is new as a resumed run's is, and
    which is gone when this returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.checkpoint.loaders"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_load, args=(theirs, name, path, shapes))
    process.start()
    answer = ours.recv()
    process.join()
    return answer


def _load(to: Connection, name: str, path: Path, shapes: dict) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seconds, found = timed(lambda path: LOADERS[name](path, shapes), path)
    to.send((seconds, found["weight/0"].sum().item()))
