"""Score a model by group of patients: by sex, by age and by view.

A mean over all images hides a group that a model serves worse. Two groups are compared on the same
labels: those that have enough positives in each. A label without any positive in a group counts 0
in its macro-F1, which would say more about the group's diseases than about the model.

Shapes: N images, K labels, P patients of a group, R resamples.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.examples import MAX_AGE, WHO
from data.predictions import Prediction
from eval.metrics import RESAMPLES, drawn_patients, interval, patient_totals, scores_of_totals
from eval.probabilities import Shares, auroc, has_shares
from eval.scores import answer_matrices, evaluated_columns

# Decades in pairs, as Seyyed-Kalantari et al., 2021 (arXiv 2003.00827) have them.
AGE_BANDS = ((0, 19), (20, 39), (40, 59), (60, 79), (80, MAX_AGE))
MIN_IMAGES = 30  # a smaller group has scores, and no interval and no comparison
MIN_POSITIVES = 5  # of a label in each group: with five, one resample in 150 has none (e^-5)
MAX_GROUPS = 12  # the rarer views together are one more
OTHER = "other"
METRICS = ("macro_f1_shared", "micro_f1", "jaccard", "macro_auroc")


# ---- who is in which group -----------------------------------------------------------------------
def age_group(age: int) -> str:
    """Name the band of an age in years, such as "60-79"."""
    low, high = next((low, high) for low, high in AGE_BANDS if age <= high)
    return f"{low}+" if high == MAX_AGE else f"{low}-{high}"


def group_names(who: Sequence[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    """Name the group of each image by each field -> {"sex", "age", "view": object [N]}.

    A field of which nothing is known is left out. "" stands for unknown, "other" for views beyond
    the MAX_GROUPS most frequent ones.

    who [N]: (sex, age, view) of each image, None where unknown.
    """
    found = {}
    for name, of_images in zip(WHO, zip(*who, strict=True), strict=True):
        values: list[str | None] = list(of_images)
        if name == "age":
            values = [None if age is None else age_group(age) for age in of_images]
        counts = Counter(value for value in values if value is not None)
        frequent = {value for value, _ in counts.most_common(MAX_GROUPS)}
        named = ["" if v is None else v if v in frequent else OTHER for v in values]
        if any(named):
            found[name] = np.array(named, dtype=object)
    return found


# ---- scores of each group ------------------------------------------------------------------------
@dataclass(frozen=True)
class Scored:
    """Hold N answers and their truth, the columns K labels, for scores by group.

    targets, predicted, evaluated [N, K] bool. jaccard [N]. patients [N].
    """

    labels: tuple[str, ...]
    targets: np.ndarray
    predicted: np.ndarray
    evaluated: np.ndarray
    jaccard: np.ndarray
    patients: np.ndarray

    @classmethod
    def of(cls, predictions: Sequence[Prediction]) -> Scored:
        """Take predictions as `eval.scores.score` does."""
        labels = evaluated_columns(predictions)
        matrices = answer_matrices(predictions, labels)
        patients = np.array([prediction.patient_id for prediction in predictions], dtype=object)
        return cls(tuple(labels), *matrices, patients)

    def totals(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add up some of the images by patient -> (patients [P], their totals [P, 3K + 2]).

        chosen [N] bool.
        """
        targets, predicted, evaluated, jaccard, patients = (
            getattr(self, name)[chosen]
            for name in ("targets", "predicted", "evaluated", "jaccard", "patients")
        )
        rows = patient_totals(targets, predicted, evaluated, patients.tolist(), jaccard)
        return np.unique(patients), rows


@dataclass(frozen=True)
class Group:
    """Hold the scores of one group of images, and of R resamples of its patients.

    n: images. values: {score: value}. drawn: {score: [R]}, empty for a group of too few images.
    "macro_f1" is over all labels with zeros kept, as in the paper. "macro_f1_shared" is over the
    labels on which the groups are compared, and is missing where there are none.
    """

    n: int
    num_patients: int
    values: dict[str, float]
    drawn: dict[str, np.ndarray]

    @property
    def is_large(self) -> bool:
        """Tell whether the group has enough images to be compared."""
        return self.n >= MIN_IMAGES


@dataclass(frozen=True)
class Groups:
    """Hold the groups of one field, by name, and the labels on which they are compared."""

    groups: dict[str, Group]
    labels: tuple[str, ...]

    @property
    def large(self) -> list[str]:
        """Return the names of the groups that are compared, none where there is only one."""
        names = [name for name, group in self.groups.items() if group.is_large]
        return names if len(names) > 1 else []

    @property
    def reference(self) -> str:
        """Return the largest group, the first of equals, which the others are compared with."""
        return max(self.large, key=lambda name: self.groups[name].n)

    def difference(self, name: str, score: str) -> tuple[float, tuple[float, float]] | None:
        """Subtract the reference's score from a group's -> (difference, its 95 % interval)."""
        one, other = self.groups[name], self.groups[self.reference]
        if score not in one.values or score not in other.values:
            return None
        drawn = one.drawn[score] - other.drawn[score]
        return one.values[score] - other.values[score], interval(drawn)


def groups_of(
    names: np.ndarray, scored: Scored, *, seed: int = 0, resamples: int = RESAMPLES
) -> Groups:
    """Score each group by itself, with resamples of its patients.

    names [N]: the group of each image, "" where it is unknown.
    seed, resamples: of the draws. The same for two models on the same images gives the same
    patients, so their difference in a group is a paired one.

    Where no patient is in two groups, as with sexes, each group is drawn by itself. Where some are,
    as with views, all are drawn together, so that the difference of two groups knows of them.
    """
    present = sorted(set(names) - {""}, key=_natural)
    totals = {name: scored.totals(names == name) for name in present}
    images = {name: int((names == name).sum()) for name in present}
    large = [name for name in present if images[name] >= MIN_IMAGES]
    shared = _shared_labels([totals[name][1] for name in large], len(scored.labels))
    drawn = _draw({name: totals[name] for name in large}, seed, resamples)
    groups = {}
    for name in present:
        patients, rows = totals[name]
        seen = _scores(rows.sum(axis=0)[None], shared)
        if name not in large:
            seen.pop("macro_f1_shared", None)
        groups[name] = Group(
            images[name],
            len(patients),
            {score: float(value[0]) for score, value in seen.items()},
            _scores(drawn[name], shared) if name in large else {},
        )
    return Groups(groups, tuple(scored.labels[k] for k in shared))


def _natural(name: str) -> tuple[bool, int, str]:
    """Put age groups in the order of their ages, and what is left over last."""
    number = name.partition("-")[0].rstrip("+")
    return name == OTHER, int(number) if number.isdecimal() else -1, name


def _shared_labels(totals: Sequence[np.ndarray], num_labels: int) -> list[int]:
    """Choose the labels with enough positives in each of the groups, none for a single group.

    totals [P, 3K + 2] each: of `patient_totals`.
    """
    if len(totals) < 2:
        return []
    sums = np.array([rows.sum(axis=0) for rows in totals])  # [groups, 3K + 2]
    positives = sums[:, :num_labels] + sums[:, 2 * num_labels : 3 * num_labels]  # TP + FN
    return np.flatnonzero((positives >= MIN_POSITIVES).all(axis=0)).tolist()


def _draw(
    totals: Mapping[str, tuple[np.ndarray, np.ndarray]], seed: int, resamples: int
) -> dict[str, np.ndarray]:
    """Resample the patients of each group -> {group: [R, 3K + 2]}.

    totals: {group: (its patients [P], their totals [P, 3K + 2])}.
    """
    everyone = np.unique(np.concatenate([[], *(patients for patients, _ in totals.values())]))
    apart = sum(len(patients) for patients, _ in totals.values()) == len(everyone)
    drawn = {}
    for name, (patients, rows) in totals.items():
        if apart:
            own_seed = zlib.crc32(f"{seed} {name}".encode())
            weights = drawn_patients(len(patients), seed=own_seed, resamples=resamples)
        else:
            everywhere = drawn_patients(len(everyone), seed=seed, resamples=resamples)
            place = np.searchsorted(everyone, patients)
            weights = (of_everyone[:, place] for of_everyone in everywhere)
        drawn[name] = np.concatenate([piece @ rows for piece in weights])
    return drawn


def _scores(totals: np.ndarray, shared: Sequence[int]) -> dict[str, np.ndarray]:
    """Score totals [R, 3K + 2] -> {score: [R]}, NaN where a resample holds no image of a group."""
    with np.errstate(invalid="ignore"):
        scores = scores_of_totals(totals)
    found = {name: scores[name] for name in ("macro_f1", "micro_f1", "jaccard")}
    if shared:
        found["macro_f1_shared"] = scores["label_f1"][:, shared].mean(axis=1)
    return found


# ---- for scores-<set>.json -----------------------------------------------------------------------
def group_scores(
    predictions: Sequence[Prediction], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Score predictions by sex, age group and view -> keys for scores-<set>.json.

    "groups" is {field: {group: {"n", "num_patients", "macro_f1", "micro_f1", "jaccard"}}}. A group
    of at least MIN_IMAGES images also has "intervals", 95 % by patient, and "macro_f1_shared" on
    the labels with at least MIN_POSITIVES positives in each such group. "group_differences" is
    {field: {"labels": these, "reference": the largest group, "groups": {group: {score:
    {"difference", "interval"}}}}}, where two groups are that large. Where the predictions are
    votes, these groups also have "macro_auroc" of their shares, on the same labels.

    Empty where nothing is known of any image. seed, resamples: of the intervals.
    """
    names = group_names([(one.sex, one.age, one.view) for one in predictions])
    if not names:
        return {}
    scored = Scored.of(predictions)
    fields = {
        field: groups_of(of_image, scored, seed=seed, resamples=resamples)
        for field, of_image in names.items()
    }
    if all(map(has_shares, predictions)):
        shares = Shares.of(predictions)
        fields = {
            field: _with_auroc(found, names[field], shares, seed, resamples)
            for field, found in fields.items()
        }
    return {
        "groups": {
            field: {name: _record(group) for name, group in found.groups.items()}
            for field, found in fields.items()
        },
        "group_differences": {
            field: _differences(found) for field, found in fields.items() if found.large
        },
    }


def _with_auroc(
    found: Groups, names: np.ndarray, shares: Shares, seed: int, resamples: int
) -> Groups:
    """Add "macro_auroc" of the vote shares to the groups that are compared.

    It is the mean over the labels on which they are compared. Its resamples draw the patients that
    the other scores draw.
    """
    patients = np.array(shares.patients, dtype=object)
    seen: dict[str, list[float]] = {name: [] for name in found.large}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in found.large}
    for label in found.labels:
        k = shares.labels.index(label)
        values, rank = np.unique(shares.shares[:, k], return_inverse=True)
        cell = rank + len(values) * ~shares.targets[:, k]  # positives before negatives
        tables = {}
        for name in found.large:
            chosen = (names == name) & shares.evaluated[:, k]
            everyone = np.unique(patients[names == name])
            counts = np.zeros((len(everyone), 2 * len(values)))
            np.add.at(counts, (np.searchsorted(everyone, patients[chosen]), cell[chosen]), 1)
            tables[name] = everyone, counts
        for name, rows in _draw(tables, seed, resamples).items():
            seen[name].append(float(auroc(*np.split(tables[name][1].sum(axis=0), 2))))
            drawn[name].append(auroc(*np.split(rows, 2, axis=1)))
    groups = dict(found.groups)
    for name in found.large:
        if seen[name] and not np.isnan(seen[name]).any():
            group = groups[name]
            groups[name] = replace(
                group,
                values=group.values | {"macro_auroc": float(np.mean(seen[name]))},
                drawn=group.drawn | {"macro_auroc": np.mean(drawn[name], axis=0)},
            )
    return replace(found, groups=groups)


def _record(group: Group) -> dict[str, Any]:
    intervals = {score: list(interval(drawn)) for score, drawn in group.drawn.items()}
    return {
        "n": group.n,
        "num_patients": group.num_patients,
        **group.values,
        **({"intervals": intervals} if intervals else {}),
    }


def _differences(found: Groups) -> dict[str, Any]:
    return {
        "labels": list(found.labels),
        "reference": found.reference,
        "groups": {
            name: {
                score: {"difference": moved[0], "interval": list(moved[1])}
                for score in METRICS
                if (moved := found.difference(name, score)) is not None
            }
            for name in found.large
            if name != found.reference
        },
    }
