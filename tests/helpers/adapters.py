"""Make adapters of every kind with plain peft, and files of adapters without torch.

`KINDS` are the kinds that people bring, by the settings of peft's LoraConfig. `make_adapter` lets
peft make one on a small checkpoint, with random weights, and save it as its users do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DECODER = (
    r"^(?:.*\.)?language_model\.(?:.*\.)?layers\.\d+\."
    r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)$"
)
# Of Unsloth's FastVisionModel, with vision and language layers, attention and MLP.
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp"
    r"|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv"
    r"|proj|fc1|fc2|out_proj).*?)"
)
KINDS: dict[str, dict[str, Any]] = {
    "decoder": {"target_modules": DECODER},
    "attention only": {"target_modules": r".*language_model.*\.(q|v)_proj"},
    "suffix list": {"target_modules": SUFFIXES},
    "all-linear": {"target_modules": "all-linear"},
    "unsloth": {"target_modules": UNSLOTH},
    "exclude_modules": {"target_modules": SUFFIXES, "exclude_modules": r".*(visual|vision).*"},
    "layers_to_transform": {
        "target_modules": [f"self_attn.{name}" for name in SUFFIXES[:3]],
        "layers_to_transform": [0],
        "layers_pattern": "language_model.layers",
    },
    "rank_pattern": {
        "target_modules": DECODER,
        "rank_pattern": {"q_proj": 8, r"layers\.0\.mlp\.up_proj": 2},
        "alpha_pattern": {"q_proj": 32, "down_proj": 3},
    },
    "rsLoRA": {"target_modules": DECODER, "use_rslora": True},
    "DoRA": {"target_modules": DECODER, "use_dora": True},
    "lora_bias": {"target_modules": DECODER, "lora_bias": True},
    "bias lora_only": {"target_modules": DECODER, "bias": "lora_only"},
    "bias all": {"target_modules": DECODER, "bias": "all"},
    "MedGemma notebook": {
        "target_modules": "all-linear",
        "modules_to_save": ["lm_head", "embed_tokens"],
    },
    "modules_to_save lm_head": {"target_modules": DECODER, "modules_to_save": ["lm_head"]},
    "modules_to_save embed_tokens": {
        "target_modules": DECODER,
        "modules_to_save": ["embed_tokens"],
    },
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "trainable tokens": {"target_modules": DECODER, "trainable_token_indices": [5, 6, 7]},
    "eva": {"target_modules": DECODER, "init_lora_weights": "eva"},
    "olora": {"target_modules": DECODER, "init_lora_weights": "olora"},
    "pissa": {"target_modules": DECODER, "init_lora_weights": "pissa"},
    "vision only": {"target_modules": r".*(visual|vision_tower).*(mlp\.(gate_proj|fc1))"},
    "projector": {"target_modules": r".*(language_model.*q_proj|visual\.merger\.mlp\.0)"},
    "lora_bias on q, k, v": {
        "target_modules": r".*language_model.*self_attn\.(q|k|v)_proj",
        "lora_bias": True,
    },
    "embed_tokens, as peft saves it": {"target_modules": ["q_proj", "embed_tokens"]},
}

# Kinds that no file of weights is needed for to refuse them, by settings in adapter_config.json.
REFUSED_KINDS: dict[str, dict[str, Any]] = {
    "IA3": {"peft_type": "IA3"},
    "LoHa": {"peft_type": "LOHA"},
    "AdaLoRA": {"peft_type": "ADALORA"},
    "prompt tuning": {"peft_type": "PROMPT_TUNING"},
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
    "QA-LoRA": {"use_qalora": True},
    "BD-LoRA": {"use_bdlora": {"nblocks": 2}},
    "Arrow": {"arrow_config": {"top_k": 2}},
    "KaSA": {"kasa_config": {}, "init_lora_weights": "kasa"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "target_parameters": {"target_parameters": ["mm_input_projection_weight"]},
    "Megatron": {"megatron_config": {"tensor_model_parallel_size": 2}},
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
}


def make_adapter(
    folder: Path,
    checkpoint: Path,
    *,
    base_name: str | None = None,
    save_embedding_layers: bool | str = "auto",
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Let plain peft make an adapter with random weights on a checkpoint, and save it."""
    # here: a test of plain files needs no torch
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    net = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 0.05)
            elif "magnitude" in name:
                parameter.mul_(1.3)
            elif "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.std())
            elif name.endswith(".bias") and parameter.requires_grad:
                parameter.add_(0.3)
    net.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return change_settings(folder, base_model_name_or_path=base_name or str(checkpoint))


def write_adapter(folder: Path, **settings: Any) -> Path:
    """Write the files of a small adapter on q_proj of the decoder's first layer, rank 4."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "peft_type": "LORA",
        "base_model_name_or_path": "demo",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(record | settings))
    module = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": np.ones((4, 32), np.float32),
        f"{module}.lora_B.weight": np.ones((32, 4), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def change_settings(folder: Path, **settings: Any) -> Path:
    """Change settings in an adapter's adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def rename_tensors(folder: Path, *renames: tuple[str, str]) -> Path:
    """Replace beginnings in the names of an adapter's tensors, the first that fits in each."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in renames:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        renamed[name] = tensor
    save_file(renamed, path)
    return folder
