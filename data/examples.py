"""Read examples from JSONL files, and split them without ever sharing a patient."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import DataError, first_problems
from data.json_rows import half_pairs, json_rows
from data.labels import CHEXPERT, LABELS, LabelSet, Target


@dataclass(frozen=True)
class Example:
    """Hold one image with its labels.

    image: path relative to `image_root`.
    labels, evaluated_labels: of label_set, in its order. A label outside evaluated_labels is
    unknown.
    source_labels: the hospital's own strings.
    answer: the teacher's trace, or None.
    sex: "F" or "M", age: in years, view: as the source names it ("PA"). None where unknown.
    extra: fields of the file that this project does not know, kept as they are.
    label_set: the labels that there are.
    hospital: the name that --train_file gives the example's file, or None. A set that is evaluated
    under the name of a hospital is of that hospital too.
    """

    id: str
    patient_id: str
    image: str
    labels: tuple[str, ...]
    dataset: str
    image_root: Path
    evaluated_labels: tuple[str, ...] = LABELS
    source_labels: tuple[str, ...] = ()
    answer: str | None = None
    extra: dict = field(default_factory=dict)
    sex: str | None = None
    age: int | None = None
    view: str | None = None
    label_set: LabelSet = CHEXPERT
    hospital: str | None = None

    @property
    def target(self) -> Target:
        """Return what rewards and scores compare with: the labels among the evaluated ones."""
        return Target.of(self.labels, self.evaluated_labels, self.hospital)


_REQUIRED = {"id": str, "patient_id": str, "image": str, "labels": list, "dataset": str}
_OPTIONAL = {"evaluated_labels": list, "source_labels": list, "answer": str}
_NAMES = ("id", "patient_id", "image", "dataset")  # a blank one would name all rows alike
# Some ten times the longest reasoning that teachers write. A longer answer is a mistake of a tool,
# and would fill the memory in the middle of a run.
MAX_ANSWER_CHARACTERS = 100_000
_SHOWN_LABELS = 5  # of a field that holds others than there are
_TYPE_NAMES = {str: "a string", list: "a list of strings"}

# Who is on the image and from where: optional fields of a data file and of a predictions file.
WHO = ("sex", "age", "view")
SEXES = ("F", "M")
MAX_AGE = 120  # years. NIH's first label file has ages up to 411, which nobody is


def read_jsonl(
    path: str | Path, image_root: str | Path | None = None, label_set: LabelSet = CHEXPERT
) -> list[Example]:
    """Read the examples of one data file, in the file's order. Images are not opened here.

    image_root: folder that image paths are relative to, or None for the data file's own.
    label_set: the labels that its rows may hold.

    Raises DataError with every problem of the file at once (file, line, field), also for a missing
    or empty file and for an id that occurs twice.
    """
    examples, problems = scan_jsonl(path, image_root, label_set)
    if problems:
        raise DataError(first_problems(problems, f"{path}: and {{}} more problems"))
    return examples


def scan_jsonl(
    path: str | Path, image_root: str | Path | None = None, label_set: LabelSet = CHEXPERT
) -> tuple[list[Example], list[str]]:
    """Read a data file as `read_jsonl` does -> (its sound rows, what is wrong with the others).

    Raises DataError where there is no such file.
    """
    path = Path(path)
    _check_exists(path)
    root = Path(image_root) if image_root is not None else path.parent
    examples: list[Example] = []
    problems: list[str] = []
    line_of: dict[str, int] = {}
    for number, row, row_problems in json_rows(path):
        row_problems = row_problems or _row_problems(row, label_set)
        problems += [f"{path}, line {number}: {problem}" for problem in row_problems]
        if row_problems:
            continue
        if row["id"] in line_of:
            problems.append(
                f"{path}, line {number}: field 'id': {row['id']!r} is also on line"
                f" {line_of[row['id']]}; ids must differ"
            )
            continue
        line_of[row["id"]] = number
        examples.append(_example(row, root, label_set))
    if not examples and not problems:
        problems.append(f"{path}: the file holds no examples; it needs at least one")
    return examples, label_set.listed_once(problems)


def data_file(spec: str | Path, label_set: LabelSet = CHEXPERT) -> Path:
    """Find the JSONL file that a `--train_file` or the like names.

    spec: a path, or `demo:SPLIT` for a split of the embedded demo, whose images are drawn under
    ./demo-data the first time.
    label_set: the labels that its rows are to have. The demo has CheXpert's alone.

    Raises DataError for an unknown split, and for the demo where other labels are wanted.
    """
    if not str(spec).startswith("demo:"):
        return Path(spec)
    check_data_file(spec, label_set)
    from data.demo.splits import write_split  # here: most runs never draw anything

    return write_split(str(spec).removeprefix("demo:"), None, Path("demo-data"))


def check_data_file(spec: str | Path, label_set: LabelSet = CHEXPERT) -> None:
    """Raise DataError where `data_file` finds no file or no split, without drawing anything."""
    if not str(spec).startswith("demo:"):
        return _check_exists(Path(spec))
    from data.demo.splits import WRITTEN_SPLITS  # here: most runs never draw anything

    name = str(spec).removeprefix("demo:")
    if name not in WRITTEN_SPLITS:
        raise DataError(
            [f"{spec}: the demo has no split {name!r}; it has {', '.join(WRITTEN_SPLITS)}"]
        )
    if label_set != CHEXPERT:
        raise DataError(
            [
                f"{spec}: the demo's images have CheXpert's 14 labels, not those of the label file;"
                " give files of your own, for training (--train_file) and for scores"
                " (--validation_file, --data_file)"
            ]
        )


def check_data_files(specs: Iterable[str], label_set: LabelSet = CHEXPERT) -> None:
    """Raise DataError with a line for each that `check_data_file` refuses."""
    problems: dict[str, None] = {}
    for spec in specs:
        try:
            check_data_file(spec, label_set)
        except DataError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise DataError(problems)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise DataError([f"{path}: no such data file; give a JSONL file with one example a line"])


def read_examples(
    spec: str | Path, image_root: str | Path | None = None, label_set: LabelSet = CHEXPERT
) -> list[Example]:
    """Read the examples of a path or demo:SPLIT, as `data_file` and `read_jsonl` do."""
    return read_jsonl(data_file(spec, label_set), image_root, label_set)


def _row_problems(row: object, label_set: LabelSet) -> list[str]:
    if not isinstance(row, dict):
        return [f"holds {type(row).__name__}, not an object with fields {', '.join(_REQUIRED)}"]
    if problems := half_pairs(row):
        return problems
    problems = [f"field {name!r} is missing" for name in _REQUIRED if name not in row]
    for name, kind in (_REQUIRED | _OPTIONAL).items():
        if name not in row or (name in _OPTIONAL and row[name] is None):
            continue
        value = row[name]
        if not isinstance(value, kind) or (
            kind is list and not all(isinstance(item, str) for item in value)
        ):
            problems.append(
                f"field {name!r} is {json.dumps(value)[:60]}; it must be {_TYPE_NAMES[kind]}"
            )
        elif name in ("labels", "evaluated_labels"):
            problems += label_problems(name, value, label_set)
        elif name in _NAMES and not value.strip():
            problems.append(f"field {name!r} is blank; every row needs one")
        elif name in _NAMES and "\0" in value:
            problems.append(f"field {name!r} holds a zero character; remove it")
        elif name == "answer" and len(value) > MAX_ANSWER_CHARACTERS:
            problems.append(
                f"field 'answer' has {len(value):,} characters; at most"
                f" {MAX_ANSWER_CHARACTERS:,} are learnt from"
            )
    return problems + who_problems(row)


def label_problems(name: str, values: Sequence[Any], label_set: LabelSet) -> list[str]:
    """Check the labels that a field of a row lists -> [one line] where some are none of the set."""
    unknown = [repr(value)[:60] for value in values if value not in label_set.names]
    if not unknown:
        return []
    shown = ", ".join(unknown[:_SHOWN_LABELS]) + (", ..." if unknown[_SHOWN_LABELS:] else "")
    hint = "; labels of your own need --label_file" if label_set == CHEXPERT else ""
    return [f"field {name!r} holds {shown}{label_set.listing}{hint}"]


def who_problems(row: Mapping[str, Any]) -> list[str]:
    """Check the optional fields `sex`, `age` and `view` of a row -> problems, one line each."""
    sex, age, view = (row.get(name) for name in WHO)
    problems = []
    if sex is not None and sex not in SEXES:
        problems.append(
            f'field \'sex\' is {json.dumps(sex)[:60]}; it must be "F" or "M", and absent where'
            " unknown"
        )
    if age is not None and (type(age) is not int or not 0 <= age <= MAX_AGE):
        problems.append(
            f"field 'age' is {json.dumps(age)[:60]}; it must be whole years, 0 to {MAX_AGE}, and"
            " absent where unknown"
        )
    if view is not None and (not isinstance(view, str) or not view.strip() or "\0" in view):
        problems.append(
            f"field 'view' is {json.dumps(view)[:60]}; it must be a string such as \"PA\", and"
            " absent where unknown"
        )
    return problems


def who_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Take what a sound row says of who is on the image -> {field: value}, only what is known."""
    return {name: row[name] for name in WHO if row.get(name) is not None}


def _example(row: dict, root: Path, label_set: LabelSet) -> Example:
    evaluated = row.get("evaluated_labels")
    return Example(
        id=row["id"],
        patient_id=row["patient_id"],
        image=row["image"],
        labels=label_set.ordered(row["labels"]),
        dataset=row["dataset"],
        image_root=root,
        evaluated_labels=label_set.names if evaluated is None else label_set.ordered(evaluated),
        source_labels=tuple(row.get("source_labels") or ()),
        answer=row.get("answer"),
        extra={
            name: value
            for name, value in row.items()
            if name not in _REQUIRED and name not in _OPTIONAL and name not in WHO
        },
        label_set=label_set,
        **who_of(row),
    )


def row_of(example: Example) -> dict:
    """Write an example as the row of a data file that `read_jsonl` reads as this example."""
    row = {
        "id": example.id,
        "patient_id": example.patient_id,
        "image": example.image,
        "labels": list(example.labels),
        "dataset": example.dataset,
        "evaluated_labels": list(example.evaluated_labels),
        "source_labels": list(example.source_labels),
    }
    answer = {} if example.answer is None else {"answer": example.answer}
    return row | answer | example.extra | who_of(vars(example))


def selection_file(data_file: str | Path) -> Path:
    """Find NAME.select.json beside NAME.jsonl, where `data.select` notes what it was made from."""
    return Path(data_file).with_suffix(".select.json")


def split_by_patient(
    examples: list[Example], fraction: float, seed: int, elsewhere: Mapping[str, bool] | None = None
) -> tuple[list[Example], list[Example]]:
    """Hold out about `fraction` of the examples -> (rest, held out), no patient on both sides.

    elsewhere: patients of another split that these examples have too, each with whether that one
    holds them out. They stay on their side.

    Both sides keep the order of the examples. One seed always gives the same sides.

    Raises DataError where there are too few patients for two non-empty sides.
    """
    decided = elsewhere or {}
    every = sorted({example.patient_id for example in examples})
    patients = [patient for patient in every if patient not in decided]
    if len(patients) < 2 and not decided:
        raise DataError(
            [
                f"cannot hold out a part of {len(examples)} examples of {len(patients)} patient(s);"
                " at least two are needed"
            ]
        )
    random.Random(seed).shuffle(patients)
    counts = dict.fromkeys(every, 0)
    for example in examples:
        counts[example.patient_id] += 1
    held = {patient for patient in every if decided.get(patient)}
    # one patient always stays for training
    for patient in patients[: len(every) - len(held) - 1]:
        if held and sum(counts[p] for p in held) >= fraction * len(examples):
            break
        held.add(patient)
    rest = [example for example in examples if example.patient_id not in held]
    if not rest:
        raise DataError([f"all {len(every)} patients are held out with those of another file"])
    return rest, [example for example in examples if example.patient_id in held]
