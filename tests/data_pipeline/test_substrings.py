from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.data_pipeline.build import build
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.folder import LocalFolder
from armillary.data_pipeline.substrings import EVERY, RUN, STRETCH, SubstringIndex, normalise
from armillary.errors import DataError, JobError
from tests.data_pipeline.test_sources import lines

WORDS = [f"{a}{b}" for a in ("re", "un", "con", "pro") for b in ("tain", "form", "duct", "2", "ject", "Spect")]


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, n)) + "." for n in range(5, 45)]


@pytest.fixture(scope="module")
def config(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("substrings")
    (folder / "source").mkdir()
    for part in range(2):
        lines(folder / "source" / f"{part}.jsonl", *({"text": text} for text in texts[20 * part : 20 * part + 20]))
    source = {"kind": "jsonl", "path": str(folder / "source")}
    return DataConfig(path=str(folder / "shards"), sources=[source], shard_bytes=2000, substrings=True)


@pytest.fixture(scope="module")
def index(config):
    return SubstringIndex(LocalFolder(Path(config.path)), build(config))


def test_any_fifty_characters_hold_one_hashed_run_whole():
    for start in range(EVERY):
        runs = [run for run in range(0, 200, EVERY) if start <= run and run + RUN <= start + STRETCH]
        assert len(runs) == 1


@given(data=st.data())
def test_every_stretch_of_every_document_is_found_where_it_is(index, texts, data):
    number = data.draw(st.integers(0, len(texts) - 1).filter(lambda n: len(normalise(texts[n])) >= STRETCH))
    text = normalise(texts[number])
    start = data.draw(st.integers(0, len(text) - STRETCH))
    stretch = text[start : start + data.draw(st.integers(STRETCH, 80))]
    holders = [("jsonl", n) for n, other in enumerate(texts) if stretch in normalise(other)]
    assert ("jsonl", number) in holders
    assert index.find("-".join(stretch)) == holders, "spaces and symbols make no difference"


def test_what_is_not_there_is_not_found(index, texts):
    text = normalise(texts[30])
    assert index.find(text[:49] + "Q" + text[50:]) == []
    assert index.find(text[:25] + normalise(texts[31])[:40]) == []
    with pytest.raises(JobError, match="it has 49 letters and digits, 50 are needed"):
        index.find(text[:49])


def test_a_damaged_or_missing_index_is_refused(config, index):
    folder = Path(config.path)
    manifest = build(config, force=True)
    file = folder / manifest.substrings["jsonl"][1].file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="corrupted"):
        SubstringIndex(LocalFolder(folder), manifest)
    with pytest.raises(DataError, match=r"data\.substrings=true"):
        SubstringIndex(LocalFolder(folder), manifest.model_copy(update={"substrings": {}}))
