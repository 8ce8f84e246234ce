"""Protect how a teacher's answers are read from the forms of services and servers.

Checked: reasoning in a field, a part or a block of its own is joined with the answer, what has no
text is called so, and one damaged answer or line never costs the others.

Run: pytest tests/data/test_teacher_answers.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.files import DataError
from data.teacher_answers import TeacherAnswer, read_answers
from data.traces import main
from tests.helpers.runs import lines, write_data, write_rows

THINK, SOLUTION = "Hazy bases.", "<solution>Edema</solution>"
WHOLE = f"<think>{THINK}</think>\n{SOLUTION}"


def gemini(key: str, *parts: dict, reason: str = "STOP", **fields) -> dict:
    """Write a line of the Gemini API's batch output: the key and a GenerateContentResponse."""
    candidate = {"content": {"parts": [*parts], "role": "model"}, "finishReason": reason}
    return {"key": key, "response": {"candidates": [candidate], "modelVersion": "m"}} | fields


def openai(name: str, content: object, reason: str | None = "stop", **message: object) -> dict:
    """Write a line of OpenAI's batch output, as vLLM's run-batch does too."""
    said = {"role": "assistant", "content": content, "refusal": None} | message
    choice = {"index": 0, "message": said, "finish_reason": reason}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice]}
    return {
        "id": "batch_req_1",
        "custom_id": name,
        "response": {"status_code": 200, "request_id": "r", "body": body},
        "error": None,
    }


def read(tmp_path: Path, *rows: object) -> list[TeacherAnswer]:
    return read_answers(write_rows(tmp_path / "answers.jsonl", list(rows)))


def test_both_output_forms_are_read(tmp_path):
    answers = read(
        tmp_path,
        gemini("a", {"text": "one"}),
        openai("b", "two"),
        gemini(
            "c", {"text": "my notes", "thought": True}, {"text": WHOLE[:9]}, {"text": WHOLE[9:]}
        ),
        gemini("d", {"text": "cut off"}, reason="MAX_TOKENS"),
        openai("e", "cut off", "length"),
        gemini("f", {"text": ""}, reason="SAFETY"),
        openai("g", None, "content_filter"),
        {"key": "i", "error": {"code": 13, "message": "internal"}},
        {"key": "j", "response": {"promptFeedback": {"blockReason": "OTHER"}}},
        openai("k", "x")
        | {"error": {"code": "batch_expired", "message": "late"}, "response": None},
        openai("l", "x")
        | {"response": {"status_code": 400, "body": {"error": {"message": "too long"}}}},
        {"key": "m", "status": {"code": 8}},
        {"custom_id": "n", "response": {"body": {"choices": []}}},
        {"key": "o", "response": {"candidates": "none"}},
    )
    assert answers == [
        TeacherAnswer("a", "one"),
        TeacherAnswer("b", "two"),
        TeacherAnswer("c", WHOLE),
        TeacherAnswer("d", "cut off", ("cut", "MAX_TOKENS")),
        TeacherAnswer("e", "cut off", ("cut", "length")),
        TeacherAnswer("f", "", ("failed", "SAFETY")),
        TeacherAnswer("g", "", ("failed", "content_filter")),
        TeacherAnswer("i", "", ("failed", '{"code": 13, "message": "internal"}')),
        TeacherAnswer("j", "", ("failed", '{"blockReason": "OTHER"}')),
        TeacherAnswer("k", "", ("failed", '{"code": "batch_expired", "message": "late"}')),
        TeacherAnswer("l", "", ("failed", '{"error": {"message": "too long"}}')),
        TeacherAnswer("m", "", ("failed", '{"code": 8}')),
        TeacherAnswer("n", "", ("failed", "no choice")),
        TeacherAnswer("o", "", ("failed", "no candidate")),
    ]


# ---- reasoning elsewhere -------------------------------------------------------------------------
PART = {"type": "text", "text": SOLUTION}


@pytest.mark.parametrize(
    ("row", "where"),
    [
        (openai("a", f"\n\n{SOLUTION}", reasoning=THINK), "reasoning"),
        (openai("a", SOLUTION, reasoning_content=f"\n{THINK}\n"), "reasoning_content"),
        (openai("a", SOLUTION, reasoning=None, reasoning_content=THINK), "reasoning_content"),
        (openai("a", SOLUTION, thinking=THINK), "thinking"),
        # some servers leave the tags where they were
        (openai("a", SOLUTION, reasoning=f"<think>\n{THINK}\n</think>"), "reasoning"),
        (
            openai("a", SOLUTION, reasoning_details=[{"type": "reasoning.text", "text": THINK}]),
            "reasoning_details",
        ),
        (
            openai("a", SOLUTION, thinking_blocks=[{"type": "thinking", "thinking": THINK}]),
            "thinking_blocks",
        ),
        (openai("a", [{"type": "thinking", "thinking": THINK}, PART]), "content"),
        (openai("a", [{"type": "reasoning", "reasoning": THINK}, PART]), "content"),
        (
            openai(
                "a", [{"type": "thinking", "thinking": [{"type": "text", "text": THINK}]}, PART]
            ),
            "content",
        ),
        (gemini("a", {"text": THINK, "thought": True}, {"text": SOLUTION}), "thought"),
        # the model's own block, with tags of its own, or whose first tag the template wrote
        (openai("a", f"<thinking>{THINK}</thinking>\n{SOLUTION}"), "its own block"),
        (openai("a", f"[THINK]{THINK}[/THINK]{SOLUTION}"), "its own block"),
        (openai("a", f"{THINK}\n</think>\n\n{SOLUTION}"), "its own block"),
        # an empty block, as a template writes it that switches the thoughts off
        (openai("a", f"<think>\n\n</think>\n{SOLUTION}", reasoning=THINK), "reasoning"),
        ({"id": "a", "completion": SOLUTION, "reasoning": THINK}, "reasoning"),
        (
            {
                "custom_id": "a",
                "result": {
                    "type": "succeeded",
                    "message": {
                        "content": [
                            {"type": "thinking", "thinking": THINK, "signature": "s"},
                            {"type": "redacted_thinking", "data": "..."},
                            PART,
                        ],
                        "stop_reason": "end_turn",
                    },
                },
            },
            "content",
        ),
        (
            {
                "custom_id": "a",
                "response": {
                    "status_code": 200,
                    "body": {
                        "status": "completed",
                        "output": [
                            {
                                "type": "reasoning",
                                "summary": [{"type": "summary_text", "text": THINK}],
                            },
                            {
                                "type": "message",
                                "content": [{"type": "output_text", "text": SOLUTION}],
                            },
                        ],
                    },
                },
            },
            "reasoning",
        ),
        (
            {
                "custom_id": "a",
                "response": {
                    "body": {
                        "choices": [{"message": {"content": SOLUTION}, "reasoning_content": THINK}]
                    }
                },
            },
            "reasoning_content",
        ),
    ],
)
def test_reasoning_from_elsewhere_becomes_the_think_block(tmp_path, row, where):
    assert read(tmp_path, row) == [TeacherAnswer("a", WHOLE, None, where)]


@pytest.mark.parametrize(
    "row",
    [
        openai("a", WHOLE),
        openai("a", WHOLE, None),
        openai("a", [{"type": "text", "text": WHOLE}]),
        openai("a", [WHOLE[:20], {"type": "output_text", "text": WHOLE[20:]}]),
        # the asked block is there: what the model thought before is its own matter
        openai("a", WHOLE, reasoning="The labels are given, so I say so."),
        openai("a", f"<think>The labels are given.</think>\n{WHOLE}"),
        openai("a", f"<thinking>The labels are given.</thinking>\n\n{WHOLE}"),
        openai("a", f"The labels are given.</think>\n{WHOLE}"),
        openai(
            "a",
            [{"type": "thinking", "thinking": "Given labels."}, {"type": "text", "text": WHOLE}],
        ),
        {"custom_id": "a", "response": {"body": {"choices": [{"text": WHOLE}]}}},
        {"custom_id": "a", "response": {"choices": [{"message": {"content": WHOLE}}]}},
        {
            "custom_id": "a",
            "response": {"body": json.dumps({"choices": [{"message": {"content": WHOLE}}]})},
        },
        {"id": "a", "completion": WHOLE},
    ],
)
def test_a_whole_answer_is_taken_as_it_stands(tmp_path, row):
    (answer,) = read(tmp_path, row)
    assert answer == TeacherAnswer("a", WHOLE)


@pytest.mark.parametrize(
    ("row", "code", "detail"),
    [
        (openai("a", None), "no_text", "there is none at all"),
        (openai("a", "\n"), "no_text", "there is none at all"),
        (
            openai("a", None, reasoning=f"{THINK} {SOLUTION}"),
            "no_text",
            "all of it is in 'reasoning'",
        ),
        (
            openai("a", [{"type": "thinking", "thinking": THINK}]),
            "no_text",
            "all of it is in 'content'",
        ),
        (gemini("a", {"text": THINK, "thought": True}), "no_text", "all of it is in 'thought'"),
        ({"id": "a", "completion": None}, "no_text", "there is none at all"),
        (openai("a", None, refusal="I cannot."), "failed", "refusal: I cannot."),
        (openai("a", [{"type": "refusal", "refusal": "No."}]), "failed", "refusal: No."),
        (
            openai("a", None, "tool_calls", tool_calls=[{"id": "c"}]),
            "failed",
            "a tool call and no text",
        ),
        (openai("a", [{"type": "tool_use", "name": "x"}]), "failed", "only 'tool_use', no text"),
        ({"custom_id": "a", "result": {"type": "expired"}}, "failed", "expired"),
        (openai("a", f"{WHOLE} \ud83d"), "damaged", "half a character"),
        (openai("a", f"{WHOLE} \ufffd"), "damaged", "half a character"),
    ],
)
def test_an_answer_without_a_usable_text_says_why(tmp_path, row, code, detail):
    (answer,) = read(tmp_path, row)
    assert answer.rejected is not None
    assert answer.rejected[0] == code and answer.rejected[1].startswith(detail)


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{THINK}",
        f"<think>a <think> b</think>{SOLUTION}",
        f"Sure! <think>{THINK}</think>{SOLUTION}",
        SOLUTION,
        "</think>" * 50 + SOLUTION,
        "",
    ],
)
def test_nothing_is_made_up_where_there_is_no_reasoning(tmp_path, text):
    (answer,) = read(tmp_path, openai("a", text))
    assert answer.joined == "" and answer.text == text


def test_several_answers_of_one_request_are_all_looked_at(tmp_path):
    row = openai("a", "first")
    choices = row["response"]["body"]["choices"]
    choices.append({"message": {"content": WHOLE}, "finish_reason": "stop"})
    assert [answer.text for answer in read(tmp_path, row)] == ["first", WHOLE]


# ---- damaged files -------------------------------------------------------------------------------
BAD_LINES = [
    "{",
    "[1]",
    '{"id": "a", "text": "b"}',
    '{"key": 3, "response": {}}',
    "3",
    '{"custom_id": "a", "response": {"body": {"choices": [3]}}}',
    "[" * 200_000,
    '{"id": "a", "completion": ' + "9" * 10_000 + "}",
]


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: line[:20])
def test_a_line_that_cannot_be_read_costs_no_other(tmp_path, bad):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join([json.dumps(openai("a", WHOLE)), "", bad]))
    good, unread = read_answers(file)
    assert good == TeacherAnswer("a", WHOLE)
    assert unread.rejected[0] == "unread" and unread.rejected[1].startswith(f"{file}, line 3: ")


def test_a_file_of_no_known_form_names_its_lines(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(["1", *BAD_LINES]))
    with pytest.raises(DataError) as caught:
        read_answers(file)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        f"{file}, line {number}" for number in range(1, 10)
    ]
    with pytest.raises(DataError, match="no such file"):
        read_answers(tmp_path / "none.jsonl")
    file.write_text("id;completion\n1;x\n")
    with pytest.raises(DataError, match="a table"):
        read_answers(file)


def test_what_a_server_writes_beside_the_text_does_not_matter(tmp_path):
    file = tmp_path / "answers.jsonl"
    row = json.dumps(openai("a", WHOLE, logprobs=0))
    file.write_bytes(
        row.replace('"logprobs": 0', '"logprobs": -Infinity, "logprobs": NaN').encode()
        + b'\n{"id": "b", "completion": "\xe9"}'
    )
    first, second = read_answers(file)
    assert first == TeacherAnswer("a", WHOLE)
    assert second.rejected[0] == "damaged"


def test_the_import_goes_on_and_says_what_it_did(tmp_path, capsys):
    """Rows: joined, half a character, no text, a 1 MB answer, a torn line."""
    data = write_data(tmp_path, 5)
    rows = [row | {"labels": ["Edema"]} for row in lines(data)]
    write_rows(data, rows)
    answers = write_rows(
        tmp_path / "answers.jsonl",
        [
            openai("e0", SOLUTION, reasoning=THINK),
            openai("e1", WHOLE.replace("Hazy", "\ud83d")),
            openai("e2", None),
            openai("e3", WHOLE.replace("Hazy", "x" * 1_000_000)),
        ],
    )
    with answers.open("a") as file:
        file.write('{"custom_id": "e4", "resp')
    out = tmp_path / "sft.jsonl"
    flags = ["--data_file", str(data), "--answers", str(answers), "--output", str(out)]
    assert main(["import", *flags]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "kept            1 of 5"
    assert f"passed over: {answers}, line 5: not valid JSON" in "\n".join(said)
    assert "joined          1 with the reasoning in reasoning (1)" in said
    assert [row["answer"] for row in lines(out)] == [WHOLE]
    rejected = lines(tmp_path / "sft-rejected.jsonl")
    assert [(row["id"], row["rejected"]["code"]) for row in rejected] == [
        ("e1", "damaged"),
        ("e2", "no_text"),
        ("e3", "long"),
        ("e4", "no_answer"),
    ]
    # it is a data file that export takes again
    assert main(["export", "--data_file", str(tmp_path / "sft-rejected.jsonl"), "--form", "gemini",
                 "--output_dir", str(tmp_path / "again")]) == 0  # fmt: skip
