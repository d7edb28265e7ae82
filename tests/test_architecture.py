"""The house keeps its shape: who may import whom, and files that one can read in a sitting."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_imports_follow_the_design(tmp_path):
    """On the built tree, where the folders on top are sub-packages of `armillary` by path too."""
    built = tmp_path / "build"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", built], cwd=ROOT, check=True, capture_output=True
    )
    shutil.copy(ROOT / "pyproject.toml", built)
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=built,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(built), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kept, 0 broken" in done.stdout


def test_every_folder_is_mapped_and_nothing_else_is_installed():
    packages = {path.parent for path in tracked("*/__init__.py") if "tests" not in path.parts}
    import armillary

    for package in packages:
        name = package.relative_to(ROOT).as_posix().replace("/", ".")
        if name != "armillary":
            __import__(f"armillary.{name}")
    assert armillary.__version__


def test_what_is_refused_is_refused_without_waiting_for_heavy_imports():
    """Seconds of importing PyTorch or Ray stand between nobody and the message about a misspelt key."""
    heavy = {"torch", "megatron", "deepspeed", "ray", "matplotlib"}
    program = f"import sys, armillary.launcher.train; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_short():
    long = {str(p.relative_to(ROOT)): n for p in tracked("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long
