"""Read what the rows of a hospital's table say of the labels, in a column each or in one list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from data.files import DataError
from data.labels import LabelSet
from data.table_reading import HospitalTable, folded_name, parts_of, value_of

AUTO = "auto"  # --labels: every column that spells a label


@dataclass
class Said:
    """Hold what a row says of its labels: {label: 1, 0, -1 or None}, and its cells as written."""

    values: dict[str, int | None] = field(default_factory=dict)
    source: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


Reader = Callable[[list[str]], Said]


def label_of(name: str, renames: Mapping[str, str], label_set: LabelSet) -> str | None:
    """Find the label that a column or an entry names: by --rename, else by its spelling.

    Returns "" for one that is to be left out, and None for one that is no label.
    """
    renamed = renames.get(folded_name(name))
    return renamed if renamed == "" else label_set.find(name if renamed is None else renamed)


def columns_reader(
    table: HospitalTable, wanted: str, renames: Mapping[str, str], label_set: LabelSet
) -> Reader:
    """Make the function that reads labels from a column each.

    wanted: names of columns with commas between them, or AUTO.

    Raises DataError naming every column that is missing or no label.
    """
    problems: list[str] = []
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if wanted.strip() == AUTO:
        names = [name for name in table.columns if label_of(name, renames, label_set)]
        if not names:
            problems.append(
                f"{table.path}: no column spells a label; name them with --labels,"
                " and labels of your own with --label_file"
            )
    columns: dict[str, tuple[str, int]] = {}
    for name in names:
        try:
            index = table.index(name)
        except DataError as error:
            problems += error.problems
            continue
        label = label_of(name, renames, label_set)
        if label is None:
            problems.append(
                f"--labels {name}: is no label; say which it is, as --rename '{name}=LABEL'"
                f"{label_set.listing}"
            )
        elif label in columns:
            problems.append(f"--labels {name}: {columns[label][0]!r} is {label} already")
        elif label:
            columns[label] = name, index
    if problems:
        raise DataError(problems)

    def read(row: list[str]) -> Said:
        said = Said()
        for label, (name, index) in columns.items():
            value, known = value_of(row[index])
            said.values[label] = value
            if not known:
                said.problems.append(
                    f"column {name!r}: {row[index].strip()[:40]!r} is no label value; they are 1,"
                    " 0, -1 and blank, or yes, no and uncertain"
                )
            elif row[index].strip():
                said.source.append(f"{name}={row[index].strip()}")
        return said

    return read


def list_reader(
    table: HospitalTable,
    column: str,
    separator: str | None,
    renames: Mapping[str, str],
    label_set: LabelSet,
    evaluated: Sequence[str] | None,
) -> Reader:
    """Make the function that reads labels from one column that lists them.

    evaluated: the labels that the table can express. What is not listed of them is absent. None for
    those that some row lists: of the others nobody knows whether they were looked for.

    Raises DataError for a missing column.
    """
    index = table.index(column)
    if evaluated is None:
        parts = {part for _, row in table.rows for part in parts_of(row[index], separator)}
        evaluated = [label for part in parts if (label := label_of(part, renames, label_set))]

    def read(row: list[str]) -> Said:
        said = Said(dict.fromkeys(evaluated, 0))
        for part in parts_of(row[index], separator):
            said.source.append(part)
            label = label_of(part, renames, label_set)
            if label in said.values:
                said.values[label] = 1
            elif label is None:
                said.problems.append(
                    f"column {column!r}: {part[:60]!r} is no label; say which it is, as --rename"
                    f" '{part[:60]}=LABEL', or leave it out with '{part[:60]}='"
                )
        return said

    return read
