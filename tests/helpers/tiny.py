"""Make small random checkpoints of the real model classes, with tokenizer and image processor.

They have the real architectures: Qwen2.5-VL's M-RoPE and windowed vision, Gemma 3's sliding and
full layers, whose window is shorter than a prompt here, Qwen3-VL's deepstack. They are saved as
folders that the product loads like any checkpoint. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from data.examples import Example
from data.prompts import Prompt
from engine.encode import EncodedPrompt, EncodedRow
from engine.model import BaseModel, attach_new_adapter, load_model
from engine.policy import Policy
from engine.random_numbers import uniform_numbers

SHORT = Prompt("short", "Which?")
QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
GEMMA_SPECIALS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
]
# Qwen3's tokenizer has these as tokens of their own, which are no control tokens.
QWEN3_ADDED = ["<think>", "</think>"]
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type']"
    " == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif"
    " %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{%"
    " endif %}"
)
GEMMA_TEMPLATE = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user'"
    " }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}<start_of_image>{% else %}{{"
    " c['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt"
    " %}<start_of_turn>model\n{% endif %}"
)


def _byte_tokenizer(specials: list[str], template: str, **names) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def save_qwen(
    folder: Path,
    seed: int = 0,
    *,
    text: dict | None = None,
    vision: dict | None = None,
    tied: bool = True,
    gain: float = 5.0,
) -> Path:
    """Save a random Qwen2.5-VL: 2 decoder layers, hidden 32. An image of 56 x 56 is 4 tokens.

    text, vision: other values of its two configurations
    tied: whether the head is the embedding
    gain: of the default initialisation. By default it is larger, so that positions, masks and the
        image visibly change the outputs.
    """
    tokenizer = _byte_tokenizer(
        QWEN_SPECIALS,
        QWEN_TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=QWEN_SPECIALS,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_SPECIALS}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer) + 5,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=tied,
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1]),
        )
        | (text or {}),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=56,
            out_hidden_size=32,
            fullatt_block_indexes=[1],
        )
        | (vision or {}),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    _multiply(model, gain)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # As on the hub: the file carries bounds of its own, which must not win over the ones asked for.
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            dict(
                image_processor_type="Qwen2VLImageProcessor",
                min_pixels=3136,
                max_pixels=12845056,
                patch_size=14,
                merge_size=2,
                temporal_patch_size=2,
                image_mean=[0.5] * 3,
                image_std=[0.5] * 3,
            )
        )
    )
    return folder


def save_qwen3(
    folder: Path,
    seed: int = 0,
    *,
    text: dict | None = None,
    vision: dict | None = None,
    tied: bool = True,
    gain: float = 5.0,
) -> Path:
    """Save a random Qwen3-VL: 3 decoder layers, the first two with deepstack features, hidden 32.

    The queries' width, 4 x 12, is not the hidden one. An image of 64 x 64 is 4 tokens. text,
    vision, tied, gain: see `save_qwen`.
    """
    tokenizer = _byte_tokenizer(
        QWEN_SPECIALS,
        QWEN_TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=QWEN_SPECIALS,
    )
    tokenizer.add_tokens(QWEN3_ADDED)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_SPECIALS}
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer) + 5,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=4096,
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            rope_parameters=dict(
                rope_type="default",
                rope_theta=10000.0,
                mrope_section=[2, 2, 2],
                mrope_interleaved=True,
            ),
        )
        | (text or {}),
        vision_config=dict(
            depth=3,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=32,
            num_position_embeddings=36,
            deepstack_visual_indexes=[0, 2],
        )
        | (vision or {}),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    _multiply(model, gain)
    # Else every token would be followed by the same one: the image's part of the states is large,
    # and scores of queries and keys of one length hardly differ.
    decoder = model.model.language_model
    torch.nn.init.normal_(decoder.embed_tokens.weight, std=0.1 * gain)
    for layer in decoder.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.5)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # as published, with the class of torchvision, which must not be needed
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            dict(
                image_processor_type="Qwen2VLImageProcessorFast",
                size=dict(shortest_edge=65_536, longest_edge=16_777_216),
                patch_size=16,
                merge_size=2,
                temporal_patch_size=2,
                image_mean=[0.5] * 3,
                image_std=[0.5] * 3,
            )
        )
    )
    return folder


def save_gemma(
    folder: Path,
    seed: int = 0,
    *,
    text: dict | None = None,
    vision: dict | None = None,
    image_tokens: int = 4,
    tied: bool = True,
    gain: float = 5.0,
) -> Path:
    """Save a random Gemma 3: 3 decoder layers (two sliding with window 24, one full), hidden 32.

    Every image is 4 tokens. text, vision, tied, gain: see `save_qwen`.
    """
    tokenizer = _byte_tokenizer(
        GEMMA_SPECIALS,
        GEMMA_TEMPLATE,
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<bos>",
        model_specific_special_tokens=dict(
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
        ),
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in GEMMA_SPECIALS}
    config = Gemma3Config(
        text_config=dict(
            vocab_size=len(tokenizer) + 5,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=24,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            max_position_embeddings=4096,
            pad_token_id=ids["<pad>"],
            eos_token_id=ids["<eos>"],
            bos_token_id=ids["<bos>"],
        )
        | (text or {}),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
        | (vision or {}),
        mm_tokens_per_image=image_tokens,
        image_token_index=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config)
    _multiply(model, gain)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.5)
    model.generation_config.eos_token_id = [ids["<eos>"], ids["<end_of_turn>"]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = config.vision_config.image_size
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            dict(
                image_processor_type="Gemma3ImageProcessor",
                size=dict(height=side, width=side),
                image_mean=[0.5] * 3,
                image_std=[0.5] * 3,
                do_pan_and_scan=False,
                image_seq_length=image_tokens,
            )
        )
    )
    return folder


@torch.no_grad()
def _multiply(model: torch.nn.Module, gain: float) -> None:
    """Multiply all weights but vectors by `gain`."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(gain)


SAVE = {"qwen2_5_vl": save_qwen, "gemma3": save_gemma, "qwen3_vl": save_qwen3}


def load(folder: Path, *, dtype: torch.dtype = torch.float32) -> BaseModel:
    """Load a checkpoint as the product does, with 4 to 16 visual tokens an image and another head.

    The tied head of a random model repeats its last token for ever. A random one gives completions
    that depend on everything.
    """
    torch.set_num_threads(1)
    model = load_model(
        str(folder),
        dtype=dtype,
        device=torch.device("cpu"),
        min_visual_tokens=4,
        max_visual_tokens=16,
    )
    head = 0.4 * torch.randn(
        model.net.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
    )
    model.net.lm_head.weight = torch.nn.Parameter(head.to(dtype), requires_grad=False)
    return model


def with_features(
    model: BaseModel, encoded: EncodedPrompt | EncodedRow
) -> EncodedPrompt | EncodedRow:
    """Put its image's features beside the pixels of an encoded prompt or row.

    Official forwards take the pixels.
    """
    if isinstance(encoded, EncodedRow):
        return dataclasses.replace(encoded, prompt=with_features(model, encoded.prompt))
    with torch.no_grad():
        seen = model.family.embed_image(model.net, encoded.vision)
    return dataclasses.replace(encoded, vision=encoded.vision | seen)


def pixel_inputs(prompts: list[EncodedPrompt]) -> dict[str, torch.Tensor]:
    """Return the image inputs of transformers' own forward."""
    return {
        name: torch.cat([prompt.vision[name] for prompt in prompts])
        for name in prompts[0].vision
        if name in ("pixel_values", "image_grid_thw")
    }


def attach_random_adapter(model: BaseModel, seed: int = 0, std: float = 0.1) -> PeftModel:
    """Attach a trainable adapter whose B is not zero, so that it changes the outputs.

    std: of B's numbers. With 1.0 it changes greedy answers, too.
    """
    torch.manual_seed(seed)
    wrapped = attach_new_adapter(model, r=4, alpha=8, dropout=0.0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return wrapped


def examples_of(images: Path, *sizes: int) -> list[Example]:
    """Make one example an image of the fixture `tiny_images`, of the given sizes in turn."""
    return [
        Example(f"e{i}", f"p{i}", f"{size}/image-{i % 3}.png", ("Edema",), "site", images)
        for i, size in enumerate(sizes)
    ]


def save_images(folder: Path, count: int, size: int = 56) -> list[str]:
    """Save random grey PNGs. Returns their names relative to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"image-{i}.png" for i in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(folder / name)
    return names


def policy_of(
    net: PreTrainedModel | PeftModel,
    base: BaseModel,
    prompt: Prompt = SHORT,
    temperature: float = 1.0,
) -> Policy:
    """Make a policy of a model with or without an adapter."""
    return Policy(net, base, prompt, temperature)


def uniform_for(prompts: int, generations: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    """Make the numbers with which so many prompts are sampled, [G,T] each."""
    return [
        uniform_numbers("rollout", seed, position, generations, length)
        for position in range(prompts)
    ]
