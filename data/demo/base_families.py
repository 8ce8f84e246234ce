"""Describe the demo's two base checkpoints, Qwen2.5-VL and Gemma 3, where they differ.

They differ in tokenizer, chat template, configuration, and how a picture becomes pixels and
placeholders. `build_base.py` trains either with the same data, tasks, schedule and losses.

Both have about 2 M parameters, a language model of 4 layers and width 160, and 16 visual tokens for
a 112 px picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BaseImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.demo.anatomy import IMAGE_SIZE
from data.demo.radiographs import GRID_SIZE

VOCABULARY_SIZE = 1024  # at most; the corpus has fewer merges
PATCH_SIZE, MERGE_SIZE, HIDDEN_SIZE = 14, 2, 160
LAYERS, HEADS, KEY_VALUE_HEADS, FEED_FORWARD_SIZE = 4, 4, 2, 416
TOWER_LAYERS, TOWER_HIDDEN_SIZE, TOWER_HEADS = 4, 128, 4
VISUAL_TOKENS = GRID_SIZE * GRID_SIZE


class BaseFamily:
    """Describe one family of base checkpoint."""

    folder: Path  # of the shipped checkpoint
    special_tokens: tuple[str, ...]
    chat_template: str
    # text that the template writes beside its special tokens, for the tokenizer to learn from
    chat_words: str
    end_of_turn: str
    image_token: str
    # of the argument that marks image tokens: transformers goes wrong silently without it
    token_types_name: str

    def train_tokenizer(self, texts: Iterator[str]) -> PreTrainedTokenizerBase:
        """Learn a tokenizer of the family's form from texts."""
        raise TypeError("use a subclass")

    def build_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Build the model with random weights."""
        raise TypeError("use a subclass")

    def image_processor(self) -> BaseImageProcessor:
        """Build the image processor that keeps the demo's pictures as they are."""
        raise TypeError("use a subclass")

    def pixel_inputs(self, images: np.ndarray) -> dict[str, torch.Tensor]:
        """Turn pictures, uint8 [B,112,112], into what the image processor would make of them."""
        raise TypeError("use a subclass")

    def expand_image(self, rendered: str) -> str:
        """Turn the image's one place in a rendered prompt into 16 placeholders."""
        raise TypeError("use a subclass")

    def vision_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """List the modules between pixels and language model, in order.

        The output of the last one is the visual tokens, in its `pooler_output` where it has one.
        """
        raise TypeError("use a subclass")

    def special_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        """Find the ids of the special tokens."""
        vocabulary = tokenizer.get_vocab()
        return {token: vocabulary[token] for token in self.special_tokens}

    def _normalised(self, images: np.ndarray) -> torch.Tensor:
        processor: Any = self.image_processor()  # its class declares no mean
        mean, std = (
            torch.tensor(values)[None, :, None, None]
            for values in (processor.image_mean, processor.image_std)
        )
        return (torch.from_numpy(images).float()[:, None] / 255.0 - mean) / std  # [B,3,112,112]


class Qwen25VLBase(BaseFamily):
    """Describe the Qwen base: byte-level BPE, M-RoPE, a tower that merges 2 x 2 patches."""

    folder = Path(__file__).parent / "base"
    special_tokens = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    chat_template = """\
{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
    chat_words = "system\nuser\nassistant\n"
    end_of_turn, image_token, token_types_name = "<|im_end|>", "<|image_pad|>", "mm_token_type_ids"

    def train_tokenizer(self, texts: Iterator[str]) -> Qwen2Tokenizer:
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=VOCABULARY_SIZE - len(self.special_tokens),
                min_frequency=3,
                show_progress=False,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            ),
        )
        vocabulary, merges = _learned(bpe)
        return Qwen2Tokenizer(
            vocab=vocabulary,
            merges=merges,  # type: ignore[arg-type]  # pairs are right, annotated as str
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            extra_special_tokens=list(self.special_tokens[1:]),
            chat_template=self.chat_template,
        )

    def build_model(self, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
        ids = self.special_ids(tokenizer)
        config = Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=len(tokenizer),
                hidden_size=HIDDEN_SIZE,
                intermediate_size=FEED_FORWARD_SIZE,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KEY_VALUE_HEADS,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                # The three sections (time, height, width) sum to half of the head size of 40.
                rope_parameters=dict(
                    rope_type="default", rope_theta=10000.0, mrope_section=[6, 7, 7]
                ),
                bos_token_id=ids["<|endoftext|>"],
                eos_token_id=ids["<|im_end|>"],
                pad_token_id=ids["<|endoftext|>"],
            ),
            vision_config=dict(
                depth=TOWER_LAYERS,
                hidden_size=TOWER_HIDDEN_SIZE,
                intermediate_size=320,
                num_heads=TOWER_HEADS,
                patch_size=PATCH_SIZE,
                spatial_merge_size=MERGE_SIZE,
                temporal_patch_size=2,
                out_hidden_size=HIDDEN_SIZE,
                # Full attention everywhere: one window would hold the whole picture anyway.
                window_size=IMAGE_SIZE,
                fullatt_block_indexes=list(range(TOWER_LAYERS)),
            ),
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=True,
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
        model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
        model.generation_config.pad_token_id = ids["<|endoftext|>"]
        return model

    def image_processor(self) -> Qwen2VLImageProcessorPil:
        pixels = IMAGE_SIZE * IMAGE_SIZE  # the demo's pictures keep their size: 16 visual tokens
        return Qwen2VLImageProcessorPil(
            patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, min_pixels=pixels, max_pixels=pixels
        )

    def pixel_inputs(self, images: np.ndarray) -> dict[str, torch.Tensor]:
        """Make pixel_values [B*64,1176] and image_grid_thw [B,3]."""
        side = IMAGE_SIZE // PATCH_SIZE // MERGE_SIZE
        x = self._normalised(images).view(
            -1, 3, side, MERGE_SIZE, PATCH_SIZE, side, MERGE_SIZE, PATCH_SIZE
        )
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, side, side, merge, merge, 3, patch, patch]
        # one picture stands for both frames of a temporal patch
        x = x.unsqueeze(6).expand(*x.shape[:6], 2, *x.shape[6:])
        grid = [1, side * MERGE_SIZE, side * MERGE_SIZE]
        return dict(
            pixel_values=x.reshape(-1, 3 * 2 * PATCH_SIZE**2),
            image_grid_thw=torch.tensor([grid] * len(images)),
        )

    def expand_image(self, rendered: str) -> str:
        return rendered.replace(self.image_token, self.image_token * VISUAL_TOKENS)

    def vision_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        return [model.model.visual]


class Gemma3Base(BaseFamily):
    """Describe the Gemma base: SentencePiece's form of BPE with byte fallback, a SigLIP tower.

    The tower's 8 x 8 patches are pooled to 4 x 4. Attention is bidirectional inside the image, and
    sliding layers alternate with full ones. The window is shorter than the demo's prompt, so an
    answer sees the image in the full layers only.
    """

    folder = Path(__file__).parent / "base_gemma"
    special_tokens = (  # the first five have Gemma's own ids, 0 to 4
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    )
    # As Gemma's: there is no system role, its text opens the first user turn, texts are trimmed. A
    # backslash at a line's end joins it with the next.
    chat_template = """\
{{- bos_token -}}
{%- set opening = namespace(text='') -%}
{%- for message in messages -%}
    {%- set content = [{'type': 'text', 'text': message.content}] \
if message.content is string else message.content -%}
    {%- if message.role == 'system' -%}
        {%- set opening.text = content[0].text + '\\n\\n' -%}
    {%- else -%}
        {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) \
+ '\\n' + opening.text -}}
        {%- set opening.text = '' -%}
        {%- for part in content -%}
            {%- if part.type == 'image' -%}
                {{- '<start_of_image>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text | trim -}}
            {%- endif -%}
        {%- endfor -%}
        {{- '<end_of_turn>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""
    chat_words = "user\nmodel\n\n\n\n"
    end_of_turn, image_token, token_types_name = (
        "<end_of_turn>",
        "<image_soft_token>",
        "token_type_ids",
    )

    def train_tokenizer(self, texts: Iterator[str]) -> GemmaTokenizer:
        """Learn merges inside words, single digits and runs of other characters.

        Gemma's tokenizer applies its merges to the whole text, spaces as U+2581, and SentencePiece
        learned them like this. So no token crosses such a border, and a label is the same tokens
        behind a tag as at the beginning of a text.
        """
        space = "\N{LOWER ONE EIGHTH BLOCK}"
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Replace(" ", space)
        bpe.pre_tokenizer = pre_tokenizers.Split(
            Regex(
                rf"{space}?\p{{L}}+|{space}?\p{{N}}|\n+|{space}?[^{space}\p{{L}}\p{{N}}\n]+|{space}"
            ),
            "isolated",
        )
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=VOCABULARY_SIZE - len(self.special_tokens) - len(byte_tokens),
                min_frequency=3,
                show_progress=False,
            ),
        )
        learned, merges = _learned(bpe)
        tokens = [*self.special_tokens[:5], *byte_tokens, *sorted(learned, key=learned.__getitem__)]
        return GemmaTokenizer(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,  # type: ignore[arg-type]  # pairs are right, annotated as str
            extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
            chat_template=self.chat_template,
            model_specific_special_tokens=dict(
                boi_token="<start_of_image>",
                eoi_token="<end_of_image>",
                image_token=self.image_token,
            ),
        )

    def build_model(self, tokenizer: PreTrainedTokenizerBase) -> Gemma3ForConditionalGeneration:
        ids = self.special_ids(tokenizer)
        head_size = HIDDEN_SIZE // HEADS
        config = Gemma3Config(
            text_config=dict(
                vocab_size=len(tokenizer),
                hidden_size=HIDDEN_SIZE,
                intermediate_size=FEED_FORWARD_SIZE,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KEY_VALUE_HEADS,
                head_dim=head_size,
                query_pre_attn_scalar=head_size,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                sliding_window=32,
                layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
                # Gemma multiplies embeddings by sqrt(hidden). With its 0.02 they would be a quarter
                # of what each normalised sublayer adds to them. So they are 1, as the visual tokens
                # below.
                initializer_range=HIDDEN_SIZE**-0.5,
                pad_token_id=ids["<pad>"],
                eos_token_id=ids["<eos>"],
                bos_token_id=ids["<bos>"],
            ),
            vision_config=dict(
                hidden_size=TOWER_HIDDEN_SIZE,
                intermediate_size=512,
                num_hidden_layers=TOWER_LAYERS,
                num_attention_heads=TOWER_HEADS,
                image_size=IMAGE_SIZE,
                patch_size=PATCH_SIZE,
                vision_use_head=False,
            ),
            mm_tokens_per_image=VISUAL_TOKENS,
            image_token_index=ids["<image_soft_token>"],
            boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"],
            tie_word_embeddings=True,
        )
        model = Gemma3ForConditionalGeneration(config)
        # transformers begins with zeros, which leaves every picture the same.
        nn.init.normal_(
            model.model.multi_modal_projector.mm_input_projection_weight,
            std=TOWER_HIDDEN_SIZE**-0.5,
        )
        model.generation_config.eos_token_id = [ids["<eos>"], ids["<end_of_turn>"]]
        model.generation_config.pad_token_id = ids["<pad>"]
        return model

    def image_processor(self) -> Gemma3ImageProcessorPil:
        size = dict(height=IMAGE_SIZE, width=IMAGE_SIZE)
        return Gemma3ImageProcessorPil(
            size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_pan_and_scan=False
        )

    def pixel_inputs(self, images: np.ndarray) -> dict[str, torch.Tensor]:
        """Make pixel_values [B,3,112,112]."""
        return dict(pixel_values=self._normalised(images))

    def expand_image(self, rendered: str) -> str:
        placeholders = self.image_token * VISUAL_TOKENS
        return rendered.replace(
            "<start_of_image>", f"\n\n<start_of_image>{placeholders}<end_of_image>\n\n"
        )

    def vision_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        return [model.model.vision_tower, model.model.multi_modal_projector]


def _learned(bpe: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Take (vocabulary, merges) out of a trained BPE model."""
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


# by `model_type`
BASE_FAMILIES: dict[str, BaseFamily] = {"qwen2_5_vl": Qwen25VLBase(), "gemma3": Gemma3Base()}
