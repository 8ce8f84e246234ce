"""Name the models by their stage of training (SFT + vote of 4), the scores and the baselines.

A name that the user gave is never changed. Two models of one stage are told apart by what differs
between them, such as their reward or their seed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.folders import Entry

STAGE_TITLES = {"base": "base", "sft": "SFT", "grpo": "GRPO"}
SCORE_TITLES = {"macro_f1": "macro-F1", "micro_f1": "micro-F1", "jaccard": "Jaccard"}
# answers that need no image, by their keys in scores-<set>.json
BASELINE_TITLES = {
    "most_frequent": "most frequent",
    "all_labels": "all labels",
    "prevalence_matched": "by prevalence",
}
# what tells two models of one stage apart, the most telling first; a value of these needs no name
_TELLING = ("reward", "prompt", "model_name_or_path", "checkpoint")
# settings that say nothing about a model
_SILENT = ("output_dir", "resume_from_checkpoint", "dry_run", "show_batch", "image_root")
_LONGEST = 24  # characters of a value that still makes a name


def heading(title: str) -> str:
    """Begin a title with a capital, for the head of a row or column."""
    return title[:1].upper() + title[1:]


def name_by_stage(entries: Sequence[Entry], given: Collection[str]) -> list[Entry]:
    """Name the entries by their stages, but for those whose names the user gave.

    A folder that does not tell its model's stage keeps its own name.
    """
    titles = [
        None if entry.name in given or not entry.is_told else _title(entry) for entry in entries
    ]
    named = []
    for entry, title in zip(entries, titles, strict=True):
        alike = [other for other, its in zip(entries, titles, strict=True) if its == title]
        if title is None:
            title = entry.name
        elif len(alike) > 1 or title in given:
            title = f"{title} ({_told_apart(entry, alike)})"
        named.append(dataclasses.replace(entry, name=title))
    clash = {name for name, count in Counter(entry.name for entry in named).items() if count > 1}
    return [
        dataclasses.replace(new, name=old.name) if new.name in clash else new
        for old, new in zip(entries, named, strict=True)
    ]


def _title(entry: Entry) -> str:
    title = entry.served or STAGE_TITLES[entry.stage]
    return title if entry.votes == 1 else f"{title} + vote of {entry.votes}"


def _told_apart(entry: Entry, alike: Sequence[Entry]) -> str:
    """Say in a few words what sets an entry apart from those of its stage."""
    facts = [_facts(other) for other in alike]
    own = _facts(entry)
    for name in dict.fromkeys((*_TELLING, *own)):
        values = [its.get(name, "") for its in facts]
        if all(values) and len(set(values)) == len(values) > 1 and len(own[name]) <= _LONGEST:
            return own[name] if name in _TELLING else f"{name} {own[name]}"
    return entry.name


def _facts(entry: Entry) -> dict[str, str]:
    """Gather {setting: value} of the run that trained a model, and of its evaluation."""
    settings = {**entry.settings, **entry.trained, "checkpoint": entry.checkpoint}
    return {
        name: str(value)
        for name, value in settings.items()
        if name not in _SILENT and value not in (None, "") and not isinstance(value, (list, dict))
    }
