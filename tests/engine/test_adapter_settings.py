"""Protect what of a foreign adapter_config.json is believed.

A wrong value must be one line before anything is built from it: peft would import a module, change
the base, take all memory or stop with a traceback.

Run: pytest tests/engine/test_adapter_settings.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.prompts import PROMPTS
from engine.adapter_files import adapter_record, base_of_adapter, read_adapter, todays_name
from engine.config import UsageError
from engine.inherited import settings_of_adapter
from engine.settings import SFTConfig, resolve_sft
from rl.settings import resolve_grpo
from tests.helpers.adapters import write_adapter

LONG = "x" * 500


def problems(folder: Path) -> list[str]:
    with pytest.raises(UsageError) as caught:
        read_adapter(folder)
    found = caught.value.problems
    assert all("\n" not in line and line.isprintable() and len(line) < 400 for line in found)
    return [line.removeprefix(f"{folder}: adapter_config.json: ") for line in found]


# A value of adapter_config.json and what is said of it, after its name.
WRONG = [
    ("r", "16", "is '16', expected a whole number from 1 to 16,384"),
    ("r", -1, "is -1, expected a whole number"),
    ("r", 0, "is 0, expected a whole number"),
    ("r", 10**7, "is 10000000, expected a whole number"),
    ("r", True, "is True, expected a whole number"),
    ("r", 4.0, "is 4.0, expected a whole number"),
    ("r", [4], "is [4], expected a whole number"),
    ("lora_alpha", 1e300, "is 1e+300, expected a number above 0, at most 1,000,000"),
    ("lora_alpha", float("nan"), "is nan, expected a number above 0"),
    ("lora_alpha", float("inf"), "is inf, expected a number above 0"),
    ("lora_alpha", 0, "is 0, expected a number above 0"),
    ("lora_alpha", "8", "is '8', expected a number above 0"),
    ("lora_dropout", 2, "is 2, expected a number in [0, 1)"),
    ("lora_dropout", float("nan"), "is nan, expected a number in [0, 1)"),
    ("target_modules", 5, "is 5, expected a list of names"),
    ("target_modules", ["q_proj", 5], "is ['q_proj', 5], expected a list of names"),
    ("target_modules", "(", "'(' is no regular expression (missing ), unterminated"),
    ("target_modules", "x{99999999999}", "'x{99999999999}' is no regular expression"),
    ("target_modules", [], "is missing; it names the layers that have LoRA"),
    ("exclude_modules", {"a": 1}, "is {'a': 1}, expected a list of names"),
    ("layers_to_transform", "0", "is '0', expected a list of whole numbers from 0"),
    ("layers_to_transform", [-1], "is [-1], expected a list of whole numbers from 0"),
    ("layers_pattern", ["["], "'[' is no regular expression"),
    ("rank_pattern", ["q_proj"], "is ['q_proj'], expected an object"),
    ("rank_pattern", {"q_proj": 10**9}, "['q_proj'] is 1000000000, expected a whole number"),
    ("rank_pattern", {"*": 2}, "'*' is no regular expression (nothing to repeat"),
    ("alpha_pattern", {"q_proj": "2"}, "['q_proj'] is '2', expected a number above 0"),
    ("modules_to_save", [1], "is [1], expected a list of names"),
    ("modules_to_save", ["a("], "'a(' is no regular expression"),
    ("trainable_token_indices", ["a"], "is ['a'], expected a list of whole numbers"),
    ("trainable_token_indices", {"embed": -1}, "is -1, expected a list of whole numbers"),
    ("bias", "some", "is 'some', expected one of none, all, lora_only"),
    ("bias", True, "is True, expected one of none, all, lora_only"),
    ("use_dora", "yes", "is 'yes', expected true or false"),
    ("use_rslora", 1, "is 1, expected true or false"),
    ("lora_bias", [], None),  # off
    ("task_type", 3, "is 3, expected text"),
    ("peft_type", None, "is None; only LORA adapters can be used here"),
    ("peft_type", "\0", "is '\\x00'; only LORA adapters can be used here"),
    ("init_lora_weights", "pissa", "is 'pissa', which changes the frozen base: save it as a plain"),
    ("init_lora_weights", "PiSSA_niter_8", "is 'PiSSA_niter_8', which changes the frozen base"),
    ("init_lora_weights", "OLoRA", "is 'OLoRA', which changes the frozen base"),
    ("init_lora_weights", "new", "is 'new', expected true, false or one of gaussian, eva, "),
    ("init_lora_weights", 3, "is 3, expected true, false or one of"),
    ("layer_replication", [[0, 4]], "is [[0, 4]]; adapters with it cannot be used here"),
    ("megatron_config", {"a": 1}, "is {'a': 1}; adapters with it cannot be used here"),
    ("bias", LONG, f"is '{'x' * 76}..., expected one of"),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG)
def test_a_wrong_value_is_named(name, value, said, tmp_path):
    folder = write_adapter(tmp_path / "adapter", **{name: value})
    if said is None:
        said = "is [], expected true or false"
    (found,) = problems(folder)
    assert found.startswith(f"{name} {said}")


def test_all_problems_are_listed_at_once(tmp_path):
    folder = write_adapter(tmp_path / "adapter", r=-1, lora_dropout=7, use_dora=2)
    (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace('"demo"', '"demo", "arrow_config": 1')
    )
    assert [line.split()[0] for line in problems(folder)] == [
        "r",
        "lora_dropout",
        "use_dora",
        "arrow_config",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "cannot be read (it is nested too deeply)"),
        (b'{"a":' * 100_000, "cannot be read (it is nested too deeply)"),
        (b"[1]", "cannot be read (it holds a list, not an object)"),
        (b"null", "cannot be read (it holds a NoneType, not an object)"),
        (b"", "cannot be read (Expecting value"),
        (b'{"r": "\xff"}', "cannot be read ('utf-8' codec can't decode byte 0xff"),
        (b"\xff\xfe{\0}\0", "cannot be read ('utf-8' codec can't decode byte 0xff"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "cannot be read (Exceeds the limit"),
        (b" " * (2**24 + 1), "cannot be read (it has 16,777,217 bytes)"),
        (b'{"base_model_name_or_path": 5}', ": base_model_name_or_path is 5, expected printable"),
        (b'{"base_model_name_or_path": ["a"]}', ": base_model_name_or_path is ['a'], expected"),
        (b'{"base_model_name_or_path": "a\\u0000"}', r": base_model_name_or_path is 'a\x00', exp"),
        (b'{"base_model_name_or_path": "a\\nb"}', r": base_model_name_or_path is 'a\nb', expected"),
        (b'{"base_model_name_or_path": "' + b"a" * 300 + b'"}', ", too long for a folder or a hub"),
        (b'{"base_model_name_or_path": "' + b"a/" * 3000 + b'"}', ", too long for a folder or a h"),
        (b'{"base_model_name_or_path": "\\ud800"}', r": base_model_name_or_path is '\ud800', exp"),
    ],
)
def test_a_file_that_is_no_configuration(content, said, tmp_path):
    folder = write_adapter(tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(content)
    for read in (adapter_record, base_of_adapter, read_adapter):
        with pytest.raises(UsageError) as caught:
            read(folder)
        (line,) = caught.value.problems
        assert line.startswith(f"{folder}: adapter_config.json")
        assert said in line and "\n" not in line and line.isprintable()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 9, b"\x10\0\0\0\0\0\0\0{"])
def test_a_file_that_holds_no_tensors(content, tmp_path):
    folder = write_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(content)
    (line,) = problems(folder)
    assert line.startswith(f"{folder}: adapter_model.safetensors cannot be read (")


def test_a_base_by_a_strange_path_is_looked_for_and_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    for base in ("../../etc", "/no/such", "~/x", "https://example.org/x"):
        folder = write_adapter(tmp_path / "adapter", base_model_name_or_path=base)
        with pytest.raises(UsageError, match="no such folder") as caught:
            resolve_grpo(["--adapter_name_or_path", str(folder), "--train_file", "data.jsonl"])
        assert len(caught.value.problems) == 1


def test_a_prompt_of_the_adapters_run_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    folder = write_adapter(tmp_path / "adapter")
    for prompt, said in (
        ("../../x", "there is no prompt '../../x'"),
        (5, "prompt is 5, expected str"),
        ("\0", r"there is no prompt '\x00'"),
    ):
        entry = {"settings": {"prompt": {"value": prompt}}}
        (folder / "config.json").write_text(json.dumps(entry))
        with pytest.raises(UsageError, match="config.json: ") as caught:
            resolve_grpo(["--adapter_name_or_path", str(folder), "--train_file", "data.jsonl"])
        (line,) = caught.value.problems
        assert said in line and "\n" not in line
    assert len(PROMPTS) > 1


def test_what_is_not_known_is_left_out_and_said(tmp_path, capsys):
    folder = write_adapter(
        tmp_path / "adapter", use_tomorrows_lora=True, later=None, **{"a\0b\n": "x"}
    )
    for _ in range(2):  # a command reads an adapter several times and says it once
        settings = read_adapter(folder).settings
    assert set(settings) == {"r", "lora_alpha", "target_modules"}
    assert capsys.readouterr().err == (
        f"note: {folder}: adapter_config.json has settings that are not known here and left out:"
        " 'a\\x00b\\n', 'use_tomorrows_lora'\n"
    )


def test_what_does_not_matter_never_reaches_peft(tmp_path, capsys):
    """None of it is a mistake: peft writes most of it into every file."""
    folder = write_adapter(
        tmp_path / "adapter",
        megatron_core="os.system",
        auto_mapping={"base_model_class": "X", "parent_library": "evil"},
        eva_config={"rho": 1e9},
        corda_config=[],
        loftq_config={"loftq_bits": 4},
        runtime_config={"ephemeral_gpu_offload": True},
        fan_in_fan_out=True,
        inference_mode=True,
        init_lora_weights="eva",
        peft_version="99",
        revision=None,
        qalora_group_size=16,
    )
    assert read_adapter(folder).settings == {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    assert capsys.readouterr().err == ""


def test_a_whole_alpha_may_be_a_float(tmp_path):
    folder = write_adapter(tmp_path / "whole", lora_alpha=16.0)
    assert settings_of_adapter(str(folder), ["lora_alpha"], SFTConfig()) == {"lora_alpha": 16}
    assert type(read_adapter(folder).settings["lora_alpha"]) is int  # as peft writes it


@pytest.mark.parametrize("resolve", [resolve_sft, resolve_grpo])
def test_an_alpha_may_be_a_fraction_as_peft_has_it(resolve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    flags = ["--train_file", "data.jsonl", "--adapter_name_or_path"]
    folder = str(write_adapter(tmp_path / "half", lora_alpha=12.5))
    assert read_adapter(folder).settings["lora_alpha"] == 12.5
    resolved = resolve([*flags, folder])
    assert (resolved.configs[0].lora_alpha, resolved.origins["lora_alpha"]) == (12.5, "adapter")
    assert resolve([*flags, folder, "--lora_alpha", "12.5"]).configs[0].lora_alpha == 12.5
    with pytest.raises(
        UsageError, match=r"--lora_alpha 12\.0: the adapter in .* with 12\.5; leave"
    ):
        resolve([*flags, folder, "--lora_alpha", "12"])


@pytest.mark.parametrize(
    ("saved", "today"),
    [
        ("language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("language_model.model.embed_tokens", "model.language_model.embed_tokens"),
        ("vision_tower.vision_model.encoder.layers.3", "model.vision_tower.encoder.layers.3"),
        ("model.vision_tower.vision_model.encoder", "model.vision_tower.encoder"),
        ("multi_modal_projector.x", "model.multi_modal_projector.x"),
        ("model.layers.11.self_attn.q_proj", "model.language_model.layers.11.self_attn.q_proj"),
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("model.language_model.layers.1.mlp", "model.language_model.layers.1.mlp"),
    ],
)
def test_names_of_modules_by_their_former_ones(saved, today):
    prefix, end = "base_model.model.", ".lora_A.weight"
    assert todays_name(f"{prefix}{saved}{end}") == f"{prefix}{today}{end}"
    assert todays_name(f"{saved}.lora_A.default.weight") == f"{prefix}{today}{end}"
    assert todays_name(f"{prefix}{today}{end}") == f"{prefix}{today}{end}"
