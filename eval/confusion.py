"""Show which labels a model says where it misses one, and which labels it no longer says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.labels import SILENCED_MIN_TRUE, SILENCED_SHARE, silenced_labels
from eval.contrasts import Contrast
from eval.page import Cell, HeatMap, Table, Text

NOTHING = "nothing in its place"
DEFINITION = (
    "Each row has the n images where its label T is true. The cell under a label L: of these, the"
    " percent in which T is missed and L is said though it is not true. The framed cell under T"
    " itself: the percent in which T is said, its recall. The last column: the percent in which T"
    " is missed and no label is said that is not true. An image with several such labels counts"
    " under each of them, so a row need not add up to 100. Blue deepens by tens of percent, orange"
    " by fives; an empty cell is 0."
)
_MOST_NAMED = 2  # labels in its place that the narrow table names


def said_in_place(
    targets: np.ndarray, predictions: np.ndarray, evaluated: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count what is said where a true label is missed -> (counts [K, K], alone [K], support [K]).

    counts[t, l]: images where t is true and missed, and l is said and not true. counts[t, t]:
    images where t is true and said. alone[t]: t is missed, and no label is said that is not true.
    support[t]: t is true.

    targets, predictions, evaluated [N, K] bool. A label that is not evaluated counts for nothing.
    """
    true = targets & evaluated
    missed = true & ~predictions
    wrong = predictions & ~targets & evaluated
    counts = missed.T.astype(np.int64) @ wrong.astype(np.int64)  # the diagonal is empty by itself
    np.fill_diagonal(counts, (true & predictions).sum(axis=0))
    alone = (missed & ~wrong.any(axis=1, keepdims=True)).sum(axis=0)
    return counts, alone, true.sum(axis=0)


def heat_map(contrast: Contrast, model: str) -> HeatMap:
    """Make the heat map "true label against label said in its place" of one model on a data set."""
    counts, alone, support = said_in_place(*contrast.matrices(model))
    shown = np.flatnonzero(support)
    rows = []
    briefly = []
    for t in shown:
        shares = counts[t] / support[t]
        others = [k for k in np.argsort(-shares, kind="stable") if k != t and shares[k]]
        named = ", ".join(
            f"{contrast.labels[k]} {100 * shares[k]:.0f} %" for k in others[:_MOST_NAMED]
        )
        label, n = contrast.labels[t], int(support[t])
        rows.append((label, n, [*shares.tolist(), float(alone[t] / n)]))
        briefly.append([label, f"{n:,}", f"{100 * shares[t]:.0f} %", named or "-"])
    header = ["True label", "n", "Recall", "Most often said in its place"]
    return HeatMap(
        f"{model} on {contrast.data_set}: true label against label said in its place, percent",
        [*contrast.labels, NOTHING],
        rows,
        (header, briefly),
    )


# ---- silenced labels -----------------------------------------------------------------------------
def counts_of(contrast: Contrast, model: str) -> tuple[dict[str, int], dict[str, int]]:
    """Count how often each label is said and is true -> ({label: said}, {label: true})."""
    targets, predictions, evaluated = contrast.matrices(model)
    said, true = (
        dict(zip(contrast.labels, (matrix & evaluated).sum(axis=0).tolist(), strict=True))
        for matrix in (predictions, targets)
    )
    return said, true


def silenced_in(contrast: Contrast, model: str) -> list[str]:
    """List the labels that a model hardly says on a data set, by the rule of `silenced_labels`."""
    return silenced_labels(*counts_of(contrast, model), contrast.labels)


def silenced_table(contrasts: Sequence[Contrast]) -> Table | Text:
    """List the labels that any model hardly says, with how often each is true and said."""
    rule = (
        f"Silenced: true at least {SILENCED_MIN_TRUE} times, and said less than"
        f" {SILENCED_SHARE:.0%} as often"
    )
    models = list(dict.fromkeys(model for contrast in contrasts for model in contrast.answers))
    rows: list[list[Cell | str]] = []
    for contrast in contrasts:
        silent = {model: silenced_in(contrast, model) for model in contrast.answers}
        said = {model: counts_of(contrast, model)[0] for model in contrast.answers}
        for k, label in enumerate(contrast.labels):
            if any(label in labels for labels in silent.values()):
                cells = [
                    Cell("-")
                    if model not in said
                    else Cell(f"{said[model][label]:,}", "silenced", "loss")
                    if label in silent[model]
                    else Cell(f"{said[model][label]:,}")
                    for model in models
                ]
                rows.append([label, contrast.data_set, f"{contrast.support[k]:,}", *cells])
    if not rows:
        return Text(f"No label is silenced. {rule}.")
    header = ["Label", "Data set", "True", *(f"said by {model}" for model in models)]
    return Table("Silenced labels", header, rows, [f"{rule}."], numbers_from=2)
