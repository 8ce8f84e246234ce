"""Describe Qwen2.5-VL: images of any size, M-RoPE, causal masks.

Shapes: B rows, S tokens, H hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLRMSNorm,
    Qwen2MLP,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from engine.family import Family, ImageTensors, LayerKind, causal_mask, text_positions
from engine.processor_files import load_image_processor

if TYPE_CHECKING:  # engine.encode, which collation needs, imports this module
    from engine.collate import PromptBatch

PIXEL_BOUNDS = ("min_pixels", "max_pixels")  # options of Qwen2.5-VL's image processor


class Qwen25VL(Family):
    """Describe Qwen2.5-VL (arXiv 2502.13923)."""

    model_type = "qwen2_5_vl"
    end_of_turn = "<|im_end|>"
    image_token_names = (
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    pixel_names = ("pixel_values", "image_grid_thw")
    layer_norms, head_norms, sliding_layers, fixed_images = 2, False, False, False

    def image_processor(
        self, path: str | Path, config: dict, *, min_visual_tokens: int, max_visual_tokens: int
    ) -> Any:
        """Load it with the bounds in force: it resizes each image to lie between them.

        Raises RuntimeError where the checkpoint's own bounds win, as has been seen to happen
        silently.
        """
        vision = config["vision_config"]
        pixels_per_token = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
        tokens = (min_visual_tokens, max_visual_tokens)
        pixels = [count * pixels_per_token for count in tokens]
        bounds = dict(zip(PIXEL_BOUNDS, pixels, strict=True))
        image_processor = load_image_processor(Qwen2VLImageProcessorPil, path, **bounds)
        in_force = (image_processor.size["shortest_edge"], image_processor.size["longest_edge"])
        if in_force != tuple(bounds.values()):
            raise RuntimeError(
                f"the image processor of {path} uses pixel bounds {in_force}, not"
                f" {tuple(bounds.values())} as asked for"
            )
        return image_processor

    def resize_options(self, image_processor: Any) -> dict[str, Any]:
        return {"factor": image_processor.patch_size * image_processor.merge_size}

    def image_token_id(self, config: dict) -> int:
        return config["image_token_id"]

    def num_image_tokens(self, config: dict, image_processor: Any, image: ImageTensors) -> int:
        return int(image["image_grid_thw"].prod()) // image_processor.merge_size**2

    def expand_placeholder(self, text: str, count: int, tokenizer: Any) -> str:
        return text.replace("<|image_pad|>", "<|image_pad|>" * count, 1)

    def image_features(self, net: PreTrainedModel, image: ImageTensors) -> Tensor:
        output = net.model.get_image_features(
            image["pixel_values"], image["image_grid_thw"], return_dict=True
        )
        return torch.cat(tuple(output.pooler_output))  # [tokens,H]

    def positions(self, net: PreTrainedModel, prompts: PromptBatch) -> Tensor:
        # M-RoPE in tensors alone: transformers' get_rope_index waits for the device several times a
        # prompt.
        # [B,3] patches in time, height and width
        grids = torch.cat([image["image_grid_thw"] for image in prompts.vision])
        # [B] tokens
        height, width = (grids[:, 1:] // net.config.vision_config.spatial_merge_size).unbind(1)
        height, width = height[:, None], width[:, None]
        text = text_positions(prompts.attention_mask)  # [B,S]: if all were text
        is_image = prompts.token_types == 1  # one image a row, so its tokens are one block
        seen = is_image.long().cumsum(1)  # [B,S] image tokens up to each, itself included
        index = seen - 1  # of a token within its image
        # [3,B,S]
        axes = torch.stack([index // (height * width), index // width % height, index % width])
        # text goes on beyond the image's longest side
        after = text - seen + (seen > 0) * torch.maximum(height, width)
        return torch.where(is_image, text - index + axes, after) * prompts.attention_mask  # [3,B,S]

    def expand_positions(self, positions: Tensor) -> Tensor:
        return positions[None].expand(3, -1, -1)  # text advances all three axes alike

    def attention_masks(
        self, net: PreTrainedModel, attention_mask: Tensor, token_types: Tensor, queries: Tensor
    ) -> dict[str, Tensor]:
        return {"full_attention": causal_mask(attention_mask, queries)[:, None]}

    def layer_kind(self) -> LayerKind:
        norms = "input_layernorm", None, "post_attention_layernorm", None
        return LayerKind(
            Qwen2_5_VLAttention, Qwen2MLP, Qwen2_5_VLRMSNorm, norms, (), "variance_epsilon", False
        )

    def patches(self, config: PretrainedConfig) -> tuple[int, int]:
        vision = config.vision_config
        return vision.spatial_merge_size**2, 3 * vision.temporal_patch_size * vision.patch_size**2
