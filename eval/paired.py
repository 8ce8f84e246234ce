"""Tell how sure a difference of scores is, and what a model says whatever the image.

Several models are compared on the same images by the same resamples of patients, so that a
difference has a paired interval. All of it works on the totals by patient of
`eval.metrics.patient_totals`: nothing grows with the number of images times resamples.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eval.metrics import interval, resampled_totals, scores_of_totals

RESAMPLES = 10_000
PERMUTATIONS = 10_000
DRAWS = "[1, 10000000]"  # the interval of both as settings
FEW_PATIENTS = 20  # with fewer a bootstrap of patients is no interval
NO_CLEAR_CHANGE = "no clear change"
_TESTED = ("micro_f1", "macro_f1", "jaccard", "label_f1")
_SWAPS_AT_ONCE = 2_000_000  # of the permutation test's [permutations, rows] counts: 16 MB


# ---- several models on the same images -----------------------------------------------------------
def shared_resamples(
    totals: Mapping[str, np.ndarray], *, seed: int, resamples: int = RESAMPLES
) -> dict[str, dict[str, np.ndarray]]:
    """Resample all models on the same drawn patients -> {model: `scores_of_totals`, R each}.

    A difference of two models' arrays is a resampled paired difference.

    totals: {model: [P, C]} of `patient_totals`, the same P patients in each. seed: of the draws.
    resamples: R.

    Raises ValueError for different numbers of patients.
    """
    if len({len(rows) for rows in totals.values()}) != 1:
        raise ValueError(
            "models with different patients:"
            f" {', '.join(f'{name} {len(rows)}' for name, rows in totals.items())}"
        )
    side_by_side = np.concatenate(list(totals.values()), axis=1)  # [P, models x C]
    drawn = resampled_totals(side_by_side, seed=seed, resamples=resamples)  # [R, models x C]
    ends = np.cumsum([rows.shape[1] for rows in totals.values()])[:-1]
    parts = np.split(drawn, ends, axis=1)
    return {name: scores_of_totals(part) for name, part in zip(totals, parts, strict=True)}


def permutation_p_values(
    first: np.ndarray, second: np.ndarray, *, seed: int, permutations: int = PERMUTATIONS
) -> dict[str, np.ndarray]:
    """Test by permutation whether two models answer alike -> {score: two-sided p}.

    "label_f1" has K p-values.

    first, second [P, C]: `patient_totals` of the models. seed, permutations: of the draws.

    The null hypothesis is that the models answer alike: each patient's two sets of answers may as
    well be swapped. It is not that they score alike. Two models can have the same macro-F1 and
    reach it in different ways, by more false positives in one and more misses in the other. They do
    not answer alike, so the F1 of single labels is rejected, rightly, while macro-F1 has not
    changed. Whether a score has changed is told by the interval of its difference.

    p = (1 + permutations with a difference as large as the one seen) / (1 + permutations). Patients
    whose two totals differ in the same way are swapped together by one binomial draw, and those
    whose totals are equal not at all: neither changes the test.
    """
    change, counts = np.unique(first - second, axis=0, return_counts=True)  # [U, C], [U]
    counts, change = counts[change.any(axis=1)], change[change.any(axis=1)]
    totals = first.sum(axis=0), second.sum(axis=0)  # [C] each
    seen = _differences(totals[0][None], totals[1][None])
    rng = np.random.default_rng(seed)
    chunk = max(1, _SWAPS_AT_ONCE // max(1, len(change)))
    at_least = {name: np.ones(value.shape[1:]) for name, value in seen.items()}
    for start in range(0, permutations, chunk):
        size = (min(chunk, permutations - start), len(counts))
        swapped = rng.binomial(counts, 0.5, size=size) @ change  # [chunk, C]
        for name, value in _differences(totals[0] - swapped, totals[1] + swapped).items():
            # 1e-12: equal but for rounding
            at_least[name] += (np.abs(value) >= np.abs(seen[name]) - 1e-12).sum(axis=0)
    return {name: count / (1 + permutations) for name, count in at_least.items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of one table for their number, by Holm's step-down method.

    Of tables in which nothing has changed, at most 5 % then show a p below 0.05, however their rows
    depend on each other. The smallest of m is multiplied by m, the next by m - 1, and so on. None
    gets below one before it, or above 1. NaN (not tested) stays NaN and does not count.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    adjusted = [math.nan] * len(p_values)
    tested = sorted((p, position) for position, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, position) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[position] = largest
    return adjusted


def _differences(first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    one, other = scores_of_totals(first), scores_of_totals(second)
    return {name: other[name] - one[name] for name in _TESTED}


@dataclass(frozen=True)
class Change:
    """Hold a score before and after, with 95 % intervals of the two ways to state its change.

    difference: interval of after - before. relative: interval of after / before - 1, None where a
    resample has 0 before. p_value: of the permutation test.
    """

    before: float
    after: float
    difference: tuple[float, float]
    relative: tuple[float, float] | None
    p_value: float

    @property
    def size(self) -> float:
        """Return the difference, positive for a gain."""
        return self.after - self.before


def change(
    before: float,
    after: float,
    resampled_before: np.ndarray,
    resampled_after: np.ndarray,
    p_value: float,
) -> Change:
    """Make a `Change` from two scores and their values in the same resamples.

    before, after: the scores. resampled_before, resampled_after [R]. p_value: of the permutation
    test.
    """
    relative = (
        interval(resampled_after / resampled_before - 1) if (resampled_before > 0).all() else None
    )
    return Change(
        before, after, interval(resampled_after - resampled_before), relative, float(p_value)
    )


def clear_change(interval: Sequence[float], patients: int) -> Literal["gain", "loss", ""]:
    """Tell whether a change is clear and which way, the one rule of all sentences and tables.

    Its 95 % interval leaves 0 out and rests on at least FEW_PATIENTS patients. interval: (low,
    high) of the difference. patients: how many were drawn. Returns "" where it is not clear.
    """
    low, high = interval
    if patients < FEW_PATIENTS:
        return ""
    return "gain" if low > 0 else "loss" if high < 0 else ""


# ---- what is said, whatever the image ------------------------------------------------------------
def said_and_true(
    targets: np.ndarray, predictions: np.ndarray, evaluated: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Count how often each label is said, and how often it is true -> two shares of images [K].

    Shares are among the images that evaluate the label: NaN where there is none.

    targets, predictions, evaluated [N, K] bool.
    """
    images = evaluated.sum(axis=0)  # [K]
    with np.errstate(invalid="ignore"):
        said = (predictions & evaluated).sum(axis=0) / images
        true = (targets & evaluated).sum(axis=0) / images
    return said, true


@dataclass(frozen=True)
class Diversity:
    """Describe how much the answers of one model to one data set differ from each other."""

    answers: int
    distinct_completions: int
    distinct_label_sets: int
    most_frequent_set: frozenset[str]
    most_frequent_share: float
    label_set_entropy: float  # bits
    labels_per_answer: float
    all_labels_share: float  # answers that name every label there is
    contradiction_share: float  # No Finding together with a finding
    length_mean: float  # tokens, NaN where no length is known
    length_median: float
    length_max: float


def diversity(
    completions: Sequence[int],
    label_sets: Sequence[frozenset[str]],
    contradictions: np.ndarray,
    lengths: np.ndarray,
    num_labels: int,
) -> Diversity:
    """Describe how much N answers differ from each other.

    completions [N]: `fingerprint` of each text. label_sets [N]: what each answer predicts.
    contradictions [N] bool: No Finding beside a finding. lengths [N] in tokens, NaN: unknown.
    num_labels: how many labels there are.

    Raises ValueError without any answer.
    """
    if not len(label_sets):
        raise ValueError("no answer to describe")
    known = lengths[~np.isnan(lengths)] if not np.isnan(lengths).all() else np.array([np.nan])
    counts = Counter(label_sets)
    shares = np.array(list(counts.values())) / len(label_sets)
    most_frequent, times = counts.most_common(1)[0]
    return Diversity(
        answers=len(label_sets),
        distinct_completions=len(set(completions)),
        distinct_label_sets=len(counts),
        most_frequent_set=most_frequent,
        most_frequent_share=times / len(label_sets),
        label_set_entropy=float(-(shares * np.log2(shares)).sum()) + 0.0,
        labels_per_answer=sum(map(len, label_sets)) / len(label_sets),
        all_labels_share=sum(len(labels) >= num_labels for labels in label_sets) / len(label_sets),
        contradiction_share=float(np.mean(contradictions)),
        length_mean=float(np.mean(known)),
        length_median=float(np.median(known)),
        length_max=float(np.max(known)),
    )


def fingerprint(text: str) -> int:
    """Give equal texts an equal number, to be kept in place of 25,000 texts."""
    data = text.encode("utf-8", errors="surrogatepass")
    return zlib.crc32(data) << 32 | zlib.adler32(data)


# ---- scores that need no predictions -------------------------------------------------------------
def all_labels_scores(supports: Sequence[int], num_images: int) -> dict[str, float]:
    """Score the answer that names every label of every image, from the supports alone.

    supports [K]: number of positives of each label. num_images: N.

    TP = support, FP = images - support, FN = 0, so a label's F1 is 2 support / (images + support).
    """
    positives = np.asarray(supports, dtype=float)
    return {
        "micro_f1": float(2 * positives.sum() / (num_images * len(positives) + positives.sum())),
        "macro_f1": float((2 * positives / (num_images + positives)).mean()),
    }
