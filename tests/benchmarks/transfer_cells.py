"""Keep the answers of one arm and seed of the transfer study as a small JSON file: a cell.

A cell holds every answer to the study's images, so all tables can be made anew from the cells and
no model is needed. An answer is five hexadecimal digits:

    1      8 where it is in the strict form, plus the number of entries that are no label, at most 7
    2..5   one bit a label of LABELS, the first label the lowest bit

The answers to a set are one string of 5 N digits, in the order of the set's rows. What is true of
these rows is in truth.json, written by `write_truth` from the drawn splits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  this checkout before an installed one
import numpy as np

from data.examples import Example
from data.files import write_json
from data.labels import LABELS
from data.predictions import Prediction

PLACE = Path(__file__).parent / "transfer"
DIGITS = 5
_VALID, _MOST_UNKNOWN = 8, 7


@dataclass(frozen=True)
class Answers:
    """Hold N answers to one set.

    said [N, 14] bool: labels. valid [N] bool: in the strict form. unknown [N]: entries that are no
    label.
    """

    said: np.ndarray
    valid: np.ndarray
    unknown: np.ndarray


@dataclass(frozen=True)
class Truth:
    """Hold what is true of N images. true [N, 14] bool. evaluated [14] bool: labels of the set."""

    true: np.ndarray
    evaluated: np.ndarray


def pack(predictions: Sequence[Prediction]) -> str:
    """Write answers as a string, five digits each."""
    digits = []
    for prediction in predictions:
        answer = prediction.answer
        flags = _VALID * answer.valid + min(len(answer.unknown), _MOST_UNKNOWN)
        bits = sum(1 << LABELS.index(label) for label in answer.labels)
        digits.append(f"{flags:01x}{bits:04x}")
    return "".join(digits)


def unpack(text: str) -> Answers:
    """Read the string of `pack`.

    Raises ValueError where it does not hold whole answers.
    """
    if len(text) % DIGITS:
        raise ValueError(f"{len(text)} digits are no whole number of answers of {DIGITS}")
    parts = [text[start : start + DIGITS] for start in range(0, len(text), DIGITS)]
    flags = np.array([int(part[0], 16) for part in parts])
    return Answers(
        said=_bits([int(part[1:], 16) for part in parts]),
        valid=(flags & _VALID) > 0,
        unknown=flags & _MOST_UNKNOWN,
    )


def _bits(numbers: Sequence[int]) -> np.ndarray:
    return np.array([[(number >> k) & 1 for k in range(len(LABELS))] for number in numbers]) == 1


def write_truth(sets: dict[str, list[Example]], place: Path = PLACE) -> None:
    """Write what is true of each set's images, in the form of the answers."""
    record = {
        name: {
            "evaluated": list(examples[0].evaluated_labels),
            "true": "".join(
                f"{sum(1 << LABELS.index(label) for label in example.target.labels):04x}"
                for example in examples
            ),
        }
        for name, examples in sets.items()
    }
    write_json(place / "truth.json", record)


def read_truth(place: Path = PLACE) -> dict[str, Truth]:
    """Read truth.json -> {set: its truth}."""
    record = json.loads((place / "truth.json").read_text(encoding="utf-8"))
    return {
        name: Truth(
            _bits([int(one["true"][i : i + 4], 16) for i in range(0, len(one["true"]), 4)]),
            np.array([label in one["evaluated"] for label in LABELS]),
        )
        for name, one in record.items()
    }


def cell_file(arm: str, seed: int | None, place: Path = PLACE) -> Path:
    """Name the file of a cell. seed: None for the base, which has none."""
    return place / "cells" / (f"{arm}.json" if seed is None else f"{arm}-{seed}.json")


def read_cell(arm: str, seed: int | None, place: Path = PLACE) -> dict[str, Any] | None:
    """Read a cell, None where it is not made yet."""
    file = cell_file(arm, seed, place)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
