"""Join the answers of any model with a data file, so that they are scored like our own.

A row of the answers needs {"id", "completion"}. What is true of the image comes from the data file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.answers import ANSWER_FORMATS
from data.examples import WHO, Example
from data.files import DataError, first_problems
from data.json_rows import half_pairs, json_rows
from data.predictions import DEFAULT_FORMAT, Prediction, count_problems

_SHOWN_IDS = 3


def read_answers(
    path: str | Path,
    examples: Sequence[Example],
    *,
    data_file: str | Path,
    answer_format: str | None = None,
    max_samples: int | None = None,
) -> list[Prediction]:
    """Read the answers to the examples of a data file, in the examples' order.

    path: JSONL, one answer a line: {"id", "completion"}, and where known "completion_length" in
    tokens, "answer_format", "prompt", and "sample" (0, 1, ...) where an image has several answers.
    Other fields are kept. What a row says of the truth is not read.
    examples, data_file: the examples, and their file for the messages.
    answer_format: the form to parse by. None for each row's own, think_solution where it names
    none. max_samples: ask only for answers to the first so many examples, None for all.

    Raises DataError with every problem at once: rows that are no such object, ids that the data
    file does not have, an id that comes twice, and examples without an answer. A model that gave no
    answer has the completion "", which counts as failed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError([f"{path}: no such file of answers"])
    known = {example.id for example in examples}
    rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    line_of: dict[tuple[str, int | None], int] = {}
    problems: list[str] = []
    for number, row, found in json_rows(path):
        found = found or _row_problems(row)
        if not found and row["id"] not in known:
            found = [f"id {row['id']!r} is not in {data_file}"]
        if not found:
            first = line_of.setdefault((row["id"], row.get("sample")), number)
            if first != number:
                found = [
                    f"id {row['id']!r} is also on line {first}; give each image one answer, or"
                    ' number several by "sample": 0, 1, ...'
                ]
        problems += [f"{path}, line {number}: {problem}" for problem in found]
        if "id" in (row if isinstance(row, dict) else ()):
            rows[str(row["id"])].append(row)
    wanted = examples[:max_samples]
    # an example whose row is wrong has an answer: only its row is named
    missing = [example.id for example in wanted if example.id not in rows]
    if missing:
        problems.insert(0, _missing(path, missing, len(wanted), data_file))
    if problems:
        raise DataError(first_problems(problems, f"{path}: and {{}} more problems"))
    return [
        _prediction(example, row, answer_format) for example in wanted for row in rows[example.id]
    ]


def _missing(path: Path, ids: Sequence[str], of: int, data_file: str | Path) -> str:
    shown = ", ".join(map(repr, ids[:_SHOWN_IDS])) + (", ..." if len(ids) > _SHOWN_IDS else "")
    return (
        f"{path}: {len(ids):,} of the {of:,} images of {data_file} have no answer: {shown}; where"
        ' the model gave none, write a row with "completion": "" (it counts as failed), else leave'
        " the images out of the data file or give --max_samples"
    )


def _row_problems(row: object) -> list[str]:
    if not isinstance(row, dict):
        return [f"holds {type(row).__name__}, not an object with fields id, completion"]
    if problems := half_pairs(row, besides=("completion",)):  # a cut answer may end in one
        return problems
    for name in ("id", "completion"):
        if not isinstance(row.get(name), str):
            hint = ' ("" where the model gave no answer)' if name == "completion" else ""
            problems.append(f"field {name!r} is {_shown(row, name)}; it must be a string{hint}")
    problems += count_problems(row)
    if row.get("prompt") is not None and not isinstance(row["prompt"], str):
        problems.append(f"field 'prompt' is {_shown(row, 'prompt')}; it must be a string")
    if row.get("answer_format") not in (None, *ANSWER_FORMATS):
        problems.append(
            f"field 'answer_format' is {_shown(row, 'answer_format')}; known:"
            f" {', '.join(ANSWER_FORMATS)}"
        )
    return problems


def _shown(row: Mapping[str, Any], name: str) -> str:
    return json.dumps(row[name])[:60] if name in row else "missing"


def _prediction(example: Example, row: Mapping[str, Any], answer_format: str | None) -> Prediction:
    prediction = Prediction.of_example(
        example,
        prompt=row.get("prompt") or "",
        completion=row["completion"],
        completion_length=row.get("completion_length"),
        answer_format=answer_format or row.get("answer_format") or DEFAULT_FORMAT,
    )
    known = {*prediction.to_row(), *WHO, "label_set"}
    return prediction.with_extra(**{key: row[key] for key in row if key not in known})
