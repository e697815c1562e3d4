"""Pixels of every mode as 8 bits, and what the whole set decides: channels, range, size, std."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch

from fastmp import data
from fastmp.data import files, pixels
from fastmp.data.dataset import histogram, statistics
from tests.data.image_cases import Image, picture, write

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
pytestmark = pytest.mark.filterwarnings("ignore:.*held out:UserWarning")


def ramp(mode):
    """0 to 255 in the middle half of what the mode holds, and the 8 bits that it should become."""
    if mode == "F":
        return Image.fromarray((LEVELS / 255).astype(np.float32))
    if mode == "I":
        return Image.fromarray(LEVELS.astype(np.int32) * 257)
    return Image.fromarray(LEVELS.astype(np.uint16) * 257)


def reopened(image, path, **options):
    image.save(path, **options)
    opened = files.opened(str(path), "x")
    opened.load()
    return opened


def levels(image, channels=1):
    ranges = pixels.measure_ranges([image])
    return np.asarray(pixels.to_8_bits(image, channels, ranges))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("I;16", "png"), ("I;16", "tif"), ("I", "tif"), ("F", "tif"), ("F", "pfm")]
)
def test_wide_values_are_scaled(tmp_path, mode, suffix):
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip(f"this pillow cannot write .{suffix}")
    image = reopened(ramp(mode), tmp_path / f"x.{suffix}")
    assert pixels.wide_kind(image.mode) == mode[0]
    np.testing.assert_array_equal(levels(image), LEVELS)
    np.testing.assert_array_equal(levels(image, 3), np.stack([LEVELS] * 3, 2))


@pytest.mark.parametrize("mode", ["I;16L", "I;16B"])
def test_both_byte_orders(mode):
    order = ">" if mode == "I;16B" else "<"
    wide = (LEVELS.astype(np.uint16) * 257).astype(f"{order}u2")
    image = Image.frombytes("I;16B" if order == ">" else "I;16L", (16, 16), wide.tobytes())
    np.testing.assert_array_equal(levels(image), LEVELS)


def test_pgm_of_16_bits(tmp_path):
    """Its maximum of 1,023 is in the header; Pillow widens to 65,535."""
    values = (LEVELS.astype(np.uint16) * 4).astype(">u2")
    (tmp_path / "x.pgm").write_bytes(b"P5 16 16 1023 " + values.tobytes())
    image = files.opened(str(tmp_path / "x.pgm"), "x")
    image.load()
    np.testing.assert_array_equal(levels(image), np.rint(LEVELS.astype(float) * 4 * 255 / 1023))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.uint16([0, 4095]), (0, 4095)),  # 12 bits stored in 16
        (np.uint16([256, 1023]), (0, 1023)),
        (np.uint16([7, 255]), (0, 255)),
        (np.int32([0, 65536]), (0, 65536)),
        (np.int32([-1024, 3071]), (-1024, 3071)),  # Hounsfield units
        (np.float32([0.25, 0.5]), (0, 1)),
        (np.float32([0, 200]), (0, 255)),
        (np.float32([280, 310]), (280, 310)),  # kelvin
        (np.float32([-1, 1, np.nan, np.inf, -np.inf]), (-1, 1)),
        (np.float32([-0.5, -0.5]), (-0.5, 0.5)),
        (np.float32([1000, 1000]), (1000, 2000)),
        (np.float32([2.0**100]), (2.0**100, 2.0**101)),
    ],
)
def test_the_range_of_wide_values(values, expected):
    (range_,) = pixels.measure_ranges([Image.fromarray(values[None])]).values()
    assert range_ == expected


@pytest.mark.parametrize("mode", ["L", "I;16", "F"])
def test_tiffs_whose_smallest_value_is_white(tmp_path, mode):
    """PhotometricInterpretation 0. Pillow exchanges black and white of 8 bits, not of 16."""
    image = Image.fromarray(LEVELS) if mode == "L" else ramp(mode)
    stored = reopened(image, tmp_path / "x.tif", tiffinfo={262: 0})
    assert stored.tag_v2[262] == 0
    np.testing.assert_array_equal(levels(stored), LEVELS if mode == "L" else 255 - LEVELS)


def test_the_range_is_that_of_all_images():
    images = [Image.fromarray(np.uint16([[v]])) for v in (10, 4000, 300)]
    assert pixels.measure_ranges([*images, picture(0)]) == {"I": (0, 4095)}


def test_values_that_are_not_finite_or_out_of_range():
    image = Image.fromarray(np.float32([[np.nan, -np.inf, -5, 0.5, 9, np.inf]]))
    result = np.asarray(pixels.to_8_bits(image, 1, {"F": (0.0, 1.0)}))
    assert result.tolist() == [[0, 0, 0, 128, 255, 255]]
    nothing = Image.fromarray(np.full((1, 2), np.nan, np.float32))
    assert levels(nothing).tolist() == [[0, 0]]


@pytest.mark.filterwarnings("error")
def test_the_whole_range_of_fp32():
    image = Image.fromarray(np.float32([[-3e38, 0, 3e38]]))
    assert levels(image).tolist() == [[0, 128, 255]]


def test_a_set_of_wide_images_is_as_bright_as_its_twin_of_8_bits(tmp_path):
    """Bright and dark classes of 16 bits; one range for all, or both classes would look alike."""
    for part in ("train", "val"):
        for name, low in (("dark", 0), ("light", 128)):
            for i in range(3):
                eight = np.random.default_rng(i).integers(low, low + 128, (8, 8))
                for kind, image in (("8", np.uint8(eight)), ("16", np.uint16(eight * 257))):
                    (tmp_path / kind / part / name).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(tmp_path / kind / part / name / f"{i}.png")
    eight, sixteen = (data.load(str(tmp_path / kind), warn=False) for kind in ("8", "16"))
    for ours, twin in ((sixteen.train, eight.train), (sixteen.test, eight.test)):
        assert torch.equal(ours.batch(range(6), 1)[0], twin.batch(range(6), 1)[0])
    assert sixteen.notes == ("pixels that are integers of more than 8 bits: 0 to 65535 becomes 0 "
                             "to 255",)  # fmt: skip


def test_modes_that_become_grey():
    bits = LEVELS > 100
    assert pixels.channels(Image.fromarray(bits)) == 1
    np.testing.assert_array_equal(levels(Image.fromarray(bits)), bits * np.uint8(255))
    alpha = Image.fromarray(np.full((16, 16), 51, np.uint8))  # 20% opaque over white
    veiled = Image.merge("LA", (Image.fromarray(LEVELS), alpha))
    assert pixels.channels(veiled) == 1
    expected = np.rint(0.2 * LEVELS + 0.8 * 255)
    np.testing.assert_allclose(levels(veiled), expected, atol=1)
    np.testing.assert_allclose(levels(veiled.convert("La")), expected, atol=3)


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tif"])
def test_palettes(tmp_path, suffix):
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    indexed = Image.fromarray(LEVELS).convert("P")
    indexed.putpalette(colours.tobytes())
    image = reopened(indexed, tmp_path / f"x.{suffix}")
    assert pixels.channels(image) == 3
    np.testing.assert_array_equal(levels(image, 3), colours[LEVELS])
    indexed.putpalette(np.repeat(colours[:, :1], 3, 1).tobytes())
    image = reopened(indexed, tmp_path / f"grey.{suffix}")
    assert pixels.channels(image) == 1
    np.testing.assert_array_equal(levels(image), colours[LEVELS, 0])


def test_what_is_transparent_is_white(tmp_path):
    """Black lies below transparent pixels of most icons: without their alpha they are black."""
    icon = np.zeros((4, 4, 4), np.uint8)
    icon[:2] = (10, 200, 30, 255)
    expected = np.full((4, 4, 3), 255, np.uint8)
    expected[:2] = (10, 200, 30)
    rgba = Image.fromarray(icon)
    indexed = Image.fromarray(np.uint8([[0] * 4] * 2 + [[1] * 4] * 2)).convert("P")
    indexed.putpalette([10, 200, 30, 0, 0, 0])
    keyed = Image.fromarray(icon[..., :3])
    premultiplied = rgba.convert("RGBa")
    for name, image, options in (
        ("a.png", rgba, {}), ("b.webp", rgba, {"lossless": True}),
        ("c.png", indexed, {"transparency": 1}), ("d.gif", indexed, {"transparency": 1}),
        ("e.png", keyed, {"transparency": (0, 0, 0)}),
    ):  # fmt: skip
        image = reopened(image, tmp_path / name, **options)
        np.testing.assert_array_equal(levels(image, 3), expected, name)
    np.testing.assert_array_equal(levels(premultiplied, 3), expected)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_colour_spaces(tmp_path, mode):
    """There and back, to what 8 bits lose of hue, saturation and Lab's colours."""
    red, green = np.meshgrid(np.linspace(80, 220, 16), np.linspace(90, 200, 16))
    colours = np.uint8(np.stack([red, green, (red + green) / 2], 2))
    image = Image.fromarray(colours)
    if mode == "LAB":
        cms = pytest.importorskip("PIL.ImageCms", reason="pillow without littlecms: no LAB")
        profiles = cms.createProfile("sRGB"), cms.createProfile("LAB")
        image = reopened(
            cms.profileToProfile(image, *profiles, outputMode="LAB"), tmp_path / "x.tif"
        )
    else:
        image = image.convert(mode)
    assert image.mode == mode
    assert pixels.channels(image) == 3
    np.testing.assert_allclose(levels(image, 3), colours, atol=6)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(tmp_path, suffix, orientation):
    """A picture stored so that its viewer has to undo ``orientation`` (EXIF 2.3, tag 0x0112)."""
    upright = np.zeros((32, 48), np.uint8)
    upright[:16, :16], upright[:16, 16:], upright[16:, :16] = 250, 120, 60
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    image = reopened(image, tmp_path / f"x.{suffix}", exif=exif, quality=95)
    np.testing.assert_allclose(levels(image).astype(int), upright, atol=8)


def test_damaged_exif_data_says_nothing(tmp_path):
    image = reopened(picture(1), tmp_path / "x.png", exif=b"Exif\x00\x00nothing of a TIFF header")
    np.testing.assert_array_equal(levels(image, 3), np.asarray(picture(1)))


@pytest.mark.parametrize("odd", [0, 5])
@pytest.mark.parametrize("part", ["train", "val"])
def test_one_grey_image_leaves_a_set_in_colour(tmp_path, odd, part):
    write(tmp_path, ("train", "val"))
    grey = sorted((tmp_path / part).rglob("*.png"))[odd]
    picture(9, mode="L").save(grey)
    dataset = data.load(str(tmp_path))
    assert dataset.shape == (3, 16, 16)
    source = dataset.train if part == "train" else dataset.test
    image = source.batch([odd])[0][0]
    assert torch.equal(image[0], image[1])
    assert not torch.equal(*source.batch([odd + 1])[0][0][:2])


@pytest.mark.parametrize("part", ["train", "val"])
def test_one_image_in_colour_makes_a_set_colour(tmp_path, part):
    write(tmp_path, ("train", "val"), mode="L")
    assert data.load(str(tmp_path)).shape[0] == 1
    picture(9).save(tmp_path / part / "dog" / "002.png")
    assert data.load(str(tmp_path)).shape[0] == 3


def test_the_side_is_that_of_the_middle_image_not_of_the_first(tmp_path):
    write(tmp_path, ("train", "val"))
    picture(9, size=(2, 2)).save(tmp_path / "train" / "cat" / "000.png")
    assert data.load(str(tmp_path)).shape == (3, 16, 16)


def test_a_set_that_is_black_is_said(tmp_path):
    """Values from 0 to 1 cast to uint8: the files are good, and nothing is to be seen in them."""
    write(tmp_path, ("train", "val"))
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(np.array(Image.open(path)) // 128).save(path)
    dataset = data.load(str(tmp_path), warn=False)
    (note,) = dataset.notes
    assert note.startswith("dark: no pixel of 8 training images is above 1 of 255; were they")
    assert max(dataset.std) == pytest.approx(0.5 / 255, rel=0.1)  # seen by the model all the same


def test_a_constant_channel(tmp_path):
    write(tmp_path, ("train", "val"))
    for path in sorted((tmp_path / "train").rglob("*.png")):
        pixels_ = np.array(Image.open(path))
        pixels_[..., 1] = 77
        Image.fromarray(pixels_).save(path)
    dataset = data.load(str(tmp_path), warn=False)
    assert dataset.std[1] == 1
    assert min(dataset.std[0], dataset.std[2]) > 0.1
    assert dataset.notes == ("constant over the training images: channel 1; std taken as 1",)
    mixup = data.Mixup(mean=dataset.mean, std=dataset.std, dtype=torch.float32)
    normal = mixup.plain(dataset.train.batch(range(8))[0])
    assert normal[:, 1].abs().max() < 1e-6
    assert normal.std(dim=(0, 2, 3), correction=0)[::2].sub(1).abs().max() < 1e-4


@pytest.mark.parametrize("other", [0, 1])
def test_the_std_of_a_single_pixel_by_a_level_is_1(other):
    """0.1 + 0.1 + ... is no multiple of 0.1: the std of a constant is 1e-17, not 0."""
    images = torch.full((7, 1, 33, 31), 77, dtype=torch.uint8)
    images[0, 0, 0, 0] += other
    assert statistics(histogram(images))[1] == (1.0,)


def test_statistics_are_those_of_the_pixels():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 7, 9), np.uint8))
    mean, std = statistics(histogram(images))
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), rel=1e-12)


def test_loading_holds_one_image_at_a_time(tmp_path):
    """64 images of 600 x 600: 69 MB as bytes, 553 as the fp64 values that a mean goes over."""
    write(tmp_path, ("train", "val"), per_class=32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data.load(str(tmp_path), image_size=600, warn=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


def test_validation_images_on_another_scale_are_said(tmp_path):
    for part, top in (("train", 1), ("val", 255)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                values = np.float32(LEVELS / 255) * top
                Image.fromarray(values).save(tmp_path / part / name / f"{i}.tif")
    dataset = data.load(str(tmp_path), warn=False)
    assert dataset.notes == (
        "pixels that are floats: 0 to 1 becomes 0 to 255",
        "validation images reach from 0 to 255 where training images reach from 0 to 1, and are "
        "scaled as those: are both of one kind?",
    )
