"""Protect `pip install .` from another folder.

Checked: every package, script, recipe and file of the demo base is in setup.cfg.

Run: pytest tests/scripts/test_packaging.py
"""

from __future__ import annotations

import configparser
import fnmatch
import shlex

import pytest

from engine.config import parse_config
from engine.model_files import DEMO_RECIPES
from engine.optim import scheduled_rate
from engine.run import next_command, resume_command
from engine.settings import resolve_sft, validation_files
from rl.objective import ObjectiveConfig
from rl.run import next_command as next_command_of_grpo
from rl.settings import GRPOConfig, grpo_problems, resolve_grpo
from tests.helpers.repository import ROOT


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_package_and_script_is_listed(setup):
    folders = ("data", "engine", "eval", "rl")
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in folders
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(setup["options"]["packages"].split()) == packages
    assert set(setup["options"]["py_modules"].split()) == {
        path.stem for path in ROOT.glob("run_*.py")
    }
    assert all(
        (path.parent / "__init__.py").exists()
        for name in folders
        for path in (ROOT / name).rglob("*.py")
    )


def test_every_other_file_of_a_package_is_package_data(setup):
    for package, patterns in setup["options.package_data"].items():
        folder = ROOT / package.replace(".", "/")
        files = [
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            # READMEs are read in the repository
            if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
        ]
        assert (
            files
            and [
                file
                for file in files
                if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns.split())
            ]
            == []
        )


# each shipped recipe, `robust` after one that has a model and data
RECIPES = [
    ("demo", path.stem) if path.stem == "robust" else (path.stem,)
    for path in (ROOT / "engine" / "recipes").glob("*.toml")
]


@pytest.mark.parametrize("recipes", RECIPES, ids=" ".join)
def test_the_next_command_that_sft_prints_is_one_that_grpo_takes(recipes, tmp_path):
    folder = tmp_path / "my runs"  # a shell takes the command as it is printed
    words = shlex.split(next_command(recipes, folder))
    assert words[:2] == ["python", "run_grpo.py"]
    resolved = parse_config(
        [GRPOConfig, ObjectiveConfig],
        words[2:],
        script="grpo",
        prog="run_grpo.py",
        validate=grpo_problems,
    )
    assert (
        resolved.configs[0].adapter_name_or_path == str(folder) and resolved.configs[0].train_file
    )
    assert resolved.recipes == recipes


@pytest.mark.parametrize("recipe", DEMO_RECIPES)
def test_each_recipe_of_the_demo_watches_home_the_marks_without_meaning_and_the_other_site(recipe):
    for resolve, argv in ((resolve_sft, []), (resolve_grpo, ["--adapter_name_or_path", "none"])):
        config = resolve(["--recipe", recipe, *argv]).configs[0]
        sets = {f"site-{name}": f"demo:validation-{name}" for name in ("a", "a2", "b")}
        assert validation_files(config) == sets
        assert all(file.startswith("demo:") for file in config.train_file) and config.train_file


def test_the_quick_recipe_never_takes_a_step_at_the_demos_rate():
    """Forty steps, of which eight (0.2 x 40) warm up to 3e-4: the first steps have 0, 3.75e-5,
    7.5e-5. A first step at 1e-3, full size in every direction under AdamW, ruins the model.
    """
    config = resolve_grpo(["--recipe", "demo-quick", "--adapter_name_or_path", "none"]).configs[0]
    rates = [scheduled_rate(config, step, config.max_steps) for step in range(40)]
    assert rates[:3] == pytest.approx([0.0, 3.75e-5, 7.5e-5])
    assert max(rates) == pytest.approx(3e-4)


def test_the_next_command_keeps_a_model_that_overruled_the_recipe(tmp_path):
    command = next_command(["medgemma-4b-free-reasoning"], tmp_path, "my-gemma")
    assert "--recipe medgemma-4b-free-reasoning --model_name_or_path my-gemma --adapter" in command


def test_the_next_commands_of_a_run_on_own_data_name_no_data_of_the_demo(tmp_path):
    command = next_command(["demo"], tmp_path, train_file=["own.jsonl"])
    assert command.endswith(f"{tmp_path} --train_file FILE --validation_file NAME=FILE")
    evaluate = f"python -m eval.evaluate --adapter_name_or_path {tmp_path} --data_file"
    assert next_command_of_grpo(["demo"], tmp_path, ["own.jsonl"]) == f"{evaluate} NAME=FILE"
    demo = next_command_of_grpo(["demo"], tmp_path, ["demo:rl-train"])
    assert demo == f"{evaluate} test-a=demo:test-a test-a2=demo:test-a2 test-b=demo:test-b"
    assert next_command_of_grpo(["demo-quick"], tmp_path, ["demo:rl-train"]) == demo
    assert next_command(["demo-quick"], tmp_path).endswith(f"--adapter_name_or_path {tmp_path}")


def test_commands_that_are_printed_keep_a_path_with_blanks_whole(tmp_path):
    folder = tmp_path / "Anna's runs"
    printed = [
        next_command([], folder, "my models/base"),
        next_command_of_grpo(["demo"], folder, ["own.jsonl"]),
        resume_command("run_sft.py", folder),
    ]
    assert all(str(folder) in shlex.split(command) for command in printed)
    assert "my models/base" in shlex.split(printed[0])
