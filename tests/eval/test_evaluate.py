"""Protect evaluation.

Checked: what is decoded does not depend on batching, kept predictions score as the run did and are
parsed anew, every figure of scores-<name>.json by hand, and the command's refusals.

Run: pytest tests/eval/test_evaluate.py
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval.decode
from data.answers import parse_answer
from data.entries import UNKNOWN_KINDS
from data.examples import Example
from data.files import DataError, write_jsonl
from data.labels import LABELS, NIH_NINE, NIH_TEN, Target
from data.predictions import Prediction, read_predictions, write_predictions
from data.prompts import Prompt
from engine.completion import Completion, SamplingConfig
from engine.config import UsageError
from engine.generate import generate
from engine.model import BaseModel, load_model
from engine.policy import Policy
from eval.decode import Decoding, evaluate_sets, predict
from eval.evaluate import main
from eval.faithfulness import faithfulness_scores, partners_of
from eval.folders import load_answers, write_results
from eval.go_on import difference, read_partial
from eval.probabilities import operating_points, probability_scores
from eval.scores import format_scores, score
from eval.votes import sample_scores, vote_predictions
from rl.rewards import HardReward
from tests.helpers.reports import ABC, parsed, row
from tests.helpers.runs import overriding, save_run
from tests.helpers.tiny import SAVE, save_images

SHORT = Prompt("short", "Which?")
GREEDY = SamplingConfig(temperature=0.0, max_completion_length=10)
CPU = torch.device("cpu")


def load(folder: Path) -> BaseModel:
    return load_model(
        str(folder), dtype=torch.float32, device=CPU, min_visual_tokens=4, max_visual_tokens=16
    )


@pytest.fixture(scope="module", params=["qwen2_5_vl", "gemma3"])
def model(request, tmp_path_factory) -> BaseModel:
    torch.set_num_threads(1)
    loaded = load(SAVE[request.param](tmp_path_factory.mktemp(request.param)))
    head = torch.randn(loaded.net.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    # the tied head repeats one token, whatever the image
    loaded.net.lm_head.weight = torch.nn.Parameter(head)
    return loaded


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Draw three images each in small/ and large/: 4 and 16 visual tokens for Qwen."""
    folder = tmp_path_factory.mktemp("images")
    save_images(folder / "small", 3, size=56)
    save_images(folder / "large", 3, size=112)
    return folder


@pytest.fixture(scope="module")
def examples(images) -> list[Example]:
    names = [f"{size}/image-{i}.png" for i in range(3) for size in ("small", "large")][:5]
    return [
        Example(
            f"e{i}", f"p{i // 2}", name, ("Edema", "Fracture"), "site", images, ABC, ("oedema",)
        )
        for i, name in enumerate(names)
    ]


def asked(model: BaseModel) -> Policy:
    return Policy(model.net, model, SHORT)


def decoding(sampling: SamplingConfig = GREEDY, batch_size: int = 2, seed: int = 0) -> Decoding:
    return Decoding(sampling, "think_solution", batch_size, seed)


def hand_rows(patient: str | None = None) -> list[Prediction]:
    """Make four answers of all kinds.

    They are right, right with an unknown entry and a label missed, readable without reasoning, and
    unreadable.
    """
    return parsed(
        [
            row(
                "<think>x</think><solution>Edema</solution>",
                ("Edema",),
                id="r1",
                patient=patient or "p0",
            ),
            row(
                "<think>x</think><solution>Edema, nodule</solution>",
                ("Edema", "Fracture"),
                id="r2",
                patient=patient or "p0",
            ),
            row(
                "<solution>Pneumonia, Cardiomegaly</solution>",
                ("Pneumonia",),
                id="r3",
                patient=patient or "p1",
            ),
            row(
                "no idea",
                ("Cardiomegaly", "Fracture"),
                id="r4",
                patient=patient or "p2",
                completion_length=40,
            ),
        ]
    )


# ---- decode --------------------------------------------------------------------------------------
def test_rows_hold_the_example_and_what_the_answer_says(model, examples, monkeypatch):
    texts = ["<think>a b</think><solution>Fracture, edema, nodule</solution>", "<solution>Edema"]

    def scripted(policy, prompts, sampling, *, on_finished, **_):
        for i in range(len(prompts)):
            ids = torch.tensor(
                model.encoder.tokenizer(texts.pop(0)).input_ids + [model.encoder.end_of_turn_id]
            )
            on_finished(i, [Completion(ids, torch.zeros(len(ids)), torch.ones(len(ids)), False)])

    monkeypatch.setattr(eval.decode, "generate", scripted)
    first, second = (
        prediction.to_row() for prediction in predict(asked(model), examples[:2], decoding())
    )
    assert list(first.items()) == list(
        {
            "id": "e0",
            "patient_id": "p0",
            "dataset": "site",
            "labels": ["Edema", "Fracture"],
            "evaluated_labels": list(ABC),
            "source_labels": ["oedema"],
            "prompt": "short",
            "completion": "<think>a b</think><solution>Fracture, edema, nodule</solution>",
            # 7 + 3 + 8 + 10 + 23 + 11 characters, one byte and token each, and the stop token
            "completion_length": 63,
            "predicted": ["Fracture", "Edema"],
            "valid": True,
            "parsed": True,
            "problem": None,
            "unknown": ["nodule"],
            "answer_format": "think_solution",
            "text_length": 60,  # the three blanks are tokens of their own
        }.items()
    )
    assert second["id"] == "e1"
    assert (second["predicted"], second["valid"], second["parsed"], second["problem"]) == (
        [],
        False,
        False,
        "answer_unclosed",
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_do_not_depend_on_the_batch(model, examples, temperature, monkeypatch):
    monkeypatch.setattr(eval.decode, "WINDOW", 2)  # of two images and of six
    sampling = SamplingConfig(temperature, 0.95, GREEDY.max_completion_length)
    one_by_one = predict(asked(model), examples, decoding(sampling, 1, seed=1))
    assert len({row.completion for row in one_by_one}) == 5  # the images matter
    told = []
    together = predict(
        asked(model),
        examples,
        decoding(sampling, 3, seed=1),
        on_prediction=told.append,
    )
    assert together == one_by_one
    assert [row.id for row in together] == [example.id for example in examples]
    assert sorted(told, key=lambda row: row.id) == together
    done = [replace(row, completion="kept") for row in told[1:3]]
    told.clear()
    assert predict(
        asked(model),
        examples,
        decoding(sampling, 2, seed=1),
        on_prediction=told.append,
        done=done,
    ) == [next((kept for kept in done if kept.id == row.id), row) for row in together]
    assert len(told) == 3


def test_what_a_rollout_has_kept_is_gone_before_images_are_looked_at(model, examples, monkeypatch):
    policy, found = asked(model), []
    policy.graphs.held("a rollout", object)
    encode = type(policy).encode

    def encoded(self, example):
        found.append(self.graphs._held)
        return encode(self, example)

    monkeypatch.setattr(type(policy), "encode", encoded)
    predict(policy, examples[:2], decoding())
    assert found == [None, None]


def test_samples_of_an_image_depend_on_nothing_but_their_number(model, examples, monkeypatch):
    """Not on the batch, on what was kept, or on how many follow. Each prompt is read once."""
    monkeypatch.setattr(eval.decode, "WINDOW", 1)
    calls = []

    def counted(*arguments, **options):
        calls.append((len(arguments[1]), options["num_generations"], options["max_rows"]))
        return generate(*arguments, **options)

    monkeypatch.setattr(eval.decode, "generate", counted)
    sampling = SamplingConfig(1.0, 1.0, GREEDY.max_completion_length)
    single = predict(asked(model), examples, decoding(sampling, 5, seed=1))
    three = replace(decoding(sampling, 1, seed=1), num_generations=3)
    samples = predict(asked(model), examples, three)
    # one image at a time, though a batch of 1 is smaller than its three samples
    assert calls == [(5, 1, 5)] + [(1, 3, 1)] * 5
    assert [(row.id, row.extra["sample"]) for row in samples] == [
        (f"e{n}", j) for n in range(5) for j in range(3)
    ]
    assert len({row.completion for row in samples}) > 10
    assert samples[::3] == [row.with_extra(sample=0) for row in single]

    calls.clear()
    told = []
    kept = [replace(row, completion="kept") for row in samples[3:6]]
    # e3 misses its third sample: all of it is answered again
    again = predict(
        asked(model),
        examples,
        replace(three, batch_size=7),
        done=[*kept, *samples[9:11]],
        on_prediction=told.append,
    )
    assert calls == [(2, 3, 7), (2, 3, 7)]  # two images to a batch of 7, without e1, which is kept
    assert again == [*samples[:3], *kept, *samples[6:]]
    assert len(told) == 12


def test_kept_predictions_score_as_the_run_did(model, examples, tmp_path, capsys):
    (tmp_path / "predictions-a.jsonl").write_text("of an earlier evaluation of the same run")
    results = evaluate_sets(
        asked(model),
        {"a": examples, "b": examples[:1]},
        decoding(batch_size=4),
        tmp_path,
        baseline_examples=examples,
        notes={"b": {"note": 1}},
    )
    assert "a (images) 5/5 failed=5" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "predictions-a.jsonl",
        "predictions-b.jsonl",
        "scores-a.json",
        "scores-b.json",
    ]
    rows = read_predictions(tmp_path / "predictions-a.jsonl")
    assert (
        score(rows, baseline_examples=examples)
        == results["a"]
        == json.loads((tmp_path / "scores-a.json").read_text())
    )
    assert (results["a"]["n"], results["a"]["num_patients"], results["a"]["fail_rate"]) == (
        5,
        3,
        1.0,
    )
    assert results["b"]["note"] == 1


def test_sampled_answers_come_from_the_seed(model, examples, tmp_path):
    sampling = SamplingConfig(temperature=1.0, max_completion_length=10)

    def completions(name: str, sets: dict, seed: int) -> list[str]:
        evaluate_sets(asked(model), sets, decoding(sampling, 5, seed), tmp_path / name)
        return [row.completion for row in read_predictions(tmp_path / name / "predictions-a.jsonl")]

    first = completions("first", {"a": examples}, 0)
    # whatever was decoded before
    assert completions("second", {"other": examples[:2], "a": examples}, 0) == first
    assert completions("third", {"a": examples}, 1) != first


# ---- score ---------------------------------------------------------------------------------------
def test_scores_by_hand():
    scores = score(hand_rows())
    assert scores["labels"] == list(ABC)
    # Edema TP 2; Pneumonia TP 1; Fracture FN 2. Cardiomegaly is not evaluated: neither a false
    # positive nor a miss.
    assert scores["micro"] == pytest.approx({"precision": 1, "recall": 3 / 5, "f1": 6 / 8})
    assert scores["macro"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    assert {label: scores["per_label"][label]["support"] for label in ABC} == {
        "Edema": 2,
        "Pneumonia": 1,
        "Fracture": 2,
    }
    # 1; 1 of 2 labels and an unknown entry; 0 as it is not valid; 0 as it cannot be read.
    assert scores["jaccard"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert (scores["fail_rate"], scores["invalid_rate"]) == (1 / 4, 2 / 4)
    assert scores["problems"] == {"think_missing": 1, "answer_missing": 1}
    # one answer has an unknown entry ("nodule") beside a label
    assert (scores["unknown_rate"], scores["no_label_rate"]) == (1 / 4, 0)
    assert scores["unknown_kinds"] == {"negated": 0, "affirmed": 0, "qualified": 0, "other": 1}
    assert scores["silenced_labels"] == []  # none is true ten times
    assert (scores["n"], scores["num_patients"]) == (4, 3)
    assert scores["completion_length"] == {"mean": 17.5, "max": 40}


def test_silenced_labels_count_answers_that_can_be_read_where_the_label_is_evaluated():
    # Edema 12 true, said 2 times; Fracture 12 true, said 3 times, a quarter; Pneumonia 12 true and
    # said 12 times, but never so that it can be read; Cardiomegaly is true and never evaluated.
    rows = [
        row(
            f"<think>x</think><solution>{said}</solution>",
            ("Edema", "Fracture", "Pneumonia", "Cardiomegaly"),
            id=f"r{i}",
        )
        for i, said in enumerate(["Edema", "Edema, Fracture", "Fracture", "Fracture", *[""] * 8])
    ]
    rows += [row("Pneumonia", (), id=f"more{i}") for i in range(12)]
    assert score(parsed(rows))["silenced_labels"] == ["Edema", "Pneumonia"]


def test_answers_without_a_label_are_failures_and_are_counted():
    said = ["no Edema, Nodule", "left Fracture; nodule", "Edema, Edema: yes", "Pneumonia", ""]
    scores = score(
        parsed(
            [
                row(f"<think>x</think><solution>{entries}</solution>", ("Edema",), id=f"r{i}")
                for i, entries in enumerate(said)
            ]
        )
    )
    # Entries of the first two only are unknown; the third has one beside a label; the last none.
    assert (scores["unknown_rate"], scores["no_label_rate"]) == (3 / 5, 2 / 5)
    assert scores["unknown_kinds"] == {"negated": 1, "affirmed": 1, "qualified": 1, "other": 2}
    assert (scores["fail_rate"], scores["invalid_rate"]) == (2 / 5, 0)
    assert scores["problems"] == {"no_label": 2, "empty": 1}
    # Edema is true five times. Dropped: said once of three. All wrong: the two add no hit.
    assert scores["per_label"]["Edema"]["recall"] == 1 / 5
    # 0, 0, 1 of {Edema, the verdict}, 0 of {Edema, Pneumonia}, 0
    assert scores["jaccard"] == pytest.approx((0 + 0 + 1 / 2 + 0 + 0) / 5)


def test_failed_answers_are_treated_in_three_ways():
    policies = score(hand_rows())["failure_policies"]
    # Empty: as above. Dropped: only one of the FN is left. All wrong: the failed answer says Edema
    # and Pneumonia, not Fracture: FP 2, FN 2; Edema 4/5, Pneumonia 2/3, Fracture 0.
    assert policies["empty"] == pytest.approx({"micro_f1": 6 / 8, "macro_f1": 2 / 3})
    assert policies["dropped"] == pytest.approx({"micro_f1": 6 / 7, "macro_f1": 2 / 3})
    assert policies["all_wrong"] == pytest.approx(
        {"micro_f1": 6 / 10, "macro_f1": (4 / 5 + 2 / 3) / 3}
    )


def test_intervals_are_by_patient_and_use_the_reported_jaccard():
    scores = score(hand_rows(patient="the same"))  # one patient: every resample is the whole
    assert scores["intervals"]["jaccard"] == pytest.approx([1 / 3, 1 / 3])
    assert scores["intervals"]["micro_f1"] == pytest.approx([6 / 8, 6 / 8])
    assert scores["intervals"]["macro_f1"] == pytest.approx([2 / 3, 2 / 3])
    low, high = score(hand_rows())["intervals"]["jaccard"]
    assert (low, high) == pytest.approx((0, 2 / 3))  # p1 or p2 alone; p0 alone: (1 + 1/3) / 2


def test_baselines_by_hand():
    baselines = score(hand_rows())["baselines"]
    # The label sets {Edema}, {Edema, Fracture}, {Pneumonia}, {Fracture} occur once each: the first
    # is taken. Edema everywhere: TP 2, FP 2, FN 3; its F1 4/6; Jaccard 1, 1/2, 0, 0.
    assert baselines["most_frequent"].pop("reference") == "this data set"
    assert baselines["most_frequent"] == pytest.approx(
        {"micro_f1": 4 / 9, "macro_f1": 4 / 6 / 3, "jaccard": 3 / 8}
    )
    # All three: TP 5, FP 7; Edema and Fracture 4/6, Pneumonia 2/5; Jaccard 1/3, 2/3, 1/3, 1/3.
    assert baselines["all_labels"].pop("reference") is None
    assert baselines["all_labels"] == pytest.approx(
        {"micro_f1": 10 / 17, "macro_f1": (4 / 6 + 2 / 5 + 4 / 6) / 3, "jaccard": 5 / 12}
    )


def test_baselines_imitate_the_training_data(examples):
    # Pneumonia is in every training example, Edema and Fracture in none, Cardiomegaly is no label
    # of this data set.
    imitated = [
        replace(examples[0], labels=("Cardiomegaly", "Pneumonia"), evaluated_labels=LABELS)
    ] * 3
    baselines = score(hand_rows(), baseline_examples=imitated)["baselines"]
    # Pneumonia everywhere: TP 1, FP 3, FN 4; its F1 2/5; Jaccard 0, 0, 1, 0. At a prevalence of 1
    # and 0 the random baseline says the same.
    for name in ("most_frequent", "prevalence_matched"):
        assert baselines[name].pop("reference") == "train_file"
        assert baselines[name] == pytest.approx(
            {"micro_f1": 2 / 9, "macro_f1": 2 / 5 / 3, "jaccard": 1 / 4}
        )


def test_each_image_counts_in_its_own_evaluated_labels():
    answer = "<think>x</think><solution>Fracture, Edema</solution>"
    scores = score(
        parsed(
            [
                row(answer, ("Fracture", "Cardiomegaly"), evaluated=("Fracture", "Edema")),
                row(answer, ("Cardiomegaly",), evaluated=("Cardiomegaly",)),
            ]
        )
    )
    assert scores["labels"] == ["Cardiomegaly", "Edema", "Fracture"]
    # Row 0: TP Fracture, FP Edema. Row 1: FN Cardiomegaly, and nothing else.
    assert scores["micro"] == pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2})
    assert scores["jaccard"] == pytest.approx((1 / 2 + 0) / 2)
    # What is known of row 0 is {Fracture}, the first of two sets; everywhere: TP 1 in row 0, FN 1
    # in row 1, nothing else.
    assert scores["baselines"]["most_frequent"]["micro_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "completion",
    [
        "<think>x</think><solution>Edema</solution>",
        "<think>x</think><solution>Edema, Cardiomegaly, nodule, Nodule, mass</solution>",
        "<think>x</think><solution>Pneumonia, Edema, Fracture</solution>",
        "<think>x</think><solution></solution>",
        "<solution>Edema</solution>",
        "<think>x</think><solution>Edema</solution> done",
    ],
)
@pytest.mark.parametrize("labels", [("Edema",), ("Edema", "Fracture", "Cardiomegaly"), ()])
def test_jaccard_is_the_hard_reward_without_its_length_penalty(completion, labels):
    target = Target(frozenset(labels) & frozenset(ABC), frozenset(ABC))
    reward = HardReward(length_penalty=0.0)(parse_answer(completion), target, 300)
    assert score(parsed([row(completion, labels)]))["jaccard"] == pytest.approx(reward.total)


# ---- another label map ---------------------------------------------------------------------------
def nih_rows() -> list[dict]:
    """Make the rows of four NIH images under the nine.

    They have Effusion and Mass, Effusion, Infiltration, and No Finding.
    """
    answers = (
        "Lung Lesion, Pleural Effusion, Support Devices",
        "Pleural Effusion",
        "No Finding",
        "No Finding, Lung Opacity",
    )
    truth = (("Effusion", "Mass"), ("Effusion",), ("Infiltration",), ("No Finding",))
    labels = (("Lung Lesion",), (), (), ("No Finding",))
    return parsed(
        [
            row(
                f"<think>x</think><solution>{answer}</solution>",
                names,
                id=f"r{i}",
                evaluated=NIH_NINE,
                patient=f"p{i}",
            )
            | {"source_labels": list(strings)}
            for i, (answer, strings, names) in enumerate(zip(answers, truth, labels, strict=True))
        ]
    )


def test_nih_predictions_are_scored_again_under_another_map(tmp_path, capsys):
    write_predictions(tmp_path / "nine.jsonl", nih_rows())

    def again(file: str, label_map: str, *more: str) -> dict:
        arguments = ["--predictions", f"nih={tmp_path / file}", "--label_map", label_map, *more]
        name = "-".join((Path(file).stem, label_map, *more))
        assert main([*arguments, "--output_dir", str(tmp_path / name)]) == 0
        return json.loads((tmp_path / name / "scores-nih.json").read_text())

    nine, ten = again("nine.jsonl", "nih_nine"), again("nine.jsonl", "nih_ten")
    # Nine: TP Lung Lesion and No Finding (r0, r3), FP No Finding (r2). Support Devices, Lung
    # Opacity and Pleural Effusion are none of the nine: not counted.
    assert nine["micro"] == pytest.approx({"precision": 2 / 3, "recall": 1, "f1": 4 / 5}) and nine[
        "labels"
    ] == list(NIH_NINE)
    # Ten: two more true positives, Pleural Effusion of r0 and r1.
    assert ten["micro"] == pytest.approx({"precision": 4 / 5, "recall": 1, "f1": 8 / 9})
    assert ten["per_label"]["Pleural Effusion"] == {
        "precision": 1.0,
        "recall": 1.0,
        "f1": 1.0,
        "support": 2,
    }
    # Macro: No Finding 2/3, Lung Lesion 1, Pleural Effusion 1, the others 0.
    assert (nine["macro"]["f1"], ten["macro"]["f1"]) == pytest.approx(
        ((2 / 3 + 1) / 9, (2 / 3 + 2) / 10)
    )
    assert ten["run"]["settings"]["label_map"] == {"value": "nih_ten", "origin": "flag"}

    # What was written is a predictions file of the new map, and goes back.
    rows = read_predictions(tmp_path / "nine-nih_ten" / "predictions-nih.jsonl")
    assert [row.labels for row in rows] == [
        ("Lung Lesion", "Pleural Effusion"),
        ("Pleural Effusion",),
        (),
        ("No Finding",),
    ]
    assert {row.evaluated_labels for row in rows} == {NIH_TEN}
    back = again("nine-nih_ten/predictions-nih.jsonl", "nih_nine")
    assert {**back, "run": 0} == {**nine, "run": 0}
    assert {**score(nih_rows()), "run": 0} == {**nine, "run": 0}  # as the rows stood

    # Infiltration alone: No Finding by the other rule, so r2 is right; left out, one image fewer.
    assert again("nine.jsonl", "nih_ten", "--no_label", "no_finding")["micro"]["f1"] == 1.0
    assert again("nine.jsonl", "nih_ten", "--no_label", "drop")["n"] == 3


def test_answers_of_any_model_are_joined_with_the_data_file(tmp_path, capsys):
    """Rows {"id", "completion"} score as our own predictions do, length unknown."""
    rows = nih_rows()
    data = [
        {
            "id": row.id,
            "patient_id": row.patient_id,
            "image": "not-there.png",  # no image is opened
            "labels": list(row.labels),
            "dataset": row.dataset,
            "evaluated_labels": list(row.evaluated_labels),
            "source_labels": list(row.source_labels),
        }
        for row in rows
    ]
    write_jsonl(tmp_path / "test.jsonl", data)
    said = [{"id": row.id, "completion": row.completion} for row in reversed(rows)]
    write_jsonl(tmp_path / "answers.jsonl", said)
    write_jsonl(tmp_path / "mute.jsonl", [row | {"completion": ""} for row in said])
    command = [
        "--predictions",
        f"gpt={tmp_path / 'answers.jsonl'}",
        f"mute={tmp_path / 'mute.jsonl'}",
        "--data_file",
        f"test={tmp_path / 'test.jsonl'}",  # one data file for all
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "answers of unknown length: gpt 4, mute 4\n" in printed
    gpt, mute = (
        json.loads((tmp_path / "out" / f"scores-{name}.json").read_text())
        for name in ("gpt", "mute")
    )
    ours = score(rows)
    assert gpt.pop("completion_length") == {"mean": None, "max": None, "unknown": 4}
    run = gpt.pop("run")
    assert gpt == {key: ours[key] for key in gpt} and ours.keys() - gpt.keys() == {
        "completion_length"
    }
    assert mute["fail_rate"] == 1.0 and mute["macro"]["f1"] == 0.0
    assert run["data"]["gpt"]["file"] == str(tmp_path / "test.jsonl")
    assert run["answers"]["gpt"] == {
        "file": str(tmp_path / "answers.jsonl"),
        "sha256": hashlib.sha256((tmp_path / "answers.jsonl").read_bytes()).hexdigest(),
    }
    kept = read_predictions(tmp_path / "out" / "predictions-gpt.jsonl")
    assert [row.labels for row in kept] == [row.labels for row in rows]
    # what was written goes back by itself, and with the data file
    for more in ([], ["--data_file", f"test={tmp_path / 'test.jsonl'}"]):
        again = ["--predictions", f"gpt={tmp_path / 'out' / 'predictions-gpt.jsonl'}", *more]
        assert main([*again, "--output_dir", str(tmp_path / f"again{len(more)}")]) == 0
        scores = json.loads((tmp_path / f"again{len(more)}" / "scores-gpt.json").read_text())
        assert scores["macro"] == ours["macro"]


def test_several_answers_of_an_image_to_a_data_file_vote(tmp_path, capsys):
    row = {"id": "x", "patient_id": "p", "image": "x.png", "dataset": "s", "labels": ["Edema"]}
    write_jsonl(tmp_path / "test.jsonl", [row])
    said = [("Edema", 4), ("Edema, Fracture", None), ("Pneumonia", 7)]
    rows = [
        {"id": "x", "completion": text, "sample": k, "completion_length": length}
        for k, (text, length) in enumerate(said)
    ]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    command = ["--predictions", f"s={tmp_path}/answers.jsonl", "--answer_format", "label_list"]
    command += ["--data_file", f"s={tmp_path}/test.jsonl", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    [vote] = read_predictions(tmp_path / "out" / "predictions-s.jsonl")
    # Edema 2 of 3, the others 1 of 3
    assert (vote.answer.labels, vote.completion_length) == (("Edema",), None)
    scores = json.loads((tmp_path / "out" / "scores-s.json").read_text())
    assert scores["samples"]["mean"]["completion_length"] == 5.5  # of the two that are known
    assert scores["jaccard"] == 1.0


def test_several_data_files_go_with_the_predictions_of_their_names(tmp_path, capsys):
    for name, label in (("a", "Edema"), ("b", "Fracture")):
        row = {"id": "x", "patient_id": "p", "image": "x.png", "dataset": name, "labels": [label]}
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
        answer = {"id": "x", "completion": label, "answer_format": "label_list"}
        write_jsonl(tmp_path / f"{name}-answers.jsonl", [answer])
    command = ["--output_dir", str(tmp_path / "out"), "--predictions"]
    command += [f"{name}={tmp_path}/{name}-answers.jsonl" for name in "ab"]
    assert main([*command, "--data_file", *(f"{n}={tmp_path}/{n}.jsonl" for n in "ba")]) == 0
    for name in "ab":  # right only against its own file
        scores = json.loads((tmp_path / "out" / f"scores-{name}.json").read_text())
        assert scores["micro"]["f1"] == 1.0


def test_what_is_outside_the_evaluated_categories_is_not_counted_wrong():
    rows = [row.to_row() for row in nih_rows()]
    others = [label for label in LABELS if label not in NIH_NINE]
    assert others == [
        "Enlarged Cardiomediastinum",
        "Lung Opacity",
        "Pleural Effusion",
        "Fracture",
        "Support Devices",
    ]
    more = [
        row | {"completion": row["completion"].replace("</solution>", f", {other}</solution>")}
        for row, other in zip(rows, others[1:], strict=True)
    ]
    with_more, as_before = score(parsed(more)), score(parsed(rows))
    for scores in (with_more, as_before):
        del scores["problems"]  # an entry twice is one
    assert with_more == as_before
    wrong = score(
        parsed(
            [
                rows[0]
                | {
                    "completion": rows[0]["completion"].replace("</solution>", ", Edema</solution>")
                },
                *rows[1:],
            ]
        )
    )
    assert wrong["micro"]["precision"] < as_before["micro"]["precision"]  # one of the nine is


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source_labels": []}, "id 'r1': no source_labels"),
        ({"source_labels": ["Edema=1.0"]}, "id 'r1': not a label of NIH ChestX-ray14: 'Edema=1.0'"),
    ],
)
def test_only_nihs_own_strings_can_be_mapped(tmp_path, capsys, change, message):
    rows = [row.to_row() for row in nih_rows()]
    write_jsonl(tmp_path / "p.jsonl", [rows[0], rows[1] | change, *rows[2:]])
    assert (
        main(
            [
                "--predictions",
                f"nih={tmp_path / 'p.jsonl'}",
                "--label_map",
                "nih_ten",
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {tmp_path / 'p.jsonl'}, {message}")
        and "--label_map nih_ten is for NIH" in error
    )
    assert not (tmp_path / "out").exists()


def test_nothing_to_score_is_an_error():
    with pytest.raises(DataError, match="0 rows"):
        score([])
    with pytest.raises(DataError, match="evaluated_labels is empty"):
        score(parsed([row("x", ("Edema",), evaluated=())]))


# ---- show ----------------------------------------------------------------------------------------
def test_table_of_scores():
    table = format_scores(
        {"site-a": score(hand_rows(patient="the same"))}, per_label=True
    ).splitlines()
    prevalence = table.pop(7)
    # One of the four answers failed. Left out: TP 3, FN 1, so 6/7; all wrong: TP 3, FP 2, FN 2, so
    # 6/10 (labels: see above).
    unknown = table[2][-7:].strip()
    assert table == [
        (
            "data set / stage    n  Jaccard            micro-F1           macro-F1            fail"
            "  unknown"
        ),
        "site-a",
        (
            "  answers           4  0.333 (.333-.333)  0.750 (.750-.750)  0.667 (.667-.667)  0.250"
            f"  {unknown:>7}"
        ),
        "  failed left out                         0.857              0.667",
        "  failed all wrong                        0.600              0.489",
        "  most frequent        0.375              0.444              0.222",
        "  all labels           0.417              0.588              0.578",
        "silenced labels: none",
        (
            "(95 % interval by patient); failed answers count as empty, answers not in the format"
            " have Jaccard 0;"
        ),
        "label frequencies of the baselines are from: this data set",
        "",
        "entries that are no label  answers  no label  negated  affirmed  qualified  other",
        "site-a                       0.250     0.000        0         0          0      1",
        "(share of answers with an unknown entry, and with nothing else; entries by kind)",
        "",
        "site-a     precision  recall     F1  support",
        "Edema          1.000   1.000  1.000        2",
        "Pneumonia      1.000   1.000  1.000        1",
        "Fracture       0.000   0.000  0.000        2",
    ]
    assert prevalence.startswith("  by prevalence        0.")
    # no second table where there is nothing to count
    assert "no label" not in format_scores({"site-a": score([hand_rows()[0], *hand_rows()[2:]])})
    # all three figures are the same
    assert "failed " not in format_scores({"site-a": score(hand_rows()[:3])}).split("(95 %")[0]


def test_table_is_at_most_100_columns_wide():
    scores = score(hand_rows()) | {"n": 123456}
    scores |= {"stage": "GRPO + vote of 16", "silenced_labels": list(LABELS)}
    scores |= {"unknown_kinds": dict.fromkeys(UNKNOWN_KINDS, 1_234_567)}
    table = format_scores({f"a-very-long-name-of-a-data-set-at-site-{i}": scores for i in (1, 2)})
    assert max(map(len, table.splitlines())) <= 100
    assert "site-1" in table and "site-2" in table


# ---- files ---------------------------------------------------------------------------------------
def test_rows_of_a_file_are_parsed_anew(tmp_path):
    rows = [
        row.to_row()
        | {"predicted": ["Pneumonia"], "valid": False, "parsed": False, "unknown": ["x", "y"]}
        for row in hand_rows()
    ]
    write_jsonl(tmp_path / "predictions.jsonl", rows)
    assert read_predictions(tmp_path / "predictions.jsonl") == hand_rows()
    # The format of each row, or one for all.
    plain = [hand_rows()[0].to_row(), row("Edema", ("Edema",), id="r2", answer_format="label_list")]
    write_jsonl(tmp_path / "mixed.jsonl", plain)
    mixed = read_predictions(tmp_path / "mixed.jsonl")
    assert [row.answer.valid for row in mixed] == [True, True]
    as_lists = read_predictions(tmp_path / "mixed.jsonl", "label_list")
    assert [row.answer.valid for row in as_lists] == [False, True]


def test_bad_prediction_rows_are_named(tmp_path):
    good = row("x", ("Edema",))
    file = tmp_path / "predictions.jsonl"
    bad = [
        good,
        good,
        good | {"completion": None},
        good | {"labels": ["Oedema"]},
        good | {"answer_format": "xml"},
    ]
    file.write_text(
        "".join(json.dumps(item) + "\n" for item in bad) + '{"id": "torn', encoding="utf-8"
    )
    with pytest.raises(DataError) as caught:
        read_predictions(file)
    for problem, expected in zip(
        caught.value.problems,
        [
            f"line 2: id '{good['id']}' is also on line 1",
            "line 3: field 'completion' is null; it must be str",
            "line 4: field 'labels' holds 'Oedema'",
            "line 5: field 'answer_format' is 'xml'",
            "line 6: not valid JSON",
        ],
        strict=True,
    ):
        assert expected in problem


def test_results_are_never_overwritten_unless_asked(tmp_path):
    rows = hand_rows()
    write_results(tmp_path, "a", rows, {"n": 1})
    with pytest.raises(UsageError, match=r"predictions-a\.jsonl exists"):
        write_results(tmp_path, "a", rows[:1], {"n": 2})
    assert len(read_predictions(tmp_path / "predictions-a.jsonl")) == 4
    write_results(tmp_path, "a", rows[:1], {"n": 2}, overwrite=True)
    assert json.loads((tmp_path / "scores-a.json").read_text()) == {"n": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "predictions-a.jsonl",
        "scores-a.json",
    ]


# ---- command -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Make a base model, an adapter with its run's config.json, and a data file of three images."""
    folder = tmp_path_factory.mktemp("project")
    settings = {
        "prompt": "demo",
        "max_completion_length": 6,
        "min_visual_tokens": 4,
        "max_visual_tokens": 16,
        "bf16": False,
    }
    save_run(folder, settings)
    names = save_images(folder, 3)
    write_jsonl(
        folder / "site.jsonl",
        [
            {"id": name, "patient_id": name, "image": name, "labels": ["Edema"], "dataset": "site"}
            for name in names
        ],
    )
    return folder


def test_adapter_alone_is_evaluated_as_its_run_was_set_up(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "--adapter_name_or_path",
                str(project / "run"),
                "--data_file",
                f"site={project / 'site.jsonl'}",
            ]
        )
        == 0
    )
    (output_dir,) = (tmp_path / "runs").iterdir()
    assert output_dir.name.endswith("-eval")
    rows = read_predictions(output_dir / "predictions-site.jsonl")
    assert [row.prompt for row in rows] == ["demo"] * 3
    assert max(row.completion_length for row in rows) == 6
    run = json.loads((output_dir / "scores-site.json").read_text())["run"]
    assert run["settings"]["prompt"] == {
        "value": "demo",
        "origin": str(project / "run" / "config.json"),
    }
    assert run["settings"]["model_name_or_path"]["value"] == str(project / "base")
    # not given and not in the run's config.json: the prompt's own form, and what was decoded with
    assert run["settings"]["answer_format"] == {"value": "think_solution", "origin": "prompt demo"}
    assert run["settings"]["num_threads"] == {"value": None, "origin": "default"}
    assert run["data"]["site"]["file"] == str(project / "site.jsonl")
    assert "Support Devices" in capsys.readouterr().out

    # Both, with flags above the run's settings; then the base alone, which answers otherwise.
    common = [
        "--model_name_or_path",
        str(project / "base"),
        "--data_file",
        f"site={project / 'site.jsonl'}",
        "--prompt",
        "demo",
        "--min_visual_tokens",
        "4",
        "--max_visual_tokens",
        "16",
        "--max_completion_length",
        "4",
        "--max_samples",
        "2",
    ]
    assert (
        main([*common, "--adapter_name_or_path", str(project / "run"), "--output_dir", "both"]) == 0
    )
    assert main([*common, "--output_dir", "base"]) == 0
    both, base = (
        read_predictions(tmp_path / name / "predictions-site.jsonl") for name in ("both", "base")
    )
    assert len(both) == len(base) == 2
    assert [row.completion for row in both] != [row.completion for row in base]
    assert max(row.completion_length for row in both) == 4


def test_command_scores_again_without_a_model(tmp_path, capsys):
    write_predictions(tmp_path / "old.jsonl", hand_rows())
    assert (
        main(
            [
                "--predictions",
                f"site={tmp_path / 'old.jsonl'}",
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    scores = json.loads((tmp_path / "out" / "scores-site.json").read_text())
    del scores["run"]
    assert scores == score(hand_rows())
    assert read_predictions(tmp_path / "out" / "predictions-site.jsonl") == hand_rows()
    assert "\nsite\n  answers           4  0.333" in capsys.readouterr().out


def test_rollouts_of_a_run_are_scored_completion_by_completion(tmp_path, monkeypatch):
    """Two groups of two completions, as a GRPO run logs them; the set has a name beyond ASCII."""
    monkeypatch.chdir(tmp_path)
    said = ("Edema", "Fracture", "Fracture", "Fracture")
    truth = (("Edema",), ("Edema",), ("Fracture",), ("Fracture",))
    rows = [
        {"step": 2}
        | row(f"<think>x</think><solution>{name}</solution>", labels, id=f"r{i // 2}")
        | {"group": i // 2, "truncated": False, "reward": 1.0, "advantage": 0.0}
        for i, (name, labels) in enumerate(zip(said, truth, strict=True))
    ]
    write_jsonl(tmp_path / "completions.jsonl", rows)
    assert main(["--predictions", "\u00e4=completions.jsonl", "--output_dir", "out"]) == 0
    scores = json.loads((tmp_path / "out" / "scores-\u00e4.json").read_text(encoding="utf-8"))
    # TP 3, FP 1 (Fracture for Edema), FN 1: 6/8. Edema 1 of 2 found, 2/3; Fracture 2 TP, 1 FP, 4/5.
    assert scores["n"] == 4 and scores["jaccard"] == 3 / 4
    assert scores["micro"]["f1"] == pytest.approx(6 / 8)
    assert scores["macro"]["f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    kept = read_predictions(tmp_path / "out" / "predictions-\u00e4.jsonl")
    assert kept == read_predictions(tmp_path / "completions.jsonl")
    with pytest.raises(DataError, match="several completions of one id, as rollouts do"):
        load_answers(tmp_path / "completions.jsonl")


def test_the_answer_format_of_each_row_counts_unless_one_is_given(tmp_path):
    rows = [row("Edema", ("Edema",), id="r1", answer_format="label_list")]
    rows.append(row("<solution>Edema</solution>", ("Edema",), id="r2", answer_format="solution"))
    write_jsonl(tmp_path / "old.jsonl", rows)

    def invalid_rate(name: str, *more: str) -> float:
        command = ["--predictions", f"a={tmp_path / 'old.jsonl'}", *more]
        assert main([*command, "--output_dir", str(tmp_path / name)]) == 0
        return json.loads((tmp_path / name / "scores-a.json").read_text())["invalid_rate"]

    assert invalid_rate("own") == 0
    assert invalid_rate("lists", "--answer_format", "label_list") == 1 / 2
    # the default's name, given: neither answer has a <think> block
    assert invalid_rate("default", "--answer_format", "think_solution") == 1


def test_an_evaluation_of_an_earlier_version_goes_on():
    """It recorded null for what nobody had given; today's default stands there, ungiven too."""

    def recorded(**settings) -> dict:
        return {
            "settings": {
                name: {"value": value, "origin": origin}
                for name, (value, origin) in ({"temperature": (0.0, "default")} | settings).items()
            },
            "data": {},
            "bad_images": {},
            "adapter_sha256": None,
        }

    now = recorded(bf16=(False, "default"))
    assert difference(recorded(bf16=(None, "default")), now) == ""
    assert difference(recorded(bf16=(True, "flag")), now) == "bf16 (True, now False)"
    assert difference(recorded(bf16=(None, "default")), recorded(bf16=(False, "flag"))) == (
        "bf16 (None, now False)"
    )


def stop_after(monkeypatch, rows: int, stop: signal.Signals) -> list[str]:
    """Send a signal to the whole process once so many rows are kept.

    Returns the names of what is kept, which goes on to grow.
    """
    kept, original = [], Prediction.of_example

    def counted(example, **options):
        kept.append(example.id)
        if len(kept) == rows:
            os.kill(os.getpid(), stop)
        return original(example, **options)

    monkeypatch.setattr(Prediction, "of_example", counted)
    return kept


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_keeps_finished_answers(project, tmp_path, monkeypatch, capsys, stop, code):
    partial = tmp_path / "predictions-site.partial.jsonl"
    kept = stop_after(monkeypatch, 2, stop)
    arguments = [
        "--adapter_name_or_path",
        str(project / "run"),
        "--data_file",
        f"site={project / 'site.jsonl'}",
        "--per_device_eval_batch_size",
        "1",
        "--output_dir",
        str(tmp_path),
    ]
    assert main(arguments) == code
    assert sorted(tmp_path.iterdir()) == [partial.with_suffix(".json"), partial]
    assert f"kept in {partial}: the same command goes on from there" in capsys.readouterr().err
    assert [row.id for row in read_predictions(partial)] == kept and len(kept) == 2
    assert main(["--predictions", f"site={partial}", "--output_dir", str(tmp_path / "scores")]) == 0

    with partial.open("a") as file:
        file.write('{"id": "torn')  # as a process that is killed may leave it
    assert main([*arguments, "--temperature", "0.5"]) == 2  # what was kept is of greedy decoding
    assert (
        "was begun with another temperature (0.0, now 0.5); finish that evaluation"
        in capsys.readouterr().err
    )
    assert (
        main(overriding([*arguments, "--per_device_eval_batch_size", "2"])) == 0
    )  # which changes no answer
    assert len(kept) == 3 == len(set(kept))
    assert not partial.exists() and not partial.with_suffix(".json").exists()
    monkeypatch.undo()
    assert (
        main(
            overriding(
                [*arguments[:-1], str(tmp_path / "whole"), "--per_device_eval_batch_size", "2"]
            )
        )
        == 0
    )
    for name in ("predictions-site.jsonl", "scores-site.json"):
        straight = (
            (tmp_path / "whole" / name).read_text().replace(str(tmp_path / "whole"), str(tmp_path))
        )
        assert (tmp_path / name).read_text() == straight
    assert main(arguments) == 2  # finished: nothing is overwritten
    assert "predictions-site.jsonl exists and nothing is overwritten" in capsys.readouterr().err


def test_a_sampled_evaluation_goes_on_as_if_it_had_never_stopped(project, tmp_path, monkeypatch):
    common = [
        "--adapter_name_or_path",
        str(project / "run"),
        "--temperature",
        "1",
        "--top_p",
        "1",
        "--seed",
        "3",
        "--per_device_eval_batch_size",
        "1",
        "--data_file",
        f"one={project / 'site.jsonl'}",
        f"two={project / 'site.jsonl'}",
    ]
    assert main([*common, "--output_dir", str(tmp_path / "straight")]) == 0
    # three images a set: in the second set, after one image
    kept = stop_after(monkeypatch, 4, signal.SIGINT)
    command = [*common, "--output_dir", str(tmp_path / "stopped")]
    assert main(command) == 130
    assert main(overriding([*command[:-1], str(tmp_path / "stopped"), "--seed", "4"])) == 2
    assert main(command) == 0 and len(kept) == 2 * 3
    for name in ("one", "two"):
        assert read_predictions(tmp_path / f"stopped/predictions-{name}.jsonl") == read_predictions(
            tmp_path / f"straight/predictions-{name}.jsonl"
        )


def test_votes_go_on_where_they_were_stopped(project, tmp_path, monkeypatch, capsys):
    common = ["--adapter_name_or_path", str(project / "run"), "--num_generations", "3"]
    common += ["--data_file", f"site={project / 'site.jsonl'}"]
    common += ["--per_device_eval_batch_size", "1", "--seed", "3"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main([*common, "--output_dir", str(straight)]) == 0
    assert "vote - one sample" in capsys.readouterr().out
    files = ["predictions-site.jsonl", "samples-site.jsonl", "scores-site.json"]
    assert sorted(path.name for path in straight.iterdir()) == files
    samples = read_predictions(straight / "samples-site.jsonl")
    votes = read_predictions(straight / "predictions-site.jsonl")
    assert [row.extra["sample"] for row in samples] == [0, 1, 2] * 3
    assert votes == vote_predictions(samples)
    scores = json.loads((straight / "scores-site.json").read_text())
    assert scores["n"] == 3 and scores["samples"] == sample_scores(samples, seed=3)
    assert scores["probabilities"] == probability_scores(votes, seed=3)
    # not given: as in rollouts, not greedy
    assert scores["run"]["settings"]["temperature"] == {"value": 0.8, "origin": "num_generations 3"}

    kept = stop_after(monkeypatch, 5, signal.SIGINT)  # in the second image
    command = [*common, "--output_dir", str(stopped)]
    assert main(command) == 130
    partial = stopped / "predictions-site.partial.jsonl"
    # an image is written whole: a cut before that loses it, a process that ends may cut it
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:5]))
    assert main(overriding([*command, "--num_generations", "4"])) == 2
    assert "was begun with another num_generations (3, now 4)" in capsys.readouterr().err
    assert main(command) == 0
    assert len(kept) == 6 + 6  # the first image was whole, the others are answered again
    assert sorted(path.name for path in stopped.iterdir()) == files
    for name in files[:2]:
        assert (stopped / name).read_text() == (straight / name).read_text()
    assert main(command) == 2  # finished
    assert "predictions-site.jsonl exists and nothing is overwritten" in capsys.readouterr().err


def test_thresholds_are_carried_to_every_set_of_a_command(project, tmp_path, capsys):
    common = ["--adapter_name_or_path", str(project / "run"), "--num_generations", "2"]
    common += ["--data_file", f"home={project / 'site.jsonl'}", f"away={project / 'site.jsonl'}"]
    common += ["--thresholds_from", "home", "--output_dir", str(tmp_path / "out")]
    assert main(common) == 0
    # one data file under two names, so one hospital's patients
    assert capsys.readouterr().out.count("3 of 3 patients chose the thresholds as well") == 2
    votes = {
        name: read_predictions(tmp_path / "out" / f"predictions-{name}.jsonl")
        for name in ("home", "away")
    }
    for name in votes:
        scores = json.loads((tmp_path / "out" / f"scores-{name}.json").read_text())
        assert scores["probabilities"]["operating_points"] == operating_points(
            votes[name], votes["home"], "home"
        )


class Blind(Policy):
    """A policy that sees one and the same image, whatever it is asked about."""

    def encode(self, example: Example):
        return super().encode(replace(example, image="small/image-0.png"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_swapped_images_change_answers_only_where_they_are_seen(
    model, examples, tmp_path, temperature
):
    sampling = SamplingConfig(temperature, 1.0, GREEDY.max_completion_length)
    swapping = replace(decoding(sampling, seed=1), swap_images=True)
    results = {}
    for kind, policy in (("seeing", asked(model)), ("blind", Blind(model.net, model, SHORT))):
        results |= evaluate_sets(policy, {kind: examples}, swapping, tmp_path)
    blind = results["blind"]["faithfulness"]
    assert blind["answers_unchanged"] == {"mean": 1.0, "interval": [1.0, 1.0], "n": 5}
    assert set(blind["difference"].values()) == {0.0}
    own = read_predictions(tmp_path / "predictions-blind.jsonl")
    swapped = read_predictions(tmp_path / "swapped-blind.jsonl")
    assert [row.completion for row in swapped] == [row.completion for row in own]
    # five unreadable answers, all to other images, with other words
    assert results["seeing"]["faithfulness"]["answers_unchanged"]["mean"] == 0.0
    own = read_predictions(tmp_path / "predictions-seeing.jsonl")
    swapped = read_predictions(tmp_path / "swapped-seeing.jsonl")
    assert results["seeing"]["faithfulness"] == faithfulness_scores(own, swapped, seed=1)
    partners = partners_of(examples, 1)
    patients = {example.id: example.patient_id for example in examples}
    for mine, other, partner in zip(own, swapped, partners, strict=True):
        assert mine.id == other.id and other.extra["image_of"] == partner.id
        assert patients[mine.id] != patients[partner.id]
    # The image is the partner's; truth and random numbers are the example's own.
    alone = predict(
        asked(model),
        [
            replace(example, image=partner.image)
            for example, partner in zip(examples, partners, strict=True)
        ],
        decoding(sampling, seed=1),
    )
    assert [row.completion for row in swapped] == [row.completion for row in alone]


def test_a_swap_goes_on_where_it_was_stopped(project, tmp_path, monkeypatch, capsys):
    common = ["--adapter_name_or_path", str(project / "run"), "--swap_images"]
    common += ["--data_file", f"site={project / 'site.jsonl'}"]
    common += ["--per_device_eval_batch_size", "1", "--seed", "3"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main([*common, "--output_dir", str(straight)]) == 0
    assert "of the answers stay the same" in " ".join(capsys.readouterr().out.split())
    files = ["predictions-site.jsonl", "scores-site.json", "swapped-site.jsonl"]
    assert sorted(path.name for path in straight.iterdir()) == files
    kept = stop_after(monkeypatch, 5, signal.SIGINT)  # three images, and two of the swapped ones
    command = [*common, "--output_dir", str(stopped)]
    assert main(command) == 130
    assert sorted(path.name for path in stopped.iterdir()) == [
        f"{kind}-site.partial.{form}"
        for kind in ("predictions", "swapped")
        for form in ("json", "jsonl")
    ]
    # the seed decides on the swap, also where decoding is greedy
    assert main(overriding([*command, "--seed", "4"])) == 2
    assert "was begun with another seed (3, now 4)" in capsys.readouterr().err
    assert main(command) == 0 and len(kept) == 6
    assert sorted(path.name for path in stopped.iterdir()) == files
    for name in ("predictions-site.jsonl", "swapped-site.jsonl"):
        assert (stopped / name).read_text() == (straight / name).read_text()
    faithful = [
        json.loads((folder / "scores-site.json").read_text())["faithfulness"]
        for folder in (straight, stopped)
    ]
    assert faithful[0] == faithful[1] and faithful[0]["n"] == 3


def test_one_completion_an_image_is_what_it_was(project, tmp_path):
    """--num_generations 1 writes the files of an evaluation without the flag."""
    common = ["--adapter_name_or_path", str(project / "run"), "--temperature", "0.5"]
    common += ["--data_file", f"site={project / 'site.jsonl'}"]
    assert main([*common, "--output_dir", str(tmp_path / "a")]) == 0
    assert main([*common, "--num_generations", "1", "--output_dir", str(tmp_path / "b")]) == 0
    first, second = tmp_path / "a", tmp_path / "b"
    assert sorted(path.name for path in second.iterdir()) == [
        "predictions-site.jsonl",
        "scores-site.json",
    ]
    name = "predictions-site.jsonl"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    assert "samples" not in json.loads((second / "scores-site.json").read_text())
    assert "sample" not in json.loads((second / name).read_text().splitlines()[0])


def test_an_earlier_evaluation_had_one_completion_an_image():
    """A record without num_generations is not that of a vote."""

    def record(**settings) -> dict:
        values = {"temperature": 0.8} | settings
        return {
            "settings": {name: {"value": value} for name, value in values.items()},
            "data": {},
            "bad_images": {},
            "adapter_sha256": None,
        }

    assert difference(record(), record(num_generations=1)) == ""
    assert difference(record(), record(num_generations=4)) == "num_generations (1, now 4)"
    assert difference(record(num_generations=4), record(num_generations=4)) == ""
    assert difference(record(), record(swap_images=True)) == "swap_images (False, now True)"


def test_results_that_are_replaced_leave_no_samples_behind(tmp_path):
    rows = hand_rows()
    write_results(tmp_path, "a", rows, {}, more={"samples": rows})
    assert (tmp_path / "samples-a.jsonl").is_file()
    write_results(tmp_path, "a", rows, {}, overwrite=True)
    assert not (tmp_path / "samples-a.jsonl").exists()


def test_every_example_draws_its_own_numbers(model, examples):
    twice = [examples[0], replace(examples[0], id="again")]
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_completion_length=8)
    first, second = predict(
        asked(model),
        twice,
        decoding(sampling, seed=1),
    )
    assert first.completion != second.completion


def test_answers_of_an_unknown_beginning_are_neither_taken_nor_lost(project, tmp_path, capsys):
    partial = tmp_path / "predictions-site.partial.jsonl"
    partial.write_text("{}\n")
    assert (
        main(
            [
                "--adapter_name_or_path",
                str(project / "run"),
                "--data_file",
                f"site={project / 'site.jsonl'}",
                "--output_dir",
                str(tmp_path),
            ]
        )
        == 2
    )
    assert (
        f"{partial} was left there by another command" in capsys.readouterr().err
        and partial.read_text() == "{}\n"
    )


def test_one_call_decodes_a_window(model, examples, monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append((len(arguments[1]), options["max_rows"]))
        return generate(*arguments, **options)

    monkeypatch.setattr(eval.decode, "generate", counted)
    monkeypatch.setattr(eval.decode, "WINDOW", 2)
    predict(asked(model), examples, decoding())
    assert calls == [(4, 2), (1, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--data_file", "a={project}/site.jsonl"], "no model"),
        (["--predictions", "a={project}/none.jsonl"], "none.jsonl: no such predictions file"),
        (
            [
                "--adapter_name_or_path",
                "{project}/run",
                "--data_file",
                "a={project}/site.jsonl",
                "--label_map",
                "nih_ten",
            ],
            "--label_map: goes with --predictions",
        ),
        (  # answers are joined with the data file, so it must be there
            ["--predictions", "a={project}/none.jsonl", "--data_file", "a={project}/no.jsonl"],
            "no.jsonl: no such data file",
        ),
        (
            ["--predictions", "a={project}/none.jsonl", "--data_file", "a={project}/site.jsonl"],
            "none.jsonl: no such file of answers",
        ),
        (
            ["--predictions", "a=x", "b=x", "c=x", "--data_file", "b=x", "c=y"],
            "--predictions a: of several data files each is joined with the predictions of its"
            " name, and there is no --data_file a=FILE",
        ),
        (
            ["--predictions", "a=x", "--data_file", "a=x", "c=y"],
            "--data_file c: of several data files each is joined with the predictions of its name,"
            " and there is no --predictions c=FILE",
        ),
        (
            ["--predictions", "a=x", "--adapter_name_or_path", "{project}/run"],
            "--adapter_name_or_path: has no place beside --predictions",
        ),
        (
            ["--adapter_name_or_path", "{project}/base", "--data_file", "a={project}/site.jsonl"],
            "no adapter there",
        ),
        (
            ["--adapter_name_or_path", "{project}/run", "--data_file", "{project}/site.jsonl"],
            "expected NAME=FILE",
        ),
        (
            ["--adapter_name_or_path", "{project}/run", "--data_file", "a={project}/none.jsonl"],
            "no such data file",
        ),
        (
            ["--adapter_name_or_path", "{project}/run", "--data_file", "a=demo:none"],
            "the demo has no split 'none'",
        ),
        (
            ["--adapter_name_or_path", "{project}/run", "--data_file", "a={project}/label.jsonl"],
            "field 'labels' holds 'Oedema'",
        ),
        (
            ["--adapter_name_or_path", "{project}/run", "--data_file", "a={project}/image.jsonl"],
            "image 'none.png': no such file",
        ),
        (
            [
                "--adapter_name_or_path",
                "{project}/run",
                "--data_file",
                "a={project}/site.jsonl",
                "--prompt",
                "other",
            ],
            "--prompt other: no such instruction variant; there are demo",
        ),
        (
            [
                "--adapter_name_or_path",
                "{project}/run",
                "--data_file",
                "a={project}/site.jsonl",
                "--min_visual_tokens",
                "20",
            ],
            "--min_visual_tokens 20 is above --max_visual_tokens 16",
        ),  # the latter is the run's
        (
            ["--model_name_or_path", "{project}/none", "--data_file", "a={project}/site.jsonl"],
            "no such folder",
        ),
        (
            [
                "--adapter_name_or_path",
                "{project}/run",
                "--data_file",
                "a={project}/site.jsonl",
                "--num_generations",
                "4",
                "--temperature",
                "0",
            ],
            "--temperature 0: greedy decoding gives the same answer 4 times; leave the flag out",
        ),
        (
            ["--predictions", "a={project}/none.jsonl", "--num_generations", "0"],
            "--num_generations: expected an integer from 1 to 65536, got '0'",
        ),
        (
            [
                "--adapter_name_or_path",
                "{project}/run",
                "--data_file",
                "a={project}/site.jsonl",
                "--thresholds_from",
                "a",
            ],
            "--thresholds_from: one answer an image has no shares to put a threshold on",
        ),
        (
            ["--predictions", "a={project}/none.jsonl", "--swap_images"],
            "--swap_images: needs a model to answer again",
        ),
        (
            [
                "--adapter_name_or_path",
                "{project}/run",
                "--data_file",
                "a={project}/site.jsonl",
                "--swap_images",
                "--num_generations",
                "2",
            ],
            "--swap_images: compares one answer an image with another; evaluate once with it",
        ),
        (
            [
                "--adapter_name_or_path",
                "{project}/run",
                "--data_file",
                "a={project}/site.jsonl",
                "--swap_images",
                "--max_samples",
                "1",
            ],
            "--swap_images: patient 'image-0.png' has 1 of the 1 images, so not all of them can",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    project, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    good = {
        "id": "1",
        "patient_id": "1",
        "image": "image-0.png",
        "labels": ["Edema"],
        "dataset": "site",
    }
    write_jsonl(project / "label.jsonl", [good | {"labels": ["Oedema"]}])
    write_jsonl(project / "image.jsonl", [good | {"image": "none.png"}])
    assert main([argument.format(project=project) for argument in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_all_mistakes_of_a_command_line_are_named_at_once(capsys):
    assert (
        main(
            [
                "--data_file",
                "a=x",
                "a=y",
                "--temperature",
                "-1",
                "--top_p",
                "0",
                "--max_samples",
                "0",
            ]
        )
        == 2
    )
    errors = capsys.readouterr().err
    for problem in (
        "the name a is taken",
        "no model",
        "--temperature: expected a number from 0 to 100, got '-1'",
        "--top_p: expected a number above 0 and at most 1, got '0'",
        "--max_samples: expected an integer from 1 to 1000000000 or none, got '0'",
    ):
        assert problem in errors


def test_command_does_not_overwrite(project, tmp_path, capsys):
    write_results(tmp_path, "site", hand_rows(), {})
    before = (tmp_path / "predictions-site.jsonl").read_bytes()
    assert (
        main(
            [
                "--adapter_name_or_path",
                str(project / "run"),
                "--data_file",
                f"site={project / 'site.jsonl'}",
                "--output_dir",
                str(tmp_path),
            ]
        )
        == 2
    )
    assert (
        "predictions-site.jsonl is finished, but with another data file of site; give another"
        " --output_dir" in capsys.readouterr().err
    )
    assert (tmp_path / "predictions-site.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a run's configuration"),
        (
            '{"settings": {"max_completion_length": {"value": "long"}}}',
            "max_completion_length is 'long', expected int",
        ),
        ('{"settings": {"prompt": {"value": "gone"}}}', "config.json: there is no prompt 'gone'"),
    ],
)
def test_unusable_settings_of_the_run_are_an_error(project, tmp_path, capsys, content, message):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).symlink_to(project / "run" / name)
    (tmp_path / "config.json").write_text(content)
    assert (
        main(
            ["--adapter_name_or_path", str(tmp_path), "--data_file", f"a={project / 'site.jsonl'}"]
        )
        == 2
    )
    assert message in capsys.readouterr().err


def test_a_line_separator_in_an_answer_ends_no_row_of_the_answers_so_far(tmp_path):
    """U+2028 ends a line for str.splitlines, but not in JSONL: the row behind it is kept too."""
    record = {
        "settings": {"temperature": {"value": 0.0}},
        "data": {},
        "bad_images": {},
        "adapter_sha256": None,
    }
    (tmp_path / "predictions-site.partial.json").write_text(json.dumps(record))
    rows = [
        Prediction.from_row(
            {
                "id": id,
                "patient_id": id,
                "dataset": "d",
                "labels": ["Edema"],
                "evaluated_labels": ["Edema"],
                "completion": "one\u2028two\x85three",
                "completion_length": 3,
            }
        )
        for id in ("a", "b")
    ]
    write_predictions(tmp_path / "predictions-site.partial.jsonl", rows)
    assert read_partial(tmp_path, "site", record) == rows
