"""Protect whoever opens a report: texts from files become neither markup nor code.

Run: pytest tests/eval/test_hostile_report.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import eval.evaluate
import eval.figures
import eval.report
from tests.helpers.pages import HOSTILE, ParsedPage
from tests.helpers.runs import write_data

CHROMIUM = Path("/usr/bin/chromium")
HIT = (
    "<script>window.hit=1</script>",
    '"><img src=x onerror="window.hit=1">',
    "'><svg onload=window.hit=1>",
    "</script><script>window.hit=1</script>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "<a href='javascript:window.hit=1'>x</a><meta http-equiv=refresh content='0;url=//x.y'>",
    "</title></style><style>body{background:url(//x.y/z)}</style>",
    "<base href='//x.y/'><link rel=stylesheet href='//x.y'>",
    "$\\frac{1}{0}$ $\\notacommand{$ ${_^$",
)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Path:
    """Make an evaluation in which every text that a file can set is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [json.loads(line) for line in write_data(folder).read_text().splitlines()]
    texts = [*HIT, *(text for text in HOSTILE if "\ud800" not in text and "\0" not in text)]
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for place, (row, text) in enumerate(zip(rows, texts * 3, strict=False)):
            file.write(
                json.dumps(
                    row
                    | {"id": f"{text} {place}", "patient_id": text, "dataset": text, "view": text}
                    | {"completion": f"<think>{text}</think><solution>{text}, Edema</solution>"}
                    | {"prompt": text, "source_labels": [text], "completion_length": 3}
                    | {"evaluated_labels": None, "sex": "F", "age": 3}
                )
                + "\n"
            )
    out = folder / "evaluation"
    flags = ["--predictions", f"site={folder / 'answers.jsonl'}", "--output_dir", str(out)]
    assert eval.evaluate.main(flags) == 0
    scores = json.loads((out / "scores-site.json").read_text())
    everywhere = " ".join(HIT)
    settings = {
        name: {"value": everywhere, "origin": everywhere}
        for name in ("model_name_or_path", "prompt", "answer_format", "recipe")
    }
    scores |= {"stage": everywhere, "warnings": [everywhere]}
    scores["run"] = scores.get("run", {}) | {"settings": settings, "recipe": everywhere}
    (out / "scores-site.json").write_text(json.dumps(scores))
    return out


@pytest.fixture(scope="module")
def report(evaluation) -> Path:
    out = evaluation.with_name("report")
    named = f"<script>alert(1)</script> <img src>={evaluation}"
    assert eval.report.main([named, "--output_dir", str(out), "--permutations", "20"]) == 0
    return out


def test_the_page_holds_no_element_and_no_attribute_of_a_text(report):
    page = ParsedPage((report / "report.html").read_text(encoding="utf-8"))
    assert not {"iframe", "base", "object", "embed", "svg"} & set(page.tags)
    assert page.tags.count("script") == 1 and page.tags.count("style") == 1
    assert not any("window.hit" in script for script in page.scripts)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    links = [value for _, name, value in page.attributes if name in ("href", "src", "action")]
    assert not [link for link in links if "javascript:" in link or "//x.y" in link]


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium")
def test_a_browser_runs_nothing_of_them_and_asks_nobody(report):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    asked, dialogs = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        page.goto((report / "report.html").as_uri())
        page.wait_for_timeout(500)
        for details in page.query_selector_all("details"):
            details.evaluate("element => { element.open = true }")
        page.wait_for_timeout(200)
        hit = page.evaluate("window.hit")
        shown = page.inner_text("body")
        browser.close()
    assert hit is None and dialogs == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert "<script>window.hit=1</script>" in shown  # as text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"micro": {"f1": "x"}}, "micro, 'f1' is 'x', which no evaluation writes"),
        ({"macro": {"recall": [1]}}, "macro, 'recall' is [1], which no evaluation writes"),
        ({"probabilities": 3}, "probabilities is 3, which no evaluation writes"),
        ({"probabilities": {"reliability": 3}}, "probabilities, reliability is 3, which no"),
        ({"probabilities": {"reliability": ["x"]}}, "reliability 0, confidence is 'x', which no"),
        ({"probabilities": {"a": {"b": 1}}}, None),  # nothing that is shown
    ],
)
def test_a_part_of_the_scores_of_another_type_is_told(change, told, evaluation, tmp_path, capsys):
    folder = shutil.copytree(evaluation, tmp_path / "evaluation")
    scores = json.loads((folder / "scores-site.json").read_text())
    (folder / "scores-site.json").write_text(json.dumps(scores | change))
    code = eval.report.main([str(folder), "--output_dir", str(tmp_path / "report")])
    assert code == (2 if told else 0)
    assert told is None or told in capsys.readouterr().err


def test_legends_of_plots_are_text_and_no_formula(evaluation, tmp_path):
    """A $ in a name would else be mathtext, which fails on what is none."""
    log = [{"step": step, "split": "train", "loss": 1.0 / step} for step in (1, 2, 3)]
    log += [{"step": 3, "split": "eval", "dataset": HIT[-1], "macro_f1": 0.5}]
    (evaluation / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    out = tmp_path / "figures"
    assert eval.figures.main([f"{HIT[-1]}={evaluation}", "--output_dir", str(out)]) == 0
    pictures = list(out.iterdir())
    assert pictures
    for picture in pictures:
        content = picture.read_bytes()
        assert b"<script" not in content and b"window.hit" not in content
