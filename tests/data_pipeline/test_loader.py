import io
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from armillary.data_pipeline.batch import ImageShape, assemble, lay_out, patchify, vary
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.loader import Loader, prefetch
from armillary.data_pipeline.shuffle import key_of

SHAPE = ImageShape(64, 16)
FIELDS = ("tokens_T", "labels_T", "loss_mask_T", "positions_T", "patches_IND")


@pytest.fixture(scope="module")
def loader(tables):
    return Loader(DataConfig.model_validate(tables["data"]), SHAPE)


def rows_of(steps, count):
    """The first `count` steps' rows, as (tokens, labels, mask, positions) a row."""
    rows = []
    for _ in range(count):
        for batch in next(steps).micro_batches:
            stacked = np.stack([getattr(batch, name) for name in FIELDS[:4]])
            rows += np.split(stacked, len(batch.tokens_T) // 128, axis=1)
    steps.close()
    return rows


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 4), (1, 8), (2, 1), (4, 2), (8, 1)])
def test_every_number_of_ranks_sees_the_same_rows(loader, ranks, micro_batch):
    whole = rows_of(loader.steps(Cursor(), 8, 8, 0, 1), 3)
    parts = [rows_of(loader.steps(Cursor(), 8, micro_batch, rank, ranks), 3) for rank in range(ranks)]
    share = 8 // ranks
    for step in range(3):
        for rank in range(ranks):
            for row in range(share):
                expected = whole[step * 8 + rank * share + row]
                assert np.array_equal(parts[rank][step * share + row], expected)


def test_goes_on_with_exactly_the_next_sample_at_another_batch_size(loader):
    whole = rows_of(loader.steps(Cursor(), 4, 4, 0, 1), 6)
    steps = loader.steps(Cursor(), 4, 4, 0, 1)
    first = next(steps)
    second = next(steps)
    steps.close()
    assert first.after.sample < second.after.sample
    resumed = rows_of(loader.steps(second.after, 16, 4, 0, 1), 1)
    assert all(np.array_equal(a, b) for a, b in zip(resumed, whole[8:24], strict=True))


def test_learned_tokens_count_the_global_batch(loader):
    parts = [loader.steps(Cursor(), 8, 4, rank, 2) for rank in range(2)]
    for _ in range(5):
        steps = [next(part) for part in parts]
        masks = [batch.loss_mask_T.sum() for step in steps for batch in step.micro_batches]
        assert {step.learned_tokens for step in steps} == {int(sum(masks))}
    for part in parts:
        part.close()


def test_batches_hold_whole_documents_with_their_images(loader):
    batch = loader.batch(loader.plan(Cursor(), 8).rows)
    tokenizer = loader.tokenizer
    starts = np.flatnonzero((batch.tokens_T == tokenizer.image) & (batch.positions_T == 0))
    assert len(starts) > 10
    assert np.array_equal(starts, batch.image_starts_I)
    assert len(batch.patches_IND) == len(starts)
    for start in starts:
        assert (batch.tokens_T[start : start + 16] == tokenizer.image).all()
        assert batch.loss_mask_T[start : start + 16].sum() == 0
    bounds = batch.cu_seqlens
    for low, high in itertools.pairwise(bounds):
        assert np.array_equal(batch.positions_T[low:high], np.arange(high - low))
        assert len(set(batch.segment_ids_T[low:high])) == 1
        if batch.segment_ids_T[low] == -1:
            assert batch.loss_mask_T[low:high].sum() == 0
        else:
            assert np.array_equal(batch.labels_T[low : high - 1], batch.tokens_T[low + 1 : high])
    asked = np.flatnonzero(batch.tokens_T == tokenizer.answer)
    assert (batch.loss_mask_T[asked] == 1).all()
    assert (batch.loss_mask_T[asked - 1] == 0).all()


def test_a_stage_without_images_gets_no_patches(loader):
    rows = loader.plan(Cursor(), 4).rows
    full, bare = loader.batch(rows), loader.batch(rows, with_images=False)
    assert np.array_equal(full.tokens_T, bare.tokens_T)
    assert len(full.patches_IND)
    assert not len(bare.patches_IND)


def test_patches_are_the_pixels_row_by_row():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    patches = patchify(file.getvalue(), SHAPE)
    assert patches.shape == (16, 768)
    expected = pixels[16:32, 48:64].reshape(-1) / 127.5 - 1  # second row of patches, last column
    assert np.allclose(patches[7], expected, atol=1e-6)


def test_pixels_are_normalised():
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (255, 0, 51)).save(file, "png")
    patches = patchify(file.getvalue(), ImageShape(64, 16, mean=0.2, std=0.4)).reshape(-1, 3)
    assert np.allclose(patches, [2.0, -0.5, 0.0], atol=1e-6)


def test_merged_patches_stand_together():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    shape = ImageShape(64, 8, merge=2)
    patches = patchify(file.getvalue(), shape)
    assert (shape.patches, shape.positions, patches.shape) == (64, 16, (64, 192))
    square = pixels[16:32, 48:64] / 127.5 - 1  # the eighth position's 2 x 2 patches, row by row
    for number, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        expected = square[row : row + 8, column : column + 8].reshape(-1)
        assert np.allclose(patches[7 * 4 + number], expected, atol=1e-6)


@given(st.integers(0, 2**64 - 1))
def test_a_variation_mirrors_and_shifts_and_is_named_by_its_number(variation):
    pixels = np.random.default_rng(0).random((16, 16, 3))
    varied = vary(pixels, variation)
    assert np.array_equal(varied, vary(pixels, variation))
    source = pixels[:, ::-1] if variation & 1 else pixels
    found = [
        (down, right)
        for down in range(-2, 3)
        for right in range(-2, 3)
        if np.array_equal(varied[4:12, 4:12], source[4 + down : 12 + down, 4 + right : 12 + right])
    ]
    assert len(found) == 1


def test_every_variation_comes_about_equally_often():
    pixels = np.random.default_rng(0).random((16, 16, 3))
    seen = {vary(pixels, int(key_of(n))).tobytes() for n in range(1000)}
    assert len(seen) == 2 * 5 * 5


def test_augmented_images_differ_by_sample_and_not_by_rank(tables):
    sources = [{"kind": "easy_vqa", "augment": True}]
    plain = Loader(DataConfig.model_validate(tables["data"] | {"sources": sources}), SHAPE)
    same = Loader(DataConfig.model_validate(tables["data"] | {"sources": [{"kind": "easy_vqa"}]}), SHAPE)
    rows = plain.plan(Cursor(), 4).rows
    varied, original = plain.batch(rows), same.batch(rows)
    assert np.array_equal(varied.tokens_T, original.tokens_T)
    assert (varied.patches_IND != original.patches_IND).any((1, 2)).mean() > 0.8
    halves = np.concatenate([plain.batch(rows[:2]).patches_IND, plain.batch(rows[2:]).patches_IND])
    assert np.array_equal(halves, varied.patches_IND)


def test_images_of_another_size_and_mode_are_fitted():
    file = io.BytesIO()
    Image.new("P", (20, 90), 3).save(file, "gif")
    assert patchify(file.getvalue(), SHAPE).shape == (16, 768)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.integers(1, 5))
def test_lay_out_widens_images_and_shifts_labels(tokens, patches):
    tokens = np.array(tokens, np.int32)
    learned = (tokens > 2).astype(np.uint8)
    sequence = lay_out(tokens, learned, [b""] * int((tokens == 0).sum()), 0, patches)
    wide = [t for token in tokens for t in ([token] * patches if token == 0 else [token])]
    assert sequence.tokens.tolist() == wide[:-1]
    assert sequence.labels.tolist() == wide[1:]
    assert sequence.loss_mask.tolist() == [float(t > 2) for t in wide[1:]]
    for start in sequence.image_starts:
        assert wide[start : start + patches] == [0] * patches


def test_padding_is_a_piece_of_its_own():
    sequence = lay_out(np.arange(5, dtype=np.int32) + 1, np.ones(5, np.uint8), [], 0, 1)
    batch = assemble([[sequence], [sequence, sequence]], 10, SHAPE)
    assert batch.cu_seqlens.tolist() == [0, 4, 10, 14, 18, 20]
    assert batch.segment_ids_T.tolist() == [0] * 4 + [-1] * 6 + [2] * 4 + [3] * 4 + [-1] * 2


def test_prefetch_raises_what_its_source_raised():
    def items():
        yield 1
        raise ValueError("the disk is gone")

    ahead = prefetch(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the disk is gone"):
        next(ahead)
