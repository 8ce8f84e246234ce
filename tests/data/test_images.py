"""Protect image loading.

Checked: the model gets the pixels of the file, 8-bit RGB and upright, and a bad file is named.

Run: pytest tests/data/test_images.py; with CXR_SAMPLE=<folder of real X-rays> it reads those too.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import data.images
from data.examples import Example
from data.files import MAX_PROBLEMS, DataError
from data.images import (
    all_image_facts,
    check_images,
    image_path,
    load_image,
    scaled_to_8_bits,
    without_bad_images,
)


def example(root: Path, image: str, id: str = "e1") -> Example:
    return Example(id, "p", image, (), "site", root)


def pixels(root: Path, image: str) -> np.ndarray:
    loaded = load_image(example(root, image))
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def refusal(root: Path, image: str) -> str:
    with pytest.raises(DataError) as caught:
        load_image(example(root, image))
    [problem] = caught.value.problems
    assert "\n" not in problem and problem.startswith("example 'e1': ")
    return problem


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# Paths


def test_only_files_under_the_root(tmp_path):
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    for path in (tmp_path / "secret.png", root / "deep" / "a.png"):
        Image.fromarray(noise(4, 4)).save(path)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inside.png").symlink_to(root / "deep" / "a.png")
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "deep/../../secret.png",
        "deep/../deep/a.png",
        "deep/..",
        "..",
    ):
        assert (
            refusal(root, name)
            == f"example 'e1': image {name!r}: write the path relative to the image root, without"
            " '..' (--image_root)"
        )
    assert (
        refusal(root, "link.png")
        == f"example 'e1': image 'link.png' lies outside the image root {root}, through a symbolic"
        " link"
    )
    # absolute, though inside
    assert "relative to the image root" in refusal(root, str(root / "deep" / "a.png"))
    for name in ("deep/a.png", "deep//./a.png", "inside.png"):
        assert image_path(example(root, name)) == root / "deep" / "a.png"


@pytest.mark.parametrize("name", ["https://host/a.png", "file:///etc/passwd", "s3://bucket/a.png"])
def test_urls(tmp_path, name):
    assert (
        refusal(tmp_path, name)
        == f"example 'e1': image {name!r} is a URL; images are read from files only: download it"
        " and give its path"
    )


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        assert (
            refusal(tmp_path, name)
            == f"example 'e1': image {name!r}: {tmp_path / name} is not a regular file; check the"
            " row or --image_root"
        )
    (tmp_path / "null.png").symlink_to("/dev/null")
    assert "lies outside the image root" in refusal(tmp_path, "null.png")


def test_paths_that_cannot_be_followed(tmp_path):
    (tmp_path / "one.png").symlink_to(tmp_path / "two.png")
    (tmp_path / "two.png").symlink_to(tmp_path / "one.png")
    for name in ("a\0.png", "one.png", "x" * 300 + ".png", "y/" * 3000 + "a.png"):
        assert f"example 'e1': image {name!r}: not a usable path (" in refusal(tmp_path, name)
    (tmp_path / "a.png").write_bytes(b"")
    assert "no such file" in refusal(tmp_path, "a.png/b.png")


@pytest.mark.parametrize("name", ["none.png", "none/a.png", "data:image/png;base64,AAAA"])
def test_missing_files(tmp_path, name):
    said = refusal(tmp_path, name)
    assert (
        said
        == f"example 'e1': image {name!r}: no such file under the image root {tmp_path}; check the"
        " row or --image_root"
    )


def test_all_missing_images_are_listed(tmp_path):
    Image.fromarray(noise(4, 4)).save(tmp_path / "a.png")
    check_images([example(tmp_path, "a.png")] * 3)
    with pytest.raises(DataError) as caught:
        check_images([example(tmp_path, name, id=name) for name in ("x.png", "a.png", "../y.png")])
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "example 'x.png'",
        "example '../y.png'",
    ]
    with pytest.raises(DataError) as caught:
        check_images([example(tmp_path, "x.png")] * (MAX_PROBLEMS + 2))
    assert (
        len(caught.value.problems) == MAX_PROBLEMS + 1
        and caught.value.problems[-1] == "and 2 more images"
    )


# Damaged and foreign files


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("kept", [0, 5, 20, 40, 0.5, 0.9])
def test_truncated_files(tmp_path, name, kept):
    Image.fromarray(noise(64, 64)).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(
        content[: kept if isinstance(kept, int) else int(kept * len(content))]
    )
    assert f"{tmp_path / name} is not a readable JPEG or PNG" in refusal(tmp_path, name)


@pytest.mark.parametrize("length", range(8, 60))
def test_a_png_cut_inside_its_header(tmp_path, length):
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:length])
    assert "is not a readable JPEG or PNG" in refusal(tmp_path, "a.png")


def test_a_short_header_chunk(tmp_path):
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[11] = 2  # the header says that it is 2 bytes long; Pillow answers with a ValueError
    (tmp_path / "a.png").write_bytes(content)
    assert "is not a readable JPEG or PNG" in refusal(tmp_path, "a.png")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "WEBP"])
def test_other_formats_whatever_their_name(tmp_path, kind):
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.png", format=kind)
    assert "is not a readable JPEG or PNG" in refusal(tmp_path, "a.png")


def test_text_is_not_an_image(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    assert "is not a readable JPEG or PNG" in refusal(tmp_path, "a.jpg")


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(data.images, "MAX_PIXELS", 99)
    Image.fromarray(noise(10, 10)).save(tmp_path / "a.png")
    assert refusal(tmp_path, "a.png").endswith("has 10 x 10 pixels; at most 99 are read")
    Image.fromarray(noise(9, 11)).save(tmp_path / "b.png")
    assert pixels(tmp_path, "b.png").shape == (9, 11, 3)


def test_a_png_that_claims_more_pixels_than_it_has(tmp_path):
    """A decompression bomb: some hundred bytes that say 60,000 x 60,000. Refused from the header,
    before memory is taken.
    """
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))  # the header's checksum
    (tmp_path / "a.png").write_bytes(content)
    assert "is not a readable JPEG or PNG (Image size (3600000000 pixels) exceeds limit" in refusal(
        tmp_path, "a.png"
    )
    content[16:24] = struct.pack(">II", 9_000, 9_000)  # 81 million: below Pillow's own limits
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    (tmp_path / "a.png").write_bytes(content)
    assert refusal(tmp_path, "a.png").endswith(
        "has 9000 x 9000 pixels; at most 80,000,000 are read"
    )


def test_text_that_unpacks_to_more_than_pillow_takes(tmp_path):
    """A PNG whose comment is 80 MB of zeros, packed into some 80 kB."""
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    body = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])  # after the header
    assert "is not a readable JPEG or PNG (" in refusal(tmp_path, "a.png")


def test_strips(tmp_path):
    for shape in ((20, 1), (1, 20)):
        Image.fromarray(noise(*shape)).save(tmp_path / "a.png")
        assert pixels(tmp_path, "a.png").shape == (*shape, 3)
    for shape, said in (((1, 21), "21 x 1"), ((21, 1), "1 x 21"), ((2, 20_000), "20000 x 2")):
        Image.fromarray(noise(*shape)).save(tmp_path / "a.png")
        assert refusal(tmp_path, "a.png").endswith(
            f"has {said} pixels; one side may be at most 20 times the other"
        )


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF data
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_bytes_give_an_image_or_a_refusal(tmp_path, kind):
    """Whatever bytes are changed, nothing but a DataError comes out. 300 files, each with 1 to 8
    changed bytes, EXIF included.
    """
    image = Image.fromarray(noise(24, 24))
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "text"
    image.save(tmp_path / "good", format=kind, exif=exif)
    content, rng, refused = (tmp_path / "good").read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), rng.integers(1, 9))] = rng.integers(0, 256)
        (tmp_path / "a.png").write_bytes(damaged.tobytes())
        try:
            assert load_image(example(tmp_path, "a.png")).mode == "RGB"
        except DataError:
            refused += 1
    assert 30 < refused < 300


def test_an_unforeseen_error_of_a_reader_is_a_refusal(tmp_path, monkeypatch):
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(data.images.ImageOps, "exif_transpose", lambda image: {}["tag"])
    assert "is not a readable JPEG or PNG ('tag')" in refusal(tmp_path, "a.png")


def test_half_pictures_are_not_completed_in_silence():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# Many at once


def test_good_and_bad_images_are_told_apart_in_order(tmp_path):
    for i in range(40):  # more than one chunk of a single worker
        Image.fromarray(noise(4, 4)).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes(b"")
    examples = [example(tmp_path, f"{i}.png", id=f"e{i}") for i in range(40)] + [
        example(tmp_path, "../x.png", id="e40")
    ]
    problems = [fact.problem for fact in all_image_facts(examples)]
    assert [i for i, problem in enumerate(problems) if problem] == [7, 40]
    good, bad = without_bad_images(examples, "train")
    assert [e.id for e in good] == [f"e{i}" for i in range(40) if i != 7]
    assert bad == [
        {"id": "e7", "patient_id": "p", "image": "7.png", "reason": problems[7]},
        {"id": "e40", "patient_id": "p", "image": "../x.png", "reason": problems[40]},
    ]
    assert "is not a readable JPEG or PNG" in problems[7] and "without '..'" in problems[40]
    with pytest.raises(DataError, match="data set train: none of its 1 images can be read"):
        without_bad_images(examples[-1:], "train")


# Pixels


def test_animated_png_gives_its_first_picture(tmp_path):
    first, second = (Image.fromarray(np.full((4, 4), value, dtype=np.uint8)) for value in (200, 50))
    first.save(tmp_path / "a.png", save_all=True, append_images=[second])
    assert (pixels(tmp_path, "a.png") == 200).all()


def test_greyscale_becomes_three_equal_channels(tmp_path):
    values = noise(5, 7)
    Image.fromarray(values).save(tmp_path / "a.png")
    loaded = pixels(tmp_path, "a.png")
    assert loaded.shape == (5, 7, 3) and loaded.dtype == np.uint8
    for channel in range(3):
        assert (loaded[..., channel] == values).all()


def test_rgb_is_kept(tmp_path):
    values = noise(5, 7, 3)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (pixels(tmp_path, "a.png") == values).all()


def test_sixteen_bits_are_scaled_to_their_range(tmp_path):
    # 1000 is the darkest, 5080 the brightest: (value - 1000) / 16. Clipping at 255 would give white
    # everywhere.
    Image.fromarray(np.array([[1000, 1016], [3040, 5080]], dtype=np.uint16)).save(
        tmp_path / "a.png"
    )
    assert Image.open(tmp_path / "a.png").mode.startswith("I")
    # 127.5 rounds to even
    assert pixels(tmp_path, "a.png")[..., 0].tolist() == [[0, 1], [128, 255]]
    Image.fromarray(np.full((2, 2), 700, dtype=np.uint16)).save(tmp_path / "b.png")
    assert (pixels(tmp_path, "b.png") == 0).all()  # flat: nothing to scale, and no division by 0


def ramp(*outliers: int) -> np.ndarray:
    """Make 100 x 100 values: 0, 1, .., 4000 evenly, and the outliers in the place of the last."""
    values = np.linspace(0, 4000, 10_000).round().astype(np.uint16)
    values[len(values) - len(outliers) :] = outliers
    return values.reshape(100, 100)


@pytest.mark.parametrize("hot", [[], [65535], [65535] * 60])
def test_a_hot_pixel_or_a_mark_does_not_darken_the_rest(tmp_path, hot):
    """The hundredths are 40 and 3960, so the range ends at 3960 + 980 = 4940 at most, or at 4000.

    Without that 2000 would become 8 beside a pixel of 65535.
    """
    Image.fromarray(ramp(*hot)).save(tmp_path / "a.png")
    shown = pixels(tmp_path, "a.png")[..., 0]
    last = 4940 if hot else 4000
    assert shown[0, 0] == 0 and shown[50, 0] == round(2000 * 255 / last)
    assert shown[-1, -1] == 255
    assert all_image_facts([example(tmp_path, "a.png")])[0].clipped == len(hot) / 10_000


def test_a_dark_outlier_is_clipped_too_and_the_ends_are_kept_without_one():
    values = ramp() + 1000
    values[0, 0] = 0  # a dead pixel; the range begins at 1040 - 980 = 60
    scaled, clipped = scaled_to_8_bits(values)
    assert scaled[0, 0] == 0 and clipped == 1e-4
    # (1000 - 60) of the 4940 from 60 to 5000
    assert scaled[0, 1] == round(940 * 255 / 4940) and scaled.max() == 255
    # signed and 32-bit values
    assert (scaled_to_8_bits(values.astype(np.int32) - 30_000)[0] == scaled).all()


def test_a_picture_of_nearly_one_value_keeps_its_whole_range():
    values = np.full((100, 100), 7, dtype=np.uint16)
    values[0, 0] = 9
    scaled, clipped = scaled_to_8_bits(values)
    assert (scaled[0, 0], scaled[1, 1], clipped) == (255, 0, 0.0)


def test_eight_bits_are_never_scaled(tmp_path):
    """Not even beside outliers: 8 bits are what others have made of the picture."""
    values = np.full((100, 100), 100, dtype=np.uint8)
    values[0, :2] = 0, 255
    values[1:50] = 120
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (pixels(tmp_path, "a.png")[..., 0] == values).all()
    assert all_image_facts([example(tmp_path, "a.png")])[0].clipped is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0" * 128 + b"DICM\2\0", "it is DICOM: convert it with data.dicom"),
        (b"II*\0rest", "it is TIFF: save it as PNG"),
        (b"BMrest", "it is BMP: save it as PNG"),
        (b"RIFF\0\0\0\0WEBP", "it is WebP: save it as PNG"),
        (
            b"\n<!DOCTYPE html>",
            "it is HTML or XML, as a page that a download asks to log in on",
        ),
        (b"what", "it is of another kind"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, content, said):
    (tmp_path / "a.png").write_bytes(content)
    assert refusal(tmp_path, "a.png").endswith(f"is not a readable JPEG or PNG ({said})")


# Passing faults of a drive


@pytest.fixture
def faults(monkeypatch):
    """Make the next reads of a file fail: `faults(errno, ...)` -> the seconds that were waited."""
    waited: list[float] = []
    monkeypatch.setattr(data.images.time, "sleep", waited.append)

    def plan(*numbers: int) -> list[float]:
        left = list(numbers)
        read = Path.read_bytes

        def failing(path: Path) -> bytes:
            if left:
                raise OSError(left.pop(0), "a fault")
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", failing)
        return waited

    return plan


def test_a_passing_fault_is_waited_for(tmp_path, faults):
    Image.fromarray(noise(20, 20)).save(tmp_path / "a.png")
    waited = faults(errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
    assert load_image(example(tmp_path, "a.png")).size == (20, 20)
    assert waited == [0.1, 0.5, 2.0]


def test_a_fault_that_stays_is_a_refusal(tmp_path, faults):
    Image.fromarray(noise(20, 20)).save(tmp_path / "a.png")
    waited = faults(*[errno.EIO] * 9)
    assert "is not a readable JPEG or PNG ([Errno 5] a fault)" in refusal(tmp_path, "a.png")
    assert len(waited) == 3


def test_another_fault_is_not_waited_for(tmp_path, faults):
    Image.fromarray(noise(20, 20)).save(tmp_path / "a.png")
    waited = faults(errno.EACCES)
    assert "is not a readable JPEG or PNG ([Errno 13]" in refusal(tmp_path, "a.png")
    assert waited == []


def test_a_fault_of_the_folder_is_waited_for_too(tmp_path, monkeypatch, faults):
    Image.fromarray(noise(20, 20)).save(tmp_path / "a.png")
    waited, left, stat = faults(), [errno.ESTALE, errno.ESTALE], Path.stat

    def failing(path: Path, **options):
        if left and path.name == "a.png":
            raise OSError(left.pop(), "stale")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", failing)
    assert image_path(example(tmp_path, "a.png")) == tmp_path / "a.png"
    assert waited and waited[0] == 0.1  # Path.resolve looks at the file too
    left += [errno.ESTALE] * 9
    assert "image 'a.png': not a usable path (stale)" in refusal(tmp_path, "a.png")


def test_a_file_larger_than_any_picture_is_not_read(tmp_path, monkeypatch):
    Image.fromarray(noise(20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(data.images, "MAX_FILE_BYTES", 100)
    assert "bytes; at most 100 are read" in refusal(tmp_path, "a.png")


# The same picture


def test_pixels_tell_a_picture_whatever_its_file(tmp_path):
    values = noise(20, 30)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "b.png", compress_level=1, dpi=(72, 72))
    Image.fromarray(values).convert("RGB").save(tmp_path / "rgb.png")
    # the same bytes in another shape, and one value less
    Image.fromarray(values.reshape(30, 20)).save(tmp_path / "turned.png")
    values[3, 3] -= 1
    Image.fromarray(values).save(tmp_path / "other.png")
    names = ("a.png", "b.png", "rgb.png", "turned.png", "other.png")
    facts = all_image_facts([example(tmp_path, name) for name in names])
    a, b, rgb, turned, other = (fact.digest for fact in facts)
    assert a == b == rgb and len({a, turned, other}) == 3


def test_a_flat_picture_is_told(tmp_path):
    for value in (0, 7, 8):
        content = np.zeros((20, 20), dtype=np.uint8)
        content[3, 3] = value
        Image.fromarray(content).save(tmp_path / f"{value}.png")
    facts = all_image_facts([example(tmp_path, f"{value}.png") for value in (0, 7, 8)])
    assert [fact.flat for fact in facts] == [True, True, False]


def test_transparency_is_put_on_black(tmp_path):
    Image.fromarray(
        np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], dtype=np.uint8), "RGBA"
    ).save(tmp_path / "a.png")
    assert pixels(tmp_path, "a.png").tolist() == [[[200, 100, 50], [0, 0, 0]]]
    Image.fromarray(np.array([[[90, 255], [90, 0]]], dtype=np.uint8), "LA").save(tmp_path / "b.png")
    assert pixels(tmp_path, "b.png").tolist() == [[[90, 90, 90], [0, 0, 0]]]


def palette_image() -> Image.Image:
    """Make one row: colour 0 (10, 20, 30), then colour 1 (200, 150, 100)."""
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 150, 100])
    return image


def test_palettes_are_looked_up(tmp_path):
    palette_image().save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    assert pixels(tmp_path, "a.png").tolist() == [[[10, 20, 30], [200, 150, 100]]]
    palette_image().save(tmp_path / "b.png", transparency=1)
    assert pixels(tmp_path, "b.png").tolist() == [[[10, 20, 30], [0, 0, 0]]]


def test_black_and_white(tmp_path):
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1").save(tmp_path / "a.png")
    assert pixels(tmp_path, "a.png")[0, :, 0].tolist() == [0, 255]


def test_cmyk_is_converted(tmp_path):
    # no ink is white; cyan alone takes the red away
    for name, ink, colour in (
        ("a.jpg", (0, 0, 0, 0), [255, 255, 255]),
        ("b.jpg", (255, 0, 0, 0), [0, 255, 255]),
    ):
        Image.new("CMYK", (16, 16), ink).save(tmp_path / name)
        assert Image.open(tmp_path / name).mode == "CMYK"
        assert np.abs(pixels(tmp_path, name)[8, 8].astype(int) - colour).max() <= 3  # JPEG is lossy


def test_the_exif_orientation_is_applied(tmp_path):
    values = np.zeros((16, 32), dtype=np.uint8)
    values[:, 16:] = 255  # as stored: dark left half, bright right half
    image = Image.fromarray(values)
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: left becomes top
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image.save(tmp_path / "a.png", exif=exif)
    for name in ("a.jpg", "a.png"):
        loaded = pixels(tmp_path, name)
        assert loaded.shape == (32, 16, 3)
        assert loaded[4].max() < 20 and loaded[28].min() > 235


# Real X-rays


@pytest.mark.skipif(
    "CXR_SAMPLE" not in os.environ, reason="CXR_SAMPLE names no folder of real X-rays"
)
def test_real_radiographs():
    root = Path(os.environ["CXR_SAMPLE"]) / "nih" / "images"
    names = sorted(path.name for path in root.glob("*.png"))
    assert names, f"no PNG under {root}"
    for name in names:
        loaded = pixels(root, name)
        with Image.open(root / name) as stored:
            assert loaded.shape == (stored.height, stored.width, 3)
        assert (loaded == loaded[..., :1]).all(), f"{name}: a greyscale image has equal channels"
        assert loaded.std() > 20 and loaded.max() - loaded.min() > 100, (
            f"{name}: hardly any contrast"
        )
