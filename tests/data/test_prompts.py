"""Protect the instruction variants.

Checked: names that stay, the 14 labels and the answer format in each, the demo's text to the
letter.

Run: pytest tests/data/test_prompts.py
"""

from __future__ import annotations

import hashlib

import pytest

import data.prompts
from data.answers import ANSWER_FORMATS, parse_answer
from data.labels import LABELS, Target
from data.prompts import PROMPTS, SYSTEM_PROMPT, build_messages, solution_text
from engine.config import parse_config
from engine.settings import resolve_sft
from eval.settings import EvalConfig, complete
from rl.rewards import HardReward, NuancedReward
from rl.settings import resolve_grpo

TABLE_1 = (
    "reasoning_narrative",
    "reasoning_self_check",
    "reasoning_hypothesis",
    "reasoning_a",
    "reasoning_b",
    "reasoning_c",
    "reasoning_d",
    "reasoning_e",
    "reasoning_f",
)
SFT_FORMATS = ("reasoning_narrative", "reasoning_a", "free_reasoning", "only_label")


def test_the_names_that_runs_and_recipes_rely_on():
    assert set(PROMPTS) == {"demo", "nv_reason", "label_list", *TABLE_1, *SFT_FORMATS}
    assert all(name == prompt.name for name, prompt in PROMPTS.items())
    assert all(
        f" {name} " in f" {data.prompts.__doc__.replace(chr(10), ' ')} "
        for name in PROMPTS
        if not name.startswith("reasoning_")
    )


def test_the_demo_reads_the_text_that_its_base_model_was_trained_on():
    text = SYSTEM_PROMPT + PROMPTS["demo"].text
    assert (
        PROMPTS["demo"].system == SYSTEM_PROMPT
        and PROMPTS["demo"].answer_format == "think_solution"
    )
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "3641a9ce9e79beefcdad4c1702482a6e3496c3e8a2a9ede36f6ba0c4faeb9c2f"
    )


@pytest.mark.parametrize("name", [*TABLE_1, *SFT_FORMATS, "label_list"])
def test_every_variant_states_the_labels_and_the_form(name):
    text = PROMPTS[name].text
    assert ", ".join(LABELS) in text and "No Finding only if no abnormality is present" in text
    shown = text.split("with nothing before or after it:\n")[-1].replace(
        "label, label, ...", "Edema, Fracture"
    )
    if name == "label_list":
        assert "<" not in text and "separated by commas" in text
    else:  # the form that it shows is the form that the parser takes
        answer = parse_answer(shown, PROMPTS[name].answer_format)
        assert answer.valid and answer.labels == ("Edema", "Fracture")


def test_the_texts_differ_and_fit_a_prompt():
    assert len({prompt.text for prompt in PROMPTS.values()}) == len(PROMPTS)
    # some 1,000 tokens
    assert all(prompt.text.isascii() and len(prompt.text) < 4500 for prompt in PROMPTS.values())


@pytest.mark.parametrize(
    ("name", "cues"),
    [  # the paper's words for each (Table 1)
        ("reasoning_narrative", ("narrative", "evidence")),
        ("reasoning_self_check", ("region by region", "Verify")),
        ("reasoning_hypothesis", ("hypothes", "Compare the candidates")),
        ("reasoning_a", ("twelve mandatory steps", "\n12. ")),
        ("reasoning_b", ("zone by zone", "tell the possible causes apart")),
        ("reasoning_c", ("evidence", "Label-confidence matrix")),
        ("reasoning_d", ("definitions",)),
        ("reasoning_e", ("second look", "behind the heart")),
        ("reasoning_f", ("For each abnormality give a differential diagnosis",)),
        ("free_reasoning", ("concisely",)),
        ("only_label", ("labels only", "without any explanation")),
        ("nv_reason", ("abnormalities and support devices",)),
    ],
)
def test_the_cues(name, cues):
    assert all(cue in PROMPTS[name].text for cue in cues)


def test_reasoning_a_numbers_its_twelve_steps_and_d_defines_every_label():
    steps = [
        line.split(".")[0] for line in PROMPTS["reasoning_a"].text.splitlines() if line[0].isdigit()
    ]
    assert steps == [str(i) for i in range(1, 13)]
    defined = [
        line[2:].split(":")[0]
        for line in PROMPTS["reasoning_d"].text.splitlines()
        if line.startswith("- ")
    ]
    assert defined == list(LABELS)


def test_the_form_of_each():
    forms = {
        name: prompt.answer_format
        for name, prompt in PROMPTS.items()
        if prompt.answer_format != "think_solution"
    }
    assert forms == {
        "only_label": "solution",
        "nv_reason": "answer_tag",
        "label_list": "label_list",
    }
    assert set(forms.values()) <= set(ANSWER_FORMATS)


def test_the_system_text_is_the_prompts_own():
    for name, system in (
        ("free_reasoning", SYSTEM_PROMPT),
        ("nv_reason", "You are a helpful assistant."),
    ):
        first, second = build_messages(PROMPTS[name])
        assert first == {"role": "system", "content": [{"type": "text", "text": system}]}
        assert second["content"] == [
            {"type": "image"},
            {"type": "text", "text": PROMPTS[name].text},
        ]


def test_the_target_of_only_label():
    # CheXpert's order
    assert (
        solution_text({"Fracture", "No Finding", "Edema"})
        == "<solution>No Finding, Edema, Fracture</solution>"
    )
    assert solution_text(()) == "<solution></solution>"
    for labels in ((), ("Edema",), LABELS):
        answer = parse_answer(solution_text(labels), "solution")
        assert answer.valid and answer.labels == labels


def test_only_label_has_no_think_block_for_parser_and_rewards():
    """A right answer of two labels: Jaccard 1. Nuanced: match 100, partial 30 + 20. The same with a
    <think> block is not in the form: Jaccard 0, and 25 points off.
    """
    target = Target(frozenset({"Edema", "Fracture"}))
    bare, reasoned = (
        "<solution>Edema, Fracture</solution>",
        "<think>a</think><solution>Edema, Fracture</solution>",
    )
    hard, nuanced = HardReward(length_penalty=0.1, min_length=0), NuancedReward({})
    for text, jaccard, points in ((bare, 1.0, 150.0), (reasoned, 0.0, 125.0)):
        answer = parse_answer(text, "solution")
        assert (
            hard(answer, target, 10).total == jaccard
            and nuanced(answer, target, 10).total == points
        )
    assert (
        parse_answer(reasoned, "solution").problem == "outside"
        and not parse_answer(bare, "think_solution").valid
    )


def test_nv_reasons_own_form():
    text = "<think>The heart is enlarged.\n</think>\n<answer>Cardiomegaly, Support Devices</answer>"
    answer = parse_answer(text, PROMPTS["nv_reason"].answer_format)
    assert answer.valid and answer.labels == ("Cardiomegaly", "Support Devices")
    assert not parse_answer(text, "think_solution").parsed  # a form is named, never guessed


# ---- which prompt and form a run has -------------------------------------------------------------
def test_grpo_takes_both_from_the_sft_run_before_a_recipe(tiny_sft_run, tiny_data, tmp_path):
    (tmp_path / "a.toml").write_text('prompt = "reasoning_a"\nanswer_format = "solution"\n')
    flags = [
        "--recipe",
        str(tmp_path / "a.toml"),
        "--adapter_name_or_path",
        str(tiny_sft_run("qwen2_5_vl")),
        "--train_file",
        str(tiny_data),
    ]
    resolved = resolve_grpo(flags)
    assert (resolved.configs[0].prompt, resolved.configs[0].answer_format) == (
        "demo",
        "think_solution",
    )
    assert resolved.origins["prompt"] == resolved.origins["answer_format"] == "adapter's run"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("demo", "think_solution")),
        (["--prompt", "demo"], ("demo", "think_solution")),
        (
            ["--prompt", "only_label"],
            ("only_label", "solution"),
        ),  # another prompt brings its own form
        (["--prompt", "nv_reason"], ("nv_reason", "answer_tag")),
        # but for a flag
        (["--prompt", "nv_reason", "--answer_format", "label_list"], ("nv_reason", "label_list")),
        (["--answer_format", "label_list"], ("demo", "label_list")),
    ],
)
def test_sft_and_evaluation_of_an_adapter(tiny_sft_run, tiny_data, flags, expected):
    flags = ["--adapter_name_or_path", str(tiny_sft_run("qwen2_5_vl")), *flags]
    sft = resolve_sft([*flags, "--train_file", str(tiny_data)]).configs[0]
    scored = complete(
        parse_config([EvalConfig], [*flags, "--data_file", "a=x"], script="eval", prog="eval")
    ).configs[0]
    assert (sft.prompt, sft.answer_format) == (scored.prompt, scored.answer_format) == expected
