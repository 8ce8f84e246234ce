"""Share what the loaders of the three hospitals need: tables, the choice of images, the report.

A loader reads every row before it complains, so that one message names all bad rows (file, row,
column). Rows are numbered as in a spreadsheet: the header is row 1.
"""

from __future__ import annotations

import csv
import gc
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import getitem, itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from data.csv_text import HEAD, UNREADABLE, length_problem, opened, separator_of, wide_encoding
from data.examples import MAX_AGE, Example
from data.files import DataError, first_problems, sha256_of
from data.labels import (
    CHEXPERT,
    LABELS,
    NO_FINDING,
    SUPPORT_DEVICES,
    UNCERTAIN_RULES,
    LabelPolicy,
    LabelSet,
    canonical_label,
)

VIEWS = ("frontal", "all")
FRONTALS = ("pa_first", "first", "all")
_RANKS = {"PA": 0, "AP": 1}  # at pa_first, then other frontal views, then the rest
OTHER_FRONTAL, NOT_FRONTAL = 2, 3


@contextmanager
def collector_paused() -> Iterator[None]:
    """Switch Python's cycle collector off while a loader reads its tables.

    It would search hundreds of thousands of new rows again and again, for 40 % of the time, and
    they have no cycles.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def uncertain_rules(
    values: Sequence[str], problems: list[str], label_set: LabelSet = CHEXPERT
) -> tuple[str, dict[str, str]]:
    """Read the values of --uncertain: ["zeros", "Edema=ones"] -> ("zeros", {"Edema": "ones"}).

    problems: gets a line for each value that is no rule. label_set: the labels that there are.
    """
    plain = [value for value in values if "=" not in value] or ["zeros"]
    by_label = {}
    for name, _, rule in (value.partition("=") for value in values if "=" in value):
        label = label_set.find(name)
        if label is None:
            problems.append(f"--uncertain {name}={rule}: {name!r} is no label{label_set.listing}")
        else:
            by_label[label] = rule
    wrong = [rule for rule in (*plain, *by_label.values()) if rule not in UNCERTAIN_RULES]
    problems += [
        f"--uncertain {rule}: no such rule; known: {', '.join(UNCERTAIN_RULES)}" for rule in wrong
    ]
    if len(plain) > 1:
        problems.append(
            f"--uncertain {' '.join(plain)}: one rule for all labels, and exceptions as LABEL=RULE"
        )
    return plain[0], by_label


def known(name: str, value: str, choices: Sequence[str]) -> str:
    """Check the value of an argument, and return it.

    Raises DataError where it is none of the choices.
    """
    if value not in choices:
        raise DataError([f"{name} {value!r} is not known; it may be {', '.join(choices)}"])
    return value


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


_VALUES = {"": None, "1.0": 1, "0.0": 0, "-1.0": -1, "1": 1, "0": 0, "-1": -1}


class LabelCells:
    """Read the label cells of a table's rows by a policy.

    Equal rows share a Reading, and rows that mean the same are combined once.
    """

    def __init__(self, table: Table, policy: LabelPolicy):
        columns = table.label_columns()
        self.labels, self.indices = tuple(columns), tuple(columns.values())
        self._policy = policy
        self._names = [table.names[index] for index in self.indices]
        self._strings = [{cell: f"{name}={cell}" for cell in _VALUES} for name in self._names]
        self._meanings = [
            {cell: policy.meaning(label, value) for cell, value in _VALUES.items()}
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
                    if cell not in _VALUES
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


# ---- who is on the image -------------------------------------------------------------------------
_SEX_COLUMNS = ("Sex", "Patient Gender", "Patient Sex")
_AGE_COLUMNS = ("Age", "Patient Age")
_SEX_CELLS = dict.fromkeys(("f", "female", "woman", "w", "weiblich"), "F") | dict.fromkeys(
    ("m", "male", "man", "männlich"), "M"
)
_AGE_CELL = re.compile(r"(\d{1,3})(?:\.0*)?([ymwd]?)")
_A_YEAR = {"": 1, "y": 1, "m": 12, "w": 52, "d": 365}  # 058Y, 011M: older files of NIH


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
        if not self._unread:
            return []
        shown = [f"{cell} ({count:,})" for cell, count in self._unread.most_common(5)]
        more = f" and {len(self._unread) - 5} others" if len(self._unread) > 5 else ""
        return [f"taken as unknown: {', '.join(shown)}{more}"]


def sex_of(cell: str) -> str | None:
    """Read a sex -> "F" or "M", None where the cell says neither."""
    return _SEX_CELLS.get(cell.strip().casefold())


def age_of(cell: str, youngest: int = 0) -> int | None:
    """Read an age -> whole years, None where the cell says none. youngest: less is no age."""
    found = _AGE_CELL.fullmatch(cell.strip().casefold())
    years = int(found[1]) // _A_YEAR[found[2]] if found else -1
    return years if youngest <= years <= MAX_AGE else None


# ---- images --------------------------------------------------------------------------------------
class Candidate(NamedTuple):
    """Hold one image of a label table.

    view: as the source names it, None where it does not.
    rank: of its view, see `view_rank`.
    order: among images of one rank.
    sex, age: as in Example.
    """

    study: str
    id: str
    patient: str
    image: str
    view: str | None
    rank: int
    order: int
    reading: Reading
    sex: str | None = None
    age: int | None = None


def view_rank(view: str | None, frontal: bool) -> int:
    """Rank a view for pa_first, the smallest first: PA, AP, another frontal view, the rest."""
    return _RANKS.get(view or "", OTHER_FRONTAL) if frontal else NOT_FRONTAL


def choose(
    candidates: Sequence[Candidate],
    dataset: str,
    root: Path,
    report: Report,
    *,
    frontals: str,
    no_label: str,
    drop_missing: bool,
) -> list[Example]:
    """Choose examples among candidates, in their order, and report what is left out.

    dataset: name of the source, which begins the ids.
    root: folder that the candidates' images are relative to.
    frontals: of several images of a study, pa_first (PA before AP, then the first), first, or all.
    no_label: at "drop", leave out images without a true label.
    drop_missing: leave out images whose file is not there, before another one of the study is
    chosen.
    """
    known("frontals", frontals, FRONTALS)
    if drop_missing:
        present = [candidate for candidate in candidates if (root / candidate.image).is_file()]
        report.drop("image file is missing", len(candidates) - len(present))
        candidates = present
    if frontals != "all":
        best: dict[str, Candidate] = {}
        for candidate in candidates:
            chosen = best.setdefault(candidate.study, candidate)
            if _preference(candidate, frontals) < _preference(chosen, frontals):
                best[candidate.study] = candidate
        report.drop("another image of the study was chosen", len(candidates) - len(best))
        candidates = list(best.values())
    if no_label == "drop":
        labelled = [candidate for candidate in candidates if candidate.reading.labels]
        report.drop("no label is true", len(candidates) - len(labelled))
        candidates = labelled
    report.keep(candidates)
    return [
        Example(
            f"{dataset}-{candidate.id}",
            f"{dataset}-{candidate.patient}",
            candidate.image,
            candidate.reading.labels,
            dataset,
            root,
            candidate.reading.evaluated,
            candidate.reading.source_labels,
            extra={"study_id": candidate.study},
            sex=candidate.sex,
            age=candidate.age,
            view=candidate.view,
        )
        for candidate in candidates
    ]


def _preference(candidate: Candidate, frontals: str) -> tuple[int, int]:
    return (
        candidate.rank if frontals == "pa_first" else candidate.rank == NOT_FRONTAL,
        candidate.order,
    )


# ---- report --------------------------------------------------------------------------------------
@dataclass
class Report:
    """Count what a loader kept and dropped: images, where a reason does not say otherwise."""

    source: str = ""  # such as "CheXpert train"
    files: dict[str, str] = field(default_factory=dict)  # {label file: SHA-256}
    rows: int = 0  # images that the label file lists
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    no_images: str = ""  # where no image was found: what was looked for and where
    _kept: Counter[Reading] = field(default_factory=Counter)
    _studies: set[str] = field(default_factory=set)
    _patients: set[str] = field(default_factory=set)

    def begin(self, source: str, *files: Path) -> Report:
        """Note the source and hash its label files."""
        self.source = source
        self.files |= {str(file): sha256_of(file) for file in files}
        return self

    def drop(self, reason: str, count: int = 1) -> None:
        """Count images that are left out for a reason."""
        if count:
            self.dropped[reason] += count

    def keep(self, candidates: Sequence[Candidate]) -> None:
        """Count the images that were chosen."""
        self._kept.update(candidate.reading for candidate in candidates)
        self._studies.update(candidate.study for candidate in candidates)
        self._patients.update(candidate.patient for candidate in candidates)

    def record(self) -> dict:
        """Collect everything in values that JSON keeps."""
        names = ("true", "evaluated", "uncertain", "blank")
        by_label = {name: dict.fromkeys(LABELS, 0) for name in names}
        counts = dict.fromkeys(("without_label", "called_no_finding", "contradictory"), 0)
        for reading, count in self._kept.items():
            values = {
                label: _VALUES[cell]
                for label, cell in zip(reading.columns, reading.cells, strict=True)
            }
            uncertain = [label for label, value in values.items() if value == -1]
            blank = [label for label, value in values.items() if value is None]
            kinds = (reading.labels, reading.evaluated, uncertain, blank)
            for name, labels in zip(names, kinds, strict=True):
                for label in labels:
                    by_label[name][label] += count
            normal = NO_FINDING in reading.labels
            counts["without_label"] += count * (not reading.labels)
            counts["called_no_finding"] += count * (normal and values.get(NO_FINDING) != 1)
            counts["contradictory"] += count * (
                normal and bool(set(reading.labels) - {NO_FINDING, SUPPORT_DEVICES})
            )
        return {
            "source": self.source,
            "label_files": self.files,
            "images_listed": self.rows,
            "images_kept": self._kept.total(),
            "studies_kept": len(self._studies),
            "patients_kept": len(self._patients),
            "dropped": dict(self.dropped.most_common()),
            "notes": self.notes,
            "by_label": by_label,
            **counts,
        }

    def text(self) -> str:
        """Write the record for people."""
        content = self.record()
        lines = [
            f"{self.source}: kept {content['images_kept']:,} of {self.rows:,} images "
            f"({content['studies_kept']:,} studies, {content['patients_kept']:,} patients)"
        ]
        lines += [
            f"  label file {file} (SHA-256 {digest[:12]})" for file, digest in self.files.items()
        ]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in content["dropped"].items()]
        lines += [f"  note: {note}" for note in (*self.notes, self.no_images) if note]
        lines.append(
            f"  without any label {content['without_label']:,}; called No Finding by rule"
            f" {content['called_no_finding']:,}; No Finding beside a finding"
            f" {content['contradictory']:,}"
        )
        lines.append(
            f"  {'of the images kept':<28}{'true':>9}{'evaluated':>11}{'uncertain':>11}{'blank':>9}"
        )
        columns = content["by_label"]
        lines += [
            f"  {label:<28}{columns['true'][label]:>9,}{columns['evaluated'][label]:>11,}"
            f"{columns['uncertain'][label]:>11,}{columns['blank'][label]:>9,}"
            for label in LABELS
            if columns["evaluated"][label]  # the others are not of this hospital
        ]
        return "\n".join(lines)
