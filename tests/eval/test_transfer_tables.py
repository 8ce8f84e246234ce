"""Protect the numbers of the transfer study: cells, scores, intervals and verdicts.

Run: pytest tests/eval/test_transfer_tables.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, roc_auc_score

from data.examples import Example
from data.labels import LABELS, NIH_NINE
from data.predictions import Prediction
from eval.votes import vote_predictions
from rl.rewards import HardReward
from tests.helpers.benchmarks import benchmark_module
from tests.helpers.repository import ROOT

ABROAD_LABELS = tuple(label for label in LABELS if label in NIH_NINE)


@pytest.fixture(scope="module")
def tables():
    with benchmark_module("transfer_tables") as module:
        yield module


@pytest.fixture(scope="module")
def cells(tables):
    with benchmark_module("transfer_cells") as module:
        yield module


def example(number: int, labels: tuple[str, ...], evaluated: tuple[str, ...] = LABELS) -> Example:
    return Example(
        id=f"e{number}",
        patient_id=f"p{number}",
        image="x.png",
        image_root=Path(),
        labels=labels,
        dataset="demo",
        evaluated_labels=evaluated,
    )


def prediction(of: Example, completion: str, sample: int = 0) -> Prediction:
    return Prediction.of_example(
        of,
        prompt="demo",
        completion=completion,
        completion_length=20,
        answer_format="think_solution",
        extra={"sample": sample},
    )


def said(*labels: str) -> str:
    return f"<think>Seen.</think><solution>{', '.join(labels)}</solution>"


# ---- cells ---------------------------------------------------------------------------------------
def test_an_answer_is_five_digits(cells):
    """Edema is the sixth of the 14 labels, so bit 5: 0x20. No Finding is the first: 0x01."""
    image = example(0, ())
    rows = [
        prediction(image, said("Edema")),  # valid: 8
        prediction(image, said("No Finding", "Gout", "Flu")),  # valid, two unknown: 8 + 2
        prediction(image, "I see nothing."),
        prediction(image, "<solution>Edema</solution>"),  # read, but not strict
    ]
    assert cells.pack(rows) == "80020" + "a0001" + "00000" + "00020"


def test_what_is_packed_comes_back(cells):
    rows = [prediction(example(0, ()), said(*LABELS[1:5], "Gout")), prediction(example(1, ()), "")]
    answers = cells.unpack(cells.pack(rows))
    assert [[LABELS[k] for k in np.flatnonzero(row)] for row in answers.said] == [
        list(LABELS[1:5]),
        [],
    ]
    assert answers.valid.tolist() == [True, False] and answers.unknown.tolist() == [1, 0]


def test_half_an_answer_is_refused(cells):
    with pytest.raises(ValueError, match="7 digits are no whole number of answers of 5"):
        cells.unpack("8002080")


def test_truth_keeps_what_a_set_evaluates(cells, tmp_path):
    sets = {
        "here": [example(0, ("Edema", "Fracture"))],
        "there": [example(0, ("Edema", "Fracture"), ABROAD_LABELS)],
    }
    cells.write_truth(sets, tmp_path)
    truth = cells.read_truth(tmp_path)
    assert [LABELS[k] for k in np.flatnonzero(truth["here"].true[0])] == ["Edema", "Fracture"]
    assert [LABELS[k] for k in np.flatnonzero(truth["there"].true[0])] == ["Edema"]
    assert truth["here"].evaluated.all() and truth["there"].evaluated.sum() == 9


# ---- scores --------------------------------------------------------------------------------------
def random_study(cells, count: int, seed: int, evaluated: tuple[str, ...] = LABELS):
    """Make random images and four samples of each, some in no form -> (examples, [4][count])."""
    rng = np.random.default_rng(seed)
    examples = [
        example(i, tuple(rng.choice(LABELS, rng.integers(0, 4), replace=False)), evaluated)
        for i in range(count)
    ]
    samples = []
    for k in range(4):
        texts = [
            rng.choice(
                [
                    said(*rng.choice(LABELS, rng.integers(1, 4), replace=False)),
                    said(*rng.choice(LABELS, 2, replace=False), "Gout"),
                    "nothing",
                    said(*one.labels or ("No Finding",)),
                ]
            )
            for one in examples
        ]
        samples.append([prediction(one, str(t), k) for one, t in zip(examples, texts, strict=True)])
    return examples, samples


@pytest.mark.parametrize("evaluated", [LABELS, ABROAD_LABELS], ids=["fourteen", "nine"])
def test_scores_are_those_of_the_product_and_of_scikit_learn(cells, tables, tmp_path, evaluated):
    examples, samples = random_study(cells, 40, seed=3, evaluated=evaluated)
    cells.write_truth({"x": examples}, tmp_path)
    truth = cells.read_truth(tmp_path)["x"]
    unpacked = [cells.unpack(cells.pack(rows)) for rows in samples]
    scored = tables.Scored.of(unpacked[0], unpacked, truth)

    function = HardReward(length_penalty=0.0, min_length=0)
    wanted = np.mean([[function(p.answer, p.target, 20).total for p in s] for s in samples], 0)
    np.testing.assert_allclose(scored.rewards, wanted)

    columns = [k for k in range(14) if LABELS[k] in NIH_NINE]
    true = np.array([[LABELS[k] in one.target.labels for k in columns] for one in examples])
    answered = np.array([[LABELS[k] in p.answer.labels for k in columns] for p in samples[0]])
    once = np.ones((1, 40))
    for average, measure in (("macro", tables.macro_f1), ("micro", tables.micro_f1)):
        expected = f1_score(true, answered, average=average, zero_division=0)
        assert measure(scored, once)[0] == pytest.approx(expected)

    shares = np.mean(
        [[[LABELS[k] in p.answer.labels for k in columns] for p in s] for s in samples], 0
    )
    areas = [roc_auc_score(true[:, k], shares[:, k]) for k in range(9) if 0 < true[:, k].sum() < 40]
    assert tables.macro_auroc(scored) == pytest.approx(np.mean(areas))


def test_the_vote_is_that_of_the_product(cells, tables):
    _, samples = random_study(cells, 30, seed=5)
    voted = tables.vote([cells.unpack(cells.pack(rows)) for rows in samples])
    expected = vote_predictions([row for rows in zip(*samples, strict=True) for row in rows])
    # where fewer than half could be read no label has half of the samples
    assert not all(one.answer.parsed for one in expected)
    for row, one in zip(voted.said, expected, strict=True):
        assert {LABELS[k] for k in np.flatnonzero(row)} == set(one.answer.labels)


def test_a_weight_counts_an_image_twice(cells, tables, tmp_path):
    """Rewards 1 and 0: once each 1/2, the first one twice 2/3, as F1 of Edema.

    Edema alone counts: hits 2, said + true 2 + 2 + 1, F1 = 4/5. Once each: hits 1, said + true 3.
    """
    examples = [example(0, ("Edema",)), example(1, ("Edema",))]
    cells.write_truth({"x": examples}, tmp_path)
    rows = [prediction(examples[0], said("Edema")), prediction(examples[1], "nothing")]
    answers = cells.unpack(cells.pack(rows))
    scored = tables.Scored.of(answers, [answers], cells.read_truth(tmp_path)["x"])
    weights = np.array([[1.0, 1.0], [2.0, 1.0]])
    np.testing.assert_allclose(tables.reward(scored, weights), [1 / 2, 2 / 3])
    edema = np.array([label == "Edema" for label in LABELS])
    np.testing.assert_allclose(tables.macro_f1(scored, weights, edema), [2 / 3, 4 / 5])


# ---- a small study whose numbers are known -------------------------------------------------------
@pytest.fixture
def small(cells, tables, tmp_path):
    """Make cells of two seeds: 40 images of Edema a set, said by SFT everywhere, by GRPO at home.

    Abroad GRPO of seed 1 misses 20 of the 40, of seed 2 all. So its macro-F1 of nine labels there
    is (2 * 20 / 60) / 9 = 0.0741 and 0, against SFT's 1/9 = 0.1111.
    """
    sets = {
        name: [
            example(i, ("Edema",), ABROAD_LABELS if name == tables.ABROAD else LABELS)
            for i in range(40)
        ]
        for name in tables.SETS
    }
    cells.write_truth(sets, tmp_path)
    right, wrong = "80020", "80000"
    for seed in (1, 2):
        for arm in tables.ARMS:
            if arm in (tables.BASE, tables.VOTE):
                continue
            misses = (20 if seed == 1 else 40) if arm == tables.GRPO else 0
            answers = {}
            for name in tables.SETS:
                missed = misses if name == tables.ABROAD else 0
                text = wrong * missed + right * (40 - missed)
                answers[name] = {"greedy": text, "samples": [text] * 4, "swapped": wrong * 40}
            write(cells, arm, seed, answers, tmp_path)
    nothing = {n: {"greedy": "00000" * 40, "samples": ["00000" * 40] * 4} for n in tables.SETS}
    write(cells, tables.BASE, None, nothing, tmp_path)
    return tables.Study([1, 2], tmp_path)


def write(cells, arm, seed, answers, place):
    cells.write_json(cells.cell_file(arm, seed, place), {"answers": answers})


def test_a_comparison_of_two_seeds_by_hand(tables, small):
    """Differences -0.037037 and -0.111111: mean -0.074074, error 0.037037, t of one degree 12.706.

    So the interval by seed is -0.074 -+ 0.4706. All images drawn anew still show a loss.
    """
    comparison = tables.Comparison.of_arms(tables.GRPO, tables.SFT, tables.ABROAD)
    result = small.compare(comparison)
    assert result.by_each == pytest.approx((-1 / 27, -1 / 9))
    assert result.difference == pytest.approx(-2 / 27)
    assert result.by_seed == pytest.approx(
        (-2 / 27 - 12.7062 / 27, -2 / 27 + 12.7062 / 27), abs=1e-4
    )
    assert result.by_image[0] < -2 / 27 < result.by_image[1] < 0
    assert result.p == pytest.approx(2 * stats.t.sf(2, 1))
    assert result.verdict(result.p) == "open"


def test_the_drawn_difference_is_as_wide_as_the_binomial(tables, small):
    """Seed 1's F1 is a function of the share m of missed images: 2 (1 - m) / (2 - m), slope -8/9.

    The share's standard error is sqrt(1/4 / 40) = 0.0791. Seed 2 misses all, without an error. So
    the mean of both has 0.0791 * 8/9 / 9 / 2 = 0.0039.
    """
    comparison = tables.Comparison.of_arms(tables.GRPO, tables.SFT, tables.ABROAD)
    drawn = small.values(comparison, drawn=True).mean(0)
    assert drawn.std() == pytest.approx(0.0039, rel=0.1)


def test_the_gap_of_an_arm_and_the_share_closed(tables, small):
    """GRPO loses 2/27 = 0.074 abroad, the others nothing. By seed it is not clear: no share."""
    rows = {row[0]: row for row in tables.gap_table(small)}
    assert rows["GRPO, hard"][3].startswith("+0.074") and rows["SFT"][3].startswith("+0.000")
    assert {row[4] for row in rows.values()} == {""}


def test_the_blind_check_reads_the_swapped_answers(tables, small):
    rows = tables.blind_table(small)
    # the wrong answer says nothing where Edema is true: reward 0, as "No Finding" to every image
    assert rows[0] == ["SFT", tables.HOME, "1.000", "0.000", "0.000"]


def test_the_table_in_short_by_hand(tables, small):
    """SFT is above GRPO by 2/27 at B, by the hull of both intervals -0.396 to +0.545: open.

    Levels of GRPO: macro-F1 1/9 of the nine labels at A and A2, (2/27 + 0) / 2 = 1/27 at B.
    At A2 and A no image differs, so the differences are 0 without an interval.
    """
    rows = {row[0]: row[1:] for row in tables.summary_table(small)}
    assert rows["GRPO, hard"] == ["1.000", "0.111", "0.111", "0.037", "", "", ""]
    nothing = "+0.000 (+0.000 to +0.000) none"
    abroad = f"+0.074 ({2 / 27 - 12.7062 / 27:+.3f} to {2 / 27 + 12.7062 / 27:+.3f}) open"
    assert rows["SFT"] == ["1.000", "0.111", "0.111", "0.111", abroad, nothing, nothing]
    assert rows["base"][-3:] == rows['always "No Finding"'][-3:] == ["", "", ""]


def test_what_is_shown_is_what_the_cells_say(tables):
    """The tables in the repository are those of its cells, and the READMEs quote their rows."""
    study = tables.Study(tables.whole_seeds([1, 2, 3, 4, 5]))
    text = (tables.PLACE / "TABLES.md").read_text(encoding="utf-8")
    assert text == tables.tables(study)
    rows = tables.markdown(tables.SUMMARY, tables.summary_table(study))
    shown = (ROOT / "data/demo/README.md").read_text(encoding="utf-8")
    assert [row for row in rows if row not in shown] == []
    # the front door is narrow: levels, and what a remedy wins abroad
    short = ["|".join(row.split("|")[:7]) + "|" for row in rows]
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [row for row in short if row not in shown] == []


def test_all_tables_are_written(tables, small):
    text = tables.tables(small)
    assert "from the cells of seeds 1, 2" in text
    for title in (*tables.ARMS.values(), *(f"## {letter}." for letter in "LRMC")):
        assert title in text


def test_a_study_says_which_cell_is_missing(tables, small):
    with pytest.raises(FileNotFoundError, match="sft of seed 3 is not made yet"):
        tables.Study([3], small.place).scored("sft", 3, tables.HOME)
    assert tables.whole_seeds([1, 2, 3], small.place) == [1, 2]


# ---- verdicts ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("by_image", "by_seed", "p", "verdict"),
    [
        ((0.01, 0.05), (0.02, 0.04), 0.04, "gain"),
        ((-0.05, -0.01), (-0.04, -0.02), 0.04, "loss"),
        ((0.01, 0.05), (0.02, 0.04), 0.06, "open"),
        ((0.01, 0.05), (-0.001, 0.06), 0.04, "open"),
        ((-0.01, 0.019), (-0.019, 0.01), 0.9, "none"),
        ((-0.01, 0.021), (-0.019, 0.01), 0.9, "open"),
        # clear and small: it is told, not called none
        ((0.001, 0.01), (0.001, 0.01), 0.01, "gain"),
    ],
)
def test_the_rule_of_the_plan(tables, by_image, by_seed, p, verdict):
    result = tables.Result(0.0, by_image, by_seed, p, ())
    assert result.verdict(p) == verdict


def test_student_against_scipy(tables):
    values = np.array([0.01, 0.03, -0.01, 0.02, 0.04])
    (low, high), p = tables.student(values)
    expected = stats.ttest_1samp(values, 0.0)
    assert p == pytest.approx(expected.pvalue)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_one_seed_has_no_interval(tables):
    assert tables.student(np.array([0.3])) == ((-np.inf, np.inf), 1.0)


def test_constants_of_a_truth(cells, tables, tmp_path):
    """No Finding to an image of it and to one of Edema: rewards 1 and 0, F1 2/3 of one label."""
    cells.write_truth({"x": [example(0, ("No Finding",)), example(1, ("Edema",))]}, tmp_path)
    truth = cells.read_truth(tmp_path)["x"]
    levels = tables.levels(tables.constant(truth), truth.evaluated)
    named = dict(zip(tables.MEASURES, levels, strict=True))
    assert named["reward, T 0.8"] == 0.5 and named["AUROC, nine"] == 0.5
    assert named["macro-F1, all"] == pytest.approx(2 / 3 / 14)
