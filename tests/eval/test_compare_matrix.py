"""Protect eval.compare and eval.matrix.

Checked: which settings differ, and the differences from the first run. A cell is an evaluation like
any other, finished ones are kept, and never mixed up.

Run: pytest tests/eval/test_compare_matrix.py
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

import eval.matrix
from data.files import write_json, write_jsonl
from engine.vision import VisionCache
from eval.answering import answer_sets
from eval.compare import main as compare_main
from eval.evaluate import main as evaluate_main
from eval.folders import write_results
from eval.matrix import main as matrix_main
from eval.scores import score
from tests.helpers.reports import AFTER, BEFORE, FEW, NIH_BEFORE, save, training_run
from tests.helpers.runs import lines, overriding, record, save_run
from tests.helpers.tiny import save_images


# ---- compare -------------------------------------------------------------------------------------
@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    made = tuple(
        training_run(tmp_path / name, "grpo", reward)
        for name, reward in (("one", "hard"), ("two", "nuanced"))
    )
    for run, rows in zip(made, (BEFORE, AFTER), strict=True):
        save(run, home=rows)
    return made


def test_settings_and_scores_that_differ(runs, capsys):
    assert compare_main([*map(str, runs), *FEW]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # no origin in these records
    assert ["reward", "hard", "(None)", "nuanced", "(None)"] in lines
    assert not [line for line in lines if line[:1] == ["prompt"]]  # the same in both
    # Macro 4/3/14 and 37/15/14, micro 4/9 and 4/5, Jaccard 3/8 and 3/4: by hand in test_report.py.
    # Two runs of one stage are named by what tells them apart: here the reward.
    text = [" ".join(line) for line in lines]
    scored = [
        re.sub(r" \([-+].*", "", line)
        for line in text
        if line.startswith(("GRPO (nuanced) M", "GRPO (nuanced) J"))
    ]
    assert scored[:3] == [
        "GRPO (nuanced) Macro-F1 0.095 0.176 +0.081",
        "GRPO (nuanced) Micro-F1 0.444 0.800 +0.356",
        "GRPO (nuanced) Jaccard 0.375 0.750 +0.375",
    ]
    # the sentence and the scores come first, and the console says where the curves are
    verdict = "GRPO (nuanced) against GRPO (hard): no clear change of macro-F1 at n = 4 on home."
    places = [
        next(n for n, line in enumerate(text) if line.startswith(start))
        for start in (
            verdict,
            "Scores on home",
            "Curves and pictures appear only with --output_dir",
            "Settings that differ",
        )
    ]
    assert places == sorted(places)


def test_a_vote_that_a_run_keeps_is_a_row_and_no_run(runs, tmp_path, capsys):
    """It stands in the first run's folder, and yet the others are compared with that run."""
    (runs[0] / "start-vote").mkdir()
    settings = {"adapter_name_or_path": {"value": None}, "max_steps": {"value": 7}}
    record = {"run": {"settings": settings}, "samples": {"num_generations": 4}}
    write_results(runs[0] / "start-vote", "home", AFTER, score(AFTER) | record)
    save(runs[0], nih=NIH_BEFORE)  # of which there is nothing to compare
    write_results(runs[0] / "start-vote", "nih", NIH_BEFORE, score(NIH_BEFORE) | record)
    assert compare_main([*map(str, runs), *FEW, "--output_dir", str(tmp_path / "out")]) == 0
    text = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert text[0].startswith("added, the vote that GRPO has to beat: base + vote of 4 (")
    assert any(line.startswith("GRPO (nuanced) against GRPO (hard): ") for line in text)
    assert any(line.startswith("base + vote of 4 Macro-F1 0.095 0.176 +0.081") for line in text)
    assert any(line.startswith("GRPO (nuanced) Macro-F1 0.095 0.176 +0.081") for line in text)
    assert not any("max_steps" in line or "Scores on nih" in line for line in text)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Total reward, as trained on of GRPO (hard)" in page  # the curves are still there


def test_settings_of_one_stage_are_folded(tmp_path, capsys):
    """An SFT and a GRPO run share the prompt's name and differ in one setting that both have."""
    runs = [training_run(tmp_path / stage, stage) for stage in ("sft", "grpo")]
    for run, own in zip(runs, ({"patience": 2}, {"beta": 0.15, "num_generations": 4}), strict=True):
        save(run, home=BEFORE)
        values = {"prompt": "demo", "learning_rate": len(own)} | own
        settings = {name: {"value": value, "origin": "flag"} for name, value in values.items()}
        write_json(run / "config.json", {"script": run.name, "settings": settings})
    assert compare_main([*map(str, runs), *FEW, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    # on the console one line for all of them: patience of SFT; beta and num_generations of GRPO
    assert "Settings that only some runs have: 1 of SFT, 2 of GRPO" in printed
    assert "patience" not in printed and "Curves and pictures appear" not in printed
    assert ["learning_rate", "1", "(flag)", "2", "(flag)"] in [
        line.split() for line in printed.splitlines()
    ]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    [folded] = re.findall(r"<details><summary>Settings that only.*?</details>", page, re.DOTALL)
    assert all(name in folded for name in ("patience", "beta", "num_generations"))
    assert "learning_rate" not in folded
    titles = re.findall(r"<h2 id=[^>]*>(.*?)</h2>", page)
    assert titles[:2] == ["In one sentence", "Scores"] and titles[-1] == "Settings"


def test_evaluations_are_compared_by_what_their_scores_record(tmp_path, capsys):
    """Folders of eval.evaluate have no config.json: their settings are in the scores records."""
    folders = []
    for name, temperature in (("cold", 0.0), ("warm", 1.0)):
        (tmp_path / name).mkdir()
        folders.append(save(tmp_path / name, home=BEFORE))
        settings = {"temperature": {"value": temperature, "origin": "flag"}}
        write_json(folders[-1] / "scores-home.json", {"run": {"settings": settings}})
    assert compare_main([*map(str, folders), *FEW]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["evaluation:", "temperature", "0.0", "(flag)", "1.0", "(flag)"] in shown


def test_curves_of_all_runs_are_on_one_chart(runs, tmp_path):
    assert compare_main([*map(str, runs), "--output_dir", str(tmp_path / "out"), *FEW]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for what in (
        "Total reward, as trained on of GRPO (hard)",
        "Total reward, as trained on of GRPO (nuanced)",
        "Mean hard reward of GRPO (hard)",
        "Mean nuanced reward of GRPO (nuanced)",
    ):
        assert what in page
    assert (tmp_path / "out" / "pictures" / "curves.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/one"], "--run: two runs or more are compared, got 1"),
        (["{tmp}/one", "{tmp}/none"], "none is no folder"),
        (["{tmp}/one", "{tmp}/empty"], "empty: neither a run nor an evaluation"),
        (["{tmp}/one", "{tmp}/two", "--output_dir", "{tmp}/two"], "is not empty"),
    ],
)
def test_mistakes_of_compare_are_one_line(runs, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    assert compare_main([argument.format(tmp=tmp_path) for argument in [*arguments, *FEW]]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


# ---- matrix --------------------------------------------------------------------------------------
SETTINGS = {
    "prompt": "free_reasoning",
    "max_completion_length": 6,
    "min_visual_tokens": 4,
    "max_visual_tokens": 4,
    "bf16": False,
}
COMMON = [
    "--max_completion_length",
    "6",
    "--min_visual_tokens",
    "4",
    "--max_visual_tokens",
    "4",
    "--no_bf16",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Make a base model, an adapter trained on it, and two data files of two images."""
    folder = tmp_path_factory.mktemp("project")
    save_run(folder, SETTINGS)
    names = save_images(folder, 4)
    for data_set, images in (("a", names[:2]), ("b", names[2:])):
        write_jsonl(
            folder / f"{data_set}.jsonl",
            [
                {
                    "id": name,
                    "patient_id": name,
                    "image": name,
                    "labels": ["Edema"],
                    "dataset": data_set,
                }
                for name in images
            ],
        )
    return folder


def matrix(project: Path, out: Path, *more: str, prompts=("demo", "free_reasoning")) -> int:
    command = overriding(
        [
            "--model",
            f"base={project / 'base'}",
            f"sft={project / 'run'}",
            "--prompt",
            *prompts,
            "--data_file",
            f"a={project / 'a.jsonl'}",
            f"b={project / 'b.jsonl'}",
            "--output_dir",
            str(out),
            *COMMON,
            *more,
        ]
    )
    return matrix_main(command)


def test_a_cell_is_an_evaluation_and_is_kept(project, tmp_path, monkeypatch, capsys):
    out = tmp_path / "matrix"
    done: list[list[str]] = []

    def counted(*arguments, **options):
        done.append(list(arguments[1]))
        return answer_sets(*arguments, **options)

    monkeypatch.setattr(eval.matrix, "answer_sets", counted)
    assert matrix(project, out, prompts=("demo",)) == 0
    assert done == [["a", "b"], ["a", "b"]]
    cells = {path.name for path in out.iterdir() if path.is_dir()}
    assert cells == {"base.demo", "sft.demo"}
    assert (
        evaluate_main(
            [
                "--adapter_name_or_path",
                str(project / "run"),
                "--prompt",
                "demo",
                "--data_file",
                f"a={project / 'a.jsonl'}",
                "--output_dir",
                str(tmp_path / "one"),
                *COMMON,
            ]
        )
        == 0
    )
    assert (tmp_path / "one" / "predictions-a.jsonl").read_bytes() == (
        out / "sft.demo" / "predictions-a.jsonl"
    ).read_bytes()

    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    (out / "base.demo" / "scores-b.json").unlink()  # as if it had been stopped before the last file
    assert matrix(project, out) == 0  # one more prompt
    assert done[2:] == [["b"], ["a", "b"], ["a", "b"]]
    assert {path: path.read_bytes() for path in before} == before  # what was finished is as it was
    assert "4 cells x 2 data sets, 5 to do" in capsys.readouterr().out
    assert matrix(project, out) == 0 and len(done) == 5
    shown = capsys.readouterr().out
    assert "0 to do" in shown
    cells = [
        f"{name}={out / name}"
        for name in ("base.demo", "base.free_reasoning", "sft.demo", "sft.free_reasoning")
    ]
    # in the models' order
    assert shown.endswith(f"next: python -m eval.report {' '.join(cells)} --output_dir FOLDER\n")


def test_a_finished_cell_is_never_mixed_with_other_settings(project, tmp_path, capsys):
    out = tmp_path / "matrix"
    assert matrix(project, out, prompts=("demo",)) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    assert matrix(project, out, "--max_completion_length", "5", prompts=("demo",)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    assert (
        len(errors) == 4
        and "base.demo/predictions-a.jsonl is finished, but with another max_completion_length"
        " (6, now 5)"
        in errors[0]
    )
    for file in ("a.jsonl", "run/adapter_model.safetensors"):
        content = (project / file).read_bytes()
        # a blank line, another last weight: whole files both
        changed = content + b"\n" if file == "a.jsonl" else content[:-1] + b"\x3e"
        assert changed != content
        (project / file).write_bytes(changed)
        assert matrix(project, out, prompts=("demo",)) == 2
        assert (
            "another data file of a" if file == "a.jsonl" else "another adapter of the same name"
        ) in capsys.readouterr().err
        (project / file).write_bytes(content)
    # which changes no answer
    assert matrix(project, out, "--per_device_eval_batch_size", "1", prompts=("demo",)) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_a_signal_ends_the_matrix_and_the_same_command_goes_on(
    project, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "matrix"

    def interrupted(*arguments, **options):
        if list(arguments[3].parts)[-1] == "sft.demo":
            os.kill(os.getpid(), signal.SIGTERM)
        return answer_sets(*arguments, **options)

    monkeypatch.setattr(eval.matrix, "answer_sets", interrupted)
    assert matrix(project, out, prompts=("demo",)) == 143
    assert "stopped; the same command goes on" in capsys.readouterr().out
    assert (out / "base.demo" / "scores-b.json").is_file() and not list(
        (out / "sft.demo").glob("scores-*")
    )
    monkeypatch.setattr(eval.matrix, "answer_sets", answer_sets)
    assert matrix(project, out, prompts=("demo",)) == 0
    assert "2 cells x 2 data sets, 2 to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model", "base"], "--model base: expected NAME=FILE"),
        # as every flag of several values says it
        (["--prompt", "demo", "demo"], "--prompt demo is given 2 times; give it once"),
        (["--prompt", "gone"], "--prompt gone: no such instruction variant; there are demo"),
        (["--temperature", "-1"], "--temperature: expected a number from 0 to 100, got '-1'"),
        (["--data_file", "a={project}/none.jsonl"], "no such data file"),
    ],
)
def test_mistakes_of_matrix_are_told(project, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    complete = {
        "--model": [f"base={project / 'base'}"],
        "--prompt": ["demo"],
        "--data_file": [f"a={project / 'a.jsonl'}"],
        "--output_dir": ["out"],
    }
    given = dict(complete) if arguments else {}
    if arguments:
        given[arguments[0]] = [argument.format(project=project) for argument in arguments[1:]]
    assert matrix_main([word for flag, values in given.items() for word in (flag, *values)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unreadable_image_stops_the_matrix_or_is_left_out_of_every_cell(
    project, tmp_path, capsys
):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    rows = [
        line | {"image": str(image)}
        for line, image in zip(
            lines(project / "a.jsonl"), ["bad.png", *save_images(tmp_path, 20)], strict=False
        )
    ]
    data = write_jsonl(tmp_path / "c.jsonl", rows)
    command = [
        "--model",
        f"base={project / 'base'}",
        "--prompt",
        "demo",
        "free_reasoning",
        "--data_file",
        f"c={data}",
        *COMMON,
    ]
    assert matrix_main([*command, "--output_dir", str(tmp_path / "stopped")]) == 2
    assert "bad.png is not a readable JPEG or PNG" in capsys.readouterr().err
    out = tmp_path / "skipped"
    assert matrix_main([*command, "--output_dir", str(out), "--bad_images", "skip"]) == 0
    assert [row["id"] for row in lines(out / "bad-images-c.jsonl")] == [rows[0]["id"]]
    for cell in ("base.demo", "base.free_reasoning"):
        scores = record(out / cell / "scores-c.json")
        assert (scores["n"], scores["bad_images"]) == (len(rows) - 1, 1)
    # Repaired, it would be in some cells and not in others.
    save_images(tmp_path / "more", 1)
    (tmp_path / "bad.png").write_bytes(next((tmp_path / "more").glob("*.png")).read_bytes())
    assert matrix_main([*command, "--output_dir", str(out), "--bad_images", "skip"]) == 2
    assert (
        "predictions-c.jsonl is finished, but with another list of unreadable images"
        in capsys.readouterr().err
    )


def test_the_prompts_of_a_model_look_at_an_image_once(project, tmp_path, monkeypatch):
    looked, compute = [], VisionCache._compute

    def counted(cache, example, *more):
        looked.append(example.id)
        return compute(cache, example, *more)

    monkeypatch.setattr(VisionCache, "_compute", counted)
    command = [
        "--model",
        f"base={project / 'base'}",
        "--prompt",
        "demo",
        "free_reasoning",
        "--data_file",
        f"a={project / 'a.jsonl'}",
        *COMMON,
    ]
    assert matrix_main([*command, "--output_dir", str(tmp_path / "kept")]) == 0
    images = {row["image"] for row in lines(project / "a.jsonl")}
    assert len(looked) == len(images)
    assert (
        matrix_main([*command, "--output_dir", str(tmp_path / "not"), "--vision_cache_gb", "0"])
        == 0
    )
    assert len(looked) > 2 * len(images)
    assert (
        matrix_main([*command, "--output_dir", str(tmp_path / "wrong"), "--vision_cache_gb", "-1"])
        == 2
    )
