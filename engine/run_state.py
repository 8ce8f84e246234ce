"""Hold where a training run stands, and when something of it is due."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from engine.settings import TrainingConfig


@dataclass
class TrainerState:
    """Hold where a run stands: trainer_state.json, in the form that HF's tools read."""

    global_step: int = 0
    epoch: float = 0.0
    best_metric: float | None = None
    best_model_checkpoint: str | None = None  # a folder's name in the run's folder
    evaluations_without_improvement: int = 0
    num_tokens: int = 0  # of prompts and completions so far
    evaluated_step: int = -1  # the last step whose evaluation was finished
    # {checkpoint: what the best is chosen by}, of the evaluations that measured it
    evaluations: dict[str, float] = field(default_factory=dict)
    greater_is_better: bool = True
    bad_steps: int = 0  # that were skipped: their gradient or loss was not finite
    bad_steps_in_a_row: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    # of the steps since the last log, where logging_steps > 1
    unlogged_metrics: dict[str, Any] = field(default_factory=dict)

    def record_evaluation(self, metric: float | None, *, greater_is_better: bool) -> bool:
        """Note an evaluation at this step and return whether it is the best so far.

        metric: what the best checkpoint is chosen by. None (not measured) and NaN never are best.
        """
        self.greater_is_better = greater_is_better
        if metric is not None and math.isfinite(metric):
            # anew, so that a copy of the state keeps what it had
            self.evaluations = self.evaluations | {f"checkpoint-{self.global_step}": metric}
        if metric is None or metric != metric:
            better = False
        elif self.best_metric is None:
            better = True
        else:
            better = metric > self.best_metric if greater_is_better else metric < self.best_metric
        if better:
            self.best_metric, self.best_model_checkpoint = metric, f"checkpoint-{self.global_step}"
        self.evaluations_without_improvement = (
            0 if better else self.evaluations_without_improvement + 1
        )
        return better


@dataclass(frozen=True)
class Schedule:
    """Say when a run logs, evaluates, saves and ends. All numbers are optimizer steps.

    eval_steps: evaluate every so many, and at the end. None for the end alone.
    eval_at_start: evaluate before the first step too.
    save_steps: save every so many, beside the saves at every evaluation. None for those alone.
    patience: end after so many evaluations in a row without a better one. None for never.
    max_bad_steps: skip up to so many steps in a row whose gradient or loss is not finite.
    save_minutes: save after a step where the last save is so long ago. None or 0 for never.
    """

    total: int
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    eval_at_start: bool = False
    patience: int | None = None
    max_bad_steps: int = 0
    save_minutes: float | None = None

    @classmethod
    def of(
        cls,
        config: TrainingConfig,
        total: int,
        eval_steps: int | None,
        *,
        eval_at_start: bool = False,
        patience: int | None = None,
    ) -> Schedule:
        """Take from the settings what both scripts have there."""
        return cls(
            total,
            config.logging_steps,
            eval_steps,
            config.save_steps,
            eval_at_start=eval_at_start,
            patience=patience,
            max_bad_steps=config.max_bad_steps,
            save_minutes=config.save_minutes,
        )
