"""Describe Qwen3-VL, the dense models (arXiv 2511.21631).

An image becomes pixels, placeholders and positions as in Qwen2.5-VL, with patches of 16 in place of
14. Three things differ. The decoder gets the image a second time, as deepstack features: what some
layers of the vision tower see is added to the states after the first decoder layers. Queries and
keys have norms of their own. And M-RoPE deals the three axes to the frequencies in turn, which is
the decoder's own affair.

Shapes: B prompts of S tokens, P prompt tokens and M tokens in a packed row, L deepstack layers, H
hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextAttention,
    Qwen3VLTextMLP,
    Qwen3VLTextRMSNorm,
)

from engine.family import ImageTensors, LayerKind
from engine.qwen2_5_vl import Qwen25VL

if TYPE_CHECKING:  # engine.encode, which both need, imports this module
    from engine.attention import PackedMask
    from engine.collate import PromptBatch


class Qwen3VL(Qwen25VL):
    """Describe Qwen3-VL where it is not as Qwen2.5-VL."""

    model_type = "qwen3_vl"
    head_norms = True
    relatives = {"qwen3_vl_moe": "a mixture of experts; of Qwen3-VL the dense models are trained"}

    def embed_image(self, net: PreTrainedModel, image: ImageTensors) -> ImageTensors:
        """Run the vision tower once -> `features` [tokens,H] and `deepstack` [tokens,L,H]."""
        output = net.model.get_image_features(
            image["pixel_values"], image["image_grid_thw"], return_dict=True
        )
        layers = [torch.cat(layer) for layer in output.deepstack_features]
        return {
            "features": torch.cat(tuple(output.pooler_output)),
            "deepstack": torch.stack(layers, 1),
        }

    def decoder_inputs(
        self,
        embeddings: Tensor,
        masks: Mapping[str, PackedMask],
        prompts: PromptBatch | None,
        places: Tensor | None,
    ) -> dict[str, Any]:
        """Add the prompts' deepstack features, where there are prompts."""
        given: dict[str, Any] = {"attention_mask": masks["full_attention"]}  # its only kind
        if prompts is not None and places is not None:
            # A boolean mask of the image's tokens would make a GPU wait: transformers adds what it
            # selects. Index 0 selects the one row as a whole, so every token gets something: 0, or
            # its features.
            given["visual_pos_masks"] = torch.zeros(1, dtype=torch.long, device=embeddings.device)
            given["deepstack_visual_embeds"] = deepstack_of_row(prompts, places, embeddings)
        return given

    def layer_kind(self) -> LayerKind:
        norms = super().layer_kind().norms
        of_heads = "self_attn.q_norm", "self_attn.k_norm"
        return LayerKind(
            Qwen3VLTextAttention,
            Qwen3VLTextMLP,
            Qwen3VLTextRMSNorm,
            norms,
            of_heads,
            "variance_epsilon",
            False,
        )

    def extra_features(self, config: PretrainedConfig) -> int:
        return len(config.vision_config.deepstack_visual_indexes)


def deepstack_of_row(prompts: PromptBatch, places: Tensor, embeddings: Tensor) -> list[Tensor]:
    """Lay out what is added to a packed row after each of the first L layers -> L times [M,H].

    places [P] int64: flat index in [B,S] of the prompt tokens, which the row begins with.
    embeddings [M,H]: of the row.

    It is 0 on text.
    """
    is_image = (prompts.token_types == 1).flatten()[places]  # [P]
    is_image = pad(is_image, (0, len(embeddings) - len(places)))  # [M]: completions hold no image
    rows = torch.cat([image["deepstack"] for image in prompts.vision])  # [placeholders,L,H]
    layers = embeddings.new_zeros(len(embeddings), *rows.shape[1:])  # [M,L,H]
    # filled prompt by prompt, as engine/forward.py fills the placeholders
    layers = layers.masked_scatter(is_image[:, None, None], rows.to(embeddings.dtype))
    return list(layers.unbind(1))
