"""Sources: where documents come from before they are tokens."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.document import Answer, Document, Picture, Text
from armillary.data_pipeline.images import decode
from armillary.errors import DataError


@dataclass(frozen=True)
class Question:
    """One question about one image, with its answer."""

    text: str
    answer: str
    image: Path


def documents(source: SourceConfig) -> Iterator[Document]:
    """The training documents of a source, in a fixed order."""
    match source.kind:
        case "easy_vqa":
            return _easy_vqa_documents(source)
        case "pydoc":
            return _pydoc_documents()


def easy_vqa_questions(split: str, path: str = "") -> list[Question]:
    """Questions of the `train` or `test` split as the easy-vqa package ships them, in the file's order."""
    root = Path(path) if path else Path(str(resources.files("easy_vqa"))) / "data"
    file = root / split / "questions.json"
    try:
        rows = json.loads(file.read_text())
        return [Question(text, answer, root / split / "images" / f"{int(image)}.png") for text, answer, image in rows]
    except FileNotFoundError:
        raise DataError(
            "the easy_vqa source has no questions file", file, "point `path` to a folder with train/ and test/ in it"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"the easy_vqa questions file cannot be read: {error}", file, "restore the file") from None


def read_image(path: Path) -> bytes:
    """An image file's bytes; DataError unless they decode as a whole image."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"an image cannot be read: {error.strerror}", path, "check the path") from None
    try:
        decode(data)
    except DataError as error:
        raise DataError(error.what, path, error.fix) from None
    return data


def _easy_vqa_documents(source: SourceConfig) -> Iterator[Document]:
    images: dict[Path, bytes] = {}
    for number, question in enumerate(easy_vqa_questions("train", source.path)):
        if question.image not in images:
            images[question.image] = read_image(question.image)
        parts = Picture(images[question.image]), Text(question.text, learned=False), Answer(question.answer)
        yield Document(parts, f"train/questions.json[{number}]")


def _pydoc_documents() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        for number, section in enumerate(_sections(text, 300)):
            yield Document((Text(section),), f"{topic}[{number}]")


def _sections(text: str, size: int) -> Iterator[str]:
    """Whole paragraphs of `text`, in groups of at least `size` characters (the last may be shorter)."""
    section = ""
    for paragraph in text.split("\n\n"):
        section += paragraph + "\n\n"
        if len(section) >= size:
            yield section
            section = ""
    if section.strip():
        yield section
