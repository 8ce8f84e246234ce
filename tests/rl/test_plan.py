"""Protects the batch arithmetic of GRPO: how prompts, completions, micro-batches and optimizer
steps relate, which batches are refused, and what the banner says. Run: pytest tests/rl/test_plan.py
"""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.plan import BatchPlan, total_steps
from rl.settings import GRPOConfig, grpo_problems

# 10 micro-batches of 2 completions are 20, of 5 prompts x 4. A step takes 5 micro-batches, so a
# pass over the rollout is 2 steps, and 2 passes are 4.
PLAN = BatchPlan(
    micro_batch=2,
    accumulation=5,
    micro_batches=10,
    group=4,
    iterations=2,
    epochs=1.0,
    max_steps=None,
)


def changed(**counts) -> BatchPlan:
    return dataclasses.replace(PLAN, **counts)


def test_counts_by_hand():
    assert (PLAN.completions, PLAN.prompts, PLAN.updates) == (20, 5, 4)
    assert PLAN.problems() == []


def test_the_settings_are_taken_over():
    config = GRPOConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=5,
        steps_per_generation=20,
        num_generations=4,
        num_iterations=3,
        num_train_epochs=1.5,
        max_steps=7,
    )
    assert dataclasses.astuple(BatchPlan.of(config)) == (2, 5, 20, 4, 3, 1.5, 7, 1)
    assert dataclasses.astuple(BatchPlan.of(config, 8)) == (2, 5, 20, 4, 3, 1.5, 7, 8)
    # two steps a rollout where nothing else is asked for
    by_default = dataclasses.replace(config, steps_per_generation=None)
    assert BatchPlan.of(by_default).micro_batches == 10


@pytest.mark.parametrize(
    ("examples", "epochs", "steps"),
    [
        # rounded up, so that an epoch sees every prompt
        (15, 1.0, 3 * 4),  # 15 / 5 = 3 rollouts
        (16, 1.0, 4 * 4),  # 3.2
        (16, 2.0, 7 * 4),  # 6.4
        (18, 1.0, 4 * 4),  # 3.6
        (16, 0.25, 1 * 4),  # 0.8
        (2, 1.0, 1 * 4),  # 0.4
        (50, 1.1, 11 * 4),  # in floats 1.1 x 50 / 5 = 11.000000000000002
        (50, 1.11, 12 * 4),  # 11.1
    ],
)
def test_steps_of_so_many_epochs_are_whole_rollouts(examples, epochs, steps):
    assert changed(epochs=epochs).total_steps(examples) == steps
    assert changed(epochs=epochs, max_steps=7).total_steps(examples) == 7


@pytest.mark.parametrize(
    ("epochs", "rollouts"),
    [(1.0, 63), (0.5, 32), (2.0, 125)],  # 62.5, 31.25, 125
)
def test_a_thousand_prompts_at_sixteen_a_rollout(epochs, rollouts):
    plan = changed(micro_batch=32, accumulation=1, micro_batches=2, iterations=1, epochs=epochs)
    assert plan.prompts == 16 and plan.total_steps(1000) == rollouts * 2


@pytest.mark.parametrize(
    ("accumulation", "micro_batches", "nearest"),
    [
        (4, 10, "8, 12"),
        (4, 7, "4, 8"),
        (4, 3, "4"),  # 0 is none
    ],
)
def test_a_rollout_that_ends_within_a_step_is_refused(accumulation, micro_batches, nearest):
    plan = changed(micro_batch=4, accumulation=accumulation, micro_batches=micro_batches)
    assert plan.problems() == [
        f"--steps_per_generation {micro_batches} does not divide into optimizer steps of"
        f" --gradient_accumulation_steps {accumulation}; the nearest that do: {nearest}"
    ]


@pytest.mark.parametrize(
    ("micro_batch", "micro_batches", "group", "completions", "nearest"),
    [
        (3, 2, 4, 6, "2, 4"),  # with 2 micro-batches even sizes fit
        (7, 2, 4, 14, "6, 8"),
        (1, 2, 4, 2, "2"),  # nothing smaller fits
        (5, 1, 4, 5, "4, 8"),
        (3, 1, 4, 3, "4"),
        (5, 2, 6, 10, "3, 6"),
    ],
)
def test_a_rollout_that_parts_a_group_is_refused(
    micro_batch, micro_batches, group, completions, nearest
):
    plan = changed(
        micro_batch=micro_batch, accumulation=1, micro_batches=micro_batches, group=group
    )
    assert plan.problems() == [
        f"a rollout of --per_device_train_batch_size {micro_batch} x {micro_batches} micro-batches"
        f" = {completions} completions does not divide into groups of --num_generations {group};"
        f" the nearest --per_device_train_batch_size that do: {nearest}"
    ]


def test_two_problems_are_two_lines():
    assert len(changed(micro_batch=3, accumulation=4, group=4).problems()) == 2


def test_the_banner_by_hand():
    # 12 steps of 4 a rollout: 3 rollouts of 5 prompts and 20 completions; 15 of 15 prompts
    assert PLAN.lines(15, "nuanced") == [
        "rollout     5 prompts x 4 completions = 20 completions, 4 optimizer steps each",
        "batch       2 completions x 5 accumulated = 10 an optimizer step",
        "run         12 optimizer steps = 3 rollouts = 15 prompts (1.00 epochs) = 60 completions;"
        " trained on the nuanced reward",
    ]
    # 16 of 5 a rollout: 4 rollouts, which see 4 prompts a second time
    assert PLAN.lines(16, "hard")[2] == (
        "run         16 optimizer steps = 4 rollouts = 20 prompts (1.25 epochs: 1 rounded up to"
        " whole rollouts) = 80 completions; trained on the hard reward"
    )
    # in floats 1.1 x 50 = 55.00000000000001: nothing was rounded up
    assert "55 prompts (1.10 epochs) = " in changed(epochs=1.1).lines(50, "hard")[2]
    # 7 steps end in the middle of a second rollout, which is sampled whole
    assert changed(max_steps=7).lines(16, "hard")[2] == (
        "run         7 optimizer steps = 2 rollouts = 10 prompts (0.62 epochs) = 40 completions;"
        " trained on the hard reward"
    )


# ---- several ranks -------------------------------------------------------------------------------
# 4 ranks, each with 2 micro-batches of 8 completions a step: 8 x 2 x 4 = 64 a step. A rollout has 6
# micro-batches a rank: 8 x 6 x 4 = 192 completions of 48 prompts, for 3 steps.
FOUR = BatchPlan(
    micro_batch=8,
    accumulation=2,
    micro_batches=6,
    group=4,
    iterations=2,
    epochs=1.0,
    max_steps=None,
    ranks=4,
)


def test_counts_of_four_ranks_by_hand():
    assert (FOUR.per_rank, FOUR.per_step, FOUR.completions) == (16, 64, 192)
    assert (FOUR.prompts, FOUR.updates, FOUR.problems()) == (48, 6, [])
    assert FOUR.total_steps(96) == 12  # two rollouts, of three steps and twice
    assert FOUR.total_steps(97) == 18
    assert total_steps(GRPOConfig(num_train_epochs=1.0), 32, 8) == 2  # 8 x 2 x 8 = 32 prompts
    assert total_steps(GRPOConfig(num_train_epochs=1.0), 33, 8) == 4
    assert total_steps(GRPOConfig(num_train_epochs=1.0), 33) == 18  # 4 prompts a rollout of 2 steps


def test_shares_of_four_ranks_by_hand():
    assert [FOUR.own(0, rank) for rank in range(4)] == [
        range(0, 16),
        range(16, 32),
        range(32, 48),
        range(48, 64),
    ]
    assert FOUR.own(1, 0) == range(64, 80) and FOUR.own(2, 3) == range(176, 192)
    # the second pass over the rollout takes the same
    assert FOUR.own(3, 1) == FOUR.own(0, 1) and FOUR.own(5, 3) == FOUR.own(2, 3)
    # one rank takes the whole step, of whatever size
    assert [PLAN.own(update, 0) for update in range(3)] == [
        range(0, 10),
        range(10, 20),
        range(0, 10),
    ]


@given(
    ranks=st.integers(1, 8),
    micro_batch=st.integers(1, 12),
    accumulation=st.integers(1, 6),
    steps=st.integers(1, 4),
    group=st.integers(2, 6),
    iterations=st.integers(1, 3),
)
def test_the_shares_of_all_ranks_are_every_step_in_order_and_of_whole_groups(
    ranks, micro_batch, accumulation, steps, group, iterations
):
    plan = BatchPlan(
        micro_batch, accumulation, steps * accumulation, group, iterations, 1.0, None, ranks
    )
    if plan.problems():
        # the very sizes that do not divide
        whole = accumulation if ranks > 1 else steps * accumulation
        assert micro_batch * whole % group
        return
    shares = [[plan.own(update, rank) for rank in range(ranks)] for update in range(plan.updates)]
    for update in range(iterations):
        of_a_pass = shares[update * steps : (update + 1) * steps]
        indices = [i for of_step in of_a_pass for share in of_step for i in share]
        assert indices == list(range(plan.prompts * group))
    assert {sum(map(len, of_step)) for of_step in shares} == {plan.per_step}
    if ranks > 1:
        assert all(share.start % group == 0 == len(share) % group for s in shares for share in s)


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "group", "completions", "nearest"),
    [
        (6, 1, 4, 6, "4, 8"),
        (2, 1, 4, 2, "4"),  # nothing smaller fits
        (3, 2, 4, 6, "2, 4"),  # with 2 accumulated even sizes fit
        (9, 1, 4, 9, "8, 12"),
    ],
)
def test_a_rank_that_parts_a_group_is_refused(
    micro_batch, accumulation, group, completions, nearest
):
    plan = dataclasses.replace(
        FOUR,
        micro_batch=micro_batch,
        accumulation=accumulation,
        micro_batches=4 * accumulation,
        group=group,
    )
    # the rollout as a whole would divide
    assert plan.completions % group == 0
    assert plan.problems() == [
        f"--per_device_train_batch_size {micro_batch} x --gradient_accumulation_steps"
        f" {accumulation} = {completions} completions, which each of the 4 ranks takes of a step,"
        f" do not divide into groups of --num_generations {group}; the nearest"
        f" --per_device_train_batch_size that do: {nearest}"
    ]
    assert dataclasses.replace(plan, ranks=1, micro_batches=4 * accumulation).problems() == []


def test_a_command_line_is_checked_with_the_ranks_that_torchrun_started(monkeypatch):
    config, objective = GRPOConfig(train_file=("x",), per_device_train_batch_size=2), None
    assert grpo_problems(config, objective) == []
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (ranks | {"MASTER_ADDR": "here", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    (problem,) = grpo_problems(config, objective)
    assert "= 2 completions, which each of the 2 ranks takes" in problem


def test_the_banner_of_four_ranks_by_hand():
    assert FOUR.lines(96, "hard") == [
        "rollout     48 prompts x 4 completions = 192 completions, 6 optimizer steps each",
        "batch       8 completions x 2 accumulated x 4 ranks = 64 an optimizer step",
        "run         12 optimizer steps = 2 rollouts = 96 prompts (1.00 epochs) = 384 completions;"
        " trained on the hard reward",
    ]


def test_a_plan_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.group = 8  # type: ignore[misc]  # that is the test
