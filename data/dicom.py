"""Turn a folder of DICOM files into PNG pictures and a table of their tags, for data.table.

    pip install -e '.[dicom]'
    python -m data.dicom FOLDER --output_dir images
    python -m data.table images/images.csv --image image --patient patient ...

A picture becomes 8-bit grey as a viewer shows it first (DICOM PS3.3, C.7.6.3 and C.11): the
modality's rescaling or table, then the first VOI table or window, then MONOCHROME1 is inverted, so
that bone is bright. Without table and window the range of data/images.py's 16-bit reading is taken.
Padding is black. Colour becomes RGB. Overlays, and turns and flips that only tags ask for, are not
applied.

What a file's compression needs beyond pydicom is named. Pillow, which is there, reads JPEG baseline
and JPEG 2000; `pip install pylibjpeg pylibjpeg-libjpeg` adds lossless JPEG and JPEG-LS.

The pictures hold no tags. The table holds ids, sex, age and view of the patients, and no names.
Marks that are burned into the pixels stay. Nothing is sent anywhere.
"""

from __future__ import annotations

import csv
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data.command_line import Parser, exit_code, plain_integer
from data.console import print_errors
from data.files import MAX_PROBLEMS, DataError, process_mark
from data.images import FLAT_LEVELS, MAX_ASPECT_RATIO, MAX_PIXELS, in_parallel, scaled_to_8_bits

if TYPE_CHECKING:
    from pydicom import Dataset

MISSING = "DICOM files need pydicom: pip install -e '.[dicom]'"
TABLE = "images.csv"
MODALITIES = ("CR", "DX", "DR", "RG")  # of plain radiographs
# {column of the table: DICOM keyword}
COLUMNS = {
    "patient": "PatientID",
    "study": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
    "instance": "SOPInstanceUID",
    "accession": "AccessionNumber",
    "sex": "PatientSex",
    "age": "PatientAge",
    "view": "ViewPosition",
    "modality": "Modality",
    "body_part": "BodyPartExamined",
    "date": "StudyDate",
}


class NotConverted(Exception):
    """Say why a file gave no picture.

    damaged: it should have given one. Else it is simply no radiograph.
    """

    def __init__(self, reason: str, *, damaged: bool):
        self.damaged = damaged
        super().__init__(reason)


@dataclass(frozen=True)
class Converted:
    """Hold what became of one file.

    file: the DICOM file. row: of the table, None where it gave no picture. reason, damaged: as in
    `NotConverted`. flat: the picture has nearly one grey value.
    """

    file: Path
    row: dict[str, str] | None = None
    reason: str = ""
    damaged: bool = False
    flat: bool = False


# ---- one picture ---------------------------------------------------------------------------------
def read_dataset(file: Path) -> Dataset:
    """Read a DICOM file. Raises NotConverted for one that is none."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        return dcmread(file)
    except InvalidDicomError as error:
        raise NotConverted("no DICOM file (its header is missing)", damaged=False) from error
    except Exception as error:  # of many classes, for a damaged file
        raise NotConverted(f"cannot be read ({_line(error)})", damaged=True) from error


def picture_of(
    dataset: Dataset, *, frame: int | None = None, modalities: Sequence[str] = MODALITIES
) -> Image.Image:
    """Make the picture of a DICOM file, grey or RGB, 8 bits.

    frame: the one to take of several, from 1. modalities: those that are converted.

    Raises NotConverted for a file that has no picture of that kind, or one that cannot be read.
    """
    modality = str(dataset.get("Modality", ""))
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise NotConverted("no pixel data", damaged=False)
    if modality and modality not in modalities:
        raise NotConverted(f"modality {modality}", damaged=False)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1 and frame is None:
        raise NotConverted(f"{frames} frames: choose one with --frame", damaged=False)
    if frame is not None and frame > frames:
        raise NotConverted(f"no frame {frame}: it has {frames}", damaged=False)
    width, height = int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0)
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise NotConverted(f"{width} x {height} pixels", damaged=True)
    return Image.fromarray(_shown(dataset, _pixels(dataset, (frame or 1) - 1)))


def _pixels(dataset: Dataset, index: int) -> np.ndarray:
    """Decode one frame -> [rows, columns] or [rows, columns, 3]."""
    from pydicom.pixels import pixel_array

    try:
        return pixel_array(dataset, index=index)
    except RuntimeError as error:  # no decoder
        syntax = dataset.file_meta.TransferSyntaxUID
        raise NotConverted(
            f"compressed as {syntax.name}: pip install pylibjpeg pylibjpeg-libjpeg"
            " pylibjpeg-openjpeg, or decompress it with dcmdjpeg or gdcmconv",
            damaged=True,
        ) from error
    except Exception as error:  # of many classes, for a damaged file
        raise NotConverted(f"its pixels cannot be read ({_line(error)})", damaged=True) from error


def _shown(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Turn stored values into 8 bits as they are shown."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    kind = str(dataset.get("PhotometricInterpretation", ""))
    if kind == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
    if values.ndim == 3:  # RGB: pydicom has turned other colours into it
        bits = 16 if values.dtype.itemsize > 1 else 8
        return (values >> (bits - 8)).astype(np.uint8)
    padded = _padding(dataset, values)
    if tables := dataset.get("ModalityLUTSequence"):
        values, _ = _looked_up(dataset, tables[0], values)
    else:
        values = apply_modality_lut(values, dataset)
    grey = _in_window(dataset, values, ~padded)
    if kind == "MONOCHROME1":
        grey = 255 - grey
    grey[padded] = 0
    return grey


def _padding(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Find the pixels that are no part of the picture -> bool of the same shape."""
    first = dataset.get("PixelPaddingValue")
    if first is None or "FloatPixelData" in dataset:
        return np.zeros(values.shape, dtype=bool)
    last = dataset.get("PixelPaddingRangeLimit", first)
    padded = (values >= min(first, last)) & (values <= max(first, last))
    return padded if not padded.all() else np.zeros(values.shape, dtype=bool)


def _in_window(dataset: Dataset, values: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Scale values to uint8 by the file's first VOI table or window, else by their own range.

    real: the pixels that are no padding.
    """
    if tables := dataset.get("VOILUTSequence"):
        looked_up, table = _looked_up(dataset, tables[0], values)
        # by the table's own smallest and largest entry: its bits are often said wrongly
        low, high = float(table.min()), float(table.max())
        return _to_bytes((looked_up - low) / (high - low) if high > low else 0.0 * looked_up)
    center, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if center is not None and width is not None and width >= (1 if function == "LINEAR" else 1e-9):
        return _to_bytes(windowed(values.astype(np.float64), center, width, function))
    grey = np.zeros(values.shape, dtype=np.uint8)
    grey[real] = scaled_to_8_bits(values[real])[0]
    return grey


def _looked_up(
    dataset: Dataset, item: Dataset, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Look values up in a table of the file -> (what they become, the table's entries).

    Written out because pydicom 3.0 counts the entries of an 8-bit table in 8 bits.
    """
    entries, first, _ = item.LUTDescriptor
    entries = entries or 65_536  # as the standard says
    if isinstance(item.LUTData, bytes):
        little = dataset.file_meta.TransferSyntaxUID.is_little_endian
        kind = "u1" if len(item.LUTData) < 2 * entries else "<u2" if little else ">u2"
        table = np.frombuffer(item.LUTData, kind)[:entries]
    else:
        table = np.atleast_1d(np.asarray(item.LUTData))
    places = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
    return table[places].astype(np.float64), table


def windowed(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Map values to 0..1 by a window, as DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3 define it.

    function: LINEAR, LINEAR_EXACT or SIGMOID. width: 1 at least for LINEAR.
    """
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    if width == 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def _to_bytes(shares: np.ndarray) -> np.ndarray:
    return (shares * 255).round().astype(np.uint8)


def _first(value: Any) -> float | None:
    """Take the first of a tag's numbers, None where it has none that is one."""
    first = (
        value if isinstance(value, str | int | float) or value is None else next(iter(value), None)
    )
    try:
        number = None if first is None else float(first)
    except ValueError:
        return None
    return number if number is not None and np.isfinite(number) else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


# ---- a folder ------------------------------------------------------------------------------------
def convert(
    file: Path, folder: Path, output: Path, *, frame: int | None, modalities: Sequence[str]
) -> Converted:
    """Convert one file of `folder` to a PNG at the same place in `output`."""
    try:
        dataset = read_dataset(file)
        picture = picture_of(dataset, frame=frame, modalities=modalities)
    except NotConverted as error:
        return Converted(file, reason=str(error), damaged=error.damaged)
    except (
        Exception
    ) as error:  # of many classes, for tags that are damaged or contradict each other
        return Converted(file, reason=f"its tags cannot be used ({_line(error)})", damaged=True)
    image = _image_of(file.relative_to(folder))
    target = output / image
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target)
    row = {name: _text(dataset.get(keyword)) for name, keyword in COLUMNS.items()}
    lows, highs = zip(*_extrema(picture), strict=True)
    flat = max(highs) - min(lows) < FLAT_LEVELS
    return Converted(file, {"image": image.as_posix()} | row, flat=flat)


def _image_of(file: Path) -> Path:
    """Name the picture of a file: .png takes the place of a suffix of DICOM, else it is added."""
    bare = file.with_suffix("") if file.suffix.lower() in (".dcm", ".dicom") else file
    return bare.with_name(f"{bare.name}.png")


def _extrema(picture: Image.Image) -> list[tuple[int, int]]:
    values = np.asarray(picture).reshape(picture.height * picture.width, -1)
    return [(int(band.min()), int(band.max())) for band in values.T]


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return "".join(sign for sign in text if ord(sign) >= 32).strip()


def files_of(folder: Path) -> list[Path]:
    """List the files of a folder and all below it, but for those that are surely no DICOM."""
    others = {".png", ".jpg", ".jpeg", ".csv", ".txt", ".html", ".json", ".xml", ".pdf", ".md"}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.suffix.lower() not in others
    )


def convert_folder(
    folder: Path, output: Path, *, frame: int | None, modalities: Sequence[str]
) -> list[Converted]:
    """Convert all files of a folder -> what became of each. The output is written whole or not.

    Raises DataError where there is nothing to convert, where the output exists, and where two files
    would give one picture.
    """
    if not folder.is_dir():
        raise DataError([f"{folder}: no such folder; give one of DICOM files"])
    if output.exists():
        raise DataError(
            [f"--output_dir {output} exists and nothing is overwritten; name another folder"]
        )
    files = files_of(folder)
    sources: dict[Path, list[str]] = {}
    for source in files:
        sources.setdefault(_image_of(source), []).append(str(source))
    twice = {image: names for image, names in sources.items() if len(names) > 1}
    if twice:
        raise DataError(
            f"{' and '.join(names)} would {'both' if len(names) == 2 else 'all'} become {image}"
            for image, names in twice.items()
        )
    temporary = output.with_name(f".{output.name}.{process_mark()}.tmp")
    try:
        temporary.mkdir(parents=True)
        work = partial(convert, folder=folder, output=temporary, frame=frame, modalities=modalities)
        converted = list(in_parallel(work, files, "DICOM"))
        rows = [result.row for result in converted if result.row is not None]
        if not rows:
            raise DataError([f"{folder}: no file gave a picture", *reasons(converted)])
        with (temporary / TABLE).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["image", *COLUMNS])
            writer.writeheader()
            writer.writerows(rows)
        os.rename(temporary, output)
    except OSError as error:
        raise DataError([f"--output_dir {output}: cannot be written ({error})"]) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return converted


def reasons(converted: Sequence[Converted]) -> list[str]:
    """Count what gave no picture by its reason, with an example, and name every damaged file."""
    others = Counter(c.reason for c in converted if c.reason and not c.damaged)
    example = {c.reason: c.file for c in reversed(converted) if c.reason}
    lines = [
        f"not converted: {count} {'file' if count == 1 else 'files'}, {reason} (such as"
        f" {example[reason]})"
        for reason, count in others.most_common(MAX_PROBLEMS)
    ]
    damaged = [f"{c.file}: {c.reason}" for c in converted if c.damaged]
    lines += damaged[:MAX_PROBLEMS]
    if len(damaged) > MAX_PROBLEMS:
        lines.append(f"and {len(damaged) - MAX_PROBLEMS} more files that cannot be read")
    return lines


# ---- command -------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code: 0 done, 1 damaged files, 2 no picture."""
    parser = Parser(
        prog="python -m data.dicom",
        description="Turn DICOM files into PNG pictures and a table of their tags.",
        epilog="Nothing is sent anywhere. The pictures hold no tags; what is burned in stays.",
    )
    parser.add_argument("folder", type=Path, help="folder of DICOM files, with all below it")
    parser.add_argument(
        "--output_dir",
        required=True,
        type=Path,
        help=f"new folder for the pictures and {TABLE}",
    )
    parser.add_argument(
        "--frame",
        type=plain_integer,
        metavar="N",
        help="frame to take of files with several, from 1",
    )
    parser.add_argument(
        "--modality",
        nargs="+",
        default=list(MODALITIES),
        metavar="CODE",
        help=f"modalities to convert (default: {' '.join(MODALITIES)})",
    )
    arguments = parser.parse_args(argv)
    try:
        import pydicom  # noqa: F401 - an extra, which --help does not need
    except ImportError:
        print_errors([MISSING])
        return 2
    try:
        if arguments.frame is not None and arguments.frame < 1:
            raise DataError([f"--frame {arguments.frame}: frames are counted from 1"])
        converted = convert_folder(
            arguments.folder,
            arguments.output_dir,
            frame=arguments.frame,
            modalities=arguments.modality,
        )
    except DataError as error:
        print_errors(error.problems)
        return 2
    done = [result for result in converted if result.row is not None]
    print(f"converted {len(done):,} of {len(converted):,} files")
    print("".join(f"  {line}\n" for line in reasons(converted)), end="")
    if flat := [result.file for result in done if result.flat]:
        print(
            f"  note: {len(flat)} pictures have nearly one grey value, such as {flat[0]}: does its"
            " window fit its values?"
        )
    table = arguments.output_dir / TABLE
    command = shlex.join(["python", "-m", "data.table", str(table), "--help"])
    print(f"written: {table}; add labels to it, then: {command}")
    return 1 if any(result.damaged for result in converted) else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
