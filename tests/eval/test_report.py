"""Protect the report.

Checked: the paper's figures and their macro means, tables of ours by hand, which model a folder
holds, which cases are shown, the order of the page, and the command's refusals.

Run: pytest tests/eval/test_report.py
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.files import DataError, write_jsonl
from data.labels import LABELS, NIH_NINE, NIH_TEN
from data.predictions import Prediction, write_predictions
from engine.config import UsageError
from eval import published
from eval.cases import case_strip, chosen_ids, outcomes, turns
from eval.contrasts import contrast_models, nih_variants, pairs_of, transfers
from eval.folders import (
    added_votes,
    flag_first,
    load_answers,
    load_entries,
    load_entry,
    named_folders,
    read_log,
    write_results,
)
from eval.page import Case, Cases, ModelAnswer
from eval.page_text import WIDTH
from eval.paper_tables import paper_tables, prompt_key
from eval.report import home_sets, main
from eval.scores import score
from eval.tables import diversity_table, marginals_table, movers_table, scores_table
from eval.transfer_tables import paradox_table, transfer_table
from tests.helpers.pages import HOSTILE, ParsedPage
from tests.helpers.reports import (
    AFTER,
    BEFORE,
    FEW,
    NIH_AFTER,
    NIH_BEFORE,
    answer,
    compared,
    home_rows,
    line_of,
    parsed,
    row,
    save,
    texts,
)


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    for name in ("base", "sft"):
        (tmp_path / name).mkdir()
    return {
        "base": save(tmp_path / "base", home=BEFORE, nih=NIH_BEFORE),
        "sft": save(tmp_path / "sft", home=AFTER, nih=NIH_AFTER),
    }


# ---- the paper's figures -------------------------------------------------------------------------
def test_printed_macro_means_are_plain_means_with_zeros_kept():
    for by_model, printed, labels in (
        (published.TABLE_5, published.MACRO_5, LABELS),
        (published.TABLE_6, published.MACRO_6, NIH_NINE),
    ):
        assert list(by_model) == list(printed) == list(published.MODELS)
        for model, by_label in by_model.items():
            assert tuple(by_label) == labels
            assert np.mean(list(by_label.values())) == pytest.approx(printed[model], abs=0.001)


def test_f1_of_tables_2_to_4_is_near_that_of_their_precision_and_recall():
    """Micro-F1 is 2PR / (P + R), printed with three digits each. A mistyped digit would show."""
    for table in (published.TABLE_2, published.TABLE_3, published.TABLE_4):
        for precision, recall, f1, *_ in table.values():
            assert f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=0.0015)


def test_fail_rates_are_multiples_of_one_in_500():
    rates = [
        row[-1]
        for table in (published.TABLE_1, published.TABLE_2, published.TABLE_3, published.TABLE_4)
        for row in table.values()
    ]
    assert (
        all(rate * 500 == pytest.approx(round(rate * 500), abs=1e-9) for rate in rates)
        and len(rates) == 21
    )


def test_the_papers_tables_without_any_run_of_ours():
    tables = paper_tables([], [], [], {})
    assert [table.caption.split(".")[0] for table in tables] == [f"Table {n}" for n in range(1, 7)]
    # labels, and two lines of macro-F1
    assert [len(table.rows) for table in tables] == [9, 4, 4, 4, 16, 11]
    assert line_of(tables[0], "Reasoning C") == [
        "Reasoning C",
        "paper, MedGemma-4B",
        "0.260",
        "0.132",
        "0.482",
    ]
    assert line_of(tables[3], "hard", "last step")[3:] == [
        "0.340",
        "0.418",
        "0.375",
        "0.243",
        "0.279",
        "0.242",
        "0.018",
    ]
    assert line_of(tables[4], "Fracture") == [
        "Fracture",
        "5",
        "0.750",
        "0.143",
        "0.009",
        "0.150",
        "0.200",
    ]
    assert line_of(tables[4], "Macro F1, mean of the rows above")[2:] == [
        "0.755",
        "0.362",
        "0.228",
        "0.282",
        "0.346",
    ]
    assert line_of(tables[5], "Macro F1, as printed")[1:] == [
        "0.297",
        "0.243",
        "0.062",
        "0.299",
        "0.243",
    ]
    [bold] = [
        [cell.text for cell in line[2:] if cell.tone == "best"]
        for line in tables[4].rows
        if texts(line)[0] == "Pleural Effusion"
    ]
    assert bold == ["0.822"]
    assert any("macro-F1 0.291 and micro-F1 0.332" in note for note in tables[4].notes)
    # why it cannot compare
    assert all(
        any("published" in note or "licence" in note for note in table.notes) for table in tables
    )
    for table in tables:
        assert {len(line) for line in table.rows} == {len(table.header)}


# ---- ours ----------------------------------------------------------------------------------------
def test_scores_and_policies_by_hand(tmp_path):
    table = scores_table(compared(tmp_path, BEFORE, AFTER))
    # base: TP Edema, Fracture; FP Pneumonia, No Finding; FN Edema, Fracture, No Finding (failed). P
    # 2/4, R 2/5, F1 4/9. By label: Edema 2/3, Fracture 2/3, No Finding 0, Pneumonia 0: macro 4/3/14
    # = 0.095. Fail 1/4. Left out: No Finding has FP 1 and no positive: the same 0.095. All wrong:
    # h2 says all but No Finding: Edema 1 TP 1 FP 1 FN, 2/4; Fracture 2/4; macro 1/14 = 0.071.
    # Jaccard: 1, 0, 0, 1/2.
    assert texts(table.rows[0]) == [
        "base",
        "0.500",
        "0.400",
        "0.444",
        *texts(table.rows[0])[4:6],
        "0.095",
        "0.375",
        "0.250",
        "0.095",
        "0.071",
    ]
    # sft: right, right, right, and Edema for Fracture: TP 4, FP 1, FN 1; Edema 4/5, Fracture 2/3,
    # No Finding 1: macro 0.176.
    assert texts(table.rows[1])[3] == "0.800" and texts(table.rows[1])[6:9] == [
        "0.176",
        "0.750",
        "0.000",
    ]
    # All 14 labels: 2 x 5 / (4 x 14 + 5) = 10/61.
    assert line_of(table, "baseline: all labels")[3] == "0.164"
    assert "4 images of 3 patients; 14 labels" in table.notes[0]
    assert (
        "Without any positive here: Enlarged Cardiomediastinum" in table.notes[1]
        and "base 0.444, sft 0.822" in table.notes[1]
    )


def test_movers_show_labels_without_positives_as_such(tmp_path):
    table = movers_table(compared(tmp_path, BEFORE, AFTER), "base", "sft")
    # No Finding 0 -> 1; Edema 2/3 -> 4/5; Fracture stays at 2/3; Pneumonia has no positive, so its
    # 0 says nothing.
    assert texts(table.rows[0])[:5] == ["No Finding", "1", "0.000", "1.000", "+1.000"]
    assert texts(table.rows[1])[:5] == ["Edema", "2", "0.667", "0.800", "+0.133"]
    assert line_of(table, "Fracture")[:5] == ["Fracture", "2", "0.667", "0.667", "+0.000"]
    assert line_of(table, "Pneumonia") == ["Pneumonia", "no positives", "-", "-", "-", "-"]


def test_what_is_said_against_what_is_true(tmp_path):
    table = marginals_table(compared(tmp_path, BEFORE, AFTER))
    assert line_of(table, "Edema") == ["Edema", "2", "50.0 %", "25.0 %", "75.0 %"]
    assert [
        cell.detail for line in table.rows if texts(line)[0] == "Edema" for cell in line[3:]
    ] == ["0.50 x", "1.50 x"]
    # sft: Edema 1/4 too often, Fracture 1/4 too rarely, of 14 labels: 0.5 / 14 = 3.6 points. base:
    # Edema, Fracture -1/4 each, Pneumonia +1/4, No Finding as often as it is true: 0.75 / 14 = 5.4.
    assert line_of(table, "mean distance from true")[3:] == ["5.4 points", "3.6 points"]


def test_length_and_variety(tmp_path):
    table = diversity_table([compared(tmp_path, BEFORE, AFTER)])
    base = texts(table.rows[0])
    # No Finding and Fracture: 1 of 4
    assert base[2:5] == ["25.0", "100.0 %", "4"] and base[8:11] == ["25.0 %", "0.0 %", "0.0 %"]
    # "no idea" has no answer block, so it has no entries either
    assert base[11:] == ["0.0 %", "answer_missing 1"]
    # four sets of equal shares: 2 bits; 1 + 1 + 0 + 2 labels
    assert base[5:8] == ["2.00", "1.00", "25.0 %"]
    # (10 + 20 + 30 + 1000) / 4 tokens, and half of them below 25
    long = [*BEFORE[:3], replace(BEFORE[3], completion_length=1000)]
    length = diversity_table([compared(tmp_path, long, AFTER)]).rows[0][2]
    assert (length.text, length.detail) == ("265.0", "median 25, at most 1,000")


def test_unknown_entries_are_counted_by_answers_and_by_what_they_say(tmp_path):
    said = home_rows(
        answer("Edema", "left Fracture"), answer("no Edema", "Nodule"), answer("nodule"), answer()
    )
    contrast = compared(tmp_path, said, AFTER)
    table = diversity_table([contrast])
    # 3 of 4 answers have an unknown entry, 2 of 4 nothing else; the fourth is an empty answer
    assert table.header[10:12] == ["With an unknown entry", "With no label at all"]
    assert texts(table.rows[0])[10:] == ["75.0 %", "50.0 %", "no_label 2, empty 1"]
    assert table.rows[0][10].detail == "1 negated, 1 qualified, 2 other"
    assert (table.rows[1][10].text, table.rows[1][10].detail) == ("0.0 %", "")
    # both are failures in the table of scores
    assert line_of(scores_table(contrast), "base")[8] == "0.500"


def test_transfer_and_paradox(tmp_path):
    found = [
        compared(tmp_path, BEFORE, AFTER, "home"),
        compared(tmp_path, NIH_BEFORE, NIH_AFTER, "nih"),
    ]
    # nih, nine labels: before Edema and Lung Lesion right, 2/9; after Edema 2/3 (FP n1), Lung
    # Lesion missed: 2/27.
    table = transfer_table(found, ["home"], [("base", "sft")])
    assert line_of(table, "base \u2192 sft", "home")[2:7] == [
        "in distribution",
        "0.095",
        "0.176",
        "+0.081",
        "+85.0 %",
    ]
    assert line_of(table, "base \u2192 sft", "nih")[2:7] == [
        "across schemes",
        "0.222",
        "0.074",
        "-0.148",
        "-66.7 %",
    ]
    [transfer] = transfers(found, ["home"], [("base", "sft")])
    # 2/3 + 4/5 + 1 = 37/15
    assert transfer.gap[0] == pytest.approx((37 / 15 - 4 / 3) / 14 + 4 / 27)
    paradox = paradox_table([transfer])
    assert texts(paradox.rows[0])[:4] == ["base \u2192 sft", "+0.081", "-0.148", "+0.229"]
    # The paper's: 0.362 to 0.282 and 0.243 to 0.299; then +23 % at CheXpert and -19 % at NIH.
    assert texts(paradox.rows[1])[1:4] == ["-0.080", "+0.056", "-0.136"]
    assert [cell.detail.rpartition(", ")[2] for cell in paradox.rows[2][1:3]] == ["+23 %", "-19 %"]


def test_a_reading_needs_an_interval_without_zero(tmp_path):
    """Forty patients whose answers turn from wrong to right at home, and stay as they are
    elsewhere.
    """

    def rows(said: str, prefix: str, evaluated) -> list[Prediction]:
        return parsed(
            [
                row(
                    answer(said),
                    ("Edema",),
                    id=f"{prefix}{n}",
                    patient=f"p{n}",
                    evaluated=evaluated,
                )
                for n in range(40)
            ]
        )

    home = compared(tmp_path, rows("Fracture", "h", LABELS), rows("Edema", "h", LABELS), "home")
    away = compared(
        tmp_path, rows("Edema", "a", ("Edema",)), rows("Edema", "a", ("Edema",)), "away"
    )
    lost = compared(
        tmp_path, rows("Edema", "a", ("Edema",)), rows("Fracture", "a", ("Edema",)), "away"
    )
    [transfer] = transfers([home, away], ["home"], [("base", "sft")])
    assert (
        texts(paradox_table([transfer]).rows[0])[4]
        == "at home: gains; elsewhere: no clear change; the gap moved towards home"
    )
    [transfer] = transfers([home, lost], ["home"], [("base", "sft")])
    assert "the paper's trade-off" in texts(paradox_table([transfer]).rows[0])[4]
    [transfer] = transfers([lost, home], ["away"], [("base", "sft")])
    assert "the paper's paradox" in texts(paradox_table([transfer]).rows[0])[4]


def test_nih_under_nine_and_ten_categories(tmp_path):
    write_predictions(tmp_path / "nih.jsonl", NIH_BEFORE)
    variants = nih_variants({"base": load_answers(tmp_path / "nih.jsonl")})
    assert {name: labels for name, (_, labels) in variants.items()} == {
        "nine": NIH_NINE,
        "ten": NIH_TEN,
    }
    nine, ten = (
        contrast_models("nih", variants[name][0], [], labels=variants[name][1], resamples=10)
        for name in ("nine", "ten")
    )
    # Edema and Lung Lesion right: 2 of 9. With Pleural Effusion, which the second image shows and
    # the answer names: 3 of 10.
    assert nine.values["base"]["macro_f1"][0] == pytest.approx(2 / 9) and ten.values["base"][
        "macro_f1"
    ][0] == pytest.approx(3 / 10)
    assert (
        ten.support[ten.labels.index("Pleural Effusion")] == 1
        and "Pleural Effusion" not in nine.labels
    )
    write_predictions(tmp_path / "home.jsonl", BEFORE)
    assert nih_variants({"base": load_answers(tmp_path / "home.jsonl")}) == {}
    # another hospital's strings may be NIH's too, but it knows labels that NIH does not have
    other = [replace(one, evaluated_labels=LABELS) for one in NIH_BEFORE]
    write_predictions(tmp_path / "other.jsonl", other)
    assert nih_variants({"base": load_answers(tmp_path / "other.jsonl")}) == {}


def test_models_are_compared_on_the_images_that_all_answered(tmp_path):
    contrast = compared(tmp_path, BEFORE, AFTER[::-1][:3])  # other order, and h0 is missing
    assert contrast.first.ids == ["h1", "h2", "h3"] and contrast.left_out == {
        "base": 1,
        "sft": 0,
    }
    assert contrast.values["sft"]["micro_f1"][0] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert "left out: base 1" in scores_table(contrast).notes[1]
    with pytest.raises(UsageError, match="no image is answered by all"):
        compared(tmp_path, BEFORE[:1], AFTER[1:])
    with pytest.raises(UsageError, match="different targets for the same ids"):
        compared(tmp_path, BEFORE, [replace(AFTER[0], labels=("Fracture",)), *AFTER[1:]])


# ---- which model a folder holds ------------------------------------------------------------------
def settings(**values) -> dict:
    return {name: {"value": value, "origin": "flag"} for name, value in values.items()}


def test_a_folder_says_which_model_it_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "g"
    run.mkdir(parents=True)
    (run / "config.json").write_text(
        json.dumps(
            {
                "script": "grpo",
                "settings": settings(
                    model_name_or_path="org/medgemma", prompt="demo", reward="hard"
                ),
                "data": {"a": {"file": "data/a.jsonl"}},
            }
        )
    )
    (run / "trainer_state.json").write_text(
        json.dumps({"global_step": 8, "best_model_checkpoint": "checkpoint-4"})
    )
    (run / "checkpoint-4").mkdir()
    write_predictions(run / "predictions-a.jsonl", BEFORE)
    write_predictions(run / "predictions-a.partial.jsonl", BEFORE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("")
    own = load_entry("x", run)
    assert (own.stage, own.base, own.prompt, own.reward, own.checkpoint, list(own.sets)) == (
        "grpo",
        "org/medgemma",
        "demo",
        "hard",
        "last step",
        ["a"],
    )
    assert own.data_file("a") == Path("data/a.jsonl")

    for adapter, checkpoint in (
        ("runs/g", "last step"),
        ("runs/g/checkpoint-4", "best F1"),
        (None, ""),
    ):
        folder = tmp_path / f"eval-{checkpoint}"
        folder.mkdir()
        write_results(
            folder,
            "t",
            BEFORE,
            {
                "run": {
                    "settings": settings(
                        adapter_name_or_path=adapter, model_name_or_path="org/medgemma", prompt="b"
                    )
                }
            },
        )
        # the path is found from above the folder, too
        monkeypatch.chdir(tmp_path if adapter else "/")
        entry = load_entry("y", folder)
        assert (entry.stage, entry.checkpoint, entry.prompt) == (
            "grpo" if adapter else "base",
            checkpoint,
            "b",
        )
        assert entry.training is None if adapter is None else entry.training.resolve() == run
    # SFT keeps its best checkpoint as the final adapter, whatever the last one was
    config = json.loads((run / "config.json").read_text()) | {"script": "sft"}
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert load_entry("y", tmp_path / "eval-last step").step == 4
    # scored again, where the prompt stands at its default and nobody asked it
    again = {"predictions": ["t=old.jsonl"], "prompt": "free_reasoning"}
    (tmp_path / "again").mkdir()
    write_results(tmp_path / "again", "t", BEFORE, {"run": {"settings": settings(**again)}})
    assert load_entry("z", tmp_path / "again").prompt == ""
    (tmp_path / "bare").mkdir()
    write_predictions(tmp_path / "bare" / "predictions-t.jsonl", BEFORE)
    assert [load_entry(name, tmp_path / "bare").stage for name in ("sft-1", "NV-Reason")] == [
        "sft",
        "other",
    ]


def test_steps_follow_the_stages(tmp_path):
    def entries(*names: str):
        return [load_entry(name, tmp_path) for name in names]

    assert pairs_of(entries("base", "sft", "grpo")) == [
        ("base", "sft"),
        ("sft", "grpo"),
        ("base", "grpo"),
    ]
    assert pairs_of(entries("base", "sft", "grpo-hard", "grpo-nuanced")) == [
        ("base", "sft"),
        ("sft", "grpo-hard"),
        ("base", "grpo-hard"),
        ("sft", "grpo-nuanced"),
        ("base", "grpo-nuanced"),
    ]
    assert pairs_of(entries("one", "two")) == [("one", "two")] and pairs_of(entries("one")) == []


def test_a_vote_follows_its_model_and_a_higher_stage_is_compared_with_it(tmp_path):
    entries = [load_entry(name, tmp_path) for name in ("base", "sft", "sft-vote", "grpo")]
    entries[2] = replace(entries[2], records={"home": {"samples": {"num_generations": 4}}})
    assert entries[2].votes == 4 and entries[1].votes == 1
    assert pairs_of(entries) == [
        ("base", "sft"),
        ("sft", "sft-vote"),
        ("sft", "grpo"),  # the step of training comes first
        ("base", "grpo"),
        ("sft-vote", "grpo"),
    ]


def run_folder(folder: Path, script: str, **values) -> Path:
    folder.mkdir()
    record = {"script": script, "settings": settings(model_name_or_path="org/x", **values)}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def names_of(*values: str) -> list[str]:
    return [entry.name for entry in load_entries(values, "run")]


def test_models_are_named_by_their_stage(tmp_path):
    sft = run_folder(tmp_path / "20260101-sft", "sft", seed=1)
    hard = run_folder(tmp_path / "20260102-grpo", "grpo", reward="hard", seed=1)
    nuanced = run_folder(tmp_path / "20260103-grpo", "grpo", reward="nuanced", seed=1)
    again = run_folder(tmp_path / "20260104-grpo", "grpo", reward="hard", seed=2)
    assert names_of(str(sft), str(hard)) == ["SFT", "GRPO"]
    assert names_of(str(hard), str(nuanced)) == ["GRPO (hard)", "GRPO (nuanced)"]
    assert names_of(str(hard), str(again)) == ["GRPO (seed 1)", "GRPO (seed 2)"]
    # three, which no single setting tells apart
    assert names_of(str(hard), str(nuanced), str(again)) == [
        "GRPO (20260102-grpo)",
        "GRPO (20260103-grpo)",
        "GRPO (20260104-grpo)",
    ]
    # the user's name wins, also where it is a stage's
    assert names_of(str(sft), f"mine={hard}") == ["SFT", "mine"]
    assert names_of(f"GRPO={sft}", str(hard)) == ["GRPO", "GRPO (20260102-grpo)"]
    # a folder that does not tell its stage keeps its name
    (tmp_path / "NV-Reason").mkdir()
    assert names_of(str(tmp_path / "NV-Reason"), str(sft)) == ["NV-Reason", "SFT"]
    # also where that is the name of another's stage, which then keeps its folder's too
    (tmp_path / "SFT").mkdir()
    assert names_of(str(tmp_path / "SFT"), str(sft)) == ["SFT", "20260101-sft"]


def test_a_vote_is_named_as_one(tmp_path):
    sft = run_folder(tmp_path / "run", "sft")
    (tmp_path / "vote").mkdir()
    run = {"settings": settings(adapter_name_or_path=str(sft), num_generations=4)}
    record = {"run": run, "samples": {"num_generations": 4, "mean": 0.1, "best": 0.2}}
    write_results(tmp_path / "vote", "home", BEFORE, record)
    assert names_of(str(sft), str(tmp_path / "vote")) == ["SFT", "SFT + vote of 4"]


def start_vote(run: Path, adapter: Path, *names: str) -> Path:
    """Make what run_grpo.py --vote_baseline keeps in a run: its start's vote, by data set."""
    folder = run / "start-vote"
    folder.mkdir()
    run_of = {"settings": settings(adapter_name_or_path=str(adapter), num_generations=4)}
    record = {"run": run_of, "samples": {"num_generations": 4}}
    for name in names:
        write_results(folder, name, BEFORE, score(BEFORE) | record)
    return folder


def with_votes(*values: str | Path) -> list[str]:
    return [entry.name for entry in load_entries([*map(str, values)], "run", with_votes=True)]


def test_the_vote_that_a_grpo_run_keeps_stands_before_it(tmp_path):
    sft = run_folder(tmp_path / "20260101-sft", "sft")
    grpo = run_folder(tmp_path / "20260102-grpo", "grpo", seed=1)
    vote = start_vote(grpo, sft, "home", "nih")
    assert with_votes(sft, grpo) == ["SFT", "SFT + vote of 4", "GRPO"]
    assert with_votes(sft, f"mine={grpo}") == ["SFT", "SFT + vote of 4", "mine"]
    assert names_of(str(sft), str(grpo)) == ["SFT", "GRPO"]  # only where it is asked for
    added = load_entries([str(sft), str(grpo)], "run", with_votes=True)
    assert [entry.is_added for entry in added] == [False, True, False]
    assert added_votes(added) == (
        f"added, the vote that GRPO has to beat: SFT + vote of 4 ({vote})"
    )
    # given already, at any place
    assert with_votes(sft, grpo, vote) == ["SFT", "GRPO", "SFT + vote of 4"]
    assert added_votes(load_entries([str(sft), str(vote), str(grpo)], "run", with_votes=True)) == ""
    # a run that keeps none, or whose folder of votes is empty
    empty = run_folder(tmp_path / "20260103-grpo", "grpo")
    assert with_votes(sft, empty) == ["SFT", "GRPO"]
    (empty / "start-vote").mkdir()
    assert with_votes(sft, empty) == ["SFT", "GRPO"]


def test_a_vote_of_the_same_stage_and_sets_takes_the_place_of_a_runs_own(tmp_path):
    sft = run_folder(tmp_path / "20260101-sft", "sft", seed=0)
    grpo = run_folder(tmp_path / "20260102-grpo", "grpo", seed=1)
    start_vote(grpo, sft, "home", "nih")
    mine = start_vote(tmp_path, sft, "home")  # lacks a data set
    assert len(with_votes(sft, f"mine={mine}", grpo)) == 4
    write_results(mine, "nih", BEFORE, {"samples": {"num_generations": 4}})
    assert with_votes(sft, f"mine={mine}", grpo) == ["SFT", "mine", "GRPO"]
    of_grpo = tmp_path / "of-grpo"
    of_grpo.mkdir()
    start_vote(of_grpo, grpo, "home", "nih")  # a vote of GRPO is none over its start
    assert len(with_votes(sft, grpo, f"x={of_grpo / 'start-vote'}")) == 4
    # two runs from one SFT share its vote, a run from another SFT has its own
    again = run_folder(tmp_path / "20260103-grpo", "grpo", seed=2)
    start_vote(again, sft, "home", "nih")
    assert with_votes(grpo, again) == ["SFT + vote of 4", "GRPO (seed 1)", "GRPO (seed 2)"]
    other = run_folder(tmp_path / "20260104-sft", "sft", seed=5)
    third = run_folder(tmp_path / "20260105-grpo", "grpo", seed=3)
    start_vote(third, other, "home", "nih")
    assert with_votes(grpo, third) == [
        "SFT + vote of 4 (seed 0)",
        "GRPO (seed 1)",
        "SFT + vote of 4 (seed 5)",
        "GRPO (seed 3)",
    ]


def test_a_report_says_that_it_added_the_vote(tmp_path, capsys):
    sft, grpo = (run_folder(tmp_path / f"2026-{stage}", stage) for stage in ("sft", "grpo"))
    save(sft, home=BEFORE)
    save(grpo, home=AFTER)
    vote = start_vote(grpo, sft, "home")
    assert main([str(sft), str(grpo), "--output_dir", str(tmp_path / "out"), *FEW]) == 0
    printed = capsys.readouterr().out
    assert f"SFT + vote of 4 ({vote})" in printed.splitlines()[0]
    # the sentence is on the step of training, and the picture has all three
    assert "GRPO against SFT: " in printed
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Macro-F1 with 95 % intervals: SFT on home 0.095" in page
    assert "; SFT + vote of 4 on home 0.095" in page and "; GRPO on home 0.176" in page


def test_answers_that_were_only_scored_again_are_no_base(tmp_path):
    (tmp_path / "gpt").mkdir()
    values = {"predictions": ["home=answers.jsonl"], "model_name_or_path": None}
    write_results(tmp_path / "gpt", "home", BEFORE, {"run": {"settings": settings(**values)}})
    [entry] = load_entries([str(tmp_path / "gpt")], "run")
    assert (entry.name, entry.stage) == ("gpt", "other")


def test_home_sets_are_those_with_all_labels(tmp_path):
    home, away = (
        compared(tmp_path, BEFORE, AFTER, "zhome"),
        compared(tmp_path, NIH_BEFORE, NIH_AFTER, "away"),
    )
    assert home_sets([away, home], ()) == ["zhome"]
    # nothing says that such a set is the training data's
    assert home_sets([away], ()) == home_sets([], ()) == []
    assert home_sets([away, home], ("away",)) == ["away"]
    with pytest.raises(
        UsageError, match="--in_distribution nih: no such data set; there are: away, zhome"
    ):
        home_sets([away, home], ("nih",))


def test_prompts_are_told_by_their_names():
    assert (
        prompt_key("Reasoning Self-Check")
        == prompt_key("reasoning_self_check")
        == prompt_key("self_check")
    )
    assert prompt_key("Only Label") == prompt_key("only_label") and prompt_key(
        "Reasoning A"
    ) == prompt_key("reasoning_a") != prompt_key("reasoning_b")


def test_our_rows_stand_under_the_papers_of_the_same_prompt(folders):
    config = {
        "script": "sft",
        "settings": settings(model_name_or_path="google/medgemma-4b-it", prompt="free_reasoning"),
    }
    (folders["sft"] / "config.json").write_text(json.dumps(config))
    (folders["base"] / "scores-home.json").write_text(
        json.dumps({"run": {"settings": settings(model_name_or_path="demo", prompt="reasoning_c")}})
    )
    entries = [load_entry(name, folder) for name, folder in folders.items()]
    contrast = contrast_models(
        "home",
        {entry.name: load_answers(entry.sets["home"]) for entry in entries},
        [],
        resamples=20,
    )
    first, second, third, *_ = paper_tables(entries, [contrast], ["home"], {})
    names = [texts(line)[:2] for line in first.rows]
    assert names[names.index(["Reasoning C", "paper, MedGemma-4B"]) + 1] == [
        "Reasoning C",
        "base (demo)",
    ]
    names = [texts(line)[:2] for line in second.rows]
    assert names[names.index(["Free Reasoning", "paper, MedGemma-4B"]) + 1] == [
        "Free Reasoning",
        "sft (google/medgemma-4b-it)",
    ]
    assert not any("sft (" in texts(line)[1] for line in third.rows)
    assert {
        len(line) for table in (first, second, third) for line in table.rows if table is first
    } == {5}


def test_folders_are_named(tmp_path):
    assert named_folders([str(tmp_path), f"x={tmp_path}"], "run") == {
        tmp_path.name: tmp_path,
        "x": tmp_path,
    }
    with pytest.raises(UsageError) as caught:
        named_folders([f"x={tmp_path}", f"x={tmp_path}", "gone"], "run")
    assert caught.value.problems == [
        f"--run x={tmp_path}: the name x is given twice; write NAME=FOLDER",
        "--run gone: gone is no folder; give FOLDER or NAME=FOLDER",
    ]
    assert flag_first(["a", "b", "--x", "1"], "run") == ["--run", "a", "b", "--x", "1"]
    assert flag_first(["--x", "1"], "run") == ["--x", "1"] and flag_first([], "run") == []


def test_a_torn_log_is_read_up_to_the_tear(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n\n[1]\n{"step": "x"}\n{"step": 2, "lo'
    )
    assert read_log(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert read_log(tmp_path / "none") == []
    (tmp_path / "metrics.jsonl").write_text("[" * 200_000 + '\n{"step": 1}\n')
    assert read_log(tmp_path / "metrics.jsonl") == [{"step": 1}]


# ---- sample cases --------------------------------------------------------------------------------
def test_cases_cover_outcomes_and_labels(tmp_path):
    said = ["no idea"] * 2 + [answer("Edema")] * 4 + [answer("Fracture")]
    true = [("Edema",)] * 2 + [("Edema",)] * 2 + [("Fracture",)] * 3
    rows = parsed(
        [
            row(text, labels, id=f"c{n}", patient=f"p{n}")
            for n, (text, labels) in enumerate(zip(said, true, strict=True))
        ]
    )
    write_predictions(tmp_path / "rows.jsonl", rows)
    answers = load_answers(tmp_path / "rows.jsonl")
    assert outcomes(answers) == ["failed"] * 2 + ["right"] * 2 + ["wrong"] * 2 + ["right"]
    ids = chosen_ids(answers, 3, seed=0)
    assert [outcomes(answers)[answers.ids.index(id)] for id in ids] == ["failed", "wrong", "right"]
    assert ids[2] == "c6"  # Edema was shown twice by then, Fracture once
    assert sorted(chosen_ids(answers, 100, seed=1)) == answers.ids  # no more than there are
    assert chosen_ids(answers, 5, seed=3) == chosen_ids(answers, 5, seed=3)


def test_cases_turn_where_only_one_of_two_models_is_right(tmp_path):
    """Of the last model against the one before: fixed, broken, and neither."""
    assert turns(
        ["wrong", "failed", "right", "right", "right", "wrong"],
        ["right", "right", "wrong", "failed", "right", "failed"],
    ) == ["fixed", "fixed", "broken", "broken", "", ""]
    for name, rows in (("before", BEFORE), ("after", AFTER)):
        write_predictions(tmp_path / f"{name}.jsonl", rows)
    before, after = (load_answers(tmp_path / f"{name}.jsonl") for name in ("before", "after"))
    # h0 is right in both; h1 and h2 are fixed; h3 is wrong in both
    chosen = chosen_ids(after, 2, 0, before)
    assert chosen[0] in ("h1", "h2") and chosen[1] == "h3"


def test_the_first_cases_are_of_each_kind():
    def case(id: str, turn: str, outcome: str) -> Case:
        given = ModelAnswer("GRPO", outcome, "", [], "", 0.0, [])
        return Case("home", id, [], [], None, [given], turn)

    fixed, broken = case("0", "fixed", "right"), case("1", "broken", "wrong")
    wrong, right = case("2", "", "failed"), case("3", "", "right")
    strip = case_strip(Cases([right, fixed, fixed, wrong, broken], []), ("SFT", "GRPO"))
    assert strip.shown == [
        ("fixed by GRPO", 1),
        ("broken by GRPO", 4),
        ("still wrong", 3),
        ("still right", 0),
    ]
    # kinds that are missing give way to more of the others; without a step nothing is "still"
    assert case_strip(Cases([fixed, fixed, right], []), ("SFT", "GRPO")).shown == [
        ("fixed by GRPO", 0),
        ("still right", 2),
        ("fixed by GRPO", 1),
    ]
    assert case_strip(Cases([wrong, right], []), None).shown == [("wrong", 0), ("right", 1)]
    # one whose labels would fill the card comes after a shorter one of its kind
    long = replace(
        fixed, labels=["Enlarged Cardiomediastinum", "Pleural Effusion"]
    )  # 44 characters
    assert case_strip(Cases([long, fixed], []), ("SFT", "GRPO"), 1).shown == [("fixed by GRPO", 1)]


# ---- command -------------------------------------------------------------------------------------


def test_a_whole_report(folders, tmp_path, capsys):
    """Hostile answers, images, reward parts: what a user would look for is on the page."""
    Image.new("L", (600, 400), 90).save(tmp_path / "h0.png")
    write_jsonl(
        tmp_path / "home.jsonl",
        [
            {
                "id": f"h{n}",
                "patient_id": "p",
                "image": "h0.png",
                "labels": ["Edema"],
                "dataset": "d",
            }
            for n in range(4)
        ],
    )
    rows = home_rows(
        answer("Edema", think=HOSTILE[0]),
        answer("Edema"),
        HOSTILE[1],
        answer("Fracture", think=HOSTILE[2]),
    )
    rows[0] = rows[0].with_extra(rewards={"hard": {"total": 0.9, "jaccard": 1.0, "length": -0.1}})
    rows[1] = rows[1].with_extra(rewards={"hard": "not numbers"})
    for name, of in (("base", BEFORE), ("sft", rows)):
        write_predictions(folders[name] / "predictions-home.jsonl", of)
        run = {
            "run": {
                "settings": settings(model_name_or_path="org/medgemma", prompt="demo"),
                "data": {"home": {"file": str(tmp_path / "home.jsonl")}},
            }
        }
        (folders[name] / "scores-home.json").write_text(json.dumps(run))
    out = tmp_path / "out"
    assert (
        main([f"base={folders['base']}", f"sft={folders['sft']}", "--output_dir", str(out), *FEW])
        == 0
    )
    printed = capsys.readouterr().out
    # three or four patients are too few for a rise or a fall
    assert printed.startswith(
        "sft against base: no clear change of macro-F1 on home at n = 4 or nih"
    )
    assert "home: macro-F1 0.095 -> 0." in printed and str(out / "report.html") in printed
    html_text, markdown_text = (
        (out / "report.html").read_text(encoding="utf-8"),
        (out / "report.md").read_text(encoding="utf-8"),
    )
    page = ParsedPage(html_text)
    for title in (
        "What transferred",
        "Scores",
        "Which label is taken for which",
        "F1 by label before and after each step",
        "The paper's tables",
        "Sample cases",
        "Table 6. F1 by label, NIH, ten",
    ):
        assert any(title in shown for shown in page.texts), title
        assert title in markdown_text
    assert "0.9 = +1 jaccard -0.1 length" in page.texts
    # all images of both sets
    assert page.tags.count("article") == 4 + 3 and page.tags.count("script") == 1
    # four images have pictures. The first screen shows three of them again: h3 is fixed, h1 is
    # still wrong, h0 still right, and the one that is broken is NIH's, without a picture
    assert html_text.count("data:image/jpeg") == 4 + 3
    assert "alert(1)" not in html_text.replace(
        HOSTILE[0].replace("<", "&lt;").replace(">", "&gt;"), ""
    ).replace("onerror=alert(1)&gt;", "")
    assert {path.name for path in (out / "pictures").iterdir()} >= {
        "macro-f1.svg",
        "labels-home.svg",
        "labels-nih.svg",
    }
    assert re.findall(r"\((pictures/[^)]*)\)", markdown_text) and all(
        (out / name).is_file() for name in re.findall(r"\((pictures/[^)]*)\)", markdown_text)
    )
    again = tmp_path / "again"
    assert (
        main([f"base={folders['base']}", f"sft={folders['sft']}", "--output_dir", str(again), *FEW])
        == 0
    )
    assert (again / "report.html").read_bytes() == (
        out / "report.html"
    ).read_bytes()  # nothing of it is by chance or by the clock


def headings(page: str, tag: str = "h2") -> list[str]:
    return [html.unescape(title) for title in re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page)]


def test_the_page_begins_with_what_matters_most(folders, tmp_path):
    assert (
        main(
            [f"{name}={folders[name]}" for name in folders]
            + ["--output_dir", str(tmp_path / "out"), *FEW]
        )
        == 0
    )
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert headings(page) == [
        "In one sentence",
        "Step by step",
        "Which label is taken for which",
        "Label by label",
        "Scores",
        "Sample cases",
        "The paper's tables",
        "Sources",
    ]
    first = page[page.index("<main") : page.index("Step by step</h2>")]
    # the sentence, the picture, the four cases, in this order and nothing folded
    places = [first.index(what) for what in ('class="lead"', "<picture>", 'class="strip"')]
    assert places == sorted(places) and first.count("<li><p>") == 4 and "<details" not in first
    # long tables are folded, and none of their numbers is lost
    folded = headings(page, "summary")
    assert [title for title in folded if title != "reasoning and completion"] == [
        "Every step on every data set, with p-values",
        "On nih",
        "On nih",
        "F1 by label before and after each step",
        "How often each label is said",
        "Length and variety of the answers, entries that are no label",
        "Prompt short",
        "Tables 1 to 6",
        "Files",
    ]
    assert page.index("Tables 1 to 6</summary>") < page.index("Table 1. Prompts on a base model")


@pytest.mark.parametrize(
    "values",
    [
        {"model_name_or_path": "demo"},
        {"model_name_or_path": "demo-gemma"},
        {"model_name_or_path": "org/x", "train_file": "demo:sft-train"},
        {"model_name_or_path": "org/x", "data_file": ["test-a=demo:test-a"]},
    ],
)
def test_the_papers_tables_are_absent_for_the_demo(folders, tmp_path, values):
    record = {"run": {"settings": settings(prompt="demo", **values)}}
    (folders["sft"] / "scores-home.json").write_text(json.dumps(record))
    named = [f"{name}={folders[name]}" for name in folders]
    assert main([*named, "--output_dir", str(tmp_path / "out"), *FEW]) == 0
    for file in ("report.html", "report.md"):
        page = (tmp_path / "out" / file).read_text(encoding="utf-8")
        assert "paper:" not in page and "Table 1" not in page and "NV-Reason" not in page


def test_report_md_has_no_entities_and_is_narrow(folders, tmp_path):
    named = [f"{name}={folders[name]}" for name in folders]
    assert main([*named, "--output_dir", str(tmp_path / "out"), *FEW]) == 0
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"&#?\w+;", page) and "the paper's" in page and "answer_missing" in page
    assert max(len(line) for line in page.splitlines() if line.startswith("|")) <= WIDTH


def test_a_report_of_the_paper_alone(tmp_path):
    assert main(["--output_dir", str(tmp_path / "paper")]) == 0
    page = ParsedPage((tmp_path / "paper" / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("table") == 6 and "0.346" in page.texts


def test_one_model_on_one_set_without_images(folders, tmp_path):
    (folders["sft"] / "predictions-nih.jsonl").unlink()
    assert main([str(folders["sft"]), "--output_dir", str(tmp_path / "one"), *FEW]) == 0
    page = ParsedPage((tmp_path / "one" / "report.html").read_text(encoding="utf-8"))
    assert "The image is not at hand." in page.texts and "What transferred" in page.texts
    # there is no step to speak of
    assert not any("Who gained where" in shown for shown in page.texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "--run gone: gone is no folder"),
        (["{tmp}/empty"], "holds no predictions-<set>.jsonl"),
        (
            ["{tmp}/base", "--in_distribution", "mimic"],
            "--in_distribution mimic: no such data set; there are: home, nih",
        ),
        (["{tmp}/base", "--resamples", "0"], "--resamples: expected an integer from 1 to"),
        (["{tmp}/base", "--cases", "-1"], "--cases: expected an integer from 0 to"),
        (["{tmp}/base", "--output_dir", "{tmp}/sft"], "is not empty"),
        (["{tmp}/broken"], "predictions-a.jsonl, line 1: not valid JSON"),
        (["{tmp}/deep"], "config.json: is not valid JSON (nested too deep)"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    folders, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "predictions-a.jsonl").write_text("{\n")
    (tmp_path / "deep").mkdir()
    for file in (tmp_path / "base").iterdir():
        (tmp_path / "deep" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "deep" / "config.json").write_text("[" * 200_000)
    assert (
        main([argument.format(tmp=tmp_path) for argument in [*arguments, "--permutations", "20"]])
        == 2
    )
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_a_broken_predictions_file_names_its_lines(tmp_path):
    (tmp_path / "predictions.jsonl").write_text(
        json.dumps(BEFORE[0].to_row() | {"source_labels": "Edema"}) + "\n"
    )
    with pytest.raises(
        DataError, match="line 1: field 'source_labels' is \"Edema\"; it must be a list of strings"
    ):
        load_answers(tmp_path / "predictions.jsonl")
