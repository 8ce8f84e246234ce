"""Protect runs that learn from several hospitals.

Checked: both scripts on two hospitals, cut short and resumed to the last bit; what a run's folder
says of each hospital; that a resumed run keeps names and weights; baselines of evaluations.

Run: pytest tests/scripts/test_several_hospitals.py
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import eval.evaluate
import eval.figures
import run_grpo
import run_sft
from data.examples import read_jsonl
from engine.config import UsageError
from rl.objective import ObjectiveConfig, group_advantages
from tests.helpers.objective import f64
from tests.helpers.runs import (
    assert_same_run,
    equal_tensors,
    grpo,
    lines,
    read_dump,
    record,
    sft,
    speak,
    tensorboard,
    train_log,
    write_data,
    write_rows,
)

FAMILY = "qwen2_5_vl"
GRPO = ["--max_steps", "4", "--save_steps", "1", "--logging_steps", "2", "--eval_steps", "4"]
GRPO += ["--reward", "nuanced", "--scale_by_hospital", "rms", "--no_vote_baseline"]
SFT = ["--num_train_epochs", "1", "--per_device_train_batch_size", "2", "--save_steps", "1"]
SFT += ["--gradient_accumulation_steps", "1", "--lora_dropout", "0.3"]


@pytest.fixture(scope="module", autouse=True)
def readable():
    with pytest.MonkeyPatch.context() as patch:
        speak(patch)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Write two hospitals, whose rows have the same ids: a of 7, and b of 5, of three patients.

    Their patients are others, as their `dataset` tells.
    """
    folder = tmp_path_factory.mktemp("hospitals")
    made = {"a": write_data(folder / "a", 7), "b": write_data(folder / "b", 5)}
    rows = [row | {"dataset": "other", "labels": ["Fracture"]} for row in lines(made["b"])]
    for row in rows:
        row["evaluated_labels"] = ["Edema", "Fracture"]
        row["answer"] = "<think>x</think><solution>Fracture</solution>"
    return made | {"b": write_rows(made["b"], rows)}


@pytest.fixture(scope="module")
def two(files) -> list[str]:
    return ["--train_file", f"b={files['b']}@2", f"a={files['a']}@1"]


@pytest.fixture(scope="module")
def rl_run(tiny_sft_run, files, two, tmp_path_factory) -> Path:
    """Make the GRPO run that the tests here look at, of two prompts and two steps a rollout."""
    run = tmp_path_factory.mktemp("runs") / "rl"
    flags = [*two, "--validation_file", f"a={files['a']}", f"c={files['b']}", "--dump_step", "4"]
    assert grpo(tiny_sft_run(FAMILY), files["a"], run, *flags, flags=GRPO) == 0
    return run


@pytest.fixture(scope="module")
def sft_run(tiny_checkpoint, files, two, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "sft"
    assert sft(tiny_checkpoint(FAMILY), files["a"], run, *two, flags=SFT) == 0
    return run


# ---- resumed -------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [1, 2])
def test_a_grpo_run_goes_on_in_the_middle_of_a_rollout_and_after_it(step, rl_run, tmp_path):
    """Into another folder, from files that have moved."""
    checkpoint = rl_run / f"checkpoint-{step}"
    again = ["--resume_from_checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "run")]
    assert run_grpo.main(again) == 0
    assert_same_run(rl_run, tmp_path / "run")
    kept = [row.get("hospital") for row in record(rl_run / "checkpoint-1/rollout.json")]
    assert len(kept) == 8 and set(kept) <= {"a", "b"}


def test_an_sft_run_goes_on(sft_run, files, tmp_path):
    moved = shutil.copytree(files["a"].parent, tmp_path / "a")
    again = ["--resume_from_checkpoint", str(sft_run / "checkpoint-2")]
    again += ["--train_file", f"a={moved / 'data.jsonl'}@1", f"b={files['b']}@2"]
    assert run_sft.main([*again, "--output_dir", str(tmp_path / "run")]) == 0
    assert_same_run(sft_run, tmp_path / "run")


def test_a_resumed_run_keeps_its_hospitals_and_their_weights(rl_run, files, tmp_path):
    def refused(*train_file: str) -> list[str]:
        again = ["--resume_from_checkpoint", str(rl_run / "checkpoint-2")]
        again += ["--output_dir", str(tmp_path / "run"), "--train_file", *train_file]
        with pytest.raises(UsageError) as error:
            run_grpo.main(again)
        return error.value.problems

    a, b = files["a"], files["b"]
    assert refused(f"a={a}@1", f"b={b}@3") == [
        "--train_file: the weight of train.b is 3.0, the resumed run had 2.0; a resumed run keeps"
        " its weights"
    ]
    assert len(refused(f"a={a}", f"b={b}")) == 2
    other_name = refused(f"a={a}@1", f"c={b}@2")
    assert ["train.b" in other_name[0], "train.c" in other_name[1]] == [True, True]
    assert not (tmp_path / "run").exists()


def test_the_same_command_goes_on_and_another_weight_is_another_run(
    tiny_sft_run, files, two, rl_run, tmp_path
):
    run = shutil.copytree(rl_run, tmp_path / "run", symlinks=True)
    whole = record(run / "config.json")
    del whole["finished"]
    (run / "config.json").write_text(json.dumps(whole))
    for checkpoint in ("checkpoint-3", "checkpoint-4", "adapter_model.safetensors"):
        path = run / checkpoint
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    flags = ["--validation_file", f"a={files['a']}", f"c={files['b']}", "--dump_step", "4"]
    other = ["--train_file", f"a={files['a']}@2", f"b={files['b']}@2"]
    with pytest.raises(UsageError) as error:
        grpo(tiny_sft_run(FAMILY), files["a"], run, *flags, *other, flags=GRPO)
    assert "train.a: the run has the weight 1.0, the command 2.0" in error.value.problems
    assert grpo(tiny_sft_run(FAMILY), files["a"], run, *flags, *two, flags=GRPO) == 0
    assert_same_run(rl_run, run)


# ---- what a run says of them ---------------------------------------------------------------------
def test_a_run_notes_each_hospital(rl_run, sft_run, files):
    for run in (rl_run, sft_run):
        data = record(run / "config.json")["data"]
        trained = {name: data[name] for name in ("train.a", "train.b")}
        assert [one["weight"] for one in trained.values()] == [1.0, 2.0]
        assert [one["file"] for one in trained.values()] == [str(files["a"]), str(files["b"])]
        assert "train" not in data
        card = (run / "README.md").read_text()
        assert "| trained on: a, weight 1.0 |" in card and "| trained on: b, weight 2.0 |" in card
    assert list(record(rl_run / "config.json")["data"]) == ["train.a", "train.b", "a", "c"]
    # 10 % of 7 and of 5 rows by patient: two rows and two rows or one
    assert [data[name]["images"] for name in ("train.a", "train.b")][0] in (5, 6)
    # and each hospital's held-out images are scored for themselves
    assert sorted(path.name for path in sft_run.glob("scores-*.json")) == [
        "scores-a.json",
        "scores-b.json",
    ]


def test_the_books_of_a_rollout_tell_hospitals_apart(rl_run):
    rows = lines(rl_run / "completions.jsonl")
    logged = train_log(rl_run)
    assert [line["step"] for line in logged] == [2, 4]  # a rollout each
    for number, line in enumerate(logged):
        own = rows[8 * number : 8 * (number + 1)]
        groups = {row["group"]: row["hospital"] for row in own}
        assert all(row["hospital"] == groups[row["group"]] for row in own)  # whole groups
        for hospital in ("a", "b"):
            prompts = list(groups.values()).count(hospital)
            assert line[f"share_of_prompts/{hospital}"] == prompts / 2
            rewards = [row["reward"] for row in own if row["hospital"] == hospital]
            assert (f"reward/{hospital}" in line) == bool(rewards)
            if rewards:
                assert line[f"reward/{hospital}"] == pytest.approx(sum(rewards) / len(rewards))
    assert {tag for tag in tensorboard(rl_run) if tag.startswith("train/reward/")}
    assert (rl_run / "charts" / "b, sampled").is_dir()


def test_advantages_are_scaled_by_hospital(rl_run):
    """As group_advantages makes them, which is worked out by hand elsewhere."""
    rows = lines(rl_run / "completions.jsonl")
    for start in (0, 8):
        own = rows[start : start + 8]
        numbers = [[row[key] for row in own] for key in ("reward", "group", "hospital")]
        hospitals = f64([{"a": 0, "b": 1}[one] for one in numbers[2]])
        expected = group_advantages(
            f64(numbers[0]),
            f64(numbers[1]),
            config=ObjectiveConfig(scale_by_hospital="rms"),
            hospitals=hospitals,
        )
        assert [row["advantage"] for row in own] == expected.tolist()
    _, notes = read_dump(rl_run / "step-4.safetensors")
    groups = {row["group"]: (row["id"], row["hospital"]) for row in rows[8:]}
    assert list(zip(notes["examples"], notes["hospitals"], strict=True)) == list(groups.values())


# ---- how often they come -------------------------------------------------------------------------
def test_an_epoch_has_the_shares_of_the_weights(tiny_sft_run, files, two, tmp_path, capsys):
    """12 positions: 12 x 1/3 = 4 of a's 7, 12 x 2/3 = 8 of b's 5 images."""
    flags = [*two, "--max_steps", "1", "--dry_run"]
    assert grpo(tiny_sft_run(FAMILY), files["a"], tmp_path / "run", *flags, flags=GRPO[2:]) == 0
    assert (
        "data        12 to train on (a 4 of an epoch, from 7; b 8 of an epoch, from 5); scored"
        in capsys.readouterr().out
    )


def test_a_file_in_two_parts_is_trained_on_as_the_whole(tiny_checkpoint, tmp_path):
    """SFT, where nothing depends on a hospital but the order."""
    whole = write_data(tmp_path / "data", 6)
    parts = [
        write_rows(whole.with_name(f"{name}.jsonl"), rows)
        for name, rows in (("x", lines(whole)[:4]), ("y", lines(whole)[4:]))
    ]
    flags = [*SFT, "--validation_file", f"v={whole}"]
    runs = [tmp_path / "one", tmp_path / "two"]
    assert sft(tiny_checkpoint(FAMILY), whole, runs[0], flags=flags) == 0
    named = ["--train_file", f"x={parts[0]}", f"y={parts[1]}"]
    assert sft(tiny_checkpoint(FAMILY), whole, runs[1], *named, flags=flags) == 0
    file = "adapter_model.safetensors"
    assert equal_tensors(runs[0] / file, runs[1] / file)
    assert [line["loss"] for line in train_log(runs[0])] == [
        line["loss"] for line in train_log(runs[1])
    ]


# ---- beside training -----------------------------------------------------------------------------
def test_baselines_imitate_all_hospitals(rl_run, files, tmp_path):
    """a's labels are of many kinds, b's Fracture alone, so all together say Fracture most often."""
    flags = ["--predictions", f"c={rl_run / 'predictions-c.jsonl'}", "--output_dir"]
    train = ["--train_file", f"a={files['a']}", f"b={files['b']}"]
    assert eval.evaluate.main([*flags, str(tmp_path / "scores"), *train]) == 0
    baselines = record(tmp_path / "scores" / "scores-c.json")["baselines"]
    assert baselines["most_frequent"]["reference"] == "train_file"
    counts = Counter(
        example.labels for file in files.values() for example in read_jsonl(file)
    ).most_common(1)
    assert counts[0][0] == ("Fracture",) and baselines["most_frequent"]["jaccard"] == 1.0


def test_a_picture_shows_each_hospital(rl_run, tmp_path):
    pytest.importorskip("matplotlib")
    assert eval.figures.main(["--run", str(rl_run), "--output_dir", str(tmp_path / "f")]) == 0
    assert (tmp_path / "f" / "reward-by-hospital.png").is_file()
    picture = (tmp_path / "f" / "reward-by-hospital.svg").read_text()
    assert "Sampled reward, as trained on, by hospital" in picture
