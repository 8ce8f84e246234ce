"""Protect the length that is rewarded: white space and repetition earn nothing, words do.

Run: pytest tests/engine/test_text_length.py
"""

from __future__ import annotations

import random
import re
import string

import pytest
import torch

from engine.encode import Encoder
from engine.text_length import COPY, text_length
from tests.helpers.tiny import SAVE

STOP = ""  # what a stop token writes


def pieces_of(text: str) -> list[str]:
    """Cut a text as tokenizers do: words with the blank before them, signs one by one."""
    return re.findall(r" ?\w+|[^\w]", text)


# One token a word, blank or sign, and what is left of them by hand.
CASES = {
    "nothing": ([], 0),
    "the stop token alone": ([STOP], 1),
    "a control token in the middle": (["Edema", STOP, ".", STOP], 3),
    "words": ([" no", " pleural", " effusion", ".", STOP], 5),
    # blank
    "newlines": (["Edema", *["\n"] * 230, STOP], 2),
    "blanks of all kinds": (
        ["Edema", " ", "\t", "\r\n", "\n\n\n", "\u00a0", "\u3000", "\u2028"],
        1,
    ),
    "newlines between words": ([" a", "\n", " b", "\n", " c", "\n"], 3),
    "zero width": (["Edema", *["\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad"] * 9], 1),
    "blank letters and marks": (
        ["Edema", *"\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\u180b\u180f\ufe00\ufe0f"],
        1,
    ),
    "blank marks beyond 16 bits": (["Edema", "\U000e0100", "\U000e01ef"], 1),
    "control characters": (["Edema", "\x00", "\x07", "\x1b"], 1),
    # one token over and over: the first counts
    "the the the": (["the"] * 230, 1),
    "commas": ([" Edema", *[","] * 230, "</", "solution", ">"], 5),
    "in any case": (["The", " the", " THE", "the "], 1),
    "with blanks between": (["the", "\n", "the", " ", "the"], 1),
    "longer and longer": (["-", "--", "---", "----"], 1),  # a run of a sign is one sign
    "wide forms": (["\uff0c", ",", "\ufe50"], 1),  # full-width and small comma
    "twice is no filler": ([" no", " no", "."], 3),
    # words and phrases over and over: the first copy counts
    "ha ha ha": (["ha", " "] * 40, 1),
    "two by two": (["ha", "!"] * 3, 2),
    "two by two, said twice": (["ha", "!"] * 2, 4),
    "a phrase of five": (pieces_of(" the lungs are clear.") * 40, 5),
    "a phrase of five, cut": (pieces_of(" the lungs are clear.") * 3 + [" the", " lungs"], 5),
    "a phrase of five, twice": (pieces_of(" the lungs are clear.") * 2, 10),
    "a sentence of twenty, twice": ([f" w{i}" for i in range(20)] * 2, 20),
    "a sentence of sixteen, far away": (
        [f" w{i}" for i in range(16)] + [" but", " no"] + [f" w{i}" for i in range(16)],
        16 + 2,
    ),
    "a sentence of fifteen, far away": (
        [f" w{i}" for i in range(15)] + [" but", " no"] + [f" w{i}" for i in range(15)],
        15 + 2 + 15,
    ),
    "two phrases in turn": ([" a", " b", " c", " d", " e", " f", " g", " h", " i"] * 3, 9),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name):
    pieces, expected = CASES[name]
    assert text_length(pieces) == expected


ORDINARY = (
    "<think>The heart is enlarged, with a cardiothoracic ratio of about 0.6. There is a left"
    " pleural effusion and there is a right pleural effusion. No pneumothorax, no fracture, no"
    " consolidation. The left base is hazy, the right base is clear. A pacemaker is seen on the"
    " left. There is no evidence of edema. There is no evidence of a mass."
    "</think><solution>Cardiomegaly, Pleural Effusion, Support Devices</solution>"
)


def test_ordinary_reasoning_has_the_same_length_either_way():
    pieces = [*pieces_of(ORDINARY), STOP]
    assert text_length(pieces) == len([piece for piece in pieces if piece != " "]) > 90


def test_a_token_counts_once_however_long_the_loop():
    rng = random.Random(0)
    for period in range(1, 40):
        unit = ["".join(rng.choices(string.ascii_lowercase, k=9)) for _ in range(period)]
        for copies in (3, 7, 50):
            assert text_length(unit * copies) == period
        twice = period if period >= COPY else 2 * period
        assert text_length(unit * 2) == twice


def test_nonsense_that_does_not_repeat_counts():
    """What the length does not tell, and its documentation says so: ten orders of 14 labels."""
    rng = random.Random(0)
    orders = [rng.sample(string.ascii_lowercase[:14], 14) for _ in range(10)]
    assert text_length([name for order in orders for name in order]) == 140


def test_inputs_are_left_alone_and_counts_add_up():
    pieces = ["a", "\n", "a", "a", "b", STOP]
    assert text_length(pieces) == text_length(tuple(pieces)) == 1 + 1 + 1
    assert pieces == ["a", "\n", "a", "a", "b", STOP]


# ---- with a tokenizer ----------------------------------------------------------------------------
@pytest.fixture(params=list(SAVE))
def encoder(request, tiny_checkpoint) -> Encoder:
    return Encoder.from_pretrained(
        tiny_checkpoint(request.param), min_visual_tokens=4, max_visual_tokens=16
    )


def completion_of(encoder: Encoder, text: str) -> torch.Tensor:
    ids = encoder.tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([*ids, encoder.end_of_turn_id])


ANSWER = "<think>Round mid mass. Left pleural fluid.</think><solution>Lung Lesion</solution>"


def test_a_sampled_answer_has_its_own_length(encoder):
    ids = completion_of(encoder, ANSWER)
    blanks = sum(not encoder.decode(token[None]).strip() for token in ids) - 1  # the stop token
    assert encoder.text_length(ids) == len(ids) - blanks
    assert encoder.text_length(ids[:-1]) == len(ids) - blanks - 1  # cut before its stop token


@pytest.mark.parametrize("filler", ["\n", " ", "\t", "\u200b", "\u3000", "\u2800", "\r\n"])
def test_blanks_after_the_answer_add_nothing(encoder, filler):
    plain, padded = (completion_of(encoder, ANSWER + more) for more in ("", filler * 230))
    # of a character that the tokenizer writes in parts, the parts of the first may be left
    assert encoder.text_length(padded) <= encoder.text_length(plain) + 3
    if filler.isascii():
        assert encoder.text_length(padded) == encoder.text_length(plain)


@pytest.mark.parametrize(
    "filler", [",", " the", " ha", ".", " ha, ha", " clear lungs.", "\U0001f600"]
)
def test_what_is_said_over_and_over_adds_no_more_than_itself(encoder, filler):
    few, many = (completion_of(encoder, ANSWER + filler * times) for times in (60, 230))
    assert len(many) > len(few) + 40 or len(many) == len(few)
    assert encoder.text_length(many) <= encoder.text_length(completion_of(encoder, ANSWER)) + 30


def test_parts_of_a_character_are_told_apart(encoder):
    """Rare characters are written in several tokens, none of which is text by itself."""
    ids = completion_of(encoder, "\u80ba\u7094\u75c7\u72b6")
    if len(ids) > 5:
        assert encoder.text_length(ids) == len(ids)
