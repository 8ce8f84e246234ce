"""Protects the embedded default: pictures that show their labels, two hospitals that differ, traces that parse, splits that
cannot overlap, and a shipped base checkpoint that loads.

    python -m pytest tests/test_demo_data.py
"""
from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from data.demo import splits
from data.demo.build_base import (
    BASE_FOLDER, CHAT_TEMPLATE, SPECIAL_TOKENS, Encoder, image_processor, patchify, sample_task, tokenizer_corpus,
    train_tokenizer,
)
from data.demo.radiographs import IMAGE_SIZE, draw, draw_findings
from data.demo.splits import SPLITS, WRITTEN_SPLITS, draw_split, seeds, write_split
from data.demo.teacher import reasoning_trace
from data.labels import LABELS, NIH_NINE, NO_FINDING, SUPPORT_DEVICES
from data.prompts import PROMPTS, build_messages

DRAWN_LABELS = [label for label in LABELS if label != NO_FINDING]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_FOLDER)


@pytest.fixture(scope="module")
def patients():
    """150 pictures of each site, by site; drawn once because drawing is what these tests spend their time on."""
    return {site: [draw(seed, site) for seed in range(150)] for site in "ab"}


# -------------------------------------------------------------------------------------------------------------- pictures

@pytest.mark.parametrize("site", ["a", "b"])
def test_a_seed_and_a_site_fix_the_picture(site):
    first, again, other = draw(11, site), draw(11, site), draw(12, site)
    assert np.array_equal(first.image, again.image)
    assert (first.findings, first.locations) == (again.findings, again.locations)
    assert np.array_equal(first.grid, again.grid)
    assert not np.array_equal(first.image, other.image)
    assert first.image.dtype == np.uint8 and first.image.shape == (112, 112)
    assert not np.array_equal(draw_findings((), 11, "a").image, draw_findings((), 11, "b").image)


@pytest.mark.parametrize("site", ["a", "b"])
@pytest.mark.parametrize("label", DRAWN_LABELS)
def test_each_finding_can_be_seen_where_the_grid_says(label, site):
    for seed in range(8):
        with_finding, without = draw_findings((label,), seed, site), draw_findings((), seed, site)
        cells = with_finding.grid[LABELS.index(label)]
        change = np.abs(with_finding.image.astype(float) - without.image.astype(float))
        inside = np.kron(cells, np.ones((28, 28), dtype=bool))  # a cell is 112 / 4 = 28 pixels wide
        # The same patient under the same noise: any change is the finding. A nodule is small, so its cells change little on
        # average; where it is strongest, each finding stands out by the noise's deviation, 3 (site a) to 11 (site b).
        assert change[inside].mean() > 1.0
        assert np.percentile(change[inside], 99) > 11.0
        assert change[inside].mean() > 5 * change[~inside].mean()
        assert not with_finding.grid[[LABELS.index(other) for other in LABELS if other != label]].any()


def test_findings_are_independent_of_each_other():
    alone, together = draw_findings(("Fracture",), 5, "a"), draw_findings(("Edema", "Fracture", "Lung Lesion"), 5, "a")
    assert together.locations["Fracture"] == alone.locations["Fracture"]
    assert np.array_equal(together.grid[LABELS.index("Fracture")], alone.grid[LABELS.index("Fracture")])


def test_no_finding_means_nothing_but_devices(patients):
    assert draw_findings((), 1, "a").findings == (NO_FINDING,)
    assert draw_findings((NO_FINDING, "Edema"), 1, "a").findings == ("Edema",)
    assert draw_findings((SUPPORT_DEVICES,), 1, "a").findings == (NO_FINDING, SUPPORT_DEVICES)
    assert draw_findings((SUPPORT_DEVICES, "Edema"), 1, "a").findings == ("Edema", SUPPORT_DEVICES)
    for radiograph in patients["a"] + patients["b"]:
        assert (NO_FINDING in radiograph.findings) == set(radiograph.findings).issubset({NO_FINDING, SUPPORT_DEVICES})


def test_unknown_sites_and_labels_are_refused():
    with pytest.raises(ValueError, match="no such site: 'c'"):
        draw_findings((), 1, "c")
    with pytest.raises(ValueError, match="Nodule"):
        draw_findings(("Nodule",), 1, "a")


def test_the_sites_differ_in_contrast_and_prevalence(patients):
    a, b = patients["a"], patients["b"]
    middle = slice(30, 82)  # lungs and heart, clear of site b's collimation and marker
    contrast_a, contrast_b = (np.mean([r.image[middle, middle].std() for r in site]) for site in (a, b))
    brightness_a, brightness_b = (np.mean([r.image[middle, middle].mean() for r in site]) for site in (a, b))
    assert contrast_b < 0.85 * contrast_a
    assert abs(brightness_a - brightness_b) > 5.0
    # Every label is drawn at both sites; lesions are commoner at b (0.22 against 0.13), devices at a (0.28 against 0.12).
    share_a, share_b = ({label: np.mean([label in r.findings for r in site]) for label in LABELS} for site in (a, b))
    assert min(*share_a.values(), *share_b.values()) > 0.0
    assert share_b["Lung Lesion"] > share_a["Lung Lesion"] and share_a[SUPPORT_DEVICES] > share_b[SUPPORT_DEVICES]


# --------------------------------------------------------------------------------------------------------------- schemes

def test_site_a_labels_all_fourteen():
    radiograph = draw_findings(("Fracture", "Pleural Effusion", SUPPORT_DEVICES), 3, "a")
    assert radiograph.source_labels == radiograph.labels == ("Pleural Effusion", "Fracture", SUPPORT_DEVICES)
    assert radiograph.evaluated_labels == LABELS


@pytest.mark.parametrize(("drawn", "source_labels", "labels"), [
    ((), ("No Finding",), ("No Finding",)),
    (("Fracture",), ("No Finding",), ("No Finding",)),  # never written down at b, so its reader saw nothing
    (("Enlarged Cardiomediastinum", SUPPORT_DEVICES), ("No Finding",), ("No Finding",)),
    (("Pleural Effusion",), ("Effusion",), ()),  # written down, but not among the nine: no label, and not No Finding
    (("Lung Opacity",), ("Infiltration",), ()),
    (("Pleural Other", "Fracture"), ("Pleural_Thickening",), ("Pleural Other",)),
    (("Pleural Effusion", "Edema", "Cardiomegaly"), ("Cardiomegaly", "Edema", "Effusion"), ("Cardiomegaly", "Edema")),
])
def test_site_b_labels_as_nih(drawn, source_labels, labels):
    radiograph = draw_findings(drawn, 3, "b")
    assert radiograph.source_labels == source_labels
    assert radiograph.labels == labels
    assert radiograph.evaluated_labels == NIH_NINE


def test_site_b_calls_a_lesion_mass_or_nodule_by_size():
    readings = set()
    for seed in range(20):
        radiograph = draw_findings(("Lung Lesion",), seed, "b")
        assert radiograph.labels == ("Lung Lesion",)
        readings.add((radiograph.source_labels, radiograph.locations["Lung Lesion"].split()[-1]))
    assert readings == {(("Mass",), "mass"), (("Nodule",), "nodule")}


# ---------------------------------------------------------------------------------------------------------------- traces

def test_traces_are_valid_answers_with_the_drawn_labels(patients):
    for radiograph in patients["a"] + patients["b"]:
        trace = reasoning_trace(radiograph, 0)
        think, solution = trace.removeprefix("<think>").removesuffix("</solution>").split("</think><solution>")
        assert trace == f"<think>{think}</think><solution>{solution}</solution>"
        assert think.strip() and not set("<>{}") & set(think + solution)
        assert tuple(solution.split(", ")) == radiograph.findings
        assert trace == reasoning_trace(radiograph, 0)


def test_traces_vary_and_name_the_location():
    radiograph = draw_findings(("Consolidation", "Fracture"), 4, "a")
    traces = {reasoning_trace(radiograph, seed) for seed in range(40)}
    assert len(traces) > 15
    assert all(radiograph.locations["Consolidation"] in trace.lower() for trace in traces)


def test_traces_are_short(tokenizer, patients):
    lengths = [len(tokenizer(reasoning_trace(radiograph, 0)).input_ids) + 1 for radiograph in patients["a"]]
    assert 20 <= np.mean(lengths) <= 45 and max(lengths) < 80


# ---------------------------------------------------------------------------------------------------------------- splits

def test_seeds_of_different_splits_never_meet():
    largest = {name: seeds(name, 1_000_000) for name in SPLITS}
    for one, other in itertools.combinations(largest.values(), 2):
        assert one.stop <= other.start or other.stop <= one.start
    with pytest.raises(ValueError, match="rl-train.*1000001"):
        seeds("rl-train", 1_000_001)
    with pytest.raises(ValueError, match="no such split: 'test'.*test-a"):
        seeds("test")
    assert not [name for name in WRITTEN_SPLITS if name.startswith("base")]


@pytest.mark.parametrize("name", ["sft-train", "validation-b"])
def test_written_rows_hold_to_the_data_file_contract(tmp_path, name):
    data_file = write_split(name, 12, tmp_path)
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    assert data_file == tmp_path / f"{name}.jsonl" and len(rows) == 12
    assert len({row["id"] for row in rows}) == len({row["patient_id"] for row in rows}) == 12
    for row, radiograph in zip(rows, draw_split(name, 12), strict=True):
        assert row["image"] == f"{name}/{row['id']}.png"
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["image"])), radiograph.image)
        assert row["labels"] == list(radiograph.labels) and row["source_labels"] == list(radiograph.source_labels)
        assert row["evaluated_labels"] == list(LABELS if name == "sft-train" else NIH_NINE)
        assert row["dataset"] == ("demo-a" if name == "sft-train" else "demo-b")
        assert ("answer" in row) == (name == "sft-train")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.jsonl"]


def test_a_complete_split_is_reused_and_any_other_is_drawn_again(tmp_path, monkeypatch):
    image = tmp_path / "rl-train" / "rl-train-00000.png"
    data_file = write_split("rl-train", 3, tmp_path)
    os.utime(image, (1, 1))
    write_split("rl-train", 3, tmp_path)
    assert image.stat().st_mtime == 1  # reused
    monkeypatch.setattr(splits, "GENERATOR_VERSION", "another")
    write_split("rl-train", 3, tmp_path)
    assert image.stat().st_mtime > 1  # drawn again: another generator
    image.unlink()
    write_split("rl-train", 3, tmp_path)
    assert image.exists()  # drawn again: a picture was missing
    assert len(write_split("rl-train", 5, tmp_path).read_text().splitlines()) == 5  # drawn again: another count
    assert data_file.exists()


def test_an_interrupted_redraw_leaves_no_data_file(tmp_path, monkeypatch):
    """Its rows would describe pictures that have been replaced."""
    data_file = write_split("rl-train", 3, tmp_path)
    monkeypatch.setattr(splits, "draw", lambda seed, site: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_split("rl-train", 4, tmp_path)
    assert not data_file.exists()


# ------------------------------------------------------------------------------------------------------------------ base

def test_patchify_equals_the_image_processor():
    images = np.stack([draw(seed, "b").image for seed in range(2)])
    pixel_values, grid = patchify(images)
    expected = image_processor()(images=[Image.fromarray(image) for image in images], return_tensors="pt")
    torch.testing.assert_close(pixel_values, expected["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(grid, expected["image_grid_thw"])


def test_the_base_is_never_taught_the_demo_task(patients):
    """Its questions are others, and none of its answers has several labels in tags."""
    rng = np.random.default_rng(0)
    for radiograph in patients["a"]:
        for task in ("caption", "impression", "choice", "presence"):
            question, answer = sample_task(radiograph, task, rng)
            assert question not in {prompt.text for prompt in PROMPTS.values()}
            solution = answer.partition("<solution>")[2].removesuffix("</solution>")
            assert solution in {"", "yes", "no", *radiograph.findings}


def test_the_base_sees_every_label_behind_a_tag_and_behind_a_comma(patients):
    rng = np.random.default_rng(0)
    answers = [sample_task(r, task, rng)[1] for r in patients["a"] for task in ("choice", "impression")]
    for label in LABELS:
        assert any(f"<solution>{label}</solution>" in answer for answer in answers)
        if label not in LABELS[:2]:  # No Finding and Enlarged Cardiomediastinum can only begin a list in CheXpert's order
            assert any(f", {label}" in answer for answer in answers)


def test_prompt_and_answer_tokens_meet_at_a_boundary(tokenizer):
    """Training puts prompt and answer together as ids: the text put together first must give the same ids."""
    trace = "<think>Enlarged heart.</think><solution>Cardiomegaly</solution>"
    batch = Encoder(tokenizer).batch(np.zeros((1, IMAGE_SIZE, IMAGE_SIZE), np.uint8), [PROMPTS["demo"].text], [trace])
    rendered = tokenizer.apply_chat_template(build_messages(PROMPTS["demo"], trace), tokenize=False)
    expected = tokenizer(rendered.replace("<|image_pad|>", "<|image_pad|>" * 16), add_special_tokens=False).input_ids
    newline = tokenizer("\n", add_special_tokens=False).input_ids  # after the end of turn, not trained
    assert batch["input_ids"][0].tolist() + newline == expected
    supervised = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(supervised) == trace + "<|im_end|>"
    assert batch["mm_token_type_ids"].sum() == 16


def test_a_trained_tokenizer_is_deterministic_and_has_qwens_special_tokens(patients):
    first, again = (train_tokenizer(tokenizer_corpus(patients["a"][:60])) for _ in range(2))
    assert first.get_vocab() == again.get_vocab()
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Häufung 37 %<|im_end|>"
    assert first.decode(first(text).input_ids) == text
    assert all(first.tokenize(token) == [token] for token in SPECIAL_TOKENS)


def test_the_shipped_base_is_small_and_names_no_path_of_the_machine_that_made_it():
    files = [path for path in BASE_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    for path in files:
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert "_name_or_path" not in text and "/home" not in text and "/tmp" not in text and "/work" not in text


def test_the_shipped_base_loads(tokenizer):
    model = AutoModelForImageTextToText.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    stop_ids = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert set(model.generation_config.eos_token_id) == stop_ids
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.chat_template.strip() == CHAT_TEMPLATE.strip()
    processor = AutoImageProcessor.from_pretrained(BASE_FOLDER, backend="pil")
    grid = processor(images=[Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 8, 8]]  # 64 patches, so 64 / 2^2 = 16 visual tokens


def test_the_shipped_base_has_trained_the_tokens_of_every_label(tokenizer):
    """Behind "<solution>" each label begins with one token of its own, as in the corpus."""
    for label in LABELS:
        pieces = tokenizer.tokenize(f"<solution>{label}</solution>")
        assert f">{label.split()[0]}" in pieces
        assert len(tokenizer.tokenize(f", {label}")) <= 3
