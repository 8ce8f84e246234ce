"""Protect --show_batch and --dry_run.

Checked: what they print is the batch that is trained on, text from data cannot act on the terminal,
and neither leaves anything behind.

Run: pytest tests/engine/test_preview.py
"""

from __future__ import annotations

import io
import re

import pytest

import engine.base_model
from engine.policy import Policy
from engine.preview import printable, row_text, wants_colour
from tests.helpers.runs import grpo, lines, sft, snapshot, write_rows
from tests.helpers.tiny import SAVE

FAMILIES = list(SAVE)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def no_weights(monkeypatch) -> None:
    monkeypatch.setattr(
        engine.base_model.AutoModelForImageTextToText,
        "from_pretrained",
        lambda *_, **__: pytest.fail("weights were loaded"),
    )


# ---- show_batch ----------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_shown_is_the_first_one_trained_on(
    family, tiny_checkpoint, tiny_data, tmp_path, capsys, monkeypatch
):
    no_weights(monkeypatch)
    assert (
        sft(
            tiny_checkpoint(family),
            tiny_data,
            tmp_path / "run",
            "--show_batch",
            "--per_device_train_batch_size",
            "2",
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert len(re.findall(r"^row \d: e\d+, image-\d+\.png$", shown, re.MULTILINE)) == 2
    assert shown.count("<image x 4>") == 2 and "\x1b" not in shown
    # the byte tokenizer makes a token of every character; supervised are the answer and its end of
    # turn, nothing of the prompt
    marked = [
        re.sub(r"(?<!\\)\|", "", text).replace("\\", "")
        for text in re.findall(r"\[\[(.*?)\]\]", shown.split("row 1", 1)[1], re.DOTALL)
    ]
    end = "<end_of_turn>" if family == "gemma3" else "<|im_end|>".replace("|", "")
    assert len(marked) == 2
    for text in marked:
        assert re.fullmatch(
            r"<think>x*</think><solution>[A-Z][a-z]+</solution>" + re.escape(end), text
        )
    assert not (tmp_path / "run").exists() and snapshot(tmp_path) == {}


def ids_shown(text: str) -> list[str]:
    return re.findall(r"^row \d: (e\d+),", text, re.MULTILINE)


def test_sft_shows_the_examples_that_it_takes_first(
    tiny_checkpoint, tiny_data, tmp_path, capsys, monkeypatch
):
    flags = [
        "--per_device_train_batch_size",
        "3",
        "--validation_file",
        f"site={tiny_data}",
        "--max_steps",
        "1",
    ]
    assert (
        sft(tiny_checkpoint("qwen2_5_vl"), tiny_data, tmp_path / "run", "--show_batch", *flags) == 0
    )
    shown, taken = ids_shown(capsys.readouterr().out), []

    def encode_answer(policy, example):
        taken.append(example.id)
        return encode(policy, example)

    encode = Policy.encode_answer  # the memory check asks the encoder itself for some rows
    monkeypatch.setattr(Policy, "encode_answer", encode_answer)
    assert sft(tiny_checkpoint("qwen2_5_vl"), tiny_data, tmp_path / "run", *flags) == 0
    assert taken[:2] == ["e0", "e0"]  # the check before the loop
    assert shown == taken[2:5] != ["e0", "e1", "e2"]  # in shuffled order


def test_grpo_shows_the_prompts_that_it_takes_first(tiny_sft_run, tiny_data, tmp_path, capsys):
    start, flags = tiny_sft_run("qwen2_5_vl"), ["--max_steps", "2"]
    assert grpo(start, tiny_data, tmp_path / "run", "--show_batch", *flags) == 0
    shown = ids_shown(capsys.readouterr().out)
    assert grpo(start, tiny_data, tmp_path / "run", *flags) == 0
    taken = list(dict.fromkeys(row["id"] for row in lines(tmp_path / "run/completions.jsonl")))
    assert shown == taken != ["e0", "e1"]


def test_counts_by_hand(tiny_checkpoint, tiny_data, tmp_path, capsys):
    assert (
        sft(
            tiny_checkpoint("qwen2_5_vl"),
            tiny_data,
            tmp_path / "run",
            "--show_batch",
            "--per_device_train_batch_size",
            "2",
        )
        == 0
    )
    rows = [
        list(map(int, numbers))
        for numbers in re.findall(
            r"(\d+) tokens, (\d+) supervised, (\d+) image, (\d+) padding", capsys.readouterr().out
        )
    ]
    first, second, batch = rows
    assert [a + b for a, b in zip(first, second, strict=True)] == batch
    # a batch of training has no padding
    assert first[3] == second[3] == 0 and first[0] != second[0]
    # same prompt and label name lengths apart, so rows differ in their answers alone
    assert first[0] - first[1] == second[0] - second[1]
    assert first[2] == second[2] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo_shows_the_prompts_once(
    family, tiny_sft_run, tiny_data, tmp_path, capsys, monkeypatch
):
    start = tiny_sft_run(family)
    no_weights(monkeypatch)
    assert grpo(start, tiny_data, tmp_path / "run", "--show_batch") == 0
    shown = capsys.readouterr().out
    # 4 completions x 2 micro-batches / 4
    assert len(re.findall(r"^row \d: ", shown, re.MULTILINE)) == 2
    assert shown.count("<image x 4>") == 1 and "[[" not in shown.split("row 1")[1]
    assert ", 0 supervised, " in shown and "supervised later" in shown
    assert snapshot(tmp_path) == {}


def test_an_escape_in_the_data_does_not_reach_the_terminal(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    answer = "<think>\x1b[2J\x07\u202e|[x]\\</think><solution>Edema</solution>"
    image = sorted(tiny_data.parent.glob("*.png"))[0]
    rows = [
        {
            "id": f"e\x1b[3{i}m",
            "patient_id": f"p{i}",
            "image": image.name,
            "labels": ["Edema"],
            "dataset": "site",
            "answer": answer,
        }
        for i in range(4)
    ]
    file = write_rows(tmp_path / "data.jsonl", rows)
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr("sys.stdout", stream)
        assert (
            sft(
                tiny_checkpoint("qwen2_5_vl"),
                file,
                tmp_path / "run",
                "--show_batch",
                "--image_root",
                str(tiny_data.parent),
            )
            == 0
        )
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        left = (
            re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
            if stream.isatty()
            else stream.getvalue()
        )
        assert "\x07" not in left and "\x1b" not in left and "\u202e" not in left
        assert r"\x1b" in left and r"\x07" in left


def test_printable():
    assert (
        printable("a\nb\tc\x1b\x9b\u202e\u00e9 \\") == r"a\nb\tc\x1b\x9b\u202e" + "\u00e9 " + "\\\\"
    )
    assert printable("[a|b]", "|[]") == r"\[a\|b\]"


def test_marks_and_colours():
    pieces = [
        ("prompt", "", "<bos>"),
        ("image", "", "<image x 4>"),
        ("prompt", "a|\n", ""),
        ("supervised", "b", ""),
        ("supervised", "", "<eos>"),
        ("padding", "", "<padding x 2>"),
    ]
    assert row_text(pieces, colour=False) == "<bos>|<image x 4>|a\\|\\n\n[[b|<eos>]]<padding x 2>"
    coloured = row_text(pieces, colour=True)
    assert (
        "\x1b[32;1;4mb\x1b[0m" in coloured
        and "\x1b[35;1m<eos>\x1b[0m" in coloured
        and "\x1b[36;4m<image x 4>\x1b[0m" in coloured
    )
    # supervised text at the end closes its mark; neighbours differ in the underline, so that every
    # boundary shows
    assert row_text(pieces[:4], colour=False).endswith("[[b]]")
    underlined = [";4m" in part for part in coloured.split("\x1b[0m")[:-1]]
    assert underlined == [False, True] * 3


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(Terminal()) and not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(Terminal())


# ---- dry_run -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dry_run_of_sft_builds_everything_and_leaves_nothing(
    family, tiny_checkpoint, tiny_data, tmp_path, capsys
):
    assert (
        sft(
            tiny_checkpoint(family),
            tiny_data,
            tmp_path / "run",
            "--dry_run",
            "--validation_file",
            f"site={tiny_data}",
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert (
        "1 sequences x 8 accumulated = 8 an optimizer step" in shown
        and "checked     12 of 12 training rows and 24 of 24" in shown
    )
    assert re.search(
        r"^tokens      prompt min (\d+), .*image min 4, mean 4.0, max 4; answer min \d+",
        shown,
        re.MULTILINE,
    )
    assert re.search(r"^  \s+update validation evaluation$", shown, re.MULTILINE)
    assert [
        name
        for name in (
            "base",
            "adapters",
            "AdamW",
            "gradients",
            "activations",
            "logits",
            "KV cache",
            "total",
            "peak",
        )
        if not re.search(rf"^  {name} ", shown, re.MULTILINE)
    ] == []
    assert snapshot(tmp_path) == {} and not (tmp_path / "run").exists()


def test_a_dry_run_of_grpo(tiny_sft_run, tiny_data, tmp_path, capsys):
    start = tiny_sft_run("gemma3")
    before = snapshot(start)
    assert grpo(start, tiny_data, tmp_path / "run", "--dry_run") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  \s+rollout\s+scoring\s+update\s+evaluation$", shown, re.MULTILINE)
    assert "2 prompts x 4 completions = 8 completions" in shown and "completion up to 6" in shown
    assert snapshot(tmp_path) == {} and snapshot(start) == before


@pytest.mark.parametrize("flag", ["--show_batch", "--dry_run"])
def test_a_damaged_image_is_found(flag, tiny_checkpoint, tiny_data, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    rows = [
        {
            "id": f"e{i}",
            "patient_id": f"p{i}",
            "image": "bad.png",
            "labels": ["Edema"],
            "dataset": "site",
            "answer": "<think>x</think><solution>Edema</solution>",
        }
        for i in range(4)
    ]
    with pytest.raises(ValueError, match="bad.png is not a readable JPEG or PNG"):
        sft(
            tiny_checkpoint("qwen2_5_vl"),
            write_rows(tmp_path / "data.jsonl", rows),
            tmp_path / "run",
            flag,
        )
    assert not (tmp_path / "run").exists()


def test_the_two_flags_exclude_each_other(tiny_checkpoint, tiny_data, tmp_path):
    with pytest.raises(ValueError, match="--show_batch and --dry_run"):
        sft(tiny_checkpoint("qwen2_5_vl"), tiny_data, tmp_path / "run", "--show_batch", "--dry_run")
