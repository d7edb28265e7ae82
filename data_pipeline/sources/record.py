"""Records, as lines, rows and files hold them, to documents."""

import base64
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.document import Answer, Document, Picture, Text
from armillary.data_pipeline.images import decode
from armillary.data_pipeline.sources.part import inside, read_file
from armillary.errors import DataError

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can hold it, UTF-8 cannot
DATA_URI = "data:image/"


@dataclass(frozen=True)
class Record:
    """One record: where it stands, the folder that paths in it start from, and how to get its fields.

    `load` may raise UnicodeDecodeError, or ValueError where the bytes are not what their format says.
    """

    name: str
    root: Path
    load: Callable[[], Any]


def document_of(record: Record, source: SourceConfig) -> Document:
    """A record as a document; DataError, with its name, where it cannot be one.

    A record has `parts`, a list of {"text"}, {"prompt"}, {"answer"} and {"image"} in reading order; or a text
    (`source.text_field`), or `question` and `answer`, each with an image before it (`source.image_field`) or not.
    An image is a path, a data URI, bytes, or {"bytes": ...} or {"path": ...}. `weight` is optional.
    """
    try:
        fields = record.load()
        if not isinstance(fields, dict):
            raise ValueError("it is no table of fields")
        parts = _parts(fields, source, record.root)
        if not any(isinstance(part, Picture) or part.text.strip() for part in parts):
            raise ValueError("it is empty")
        return Document(tuple(parts), record.name, _weight(fields.get("weight")))
    except UnicodeDecodeError:
        reason = "it is not valid UTF-8"
    except DataError as error:
        where = f"{record.name}: {error.where}" if error.where else record.name
        raise DataError(error.what, where, _fix(error.fix)) from None
    except (ValueError, RecursionError) as error:
        reason = str(error) or "it is nested too deeply"
    raise DataError(f"a record cannot be used: {reason}", record.name, _fix("correct it"))


def _fix(first: str) -> str:
    return f'{first}, or set bad = "skip" for its source'


def _parts(fields: dict, source: SourceConfig, root: Path) -> list[Text | Picture | Answer]:
    if "parts" in fields:
        others = {source.text_field, source.image_field, "question", "answer"}
        if also := [name for name, value in fields.items() if name in others and value]:
            raise ValueError(f"it has `parts` and `{also[0]}` too, whose order nobody knows")
        if not isinstance(fields["parts"], list):
            raise ValueError("its `parts` are no list")
        return [_part(one, root) for one in fields["parts"]]
    image = fields.get(source.image_field)
    before = [] if image is None else [_picture(image, root)]
    text = fields.get(source.text_field)
    if "answer" in fields or "question" in fields:
        if text and source.text_field not in ("question", "answer"):
            raise ValueError(f"it has an answer and `{source.text_field}` too, whose order nobody knows: use `parts`")
        question, answer = (_field(fields, name) for name in ("question", "answer"))
        return [*before, Text(question, learned=False), Answer(answer)]
    text = _field(fields, source.text_field)
    if before and not text.strip():
        raise ValueError("its image has an empty caption")
    return [*before, Text(text)]


def _field(fields: dict, name: str) -> str:
    if name not in fields:
        raise ValueError(f"it has no `{name}`, but {', '.join(map(str, [*fields][:9])) or 'nothing'}")
    try:
        return _text(fields[name])
    except ValueError as error:
        raise ValueError(f"{error} (`{name}`)") from None


def _part(one: Any, root: Path) -> Text | Picture | Answer:
    if isinstance(one, dict) and len({"text", "prompt", "answer", "image"}.intersection(one)) > 1:
        raise ValueError("one of its parts is more than one of text, prompt, answer and image")
    match one:
        case {"text": text}:
            return Text(_text(text))
        case {"prompt": text}:
            return Text(_text(text), learned=False)
        case {"answer": text}:
            return Answer(_text(text))
        case {"image": image}:
            return _picture(image, root)
    raise ValueError("one of its parts is no text, prompt, answer or image")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("it has no text where one is needed")
    if SURROGATE.search(value):
        raise ValueError("its text is not valid Unicode")
    return value


def _weight(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise ValueError("its weight is no number above 0")
    return float(value)


def _picture(value: Any, root: Path) -> Picture:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith(DATA_URI):
        value = base64.b64decode(value.partition(",")[2], validate=True)
    elif isinstance(value, str):
        if "://" in value:
            raise ValueError("an image is a URL, which is not fetched")
        value = read_file(inside(root, value))
    if not isinstance(value, bytes):
        raise ValueError("an image is no path, data URI or bytes")
    _check(value)
    return Picture(value)


@functools.lru_cache(256)  # the questions of one picture stand behind each other
def _check(data: bytes) -> None:
    decode(data)
