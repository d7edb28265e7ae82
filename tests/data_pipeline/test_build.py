import json
import shutil

import numpy as np
import pytest
from PIL import Image

from armillary.data_pipeline.build import build, ensure_built
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.folder import LocalFolder
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.loader import Loader
from armillary.data_pipeline.shards import read_manifest
from armillary.data_pipeline.verify import check_files, verify
from armillary.errors import DataError

SHAPE = ImageShape(64, 16)


def own_source(folder, images=4):
    """A source folder as easy_vqa lays it out."""
    for split in ("train", "test"):
        (folder / split / "images").mkdir(parents=True)
        rows = []
        for i in range(images):
            Image.new("RGB", (64, 64), (40 * i, 0, 255 - 40 * i)).save(folder / split / "images" / f"{i}.png")
            rows.append([f"what is number {i}?", "blue", i])
        (folder / split / "questions.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def config(tmp_path):
    source = {"kind": "easy_vqa", "path": str(own_source(tmp_path / "source"))}
    return DataConfig(path=str(tmp_path / "shards"), sources=[source], shard_bytes=600)


def test_manifest_counts_what_is_there(config):
    manifest = build(config)
    assert manifest == read_manifest(folder_of(config))
    assert [shard.documents for shard in manifest.sources["easy_vqa"]] == [1, 1, 1, 1]
    assert [shard.images for shard in manifest.sources["easy_vqa"]] == [1, 1, 1, 1]
    assert sorted(p.name for p in config_path(config).iterdir()) == [
        *(f"easy_vqa-00000-0000{number}{ending}" for number in range(4) for ending in (".arrow", ".index.arrow")),
        "manifest.json",
    ]


def test_builds_are_the_same_twice(config, tmp_path):
    again = config.model_copy(update={"path": str(tmp_path / "again")})
    assert build(config) == build(again)


def test_an_unreadable_image_leaves_nothing_behind(config, tmp_path):
    image = tmp_path / "source" / "train" / "images" / "2.png"
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be decoded") as error:
        build(config)
    assert error.value.where == f"source easy_vqa: train/questions.json[2]: {image}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_folders_that_a_failed_build_made_are_gone(config, tmp_path):
    (tmp_path / "source" / "train" / "images" / "2.png").unlink()
    (tmp_path / "held").mkdir()
    for path in ("new/deep/shards", "held/deep/shards"):
        with pytest.raises(DataError, match="cannot be read"):
            build(config.model_copy(update={"path": str(tmp_path / path)}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held", "source"]
    assert not list((tmp_path / "held").iterdir())


def test_a_missing_image_is_named(config, tmp_path):
    (tmp_path / "source" / "train" / "images" / "3.png").unlink()
    with pytest.raises(DataError, match="cannot be read") as error:
        build(config)
    assert error.value.where.endswith("3.png")


def test_a_failed_rebuild_keeps_the_shards(config, tmp_path):
    before = build(config)
    (tmp_path / "source" / "train" / "images" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        build(config, force=True)
    assert read_manifest(folder_of(config)) == before
    Loader(config, SHAPE)


def test_shards_are_not_replaced_unasked(config):
    build(config)
    with pytest.raises(DataError, match="already"):
        build(config)
    build(config, force=True)


def test_a_folder_of_something_else_is_not_touched(config):
    config_path(config).mkdir()
    (config_path(config) / "thesis.txt").write_text("do not delete")
    with pytest.raises(DataError, match="something else"):
        build(config, force=True)
    assert (config_path(config) / "thesis.txt").exists()


def test_shards_of_another_vocabulary_are_noticed(config):
    build(config)
    with pytest.raises(DataError, match=r"data\.vocab_size"):
        ensure_built(config.model_copy(update={"vocab_size": 300}))


def test_every_changed_byte_of_a_shard_is_found_and_none_is_trained_on(config):
    """`verify` finds every one of a thousand; training stops at it, or reads exactly what was written."""
    config = config.model_copy(update={"seq_length": 64})
    manifest = build(config)
    folder, rng = config_path(config), np.random.default_rng(0)
    rows, _ = Loader(config, SHAPE).plan.rows(Cursor(), 20)
    good = Loader(config, SHAPE).batch(rows)
    assert verify(LocalFolder(folder), manifest) == []
    files = [name for shard in manifest.sources["easy_vqa"] for name in (shard.file, shard.index_file)]
    stopped = []
    for number in range(1000):
        file = folder / files[number % len(files)]
        content = file.read_bytes()
        place = int(rng.integers(len(content)))
        changed = bytes([content[place] ^ (1 << int(rng.integers(8)))])
        cut = number % 10 == 0
        file.write_bytes(content[:place] if cut else content[:place] + changed + content[place + 1 :])
        assert [error.where for error in verify(LocalFolder(folder), manifest)] == [str(file)]
        try:
            loader = Loader(config, SHAPE)
            batch = loader.batch(loader.plan.rows(Cursor(), 20)[0])
            assert np.array_equal(batch.tokens_T, good.tokens_T)
            assert np.array_equal(batch.patches_IND, good.patches_IND)
        except DataError as error:
            stopped.append(error.where == str(file))
        file.write_bytes(content)
    assert all(stopped)
    assert len(stopped) > 500


def test_any_changed_byte_of_the_manifest_is_found_or_harmless(config):
    before, path = build(config), config_path(config) / "manifest.json"
    good = path.read_bytes()
    for place in range(0, len(good), 61):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            assert read_manifest(folder_of(config)) == before
        except DataError:
            continue


@pytest.mark.parametrize("damage", ["missing", "short", "no manifest", "torn manifest", "path in manifest"])
def test_damaged_shards_are_refused(config, damage):
    build(config)
    folder = config_path(config)
    manifest = folder / "manifest.json"
    match damage:
        case "missing":
            (folder / "easy_vqa-00000-00000.arrow").unlink()
        case "short":
            file = folder / "easy_vqa-00000-00000.arrow"
            file.write_bytes(file.read_bytes()[:-8])
        case "no manifest":
            manifest.unlink()
        case "torn manifest":
            manifest.write_text(manifest.read_text()[:100])
        case "path in manifest":
            shutil.copy(folder / "easy_vqa-00000-00000.arrow", folder.parent / "outside.arrow")
            manifest.write_text(manifest.read_text().replace("easy_vqa-00000-00000.arrow", "../outside.arrow"))
    with pytest.raises(DataError):
        check_files(LocalFolder(folder), read_manifest(LocalFolder(folder)))


def folder_of(config):
    return LocalFolder(config_path(config))


def config_path(config):
    from pathlib import Path

    return Path(config.path)
