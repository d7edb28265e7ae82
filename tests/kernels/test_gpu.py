import itertools
import json
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu.run import differ


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("there is no GPU here\n  to do: ")
    assert not done.stdout


def test_the_training_step_that_is_timed_learns():
    sizes = ["--depth", "1", "--positions", "64", "--images", "1", "--steps", "2"]
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu.training", *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(later < sooner for sooner, later in itertools.pairwise(found["losses"]))
    assert found["positions/s"] == pytest.approx(64 / found["seconds"])


def test_kernels_that_train_otherwise_than_references_are_found():
    rows = [{"losses": [10.0, 9.9, 9.8]}, {"losses": [10.01, 9.91, 9.8]}]
    assert not differ(rows)
    assert differ([rows[0], {"losses": [10.0, 9.9, 9.4]}])
    assert differ([rows[0], {"losses": [float("nan")] * 3}])
    assert not differ([rows[0], {"failed": "ModuleNotFoundError: No module named 'megatron'"}])
