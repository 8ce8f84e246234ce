"""Protect sampling several answers to an image, their vote, and what both score.

Run: pytest tests/eval/test_votes.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.files import DataError, write_jsonl
from data.predictions import Prediction, read_predictions, write_predictions
from eval.evaluate import main
from eval.metrics import multilabel_scores
from eval.scores import answer_matrices, score
from eval.votes import (
    format_samples,
    is_sample,
    sample_scores,
    samples_by_image,
    samples_of_file,
    vote,
    vote_predictions,
)
from tests.helpers.reports import ABC, parsed, row


def said(*labels: str) -> str:
    return f"<think>x</think><solution>{', '.join(labels)}</solution>"


def samples(*completions: str, id: str = "r1", labels=("Edema",), patient="p", **fields) -> list:
    """Make the samples of one image, of 10, 11, 12, ... tokens."""
    return parsed(
        [
            row(
                completion,
                labels,
                id=id,
                patient=patient,
                **({"completion_length": 10 + n, "sample": n} | fields),
            )
            for n, completion in enumerate(completions)
        ]
    )


FAILED = "no idea"


# ---- vote ----------------------------------------------------------------------------------------
def test_labels_of_half_of_the_samples_win():
    voted = vote(
        samples(said("Fracture", "Edema"), said("Edema"), FAILED, said("Pneumonia", "nodule"))
    )
    # Edema 2 of 4: at least half. Fracture and Pneumonia 1 of 4. The failed sample counts as one.
    assert voted.completion == "<solution>Edema</solution>"
    assert voted.extra == {
        "vote_shares": {"Edema": 2 / 4, "Pneumonia": 1 / 4, "Fracture": 1 / 4},
        "num_generations": 4,
    }
    assert (voted.answer_format, voted.answer.labels, voted.answer.valid) == (
        "solution",
        ("Edema",),
        True,
    )
    assert voted.completion_length == 12  # 10, 11, 12, 13: 11.5, rounded to even
    assert (voted.id, voted.labels, voted.evaluated_labels, voted.prompt) == (
        "r1",
        ("Edema",),
        ABC,
        "short",
    )


@pytest.mark.parametrize(
    ("completions", "completion"),
    [
        # of three, two are needed: 2 x 1 < 3
        ((said("Edema"), said("Fracture"), said("Edema")), "<solution>Edema</solution>"),
        ((said("Edema"), said("Fracture"), said("Pneumonia")), "<solution></solution>"),
        # in CheXpert's order, however they are said
        (
            (said("Fracture", "Edema"), said("Fracture", "Edema")),
            "<solution>Edema, Fracture</solution>",
        ),
        # half of the samples are read, and they say that there is nothing
        ((said(), said(), FAILED, FAILED), "<solution></solution>"),
        # fewer are: the vote fails, and is not the answer "nothing"
        ((said("Edema"), FAILED, FAILED), ""),
        ((FAILED, FAILED), ""),
        # read, though not strictly in the form
        (("<solution>Edema</solution>", FAILED), "<solution>Edema</solution>"),
        # No Finding and a finding may both win: a vote may contradict itself, as an answer may
        (
            (said("No Finding"), said("Edema")),
            "<solution>No Finding, Edema</solution>",
        ),
    ],
)
def test_votes_by_hand(completions, completion):
    voted = vote(samples(*completions))
    assert voted.completion == completion
    assert voted.answer.parsed == voted.answer.valid == bool(completion)


def test_votes_of_unreadable_samples_do_not_score_on_images_without_labels():
    """An image of which nothing is true: an empty answer is right there, a failed one is not."""
    right = vote(samples(said(), said(), labels=()))
    failed = vote(samples(FAILED, FAILED, labels=()))
    assert score([right])["jaccard"] == 1 and score([right])["fail_rate"] == 0
    assert score([failed])["jaccard"] == 0 and score([failed])["fail_rate"] == 1


def test_votes_are_as_long_as_their_samples_on_average():
    """A reward with a length term then treats a vote as it treats a sample."""
    rows = [
        sample.with_extra(text_length=length)
        for sample, length in zip(samples(said(), said(), said()), (4, 5, 9), strict=True)
    ]
    voted = vote(rows)
    assert (voted.completion_length, voted.extra["text_length"]) == (11, 6)
    # unknown of one sample, unknown of the vote
    voted = vote([*rows[:2], *samples(said(), completion_length=None)])
    assert voted.completion_length is None and "text_length" not in voted.extra


def test_images_keep_their_order_and_samples_their_numbers():
    one, two = samples(said("Edema"), FAILED), samples(said(), said("Fracture"), id="r2")
    groups = samples_by_image([two[1], one[0], two[0], one[1]])
    assert groups == [two, one]
    assert [prediction.id for prediction in vote_predictions([*two, *one])] == ["r2", "r1"]
    assert all(map(is_sample, one)) and not is_sample(vote(one))


def test_incomplete_samples_are_named():
    rows = samples(FAILED, FAILED) + samples(FAILED, id="r2") + samples(*[FAILED] * 3, id="r3")
    with pytest.raises(DataError) as error:
        samples_by_image(rows, source="s.jsonl")
    assert error.value.problems == [
        "s.jsonl, id 'r2': has 1 samples, numbered 0; each image needs 2, numbered 0 to 1",
        "s.jsonl, id 'r3': has 3 samples, numbered 0, 1, 2; each image needs 2, numbered 0 to 1",
    ]
    with pytest.raises(DataError, match="numbered 0, 0; each image needs 2"):
        samples_by_image(samples(FAILED, FAILED, sample=0))
    with pytest.raises(DataError, match="holds no samples"):
        samples_by_image([])
    with pytest.raises(DataError, match="has 2 samples, numbered 0; each"):  # one row without
        samples_by_image(samples(FAILED) + parsed([row(FAILED, ())]))


def test_which_files_vote():
    plain = parsed([row(FAILED, ())])
    assert samples_of_file(plain, None, source="f") is None
    assert samples_of_file(plain, 1, source="f") is None
    with pytest.raises(DataError, match="f: holds one answer an image.*--num_generations 4 out"):
        samples_of_file(plain, 4, source="f")
    sampled = samples(FAILED, FAILED)
    assert samples_of_file(sampled, None, source="f") == [sampled]
    assert samples_of_file(sampled, 2, source="f") == [sampled]
    for k in (1, 3):
        with pytest.raises(DataError, match=f"f: holds 2 samples an image, not {k}; leave"):
            samples_of_file(sampled, k, source="f")
    rollouts = parsed([row(FAILED, ()) | {"step": s, "group": 0} for s in (0, 0, 2, 2)])
    assert samples_of_file(rollouts, None, source="f") is None
    assert samples_of_file(rollouts, 2, source="f") == [rollouts[:2], rollouts[2:]]
    with pytest.raises(DataError) as error:
        samples_of_file(rollouts, 4, source="f")
    assert error.value.problems == [
        f"f, id 'r1' at step {step}: has 2 samples; each image needs 4" for step in (0, 2)
    ]
    # an image that a rollout drew twice has two groups
    drawn = parsed([row(FAILED, ()) | {"step": 0, "group": g} for g in (0, 0, 1, 1)])
    assert samples_of_file(drawn, 2, source="f") == [drawn[:2], drawn[2:]]
    for field in ("step", "group"):
        half = parsed([row(FAILED, (), id=f"r{n}") | {field: 0} for n in range(2)])
        with pytest.raises(DataError, match="f: holds one answer an image"):
            samples_of_file(half, 2, source="f")


def test_one_sample_votes_for_itself():
    (sample,) = samples(said("Edema"))
    assert vote([sample]).answer.labels == ("Edema",)


# ---- scores --------------------------------------------------------------------------------------
def three_images() -> list[Prediction]:
    return (
        samples(said("Edema"), said("Fracture"), labels=("Edema",))
        + samples(said("Edema"), said("Edema"), id="r2", labels=("Edema", "Fracture"), patient="q")
        + samples(FAILED, said("Pneumonia"), id="r3", labels=("Pneumonia",), patient="q")
    )


def test_mean_best_and_vote_by_hand():
    scores = sample_scores(three_images(), seed=3, resamples=200)
    assert scores["num_generations"] == 2
    # Jaccard of the first samples 1, 1/2, 0; of the second 0, 1/2, 1. The votes say Edema and
    # Fracture (1/2), Edema (1/2), Pneumonia (1).
    assert scores["mean"]["jaccard"] == pytest.approx(0.5)
    assert scores["best"]["jaccard"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert scores["vote_gain"]["jaccard"] == pytest.approx(2 / 3 - 0.5)
    # First samples: Edema TP 2, Fracture FN 1, Pneumonia FN 1: micro 4/6; F1 1, 0, 0: macro 1/3.
    # Second: Edema TP 1, FN 1; Fracture FP 1, FN 1; Pneumonia TP 1: micro 4/7; 2/3, 1, 0: 5/9.
    assert scores["mean"]["micro_f1"] == pytest.approx((4 / 6 + 4 / 7) / 2)
    assert scores["mean"]["macro_f1"] == pytest.approx((1 / 3 + 5 / 9) / 2)
    # Best: Edema, Edema, Pneumonia: TP 3, FN 1. Votes: TP 3, FP 1 (Fracture), FN 1 (Fracture).
    assert scores["best"]["micro_f1"] == pytest.approx(6 / 7)
    assert scores["best"]["macro_f1"] == pytest.approx(2 / 3)
    assert scores["vote_gain"]["micro_f1"] == pytest.approx(6 / 8 - (4 / 6 + 4 / 7) / 2)
    assert scores["vote_gain"]["macro_f1"] == pytest.approx(2 / 3 - (1 / 3 + 5 / 9) / 2)
    # one of six samples failed, none has an unknown entry; 10 and 11 tokens
    assert scores["mean"]["fail_rate"] == scores["mean"]["invalid_rate"] == pytest.approx(1 / 6)
    assert scores["mean"]["unknown_rate"] == scores["mean"]["no_label_rate"] == 0
    assert scores["mean"]["completion_length"] == 10.5
    # Two patients: p alone has mean Jaccard 1/2, best 1, gain 0; q alone 1/2, 3/4, 1/4.
    assert scores["intervals"]["mean"]["jaccard"] == pytest.approx([0.5, 0.5])
    assert scores["intervals"]["best"]["jaccard"] == pytest.approx([0.75, 1.0])
    assert scores["intervals"]["vote_gain"]["jaccard"] == pytest.approx([0.0, 0.25])


def test_samples_have_the_jaccard_index_and_the_rates_of_answers():
    """0 for an answer that is not in the format, and unknown entries enlarge the union."""
    rows = (
        samples("<solution>Edema</solution>", said("Edema", "mass"))
        + samples(said("mass"), said("mass", "nodule"), id="r2", patient="q")
        + samples(said("Edema"), said("Edema"), id="r3", patient="s")
    )
    scores = sample_scores(rows, resamples=100)
    # first samples: 0 (no <think>), 0, 1; second: 1/2, 0, 1
    assert scores["mean"]["jaccard"] == pytest.approx((0 + 0 + 1 + 1 / 2 + 0 + 1) / 6)
    assert scores["best"]["jaccard"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    # votes: Edema, none (no sample could be read), Edema
    assert scores["vote_gain"]["jaccard"] == pytest.approx(2 / 3 - 2.5 / 6)
    # patient p alone has 1/4, q alone 0, s alone 1
    assert scores["intervals"]["mean"]["jaccard"][0] == 0
    assert scores["intervals"]["mean"]["jaccard"][1] <= 1
    # of six samples: three with an unknown entry, two of them without any label
    assert scores["mean"]["unknown_rate"] == 3 / 6
    assert scores["mean"]["no_label_rate"] == scores["mean"]["fail_rate"] == pytest.approx(2 / 6)
    # the form of those is sound
    assert scores["mean"]["invalid_rate"] == pytest.approx(1 / 6)


def test_the_vote_of_equal_samples_gains_nothing():
    rows = [
        sample
        for n, text in enumerate((said("Edema"), said("Fracture"), FAILED))
        for sample in samples(text, text, text, id=f"r{n}", patient=f"p{n}")
    ]
    scores = sample_scores(rows, resamples=50)
    plain = score(vote_predictions(rows))
    assert scores["mean"]["jaccard"] == scores["best"]["jaccard"] == plain["jaccard"]
    assert scores["mean"]["macro_f1"] == pytest.approx(plain["macro"]["f1"])
    assert list(scores["vote_gain"].values()) == pytest.approx([0.0] * 3, abs=1e-12)
    assert scores["intervals"]["vote_gain"]["macro_f1"] == pytest.approx([0.0, 0.0], abs=1e-12)


def test_intervals_are_those_of_patients_drawn_again():
    """Against a draw of patients written out, on 40 images of 10 patients with random answers."""
    rng = np.random.default_rng(5)
    rows = []
    for n in range(40):
        texts = [said(*(label for label in ABC if rng.random() < 0.5)) for _ in range(2)]
        true = tuple(label for label in ABC if rng.random() < 0.5)
        rows += samples(*texts, id=f"r{n}", labels=true, patient=f"p{n % 10}")
    low, high = sample_scores(rows, seed=1, resamples=2000)["intervals"]["vote_gain"]["macro_f1"]
    groups = samples_by_image(rows)
    arrays = [answer_matrices([group[j] for group in groups], ABC) for j in (0, 1)]
    voted = answer_matrices([vote(group) for group in groups], ABC)
    gains = []
    for _ in range(1000):
        images = np.concatenate([np.arange(p, 40, 10) for p in rng.integers(0, 10, 10)])
        mean, *_ = (
            np.mean(
                [
                    multilabel_scores(one.targets[images], one.predicted[images], ABC)["macro"][
                        "f1"
                    ]
                    for one in arrays
                ]
            ),
        )
        vote_f1 = multilabel_scores(voted.targets[images], voted.predicted[images], ABC)
        gains.append(vote_f1["macro"]["f1"] - mean)
    # 2,000 and 1,000 draws of a statistic with SD of some .04: ends within .01
    assert [low, high] == pytest.approx(np.percentile(gains, [2.5, 97.5]), abs=0.012)


def test_defaults_are_the_documented_ones():
    rows = [
        sample
        for n in range(9)
        for sample in samples(said("Edema"), said(*ABC[: n % 3]), id=f"r{n}", patient=f"p{n}")
    ]
    assert sample_scores(rows) == sample_scores(rows, seed=0, resamples=1000)
    assert sample_scores(rows) != sample_scores(rows, seed=1, resamples=1000)
    with pytest.raises(DataError, match="^samples: holds no samples to vote"):
        samples_by_image([])


def test_table_of_samples():
    scores = {"samples": sample_scores(three_images(), seed=3, resamples=200)}
    # micro-F1 of patient p alone (1 + 0) / 2, of q alone (2/4 + 4/5) / 2, of both 4/6 and 4/7;
    # macro-F1 of p alone (1/3 + 0) / 2, of q alone (1/3 + 2/3) / 2, of both 1/3 and 5/9
    table = """\
site                 Jaccard                  micro-F1                 macro-F1
  one sample         0.500 (0.500-0.500)      0.619 (0.500-0.650)      0.444 (0.167-0.500)
  vote - one sample  +0.167 (+0.000..+0.250)  +0.131 (+0.131..+0.167)  +0.222 (+0.167..+0.222)
  best of 2          0.833 (0.750-1.000)      0.857 (0.800-1.000)      0.667 (0.333-0.667)
"""
    note = "(95 % interval by patient); the row of the data set above is the vote; best of k knows"
    both = table + table.replace("site ", "other", 1) + f"{note} the truth"
    assert format_samples({"site": scores, "greedy": {}, "other": scores}) == both
    assert max(map(len, format_samples({"a" * 90: scores}).splitlines())) <= 100
    assert format_samples({"greedy": {}}) == ""


# ---- command, without a model --------------------------------------------------------------------
def test_samples_are_scored_again_and_vote_again(tmp_path: Path, capsys):
    file = tmp_path / "samples-site.jsonl"
    write_predictions(file, three_images())
    assert main(["--predictions", f"site={file}", "--output_dir", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "predictions-site.jsonl",
        "samples-site.jsonl",
        "scores-site.json",
    ]
    assert read_predictions(out / "predictions-site.jsonl") == vote_predictions(three_images())
    assert (out / "samples-site.jsonl").read_text() == file.read_text()
    scores = json.loads((out / "scores-site.json").read_text())
    assert scores["samples"] == sample_scores(three_images())
    # votes: Edema and Fracture (1/2), Edema (1/2), Pneumonia (1)
    assert scores["n"] == 3 and scores["jaccard"] == pytest.approx(2 / 3)
    assert "vote - one sample" in capsys.readouterr().out

    # the first image alone, though the file has two rows for it
    command = ["--predictions", f"site={file}", "--max_samples", "1"]
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    assert len(read_predictions(tmp_path / "one" / "samples-site.jsonl")) == 2
    assert main([*command, "--num_generations", "3", "--output_dir", str(tmp_path / "no")]) == 2
    assert "holds 2 samples an image, not 3" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    # what is there stays there, samples too
    (out / "predictions-site.jsonl").unlink(), (out / "scores-site.json").unlink()
    assert main(["--predictions", f"site={file}", "--output_dir", str(out)]) == 2
    assert "samples-site.jsonl exists and nothing is overwritten" in capsys.readouterr().err


def test_groups_of_a_run_vote_where_it_is_asked(tmp_path: Path):
    texts = (said("Edema"), said("Fracture"), said("Edema"), said("Edema"))
    rows = [
        {"step": 2 * (i // 2), "group": 0} | row(text, ("Edema",)) | {"reward": 1.0}
        for i, text in enumerate(texts)
    ]
    write_jsonl(tmp_path / "completions.jsonl", rows)
    command = ["--predictions", f"a={tmp_path / 'completions.jsonl'}"]
    assert main([*command, "--output_dir", str(tmp_path / "each")]) == 0
    assert json.loads((tmp_path / "each" / "scores-a.json").read_text())["n"] == 4
    command += ["--num_generations", "2"]
    assert main([*command, "--output_dir", str(tmp_path / "votes")]) == 0
    votes = read_predictions(tmp_path / "votes" / "predictions-a.jsonl")
    # one image, drawn at steps 0 and 2: two votes
    assert [(vote.id, vote.extra["step"], vote.answer.labels) for vote in votes] == [
        ("r1", 0, ("Edema", "Fracture")),
        ("r1", 2, ("Edema",)),
    ]
    assert "reward" not in votes[0].extra


def test_a_file_numbers_its_samples_once(tmp_path: Path):
    rows = [row(FAILED, ()) | {"sample": number} for number in (0, 0, -1, True)]
    write_jsonl(tmp_path / "samples-a.jsonl", rows)
    with pytest.raises(DataError) as error:
        read_predictions(tmp_path / "samples-a.jsonl")
    file = tmp_path / "samples-a.jsonl"
    assert error.value.problems == [
        f"{file}, line 2: id 'r1', sample 0, is also on line 1; number its samples",
        f"{file}, line 3: field 'sample' is -1; it must be a number from 0 up to 1,000,000,000",
        f"{file}, line 4: field 'sample' is true; it must be a number from 0 up to 1,000,000,000",
    ]
