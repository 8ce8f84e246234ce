"""Protect what is made of vote shares: ranking, calibration, and thresholds carried elsewhere.

The oracle of AUROC, average precision and calibration curves is scikit-learn.

Run: pytest tests/eval/test_probabilities.py
"""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from data.files import DataError
from data.predictions import Prediction, read_predictions, write_predictions
from eval.evaluate import main
from eval.probabilities import (
    Shares,
    auroc,
    average_precision,
    best_thresholds,
    calibration_error,
    format_probabilities,
    has_shares,
    operating_points,
    probability_scores,
    reliability,
)
from tests.helpers.reports import ABC, parsed, row
from tests.helpers.votes import AB, vote, votes_of


def random_votes(seed: int, images: int = 60, k: int = 4, patients: int = 20):
    """Draw shares that say something of the truth, and an evaluated matrix with holes."""
    rng = np.random.default_rng(seed)
    targets = rng.random((images, 3)) < (0.5, 0.3, 0.1)
    shares = rng.binomial(k, np.where(targets, 0.6, 0.3)) / k
    evaluated = rng.random((images, 3)) < 0.8
    return shares, targets, evaluated, [f"p{i}" for i in rng.integers(0, patients, images)]


# ---- ranking -------------------------------------------------------------------------------------
def test_ranking_by_hand():
    # shares 0, 1/2, 1: positives 1, 0, 2; negatives 2, 1, 1
    positives, negatives = np.array([1, 0, 2]), np.array([2, 1, 1])
    # Pairs: the positive at 0 ties two negatives (1). Each at 1 beats three and ties one (3.5).
    # (1 + 2 x 3.5) of 3 x 4 pairs.
    assert auroc(positives, negatives) == pytest.approx(8 / 12)
    # Precision at 1 is 2 of 3, at 0 it is 3 of 7: (2 x 2/3 + 3/7) / 3
    assert average_precision(positives, negatives) == pytest.approx((4 / 3 + 3 / 7) / 3)
    # several at once: the same, one without positives, one without negatives, and one more:
    # its positive at 1 beats one negative at 0 (AUROC 1, precision 1)
    rows = (
        np.array([[1, 0, 2], [0, 0, 0], [1, 0, 2], [0, 0, 1]]),
        np.array([[2, 1, 1], [2, 1, 1], [0, 0, 0], [1, 0, 0]]),
    )
    nan = np.nan
    assert auroc(*rows) == pytest.approx([8 / 12, nan, nan, 1], nan_ok=True)
    assert average_precision(*rows) == pytest.approx(
        [(4 / 3 + 3 / 7) / 3, nan, nan, 1], nan_ok=True
    )
    # always the same share: a coin, and the prevalence
    assert auroc(np.array([3]), np.array([9])) == 0.5
    assert average_precision(np.array([3]), np.array([9])) == 0.25


@pytest.mark.parametrize("seed", range(8))
def test_ranking_is_scikit_learns(seed):
    """Also with ties, with only a few distinct shares, and where not all is evaluated."""
    k = (1, 4, 16, 1000)[seed % 4]
    shares, targets, evaluated, patients = random_votes(seed, k=k)
    scores = probability_scores(
        votes_of(shares, targets, evaluated=evaluated, patients=patients), resamples=5
    )
    rankings = []
    for c, label in enumerate(ABC):
        images = evaluated[:, c]
        given = targets[images, c], shares[images, c]
        got = scores["per_label"][label]
        assert got["prevalence"] == given[0].mean() and got["n"] == images.sum()
        if given[0].all() or not given[0].any():
            assert got["auroc"] is None and label in scores["left_out"]
            continue
        rankings.append((roc_auc_score(*given), average_precision_score(*given)))
        assert (got["auroc"], got["auprc"]) == pytest.approx(rankings[-1], abs=1e-12)
    assert scores["macro_auroc"] == pytest.approx(np.mean([one for one, _ in rankings]))
    assert scores["macro_auprc"] == pytest.approx(np.mean([one for _, one in rankings]))


def test_labels_without_both_classes_are_left_out_and_said():
    votes = [
        vote({"Edema": 1.0}, ("Edema", "Fracture"), n=0),
        vote({"Fracture": 0.5}, ("Fracture",), n=1),
        # of this image Fracture is unknown: it is neither a positive nor a negative
        vote({"Fracture": 1.0}, (), n=2, evaluated=("Edema",)),
    ]
    scores = probability_scores(votes, resamples=20)
    assert scores["left_out"] == ["Fracture"]
    fracture = scores["per_label"]["Fracture"]
    assert [fracture[key] for key in ("auroc", "auroc_interval", "auprc", "auprc_interval")] == (
        [None] * 4
    )
    assert (fracture["n"], fracture["prevalence"]) == (2, 1.0)
    # the mean is Edema's alone: its one positive is above both negatives
    assert scores["macro_auroc"] == scores["macro_auprc"] == 1.0
    text = format_probabilities({"a": {"probabilities": scores}})
    assert "without both positives and negatives: Fracture" in text
    none = probability_scores(votes[1:2], resamples=5)
    assert none["macro_auroc"] is None and none["macro_auroc_interval"] is None
    assert none["left_out"] == list(AB)
    assert "no label has both" in format_probabilities({"a": {"probabilities": none}})


def test_intervals_are_those_of_patients_drawn_again():
    """Against a draw of patients written out, with every pair of images compared."""
    shares, targets, evaluated, patients = random_votes(3, images=90, patients=30)
    votes = votes_of(shares, targets, evaluated=evaluated, patients=patients)
    scores = probability_scores(votes, seed=1, resamples=2000)
    rng, names = np.random.default_rng(7), np.unique(patients)
    images_of = {name: np.flatnonzero(np.array(patients) == name) for name in names}
    drawn: dict[str, list] = {"auroc": [], "macro": []}
    for _ in range(1000):
        images = np.concatenate([images_of[name] for name in rng.choice(names, len(names))])
        by_label = []
        for c in range(3):
            known = images[evaluated[images, c]]
            said, true = shares[known, c], targets[known, c]
            pairs = said[true][:, None] - said[~true]  # positives beside negatives
            by_label.append(((pairs > 0) + 0.5 * (pairs == 0)).mean() if pairs.size else np.nan)
        drawn["auroc"].append(by_label[0])
        drawn["macro"].append(np.nanmean(by_label))
    # the SD of an end is some .004 with 1,000 draws
    assert scores["per_label"]["Edema"]["auroc_interval"] == pytest.approx(
        np.percentile(drawn["auroc"], [2.5, 97.5]), abs=0.02
    )
    assert scores["macro_auroc_interval"] == pytest.approx(
        np.percentile(drawn["macro"], [2.5, 97.5]), abs=0.02
    )
    again = probability_scores(votes, seed=1, resamples=2000)
    assert again == scores


def test_a_patient_is_drawn_with_all_images():
    """Two patients of three images: a resample is p alone, q alone or both once."""
    votes = [
        vote({"Edema": share}, ("Edema",) if true else (), n=n, patient=patient)
        for n, (patient, share, true) in enumerate(
            [
                ("p", 1.0, True),
                ("p", 0.0, False),
                ("p", 0.0, False),
                ("q", 0.0, True),
                ("q", 1.0, False),
                ("q", 1.0, False),
            ]
        )
    ]
    scores = probability_scores(votes, resamples=400)
    # p alone is ranked perfectly, q alone upside down, both: positives 1, 0; negatives 0, 0, 1, 1:
    # (2 + 2 x .5) + (2 x .5) of 8
    assert scores["per_label"]["Edema"]["auroc"] == pytest.approx(4 / 8)
    assert scores["per_label"]["Edema"]["auroc_interval"] == [0.0, 1.0]


# ---- calibration ---------------------------------------------------------------------------------
def test_reliability_by_hand():
    shares = np.array([0.0, 0.0, 0.25, 0.25, 0.25, 0.25, 1.0])
    targets = np.array([0, 1, 0, 0, 0, 1, 1], dtype=bool)
    bins = reliability(shares, targets)
    assert bins == [
        {"low": 0.0, "high": 0.1, "n": 2, "confidence": 0.0, "observed": 0.5},
        {"low": 0.2, "high": 0.3, "n": 4, "confidence": 0.25, "observed": 0.25},
        {"low": 0.9, "high": 1.0, "n": 1, "confidence": 1.0, "observed": 1.0},
    ]
    assert calibration_error(bins) == pytest.approx((2 * 0.5 + 4 * 0 + 1 * 0) / 7)


def test_borders_are_in_the_bin_below_however_they_are_rounded():
    # thirds of .9 and the like: 3 / 10, 0.1 + 0.2, 0.7 are all just beside a border
    shares = np.array([0.1, 3 / 10, 0.1 + 0.2, 6 / 10, 0.7, 1.0])
    bins = reliability(shares, np.zeros(6, dtype=bool))
    assert [(one["low"], one["n"]) for one in bins] == [
        (0.0, 1),
        (0.2, 2),
        (0.5, 1),
        (0.6, 1),
        (0.9, 1),
    ]


@pytest.mark.parametrize("k", [3, 4, 8])
def test_reliability_is_scikit_learns(k):
    rng = np.random.default_rng(k)
    shares = rng.integers(0, k + 1, 500) / k
    targets = rng.random(500) < shares**2
    observed, confidence = calibration_curve(targets, shares, n_bins=10)
    bins = reliability(shares, targets)
    assert [one["observed"] for one in bins] == pytest.approx(observed)
    assert [one["confidence"] for one in bins] == pytest.approx(confidence)
    assert sum(one["n"] for one in bins) == 500


def test_calibration_is_by_label_and_pooled():
    votes = [
        vote({"Edema": 1.0}, ("Edema",), n=0),
        vote({"Edema": 1.0, "Fracture": 0.5}, (), n=1),
        vote({}, (), n=2, evaluated=("Edema",)),
    ]
    scores = probability_scores(votes, resamples=5)
    # Edema: two at 1, one true: 2 |1 - 1/2|; one at 0. Fracture: 0, .5, none true; not image 3's.
    assert scores["per_label"]["Edema"]["ece"] == pytest.approx(2 * 0.5 / 3)
    assert scores["per_label"]["Fracture"]["ece"] == pytest.approx(0.5 / 2)
    assert scores["ece"] == pytest.approx((2 * 0.5 + 0.5) / 5)
    assert [(one["confidence"], one["n"]) for one in scores["reliability"]] == [
        (0.0, 2),
        (0.5, 1),
        (1.0, 2),
    ]


# ---- operating points ----------------------------------------------------------------------------
def thresholds_of(*said_and_true: tuple[float, bool]) -> float:
    votes = [
        vote({"Edema": share}, ("Edema",) if true else (), n=n, evaluated=("Edema",))
        for n, (share, true) in enumerate(said_and_true)
    ]
    return best_thresholds(Shares.of(votes))["Edema"]


def test_thresholds_by_hand():
    # from .25 on: TP 2, FP 1, F1 4/5; from .5 on: TP 1, FP 1, FN 1: 1/2; at 1: TP 1, FN 1: 2/3
    assert thresholds_of((0.25, True), (0.5, False), (1.0, True), (0.0, False)) == 0.25
    # from .25: TP 1, FP 2: 2/4; from .75: TP 1: 1
    assert thresholds_of((0.75, True), (0.5, False), (0.25, False)) == 0.75


def test_ties_keep_nearest_to_the_votes_own_threshold():
    # .75 and 1 are equal: the positive is alone at 1, and nothing is at .75; the shares that occur
    # are .25 and 1. Equal F1 at .25 and .75: TP 2 FP 2 FN 1: 4/7; TP 1 FP 0 FN 2: 1/2. Not equal.
    # Equal: (.25: TP 2, FP 2: 4/6) and (.75: TP 1, FN 1: 2/3), as near to .5: the higher.
    assert (
        thresholds_of((0.75, True), (0.25, True), (0.25, False), (0.25, False), (0.0, False))
        == 0.75
    )
    # Equal: (.5: TP 2, FP 2: 4/6) and (1: TP 1, FN 1: 2/3): the vote's own.
    assert thresholds_of((1.0, True), (0.5, True), (0.5, False), (0.5, False)) == 0.5


def test_labels_that_cannot_choose_keep_the_votes_threshold():
    assert thresholds_of((0.75, False), (1.0, False)) == 0.5  # no positives
    assert thresholds_of((0.0, True), (0.0, False)) == 0.5  # no sample says it
    assert thresholds_of((0.0, True), (0.25, False)) == 0.5  # and where one does, it is wrong


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_reach_the_highest_f1(seed):
    shares, targets, evaluated, _ = random_votes(seed, k=8)
    thresholds = best_thresholds(Shares.of(votes_of(shares, targets, evaluated=evaluated)))
    for c, label in enumerate(ABC):
        said, true = shares[evaluated[:, c], c], targets[evaluated[:, c], c]
        by_threshold = {
            share: f1_score(true, said >= share, zero_division=0) for share in np.arange(1, 9) / 8
        }
        assert by_threshold[thresholds[label]] == pytest.approx(max(by_threshold.values()))


def test_thresholds_are_carried_and_judged_elsewhere():
    home = [
        vote({"Edema": 0.25}, ("Edema",), n=0),
        vote({"Edema": 0.0, "Fracture": 0.75}, ("Fracture",), n=1),
        vote({"Fracture": 0.5}, (), n=2),
    ]  # Edema from .25, Fracture from .75
    away = [
        vote({"Edema": 0.25, "Fracture": 0.5}, ("Edema",), n=0, dataset="other", evaluated=ABC),
        vote({"Edema": 0.5, "Fracture": 0.75}, ("Edema",), n=1, dataset="other", evaluated=ABC),
        vote({"Edema": 0.25, "Pneumonia": 0.5}, (), n=2, dataset="other", evaluated=ABC),
    ]
    points = operating_points(away, home, "home", resamples=50)
    assert points["from"] == "home"
    # the same patient ids, of another hospital
    assert (points["shared_patients"], points["num_patients"]) == (0, 3)
    # Edema before: one of two found, 2/3; after: both and one too many, 4/5. Fracture and Pneumonia
    # are never true. Home cannot tell of Pneumonia.
    assert points["per_label"] == {
        "Edema": {"threshold": 0.25, "before": pytest.approx(2 / 3), "after": pytest.approx(4 / 5)},
        "Pneumonia": {"threshold": 0.5, "before": 0.0, "after": 0.0},
        "Fracture": {"threshold": 0.75, "before": 0.0, "after": 0.0},
    }
    assert points["not_chosen"] == ["Pneumonia"]
    # before: TP 1, FP 2 Fracture, 1 Pneumonia, FN 1: 2/6; after: TP 2, FP 1 + 1 + 1: 4/7
    assert points["before"] == {
        "micro_f1": pytest.approx(2 / 6),
        "macro_f1": pytest.approx(2 / 3 / 3),
    }
    assert points["after"] == {
        "micro_f1": pytest.approx(4 / 7),
        "macro_f1": pytest.approx(4 / 5 / 3),
    }
    low, high = points["difference"]["micro_f1"]
    assert low < 4 / 7 - 2 / 6 < high
    # of one patient every resample is the data set itself
    one = [Prediction.from_row(row.to_row() | {"patient_id": "p"}) for row in away]
    difference = operating_points(one, home, "home", resamples=5)["difference"]
    assert difference["micro_f1"] == pytest.approx([4 / 7 - 2 / 6] * 2)
    assert difference["macro_f1"] == pytest.approx([(4 / 5 - 2 / 3) / 3] * 2)
    again = operating_points(home, home, "home", resamples=50)
    assert again["shared_patients"] == 3
    assert again["after"]["macro_f1"] == 1.0
    text = format_probabilities(
        {
            "away": {"probabilities": probability_scores(away) | {"operating_points": points}},
            "home": {"probabilities": probability_scores(home) | {"operating_points": again}},
        }
    )
    assert "3 of 3 patients chose the thresholds as well: F1 with them is too high" in text
    assert text.count("patients chose the thresholds") == 1
    assert "not evaluated there, so left at 0.5: Pneumonia" in text
    assert max(map(len, text.splitlines())) <= 100
    edema = next(line for line in text.splitlines() if line.split()[:2] == ["Edema", "0.250"])
    assert edema.split() == ["Edema", "0.250", "0.667", "0.800"]


def test_tables_word_for_word():
    """Of one patient, so that every interval is a point."""
    home = [
        vote({"Edema": 0.25}, ("Edema",), n=0),
        vote({"Fracture": 0.75}, ("Fracture",), n=1),
        vote({"Fracture": 0.5}, (), n=2),
    ]
    of_p = {"dataset": "other", "evaluated": ABC, "patient": "p"}
    away = [
        vote({"Edema": 0.25, "Fracture": 0.5}, ("Edema",), n=0, **of_p),
        vote({"Edema": 0.5, "Fracture": 0.75}, ("Edema",), n=1, **of_p),
        vote({"Edema": 0.25, "Pneumonia": 0.5}, (), n=2, **of_p),
    ]
    scores = probability_scores(away, resamples=5)
    points = operating_points(away, home, "home", resamples=5)
    # Edema: pairs .5 and 1 of 2; precision 1 and 2/3; 2 at .25 of which half are true, 1 at .5.
    # All: 3 at 0; .5 for the two at .25; 3 at .5 of which a third is true; 1 at .75: 1.75 / 9.
    ranking = """\
away                   AUROC                AUPRC                prevalence    ECE
Edema                  0.750 (0.750-0.750)  0.833 (0.833-0.833)       0.667  0.333
mean of 1, all in one  0.750 (0.750-0.750)  0.833 (0.833-0.833)              0.194
vote shares as probabilities (95 % by patient); guessing has AUROC 0.5, AUPRC = prevalence
without both positives and negatives: Pneumonia, Fracture"""
    operating = """\
away       threshold  F1 of the vote              F1 with it
Edema          0.250           0.667                   0.800
Pneumonia      0.500           0.000                   0.000
Fracture       0.750           0.000                   0.000
micro-F1                       0.333  0.571 (+0.238..+0.238)
macro-F1                       0.222  0.267 (+0.044..+0.044)
thresholds chosen on home for the highest F1; in brackets: the change, 95 % by patient
not evaluated there, so left at 0.5: Pneumonia"""
    results = {
        "away": {"probabilities": scores | {"operating_points": points}},
        "greedy": {},
        "again": {"probabilities": scores},
    }
    again = ranking.replace("away ", "again", 1)
    assert format_probabilities(results) == f"{ranking}\n\n{operating}\n\n{again}"
    assert format_probabilities({"greedy": {}}) == ""


# ---- shares --------------------------------------------------------------------------------------
def test_rows_without_shares_are_named():
    plain = vote({}, n=7, vote_shares=None)
    assert not has_shares(plain) and has_shares(vote({}))
    with pytest.raises(DataError, match="f.jsonl, id 'r7': has no vote_shares; evaluate with"):
        probability_scores([vote({}), plain], source="f.jsonl")


def test_defaults_are_the_documented_ones():
    votes = [vote({"Edema": 0.25 * (n % 5)}, ("Edema",) if n % 3 else (), n=n) for n in range(12)]
    assert probability_scores(votes) == probability_scores(votes, seed=0, resamples=1000)
    assert probability_scores(votes) != probability_scores(votes, seed=1, resamples=1000)
    assert operating_points(votes, votes, "a") == operating_points(
        votes, votes, "a", seed=0, resamples=1000
    )
    assert probability_scores(votes)["num_generations"] == 4
    judged = Shares.of(votes)
    with pytest.raises(FrozenInstanceError):
        judged.labels = ()
    for call in (probability_scores, Shares.of):
        with pytest.raises(DataError, match="^predictions, id 'r7': has no vote_shares"):
            call([vote({}, n=7, vote_shares=None)])
    with pytest.raises(DataError, match="^home, id 'r7'"):
        operating_points(votes, [vote({}, n=7, vote_shares=None)], "home")


# ---- command -------------------------------------------------------------------------------------
def write_votes(path: Path, dataset: str) -> Path:
    shares, targets, evaluated, patients = random_votes(1, images=30)
    votes = votes_of(shares, targets, evaluated=evaluated, patients=patients)
    write_predictions(path, [Prediction.from_row(v.to_row() | {"dataset": dataset}) for v in votes])
    return path


def test_kept_votes_are_judged_again(tmp_path: Path, capsys):
    a, b = write_votes(tmp_path / "a.jsonl", "a"), write_votes(tmp_path / "b.jsonl", "b")
    command = ["--predictions", f"a={a}", f"b={b}", "--seed", "2"]
    assert main([*command, "--thresholds_from", "a", "--output_dir", str(tmp_path / "one")]) == 0
    text = capsys.readouterr().out
    assert "thresholds chosen on a for the highest F1" in text
    # b is a copy of a from another hospital: only of a it must be said
    assert text.count("patients chose the thresholds as well") == 1
    scores = {
        name: json.loads((tmp_path / "one" / f"scores-{name}.json").read_text()) for name in "ab"
    }
    points = scores["b"]["probabilities"].pop("operating_points")
    assert scores["b"]["probabilities"] == probability_scores(read_predictions(b), seed=2)
    votes = [read_predictions(file) for file in (b, a)]
    assert points == operating_points(*votes, "a", seed=2)
    # from a file, with only the other one judged
    command = ["--predictions", f"b={b}", "--thresholds_from", str(a), "--seed", "2"]
    assert main([*command, "--output_dir", str(tmp_path / "two")]) == 0
    again = json.loads((tmp_path / "two" / "scores-b.json").read_text())["probabilities"]
    assert again["operating_points"] == points | {"from": str(a)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thresholds_from", "c"], "--thresholds_from c: is neither a data set of this command"),
        (["--thresholds_from", "b"], "id 'r1': has no vote_shares; evaluate with --num_generati"),
    ],
)
def test_thresholds_need_shares(tmp_path: Path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_votes(tmp_path / "a.jsonl", "a")
    write_predictions(tmp_path / "b.jsonl", parsed([row("<solution></solution>", ())]))
    command = ["--predictions", "a=a.jsonl", "b=b.jsonl", *arguments]
    assert main([*command, "--output_dir", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
