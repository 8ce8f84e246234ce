"""Find the images of the hospitals' downloads, however they were unpacked, copied or resized.

A label file names its images as its release lays them out. Mirrors have other folders, put all
images into one, or write PNG for JPEG. Here the folders are looked at, and where nothing is found
one line says what was looked for and where.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_DEPTH, MAX_FOLDERS = 4, 2_000  # of a download, above its patients' folders
# A patient's, a study's or a group of patients' own folder: images lie in it in a fixed way.
_PATIENTS = re.compile(r"p\d{2,8}|s\d{8}|patient\d+|study\d+")


def folders(top: Path) -> Iterator[Path]:
    """Yield a folder and those below it, the nearest first, but for patients' own folders."""
    level, count = [top], 0
    for _ in range(MAX_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            count += 1
            if count > MAX_FOLDERS:
                return
            try:
                inside = sorted(folder.iterdir())
            except PermissionError:  # such as lost+found of a disk
                continue
            yield folder
            below += [
                path for path in inside if path.is_dir() and not _PATIENTS.fullmatch(path.name)
            ]
        level = below


def relative(path: Path, top: Path) -> str:
    """Write a path below `top` for an example: with slashes, without a leading dot."""
    return path.relative_to(top).as_posix()


def joined(*parts: str) -> str:
    """Join parts of an example's path, where the first may be the top folder itself."""
    return "/".join(part for part in parts if part not in ("", "."))


def files_by_stem(top: Path, name: re.Pattern[str]) -> dict[str, str]:
    """Find all images whose stem matches -> {stem: path relative to `top`}, the nearest first.

    Images of the release lie in images/, images_001/images/ and so on, in png/ of the Google Cloud
    bucket, in images-224/images-224/ of a resized copy, or beside the label file.
    """
    found: dict[str, str] = {}
    for folder in folders(top):
        inside = relative(folder, top)
        for entry in os.scandir(folder):
            stem, dot, suffix = entry.name.rpartition(".")
            if f"{dot}{suffix}".lower() in SUFFIXES and name.fullmatch(stem):
                found.setdefault(stem, joined(inside, entry.name))
    return found


@dataclass(frozen=True)
class Layout:
    """Hold where the images of patients lie: a root and how paths go on from it.

    root: relative to the hospital's folder. path: with {fields} of an image. suffix: of its file.
    """

    root: str
    path: str
    suffix: str

    def of(self, **fields: str) -> str:
        """Write the path of one image, relative to the hospital's folder."""
        return joined(self.root, self.path.format(**fields) + self.suffix)


def find_layout(
    top: Path, roots: Sequence[Path], shapes: Sequence[tuple[str, str, str]]
) -> Layout | None:
    """Find the first root that holds an image in one of the shapes, or None.

    roots: looked at in this order. shapes: (path with {fields}, glob that finds such files without
    their suffix, pattern of such a file's stem).
    """
    for root in roots:
        for path, glob, stem in shapes:
            for file in root.glob(f"{glob}.*"):
                if file.suffix.lower() in SUFFIXES and re.fullmatch(stem, file.stem):
                    return Layout(relative(root, top), path, file.suffix)
    return None


def looked_for(what: str, top: Path, where: Sequence[str]) -> str:
    """Say in one line that no image was found, what was looked for and where."""
    dicom = next((file for folder in folders(top) for file in folder.glob("*.dcm")), None) or next(
        top.glob("files/p*/p*/s*/*.dcm"), None
    )
    hint = f"; {dicom.name} is DICOM: convert it with data.dicom" if dicom else ""
    return f"no image found: looked for {what} in {top}: {', '.join(where)}{hint}"
