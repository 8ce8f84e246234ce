"""Make the configurations of the real models, with their published sizes, for tests on the meta
device. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from engine.attention import IMPLEMENTATION
from engine.base_model import BaseModel
from engine.families import family_of


def qwen2_5_vl(size: str) -> Qwen2_5_VLConfig:
    """Describe Qwen/Qwen2.5-VL-3B, 7B, 32B and 72B-Instruct.

    Their config.json: 3.75, 8.29, 33.45 and 73.41 B parameters. The head is tied in the first only.
    """
    vocabulary, hidden, intermediate, layers, heads, kept = {
        "3B": (151_936, 2048, 11_008, 36, 16, 2),
        "7B": (152_064, 3584, 18_944, 28, 28, 4),
        "32B": (152_064, 5120, 27_648, 64, 40, 8),
        "72B": (152_064, 8192, 29_568, 80, 64, 8),
    }[size]
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kept,
            max_position_embeddings=128_000,
            rms_norm_eps=1e-6,
            tie_word_embeddings=size == "3B",
            bos_token_id=151_643,
            eos_token_id=151_645,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
        ),
        vision_config=dict(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420 if size in ("3B", "7B") else 3456,
            num_heads=16,
            out_hidden_size=hidden,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
        ),
        image_token_id=151_655,
        video_token_id=151_656,
        vision_start_token_id=151_652,
        vision_end_token_id=151_653,
        tie_word_embeddings=size == "3B",
    )


def qwen_3b() -> Qwen2_5_VLConfig:
    """Describe Qwen/Qwen2.5-VL-3B-Instruct."""
    return qwen2_5_vl("3B")


def gemma3(size: str) -> Gemma3Config:
    """Describe google/gemma-3-4b-it and 27b-it, and MedGemma of these sizes, trained further.

    4.30 and 27.43 B parameters, the head tied to the embedding. Layers that see everything have
    their positions divided by 8 (rope_scaling linear), as in config.json on the hub.
    """
    hidden, intermediate, layers, heads, kept, width, scalar = {
        "4B": (2560, 10_240, 34, 8, 4, 256, 256),
        "27B": (5376, 21_504, 62, 32, 16, 128, 168),
    }[size]
    return Gemma3Config(
        text_config=dict(
            vocab_size=262_208,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kept,
            head_dim=width,
            query_pre_attn_scalar=scalar,
            max_position_embeddings=131_072,
            sliding_window=1024,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling=dict(factor=8.0, rope_type="linear"),
            layer_types=[
                "full_attention" if layer % 6 == 5 else "sliding_attention"
                for layer in range(layers)
            ],
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        ),
        vision_config=dict(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=896,
            patch_size=14,
            vision_use_head=False,
        ),
        mm_tokens_per_image=256,
        image_token_index=262_144,
        boi_token_index=255_999,
        eoi_token_index=256_000,
    )


def gemma_4b() -> Gemma3Config:
    """Describe google/gemma-3-4b-it, and MedGemma-4B."""
    return gemma3("4B")


def qwen3_vl(size: str) -> Qwen3VLConfig:
    """Describe Qwen/Qwen3-VL-2B, 4B and 8B-Instruct.

    Their config.json: 2.13, 4.44 and 8.77 B parameters. The head is tied in the first two.
    """
    hidden, intermediate, layers, heads = {
        "2B": (2048, 6144, 28, 16),
        "4B": (2560, 9728, 36, 32),
        "8B": (4096, 12_288, 36, 32),
    }[size]
    tower = (
        dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack=[8, 16, 24])
        if size == "8B"
        else dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack=[5, 11, 17])
    )
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=262_144,
            rms_norm_eps=1e-6,
            bos_token_id=151_643,
            eos_token_id=151_645,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=5e6,
                mrope_section=[24, 20, 20],
                mrope_interleaved=True,
            ),
        ),
        vision_config=dict(
            deepstack_visual_indexes=tower.pop("deepstack"),
            num_heads=16,
            num_position_embeddings=2304,
            out_hidden_size=hidden,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            **tower,
        ),
        image_token_id=151_655,
        video_token_id=151_656,
        vision_start_token_id=151_652,
        vision_end_token_id=151_653,
        tie_word_embeddings=size != "8B",
    )


REAL_CONFIGS = {"qwen2_5_vl": qwen_3b, "gemma3": gemma_4b, "qwen3_vl": lambda: qwen3_vl("4B")}


def base_of(
    config: PretrainedConfig, device: torch.device | str, *, stop_ids: Iterable[int] = ()
) -> BaseModel:
    """Make a frozen base as the product loads it, in bf16, without files and without a tokenizer.

    device: where torch fills the weights as it does by default, "meta" for none.
    """
    with torch.device(device):
        net = AutoModelForImageTextToText.from_config(
            config,
            dtype=torch.bfloat16,
            attn_implementation={"": "sdpa", "text_config": IMPLEMENTATION},
        )
    net.requires_grad_(False).eval()
    family = family_of(config.model_type)
    suppressed = (family.image_token_id(config.to_dict()),)
    encoder: Any = SimpleNamespace(pad_token_id=0)
    name = f"{config.model_type} without files"
    return BaseModel(name, net, family, encoder, frozenset(stop_ids), suppressed, None)
