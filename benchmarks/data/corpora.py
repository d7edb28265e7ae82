"""The corpora that every contender reads: documents of random tokens, and JPEGs with captions. Made once, by seed."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SEQ_LENGTH = 2048
DOCUMENTS, TOKENS_A_DOCUMENT, VOCABULARY = 125_000, 800, 32_000  # about 100 million tokens of 16 bits
PICTURES, SIDE = 20_000, 256  # about 8 kilobytes each


def lengths() -> np.ndarray:
    """Tokens of each document, int64: log-normal about a mean of 800."""
    drawn = np.random.default_rng(0).lognormal(np.log(TOKENS_A_DOCUMENT) - 0.32, 0.8, DOCUMENTS)
    return np.maximum(drawn.astype(np.int64), 4)


def text(folder: Path) -> Path:
    """All tokens behind each other, uint16, in one file."""
    path = folder / "tokens.bin"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokens = np.random.default_rng(1).integers(3, VOCABULARY, int(lengths().sum()), np.uint16)
        tokens.tofile(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return path


def pictures(folder: Path) -> Path:
    """A folder of JPEGs, 00000.jpg to 19999.jpg, and captions.json with a caption for each."""
    path = folder / "pictures"
    if not (path / "captions.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(2)
        for number in range(PICTURES):
            small = rng.integers(0, 256, (20, 20, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "jpeg", quality=80)
            (path / f"{number:05d}.jpg").write_bytes(file.getvalue())
        words = ["a", "red", "blue", "picture", "of", "some", "coloured", "cloud", "and", "its", "shadow"]
        captions = [" ".join(rng.choice(words, 12)) for _ in range(PICTURES)]
        (path / "captions.json").write_text(json.dumps(captions))
    return path
