"""Protect the last whole step from whatever goes wrong in the next.

Checked: an error at any call of a step of either script leaves on disk, to the last bit, what the
straight run saved after the step before; so do weights that would be no numbers; a disk that
refuses a checkpoint ends no training; a skipped step is resumed exactly.

Run: pytest tests/scripts/test_whole_steps.py
"""

from __future__ import annotations

import errno
import importlib
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import run_grpo
import run_sft
from engine.checkpoint import list_checkpoints, verify_checkpoint
from engine.run import Run
from engine.runtime import StepFailed, main_guard
from rl.reward_checks import RewardFailed
from tests.helpers.runs import (
    adapter,
    assert_same_run,
    equal_tensors,
    grpo,
    lines,
    record,
    sft,
    speak,
    train_log,
    without_times,
    write_rows,
)

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
# 2 prompts x 4 completions a rollout, which serves four updates: two halves, and each once more
GRPO_FLAGS = (
    "--max_steps",
    "6",
    "--num_iterations",
    "2",
    "--eval_steps",
    "4",
    "--logging_steps",
    "2",
    "--save_steps",
    "1",
    "--reward",
    "nuanced",
    "--no_vote_baseline",
)


class Injected(Exception):
    """Tell an error of these tests from every other."""


@pytest.fixture(autouse=True, scope="module")
def readable():
    with pytest.MonkeyPatch.context() as monkeypatch:
        speak(monkeypatch)
        yield


@pytest.fixture(scope="module")
def few(tiny_data) -> Path:
    return write_rows(tiny_data.with_name("few-steps.jsonl"), lines(tiny_data)[:4])


@pytest.fixture(scope="module")
def start(tiny_checkpoint, tiny_sft_run, tiny_data, few) -> dict[str, Callable[..., int]]:
    """Start a run of either script: `start["sft"](folder, *flags)` -> its exit code."""
    return {
        "sft": partial(
            sft,
            tiny_checkpoint("qwen2_5_vl"),
            tiny_data,
            flags=("--validation_file", f"site={few}", *SFT_FLAGS),
        ),
        "grpo": partial(
            grpo,
            tiny_sft_run("qwen2_5_vl"),
            tiny_data,
            flags=("--validation_file", f"site={few}", *GRPO_FLAGS),
        ),
    }


@pytest.fixture(scope="module")
def straight(start, readable, tmp_path_factory) -> dict[str, Path]:
    made = {script: tmp_path_factory.mktemp("straight") / script for script in start}
    for script, folder in made.items():
        assert start[script](folder) == 0
    return made


def goes_on_with(script: str, folder: Path) -> int:
    main = {"sft": run_sft.main, "grpo": run_grpo.main}[script]
    return main(["--resume_from_checkpoint", str(folder)])


def fail_in_step(monkeypatch, place: str, step: int, part: int = 1) -> None:
    """Raise Injected at call `part` of a function within the step after `step`.

    place: "module:name" or "module:class.name", where it is looked up.
    """
    now: list[int] = []
    goes_on = Run.goes_on

    def watched(run: Run) -> bool:
        now.clear()
        if goes_on(run):
            now.append(run.step)
            return True
        return False

    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for one in owners:
        owner = getattr(owner, one)
    function, calls = getattr(owner, name), []

    def wrapped(*arguments, **options):
        if now == [step]:
            calls.append(1)
            if len(calls) == part:
                raise Injected
        return function(*arguments, **options)

    monkeypatch.setattr(Run, "goes_on", watched)
    monkeypatch.setattr(owner, name, wrapped)


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Compare all that a resumed run reads: tensors, records, but for wall-clock times."""
    assert verify_checkpoint(one) == verify_checkpoint(other) == []
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in sorted(names - {"manifest.json", "config.json"}):
        if name.endswith(".safetensors"):
            assert equal_tensors(one / name, other / name), name
        else:
            assert without_times(record(one / name)) == without_times(record(other / name)), name


# ---- an error at any call ------------------------------------------------------------------------
EVERYWHERE = [
    ("torch:Tensor.backward", 1),
    ("torch:Tensor.addcdiv_", 5),  # in the middle of AdamW's step
    ("torch.optim:AdamW.zero_grad", 1),
    ("engine.run:Run.accepts", 1),
    ("engine.run:Run.can_take_back", 1),
    ("engine.run:Run.count_tokens", 1),
    ("engine.progress:Progress.update", 1),
]
SFT_PLACES = [
    ("engine.policy:Policy.encode_answer", 2),
    ("run_sft:token_logprobs", 2),  # of the second micro-batch
    *EVERYWHERE[:2],
]
GRPO_PLACES = [
    ("run_grpo:grpo_loss", 1),
    ("run_grpo:clip_gradients", 1),
    ("rl.run:GRPORun.log_update", 1),
    *EVERYWHERE,
]
ROLLOUT_PLACES = [
    ("engine.policy:Policy.encode", 2),
    ("engine.decoding:draw", 3),
    ("rl.rewards:NuancedReward.__call__", 5),
    ("rl.rewards:NuancedReward.observe", 1),
    ("engine.policy:Policy.logprobs", 2),
    ("run_grpo:group_advantages", 1),
    ("rl.monitors:Monitors.observe", 1),
    ("rl.run:completion_rows", 1),
    ("rl.run:show_samples", 1),
]


@pytest.mark.parametrize(
    ("script", "step", "place", "part"),
    [
        *(("sft", 1, *place) for place in SFT_PLACES),
        ("sft", 0, "torch:Tensor.addcdiv_", 5),  # before the optimizer has any state
        ("sft", 1, "engine.tracking:RunLogger.scalars", 1),  # of steps 1 and 2
        *(("grpo", 1, *place) for place in GRPO_PLACES),  # the rollout's second update
        *(("grpo", 4, *place) for place in ROLLOUT_PLACES),  # the second rollout
        ("grpo", 0, "run_grpo:grpo_loss", 1),
        ("grpo", 0, "torch:Tensor.addcdiv_", 5),
        ("grpo", 2, "torch:Tensor.addcdiv_", 5),  # the second pass over the rollout
        ("grpo", 3, "rl.monitors:Monitors.check", 1),  # once the step's line is logged
    ],
)
def test_an_error_leaves_the_step_before(
    start, straight, tmp_path, monkeypatch, script, step, place, part
):
    run = tmp_path / "run"
    with monkeypatch.context() as context:
        fail_in_step(context, place, step, part)
        with pytest.raises((Injected, RewardFailed)):  # which names the completion
            start[script](run, "--save_steps", "none")
    assert (run / "last").readlink().name == f"checkpoint-{step}"
    if step or script == "grpo":  # SFT has no checkpoint before its first step
        assert_same_checkpoint(straight[script] / f"checkpoint-{step}", run / "last")
    else:
        assert goes_on_with(script, run) == 0
        assert equal_tensors(
            straight[script] / "adapter_model.safetensors", run / "adapter_model.safetensors"
        )


@pytest.mark.parametrize(
    ("script", "step", "place"),
    [("sft", 4, "torch:Tensor.addcdiv_"), ("grpo", 4, "rl.run:completion_rows")],
)
def test_a_run_that_an_error_ended_goes_on_as_if_it_had_not(
    start, straight, tmp_path, monkeypatch, script, step, place
):
    run = tmp_path / "run"
    with monkeypatch.context() as context:
        fail_in_step(context, place, step)
        with pytest.raises(Injected):
            start[script](run)
        assert goes_on_with(script, run) == 0
    assert_same_run(straight[script], run)


@pytest.mark.parametrize("step", [0, 4])
def test_an_error_in_an_evaluation_leaves_the_step_before(
    start, straight, tmp_path, monkeypatch, step
):
    run, record_evaluation = tmp_path / "run", run_grpo.record_evaluation

    def failing(metrics, gaps, log, state, chosen):
        found = record_evaluation(metrics, gaps, log, state, chosen)  # which logs them
        if state.global_step == step:
            raise Injected
        return found

    with monkeypatch.context() as context:
        context.setattr(run_grpo, "record_evaluation", failing)
        with pytest.raises(Injected):
            start["grpo"](run)
    assert (run / "last").readlink().name == f"checkpoint-{step}"
    assert goes_on_with("grpo", run) == 0
    assert_same_run(straight["grpo"], run)


# ---- numbers that are no numbers -----------------------------------------------------------------
def poisoned(monkeypatch, script: str, calls: set[int]) -> None:
    """Make the loss NaN in these optimizer steps, counted from 1."""
    module = {"sft": run_sft, "grpo": run_grpo}[script]
    clip, made = module.clip_gradients, []

    def clip_or_nan(parameters, max_norm):
        made.append(1)
        parameters = list(parameters)
        if len(made) in calls:
            parameters[0].grad[0] = math.nan
        return clip(parameters, max_norm)

    monkeypatch.setattr(module, "clip_gradients", clip_or_nan)


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_bad_steps_are_skipped_and_a_resume_is_exact(start, tmp_path, monkeypatch, script):
    whole, cut, short = tmp_path / "whole", tmp_path / "cut", ("--max_steps", "4")
    with monkeypatch.context() as context:
        poisoned(context, script, {2, 3})
        assert start[script](whole, *short, "--max_bad_steps", "2") == 0
    state = record(whole / "trainer_state.json")
    assert (state["bad_steps"], state["bad_steps_in_a_row"]) == (2, 0)
    assert [line["step"] for line in lines(whole / "warnings.jsonl")] == [2, 3]
    assert [line["bad_steps"] for line in train_log(whole)] == [1, 2]
    # weights and moments are those after step 1 until step 4
    for name in ("adapter_model", "optimizer"):
        files = [whole / f"checkpoint-{step}/{name}.safetensors" for step in (1, 2, 3, 4)]
        assert equal_tensors(files[0], files[1]) and equal_tensors(files[0], files[2])
        assert not equal_tensors(files[0], files[3])
    # ended by the third in a row, and gone on from its state
    with monkeypatch.context() as context:
        poisoned(context, script, {2, 3})
        with pytest.raises(StepFailed, match="the gradient of step 3 is not finite"):
            start[script](cut, *short, "--max_bad_steps", "1")
    assert record(cut / "last/trainer_state.json")["bad_steps_in_a_row"] == 1
    with monkeypatch.context() as context:
        poisoned(context, script, {1})
        main = {"sft": run_sft.main, "grpo": run_grpo.main}[script]
        assert main(["--resume_from_checkpoint", str(cut), "--max_bad_steps", "2"]) == 0
    assert equal_tensors(whole / "adapter_model.safetensors", cut / "adapter_model.safetensors")
    assert without_times(lines(whole / "metrics.jsonl")) == without_times(
        lines(cut / "metrics.jsonl")
    )


def test_weights_that_would_be_no_numbers_are_not_made(start, straight, tmp_path, capsys):
    """A learning rate of 1e38 is finite, and what it makes of the weights is not."""
    run = tmp_path / "run"
    code = main_guard(lambda: start["sft"](run, "--learning_rate", "1e38", "--weight_decay", "10"))
    assert code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 1 would make weights of the adapter infinite or NaN")
    assert all(tensor.isfinite().all() for tensor in adapter(run / "last").values())
    assert not (run / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("when", ["before a save", "before the end"])
def test_weights_that_are_no_numbers_are_neither_saved_nor_published(
    start, straight, tmp_path, monkeypatch, capsys, when
):
    run, finish, scalars = tmp_path / "run", run_sft.finish, run_sft.Run.step_done

    def spoil(policy) -> None:
        name, parameter = next(
            (name, one) for name, one in policy.net.named_parameters() if one.requires_grad
        )
        parameter.data.view(-1)[0] = math.inf

    def spoiled_end(a_run, policy, *others):
        spoil(policy)
        return finish(a_run, policy, *others)

    def spoiled_step(a_run, **options):
        scalars(a_run, **options)
        if a_run.step == 3:
            spoil(policies[-1])

    policies: list = []
    made = run_sft.policy_to_fine_tune
    with monkeypatch.context() as context:
        if when == "before the end":
            context.setattr(run_sft, "load_best_adapter", lambda folder, state, policy: None)
            context.setattr(run_sft, "finish", spoiled_end)
        else:
            context.setattr(
                run_sft,
                "policy_to_fine_tune",
                lambda *arguments: policies.append(made(*arguments)) or policies[-1],
            )
            context.setattr(run_sft.Run, "step_done", spoiled_step)
        assert main_guard(lambda: start["sft"](run)) == 1
    err = capsys.readouterr().err
    what = "nothing is published: the final" if when == "before the end" else "checkpoint-3 is not"
    assert f"error: {what}" in err and "Traceback" not in err
    assert f"go on with: python run_sft.py --resume_from_checkpoint {run}" in err
    assert not (run / "adapter_model.safetensors").exists()
    for checkpoint in list_checkpoints(run):
        assert all(tensor.isfinite().all() for tensor in adapter(checkpoint).values())
    assert goes_on_with("sft", run) == 0  # from the last sound one
    assert equal_tensors(
        straight["sft"] / "adapter_model.safetensors", run / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("stem", ["adapter_model", "optimizer"])
def test_a_checkpoint_of_an_earlier_version_that_is_no_number_is_refused(
    straight, tmp_path, capsys, stem
):
    from engine import checkpoint as checkpoints

    run = shutil.copytree(straight["sft"], tmp_path / "run", symlinks=True)
    whole = checkpoints.load_checkpoint(run / "checkpoint-6")
    names = ("adapter_model", "optimizer", "rng")
    tensors = {name: whole.tensors(name) for name in names}
    next(tensor for tensor in tensors[stem].values() if tensor.dim())[0] = math.nan
    records = {name: whole.record(name) for name in whole.manifest["files"] if "json" in name}
    checkpoints.save_checkpoint(
        run, 6, tensors=tensors, records=records, notes=whole.manifest["notes"]
    )
    assert main_guard(lambda: goes_on_with("sft", run)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    what = {"adapter_model": "is not finite; ", "optimizer": "holds infinite numbers or NaN"}
    assert "checkpoint-6: " in error and what[stem] in error
    assert stem == "adapter_model" or error.endswith("go on from an earlier checkpoint-<step>")
    assert goes_on_with("sft", run / "checkpoint-5") == 0


# ---- a disk that refuses -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "number"),
    [("fsync", errno.EIO), ("mkdir", errno.ENOSPC), ("rename", errno.EDQUOT), (None, errno.ENOSPC)],
)
def test_a_disk_that_refuses_a_checkpoint_ends_no_training(
    start, straight, tmp_path, monkeypatch, name, number, capsys
):
    """name: of the call in `os` that fails at the second checkpoint, None for too little space."""
    from engine import checkpoint as checkpoints

    run, saves, saving = tmp_path / "run", [], []
    save = checkpoints.save_checkpoint

    def counted(*arguments, **options):
        saves.append(1)
        saving.append(len(saves) == 2)
        try:
            return save(*arguments, **options)
        finally:
            saving.clear()

    def refusing(call):
        def wrapped(*arguments, **options):
            if saving == [True]:
                raise OSError(number, os.strerror(number))
            return call(*arguments, **options)

        return wrapped

    with monkeypatch.context() as context:
        context.setattr("engine.saving.save_checkpoint", counted)
        owner, call = (shutil, "disk_usage") if name is None else (os, name)
        context.setattr(owner, call, refusing(getattr(owner, call)))
        assert start["sft"](run) == 0
    (warning,) = lines(run / "warnings.jsonl")
    assert warning["step"] == 2
    assert (
        f"checkpoint {run}/checkpoint-2 was not saved: {os.strerror(number)}; it needs "
        in (warning["warning"])
    )
    assert [path.name for path in list_checkpoints(run)] == [
        f"checkpoint-{step}" for step in (1, 3, 4, 5, 6)
    ]
    assert not list(run.glob(".tmp-*"))
    assert_same_run(straight["sft"], run)


def test_a_run_ended_by_a_signal_on_a_full_disk_says_that_it_is_not_saved(
    start, straight, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    clip, calls = run_sft.clip_gradients, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), 15)
            monkeypatch.setattr(shutil, "disk_usage", full)
        return clip(*arguments)

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(run_sft, "clip_gradients", stopping)
        assert main_guard(lambda: start["sft"](run, "--save_steps", "none")) == 1
    err = capsys.readouterr().err
    assert "error: the state after step 5 is not saved: " in err and "Traceback" not in err
    monkeypatch.undo()
    speak(monkeypatch)
    assert (run / "last").readlink().name == "checkpoint-3"
    assert goes_on_with("sft", run) == 0
    assert torch.equal(*(next(iter(adapter(folder).values())) for folder in (straight["sft"], run)))
