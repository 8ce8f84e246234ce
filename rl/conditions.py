"""Numbers that a run is judged by, as flags write them: which checkpoint is best, when to warn,
when to stop.

site-a/macro_f1 - 0.5*gap                    a trade-off: names of metrics, weights, " + " and " - "
with spaces around
gap>0.05                                     a condition on one
monitors/identical_labels>0.9 for 3          that must hold three times in a row
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TERM = re.compile(r"(?:(\d+(?:\.\d*)?|\.\d+)\*)?(\w[\w./-]*)")
_CONDITION = re.compile(r"(.+?)\s*([<>])\s*(\S+?)(?:\s+for\s+(\d+))?")


@dataclass(frozen=True)
class Combination:
    """A weighted sum of metrics: terms (weight, name)."""

    text: str
    terms: tuple[tuple[float, str], ...]

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.terms]

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """None where a metric is not among them, or is None as a logged NaN is."""
        values = [metrics.get(name) for name in self.names]
        return (
            None
            if None in values
            else sum(weight * value for (weight, _), value in zip(self.terms, values))
        )


def parse_combination(text: str) -> Combination:
    """Raises ValueError, saying what is wrong, for text that is no combination."""
    words = re.split(r"\s+([+-])\s+", text.strip())  # term, sign, term, ...
    terms = []
    for sign, word in zip(["+", *words[1::2]], words[::2]):
        match = _TERM.fullmatch(word)
        if match is None:
            raise ValueError(
                f"{word!r} is no metric; write NAME or WEIGHT*NAME, joined by ' + ' and ' - '"
            )
        terms.append((float(match[1] or 1) * (-1 if sign == "-" else 1), match[2]))
    return Combination(text, tuple(terms))


@dataclass(frozen=True)
class Condition:
    """`combination` above or below `bound`, `times` checks in a row."""

    text: str
    combination: Combination
    above: bool
    bound: float
    times: int

    def holds(self, value: float) -> bool:
        """NaN holds: a number that is watched and is none any more is what the watch is for."""
        return math.isnan(value) or (value > self.bound if self.above else value < self.bound)


def parse_condition(text: str) -> Condition:
    """Raises ValueError, saying what is wrong, for text that is no condition."""
    match = _CONDITION.fullmatch(text.strip())
    try:
        bound, times = float(match[3]), int(match[4] or 1)
    except (TypeError, ValueError):
        raise ValueError(
            "write METRIC>NUMBER or METRIC<NUMBER, with ' for N' where it must hold N times in"
            " a row"
        ) from None
    if not math.isfinite(bound) or times < 1:
        raise ValueError(f"{match[3]} must be a number and N at least 1")
    return Condition(text, parse_combination(match[1]), match[2] == ">", bound, times)


class Watch:
    """Checks conditions each time that metrics are logged, and counts how often in a row each has
    held.

    Checks in which a condition's metrics were not measured pass it over: an evaluation does not
    break a row of rollouts.
    """

    def __init__(self, conditions: Sequence[str]):
        self.conditions = [parse_condition(text) for text in conditions]
        self.held = dict.fromkeys(conditions, 0)

    def check(self, metrics: Mapping[str, float]) -> list[str]:
        """One line for each condition that comes true with these metrics: in the check that
        completes its row, not in later ones.
        """
        lines = []
        for condition in self.conditions:
            value = condition.combination.value(metrics)
            if value is None:
                continue
            self.held[condition.text] = (
                self.held[condition.text] + 1 if condition.holds(value) else 0
            )
            if self.held[condition.text] == condition.times:
                lines.append(f"{condition.text}: {value:.4g}")
        return lines

    def state_dict(self) -> dict[str, int]:
        return dict(self.held)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over the counts of the conditions that are still watched."""
        self.held |= {text: count for text, count in state.items() if text in self.held}
