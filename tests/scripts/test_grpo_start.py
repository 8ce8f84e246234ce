"""Protect what GRPO begins as: an SFT run of this very base, a named adapter, or a fresh one.

An adapter on another base than its own, or on one that has it folded in, trains without an error
and means nothing.

Run: pytest tests/scripts/test_grpo_start.py
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

import run_grpo
import run_sft
from engine.config import UsageError
from engine.merge import main as merge
from engine.model import attach_new_adapter
from engine.saving import save_adapter, save_start
from eval.evaluate import main as evaluate
from eval.folders import load_entry
from rl.settings import resolve_grpo
from tests.helpers import tiny
from tests.helpers.adapters import change_settings, write_adapter
from tests.helpers.runs import (
    GRPO,
    SFT,
    assert_same_run,
    eval_log,
    lines,
    record,
    snapshot,
    speak,
    train_log,
)

FAMILIES = ["qwen2_5_vl", "gemma3"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Work in an empty folder with a data file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rl.jsonl").write_text("{}\n")
    return tmp_path


def base_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def finished_run(here: Path, day: int, base: str) -> str:
    run = write_adapter(here / f"runs/2026010{day}-000000-sft", base_model_name_or_path=base)
    (run / "config.json").write_text("{}")
    return str(run.relative_to(here))


def chosen(*flags: str) -> str:
    return resolve_grpo(["--train_file", "rl.jsonl", *flags]).configs[0].adapter_name_or_path


def refusal(*flags: str) -> str:
    with pytest.raises(UsageError) as caught:
        resolve_grpo(["--train_file", "rl.jsonl", *flags])
    (problem,) = caught.value.problems
    return problem


# ---- which SFT run ------------------------------------------------------------------------------
def test_only_a_run_of_the_base_that_a_flag_names_is_taken(here):
    for name in ("mine", "other"):
        base_folder(here / name)
    run = finished_run(here, 1, "./mine")
    finished_run(here, 2, "./other")
    # the same folder, however it is spelled
    for spelling in ("./mine", "mine", "mine/", str(here / "mine"), "other/../mine"):
        assert chosen("--model_name_or_path", spelling) == run, spelling
    (here / "link").symlink_to(here / "mine")
    assert chosen("--model_name_or_path", "link") == run
    base_folder(here / "third")
    assert refusal("--model_name_or_path", "third") == (
        "no finished SFT run of third named runs/<time>-sft; run `python run_sft.py"
        " --model_name_or_path third` first, or give --adapter_name_or_path (none for a fresh one)"
    )
    # a recipe's base is compared in the same way, and a flag replaces it
    (here / "mine.toml").write_text('model_name_or_path = "mine/"\n')
    assert chosen("--recipe", "mine.toml") == run
    assert refusal("--recipe", "mine.toml", "--model_name_or_path", "third").startswith(
        "no finished SFT run of third named runs/<time>-sft; run `python run_sft.py --recipe"
        " mine.toml --model_name_or_path third` first"
    )


def test_the_embedded_base_is_also_its_folder(here):
    run = finished_run(here, 1, "demo")
    from engine.model_files import model_path

    assert chosen("--model_name_or_path", model_path("demo")) == run
    assert chosen("--model_name_or_path", "demo") == run


def merged_folder(folder: Path, adapter: str, base: str) -> Path:
    base_folder(folder)
    weights = (Path(adapter) / "adapter_model.safetensors").read_bytes()
    notes = {"base": base, "adapter_sha256": hashlib.sha256(weights).hexdigest()}
    (folder / "merge.json").write_text(json.dumps(notes))
    return folder


def test_a_merged_model_is_not_paired_with_what_is_folded_into_it(here):
    run = finished_run(here, 1, "demo")
    merged_folder(here / "merged", run, "demo")
    assert refusal("--model_name_or_path", "./merged").startswith(
        "no finished SFT run of ./merged named runs/<time>-sft; "
    )
    folded = (
        f"--model_name_or_path ./merged: the adapter in {run} is folded into it already (merge.json"
        " there); give its base demo, or the merged model alone"
    )
    assert refusal("--model_name_or_path", "./merged", "--adapter_name_or_path", run) == folded
    # also where the adapter's file names the merged folder itself
    change_settings(shutil.copytree(run, Path("copy")), base_model_name_or_path="./merged")
    assert refusal("--adapter_name_or_path", "copy") == folded.replace(run, "copy")
    # another adapter of the unmerged base: GRPO's, which has the SFT delta in it
    write_adapter(here / "other")
    config = record(here / "merged/merge.json") | {"adapter_sha256": "0" * 64}
    (here / "merged/merge.json").write_text(json.dumps(config))
    assert refusal("--model_name_or_path", "merged", "--adapter_name_or_path", "other") == (
        "--model_name_or_path merged: it is demo with an adapter folded in, by its merge.json, and"
        " the adapter in other was trained on demo; give that base"
    )
    # the base may have moved before the merge
    moved = config | {"base": "/new/place", "base_of_adapter": "demo"}
    (here / "merged/merge.json").write_text(json.dumps(moved))
    assert refusal("--model_name_or_path", "merged", "--adapter_name_or_path", "other").startswith(
        "--model_name_or_path merged: it is /new/place with an adapter folded in, by its merge.json"
    )
    # one that was trained on the merged model is in its place there, also where that has moved
    trained = write_adapter(here / "trained", base_model_name_or_path="/gone/merged")
    assert chosen("--model_name_or_path", "merged", "--adapter_name_or_path", str(trained))
    (here / "merged/merge.json").write_text("[]")
    assert "merged/merge.json: is no record of a merge" in refusal(
        "--model_name_or_path", "merged", "--adapter_name_or_path", "other"
    )


@pytest.mark.parametrize("command", ["sft", "evaluate", "merge"])
def test_no_command_puts_an_adapter_on_a_model_that_has_it(here, command, capsys):
    run = finished_run(here, 1, "demo")
    merged_folder(here / "merged", run, "demo")
    pair = ["--model_name_or_path", "merged", "--adapter_name_or_path", run]
    before = snapshot(here)
    main, more = {
        "sft": (lambda argv: run_sft.main(argv), ["--train_file", "rl.jsonl"]),
        "evaluate": (evaluate, ["--data_file", "a=rl.jsonl"]),
        "merge": (merge, ["--output_dir", "out"]),
    }[command]
    if command == "sft":
        with pytest.raises(UsageError, match="is folded into it already"):
            main([*pair, *more])
    else:
        assert main([*pair, *more]) == 2
        assert "is folded into it already" in capsys.readouterr().err
    assert snapshot(here) == before


def test_a_copy_of_the_base_is_taken_and_said(here, capsys):
    base_folder(here / "moved")
    finished_run(here, 1, "Qwen/Qwen2.5-VL-3B-Instruct")
    pair = ("--adapter_name_or_path", "runs/20260101-000000-sft", "--model_name_or_path")
    assert chosen(*pair, "moved")
    assert capsys.readouterr().err == (
        "note: runs/20260101-000000-sft names Qwen/Qwen2.5-VL-3B-Instruct as its base; moved is"
        " taken for a copy of it\n"
    )
    chosen(*pair, "unsloth/Qwen2.5-VL-3B-Instruct")  # a mirror
    assert "is taken for a copy of it" in capsys.readouterr().err
    # the full-precision form of a quantised base
    of_quantised = "unsloth/Qwen2.5-VL-3B-Instruct-unsloth-bnb-4bit"
    quantised = write_adapter(here / "quantised", base_model_name_or_path=of_quantised)
    chosen(
        *("--adapter_name_or_path", str(quantised)),
        *("--model_name_or_path", "Qwen/Qwen2.5-VL-3B-Instruct"),
    )
    assert "is taken for a copy of it" in capsys.readouterr().err
    for other in ("Qwen/Qwen2.5-VL-7B-Instruct", "demo"):
        assert refusal(*pair, other) == (
            f"--model_name_or_path {other}: the adapter in runs/20260101-000000-sft was trained on"
            " Qwen/Qwen2.5-VL-3B-Instruct; give that model or a copy of it"
        )


# ---- a fresh adapter -----------------------------------------------------------------------------
def test_a_fresh_adapter_needs_a_base_and_takes_prompt_and_rank_from_the_flags(here):
    flags = ["--adapter_name_or_path", "none", "--train_file", "rl.jsonl"]
    with pytest.raises(UsageError, match="^--model_name_or_path is missing: --adapter_n"):
        resolve_grpo(flags)
    flags += ["--model_name_or_path", "demo"]
    resolved = resolve_grpo([*flags, "--prompt", "only_label", "--lora_r", "8"])
    config = resolved.configs[0]
    assert (config.lora_r, config.lora_alpha) == (8, 32)
    assert (config.prompt, config.answer_format) == ("only_label", "solution")
    assert resolved.origins["answer_format"] == "prompt"
    with pytest.raises(UsageError, match="--lora_r: expected an integer from 1 to 65536, got .0."):
        resolve_grpo([*flags, "--lora_r", "0"])
    (here / "mine.toml").write_text('model_name_or_path = "demo"\nlora_alpha = 4\n')
    config = resolve_grpo([*flags[:4], "--recipe", "mine.toml"]).configs[0]
    assert (config.model_name_or_path, config.lora_alpha) == ("demo", 4)


def test_a_saved_adapter_has_its_own_rank(here):
    run = finished_run(here, 1, "demo")
    config = resolve_grpo(["--train_file", "rl.jsonl", "--adapter_name_or_path", run]).configs[0]
    assert (config.lora_r, config.lora_alpha) == (4, 8)
    assert refusal("--adapter_name_or_path", run, "--lora_r", "8") == (
        f"--lora_r 8: the adapter in {run} was trained with 4; leave the flag out, or give another"
        " --adapter_name_or_path"
    )


@pytest.fixture(scope="module", params=FAMILIES)
def fresh_run(request, tmp_path_factory, tiny_checkpoint, tiny_data):
    """Run GRPO on a base with a fresh adapter: 3 steps, a checkpoint each."""
    folder = tmp_path_factory.mktemp("fresh") / "run"
    with pytest.MonkeyPatch.context() as patch:
        speak(patch)
        flags = ["--adapter_name_or_path", "none", "--train_file", str(tiny_data)]
        flags += ["--model_name_or_path", str(tiny_checkpoint(request.param)), *SFT[:6], *GRPO]
        flags += ["--validation_file", f"site={tiny_data}", "--lora_r", "8", "--max_steps", "3"]
        flags += ["--save_steps", "1", "--output_dir", str(folder)]
        assert run_grpo.main(flags) == 0
    return folder, request.param


def test_the_reference_of_a_fresh_adapter_is_the_base(fresh_run):
    run, _ = fresh_run
    start = load_file(run / "reference/adapter_model.safetensors")
    seconds = {name: tensor for name, tensor in start.items() if "lora_B" in name}
    assert seconds and not any(tensor.any() for tensor in seconds.values())
    assert record(run / "reference/adapter_config.json")["r"] == 8
    assert train_log(run)[0]["kl"] == 0.0 < train_log(run)[1]["kl"]
    trained = load_file(run / "adapter_model.safetensors")
    assert trained.keys() == start.keys()
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)
    settings = record(run / "config.json")["settings"]
    assert settings["adapter_name_or_path"] == {"value": "none", "origin": "flag"}
    assert set(record(run / "config.json")["reference"]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_its_start_is_scored_as_the_base(fresh_run, tiny_data, tmp_path, monkeypatch, capsys):
    run, _ = fresh_run
    speak(monkeypatch)
    settings = record(run / "config.json")["settings"]
    base = settings["model_name_or_path"]["value"]
    flags = ["--model_name_or_path", base, *SFT[:6], "--max_completion_length", "6", "--no_bf16"]
    output = ["--output_dir", str(tmp_path / "base"), "--data_file", f"site={tiny_data}"]
    assert evaluate([*flags, *output]) == 0
    alone, start = (
        [row["completion"] for row in lines(folder / "predictions-site.jsonl")]
        for folder in (tmp_path / "base", run / "start")
    )
    assert alone == start
    assert load_entry("start", run / "start").stage == "base"
    assert load_entry("vote", run / "start-vote").stage == "base"
    assert load_entry("run", run).stage == "grpo"
    card = (run / "README.md").read_text()
    assert ", GRPO: chest X-ray labels (LoRA adapter)" in card
    assert "Made by GRPO against a verifiable reward (`hard`), from the base itself." in card


def test_a_fresh_run_resumes_exactly_from_its_own_folder(fresh_run, tmp_path, monkeypatch, capsys):
    run, _ = fresh_run
    speak(monkeypatch)
    flags = ["--resume_from_checkpoint", str(run / "checkpoint-1")]
    assert run_grpo.main([*flags, "--output_dir", str(tmp_path / "again")]) == 0
    assert_same_run(run, tmp_path / "again")
    assert len(eval_log(tmp_path / "again")) == len(eval_log(run))
    said = capsys.readouterr().out
    assert "a fresh LoRA of rank 8 as policy, the model itself as frozen reference" in said
    assert "every B matrix" not in said


def test_what_it_trained_merges_and_starts_another_run(fresh_run, tiny_data, tmp_path, capsys):
    run, _ = fresh_run
    flags = ["--adapter_name_or_path", str(run), "--dtype", "float32"]
    assert merge([*flags, "--output_dir", str(tmp_path / "merged")]) == 0
    # GRPO from the merged model, without an adapter: dry, so nothing is written
    flags = ["--adapter_name_or_path", "none", "--model_name_or_path", str(tmp_path / "merged")]
    flags += ["--train_file", str(tiny_data), *SFT[:6], *GRPO, "--dry_run", "--lora_r", "2"]
    before = snapshot(tmp_path)
    assert run_grpo.main([*flags, "--output_dir", str(tmp_path / "next")]) == 0
    assert "with a fresh LoRA of rank 2" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("zero", [True, False])
def test_a_start_adapter_that_changes_nothing_is_told(tiny_checkpoint, tmp_path, caplog, zero):
    """As where all its second matrices are 0: the SFT run has trained nothing, or saved nothing."""
    base = tiny.load(tiny_checkpoint("qwen2_5_vl"))
    attach = tiny.attach_random_adapter if not zero else partial(attach_new_adapter, r=4, alpha=8)
    policy = tiny.policy_of(attach(base) if not zero else attach(base, dropout=0.0), base)
    for folder in ("sft", "reference"):
        (tmp_path / folder).mkdir()
    save_adapter(policy, tmp_path / "sft")
    save_start(policy, tmp_path / "sft", tmp_path / "reference")
    assert ("every lora_B is 0" in caplog.text) == zero
    caplog.clear()
    save_start(policy, None, tmp_path / "reference")  # a fresh one has to be so
    assert caplog.text == ""
