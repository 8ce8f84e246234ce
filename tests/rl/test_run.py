"""Protect the books of a GRPO run.

Checked: they hold no model, a rollout that fails leaves rewards, monitors and numbers as they were,
and block 5 gets what forks ask for.

Run: pytest tests/rl/test_run.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import run_grpo
from data.files import DataError
from engine.checkpoint import CheckpointError
from engine.run import RunFolder, Schedule, TrainerState
from engine.runtime import SignalGuard, StepFailed, StopRequested
from engine.tracking import RunLogger
from rl.monitors import Monitors
from rl.objective import ObjectiveConfig
from rl.rewards import HardReward, NuancedReward
from rl.rollout import Rollouts
from rl.run import Computed, GRPORun, restore_rollouts, saved_rollouts
from rl.samples import MicroBatch, collate_samples
from rl.settings import GRPOConfig
from tests.helpers.books import held_by
from tests.helpers.rollouts import CPU, example, prompt_of, sample
from tests.helpers.runs import grpo, lines, speak


def test_a_real_run_of_both_kinds_of_updates(tiny_sft_run, tiny_data, tmp_path, monkeypatch):
    """Protects that the run holds no model, and that A_i is computed once a rollout, of the whole
    rollout, with the KL of each completion and the whole configuration.
    """
    given: list[dict[str, Any]] = []
    found: list[tuple[GRPORun, Rollouts, ObjectiveConfig]] = []
    train, group_advantages = run_grpo.train, run_grpo.group_advantages

    def trained(run, policy, optimizer, rollouts, objective, config):
        found.append((run, rollouts, objective))
        return train(run, policy, optimizer, rollouts, objective, config)

    def computed(rewards, groups, scale_rewards, **more):
        rollouts = found[0][1]
        assert torch.equal(more["kl"], rollouts.kl) and rewards.dtype == torch.float64
        given.append({"scale": scale_rewards, "rewards": rewards, "groups": groups} | more)
        return group_advantages(rewards, groups, scale_rewards, **more)

    speak(monkeypatch)
    monkeypatch.setattr(run_grpo, "train", trained)
    monkeypatch.setattr(run_grpo, "group_advantages", computed)
    flags = ["--max_steps", "5", "--scale_rewards", "group"]  # of rollouts of two steps
    assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, tmp_path / "run", *flags) == 0
    ((run, rollouts, objective),) = found
    assert type(run) is GRPORun and run.step == 5
    assert held_by(run) == []
    assert len(given) == 3
    rows = lines(tmp_path / "run/completions.jsonl")
    for i, call in enumerate(given):
        own = rows[8 * i : 8 * (i + 1)]
        assert call["config"] is objective and call["scale"] == "group"
        assert call["rewards"].tolist() == [row["reward"] for row in own]
        assert call["groups"].tolist() == [row["group"] for row in own] == [0] * 4 + [1] * 4
        advantages = group_advantages(
            call["rewards"], call["groups"], "group", kl=call["kl"], config=objective
        )
        assert advantages.tolist() == [row["advantage"] for row in own]
    assert not given[0]["kl"].abs().max() > 1e-4 and given[2]["kl"].abs().max() > 1e-4
    assert any(row["advantage"] for row in rows)


# ---- books by hand -------------------------------------------------------------------------------
@pytest.fixture
def opened(tmp_path) -> Iterator[Callable[..., tuple[GRPORun, Rollouts, list[dict]]]]:
    """Open runs: `opened(...)` -> (run, rollouts, what its checkpoints hold beside the weights).

    settings: fields of GRPOConfig.
    """
    logs = []

    def make(**settings: Any) -> tuple[GRPORun, Rollouts, list[dict]]:
        values = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": 2,
            "num_generations": 2,
        }
        config = GRPOConfig(**values | settings)
        rewards = {"hard": HardReward(), "nuanced": NuancedReward({}, window=9, min_window=1)}
        rollouts = Rollouts([example(f"e{i}") for i in range(4)], rewards, config)
        monitors = Monitors("hard", 8)
        log, saved = RunLogger(tmp_path), []
        logs.append(log)
        run = GRPORun(
            RunFolder(tmp_path, log, SignalGuard(), "grpo"),
            TrainerState(),
            Schedule(4, config.logging_steps, None, None),
            rollouts,
            monitors,
            save=lambda: saved.append(saved_rollouts(rollouts, monitors, run.step)["records"]),
            evaluate=lambda: None,
        )
        return run, rollouts, saved

    yield make
    for log in logs:
        log.close()


def fill(rollouts: Rollouts, *rewards: float) -> None:
    """Put a rollout of two completions a prompt at hand."""
    rollouts.samples = [sample(i // 2, reward) for i, reward in enumerate(rewards)]
    rollouts.prompts = [prompt_of(1 + i // 2) for i in range(0, len(rewards), 2)]
    rollouts.examples = [example(f"e{i // 2}") for i in range(0, len(rewards), 2)]


def rolled_out(run: GRPORun, rollouts: Rollouts, *rewards: float) -> None:
    """Do what a rollout does to whatever remembers: draw, observe, log."""
    torch.rand(3)  # as a fork may
    fill(rollouts, *rewards)
    for function in rollouts.reward_functions.values():
        function.observe(
            [one.answer for one in rollouts.samples], [one.group for one in rollouts.samples]
        )
    run.log_rollout(rollouts)


@pytest.mark.parametrize(
    "error, at_once", [(StopRequested, False), (StepFailed, False), (KeyboardInterrupt, True)]
)
def test_a_server_is_not_waited_for_after_a_second_interrupt(opened, error, at_once):
    run, rollouts, saved = opened()
    closed: list[tuple[bool, bool]] = []
    rollouts.server = SimpleNamespace(
        close=lambda at_once=False: closed.append((at_once, bool(saved)))
    )
    with suppress(KeyboardInterrupt, StepFailed), run:
        assert run.goes_on()
        raise error
    assert closed == [(at_once, not at_once)]  # the state comes first


def test_a_rollout_that_fails_is_as_if_it_had_not_begun(opened):
    run, rollouts, saved = opened()
    before = torch.get_rng_state()
    with pytest.raises(DataError), run:
        assert run.goes_on()
        rolled_out(run, rollouts, 1.0, 0.0, 0.5, 0.5)
        assert run.monitors.num_seen == 4 and not torch.equal(before, torch.get_rng_state())
        raise DataError("a damaged image")
    (records,) = saved
    assert records["rollout.json"] == []
    assert records["rewards.json"] == {"hard": {}, "nuanced": {"images": []}}
    assert records["monitors.json"]["num_seen"] == 0 and records["monitors.json"]["window"] == []
    assert torch.equal(before, torch.get_rng_state())


def test_an_update_that_fails_keeps_the_rollout_it_learns_from(opened):
    run, rollouts, saved = opened()
    with pytest.raises(DataError), run:
        assert run.goes_on()
        rolled_out(run, rollouts, 1.0, 0.0, 0.5, 0.5)
        after = torch.get_rng_state()
        run.step_done(epoch=0.0, shown={})
        assert run.goes_on()
        raise DataError("a damaged image")
    (records,) = saved
    assert [row["reward"] for row in records["rollout.json"]] == [1.0, 0.0, 0.5, 0.5]
    # two images, with two predictions each
    assert [len(image) for image in records["rewards.json"]["nuanced"]["images"]] == [2, 2]
    assert records["monitors.json"]["num_seen"] == 4
    assert torch.equal(after, torch.get_rng_state())


def micro_of(rollouts: Rollouts, rows: list[int]) -> MicroBatch:
    return collate_samples([rollouts.samples[i] for i in rows], rollouts.prompts, 0, CPU)


def test_what_a_micro_batch_leaves_has_no_graph(opened):
    _, rollouts, _ = opened()
    fill(rollouts, 1.0, 0.0)
    micro = micro_of(rollouts, [0, 1])
    logprobs = torch.full((2, 2), -1.0, requires_grad=True)
    parts = logprobs.sum(), logprobs * 1, logprobs * 2, torch.ones(2, 2), {"kl": logprobs * 3}
    kept = Computed.of(*parts, micro)
    tensors = [kept.loss, kept.logprobs, kept.entropy, kept.weights, *kept.terms.values()]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert kept.terms["kl"].tolist() == [[-3.0, -3.0]] * 2 and float(kept.loss) == -4.0
    assert kept.advantages is micro.advantages and kept.mask is micro.mask


def computed_of(rollouts: Rollouts, rows: list[int], loss: float, entropy: float) -> Computed:
    micro = micro_of(rollouts, rows)
    zeros = torch.zeros_like(micro.sampling_logprobs)
    terms = {
        "log_ratio": zeros,
        "ratio": zeros + 1,
        "clipped_ratio": zeros + 1,
        "surrogate": zeros,
        "kl": zeros,
        "per_token_loss": zeros,
    }
    return Computed.of(torch.tensor(loss), zeros, zeros + entropy, zeros, terms, micro)


def test_a_step_is_logged_over_its_micro_batches(opened, monkeypatch):
    monkeypatch.setattr("rl.run.show_samples", lambda *_: None)  # there is no image
    run, rollouts, _ = opened()
    assert run.goes_on()
    rolled_out(run, rollouts, 1.0, 0.0, 0.5, 0.5)
    rollouts.samples[3].mask = torch.zeros(2, dtype=torch.bool)
    micro_batches = [[0, 1], [2, 3]]
    parts = [
        computed_of(rollouts, rows, loss, entropy)
        for rows, loss, entropy in zip(micro_batches, (0.25, 0.5), (1.0, 4.0), strict=True)
    ]
    run.log_update(parts, micro_batches, rollouts, ObjectiveConfig())
    run.finish_step(rollouts, 0.75, torch.tensor(3.0), 1e-3)
    assert run.goes_on()
    run.log_update(parts[:1], micro_batches[:1], rollouts, ObjectiveConfig())
    run.finish_step(rollouts, 0.25, torch.tensor(2.0), 1e-3)
    first, second = lines(run.folder / "metrics.jsonl")
    assert (first["step"], first["loss"], first["grad_norm"]) == (1, 0.75, 3.0)
    assert first["entropy"] == pytest.approx((4 * 1.0 + 2 * 4.0) / 6)  # over tokens in the loss
    assert (second["loss"], second["grad_norm"], second["entropy"]) == (0.25, 2.0, 1.0)
    # 2 tokens each of four completions, once a rollout, and prompts of 1, 1, 2 and 2 tokens
    assert first["num_tokens"] == second["num_tokens"] == run.state.num_tokens == 8 + 6
    # the rollout itself, and how far the sampler is from it, are of its first step alone
    for name in ("reward", "time/rollout", "sampling/sampling_logp_difference/mean"):
        assert name in first and name not in second
    assert (first["epoch"], second["epoch"]) == (0.25, 0.5)  # 2 of 4 prompts in two steps
    rows = lines(run.folder / "completions.jsonl")
    assert [(row["step"], row["reward"]) for row in rows] == [
        (1, 1.0),
        (1, 0.0),
        (1, 0.5),
        (1, 0.5),
    ]


def test_a_condition_ends_the_run(opened):
    run, _, _ = opened()
    assert run.stopped is None and run.goes_on()
    run.step_done(epoch=0.0, shown={})
    run.monitors.stopped = "kl > 1"
    assert run.stopped == "kl > 1" and not run.goes_on()


def test_a_checkpoint_of_an_earlier_version_is_refused(opened):
    """Monitors that remember no images were saved before rewards and monitors counted images."""
    run, rollouts, _ = opened()
    files = {"rollout.json": [], "monitors.json": {"window": [], "num_seen": 0}}
    checkpoint = SimpleNamespace(path=Path("runs/old/checkpoint-3"), record=files.__getitem__)
    with pytest.raises(
        CheckpointError, match="^runs/old/checkpoint-3: saved by an earlier version"
    ):
        restore_rollouts(checkpoint, rollouts, run.monitors, str)
