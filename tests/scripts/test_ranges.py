"""Protect every number on every command line: each has its range, each slip is one line.

All settings of all commands are walked, so a new one is held to it by itself.

Run: pytest tests/scripts/test_ranges.py
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import get_type_hints

import pytest

import eval.compare
import eval.figures
import eval.matrix
import eval.report
from engine.config import ConfigError, parse_config, range_problems, setting
from engine.merge_settings import MergeConfig
from engine.settings import SFTConfig, sft_problems
from engine.values import Range, take_apart
from eval.settings import EvalConfig
from rl.objective import ObjectiveConfig
from rl.settings import GRPOConfig

COMMANDS = {
    "sft": [SFTConfig],
    "grpo": [GRPOConfig, ObjectiveConfig],
    "evaluate": [EvalConfig],
    "matrix": [eval.matrix.MatrixConfig],
    "report": [eval.report.ReportConfig],
    "compare": [eval.compare.CompareConfig],
    "figures": [eval.figures.FiguresConfig],
    "merge": [MergeConfig],
}


def settings_of(kinds: tuple[type, ...]):
    """List (command, classes, field, kind) of every setting of these kinds."""
    for command, classes in COMMANDS.items():
        for owner in classes:
            hints = get_type_hints(owner)
            for field in dataclasses.fields(owner):
                kind, choices, _, repeated = take_apart(hints[field.name])
                if kind in kinds and not choices:
                    yield pytest.param(classes, field, kind, repeated, id=f"{command}-{field.name}")


def problems(classes, *argv: str, script: str = "sft") -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse_config(classes, argv, script=script, prog="x")
    return error.value.problems


NEVER = ("nan", "inf", "-inf", "1e999", "-1e999", "1_000", "1,000", "16k", "", " 5", "0x10")


@pytest.mark.parametrize(("classes", "field", "kind", "repeated"), list(settings_of((int, float))))
def test_no_number_takes_what_is_none(classes, field, kind, repeated):
    """Also its default lies in its range, and what is next to the range does not."""
    for text in NEVER:
        assert len(problems(classes, f"--{field.name}={text}")) == 1, text
        assert problems(classes, f"--{field.name}={text}")[0].startswith(
            f"--{field.name}: expected"
        )
    found = Range.of(field.metadata["within"])
    defaults = field.default if repeated else (field.default,)
    assert all(default is None or found.holds(default) for default in defaults)
    for end, is_open in ((found.low, found.low_open), (found.high, found.high_open)):
        if math.isfinite(end):
            beyond = end if is_open else end + (-1 if end == found.low else 1)
            assert len(problems(classes, f"--{field.name}={beyond}")) == 1
    if kind is int:
        assert problems(classes, f"--{field.name}={2**64}")
        assert problems(classes, f"--{field.name}=1.5")
        assert not found.low_open and not found.high_open


@pytest.mark.parametrize(("classes", "field", "kind", "repeated"), list(settings_of((str,))))
def test_no_text_is_empty_or_no_name_of_a_file(classes, field, kind, repeated):
    for text in ("", "a\0b", "a\udce9b"):
        found = problems(classes, f"--{field.name}={text}")
        assert len(found) == 1 and found[0].startswith(f"--{field.name}: expected"), text


def test_a_slip_is_one_line_and_all_are_told_together():
    found = problems(
        [SFTConfig],
        *("--seed", "-1", "--learning_rate", "nan", "--max_steps", "1,000", "--output_dir", ""),
        *("--per_device_train_batch_size", "0", "--lora_dropout", "1", "--weight_decay", "1e999"),
    )
    assert sorted(found) == [
        "--learning_rate: expected a number above 0, got 'nan'",
        "--lora_dropout: expected a number at least 0 and below 1, got '1'",
        "--max_steps: expected an integer from 1 to 1000000000 or none, got '1,000'",
        "--output_dir: expected text, got ''",
        "--per_device_train_batch_size: expected an integer from 1 to 65536, got '0'",
        "--seed: expected an integer from 0 to 4294967295, got '-1'",
        "--weight_decay: expected a number at least 0, got '1e999'",
    ]
    long = problems([SFTConfig], "--max_steps", "9" * 5000)
    assert len(long[0]) < 200 and "(5002 characters)" in long[0]


def test_a_recipe_obeys_the_same_ranges(tmp_path):
    (tmp_path / "mine.toml").write_text(
        "seed = 18446744073709551616\nmax_grad_norm = inf\nprompt = ''\n[sft]\nlora_r = 0\n"
        'output_dir = "a\\u0000b"\nmax_steps = -5\nwarmup_ratio = 1\n'
        f"num_train_epochs = {10**400}\n"
    )
    path = str(tmp_path / "mine.toml")
    found = problems([SFTConfig], "--recipe", path)
    assert [line.removeprefix(f"{path}: ").partition(":")[0] for line in found] == [
        "seed",
        "max_grad_norm",
        "prompt",
        "lora_r in [sft]",
        "output_dir in [sft]",
        "max_steps in [sft]",
        "warmup_ratio in [sft]",
        "num_train_epochs in [sft]",
    ]
    assert found[3].endswith("expected an integer from 1 to 65536, got 0")


def test_what_an_adapters_run_noted_is_checked_too():
    """The settings are looked at again once they are complete, wherever a value came from."""
    config = SFTConfig(min_visual_tokens=-3, lora_dropout=math.nan, max_steps=None)
    assert range_problems(config) == [
        "--min_visual_tokens: expected an integer from 1 to 1000000, got -3",
        "--lora_dropout: expected a number at least 0 and below 1, got nan",
    ]
    assert set(range_problems(config)) <= set(sft_problems(config))


# ---- the mechanism -------------------------------------------------------------------------------
def test_a_number_without_a_range_is_a_programming_error():
    @dataclass(frozen=True)
    class Forgotten:
        rate: float = setting(0.5, "no range")

    with pytest.raises(TypeError, match=r"^rate is a number and needs its interval"):
        parse_config([Forgotten], [], script="sft", prog="x")


@pytest.mark.parametrize(
    ("text", "inside", "outside", "words"),
    [
        ("[0, 1)", (0, 0.999), (-1e-9, 1), "at least 0 and below 1"),
        ("(0, 1]", (1e-9, 1), (0, 1.001), "above 0 and at most 1"),
        ("[1, 8]", (1, 8), (0, 9), "from 1 to 8"),
        ("(0, inf)", (5e-324, 1e308), (0, math.inf, math.nan), "above 0"),
        ("(-inf, inf)", (-1e308, 0), (math.inf, -math.inf, math.nan), ""),
        ("[0, 4294967295]", (2**32 - 1,), (2**32, 10**400), "from 0 to 4294967295"),
    ],
)
def test_intervals_by_hand(text, inside, outside, words):
    found = Range.of(text)
    assert all(found.holds(value) for value in inside)
    assert not any(found.holds(value) for value in outside)
    assert found.words() == words


@pytest.mark.parametrize("text", ["", "0 to 1", "[1, 0]", "[0,1]", "(nan, 1)"])
def test_what_is_no_interval(text):
    with pytest.raises(ValueError):
        Range.of(text)


# ---- twice ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "argv",
    [
        # not --train_file, which several hospitals repeat
        ("--output_dir", "a", "--output_dir", "b"),
        ("--output_dir=a", "--output_dir", "b"),
        ("--output-dir=a", "--output_dir=a"),
        ("--bf16", "--no_bf16"),
        ("--no-bf16", "--no_bf16"),
    ],
)
def test_a_flag_that_cannot_be_repeated_is_given_once(argv):
    name = argv[0].partition("=")[0].replace("-", "_").removeprefix("__").removeprefix("no_")
    assert problems([SFTConfig], *argv) == [f"--{name} is given 2 times; give it once"]


def test_three_times_is_told_so_and_a_repeatable_one_gathers():
    found = problems([SFTConfig], "--seed=1", "--seed=2", "--seed", "3")
    assert found == ["--seed is given 3 times; give it once"]
    both = ("--validation_file", "a=x", "--validation_file=b=y", "--validation_file", "c=z", "d=w")
    config = parse_config([SFTConfig], both, script="sft", prog="x").configs[0]
    assert config.validation_file == ("a=x", "b=y", "c=z", "d=w")


def test_a_repeatable_flag_gathers_other_values_alone():
    same = ("--validation_file", "a=x", "b=y", "--validation_file", "a=x")
    assert problems([SFTConfig], *same) == ["--validation_file a=x is given 2 times; give it once"]
    # recipes are laid one over the other, so they are repeatable, too
    found = problems([SFTConfig], "--recipe", "demo", "--config", "demo")
    assert found == ["--recipe demo is given 2 times; give it once"]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_no_command_takes_the_last_of_two(command):
    classes = COMMANDS[command]
    name = "output_dir"
    assert f"--{name} is given 2 times; give it once" in problems(
        classes, f"--{name}=a", f"--{name}", "b"
    )


def test_an_alias_and_its_flag_are_the_same():
    both = ("--data_file", "a=x", "--validation_file", "b=y")  # repeatable: they gather
    config = parse_config([EvalConfig], both, script="eval", prog="x").configs[0]
    assert config.data_file == ("a=x", "b=y")
