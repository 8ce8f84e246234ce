"""Put together what scores-<set>.json holds of the answers to a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.examples import Example
from data.predictions import Prediction
from eval.groups import group_scores
from eval.probabilities import has_shares, probability_scores
from eval.scores import score
from eval.votes import sample_scores


def scores_record(
    predictions: Sequence[Prediction],
    samples: Sequence[Prediction] = (),
    *,
    baseline_examples: Sequence[Example] | None = None,
    seed: int = 0,
    source: str = "predictions",
) -> dict[str, Any]:
    """Score the answers to a data set: all of them, by group, and votes beside their samples.

    predictions: one an image. samples: what they were voted from, empty where they are no votes.
    baseline_examples: see `score`. seed: of the intervals and the random baseline. source: name of
    the answers' file, for problems.

    Raises DataError where only some of the votes kept their shares.
    """
    record = score(predictions, baseline_examples=baseline_examples, seed=seed)
    record |= group_scores(predictions, seed=seed)
    if samples:
        record["samples"] = sample_scores(samples, seed=seed)
    if any(map(has_shares, predictions)):
        record["probabilities"] = probability_scores(predictions, seed=seed, source=source)
    return record
