"""Make the models of the benchmarks: small random checkpoints of the real classes.

An image costs in them, beside one sequence of the language model, what it costs in the real ones.

    python tests/benchmarks/models.py     # their operations, and the shares measured

They have 3 decoder layers of hidden size 512, prompts of 577 tokens, 256 of them an image, and 256
new tokens. By operations one image is 29 % (Qwen2.5-VL), 104 % (Gemma 3) and 12 % (Qwen3-VL) of one
sequence's forward through the language model, as in Qwen2.5-VL-3B, Gemma 3 4B and Qwen3-VL-4B: the
towers' depth and width are chosen for that. They are saved as folders, which the product and others
load like any checkpoint.

Operations: a matrix product of [n,k] and [k,m] is 2nkm. A weight of w numbers costs 2w a token.
Attention of H heads of width D costs 4HD a pair of a query and a key that it sees. Norms,
activations, embeddings and adapters (5 % of the weights) are left out. With frozen weights and
gradient checkpointing a training pass costs three forwards, of attention four.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig

from data.examples import Example
from data.prompts import Prompt
from engine.families import language_model
from engine.model import (
    BaseModel,
    adapter_config_record,
    adapter_state,
    attach_new_adapter,
    load_model,
)
from tests.helpers import tiny

FAMILIES = {"qwen2_5_vl": "Qwen2.5-VL", "gemma3": "Gemma 3", "qwen3_vl": "Qwen3-VL"}
CPU = torch.device("cpu")
# A side in pixels; all towers merge 2 x 2 patches (Gemma's real one 4 x 4: see `Sizes`). Qwen3-VL,
# whose patches have a side of 16, enlarges the images to as many tokens.
PATCH, PATCHES_PER_TOKEN = 14, 4
TOWERS = {  # chosen for the shares of the real models: see the table that this file prints
    "qwen2_5_vl": dict(hidden_size=192, intermediate_size=520, depth=3, num_heads=3),
    "gemma3": dict(
        hidden_size=400, intermediate_size=1440, num_hidden_layers=3, num_attention_heads=5
    ),
    "qwen3_vl": dict(hidden_size=72, intermediate_size=288, depth=3, num_heads=3),
}
REAL_SHARES = {"qwen2_5_vl": 0.29, "gemma3": 1.04, "qwen3_vl": 0.12}


@dataclass(frozen=True)
class Sizes:
    """Describe a benchmark's model and sequences. image_tokens is a square number.

    Gemma's image is cut into 1,024 patches for 256 tokens, not 4,096: at this width attention among
    4,096 would be nearly all of the tower's cost, and it is a third of the real one's.
    """

    layers: int = 3
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    kv_heads: int = 2
    vocabulary: int = 4096
    prompt_length: int = 577
    image_tokens: int = 256
    new_tokens: int = 256

    @property
    def image_side(self) -> int:
        """Return the side of an image in pixels."""
        return 2 * PATCH * round(self.image_tokens**0.5)


def save_checkpoint(family: str, folder: Path, sizes: Sizes = Sizes(), seed: int = 0) -> Path:
    """Save a checkpoint's folder, with tokenizer (bytes) and image processor."""
    head = sizes.hidden // sizes.heads
    text = dict(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
    )
    if family == "gemma3":
        layers = ["sliding_attention"] * (sizes.layers - 1) + ["full_attention"]
        text |= dict(
            head_dim=head, query_pre_attn_scalar=head, sliding_window=1024, layer_types=layers
        )
        return tiny.save_gemma(
            folder,
            seed,
            text=text,
            vision=TOWERS[family] | dict(image_size=sizes.image_side),
            image_tokens=sizes.image_tokens,
            gain=1.0,
        )
    sections = [head // 8, head * 3 // 16, head * 3 // 16]
    text |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sections))
    if family == "qwen3_vl":
        vision = TOWERS[family] | dict(
            out_hidden_size=sizes.hidden,
            deepstack_visual_indexes=[0, 1, 2],
            num_position_embeddings=2304,
        )
        text |= dict(head_dim=head)
        return tiny.save_qwen3(folder, seed, text=text, vision=vision, gain=1.0)
    vision = TOWERS[family] | dict(
        window_size=112,
        out_hidden_size=sizes.hidden,
        fullatt_block_indexes=[TOWERS[family]["depth"] - 1],
    )
    return tiny.save_qwen(folder, seed, text=text, vision=vision, gain=1.0)


def load(folder: Path, sizes: Sizes = Sizes(), *, vision_cache_gb: float = 0.0) -> BaseModel:
    """Load a folder as the product does, in fp32."""
    return load_model(
        str(folder),
        dtype=torch.float32,
        device=CPU,
        min_visual_tokens=sizes.image_tokens,
        max_visual_tokens=sizes.image_tokens,
        vision_cache_gb=vision_cache_gb,
    )


def save_adapter(model_folder: Path, folder: Path, seed: int, sizes: Sizes = Sizes()) -> Path:
    """Save a LoRA adapter of rank 16 as the product does. Its B is not zero, so that it changes the
    outputs.
    """
    model = load(model_folder, sizes)
    torch.manual_seed(seed)
    wrapped = attach_new_adapter(model, r=16, alpha=32, dropout=0.0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in adapter_state(wrapped).items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps(adapter_config_record(wrapped, str(model_folder)))
    )
    return folder


def make_examples(folder: Path, count: int, sizes: Sizes = Sizes()) -> list[Example]:
    """Make examples of random images, of which no two are the same."""
    names = tiny.save_images(folder, count, sizes.image_side)
    return [Example(name, name, name, ("Edema",), "random", folder) for name in names]


def make_prompt(model: BaseModel, example: Example, sizes: Sizes = Sizes()) -> Prompt:
    """Make an instruction with which prompt and image have `prompt_length` tokens: a byte is one.

    Raises ValueError where that is fewer than without any.
    """

    def prompt(length: int) -> Prompt:
        return Prompt(
            "filler",
            ("Which findings does this image show? " * (length // 37 + 1))[:length],
            system="You read X-rays.",
        )

    fixed = len(model.encoder.encode_prompt(example, prompt(0)).input_ids)
    if fixed > sizes.prompt_length:
        raise ValueError(
            f"a prompt has at least {fixed} tokens here, of which {sizes.image_tokens} are the"
            f" image: {sizes.prompt_length} are too few"
        )
    return prompt(sizes.prompt_length - fixed)


# ---- floating-point operations -------------------------------------------------------------------
@dataclass(frozen=True)
class Operations:
    """Hold the operations of one forward, apart by what a training pass multiplies them with."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, times: float) -> Operations:
        return Operations(self.linear * times, self.attention * times)

    __rmul__ = __mul__

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    @property
    def trained(self) -> float:
        """Count a forward, once more in the backward pass, and the gradients of what went in: of
        attention's two products there are four.
        """
        return 3 * self.linear + 4 * self.attention


@dataclass(frozen=True)
class Costs:
    """Count the operations of a model of this configuration at these sizes."""

    config: PretrainedConfig
    sizes: Sizes

    def language(self, tokens: float, pairs: float) -> Operations:
        """Count `tokens` through the decoder, with `pairs` of a query and a key that it sees."""
        text = self.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        queries, keys = text.num_attention_heads * width, text.num_key_value_heads * width
        weights = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
        return Operations(
            2 * text.num_hidden_layers * weights * tokens,
            4 * text.num_hidden_layers * queries * pairs,
        )

    def head(self, tokens: float) -> Operations:
        text = self.config.get_text_config()
        return Operations(2 * text.hidden_size * text.vocab_size * tokens)

    @cached_property
    def prompt(self) -> Operations:
        return self.language(self.sizes.prompt_length, self.sizes.prompt_length**2 / 2)

    @cached_property
    def completion(self) -> Operations:
        """Count one completion, its prompt's keys and values given."""
        new, before = self.sizes.new_tokens, self.sizes.prompt_length
        return self.language(new, new * before + new**2 / 2)

    @property
    def sequence(self) -> Operations:
        return self.prompt + self.completion

    @cached_property
    def image(self) -> Operations:
        """Count one image through the tower and the projection into the language model."""
        vision, patches, tokens = (
            self.config.vision_config,
            PATCHES_PER_TOKEN * self.sizes.image_tokens,
            self.sizes.image_tokens,
        )
        width, out = vision.hidden_size, self.config.get_text_config().hidden_size
        if self.config.model_type == "gemma3":
            layers, weights = (
                vision.num_hidden_layers,
                4 * width**2 + 2 * width * vision.intermediate_size,
            )
            seen = layers * patches
            ends = patches * 3 * PATCH**2 * width + tokens * width * out
        else:
            is_qwen3 = self.config.model_type == "qwen3_vl"  # no gate, no windows, deepstack
            matrices, layers = 2 if is_qwen3 else 3, vision.depth
            weights = 4 * width**2 + matrices * width * vision.intermediate_size
            if is_qwen3:
                seen, mergers = layers * patches, 1 + len(vision.deepstack_visual_indexes)
            else:
                full, window = len(vision.fullatt_block_indexes), (vision.window_size // PATCH) ** 2
                seen, mergers = full * patches + (layers - full) * window, 1
            merged = 4 * width
            ends = patches * 6 * vision.patch_size**2 * width + tokens * mergers * (
                merged**2 + merged * out
            )
        return Operations(2 * (layers * weights * patches + ends), 4 * width * patches * seen)

    @property
    def image_share(self) -> float:
        return self.image.forward / self.sequence.forward


def measured_share(model: BaseModel, sizes: Sizes, pairs: int) -> float:
    """Measure the CPU time of one image by that of one sequence's forward through the language
    model.

    Returns the median over pairs.
    """
    side = sizes.image_side
    if model.family.model_type == "gemma3":
        image = {"pixel_values": torch.randn(1, 3, side, side)}
    else:
        _, values = model.family.patches(model.net.config)
        image = {
            "pixel_values": torch.randn((side // PATCH) ** 2, values),
            "image_grid_thw": torch.tensor([[1, side // PATCH, side // PATCH]]),
        }
    embeddings = torch.randn(1, sizes.prompt_length + sizes.new_tokens, sizes.hidden)

    @torch.no_grad()
    def both() -> float:
        start = time.process_time()
        model.family.image_features(model.net, image)
        middle = time.process_time()
        language_model(model.net)(inputs_embeds=embeddings, use_cache=False)
        return (middle - start) / (time.process_time() - middle)

    both()
    return statistics.median(both() for _ in range(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=15, help="of one image and one sequence that are measured"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes()
    print("Operations in 1e9, forward; CPU time of one process on one thread, median of pairs.")
    print(
        f"{'':12} {'image':>7} {'prompt':>7} {'sequence':>9} {'head':>6}  image / sequence: "
        f"{'wanted':>7} {'computed':>9} {'measured':>9}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for family, title in FAMILIES.items():
            model = load(save_checkpoint(family, Path(folder) / family, sizes), sizes)
            costs = Costs(model.net.config, sizes)
            print(
                f"{title:12} {costs.image.forward / 1e9:7.2f} {costs.prompt.forward / 1e9:7.2f}"
                f" {costs.sequence.forward / 1e9:9.2f}"
                f" {costs.head(sizes.new_tokens).forward / 1e9:6.2f}  {'':17}"
                f" {REAL_SHARES[family]:7.1%} {costs.image_share:9.1%}"
                f" {measured_share(model, sizes, arguments.pairs):9.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
