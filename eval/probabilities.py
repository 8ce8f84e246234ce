"""Judge vote shares as probabilities of labels: ranking, calibration, operating points.

F1 at a fixed decision mixes what a model sees with how readily it says it. The share of samples
that name a label ranks the images whatever the decision: AUROC and AUPRC say whether a finding is
seen, the calibration error whether the share can be taken at its word, and thresholds what F1
another readiness would give.

With k samples a share has k + 1 values, so a label is a table of positives and negatives by value.
All scores and resamples are made from such tables: nothing grows with images times resamples.

Shapes: N images, P patients, K labels, V distinct shares, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.files import DataError
from data.predictions import Prediction
from eval.end_table import aligned, clipped, with_interval
from eval.metrics import (
    RESAMPLES,
    drawn_patients,
    interval,
    known_interval,
    label_matrix,
    multilabel_scores,
    patient_totals,
    scores_of_totals,
)
from eval.scores import evaluated_columns

BINS = 10
VOTE_THRESHOLD = 0.5  # of `eval.votes.vote`: at least half of the samples
_ROUNDING = 1e-9  # shares are quotients of small integers


# ---- what is judged ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shares:
    """Hold the vote shares of N images and their truth, the columns K labels.

    shares [N, K] float, 0 to 1. targets, evaluated [N, K] bool. patients [N].
    """

    labels: tuple[str, ...]
    shares: np.ndarray
    targets: np.ndarray
    evaluated: np.ndarray
    patients: list[str]

    @classmethod
    def of(cls, votes: Sequence[Prediction], *, source: str = "predictions") -> Shares:
        """Take the shares of votes, as `eval.votes.vote` makes them.

        source: name of the file, for the problem. Raises DataError where a row has none.
        """
        without = [vote.id for vote in votes if not has_shares(vote)]
        if without:
            raise DataError(
                [
                    f"{source}, id {without[0]!r}: has no vote_shares; evaluate with"
                    " --num_generations above 1, or give predictions that did"
                ]
            )
        labels = evaluated_columns(votes)
        shares = [[vote.extra["vote_shares"].get(label, 0.0) for label in labels] for vote in votes]
        return cls(
            tuple(labels),
            np.array(shares),
            label_matrix([vote.labels for vote in votes], labels),
            label_matrix([vote.evaluated_labels for vote in votes], labels),
            [vote.patient_id for vote in votes],
        )


def has_shares(prediction: Prediction) -> bool:
    """Tell whether a prediction is a vote and kept its shares."""
    return isinstance(prediction.extra.get("vote_shares"), dict)


# ---- ranking -------------------------------------------------------------------------------------
def auroc(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Compute the area under the ROC curve -> [...], NaN without both classes.

    It is the chance that a positive has a higher share than a negative, ties counting half, as in
    sklearn.metrics.roc_auc_score.

    positives, negatives [..., V]: how many there are of each share, in rising order.
    """
    below = negatives.cumsum(axis=-1) - negatives / 2
    pairs = positives.sum(axis=-1) * negatives.sum(axis=-1)
    return _quotient((positives * below).sum(axis=-1), pairs)


def average_precision(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Compute the average precision, the area under the PR curve by steps -> [...].

    It is the mean over the positives of the precision at their share, all images of the same share
    together, as in sklearn.metrics.average_precision_score. NaN without both classes.

    positives, negatives [..., V]: how many there are of each share, in rising order.
    """
    found = positives[..., ::-1].cumsum(axis=-1)[..., ::-1]  # at this share or above
    said = found + negatives[..., ::-1].cumsum(axis=-1)[..., ::-1]
    precision = found / np.maximum(said, 1)
    both = (positives.sum(axis=-1) > 0) & (negatives.sum(axis=-1) > 0)
    total = np.where(both, positives.sum(axis=-1), 0)
    return _quotient((positives * precision).sum(axis=-1), total)


def _quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)


def _tables(shares: Shares, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Count a label's positives and negatives by share -> (values [V], counts [P, 2V]).

    k: column of the label. Patients are in sorted order, positives come before negatives.
    """
    images = shares.evaluated[:, k]
    values, rank = np.unique(shares.shares[images, k], return_inverse=True)
    patients, of_image = np.unique(shares.patients, return_inverse=True)
    cell = rank + len(values) * ~shares.targets[images, k]
    width = 2 * len(values)
    counts = np.bincount(of_image[images] * width + cell, minlength=len(patients) * width)
    return values, counts.reshape(len(patients), width)


# ---- calibration ---------------------------------------------------------------------------------
def reliability(shares: np.ndarray, targets: np.ndarray) -> list[dict[str, float]]:
    """Compare shares with how often they are right, in BINS bins of equal width.

    shares [M] float, targets [M] bool: one entry an image and label.

    Returns the bins with any entry: "low" and "high" (a share of exactly `high` is in the bin, 0
    in the first, as in sklearn.calibration.calibration_curve), "n", "confidence" (mean share) and
    "observed" (share of the true ones).
    """
    place = np.maximum(np.ceil(shares * BINS - _ROUNDING).astype(int) - 1, 0)  # [M]
    number = np.bincount(place)
    said, true = np.bincount(place, weights=shares), np.bincount(place, weights=targets)
    return [
        {
            "low": b / BINS,
            "high": (b + 1) / BINS,
            "n": int(number[b]),
            "confidence": float(said[b] / number[b]),
            "observed": float(true[b] / number[b]),
        }
        for b in np.flatnonzero(number).tolist()
    ]


def calibration_error(bins: Sequence[Mapping[str, float]]) -> float:
    """Average |confidence - observed| over the entries of `reliability`'s bins (ECE).

    Source: Guo et al., 2017, eq. 5 (arXiv 1706.04599), for each label by itself.
    """
    total = sum(one["n"] for one in bins)
    return sum(one["n"] * abs(one["confidence"] - one["observed"]) for one in bins) / total


# ---- all of it -----------------------------------------------------------------------------------
def probability_scores(
    votes: Sequence[Prediction],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    source: str = "predictions",
) -> dict[str, Any]:
    """Judge the vote shares of a data set -> "probabilities" of scores-<set>.json.

    votes: predictions with vote_shares. seed, resamples: of the intervals. source: name of the
    file, for the problem.

    A label counts on the images that evaluate it. One without both positives and negatives has no
    AUROC: it is in "left_out" and in no mean. Intervals are 95 % by patient. A resample in which a
    label lacks a class leaves this label out, so the interval of a very rare label is that of the
    resamples that hold it.

    "per_label" has for each label AUROC and AUPRC with intervals, prevalence, calibration error and
    reliability bins. "ece" and "reliability" pool all labels. "thresholds" are `best_thresholds` on
    this very data set: carry them to another one.

    Raises DataError where a row has no shares.
    """
    judged = Shares.of(votes, source=source)
    tables = [_tables(judged, k) for k in range(len(judged.labels))]
    seen = [_ranking(counts.sum(axis=0, keepdims=True)) for _, counts in tables]
    # counts stay far below 2^24, so they are exact in fp32
    small = [counts.astype(np.float32) for _, counts in tables]
    drawn: list[list[dict[str, np.ndarray]]] = []  # by piece of the resamples and label
    for weights in drawn_patients(len(set(judged.patients)), seed=seed, resamples=resamples):
        weights = weights.astype(np.float32)
        drawn.append([_ranking((weights @ counts).astype(float)) for counts in small])
    per_label: dict[str, Any] = {}
    resampled: dict[str, list[np.ndarray]] = {"auroc": [], "auprc": []}
    for k, label in enumerate(judged.labels):
        images = judged.evaluated[:, k]
        bins = reliability(judged.shares[images, k], judged.targets[images, k])
        row: dict[str, Any] = {}
        for metric, values in resampled.items():
            point = float(seen[k][metric][0])
            row[metric] = None if np.isnan(point) else point
            all_draws = np.concatenate([piece[k][metric] for piece in drawn])  # [R]
            row[f"{metric}_interval"] = None if np.isnan(point) else known_interval(all_draws)
            if not np.isnan(point):
                values.append(all_draws)
        per_label[label] = row | {
            "prevalence": float(judged.targets[images, k].mean()),
            "n": int(images.sum()),
            "ece": calibration_error(bins),
            "reliability": bins,
        }
    pooled = reliability(judged.shares[judged.evaluated], judged.targets[judged.evaluated])
    ranked = [label for label, row in per_label.items() if row["auroc"] is not None]
    result: dict[str, Any] = {
        "num_generations": votes[0].extra.get("num_generations"),
        "per_label": per_label,
        "left_out": [label for label in judged.labels if label not in ranked],
    }
    for metric, values in resampled.items():
        points = [per_label[label][metric] for label in ranked]
        result[f"macro_{metric}"] = float(np.mean(points)) if points else None
        result[f"macro_{metric}_interval"] = (
            known_interval(_mean_of_known(np.array(values))) if points else None
        )
    return result | {
        "ece": calibration_error(pooled),
        "reliability": pooled,
        "thresholds": best_thresholds(judged),
    }


def _ranking(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Rank by tables [R, 2V] of positives beside negatives -> {"auroc", "auprc"} [R] each."""
    positives, negatives = np.split(counts, 2, axis=1)
    return {
        "auroc": auroc(positives, negatives),
        "auprc": average_precision(positives, negatives),
    }


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Average labels [K, R] over those that a resample has both classes of -> [R]."""
    known = ~np.isnan(values)
    return _quotient(np.where(known, values, 0).sum(axis=0), known.sum(axis=0))


# ---- operating points ----------------------------------------------------------------------------
def best_thresholds(judged: Shares) -> dict[str, float]:
    """Choose for each label the share from which saying it gives the highest F1.

    Among thresholds of equal F1 the one nearest to the vote's own (one half) is taken, and of two
    equally near the higher. A label without positives keeps the vote's.
    """
    thresholds = {}
    for k, label in enumerate(judged.labels):
        values, counts = _tables(judged, k)
        positives, negatives = np.split(counts.sum(axis=0), 2)
        found = positives[::-1].cumsum()[::-1]  # at this share or above
        said = found + negatives[::-1].cumsum()[::-1]
        f1 = 2 * found / np.maximum(said + positives.sum(), 1)
        # nothing is said of an image without any sample that says it
        candidates = [
            (f1[v], -abs(value - VOTE_THRESHOLD), value)
            for v, value in enumerate(values.tolist())
            if value > 0
        ]
        best = max(candidates, default=(0.0, 0.0, VOTE_THRESHOLD))
        thresholds[label] = best[2] if best[0] > 0 else VOTE_THRESHOLD
    return thresholds


def operating_points(
    votes: Sequence[Prediction],
    chosen_on: Sequence[Prediction],
    name: str,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Carry thresholds from one data set to another -> "operating_points" of its scores.

    votes: predictions that are judged. chosen_on: those that choose the thresholds, `name` their
    data set. seed, resamples: of the intervals.

    "before" is F1 of the vote, "after" F1 with the thresholds, "difference" the 95 % interval of
    after - before by patient. "shared_patients" counts the judged patients that chose the
    thresholds too: above 0, "after" is too high. A label that the other data set does not evaluate
    keeps the vote's threshold.
    """
    judged = Shares.of(votes)
    chosen = best_thresholds(Shares.of(chosen_on, source=name))
    thresholds = np.array([chosen.get(label, VOTE_THRESHOLD) for label in judged.labels])
    said = {
        "before": judged.shares >= VOTE_THRESHOLD,
        "after": judged.shares >= thresholds,
    }  # [N, K] each
    scores = {
        key: multilabel_scores(judged.targets, rows, judged.labels, judged.evaluated)
        for key, rows in said.items()
    }
    totals = [
        patient_totals(judged.targets, rows, judged.evaluated, judged.patients).astype(np.float32)
        for rows in said.values()
    ]
    drawn = [
        [scores_of_totals((weights.astype(np.float32) @ rows).astype(float)) for rows in totals]
        for weights in drawn_patients(len(set(judged.patients)), seed=seed, resamples=resamples)
    ]
    difference = {
        metric: list(
            interval(np.concatenate([after[metric] - before[metric] for before, after in drawn]))
        )
        for metric in ("micro_f1", "macro_f1")
    }
    patients = {(vote.dataset, vote.patient_id) for vote in votes}
    shared = patients & {(vote.dataset, vote.patient_id) for vote in chosen_on}
    return {
        "from": name,
        "shared_patients": len(shared),
        "num_patients": len(patients),
        "per_label": {
            label: {"threshold": float(thresholds[k])}
            | {key: scores[key]["per_label"][label]["f1"] for key in said}
            for k, label in enumerate(judged.labels)
        },
        "not_chosen": [label for label in judged.labels if label not in chosen],
        **{
            key: {"micro_f1": one["micro"]["f1"], "macro_f1": one["macro"]["f1"]}
            for key, one in scores.items()
        },
        "difference": difference,
    }


# ---- text tables ---------------------------------------------------------------------------------
def format_probabilities(results: Mapping[str, dict[str, Any]]) -> str:
    """Lay out ranking, calibration and operating points, "" where there are no shares.

    results: {data set: scores}. At most 100 columns wide.
    """
    lines: list[str] = []
    for name, scores in results.items():
        if "probabilities" in scores:
            lines += ["", *_ranking_lines(name, scores["probabilities"])]
            if "operating_points" in scores["probabilities"]:
                lines += ["", *_operating_lines(name, scores["probabilities"]["operating_points"])]
    return "\n".join(lines[1:])


def _ranking_lines(name: str, scores: Mapping[str, Any]) -> list[str]:
    ranked = [label for label in scores["per_label"] if label not in scores["left_out"]]
    if not ranked:
        return [f"{clipped(name)}: no label has both positives and negatives, so there is no AUROC"]
    table: list[tuple[str, ...]] = [(clipped(name), "AUROC", "AUPRC", "prevalence", "ECE")]
    for label in ranked:
        row = scores["per_label"][label]
        cells = [with_interval(row[m], row[f"{m}_interval"]) for m in ("auroc", "auprc")]
        table.append((label, *cells, f"{row['prevalence']:.3f}", f"{row['ece']:.3f}"))
    means = [
        with_interval(scores[f"macro_{m}"], scores[f"macro_{m}_interval"])
        for m in ("auroc", "auprc")
    ]
    table.append((f"mean of {len(ranked)}, all in one", *means, "", f"{scores['ece']:.3f}"))
    lines = aligned(table, "<<<>>")
    lines.append(
        "vote shares as probabilities (95 % by patient); guessing has AUROC 0.5, AUPRC = prevalence"
    )
    if scores["left_out"]:
        lines.append(f"without both positives and negatives: {', '.join(scores['left_out'])}")
    return lines


def _operating_lines(name: str, points: Mapping[str, Any]) -> list[str]:
    table: list[tuple[str, ...]] = [(clipped(name), "threshold", "F1 of the vote", "F1 with it")]
    for label, row in points["per_label"].items():
        shown = (f"{row[key]:.3f}" for key in ("threshold", "before", "after"))
        table.append((label, *shown))
    for metric, title in (("micro_f1", "micro-F1"), ("macro_f1", "macro-F1")):
        low, high = points["difference"][metric]
        after = f"{points['after'][metric]:.3f} ({low:+.3f}..{high:+.3f})"
        table.append((title, "", f"{points['before'][metric]:.3f}", after))
    lines = aligned(table, "<>>>")
    lines.append(
        f"thresholds chosen on {clipped(points['from'])} for the highest F1; in brackets: the"
        " change, 95 % by patient"
    )
    if points["shared_patients"]:
        lines.append(
            f"{points['shared_patients']} of {points['num_patients']} patients chose the thresholds"
            " as well: F1 with them is too high"
        )
    if points["not_chosen"]:
        lines.append(f"not evaluated there, so left at 0.5: {', '.join(points['not_chosen'])}")
    return lines
