"""Choose how many rows an evaluation decodes or scores together, where no setting says it.

As many as the memory forecast allows, up to MOST: a token reads all weights, for one row as for
128. On a CPU rows take at most half of what the model leaves free there, since the host has more to
hold, the image features among it.

Answers do not depend on their neighbours but by rounding. So a run that goes on keeps what it has
chosen, as long as it fits, and all ranks have the same (engine/fit.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engine.config import Resolved
from engine.free_memory import Free
from engine.memory import COPIES, Parts
from engine.out_of_memory import EVALUATION
from engine.remedies import COMFORTABLE, STATIC, Question, largest, needed
from engine.resume import record_of

MOST = 128
WHOLE = 8  # larger numbers are multiples of it
CHOSEN = "memory forecast"  # the origin of the value
EVALUATING = ("validation", "evaluation")  # what the setting is about
_SHARE = {"cpu": 0.5}  # of what the model leaves free; on a GPU all of it


def with_eval_batch(
    resolved: Resolved, question: Question, free: Free
) -> tuple[Resolved, Question]:
    """Return the settings with as many rows as fit, and the question with them.

    question: of the settings. free: what is free to the rank that has least.

    A value that is given stays. So does one that memory has cut, and the default of a run that
    never evaluates. A dry run, whose table says which cards hold a run, takes no more than the
    default.
    """
    most = _most(resolved)
    found = question.forecast(question.config).phases
    if most is None or not any(phase in found for phase in EVALUATING):
        return resolved, question

    def asked(rows: int) -> Question:
        return replace(question, config=replace(question.config, **{EVALUATION: rows}))

    def fits(rows: int) -> bool:
        phases = asked(rows).forecast(asked(rows).config).phases
        return all(
            _fits(parts, free, question.device.type)
            for phase, parts in phases.items()
            if phase in EVALUATING
        )

    rows = most_that_fit(fits, most)
    if rows == getattr(question.config, EVALUATION):
        return resolved, question
    return resolved.with_value(EVALUATION, rows, CHOSEN), asked(rows)


def most_that_fit(fits: Callable[[int], bool], most: int = MOST) -> int:
    """Find the number of rows up to `most` that is taken: the largest that fits, or 1."""
    rows = max(1, largest(fits, most))
    return rows // WHOLE * WHOLE if WHOLE < rows < most else rows


def _most(resolved: Resolved) -> int | None:
    """Find the largest number to choose, None where there is nothing to choose."""
    config: Any = resolved.configs[0]
    origin, value = resolved.origins[EVALUATION], getattr(config, EVALUATION)
    if origin == "default":
        return value if getattr(config, "dry_run", False) else MOST
    named = getattr(config, "resume_from_checkpoint", None)
    if named is None or origin != "resumed run":
        return None
    entry = record_of(named)["settings"].get(EVALUATION, {})
    return value if entry.get("origin") == CHOSEN else None


def _fits(parts: Parts, free: Free, device: str) -> bool:
    """Tell whether a phase leaves enough free beside it."""
    held = sum(parts.get(name, 0) for name in (*STATIC, COPIES))
    left = COMFORTABLE * free.memory - held
    return needed(parts) - held <= _SHARE.get(device, 1.0) * left
