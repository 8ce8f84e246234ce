"""Draw examples for sets that share no patient, as they come or balanced by label."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from data.examples import Example
from data.files import DataError
from data.labels import LABELS


def deal_patients(
    examples: Sequence[Example], sizes: Mapping[str, int], rng: random.Random
) -> dict[str, list[Example]]:
    """Deal patients out among the sets -> {set: the examples of its patients}.

    Patients come in random order, each to the set that has the smallest part of what it needs, so
    that the pools are in proportion to the sizes.
    """
    by_patient: dict[str, list[Example]] = {}
    # the draw does not depend on the order of the label file
    for example in sorted(examples, key=lambda example: example.id):
        by_patient.setdefault(example.patient_id, []).append(example)
    patients = list(by_patient)
    rng.shuffle(patients)
    pools: dict[str, list[Example]] = {name: [] for name in sizes}
    for patient in patients:
        neediest = min(sizes, key=lambda name: len(pools[name]) / sizes[name])
        pools[neediest] += by_patient[patient]
    return pools


def draw(
    examples: Sequence[Example], count: int, sampling: str, rng: random.Random
) -> list[Example]:
    """Draw `count` of the examples, or all where there are fewer, in random order.

    sampling: natural, or balanced: each from the label that has fewest images so far and has any
    left. Images without a label count as one more label.

    The first n of them are a draw of n, too.
    """
    remaining = list(examples)
    rng.shuffle(remaining)
    if sampling == "natural":
        return remaining[:count]
    names = (*LABELS, None)
    queues = {
        name: [e for e in reversed(remaining) if (name in e.labels if name else not e.labels)]
        for name in names
    }
    drawn: dict[str, Example] = {}
    counts: Counter[str | None] = Counter()
    while len(drawn) < min(count, len(remaining)):
        for queue in queues.values():
            while queue and queue[-1].id in drawn:
                queue.pop()
        # of equal ones, CheXpert's order
        name = min((name for name in names if queues[name]), key=lambda name: counts[name])
        example = queues[name].pop()
        drawn[example.id] = example
        counts.update(example.labels or (None,))
    return list(drawn.values())


def check_disjoint(sets: Mapping[str, Sequence[Example]]) -> None:
    """Check that no patient is in two sets. Raises DataError naming each two that share one."""
    patients = {
        name: {example.patient_id for example in examples} for name, examples in sets.items()
    }
    names, problems = list(patients), []
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            shared = sorted(patients[first] & patients[second])
            if shared:
                problems.append(
                    f"{first} and {second} share {len(shared)} patients, such as {shared[0]}: the"
                    " hospital's own parts overlap; check its split file or lists"
                )
    if problems:
        raise DataError(problems)


def balance(examples: Sequence[Example]) -> dict[str, int]:
    """Count the images that have each label, in CheXpert's order."""
    counts = Counter(label for example in examples for label in example.target.labels)
    return {label: counts[label] for label in LABELS}
