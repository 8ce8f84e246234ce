"""Protect what holds for all model families.

Checked: LoRA on the real sizes, chat templates as the real models have them, image tokens of real
images, that no pass forgets positions, masks or token types, models of the hub, one place for
family facts.

Run: pytest tests/engine/test_families.py
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers.utils.hub
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

import engine.forward
import eval.evaluate
import run_grpo
import run_sft
from data.check import CONTROL_TOKENS
from data.examples import Example
from data.prompts import PROMPTS, SYSTEM_PROMPT, Prompt
from engine.attention import IMPLEMENTATION, PackedMask
from engine.collate import PromptBatch, collate_prompts, collate_rows
from engine.encode import Encoder
from engine.families import FAMILIES, family_of, stop_ids
from engine.forward import completion_logprobs
from engine.memory import lora_parameters, model_shape
from engine.model import BaseModel, attach_new_adapter
from engine.optim import trainable_parameters
from engine.runtime import main_guard
from tests.helpers.real_configs import (
    REAL_CONFIGS,
    gemma3,
    gemma_4b,
    qwen2_5_vl,
    qwen3_vl,
    qwen_3b,
)
from tests.helpers.repository import ROOT, product_files
from tests.helpers.runs import (
    GRPO,
    SFT,
    adapter,
    assert_same_run,
    grpo,
    lines,
    record,
    snapshot,
    speak,
)
from tests.helpers.tiny import SAVE, attach_random_adapter, examples_of, load, with_features

PROMPT = PROMPTS["demo"]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


# ---- the real sizes ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "config", "layers", "modules", "trainable", "total"),
    [
        # r (in + out) a projection, r 16. Qwen2.5-VL-3B: q and o 2048 + 2048, k and v 2048 + 256,
        # gate, up and down 2048 + 11008: 16 (2 x 4096 + 2 x 2304 + 3 x 13056) = 831,488 a layer, x
        # 36 = 29,933,568. Total: the published checkpoint's 3,754,622,976.
        ("qwen2_5_vl", qwen_3b(), 36, 252, 29_933_568, 3_754_622_976),
        # 7B: q and o 3584 + 3584, k and v 3584 + 512, gate, up and down 3584 + 18944: 16 (2 x 7168
        # + 2 x 4096 + 3 x 22528) = 1,441,792, x 28
        ("qwen2_5_vl", qwen2_5_vl("7B"), 28, 196, 40_370_176, 8_292_166_656),
        # 32B: 16 (2 x 10240 + 2 x 6144 + 3 x 32768) = 2,097,152, x 64
        ("qwen2_5_vl", qwen2_5_vl("32B"), 64, 448, 134_217_728, 33_452_718_336),
        # 72B: 16 (2 x 16384 + 2 x 9216 + 3 x 37760) = 2,631,680, x 80
        ("qwen2_5_vl", qwen2_5_vl("72B"), 80, 560, 210_534_400, 73_410_777_344),
        # Gemma 3 4B: q and o 2560 + 8 x 256, k and v 2560 + 4 x 256, gate, up and down 2560 +
        # 10240: 16 (2 x 4608 + 2 x 3584 + 3 x 12800) = 876,544 a layer, x 34 = 29,802,496. Total:
        # the published 4,300,079,472.
        ("gemma3", gemma_4b(), 34, 238, 29_802_496, 4_300_079_472),
        # 27B: q and o 5376 + 32 x 128, k and v 5376 + 16 x 128: 16 (2 x 9472 + 2 x 7424 + 3 x
        # 26880) = 1,830,912, x 62
        ("gemma3", gemma3("27B"), 62, 434, 113_516_544, 27_432_406_640),
        # Qwen3-VL: q and o hidden + 128 x heads, k and v hidden + 8 x 128, gate, up and down hidden
        # + intermediate. Totals: the published checkpoints'. 2B: 16 (2 x 4096 + 2 x 3072 + 3 x
        # 8192) = 622,592 a layer, x 28
        ("qwen3_vl", qwen3_vl("2B"), 28, 196, 17_432_576, 2_127_532_032),
        # 4B: 16 (2 x 6656 + 2 x 3584 + 3 x 12288) = 917,504, x 36
        ("qwen3_vl", qwen3_vl("4B"), 36, 252, 33_030_144, 4_437_815_808),
        # 8B: 16 (2 x 8192 + 2 x 5120 + 3 x 16384) = 1,212,416, x 36
        ("qwen3_vl", qwen3_vl("8B"), 36, 252, 43_646_976, 8_767_123_696),
    ],
)
def test_lora_on_the_real_sizes(family, config, layers, modules, trainable, total):
    assert config.model_type == family
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    # before adapters; the tied head counts once
    assert sum(parameter.numel() for parameter in base.parameters()) == total
    tied = base.lm_head.weight is base.get_input_embeddings().weight
    assert tied == config.tie_word_embeddings == (family == "gemma3" or total < 8e9)
    shape = model_shape(config, total)
    assert lora_parameters(shape, 16) == trainable and shape.layers == layers
    model = BaseModel(family, base, family_of(family), None, frozenset(), (), None)
    wrapped = attach_new_adapter(model, r=16, alpha=32, dropout=0.1)
    trained = dict(trainable_parameters(wrapped))
    places = Counter(re.sub(r"\.lora_[AB]\.default\.weight$", "", name) for name in trained)
    assert len(places) == modules == 7 * layers and set(places.values()) == {2}
    pattern = re.compile(
        r"base_model\.model\.model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
    )
    assert all(pattern.fullmatch(name) for name in places)  # none in vision, none on the head
    assert sum(parameter.numel() for parameter in trained.values()) == trainable
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


@pytest.mark.parametrize("size", ["4B", "27B"])
def test_gemmas_positions_as_published(size):
    """config.json on the hub divides the positions of the layers that see everything by 8."""
    text = gemma3(size).get_text_config()
    full, sliding = (text.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    assert (full["rope_type"], full["factor"], full["rope_theta"]) == ("linear", 8.0, 1e6)
    assert (sliding["rope_type"], sliding["rope_theta"]) == ("default", 1e4)
    assert text.attn_logit_softcapping is None and text.final_logit_softcapping is None
    assert text.layer_types.count("full_attention") == {"4B": 5, "27B": 10}[size]


def test_qwen3s_configuration_as_published(tiny_checkpoint, tmp_path):
    """Written by transformers 4.57: rope_scaling, torch_dtype, a vision part that names the whole
    model, ties in both parts.
    """
    folder = shutil.copytree(tiny_checkpoint("qwen3_vl"), tmp_path / "model")
    config = record(folder / "config.json")
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {
        "rope_theta": int(rope["rope_theta"]),
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": rope["mrope_section"],
            "rope_type": "default",
        },
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
    }
    config["vision_config"] |= {"model_type": "qwen3_vl", "in_channels": 3}
    config["vision_config"].pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.57.0"}))
    ours, theirs = (load(path).net for path in (folder, tiny_checkpoint("qwen3_vl")))
    found, expected = (net.config.text_config.rope_parameters for net in (ours, theirs))
    assert {name: found[name] for name in ("rope_theta", "rope_type", "mrope_section")} == {
        name: expected[name] for name in ("rope_theta", "rope_type", "mrope_section")
    }
    for net in (ours, theirs):
        assert net.config.text_config._attn_implementation == IMPLEMENTATION
        assert net.config.vision_config._attn_implementation == "sdpa"
        assert net.config.vision_config.model_type == "qwen3_vl_vision"
    weights = dict(theirs.named_parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.named_parameters())


def test_gemmas_layers_of_the_real_size():
    text = REAL_CONFIGS["gemma3"]().get_text_config()
    assert text.sliding_window == 1024
    assert [layer for layer, kind in enumerate(text.layer_types) if kind == "full_attention"] == [
        5,
        11,
        17,
        23,
        29,
    ]


# ---- chat templates and image tokens -------------------------------------------------------------
# Re-created from what the published templates do, and checked below against chats written out by
# hand. Gemma 3: the system text opens the first user turn, texts are trimmed, roles must alternate.
GEMMA_AS_PUBLISHED = """{{- bos_token -}}
{%- set ns = namespace(head='') -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set given = messages[0]['content'] -%}
  {%- set ns.head = (given if given is string else given[0]['text']) + '\\n\\n' -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
  {%- if (turn['role'] == 'user') != loop.index0 is even -%}
    {{- raise_exception('roles must alternate') -}}
  {%- endif -%}
  {{- '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else 'user') + '\\n' -}}
  {{- ns.head if loop.first else '' -}}
  {%- if turn['content'] is string -%}{{- turn['content'] | trim -}}{%- else -%}
    {%- for part in turn['content'] -%}
      {%- if part['type'] == 'image' -%}{{- '<start_of_image>' -}}
      {%- else -%}{{- part['text'] | trim -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""
# Qwen2.5-VL: a system turn of its own, with a default text where the chat has none.
QWEN_AS_PUBLISHED = """{%- for turn in messages -%}
  {%- if loop.first and turn['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
  {%- endif -%}
  {{- '<|im_start|>' + turn['role'] + '\\n' -}}
  {%- if turn['content'] is string -%}{{- turn['content'] -}}{%- else -%}
    {%- for part in turn['content'] -%}
      {%- if part['type'] == 'image' or 'image' in part -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
# Qwen3-VL: no default system text, images and videos by their keys, tools and calls left out here.
QWEN3_AS_PUBLISHED = """{%- if messages[0].role == 'system' -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if messages[0].content is string -%}{{- messages[0].content -}}{%- else -%}
    {%- for part in messages[0].content if 'text' in part -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for turn in messages if turn.role in ('user', 'assistant') -%}
  {{- '<|im_start|>' + turn.role + '\\n' -}}
  {%- if turn.content is string -%}{{- turn.content -}}{%- else -%}
    {%- for part in turn.content -%}
      {%- if turn.role == 'user' and (part.type == 'image' or 'image' in part) -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
AS_PUBLISHED = {
    "qwen2_5_vl": QWEN_AS_PUBLISHED,
    "gemma3": GEMMA_AS_PUBLISHED,
    "qwen3_vl": QWEN3_AS_PUBLISHED,
}


def encoder_of(folder, lowest=4, highest=16) -> Encoder:
    return Encoder.from_pretrained(folder, min_visual_tokens=lowest, max_visual_tokens=highest)


def test_published_chat_templates_carry_our_system_text(family, tiny_checkpoint, tiny_images):
    encoder = encoder_of(tiny_checkpoint(family))
    encoder.tokenizer.chat_template = AS_PUBLISHED[family]
    # A 56 x 56 image is 4 tokens in all. Gemma's processor sets its image apart by empty lines.
    qwens = (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * 4
        + f"<|vision_end|>{PROMPT.text}<|im_end|>\n<|im_start|>assistant\n"
    )
    prompts = {
        "qwen2_5_vl": qwens,
        "qwen3_vl": qwens,
        "gemma3": (
            f"<bos><start_of_turn>user\n{SYSTEM_PROMPT}\n\n\n\n<start_of_image>"
            + "<image_soft_token>" * 4
            + f"<end_of_image>\n\n{PROMPT.text}<end_of_turn>\n<start_of_turn>model\n"
        ),
    }
    ends = {"qwen2_5_vl": "<|im_end|>", "gemma3": "<end_of_turn>", "qwen3_vl": "<|im_end|>"}
    row = encoder.encode_answer(
        examples_of(tiny_images, 56)[0], PROMPT, "<think>x</think>\n<solution>Edema</solution>"
    )
    assert encoder.tokenizer.decode(row.prompt.input_ids) == prompts[family]
    assert (
        encoder.tokenizer.decode(row.completion_ids)
        == "<think>x</think>\n<solution>Edema</solution>" + ends[family]
    )
    ids = torch.cat([row.prompt.input_ids, row.completion_ids])
    assert family != "gemma3" or (ids == encoder.tokenizer.bos_token_id).sum() == 1


# Of the Thinking editions: the reasoning is a part of its own, whose tag stands in the prompt.
QWEN3_THINKING = QWEN3_AS_PUBLISHED.replace(
    "{%- elif 'text' in part -%}{{- part.text -}}",
    "{%- elif turn.role == 'assistant' -%}{%- set halves = part.text.split('</think>') -%}"
    "{{- '<think>\\n' + halves[0].split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n'"
    " + halves[-1].lstrip('\\n') -}}{%- elif 'text' in part -%}{{- part.text -}}",
).replace("assistant\\n' -}}{%- endif -%}", "assistant\\n<think>\\n' -}}{%- endif -%}")


def test_the_template_of_a_thinking_edition(tiny_checkpoint, tiny_images, caplog):
    encoder = encoder_of(tiny_checkpoint("qwen3_vl"))
    encoder.tokenizer.chat_template = QWEN3_THINKING
    encoder = Encoder(encoder.family, encoder.tokenizer, encoder.image_processor, encoder.config)
    answer = "<think>x</think>\n<solution>Edema</solution>"
    row = encoder.encode_answer(examples_of(tiny_images, 56)[0], PROMPT, answer)
    assert encoder.tokenizer.decode(row.prompt.input_ids).endswith("assistant\n<think>\n")
    # what is learnt is the answer as the data have it
    assert encoder.tokenizer.decode(row.completion_ids) == answer + "<|im_end|>"
    assert "the chat template changes answers" in caplog.text
    (note,) = encoder.notes
    assert note.startswith("the chat template opens <think> itself, before the answer: a model")


def test_white_space_around_an_answer_is_the_templates_affair(tiny_checkpoint, tiny_images):
    encoder = encoder_of(tiny_checkpoint("gemma3"))
    encoder.tokenizer.chat_template = GEMMA_AS_PUBLISHED
    row = encoder.encode_answer(examples_of(tiny_images, 56)[0], PROMPT, " \nEdema \n")
    # the published template trims it
    assert encoder.tokenizer.decode(row.completion_ids) == "Edema<end_of_turn>"


def test_every_template_has_both_stop_ids(family, tiny_checkpoint):
    model = load(tiny_checkpoint(family))
    gemmas = {"<end_of_turn>", "<eos>"}
    names = gemmas if family == "gemma3" else {"<|im_end|>", "<|endoftext|>"}
    expected = {model.encoder.tokenizer.convert_tokens_to_ids(name) for name in names}
    assert model.stop_ids == expected
    # A generation_config may list but one of them; the end of turn is added in any case.
    (other,) = names - {"<end_of_turn>", "<|im_end|>"}
    model.net.generation_config.eos_token_id = model.encoder.tokenizer.convert_tokens_to_ids(other)
    assert stop_ids(model.net, model.encoder.tokenizer, model.encoder.end_of_turn_id) == expected


def visual_tokens(encoder: Encoder, folder: Path, height: int, width: int) -> tuple[int, dict]:
    Image.fromarray(np.zeros((height, width), dtype=np.uint8)).save(folder / "x.png")
    encoded = encoder.encode_prompt(
        Example("e", "p", "x.png", (), "site", folder), Prompt("short", "Which?")
    )
    return int((encoded.token_types == 1).sum()), encoded.vision


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [
        # 2828 x 2320 is 101 x 83 tokens of 28 x 28 pixels, too many: scaled by 1 / sqrt(2828 * 2320
        # / (512 * 784)) = 1 / 4.0429 to 699.5 x 573.8, rounded down to 24 x 20 = 480 tokens, 2 x 2
        # patches each.
        (2828, 2320, (48, 40)),
        # 1024 x 1024, as NIH's, scaled by 1 / 1.6162 to 633.6, rounded down to 22 x 22 = 484
        (1024, 1024, (44, 44)),
        # 320 x 390, as CheXpert's small ones: 11 x 14 = 154 are too few: scaled by sqrt(256 * 784 /
        # 124800) = 1.2682 to 405.8 x 494.6, rounded up to 15 x 18 = 270
        (320, 390, (30, 36)),
        # 560 x 672 is 20 x 24 = 480 and stays.
        (560, 672, (40, 48)),
    ],
)
def test_qwen_has_256_to_512_tokens_on_images_of_real_sizes(
    tiny_checkpoint, tmp_path, height, width, grid
):
    # its preprocessor_config.json asks for 4 to 16384
    encoder = encoder_of(tiny_checkpoint("qwen2_5_vl"), 256, 512)
    tokens, vision = visual_tokens(encoder, tmp_path, height, width)
    assert vision["image_grid_thw"].tolist() == [[1, *grid]]
    assert tokens == grid[0] * grid[1] // 4 and 256 <= tokens <= 512


def test_gemma_has_256_tokens_on_images_of_real_sizes(tiny_checkpoint, tmp_path):
    # The published processing: 896 x 896 pixels, 64 x 64 patches, pooled to 16 x 16 tokens.
    folder = shutil.copytree(tiny_checkpoint("gemma3"), tmp_path / "model")
    for name, changes in {
        "config.json": {
            "mm_tokens_per_image": 256,
            "vision_config": record(folder / "config.json")["vision_config"] | {"image_size": 896},
        },
        "preprocessor_config.json": {
            "size": {"height": 896, "width": 896},
            "image_seq_length": 256,
        },
    }.items():
        (folder / name).write_text(json.dumps(record(folder / name) | changes))
    encoder = encoder_of(folder, 300, 512)
    for size in ((2828, 2320), (320, 390)):
        tokens, vision = visual_tokens(encoder, tmp_path, *size)
        assert tokens == 256 and vision["pixel_values"].shape == (1, 3, 896, 896)


def test_image_processors_need_no_torchvision(family, tiny_checkpoint):
    assert type(encoder_of(tiny_checkpoint(family)).image_processor).__name__.endswith("Pil")


# ---- token types, positions and masks ------------------------------------------------------------
@torch.no_grad()
def test_token_types_cannot_be_forgotten(family, tiny_checkpoint, tiny_images, monkeypatch):
    model = load(tiny_checkpoint(family))
    rows = [
        model.encode_answer(example, PROMPT, "ab, cd")
        for example in examples_of(tiny_images, 56, 112)
    ]
    batch = collate_rows(rows, model.encoder.pad_token_id)
    fields = {
        field.name: getattr(batch.prompts, field.name) for field in dataclasses.fields(PromptBatch)
    }
    with pytest.raises(TypeError, match="token_types"):
        PromptBatch(**{name: value for name, value in fields.items() if name != "token_types"})

    expected, _ = completion_logprobs(model.net, model.family, batch, temperature=1.0)
    types = torch.zeros_like(batch.prompts.token_types)
    zeroed = dataclasses.replace(
        batch, prompts=dataclasses.replace(batch.prompts, token_types=types)
    )
    forgetting = [
        dataclasses.replace(row.prompt, token_types=torch.zeros_like(row.prompt.token_types))
        for row in rows
    ]
    # the image would have no place
    with pytest.raises(ValueError, match="0 image placeholders for"):
        collate_prompts(forgetting, model.encoder.pad_token_id)
    # Positions and masks depend on them too: with the image in its place, they alone make another
    # number.
    embeddings = engine.forward.embed(model.net, batch.prompts)
    monkeypatch.setattr(engine.forward, "embed", lambda *_: embeddings)
    forgotten, _ = completion_logprobs(model.net, model.family, zeroed, temperature=1.0)
    assert (forgotten - expected).abs().max() > 1e-3  # rounding is 1e-6


@torch.no_grad()
def test_an_image_that_is_blanked_changes_the_log_probabilities_of_a_trained_model(
    family, tiny_checkpoint, tiny_images
):
    model = load(tiny_checkpoint(family))
    wrapped = attach_random_adapter(model)
    row = with_features(
        model, model.encoder.encode_answer(examples_of(tiny_images, 84)[0], PROMPT, "Edema")
    )
    pixels = {"pixel_values": torch.zeros_like(row.prompt.vision["pixel_values"])}
    blank = with_features(model, dataclasses.replace(row.prompt, vision=row.prompt.vision | pixels))
    seen, unseen = (
        completion_logprobs(
            wrapped,
            model.family,
            collate_rows([dataclasses.replace(row, prompt=prompt)], 0),
            temperature=1.0,
        )[0]
        for prompt in (row.prompt, blank)
    )
    assert (seen - unseen).abs().max() > 1e-2


@pytest.fixture
def only_explicit_calls(monkeypatch) -> Counter:
    """Let transformers' own forward and generate fail, which make positions and masks themselves.

    The decoders insist on both, and their calls are counted.
    """
    calls: Counter = Counter()

    def refused(self, *_, **__):
        raise AssertionError(
            f"{type(self).__name__} was called, which makes positions and masks by itself"
        )

    def insisting(original):
        def forward(self, *arguments, **keywords):
            assert (
                not arguments
                and keywords.get("input_ids") is None
                and keywords["inputs_embeds"] is not None
            )
            assert keywords["position_ids"] is not None
            masks = keywords["attention_mask"]
            masks = masks.values() if isinstance(masks, dict) else [masks]
            assert all(isinstance(mask, PackedMask) for mask in masks)
            calls[type(self).__name__] += 1
            return original(self, **keywords)

        return forward

    for module, prefix in (
        (modeling_qwen2_5_vl, "Qwen2_5_VL"),
        (modeling_gemma3, "Gemma3"),
        (modeling_qwen3_vl, "Qwen3VL"),
    ):
        for name in ("Model", "ForConditionalGeneration"):
            monkeypatch.setattr(getattr(module, prefix + name), "forward", refused)
        monkeypatch.setattr(
            getattr(module, prefix + "ForConditionalGeneration"), "generate", refused
        )
        decoder = getattr(module, prefix + "TextModel")
        monkeypatch.setattr(decoder, "forward", insisting(decoder.forward))
    return calls


def test_the_whole_way_of_every_family(
    family, tiny_sft_run, tiny_checkpoint, tiny_data, tmp_path, monkeypatch, only_explicit_calls
):
    """SFT, its resume, GRPO from the adapter alone, its resume in the middle of a rollout, and
    evaluation of the result.
    """
    monkeypatch.chdir(tmp_path)
    sft_run = tiny_sft_run(family)  # saves at every step
    assert record(sft_run / "adapter_config.json")["base_model_name_or_path"] == str(
        tiny_checkpoint(family)
    )
    assert (
        run_sft.main(
            ["--resume_from_checkpoint", str(sft_run / "checkpoint-2"), "--output_dir", "resumed"]
        )
        == 0
    )
    assert_same_run(sft_run, tmp_path / "resumed")

    with monkeypatch.context() as readable:
        speak(readable)
        flags = (
            "--gradient_checkpointing",
            "--max_steps",
            "3",
            "--save_steps",
            "1",
            "--reward",
            "nuanced",
        )
        assert grpo(sft_run, tiny_data, tmp_path / "grpo", *flags) == 0
        resume = ["--resume_from_checkpoint", "grpo/checkpoint-1", "--output_dir", "grpo-resumed"]
        assert run_grpo.main(resume) == 0
    assert_same_run(tmp_path / "grpo", tmp_path / "grpo-resumed")
    before, after = adapter(sft_run), adapter(tmp_path / "grpo")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if "lora_B" in name)
    assert record(tmp_path / "grpo/adapter_config.json")["base_model_name_or_path"] == str(
        tiny_checkpoint(family)
    )

    evaluate = ["--data_file", f"site={tiny_data}", "--max_samples", "5", "--adapter_name_or_path"]
    assert eval.evaluate.main([*evaluate, "grpo", "--output_dir", "scores"]) == 0
    rows = lines(tmp_path / "scores/predictions-site.jsonl")
    assert len(rows) == 5 and record(tmp_path / "scores/scores-site.json")["n"] == 5
    assert eval.evaluate.main([*evaluate, str(sft_run), "--output_dir", "sft-scores"]) == 0
    assert (
        lines(tmp_path / "sft-scores/predictions-site.jsonl")
        == lines(sft_run / "predictions-site.jsonl")[:5]
    )
    decoders = {
        "qwen2_5_vl": "Qwen2_5_VLTextModel",
        "gemma3": "Gemma3TextModel",
        "qwen3_vl": "Qwen3VLTextModel",
    }
    assert set(only_explicit_calls) == {decoders[family]}


# ---- models of the hub ---------------------------------------------------------------------------
RESPONSE = SimpleNamespace(headers={}, request=None)  # all that the client's errors look at


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            GatedRepoError(
                "403 Client Error.\nAccess to model google/medgemma-4b-it is restricted.",
                response=RESPONSE,
            ),
            "gated repo",
        ),
        (
            RepositoryNotFoundError("404 Client Error.\nRepository Not Found.", response=RESPONSE),
            "is not a valid model identifier",
        ),
        (
            LocalEntryNotFoundError("Cannot reach the hub and find the file on disk."),
            "couldn't connect",
        ),
        (ConnectionError("Name or service not known"), ""),
    ],
    ids=["gated", "absent", "offline", "no network"],
)
def test_a_hub_model_that_cannot_be_had_is_one_line(
    error, reason, tiny_data, tmp_path, monkeypatch, capsys
):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", fails)
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    flags = [
        "--model_name_or_path",
        "google/medgemma-4b-it",
        "--train_file",
        str(tiny_data),
        "--output_dir",
        "run",
        *SFT,
    ]
    assert main_guard(lambda: run_sft.main(flags)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "note:" not in line]
    assert (
        line.startswith(
            "error: --model_name_or_path google/medgemma-4b-it: no config.json could be had ("
        )
        and reason in line
    )
    assert (
        "https://huggingface.co/google/medgemma-4b-it" in line
        and "`hf auth login`" in line
        and "HF_HUB_OFFLINE" in line
    )
    assert not list(tmp_path.iterdir())


def test_a_hub_repository_without_a_configuration(tiny_data, tmp_path, monkeypatch, capsys):
    # what transformers answers then
    monkeypatch.setattr("engine.encode.cached_file", lambda *_: None)
    flags = ["--model_name_or_path", "someone/weights-only", "--train_file", str(tiny_data), *SFT]
    assert main_guard(lambda: run_sft.main(flags)) == 2
    assert (
        "no config.json could be had (someone/weights-only holds no config.json)"
        in capsys.readouterr().err
    )


OFFLINE = """
import json, sys, run_grpo, run_sft, eval.evaluate
from data.examples import DataError
from engine.runtime import main_guard
scripts = {"sft": run_sft.main, "grpo": run_grpo.main, "evaluate": eval.evaluate.main}
runs = json.loads(sys.argv[1])
print("codes", *(main_guard(lambda: scripts[script](flags)) for script, flags in runs))
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, checkpoint: Path) -> Path:
    """Lay a checkpoint out as the hub's client caches it: refs/main names the snapshot, which is
    returned.
    """
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(checkpoint, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def test_offline_a_model_comes_from_the_local_cache(tiny_checkpoint, tiny_data, tmp_path):
    """In a process of its own, since the hub's client reads its variables once. GRPO and evaluation
    find the base by its hub name.
    """
    commands, data = [], ["--train_file", str(tiny_data)]
    for family in FAMILIES:
        cached(tmp_path / "cache", f"clinic/{family}", tiny_checkpoint(family))
        commands += [
            (
                "sft",
                [
                    "--model_name_or_path",
                    f"clinic/{family}",
                    *data,
                    "--output_dir",
                    f"{family}-sft",
                    *SFT,
                    "--max_steps",
                    "1",
                    "--validation_file",
                    f"site={tiny_data}",
                ],
            ),
            (
                "grpo",
                [
                    "--adapter_name_or_path",
                    f"{family}-sft",
                    *data,
                    "--output_dir",
                    f"{family}-grpo",
                    *GRPO,
                    "--max_steps",
                    "1",
                ],
            ),
            (
                "evaluate",
                [
                    "--adapter_name_or_path",
                    f"{family}-grpo",
                    "--data_file",
                    f"site={tiny_data}",
                    "--max_samples",
                    "2",
                    "--output_dir",
                    f"{family}-scores",
                ],
            ),
        ]
    commands.append(
        ("sft", ["--model_name_or_path", "clinic/absent", *data, "--output_dir", "absent", *SFT])
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps(commands)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "codes" + " 0" * 9 + " 2", done.stderr
    for family in FAMILIES:
        for run in ("sft", "grpo"):
            assert (
                record(tmp_path / f"{family}-{run}/adapter_config.json")["base_model_name_or_path"]
                == f"clinic/{family}"
            )
        assert len(lines(tmp_path / f"{family}-scores/predictions-site.jsonl")) == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(
        "error: --model_name_or_path clinic/absent: no config.json could be had ("
    )
    assert not (tmp_path / "absent").exists()


def test_a_model_that_is_only_half_in_the_cache_is_one_line(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch, capsys
):
    (
        cached(tmp_path, "clinic/tiny-model", tiny_checkpoint("gemma3")) / "model.safetensors"
    ).unlink()
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_OFFLINE", True)
    flags = ["--model_name_or_path", "clinic/tiny-model", "--train_file", str(tiny_data), *SFT]
    before = snapshot(tmp_path)
    assert main_guard(lambda: run_sft.main(flags)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        line.startswith("error: --model_name_or_path clinic/tiny-model: ")
        and "`hf auth login`" in line
    )
    assert snapshot(tmp_path) == before


# ---- one place for family facts ------------------------------------------------------------------
# a file for each family, and the list of them
PLACES = {"engine/families.py"} | {f"engine/{family}.py" for family in FAMILIES}
FACTS = re.compile(
    r"^(qwen2_5_vl|gemma3|qwen3_vl)\w*$|<\|\w+\|>|<(bos|eos|pad)>|<(start|end)_of_\w+>|<image_soft_token>|"
    r"_grid_thw|deepstack|token_type_ids|^(mm_tokens_per_image|image_token_index|min_pixels)$|merge_size"
)
NAMES = (
    "qwen|gemma|_grid_thw|deepstack|token_type_ids|mm_tokens_per_image|merge_size|^[be]oi_token$|"
    "^min_pixels$"
)


def family_facts(source: str) -> list[str]:
    """List lines of a source that know a family.

    That is a class of one, its name or its tokens as text, a test of which family it is.
    """
    tree = ast.parse(source)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    }
    found = []
    for node in ast.walk(tree):
        names = [
            getattr(node, name)
            for name in ("id", "attr", "arg", "name")
            if isinstance(getattr(node, name, None), str)
        ]
        if any(re.search(NAMES, name, re.IGNORECASE) for name in names):
            found.append(f"{getattr(node, 'lineno', 0)} {names}")
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in prose
            and FACTS.search(node.value)
        ):
            found.append(f"{node.lineno} {node.value!r}")
        if isinstance(node, (ast.Compare, ast.Match)) and re.search(
            r"model_type|\bfamily\b|FAMILIES", ast.unparse(node)
        ):
            found.append(f"{node.lineno} {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("file", product_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_family_facts_have_one_place(file):
    name = file.relative_to(ROOT).as_posix()
    if name in PLACES:
        assert family_facts(file.read_text(encoding="utf-8"))
    elif not name.startswith("data/demo/") and name != "data/check.py":
        # The demo's base is built as a Qwen2.5-VL; nothing of it runs in training. data.check reads
        # no model: it looks for the control tokens of all of them.
        assert family_facts(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "if config.model_type == 'x': pass",
        "if family in FAMILIES: pass",
        "name = 'gemma3'",
        "from transformers import Gemma3Model",
        "model(token_type_ids=types)",
        "vision['image_grid_thw']",
        "end = '<|im_end|>'",
        "text.replace('<start_of_image>', '')",
        "tokens = config['mm_tokens_per_image']",
        "side = vision.spatial_merge_size",
        "begin = tokenizer.boi_token",
        "load(path, min_pixels=4)",
        "image['deepstack']",
    ],
)
def test_a_family_fact_is_seen(source):
    assert family_facts(source)


def test_data_check_knows_every_familys_control_tokens():
    for family in FAMILIES.values():
        assert {family.end_of_turn, *family.image_token_names} <= set(CONTROL_TOKENS)


def test_every_family_has_a_file_of_its_own():
    assert {file.relative_to(ROOT).as_posix() for file in product_files()} >= PLACES
    assert all(type(family).__module__ == f"engine.{name}" for name, family in FAMILIES.items())


def test_the_tables_of_families_agree():
    assert (
        set(FAMILIES)
        == set(SAVE)
        == set(REAL_CONFIGS)
        == {family_of(name).model_type for name in FAMILIES}
    )
