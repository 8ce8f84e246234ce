"""Read the label tables of the published data sets: their files, their columns, their cells.

Rows are numbered as in a spreadsheet: the header is row 1. A cell that is wrong is named with file,
row and column.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import getitem, itemgetter
from pathlib import Path

from data.csv_text import HEAD, UNREADABLE, length_problem, opened, separator_of, wide_encoding
from data.files import DataError, first_problems
from data.labels import LABELS, NO_FINDING, LabelPolicy, canonical_label


# ---- files ---------------------------------------------------------------------------------------
def source_folder(folder: str | Path) -> Path:
    """Check that a folder is there. Raises DataError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError([f"{folder}: no such folder"])
    return folder


def places(folder: Path) -> list[Path]:
    """List the folder and the folders directly in it, by name.

    Downloads are unpacked with and without their outer folder.
    """
    return [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]


def find_file(folder: Path, names: Sequence[str]) -> Path:
    """Find the first of `names` in `folder`, else in one of its folders, plain or with .gz added.

    Raises DataError where there is none, and where two folders have the same file.
    """
    outer, *inner = places(folder)
    for name in names:
        for candidates in ([outer], inner):
            found = [
                path for place in candidates if (path := _plain_or_gz(place, name)) is not None
            ]
            if len(found) > 1:
                both = " and in ".join(path.parent.name for path in found)
                raise DataError([f"{folder}: {name} is in {both}; name one of them"])
            if found:
                return found[0]
    raise DataError(
        [
            f"{folder}: holds none of {', '.join(names)} (nor with .gz), and no folder in it does;"
            " put the file there, or give the folder above that holds it"
        ]
    )


def _plain_or_gz(place: Path, name: str) -> Path | None:
    return next((path for path in (place / name, place / f"{name}.gz") if path.is_file()), None)


def read_text(path: Path) -> str:
    """Read a small text file, such as a list of images, plain or compressed by gzip.

    Raises DataError for one that is no UTF-8 text.
    """
    try:
        with opened(path) as file:
            return file.read().decode("utf-8-sig")
    except (*UNREADABLE, UnicodeDecodeError) as error:
        raise DataError([f"{path}: cannot be read ({error}); download it again"]) from error


def raise_problems(problems: Sequence[str]) -> None:
    """Raise DataError with the problems, a long list cut, where there are any."""
    if problems:
        raise DataError(first_problems(problems))


class Table:
    """Read a CSV file (.csv or .csv.gz) by column name.

    It is UTF-8 with commas, or UTF-16, semicolons or tabs where it was saved again so.
    Names are compared without case and outer white space.

    Raises DataError for a file without a header or with a column twice.
    """

    def __init__(self, path: Path):
        self.path = path
        header = next(self._lines(), None)
        if not header or not any(header):
            raise DataError([f"{path}: has no header row"])
        self.columns = {
            name.strip().casefold(): index for index, name in enumerate(header) if name.strip()
        }
        # {index: name as written}
        self.names = {index: header[index].strip() for index in self.columns.values()}
        self._width = max(self.columns.values()) + 1  # NIH has had trailing commas
        twice = [
            name
            for name, count in Counter(
                name.strip().casefold() for name in header if name.strip()
            ).items()
            if count > 1
        ]
        if twice:
            raise DataError([f"{path}: column {name!r} occurs twice" for name in twice])

    def find(self, *names: str) -> list[int]:
        """Find the indices of columns. Raises DataError naming those that are missing."""
        missing = [name for name in names if name.casefold() not in self.columns]
        if missing:
            raise DataError(
                [
                    f"{self.path}: column {', '.join(map(repr, missing))} is missing; it has"
                    f" {self._shown()}"
                ]
            )
        return [self.columns[name.casefold()] for name in names]

    def has(self, name: str) -> bool:
        return name.casefold() in self.columns

    def label_columns(self) -> dict[str, int]:
        """Find the columns of the 14 labels -> {label: column}, by any spelling of data/labels.py.

        Only No Finding may be missing. Raises DataError for another one, and for a label that has
        two columns.
        """
        found: dict[str, int] = {}
        for index, name in self.names.items():
            label = canonical_label(name)
            if label in found:
                raise DataError(
                    [
                        f"{self.path}: columns {self.names[found[label]]!r} and {name!r} are both"
                        f" {label}"
                    ]
                )
            if label is not None:
                found[label] = index
        missing = [label for label in LABELS if label not in found and label != NO_FINDING]
        if missing:
            raise DataError(
                [
                    f"{self.path}: label column {', '.join(map(repr, missing))} is missing; it has"
                    f" {self._shown()}"
                ]
            )
        return {label: found[label] for label in LABELS if label in found}

    def rows(
        self, problems: list[str], first: Sequence[int], second: Sequence[int]
    ) -> Iterator[tuple[int, tuple, tuple]]:
        """Read every row -> (row number, cells of the columns `first`, cells of `second`).

        problems: gets a line for each row of another length.
        first, second: two columns or more each.
        """
        width, pick_first, pick_second = self._width, itemgetter(*first), itemgetter(*second)
        lines = self._lines()
        next(lines)
        for number, row in enumerate(lines, start=2):
            if len(row) != width:
                if not row:
                    continue
                if len(row) < width or any(row[width:]):
                    problems.append(length_problem(self.path, number, len(row), width))
                    continue
            yield number, pick_first(row), pick_second(row)

    def _lines(self) -> Iterator[list[str]]:
        row = 0
        try:
            with opened(self.path) as file:
                encoding = wide_encoding(file.read(HEAD)) or "utf-8-sig"
                file.seek(0)
                text = io.TextIOWrapper(file, encoding=encoding, newline="")
                header = text.readline().removeprefix("\ufeff")
                for line in csv.reader(chain([header], text), delimiter=separator_of(header)):
                    row += 1
                    yield line
        except (*UNREADABLE, UnicodeError, csv.Error) as error:
            raise DataError(
                [f"{self.path}, after row {row}: cannot be read ({error}); download it again"]
            ) from error

    def _shown(self) -> str:
        return ", ".join(self.names.values())


# ---- labels --------------------------------------------------------------------------------------
@dataclass(eq=False, slots=True)
class Reading:
    """Hold what one combination of label cells says.

    labels, evaluated, source_labels: as in Example.
    columns: labels that have a column.
    cells: theirs, as written.
    bad: (column, cell) of every cell that holds no label value.
    """

    labels: tuple[str, ...] = ()
    evaluated: tuple[str, ...] = LABELS
    source_labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()


VALUES = {"": None, "1.0": 1, "0.0": 0, "-1.0": -1, "1": 1, "0": 0, "-1": -1}


class LabelCells:
    """Read the label cells of a table's rows by a policy.

    Equal rows share a Reading, and rows that mean the same are combined once.
    """

    def __init__(self, table: Table, policy: LabelPolicy):
        columns = table.label_columns()
        self.labels, self.indices = tuple(columns), tuple(columns.values())
        self._policy = policy
        self._names = [table.names[index] for index in self.indices]
        self._strings = [{cell: f"{name}={cell}" for cell in VALUES} for name in self._names]
        self._meanings = [
            {cell: policy.meaning(label, value) for cell, value in VALUES.items()}
            for label in self.labels
        ]
        self._combined: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._readings: dict[tuple[str, ...], Reading] = {}

    def read(self, cells: tuple[str, ...]) -> Reading:
        """Read the label cells of one row.

        cells: of the columns `indices`. Those that are not blank become source_labels, as
        'Edema=-1.0'.
        """
        reading = self._readings.get(cells)
        if reading is None:
            reading = self._readings[cells] = self._read(cells)
        return reading

    def _read(self, cells: tuple[str, ...]) -> Reading:
        try:
            meanings = tuple(map(getitem, self._meanings, cells))
        except KeyError:
            return Reading(
                bad=tuple(
                    (name, cell)
                    for name, cell in zip(self._names, cells, strict=True)
                    if cell not in VALUES
                )
            )
        if meanings not in self._combined:
            by_label = dict(zip(self.labels, meanings, strict=True))
            self._combined[meanings] = self._policy.combine(by_label)
        labels, evaluated = self._combined[meanings]
        written = map(getitem, self._strings, cells)
        strings = tuple([string for string, cell in zip(written, cells, strict=True) if cell])
        return Reading(labels, evaluated, strings, self.labels, cells)


def cell_problems(table: Table, row: int, reading: Reading) -> list[str]:
    """Write one line for each cell that is no label value."""
    return [
        f"{table.path}, row {row}, column {name!r}: {cell!r} is no label value; they are 1, 0, -1"
        " and blank"
        for name, cell in reading.bad
    ]
