"""Read labels of one's own from a text file, so that a run needs none of the 14 CheXpert labels.

One label a line, UTF-8, in the order of the score tables:

    # findings of the screening programme
    exclusive: Normal | no abnormality
    beside: Sutures
    Tuberculosis | TB | phthisis
    Silicosis

`|` parts a label from its aliases, further spellings that mean it and nothing else. `exclusive:`
marks the one label that excludes the others, as No Finding does, and `beside:` each label that may
stand beside it all the same, as Support Devices may. Both are optional. A `#` at the beginning of a
line or after a blank begins a comment. Case, blanks and hyphens of a name do not matter in answers.

A name is refused where an answer that holds it could not be read back, and where a reader could
not tell it from another: the letters of a word are of one script (Latin, Cyrillic or Greek), and no
two names look the same in letters of two scripts.
"""

from __future__ import annotations

import argparse
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from data.entries import (
    COLONS,
    COMMAS,
    MAX_ENTRY_LENGTH,
    SEMICOLONS,
    labels_of_pieces,
    read_entries,
)
from data.files import DataError, KeptFile, first_problems
from data.labels import CHEXPERT, LabelSet, metric_name, spelling

KEYWORDS = ("exclusive", "beside")
MAX_SPELLINGS = 10_000  # of labels and aliases, which are read in 4 seconds
# What a name cannot hold, and why.
_FORBIDDEN = (
    (COMMAS + SEMICOLONS, "ends an entry of an answer"),
    ("<>", "belongs to tags"),
    (COLONS, "ends a heading"),
    ("{}", "belongs to the texts of prompts"),
)
SCRIPTS = ("LATIN", "CYRILLIC", "GREEK")  # whose letters look alike
# Small and capital letters of the other two that look like a Latin one, in small letters.
_LOOK_ALIKE = str.maketrans(
    "\u0430\u0432\u0435\u043a\u043c\u043d\u043e\u0440\u0441\u0442\u0443\u0445\u0455\u0456\u0458"
    "\u03b1\u03b2\u03b5\u03b6\u03b7\u03b9\u03ba\u03bc\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7",
    "abekmhopctyxsij" + "abezhikmnoptyx",
)


class _Spelling(NamedTuple):
    """Hold one name or alias of the file with its line."""

    line: int
    text: str
    label: str  # itself, or the label that an alias means


@lru_cache(maxsize=100)  # rows of answers bring the lines of their label set along, each row again
def read_labels(text: str, source: str) -> LabelSet:
    """Read the text of a label file. source: its name, for the problems.

    Raises DataError with every problem at once, by line.
    """
    names: list[_Spelling] = []
    aliases: list[_Spelling] = []
    marked: dict[str, list[_Spelling]] = {keyword: [] for keyword in KEYWORDS}
    problems: list[tuple[int, str]] = []
    for number, line in _lines(text):
        keyword, found, problem = _keyword_of(line)
        if problem:
            problems.append((number, problem))
            continue
        spellings = [" ".join(part.split()) for part in found.split("|")]
        problems += [
            (number, reason) for part in spellings if (reason := _problem_of(part)) is not None
        ]
        if not spellings[0]:
            continue
        name, *others = (_Spelling(number, part, spellings[0]) for part in spellings if part)
        names.append(name)
        aliases += others
        if keyword:
            marked[keyword].append(name)
    if len(names) + len(aliases) > MAX_SPELLINGS:  # before they are compared with each other
        count = f"{len(names) + len(aliases):,}"
        raise DataError(
            [f"{source}: holds {count} labels and aliases, at most {MAX_SPELLINGS:,} are read"]
        )
    problems += _marking_problems(marked["exclusive"], marked["beside"])
    problems += _repeated(names, aliases)
    if not names and not problems:
        problems.append((0, "holds no label; write one a line"))
    if not problems:
        label_set = LabelSet(
            tuple(name.text for name in names),
            {alias.text: alias.label for alias in aliases},
            marked["exclusive"][0].text if marked["exclusive"] else None,
            tuple(name.text for name in marked["beside"]),
        )
        problems += _unreadable(label_set, [*names, *aliases])
        if not problems:
            return CHEXPERT if label_set == CHEXPERT else label_set
    where = f"{source}: and {{}} more problems"
    raise DataError(first_problems([_at(source, *one) for one in sorted(problems)], where))


def labels_of(kept: KeptFile | None) -> LabelSet:
    """Read the labels that --label_file keeps, CHEXPERT where nobody gave one.

    Raises DataError as `read_labels` does.
    """
    return CHEXPERT if kept is None else read_labels(kept.text, kept.path)


def add_label_flag(parser: argparse.ArgumentParser) -> None:
    """Give a command --label_file, whose value `labels_named` reads."""
    parser.add_argument(
        "--label_file",
        metavar="FILE",
        help="labels of one's own, one a line (default: CheXpert's 14; see data/README.md)",
    )


def labels_named(path: str | None) -> LabelSet:
    """Read the file that --label_file names, CHEXPERT where it is not given.

    Raises DataError with every problem of it.
    """
    try:
        return labels_of(None if path is None else KeptFile.read(path))
    except DataError as error:
        raise DataError([f"--label_file {problem}" for problem in error.problems]) from error


def label_lines(label_set: LabelSet) -> list[str]:
    """Write a label set as the lines of its file, for rows that bring it along."""
    lines = []
    for label in label_set.names:
        keyword = ""
        if label == label_set.exclusive or label in label_set.beside:
            keyword = f"{KEYWORDS[label != label_set.exclusive]}: "
        aliases = (alias for alias, of in label_set.aliases.items() if of == label)
        lines.append(keyword + " | ".join((label, *aliases)))
    return lines


def _at(source: str, line: int, problem: str) -> str:
    return f"{source}, line {line}: {problem}" if line else f"{source}: {problem}"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Give the lines that hold something, numbered from 1, without comments."""
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff"))
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        line = f" {line}".partition(" #")[0].partition("\t#")[0].strip()
        if line:
            yield number, line


def _keyword_of(line: str) -> tuple[str | None, str, str | None]:
    """Part a line from its keyword -> (keyword or None, the rest, what is wrong with it)."""
    before, colon, rest = line.partition(":")
    if not colon or "|" in before:
        return None, line, None
    keyword = before.strip()
    if keyword not in KEYWORDS:
        problem = f"{keyword!r} is no keyword; before a colon stands {' or '.join(KEYWORDS)}"
        return None, rest, problem
    return keyword, rest, None if rest.strip(" |") else f"no label stands behind {keyword}:"


def _problem_of(text: str) -> str | None:
    """Say why a name or alias cannot be one by itself, or None."""
    if not text:
        return "a name or alias is empty; leave the | out"
    for characters, why in _FORBIDDEN:
        if held := [c for c in text if c in characters]:
            return f"{text!r} holds {held[0]!r}, which {why}"
    if len(text) > MAX_ENTRY_LENGTH:
        return f"{text[:30]!r}... has {len(text)} characters, at most {MAX_ENTRY_LENGTH} are read"
    if control := [c for c in text if unicodedata.category(c) == "Cc"]:
        return f"{text!r} holds the control character {control[0]!r}"
    for word in re.findall(r"[^\W\d_]+", text):
        if len(scripts := _scripts(word)) > 1:
            return (
                f"{text!r} mixes letters of {' and '.join(scripts)} in one word, where some look"
                " alike; write it in one script"
            )
    if not any(c.isalpha() for c in text):
        return f"{text!r} has no letter, so no answer could be read as this label"
    folded = unicodedata.normalize("NFKC", text).casefold()
    if (kept := _letters(spelling(text))) != _letters(folded):
        return f"{text!r} cannot be read back: a part of it counts as markup, which leaves {kept!r}"
    return None


def _scripts(text: str) -> list[str]:
    """List the scripts of SCRIPTS that a text has letters of, as Latin, Cyrillic, Greek."""
    begun = {unicodedata.name(c, "").partition(" ")[0] for c in text if c.isalpha()}
    return [script.title() for script in SCRIPTS if script in begun]


def _looks(text: str) -> str:
    """Fold two spellings that look the same to one text: also in letters of another script."""
    return unicodedata.normalize("NFD", spelling(text)).translate(_LOOK_ALIKE)


def _in_letters(one: _Spelling, other: _Spelling) -> str:
    """Say of two spellings that look the same in which letters the first is, where they differ."""
    if spelling(one.text) == spelling(other.text):
        return ""
    return f", in {' and '.join(_scripts(one.text))} letters"


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isalnum())


def _marking_problems(
    exclusive: list[_Spelling], beside: list[_Spelling]
) -> Iterator[tuple[int, str]]:
    for name in exclusive[1:]:
        first = f"that is {exclusive[0].text!r} on line {exclusive[0].line}"
        yield name.line, f"{name.text!r} cannot be exclusive as well: {first}"
    for name in beside if not exclusive else ():
        yield name.line, f"{name.text!r} is beside nothing: no label of the file is exclusive"


def _repeated(names: list[_Spelling], aliases: list[_Spelling]) -> Iterator[tuple[int, str]]:
    """Name every label or alias that another line has already, also in other letters or marks."""
    first: dict[str, _Spelling] = {}
    metrics: dict[str, _Spelling] = {}
    for name in names:
        earlier = first.setdefault(_looks(name.text), name)
        same_metric = metrics.setdefault(metric_name(name.text).casefold(), name)
        if earlier is not name:
            also = "is also" if earlier.text == name.text else f"looks like {earlier.text!r}"
            also += f" on line {earlier.line}{_in_letters(name, earlier)}"
            yield name.line, f"{name.text!r} {also}; labels must differ"
        elif same_metric is not name:
            differs = f"differs from {same_metric.text!r} on line {same_metric.line} only by marks"
            yield name.line, f"{name.text!r} {differs}; labels must differ by letters"
    labels = set(first)
    for alias in aliases:
        earlier = first.setdefault(_looks(alias.text), alias)
        if earlier.label == alias.label:
            continue
        what = "the label" if _looks(alias.text) in labels else f"an alias of {earlier.label!r}"
        yield (
            alias.line,
            f"the alias {alias.text!r} of {alias.label!r} is {what} on line {earlier.line}"
            + _in_letters(alias, earlier),
        )


def _unreadable(label_set: LabelSet, spellings: Iterable[_Spelling]) -> Iterator[tuple[int, str]]:
    """Name what an answer could not say: alone, among all labels, or as it is a list itself."""
    listed = ", ".join(label_set.names)
    in_list = set(read_entries(listed, label_set).labels)
    for one in spellings:
        found = read_entries(one.text, label_set).labels
        pieces = labels_of_pieces(one.text, label_set)
        if found != (one.label,) or one.label not in in_list:
            yield one.line, f"{one.text!r} cannot be read back from an answer; write it otherwise"
        elif len(pieces) > 1:
            yield one.line, f"{one.text!r} reads as the labels {', '.join(pieces)}; name it apart"
