"""Visual question answering on easy-vqa's official test split, beside the best that a blind guesser can do."""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from armillary.data_pipeline.batch import PackedBatch, assemble, whole_documents
from armillary.data_pipeline.document import Answer, Document, Picture, Text
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.shards import Columns, schema_of
from armillary.data_pipeline.sources.easy_vqa import Question, easy_vqa_questions, read_image
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.data_pipeline.write import record_batch
from armillary.storage import Storage
from armillary.training.config import TrainJob
from armillary.training.delivery import DeviceBatch
from armillary.training.inference import load_model


@dataclass(frozen=True)
class Score:
    """correct of total questions; `blind`: what the best answer without the image would score."""

    correct: int
    total: int
    blind: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def has_questions(job: TrainJob) -> bool:
    """Whether the job trains on easy-vqa, so that its test split measures something."""
    return any(source.kind == "easy_vqa" for source in job.data.sources)


@torch.no_grad()
def evaluate(
    checkpoint: Storage,
    tokenizer: Tokenizer,
    limit: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Score a checkpoint on the test split, or on its first `limit` questions; progress(done, total) as it goes."""
    model, job = load_model(checkpoint)
    path = next((source.path for source in job.data.sources if source.kind == "easy_vqa"), "")
    train, test = easy_vqa_questions("train", path), easy_vqa_questions("test", path)
    test = test[:limit] if limit else test

    def predict(batch: PackedBatch) -> np.ndarray:
        parameter = next(model.parameters())
        logits = model(DeviceBatch.of(batch, parameter.device).inputs)
        return logits[:, 0].argmax(-1).cpu().numpy()

    correct = total = 0
    for batch in batches(test, tokenizer, job.image_shape, max(job.data.seq_length, 512)):
        right, asked = score(predict(batch), batch)
        correct, total = correct + right, total + asked
        progress(total, len(test))
    return Score(correct, total, blind_accuracy(train, test))


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
    questions: list[Question], tokenizer: Tokenizer, shape: ImageShape, seq_length: int, at_once: int = 128
) -> Iterator[PackedBatch]:
    """The questions with their answers, packed in order; every learned label is a token of an answer."""
    schema = schema_of(tokenizer.size)
    for start in range(0, len(questions), at_once):
        documents = [
            Document((Picture(read_image(q.image)), Text(q.text, learned=False), Answer(q.answer)))
            for q in questions[start : start + at_once]
        ]
        columns = Columns.of(record_batch([tokenizer.encode_document(d) for d in documents], schema))
        yield assemble(whole_documents(columns, seq_length, shape, tokenizer.image), columns.tokens.dtype, shape)


def score(predicted_T: np.ndarray, batch: PackedBatch) -> tuple[int, int]:
    """(correct, total) of a batch's questions, given the likeliest next token of every position.

    Greedy decoding writes exactly the given answer if and only if each of its tokens, and the end after it, is
    the likeliest at its place: one pass over question and answer scores as decoding would.
    """
    right = (predicted_T == batch.labels_T) | (batch.loss_mask_T == 0)
    questions = batch.piece_sources >= 0
    wrong = np.zeros(len(questions), bool)
    wrong[batch.piece_ids_T[~right]] = True
    return int((questions & ~wrong).sum()), int(questions.sum())
