"""Render chats by a checkpoint's template, and say where it changes what it was given.

Chat templates are programs that come with a checkpoint. They may refuse a role, leave a message
out, cut reasoning from an answer, trim it, write an empty thinking block in front of it, or today's
date. A model that was trained on such a text has learnt something else than its data say, without a
word, so what a template makes of a prompt and of every answer is compared with what went in.
"""

from __future__ import annotations

import unicodedata
from functools import partial
from itertools import zip_longest
from typing import Any

from data.prompts import Prompt, build_messages
from engine.free_memory import memory_limit
from engine.time_limit import TimedOut, TimeLimit

# A date that the template writes becomes this character, by a macro that hides transformers' own.
_DATE = "\ue000"
# What one rendering may take. Templates of models take milliseconds and write some 10,000
# characters beside the texts of the chat.
_SECONDS, _MEMORY, _CHARACTERS = 2.0, 2**29, 2_000_000
_LARGEST = 1_000_000  # characters of a template; published ones have up to 20,000
_FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{_DATE}{{%- endmacro -%}}"
PROBE = Prompt("probe", "Probe of the Instruction.", system="Probe of the System text.")


class TemplateHangs(ValueError):
    """Report a template that takes more time or memory than any of a model does."""


class ChatTemplate:
    """Render prompts and answers with the template of a tokenizer.

    folds_system: the template refuses a system message, or leaves it out. Its text then stands at
    the beginning of the user's message, as in Gemma 3's own template.
    """

    def __init__(self, tokenizer: Any):
        """Try the template on a probe.

        Raises ValueError for a template that is missing, fails or changes what it is given.
        """
        self.tokenizer = tokenizer
        self.folds_system = False
        try:
            refusal = self._problem_of_prompt(PROBE)
        except TemplateHangs:
            raise
        except ValueError as error:
            refusal = str(error)
        if refusal is not None:
            self.folds_system = True
            try:
                problem = self._problem_of_prompt(PROBE)
            except ValueError:
                problem = refusal
            if problem is not None:  # the first line is of the chat as it is meant
                raise ValueError(refusal)
        if _DATE in self._render(self.messages(PROBE), True, fixed_date=True):
            raise ValueError(
                "its chat template writes today's date into the prompt (strftime_now), so that no"
                " run could be repeated; write a fixed date, or none, into the template"
            )

    def prompt(self, prompt: Prompt) -> str:
        """Render a prompt, up to where the answer begins.

        Raises ValueError where the template fails, or changes the prompt's texts.
        """
        problem = self._problem_of_prompt(prompt)
        if problem is not None:
            raise ValueError(problem)
        return self._render(self.messages(prompt), True)

    def with_answer(self, prompt: Prompt, answer: str) -> str:
        """Render a prompt with an answer. Raises ValueError where the template fails."""
        return self._render(self.messages(prompt, answer), False)

    def messages(self, prompt: Prompt, answer: str | None = None) -> list[dict]:
        """Build the messages that the template is given, in `data.prompts.build_messages`' form."""
        messages = build_messages(prompt, answer)
        if self.folds_system:
            system, user = messages[:2]
            first = {"type": "text", "text": system["content"][0]["text"] + "\n\n"}
            messages[:2] = [user | {"content": [first, *user["content"]]}]
        return messages

    def _problem_of_prompt(self, prompt: Prompt) -> str | None:
        """Say what the template changes of a prompt's texts, None where it leaves them alone."""
        text = self._render(self.messages(prompt), True)
        for what, part in (("system text", prompt.system), ("instruction", prompt.text)):
            if part.strip() not in text:
                return (
                    f"its chat template does not write the prompt's {what} as it is"
                    f" ({_shortened(part.strip())!r} is not in what it writes)"
                )
        return None

    def _render(
        self, messages: list[dict], add_generation_prompt: bool, fixed_date: bool = False
    ) -> str:
        try:
            template = self.tokenizer.get_chat_template()
            if len(template) > _LARGEST:
                raise ValueError(f"it has {len(template):,} characters")
            with memory_limit(_MEMORY):
                text = TimeLimit(_SECONDS).call(
                    partial(
                        self.tokenizer.apply_chat_template,
                        messages,
                        chat_template=_FIXED_DATE + template if fixed_date else None,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                    )
                )
        except (TimedOut, MemoryError) as error:
            what = f"{_SECONDS:.0f} s" if isinstance(error, TimedOut) else "half a GB of memory"
            raise TemplateHangs(f"its chat template takes more than {what} for one chat") from None
        except Exception as error:  # whatever a program that came with the checkpoint may raise
            if not self.tokenizer.chat_template:
                raise ValueError(
                    "it has no chat template; put the one of the model it was made from beside its"
                    " tokenizer, as chat_template.jinja"
                ) from error
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"its chat template fails: {lines[0]}") from error
        assert isinstance(text, str)  # ids only with tokenize=True
        if len(text) > _CHARACTERS:
            raise TemplateHangs(f"its chat template writes {len(text):,} characters for one chat")
        return text


# ---- answers -------------------------------------------------------------------------------------
def change_of_answer(answer: str, learnt: str) -> str | None:
    """Say how what is learnt differs from an answer, None where it does not.

    learnt: what the supervised tokens write, without the end of turn.

    Blanks around the answer that the template drops, and accents that the tokenizer composes
    (Unicode's NFC, the same text), are no difference: see `same_but_for`.
    """
    if answer == learnt or same_but_for(answer, learnt):
        return None
    pairs = zip_longest(answer, learnt)
    place = next(i for i, (a, b) in enumerate(pairs) if a != b)
    begin = max(0, place - 20)
    return (
        f"from character {place + 1}, {_shortened(answer[begin:])!r} becomes"
        f" {_shortened(learnt[begin:])!r}"
    )


def same_but_for(answer: str, learnt: str) -> str | None:
    """Name the harmless difference between an answer and what is learnt of it.

    None where there is no difference, or one that is not harmless.
    """
    composed = unicodedata.normalize("NFC", answer)
    if answer == learnt:
        return None
    if learnt == composed:
        return "the tokenizer composes accented characters (NFC)"
    if learnt in (composed.strip(), composed.lstrip(), composed.rstrip(), answer.strip()):
        return "the chat template drops blanks around an answer"
    return None


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[:length] + "..."
