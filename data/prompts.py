"""What the model is asked: the system text, the instruction variants and the chat messages made from them.

Every variant states the 14 labels and the answer format, so that a base model can be scored before any training.
Data never reaches a template engine: texts are plain strings, put together here.
"""
from __future__ import annotations

from dataclasses import dataclass

from data.labels import LABELS

# Explicit for both families: a chat template's own default ("You are a helpful assistant.") differs between them.
SYSTEM_PROMPT = "You read chest X-rays."

_LABEL_LIST = ", ".join(LABELS)

_ANSWER_RULES = (
    "Use only these labels: " + _LABEL_LIST + ".\n"
    "Report No Finding only if no abnormality is present; Support Devices may accompany it.\n"
    "Answer in exactly this form, with nothing before or after it:\n"
    "<think>your reasoning</think>\n"
    "<solution>label, label, ...</solution>"
)


@dataclass(frozen=True)
class Prompt:
    """One instruction variant. `answer_format` is the parser's name for the answer that it asks for (`data.answers`)."""

    name: str
    text: str
    answer_format: str = "think_solution"


def _prompts(*prompts: Prompt) -> dict[str, Prompt]:
    return {prompt.name: prompt for prompt in prompts}


PROMPTS: dict[str, Prompt] = _prompts(
    # Short on purpose: the embedded demo model reads it in about a hundred tokens.
    Prompt(
        "demo",
        "Which findings does this chest X-ray show? Labels: " + _LABEL_LIST + ". "
        "Reason inside <think></think>, then list the labels inside <solution></solution>.",
    ),
    Prompt(
        "free_reasoning",
        "Analyse this frontal chest X-ray concisely. Say what you see and what it means, weigh the findings that matter for the "
        "classification, and then give the labels.\n" + _ANSWER_RULES,
    ),
    Prompt(
        "reasoning_a",
        "Read this frontal chest X-ray in twelve mandatory steps. Write one numbered line for each step, also where it is normal:\n"
        "1. Projection, inspiration, rotation and exposure.\n"
        "2. Tubes, lines, pacemakers and other devices, with the position of their tips.\n"
        "3. Trachea and main bronchi.\n"
        "4. Mediastinal contours and width.\n"
        "5. Heart size and borders.\n"
        "6. Hila and pulmonary vessels.\n"
        "7. Right lung, upper, middle and lower zone.\n"
        "8. Left lung, upper, middle and lower zone.\n"
        "9. Pleura, fissures and costophrenic angles, free air in the pleural space.\n"
        "10. Diaphragm and the region below it.\n"
        "11. Ribs, clavicles, shoulders, spine and soft tissues.\n"
        "12. Impression: which labels the steps above support, and which they rule out.\n" + _ANSWER_RULES,
    ),
)


def build_messages(prompt: Prompt, answer: str | None = None) -> list[dict]:
    """Chat messages for one image: system, user (image first, then the instruction) and, when given, the assistant's answer.

    The image itself is not in the messages; its place is marked by `{"type": "image"}`.
    """
    messages: list[dict] = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.text}]},
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
