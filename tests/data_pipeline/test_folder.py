"""Shards at a URL: moto's S3 over real HTTP, through a proxy that misbehaves when it is told to."""

import multiprocessing
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from s3fs import S3FileSystem

from armillary import storage as storages
from armillary.data_pipeline.build import build, ensure_built
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.folder import LocalFolder, checksum, open_folder
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.inspect import samples
from armillary.data_pipeline.loader import AHEAD, Loader
from armillary.data_pipeline.shards import read_manifest
from armillary.data_pipeline.verify import check_files, verify
from armillary.errors import DataError
from tests.conftest import SOURCES
from tests.s3 import s3_server

SHAPE = ImageShape(64, 16)
BYTES = 1_000_000  # of a shard
URL = "s3://bucket/some/shards"


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Shards in a bucket; the proxy before it."""
    local = tmp_path_factory.mktemp("built") / "shards"
    build(DataConfig(path=str(local), sources=SOURCES, shard_bytes=BYTES))
    with s3_server() as proxy:
        bucket = boto3.resource("s3").Bucket("bucket")
        for path in local.iterdir():
            bucket.upload_file(str(path), f"some/shards/{path.name}")
        yield local, proxy


@pytest.fixture
def proxy(storage):
    storage[1].faults, storage[1].got = [], Counter()
    yield storage[1]
    storage[1].faults = []


def config_of(path, tmp_path, **changes):
    keys = {"path": str(path), "sources": SOURCES, "seq_length": 128, "cache": str(tmp_path / "cache")}
    return DataConfig.model_validate(keys | {"shard_bytes": BYTES} | changes)


def first_batches(config, steps=4, with_images=True):
    made = Loader(config, SHAPE).steps(Cursor(), 16, 8, 0, 1, with_images=with_images)
    return [batch for _ in range(steps) for batch in next(made).micro_batches]


def same(some, others):
    for one, other in zip(some, others, strict=True):
        assert np.array_equal(one.tokens_T, other.tokens_T)
        assert np.array_equal(one.patches_IND, other.patches_IND)


def held(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


def test_what_is_trained_on_is_the_same_from_a_url(storage, proxy, tmp_path):
    local, far = config_of(storage[0], tmp_path), config_of(URL, tmp_path)
    same(first_batches(local), first_batches(far))
    before = proxy.got.copy()
    assert max(before[name] for name in before if name.endswith(".arrow")) == 1
    same(first_batches(local), first_batches(far))
    assert {name for name in proxy.got if proxy.got[name] > before[name]} == {"manifest.json"}, "the rest was kept"
    assert ensure_built(far) == ensure_built(local)


def test_looking_and_verifying_work_at_a_url(storage, proxy, tmp_path):
    folder = open_folder(URL, str(tmp_path / "cache"))
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert verify(folder, manifest) == []
    assert samples(folder, manifest, "pydoc", 3) == samples(LocalFolder(storage[0]), manifest, "pydoc", 3)


@pytest.mark.parametrize("faults", [["500"] * 3, ["cut", "cut"], ["slow"], ["other"], ["500", "cut", "other", "slow"]])
def test_what_passes_is_tried_again(storage, proxy, tmp_path, faults):
    manifest = read_manifest(LocalFolder(storage[0]))
    shard = manifest.sources["pydoc"][0]
    proxy.faults = list(faults)
    path = open_folder(URL, str(tmp_path / "cache")).fetch(shard.file, shard.bytes, shard.xxh3)
    assert path.read_bytes() == (storage[0] / shard.file).read_bytes()
    assert proxy.faults == []
    assert {one.name for one in (tmp_path / "cache").iterdir()} == {".lock", path.name}, "nothing half-written is left"


@pytest.mark.parametrize(("fault", "said"), [("other", "it came with checksum"), ("500", "in 5 tries")])
def test_what_does_not_pass_is_said_and_nothing_is_kept(storage, proxy, tmp_path, fault, said):
    shard = read_manifest(LocalFolder(storage[0])).sources["pydoc"][0]
    proxy.faults = [fault] * 200
    with pytest.raises(DataError, match=said) as refused:
        open_folder(URL, str(tmp_path / "cache")).fetch(shard.file, shard.bytes, shard.xxh3)
    assert refused.value.where == f"{URL}/{shard.file}"
    assert [one.name for one in (tmp_path / "cache").iterdir()] == [".lock"]


def test_the_cache_keeps_within_its_bound_and_what_was_used_last(storage, proxy, tmp_path):
    shards = read_manifest(LocalFolder(storage[0])).sources["easy_vqa"]
    assert len(shards) > 4
    limit = 3 * max(shard.bytes for shard in shards)
    folder, cache = open_folder(URL, str(tmp_path / "cache"), limit), tmp_path / "cache"
    for number, shard in enumerate(shards):
        folder.fetch(shards[0].file, shards[0].bytes, shards[0].xxh3)  # in use all the time
        assert folder.fetch(shard.file, shard.bytes, shard.xxh3) in held(cache)
        assert sum(path.stat().st_size for path in held(cache)) <= limit, number
    assert proxy.got[shards[0].file] == 1
    with pytest.raises(DataError, match="does not fit into a cache of 1,000"):
        open_folder(URL, str(tmp_path / "small"), 1000).fetch(shards[0].file, shards[0].bytes, shards[0].xxh3)


def test_many_fetches_at_once_keep_within_the_bound(storage, proxy, tmp_path):
    shards = read_manifest(LocalFolder(storage[0])).sources["easy_vqa"]
    limit, cache = 3 * max(shard.bytes for shard in shards), tmp_path / "cache"
    folder = open_folder(URL, str(cache), limit)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shard: folder.fetch(shard.file, shard.bytes, shard.xxh3), shards * 2))
    assert 0 < sum(path.stat().st_size for path in held(cache)) <= limit
    assert not list(cache.glob("*.part"))


def test_what_a_dead_process_left_and_what_is_not_whole_is_fetched_anew(storage, proxy, tmp_path):
    shard, cache = read_manifest(LocalFolder(storage[0])).sources["easy_vqa"][0], tmp_path / "cache"
    folder = open_folder(URL, str(cache), 2 * shard.bytes)
    (cache / f".0123456789abcdef-other.arrow.{2 * shard.bytes}.part").write_bytes(b"half")
    path = cache / f"{shard.xxh3}-{shard.file}"
    path.write_bytes((storage[0] / shard.file).read_bytes()[:1000])
    assert folder.fetch(shard.file, shard.bytes, shard.xxh3) == path
    assert checksum(path) == shard.xxh3
    assert {one.name for one in cache.iterdir()} == {".lock", path.name}


def test_threads_that_wait_for_one_that_fails_fetch_the_file_themselves(storage, proxy, tmp_path):
    shard = read_manifest(LocalFolder(storage[0])).sources["easy_vqa"][0]
    folder = open_folder(URL, str(tmp_path / "cache"))
    proxy.faults = ["500"] * 5  # the first one's tries

    def fetch(_):
        try:
            return checksum(folder.fetch(shard.file, shard.bytes, shard.xxh3))
        except DataError as error:
            return error.what

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fetch, range(4)))
    assert sum("could not be fetched" in one for one in found) <= 1
    assert found.count(shard.xxh3) >= 3


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_a_run_over_more_than_the_cache_holds_reads_the_same(storage, proxy, tmp_path, packing):
    """A few shards are in use at a time; over an epoch (and some of the next) each is fetched, and no more often than
    an epoch asks for."""
    shards = read_manifest(LocalFolder(storage[0])).sources["easy_vqa"]
    one = {"sources": [SOURCES[0]], "shuffle_shards": 1, "seq_length": 32, "packing": packing}
    limit = sum(shard.bytes for shard in shards) * 2 // 3
    far = config_of(URL, tmp_path, cache_bytes=limit, **one)
    positions = sum(shard.tokens - shard.documents + 15 * shard.images for shard in shards)
    near, steps = config_of(storage[0], tmp_path, **one), positions * 3 // 2 // (16 * 32)
    same(first_batches(near, steps, with_images=False), first_batches(far, steps, with_images=False))
    for thread in threading.enumerate():
        if thread.name == AHEAD:
            thread.join()
    gets = [proxy.got[shard.file] for shard in shards]
    assert min(gets) >= 1
    assert sum(gets) <= 2.5 * len(gets)
    assert sum(path.stat().st_size for path in held(tmp_path / "cache")) <= limit
    with pytest.raises(DataError, match="in use at a time"):
        Loader(far.model_copy(update={"shuffle_shards": 0}), SHAPE)


def test_a_storage_that_is_down_is_said_soon_and_fetching_ends_with_the_loader(storage, proxy, tmp_path):
    far = config_of(URL, tmp_path, shuffle_shards=1, seq_length=64)
    loader = Loader(far, SHAPE)
    proxy.faults = ["500"] * 10_000
    with pytest.raises(DataError, match="could not be fetched"):
        next(loader.steps(Cursor(), 16, 8, 0, 1))
    assert 10_000 - len(proxy.faults) < 100
    loader.close()
    before = len(proxy.faults)
    loader._fetch(1, index_only=False)
    assert len(proxy.faults) == before


def _fetch_all(cache: str, names: list) -> None:
    folder = open_folder(URL, cache)
    for name, size, xxh3 in names:
        assert checksum(folder.fetch(name, size, xxh3)) == xxh3


def test_processes_of_a_machine_fetch_each_file_once(storage, proxy, tmp_path):
    shards = read_manifest(LocalFolder(storage[0])).sources["easy_vqa"]
    names = [(shard.file, shard.bytes, shard.xxh3) for shard in shards[:3]]
    proxy.faults = ["slow"]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fetch_all, args=(str(tmp_path / "cache"), names)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [proxy.got[name] for name, _, _ in names] == [1, 1, 1]


def test_bad_urls_are_refused(storage, proxy, tmp_path):
    cache = str(tmp_path / "cache")
    with pytest.raises(DataError, match="no such storage"):
        open_folder("nowhere://bucket/shards", cache)
    with pytest.raises(DataError, match="there are no shards here"):
        read_manifest(open_folder("s3://bucket/elsewhere", cache))
    with pytest.raises(DataError, match="built on this machine"):
        build(config_of(URL, tmp_path))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="the cache cannot be written"):
        open_folder(URL, str(blocked))
    with pytest.raises(DataError, match="has a password in it") as refused:
        open_folder("sftp://somebody:hush@host/shards", cache)
    assert "hush" not in str(refused.value)
    with pytest.raises(DataError, match="no such storage can be read"):
        open_folder("ftp://127.0.0.1:1/shards", cache)
    far = open_folder(URL, cache)
    shard = read_manifest(far).sources["pydoc"][0]
    with pytest.raises(DataError, match="a shard's file is missing"):
        far.fetch("not-there.arrow", shard.bytes, shard.xxh3)
    with pytest.raises(DataError, match="bytes where the manifest says 7"):
        far.check_size(shard.file, 7)


def test_missing_credentials_are_said_at_once(storage, proxy, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(storages, "FIRST_WAIT", 60)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="no credentials") as refused:
        read_manifest(open_folder(URL, str(tmp_path / "cache")))
    S3FileSystem.clear_instance_cache()
    assert "AWS_PROFILE" in refused.value.fix
    assert not proxy.got


def test_credentials_that_cannot_be_had_just_now_are_asked_for_again(storage, proxy, tmp_path):
    far, tries = open_folder(URL, str(tmp_path / "cache")), []

    def sometimes():
        tries.append(1)
        if len(tries) < 3:
            raise OSError("Error when retrieving credentials from iam-role: Read timeout")
        return "had"

    assert far._tried("", sometimes) == "had"


def test_any_storage_that_fsspec_knows_will_do(storage, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in storage[0].iterdir():
        memory.pipe_file(f"/shards/{path.name}", path.read_bytes())
    local, far = config_of(storage[0], tmp_path), config_of("memory://shards", tmp_path)
    same(first_batches(local), first_batches(far))
    assert os.listdir(tmp_path / "cache")
