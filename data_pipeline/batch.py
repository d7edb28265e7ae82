"""A packed batch: what one micro-batch of one data-parallel rank looks like."""

import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from armillary.data_pipeline.shuffle import key_of


@dataclass(frozen=True)
class ImageShape:
    """Images are resized to `size` x `size` pixels and cut into square patches of `patch` pixels.

    Squares of `merge` x `merge` patches share one position of the decoder. Pixels in [0, 1] are given to the
    model as (pixel - mean) / std.
    """

    size: int
    patch: int
    merge: int = 1
    mean: float = 0.5
    std: float = 0.5

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.size // self.patch) ** 2

    @property
    def positions(self) -> int:
        """Decoder positions of one image."""
        return self.patches // self.merge**2

    @property
    def patch_dim(self) -> int:
        """Numbers in one RGB patch."""
        return 3 * self.patch**2


@dataclass(frozen=True)
class Sequence:
    """A document laid out on positions: n tokens predict the n labels one place further on."""

    tokens: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n]
    loss_mask: np.ndarray  # float32 [n]
    images: list[bytes]
    image_starts: np.ndarray  # int64 [images]
    source: int = 0  # number of its source in `data.sources`
    variation: int | None = None  # names the random variation of its images; None: as they are

    def part(self, start: int, stop: int) -> "Sequence":
        """Positions [start, stop) on their own; images stay with a part only where it is the whole."""
        whole = stop - start == len(self.tokens)
        assert whole or not self.images, "a document with images is never cut"
        span = slice(start, stop)
        return replace(self, tokens=self.tokens[span], labels=self.labels[span], loss_mask=self.loss_mask[span])


@dataclass(frozen=True)
class PackedBatch:
    """Several rows of packed documents, flattened to T = rows x seq_length positions.

    Documents never see each other: attention is causal within each [cu_seqlens[i], cu_seqlens[i+1]).
    An image takes `ImageShape.positions` consecutive positions, whose tokens are all the image token.
    """

    tokens_T: np.ndarray  # int64
    labels_T: np.ndarray  # int64: the next token of the same document
    loss_mask_T: np.ndarray  # float32: 1 where the label is learned
    segment_ids_T: np.ndarray  # int32: 0, 1, ... within the batch; -1 for padding
    source_ids_T: np.ndarray  # int32: number of the document's source in `data.sources`; -1 for padding
    positions_T: np.ndarray  # int64: from 0 in each piece
    cu_seqlens: np.ndarray  # int32 [pieces + 1]
    patches_IND: np.ndarray  # float32: images x patches x patch_dim, (pixel - mean) / std
    image_starts_I: np.ndarray  # int64: first position of each image


def patchify(data: bytes, shape: ImageShape, variation: int | None = None) -> np.ndarray:
    """Decode an image file into patches: float32 [patches, patch_dim], normalised as `shape` says.

    Row by row; with merging, the patches of one decoder position stand together.
    """
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    if rgb.size != (shape.size, shape.size):
        rgb = rgb.resize((shape.size, shape.size), Image.Resampling.BICUBIC)
    pixels = (np.asarray(rgb, np.float32) / 255 - shape.mean) / shape.std
    if variation is not None:
        pixels = vary(pixels, variation)
    side, m, p = shape.size // (shape.patch * shape.merge), shape.merge, shape.patch
    cells = pixels.reshape(side, m, p, side, m, p, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    return cells.reshape(shape.patches, shape.patch_dim)


def vary(pixels: np.ndarray, variation: int) -> np.ndarray:
    """A mirrored (or not) and shifted copy of square pixels [size, size, 3], named by a 64-bit number.

    Shifts are up to an eighth of the image each way; the edge's pixels fill what comes in.
    """
    reach = len(pixels) // 8
    mirror, rest = variation & 1, variation >> 1
    down, right = rest % (2 * reach + 1), (rest >> 31) % (2 * reach + 1)
    wide = np.pad(pixels[:, ::-1] if mirror else pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    return wide[down : down + len(pixels), right : right + len(pixels)]


def lay_out(tokens: np.ndarray, learned: np.ndarray, images: list[bytes], image: int, positions: int) -> Sequence:
    """Widen each image token to `positions` positions and shift: tokens [n + 1] -> a Sequence."""
    repeats = np.where(tokens == image, positions, 1)
    wide, learn = np.repeat(tokens, repeats).astype(np.int64), np.repeat(learned, repeats).astype(np.float32)
    starts = (np.cumsum(repeats) - repeats)[tokens == image]
    return Sequence(wide[:-1], wide[1:], learn[1:], images, starts.astype(np.int64))


def assemble(rows: list[list[Sequence]], seq_length: int, shape: ImageShape, with_images: bool = True) -> PackedBatch:
    """Lay sequences one behind another in rows of `seq_length` positions (each row's sum at most that).

    `with_images=False` leaves the patches out, for a pipeline stage that never sees them.
    """
    total = len(rows) * seq_length
    tokens, labels = np.zeros(total, np.int64), np.zeros(total, np.int64)
    loss_mask, positions = np.zeros(total, np.float32), np.zeros(total, np.int64)
    segments, sources = np.full(total, -1, np.int32), np.full(total, -1, np.int32)
    bounds, images, starts = [0], [], []
    for number, row in enumerate(rows):
        at, row_end = number * seq_length, (number + 1) * seq_length
        for sequence in row:
            place = slice(at, at + len(sequence.tokens))
            tokens[place], labels[place] = sequence.tokens, sequence.labels
            loss_mask[place], sources[place] = sequence.loss_mask, sequence.source
            segments[place], positions[place] = len(bounds) - 1, np.arange(place.stop - at)
            images += [(image, _one_of(sequence.variation, i)) for i, image in enumerate(sequence.images)]
            starts += [at + start for start in sequence.image_starts]
            at = place.stop
            bounds.append(at)
        if at < row_end:  # padding is a piece of its own, which no loss and no document sees
            positions[at:row_end] = np.arange(row_end - at)
            bounds.append(row_end)
    patches = np.zeros((0, shape.patches, shape.patch_dim), np.float32)
    if with_images and images:
        patches = np.stack([patchify(image, shape, variation) for image, variation in images])
    return PackedBatch(
        tokens_T=tokens,
        labels_T=labels,
        loss_mask_T=loss_mask,
        segment_ids_T=segments,
        source_ids_T=sources,
        positions_T=positions,
        cu_seqlens=np.asarray(bounds, np.int32),
        patches_IND=patches,
        image_starts_I=np.asarray(starts, np.int64),
    )


def _one_of(variation: int | None, number: int) -> int | None:
    """The variation of a sequence's image `number`."""
    return None if variation is None else int(key_of(variation, number))
