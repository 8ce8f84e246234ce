"""Describe a page as plain data, which other files write as HTML, as Markdown and for a console.

Whatever stands in the data is text: names of files, of data sets and above all what a model wrote.
`page_html.py` and `page_text.py` escape all of it, in one place each, so nothing in it can become
markup.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

ARROW = "\u2192"  # from before to after, "->" on a console
Tone = Literal["", "best", "gain", "loss", "muted"]
Outcome = Literal["right", "wrong", "failed"]
Turn = Literal["", "fixed", "broken"]


@dataclass(frozen=True)
class Cell:
    """Hold one cell of a table.

    detail: a smaller second line, such as an interval. tone: how it is set off, never by colour
    alone.
    """

    text: str
    detail: str = ""
    tone: Tone = ""


def cells_of(row: Sequence[Cell | str]) -> list[Cell]:
    """Return the cells of a row, in which a plain text stands for a cell of that text."""
    return [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]


@dataclass(frozen=True)
class Table:
    """Hold a table, whose first column is the heading of each row.

    Columns from `numbers_from` up to `numbers_to` (not included) are set as numbers.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    notes: Sequence[str] = ()
    numbers_from: int = 1
    numbers_to: int = 99

    def is_number(self, column: int) -> bool:
        """Tell whether a column is set as numbers."""
        return self.numbers_from <= column < self.numbers_to


@dataclass(frozen=True)
class HeatMap:
    """Hold a table of shares whose cells are shaded by their value.

    rows: (heading, support, shares), a share for each of `columns`, None where there is none to
    show. diagonal: the cell of a row under its own label is set off. briefly: the header and the
    rows of the narrow table that stands for it outside HTML.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, int, Sequence[float | None]]]
    briefly: tuple[Sequence[str], Sequence[Sequence[str]]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Text:
    """Hold a paragraph."""

    text: str


@dataclass(frozen=True)
class Lead:
    """Hold the sentence that a page begins with, and smaller lines of evidence under it."""

    text: str
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Bullets:
    """Hold a list of short statements."""

    items: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """Hold a picture: SVG text or the bytes of a PNG or JPEG.

    name: becomes its file's name. alt: says what it shows. narrow: the same for a narrow screen,
    where it is drawn for one.
    """

    name: str
    data: bytes
    media_type: Literal["image/svg+xml", "image/png", "image/jpeg"]
    alt: str
    caption: str = ""
    narrow: bytes = b""


def picture_file(picture: Picture) -> str:
    """Return the file name of a picture: another one for each name.

    A name with characters that no file name should have gets its checksum, since two of them may
    look alike without those.
    """
    suffix = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}[picture.media_type]
    name = re.sub("[^A-Za-z0-9_.+-]+", "-", picture.name)
    if name != picture.name:
        name += f"-{zlib.crc32(picture.name.encode(errors='surrogatepass')):08x}"
    return f"{name}.{suffix}"


@dataclass(frozen=True)
class ModelAnswer:
    """Hold one model's answer to the image of a case.

    jaccard: of its labels and the true ones. facts: (name, value) of tokens, reward parts, what is
    wrong with the answer.
    """

    model: str
    outcome: Outcome
    reasoning: str
    predicted: Sequence[str]
    completion: str
    jaccard: float
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """Hold one image with what is true of it and what each model says.

    turn: what the last model did with the answer of the one before it: "fixed" where only the last
    is right, "broken" where only the one before is, else "".
    """

    data_set: str
    id: str
    labels: Sequence[str]
    evaluated: Sequence[str]
    picture: Picture | None
    answers: Sequence[ModelAnswer]
    turn: Turn = ""


@dataclass(frozen=True)
class Cases:
    """Hold sample cases, which the page filters by outcome, label, turn and id, and sorts.

    prompts: (name, text) of the instructions that were used.
    """

    cases: Sequence[Case]
    prompts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Strip:
    """Hold a few cases in short, side by side. Each leads to the whole case further down.

    shown: (what it is an example of, its number among `cases`). models: whose answers to show, all
    of them without.
    """

    cases: Sequence[Case]
    shown: Sequence[tuple[str, int]]
    models: Sequence[str] = ()

    def answers(self, case: Case) -> list[ModelAnswer]:
        """Return the answers to show of a case."""
        return [answer for answer in case.answers if not self.models or answer.model in self.models]


@dataclass(frozen=True)
class Folded:
    """Hold blocks that stand behind a title until a reader opens them."""

    title: str
    blocks: Sequence[Block]


Block = Table | HeatMap | Text | Lead | Bullets | Picture | Cases | Strip | Folded


@dataclass(frozen=True)
class Section:
    """Hold a heading with what belongs under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """Hold a whole page. files: what is written beside it, {name: text}."""

    title: str
    subtitle: str
    sections: Sequence[Section] = field(default_factory=list)
    files: Mapping[str, str] = field(default_factory=dict)

    def pictures(self) -> list[Picture]:
        """Return the pictures of the page, in their order, but those of cases."""

        def inside(blocks: Sequence[Block]) -> list[Picture]:
            found: list[Picture] = []
            for block in blocks:
                if isinstance(block, Picture):
                    found.append(block)
                elif isinstance(block, Folded):
                    found += inside(block.blocks)
            return found

        return [picture for section in self.sections for picture in inside(section.blocks)]


OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
TURNS: tuple[Turn, ...] = ("fixed", "broken")
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_CONTROL |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")  # lone surrogates have no UTF-8
# what turns the direction of writing, and would show a text in another order than it has
_CONTROL |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


def plain(text: str) -> str:
    """Make text fit to be shown: one kind of newline, and no character that moves the others.

    Control characters, turns of direction and lone surrogates become U+FFFD.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROL)
