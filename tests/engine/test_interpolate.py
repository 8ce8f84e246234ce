"""Protect adapters between two others: plain peft gives the logits of interpolated full weights.

The oracle is plain peft, which folds each of the two adapters into a copy of the base. The full
weights of both are then averaged here, so no formula of the product is in it. Refused in one line
is whatever the sum would not be exact for.

Run: pytest tests/engine/test_interpolate.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import engine.interpolate
from engine.merge import main
from engine.model_files import ADAPTER_FILES
from eval.evaluate import main as evaluate
from eval.matrix import main as matrix
from tests.helpers.adapters import KINDS, change_settings, make_adapter, write_adapter
from tests.helpers.runs import grpo, record, snapshot, speak
from tests.helpers.tiny import SHORT, examples_of, load, pixel_inputs

FAMILIES = ["qwen2_5_vl", "gemma3"]
BOUND = 1e-5  # of a logit; sums in another order give about 1e-6
SHARES = ("0", "0.25", "0.5", "1")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    torch.set_num_threads(1)
    return request.param


def between(first: Path, second: Path, place: Path, *shares: str) -> Path:
    """Write the adapters of some shares, by the command."""
    flags = ["--interpolate", str(first), str(second), "--alpha", *shares]
    assert main([*flags, "--output_dir", str(place)]) == 0
    return place


def plain(checkpoint: Path) -> torch.nn.Module:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval()


def whole_weights(checkpoint: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Fold an adapter into the base with plain peft -> every weight, fp32."""
    net = PeftModel.from_pretrained(plain(checkpoint), adapter)
    return {name: one.clone() for name, one in net.merge_and_unload().state_dict().items()}


@torch.no_grad()
def logits(net: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return net(**inputs).logits


@pytest.fixture(scope="module")
def inputs(family, tiny_checkpoint, tiny_images) -> dict[str, torch.Tensor]:
    """Gather what transformers' own forward takes for one prompt with its image."""
    model = load(tiny_checkpoint(family))
    prompt = model.encoder.encode_prompt(examples_of(tiny_images, 56)[0], SHORT)
    types = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
    return {
        "input_ids": prompt.input_ids[None],
        "attention_mask": torch.ones_like(prompt.input_ids)[None],
        types: prompt.token_types[None],
        **pixel_inputs([prompt]),
    }


# ---- exact ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("decoder", "rank_pattern"),  # other ranks and alphas, by module
        ("attention only", "suffix list"),  # modules that only one of them has, vision too
        ("rsLoRA", "decoder"),  # scales by sqrt(rank) and by rank
    ],
)
def test_plain_peft_gives_the_logits_of_interpolated_weights(
    family, first, second, tiny_checkpoint, inputs, tmp_path
):
    base = tiny_checkpoint(family)
    one = make_adapter(tmp_path / "one", base, seed=1, **KINDS[first])
    other = make_adapter(tmp_path / "other", base, seed=2, r=3, lora_alpha=5, **KINDS[second])
    made = between(one, other, tmp_path / "made", *SHARES)
    weights = whole_weights(base, one), whole_weights(base, other)
    model = plain(base)
    of_base = logits(model, inputs)
    for share in SHARES:
        alpha = float(share)
        model.load_state_dict(
            {name: (1 - alpha) * weights[0][name] + alpha * weights[1][name] for name in weights[0]}
        )
        expected = logits(model, inputs)
        found = logits(PeftModel.from_pretrained(plain(base), made / f"alpha-{share}"), inputs)
        assert (found - expected).abs().max() < BOUND, share
        # the comparison would see one that is left out
        assert (of_base - expected).abs().max() > 1000 * BOUND


def test_shares_0_and_1_are_the_adapters_themselves(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("gemma3")
    one = make_adapter(tmp_path / "one", base, seed=1, **KINDS["rsLoRA"])
    other = make_adapter(tmp_path / "other", base, seed=2, r=3, **KINDS["decoder"])
    made = between(one, other, tmp_path / "made", "0", "1", "0.5")
    for name in ADAPTER_FILES:
        assert (made / "alpha-0" / name).read_bytes() == (one / name).read_bytes()
        assert (made / "alpha-1" / name).read_bytes() == (other / name).read_bytes()
    settings = record(made / "alpha-0.5/adapter_config.json")
    # ranks 4 and 3 stand above each other, and the scales are in B
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (7, 7, False)
    shapes = {tuple(one.shape) for one in load_file(made / "alpha-0.5" / ADAPTER_FILES[1]).values()}
    assert all(7 in shape for shape in shapes)


def test_one_product_by_hand(tmp_path):
    # Both sides are ones: A 4 x 32 and B 32 x 4, scale 8 / 4 = 2. At 0.25 the first half of B is
    # 0.75 * 2 = 1.5 and the second 0.25 * 6 = 1.5 with alpha 24, so a row of B A is 4 * 3.
    a, b = torch.ones(4, 32), torch.ones(32, 4)
    sides = engine.interpolate._SIDES[0]
    first = {"m": engine.interpolate.Change(a, b, 2.0, sides)}
    second = {"m": engine.interpolate.Change(a, b, 6.0, sides)}
    tensors, ranks = engine.interpolate.stacked(first, second, 0.25)
    found_a, found_b = tensors.values()
    assert ranks == {"m": 8} and found_a.shape == (8, 32) and found_b.shape == (32, 8)
    assert torch.equal(found_b, torch.full((32, 8), 1.5))
    assert torch.equal(found_b @ found_a, torch.full((32, 32), 12.0))


# ---- other commands take it ----------------------------------------------------------------------
def test_a_run_and_what_grpo_made_of_it(tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys):
    speak(monkeypatch)
    sft = tiny_sft_run("qwen2_5_vl")
    trained = tmp_path / "grpo"
    assert grpo(sft, tiny_data, trained, "--max_steps", "2") == 0
    made = between(sft, trained, tmp_path / "made", "0", "0.25", "1")
    said = capsys.readouterr().out
    assert f"next, on validation sets: python -m eval.matrix --model alpha-0={made}/alpha-0" in said
    assert f" alpha-0_25={made}/alpha-0.25 " in said  # a name that eval.matrix takes
    assert "--prompt demo --data_file HOME=VALIDATION" in said
    quarter = made / "alpha-0.25"
    kept = record(quarter / "config.json")
    assert kept["script"] == "interpolation" and kept["interpolation"]["alpha"] == 0.25
    assert kept["interpolation"]["scripts"] == ["sft", "grpo"]
    assert kept["settings"]["prompt"]["value"] == "demo"
    assert kept["data"].keys() >= {"train", "train (before)"} and kept["base"]["files"]
    card = (quarter / "README.md").read_text()
    assert "interpolating the weights of two adapters, 0.75 of SFT and 0.25 of SFT and GRPO" in card

    # the engine evaluates it, as the trained run was evaluated, and trains from it
    flags = ["--data_file", f"site={tiny_data}", "--max_samples", "2"]
    scored = tmp_path / "scores"
    adapter = ["--adapter_name_or_path", str(quarter)]
    assert evaluate([*adapter, *flags, "--output_dir", str(scored)]) == 0
    asked = record(scored / "scores-site.json")["run"]["settings"]
    assert asked["max_visual_tokens"]["value"] == 4 and asked["max_completion_length"]["value"] == 6
    models = ["--model", f"alpha-0={made / 'alpha-0'}", f"alpha-0_25={quarter}", "--prompt", "demo"]
    cells = tmp_path / "cells"
    assert matrix([*models, *flags, "--output_dir", str(cells)]) == 0
    assert (cells / "alpha-0_25.demo/scores-site.json").is_file()
    assert grpo(quarter, tiny_data, tmp_path / "on", "--max_steps", "1") == 0
    assert record(tmp_path / "on/config.json")["settings"]["lora_r"]["value"] == 32
    assert main([*adapter, "--dtype", "float32", "--output_dir", str(tmp_path / "folded")]) == 0


# ---- refusals ------------------------------------------------------------------------------------
def refusal(capsys, *argv: object) -> list[str]:
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("DoRA", "lora_magnitude_vector"),
        ("lora_bias", "lora_B.bias"),
        ("bias all", "bias"),
        ("modules_to_save lm_head", "lm_head.weight"),
        ("trainable tokens", "trainable_tokens_delta"),
    ],
)
def test_what_is_no_product_is_refused(kind, part, tiny_checkpoint, tmp_path, capsys):
    base = tiny_checkpoint("qwen2_5_vl")
    plain_one = make_adapter(tmp_path / "one", base, **KINDS["decoder"])
    more = make_adapter(tmp_path / "more", base, **KINDS[kind])
    place = tmp_path / "made"
    flags = ("--alpha", 0.5, "--output_dir", place)
    for order in ((plain_one, more), (more, plain_one)):
        (line,) = refusal(capsys, "--interpolate", *order, *flags)
        assert line.startswith(f"{more}: has ") and part in line and "no low-rank product" in line
    assert not place.exists() and not list(tmp_path.glob(".tmp*"))


def test_adapters_that_have_nothing_between_them(tiny_checkpoint, tiny_sft_run, tmp_path, capsys):
    one = write_adapter(tmp_path / "one")
    copy = write_adapter(tmp_path / "copy")
    flags = ("--alpha", 0.5, "--output_dir", tmp_path / "made")
    (line,) = refusal(capsys, "--interpolate", one, copy, *flags)
    assert line == f"--interpolate: {one} and {copy} hold the same adapter"
    other = change_settings(copy, base_model_name_or_path="demo-gemma")
    (line,) = refusal(capsys, "--interpolate", one, other, *flags)
    assert line.startswith(f"--interpolate: {one} was trained on demo and {copy} on demo-gemma")

    run = tiny_sft_run("qwen2_5_vl")
    base = record(run / "adapter_config.json")["base_model_name_or_path"]
    asked = make_adapter(tmp_path / "asked", Path(base), **KINDS["decoder"])
    settings = {
        "prompt": {"value": "free_reasoning", "origin": "flag"},
        "answer_format": {"value": "only_label", "origin": "flag"},
    }
    (asked / "config.json").write_text(json.dumps({"script": "grpo", "settings": settings}))
    found = refusal(capsys, "--interpolate", run, asked, *flags)
    assert found[0].startswith(
        f"--interpolate: prompt is demo in {run} and free_reasoning in {asked}; adapters that were"
        " asked differently"
    )
    assert len(found) == 2 and "answer_format is think_solution in" in found[1]


def test_flags_of_folding_and_of_interpolating_do_not_mix(tmp_path, capsys):
    one = write_adapter(tmp_path / "one")
    found = refusal(
        capsys,
        *("--adapter_name_or_path", one, "--interpolate", one, "--alpha", 0.5, "0.50"),
        *("--dtype", "float32", "--num_threads", 2),
    )
    folds = "folds one adapter into its base, and --interpolate makes adapters between two"
    assert found == [
        *(f"--{flag} {folds}: give one of them" for flag in ("adapter_name_or_path", "dtype")),
        f"--num_threads {folds}: give one of them",
        "--interpolate: expected two adapters, first that of share 0 (SFT), then that of share 1"
        " (GRPO); got 1",
        "--alpha 0.5 is given 2 times; give it once",
        "--output_dir is missing: give the new folder of the adapters",
    ]
    two = tmp_path / "two"  # one folder given twice would be told as well
    (line,) = refusal(capsys, "--interpolate", one, two, "--alpha", 25, "--output_dir", "x")
    assert line == "--alpha: expected a number from 0 to 1, got '25'"
    found = refusal(
        capsys,
        *("--interpolate", tmp_path / "no", tmp_path / "neither", "--alpha", 0.5),
        *("--output_dir", tmp_path / "x"),
    )
    assert [line.partition(":")[0] for line in found] == [
        str(tmp_path / "no"),
        str(tmp_path / "neither"),
    ]
    (line,) = refusal(capsys, "--adapter_name_or_path", one, "--alpha", 1, "--output_dir", "x")
    assert line == "--alpha goes with --interpolate FIRST SECOND; leave it out to fold in one"


def test_what_is_interrupted_or_in_use_is_left_alone(
    tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    base = tiny_checkpoint("qwen2_5_vl")
    one = make_adapter(tmp_path / "one", base, seed=1, **KINDS["decoder"])
    other = make_adapter(tmp_path / "other", base, seed=2, **KINDS["decoder"])
    flags = ["--interpolate", str(one), str(other), "--alpha", "0", "0.5"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    (line,) = refusal(capsys, *flags, "--output_dir", full)
    assert line.endswith("is not empty and nothing is overwritten: name another folder")
    before = snapshot(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.interpolate, "write_between", interrupted)  # alpha 0 is written
    assert main([*flags, "--output_dir", str(tmp_path / "made")]) == 130
    assert snapshot(tmp_path) == before
