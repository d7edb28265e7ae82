"""Visual question answering on easy-vqa's official test split, beside the best that a blind guesser can do."""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from armillary.data_pipeline.batch import ImageShape, PackedBatch, Sequence, assemble, lay_out
from armillary.data_pipeline.sources import Answer, Picture, Question, Text
from armillary.data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """correct of total questions; `blind`: what the best answer without the image would score."""

    correct: int
    total: int
    blind: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def blind_accuracy(train: list[Question], test: list[Question]) -> float:
    """Accuracy on `test` of answering every question by its most frequent answer in `train`, the image unseen.

    A question text that `train` lacks gets the most frequent answer of all.
    """
    by_text: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for question in train:
        by_text[question.text][question.answer] += 1
    overall = collections.Counter(question.answer for question in train)
    guesses = ((by_text.get(q.text) or overall).most_common(1)[0][0] == q.answer for q in test)
    return sum(guesses) / len(test)


def batches(
    questions: list[Question], tokenizer: Tokenizer, shape: ImageShape, seq_length: int, rows: int
) -> Iterator[PackedBatch]:
    """The questions with their answers, packed in order; every learned label is a token of an answer."""
    packed: list[list[Sequence]] = [[]]
    room = seq_length
    for question in questions:
        document = (Picture(question.image.read_bytes()), Text(question.text, learned=False), Answer(question.answer))
        sequence = lay_out(*tokenizer.encode_document(document), tokenizer.image, shape.patches)
        if len(sequence.tokens) > room:
            if len(packed) == rows:
                yield assemble(packed, seq_length, shape)
                packed = []
            packed.append([])
            room = seq_length
        packed[-1].append(sequence)
        room -= len(sequence.tokens)
    yield assemble(packed, seq_length, shape)


def score(predict: Callable[[PackedBatch], np.ndarray], packed: Iterator[PackedBatch]) -> tuple[int, int]:
    """(correct, total) of packed questions; predict gives the likeliest next token of every position [T].

    Greedy decoding writes exactly the given answer if and only if each of its tokens, and the end after it, is
    the likeliest at its place: one pass over question and answer scores as decoding would.
    """
    correct = total = 0
    for batch in packed:
        right = (predict(batch) == batch.labels_T) | (batch.loss_mask_T == 0)
        answered = batch.segment_ids_T >= 0
        wrong = np.unique(batch.segment_ids_T[answered & ~right])
        segments = len(np.unique(batch.segment_ids_T[answered]))
        correct, total = correct + segments - len(wrong), total + segments
    return correct, total
