"""Protect the rehearsal of a real size: the folder in the hub's form, and how phases are measured.

Run: pytest tests/engine/test_full_size.py
"""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from engine.base_model import load_encoder
from tests.helpers.hub_folder import CONTROL, MODELS, hub_config, hub_key, make_hub_folder
from tests.helpers.repository import ROOT


@pytest.fixture(scope="module")
def full_size():
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    try:
        import full_size
    finally:
        sys.path.pop(0)
    return full_size


# Parameters as the indices on the hub count them: total_size / 2.
@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen2.5-vl-3b", 7_509_245_952 // 2), ("gemma-3-4b", 4_300_079_472)]
)
def test_the_real_shape_has_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        net = AutoModelForImageTextToText.from_config(MODELS[name]())
    net.tie_weights()
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


def test_keys_of_the_hubs_files():
    assert [
        hub_key("qwen2_5_vl", name)
        for name in (
            "model.language_model.layers.0.mlp.up_proj.weight",
            "model.visual.blocks.0.norm1.weight",
        )
    ] == ["model.layers.0.mlp.up_proj.weight", "visual.blocks.0.norm1.weight"]
    assert [
        hub_key("gemma3", name)
        for name in (
            "model.language_model.embed_tokens.weight",
            "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
            "model.multi_modal_projector.mm_soft_emb_norm.weight",
        )
    ] == [
        "language_model.model.embed_tokens.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
        "multi_modal_projector.mm_soft_emb_norm.weight",
    ]


def test_qwens_configuration_is_flat_as_on_the_hub():
    record = hub_config(MODELS["qwen2.5-vl-3b"]())
    assert "text_config" not in record and record["hidden_size"] == 2048
    assert record["rope_scaling"] == {"type": "mrope", "mrope_section": [16, 24, 24]}
    assert (record["model_type"], record["torch_dtype"]) == ("qwen2_5_vl", "bfloat16")


def test_a_small_one_goes_through_a_dry_run(tmp_path, monkeypatch, capsys, full_size):
    make_hub_folder("qwen2.5-vl-3b", tmp_path / "model", 16)
    full_size.write_data(tmp_path)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    files = index["weight_map"]
    assert len(set(files.values())) > 1 and "lm_head.weight" not in files
    with safe_open(tmp_path / "model" / files["model.norm.weight"], "pt") as weights:
        norm = weights.get_tensor("model.norm.weight")
    assert norm.dtype == torch.bfloat16 and norm.tolist() == [1.0] * 128
    encoder = load_encoder(str(tmp_path / "model"), min_visual_tokens=4, max_visual_tokens=4)
    vocabulary = encoder.tokenizer.get_vocab()
    assert {name: vocabulary[name] for name in CONTROL["qwen2_5_vl"]} == CONTROL["qwen2_5_vl"]
    assert len(encoder.tokenizer) == 151_657  # the last control token of ours is 151,656

    argv = full_size.command_of("dry_run", tmp_path, bf16=False, tokens=16, prompt="demo")
    code, measured = full_size.run_stage("dry_run", argv)
    assert code == 0 and measured["forecast"].keys() == {"update", "validation", "evaluation"}
    # 20.5 M parameters in fp32
    assert min(measured["forecast"].values()) > 82e6
    assert measured["seconds"].keys() == {"other", "load"}
    assert "dry run: nothing was trained" in capsys.readouterr().out
    assert "| dry_run | load |" in full_size.table({"dry_run": measured})


def test_phases_within_each_other_are_told_apart(monkeypatch, full_size):
    peaks = iter([100, 110, 300, 150, 120, 0])
    monkeypatch.setattr(full_size.Phases, "_peak", lambda self: next(peaks))
    times = iter([0.0, 1.0, 1.0, 3.0, 3.0, 7.0, 7.0, 15.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    phases = full_size.Phases()  # at 0, 100 held before
    # outer from 1; inner at 3, outer had 2 s and a peak of 300; inner to 7, 4 s and a peak of 150;
    # outer to 15, 8 s more and a peak of 120
    with phases.phase("outer"), phases.phase("inner"):
        pass
    found = phases.record()
    assert found["seconds"] == {"outer": 10.0, "inner": 4.0}
    assert found["peaks"] == {"outer": 200, "inner": 50}
