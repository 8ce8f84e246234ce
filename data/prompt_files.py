"""Read prompts of one's own from TOML files, and find the prompt that --prompt names.

    system = "You read chest X-rays."          # optional, this is the default
    answer_format = "think_solution"           # optional, this is the default
    text = '''
    Which findings does this X-ray show? Use only these labels: {labels}.
    {rule}Answer as <think>your reasoning</think><solution>label, label</solution>'''

`{labels}`, `{number}` and `{rule}` are filled as in prompts.py, and `{{` and `}}` are braces. The
prompt's name, in rows, reports and cards, is that of the file without its ending.
"""

from __future__ import annotations

import tomllib
from functools import lru_cache
from typing import Any

from data.answers import ANSWER_FORMATS, blocks_of
from data.files import DataError, KeptFile, NameOrFile
from data.labels import CHEXPERT, LabelSet
from data.prompts import PROMPTS, TEMPLATES, Prompt, filled, foreign_labels, text_problems

KEYS = ("text", "system", "answer_format")


def prompt_name(prompt: NameOrFile) -> str:
    """Return the name that rows, reports and cards give a prompt."""
    return prompt if isinstance(prompt, str) else prompt.name


def prompt_of(prompt: NameOrFile, label_set: LabelSet = CHEXPERT) -> Prompt:
    """Find a prompt of PROMPTS by its name, or read one's own, and write the labels into it.

    Raises DataError with every problem at once, one line each.
    """
    if problems := prompt_problems(prompt, label_set):
        raise DataError(problems)
    return filled(TEMPLATES[prompt] if isinstance(prompt, str) else _template(prompt), label_set)


def answer_format_of(prompt: NameOrFile) -> str:
    """Return the form of answer that a prompt asks for. Raises DataError as `prompt_of` does."""
    return prompt_of(prompt).answer_format


def prompt_problems(prompt: NameOrFile, label_set: LabelSet = CHEXPERT) -> list[str]:
    """Name what is wrong with a value of --prompt, one line each."""
    if isinstance(prompt, KeptFile):
        return [f"{prompt.path}: {problem}" for problem in _file_problems(prompt)]
    if prompt not in TEMPLATES:
        what = "file, and no " if prompt.lower().endswith(".toml") else ""
        known = ", ".join(PROMPTS)
        return [f"{prompt}: no such {what}instruction variant; there are {known}"]
    if foreign := foreign_labels(prompt, label_set):
        shown = ", ".join(foreign[:3]) + (", ..." if foreign[3:] else "")
        return [
            f"{prompt}: its text names chest labels that the label file has not ({shown}); take"
            " another prompt, or one of your own (a .toml file)"
        ]
    return []


def prompt_warnings(prompt: NameOrFile, label_set: LabelSet = CHEXPERT) -> list[str]:
    """Name what a sound prompt of one's own may have forgotten, one line each."""
    if isinstance(prompt, str):
        return []
    found = prompt_of(prompt, label_set)
    told = found.system + found.text
    warnings = []
    tags = [f"<{name}>" for name in blocks_of(found.answer_format)]
    if missing := [tag for tag in tags if tag not in told]:
        warnings.append(
            f"{prompt.path}: the text does not mention {' and '.join(missing)}, the tags of"
            f" {found.answer_format}: only a model that knows the form already will keep to it"
        )
    if unnamed := [name for name in label_set.names if name.casefold() not in told.casefold()]:
        shown = ", ".join(unnamed[:3]) + (", ..." if unnamed[3:] else "")
        warnings.append(
            f"{prompt.path}: the text does not name {shown}: write {{labels}} where the labels"
            " belong, or only a model that knows them already will use them"
        )
    return warnings


def _file_problems(kept: KeptFile) -> list[str]:
    try:
        content = _content(kept)
    except (ValueError, RecursionError) as error:  # also of a number with 5,000 digits
        return [f"is not valid TOML: {error}"]
    problems = [
        f"unknown key {key!r}; known: {', '.join(KEYS)}" for key in content if key not in KEYS
    ]
    if kept.name in TEMPLATES:
        problems.append(f"{kept.name!r} is the name of a built-in prompt; name the file otherwise")
    if not kept.name.isprintable():
        problems.append(f"the file's name {kept.name!r} cannot be printed; name it otherwise")
    if "text" not in content:
        problems.append("key 'text' is missing: what the model is told beside the image")
    for key in KEYS:
        value = content.get(key, "")
        if not isinstance(value, str):
            problems.append(f"{key} is {value!r}; it must be a string")
        elif key == "text" and key in content and not value.strip():
            problems.append("text is empty; write what the model is told")
        elif key == "text":
            problems += [f"text, {problem}" for problem in text_problems(value)]
        elif key == "answer_format" and key in content and value not in ANSWER_FORMATS:
            forms = ", ".join(ANSWER_FORMATS)
            problems.append(f"answer_format is {value!r}; there are {forms}")
    return problems


def _template(kept: KeptFile) -> Prompt:
    return Prompt(kept.name, **_content(kept))


@lru_cache(maxsize=100)
def _content(kept: KeptFile) -> dict[str, Any]:
    """Read the TOML of a file. Raises TOMLDecodeError."""
    return tomllib.loads(kept.text.removeprefix("\ufeff"))
