"""Protect runs in which memory runs out: errors at every call, and a real limit of the process.

Each run must end where the undisturbed one ends: the same completions and the same adapter, to the
last bit where a cut does not change what lies in a micro-batch together.

Run: pytest tests/scripts/test_out_of_memory.py
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import engine.decoding
import engine.generate
import engine.policy
import engine.remedies
import run_grpo
import run_sft
from engine.resume import find_checkpoint
from eval.evaluate import main as evaluate
from eval.matrix import main as fill_matrix
from tests.faults.acts import kill, raises
from tests.faults.children import forked
from tests.faults.inject import at_calls
from tests.helpers.runs import (
    adapter,
    assert_same_run,
    grpo,
    grpo_flags,
    largest_difference,
    lines,
    record,
    sft,
    sft_flags,
    speak,
    train_log,
    write_data,
    write_rows,
)

FAMILY = "qwen2_5_vl"
M_MMAP_THRESHOLD = -3  # of mallopt, from malloc.h
# Of weights after a cut: gradients are added up in another order, and AdamW divides by their size.
# It is 1.2e-6 at most on the machines seen; a row counted twice moves weights by the rate of 1e-3.
ROUNDING = 1e-5
GIB = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
# Two steps of two micro-batches of four rows. The scores at the end are greedy answers.
SFT_RUN = ["--max_steps", "2", "--per_device_train_batch_size", "4"]
SFT_RUN += ["--gradient_accumulation_steps", "2", "--lora_dropout", "0", "--learning_rate", "1e-3"]
# One rollout of four prompts with four completions each: two updates of two micro-batches.
GRPO_RUN = ["--max_steps", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"]


def runs_out(name: str, number: int, times: int | None = 1):
    """Let memory run out at the n-th call of a function."""
    return at_calls(name, number, raises(torch.OutOfMemoryError(GIB)), times=times)


def cuts(run) -> dict:
    """Read what config.json says that memory has cut: {setting: (value, as it was)}."""
    settings = record(run / "config.json")["settings"].items()
    return {
        name: (entry["value"], entry["was"])
        for name, entry in settings
        if entry["origin"] == "out of memory"
    }


@pytest.fixture(scope="module")
def straight_sft(tmp_path_factory, tiny_checkpoint, tiny_data):
    run = tmp_path_factory.mktemp("sft") / "run"
    assert sft(tiny_checkpoint(FAMILY), tiny_data, run, *SFT_RUN) == 0
    return run


@pytest.fixture(scope="module")
def straight_grpo(tmp_path_factory, tiny_sft_run, tiny_data):
    run = tmp_path_factory.mktemp("grpo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        speak(patch)
        assert grpo(tiny_sft_run(FAMILY), tiny_data, run, *GRPO_RUN) == 0
    return run


# The calls of a run are counted: the first micro-batch has the first call of a forward pass.
@pytest.mark.parametrize(
    ("name", "number", "cut"),
    [
        ("engine.vision.VisionCache._compute", 2, None),
        ("engine.policy.completion_hidden_states", 1, "max_tokens_per_forward"),
        ("engine.policy.completion_hidden_states", 2, "max_tokens_per_forward"),
        ("torch.Tensor.backward", 1, "max_tokens_per_forward"),
        ("torch.Tensor.backward", 3, "max_tokens_per_forward"),
        ("run_sft.token_logprobs", 3, "max_tokens_per_forward"),
        ("torch.optim.AdamW.step", 2, None),
        ("run_sft.token_logprobs", 4, "max_tokens_per_forward"),  # validation
        ("engine.generate.read_prompts", 1, "per_device_eval_batch_size"),  # the final scores
        ("engine.decoding.read_tokens", 3, "per_device_eval_batch_size"),
    ],
)
def test_sft_ends_where_it_would_have(
    straight_sft, tiny_checkpoint, tiny_data, tmp_path, capsys, name, number, cut
):
    with runs_out(name, number) as seen:
        assert sft(tiny_checkpoint(FAMILY), tiny_data, tmp_path / "run", *SFT_RUN) == 0
    assert len(seen) > number
    found = cuts(tmp_path / "run")
    assert list(found) == ([cut] if cut else [])
    difference = largest_difference(adapter(straight_sft), adapter(tmp_path / "run"))
    assert difference <= (ROUNDING if cut == "max_tokens_per_forward" else 0)
    answers = "predictions-validation.jsonl"
    assert lines(tmp_path / "run" / answers) == lines(straight_sft / answers)


@pytest.mark.parametrize(
    ("name", "number", "cut"),
    [
        ("engine.vision.VisionCache._compute", 1, None),
        ("engine.generate.read_prompts", 1, "sampling_batch_size"),
        ("engine.decoding.read_tokens", 1, "sampling_batch_size"),
        ("engine.decoding.read_tokens", 4, "sampling_batch_size"),
        ("engine.decoding.scaled_logits", 2, "sampling_batch_size"),
        ("engine.policy.completion_logprobs", 1, "max_tokens_per_forward"),  # reference
        ("engine.policy.completion_logprobs", 5, "max_tokens_per_forward"),  # old
        ("engine.policy.completion_logprobs", 7, "max_tokens_per_forward"),  # update 0
        ("engine.policy.completion_logprobs", 10, "max_tokens_per_forward"),  # update 1
        ("engine.forward.token_logprobs", 8, "max_tokens_per_forward"),
        ("torch.Tensor.backward", 1, "max_tokens_per_forward"),
        ("torch.Tensor.backward", 2, "max_tokens_per_forward"),
        ("torch.optim.AdamW.step", 1, None),
    ],
)
def test_grpo_ends_where_it_would_have(
    straight_grpo, tiny_sft_run, tiny_data, tmp_path, monkeypatch, name, number, cut
):
    speak(monkeypatch)
    with runs_out(name, number) as seen:
        assert grpo(tiny_sft_run(FAMILY), tiny_data, tmp_path / "run", *GRPO_RUN) == 0
    assert len(seen) > number
    found = cuts(tmp_path / "run")
    assert list(found) == ([cut] if cut else [])
    difference = largest_difference(adapter(straight_grpo), adapter(tmp_path / "run"))
    assert difference <= (ROUNDING if cut else 0)
    for one, other in zip(
        lines(straight_grpo / "completions.jsonl"),
        lines(tmp_path / "run" / "completions.jsonl"),
        strict=True,
    ):
        assert one["completion"] == other["completion"] and one["reward"] == other["reward"]
    # the policy that sampled and its reference ran in the same micro-batches, cut or not
    assert train_log(tmp_path / "run")[0]["kl"] == 0
    assert train_log(tmp_path / "run")[0]["ratio/mean"] == 1


def test_random_numbers_are_put_back(tiny_checkpoint, tiny_data, tmp_path):
    """Rows that are run one by one are not cut, so their dropout is the same to the last bit."""
    one_by_one = [*SFT_RUN, "--lora_dropout", "0.3", "--max_tokens_per_forward", "1"]
    model = tiny_checkpoint(FAMILY)
    assert sft(model, tiny_data, tmp_path / "straight", *one_by_one) == 0
    with runs_out("torch.Tensor.backward", 5):
        assert sft(model, tiny_data, tmp_path / "run", *one_by_one) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run")


# ---- down to a row -----------------------------------------------------------------------------
@contextmanager
def room_for(rows: int, prompts: int) -> Iterator[None]:
    """Let memory run out in every forward of more completions, and in every reading of more."""
    forward, decode = engine.policy.completion_logprobs, engine.decoding.read_tokens

    def limited(net, family, batch, **options):
        if len(batch.completion_ids) > rows:
            raise torch.OutOfMemoryError(GIB)
        return forward(net, family, batch, **options)

    def decoding(net, family, tokens, *more):
        if len(tokens) > prompts:
            raise torch.OutOfMemoryError(GIB)
        return decode(net, family, tokens, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.policy, "completion_logprobs", limited)
        patch.setattr(engine.decoding, "read_tokens", decoding)
        yield


@pytest.fixture(scope="module")
def cut_grpo(tmp_path_factory, tiny_sft_run, tiny_data):
    """Make a run of two rollouts, in which nothing but single rows fits."""
    run, start = tmp_path_factory.mktemp("cut") / "run", tiny_sft_run(FAMILY)
    flags = [*GRPO_RUN, "--max_steps", "4", "--save_steps", "1", "--seed", "3"]
    with pytest.MonkeyPatch.context() as patch, room_for(rows=1, prompts=1):
        speak(patch)
        assert grpo(start, tiny_data, run, *flags) == 0
    return run


def test_every_size_is_tried_down_to_a_row(cut_grpo):
    found = cuts(cut_grpo)
    assert found["sampling_batch_size"] == (1, None)
    value, before = found["max_tokens_per_forward"]
    assert before == 8192 and value < 8192
    said = [line for line in lines(cut_grpo / "warnings.jsonl") if "out of memory" in str(line)]
    # 16 completions: 8, 4, 2, 1; half of a micro-batch of four rows is less than a prompt
    assert [line["step"] for line in said] == [0] * 5
    assert said[0]["warning"] == (
        "out of memory in rollout (tried to allocate 2.00 GiB): done again with"
        " --sampling_batch_size 8 (was none), which stays"
    )
    assert said[4]["warning"].startswith("out of memory in scoring")
    counted = [line.get("memory_cuts") for line in train_log(cut_grpo)]
    assert counted == [5, None, None, None]  # and nothing is tried again that had failed


@pytest.mark.parametrize("flags", [[], ["--max_tokens_per_forward", "8192"]])
def test_a_resumed_run_begins_with_what_memory_had_cut(
    cut_grpo, tmp_path, monkeypatch, capsys, flags
):
    """The flag of the beginning changes nothing, as where the same command is given again."""
    speak(monkeypatch)
    resumed = ["--resume_from_checkpoint", str(cut_grpo / "checkpoint-1")]
    with room_for(rows=1, prompts=1):
        assert run_grpo.main([*resumed, "--output_dir", str(tmp_path / "run"), *flags]) == 0
    assert_same_run(cut_grpo, tmp_path / "run")
    assert cuts(tmp_path / "run") == cuts(cut_grpo)
    shown = capsys.readouterr().out
    assert any(
        line.split() == ["sampling_batch_size", "1", "out", "of", "memory"]
        for line in shown.splitlines()
    )


def test_cuts_after_the_last_checkpoint_are_known_from_the_folder(cut_grpo, tmp_path):
    """A run that is killed in the step of its first cut has it in config.json alone."""
    checkpoint = find_checkpoint(str(cut_grpo / "checkpoint-1"))[0]
    noted = record(cut_grpo / "config.json")
    assert noted.pop("finished") == {"step": 4}  # which no checkpoint knows
    assert record(checkpoint.path / "config.json") == noted


# ---- where a row does not fit ------------------------------------------------------------------
def test_a_row_that_does_not_fit_ends_the_run_with_the_setting_to_lower(
    straight_sft, tiny_checkpoint, tiny_data, tmp_path
):
    argv = sft_flags(tiny_checkpoint(FAMILY), tiny_data, tmp_path / "run", *SFT_RUN)
    fault = runs_out("torch.Tensor.backward", 3, times=None)
    end = forked(run_sft.main, argv, faults=[fault])
    assert end.code == 1 and "Traceback" not in end.err
    told = [line for line in end.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith(
        "error: out of memory in update (tried to allocate 2.00 GiB), with nothing left to cut:"
        " --gradient_checkpointing would need 0."
    )
    assert "GiB of the " in told[0]
    goes_on = [line for line in (end.out + end.err).splitlines() if "go on with: " in line]
    assert len(goes_on) == 1
    # the advice is taken, and the run ends where it would have
    resumed = ["--resume_from_checkpoint", str(tmp_path / "run"), "--gradient_checkpointing"]
    assert run_sft.main(resumed) == 0
    assert largest_difference(adapter(straight_sft), adapter(tmp_path / "run")) <= ROUNDING


# ---- a real limit of the process ---------------------------------------------------------------
def address_space_used() -> int:
    fields = Path("/proc/self/status").read_text().split()
    return 1024 * int(fields[fields.index("VmSize:") + 1])


@contextmanager
def address_space(script, megabytes: int) -> Iterator[None]:
    """Leave a run so many megabytes beyond what the process has when training begins.

    First all is taken that malloc still has, in the arenas of other threads too. Larger blocks then
    come from the system alone. To be used in a child.
    """
    train, libc = script.train, ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p

    def limited(*arguments) -> None:
        faulthandler.disable()  # a library may abort, which would fill the console of the tests
        libc.mallopt(M_MMAP_THRESHOLD, 2**16)
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (address_space_used(), most))
        for size in (2**22, 2**20, 2**18, 2**16):
            while libc.malloc(ctypes.c_size_t(size)):
                pass
        limit = address_space_used() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
        train(*arguments)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train", limited)
        yield


@pytest.fixture(scope="module")
def long_data(tmp_path_factory) -> Path:
    """Write rows whose answers are of 500 tokens."""
    data = write_data(tmp_path_factory.mktemp("long"))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["answer"] = f"<think>{'x' * 460}</think><solution>Edema</solution>"
    return write_rows(data, rows)


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_run_under_a_limit_of_the_address_space(
    tiny_checkpoint, tiny_sft_run, tiny_data, long_data, tmp_path, monkeypatch, script
):
    """The limit holds the update of single rows, not that of a micro-batch, nor TensorBoard.

    What torch's libraries have kept of earlier work decides which limit that is. So smaller ones
    are tried until the update is cut.
    """
    speak(monkeypatch)
    if script == "sft":
        main, flags, start, data, room = run_sft, sft_flags, tiny_checkpoint, long_data, 39
        more = [*SFT_RUN, "--per_device_train_batch_size", "8"]
    else:
        main, flags, start, data, room = run_grpo, grpo_flags, tiny_sft_run, tiny_data, 28
        more = [*GRPO_RUN, "--per_device_train_batch_size", "16", "--no_sampling_copies"]
        more += ["--gradient_accumulation_steps", "1", "--max_completion_length", "48"]
    more += ["--max_steps", "1", "--learning_rate", "1e-4"]
    assert main.main(flags(start(FAMILY), data, tmp_path / "straight", *more)) == 0
    for megabytes in range(room, 10, -3):
        run = tmp_path / f"run-{megabytes}"
        argv = flags(start(FAMILY), data, run, *more)
        end = forked(main.main, argv, faults=[address_space(main, megabytes)])
        if end.code == 0 and cuts(run):
            break
    assert end.code == 0, end.err
    assert list(cuts(run)) == ["max_tokens_per_forward"]
    assert "out of memory in update (tried to allocate " in end.err
    assert largest_difference(adapter(tmp_path / "straight"), adapter(run)) <= ROUNDING


# ---- evaluation ----------------------------------------------------------------------------------
@pytest.mark.parametrize("votes", [[], ["--num_generations", "4", "--temperature", "1"]])
def test_finished_answers_are_kept_where_an_evaluation_is_cut(
    tiny_sft_run, tiny_data, tmp_path, votes
):
    argv = ["--adapter_name_or_path", str(tiny_sft_run(FAMILY)), "--data_file", f"a={tiny_data}"]
    argv += ["--per_device_eval_batch_size", "4", "--max_completion_length", "8", *votes]
    assert evaluate([*argv, "--output_dir", str(tmp_path / "straight")]) == 0
    # the first prompts of 4 rows have finished after 8 tokens
    with (
        runs_out("engine.decoding.read_tokens", 12),
        at_calls("engine.generate._Writing._completions") as seen,
    ):
        assert evaluate([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    answers = "samples-a.jsonl" if votes else "predictions-a.jsonl"
    assert lines(tmp_path / "run" / answers) == lines(tmp_path / "straight" / answers)
    rows = 2 if votes else 1  # of two parts of an image, where its completions are parted
    assert len(seen) <= 12 * rows
    settings = record(tmp_path / "run/scores-a.json")["run"]["settings"]
    assert settings["per_device_eval_batch_size"] == {"value": 2, "origin": "out of memory"}


def test_a_matrix_goes_on_with_less_at_once(tiny_sft_run, tiny_data, tmp_path, capsys):
    argv = ["--model", f"sft={tiny_sft_run(FAMILY)}", "--prompt", "demo", "--data_file"]
    argv += [f"a={tiny_data}", f"b={tiny_data}", "--max_completion_length", "8"]
    argv += ["--per_device_eval_batch_size", "8"]
    assert fill_matrix([*argv, "--output_dir", str(tmp_path / "straight")]) == 0
    with runs_out("engine.generate.read_prompts", 1):
        assert fill_matrix([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    cell, straight = tmp_path / "run/sft.demo", tmp_path / "straight/sft.demo"
    for name in ("a", "b"):
        assert lines(cell / f"predictions-{name}.jsonl") == lines(
            straight / f"predictions-{name}.jsonl"
        )
        settings = record(cell / f"scores-{name}.json")["run"]["settings"]
        assert settings["per_device_eval_batch_size"] == {"value": 4, "origin": "out of memory"}
    assert capsys.readouterr().err.count("out of memory in evaluation") == 1


def test_an_evaluation_that_does_not_fit_says_what_to_lower(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch
):
    # whatever this machine's processor can: bf16 would be advised where it computes in it
    monkeypatch.setattr(engine.remedies, "computes_bf16", lambda device: False)
    argv = ["--adapter_name_or_path", str(tiny_sft_run(FAMILY)), "--data_file", f"a={tiny_data}"]
    argv += ["--output_dir", str(tmp_path / "run")]
    end = forked(evaluate, argv, faults=[runs_out("engine.decoding.read_tokens", 1, times=None)])
    assert end.code == 1 and "Traceback" not in end.err
    told = [line for line in end.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and told[0].startswith(
        "error: out of memory in evaluation (tried to allocate 2.00 GiB), with nothing left to cut:"
        " the forecast for a single row is 0."
    )


def test_evaluations_during_training_are_cut_too(
    straight_grpo, tiny_sft_run, tiny_data, tmp_path, monkeypatch
):
    """Evaluation and vote at the start, evaluation at the end: nothing of training changes."""
    speak(monkeypatch)
    flags = [*GRPO_RUN, "--validation_file", f"a={tiny_data}"]
    flags += ["--per_device_eval_batch_size", "8"]
    with runs_out("engine.decoding.read_tokens", 2):
        assert grpo(tiny_sft_run(FAMILY), tiny_data, tmp_path / "run", *flags) == 0
    assert cuts(tmp_path / "run") == {"per_device_eval_batch_size": (4, 8)}
    assert largest_difference(adapter(straight_grpo), adapter(tmp_path / "run")) == 0


# ---- the same command again ----------------------------------------------------------------------
@pytest.mark.parametrize("place", [1, 3])
def test_the_same_command_goes_on_with_what_memory_had_cut(
    tiny_checkpoint, tiny_data, tmp_path, place
):
    """Memory runs out in the first update. The run is killed in its first or its third one."""
    more = [*SFT_RUN, "--max_tokens_per_forward", "8000", "--save_steps", "1"]
    more += ["--num_train_epochs", "2", "--max_steps", "3"]
    for name in ("straight", "run"):
        argv = sft_flags(tiny_checkpoint(FAMILY), tiny_data, tmp_path / name, *more)
        faults = [runs_out("torch.Tensor.backward", 1)]
        if name == "run":
            faults.append(at_calls("run_sft.clip_gradients", place, kill))
        end = forked(run_sft.main, argv, faults=faults)
        assert end.code == 0 if name == "straight" else end.signal == signal.SIGKILL
    found = cuts(tmp_path / "run")
    assert found == cuts(tmp_path / "straight") and found["max_tokens_per_forward"][1] == 8000
    # begun anew where there was no checkpoint, and so without the first cut
    again = [runs_out("torch.Tensor.backward", 1)] if place == 1 else []
    end = forked(run_sft.main, argv, faults=again)
    assert end.code == 0, end.err
    assert_same_run(tmp_path / "straight", tmp_path / "run")
