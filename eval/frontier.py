"""Draw the line between two adapters: what each share keeps at home and abroad, and which to take.

Models that `python -m engine.merge --interpolate` wrote tell their share alpha. Each is a point:
macro-F1 at home on all labels there, and macro-F1 elsewhere on the labels that home shares.

Which alpha to take is decided on validation data, by one rule:

    the largest gain since the smallest alpha, as the mean of the two scores, less its standard
    error. Of equal ones the smallest alpha.

The gain and its error are paired: all alphas answer the same images, and patients are resampled
with all of them. The smallest alpha has a gain of 0 without error, so another one is taken only
where it is better by more than one standard error, and not because it is the luckiest of five.

`chosen-alpha.json` keeps the choice with the patients that it was made on, as digests. A report on
other data marks that alpha, and refuses it where any of these patients is among those shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.plain_files import parse_record, read_plain
from engine.config import UsageError
from eval.contrasts import Contrast
from eval.folders import Entry
from eval.metrics import interval
from eval.page import Cell, Section, Table, Text
from eval.pictures import frontier_picture
from eval.transfer import shared_labels

CHOICE = "chosen-alpha.json"
RULE = (
    "the largest gain since the smallest alpha (mean of home and elsewhere) less one standard error"
)


@dataclass(frozen=True)
class Point:
    """Hold one share: its score at home and elsewhere with 95 % intervals, and what it gained.

    gain: since the smallest alpha, mean of both scores. error: its standard error.
    """

    model: str
    alpha: float
    home: float
    home_interval: tuple[float, float]
    away: float
    away_interval: tuple[float, float]
    gain: float
    error: float


@dataclass(frozen=True)
class Frontier:
    """Hold the points between two adapters, the smallest alpha first.

    adapters: SHA-256 of the two. home, away: data sets of the two sides. patients: {data set:
    digests of its patients}.
    """

    points: tuple[Point, ...]
    adapters: tuple[str, ...]
    home: tuple[str, ...]
    away: tuple[str, ...]
    patients: Mapping[str, frozenset[str]]

    @property
    def chosen(self) -> Point:
        """Return the point that the rule takes."""
        return max(self.points, key=lambda point: (point.gain - point.error, -point.alpha))

    def record(self) -> dict[str, Any]:
        """Write what chosen-alpha.json keeps."""
        return {
            "alpha": self.chosen.alpha,
            "rule": RULE,
            "sha256": list(self.adapters),
            "home": list(self.home),
            "away": list(self.away),
            "points": [vars(point) for point in self.points],
            "patients": {name: sorted(digests) for name, digests in self.patients.items()},
        }


def frontier_of(
    entries: Sequence[Entry], contrasts: Sequence[Contrast], home: Sequence[str]
) -> Frontier | None:
    """Gather the points between two adapters, None where there are fewer than two or one side only.

    entries: all models, of which those of the first pair of adapters count. contrasts: the data
    sets, of which those that all shares have answered count. home: names of the home sets.
    """
    between = [entry for entry in entries if entry.interpolation]
    pairs = [tuple(entry.interpolation["sha256"]) for entry in between]
    shares = sorted(
        (float(entry.interpolation["alpha"]), entry.name)
        for entry, pair in zip(between, pairs, strict=True)
        if pair == pairs[0]
    )
    names = [name for _, name in shares]
    answered = [c for c in contrasts if all(name in c.values for name in names)]
    sides = (
        [c for c in answered if c.data_set in home],
        [c for c in answered if c.data_set not in home],
    )
    scored = [score for name in names if (score := _scores(*sides, name)) is not None]
    if len(names) < 2 or len(scored) < len(names):
        return None
    points = []
    first_home, first_away = scored[0]
    for (alpha, name), (home_score, away_score) in zip(shares, scored, strict=True):
        # [1 + R], the value itself first
        drawn = ((home_score - first_home) + (away_score - first_away)) / 2
        points.append(
            Point(
                name,
                alpha,
                home=float(home_score[0]),
                home_interval=interval(home_score[1:]),
                away=float(away_score[0]),
                away_interval=interval(away_score[1:]),
                gain=float(drawn[0]),
                error=float(drawn[1:].std()),
            )
        )
    return Frontier(
        tuple(points),
        pairs[0],
        home=tuple(c.data_set for c in sides[0]),
        away=tuple(c.data_set for c in sides[1]),
        patients={c.data_set: _digests(c) for c in (*sides[0], *sides[1])},
    )


def _scores(
    home: Sequence[Contrast], away: Sequence[Contrast], model: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Score a model on both sides -> two [1 + R], the values and their resamples, or None."""
    pairs = [
        (other, labels)
        for one in home
        for other in away
        if (labels := shared_labels(one.labels, other.labels))
    ]
    if not pairs:
        return None
    abroad = []
    for other, labels in pairs:
        columns = [other.labels.index(label) for label in labels]
        f1 = [of[model]["label_f1"][:, columns] for of in (other.values, other.resampled)]
        abroad.append(np.concatenate(f1).mean(axis=1))
    at_home = [
        np.concatenate([c.values[model]["macro_f1"], c.resampled[model]["macro_f1"]]) for c in home
    ]
    return np.mean(at_home, axis=0), np.mean(abroad, axis=0)


def _digests(contrast: Contrast) -> frozenset[str]:
    """Digest the patients of a data set, each with where its images come from."""
    answers = contrast.first
    source = "|".join(sorted(answers.datasets))
    return frozenset(
        hashlib.sha256(f"{source}|{patient}".encode()).hexdigest()[:16]
        for patient in set(answers.patients.tolist())
    )


# ---- the choice ----------------------------------------------------------------------------------
def chosen_before(path: str, found: Frontier | None) -> float:
    """Read the alpha that was chosen on other data.

    path: of chosen-alpha.json. found: what is shown now.

    Raises UsageError where the file is none, where no shares are shown or others, and where it was
    chosen on patients that are shown here.
    """
    where = f"--chosen_alpha {path}"
    try:
        record = parse_record(read_plain(Path(path)))
        alpha, adapters = float(record["alpha"]), tuple(record["sha256"])
        before = {name: frozenset(digests) for name, digests in record["patients"].items()}
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{where}: is no choice of eval.report ({type(error).__name__}); give the {CHOICE} that"
            " it wrote for the validation sets"
        ) from error
    if found is None or adapters != found.adapters:
        raise UsageError(
            f"{where}: was chosen between other adapters than"
            f" {'those shown' if found else 'any shown here'}; give the folders that eval.matrix"
            " made of the same interpolation, with a set at home and one elsewhere"
        )
    if alpha not in [point.alpha for point in found.points]:
        raise UsageError(f"{where}: chose alpha {alpha:g}, which is not among the models shown")
    for name, digests in found.patients.items():
        common = [(other, len(digests & seen)) for other, seen in before.items() if digests & seen]
        if common:
            other, count = common[0]
            raise UsageError(
                f"{where}: was chosen on {other}, and {count:,} of its patients are in {name}; an"
                " alpha that is shown on the images it was chosen on flatters itself: show other"
                " data, or leave the flag out"
            )
    return alpha


# ---- in a report ---------------------------------------------------------------------------------
def frontier_section(found: Frontier, chosen_on: str | None, alpha: float) -> Section:
    """Show the points as a picture and a table, with the alpha that was chosen marked.

    chosen_on: the file of a choice on other data, None where it was made on what is shown.
    """
    picture = frontier_picture(
        [(point.model, point.alpha, point.home, point.home_interval, point.away,
          point.away_interval) for point in found.points],
        alpha,
    )  # fmt: skip
    rows = [
        [
            Cell(f"{point.alpha:g}", tone="best" if point.alpha == alpha else ""),
            _score(point.home, point.home_interval),
            _score(point.away, point.away_interval),
            Cell(f"{point.gain:+.3f}", f"standard error {point.error:.3f}"),
            Cell(f"{point.gain - point.error:+.3f}"),
            "chosen" if point.alpha == alpha else "",
        ]
        for point in found.points
    ]
    table = Table(
        "Shares of the second adapter's change",
        ["alpha", "At home", "Elsewhere, shared labels", "Gain", "Gain less its error", ""],
        rows,
        [
            f"At home: macro-F1 on {', '.join(found.home)}, all labels. Elsewhere: macro-F1 on"
            f" {', '.join(found.away)}, the labels that home shares. Gain: since the smallest"
            " alpha, mean of both, from the same resampled patients."
        ],
        numbers_to=5,
    )
    return Section("Between two adapters", [Text(_told(found, chosen_on, alpha)), picture, table])


def _score(value: float, bounds: tuple[float, float]) -> Cell:
    return Cell(f"{value:.3f}", f"{bounds[0]:.3f} to {bounds[1]:.3f}")


def _told(found: Frontier, chosen_on: str | None, alpha: float) -> str:
    if chosen_on is not None:
        return (
            f"Chosen alpha: {alpha:g}, on other data ({chosen_on}), by {RULE}. No patient shown"
            " here took part in the choice."
        )
    return (
        f"Chosen alpha: {alpha:g}, by {RULE}. It was chosen on the images shown here, so its scores"
        f" flatter it: report it on other data, by --chosen_alpha {CHOICE}."
    )


def choice_text(found: Frontier) -> str:
    """Write chosen-alpha.json."""
    return json.dumps(found.record(), indent=1) + "\n"
