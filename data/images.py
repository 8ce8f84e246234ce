"""The only place that opens an image."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.records import MAX_PROBLEMS, DataError, Example

MAX_PIXELS = 100_000_000  # the largest digital radiographs have about 20 million; beyond this it is a bomb or a mistake
FORMATS = ("JPEG", "PNG")


def image_path(example: Example) -> Path:
    """Where the example's image lies. Raises DataError unless it is a regular file under `image_root`, symbolic links
    resolved.
    """
    root = example.image_root.resolve()
    name = f"example {example.id!r}: image {example.image!r}"
    try:
        path = (root / example.image).resolve()
    except (OSError, ValueError) as error:
        raise DataError([f"{name}: not a usable path ({error})"]) from error
    if not path.is_relative_to(root):
        raise DataError(
            [f"{name} lies outside the image root {root}; paths must be relative to it and stay in it (--image_root)"]
        )
    if not path.is_file():
        raise DataError([f"{name}: no such file under the image root {root}; check the row or --image_root"])
    return path


def check_images(examples: Iterable[Example]) -> None:
    """Raise DataError naming every example whose image file is missing or out of bounds: before a run, not after an hour of
    it.
    """
    problems: list[str] = []
    for example in examples:
        try:
            image_path(example)
        except DataError as error:
            problems += error.problems
    if problems:
        hidden = len(problems) - MAX_PROBLEMS
        raise DataError(problems[:MAX_PROBLEMS] + ([f"and {hidden} more images"] if hidden > 0 else []))


def load_image(example: Example) -> Image.Image:
    """The example's image as 8-bit RGB, upright.

    16-bit greyscale is scaled to its own range, not clipped; transparency is put on black. Raises DataError for a file that
    is not a whole JPEG or PNG or has too many pixels.
    """
    path = image_path(example)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    [
                        f"example {example.id!r}: {path} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read"
                    ]
                )
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them come out of damaged files
        raise DataError([f"example {example.id!r}: {path} is not a readable JPEG or PNG ({error})"]) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # convert("L") would clip 16 bits at 255
        values = np.asarray(image, dtype=np.float32)
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image.convert("RGB")
