import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from anabranch.client.data import images
from anabranch.client.data.images import UnreadableImage, decode


def png(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


SOUND = png(Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)))


@given(pixels=hnp.arrays(np.uint8, (9, 9)))
def test_an_image_of_the_right_size_keeps_every_pixel(pixels: NDArray[np.uint8]) -> None:
    decoded = decode(png(Image.fromarray(pixels)), channels=1, size=9)

    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(np.rint(decoded[0] * 255), pixels)


@given(
    pixels=hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))),
    channels=st.sampled_from([1, 3]),
)
def test_every_image_ends_in_the_model_s_shape_and_range(
    pixels: NDArray[np.uint8], channels: int
) -> None:
    decoded = decode(png(Image.fromarray(pixels)), channels=channels, size=8)

    assert decoded.shape == (channels, 8, 8)
    assert pixels.min() / 255 - 0.01 <= decoded.min()
    assert decoded.max() <= pixels.max() / 255 + 0.01


@given(at=st.integers(0, len(SOUND) - 1), value=st.integers(0, 255), cut=st.integers(0, 200))
def test_damaged_bytes_are_an_image_or_one_kind_of_error(at: int, value: int, cut: int) -> None:
    damaged = bytearray(SOUND)
    damaged[at] = value
    try:
        decoded = decode(bytes(damaged[: len(damaged) - cut]), channels=3, size=8)
    except UnreadableImage:
        return
    assert np.isfinite(decoded).all()


def test_channels_come_first_and_rows_stay_rows() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[2, 5] = (255, 0, 51)

    decoded = decode(png(Image.fromarray(pixels)), channels=3, size=8)

    assert decoded[:, 2, 5].tolist() == pytest.approx([1, 0, 0.2])
    assert decoded.sum() == pytest.approx(1.2)


def test_grey_is_repeated_and_colour_becomes_luma() -> None:
    red = png(Image.new("RGB", (8, 8), (255, 0, 0)))
    grey = png(Image.new("L", (8, 8), 51))

    assert decode(red, channels=1, size=8) == pytest.approx(0.299, abs=0.003)
    assert decode(grey, channels=3, size=8) == pytest.approx(0.2)


def test_sixteen_bit_grey_keeps_its_range() -> None:
    ramp = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)

    decoded = decode(png(Image.fromarray(ramp)), channels=1, size=8)

    np.testing.assert_allclose(decoded[0] * 65535, ramp, atol=0.01)


def test_transparency_is_laid_over_black() -> None:
    clear = png(Image.new("RGBA", (8, 8), (255, 255, 255, 0)))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 255, 255])

    assert decode(clear, channels=3, size=8).max() == 0
    assert decode(png(palette, transparency=b"\xff\x00"), channels=1, size=8).max() == 0
    assert decode(png(palette), channels=1, size=8).min() == 1


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    top_dark = np.full((16, 16), 255, np.uint8)
    top_dark[:8] = 0
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    Image.fromarray(top_dark).save(tmp_path / "x.jpg", exif=exif)

    decoded = decode(tmp_path / "x.jpg", channels=1, size=8)[0]

    assert decoded[:3].min() > 0.9
    assert decoded[-3:].max() < 0.1


def test_a_ramp_that_is_made_smaller_is_the_ramp_between_its_pixels() -> None:
    """Pixel (i, j) of 8 × 8 has its centre at ((i + ½) · 12/8 − ½, (j + ½) · 16/8 − ½) of 12 × 16.

    The outermost pixels are left out: there the filter is cut off at the edge.
    """
    ramp = np.arange(0, 192, dtype=np.uint8).reshape(12, 16)
    i, j = np.mgrid[0:8, 0:8] + 0.5

    decoded = decode(png(Image.fromarray(ramp)), channels=1, size=8)[0]

    between = 16 * (i * 12 / 8 - 0.5) + (j * 16 / 8 - 0.5)
    np.testing.assert_allclose((decoded * 255)[1:-1, 1:-1], between[1:-1, 1:-1], atol=1)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a PNG or JPEG image"),
        (b"GIF89a", "not a PNG or JPEG image"),
        (SOUND[:50], "a damaged image"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(UnreadableImage, match=says):
        decode(data, channels=1, size=8)


def test_a_missing_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="no such image file"):
        decode(tmp_path / "none.png", channels=1, size=8)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 15)

    with pytest.raises(UnreadableImage, match="more than 15 pixels"):
        decode(SOUND, channels=3, size=8)
