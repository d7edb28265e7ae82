import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from armillary.data_pipeline.dedup import copies, exact_key, near_keys
from armillary.data_pipeline.document import Answer, Document, Picture, Text

WORDS = [f"word{n}" for n in range(5000)]


def text_of(*words):
    return Document((Text(" ".join(words)),))


def test_exact_keys_tell_parts_apart():
    documents = [
        Document((Text("ab"),)), Document((Text("a"), Text("b"))), Document((Answer("ab"),)), Document((Text("Ab"),)),
        Document((Picture(b"ab"),)),
    ]  # fmt: skip
    assert len({exact_key(document) for document in documents}) == 5
    assert exact_key(Document((Text(" ab\n"),), "elsewhere", 2.0)) == exact_key(Document((Text("ab"),)))


def alike(a, b):
    return bool((near_keys(a) == near_keys(b)).any())


def resemblance(a, b, run=5):
    runs = [{tuple(words[i : i + run]) for i in range(len(words) - run + 1)} for words in (a, b)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_near_copies_are_found_about_as_often_as_the_formula_says():
    rng, hits, expected = np.random.default_rng(0), {}, {}
    for changed in (1, 4, 8, 16, 40):
        for _ in range(60):
            words = list(rng.choice(WORDS, 200))
            other = list(words)
            for place in rng.choice(200, changed, replace=False):
                other[place] = "changed"
            share = resemblance(words, other)
            hits.setdefault(changed, []).append(alike(text_of(*words), text_of(*other)))
            expected.setdefault(changed, []).append(1 - (1 - share**8) ** 14)
    for changed, found in hits.items():
        assert abs(np.mean(found) - np.mean(expected[changed])) < 0.2, changed
    assert np.mean(hits[1]) == 1
    assert np.mean(hits[40]) < 0.05


def test_case_and_spaces_make_no_difference_but_images_do():
    a, b = Document((Text("The cat  sat\non the mat"),)), Document((Text("the CAT sat on the mat"),))
    assert alike(a, b)
    assert not alike(Document((Picture(b"1"), *a.parts)), Document((Picture(b"2"), *b.parts)))
    assert alike(text_of("short"), text_of("short"))
    assert not alike(text_of("short"), text_of("brief"))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_a_copy_agrees_with_one_that_is_kept(rows):
    doubled = copies(np.array(rows, np.uint64).reshape(-1, 2))
    kept = []
    for row, copy in zip(rows, doubled, strict=True):
        assert copy == any(row[0] == a or row[1] == b for a, b in kept)
        if not copy:
            kept.append(row)
