"""Protect the way back: after a kill at any point a run goes on and leaves what it would have.

Kills end a child process without any clean-up. What is compared is the state to the last bit, all
logs, the links, and TensorBoard's view.

Run: pytest tests/scripts/test_way_back.py
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

import engine.checkpoint
import engine.saving
import run_grpo
import run_sft
from engine.tracking import RunLogger
from tests.helpers.kills import killed_at
from tests.helpers.runs import (
    assert_same_run,
    equal_tensors,
    grpo,
    lines,
    record,
    sft,
    speak,
    tensorboard,
    without_times,
    write_rows,
)

SFT_FLAGS = ("--num_train_epochs", "2", "--per_device_train_batch_size", "3")
SFT_FLAGS += ("--gradient_accumulation_steps", "2")  # 2 steps an epoch
GRPO_FLAGS = ("--max_steps", "3", "--eval_steps", "2", "--no_vote_baseline")
GRPO_FLAGS += ("--warn_when", "a/macro_f1>-1")  # at every evaluation


@pytest.fixture(autouse=True, scope="module")
def readable():
    with pytest.MonkeyPatch.context() as monkeypatch:
        speak(monkeypatch)
        yield


@pytest.fixture(scope="module")
def few(tiny_data) -> Path:
    return write_rows(tiny_data.with_name("few-way-back.jsonl"), lines(tiny_data)[:3])


@pytest.fixture(scope="module")
def start_sft(tiny_checkpoint, tiny_data, few):
    flags = ("--validation_file", f"a={few}", *SFT_FLAGS)
    return partial(sft, tiny_checkpoint("qwen2_5_vl"), tiny_data, flags=flags)


@pytest.fixture(scope="module")
def start_grpo(tiny_sft_run, tiny_data, few):
    flags = ("--validation_file", f"a={few}", f"b={few}", *GRPO_FLAGS)
    return partial(grpo, tiny_sft_run("qwen2_5_vl"), tiny_data, flags=flags)


@pytest.fixture(scope="module")
def straight_sft(start_sft, readable, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "sft"
    assert start_sft(run) == 0
    return run


@pytest.fixture(scope="module")
def straight_grpo(start_grpo, readable, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "grpo"
    assert start_grpo(run) == 0
    return run


def assert_same_end(straight: Path, run: Path) -> None:
    """Check that a run has left all that the straight one has: state, logs, links, TensorBoard."""
    assert_same_run(straight, run)
    names = {path.name for path in straight.iterdir()} - {".lock"}
    for name in sorted(names):
        if name.startswith("events."):
            continue
        assert (run / name).exists(), name
        if name.endswith(".jsonl"):
            assert without_times(lines(straight / name)) == without_times(lines(run / name)), name
    assert (run / "README.md").read_text() == (straight / "README.md").read_text()
    for name in ("summary.json", *(path.name for path in straight.glob("scores-*.json"))):
        if (straight / name).exists():
            assert record(straight / name) == record(run / name), name
    folders = [".", *(f"charts/{path.name}" for path in straight.glob("charts/*"))]
    assert {path.name for path in straight.glob("charts/*")} == {
        path.name for path in run.glob("charts/*")
    }
    for folder in folders:
        assert tensorboard(straight / folder) == tensorboard(run / folder), folder


def resume(main, run: Path) -> int:
    return main(["--resume_from_checkpoint", str(run)])


# ---- kills: links and logs -----------------------------------------------------------------------
def test_sft_killed_before_the_links_of_its_last_save(straight_sft, start_sft, tmp_path):
    """The checkpoint is there and nothing is left to save, but `best` is not pointed yet."""
    run = tmp_path / "run"
    # 2 epochs, each saved before and after its evaluation: the 4th save is the last
    killed_at(engine.saving, "settle_checkpoints", 4, lambda: start_sft(run))
    assert (run / "best").readlink().name == "checkpoint-2"
    assert record(run / "checkpoint-4/trainer_state.json")["best_model_checkpoint"] == (
        "checkpoint-4"
    ), "else the link is right already"
    assert resume(run_sft.main, run) == 0
    assert_same_end(straight_sft, run)


@pytest.mark.parametrize("number", [2, 4, 6])  # the second save of steps 0, 2 and 3
def test_grpo_killed_between_an_evaluation_and_its_save(
    straight_grpo, start_grpo, tmp_path, number
):
    run = tmp_path / "run"
    killed_at(engine.saving, "save_checkpoint", number, lambda: start_grpo(run))
    rows = lines(run / "evaluations.jsonl")
    assert len(rows) == number  # two sets at each evaluation: logged, but not saved
    assert resume(run_grpo.main, run) == 0
    assert_same_end(straight_grpo, run)


def test_grpo_killed_again_and_again_among_the_lines_of_an_evaluation(
    straight_grpo, start_grpo, tmp_path
):
    """Each attempt logs a little more of the evaluation at step 0, then of that at step 2."""
    run = tmp_path / "run"
    killed_at(RunLogger, "warn", 1, lambda: start_grpo(run), after=True)
    for number in (2, 6, 3):  # 3 at step 0, one each at steps 1 and 2, 3 at the evaluation
        killed_at(RunLogger, "scalars", number, lambda: resume(run_grpo.main, run), after=True)
    assert resume(run_grpo.main, run) == 0
    assert_same_end(straight_grpo, run)


def test_sft_whose_disk_is_full_after_an_evaluation(straight_sft, start_sft, tmp_path, monkeypatch):
    run, save, calls = tmp_path / "run", engine.saving.save_checkpoint, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(engine.saving, "save_checkpoint", full)
        with pytest.raises(OSError, match="No space left"):
            start_sft(run)
    assert resume(run_sft.main, run) == 0
    assert_same_end(straight_sft, run)


def test_an_evaluation_that_fails_after_its_first_lines(
    straight_grpo, start_grpo, tmp_path, monkeypatch
):
    """What it has logged and noted by then is not in what is saved after it."""
    run, scalars, calls = tmp_path / "run", RunLogger.scalars, []

    def failing(log, *arguments, **options):
        calls.append(1)
        scalars(log, *arguments, **options)
        if len(calls) == 7:  # the second set at step 2
            raise KeyError("a bug in a fork")

    with monkeypatch.context() as context:
        context.setattr(RunLogger, "scalars", failing)
        with pytest.raises(KeyError):
            start_grpo(run)
    assert resume(run_grpo.main, run) == 0
    assert_same_end(straight_grpo, run)


def test_a_kill_between_two_renames_leaves_the_only_checkpoint(
    straight_sft, start_sft, tmp_path, monkeypatch
):
    """As on a file system that cannot exchange two names in one step."""
    run = tmp_path / "run"

    def child() -> int:
        monkeypatch.setattr("data.files.exchange", lambda one, other: False)
        return start_sft(run)

    # the first save renames once; of the second, the second rename is the one after the gap
    killed_at(engine.checkpoint.os, "rename", 3, child)
    assert not (run / "checkpoint-2").exists() and (run / ".old-checkpoint-2").is_dir()
    assert resume(run_sft.main, run) == 0
    assert_same_end(straight_sft, run)


# ---- the best checkpoint -------------------------------------------------------------------------
DAMAGES = {
    "empty": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
    "altered": lambda folder: (folder / "rng.json").write_text("{}"),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_best_checkpoint_is_passed_over_and_the_run_finishes(
    start_sft, tmp_path, monkeypatch, capsys, caplog, damage
):
    """Losses 2, 1, 4, 3 at steps 2, 4, 6, 8: best is 4, then 2. Killed before the final adapter."""
    run, losses = tmp_path / "run", iter([2.0, 1.0, 4.0, 3.0])
    monkeypatch.setattr(
        run_sft, "validation_metrics", lambda *_: {"loss": next(losses), "mean_token_accuracy": 0.0}
    )
    flags = ("--num_train_epochs", "4", "--early_stopping_patience", "9")
    killed_at(run_sft, "load_best_adapter", 1, lambda: start_sft(run, *flags))
    assert (run / "best").readlink().name == "checkpoint-4"
    DAMAGES[damage](run / "checkpoint-4")
    assert resume(run_sft.main, run) == 0
    assert "the best checkpoint, checkpoint-4, cannot be used (" in caplog.text
    assert "the next best, checkpoint-2, takes its place" in caplog.text
    assert "final adapter: that of checkpoint-2, validation loss 2.0" in capsys.readouterr().out
    assert (run / "best").readlink().name == "checkpoint-2"
    state = record(run / "trainer_state.json")
    assert state["best_model_checkpoint"] == "checkpoint-2" and state["best_metric"] == 2.0
    assert equal_tensors(
        run / "adapter_model.safetensors", run / "checkpoint-2/adapter_model.safetensors"
    )
    for name in ("checkpoint-2", "checkpoint-6", "checkpoint-8"):
        DAMAGES["empty"](run / name) if name != "checkpoint-8" else None
    assert resume(run_sft.main, run) == 0  # checkpoint-8 is left, the only sound one
    assert record(run / "trainer_state.json")["best_model_checkpoint"] == "checkpoint-8"


def test_grpo_names_no_damaged_best_at_its_end(straight_grpo, tmp_path, caplog, capsys):
    """Without --load_best_model_at_end the final adapter is the last, but `best` is evaluated."""
    run = shutil.copytree(straight_grpo, tmp_path / "run", symlinks=True)
    best = record(run / "trainer_state.json")["best_model_checkpoint"]
    assert best != "checkpoint-3", "else the last is damaged and the run goes on from another"
    DAMAGES["empty"](run / best)
    assert resume(run_grpo.main, run) == 0
    assert f"the best checkpoint, {best}, cannot be used (" in caplog.text
    now = record(run / "trainer_state.json")["best_model_checkpoint"]
    assert now != best and (run / "best").readlink().name == now
    assert f"best ({now[-1]})" in capsys.readouterr().out
