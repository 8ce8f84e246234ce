"""Protect the transfer study's command: which runs it makes, and what it refuses.

No model is trained here. Run: pytest tests/scripts/test_transfer_study.py
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.files import sha256_of
from tests.helpers.benchmarks import benchmark_module


@pytest.fixture(scope="module")
def study():
    with benchmark_module("transfer_study") as module:
        yield module


@pytest.fixture
def made(study, tmp_path, monkeypatch):
    """Note the runs in place of making them, and keep the cells in a folder of the test."""
    runs: list[tuple[str, ...]] = []

    def run(self, name, module, *arguments):
        runs.append((name, module, *arguments))
        folder = self.folder / name
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(name.encode())
        (folder / "config.json").write_text('{"settings": {}}')
        row = {"id": "rl-train-00003", "step": 1, "group": 0}
        (folder / "completions.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
        for alpha in study.ALPHAS if module == "engine.merge" else ():
            (folder / f"alpha-{alpha}").mkdir()
            (folder / f"alpha-{alpha}/adapter_model.safetensors").write_bytes(alpha.encode())
        if module == "eval.report":
            point = {"alpha": 0.25, "home": 0.6, "away": 0.5, "gain": 0.02, "error": 0.01}
            choice = {"alpha": 0.25, "points": [point | {"model": "m"}]}
            (folder / "chosen-alpha.json").write_text(json.dumps(choice))
        return 1.0

    cells = tmp_path / "cells"

    def file(arm, seed):
        return cells / f"{arm}-{seed}.json"

    monkeypatch.setattr(study.Workshop, "run", run)
    monkeypatch.setattr(study.Workshop, "answers", lambda self, name, *model: ({}, 2.0))
    monkeypatch.setattr(study, "cell_file", file)
    monkeypatch.setattr(study, "read_cell", lambda arm, seed: file(arm, seed).is_file() or None)
    monkeypatch.setattr(
        study.Workshop, "data_of_more_sft", lambda self, seed: (Path("more.jsonl"), 2.5)
    )
    cells.mkdir()
    return runs, cells


def workshop(study, tmp_path, arms, seeds=(1,)):
    folder = tmp_path / "study"
    with ThreadPoolExecutor(1) as pool:
        for job in study.Workshop(folder).submit(pool, seeds, arms):
            job.result()


def test_every_arm_starts_from_the_sft_run_of_its_seed_and_differs_by_its_own_flags(
    study, made, tmp_path
):
    runs, cells = made
    workshop(study, tmp_path, study.OWN_ARMS)
    flags = {name: rest for name, _, *rest in runs}
    common = ["--recipe", "demo", "--seed", "1", "--adapter_name_or_path", "sft-1"]
    for arm, own in study.GRPO_ARMS.items():
        assert flags[f"{arm}-1"] == [*common, *own]
    assert flags["more-sft-1"][-4:] == ["--train_file", "more.jsonl", "--num_train_epochs", "2.50"]
    assert len(runs) == len(flags)  # each once
    assert {file.stem for file in cells.iterdir()} == {
        "base-None",
        *(f"{arm}-1" for arm in study.OWN_ARMS if arm != "base"),
    }


def test_the_alpha_is_the_reports_and_it_is_chosen_on_validation_images(study, made, tmp_path):
    runs, cells = made
    workshop(study, tmp_path, ["interpolated"])
    flags = {name: rest for name, _, *rest in runs}
    for alpha in study.ALPHAS:
        data = flags[f"answers/interpolated-1-{alpha}"]
        assert "a=demo:study-validation-a" in data and "b=demo:study-validation-b" in data
    cell = json.loads((cells / "interpolated-1.json").read_text())
    assert cell["alpha"] == 0.25 and cell["validation"][0]["gain"] == 0.02
    of_alpha = tmp_path / "study/interpolated-1/alpha-0.25/adapter_model.safetensors"
    assert cell["made_with"]["adapter"] == sha256_of(of_alpha)


def test_what_is_there_is_not_made_again(study, made, tmp_path):
    runs, cells = made
    workshop(study, tmp_path, ["sft", "grpo-hard"], seeds=(1, 2, 3))
    assert [name for name, *_ in runs] == [
        *("sft-1", "sft-2", "grpo-hard-1", "grpo-hard-2", "sft-3", "grpo-hard-3")
    ]
    (cells / "grpo-hard-2.json").unlink()
    runs.clear()
    workshop(study, tmp_path, ["sft", "grpo-hard"], seeds=(1, 2, 3))
    assert runs == [] and (cells / "grpo-hard-2.json").is_file()  # its run was there


def test_elsewhere_a_missing_arm_makes_the_sft_run_that_it_needs(study, made, tmp_path):
    runs, cells = made
    (cells / "sft-1.json").write_text("{}")
    workshop(study, tmp_path, ["grpo-hard"])
    assert [name for name, *_ in runs] == ["sft-1", "grpo-hard-1"]


def test_a_folder_of_another_demo_is_refused(study, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    study.claim(folder)
    study.claim(folder)  # its own
    monkeypatch.setattr(study, "made_with", lambda: {"generator_version": "9"})
    with pytest.raises(SystemExit, match="holds runs of another demo, or other files"):
        study.claim(folder)


def test_cells_of_another_demo_are_refused(study, monkeypatch):
    of_another = study.made_with() | {"base": "0" * 64}
    monkeypatch.setattr(study, "read_cell", lambda arm, seed: {"made_with": of_another})
    with pytest.raises(SystemExit, match=r"base\.json was made with another demo"):
        study.check_cells([1])


def test_every_flag_of_an_arm_is_one_that_the_script_takes(study, tmp_path, monkeypatch):
    """Read by the script's own parser, so that a renamed flag is found here and not after hours."""
    from rl.settings import resolve_grpo

    monkeypatch.chdir(tmp_path)
    for flags in study.GRPO_ARMS.values():
        given = ["--recipe", "demo", "--seed", "1", "--adapter_name_or_path", "none", *flags]
        config = resolve_grpo([*given, "--dry_run"]).configs[0]
        assert config.seed == 1 and config.max_steps
