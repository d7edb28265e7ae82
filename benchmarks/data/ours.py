"""Armillary itself, in the same form as the peers."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from armillary.data_pipeline.config import DataConfig
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.document import Encoded, Role
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.loader import Loader
from armillary.data_pipeline.shards import FORMAT, MANIFEST, Manifest, schema_of, write_manifest
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.data_pipeline.write import write_shards
from benchmarks.data import corpora, peers

SHAPE = ImageShape(256, 32)  # 64 positions an image


class Armillary:
    """Shards written by the builder's own writer, read by the trainer's own loader."""

    def prepare_text(self, folder: Path) -> None:
        if (folder / "armillary" / MANIFEST).exists():
            return
        tokens = np.fromfile(corpora.text(folder), np.uint16)
        parts = [part.tolist() for part in np.split(tokens, np.cumsum(corpora.lengths())[:-1])]
        texts = (Encoded(tokens=part) for part in parts)
        _write(
            folder / "armillary",
            {"text": texts, "images": _captioned(folder), "interleaved": _interleaved(folder, parts)},
        )

    prepare_images = prepare_text

    def text(self, folder: Path) -> Iterator[int]:
        """Windows of the token stream, with labels, masks and positions."""
        yield from _batches(loader(folder / "armillary", "windows", "text"))

    def packed(self, folder: Path) -> Iterator[int]:
        """Documents packed greedily, none seeing another."""
        yield from _batches(loader(folder / "armillary", "greedy", "text"))

    def written(self, folder: Path) -> Iterator[int]:
        """The same, with what follows from a batch."""
        made = loader(folder / "armillary", "greedy", "text")
        for rows in _rows(made):
            batch = made.batch(rows)
            yield len(batch.labels_T) + 0 * len(batch.positions_T)

    def among(self, folder: Path) -> Iterator[int]:
        """The documents, each sixth with an image in its middle, packed greedily; the images are left as they are."""
        yield from _batches(loader(folder / "armillary", "greedy", "interleaved"), with_images=False)

    def captions(self, folder: Path) -> Iterator[int]:
        """Documents, and images with captions for a quarter of the positions; otherwise the same."""
        yield from _batches(loader(folder / "armillary", "greedy", "text", "images"), with_images=False)

    def images(self, folder: Path) -> Iterator[memoryview]:
        made = loader(folder / "armillary", "greedy", "images")
        for part in itertools.chain.from_iterable(_rows(made)):
            yield from made.locator.pieces(part, with_images=True).images

    def patches(self, folder: Path, threads: int) -> Iterator[int]:
        """Images a batch of about 64, with their captions, as the model takes them: pixels in the order of patches."""
        made = loader(folder / "armillary", "greedy", "images", threads=threads)
        for rows in _rows(made, peers.BATCH * SHAPE.positions // corpora.SEQ_LENGTH):
            yield len(made.batch(rows).patches_IND)


def loader(path: Path, packing: str, *names: str, threads: int = 1) -> Loader:
    weights = {"text": 0.75, "images": 0.25, "interleaved": 1.0}
    sources = [{"kind": "jsonl", "name": name, "path": "benchmarks", "weight": weights[name]} for name in names]
    config = {"path": str(path), "sources": sources, "seq_length": corpora.SEQ_LENGTH, "packing": packing}
    return Loader(DataConfig.model_validate(config), SHAPE, threads)


def _rows(made: Loader, count: int = peers.BATCH) -> Iterator[list]:
    cursor = Cursor()
    while True:
        rows, cursor = made.plan.rows(cursor, count)
        yield rows


def _batches(made: Loader, with_images: bool = True) -> Iterator[int]:
    for rows in _rows(made):
        yield len(made.batch(rows, with_images=with_images).tokens_T)


def _captioned(folder: Path) -> Iterator[Encoded]:
    paths, captions = peers.files(folder)
    for path, caption in zip(paths, captions, strict=True):
        tokens = [1, *(3 + ord(letter) for letter in caption), 0]
        yield Encoded(tokens, [(1, Role.PROMPT), (len(tokens), Role.TEXT)], [(0, path.read_bytes())], path.name)


def _interleaved(folder: Path, texts: list[list[int]]) -> Iterator[Encoded]:
    paths, _ = peers.files(folder)
    for number, tokens in enumerate(texts):
        middle, path = len(tokens) // 2, paths[number // 6 % len(paths)]
        if number % 6:
            yield Encoded(tokens)
            continue
        ends = [(middle, Role.TEXT), (middle + 1, Role.PROMPT), (len(tokens) + 1, Role.TEXT)]
        yield Encoded([*tokens[:middle], 1, *tokens[middle:]], ends, [(middle, path.read_bytes())])


def _write(folder: Path, sources: dict) -> None:
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.train(itertools.repeat("some text", 10), corpora.VOCABULARY)
    schema, text = schema_of(corpora.VOCABULARY), tokenizer.to_json()
    shards = {
        name: tuple(write_shards(folder, name, documents, schema, 128 << 20)) for name, documents in sources.items()
    }
    manifest = Manifest(
        format=FORMAT, arrow_schema=str(schema), built_from={}, tokenizer=text,
        tokenizer_xxh3=xxhash.xxh3_64_hexdigest(text.encode()), sources=shards, reports={}, substrings={},
    )  # fmt: skip
    write_manifest(folder, manifest.sealed())
