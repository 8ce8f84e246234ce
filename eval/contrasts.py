"""Set models side by side on the same images: scores, paired intervals, what each step changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.examples import Example
from data.labels import NIH_NINE, NIH_TEN, LabelSet
from engine.config import UsageError
from eval.folders import Answers, Entry
from eval.metrics import failure_policies, interval, scores_of_totals
from eval.paired import (
    PERMUTATIONS,
    RESAMPLES,
    Change,
    change,
    permutation_p_values,
    shared_resamples,
)
from eval.scores import baselines
from eval.transfer import (
    Macro,
    Moved,
    gap_on_all_labels,
    gap_on_shared_labels,
    home_on_its_own_labels,
    mean_macro,
    shared_labels,
)

_RANK = {"base": 0, "sft": 1, "grpo": 2}


@dataclass(frozen=True)
class Contrast:
    """Hold models side by side on one data set, on the images that all of them answered.

    Scores go by the names "micro_f1", "macro_f1" and "jaccard".

    labels [K]: the columns, in whose order arrays over labels are. answers: by model.
    left_out: by model, images that it answered and another did not. policies: by model, the three
    `failure_policies`. values: by model, `scores_of_totals`, each [1] or [1, K]. resampled: by
    model, the same of R resamples, each [R] or [R, K], but for precision and recall by label.
    label_bounds: by model, the 95 % interval of each label's "label_precision", "label_recall" and
    "label_f1", each [2, K]. p_values: by pair of models.
    baselines: as in scores-<name>.json. support [K]. totals: by model, `patient_totals` [P, C].
    seed, permutations: of the test, for those that are made when they are asked for.
    """

    data_set: str
    labels: tuple[str, ...]
    answers: Mapping[str, Answers]
    left_out: Mapping[str, int]
    policies: Mapping[str, dict[str, dict[str, Any]]]
    values: Mapping[str, dict[str, np.ndarray]]
    resampled: Mapping[str, dict[str, np.ndarray]]
    label_bounds: Mapping[str, dict[str, np.ndarray]]
    p_values: Mapping[tuple[str, str], dict[str, np.ndarray]]
    baselines: Mapping[str, dict[str, Any]]
    support: np.ndarray
    totals: Mapping[str, np.ndarray]
    seed: int
    permutations: int

    @property
    def is_home(self) -> bool:
        """Tell whether the set has the training data's label scheme: it evaluates all labels."""
        return len(self.labels) == len(self.label_set.names)

    @property
    def label_set(self) -> LabelSet:
        """Return the labels that there are."""
        return self.first.label_set

    @property
    def first(self) -> Answers:
        """Return the answers of the first model, for what all models share."""
        return next(iter(self.answers.values()))

    def interval(self, model: str, score: str) -> tuple[float, float]:
        """Compute the 95 % interval of a model's score."""
        return interval(self.resampled[model][score])

    @property
    def num_patients(self) -> int:
        """Return how many patients the images are of."""
        return len(next(iter(self.totals.values())))

    def matrices(self, model: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what is true, what a model says and what counts -> three [N, K] bool."""
        columns = [self.label_set.names.index(label) for label in self.labels]
        answers = self.answers[model]
        return (
            answers.targets[:, columns],
            answers.predictions[:, columns],
            answers.evaluated[:, columns],
        )

    def change(self, before: str, after: str, score: str) -> Change:
        """Compare two models in a score."""
        return change(
            float(self.values[before][score][0]),
            float(self.values[after][score][0]),
            self.resampled[before][score],
            self.resampled[after][score],
            float(self.p_values[before, after][score]),
        )

    def moved(self, before: str, after: str) -> Moved:
        """Return the F1 of each label under both models, for comparisons with other data sets."""
        values = [self.values[model]["label_f1"][0] for model in (before, after)]
        drawn = [self.resampled[model]["label_f1"] for model in (before, after)]
        return Moved(self.data_set, self.labels, *values, *drawn)

    def macro_change(self, before: str, after: str, labels: Sequence[str]) -> Change:
        """Compare two models in macro-F1 over some of the labels."""
        if tuple(labels) == self.labels:
            return self.change(before, after, "macro_f1")
        macro = self.moved(before, after).macro(labels)
        chosen = [self.labels.index(label) for label in labels]
        counts = [part * len(self.labels) + k for part in range(3) for k in chosen]  # TP, FP, FN
        columns = [*counts, -2, -1]
        p_values = permutation_p_values(
            self.totals[before][:, columns],
            self.totals[after][:, columns],
            seed=self.seed,
            permutations=self.permutations,
        )
        return _change_of(macro, float(p_values["macro_f1"]))

    def label_change(self, before: str, after: str, label: str) -> Change:
        """Compare two models in the F1 of one label."""
        k = self.labels.index(label)
        return change(
            float(self.values[before]["label_f1"][0, k]),
            float(self.values[after]["label_f1"][0, k]),
            self.resampled[before]["label_f1"][:, k],
            self.resampled[after]["label_f1"][:, k],
            float(self.p_values[before, after]["label_f1"][k]),
        )


def contrast_models(
    data_set: str,
    answers: Mapping[str, Answers],
    pairs: Sequence[tuple[str, str]],
    *,
    labels: Sequence[str] | None = None,
    baseline_examples: Sequence[Example] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
) -> Contrast:
    """Set models side by side on the images that all of them answered.

    answers: {model: its answers}. pairs: (before, after) of the models to test for a difference.
    labels: the columns. Default, all that any image evaluates. baseline_examples: whose label sets
    the baselines imitate. seed, resamples, permutations: of the intervals and the test.

    Raises UsageError where no image is answered by all, or where two models have other labels or
    patients for one image.
    """
    taken = _on_the_same_images(data_set, answers)
    first = next(iter(taken.values()))
    names = first.label_set.names
    labels = tuple(labels or [names[k] for k in first.columns])
    if not labels:
        raise UsageError(f"data set {data_set}: no image evaluates any label")
    columns = [names.index(label) for label in labels]
    totals = {name: one.totals(columns) for name, one in taken.items()}
    targets, evaluated = first.targets[:, columns], first.evaluated[:, columns]
    resampled = shared_resamples(totals, seed=seed, resamples=resamples)
    return Contrast(
        data_set=data_set,
        labels=labels,
        answers=taken,
        left_out={name: len(one.ids) - len(first.ids) for name, one in answers.items()},
        policies={
            name: failure_policies(
                targets, one.predictions[:, columns], one.parsed, labels, evaluated
            )
            for name, one in taken.items()
        },
        values={name: scores_of_totals(rows.sum(axis=0)[None]) for name, rows in totals.items()},
        resampled=resampled,
        label_bounds={name: _label_bounds(drawn) for name, drawn in resampled.items()},
        p_values={
            (before, after): permutation_p_values(
                totals[before], totals[after], seed=seed, permutations=permutations
            )
            for before, after in pairs
            if before in totals and after in totals
        },
        baselines=baselines(targets, evaluated, labels, baseline_examples, seed),
        support=(targets & evaluated).sum(axis=0),
        totals=totals,
        seed=seed,
        permutations=permutations,
    )


def _on_the_same_images(data_set: str, answers: Mapping[str, Answers]) -> dict[str, Answers]:
    """Take of each model the answers to the images that all of them answered, in one order.

    Raises UsageError as `contrast_models` does.
    """
    shared = set.intersection(*(set(one.ids) for one in answers.values()))
    ids = [id for id in next(iter(answers.values())).ids if id in shared]
    if not ids:
        raise UsageError(
            f"data set {data_set}: no image is answered by all of {', '.join(answers)}; give them"
            " different set names, or answer the same data file"
        )
    taken = {name: one.taken(ids) for name, one in answers.items()}
    first_name, first = next(iter(taken.items()))
    for name, others in taken.items():
        for what in ("targets", "evaluated", "patients"):
            if not np.array_equal(getattr(others, what), getattr(first, what)):
                raise UsageError(
                    f"data set {data_set}: {first_name} and {name} have different {what} for the"
                    " same ids; they were scored against different versions of the data"
                )
    return taken


def _label_bounds(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute the intervals of each label, and drop what nothing else needs of the resamples."""
    names = ("label_precision", "label_recall", "label_f1")
    found = {name: np.percentile(drawn[name], [2.5, 97.5], axis=0) for name in names}
    for name in names[:2]:
        del drawn[name]
    return found


def pairs_of(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Pair the models that follow each other in training -> (before, after) of each step.

    Each model follows the nearest earlier one of every lower stage (base, SFT, GRPO). A vote over
    samples of a model is no stage: it follows that model, and a model of a higher stage is compared
    with it too, last. Where a model would follow none, it follows the first of all.
    """
    pairs = []
    for index, entry in enumerate(entries):
        earlier = entries[:index]
        own = [other for other in earlier if other.stage == entry.stage and other.votes == 1]
        if entry.votes > 1 and own:
            pairs.append((own[-1].name, entry.name))
            continue
        lower = [
            other for other in earlier if _RANK.get(other.stage, 9) < _RANK.get(entry.stage, 0)
        ]
        # the last of each stage, and of the votes over it
        nearest = {(other.votes > 1, other.stage): other.name for other in lower}
        pairs += [
            (nearest[key], entry.name)
            for key in sorted(nearest, key=lambda key: (key[0], -_RANK[key[1]]))
        ]
        if not lower and earlier:
            pairs.append((entries[0].name, entry.name))
    return pairs


@dataclass(frozen=True)
class Transfer:
    """Hold what a step from one model to another changed, at home and elsewhere.

    home: mean change of macro-F1 where the labels are the training data's. away: where they are
    others. gap: home difference minus away difference, with its 95 % interval. Each side is scored
    on all labels of its own.

    labels: by pair of data sets (home, away), the labels that both can express. home_shared,
    away_shared, gap_shared: the same comparison on those labels alone. home_only: the change at
    home on the labels that the other side cannot express. same_labels: both sides have the same
    labels anyway, so that there is nothing to match. num_patients: of the data set with the fewest.
    """

    before: str
    after: str
    home: Change | None
    away: Change | None
    gap: tuple[float, tuple[float, float]] | None
    labels: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    home_shared: Change | None = None
    away_shared: Change | None = None
    gap_shared: tuple[float, tuple[float, float]] | None = None
    home_only: Change | None = None
    same_labels: bool = False
    num_patients: int = 0


def transfers(
    contrasts: Sequence[Contrast], home: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> list[Transfer]:
    """Compute the transfer of each pair of models that any data set can show.

    home: names of the in-distribution sets. pairs: (before, after).
    """
    found = []
    for before, after in pairs:
        both = [contrast for contrast in contrasts if (before, after) in contrast.p_values]
        sides = [
            [contrast for contrast in both if (contrast.data_set in home) == is_home]
            for is_home in (True, False)
        ]
        home_change, away_change = (_mean_change(side, before, after) for side in sides)
        at_home, away = ([c.moved(before, after) for c in side] for side in sides)
        gap, shared = gap_on_all_labels(at_home, away), gap_on_shared_labels(at_home, away)
        own = home_on_its_own_labels(at_home, away)
        if home_change or away_change:
            found.append(
                Transfer(
                    before,
                    after,
                    home_change,
                    away_change,
                    gap=None if gap is None else (gap.value, gap.interval),
                    labels={
                        (one.data_set, other.data_set): shared_labels(one.labels, other.labels)
                        for one in at_home
                        for other in away
                    },
                    home_shared=None if shared is None else _change_of(shared.home),
                    away_shared=None if shared is None else _change_of(shared.away),
                    gap_shared=None if shared is None else (shared.value, shared.interval),
                    home_only=None if own is None else _change_of(own),
                    same_labels=all(
                        set(one.labels) == set(other.labels) for one in at_home for other in away
                    ),
                    num_patients=min(contrast.num_patients for contrast in both),
                )
            )
    return found


def _mean_change(side: Sequence[Contrast], before: str, after: str) -> Change | None:
    """Compute the change of the mean macro-F1, with a p-value only where there is one set."""
    if not side:
        return None
    if len(side) == 1:
        return side[0].change(before, after, "macro_f1")
    return _change_of(mean_macro([c.moved(before, after).macro(c.labels) for c in side]))


def _change_of(macro: Macro, p_value: float = float("nan")) -> Change:
    return change(macro.before, macro.after, macro.drawn_before, macro.drawn_after, p_value)


def nih_variants(
    answers: Mapping[str, Answers],
) -> dict[str, tuple[dict[str, Answers], tuple[str, ...]]]:
    """Score answers to NIH's images under the paper's nine categories and under ten.

    Returns {"nine", "ten": (answers against that mapping, its labels)}, empty where an answer is
    not to NIH's images.
    """
    if not answers or not all(one.is_nih for one in answers.values()):
        return {}
    return {
        name: ({model: one.under_nih(labels) for model, one in answers.items()}, labels)
        for name, labels in (("nine", NIH_NINE), ("ten", NIH_TEN))
    }
