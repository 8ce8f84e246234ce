"""Evaluations of two processes: the files of one, also after a stop and a kill of one of them.

What each process does is in evaluation.py. tests/eval/test_shares.py has the rest, without them.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

import eval.evaluate
import eval.matrix
from data.predictions import read_predictions
from tests.helpers.runs import write_data
from tests.helpers.tiny import SAVE
from tests.helpers.torchrun import Ended, torchrun
from tests.ranks.evaluation import FAMILIES, KINDS, evaluate, matrix

NAMES = [f"{family}-{kind}" for family in FAMILIES for kind in KINDS]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, Ended]:
    """Evaluate here with one rank, and with two -> (folder of both, how the two ended)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evaluations")
    write_data(folder, 7)
    for family in FAMILIES:
        SAVE[family](folder / family)
        for kind in KINDS:
            command = evaluate(folder, f"one/{family}-{kind}", family, kind)
            assert eval.evaluate.main(command) == 0
    assert eval.matrix.main(matrix(folder, "one/matrix")) == 0
    return folder, torchrun(2, "tests.ranks.evaluation:evaluations", folder)


def results(folder: Path) -> dict[str, str]:
    """Read the results below a folder, as if they were in the folder `one`."""
    return {
        str(path.relative_to(folder)): path.read_text().replace("/two/", "/one/")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_all_ended_as_they_should(ended):
    folder, end = ended
    codes = [(name, 0) for name in NAMES] + [("matrix", 0), ("stopped", 128 + signal.SIGTERM)]
    shown = end.out[0].splitlines()
    told = [tuple(json.loads(line)) for line in shown if line.startswith('["')]
    # torchrun ends rank 0 soon after rank 1 is killed: it may or may not come to tell so
    assert told in (codes, [*codes, ("killed", 1)]), end.told()
    # rank 1 shows nothing, and was killed in the last of them
    assert end.out[1] == "".join(json.dumps(one) + "\n" for one in codes), end.told()
    assert end.root_cause == (1, -signal.SIGKILL) and end.code == 1, end.told()
    assert end.tracebacks == [] and not end.timed_out and not end.left, end.told()
    assert end.err[1] == "", end.told()
    assert end.err[0].count("the answers so far are kept in") == 2, end.told()


@pytest.mark.parametrize("name", [*NAMES, "matrix"])
def test_the_files_are_those_of_one_process(name, ended):
    folder, end = ended
    expected, found = results(folder / "one" / name), results(folder / "two" / name)
    assert found == expected, end.told()
    if name.endswith("votes"):
        assert sorted(found) == ["predictions-site.jsonl", "samples-site.jsonl", "scores-site.json"]
        answers = read_predictions(folder / "two" / name / "samples-site.jsonl")
        assert [row.id for row in answers] == [f"e{i}" for i in range(7) for _ in range(3)]
        assert len({row.completion for row in answers}) > 10  # each place has numbers of its own
    if name == "matrix":
        assert len(found) == 2 * 2 * 2  # models, prompts, files of each


@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_one_process_goes_on_where_two_were_ended(name, ended, capsys):
    folder, end = ended
    place, family = folder / "two" / name, FAMILIES[name == "killed"]
    left = [place / f"predictions-site.partial{number}.jsonl" for number in ("", "-1")]
    kept = [len(read_predictions(file)) for file in left]
    # images come to the two in turn; a killed process may tear a line, and loses the image
    assert (kept[0] % 3, kept[1] % 3) == (0, 0) and sum(kept) in (4 * 3, 5 * 3), end.told()
    assert f"kept in {left[0]}, {left[1]}: the same command goes on" in end.err[0], end.told()
    assert eval.evaluate.main(evaluate(folder, f"two/{name}", family, "votes")) == 0
    assert "site (samples) 21/21" in capsys.readouterr().err
    straight = results(folder / "one" / f"{family}-votes")
    again = {
        file: text.replace(f"/one/{name}", f"/one/{family}-votes")
        for file, text in results(place).items()
    }
    assert again == straight
