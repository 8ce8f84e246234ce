"""Write a page as one self-contained HTML file.

It loads nothing: its pictures are data URLs, and its Content-Security-Policy lets no script run but
that of `page_style.py`, by its hash. Without the script the page is whole: the cases are then a
plain list. Every text goes through `_h`, so nothing in it can become markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence

from eval.page import (
    OUTCOMES,
    TURNS,
    Block,
    Bullets,
    Case,
    Cases,
    Cell,
    Folded,
    HeatMap,
    Lead,
    ModelAnswer,
    Page,
    Picture,
    Section,
    Strip,
    Table,
    Text,
    cells_of,
    plain,
)
from eval.page_style import SCRIPT, STYLE

_TONES = {
    "gain": '<span class="sign" role="img" aria-label="clear gain">&#9650;</span> ',
    "loss": '<span class="sign" role="img" aria-label="clear loss">&#9660;</span> ',
}


def to_html(page: Page) -> str:
    """Write the page as one HTML file that needs nothing else."""
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src"
        f" 'sha256-{script_hash}'; base-uri 'none'; form-action 'none'"
    )
    numbered = list(enumerate(page.sections, start=1))
    contents = "".join(
        f'<li><a href="#s{number}">{_h(section.title)}</a></li>' for number, section in numbered
    )
    body = "".join(_html_section(section, number) for number, section in numbered)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_h(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the report</a>\n'
        f"<header><h1>{_h(page.title)}</h1><p>{_h(page.subtitle)}</p></header>\n"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n'
        f'<main id="main" tabindex="-1">\n{body}</main>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _html_section(section: Section, number: int) -> str:
    blocks = "".join(
        _html_block(block, f"s{number}-{place}") for place, block in enumerate(section.blocks)
    )
    heading = f'<h2 id="s{number}">{_h(section.title)}</h2>'
    return f'<section aria-labelledby="s{number}">{heading}{blocks}</section>\n'


def _h(text: str) -> str:
    return html.escape(plain(text), quote=True)


def _html_block(block: Block, id: str) -> str:
    if isinstance(block, Table):
        return _html_table(block, id)
    if isinstance(block, HeatMap):
        return _html_heat_map(block, id)
    if isinstance(block, Text):
        return f"<p>{_h(block.text)}</p>\n"
    if isinstance(block, Lead):
        details = "".join(f"<li>{_h(item)}</li>" for item in block.details)
        return f'<p class="lead">{_h(block.text)}</p>\n<ul class="evidence">{details}</ul>\n'
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_h(item)}</li>" for item in block.items) + "</ul>\n"
    if isinstance(block, Picture):
        caption = f"<figcaption>{_h(block.caption)}</figcaption>" if block.caption else ""
        return f"<figure>{_html_image(block)}{caption}</figure>\n"
    if isinstance(block, Strip):
        return _html_strip(block)
    if isinstance(block, Folded):
        inside = "".join(
            _html_block(part, f"{id}-{place}") for place, part in enumerate(block.blocks)
        )
        return f"<details><summary>{_h(block.title)}</summary>{inside}</details>\n"
    return _html_cases(block, id)


def _html_image(picture: Picture) -> str:
    def url(data: bytes) -> str:
        return f"data:{picture.media_type};base64,{base64.b64encode(data).decode()}"

    image = f'<img alt="{_h(picture.alt)}" src="{url(picture.data)}">'
    if not picture.narrow:
        return image
    narrow = f'<source media="(max-width:40rem)" srcset="{url(picture.narrow)}">'
    return f"<picture>{narrow}{image}</picture>"


# ---- tables --------------------------------------------------------------------------------------
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
            for column, content in enumerate(cells_of(row))
        )
        + "</tr>"
        for row in table.rows
    )
    return _scrolled(id, table.caption, head, rows, table.notes)


def _scrolled(
    id: str, caption: str, head: str, rows: str, notes: Sequence[str], kind: str = ""
) -> str:
    """Set a table in a region that scrolls by itself, so that the page never does."""
    shown = "".join(f'<p class="note">{_h(note)}</p>' for note in notes)
    return (
        f'<div class="scroll{kind}" role="region" aria-labelledby="{id}" tabindex="0">'
        f'<table><caption id="{id}">{_h(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{shown}\n"
    )


def _html_heat_map(block: HeatMap, id: str) -> str:
    head = '<th scope="col">true</th><th scope="col" class="number">n</th>' + "".join(
        f'<th scope="col"><span>{_h(column)}</span></th>' for column in block.columns
    )
    rows = ""
    for heading, support, shares in block.rows:
        cells = "".join(
            _html_share(share, own=column == heading)
            for column, share in zip(block.columns, shares, strict=True)
        )
        rows += (
            f'<tr><th scope="row">{_h(heading)}</th><td class="number">{support:,}</td>{cells}</tr>'
        )
    return _scrolled(id, block.caption, head, rows, block.notes, kind=" heat")


def _html_share(share: float | None, *, own: bool) -> str:
    """Shade a share: those of a label's own column in tens of percent, the others in fives."""
    if share is None:
        return '<td class="none"></td>'
    shade = min(10, int(share * (10 if own else 20) + 0.5))
    text = f"{100 * share:.0f}" if share or own else ""
    return f'<td class="{"own" if own else "other"} shade{shade}">{text}</td>'


# ---- cases ---------------------------------------------------------------------------------------
def _html_strip(block: Strip) -> str:
    items = []
    for title, place in block.shown:
        case = block.cases[place]
        said = "".join(
            f'<span class="{answer.outcome}"><b>{_h(answer.model)}</b>'
            f' <span class="tag">{answer.outcome}</span>'
            f" {_html_labels(answer.predicted, case.evaluated)}</span>"
            for answer in block.answers(case)
        )
        items.append(
            f'<li><p><a href="#case-{place}">{_h(title)}</a>'
            f' <span class="detail">{_h(case.data_set)}</span></p>'
            f'<div class="picture">{_case_picture(case)}</div>'
            f'<p class="said"><span><b>True</b> {_html_labels(case.labels, case.evaluated)}</span>'
            f"{said}</p></li>"
        )
    return f'<ul class="strip" aria-label="Sample cases in short">{"".join(items)}</ul>\n'


def _case_picture(case: Case) -> str:
    if case.picture is None:
        return '<p class="note">The image is not at hand.</p>'
    return _html_image(case.picture)


def _html_cases(block: Cases, id: str) -> str:
    models = list(dict.fromkeys(answer.model for case in block.cases for answer in case.answers))
    prompts = "".join(
        f"<details><summary>Prompt {_h(name)}</summary><pre>{_h(text)}</pre></details>"
        for name, text in block.prompts
    )
    cards = "".join(_html_case(case, models, place) for place, case in enumerate(block.cases))
    return (
        f'{prompts}<form class="filter" hidden data-cases="{id}">{_filters(block, models, id)}'
        '<output aria-live="polite"></output></form>'
        f'<div class="cases" id="{id}">{cards}</div>\n'
    )


def _filters(block: Cases, models: Sequence[str], id: str) -> str:
    """Make the fields by which a reader picks and orders cases."""
    labels = list(dict.fromkeys(label for case in block.cases for label in case.evaluated))
    last = models[-1] if models else ""

    def choice(name: str, title: str, options: Sequence[tuple[str, str]], chosen: str = "") -> str:
        shown = "".join(
            f'<option value="{_h(value)}"{" selected" if value == chosen else ""}>'
            f"{_h(text)}</option>"
            for value, text in options
        )
        return (
            f'<span><label for="{id}-{name}">{title}</label>'
            f'<select id="{id}-{name}" data-filter="{name}">{shown}</select></span>'
        )

    parts = [
        choice(
            "model",
            "Answers of",
            [(str(n), model) for n, model in enumerate(models)],
            str(len(models) - 1) if models else "",
        ),
        choice("outcome", "that are", [("", "any"), *((name, name) for name in OUTCOMES)]),
        choice("label", "label", [("", "any"), *((label, label) for label in labels)]),
    ]
    if len(models) > 1:
        turns = [(turn, f"{turn} by {last}") for turn in TURNS]
        parts.append(choice("turn", "change", [("", "any"), *turns]))
    orders = [("", "as chosen"), ("up", "lowest Jaccard first"), ("down", "highest Jaccard first")]
    parts += [
        choice("order", "order", orders),
        f'<span><label for="{id}-id">id</label>'
        f'<input id="{id}-id" type="search" data-filter="id" size="12"></span>',
    ]
    return "".join(parts)


def _html_case(case: Case, models: Sequence[str], place: int) -> str:
    answers = "".join(
        _html_answer(answer, models.index(answer.model), case.evaluated) for answer in case.answers
    )
    turn = (
        f' <span class="tag">{case.turn} by {_h(case.answers[-1].model)}</span>'
        if case.turn
        else ""
    )
    return (
        f'<article class="case" id="case-{place}" data-true="{_h("|".join(case.labels))}"'
        f' data-turn="{case.turn}" data-id="{_h(f"{case.data_set}: {case.id}".lower())}">'
        f"<h3>{_h(f'{case.data_set}: {case.id}')}{turn}</h3>"
        f'<div class="picture">{_case_picture(case)}</div>'
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
        f' data-outcome="{answer.outcome}" data-jaccard="{answer.jaccard:.4f}"'
        f' data-predicted="{_h("|".join(answer.predicted))}">'
        f'<p><b>{_h(answer.model)}</b> <span class="tag">{answer.outcome}</span>'
        f" {_html_labels(answer.predicted, evaluated)}"
        f' <span class="detail">Jaccard {answer.jaccard:.2f}</span></p>'
        f"<details><summary>reasoning and completion</summary>{reasoning}<dl>{facts}</dl>"
        f"<pre>{_h(answer.completion)}</pre></details></div>"
    )
