"""Show what votes over samples score, and how far their shares can be taken as probabilities.

All figures are those of scores-<set>.json, as eval.evaluate --num_generations wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.folders import Entry, part_of
from eval.names import SCORE_TITLES
from eval.page import Cell, Table
from eval.tables import bounds, number, signed


def vote_tables(entries: Sequence[Entry]) -> tuple[list[Table], list[Table]]:
    """Make the tables of all entries that voted -> (what a vote gains, AUROC and AUPRC by label).

    Both lists are empty where none voted.
    """
    gains = [
        _gain_rows(entry.name, data_set, record)
        for entry in entries
        for data_set, record in entry.records.items()
        if isinstance(record.get("samples"), dict)
    ]
    shares: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in entries:
        for data_set, record in entry.records.items():
            if isinstance(record.get("probabilities"), dict):
                shares.setdefault(data_set, {})[entry.name] = record["probabilities"]
    return (
        [_gain_table([row for rows in gains for row in rows])] if gains else [],
        [_label_table(data_set, of) for data_set, of in shares.items()],
    )


def _gain_rows(model: str, data_set: str, record: Mapping[str, Any]) -> list[list[Cell | str]]:
    """Make a row a score: one sample, their vote, and the best of them."""
    samples = record["samples"]
    own = {
        "macro_f1": part_of(record, "macro").get("f1"),
        "micro_f1": part_of(record, "micro").get("f1"),
        "jaccard": record.get("jaccard"),
    }
    patients = record.get("num_patients", record.get("n", 0))
    rows: list[list[Cell | str]] = []
    for score, title in SCORE_TITLES.items():
        gain = part_of(samples, "vote_gain").get(score)
        rows.append(
            [
                f"{model}, {title}",
                data_set,
                _with_interval(samples, "mean", score),
                Cell(number(own[score])),
                Cell("-")
                if gain is None
                else signed(gain, _interval(samples, "vote_gain", score), patients),
                _with_interval(samples, "best", score),
            ]
        )
    return rows


def _interval(record: Mapping[str, Any], kind: str, score: str) -> tuple[float, float] | None:
    found = part_of(part_of(record, "intervals"), kind).get(score)
    return None if found is None else (found[0], found[1])


def _with_interval(samples: Mapping[str, Any], kind: str, score: str) -> Cell:
    interval = _interval(samples, kind, score)
    value = part_of(samples, kind).get(score)
    return Cell(number(value), "" if interval is None else bounds(interval))


def _gain_table(rows: Sequence[Sequence[Cell | str]]) -> Table:
    return Table(
        "Samples, their vote, and the best of them",
        ["Model", "Data set", "Mean of the samples", "Vote", "Vote minus mean", "Best sample"],
        rows,
        [
            "Vote: the labels in at least half of an image's samples. Best sample: chosen for each"
            " image by its true labels, so it bounds what choosing among the samples could reach."
            " In small print: 95 % intervals by patient."
        ],
        numbers_from=2,
    )


def _label_table(data_set: str, of: Mapping[str, Mapping[str, Any]]) -> Table:
    """List AUROC and AUPRC of each label, with the share of images where it is true."""
    labels = dict.fromkeys(
        label for record in of.values() for label in part_of(record, "per_label")
    )
    rows: list[list[Cell | str]] = []
    for label in labels:
        found = {
            model: part_of(part_of(record, "per_label"), label) for model, record in of.items()
        }
        true = next((its["prevalence"] for its in found.values() if "prevalence" in its), None)
        row: list[Cell | str] = [label, "-" if true is None else f"{100 * true:.1f} %"]
        for its in found.values():
            row += [_area(its, "auroc"), _area(its, "auprc")]
        rows.append(row)
    mean: list[Cell | str] = ["mean of the labels", ""]
    for record in of.values():
        mean += [_area(record, "macro_auroc"), _area(record, "macro_auprc")]
    header = [f"{model}, {name}" for model in of for name in ("AUROC", "AUPRC")]
    return Table(
        f"Vote shares as probabilities on {data_set}",
        ["Label", "True", *header],
        [*rows, mean],
        [
            "AUROC: 0.5 ranks no better than chance. AUPRC: chance is the share where the label is"
            " true. In small print: 95 % intervals by patient."
        ],
    )


def _area(record: Mapping[str, Any], name: str) -> Cell:
    interval = record.get(f"{name}_interval")
    return Cell(number(record.get(name)), bounds(tuple(interval)) if interval else "")


# ---- thresholds of another data set --------------------------------------------------------------
def threshold_tables(entries: Sequence[Entry]) -> tuple[list[Table], list[Table]]:
    """Show what thresholds chosen on one data set do on another -> (in all, label by label).

    Both lists are empty where no entry carried any.
    """
    rows: list[list[Cell | str]] = []
    by_label = []
    for entry in entries:
        for data_set, record in entry.records.items():
            points = part_of(part_of(record, "probabilities"), "operating_points")
            if points:
                rows += _threshold_rows(entry.name, data_set, points)
                by_label.append(_thresholds_by_label(entry.name, data_set, points))
    if not rows:
        return [], []
    whole = Table(
        "Thresholds carried from one data set to another",
        ["Model", "Data set", "Chosen on", "Vote", "With the thresholds", "Difference"],
        rows,
        [
            "A label is said from the share of the samples that gave it the highest F1 on the set"
            " where it was chosen, in place of one half. Patients who chose the thresholds and are"
            " judged with them, counted beside that set, make F1 with them too high. In small"
            " print: 95 % intervals by patient."
        ],
        numbers_from=3,
    )
    return [whole], by_label


def _threshold_rows(model: str, data_set: str, points: Mapping[str, Any]) -> list[list[Cell | str]]:
    shared = points.get("shared_patients") or 0
    chosen_on = Cell(str(points.get("from", "-")), f"{shared:,} shared patients" if shared else "")
    rows: list[list[Cell | str]] = []
    for score in ("macro_f1", "micro_f1"):
        before, after = (part_of(points, name).get(score) for name in ("before", "after"))
        interval = part_of(points, "difference").get(score)
        moved = (
            Cell("-")
            if before is None or after is None
            else signed(
                after - before,
                None if interval is None else (interval[0], interval[1]),
                # on patients who chose the thresholds a gain is none
                0 if shared else points.get("num_patients", 0),
            )
        )
        told = f"{model}, {SCORE_TITLES[score]}"
        rows.append([told, data_set, chosen_on, number(before), number(after), moved])
    return rows


def _thresholds_by_label(model: str, data_set: str, points: Mapping[str, Any]) -> Table:
    left = points.get("not_chosen") or []
    return Table(
        f"{model} on {data_set}, thresholds of {points.get('from', '-')}",
        ["Label", "Threshold", "F1 of the vote", "F1 with the threshold"],
        [
            [label, *(number(row.get(key)) for key in ("threshold", "before", "after"))]
            for label, row in part_of(points, "per_label").items()
        ],
        [f"Not evaluated where thresholds were chosen, so left at one half: {', '.join(left)}."]
        if left
        else [],
    )
