"""Protect what a run says at its end: the sampled reward, one sentence, one table.

Checked by hand: the reward of the first against the last quarter with its interval by patient, the
words of the sentence, and that all commands print the same columns.

Run: pytest tests/eval/test_run_summary.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.files import write_jsonl
from eval.end_table import end_table, row_of, stage_title
from eval.folders import load_entry, write_results
from eval.run_summary import end_of_run, plain_sentence, sampled_reward, summarize
from eval.scores import format_scores, score
from eval.since_start import keep_start, since_start
from tests.helpers.reports import (
    AFTER,
    BEFORE,
    NIH_AFTER,
    NIH_BEFORE,
    answer,
    parsed,
    row,
    save,
    training_run,
)


def rollouts(run: Path, rewards: list[list[tuple[str, float]]]) -> Path:
    """Write completions.jsonl: a list of (patient, reward) for each rollout, two steps apart."""
    run.mkdir(exist_ok=True)
    rows = [
        {"step": 2 * k + 1, "group": 0, "id": patient, "patient_id": patient, "reward": reward}
        for k, rollout in enumerate(rewards)
        for patient, reward in rollout
    ]
    write_jsonl(run / "completions.jsonl", rows)
    return run


# ---- sampled reward ------------------------------------------------------------------------------
def test_the_first_quarter_against_the_last_by_hand(tmp_path):
    # Nine rollouts: a quarter is two. First (0 + 1 + 0) / 3, last (1 + 1 + 0 + 1) / 4.
    middle = [[("m", 5.0)]] * 5
    run = rollouts(
        tmp_path / "run",
        [
            [("a", 0.0), ("a", 1.0)],
            [("b", 0.0)],
            *middle,
            [("c", 1.0), ("c", 1.0)],
            [("d", 0.0), ("d", 1.0)],
        ],
    )
    found = sampled_reward(run)
    assert found["rollouts"] == 2
    assert (found["first"], found["last"]) == (pytest.approx(1 / 3), 0.75)
    assert found["difference"] == pytest.approx(0.75 - 1 / 3)
    assert found["patients"] == 4  # a, b, c and d: m is in neither quarter


def test_its_interval_is_by_patient_not_by_completion(tmp_path):
    """Completions of one patient are all alike here, so 40 patients are 40 draws, not 320."""
    rng = np.random.default_rng(0)
    first = [(f"a{n}", value) for n, value in enumerate(rng.random(40).tolist())] * 8
    last = [(f"b{n}", value) for n, value in enumerate(rng.random(40).tolist())] * 8
    low, high = sampled_reward(rollouts(tmp_path / "run", [first, last]))["interval"]
    # The mean of 40 uniform draws has a standard deviation of sqrt(1/12/40) = 0.046, a difference
    # sqrt(2) times that, and +-1.96 of it is a width of 0.253. By completion it would be 0.089.
    assert high - low == pytest.approx(0.253, rel=0.15)


def test_a_patient_of_both_quarters_is_drawn_with_both(tmp_path):
    """Where every image has won 0.1 its own difficulty does not widen the interval."""
    level = np.random.default_rng(1).random(30).tolist()
    first = [(f"p{n}", value) for n, value in enumerate(level)]
    last = [(patient, value + 0.1) for patient, value in first]
    found = sampled_reward(rollouts(tmp_path / "run", [first, last]))
    assert found["interval"] == pytest.approx([0.1, 0.1])


def test_runs_with_less_than_two_rollouts(tmp_path):
    assert sampled_reward(tmp_path) is None
    one = rollouts(tmp_path / "one", [[("a", 0.5), ("b", 1.0)]])
    assert sampled_reward(one) == {"first": 0.75, "rollouts": 1}
    assert plain_sentence(sampled_reward(one), [], {}) == "sampled reward 0.750 (one rollout)"
    with (one / "completions.jsonl").open("a") as file:
        file.write('{"step": 3, "patient_id": "a", "rew')  # torn
    assert sampled_reward(one) == {"first": 0.75, "rollouts": 1}
    (tmp_path / "none").mkdir()
    (tmp_path / "none/completions.jsonl").write_text("")
    assert sampled_reward(tmp_path / "none") is None
    # Patients of one quarter each: draws that miss a quarter say nothing and are left out.
    two = rollouts(tmp_path / "two", [[("a", 0.5)], [("b", 1.0)]])
    assert sampled_reward(two)["interval"] == [0.5, 0.5]


# ---- sentence ------------------------------------------------------------------------------------
REWARD = {"first": 0.658, "last": 0.692, "difference": 0.034, "interval": [0.012, 0.056]} | {
    "patients": 64
}


UNCLEAR = (0.01, -0.02, 0.04)


def moved(
    name: str,
    macro: tuple[float, float, float] = UNCLEAR,
    jaccard: tuple[float, float, float] = UNCLEAR,
    *,
    n: int = 100,
    patients: int = 100,
    labels: int = 14,
    shared: tuple[float, float, float] | None = None,
) -> dict:
    """Make a row of evaluations.jsonl out of changes, each with its low and high.

    shared: of macro-F1 on nine shared labels.
    """
    found = {"macro_f1": macro, "jaccard": jaccard, "macro_f1_shared": shared}
    changes = {
        name: {"difference": one[0], "interval": list(one[1:])}
        for name, one in found.items()
        if one is not None
    }
    row = {"dataset": name, "n": n, "num_patients": patients, "num_labels": labels}
    return row | ({"shared_labels": [9, 9]} if shared else {}) | {"since_start": changes}


def test_the_sentence_of_a_run_without_a_clear_change():
    silenced = {"site-a": ["Pleural Other", "Fracture"], "site-b": []}
    assert plain_sentence(REWARD, [moved("site-a"), moved("site-b")], silenced) == (
        "sampled reward rose 0.658 -> 0.692 (first against last quarter, +0.034, 95 % +0.012 to"
        " +0.056); greedy Jaccard and macro-F1: no clear change anywhere; n = 100; silenced:"
        " Pleural Other, Fracture (site-a)"
    )


def test_the_sentence_of_a_run_that_gained_its_reward_and_lost_transfer():
    """Jaccard, which the reward is made of, comes before macro-F1, home before the others."""
    rows = [
        moved("site-a", jaccard=(0.073, 0.028, 0.116), shared=(-0.03, -0.07, 0.01)),
        moved("site-a2", jaccard=(-0.099, -0.157, -0.043)),
        moved("site-b", jaccard=(-0.038, -0.076, -0.002), labels=9),
    ]
    assert plain_sentence(REWARD, rows, {}).split("; ")[1:3] == [
        "greedy Jaccard rose at home (site-a) +0.073 (+0.028 to +0.116), fell on site-a2 -0.099"
        " (-0.157 to -0.043), on site-b, 9 labels -0.038 (-0.076 to -0.002)",
        "greedy macro-F1: no clear change anywhere",
    ]


def test_a_fall_at_home_is_said_as_plainly_on_all_labels_and_on_the_shared_ones():
    rows = [
        moved("site-a", (-0.041, -0.073, -0.009), shared=(-0.03, -0.07, 0.01)),
        moved("site-a2", (0.05, 0.01, 0.09)),
        moved("site-b", (-0.06, -0.102, -0.018), labels=9),
    ]
    assert plain_sentence(None, rows, {}).split("; ")[:2] == [
        "greedy Jaccard: no clear change anywhere",
        "greedy macro-F1 rose on site-a2 +0.050 (+0.010 to +0.090), fell at home (site-a) -0.041"
        " (-0.073 to -0.009), on site-b, 9 labels -0.060 (-0.102 to -0.018), no clear change at"
        " home on 9 shared labels",
    ]


def test_a_reward_within_its_noise_and_one_that_fell():
    unclear = plain_sentence(REWARD | {"interval": [-0.01, 0.08]}, [], {})
    assert unclear == (
        "sampled reward 0.658 -> 0.692, no clear change (first against last quarter, +0.034, 95 %"
        " -0.010 to +0.080)"
    )
    fell = plain_sentence(REWARD | {"interval": [-0.08, -0.01]}, [], {})
    assert fell.startswith("sampled reward fell 0.658 -> 0.692 (first")
    # a reward of under 20 patients has no interval to be trusted either
    few = plain_sentence(REWARD | {"patients": 19}, [], {})
    assert few.startswith("sampled reward 0.658 -> 0.692, no clear change (")


def test_a_run_that_has_gone_back_says_which_step_is_kept(run):
    words = "; greedy Jaccard and macro-F1: no clear change; n = 100; silenced: no label"
    start = plain_sentence(None, [moved("a")], {}, (0, 400))
    assert start == f"kept: step 0 of 400 (the start: nothing was better){words}"
    assert plain_sentence(None, [moved("a")], {}, (200, 400)) == f"kept: step 200 of 400{words}"
    # the scores of the folder tell the step that answered, evaluations.jsonl the last one
    for name, answers in (("home", AFTER), ("nih", NIH_AFTER)):
        write_results(run, name, answers, score(answers) | {"step": 4}, overwrite=True)
    assert "; kept: step 4 of 8; " in summarize(run, ["home", "nih"])["sentence"]


def test_of_many_sets_only_what_moved_has_its_numbers():
    rows = [moved(f"s{i}") for i in range(5)]
    rows.insert(3, moved("lost", (-0.05, -0.09, -0.01), n=80))
    assert plain_sentence(None, rows, {}).split("; ")[1:] == [
        "greedy macro-F1 fell on lost -0.050 (-0.090 to -0.010), no clear change at home (s0), on"
        " s1, on s2, on s3, on s4",
        "n = 100 and 80",
        "silenced: no label",
    ]


def test_one_set_is_not_called_home():
    assert plain_sentence(None, [moved("val", (0.05, 0.01, 0.09))], {}).split("; ")[:2] == [
        "greedy Jaccard: no clear change",
        "greedy macro-F1 rose on val +0.050 (+0.010 to +0.090)",
    ]
    # the home set could not be compared with its start: what is left is abroad
    rows = [moved("a") | {"since_start": {}}, moved("b", (0.05, 0.01, 0.09))]
    assert " rose on b +0.050" in plain_sentence(None, rows, {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([(0.01, 0.05, 100)], "greedy macro-F1 rose on s0 +0.000 (+0.010 to +0.050); n = 100"),
        # an interval that touches 0
        ([(0.0, 0.05, 25596)], "greedy Jaccard and macro-F1: no clear change; n = 25,596"),
        # by patients, not by images: 100 images of 19 are too few, of 20 enough
        ([(0.01, 0.05, 100, 19)], "too few patients to tell (under 20): s0; n = 100"),
        (
            [(0.01, 0.05, 100, 20), (-0.05, -0.01, 100, 19)],
            "greedy macro-F1 rose at home (s0) +0.000 (+0.010 to +0.050); too few patients to tell"
            " (under 20): s1; n = 100",
        ),
    ],
)
def test_a_change_is_clear_where_its_interval_leaves_zero_out(changes, words):
    rows = [
        moved(f"s{i}", (0.0, *bounds[:2]), n=bounds[2], patients=(*bounds, 100)[3])
        for i, bounds in enumerate(changes)
    ]
    parts = plain_sentence(None, rows, {}).split("; ")
    told = [part for part in parts if not part.startswith("greedy Jaccard:")]
    assert "; ".join(told) == f"{words}; silenced: no label"


# ---- a whole run ---------------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path) -> Path:
    """Make a GRPO run, evaluated at steps 0, 4 and 8, at 4 with the answers of the start."""
    run = training_run(tmp_path / "run", "grpo")
    rollouts(run, [[("a", 0.25)], [("a", 0.75)]])
    save(run, home=BEFORE, nih=NIH_BEFORE)
    keep_start(run, ["home", "nih"])
    rows = [
        {"step": step} | row for step in (0, 4) for row in since_start(run, ["home", "nih"]).rows
    ]
    for name, answers in (("home", AFTER), ("nih", NIH_AFTER)):
        write_results(run, name, answers, score(answers), overwrite=True)
    rows += [{"step": 8} | row for row in since_start(run, ["home", "nih"]).rows]
    write_jsonl(run / "evaluations.jsonl", rows)
    return run


def test_the_end_of_a_run_is_a_sentence_and_a_table(run):
    text = end_of_run(run, ["home", "nih"], "checkpoint-4")
    assert max(map(len, text.splitlines())) <= 100
    sentence, _, table = text.partition("\n\n")
    # Macro-F1 by hand: home 4/3 / 14 = 0.095 to 37/15 / 14 = 0.176, on NIH's nine 2/27 to 1/5, nih
    # 2/9 to 2/27.
    sentence = " ".join(sentence.splitlines())
    assert sentence.startswith(
        "sampled reward 0.250 -> 0.750, no clear change (first against last quarter, +0.500, 95 %"
        " +0.500 to +0.500); too few patients to tell (under 20): home, nih; n = 4 and 3; silenced"
    )
    lines = table.splitlines()
    assert " ".join(lines[0].split()) == "data set / stage n Jaccard micro-F1 macro-F1 fail unknown"
    assert lines[1] == (
        "rollouts, sampled reward: 0.250 -> 0.750 +0.500 (+0.500 to +0.500), first and last quarter"
    )
    assert [line.split("  ")[1] for line in lines if line.startswith("  ") and "(" in line] == [
        *("start (0)", "best (4)", "last (8)") * 2
    ]
    last = next(line for line in lines if line.startswith("  last (8)"))
    assert last.split()[2:8] == ["4", "0.750", "+0.375", "0.800", "+0.356", "0.176"]
    below = lines[lines.index(last) + 1 :]
    assert below[0].startswith("    95 %")
    # the shared labels stand in the column of macro-F1
    assert below[1].split() == ["9", "shared", "+0.126"]
    assert below[1].index("+0.126") == last.index("0.176") and below[2].startswith("    95 %")
    start = next(line for line in lines if line.startswith("  start (0)"))
    assert start.split()[2:4] == ["4", "0.375"] and start.split()[4].startswith("(.")


def test_a_best_step_that_is_the_last_has_one_line(run):
    lines = end_of_run(run, ["home", "nih"], "checkpoint-8").splitlines()
    assert [line.split("  ")[1] for line in lines if line.startswith("  ") and "(" in line] == [
        *("start (0)", "best, last (8)") * 2
    ]


def test_a_vote_of_the_start_is_a_row_beside_grpo(run):
    # It answers home as GRPO does at the end, nih as the start: the changes are those by hand.
    def vote(folder: Path) -> None:
        for name, rows in (("home", AFTER), ("nih", NIH_BEFORE)):
            voted = {"samples": {"num_generations": 4}}
            write_results(folder, name, rows, score(rows) | voted)

    for name, rows in (("home", BEFORE), ("nih", NIH_BEFORE)):
        write_results(run, name, rows, score(rows), overwrite=True)
    keep_start(run, ["home", "nih"], vote)
    keep_start(run, ["home", "nih"], None)  # leaves it as it is
    text = end_of_run(run, ["home", "nih"], None).splitlines()
    home, nih = (line for line in text if "vote of 4" in line)
    assert home.split()[5:] == [
        *("4", "0.750", "+0.375", "0.800", "+0.356", "0.176", "+0.081"),
        *home.split()[-2:],
    ]
    assert nih.count("+0.000") == 3
    assert "start (0)" in text[text.index(home) - 1]
    # GRPO's own answers, not the vote's
    kept = json.loads((run / "summary.json").read_text())["rows"][0]
    assert kept["since_start"]["macro_f1"]["difference"] == 0


def test_the_sentence_is_kept_for_other_commands(run):
    printed = " ".join(end_of_run(run, ["home", "nih"], None).partition("\n\n")[0].splitlines())
    kept = json.loads((run / "summary.json").read_text())
    assert kept["sentence"] == printed and kept == summarize(run, ["home", "nih"])
    assert kept["sampled_reward"]["difference"] == 0.5
    assert kept["rows"][0]["since_start"]["macro_f1"]["difference"] == pytest.approx(17 / 15 / 14)
    # gain_shared and its error: what both sides have gained, for --metric_for_best_model
    assert set(kept["gaps"]) == {
        *("gap", "gap_se", "gap_shared", "gap_shared_se", "gain_shared", "gain_shared_se")
    }
    assert kept["silenced"] == {"home": [], "nih": []}


def test_only_what_the_run_has_silenced_is_in_the_sentence(tmp_path):
    # Edema and Fracture are true of 12 images. The start never says Fracture, the end neither.
    def rows(*said: str):
        return parsed(
            [
                row(answer(*said), ("Edema", "Fracture"), id=f"h{n}", patient=f"p{n}")
                for n in range(12)
            ]
        )

    run = training_run(tmp_path / "run", "grpo")
    save(run, home=rows("Edema"))
    keep_start(run, ["home"])
    write_results(run, "home", rows("Pneumonia"), score(rows("Pneumonia")), overwrite=True)
    summary = summarize(run, ["home"])
    assert summary["silenced"] == {"home": ["Edema"]}
    # all answers got worse, and yet 12 patients are too few for a verdict
    assert summary["sentence"] == (
        "too few patients to tell (under 20): home; n = 12; silenced: Edema (home)"
    )


def test_a_run_of_an_earlier_version_has_a_sentence_of_what_it_kept(run):
    (run / "start/predictions-nih.jsonl").unlink()
    (run / "evaluations.jsonl").unlink()
    text = end_of_run(run, ["home", "nih"], "checkpoint-4")
    words = " ".join(text.splitlines())
    assert "data set" not in text and "(under 20): home; n = 4" in words and "nih" not in words
    assert end_of_run(run, [], None).endswith("+0.500 to\n+0.500)")


# ---- the same columns everywhere -----------------------------------------------------------------
def test_all_commands_print_the_same_columns(run):
    scores = score(AFTER) | {"stage": "SFT (114)"}
    grpo = end_of_run(run, ["home", "nih"], None).partition("\n\n")[2].splitlines()[0]
    assert format_scores({"home": scores}).splitlines()[0].split() == grpo.split()
    assert format_scores({"home": scores}).splitlines()[2].startswith("  SFT (114)")


def test_silenced_labels_are_named_below_by_stage():
    rows = row_of(score(AFTER)) | {"unknown_rate": 0.25}
    lines = end_table(
        {
            "home": [
                ("start (0)", rows | {"silenced_labels": []}),
                ("last (8)", rows | {"silenced_labels": ["Fracture", "Pleural Other"]}),
            ]
        }
    )
    assert lines[-2:] == [
        "silenced labels (true 10 times or more, said less than a quarter of that):",
        "  home, last (8): Fracture, Pleural Other",
    ]
    assert lines[2].endswith("0.000    0.250")
    unmeasured = {key: value for key, value in rows.items() if key != "silenced_labels"}
    assert "silenced" not in "\n".join(end_table({"home": [("start (0)", unmeasured)]}))


def test_a_stage_is_named_by_what_answered(tmp_path):
    voted = {"samples": {"num_generations": 4}}
    sft = load_entry("sft", training_run(tmp_path / "a", "sft"))
    assert stage_title(sft) == "SFT" and stage_title(sft, voted) == "SFT + vote of 4"
    (tmp_path / "a/trainer_state.json").write_text(
        json.dumps({"best_model_checkpoint": "checkpoint-20", "global_step": 30})
    )
    assert stage_title(load_entry("x", tmp_path / "a")) == "SFT (20)"
    other = load_entry("gpt", save(tmp_path, home=AFTER))
    assert stage_title(other) == "answers" and stage_title(other, voted) == "vote of 4"
    again = {"run": {"settings": {"predictions": {"value": ["home=x"]}}}}
    write_results(tmp_path, "home", AFTER, score(AFTER) | again, overwrite=True)
    assert stage_title(load_entry("gpt", tmp_path)) == "answers"
