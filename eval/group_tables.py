"""Show scores by sex, age group and view: for the console, and as tables of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data.examples import WHO
from eval.contrasts import Contrast
from eval.end_table import aligned, change_with_interval, clipped, with_interval
from eval.groups import (
    MIN_IMAGES,
    MIN_POSITIVES,
    Group,
    Groups,
    Scored,
    group_names,
    groups_of,
)
from eval.metrics import interval
from eval.names import SCORE_TITLES, heading
from eval.page import ARROW, Cell, Table
from eval.tables import bounds, number, signed

TITLES = {"sex": "sex", "age": "age in years", "view": "view"}
# over the labels that all groups have
SCORES = {"macro_f1_shared": SCORE_TITLES["macro_f1"]} | {
    score: SCORE_TITLES[score] for score in ("micro_f1", "jaccard")
}


# ---- console -------------------------------------------------------------------------------------
def format_groups(results: Mapping[str, dict[str, Any]]) -> str:
    """Lay out the scores of every group as a text table, "" where nothing can be compared.

    A field is shown where at least two of its groups have MIN_IMAGES images.

    results: {data set: scores}, with the keys of `eval.groups.group_scores`.
    """
    blocks = [
        _block(name, scores, field)
        for name, scores in results.items()
        for field in scores.get("group_differences", {})
    ]
    if not blocks:
        return ""
    note = (
        f"(95 % interval by patient); macro-F1: on the labels with {MIN_POSITIVES} positives or"
        " more in each group;\nnot adjusted for the number of comparisons: without any difference 1"
        " in 20 leaves 0 out"
    )
    return "\n".join(["\n\n".join(blocks), note])


def _block(name: str, scores: Mapping[str, Any], field: str) -> str:
    groups, compared = scores["groups"][field], scores["group_differences"][field]
    header = (f"{clipped(name)}, by {TITLES[field]}", "n", *SCORES.values())
    rows: list[tuple[str, ...]] = [header]
    for group, values in groups.items():
        if "intervals" in values:
            shown = [_with_interval(values, score) for score in SCORES]
            rows.append((f"  {group}", f"{values['n']:,}", *shown))
    for group, differences in compared["groups"].items():
        shown = [_difference(differences.get(score)) for score in SCORES]
        rows.append((f"  {group} minus {compared['reference']}", "", *shown))
    small = {group: values["n"] for group, values in groups.items() if "intervals" not in values}
    unknown = scores["n"] - sum(values["n"] for values in groups.values())
    left_out = [f"{group} {n}" for group, n in small.items()]
    left_out += [f"unknown {unknown:,}"] if unknown else []
    lines = aligned(rows, "<>" + "<" * len(SCORES))
    labels = len(compared["labels"])
    lines.append(f"  macro-F1 on {labels} label{'' if labels == 1 else 's'}")
    if left_out:
        lines.append(f"  fewer than {MIN_IMAGES} images, or unknown: {', '.join(left_out)}")
    return "\n".join(lines)


def _with_interval(values: Mapping[str, Any], score: str) -> str:
    if score not in values:
        return "-"
    return with_interval(values[score], values["intervals"][score])


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return change_with_interval(found["difference"], found["interval"])


# ---- report --------------------------------------------------------------------------------------
def groups_tables(
    contrast: Contrast, pairs: Sequence[tuple[str, str]], *, seed: int = 0
) -> list[Table]:
    """Make a table for each field that a data set can show: every model's scores in each group.

    Beside a group stands its difference from the largest group, and what the step to this model
    changed in it, where `pairs` has a step to it. Patients are drawn alike for all models, so the
    latter is a paired difference. No table where fewer than two groups have MIN_IMAGES images.

    pairs: (before, after) of the models that follow each other. seed: of the draws.
    """
    tables = []
    # a model's kept predictions may be older than these fields
    by_model = [group_names(one.who) for one in contrast.answers.values()]
    for field in WHO:
        names = next((known[field] for known in by_model if field in known), None)
        if names is None:
            continue
        found = {
            model: groups_of(names, _scored(contrast, model), seed=seed)
            for model in contrast.answers
        }
        first = next(iter(found.values()))
        if first.large:
            before = {after: before for before, after in reversed(pairs) if before in found}
            rows = list(_rows(found, before))
            tables.append(_table(contrast, field, first, rows, names))
    return tables


def _scored(contrast: Contrast, model: str) -> Scored:
    answers = contrast.answers[model]
    return Scored(contrast.labels, *contrast.matrices(model), answers.jaccard, answers.patients)


def _rows(found: Mapping[str, Groups], before: Mapping[str, str]) -> Iterator[list[Cell | str]]:
    first = next(iter(found.values()))
    reference = first.groups[first.reference]
    for name in first.large:
        for model, groups in found.items():
            group = groups.groups[name]
            is_reference = name == groups.reference
            moved = None if is_reference else groups.difference(name, "macro_f1_shared")
            patients = min(group.num_patients, reference.num_patients)
            earlier = found[before[model]].groups[name] if model in before else None
            yield [
                name if model == next(iter(found)) else "",
                f"{group.n:,}" if model == next(iter(found)) else "",
                model,
                *(_score_cell(group, score) for score in SCORES),
                "the largest"
                if is_reference
                else "-"
                if moved is None
                else signed(*moved, patients),
                _change(earlier, group),
            ]


def _score_cell(group: Group, score: str) -> Cell:
    if score not in group.values:
        return Cell("-")
    return Cell(number(group.values[score]), bounds(interval(group.drawn[score])))


def _change(before: Group | None, after: Group) -> Cell:
    """Write what a step changed in a group: both models on the same drawn patients."""
    score = "macro_f1_shared"
    if before is None or score not in after.values:
        return Cell("-")
    return signed(
        after.values[score] - before.values[score],
        interval(after.drawn[score] - before.drawn[score]),
        after.num_patients,
    )


def _table(
    contrast: Contrast,
    field: str,
    groups: Groups,
    rows: list[list[Cell | str]],
    names: np.ndarray,
) -> Table:
    small = [f"{name} {group.n}" for name, group in groups.groups.items() if not group.is_large]
    unknown = int((names == "").sum())
    small += [f"unknown {unknown:,}"] if unknown else []
    notes = [
        "Macro F1 here is over the labels with at least"
        f" {MIN_POSITIVES} positives in each group: {', '.join(groups.labels) or 'none'}. In small"
        " print: 95 % intervals by patient, not adjusted for the number of comparisons: of 20"
        " without any difference one leaves 0 out. Groups differ in their diseases too, so a"
        " difference is no proof of unfairness."
    ]
    if small:
        notes.append(f"Fewer than {MIN_IMAGES} images, or unknown: {', '.join(small)}.")
    return Table(
        f"Scores on {contrast.data_set} by {TITLES[field]}",
        [
            field.capitalize(),
            "Images",
            "Model",
            *map(heading, SCORES.values()),
            f"Macro-F1 minus that of {groups.reference}",
            f"Macro-F1, change from the model before {ARROW} this",
        ],
        rows,
        notes,
        numbers_from=3,
    )
