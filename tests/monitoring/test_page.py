"""The page of a run in a browser."""

import subprocess

from PIL import Image

from armillary.launcher.report import report
from tests.launcher.test_report import run  # noqa: F401 (a fixture)
from tests.monitoring.tools import tool

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]  # fmt: skip


def test_a_browser_shows_it_all(run, tmp_path):  # noqa: F811
    report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").as_uri()
    command = [tool("chromium"), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True)
    for words in ("2,000 of 2,000", "Where the time went", "lost node: &lt;script&gt;"):
        assert words in shown.stdout
    picture = tmp_path / "report.png"
    subprocess.run([*command, f"--screenshot={picture}", "--window-size=1300,1700", page], capture_output=True,
                   timeout=120, check=True)  # fmt: skip
    image = Image.open(picture).convert("RGB")
    assert image.size == (1300, 1700)
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert {(31, 78, 121), (255, 255, 255)} <= colours, "the loss curve's and the page's"
    assert len(colours) > 200
