"""Parse model output, here and nowhere else: text -> `Answer`.

Formats (`blank` is any white space, tags count only in exactly this lower-case spelling):

    think_solution   blank <think>..</think> blank <solution>label, label</solution> blank
                     (the paper's)
    answer_tag       blank <think>..</think> blank <answer>label, label</answer> blank
                     (NV-Reason-CXR's)
    solution         blank <solution>label, label</solution> blank
                     (labels without reasoning)
    label_list       label, label
                     (no tags at all)

"Answer block" below is <solution> or <answer>, whichever the format names. `Answer.problem` is the
first of these that applies, or None:

    code              parsed  valid  meaning
    answer_missing    no      no     neither tag of the answer block
    answer_unclosed   no      no     only its opening tag, as a completion that was cut at the
                                     length limit leaves it
    answer_unopened   no      no     only its closing tag
    answer_repeated   no      no     one of its tags more than once, wherever: nobody can tell
                                     which block is meant
    answer_reversed   no      no     closing tag before opening tag
    empty             yes     *      the answer block holds no entry, which reads as "none of the
                                     labels"
    no_label          no      *      the answer block holds entries, and none of them is a label
    think_missing     yes     no     the same five for the <think> block, where the format has one
    think_unclosed    yes     no
    think_unopened    yes     no
    think_repeated    yes     no
    think_reversed    yes     no
    order             yes     no     the answer block does not come after the end of the <think>
                                     block
    outside           yes     no     text other than white space outside the blocks
    tagged            no      no     label_list: a tag of another format

    * valid where the form is right otherwise: what an answer says does not change its form. In
      label_list neither is valid, for nothing tells a list from prose there, and an empty text is
      not parsed either.

data/entries.py reads the entries. Those that are unknown, repeated or contradictory do not make an
answer invalid. The form is right, and they are reported on their own for the rewards and tables to
count, those of an answer without any label too.

Time is linear in the length of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from data.entries import Entries, read_entries
from data.labels import CHEXPERT, LabelSet

# Blocks of each format in their order; the last one holds the labels. A new form is a line here:
# parser, flags, prompts of one's own and what is learnt without a teacher follow it.
_BLOCKS: dict[str, tuple[str, ...]] = {
    "think_solution": ("think", "solution"),
    "solution": ("solution",),
    "answer_tag": ("think", "answer"),
    "label_list": (),
}
ANSWER_FORMATS: tuple[str, ...] = tuple(_BLOCKS)

_NAMES = dict.fromkeys(name for names in _BLOCKS.values() for name in names)
TAGS = tuple(f"<{slash}{name}>" for name in _NAMES for slash in ("", "/"))


def blocks_of(answer_format: str) -> tuple[str, ...]:
    """List the tags' names of a form's blocks in their order: the last block holds the labels."""
    return _BLOCKS[answer_format]


def is_labels_alone(answer_format: str) -> bool:
    """Tell whether a form is the answer block alone, so that labels make an answer to learn."""
    return len(_BLOCKS[answer_format]) == 1


@dataclass(frozen=True)
class Answer:
    """Hold what one completion says, and how well it keeps to the format."""

    valid: bool  # strict: exactly the format and nothing else
    # the labels could be read: the fail rate is the share of answers where this is False
    parsed: bool
    problem: str | None = None  # a code of the module's table
    labels: tuple[str, ...] = ()  # of the label set, in the text's order, each once
    unknown: tuple[str, ...] = ()  # entries that are none of them, as written, each once
    duplicates: tuple[str, ...] = ()  # one item for every entry that repeats an earlier one
    # labels that cannot stand beside the exclusive one (No Finding), where it is among the labels
    contradictions: tuple[str, ...] = ()
    think: str | None = None  # inside of the <think> block, where there is exactly one
    outside: str = ""  # text outside the blocks, stripped, pieces joined by a newline


class _Block(NamedTuple):
    """Hold one well-formed block: text[start:end] with its tags, `body` without."""

    start: int
    end: int
    body: str


def parse_answer(
    text: str, answer_format: str = "think_solution", label_set: LabelSet = CHEXPERT
) -> Answer:
    """Read the labels from a completion, whatever its text is.

    text: without special tokens.
    answer_format: one of ANSWER_FORMATS.
    label_set: the labels that there are.

    Raises ValueError for an `answer_format` that is not one of ANSWER_FORMATS.
    """
    if answer_format not in _BLOCKS:
        raise ValueError(
            f"unknown answer format {answer_format!r}; known: {', '.join(ANSWER_FORMATS)}"
        )
    if not _BLOCKS[answer_format]:
        return _parse_label_list(text, label_set)

    *preceding, answer_tag = _BLOCKS[answer_format]
    answer, answer_fault = _find_block(text, answer_tag)
    think, think_fault = _find_block(text, preceding[0]) if preceding else (None, None)
    outside = _outside(text, [block for block in (think, answer) if block])

    form_problem = None
    if think_fault:
        form_problem = f"think_{think_fault}"
    elif think and answer and answer.start < think.end:
        form_problem = "order"
    elif outside:
        form_problem = "outside"

    think_text = think.body if think else None
    if answer is None:
        return Answer(
            valid=False,
            parsed=False,
            problem=f"answer_{answer_fault}",
            think=think_text,
            outside=outside,
        )
    entries = read_entries(answer.body, label_set)
    content_problem = _content_problem(entries)
    return Answer(
        valid=form_problem is None,
        parsed=content_problem != "no_label",
        problem=content_problem or form_problem,
        think=think_text,
        outside=outside,
        **entries._asdict(),
    )


def _parse_label_list(text: str, label_set: LabelSet) -> Answer:
    if any(tag in text for tag in TAGS):
        return Answer(valid=False, parsed=False, problem="tagged")
    entries = read_entries(text, label_set)
    problem = _content_problem(entries)
    return Answer(
        valid=problem is None, parsed=problem is None, problem=problem, **entries._asdict()
    )


def _content_problem(entries: Entries) -> str | None:
    if entries.labels:
        return None
    return "no_label" if entries.unknown else "empty"


def _find_block(text: str, name: str) -> tuple[_Block | None, str | None]:
    """Find the only block <name>..</name> -> (block, None), or (None, what is wrong with it)."""
    opening, closing = f"<{name}>", f"</{name}>"
    counts = text.count(opening), text.count(closing)
    if counts != (1, 1):
        faults = {(0, 0): "missing", (1, 0): "unclosed", (0, 1): "unopened"}
        return None, faults.get(counts, "repeated")
    start, close = text.find(opening), text.find(closing)
    if close < start:
        return None, "reversed"
    return _Block(start, close + len(closing), text[start + len(opening) : close]), None


def _outside(text: str, blocks: list[_Block]) -> str:
    pieces, position = [], 0
    for block in sorted(blocks):
        pieces.append(text[position : block.start])
        position = max(position, block.end)  # one block may lie inside the other
    pieces.append(text[position:])
    return "\n".join(piece.strip() for piece in pieces if piece.strip())
