"""Protect the scores.

Checked: equal to scikit-learn's with and without labels that a data set cannot express, the three
treatments of failed answers, and the baselines. Rare labels rule macro-F1, so the 0/0 cases matter
most.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.metrics import jaccard_score, precision_recall_fscore_support

import eval.metrics
from data.labels import LABELS
from eval.metrics import (
    bootstrap_intervals,
    drawn_patients,
    failure_policies,
    interval,
    jaccard_per_image,
    known_interval,
    label_matrix,
    multilabel_scores,
    patient_totals,
    predict_all_labels,
    predict_by_prevalence,
    predict_most_frequent,
    resampled_totals,
    scores_of_totals,
)

ABC = ("Edema", "Fracture", "Pneumonia")


def bools(*rows: str) -> np.ndarray:
    """Read '101' as [True, False, True]."""
    return np.array([[character == "1" for character in row] for row in rows])


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw targets and predictions [50, 14].

    A label is never true (3), one never predicted (5), and one neither (7).
    """
    rng = np.random.default_rng(seed)
    targets, predictions = rng.random((2, 50, 14)) < rng.random(14)
    targets[:, [3, 7]] = False
    predictions[:, [5, 7]] = False
    return targets, predictions


def sklearn_scores(targets, predictions, **options) -> tuple:
    with warnings.catch_warnings():
        # zero_division=0 is stated, so nothing is left to warn about
        warnings.simplefilter("error")
        return precision_recall_fscore_support(targets, predictions, zero_division=0, **options)


def triple(scores: dict) -> tuple[float, float, float]:
    return scores["precision"], scores["recall"], scores["f1"]


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn(seed):
    targets, predictions = random_case(seed)
    scores = multilabel_scores(targets, predictions, LABELS)
    assert triple(scores["micro"]) == pytest.approx(
        sklearn_scores(targets, predictions, average="micro")[:3], abs=1e-12
    )
    assert triple(scores["macro"]) == pytest.approx(
        sklearn_scores(targets, predictions, average="macro")[:3], abs=1e-12
    )
    per_label = np.array(sklearn_scores(targets, predictions, average=None))  # [4, 14]
    for k, label in enumerate(LABELS):
        assert triple(scores["per_label"][label]) == pytest.approx(
            tuple(per_label[:3, k]), abs=1e-12
        )
        assert scores["per_label"][label]["support"] == per_label[3, k]


@pytest.mark.parametrize("seed", range(5))
def test_positions_that_are_not_evaluated_are_left_out(seed):
    targets, predictions = random_case(seed)
    evaluated = np.random.default_rng(seed + 100).random(targets.shape) < 0.6
    scores = multilabel_scores(targets, predictions, LABELS, evaluated)
    # scikit-learn has no such mask: each label is scored on the images that express it, and micro
    # on all positions left.
    micro = sklearn_scores(targets[evaluated], predictions[evaluated], average="binary")
    assert triple(scores["micro"]) == pytest.approx(micro[:3], abs=1e-12)
    per_label = [
        sklearn_scores(targets[shown, k], predictions[shown, k], average="binary")
        for k, shown in enumerate(evaluated.T)
    ]
    for (precision, recall, f1, _), label in zip(per_label, LABELS, strict=True):
        assert triple(scores["per_label"][label]) == pytest.approx(
            (precision, recall, f1), abs=1e-12
        )
    macro = np.mean([row[:3] for row in per_label], axis=0)
    assert triple(scores["macro"]) == pytest.approx(tuple(macro), abs=1e-12)
    # Whatever stands in a position that is not evaluated, the scores are the same.
    assert (
        multilabel_scores(targets ^ ~evaluated, predictions | ~evaluated, LABELS, evaluated)
        == scores
    )


def test_scores_by_hand():
    # Edema: TP 1 (row 0), FP 1 (row 1), FN 0. Fracture: TP 0, FP 0, FN 2. Pneumonia: nothing at
    # all.
    scores = multilabel_scores(bools("110", "010"), bools("100", "100"), ABC)
    assert scores["per_label"]["Edema"] == {
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "support": 1,
    }
    assert scores["per_label"]["Fracture"] == {
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "support": 2,
    }
    assert scores["per_label"]["Pneumonia"] == {
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "support": 0,
    }
    # Micro: TP 1, FP 1, FN 2 -> 1/2, 1/3, 2/5. Macro: sums over all three labels / 3, the zeros
    # kept.
    assert triple(scores["micro"]) == pytest.approx((1 / 2, 1 / 3, 2 / 5))
    assert triple(scores["macro"]) == pytest.approx((0.5 / 3, 1 / 3, 2 / 9))
    # Fracture not evaluated in row 0: its FN falls to 1, micro recall to 1/2, nothing else changes.
    masked = multilabel_scores(bools("110", "010"), bools("100", "100"), ABC, bools("101", "111"))
    assert masked["per_label"]["Fracture"]["support"] == 1
    assert triple(masked["micro"]) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    assert masked["per_label"]["Edema"] == scores["per_label"]["Edema"]


def test_zeros_and_ones_are_as_good_as_booleans():
    targets, predictions, evaluated = bools("110", "010"), bools("100", "100"), bools("101", "111")
    scores = multilabel_scores(
        targets.astype(int), predictions.astype(float), ABC, evaluated.astype(int)
    )
    assert scores == multilabel_scores(targets, predictions, ABC, evaluated)


def test_no_image_scores_zero():
    scores = multilabel_scores(np.zeros((0, 3), bool), np.zeros((0, 3), bool), ABC)
    assert triple(scores["micro"]) == triple(scores["macro"]) == (0.0, 0.0, 0.0)


def test_scores_do_not_change_their_inputs():
    arrays = bools("110", "010"), bools("100", "100"), bools("101", "111")
    copies = [array.copy() for array in arrays]
    failure_policies(arrays[0], arrays[1], np.array([True, False]), ABC, arrays[2])
    assert all((array == copy).all() for array, copy in zip(arrays, copies, strict=True))


@pytest.mark.parametrize(
    ("targets", "predictions", "evaluated", "message"),
    [
        (bools("110"), bools("110", "010"), None, r"targets \(1, 3\), predictions \(2, 3\)"),
        (bools("110"), bools("110"), bools("11"), r"evaluated \(1, 2\) differ in shape"),
        (bools("11"), bools("11"), None, "3 labels given"),
        (np.array([True, False, True]), bools("110"), None, r"targets must be a matrix \[N, K\]"),
        # CheXpert's 'uncertain'
        (np.array([[1.0, 0.0, -1.0]]), bools("110"), None, "targets must hold only 0 and 1"),
        (bools("110"), np.array([[1.0, np.nan, 0.0]]), None, "predictions must hold only 0 and 1"),
        (
            bools("110"),
            bools("110"),
            np.array([[1.0, 0.5, 0.0]]),
            "evaluated must hold only 0 and 1",
        ),
    ],
)
def test_bad_matrices_are_errors(targets, predictions, evaluated, message):
    with pytest.raises(ValueError, match=message):
        multilabel_scores(targets, predictions, ABC, evaluated)


def test_scores_need_a_label():
    with pytest.raises(ValueError, match=r"0 labels given for matrices of shape \(2, 0\)"):
        multilabel_scores(np.zeros((2, 0), bool), np.zeros((2, 0), bool), ())


def test_label_matrix_places_labels_in_their_columns():
    matrix = label_matrix(
        [("Pneumonia", "Edema"), frozenset(), ["Support Devices", "Fracture"]], ABC
    )
    assert matrix.dtype == bool
    assert (matrix == bools("101", "000", "010")).all()  # Support Devices has no column here
    assert label_matrix([], ABC).shape == (0, 3)


def test_jaccard_of_each_image():
    # Rows: 1 shared of 2; both empty = 1; 0 of 1; 2 of 3.
    targets, predictions = bools("110", "000", "000", "110"), bools("100", "000", "001", "111")
    assert jaccard_per_image(targets, predictions).tolist() == pytest.approx([1 / 2, 1, 0, 2 / 3])
    # Without the third label: 1 of 2; 1; both empty = 1; 2 of 2.
    assert jaccard_per_image(targets, predictions, bools(*["110"] * 4)).tolist() == pytest.approx(
        [1 / 2, 1, 1, 1]
    )


def test_jaccard_equals_scikit_learn():
    targets, predictions = random_case(0)
    # scikit-learn scores empty against empty with zero_division, which is not at issue here
    targets[:, 0] = True
    assert jaccard_per_image(targets, predictions).mean() == pytest.approx(
        jaccard_score(targets, predictions, average="samples")
    )


def test_failed_answers_are_treated_in_three_ways():
    targets, predictions = bools("110", "100", "011"), bools("111", "111", "010")
    policies = failure_policies(
        targets, predictions, np.array([True, False, True]), ABC, bools("110", "110", "111")
    )
    assert list(policies) == ["empty", "dropped", "all_wrong"]
    # Rows 0 and 2 were read: TP 2 + 1, FP 0, FN 0 + 1 (Pneumonia). Row 1 failed. Pneumonia is not
    # evaluated in rows 0 and 1.
    assert triple(policies["dropped"]["micro"]) == pytest.approx((3 / 3, 3 / 4, 6 / 7))
    # Empty: row 1 adds FN 1 (Edema); what the matrix held for it is not used.
    assert triple(policies["empty"]["micro"]) == pytest.approx((3 / 3, 3 / 5, 6 / 8))
    # All wrong: row 1 becomes 01?, so FN 1 (Edema) and FP 1 (Fracture).
    assert triple(policies["all_wrong"]["micro"]) == pytest.approx((3 / 4, 3 / 5, 6 / 9))
    assert policies["all_wrong"]["per_label"]["Pneumonia"]["precision"] == 0.0
    # Whether an answer was read may come as 0 and 1; those are no row numbers.
    assert (
        failure_policies(targets, predictions, [1, 0, 1], ABC, bools("110", "110", "111"))
        == policies
    )


def test_all_answers_failed():
    policies = failure_policies(
        bools("110", "100"), bools("000", "000"), np.array([False, False]), ABC
    )
    for scores in policies.values():
        assert triple(scores["micro"]) == (0.0, 0.0, 0.0)
    assert policies["dropped"]["per_label"]["Edema"]["support"] == 0
    assert policies["empty"]["per_label"]["Edema"]["support"] == 2


def test_parsed_must_match_the_images():
    with pytest.raises(ValueError, match=r"parsed has shape \(3,\), but there are 2 images"):
        failure_policies(bools("110", "100"), bools("000", "000"), np.array([True] * 3), ABC)


def test_most_frequent_answer():
    predictions = predict_most_frequent(bools("001", "110", "100", "110"), 3)
    assert (predictions == bools("110", "110", "110")).all()
    # Two sets twice each: the one that occurs first, although it sorts last.
    assert (predict_most_frequent(bools("110", "001", "001", "110"), 1) == bools("110")).all()
    assert (predict_most_frequent(bools("000", "000", "100"), 1) == bools("000")).all()


def test_all_labels_baseline():
    # Precision is the share of positives, 3 of 6; recall is 1.
    predictions = predict_all_labels(2, 3)
    assert predictions.dtype == bool
    assert triple(
        multilabel_scores(bools("110", "100"), predictions, ABC)["micro"]
    ) == pytest.approx((1 / 2, 1, 2 / 3))


def test_random_baseline_has_the_references_prevalence_and_no_correlation():
    reference = bools("110", "110", "000", "110")  # 0.75, 0.75, 0; the first two always together
    predictions = predict_by_prevalence(reference, 20_000, np.random.default_rng(0))
    # One standard deviation of a mean of 20,000 draws at 0.75 is sqrt(0.75 x 0.25 / 20000) = 0.003;
    # five of them.
    assert predictions.mean(axis=0) == pytest.approx([0.75, 0.75, 0.0], abs=0.015)
    # Drawn on their own, both occur together in 0.75 x 0.75 of the images.
    assert (predictions[:, 0] & predictions[:, 1]).mean() == pytest.approx(0.5625, abs=0.0175)
    again = predict_by_prevalence(reference, 20_000, np.random.default_rng(0))
    assert (again == predictions).all()


def test_random_baseline_never_predicts_what_the_reference_never_holds():
    class AllZero:  # the least that Generator.random returns
        @staticmethod
        def random(shape):
            return np.zeros(shape)

    assert (predict_by_prevalence(bools("110", "100"), 2, AllZero) == bools("110", "110")).all()


def test_baselines_need_label_sets_to_imitate():
    nothing = np.zeros((0, 3), bool)
    with pytest.raises(ValueError, match="imitated holds no label set"):
        predict_most_frequent(nothing, 2)
    with pytest.raises(ValueError, match="imitated holds no label set"):
        predict_by_prevalence(nothing, 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"imitated must be a matrix \[N, K\], got shape \(3,\)"):
        predict_most_frequent(np.array([True, False, True]), 2)


def test_jaccard_counts_unknown_entries_in_the_union():
    # Row 0: 1 shared, union 2 + 1 unknown. Row 1: both empty, but one unknown entry was predicted.
    values = jaccard_per_image(
        bools("110", "000"), bools("100", "000"), num_unknown=np.array([1, 1])
    )
    assert values == pytest.approx([1 / 3, 0])


def draws_by_hand(
    targets, predictions, evaluated, patient_ids, *, seed, resamples
) -> list[dict[str, int]]:
    """Draw {patient: times drawn} of each resample.

    One multinomial draw over the distinct rows of totals, in sorted order.
    """
    totals = patient_totals(targets, predictions, evaluated, patient_ids)
    members: dict[tuple, list[str]] = {}
    for patient, row in zip(sorted(set(patient_ids)), totals.tolist(), strict=True):
        members.setdefault(tuple(row), []).append(patient)
    rows = sorted(members)
    shares = [len(members[row]) / len(totals) for row in rows]
    weights = np.random.default_rng(seed).multinomial(len(totals), shares, size=resamples)
    # of patients with equal totals, the first stands for all
    nobody = dict.fromkeys(patient_ids, 0)
    return [
        nobody | {members[row][0]: int(times) for row, times in zip(rows, weight, strict=True)}
        for weight in weights
    ]


def test_bootstrap_equals_a_loop_over_the_same_draws():
    targets, predictions = random_case(0)
    evaluated = np.random.default_rng(1).random(targets.shape) < 0.8
    patient_ids = [f"p{n}" for n in np.random.default_rng(2).integers(12, size=50)]
    intervals = bootstrap_intervals(
        targets, predictions, evaluated, patient_ids, seed=3, resamples=30
    )

    # A position that is not evaluated counts as a true negative for scikit-learn, which no F1 and
    # no Jaccard index sees. The images of a patient drawn twice are there twice.
    targets, predictions = targets & evaluated, predictions & evaluated
    drawn_patients = draws_by_hand(
        targets, predictions, evaluated, patient_ids, seed=3, resamples=30
    )
    values = []
    for times in drawn_patients:
        drawn = [n for n in range(50) for _ in range(times[patient_ids[n]])]
        sample = targets[drawn], predictions[drawn]
        values.append(
            (
                sklearn_scores(*sample, average="micro")[2],
                sklearn_scores(*sample, average="macro")[2],
                jaccard_score(*sample, average="samples", zero_division=1),
            )
        )
    low, high = np.percentile(values, [2.5, 97.5], axis=0)
    for metric, *bounds in zip(("micro_f1", "macro_f1", "jaccard"), low, high, strict=True):
        assert intervals[metric] == pytest.approx(bounds, abs=1e-12)


def test_patients_with_equal_totals_are_drawn_together():
    """Eight patients, five of them alike: a resample still has eight, and each of the five comes as
    often as any other.
    """
    totals = np.array([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 2 + [[0.0, 0.0]])
    drawn = resampled_totals(totals, seed=0, resamples=20_000)
    assert drawn.shape == (20_000, 2) and (drawn.sum(axis=1) <= 8).all()
    # Binomial(8, 5/8) and Binomial(8, 2/8): means 5 and 2, variances 15/8 and 12/8; five standard
    # errors of the mean and of the variance (that of a sample variance is about variance x sqrt(2 /
    # 20000) = 0.02).
    assert drawn.mean(axis=0) == pytest.approx([5, 2], abs=5 * np.sqrt(15 / 8 / 20_000))
    assert drawn.var(axis=0) == pytest.approx([15 / 8, 12 / 8], abs=0.1)


def test_bootstrap_does_not_depend_on_how_many_weights_fit_in_memory(monkeypatch):
    targets, predictions = random_case(0)
    arguments = targets, predictions, None, [str(n) for n in range(50)]
    whole = bootstrap_intervals(*arguments, seed=0, resamples=25)
    monkeypatch.setattr("eval.metrics._WEIGHTS_AT_ONCE", 4 * 50)  # 4 resamples at a time
    assert bootstrap_intervals(*arguments, seed=0, resamples=25) == whole


def test_bootstrap_draws_a_thousand_resamples_by_default():
    targets, predictions = random_case(0)
    arguments = targets, predictions, None, [str(n) for n in range(50)]
    assert bootstrap_intervals(*arguments, seed=0) == bootstrap_intervals(
        *arguments, seed=0, resamples=1000
    )


def test_bootstrap_draws_patients_not_images():
    # Two patients of 50 images each, one all right and one all wrong. A resample holds only one of
    # them with probability 1/4 each, so both percentiles are at the extremes; by image they would
    # lie near 0.4 and 0.6.
    targets, predictions = bools(*["100"] * 100), bools(*["100"] * 50, *["010"] * 50)
    intervals = bootstrap_intervals(targets, predictions, None, ["a"] * 50 + ["b"] * 50, seed=0)
    assert intervals["micro_f1"] == intervals["jaccard"] == (0.0, 1.0)
    # the other two labels have no true positive
    assert intervals["macro_f1"] == pytest.approx((0, 1 / 3))


def test_an_interval_leaves_out_resamples_that_score_nothing():
    # of 0, 1, .., 100 the percentiles 2.5 and 97.5 are these numbers themselves
    values = np.insert(np.arange(101.0), [0, 50, 101], np.nan)
    assert interval(values) == (2.5, 97.5) and known_interval(values) == [2.5, 97.5]
    assert known_interval(np.array([np.nan, np.nan])) is None


def test_bootstrap_of_one_patient_is_a_point():
    # the scores of test_scores_by_hand; Jaccard 1/2 and 0
    targets, predictions = bools("110", "010"), bools("100", "100")
    intervals = bootstrap_intervals(targets, predictions, None, ["a", "a"], seed=0, resamples=5)
    for metric, value in {"micro_f1": 2 / 5, "macro_f1": 2 / 9, "jaccard": 1 / 4}.items():
        assert intervals[metric] == pytest.approx((value, value))
    own = bootstrap_intervals(
        targets, predictions, None, ["a", "a"], seed=0, resamples=5, jaccard=np.array([0.25, 0.0])
    )
    assert own["jaccard"] == (0.125, 0.125)


def test_bootstrap_needs_one_patient_id_an_image():
    with pytest.raises(ValueError, match="1 images, 2 patient ids"):
        bootstrap_intervals(bools("110"), bools("110"), None, ["a", "b"], seed=0)
    with pytest.raises(ValueError, match="1 images, 1 patient ids, 2 Jaccard values"):
        bootstrap_intervals(
            bools("110"), bools("110"), None, ["a"], seed=0, jaccard=np.array([1.0, 1.0])
        )
    with pytest.raises(ValueError, match="0 images"):
        bootstrap_intervals(np.zeros((0, 3), bool), np.zeros((0, 3), bool), None, [], seed=0)


def test_the_figures_of_totals_by_hand():
    # TP, FP, FN of two labels, then the sum of Jaccard and the number of images. First draw: label
    # 1 has 3, 1, 0: F1 6/7; label 2 has 0, 0, 2: 0; together 3, 1, 2: 6/9. Second draw: 1, 0, 1:
    # 2/3; 2, 0, 0: 1; together 3, 0, 1: 6/7.
    totals = np.array([[3, 0, 1, 0, 0, 2, 2.5, 5], [1, 2, 0, 0, 1, 0, 1.0, 4]])
    found = scores_of_totals(totals)
    of_labels = {f"label_{name}" for name in ("precision", "recall", "f1")}
    assert set(found) == {"micro_f1", "macro_f1", "jaccard"} | of_labels
    # precision 3/4 and 0, then 1 and 1; recall 1 and 0, then 1/2 and 1
    np.testing.assert_allclose(found["label_precision"], [[3 / 4, 0], [1, 1]], atol=1e-12)
    np.testing.assert_allclose(found["label_recall"], [[1, 0], [1 / 2, 1]], atol=1e-12)
    np.testing.assert_allclose(found["label_f1"], [[6 / 7, 0], [2 / 3, 1]], atol=1e-12)
    np.testing.assert_allclose(found["macro_f1"], [3 / 7, 5 / 6], atol=1e-12)
    np.testing.assert_allclose(found["micro_f1"], [6 / 9, 6 / 7], atol=1e-12)
    np.testing.assert_allclose(found["jaccard"], [0.5, 0.25], atol=1e-12)


def test_patients_are_drawn_as_often_as_there_are_patients(monkeypatch):
    pieces = list(drawn_patients(5, seed=1, resamples=7))
    (whole,) = pieces
    assert whole.shape == (7, 5) and (whole.sum(axis=1) == 5).all()
    assert len({tuple(row) for row in whole.tolist()}) > 1
    # in pieces of two resamples the draws are the same
    monkeypatch.setattr(eval.metrics, "_WEIGHTS_AT_ONCE", 10)
    pieces = list(drawn_patients(5, seed=1, resamples=7))
    assert [len(piece) for piece in pieces] == [2, 2, 2, 1]
    assert (np.concatenate(pieces) == whole).all()
    assert not (np.concatenate(list(drawn_patients(5, seed=2, resamples=7))) == whole).all()
    # more patients than fit: one resample at a time
    assert [len(piece) for piece in drawn_patients(11, seed=1, resamples=2)] == [1, 1]
    # each patient is drawn once on average: 5 x 4000 draws, standard deviation .014
    many = np.concatenate(list(drawn_patients(5, seed=3, resamples=4000)))
    assert many.mean(axis=0) == pytest.approx([1] * 5, abs=0.06)
    # and never with probability (4/5)^5 = .328, standard deviation .003
    assert (many == 0).mean() == pytest.approx(0.8**5, abs=0.015)
