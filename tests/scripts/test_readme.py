"""Protects the README from drifting away from the code: line links into the objective, the forks'
diffs and sizes, recipes, the layout tree, flags and files. Run: pytest tests/scripts/test_readme.py
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from data.demo.splits import WRITTEN_SPLITS
from data.prompts import PROMPTS
from data.select import build_parser
from data.traces import main as traces
from engine.merge import MergeConfig
from eval.compare import CompareConfig
from eval.evaluate import EvalConfig
from eval.figures import FiguresConfig
from eval.matrix import MatrixConfig
from eval.report import ReportConfig
from rl.objective import ObjectiveConfig
from rl.settings import GRPOConfig
from run_sft import SFTConfig
from tests.helpers.patches import FORKS, module_of, patch_of, patched, size
from tests.helpers.repository import ROOT

REPORTS = (ReportConfig, CompareConfig, MatrixConfig, FiguresConfig)
README = (ROOT / "README.md").read_text(encoding="utf-8")
TERMS = re.findall(r"\[rl/objective\.py:(\d+)\]\(rl/objective\.py#L(\d+)\) \| `(.+?)` \|", README)


def test_every_term_of_the_objective_has_its_line():
    assert len(TERMS) >= 9  # ratio, clip, min, advantage, KL, beta, the normalisers, the sum


@pytest.mark.parametrize("shown, linked, code", TERMS)
def test_a_line_link_points_to_its_code(shown, linked, code):
    line = (ROOT / "rl" / "objective.py").read_text(encoding="utf-8").splitlines()[int(linked) - 1]
    assert shown == linked and code in line, (
        f"README links line {linked} for {code!r}, which holds {line.strip()!r}"
    )


def test_the_forks_diff_that_is_shown_is_the_patch():
    shown = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1]
    # without the two header lines
    changed = [line for line in patch_of("gspo").splitlines() if line[0] in "+-"][2:]
    assert [line for line in shown.splitlines() if line[0] in "+-"] == changed
    assert all(line in patch_of("gspo").splitlines() for line in shown.splitlines() if line != "@@")


@pytest.mark.parametrize("name", FORKS)
def test_a_forks_row_has_its_size_flag_and_metric(name):
    fork, (added, removed) = FORKS[name], size(patch_of(name))
    value = (
        "" if fork.on is True else f" {fork.on:g}" if isinstance(fork.on, float) else f" {fork.on}"
    )
    metric = f"`{fork.metric}` " if fork.metric else ""
    assert (
        f"| [{name}](tests/forks/{name}.patch) | +{added} -{removed} | `--{fork.field}{value}` |"
        f" {metric}| " in README
    )


def test_the_forks_toy_example_gives_what_it_says(monkeypatch, capsys):
    """-2 e^0.03 = -2.060909; e^0.03 = 1.030455; e^0.02 and e^0.04 = 1.020201 and 1.040811."""
    monkeypatch.setitem(sys.modules, "rl.objective", module_of(patched("gspo"), monkeypatch))
    [example] = re.findall(r"```python\n(import torch\n.*?)```", README, re.DOTALL)
    exec(example, {})
    numbers = [float(number) for number in re.findall(r"-?\d\.\d{4}", capsys.readouterr().out)]
    assert numbers == [-2.0609, 1.0305, 1.0305, 1.0202, 1.0408]
    assert [
        float(number) for number in re.findall(r"-?\d\.\d{4}", example.rpartition("#")[2])
    ] == numbers


def test_the_recipe_table_is_the_shipped_recipes():
    listed = set(re.findall(r"^\| `([a-z0-9.-]+)` \|", README, re.MULTILINE))
    assert listed == {path.stem for path in (ROOT / "engine" / "recipes").glob("*.toml")}


def test_the_prompt_table_is_all_prompts_but_the_demos():
    table = README.split("| prompt | what it asks for |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| ([a-z_]+) \|", table, re.MULTILINE)) == set(PROMPTS) - {"demo"}


def test_every_file_of_the_layout_tree_exists():
    tree = README.split("## Layout")[1].split("```")[1]
    folder, missing = Path("."), []
    for line in tree.strip("\n").splitlines():
        if not line.startswith(" "):
            folder = Path(line.split()[0]).parent
        names = re.findall(r"[\w./-]+\.py|[\w]+/(?= |$)", line)
        for name in names:
            path = ROOT / name if (ROOT / name).exists() else ROOT / folder / name
            missing += [] if path.exists() or (ROOT / "data/demo" / name).exists() else [name]
    assert missing == []


def test_every_flag_named_is_a_flag(capsys):
    configs = (SFTConfig, GRPOConfig, ObjectiveConfig, EvalConfig, MergeConfig, *REPORTS)
    fields = {field.name for config in configs for field in dataclasses.fields(config)}
    # of data.select
    fields |= {fork.field for fork in FORKS.values()} | {
        action.dest for action in build_parser()._actions
    }
    for command in ("export", "import"):
        with pytest.raises(SystemExit):
            traces([command, "--help"])
    fields |= set(re.findall(r"--([a-z_]+)", capsys.readouterr().out))
    named = set(re.findall(r"--([a-z_]+)", README)) - {"help"}
    # which parse_config adds; of data.demo.build_base
    assert named - fields == {"recipe", "family"}


def test_nothing_is_left_to_fill_in():
    assert re.findall(r"@[A-Z]+@|TBD|XXX", README) == []


def test_the_demo_splits_named_exist():
    assert set(re.findall(r"demo:([a-z-]+)", README)) <= set(WRITTEN_SPLITS)


# Plain numbers: ratios, ranks, seeds, and what stands in a formula.
WITHOUT_UNIT = {
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "validation_split",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "seed",
    "temperature",
    "top_p",
    "reward_scale",
    "length_penalty",
    "epsilon_low",
    "epsilon_high",
}


@pytest.mark.parametrize("owner", [SFTConfig, GRPOConfig, ObjectiveConfig, EvalConfig, *REPORTS])
def test_every_setting_of_the_commands_explains_itself(owner):
    for field in dataclasses.fields(owner):
        what = f"{owner.__name__}.{field.name}"
        assert field.metadata["help"], what
        if field.default is None:  # `none` says nothing: what happens then?
            assert field.metadata["unset"], what
        elif field.default != ():
            assert field.metadata["source"], what
        is_number = any(kind in str(field.type) for kind in ("int", "float"))
        assert bool(field.metadata.get("unit")) == (is_number and field.name not in WITHOUT_UNIT), (
            what
        )
        assert "default" not in field.metadata["help"], (
            f"{what}: the default stands in the brackets"
        )
