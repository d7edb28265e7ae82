"""What a document is: parts of text and pictures as sources give them, and its encoded form as shards hold it."""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np


class Role(IntEnum):
    """Whose words a token belongs to. The model learns to produce texts and answers, not prompts and pictures."""

    TEXT = 0
    PROMPT = 1
    ANSWER = 2


LEARNED = np.array([True, False, True])  # by role


@dataclass(frozen=True)
class Text:
    """A stretch of text; `learned`: whether the model is trained to produce it."""

    text: str
    learned: bool = True


@dataclass(frozen=True)
class Picture:
    """An image file's bytes, as they are on disk."""

    data: bytes


@dataclass(frozen=True)
class Answer:
    """A text that answers what stands before it, and is learned."""

    text: str


@dataclass(frozen=True)
class Document:
    """Parts in reading order. `name` says where it came from; its loss counts `weight` times."""

    parts: tuple[Text | Picture | Answer, ...]
    name: str = ""
    weight: float = 1.0

    @property
    def texts(self) -> list[str]:
        """Its texts in their order, pictures left out."""
        return [part.text for part in self.parts if not isinstance(part, Picture)]


@dataclass
class Encoded:
    """A document's tokens, with one image token for each picture.

    `spans` are (end, role) of stretches of tokens, in order and without gaps; none where all of it is text.
    """

    tokens: list[int] = field(default_factory=list)
    spans: list[tuple[int, Role]] = field(default_factory=list)
    images: list[tuple[int, bytes]] = field(default_factory=list)  # place among the tokens, file
    name: str = ""
    weight: float = 1.0
