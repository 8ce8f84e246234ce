"""Hand the checks of the objective to tests that run them on other objectives.

These are broken ones (test_breaks.py) and forks (test_forks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.helpers.cases import open_case


@pytest.fixture(scope="session")
def checks() -> dict[str, Callable[[Any], None]]:
    """Give tests of test_objective.py and test_objective_properties.py as functions of a module.

    A check raises AssertionError where the module that it is given fails it. The key is the test's
    name, with its parameter where it has one.
    """
    # Here and not at the top: a mutation run replaces rl.objective after this file was imported.
    from tests.rl import test_objective as by_hand
    from tests.rl import test_objective_properties as properties

    cases = (
        by_hand.test_p01_advantages,
        by_hand.test_p02_zero_variance,
        by_hand.test_p03_clip,
        by_hand.test_p04_kl_estimators,
        by_hand.test_p05_full_loss,
        by_hand.test_p08_microbatches,
        by_hand.test_p10_truncated_importance_sampling,
        by_hand.test_p22_groups_by_id,
    )
    plain = (
        by_hand.test_toy_terms,
        by_hand.test_toy_loss_and_gradient,
        by_hand.test_toy_metrics,
        by_hand.test_clip_extremes_are_over_completions,
        by_hand.test_a_forks_own_term_is_logged,
        by_hand.test_toy_advantages,
        by_hand.test_toy_hospitals,
        by_hand.test_a_hospital_alone_is_scaled_by_nothing,
        by_hand.test_a_hospitals_completions_without_a_reward_do_not_count,
        by_hand.test_defaults_are_the_papers,
        properties.test_k3_in_float32_is_precise_and_not_negative,
        properties.test_masked_slots_carry_no_loss,
    )
    found = {check.__name__: partial(check, case=open_case) for check in cases} | {
        check.__name__: check for check in plain
    }
    for scale in properties.SCALES:
        for check in (
            properties.test_equal_rewards_give_exactly_zero,
            properties.test_nan_rewards_are_left_out,
        ):
            found[f"{check.__name__}[{scale}]"] = partial(check, scale_rewards=scale)
    masked, read = (
        properties.test_masked_slots_change_nothing,
        properties.test_metrics_read_real_tokens_only,
    )
    found[masked.__name__] = partial(masked, names=properties.TOKEN_INPUTS, garbage=float("nan"))
    found |= {
        f"{read.__name__}[{garbage}]": partial(read, garbage=garbage) for garbage in (0.1, 9.0)
    }
    without_tokens, empty = (
        properties.test_a_completion_without_tokens,
        properties.test_a_batch_without_tokens_is_zero,
    )
    for loss_type in properties.LOSS_TYPES:
        found[f"{without_tokens.__name__}[{loss_type}]"] = partial(
            without_tokens, loss_type=loss_type
        )
        found[f"{empty.__name__}[{loss_type}]"] = partial(empty, loss_type=loss_type, num_tokens=0)
    micro_batches = properties.test_micro_batches_add_up
    return found | {micro_batches.__name__: partial(micro_batches, loss_type="dapo")}
