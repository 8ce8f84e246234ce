"""Protects the forecast of several GPUs: published sizes of models whose weights are not here,
adapters, what is held and what travels, against numbers of another program, and the dry run of a
folder without weights.

Those numbers were computed by a script of its own from the sizes of the decoders alone:
projections, embedding and head, and a rounded vision tower. Norms and biases are left out there, so
bases differ by up to half a percent. Run: pytest tests/engine/test_ranks_forecast.py
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engine.memory import (
    GIB,
    ModelShape,
    Workload,
    forecast,
    kv_cache,
    lora_parameters,
    model_shape,
    static_parts,
)
from engine.ranks_forecast import gathered_bytes, ranks_table, summed_bytes
from engine.workload import shape_of
from tests.helpers.hub_folder import hub_config
from tests.helpers.real_configs import gemma3, qwen2_5_vl
from tests.helpers.runs import grpo_flags, sft_flags, snapshot

CONFIGS = {
    "MedGemma-4B": lambda: gemma3("4B"),
    "MedGemma-27B": lambda: gemma3("27B"),
    "Qwen2.5-VL-7B": lambda: qwen2_5_vl("7B"),
    "Qwen2.5-VL-32B": lambda: qwen2_5_vl("32B"),
    "Qwen2.5-VL-72B": lambda: qwen2_5_vl("72B"),
}
# Half of the bytes that the files of the hub have, in bf16.
PARAMETERS = {
    "MedGemma-4B": 4_300_079_472,
    "MedGemma-27B": 27_432_406_640,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen2.5-VL-32B": 33_452_718_336,
    "Qwen2.5-VL-72B": 73_410_777_344,
}
# GRPO of 8 prompts x 4 completions of at most 512 tokens a GPU and step, prompts of 300 tokens
# beside the image.
WORK = Workload(
    element_size=2,
    device="cuda",
    lora_r=16,
    lora_dropout=0.0,
    adapters=2,
    gradient_checkpointing=True,
    prompt_length=556,
    image_tokens=256,
    completion_length=512,
    max_completion_length=512,
    micro_batch=32,
    eval_rows=8,
    rollout_prompts=8,
    num_generations=4,
    max_tokens_per_forward=8192,
)


def shape(name: str) -> ModelShape:
    return model_shape(CONFIGS[name](), PARAMETERS[name])


# ---- numbers of another program ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "adapter", "ring", "gathered"),
    [  # millions of numbers, MB that each of 8 GPUs sends a step, GB that it gets to sample
        ("MedGemma-4B", 29.8, 209, 5.6),
        ("MedGemma-27B", 113.5, 795, 44.8),
        ("Qwen2.5-VL-7B", 40.4, 283, 11.4),
        ("Qwen2.5-VL-32B", 134.2, 940, 54.6),
        ("Qwen2.5-VL-72B", 210.5, 1474, 122.9),
    ],
)
def test_what_travels(name, adapter, ring, gathered):
    assert round(lora_parameters(shape(name), 16) / 1e6, 1) == adapter
    assert round(summed_bytes(shape(name), 16, 8) / 1e6) == ring
    assert summed_bytes(shape(name), 16, 1) == 0
    assert round(gathered_bytes(shape(name), 2, 8) / 1e9, 1) == gathered
    assert gathered_bytes(shape(name), 2, 1) == 0


def test_the_sum_over_64_gpus_by_hand():
    # 2 x 63 / 64 of 4 bytes x 113,516,544
    assert summed_bytes(shape("MedGemma-27B"), 16, 64) == 126 * 4 * 113_516_544 // 64


@pytest.mark.parametrize(
    ("name", "whole", "sharded", "image", "cache"),
    [  # GB: base, policy, reference, gradients and AdamW; the same in 8 shards; tokens; KV cache
        ("MedGemma-4B", 9.2, 4.1, 256, 2.9),
        ("MedGemma-27B", 57.1, 14.8, 256, 10.6),
        ("Qwen2.5-VL-7B", 17.4, 7.4, 384, 1.3),
        ("Qwen2.5-VL-32B", 69.6, 17.9, 384, 5.7),
        ("Qwen2.5-VL-72B", 151.0, 33.4, 384, 7.2),
    ],
)
def test_what_a_gpu_holds(name, whole, sharded, image, cache):
    of, gradients = shape(name), 4 * lora_parameters(shape(name), 16)

    def held(shards: int) -> float:
        work = replace(WORK, shards=shards)
        parts = static_parts(of, work)
        gathered = forecast(of, work).phases["update"].get("gathered", 0)
        return (sum(parts.values()) + gradients + gathered) / 1e9

    assert held(1) == pytest.approx(whole, rel=0.006)
    # three layers are gathered at a time there as well; norms and biases are not sharded here
    assert held(8) == pytest.approx(sharded, rel=0.006, abs=0.06)
    # 8 prompts, and 32 completions of 512 tokens
    of_prompts = kv_cache(of, WORK, 8, 300 + image)
    assert (of_prompts + kv_cache(of, WORK, 32, 512)) / 1e9 == pytest.approx(cache, abs=0.06)


def test_shards_by_hand():
    """A decoder of 2 layers: 10 x (2 x 6 + 2 x 4 + 3 x 20) = 800 numbers each, 900 outside."""
    small = ModelShape(
        2500, 10, 2, 3, 2, 2, 20, 50, 2, False, None, False, 8, 16, 4, 12, extra_features=0
    )
    work = replace(WORK, lora_r=1, shards=4)
    assert static_parts(small, replace(work, shards=1))["base"] == 2 * 2500
    assert static_parts(small, work)["base"] == 2 * (900 + 1600 // 4)
    phases = forecast(small, work).phases
    # there are no 3 layers to gather, and all are to sample
    assert {name: parts["gathered"] for name, parts in phases.items()} == {
        "rollout": 2 * 1600,
        "scoring": 2 * 1600,
        "update": 2 * 1600,
        "evaluation": 2 * 1600,
    }
    deep = replace(small, layers=10, base_parameters=8900)
    phases = forecast(deep, work).phases
    assert phases["update"]["gathered"] == phases["scoring"]["gathered"] == 2 * 3 * 800
    assert phases["rollout"]["gathered"] == phases["evaluation"]["gathered"] == 2 * 8000
    assert "gathered" not in forecast(deep, replace(work, shards=1)).phases["rollout"]


# ---- the table -----------------------------------------------------------------------------------
def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines() if re.match(r" +\d+ ", line)]


def test_the_table_of_medgemma_27b():
    found = forecast(shape("MedGemma-27B"), WORK).phases
    learning, sampling = (
        f"{max(sum(found[name].values()) for name in names) / GIB:.1f}"
        for names in (("scoring", "update"), ("rollout", "evaluation"))
    )
    # while it learns 72.03 GiB with what rollouts keep: just more than 90 % of 80
    whole = [learning, sampling, "no", "no", "no", "yes"]
    one, eight, sharded, many, _ = rows(
        ranks_table(shape("MedGemma-27B"), WORK, 32, evaluates=True)
    )
    assert one == ["1", "whole", "32", *whole, "0.000", "0.00"]
    assert eight == ["8", "whole", "256", *whole, "0.795", "0.00"]
    assert many == ["64", "whole", "2048", *whole, "0.894", "0.00"]
    assert sharded[:4] == ["8", "8", "shards", "256"] and sharded[-2:] == ["0.795", "44.80"]
    # to sample, a GPU has the whole base beside its shards: 44.80 x 8 / 7 / 8 GB more
    more = float(sharded[5]) - float(sampling)
    assert more == pytest.approx(44.8 / 7 * 1e9 / GIB, abs=0.11)


def test_only_a_72b_needs_shards_and_more_to_sample():
    def fits(name: str, **changed) -> dict[str, list[str]]:
        table = ranks_table(shape(name), replace(WORK, **changed), 32, evaluates=False)
        return {" ".join(row[:-9]): row[-6:-2] for row in rows(table)}

    no = ["no"] * 4
    grpo = fits("Qwen2.5-VL-72B")
    assert grpo["8 whole"] == grpo["8 8 shards"] == no
    # what learns alone, as SFT does until it scores its result
    sft = fits("Qwen2.5-VL-72B", rollout_prompts=0, adapters=1, micro_batch=1, eval_rows=1)
    assert sft["64 whole"] == no and sft["64 8 shards"] == ["no", "yes", "yes", "yes"]
    assert fits("Qwen2.5-VL-32B")["8 whole"] == ["no", "no", "no", "yes"]
    table = ranks_table(
        shape("Qwen2.5-VL-7B"), replace(WORK, rollout_prompts=0), 8, evaluates=False
    )
    assert all(row[-7] == "-" for row in rows(table))


# ---- folders without weights ---------------------------------------------------------------------
@pytest.mark.parametrize("name", ["MedGemma-27B", "Qwen2.5-VL-32B", "Qwen2.5-VL-72B"])
def test_sizes_are_read_from_config_json_alone(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hub_config(CONFIGS[name]())))
    assert shape_of(str(tmp_path)) == shape(name)


def described(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint without its weights."""
    return Path(shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_dry_run_without_weights(family, tiny_checkpoint, tiny_data, tmp_path, capsys):
    import run_grpo
    import run_sft

    model = described(tiny_checkpoint(family), tmp_path / "model")
    before = snapshot(tmp_path)
    sets = ("--validation_file", f"site={tiny_data}", "--dry_run")
    assert run_sft.main(sft_flags(model, tiny_data, tmp_path / "run", *sets)) == 0
    shown = capsys.readouterr().out
    assert f"dry run of {model}, whose folder holds no weights: all of this is arithmetic" in shown
    assert "1 sequences x 8 accumulated = 8 an optimizer step" in shown
    assert "checked     12 of 12 training rows and 24 of 24 to evaluate" in shown
    assert [row[:2] for row in rows(shown)[-5:]] == [
        ["1", "whole"],
        ["8", "whole"],
        ["8", "8"],
        ["64", "whole"],
        ["64", "8"],
    ]
    fresh = ("--model_name_or_path", str(model), "--prompt", "demo", *sets)
    argv = grpo_flags(Path("none"), tiny_data, tmp_path / "run", *fresh)
    assert run_grpo.main(argv) == 0
    shown = capsys.readouterr().out
    assert "2 prompts x 4 completions = 8 completions" in shown and "holds no weights" in shown
    assert re.search(r"^  \s+rollout\s+scoring\s+update\s+evaluation$", shown, re.MULTILINE)
    # without sets nothing is evaluated
    assert run_grpo.main([*argv[: argv.index("--validation_file")], "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  \s+rollout\s+scoring\s+update$", shown, re.MULTILINE)
    assert snapshot(tmp_path) == before


def test_weights_that_are_not_whole_are_no_description(tiny_checkpoint, tiny_data, tmp_path):
    """A folder that lost its weights is refused as ever, and a damaged one in a dry run too."""
    import run_sft

    model = described(tiny_checkpoint("qwen2_5_vl"), tmp_path / "model")
    with pytest.raises(ValueError, match="the folder holds no weights"):
        run_sft.main(sft_flags(model, tiny_data, tmp_path / "run"))
    (model / "model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="the folder holds no weights"):
        run_sft.main(sft_flags(model, tiny_data, tmp_path / "run", "--dry_run"))
