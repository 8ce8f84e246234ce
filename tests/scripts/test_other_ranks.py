"""Protects resuming with another number of ranks, as a command line decides it: the batch of the
run stays, whether it is resumed by name, by the same command again, or made longer; what memory cut
stays cut; what does not divide is refused.

What many ranks then compute is in tests/ranks/. Run: pytest tests/scripts/test_other_ranks.py
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import run_sft
from engine.config import ConfigError, Resolved, UsageError
from engine.settings import resolve_sft
from rl.settings import resolve_grpo
from tests.helpers.runs import (
    assert_same_run,
    grpo,
    grpo_flags,
    lines,
    record,
    sft,
    sft_flags,
    snapshot,
    speak,
)

MICRO, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
# 4 steps of 2 x 2 = 4 rows
SFT_FLAGS = (f"--{MICRO}", "2", f"--{ACCUMULATION}", "2", "--max_steps", "4", "--save_steps", "1")
# 2 steps of 4 x 4 = 16 completions, which are one rollout of 8 prompts
GRPO_FLAGS = (f"--{ACCUMULATION}", "4", "--max_steps", "2", "--save_steps", "1")


def ranks(monkeypatch, count: int) -> None:
    """Let command lines be read as by the first of so many ranks of torchrun."""
    values = {"RANK": 0, "WORLD_SIZE": count, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": count}
    for name, value in (values | {"MASTER_ADDR": "here", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))


def rewrite(folder: Path, change) -> None:
    """Change config.json of a run and of its checkpoints, whose sums stay right."""
    for config in (folder / "config.json", *folder.glob("checkpoint-*/config.json")):
        changed = record(config)
        change(changed)
        config.write_text(json.dumps(changed))
        manifest = config.with_name("manifest.json")
        if manifest.exists():
            listed, content = record(manifest), config.read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            listed["files"]["config.json"] = {"size": len(content), "sha256": sha256}
            manifest.write_text(json.dumps(listed))


def of_two_ranks(folder: Path) -> None:
    """Let a run of one rank, 2 x 2 rows, look like that of two, which take 2 x 1 each."""

    def change(config: dict) -> None:
        config["settings"][ACCUMULATION]["value"] = 1
        config["batch"] |= {"ranks": 2, "begun": {MICRO: 2, ACCUMULATION: 1}}

    rewrite(folder, change)


def unfinished(folder: Path, step: int) -> None:
    """Take from a finished run all that came after a step."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    for name in ("best", "last"):
        (folder / name).unlink(missing_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    config = record(folder / "config.json")
    del config["finished"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def straight(tiny_checkpoint, tiny_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("ranks") / "straight"
    assert sft(tiny_checkpoint("qwen2_5_vl"), tiny_data, run, *SFT_FLAGS) == 0
    return run


@pytest.fixture(scope="module")
def straight_grpo(tiny_sft_run, tiny_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("ranks") / "grpo"
    with pytest.MonkeyPatch.context() as monkeypatch:
        speak(monkeypatch)
        assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *GRPO_FLAGS) == 0
    return run


@pytest.fixture
def stopped(straight, tmp_path) -> Path:
    """Copy the run as it stood after its first step, as if two ranks had begun it."""
    run = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    unfinished(run, 1)
    of_two_ranks(run)
    return run


@pytest.fixture
def again(tiny_checkpoint, tiny_data, stopped):
    """Read the command that began the run on two ranks once more: `again(*more flags)`."""

    def resolve(*flags: str) -> Resolved:
        command = ("--gradient_accumulation_steps", "1", *flags)
        model = tiny_checkpoint("qwen2_5_vl")
        return resolve_sft(sft_flags(model, tiny_data, stopped, *SFT_FLAGS, *command))

    return resolve


def batch_of(resolved: Resolved) -> tuple[int, int, str]:
    config = resolved.configs[0]
    return (
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        resolved.origins[ACCUMULATION],
    )


def test_one_rank_goes_on_with_a_run_of_two(straight, stopped, capsys):
    """Bit for bit: the steps have the same rows in the same micro-batches."""
    assert run_sft.main(["--resume_from_checkpoint", str(stopped)]) == 0
    assert (
        "goes on with 1 rank: --gradient_accumulation_steps 2, so that an optimizer step keeps its"
        " 4 rows" in capsys.readouterr().err.splitlines()
    )
    assert_same_run(straight, stopped)
    config = record(stopped / "config.json")
    assert config["settings"][ACCUMULATION] == {"value": 2, "origin": "recomputed for 1 rank"}
    # 2 and 1 are still what its command says
    assert config["batch"] == {
        "step": 4,
        "rollout": None,
        "ranks": 1,
        "begun": {MICRO: 2, ACCUMULATION: 1},
    }
    assert [line["step"] for line in lines(stopped / "metrics.jsonl")][-1] == 4
    assert record(stopped / "checkpoint-4/config.json")["batch"] == config["batch"]


def test_the_same_command_goes_on_with_another_number_of_ranks(again, stopped, monkeypatch, capsys):
    assert batch_of(again()) == (2, 2, "recomputed for 1 rank")
    assert batch_of(again("--resume_from_checkpoint", "auto"))[:2] == (2, 2)
    ranks(monkeypatch, 2)
    capsys.readouterr()
    assert batch_of(again()) == (2, 1, "flag")
    assert "goes on with 2 ranks" not in capsys.readouterr().err
    # 4 rows among 4 ranks are single ones
    ranks(monkeypatch, 4)
    with pytest.raises(ConfigError) as error:
        again("--resume_from_checkpoint", "auto")
    assert error.value.problems == [
        "the resumed run has 4 rows an optimizer step, which 4 ranks cannot divide into"
        f" micro-batches of --{MICRO} 2: start 2 ranks, or give --{MICRO} 1"
    ]
    assert batch_of(again("--resume_from_checkpoint", str(stopped), f"--{MICRO}", "1")) == (
        1,
        1,
        "flag",
    )


def test_auto_finds_the_run_below_runs(tiny_checkpoint, tiny_data, stopped, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    stopped.rename(tmp_path / "runs/20300101-000000-sft")
    monkeypatch.chdir(tmp_path)
    auto = (*SFT_FLAGS, f"--{ACCUMULATION}", "1", "--resume_from_checkpoint", "auto")
    command = sft_flags(tiny_checkpoint("qwen2_5_vl"), tiny_data, tmp_path, *auto)
    place = command.index("--output_dir")
    resolved = resolve_sft(command[:place] + command[place + 2 :])
    assert batch_of(resolved) == (2, 2, "recomputed for 1 rank")
    assert resolved.configs[0].resume_from_checkpoint == "runs/20300101-000000-sft"


def test_other_batches_are_refused(again, stopped):
    with pytest.raises(UsageError, match="holds an unfinished run with other settings") as error:
        again(f"--{ACCUMULATION}", "3")
    assert error.value.problems[1:] == [f"--{ACCUMULATION}: the run has 1, the command 3 (flag)"]
    named = ("--resume_from_checkpoint", str(stopped))
    with pytest.raises(ConfigError, match=f"--{ACCUMULATION} 3: the resumed run has 4 rows"):
        again(f"--{ACCUMULATION}", "3", *named)
    # by hand, with the products that it has
    assert batch_of(again(f"--{MICRO}", "4")) == (4, 1, "flag")
    assert batch_of(again(f"--{MICRO}", "1", *named)) == (1, 4, "recomputed for 1 rank")


def test_a_longer_run_keeps_its_batch(straight, tmp_path, monkeypatch):
    run = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    ranks(monkeypatch, 2)
    resolved = resolve_sft(["--resume_from_checkpoint", str(run), "--max_steps", "6"])
    assert batch_of(resolved) == (2, 1, "recomputed for 2 ranks")
    assert resolved.configs[0].max_steps == 6


def test_what_memory_cut_stays_cut(again, stopped):
    cut = {"value": 64, "origin": "out of memory", "was": 8192}
    rewrite(stopped, lambda config: config["settings"].update(max_tokens_per_forward=cut))
    resolved = again()
    assert batch_of(resolved) == (2, 2, "recomputed for 1 rank")
    assert resolved.configs[0].max_tokens_per_forward == 64
    assert resolved.origins["max_tokens_per_forward"] == "out of memory"


def test_a_run_of_an_earlier_version_was_one_ranks(straight, tmp_path, monkeypatch):
    run = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    rewrite(run, lambda config: config.pop("batch"))
    named = ["--resume_from_checkpoint", str(run)]
    assert batch_of(resolve_sft(named)) == (2, 2, "resumed run")
    ranks(monkeypatch, 2)
    assert batch_of(resolve_sft(named)) == (2, 1, "recomputed for 2 ranks")


def test_a_run_that_begins_again_is_the_same(again, stopped, capsys):
    """Ended before its first checkpoint, and begun again on one rank by the command of two."""
    shutil.rmtree(stopped / "checkpoint-1")
    before = record(stopped / "config.json")["batch"]
    resolved = again()
    assert resolved.configs[0].resume_from_checkpoint is None
    assert batch_of(resolved) == (2, 2, "recomputed for 1 rank")
    for path in stopped.glob("*"):
        if path.name not in ("config.json", ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_sft.take_part(resolved) == 0
    assert record(stopped / "config.json")["batch"] == before | {"ranks": 1}


def test_grpo_keeps_its_rollouts(straight_grpo, tiny_sft_run, tiny_data, tmp_path, monkeypatch):
    """16 completions of a step and 32 of a rollout: 4 x 4 and twice as many on one rank."""
    run = shutil.copytree(straight_grpo, tmp_path / "run", symlinks=True)
    assert record(run / "config.json")["batch"] == {
        "step": 16,
        "rollout": 32,
        "ranks": 1,
        "begun": {MICRO: 4, ACCUMULATION: 4, "steps_per_generation": None},
    }
    command = grpo_flags(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *GRPO_FLAGS)
    before = snapshot(run)
    for count, accumulation in ((2, 2), (4, 1)):
        ranks(monkeypatch, count)
        longer = resolve_grpo(_longer(command))
        assert batch_of(longer) == (4, accumulation, f"recomputed for {count} ranks")
        assert longer.configs[0].steps_per_generation is None
    # of 8 ranks each would have half a group
    ranks(monkeypatch, 8)
    with pytest.raises(ConfigError) as error:
        resolve_grpo(_longer(command))
    assert error.value.problems == [
        "the resumed run has 16 completions an optimizer step, which 8 ranks cannot divide into"
        f" micro-batches of --{MICRO} 4 and groups of --num_generations 4: start 4 ranks"
    ]
    assert snapshot(run) == before


def _longer(command: list[str]) -> list[str]:
    """Let a command ask for twice as many steps, so that it goes on with its finished run."""
    place = command.index("--max_steps") + 1
    return [*command[:place], "4", *command[place + 1 :]]


def test_a_damaged_batch_is_named(stopped):
    rewrite(stopped, lambda config: config["batch"].update(step=-4))
    with pytest.raises(UsageError, match=r"config.json: 'batch' is .*; it is no run's"):
        resolve_sft(["--resume_from_checkpoint", str(stopped)])
