import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_the_demo_runs_from_shards_to_answers(tmp_path):
    """All of it with few steps: what it says must be true of the run that it leaves."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", "--json", "training.steps=8"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads(done.stdout)
    run = Path(summary["run"])
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    layouts = [(e["layout"]["tensor"], e["layout"]["pipeline"]) for e in events if e["event"] == "launch"]
    assert layouts == [(2, 1), (1, 2)]
    steps = [e for e in events if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, 9))
    assert summary["first_loss"] == steps[0]["loss"] > summary["last_loss"] == steps[-1]["loss"]
    assert summary["questions"] == 9_673
    assert 0 <= summary["accuracy"] <= 1
    assert abs(summary["blind_accuracy"] - 0.670) < 5e-4
    assert len(summary["answers"]) == 5
    assert Path(summary["plot"]).name == "loss.png"
    assert Path(summary["plot"]).stat().st_size > 10_000
    assert len(json.loads(Path(summary["metrics"]).read_text())) == 1 + 2, "the driver's and each rank's"
