"""Protect the best evaluation of a run, as trainer_state.json keeps it."""

from __future__ import annotations

import pytest

from engine.run import TrainerState


@pytest.mark.parametrize(
    ("greater", "best", "at"),
    [(True, 0.5, "checkpoint-4"), (False, 0.2, "checkpoint-3")],
)
def test_the_best_of_five_evaluations(greater, best, at):
    state, better = TrainerState(), []
    for step, metric in enumerate([None, 0.4, 0.2, 0.5, float("nan")], 1):
        state.global_step = step
        better.append(state.record_evaluation(metric, greater_is_better=greater))
    assert better == (
        [False, True, False, True, False] if greater else [False, True, True] + [False] * 2
    )
    assert (state.best_metric, state.best_model_checkpoint) == (best, at)
    assert state.evaluations_without_improvement == (1 if greater else 2)


def test_what_was_never_measured_chooses_no_checkpoint():
    state = TrainerState(global_step=1)
    assert not state.record_evaluation(None, greater_is_better=True)
    assert not state.record_evaluation(None, greater_is_better=False)
    assert (state.best_metric, state.best_model_checkpoint) == (None, None)
    assert state.evaluations_without_improvement == 2
