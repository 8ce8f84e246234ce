"""Protect --bad_images.

Checked: `skip` leaves out exactly the examples whose image cannot be read, says so in banner, list
and scores, and is the same after a resume; `fail`, the default, stops.

Run: pytest tests/scripts/test_bad_images.py
"""

from __future__ import annotations

import shutil

import pytest

from data.files import DataError
from eval.evaluate import main as evaluate
from tests.helpers.runs import (
    assert_same_run,
    grpo,
    lines,
    record,
    sft,
    speak,
    write_data,
    write_rows,
)

BAD = (2, 3, 9)  # both examples of patient p1, and one of p4
STEPS = [
    "--num_train_epochs",
    "2",
    "--save_steps",
    "1",
    "--per_device_train_batch_size",
    "2",
    "--gradient_accumulation_steps",
    "2",
]


@pytest.fixture
def damaged(tmp_path):
    """Write a data file of 12 rows, three of whose images are damaged.

    They are cut, replaced by a page, and gone.
    """
    file = write_data(tmp_path / "data")
    image = [file.parent / row["image"] for row in lines(file)]
    image[BAD[0]].write_bytes(image[BAD[0]].read_bytes()[:200])
    image[BAD[1]].write_text("<html>404</html>")
    image[BAD[2]].unlink()
    return file


@pytest.fixture
def without_them(damaged, tmp_path):
    """Write the same data file without these rows, and images of which all are good."""
    shutil.copytree(damaged.parent, tmp_path / "good")
    return write_rows(
        tmp_path / "good" / "data.jsonl",
        [row for i, row in enumerate(lines(damaged)) if i not in BAD],
    )


def reasons(file) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in lines(file)}


def test_sft_trains_as_if_the_examples_were_not_there(
    damaged, without_them, tiny_checkpoint, tmp_path, capsys
):
    model = tiny_checkpoint("qwen2_5_vl")
    assert (
        sft(
            model,
            damaged,
            tmp_path / "skip",
            "--bad_images",
            "skip",
            "--validation_file",
            f"site={damaged}",
            *STEPS,
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "9 to train on, 9 to validate; scored: site 9; left out for their images:"
        " train 3 (bad-images-train.jsonl), site 3 (bad-images-site.jsonl)"
        in out
        and "examples left out for their images: site 3" in out
    )
    assert (
        sft(
            model,
            without_them,
            tmp_path / "clean",
            "--validation_file",
            f"site={without_them}",
            *STEPS,
        )
        == 0
    )
    assert_same_run(tmp_path / "skip", tmp_path / "clean")
    for name in ("train", "site"):
        found = reasons(tmp_path / "skip" / f"bad-images-{name}.jsonl")
        assert list(found) == ["e2", "e3", "e9"] and list(found.values())[2].endswith(
            "check the row or --image_root"
        )
        assert (
            "image-2.png is not a readable JPEG or PNG" in found["e2"]
            and "image-3.png is not a readable" in found["e3"]
        )
    assert not list((tmp_path / "clean").glob("bad-images-*"))
    assert record(tmp_path / "skip" / "scores-site.json")["bad_images"] == 3
    assert record(tmp_path / "clean" / "scores-site.json")["bad_images"] == 0
    assert [
        row["id"] for row in record(tmp_path / "skip" / "config.json")["bad_images"]["train"]
    ] == ["e2", "e3", "e9"]


def test_a_resumed_run_leaves_out_what_it_left_out_before(damaged, tiny_checkpoint, tmp_path):
    """Even where a damaged image has been repaired since: the data set is that of the run's
    beginning.
    """
    model, flags = (
        tiny_checkpoint("qwen2_5_vl"),
        ("--bad_images", "skip", *STEPS, "--save_total_limit", "none"),
    )
    assert sft(model, damaged, tmp_path / "whole", *flags) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "part" / "checkpoint-1")
    shutil.copyfile(damaged.parent / "image-0.png", damaged.parent / "image-9.png")  # it was gone
    assert (
        sft(
            model,
            damaged,
            tmp_path / "resumed",
            "--resume_from_checkpoint",
            str(tmp_path / "part" / "checkpoint-1"),
            flags=flags,
        )
        == 0
    )
    for name in ("bad-images-train.jsonl", "predictions-validation.jsonl"):
        assert lines(tmp_path / "whole" / name) == lines(tmp_path / "resumed" / name)
    assert_final_adapters_equal(tmp_path / "whole", tmp_path / "resumed")


def assert_final_adapters_equal(one, other) -> None:
    assert (one / "adapter_model.safetensors").read_bytes() == (
        other / "adapter_model.safetensors"
    ).read_bytes()


def test_grpo_skips_them(damaged, tiny_sft_run, tmp_path, monkeypatch, capsys):
    speak(monkeypatch)
    assert (
        grpo(
            tiny_sft_run("qwen2_5_vl"),
            damaged,
            tmp_path / "run",
            "--bad_images",
            "skip",
            "--validation_file",
            f"site={damaged}",
            "--max_steps",
            "10",
        )
        == 0
    )
    assert (
        "9 to train on; scored: site 9; left out for their images: train 3"
        " (bad-images-train.jsonl), site 3" in capsys.readouterr().out
    )
    assert list(reasons(tmp_path / "run" / "bad-images-train.jsonl")) == ["e2", "e3", "e9"]
    # 5 rollouts of 2 prompts: all nine good examples in one epoch, the bad ones never
    assert {row["id"] for row in lines(tmp_path / "run" / "completions.jsonl")} == {
        f"e{i}" for i in range(12) if i not in BAD
    }
    scores = record(tmp_path / "run" / "scores-site.json")
    assert (scores["bad_images"], scores["n"], scores["step"]) == (3, 9, 10)


def test_evaluation_skips_them(damaged, tiny_sft_run, tmp_path, capsys):
    flags = [
        "--adapter_name_or_path",
        str(tiny_sft_run("qwen2_5_vl")),
        "--data_file",
        f"site={damaged}",
        "--output_dir",
    ]
    assert evaluate([*flags, str(tmp_path / "out"), "--bad_images", "skip"]) == 0
    out = capsys.readouterr().out
    assert (
        "images: site 9; left out for their images: site 3 (bad-images-site.jsonl)" in out
        and "left out for their images: site 3\n" in out
    )
    assert list(reasons(tmp_path / "out" / "bad-images-site.jsonl")) == ["e2", "e3", "e9"]
    scores = record(tmp_path / "out" / "scores-site.json")
    assert (scores["bad_images"], scores["n"]) == (3, 9) and len(
        scores["run"]["bad_images"]["site"]
    ) == 3
    assert len(lines(tmp_path / "out" / "predictions-site.jsonl")) == 9
    # of the file's first four rows
    assert (
        evaluate([*flags, str(tmp_path / "first"), "--bad_images", "skip", "--max_samples", "4"])
        == 0
    )
    assert [row["id"] for row in lines(tmp_path / "first" / "predictions-site.jsonl")] == [
        "e0",
        "e1",
    ]
    assert evaluate([*flags, str(tmp_path / "out2")]) == 2
    assert "error: example 'e9': image 'image-9.png': no such file" in capsys.readouterr().err


def test_fail_stops_at_a_missing_file_before_the_start_and_at_a_damaged_one_when_it_comes(
    damaged, tiny_checkpoint, tmp_path
):
    model = tiny_checkpoint("qwen2_5_vl")
    with pytest.raises(DataError, match="example 'e9': image 'image-9.png': no such file"):
        sft(model, damaged, tmp_path / "missing", *STEPS)
    shutil.copyfile(damaged.parent / "image-0.png", damaged.parent / "image-9.png")
    with pytest.raises(DataError, match="is not a readable JPEG or PNG"):
        sft(model, damaged, tmp_path / "damaged", *STEPS)
    assert not (tmp_path / "missing").exists()
