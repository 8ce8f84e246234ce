"""The model side of both families, and the only place that tests for one.

Qwen2.5-VL and Gemma 3 differ in how an image becomes embeddings, in their positions (M-RoPE against
plain), in their attention masks (causal against bidirectional inside an image, with sliding
windows) and in which tokens stop or must never be sampled. Positions and masks are always made
here, explicitly, from the token types: transformers makes them silently wrong when token types are
forgotten, and Qwen's model caches `rope_deltas` between calls.

Shapes: B rows, S tokens, I images, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from engine.collate import Prompts

# The language model's attention and feed-forward projections. Anchored on `language_model`: both
# vision towers have projections of the same names (SigLIP q/k/v_proj; Qwen's visual
# gate/up/down_proj), which plain suffixes would catch.
LORA_TARGETS = (
    r"^(?:.*\.)?language_model\.(?:.*\.)?layers\.\d+\."
    r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)$"
)


class Family:
    """What differs between model families. One subclass each; `family_of` picks it."""

    model_type: str
    # tokens that stand for image content: sampled ones would have no features
    image_token_names: tuple[str, ...]
    layer_norms: int  # RMS norms over the hidden state in a decoder layer (engine/memory.py)
    head_norms: bool  # whether queries and keys have norms of their own
    sliding_layers: bool  # whether some layers see a window only, with masks of their own
    fixed_images: bool  # whether every image has the same number of tokens

    def image_features(self, model: PreTrainedModel, image: dict[str, Tensor]) -> Tensor:
        """Embeddings of one image [tokens,H], in place of its placeholders."""
        raise TypeError("use a subclass")

    def positions(self, model: PreTrainedModel, prompts: Prompts) -> Tensor:
        """Position ids of prompts; padding has 0. Qwen [3,B,S], Gemma [B,S]."""
        raise TypeError("use a subclass")

    def attention_masks(
        self, model: PreTrainedModel, attention_mask: Tensor, token_types: Tensor, queries: Tensor
    ) -> dict[str, Tensor]:
        """Which keys the tokens at the places `queries`, [Q] or [B,Q] int64, see in rows of S
        places, for every kind of layer: bool [B,1,Q,S], true = sees; the same tensor for kinds that
        see the same.
        """
        raise TypeError("use a subclass")

    def expand_positions(self, positions: Tensor) -> Tensor:
        """Positions of text tokens [B,Q] in the form that the language model takes."""
        raise TypeError("use a subclass")

    def patches(self, config: PretrainedConfig) -> tuple[int, int]:
        """(patches of the vision tower that make one visual token, pixel values of a patch)."""
        raise TypeError("use a subclass")


class Qwen25VL(Family):
    """Qwen2.5-VL (arXiv 2502.13923)."""

    model_type = "qwen2_5_vl"
    image_token_names = (
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    layer_norms, head_norms, sliding_layers, fixed_images = 2, False, False, False

    def image_features(self, model: PreTrainedModel, image: dict[str, Tensor]) -> Tensor:
        output = model.model.get_image_features(
            image["pixel_values"], image["image_grid_thw"], return_dict=True
        )
        return torch.cat(tuple(output.pooler_output))  # [tokens,H]

    def positions(self, model: PreTrainedModel, prompts: Prompts) -> Tensor:
        # M-RoPE in tensors alone: transformers' get_rope_index waits for the device several times a
        # prompt. [B,3] patches in time, height and width
        grids = torch.cat([image["image_grid_thw"] for image in prompts.vision])
        # [B] tokens
        height, width = (grids[:, 1:] // model.config.vision_config.spatial_merge_size).unbind(1)
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
        self, model: PreTrainedModel, attention_mask: Tensor, token_types: Tensor, queries: Tensor
    ) -> dict[str, Tensor]:
        return {"full_attention": causal_mask(attention_mask, queries)[:, None]}

    def patches(self, config: PretrainedConfig) -> tuple[int, int]:
        vision = config.vision_config
        return vision.spatial_merge_size**2, 3 * vision.temporal_patch_size * vision.patch_size**2


class Gemma3(Family):
    """Gemma 3 and MedGemma (arXiv 2503.19786)."""

    model_type = "gemma3"
    image_token_names = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    layer_norms, head_norms, sliding_layers, fixed_images = 4, True, True, True

    def image_features(self, model: PreTrainedModel, image: dict[str, Tensor]) -> Tensor:
        output = model.model.get_image_features(image["pixel_values"], return_dict=True)
        return output.pooler_output.flatten(0, 1)  # [tokens,H]

    def positions(self, model: PreTrainedModel, prompts: Prompts) -> Tensor:
        return text_positions(prompts.attention_mask)  # [B,S]

    def expand_positions(self, positions: Tensor) -> Tensor:
        return positions

    def attention_masks(
        self, model: PreTrainedModel, attention_mask: Tensor, token_types: Tensor, queries: Tensor
    ) -> dict[str, Tensor]:
        causal = causal_mask(attention_mask, queries)  # [B,Q,S]
        keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # [S]
        window = model.config.get_text_config().sliding_window
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

    def patches(self, config: PretrainedConfig) -> tuple[int, int]:
        vision = config.vision_config
        return (
            vision.image_size // vision.patch_size
        ) ** 2 // config.mm_tokens_per_image, 3 * vision.patch_size**2


_FAMILIES = {family.model_type: family for family in (Qwen25VL(), Gemma3())}


def family_of(model_type: str) -> Family:
    """The family of a configuration's `model_type`. Raises ValueError for one that this engine does
    not train.
    """
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not supported; this engine trains"
            f" {' and '.join(_FAMILIES)} models"
        )
    return _FAMILIES[model_type]


def causal_mask(attention_mask: Tensor, queries: Tensor) -> Tensor:
    """[B,S] bool, places `queries` [Q] or [B,Q] int64 -> [B,Q,S] bool: the tokens there see
    themselves and every earlier token that is not padding.

    Padding sees itself: a row that sees nothing would be NaN, and 0 * NaN spreads through the
    values of the next layer.
    """
    keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (keys <= queries[..., None]) & attention_mask[:, None] | (keys == queries[..., None])


def text_positions(attention_mask: Tensor) -> Tensor:
    """Positions 0, 1, 2, ... of the tokens of each row [B,S], wherever its padding is; 0 on
    padding.
    """
    return ((attention_mask.long().cumsum(1) - 1) * attention_mask).clamp(min=0)


def next_positions(positions: Tensor) -> Tensor:
    """[3,B,S] or [B,S] positions of prompts -> [B]: of the first token after each, which lies
    beyond all of its axes.
    """
    return (positions.amax(0) if positions.dim() == 3 else positions).amax(1) + 1


def stop_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn_id: int
) -> frozenset[int]:
    """Tokens that end a completion: the checkpoint's own (generation_config.eos_token_id) and the
    chat template's end of turn.

    This is all that is ever read from a generation_config: its other fields would silently change
    how completions are sampled.
    """
    configured = (
        model.generation_config.eos_token_id if model.generation_config is not None else None
    )
    listed = (
        []
        if configured is None
        else [configured]
        if isinstance(configured, int)
        else list(configured)
    )
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset(listed + eos + [end_of_turn_id])


def suppressed_ids(family: Family, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Image tokens, which the sampler never draws and which are left out of every log-probability's
    vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    return tuple(
        sorted(vocabulary[name] for name in family.image_token_names if name in vocabulary)
    )


def language_model(model: nn.Module) -> PreTrainedModel:
    """The decoder (no vision, no head) of a model of either family, with or without adapters around
    it.
    """
    return unwrapped(model).model.language_model


def lm_head_weight(model: nn.Module) -> Tensor:
    """[V,H], frozen."""
    return unwrapped(model).lm_head.weight


def logit_softcap(model: nn.Module) -> float | None:
    """c of the soft-capping c tanh(logit / c) that the configuration asks for; None without (the
    published Gemma 3 models).

    Of transformers' classes Gemma3ForCausalLM applies it and Gemma3ForConditionalGeneration does
    not; here every log-probability and the sampler do.
    """
    return getattr(unwrapped(model).config.get_text_config(), "final_logit_softcapping", None)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's wrapper, adapters in place; the model itself where there
    is no wrapper.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model
