"""Compute scores of multi-label predictions, their intervals, and baselines that need no image.

Everything works on boolean matrices [N, K]: N images, K labels. `evaluated[n, k]` False means that
image n's source cannot express label k. That position is neither a true or false positive nor a
false negative, whatever was predicted. Quotients 0/0 are 0, as scikit-learn's zero_division=0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000  # of all intervals in scores-<set>.json
_WEIGHTS_AT_ONCE = 2_000_000  # of the bootstrap's [resamples, patients] weights: 16 MB


def label_matrix(rows: Sequence[Collection[str]], labels: Sequence[str]) -> np.ndarray:
    """Turn N label collections into a bool matrix [N, K].

    labels [K]: the columns. A label that is not among them is left out.
    """
    columns = {label: k for k, label in enumerate(labels)}
    matrix = np.zeros((len(rows), len(labels)), dtype=bool)
    for n, row in enumerate(rows):
        matrix[n, [columns[label] for label in row if label in columns]] = True
    return matrix


def multilabel_scores(
    targets: np.ndarray,
    predictions: np.ndarray,
    labels: Sequence[str],
    evaluated: np.ndarray | None = None,
) -> dict:
    """Score predictions by micro, macro and per-label precision, recall and F1.

    targets, predictions [N, K] bool: what is true of each image, what is said of it.
    labels [K]: the columns. evaluated [N, K] bool: what the image's source can express, None for
    all.

    Returns {"micro": {"precision", "recall", "f1"}, "macro": {same}, "per_label": {label: {same,
    "support"}}}, plain numbers. Macro is the plain mean over all K labels with zeros kept, as in
    the paper's tables: a label without support counts as 0, so pass only the columns that the data
    set can express. Support is the number of evaluated positives.

    Raises ValueError for matrices that are not boolean (or 0/1), not of one shape, or not as wide
    as `labels`.
    """
    targets, predictions, evaluated = _checked(targets, predictions, evaluated)
    if targets.shape[1] != len(labels) or not len(labels):
        raise ValueError(
            f"{len(labels)} labels given for matrices of shape {targets.shape}; each label needs"
            " one column"
        )
    true_positives = (targets & predictions & evaluated).sum(axis=0)  # [K]
    false_positives = (~targets & predictions & evaluated).sum(axis=0)  # [K]
    false_negatives = (targets & ~predictions & evaluated).sum(axis=0)  # [K]

    by_label = _precision_recall_f1(true_positives, false_positives, false_negatives)  # [K] each
    micro = _precision_recall_f1(true_positives.sum(), false_positives.sum(), false_negatives.sum())
    support = true_positives + false_negatives  # [K]
    return {
        "micro": {name: float(value) for name, value in micro.items()},
        "macro": {name: float(values.mean()) for name, values in by_label.items()},
        "per_label": {
            label: (
                {name: float(values[k]) for name, values in by_label.items()}
                | {"support": int(support[k])}
            )
            for k, label in enumerate(labels)
        },
    }


def jaccard_per_image(
    targets: np.ndarray,
    predictions: np.ndarray,
    evaluated: np.ndarray | None = None,
    num_unknown: np.ndarray | None = None,
) -> np.ndarray:
    """Compute |T & P| / |T | P| of each image among its evaluated labels -> float [N].

    It is 1 where both sets are empty.

    targets, predictions, evaluated [N, K] bool: as in `multilabel_scores`.
    num_unknown [N]: predicted entries that are none of the labels. They enlarge the union, as in
    Eq. 3.
    """
    targets, predictions, evaluated = _checked(targets, predictions, evaluated)
    intersection = (targets & predictions & evaluated).sum(axis=1)  # [N]
    union = ((targets | predictions) & evaluated).sum(axis=1)  # [N]
    if num_unknown is not None:
        union = union + num_unknown
    return np.where(union == 0, 1.0, _ratio(intersection, union))


def failure_policies(
    targets: np.ndarray,
    predictions: np.ndarray,
    parsed: np.ndarray,
    labels: Sequence[str],
    evaluated: np.ndarray | None = None,
) -> dict[str, dict]:
    """Score by `multilabel_scores` under three treatments of answers that could not be read.

    parsed [N] bool: False for such an answer. The others: as in `multilabel_scores`.

    "empty": they predict no label. "dropped": their images are left out, which flatters a model
    that fails on hard ones. "all_wrong": every evaluated label is predicted as the opposite of the
    truth, the worst that the answers could have been.
    """
    targets, predictions, evaluated = _checked(targets, predictions, evaluated)
    parsed = np.asarray(parsed, dtype=bool)
    if parsed.shape != targets.shape[:1]:
        raise ValueError(f"parsed has shape {parsed.shape}, but there are {len(targets)} images")
    read = parsed[:, None]  # [N, 1]
    return {
        "empty": multilabel_scores(targets, predictions & read, labels, evaluated),
        "dropped": multilabel_scores(
            targets[parsed], predictions[parsed], labels, evaluated[parsed]
        ),
        "all_wrong": multilabel_scores(
            targets, np.where(read, predictions, ~targets), labels, evaluated
        ),
    }


def bootstrap_intervals(
    targets: np.ndarray,
    predictions: np.ndarray,
    evaluated: np.ndarray | None,
    patient_ids: Sequence[str],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    jaccard: np.ndarray | None = None,
) -> dict[str, tuple[float, float]]:
    """Bootstrap 95 % percentile intervals by patient -> {metric: (low, high)}.

    The metrics are "micro_f1", "macro_f1" and "jaccard".

    Whole patients are drawn with replacement, as many as there are: images of one patient resemble
    each other, so drawing images would give intervals that are too narrow. A rare label is missing
    from some resamples and then counts as 0 in macro-F1, so that interval lies low, down to missing
    the estimate itself.

    targets, predictions, evaluated [N, K] bool: as in `multilabel_scores`. patient_ids [N].
    seed: of the draws. resamples: how many. jaccard [N]: the value of each image, where it is not
    `jaccard_per_image`'s.

    Raises ValueError without any image, and where the lengths differ.
    """
    totals = patient_totals(targets, predictions, evaluated, patient_ids, jaccard)
    values = scores_of_totals(resampled_totals(totals, seed=seed, resamples=resamples))
    return {metric: interval(values[metric]) for metric in ("micro_f1", "macro_f1", "jaccard")}


def patient_totals(
    targets: np.ndarray,
    predictions: np.ndarray,
    evaluated: np.ndarray | None,
    patient_ids: Sequence[str],
    jaccard: np.ndarray | None = None,
) -> np.ndarray:
    """Add up what `scores_of_totals` needs of each patient, in sorted order -> float [P, 3K + 2].

    The columns are sums over the patient's images: true positives, false positives and false
    negatives by label, the Jaccard values, and the images themselves. Sums of rows are totals too.

    targets, predictions, evaluated [N, K] bool: as in `multilabel_scores`. patient_ids [N].
    jaccard [N]: None for `jaccard_per_image`.
    """
    targets, predictions, evaluated = _checked(targets, predictions, evaluated)
    jaccard = (
        jaccard_per_image(targets, predictions, evaluated)
        if jaccard is None
        else np.asarray(jaccard)
    )
    if not len(targets) or not len(targets) == len(patient_ids) == len(jaccard):
        raise ValueError(
            f"{len(targets)} images, {len(patient_ids)} patient ids, {len(jaccard)} Jaccard values:"
            " need equal numbers, at least one"
        )
    patients, patient_of_image = np.unique(np.asarray(patient_ids), return_inverse=True)  # [P], [N]
    columns = np.concatenate(
        [  # [N, 3K + 2]
            targets & predictions & evaluated,
            ~targets & predictions & evaluated,
            targets & ~predictions & evaluated,
            jaccard[:, None],
            np.ones((len(targets), 1)),
        ],
        axis=1,
    )
    totals = np.zeros((len(patients), columns.shape[1]))
    np.add.at(totals, patient_of_image, columns)
    return totals


def resampled_totals(totals: np.ndarray, *, seed: int, resamples: int) -> np.ndarray:
    """Draw patients with replacement and add up their totals -> float [resamples, C].

    totals [P, C]: a row a patient. Each resample adds up P rows.

    Equal rows are interchangeable: how often each distinct one is drawn is one draw of
    `rng.multinomial` over the distinct rows in sorted order, which is far shorter than the P rows
    where most patients have one image.
    """
    rows, counts = np.unique(totals, axis=0, return_counts=True)  # [U, C], [U]
    rng = np.random.default_rng(seed)
    chunk = max(1, _WEIGHTS_AT_ONCE // len(rows))  # changes the memory, not the draws
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate(
        [rng.multinomial(len(totals), counts / len(totals), size=size) @ rows for size in sizes]
    )


def drawn_patients(num_patients: int, *, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Draw patients with replacement, for statistics that no single table of totals holds.

    num_patients: P, of whom each resample draws P. seed, resamples: of the draws.

    Yields how often each patient was drawn, int64 [r, P], until `resamples` rows have come.
    Every call with the same numbers yields the same, in pieces of bounded memory.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, _WEIGHTS_AT_ONCE // num_patients)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, num_patients, size=(size, num_patients))
        drawn += num_patients * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_patients)
        yield counts.reshape(size, num_patients)


def scores_of_totals(totals: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the scores of R totals, by the names of the metrics.

    "micro_f1", "macro_f1" and "jaccard" are [R], "label_precision", "label_recall" and "label_f1"
    are [R, K].

    totals [R, 3K + 2]: as `patient_totals` lays them out.
    """
    num_labels = (totals.shape[1] - 2) // 3
    positions = [slice(i * num_labels, (i + 1) * num_labels) for i in range(3)]
    counts = [totals[:, columns] for columns in positions]  # TP, FP, FN, each [R, K]
    by_label = _precision_recall_f1(*counts)  # each [R, K]
    micro = _precision_recall_f1(*(count.sum(axis=1) for count in counts))["f1"]  # [R]
    return {
        "micro_f1": micro,
        "macro_f1": by_label["f1"].mean(axis=1),
        "jaccard": totals[:, -2] / totals[:, -1],
        **{f"label_{name}": value for name, value in by_label.items()},
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """Compute the 95 % percentile interval of R resampled values, NaN left out.

    A resample gives NaN where it holds nothing to score. Some other one must hold something.
    """
    low, high = np.percentile(values[~np.isnan(values)], [2.5, 97.5])
    return float(low), float(high)


def known_interval(values: np.ndarray) -> list[float] | None:
    """Compute the interval for a JSON file, None where all values are NaN."""
    return None if np.isnan(values).all() else list(interval(values))


# ---- baselines -----------------------------------------------------------------------------------
# Predictions [num_images, K] made without looking at an image. `imitated` [M, K] holds the label
# sets to imitate, those of the training data. Where there is none, pass the targets themselves and
# say so beside the score: it has then seen the answers.


def predict_most_frequent(imitated: np.ndarray, num_images: int) -> np.ndarray:
    """Say the most frequent label set of `imitated` [M, K] of every image -> bool [num_images, K].

    Of equally frequent sets the first to occur is taken. The empty set counts like any other.
    """
    rows, first, counts = np.unique(
        _imitated(imitated), axis=0, return_index=True, return_counts=True
    )
    best = min(range(len(rows)), key=lambda i: (-counts[i], first[i]))
    return np.tile(rows[best], (num_images, 1))


def predict_all_labels(num_images: int, num_labels: int) -> np.ndarray:
    """Say every label of every image -> bool [num_images, num_labels]."""
    return np.ones((num_images, num_labels), dtype=bool)


def predict_by_prevalence(
    imitated: np.ndarray, num_images: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw each label on its own with its share in `imitated` [M, K] -> bool [num_images, K]."""
    prevalence = _imitated(imitated).mean(axis=0)  # [K]
    return rng.random((num_images, len(prevalence))) < prevalence


def _precision_recall_f1(
    true_positives: np.ndarray, false_positives: np.ndarray, false_negatives: np.ndarray
) -> dict[str, np.ndarray]:
    return {
        "precision": _ratio(true_positives, true_positives + false_positives),
        "recall": _ratio(true_positives, true_positives + false_negatives),
        "f1": _ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives),
    }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    # counts: where the denominator is 0, so is the numerator
    return numerator / np.maximum(denominator, 1)


def _checked(
    targets: ArrayLike, predictions: ArrayLike, evaluated: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    targets = _boolean("targets", targets)
    predictions = _boolean("predictions", predictions)
    evaluated = np.ones_like(targets) if evaluated is None else _boolean("evaluated", evaluated)
    if not targets.shape == predictions.shape == evaluated.shape:
        shapes = (
            f"targets {targets.shape}, predictions {predictions.shape} and evaluated"
            f" {evaluated.shape}"
        )
        raise ValueError(f"{shapes} differ in shape")
    return targets, predictions, evaluated


def _boolean(name: str, values: ArrayLike) -> np.ndarray:
    matrix = np.asarray(values)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be a matrix [N, K], got shape {matrix.shape}")
    # NaN or CheXpert's -1 would silently become True
    if matrix.dtype != bool and not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"{name} must hold only 0 and 1 or booleans")
    return matrix.astype(bool)


def _imitated(label_sets: ArrayLike) -> np.ndarray:
    imitated = _boolean("imitated", label_sets)
    if not len(imitated):
        raise ValueError("imitated holds no label set; pass the training data's labels")
    return imitated
