"""Make votes of several samples, with shares and truth by hand or from arrays."""

from __future__ import annotations

from data.predictions import Prediction
from tests.helpers.reports import ABC, parsed, row

AB = ("Edema", "Fracture")


def vote(shares: dict, labels=(), *, n: int = 0, evaluated=AB, patient="", **fields) -> Prediction:
    """Make the vote of 4 samples with these shares."""
    said = ", ".join(label for label, share in shares.items() if share >= 0.5)
    (prediction,) = parsed(
        [
            row(
                f"<solution>{said}</solution>",
                labels,
                id=f"r{n}",
                patient=patient or f"p{n}",
                evaluated=evaluated,
                answer_format="solution",
                **({"vote_shares": shares, "num_generations": 4} | fields),
            )
        ]
    )
    return prediction


def votes_of(shares, targets, *, evaluated=None, patients=None, labels=ABC) -> list[Prediction]:
    """Make votes from arrays [N, K]."""
    return [
        vote(
            {label: share for label, share in zip(labels, said, strict=True) if share},
            tuple(label for label, is_true in zip(labels, true, strict=True) if is_true),
            n=n,
            evaluated=tuple(
                label for k, label in enumerate(labels) if evaluated is None or evaluated[n][k]
            ),
            patient="" if patients is None else patients[n],
        )
        for n, (said, true) in enumerate(zip(shares.tolist(), targets.tolist(), strict=True))
    ]
