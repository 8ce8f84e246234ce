"""Protect resuming.

Checked: from every checkpoint of both scripts, in place and into another folder, a resumed run ends
equal to the straight one to the last bit (CPU, fp32); so does a run that a signal stopped at any
point; a run that was changed is refused.

Run: pytest tests/scripts/test_resume.py
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import engine.decoding
import engine.optim
import engine.saving
import eval.decode
import rl.reward_choice
import run_grpo
import run_sft
from data.files import DataError
from engine.runtime import main_guard
from rl.rewards import NuancedReward
from rl.rollout import Rollouts
from tests.helpers.runs import (
    adapter,
    assert_same_run,
    equal_tensors,
    grpo,
    largest_difference,
    lines,
    record,
    sft,
    snapshot,
    speak,
    tensorboard,
    write_rows,
)

# 12 rows in steps of 4: 3 steps an epoch. Logged every 2 steps, so that some checkpoints lie
# between two logs.
SFT_FLAGS = (
    "--num_train_epochs",
    "2",
    "--per_device_train_batch_size",
    "2",
    "--gradient_accumulation_steps",
    "2",
    "--lora_dropout",
    "0.3",
    "--logging_steps",
    "2",
    "--save_steps",
    "1",
)
# 2 prompts x 4 completions a rollout, which serves steps 1 and 2, 3 and 4, 5; two rewards whose
# windows decide.
GRPO_FLAGS = (
    "--max_steps",
    "5",
    "--eval_steps",
    "3",
    "--logging_steps",
    "2",
    "--save_steps",
    "1",
    "--reward",
    "nuanced+0.5*fbeta",
)
SFT_STEPS, GRPO_STEPS = range(1, 7), range(0, 6)


@pytest.fixture(autouse=True, scope="module")
def small_window():
    """Readable completions, and a window that is soon full: a rollout's reward then depends on the
    rollouts before it.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        speak(monkeypatch)
        monkeypatch.setattr(
            rl.reward_choice,
            "NuancedReward",
            partial(NuancedReward, window=6, min_window=2, dominance=0.4),
        )
        yield


@pytest.fixture(scope="module")
def few(tiny_data) -> Path:
    return write_rows(tiny_data.with_name("few.jsonl"), lines(tiny_data)[:4])


@pytest.fixture(scope="module")
def start_sft(tiny_checkpoint, tiny_data, few):
    """Start the run that most tests here begin with: `start_sft(folder, *flags)`.

    Returns its exit code.
    """
    return partial(
        sft,
        tiny_checkpoint("qwen2_5_vl"),
        tiny_data,
        flags=("--validation_file", f"site={few}", *SFT_FLAGS),
    )


@pytest.fixture(scope="module")
def start_grpo(tiny_sft_run, tiny_data, few):
    return partial(
        grpo,
        tiny_sft_run("qwen2_5_vl"),
        tiny_data,
        # without the vote, so that the calls of the sampler are those of rollouts and evaluations
        flags=("--validation_file", f"a={few}", f"b={few}", *GRPO_FLAGS, "--no_vote_baseline"),
    )


@pytest.fixture(scope="module")
def straight_sft(start_sft, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "sft"
    assert start_sft(run) == 0
    return run


@pytest.fixture(scope="module")
def straight_grpo(start_grpo, small_window, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "grpo"
    assert start_grpo(run) == 0
    return run


def resume(main, checkpoint: Path, *flags: str) -> int:
    return main(["--resume_from_checkpoint", str(checkpoint), *flags])


def refused(main, capsys, *flags: str) -> list[str]:
    """Return the error lines of a command that must end with exit code 2."""
    capsys.readouterr()
    assert main_guard(lambda: main(list(flags)), errors=(DataError,)) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


# ---- from every checkpoint -----------------------------------------------------------------------
def test_the_straight_runs_have_something_to_get_wrong(straight_sft, straight_grpo):
    assert [path.name for path in sorted(straight_sft.glob("checkpoint-*"))] == [
        f"checkpoint-{step}" for step in SFT_STEPS
    ]
    assert [path.name for path in sorted(straight_grpo.glob("checkpoint-*"))] == [
        f"checkpoint-{step}" for step in GRPO_STEPS
    ]
    assert record(straight_sft / "checkpoint-3/trainer_state.json")["unlogged_metrics"]
    assert record(straight_grpo / "checkpoint-1/rollout.json") and not record(
        straight_grpo / "checkpoint-2/rollout.json"
    )
    collapse = [
        row["rewards"]["nuanced"]["collapse"] for row in lines(straight_grpo / "completions.jsonl")
    ]
    # the window acts after the first rollout
    assert not any(collapse[:8]) and any(collapse[8:16]) and any(collapse[16:])


@pytest.mark.parametrize("step", SFT_STEPS)
@pytest.mark.parametrize("place", ["in place", "elsewhere"])
def test_sft_goes_on_bit_for_bit(straight_sft, tmp_path, step, place):
    copy = shutil.copytree(straight_sft, tmp_path / "copy", symlinks=True)
    before = snapshot(straight_sft)
    if place == "in place":
        assert resume(run_sft.main, copy / f"checkpoint-{step}") == 0
        assert_same_run(straight_sft, copy)
        assert tensorboard(copy) == tensorboard(straight_sft)
    else:
        assert (
            resume(
                run_sft.main,
                copy / f"checkpoint-{step}",
                "--output_dir",
                str(tmp_path / "elsewhere"),
            )
            == 0
        )
        assert_same_run(straight_sft, tmp_path / "elsewhere")
        assert tensorboard(tmp_path / "elsewhere") == tensorboard(straight_sft)
        assert snapshot(copy) == before
    # where the run was first written does not matter any more
    assert snapshot(straight_sft) == before


@pytest.mark.parametrize("step", GRPO_STEPS)
@pytest.mark.parametrize("place", ["in place", "elsewhere"])
def test_grpo_goes_on_bit_for_bit(straight_grpo, tmp_path, step, place):
    copy = shutil.copytree(straight_grpo, tmp_path / "copy", symlinks=True)
    before = snapshot(straight_grpo)
    if place == "in place":
        assert resume(run_grpo.main, copy / f"checkpoint-{step}") == 0
        assert_same_run(straight_grpo, copy)
        assert tensorboard(copy) == tensorboard(straight_grpo)
    else:
        assert (
            resume(
                run_grpo.main,
                copy / f"checkpoint-{step}",
                "--output_dir",
                str(tmp_path / "elsewhere"),
            )
            == 0
        )
        assert_same_run(straight_grpo, tmp_path / "elsewhere")
        assert tensorboard(tmp_path / "elsewhere") == tensorboard(straight_grpo)
        assert snapshot(tmp_path / "elsewhere/reference") == snapshot(straight_grpo / "reference")
        assert snapshot(copy) == before
    assert snapshot(straight_grpo) == before


@pytest.mark.parametrize(
    ("script", "step"), [(run_sft, 3), (run_grpo, 3), (run_grpo, 4)], ids=["sft", "middle", "next"]
)
def test_a_resume_needs_no_random_state(
    straight_sft, straight_grpo, tmp_path, monkeypatch, caplog, script, step
):
    """Completions and dropout are functions of their place: here all generators are others."""
    straight = straight_sft if script is run_sft else straight_grpo
    copy = shutil.copytree(straight, tmp_path / "copy", symlinks=True)
    monkeypatch.setattr(engine.saving, "load_rng", lambda *state: torch.manual_seed(999))
    assert resume(script.main, copy / f"checkpoint-{step}") == 0
    for name in ("adapter_model.safetensors", f"checkpoint-{step + 1}/optimizer.safetensors"):
        assert (copy / name).read_bytes() == (straight / name).read_bytes()
    if script is run_grpo:
        assert lines(copy / "completions.jsonl") == lines(straight / "completions.jsonl")
    assert "earlier version" not in caplog.text


def test_grpo_of_the_other_family_goes_on_in_the_middle_of_a_rollout(
    tiny_sft_run, tiny_data, tmp_path
):
    assert grpo(tiny_sft_run("gemma3"), tiny_data, tmp_path / "run", *GRPO_FLAGS) == 0
    assert (
        resume(
            run_grpo.main, tmp_path / "run/checkpoint-3", "--output_dir", str(tmp_path / "other")
        )
        == 0
    )
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_a_run_folder_or_a_link_names_a_checkpoint_too(straight_sft, tmp_path):
    for name, source in (("folder", "."), ("link", "last")):
        copy = shutil.copytree(straight_sft, tmp_path / name, symlinks=True)
        shutil.rmtree(copy / "checkpoint-6")
        (copy / "last").unlink()
        (copy / "last").symlink_to("checkpoint-5")
        assert resume(run_sft.main, copy / source) == 0
        assert_same_run(straight_sft, copy)


def test_lines_after_the_resumed_step_are_kept_aside(straight_grpo, tmp_path):
    copy = shutil.copytree(straight_grpo, tmp_path / "copy", symlinks=True)
    assert resume(run_grpo.main, copy / "checkpoint-2") == 0
    # Logged at steps 2, 4 and at the end, 5; evaluated at 0, 3 and 5 (two sites and the gap);
    # rollouts at 1, 3 and 5.
    aside = lines(copy / "metrics.after-2.jsonl")
    assert [(line["step"], line["split"]) for line in aside] == [(3, "eval")] * 3 + [
        (4, "train"),
        (5, "train"),
    ] + [(5, "eval")] * 3
    assert aside == [line for line in lines(straight_grpo / "metrics.jsonl") if line["step"] > 2]
    assert [line["step"] for line in lines(copy / "completions.after-2.jsonl")] == [3] * 8 + [5] * 8


def test_a_checkpoint_that_is_damaged_is_passed_over_with_a_note(straight_sft, tmp_path, capsys):
    copy = shutil.copytree(straight_sft, tmp_path / "copy", symlinks=True)
    (copy / "checkpoint-6/optimizer.safetensors").write_bytes(b"")
    assert resume(run_sft.main, copy) == 0
    err = capsys.readouterr().err
    assert (
        "passed over a damaged checkpoint: " in err and "checkpoint-6: optimizer.safetensors" in err
    )
    assert_same_run(straight_sft, copy)


def test_a_corrupted_checkpoint_that_is_named_is_refused(straight_grpo, tmp_path, capsys):
    copy = shutil.copytree(straight_grpo, tmp_path / "copy", symlinks=True)
    file = copy / "checkpoint-3/rollout.safetensors"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])  # one bit
    before = snapshot(copy)
    (line,) = refused(run_grpo.main, capsys, "--resume_from_checkpoint", str(copy / "checkpoint-3"))
    assert line.endswith(
        "checkpoint-3: rollout.safetensors: its content was altered (SHA-256 differs from the"
        " manifest)"
    )
    assert snapshot(copy) == before


# ---- signals -------------------------------------------------------------------------------------
def at_call(monkeypatch, owner, name: str, number: int, stop: signal.Signals) -> None:
    """Send this process a signal at call `number` (from 1) of a function."""
    function, calls = getattr(owner, name), []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), stop)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("where", "call", "stop", "code", "saved"),
    [
        ((run_sft, "clip_gradients"), 1, signal.SIGTERM, 143, 1),
        ((run_sft, "clip_gradients"), 4, signal.SIGINT, 130, 4),
        ((run_sft, "validation_metrics"), 1, signal.SIGTERM, 143, 3),
        # in the last step: the run is not finished until it is resumed
        ((run_sft, "clip_gradients"), 6, signal.SIGINT, 130, 6),
    ],
)
def test_sft_stopped_by_a_signal_ends_as_if_it_had_not_been(
    straight_sft, start_sft, tmp_path, monkeypatch, capsys, where, call, stop, code, saved
):
    with monkeypatch.context() as context:
        at_call(context, *where, call, stop)
        assert start_sft(tmp_path / "run", "--save_steps", "none") == code
    assert (
        f"go on with: python run_sft.py --resume_from_checkpoint {tmp_path / 'run'}"
        in capsys.readouterr().out
    )
    assert (tmp_path / "run/last").readlink().name == f"checkpoint-{saved}"
    assert not (tmp_path / "run/adapter_model.safetensors").exists()  # the run is not finished
    assert not (tmp_path / "run/README.md").exists()
    assert resume(run_sft.main, tmp_path / "run") == 0
    assert_same_run(straight_sft, tmp_path / "run")
    assert (tmp_path / "run/README.md").read_text() == (straight_sft / "README.md").read_text()


def test_sft_stopped_while_scoring_is_finished(
    straight_sft, start_sft, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as context:
        at_call(context, engine.decoding, "scaled_logits", 2, signal.SIGTERM)
        assert start_sft(tmp_path / "run") == 143
    assert "stopped while scoring; training is finished" in capsys.readouterr().out
    assert not (tmp_path / "run/README.md").exists()  # a card has the scores
    assert equal_tensors(
        tmp_path / "run/adapter_model.safetensors", straight_sft / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    ("where", "call", "stop", "code", "saved"),
    [
        # the evaluation before the first step
        ((eval.decode, "generate"), 1, signal.SIGTERM, 143, 0),
        ((engine.decoding, "draw"), 2, signal.SIGINT, 130, 0),  # while the first rollout is sampled
        # the second rollout: its random numbers are drawn anew
        ((engine.decoding, "draw"), 9, signal.SIGTERM, 143, 2),
        # in its scoring, which is left between two micro-batches: the step is made anew
        ((Rollouts, "score"), 2, signal.SIGTERM, 143, 2),
        # between the two updates of a rollout
        ((run_grpo, "clip_gradients"), 1, signal.SIGINT, 130, 1),
        # an evaluation is due and left to the resumed run
        ((run_grpo, "clip_gradients"), 3, signal.SIGTERM, 143, 3),
        # in the second site's evaluation of step 3
        ((eval.decode, "generate"), 4, signal.SIGINT, 130, 3),
        # in the last step, with the last evaluation due
        ((run_grpo, "clip_gradients"), 5, signal.SIGTERM, 143, 5),
        ((eval.decode, "generate"), 5, signal.SIGTERM, 143, 5),  # in the last evaluation
    ],
)
def test_grpo_stopped_by_a_signal_ends_as_if_it_had_not_been(
    straight_grpo, start_grpo, tmp_path, monkeypatch, capsys, where, call, stop, code, saved
):
    with monkeypatch.context() as context:
        at_call(context, *where, call, stop)
        assert start_grpo(tmp_path / "run", "--save_steps", "none") == code
    assert (
        f"go on with: python run_grpo.py --resume_from_checkpoint {tmp_path / 'run'}"
        in capsys.readouterr().out
    )
    assert (tmp_path / "run/last").readlink().name == f"checkpoint-{saved}"
    assert not (tmp_path / "run/adapter_model.safetensors").exists()  # the run is not finished
    assert resume(run_grpo.main, tmp_path / "run") == 0
    assert_same_run(straight_grpo, tmp_path / "run")


def test_a_vote_that_was_cut_short_is_made_again_and_changes_no_training(
    straight_grpo, start_grpo, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as context:
        at_call(context, eval.decode, "generate", 4, signal.SIGTERM)  # two sites, then their votes
        assert start_grpo(run, "--save_steps", "none", "--vote_baseline") == 143
    assert (run / "last").readlink().name == "checkpoint-0" and (run / "start").is_dir()
    assert not (run / "start-vote").exists()
    assert resume(run_grpo.main, run) == 0
    assert_same_run(straight_grpo, run)
    assert {path.name for path in (run / "start-vote").glob("*-a.json*")} == {
        "predictions-a.jsonl",
        "samples-a.jsonl",
        "scores-a.json",
    }
    assert not list(run.glob(".tmp-*"))


def test_stopped_twice_and_moved_in_between(straight_grpo, start_grpo, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        at_call(context, run_grpo, "clip_gradients", 1, signal.SIGTERM)
        assert start_grpo(tmp_path / "first") == 143
    with monkeypatch.context() as context:
        at_call(context, engine.decoding, "draw", 3, signal.SIGINT)
        assert (
            resume(run_grpo.main, tmp_path / "first", "--output_dir", str(tmp_path / "second"))
            == 130
        )
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "second").rename(tmp_path / "third")
    assert resume(run_grpo.main, tmp_path / "third") == 0
    assert not (tmp_path / "second").exists() and not (tmp_path / "first").exists()
    assert_same_run(straight_grpo, tmp_path / "third")


def test_the_scripts_exit_with_the_code_of_the_signal(start_grpo, tmp_path, monkeypatch):
    flags: list[str] = []
    with monkeypatch.context() as context:
        context.setattr(run_grpo, "main", flags.extend)
        start_grpo(tmp_path / "run")
    at_call(monkeypatch, engine.optim, "clip_gradients", 1, signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["run_grpo.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(run_grpo.__file__, run_name="__main__")
    assert stop.value.code == 143


# ---- what a gradient that is not finite leaves ---------------------------------------------------
def poisoned(clip):
    """Make `clip_gradients` return NaN at step 3: in GRPO, just after a rollout."""
    calls = []

    def clip_or_nan(parameters, max_norm):
        calls.append(1)
        norm = clip(parameters, max_norm)
        return norm * float("nan") if len(calls) == 3 else norm

    return clip_or_nan


def test_a_run_that_met_a_gradient_that_is_not_finite_can_go_on(
    straight_grpo, start_grpo, straight_sft, start_sft, tmp_path, monkeypatch
):
    """As after a fault of the device: without it, the run goes on from the saved state as if
    nothing had happened.
    """
    for script, start, straight, main in (
        (run_grpo, start_grpo, straight_grpo, run_grpo.main),
        (run_sft, start_sft, straight_sft, run_sft.main),
    ):
        run = tmp_path / script.__name__
        with monkeypatch.context() as context:
            context.setattr(script, "clip_gradients", poisoned(script.clip_gradients))
            with pytest.raises(RuntimeError, match="the gradient of step 3 is not finite"):
                start(run)
        assert (run / "last").readlink().name == "checkpoint-2"
        assert resume(main, run) == 0
        assert_same_run(straight, run)


def test_an_evaluation_that_fails_loses_no_step(straight_grpo, start_grpo, tmp_path, monkeypatch):
    """As where an image of a validation set has become unreadable; once it is mended, the run goes
    on as before.
    """
    evaluate, run = run_grpo.evaluate_policy, tmp_path / "run"

    def broken(*arguments):
        if arguments[-1] == 3:  # the step
            raise DataError(["example 'e1': not a readable JPEG or PNG"])
        return evaluate(*arguments)

    with monkeypatch.context() as context:
        context.setattr(run_grpo, "evaluate_policy", broken)
        with pytest.raises(DataError):
            start_grpo(run, "--save_steps", "none")
    assert (run / "last").readlink().name == "checkpoint-3"
    assert resume(run_grpo.main, run) == 0
    assert_same_run(straight_grpo, run)


# ---- what may and may not change -----------------------------------------------------------------
def test_only_settings_that_change_no_number_may_change(straight_sft, tmp_path, capsys):
    copy = shutil.copytree(straight_sft, tmp_path / "copy", symlinks=True)
    before = snapshot(copy)
    recipe = tmp_path / "mine.toml"
    recipe.write_text("learning_rate = 0.5\nseed = 3\n")
    remedy = "a resumed run keeps its settings: leave it out, or start a new run"
    assert refused(
        run_sft.main,
        capsys,
        "--resume_from_checkpoint",
        str(copy / "checkpoint-3"),
        "--learning_rate",
        "0.02",
        "--logging_steps",
        "1",
    ) == [
        f"error: --learning_rate: the resumed run has 0.01, not 0.02 (flag); {remedy}",
        f"error: --logging_steps: the resumed run has 2, not 1 (flag); {remedy}",
    ]
    found = refused(
        run_sft.main,
        capsys,
        "--resume_from_checkpoint",
        str(copy / "checkpoint-3"),
        "--recipe",
        str(recipe),
    )
    assert [line.split(";")[0] for line in found] == [
        f"error: --learning_rate: the resumed run has 0.01, not 0.5 (recipe {recipe})",
        f"error: --seed: the resumed run has 42, not 3 (recipe {recipe})",
    ]
    assert snapshot(copy) == before
    assert (
        resume(
            run_sft.main,
            copy / "checkpoint-3",
            "--save_steps",
            "2",
            "--save_total_limit",
            "2",
            "--output_dir",
            str(tmp_path / "other"),
            "--learning_rate",
            "0.01",
        )
        == 0
    )
    assert equal_tensors(
        straight_sft / "adapter_model.safetensors", tmp_path / "other/adapter_model.safetensors"
    )
    assert len(list((tmp_path / "other").glob("checkpoint-*"))) == 2


@pytest.mark.parametrize("name", ["train", "site"])
def test_a_changed_data_file_is_refused(tiny_checkpoint, tiny_data, tmp_path, capsys, name):
    files = {
        "train": tiny_data.with_name("train-copy.jsonl"),
        "site": tiny_data.with_name("site-copy.jsonl"),
    }
    for file in files.values():
        shutil.copyfile(tiny_data, file)
    assert (
        sft(
            tiny_checkpoint("qwen2_5_vl"),
            files["train"],
            tmp_path / "run",
            "--validation_file",
            f"site={files['site']}",
            "--max_steps",
            "1",
        )
        == 0
    )
    files[name].write_text(files[name].read_text().replace("<think>x<", "<think>y<", 1))
    before = snapshot(tmp_path / "run")
    (line,) = refused(run_sft.main, capsys, "--resume_from_checkpoint", str(tmp_path / "run"))
    assert line.startswith(
        "error: data file changed since checkpoint-1 was saved; restore it or start a new run. "
    )
    assert f" {name}: {files[name]} has SHA-256 " in line and ", the resumed run used " in line
    assert snapshot(tmp_path / "run") == before


DAMAGES = {
    "another": lambda file: shutil.copyfile(file.parents[1] / file.name, file),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "missing": Path.unlink,
    "all gone": lambda file: shutil.rmtree(file.parent),
}


def with_other_adapter(run: Path, adapter: str) -> None:
    """Let a run's checkpoints say that it began with another adapter's folder."""
    for checkpoint in run.glob("checkpoint-*"):
        config, manifest = checkpoint / "config.json", checkpoint / "manifest.json"
        changed = record(config)
        changed["settings"]["adapter_name_or_path"]["value"] = adapter
        config.write_text(json.dumps(changed))
        listed = record(manifest)
        content = config.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        listed["files"]["config.json"] = {"size": len(content), "sha256": sha256}
        manifest.write_text(json.dumps(listed))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_reference_is_refused(straight_grpo, tmp_path, capsys, damage):
    """Where its files are nowhere else, or a whole adapter has taken its place."""
    copy = shutil.copytree(straight_grpo, tmp_path / "copy", symlinks=True)
    file = copy / "reference/adapter_model.safetensors"
    if damage != "another":
        with_other_adapter(copy, str(tmp_path / "gone"))
        for weights in copy.glob("checkpoint-0/adapter_model.safetensors"):
            shutil.rmtree(weights.parent)  # its weights are the reference's
    DAMAGES[damage](file)
    before = snapshot(copy)
    (line,) = refused(run_grpo.main, capsys, "--resume_from_checkpoint", str(copy))
    if damage == "all gone":
        file = file.with_name("adapter_config.json")
    assert line.startswith(
        f"error: {file}: not the frozen reference that the run began with (SHA-256 "
    ), line
    assert line.endswith("restore it or start a new run")
    assert snapshot(copy) == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "all gone"])
def test_a_lost_reference_is_copied_again(straight_grpo, tmp_path, capsys, damage):
    copy = shutil.copytree(straight_grpo, tmp_path / "copy", symlinks=True)
    DAMAGES[damage](copy / "reference/adapter_model.safetensors")
    assert resume(run_grpo.main, copy / "checkpoint-4") == 0
    assert "reference: was damaged, copied again from " in capsys.readouterr().err
    assert snapshot(copy / "reference") == snapshot(straight_grpo / "reference")
    assert_same_run(straight_grpo, copy)


def test_the_sft_run_is_not_needed_to_resume(tiny_sft_run, tiny_data, tmp_path):
    sft_run = shutil.copytree(tiny_sft_run("qwen2_5_vl"), tmp_path / "sft", symlinks=True)
    assert grpo(sft_run, tiny_data, tmp_path / "run", *GRPO_FLAGS) == 0
    shutil.rmtree(sft_run)
    before = adapter(tmp_path / "run")
    assert resume(run_grpo.main, tmp_path / "run/checkpoint-3") == 0
    assert largest_difference(before, adapter(tmp_path / "run")) == 0.0


def test_a_resumed_run_does_not_go_on_in_a_folder_that_holds_something_else(
    straight_sft, tmp_path, capsys
):
    copy = shutil.copytree(straight_sft, tmp_path / "copy", symlinks=True)
    other = shutil.copytree(straight_sft, tmp_path / "other", symlinks=True)
    before = snapshot(other)
    (line,) = refused(
        run_sft.main,
        capsys,
        "--resume_from_checkpoint",
        str(copy / "checkpoint-1"),
        "--output_dir",
        str(other),
    )
    assert line.startswith(f"error: --output_dir {other} is not empty")
    assert snapshot(other) == before
    # its own folder by name is in place
    assert resume(run_sft.main, copy / "checkpoint-5", "--output_dir", str(copy)) == 0
    assert_same_run(straight_sft, copy)
