"""Protect a run on labels and a prompt of one's own, from SFT to the report, with their files gone.

Run: pytest tests/scripts/test_own_labels.py
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import run_grpo
from data.answers import parse_answer
from data.check import main as check
from data.examples import Example, read_jsonl
from data.label_sets import read_labels
from data.labels import CHEXPERT
from data.predictions import Prediction, write_predictions
from data.traces import check_trace
from data.traces import main as traces
from engine.config import ConfigError, UsageError
from engine.encode import Encoder
from engine.merge import main as merge
from eval.compare import main as compare
from eval.evaluate import main as evaluate
from eval.folders import load_answers
from eval.matrix import main as matrix
from eval.report import main as report
from rl.monitors import OF_ALL, Monitors, monitor_names
from rl.settings import resolve_grpo
from tests.helpers.runs import grpo, lines, record, sft, write_rows
from tests.helpers.tiny import save_images

NAMES = (
    "Unremarkable",
    "Surgical Clips",
    "Tuberculosis",
    "Silicosis",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Bronchiectasis",
    "Scoliosis",
    "Goitre",
    "Aortic Ectasia",
    "Azygos Lobe",
    "Cervical Rib",
    "Cavity",
    "Granuloma",
    "Calcified Node",
    "Honeycombing",
    "Air Trapping",
    "Miliary Pattern",
    "Gastric Bubble",
)
LABEL_FILE = "\n".join(
    [
        "# twenty labels, none of the usual ones",
        "exclusive: Unremarkable | nothing unusual",
        "beside: Surgical Clips",
        "Tuberculosis | TB",
        *NAMES[3:],
    ]
)
PROMPT = """
answer_format = "think_solution"
system = "You look at radiographs."
text = '''
Which of {number} labels apply? {labels}. {rule}Write <think>..</think><solution>..</solution>,
no {{braces}}.'''
"""
TOLD = (
    f"Which of 20 labels apply? {', '.join(NAMES)}. Report Unremarkable only if no abnormality is"
    " present; Surgical Clips may accompany it.\n"
    "Write <think>..</think><solution>..</solution>,\nno {braces}."
)


def labels_of(i: int) -> list[str]:
    """Give half of the images TB, and each one further label of the 20."""
    return sorted({NAMES[2 + i % 18], *(["Tuberculosis"] * (i % 2))}, key=NAMES.index)


def write_own_data(folder: Path) -> Path:
    rows = [
        {
            "id": f"e{i}",
            "patient_id": f"p{i // 2}",
            "image": name,
            "labels": labels_of(i),
            "dataset": "clinic",
            "answer": f"<think>seen</think><solution>{', '.join(labels_of(i))}</solution>",
        }
        for i, name in enumerate(save_images(folder, 8))
    ]
    return write_rows(folder / "own.jsonl", rows)


def speak_own(monkeypatch) -> None:
    """Make a random model's completions name labels of the file, so that rewards differ."""

    def decode(encoder, ids):
        first, second = ids[0].item(), ids[-1].item()
        if first % 5 == 0:
            return "unreadable"
        named = ", ".join(sorted({"tb", NAMES[2 + first % 18], NAMES[2 + second % 18].lower()}))
        return f"<think>TB is seen, {first}</think><solution>{named}</solution>"

    monkeypatch.setattr(Encoder, "decode", decode)


@pytest.fixture(scope="module")
def own(tmp_path_factory, tiny_checkpoint):
    """Run SFT, GRPO, evaluation and report; label file and prompt are gone after SFT."""
    folder = tmp_path_factory.mktemp("own")
    data = write_own_data(folder)
    (folder / "labels.txt").write_text(LABEL_FILE, encoding="utf-8")
    (folder / "clinic.toml").write_text(PROMPT, encoding="utf-8")
    more = ("--label_file", str(folder / "labels.txt"), "--prompt", str(folder / "clinic.toml"))
    sets = ("--validation_file", f"clinic={data}")
    with pytest.MonkeyPatch.context() as patch:
        speak_own(patch)
        checkpoint = tiny_checkpoint("qwen2_5_vl")
        assert sft(checkpoint, data, folder / "sft", *more, *sets, "--max_steps", "1") == 0
        for name in ("labels.txt", "clinic.toml"):
            (folder / name).unlink()
        steps = ("--max_steps", "2", "--save_steps", "1", "--eval_steps", "1")
        assert grpo(folder / "sft", data, folder / "grpo", *sets, *steps) == 0
        asked = ("--adapter_name_or_path", str(folder / "grpo"), "--data_file", f"clinic={data}")
        assert (
            evaluate([*asked, "--output_dir", str(folder / "eval"), "--num_generations", "2"]) == 0
        )
    runs = [f"{name}={folder / name}" for name in ("sft", "grpo")]
    assert report([*runs, "--output_dir", str(folder / "report"), "--resamples", "20"]) == 0
    return folder


# ---- end to end ----------------------------------------------------------------------------------
def test_no_chest_label_is_anywhere_in_what_the_runs_write(own):
    chest = re.compile(rf"{CHEXPERT.in_text.pattern}|chexpert|14 labels", re.IGNORECASE)
    found = {
        str(path.relative_to(own)): set(chest.findall(text))
        for path in own.rglob("*")
        if path.is_file() and path.suffix not in (".png", ".safetensors")
        for text in [path.read_bytes().decode("utf-8", "replace")]
        if chest.search(text)
    }
    assert found == {} and len(list(own.rglob("*.json*"))) > 20


@pytest.mark.parametrize("run", ["sft", "grpo"])
def test_label_file_and_prompt_are_kept_whole_with_their_hashes(own, run):
    settings = record(own / run / "config.json")["settings"]
    for name, file, text in (
        ("label_file", "labels.txt", LABEL_FILE),
        ("prompt", "clinic.toml", PROMPT),
    ):
        assert settings[name]["value"] == {
            "file": str(own / file),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "text": text,
        }
        assert settings[name]["origin"] == ("flag" if run == "sft" else "adapter's run")
    assert settings["answer_format"]["value"] == "think_solution"


def test_answers_are_parsed_rewarded_and_scored_in_the_labels_of_the_file(own):
    for path in ("grpo/completions.jsonl", "eval/samples-clinic.jsonl"):
        rows = lines(own / path)
        assert {row["prompt"] for row in rows} == {"clinic"}
        assert all(row["label_set"][2] == "Tuberculosis | TB" for row in rows)
        said = [row for row in rows if row["parsed"]]
        assert said and all(row["predicted"] for row in said)
        assert not any(row["unknown"] for row in said)
        assert all(row["evaluated_labels"] == list(NAMES) for row in rows)
    rollout = [row for row in lines(own / "grpo/completions.jsonl") if row["parsed"]]
    for row in rollout:  # Eq. 3 by hand
        said, true = set(row["predicted"]), set(row["labels"])
        overlap = len(said & true) / len(said | true)
        assert row["rewards"]["hard"]["jaccard"] == pytest.approx(overlap if row["valid"] else 0)
    scores = record(own / "eval/scores-clinic.json")
    assert scores["labels"] == list(NAMES) == list(scores["per_label"])
    assert scores["label_set"][0] == "exclusive: Unremarkable | nothing unusual"
    assert scores["macro"]["f1"] == pytest.approx(
        sum(row["f1"] for row in scores["per_label"].values()) / 20
    )


def test_the_model_is_told_the_text_of_the_file_with_the_labels_in_it(own):
    card = (own / "grpo" / "README.md").read_text(encoding="utf-8")
    assert json.dumps(TOLD) in card and json.dumps("You look at radiographs.") in card
    assert "of 20 labels (Unremarkable, Surgical Clips, Tuberculosis," in card
    page = (own / "report" / "report.md").read_text(encoding="utf-8")
    assert "Which of 20 labels apply?" in page and "clinic" in page
    assert "All 20 labels" in page and "Unremarkable and a finding" in page


def test_the_cases_of_a_report_show_their_images(own):
    page = (own / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") > 0


def test_monitors_are_named_by_the_labels_of_the_file():
    labels = read_labels(LABEL_FILE, "labels.txt")
    names = monitor_names(labels)
    assert "monitors/label_shift/Aortic_Ectasia" in names and len(names) == len(OF_ALL) + 40
    monitors = Monitors("hard", 10, label_set=labels)
    example = Example("a", "p", "x", ("Goitre",), "clinic", Path(), labels.names, label_set=labels)
    answers = [parse_answer("<solution>TB</solution>", "solution", labels)] * 2
    for _ in range(100):
        monitors.labels.add(example.target, answers)
    assert monitors.labels.silenced() == ["Goitre"]
    assert monitors.labels.metrics()["said_ratio/Tuberculosis"] == 101


# ---- later commands ------------------------------------------------------------------------------
def resumed(own: Path, tmp_path: Path, *more: str) -> int:
    checkpoint = str(own / "grpo" / "checkpoint-1")
    return run_grpo.main(
        ["--resume_from_checkpoint", checkpoint, "--output_dir", str(tmp_path / "again"), *more]
    )


def test_a_run_resumes_by_the_kept_text_bit_for_bit(own, tmp_path, monkeypatch):
    speak_own(monkeypatch)
    assert resumed(own, tmp_path) == 0
    first, second = (
        folder / "adapter_model.safetensors" for folder in (own / "grpo", tmp_path / "again")
    )
    assert first.read_bytes() == second.read_bytes()
    settings = [record(at / "config.json")["settings"] for at in (own / "grpo", tmp_path / "again")]
    assert settings[0]["prompt"] == settings[1]["prompt"]


@pytest.mark.parametrize(("flag", "text"), [("prompt", PROMPT), ("label_file", LABEL_FILE)])
def test_a_changed_file_is_refused_on_resume_and_an_equal_one_is_not(own, tmp_path, flag, text):
    file = tmp_path / "moved.toml"
    file.write_text(text, encoding="utf-8")
    checkpoint = ["--resume_from_checkpoint", str(own / "grpo" / "checkpoint-1")]
    kept = resolve_grpo([*checkpoint, f"--{flag}", str(file)]).configs[0]
    assert (kept.instruction.text, kept.label_set.names) == (TOLD, NAMES)
    file.write_text(text.replace("# twenty", "# 20").replace("labels apply", "apply"), "utf-8")
    with pytest.raises(ConfigError) as error:
        resolve_grpo([*checkpoint, f"--{flag}", str(file)])
    (problem,) = error.value.problems
    assert problem.startswith(f"--{flag}: the resumed run has {own}/")
    assert f"not {file}, SHA-256" in problem


def test_grpo_cannot_change_the_labels_that_the_adapter_knows(own, tmp_path, tiny_sft_run):
    other = tmp_path / "other.txt"
    other.write_text("Goitre\nScoliosis\n", encoding="utf-8")
    data = ["--train_file", str(own / "own.jsonl"), "--label_file", str(other)]
    for folder, known in (
        (own / "sft", f"{own}/labels.txt"),
        (tiny_sft_run("gemma3"), "the 14 labels of CheXpert"),
    ):
        with pytest.raises(UsageError) as error:
            resolve_grpo(["--adapter_name_or_path", str(folder), *data])
        (problem,) = error.value.problems
        assert f"--label_file {other}, SHA-256" in problem and f"was trained on {known}" in problem


def test_moved_answers_are_scored_again_in_their_own_labels(own, tmp_path):
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copyfile(own / "eval" / "predictions-clinic.jsonl", moved)
    asked = ["--predictions", f"a={moved}", "--train_file", str(own / "own.jsonl")]
    assert evaluate([*asked, "--output_dir", str(tmp_path / "out")]) == 0
    before, now = record(own / "eval/scores-clinic.json"), record(tmp_path / "out/scores-a.json")
    assert now["per_label"] == before["per_label"]
    assert now["baselines"]["most_frequent"]["reference"] == "train_file"
    assert now["run"]["settings"]["label_file"]["origin"] == str(moved)


def test_answers_of_another_model_are_joined_in_the_labels_of_the_flag(own, tmp_path):
    (tmp_path / "labels.txt").write_text(LABEL_FILE, encoding="utf-8")
    answers = [{"id": f"e{i}", "completion": "<solution>tb</solution>"} for i in range(8)]
    joined = write_rows(tmp_path / "answers.jsonl", answers)
    asked = ["--predictions", f"a={joined}", "--data_file", f"a={own / 'own.jsonl'}"]
    asked += ["--answer_format", "solution", "--label_file", str(tmp_path / "labels.txt")]
    assert evaluate([*asked, "--output_dir", str(tmp_path / "out")]) == 0
    scores = record(tmp_path / "out" / "scores-a.json")
    assert scores["per_label"]["Tuberculosis"]["recall"] == 1 and scores["fail_rate"] == 0


def test_runs_of_other_labels_are_refused_side_by_side_in_one_line(
    own, tiny_sft_run, tmp_path, capsys
):
    chest = tiny_sft_run("gemma3")
    runs = [f"own={own / 'sft'}", f"chest={chest}"]
    for command in (compare, report):
        assert command([*runs, "--output_dir", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line == (
            f"error: own ({own / 'sft'}) and chest ({chest}) have other labels (20 of a label file:"
            " Unremarkable, Surgical Clips, Tuberculosis, ...; the 14 of CheXpert): their scores"
            " cannot stand side by side"
        )
    assert not (tmp_path / "out").exists()
    assert compare([f"a={own / 'sft'}", f"b={own / 'grpo'}", "--resamples", "20"]) == 0


def test_a_matrix_takes_the_labels_of_the_run_and_prompts_by_file(own, tmp_path, monkeypatch):
    speak_own(monkeypatch)
    for name in ("first", "second"):
        (tmp_path / f"{name}.toml").write_text(PROMPT, encoding="utf-8")
    asked = ["--model", f"m={own / 'sft'}", "--data_file", f"clinic={own / 'own.jsonl'}"]
    asked += ["--prompt", *(str(tmp_path / f"{name}.toml") for name in ("first", "second"))]
    assert matrix([*asked, "--output_dir", str(tmp_path / "cells")]) == 0
    (row, *_) = lines(tmp_path / "cells" / "m.second" / "predictions-clinic.jsonl")
    assert row["prompt"] == "second" and row["label_set"][0].startswith("exclusive: Unremarkable")


# ---- files before a run --------------------------------------------------------------------------
def test_labels_that_an_adapter_does_not_know_are_warned_of(own, tmp_path, capsys):
    """By each command that answers, once for a model. Another comment makes no other labels."""
    for name, text in (("same", f"# again\n{LABEL_FILE}"), ("other", f"{LABEL_FILE}\nShunt")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    few = ["--data_file", f"clinic={own / 'own.jsonl'}", "--max_samples", "1"]
    few += ["--max_completion_length", "2"]
    asked = ["--adapter_name_or_path", str(own / "sft"), *few, "--output_dir"]
    warning = re.compile(
        rf"^warning: --label_file {tmp_path}/other.txt, SHA-256 \w+: the adapter in {own}/sft was"
        rf" trained on {own}/labels.txt, SHA-256 \w+, and is asked for others$",
        re.MULTILINE,
    )
    for name, count in (("same", 0), ("other", 1)):
        label_file = ["--label_file", str(tmp_path / f"{name}.txt")]
        assert evaluate([*asked, str(tmp_path / name), *label_file]) == 0
        shown = capsys.readouterr().err
        assert (len(warning.findall(shown)), shown.count("was trained on")) == (count, count)
    models = ["--model", f"sft={own / 'sft'}", "--prompt", "only_label", "free_reasoning"]
    cells = str(tmp_path / "cells")
    assert matrix([*models, *few, *label_file, "--output_dir", cells]) == 0  # of the other ones
    assert len(warning.findall(capsys.readouterr().err)) == 1


def test_traces_are_asked_for_and_checked_in_the_labels_and_by_the_prompt_of_the_files(
    own, tmp_path, capsys
):
    (tmp_path / "labels.txt").write_text(LABEL_FILE, encoding="utf-8")
    (tmp_path / "clinic.toml").write_text(PROMPT, encoding="utf-8")
    given = ["--data_file", str(own / "own.jsonl"), "--label_file", str(tmp_path / "labels.txt")]
    asked = ["--prompt", str(tmp_path / "clinic.toml"), "--output_dir", str(tmp_path / "out")]
    assert traces(["export", *given, *asked, "--form", "openai", "--model", "m"]) == 0
    (request, *_) = lines(tmp_path / "out" / "requests-001.jsonl")
    told = request["body"]["messages"][0]["content"][1]["text"]
    assert told.startswith(f"{TOLD}\n\nFor you alone") and "present: Tuberculosis\n" in told
    assert not CHEXPERT.in_text.search(told)
    output = tmp_path / "taught.jsonl"
    assert traces(["import", *given, "--teacher", "template", "--output", str(output)]) == 0
    for row in lines(output):
        answer = parse_answer(row["answer"], label_set=read_labels(LABEL_FILE, "f"))
        assert answer.valid and list(answer.labels) == row["labels"]
    assert check([str(output), "--image_root", str(own), *given[2:]]) == 0
    assert "labels: Tuberculosis 5, Silicosis 1" in capsys.readouterr().out
    label_set = read_labels(LABEL_FILE, "f")
    (example, *_) = read_jsonl(own / "own.jsonl", label_set=label_set)
    for text, rejected in (
        ("<think>It is labelled Goitre.</think><solution>TB</solution>", "leak"),
        ("<think>Seen.</think><solution>Goitre</solution>", "labels"),
        ("<think>Seen.</think><solution>tb</solution>", None),
    ):
        found = check_trace(text, example)
        assert (found and found[0]) == rejected, text


def test_a_prompt_without_reasoning_asks_no_teacher(own, tmp_path, capsys):
    (tmp_path / "short.toml").write_text('text = "a"\nanswer_format = "solution"', "utf-8")
    for prompt, why in (
        (str(tmp_path / "short.toml"), "has no reasoning; its answers are made from the labels"),
        (str(tmp_path / "gone.toml"), "no such file, and no instruction variant"),
        ("gone", "no such instruction variant"),
    ):
        asked = ["--data_file", str(own / "own.jsonl"), "--prompt", prompt, "--form", "gemini"]
        assert traces(["export", *asked, "--output_dir", str(tmp_path / "out")]) == 2
        assert f"error: --prompt {prompt}: {why}; a teacher can" in capsys.readouterr().err


def test_a_label_file_with_mistakes_is_told_by_the_commands_on_files(own, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("Goitre\nGOITRE\n", encoding="utf-8")
    for command in (
        [check, str(own / "own.jsonl")],
        [traces, "import", "--data_file", str(own / "own.jsonl"), "--teacher", "template"],
    ):
        more = ["--output", str(tmp_path / "x.jsonl")] if command[0] is traces else []
        main, *argv = command
        assert main([*argv, *more, "--label_file", str(tmp_path / "labels.txt")]) == 2
        assert capsys.readouterr().err == (
            f"error: --label_file {tmp_path}/labels.txt, line 2: 'GOITRE' looks like 'Goitre' on"
            " line 1; labels must differ\n"
        )


def test_a_merged_model_has_both_files_beside_it_and_names_them(own, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert merge(["--adapter_name_or_path", str(own / "grpo"), "--output_dir", str(merged)]) == 0
    assert (merged / "labels.txt").read_text(encoding="utf-8") == LABEL_FILE
    assert (merged / "clinic.toml").read_text(encoding="utf-8") == PROMPT
    asked = f"--answer_format think_solution --label_file {merged}/labels.txt"
    asked += f" --prompt {merged}/clinic.toml --min_visual_tokens 4"
    assert asked in capsys.readouterr().out
    kept = record(merged / "merge.json")["kept"]
    assert kept["prompt"] == hashlib.sha256(PROMPT.encode()).hexdigest()


# ---- many labels ---------------------------------------------------------------------------------
def test_a_report_takes_more_labels_than_an_integer_of_the_machine_has_bits(tmp_path):
    label_set = read_labels("\n".join(f"Finding number {i}" for i in range(70)), "f")
    said = {"a": (0, 69), "b": (64,), "c": ()}
    rows = [
        Prediction.of_example(
            Example(id, id, "x", label_set.names[i : i + 1], "d", tmp_path, label_set=label_set),
            prompt="p",
            completion=f"<solution>{', '.join(label_set.names[k] for k in said[id])}</solution>",
            completion_length=3,
            answer_format="solution",
        )
        for id, i in (("a", 69), ("b", 63), ("c", 0))
    ]
    rows = [replace(row, evaluated_labels=label_set.names) for row in rows]
    answers = load_answers(write_predictions(tmp_path / "p.jsonl", rows))
    assert answers.predictions.shape == (3, 70) and answers.columns == list(range(70))
    assert [np.flatnonzero(row).tolist() for row in answers.predictions] == [[0, 69], [64], []]
    assert [np.flatnonzero(row).tolist() for row in answers.targets] == [[69], [63], [0]]
    assert not answers.contradictions.any()  # no label is exclusive
