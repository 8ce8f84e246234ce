"""Protect prompts of one's own: what a file may hold, every problem at once, and its places.

Run: pytest tests/data/test_prompt_files.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

import data.answers
from data.answers import parse_answer
from data.examples import Example
from data.files import DataError, KeptFile
from data.labels import CHEXPERT, LabelSet
from data.prompt_files import prompt_name, prompt_of, prompt_problems, prompt_warnings
from data.prompts import PROMPTS, Prompt, filled, solution_text
from data.sets import answers_to_learn
from engine.config import ConfigError, parse_config
from engine.settings import SFTConfig, resolve_sft

OWN = LabelSet(("Normal", "Sutures", "Mass", "Hernia"), {}, "Normal", ("Sutures", "Mass"))
FORM = "<think>..</think><solution>..</solution>"


def kept(text: str, name: str = "mine") -> KeptFile:
    return KeptFile(f"../prompts/{name}.toml", text)


# ---- what a file may hold ------------------------------------------------------------------------
def test_a_file_is_a_prompt_with_the_labels_in_it():
    file = kept(
        'system = "S"\nanswer_format = "solution"\n'
        'text = "{number}: {labels}. {rule}{{x}} <solution>"'
    )
    assert prompt_of(file, OWN) == Prompt(
        "mine",
        "4: Normal, Sutures, Mass, Hernia. Report Normal only if no abnormality is present;"
        " Sutures and Mass may accompany it.\n{x} <solution>",
        "solution",
        "S",
    )
    assert prompt_name(file) == "mine" and prompt_problems(file) == [] == prompt_warnings(file)


def test_what_is_left_out_is_as_in_the_built_in_prompts_and_a_byte_order_mark_is_passed_over():
    found = prompt_of(kept(f'\ufefftext = "Which? {FORM}"'))
    assert found == Prompt("mine", f"Which? {FORM}", "think_solution", "You read chest X-rays.")


def test_braces_of_a_label_are_no_places():
    label_set = LabelSet(("{labels}", "a {number}"))
    assert filled(Prompt("p", "{labels}; {number}"), label_set).text == "{labels}, a {number}; 2"


def test_without_an_exclusive_label_there_is_no_rule():
    assert filled(Prompt("p", "A.\n{rule}B"), LabelSet(("X",))).text == "A.\nB"
    alone = LabelSet(("X", "Y"), exclusive="X")
    assert filled(Prompt("p", "{rule}"), alone).text == (
        "Report X only if no abnormality is present.\n"
    )


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["key 'text' is missing: what the model is told beside the image"]),
        ('text = " \\n "', ["text is empty; write what the model is told"]),
        ("text = 3", ["text is 3; it must be a string"]),
        ("text = ", ["is not valid TOML: Invalid value (at end of document)"]),
        ('text = "a"\ntext = "b"', ["is not valid TOML: Cannot overwrite a value (at "]),
        ('text = "a"\nform = "b"', ["unknown key 'form'; known: text, system, answer_format"]),
        ('text = "a"\n[system]\nx = 1', ["system is {'x': 1}; it must be a string"]),
        (
            'text = "a"\nanswer_format = "xml"',
            ["answer_format is 'xml'; there are think_solution, solution, answer_tag, label_list"],
        ),
        (
            'text = "a { b\\n}\\n{label} {}"',
            [
                "text, line 1: a lone {; write {{ for a brace",
                "text, line 2: a lone }; write }} for a brace",
                "text, line 3: {label} is no place; there are {labels}, {number}, {rule}",
                "text, line 3: {} is no place; there are {labels}, {number}, {rule}",
            ],
        ),
        ('text = "{labels}}"', ["text, line 1: a lone }; write }} for a brace"]),
        (
            'text = ""\nx = 1\ny = 2\nanswer_format = 5',
            [
                "unknown key 'x'; known: text, system, answer_format",
                "unknown key 'y'; known: text, system, answer_format",
                "text is empty; write what the model is told",
                "answer_format is 5; it must be a string",
            ],
        ),
    ],
)
def test_every_problem_of_a_file_is_named_at_once(text, problems):
    found = prompt_problems(kept(text))
    assert len(found) == len(problems)
    for line, problem in zip(found, problems, strict=True):
        assert line.startswith(f"../prompts/mine.toml: {problem}")
    with pytest.raises(DataError):
        prompt_of(kept(text))


def test_a_file_cannot_have_the_name_of_a_built_in_prompt():
    (problem,) = prompt_problems(kept('text = "a"', "only_label"))
    assert "'only_label' is the name of a built-in prompt; name the file otherwise" in problem


def test_a_text_that_forgets_the_labels_is_warned_of():
    labels = LabelSet(("Tuberculosis", "Silicosis", "Mass", "Goitre", "Hernia"))
    asked = 'text = "Is it {} or a mass?"\nanswer_format = "label_list"'
    (line,) = prompt_warnings(kept(asked.format("tuberculosis")), labels)
    assert "the text does not name Silicosis, Goitre, Hernia: write {labels} where" in line
    assert prompt_warnings(kept(asked.format("{labels}")), labels) == []


def test_a_text_that_forgets_the_tags_of_its_form_is_warned_of():
    (line,) = prompt_warnings(kept('text = "in <think> {labels}"'))
    assert line.startswith(
        "../prompts/mine.toml: the text does not mention <solution>, the tags of"
    )
    assert (
        "<think> and <answer>"
        in prompt_warnings(kept('text = "a"\nanswer_format = "answer_tag"'))[0]
    )
    assert prompt_warnings(kept('text = "{labels}"\nanswer_format = "label_list"')) == []
    assert prompt_warnings(kept(f'text = "{{labels}}"\nsystem = "{FORM}"')) == []
    assert prompt_warnings("nv_reason") == []  # another system's own question


def test_a_built_in_prompt_that_names_chest_labels_is_refused_with_others():
    (problem,) = prompt_problems("reasoning_d", OWN)
    assert problem.startswith(
        "reasoning_d: its text names chest labels that the label file has not"
    )
    usable = {name for name in PROMPTS if not prompt_problems(name, OWN)}
    assert set(PROMPTS) - usable == {"reasoning_b", "reasoning_d", "nv_reason"}
    for name in usable:
        assert "Normal, Sutures, Mass, Hernia" in prompt_of(name, OWN).text
        assert not CHEXPERT.in_text.search(prompt_of(name, OWN).text)
    assert "of the 4 labels" in prompt_of("reasoning_c", OWN).text


def test_the_built_in_prompts_are_what_they_were():
    assert prompt_of("demo") == PROMPTS["demo"] and PROMPTS["demo"].text.startswith(
        "Which findings does this chest X-ray show? Labels: No Finding, Enlarged Cardiomediastinum,"
    )


# ---- the flag ------------------------------------------------------------------------------------
def refused(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve_sft(["--model_name_or_path", "demo", "--train_file", "x.jsonl", *argv])
    return error.value.problems


def test_a_missing_prompt_file_is_answered_by_the_built_in_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("--prompt", "../../gone.toml") == [
        "--prompt ../../gone.toml: no such file, and no instruction variant; there are "
        + ", ".join(PROMPTS)
    ]
    assert refused("--prompt", "../../etc/passwd")[0].startswith(
        "--prompt ../../etc/passwd: no such instruction variant; there are demo,"
    )


def test_files_that_cannot_be_read_are_named_with_all_other_problems(tmp_path):
    (tmp_path / "latin.toml").write_bytes('text = "Röntgen"'.encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("Mass".encode("utf-16"))
    (tmp_path / "large.txt").write_bytes(b"x" * 1_000_001)
    folder = str(tmp_path)
    assert refused("--prompt", f"{folder}/latin.toml", "--lora_r", "0")[:2] == [
        f"--prompt {folder}/latin.toml: is not UTF-8 text (byte 10); save it as UTF-8",
        "--lora_r: expected an integer from 1 to 65536, got '0'",
    ]
    for name, problem in (
        ("gone.txt", "cannot be read: No such file or directory"),
        ("", "cannot be read: Is a directory"),
        ("wide.txt", "is not UTF-8 text (byte 1); save it as UTF-8"),
        ("large.txt", "has more than 1,000,000 bytes; is it the right file?"),
    ):
        assert refused("--label_file", f"{folder}/{name}") == [
            f"--label_file {folder}/{name}: {problem}"
        ]


def test_problems_of_both_files_come_before_anything_is_loaded(tmp_path):
    labels, prompt = tmp_path / "labels.txt", tmp_path / "mine.toml"
    labels.write_text("A, B\nC\nc\n", encoding="utf-8")
    assert refused("--label_file", str(labels)) == [
        f"--label_file {labels}, line 1: 'A, B' holds ',', which ends an entry of an answer",
        f"--label_file {labels}, line 3: 'c' looks like 'C' on line 2; labels must differ",
    ]
    labels.write_text("A\nB\n", encoding="utf-8")
    prompt.write_text('text = "{"', encoding="utf-8")
    assert refused("--label_file", str(labels), "--prompt", str(prompt)) == [
        f"--prompt {prompt}: text, line 1: a lone {{; write {{{{ for a brace"
    ]


def test_a_recipe_may_name_both_files(tmp_path):
    (tmp_path / "labels.txt").write_text("Mass\nHernia\n", encoding="utf-8")
    (tmp_path / "mine.toml").write_text(f'text = "{{labels}} {FORM}"', encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'label_file = "{tmp_path}/labels.txt"\nprompt = "{tmp_path}/mine.toml"\n', "utf-8"
    )
    resolved = parse_config([SFTConfig], ["--recipe", str(recipe)], script="sft", prog="x")
    assert resolved.configs[0].instruction.text == f"Mass, Hernia {FORM}"
    assert resolved.origins["prompt"] == f"recipe {recipe}"


def test_a_kept_text_that_was_changed_is_noticed():
    file = kept('text = "a"')
    assert KeptFile.from_record(file.record()) == file == KeptFile("elsewhere.toml", file.text)
    with pytest.raises(DataError, match=r"mine.toml does not have its SHA-256"):
        KeptFile.from_record(file.record() | {"text": 'text = "b"'})


# ---- a form of answers ---------------------------------------------------------------------------
def test_a_new_form_of_answers_is_one_line(monkeypatch):
    """Parser, prompts, and what is learnt without a teacher follow `_BLOCKS`."""
    monkeypatch.setitem(data.answers._BLOCKS, "finding_tag", ("finding",))
    monkeypatch.setattr("data.prompt_files.ANSWER_FORMATS", tuple(data.answers._BLOCKS))
    assert parse_answer(" <finding>Edema</finding>", "finding_tag").labels == ("Edema",)
    assert parse_answer("<finding>Edema", "finding_tag").problem == "answer_unclosed"
    assert solution_text(["Edema"], answer_format="finding_tag") == "<finding>Edema</finding>"
    example = Example("a", "p", "x", ("Fracture", "Edema"), "d", Path())
    (taught,) = answers_to_learn([example], "finding_tag", "x.jsonl")
    assert taught.answer == "<finding>Edema, Fracture</finding>"
    file = kept('text = "{labels}"\nanswer_format = "finding_tag"')
    assert prompt_of(file).answer_format == "finding_tag"
    assert "<finding>" in prompt_warnings(file)[0]
