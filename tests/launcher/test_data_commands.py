"""`armillary data ...` as a user types it."""

import json
import signal
import subprocess
import sys

import pytest
from PIL import Image

from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.folder import LocalFolder
from armillary.launcher.job import load_job
from armillary.launcher.run import Run
from armillary.launcher.where import Where
from tests.conftest import ARMILLARY, HEEDING, refused
from tests.data_pipeline.test_sources import lines, png


@pytest.fixture
def job(tmp_path):
    """A job of two sources: texts in four files, and three captioned pictures, one of them broken."""
    for folder in ("texts", "pictures"):
        (tmp_path / folder).mkdir()
    for part in range(4):
        lines(tmp_path / "texts" / f"{part}.jsonl", *({"text": f"this is text {part} {n}"} for n in range(50)))
    for number in range(3):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(number) if number else b"no picture")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    path = tmp_path / "job.toml"
    path.write_text("""
[model]
image_size = 16
patch_size = 8

[data]
path = "shards"
seq_length = 32
sources = [
  { kind = "jsonl", name = "texts", path = "texts" },
  { kind = "images", name = "pictures", path = "pictures", bad = "skip" },
]
""")
    return path


def test_build_inspect_and_verify(job, armillary, tmp_path):
    done = armillary("data", "build", job, "--json")
    assert done.returncode == 0, done.stderr
    sources = json.loads(done.stdout)["sources"]
    assert (sources["texts"]["documents"], sources["pictures"]["documents"]) == (200, 2)
    assert sources["pictures"]["dropped"] == {"could not be used": 1}
    assert "texts: 4 of 4 parts written" in done.stderr
    told = armillary("data", "inspect", "shards", "--sheet", "sheet.png", "--count", "2")
    assert told.returncode == 0, told.stderr
    assert "the sheet is in sheet.png" in told.stderr
    assert "200 documents" in told.stdout
    assert "1 shard\n" in told.stdout
    assert "[image] picture" in told.stdout
    assert "dropped 1: could not be used" in told.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height > 100
    figures = json.loads(armillary("data", "inspect", "shards", "--source", "texts", "--json").stdout)
    assert list(figures["sources"]) == ["texts"]
    assert figures["sources"]["texts"]["tokens_per_document"]["50%"] > 3
    refused(armillary("data", "inspect", "shards", "--source", "none"), "no source none", "texts")
    refused(armillary("data", "find", "shards", "x" * 50), "no index of substrings", "data.substrings=true")
    again = armillary("data", "build", job, "--force", "--json", "data.substrings=true", "data.path=indexed")
    assert again.returncode == 0, again.stderr
    assert armillary("data", "find", "indexed", "x" * 50).stdout == "no document\n"
    refused(armillary("data", "find", "indexed", "short"), "50 are needed")
    index = next((tmp_path / "indexed").glob("*.substrings.arrow"))
    index.write_bytes(index.read_bytes()[:-8])
    refused(armillary("data", "verify", "indexed"), "1 damaged file in 5 shards", index.name)
    refused(armillary("data", "build", job, "data.substrings=true", "data.path=indexed"), index.name)
    measured = armillary("data", "bench", job, "--seconds", "0.3", "--json")
    speed = json.loads(measured.stdout)
    assert speed["positions_per_second"] > 0
    assert 0.8 < speed["utilisation"] <= 1
    assert "rows are filled to" in armillary("data", "bench", job, "--seconds", "0.3").stdout
    assert "5 shards read and compared: nothing is damaged" in armillary("data", "verify", "shards").stdout
    shard = next((tmp_path / "shards").glob("texts-00002-*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (other,) = (tmp_path / "shards").glob("pictures-*[0-9].arrow")
    other.write_bytes(other.read_bytes()[:-1])
    told = armillary("data", "verify", "shards")
    refused(told, "2 damaged files in 5 shards", f"{shard.name}: batch 0 of a shard is corrupted", f"{other.name}: ")
    refused(armillary("data", "build", job, "data.vocab_size=300"), "another data.vocab_size", "--force")
    assert json.loads(armillary("data", "verify", "shards", "--json").stdout)["damaged"][0]["where"].endswith(
        shard.name
    )
    refused(armillary("data", "verify", "nowhere"), "no shards here")


def test_a_build_over_processes_stops_at_the_first_bad_record(job, armillary, tmp_path):
    with open(tmp_path / "texts" / "2.jsonl", "a") as file:
        file.write("no json\n")
    refused(armillary("data", "build", job, "--workers", "2"), "cannot be used", "2.jsonl, byte ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job.toml", "pictures", "texts"]


SPREAD = """
import pathlib, sys, time
from armillary.errors import DataError
from armillary.launcher.spread import spread

def work(item):
    if item == "bad":
        raise DataError("this one is bad")
    time.sleep(3)
    pathlib.Path(item).touch()

with spread("", 2) as each:
    try:
        list(each(work, [sys.argv[1], "bad"]))
    except DataError as error:
        print(error)
    time.sleep(4)
"""


def test_an_error_ends_what_else_is_running(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SPREAD, tmp_path / "slow"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "this one is bad\n"
    assert not list(tmp_path.iterdir())


def test_ctrl_c_says_how_to_go_on(job, tmp_path):
    with open(tmp_path / "texts" / "9.jsonl", "w") as file:
        file.writelines(json.dumps({"text": f"{number:x} and {number * number:x}"}) + "\n" for number in range(500_000))
    command = [ARMILLARY, "data", "build", job, "--workers", "1"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=HEEDING
    )
    assert "training a tokenizer" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.endswith("interrupted; the same command goes on where it stopped\n")
    assert "Traceback" not in told
    assert not (tmp_path / "shards").exists()


def test_copies_are_found_over_processes(job, armillary, tmp_path):
    """Two rounds of work, scanning and encoding, in one command."""
    text = (tmp_path / "texts" / "2.jsonl").read_text()
    (tmp_path / "texts" / "9.jsonl").write_text(text)
    built = armillary("data", "build", job, "--workers", "2", "data.dedup=near", "--json")
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["sources"]["texts"]["dropped"]["copies"] >= len(text.splitlines())


def test_where_tells_steps_from_documents_and_back(job, armillary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert armillary("data", "build", job, "--workers", "1").returncode == 0
    loaded = load_job(job).with_absolute_paths()
    from armillary.data_pipeline.shards import read_manifest

    run = Run.create(tmp_path / "run", loaded, read_manifest(LocalFolder(tmp_path / "shards")))
    run.event("launch", from_step=0)
    where, cursor = Where(run), Cursor()
    for step in range(1, 41):
        _, cursor = where.loader.plan.rows(cursor, 2)
        run.event("step", step=step, cursor=cursor.model_dump())
    where = Where(run)
    seen = {step: where.step(step) for step in (1, 2, 17, 40)}
    for step, documents in seen.items():
        assert len({one["row"] for one in documents}) == 2
        for one in documents:
            assert step in where.document(one["source"], one["number"])
    number = seen[17][0]["number"]
    steps = list(where.document("texts", number))
    assert steps == sorted(steps)
    for step in range(1, 41):
        named = any(one["source"] == "texts" and one["number"] == number for one in where.step(step))
        assert named == (step in steps)
    told = armillary("data", "where", "run", "--step", "17", "--json")
    assert json.loads(told.stdout)["documents"] == seen[17]
    told = armillary("data", "where", "run", "--document", f"texts:{number}")
    assert told.stdout.split() == [str(step) for step in steps]
    told = armillary("data", "where", "run", "--step", "17").stdout.splitlines()
    assert told[0].startswith("row  document  ")
    assert len(told) == 1 + len(seen[17])
    refused(armillary("data", "where", "run"), "either a step or a document")
    refused(armillary("data", "where", "run", "--step", "41"), "has not done step 41")
    refused(armillary("data", "where", "run", "--document", "texts:200"), "no document 200")
    refused(armillary("data", "where", "run", "--document", "books:1"), "no source books")
    refused(armillary("data", "where", "run", "--document", "books"), "SOURCE:NUMBER")
    (tmp_path / "shards").rename(tmp_path / "moved")
    refused(armillary("data", "where", "run", "--step", "17"), "the run's shards are not here", "data.path=")
    told = armillary("data", "where", "run", "data.path=moved", "--step", "17", "--json")
    assert json.loads(told.stdout)["documents"] == seen[17]
    with open(tmp_path / "texts" / "2.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    assert armillary("data", "build", job, "--workers", "1").returncode == 0
    refused(armillary("data", "where", "run", "--step", "17"), "not the shards that the run was trained on")
