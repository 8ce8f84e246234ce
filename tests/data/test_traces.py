"""Protect teacher traces.

Checked: what a teacher is asked and in which form, what of its answers is kept and why not, and
that none lets on that the labels were known.

Run: pytest tests/data/test_traces.py
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import run_sft
from data.answers import parse_answer
from data.demo.splits import draw_split, seeds
from data.demo.teacher import reasoning_trace, trace_from_labels
from data.examples import Example, read_jsonl
from data.files import DataError
from data.labels import LABELS, NIH_NINE, chexpert_labels_of_nih
from data.leaks import leak
from data.prompts import PROMPTS
from data.sets import answers_to_learn
from data.teacher_requests import export, request, teacher_text
from data.traces import (
    TEACHER_PROMPTS,
    TeacherAnswer,
    accept,
    check_trace,
    main,
    report,
    template_answers,
)
from tests.helpers.repository import ROOT
from tests.helpers.runs import lines, snapshot, write_data, write_rows


def example(*labels: str, id: str = "a", evaluated: tuple[str, ...] = LABELS, **fields) -> Example:
    return Example(id, "p", "a.png", labels, "site", Path("."), evaluated, **fields)


def trace(labels: str, think: str = "Hazy lungs.") -> str:
    return f"<think>{think}</think>\n<solution>{labels}</solution>"


def gemini(key: str, text: str, reason: str = "STOP", parts: list | None = None) -> dict:
    """Write a line of the Gemini API's batch output: the key and a GenerateContentResponse."""
    candidate = {
        "content": {"parts": parts or [{"text": text}], "role": "model"},
        "finishReason": reason,
        "index": 0,
    }
    return {
        "key": key,
        "response": {
            "candidates": [candidate],
            "modelVersion": "m",
            "usageMetadata": {"totalTokenCount": 9},
        },
    }


def openai(name: str, text: str | None, reason: str = "stop") -> dict:
    """Write a line of OpenAI's batch output, as vLLM's run-batch does too.

    It has the custom id and a chat completion.
    """
    message = {"role": "assistant", "content": text, "refusal": None}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
    }
    return {
        "id": "batch_req_1",
        "custom_id": name,
        "response": {"status_code": 200, "request_id": "r", "body": body},
        "error": None,
    }


# ---- checks --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "labels", "found"),
    [
        (trace("Edema, Fracture"), ("Edema", "Fracture"), None),
        # order and spelling are the parser's matter
        (trace("fracture;pulmonary edema"), ("Edema", "Fracture"), None),
        (trace(""), (), None),
        (trace("Edema"), ("Edema", "Fracture"), ("labels", "Edema, not Edema, Fracture")),
        (trace("Edema, Fracture"), ("Edema",), ("labels", "Edema, Fracture, not Edema")),
        (trace(""), ("Edema",), ("labels", "none, not Edema")),
        (trace("Edema, kyphosis"), ("Edema",), ("labels", "Edema, kyphosis, not Edema")),
        (trace("Edema, Edema"), ("Edema",), ("labels", "Edema, Edema, not Edema")),
        ("<solution>Edema</solution>", ("Edema",), ("form", "think_missing")),
        ("```\n" + trace("Edema") + "\n```", ("Edema",), ("form", "outside")),
        (trace("Edema", "The <think> tag."), ("Edema",), ("form", "think_repeated")),
        (trace("Edema", " \n"), ("Edema",), ("form", "empty think")),
        ("<think>I see", ("Edema",), ("form", "answer_missing")),
        (trace("Edema", "A haze.<|im_end|>"), ("Edema",), ("control", "<|im_end|>")),
        (trace("Edema", "A haze.<end_of_turn>"), ("Edema",), ("control", "<end_of_turn>")),
        (trace("Edema", "Nodules < 3 mm and > 1 mm, <5>"), ("Edema",), ("control", "<5>")),
        (trace("Edema", "Nodules < 3 mm and > 1 mm."), ("Edema",), None),
        (trace("Edema", "As labeled, the lungs are hazy."), ("Edema",), ("leak", "as labeled")),
    ],
)
def test_what_is_kept_and_why_not(text, labels, found):
    assert check_trace(text, example(*labels)) == found


def test_labels_that_the_source_does_not_rate_are_not_learnt():
    """NIH rates no devices: what the teacher says of them cannot be checked."""
    nih = example("Edema", evaluated=NIH_NINE)
    assert check_trace(trace("Edema"), nih) is None
    assert check_trace(trace("Edema, Support Devices"), nih) == (
        "labels",
        "Edema, Support Devices, not Edema",
    )


def test_the_demos_own_traces_pass():
    for name in ("sft-train", "validation-a"):
        for seed, drawn in zip(seeds(name, 60), draw_split(name, 60), strict=True):
            assert check_trace(reasoning_trace(drawn, seed), example(*drawn.labels)) is None


def test_the_template_teacher_writes_a_good_trace_for_any_labels():
    """All single labels, none, all, and 200 random sets; in NIH's scheme too. It names no side and
    no zone, which it cannot know.
    """
    rng = np.random.default_rng(0)
    sets = [(label,) for label in LABELS] + [
        (),
        tuple(LABELS[1:]),
        ("No Finding", "Support Devices"),
    ]
    sets += [
        tuple(
            label for label, chosen in zip(LABELS[1:], rng.random(13) < 0.3, strict=True) if chosen
        )
        for _ in range(200)
    ]
    for seed, labels in enumerate(sets):
        text = trace_from_labels(labels, seed)
        assert check_trace(text, example(*labels)) is None and text == trace_from_labels(
            labels, seed
        )
        assert (
            not {"left", "right", "upper", "lower"}
            & set(parse_answer(text).think.lower().replace(".", "").split())
            and "{" not in text
        )
    # its three wordings
    assert len({trace_from_labels(("Edema",), seed) for seed in range(20)}) == 3
    (answer,) = template_answers([example("Edema", "Support Devices", evaluated=NIH_NINE)])
    assert parse_answer(answer.text).labels == ("Edema",)  # only what the source rates


# ---- requests ------------------------------------------------------------------------------------
def test_what_the_teacher_is_asked():
    text = teacher_text(example("Edema", "Pneumonia", evaluated=NIH_NINE), PROMPTS["reasoning_b"])
    # the student's own instruction, with the form of the answer
    assert text.startswith(PROMPTS["reasoning_b"].text)
    assert (
        "\npresent: Edema, Pneumonia\n" in text
        and "\nabsent: No Finding, Cardiomegaly, Lung Lesion, Consolidation, Atelectasis" in text
    )
    assert (
        "\nnot rated, and not to be used in <solution>: Enlarged Cardiomediastinum, Lung Opacity,"
        " Pleural Effusion, Fracture, Supp" in text
    )
    assert (
        "reasons independently from what is visible" in text
        and "Nothing may show that the labels were known" in text
    )
    assert "not rated" not in teacher_text(example("Edema"), PROMPTS["demo"])
    assert "present: none\n" in teacher_text(
        example(), PROMPTS["demo"]
    ) and "<solution></solution> stays empty" in teacher_text(example(), PROMPTS["demo"])
    # a teacher that repeats the request's own words is caught
    assert leak("The reference standard shows an edema.")


@pytest.fixture
def images(tmp_path):
    """Make three examples.

    A grey PNG of 40 x 20, an RGBA one, and a JPEG whose EXIF data holds a name.
    """
    grey = np.arange(800, dtype=np.uint8).reshape(20, 40)
    Image.fromarray(grey).save(tmp_path / "0.png")
    Image.fromarray(np.dstack([grey] * 3 + [np.full_like(grey, 255)]), "RGBA").save(
        tmp_path / "1.png"
    )
    picture = Image.fromarray(grey)
    exif = picture.getexif()
    exif[0x010E] = "DOE^JANE"
    picture.save(tmp_path / "2.jpg", exif=exif)
    return [
        Example(f"e{i}", "p", name, ("Edema",), "site", tmp_path)
        for i, name in enumerate(("0.png", "1.png", "2.jpg"))
    ]


def test_the_gemini_form(images):
    row = json.loads(request(images[0], PROMPTS["demo"], "gemini", model=None, max_side=20))
    assert (
        row.keys() == {"key", "request"}
        and row["key"] == "e0"
        and row["request"].keys() == {"contents"}
    )
    (content,) = row["request"]["contents"]
    picture, text = content["parts"]
    assert content["role"] == "user" and picture["inline_data"]["mime_type"] == "image/jpeg"
    # reduced, in proportion
    assert Image.open(io.BytesIO(base64.b64decode(picture["inline_data"]["data"]))).size == (20, 10)
    assert text == {"text": teacher_text(images[0], PROMPTS["demo"])}


def test_the_openai_form(images):
    row = json.loads(request(images[1], PROMPTS["demo"], "openai", model="m", max_side=1024))
    assert {name: row[name] for name in ("custom_id", "method", "url")} == {
        "custom_id": "e1",
        "method": "POST",
        "url": "/v1/chat/completions",
    }
    assert row.keys() == {"custom_id", "method", "url", "body"} and row["body"]["model"] == "m"
    (message,) = row["body"]["messages"]
    picture, text = message["content"]
    head, _, data = picture["image_url"]["url"].partition(",")
    assert (
        message["role"] == "user"
        and picture["type"] == "image_url"
        and head == "data:image/jpeg;base64"
    )
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 20)  # never enlarged
    assert text == {"type": "text", "text": teacher_text(images[1], PROMPTS["demo"])}


@pytest.mark.parametrize("form", ["gemini", "openai"])
def test_a_request_holds_nothing_of_the_files_metadata_or_names(images, form):
    row = request(images[2], PROMPTS["demo"], form, model="m", max_side=1024)
    data = (
        row.partition("base64,")[2].partition('"')[0]
        or row.partition('"data": "')[2].partition('"')[0]
    )
    assert b"JFIF" in base64.b64decode(data)[:20] and b"DOE" not in base64.b64decode(data)
    assert "2.jpg" not in row and str(images[2].image_root) not in row


def test_files_are_parted_at_the_services_limit(images, tmp_path):
    """Three requests of nearly the same length: two fit into two and a half times the first's
    length, the third does not.
    """
    sizes = [len(request(e, PROMPTS["demo"], "openai", model="m", max_side=64)) for e in images]
    files = export(
        images,
        PROMPTS["demo"],
        "openai",
        tmp_path / "out",
        model="m",
        max_side=64,
        max_bytes=int(2.5 * sizes[0]),
    )
    assert (
        [file.name for file in files]
        == ["requests-001.jsonl", "requests-002.jsonl"]
        == sorted(os.listdir(tmp_path / "out"))
    )
    assert [[row["custom_id"] for row in lines(file)] for file in files] == [["e0", "e1"], ["e2"]]
    with pytest.raises(DataError, match="exists and nothing is overwritten"):
        export(images, PROMPTS["demo"], "openai", tmp_path / "out", model="m")


def test_a_damaged_image_leaves_no_half_export(images, tmp_path):
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:300])
    with pytest.raises(DataError, match="is not a readable JPEG or PNG"):
        export(images, PROMPTS["demo"], "gemini", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["0.png", "1.png", "2.jpg"]


# ---- answers -------------------------------------------------------------------------------------
def test_the_first_good_answer_counts_and_the_last_reason_is_kept():
    examples = [example("Edema", id=name, extra={"study": 7}) for name in "abcd"]
    imported = accept(
        examples,
        [
            TeacherAnswer("a", trace("Fracture")),
            TeacherAnswer("a", trace("Edema", "First.")),
            TeacherAnswer("a", trace("Edema", "Second.")),
            TeacherAnswer("b", trace("Fracture")),
            TeacherAnswer("b", trace("Edema", "Ground-truth: edema.")),
            TeacherAnswer("c", "", ("failed", "SAFETY")),
            TeacherAnswer("x", trace("Edema")),
            TeacherAnswer("b", "", ("cut", "length")),
        ],
    )
    (kept,) = imported.kept
    assert kept["answer"] == trace("Edema", "First.") and kept["id"] == "a" and kept["study"] == 7
    assert [(row["id"], row["rejected"]["code"]) for row in imported.rejected] == [
        ("b", "cut"),
        ("c", "failed"),
        ("d", "no_answer"),
    ]
    assert imported.unknown == ["x"] and all("answer" not in row for row in imported.rejected)
    assert report(imported).splitlines() == [
        "kept            1 of 4",
        "cut             1 length (1)",
        "failed          1 SAFETY (1)",
        "no_answer       1",
        "1 answers belong to no example, such as 'x'",
    ]


def test_an_old_answer_is_never_taken_for_the_teachers():
    old = example("Edema", answer=trace("Edema"), extra={"rejected": {"code": "cut"}})
    imported = accept([old], [])
    assert (
        imported.kept == []
        and imported.rejected[0]["rejected"]["code"] == "no_answer"
        and "answer" not in imported.rejected[0]
    )


# ---- what SFT learns -----------------------------------------------------------------------------
def test_only_label_is_learnt_from_the_labels_whatever_the_answer():
    nih = example("Edema", "Support Devices", evaluated=NIH_NINE, answer="whatever")
    learned = answers_to_learn([nih, example(id="b")], "solution", "f")
    assert [e.answer for e in learned] == ["<solution>Edema</solution>", "<solution></solution>"]


def test_the_other_forms_need_an_answer_and_its_form():
    good = example("Edema", answer=trace("Edema"))
    assert answers_to_learn([good], "think_solution", "f") == [good]
    with pytest.raises(
        DataError,
        match=(
            r"f: 1 of 2 examples have no 'answer' to learn from, such as 'b'; make them with"
            r" .python -m data.traces`"
        ),
    ):
        answers_to_learn([good, example(id="b")], "think_solution", "f")
    with pytest.raises(
        DataError,
        match=(
            r"f: 1 of 1 answers are not in the form answer_tag, such as that of 'a'"
            r" \(answer_missing\)"
        ),
    ):
        answers_to_learn([good], "answer_tag", "f")


def test_run_sft_learns_only_label_without_any_answer(tiny_checkpoint, tmp_path, capsys):
    """--show_batch prints the supervised tokens in [[ ]]: of the byte tokenizer each character is
    one, then the end of the turn.
    """
    file = write_data(tmp_path, 4)
    write_rows(
        file,
        [{name: value for name, value in row.items() if name != "answer"} for row in lines(file)],
    )
    flags = [
        "--model_name_or_path",
        str(tiny_checkpoint("qwen2_5_vl")),
        "--train_file",
        str(file),
        "--prompt",
        "only_label",
        "--show_batch",
        "--min_visual_tokens",
        "4",
        "--max_visual_tokens",
        "4",
    ]
    assert run_sft.main(flags) == 0
    shown = capsys.readouterr().out
    first = next(row for row in read_jsonl(file) if f"row 1: {row.id}, " in shown)
    supervised = shown.partition("[[<")[2].partition("]]")[0]
    assert (
        f"<{supervised}".replace("|", "")
        == f"<solution>{', '.join(first.labels)}</solution><im_end>"
    )


# ---- the command ---------------------------------------------------------------------------------
def test_out_and_back(tmp_path, capsys):
    """Export, a service that answers from the request, import, a second round for the rejected."""
    file = write_data(tmp_path / "data", 6)
    assert (
        main(
            [
                "export",
                "--data_file",
                str(file),
                "--form",
                "openai",
                "--model",
                "m",
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "6 requests:" in said and "Nothing is sent anywhere" in said and "MIMIC" in said

    def answer(row: dict, think: str) -> dict:
        text = row["body"]["messages"][0]["content"][1]["text"]
        return openai(
            row["custom_id"], trace(text.partition("present: ")[2].partition("\n")[0], think)
        )

    asked = lines(tmp_path / "out" / "requests-001.jsonl")
    first = [
        answer(row, "I was told so." if i % 3 == 0 else "Hazy.") for i, row in enumerate(asked)
    ]
    write_rows(tmp_path / "first.jsonl", first)
    back = ["import", "--data_file", str(file), "--output", str(tmp_path / "data" / "sft.jsonl")]
    assert main([*back, "--answers", str(tmp_path / "first.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "kept            4 of 6",
        "leak            2 i was told (2)",
    ]
    kept = read_jsonl(tmp_path / "data" / "sft.jsonl")
    assert [e.id for e in kept] == ["e1", "e2", "e4", "e5"] and all(
        check_trace(e.answer, e) is None for e in kept
    )
    rejected = tmp_path / "data" / "sft-rejected.jsonl"
    assert [e.id for e in read_jsonl(rejected)] == ["e0", "e3"]  # a data file, to ask again
    assert lines(rejected)[0]["rejected"] == {
        "code": "leak",
        "detail": "i was told",
        "text": first[0]["response"]["body"]["choices"][0]["message"]["content"],
    }

    assert (
        main(
            [
                "export",
                "--data_file",
                str(rejected),
                "--form",
                "gemini",
                "--output_dir",
                str(tmp_path / "again"),
            ]
        )
        == 0
    )
    assert [row["key"] for row in lines(tmp_path / "again" / "requests-001.jsonl")] == ["e0", "e3"]
    second = [
        gemini(name, trace(", ".join(e.labels)))
        for name, e in zip(("e0", "e3"), read_jsonl(rejected), strict=True)
    ]
    write_rows(tmp_path / "second.jsonl", second)
    whole = [
        "--output",
        str(tmp_path / "whole.jsonl"),
        "--answers",
        str(tmp_path / "first.jsonl"),
        str(tmp_path / "second.jsonl"),
    ]
    assert main(["import", "--data_file", str(file), *whole]) == 0
    assert f"give --image_root {file.parent}" in capsys.readouterr().out
    assert (
        len(lines(tmp_path / "whole.jsonl")) == 6
        and not (tmp_path / "whole-rejected.jsonl").exists()
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["export", "--form", "openai", "--output_dir", "out"],
            "--model: needed with --form openai",
        ),
        (
            ["export", "--form", "gemini", "--model", "m", "--output_dir", "out"],
            "--model: needed with --form openai, and with no other",
        ),
        (
            ["export", "--form", "gemini", "--output_dir", "out", "--prompt", "only_label"],
            (
                "--prompt only_label: has no reasoning; its answers are made from the labels; a"
                " teacher can be asked with demo, free_reasoning"
            ),
        ),
        (
            ["export", "--form", "gemini", "--output_dir", "out", "--prompt", "narrative"],
            "--prompt narrative: no such instruction variant",
        ),
        (
            ["export", "--form", "gemini", "--output_dir", "out", "--max_side", "0"],
            "--max_side 0: must be at least 1",
        ),
        (
            ["import", "--answers", "none.jsonl", "--output", "new.jsonl"],
            "--answers none.jsonl: no such file",
        ),
        (
            ["import", "--teacher", "template", "--output", "data.jsonl"],
            "data.jsonl exists and nothing is overwritten",
        ),
        (
            ["import", "--teacher", "template", "--output", "new.jsonl", "--rejected", "new.jsonl"],
            "--rejected new.jsonl is the --output",
        ),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, flags, said):
    write_data(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert main([flags[0], "--data_file", "data.jsonl", *flags[1:]]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert snapshot(tmp_path) == before


def test_nothing_kept_is_an_error_and_writes_no_data_file(tmp_path):
    file = write_data(tmp_path, 2)
    write_rows(tmp_path / "answers.jsonl", [gemini("e0", "no")])
    assert (
        main(
            [
                "import",
                "--data_file",
                str(file),
                "--answers",
                str(tmp_path / "answers.jsonl"),
                "--output",
                str(tmp_path / "sft.jsonl"),
            ]
        )
        == 1
    )
    assert (
        not (tmp_path / "sft.jsonl").exists() and len(lines(tmp_path / "sft-rejected.jsonl")) == 2
    )


def test_the_help_says_what_may_not_leave(tmp_path):
    for command in ([], ["export"]):
        shown = subprocess.run(
            [sys.executable, "-m", "data.traces", *command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout
        said = " ".join(shown.split())
        assert (
            "Nothing is sent anywhere by this command" in said
            and "MIMIC-CXR's and CheXpert's terms forbid" in said
        )
    assert set(TEACHER_PROMPTS) == {
        name for name in PROMPTS if name not in ("only_label", "nv_reason", "label_list")
    }


# ---- real X-rays ---------------------------------------------------------------------------------
@pytest.mark.skipif(
    "CXR_SAMPLE" not in os.environ, reason="CXR_SAMPLE names no folder of real X-rays"
)
def test_traces_for_real_radiographs(tmp_path):
    from csv import DictReader

    root = Path(os.environ["CXR_SAMPLE"]) / "nih"
    with next(root.glob("Data_Entry*.csv")).open() as file:
        entries = [
            (row["Image Index"], row["Patient ID"], row["Finding Labels"].split("|"))
            for row in DictReader(file)
        ]
    rows = [
        {
            "id": name,
            "patient_id": patient,
            "image": name,
            "labels": list(chexpert_labels_of_nih(found)),
            "dataset": "nih",
            "evaluated_labels": list(NIH_NINE),
            "source_labels": found,
        }
        for name, patient, found in entries
    ]
    file, folder = write_rows(tmp_path / "nih.jsonl", rows), ["--image_root", str(root / "images")]
    assert (
        main(
            [
                "import",
                "--data_file",
                str(file),
                *folder,
                "--teacher",
                "template",
                "--output",
                str(tmp_path / "sft.jsonl"),
            ]
        )
        == 0
    )
    learned = read_jsonl(tmp_path / "sft.jsonl", root / "images")
    assert (
        len(learned) == len(rows) > 40
        and answers_to_learn(learned, "think_solution", "f") == learned
    )
    assert (
        main(
            [
                "export",
                "--data_file",
                str(file),
                *folder,
                "--form",
                "gemini",
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert len(lines(tmp_path / "out" / "requests-001.jsonl")) == len(rows)
