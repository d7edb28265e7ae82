"""A checkpoint that is listed can be loaded, on any layout; anything else is refused."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from armillary.errors import CheckpointError
from armillary.launcher.job import resolve
from armillary.model.coordinates import split_axis
from armillary.storage import LocalStorage
from armillary.training.checkpoint.commit import commit
from armillary.training.checkpoint.load import Reader
from armillary.training.checkpoint.manifest import MANIFEST, read_manifest, to_bytes
from armillary.training.layout import Layout
from armillary.training.loop import Assignment, Trainer
from armillary.training.process_group import Rank, join
from tests.conftest import free_port
from tests.groups import checkpoint_of, in_group

# Each launch does two steps on a layout of two ranks, the last on one.
RELAY = [
    {"tensor": 2, "sequence_parallel": True, "engine": "deepspeed"},
    {"pipeline": 2, "virtual": 2},
    {"data": 2, "zero": 3},
    {"data": 2, "expert": 2},
    {"data": 2, "zero": 2, "offload": True},
    {"context": 2, "recompute": "selective"},
    {"pipeline": 2, "engine": "deepspeed", "first_stage_layers": 1, "last_stage_layers": 3},
    {"data": 2, "zero": 3, "offload": True, "recompute": "full"},
]
# A token goes to every expert: among fewer, rounding may choose others, and the curve jump.
MODEL = {"depth": 4, "num_experts": 4, "experts_per_token": 4, "tied_embeddings": True}
PART = 2
TOTAL = PART * (len(RELAY) + 1)


def job_of(tables, **parallel):
    training = {"steps": TOTAL, "global_batch": 4}
    tables = tables | {"model": tables["model"] | MODEL, "parallel": parallel, "training": training}
    return resolve(tables, "test").train_job()


def reader(folder: Path) -> Reader:
    return Reader(LocalStorage(folder))


def train_part(rank, job, folder, resume, steps):
    """Train `steps` steps from `resume` and save; the records."""
    join(rank, job.parallel)
    trainer = Trainer(Assignment("relay", job, "hash", rank, folder, resume, TOTAL))
    records = [trainer.train_step()[0] for _ in range(steps)]
    checkpoint_of(trainer, folder / f"at-{trainer.step}")
    trainer.close()
    return records


def relay(rank, tables, folder):
    records, resume = [], None
    for number, parallel in enumerate(RELAY):
        records += train_part(rank, job_of(tables, **parallel), folder, resume, PART)
        resume = folder / f"at-{PART * (number + 1)}"
    if rank.rank == 0:
        (folder / "records.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def runs(tables, tmp_path_factory):
    """The relay's records, those of an uninterrupted process, and the folders of both."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("relay")
    whole = folder / "whole"
    in_group(2, free_port(), relay, tables, folder)
    records = json.loads((folder / "records.json").read_text())
    job = job_of(tables)
    records += train_part(Rank(), job, folder, folder / f"at-{PART * len(RELAY)}", PART)
    return records, train_part(Rank(), job, whole, None, TOTAL), folder, whole / f"at-{TOTAL}"


def test_the_curve_goes_on_over_every_layout(runs):
    records, uninterrupted, _, _ = runs
    assert [r["step"] for r in records] == list(range(1, TOTAL + 1))
    for got, want in zip(records, uninterrupted, strict=True):
        assert got["cursor"] == want["cursor"], "the next samples must be exactly the next"
        assert got["tokens"] == want["tokens"]
        assert got["learning_rate"] == want["learning_rate"]
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
    assert len({r["loss"] for r in records}) == TOTAL


def test_weights_and_moments_end_alike(runs):
    _, _, folder, whole = runs
    relayed, uninterrupted = reader(folder / f"at-{TOTAL}"), reader(whole)
    assert set(relayed.keys) == set(uninterrupted.keys)
    assert {key.partition("/")[0] for key in relayed.keys} == {"weight", "exp_avg", "exp_avg_sq"}
    for key in relayed.keys:
        want = uninterrupted.whole(key)
        # Adam divides by small numbers, which makes rounding larger from step to step: to 2.1e-5 here. A step number
        # that is one too high at the last resume makes 1.4e-3, a second moment that is lost there 0.8.
        assert (relayed.whole(key) - want).norm() <= 5e-5 * want.norm(), key
    assert relayed.manifest.state.cursor == uninterrupted.manifest.state.cursor


def copied(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


def read_all(folder: Path) -> None:
    held = reader(folder)
    for key in held.keys:
        held.whole(key)


def test_any_flipped_byte_of_a_tensor_is_found(runs, tmp_path):
    folder = copied(runs[3], tmp_path / "copy")
    read_all(folder)
    manifest = reader(folder).manifest
    for number, chunk in enumerate(manifest.chunks[:: len(manifest.chunks) // 12]):
        path = folder / chunk.file
        good = path.read_bytes()
        place = chunk.offset + (number * 7919) % chunk.bytes
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match="corrupted"):
            read_all(folder)
        path.write_bytes(good)


@pytest.mark.parametrize("wrong", [{"file": "../elsewhere.bin"}, {"bytes": 8}, {"offset": -64}, {"shape": (1,)}])
def test_a_manifest_that_is_sealed_but_wrong_is_refused(runs, tmp_path, wrong):
    """Whoever made it: no path leads out of its folder, and no chunk is of another size than it says."""
    folder = copied(runs[3], tmp_path / "copy")
    manifest = reader(folder).manifest
    first, *others = manifest.chunks
    (folder / MANIFEST).write_bytes(
        to_bytes(manifest.model_copy(update={"chunks": (first.model_copy(update=wrong), *others)}))
    )
    with pytest.raises(CheckpointError, match="outside its folder" if "file" in wrong else "contradicts itself"):
        read_manifest(LocalStorage(folder))


@pytest.mark.parametrize("damage", ["no manifest", "torn manifest", "no file", "short file", "outside"])
def test_a_damaged_checkpoint_is_refused(runs, tmp_path, damage):
    folder = copied(runs[3], tmp_path / "copy")
    manifest, data = folder / MANIFEST, folder / "g000-r00000-000.bin"
    match damage:
        case "no manifest":
            manifest.unlink()
        case "torn manifest":
            manifest.write_text(manifest.read_text()[:-20])
        case "no file":
            data.unlink()
        case "short file":
            data.write_bytes(data.read_bytes()[:-100])
        case "outside":
            manifest.write_text(manifest.read_text().replace("g000-r00000-000.bin", "../g000-r00000-000.bin"))
    with pytest.raises(CheckpointError):
        read_all(folder)


def test_a_missing_rank_is_not_committed(runs, tmp_path):
    state = reader(runs[3]).manifest.state
    (tmp_path / "g000-r00000.json").write_text("[]")
    with pytest.raises(CheckpointError, match="rank 1 did not write"):
        commit(LocalStorage(tmp_path), state, 0, ranks=2)
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("fault", ["hole", "overlap", "no moment"])
def test_what_does_not_tile_every_tensor_is_not_committed(runs, tmp_path, fault):
    manifest = reader(runs[3]).manifest
    copied(runs[3], tmp_path / "copy")
    (tmp_path / "copy" / MANIFEST).unlink()
    chunks = [chunk.model_dump(mode="json") for chunk in manifest.chunks]
    gate, up = [chunk for chunk in chunks if chunk["key"] == "weight/vision.encoder.layers.0.mlp.linear_fc1.weight"]
    match fault:
        case "hole":
            up["shape"] = [up["shape"][0] - 1, *up["shape"][1:]]
        case "overlap":
            up["start"] = gate["start"]
        case "no moment":
            chunks = [chunk for chunk in chunks if chunk["key"] != "exp_avg/embedding.weight"]
    (tmp_path / "copy" / "g000-r00000.json").write_text(json.dumps(chunks))
    with pytest.raises(CheckpointError, match="there is only" if fault == "no moment" else "do not tile"):
        commit(LocalStorage(tmp_path / "copy"), manifest.state, 0, ranks=1)
    assert not (tmp_path / "copy" / MANIFEST).exists()


def test_any_changed_byte_of_the_manifest_is_found(runs, tmp_path):
    folder = copied(runs[3], tmp_path / "copy")
    path = folder / MANIFEST
    good = path.read_bytes()
    for place in [*range(0, len(good), 997), *range(len(good) - 40, len(good))]:
        for bit in (1, 32):  # another digit, or another case of a letter
            path.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            with pytest.raises(CheckpointError):
                read_manifest(LocalStorage(folder))


def test_another_model_is_refused(runs, tables, tmp_path):
    wider = resolve(tables | {"model": tables["model"] | {"hidden_size": 64}}, "test").train_job()
    join(Rank(), Layout())
    said = r"another model:\n    embedding.weight: \[\d+, 32\] in the checkpoint, \[\d+, 64\] in the model"
    with pytest.raises(CheckpointError, match=said) as raised:
        Trainer(Assignment("other", wider, "hash", Rank(), tmp_path, runs[3], 1))
    assert "more" in str(raised.value)


@pytest.mark.parametrize(("size", "stride"), [(48, 1), (48, 2), (96, 3)])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_pieces_tile_an_axis(size, stride, parts):
    held = [split_axis(size, parts, rank, stride) for rank in range(parts)]
    covered = sorted((p.start, p.start + p.size) for pieces in held for p in pieces)
    assert covered[0][0] == 0
    assert covered[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(covered))
    for pieces in held:
        assert [p.at for p in pieces] == [sum(q.size for q in pieces[:i]) for i in range(len(pieces))]
        assert sum(p.size for p in pieces) == math.ceil(size / parts)


def test_bf16_keeps_fp32_masters_through_a_checkpoint(tables, tmp_path):
    bf16 = job_of(tables).model_copy(
        update={"training": job_of(tables).training.model_copy(update={"precision": "bf16"})}
    )
    whole = train_part(Rank(), bf16, tmp_path / "whole", None, 4)
    parts = train_part(Rank(), bf16, tmp_path, None, 2)
    parts += train_part(Rank(), bf16, tmp_path, tmp_path / "at-2", 2)
    exact = train_part(Rank(), job_of(tables), tmp_path / "fp32", None, 4)
    assert [r["loss"] for r in parts] == [r["loss"] for r in whole]
    assert [r["loss"] for r in whole] != [r["loss"] for r in exact]
    assert whole[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.02)
    weight = reader(tmp_path / "at-4").whole("weight/embedding.weight")
    assert not torch.equal(weight, weight.bfloat16().float()), "the master weights are finer than bf16"
