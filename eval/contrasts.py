"""Several models on one data set: the same images for all, scores, intervals, and which model
follows which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.examples import Example
from data.labels import LABELS, NIH_NINE, NIH_TEN
from engine.config import UsageError
from eval.evaluate import baselines
from eval.folders import Entry, Predictions
from eval.metrics import failure_policies, figures, interval, patient_totals
from eval.paired import (
    PERMUTATIONS,
    RESAMPLES,
    Change,
    change,
    permutation_p_values,
    shared_resamples,
)

FIGURES = ("micro_f1", "macro_f1", "jaccard")
_RANK = {"base": 0, "sft": 1, "grpo": 2}


@dataclass(frozen=True)
class Comparison:
    """Models on one data set, on the images that all of them answered. Arrays over labels are in
    the order of `labels`.
    """

    data_set: str
    labels: tuple[str, ...]
    predictions: Mapping[str, Predictions]  # by model
    left_out: Mapping[str, int]  # images that a model answered and another did not
    scores: Mapping[str, dict]  # by model: the three `failure_policies`
    values: Mapping[str, dict[str, np.ndarray]]  # by model: `figures`, each [1] or [1, K]
    resampled: Mapping[str, dict[str, np.ndarray]]  # by model: `figures` of the resamples
    p_values: Mapping[tuple[str, str], dict[str, np.ndarray]]  # by pair of models
    baselines: Mapping[str, dict]
    support: np.ndarray  # [K]

    @property
    def is_home(self) -> bool:
        """Whether the data set has the label scheme of the training data: it evaluates all 14
        labels.
        """
        return len(self.labels) == len(LABELS)

    @property
    def first(self) -> Predictions:
        return next(iter(self.predictions.values()))

    def interval(self, model: str, figure: str) -> tuple[float, float]:
        """95 % interval of a figure of FIGURES."""
        return interval(self.resampled[model][figure])

    def change(self, before: str, after: str, figure: str) -> Change:
        """From one model to another, in a figure of FIGURES."""
        return change(
            float(self.values[before][figure][0]),
            float(self.values[after][figure][0]),
            self.resampled[before][figure],
            self.resampled[after][figure],
            float(self.p_values[before, after][figure]),
        )

    def label_change(self, before: str, after: str, label: str) -> Change:
        """From one model to another, in the F1 of one label."""
        k = self.labels.index(label)
        return change(
            float(self.values[before]["label_f1"][0, k]),
            float(self.values[after]["label_f1"][0, k]),
            self.resampled[before]["label_f1"][:, k],
            self.resampled[after]["label_f1"][:, k],
            float(self.p_values[before, after]["label_f1"][k]),
        )


def compare(
    data_set: str,
    answers: Mapping[str, Predictions],
    pairs: Sequence[tuple[str, str]],
    *,
    labels: Sequence[str] | None = None,
    reference: Sequence[Example] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
) -> Comparison:
    """Compare models on the images that all of them answered. labels: the columns; default, all
    that any image evaluates.

    Raises UsageError where no image is answered by all, or where two models have other labels or
    patients for one image.
    """
    shared = set.intersection(*(set(predictions.ids) for predictions in answers.values()))
    ids = [id for id in next(iter(answers.values())).ids if id in shared]
    if not ids:
        raise UsageError(
            f"data set {data_set}: no image is answered by all of {', '.join(answers)}; give them"
            " different set names, or answer the same data file"
        )
    taken = {name: predictions.taken(ids) for name, predictions in answers.items()}
    first_name, first = next(iter(taken.items()))
    for name, predictions in taken.items():
        for what in ("targets", "evaluated", "patients"):
            if not np.array_equal(getattr(predictions, what), getattr(first, what)):
                raise UsageError(
                    f"data set {data_set}: {first_name} and {name} have different {what} for the"
                    " same ids; they were scored against different versions of the data"
                )
    labels = tuple(labels or [LABELS[k] for k in first.columns])
    if not labels:
        raise UsageError(f"data set {data_set}: no image evaluates any label")
    columns = [LABELS.index(label) for label in labels]
    totals = {
        name: patient_totals(
            *(
                getattr(predictions, matrix)[:, columns]
                for matrix in ("targets", "predictions", "evaluated")
            ),
            predictions.patients,
            predictions.jaccard,
        )
        for name, predictions in taken.items()
    }
    targets, evaluated = first.targets[:, columns], first.evaluated[:, columns]
    return Comparison(
        data_set=data_set,
        labels=labels,
        predictions=taken,
        left_out={name: len(predictions.ids) - len(ids) for name, predictions in answers.items()},
        scores={
            name: failure_policies(
                targets, predictions.predictions[:, columns], predictions.parsed, labels, evaluated
            )
            for name, predictions in taken.items()
        },
        values={name: figures(rows.sum(axis=0)[None]) for name, rows in totals.items()},
        resampled=shared_resamples(totals, seed=seed, resamples=resamples),
        p_values={
            (before, after): permutation_p_values(
                totals[before], totals[after], seed=seed, permutations=permutations
            )
            for before, after in pairs
            if before in totals and after in totals
        },
        baselines=baselines(targets, evaluated, list(labels), reference, seed),
        support=(targets & evaluated).sum(axis=0),
    )


def pairs_of(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """(before, after) of the models that follow each other: for each, the nearest earlier one of
    every lower stage (base, SFT, GRPO); where there is none, the first of all.
    """
    pairs = []
    for place, entry in enumerate(entries):
        earlier = entries[:place]
        lower = [
            other for other in earlier if _RANK.get(other.stage, 9) < _RANK.get(entry.stage, 0)
        ]
        nearest = {other.stage: other.name for other in lower}  # the last of each stage
        pairs += [
            (nearest[stage], entry.name)
            for stage in sorted(nearest, key=lambda stage: -_RANK[stage])
        ]
        if not lower and earlier:
            pairs.append((entries[0].name, entry.name))
    return pairs


@dataclass(frozen=True)
class Transfer:
    """From one model to another: the mean change of macro-F1 where the labels are the training
    data's, and where they are others.
    """

    before: str
    after: str
    home: Change | None
    away: Change | None
    # home difference minus away difference, with its 95 % interval
    gap: tuple[float, tuple[float, float]] | None


def transfers(
    comparisons: Sequence[Comparison], home: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> list[Transfer]:
    """The transfer of each pair that two data sets or more can show. home: names of the
    in-distribution sets.
    """
    found = []
    for before, after in pairs:
        both = [comparison for comparison in comparisons if (before, after) in comparison.p_values]
        sides = [
            [comparison for comparison in both if (comparison.data_set in home) == at_home]
            for at_home in (True, False)
        ]
        changes = [_mean_change(side, before, after) for side in sides]
        if any(changes):
            gap = None
            if all(changes):
                moved = [
                    np.mean(
                        [
                            c.resampled[after]["macro_f1"] - c.resampled[before]["macro_f1"]
                            for c in side
                        ],
                        axis=0,
                    )
                    for side in sides
                ]
                gap = (
                    changes[0].after - changes[0].before - changes[1].after + changes[1].before,
                    interval(moved[0] - moved[1]),
                )
            found.append(Transfer(before, after, *changes, gap))
    return found


def _mean_change(side: Sequence[Comparison], before: str, after: str) -> Change | None:
    """The change of the mean macro-F1 over data sets; its p-value only where there is one set, else
    NaN.
    """
    if not side:
        return None
    if len(side) == 1:
        return side[0].change(before, after, "macro_f1")
    point = [
        float(np.mean([c.values[name]["macro_f1"][0] for c in side])) for name in (before, after)
    ]
    drawn = [
        np.mean([c.resampled[name]["macro_f1"] for c in side], axis=0) for name in (before, after)
    ]
    return change(*point, *drawn, float("nan"))


def nih_variants(
    answers: Mapping[str, Predictions],
) -> dict[str, tuple[dict[str, Predictions], tuple[str, ...]]]:
    """{"nine", "ten": (answers scored against that mapping, its labels)} where all answers are to
    NIH's images; else empty.
    """
    if not answers or not all(predictions.is_nih for predictions in answers.values()):
        return {}
    return {
        name: (
            {model: predictions.under_nih(labels) for model, predictions in answers.items()},
            labels,
        )
        for name, labels in (("nine", NIH_NINE), ("ten", NIH_TEN))
    }
