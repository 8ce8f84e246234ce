"""Show whether answers depend on the image and agree with their reasoning.

All figures are those of scores-<set>.json, as eval.evaluate --swap_images wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.folders import Entry, part_of
from eval.page import Cell, Table
from eval.tables import number, signed

_SHARES = {
    "answers_unchanged": "Answers unchanged",
    "reasoning_unchanged": "Reasonings unchanged",
    "stated_not_answered": "Stated, not answered",
    "answered_not_mentioned": "Answered, not mentioned",
}


def faithfulness_tables(entries: Sequence[Entry]) -> list[Table]:
    """Make the tables of all entries that answered to swapped images, none where no entry did.

    They are what another patient's image changes in the scores, and in the answers.
    """
    found = [
        (entry.name, data_set, record["faithfulness"])
        for entry in entries
        for data_set, record in entry.records.items()
        if isinstance(record.get("faithfulness"), dict)
    ]
    if not found:
        return []
    scores: list[list[Cell | str]] = []
    shares: list[list[Cell | str]] = []
    for model, data_set, record in found:
        scores.append([model, data_set, *_fall(record, "jaccard"), *_fall(record, "macro_f1")])
        same = record.get("same_truth")
        shares.append(
            [
                *(model, data_set, "-" if same is None else _percent(same)),
                *(_share(record, name) for name in _SHARES),
            ]
        )
    return [
        Table(
            "With another patient's X-ray",
            [
                *("Model", "Data set", "Jaccard", "Swapped", "Difference"),
                *("Macro F1", "Swapped", "Difference"),
            ],
            scores,
            [
                "Every image was answered again from another patient's X-ray, and both answers are"
                " scored against the image's own labels. A model that does not look loses nothing."
                " In small print: 95 % intervals by patient."
            ],
            numbers_from=2,
        ),
        Table(
            "What stays the same with another X-ray, and what the reasoning does not bear out",
            ["Model", "Data set", "Pairs of equal labels", *_SHARES.values()],
            shares,
            [
                "Pairs of equal labels: where an unchanged answer is no fault. Stated, not"
                " answered: answers that leave out a label that their reasoning states. Answered,"
                " not mentioned: answers with a label that their reasoning never mentions. Shares"
                " of reasoning are of the answers that have any. In small print: 95 % intervals by"
                " patient."
            ],
            numbers_from=2,
        ),
    ]


def _fall(record: Mapping[str, Any], score: str) -> list[Cell]:
    """Write a score from the own image, from the swapped one, and the difference."""
    own, swapped = (part_of(record, name).get(score) for name in ("own", "swapped"))
    difference = part_of(record, "difference").get(score)
    interval = part_of(record, "difference_intervals").get(score)
    moved = (
        Cell("-")
        if difference is None
        # less from another patient's image is no loss, so nothing is set off
        else signed(difference, None if interval is None else tuple(interval))
    )
    return [Cell(number(own)), Cell(number(swapped)), moved]


def _share(record: Mapping[str, Any], name: str) -> Cell:
    share = part_of(record, name)
    if share.get("mean") is None:
        return Cell("-")
    interval = share.get("interval")
    low_high = "" if interval is None else f"{_percent(interval[0])} to {_percent(interval[1])}"
    return Cell(_percent(share["mean"]), low_high)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
