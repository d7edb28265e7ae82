"""Which documents are worth training on: plain functions of a text, each naming what is wrong with it."""

import re

WORD = re.compile(r"\S+")
COMMON = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))


def length_problem(text: str, least: int, most: int) -> str:
    """Whether a text is too short or too long, in characters; empty where it is neither."""
    if len(text.strip()) < least:
        return "too short"
    return "too long" if len(text) > most else ""


def quality_problem(text: str) -> str:
    """The first of the Gopher rules that a text breaks (Rae et al. 2021, appendix A.1.1); empty where it breaks none.

    They are made for English prose: 50 to 100,000 words of 3 to 10 characters on average, few symbols, most lines
    neither bullets nor cut off, letters in most words, and two of the commonest words.
    """
    words, lines = WORD.findall(text), text.splitlines()
    if not 50 <= len(words) <= 100_000:
        return "number of words"
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "length of words"
    if max(text.count("#"), text.count("...") + text.count("\u2026")) > 0.1 * len(words):
        return "symbols"
    if sum(line.lstrip().startswith(("\u2022", "-", "*")) for line in lines) > 0.9 * len(lines):
        return "bullets"
    if sum(line.rstrip().endswith(("...", "\u2026")) for line in lines) > 0.3 * len(lines):
        return "cut-off lines"
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "words without letters"
    if len(COMMON.intersection(map(str.lower, words))) < 2:
        return "common words"
    return ""
