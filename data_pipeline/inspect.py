"""Looking at shards: what they hold in figures, a few documents, and a sheet of pictures with their captions."""

import textwrap
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from armillary.data_pipeline.corpus import Corpus
from armillary.data_pipeline.folder import Folder
from armillary.data_pipeline.images import decode
from armillary.data_pipeline.shards import Columns, Manifest
from armillary.data_pipeline.shuffle import key_of, permute
from armillary.data_pipeline.tokenizer import Tokenizer

QUANTILES = (0, 10, 50, 90, 99, 100)
SAMPLED = 100_000  # documents whose lengths the quantiles are taken from
TILE, CAPTION, COLUMNS = 160, 44, 6  # pixels of a picture and of the text below it; pictures side by side


def statistics(folder: Folder, manifest: Manifest) -> dict[str, dict]:
    """Counts of each source, what was dropped, and quantiles of its documents' tokens."""
    tokenizer, found = Tokenizer.from_json(manifest.tokenizer), {}
    for source, report in manifest.reports.items():
        corpus = Corpus(folder, manifest, source, tokenizer)
        tokens = corpus.look_up(_sample(corpus, SAMPLED, seed=0)).tokens
        quantiles = np.percentile(tokens, QUANTILES, method="nearest").astype(int).tolist()
        found[source] = report.model_dump(exclude={"examples"}) | {
            "shards": len(manifest.sources[source]),
            "tokens_per_document": dict(zip([f"{q}%" for q in QUANTILES], quantiles, strict=True)),
        }
    return found


def samples(folder: Folder, manifest: Manifest, source: str, count: int, seed: int = 0) -> list[dict]:
    """`count` documents of a source, drawn by `seed`: name, number, tokens, text and images (files' bytes)."""
    tokenizer = Tokenizer.from_json(manifest.tokenizer)
    corpus = Corpus(folder, manifest, source, tokenizer)
    drawn = np.sort(_sample(corpus, count, seed))
    found = []
    entries = corpus.look_up(drawn)
    places = (drawn, entries.shard, entries.batch, entries.row)
    for document, shard, batch, row in zip(*(column.tolist() for column in places), strict=True):
        columns = corpus.columns(shard, batch)
        tokens = columns.tokens[columns.offsets[row] : columns.offsets[row + 1]].tolist()
        found.append({
            "name": columns.names[row].as_py(),
            "number": document,
            "tokens": len(tokens),
            "text": _readable(tokens, tokenizer),
            "images": list(_images(columns, row)),
        })  # fmt: skip
    return found


def contact_sheet(documents: list[dict]) -> Image.Image | None:
    """The pictures of `samples` side by side, each with its document's number and the beginning of its text; None where
    there are none."""
    pictures = [(image, f"#{one['number']} {one['text']}") for one in documents for image in one["images"]]
    if not pictures:
        return None
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (data, text) in enumerate(pictures):
        left, top = number % COLUMNS * TILE, number // COLUMNS * (TILE + CAPTION)
        picture = Image.fromarray(decode(data, TILE))
        picture.thumbnail((TILE - 8, TILE - 8))
        sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        for line, words in enumerate(textwrap.wrap(text, 26, max_lines=3, placeholder=" ...")):
            draw.text((left + 4, top + TILE + 14 * line), words, fill="black")
    return sheet


def _sample(corpus: Corpus, count: int, seed: int) -> np.ndarray:
    return permute(np.arange(min(count, corpus.documents)), corpus.documents, key_of(seed))


def _readable(tokens: list[int], tokenizer: Tokenizer) -> str:
    """The text, with a mark where an image stands or an answer begins."""
    marks = {tokenizer.image: "[image] ", tokenizer.answer: " [answer] ", tokenizer.end: ""}
    pieces, text = [], []
    for token in tokens:
        if token in marks:
            pieces += [tokenizer.decode(text), marks[token]]
            text = []
        else:
            text.append(token)
    return "".join([*pieces, tokenizer.decode(text)])


def _images(columns: Columns, row: int) -> Iterator[bytes]:
    for number in range(columns.image_offsets[row], columns.image_offsets[row + 1]):
        yield columns.image(number).tobytes()
