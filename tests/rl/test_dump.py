"""Protect --dump_step.

Checked: the file is enough to compute the loss again without this project (here with numpy alone,
in fp64), and writing it changes nothing.

Run: pytest tests/rl/test_dump.py
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import rl.rollout
import run_grpo
from engine.config import UsageError
from tests.helpers.repository import ROOT
from tests.helpers.runs import (
    assert_same_run,
    equal_tensors,
    grpo,
    lines,
    read_dump,
    record,
    speak,
    train_log,
)

FAMILIES = ["qwen2_5_vl", "gemma3"]
# Rollouts of 3 prompts x 4 completions; an optimizer step is 3 micro-batches of 2 completions, so
# it holds one group and a half. The interval of the clip is so narrow that ratios lie on both sides
# of its bounds.
RAGGED = [
    "--per_device_train_batch_size",
    "2",
    "--gradient_accumulation_steps",
    "3",
    "--steps_per_generation",
    "6",
    "--mask_truncated_completions",
    "--epsilon_low",
    "0.005",
    "--epsilon_high",
    "0.008",
]
# of the 12 completions of a rollout; those left out of the loss
LENGTHS, MASKED = [6, 1, 3, 5, 2, 4, 1, 6, 2, 3, 5, 2], {2, 7}
# The terms are computed in fp32 and here in fp64 from the same fp32 inputs: a few units in the last
# place of fp32, 6e-8 relative; k3 subtracts two numbers of the size of the log-ratio to the
# reference, below 2 here, so it is right to some 2e-7 absolutely.
CLOSE = {"rtol": 1e-6, "atol": 3e-7}


@pytest.fixture
def ragged(monkeypatch):
    """Make readable completions of LENGTHS: a random model hardly ever stops by itself."""

    def cut(*arguments, **options):
        groups, number = generate(*arguments, **options), iter(range(12))
        return [
            [
                dataclasses.replace(
                    completion,
                    truncated=i in MASKED,
                    **{
                        name: getattr(completion, name)[: LENGTHS[i]]
                        for name in ("ids", "logprobs", "top_p_mass")
                    },
                )
                for completion, i in zip(group, number, strict=False)
            ]
            for group in groups
        ]

    generate = rl.rollout.generate
    monkeypatch.setattr(rl.rollout, "generate", cut)
    speak(monkeypatch)


# ---- the oracle: Eq. 2 once more, in numpy -------------------------------------------------------
def advantages_of(step: dict, settings: dict) -> np.ndarray:
    """Compute the advantages [R] in fp64."""
    rewards, groups = step["rollout/reward"], step["rollout/group"]
    found = np.zeros(len(rewards))
    for group in set(groups.tolist()):
        own = rewards[groups == group]
        divisor = {
            "none": 1.0,
            "group": own.std(ddof=1) + 1e-4,
            "batch": rewards.std(ddof=1) + 1e-4,
        }[settings["scale_rewards"]]
        if np.ptp(own) > 1e-6:
            found[groups == group] = (own - own.mean()) / divisor
    return found


def terms_of(step: dict, settings: dict) -> dict[str, np.ndarray]:
    """Compute the terms [N,T] in fp64, meaningful where the mask is true."""
    pi, pi_old = step["logprobs"].astype(float), step["old_logprobs"].astype(float)
    advantage = step["advantages"].astype(float)[:, None]
    ratio = np.exp(pi - pi_old)
    clipped = np.minimum(
        np.maximum(ratio, 1 - settings["epsilon_low"]), 1 + settings["epsilon_high"]
    )
    surrogate = (
        np.where(advantage >= 0, np.minimum(ratio, clipped), np.maximum(ratio, clipped)) * advantage
    )
    kl = np.zeros_like(pi)
    if settings["beta"] > 0:
        distance = pi - step["ref_logprobs"].astype(float)
        kl = {"k1": distance, "k2": distance**2 / 2, "k3": np.exp(-distance) + distance - 1}[
            settings["kl_estimator"]
        ]
    return {
        "log_ratio": pi - pi_old,
        "ratio": ratio,
        "clipped_ratio": clipped,
        "surrogate": surrogate,
        "kl": kl,
        "per_token_loss": settings["beta"] * kl - surrogate,
    }


def weights_of(step: dict, settings: dict) -> np.ndarray:
    """Compute the weights [N,T] in fp64.

    The file holds a whole optimizer step, so its totals are the file's.
    """
    mask = step["mask"]
    lengths = np.maximum(mask.sum(1, keepdims=True), 1)
    divisor = {
        "dr_grpo": len(mask) * settings["max_completion_length"],
        "grpo": len(mask) * lengths,
        "dapo": mask.sum(),
    }
    return mask / divisor[settings["loss_type"]]


def check(run: Path, number: int) -> tuple[dict, dict]:
    """Check the dumped step against numpy, against the run's own logs, and in its form.

    Returns what was read.
    """
    step, notes = read_dump(run / f"step-{number}.safetensors")
    settings, mask, rows = notes["settings"], step["mask"], step["rollout_row"]
    terms, weights = terms_of(step, settings), weights_of(step, settings)

    advantages = advantages_of(step, settings)
    # fp64 on both sides
    np.testing.assert_allclose(step["rollout/advantage"], advantages, rtol=0, atol=1e-12)
    np.testing.assert_allclose(step["advantages"], advantages[rows], rtol=1e-7, atol=0)
    assert {name.removeprefix("terms/") for name in step if name.startswith("terms/")} == set(terms)
    for name, expected in terms.items():
        np.testing.assert_allclose(
            step[f"terms/{name}"][mask], expected[mask], **CLOSE, err_msg=name
        )
    np.testing.assert_allclose(step["weights"], weights, rtol=1e-6, atol=0)
    assert not step["terms/per_token_loss"][~mask].any()

    token_losses = np.where(mask, weights * terms["per_token_loss"], 0)
    by_micro_batch = [
        token_losses[step["micro_batch"] == k].sum() for k in range(len(step["micro_batch_loss"]))
    ]
    scale = np.abs(token_losses).sum()  # the sum may cancel; its rounding error does not
    np.testing.assert_allclose(step["micro_batch_loss"], by_micro_batch, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(step["loss"], token_losses.sum(), rtol=0, atol=1e-6 * scale)
    # what was logged, to the last bit
    assert train_log(run)[number - 1]["loss"] == float(step["loss"])

    assert (notes["step"], notes["num_completions"], notes["num_tokens"]) == (
        number,
        len(mask),
        mask.sum(),
    )
    return step, notes


# ---- runs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_numpy_computes_the_step_again_and_dumping_changes_nothing(
    family, tiny_sft_run, tiny_data, tmp_path, ragged
):
    for name, flags in {"with": ["--dump_step", "4"], "without": []}.items():
        assert (
            grpo(
                tiny_sft_run(family),
                tiny_data,
                tmp_path / name,
                "--max_steps",
                "4",
                *RAGGED,
                *flags,
            )
            == 0
        )
    step, notes = check(tmp_path / "with", 4)
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert list((tmp_path / "with").glob("*step-*")) == [tmp_path / "with/step-4.safetensors"]
    assert not list((tmp_path / "without").glob("*step-*"))

    # Step 4 is the second half of the second rollout: neither the ratio is 1 nor the KL 0, and
    # every kind of row is there.
    assert step["rollout_row"].tolist() == [6, 7, 8, 9, 10, 11] and step[
        "micro_batch"
    ].tolist() == [0, 0, 1, 1, 2, 2]
    mask, advantages, lengths = step["mask"], step["advantages"], (step["ids"] >= 0).sum(1)
    # one may have stopped by itself
    assert (lengths <= LENGTHS[6:]).all() and len(set(lengths)) >= 4
    assert (
        mask.sum(1).tolist() == np.where([True, False, True, True, True, True], lengths, 0).tolist()
    )
    assert (
        np.abs(step["terms/ratio"][mask] - 1).max() > 0.01 and step["terms/kl"][mask].max() > 1e-3
    )
    assert (step["terms/ratio"] != step["terms/clipped_ratio"])[
        mask
    ].any() and advantages.min() < 0 < advantages.max()

    # What the oracle does not read: the rest is in the file as well, and belongs to the same
    # completions.
    shapes = {
        name: (array.shape, str(array.dtype)) for name, array in step.items() if "/" not in name
    }
    assert shapes.pop("prompt_ids")[1] == "int64" and step["prompt_ids"].shape[0] == 3
    width = max(lengths)
    assert shapes == {
        **dict.fromkeys(
            (
                "logprobs",
                "entropy",
                "weights",
                "old_logprobs",
                "ref_logprobs",
                "sampling_logprobs",
                "top_p_mass",
            ),
            ((6, width), "float32"),
        ),
        "ids": ((6, width), "int64"),
        "mask": ((6, width), "bool"),
        "advantages": ((6,), "float32"),
        "rollout_row": ((6,), "int64"),
        "micro_batch": ((6,), "int64"),
        "micro_batch_loss": ((3,), "float32"),
        "loss": ((), "float64"),
    }
    np.testing.assert_allclose(
        step["sampling_logprobs"][mask], step["old_logprobs"][mask], rtol=0, atol=1e-4
    )
    assert (step["entropy"][mask] > 0).all() and (np.abs(step["top_p_mass"][mask] - 1) < 1e-6).all()
    rows = lines(tmp_path / "with/completions.jsonl")[12:]
    assert [row["id"] for row in rows] == [
        notes["examples"][group] for group in step["rollout/group"]
    ]
    assert [row["reward"] for row in rows] == step["rollout/reward"].tolist()
    for name in ("hard", "nuanced"):
        assert [row["rewards"][name]["total"] for row in rows] == step[
            f"rollout/rewards/{name}"
        ].tolist()
    for ids, row in zip(step["ids"], step["rollout_row"], strict=True):
        assert (
            rows[row]["completion"] == "unreadable"
            if ids[0] % 4 == 0
            else f"<think>{ids[0]}<" in rows[row]["completion"]
        )
    saved = record(tmp_path / "with/config.json")["settings"]
    assert notes["settings"] == {name: entry["value"] for name, entry in saved.items()}


@pytest.mark.parametrize(
    "flags",
    [
        "--loss_type grpo --scale_rewards group --kl_estimator k2",
        "--loss_type dapo --scale_rewards batch --kl_estimator k1",
        "--beta 0 --num_iterations 2",
    ],
)
def test_numpy_follows_every_setting_of_the_objective(
    flags, tiny_sft_run, tiny_data, tmp_path, ragged
):
    flags = ["--max_steps", "4", "--dump_step", "4", *RAGGED, *flags.split()]
    assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, tmp_path, *flags) == 0
    step, notes = check(tmp_path, 4)
    assert ("ref_logprobs" in step) == (notes["settings"]["beta"] > 0)


def test_the_readmes_lines_compute_the_loss(tiny_sft_run, tiny_data, tmp_path, ragged, capsys):
    flags = [
        "--max_steps",
        "2",
        "--dump_step",
        "2",
        *RAGGED,
        "--epsilon_low",
        "0.15",
        "--epsilon_high",
        "0.22",
    ]
    assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, tmp_path, *flags) == 0
    readme = (ROOT / "rl" / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(import numpy.*?)```", readme, re.DOTALL)
    capsys.readouterr()
    exec(example.replace("runs/.../step-8", str(tmp_path / "step-2")), {})
    dumped, computed = map(float, capsys.readouterr().out.split())
    assert dumped == pytest.approx(computed, rel=1e-5) and dumped != 0


def test_a_step_whose_gradient_is_not_finite_is_dumped(
    tiny_sft_run, tiny_data, tmp_path, ragged, monkeypatch
):
    monkeypatch.setattr(run_grpo, "clip_gradients", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(RuntimeError, match="step 1 is not finite"):
        grpo(
            tiny_sft_run("qwen2_5_vl"),
            tiny_data,
            tmp_path,
            "--max_steps",
            "2",
            "--dump_step",
            "1",
            *RAGGED,
        )
    step, _ = read_dump(tmp_path / "step-1.safetensors")
    # the first update of a rollout
    assert np.array_equal(step["logprobs"][step["mask"]], step["old_logprobs"][step["mask"]])


def test_a_resumed_run_dumps_what_the_whole_run_does(tiny_sft_run, tiny_data, tmp_path, ragged):
    whole, resumed, moved = tmp_path / "whole", tmp_path / "resumed", tmp_path / "moved"
    flags = ("--max_steps", "4", "--save_steps", "1", *RAGGED)
    assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, whole, *flags, "--dump_step", "2") == 0
    run = ["--resume_from_checkpoint", str(whole / "checkpoint-1"), "--output_dir"]
    # in the middle of a rollout; the step to dump is inherited
    assert run_grpo.main([*run, str(resumed)]) == 0
    assert equal_tensors(whole / "step-2.safetensors", resumed / "step-2.safetensors")

    run[1] = str(whole / "checkpoint-2")
    with pytest.raises(
        UsageError, match="--dump_step 1: the run goes on after step 2 and does not make it again"
    ):
        run_grpo.main([*run, str(moved), "--dump_step", "1"])
    assert not moved.exists()
    assert run_grpo.main([*run, str(moved)]) == 0  # the inherited step was dumped before
    assert not list(moved.glob("step-*"))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("0", "--dump_step: expected an integer from 1 to"),
        ("5", "--dump_step 5: the run ends with step 4; name one of its steps"),
    ],
)
def test_a_step_that_never_comes_is_refused(step, message, tiny_sft_run, tiny_data, tmp_path):
    # 1 epoch of 12 prompts in rollouts of 2 prompts and 2 updates would be 12 steps;
    # --num_train_epochs 0.3 are 3.6 prompts, rounded up to 2 rollouts: 4 steps.
    with pytest.raises(UsageError, match=message):
        grpo(
            tiny_sft_run("qwen2_5_vl"),
            tiny_data,
            tmp_path / "run",
            "--num_train_epochs",
            "0.3",
            "--dump_step",
            step,
        )
    assert not (tmp_path / "run").exists()
