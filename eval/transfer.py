"""Compare what a step changed at home with what it changed elsewhere, on the labels of both sides.

Hospitals express different labels. A mean over 14 labels at home and over nine elsewhere differs in
its labels as well as in its hospital, so each comparison is made twice: on all labels of each side,
and on the labels that both sides can express.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics import interval


@dataclass(frozen=True)
class Moved:
    """Hold the F1 of each label of one data set before and after a step.

    data_set: its name. labels [K]: those that the data set can express. before, after [K]: F1.
    drawn_before, drawn_after [R, K]: F1 in R resamples, of the same drawn patients.
    """

    data_set: str
    labels: tuple[str, ...]
    before: np.ndarray
    after: np.ndarray
    drawn_before: np.ndarray
    drawn_after: np.ndarray

    def macro(self, labels: Sequence[str]) -> Macro:
        """Average F1 over some of the labels."""
        columns = [self.labels.index(label) for label in labels]
        return Macro(
            float(self.before[columns].mean()),
            float(self.after[columns].mean()),
            self.drawn_before[:, columns].mean(axis=1),
            self.drawn_after[:, columns].mean(axis=1),
        )


@dataclass(frozen=True)
class Macro:
    """Hold macro-F1 before and after a step, and in R resamples.

    before, after: the values. drawn_before, drawn_after [R].
    """

    before: float
    after: float
    drawn_before: np.ndarray
    drawn_after: np.ndarray

    @property
    def difference(self) -> float:
        """Return after - before."""
        return self.after - self.before

    @property
    def drawn(self) -> np.ndarray:
        """Return [R], the resampled differences."""
        return self.drawn_after - self.drawn_before


def mean_macro(parts: Sequence[Macro]) -> Macro:
    """Average macro-F1 over data sets, or over pairs of them, resample by resample."""
    return Macro(
        float(np.mean([part.before for part in parts])),
        float(np.mean([part.after for part in parts])),
        np.mean([part.drawn_before for part in parts], axis=0),
        np.mean([part.drawn_after for part in parts], axis=0),
    )


def shared_labels(first: Iterable[str], second: Iterable[str]) -> tuple[str, ...]:
    """Return the labels that both sides can express, in the order of the first."""
    known = set(second)
    return tuple(label for label in first if label in known)


@dataclass(frozen=True)
class Gap:
    """Hold how much more macro-F1 a step has gained at home than elsewhere.

    home, away: the means of the two sides. Positive values say that part of the gain stays at home.
    """

    home: Macro
    away: Macro

    @property
    def value(self) -> float:
        """Return the difference at home minus the difference elsewhere."""
        return self.home.difference - self.away.difference

    @property
    def drawn(self) -> np.ndarray:
        """Return [R], the resampled gaps. The two sides are drawn on their own."""
        return self.home.drawn - self.away.drawn

    @property
    def standard_error(self) -> float:
        """Return the standard deviation of the resampled gaps."""
        return float(self.drawn.std())

    @property
    def gain(self) -> tuple[float, float]:
        """Return the mean of both sides' differences, and its standard error."""
        drawn = (self.home.drawn + self.away.drawn) / 2
        return (self.home.difference + self.away.difference) / 2, float(drawn.std())

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % percentile interval."""
        return interval(self.drawn)


def gap_on_all_labels(home: Sequence[Moved], away: Sequence[Moved]) -> Gap | None:
    """Compare the sides, each on all labels of its own. None where a side has no data set."""
    if not home or not away:
        return None
    return Gap(
        *(mean_macro([moved.macro(moved.labels) for moved in side]) for side in (home, away))
    )


def gap_on_shared_labels(home: Sequence[Moved], away: Sequence[Moved]) -> Gap | None:
    """Compare the sides on the labels that both can express.

    Each data set at home is compared with each elsewhere on the labels of that pair, and the pairs
    are averaged. So a data set with few labels takes none away from the other pairs. A pair without
    a shared label is left out. None where no pair has any.
    """
    pairs = [
        (one.macro(labels), other.macro(labels))
        for one in home
        for other in away
        if (labels := shared_labels(one.labels, other.labels))
    ]
    if not pairs:
        return None
    return Gap(*(mean_macro(side) for side in zip(*pairs, strict=True)))


def home_on_its_own_labels(home: Sequence[Moved], away: Sequence[Moved]) -> Macro | None:
    """Average macro-F1 at home on the labels that the other side cannot express, pair by pair.

    None where there is no such label.
    """
    parts = [
        one.macro(labels)
        for one in home
        for other in away
        if (labels := tuple(label for label in one.labels if label not in other.labels))
    ]
    return mean_macro(parts) if parts else None
