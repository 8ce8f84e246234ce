"""Protect that votes of a real data set are scored in seconds and in little memory.

Run: pytest tests/eval/test_votes_at_size.py
"""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import numpy as np

from data.labels import LABELS
from eval.faithfulness import faithfulness_scores
from eval.probabilities import operating_points, probability_scores
from eval.votes import sample_scores
from tests.helpers.votes import votes_of


def test_a_real_size_takes_seconds_and_little_memory():
    """A quarter of NIH's test images, 14 labels, 1,000 resamples of some 3,500 patients."""
    rng = np.random.default_rng(0)
    images, k = 6_400, 8
    targets = rng.random((images, 14)) < 0.1
    shares = rng.binomial(k, np.where(targets, 0.5, 0.1)) / k
    patients = [f"p{i}" for i in rng.integers(0, 5_000, images)]
    votes = votes_of(shares, targets, patients=patients, labels=LABELS)
    samples = [replace(vote, extra={"sample": number}) for vote in votes for number in range(2)]
    swapped = [vote.with_extra(image_of=votes[n - 1].id) for n, vote in enumerate(votes)]
    tracemalloc.start()
    start = time.process_time()
    probability_scores(votes)
    operating_points(votes, votes, "home")
    sample_scores(samples)
    faithfulness_scores(votes, swapped)
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6  # bytes
    assert seconds < 60  # some 10; the whole of NIH takes 9 without tracemalloc
