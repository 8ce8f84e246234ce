"""Read the entries of an answer block: which are labels, and what the others say.

An entry ends at a comma, a semicolon or a line break of any script, and at <br>. It is a label
where `LabelSet.find` finds one: markup around it counts for nothing, a word never does. Beyond
that:

* "Labels:", "**Findings**", "Here is the final answer:" and a code fence only name the list. They
  are left out.
* "and", "&", "/", "|", a tab, " + ", " - ", an inner bullet or list number, and a full stop cut an
  entry if each piece is a label. Otherwise the entry is unknown as a whole, for the rest may belong
  to all of it: "left Edema and Fracture", the row "Edema | absent" of a table.
* An entry that says more than a label's name is unknown, whatever it says: a side, a degree, a
  doubt, a verdict. "Edema: yes" is unknown like "Edema: no", or a check list would be read in half.
* A negation takes all that it covers: the whole of "no Edema, Fracture, or Pneumonia", of "negative
  for Edema, Fracture" and of "~~Edema, Fracture~~", the labels before a bare "no" or "0". So does a
  probability, as in the row "Edema,0.03" or in {"label": "Edema", "score": 0.03}. In a list with
  plus signs a minus sign is a negation, and no bullet.
* So does a heading that is not the list's name: "Absent:", "Possible:", "Left lung:". It takes its
  line, or all up to the next heading where it stands alone. "# Left lung" is one without a colon,
  and so is what says no more than a verdict or a doubt: "**Absent**", "Possible findings",
  "| Present | Absent |", "absent=[".

Time is linear in the length of the text: no regular expression here repeats a repeat.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from data.labels import BULLETS, CHEXPERT, CLOSING, OPENING, QUOTES, LabelSet

# What an unknown entry says, as the scores count it.
UNKNOWN_KINDS: tuple[str, ...] = (
    "negated",  # holds a negation: "no Edema", "Edema: absent", "[ ] Edema"
    "affirmed",  # a label's name and a verdict for it: "Edema: yes"
    "qualified",  # a label's name and something else: "left Pleural Effusion", "Edema (mild)"
    "other",  # no label's name: "Nodule", "the lungs are clear"
)

# No spelling of a label comes near this. Unicode normalisation is quadratic on long runs of
# combining marks, so a longer entry is unknown without being looked up.
MAX_ENTRY_LENGTH = 200

# ---- where entries end ---------------------------------------------------------------------------
# Latin, Arabic, ideographic and full-width with their small and vertical forms, Armenian, Ethiopic
COMMAS = ",\u060c\u3001\uff0c\uff64\ufe50\ufe51\ufe10\ufe11\u055d\u1363"
SEMICOLONS = ";\u061b\uff1b\ufe54\ufe14\u037e"
_SEPARATOR = re.compile(
    rf"[{COMMAS}{SEMICOLONS}\n\r\v\f\x1c-\x1e\x85\u2028\u2029]|<br ?/?>",
    re.IGNORECASE,
)
# Cuts an entry only if each piece is a label.
_JOINT = re.compile(
    r"[|\uff5c\u2502\u00a6/\uff0f&\uff06\u2022\u00b7\u25cf\u25aa\u2023]|\\n|(?:^| )and(?: |$)"
    r"|(?<![\d.])\.(?= |$)| (?=[(\[]?[1-9][0-9]?[.)\]] )",
    re.IGNORECASE,
)
_SIGN = re.compile(
    " [-+*\u2013\u2014] "
)  # a joint too, but never at an end: "Edema -" is a verdict
_CONJUNCTION = re.compile(r"&|\b(?:and|or|nor)\b", re.IGNORECASE)
_FENCE = re.compile(r"```\s?(?:json|text|txt|plaintext|markdown|md|python|yaml|csv)?", re.I)
COLONS = ":\uff1a\ufe55"
_COLON = re.compile(f"[{COLONS}]")
# Ends a heading too, where that is a bare negation: "Absent - Edema, Fracture", "not [Edema, .."
_HEADING_SIGN = re.compile(r"[=(\[{<>\u2192]| [-\u2010\u2012-\u2015]>? ")
# A plus or minus sign of any script in front, with a bullet or a list number before it.
_SIGNED = re.compile(
    r"(?:[*\u2022] |[0-9]{1,2}[.)] ?)?"
    r"(?:([+\uff0b\ufe62\u2795])|[-\u2010\u2012-\u2015\uff0d\ufe63])"
)
_SHARE = re.compile(r"0?\.[0-9]+|0+|1\.0+|[0-9]+(?:\.[0-9]+)? ?%")
# What follows {"label": "Edema" where the object has a field for the label's probability.
_SHARE_FIELD = re.compile(rf'"[^"]*"\s*:\s*"?(?:{_SHARE.pattern})"?[\s}}\]]*')
_EMPTY_LIST = re.compile(rf"[^0-9]*{_COLON.pattern}\s?[\[{{][^0-9]*")
_CLOSE = frozenset("]}")
# An entry of these alone is markup: the brackets of a list over several lines, a table's rule. Not
# a single dash, which may stand for "none".
_RULE = QUOTES + OPENING + CLOSING + BULLETS + "*#|=_:$\\ \t"
_DASHES = ("-", "\u2010", "\u2013", "\u2014")

# ---- words ---------------------------------------------------------------------------------------
_LABEL = "LABEL"  # stands for a label's name among words, which are in lower case
_WORD = re.compile(
    r"[0-9]+(?:\.[0-9]+)?|[^\W\d_]+|\[ ?\]|\( ?\)|\(-\)|-$|~~"
    r"|[+\u2212\u2610\u2611\u2705\u2713\u2714\u2717\u2718\u274c]"
)
_NEGATIONS = frozenset({
    "no", "not", "nor", "neither", "never", "without", "absent", "absence", "negative", "none",
    "nil", "null", "false", "n", "0", "0.0", "free", "lack", "lacks", "denies", "denied",
    "excluded", "ruled", "resolved", "cannot", "unlikely", "neg", "isn", "aren", "wasn", "weren",
    "doesn", "don", "-", "\u2212", "(-)", "[]", "[ ]", "()", "( )", "~~", "\u2610", "\u2717",
    "\u2718", "\u274c",
})  # fmt: skip
# What may stand beside a negation or an affirmation that has no label of its own.
_VERDICT = frozenset({
    "is", "are", "was", "were", "be", "out", "of", "present", "presence", "seen", "detected",
    "identified", "visible", "evident", "evidence", "noted", "found", "status", "value",
    "observed", "visualized", "visualised", "appreciated", "demonstrated", "shown", "apparent",
})  # fmt: skip
_AFFIRMATIONS = _VERDICT | {
    "yes", "y", "positive", "true", "x", "1", "1.0", "+", "\u2611", "\u2705", "\u2713", "\u2714",
}  # fmt: skip
_LIST_NAMES = frozenset({
    "label", "labels", "finding", "findings", "answer", "answers", "diagnosis", "diagnoses",
    "solution", "result", "results", "impression", "conclusion", "prediction", "predictions",
    "output", "name",
})  # fmt: skip
_BESIDE_LIST_NAMES = frozenset({
    "the", "final", "my", "predicted", "chexpert", "are", "is", "here", "list", "of", "following",
    "these", "this", "image", "for", "chest", "x", "ray", "xray", "radiograph", "present",
    "positive", "identified", "detected",
})  # fmt: skip
_DOUBTS = frozenset({
    "possible", "possibly", "probable", "probably", "likely", "suspected", "questionable",
    "uncertain", "equivocal", "indeterminate", "borderline", "maybe", "differential",
})  # fmt: skip
_VERDICTS = _NEGATIONS | _AFFIRMATIONS | _DOUBTS
_BESIDE_VERDICTS = _VERDICTS | _LIST_NAMES | _BESIDE_LIST_NAMES


class Entries(NamedTuple):
    """Hold the entries of an answer block by kind: the fields of `Answer` of the same names."""

    labels: tuple[str, ...]
    unknown: tuple[str, ...]
    duplicates: tuple[str, ...]
    contradictions: tuple[str, ...]


class _Statement(NamedTuple):
    """Hold one entry, or several that belong together: the text, and the labels that it states."""

    text: str
    labels: tuple[str, ...] = ()
    is_heading: bool = False  # of entries below it, so that it takes back nothing above it


def read_entries(body: str, label_set: LabelSet = CHEXPERT) -> Entries:
    """Sort the entries of an answer block. label_set: the labels that there are."""
    labels: list[str] = []
    unknown: list[str] = []
    duplicates: list[str] = []
    seen: set[str] = set()
    for text, stated, _ in _statements(body, label_set):
        for entry in stated or (text,):
            key = " ".join(entry.split()).casefold()
            if key in seen:
                duplicates.append(entry)
            else:
                (labels if stated else unknown).append(entry)
            seen.add(key)
    contradictions = label_set.contradictions(labels)
    return Entries(tuple(labels), tuple(unknown), tuple(duplicates), contradictions)


@lru_cache(maxsize=10_000)
def unknown_kind(entry: str, label_set: LabelSet = CHEXPERT) -> str:
    """Say of an unknown entry which of UNKNOWN_KINDS it is, from its first 200 characters."""
    words = _words(entry, label_set)
    others = [word for word in words if word != _LABEL]
    if _NEGATIONS.intersection(others):
        return "negated"
    if _LABEL not in words:
        return "other"
    return "affirmed" if others and _AFFIRMATIONS.issuperset(others) else "qualified"


def _statements(body: str, label_set: LabelSet) -> list[_Statement]:
    every_series = list(_series(body))
    signed = any(
        match[1]
        for entries, _ in every_series
        for entry in entries
        if (match := _SIGNED.match(entry))
    )
    statements: list[_Statement] = []
    names: list[str] = []  # entries that say no more than what list this is
    place: int | None = None  # of the statement that is the heading, where it stands alone
    heading, goes_on = "", False  # takes what stands below; "" for none or the list's name
    for series, ends_line in every_series:
        read = []
        alone = ends_line and len(series) == 1
        for entry in series:
            new_heading, rest = _split_heading(entry, label_set)
            if alone and _is_heading_line(entry, statements, label_set):
                new_heading, heading, goes_on = entry, entry.strip(_RULE), True
            elif new_heading is not None:
                heading, goes_on = new_heading, _stands_alone(entry, label_set)
            if new_heading is not None:
                # below "Edema" the bullet "- no:" is its verdict
                place = len(statements) if alone and goes_on and entry[0] not in BULLETS else None
            if not rest or rest.casefold() in ("and", "&"):
                names.append(entry)
            elif heading:
                read.append(_Statement(entry if new_heading else f"{heading}: {entry}"))
                if place is not None and not new_heading:
                    statements[place] = statements[place]._replace(is_heading=True)
            elif signed and _SIGNED.match(rest):
                read.append(_Statement(rest))
            else:
                read.append(_Statement(rest, _labels_in(rest, label_set)))
        if ends_line and not goes_on:
            heading = ""
        statements += _with_negated_series(read, label_set)
    # "Labels:" and no more is no empty list, nor is 'Labels: [' cut short, but {"labels": []} is.
    closed = not _CLOSE.isdisjoint(body)
    return _with_bare_negations(statements, label_set) or [
        _Statement(name) for name in names if not (closed and _EMPTY_LIST.fullmatch(name))
    ]


def _series(body: str) -> Iterator[tuple[list[str], bool]]:
    """Cut a text into its entries, stripped, and part them where no comma goes on.

    With each series: whether its line ends with it.
    """
    entries, start, line_is_open = [], 0, False
    for separator in _SEPARATOR.finditer(body + "\n"):
        entry = body[start : separator.start()].strip()
        start = separator.end()
        ends_line = separator.group() not in SEMICOLONS
        if entry and _is_entry(entry):
            entries.append(entry)
        # blank lines count for nothing, but the line break after "Edema;" does
        if (entries and entry or line_is_open and ends_line) and separator.group() not in COMMAS:
            yield entries, ends_line
            entries, line_is_open = [], not ends_line
    if entries:
        yield entries, True


def _is_entry(text: str) -> bool:
    if text.startswith("```") and _FENCE.fullmatch(text):
        return False
    return bool(text.strip(_RULE)) or text in _DASHES


def _split_heading(entry: str, label_set: LabelSet) -> tuple[str | None, str]:
    """Part a heading from what follows it -> (heading, the rest).

    The heading of a list's name is "", and leaves the rest only, which may be "". Another heading
    is a part of its entry. Without a heading: (None, the entry).
    """
    if _labels_in(entry, label_set):
        return None, entry
    colon = _COLON.search(entry)
    if not colon and entry[0] not in "#*|":
        return _split_at_sign(entry, label_set)
    heading, *rest = _COLON.split(entry, maxsplit=1)
    if _is_list_name(_words(heading, label_set)):
        below = rest[0].strip() if rest else ""
        inner = _COLON.search(below)  # {"labels": {"absent": [.., Findings: Edema. Absent: ..
        if inner and _is_verdict(_words(below[: inner.start()].rpartition(". ")[2], label_set)):
            return below[: inner.start()].strip(_RULE), entry
        return "", below if _is_entry(below) else ""
    labels = _labels_in(heading, label_set)
    # "No findings: Edema, Fracture" denies them
    if rest and (not labels or labels == (label_set.exclusive,) and _labels_in(rest[0], label_set)):
        return heading.strip(_RULE), entry
    return (None, entry) if rest else _split_at_sign(entry, label_set)


def _split_at_sign(entry: str, label_set: LabelSet) -> tuple[str | None, str]:
    """Part a heading that ends at another sign than a colon, as `_split_heading` does."""
    sign = _HEADING_SIGN.search(entry, 1)
    if sign:
        words = _words(entry[: sign.start()], label_set)
        if _is_verdict(words):
            return entry[: sign.start()].strip(_RULE), entry
        if _is_list_name(words) and sign.group() not in OPENING:
            below = entry[sign.end() :].lstrip("> ")
            return "", below if _is_entry(below) else ""
    return None, entry


def _is_list_name(words: Collection[str]) -> bool:
    return not _LIST_NAMES.isdisjoint(words) and all(
        word in _LIST_NAMES or word in _BESIDE_LIST_NAMES or word.isdigit() for word in words
    )


def _is_verdict(words: Collection[str]) -> bool:
    """Tell whether words are a verdict without its labels: "absent", "the following are absent"."""
    return (
        any(len(word) > 1 and word.isalpha() and word in _VERDICTS for word in words)
        and all(word in _BESIDE_VERDICTS or word.isdigit() for word in words)
        and not _is_list_name(words)
    )


def _is_heading_line(line: str, before: Sequence[_Statement], label_set: LabelSet) -> bool:
    """Tell whether a line without a colon speaks of the entries below and not of those before."""
    words = _words(line, label_set)
    if _COLON.search(line) or line.startswith("</"):
        return False
    if line[0] == "#":
        return bool(words) and not _labels_in(line, label_set) and not _is_list_name(words)
    if not _is_verdict(words):
        return False
    last = before[-1] if before else _Statement("")
    # a row's verdict looks like the row's label
    mark = next((mark for mark in ("**", "__", "<") if line.startswith(mark)), None)
    return not last.labels or mark is not None and not last.text.startswith(mark)


def _stands_alone(heading: str, label_set: LabelSet) -> bool:
    name, *rest = _COLON.split(heading, maxsplit=1)
    below = rest[0] if rest and _is_list_name(_words(name, label_set)) else heading
    return not _COLON.split(below, maxsplit=1)[-1].strip(_RULE)


def _labels_in(entry: str, label_set: LabelSet) -> tuple[str, ...]:
    """Name the labels of an entry: one, or several where each of its pieces is a label."""
    if entry.isascii() and entry.upper() == entry.lower():  # no letter, no label
        return ()
    label = _label_of(entry, label_set)
    return (label,) if label else labels_of_pieces(entry, label_set)


def labels_of_pieces(entry: str, label_set: LabelSet) -> tuple[str, ...]:
    """Name the labels that an entry joins, none where one of its pieces is no label."""
    text = " ".join(entry.replace("\t", "|").split())
    pieces = [piece.strip() for piece in _JOINT.split(text)]
    parts = [part for piece in pieces if piece for part in _SIGN.split(piece)]
    labels = [_label_of(part, label_set) for part in parts]
    return tuple(label for label in labels if label) if all(labels) else ()


def _label_of(text: str, label_set: LabelSet) -> str | None:
    return label_set.find(text) if len(text) <= MAX_ENTRY_LENGTH else None


def _with_negated_series(series: list[_Statement], label_set: LabelSet) -> list[_Statement]:
    """Join what a negation takes in a series to one unknown statement.

    "no A, B, or C" takes all up to the last conjunction, "negative for A, B" and "no evidence of A,
    B" all that follows, "~~A, B~~" what is struck out. "A, B, and C are absent" takes the labels
    before it.
    """
    if all(statement.labels for statement in series):
        return series
    joints = [i for i, one in enumerate(series) if _CONJUNCTION.search(one.text)]
    read: list[_Statement] = []
    taken = -1
    for i, statement in enumerate(series):
        if i <= taken:
            continue
        read.append(statement)
        words = [] if statement.labels else _words(statement.text, label_set)
        negation = next((place for place, word in enumerate(words) if word in _NEGATIONS), None)
        if negation is None:
            continue
        if statement.text.count("~~") == 1:
            struck = (j for j in range(i + 1, len(series)) if "~~" in series[j].text)
            taken = next(struck, i)
            read[-1] = _joined(series[i : taken + 1])
        elif _LABEL not in words[:negation]:
            named = words.index(_LABEL) if _LABEL in words else 0
            whole = named and words[named - 1] in ("of", "for")
            taken = len(series) - 1 if whole else max(joints, default=i)
            read[-1] = _joined(series[i : max(i, taken) + 1])
        elif _CONJUNCTION.search(statement.text):
            first = len(read) - 1
            while first and read[first - 1].labels:
                first -= 1
            read[first:] = [_joined(read[first:])]
    return read


def _with_bare_negations(statements: list[_Statement], label_set: LabelSet) -> list[_Statement]:
    """Join a negation or probability of its own, as in "Edema, no", to the label before it."""
    read: list[_Statement] = []
    for statement in statements:
        takes_back = not (statement.labels or statement.is_heading)
        if (
            read
            and read[-1].labels
            and takes_back
            and _denies(statement.text, read[-1].text, label_set)
        ):
            read[-1] = _joined([read[-1], statement])
        else:
            read.append(statement)
    return read


def _denies(text: str, label: str, label_set: LabelSet) -> bool:
    """Tell whether an entry without a label denies or doubts the label before it."""
    if text in _DASHES or _SHARE.fullmatch(text.strip(_RULE)):
        return True
    if _SHARE_FIELD.fullmatch(text):  # of this label, and not of a list that it ends
        return label[0] == label[-1] == '"'
    words = frozenset(_words(text, label_set))
    return not words.isdisjoint(_NEGATIONS) and words <= _NEGATIONS | _VERDICT


def _joined(statements: Sequence[_Statement]) -> _Statement:
    return _Statement(", ".join(statement.text for statement in statements))


def _words(text: str, label_set: LabelSet) -> list[str]:
    """List the words, numbers and marks of a text, with _LABEL for each label's name."""
    start = text[:MAX_ENTRY_LENGTH].casefold().replace("_", " ")
    return _WORD.findall(label_set.in_text.sub(_LABEL, start))
