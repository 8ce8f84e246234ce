"""Protect the line between two adapters: its points, the choice of alpha, and where it is shown.

Points and gains are worked out by hand. The choice is made by whole reports on small answers, and a
report on the patients that it was made on refuses it.

Run: pytest tests/eval/test_frontier.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.labels import LABELS
from data.predictions import Prediction
from eval.frontier import CHOICE, Frontier, Point
from eval.report import main
from tests.helpers.reports import FEW, answer, parsed, row, save

PAIR = ["a" * 64, "b" * 64]  # SHA-256 of the two adapters
N = 40


def rows(who: str, right: int, evaluated: tuple[str, ...] = LABELS) -> list[Prediction]:
    """Answer 40 images of 40 patients, all of Edema: the first `right` rightly, else Fracture."""
    return parsed(
        [
            row(
                answer("Edema" if n < right else "Fracture"),
                ("Edema",),
                id=f"{who}{n}",
                patient=f"{who}{n}",
                evaluated=evaluated,
            )
            for n in range(N)
        ]
    )


def cell(folder: Path, alpha: float, who: str, home: int, away: int, pair=PAIR) -> str:
    """Make a model's results: `home` and `away` of 40 images rightly, on 14 labels and on two."""
    folder.mkdir(parents=True)
    told = {"alpha": alpha, "sha256": pair}
    (folder / "config.json").write_text(
        json.dumps({"script": "interpolation", "settings": {}, "interpolation": told})
    )
    two = ("Edema", "Fracture")
    save(folder, home=rows(f"{who}h", home), away=rows(f"{who}b", away, two))
    return f"alpha-{alpha:g}={folder}"


def cells(place: Path, who: str, shares: dict[float, tuple[int, int]], pair=PAIR) -> list[str]:
    return [cell(place / f"{alpha:g}", alpha, who, *right, pair) for alpha, right in shares.items()]


def report(folder: Path, *argv: str) -> str:
    assert main([*argv, *FEW, "--cases", "0", "--output_dir", str(folder)]) == 0
    return (folder / "report.md").read_text()


def test_points_gains_and_the_choice_by_hand(tmp_path, capsys):
    # F1 of Edema is 2 f / (1 + f) of the share f that is right, Fracture is never true: 0. Home:
    # 1 / 14, then 1 / 14, then 2/3 / 14. Elsewhere, two labels: 2/3 / 2, 6/7 / 2 and 1 / 2.
    models = cells(tmp_path / "val", "v", {0: (40, 20), 0.5: (40, 30), 1: (20, 40)})
    text = report(tmp_path / "choice", models[1], models[0], models[2])  # in any order
    chosen = json.loads((tmp_path / "choice" / CHOICE).read_text())
    points = chosen["points"]
    assert [point["alpha"] for point in points] == [0, 0.5, 1]
    assert [point["home"] for point in points] == pytest.approx([1 / 14, 1 / 14, 2 / 42])
    assert [point["away"] for point in points] == pytest.approx([1 / 3, 3 / 7, 1 / 2])
    # gains: half of what both scores have won since alpha 0
    assert [point["gain"] for point in points] == pytest.approx([0, 1 / 21, 1 / 14])
    assert points[0]["error"] == 0 and all(0 < point["error"] < 0.03 for point in points[1:])
    low, high = points[0]["away_interval"]
    assert low < 1 / 3 < high
    assert chosen["alpha"] == 1 and (chosen["home"], chosen["away"]) == (["home"], ["away"])
    assert "Between two adapters" in text and "Chosen alpha: 1, by the largest gain" in text
    assert "It was chosen on the images shown here, so its scores flatter it" in text
    said = capsys.readouterr().out
    assert (
        f"chosen alpha: 1, on the images shown; for other data: --chosen_alpha {tmp_path}" in said
    )
    picture = (tmp_path / "choice/pictures/frontier.svg").read_text()
    assert picture.count("<text") > 8 and "1, chosen" in picture


def point(alpha: float, gain: float, error: float) -> Point:
    return Point(f"{alpha}", alpha, 0.5, (0.4, 0.6), 0.5, (0.4, 0.6), gain, error)


@pytest.mark.parametrize(
    ("gains", "alpha"),
    [
        ([(0, 0, 0), (0.5, 0.02, 0.03), (1, 0.029, 0.03)], 0),  # the luckiest is within its noise
        ([(0, 0, 0), (0.5, 0.05, 0.02), (1, 0.06, 0.05)], 0.5),  # not the largest gain
        ([(0, 0, 0), (0.5, 0.02, 0.02), (1, -0.1, 0.02)], 0),  # of equal ones the smallest
        ([(0.25, 0, 0), (1, 0.05, 0.02)], 1),
    ],
)
def test_the_rule_takes_a_gain_beyond_its_noise(gains, alpha):
    found = Frontier(tuple(point(*one) for one in gains), ("a", "b"), ("h",), ("b",), {})
    assert found.chosen.alpha == alpha


def test_a_report_on_test_data_marks_what_validation_chose(tmp_path, capsys):
    shares = {0: (40, 20), 0.5: (40, 40), 1: (20, 40)}
    report(tmp_path / "choice", *cells(tmp_path / "val", "v", shares))
    choice = str(tmp_path / "choice" / CHOICE)
    # on the test sets alpha 1 would be better, which does not count
    better = {0: (40, 20), 0.5: (40, 20), 1: (40, 40)}
    test = cells(tmp_path / "test", "t", better)
    text = report(tmp_path / "out", *test, "--chosen_alpha", choice)
    assert f"Chosen alpha: 0.5, on other data ({choice})" in text.replace("\\", "")
    assert "No patient shown here took part in the choice" in text
    assert not (tmp_path / "out" / CHOICE).exists()  # it chose nothing itself
    assert "0.5, chosen" in (tmp_path / "out/pictures/frontier.svg").read_text()

    def refused(*argv: str) -> str:
        capsys.readouterr()
        assert main([*argv, *FEW, "--cases", "0", "--output_dir", str(tmp_path / "x")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "x").exists()
        return line

    again = [f"alpha-{alpha:g}={tmp_path}/val/{alpha:g}" for alpha in shares]
    line = refused(*again, "--chosen_alpha", choice)
    assert "was chosen on home, and 40 of its patients are in home" in line
    others = cells(tmp_path / "others", "o", shares, ["c" * 64, "d" * 64])
    assert "between other adapters than those shown" in refused(*others, "--chosen_alpha", choice)
    line = refused(test[0], test[2], "--chosen_alpha", choice)
    assert "chose alpha 0.5, which is not among the models shown" in line
    assert "than any shown here" in refused(test[0], "--chosen_alpha", choice)
    (tmp_path / "no.json").write_text("[]")
    assert "is no choice of eval.report" in refused(*test, "--chosen_alpha", f"{tmp_path}/no.json")
    line = refused(*test, "--chosen_alpha", str(tmp_path / "gone"))
    assert line.endswith("cannot be read: No such file or directory")


def test_without_a_second_side_or_share_there_is_no_line(tmp_path):
    [only] = cells(tmp_path / "one", "v", {0.5: (40, 20)})
    assert "Between two adapters" not in report(tmp_path / "a", only)
    folders = []
    for alpha in (0, 1):
        folder = Path(cell(tmp_path / f"h{alpha}", alpha, "v", 40, 20).partition("=")[2])
        for file in folder.glob("*-away.*"):
            file.unlink()
        folders.append(f"alpha-{alpha}={folder}")
    assert "Between two adapters" not in report(tmp_path / "b", *folders)
