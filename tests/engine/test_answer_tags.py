"""Protect answers whose tags are special tokens of the tokenizer, as some fine-tunes have them.

Such a tag is text: the parser, the rewards and the logs must see it. Every other special token
stays out of the text.

Run: pytest tests/engine/test_answer_tags.py
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import run_grpo
import run_sft
from data.answers import parse_answer
from data.files import DataError
from data.prompts import Prompt
from engine.encode import Encoder
from engine.model import load_encoder
from engine.runtime import main_guard
from eval import evaluate, matrix
from tests.helpers.runs import SFT, sft
from tests.helpers.tiny import SAVE, examples_of

FAMILIES = list(SAVE)
QWENS = ("qwen2_5_vl", "qwen3_vl")
END = dict.fromkeys(QWENS, "<|im_end|>") | {"gemma3": "<end_of_turn>"}
START = dict.fromkeys(QWENS, "<|im_start|>") | {"gemma3": "<start_of_turn>"}
IMAGE = dict.fromkeys(QWENS, "<|image_pad|>") | {"gemma3": "<image_soft_token>"}
PAD = dict.fromkeys(QWENS, "<|endoftext|>") | {"gemma3": "<pad>"}
PROMPT = Prompt("short", "Which?")
ANSWER = "<think>Hazy bases.</think>\n<solution>Edema</solution>"
PAIR = ("<think>", "</think>", "<solution>", "</solution>")


def with_special_tokens(folder, copy, tokens):
    """Copy a checkpoint and mark tokens as special in its tokenizer.json, as others' files do."""
    shutil.copytree(folder, copy)
    path = copy / "tokenizer.json"
    record = json.loads(path.read_text())
    used = {token["id"] for token in record["added_tokens"]} | set(
        record["model"]["vocab"].values()
    )
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, content in enumerate(tokens, max(used) + 1):
        record["added_tokens"].append({"id": number, "content": content, "special": True} | plain)
    path.write_text(json.dumps(record))
    return copy


@pytest.fixture
def encoder_with(tiny_checkpoint, tmp_path):
    def make(family, tokens) -> Encoder:
        folder = with_special_tokens(tiny_checkpoint(family), tmp_path / "base", tokens)
        return load_encoder(str(folder), min_visual_tokens=4, max_visual_tokens=16)

    return make


@pytest.mark.parametrize(
    "tokens",
    [
        PAIR,
        ("<think>", "</think>"),
        ("</solution>",),
        ("<answer>", "</answer>"),
        ("<thi", "think>"),  # pieces
        (" <solution>", "</solution>\n"),  # with the blanks around them
        ("Edema", "No Finding"),  # labels that somebody added
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_stay_in_the_text_and_can_be_learnt(family, tokens, encoder_with, tiny_images):
    encoder = encoder_with(family, tokens)
    text = (
        "<think>No Finding? Hazy.</think> <solution>Edema</solution>\n<answer>No Finding</answer>"
    )
    ids = encoder.tokenizer(text, add_special_tokens=False).input_ids
    assert set(ids) & {encoder.tokenizer.convert_tokens_to_ids(token) for token in tokens}
    end, start, image, pad = (
        encoder.tokenizer.convert_tokens_to_ids(names[family]) for names in (END, START, IMAGE, PAD)
    )
    sampled = [start, *ids[:3], image, *ids[3:], end, pad, pad]
    assert encoder.decode(torch.tensor(sampled)) == encoder.decode(sampled) == text
    row = encoder.encode_answer(examples_of(tiny_images, 56)[0], PROMPT, text)
    assert row.completion_ids.tolist() == [*ids, end] and row.completion_mask.all()
    assert encoder.notes == [
        f"the tokenizer marks {', '.join(tokens)} as special tokens; they belong to answers and"
        " stay in their text"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parser_reads_what_was_sampled(family, encoder_with):
    encoder = encoder_with(family, PAIR)
    ids = encoder.tokenizer(ANSWER + END[family], add_special_tokens=False).input_ids
    answer = parse_answer(encoder.decode(ids))
    assert answer.valid and answer.labels == ("Edema",) and answer.think == "Hazy bases."


def test_a_stop_token_that_closes_the_answer_is_text(encoder_with):
    encoder = encoder_with("gemma3", PAIR)
    encoder.tokenizer.eos_token = "</solution>"
    again = Encoder(encoder.family, encoder.tokenizer, encoder.image_processor, encoder.config)
    ids = encoder.tokenizer(ANSWER, add_special_tokens=False).input_ids
    assert again.decode(ids) == ANSWER and parse_answer(again.decode(ids)).valid


@pytest.mark.parametrize("token", ["<box>", "[INST]", "<unused1>", "<|think|>", "<tool>"])
def test_other_special_tokens_are_no_text(token, encoder_with, tiny_images):
    encoder = encoder_with("qwen2_5_vl", (token,))
    ids = encoder.tokenizer(f"a{token}b", add_special_tokens=False).input_ids
    assert len(ids) == 3 and encoder.decode(ids) == "ab" and encoder.notes == []
    with pytest.raises(DataError, match="the answer holds the control token"):
        encoder.encode_answer(examples_of(tiny_images, 56)[0], PROMPT, f"a{token}b")


def test_their_lengths_count(encoder_with):
    """By hand: 4 tags, the 10 visible letters of "Hazy bases." and "Edema", one full stop, stop."""
    encoder = encoder_with("qwen2_5_vl", PAIR)
    ids = encoder.tokenizer(ANSWER + "<|im_end|>", add_special_tokens=False).input_ids
    letters = len("Hazybases.") + len("Edema")
    assert encoder.text_length(torch.tensor(ids)) == 4 + letters + 1
    # a tag said over and over is filler like any other word
    many = encoder.tokenizer("<think>" * 40 + "<|im_end|>", add_special_tokens=False).input_ids
    assert encoder.text_length(torch.tensor(many)) <= 3


def test_every_command_says_so_at_the_start(tiny_checkpoint, tiny_data, tmp_path, capsys):
    folder = str(with_special_tokens(tiny_checkpoint("gemma3"), tmp_path / "base", PAIR[:2]))
    note = (
        f"note: {folder}: the tokenizer marks <think>, </think> as special tokens; they belong to"
        " answers and stay in their text"
    )

    def said() -> int:
        return capsys.readouterr().err.splitlines().count(note)

    run = tmp_path / "sft"
    assert sft(folder, tiny_data, run, "--max_steps", "1") == 0
    assert said() == 1
    grpo = ["--model_name_or_path", folder, "--adapter_name_or_path", str(run), "--dry_run"]
    grpo += ["--train_file", str(tiny_data), *SFT[:8]]
    assert main_guard(lambda: run_grpo.main(grpo), errors=(DataError,)) == 0
    assert said() == 1
    asked = ["--data_file", f"a={tiny_data}", "--max_samples", "1", "--max_completion_length", "3"]
    asked += ["--no_bf16", "--prompt", "demo", "--min_visual_tokens", "4"]
    asked += ["--max_visual_tokens", "4"]
    assert (
        evaluate.main(
            ["--model_name_or_path", folder, *asked, "--output_dir", str(tmp_path / "evaluation")]
        )
        == 0
    )
    assert said() == 1
    cells = ["--model", f"base={folder}", *asked, "--output_dir", str(tmp_path / "matrix")]
    assert matrix.main(cells) == 0
    assert said() == 1
    assert (
        run_sft.main(
            ["--model_name_or_path", folder, "--train_file", str(tiny_data), "--dry_run", *SFT]
        )
        == 0
    )
    assert said() == 1
