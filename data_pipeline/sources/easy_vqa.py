"""easy-vqa: questions about small pictures of coloured shapes, as the package of that name ships them."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.images import decode
from armillary.data_pipeline.sources.part import Part, read_file
from armillary.data_pipeline.sources.record import Record
from armillary.errors import DataError


@dataclass(frozen=True)
class Question:
    """One question about one image, with its answer."""

    text: str
    answer: str
    image: Path


def parts(source: SourceConfig) -> list[Part]:
    """One: it is a few megabytes."""
    return [Part(files=())]


def read(source: SourceConfig, part: Part) -> Iterator[Record]:
    """The training questions: each with its image before it and its answer behind."""
    image_of = functools.lru_cache(16)(read_image)  # the questions of one picture stand behind each other

    def fields(question: Question) -> dict:
        image = image_of(question.image)
        return {"parts": [{"image": image}, {"prompt": question.text}, {"answer": question.answer}]}

    for number, question in enumerate(easy_vqa_questions("train", source.path)):
        yield Record(f"train/questions.json[{number}]", Path(), functools.partial(fields, question))


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
    data = read_file(path)
    try:
        decode(data)
    except DataError as error:
        raise DataError(error.what, path, error.fix) from None
    return data
