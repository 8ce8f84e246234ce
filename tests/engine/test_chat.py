"""Protect what is learnt of an answer from the checkpoint's chat template and tokenizer.

Checked against the answer itself: whatever the template does to it, the supervised tokens write it
as the data have it, or one line says why that cannot be.

Run: pytest tests/engine/test_chat.py
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Regex, normalizers

import run_grpo
import run_sft
from data.examples import Example
from data.files import DataError
from data.prompts import SYSTEM_PROMPT, Prompt
from engine.config import UsageError
from engine.encode import Encoder
from engine.model import load_encoder
from engine.runtime import main_guard
from tests.helpers.runs import SFT
from tests.helpers.tiny import GEMMA_TEMPLATE, QWEN_TEMPLATE, SAVE, examples_of

FAMILIES = list(SAVE)
TEMPLATES = {"qwen2_5_vl": QWEN_TEMPLATE, "gemma3": GEMMA_TEMPLATE, "qwen3_vl": QWEN_TEMPLATE}
END = {"qwen2_5_vl": "<|im_end|>", "gemma3": "<end_of_turn>", "qwen3_vl": "<|im_end|>"}
TEXT = "{{ c['text'] }}"
PROMPT = Prompt("short", "Which Findings?")
ANSWER = "<think>Hazy  bases, 10\u00b2 mm.\n\n\u2265 2.</think>\n<solution>Edema</solution>"

# what a template makes of the assistant's text c['text'], and how a line says so
CUTS = {
    "drops reasoning": "{{ c['text'].split('</think>')[-1] }}",
    "lower-cases": "{{ c['text'] | lower }}",
    "text before": "Answer: {{ c['text'] }}",
    "text after": "{{ c['text'] }} [end]",
    "an empty block before": "<think>\n\n</think>\n\n{{ c['text'] }}",
    "a new line after": "{{ c['text'] }}\n",
    "joins lines": "{{ c['text'].split() | join(' ') }}",
    "escapes": "{{ c['text'] | e }}",
    "only reasoning": "{{ c['text'].split('</think>')[0] }}",
    "nothing": "",
    "the date": "{{ strftime_now('%H:%M:%S') }} {{ c['text'] }}",
    "refuses the assistant": "{{ raise_exception('Only user turns are supported') }}",
    "fails": "{{ c['text'] + 1 }}",
}


def for_role(family, role, text):
    """Write the family's template with `text` in the place of the texts of one role."""
    chosen = f"{{% if m['role'] == '{role}' %}}{text}{{% else %}}{TEXT}{{% endif %}}"
    return TEMPLATES[family].replace(TEXT, chosen)


@pytest.fixture
def encoder_with(tiny_checkpoint, tmp_path):
    """Load a checkpoint with another chat template or normaliser."""

    def make(family, template=None, normalizer=None) -> Encoder:
        folder = tmp_path / "base"
        shutil.copytree(tiny_checkpoint(family), folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        encoder = load_encoder(str(folder), min_visual_tokens=4, max_visual_tokens=16)
        if normalizer is not None:
            encoder.tokenizer.backend_tokenizer.normalizer = normalizer
        return encoder

    return make


@pytest.fixture
def example(tiny_images) -> Example:
    return examples_of(tiny_images, 56)[0]


def supervised(encoder, row) -> str:
    return encoder.tokenizer.decode(row.completion_ids[row.completion_mask])


# ---- templates that change an answer -------------------------------------------------------------
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_learnt_as_it_is_whatever_the_template_does(
    family, cut, encoder_with, example, caplog
):
    encoder = encoder_with(family, for_role(family, "assistant", CUTS[cut]))
    row = encoder.encode_answer(example, PROMPT, ANSWER)
    whole = encoder.tokenizer(ANSWER + END[family], add_special_tokens=False).input_ids
    assert row.completion_ids.tolist() == whole
    assert supervised(encoder, row) == ANSWER + END[family]
    encoder.encode_answer(example, PROMPT, ANSWER + " Again")
    (line,) = caplog.messages  # once, however many rows follow
    assert line.startswith("the chat template changes answers (")
    assert "they are learnt as they are; the first is that of example 'e0'" in line


def test_the_change_is_shown(encoder_with, example, caplog):
    encoder = encoder_with(
        "qwen2_5_vl", for_role("qwen2_5_vl", "assistant", "{{ c['text'][:9] }}X")
    )
    encoder.encode_answer(example, PROMPT, "0123456789 and more")
    assert caplog.messages == [
        "the chat template changes answers (from character 10, '0123456789 and more' becomes"
        " '012345678X'); they are learnt as they are; the first is that of example 'e0'"
    ]


@pytest.mark.parametrize("answer", ["\n Edema \n\n", "Edema\n", "  Edema"])
def test_blanks_that_a_template_trims_are_said(encoder_with, example, caplog, answer):
    """As the published template of Gemma 3 does."""
    encoder = encoder_with("gemma3", for_role("gemma3", "assistant", "{{ c['text'] | trim }}"))
    row = encoder.encode_answer(example, PROMPT, answer)
    assert supervised(encoder, row) == "Edema<end_of_turn>"
    assert caplog.messages == [
        "the chat template drops blanks around an answer; the first is that of example 'e0'"
    ]


# ---- tokenizers that change an answer ------------------------------------------------------------
NORMALIZERS = {
    "lower case": (normalizers.Lowercase(), "'<think>Hazy  bases"),
    "NFKC": (normalizers.NFKC(), "bases, 10\u00b2 mm"),
    "blanks": (normalizers.Replace(Regex(" +"), " "), "Hazy bases"),
    "strip accents": (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), None),
}


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_a_tokenizer_that_changes_an_answer_is_refused(kind, encoder_with, example):
    normalizer, shown = NORMALIZERS[kind]
    encoder = encoder_with("qwen2_5_vl", normalizer=normalizer)
    answer = ANSWER if kind != "strip accents" else "Gr\u00f6\u00dfe"
    with pytest.raises(DataError) as caught:
        encoder.encode_answer(example, PROMPT, answer)
    (line,) = caught.value.problems
    assert line.startswith("example 'e0': ") and (shown or "Gr\u00f6") in line
    if kind != "lower case":  # which changes the prompt's tokens already
        assert "the tokenizer changes the answer: from character" in line


def test_composed_accents_are_the_same_text_and_said(encoder_with, example, caplog):
    """As the published tokenizer of Qwen2.5-VL does: NFC."""
    encoder = encoder_with("qwen2_5_vl", normalizer=normalizers.NFC())
    decomposed = unicodedata.normalize("NFD", "Gr\u00f6\u00dfe")
    row = encoder.encode_answer(example, PROMPT, decomposed)
    assert supervised(encoder, row) == "Gr\u00f6\u00dfe<|im_end|>"
    assert caplog.messages == [
        "the tokenizer composes accented characters (NFC); the first is that of example 'e0'"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_that_tidies_what_it_decodes_changes_nothing(family, encoder_with, example):
    encoder = encoder_with(family)
    encoder.tokenizer.clean_up_tokenization_spaces = True
    answer = "It 's here , is n't it ? No . \u80ba \U0001f600 <0x0A>"
    row = encoder.encode_answer(example, PROMPT, answer)
    assert encoder.decode(row.completion_ids) == answer


@pytest.mark.parametrize("answer", ["half \ud83d an emoji", "\udcff"])
def test_half_a_character_is_named(encoder_with, example, answer):
    with pytest.raises(DataError, match="example 'e0': the answer holds half a character"):
        encoder_with("gemma3").encode_answer(example, PROMPT, answer)


# ---- all rows, before the weights ----------------------------------------------------------------
def test_every_row_is_checked_before_the_weights(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch, capsys
):
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    rows[4]["answer"] = "<think>x<|im_end|></think><solution>Edema</solution>"
    rows[9]["answer"] = "<think>x<|image_pad|></think><solution>Edema</solution>"
    for row in rows:
        row["image"] = str(Path(row["image"]))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("engine.policy.load_model", lambda *_, **__: pytest.fail("weights read"))
    argv = ["--model_name_or_path", str(tiny_checkpoint("qwen2_5_vl"))]
    argv += ["--train_file", str(data), "--image_root", str(tiny_data.parent), *SFT]
    argv += ["--output_dir", str(tmp_path / "run")]
    assert main_guard(lambda: run_sft.main(argv), errors=(DataError,)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error")] == [
        "error: example 'e4': the answer holds the control token '<|im_end|>'; remove it from the"
        " text",
        "error: example 'e9': the answer holds the control token '<|image_pad|>'; remove it from"
        " the text",
    ]
    assert not (tmp_path / "run").exists()


# ---- templates that cannot be used, and the system message ---------------------------------------
BROKEN = {
    "syntax": ("{% for m in messages %}", "its chat template fails: Unexpected end of template"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "its chat template fails: access to attribute"),
    "raises": (
        "{{ raise_exception('use the new format') }}",
        "its chat template fails: use the new format",
    ),
    "type": ("{{ messages + 1 }}", "its chat template fails: can only concatenate list"),
    "division": ("{{ 1 / 0 }}", "its chat template fails: division by zero"),
    "a huge range": ("{% for i in range(10**9) %}x{% endfor %}", "its chat template fails: Range"),
    "no text": ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not write the prompt"),
    "lower case": (None, "does not write the prompt's system text as it is"),
    "no image": (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}",
        "the chat template gave 0 image placeholders for 1 image tokens",
    ),
    "lists as they are": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
        "the chat template gave 0 image placeholders for 1 image tokens",
    ),
    "the date": ("the date", "writes today's date into the prompt"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_that_cannot_be_used_is_one_line(family, kind, encoder_with):
    template, expected = BROKEN[kind]
    if kind == "lower case":
        template = TEMPLATES[family].replace(TEXT, "{{ c['text'] | lower }}")
    elif kind == "the date":
        template = TEMPLATES[family].replace(TEXT, "{{ strftime_now('%d %b %Y') }}" + TEXT)
    with pytest.raises(UsageError) as caught:
        encoder_with(family, template)
    (line,) = caught.value.problems
    assert line.startswith("--model_name_or_path ") and expected in line and "\n" not in line


def test_a_date_that_is_not_written_is_no_matter(encoder_with):
    template = "{% if tools %}{{ strftime_now('%d') }}{% endif %}" + QWEN_TEMPLATE
    assert encoder_with("qwen2_5_vl", template).notes == []


REFUSALS = {
    "raises": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}",
    "leaves it out": "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list"
    " %}",
}


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_system_text_that_is_refused_stands_in_the_users_turn(
    family, kind, encoder_with, example
):
    encoder = encoder_with(family, REFUSALS[kind] + TEMPLATES[family])
    row = encoder.encode_answer(example, PROMPT, ANSWER)
    text = encoder.tokenizer.decode(row.prompt.input_ids)
    start = "<bos><start_of_turn>user\n" if family == "gemma3" else "<|im_start|>user\n"
    assert text.startswith(f"{start}{SYSTEM_PROMPT}\n\n")
    assert text.count(SYSTEM_PROMPT) == 1 and text.count(PROMPT.text) == 1
    assert supervised(encoder, row) == ANSWER + END[family]
    (note,) = encoder.notes
    assert "the system text stands at the beginning of the user's message" in note


def test_a_prompt_that_a_template_changes_is_one_line(encoder_with, example):
    trap = "{{ c['text'] | replace('Findings', 'findings') }}"
    encoder = encoder_with("gemma3", GEMMA_TEMPLATE.replace(TEXT, trap))
    with pytest.raises(UsageError, match="prompt 'short', with this model: its chat template does"):
        encoder.encode_prompt(example, PROMPT)
    encoder.encode_prompt(example, dataclasses.replace(PROMPT, text="Which?"))


@pytest.mark.parametrize("script", [run_sft, run_grpo])
def test_the_scripts_end_with_one_line_and_code_2(
    script, tiny_checkpoint, tiny_sft_run, tiny_data, tmp_path, capsys
):
    folder = tmp_path / "base"
    shutil.copytree(tiny_checkpoint("gemma3"), folder)
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    argv = ["--model_name_or_path", str(folder), "--train_file", str(tiny_data), "--dry_run"]
    argv += ["--prompt", "demo", "--no_bf16"]
    if script is run_grpo:
        argv += ["--adapter_name_or_path", str(tiny_sft_run("gemma3"))]
    assert main_guard(lambda: script.main(argv), errors=(DataError,)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "its chat template fails: access to attribute" in errors[0]
