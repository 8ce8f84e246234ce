"""Let several sampled answers to one image vote, and score the samples beside their vote.

A sample is a `Prediction` whose row also has "sample", its number from 0. The vote is a prediction
like any other, so every later command treats a policy with its vote as one more model. The share
of the samples that name a label is that label's probability (see eval/probabilities.py).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data.answers import parse_answer
from data.files import DataError, first_problems
from data.predictions import Prediction
from data.prompts import solution_text
from eval.end_table import METRICS, aligned, change_with_interval, clipped, with_interval
from eval.metrics import RESAMPLES, drawn_patients, interval, patient_totals, scores_of_totals
from eval.scores import AnswerMatrices, answer_matrices, evaluated_columns, known_lengths

VOTE_FORMAT = "solution"
# Places of a rollout in its run: the same for all samples of a group.
_OF_IMAGE = ("step", "group")


# ---- vote ----------------------------------------------------------------------------------------
def is_sample(prediction: Prediction) -> bool:
    """Tell whether a prediction is one of several answers to its image."""
    return "sample" in prediction.extra


def samples_by_image(
    samples: Sequence[Prediction], num_generations: int | None = None, *, source: str = "samples"
) -> list[list[Prediction]]:
    """Gather the samples of each image, in the order in which the images come.

    samples: of an evaluation, or the rollouts of a GRPO run. Those of an evaluation are put in the
    order of their numbers. Those of a rollout belong together by step and group.
    num_generations: k, None for as many as the first image has. source: name of the file, for the
    problems.

    Raises DataError that names each image without exactly the samples 0 to k-1.
    """
    groups: defaultdict[tuple[Any, ...], list[Prediction]] = defaultdict(list)
    for sample in samples:
        groups[sample.id, sample.extra.get("step"), sample.extra.get("group")].append(sample)
    if not groups:
        raise DataError([f"{source}: holds no samples to vote"])
    k = num_generations or len(next(iter(groups.values())))
    problems = []
    for (id, step, _), group in groups.items():
        group.sort(key=lambda sample: sample.extra.get("sample", 0))
        numbers = [sample.extra["sample"] for sample in group if is_sample(sample)]
        if len(group) != k or (numbers and numbers != list(range(k))):
            where = f"id {id!r}" if step is None else f"id {id!r} at step {step}"
            found = f", numbered {', '.join(map(str, numbers))}" if numbers else ""
            needed = f"{k}, numbered 0 to {k - 1}" if numbers else str(k)
            problems.append(
                f"{source}, {where}: has {len(group)} samples{found}; each image needs {needed}"
            )
    if problems:
        raise DataError(first_problems(problems))
    return list(groups.values())


def samples_of_file(
    rows: Sequence[Prediction], num_generations: int | None, *, source: str
) -> list[list[Prediction]] | None:
    """Gather the samples of a predictions file by image, None where each row counts by itself.

    num_generations: k where the user gave it, else None. Rows with "sample" vote in any case.
    Rollouts vote where k is given, group by group. source: name of the file, for the problems.

    Raises DataError where k is not how many there are.
    """
    sampled = any(is_sample(row) for row in rows)
    if not sampled and num_generations in (None, 1):
        return None
    if not sampled and not all("step" in row.extra and "group" in row.extra for row in rows):
        raise DataError(
            [
                f"{source}: holds one answer an image, so nothing can vote; leave"
                f" --num_generations {num_generations} out, or give samples-<name>.jsonl"
            ]
        )
    groups = samples_by_image(rows, None if sampled else num_generations, source=source)
    if num_generations not in (None, len(groups[0])):
        raise DataError(
            [
                f"{source}: holds {len(groups[0])} samples an image, not {num_generations}; leave"
                " --num_generations out"
            ]
        )
    return groups


def vote_predictions(samples: Sequence[Prediction]) -> list[Prediction]:
    """Make the vote of each image's samples, one prediction an image.

    samples: as in `samples_by_image`, which raises DataError.
    """
    return [vote(group) for group in samples_by_image(samples)]


def vote(samples: Sequence[Prediction]) -> Prediction:
    """Make one answer of k samples: the labels that at least half of them name.

    A sample that could not be read names nothing and still counts as one of the k. Where fewer
    than half could be read there is no vote, and the answer counts as failed. Entries that are no
    label get no vote. Labels may contradict each other, as in a single answer.

    "vote_shares" is {label: share of the samples that name it}, without the labels that none names.
    completion_length and "text_length" are the samples' means, rounded, so that a reward with a
    length term treats the vote as it treats a sample. They are None or absent where that of a
    sample is unknown.
    """
    k = len(samples)
    read = [sample.answer for sample in samples if sample.answer.parsed]
    counts = Counter(label for answer in read for label in answer.labels)
    first = samples[0]
    labels = [label for label in counts if 2 * counts[label] >= k]
    completion = solution_text(labels, first.label_set) if 2 * len(read) >= k else ""
    lengths = known_lengths(samples)
    text_lengths = [s.extra["text_length"] for s in samples if "text_length" in s.extra]
    return dataclasses.replace(
        first,
        completion=completion,
        completion_length=round(sum(lengths) / k) if len(lengths) == k else None,
        answer_format=VOTE_FORMAT,
        answer=parse_answer(completion, VOTE_FORMAT, first.label_set),
        extra={name: first.extra[name] for name in _OF_IMAGE if name in first.extra}
        | {
            "vote_shares": {label: counts[label] / k for label in first.label_set.ordered(counts)},
            "num_generations": k,
        }
        | ({"text_length": round(sum(text_lengths) / k)} if len(text_lengths) == k else {}),
    )


# ---- scores --------------------------------------------------------------------------------------
def sample_scores(
    samples: Sequence[Prediction], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Score the samples themselves -> "samples" of scores-<set>.json.

    samples: k of each image, as `samples_by_image` takes them. seed, resamples: of the intervals.

    "mean" (mean@k) is what one sampled answer scores: the mean of the k data sets' scores that the
    first, second, ... samples make. It also has their rates of failure. "best" (best@k) scores each
    image's sample with the highest Jaccard index, the first of equals. It has seen the truth.
    "vote_gain" is the vote's score (vote@k) minus the mean. "intervals" has the 95 % intervals of
    all three by patient, from the same resamples.
    """
    groups = samples_by_image(samples)
    k = len(groups[0])
    columns = evaluated_columns(samples)
    each = [answer_matrices([group[j] for group in groups], columns) for j in range(k)]
    voted = answer_matrices([vote(group) for group in groups], columns)
    patients = [group[0].patient_id for group in groups]
    totals = [
        patient_totals(*matrices[:3], patients, matrices.jaccard)
        for matrices in (*each, _best(each), voted)
    ]  # k + 2 of [P, 3K + 2]
    seen = _mean_best_gain([rows.sum(axis=0)[None] for rows in totals])
    # counts stay far below 2^24, so they are exact in fp32
    small = [rows.astype(np.float32) for rows in totals]
    drawn: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for weights in drawn_patients(len(set(patients)), seed=seed, resamples=resamples):
        weights = weights.astype(np.float32)
        for name, scores in _mean_best_gain([weights @ rows for rows in small]).items():
            for metric, values in scores.items():
                drawn[name][metric].append(values)
    answers = [sample.answer for sample in samples]
    point = {
        name: {metric: float(values[0]) for metric, values in scores.items()}
        for name, scores in seen.items()
    }
    rates: dict[str, list[float]] = {
        "fail_rate": [not answer.parsed for answer in answers],
        "invalid_rate": [not answer.valid for answer in answers],
        "unknown_rate": [bool(answer.unknown) for answer in answers],
        "no_label_rate": [answer.problem == "no_label" for answer in answers],
    }
    lengths = known_lengths(samples)
    mean_length = {"completion_length": float(np.mean(lengths)) if lengths else None}
    return {
        "num_generations": k,
        "mean": point["mean"]
        | {name: float(np.mean(values)) for name, values in rates.items()}
        | mean_length,
        "best": point["best"],
        "vote_gain": point["vote_gain"],
        "intervals": {
            name: {
                metric: list(interval(np.concatenate(values))) for metric, values in scores.items()
            }
            for name, scores in drawn.items()
        },
    }


def _best(each: Sequence[AnswerMatrices]) -> AnswerMatrices:
    """Take of each image the sample with the highest Jaccard index, the first of equals."""
    jaccard = np.stack([matrices.jaccard for matrices in each])  # [k, N]
    chosen = jaccard.argmax(axis=0)  # [N]
    predicted = np.stack([matrices.predicted for matrices in each])  # [k, N, K]
    return each[0]._replace(
        predicted=predicted[chosen, np.arange(len(chosen))], jaccard=jaccard.max(axis=0)
    )


def _mean_best_gain(totals: Sequence[np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Score k samples, the best and the vote, in this order, from their totals [R, 3K + 2] each."""
    *each, best, voted = [scores_of_totals(rows.astype(np.float64)) for rows in totals]
    mean = {metric: np.mean([scores[metric] for scores in each], axis=0) for metric in METRICS}
    return {
        "mean": mean,
        "best": {metric: best[metric] for metric in METRICS},
        "vote_gain": {metric: voted[metric] - mean[metric] for metric in METRICS},
    }


# ---- text table ----------------------------------------------------------------------------------
def format_samples(results: Mapping[str, dict[str, Any]]) -> str:
    """Lay out what one sample, the vote and the best sample score, "" where nothing was sampled.

    results: {data set: scores}.
    """
    table: list[tuple[str, ...]] = []
    for name, scores in results.items():
        if "samples" in scores:
            samples = scores["samples"]
            k = samples["num_generations"]
            table += [
                (clipped(name), *METRICS.values()),
                ("  one sample", *_cells(samples, "mean", with_interval)),
                ("  vote - one sample", *_cells(samples, "vote_gain", change_with_interval)),
                (f"  best of {k}", *_cells(samples, "best", with_interval)),
            ]
    if not table:
        return ""
    notes = "(95 % interval by patient); the row of the data set above is the vote; best of k knows"
    return "\n".join([*aligned(table, "<<<<"), f"{notes} the truth"])


def _cells(
    samples: Mapping[str, Any], key: str, write: Callable[[float, Sequence[float]], str]
) -> list[str]:
    return [write(samples[key][metric], samples["intervals"][key][metric]) for metric in METRICS]
