"""Protect the embedded default.

Checked: pictures that show their labels, two hospitals that differ, traces that parse, splits that
cannot overlap, and base checkpoints of both families that have seen what fine-tuning needs and
load.

    python -m pytest tests/data/test_demo_data.py
"""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from data.demo import build_base, splits
from data.demo.anatomy import IMAGE_SIZE
from data.demo.base_families import BASE_FAMILIES
from data.demo.build_base import (
    Encoder,
    LocationHeads,
    Pictures,
    pretrain_all,
    pretrain_vision,
    sample_task,
    tokenizer_corpus,
    visual_tokens,
)
from data.demo.radiographs import draw, draw_findings, mark_cells, sample
from data.demo.sites import MARKS, SITES
from data.demo.splits import SPLITS, WRITTEN_SPLITS, draw_split, seeds, write_split
from data.demo.teacher import reasoning_trace
from data.examples import Example
from data.labels import LABELS, NIH_NINE, NO_FINDING, SUPPORT_DEVICES
from data.prompts import PROMPTS
from engine import encode

DRAWN_LABELS = [label for label in LABELS if label != NO_FINDING]


@pytest.fixture(scope="module", params=list(BASE_FAMILIES))
def family(request):
    return BASE_FAMILIES[request.param]


@pytest.fixture(scope="module")
def tokenizer(family):
    """Load the tokenizer that is shipped."""
    return AutoTokenizer.from_pretrained(family.folder)


@pytest.fixture(scope="module")
def patients():
    """Draw 150 pictures of each site, by site.

    They are drawn once, because drawing is what these tests spend their time on.
    """
    return {site: [draw(seed, site) for seed in range(150)] for site in "ab"}


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", list(SITES))
def test_a_seed_and_a_site_fix_the_picture(site):
    first, again, other = draw(11, site), draw(11, site), draw(12, site)
    assert np.array_equal(first.image, again.image)
    assert (first.findings, first.locations) == (again.findings, again.locations)
    assert (first.findings, first.marks) == (again.findings, again.marks)
    assert np.array_equal(first.grid, again.grid)
    assert not np.array_equal(first.image, other.image)
    assert first.image.dtype == np.uint8 and first.image.shape == (112, 112)
    for one, other in itertools.combinations(SITES, 2):
        assert not np.array_equal(
            draw_findings((), 11, one).image, draw_findings((), 11, other).image
        )


@pytest.mark.parametrize("site", ["a", "b"])
@pytest.mark.parametrize("label", DRAWN_LABELS)
def test_each_finding_can_be_seen_where_the_grid_says(label, site):
    for seed in range(8):
        with_finding, without = draw_findings((label,), seed, site), draw_findings((), seed, site)
        cells = with_finding.grid[LABELS.index(label)]
        change = np.abs(with_finding.image.astype(float) - without.image.astype(float))
        inside = np.kron(cells, np.ones((28, 28), dtype=bool))  # a cell is 112 / 4 = 28 pixels wide
        # The same patient under the same noise: any change is the finding. A nodule is small, so
        # its cells change little on average; where it is strongest, each finding stands out by the
        # noise's deviation, 3 (site a) to 11 (site b). Labels that a mark goes with are subtle at
        # site a: 0.1 to 0.35 of what is drawn.
        plain = 0.2 if label in SITES[site].subtle else 1.0
        assert change[inside].mean() > plain * 1.0
        assert np.percentile(change[inside], 99) > plain * 11.0
        assert change[inside].mean() > 5 * change[~inside].mean()
        assert not with_finding.grid[
            [LABELS.index(other) for other in LABELS if other != label]
        ].any()


def test_findings_are_independent_of_each_other():
    alone, together = (
        draw_findings(("Fracture",), 5, "a"),
        draw_findings(("Edema", "Fracture", "Lung Lesion"), 5, "a"),
    )
    assert together.locations["Fracture"] == alone.locations["Fracture"]
    assert np.array_equal(
        together.grid[LABELS.index("Fracture")], alone.grid[LABELS.index("Fracture")]
    )


def test_no_finding_means_nothing_but_devices(patients):
    assert draw_findings((), 1, "a").findings == (NO_FINDING,)
    assert draw_findings((NO_FINDING, "Edema"), 1, "a").findings == ("Edema",)
    assert draw_findings((SUPPORT_DEVICES,), 1, "a").findings == (NO_FINDING, SUPPORT_DEVICES)
    assert draw_findings((SUPPORT_DEVICES, "Edema"), 1, "a").findings == ("Edema", SUPPORT_DEVICES)
    for radiograph in patients["a"] + patients["b"]:
        assert (NO_FINDING in radiograph.findings) == set(radiograph.findings).issubset(
            {NO_FINDING, SUPPORT_DEVICES}
        )


def test_unknown_sites_and_labels_are_refused():
    with pytest.raises(ValueError, match="no such site: 'c'"):
        draw_findings((), 1, "c")
    with pytest.raises(ValueError, match="Nodule"):
        draw_findings(("Nodule",), 1, "a")


def test_the_sites_differ_in_contrast_and_prevalence(patients):
    a, b = patients["a"], patients["b"]
    middle = slice(30, 82)  # lungs and heart, clear of site b's collimation and marker
    contrast_a, contrast_b = (
        np.mean([r.image[middle, middle].std() for r in site]) for site in (a, b)
    )
    brightness_a, brightness_b = (
        np.mean([r.image[middle, middle].mean() for r in site]) for site in (a, b)
    )
    assert contrast_b < 0.85 * contrast_a
    assert abs(brightness_a - brightness_b) > 5.0
    # Every label is drawn at both sites; lesions are commoner at b (0.22 against 0.13), devices at
    # a (0.28 against 0.12).
    share_a, share_b = (
        {label: np.mean([label in r.findings for r in site]) for label in LABELS} for site in (a, b)
    )
    assert min(*share_a.values(), *share_b.values()) > 0.0
    assert (
        share_b["Lung Lesion"] > share_a["Lung Lesion"]
        and share_a[SUPPORT_DEVICES] > share_b[SUPPORT_DEVICES]
    )


# --------------------------------------------------------------------------------------------------


def shares_and_phi(site: str, mark: str) -> tuple[float, float, float]:
    """Measure on 6,000 samples -> (share of the mark's label, share of the mark, their phi)."""
    drawn = [sample(seed, site) for seed in range(6000)]
    label = np.array([MARKS[mark] in findings for findings, _ in drawn], dtype=float)
    marked = np.array([mark in marks for _, marks in drawn], dtype=float)
    return label.mean(), marked.mean(), np.corrcoef(label, marked)[0, 1]


@pytest.mark.parametrize("mark", list(MARKS))
def test_a_mark_goes_with_its_label_at_site_a_says_nothing_in_a2_and_is_reversed_at_b(mark):
    """By hand, with p = P(label), and q, r the mark's rates with and without it:

    P(mark) = p q + (1-p) r and phi = p (1-p) (q-r) / sqrt(p (1-p) P(mark) (1-P(mark))).

    Of the patients of site a 0.78 are not healthy, and 0.36 of those have the label: p = 0.28. With
    q = 0.94, r = 0.03: P(mark) = 0.264 + 0.022 = 0.286, sqrt(0.2016 x 0.2042) = 0.203, so phi =
    0.183 / 0.203 = 0.90. At b 0.70 are not healthy. Edema: p = 0.7 x 0.07 = 0.05, and with q =
    0.03, r = 0.94: P(mark) = 0.0015 + 0.893 = 0.895, sqrt(0.0475 x 0.0940) = 0.0668, so phi =
    -0.0432 / 0.0668 = -0.65. Pneumothorax: p = 0.7 x 0.16 = 0.11, P(mark) = 0.840, sqrt(0.0979 x
    0.1344) = 0.1147, phi = -0.0891 / 0.1147 = -0.78. The cap of four abnormalities takes a little
    off p.
    """
    label, marked, phi = shares_and_phi("a", mark)
    assert label == pytest.approx(0.28, abs=0.02)
    assert marked == pytest.approx(0.28, abs=0.02)
    assert phi == pytest.approx(0.90, abs=0.02)
    other_label, other_marked, other_phi = shares_and_phi("a2", mark)
    assert other_label == pytest.approx(label, abs=0.025)  # three standard errors of a difference
    assert other_marked == pytest.approx(marked, abs=0.025)
    assert abs(other_phi) < 0.04  # three standard errors: 3 / sqrt(6000)
    assert abs(shares_and_phi("general", mark)[2]) < 0.04
    expected = {"PORT": -0.65, "EXP": -0.78}[mark]
    assert shares_and_phi("b", mark)[2] == pytest.approx(expected, abs=0.05)


def test_a_and_a2_differ_in_the_marks_alone():
    assert replace(SITES["a2"], marks=SITES["a"].marks, stream=SITES["a"].stream) == SITES["a"]


@pytest.mark.parametrize("site", list(SITES))
def test_a_mark_changes_its_box_and_nothing_else(site):
    for mark in MARKS:
        plain, marked = (draw_findings(("Edema",), 7, site, marks) for marks in ((), (mark,)))
        assert marked.marks == (mark,) and marked.findings == plain.findings
        changed = np.argwhere(marked.image != plain.image)
        (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
        # letters of 6 x 10 pixels, two apart, in a margin of two, ten pixels from an edge
        assert bottom - top <= 13 and right - left <= 8 * len(mark) + 1
        inside = marked.image[top : bottom + 1, left : right + 1]
        assert inside.min() < 20 and inside.max() > 240  # letters that no exposure dims
        cells = np.kron(mark_cells(mark), np.ones((28, 28), dtype=bool))
        # EXP reaches two pixels into a second cell
        assert (marked.image != plain.image)[cells].sum() > 0.9 * len(changed)


# --------------------------------------------------------------------------------------------------


def test_site_a_labels_all_fourteen():
    radiograph = draw_findings(("Fracture", "Pleural Effusion", SUPPORT_DEVICES), 3, "a")
    assert (
        radiograph.source_labels
        == radiograph.labels
        == ("Pleural Effusion", "Fracture", SUPPORT_DEVICES)
    )
    assert radiograph.evaluated_labels == LABELS


@pytest.mark.parametrize(
    ("drawn", "source_labels", "labels"),
    [
        ((), ("No Finding",), ("No Finding",)),
        # never written down at b, so its reader saw nothing
        (("Fracture",), ("No Finding",), ("No Finding",)),
        (("Enlarged Cardiomediastinum", SUPPORT_DEVICES), ("No Finding",), ("No Finding",)),
        # written down, but not among the nine: no label, and not No Finding
        (("Pleural Effusion",), ("Effusion",), ()),
        (("Lung Opacity",), ("Infiltration",), ()),
        (("Pleural Other", "Fracture"), ("Pleural_Thickening",), ("Pleural Other",)),
        (
            ("Pleural Effusion", "Edema", "Cardiomegaly"),
            ("Cardiomegaly", "Edema", "Effusion"),
            ("Cardiomegaly", "Edema"),
        ),
    ],
)
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


# --------------------------------------------------------------------------------------------------


def test_traces_are_valid_answers_with_the_drawn_labels(patients):
    for radiograph in patients["a"] + patients["b"]:
        trace = reasoning_trace(radiograph, 0)
        think, solution = (
            trace.removeprefix("<think>").removesuffix("</solution>").split("</think><solution>")
        )
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
    lengths = [
        len(tokenizer(reasoning_trace(radiograph, 0)).input_ids) + 1 for radiograph in patients["a"]
    ]
    assert 20 <= np.mean(lengths) <= 45 and max(lengths) < 80


# --------------------------------------------------------------------------------------------------


def test_seeds_of_different_splits_never_meet():
    largest = {name: seeds(name, 1_000_000) for name in SPLITS}
    for one, other in itertools.combinations(largest.values(), 2):
        assert one.stop <= other.start or other.stop <= one.start
    with pytest.raises(ValueError, match="rl-train.*1000001"):
        seeds("rl-train", 1_000_001)
    with pytest.raises(ValueError, match="no such split: 'test'.*test-a"):
        seeds("test")
    assert not [name for name in WRITTEN_SPLITS if name.startswith("base")]
    # those of generator version 1 ended with 15,000,000: none of its pictures is drawn again
    assert min(block.start for block in largest.values()) > 15_000_000


@pytest.mark.parametrize("name", ["sft-train", "validation-b"])
def test_written_rows_hold_to_the_data_file_contract(tmp_path, name):
    data_file = write_split(name, 12, tmp_path)
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    assert data_file == tmp_path / f"{name}.jsonl" and len(rows) == 12
    assert len({row["id"] for row in rows}) == len({row["patient_id"] for row in rows}) == 12
    for row, radiograph in zip(rows, draw_split(name, 12), strict=True):
        assert row["image"] == f"{name}/{row['id']}.png"
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["image"])), radiograph.image)
        assert row["labels"] == list(radiograph.labels) and row["source_labels"] == list(
            radiograph.source_labels
        )
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
    data_file.write_text(data_file.read_text().replace('"image"', '"\u2028": 1, "image"'))
    write_split("rl-train", 3, tmp_path)
    assert image.stat().st_mtime == 1  # reused: this character ends no row
    monkeypatch.setattr(splits, "GENERATOR_VERSION", "another")
    write_split("rl-train", 3, tmp_path)
    assert image.stat().st_mtime > 1  # drawn again: another generator
    image.unlink()
    write_split("rl-train", 3, tmp_path)
    assert image.exists()  # drawn again: a picture was missing
    # drawn again: another count
    assert len(write_split("rl-train", 5, tmp_path).read_text().splitlines()) == 5
    assert data_file.exists()


def test_an_interrupted_redraw_leaves_no_data_file(tmp_path, monkeypatch):
    """Its rows would describe pictures that have been replaced."""
    data_file = write_split("rl-train", 3, tmp_path)
    monkeypatch.setattr(splits, "draw", lambda seed, site: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_split("rl-train", 4, tmp_path)
    assert not data_file.exists()


# --------------------------------------------------------------------------------------------------


def test_pixel_inputs_equal_the_image_processors(family):
    images = np.stack([draw(seed, "b").image for seed in range(2)])
    made = family.pixel_inputs(images)
    expected = family.image_processor()(
        images=[Image.fromarray(image) for image in images], return_tensors="pt"
    )
    assert set(made) <= set(expected)
    for name in made:
        torch.testing.assert_close(made[name], torch.as_tensor(expected[name]), rtol=0, atol=1e-6)


def test_the_base_is_never_taught_the_demo_task(patients):
    """Its questions are others, and none of its answers has several labels in tags."""
    rng = np.random.default_rng(0)
    for radiograph in patients["a"]:
        for task in ("caption", "impression", "choice", "presence", "film"):
            question, answer = sample_task(radiograph, task, rng)
            assert question not in {prompt.text for prompt in PROMPTS.values()}
            solution = answer.partition("<solution>")[2].removesuffix("</solution>")
            assert solution in {"", "yes", "no", *radiograph.findings}


def test_readings_name_the_film_where_it_is_marked_and_only_there(patients):
    """First of all, as reports do: in the base's tasks and in the teacher's traces."""
    film = re.compile(
        "^(portable|taken at the bedside|expiratory|taken in expiration)", re.IGNORECASE
    )
    rng = np.random.default_rng(0)
    for radiograph in patients["a"]:
        trace = reasoning_trace(radiograph, 0).removeprefix("<think>")
        said = sample_task(radiograph, "film", rng)[1]
        for text in (sample_task(radiograph, "caption", rng)[1], trace, said):
            assert bool(film.search(text)) == bool(radiograph.marks)
        assert (said == "Nothing.") == (not radiograph.marks)


def test_the_base_has_seen_neither_site():
    names = [name for name in SPLITS if name.startswith("base")]
    assert [SPLITS[name].site for name in names] == ["general", "general"]
    marks = SITES["general"].marks
    assert marks.with_label == marks.without


def test_the_base_sees_every_label_behind_a_tag_and_behind_a_comma(patients):
    rng = np.random.default_rng(0)
    answers = [
        sample_task(r, task, rng)[1] for r in patients["a"] for task in ("choice", "impression")
    ]
    for label in LABELS:
        assert any(f"<solution>{label}</solution>" in answer for answer in answers)
        # No Finding and Enlarged Cardiomediastinum can only begin a list in CheXpert's order
        if label not in LABELS[:2]:
            assert any(f", {label}" in answer for answer in answers)


@pytest.fixture(scope="module")
def fresh(family, patients):
    """Make a tokenizer and a random model of each family from a small corpus, as the build does."""
    tokenizer = family.train_tokenizer(tokenizer_corpus(patients["a"], family.chat_words))
    torch.manual_seed(0)
    return tokenizer, family.build_model(tokenizer)


def test_the_build_and_the_engine_encode_alike(family, fresh, tmp_path):
    """Training puts prompt and answer together as ids: they must be those of the engine, which puts
    the text together first.
    """
    tokenizer, model = fresh
    for part in (tokenizer, model.config, family.image_processor()):
        part.save_pretrained(tmp_path)
    Image.new("L", (IMAGE_SIZE, IMAGE_SIZE)).save(tmp_path / "x.png")
    trace = "<think>Enlarged heart.</think><solution>Cardiomegaly, Edema</solution>"
    example = Example("x", "p", "x.png", ("Edema",), "demo", tmp_path)
    row = encode.Encoder.from_pretrained(
        tmp_path, min_visual_tokens=16, max_visual_tokens=16
    ).encode_answer(example, PROMPTS["demo"], trace)
    batch = Encoder(family, tokenizer).batch(
        np.zeros((1, IMAGE_SIZE, IMAGE_SIZE), np.uint8), [PROMPTS["demo"].text], [trace]
    )
    assert (
        batch["input_ids"][0].tolist()
        == row.prompt.input_ids.tolist() + row.completion_ids.tolist()
    )
    assert batch[family.token_types_name][0].tolist() == row.prompt.token_types.tolist() + [
        0
    ] * len(row.completion_ids)
    supervised = batch["labels"][0][batch["labels"][0] != -100]
    assert supervised.tolist() == row.completion_ids.tolist()
    assert tokenizer.decode(supervised) == trace + family.end_of_turn
    assert batch[family.token_types_name].sum() == 16
    for name, tensor in row.prompt.vision.items():
        torch.testing.assert_close(batch[name], tensor, rtol=0, atol=1e-6)


def test_a_trained_tokenizer_is_deterministic_and_has_its_familys_special_tokens(family, patients):
    first, again = (
        family.train_tokenizer(tokenizer_corpus(patients["a"][:60], family.chat_words))
        for _ in range(2)
    )
    assert first.get_vocab() == again.get_vocab()
    text = f"user\n\n{family.image_token}H\u00e4ufung  37 %{family.end_of_turn}"
    assert first.decode(first(text, add_special_tokens=False).input_ids) == text
    assert all(first.tokenize(token) == [token] for token in family.special_tokens)


@pytest.fixture(scope="module")
def gemma_tokenizer(patients):
    return BASE_FAMILIES["gemma3"].train_tokenizer(
        tokenizer_corpus(patients["a"], BASE_FAMILIES["gemma3"].chat_words)
    )


def test_some_of_gemmas_layers_see_only_part_of_the_prompt(gemma_tokenizer):
    """A window that held the whole prompt would never act; without a full layer no answer would see
    the image.
    """
    family = BASE_FAMILIES["gemma3"]
    text = family.build_model(gemma_tokenizer).config.get_text_config()
    assert set(text.layer_types) == {"sliding_attention", "full_attention"}
    assert (
        text.sliding_window
        < len(Encoder(family, gemma_tokenizer).prompt_ids(PROMPTS["demo"].text)) / 2
    )


def test_gemmas_tokens_do_not_cross_the_borders_of_words(gemma_tokenizer):
    """Its merges run over whole texts; none may join a tag with a label, or a label would be other
    tokens behind a tag.
    """
    family, tokenizer = BASE_FAMILIES["gemma3"], gemma_tokenizer
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    for token in tokenizer.get_vocab().keys() - {
        *family.special_tokens,
        *(f"<0x{byte:02X}>" for byte in range(256)),
    }:
        word = token.removeprefix(space)
        assert space not in word and (
            word.isalpha() or not any(map(str.isalnum, word)) or len(word) == 1
        ), token


def test_a_picture_reaches_the_loss_and_both_stages_train(family, fresh, patients, monkeypatch):
    tokenizer, model = fresh
    for name, value in (("BATCH_SIZE", 4), ("VISION_STEPS", 1), ("ALL_STEPS", 1)):
        monkeypatch.setattr(build_base, name, value)
    pictures = Pictures.of(patients["a"][:8])
    tokens = visual_tokens(family, model, pictures.images)
    assert tokens.shape == (8, 16, 160) and tokens.std(dim=0).max() > 0.01
    heads, encoder = LocationHeads(), Encoder(family, tokenizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def moved() -> set[str]:
        return {
            name
            for name, parameter in model.named_parameters()
            if not torch.equal(parameter, before[name])
        }

    language = {name for name in before if "language_model." in name}
    pretrain_vision(family, model, heads, pictures)
    assert moved() == before.keys() - language
    pretrain_all(model, heads, pictures, encoder)
    assert len(moved() & language) > 0.9 * len(language)


def test_the_shipped_base_is_small_and_names_no_path_of_the_machine_that_made_it(family):
    files = [path for path in family.folder.rglob("*") if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) <= 6_000_000
    for path in files:
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert (
                "_name_or_path" not in text
                and str(Path.home()) not in text
                and not re.search(r'"/\w+/', text)
            )


def test_the_shipped_base_loads(family, tokenizer):
    model = AutoModelForImageTextToText.from_pretrained(family.folder, dtype=torch.float32)
    assert type(model) is type(family.build_model(tokenizer))
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids(family.image_token)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    stop_ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(family.end_of_turn)}
    # Qwen's <|endoftext|> is both
    stop_ids |= {tokenizer.pad_token_id} if family is BASE_FAMILIES["qwen2_5_vl"] else set()
    assert set(model.generation_config.eos_token_id) == stop_ids
    assert tokenizer.chat_template.strip() == family.chat_template.strip()
    processor = AutoImageProcessor.from_pretrained(family.folder, backend="pil")
    pixels = processor(images=[Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))], return_tensors="pt")
    expected = family.pixel_inputs(np.zeros((1, IMAGE_SIZE, IMAGE_SIZE), np.uint8))
    for name, tensor in expected.items():
        torch.testing.assert_close(torch.as_tensor(pixels[name]), tensor, rtol=0, atol=1e-6)


def test_the_shipped_base_has_trained_the_tokens_of_every_label(family, tokenizer):
    """Behind "<solution>" each label begins with a token of its own, as in the corpus: Qwen's glues
    ">" to its first word.
    """
    glued = ">" if family is BASE_FAMILIES["qwen2_5_vl"] else ""
    for label in LABELS:
        pieces = tokenizer.tokenize(f"<solution>{label}</solution>")
        assert f"{glued}{label.split()[0]}" in pieces
        assert len(tokenizer.tokenize(f", {label}")) <= 3
