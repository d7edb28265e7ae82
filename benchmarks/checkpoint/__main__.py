"""Saving and loading 500 MB beside plain files, torch.save, safetensors and PyTorch DCP: `make bench-checkpoint`.

Writes docs/results/checkpoint.md, checkpoint.json and checkpoint.png; --folder for another place.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from armillary.data_pipeline.cursor import Cursor
from armillary.files import sync
from armillary.model.coordinates import Placement, split_axis
from armillary.storage import LocalStorage
from armillary.training.checkpoint.commit import commit
from armillary.training.checkpoint.load import Reader
from armillary.training.checkpoint.manifest import MOMENTS, State
from armillary.training.checkpoint.saver import Saver
from tests.conftest import free_port

MEGABYTES, TENSORS, TURNS = 500, 40, 7
PARTS = ("weight", *MOMENTS)


class Sides:
    """Every way to save and load the same tensors. A saver returns the seconds that training would stand still."""

    def __init__(self, folder: Path):
        rows = MEGABYTES * 1_000_000 // (4 * len(PARTS) * TENSORS * 1024)
        self.folder, self.shape = folder, (rows, 1024)
        self.tensors = {f"{part}/{n}": torch.randn(self.shape) for n in range(TENSORS) for part in PARTS}
        self.bytes = sum(tensor.numel() * 4 for tensor in self.tensors.values())
        self._store = LocalStorage(folder)
        self._saver = Saver(self._store, 0, 0, 1, False, self._commit)

    def _commit(self, name: str, state: State) -> None:
        commit(self._store.folder(name), state, 0, 1)

    def save_plain(self, path: Path) -> float:
        """write and fsync of the same bytes, in one file."""
        before = time.perf_counter()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        for tensor in self.tensors.values():
            os.write(descriptor, memoryview(tensor.numpy()).cast("B"))
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - before

    def save_armillary(self, path: Path) -> float:
        before = time.perf_counter()
        state = State(
            step=1, cursor=Cursor(), data_order=1, tokens=0, loss=1.0, run="", job_hash="", job={}, saved_at=0
        )
        self._saver.save(path.name, self._states(), state)
        blocked = time.perf_counter() - before
        self._saver.wait()
        assert self._saver.failure() is None
        return blocked

    def _states(self):
        for n in range(TENSORS):
            place = Placement(str(n), self.shape, 0, split_axis(self.shape[0], 1, 0, 1), 0, 1)
            yield place, {part: self.tensors[f"{part}/{n}"] for part in PARTS}

    def save_torch(self, path: Path) -> float:
        before = time.perf_counter()
        torch.save(self.tensors, path)
        sync(path)
        return time.perf_counter() - before

    def save_safetensors(self, path: Path) -> float:
        before = time.perf_counter()
        save_file(self.tensors, path)
        sync(path)
        return time.perf_counter() - before

    def save_dcp(self, path: Path) -> float:
        before = time.perf_counter()
        dcp.save(self.tensors, checkpoint_id=path)
        return time.perf_counter() - before

    def save_dcp_async(self, path: Path) -> float:
        before = time.perf_counter()
        done = dcp.async_save(self.tensors, checkpoint_id=path)
        blocked = time.perf_counter() - before
        done.result()
        return blocked

    def load_armillary(self, path: Path) -> dict:
        reader = Reader(LocalStorage(path))
        return {key: reader.whole(key) for key in reader.keys}

    def load_torch(self, path: Path) -> dict:
        return torch.load(path, weights_only=True)

    def load_safetensors(self, path: Path) -> dict:
        return {key: tensor.clone() for key, tensor in load_file(path).items()}  # mapped, or not a byte would be read

    def load_dcp(self, path: Path) -> dict:
        found = {key: torch.empty_like(tensor) for key, tensor in self.tensors.items()}
        dcp.load(found, checkpoint_id=path)
        return found


def timed(act: Callable[[Path], object], path: Path) -> tuple[float, object]:
    before = time.perf_counter()
    answer = act(path)
    return time.perf_counter() - before, answer


def measure(folder: Path) -> dict:
    """Seconds of each side, each turn; the sides take turns, and what a turn wrote is removed outside of the times."""
    sides = Sides(folder)
    savers = {name.removeprefix("save_"): getattr(sides, name) for name in dir(sides) if name.startswith("save_")}
    loaders = {name.removeprefix("load_"): getattr(sides, name) for name in dir(sides) if name.startswith("load_")}
    found = {"bytes": sides.bytes, "save": {}, "blocked": {}, "load": {}}
    for turn in range(-1, TURNS):
        for name in sorted(savers, reverse=bool(turn % 2)):
            path = folder / f"{name}-{turn}"
            os.sync()
            seconds, blocked = timed(savers[name], path)
            if turn >= 0:
                found["save"].setdefault(name, []).append(seconds)
                found["blocked"].setdefault(name, []).append(blocked)
            if name in loaders:
                seconds, loaded = timed(loaders[name], path)
                assert torch.equal(loaded["weight/0"], sides.tensors["weight/0"])
                del loaded
                if turn >= 0:
                    found["load"].setdefault(name, []).append(seconds)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"turn {turn + 1} of {TURNS}", flush=True)
    return found


HEAD = """# Checkpoints

Made by `make bench-checkpoint` on two processor cores: {megabytes} MB of tensors on a local disk, one rank, one thread.
The sides take turns, medians of {turns} turns; "beside" is a ratio of seconds, in one run. Everything behind the
medians is in [checkpoint.json](checkpoint.json).

## Saving

All are synced to the disk. Ours has a checksum for each chunk, and is committed by a manifest that is read back;
training stands still while its tensors are copied into host memory, and goes on while they are written.

| | seconds | beside write and fsync | seconds that training stands still |
|---|---|---|---|
"""
NAMES = {
    "plain": "write and fsync of the same bytes", "armillary": "**armillary**", "torch": "torch.save",
    "safetensors": "safetensors", "dcp": "DCP", "dcp_async": "DCP, async_save",
}  # fmt: skip
STILL = """
Training stands still for {share:.0%} of the save, {ratio:.2f} of the time that it does in DCP's async_save. The copy
takes as much host memory as the tensors: {peak:,.0f} MB more at the peak.
"""
LOADING = """
## Loading

Into new memory. Ours verifies every checksum; safetensors and torch.save have none.

| | seconds | GB/s | beside DCP |
|---|---|---|---|
"""


def report(folder: Path, found: dict) -> None:
    """checkpoint.md, checkpoint.json and checkpoint.png."""
    keys = ("save", "blocked", "load")
    save, blocked, load = ({name: statistics.median(times) for name, times in found[key].items()} for key in keys)
    text = HEAD.format(megabytes=MEGABYTES, turns=TURNS)
    for name, said in NAMES.items():
        text += f"| {said} | {save[name]:.3f} | {save[name] / save['plain']:.2f} | {blocked[name]:.3f} |\n"
    ours = blocked["armillary"]
    text += STILL.format(share=ours / save["armillary"], ratio=ours / blocked["dcp_async"], peak=found["peak"] / 1e6)
    text += LOADING
    for name in (name for name in NAMES if name in load):
        rate = found["bytes"] / load[name] / 1e9
        text += f"| {NAMES[name]} | {load[name]:.3f} | {rate:.1f} | {load[name] / load['dcp']:.2f} |\n"
    text += "\n![seconds to save and load](checkpoint.png)\n"
    (folder / "checkpoint.md").write_text(text)
    (folder / "checkpoint.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(folder / "checkpoint.png", found)
    print(text)


def plot(path: Path, found: dict) -> None:
    """Every turn's seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    for axes, key, title in zip(
        panels, ("save", "blocked", "load"), ("save", "training stands still", "load"), strict=True
    ):
        names = [name for name in NAMES if name in found[key]]
        for row, name in enumerate(names):
            axes.plot(found[key][name], [row] * TURNS, "o", markersize=4, alpha=0.5)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{title}, seconds")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def peak_bytes(folder: Path) -> int:
    """What a save adds to the memory of the process, which has nothing but the tensors."""
    sides = Sides(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sides.save_armillary(folder / "peak")
    shutil.rmtree(folder / "peak")
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=Path(__file__).parents[2] / "docs" / "results")
    args = options.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", free_port(), 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)  # DCP's async_save wants one
    with tempfile.TemporaryDirectory() as folder:
        peak = peak_bytes(Path(folder))
        report(args.folder, measure(Path(folder)) | {"peak": peak})


if __name__ == "__main__":
    main()
