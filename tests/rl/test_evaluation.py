"""Protect what an evaluation hands to conditions, the log and the choice of the best checkpoint.

Run: pytest tests/rl/test_evaluation.py
"""

from __future__ import annotations

import pytest

from data.predictions import Prediction
from engine.run import TrainerState
from engine.tracking import RunLogger
from eval.scores import evaluated_metrics
from rl.evaluation import record_evaluation, with_rewards
from rl.rewards import HardReward
from rl.settings import GAPS, SET_METRICS

SCORES = {
    "macro": {"f1": 0.4},
    "micro": {"f1": 0.5},
    "jaccard": 0.6,
    "fail_rate": 0.1,
    "invalid_rate": 0.2,
    "unknown_rate": 0.3,
    "no_label_rate": 0.05,
    "unknown_kinds": {"negated": 3, "affirmed": 0, "qualified": 0, "other": 1},
    "completion_length": {"mean": 25.5, "max": 40},
    "silenced_labels": ["Edema", "Fracture"],
    "reward": 0.55,
    "rewards/hard/mean": 0.55,
    "rewards/nuanced/mean": 61.0,
    "rewards/weighted/mean": 0.5,
    "rewards/fbeta/mean": 0.7,
    "n": 100,
}


def test_what_is_evaluated_is_a_number_of_each_name():
    found = evaluated_metrics(SCORES)
    assert found.keys() == set(SET_METRICS)
    assert found["silenced_labels"] == 2  # their number: conditions compare numbers
    assert (found["macro_f1"], found["micro_f1"], found["completion_length"]) == (0.4, 0.5, 25.5)
    assert (found["unknown_rate"], found["no_label_rate"]) == (0.3, 0.05)


@pytest.mark.parametrize(("length_of", "total"), [("text", 0.9), ("completion", 1.0)])
def test_eq_3_counts_the_tokens_of_the_setting_in_evaluation_too(length_of, total):
    # an exact answer of 250 tokens, 20 of them text
    row = {
        "id": "e1",
        "patient_id": "p1",
        "dataset": "site",
        "labels": ["Edema"],
        "evaluated_labels": ["Edema", "Fracture"],
        "completion": "<think>a</think><solution>Edema</solution>" + "\n" * 230,
        "completion_length": 250,
        "text_length": 20,
    }
    predictions, means = with_rewards(
        [Prediction.from_row(row)], {"hard": HardReward(scale=4.0)}, "hard", length_of
    )
    assert predictions[0].extra["rewards"]["hard"]["total"] == total
    # in the reward's own units, and as it is trained on
    assert means == {"rewards/hard/mean": total, "reward": 4 * total}


FAULTS = ("fail_rate", "invalid_rate", "unknown_rate", "no_label_rate", "silenced_labels")
OF_ALL_SETS = ("gap", "gap_se", "gap_shared", "gap_shared_se", "gain_shared_se")


@pytest.mark.parametrize(
    "chosen, best",
    [
        *((f"site/{metric}", (0.1, "checkpoint-2")) for metric in FAULTS),
        *((gap, (0.1, "checkpoint-2")) for gap in OF_ALL_SETS),
        ("site/macro_f1", (0.3, "checkpoint-1")),
        ("gain_shared", (0.3, "checkpoint-1")),
        ("site/macro_f1 - gap", (0.0, "checkpoint-1")),  # a trade-off is made large: all are 0
    ],
)
def test_less_of_a_fault_or_of_a_gap_is_better_and_more_of_a_score(tmp_path, chosen, best):
    state, log = TrainerState(), RunLogger(tmp_path)
    for state.global_step, value in ((1, 0.3), (2, 0.1), (3, 0.2)):
        metrics = {"site": dict.fromkeys(SET_METRICS, value)}
        record_evaluation(metrics, dict.fromkeys(GAPS, value), log, state, chosen)
    log.close()
    assert (state.best_metric, state.best_model_checkpoint) == best
