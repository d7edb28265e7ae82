import pytest

from armillary.data_pipeline.filters import length_problem, quality_problem

PROSE = "The keeper of the light had to climb up to the lamp and clean it with oil that they have in the store. " * 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (PROSE, ""),
        ("The cat and the dog", "number of words"),
        ("a b " * 60, "length of words"),
        ("internationalisation " * 60, "length of words"),
        (PROSE.replace(" the ", " # "), "symbols"),
        (PROSE.replace(" the ", " ... "), "symbols"),
        ("\n".join("- the point of that line" for _ in range(30)), "bullets"),
        ("\n".join("the line that ends and then has more words to..." for _ in range(10)), "cut-off lines"),
        (" ".join(["1234", "the", "and"] * 40), "words without letters"),
        ("lorem ipsum dolor amet " * 30, "common words"),
    ],
)
def test_each_rule_drops_what_it_is_for(text, problem):
    assert quality_problem(text) == problem


def test_lengths():
    assert length_problem("  abc  ", 4, 10) == "too short"
    assert length_problem("abcd", 4, 10) == ""
    assert length_problem("a" * 11, 4, 10) == "too long"
