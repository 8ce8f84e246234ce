"""Parse and check what flags say of metrics: which checkpoint is best, when to warn or stop.

site-a/macro_f1 - 0.5*gap           a combination: metrics with weights, " + " and " - " in spaces
gap>0.05                            a condition on one
monitors/identical_labels>0.9 for 3 a condition that must hold three times in a row
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_WEIGHT, _METRIC = r"(?:(\d+(?:\.\d*)?|\.\d+)\*)?", r"\w[\w./-]*"
_CONDITION = re.compile(r"(.+?)\s*([<>])\s*(\S+?)(?:\s+for\s+(\d+))?")


@dataclass(frozen=True)
class Combination:
    """Hold a weighted sum of metrics, as terms (weight, name)."""

    text: str
    terms: tuple[tuple[float, str], ...]

    @property
    def names(self) -> list[str]:
        """Return the names of the metrics."""
        return [name for _, name in self.terms]

    def value(self, metrics: Mapping[str, float | None]) -> float | None:
        """Compute the sum, or None where a metric is missing or None (as a logged NaN is)."""
        products = []
        for weight, name in self.terms:
            value = metrics.get(name)
            if value is None:
                return None
            products.append(weight * value)
        return sum(products)


def parse_combination(
    text: str, *, name: str = _METRIC, what: str = "metric", joined: str = "' + ' and ' - '"
) -> Combination:
    """Parse a combination. Raises ValueError, saying what is wrong, for any other text.

    name: the pattern of a name. what, joined: the words of the problem for what a name names, and
    for what joins the terms.
    """
    words = re.split(r"\s+([+-])\s+", text.strip())  # term, sign, term, ...
    terms = []
    for sign, word in zip(["+", *words[1::2]], words[::2], strict=True):
        match = re.fullmatch(f"{_WEIGHT}({name})", word)
        if match is None:
            raise ValueError(
                f"{word!r} is no {what}; write NAME or WEIGHT*NAME, joined by {joined}"
            )
        terms.append((float(match[1] or 1) * (-1 if sign == "-" else 1), match[2]))
    return Combination(text, tuple(terms))


@dataclass(frozen=True)
class Condition:
    """Hold a condition: `combination` above or below `bound`, `times` checks in a row."""

    text: str
    combination: Combination
    above: bool
    bound: float
    times: int

    def holds(self, value: float) -> bool:
        """Tell whether a value meets the condition. NaN always does.

        A metric that is watched and has become NaN is what the watch is for.
        """
        return math.isnan(value) or (value > self.bound if self.above else value < self.bound)


def parse_condition(text: str) -> Condition:
    """Parse a condition. Raises ValueError, saying what is wrong, for any other text."""
    match = _CONDITION.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        bound, times = float(match[3]), int(match[4] or 1)
    except ValueError:
        raise ValueError(
            "write METRIC>NUMBER or METRIC<NUMBER, with ' for N' where it must hold N times in"
            " a row"
        ) from None
    if not math.isfinite(bound) or times < 1:
        raise ValueError(f"{match[3]} must be a number and N at least 1")
    return Condition(text, parse_combination(match[1]), match[2] == ">", bound, times)


class Watch:
    """Check conditions whenever metrics are logged, and count how often in a row each has held.

    A check that did not measure a condition's metrics leaves its count as it is. So an evaluation
    does not break a row of rollouts.
    """

    def __init__(self, conditions: Sequence[str]):
        # a condition that is given twice would count each check twice
        self.conditions = [parse_condition(text) for text in dict.fromkeys(conditions)]
        self.held = dict.fromkeys(conditions, 0)
        self.told: dict[str, list[str]] = {text: [] for text in self.held}

    def check(
        self, metrics: Mapping[str, float | None], named: Mapping[str, Sequence[str]] | None = None
    ) -> list[str]:
        """Return one line for each condition that comes true with these metrics.

        It comes true in the check that completes its row, not in later ones. One on a metric that
        counts something with a name has a line, with the names, whenever it holds for a name that
        its lines have not had yet, and no other.

        named: {metric: the names of what it counts}, [] for none.
        """
        named = named or {}
        lines = []
        for condition in self.conditions:
            value = condition.combination.value(metrics)
            if value is None:
                continue
            self.held[condition.text] = (
                self.held[condition.text] + 1 if condition.holds(value) else 0
            )
            names = [one for name in condition.combination.names for one in named.get(name, ())]
            told = self.told[condition.text]
            fresh = [name for name in names if name not in told]
            due = self.held[condition.text] >= condition.times
            if due and (fresh if names else self.held[condition.text] == condition.times):
                told += fresh
                more = f" ({', '.join(names)})" if names else ""
                lines.append(f"{condition.text}: {value:.4g}{more}")
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Return how often in a row each condition has held, and the names that it has told."""
        told = {text: list(names) for text, names in self.told.items()}
        return {"held": dict(self.held), "told": told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what is known of the conditions that are still watched."""
        for text in self.held.keys() & state["held"].keys():
            self.held[text], self.told[text] = state["held"][text], list(state["told"][text])
