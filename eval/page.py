"""Describe a page as plain data, and write it as one self-contained HTML file and as Markdown.

Whatever stands in the data is text: names of files, of data sets and above all what a model wrote.
Both renderers escape all of it here, in one place each, so nothing in it can become markup. The
HTML loads nothing: its pictures are data URLs, and its Content-Security-Policy lets no script run
but the one below, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from engine.markdown import escape_markdown

Tone = Literal["", "best", "gain", "loss", "muted"]
Outcome = Literal["right", "wrong", "failed"]


# ---- the data ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cell:
    """Hold one cell of a table.

    detail: a smaller second line, such as an interval. tone: how it is set off, never by colour
    alone.
    """

    text: str
    detail: str = ""
    tone: Tone = ""


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
class Text:
    """Hold a paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """Hold a list of short statements."""

    items: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """Hold a picture: SVG text or the bytes of a PNG or JPEG.

    name: becomes its file's name. alt: says what it shows.
    """

    name: str
    data: bytes
    media_type: Literal["image/svg+xml", "image/png", "image/jpeg"]
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class ModelAnswer:
    """Hold one model's answer to the image of a case.

    facts: (name, value) of the Jaccard index, tokens, reward parts, what is wrong with the answer.
    """

    model: str
    outcome: Outcome
    reasoning: str
    predicted: Sequence[str]
    completion: str
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """Hold one image with what is true of it and what each model says."""

    title: str
    labels: Sequence[str]
    evaluated: Sequence[str]
    picture: Picture | None
    answers: Sequence[ModelAnswer]


@dataclass(frozen=True)
class Cases:
    """Hold sample cases, which the page filters by outcome and label.

    prompts: (name, text) of the instructions that were used.
    """

    cases: Sequence[Case]
    prompts: Sequence[tuple[str, str]]


Block = Table | Text | Bullets | Picture | Cases


@dataclass(frozen=True)
class Section:
    """Hold a heading with what belongs under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """Hold a whole page."""

    title: str
    subtitle: str
    sections: Sequence[Section] = field(default_factory=list)


OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_CONTROL |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")  # lone surrogates have no UTF-8


def plain(text: str) -> str:
    """Make text fit to be shown: no control characters or lone surrogates, one kind of newline."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROL)


def _cells(row: Sequence[Cell | str]) -> list[Cell]:
    return [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]


# ---- Markdown ------------------------------------------------------------------------------------
_MARKS = {"best": "**{}**", "gain": "{} (+)", "loss": "{} (-)"}


def to_markdown(page: Page, pictures: str | None = None) -> str:
    """Write the page as Markdown.

    pictures: the folder, relative to the file, that holds each `Picture`. None leaves them out.
    """
    lines = [f"# {_md(page.title)}", "", _md(page.subtitle), ""]
    for section in page.sections:
        lines += [f"## {_md(section.title)}", ""]
        for block in section.blocks:
            lines += [*_markdown_block(block, pictures), ""]
    return "\n".join(lines).rstrip() + "\n"


def _md(text: str) -> str:
    """Escape text for a line or a table's cell, and addresses, which GitHub would make links."""
    escaped = re.sub("(?i):(?=//)|(?<=mailto):|(?<=xmpp):", "&#58;", escape_markdown(plain(text)))
    return re.sub("(?i)www(?=[.])", "ww&#119;", escaped).replace("@", "&#64;")


def _markdown_block(block: Block, pictures: str | None) -> list[str]:
    if isinstance(block, Table):
        return _markdown_table(block)
    if isinstance(block, Text):
        return [_md(block.text)]
    if isinstance(block, Bullets):
        return [f"* {_md(item)}" for item in block.items]
    if isinstance(block, Picture):
        return (
            []
            if pictures is None
            else [f"![{_md(block.alt)}]({pictures}/{picture_file(block)})", "", _md(block.caption)]
        )
    return _markdown_cases(block)


def _markdown_table(table: Table) -> list[str]:
    aligned = ["---:" if table.is_number(column) else "---" for column in range(len(table.header))]
    lines = [
        f"**{_md(table.caption)}**",
        "",
        "| " + " | ".join(map(_md, table.header)) + " |",
        "| " + " | ".join(aligned) + " |",
    ]
    for row in table.rows:
        texts = []
        for cell in _cells(row):
            shown = _md(cell.text) + (f" ({_md(cell.detail)})" if cell.detail else "")
            texts.append(_MARKS.get(cell.tone, "{}").format(shown) if shown else "")
        lines.append("| " + " | ".join(texts) + " |")
    return lines + [line for note in table.notes for line in ("", f"_{_md(note)}_")]


def _markdown_cases(block: Cases) -> list[str]:
    lines = []
    for case in block.cases:
        lines += [
            f"### {_md(case.title)}",
            "",
            f"True: {_md(', '.join(case.labels) or '(none)')}",
            "",
            "| model | outcome | predicted | completion | facts |",
            "| --- | --- | --- | --- | --- |",
        ]
        for answer in case.answers:
            facts = ", ".join(f"{name} {value}" for name, value in answer.facts)
            cells = (
                answer.model,
                answer.outcome,
                ", ".join(answer.predicted) or "(none)",
                answer.completion,
                facts,
            )
            lines.append("| " + " | ".join(map(_md, cells)) + " |")
        lines.append("")
    for name, text in block.prompts:
        lines += [f"Prompt {_md(name)}: {_md(text)}", ""]
    return lines


def picture_file(picture: Picture) -> str:
    """Return the file name of a picture beside report.md."""
    suffix = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}[picture.media_type]
    return f"{re.sub('[^A-Za-z0-9-]+', '-', picture.name)}.{suffix}"


def write_page(page: Page, folder: Path) -> None:
    """Write report.html, report.md and the pictures that the latter names."""
    (folder / "report.html").write_text(to_html(page), encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(page, "pictures"), encoding="utf-8")
    pictures = [
        block for section in page.sections for block in section.blocks if isinstance(block, Picture)
    ]
    for picture in pictures:
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / picture_file(picture)).write_bytes(picture.data)


# ---- console -------------------------------------------------------------------------------------
def to_text(page: Page) -> str:
    """Write titles, texts and tables for a console, control characters replaced."""
    lines = [plain(page.title), plain(page.subtitle)]
    for section in page.sections:
        for block in section.blocks:
            if isinstance(block, Text):
                lines += ["", plain(block.text)]
            elif isinstance(block, Table):
                rows = [
                    [
                        f"{cell.text}{f' ({cell.detail})' if cell.detail else ''}"
                        for cell in _cells(row)
                    ]
                    for row in [block.header, *block.rows]
                ]
                rows = [[plain(text).replace("\n", " ") for text in row] for row in rows]
                widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
                lines += [
                    "",
                    plain(block.caption),
                    *(
                        "  ".join(
                            text.rjust(width) if block.is_number(column) else text.ljust(width)
                            for column, (text, width) in enumerate(zip(row, widths, strict=True))
                        ).rstrip()
                        for row in rows
                    ),
                    *map(plain, block.notes),
                ]
    return "\n".join(lines)


# ---- HTML ----------------------------------------------------------------------------------------
def to_html(page: Page) -> str:
    """Write the page as one HTML file that needs nothing else."""
    script_hash = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src"
        f" 'sha256-{script_hash}'; base-uri 'none'; form-action 'none'"
    )
    numbered = list(enumerate(page.sections, start=1))
    contents = "".join(
        f'<li><a href="#s{number}">{_h(section.title)}</a></li>' for number, section in numbered
    )
    body = "".join(
        f'<section aria-labelledby="s{number}"><h2 id="s{number}">{_h(section.title)}</h2>'
        + "".join(
            _html_block(block, f"s{number}-{place}") for place, block in enumerate(section.blocks)
        )
        + "</section>\n"
        for number, section in numbered
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_h(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the report</a>\n'
        f"<header><h1>{_h(page.title)}</h1><p>{_h(page.subtitle)}</p></header>\n"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n'
        f'<main id="main" tabindex="-1">\n{body}</main>\n'
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _h(text: str) -> str:
    return html.escape(plain(text), quote=True)


def _html_block(block: Block, id: str) -> str:
    if isinstance(block, Table):
        return _html_table(block, id)
    if isinstance(block, Text):
        return f"<p>{_h(block.text)}</p>\n"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_h(item)}</li>" for item in block.items) + "</ul>\n"
    if isinstance(block, Picture):
        caption = f"<figcaption>{_h(block.caption)}</figcaption>" if block.caption else ""
        return f"<figure>{_html_image(block)}{caption}</figure>\n"
    return _html_cases(block, id)


def _html_image(picture: Picture) -> str:
    data = base64.b64encode(picture.data).decode()
    return f'<img alt="{_h(picture.alt)}" src="data:{picture.media_type};base64,{data}">'


_TONES = {
    "gain": '<span class="sign" aria-label="clear gain">&#9650;</span> ',
    "loss": '<span class="sign" aria-label="clear loss">&#9660;</span> ',
}


def _html_table(table: Table, id: str) -> str:
    def cell(tag: str, content: Cell, column: int, scope: str = "") -> str:
        classes = " ".join(
            filter(None, ["number" if table.is_number(column) else "", content.tone])
        )
        shown = _TONES.get(content.tone, "") + _h(content.text)
        shown = f"<strong>{shown}</strong>" if content.tone == "best" else shown
        detail = f'<span class="detail">{_h(content.detail)}</span>' if content.detail else ""
        styled = f' class="{classes}"' if classes else ""
        return f"<{tag}{scope}{styled}>{shown}{detail}</{tag}>"

    head = "".join(
        cell("th", Cell(text), column, ' scope="col"') for column, text in enumerate(table.header)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            cell("td" if column else "th", content, column, "" if column else ' scope="row"')
            for column, content in enumerate(_cells(row))
        )
        + "</tr>"
        for row in table.rows
    )
    notes = "".join(f'<p class="note">{_h(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll" role="region" aria-labelledby="{id}" tabindex="0">'
        f'<table><caption id="{id}">{_h(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{notes}\n"
    )


def _html_cases(block: Cases, id: str) -> str:
    models = list(dict.fromkeys(answer.model for case in block.cases for answer in case.answers))
    labels = list(dict.fromkeys(label for case in block.cases for label in case.evaluated))

    def choice(name: str, title: str, options: Sequence[tuple[str, str]], chosen: str = "") -> str:
        shown = "".join(
            f'<option value="{_h(value)}"{" selected" if value == chosen else ""}>'
            f"{_h(text)}</option>"
            for value, text in options
        )
        return (
            f'<label for="{id}-{name}">{title}</label>'
            f'<select id="{id}-{name}" data-filter="{name}">{shown}</select>'
        )

    last = models[-1] if models else ""
    filters = "".join(
        f"<span>{part}</span>"
        for part in (
            choice(
                "model",
                "Answers of",
                [(str(n), model) for n, model in enumerate(models)],
                str(models.index(last)) if models else "",
            ),
            choice(
                "outcome", "that are", [("", "any"), *((outcome, outcome) for outcome in OUTCOMES)]
            ),
            choice(
                "label",
                "with the label, true or predicted,",
                [("", "any"), *((label, label) for label in labels)],
            ),
        )
    )
    prompts = "".join(
        f"<details><summary>Prompt {_h(name)}</summary><pre>{_h(text)}</pre></details>"
        for name, text in block.prompts
    )
    cards = "".join(_html_case(case, models) for case in block.cases)
    return (
        f'{prompts}<form class="filter" hidden data-cases="{id}">{filters}'
        '<output aria-live="polite"></output></form>'
        f'<div class="cases" id="{id}">{cards}</div>\n'
    )


def _html_case(case: Case, models: Sequence[str]) -> str:
    picture = (
        _html_image(case.picture)
        if case.picture
        else '<p class="note">The image is not at hand.</p>'
    )
    answers = "".join(
        _html_answer(answer, models.index(answer.model), case.evaluated) for answer in case.answers
    )
    return (
        f'<article class="case" data-true="{_h("|".join(case.labels))}">'
        f'<h3>{_h(case.title)}</h3><div class="picture">{picture}</div>'
        f"<div><p><b>True:</b> {_html_labels(case.labels, case.evaluated)}</p>{answers}</div>"
        "</article>"
    )


def _html_labels(labels: Sequence[str], evaluated: Sequence[str]) -> str:
    """Show labels, with those apart that the data set cannot express and that count for nothing."""
    apart = ", ".join(label for label in labels if label not in evaluated)
    aside = f' <span class="detail">not evaluated here: {_h(apart)}</span>' if apart else ""
    return _h(", ".join(label for label in labels if label in evaluated) or "(no label)") + aside


def _html_answer(answer: ModelAnswer, model: int, evaluated: Sequence[str]) -> str:
    facts = "".join(
        f"<div><dt>{_h(name)}</dt><dd>{_h(value)}</dd></div>" for name, value in answer.facts
    )
    reasoning = (
        f"<blockquote>{_h(answer.reasoning)}</blockquote>"
        if answer.reasoning
        else '<p class="note">No reasoning could be read.</p>'
    )
    return (
        f'<div class="answer {answer.outcome}" data-model="{model}"'
        f' data-outcome="{answer.outcome}" data-predicted="{_h("|".join(answer.predicted))}">'
        f'<p><b>{_h(answer.model)}</b> <span class="tag">{answer.outcome}</span>'
        f" {_html_labels(answer.predicted, evaluated)}</p>{reasoning}<dl>{facts}</dl>"
        "<details><summary>The completion as it came</summary>"
        f"<pre>{_h(answer.completion)}</pre></details></div>"
    )


_STYLE = """
:root{--ink:#1b1f24;--soft:#4f5965;--line:#c9d0d8;--wash:#f3f5f8;--link:#0b4f9e;--good:#0a5f38;
 --bad:#9b1c1c;--doubt:#6b4a00}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;font:1rem/1.5 system-ui,sans-serif;
 color:var(--ink);background:#fff}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.3rem;margin:2.2rem 0 .6rem;border-top:2px solid var(--line);padding-top:.8rem}
h3{font-size:1rem;margin:0 0 .5rem;overflow-wrap:anywhere}p{max-width:70ch;margin:.5rem 0}
a{color:var(--link)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:0;background:#fff;padding:.5rem;
 z-index:1}
nav ol{columns:2 18rem;padding-left:1.5rem;margin:.5rem 0}
.scroll{overflow-x:auto;margin:1rem 0 .3rem}
table{border-collapse:separate;border-spacing:0;font-variant-numeric:tabular-nums;font-size:.92rem}
caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{background:var(--wash);vertical-align:bottom}
tbody th{font-weight:500;background:#fff;position:sticky;left:0;min-width:8rem;max-width:14rem;
 overflow-wrap:break-word}
td:not(.number){min-width:6.5rem}.number{text-align:right;white-space:nowrap}
thead .number{white-space:normal;min-width:4.5rem}.detail{display:block;font-size:.8rem;
 color:var(--soft)}
.gain{color:var(--good)}.loss{color:var(--bad)}.muted{color:var(--soft)}.sign{font-size:.75em}
.note{font-size:.88rem;color:var(--soft);margin:.25rem 0}figure{margin:1rem 0}
img{max-width:100%;height:auto}
figcaption{font-size:.88rem;color:var(--soft);max-width:70ch}
.filter:not([hidden]){display:flex;flex-wrap:wrap;gap:.6rem 1.2rem;align-items:center;
 background:var(--wash);border:1px solid var(--line);padding:.7rem;margin:.8rem 0}
.filter label{margin-right:.4rem}select{font:inherit;padding:.3rem;max-width:100%}
.case{display:grid;grid-template-columns:minmax(8rem,16rem) 1fr;gap:.2rem 1rem;
 border:1px solid var(--line);border-radius:.4rem;padding:.8rem;margin:.8rem 0}
.case[hidden]{display:none}.case h3{grid-column:1/-1}.case>div{min-width:0}
.case>div>p:first-child{margin-top:0}
.picture img{width:100%;background:#000}
.answer{border-left:.3rem solid var(--line);padding:.1rem 0 .1rem .8rem;margin:.7rem 0}
.answer.right{border-color:var(--good)}
.answer.wrong{border-color:var(--bad)}.answer.failed{border-color:var(--doubt);
 border-left-style:dashed}
.tag{border:1px solid currentColor;border-radius:.7rem;padding:0 .5rem;font-size:.82rem}
.right>p .tag{color:var(--good)}
.wrong>p .tag{color:var(--bad)}.failed>p .tag{color:var(--doubt)}
blockquote{margin:.3rem 0;color:var(--ink);white-space:pre-wrap;overflow-wrap:anywhere;
 unicode-bidi:isolate}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--wash);padding:.6rem;
 font-size:.85rem;unicode-bidi:isolate}
dl{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0;font-size:.85rem;color:var(--soft)}
dt,dd{display:inline;margin:0 .35rem 0 0}dd{color:var(--ink);overflow-wrap:anywhere}
@media(max-width:40rem){body{padding:.6rem}.case{grid-template-columns:1fr}.picture{max-width:16rem}
tbody th{min-width:6.5rem;max-width:9rem}th,td{padding:.3rem .4rem}}
@page{size:A4 landscape;margin:12mm}
@media print{body{max-width:none;font-size:10pt}nav,.filter,.skip{display:none!important}
.case[hidden]{display:grid!important}
.case,tr,figure{break-inside:avoid}h2,caption{break-after:avoid}img{max-height:160mm;width:auto}
.picture img{max-height:60mm}
.scroll{overflow:visible}table{font-size:8pt}.detail{font-size:6.5pt}.note{font-size:8pt}
th,td{padding:.1rem .3rem}
tbody th{position:static}details>:not(summary){display:block}}
"""

_SCRIPT = """
for (const form of document.querySelectorAll("form[data-cases]")) {
  const cases = [...document.getElementById(form.dataset.cases).querySelectorAll(".case")];
  const chosen = name => form.querySelector(`[data-filter=${name}]`).value;
  const update = () => {
    let shown = 0;
    for (const item of cases) {
      const answer = item.querySelector(`.answer[data-model="${chosen("model")}"]`);
      const predicted = answer ? answer.dataset.predicted : "";
      const labels = (item.dataset.true + "|" + predicted).split("|");
      const fits = answer && (!chosen("outcome") || answer.dataset.outcome === chosen("outcome"))
        && (!chosen("label") || labels.includes(chosen("label")));
      item.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    form.querySelector("output").textContent = `${shown} of ${cases.length} cases`;
  };
  form.addEventListener("change", update);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
  update();
}
"""
