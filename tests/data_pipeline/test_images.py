import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from armillary.data_pipeline.images import ImageShape, decode, patchify, vary
from armillary.data_pipeline.shuffle import key_of
from armillary.errors import DataError

SHAPE = ImageShape(64, 16)


def file_of(image, kind="png", **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_patches_are_the_pixels_row_by_row():
    pixels = noise(64, 64, 3)
    patches = patchify(file_of(pixels), SHAPE)
    assert patches.shape == (16, 768)
    assert patches.dtype == np.uint8
    assert np.array_equal(patches[7], pixels[16:32, 48:64].reshape(-1))  # second row of patches, last column


def test_merged_patches_stand_together():
    pixels = noise(64, 64, 3)
    shape = ImageShape(64, 8, merge=2)
    patches = patchify(file_of(pixels), shape)
    assert (shape.patches, shape.positions, patches.shape) == (64, 16, (64, 192))
    square = pixels[16:32, 48:64]  # the eighth position's 2 x 2 patches, row by row
    for number, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        assert np.array_equal(patches[7 * 4 + number], square[row : row + 8, column : column + 8].reshape(-1))


@given(st.integers(0, 2**64 - 1))
def test_a_variation_mirrors_and_shifts_and_is_named_by_its_number(variation):
    pixels = noise(16, 16, 3)
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
    seen = {vary(noise(16, 16, 3), int(key_of(n))).tobytes() for n in range(1000)}
    assert len(seen) == 2 * 5 * 5


MODES = {"png": "P L RGBA 1 I;16", "jpeg": "L RGB CMYK", "gif": "P L", "webp": "RGB RGBA", "tiff": "CMYK RGB"}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes.split()])
def test_images_of_any_size_mode_and_format_are_fitted(kind, mode):
    assert patchify(file_of(Image.new(mode, (20, 90), 3), kind), SHAPE).shape == (16, 768)


def test_a_jpeg_decodes_to_nearly_what_pillow_makes_of_it():
    smooth = Image.fromarray(noise(8, 8, 3)).resize((200, 300), Image.Resampling.BICUBIC)
    data = file_of(smooth, "jpeg", quality=95)
    ours = decode(data)
    assert ours.shape == (300, 200, 3)
    assert np.abs(ours.astype(int) - np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).mean() < 2


def test_a_large_jpeg_is_decoded_small_but_never_smaller_than_needed():
    data = file_of(Image.fromarray(noise(8, 8, 3)).resize((1000, 600), Image.Resampling.BICUBIC), "jpeg")
    assert decode(data, 64).shape == (75, 125, 3)
    assert decode(data, 76).shape == (150, 250, 3)
    assert decode(data, 2000).shape == (600, 1000, 3)
    reduced, whole = patchify(data, SHAPE).astype(int), decode(data)
    fitted = np.asarray(Image.fromarray(whole).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(reduced[0].reshape(16, 16, 3) - fitted[:16, :16]).mean() < 4


def bomb() -> bytes:
    """A PNG of a few kilobytes that claims, and holds, 100 megapixels."""
    return file_of(Image.new("1", (10_000, 10_000)))


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", b"\xff\xd8\xff\xe0 no jpeg", file_of(noise(64, 64, 3))[:-3000],
     file_of(noise(64, 64, 3), "jpeg")[:-500], bomb(), file_of(Image.new("L", (9000, 9000)), "jpeg")],
    ids=["empty", "text", "bad jpeg", "cut png", "cut jpeg", "bomb", "huge jpeg"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_whole_image_is_refused(data):
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(data)
    with pytest.raises(DataError, match="cannot be decoded"):
        patchify(data, SHAPE)
