"""Protect an evaluation that several ranks share: its files are those of one rank, to the byte.

The ranks are threads and the model is a table of answers. tests/ranks/test_evaluation.py has
processes and models.

Run: pytest tests/eval/test_shares.py
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eval.answering
import eval.decode
import eval.go_on
from data.examples import Example
from data.files import DataError, write_json
from data.predictions import read_predictions
from engine.completion import Completion, SamplingConfig
from engine.config import UsageError
from engine.out_of_memory import EVALUATION, Cut, Limits
from engine.ranks import ALONE, Ranks
from engine.runtime import PeerError, StepFailed, StopRequested
from eval.decode import Decoding, evaluate_sets, note_cuts, predict
from eval.go_on import read_partial
from eval.since_start import keep_start
from tests.helpers.threads import in_threads

LABELS = ("Edema", "Fracture", "Pneumonia")
GREEDY = Decoding(SamplingConfig(0.0, max_completion_length=99), "think_solution", batch_size=1)
VOTES = replace(GREEDY, sampling=SamplingConfig(0.8, max_completion_length=99), num_generations=3)
SWAPPED = replace(GREEDY, swap_images=True)
RECORD = {
    "settings": {"temperature": {"value": 0.0, "origin": "default"}},
    "data": {},
    "bad_images": {},
    "adapter_sha256": None,
}


def images(count: int) -> list[Example]:
    """Make examples of their own patients; the images differ, since a swap exchanges them."""
    return [
        Example(f"e{i}", f"p{i}", f"{i}.png", (LABELS[i % 3],), "site", Path("images"))
        for i in range(count)
    ]


def text_of(example: Example, sample: int) -> str:
    """Answer an image. The third one's answers end in half an emoji, as a cut one may."""
    number = int(example.image.partition(".")[0])
    end = "\ud83d" if number == 2 else ""
    label = LABELS[(number + number % 2 + sample) % 3]
    return f"<think>{example.id} {sample} ü</think><solution>{label}</solution>{end}"


@dataclass
class Asked:
    """Hold what one rank's sampler was asked for, and what it does before an answer."""

    ids: list[str]
    before: Callable[[Example], None] = lambda example: None


def sampler(policy, prompts, sampling, *, num_generations, on_finished, should_stop, **options):
    for place, example in enumerate(prompts):
        if should_stop():
            raise StopRequested
        policy.asked.before(example)
        policy.asked.ids.append(example.id)
        texts = [text_of(example, number) for number in range(num_generations)]
        ids = [torch.tensor([ord(sign) for sign in text]) for text in texts]
        on_finished(place, [Completion(one, one.float(), one.float(), False) for one in ids])


@pytest.fixture(autouse=True)
def table_of_answers(monkeypatch):
    monkeypatch.setattr(eval.decode, "generate", sampler)
    monkeypatch.setattr(eval.decode, "WINDOW", 2)  # images, since a batch is one


def policy_of(asked: Asked, limits: Limits | None = None) -> Any:
    return SimpleNamespace(
        asked=asked,
        expect=lambda examples: None,
        encode=lambda example: example,
        gathered=nullcontext,
        prompt=SimpleNamespace(name="short"),
        graphs=SimpleNamespace(drop=lambda: None),
        encoder=SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)), text_length=len),
        limits=limits or Limits(),
    )


@pytest.mark.parametrize(
    ("batch", "k", "window"),
    # 16 batches of images, no more than 512 but for a batch that is larger by itself
    [(8, 1, 128), (8, 4, 32), (3, 4, 16), (128, 1, 512), (600, 1, 600)],
)
def test_how_many_images_are_there_at_once(monkeypatch, batch, k, window):
    sizes: list[int] = []
    monkeypatch.setattr(eval.decode, "WINDOW", 16)
    monkeypatch.setattr(
        eval.decode,
        "generate",
        lambda policy, prompts, *more, **options: (
            sizes.append(len(prompts)) or sampler(policy, prompts, *more, **options)
        ),
    )
    decoding = replace(GREEDY, batch_size=batch, num_generations=k)
    answers = predict(policy_of(Asked([])), images(window + 1), decoding)
    assert len(answers) == k * (window + 1) and sizes == [window, 1]


def evaluated(
    size: int,
    folder: Path,
    examples: list[Example],
    decoding: Decoding = GREEDY,
    *,
    before: Callable[[int, Example], None] = lambda rank, example: None,
    should_stop: Callable[[int], bool] = lambda rank: False,
    **options: Any,
) -> tuple[list[Any], list[list[str]]]:
    """Evaluate with so many ranks -> (scores or exception of each, the ids each was asked)."""
    asked = [Asked([]) for _ in range(size)]

    def work(ranks: Ranks) -> Any:
        asked[ranks.rank].before = lambda example: before(ranks.rank, example)
        scores = evaluate_sets(
            policy_of(asked[ranks.rank]),
            {"site": examples},
            decoding,
            folder,
            should_stop=lambda: should_stop(ranks.rank),
            ranks=ranks,
            **options,
        )
        return scores["site"]

    ends = [work(ALONE)] if size == 1 else in_threads(size, work)
    return ends, [one.ids for one in asked]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the same files ------------------------------------------------------------------------------
@pytest.mark.parametrize("decoding", [GREEDY, VOTES, SWAPPED], ids=["greedy", "votes", "swapped"])
def test_the_files_are_those_of_one_rank(tmp_path, decoding):
    (alone,), _ = evaluated(1, tmp_path / "1", images(7), decoding, records={"site": RECORD})
    expected = contents(tmp_path / "1")
    kinds = {GREEDY: [], VOTES: ["samples"], SWAPPED: ["swapped"]}[decoding]
    assert sorted(expected) == sorted(
        ["scores-site.json", *(f"{kind}-site.jsonl" for kind in ["predictions", *kinds])]
    )
    for size in (2, 3, 5, 8):  # one more than there are images
        folder = tmp_path / str(size)
        scores, asked = evaluated(size, folder, images(7), decoding, records={"site": RECORD})
        assert contents(folder) == expected
        # on all ranks the same, which JSON has changed in nothing that a caller could notice
        assert scores == [alone] * size
        once = [[f"e{i}" for i in range(rank, 7, size)] for rank in range(size)]
        assert [ids[: len(own)] for ids, own in zip(asked, once, strict=True)] == once
        twice = decoding.swap_images + 1
        assert sum(map(len, asked)) == 7 * twice


# ---- stop and go on ------------------------------------------------------------------------------
def stopped_on(rank: int, after: int) -> dict[str, Any]:
    """Let one rank be asked to stop once it has so many answers."""
    count = [0]

    def before(here: int, example: Example) -> None:
        count[0] += here == rank

    return {"before": before, "should_stop": lambda here: here == rank and count[0] >= after}


@pytest.mark.parametrize("decoding", [GREEDY, VOTES], ids=["greedy", "votes"])
@pytest.mark.parametrize("then", [1, 2, 4])
def test_a_stop_on_one_rank_stops_all_and_any_number_goes_on(tmp_path, capsys, decoding, then):
    evaluated(1, tmp_path / "straight", images(12), decoding, records={"site": RECORD})
    folder, options = tmp_path / "stopped", {"records": {"site": RECORD}}
    # each rank has two windows of two images: e0 e3 | e6 e9, e1 e4 | e7 e10, e2 e5 | e8 e11
    ends, asked = evaluated(3, folder, images(12), decoding, **options, **stopped_on(1, 3))
    assert [type(end) for end in ends] == [StopRequested] * 3
    assert asked == [["e0", "e3", "e6", "e9"], ["e1", "e4", "e7"], ["e2", "e5", "e8", "e11"]]
    k = decoding.num_generations
    files = [folder / f"predictions-site.partial{number}.jsonl" for number in ("", "-1", "-2")]
    assert sorted(folder.iterdir()) == sorted([*files, folder / "predictions-site.partial.json"])
    assert [len(read_predictions(file)) for file in files] == [4 * k, 3 * k, 4 * k]
    told = [line for line in capsys.readouterr().err.splitlines() if "kept" in line]
    listed = ", ".join(map(str, files))
    assert told == [f"the answers so far are kept in {listed}: the same command goes on from there"]

    with files[1].open("ab") as file:
        file.write(b'{"id": "torn')
    with files[2].open("ab") as file:  # what rank 0's file had taken over when it was killed
        file.write(files[1].read_bytes().split(b"\n")[0] + b"\n")
    ends, asked = evaluated(then, folder, images(12), decoding, **options)
    assert sorted(id for ids in asked for id in ids) == ["e10"]
    assert contents(folder) == contents(tmp_path / "straight")


def test_what_is_left_is_shared_evenly(tmp_path):
    """Also where one rank had done more of its share than another."""
    ends, asked = evaluated(2, tmp_path, images(8), records={"site": RECORD}, **stopped_on(1, 0))
    assert asked == [["e0", "e2"], []]
    _, asked = evaluated(2, tmp_path, images(8), records={"site": RECORD})
    assert asked == [["e1", "e4", "e6"], ["e3", "e5", "e7"]]


def test_answers_outlive_a_second_stop(tmp_path):
    """They are in rank 0's file then, and each other rank's begins anew."""
    options = {"records": {"site": RECORD}}
    evaluated(3, tmp_path, images(12), **options, **stopped_on(1, 3))
    _, asked = evaluated(2, tmp_path, images(12), **options, **stopped_on(0, 0))
    assert asked == [[], []]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["predictions-site.partial.json", "predictions-site.partial.jsonl"]
    _, asked = evaluated(2, tmp_path, images(12), **options)
    assert asked == [["e10"], []]


def test_all_leave_after_the_window_in_which_one_stops(tmp_path):
    ends, asked = evaluated(2, tmp_path, images(40), **stopped_on(1, 1))
    assert [type(end) for end in ends] == [StopRequested] * 2
    assert asked == [["e0", "e2"], ["e1"]]


def test_answers_without_a_record_are_named_with_what_scores_them(tmp_path, capsys, monkeypatch):
    evaluated(2, tmp_path / "run", images(8), **stopped_on(0, 2))
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "kept" in line]
    command = told.partition("to score them: ")[2]
    together, _, score = command.partition("; ")
    monkeypatch.chdir(tmp_path)
    subprocess.run(together, shell=True, check=True)
    assert shlex.split(score) == [
        "python",
        "-m",
        "eval.evaluate",
        "--predictions",
        "site=site.jsonl",
    ]
    assert {row.id for row in read_predictions("site.jsonl")} == {
        "e0",
        "e1",
        "e2",
        "e3",
        "e5",
        "e7",
    }


def test_what_other_ranks_left_is_of_the_same_evaluation_or_refused(tmp_path):
    evaluated(2, tmp_path, images(8), records={"site": RECORD}, **stopped_on(0, 0))
    (tmp_path / "predictions-site.partial.jsonl").unlink(missing_ok=True)
    other = json.loads(json.dumps(RECORD))
    other["settings"]["temperature"]["value"] = 1.0
    file = tmp_path / "predictions-site.partial-1.jsonl"
    ends, asked = evaluated(2, tmp_path, images(8), records={"site": other})
    assert isinstance(ends[0], UsageError) and type(ends[1]) is PeerError and asked == [[], []]
    assert f"{file} was begun with another temperature (0.0, now 1.0)" in str(ends[0])
    assert [row.id for row in read_partial(tmp_path, "site", RECORD)] == ["e1", "e3"]
    (tmp_path / "predictions-site.partial.json").unlink()
    with pytest.raises(UsageError, match="partial-1.jsonl was left there by another command"):
        read_partial(tmp_path, "site", RECORD)


def test_files_that_hold_no_answer_do_not_stay(tmp_path, capsys):
    ends, _ = evaluated(
        2, tmp_path, images(8), records={"site": RECORD}, should_stop=lambda rank: True
    )
    assert [type(end) for end in ends] == [StopRequested] * 2
    assert not list(tmp_path.iterdir()) and "kept" not in capsys.readouterr().err


def test_a_file_of_a_rank_far_away_is_found_and_others_are_not(tmp_path):
    write_json(tmp_path / "predictions-site.partial.json", RECORD)
    evaluated(1, tmp_path / "whole", images(3))
    row = (tmp_path / "whole/predictions-site.jsonl").read_bytes().split(b"\n")
    (tmp_path / "predictions-site.partial-63.jsonl").write_bytes(row[2] + b"\n")
    (tmp_path / "predictions-site.partial-9.jsonl").write_bytes(row[1] + b"\n")
    (tmp_path / "predictions-site.partial-x.jsonl").write_bytes(b"not ours")
    (tmp_path / "predictions-site.partial-2.jsonl").mkdir()
    with pytest.raises(OSError):
        read_partial(tmp_path, "site", RECORD)
    (tmp_path / "predictions-site.partial-2.jsonl").rmdir()
    assert [row.id for row in read_partial(tmp_path, "site", RECORD)] == ["e1", "e2"]


# ---- what one rank raises ------------------------------------------------------------------------
def test_a_damaged_image_of_one_rank_ends_all(tmp_path):
    def damaged(rank: int, example: Example) -> None:
        if example.id == "e3":
            raise DataError(["e3: its image is damaged"])

    ends, _ = evaluated(2, tmp_path, images(8), before=damaged)
    assert isinstance(ends[1], DataError)
    assert type(ends[0]) is PeerError and "rank 1 failed: DataError: e3: its image" in str(ends[0])
    assert (tmp_path / "predictions-site.partial-1.jsonl").exists()


def test_a_reward_that_fails_ends_all(tmp_path):
    def annotate(predictions):
        raise StepFailed("the reward is no number")

    ends, _ = evaluated(3, tmp_path, images(8), annotate=annotate)
    assert [type(end) for end in ends] == [StepFailed, PeerError, PeerError]


def test_the_caller_annotates_once_and_all_know_it(tmp_path):
    calls = []

    def annotate(predictions):
        calls.append(len(predictions))
        return [one.with_extra(rewards={"hard": 1}) for one in predictions], {"reward": 0.5}

    ends, _ = evaluated(3, tmp_path, images(8), annotate=annotate, notes={"site": {"step": 3}})
    assert calls == [8] and [(end["reward"], end["step"]) for end in ends] == [(0.5, 3)] * 3
    rows = read_predictions(tmp_path / "predictions-site.jsonl")
    assert all(row.extra["rewards"] == {"hard": 1} for row in rows)


def test_answers_of_all_ranks_stay_where_the_results_cannot_be_written(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "scores-site.json")

    monkeypatch.setattr(eval.answering, "write_results", full)
    ends, _ = evaluated(2, tmp_path, images(5))
    assert isinstance(ends[0], StepFailed) and type(ends[1]) is PeerError
    files = [tmp_path / f"predictions-site.partial{number}.jsonl" for number in ("", "-1")]
    assert f"Its 5 answers: they are kept in {files[0]}, {files[1]}; to score" in str(ends[0])
    found = [row.id for file in files for row in read_predictions(file)]
    assert sorted(found) == [f"e{i}" for i in range(5)]


def test_a_disk_that_rank_0_cannot_write_to_keeps_nothing_and_loses_nothing(tmp_path, monkeypatch):
    """What an earlier call left stays as it is: rank 0 has not put it into its own file."""
    options = {"records": {"site": RECORD}}
    evaluated(2, tmp_path, images(8), **options, **stopped_on(0, 2))
    before = contents(tmp_path)
    write = eval.go_on.write_predictions

    def full(path, rows):
        if path.name == "predictions-site.partial.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, rows)

    monkeypatch.setattr(eval.go_on, "write_predictions", full)
    ends, asked = evaluated(2, tmp_path, images(8), **options, **stopped_on(0, 0))
    assert [type(end) for end in ends] == [StopRequested] * 2 and asked == [[], ["e6"]]
    assert contents(tmp_path) == before
    _, asked = evaluated(1, tmp_path, images(8), **options)
    assert asked == [["e4", "e6"]]
    assert sorted(contents(tmp_path)) == ["predictions-site.jsonl", "scores-site.json"]


# ---- memory --------------------------------------------------------------------------------------
def test_a_cut_on_one_rank_is_in_the_record_of_the_scores(tmp_path, capsys):
    limits = [Limits(SimpleNamespace(per_device_eval_batch_size=8)) for _ in range(3)]
    ends = in_threads(3, lambda ranks: cut_on_rank_1(ranks, limits[ranks.rank], tmp_path))
    setting = {"value": 2, "origin": "out of memory"}
    for end in ends:
        assert end["site"]["run"]["settings"][EVALUATION] == setting
    kept = json.loads((tmp_path / "scores-site.json").read_text())
    assert kept["run"]["settings"][EVALUATION] == setting
    assert [one.values[EVALUATION] for one in limits] == [8, 2, 8]  # it stays on its own rank
    # rank 1 itself, which is silent in a process of its own, and the two others
    assert capsys.readouterr().err.count("done again with --per_device_eval_batch_size 2") == 3


def cut_on_rank_1(ranks: Ranks, limits: Limits, folder: Path) -> Any:
    records = {"site": json.loads(json.dumps(RECORD))}
    note_cuts(limits, records)

    def short_of_memory(example: Example) -> None:
        if ranks.rank == 1 and not limits.halved:
            limits._cut(Cut("evaluation", EVALUATION, 8, 2, "no memory"))

    asked = Asked([], short_of_memory)
    return evaluate_sets(
        policy_of(asked, limits),
        {"site": images(6)},
        GREEDY,
        folder,
        records=records,
        notes={"site": {"run": records["site"]}},
        ranks=ranks,
    )


# ---- the start of a run --------------------------------------------------------------------------
def test_the_vote_over_the_start_is_shared(tmp_path):
    write_json(tmp_path / "config.json", {"settings": {}, "data": {}})
    places: list[Path] = []

    def work(ranks: Ranks) -> Any:
        policy, sets = policy_of(Asked([])), {"site": images(6)}
        evaluate_sets(policy, sets, GREEDY, tmp_path, ranks=ranks)

        def vote(folder: Path) -> None:
            places.append(folder)
            evaluate_sets(policy, sets, VOTES, folder, ranks=ranks)

        keep_start(tmp_path, ["site"], vote, ranks)
        keep_start(tmp_path, ["site"], vote, ranks)  # of step 0 again: the vote is there

    assert in_threads(3, work) == [None] * 3
    assert len(places) == 3 and len(set(places)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "predictions-site.jsonl",
        "scores-site.json",
        "start",
        "start-vote",
    ]
    assert sorted(path.name for path in (tmp_path / "start-vote").iterdir()) == [
        "predictions-site.jsonl",
        "samples-site.jsonl",
        "scores-site.json",
    ]
    assert len(read_predictions(tmp_path / "start-vote/samples-site.jsonl")) == 18


@pytest.mark.parametrize("failing", [0, 1])
def test_a_vote_over_the_start_that_fails_leaves_nothing(tmp_path, failing):
    write_json(tmp_path / "config.json", {"settings": {}, "data": {}})

    def work(ranks: Ranks) -> Any:
        def fail(example: Example) -> None:
            if ranks.rank == failing and example.id in ("e2", "e3"):
                raise DataError(["damaged"])

        policy, sets = policy_of(Asked([])), {"site": images(6)}
        evaluate_sets(policy, sets, GREEDY, tmp_path, ranks=ranks)
        policy.asked.before = fail
        keep_start(
            tmp_path,
            ["site"],
            lambda folder: evaluate_sets(policy, sets, VOTES, folder, ranks=ranks),
            ranks,
        )

    ends = in_threads(2, work)
    assert isinstance(ends[failing], DataError) and type(ends[1 - failing]) is PeerError
    assert (tmp_path / "start").is_dir() and not (tmp_path / "start-vote").exists()
    assert not list(tmp_path.glob(".tmp-*"))
