"""Name the 14 CheXpert labels, fold their spellings, and map other hospitals' categories to them.

A `LabelSet` says which labels there are: CHEXPERT, or what a label file lists (label_sets.py).
Everything that compares labels goes through `LabelSet.find`, so that a model answer, a data file
and a score table can never disagree about spelling. It drops no word, so the columns of a label
table and a model's answer can share it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

NO_FINDING = "No Finding"
SUPPORT_DEVICES = "Support Devices"

# CheXpert's order (Irvin et al., 2019, train.csv). Score tables and label vectors use this order.
LABELS: tuple[str, ...] = (
    NO_FINDING,
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    SUPPORT_DEVICES,
)

# Spellings that mean exactly one of the 14 and nothing else. The list is short on purpose:
# 'nodule', 'normal' or 'infiltrate' are findings or judgements, not other names of a label, and an
# answer that uses them counts as unknown.
ALIASES: dict[str, str] = {
    "airspace opacity": "Lung Opacity",  # MIMIC-CXR-JPG 2.1.0, the radiologists' test labels
    "lung opacities": "Lung Opacity",
    "lung lesions": "Lung Lesion",
    "pulmonary edema": "Edema",
    "oedema": "Edema",
    "effusion": "Pleural Effusion",
    "pleural effusions": "Pleural Effusion",
    "fractures": "Fracture",
    "support device": SUPPORT_DEVICES,
    "no findings": NO_FINDING,
    "enlarged cardiomediastinal silhouette": "Enlarged Cardiomediastinum",
}

_INVISIBLE = dict.fromkeys(
    map(
        ord,
        "\u200b\u200c\u200d\u2060\ufeff\u00ad"  # zero-width, byte order mark, soft hyphen
        "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # direction
        "\ufe0e\ufe0f",  # how the character before them is drawn
    )
)
# Numbers in a circle would lose it and run into the word, an acute accent would become a space.
_BEFORE_NFKC = (
    _INVISIBLE
    | {first + i: f"{i + 1}." for first in (0x2460, 0x2776, 0x2780, 0x278A) for i in range(10)}
    | {0x246A + i: f"{i + 11}." for i in range(10)}
    | {ord("\u20e3"): ".", ord("\u00b4"): "'"}
)
QUOTES = (
    "\"'`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\u2032\u301d\u301e"
)
OPENING = "([{<\u3008\u300a\u300c\u300e\u3010\u3014\u3016"
CLOSING = ")]}>\u3009\u300b\u300d\u300f\u3011\u3015\u3017"
# A hollow bullet or box may stand for "not ticked", and a plus or minus sign for a verdict.
BULLETS = (
    "-\u2010\u2012\u2013\u2014\u2015"  # hyphens and dashes
    "\u2022\u00b7\u2219\u25cf\u25aa\u25a0\u25c6\u2023\u2043\u25ba\u25b6\u25b8\u27a4"
)
_MARKUP = " *#$\\"  # bold, italics, headings, LaTeX, escapes
_FRONT = re.compile(
    rf"""(?: [{re.escape(_MARKUP + QUOTES + OPENING + BULLETS)}>\u2192\u2794]
        | [1-9][0-9]?\ ?[.):\]-]  # list number; 0 is none, for it may say "absent"
        | (?:[a-k]|i{{1,3}}|iv|vi{{0,3}}|ix)[.)\]]  # l, n, r and x may mean left, no, right, ticked
        | (?:boxed|text|textbf|textit|emph|mathbf){{  # after the backslash, which is gone
        )*""",
    re.VERBOSE,
)
_END = _MARKUP + QUOTES + CLOSING + ".:!\u3002"
_INSIDE = re.compile(r"(?<=\w)[ \u2010-]{1,3}(?=\w)")


def strip_markup(text: str) -> str:
    """Fold how `text` is written, and take off the markup around it.

    Folded are case, Unicode compatibility forms (full-width letters), invisible characters,
    underscores and runs of white space. Taken off are bullets and list numbers in front, full
    stops, colons and exclamation marks at the end, and Markdown, LaTeX, quotes and brackets on
    either side. A list that is cut into entries leaves brackets without their partners, so an
    opening bracket goes only in front and a closing one only at the end: "[ ] Edema", a box that is
    not ticked, keeps its "]".

    No word is ever taken off.
    """
    if not text.isascii():  # or nothing of this line would change it
        text = unicodedata.normalize("NFKC", text.translate(_BEFORE_NFKC)).translate(_INVISIBLE)
    folded = " ".join(text.replace("_", " ").casefold().split()).rstrip(_END)
    return _FRONT.sub("", folded, count=1)


# ---- which labels there are ----------------------------------------------------------------------
@dataclass(frozen=True)
class LabelSet:
    """Hold the labels that an answer may name, in the order of score tables and label vectors.

    names [K]: the labels. aliases: {a further spelling: the label that it means and no other}.
    exclusive: the label that excludes all others, as No Finding does, None where there is none.
    beside: the labels that may stand beside it all the same, as Support Devices may.
    """

    names: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)
    exclusive: str | None = None
    beside: tuple[str, ...] = ()

    def find(self, text: str) -> str | None:
        """Find the label that `text` spells, or None.

        The letters must be those of a label or of an alias, without any word more or less. What
        `strip_markup` takes off does not count, nor does white space or a hyphen between the
        letters: "1. **Pleural-Effusion**" and "NoFinding" are labels. "left Pleural Effusion",
        "Edema (mild)", "no Edema", "Edema?" and "Edema: yes" are none.
        """
        return _found(self, text)

    def ordered(self, labels: Collection[str]) -> tuple[str, ...]:
        """Put labels into the set's order, each once. What is no label of the set is left out."""
        return tuple(label for label in self.names if label in labels)

    def contradictions(self, labels: Iterable[str]) -> tuple[str, ...]:
        """List the labels that cannot stand beside the exclusive one, where that is among them."""
        labels = tuple(labels)
        if self.exclusive is None or self.exclusive not in labels:
            return ()
        return tuple(label for label in labels if label not in (self.exclusive, *self.beside))

    @cached_property
    def listing(self) -> str:
        """Return the end of a line on something that is no label: which labels there are."""
        return f"; the labels are: {', '.join(self.names)}"

    def listed_once(self, problems: Iterable[str]) -> list[str]:
        """Leave `listing` to the first of the problems that has it: it is long."""
        shorter: list[str] = []
        told = False
        for problem in problems:
            before, listing, behind = problem.partition(self.listing)
            shorter.append(before if listing and told else problem)
            told = told or bool(listing)
        return shorter

    @cached_property
    def by_spelling(self) -> Mapping[str, str]:
        """Return {`spelling` of a label or an alias: the label}."""
        spelled = {spelling(alias): label for alias, label in self.aliases.items()}
        return {spelling(label): label for label in self.names} | spelled

    @cached_property
    def in_text(self) -> re.Pattern[str]:
        """Return the pattern of any label or alias as whole words in a text of lower case."""
        names = sorted((*self.names, *self.aliases), key=len, reverse=True)  # the longest match
        words = (re.escape(name.casefold().replace("_", " ")) for name in names)
        return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)


def spelling(text: str) -> str:
    """Fold what may differ between two spellings of a label: markup, case, blanks, hyphens."""
    return _INSIDE.sub("", strip_markup(text))


@lru_cache(maxsize=10_000)  # answers of a whole data set say few different things
def _found(label_set: LabelSet, text: str) -> str | None:
    return label_set.by_spelling.get(spelling(text))


CHEXPERT = LabelSet(LABELS, ALIASES, NO_FINDING, (SUPPORT_DEVICES,))


def canonical_label(text: str) -> str | None:
    """Find the CheXpert label that `text` spells, or None, as `LabelSet.find` does."""
    return CHEXPERT.find(text)


def metric_name(label: str) -> str:
    """Write a label as a part of a metric's name, in letters, digits, ".", "-" and "_"."""
    return re.sub(r"[^\w.-]", "_", label)


# A label is called silenced where it is true often enough to tell, and hardly ever said.
SILENCED_MIN_TRUE, SILENCED_SHARE = 10, 1 / 4


def silenced_labels(
    said: Mapping[str, float], true: Mapping[str, float], labels: Iterable[str] = LABELS
) -> list[str]:
    """List the labels that a model has stopped saying, in the order of `labels`, to warn of it.

    These are the labels that are true at least SILENCED_MIN_TRUE times and said less often than
    SILENCED_SHARE of that. F1 over all labels hardly moves when a rare label falls silent.

    said, true: how often each label is said and is true, where it is evaluated. One that is missing
    counts 0. labels: those that there are.
    """
    return [
        label
        for label in labels
        if true.get(label, 0) >= SILENCED_MIN_TRUE
        and said.get(label, 0) < SILENCED_SHARE * true[label]
    ]


@dataclass(frozen=True)
class Target:
    """Hold what is true of one image, and which labels its source can express at all.

    A label outside `evaluated_labels` is unknown, not absent: rewards and scores must ignore it.
    `hospital` names the one of --train_file that the image is from, so that a reward can look up
    how frequent labels are there. None where there is one alone, without a name.
    """

    labels: frozenset[str]
    evaluated_labels: frozenset[str] = frozenset(LABELS)
    hospital: str | None = None

    @classmethod
    def of(
        cls, labels: Iterable[str], evaluated_labels: Iterable[str], hospital: str | None = None
    ) -> Target:
        """Make the target of an image, with only those of its labels that its source evaluates."""
        evaluated = frozenset(evaluated_labels)
        return cls(frozenset(labels) & evaluated, evaluated, hospital)


# An uncertain mention (-1) counts as absent (U-Zeros), present (U-Ones) or unknown (U-Ignore), by
# Irvin et al., 2019.
UNCERTAIN_RULES = ("zeros", "ones", "ignore")
BLANK_RULES = ("zeros", "ignore")  # a blank cell counts as absent or unknown
# An image without any true label is called No Finding, keeps its empty set, or is left out.
NO_LABEL_RULES = ("no_finding", "empty", "drop")


@dataclass(frozen=True)
class LabelPolicy:
    """Choose how the cells of CheXpert's and MIMIC's label tables become a label set.

    A cell is 1, 0, -1 or blank.

    uncertain: one of UNCERTAIN_RULES, for -1.
    uncertain_by_label: other rules for single labels, as {"Edema": "ones"}.
    blank: one of BLANK_RULES, for a label that the report does not mention. "ignore" makes a label
    unknown for this image: it leaves evaluated_labels.
    no_label: one of NO_LABEL_RULES. At "drop" the reader of the table leaves the image out.
    label_set: the labels of the table. Its exclusive label takes the place of No Finding.

    Raises ValueError for an unknown rule or label.
    """

    uncertain: str = "zeros"
    uncertain_by_label: Mapping[str, str] = field(default_factory=dict)
    blank: str = "zeros"
    no_label: str = "no_finding"
    label_set: LabelSet = CHEXPERT

    def __post_init__(self) -> None:
        for name, rule, rules in (
            ("uncertain", self.uncertain, UNCERTAIN_RULES),
            ("blank", self.blank, BLANK_RULES),
            ("no_label", self.no_label, NO_LABEL_RULES),
            *(
                (f"uncertain {label}", rule, UNCERTAIN_RULES)
                for label, rule in self.uncertain_by_label.items()
            ),
        ):
            if rule not in rules:
                raise ValueError(f"{name}: {rule!r} is no rule; known: {', '.join(rules)}")
        unknown = [label for label in self.uncertain_by_label if label not in self.label_set.names]
        if unknown:
            raise ValueError(
                f"uncertain: {', '.join(map(repr, unknown))} is no label{self.label_set.listing}"
            )

    def meaning(self, label: str, value: int | None) -> str:
        """Read one cell (1, 0, -1, None for blank) -> "true", "false", "ignored" or "silent".

        A blank that the policy makes unknown is silent.
        """
        if value == -1:
            return {"ones": "true", "zeros": "false", "ignore": "ignored"}[
                self.uncertain_by_label.get(label, self.uncertain)
            ]
        if value is None:
            return "silent" if self.blank == "ignore" else "false"
        return "true" if value else "false"

    def combine(self, meanings: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Combine {label: its `meaning`} -> (labels, evaluated labels), in the set's order.

        A label that is no key has no column in the table and counts as silent. No Finding excludes
        every label but Support Devices, so a stated No Finding makes silent findings false, and a
        stated finding makes a silent No Finding false. An image is called No Finding only where no
        finding is unknown. Where one is, No Finding is unknown too. Contradictions of the table are
        kept. The exclusive label of another set, and those beside it, are treated alike.
        """
        names, exclusive = self.label_set.names, self.label_set.exclusive
        beside = set(self.label_set.beside)
        true, ignored, silent = (
            {label for label in names if meanings.get(label, "silent") == meaning}
            for meaning in ("true", "ignored", "silent")
        )
        if exclusive in true:
            silent &= beside
        elif exclusive is not None:
            if true - beside:
                silent.discard(exclusive)
            if not true and self.no_label == "no_finding" and exclusive not in ignored:
                if (ignored | silent) - {exclusive} - beside:
                    silent.add(exclusive)
                else:
                    true.add(exclusive)
                    silent.discard(exclusive)
        unknown = ignored | silent
        return self.label_set.ordered(true), tuple(label for label in names if label not in unknown)


DEFAULT_POLICY = LabelPolicy()

# NIH ChestX-ray14's strings and the CheXpert labels that they become. None: NIH has the category,
# but none of the 14 says the same thing ('Infiltration' is at best an approximate Lung Opacity), so
# it is dropped.
NIH_TO_CHEXPERT: dict[str, str | None] = {
    "No Finding": NO_FINDING,
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Emphysema": None,
    "Fibrosis": None,
    "Hernia": None,
    "Infiltration": None,
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural_Thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}

# The nine categories of the paper's Table 6, in CheXpert's order. NIH does label effusions. The
# paper's nine leave them out, so the ten are offered as a variant.
NIH_NINE: tuple[str, ...] = (
    NO_FINDING,
    "Cardiomegaly",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Other",
)
NIH_TEN: tuple[str, ...] = tuple(
    label for label in LABELS if label in {*NIH_NINE, "Pleural Effusion"}
)
LABEL_MAPS: dict[str, tuple[str, ...]] = {"nih_nine": NIH_NINE, "nih_ten": NIH_TEN}  # --label_map


def chexpert_labels_of_nih(
    source_labels: list[str] | tuple[str, ...],
    evaluated: tuple[str, ...] = NIH_NINE,
    no_label: str = "empty",
) -> tuple[str, ...]:
    """Map the NIH strings of one image -> the CheXpert labels among `evaluated`, in its order.

    evaluated: the labels that the result may hold.
    no_label: where there are none, "no_finding" makes it No Finding, else the result is empty.

    Raises ValueError for a string that is not one of NIH's 15.
    """
    unknown = [s for s in source_labels if s not in NIH_TO_CHEXPERT]
    if unknown:
        raise ValueError(
            f"not a label of NIH ChestX-ray14: {', '.join(map(repr, unknown))}; known:"
            f" {', '.join(NIH_TO_CHEXPERT)}"
        )
    mapped = {NIH_TO_CHEXPERT[s] for s in source_labels}
    if no_label == "no_finding" and not mapped & set(evaluated):
        mapped = {NO_FINDING}
    return tuple(label for label in LABELS if label in mapped and label in evaluated)
