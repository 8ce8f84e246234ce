"""Protect runs, finished or not, that a larger --max_steps or --num_train_epochs makes longer.

Run: pytest tests/scripts/test_longer.py
"""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path

import pytest

import engine.saving
import run_grpo
import run_sft
from engine.config import UsageError
from engine.longer import is_shorter
from tests.helpers.kills import killed_at
from tests.helpers.runs import (
    adapter,
    assert_same_run,
    grpo,
    largest_difference,
    lines,
    record,
    sft,
    snapshot,
    speak,
    train_log,
    write_rows,
)

# 12 rows: 2 steps an epoch
SFT_FLAGS = ("--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2")


@pytest.fixture(autouse=True, scope="module")
def readable():
    with pytest.MonkeyPatch.context() as monkeypatch:
        speak(monkeypatch)
        yield


@pytest.fixture(scope="module")
def few(tiny_data) -> Path:
    return write_rows(tiny_data.with_name("few-longer.jsonl"), lines(tiny_data)[:3])


@pytest.fixture(scope="module")
def start_sft(tiny_checkpoint, tiny_data, few):
    flags = ("--validation_file", f"a={few}", *SFT_FLAGS)
    return partial(sft, tiny_checkpoint("qwen2_5_vl"), tiny_data, flags=flags)


@pytest.fixture(scope="module")
def one_epoch(start_sft, readable, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("longer") / "sft"
    assert start_sft(run, "--num_train_epochs", "1") == 0
    return run


def resume(main, run: Path, *flags: str) -> int:
    return main(["--resume_from_checkpoint", str(run), *flags])


def cosine(step: int, total: int) -> float:
    """The rate of a step, 0-based, without warm-up and a peak of 0.01."""
    return 0.01 * (1 + math.cos(math.pi * step / total)) / 2


def test_a_finished_run_goes_on_with_the_schedule_of_the_longer_one(
    one_epoch, start_sft, tmp_path, capsys
):
    run = shutil.copytree(one_epoch, tmp_path / "run", symlinks=True)
    assert resume(run_sft.main, run, "--num_train_epochs", "3") == 0
    # 2 steps, then 6: the rate of step 3 is that of a run of 6, where it was 0 at the end of 2
    assert (
        f"goes on longer, from step 2: 6 steps in all, not 2; the learning rate is that of a run of"
        f" this length, at the next step {cosine(2, 6):.4g}, not 0" in capsys.readouterr().err
    )
    rates = [line["learning_rate"] for line in train_log(run)]
    assert rates == pytest.approx(
        [cosine(0, 2), cosine(1, 2), *(cosine(step, 6) for step in range(2, 6))]
    )
    config = record(run / "config.json")
    assert config["extended"] == [
        {
            "from": 2,
            "total_before": 2,
            "total": 6,
            "learning_rate_before": 0.0,
            "learning_rate": pytest.approx(cosine(2, 6)),
        }
    ]
    assert config["settings"]["num_train_epochs"] == {"value": 3.0, "origin": "flag"}
    assert config["finished"] == {"step": 6}
    # the earlier end is kept whole
    kept = run / "result-2"
    for name in ("adapter_model.safetensors", "README.md", "scores-a.json", "predictions-a.jsonl"):
        assert (kept / name).read_bytes() == (one_epoch / name).read_bytes(), name
    # from a checkpoint in the longer part it goes on bit for bit, as any run
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    assert resume(run_sft.main, copy / "checkpoint-4") == 0
    assert_same_run(run, copy)
    # once more, by the command itself
    assert start_sft(run, "--num_train_epochs", "4") == 0
    assert [entry["total"] for entry in record(run / "config.json")["extended"]] == [6, 8]
    assert sorted(path.name for path in run.glob("result-*")) == ["result-2", "result-6"]


def test_with_a_constant_rate_a_longer_run_is_the_straight_one(one_epoch, start_sft, tmp_path):
    """Optimizer and random numbers go on: no rate hides a difference."""
    constant = ("--lr_scheduler_type", "constant")
    assert start_sft(tmp_path / "run", "--num_train_epochs", "1", *constant) == 0
    assert start_sft(tmp_path / "run", "--num_train_epochs", "2", *constant) == 0
    assert start_sft(tmp_path / "straight", "--num_train_epochs", "2", *constant) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_kill_before_the_first_longer_checkpoint_forgets_no_length(
    one_epoch, start_sft, tmp_path
):
    run = shutil.copytree(one_epoch, tmp_path / "run", symlinks=True)
    before = (run / "adapter_model.safetensors").read_bytes()
    longer = ("--num_train_epochs", "2")
    killed_at(engine.saving, "save_checkpoint", 1, lambda: start_sft(run, *longer))
    assert (run / "adapter_model.safetensors").read_bytes() == before
    assert "finished" not in record(run / "config.json")
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    assert resume(run_sft.main, run) == 0  # knows the length from the folder
    assert start_sft(copy, *longer) == 0  # says it again
    assert_same_run(run, copy)
    assert [entry["total"] for entry in record(run / "config.json")["extended"]] == [4]
    assert (run / "result-2/adapter_model.safetensors").read_bytes() == before


def test_a_run_that_stopped_early_goes_on(start_sft, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr(
            run_sft,
            "validation_metrics",
            lambda *_: {"loss": 1.0, "mean_token_accuracy": 0.0},
        )
        patience = ("--early_stopping_patience", "1")
        assert start_sft(run, "--num_train_epochs", "3", *patience) == 0
        assert record(run / "trainer_state.json")["global_step"] == 4
        assert resume(run_sft.main, run, "--num_train_epochs", "4") == 0
    # the third epoch is no better either, so it ends there
    assert record(run / "trainer_state.json")["global_step"] == 6
    assert "stopped early" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num_train_epochs", "0.5"), "1 steps, but the run has 2 and stands at step 2"),
        (("--max_steps", "1"), "1 steps, but the run has 2 and stands at step 2"),
    ],
)
def test_a_run_is_not_made_shorter(one_epoch, flags, said):
    before = snapshot(one_epoch)
    with pytest.raises(UsageError, match=said):
        resume(run_sft.main, one_epoch, *flags)
    assert snapshot(one_epoch) == before


@pytest.mark.parametrize(
    ("before", "now", "shorter"),
    [
        ((2.0, None), (3.0, None), False),
        ((2.0, None), (1.0, None), True),
        ((2.0, 5), (1.0, 6), False),
        ((2.0, 5), (9.0, 4), True),
        ((2.0, None), (2.0, 1), False),  # only the data tell
        ((2.0, 5), (2.0, None), False),
    ],
)
def test_what_is_shorter_for_sure(before, now, shorter):
    names = ("num_train_epochs", "max_steps")
    was, is_now = dict(zip(names, before, strict=True)), dict(zip(names, now, strict=True))
    assert is_shorter(was, is_now) == shorter


def test_grpo_goes_on_longer_and_past_its_condition(tiny_sft_run, tiny_data, few, tmp_path, capsys):
    """Stopped by a condition after the first of 2 steps, and then made longer."""
    run = tmp_path / "run"
    flags = ("--validation_file", f"a={few}", "--no_vote_baseline", "--lr_scheduler_type", "linear")
    start = partial(grpo, tiny_sft_run("qwen2_5_vl"), tiny_data, run, *flags)
    assert start("--max_steps", "2", "--stop_when", "learning_rate>0.004") == 0
    assert record(run / "trainer_state.json")["global_step"] == 1
    first = adapter(run)
    # a condition may change; the rate of step 2 of 4 is 0.0075
    assert start("--max_steps", "4", "--stop_when", "learning_rate>0.02") == 0
    assert record(run / "trainer_state.json")["global_step"] == 4
    rates = [line["learning_rate"] for line in train_log(run)]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert largest_difference(first, adapter(run)) > 0
    assert largest_difference(first, adapter(run / "result-1")) == 0
    before = snapshot(run)
    with pytest.raises(UsageError, match="3 steps, but the run has 4"):
        resume(run_grpo.main, run, "--max_steps", "3")
    assert snapshot(run) == before
