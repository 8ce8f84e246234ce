"""Protect the only parser of model output.

Checked: what counts as valid, as parsed, and which labels an answer holds.

A parser that is lenient where the reward is strict, or that hangs on broken text, spoils training
without a visible error.
"""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.answers import ANSWER_FORMATS, parse_answer
from data.labels import LABELS, NO_FINDING, SUPPORT_DEVICES

FORM = "<think>Dense left base.</think>\n<solution>{}</solution>"


def test_strict_answer_gives_every_field():
    answer = parse_answer(
        "  <think>\nDense left base.\n</think>\n\n<solution>Edema, Pleural Effusion</solution>\n"
    )
    assert (answer.valid, answer.parsed, answer.problem) == (True, True, None)
    assert answer.labels == ("Edema", "Pleural Effusion")
    assert answer.unknown == answer.duplicates == answer.contradictions == ()
    assert answer.think == "\nDense left base.\n"
    assert answer.outside == ""
    with pytest.raises(dataclasses.FrozenInstanceError):  # what is logged is what was rewarded
        answer.labels = ()


@pytest.mark.parametrize(
    ("text", "problem", "parsed"),
    [
        ("", "answer_missing", False),
        ("Edema", "answer_missing", False),
        ("<think>a</think>", "answer_missing", False),
        ("<think>a</think><SOLUTION>Edema</SOLUTION>", "answer_missing", False),
        ("<think>a</think><solution >Edema</solution >", "answer_missing", False),
        ("<think>a</think><answer>Edema</answer>", "answer_missing", False),
        ("<think>a</think><solution>Edema, Card", "answer_unclosed", False),
        ("<think>a</think>Edema</solution>", "answer_unopened", False),
        ("<think>a</think></solution>Edema<solution>", "answer_reversed", False),
        (
            "<think>a</think><solution>Edema</solution><solution>Edema</solution>",
            "answer_repeated",
            False,
        ),
        (
            "<think>a</think><solution><solution>Edema</solution></solution>",
            "answer_repeated",
            False,
        ),
        ("<think>a</think><solution>Edema</solution></solution>", "answer_repeated", False),
        (
            "<think>as a <solution> I say</think><solution>Edema</solution>",
            "answer_repeated",
            False,
        ),
        (
            "<think><solution>Edema</solution></think><solution>Edema</solution>",
            "answer_repeated",
            False,
        ),
        ("<solution>Edema</solution>", "think_missing", True),
        ("<THINK>a</THINK><solution>Edema</solution>", "think_missing", True),
        ("<think>a<solution>Edema</solution>", "think_unclosed", True),
        ("a</think><solution>Edema</solution>", "think_unopened", True),
        ("</think>a<think><solution>Edema</solution>", "think_reversed", True),
        ("<think>a</think><think>b</think><solution>Edema</solution>", "think_repeated", True),
        ("<think><think>a</think></think><solution>Edema</solution>", "think_repeated", True),
        ("<solution>Edema</solution><think>a</think>", "order", True),
        ("<think>a<solution>Edema</solution></think>", "order", True),
        ("<think>a<solution>Edema,</think></solution>", "order", True),
        ("<solution>Edema, <think>a</think></solution>", "order", True),
        # The entry "Edema</think>" is no label, and what could be read goes before the form.
        ("<think>a<solution>Edema</think></solution>", "no_label", False),
        ("<solution>Nodule</solution>", "no_label", False),
        ("Sure. <think>a</think><solution>no Edema</solution>", "no_label", False),
        ("Sure. <think>a</think><solution>Edema</solution>", "outside", True),
        ("<think>a</think> so <solution>Edema</solution>", "outside", True),
        ("<think>a</think><solution>Edema</solution> Done.", "outside", True),
        # invisible, but no white space
        ("<think>a</think><solution>Edema</solution>\u200b", "outside", True),
    ],
)
def test_broken_form_is_named_and_never_valid(text, problem, parsed):
    answer = parse_answer(text)
    assert (answer.problem, answer.parsed, answer.valid) == (problem, parsed, False)
    if not parsed:
        assert answer.labels == answer.contradictions == ()
        assert bool(answer.unknown) == (problem == "no_label")


def test_labels_are_read_from_a_parsed_but_invalid_answer():
    assert parse_answer("<solution>Edema</solution> Done.").labels == ("Edema",)


def test_outside_holds_each_piece_of_text_around_the_blocks():
    answer = parse_answer(" before <think>a</think> between <solution>Edema</solution> after ")
    assert answer.outside == "before\nbetween\nafter"
    assert answer.think == "a"
    assert parse_answer("a<think>b</think>c<solution>Edema</solution>d").outside == "a\nc\nd"
    # The wrong order and a block inside the other one leave nothing over.
    assert parse_answer("<solution>Edema</solution><think>a</think> after").outside == "after"
    assert parse_answer("<think>a<solution>Edema</solution></think> after").outside == "after"


def test_reasoning_and_outside_are_kept_of_an_answer_that_cannot_be_read():
    answer = parse_answer("Sure. <think>a</think> <solution>Edema, Card")
    assert (answer.think, answer.outside) == ("a", "Sure.\n<solution>Edema, Card")


@pytest.mark.parametrize("body", ["", "  \n ", ",,", " , ;\n,"])
def test_empty_block_is_a_readable_answer_without_labels(body):
    answer = parse_answer(FORM.format(body))
    assert (answer.problem, answer.parsed, answer.valid, answer.labels) == ("empty", True, True, ())
    without_think = parse_answer(f"<solution>{body}</solution>")
    assert (without_think.problem, without_think.parsed, without_think.valid) == (
        "empty",
        True,
        False,
    )


@pytest.mark.parametrize(
    ("body", "labels", "unknown", "duplicates"),
    [
        (
            "Edema; Cardiomegaly\nFracture,Pneumonia",
            ("Edema", "Cardiomegaly", "Fracture", "Pneumonia"),
            (),
            (),
        ),
        ("\r\n- lung_opacity\r\n- OEDEMA.\r\n", ("Lung Opacity", "Edema"), (), ()),
        ("Edema, pulmonary edema, edema", ("Edema",), (), ("Edema", "Edema")),
        ("no edema, Normal, Fracture", ("Fracture",), ("no edema", "Normal"), ()),
        ("Nodule, nodule", (), ("Nodule",), ("nodule",)),
        # joined by a conjunction, and a list in brackets: tests/data/test_entries.py has many more
        ("Edema and Fracture", ("Edema", "Fracture"), (), ()),
        ('["Edema", "Fracture"]', ("Edema", "Fracture"), (), ()),
        ("Edem\u0430", (), ("Edem\u0430",), ()),  # Cyrillic a
        ("Ede\u200bma", ("Edema",), (), ()),  # zero-width space
        ("{labels}, %s, <b>Edema</b>", (), ("{labels}", "%s", "<b>Edema</b>"), ()),
        (",".join(["Edema"] + [""] * 10_000), ("Edema",), (), ()),
    ],
)
def test_entries_are_known_unknown_or_repeated(body, labels, unknown, duplicates):
    answer = parse_answer(FORM.format(body))
    assert (answer.labels, answer.unknown, answer.duplicates) == (labels, unknown, duplicates)
    assert answer.valid  # what the block says does not change the form
    # but entries of which none is a label could not be read
    assert (answer.parsed, answer.problem) == ((True, None) if labels else (False, "no_label"))


@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
def test_entries_without_a_label_are_a_failure_in_every_format(answer_format):
    text = {
        "think_solution": "<think>a</think><solution>Nodule, no Edema, nodule</solution>",
        "solution": "<solution>Nodule, no Edema, nodule</solution>",
        "answer_tag": "<think>a</think><answer>Nodule, no Edema, nodule</answer>",
        "label_list": "Nodule, no Edema, nodule",
    }[answer_format]
    answer = parse_answer(text, answer_format)
    assert (answer.parsed, answer.problem, answer.labels) == (False, "no_label", ())
    # what it did say is kept, for the scores to count
    assert (answer.unknown, answer.duplicates) == (("Nodule", "no Edema"), ("nodule",))
    # the strict form is there, but for a list without tags, which nothing tells from prose
    assert answer.valid == (answer_format != "label_list")
    assert parse_answer(text.replace("Nodule", "Fracture"), answer_format).parsed


def test_an_entry_of_more_than_200_characters_is_not_looked_up():
    # 5 letters and 195 zero-width spaces, which a label's spelling may hold; then one more.
    assert parse_answer(FORM.format("Edema" + "\u200b" * 195)).labels == ("Edema",)
    assert parse_answer(FORM.format("Edema" + "\u200b" * 196)).unknown == (
        "Edema" + "\u200b" * 196,
    )


def test_no_finding_contradicts_every_finding_but_support_devices():
    answer = parse_answer(FORM.format("Edema, No Finding, Support Devices, Fracture"))
    assert answer.contradictions == ("Edema", "Fracture")
    # counted, not repaired
    assert answer.labels == ("Edema", "No Finding", "Support Devices", "Fracture")
    assert parse_answer(FORM.format("No Finding, Support Devices")).contradictions == ()
    assert parse_answer(FORM.format("Edema, Fracture")).contradictions == ()


def test_all_fourteen_labels_are_read_in_the_texts_order():
    assert parse_answer(FORM.format(", ".join(reversed(LABELS)))).labels == tuple(reversed(LABELS))


@pytest.mark.parametrize(
    ("text", "answer_format", "problem", "parsed", "valid"),
    [
        ("<solution>Edema</solution>", "solution", None, True, True),
        ("<think>a</think><solution>Edema</solution>", "solution", "outside", True, False),
        ("Edema", "solution", "answer_missing", False, False),
        ("<think>a</think><answer>Edema</answer>", "answer_tag", None, True, True),
        ("<answer>Edema</answer>", "answer_tag", "think_missing", True, False),
        (
            "<think>a</think><solution>Edema</solution>",
            "answer_tag",
            "answer_missing",
            False,
            False,
        ),
        ("Edema\nFracture", "label_list", None, True, True),
        ("Edema, mild", "label_list", None, True, True),
        ("The lungs are clear.", "label_list", "no_label", False, False),
        (" \n", "label_list", "empty", False, False),
        # Tagged text is no plain list; reading it would take labels out of the reasoning.
        (
            "<think>no edema, fracture, or mass</think> Pneumonia",
            "label_list",
            "tagged",
            False,
            False,
        ),
        *(
            (f"Edema, {tag}", "label_list", "tagged", False, False)
            for tag in ("<think>", "</think>", "<solution>", "</solution>", "<answer>", "</answer>")
        ),
    ],
)
def test_other_formats(text, answer_format, problem, parsed, valid):
    answer = parse_answer(text, answer_format)
    assert (answer.problem, answer.parsed, answer.valid) == (problem, parsed, valid)


def test_label_list_reads_labels():
    answer = parse_answer("Edema\nFracture; mild", "label_list")
    assert (answer.labels, answer.unknown) == (("Edema", "Fracture"), ("mild",))
    assert (answer.think, answer.outside) == (None, "")


def test_unknown_format_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'json'; known: think_solution, solution, answer_tag, label_list"
    ):
        parse_answer("Edema", "json")


# Each would hold up a backtracking pattern or a quadratic loop for hours; the suite's time limit is
# the assertion.
@pytest.mark.parametrize(
    "text",
    [
        "<think" * 200_000,
        "<think>" * 150_000,
        "<solution>" * 100_000,
        "<think>" + "</think><solution>" * 60_000,
        FORM.format("," * 1_000_000),
        FORM.format("x " * 500_000),
        # Half a minute for whoever normalises a long entry: that is quadratic in a run of combining
        # marks.
        FORM.format("a" + "\u0301\u0323" * 100_000),
        FORM.format(",".join(str(i) for i in range(200_000))),
    ],
    ids=[
        "openers",
        "thinks",
        "solutions",
        "pairs",
        "commas",
        "one entry",
        "combining marks",
        "entries",
    ],
)
@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
@pytest.mark.timeout(20)
def test_a_megabyte_of_hostile_text_is_read_at_once(text, answer_format):
    assert parse_answer(text, answer_format).labels == ()


FRAGMENTS = [
    "<think>",
    "</think>",
    "<solution>",
    "</solution>",
    "<answer>",
    "</answer>",
    "<",
    "think",
    ">",
    ",",
    ";",
    "\n",
    " ",
    "Edema",
    "no finding",
    "Support Devices",
    "nodule",
    "\u200b",
    "\ud800",
]


@given(
    text=st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)),
    answer_format=st.sampled_from(ANSWER_FORMATS),
)
def test_any_text_gives_a_consistent_answer(text, answer_format):
    answer = parse_answer(text, answer_format)
    read = answer.problem == "no_label"  # and nothing of it is a label
    assert answer.parsed or not answer.valid or read
    assert answer.parsed or not (answer.labels or answer.contradictions)
    assert answer.parsed or read == bool(answer.unknown) and (read or not answer.duplicates)
    assert answer.valid == (answer.problem is None) or answer.problem in ("empty", "no_label")
    assert set(answer.labels) <= set(LABELS) and len(set(answer.labels)) == len(answer.labels)
    assert not set(answer.contradictions) & {NO_FINDING, SUPPORT_DEVICES}


@given(
    labels=st.lists(st.sampled_from(LABELS), unique=True, min_size=1),
    think=st.text().filter(lambda text: "<" not in text),
    separator=st.sampled_from([", ", ",", "; ", "\n", " ,\n"]),
)
def test_labels_in_the_strict_form_come_back(labels, think, separator):
    answer = parse_answer(f"<think>{think}</think>\n<solution>{separator.join(labels)}</solution>")
    assert answer.valid and answer.problem is None
    assert answer.labels == tuple(labels)
    assert answer.think == think
