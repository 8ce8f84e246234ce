"""Protect what an answer's entries say: which are labels, and what the others are counted as.

Checked: the ways in which models write a list of labels, each with the right reading and the
reason, and all that must never be read as a label: a negation, a side, a degree, a doubt, a
verdict.

A label that is lost, or read where the model denies it, is a wrong score without any error.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.answers import ANSWER_FORMATS, parse_answer
from data.entries import UNKNOWN_KINDS, read_entries, unknown_kind
from data.labels import ALIASES, LABELS, canonical_label

E, C, F, P, X = "Edema", "Cardiomegaly", "Fracture", "Pneumonia", "Pleural Effusion"
FORMS = {
    "think_solution": "<think>a</think><solution>{}</solution>",
    "solution": "<solution>{}</solution>",
    "answer_tag": "<think>a</think><answer>{}</answer>",
    "label_list": "{}",
}

# (entries, labels, unknown entries, why)
READ = [
    ("Edema, Fracture", (E, F), (), "the form that the prompts ask for"),
    ("edema,FRACTURE", (E, F), (), "case and space do not count"),
    ("Edema; Fracture", (E, F), (), "semicolon"),
    ("Edema\nFracture", (E, F), (), "a line each"),
    ("Edema\r\nFracture", (E, F), (), "lines of Windows"),
    ("Edema\rFracture", (E, F), (), "lines of old Macs"),
    ("Edema\u2028Fracture", (E, F), (), "Unicode's line separator"),
    ("Edema,\nFracture,", (E, F), (), "commas at the ends of lines"),
    ("Edema, Fracture.", (E, F), (), "a full stop ends the list"),
    ("Edema. Fracture.", (E, F), (), "a sentence each"),
    ("Edema, Fracture!", (E, F), (), "an exclamation mark says nothing about the patient"),
    ("Edema<br>Fracture", (E, F), (), "HTML's line break"),
    ("Edema<br/>Fracture<BR />", (E, F), (), "HTML's line break, closed and in capitals"),
    ("Edema\\nFracture", (E, F), (), "a line break written out, as in JSON's strings"),
    ("Edema\tFracture", (E, F), (), "tab"),
    ("Edema | Fracture", (E, F), (), "bar"),
    ("| Edema | Fracture |", (E, F), (), "a table's row"),
    ("| Label |\n|---|\n| Edema |\n| Fracture |", (E, F), (), "a table of one column"),
    ("Edema/Fracture", (E, F), (), "slash, where each piece is a label"),
    ("Edema / Fracture / Pneumonia", (E, F, P), (), "slashes between spaces"),
    ("Edema & Fracture", (E, F), (), "ampersand"),
    ("Edema + Fracture", (E, F), (), "plus between labels"),
    ("Edema - Fracture", (E, F), (), "hyphen between labels, with spaces"),
    ("Edema \u2013 Fracture \u2014 Pneumonia", (E, F, P), (), "dashes between labels"),
    ("Edema \u2022 Fracture", (E, F), (), "bullet between labels"),
    ("Edema and Fracture", (E, F), (), "'and' before the last of two"),
    ("Pneumonia, Edema, and Fracture", (P, E, F), (), "'and' after a comma"),
    ("Pneumonia, Edema and Fracture", (P, E, F), (), "'and' without a comma"),
    ("Pneumonia, Edema, & Fracture", (P, E, F), (), "ampersand after a comma"),
    ("Pneumonia\nEdema\nand Fracture", (P, E, F), (), "'and' on the last line"),
    ("Pneumonia, Edema, and\nFracture", (P, E, F), (), "'and' at the end of a line"),
    ("Edema AND Fracture", (E, F), (), "'and' in capitals"),
    ("Edema\uff0cFracture", (E, F), (), "full-width comma"),
    ("Edema\u060c Fracture", (E, F), (), "Arabic comma"),
    ("Edema\u3001Fracture", (E, F), (), "ideographic comma"),
    ("Edema\uff1bFracture\u061b Pneumonia", (E, F, P), (), "full-width and Arabic semicolons"),
    ("\uff25\uff44\uff45\uff4d\uff41\uff0c\uff26racture", (E, F), (), "full-width letters"),
    ("Edema\u3001Fracture\u3002", (E, F), (), "ideographic full stop"),
    ("- Edema\n- Fracture", (E, F), (), "bullets"),
    ("* Edema\n* Fracture", (E, F), (), "stars"),
    ("\u2022 Edema\n\u2022 Fracture", (E, F), (), "round bullets"),
    ("\u2013 Edema\n\u2013 Fracture", (E, F), (), "en dashes as bullets"),
    ("\u2014 Edema\n\u2014 Fracture", (E, F), (), "em dashes as bullets"),
    ("\u25aa Edema\n\u25ba Fracture\n> Pneumonia", (E, F, P), (), "square, arrow, quotation"),
    ("- Edema - Fracture", (E, F), (), "bullets on one line"),
    ("1. Edema\n2. Fracture", (E, F), (), "list numbers"),
    ("1) Edema\n2) Fracture", (E, F), (), "list numbers with a bracket"),
    ("(1) Edema, (2) Fracture", (E, F), (), "list numbers in brackets"),
    ("1: Edema\n2: Fracture", (E, F), (), "list numbers with a colon"),
    ("1. Edema 2. Fracture", (E, F), (), "list numbers on one line"),
    ("10. Edema\n14. Fracture", (E, F), (), "two digits: there are 14 labels"),
    ("a) Edema\nb) Fracture", (E, F), (), "list letters"),
    ("(i) Edema\n(ii) Fracture", (E, F), (), "Roman list numbers"),
    ("\u2460 Edema\n\u2461 Fracture", (E, F), (), "numbers in circles"),
    ("1\ufe0f\u20e3 Edema\n2\ufe0f\u20e3 Fracture", (E, F), (), "key caps"),
    ("**Edema**, **Fracture**", (E, F), (), "bold"),
    ("*Edema*, _Fracture_, __Pneumonia__", (E, F, P), (), "italics, bold by underscores"),
    ("`Edema`, `Fracture`", (E, F), (), "code"),
    ("1. **Edema**\n2. **Fracture**:", (E, F), (), "list number, bold and a colon"),
    ("# Edema\n### Fracture ###", (E, F), (), "headings"),
    ("**Edema, Fracture**", (E, F), (), "bold around the list"),
    ('"Edema", "Fracture"', (E, F), (), "quotes"),
    ('- "Edema"\n- "Fracture"', (E, F), (), "quotes after bullets"),
    ("\u201cEdema\u201d, \u2018Fracture\u2019", (E, F), (), "curly quotes"),
    ("\u00abEdema\u00bb, \u201eFracture\u201c", (E, F), (), "French and German quotes"),
    ('\\"Edema\\", \\"Fracture\\"', (E, F), (), "escaped quotes"),
    ("[Edema, Fracture]", (E, F), (), "square brackets"),
    ("(Edema, Fracture)", (E, F), (), "round brackets"),
    ("{Edema, Fracture}", (E, F), (), "braces"),
    ("[Edema], [Fracture]", (E, F), (), "brackets around each"),
    ("<Edema>, <Fracture>", (E, F), (), "angle brackets, as of a place holder"),
    (
        "\u3010Edema\u3011\u300cFracture\u300d",
        (),
        ("\u3010Edema\u3011\u300cFracture\u300d",),
        "no separator",
    ),
    ("\u3010Edema\u3011, \u300cFracture\u300d", (E, F), (), "brackets of Chinese and Japanese"),
    ("['Edema', 'Fracture']", (E, F), (), "Python's list"),
    ('["Edema", "Fracture"]', (E, F), (), "JSON's list"),
    ('[\n  "Edema",\n  "Fracture"\n]', (E, F), (), "JSON's list over several lines"),
    ('```json\n["Edema", "Fracture"]\n```', (E, F), (), "JSON in a code fence"),
    ('{"labels": ["Edema", "Fracture"]}', (E, F), (), "JSON's object with the list's name"),
    ('[{"label": "Edema"}, {"label": "Fracture"}]', (E, F), (), "JSON's objects"),
    ("\\boxed{Edema, Fracture}", (E, F), (), "LaTeX's box"),
    ("$\\text{Edema}$, $\\textbf{Fracture}$", (E, F), (), "LaTeX's text and bold"),
    ("Labels - Edema, Fracture", (E, F), (), "the list's name before a dash"),
    ('Labels = ["Edema", "Fracture"]', (E, F), (), "the list's name, as a program writes it"),
    ("Final answer -> Edema", (E,), (), "the list's name before an arrow"),
    ("1\nEdema\n2\nFracture", (E, F), ("1", "2"), "numbers on their own lines are no verdicts"),
    ("Labels: Edema, Fracture", (E, F), (), "the list's name says nothing about the patient"),
    ("**Findings:**\n- Edema\n- Fracture", (E, F), (), "the list's name, bold, on its own line"),
    ("## Labels\nEdema\nFracture", (E, F), (), "the list's name as a heading"),
    ("Final answer: Edema", (E,), (), "the list's name in two words"),
    ("Here are the predicted labels: Edema", (E,), (), "the list's name in a sentence"),
    ("Positive findings: Edema", (E,), (), "an answer is the list of positive findings"),
    (
        "pleural_effusion, Lung-Opacity",
        (X, "Lung Opacity"),
        (),
        "underscore and hyphen between the letters",
    ),
    ("NoFinding", ("No Finding",), (), "without a space, as a name in a program"),
    ("pulmonary edema, effusions", (E,), ("effusions",), "an alias; 'effusions' is in no table"),
    ("No Findings", ("No Finding",), (), "an alias, and no negation"),
    ("Ede\u200bma\ufeff, \u200fFracture", (E, F), (), "invisible characters"),
    ("[]", (), (), "an empty list holds no entry"),
    ('{"labels": []}', (), (), "an empty list with its name"),
]
# None of these may give a label that the entry qualifies, denies or doubts.
UNREAD = [
    ("left Pleural Effusion", (), "qualified", "a side"),
    ("Pleural Effusion (left)", (), "qualified", "a side behind"),
    ("Pleural Effusion - left", (), "qualified", "a side after a hyphen"),
    ("(L) Pleural Effusion", (), "qualified", "a side that looks like a list letter"),
    ("R. Pleural Effusion", (), "qualified", "the other side"),
    ("Bilateral Pleural Effusions", (), "qualified", "both sides"),
    ("Pleural Effusion (small)", (), "qualified", "a degree"),
    ("mild Cardiomegaly", (), "qualified", "a degree in front"),
    ("Edema [moderate]", (), "qualified", "a degree in square brackets"),
    ("**Edema** (mild)", (), "qualified", "markup inside does not hide the rest"),
    ("left Edema and Fracture", (), "qualified", "the side may belong to both"),
    ("Edema and mild Fracture", (), "qualified", "a piece is no label"),
    ("Edema | left", (), "qualified", "a table's cell belongs to its row"),
    ("Edema?", (), "qualified", "a doubt"),
    ("possible Edema", (), "qualified", "a doubt in words"),
    ("Edema or Fracture", (), "qualified", "one of the two, nobody knows which"),
    ("Edema and/or Fracture", (), "qualified", "the same"),
    ("Edema vs. Fracture", (), "qualified", "the same"),
    ("Edema: 0.9", (), "qualified", "a probability"),
    ("Edema (90%)", (), "qualified", "a probability in percent"),
    ("Edema Fracture", (), "qualified", "no separator"),
    ("Possible: Edema, Fracture", (), "qualified", "a heading takes its line"),
    ("Likely - Edema, Fracture", (), "qualified", "and so does a doubt before a dash"),
    ("No findings: Edema, Fracture", (), "qualified", "'no findings' before a colon denies them"),
    ("Edema: yes", (), "affirmed", "read in half, a check list would be wrong"),
    ("Edema: present", (), "affirmed", "the same"),
    ("Edema (+)", (), "affirmed", "the same"),
    ("Edema: 1", (), "affirmed", "the same"),
    ("[x] Edema", (), "affirmed", "a ticked box"),
    ("\u2713 Edema", (), "affirmed", "a tick"),
    ("+ Edema", (), "affirmed", "a plus sign is a verdict"),
    ("no Edema", (), "negated", "negation"),
    ("No Edema.", (), "negated", "negation"),
    ("without Edema", (), "negated", "negation"),
    ("Edema: no", (), "negated", "negation behind"),
    ("Edema: absent", (), "negated", "negation behind"),
    ("Edema: negative", (), "negated", "negation behind"),
    ("Edema: 0", (), "negated", "negation as a number"),
    ("**Edema**: No", (), "negated", "negation after bold"),
    ("Edema = False", (), "negated", "negation as a program writes it"),
    ("Edema (not present)", (), "negated", "negation in brackets"),
    ("Edema -", (), "negated", "a minus sign behind"),
    ("Edema (-)", (), "negated", "a minus sign in brackets"),
    ("Edema, no", (), "negated", "a row of a table"),
    ("Edema,0\n", (), "negated", "a row of a CSV file"),
    ("Edema\tabsent", (), "negated", "a row of a table, by tab"),
    ("| Edema | no |", (), "negated", "a row of a table, by bars"),
    ("| Edema | - |", (), "qualified", "a table's cell with a dash may say no"),
    ("Edema - no", (), "negated", "a hyphen between label and verdict"),
    ("Edema/no", (), "negated", "a slash between label and verdict"),
    ("Edema:\nno", (), "negated", "the verdict on the next line"),
    ("[ ] Edema", (), "negated", "a box that is not ticked"),
    ("- [ ] Edema", (), "negated", "a box after a bullet"),
    ("\u2610 Edema", (), "negated", "a box as a character"),
    ("\u274c Edema", (), "negated", "a cross"),
    ("~~Edema~~", (), "negated", "struck out"),
    ("no Edema and Fracture", (), "negated", "the negation may take both"),
    ("Edema and no Fracture", (), "negated", "a piece is no label"),
    ("no Edema, Fracture, or Pneumonia", (), "negated", "a negated series"),
    ("Negative for Edema, Fracture, Pneumonia", (), "negated", "all that follows is denied"),
    ("Absence of Edema, Fracture", (), "negated", "all that follows is denied"),
    ("no evidence of Edema, Fracture", (), "negated", "all that follows is denied"),
    ("no Edema, Fracture and Pneumonia", (), "negated", "a negated series"),
    ("Edema, Fracture, and Pneumonia are absent", (), "negated", "a series negated at its end"),
    ("There is no edema, effusion, or fracture.", (), "negated", "prose"),
    ("Neither Edema, nor Fracture", (), "negated", "the same"),
    ("Absent: Edema, Fracture", (), "negated", "a heading"),
    ("**Ruled out:**\n- Edema\n\n- Fracture", (), "negated", "a heading on its own line"),
    ('"absent": ["Edema", "Fracture"]', (), "negated", "a key of JSON"),
    ("Absent: Edema; Fracture; Pneumonia", (), "negated", "semicolons do not end a heading"),
    ("Absent - Edema, Fracture", (), "negated", "a heading before a dash"),
    ("Absent -> Edema, Fracture", (), "negated", "a heading before an arrow"),
    ("No (Edema, Fracture)", (), "negated", "a negated bracket"),
    ("not [Edema, Fracture, Pneumonia]", (), "negated", "a negated list"),
    ('absent=["Edema", "Fracture"]', (), "negated", "a program's argument"),
    ("<absent>Edema, Fracture, Pneumonia</absent>", (), "negated", "tags that deny"),
    ("<absent>\nEdema\nFracture\n</absent>", (), "negated", "the same, a line each"),
    ('{"labels": {"absent": ["Edema", "Fracture"]}}', (), "negated", "keys in the list's object"),
    ("**Absent**\n- Edema\n- Fracture", (), "negated", "a heading without a colon, bold"),
    ("### Absent\nEdema\n\nFracture", (), "negated", "the same, as Markdown's heading"),
    ("Absent\n------\nEdema\nFracture", (), "negated", "the same, underlined"),
    ("- Absent\n  - Edema\n  - Fracture", (), "negated", "the same, above a nested list"),
    ("The following are not present\nEdema\nFracture", (), "negated", "the same, as a sentence"),
    ("| Present | Absent |\n|---|---|\n| Edema | Fracture |", (), "negated", "a table's columns"),
    ("Edema, not observed", (), "negated", "a verdict after a comma"),
    ("Edema, unlikely", (), "negated", "the same"),
    ("Edema, neg", (), "negated", "the same, cut short"),
    ("Edema, \u2014", (), "qualified", "a dash after a comma"),
    ("Edema,0.03\nFracture,0.9", (), "qualified", "a probability in a CSV file's row"),
    ("Edema, 5%; Fracture, 90 %", (), "qualified", "the same, in percent"),
    ("no acute findings", (), "negated", "no alias: it leaves out what is old"),
    ("None", (), "negated", "no label; No Finding is one"),
    ("Nodule", (), "other", "no label"),
    ("The lungs are clear.", (), "other", "no label"),
    ("...", (), "other", "the place holder of a prompt, and no empty list"),
    ("Labels:", (), "other", "the list's name and no list"),
    ("Labels: [", (), "other", "a list that is cut short"),
    ("1 > (3)Labels: {}", (), "other", "something else before an empty list"),
    ("and", (), "other", "nothing to join"),
    ("<b>Edema</b>", (), "qualified", "a tag is text"),
    ("0. Edema", (), "negated", "a number from 0 is no list number for certain"),
    ("~~Edema, Cardiomegaly, Fracture~~", (), "negated", "a list that is struck out"),
    ('[{"label": "Edema", "score": 0.03}]', (), "qualified", "a probability in the label's object"),
    ('{\n"label": "Edema",\n"p": "3%"\n}', (), "qualified", "the same over several lines"),
]
# (entries, labels, [(unknown entry, its kind)], why)
MIXED = [
    ("mild Edema, Fracture", (F,), [("mild Edema", "qualified")], "comma parts"),
    ("Edema, mild", (E,), [("mild", "other")], "comma parts"),
    (
        "Edema\n**Possible**\n- Fracture",
        (E,),
        [("**Possible**", "other"), ("Possible: - Fracture", "qualified")],
        "a doubt in bold is a heading",
    ),
    (
        "Possible findings\n- Edema",
        (),
        [("Possible findings", "other"), ("Possible findings: - Edema", "qualified")],
        "and one without any markup above all labels",
    ),
    (
        "Edema, ~~Fracture, Pneumonia~~, Cardiomegaly",
        (E, C),
        [("~~Fracture, Pneumonia~~", "negated")],
        "what is struck out, and no more",
    ),
    (
        '{"labels": ["Edema"], "confidence": 0.9}',
        (E,),
        [('"confidence": 0.9}', "other")],
        "of the list, not of its last label",
    ),
    (
        '{"labels": "Edema, Fracture", "confidence": 0.9}',
        (E, F),
        [('"confidence": 0.9}', "other")],
        "the same",
    ),
    ("no Edema, Fracture", (F,), [("no Edema", "negated")], "a list, not a series"),
    (
        "Edema, and no Fracture",
        (E,),
        [("and no Fracture", "negated")],
        "what stands before is said",
    ),
    (
        "Edema, no Fracture, and Pneumonia",
        (E,),
        [("no Fracture, and Pneumonia", "negated")],
        "only what follows",
    ),
    (
        "Edema, mass, Fracture and Pneumonia: absent",
        (E,),
        [("mass", "other"), ("Fracture and Pneumonia: absent", "negated")],
        "a negation goes back to the entry before that is no label",
    ),
    (
        "Pneumonia; no Edema, Fracture, or mass; Cardiomegaly",
        (P, C),
        [("no Edema, Fracture, or mass", "negated")],
        "a semicolon ends a series",
    ),
    (
        "no Edema,\nFracture,\nor mass\nPneumonia",
        (P,),
        [("no Edema, Fracture, or mass", "negated")],
        "a series over lines that end in a comma",
    ),
    ("Edema\nFracture, no\nPneumonia", (E, P), [("Fracture, no", "negated")], "one row's verdict"),
    ("Absent: Edema\nFracture", (F,), [("Absent: Edema", "negated")], "a heading takes its line"),
    (
        "Absent:\nEdema\nLabels:\nFracture",
        (F,),
        [("Absent:", "negated"), ("Absent: Edema", "negated")],
        "up to the next heading",
    ),
    (
        '[{"label": "Edema", "present": false}, {"label": "Fracture"}]',
        (F,),
        [('"Edema", "present": false}', "negated")],
        "a verdict belongs to its object",
    ),
    (
        '{"present": ["Edema"], "absent": ["Fracture", "Pneumonia"]}',
        (),
        [
            ('{"present": ["Edema"]', "affirmed"),
            ('"absent": ["Fracture"', "negated"),
            ('absent: "Pneumonia"]}', "negated"),
        ],
        "keys of JSON",
    ),
    ("+ Edema\n- Fracture", (), [("+ Edema", "affirmed"), ("- Fracture", "qualified")], "signs"),
    (
        "Left lung:\n- Edema\n- Fracture\n",
        (),
        [
            ("Left lung:", "other"),
            ("Left lung: - Edema", "qualified"),
            ("Left lung: - Fracture", "qualified"),
        ],
        "a heading that stands alone takes all that is below",
    ),
    (
        "**Present**\n- Edema\n\n**Absent**\n- Fracture",
        (),
        [
            ("**Present**", "other"),
            ("Present: - Edema", "affirmed"),
            ("**Absent**", "negated"),
            ("Absent: - Fracture", "negated"),
        ],
        "headings without a colon, of which none is the last label's verdict",
    ),
    (
        "## Labels\n- Edema\n\n## Absent\n- Fracture",
        (E,),
        [("## Absent", "negated"), ("Absent: - Fracture", "negated")],
        "the same after the list's name",
    ),
    (
        "Labels:\nEdema\n\nAbsent:\nFracture",
        (E,),
        [("Absent:", "negated"), ("Absent: Fracture", "negated")],
        "a heading takes back nothing above it",
    ),
    (
        "Edema\n<negative>\nFracture\nPneumonia\n</negative>\nCardiomegaly",
        (E, C),
        [
            ("<negative>", "negated"),
            ("negative: Fracture", "negated"),
            ("negative: Pneumonia", "negated"),
            ("</negative>", "negated"),
        ],
        "a tag is a heading up to its end",
    ),
    (
        "**Edema**\n**Absent**\n**Fracture**",
        (F,),
        [("**Edema**, **Absent**", "negated")],
        "a verdict that is written like its label is a row's",
    ),
    (
        "* + Edema\n* - Fracture",
        (),
        [("* + Edema", "affirmed"), ("* - Fracture", "qualified")],
        "signs after bullets",
    ),
    (
        "\uff0bEdema\n\uff0dFracture",
        (),
        [("\uff0bEdema", "qualified"), ("\uff0dFracture", "qualified")],
        "full-width signs",
    ),
    (
        "Findings: Edema. Absent: Fracture, Pneumonia",
        (),
        [
            ("Findings: Edema. Absent: Fracture", "negated"),
            ("Edema. Absent: Pneumonia", "negated"),
        ],
        "a heading within a sentence",
    ),
    ("Image quality: good\nEdema", (E,), [("Image quality: good", "other")], "an ended heading"),
]


def _ids(rows):
    return [f"{row[-1]}: {row[0]!r}" for row in rows]


@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
@pytest.mark.parametrize("row", READ, ids=_ids(READ))
def test_the_ways_to_write_a_list_are_read(row, answer_format):
    body, labels, unknown, _ = row
    answer = parse_answer(FORMS[answer_format].format(body), answer_format)
    assert (answer.labels, answer.unknown, answer.duplicates) == (labels, unknown, ())
    problem = None if labels else "no_label" if unknown else "empty"
    assert answer.problem == problem
    if answer_format == "label_list":
        assert answer.parsed == answer.valid == (problem is None)
    else:
        assert (answer.parsed, answer.valid) == (problem != "no_label", True)


@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
@pytest.mark.parametrize("row", UNREAD, ids=_ids(UNREAD))
def test_what_says_more_than_a_label_is_never_read_as_one(row, answer_format):
    body, labels, kind, _ = row
    answer = parse_answer(FORMS[answer_format].format(body), answer_format)
    assert (answer.labels, answer.parsed, answer.problem) == (labels, False, "no_label")
    assert answer.valid == (answer_format != "label_list")
    assert {unknown_kind(entry) for entry in answer.unknown} == {kind}


@pytest.mark.parametrize("row", MIXED, ids=_ids(MIXED))
def test_labels_beside_entries_that_are_none(row):
    body, labels, unknown, _ = row
    entries = read_entries(body)
    assert entries.labels == labels
    assert [(entry, unknown_kind(entry)) for entry in entries.unknown] == unknown


def test_a_joined_entry_repeats_what_was_said():
    entries = read_entries("Edema, Edema and Fracture, **Fracture**")
    assert (entries.labels, entries.duplicates) == (("Edema", "Fracture"), ("Edema", "Fracture"))
    # written in another way, an unknown entry is the same
    assert read_entries("No  edema\nno Edema").duplicates == ("no Edema",)


def test_every_kind_of_unknown_entry_occurs_above():
    assert {row[2] for row in UNREAD} == set(UNKNOWN_KINDS)
    # only the first 200 characters are looked at
    assert unknown_kind("mass " * 39 + "no Edema") == "negated"
    assert unknown_kind("mass " * 40 + "no Edema") == "other"


@pytest.mark.parametrize(
    "separator",
    [*",;\n\r\v\f", *"\x1c\x1d\x1e\x85\u2028\u2029", "<br>", "<BR/>", "<br />"]
    + [*"\u060c\u3001\uff0c\uff64\ufe50\ufe51\ufe10\ufe11\u055d\u1363"]  # commas
    + [*"\u061b\uff1b\ufe54\ufe14\u037e"],  # semicolons
    ids=ascii,
)
def test_every_separator_cuts(separator):
    entries = read_entries(f"Edema{separator}mass{separator}Fracture")
    assert (entries.labels, entries.unknown) == ((E, F), ("mass",))


@pytest.mark.parametrize(
    "joint",
    [*"|\uff5c\u2502\u00a6/\uff0f&\uff06\u2022\u00b7\u25cf\u25aa\u2023\t", "\\n", ". "]
    + [" and ", " AND ", " - ", " + ", " * ", " \u2013 ", " \u2014 "],
    ids=ascii,
)
def test_every_joint_cuts_where_each_piece_is_a_label(joint):
    entries = read_entries(f"Edema{joint}Fracture")
    assert (entries.labels, entries.unknown) == ((E, F), ())
    for other in (f"Edema{joint}mass", f"mass{joint}Edema", f"Edema{joint}no{joint}Fracture"):
        entries = read_entries(other)
        assert (entries.labels, len(entries.unknown)) == ((), 1), other


WORDS = {
    "negated": "no not nor neither never without absent absence negative none nil null false n 0"
    " 0.0 free lack lacks denies denied excluded ruled resolved cannot unlikely neg isn't aren't"
    " wasn't weren't doesn't don't - \u2212 (-) [] () ~~ \u2610 \u2717 \u2718 \u274c",
    "affirmed": "is are was were be out of present presence seen detected identified visible"
    " observed visualized visualised appreciated demonstrated shown apparent"
    " evident evidence noted found status value yes y positive true x 1 1.0 + \u2611 \u2705 \u2713"
    " \u2714",
    "qualified": "left right both mild severe small possible likely history old t 2 0.5 10 % isnt",
}


@pytest.mark.parametrize("kind", WORDS)
def test_every_word_beside_a_label_has_its_kind(kind):
    for word in WORDS[kind].split():
        for entry in (f"Edema: {word}", f"PLEURAL_EFFUSION {word.upper()}"):
            entries = read_entries(entry)
            assert (entries.labels, entries.unknown) == ((), (entry,))
            assert unknown_kind(entry) == kind, entry
        # alone it speaks of no label, but for a negation
        assert unknown_kind(word) == ("negated" if kind == "negated" else "other"), word
    assert unknown_kind("Edema [ ]") == unknown_kind("Edema ( )") == "negated"
    assert unknown_kind("no Edema, left") == "negated"  # a negation goes before a side
    assert unknown_kind("Edema: yes, left") == "qualified"


def test_every_doubt_above_labels_is_a_heading():
    words = "possible possibly probable probably likely suspected questionable uncertain equivocal"
    for doubt in f"{words} indeterminate borderline maybe differential".split():
        assert read_entries(f"{doubt.title()} findings\n- Edema\n- Fracture").labels == ()
        assert read_entries(f"Edema\n{doubt}\nFracture").labels == (E, F)  # no heading of a row


def test_a_negation_without_a_label_takes_back_the_one_before():
    beside = "is are was were be out of present presence seen detected identified visible evident"
    beside += " observed visualized visualised appreciated demonstrated shown apparent"
    for word in [*beside.split(), "evidence", "noted", "found", "status", "value"]:
        entries = read_entries(f"Fracture, Edema, not {word}")
        assert (entries.labels, entries.unknown) == ((F,), (f"Edema, not {word}",))
    # another word makes it an entry of its own, and so does the lack of a negation
    assert read_entries("Edema, no mass").labels == read_entries("Edema, present").labels == (E,)
    # what is no label cannot be taken back, and it is taken back once
    assert read_entries("mass, no, no").unknown == ("mass", "no")
    assert read_entries("Edema, no, no, Fracture").labels == (F,)
    assert read_entries("no, Edema").labels == (E,)


def test_every_name_of_a_list_is_left_out():
    names = "label labels finding findings answer answers diagnosis diagnoses solution result"
    for name in [
        *names.split(),
        "results",
        "impression",
        "conclusion",
        "prediction",
        "predictions",
    ]:
        for heading in (
            f"{name.upper()}: ",
            f"# {name}\n",
            f"**{name}**\n",
            f"{name}\uff1a",
            f"|{name}|\n",
        ):
            entries = read_entries(f"{heading}Edema, Fracture")
            assert (entries.labels, entries.unknown) == ((E, F), ()), heading
        # alone it is no empty list, and without a colon or markup it is an entry
        assert read_entries(f"{name}:").unknown == (f"{name}:",)
        assert read_entries(f"{name}, Edema").unknown == (name,)
    for name in ("output", "name"):
        assert read_entries(f"{name}: Edema").labels == (E,)
    beside = (
        "the final my predicted chexpert are is here list of following these this image for"
        " chest x ray xray radiograph present positive identified"
    )
    for word in beside.split():
        assert read_entries(f"{word} labels: Edema").labels == (E,)
        assert read_entries(f"{word}: Edema").labels == ()  # names no list
    assert read_entries("detected labels 14: Edema").labels == (E,)
    assert read_entries("other labels: Edema").labels == ()


def test_the_name_of_a_list_ends_another_heading():
    assert read_entries("Absent:\nEdema\n# Labels\nFracture").labels == (F,)
    # a semicolon parts entries, and only the line's end ends what a heading denies
    assert read_entries("Absent: Edema; Fracture").labels == ()
    assert read_entries("Absent: Edema; Fracture\nPneumonia").labels == (P,)
    assert read_entries("Absent: Edema;\nFracture").labels == (F,)
    assert read_entries("Absent: Edema, Labels: Fracture").labels == (F,)
    assert read_entries("Absent:\nEdema\nmass: big\nFracture").labels == (F,)
    assert read_entries("**Absent:**\nEdema").unknown == ("**Absent:**", "Absent: Edema")
    # a verdict is no heading
    assert read_entries("Edema: no, Fracture").labels == (F,)
    assert read_entries("Edema and Fracture: no, Pneumonia").labels == (P,)


@pytest.mark.parametrize(
    "body", ["[]", "{}", "[ ]", "***", "---", "```", "| |\n|:--|", "\u2022", '""']
)
def test_markup_alone_is_no_entry(body):
    assert read_entries(body) == ((), (), (), ())
    assert read_entries(f"Edema\n{body}\nFracture").labels == (E, F)


@pytest.mark.parametrize(
    "body", ["-", "\u2010", "\u2013", "\u2014", "\u2212", "?", "..", "&", "0", "X"]
)
def test_a_sign_alone_may_say_none(body):
    assert read_entries(body).unknown == (body,)


@pytest.mark.parametrize(
    "language",
    ["", "json", "JSON", "text", "txt", "plaintext", "markdown", "md", "python", "yaml", "csv"],
)
def test_a_code_fence_is_no_entry(language):
    for opening in (f"```{language}", f"``` {language}"):
        assert read_entries(f"{opening}\nEdema\n```") == ((E,), (), (), ())
    assert read_entries("```Edema```").labels == read_entries("```Edema\n```").labels == (E,)
    assert read_entries("```mass\nEdema\n```").unknown == ("```mass",)


def test_signs_in_front_are_verdicts_in_a_list_that_has_a_plus():
    assert read_entries("- Edema\n- Fracture").labels == (E, F)
    for minus in ("-", "\u2013"):
        entries = read_entries(f"+ Edema\n{minus} Fracture\nPneumonia")
        assert (entries.labels, entries.unknown) == ((P,), ("+ Edema", f"{minus} Fracture"))


def test_a_negated_series():
    # up to the last conjunction, and no further
    entries = read_entries("Pneumonia, no Edema, Fracture and mass, Cardiomegaly")
    assert (entries.labels, entries.unknown) == ((P, C), ("no Edema, Fracture and mass",))
    # without a conjunction, or with one before it, a comma parts
    assert read_entries("no Edema, Fracture").labels == (F,)
    assert read_entries("Edema and Fracture, no Pneumonia, Cardiomegaly").labels == (E, F, C)
    # a second negation in what is left
    entries = read_entries("Edema and Fracture: absent, no mass, Pneumonia nor Cardiomegaly")
    assert entries == (
        (),
        ("Edema and Fracture: absent", "no mass, Pneumonia nor Cardiomegaly"),
        (),
        (),
    )
    # what an end negates begins after the entry before that is no label
    entries = read_entries("Edema, mass, Fracture, Pneumonia & Cardiomegaly (absent)")
    assert (entries.labels, entries.unknown) == (
        (E,),
        ("mass", "Fracture, Pneumonia & Cardiomegaly (absent)"),
    )
    assert read_entries("NO EDEMA, FRACTURE, OR MASS").labels == ()
    # a word that only begins like a conjunction is none
    assert read_entries("no Edema, Fracture, android").labels == (F,)


def test_what_only_looks_like_a_heading_or_its_end():
    assert read_entries("X labels, Edema").unknown == ("X labels",)
    assert read_entries("Labels: Edema: no").unknown == ("Edema: no",)
    assert read_entries("Absent: mass:\nEdema").labels == (E,)  # does not stand alone
    assert read_entries("Edema, Fracture, &\nPneumonia") == ((E, F, P), (), (), ())
    # found by the fuzz: a bracket that is no empty list
    for body in ("[x](Labels:(", "**[x]\u2013<SOLUTION>", "*  <answer>[x]"):
        assert read_entries(body).unknown == (body,)


def test_no_finding_is_no_negation():
    assert read_entries("No-Finding, Edema and Fracture").labels == ("No Finding", E, F)
    assert read_entries("No Finding, Edema and Fracture").labels == ("No Finding", E, F)
    assert unknown_kind("No Finding (normal)") == unknown_kind("no findings today") == "qualified"


SPELLINGS = [*LABELS, *ALIASES]
WRAPS = [
    "{}", " {} ", "- {}", "* {}", "\u2022 {}", "\u2013 {}", "**{}**", "*{}*", "_{}_", "`{}`",
    '"{}"', "'{}'", "\u201c{}\u201d", "[{}]", "({})", "{{{}}}", "<{}>", "{}.", "{}:", "1. {}",
    "2) {}", "(3) {}", "# {}", "$\\boxed{{{}}}$", "\u3010{}\u3011",
]  # fmt: skip
SEPARATORS = [
    ", ", ",", ";", "; ", "\n", "\r\n", "\t", " | ", "/", " / ", "<br>", "<br/>\n", " and ",
    ", and ", " & ", "\uff0c", "\u060c ", "\u3001", "\uff1b", " \u2022 ", " - ", " \u2013 ",
    " + ", "\u2028", ". ",
]  # fmt: skip
BEYOND = [
    "no {}", "No {}.", "without {}", "not {}", "{}: no", "{}: absent", "{}: negative",
    "{} is absent", "{} (no)", "{} - no", "{}: 0", "{}=false", "{}: yes", "{} (+)", "{} (-)",
    "{} -", "{}-", "[ ] {}", "( ) {}", "~~{}~~", "\u274c {}", "left {}", "{} (left)",
    "right-sided {}", "mild {}", "{} (small)", "{}, no", "{}\tno", "{} | absent", "{}\n- no",
    "{}, 0", "{}: none", "Absent: {}", "possible {}", "{}?", "{} or mass", "old {}",
    "no evidence of {}", "rule out {}", "non-{}", "0 {}", "+ {}",
]  # fmt: skip


def _texts(seed: int, count: int):
    rng = random.Random(seed)
    for _ in range(count):
        yield rng, rng.sample(LABELS, rng.randint(1, 14))


def test_labels_come_back_from_every_separator_and_every_markup():
    for rng, labels in _texts(0, 1_500):
        wrap = rng.choice(WRAPS)
        # a sign between a full stop and a bullet is nobody's separator, and may be a verdict
        plain = wrap[-1] not in ".:" and (wrap[0] in "{[" or wrap[-1] == wrap[0])
        separator = rng.choice(
            [s for s in SEPARATORS if plain or s == ", " or s[-2:-1] not in "-+\u2013."]
        )
        written = rng.choice([str, str.lower, str.upper])
        body = separator.join(wrap.format(written(label)) for label in labels)
        entries = read_entries(body)
        assert (set(entries.labels), entries.unknown) == (set(labels), ()), body


def test_no_negation_and_no_qualifier_ever_gives_the_label():
    for rng, labels in _texts(1, 1_500):
        beyond, wrap = rng.choice(BEYOND), rng.choice(WRAPS[:-3])
        first = wrap.format(beyond.format(labels[0]))
        for body in (first, beyond.format(wrap.format(labels[0]))):
            entries = read_entries(body)
            assert entries.labels == () and entries.unknown, body
        # nor do the labels of other lines change that
        assert labels[0] not in read_entries("\n".join([first, *labels[1:]])).labels, first


def test_folding_a_label_again_changes_nothing():
    rng = random.Random(2)
    for spelling in SPELLINGS:
        label = canonical_label(spelling)
        assert label in LABELS and canonical_label(label) == label
        for wrap in WRAPS:
            inner = rng.choice(WRAPS).format(spelling)
            assert canonical_label(wrap.format(spelling)) == label, wrap
            assert canonical_label(wrap.format(inner)) == label, (wrap, inner)


PIECES = [
    "Edema",
    "no",
    "Fracture",
    "left",
    "and",
    "or",
    ",",
    ";",
    "\n",
    ":",
    "[",
    "]",
    "- ",
    "+",
    "|",
    "1.",
]
PIECES += [
    "<br>",
    "\u0301",
    "\ud800",
    "```",
    "**",
    "absent",
    "Labels:",
    '"',
    "\uff0c",
    "0",
    "\t",
    "\\n",
]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map(" ".join)))
def test_any_text_gives_consistent_entries(body):
    entries = read_entries(body)
    assert set(entries.labels) <= set(LABELS) and len(set(entries.labels)) == len(entries.labels)
    assert len(set(entries.unknown)) == len(entries.unknown)
    assert not set(entries.unknown) & set(LABELS)
    assert all(entry.strip() for entry in entries.unknown)
    assert {unknown_kind(entry) for entry in entries.unknown} <= set(UNKNOWN_KINDS)
    assert set(entries.duplicates) <= {*entries.labels, *entries.unknown} or entries.unknown
    # an entry that is no label states none on its own either, but for a sign that became a bullet
    if "+" not in body and ":" not in body:
        assert not any(read_entries(entry).labels == (entry,) for entry in entries.unknown)
