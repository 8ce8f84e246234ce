"""Open images, here and nowhere else.

Regular JPEG and PNG files under the data set's image root are read. Everything else is refused with
a line that names the example, the path and the reason, so that a damaged or hostile file can stop
or leave a run but never enter it unseen.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
FORMATS = ("JPEG", "PNG")
# Of how a file becomes pixels. Image features that are kept on a disk belong to one reading: a
# change below that makes other pixels of a file that is read already needs the next number.
READING = 1

Item = TypeVar("Item")
Result = TypeVar("Result")


def image_path(example: Example) -> Path:
    """Find the example's image file.

    Raises DataError unless it is a regular file under `image_root`, symbolic links resolved, named
    by a relative path without `..`.
    """
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
        path = (root / example.image).resolve()
        inside = path.is_relative_to(root)
        mode = path.stat().st_mode if inside else 0
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            [f"{name}: no such file under the image root {root}; check the row or --image_root"]
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        # too long, a null byte, a loop of links, no permission
        raise DataError(
            [f"{name}: not a usable path ({getattr(error, 'strerror', None) or error})"]
        ) from error
    if not inside:
        raise DataError([f"{name} lies outside the image root {root}, through a symbolic link"])
    if not stat.S_ISREG(mode):  # a pipe would wait for ever
        raise DataError([f"{name}: {path} is not a regular file; check the row or --image_root"])
    return path


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


def image_problem(example: Example) -> str | None:
    """Read all of the example's image and say why it cannot be used, or None for a good one."""
    try:
        load_image(example)
    except DataError as error:
        return error.problems[0]
    return None


def image_problems(examples: Sequence[Example], description: str = "images") -> list[str | None]:
    """Find the `image_problem` of every example, in their order.

    Works in parallel, with a progress bar on stderr.
    """
    return list(in_parallel(image_problem, examples, description))


def without_bad_images(examples: Sequence[Example], name: str) -> tuple[list[Example], list[dict]]:
    """Read all images of a data set -> (examples with a good image, rows of the others).

    name: of the data set, for messages.
    The rows have "id", "patient_id", "image" and "reason".

    Raises DataError where no example is left.
    """
    problems = image_problems(examples, f"{name} (checking images)")
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

    Raises DataError for a file that is not there or cannot be read.
    """
    path = image_path(example)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(example, path, error) from error


def load_image(example: Example, content: bytes | None = None) -> Image.Image:
    """Decode the example's image as 8-bit RGB, upright (the first picture of an animated PNG).

    content: of the image file, where it has been read already.

    16-bit greyscale is scaled to its own range, not clipped. Transparency is put on black.

    Raises DataError for a file that is not a whole JPEG or PNG, has too many pixels or is a narrow
    strip.
    """
    path = image_path(example)
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
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
        raise _unreadable(example, path, error) from error


def _unreadable(example: Example, path: Path, error: Exception) -> DataError:
    # Pillow's own line names the path again, or the place of the file's content in memory.
    reason = "it is of another kind" if isinstance(error, UnidentifiedImageError) else error
    return DataError([f"example {example.id!r}: {path} is not a readable JPEG or PNG ({reason})"])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # convert("L") would clip 16 bits at 255
        values = np.asarray(image, dtype=np.float32)
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert(
            "RGB"
        )
    return image.convert("RGB")
