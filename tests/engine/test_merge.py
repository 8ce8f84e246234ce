"""Protect engine.merge.

Checked: the saved folder is base + adapter for plain transformers, summed in fp32 and then cast,
within the bound that the command checks itself; a wrong base, a used folder or a merge that went
wrong leaves nothing.

Run: pytest tests/engine/test_merge.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import engine.merge
from data.examples import read_jsonl
from data.prompts import PROMPTS
from engine.encode import Encoder
from engine.merge import (
    BFLOAT16_BOUND,
    FLOAT32_BOUND,
    float32_decoder,
    main,
    merge,
    merge_adapter,
    probe_logits,
    relative_difference,
)
from engine.merge_settings import MergeConfig
from engine.model import attach_adapter, load_model
from engine.model_files import model_path
from engine.run import TrainerState
from engine.saving import save_final_adapter
from eval.evaluate import main as evaluate
from tests.helpers.repository import ROOT
from tests.helpers.runs import lines, overriding, record, snapshot
from tests.helpers.tiny import SAVE, attach_random_adapter, policy_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=list(SAVE))
def family(request) -> str:
    torch.set_num_threads(1)
    return request.param


@pytest.fixture(scope="module")
def run(family, tiny_sft_run) -> Path:
    """Make a finished SFT run, whose adapter_config.json names the base."""
    return tiny_sft_run(family)


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    """Merge: `merged("float32")` -> the folder that the command wrote."""
    made: dict[str, Path] = {}

    def make(dtype: str) -> Path:
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp("merged") / dtype
            assert (
                main(
                    [
                        "--adapter_name_or_path",
                        str(run),
                        "--output_dir",
                        str(made[dtype]),
                        "--dtype",
                        dtype,
                    ]
                )
                == 0
            )
        return made[dtype]

    return make


def official_inputs(encoder: Encoder, data: Path) -> dict[str, torch.Tensor]:
    """Gather what transformers' own forward and generate take for the first example's prompt."""
    prompt = encoder.encode_prompt(read_jsonl(data)[0], PROMPTS["demo"])
    types = "token_type_ids" if encoder.family.model_type == "gemma3" else "mm_token_type_ids"
    ids = prompt.input_ids[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        types: prompt.token_types[None],
        **prompt.vision,
    }


# ---- the folder ----------------------------------------------------------------------------------
@torch.no_grad()
def test_plain_transformers_loads_the_same_model(family, run, merged, tiny_checkpoint, tiny_data):
    folder = merged("float32")
    alone, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert (
        not loading["missing_keys"]
        and not loading["unexpected_keys"]
        and alone.dtype == torch.float32
    )
    base = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(family))
    encoder = Encoder.from_pretrained(folder, min_visual_tokens=4, max_visual_tokens=4)
    inputs = official_inputs(encoder, tiny_data)
    bare = base(**inputs).logits
    with_adapter = PeftModel.from_pretrained(base, run).eval()  # plain peft, from the run's folder
    expected, logits = with_adapter(**inputs).logits, alone(**inputs).logits
    assert (expected - bare).abs().max() > 1e-2 * expected.abs().max()
    # fp32 sums in another order: about 1e-6 of the largest logit
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    greedy = dict(do_sample=False, max_new_tokens=12, pad_token_id=encoder.pad_token_id)
    assert torch.equal(
        alone.generate(**inputs, **greedy), with_adapter.generate(**inputs, **greedy)
    )


def test_weights_are_summed_in_float32_and_cast_once(family, run, merged, tiny_checkpoint):
    base, saved = (
        load_file(tiny_checkpoint(family) / "model.safetensors"),
        load_file(merged("bfloat16") / "model.safetensors"),
    )
    lora = load_file(run / "adapter_model.safetensors")
    assert saved.keys() == base.keys()  # the names that the base has, and no lora_ among them
    scaling = (
        record(run / "adapter_config.json")["lora_alpha"] / record(run / "adapter_config.json")["r"]
    )
    merged_names = []
    for name, weight in base.items():
        tail = re.search(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$", name)
        sides = (
            [key for key in lora if tail and tail.group().removesuffix("weight") in key]
            if "vis" not in name
            else []
        )
        if sides:
            a, b = (
                next(lora[key] for key in sides if side in key) for side in ("lora_A", "lora_B")
            )
            weight = weight + scaling * (b @ a)
            merged_names.append(name)
        assert saved[name].dtype == torch.bfloat16
        # Two fp32 sums may differ in the last bit, and so fall to two sides of a bfloat16 rounding:
        # 2^-8 of the value.
        torch.testing.assert_close(
            saved[name].float(), weight.bfloat16().float(), rtol=2**-7, atol=0, msg=name
        )
        assert (saved[name] != weight.bfloat16()).float().mean() < 1e-3
    assert 2 * len(merged_names) == len(lora)


def test_processor_template_and_generation_config_are_the_bases(
    family, merged, tiny_checkpoint, tiny_data
):
    base, folder = tiny_checkpoint(family), merged("bfloat16")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "generation_config.json",
    ):
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template
        == AutoTokenizer.from_pretrained(base).chat_template
    )
    image_processors = [
        AutoImageProcessor.from_pretrained(path, backend="pil").to_dict() for path in (folder, base)
    ]
    assert image_processors[0] == image_processors[1]


def test_the_stated_bound_is_checked_and_kept(run, merged):
    exact, rounded = (record(merged(dtype) / "merge.json") for dtype in ("float32", "bfloat16"))
    assert exact["difference"] < exact["bound"] == FLOAT32_BOUND
    assert exact["difference"] < 1e-5 and exact["difference_of_base_and_adapter"] == 0.0
    assert rounded["bound"] == BFLOAT16_BOUND * rounded["difference_of_base_and_adapter"]
    # a bfloat16 has 8 bits: 2^-9 = 2e-3 a rounding
    assert 1e-3 < rounded["difference"] < rounded["bound"] < 1e-1
    assert rounded["adapter"] == str(run) and (
        rounded["min_visual_tokens"],
        rounded["max_visual_tokens"],
    ) == (4, 4)


def test_a_merged_model_is_evaluated_as_base_and_adapter_were(
    run, merged, tiny_data, tmp_path, capsys
):
    common = ["--data_file", f"site={tiny_data}", "--max_samples", "4"]
    assert (
        evaluate(
            ["--adapter_name_or_path", str(run), "--output_dir", str(tmp_path / "both"), *common]
        )
        == 0
    )
    flags = [
        "--prompt",
        "demo",
        "--min_visual_tokens",
        "4",
        "--max_visual_tokens",
        "4",
        "--max_completion_length",
        "6",
        "--no_bf16",
    ]
    base = ["--model_name_or_path", str(merged("float32"))]
    assert evaluate([*base, "--output_dir", str(tmp_path / "merged"), *flags, *common]) == 0
    both, alone = (lines(tmp_path / name / "predictions-site.jsonl") for name in ("both", "merged"))
    assert alone == both and len(both) == 4


def test_the_demo_base(tmp_path, capsys):
    model = load_model(
        "demo", dtype=torch.float32, device=CPU, min_visual_tokens=16, max_visual_tokens=16
    )
    (tmp_path / "run").mkdir()
    policy = policy_of(attach_random_adapter(model), model)
    save_final_adapter(tmp_path / "run", TrainerState(), policy)
    assert (
        main(
            [
                "--adapter_name_or_path",
                str(tmp_path / "run"),
                "--output_dir",
                str(tmp_path / "merged model"),
            ]
        )
        == 0
    )
    saved, base = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (tmp_path / "merged model", model_path("demo"))
    )
    assert saved.keys() == base.keys()
    for weights, beside in (
        (tmp_path / "merged model/model.safetensors", "config.json"),
        (tmp_path / "run/adapter_model.safetensors", "adapter_config.json"),
    ):  # of the umask: safetensors itself writes files that only their owner may read
        assert weights.stat().st_mode == weights.with_name(beside).stat().st_mode
    assert (  # a shell takes it as it is printed
        f"next: python -m eval.evaluate --model_name_or_path '{tmp_path / 'merged model'}' "
        in capsys.readouterr().out
    )


# ---- how it is made ------------------------------------------------------------------------------
def test_one_projection_at_a_time_is_in_float32(family, run, tiny_checkpoint):
    model = load_model(
        str(tiny_checkpoint(family)),
        dtype=torch.bfloat16,
        device=CPU,
        min_visual_tokens=4,
        max_visual_tokens=4,
    )
    wrapped = attach_adapter(model, run)
    base = [parameter for name, parameter in wrapped.named_parameters() if "lora_" not in name]
    before = [parameter.data.clone() for parameter in base]
    in_float32 = []

    def count(*_) -> None:
        in_float32.append(sum(parameter.dtype == torch.float32 for parameter in base))

    with float32_decoder(wrapped):
        inner = [
            module
            for module in wrapped.modules()
            if type(module) is torch.nn.Linear and module.weight in set(base)
        ]
        # after the cast of the same module
        handles = [module.register_forward_pre_hook(count) for module in inner]
        _, exact = probe_logits(model, wrapped)
    for handle in handles:
        handle.remove()
    assert max(in_float32) <= 2 and 1 in in_float32  # its weight, and its bias where it has one
    assert all(
        parameter.dtype == torch.bfloat16 and torch.equal(parameter, old)
        for parameter, old in zip(base, before, strict=True)
    )

    # The arithmetic is that of a model held in float32 as a whole, the image's features apart,
    # which are bfloat16's here.
    whole = load_model(
        str(tiny_checkpoint(family)),
        dtype=torch.float32,
        device=CPU,
        min_visual_tokens=4,
        max_visual_tokens=4,
    )
    net = attach_adapter(whole, run)
    for old, parameter in zip(
        before,
        (parameter for name, parameter in net.named_parameters() if "lora_" not in name),
        strict=True,
    ):
        parameter.data = old.float()
    _, expected = probe_logits(whole, net)
    _, rounded = probe_logits(model, wrapped)
    assert relative_difference(exact, expected) < 0.5 * relative_difference(rounded, expected)


def flags_of(run: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        "--adapter_name_or_path",
        str(run),
        "--output_dir",
        str(output_dir),
        "--dtype",
        "float32",
        *more,
    ]


def test_a_projection_that_is_left_out_is_found(run, tmp_path, monkeypatch):
    def forgetful(wrapped, dtype):
        layer = next(
            module
            for name, module in wrapped.named_modules()
            if name.endswith("layers.1.mlp.down_proj")
        )
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
        return merge_adapter(wrapped, dtype)

    monkeypatch.setattr(engine.merge, "merge_adapter", forgetful)
    with pytest.raises(
        RuntimeError,
        match="differs from base [+] adapter by .* more than the bound 1.00e-04; nothing",
    ):
        main(flags_of(run, tmp_path / "merged"))
    assert not list(tmp_path.iterdir())


def test_a_processor_that_is_not_the_bases_is_found(run, tmp_path, monkeypatch):
    copy = engine.merge.copy_processor

    def tampering(path, folder):
        names = copy(path, folder)
        (folder / "chat_template.jinja").write_text(
            "x" + (folder / "chat_template.jinja").read_text()
        )
        return names

    monkeypatch.setattr(engine.merge, "copy_processor", tampering)
    with pytest.raises(RuntimeError, match="does not give the base's inputs; nothing was written"):
        main(flags_of(run, tmp_path / "merged"))
    assert not list(tmp_path.iterdir())


def test_a_merge_that_is_interrupted_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    # the weights are written by then
    monkeypatch.setattr(engine.merge, "copy_processor", interrupted)
    assert main(flags_of(run, tmp_path / "merged")) == 130
    assert not list(tmp_path.iterdir())


def test_a_merge_that_is_killed_leaves_no_folder_of_its_name(tiny_sft_run, tmp_path, capsys):
    run = tiny_sft_run("qwen2_5_vl")
    program = (
        "import os, signal, sys, engine.merge as m; "
        "m.check_same_inputs = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
        "sys.exit(m.main(sys.argv[1:]))"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, *flags_of(run, tmp_path / "merged")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-merged"]
    assert main(flags_of(run, tmp_path / "merged")) == 0  # and the remains are no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


# ---- refusals ------------------------------------------------------------------------------------
def refusal(capsys, *argv: str) -> str:
    """Return the only line of a command that must end with exit code 2."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def rename_base(run: Path, copy: Path, name: str | None) -> Path:
    """Copy the adapter so that it names another base."""
    copy.mkdir()
    shutil.copyfile(run / "adapter_model.safetensors", copy / "adapter_model.safetensors")
    config = record(run / "adapter_config.json") | {"base_model_name_or_path": name}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return copy


def test_a_moved_base_needs_the_flag_and_must_fit(family, run, tiny_checkpoint, tmp_path, capsys):
    gone = tmp_path / "gone"
    adapter = rename_base(run, tmp_path / "adapter", str(gone))
    assert refusal(capsys, *flags_of(adapter, tmp_path / "merged")).startswith(
        f"--model_name_or_path {gone}: no such folder"
    )
    here = str(tiny_checkpoint(family))
    assert main(flags_of(adapter, tmp_path / "merged", "--model_name_or_path", here)) == 0
    assert (
        f"note: {adapter} names {gone} as its base; {here} is taken for a copy of it"
        in capsys.readouterr().err
    )
    assert record(tmp_path / "merged/merge.json")["base"] == here

    # Another model in the place of the moved one: another family has other layers ...
    other = str(tiny_checkpoint("gemma3" if family == "qwen2_5_vl" else "qwen2_5_vl"))
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert main(flags_of(adapter, tmp_path / "other", "--model_name_or_path", other)) == 2
    assert "the adapter does not fit the model" in capsys.readouterr().err.splitlines()[-1]
    # ... and one of the same layers other widths.
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    save_file(tensors | {name: torch.zeros(16, 48)}, adapter / "adapter_model.safetensors")
    assert main(flags_of(adapter, tmp_path / "other", "--model_name_or_path", here)) == 2
    assert (
        f"{name} has shape (16, 48), the model needs (16, 32)"
        in capsys.readouterr().err.splitlines()[-1]
    )
    assert snapshot(tmp_path).keys() == before.keys()


def test_a_base_of_another_name_is_refused(tiny_sft_run, tmp_path, capsys):
    adapter = rename_base(tiny_sft_run("gemma3"), tmp_path / "adapter", "google/medgemma-4b-it")
    said = refusal(
        capsys,
        *flags_of(adapter, tmp_path / "merged", "--model_name_or_path", "google/gemma-3-4b-it"),
    )
    assert (
        said
        == f"--model_name_or_path google/gemma-3-4b-it: the adapter in {adapter} was trained on"
        " google/medgemma-4b-it; give that model or a copy of it"
    )
    said = refusal(capsys, *flags_of(adapter, tmp_path / "merged", "--model_name_or_path", "demo"))
    assert said.startswith("--model_name_or_path demo: the adapter in ")
    nameless = rename_base(tiny_sft_run("gemma3"), tmp_path / "nameless", None)
    said = refusal(capsys, *flags_of(nameless, tmp_path / "merged"))
    assert said == f"{nameless}: adapter_config.json names no base model; give --model_name_or_path"
    assert not (tmp_path / "merged").exists()


def test_an_output_folder_in_use_is_refused(tiny_sft_run, tmp_path, capsys):
    run = tiny_sft_run("qwen2_5_vl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, problem in (("full", "is not empty"), ("file", "is a file")):
        said = refusal(capsys, *flags_of(run, tmp_path / name))
        assert (
            said
            == f"--output_dir {tmp_path / name} {problem} and nothing is overwritten: name another"
            " folder"
        )
    assert snapshot(tmp_path) == {"file": b"mine", "full/notes.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    assert (
        merge(MergeConfig(str(run), str(tmp_path / "empty"), dtype="float32"))["difference"] < 1e-5
    )
    assert (tmp_path / "empty/model.safetensors").is_file()


def test_what_is_missing_is_named(tmp_path, capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --adapter_name_or_path is missing",
        "error: --output_dir is missing",
    ]
    said = refusal(capsys, *flags_of(tmp_path / "none", tmp_path / "merged"))
    assert said.startswith(f"{tmp_path / 'none'}: no adapter there")
    said = refusal(
        capsys, *overriding([*flags_of(tmp_path, tmp_path / "merged"), "--dtype", "int4"])
    )
    assert said == "--dtype: 'int4' is not one of bfloat16, float32"
