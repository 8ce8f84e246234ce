"""Describe what a model family has to say of itself, on both sides: processor and model.

Families differ in how an image becomes pixels, placeholders and embeddings, in their position ids
(M-RoPE against plain), in their attention masks (causal against bidirectional inside an image, with
sliding windows) and in which tokens stop a completion or must never be sampled. Each is one
subclass in a file of its own, and no other file knows its facts. `engine/families.py` lists them.

Position ids and masks are always made in these files, explicitly, from the token types:
transformers makes them silently wrong when token types are forgotten, and Qwen's models cache
`rope_deltas` between calls.

Shapes: B rows, S tokens, Q queries, H hidden, M tokens in a packed row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

if TYPE_CHECKING:  # engine.encode, which both need, imports this module
    from engine.attention import PackedMask
    from engine.collate import PromptBatch

# Tensors of one image by name. Before the vision tower: `pixel_values`. After it: `features`
# [tokens,H], one for each of the image's placeholders, and what else the family's decoder takes
# (Qwen3-VL: `deepstack`). In both states what the family needs to place the image's tokens (Qwen:
# `image_grid_thw` [1,3] int64, patches in time, height and width).
ImageTensors = dict[str, Tensor]


@dataclass(frozen=True)
class LayerKind:
    """Say how a decoder layer of transformers computes, for engine/token_layers.py.

    attention, mlp, norm: the classes of its parts.
    norms: names of the RMS norms before and after attention, before and after the MLP, None where
        there is none.
    norms_of_heads: of queries and keys, () where they have none.
    epsilon: the norms' attribute of that meaning.
    one_is_added: whether a norm multiplies by 1 + its weight.
    """

    attention: type[nn.Module]
    mlp: type[nn.Module]
    norm: type[nn.Module]
    norms: tuple[str | None, str | None, str | None, str | None]
    norms_of_heads: tuple[str, ...]
    epsilon: str
    one_is_added: bool

    @property
    def norms_of_layer(self) -> list[str]:
        """Return the names of the norms that there are."""
        return [name for name in self.norms if name is not None]


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
    # model types that are easily taken for this one and are not trained: what each is instead
    relatives: Mapping[str, str] = {}

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

    def resized(self, image_processor: Any, image: Image.Image) -> Image.Image:
        """Resize an RGB image as the image processor does, before it scales and normalises it.

        The image processor leaves the size of what comes out as it is, and so makes the same pixels
        of it, to the bit.
        """
        if not image_processor.do_resize:
            return image
        pixels = image_processor.resize(
            np.asarray(image).transpose(2, 0, 1),
            size=image_processor.size,
            resample=image_processor.resample,
            **self.resize_options(image_processor),
        )
        return Image.fromarray(pixels.transpose(1, 2, 0))

    def resize_options(self, image_processor: Any) -> dict[str, Any]:
        """Name what the image processor's resize takes beside size and resampling."""
        return {}

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

    def embed_image(self, net: PreTrainedModel, image: ImageTensors) -> ImageTensors:
        """Run the vision tower on one image -> all that `run_decoder` takes of it.

        That is `features`, and in some families tensors beside it, which a subclass adds.
        """
        return {"features": self.image_features(net, image)}

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

    def run_decoder(
        self,
        decoder: nn.Module,
        embeddings: Tensor,
        positions: Tensor,
        masks: Mapping[str, PackedMask],
        prompts: PromptBatch | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Run the decoder on one packed row -> [M,H], the states after its last norm.

        embeddings [M,H]: of the row's tokens, with image features at their places.
        positions [..,1,M] int64: position ids, as `positions` and `expand_positions` make them.
        masks: one for each kind of layer.
        prompts, places [P] int64: the prompts that the row begins with, and the flat index in [B,S]
            of each of their tokens. None while decoding, where no image is read.
        """
        return decoder(
            inputs_embeds=embeddings[None],
            position_ids=positions,
            use_cache=False,
            **self.decoder_inputs(embeddings, masks, prompts, places),
        ).last_hidden_state[0]

    def decoder_inputs(
        self,
        embeddings: Tensor,
        masks: Mapping[str, PackedMask],
        prompts: PromptBatch | None,
        places: Tensor | None,
    ) -> dict[str, Any]:
        """Name what the decoder takes beside embeddings and positions: its masks, and more.

        Arguments as those of `run_decoder`.
        """
        return {"attention_mask": masks}

    def layer_kind(self) -> LayerKind:
        """Describe the decoder's layers."""
        raise TypeError("use a subclass")

    def patches(self, config: PretrainedConfig) -> tuple[int, int]:
        """Count (the tower's patches that make one visual token, pixel values of a patch)."""
        raise TypeError("use a subclass")

    def extra_features(self, config: PretrainedConfig) -> int:
        """Count the tensors of the size of `features` that the decoder takes beside them."""
        return 0


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
