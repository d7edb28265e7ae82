"""The planner's step beside a measured one, on this machine."""

from rich.console import Console

from armillary.launcher.calibration import compare
from armillary.planner.hardware import FOLDER, cluster, read_gpu


def test_a_job_is_planned_and_run(job_file, capsys):
    console = Console(stderr=True)
    planned, measured = compare(job_file, cluster(read_gpu(FOLDER / "a100-40.toml"), 1), console)
    assert 0 < planned < measured < 60, "a GPU of the file is faster than these processors"
    assert planned == compare(job_file, cluster(read_gpu(FOLDER / "a100-40.toml"), 1), console)[0]
