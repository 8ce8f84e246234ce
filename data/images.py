"""Open images, here and nowhere else.

Regular JPEG and PNG files under the data set's image root are read. Everything else is refused with
a line that names the example, the path and the reason, so that a damaged or hostile file can stop
or leave a run but never enter it unseen.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from data.examples import Example
from data.files import DataError, first_problems

# the largest digital radiographs have about 20 million; beyond this it is a bomb or a mistake
MAX_PIXELS = 80_000_000
MAX_ASPECT_RATIO = 20  # a longer strip is no radiograph, and image processors refuse or distort it
MAX_FILE_BYTES = 2**30  # twice what MAX_PIXELS of 16-bit colour take without compression
FORMATS = ("JPEG", "PNG")
# Of how a file becomes pixels. Image features that are kept on a disk belong to one reading: a
# change below that makes other pixels of a file that is read already needs the next number.
READING = 2
# 16 bits become 8 from the first to the last of these quantiles and a margin beyond them, as a part
# of what lies between, but never beyond what is in the picture.
QUANTILES, MARGIN = (0.01, 0.99), 0.25

# What a network drive may report of a sound file, and the seconds to wait before another try: the
# server does not answer, is overloaded or has restarted, or the connection to it is lost. A file
# that is not there (ENOENT) is told at once: waiting for every file of a wrong folder would take
# hours. Not every system has all of the names.
_NAMES = (
    *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EREMOTEIO", "EHOSTDOWN", "EHOSTUNREACH"),
    *("ENETDOWN", "ENETUNREACH", "ENETRESET", "ECONNRESET", "ECONNABORTED", "ENOTCONN"),
)
_PASSING = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}
RETRY_WAITS = (0.1, 0.5, 2.0)

Item = TypeVar("Item")
Result = TypeVar("Result")


def image_path(example: Example) -> Path:
    """Find the example's image file.

    Raises DataError unless it is a regular file under `image_root`, symbolic links resolved, named
    by a relative path without `..`.
    """
    return image_status(example)[0]


def image_status(example: Example) -> tuple[Path, os.stat_result]:
    """Find the example's image file and what the file system says of it, as `image_path` does."""
    name = f"example {example.id!r}: image {example.image!r}"
    written = PurePosixPath(example.image)
    if "://" in example.image:
        raise DataError(
            [f"{name} is a URL; images are read from files only: download it and give its path"]
        )
    if written.is_absolute() or ".." in written.parts:
        raise DataError(
            [f"{name}: write the path relative to the image root, without '..' (--image_root)"]
        )
    try:
        root = example.image_root.resolve()
        path, status = _patiently(lambda: _resolved(root, example.image))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            [f"{name}: no such file under the image root {root}; check the row or --image_root"]
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        # too long, a null byte, a loop of links, no permission
        raise DataError(
            [f"{name}: not a usable path ({getattr(error, 'strerror', None) or error})"]
        ) from error
    if status is None:
        raise DataError([f"{name} lies outside the image root {root}, through a symbolic link"])
    if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
        raise DataError([f"{name}: {path} is not a regular file; check the row or --image_root"])
    return path, status


def _resolved(root: Path, image: str) -> tuple[Path, os.stat_result | None]:
    """Follow a path -> (the file, its status or None where it lies outside the root)."""
    path = (root / image).resolve()
    return path, path.stat() if path.is_relative_to(root) else None


def _patiently(read: Callable[[], Result]) -> Result:
    """Call `read` until no passing fault of a network drive comes, a few times at most."""
    for wait in RETRY_WAITS:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(wait)
    return read()


def check_images(examples: Iterable[Example]) -> None:
    """Look for every image file before a run, not after an hour of it.

    Raises DataError naming every example whose image file is missing or out of bounds.
    """
    problems: list[str] = []
    for example in examples:
        try:
            image_path(example)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(first_problems(problems, "and {} more images"))


@dataclass(frozen=True)
class ImageFacts:
    """Hold what is known of an example's image once all of it has been read.

    problem: why it cannot be used, or None.
    digest: of its pixels as a model sees them, whatever the file's name, format and metadata.
    clipped: share of the pixels beyond the range of `scaled_to_8_bits`, None where the file has 8
    bits.
    flat: all pixels have nearly one grey value, as where a window was wrong.
    """

    problem: str | None = None
    digest: str = ""
    clipped: float | None = None
    flat: bool = False


FLAT_LEVELS = 8  # of 256: a picture with fewer shows nothing


def image_facts(example: Example) -> ImageFacts:
    """Read all of the example's image and note what `ImageFacts` holds."""
    try:
        image, clipped = _decoded(example, read_image(example))
    except DataError as error:
        return ImageFacts(problem=error.problems[0])
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    lows, highs = zip(*image.getextrema(), strict=True)
    return ImageFacts(digest=digest, clipped=clipped, flat=max(highs) - min(lows) < FLAT_LEVELS)


def all_image_facts(examples: Sequence[Example], description: str = "images") -> list[ImageFacts]:
    """Read the images of all examples, in parallel -> their facts in order.

    A progress bar is on stderr.
    """
    return list(in_parallel(image_facts, examples, description))


def without_bad_images(examples: Sequence[Example], name: str) -> tuple[list[Example], list[dict]]:
    """Read all images of a data set -> (examples with a good image, rows of the others).

    name: of the data set, for messages.
    The rows have "id", "patient_id", "image" and "reason".

    Raises DataError where no example is left.
    """
    facts = all_image_facts(examples, f"{name} (checking images)")
    problems = [fact.problem for fact in facts]
    bad = [
        {
            "id": example.id,
            "patient_id": example.patient_id,
            "image": example.image,
            "reason": problem,
        }
        for example, problem in zip(examples, problems, strict=True)
        if problem
    ]
    if len(bad) == len(examples):
        raise DataError(
            [
                f"data set {name}: none of its {len(bad)} images can be read, such as"
                f" {bad[0]['reason']}"
            ]
        )
    return [
        example for example, problem in zip(examples, problems, strict=True) if not problem
    ], bad


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], description: str
) -> Iterator[Result]:
    """Yield function(item) of every item, in order, worked out in threads.

    Decoding an image releases Python's lock. At most a few results wait in memory.
    """
    workers = min(32, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(items), desc=description, unit="image", disable=None) as bar,
    ):
        for start in range(0, len(items), 16 * workers):
            for result in pool.map(function, items[start : start + 16 * workers]):
                bar.update()
                yield result


def read_image(example: Example) -> bytes:
    """Read the example's image file as it is.

    Raises DataError for a file that is not there, is too large, or cannot be read.
    """
    path, status = image_status(example)
    if status.st_size > MAX_FILE_BYTES:
        raise DataError(
            [
                f"example {example.id!r}: {path} has {status.st_size:,} bytes; at most"
                f" {MAX_FILE_BYTES:,} are read"
            ]
        )
    try:
        return _patiently(path.read_bytes)
    except OSError as error:
        raise _unreadable(example, path, error) from error


def load_image(example: Example, content: bytes | None = None) -> Image.Image:
    """Decode the example's image as 8-bit RGB, upright (the first picture of an animated PNG).

    content: of the image file, where it has been read already.

    16-bit greyscale is scaled, see `scaled_to_8_bits`. Transparency is put on black.

    Raises DataError for a file that is not a whole JPEG or PNG, has too many pixels or is a narrow
    strip.
    """
    return _decoded(example, read_image(example) if content is None else content)[0]


def _decoded(example: Example, content: bytes) -> tuple[Image.Image, float | None]:
    """Decode an image as `load_image` does -> (it, the share of pixels that scaling clipped)."""
    path = example.image_root / example.image
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            size, shape = image.width * image.height, f"{image.width} x {image.height} pixels"
            if size > MAX_PIXELS:
                raise DataError(
                    [f"example {example.id!r}: {path} has {shape}; at most {MAX_PIXELS:,} are read"]
                )
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise DataError(
                    [
                        f"example {example.id!r}: {path} has {shape}; one side may be at most"
                        f" {MAX_ASPECT_RATIO} times the other"
                    ]
                )
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:
        # of many classes: Pillow's readers raise what a damaged file makes them stumble over
        raise _unreadable(example, path, error, content) from error


def _kind_of(content: bytes) -> str:
    """Name what a file is that is no JPEG or PNG, as far as its first bytes tell."""
    if content[128:132] == b"DICM":
        return "it is DICOM: convert it with data.dicom"
    kinds = {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP", b"GIF8": "GIF", b"RIFF": "WebP"}
    kinds |= {b"\0\0\0\x0cjP": "JPEG 2000"}
    if content.lstrip().startswith(b"<"):
        return "it is HTML or XML, as a page that a download asks to log in on"
    found = next((kind for magic, kind in kinds.items() if content.startswith(magic)), None)
    return f"it is {found}: save it as PNG" if found else "it is of another kind"


def _unreadable(example: Example, path: Path, error: Exception, content: bytes = b"") -> DataError:
    # Pillow's own line names the path again, or the place of the file's content in memory.
    reason = _kind_of(content) if isinstance(error, UnidentifiedImageError) else error
    return DataError([f"example {example.id!r}: {path} is not a readable JPEG or PNG ({reason})"])


def _to_rgb(image: Image.Image) -> tuple[Image.Image, float | None]:
    if image.mode.startswith("I") or image.mode == "F":  # convert("L") would clip 16 bits at 255
        scaled, clipped = scaled_to_8_bits(np.asarray(image))
        return Image.fromarray(scaled).convert("RGB"), clipped
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB"), None
    return image.convert("RGB"), None


def scaled_to_8_bits(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Scale grey values of any range to 0..255 -> (uint8 of the same shape, share clipped).

    values: of one picture, any number type.

    The range runs from the 1st to the 99th hundredth of the values and a quarter of that width
    beyond on either side, or to the smallest and largest value where they are nearer. So a picture
    without far outliers keeps its whole range, and a hot pixel or a burned-in mark does not darken
    the rest. Where nearly all values are one, the range is the whole one.
    """
    values = values.astype(np.float32)
    lowest, highest = float(values.min()), float(values.max())
    low, high = map(float, np.quantile(values, QUANTILES, method="nearest"))
    margin = MARGIN * (high - low)
    if margin > 0:
        lowest, highest = max(lowest, low - margin), min(highest, high + margin)
    if highest <= lowest:
        return np.zeros(values.shape, dtype=np.uint8), 0.0
    clipped = float(np.mean((values < lowest) | (values > highest)))
    scaled = (np.clip(values, lowest, highest) - lowest) * (255.0 / (highest - lowest))
    return scaled.round().astype(np.uint8), clipped
