"""Protect the refusals of the two scripts.

Checked: one clear line for each mistake, naming the thing and the remedy, exit code 2, and nothing
written or overwritten.

Run: pytest tests/scripts/test_bad_input.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import rl.settings
import run_grpo
import run_sft
from data.files import DataError
from data.prompts import PROMPTS
from engine.checkpoint import list_checkpoints
from engine.order import shuffled
from engine.runtime import main_guard
from rl.objective import ObjectiveConfig
from rl.settings import resolve_grpo
from tests.helpers.repository import ROOT
from tests.helpers.runs import GRPO, SFT, lines, overriding, record, sft, snapshot, write_rows


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run commands that must fail: `refused(main, *flags)` -> the lines of its errors.

    Its exit code must be 2, and the folder must stay as it was.
    """

    def run(main, *flags: str) -> list[str]:
        monkeypatch.chdir(tmp_path)
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert main_guard(lambda: main(overriding(flags)), errors=(DataError,)) == 2
        found = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")
        ]
        assert snapshot(tmp_path) == before
        return [line.removeprefix("error: ") for line in found]

    return run


@pytest.fixture
def sft_flags(tiny_checkpoint, tiny_data) -> list[str]:
    return [
        "--model_name_or_path",
        str(tiny_checkpoint("qwen2_5_vl")),
        "--train_file",
        str(tiny_data),
        *SFT,
    ]


@pytest.fixture
def grpo_flags(tiny_sft_run, tiny_data) -> list[str]:
    return [
        "--adapter_name_or_path",
        str(tiny_sft_run("qwen2_5_vl")),
        "--train_file",
        str(tiny_data),
        *GRPO,
    ]


@pytest.fixture
def changed_data(tiny_data, tmp_path):
    """Change one row: `changed_data(row, field=value, ...)` -> the data file.

    None removes the field.
    """

    def change(index: int, **fields) -> Path:
        rows = lines(tiny_data)
        rows[index] = {
            key: value for key, value in (rows[index] | fields).items() if value is not None
        }
        return write_rows(tmp_path / "changed.jsonl", rows)

    return change


# ---- models and adapters -------------------------------------------------------------------------
def test_missing_model_folder(refused, tiny_data):
    (line,) = refused(
        run_sft.main, "--model_name_or_path", "./no-model", "--train_file", str(tiny_data), *SFT
    )
    assert (
        line
        == "--model_name_or_path ./no-model: no such folder; give a checkpoint's folder, a hub name"
        " (owner/model) or 'demo'"
    )


def test_another_model_family(refused, tiny_data, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text('{"model_type": "llama"}')
    (line,) = refused(
        run_sft.main, "--model_name_or_path", "./llama", "--train_file", str(tiny_data), *SFT
    )
    assert (
        line
        == "--model_name_or_path ./llama: a 'llama' model; this engine trains qwen2_5_vl, gemma3"
        " and qwen3_vl models"
    )


def test_attention_that_transformers_does_not_compute(
    refused, tiny_checkpoint, tiny_data, tmp_path
):
    folder = shutil.copytree(tiny_checkpoint("gemma3"), tmp_path / "capped")
    config = record(folder / "config.json")
    config["text_config"]["attn_logit_softcapping"] = 50.0
    (folder / "config.json").write_text(json.dumps(config))
    (line,) = refused(
        run_sft.main, "--model_name_or_path", "./capped", "--train_file", str(tiny_data), *SFT
    )
    assert line.startswith(
        "--model_name_or_path ./capped: its config.json sets attn_logit_softcapping to 50.0, which"
        " transformers' attention leaves out"
    )


def test_model_folder_without_weights(refused, tiny_checkpoint, tiny_data, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen2_5_vl"), tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    (line,) = refused(
        run_sft.main, "--model_name_or_path", "./empty", "--train_file", str(tiny_data), *SFT
    )
    assert line.startswith("--model_name_or_path ./empty: ") and "model.safetensors" in line


def test_no_finished_sft_run_says_what_to_run(refused, tmp_path):
    unfinished = tmp_path / "runs/20260101-000000-sft"
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text("{}")
    assert refused(run_grpo.main) == [
        "no finished SFT run of demo named runs/<time>-sft; run `python run_sft.py --recipe demo`"
        " first, or give --adapter_name_or_path (none for a fresh one)"
    ]
    (tmp_path / "my.toml").write_text("")  # a recipe that leaves the base open
    assert refused(run_grpo.main, "--recipe", "my.toml", "--train_file", "x.jsonl") == [
        "no finished SFT run named runs/<time>-sft; run `python run_sft.py` first, or give"
        " --adapter_name_or_path (none for a fresh one)"
    ]


def test_adapter_folder_without_an_adapter(refused, tiny_data, tmp_path):
    (line,) = refused(
        run_grpo.main,
        "--adapter_name_or_path",
        str(tmp_path),
        "--train_file",
        str(tiny_data),
        *GRPO,
    )
    assert (
        line == f"{tmp_path}: no adapter there; an adapter folder holds adapter_config.json and"
        " adapter_model.safetensors"
    )


def test_rank_other_than_that_of_the_adapter_to_go_on_with(refused, tiny_data, tiny_sft_run):
    run = tiny_sft_run("qwen2_5_vl")
    (line,) = refused(
        run_sft.main,
        "--adapter_name_or_path",
        str(run),
        "--train_file",
        str(tiny_data),
        "--lora_r",
        "8",
    )
    assert (
        line == f"--lora_r 8: the adapter in {run} was trained with 16; leave the flag out, or give"
        " another --adapter_name_or_path"
    )


def test_adapter_that_does_not_fit_the_model(refused, grpo_flags, tiny_checkpoint, tiny_sft_run):
    (line,) = refused(
        run_grpo.main, *grpo_flags, "--model_name_or_path", str(tiny_checkpoint("gemma3"))
    )
    # Gemma's third layer has no counterpart: 7 projections x 2 matrices
    assert line.startswith(
        f"{tiny_sft_run('qwen2_5_vl')}: the adapter does not fit the model, missing: 14, such as "
    )
    assert "layers.2." in line and line.endswith(
        "It was trained on another model or by another version"
    )


def test_adapter_whose_shapes_do_not_fit(refused, grpo_flags, tiny_sft_run, tmp_path):
    folder = shutil.copytree(tiny_sft_run("qwen2_5_vl"), tmp_path / "rank-8", symlinks=True)
    config = record(folder / "adapter_config.json") | {"r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (line,) = refused(run_grpo.main, *grpo_flags, "--adapter_name_or_path", str(folder))
    assert line.startswith(f"{folder}: ") and "has shape (16, 32), the model needs (8, 32)" in line


def test_truncated_adapter(refused, grpo_flags, tiny_sft_run, tmp_path):
    folder = shutil.copytree(tiny_sft_run("qwen2_5_vl"), tmp_path / "cut", symlinks=True)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    (line,) = refused(run_grpo.main, *grpo_flags, "--adapter_name_or_path", str(folder))
    assert line.startswith(f"{folder}: adapter_model.safetensors cannot be read (")


# ---- data ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["sft", "grpo"])
@pytest.mark.parametrize("flag", ["--train_file", "--validation_file"])
def test_row_with_a_missing_image(
    refused, script, flag, sft_flags, grpo_flags, changed_data, tiny_data
):
    main, flags = (run_sft.main, sft_flags) if script == "sft" else (run_grpo.main, grpo_flags)
    file = changed_data(5, image="gone.png")
    value = str(file) if flag == "--train_file" else f"site={file}"
    (line,) = refused(main, *flags, flag, value, "--image_root", str(tiny_data.parent))
    root = tiny_data.parent
    assert (
        line
        == f"example 'e5': image 'gone.png': no such file under the image root {root}; check the"
        " row or --image_root"
    )


@pytest.mark.parametrize("script", ["sft", "grpo"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data_set(refused, script, sft_flags, grpo_flags, tmp_path, content):
    main, flags = (run_sft.main, sft_flags) if script == "sft" else (run_grpo.main, grpo_flags)
    (tmp_path / "none.jsonl").write_text(content)
    for flag, value in (("--train_file", "none.jsonl"), ("--validation_file", "site=none.jsonl")):
        assert refused(main, *flags, flag, value) == [
            "none.jsonl: the file holds no examples; it needs at least one"
        ]


def test_missing_data_file(refused, sft_flags):
    assert refused(run_sft.main, *sft_flags, "--train_file", "none.jsonl") == [
        "none.jsonl: no such data file; give a JSONL file with one example a line"
    ]
    assert refused(run_sft.main, *sft_flags, "--train_file", "demo:sft") == [
        "demo:sft: the demo has no split 'sft'; it has "
        + refused(run_sft.main, *sft_flags, "--train_file", "demo:x")[0].rpartition("it has ")[2]
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": "Edema"}, "field 'labels' is \"Edema\"; it must be a list of strings"),
        ({"labels": ["Oedema of lung"]}, "field 'labels' holds 'Oedema of lung'; the labels are: "),
        ({"patient_id": 17}, "field 'patient_id' is 17; it must be a string"),
        ({"id": None}, "field 'id' is missing"),
    ],
)
@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_row_with_a_wrong_type(
    refused, script, sft_flags, grpo_flags, changed_data, fields, message
):
    main, flags = (run_sft.main, sft_flags) if script == "sft" else (run_grpo.main, grpo_flags)
    file = changed_data(3, **fields)
    (line,) = refused(main, *flags, "--train_file", str(file))
    assert line.startswith(f"{file}, line 4: {message}")


def test_all_wrong_rows_of_a_file_are_listed(refused, sft_flags, tiny_data, tmp_path):
    rows = lines(tiny_data)
    rows[0]["labels"], rows[7]["image"] = 3, None
    file = write_rows(tmp_path / "bad.jsonl", rows)
    assert refused(run_sft.main, *sft_flags, "--train_file", str(file)) == [
        f"{file}, line 1: field 'labels' is 3; it must be a list of strings",
        f"{file}, line 8: field 'image' is null; it must be a string",
    ]


def test_sft_rows_without_answers(refused, sft_flags, changed_data, tiny_data):
    file = changed_data(2, answer=None)
    assert refused(
        run_sft.main, *sft_flags, "--train_file", str(file), "--image_root", str(tiny_data.parent)
    ) == [
        f"{file}: 1 of 12 examples have no 'answer' to learn from, such as 'e2'; make them with"
        " `python -m data.traces`, or learn the labels alone with --prompt only_label"
    ]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("<think>a</think>", "answer_missing"),
        ("<solution>Edema</solution>", "think_missing"),
        ("x <think>a</think><solution>Edema</solution>", "outside"),
    ],
)
def test_sft_answers_in_another_form(refused, sft_flags, changed_data, tiny_data, answer, problem):
    file = changed_data(2, answer=answer)
    assert refused(
        run_sft.main, *sft_flags, "--train_file", str(file), "--image_root", str(tiny_data.parent)
    ) == [
        f"{file}: 1 of 12 answers are not in the form think_solution, such as that of 'e2'"
        f" ({problem}); repair them, or give the --answer_format that they have"
    ]


@pytest.mark.parametrize(
    ("flag", "given", "learned"),
    [
        ("--prompt", "reasoning_a", "demo"),
        ("--prompt", "only_label", "demo"),
        ("--answer_format", "solution", "think_solution"),
    ],
)
def test_grpo_with_another_prompt_than_the_sft_run(
    refused, grpo_flags, tiny_sft_run, flag, given, learned
):
    assert refused(run_grpo.main, *grpo_flags, flag, given) == [
        f"{flag} {given}: the adapter in {tiny_sft_run('qwen2_5_vl')} was trained with {learned};"
        " leave the flag out, or give another --adapter_name_or_path"
    ]


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_no_image_of_a_data_set_can_be_read(
    refused, script, sft_flags, grpo_flags, tiny_data, tmp_path
):
    main, flags = (run_sft.main, sft_flags) if script == "sft" else (run_grpo.main, grpo_flags)
    file = write_rows(tmp_path / "data.jsonl", lines(tiny_data)[:4])
    for row in lines(file):
        (tmp_path / row["image"]).write_text("<html>404</html>")
    (line,) = refused(main, *flags, "--train_file", str(file), "--bad_images", "skip")
    assert line.startswith(
        "data set train: none of its 4 images can be read, such as example 'e0':"
        f" {tmp_path / 'image-0.png'} is not a "
    )


def test_one_patient_cannot_be_split(refused, sft_flags, tiny_data, tmp_path):
    file = write_rows(tmp_path / "one.jsonl", lines(tiny_data)[:2])
    (line,) = refused(
        run_sft.main, *sft_flags, "--train_file", str(file), "--image_root", str(tiny_data.parent)
    )
    assert line.startswith(
        "cannot hold out a part of 2 examples of 1 patient(s); at least two are needed"
    )


# ---- settings ------------------------------------------------------------------------------------
def test_group_of_one(refused, grpo_flags):
    assert refused(run_grpo.main, *grpo_flags, "--num_generations", "1") == [
        "--num_generations: expected an integer from 2 to 65536, got '1'"
    ]


@pytest.mark.parametrize(
    ("micro", "accumulation", "group", "nearest"),
    [
        # completions a rollout = micro x 2 accumulation; a multiple of the group is needed
        (3, 1, 4, (2, 4)),  # 6 completions: 2 x 2 = 4 and 4 x 2 = 8 divide
        (1, 1, 8, (4,)),  # 2: no smaller micro-batch divides, 4 x 2 = 8
        (5, 3, 4, (4, 6)),  # 30: 4 x 6 = 24 and 6 x 6 = 36
        (7, 1, 3, (6, 9)),  # 14: 6 x 2 = 12 and 9 x 2 = 18
    ],
)
def test_completions_that_do_not_divide_into_groups(
    refused, grpo_flags, micro, accumulation, group, nearest
):
    flags = [
        *grpo_flags,
        "--gradient_accumulation_steps",
        str(accumulation),
        "--num_generations",
        str(group),
    ]
    (line,) = refused(run_grpo.main, *flags, "--per_device_train_batch_size", str(micro))
    assert (
        line
        == f"a rollout of --per_device_train_batch_size {micro} x {2 * accumulation} micro-batches"
        f" = {micro * 2 * accumulation} completions does not divide into groups of"
        f" --num_generations {group}; the nearest --per_device_train_batch_size that do:"
        f" {', '.join(map(str, nearest))}"
    )
    for size in nearest:
        resolve_grpo(overriding([*flags, "--per_device_train_batch_size", str(size)]))
    closer = [
        size
        for size in range(1, micro + group)
        if abs(size - micro) < min(abs(n - micro) for n in nearest)
    ]
    assert all(size * 2 * accumulation % group for size in closer)


@pytest.mark.parametrize(
    ("per_generation", "accumulation", "nearest"), [(7, 2, "6, 8"), (3, 4, "4"), (9, 4, "8, 12")]
)
def test_micro_batches_that_do_not_divide_into_steps(
    refused, grpo_flags, per_generation, accumulation, nearest
):
    (line,) = refused(
        run_grpo.main,
        *grpo_flags,
        "--steps_per_generation",
        str(per_generation),
        "--gradient_accumulation_steps",
        str(accumulation),
    )
    assert (
        line == f"--steps_per_generation {per_generation} does not divide into optimizer steps of"
        f" --gradient_accumulation_steps {accumulation}; the nearest that do: {nearest}"
    )


def test_several_problems_are_listed_at_once(refused, grpo_flags):
    assert refused(
        run_grpo.main,
        *grpo_flags,
        "--num_generations",
        "1",
        "--learning_rate",
        "-1",
        "--temperature",
        "0",
        "--beta",
        "x",
        "--validation_file",
        "no-name.jsonl",
        "--seeed",
        "3",
    ) == [
        "unknown flag --seeed; did you mean --seed?",
        "--learning_rate: expected a number above 0, got '-1'",
        "--num_generations: expected an integer from 2 to 65536, got '1'",
        "--temperature: expected a number above 0 and at most 100, got '0'",
        "--beta: expected a number at least 0, got 'x'",
        "--validation_file no-name.jsonl: expected NAME=FILE, with a name of letters, digits, -"
        " and _",
    ]
    assert refused(
        run_grpo.main, *grpo_flags, "--max_tokens_per_forward", "0", "--vision_cache_gb", "-1"
    ) == [
        "--max_tokens_per_forward: expected an integer from 1 to 1000000000 or none, got '0'",
        "--vision_cache_gb: expected a number from 0 to 1000000, got '-1'",
    ]
    assert refused(
        run_sft.main,
        "--lora_r",
        "0",
        "--lora_dropout",
        "1",
        "--train_file",
        "x.jsonl",
        "--prompt",
        "free",
    ) == [
        "--lora_r: expected an integer from 1 to 65536, got '0'",
        "--lora_dropout: expected a number at least 0 and below 1, got '1'",
        "--prompt free: no such instruction variant; there are " + ", ".join(PROMPTS),
        "--model_name_or_path is missing: give a checkpoint's folder, a hub name or 'demo'",
    ]


def test_unknown_recipe_and_unknown_flag(refused, sft_flags):
    (line,) = refused(run_sft.main, *sft_flags, "--recipe", "medgemma-4b-free-reasonin")
    assert line.startswith(
        "--recipe medgemma-4b-free-reasonin: no such recipe; did you mean"
        " medgemma-4b-free-reasoning? (shipped: "
    )
    assert refused(run_sft.main, *sft_flags, "--lerning_rate", "1") == [
        "unknown flag --lerning_rate; did you mean --learning_rate?"
    ]


def test_objective_out_of_range(refused, grpo_flags):
    assert refused(run_grpo.main, *grpo_flags, "--beta", "-1", "--epsilon_low", "1") == [
        "--epsilon_low: expected a number at least 0 and below 1, got '1'",
        "--beta: expected a number at least 0, got '-1'",
    ]


def test_what_only_the_real_objective_can_check_is_refused_the_same_way(
    refused, grpo_flags, monkeypatch
):
    """Flags are read from a reading of rl/objective.py without torch. Here that reading checks
    nothing, as where a fork's check needs torch.
    """
    types = get_type_hints(ObjectiveConfig)
    fields = [
        (field.name, types[field.name], dataclasses.field(default=field.default))
        for field in dataclasses.fields(ObjectiveConfig)
    ]
    unchecked = dataclasses.make_dataclass(
        "Unchecked", fields, namespace={"warnings": lambda self: []}, frozen=True
    )
    monkeypatch.setattr(rl.settings, "objective_config", lambda: unchecked)
    assert refused(run_grpo.main, *grpo_flags, "--beta", "-1") == [
        "beta is -1.0; it must lie in [0, inf)"
    ]


@pytest.mark.parametrize(
    "chosen",
    ["site/f1", "other/macro_f1", "macro_f1", "site/rewards/soft/mean", "site", "site/gap"],
)
def test_unknown_metric_for_the_best_model(refused, grpo_flags, tiny_data, chosen):
    (line,) = refused(
        run_grpo.main,
        *grpo_flags,
        "--validation_file",
        f"site={tiny_data}",
        "--metric_for_best_model",
        chosen,
    )
    assert (
        line.startswith(
            f"--metric_for_best_model {chosen}: write NAME/METRIC with a NAME of --validation_file"
            # home is the first set's name where a recipe cannot know it
            " (site), or home for the first of them, and a METRIC of macro_f1, micro_f1, "
        )
        # every registered reward is logged, so each can be named
        and "rewards/hard/mean, rewards/nuanced/mean, rewards/weighted/mean" in line
        and "; or gap, gap_se, gap_shared, gap_shared_se, gain_shared, gain_shared_se" in line
    )


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("stop_when", "gap", "write METRIC>NUMBER or METRIC<NUMBER"),
        ("stop_when", "gap>0.1", "gap needs two sets of --validation_file or more, there are 1"),
        (
            "warn_when",
            "site/f1<0.1",
            "write NAME/METRIC with a NAME of --validation_file (site), or home for the first of",
        ),
        (
            "stop_when",
            "monitors/collapse>0.5",
            "there is no monitors/collapse; there are monitors/identical_text, ",
        ),
        (
            "metric_for_best_model",
            "site/macro_f1 - 2 * site/fail_rate",
            "'2 * site/fail_rate' is no metric; write NAME or WEIGHT*NAME",
        ),
        (
            "metric_for_best_model",
            "monitors/entropy",
            "write NAME/METRIC with a NAME of --validation_file (site)",
        ),
    ],
)
def test_what_a_run_is_judged_by(refused, grpo_flags, tiny_data, flag, text, message):
    [line] = refused(
        run_grpo.main, *grpo_flags, "--validation_file", f"site={tiny_data}", f"--{flag}", text
    )
    assert line.startswith(f"--{flag} {text}: {message}")


def test_a_gap_needs_two_sets(refused, grpo_flags, tiny_data):
    assert refused(
        run_grpo.main,
        *grpo_flags,
        "--validation_file",
        f"site={tiny_data}",
        "--metric_for_best_model",
        "gap",
    ) == [
        "--metric_for_best_model gap: gap needs two sets of --validation_file or more, there are 1"
    ]


# ---- folders and checkpoints ---------------------------------------------------------------------
@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_output_folder_that_is_not_empty(refused, script, sft_flags, grpo_flags, tmp_path):
    main, flags = (run_sft.main, sft_flags) if script == "sft" else (run_grpo.main, grpo_flags)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    assert refused(main, *flags, "--output_dir", "used") == [
        "--output_dir used is not empty (it holds notes.txt) and nothing is overwritten: name"
        " another folder, or go on with --resume_from_checkpoint"
    ]


def test_output_folder_that_is_a_file(refused, sft_flags, tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = refused(run_sft.main, *sft_flags, "--output_dir", "file")
    assert line.startswith("--output_dir file: cannot be used: ")


@pytest.fixture
def locked_by_another_process():
    """Let another process hold a folder's lock: `with_lock(folder)` -> its process id."""
    held: list[subprocess.Popen] = []
    program = (
        "import sys; from engine.runtime import lock_run\n"
        "with lock_run(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )

    def lock(folder: Path) -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        held.append(process)
        assert process.stdout.readline() == "held\n"
        return process.pid

    yield lock
    for process in held:
        process.communicate("")


def test_output_folder_in_use_by_another_process(
    refused, sft_flags, grpo_flags, tiny_sft_run, tmp_path, locked_by_another_process
):
    (tmp_path / "busy").mkdir()
    process = locked_by_another_process(tmp_path / "busy")
    assert refused(run_sft.main, *sft_flags, "--output_dir", "busy") == [
        f"busy is in use by another run (process {process})"
    ]
    assert refused(run_grpo.main, *grpo_flags, "--output_dir", "busy") == [
        f"busy is in use by another run (process {process})"
    ]
    copy = shutil.copytree(tiny_sft_run("qwen2_5_vl"), tmp_path / "running", symlinks=True)
    process = locked_by_another_process(copy)
    assert refused(run_sft.main, "--resume_from_checkpoint", "running") == [
        f"{copy} is in use by another run (process {process})"
    ]


def test_corrupted_checkpoint_named_for_resume(refused, tiny_sft_run, tmp_path):
    copy = shutil.copytree(tiny_sft_run("qwen2_5_vl"), tmp_path / "run", symlinks=True)
    file = copy / "checkpoint-3/adapter_model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    (line,) = refused(run_sft.main, "--resume_from_checkpoint", "run/checkpoint-3")
    assert (
        line
        == f"run/checkpoint-3: adapter_model.safetensors: has {size - 1:,} bytes, the manifest says"
        f" {size:,}"
    )


def test_resume_of_what_is_no_checkpoint(refused, tiny_sft_run, tmp_path):
    assert refused(run_sft.main, "--resume_from_checkpoint", "nowhere") == [
        "--resume_from_checkpoint nowhere: no such folder"
    ]
    (tmp_path / "empty").mkdir()
    assert refused(run_sft.main, "--resume_from_checkpoint", "empty") == [
        "--resume_from_checkpoint empty: the folder holds no sound checkpoint-<step>"
    ]
    run = tiny_sft_run("qwen2_5_vl")
    (line,) = refused(run_grpo.main, "--resume_from_checkpoint", str(run))
    assert (
        line
        == f"--resume_from_checkpoint {run}: a checkpoint of run_sft.py; resume it with that script"
    )


def test_an_image_that_breaks_during_training_loses_no_step(
    tiny_checkpoint, tiny_data, tmp_path, capsys
):
    """A truncated picture is found when its row is used; the steps before it are saved."""
    rows = lines(tiny_data)
    data = tmp_path / "data"
    shutil.copytree(Path(tiny_data).parent, data)
    order = shuffled(len(rows), 0, 42)
    picture = data / rows[order[-1]]["image"]
    picture.write_bytes(picture.read_bytes()[:200])
    code = main_guard(
        lambda: sft(
            tiny_checkpoint("qwen2_5_vl"),
            data / Path(tiny_data).name,
            tmp_path / "run",
            "--validation_file",
            f"site={tiny_data}",
            "--per_device_train_batch_size",
            "1",
            "--gradient_accumulation_steps",
            "1",
        ),
        errors=(DataError,),
    )
    assert code == 2 and picture.name in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [
        f"checkpoint-{len(rows) - 1}"
    ]
