"""Read which hospitals a run learns from, and how often the images of each one come.

    --train_file FILE                              one hospital
    --train_file mimic=a.jsonl@2 nih=b.jsonl@1     two, drawn 2 : 1
    --train_file mimic=a.jsonl nih=b.jsonl         two, each image once an epoch

An epoch has as many positions as there are images. `positions` shares them out, engine/order.py
puts them in an order. Everything is plain Python, so a command line is checked without torch.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from data.examples import Example
from data.files import DataError, is_name

Hospital = str | None  # the name of one, None for the only one of a run that names none
_FORM = "NAME=FILE or NAME=FILE@WEIGHT, with a name of letters, digits, - and _"
_WEIGHT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class TrainFile:
    """Hold one value of --train_file.

    hospital: its name, None where the value is a file alone. file: a path, or demo:SPLIT.
    weight: share of an epoch relative to the other hospitals', None where none is given.
    """

    hospital: Hospital
    file: str
    weight: float | None = None


# ---- --train_file --------------------------------------------------------------------------------
def train_files(values: Sequence[str]) -> tuple[list[TrainFile], list[str]]:
    """Read the values of --train_file -> (the hospitals in the order of their names, problems).

    The order of the flags changes nothing, so a run is the same whichever comes first. A value that
    names a file as a whole is that file, whatever = and @ it holds.
    """
    found: list[TrainFile] = []
    problems: list[str] = []
    for value in values:
        flag = f"--train_file {value}"
        try:
            one = _take_apart(value)
        except ValueError as error:
            problems.append(f"{flag}: {error}")
            continue
        twin = next((other for other in found if _place(other.file) == _place(one.file)), None)
        if one.hospital is None and len(values) > 1:
            problems.append(f"{flag}: several hospitals need a name each: {_FORM}")
        elif one.hospital in [other.hospital for other in found]:
            problems.append(f"{flag}: the name {one.hospital} is taken; choose another")
        elif twin is not None:
            problems.append(
                f"{flag}: is the file of {twin.hospital} too; give each file once, and a weight to"
                " what is to come more often"
            )
        else:
            found.append(one)
    without = [str(one.hospital) for one in found if one.weight is None]
    if 0 < len(without) < len(found):
        problems.append(
            f"--train_file: {', '.join(without)} without a weight beside others that have one; give"
            " NAME=FILE@WEIGHT for all hospitals or for none"
        )
    return sorted(found, key=lambda one: one.hospital or ""), problems


def _take_apart(value: str) -> TrainFile:
    """Read one value. Raises ValueError saying what is wrong with it."""
    name, equals, rest = value.partition("=")
    named = bool(equals) and is_name(name)
    if os.path.isfile(value):
        if named and os.path.isfile(rest):
            raise ValueError(f"both {value} and {rest} are files; rename one of them")
        return TrainFile(None, value)
    if named and rest:
        return _weighted(name, rest)
    before, _, weight = value.rpartition("@")
    if named or (equals and (_is_there(rest) or _is_there(rest.rpartition("@")[0]))):
        raise ValueError(f"expected {_FORM}")
    if _is_there(before) and _WEIGHT.fullmatch(weight):
        raise ValueError(f"only a hospital with a name has a weight: {_FORM}")
    return TrainFile(None, value)


def _weighted(name: str, rest: str) -> TrainFile:
    """Read FILE or FILE@WEIGHT. Raises ValueError saying what is wrong with it."""
    file, at, weight = rest.rpartition("@")
    is_weight = bool(at and file) and "/" not in weight and not weight.endswith(".jsonl")
    if not is_weight or (os.path.isfile(rest) and not _is_there(file)):
        return TrainFile(name, rest)
    if os.path.isfile(rest):
        raise ValueError(f"both {rest} and {file} are files; rename one of them")
    number = float(weight) if _WEIGHT.fullmatch(weight) else math.nan
    if not (0 < number < math.inf):
        raise ValueError(f"expected a positive number as weight, got {weight!r}")
    return TrainFile(name, file, number)


def _is_there(file: str) -> bool:
    return file.startswith("demo:") or os.path.isfile(file)


def _place(file: str) -> str:
    return file if file.startswith("demo:") else os.path.realpath(file)


def hospital_weights(values: Sequence[str]) -> dict[str, float]:
    """Read the weights of --train_file -> {hospital: its weight}, {} where none is given."""
    return {
        one.hospital: one.weight
        for one in train_files(values)[0]
        if one.hospital is not None and one.weight is not None
    }


def is_demo(values: Sequence[str]) -> bool:
    """Tell whether all that --train_file names are splits of the embedded demo."""
    return all(one.file.startswith("demo:") for one in train_files(values)[0])


# ---- examples by hospital ------------------------------------------------------------------------
def by_hospital(examples: Iterable[Example]) -> dict[Hospital, list[Example]]:
    """Part examples by their hospital, in the order in which the hospitals first come."""
    parted: dict[Hospital, list[Example]] = {}
    for example in examples:
        parted.setdefault(example.hospital, []).append(example)
    return parted


def label_frequencies(examples: Iterable[Example]) -> dict[str, float]:
    """Count each label's share of the images whose source can express it -> {label: 0 to 1}."""
    evaluated: Counter[str] = Counter()
    positive: Counter[str] = Counter()
    for example in examples:
        evaluated.update(example.evaluated_labels)
        positive.update(example.target.labels)
    return {label: positive[label] / evaluated[label] for label in evaluated}


def frequencies_by_hospital(examples: Iterable[Example]) -> dict[str, dict[str, float]]:
    """Count label shares of each named hospital on its own images -> {hospital: {label: share}}."""
    return {
        hospital: label_frequencies(own)
        for hospital, own in by_hospital(examples).items()
        if hospital is not None
    }


def positions(images: Mapping[Hospital, int], weights: Mapping[str, float]) -> dict[Hospital, int]:
    """Share out the positions of an epoch, as many as there are images -> {hospital: how many}.

    images: {hospital: how many it has}. weights: {hospital: weight}, {} for one position an image.

    Hospital h has N w_h / sum(w) of the N positions. Each gets the whole part, and the largest
    remainders get one more, the first of equal ones, so that all add up to N. In fractions, so
    that no rounding of floats decides.

    Raises DataError for a hospital that would get none.
    """
    if not weights or len(images) < 2:
        return dict(images)
    total = sum(images.values())
    # as written: 0.1 is a tenth, not the float next to it
    given = {name: Fraction(str(weights[name])) for name in images if name is not None}
    quotas = {name: total * weight / sum(given.values()) for name, weight in given.items()}
    found: dict[Hospital, int] = {name: math.floor(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: math.floor(quotas[name]) - quotas[name])
    for name in by_remainder[: total - sum(found.values())]:
        found[name] += 1
    problems = [
        f"--train_file {name}: the weight {weights[str(name)]:g} gives it none of the {total:,}"
        " positions of an epoch; raise it, or leave the hospital out"
        for name, count in found.items()
        if count == 0
    ]
    if problems:
        raise DataError(problems)
    return found
