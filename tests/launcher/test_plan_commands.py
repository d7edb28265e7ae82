"""`armillary plan` on the command line, in this process; and what `armillary train` asks the planner."""

import json
import sys

import pytest
import tomli_w

from armillary.errors import JobError
from armillary.launcher import fitting
from armillary.launcher.cli import main
from armillary.launcher.job import load_job
from armillary.launcher.plan_commands import rows_of
from armillary.planner.hardware import FOLDER, cluster, find_gpu
from armillary.planner.plan import plan_job
from tests.planner.jobs import MODEL

TABLES = {
    "model": MODEL.model_dump(),
    "data": {"seq_length": 4096, "path": "nowhere", "sources": [{"kind": "pydoc"}]},
    "training": {"global_batch": 64, "precision": "bf16", "steps": 10},
}


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "big.toml"
    path.write_text(tomli_w.dumps(TABLES))
    return path


@pytest.fixture
def plan(monkeypatch, capsys):
    """Run `armillary plan`: (exit code, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["armillary", "plan", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def test_every_layout_is_ranked_where_the_job_gives_none(plan, job):
    code, out, err = plan(job, "--gpus", 16, "--top", 3, "--json", "--tokens", "1e12")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["allowed"] > answer["fitting"] > len(answer["plans"]) == 3
    seconds = [one["seconds"]["total"] for one in answer["plans"]]
    assert seconds == sorted(seconds)
    assert all(one["fits"] and one["gpus"] == one["layout"]["world_size"] == 16 for one in answer["plans"])
    budget = answer["plans"][0]["budget"]
    assert budget["days"] == pytest.approx(1e12 / (64 * 4096) * seconds[0] / 86400)


def test_the_jobs_own_layout_is_planned_and_explained(plan, job):
    code, out, _ = plan(
        job, "parallel.tensor=8", "parallel.sequence_parallel=true", "--gpus", 16, "--explain", "--json"
    )
    assert code == 0
    answer = json.loads(out)
    assert len(answer["plans"]) == 1
    assert "allowed" not in answer
    layout = answer["plans"][0]["layout"]
    assert (layout["tensor"], layout["data"]) == (8, 2)
    bound = answer["explanation"]["bindings"]
    assert max(bound, key=bound.get) in ("products of matrices", "links inside a node")
    own = load_job(job, ["parallel.tensor=8", "parallel.sequence_parallel=true", "parallel.data=2"])
    expected = plan_job(own, cluster(find_gpu("h100"), 16))
    assert answer["plans"][0]["seconds"]["total"] == expected.time.total
    for change in answer["explanation"]["changes"]:
        assert change["seconds"] < expected.time.total


def test_a_plan_reads_well(plan, job):
    code, out, _ = plan(job, "--gpus", 16, "--gpu", "h200", "--node-gpus", 8, "--interconnect", "roce-400", "--explain")
    assert code == 0
    assert "0 images a row, documents of 4,096 positions (assumed" in out
    for word in ("16 x h200, 8 a node", "MFU", "GiB on the fullest GPU", "memory of a GPU by part", "activations",
                 "time of a step by part", "what binds", "kWh", "dollars"):  # fmt: skip
        assert word in out, word


def test_goodput_is_a_table_and_a_picture(plan, job, tmp_path):
    picture = tmp_path / "goodput.png"
    words = (job, "parallel.tensor=8", "--gpus", 16, "--plot", picture, "--json")
    code, out, _ = plan(*words)
    assert code == 0
    sizes = json.loads(out)["goodput"]
    assert sizes[0]["gpus"] == 1000
    assert sizes[-1]["gpus"] == 100_000
    assert sizes[0]["total"] > sizes[-1]["total"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(plan(*words)[1])["goodput"] == sizes
    code, _, err = plan(job, "parallel.tensor=8", "--gpus", 16, "--plot", tmp_path / "none" / "x.png")
    assert code == 2
    assert "cannot be written" in err


BROKEN = '[memory_gib]\nvalue = "much"\n'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", 16, "--gpu", "h10"], ["no GPU 'h10'", "did you mean h100?"]),
        (["--gpus", -1], ["--gpus -1"]),
        (["--gpus", 0], ["--gpus 0"]),
        (["--gpus", 10**12], ["--gpus 1000000000000"]),
        (["--gpus", 12], ["12 GPUs do not fill nodes of 8", "--gpus 8 would"]),
        (["--gpus", 16, "--node-gpus", 0], ["--node-gpus 0"]),
        (["--gpus", 16, "--interconnect", "carrier-pigeon"], ["no link 'carrier-pigeon'"]),
        (["--gpus", 16, "--tokens", -5], ["--tokens -5"]),
        (["--gpus", 16, "--document", 1e12], ["--document 1e+12", "more than a row has", "4,096"]),
        (["--gpus", 16, "--images", 1e9], ["--images 1e+09", "more than a row holds"]),
        (["--gpus", 16, "training.global_batch=1000000000000000000"], ["training.global_batch", "16777216"]),
        (["--gpus", 16, "--top", 0], ["--top 0"]),
        (["--gpus", 16, "--mtbf-hours", 0], ["--mtbf-hours 0"]),
        ([], ["how many GPUs", "--gpus 64"]),
        (["--gpus", 16, "model.num_heads=31"], ["hidden_size=4096 is not divisible by num_heads=31"]),
        (["--gpus", 24, "parallel.tensor=3"], ["tensor=3 does not divide"]),
        (["--gpus", 16, "parallel.data=4"], ["of 4 ranks, not of 16", "--all"]),
        (
            ["--gpus", 1, "--gpu", "a100-40"],
            ["fits in no layout", "the smallest of", "more than the 38.0 GiB that a plan may take"],
        ),
        (["--gpus", 4096, "training.global_batch=7"], ["no layout of so many GPUs", "training.global_batch = 7"]),
        (["--gpus", 16, "--gpu", "none.toml"], ["no such hardware file"]),
        (["--gpus", 16, "--gpu", "{broken}"], ["not of the right form", "memory_gib.value", "--calibrate"]),
        (["--gpus", 16, "model.hidden_sice=1"], ["model.hidden_sice", "did you mean model.hidden_size?"]),
    ],
    ids=lambda value: " ".join(map(str, value)) or "nothing",
)
def test_bad_input_is_one_message(plan, job, tmp_path, words, said):
    broken = tmp_path / "broken.toml"
    broken.write_text((FOLDER / "h100.toml").read_text().split("[memory_gib]")[0] + BROKEN)
    code, out, err = plan(job, *(str(word).replace("{broken}", str(broken)) for word in words))
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    for word in (*said, "where: ", "to do: "):
        assert word in err, err
    assert "Traceback" not in err


def test_a_job_that_is_not_there_is_refused(plan, tmp_path):
    assert "no such job file" in plan(tmp_path / "none.toml", "--gpus", 8)[2]
    assert "no job to plan" in plan()[2]


def test_planning_waits_for_no_heavy_import(plan, job):
    import subprocess

    program = (
        "import sys; from armillary.launcher.cli import main; sys.argv = ['armillary', 'plan', sys.argv[1], '--gpus', "
        "'8', '--json']\ntry: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'megatron', 'deepspeed', 'ray', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(job)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_images_and_documents_are_those_of_the_shards(job_file):
    job = load_job(job_file)
    images, document, assumed = rows_of(job)
    assert not assumed
    length, positions = job.data.seq_length, job.image_shape.positions
    assert 1 < images < length / positions
    assert positions < document < length
    nowhere = load_job(job_file, ['data.path="nowhere"'])
    assert rows_of(nowhere) == (0.0, length, True)


def test_train_asks_the_planner_where_it_knows_the_gpu(job, monkeypatch, tmp_path):
    given = load_job(job, ["parallel.data=8"])
    assert fitting.this_machine(8, dev=tmp_path) is None, "there is no GPU in that folder"
    fitting.refuse_what_does_not_fit(given)  # nor on this machine: nothing is said
    monkeypatch.setattr(fitting, "this_machine", lambda gpus: cluster(find_gpu("a100-40"), gpus))
    with pytest.raises(JobError, match=r"GiB on a GPU with 40\.0 GiB"):
        fitting.refuse_what_does_not_fit(given)
    fitting.refuse_what_does_not_fit(given, force=True)
    monkeypatch.setattr(fitting, "this_machine", lambda gpus: cluster(find_gpu("b200"), gpus))
    fitting.refuse_what_does_not_fit(given)
