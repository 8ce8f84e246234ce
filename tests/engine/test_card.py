"""Protect the card of a finished adapter and of a merged model.

Checked: the hub's own parser reads it, its figures are those of the scores, credentialed data is
named, nothing of this machine and no patient is in it, and a card changed by hand stays.

Run: pytest tests/engine/test_card.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from data.files import write_json
from data.prompts import PROMPTS
from engine.bases import base_facts, hub_name, source_of
from engine.card import CARD, card_of, write_merged_card, write_run_card

SHA = "ab" * 32
SCORES: dict[str, Any] = {
    "macro": {"f1": 0.25},
    "micro": {"f1": 0.5},
    "jaccard": 0.375,
    "fail_rate": 0.0625,
    "n": 1200,
    "num_patients": 1100,
    "intervals": {"macro_f1": [0.2, 0.3], "micro_f1": [0.4, 0.6], "jaccard": [0.3, 0.4]},
    "baselines": {"most_frequent": {"macro_f1": 0.05}},
}


def run_folder(tmp_path: Path, base: str = "google/medgemma-4b-it", **more: Any) -> Path:
    """Make a folder that looks like a finished run on MIMIC, with paths and patients around."""
    folder = tmp_path / "run"
    folder.mkdir()
    values = {
        "prompt": "free_reasoning",
        "answer_format": "think_solution",
        "train_file": "/home/alice/secret/patient-10000032.jsonl",
        "output_dir": "/home/alice/runs/x",
        "min_visual_tokens": 256,
        "max_visual_tokens": 512,
        "max_completion_length": 300,
        "lora_r": 16,
    }
    data = {
        "train": {
            "file": "/home/alice/secret/patient-10000032.jsonl",
            "sha256": SHA,
            "datasets": ["mimic"],
            "images": 2000,
            "patients": 1900,
        },
        "nih-test": {"file": "/home/alice/nih.jsonl", "sha256": SHA, "datasets": ["nih"]},
    }
    record = {
        "script": "grpo",
        "recipe": "/home/alice/my.toml",
        "settings": {name: {"value": value} for name, value in values.items()},
        "data": data,
    }
    write_json(folder / "config.json", record | more)
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": base})
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_hub_reads_the_card_and_its_figures_are_the_scores(tmp_path):
    folder = run_folder(tmp_path)
    write_json(folder / "scores-nih-test.json", SCORES)
    write_run_card(folder)
    card = ModelCard.load(folder / CARD)  # raises for a model-index that it cannot read
    data = card.data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "google/medgemma-4b-it",
        "peft",
        "image-text-to-text",
    )
    assert (data.license, data.license_name) == ("other", "health-ai-developer-foundations")
    assert data.datasets == ["mimic", "nih"] and {"lora", "grpo"} <= set(data.tags)
    results = [(one.dataset_name, one.metric_name, one.metric_value) for one in data.eval_results]
    assert results == [
        ("nih-test", "macro-F1 (95 % interval 0.200 to 0.300)", 0.25),
        ("nih-test", "micro-F1 (95 % interval 0.400 to 0.600)", 0.5),
        ("nih-test", "Jaccard index (95 % interval 0.300 to 0.400)", 0.375),
    ]
    assert (
        "| nih-test | 1,200 | 1,100 | 0.250 (0.200 to 0.300) | 0.500 (0.400 to 0.600) | 0.375"
        " (0.300 to 0.400) | 0.062 | 0.050 |" in card.text
    )
    assert f"| trained on | MIMIC-CXR-JPG | 2,000 | 1,900 | `{SHA}` |" in card.text
    assert f"| evaluated: nih-test | NIH ChestX-ray14 | - | - | `{SHA}` |" in card.text


def test_credentialed_data_and_the_limits_are_said(tmp_path):
    text = card_of(run_folder(tmp_path), "google/medgemma-4b-it")
    said = (
        "* MIMIC-CXR-JPG: Credentialed data (PhysioNet",
        "must not be shared with third parties, and that includes online services",
        "Not a medical device.",
        "Health AI Developer Foundations terms of use",
        "MIMIC-CXR among other medical data",
        "hold rows of the data",
    )
    assert [line for line in said if line not in text] == []
    (tmp_path / "demo").mkdir()
    drawn = {"train": {"sha256": SHA, "datasets": ["demo-site-a"]}}
    text = card_of(run_folder(tmp_path / "demo", "demo", data=drawn), "demo")
    assert "Credentialed" not in text and "no patient is in them" in text


def test_an_older_record_still_names_credentialed_data(tmp_path):
    selection = {"pool": {"source": "MIMIC-CXR-JPG train"}}
    folder = run_folder(tmp_path, data={"train": {"sha256": SHA, "selection": selection}})
    assert "Credentialed data (PhysioNet" in card_of(folder, "x/y")


@pytest.mark.parametrize("base", ["/home/alice/models/medgemma-4b-it", "demo", "x/y"])
@pytest.mark.parametrize("merged", [False, True])
def test_nothing_of_this_machine_and_no_patient_is_in_it(tmp_path, base, merged):
    folder = run_folder(tmp_path, base)
    rows = json.dumps({"id": "s1", "patient_id": "10000032"})
    (folder / "predictions-nih-test.jsonl").write_text(rows)
    write_json(folder / "scores-nih-test.json", SCORES | {"run": {"file": "/home/alice/x"}})
    text = card_of(folder, base, merged=merged)
    assert not re.search(r"alice|/home|secret|10000032|my\.toml", text)
    assert str(tmp_path) not in text
    # a local copy is recognised, but not named as a repository of the hub
    assert ("base_model" in front(text)) == (base == "x/y")


def test_without_scores_the_card_says_so(tmp_path):
    folder = run_folder(tmp_path)
    text = card_of(folder, "google/medgemma-4b-it")
    assert "None: no scores lay beside the adapter." in text and "model-index" not in front(text)
    (folder / "config.json").unlink()
    text = card_of(folder, "x/y")
    assert "Not known: the folder has no config.json of a run." in text
    assert front(text)["license"] == "unknown" and "licence is not known here" in text


def test_a_card_that_a_person_changed_stays(tmp_path, capsys):
    folder = run_folder(tmp_path)
    write_run_card(folder)
    first = (folder / CARD).read_text()
    write_json(folder / "scores-nih-test.json", SCORES)
    write_run_card(folder)  # our own: made anew with the scores
    second = (folder / CARD).read_text()
    assert "model-index" in second and "model-index" not in first and capsys.readouterr().err == ""
    (folder / CARD).write_text(second.replace("Research on", "My research on"))
    write_run_card(folder)
    assert "My research on" in (folder / CARD).read_text()
    assert "was changed by hand and stays as it is" in capsys.readouterr().err
    (folder / CARD).write_text("mine")
    write_run_card(folder)
    assert (folder / CARD).read_text() == "mine"


def code_of(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def test_the_code_of_the_card(tmp_path):
    folder = run_folder(tmp_path, "Qwen/Qwen2.5-VL-3B-Instruct")
    text = card_of(folder, "Qwen/Qwen2.5-VL-3B-Instruct")
    code = code_of(text)
    compile(code, "card", "exec")
    names: dict[str, str] = {}
    exec("\n".join(re.findall(r"^[A-Z]+ = .*$", code, re.M)), names)
    prompt = PROMPTS["free_reasoning"]
    assert (names["BASE"], names["SYSTEM"], names["PROMPT"]) == (
        "Qwen/Qwen2.5-VL-3B-Instruct",
        prompt.system,
        prompt.text,
    )
    # 256 and 512 tokens of 28 x 28 pixels
    assert "min_pixels=200704, max_pixels=401408" in code and "max_new_tokens=300" in code
    serve = text.split("```\n")[-2]
    assert serve.startswith("vllm serve Qwen/Qwen2.5-VL-3B-Instruct --host 127.0.0.1")
    assert "--enable-lora --max-lora-rank 16 --lora-modules chest=PATH_OF_THIS_FOLDER" in serve
    assert '--mm-processor-kwargs \'{"min_pixels": 200704, "max_pixels": 401408}\'' in serve
    merged = card_of(folder, "Qwen/Qwen2.5-VL-3B-Instruct", merged=True)
    compile(code_of(merged), "card", "exec")
    assert "peft" not in code_of(merged) and "vllm serve PATH_OF_THIS_FOLDER" in merged
    assert front(merged)["library_name"] == "transformers" and "--enable-lora" not in merged
    # tokens of 32 x 32 pixels
    of_qwen3 = card_of(folder, "Qwen/Qwen3-VL-4B-Instruct")
    assert "min_pixels=262144, max_pixels=524288" in of_qwen3
    assert front(of_qwen3)["license"] == "apache-2.0"
    # Gemma 3 has a fixed number of tokens
    assert "pixels" not in card_of(folder, "google/medgemma-4b-it")


def test_names_cannot_break_the_table_or_the_front_matter(tmp_path):
    folder = run_folder(tmp_path)
    data = {"train": {"sha256": SHA, "datasets": ['my "data": |\n<b>']}}
    record = json.loads((folder / "config.json").read_text()) | {"data": data}
    write_json(folder / "config.json", record)
    text = card_of(folder, 'x/"y: [')
    assert front(text)["datasets"] == ["my-data-b-"]
    [line] = [line for line in text.splitlines() if line.startswith("| trained on")]
    assert line.count("|") == 6 and "<" not in line
    # nor load a picture from elsewhere, nor end the code that holds a hash
    data["train"] = {"sha256": "`x` | y", "datasets": ["![a](http://example.org/a.png)", "`b`"]}
    write_json(folder / "config.json", record | {"data": data})
    [line] = [line for line in card_of(folder, "").splitlines() if line.startswith("| trained on")]
    assert line == "| trained on | ! a (http://example.org/a.png),  b  | - | - | ` x    y` |"


def test_a_merged_model_has_its_adapters_card(tmp_path):
    folder, merged = run_folder(tmp_path), tmp_path / "merged"
    write_json(folder / "scores-nih-test.json", SCORES)
    merged.mkdir()
    write_merged_card(merged, folder, "google/medgemma-4b-it")
    card = ModelCard.load(merged / CARD)
    assert card.data.library_name == "transformers" and len(card.data.eval_results) == 3


# ---- facts ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, title",
    [
        ("google/medgemma-4b-it", "MedGemma"),
        ("/models/medgemma-4b-it/", "MedGemma"),
        ("/c/models--google--medgemma-4b-it/snapshots/0a1b", "MedGemma"),
        ("nvidia/NV-Reason-CXR-3B", "NV-Reason-CXR-3B"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-3B"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None),  # another licence
        ("Qwen/Qwen3-VL-4B-Instruct", "Qwen3-VL"),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", None),  # not trained here
        ("/home/medgemma/other", None),
        ("my/demo", None),
        ("demo", "demo"),
        ("demo-gemma", "demo-gemma"),
    ],
)
def test_bases_are_recognised(name, title):
    facts = base_facts(name)
    assert (facts.title if facts else None) == title


def test_hub_names_of_copies_in_the_cache():
    assert hub_name("/c/models--google--medgemma-4b-it/snapshots/0a1b") == "google/medgemma-4b-it"
    assert hub_name("/models/medgemma-4b-it") is None and hub_name("demo") is None
    # text of adapter_config.json that would end the card's title or its code
    for name in ("owner/name\n---\nlicense: mit", "`owner`/name", "owner/a: b", "owner/a\n"):
        assert hub_name(name) is None


@pytest.mark.parametrize(
    "base, dataset, said",
    [
        ("google/medgemma-4b-it", "mimic", "declared"),
        ("google/medgemma-4b-it", "chexpert", "not among the declared"),
        ("nvidia/NV-Reason-CXR-3B", "chexpert", "possibly exposed"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "mimic", "not declared"),
        ("demo", "demo-site-b", "the same findings and marks, other images of another appearance"),
        ("demo", "my-hospital", "not declared"),
    ],
)
def test_what_a_base_may_have_seen(base, dataset, said):
    facts = base_facts(base)
    assert facts is not None and facts.may_have_seen(dataset).startswith(said)


def test_data_sets_are_recognised_by_the_beginning_of_their_name():
    assert source_of("MIMIC-CXR") is source_of("mimic") is not None
    assert source_of("other") is None
