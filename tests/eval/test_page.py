"""Protect the writers of a page.

Checked: that nothing a model writes becomes markup in HTML or in Markdown, that the page needs
nothing else, can be used by keyboard and screen reader, and folds what is folded.

Run: pytest tests/eval/test_page.py
"""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
from markdown import markdown  # TensorBoard's own: what it makes of a text
from markdown_it import MarkdownIt  # CommonMark, which GitHub and editors read

from data.labels import LABELS
from eval.page import (
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
    plain,
)
from eval.page_html import to_html
from eval.page_style import SCRIPT, STYLE
from eval.page_text import WIDTH, to_markdown, to_text
from tests.helpers.pages import HOSTILE, ParsedPage

COMMONMARK = MarkdownIt("commonmark").enable(["table", "strikethrough"])
RENDERERS = {
    "commonmark": COMMONMARK.render,
    "python-markdown": lambda text: markdown(text, extensions=["tables"]),
}


def page_of(*blocks: Block) -> Page:
    return Page("", "", [Section("", blocks)])


def hostile_page(text: str) -> Page:
    """Make a report in which `text` stands wherever text can stand."""
    picture = Picture(text, b"<svg onload='alert(1)'/>", "image/svg+xml", text, text, b"<svg/>")
    given = ModelAnswer(text, "wrong", text, [text], text, 0.5, [(text, text)])
    case = Case(text, text, [text], [text], picture, [given], "broken")
    table = Table(text, [text, text], [[text, Cell(text, text, "gain")]], [text])
    heat = HeatMap(text, [text], [(text, 1, [0.5])], ([text, text], [[text, text]]), [text])
    blocks = [
        Lead(text, [text]),
        Text(text),
        Bullets([text]),
        picture,
        table,
        heat,
        Folded(text, [Text(text), table]),
        Strip([case], [(text, 0)]),
        Cases([case], [(text, text)]),
    ]
    return Page(text, text, [Section(text, blocks)])


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup_in_html(text):
    page, harmless = (
        ParsedPage(to_html(hostile_page(text))),
        ParsedPage(to_html(hostile_page("harmless"))),
    )
    assert page.tags == harmless.tags and page.open == []
    assert [name for _, name, _ in page.attributes] == [name for _, name, _ in harmless.attributes]
    # the style and the script of the page itself
    assert page.scripts == harmless.scripts and len(page.scripts) == 2
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert all(
        value.startswith(("#", "data:image/"))
        for _, name, value in page.attributes
        if name in ("href", "src", "srcset")
    )
    # and it is shown as it is
    assert sum(shown.strip() == plain(text).strip() for shown in page.texts) >= 25


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("render", RENDERERS.values(), ids=RENDERERS)
def test_no_text_becomes_markup_in_markdown(text, render):
    """Rendered, the page has the same elements as one with a harmless text as long.

    Code spans apart, in which a text stands that looks like HTML, an entity or an address.
    """

    def elements(written: str) -> list[str]:
        page = ParsedPage(render(to_markdown(hostile_page(written), None)))
        return [tag for tag in page.tags if tag != "code"]

    assert elements(text) == elements("h" * len(text))


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_has_neither_entities_nor_links_of_a_text(text):
    source = to_markdown(hostile_page(text), "pictures")
    outside_code = re.sub("<code>.*?</code>", "", COMMONMARK.render(source), flags=re.DOTALL)
    page = ParsedPage(outside_code)
    # what GitHub would make into a link by itself, but for code
    assert not re.search(r"(?i)https?:|www\.|\w@\w", "\n".join(page.texts)) and "a" not in page.tags
    if "&" not in text:  # an entity that a model wrote is its text
        assert not re.search(r"&#?\w+;", source)


def test_markdown_is_read_on_a_terminal():
    """Wide tables come in parts of at most WIDTH characters, each with its rows' headings."""
    header = ["Model", *(f"column {n}" for n in range(12))]
    rows = [["SFT", *(Cell("0.123", "0.100 to 0.200") for _ in range(12))]]
    source = to_markdown(page_of(Table("a caption", header, rows)))
    lines = [line for line in source.splitlines() if line.startswith("|")]
    # "0.123 (0.100 to 0.200)" has 22 characters: "| " and "SFT  " and three columns are 2 + 5 + 75
    # and " |"; a fourth would make 109
    assert max(map(len, lines)) <= WIDTH and len(lines) == 4 * 3
    assert [line.split("|")[1].strip() for line in lines] == ["Model", "-----", "SFT"] * 4
    shown = ParsedPage(COMMONMARK.render(source))
    assert shown.tags.count("table") == 4 and shown.tags.count("td") == 12 + 4
    told = to_markdown(page_of(Table("", ["Setting", "SFT"], [["warn_when", "x" * 600]])))
    assert told.splitlines()[-1] == "* warn_when: SFT " + "x" * 600  # a list, not a table


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ('the paper\'s "scores" & more', 'the paper\'s "scores" & more'),
        ("answer_unopened", "answer_unopened"),
        ("_x_ __y__", r"\_x\_ \_\_y\_\_"),
        ("p < 0.001", "p < 0.001"),
        ("a <b> c", "`a <b> c`"),
        ("`<b>`", "`` `<b>` ``"),
        ("&lt;", "`&lt;`"),
        ("https://x.y", "`https://x.y`"),
        ("1. one", r"1\. one"),
        ("-0.015 and - 1", "-0.015 and - 1"),
        ("- one", r"\- one"),
        ("# one\n# two", r"\# one # two"),
        ("a|b*c[d]", r"a\|b\*c\[d\]"),
    ],
)
def test_a_line_of_markdown_by_hand(text, written):
    source = to_markdown(page_of(Text(text)))
    assert source.splitlines()[-1] == written
    shown = "".join(ParsedPage(COMMONMARK.render(source)).texts).strip()
    assert shown == re.sub(r"\s+", " ", text)  # rendered, it is what it was


def test_completions_stand_in_markdown_as_they_came():
    text = "<think>\n# a\n\n* b\n</think><solution>Edema</solution>"
    given = ModelAnswer("SFT", "right", "a", ["Edema"], text, 1.0, [("tokens", "9")])
    case = Case("home", "h1", ["Edema"], ["Edema"], None, [given])
    source = to_markdown(page_of(Cases([case], [])))
    assert "**SFT**, right: Edema. Jaccard 1.00; tokens 9" in source
    [shown] = re.findall("<pre><code>(.*?)</code></pre>", COMMONMARK.render(source), re.DOTALL)
    assert ParsedPage(f"<p>{shown}</p>").texts == [text + "\n"]


def test_the_page_allows_only_its_own_script():
    page = to_html(hostile_page("x"))
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert f"script-src 'sha256-{allowed}'" in policy and policy.startswith("default-src 'none'")
    assert not re.search(r"https?://", page)  # nothing is loaded


def test_a_page_can_be_used_by_keyboard_and_screen_reader():
    page = ParsedPage(to_html(hostile_page("x")))
    of = {}
    for tag, name, value in page.attributes:
        of.setdefault((tag, name), []).append(value)
    assert of["html", "lang"] == ["en"] and ("a", "href") in of
    assert len(of["img", "alt"]) == page.tags.count("img") and all(of["img", "alt"])
    # model, outcome, label, order and id; one model has no turns
    fields = of["select", "id"] + of["input", "id"]
    assert sorted(of["label", "for"]) == sorted(fields) and len(fields) == 5
    ids = [value for (_, name), values in of.items() if name == "id" for value in values]
    assert len(ids) == len(set(ids)) and set(of["div", "aria-labelledby"]) | set(
        of["section", "aria-labelledby"]
    ) <= set(ids)
    # wide tables can be scrolled by keyboard
    assert (
        of["div", "tabindex"] == ["0"] * page.tags.count("table") and page.tags.count("table") == 3
    )
    assert set(of["th", "scope"]) == {"col", "row"}


def test_cases_can_be_filtered_sorted_and_searched():
    """What the script reads is on each case and each answer; without it all cases are shown."""
    sft = ModelAnswer("SFT", "wrong", "", ["Edema"], "", 0.25, [])
    grpo = ModelAnswer("GRPO", "right", "", ["Edema", "Fracture"], "", 1.0, [])
    case = Case("Home", "H1", ["Edema", "Fracture"], LABELS, None, [sft, grpo], "fixed")
    source = to_html(page_of(Cases([case], [])))
    page = ParsedPage(source)
    shown = {name: value for tag, name, value in page.attributes if tag == "article"}
    assert shown["data-turn"] == "fixed" and shown["data-id"] == "home: h1"
    assert shown["data-true"] == "Edema|Fracture" and "hidden" not in shown
    answers = [value for tag, name, value in page.attributes if name == "data-jaccard"]
    assert answers == ["0.2500", "1.0000"]
    fields = [value for _, name, value in page.attributes if name == "data-filter"]
    assert fields == ["model", "outcome", "label", "turn", "order", "id"]
    for option in ("fixed by GRPO", "broken by GRPO", "lowest Jaccard first"):
        assert f">{option}</option>" in source
    assert '<option value="1" selected>GRPO</option>' in source  # the last model's answers
    assert all(f'"{field}"' in SCRIPT for field in fields)  # each field has its use
    assert re.search(r"<form[^>]* hidden", source)  # shown by the script alone


def test_what_is_folded_is_still_there():
    table = Table("inner", ["a"], [["x"]])
    page = page_of(Folded("a title", [table]))
    assert "<details><summary>a title</summary><div" in to_html(page)
    assert "### a title\n\n**inner**" in to_markdown(page)
    assert to_text(page).splitlines() == ["", "", "", "a title"]  # on the console the title alone


def test_a_heat_map_shades_by_value_and_frames_its_diagonal():
    heat = HeatMap(
        "m", ["A", "B"], [("A", 9, [0.55, 0.26]), ("B", 1, [0.0, 0.0])], (["T"], [["A"]])
    )
    source = to_html(page_of(heat))
    # blue by tens of percent: 5.5 is rounded to 6; orange by fives: 5.2 to 5
    assert '<td class="own shade6">55</td><td class="other shade5">26</td>' in source
    # nothing said in its place is an empty cell, a recall of 0 is told
    assert '<td class="other shade0"></td><td class="own shade0">0</td>' in source


def test_text_stands_out_from_every_shade():
    """Contrast of 4.5 or more, by WCAG 2.2."""

    def luminance(colour: str) -> float:
        colour = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
        parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [
            part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    shades = re.findall(r"shade\d+\{background:#(\w+);color:#(\w+)\}", STYLE)
    assert len(shades) == 2 * 11
    for pair in shades:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair


def test_headings_descend_in_order():
    levels = [
        int(tag[1])
        for tag in ParsedPage(to_html(hostile_page("x"))).tags
        if re.match("h[1-6]", tag)
    ]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_labels_that_are_not_evaluated_are_set_apart():
    given = ModelAnswer("m", "right", "", ["Edema", "Fracture"], "", 1.0, [])
    case = Case("c", "1", ["Edema", "Pneumonia"], ["Edema"], None, [given])
    shown = ParsedPage(to_html(page_of(Cases([case], [])))).texts
    assert (
        shown.count(" Edema ") == 2
        and "not evaluated here: Pneumonia" in shown
        and "not evaluated here: Fracture" in shown
    )


def test_text_for_the_console_is_aligned():
    table = Table("T", ["a", "b"], [["x", Cell("1.0", "0 to 2")], ["long", "2"]], ["note\x1b"])
    assert to_text(Page("D", "S", [Section("s", [table, Text("t")])])).split("\n") == [
        "D",
        "S",
        "",
        "T",
        "a" + 16 * " " + "b",
        "x     1.0 (0 to 2)",
        "long" + 13 * " " + "2",
        "note\ufffd",
        "",
        "t",
    ]
