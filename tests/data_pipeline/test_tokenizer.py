import base64
import gzip
import os
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from armillary.data_pipeline.document import Answer, Document, Picture, Role, Text
from armillary.data_pipeline.tokenizer import ANSWER, END, IMAGE, PATTERNS, Tokenizer
from armillary.errors import DataError
from tests.conftest import ROOT

TOKENIZER = Tokenizer.train(["what colour is the shape?", "the shape is blue, is it?"] * 5, 300)
text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([IMAGE, ANSWER, END, "<", "|", "a", " "])
).map("".join)


@given(text)
def test_any_text_comes_back_and_holds_no_special_token(text):
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert not {TOKENIZER.image, TOKENIZER.answer, TOKENIZER.end} & set(tokens)


def test_survives_its_json():
    again = Tokenizer.from_json(TOKENIZER.to_json())
    assert again.encode("the blue shape") == TOKENIZER.encode("the blue shape")
    assert again.size == TOKENIZER.size <= 300


@pytest.mark.parametrize("damaged", ["", "{}", "[1, 2]"])
def test_refuses_a_damaged_json(damaged):
    with pytest.raises(DataError, match="tokenizer"):
        Tokenizer.from_json(damaged)


def test_a_question_is_not_learned_and_its_answer_is():
    document = Document((Picture(b"1"), Text("what?", learned=False), Answer("blue")), "here", 2.0)
    encoded = TOKENIZER.encode_document(document)
    asked, answered = len(TOKENIZER.encode("what?")), len(TOKENIZER.encode("blue"))
    assert encoded.images == [(0, b"1")]
    assert (encoded.name, encoded.weight) == ("here", 2.0)
    assert encoded.tokens[0] == TOKENIZER.image
    assert encoded.tokens[1 + asked] == TOKENIZER.answer
    assert encoded.tokens[-1] == TOKENIZER.end
    assert encoded.spans == [(2 + asked, Role.PROMPT), (2 + asked + answered + 1, Role.ANSWER)]


def test_text_is_learned_to_its_end():
    encoded = TOKENIZER.encode_document(Document((Text("the shape"),)))
    assert encoded.tokens == [*TOKENIZER.encode("the shape"), TOKENIZER.end]
    assert encoded.spans == encoded.images == []


def test_a_text_that_is_only_a_prompt_learns_its_end_alone():
    encoded = TOKENIZER.encode_document(Document((Text("the shape", learned=False),)))
    length = len(encoded.tokens)
    assert encoded.spans == [(length - 1, Role.PROMPT), (length, Role.TEXT)]


REFERENCE = Path(os.environ.get("ARMILLARY_REFERENCE_DATA", ROOT.parent / "shared" / "data"))
PUBLISHED = REFERENCE / "tokenizers" / "cl100k_base.tiktoken.gz"


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"there is no {PUBLISHED} (ARMILLARY_REFERENCE_DATA says where)")
def test_a_published_table_encodes_as_its_own_library_does():
    rows = (line.split() for line in gzip.decompress(PUBLISHED.read_bytes()).splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    theirs = tiktoken.Encoding("cl100k_base", pat_str=PATTERNS["cl100k_base"], mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer.from_file(PUBLISHED)
    assert ours.size == len(ranks) + 3
    samples = [
        "Hello, world! It's 12345 o'clock.\n\n  don't\tstop",
        "na\u00efve caf\u00e9 \u2013 \u6771\u4eac \U0001f389\U0001f389",
        "    def f(x):\n        return x**2\r\n",
        "<|endoftext|> <|image|>",
        "a" * 100 + " " * 50 + "x",
        "\u00c0\u00c9\u00ce \u017f \u212a",
        "\x00\x01\x7f",
    ]
    from pydoc_data.topics import topics

    for sample in [*samples, *list(topics.values())[:20]]:
        assert ours.encode(sample) == theirs.encode(sample, disallowed_special=())
        assert ours.decode(ours.encode(sample)) == sample


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.json", None, "No such file"),
        ("x.json", b"[]", "cannot be read"),
        ("x.tiktoken", b"YQ== 0\n", "name it as one of"),
        ("gpt2.tiktoken", b"YQ==\n", "not a token and a rank"),
        ("gpt2.tiktoken", b"YQ== 0\nYg== 1\nYWJj 2\n", "no merge of two others"),
        ("x.json.gz", b"no gzip", "cannot be read"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        Tokenizer.from_file(tmp_path / name)
    assert words in str(error.value)
    assert error.value.where == str(tmp_path / name)
