"""Score predictions, and print the scores as text tables.

`score` makes what scores-<name>.json holds in any case (eval/record.py has all of it). The
arithmetic is in eval/metrics.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.answers import Answer
from data.entries import UNKNOWN_KINDS, unknown_kind
from data.examples import Example
from data.files import DataError
from data.label_sets import label_lines
from data.labels import CHEXPERT, LabelSet, silenced_labels
from data.predictions import Prediction
from engine.settings import EVALUATED_METRICS
from eval.end_table import aligned, clipped, end_table, row_of
from eval.metrics import (
    bootstrap_intervals,
    failure_policies,
    jaccard_per_image,
    label_matrix,
    multilabel_scores,
    predict_all_labels,
    predict_by_prevalence,
    predict_most_frequent,
)

# the random baseline is a mean over draws: a single one is noisy on a few hundred images
PREVALENCE_DRAWS = 20


# ---- score ---------------------------------------------------------------------------------------
class AnswerMatrices(NamedTuple):
    """Hold N answers and their truth as arrays, the columns K labels.

    targets, predicted, evaluated [N, K] bool: what is true, what is said, what the image's source
    can express. jaccard [N]: Eq. 3 without its length penalty, 0 for an answer that is not valid.
    """

    targets: np.ndarray
    predicted: np.ndarray
    evaluated: np.ndarray
    jaccard: np.ndarray


def evaluated_columns(predictions: Sequence[Prediction]) -> list[str]:
    """List the labels that any row evaluates, in the order of their label set.

    Raises DataError where there is no prediction, or none evaluates any label.
    """
    columns = [
        label
        for label in label_set_of(predictions).names
        if any(label in prediction.evaluated_labels for prediction in predictions)
    ]
    if not columns:
        raise DataError(
            [
                f"nothing to score: {len(predictions)} rows, and evaluated_labels is empty in all"
                " of them"
            ]
        )
    return columns


def label_set_of(predictions: Sequence[Prediction]) -> LabelSet:
    """Return the labels that there are for some predictions, all of which have the same."""
    return predictions[0].label_set if predictions else CHEXPERT


def answer_matrices(predictions: Sequence[Prediction], columns: Sequence[str]) -> AnswerMatrices:
    """Turn predictions into the arrays that scores are made of. A failed answer has no labels.

    columns [K]: the labels, as `evaluated_columns` lists them.
    """
    answers = [prediction.answer for prediction in predictions]
    targets = label_matrix([prediction.labels for prediction in predictions], columns)
    predicted = label_matrix([answer.labels for answer in answers], columns)
    evaluated = label_matrix([prediction.evaluated_labels for prediction in predictions], columns)
    valid = np.array([answer.valid for answer in answers])  # [N]
    num_unknown = np.array([len(answer.unknown) for answer in answers])  # [N]
    jaccard = np.where(valid, jaccard_per_image(targets, predicted, evaluated, num_unknown), 0.0)
    return AnswerMatrices(targets, predicted, evaluated, jaccard)


def score(
    predictions: Sequence[Prediction],
    *,
    baseline_examples: Sequence[Example] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Score predictions against their truth -> everything that scores-<name>.json holds.

    The labels (columns) are all that any row evaluates. Each image counts in its own evaluated
    labels only. At the top level stands the dict of `multilabel_scores`, with a failed answer
    counted as empty. "failure_policies" has F1 under the other two treatments too.

    "jaccard" is the mean of Eq. 3 without its length penalty: 0 for an answer that is not valid,
    and entries that are no label enlarge the union. "fail_rate" is the share of answers whose
    labels could not be read, "invalid_rate" the share not strictly in the format. "unknown_rate",
    "no_label_rate" and "unknown_kinds" are those of `unknown_entries`. "silenced_labels" lists the
    labels that are hardly ever said although they are true, by the rule of
    `data.labels.silenced_labels`. "intervals" are 95 %, by patient.

    baseline_examples: the training examples, whose label sets the baselines imitate. Without them
    the baselines imitate this data set, so they have seen the answers.
    seed: of the intervals and the random baseline.

    Raises DataError where there is no prediction, or none evaluates any label.
    """
    columns = evaluated_columns(predictions)
    label_set = label_set_of(predictions)
    targets, predicted, evaluated, jaccard = answer_matrices(predictions, columns)
    answers = [prediction.answer for prediction in predictions]
    parsed = np.array([answer.parsed for answer in answers])  # [N]
    valid = np.array([answer.valid for answer in answers])  # [N]

    policies = failure_policies(targets, predicted, parsed, columns, evaluated)
    patients = [prediction.patient_id for prediction in predictions]
    intervals = bootstrap_intervals(
        targets, predicted, evaluated, patients, jaccard=jaccard, seed=seed
    )
    problems = Counter(answer.problem for answer in answers if answer.problem)
    return policies["empty"] | {
        "jaccard": float(jaccard.mean()),
        "fail_rate": float((~parsed).mean()),
        "invalid_rate": float((~valid).mean()),
        **unknown_entries(answers, label_set),
        "problems": dict(problems.most_common()),
        "silenced_labels": silenced_labels(
            _counts(predicted & evaluated, columns), _counts(targets & evaluated, columns), columns
        ),
        "n": len(predictions),
        "num_patients": len(set(patients)),
        "labels": columns,
        **({} if label_set == CHEXPERT else {"label_set": label_lines(label_set)}),
        "failure_policies": {name: _f1(scores) for name, scores in policies.items()},
        "intervals": {name: list(bounds) for name, bounds in intervals.items()},
        "baselines": baselines(targets, evaluated, columns, baseline_examples, seed),
        "completion_length": _lengths(predictions),
    }


def evaluated_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """Pick what a training run logs out of a data set's scores: numbers, by their names.

    These are EVALUATED_METRICS, of silenced labels their number, and the means of rewards where a
    run has added them.
    """
    flat = dict(scores) | {
        "macro_f1": scores["macro"]["f1"],
        "micro_f1": scores["micro"]["f1"],
        "completion_length": scores["completion_length"]["mean"],
        "silenced_labels": len(scores["silenced_labels"]),
    }
    return {
        name: value
        for name, value in flat.items()
        if name in EVALUATED_METRICS or name == "reward" or name.startswith("rewards/")
    }


def known_lengths(predictions: Sequence[Prediction]) -> list[int]:
    """List the lengths of the completions that somebody counted, in tokens."""
    lengths = (prediction.completion_length for prediction in predictions)
    return [length for length in lengths if length is not None]


def _lengths(predictions: Sequence[Prediction]) -> dict[str, float | None]:
    """Describe the lengths of completions in tokens, and count those that nobody counted."""
    known = known_lengths(predictions)
    found = {"mean": float(np.mean(known)) if known else None, "max": max(known, default=None)}
    unknown = len(predictions) - len(known)
    return found | ({"unknown": unknown} if unknown else {})


def unknown_entries(answers: Sequence[Answer], label_set: LabelSet = CHEXPERT) -> dict[str, Any]:
    """Count the entries that are no label, so that labels nobody can read do not pass unnoticed.

    "unknown_rate" is the share of answers that have one, "no_label_rate" the share that have
    nothing else, which is a part of the fail rate. "unknown_kinds" counts the entries by what they
    say, {kind of `data.entries.UNKNOWN_KINDS`: entries}.
    """
    kinds = Counter(
        unknown_kind(entry, label_set) for answer in answers for entry in answer.unknown
    )
    return {
        "unknown_rate": float(np.mean([bool(answer.unknown) for answer in answers])),
        "no_label_rate": float(np.mean([answer.problem == "no_label" for answer in answers])),
        "unknown_kinds": {kind: kinds[kind] for kind in UNKNOWN_KINDS},
    }


def baselines(
    targets: np.ndarray,
    evaluated: np.ndarray,
    columns: Sequence[str],
    baseline_examples: Sequence[Example] | None,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Score answers that are made without looking at an image -> {baseline: its scores}.

    targets, evaluated [N, K] bool: truth of the data set, and which of it is known.
    columns [K]: labels. baseline_examples: whose label sets are imitated, None for the data set's.

    The scores are "micro_f1", "macro_f1" and "jaccard". "reference" beside them says which label
    sets were imitated: "train_file", "this data set" or None.
    """
    imitated, source = targets & evaluated, "this data set"
    if baseline_examples is not None:
        imitated = label_matrix([example.target.labels for example in baseline_examples], columns)
        source = "train_file"
    rng = np.random.default_rng(seed)
    num_images, num_labels = targets.shape

    def scores_of(predictions: np.ndarray) -> dict[str, float]:
        jaccard = float(jaccard_per_image(targets, predictions, evaluated).mean())
        scores = multilabel_scores(targets, predictions, columns, evaluated)
        return _f1(scores) | {"jaccard": jaccard}

    draws = [
        scores_of(predict_by_prevalence(imitated, num_images, rng)) for _ in range(PREVALENCE_DRAWS)
    ]
    mean = {metric: float(np.mean([draw[metric] for draw in draws])) for metric in draws[0]}
    most_frequent = scores_of(predict_most_frequent(imitated, num_images))
    all_labels = scores_of(predict_all_labels(num_images, num_labels))
    return {
        "most_frequent": most_frequent | {"reference": source},
        "all_labels": all_labels | {"reference": None},
        "prevalence_matched": mean | {"reference": source},
    }


def _counts(matrix: np.ndarray, columns: Sequence[str]) -> dict[str, int]:
    return dict(zip(columns, matrix.sum(axis=0).tolist(), strict=True))


def _f1(scores: Mapping[str, Any]) -> dict[str, float]:
    return {"micro_f1": scores["micro"]["f1"], "macro_f1": scores["macro"]["f1"]}


# ---- text tables ---------------------------------------------------------------------------------
def format_scores(results: Mapping[str, dict[str, Any]], *, per_label: bool = False) -> str:
    """Lay out the scores of every data set as a text table, at most 100 columns wide.

    Below each data set stand its F1 under the other two treatments of failed answers, where there
    are any, and its baselines. A second table counts the entries that are no label, where any
    answer has one.

    results: {data set: scores}. Their "stage" says whose answers they are, where it is there.
    per_label: add a table of every label's scores.
    """
    lines = end_table(
        {
            name: [(scores.get("stage", "answers"), row_of(scores))]
            for name, scores in results.items()
        },
        results,
    )
    sources = {scores["baselines"]["most_frequent"]["reference"] for scores in results.values()}
    lines += [
        (
            "(95 % interval by patient); failed answers count as empty, answers not in the format"
            " have Jaccard 0;"
        ),
        f"label frequencies of the baselines are from: {', '.join(sorted(sources))}",
    ]
    if any(scores["unknown_rate"] for scores in results.values()):
        lines += ["", *aligned(_unknown_rows(results), "<>>" + ">" * len(UNKNOWN_KINDS))]
        lines.append(
            "(share of answers with an unknown entry, and with nothing else; entries by kind)"
        )
    left_out = [
        f"{clipped(name)} {scores['bad_images']}"
        for name, scores in results.items()
        if scores.get("bad_images")
    ]
    if left_out:
        lines.append(f"examples left out for their images: {', '.join(left_out)}")
    uncounted = [
        f"{clipped(name)} {scores['completion_length']['unknown']}"
        for name, scores in results.items()
        if scores["completion_length"].get("unknown")
    ]
    if uncounted:
        lines.append(f"answers of unknown length: {', '.join(uncounted)}")
    if per_label:
        for name, scores in results.items():
            header = (clipped(name), "precision", "recall", "F1", "support")
            lines += ["", *aligned([header, *_label_rows(scores)], "<>>>>")]
    return "\n".join(lines)


def _unknown_rows(results: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        ("entries that are no label", "answers", "no label", *UNKNOWN_KINDS),
        *(
            (
                clipped(name),
                f"{scores['unknown_rate']:.3f}",
                f"{scores['no_label_rate']:.3f}",
                *(f"{scores['unknown_kinds'][kind]:,}" for kind in UNKNOWN_KINDS),
            )
            for name, scores in results.items()
        ),
    ]


def _label_rows(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            label,
            *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")),
            str(row["support"]),
        )
        for label, row in scores["per_label"].items()
    ]
