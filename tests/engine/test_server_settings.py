"""Protect the flags of a rollout server: what is refused before anything is loaded.

Run: pytest tests/engine/test_server_settings.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import parse_config
from engine.server_settings import server_problems, server_warnings
from engine.workload import Lengths, shape_of, training_work
from rl.objective import ObjectiveConfig
from rl.plan import BatchPlan
from rl.settings import GRPOConfig, grpo_problems, warnings

SERVED = GRPOConfig(use_vllm=True, train_file=("a.jsonl",), adapter_name_or_path="sft")


def test_the_defaults_are_no_server_and_this_machine():
    config = GRPOConfig()
    assert config.use_vllm is False and config.vllm_server_base_url == "http://127.0.0.1:8000"
    assert server_problems(config) == server_warnings(config) == server_problems(SERVED) == []


def test_another_machine_needs_https_and_a_flag_of_its_own():
    config = replace(SERVED, vllm_server_base_url="http://10.0.0.1:8000")
    away, plain = server_problems(config)
    assert away.startswith("--vllm_server_base_url http://10.0.0.1:8000 is not this machine")
    assert "--allow_remote_server" in away and "https alone" in plain
    config = replace(config, vllm_server_base_url="https://10.0.0.1", allow_remote_server=True)
    assert server_problems(config) == []


def test_all_problems_come_at_once():
    config = replace(SERVED, vllm_server_base_url="ftp://x", shard_base=True, vllm_server_timeout=0)
    found = "\n".join(grpo_problems(config, ObjectiveConfig()))
    assert "--vllm_server_base_url ftp://x is no address" in found
    assert "--use_vllm and --shard_base do not go together" in found
    assert "--vllm_server_timeout" in found


def test_without_a_server_its_flags_are_warned_of():
    config = replace(
        GRPOConfig(), vllm_server_base_url="https://elsewhere", allow_remote_server=True
    )
    assert server_problems(config) == []
    lines = [
        "vllm_server_base_url has no effect without --use_vllm",
        "allow_remote_server has no effect without --use_vllm",
    ]
    assert server_warnings(config) == lines
    assert warnings(config, ObjectiveConfig())[:2] == lines
    assert server_warnings(replace(config, use_vllm=True)) == []


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"use_dora": True}, "has DoRA (use_dora in its adapter_config.json)"),
        ({"lora_bias": True}, "has biases of LoRA (lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "has whole modules (modules_to_save"),
    ],
)
def test_an_adapter_that_vllm_does_not_serve_is_refused(setting, says, tmp_path):
    write_adapter(tmp_path, setting)
    [line] = server_problems(replace(SERVED, adapter_name_or_path=str(tmp_path)))
    assert line.startswith(f"--use_vllm: {tmp_path} {says}") and "engine.merge" in line
    assert server_problems(replace(SERVED, adapter_name_or_path="none")) == []
    # without a server it is one like others
    assert server_problems(GRPOConfig(adapter_name_or_path=str(tmp_path))) == []


def test_ranks_by_module_and_rslora_are_served(tmp_path):
    write_adapter(tmp_path, {"rank_pattern": {"q_proj": 4}, "use_rslora": True, "use_dora": False})
    assert server_problems(replace(SERVED, adapter_name_or_path=str(tmp_path))) == []


def write_adapter(folder: Path, setting: dict) -> None:
    record = {"base_model_name_or_path": "demo", "r": 4} | setting
    (folder / "adapter_config.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def test_they_are_flags():
    argv = ["--use_vllm", "--vllm_server_timeout", "60", "--no_allow_remote_server"]
    [config] = parse_config([GRPOConfig], argv, script="grpo", prog="x").configs
    assert (config.use_vllm, config.vllm_server_timeout) == (True, 60.0)


def test_the_forecast_counts_no_rollout_of_a_server(tiny_checkpoint):
    shape = shape_of(str(tiny_checkpoint("qwen2_5_vl")))
    assert shape is not None
    plan, lengths = BatchPlan.of(SERVED), Lengths(20, 4, 0)
    given = shape, lengths, torch.device("cpu"), 4, plan
    assert training_work(SERVED, *given).sampled() == (1, 1)
    own = replace(SERVED, use_vllm=False)
    assert training_work(own, *given).sampled() == (plan.prompts, plan.group)
