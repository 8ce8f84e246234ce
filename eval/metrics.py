"""Scores of multi-label predictions, the treatments of failed answers, and the baselines that need
no image.

Everything works on boolean matrices [N, K]: N images, K labels. `evaluated[n, k]` False means that
image n's source cannot express label k; that position is neither a true or false positive nor a
false negative, whatever was predicted. Quotients 0/0 are 0, as scikit-learn's zero_division=0.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

_WEIGHTS_AT_ONCE = 2_000_000  # of the bootstrap's [resamples, patients] weights: 16 MB


def label_matrix(rows: Sequence[Collection[str]], labels: Sequence[str]) -> np.ndarray:
    """N label collections -> bool [N, K]. A label that is not among `labels` has no column and is
    left out.
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
    """Micro, macro and per-label precision, recall and F1 of bool [N, K] matrices.

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

    # three times [K]
    by_label = _precision_recall_f1(true_positives, false_positives, false_negatives)
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
    """|T & P| / |T | P| among the evaluated labels, float [N]; 1 where both are empty.

    num_unknown [N]: predicted entries that are none of the labels. They enlarge the union, as in
    Eq. 3.
    """
    targets, predictions, evaluated = _checked(targets, predictions, evaluated)
    intersection = (targets & predictions & evaluated).sum(axis=1)  # [N]
    # [N]
    union = ((targets | predictions) & evaluated).sum(axis=1) + (
        0 if num_unknown is None else num_unknown
    )
    return np.where(union == 0, 1.0, _ratio(intersection, union))


def failure_policies(
    targets: np.ndarray,
    predictions: np.ndarray,
    parsed: np.ndarray,
    labels: Sequence[str],
    evaluated: np.ndarray | None = None,
) -> dict[str, dict]:
    """`multilabel_scores` under the three treatments of answers that could not be read (`parsed[n]`
    False).

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
    resamples: int = 1000,
    jaccard: np.ndarray | None = None,
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of "micro_f1", "macro_f1" and "jaccard": {metric: (low, high)}.

    Whole patients are drawn with replacement, as many as there are: images of one patient resemble
    each other, so drawing images would give intervals that are too narrow. jaccard [N]: the value
    of each image, where it is not `jaccard_per_image`'s. A rare label is missing from some
    resamples and then counts as 0 in macro-F1, so that interval lies low, down to missing the
    estimate itself.

    Raises ValueError without any image, and where the lengths differ.
    """
    totals = patient_totals(targets, predictions, evaluated, patient_ids, jaccard)
    values = figures(resampled_totals(totals, seed=seed, resamples=resamples))
    return {metric: interval(values[metric]) for metric in ("micro_f1", "macro_f1", "jaccard")}


def patient_totals(
    targets: np.ndarray,
    predictions: np.ndarray,
    evaluated: np.ndarray | None,
    patient_ids: Sequence[str],
    jaccard: np.ndarray | None = None,
) -> np.ndarray:
    """What `figures` needs of each patient, in sorted order: float [P, 3K + 2], sums over the
    patient's images of true positives, false positives and false negatives by label, of the Jaccard
    values, and of the images themselves. Sums of rows are totals too.
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
    """Sums of the rows of `totals` [P, C] over P rows drawn with replacement, float [resamples, C].

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


def figures(totals: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of R totals [R, 3K + 2] as `patient_totals` lays them out: "micro_f1",
    "macro_f1", "jaccard" [R], "label_f1" [R, K].
    """
    num_labels = (totals.shape[1] - 2) // 3
    # TP, FP, FN, each [R, K]
    counts = [totals[:, i * num_labels : (i + 1) * num_labels] for i in range(3)]
    by_label = _precision_recall_f1(*counts)["f1"]  # [R, K]
    micro = _precision_recall_f1(*(count.sum(axis=1) for count in counts))["f1"]  # [R]
    return {
        "micro_f1": micro,
        "macro_f1": by_label.mean(axis=1),
        "jaccard": totals[:, -2] / totals[:, -1],
        "label_f1": by_label,
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of R resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


# Baselines: predictions [num_images, K] made without looking at an image. `reference` [M, K] holds
# label sets to imitate, those of the training data. Where there is none, pass the targets
# themselves and say so beside the figure: it has then seen the answers.


def predict_most_frequent(reference: np.ndarray, num_images: int) -> np.ndarray:
    """The label set that is most frequent in `reference`, for every image; of equally frequent
    ones, the first to occur.

    The empty set counts like any other.
    """
    rows, first, counts = np.unique(
        _reference(reference), axis=0, return_index=True, return_counts=True
    )
    best = min(range(len(rows)), key=lambda i: (-counts[i], first[i]))
    return np.tile(rows[best], (num_images, 1))


def predict_all_labels(num_images: int, num_labels: int) -> np.ndarray:
    """Every label for every image."""
    return np.ones((num_images, num_labels), dtype=bool)


def predict_by_prevalence(
    reference: np.ndarray, num_images: int, rng: np.random.Generator
) -> np.ndarray:
    """Each label drawn on its own with the probability that it has in `reference`."""
    prevalence = _reference(reference).mean(axis=0)  # [K]
    return rng.random((num_images, len(prevalence))) < prevalence


def _precision_recall_f1(true_positives, false_positives, false_negatives) -> dict[str, np.ndarray]:
    return {
        "precision": _ratio(true_positives, true_positives + false_positives),
        "recall": _ratio(true_positives, true_positives + false_negatives),
        "f1": _ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives),
    }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    # counts: where the denominator is 0, so is the numerator
    return numerator / np.maximum(denominator, 1)


def _checked(targets, predictions, evaluated) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def _boolean(name: str, matrix) -> np.ndarray:
    matrix = np.asarray(matrix)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be a matrix [N, K], got shape {matrix.shape}")
    # NaN or CheXpert's -1 would silently become True
    if matrix.dtype != bool and not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"{name} must hold only 0 and 1 or booleans")
    return matrix.astype(bool)


def _reference(reference) -> np.ndarray:
    reference = _boolean("reference", reference)
    if not len(reference):
        raise ValueError("reference holds no label set; pass the training data's labels")
    return reference
