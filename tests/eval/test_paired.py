"""Protect what is said about the certainty of scores.

Checked: intervals cover what they claim on simulated data, paired differences and p-values equal
enumeration by hand, and what models say is counted right.

Run: pytest tests/eval/test_paired.py
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import f1_score

from eval.metrics import bootstrap_intervals, patient_totals, scores_of_totals
from eval.paired import (
    all_labels_scores,
    change,
    clear_change,
    diversity,
    fingerprint,
    holm,
    permutation_p_values,
    said_and_true,
    shared_resamples,
)


def simulated(
    rng: np.random.Generator, patients: int, images: int = 6
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Simulate (targets, predictions of a model and of a better one, patient of each image).

    There are three labels and `images` images a patient. Images of a patient are alike: the patient
    has the disease or not, and the model reads the patient right or wrong. Then one image in ten
    differs. So there is little more in six images than in one.
    """
    prevalence = np.array([0.5, 0.3, 0.2])
    sick = rng.random((patients, 3)) < prevalence
    misread = rng.random((patients, 3)) < 0.25
    better = misread & (rng.random((patients, 3)) < 0.6)
    patient = np.repeat(np.arange(patients), images)
    flips = [rng.random((len(patient), 3)) < 0.1 for _ in range(3)]
    return (
        sick[patient] ^ flips[0],
        (sick ^ misread)[patient] ^ flips[1],
        (sick ^ better)[patient] ^ flips[2],
        patient,
    )


def macro(targets: np.ndarray, predictions: np.ndarray) -> float:
    return f1_score(targets, predictions, average="macro", zero_division=0)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """200 data sets of 80 patients; the truth is the score of 200,000 patients of the same
    population.

    At a coverage of 95 % the number of 200 intervals that hold the truth is 190 with a standard
    deviation of sqrt(200 x 0.95 x 0.05) = 3.1; 180 (90 %) is three below. Percentile intervals of
    few patients are a little too narrow (182 and 190 here). Drawing images instead of patients must
    fail by far (133), or the simulation shows nothing.
    """
    rng = np.random.default_rng(0)
    truth_targets, truth_first, truth_second, _ = simulated(rng, 200_000, images=1)
    truth = macro(truth_targets, truth_first)
    true_difference = macro(truth_targets, truth_second) - truth
    assert 0.05 < true_difference < 0.1
    by_patient = by_image = of_difference = 0
    for repetition in range(200):
        targets, first, second, patient = simulated(rng, 80)
        totals = {
            name: patient_totals(targets, predictions, None, patient)
            for name, predictions in (("a", first), ("b", second))
        }
        resampled = shared_resamples(totals, seed=repetition, resamples=400)
        low, high = np.percentile(resampled["a"]["macro_f1"], [2.5, 97.5])
        by_patient += low <= truth <= high
        low, high = change(
            0, 0, resampled["a"]["macro_f1"], resampled["b"]["macro_f1"], 1.0
        ).difference
        of_difference += low <= true_difference <= high
        low, high = bootstrap_intervals(
            targets, first, None, np.arange(len(patient)), seed=repetition, resamples=400
        )["macro_f1"]
        by_image += low <= truth <= high
    assert 180 <= by_patient <= 199
    assert 180 <= of_difference <= 199
    assert by_image < 150


def test_paired_resamples_are_of_the_same_patients():
    """A model beside itself: its difference is 0 in every resample, while each of them varies."""
    targets, first, second, patient = simulated(np.random.default_rng(1), 30)
    totals = patient_totals(targets, first, None, patient)
    resampled = shared_resamples(
        {"a": totals, "again": totals, "b": patient_totals(targets, second, None, patient)},
        seed=0,
        resamples=50,
    )
    assert resampled["a"]["macro_f1"].std() > 0.01
    assert (resampled["a"]["macro_f1"] == resampled["again"]["macro_f1"]).all()
    # Alone or beside others, the point estimate in the middle is the same model's.
    assert abs(resampled["b"]["macro_f1"].mean() - macro(targets, second)) < 0.02
    with pytest.raises(ValueError, match="a 30, b 29"):
        shared_resamples({"a": totals, "b": totals[:29]}, seed=0)


def test_p_values_equal_all_swaps_by_hand():
    """Eight patients: all 256 ways to swap their two sets of answers. p by drawing has a standard
    error of at most 0.005.
    """
    targets, first, second, patient = simulated(np.random.default_rng(5), 8, images=2)
    seen = macro(targets, second) - macro(targets, first)
    as_large = 0
    for swapped in itertools.product([False, True], repeat=8):
        swap = np.array(swapped)[patient][:, None]
        difference = macro(targets, np.where(swap, first, second)) - macro(
            targets, np.where(swap, second, first)
        )
        as_large += abs(difference) >= abs(seen) - 1e-12
    totals = [
        patient_totals(targets, predictions, None, patient) for predictions in (first, second)
    ]
    p_values = permutation_p_values(*totals, seed=0, permutations=10_000)
    assert 0.02 < as_large / 256 < 0.9
    assert p_values["macro_f1"] == pytest.approx(as_large / 256, abs=0.02)
    assert p_values["label_f1"].shape == (3,)


def test_patients_with_the_same_change_are_swapped_one_by_one():
    """Four patients, each moved from a miss to a hit: the difference of F1 is 1, and again only
    where all or none is swapped, so p is 2/16; were the four swapped together, it would be 1.
    """
    hit, miss = np.array([[1.0, 0, 0, 1, 1]] * 4), np.array([[0.0, 0, 1, 0, 1]] * 4)
    p_values = permutation_p_values(miss, hit, seed=0, permutations=20_000)
    assert p_values["macro_f1"] == pytest.approx(2 / 16, abs=0.012)  # five standard errors
    # nothing to swap
    assert permutation_p_values(hit, hit, seed=0, permutations=10)["macro_f1"] == 1.0


def test_each_label_has_its_own_p_value():
    """Six patients, each moved from a miss to a hit of the first label, and right on the second all
    along: the first differs as much only where all or none is swapped, the second always.
    """
    # true and false positives, false negatives of two labels, Jaccard, images
    hit, miss = (
        np.array([[1.0, 1, 0, 0, 0, 0, 1, 1]] * 6),
        np.array([[0, 1, 0, 0, 1, 0, 0.5, 1]] * 6),
    )
    p_values = permutation_p_values(miss, hit, seed=0, permutations=20_000)
    assert p_values["label_f1"] == pytest.approx([2 / 64, 1], abs=0.006)  # five standard errors


def test_the_null_is_that_models_answer_alike_not_that_they_score_alike():
    """Two models with equal macro-F1 at other operating points differ label by label."""
    # 120 patients; each label is true of 40. Freely said: all 40 and 40 more, F1 80 / 120 = 2/3.
    # Sparingly: 10 of the 40 and no other, F1 20 / 50 = 2/5. One model says the first label freely
    # and the second sparingly, the other model the reverse: macro-F1 is 8/15 for both.
    true = np.arange(120)[:, None] < [40, 40]
    freely, sparingly = np.arange(120) < 80, np.arange(120) < 10
    totals = [
        patient_totals(true, np.stack(said, axis=1), None, [str(n) for n in range(120)])
        for said in ((freely, sparingly), (sparingly, freely))
    ]
    scores = [scores_of_totals(rows.sum(axis=0)[None]) for rows in totals]
    assert [one["macro_f1"][0] for one in scores] == pytest.approx([8 / 15, 8 / 15])
    p_values = permutation_p_values(*totals, seed=0, permutations=2000)
    assert p_values["macro_f1"] == 1  # no permutation can differ by less than nothing
    assert p_values["label_f1"].max() < 0.01


def test_holm_by_hand():
    # In order: 0.01 x 4 = 0.04; 0.02 x 3 = 0.06; 0.03 x 2 = 0.06; 0.5 x 1. What is not tested does
    # not count.
    nan = float("nan")
    adjusted = holm([0.5, 0.02, nan, 0.01, 0.03])
    assert [*adjusted[:2], *adjusted[3:]] == pytest.approx([0.5, 0.06, 0.04, 0.06])
    assert np.isnan(adjusted[2])
    # None below one before it: 0.02 x 3 = 0.06, 0.025 x 2 = 0.05 becomes 0.06. None above 1.
    assert holm([0.025, 0.02, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8]) and holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03] and holm([]) == [] and np.isnan(holm([nan])[0])


def test_holm_keeps_the_errors_of_a_whole_table_below_its_level():
    # 14 labels of which none has changed: unadjusted, 1 - 0.95^14 = 51 % of tables have a p < 0.05
    p_values = np.random.default_rng(0).random((2000, 14))
    assert (p_values.min(axis=1) < 0.05).mean() == pytest.approx(0.51, abs=0.03)
    assert np.mean([min(holm(row)) < 0.05 for row in p_values]) <= 0.06


def test_p_values_are_uniform_where_there_is_no_difference():
    """Under the hypothesis p <= 0.2 comes in one of five data sets: of 200, 40 with a standard
    deviation of 5.7.
    """
    rng = np.random.default_rng(2)
    small = 0
    for repetition in range(200):
        targets, first, _, patient = simulated(rng, 40, images=2)
        # other errors, then which model has which is drawn
        other = first ^ (rng.random(first.shape) < 0.2)
        swap = (rng.random(40) < 0.5)[patient][:, None]
        pair = np.where(swap, other, first), np.where(swap, first, other)
        totals = [patient_totals(targets, predictions, None, patient) for predictions in pair]
        small += permutation_p_values(*totals, seed=repetition, permutations=200)["macro_f1"] <= 0.2
    assert 40 - 5 * 5.7 < small < 40 + 4 * 5.7


def test_the_draws_do_not_depend_on_how_many_fit_in_memory(monkeypatch):
    targets, first, second, patient = simulated(np.random.default_rng(3), 20)
    totals = [
        patient_totals(targets, predictions, None, patient) for predictions in (first, second)
    ]
    whole = permutation_p_values(*totals, seed=0, permutations=100)
    monkeypatch.setattr("eval.paired._SWAPS_AT_ONCE", 60)
    assert permutation_p_values(*totals, seed=0, permutations=100)["macro_f1"] == whole["macro_f1"]


def test_ten_thousand_draws_unless_another_number_is_given():
    """Forty patients, each moved from a miss to a hit: hardly any of all swaps gives a difference
    as large, so p is the 1 that is counted for the data themselves, over 1 + 10,000.
    """
    hit, miss = np.array([[1.0, 0, 0, 1, 1]] * 40), np.array([[0.0, 0, 1, 0, 1]] * 40)
    assert permutation_p_values(miss, hit, seed=0)["macro_f1"] == 1 / 10_001
    resampled = shared_resamples({"miss": miss, "hit": hit}, seed=0)
    assert resampled["hit"]["macro_f1"].tolist() == [1.0] * 10_000
    assert resampled["miss"]["macro_f1"].tolist() == [0.0] * 10_000


def test_a_change_by_hand():
    # Differences 0.1 and 0.3 in two resamples, relative changes 1/2 and 1; percentiles 2.5 and 97.5
    # lie 2.5 % inside.
    result = change(0.2, 0.4, np.array([0.2, 0.3]), np.array([0.3, 0.6]), 0.01)
    assert result.difference == pytest.approx((0.105, 0.295)) and result.relative == pytest.approx(
        (0.5125, 0.9875)
    )
    assert (result.before, result.after, result.p_value) == (0.2, 0.4, 0.01)
    assert change(0, 0.4, np.array([0.0, 0.3]), np.array([0.3, 0.6]), 0.01).relative is None


@pytest.mark.parametrize(
    ("interval", "patients", "clear"),
    [
        ((0.01, 0.05), 20, "gain"),
        ((-0.05, -0.01), 20, "loss"),
        ((0.01, 0.05), 19, ""),  # too few patients
        ((-0.01, 0.05), 1000, ""),
        ((0.0, 0.05), 1000, ""),  # it touches 0
        ((-0.05, 0.0), 1000, ""),
        ((0.0, 0.0), 1000, ""),
        ((float("nan"), float("nan")), 1000, ""),
    ],
)
def test_a_clear_difference_has_an_interval_without_zero_and_twenty_patients(
    interval, patients, clear
):
    assert clear_change(interval, patients) == clear


def test_figures_of_totals_equal_scikit_learn():
    targets, first, _, patient = simulated(np.random.default_rng(4), 25)
    values = scores_of_totals(patient_totals(targets, first, None, patient).sum(axis=0)[None])
    assert values["macro_f1"] == pytest.approx([macro(targets, first)])
    assert values["micro_f1"] == pytest.approx([f1_score(targets, first, average="micro")])
    assert values["label_f1"][0] == pytest.approx(f1_score(targets, first, average=None))


def test_what_is_said_and_what_is_true():
    targets = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=bool)
    predictions = np.array([[1, 1, 1], [0, 1, 1], [0, 1, 1]], dtype=bool)
    evaluated = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0]], dtype=bool)
    said, true = said_and_true(targets, predictions, evaluated)
    # Second label: the third image does not evaluate it, so 2 of 2 and 1 of 2. Third label: nobody
    # does.
    assert said[:2].tolist() == pytest.approx([1 / 3, 1]) and true[:2].tolist() == pytest.approx(
        [2 / 3, 1 / 2]
    )
    assert np.isnan([said[2], true[2]]).all()


def test_diversity_by_hand():
    sets = [
        frozenset({"Edema"}),
        frozenset({"Edema"}),
        frozenset(),
        frozenset({"Edema", "Fracture", "Pneumonia"}),
    ]
    texts = [fingerprint(text) for text in ("one", "one", "two", "three")]
    found = diversity(
        texts,
        sets,
        np.array([False, False, False, True]),
        np.array([10, 20, 30, 100]),
        num_labels=3,
    )
    assert (found.answers, found.distinct_completions, found.distinct_label_sets) == (4, 3, 3)
    assert (found.most_frequent_set, found.most_frequent_share) == (frozenset({"Edema"}), 0.5)
    # shares 1/2, 1/4, 1/4: 0.5 x 1 + 2 x 0.25 x 2
    assert found.label_set_entropy == pytest.approx(1.5)
    assert (found.labels_per_answer, found.all_labels_share, found.contradiction_share) == (
        5 / 4,
        1 / 4,
        1 / 4,
    )
    assert (found.length_mean, found.length_median, found.length_max) == (40, 25, 100)
    # a length that nobody counted is left out
    lengths = np.array([10.0, np.nan, 30.0, np.nan])
    texts = [fingerprint(text) for text in "abcd"]
    sets = [frozenset({"Edema"})] * 4
    some = diversity(texts, sets, np.zeros(4, dtype=bool), lengths, 14)
    assert (some.length_mean, some.length_median, some.length_max) == (20, 20, 30)
    none = diversity(texts, sets, np.zeros(4, dtype=bool), lengths * np.nan, 14)
    assert np.isnan([none.length_mean, none.length_median, none.length_max]).all()
    same = diversity([1, 1], [frozenset()] * 2, np.zeros(2), np.ones(2), 3)
    assert str(same.label_set_entropy) == "0.0"  # not -0.0
    with pytest.raises(ValueError, match="no answer"):
        diversity([], [], np.zeros(0), np.zeros(0), 3)


def test_a_fingerprint_by_hand():
    # CRC-32 and Adler-32 of "abc" and "", as their definitions' test vectors have them
    assert fingerprint("abc") == 0x352441C2_024D0127
    assert fingerprint("") == 0x00000000_00000001


def test_fingerprints_tell_texts_apart():
    texts = [f"text {i}" for i in range(2000)] + ["\ud800", ""]
    assert len({fingerprint(text) for text in texts}) == 2002


def test_all_labels_from_the_supports_alone():
    """CheXpert's 500 test studies: 0.291 macro and 0.332 micro. By hand the micro value: 1,392
    positives in all, so 2 x 1392 / (500 x 14 + 1392) = 2784 / 8392 = 0.33174.
    """
    supports = [62, 253, 151, 264, 8, 78, 29, 11, 153, 9, 104, 4, 5, 261]
    scores = all_labels_scores(supports, 500)
    assert scores["micro_f1"] == pytest.approx(2784 / 8392)
    assert (round(scores["micro_f1"], 3), round(scores["macro_f1"], 3)) == (0.332, 0.291)
    targets = np.arange(500)[:, None] < np.array(supports)  # any data with these supports
    everything = np.ones_like(targets)
    assert scores["macro_f1"] == pytest.approx(macro(targets, everything))
    assert scores["micro_f1"] == pytest.approx(f1_score(targets, everything, average="micro"))
