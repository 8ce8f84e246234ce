"""Take over what an adapter was made with, from itself and from the run that trained it.

Nothing here loads torch: it is asked before a command line is accepted.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args, get_type_hints

from data.files import KeptFile
from data.label_sets import labels_of
from data.prompt_files import answer_format_of, prompt_name
from data.prompts import PROMPTS
from engine.adapter_files import base_to_use, read_adapter
from engine.config import Resolved, UsageError
from engine.model_files import same_base
from engine.resume import saved_settings
from engine.values import show, take_apart

# What training takes over from the adapter that it starts from, and from the run that made it.
INHERITED = (
    "model_name_or_path",
    "label_file",
    "prompt",
    "answer_format",
    "min_visual_tokens",
    "max_visual_tokens",
)
FRESH = "none"  # in the place of an adapter's folder: GRPO begins with a new one on the base
_OF_ADAPTER = {"lora_r": "r", "lora_alpha": "lora_alpha"}  # keys of adapter_config.json


def inherit(
    resolved: Resolved,
    names: Collection[str] = INHERITED,
    *,
    binding: Collection[str] = (),
    from_run: str = "adapter's run",
    from_prompt: str = "prompt",
) -> Resolved:
    """Take over what the adapter was made with, where the command line leaves it open.

    A setting is, in this order: a flag's value, a recipe's, that of the adapter's run (its
    config.json), the default. Some follow a rule of their own:

        model_name_or_path    the base that the adapter itself names, unless a flag names a copy of
                              it. A recipe must name the same, in any spelling.
        lora_r, lora_alpha    of the adapter itself
        answer_format         of the adapter's run where the prompt is that run's too, else the
                              prompt's own: another prompt asks for its own form

    resolved: its first config has adapter_name_or_path, empty, None or FRESH without an adapter.
    names: the settings to take over.
    binding: those that the adapter cannot do without. A recipe gives way, a flag that says
    otherwise is a mistake.
    from_run, from_prompt: origins of what config.json and the prompt decided, {} for its name.

    Raises UsageError for a folder without an adapter, a config.json that cannot be used, a recipe
    with another base, and a flag that contradicts a binding setting.
    """
    folder = resolved.configs[0].adapter_name_or_path
    folder = None if folder == FRESH else folder
    if folder and "model_name_or_path" in names:
        resolved = _with_base_of_adapter(resolved, folder)
    made_with = settings_of_adapter(folder, names, resolved.configs[0]) if folder else {}
    for name in sorted(names, key="answer_format".__eq__):  # last: it follows the prompt
        given, origin = getattr(resolved.configs[0], name), resolved.origins[name]
        value, source = made_with.get(name), "adapter" if name in _OF_ADAPTER else from_run
        if name == "label_file" and name in binding and folder and origin != "default":
            if line := other_labels(folder, given):
                raise UsageError(
                    f"{line}; leave the flag out, or give another --adapter_name_or_path"
                )
            value = given  # the same labels
        if name == "answer_format" and origin == "default":
            prompt = resolved.configs[0].prompt
            if value is None or prompt != made_with.get("prompt"):
                source = from_prompt.format(prompt_name(prompt))
                value = answer_format_of(prompt)
        if value is None or (origin != "default" and (name not in binding or given == value)):
            continue
        if origin == "flag":
            raise UsageError(
                f"--{name} {given}: the adapter in {folder} was trained with {value}; leave the"
                " flag out, or give another --adapter_name_or_path"
            )
        if name == "prompt" and isinstance(value, str) and value not in PROMPTS:
            raise UsageError(
                f"{Path(folder) / 'config.json'}: there is no prompt {value!r}; there are"
                f" {', '.join(PROMPTS)}"
            )
        resolved = resolved.with_value(name, value, source)
    return resolved


def other_labels(folder: str, given: KeptFile | None) -> str | None:
    """Say that an adapter was trained on other labels than those of --label_file, or None.

    given: the label file, None for the 14 labels. A folder without a run tells nothing.
    """
    settings = saved_settings(folder)
    trained_on = settings.get("label_file")
    if not settings or labels_of(trained_on) == labels_of(given):
        return None
    return (
        f"--label_file {show(given)}: the adapter in {folder} was trained on"
        f" {trained_on or 'the 14 labels of CheXpert'}"
    )


def _with_base_of_adapter(resolved: Resolved, folder: str) -> Resolved:
    given, origin = resolved.configs[0].model_name_or_path, resolved.origins["model_name_or_path"]
    base, note = base_to_use(folder, given if origin == "flag" else "")
    if note:
        print(note, file=sys.stderr)
    if origin == "flag":
        return resolved
    if origin != "default" and not same_base(given, base):
        raise UsageError(
            f"{folder} was trained on {base}, not on {given} ({origin}); give"
            " --model_name_or_path, or another --adapter_name_or_path"
        )
    return resolved.with_value("model_name_or_path", base, "adapter")


def settings_of_adapter(folder: str, names: Collection[str], config: Any) -> dict[str, Any]:
    """Read what an adapter was made with, from it and its run's config.json -> {name: value}.

    names: the settings to look for. Those that are missing or null there are left out.
    config: an instance of a dataclass that declares them, with the types that they must have in
    config.json. What the adapter itself says is checked by `read_adapter`.

    Raises UsageError where the folder holds no adapter that can be used, or a config.json with a
    wrong value.
    """
    adapter, run = read_adapter(folder).settings, saved_settings(folder)
    types = get_type_hints(type(config))
    found = {}
    for name in names:
        value = adapter.get(_OF_ADAPTER[name]) if name in _OF_ADAPTER else run.get(name)
        if value is None:
            continue
        kind, choices, _, _ = take_apart(types[name])
        kinds = get_args(kind) or (kind,)  # a name or a file
        if name not in _OF_ADAPTER and (
            type(value) not in kinds or (choices and value not in choices)
        ):
            expected = f"one of {', '.join(choices)}" if choices else kinds[0].__name__
            raise UsageError(
                f"{Path(folder) / 'config.json'}: {name} is {value!r}, expected {expected};"
                " repair or remove the file"
            )
        found[name] = value
    return found
