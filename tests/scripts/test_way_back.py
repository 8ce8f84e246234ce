"""Protect the way back: after a kill at any point a run goes on and leaves what it would have.

Kills end a child process without any clean-up. What is compared is the state to the last bit, all
logs, the links, and TensorBoard's view.

Run: pytest tests/scripts/test_way_back.py
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

import engine.checkpoint
import engine.run
import engine.saving
import run_grpo
import run_sft
from engine.checkpoint import verify_checkpoint
from engine.config import UsageError
from engine.run import Run
from engine.settings import resolve_sft
from engine.tracking import RunLogger
from tests.helpers.kills import killed_at
from tests.helpers.runs import (
    SFT,
    assert_same_run,
    equal_tensors,
    grpo,
    lines,
    record,
    sft,
    snapshot,
    speak,
    tensorboard,
    without_times,
    write_rows,
)

SFT_FLAGS = ("--num_train_epochs", "2", "--per_device_train_batch_size", "3")
SFT_FLAGS += ("--gradient_accumulation_steps", "2")  # 2 steps an epoch
GRPO_FLAGS = ("--max_steps", "3", "--eval_steps", "2", "--no_vote_baseline")
GRPO_FLAGS += ("--seed", "6")  # whose best checkpoint is not the last
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
    assert re.search(rf"best(, last)? \({now[-1]}\)", capsys.readouterr().out)


# ---- the same command again ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("owner", "name", "number", "after"),
    [
        (os, "replace", 1, False),  # config.json is half there, under its temporary name
        (engine.saving, "save_checkpoint", 1, False),  # config.json and logs, no checkpoint
        (engine.saving, "save_checkpoint", 2, False),
        (run_sft, "load_best_adapter", 1, False),  # after the last step
        (run_sft, "save_final_adapter", 1, True),
        (run_sft, "write_run_card", 1, False),
        (Run, "log_scores", 1, True),
    ],
)
def test_sft_goes_on_by_the_same_command(
    straight_sft, start_sft, tmp_path, owner, name, number, after
):
    run = tmp_path / "run"
    killed_at(owner, name, number, lambda: start_sft(run), after=after)
    assert start_sft(run) == 0
    assert_same_end(straight_sft, run)


@pytest.mark.parametrize(
    ("owner", "name", "number", "after"),
    [
        (engine.run, "keep_reference", 1, True),  # the reference is there, config.json is not
        (run_grpo, "save_training_checkpoint", 1, False),
        (run_grpo, "keep_start", 1, False),
        (run_grpo, "save_final_adapter", 1, False),
        (run_grpo, "write_run_card", 1, False),
        (run_grpo, "end_of_run", 1, False),
    ],
)
def test_grpo_goes_on_by_the_same_command(
    straight_grpo, start_grpo, tmp_path, owner, name, number, after
):
    run = tmp_path / "run"
    killed_at(owner, name, number, lambda: start_grpo(run), after=after)
    assert start_grpo(run, "--resume_from_checkpoint", "auto") == 0
    assert_same_end(straight_grpo, run)


def test_lines_of_a_run_that_begins_again_are_kept_aside(straight_sft, start_sft, tmp_path):
    """Killed before its first checkpoint, after two steps were logged."""
    run = tmp_path / "run"
    killed_at(engine.saving, "save_checkpoint", 1, lambda: start_sft(run))
    logged = lines(run / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2]
    assert resume(run_sft.main, run) == 0  # also by the name of the folder
    assert lines(run / "metrics.after-0.jsonl") == logged
    (run / "metrics.after-0.jsonl").unlink()
    assert_same_end(straight_sft, run)


def refusal(start, *arguments) -> list[str]:
    with pytest.raises(UsageError) as error:
        start(*arguments)
    return error.value.problems


def test_a_finished_run_is_not_begun_again(straight_sft, start_sft, capsys):
    assert record(straight_sft / "config.json")["finished"] == {"step": 4}
    before = snapshot(straight_sft)
    assert "is not empty" in refusal(start_sft, straight_sft)[0]
    with pytest.raises(SystemExit) as end:
        start_sft(straight_sft, "--resume_from_checkpoint", "auto")
    assert end.value.code == 0
    assert "the run is finished (step 4); nothing is left to do" in capsys.readouterr().out
    assert snapshot(straight_sft) == before


def test_other_settings_are_refused_with_the_differences(
    straight_sft, start_sft, tiny_data, few, tmp_path
):
    run = shutil.copytree(straight_sft, tmp_path / "run", symlinks=True)
    config = record(run / "config.json")
    del config["finished"]
    (run / "config.json").write_text(json.dumps(config))
    before = snapshot(run)
    first, *found = refusal(start_sft, run, "--seed", "7", "--lora_r", "4")
    assert first.startswith(f"--output_dir {run} holds an unfinished run with other settings")
    assert found == [
        "--lora_r: the run has 16, the command 4 (flag)",
        "--seed: the run has 42, the command 7 (flag)",
    ]
    # a value that the run's command gave and this one does not
    config["settings"]["weight_decay"] = {"value": 0.5, "origin": "flag"}
    (run / "config.json").write_text(json.dumps(config))
    assert refusal(start_sft, run)[1:] == [
        "--weight_decay: the run has 0.5, the command 0.01 (default)"
    ]
    config["settings"]["weight_decay"] = {"value": 0.01, "origin": "default"}
    (run / "config.json").write_text(json.dumps(config))
    other = write_rows(tiny_data.with_name("other-way-back.jsonl"), lines(tiny_data)[:2])
    changed = refusal(start_sft, run, "--validation_file", f"a={other}")[1:]
    assert changed == [f"a: {other} is another file than the run began with (SHA-256)"]
    renamed = refusal(start_sft, run, "--validation_file", f"b={few}")[1:]
    assert renamed == [
        "a: the command has no data of this name",
        "b: the run has no data of this name",
    ]
    shorter = refusal(start_sft, run, "--num_train_epochs", "1")[1:]
    assert len(shorter) == 1 and shorter[0].startswith("--num_train_epochs: the run has 2.0")
    assert snapshot(run) | {"config.json": b""} == before | {"config.json": b""}


def test_auto_takes_the_newest_unfinished_run_of_the_command(
    straight_sft, tiny_checkpoint, tiny_data, few, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    finished, unfinished, other = (Path("runs") / f"2026010{day}-000000-sft" for day in (4, 2, 3))
    for folder in (finished, unfinished, other):
        shutil.copytree(straight_sft, folder, symlinks=True)
    for folder, lr in ((unfinished, 1e-2), (other, 0.5)):
        config = record(folder / "config.json")
        del config["finished"]
        config["settings"]["learning_rate"]["value"] = lr
        (folder / "config.json").write_text(json.dumps(config))
    flags = ["--model_name_or_path", str(tiny_checkpoint("qwen2_5_vl")), "--train_file"]
    flags += [str(tiny_data), *SFT, "--validation_file", f"a={few}", *SFT_FLAGS]
    auto = resolve_sft([*flags, "--resume_from_checkpoint", "auto"]).configs[0]
    assert auto.resume_from_checkpoint == str(unfinished) and auto.output_dir is None
    new = resolve_sft([*flags, "--resume_from_checkpoint", "auto", "--seed", "9"]).configs[0]
    assert new.resume_from_checkpoint is None and new.output_dir is None and new.seed == 9
    with (unfinished / ".lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert (
            "is in use by another run"
            in refusal(resolve_sft, [*flags, "--resume_from_checkpoint", "auto"])[0]
        )


@pytest.mark.parametrize("number", [1, 3])  # of the files that are brought along
def test_a_run_that_was_killed_while_it_was_brought_elsewhere(straight_sft, tmp_path, number):
    run, flags = tmp_path / "elsewhere", ["--resume_from_checkpoint"]
    flags += [str(straight_sft / "checkpoint-2"), "--output_dir", str(run)]
    killed_at(shutil, "copyfile", number, lambda: run_sft.main(flags))
    assert run_sft.main(flags) == 0
    assert_same_run(straight_sft, run)


# ---- a folder that is deleted under the run ------------------------------------------------------
@pytest.mark.parametrize("script", [run_sft, run_grpo])
def test_a_folder_that_is_deleted_is_made_again(
    straight_sft, straight_grpo, start_sft, start_grpo, tmp_path, monkeypatch, caplog, script
):
    """In the third step: a later save can be resumed, logs are whole, the result is the same."""
    straight, start = (
        (straight_sft, start_sft) if script is run_sft else (straight_grpo, start_grpo)
    )
    run, clip, calls = tmp_path / "run", script.clip_gradients, []

    def deleting(*arguments):
        calls.append(1)
        if len(calls) == 3:
            shutil.rmtree(run)
        return clip(*arguments)

    with monkeypatch.context() as context:
        context.setattr(script, "clip_gradients", deleting)
        assert start(run) == 0
    assert caplog.text.count("was deleted under the run: it is made again") == 1
    assert equal_tensors(run / "adapter_model.safetensors", straight / "adapter_model.safetensors")
    names = {path.name for path in straight.iterdir() if not path.name.startswith("events.")}
    names -= {path.name for path in straight.glob("checkpoint-*")} - {
        (run / "last").readlink().name
    }
    assert names - {path.name for path in run.iterdir()} <= {"best"}
    for name in ("metrics.jsonl", "completions.jsonl", "evaluations.jsonl"):
        if (straight / name).exists():
            assert without_times(lines(run / name)) == without_times(lines(straight / name)), name
    for name in ("reference", "start"):
        if (straight / name).exists():
            assert snapshot(run / name).keys() == snapshot(straight / name).keys()
    before = (run / "adapter_model.safetensors").read_bytes()
    assert resume(script.main, run) == 0
    assert (run / "adapter_model.safetensors").read_bytes() == before


# ---- runs of an earlier version ------------------------------------------------------------------
def as_before(run: Path) -> None:
    """Take out of a run what an earlier version did not write: ids, marks, evaluations, the end."""
    for folder in (run, *run.glob("checkpoint-*")):
        config, state = record(folder / "config.json"), record(folder / "trainer_state.json")
        for name in ("run_id", "finished"):
            config.pop(name, None)
        for name in ("evaluations", "greater_is_better"):
            state.pop(name)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "trainer_state.json").write_text(json.dumps(state))
        if (folder / "manifest.json").is_file():
            manifest = record(folder / "manifest.json") | {"notes": {}}
            for name in ("config.json", "trainer_state.json"):
                content = (folder / name).read_bytes()
                sha256 = hashlib.sha256(content).hexdigest()
                manifest["files"][name] = {"size": len(content), "sha256": sha256}
            (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_of_an_earlier_version_goes_on(straight_sft, start_sft, tmp_path, caplog):
    run = shutil.copytree(straight_sft, tmp_path / "run", symlinks=True)
    as_before(run)
    assert "is not empty" in refusal(start_sft, run)[0]  # finished: it has its adapter
    (run / "adapter_model.safetensors").unlink()
    shutil.rmtree(run / "checkpoint-4")
    assert start_sft(run) == 0
    # that version drew dropout from a stream, so it would have gone on with other numbers
    assert caplog.text.count("which drew random numbers in another order; the run goes on") == 1
    assert equal_tensors(
        run / "adapter_model.safetensors", straight_sft / "adapter_model.safetensors"
    )
    assert lines(run / "metrics.jsonl")[-1]["step"] == 4
    assert "run_id" not in record(run / "config.json")
    assert verify_checkpoint(run / "checkpoint-4") == []
