"""Protect what is said of flags that other trainers have and these commands have not.

Run: pytest tests/engine/test_peer_flags.py
"""

from __future__ import annotations

import dataclasses
import re

import pytest

import eval.compare
import eval.figures
import eval.matrix
import eval.report
from engine.config import ConfigError, parse_config
from engine.merge_settings import MergeConfig
from engine.peer_flags import PEERS
from engine.settings import SFTConfig
from eval.settings import EvalConfig
from rl.objective import ObjectiveConfig
from rl.settings import GRPOConfig
from tests.helpers.repository import ROOT

TRAINING = {"sft": [SFTConfig], "grpo": [GRPOConfig, ObjectiveConfig]}
OTHERS = [
    EvalConfig,
    MergeConfig,
    eval.matrix.MatrixConfig,
    eval.report.ReportConfig,
    eval.compare.CompareConfig,
    eval.figures.FiguresConfig,
]


def flags_of(*classes: type) -> set[str]:
    return {
        name
        for owner in classes
        for field in dataclasses.fields(owner)
        for name in (field.name, *field.metadata.get("aliases", ()))
    }


def problems(script: str, *argv: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse_config(TRAINING[script], argv, script=script, prog="x")
    return error.value.problems


def test_no_named_flag_is_one_of_ours():
    ours = flags_of(SFTConfig, GRPOConfig, ObjectiveConfig, *OTHERS)
    # eval.matrix has --model, for which a training script has another name
    assert sorted(PEERS.keys() & ours) == ["model"]
    assert "model" not in flags_of(SFTConfig, GRPOConfig, ObjectiveConfig, EvalConfig, MergeConfig)


def test_every_flag_that_is_advised_is_there():
    sft, grpo = flags_of(SFTConfig), flags_of(GRPOConfig, ObjectiveConfig)
    for name, sentence in PEERS.items():
        for flag in re.findall(r"--(?:no_)?(\w+)", sentence.replace("--sync-tensorboard", "")):
            # where only one script has it, the sentence says which
            where = [("run_sft.py", sft), ("run_grpo.py", grpo)]
            missing = [script for script, flags in where if flag not in flags]
            assert len(missing) < 2 or flag == "dry_run", (name, flag)
            if missing:
                other = "run_grpo.py" if missing == ["run_sft.py"] else "run_sft.py"
                assert other in sentence, (name, flag)


def test_every_file_that_is_named_is_there():
    for sentence in PEERS.values():
        for file in re.findall(r"\b(\w+/[\w/]+\.(?:py|md))", sentence):
            assert (ROOT / file).is_file(), file
        assert "\n" not in sentence and not sentence.endswith(".") and len(sentence) < 200


def test_what_ends_in_a_sentence():
    assert problems("sft", "--report_to", "wandb") == [
        "unknown flag --report_to: TensorBoard's files and metrics.jsonl are always written in the"
        " run's folder; for wandb: `wandb sync --sync-tensorboard FOLDER`"
    ]
    found = problems("grpo", "--load-in-4bit", "--epsilon=0.2", "--lerning_rate", "1", "--no_fp16")
    assert [line.partition(":")[0].partition(";")[0] for line in found] == [
        "unknown flag --load_in_4bit",
        "unknown flag --epsilon",
        "unknown flag --lerning_rate",
        "unknown flag --no_fp16",
    ]
    assert found[1].endswith("give --epsilon_low and --epsilon_high (run_grpo.py)")
    assert found[2].endswith("did you mean --learning_rate?")
    assert "did you mean" not in "".join(found[:2] + found[3:])


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_the_flags_of_the_demand_have_a_sentence(script):
    """Those that people were seen to bring, beside those of their kind."""
    asked = (
        "report_to load_in_4bit push_to_hub hub_model_id run_name optim "
        "lora_target_modules deepspeed fsdp vllm_server_host fp16 dataloader_num_workers "
        "max_seq_length max_length packing neftune_noise_alpha evaluation_strategy "
        "eval_strategy save_strategy overwrite_output_dir do_train trust_remote_code "
        "use_peft torch_dtype attn_implementation ddp_timeout ddp_backend local_rank "
        "max_prompt_length reward_funcs vllm_server_port vllm_gpu_memory_utilization "
        "sync_ref_model cutoff_len finetuning_type lora_rank dataset template stage "
        "warmup_steps adam_beta1 model logging_dir "
    )
    for name in asked.split():
        [line] = problems(script, f"--{name}", "1")
        assert line == f"unknown flag --{name}: {PEERS[name]}"


def test_a_family_of_names_is_told_by_its_beginning():
    for name in ("ddp_static_graph", "vllm_quantization", "fsdp_transformer_layer_cls_to_wrap"):
        assert problems("grpo", f"--{name}", "1")[0].startswith(f"unknown flag --{name}: ")


def test_values_of_trls_loss_type_are_refused_with_ours():
    for value in ("bnpo", "cispo", "sapo"):
        assert problems("grpo", "--loss_type", value) == [
            f"--loss_type: {value!r} is not one of dr_grpo, grpo, dapo; variants are patches of"
            " rl/objective.py (rl/README.md)"
        ]


def test_vllm_in_the_same_process_is_refused_with_the_reason():
    assert problems("grpo", "--use_vllm", "--vllm_mode", "colocate") == [
        "--vllm_mode: 'colocate' is not one of server; colocate needs vLLM and the engine in one"
        " environment, and vLLM 0.32 wants transformers < 5.20, the engine >= 5.24"
    ]


def test_trls_ways_of_importance_sampling_are_told_apart():
    """Its default, its old name of the cap, and its lower bound."""
    [line] = problems("grpo", "--vllm_importance_sampling_mode", "sequence_mask")
    assert "'sequence_mask' is not one of token_truncate; sequence_mask is the patch" in line
    cap, low = problems(
        "grpo", "--vllm_importance_sampling_cap", "3", "--vllm_importance_sampling_clip_min", "0.3"
    )
    assert cap.endswith("here it is --vllm_importance_sampling_clip_max (run_grpo.py)")
    assert low.endswith("cut above alone, at --vllm_importance_sampling_clip_max (run_grpo.py)")
