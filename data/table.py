"""Make a data file of a hospital's own table: CSV in, JSONL out.

    python -m data.table in.csv --image path --patient pid \
        --labels 'Edema,Pneumonia,Herz' --rename 'Herz=Cardiomegaly' --output out.jsonl
    python -m data.table in.csv --image 'images/{accession}.png' --patient pid \
        --label_column findings --output out.jsonl

Labels are in a column each (--labels), with the cells 1, 0, -1 and blank or words for them, or in
one column that lists them (--label_column). What an uncertain and a blank cell become is decided by
the rules that data.select has, and the same counts are printed. Every row that is wrong is named,
all at once, and then nothing is written.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

from data.command_line import Parser, exit_code
from data.console import print_errors
from data.csv_text import SEPARATORS
from data.examples import Example, row_of
from data.files import DataError, first_problems, is_name, write_jsonl
from data.label_sets import add_label_flag, labels_named
from data.labels import (
    BLANK_RULES,
    NO_LABEL_RULES,
    UNCERTAIN_RULES,
    LabelPolicy,
    LabelSet,
)
from data.sources import uncertain_rules
from data.table_labels import AUTO, Said, columns_reader, list_reader
from data.table_reading import (
    HospitalTable,
    read_table,
    renames_of,
    template_fields,
)
from data.who import age_of, sex_of, unknown_notes

Value = TypeVar("Value")


# ---- rows ----------------------------------------------------------------------------------------
@dataclass
class Counts:
    """Count what became of the table's rows."""

    rows: int = 0
    dropped: int = 0
    called_exclusive: int = 0
    uncertain: Counter[str] = field(default_factory=Counter)
    blank: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)


class Converter:
    """Turn the rows of a table into examples, by the flags of the command.

    Raises DataError naming every flag and column that is wrong.
    """

    def __init__(self, table: HospitalTable, flags: argparse.Namespace, policy: LabelPolicy):
        self.table, self.policy, self.counts = table, policy, Counts()
        self.dataset: str = flags.dataset
        self.root: Path = flags.image_root
        self.image: str = flags.image
        self.problems: list[str] = []
        self._row_of: dict[str, int] = {}
        renames, problems = renames_of(flags.rename)
        label_set = policy.label_set
        problems += [
            f"--rename {name}={label}: {label!r} is no label{label_set.listing}"
            for name, label in renames.items()
            if label and label_set.find(label) is None
        ]
        columns = {
            name: getattr(flags, name)
            for name in ("patient", "id", "sex", "age", "view")
            if getattr(flags, name) is not None
        }
        self.index: dict[str, int] = {}
        for name, column in columns.items():
            self._find(name, column, problems)
        in_image = list(template_fields(self.image)) or [self.image]
        for column in in_image:
            self._find(f"image {column}", column, problems)
        try:
            self.read_labels = (
                columns_reader(table, flags.labels, renames, label_set)
                if flags.labels is not None
                else list_reader(
                    table,
                    flags.label_column,
                    flags.label_separator,
                    renames,
                    label_set,
                    self._evaluated(flags.evaluated, label_set, problems),
                )
            )
        except DataError as error:
            problems += error.problems
        if problems:
            raise DataError(label_set.listed_once(problems))

    def _find(self, name: str, column: str, problems: list[str]) -> None:
        try:
            self.index[name] = self.table.index(column)
        except DataError as error:
            problems += error.problems

    @staticmethod
    def _evaluated(given: str | None, label_set: LabelSet, problems: list[str]) -> list[str] | None:
        if given is None:
            return None
        names = [name.strip() for name in given.split(",") if name.strip()]
        problems += [
            f"--evaluated {name}: is no label{label_set.listing}"
            for name in names
            if label_set.find(name) is None
        ]
        return [label for name in names if (label := label_set.find(name))]

    def examples(self) -> list[Example]:
        """Convert all rows. What is wrong with them is in `problems`, by row."""
        found = []
        for number, row in self.table.rows:
            self.counts.rows += 1
            example, problems = self._example(number, row)
            self.problems += [f"{self.table.path}, row {number}, {p}" for p in problems]
            if example is not None and not problems:
                found.append(example)
        return found

    def _example(self, number: int, row: list[str]) -> tuple[Example | None, list[str]]:
        image, problems = self._image(row)
        patient = row[self.index["patient"]].strip()
        if not patient:
            problems.append("the patient's column is blank; every image needs a patient")
        name = row[self.index["id"]].strip() if "id" in self.index else _stem(image)
        if not name and "id" in self.index:
            problems.append("the id's column is blank")
        first = self._row_of.setdefault(name, number) if name else number
        if first != number:
            what = f"id {name!r}" if "id" in self.index else f"image {image!r}"
            problems.append(f"{what} is also in row {first}; each image has one row")
        problems += [
            f"{what} holds a control character"
            for what, text in (("the image", image), ("the patient", patient), ("the id", name))
            if any(ord(sign) < 32 for sign in text) and (what != "the id" or "id" in self.index)
        ]
        said = self.read_labels(row)
        problems += said.problems
        if problems:
            return None, problems
        labels, evaluated = self._labels(said)
        if not labels and self.policy.no_label == "drop":
            self.counts.dropped += 1
            return None, []
        return (
            Example(
                f"{self.dataset}-{name}",
                f"{self.dataset}-{patient}",
                image,
                labels,
                self.dataset,
                self.root,
                evaluated,
                tuple(said.source),
                sex=self._known("sex", row, sex_of),
                age=self._known("age", row, age_of),
                view=self._known("view", row, lambda cell: cell.strip() or None),
                label_set=self.policy.label_set,
            ),
            [],
        )

    def _image(self, row: list[str]) -> tuple[str, list[str]]:
        """Write the path of a row's image, relative to the root, with slashes."""
        cells = {
            name.partition(" ")[2]: row[index].strip()
            for name, index in self.index.items()
            if name.startswith("image ")
        }
        blank = [column for column, cell in cells.items() if not cell]
        if blank:
            return "", [f"column {blank[0]!r}: is blank; every row needs an image"]
        if self.image in cells:
            path = cells[self.image]
        else:
            path = re.sub(r"\{([^{}]+)\}", lambda found: cells[found[1]], self.image)
        if "\\" in path:  # as Windows writes it
            path = PureWindowsPath(path).as_posix()
        if Path(path).is_absolute():
            inside = os.path.relpath(path, self.root.resolve())
            if inside.startswith(".."):
                return "", [f"image {path!r} lies outside --image_root {self.root}"]
            path = inside
        if ".." in PurePosixPath(path).parts or "://" in path or re.match(r"[A-Za-z]:/", path):
            return "", [f"image {path!r} is no path below --image_root {self.root}"]
        return PurePosixPath(path).as_posix(), []

    def _labels(self, said: Said) -> tuple[tuple[str, ...], tuple[str, ...]]:
        meanings = {label: self.policy.meaning(label, v) for label, v in said.values.items()}
        labels, evaluated = self.policy.combine(meanings)
        self.counts.uncertain.update(label for label, v in said.values.items() if v == -1)
        self.counts.blank.update(label for label, v in said.values.items() if v is None)
        exclusive = self.policy.label_set.exclusive
        if exclusive in labels and said.values.get(exclusive or "") != 1:
            self.counts.called_exclusive += 1
        return labels, evaluated

    def _known(
        self, name: str, row: list[str], read: Callable[[str], Value | None]
    ) -> Value | None:
        """Read a cell of who is on the image, None where it says nothing, which is counted."""
        if name not in self.index:
            return None
        cell = row[self.index[name]]
        value = read(cell)
        if value is None and cell.strip():
            self.counts.unread[f"{name} {cell.strip()[:20]!r}"] += 1
        return value


def _stem(image: str) -> str:
    """Make an id of an image's path: without its suffix, - for slashes."""
    return str(PurePosixPath(image).with_suffix("")).replace("/", "-") if image else ""


# ---- report --------------------------------------------------------------------------------------
def report(converter: Converter, examples: Sequence[Example]) -> str:
    """Write for people what became of the table."""
    counts, policy = converter.counts, converter.policy
    patients = len({example.patient_id for example in examples})
    lines = [
        f"{converter.table.path}: kept {len(examples):,} of {counts.rows:,} rows"
        f" ({patients:,} patients)"
    ]
    if counts.dropped:
        lines.append(f"  dropped {counts.dropped:,}: no label is true")
    lines += [f"  note: {note}" for note in unknown_notes(counts.unread)]
    missing = [e.image for e in examples if not (e.image_root / e.image).is_file()]
    if missing:
        lines.append(
            f"  note: {len(missing):,} of {len(examples):,} images are not below"
            f" {converter.root}, such as {missing[0]}; give --image_root, or see data.check"
        )
    without = sum(not example.labels for example in examples)
    exclusive = policy.label_set.exclusive
    lines.append(
        f"  without any label {without:,}"
        + (f"; called {exclusive} by rule {counts.called_exclusive:,}" if exclusive else "")
    )
    lines.append(f"  {'label':<28}{'true':>9}{'evaluated':>11}{'uncertain':>11}{'blank':>9}")
    true = Counter(label for example in examples for label in example.labels)
    evaluated = Counter(label for example in examples for label in example.evaluated_labels)
    lines += [
        f"  {label:<28}{true[label]:>9,}{evaluated[label]:>11,}"
        f"{counts.uncertain[label]:>11,}{counts.blank[label]:>9,}"
        for label in policy.label_set.names
        if evaluated[label]
    ]
    return "\n".join(lines)


# ---- command -------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    """Declare the flags of the command."""
    parser = Parser(
        prog="python -m data.table",
        description="Make a data file (JSONL) of a hospital's own table (CSV).",
    )
    flag = parser.add_argument
    flag("table", type=Path, metavar="TABLE.csv", help="CSV with a header row, also .csv.gz")
    flag("--output", type=Path, required=True, help="data file to write; nothing is overwritten")
    flag(
        "--image",
        required=True,
        metavar="COLUMN",
        help="column of the image's path, or a path with columns in it: 'png/{accession}.png'",
    )
    flag("--patient", required=True, metavar="COLUMN", help="splits are by patient")
    _label_flags(parser)
    flag("--id", metavar="COLUMN", help="[default: made from the image's path]")
    flag("--sex", metavar="COLUMN", help="cells such as F, M, female, male [default: unknown]")
    flag("--age", metavar="COLUMN", help="in years, or as 063Y [default: unknown]")
    flag("--view", metavar="COLUMN", help="cells such as PA, AP [default: unknown]")
    flag("--dataset", metavar="NAME", help="name of the source [default: the table's name]")
    flag(
        "--image_root",
        type=Path,
        metavar="FOLDER",
        help="folder that image paths are relative to [default: the table's]",
    )
    flag("--separator", choices=SEPARATORS, help="[default: what the header has most of]")
    flag(
        "--encoding",
        help="of the text, such as cp1252 [default: UTF-8, or UTF-16 where the file shows it]",
    )
    return parser


def _label_flags(parser: Parser) -> None:
    flag = parser.add_argument
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument(
        "--labels",
        metavar="'A,B,...'",
        help=f"columns of the labels, one each; {AUTO}: every column that spells a label",
    )
    labels.add_argument(
        "--label_column", metavar="COLUMN", help="one column that lists the labels of the image"
    )
    flag("--label_separator", metavar="SIGN", help="in --label_column [default: | ; or comma]")
    flag(
        "--evaluated",
        metavar="'A,B,...'",
        help="with --label_column: the labels that the table can express [default: those in it]",
    )
    flag(
        "--rename",
        nargs="+",
        default=[],
        metavar="NAME=LABEL",
        help="label that a column or an entry means; NAME= leaves it out",
    )
    add_label_flag(parser)
    flag(
        "--uncertain",
        nargs="+",
        default=["zeros"],
        metavar="RULE",
        help=(
            f"what -1 becomes: {', '.join(UNCERTAIN_RULES)} (unknown for this image), and"
            " exceptions, as in: zeros Edema=ones [default: zeros]"
        ),
    )
    flag(
        "--blank",
        choices=BLANK_RULES,
        default="zeros",
        help="what a blank cell becomes: absent, or unknown for this image [default: zeros]",
    )
    flag(
        "--no_label",
        choices=NO_LABEL_RULES,
        default="no_finding",
        help=(
            "an image without any label is called No Finding where every finding was looked for,"
            " keeps its empty set, or is left out [default: no_finding]"
        ),
    )


def convert(flags: argparse.Namespace) -> None:
    """Read the table, write the data file and report.

    Raises DataError with every problem of the flags, of the columns or of the rows.
    """
    flags.dataset = flags.dataset or re.sub(r"[^\w-]", "-", flags.table.name.split(".")[0])
    flags.image_root = flags.image_root or flags.table.parent
    problems: list[str] = []
    if flags.output.exists():
        problems.append(f"--output {flags.output} exists and nothing is overwritten; give another")
    if not is_name(flags.dataset):
        problems.append(f"--dataset {flags.dataset}: a name has letters, digits, - and _")
    if flags.evaluated is not None and flags.label_column is None:
        problems.append("--evaluated goes with --label_column; --labels names the columns itself")
    if not flags.table.is_file():
        problems.append(f"{flags.table}: no such file; give a CSV file with a header row")
    label_set = labels_named(flags.label_file)
    plain, by_label = uncertain_rules(flags.uncertain, problems, label_set)
    if problems:
        raise DataError(problems)
    policy = LabelPolicy(plain, by_label, flags.blank, flags.no_label, label_set)
    table, problems = read_table(flags.table, separator=flags.separator, encoding=flags.encoding)
    converter = Converter(table, flags, policy)
    examples = converter.examples()
    problems += converter.problems
    if problems or not examples:
        raise DataError(
            first_problems(problems, f"{flags.table}: and {{}} more problems")
            or [f"{flags.table}: no row is left to write"]
        )
    try:
        write_jsonl(flags.output, map(row_of, examples))
    except OSError as error:
        raise DataError([f"--output {flags.output}: cannot be written ({error})"]) from error
    print(report(converter, examples))
    command = ["python", "-m", "data.check", str(flags.output)]
    apart = flags.image_root.resolve() != flags.output.parent.resolve()
    command += ["--image_root", str(flags.image_root)] if apart else []
    command += ["--label_file", flags.label_file] if flags.label_file else []
    print(f"written: {flags.output}; next: {shlex.join(command)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code: 0 done, 2 usage or data."""
    try:
        convert(build_parser().parse_args(argv))
    except DataError as error:
        print_errors(error.problems)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
