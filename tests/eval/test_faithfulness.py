"""Protect the check of whether answers depend on the image and agree with their reasoning.

Run: pytest tests/eval/test_faithfulness.py
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.answers import parse_answer
from data.demo.teacher import _WORDINGS
from data.examples import Example
from data.files import DataError
from data.labels import LABELS
from data.predictions import Prediction
from eval.faithfulness import (
    answered_not_mentioned,
    faithfulness_scores,
    format_faithfulness,
    has_reasoning,
    mentioned_labels,
    partners_of,
    same_answer,
    same_reasoning,
    stated_labels,
    stated_not_answered,
    verdict,
)
from tests.helpers.reports import parsed, row


def examples_of(*patients: str) -> list[Example]:
    return [
        Example(f"e{n}", patient, f"{n}.png", (), "site", Path())
        for n, patient in enumerate(patients)
    ]


# ---- another patient's image ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "patients",
    [
        "ab",
        "aabb",  # the largest share there may be
        "abab",
        "aaabcd",
        "abcdefgh",
        "aabbccdde",
        "abbbaacca",
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_each_image_goes_to_another_patient_once(patients, seed):
    examples = examples_of(*patients)
    partners = partners_of(examples, seed)
    for example, partner in zip(examples, partners, strict=True):
        assert example.patient_id != partner.patient_id
    assert Counter(partner.id for partner in partners) == Counter(e.id for e in examples)
    assert partners_of(examples, seed) == partners


def test_partners_come_from_the_seed():
    examples = examples_of(*(f"p{n}" for n in range(20)))
    assert partners_of(examples, 0) != partners_of(examples, 1)


@pytest.mark.parametrize("patients", ["a", "aa", "aab", "aaabc"])
def test_a_patient_with_most_of_the_images_cannot_be_swapped(patients):
    with pytest.raises(DataError, match=f"patient 'a' has {patients.count('a')} of the"):
        partners_of(examples_of(*patients), 0)


# ---- what a reasoning says -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reasoning", "stated"),
    [
        ("There is Cardiomegaly.", {"Cardiomegaly"}),
        (
            "CARDIOMEGALY and a left pleural\n effusion are seen.",
            {"Cardiomegaly", "Pleural Effusion"},
        ),
        ("Pulmonary oedema. Two fractures.", {"Edema", "Fracture"}),
        # negation, before and after, and in another place of the same sentence
        ("No pneumothorax.", set()),
        ("Pneumothorax is absent.", set()),
        ("There isn't any edema.", set()),
        ("Edema without effusion.", set()),
        ("No pneumothorax. Edema is present.", {"Edema"}),
        ("Pneumothorax: none", set()),
        # doubt, choice, search, question
        ("Possible pneumonia.", set()),
        ("Pneumonia or atelectasis.", set()),
        ("Let me look for a fracture.", set()),
        ("Is this edema?", set()),
        ("Findings suggest consolidation.", set()),
        ("The effusion has resolved.", set()),
        # a heading holds for its list
        ("No evidence of:\n- edema\n- pneumothorax\nCardiomegaly", {"Cardiomegaly"}),
        ("Findings:\n1. Edema\n2. Fracture", {"Edema", "Fracture"}),
        ("No fracture\nWell-defined edema", {"Edema"}),  # a hyphen inside is no bullet
        # the same word elsewhere
        ("Pericardial effusion and subcutaneous edema, soft tissue edema.", set()),
        ("Edematous, cardiomegalyx", set()),
        # no fixed words
        ("No finding. No Finding", set()),
        ("", set()),
    ],
)
def test_stated_labels(reasoning, stated):
    assert stated_labels(reasoning) == stated


def test_every_label_but_no_finding_can_be_stated():
    for label in LABELS[1:]:
        assert stated_labels(f"{label} is seen.") == {label}
        assert label in mentioned_labels(f"no {label}")


@pytest.mark.parametrize(
    ("reasoning", "mentioned"),
    [
        ("No pneumothorax.", {"Pneumothorax"}),
        ("The heart is too large.", {"Cardiomegaly"}),
        ("Left pleural fluid", {"Edema", "Pneumothorax", "Pleural Effusion", "Pleural Other"}),
        ("Broken left rib", {"Fracture"}),
        ("Pacemaker in place", {"Support Devices"}),
        ("A portable film of a reporter", set()),
        ("", set()),
    ],
)
def test_mentioned_labels(reasoning, mentioned):
    assert mentioned_labels(reasoning) == mentioned


CUES = (
    "no|not|none|nor|neither|never|nothing|without|absent|absence|negative|free|clear|clearly"
    "|deny|denies|denied|unlikely|excluded|excludes|rule out|ruled out|resolved|resolving"
    "|unremarkable|normal|normally|or|vs|versus|if|whether|may|might|could|can|cannot|would|should"
    "|possible|possibly|probable|probably|perhaps|maybe|likely|question|questionable|suspected"
    "|suspicious|suggests|concern|concerning|consider|considered|differential|uncertain"
    "|uncertainty|unclear|rather|instead|history|previous|previously|prior|former|check|checking"
    "|look|looking|search|assess|assessing|evaluate|evaluating|examine|let|isn't|isn\u2019t"
)


@pytest.mark.parametrize("cue", CUES.split("|"))
def test_each_word_of_doubt_counts(cue):
    assert stated_labels(f"Edema {cue} here.") == set()
    assert stated_labels(f"Edema x{cue}x here.") == {"Edema"} or "'" in cue or "\u2019" in cue


MEANT = {
    "Enlarged Cardiomediastinum": "mediastinum|mediastinal|cardiomediastinal|silhouette|hilum|hilar"
    "|hila",
    "Cardiomegaly": "cardiac|heart|cardiomegaly",
    "Lung Opacity": "opacity|opacified|opacification|hazy|haziness|dense|density|shadow|shadows"
    "|infiltrate|infiltrates|patch|patchy|airspace|consolidation|ground glass|ground-glass|white"
    "|whiteout",
    "Lung Lesion": "lesion|nodule|nodular|mass|masses|tumor|tumour|round|rounded|solitary|outlined"
    "|cavity",
    "Edema": "edema|oedema|congestion|congested|vascular|vessels|perihilar|septal|interstitial"
    "|kerley|wet|fluid",
    "Consolidation": "consolidated|solid|bronchogram|bronchograms|airspace|dense|opacity",
    "Pneumonia": "pneumonia|pneumonic|infection|infectious|infiltrates|patchy|consolidation"
    "|airspace",
    "Atelectasis": "atelectasis|atelectatic|collapse|collapsed|volume|basal|band|bands|linear"
    "|plate",
    "Pneumothorax": "pneumothorax|pneumothoraces|pleural|free air|lung edge|collapse",
    "Pleural Effusion": "effusion|effusions|fluid|blunted|angle|angles|costophrenic|meniscus"
    "|pleural",
    "Pleural Other": "pleura|pleural|thickened|thickening|plaque|lumpy",
    "Fracture": "fracture|fractured|broken|break|rib|ribs|displaced|bone|bones|bony|clavicle"
    "|vertebra|vertebral",
    "Support Devices": "device|devices|tube|tubes|tubing|line|lines|catheter|pacemaker|lead|leads"
    "|wire|wires|clip|clips|port|drain|drains|valve|valves|hardware|sternotomy|picc|icd|stent"
    "|implant|implanted|in place",
}


@pytest.mark.parametrize("label", LABELS[1:])
def test_each_word_for_a_label_mentions_it(label):
    for words in MEANT[label].split("|"):
        assert label in mentioned_labels(f"some {words} here"), words
        assert label not in mentioned_labels(f"some x{words} here"), words


def test_readings_of_the_demo_mention_what_they_name():
    for label, wordings in _WORDINGS.items():
        where = "pacemaker" if label == "Support Devices" else "left lower"
        for wording in wordings:
            # the teacher adds "mass" or "nodule" to a place, whichever is drawn
            assert label in mentioned_labels(wording.format(where=where)), wording


def answer(think: str, *labels: str):
    return parse_answer(f"<think>{think}</think><solution>{', '.join(labels)}</solution>")


def test_reasoning_against_its_answer():
    one = answer("Edema is seen. No fracture.", "Fracture", "Cardiomegaly", "No Finding")
    assert stated_not_answered(one) == {"Edema"}
    # Fracture is mentioned, though to deny it; No Finding has no fixed words
    assert answered_not_mentioned(one) == {"Cardiomegaly"}
    agreed = answer("Edema is seen.", "Edema")
    assert not stated_not_answered(agreed) and not answered_not_mentioned(agreed)
    assert has_reasoning(agreed)
    assert not has_reasoning(answer(" \n", "Edema"))
    assert not has_reasoning(parse_answer("<solution>Edema</solution>", "solution"))
    assert not has_reasoning(parse_answer("<think>Edema</think>"))  # no answer could be read


# ---- two answers ---------------------------------------------------------------------------------
def said(*labels: str, think: str = "x") -> str:
    return f"<think>{think}</think><solution>{', '.join(labels)}</solution>"


def pair(first: str, second: str) -> list[Prediction]:
    return parsed([row(first, ()), row(second, ())])


def test_which_answers_are_the_same():
    assert same_answer(*pair(said("Edema", "Fracture"), said("fracture", "Edema", think="y")))
    assert not same_answer(*pair(said("Edema"), said("Edema", "Fracture")))
    assert not same_answer(*pair(said("Edema", "nodule"), said("Edema", "mass")))
    assert same_answer(*pair(said(), said(think="y")))
    # unreadable: the same text is the same answer, another text is not
    assert same_answer(*pair("no idea", "no idea"))
    assert not same_answer(*pair("no idea", "none"))
    assert not same_answer(*pair("no idea", said()))
    assert not same_answer(*pair(said(), "no idea"))


def test_which_reasonings_are_the_same():
    assert same_reasoning(*pair(said(think="a b"), said("Edema", think=" a\n b "))) is True
    assert same_reasoning(*pair(said(think="a b"), said(think="a c"))) is False
    assert same_reasoning(*pair(said(think="a"), said(think=""))) is False
    assert same_reasoning(*pair(said(think=" "), "no idea")) is None


# ---- scores --------------------------------------------------------------------------------------
def rows_of(*texts_and_truths: tuple[str, tuple[str, ...]], partners=None) -> list[Prediction]:
    return parsed(
        [
            row(text, labels, id=f"r{n}", patient=f"p{n}")
            | ({} if partners is None else {"image_of": f"r{partners[n]}"})
            for n, (text, labels) in enumerate(texts_and_truths)
        ]
    )


E, F, N = ("Edema",), ("Fracture",), ()


def test_scores_by_hand():
    own = rows_of(
        (said("Edema", think="Edema is seen."), E),
        (said("Fracture", think="Edema. Broken rib."), F),
        (said("Fracture", think="clear"), F),
        ("no idea", N),
    )
    swapped = rows_of(
        (said("Fracture", think="Broken rib."), E),
        (said("Fracture", think="Edema. Broken rib."), F),
        (said("Edema", "Fracture", think="wet"), F),
        ("no idea", N),
        partners=(1, 2, 0, 0),
    )
    scores = faithfulness_scores(own, swapped, resamples=50)
    assert (scores["n"], scores["num_patients"]) == (4, 4)
    # r0 gets r1's image (Edema, Fracture), r1 gets r2's (both Fracture), r2 and r3 get r0's
    assert scores["same_truth"] == 1 / 4
    # Own Jaccard 1, 1, 1, 0; swapped 0, 1, 1/2, 0. Macro over Edema, Pneumonia, Fracture: 2/3; then
    # Edema FP 1, FN 1: 0; Fracture TP 2, FP 1: 4/5.
    assert scores["own"] == pytest.approx({"jaccard": 3 / 4, "micro_f1": 1.0, "macro_f1": 2 / 3})
    assert scores["swapped"] == pytest.approx(
        {"jaccard": 3 / 8, "micro_f1": 4 / 7, "macro_f1": 4 / 5 / 3}
    )
    assert scores["difference"] == pytest.approx(
        {"jaccard": -3 / 8, "micro_f1": -3 / 7, "macro_f1": 4 / 15 - 2 / 3}
    )
    low, high = scores["difference_intervals"]["jaccard"]
    assert low < -3 / 8 < high <= 0
    # r1's answer and the unreadable one stay. r0 loses Edema and gains Fracture, r2 gains Edema.
    assert scores["answers_unchanged"]["mean"] == 2 / 4 and scores["answers_unchanged"]["n"] == 4
    assert scores["labels_changed"]["mean"] == 3 / 4
    # r3 has no reasoning, r1 keeps its own
    assert scores["reasoning_unchanged"]["mean"] == pytest.approx(1 / 3)
    assert scores["reasoning_unchanged"]["n"] == 3
    # r1 states Edema and does not answer it; r2 answers Fracture, which "clear" does not mention
    assert scores["stated_not_answered"]["mean"] == pytest.approx(1 / 3)
    assert scores["answered_not_mentioned"]["mean"] == pytest.approx(1 / 3)
    assert scores["stated_not_answered_labels"] == {"Edema": 1}
    assert scores["answered_not_mentioned_labels"] == {"Fracture": 1}
    assert scores["per_label"] == {
        "Edema": {"said": 1, "said_swapped": 1, "both": 0},
        "Pneumonia": {"said": 0, "said_swapped": 0, "both": 0},
        "Fracture": {"said": 2, "said_swapped": 3, "both": 2},
    }
    low, high = scores["answers_unchanged"]["interval"]
    assert 0 <= low < 1 / 2 < high <= 1
    low, high = (f"{end:+.3f}" for end in scores["difference_intervals"]["jaccard"])
    text = format_faithfulness({"a": {"faithfulness": scores}, "b": {"faithfulness": scores}})
    paragraphs = text.split("\n\n")
    assert [" ".join(paragraph.split()) for paragraph in paragraphs] == [
        f"{name}: {verdict(scores)} From another patient's X-ray Jaccard goes 0.750 -> 0.375"
        f" ({low}..{high}), macro-F1 0.667 -> 0.267. 50 % of the answers and 33 % of the reasonings"
        " stay the same (25 % of the swapped pairs have the same true labels). 33 % of the answers"
        " leave out a label that their reasoning states, 33 % give one that it never mentions."
        for name in ("a", "b")
    ]


def test_a_model_without_eyes_changes_nothing():
    own = rows_of(*[(said("Edema"), E), (said("Edema"), F), ("no idea", E)])
    blind = rows_of(*[(said("Edema"), E), (said("Edema"), F), ("no idea", E)], partners=(1, 2, 0))
    scores = faithfulness_scores(own, blind, resamples=20)
    assert scores["answers_unchanged"] == {"mean": 1.0, "interval": [1.0, 1.0], "n": 3}
    assert scores["reasoning_unchanged"] == {"mean": 1.0, "interval": [1.0, 1.0], "n": 2}
    assert scores["labels_changed"]["mean"] == 0
    assert set(scores["difference"].values()) == {0.0}
    assert verdict(scores) == "No answer depends on the image."
    text = format_faithfulness({"site": {"faithfulness": scores}, "other": {}})
    assert text.startswith("site: No answer depends on the image. From another patient's X-ray")
    assert "100 % of the answers and 100 % of the reasonings stay the same (33 % of" in " ".join(
        text.split()
    )
    assert 90 < max(map(len, text.splitlines())) <= 100
    assert format_faithfulness({"other": {}}) == ""


def test_answers_without_reasoning_have_no_share_of_it():
    own = rows_of(("<solution>Edema</solution>", E), ("<solution></solution>", F))
    scores = faithfulness_scores(
        own, rows_of(*[("<solution></solution>", E)] * 2, partners=(1, 0)), resamples=5
    )
    for name in ("reasoning_unchanged", "stated_not_answered", "answered_not_mentioned"):
        assert scores[name] == {"mean": None, "interval": None, "n": 0}
    text = format_faithfulness({"a": {"faithfulness": scores}})
    assert "reasoning" not in text and "50 % of the answers stay the same" in text


def test_defaults_are_the_documented_ones():
    own = rows_of(*[(said("Edema"), E), (said("Fracture"), F), (said("Edema"), F)] * 4)
    swapped = rows_of(*[(said("Edema"), E)] * 12, partners=[(n + 1) % 12 for n in range(12)])
    scores = faithfulness_scores(own, swapped)
    assert scores == faithfulness_scores(own, swapped, seed=0, resamples=1000)
    assert scores != faithfulness_scores(own, swapped, seed=1, resamples=1000)


def test_verdicts():
    def scores(unchanged: float, high: float) -> dict:
        return {
            "answers_unchanged": {"mean": unchanged},
            "difference_intervals": {"jaccard": [-0.5, high]},
        }

    assert verdict(scores(0.2, -0.1)) == "The answers use the image."
    assert verdict(scores(0.2, 0.0)) == "No clear sign that the answers use the image."
    assert verdict(scores(1.0, 0.0)) == "No answer depends on the image."


def test_intervals_are_those_of_patients_drawn_again():
    """Against a draw written out: 40 images of 10 patients, and shares of what is read alone."""
    rng = np.random.default_rng(2)
    texts = [
        [said(*rng.choice(["Edema", "Fracture"], rng.integers(0, 3))) for _ in range(40)]
        for _ in range(2)
    ]
    both = [
        parsed(
            [
                row(text, E, id=f"r{n}", patient=f"p{n % 10}") | {"image_of": f"r{(n + 1) % 40}"}
                for n, text in enumerate(one)
            ]
        )
        for one in texts
    ]
    scores = faithfulness_scores(*both, seed=1, resamples=4000)
    same = np.array([same_answer(a, b) for a, b in zip(*both, strict=True)]).reshape(4, 10)
    draws = [same[:, rng.integers(0, 10, 10)].mean() for _ in range(4000)]
    assert scores["answers_unchanged"]["interval"] == pytest.approx(
        np.percentile(draws, [2.5, 97.5]), abs=0.03
    )


@pytest.mark.parametrize("text", ["pleural ", "no ", "\n- ", "a", "\n", " ", "n't ", "1. ", ". "])
def test_long_reasoning_is_read_in_linear_time(text):
    """A model that loops writes thousands of words. Read quadratically, these would take hours."""
    start = time.process_time()
    assert stated_labels(text * 50_000 + "x") == frozenset()
    mentioned_labels(text * 50_000 + "x")
    assert time.process_time() - start < 5
