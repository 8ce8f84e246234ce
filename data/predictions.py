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
from data.examples import WHO, Example, who_of, who_problems
from data.files import DataError, first_problems, parse_json, write_jsonl
from data.labels import LABEL_MAPS, LABELS, Target, chexpert_labels_of_nih

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
            answer=parse_answer(completion, answer_format) if answer is None else answer,
            extra=dict(extra or {}),
            **who_of(vars(example)),
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any], answer_format: str | None = None) -> Prediction:
        """Read a sound row and parse its completion anew, so that a changed parser applies to it.

        answer_format: the form to parse by. None for the row's own, think_solution where it names
        none.
        """
        name = answer_format or row.get("answer_format") or DEFAULT_FORMAT
        evaluated = row.get("evaluated_labels")
        prediction = cls(
            id=row["id"],
            patient_id=row["patient_id"],
            dataset=row["dataset"],
            labels=tuple(row["labels"]),
            evaluated_labels=LABELS if evaluated is None else tuple(evaluated),
            source_labels=tuple(row.get("source_labels") or ()),
            prompt=str(row.get("prompt") or ""),
            completion=row["completion"],
            completion_length=row.get("completion_length"),
            answer_format=name,
            answer=parse_answer(row["completion"], name),
            **who_of(row),
        )
        known = {*prediction.to_row(), *WHO}
        extra = {key: value for key, value in row.items() if key not in known}
        return dataclasses.replace(prediction, extra=extra)

    def to_row(self) -> dict[str, Any]:
        """Return the row of a predictions file, in the order of its fields."""
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


def read_predictions(path: str | Path, answer_format: str | None = None) -> list[Prediction]:
    """Read a whole predictions file, parsed anew. Raises DataError as `iter_predictions` does."""
    return list(iter_predictions(path, answer_format))


def iter_predictions(
    path: str | Path, answer_format: str | None = None, *, ids: Collection[str] | None = None
) -> Iterator[Prediction]:
    """Read predictions one by one, parsed anew, from a file too large to hold in memory.

    answer_format: the form to parse all rows by. None for each row's own. ids: read only the
    predictions of these examples. None for all.

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
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row, found = parse_row(line)
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
                    yield Prediction.from_row(row, answer_format)
    if problems or not sound:
        raise DataError(
            first_problems(problems, f"{path}: and {{}} more problems")
            or [f"{path}: the file holds no predictions"]
        )


def parse_row(line: bytes | str) -> tuple[dict[str, Any], list[str]]:
    """Read one line of a predictions file -> (row, problems), sound without any."""
    row, problems = parse_json(line)
    return (row, _row_problems(row)) if not problems else ({}, problems)


_REQUIRED: dict[str, type] = {
    "id": str,
    "patient_id": str,
    "dataset": str,
    "labels": list,
    "completion": str,
}
# absent or null: all 14 labels, and a length that nobody counted
_OPTIONAL: dict[str, type] = {"evaluated_labels": list, "completion_length": int}


def _row_problems(row: object) -> list[str]:
    if not isinstance(row, dict):
        return [f"holds {type(row).__name__}, not an object with fields {', '.join(_REQUIRED)}"]
    problems = []
    for name, kind in (_REQUIRED | _OPTIONAL).items():
        value = row.get(name)
        if value is None and name in _OPTIONAL:
            continue
        if type(value) is not kind:
            problems.append(
                f"field {name!r} is {json.dumps(value)[:60]}; it must be {kind.__name__}"
            )
        elif isinstance(value, list):
            unknown = [label for label in value if label not in LABELS]
            if unknown:
                problems.append(
                    f"field {name!r} holds {unknown[0]!r}; the labels are: {', '.join(LABELS)}"
                )
    source = row.get("source_labels")
    if source is not None and not (
        isinstance(source, list) and all(isinstance(label, str) for label in source)
    ):
        problems.append(
            f"field 'source_labels' is {json.dumps(source)[:60]}; it must be a list of strings"
        )
    sample = row.get("sample")
    if sample is not None and not (type(sample) is int and sample >= 0):
        problems.append(
            f"field 'sample' is {json.dumps(sample)[:60]}; it must be a number from 0 up"
        )
    if row.get("answer_format") not in (None, *ANSWER_FORMATS):
        problems.append(
            f"field 'answer_format' is {row['answer_format']!r}; known: {', '.join(ANSWER_FORMATS)}"
        )
    return problems + who_problems(row)


def _is_of_rollout(row: Mapping[str, Any]) -> bool:
    return type(row.get("step")) is int and type(row.get("group")) is int
