"""Read a teacher's answers from the forms in which services and servers hand them out.

Reasoning models give their thoughts apart from the answer, in a field, a part or a block of its
own, each server in another way. Here the thoughts and the answer become one text in the form that
SFT learns, or the answer is rejected by a code.

Forms of a line, by their fields:

    {"key", "response"}                        the Gemini API's batches
    {"custom_id", "response": {"body"}}        OpenAI's batches, as other servers write them too:
                                               chat completions, completions and responses
    {"custom_id", "result": {"message"}}       Anthropic's batches
    {"id", "completion"}                       a script of one's own, with "reasoning" if there is
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.answers import parse_answer
from data.files import DataError, first_problems
from data.json_rows import json_rows, whole_characters

ANSWER_FORMAT = "think_solution"  # of every trace
_REASONING_FIELDS = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "thinking_blocks",
    "reasoning_details",
)
_TEXT_PARTS = ("text", "output_text", "")
_GOOD = ("", "stop", "STOP", "eos", "eos_token", "stop_sequence", "end_turn", "completed")
_CUT = ("length", "MAX_TOKENS", "max_tokens", "max_output_tokens", "model_length")
# The block of a model's own thoughts, by its tags. A template may have written the opening one.
_NATIVE = "think|thinking|thought|reasoning|seed:think"
_OWN_BLOCK = re.compile(
    rf"\s*(?:<(?:{_NATIVE})>|\[THINK\])?(?P<inside>.*?)(?:</(?:{_NATIVE})>|\[/THINK\])",
    re.DOTALL,
)
_NATIVE_TAG = re.compile(rf"</?(?:{_NATIVE})>|\[/?THINK\]")
_MAX_OWN_BLOCKS = 3  # before the asked one


@dataclass(frozen=True)
class TeacherAnswer:
    """Hold one answer of a service.

    id: the example's.
    rejected: (code, detail) of why there is no text to look at.
    joined: where the reasoning was that has become the <think> block, "" where it was in the text.
    """

    id: str
    text: str = ""
    rejected: tuple[str, str] | None = None
    joined: str = ""


def read_answers(path: str | Path) -> list[TeacherAnswer]:
    """Read the answers of a file. Each line shows by its fields which form it has.

    A line with several answers (n > 1) gives several. A line that cannot be read gives one that
    belongs to no example, "unread", so that one torn line of a long batch does not cost the others.

    Raises DataError for a missing file, and with the first lines of a file of which none is read.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError([f"--answers {path}: no such file"])
    answers: list[TeacherAnswer] = []
    unread: list[str] = []
    for number, row, found in json_rows(path, strict=False):
        if not found:
            row, halves = whole_characters(row)
            try:
                for answer in list(_answers(row)):
                    damaged = halves or "\ufffd" in answer.text
                    answers.append(_damaged(answer) if damaged else answer)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                found = [
                    "an answer of no known form, with 'key' (Gemini), 'custom_id' (OpenAI,"
                    " Anthropic) or 'id' and 'completion' (your own)"
                    f" ({type(error).__name__}: {error})"
                ]
        unread += [f"{path}, line {number}: {problem}" for problem in found]
    if unread and not answers:
        raise DataError(first_problems(unread, f"{path}: and {{}} more lines"))
    return answers + [TeacherAnswer("", rejected=("unread", problem)) for problem in unread]


def _damaged(answer: TeacherAnswer) -> TeacherAnswer:
    if answer.rejected:
        return answer
    detail = "half a character, or one that could not be read (U+FFFD)"
    return TeacherAnswer(answer.id, answer.text, ("damaged", detail))


def _answers(row: Any) -> Iterator[TeacherAnswer]:
    if "key" in row:
        yield from _gemini(_text(row["key"]), row)
    elif "custom_id" in row:
        name = _text(row["custom_id"])
        yield from _anthropic(name, row["result"]) if "result" in row else _openai(name, row)
    else:
        name, completion = _text(row["id"]), row["completion"]
        if completion is not None and not isinstance(completion, str):
            raise TypeError(f"the completion is {type(completion).__name__}, not a string")
        reasoning, field = _reasoning(row)
        reason = row.get("finish_reason") or ""
        yield _finished(name, completion or "", reason, reasoning=reasoning, field=field)


# ---- one form each -------------------------------------------------------------------------------
def _gemini(name: str, row: Mapping[str, Any]) -> Iterator[TeacherAnswer]:
    """Read {"key", "response": GenerateContentResponse}.

    A request that failed has "error" or "status" in place of "response".
    """
    response = row.get("response")
    if not response:
        yield _failed(name, row.get("error") or row.get("status") or "no response")
        return
    candidates = response.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        yield _failed(name, response.get("promptFeedback") or "no candidate")
        return
    for candidate in candidates:
        parts = (candidate.get("content") or {}).get("parts") or []
        # a thinking model's own notes
        notes = "".join(part.get("text") or "" for part in parts if part.get("thought"))
        text = "".join(part.get("text") or "" for part in parts if not part.get("thought"))
        reason = candidate.get("finishReason") or candidate.get("finish_reason") or ""
        yield _finished(name, text, reason, reasoning=notes, field="thought")


def _openai(name: str, row: Mapping[str, Any]) -> Iterator[TeacherAnswer]:
    """Read {"custom_id", "response": {"status_code", "body"}, "error"}."""
    response = row.get("response")
    if row.get("error") or not response or response.get("status_code", 200) != 200:
        yield _failed(
            name, row.get("error") or (response and response.get("body")) or "no response"
        )
        return
    body = response.get("body", response)
    body = json.loads(body) if isinstance(body, str) else body
    if isinstance(body.get("output"), list):
        yield _response(name, body)
        return
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        yield _failed(name, body.get("error") or "no choice")
        return
    for choice in choices:
        message = choice.get("message") or {"content": choice.get("text")}
        yield _message(name, message, choice.get("finish_reason") or "", outside=choice)


def _response(name: str, body: Mapping[str, Any]) -> TeacherAnswer:
    """Read the body of OpenAI's newer form, whose output is a list of items."""
    notes: list[Any] = []
    parts: list[Any] = []
    for item in body["output"]:
        if item.get("type") == "reasoning":
            notes += [*(item.get("summary") or []), *(item.get("content") or [])]
        elif item.get("type") == "message":
            content = item.get("content") or []
            parts += [content] if isinstance(content, str) else content
        else:
            parts.append(item)
    reason = (body.get("incomplete_details") or {}).get("reason") or body.get("status") or ""
    return _message(name, {"content": parts, "reasoning": notes}, reason)


def _anthropic(name: str, result: Mapping[str, Any]) -> Iterator[TeacherAnswer]:
    """Read {"type": "succeeded", "message": {"content": parts, "stop_reason"}}."""
    if result.get("type") != "succeeded":
        yield _failed(name, result.get("error") or result.get("type") or "no result")
        return
    yield _message(name, result["message"], result["message"].get("stop_reason") or "")


def _message(
    name: str, message: Mapping[str, Any], reason: str, outside: Mapping[str, Any] | None = None
) -> TeacherAnswer:
    """Read a message whose content is a text or a list of parts.

    outside: of the message, where some servers put its reasoning.
    """
    content, notes, refusal, others = _content(message.get("content"))
    refusal = message.get("refusal") or refusal
    if refusal:
        return _failed(name, f"refusal: {refusal}")
    calls = message.get("tool_calls") or message.get("function_call")
    if (calls or others) and not content.strip():
        return _failed(name, "a tool call and no text" if calls else f"only {others[0]!r}, no text")
    reasoning, field = _reasoning(message)
    if not reasoning and outside is not None:
        reasoning, field = _reasoning(outside)
    if not reasoning and notes:
        reasoning, field = notes, "content"
    return _finished(name, content, reason, reasoning=reasoning, field=field)


def _content(content: Any) -> tuple[str, str, str, list[str]]:
    """Sort the parts of a message's content -> (its text, its thoughts, a refusal, other kinds)."""
    if content is None or isinstance(content, str):
        return content or "", "", "", []
    text, notes, refusal, others = "", "", "", []
    for part in content:
        kind = "" if isinstance(part, str) else str(part.get("type") or "")
        if kind == "refusal":
            refusal = str(part.get("refusal") or "without a reason")
        elif kind in _TEXT_PARTS:
            text += part if isinstance(part, str) else part.get("text") or ""
        elif kind.startswith(("thinking", "reasoning", "summary")):
            notes += _thoughts(part)
        elif kind != "redacted_thinking":
            others.append(kind)
    return text, notes, refusal, others


def _reasoning(message: Mapping[str, Any]) -> tuple[str, str]:
    """Find the reasoning beside a message's content -> (its text, the field that holds it)."""
    for field in _REASONING_FIELDS:
        if text := _thoughts(message.get(field)).strip():
            return text, field
    return "", ""


def _thoughts(value: Any) -> str:
    """Read reasoning that is a text, a part, or a list of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(filter(None, map(_thoughts, value)))
    if isinstance(value, dict):
        fields = ("thinking", "reasoning", "text", "summary", "content")
        return next((found for field in fields if (found := _thoughts(value.get(field)))), "")
    return ""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"the id is {value!r}, not a string")
    return value


def _failed(name: str, reported: object) -> TeacherAnswer:
    text = reported if isinstance(reported, str) else json.dumps(reported, ensure_ascii=False)
    return TeacherAnswer(name, rejected=("failed", text[:200]))


def _finished(name: str, text: str, reason: str, *, reasoning: str, field: str) -> TeacherAnswer:
    """Judge by the reason why a model stopped, and join its reasoning with its text."""
    if reason in _CUT:
        return TeacherAnswer(name, text, ("cut", reason))
    if reason not in _GOOD:
        return TeacherAnswer(name, text, ("failed", reason))
    if not text.strip():
        where = f"all of it is in {field!r}" if reasoning else "there is none at all"
        return TeacherAnswer(name, reasoning, ("no_text", where))
    return TeacherAnswer(name, *_joined(text, reasoning, field))


# ---- join ----------------------------------------------------------------------------------------
def _joined(text: str, reasoning: str, field: str) -> tuple[str, None, str]:
    """Put reasoning before an answer that has none -> (the text, None, where the reasoning was).

    A text that has the asked <think> block keeps it. The model's own block before it is left out,
    as reasoning in another field is.
    """
    if _is_whole(text):
        return text, None, ""
    rest, notes = text, ""
    for _ in range(_MAX_OWN_BLOCKS):
        block = _OWN_BLOCK.match(rest)
        if block is None or _NATIVE_TAG.search(block["inside"]):
            break
        rest, notes = rest[block.end() :], block["inside"].strip() or notes
        if _is_whole(rest):
            return rest.strip(), None, ""
    if _NATIVE_TAG.search(rest):
        return text, None, ""
    if notes:
        reasoning, field = notes, "its own block"
    reasoning = _NATIVE_TAG.sub("", reasoning).strip()
    if not reasoning:
        return text, None, ""
    return f"<think>{reasoning}</think>\n{rest.strip()}", None, field


def _is_whole(text: str) -> bool:
    answer = parse_answer(text, ANSWER_FORMAT)
    return answer.valid and bool((answer.think or "").strip())
