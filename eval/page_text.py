"""Write a page as Markdown and as text for a console.

The Markdown is read on GitHub, in an editor or on a terminal: it has no HTML and no entities, its
tables are aligned, and at most `WIDTH` characters wide. What could become markup is escaped with a
backslash. Text in which something looks like HTML, an entity or an address stands in a code span,
and the texts that models wrote stand in indented blocks, where nothing has a meaning.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from eval.page import (
    ARROW,
    Block,
    Bullets,
    Case,
    Cases,
    Folded,
    HeatMap,
    Lead,
    Page,
    Picture,
    Strip,
    Table,
    Text,
    cells_of,
    picture_file,
    plain,
)

WIDTH = 100  # characters of a table's line
_WRAP = 48  # characters of a line in a console's cell
_MARKS = {"best": "**{}**", "gain": "{} (+)", "loss": "{} (-)"}
# HTML, entities, and what GitHub would make into a link
_MEANS_MORE = re.compile(r"(?i)<[a-z/!?]|&#?\w|:(?=//)|www\.|mailto:|xmpp:|\w@\w")


# ---- Markdown ------------------------------------------------------------------------------------
def to_markdown(page: Page, pictures: str | None = None) -> str:
    """Write the page as Markdown.

    pictures: the folder, relative to the file, that holds each `Picture`. None leaves them out.
    """
    lines = [f"# {_md(page.title)}", "", _md(page.subtitle), ""]
    for section in page.sections:
        lines += [f"## {_md(section.title)}", ""]
        for block in section.blocks:
            lines += [*_markdown_block(block, pictures), ""]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _md(text: str, *, in_table: bool = False) -> str:
    """Escape a text for one line, or for a cell of a table, in which nothing begins a line."""
    line = re.sub(r"\s+", " ", plain(text)).strip()
    if _MEANS_MORE.search(line):
        return _code_span(line, in_table=in_table)
    line = re.sub(r"[\\`*\[\]|~]", r"\\\g<0>", line)
    # between two letters or digits an underscore means nothing
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)
    # a heading, quote, rule or list
    return line if in_table else re.sub(r"^([#>=]|[-+](?=[\s-]|$)|\d+(?=[.)]))", _escaped, line)


def _escaped(match: re.Match[str]) -> str:
    start = match.group()
    return start + "\\" if start.isdigit() else "\\" + start


def _code_span(line: str, *, in_table: bool) -> str:
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    if in_table:
        line = line.replace("|", "\u2502")  # no escape of a bar is read alike by all renderers
    return f"{ticks} {line} {ticks}" if "`" in line else f"{ticks}{line}{ticks}"


def _as_it_came(text: str) -> list[str]:
    """Set a text apart as an indented block, where nothing has a meaning."""
    lines = plain(text).expandtabs(4).strip("\n").split("\n") if text.strip() else ["(empty)"]
    return ["", *(f"    {line}" if line.strip() else "" for line in lines), ""]


def _markdown_block(block: Block, pictures: str | None) -> list[str]:
    if isinstance(block, Table):
        return _markdown_table(block)
    if isinstance(block, HeatMap):
        return _markdown_table(_brief(block))
    if isinstance(block, Text):
        return [_md(block.text)]
    if isinstance(block, Lead):
        return [f"**{_md(block.text)}**", "", *(f"* {_md(item)}" for item in block.details)]
    if isinstance(block, Bullets):
        return [f"* {_md(item)}" for item in block.items]
    if isinstance(block, Picture):
        named = f"![{_md(block.alt)}]({pictures}/{picture_file(block)})"
        return [] if pictures is None else [named, "", _md(block.caption)]
    if isinstance(block, Strip):
        return [
            f"* {_md(f'{title}: {_in_short(block, block.cases[place])}')}"
            for title, place in block.shown
        ]
    if isinstance(block, Folded):
        inside = [line for part in block.blocks for line in (*_markdown_block(part, pictures), "")]
        return [f"### {_md(block.title)}", "", *inside]
    return _markdown_cases(block)


def _brief(block: HeatMap) -> Table:
    header, rows = block.briefly
    return Table(block.caption, header, rows, block.notes, numbers_to=3)


def _in_short(block: Strip, case: Case) -> str:
    said = "; ".join(
        f"{answer.model}, {answer.outcome}: {', '.join(answer.predicted) or '(no label)'}"
        for answer in block.answers(case)
    )
    return f"{case.data_set} {case.id}, true: {', '.join(case.labels) or '(no label)'}; {said}"


def _markdown_table(table: Table) -> list[str]:
    rows = _markdown_rows(table, in_table=True)
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"**{_md(table.caption)}**", ""]
    if sizes[0] + max(sizes[1:], default=0) + 7 > WIDTH:  # "| " + heading + " | " + cell + " |"
        header, *rows = _markdown_rows(table, in_table=False)
        for row in rows:
            told = [f"{name} {text}" for name, text in zip(header, row, strict=True) if text]
            lines.append(f"* {row[0]}: {', '.join(told[1:] if row[0] else told)}")
    else:
        for columns in _parts(table, rows, WIDTH - 1, 3):
            lines += [*_aligned_table(table, rows, columns), ""]
    return lines + [line for note in table.notes for line in ("", _md(note))]


def _markdown_rows(table: Table, *, in_table: bool) -> list[list[str]]:
    rows = [[_md(text, in_table=in_table) for text in table.header]]
    for row in table.rows:
        texts = []
        for cell in cells_of(row):
            shown = _md(cell.text, in_table=in_table)
            shown += f" ({_md(cell.detail, in_table=in_table)})" if cell.detail else ""
            texts.append(_MARKS.get(cell.tone, "{}").format(shown) if shown else "")
        rows.append(texts)
    return rows


def _parts(
    table: Table, rows: Sequence[Sequence[str]], width: int, between: int
) -> list[list[int]]:
    """Choose the columns of each part, so that no part's lines are wider than `width`.

    The columns that say whose row it is begin every part, as many as leave room for any other.
    between: characters between two columns.
    """
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    leading = [0]
    while leading[-1] + 1 < min(table.numbers_from, len(sizes) - 1):
        chosen = [*leading, leading[-1] + 1]
        widest = max(sizes[len(chosen) :]) + between
        if sum(sizes[k] + between for k in chosen) + widest > width:
            break
        leading = chosen
    parts = [list(leading)]
    for column in range(len(leading), len(sizes)):
        chosen = [*parts[-1], column]
        too_wide = sum(sizes[k] + between for k in chosen) > width
        if too_wide and len(parts[-1]) > len(leading):
            parts.append([*leading, column])
        else:
            parts[-1] = chosen
    return parts


def _aligned_table(
    table: Table, rows: Sequence[Sequence[str]], columns: Sequence[int]
) -> list[str]:
    sizes = {k: max(4, *(len(row[k]) for row in rows)) for k in columns}
    rule = [
        "-" * (sizes[k] - 1) + (":" if table.is_number(k) else "-") for k in columns
    ]  # at least "---:"
    lines = [_padded(table, row, sizes) for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:])]


def _padded(table: Table, row: Sequence[str], sizes: dict[int, int]) -> list[str]:
    return [
        row[k].rjust(size) if table.is_number(k) else row[k].ljust(size)
        for k, size in sizes.items()
    ]


def _markdown_cases(block: Cases) -> list[str]:
    lines = []
    for case in block.cases:
        lines += [
            f"### {_md(f'{case.data_set}: {case.id}')}",
            "",
            f"True: {_md(', '.join(case.labels) or '(no label)')}",
            "",
        ]
        for answer in case.answers:
            facts = [("Jaccard", f"{answer.jaccard:.2f}"), *answer.facts]
            told = "; ".join(f"{name} {value}" for name, value in facts)
            said = f"{answer.outcome}: {', '.join(answer.predicted) or '(no label)'}"
            lines += [
                f"**{_md(answer.model)}**, {_md(said)}. {_md(told)}",
                *_as_it_came(answer.completion),
            ]
    for name, text in block.prompts:
        lines += [f"Prompt {_md(name)}:", *_as_it_came(text)]
    return lines


# ---- console -------------------------------------------------------------------------------------
def to_text(page: Page) -> str:
    """Write sentences and tables for a console, control characters replaced.

    Pictures and cases are left out, and of what is folded only the title is shown.
    """
    lines = [plain(page.title), plain(page.subtitle)]
    for section in page.sections:
        for block in section.blocks:
            lines += console_lines(block)
    return "\n".join(lines).replace(ARROW, "->")


def console_lines(block: Block) -> list[str]:
    """Write one block for a console -> its lines, after an empty one."""
    if isinstance(block, HeatMap):
        block = _brief(block)
    if isinstance(block, Table):
        notes = [line for note in block.notes for line in textwrap.wrap(plain(note), WIDTH + 20)]
        return ["", plain(block.caption), *_console_table(block), *notes]
    if isinstance(block, Text):
        return ["", plain(block.text)]
    if isinstance(block, Lead):
        return ["", plain(block.text), *(f"  {plain(item)}" for item in block.details)]
    if isinstance(block, Bullets):
        return ["", *(f"  {plain(item)}" for item in block.items)]
    if isinstance(block, Folded):
        return ["", plain(block.title)]
    return []


def _console_table(table: Table) -> list[str]:
    rows = [
        [
            plain(f"{cell.text}{f' ({cell.detail})' if cell.detail else ''}").replace("\n", " ")
            for cell in cells_of(row)
        ]
        for row in [table.header, *table.rows]
    ]
    wrapped = [[textwrap.wrap(text, _WRAP) or [""] for text in row] for row in rows]
    # one line of the console for each line of the highest cell
    lines = [
        [cell[n] if n < len(cell) else "" for cell in row]
        for row in wrapped
        for n in range(max(map(len, row)))
    ]
    shown: list[str] = []
    for columns in _parts(table, lines, WIDTH + 20, 2):
        sizes = {k: max(len(line[k]) for line in lines) for k in columns}
        shown += [""] if shown else []
        shown += ["  ".join(_padded(table, line, sizes)).rstrip() for line in lines]
    return shown
