"""Protect a run from other base weights under the same path.

Run: pytest tests/engine/test_base_hash.py
"""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import run_grpo
import run_sft
from data.files import DataError
from engine import merge, model_checks
from engine.model_checks import base_hashes
from engine.runtime import main_guard
from eval import evaluate
from tests.helpers.runs import GRPO, SFT, sft


def change_weights(folder, add=1.0):
    """Change one number of the base's weights: neither size nor header tells."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key in sorted(tensors) if "mlp" in key)
    tensors[name].view(-1)[3] += add
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tiny_data, tmp_path_factory):
    """Train one SFT step of two on a copy of a base -> (base, run)."""
    folder = tmp_path_factory.mktemp("hashed")
    base = shutil.copytree(tiny_checkpoint("qwen2_5_vl"), folder / "base")
    run = folder / "run"
    assert sft(base, tiny_data, run, "--max_steps", "2", "--save_steps", "1") == 0
    return base, run


@pytest.fixture
def restored(trained):
    """Put the base back after a test that changes it."""
    base, _ = trained
    kept = {path.name: path.read_bytes() for path in base.iterdir()}
    yield trained
    for name, content in kept.items():
        (base / name).write_bytes(content)


def errors(main, argv, capsys):
    assert main_guard(lambda: main([str(word) for word in argv]), errors=(DataError,)) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]


def test_a_run_notes_what_its_base_was(trained):
    base, run = trained
    noted = json.loads((run / "config.json").read_text())["base"]
    assert noted["name"] == str(base) and noted["hash"] == "sample"
    described = noted["files"]["config.json"]
    assert described["sha256"] == hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    whole = (base / "model.safetensors").read_bytes()
    assert noted["files"]["model.safetensors"]["bytes"] == len(whole)
    assert {"tokenizer.json", "chat_template.jinja", "preprocessor_config.json"} <= set(
        noted["files"]
    )


def test_all_of_a_small_file_is_hashed_and_samples_of_a_large_one(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(4096)}, path)
    start, header = base_hashes(tmp_path, "sample"), len(path.read_bytes()) - 4 * 4096

    def changed(place, how="sample") -> bool:
        content = bytearray(path.read_bytes())
        content[header + place] ^= 1
        path.write_bytes(content)
        now = base_hashes(tmp_path, how)["files"] != begin["files"]
        content[header + place] ^= 1
        path.write_bytes(content)
        return now

    begin = start
    assert all(changed(place) for place in (0, 5000, 4 * 4096 - 1))
    # 16 KiB in 4 samples of 256 bytes, 4 KiB apart, and the last 256
    monkeypatch.setattr(model_checks, "_SAMPLES", 4)
    monkeypatch.setattr(model_checks, "_SAMPLE_BYTES", 256)
    begin = base_hashes(tmp_path, "sample")
    seen = {0: True, 255: True, 256: False, 4096: True, 4351: True, 4352: False, 16_383: True}
    assert {place: changed(place) for place in seen} == seen
    begin = base_hashes(tmp_path, "full")
    assert all(changed(place, "full") for place in seen)
    assert begin["files"]["model.safetensors"]["sha256"] == (
        hashlib.sha256(path.read_bytes()).hexdigest()
    )


@pytest.mark.parametrize(
    "file", ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"]
)
def test_the_files_of_a_slow_tokenizer_are_hashed(file, tmp_path):
    save_file({"x": torch.zeros(4)}, tmp_path / "model.safetensors")
    (tmp_path / file).write_text("as it was")
    noted = base_hashes(tmp_path, "sample")["files"][file]
    assert noted == {"bytes": 9, "sha256": hashlib.sha256(b"as it was").hexdigest()}


@pytest.mark.parametrize("what", ["weights", "template"])
def test_a_resumed_run_refuses_another_base(what, restored, tmp_path, capsys):
    base, run = restored
    if what == "weights":
        change_weights(base)
    else:
        path = base / "chat_template.jinja"
        path.write_text("{# as it was #}" + path.read_text())
    file = {"weights": "model.safetensors", "template": "chat_template.jinja"}[what]
    argv = ["--resume_from_checkpoint", run / "checkpoint-1", "--output_dir", tmp_path / "on"]
    (line,) = errors(run_sft.main, argv, capsys)
    assert line.startswith(f"error: {base}: {file} is another one (SHA-256 ")
    assert line.endswith("than when the resumed run began; restore it or start a new run")
    assert not (tmp_path / "on").exists()


def test_a_run_of_an_earlier_version_resumes(restored, tmp_path):
    base, run = restored
    old = shutil.copytree(run, tmp_path / "old", symlinks=True)
    for path in (old / "config.json", old / "checkpoint-1/config.json"):
        if path.is_file():
            record = json.loads(path.read_text())
            del record["base"], record["settings"]["base_hash"]
            path.write_text(json.dumps(record))
    manifest = old / "checkpoint-1/manifest.json"
    record, content = json.loads(manifest.read_text()), path.read_bytes()
    entry = record["files"]["config.json"]  # the checkpoint's own copy is hashed
    entry |= {"sha256": hashlib.sha256(content).hexdigest()}
    entry |= {key: len(content) for key in entry if key in ("size", "bytes")}
    manifest.write_text(json.dumps(record))
    argv = ["--resume_from_checkpoint", str(old / "checkpoint-1")]
    assert run_sft.main([*argv, "--output_dir", str(tmp_path / "on")]) == 0
    noted = json.loads((tmp_path / "on/config.json").read_text())["base"]
    assert noted["name"] == str(base) and noted["files"]  # known from now on


def test_grpo_and_sft_do_not_go_on_from_another_base(restored, tiny_data, capsys, tmp_path):
    base, run = restored
    change_weights(base)
    argv = ["--adapter_name_or_path", run, "--train_file", tiny_data]
    argv += ["--output_dir", tmp_path / "on"]
    spelled = f"{base}/."  # the same place
    for main, name, flags in (
        (run_grpo.main, str(base), GRPO),
        (run_sft.main, str(base), SFT),
        (run_sft.main, spelled, [*SFT, "--model_name_or_path", spelled]),
    ):
        (line,) = errors(main, [*argv, *flags], capsys)
        assert line.startswith(f"error: {name}: model.safetensors is another one (SHA-256 ")
        assert f"than when {run} was trained; restore it, or give the base" in line


def test_evaluation_and_merge_say_so_and_go_on(restored, tiny_data, capsys, tmp_path):
    base, run = restored
    asked = ["--adapter_name_or_path", str(run), "--data_file", f"a={tiny_data}"]
    asked += ["--max_samples", "1", "--max_completion_length", "2", "--no_bf16", "--output_dir"]
    assert evaluate.main([*asked, str(tmp_path / "same")]) == 0
    assert "is another one" not in capsys.readouterr().err
    change_weights(base)
    assert evaluate.main([*asked, str(tmp_path / "other")]) == 0
    said = f"warning: {base}: model.safetensors is another one (SHA-256 "
    assert said in capsys.readouterr().err
    flags = ["--adapter_name_or_path", str(run), "--dtype", "float32"]
    assert merge.main([*flags, "--output_dir", str(tmp_path / "merged")]) == 0
    assert said in capsys.readouterr().err
