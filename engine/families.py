"""Hold everything that differs between Qwen2.5-VL and Gemma 3, on both sides: processor and model.

The two families differ in how an image becomes pixels, placeholders and embeddings, in their
position ids (M-RoPE against plain), in their attention masks (causal against bidirectional inside
an image, with sliding windows) and in which tokens stop a completion or must never be sampled. No
other file tests for a family.

Position ids and masks are always made here, explicitly, from the token types: transformers makes
them silently wrong when token types are forgotten, and Qwen's model caches `rope_deltas` between
calls.

Shapes: B rows, S tokens, Q queries, H hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

if TYPE_CHECKING:  # engine.encode, which collation needs, imports this module
    from engine.collate import PromptBatch

# Tensors of one image by name. Before the vision tower: `pixel_values`. After it: `features`
# [tokens,H], one for each of the image's placeholders. In both states what else the family needs to
# place the image's tokens (Qwen: `image_grid_thw` [1,3] int64, patches in time, height and width).
ImageTensors = dict[str, Tensor]

# The language model's attention and feed-forward projections. Anchored on `language_model`: both
# vision towers have projections of the same names (SigLIP q/k/v_proj, Qwen's visual
# gate/up/down_proj), which plain suffixes would catch.
LORA_TARGETS = (
    r"^(?:.*\.)?language_model\.(?:.*\.)?layers\.\d+\."
    r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)$"
)


class Family:
    """Describe what differs between model families, one subclass each. `family_of` picks it."""

    model_type: str  # in config.json
    end_of_turn: str  # token that the chat template writes after an answer
    # tokens that stand for image content: sampled ones would have no features
    image_token_names: tuple[str, ...]
    pixel_names: tuple[str, ...]  # outputs of the image processor that are used
    layer_norms: int  # RMS norms over the hidden state in a decoder layer (engine/memory.py)
    head_norms: bool  # queries and keys have norms of their own
    sliding_layers: bool  # some layers see a window only, with masks of their own
    fixed_images: bool  # every image has the same number of tokens

    # ---- processor ----
    def image_processor(
        self, path: str | Path, config: dict, *, min_visual_tokens: int, max_visual_tokens: int
    ) -> Any:
        """Load a checkpoint's image processor, the PIL one, which needs no torchvision.

        path: local folder or hub name.
        config: its config.json.
        min_visual_tokens, max_visual_tokens: bounds on the tokens of one image, where its number of
        tokens depends on its size.
        """
        raise TypeError("use a subclass")

    def image_token_id(self, config: dict) -> int:
        """Find the id of the image placeholder in a config.json."""
        raise TypeError("use a subclass")

    def num_image_tokens(self, config: dict, image_processor: Any, image: ImageTensors) -> int:
        """Count the placeholders that an image needs in its prompt."""
        raise TypeError("use a subclass")

    def expand_placeholder(self, text: str, count: int, tokenizer: Any) -> str:
        """Replace the image's one place in a rendered chat by `count` placeholders."""
        raise TypeError("use a subclass")

    # ---- model ----
    def image_features(self, net: PreTrainedModel, image: ImageTensors) -> Tensor:
        """Embed one image -> [tokens,H], which take the place of its placeholders."""
        raise TypeError("use a subclass")

    def positions(self, net: PreTrainedModel, prompts: PromptBatch) -> Tensor:
        """Make the position ids of prompts, 0 on padding: Qwen [3,B,S], Gemma [B,S]."""
        raise TypeError("use a subclass")

    def attention_masks(
        self, net: PreTrainedModel, attention_mask: Tensor, token_types: Tensor, queries: Tensor
    ) -> dict[str, Tensor]:
        """Make the attention mask of every kind of layer -> bool [B,1,Q,S], true = sees.

        attention_mask [B,S] bool: false on padding.
        token_types [B,S] int64: 1 on image placeholders.
        queries [Q] or [B,Q] int64: places of the tokens that look.
        Kinds that see the same share one tensor.
        """
        raise TypeError("use a subclass")

    def expand_positions(self, positions: Tensor) -> Tensor:
        """Bring position ids of text tokens [B,Q] into the form that the decoder takes."""
        raise TypeError("use a subclass")

    def patches(self, config: PretrainedConfig) -> tuple[int, int]:
        """Count (the tower's patches that make one visual token, pixel values of a patch)."""
        raise TypeError("use a subclass")


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
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **bounds)
        in_force = (image_processor.size["shortest_edge"], image_processor.size["longest_edge"])
        if in_force != tuple(bounds.values()):
            raise RuntimeError(
                f"the image processor of {path} uses pixel bounds {in_force}, not"
                f" {tuple(bounds.values())} as asked for"
            )
        return image_processor

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

    def patches(self, config: PretrainedConfig) -> tuple[int, int]:
        vision = config.vision_config
        return vision.spatial_merge_size**2, 3 * vision.temporal_patch_size * vision.patch_size**2


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
        """Load it. The bounds have no effect: every image has as many tokens as the config says."""
        return AutoImageProcessor.from_pretrained(path, backend="pil")

    def image_token_id(self, config: dict) -> int:
        name = "image_token_index" if "image_token_index" in config else "image_token_id"
        return config[name]

    def num_image_tokens(self, config: dict, image_processor: Any, image: ImageTensors) -> int:
        return config["mm_tokens_per_image"]

    def expand_placeholder(self, text: str, count: int, tokenizer: Any) -> str:
        begin, end = tokenizer.boi_token, tokenizer.eoi_token
        placeholders = tokenizer.image_token * count
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

    def patches(self, config: PretrainedConfig) -> tuple[int, int]:
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches // config.mm_tokens_per_image, 3 * vision.patch_size**2


FAMILIES: dict[str, Family] = {family.model_type: family for family in (Qwen25VL(), Gemma3())}


def family_of(model_type: str | None) -> Family:
    """Find the family of a `model_type` of config.json.

    Raises ValueError for one that this engine does not train.
    """
    family = FAMILIES.get(model_type or "")
    if family is None:
        raise ValueError(
            f"a {model_type!r} model; this engine trains {' and '.join(FAMILIES)} models"
        )
    return family


def causal_mask(attention_mask: Tensor, queries: Tensor) -> Tensor:
    """Let each query see itself and every earlier token that is not padding -> bool [B,Q,S].

    attention_mask [B,S] bool: false on padding.
    queries [Q] or [B,Q] int64: places of the tokens that look.

    Padding sees itself: a row that sees nothing would be NaN, and 0 * NaN spreads through the
    values of the next layer.
    """
    keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (keys <= queries[..., None]) & attention_mask[:, None] | (keys == queries[..., None])


def text_positions(attention_mask: Tensor) -> Tensor:
    """Number the tokens of each row 0, 1, 2, ... -> [B,S], 0 on padding, wherever that is."""
    return ((attention_mask.long().cumsum(1) - 1) * attention_mask).clamp(min=0)


def next_positions(positions: Tensor) -> Tensor:
    """Give the position id of the first token after each prompt -> [B], beyond all of its axes.

    positions [3,B,S] or [B,S] int64: of the prompts.
    """
    return (positions.amax(0) if positions.dim() == 3 else positions).amax(1) + 1


def stop_ids(
    net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn_id: int
) -> frozenset[int]:
    """Collect the tokens that end a completion: the checkpoint's own and the end of a turn.

    The checkpoint's are those of generation_config.eos_token_id. This is all that is ever read from
    a generation_config: its other fields would silently change how completions are sampled.
    """
    configured = net.generation_config.eos_token_id if net.generation_config is not None else None
    if configured is None:
        configured = []
    listed = [configured] if isinstance(configured, int) else list(configured)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset(listed + eos + [end_of_turn_id])


def suppressed_ids(family: Family, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Collect the image tokens, which are never sampled and have no share in a log-probability."""
    vocabulary = tokenizer.get_vocab()
    return tuple(
        sorted(vocabulary[name] for name in family.image_token_names if name in vocabulary)
    )


def language_model(net: nn.Module) -> PreTrainedModel:
    """Find the decoder (no vision, no head) of a model, with or without adapters."""
    return unwrapped(net).model.language_model


def lm_head_weight(net: nn.Module) -> Tensor:
    """Find the frozen matrix [V,H] that turns hidden states into logits."""
    return unwrapped(net).lm_head.weight


def logit_softcap(net: nn.Module) -> float | None:
    """Read c of the soft-capping c tanh(logit / c) that the configuration asks for, or None.

    The published Gemma 3 models have none. Gemma3ForCausalLM of transformers applies it and
    Gemma3ForConditionalGeneration does not. Here every log-probability and the sampler do.
    """
    return getattr(unwrapped(net).config.get_text_config(), "final_logit_softcapping", None)


def unwrapped(net: nn.Module) -> PreTrainedModel:
    """Take the transformers model out of peft's wrapper, adapters in place."""
    inner: Any = net  # peft's wrapper where it has this method, else the model itself
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
