"""Fixtures and the helpers that many tests share."""

import functools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what these tests prove, they prove on the processor
ROOT = Path(__file__).parents[1]
ARMILLARY = str(Path(sys.executable).with_name("armillary"))

# For Popen's preexec_fn: what a shell started in the background ignores Ctrl-C, and so do its children.
HEEDING = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)

MODEL = {"depth": 2, "hidden_size": 32, "num_heads": 4, "vision_num_heads": 2, "init_std": 0.08}
SOURCES = [{"kind": "easy_vqa", "weight": 3.0}, {"kind": "pydoc", "weight": 1.0}]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Shards of both sources, built once."""
    from armillary.data_pipeline.build import build
    from armillary.data_pipeline.config import DataConfig

    path = tmp_path_factory.mktemp("data") / "shards"
    build(DataConfig(path=str(path), sources=SOURCES))
    return path


@pytest.fixture(scope="session")
def tables(shards):
    """Tables of a tiny job on those shards, for launcher.job.resolve."""
    return {
        "name": "tiny",
        "model": MODEL,
        "data": {"path": str(shards), "sources": SOURCES, "seq_length": 128},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "training": {"steps": 6, "global_batch": 4, "evaluate": False},
        "checkpoint": {"every": 100},
    }


@pytest.fixture
def job_file(tables, tmp_path) -> Path:
    """The same job as a file."""
    import tomli_w

    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


@pytest.fixture
def armillary(tmp_path):
    """Run the command line in a folder of its own; the finished process with its output."""

    def run(*words, timeout: float = 240) -> subprocess.CompletedProcess:
        return subprocess.run(
            [ARMILLARY, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


def refused(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    """Assert one clear message that holds every one of `words`, the exit code, and no traceback."""
    assert done.returncode == code, done.stderr
    message = done.stderr[done.stderr.index("error: ") :]
    for word in (*words, "where: ", "to do: "):
        assert word in message, message
    assert "Traceback" not in done.stderr + done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
