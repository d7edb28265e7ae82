import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.data_pipeline.build import build
from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.folder import LocalFolder
from armillary.data_pipeline.images import ImageShape, patchify
from armillary.data_pipeline.loader import Loader
from armillary.data_pipeline.mixture import BLOCK_ROWS
from armillary.data_pipeline.prefetch import prefetch
from armillary.data_pipeline.shards import read_manifest, write_manifest
from armillary.errors import DataError
from tests.data_pipeline.plain import decoded, lay_out
from tests.data_pipeline.test_sources import lines, png

SHAPE = ImageShape(64, 16)
WORLDS = (1, 2, 3, 4, 8, 64)
ROWS = 192  # of a global batch: every world divides it


def loader_of(tables, **changes):
    return Loader(DataConfig.model_validate(tables["data"] | changes), SHAPE)


@pytest.fixture(scope="module")
def loader(tables):
    return loader_of(tables)


def row_names(rows):
    """(block, row) of each row."""
    return [(part.block.number, row) for part in rows for row in range(part.first, part.last)]


def contents(batch):
    """A batch's rows as comparable bytes."""
    fields = (batch.tokens_T, batch.labels_T, batch.loss_mask_T, batch.positions_T, batch.source_ids_T)
    return [b"".join(field[at : at + 128].tobytes() for field in fields) for at in range(0, len(batch.tokens_T), 128)]


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_rows_hold_every_document_that_their_block_draws(tables, packing):
    """Against documents read back and laid out one by one in plain Python."""
    loader = loader_of(tables, packing=packing)
    block = loader.plan.block(3)
    rows, _ = loader.plan.rows(Cursor(block=3), block.packed.rows)
    batch = loader.batch(rows, with_images=False)
    image, seen, whole = loader.tokenizer.image, Counter(), {}
    for piece in loader.documents(rows):
        one, document = (
            lay_out(decoded(piece.columns, piece.place), image, SHAPE.positions),
            (piece.source, piece.number),
        )
        start, stop = piece.start, piece.stop
        where = slice(piece.at, piece.at + stop - start)
        assert batch.tokens_T[where].tolist() == one.tokens[start:stop]
        assert batch.labels_T[where].tolist() == one.labels[start:stop]
        assert batch.loss_mask_T[where].tolist() == one.mask[start:stop]
        assert not any(start < place < stop < place + SHAPE.positions for place in one.image_starts), "an image is cut"
        seen.update((*document, position) for position in range(start, stop))
        whole[document] = len(one.tokens)
    # A block may draw a document more than once, in several epochs.
    drawn = Counter(zip(block.source.tolist(), block.document.tolist(), strict=True))
    assert set(whole) == set(drawn)
    assert seen == {(*d, position): drawn[d] for d, length in whole.items() for position in range(length)}
    assert seen.total() == block.packed.positions


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_documents_of_every_form_come_as_they_are(tmp_path, packing, compression):
    """Texts, weights, roles and several images, over shards of several batches, in rows that cut some of them."""
    generator = np.random.default_rng(0)
    (tmp_path / "more").mkdir()
    for number in range(5):
        (tmp_path / "more" / f"{number}.png").write_bytes(png(number))
    forms = []
    for number in range(200):
        text, image = "a few words " * int(generator.integers(1, 40)), {"image": f"{number % 5}.png"}
        other = {"image": f"{(number + 1) % 5}.png"}
        forms.append([
            {"text": text},
            {"text": text, "weight": 2.5},
            {"question": text, "answer": f"{number}"},
            {"parts": [{"text": text}, image, other, {"prompt": text}, {"answer": "so"}, image], "weight": 0.5},
            {"parts": [image, {"text": text}, other]},
        ][number % 5])  # fmt: skip
    lines(tmp_path / "more" / "x.jsonl", *forms)
    texts = lines(tmp_path / "texts.jsonl", *({"text": f"only text {number}"} for number in range(50)))
    config = DataConfig(
        path=str(tmp_path / "shards"), seq_length=96, packing=packing, compression=compression, shard_bytes=20_000,
        sources=[
            {"kind": "jsonl", "name": "more", "path": str(tmp_path / "more"), "weight": 3},
            {"kind": "jsonl", "name": "texts", "path": str(texts)},
        ],
    )  # fmt: skip
    build(config)
    loader = Loader(config, ImageShape(16, 8))
    rows, _ = loader.plan.rows(Cursor(row=7), 300)
    batch = loader.batch(rows)
    image, files, roles = loader.tokenizer.image, [], set()
    for piece in loader.documents(rows):
        document = decoded(piece.columns, piece.place)
        one, where = lay_out(document, image, 4), slice(piece.at, piece.at + piece.stop - piece.start)
        assert batch.tokens_T[where].tolist() == one.tokens[piece.start : piece.stop]
        assert batch.labels_T[where].tolist() == one.labels[piece.start : piece.stop]
        assert batch.loss_mask_T[where].tolist() == one.mask[piece.start : piece.stop]
        assert set(batch.source_ids_T[where]) == {piece.source}
        shown = [piece.start <= start < piece.stop for start in one.image_starts]
        files += [data for (_, data), here in zip(document.images, shown, strict=True) if here]
        roles.add((bool(document.spans), bool(document.images), document.weight))
    assert np.array_equal(batch.patches_IND, np.stack([patchify(file, ImageShape(16, 8)) for file in files]))
    assert len(files) > 50
    assert len(roles) == 5


@given(st.sampled_from(WORLDS), st.sampled_from((1, 3)))
@settings(max_examples=8, deadline=None)
def test_every_number_of_ranks_is_given_the_same_rows(loader, ranks, micro_batch):
    micro_batch = micro_batch if ROWS // ranks % micro_batch == 0 else 1
    planned, after = loader.plan.rows(Cursor(), ROWS)
    delivered = []
    for rank in range(ranks):
        steps = loader.steps(Cursor(), ROWS, micro_batch, rank, ranks, with_images=False)
        step = next(steps)
        assert step.after == after
        delivered += [row for batch in step.micro_batches for row in contents(batch)]
    assert delivered == contents(loader.batch(planned, with_images=False))


@given(st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(1, 5)), min_size=1, max_size=6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_change_of_the_number_of_ranks_loses_or_repeats_a_row(loader, changes, other_batch):
    """Each stretch of a run has its own number of ranks (and perhaps rows a step): together they deliver the rows of
    one uninterrupted process, in its order."""
    cursor, delivered = Cursor(), []
    for ranks, steps in changes:
        rows = 64 * ranks if other_batch else ROWS
        for _ in range(steps):
            planned, after = loader.plan.rows(cursor, rows)
            share = rows // ranks
            for rank in range(ranks):
                names = row_names(planned)[rank * share : (rank + 1) * share]
                delivered += names
            cursor = after
    whole, end = loader.plan.rows(Cursor(), len(delivered))
    assert delivered == row_names(whole)
    assert end == cursor


def test_batches_hold_whole_documents_with_their_images(loader):
    rows, _ = loader.plan.rows(Cursor(), 8)
    batch = loader.batch(rows)
    files = [data for piece in loader.documents(rows) for _, data in decoded(piece.columns, piece.place).images]
    assert len(files) > 10
    assert np.array_equal(batch.patches_IND, np.stack([patchify(file, SHAPE) for file in files]))
    for start in batch.image_starts_I:
        assert (batch.tokens_T[start : start + 16] == loader.tokenizer.image).all()
        assert not batch.loss_mask_T[start : start + 15].any()
    for low, high in itertools.pairwise(batch.cu_seqlens):
        assert np.array_equal(batch.positions_T[low:high], np.arange(high - low))
    assert set(batch.piece_sources) == {-1, 0, 1}


@pytest.mark.parametrize("packing", ["greedy", "windows"])
def test_damaged_text_is_not_trained_on(tables, shards, tmp_path, packing):
    copy = shutil.copytree(shards, tmp_path / "shards")
    (path,) = copy.glob("pydoc-*[0-9].arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    loader = loader_of(tables, path=str(copy), sources=[{"kind": "pydoc"}], packing=packing)
    with pytest.raises(DataError, match=r"batch \d+ of a shard is corrupted"):
        loader.batch(loader.plan.rows(Cursor(), 2000)[0])


@pytest.mark.parametrize(
    "tokens_at",
    ["far", "negative", "a token too far", "wraps", "huge", "few documents", "compressed", "no such role"],
)
def test_an_index_that_does_not_fit_its_shard_is_not_followed(tables, shards, tmp_path, tokens_at):
    copy = tmp_path / "shards"
    if tokens_at == "compressed":
        data = tables["data"] | {"path": str(copy), "sources": [{"kind": "pydoc"}], "compression": "zstd"}
        build(DataConfig.model_validate(data))
    else:
        shutil.copytree(shards, copy)
    manifest = read_manifest(LocalFolder(copy))
    (shard,) = manifest.sources["pydoc"]
    index = pa.ipc.open_file((copy / shard.index_file).read_bytes()).read_all()
    beyond = shard.bytes - 2 * shard.batch_tokens[-1] + 2
    wraps = {"wraps": 2**63 - 8, "huge": 2**64}
    at = (wraps | {"far": 1 << 40, "negative": -64, "a token too far": beyond}).get(tokens_at, 0)
    if tokens_at == "compressed":
        first = pa.array(index["first"].to_numpy() + (1 << 20), pa.uint32())
        index = index.set_column(index.column_names.index("first"), index.schema.field("first"), first)
    if tokens_at == "no such role":
        column = index.schema.get_field_index("spans")
        spans = pa.array([[{"end": 5, "role": 9}]] * len(index), index.schema.field(column).type)
        index = index.set_column(column, index.schema.field(column), spans)
        index = index.replace_schema_metadata(index.schema.metadata | {b"mixed": b"true"})
    batches = [batch | {"tokens_at": at} for batch in json.loads(index.schema.metadata[b"batches"])]
    if tokens_at == "few documents":
        batches[-1]["documents"] -= 1
    index = index.replace_schema_metadata(index.schema.metadata | {b"batches": json.dumps(batches)})
    with pa.ipc.new_file(str(copy / shard.index_file), index.schema) as writer:
        writer.write_table(index)
    content = (copy / shard.index_file).read_bytes()
    shard = shard.model_copy(update={"index_bytes": len(content), "index_xxh3": xxhash.xxh3_64_hexdigest(content)})
    write_manifest(copy, manifest.model_copy(update={"sources": manifest.sources | {"pydoc": (shard,)}}).sealed())
    loader = loader_of(tables, path=str(copy), sources=[{"kind": "pydoc"}])
    with pytest.raises(DataError, match="does not fit its shard"):
        loader.batch(loader.plan.rows(Cursor(), 8)[0])


def test_damage_is_found_in_any_batch_of_any_shard(tables, tmp_path):
    data = tables["data"] | {"path": str(tmp_path / "shards"), "sources": [{"kind": "pydoc"}], "shard_bytes": 1 << 17}
    config = DataConfig.model_validate(data)
    (shards,) = build(config).sources.values()
    assert len(shards) > 2
    assert len(shards[1].batch_tokens) > 2
    path = tmp_path / "shards" / shards[1].file
    whole = path.read_bytes()
    metadata = pa.ipc.open_file(tmp_path / "shards" / shards[1].index_file).schema.metadata
    for number, batch in enumerate(json.loads(metadata[b"batches"])):
        content = bytearray(whole)
        content[(batch["start"] + batch["stop"]) // 2] ^= 1
        path.write_bytes(content)
        loader = Loader(config, SHAPE)
        with pytest.raises(DataError, match=f"batch {number} of a shard is corrupted") as error:
            loader.batch(loader.plan.rows(Cursor(), loader.plan.block(0).packed.rows)[0])
        assert error.value.where == str(path)


def test_a_batch_over_the_end_of_a_block_is_its_two_halves(loader):
    rows = loader.plan.block(0).packed.rows
    both = loader.batch(loader.plan.rows(Cursor(row=rows - 5), 9)[0])
    halves = [
        loader.batch(loader.plan.rows(Cursor(row=rows - 5), 5)[0]),
        loader.batch(loader.plan.rows(Cursor(block=1), 4)[0]),
    ]
    assert all(len(half.image_starts_I) for half in halves)
    for name in ("tokens_T", "labels_T", "loss_mask_T", "positions_T", "source_ids_T", "patches_IND"):
        assert np.array_equal(getattr(both, name), np.concatenate([getattr(half, name) for half in halves])), name
    starts = [halves[0].image_starts_I, halves[1].image_starts_I + len(halves[0].tokens_T)]
    assert np.array_equal(both.image_starts_I, np.concatenate(starts))


def test_threads_decode_the_same_images(tables, loader):
    several = Loader(DataConfig.model_validate(tables["data"]), SHAPE, threads=2)
    rows, _ = loader.plan.rows(Cursor(), 8)
    assert np.array_equal(several.batch(rows).patches_IND, loader.batch(rows).patches_IND)


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_text_fills_its_rows(tables, packing):
    packed = loader_of(tables, sources=[{"kind": "pydoc"}], packing=packing).plan.block(1).packed
    assert packed.positions >= 0.98 * 128 * packed.rows


def test_windows_are_stretches_of_the_token_stream(tables):
    loader = loader_of(tables, sources=[{"kind": "pydoc"}], packing="windows")
    (corpus,) = loader.corpora
    batch = loader.batch(loader.plan.rows(Cursor(), 1024)[0])  # less than an epoch
    columns = corpus._corpus.columns(0, 0)
    stream = [columns.tokens[at : at + 129].tolist() for at in range(0, len(columns.tokens) - 128, 128)]
    assert corpus.documents == len(stream)
    rows = zip(batch.tokens_T.reshape(-1, 128).tolist(), batch.labels_T[127::128].tolist(), strict=True)
    drawn = {(*row, label) for row, label in rows}
    assert len(drawn) == 1024
    assert drawn <= set(map(tuple, stream))
    assert (batch.loss_mask_T == 1).all()
    assert np.array_equal(batch.cu_seqlens, np.arange(0, len(batch.tokens_T) + 1, 128))
    both = loader_of(tables, sources=[{"kind": "pydoc"}], packing="windows", schedule=[])
    rows, _ = both.plan.rows(Cursor(row=BLOCK_ROWS - 24), 40)  # over the end of a block
    joined = [
        both.batch(both.plan.rows(Cursor(row=BLOCK_ROWS - 24), 24)[0]),
        both.batch(both.plan.rows(Cursor(block=1), 16)[0]),
    ]
    assert np.array_equal(both.batch(rows).tokens_T, np.concatenate([one.tokens_T for one in joined]))
    assert np.array_equal(both.batch(rows).labels_T, np.concatenate([one.labels_T for one in joined]))
    with pytest.raises(DataError, match="has images"):
        loader_of(tables, packing="windows")
    with pytest.raises(DataError, match="no window of"):
        loader_of(tables, sources=[{"kind": "pydoc"}], packing="windows", seq_length=10**7)


def test_a_stage_without_images_gets_no_patches(loader):
    rows, _ = loader.plan.rows(Cursor(), 4)
    full, bare = loader.batch(rows), loader.batch(rows, with_images=False)
    assert np.array_equal(full.tokens_T, bare.tokens_T)
    assert len(full.patches_IND)
    assert not len(bare.patches_IND)


def test_a_stage_in_the_middle_gets_bounds_and_reads_no_shard(tables, loader):
    rows, _ = loader.plan.rows(Cursor(row=BLOCK_ROWS - 2), 4)
    bare = loader_of(tables)
    bounds = bare.batch(bare.plan.rows(Cursor(row=BLOCK_ROWS - 2), 4)[0], with_tokens=False)
    assert np.array_equal(bounds.cu_seqlens, loader.batch(rows).cu_seqlens)
    assert not len(bounds.tokens_T)
    assert not any(corpus.reader(0).checked.any() for corpus in bare.corpora)
    assert any(corpus.reader(0).checked.any() for corpus in loader.corpora)


def test_augmented_images_differ_by_sample_and_not_by_rank(tables):
    plain = loader_of(tables, sources=[{"kind": "easy_vqa", "augment": True}])
    same = loader_of(tables, sources=[{"kind": "easy_vqa"}])
    rows, _ = plain.plan.rows(Cursor(), 4)
    varied, original = plain.batch(rows), same.batch(same.plan.rows(Cursor(), 4)[0])
    assert np.array_equal(varied.tokens_T, original.tokens_T)
    assert (varied.patches_IND != original.patches_IND).any((1, 2)).mean() > 0.8
    (first, _), (second, _) = plain.plan.rows(Cursor(), 2), plain.plan.rows(Cursor(row=2), 2)
    halves = np.concatenate([plain.batch(first).patches_IND, plain.batch(second).patches_IND])
    assert np.array_equal(halves, varied.patches_IND)


def test_weights_are_shares_of_the_positions(tables):
    sources = [{"kind": "easy_vqa", "weight": 3.0}, {"kind": "pydoc", "weight": 1.0}]
    loader = loader_of(tables, sources=sources)
    rows, _ = loader.plan.rows(Cursor(), 4000)
    sources = loader.batch(rows, with_images=False).source_ids_T
    assert abs((sources == 0).sum() / (sources >= 0).sum() - 0.75) < 0.03


def test_a_schedule_changes_nothing_before_it_holds(tables):
    later = [{"from_positions": BLOCK_ROWS * 128 * 2, "weights": {"easy_vqa": 0.0}}]
    before, changed = loader_of(tables), loader_of(tables, schedule=later)
    for number in (0, 1):
        assert np.array_equal(before.plan.block(number).document, changed.plan.block(number).document)
    assert set(before.plan.block(2).source) == {0, 1}
    assert set(changed.plan.block(2).source) == {1}


def test_an_image_longer_than_a_row_is_refused(tables):
    with pytest.raises(DataError, match="an image takes 16 positions, a row has 15"):
        loader_of(tables, seq_length=15)


def test_a_document_with_images_longer_than_a_row_is_cut_between_them(tables):
    """Questions of 25 positions in rows of 20: their image stays whole."""
    loader = loader_of(tables, seq_length=20, sources=[{"kind": "easy_vqa"}])
    rows, _ = loader.plan.rows(Cursor(), 500)
    batch = loader.batch(rows)
    assert (batch.tokens_T == loader.tokenizer.image).sum() == 16 * len(batch.image_starts_I)
    assert len(batch.patches_IND) == len(batch.image_starts_I) > 200


def test_prefetch_ends_with_its_source():
    assert list(prefetch(iter(range(5)), 2)) == list(range(5))


def test_prefetch_raises_what_its_source_raised():
    def items():
        yield 1
        raise ValueError("the disk is gone")

    ahead = prefetch(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the disk is gone"):
        next(ahead)
