"""Protect the figures.

Checked: which runs go into which figure, what each says in words and in its caption, gaps, long and
odd names, files in both forms, and what is said without matplotlib or without anything to draw.
What a log holds and how it is smoothed is in test_curves.py.

Run: pytest tests/eval/test_figures.py
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from PIL import Image

import eval.plots
from data.files import write_jsonl
from engine.config import UsageError
from eval.curves import FIGURE_1, POLICY
from eval.figures import main, reliability_pictures, training_pictures
from eval.folders import load_entry, write_results
from eval.page import Picture, picture_file
from eval.plots import draw_macro_f1, draw_reliability, draw_training
from eval.probabilities import probability_scores
from eval.report import main as report_main
from tests.helpers.reports import AFTER, BEFORE, FEW, NIH_BEFORE, parsed, row, save, training_run


def pictures_of(*runs: Path) -> dict[str, Picture]:
    entries = [load_entry(run.name, run) for run in runs]
    return {picture.name: picture for picture in training_pictures(entries)}


def evaluations(*macro_f1: float, data_set: str = "site-a", every: int = 10) -> list[dict]:
    return [
        {"step": every * n, "split": "eval", "dataset": data_set, "macro_f1": value}
        for n, value in enumerate(macro_f1)
    ]


def test_each_run_goes_into_its_figure(tmp_path):
    runs = [
        training_run(tmp_path / "s1", "sft"),
        training_run(tmp_path / "s2", "sft"),
        training_run(tmp_path / "h", "grpo"),
        training_run(tmp_path / "n", "grpo", "nuanced"),
    ]
    pictures = pictures_of(*runs)
    assert list(pictures) == ["figure-1", "figure-2", "figure-3"]
    assert "of s1" in pictures["figure-1"].alt and "of s2" in pictures["figure-1"].alt
    assert "Validation loss of s1: 99 at 1, 99 at 1" in pictures["figure-1"].alt
    assert (
        "Total reward, as trained on of n" in pictures["figure-2"].alt
        and "of h" not in pictures["figure-2"].alt
    )
    # 30 values: b = 1 - 20/30 = 1/3. The first is 1/10 + 1 mod 3 as it was logged.
    assert "Total reward, as trained on of h: 1.1 at 1" in pictures["figure-3"].alt
    assert list(pictures_of(runs[3])) == ["figure-2"]


def test_a_reward_of_any_name_is_drawn_with_its_parts_and_its_hacking_chart(tmp_path):
    run = training_run(tmp_path / "mine", "grpo", "fbeta")
    rows = [
        {
            "step": step,
            "split": "train",
            "reward": 0.5,
            "rewards/fbeta/mean": 0.25,
            "rewards/fbeta/std": 0.1,
            "rewards/fbeta/fbeta": 0.35,
            "rewards/fbeta/format": -0.1,
            "monitors/trained_gain": 0.2,
            "monitors/other_gain": 0.0,
            "monitors/f1_gain": -0.3,
        }
        for step in (1, 2, 3)
    ]
    write_jsonl(run / "metrics.jsonl", rows)
    pictures = pictures_of(run)
    assert list(pictures) == ["training-fbeta", "reward-parts-fbeta", "reward-hacking"]
    assert "Mean fbeta reward of mine: 0.25 at 1, 0.25 at 3" in pictures["training-fbeta"].alt
    assert "Mean completion length: not logged." in pictures["training-fbeta"].caption
    # the parts, and neither mean nor standard deviation
    assert pictures["reward-parts-fbeta"].alt == (
        "Line charts over step. fbeta: 0.35 at 1, 0.35 at 3 of mine; format: -0.1 at 1, -0.1 at 3"
        " of mine."
    )
    # one reward: there is no other whose gain could be drawn
    assert "reward trained on: 0.2 at 1" in pictures["reward-hacking"].alt
    assert "other rewards" not in pictures["reward-hacking"].alt


@pytest.mark.parametrize(
    ("reward", "logged"), [("hard+0.5*mine:Brief", "mixture"), ("mine:Brief", "Brief")]
)
def test_a_mixture_and_a_reward_of_ones_own_are_drawn_by_what_is_logged(reward, logged, tmp_path):
    run = training_run(tmp_path / "mine", "grpo", reward)
    row = {"split": "train", f"rewards/{logged}/mean": 0.25, f"rewards/{logged}/a": 0.35}
    rows = [{"step": step, f"rewards/{logged}/b": -0.1} | row for step in (1, 2)]
    write_jsonl(run / "metrics.jsonl", rows)
    pictures = pictures_of(run)
    assert list(pictures) == [f"training-{reward}", f"reward-parts-{reward}"]
    drawn = pictures[f"training-{reward}"]
    assert f"Mean {reward} reward of mine: 0.25 at 1, 0.25 at 2" in drawn.alt
    parts = "a: 0.35 at 1, 0.35 at 2 of mine; b: -0.1 at 1, -0.1 at 2 of mine."
    assert set(pictures[f"reward-parts-{reward}"].alt.partition("step. ")[2][:-1].split("; ")) == (
        set(parts[:-1].split("; "))
    )


def test_names_that_no_file_can_have_get_a_file_each(tmp_path):
    runs = [
        training_run(tmp_path / name, "grpo", reward)
        for name, reward in (("a", "f_beta"), ("b", "hard*nuanced"), ("c", "hard/nuanced"))
    ]
    files = [picture_file(picture) for picture in pictures_of(*runs).values()]
    assert files[0] == "training-f_beta.svg" and len(set(files)) == 3
    assert all(re.fullmatch(r"training-hard-nuanced-[0-9a-f]{8}\.svg", file) for file in files[1:])


def test_two_hospitals_with_names_in_japanese_keep_their_pictures(tmp_path):
    (tmp_path / "sft").mkdir()
    save(tmp_path / "sft", **{"\u6771\u4eac": BEFORE, "\u5927\u962a": NIH_BEFORE})
    assert report_main([str(tmp_path / "sft"), "--output_dir", str(tmp_path / "out"), *FEW]) == 0
    files = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert [name[:6] for name in files] == ["labels", "labels", "macro-"]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert all(f"(pictures/{name})" in text for name in files)


def test_macro_f1_of_every_set_and_the_gap_with_its_band(tmp_path):
    run = training_run(tmp_path / "r", "grpo")
    gaps = [
        {"step": step, "split": "eval", "gap": 9.0, "gap_shared": gap, "gap_shared_se": error}
        for step, gap, error in ((0, 0.0, 0.0), (10, 0.02, 0.015))
    ]
    rows = evaluations(0.5, 0.6) + evaluations(0.4, 0.3, data_set="site-b") + gaps
    write_jsonl(run / "metrics.jsonl", rows)
    [(name, picture)] = pictures_of(run).items()
    assert name == "macro-f1"
    # the band is 2 x 0.015
    assert picture.alt == (
        "Line charts over step. site-a: 0.5 at 0, 0.6 at 10 of r; site-b: 0.4 at 0, 0.3 at 10 of"
        " r; gap_shared: 0 at 0, 0.02 at 10 +- 0.03 of r."
    )
    assert "on an axis from 0 to 1" in picture.caption and "Band: 2 standard" in picture.caption


def test_an_early_run_has_the_gap_that_it_logged_and_another_run_none(tmp_path):
    early, alone = (training_run(tmp_path / name, "grpo") for name in ("early", "alone"))
    write_jsonl(
        early / "metrics.jsonl",
        evaluations(0.5, 0.6) + [{"step": 10, "split": "eval", "gap": 0.04}],
    )
    write_jsonl(alone / "metrics.jsonl", evaluations(0.5))
    [picture] = pictures_of(early, alone).values()
    assert "gap: 0.04 at 10, 0.04 at 10 of early" in picture.alt
    assert "site-a: 0.5 at 0, 0.5 at 0 of alone" in picture.alt and "gap_shared:" not in picture.alt
    # without any gap the picture has one column, and its caption does not speak of gaps
    assert "Gap" not in pictures_of(alone)["macro-f1"].caption


class Seen(Exception):
    """Stop a drawing once its figure is there."""


def axes_of(monkeypatch, draw) -> list:
    """Return the axes of the figure that `draw()` makes."""

    def stop(figure, form):
        raise Seen(figure)

    monkeypatch.setattr(eval.plots, "_rendered", stop)
    with pytest.raises(Seen) as seen:
        draw()
    return seen.value.args[0].axes


def test_axes_do_not_exaggerate(monkeypatch):
    log = evaluations(0.55, 0.56) + [
        {"step": 10, "split": "eval", "gap": 0.01},
        *(
            {"step": step, "split": "train", "kl": 0.02, "completions/valid_rate": 0.98}
            for step in (1, 2)
        ),
    ]
    scores, gap = axes_of(monkeypatch, lambda: draw_macro_f1("x", {"r": log}))
    assert scores.get_ylim() == (-0.02, 1.02) and gap.get_ylim() == (-0.1, 0.1)
    large = log + [{"step": 20, "split": "eval", "gap": -0.3}]
    _, gap = axes_of(monkeypatch, lambda: draw_macro_f1("x", {"r": large}))
    assert gap.get_ylim() == pytest.approx((-0.33, 0.33))  # 1.1 x 0.3, the same up and down
    kl, valid = axes_of(monkeypatch, lambda: draw_training("x", "", {"r": log}, POLICY))
    assert kl.get_ylim() == pytest.approx((-0.0002, 0.0208))  # 0.04 and 0.01 of 0 to 0.02
    assert valid.get_ylim() == pytest.approx((-0.01, 1.04))


def test_training_and_validation_loss_share_an_axis(monkeypatch):
    log = [
        {"step": 1, "split": "train", "loss": 2.0},
        {"step": 1, "epoch": 1.0, "split": "eval", "loss": 3.0},
    ]
    train, validation = axes_of(monkeypatch, lambda: draw_training("x", "", {"r": log}, FIGURE_1))
    assert train.get_ylim() == validation.get_ylim() == pytest.approx((-0.03, 3.12))
    assert validation.get_xlabel() == "epoch"


def test_curves_are_told_apart_by_colour_and_by_dash(monkeypatch):
    log = [{"step": step, "split": "train", "kl": 0.1} for step in range(1, 401)]
    axis = axes_of(
        monkeypatch, lambda: draw_training("x", "", {str(n): log for n in range(9)}, POLICY)
    )[0]
    bold = [line for line in axis.lines if line.get_linewidth() == 2]
    assert len({(line.get_color(), line.get_linestyle()) for line in bold}) == 9
    faint = [line for line in axis.lines if line.get_linewidth() < 1]
    assert len(faint) == 9 and all(line.get_alpha() == 0.35 for line in faint)


def test_a_null_breaks_the_line_and_a_point_alone_gets_a_mark(monkeypatch):
    values = [0.1, None, 0.3, None, 0.5, 0.6]
    log = [{"step": n, "split": "train", "kl": value} for n, value in enumerate(values)]
    axis = axes_of(monkeypatch, lambda: draw_training("x", "", {"r": log}, POLICY))[0]
    faint, bold = axis.lines
    # six values are not smoothed: 1 - 20/6 is below 0
    assert [value == value for value in bold.get_ydata()] == [True, False, True, False, True, True]
    assert list(faint.get_ydata())[4:] == [0.5, 0.6]
    assert bold.get_markevery() == [0, 2] and bold.get_marker() == "o"


def test_odd_and_long_names_are_shown_whole_and_as_they_are(monkeypatch):
    names = ["_hidden", "a$b$c", "x" * 90, "several words " * 8]
    log = evaluations(0.5, 0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = axes_of(monkeypatch, lambda: draw_macro_f1("x", {name: log for name in names}))
        titles = [axis.get_title() for axis in axes]
        assert [title.replace("\n", "").replace(" ", "") for title in titles] == [
            f"{name}:macro-F1".replace(" ", "") for name in names
        ]
        assert all(len(line) <= 38 for title in titles for line in title.splitlines())
        monkeypatch.undo()
        logs = {name: [{"step": 1, "split": "train", "kl": 1.0}] for name in names}
        assert len(draw_training("x", "", logs, POLICY, "png").data) > 1000


def test_runs_of_one_kind_share_pictures_of_at_most_four(tmp_path):
    runs = {
        name: training_run(tmp_path / name, "grpo") for name in ("a", "b", "c", "d", "e", "none")
    }
    for place, name in enumerate(["a", "b", "c", "d", "e"]):
        rows = [
            {
                "step": step,
                "split": "train",
                "monitors/trained_gain": step / 10,
                "monitors/other_gain": 0.0,
                "monitors/f1_gain": -place / 10,
            }
            for step in (20, 30)
        ]
        write_jsonl(runs[name] / "metrics.jsonl", rows)
    pictures = pictures_of(*runs.values())
    assert list(pictures) == ["figure-3", "reward-hacking-1", "reward-hacking-2"]
    first, second = pictures["reward-hacking-1"].alt, pictures["reward-hacking-2"].alt
    assert "reward trained on: 2 at 20, 3 at 30 of a; other rewards: 0 at 20, 0 at 30 of a" in first
    assert "F1 of the labels: -0.4 at 20, -0.4 at 30 of e" in second
    assert "of a" not in second and "of none" not in first + second
    # the run without monitors is in figure 3, whose caption names the runs that have nothing there
    assert "Total reward, as trained on: not logged by a." in pictures["figure-3"].caption


def test_a_picture_is_the_same_for_the_same_log():
    log = [{"step": step, "split": "train", "loss": 1.0 / step} for step in range(1, 9)]
    first, again = (draw_training("x", "", {"<run>": log}, FIGURE_1) for _ in range(2))
    assert first == again and first.data.startswith(b"<?xml") and b"<script" not in first.data
    other = draw_training("x", "", {"<run>": log[:5]}, FIGURE_1)
    assert other.data != first.data


def test_the_command_writes_png_and_svg_and_overwrites_nothing(tmp_path, capsys):
    run, out = training_run(tmp_path / "run", "sft"), tmp_path / "out"
    assert main([str(run), "--output_dir", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["figure-1.png", "figure-1.svg"]
    with Image.open(out / "figure-1.png") as image:
        assert image.size[0] > image.size[1] > 400
    before = (out / "figure-1.svg").read_bytes()
    assert main([str(run), "--output_dir", str(out)]) == 2
    assert "figure-1.svg exists and nothing is overwritten" in capsys.readouterr().err
    assert (out / "figure-1.svg").read_bytes() == before
    assert main([]) == 2
    assert [line for line in capsys.readouterr().err.splitlines()] == [
        "error: --run is missing: give one or more FOLDER or NAME=FOLDER of training runs",
        "error: --output_dir is missing: give a folder for the pictures",
    ]


def test_what_is_missing_is_named_for_each_run(tmp_path, capsys):
    run = training_run(tmp_path / "run", "sft")
    for name in ("empty", "torn", "other"):
        (tmp_path / name).mkdir()
    gone = training_run(tmp_path / "gone", "grpo")
    (gone / "metrics.jsonl").unlink()
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"step": 1, "lo')
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 1, "split": "train", "lr": 0.1}')
    folders = [str(tmp_path / name) for name in ("empty", "gone", "torn", "other")]
    assert main([*folders, "--output_dir", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: nothing to draw: empty: no training run belongs to {folders[0]}: it holds neither"
        " config.json nor metrics.jsonl, and its scores name no adapter that is there",
        f"error: nothing to draw: GRPO: there is no {folders[1]}/metrics.jsonl",
        f"error: nothing to draw: torn: {folders[2]}/metrics.jsonl holds no whole line with a step",
        f"error: nothing to draw: other: {folders[3]}/metrics.jsonl holds none of what is drawn,"
        " such as mean_token_accuracy, loss, kl, entropy of training or macro_f1 of an evaluation",
    ]
    assert not (tmp_path / "none").exists()
    # where one run can be drawn, the others are warnings
    assert main([str(run), folders[1], "--output_dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == (
        f"warning: not drawn: GRPO: there is no {folders[1]}/metrics.jsonl\n"
    )


def test_without_matplotlib_a_report_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval.plots, "available", lambda: False)
    monkeypatch.setattr("eval.report.available", lambda: False)
    for name, rows in (("base", BEFORE), ("sft", AFTER)):
        (tmp_path / name).mkdir()
        save(tmp_path / name, home=rows)
    assert (
        report_main(
            [
                str(tmp_path / "base"),
                str(tmp_path / "sft"),
                "--output_dir",
                str(tmp_path / "out"),
                *FEW,
            ]
        )
        == 0
    )
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "the pictures need matplotlib: pip install -e &#x27;.[plots]&#x27;" in page
    # macro-F1 by data set and the labels are drawn without it, each for two widths of a screen
    assert page.count("data:image/svg") == 2 * 2
    with pytest.raises(UsageError, match="need matplotlib"):
        draw_training("x", "", {}, FIGURE_1)


def test_reliability_says_its_points_and_its_error():
    bins = [
        {"low": 0.0, "high": 0.1, "n": 1500, "confidence": 0.0, "observed": 0.05},
        {"low": 0.9, "high": 1.0, "n": 500, "confidence": 1.0, "observed": 0.8},
    ]
    # (1500 x .05 + 500 x .2) / 2000 = .0875
    scores = {"ece": 0.0875, "reliability": bins}
    picture = draw_reliability("test-a", {"SFT $x$": scores, "GRPO": scores | {"ece": 0.1}})
    assert picture.name == "reliability-test-a" and picture.media_type == "image/svg+xml"
    assert (
        "SFT $x$, calibration error 0.087: 0.00 true in 0.05 of 1,500, 1.00 true in 0.80 of 500;"
        " GRPO, calibration error 0.100"
    ) in picture.alt
    assert "SFT $x$ 0.087, GRPO 0.100." in picture.caption
    assert draw_reliability("a", {"one": scores}, "png").data.startswith(b"\x89PNG")


def test_folders_with_votes_have_their_reliability_drawn(tmp_path):
    shares = {"Edema": 0.5}
    rows = [row("<solution>Edema</solution>", ("Edema",), vote_shares=shares, num_generations=2)]
    votes = parsed(rows)
    for name in ("one", "two"):
        scores = {"probabilities": probability_scores(votes)}
        write_results(tmp_path / name, "test-a", votes, scores)
    folders = [str(tmp_path / name) for name in ("one", "two")]
    assert main([*folders, "--output_dir", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "reliability-test-a.png",
        "reliability-test-a.svg",
    ]
    (picture,) = reliability_pictures([load_entry(Path(name).name, Path(name)) for name in folders])
    # Edema is true, Pneumonia and Fracture are not: .5, 0 and 0 of 3
    assert (
        picture.alt.count("calibration error 0.167: 0.00 true in 0.00 of 2, 0.50 true in 1.00") == 2
    )
    assert "one, calibration" in picture.alt and "two, calibration" in picture.alt
