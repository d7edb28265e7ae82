import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.data_pipeline.document import Answer, Document, Picture, Role, Text
from armillary.data_pipeline.tokenizer import ANSWER, END, IMAGE, Tokenizer
from armillary.errors import DataError

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
