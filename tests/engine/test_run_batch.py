"""Protects the batch of a run over a resume: settings by hand for other numbers of ranks, what is
refused and what it names instead, records of earlier versions and damaged ones.

Run: pytest tests/engine/test_run_batch.py
"""

from __future__ import annotations

import pytest

from engine.config import Resolved, UsageError
from engine.run_batch import RunBatch, recomputed_line, settled_batch
from engine.settings import SFTConfig
from rl.settings import GRPOConfig

# 2 rows x 4 accumulated x 4 ranks = 32 rows a step
SFT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
SFT_BATCH = {"step": 32, "rollout": None, "ranks": 4, "begun": SFT}
# 8 completions x 2 accumulated x 4 ranks = 64 a step, x 6 micro-batches = 192 a rollout
GRPO = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 6,
    "num_generations": 4,
}
OF_ROLLOUT = {name: GRPO[name] for name in GRPO if name != "num_generations"}
GRPO_BATCH = {"step": 64, "rollout": 192, "ranks": 4, "begun": OF_ROLLOUT}


def record(settings: dict, batch: dict | None) -> dict:
    """Write a config.json as far as its batch goes."""
    entries = {name: {"value": value, "origin": "flag"} for name, value in settings.items()}
    return {"settings": entries} | ({} if batch is None else {"batch": batch})


def settled(settings: dict, batch: dict | None, ranks: int, **flags) -> dict:
    """Go on with a run on so many ranks, by a command with these flags -> settings that change."""
    origins = {name: "flag" if name in flags else "resumed run" for name in settings}
    changed = settled_batch(record(settings, batch), settings | flags, origins, ranks)
    assert {origin for _, origin in changed.values()} <= {
        f"recomputed for {ranks} rank{'s' * (ranks > 1)}"
    }
    return {name: value for name, (value, _) in changed.items()}


def refusal(settings: dict, batch: dict | None, ranks: int, **flags) -> list[str]:
    with pytest.raises(UsageError) as error:
        settled(settings, batch, ranks, **flags)
    return error.value.problems


def test_what_is_written_down():
    assert RunBatch.of(SFT, 4).record(4) == SFT_BATCH
    assert RunBatch.of(GRPO, 4).record(4) == GRPO_BATCH
    # two steps a rollout where nothing else is asked for: 8 x 4 x 4
    default = RunBatch.of(GRPO | {"steps_per_generation": None}, 4)
    assert (default.step, default.rollout) == (64, 128)
    assert default.begun["steps_per_generation"] is None


@pytest.mark.parametrize(
    ("ranks", "accumulated"),
    [(4, None), (1, 16), (2, 8), (8, 2), (16, 1)],  # 32 / (2 x ranks)
)
def test_rows_a_step_stay(ranks, accumulated):
    expected = {} if accumulated is None else {"gradient_accumulation_steps": accumulated}
    assert settled(SFT, SFT_BATCH, ranks) == expected


@pytest.mark.parametrize(
    ("ranks", "accumulated", "micro_batches"),
    [(1, 8, 24), (2, 4, 12), (8, 1, 3)],  # 64 / (8 x ranks), 192 / (8 x ranks)
)
def test_completions_a_step_and_a_rollout_stay(ranks, accumulated, micro_batches):
    assert settled(GRPO, GRPO_BATCH, 4) == {}
    assert settled(GRPO, GRPO_BATCH, ranks) == {
        "gradient_accumulation_steps": accumulated,
        "steps_per_generation": micro_batches,
    }


@pytest.mark.parametrize(("ranks", "accumulated"), [(1, 8), (2, 4), (8, 1)])
def test_a_rollout_of_two_steps_needs_no_number(ranks, accumulated):
    settings = GRPO | {"steps_per_generation": None}
    batch = GRPO_BATCH | {"rollout": 128, "begun": OF_ROLLOUT | {"steps_per_generation": None}}
    assert settled(settings, batch, ranks) == {"gradient_accumulation_steps": accumulated}


def test_another_micro_batch_by_hand():
    # 64 / (16 x 2) = 2 and 192 / (16 x 2) = 6, which they are; 4 ranks: 1 and 3
    assert settled(GRPO, GRPO_BATCH, 2, per_device_train_batch_size=16) == {}
    assert settled(GRPO, GRPO_BATCH, 4, per_device_train_batch_size=16) == {
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 3,
    }
    # on one rank too, as where memory is short: 2 x 16
    one = {"step": 32, "rollout": None, "ranks": 1, "begun": SFT}
    assert settled(SFT, one, 1, per_device_train_batch_size=1) == {
        "gradient_accumulation_steps": 32
    }
    # a group may lie on one rank in two micro-batches
    assert settled(GRPO, GRPO_BATCH, 4, per_device_train_batch_size=2) == {
        "gradient_accumulation_steps": 8,
        "steps_per_generation": 24,
    }


def test_numbers_by_hand_are_taken_where_their_products_are_the_runs():
    by_hand = {"gradient_accumulation_steps": 4, "steps_per_generation": 12}
    assert settled(GRPO, GRPO_BATCH, 2, **by_hand) == {}
    assert refusal(GRPO, GRPO_BATCH, 2, gradient_accumulation_steps=3) == [
        "--gradient_accumulation_steps 3: the resumed run has 64 completions an optimizer step,"
        " which is --gradient_accumulation_steps 4 with --per_device_train_batch_size 8 on 2 ranks;"
        " leave it out, or start a new run"
    ]
    by_hand = {"gradient_accumulation_steps": 4, "steps_per_generation": 8}
    assert refusal(GRPO, GRPO_BATCH, 2, **by_hand) == [
        "--steps_per_generation 8: the resumed run has 192 completions a rollout, which is"
        " --steps_per_generation 12 with --per_device_train_batch_size 8 on 2 ranks; leave it out,"
        " or start a new run"
    ]
    assert (
        "has 32 rows an optimizer step"
        in refusal(SFT, SFT_BATCH, 4, gradient_accumulation_steps=5)[0]
    )


def test_the_command_that_began_the_run_goes_on_with_it_again_and_again():
    """Its numbers are those of its first ranks, and mean the run."""
    # begun on 4 ranks, then on 2: the record has 4 and 12 by now
    now = GRPO | {"gradient_accumulation_steps": 4, "steps_per_generation": 12}
    for ranks, numbers in ((1, (8, 24)), (2, (4, 12)), (8, (1, 3))):
        found = settled(now, GRPO_BATCH | {"ranks": 2}, ranks, **OF_ROLLOUT)
        assert tuple(found.values()) == numbers
    # on 4 again, as it stands
    assert settled(now, GRPO_BATCH | {"ranks": 2}, 4, **OF_ROLLOUT) == {}
    assert settled(now, GRPO_BATCH | {"ranks": 2}, 2) == {}


@pytest.mark.parametrize(
    ("ranks", "remedies"),
    [
        # 64 / 3 is no whole number, so no micro-batch helps
        (3, "start 2 or 4 ranks"),
        # 64 / 16 = 4, one group, but no micro-batch of 8; of 4 it is
        (16, "start 8 ranks, or give --per_device_train_batch_size 4"),
        (32, "start 8 ranks"),  # 2 completions a rank are no group
    ],
)
def test_ranks_that_do_not_divide_are_refused_with_what_does(ranks, remedies):
    assert refusal(GRPO, GRPO_BATCH, ranks) == [
        f"the resumed run has 64 completions an optimizer step, which {ranks} ranks cannot divide"
        " into micro-batches of --per_device_train_batch_size 8 and groups of --num_generations 4:"
        f" {remedies}"
    ]


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "remedies"),
    [
        (3, 2, "start 2 or 4 ranks"),
        (32, 2, "start 16 ranks, or give --per_device_train_batch_size 1"),
        (2, 6, "give --per_device_train_batch_size 4 or 8"),  # 16 rows a rank; 32 / 6 never
        (1, 5, "give --per_device_train_batch_size 4 or 8"),
        (3, 5, "start 2 ranks with --per_device_train_batch_size 4"),  # neither alone helps
    ],
)
def test_rows_that_do_not_divide(ranks, micro_batch, remedies):
    assert refusal(SFT, SFT_BATCH, ranks, per_device_train_batch_size=micro_batch) == [
        f"the resumed run has 32 rows an optimizer step, which {ranks} rank{'s' * (ranks > 1)}"
        f" cannot divide into micro-batches of --per_device_train_batch_size {micro_batch}:"
        f" {remedies}"
    ]


def test_a_record_of_an_earlier_version_is_one_ranks():
    # 2 x 4 = 8 rows; 8 x 2 = 16 completions, 48 a rollout
    assert settled(SFT, None, 1) == {}
    assert settled(SFT, None, 4) == {"gradient_accumulation_steps": 1}
    assert settled(GRPO, None, 2) == {"gradient_accumulation_steps": 1, "steps_per_generation": 3}
    batch = RunBatch.saved_in(record(GRPO, None))
    assert batch is not None and (batch.step, batch.rollout, batch.begun) == (16, 48, OF_ROLLOUT)


@pytest.mark.parametrize(
    "damaged",
    [
        {"settings": {}},
        {"settings": []},
        record(SFT | {"per_device_train_batch_size": "2"}, None),
        record(SFT | {"gradient_accumulation_steps": 0}, None),
        record(SFT, {}) | {"batch": [1]},
        record(SFT, SFT_BATCH | {"step": 0}),
        record(SFT, SFT_BATCH | {"step": "32"}),
        record(SFT, SFT_BATCH | {"rollout": 3}),
        record(SFT, SFT_BATCH | {"begun": {"gradient_accumulation_steps": True}}),
        record(SFT, {"step": 32}),
    ],
)
def test_a_damaged_record_has_no_batch(damaged):
    assert RunBatch.saved_in(damaged) is None
    assert settled_batch(damaged, SFT, dict.fromkeys(SFT, "flag"), 2) == {}


def test_settings_that_are_no_counts_are_left_to_their_own_check():
    for name in SFT:
        assert settled(SFT, SFT_BATCH, 2, **{name: 0}) == {}


def test_the_line_at_the_start():
    def line(config, ranks: int, **changed) -> str | None:
        origins = {name: "default" for name in vars(config)}
        resolved = Resolved((config,), origins)
        for name, value in changed.items():
            resolved = resolved.with_value(name, value, f"recomputed for {ranks} ranks")
        return recomputed_line(resolved, ranks)

    sft = SFTConfig(per_device_train_batch_size=2)
    assert line(sft, 2) is None
    assert line(sft, 2, gradient_accumulation_steps=8) == (
        "goes on with 2 ranks: --gradient_accumulation_steps 8, so that an optimizer step keeps its"
        " 32 rows"
    )
    grpo = GRPOConfig(per_device_train_batch_size=8)
    assert line(grpo, 2, gradient_accumulation_steps=4, steps_per_generation=12) == (
        "goes on with 2 ranks: --gradient_accumulation_steps 4, --steps_per_generation 12, so that"
        " an optimizer step keeps its 64 completions"
    )
