"""Make a random checkpoint of a real model's shape, in the form that its files have on the hub.

The weights are bf16 in shards with an index, under the keys of the hub's files. config.json is
written as there (Qwen2.5-VL's is flat). The tokenizer is the demo's, padded to the real vocabulary
with words that no text is cut into, and its control tokens have their real ids. Only the numbers
are made up. Nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PretrainedConfig

from engine.model_files import model_path
from tests.helpers.real_configs import gemma_4b, qwen_3b

MODELS = {"qwen2.5-vl-3b": qwen_3b, "gemma-3-4b": gemma_4b}
DEMOS = {"qwen2_5_vl": "demo", "gemma3": "demo-gemma"}
SHARD_BYTES = 2**31
# Keys of transformers' modules, and what the hub's files call them.
HUB_KEYS = {
    "qwen2_5_vl": ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    "gemma3": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ),
}
# Control tokens with their ids on the hub.
CONTROL = {
    "qwen2_5_vl": {
        name: 151_643 + place
        for place, name in enumerate(
            (
                "<|endoftext|>",
                "<|im_start|>",
                "<|im_end|>",
                "<|object_ref_start|>",
                "<|object_ref_end|>",
                "<|box_start|>",
                "<|box_end|>",
                "<|quad_start|>",
                "<|quad_end|>",
                "<|vision_start|>",
                "<|vision_end|>",
                "<|vision_pad|>",
                "<|image_pad|>",
                "<|video_pad|>",
            )
        )
    },
    "gemma3": {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<unk>": 3,
        "<mask>": 4,
        "<start_of_turn>": 105,
        "<end_of_turn>": 106,
        "<start_of_image>": 255_999,
        "<end_of_image>": 256_000,
        "<image_soft_token>": 262_144,
    },
}
STOPS = {"qwen2_5_vl": [151_645, 151_643], "gemma3": [1, 106]}
PROCESSORS = {
    "qwen2_5_vl": dict(
        image_processor_type="Qwen2VLImageProcessor",
        min_pixels=3136,
        max_pixels=12_845_056,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        processor_class="Qwen2_5_VLProcessor",
    ),
    "gemma3": dict(
        image_processor_type="Gemma3ImageProcessor",
        size=dict(height=896, width=896),
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_pan_and_scan=None,
        image_seq_length=256,
        processor_class="Gemma3Processor",
    ),
}


def scaled(config: PretrainedConfig, scale: int) -> PretrainedConfig:
    """Divide widths, heads and layers of both parts by `scale`. The vocabulary stays."""
    text, vision = config.text_config, config.vision_config
    for part, names in (
        (text, ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")),
        (vision, ("hidden_size", "intermediate_size")),
    ):
        for name in names:
            setattr(part, name, max(1, getattr(part, name) // scale))
    text.num_hidden_layers = max(2, text.num_hidden_layers // scale)
    if config.model_type == "gemma3":
        vision.num_attention_heads = max(1, vision.num_attention_heads // scale)
        vision.num_hidden_layers = max(2, vision.num_hidden_layers // scale)
        text.layer_types = ["sliding_attention"] * (text.num_hidden_layers - 1) + ["full_attention"]
    else:
        text.layer_types = text.layer_types[: text.num_hidden_layers]
        vision.num_heads = max(1, vision.num_heads // scale)
        vision.depth = max(2, vision.depth // scale)
        vision.fullatt_block_indexes = [vision.depth - 1]
        vision.out_hidden_size = text.hidden_size
    return config


def hub_config(config: PretrainedConfig) -> dict:
    """Write a configuration as the hub's config.json has it."""
    record = config.to_dict()
    record["torch_dtype"] = "bfloat16"
    for part in (record, record["text_config"], record["vision_config"]):
        part.pop("dtype", None)
    if config.model_type != "qwen2_5_vl":
        return record
    text = record.pop("text_config")  # Qwen2.5-VL's file has these at the top
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"]}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    return text | record | {"model_type": "qwen2_5_vl"}


def hub_key(model_type: str, name: str) -> str:
    """Give the name of a parameter in the hub's files."""
    for pattern, replacement in HUB_KEYS[model_type]:
        name = re.sub(pattern, replacement, name)
    return name


def random_weights(config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Make the weights one by one, under the hub's keys: 0.02 normal, norms that do nothing.

    Large ones repeat a block of random numbers, since to draw billions takes minutes.
    """
    with torch.device("meta"):
        net = AutoModelForImageTextToText.from_config(config)
    net.tie_weights()
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(2**22 + 1, generator=generator) * 0.02).to(torch.bfloat16)
    for name, parameter in net.named_parameters():  # tied ones come once
        key = hub_key(config.model_type, name)
        if parameter.dim() > 1:
            yield (
                key,
                block.repeat(-(-parameter.numel() // len(block)))[: parameter.numel()].view(
                    parameter.shape
                ),
            )
        else:
            # Gemma's norms multiply by 1 + weight
            is_scale = name.endswith("weight") and not (
                config.model_type == "gemma3" and "vision_tower" not in name
            )
            yield key, torch.full(parameter.shape, float(is_scale), dtype=torch.bfloat16)


def write_weights(config: PretrainedConfig, folder: Path, shard_bytes: int) -> int:
    """Write shards and model.safetensors.index.json, one shard in memory -> number of bytes."""
    shards: list[list[str]] = [[]]
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in held.items()},
            folder / f"part-{len(shards)}",
            metadata={"format": "pt"},
        )
        held.clear()

    for name, tensor in random_weights(config):
        if held and size + 2 * tensor.numel() > shard_bytes:
            flush()
            shards.append([])
            size = 0
        held[name] = tensor
        shards[-1].append(name)
        size += 2 * tensor.numel()
        total += 2 * tensor.numel()
    flush()
    files = {}
    for place, names in enumerate(shards, start=1):
        file = f"model-{place:05}-of-{len(shards):05}.safetensors"
        (folder / f"part-{place}").rename(folder / file)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def write_tokenizer(model_type: str, vocabulary: int, folder: Path) -> None:
    """Write the demo's tokenizer, padded to `vocabulary` words, with the hub's control ids."""
    demo = Path(model_path(DEMOS[model_type]))
    record = json.loads((demo / "tokenizer.json").read_text(encoding="utf-8"))
    control = CONTROL[model_type]
    words = [word for word in record["model"]["vocab"] if word not in control]
    taken = set(control.values())
    free = (id for id in range(vocabulary) if id not in taken)
    vocab = {word: next(free) for word in words}
    last = min(control.values()) if model_type == "qwen2_5_vl" else max(control.values())
    vocab |= {f"word{id}": id for id in free if id < last}
    if model_type == "gemma3":  # its control tokens are in the vocabulary
        vocab |= {name: id for name, id in control.items() if id < last}
    record["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    record["added_tokens"] = [
        {
            "id": id,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, id in sorted(control.items(), key=lambda item: item[1])
    ]
    text = json.dumps(record, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = json.loads((demo / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = (demo / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def make_hub_folder(name: str, folder: Path, scale: int = 1) -> int:
    """Make the checkpoint `name` of MODELS in a new folder -> bytes of its weights.

    scale: divides widths, heads and layers, for a quick try.
    """
    config = scaled(MODELS[name](), scale) if scale > 1 else MODELS[name]()
    kind = config.model_type
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hub_config(config), indent=2))
    generation = {
        "eos_token_id": STOPS[kind],
        "do_sample": True,
        "repetition_penalty": 1.05,
        "temperature": 1e-6,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    write_tokenizer(kind, config.get_text_config().vocab_size, folder)
    return write_weights(config, folder, SHARD_BYTES // scale**2)
