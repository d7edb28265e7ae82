import numpy as np
import pytest

from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.loader import Loader
from armillary.data_pipeline.sources.easy_vqa import Question, easy_vqa_questions
from armillary.evals.vqa import batches, blind_accuracy, score

SHAPE = ImageShape(64, 16)


@pytest.fixture(scope="module")
def tokenizer(tables):
    return Loader(DataConfig.model_validate(tables["data"]), SHAPE).tokenizer


def test_the_splits_are_the_packages_own():
    train, test = easy_vqa_questions("train"), easy_vqa_questions("test")
    assert (len(train), len(test)) == (38_575, 9_673)
    assert len({q.image for q in train} | {q.image for q in test}) == 5_000


def test_the_blind_baseline_is_computed_from_both_splits():
    assert blind_accuracy(easy_vqa_questions("train"), easy_vqa_questions("test")) == pytest.approx(0.670, abs=5e-4)


def test_a_blind_guesser_takes_the_commonest_answer():
    def ask(*pairs):
        return [Question(text, answer, None) for text, answer in pairs]

    train = ask(("a?", "yes"), ("a?", "no"), ("a?", "no"), ("b?", "yes"), ("b?", "yes"))
    assert blind_accuracy(train, ask(("a?", "no"), ("a?", "yes"), ("b?", "yes"), ("new?", "yes"))) == 0.75


def test_every_question_is_packed_once_and_scored_as_a_whole(tokenizer):
    questions = easy_vqa_questions("test")[:150]
    packed = list(batches(questions, tokenizer, SHAPE, seq_length=128, at_once=40))
    assert [int((batch.piece_sources >= 0).sum()) for batch in packed] == [40, 40, 40, 30]
    assert [len(batch.patches_IND) for batch in packed] == [40, 40, 40, 30]
    perfect = [score(batch.labels_T, batch) for batch in packed]
    assert sum(total for _, total in perfect) == 150
    assert sum(correct for correct, _ in perfect) == 150
    answers = [
        tokenizer.decode(batch.labels_T[(batch.piece_ids_T == piece) & (batch.loss_mask_T > 0)][:-1])
        for batch in packed
        for piece in np.flatnonzero(batch.piece_sources >= 0)
    ]
    assert answers == [q.answer for q in questions]


def test_one_wrong_token_of_an_answer_costs_the_question(tokenizer):
    batch = next(batches(easy_vqa_questions("test")[:4], tokenizer, SHAPE, 512))
    for place in np.flatnonzero(batch.loss_mask_T):
        guess = batch.labels_T.copy()
        guess[place] += 1
        assert score(guess, batch) == (3, 4)
    guess = np.where(batch.loss_mask_T > 0, batch.labels_T, 500)  # what is not asked does not count
    assert score(guess, batch) == (4, 4)
