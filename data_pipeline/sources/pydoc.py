"""The English text of Python's own documentation topics, from the standard library."""

from collections.abc import Iterator
from pathlib import Path

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.sources.part import Part
from armillary.data_pipeline.sources.record import Record


def parts(source: SourceConfig) -> list[Part]:
    """One: it is less than a megabyte."""
    return [Part(files=())]


def read(source: SourceConfig, part: Part) -> Iterator[Record]:
    """Each topic in sections of a few hundred characters."""
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        for number, section in enumerate(sections(text, 300)):
            yield Record(f"{topic}[{number}]", Path(), lambda section=section: {source.text_field: section})


def sections(text: str, size: int) -> Iterator[str]:
    """Whole paragraphs of `text`, in groups of at least `size` characters (the last may be shorter)."""
    section = ""
    for paragraph in text.split("\n\n"):
        section += paragraph + "\n\n"
        if len(section) >= size:
            yield section
            section = ""
    if section.strip():
        yield section
