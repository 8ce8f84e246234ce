"""Keep what a model answered to each example, so that it can be scored now and again later.

A `Prediction` is one row of predictions-<name>.jsonl, which an evaluation writes, and of
completions.jsonl, which GRPO writes: the example's truth, the completion as it came, and what the
completion says. This file alone knows the names and the order of those fields.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.answers import ANSWER_FORMATS, Answer, parse_answer
from data.examples import WHO, Example, label_problems, who_of, who_problems
from data.files import DataError, first_problems, write_jsonl
from data.json_rows import half_pairs, json_rows, parse_json
from data.label_sets import label_lines, read_labels
from data.labels import CHEXPERT, LABEL_MAPS, LabelSet, Target, chexpert_labels_of_nih

DEFAULT_FORMAT = "think_solution"  # of a row that names none


@dataclass(frozen=True)
class Prediction:
    """Hold one completion, the truth it is scored against, and the answer read from it.

    id, patient_id, dataset, labels, evaluated_labels, source_labels, sex, age, view: as in the
    `Example`.
    prompt: name of the instruction. completion: the text, without special tokens.
    completion_length: in tokens, the stop token included, None where unknown.
    answer_format, answer: how the completion was parsed, and what was found.
    extra: further fields of the row, kept as they are, such as "rewards", "sample" of several
    answers to one image, or "step" and "group" of a rollout.
    label_set: the labels that there are. A row brings them along where they are not the 14.
    """

    id: str
    patient_id: str
    dataset: str
    labels: tuple[str, ...]
    evaluated_labels: tuple[str, ...]
    source_labels: tuple[str, ...]
    prompt: str
    completion: str
    completion_length: int | None
    answer_format: str
    answer: Answer
    extra: dict[str, Any] = field(default_factory=dict)
    sex: str | None = None
    age: int | None = None
    view: str | None = None
    label_set: LabelSet = CHEXPERT

    @classmethod
    def of_example(
        cls,
        example: Example,
        *,
        prompt: str,
        completion: str,
        completion_length: int | None,
        answer_format: str,
        answer: Answer | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Prediction:
        """Make the prediction of a completion that was just written.

        answer: what `parse_answer` found in the completion, where the caller has it already.
        """
        return cls(
            id=example.id,
            patient_id=example.patient_id,
            dataset=example.dataset,
            labels=tuple(example.labels),
            evaluated_labels=tuple(example.evaluated_labels),
            source_labels=tuple(example.source_labels),
            prompt=prompt,
            completion=completion,
            completion_length=completion_length,
            answer_format=answer_format,
            answer=answer or parse_answer(completion, answer_format, example.label_set),
            extra=dict(extra or {}),
            label_set=example.label_set,
            **who_of(vars(example)),
        )

    @classmethod
    def from_row(
        cls,
        row: Mapping[str, Any],
        answer_format: str | None = None,
        label_set: LabelSet | None = None,
    ) -> Prediction:
        """Read a sound row and parse its completion anew, so that a changed parser applies to it.

        answer_format: the form to parse by. None for the row's own, think_solution where it names
        none. label_set: of a row that brings no labels along, None for the 14.
        """
        label_set = label_set_of(row, label_set)
        name = answer_format or row.get("answer_format") or DEFAULT_FORMAT
        evaluated = row.get("evaluated_labels")
        prediction = cls(
            id=row["id"],
            patient_id=row["patient_id"],
            dataset=row["dataset"],
            labels=tuple(row["labels"]),
            evaluated_labels=label_set.names if evaluated is None else tuple(evaluated),
            source_labels=tuple(row.get("source_labels") or ()),
            prompt=str(row.get("prompt") or ""),
            completion=row["completion"],
            completion_length=row.get("completion_length"),
            answer_format=name,
            answer=parse_answer(row["completion"], name, label_set),
            label_set=label_set,
            **who_of(row),
        )
        known = {*prediction.to_row(), *WHO, "label_set"}
        extra = {key: value for key, value in row.items() if key not in known}
        return dataclasses.replace(prediction, extra=extra)

    def to_row(self) -> dict[str, Any]:
        """Return the row of a predictions file, in the order of its fields."""
        own = {} if self.label_set == CHEXPERT else {"label_set": label_lines(self.label_set)}
        return {
            "id": self.id,
            "patient_id": self.patient_id,
            "dataset": self.dataset,
            "labels": list(self.labels),
            "evaluated_labels": list(self.evaluated_labels),
            "source_labels": list(self.source_labels),
            "prompt": self.prompt,
            "completion": self.completion,
            "completion_length": self.completion_length,
            "predicted": list(self.answer.labels),
            "valid": self.answer.valid,
            "parsed": self.answer.parsed,
            "problem": self.answer.problem,
            "unknown": list(self.answer.unknown),
            "answer_format": self.answer_format,
            **who_of(vars(self)),
            **own,
        } | self.extra

    def with_extra(self, **fields: Any) -> Prediction:
        """Return a copy with further fields, such as its rewards."""
        return dataclasses.replace(self, extra=self.extra | fields)

    @property
    def target(self) -> Target:
        """Return what rewards and scores compare with: the labels among the evaluated ones."""
        return Target.of(self.labels, self.evaluated_labels)


def relabel(
    predictions: Sequence[Prediction],
    label_map: str,
    no_label: str = "empty",
    *,
    source: str = "predictions",
) -> list[Prediction]:
    """Take the truth anew from NIH's own strings, to score old predictions under another map.

    label_map: a map of LABEL_MAPS, which also gives the evaluated labels. no_label: a prediction
    without any label of the map keeps its empty set, becomes "no_finding", or is left out ("drop").
    source: name of the file, for the problems.

    Raises DataError that names each row whose source_labels are missing or not NIH's.
    """
    evaluated = LABEL_MAPS[label_map]
    relabelled, problems = [], []
    for prediction in predictions:
        try:
            if not prediction.source_labels:
                raise ValueError("no source_labels")
            labels = chexpert_labels_of_nih(prediction.source_labels, evaluated, no_label)
        except ValueError as error:
            problems.append(
                f"{source}, id {prediction.id!r}: {error}; --label_map {label_map} is for NIH"
                " ChestX-ray14"
            )
            continue
        if labels or no_label != "drop":
            relabelled.append(
                dataclasses.replace(
                    prediction, labels=tuple(labels), evaluated_labels=tuple(evaluated)
                )
            )
    if problems:
        raise DataError(first_problems(problems))
    return relabelled


# ---- files ---------------------------------------------------------------------------------------
def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> Path:
    """Write predictions as JSONL, whole or not at all, and return the path."""
    return write_jsonl(path, (prediction.to_row() for prediction in predictions))


def read_predictions(
    path: str | Path, answer_format: str | None = None, label_set: LabelSet | None = None
) -> list[Prediction]:
    """Read a whole predictions file, parsed anew. Raises DataError as `iter_predictions` does."""
    return list(iter_predictions(path, answer_format, label_set))


def iter_predictions(
    path: str | Path,
    answer_format: str | None = None,
    label_set: LabelSet | None = None,
    *,
    ids: Collection[str] | None = None,
) -> Iterator[Prediction]:
    """Read predictions one by one, parsed anew, from a file too large to hold in memory.

    answer_format: the form to parse all rows by. None for each row's own. label_set: the labels of
    all rows. None for those that the rows bring along, or the 14. ids: read only the predictions of
    these examples. None for all.

    A row of an evaluation is an image, so an id may occur once. A row with "sample" is one of
    several answers to an image, so an id may occur once with each number. A row of a rollout
    ("step" and "group" in it) is one completion of several for an id: each row counts.

    Raises DataError with every problem of the file (line and field), after the last sound row. A
    file that is missing or empty is such a problem too.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError([f"{path}: no such predictions file"])
    problems: list[str] = []
    line_of: dict[tuple[str, int | None], int] = {}  # of the (id, sample) that may occur once
    sound = 0
    same = label_set  # of all rows: the first one's, where none is given
    for number, row, found in json_rows(path):
        found = found or _row_problems(row, same)
        same = same or (None if found else label_set_of(row))
        if not found and not _is_of_rollout(row):
            sample = row.get("sample")
            first = line_of.setdefault((row["id"], sample), number)
            if first != number:
                what = "" if sample is None else f", sample {sample},"
                counts = "each image counts once" if sample is None else "number its samples"
                found = [f"id {row['id']!r}{what} is also on line {first}; {counts}"]
        problems += [f"{path}, line {number}: {problem}" for problem in found]
        if not found:
            sound += 1
            if ids is None or row["id"] in ids:
                yield Prediction.from_row(row, answer_format, same)
    if problems or not sound:
        problems = (same or CHEXPERT).listed_once(problems)
        raise DataError(
            first_problems(problems, f"{path}: and {{}} more problems")
            or [f"{path}: the file holds no predictions"]
        )


def parse_row(
    line: bytes | str, label_set: LabelSet | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Read one line of a predictions file -> (row, problems), sound without any.

    label_set: the labels that the row must have. None for those that it brings along, or the 14.
    """
    row, problems = parse_json(line)
    return (row, _row_problems(row, label_set)) if not problems else ({}, problems)


def first_label_set(path: str | Path) -> LabelSet:
    """Read the labels that the first row of a predictions file brings along, else the 14.

    What is wrong with that row shows when the whole file is read.
    """
    with Path(path).open("rb") as lines:
        row, problems = parse_row(next(filter(bytes.strip, lines), b"{}"))
    return CHEXPERT if problems else label_set_of(row)


def label_set_of(row: Mapping[str, Any], default: LabelSet | None = None) -> LabelSet:
    """Read the labels that a sound row brings along. default: where it brings none, or the 14."""
    lines = row.get("label_set")
    if lines is None:
        return default or CHEXPERT
    return read_labels("\n".join(lines), "field 'label_set'")


_REQUIRED: dict[str, type] = {
    "id": str,
    "patient_id": str,
    "dataset": str,
    "labels": list,
    "completion": str,
}
_NAMES = ("id", "patient_id", "dataset")
# absent or null: all labels of the set, and a length that nobody counted
_OPTIONAL: dict[str, type] = {"evaluated_labels": list}
MAX_COUNT = 10**9  # of tokens or samples; more is a mistake that no sum should meet


def _row_problems(row: object, wanted: LabelSet | None) -> list[str]:
    if not isinstance(row, dict):
        return [f"holds {type(row).__name__}, not an object with fields {', '.join(_REQUIRED)}"]
    if problems := half_pairs(row, besides=("completion",)):  # a cut answer may end in one
        return problems
    label_set, problems = _checked_label_set(row, wanted)
    for name, kind in (_REQUIRED | _OPTIONAL).items():
        value = row.get(name)
        if value is None and name in _OPTIONAL:
            continue
        if type(value) is not kind:
            problems.append(
                f"field {name!r} is {json.dumps(value)[:60]}; it must be {kind.__name__}"
            )
        elif (
            isinstance(value, str) and name in _NAMES and "\0" in value
        ):  # arrays of names would drop it
            problems.append(f"field {name!r} holds a zero character; remove it")
        elif isinstance(value, list):
            problems += label_problems(name, value, label_set)
    source = row.get("source_labels")
    if source is not None and not (
        isinstance(source, list) and all(isinstance(label, str) for label in source)
    ):
        problems.append(
            f"field 'source_labels' is {json.dumps(source)[:60]}; it must be a list of strings"
        )
    problems += count_problems(row)
    if row.get("answer_format") not in (None, *ANSWER_FORMATS):
        problems.append(
            f"field 'answer_format' is {row['answer_format']!r}; known: {', '.join(ANSWER_FORMATS)}"
        )
    return problems + who_problems(row)


def count_problems(row: Mapping[str, Any]) -> list[str]:
    """Check the optional whole numbers of a row -> problems, one line each."""
    return [
        f"field {name!r} is {json.dumps(row[name])[:60]}; it must be a number from 0 up to"
        f" {MAX_COUNT:,}"
        for name in ("completion_length", "sample")
        if row.get(name) is not None
        and not (type(row[name]) is int and 0 <= row[name] <= MAX_COUNT)
    ]


def _checked_label_set(
    row: Mapping[str, Any], wanted: LabelSet | None
) -> tuple[LabelSet, list[str]]:
    """Read the labels of a row -> (its label set, problems). wanted: what it must be, if given."""
    lines = row.get("label_set")
    if lines is not None and not (
        isinstance(lines, list) and all(isinstance(line, str) for line in lines)
    ):
        shown = json.dumps(lines)[:60]
        return wanted or CHEXPERT, [f"field 'label_set' is {shown}; it must be a list of strings"]
    try:
        label_set = label_set_of(row, wanted)
    except DataError as error:
        return wanted or CHEXPERT, error.problems
    other = wanted is not None and label_set != wanted
    different = "field 'label_set' has other labels than --label_file or the rows before it"
    return label_set, [different] if other else []


def _is_of_rollout(row: Mapping[str, Any]) -> bool:
    return type(row.get("step")) is int and type(row.get("group")) is int
