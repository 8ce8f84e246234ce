"""Whole runs of two ranks: as one rank's, exactly repeated, broken and resumed.

GRPO learns from two hospitals, with weights and with advantages scaled by hospital, SFT from one.

The jobs of one call of torchrun follow each other in its processes (runs.py), and one process runs
those that they are compared with.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import run_grpo
from engine.checkpoint import latest_valid_checkpoint
from tests.helpers.runs import (
    adapter,
    assert_same_run,
    eval_log,
    grpo,
    grpo_flags,
    is_timing,
    largest_difference,
    lines,
    record,
    sft,
    sft_flags,
    train_log,
    write_data,
    write_rows,
)
from tests.helpers.torchrun import Ended, torchrun
from tests.ranks.runs import readable

GRPO_FAMILY, SFT_FAMILY = "qwen2_5_vl", "gemma3"
# A step has 16 completions of 4 prompts, a rollout two steps: 2 ranks x 2 micro-batches of 4.
# Nothing is saved before the end but where a run is broken off.
GRPO = ["--max_steps", "4", "--save_steps", "4", "--eval_steps", "4", "--logging_steps", "1"]
GRPO += ["--reward", "nuanced+fbeta", "--no_vote_baseline", "--learning_rate", "1e-3"]
GRPO += ["--per_device_train_batch_size", "4"]
TWO = ["--gradient_accumulation_steps", "2", "--steps_per_generation", "4"]
ONE = ["--gradient_accumulation_steps", "4", "--steps_per_generation", "8"]
# 13 rows in steps of 4: the last step of an epoch has one row, and one of two ranks has none.
SFT = ["--num_train_epochs", "2", "--lora_dropout", "0.3", "--per_device_train_batch_size", "2"]
SFT += ["--logging_steps", "1", "--save_steps", "2"]


@dataclass
class Runs:
    """Hold where the runs are, and how each rank's job ended: {job: [rank 0's end, rank 1's]}."""

    folder: Path
    ends: dict[str, list[object]]
    end: Ended

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module", autouse=True)
def readable_models():
    with readable():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def data(folder) -> Path:
    return write_data(folder / "data", 13)


@pytest.fixture(scope="module")
def start(tiny_checkpoint, data, folder) -> Path:
    """Train what GRPO begins with."""
    flags = ["--num_train_epochs", "1", "--validation_file", f"site={data}"]
    assert sft(tiny_checkpoint(GRPO_FAMILY), data, folder / "start", *flags) == 0
    return folder / "start"


@pytest.fixture(scope="module")
def hospitals(data) -> list[str]:
    """Part the rows into two hospitals, of which the smaller one comes twice as often."""
    rows = lines(data)
    files = [
        write_rows(data.with_name(f"{name}.jsonl"), part)
        for name, part in (("a", rows[:7]), ("b", rows[7:]))
    ]
    weighted = [f"a={files[0]}@1", f"b={files[1]}@2"]
    return ["--train_file", *weighted, "--scale_by_hospital", "rms"]


def job(name: str, argv: Sequence[str], **more: object) -> dict:
    """Describe a run for runs.py: without a fault, of GRPO, unless it says another thing."""
    usual = {"script": "grpo", "fault": "none", "rank": 1, "mutant": False}
    return {"name": name, "argv": list(argv)} | usual | more


def resumed(name: str, run: Path) -> dict:
    return job(name, ["--resume_from_checkpoint", str(run)])


@pytest.fixture(scope="module")
def grpo_job(folder, data, start, hospitals) -> Callable[..., dict]:
    """Describe a GRPO run of two ranks: `grpo_job("name", "fault", rank=1)`.

    rows: a data file of one hospital in place of the two.
    """

    def describe(
        name: str, fault: str = "none", *more_flags, rows: Path | None = None, **more
    ) -> dict:
        trained = [] if rows else hospitals
        flags = ["--validation_file", f"site={data}", *TWO, *trained, *more_flags]
        argv = grpo_flags(start, rows or data, folder / name, *flags, flags=GRPO)
        return job(name, argv, fault=fault, **more)

    return describe


@pytest.fixture(scope="module")
def as_script(folder, grpo_job) -> Callable[..., tuple[Ended, float]]:
    """Start run_grpo.py by torchrun as a user does -> how it ended, seconds after the fault.

    Each fault is brought about once.
    """

    @functools.cache
    def run(fault: str, rank: int) -> tuple[Ended, float]:
        file = folder / f"{fault}.json"
        file.write_text(json.dumps(grpo_job(fault, fault, rank=rank)))
        end = torchrun(2, "tests.ranks.runs:as_script", file)
        ended, told = time.time(), re.search(r"fault at (\S+)", end.out[rank])
        assert told, end.told()
        return end, ended - float(told[1])

    return run


@pytest.fixture(scope="module")
def runs(folder, data, grpo_job, as_script, tiny_checkpoint) -> Runs:
    """Let two ranks do all jobs, in one call of torchrun."""
    to_damage = write_data(folder / "to-damage", 13)
    as_script("kill", 1)
    for ranks in (1, 2, 4):
        shutil.copytree(folder / "kill", folder / f"killed-{ranks}", symlinks=True)

    def sft_job(name: str) -> dict:
        sites = ["--validation_file", f"site={data}"]
        flags = [*sites, "--gradient_accumulation_steps", "1"]
        argv = sft_flags(tiny_checkpoint(SFT_FAMILY), data, folder / name, *flags, flags=SFT)
        return job(name, argv, script="sft")

    jobs = [
        grpo_job("two"),
        grpo_job("again"),
        grpo_job("first", "first update"),
        resumed("first, resumed", folder / "first"),
        grpo_job("later", "later update", rank=0),
        resumed("later, resumed", folder / "later"),
        grpo_job("mutant", "first update", mutant=True),
        resumed("mutant, resumed", folder / "mutant"),
        grpo_job("image", "image", rows=to_damage),
        grpo_job("full disk of features", "full disk of features"),
        grpo_job("full disk", "full disk", rank=0),
        grpo_job("drift", "drift", "--save_steps", "2"),
        resumed("killed-2", folder / "killed-2"),
        sft_job("sft"),
    ]
    return of_jobs(folder, jobs, 2)


def of_jobs(folder: Path, jobs: Sequence[dict], ranks: int) -> Runs:
    """Let so many ranks do jobs, one after the other."""
    file = folder / f"jobs-of-{ranks}.json"
    file.write_text(json.dumps(jobs))
    end = torchrun(ranks, "tests.ranks.runs:several", file, time_limit=280)
    assert end.code == 0 and not end.left, end.told()
    told = [[json.loads(line) for line in out.splitlines() if '"job"' in line] for out in end.out]
    ends = {each[0]["job"]: [one["ended"] for one in each] for each in zip(*told, strict=True)}
    return Runs(folder, ends, end)


@pytest.fixture(scope="module")
def alone(folder, data, start, hospitals) -> Path:
    """Do one rank's run with the same completions a step and a rollout."""
    sites = ["--validation_file", f"site={data}", *hospitals]
    assert grpo(start, data, folder / "alone", *sites, *ONE, flags=GRPO) == 0
    return folder / "alone"


# ---- the same run --------------------------------------------------------------------------------
def assert_close(one: object, other: object, where: str) -> None:
    """Check that two records are the same, but for times and the order of a sum in fp32."""
    if isinstance(one, float) and isinstance(other, float):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6), where
    elif isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other), where
        for name in one:
            if not is_timing(name):
                assert_close(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other), where
        for number, (mine, its) in enumerate(zip(one, other, strict=True)):
            assert_close(mine, its, f"{where}/{number}")
    else:
        assert one == other, where


def test_two_ranks_make_the_run_of_one(runs, alone):
    assert runs.ends["two"] == [0, 0], runs.end.told()
    completions = lines(alone / "completions.jsonl")
    assert len(completions) == 2 * 32
    for name in ("completions.jsonl", "metrics.jsonl", "warnings.jsonl", "evaluations.jsonl"):
        if (alone / name).exists():
            assert_close(lines(alone / name), lines(runs["two"] / name), name)
    assert [line["step"] for line in train_log(runs["two"])] == [1, 2, 3, 4]
    # with what each hospital earns, and how often it comes: 13 x 1/3 = 4.33 and 13 x 2/3 = 8.67 of
    # 13 positions, so 4 and 9
    logged = train_log(alone)[0]
    assert {"reward/a", "reward/b", "frac_reward_zero_std/b"} <= logged.keys()
    of_b = sum(row["hospital"] == "b" for row in completions) / len(completions)
    shares = [line["share_of_prompts/b"] for line in train_log(alone)[::2]]
    assert of_b == pytest.approx(sum(shares) / 2) and sum(shares) > 1
    # the learning is no small thing beside the difference
    moved = largest_difference(adapter(runs["start"]), adapter(alone))
    assert largest_difference(adapter(alone), adapter(runs["two"])) < 1e-6 < 1e-3 < moved
    for name in ("rewards.json", "monitors.json"):
        assert_close(record(alone / "last" / name), record(runs["two"] / "last" / name), name)
    (predictions,) = alone.glob("predictions-*.jsonl")
    assert lines(predictions) == lines(runs["two"] / predictions.name)
    # and completions and rewards are of many kinds
    assert (
        len({row["completion"] for row in completions})
        > 8
        < len({row["reward"] for row in completions})
    )


def test_a_repeated_run_is_equal_to_the_last_bit(runs):
    assert runs.ends["again"] == [0, 0]
    assert_same_run(runs["two"], runs["again"])


@pytest.mark.parametrize(("name", "rank", "step"), [("first", 1, 2), ("later", 0, 3)])
def test_a_broken_and_resumed_run_is_equal_to_the_last_bit(name, rank, step, runs):
    """An exception in the first update of a rollout, whose completions the windows have seen by
    then, and in a later one."""
    own, told = (
        "RuntimeError: on purpose",
        f"PeerError: rank {rank} failed: RuntimeError: on purpose",
    )
    assert runs.ends[name] == [own if one == rank else told for one in (0, 1)]
    assert f"saved after step {step}; go on with:" in runs.end.err[0]
    assert runs.ends[f"{name}, resumed"] == [0, 0]
    assert_same_run(runs["two"], runs[name])


def test_windows_that_saw_a_rollout_twice_are_noticed(runs):
    """Without the way back of a broken step, what the test above compares is not equal."""
    assert runs.ends["mutant, resumed"] == [0, 0]
    with pytest.raises(AssertionError):
        assert_same_run(runs["two"], runs["mutant"])
    seen, twice = (record(runs[name] / "last/monitors.json") for name in ("two", "mutant"))
    assert seen != twice


# ---- faults --------------------------------------------------------------------------------------
def assert_sound(run: Path, step: int) -> None:
    """Check that a run's newest checkpoint is whole and of a step."""
    newest, rejected = latest_valid_checkpoint(run)
    assert newest is not None and newest.name == f"checkpoint-{step}" and not rejected
    assert not list(run.glob(".tmp-*"))


def test_a_damaged_image_of_one_rank_stops_all(runs):
    first, second = runs.ends["image"]
    assert second.startswith("DataError: example 'e"), second
    assert first == f"PeerError: rank 1 failed: {second}"
    assert_sound(runs["image"], 2)


def test_a_full_disk_of_one_rank_stops_all(runs):
    first, second = runs.ends["full disk of features"]
    assert "No space left" in second and first == f"PeerError: rank 1 failed: {second}"
    assert_sound(runs["full disk of features"], 2)
    first, second = runs.ends["full disk"]  # of rank 0's logs
    assert first.startswith("OSError: [Errno 28]") and second.startswith("PeerError: ")
    newest, rejected = latest_valid_checkpoint(runs["full disk"])
    assert newest is not None and not rejected


def test_a_rank_that_drifts_is_named_and_not_saved(runs):
    first, second = runs.ends["drift"]
    line = (
        "StepFailed: the adapter after step 4 is not the same on all ranks: that of rank 1 differs"
    )
    assert first.startswith(line) and second.startswith(f"PeerError: rank 0 failed: {line}")
    assert_sound(runs["drift"], 2)


@pytest.mark.parametrize(
    ("fault", "rank", "code", "line"),
    [
        ("exception", 1, 1, "error: rank 1 failed: RuntimeError: on purpose"),
        ("kill", 1, -signal.SIGKILL, "error: a rank has ended: torchrun names it"),
    ],
)
def test_a_fault_of_one_rank_ends_all_and_is_the_root_cause(
    fault, rank, code, line, folder, as_script
):
    end, seconds = as_script(fault, rank)
    assert end.code == 1 and end.root_cause == (rank, code) and not end.left, end.told()
    assert end.tracebacks == ([1] if fault == "exception" else []), end.told()
    assert line in end.err[0] and "error:" not in end.err[1], end.told()
    assert seconds < 60  # a second on a quiet machine, and 5 for who waits for the cause
    assert "saved after step 3; go on with:" in end.err[0], end.told()  # the last whole one
    assert_sound(folder / fault, 3)


def test_a_refused_command_line_is_one_line_and_ends_all_at_once(folder, as_script):
    """The others wait for rank 0 then, which never comes."""
    file = folder / "refused.json"
    file.write_text(json.dumps(job("refused", ["--max_steps", "0"])))
    end = torchrun(2, "tests.ranks.runs:as_script", file)
    assert end.code == 1 and end.root_cause == (0, 2) and not end.left, end.told()
    assert end.err[0].count("error:") == 1 and "--max_steps" in end.err[0], end.told()
    assert end.tracebacks == [] and not end.err[1], end.told()
    assert "via 15, forcefully" not in end.torchrun, end.told()  # after 30 s


def test_sigterm_to_one_rank_stops_all_and_saves(folder, as_script):
    end, seconds = as_script("SIGTERM", 1)
    assert end.code == 1 and end.root_cause is not None and end.root_cause[1] == 143, end.told()
    assert end.tracebacks == [] and not end.left and seconds < 60, end.told()
    assert "stopped; go on with:" in end.out[0], end.told()
    newest, rejected = latest_valid_checkpoint(folder / "SIGTERM")
    assert newest is not None and newest.name in ("checkpoint-3", "checkpoint-4") and not rejected


def test_a_killed_run_goes_on_with_1_2_and_4_ranks(runs, alone, folder):
    assert run_grpo.main(["--resume_from_checkpoint", str(folder / "killed-1")]) == 0
    four = of_jobs(folder, [resumed("killed-4", folder / "killed-4")], 4)
    assert runs.ends["killed-2"] == [0, 0] and four.ends["killed-4"] == [0] * 4, four.end.told()
    assert_same_run(runs["two"], runs["killed-2"])
    for ranks in (1, 4):
        run = folder / f"killed-{ranks}"
        assert largest_difference(adapter(alone), adapter(run)) < 1e-6
        for name in ("completions.jsonl", "metrics.jsonl"):
            assert_close(lines(alone / name), lines(run / name), f"{ranks} {name}")


# ---- SFT -----------------------------------------------------------------------------------------
def test_sft_with_dropout_is_equal_to_one_rank_with_twice_the_accumulation(
    runs, folder, data, tiny_checkpoint
):
    flags = ["--validation_file", f"site={data}", "--gradient_accumulation_steps", "2"]
    assert sft(tiny_checkpoint(SFT_FAMILY), data, folder / "sft-alone", *flags, flags=SFT) == 0
    assert runs.ends["sft"] == [0, 0], runs.end.told()
    one, two = folder / "sft-alone", runs["sft"]
    assert largest_difference(adapter(one), adapter(two)) == 0
    assert len(train_log(one)) == 8  # 4 an epoch, of 4, 4, 4 and 1 rows
    for mine, its in zip(train_log(one), train_log(two), strict=True):
        assert {name: value for name, value in mine.items() if not is_timing(name)} == {
            name: value for name, value in its.items() if not is_timing(name)
        }
    assert_close(eval_log(one), eval_log(two), "validation")  # whose sum has another order
    (predictions,) = one.glob("predictions-*.jsonl")
    assert predictions.read_bytes() == (two / predictions.name).read_bytes()
