"""Read a table of any hospital, as programs write CSV in many countries: text, separators, cells.

The three published data sets have loaders of their own (mimic.py, chexpert.py, nih.py). Nothing is
guessed that could be guessed wrongly: bytes that are not UTF-8 ask for --encoding, a cell that is
no known value is a problem of its row.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.csv_text import (
    HEAD,
    SEPARATORS,
    UNREADABLE,
    length_problem,
    opened,
    separator_of,
    wide_encoding,
)
from data.files import DataError
from data.json_rows import other_kind

MAX_CELL = 10_000_000  # characters: a whole report is far below, a quote that never closes is not

# What a cell of a label says, in small letters. A decimal comma is read as a point first.
VALUES: dict[str, int | None] = (
    dict.fromkeys(("", "nan", "na", "n/a", "null", "none", "<na>", "#n/a"))
    | dict.fromkeys(("1", "yes", "y", "true", "t", "positive", "pos", "present", "x", "ja"), 1)
    | dict.fromkeys(("0", "no", "n", "false", "f", "negative", "neg", "absent", "nein"), 0)
    | dict.fromkeys(("-1", "uncertain", "u", "unsure", "possible", "maybe", "fraglich", "?"), -1)
)
_NUMBER = re.compile(r"([+-]?)0*(\d+)(?:[.,]0*)?")


def folded_name(name: str) -> str:
    """Fold the name of a column for comparing: outer white space, case, marks beside a letter.

    Some systems write an umlaut as a letter and a mark, others as one character.
    """
    return unicodedata.normalize("NFC", name).strip().casefold()


@dataclass(frozen=True)
class HospitalTable:
    """Hold the rows of a table.

    columns: their names, outer white space taken off. rows: (number, cells), numbered as in a
    spreadsheet: the header is row 1.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[int, list[str]]]

    def index(self, column: str) -> int:
        """Find a column by its name, whatever the case. Raises DataError where it is not one."""
        names = [folded_name(name) for name in self.columns]
        count = names.count(folded_name(column))
        if count == 1:
            return names.index(folded_name(column))
        if count > 1:
            raise DataError([f"{self.path}: column {column!r} is there {count} times"])
        close = difflib.get_close_matches(column, self.columns, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        shown = ", ".join(map(repr, self.columns))
        raise DataError([f"{self.path}: column {column!r} is missing; it has {shown}{hint}"])


def read_table(
    path: Path, *, separator: str | None = None, encoding: str | None = None
) -> tuple[HospitalTable, list[str]]:
    """Read a CSV file, also compressed by gzip -> (its rows, problems of rows by their number).

    separator: a name of SEPARATORS, None for the one that the header has most of.
    encoding: of the text, None for UTF-8, or UTF-16 where the file shows it.

    Raises DataError for a file that is no table.
    """
    text = _text(path, encoding)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise DataError([f"{path}: holds no header row"])
    sign = SEPARATORS[separator] if separator else separator_of(first)
    csv.field_size_limit(MAX_CELL)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True)
    numbered: list[tuple[int, list[str]]] = []
    try:
        for row in lines:
            numbered.append((len(numbered) + 1, row))
    except csv.Error as error:
        raise DataError(
            [
                f"{path}, row {len(numbered) + 1}: cannot be read ({error}); look for a quote that"
                " does not close"
            ]
        ) from error
    filled = [(number, row) for number, row in numbered if any(cell.strip() for cell in row)]
    (_, header), *rows = filled
    columns = tuple(name.strip() for name in header)
    while columns and not columns[-1]:  # separators at the ends of all lines
        columns = columns[:-1]
    sound, problems = [], []
    for number, row in rows:
        if len(row) < len(columns) or any(cell.strip() for cell in row[len(columns) :]):
            problems.append(length_problem(path, number, len(row), len(columns)))
        else:
            sound.append((number, row))
    return HospitalTable(path, columns, sound), problems


def _text(path: Path, encoding: str | None) -> str:
    try:
        with opened(path) as file:
            content = file.read()
    except UNREADABLE as error:
        raise DataError([f"{path}: cannot be read ({error})"]) from error
    head = content[:HEAD]
    wide = wide_encoding(head)
    kind = None if wide or encoding else other_kind(head)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[{")):
        kind = "JSON: a data file already, or nearly; look at it with data.check"
    if kind and "a table (CSV" not in kind:
        raise DataError([f"{path}: is no table, but {kind}"])
    try:
        return content.decode(encoding or wide or "utf-8-sig").removeprefix("\ufeff")
    except LookupError as error:
        raise DataError([f"--encoding {encoding}: no such encoding"]) from error
    except UnicodeDecodeError as error:
        row = content[: error.start].count(b"\n") + 1
        raise DataError(
            [
                f"{path}, line {row}: byte {content[error.start]:#04x} is no {error.encoding} text;"
                " give the table's --encoding, such as cp1252 (Western Europe, Windows), or save it"
                " as UTF-8"
            ]
        ) from error


# ---- cells ---------------------------------------------------------------------------------------
def value_of(cell: str) -> tuple[int | None, bool]:
    """Read the cell of one label -> (1, 0, -1 or None for blank, whether it is a known value)."""
    folded = cell.strip().casefold()
    if number := _NUMBER.fullmatch(folded):
        folded = ("-" if number[1] == "-" and number[2] != "0" else "") + number[2]
    return VALUES.get(folded), folded in VALUES


def parts_of(cell: str, separator: str | None) -> list[str]:
    """Part a cell that lists labels: ["Edema", "Mass"] of "Edema|Mass" or "['Edema', 'Mass']".

    separator: None for | and ; and line breaks, and for a comma where there is none of these.
    """
    text = cell.strip()
    if text[:1] == "[" and text[-1:] == "]":
        text = text[1:-1]
    if separator is not None:
        parts = text.split(separator)
    else:
        parts = re.split(r"[|;\n]", text) if re.search(r"[|;\n]", text) else text.split(",")
    return [part for part in (part.strip().strip("'\"").strip() for part in parts) if part]


def renames_of(values: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Read "Herz=Cardiomegaly" and "Other=" (left out) -> ({name: label}, problems).

    Names are as `folded_name` writes them.
    """
    renames: dict[str, str] = {}
    problems = []
    for value in values:
        name, sign, label = value.rpartition("=")
        key = folded_name(name)
        if not sign or not key:
            problems.append(f"--rename {value}: expected NAME=LABEL, or NAME= to leave it out")
        elif key in renames:
            problems.append(f"--rename {value}: {name.strip()!r} is renamed twice")
        else:
            renames[key] = label.strip()
    return renames, problems


def template_fields(template: str) -> Iterator[str]:
    """Yield the columns that a path such as images/{accession}.png names."""
    yield from re.findall(r"\{([^{}]+)\}", template)
