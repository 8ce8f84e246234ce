"""Make the configurations of the two real models, with their published sizes, for tests on the meta
device. Nothing is downloaded.
"""

from __future__ import annotations

from transformers import Gemma3Config, Qwen2_5_VLConfig


def qwen_3b() -> Qwen2_5_VLConfig:
    """Describe Qwen/Qwen2.5-VL-3B-Instruct: 3.75 B parameters, head tied to the embedding."""
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=151_936,
            hidden_size=2048,
            intermediate_size=11_008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            max_position_embeddings=128_000,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            bos_token_id=151_643,
            eos_token_id=151_645,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
        ),
        vision_config=dict(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            out_hidden_size=2048,
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
        tie_word_embeddings=True,
    )


def gemma_4b() -> Gemma3Config:
    """Describe google/gemma-3-4b-it, and MedGemma-4B, which is further trained: 4.30 B parameters,
    head tied to the embedding.
    """
    return Gemma3Config(
        text_config=dict(
            vocab_size=262_208,
            hidden_size=2560,
            intermediate_size=10_240,
            num_hidden_layers=34,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            query_pre_attn_scalar=256,
            max_position_embeddings=131_072,
            sliding_window=1024,
            layer_types=[
                "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(34)
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


REAL_CONFIGS = {"qwen2_5_vl": qwen_3b, "gemma3": gemma_4b}
