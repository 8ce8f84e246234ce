"""Read who is on an image, sex and age, from the cells of hospitals' tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from data.examples import MAX_AGE
from data.label_tables import Table

_SEX_COLUMNS = ("Sex", "Patient Gender", "Patient Sex")
_AGE_COLUMNS = ("Age", "Patient Age")
_SEX_CELLS = dict.fromkeys(("f", "female", "woman", "w", "weiblich"), "F") | dict.fromkeys(
    ("m", "male", "man", "männlich"), "M"
)
_AGE_CELL = re.compile(r"(\d{1,3})(?:\.0*)?([ymwd]?)")
_A_YEAR = {"": 1, "y": 1, "m": 12, "w": 52, "d": 365}  # 058Y, 011M: older files of NIH
_SHOWN = 5  # cells that a note lists


class WhoCells:
    """Read the sex and the age of a table's rows, as far as it has them.

    A cell that says neither is unknown and no error: NIH's first file has ages up to 411, CheXpert
    one sex 'Unknown'. `notes` counts them.

    indices: the columns of both, of one, or of neither. youngest: a smaller age is no age.
    """

    def __init__(self, table: Table, *, youngest: int = 0):
        kinds: list[tuple[str, Sequence[str], Callable[[str], Any]]] = [
            ("sex", _SEX_COLUMNS, sex_of),
            ("age", _AGE_COLUMNS, partial(age_of, youngest=youngest)),
        ]
        # (field, column, how a cell is read) of those that the table has
        self._fields = [
            (key, column, reader)
            for key, columns, reader in kinds
            for column in [name for name in columns if table.has(name)][:1]
        ]
        self.indices = table.find(*(column for _, column, _ in self._fields))
        self._read: dict[tuple[str, ...], dict[str, Any]] = {}
        self._unread: Counter[str] = Counter()

    def read(self, cells: Sequence[str]) -> dict[str, Any]:
        """Read the cells of the columns `indices` -> {"sex": ..., "age": ...}, None: unknown."""
        cells = tuple(cells)
        who = self._read.get(cells)
        if who is None:
            fields = zip(self._fields, cells, strict=True)
            who = self._read[cells] = {key: reader(cell) for (key, _, reader), cell in fields}
        if None in who.values():
            for (key, column, _), cell in zip(self._fields, cells, strict=True):
                if who[key] is None and cell.strip():
                    self._unread[f"{column} {cell!r}"] += 1
        return who

    def notes(self) -> list[str]:
        """Say which cells were taken as unknown, and how many images have each."""
        return unknown_notes(self._unread)


def sex_of(cell: str) -> str | None:
    """Read a sex -> "F" or "M", None where the cell says neither."""
    return _SEX_CELLS.get(cell.strip().casefold())


def age_of(cell: str, youngest: int = 0) -> int | None:
    """Read an age -> whole years, None where the cell says none. youngest: less is no age."""
    found = _AGE_CELL.fullmatch(cell.strip().casefold())
    years = int(found[1]) // _A_YEAR[found[2]] if found else -1
    return years if youngest <= years <= MAX_AGE else None


def unknown_notes(unread: Counter[str]) -> list[str]:
    """Say in a line which cells were taken as unknown and how often, [] where none was."""
    if not unread:
        return []
    shown = [f"{cell} ({count:,})" for cell, count in unread.most_common(_SHOWN)]
    more = f" and {len(unread) - _SHOWN} others" if len(unread) > _SHOWN else ""
    return [f"taken as unknown: {', '.join(shown)}{more}"]
