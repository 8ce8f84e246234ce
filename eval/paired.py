"""How sure a score is, whether one model is better than another, and what a model says whatever the
image.

Several models are compared on the same images by the same resamples of patients, so that a
difference has a paired interval. All of it works on the totals by patient of
`eval.metrics.patient_totals`: nothing grows with the number of images times resamples.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics import figures, interval, resampled_totals

RESAMPLES = 10_000
PERMUTATIONS = 10_000
_SWAPS_AT_ONCE = 2_000_000  # of the permutation test's [permutations, rows] counts: 16 MB


# ---- several models on the same images -----------------------------------------------------------
def shared_resamples(
    totals: Mapping[str, np.ndarray], *, seed: int, resamples: int = RESAMPLES
) -> dict[str, dict[str, np.ndarray]]:
    """{model: the `figures` of each resample}, every model on the same drawn patients.

    totals: {model: [P, C]} of `patient_totals`, the same P patients in each. A difference of two
    models' arrays is a resampled paired difference. Raises ValueError for different numbers of
    patients.
    """
    if len({len(rows) for rows in totals.values()}) != 1:
        raise ValueError(
            "models with different patients:"
            f" {', '.join(f'{name} {len(rows)}' for name, rows in totals.items())}"
        )
    # [R, models x C]
    drawn = resampled_totals(
        np.concatenate(list(totals.values()), axis=1), seed=seed, resamples=resamples
    )
    ends = np.cumsum([rows.shape[1] for rows in totals.values()])[:-1]
    return {name: figures(part) for name, part in zip(totals, np.split(drawn, ends, axis=1))}


def permutation_p_values(
    first: np.ndarray, second: np.ndarray, *, seed: int, permutations: int = PERMUTATIONS
) -> dict[str, np.ndarray]:
    """Two-sided p-values of the paired permutation test that first and second [P, C] score alike:
    {figure: p}, "label_f1" [K].

    Under the hypothesis each patient's two sets of answers may as well be swapped. p = (1 +
    permutations with a difference as large as the one seen) / (1 + permutations). Patients whose
    two totals differ in the same way are swapped together by one binomial draw, and those whose
    totals are equal not at all: neither changes the test.
    """
    change, counts = np.unique(first - second, axis=0, return_counts=True)  # [U, C], [U]
    counts, change = counts[change.any(axis=1)], change[change.any(axis=1)]
    totals = first.sum(axis=0), second.sum(axis=0)  # [C] each
    seen = _differences(totals[0][None], totals[1][None])
    rng = np.random.default_rng(seed)
    chunk = max(1, _SWAPS_AT_ONCE // max(1, len(change)))
    at_least = {name: np.ones(value.shape[1:]) for name, value in seen.items()}
    for start in range(0, permutations, chunk):
        # [chunk, C]
        swapped = (
            rng.binomial(counts, 0.5, size=(min(chunk, permutations - start), len(counts))) @ change
        )
        for name, value in _differences(totals[0] - swapped, totals[1] + swapped).items():
            # 1e-12: equal but for rounding
            at_least[name] += (np.abs(value) >= np.abs(seen[name]) - 1e-12).sum(axis=0)
    return {name: count / (1 + permutations) for name, count in at_least.items()}


def _differences(first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    one, other = figures(first), figures(second)
    return {name: other[name] - one[name] for name in one}


@dataclass(frozen=True)
class Change:
    """A figure before and after, with 95 % intervals of the difference and of the relative change,
    and a p-value.
    """

    before: float
    after: float
    difference: tuple[float, float]
    relative: tuple[float, float] | None  # None where a resample has 0 before
    p_value: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the difference leaves 0 out."""
        return self.difference[0] > 0 or self.difference[1] < 0


def change(
    before: float,
    after: float,
    resampled_before: np.ndarray,
    resampled_after: np.ndarray,
    p_value: float,
) -> Change:
    """A `Change` from two point estimates and the two models' values in the same resamples, both
    [R].
    """
    relative = (
        interval(resampled_after / resampled_before - 1) if (resampled_before > 0).all() else None
    )
    return Change(
        before, after, interval(resampled_after - resampled_before), relative, float(p_value)
    )


# ---- what is said, whatever the image ------------------------------------------------------------
def said_and_true(
    targets: np.ndarray, predictions: np.ndarray, evaluated: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(share of images for which each label is predicted, share for which it is true), both [K],
    among those that evaluate it.

    NaN for a label that no image evaluates.
    """
    images = evaluated.sum(axis=0)  # [K]
    with np.errstate(invalid="ignore"):
        return (predictions & evaluated).sum(axis=0) / images, (targets & evaluated).sum(
            axis=0
        ) / images


@dataclass(frozen=True)
class Diversity:
    """How much the answers of one model to one data set differ from each other."""

    answers: int
    distinct_completions: int
    distinct_label_sets: int
    most_frequent_set: frozenset[str]
    most_frequent_share: float
    label_set_entropy: float  # bits
    labels_per_answer: float
    all_labels_share: float  # answers that name every label there is
    contradiction_share: float  # No Finding together with a finding
    length_mean: float  # tokens
    length_median: float
    length_max: int


def diversity(
    completions: Sequence[int],
    label_sets: Sequence[frozenset[str]],
    contradictions: np.ndarray,
    lengths: np.ndarray,
    num_labels: int,
) -> Diversity:
    """`Diversity` of N answers. completions: `fingerprint` of each text. Raises ValueError without
    any answer.
    """
    if not len(label_sets):
        raise ValueError("no answer to describe")
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
        length_mean=float(np.mean(lengths)),
        length_median=float(np.median(lengths)),
        length_max=int(np.max(lengths)),
    )


def fingerprint(text: str) -> int:
    """A number that equal texts share; kept in place of the texts, of which there may be 25,000."""
    data = text.encode("utf-8", errors="surrogatepass")
    return zlib.crc32(data) << 32 | zlib.adler32(data)


# ---- scores that need no predictions -------------------------------------------------------------
def all_labels_scores(supports: Sequence[int], num_images: int) -> dict[str, float]:
    """Micro- and macro-F1 of naming every label for every image, from the number of positives of
    each label alone.

    TP = support, FP = images - support, FN = 0, so a label's F1 is 2 support / (images + support).
    """
    positives = np.asarray(supports, dtype=float)
    return {
        "micro_f1": float(2 * positives.sum() / (num_images * len(positives) + positives.sum())),
        "macro_f1": float((2 * positives / (num_images + positives)).mean()),
    }
