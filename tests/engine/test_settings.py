"""Protect the one rule by which a run takes over what its adapter was made with.

Checked: a flag's value, a recipe's, that of the adapter's run, the default.

Run: pytest tests/engine/test_settings.py
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.config import ConfigError, UsageError, parse_config, setting
from engine.inherited import inherit, settings_of_adapter
from engine.settings import SIZE, THREADS, SFTConfig, resolve_sft, rounded_up
from rl.settings import GRPOConfig, resolve_grpo
from tests.helpers.adapters import write_adapter
from tests.helpers.repository import ROOT

RUN = {
    "prompt": "reasoning_a",
    "answer_format": "label_list",
    "min_visual_tokens": 100,
    "max_visual_tokens": 1000,
}


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """Make adapters: `adapter(**settings)` -> the folder of one of 'demo' with r 4 and alpha 8.

    Its run had these settings.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")

    def make(settings: dict | None = RUN, base: str | None = "demo", **more) -> str:
        folder = write_adapter(tmp_path / "adapter", base_model_name_or_path=base)
        if settings is not None:
            entries = {name: {"value": value} for name, value in (settings | more).items()}
            (folder / "config.json").write_text(json.dumps({"settings": entries}))
        return str(folder)

    return make


def recipe(**values) -> list[str]:
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in values.items()]
    Path("mine.toml").write_text("".join(lines))
    return ["--recipe", "mine.toml"]


def of(resolve, folder: str, *flags: str) -> dict[str, tuple]:
    """Resolve a command line that starts from an adapter -> {setting: (value, origin)}."""
    data = str(Path(folder).parent / "data.jsonl")
    flags = ("--adapter_name_or_path", folder, "--train_file", data, *flags)
    resolved = resolve(list(flags))
    config = resolved.configs[0]
    names = [
        *RUN,
        "model_name_or_path",
        "lora_r",
        "lora_alpha",
    ]
    return {name: (getattr(config, name), resolved.origins[name]) for name in names}


@pytest.mark.parametrize("resolve", [resolve_sft, resolve_grpo])
def test_what_is_not_given_is_that_of_the_adapters_run(adapter, resolve):
    found = of(resolve, adapter())
    assert {name: found[name] for name in RUN} == {
        name: (value, "adapter's run") for name, value in RUN.items()
    }
    assert found["model_name_or_path"] == ("demo", "adapter")


def test_an_adapter_from_elsewhere_has_the_defaults(adapter):
    assert of(resolve_sft, adapter(None)) == {
        "prompt": ("free_reasoning", "default"),
        "answer_format": ("think_solution", "prompt"),  # that of free_reasoning
        "min_visual_tokens": (256, "default"),
        "max_visual_tokens": (512, "default"),
        "model_name_or_path": ("demo", "adapter"),
        "lora_r": (4, "adapter"),
        "lora_alpha": (8, "adapter"),
    }


def test_a_flag_comes_before_a_recipe_before_the_adapters_run(adapter):
    given = recipe(prompt="nv_reason", min_visual_tokens=7, max_visual_tokens=70, lora_r=64)
    assert of(resolve_sft, adapter(), *given, "--max_visual_tokens", "80") == {
        "prompt": ("nv_reason", "recipe mine.toml"),
        "answer_format": ("answer_tag", "prompt"),  # another prompt asks for its own form
        "min_visual_tokens": (7, "recipe mine.toml"),
        "max_visual_tokens": (80, "flag"),
        "model_name_or_path": ("demo", "adapter"),
        "lora_r": (4, "adapter"),  # a recipe cannot change what the adapter is
        "lora_alpha": (8, "adapter"),
    }


def test_bounds_are_compared_once_all_of_them_are_known(adapter):
    folder = adapter()
    # 600 is above the default 512, but the adapter's run has 1000
    assert of(resolve_sft, folder, "--min_visual_tokens", "600")["min_visual_tokens"] == (
        600,
        "flag",
    )
    with pytest.raises(
        ConfigError, match="^--min_visual_tokens 1001 is above --max_visual_tokens 1000$"
    ):
        of(resolve_sft, folder, "--min_visual_tokens", "1001")


def test_grpo_keeps_the_prompt_and_form_of_the_sft_run(adapter):
    folder = adapter()
    found = of(resolve_grpo, folder, *recipe(prompt="nv_reason", answer_format="answer_tag"))
    assert found["prompt"] == ("reasoning_a", "adapter's run")
    assert found["answer_format"] == ("label_list", "adapter's run")
    assert of(resolve_grpo, folder, "--prompt", "reasoning_a")["prompt"] == ("reasoning_a", "flag")
    with pytest.raises(UsageError, match=f"^--prompt demo: the adapter in {folder} was trained wi"):
        of(resolve_grpo, folder, "--prompt", "demo")


def test_a_base_is_the_adapters_own_but_for_a_flag(adapter, monkeypatch, capsys):
    folder = adapter(base="elsewhere/model")
    copy = "data/demo/base"
    monkeypatch.chdir(ROOT)  # a folder may be a copy of what the adapter names
    found = of(resolve_grpo, folder, "--model_name_or_path", copy)
    assert found["model_name_or_path"] == (copy, "flag")
    assert f"{folder} names elsewhere/model as its base; {copy} is" in capsys.readouterr().err
    with pytest.raises(
        UsageError,
        match=f"^--model_name_or_path demo: the adapter in {folder} was trained on elsewhere/model",
    ):
        of(resolve_grpo, folder, "--model_name_or_path", "demo")
    monkeypatch.chdir(Path(folder).parent)
    assert of(resolve_grpo, folder, *recipe(model_name_or_path="elsewhere/model"))[
        "model_name_or_path"
    ] == ("elsewhere/model", "adapter")
    with pytest.raises(
        UsageError,
        match=f"^{folder} was trained on elsewhere/model, not on demo \\(recipe mine.toml\\); give",
    ):
        of(resolve_grpo, folder, *recipe(model_name_or_path="demo"))


def test_an_adapter_that_names_no_base_needs_the_flag(adapter):
    folder = adapter(base=None)
    with pytest.raises(UsageError, match="names no base model; give --model_name_or_path$"):
        of(resolve_sft, folder)
    assert of(resolve_sft, folder, "--model_name_or_path", "demo")["model_name_or_path"] == (
        "demo",
        "flag",
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("min_visual_tokens", "100", "min_visual_tokens is '100', expected int"),
        ("min_visual_tokens", True, "min_visual_tokens is True, expected int"),
        ("prompt", ["demo"], "prompt is ['demo'], expected str"),
    ],
)
def test_a_config_json_that_cannot_be_used_is_named(adapter, name, value, message):
    folder = adapter(**{name: value})
    with pytest.raises(UsageError) as error:
        of(resolve_sft, folder)
    assert str(error.value).startswith(f"{folder}/config.json: {message}")
    assert str(error.value).endswith("; repair or remove the file")


@pytest.mark.parametrize("value", ["mkl", True, ["torch"]])
def test_a_choice_in_config_json_that_there_is_not_is_named(adapter, value):
    folder = adapter(sampling_product=value)
    with pytest.raises(UsageError) as error:
        settings_of_adapter(folder, ["sampling_product"], SFTConfig())
    assert str(error.value) == (
        f"{folder}/config.json: sampling_product is {value!r}, expected one of auto, torch, onednn;"
        " repair or remove the file"
    )
    kept = settings_of_adapter(
        adapter(sampling_product="onednn"), ["sampling_product"], SFTConfig()
    )
    assert kept == {"sampling_product": "onednn"}


def test_a_prompt_of_another_version_is_named_where_it_would_be_used(adapter):
    folder = adapter(prompt="gone")
    with pytest.raises(UsageError, match=f"^{folder}/config.json: there is no prompt 'gone'; ther"):
        of(resolve_sft, folder)
    assert of(resolve_sft, folder, "--prompt", "demo")["prompt"] == ("demo", "flag")


@dataclass(frozen=True)
class Evaluation:
    """Hold the settings of a command that takes over more than training does."""

    adapter_name_or_path: str | None = setting(None, "adapter")
    prompt: str = setting("free_reasoning", "prompt")
    answer_format: str = setting("think_solution", "form")
    min_visual_tokens: int = setting(256, "least", within=SIZE)
    max_visual_tokens: int = setting(512, "most", within=SIZE)
    max_completion_length: int = setting(512, "longest", within=SIZE)
    bf16: bool | None = setting(None, "precision", unset="by device")
    num_threads: int | None = setting(None, "threads", unset="torch's choice", within=THREADS)


def test_the_names_types_and_origins_are_the_callers(adapter):
    """As an evaluation takes over optional settings too, with origins of its own."""
    folder = adapter(bf16=False, num_threads=None, max_completion_length=96)
    names = (*RUN, "bf16", "num_threads", "max_completion_length")
    assert settings_of_adapter(folder, names, Evaluation()) == RUN | {
        "bf16": False,
        "max_completion_length": 96,
    }  # null is as if it were missing
    flags = ["--adapter_name_or_path", folder, "--prompt", "nv_reason"]
    resolved = inherit(
        parse_config([Evaluation], flags, script="eval", prog="x"),
        ("answer_format", "prompt", "bf16", "num_threads"),
        from_run="its config.json",
        from_prompt="prompt {}",
    )
    assert {
        name: (getattr(resolved.configs[0], name), resolved.origins[name])
        for name in ("prompt", "answer_format", "bf16", "num_threads")
    } == {
        "prompt": ("nv_reason", "flag"),
        "answer_format": ("answer_tag", "prompt nv_reason"),
        "bf16": (False, "its config.json"),
        "num_threads": (None, "default"),
    }


def test_without_an_adapter_only_the_form_follows_the_prompt():
    resolved = inherit(
        parse_config([SFTConfig], ["--prompt", "only_label"], script="sft", prog="x")
    )
    assert resolved.configs[0] == SFTConfig(prompt="only_label", answer_format="solution")
    assert resolved.origins["answer_format"] == "prompt"


# ---- what the defaults say -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "whole"),
    [
        (3.0, 3),
        (3.2, 4),
        (62.5, 63),
        (1.1 * 10, 11),  # 11.000000000000002
        (0.07 * 100, 7),  # 7.000000000000001
        (2.00001, 3),
    ],
)
def test_numbers_of_steps_are_rounded_up_but_not_for_the_noise_of_floats(number, whole):
    assert rounded_up(number) == whole


def test_steps_of_fine_tuning_are_whole():
    config = SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1.1
    )
    assert config.steps_per_epoch(80) == 10 and config.total_steps(80) == 11  # 1.1 x 10
    assert config.steps_per_epoch(81) == 11 and config.total_steps(81) == 13  # 1.1 x 11 = 12.1


def test_steps_of_fine_tuning_with_ranks_by_hand():
    config = SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1.1
    )
    assert (config.step_size(), config.step_size(4)) == (8, 32)
    assert config.steps_per_epoch(80, 4) == 3 and config.total_steps(80, 4) == 4  # 1.1 x 3 = 3.3
    assert config.batch_line(80, 4) == (
        "batch       2 sequences x 4 accumulated x 4 ranks = 32 an optimizer step; 3 steps an"
        " epoch, 4 steps in all, early stop after 2 epochs without a better loss"
    )
    assert "2 sequences x 4 accumulated = 8 an optimizer step; 10 steps" in config.batch_line(80)


def test_weight_decay_is_the_papers_in_fine_tuning_and_none_in_grpo():
    """Decay of the adapter pulls a policy towards the base, not towards the SFT adapter."""
    assert (SFTConfig().weight_decay, GRPOConfig().weight_decay) == (0.01, 0.0)


def test_every_recipe_of_grpo_warms_up():
    """AdamW's first steps have full size in every direction. In the demo they cost 284 nats."""
    recipes = list((ROOT / "engine" / "recipes").glob("*.toml"))
    ratios = {
        path.stem: tomllib.loads(path.read_text())["grpo"].get("warmup_ratio") for path in recipes
    }
    # which has no base and follows a recipe that has one
    assert ratios.pop("robust") is None
    of_demo = {name: ratios.pop(name) for name in list(ratios) if name.startswith("demo")}
    assert list(ratios.values()) == [0.05] * 4
    # runs of the demo are short, so that a larger share of them warms up
    assert of_demo == {"demo": 0.1, "demo-gemma": 0.1, "demo-quick": 0.2}
