"""Every kind of source: what it reads, and what it says about what it cannot use."""

import base64
import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.document import Answer, Picture, Text
from armillary.data_pipeline.sources import jsonl, parts_of, read_part
from armillary.errors import DataError


def png(number=0):
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def documents(kind, path, **options):
    source = SourceConfig(kind=kind, path=str(path), **options)
    return [document for part in parts_of(source) for document in read_part(source, part)]


def parts(kind, path, **options):
    return [document.parts for document in documents(kind, path, **options)]


def problems(kind, path):
    found = documents(kind, path)
    assert all(isinstance(one, DataError) for one in found), found
    assert all('bad = "skip"' in one.fix for one in found)
    return [(one.what, one.where) for one in found]


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_files_are_documents(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_text("third")
    (tmp_path / "other.bin").write_bytes(b"no text")
    assert parts("text", tmp_path) == [(Text("first"),), (Text("second"),), (Text("third"),)]
    assert [d.name for d in documents("text", tmp_path / "b.txt")] == ["b.txt"]


def test_json_lines_hold_texts_questions_and_interleaved_parts(tmp_path):
    (tmp_path / "one.png").write_bytes(png(1))
    uri = "data:image/png;base64," + base64.b64encode(png(2)).decode()
    interleaved = [{"text": "a"}, {"image": "one.png"}, {"prompt": "b?"}, {"answer": "c"}, {"image": uri}]
    path = lines(
        tmp_path / "x.jsonl",
        {"text": "plain"},
        {"question": "q?", "answer": "yes", "image": "one.png", "weight": 2},
        {"parts": interleaved},
    )
    found = documents("jsonl", path)
    assert [d.parts for d in found] == [
        (Text("plain"),),
        (Picture(png(1)), Text("q?", learned=False), Answer("yes")),
        (Text("a"), Picture(png(1)), Text("b?", learned=False), Answer("c"), Picture(png(2))),
    ]
    assert [d.weight for d in found] == [1.0, 2.0, 1.0]
    assert found[1].name == "x.jsonl, byte 18"
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert parts("jsonl", tmp_path / "y.jsonl.gz") == [d.parts for d in found]
    assert parts("jsonl", lines(tmp_path / "z.jsonl", {"body": "t"}), text_field="body") == [(Text("t"),)]


@pytest.mark.parametrize("size", [1, 7, 40, 41, 42, 1000])
def test_a_file_cut_into_stretches_gives_every_line_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(jsonl, "PART_BYTES", size)
    path = lines(tmp_path / "x.jsonl", *({"text": "x" * (n % 50)} for n in range(1, 40)))
    assert parts("jsonl", path) == [(Text("x" * (n % 50)),) for n in range(1, 40)]


def test_tables_of_texts_and_images(tmp_path):
    rows = [{"text": "a", "image": {"bytes": png(1), "path": None}}, {"text": "b", "image": None}]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1)
    expected = [(Picture(png(1)), Text("a")), (Text("b"),)]
    assert parts("parquet", tmp_path) == expected
    assert len(parts_of(SourceConfig(kind="parquet", path=str(tmp_path)))) == 2
    with pa.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert parts("huggingface", tmp_path) == expected
    with pa.ipc.new_file(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert parts("huggingface", tmp_path) == expected


def test_tars_of_samples(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in {
            "a/1.png": png(1), "a/1.txt": b"one", "a/2.txt": b"two", "a/3.json": b'{"question": "q", "answer": "z"}',
            "a/3.PNG": png(3),
        }.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = documents("webdataset", tmp_path)
    assert [d.parts for d in found] == [
        (Picture(png(1)), Text("one")),
        (Text("two"),),
        (Picture(png(3)), Text("q", learned=False), Answer("z")),
    ]
    assert found[0].name == "x.tar, a/1"


def test_folders_of_images_with_captions(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "1.txt").write_text("beside it")
    lines(tmp_path / "metadata.jsonl", {"file_name": "2.png", "text": "in the list"})
    found = [(Picture(png(1)), Text("beside it")), (Picture(png(2)), Text("in the list"))]
    assert parts("images", tmp_path) == found
    (tmp_path / "odd.picture").write_bytes(png(3))
    named = ("2.png", "missing.png", "odd.picture", "2.png", "../2.png")
    lines(tmp_path / "metadata.jsonl", *({"file_name": name, "text": "in the list"} for name in named))
    with open(tmp_path / "metadata.jsonl", "ab") as file:
        file.write(b'{"text": "no name"}\n{"file_na\n\xff\n')
    (tmp_path / "4.png").write_bytes(png(4))
    (tmp_path / "4.txt").write_text(" \n")
    (tmp_path / "5.png").write_bytes(png(5))
    one, two, empty, none, missing, odd, *bad = documents("images", tmp_path)
    assert [one.parts, two.parts] == found
    assert odd.parts == (Picture(png(3)), Text("in the list"))
    assert (empty.what, empty.where) == ("a record cannot be used: its image has an empty caption", "4.png")
    assert "it has no caption, neither 5.txt nor a line in metadata.jsonl" in none.what
    assert none.where == "5.png"
    assert missing.what == "a file cannot be read: No such file or directory"
    assert missing.where == f"metadata.jsonl, missing.png: {tmp_path / 'missing.png'}"
    told = [(error.what.removeprefix("a record cannot be used: "), error.where) for error in bad]
    assert told == [
        ("its file has a caption already", "metadata.jsonl, line 4"),
        ("a file is named that lies outside the source's folder", "metadata.jsonl, line 5"),
        *(("it is no record with a `file_name`", f"metadata.jsonl, line {line}") for line in (6, 7, 8)),
    ]


def test_a_table_without_the_columns_that_are_named_is_refused(tmp_path):
    table = pa.table({"content": ["a"], "picture": [png(1)]})
    pq.write_table(table, tmp_path / "x.parquet")
    for options, missing in (({}, "text"), ({"text_field": "content", "image_field": "img"}, "img")):
        with pytest.raises(DataError, match=f"no column {missing}, but content, picture"):
            documents("parquet", tmp_path, **options)
    assert parts("parquet", tmp_path, text_field="content", image_field="picture") == [(Picture(png(1)), Text("a"))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{no json", "Expecting"),
        (b'{"text": "\xff\xfe"}', "not valid UTF-8"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
        (b"[1, 2]", "no table of fields"),
        (b'{"txt": "a", "id": 1}', "it has no `text`, but txt, id"),
        (b'{"question": "a"}', "it has no `answer`, but question"),
        (b'{"text": 7}', "no text where one is needed (`text`)"),
        (b'{"parts": "a"}', "its `parts` are no list"),
        (b'{"parts": [{"text": "a"}], "text": "b"}', "it has `parts` and `text` too"),
        (b'{"parts": [{"text": "a", "image": "b.png"}]}', "more than one of text, prompt, answer and image"),
        (b'{"text": "a", "image": "https://x.y/z.png"}', "a URL, which is not fetched"),
        (b'{"text": "  \\n"}', "it is empty"),
        (b'{"parts": []}', "it is empty"),
        (b'{"parts": [{"sound": "a"}]}', "one of its parts"),
        (b'{"text": "a", "weight": 0}', "weight"),
        (b'{"text": "a", "weight": NaN}', "weight"),
        (b'{"text": "a", "image": 3}', "an image is no path"),
        (b'{"text": "a", "question": "b", "answer": "c"}', "whose order nobody knows"),
        (b'{"text": "a", "question": "b", "answer": 3}', "whose order nobody knows"),
        (b'{"text": "", "image": "data:image/png;base64,PNG"}', "empty caption"),
        (b'{"text": "a", "image": "missing.png"}', "cannot be read"),
        (b'{"text": "a", "image": "../outside.png"}', "outside the source's folder"),
        (b'{"text": "a", "image": "link.png"}', "outside the source's folder"),
        (b'{"text": "a", "image": "x.jsonl"}', "cannot be decoded"),
        (b'{"text": "a", "image": "data:image/png;base64,@@"}', "cannot be used"),
        (b"[" * 100_000, "recursion depth"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_with_its_reason(tmp_path, line, words):
    folder = tmp_path / "source"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "x.jsonl").write_bytes(line.replace(b"PNG", base64.b64encode(png())) + b"\n")
    ((what, where),) = problems("jsonl", folder / "x.jsonl")
    assert words in what
    assert where.startswith("x.jsonl, byte 0")


def test_files_that_are_not_what_they_should_be(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no table")
    (tmp_path / "x.tar").write_bytes(b"no tar" * 500)
    (tmp_path / "x.arrow").write_bytes(b"no arrow")
    (tmp_path / "x.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xfa")
    for kind, words in (("parquet", "a table cannot be read"), ("webdataset", "a tar cannot be read"),
                        ("huggingface", "a table cannot be read"), ("jsonl", "a file cannot be read")):  # fmt: skip
        with pytest.raises(DataError, match=words):
            documents(kind, tmp_path)
    ((what, _),) = problems("text", tmp_path)
    assert "not valid UTF-8" in what


def test_places_are_named_from_the_source_on(tmp_path):
    (tmp_path / "en").mkdir()
    path = lines(tmp_path / "en" / "x.jsonl", {"text": 1}, {"text": 2})
    assert [where for _, where in problems("jsonl", tmp_path)] == [f"en/x.jsonl, byte {at}" for at in (0, 12)]
    assert [where for _, where in problems("jsonl", path)] == [f"x.jsonl, byte {at}" for at in (0, 12)]


def test_a_file_of_another_kind_is_refused_and_an_empty_one_read(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="of kind text, its file of kind jsonl"):
        documents("text", tmp_path / "x.jsonl")
    assert documents("jsonl", tmp_path / "x.jsonl") == []
    lines(tmp_path / "lines.json", {"question": "q", "answer": "a"})
    for field in ("text", "question", "answer"):
        assert parts("jsonl", tmp_path / "lines.json", text_field=field) == [(Text("q", learned=False), Answer("a"))]


def test_captions_are_found_by_whatever_path_they_name(tmp_path, monkeypatch):
    folder = tmp_path / "real"
    (folder / "sub").mkdir(parents=True)
    for number in (1, 2, 3):
        (folder / f"{number}.png").write_bytes(png(number))
    (tmp_path / "link").symlink_to(folder)
    names = ("sub/../1.png", str(folder / "2.png"), str(tmp_path / "link" / "3.png"), str(folder / "4.png"))
    lines(folder / "metadata.jsonl", *({"file_name": name, "text": name} for name in names))
    monkeypatch.chdir(tmp_path)
    for path in (folder, tmp_path / "link", "real", "link/"):
        *found, missing = documents("images", path)
        assert [one.parts for one in found] == [(Picture(png(n + 1)), Text(names[n])) for n in range(3)]
        assert missing.where.startswith("metadata.jsonl, 4.png: ")


def test_a_source_without_files_is_refused(tmp_path):
    for path, words in ((tmp_path, "has no files"), (tmp_path / "none", "neither a file nor a folder")):
        with pytest.raises(DataError, match=words):
            documents("text", path)
