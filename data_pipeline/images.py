"""Image files to patches: the one path that training, evaluation and generation share."""

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from armillary.errors import DataError

MAX_PIXELS = 64_000_000  # decoded, this is 192 MB; larger files are refused before they are decoded
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageShape:
    """Images are resized to `size` x `size` pixels and cut into square patches of `patch` pixels.

    Squares of `merge` x `merge` patches share one position of the decoder.
    """

    size: int
    patch: int
    merge: int = 1

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


def decode(data: bytes | memoryview | np.ndarray, least: int = 0) -> np.ndarray:
    """An image file's pixels, uint8 [height, width, 3]. DataError where it is no whole image, or a huge one.

    A JPEG may come out at a half, a quarter or an eighth of its size, as long as both sides keep `least` pixels; 0:
    at its full size.
    """
    try:
        if bytes(data[:3]) == b"\xff\xd8\xff":
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            _refuse_huge(width, height)
            if colours in ("RGB", "YCbCr", "Gray"):
                sides = {"min_height": min(least, height), "min_width": min(least, width)} if least else {}
                return simplejpeg.decode_jpeg(data, "RGB", **sides)
        with Image.open(io.BytesIO(data)) as image:
            _refuse_huge(*image.size)
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        reason = "it is of no known format"
    except UNREADABLE as error:
        reason = str(error)
    raise DataError(f"an image cannot be decoded: {reason}", "", "repair or remove the file")


def _refuse_huge(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}")


def patchify(
    data: bytes | memoryview | np.ndarray,
    shape: ImageShape,
    variation: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode an image file into patches: uint8 [patches, patch_dim], those of `out` where it is given.

    Row by row; with merging, the patches of one decoder position stand together.
    """
    out = np.empty((shape.patches, shape.patch_dim), np.uint8) if out is None else out
    pixels = decode(data, shape.size)
    if pixels.shape[:2] != (shape.size, shape.size):
        image = Image.fromarray(pixels)
        pixels = np.asarray(image.resize((shape.size, shape.size), Image.Resampling.BICUBIC, reducing_gap=3.0))
    if variation is not None:
        pixels = vary(pixels, variation)
    side, m, p = shape.size // (shape.patch * shape.merge), shape.merge, shape.patch
    cells = pixels.reshape(side, m, p, side, m, p * 3).transpose(0, 3, 1, 4, 2, 5)
    out.reshape(cells.shape)[...] = cells  # one copy, straight to where a batch wants it
    return out


def vary(pixels: np.ndarray, variation: int) -> np.ndarray:
    """A mirrored (or not) and shifted copy of square pixels [size, size, 3], named by a 64-bit number.

    Shifts are up to an eighth of the image each way; the edge's pixels fill what comes in.
    """
    reach = len(pixels) // 8
    mirror, rest = variation & 1, variation >> 1
    down, right = rest % (2 * reach + 1), (rest >> 31) % (2 * reach + 1)
    wide = np.pad(pixels[:, ::-1] if mirror else pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    return wide[down : down + len(pixels), right : right + len(pixels)]
