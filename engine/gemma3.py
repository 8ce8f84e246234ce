"""Describe Gemma 3: images of one size, plain positions, windows, an image that sees all of itself.

Shapes: B rows, S tokens, Q queries, H hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3MLP, Gemma3RMSNorm

from engine.family import Family, ImageTensors, LayerKind, causal_mask, text_positions
from engine.processor_files import load_image_processor

if TYPE_CHECKING:  # engine.encode, which collation needs, imports this module
    from engine.collate import PromptBatch


class Gemma3(Family):
    """Describe Gemma 3 and MedGemma (arXiv 2503.19786)."""

    model_type = "gemma3"
    end_of_turn = "<end_of_turn>"
    image_token_names = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    pixel_names = ("pixel_values",)
    layer_norms, head_norms, sliding_layers, fixed_images = 4, True, True, True

    def image_processor(
        self, path: str | Path, config: dict, *, min_visual_tokens: int, max_visual_tokens: int
    ) -> Any:
        """Load it, without pan and scan: an image is itself, and no crops of it.

        The bounds have no effect: every image has as many tokens as the config says.
        """
        return load_image_processor(Gemma3ImageProcessorPil, path, do_pan_and_scan=False)

    def image_token_id(self, config: dict) -> int:
        name = "image_token_index" if "image_token_index" in config else "image_token_id"
        return config[name]

    def num_image_tokens(self, config: dict, image_processor: Any, image: ImageTensors) -> int:
        return config["mm_tokens_per_image"]

    def expand_placeholder(self, text: str, count: int, tokenizer: Any) -> str:
        # older tokenizers have the tokens, but no names for them
        names = ("image_token", "boi_token", "eoi_token")
        published = zip(names, self.image_token_names, strict=True)
        image, begin, end = (getattr(tokenizer, name, token) for name, token in published)
        placeholders = image * count
        return text.replace(begin, f"\n\n{begin}{placeholders}{end}\n\n", 1)

    def image_features(self, net: PreTrainedModel, image: ImageTensors) -> Tensor:
        output = net.model.get_image_features(image["pixel_values"], return_dict=True)
        return output.pooler_output.flatten(0, 1)  # [tokens,H]

    def positions(self, net: PreTrainedModel, prompts: PromptBatch) -> Tensor:
        return text_positions(prompts.attention_mask)  # [B,S]

    def expand_positions(self, positions: Tensor) -> Tensor:
        return positions

    def attention_masks(
        self, net: PreTrainedModel, attention_mask: Tensor, token_types: Tensor, queries: Tensor
    ) -> dict[str, Tensor]:
        causal = causal_mask(attention_mask, queries)  # [B,Q,S]
        keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # [S]
        window = net.config.get_text_config().sliding_window
        near = queries[..., None] - keys < window  # [Q,S] or [B,Q,S]
        is_image = token_types == 1  # [B,S]; one image a row, so its tokens are one block
        # [B,Q,S]
        same_image = (
            is_image.gather(1, queries.expand(len(is_image), -1))[..., None] & is_image[:, None]
        )
        full = (causal | same_image)[:, None]
        return {
            "full_attention": full,
            "sliding_attention": (
                full if window >= len(keys) else (causal & near | same_image)[:, None]
            ),
        }

    def layer_kind(self) -> LayerKind:
        norms = (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
        of_heads = "self_attn.q_norm", "self_attn.k_norm"
        return LayerKind(Gemma3Attention, Gemma3MLP, Gemma3RMSNorm, norms, of_heads, "eps", True)

    def patches(self, config: PretrainedConfig) -> tuple[int, int]:
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches // config.mm_tokens_per_image, 3 * vision.patch_size**2
