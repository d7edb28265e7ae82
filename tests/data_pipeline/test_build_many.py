"""Builds of many parts: filters, copies, a tokenizer from elsewhere, and builds that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from armillary.data_pipeline import encode
from armillary.data_pipeline.build import build
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.corpus import Corpus
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.folder import LocalFolder
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.inspect import samples
from armillary.data_pipeline.loader import Loader
from armillary.data_pipeline.shards import FORMAT, MANIFEST, read_manifest, write_manifest
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.data_pipeline.verify import verify
from armillary.errors import DataError
from tests.data_pipeline.test_sources import lines, png

WORDS = ["the", "cat", "sat", "on", "mat", "and", "looked", "at", "all", "of", "its", "friends", "who", "were"]


def text(number):
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, 30)) + f" {number}"


@pytest.fixture
def config(tmp_path):
    """Three parts of ten texts each; the last part repeats a text of the first."""
    (tmp_path / "texts").mkdir()
    for part in range(3):
        records = [{"text": text(10 * part + n)} for n in range(10)]
        lines(tmp_path / "texts" / f"{part}.jsonl", *records, *([{"text": text(3)}] if part == 2 else []))
    source = {"kind": "jsonl", "path": str(tmp_path / "texts")}
    return DataConfig(path=str(tmp_path / "shards"), sources=[source], shard_bytes=2000)


def changed(config, **changes):
    source = config.sources[0].model_copy(
        update={k: v for k, v in changes.items() if k in type(config.sources[0]).model_fields}
    )
    rest = {k: v for k, v in changes.items() if k not in type(source).model_fields}
    return config.model_copy(update={"sources": (source,), **rest})


def texts(config):
    manifest = read_manifest(LocalFolder(Path(config.path)))
    return {
        d["text"] for name in manifest.sources for d in samples(LocalFolder(Path(config.path)), manifest, name, 1000)
    }


def test_every_document_of_every_part_is_there_in_any_order_of_work(config, tmp_path):
    report = build(config).reports["jsonl"]
    assert report.documents == 31
    assert texts(config) == {text(n) for n in range(30)}
    backwards = config.model_copy(update={"path": str(tmp_path / "other")})
    other = build(backwards, each=lambda function, items: map(function, list(items)[::-1]))
    assert other == read_manifest(LocalFolder(Path(config.path)))


def test_copies_are_dropped_across_parts(config):
    report = build(changed(config, dedup="exact")).reports["jsonl"]
    assert (report.documents, report.dropped) == (30, {"copies": 1})
    lines(Path(config.sources[0].path) / "3.jsonl", {"text": text(5).upper()}, {"text": text(40)})
    report = build(changed(config, dedup="near"), force=True).reports["jsonl"]
    assert (report.documents, report.dropped) == (31, {"copies": 2})


def test_bad_records_stop_or_are_counted(config):
    bad = Path(config.sources[0].path) / "1.jsonl"
    with open(bad, "a") as file:
        file.write('{"text": 5}\nno json\n{"text": "x"}\n')
    with pytest.raises(DataError, match="no text where one is needed"):
        build(config)
    assert sorted(p.name for p in Path(config.path).parent.iterdir()) == ["texts"]
    report = build(changed(config, bad="skip", min_chars=5)).reports["jsonl"]
    assert report.documents == 31
    assert report.dropped == {"could not be used": 2, "too short": 1}
    assert all("1.jsonl, byte " in example for example in report.examples)
    assert len(report.examples) == 2


def test_a_document_larger_than_a_shard_is_refused_or_counted(config):
    lines(Path(config.sources[0].path) / "9.jsonl", {"text": "cat " * 3000})
    with pytest.raises(DataError, match="larger than a shard") as error:
        build(config)
    assert error.value.where == "9.jsonl, byte 0"
    assert build(changed(config, bad="skip")).reports["jsonl"].dropped == {"larger than a shard": 1}


def test_quality_is_asked_of_texts_alone(config, tmp_path):
    """Neither a caption nor a question is prose, whatever the rules for prose say of them."""
    (tmp_path / "texts" / "1.png").write_bytes(png())
    lines(tmp_path / "texts" / "9.jsonl", {"text": "a cat", "image": "1.png"}, {"question": "why?", "answer": "so"})
    report = build(changed(config, quality=True)).reports["jsonl"]
    assert report.documents == 2
    assert report.dropped == {"number of words": 31}


def test_a_source_of_which_nothing_is_left_is_refused(config):
    with pytest.raises(DataError, match="holds no documents"):
        build(changed(config, min_chars=10_000))
    assert sorted(p.name for p in Path(config.path).parent.iterdir()) == ["texts"]


def test_compressed_shards_hold_the_same(config, tmp_path):
    config = config.model_copy(update={"shard_bytes": 1 << 20})
    build(config)
    packed = config.model_copy(update={"compression": "zstd", "path": str(tmp_path / "packed")})
    manifest = build(packed)
    assert texts(packed) == texts(config)
    assert manifest.reports["jsonl"].bytes < read_manifest(LocalFolder(Path(config.path))).reports["jsonl"].bytes
    assert verify(LocalFolder(Path(packed.path)), manifest) == []


def test_a_tokenizer_from_a_file(config, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(Tokenizer.train([text(n) for n in range(30)], 400).to_json())
    size = Tokenizer.from_file(path).size
    with pytest.raises(DataError, match=f"set data.vocab_size={size}"):
        build(changed(config, tokenizer=str(path), vocab_size=260))
    manifest = build(changed(config, tokenizer=str(path)))
    assert manifest.tokenizer == Tokenizer.from_file(path).to_json()
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        build(changed(config, tokenizer=str(path)), force=True)


def test_shards_of_another_tokenizer_or_of_a_newer_format_are_refused(config):
    manifest, folder = build(config), Path(config.path)
    write_manifest(folder, manifest.model_copy(update={"tokenizer": manifest.tokenizer + " "}).sealed())
    with pytest.raises(DataError, match="not the one that the shards were built with"):
        read_manifest(LocalFolder(folder))
    newer = json.loads(manifest.model_dump_json()) | {"format": FORMAT + 1, "what": "is new"}
    (folder / MANIFEST).write_text(json.dumps(newer))
    with pytest.raises(DataError, match=f"of format {FORMAT + 1}, this version reads {FORMAT}"):
        read_manifest(LocalFolder(folder))


def test_one_build_at_a_time(config):
    def each(function, items):
        with pytest.raises(DataError, match="being built already"):
            build(config)
        return map(function, items)

    build(config, each=each)


def test_no_space_left_is_said_and_what_is_done_is_kept(config, monkeypatch):
    write, done = encode.write_shards, []

    def full(*args):
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        done.append(args)
        return write(*args)

    monkeypatch.setattr(encode, "write_shards", full)
    with pytest.raises(DataError, match="No space left on device"):
        build(config)
    assert not Path(config.path).exists()
    monkeypatch.setattr(encode, "write_shards", lambda *args: done.append(args) or write(*args))
    build(config)
    assert [args[1] for args in done] == ["jsonl-00000", "jsonl-00001", "jsonl-00002"]
    assert texts(config) == {text(n) for n in range(30)}


SLOW = """
import sys, time
from armillary.data_pipeline import encode
from armillary.data_pipeline.build import build
from armillary.data_pipeline.config import DataConfig
def slowly(documents, write=encode.Tokenizer.encode_documents):
    def one(self, batch):
        time.sleep(0.3)
        return write(self, batch)
    return one
encode.Tokenizer.encode_documents = slowly(None)
build(DataConfig.model_validate_json(sys.argv[1]), lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_build_leaves_no_shards_and_goes_on(config, after):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, config.model_dump_json()], stdout=subprocess.PIPE, text=True
    )
    for _ in range(after):
        while "written" not in process.stdout.readline():
            assert process.poll() is None
    if not after:
        time.sleep(1.0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not Path(config.path).exists()
    said = []
    build(config, said.append)
    assert said[-3:] == [f"jsonl: {n} of 3 parts written" for n in (1, 2, 3)]
    assert ("training a tokenizer of 512 entries" in said) <= (after == 0)
    assert texts(config) == {text(n) for n in range(30)}
    assert sorted(p.name for p in Path(config.path).parent.iterdir()) == ["shards", "texts"]
    assert not [p for p in Path(config.path).iterdir() if p.suffix not in (".arrow", ".json")]


def test_what_a_killed_build_did_is_not_taken_for_other_keys_or_files(config):
    work = Path(config.path).with_name(".shards.building")

    def stop(function, items):
        yield function(next(iter(items)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(config, each=stop)
    assert (work / "jsonl-00000.report.part").exists()
    assert not (work / MANIFEST).exists()
    lines(Path(config.sources[0].path) / "0.jsonl", {"text": "all is new here"})
    build(config)
    assert "all is new here" in texts(config)
    assert text(0) not in texts(config)


def test_images_and_texts_of_several_sources(tmp_path, config):
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(number))
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    pictures = {"kind": "images", "name": "pictures", "path": str(tmp_path / "pictures")}
    both = DataConfig.model_validate(config.model_dump() | {"sources": [*config.model_dump()["sources"], pictures]})
    manifest = build(both)
    assert manifest.reports["pictures"].images == 5
    corpus = Corpus(LocalFolder(Path(both.path)), manifest, "pictures", Tokenizer.from_json(manifest.tokenizer))
    assert (corpus.documents, corpus.images) == (5, 5)


@pytest.mark.parametrize("record", [{"question": text(90), "answer": "yes"}, {"text": text(91), "weight": 2}])
def test_windows_are_not_cut_from_documents_with_roles_or_weights(config, record):
    lines(Path(config.sources[0].path) / "9.jsonl", record)
    build(config)
    loader = Loader(config.model_copy(update={"packing": "windows", "seq_length": 16}), ImageShape(8, 4))
    with pytest.raises(DataError, match="has roles or weights"):
        loader.batch(loader.plan.rows(Cursor(), 200)[0])
