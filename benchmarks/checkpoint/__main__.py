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
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from armillary.data_pipeline.cursor import Cursor
from armillary.files import sync
from armillary.model.coordinates import Block
from armillary.storage import LocalStorage
from armillary.training.checkpoint.commit import commit
from armillary.training.checkpoint.manifest import MOMENTS, State
from armillary.training.checkpoint.saver import Saver
from benchmarks.checkpoint.loaders import LOADERS, load_anew, timed
from tests.conftest import free_port

MEGABYTES, TENSORS, TURNS = 500, 40, 9
COMPUTE = 4  # products of 1,024 x 1,024 matrices in a step's passes: some 0.1 s
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
        self._begin(path)
        self._saver.wait()
        assert self._saver.failure() is None
        return 0.0

    def blocked_armillary(self, path: Path) -> float:
        blocked, _ = timed(self._begin, path)
        compute()
        blocked += timed(lambda _: self._saver.wait_copied(), path)[0]
        self._saver.wait()
        return blocked

    def _begin(self, path: Path) -> None:
        state = State(
            step=1, cursor=Cursor(), data_order=1, tokens=0, loss=1.0, run="", job_hash="", job={}, saved_at=0
        )
        self._saver.save(path.name, self._states(), True, state)

    def _states(self):
        for key, tensor in self.tensors.items():
            part, _, name = key.partition("/")
            yield part, Block(name, self.shape, (0, 0), tensor)

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

    def blocked_dcp(self, path: Path) -> float:
        before = time.perf_counter()
        done = dcp.async_save(self.tensors, checkpoint_id=path)
        blocked = time.perf_counter() - before
        compute()
        done.result()
        return blocked


def compute() -> None:
    """What a step does before its update: as long as it takes, weights do not change."""
    a = torch.ones(1024, 1024)
    for _ in range(COMPUTE):
        a @ a


def measure(folder: Path) -> dict:
    """Seconds of each side, each turn; the sides take turns, and what a turn wrote is removed outside of the times."""
    sides = Sides(folder)
    shapes = {key: tuple(tensor.shape) for key, tensor in sides.tensors.items()}
    total = sides.tensors["weight/0"].sum().item()
    acts = [(kind, name.removeprefix(f"{kind}_")) for name in dir(sides) for kind in ("save", "blocked")
            if name.startswith(f"{kind}_")]  # fmt: skip
    found = {"bytes": sides.bytes, "save": {}, "blocked": {}, "load": {}}
    for turn in range(-1, TURNS):
        for kind, name in sorted(acts, reverse=bool(turn % 2)):
            path = folder / f"{name}-{turn}"
            os.sync()
            seconds, blocked = timed(getattr(sides, f"{kind}_{name}"), path)
            if turn >= 0:
                found[kind].setdefault(name, []).append(seconds if kind == "save" else blocked)
            if kind == "save" and name in LOADERS:
                seconds, read = load_anew(name, path, shapes)
                assert read == total, name
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

All are synced to the disk. Ours has a checksum for each chunk, and is committed by a manifest that is read back.

| | seconds | beside write and fsync |
|---|---|---|
"""
NAMES = {
    "plain": "write and fsync of the same bytes", "armillary": "**armillary**", "torch": "torch.save",
    "safetensors": "safetensors", "dcp": "DCP",
}  # fmt: skip
STILL = """
## Training meanwhile

Training stands still until its tensors may change again: for DCP until async_save returns, for ours until the copy into
host memory is done, which is made beside the passes of the next step (here {step:.2f} s): {ours:.4f} s, for DCP
{dcp:.4f} s; {share:.1%} of a save, {ratio:.2f} of DCP's. Where DeepSpeed has the optimizer's state, its tensors are
gathered and copied at once instead. The copy takes as much host memory as the tensors: {peak:,.0f} MB more at the peak.
"""
LOADING = """
## Loading

In a new process, whose memory is new. Ours verifies every checksum, and reads four tensors at once, as a rank that
resumes does; safetensors and torch.save have no checksums.

| | seconds | GB/s | beside DCP |
|---|---|---|---|
"""


def report(folder: Path, found: dict) -> None:
    """checkpoint.md, checkpoint.json and checkpoint.png."""
    keys = ("save", "blocked", "load")
    save, blocked, load = ({name: statistics.median(times) for name, times in found[key].items()} for key in keys)
    text = HEAD.format(megabytes=MEGABYTES, turns=TURNS)
    for name, said in NAMES.items():
        text += f"| {said} | {save[name]:.3f} | {save[name] / save['plain']:.2f} |\n"
    ours, dcp = blocked["armillary"], blocked["dcp"]
    share, ratio, peak = ours / save["armillary"], ours / dcp, found["peak"] / 1e6
    text += STILL.format(step=found["step"], ours=ours, dcp=dcp, share=share, ratio=ratio, peak=peak)
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
        report(args.folder, measure(Path(folder)) | {"peak": peak, "step": timed(lambda _: compute(), Path())[0]})


if __name__ == "__main__":
    main()
