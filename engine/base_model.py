"""Load a base model or its processor, and refuse in one line what cannot be run.

The base is frozen and in bf16 (fp32 on a CPU run).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from data.examples import Example
from data.prompts import Prompt
from engine.attention import IMPLEMENTATION
from engine.config import UsageError
from engine.encode import EncodedPrompt, EncodedRow, Encoder, read_config
from engine.families import Family, family_of, stop_ids, suppressed_ids
from engine.model_checks import (
    check_enough_weights,
    check_not_quantised,
    check_sizes,
    check_weights,
)
from engine.model_files import check_model_folder, looks_local, model_path
from engine.processor_files import one_line, parsed_config
from engine.ranks import ALONE, Ranks
from engine.shard import ShardedBase, load_sharded
from engine.vision import VisionCache

_ATTENTION = {"": "sdpa", "text_config": IMPLEMENTATION}
_HUB_ADVICE = (
    "A hub model must exist and be reachable, or with HF_HUB_OFFLINE lie in the local cache; for a"
    " gated one accept its licence at https://huggingface.co/{} and run `hf auth login`"
)


@dataclass(frozen=True)
class BaseModel:
    """Hold a base model with its processor and the facts of its family.

    name: as given: a folder, a hub name, 'demo' or 'demo-gemma'.
    net: transformers' model, frozen.
    stop_ids: tokens that end a completion.
    suppressed_ids: tokens that are never sampled, left out of every log-probability.
    vision: features of images by the frozen vision tower, which runs once for each.
    sharded: keeps the ranks in step where the base is sharded among them.
    """

    name: str
    net: PreTrainedModel
    family: Family
    encoder: Encoder
    stop_ids: frozenset[int]
    suppressed_ids: tuple[int, ...]
    vision: VisionCache
    sharded: ShardedBase | None = None

    def encode_prompt(self, example: Example, prompt: Prompt) -> EncodedPrompt:
        """Turn an example into the prompt's tokens and the image's features."""
        return self.encoder.encode_prompt(example, prompt, self.vision.look(example))

    def encode_answer(self, example: Example, prompt: Prompt, answer: str) -> EncodedRow:
        """Turn an example into its prompt followed by an answer, which is supervised."""
        return self.encoder.encode_answer(example, prompt, answer, self.vision.look(example))


def load_encoder(name: str, *, min_visual_tokens: int, max_visual_tokens: int) -> Encoder:
    """Load tokenizer and image processor of a checkpoint, without its weights.

    Raises UsageError (one line) as `load_model` does.
    """
    path = model_path(name)
    _check_checkpoint(name, path)
    try:
        return Encoder.from_pretrained(
            path, min_visual_tokens=min_visual_tokens, max_visual_tokens=max_visual_tokens
        )
    except (OSError, ValueError) as error:
        raise UsageError(_unusable(name, error)) from error
    except Exception as error:  # of many classes: settings of a tokenizer can be anything
        raise UsageError(
            f"--model_name_or_path {name}: its tokenizer or image processor cannot be used"
            f" ({type(error).__name__}: {one_line(error)})"
        ) from error


def load_model(
    name: str,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    min_visual_tokens: int,
    max_visual_tokens: int,
    vision_cache_gb: float = 0.0,
    vision_cache_dir: str | None = None,
    encoder: Encoder | None = None,
    shard_among: Ranks | None = None,
) -> BaseModel:
    """Load and freeze a base model of one of the families.

    dtype: "auto" for the one that its weights are stored in.
    vision_cache_gb, vision_cache_dir: see VisionCache.
    encoder: its tokenizer and image processor, where they are loaded already.
    shard_among: ranks to shard it among (engine/shard.py), of which rank 0 alone reads it.

    Raises UsageError (one line) where there is no such model at `name`.
    """
    path = model_path(name)
    if not sys.stderr.isatty():
        disable_progress_bar()  # of reading weights; in a log file it is one long line
    encoder = encoder or load_encoder(
        name, min_visual_tokens=min_visual_tokens, max_visual_tokens=max_visual_tokens
    )
    whole = partial(_whole, name, path, dtype, encoder)
    if shard_among is None:
        net, sharded = whole(device), None
    else:
        net = load_sharded(whole, partial(_empty, path), device, shard_among)
        sharded = ShardedBase(net, shard_among)
    family = family_of(net.config.model_type)
    # the checkpoint's own, which only who has read it knows
    ranks = shard_among or ALONE
    stops = ranks.on_first(lambda: sorted(stop_ids(net, encoder.tokenizer, encoder.end_of_turn_id)))
    vision = VisionCache(
        net, family, encoder, max_bytes=int(vision_cache_gb * 2**30), folder=vision_cache_dir
    )
    suppressed = suppressed_ids(family, encoder.tokenizer)
    return BaseModel(name, net, family, encoder, frozenset(stops), suppressed, vision, sharded)


def _whole(
    name: str,
    path: str,
    dtype: torch.dtype | Literal["auto"],
    encoder: Encoder,
    device: torch.device,
) -> PreTrainedModel:
    """Read a base with its weights, check them and freeze them."""
    if Path(path).is_dir():
        check_weights(name, Path(path))
    try:
        text = parsed_config(path).get_text_config()
        encoder.check_vocabulary(text.vocab_size)
        if Path(path).is_dir():
            check_enough_weights(Path(path), text)
        # its stubs leave the pair out that output_loading_info asks for
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=_ATTENTION,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below, and refused
            trust_remote_code=False,
            use_safetensors=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many classes: whatever a damaged file makes transformers do
        raise UsageError(_unusable(name, error)) from error
    net, loading = loaded
    _check_loaded(name, loading)
    net.requires_grad_(False)
    net.to(device).eval()
    _check_finite(name, net)
    return net


def _empty(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Make a base without reading its weights, for a rank that gets them from rank 0."""
    config = parsed_config(path)
    return AutoModelForImageTextToText.from_config(
        config, dtype=dtype, attn_implementation=_ATTENTION
    )


def _check_loaded(name: str, loading: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not exactly those of the model.

    loading: what transformers says of it.
    """
    said = f"--model_name_or_path {name}: the checkpoint"
    if loading["mismatched_keys"]:
        key, found, needed = min(loading["mismatched_keys"])
        raise UsageError(
            f"{said}'s {key} has shape {tuple(found)}, and its config.json makes a model that needs"
            f" {tuple(needed)}; they belong to different models"
        )
    if loading["missing_keys"]:  # transformers would fill them with random numbers and go on
        missing = sorted(loading["missing_keys"])
        raise UsageError(f"{said} lacks {len(missing)} weights of the model, such as {missing[0]}")
    strange = sorted(loading["unexpected_keys"])
    adapted = [key for key in strange if "lora_" in key or ".base_layer." in key]
    if adapted:
        raise UsageError(
            f"{said} holds an adapter's weights beside its own, such as {adapted[0]}; merge the"
            " adapter into it first (peft's merge_and_unload), or give the base alone"
        )
    if strange:
        print(
            f"note: {name}: {len(strange)} weights of the checkpoint have no place in the model and"
            f" are left out, such as {strange[0]}",
            file=sys.stderr,
        )


def _check_finite(name: str, net: PreTrainedModel) -> None:
    """Refuse weights that are not finite numbers: every answer would be empty or noise."""
    for key, tensor in net.state_dict().items():
        # a sum is NaN or infinite where one of its terms is, and needs no mask of the tensor's size
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise UsageError(
                f"--model_name_or_path {name}: {key} holds numbers that are not finite (NaN or"
                " infinite); the file is damaged, or the model was trained to pieces"
            )


def _check_checkpoint(name: str, path: str) -> None:
    """Refuse a checkpoint that cannot be run, in one line and before weights are read."""
    check_model_folder(name)
    try:
        config = read_config(path)
        check_sizes(config)
        check_not_quantised(name, Path(path), config)
        text = config.get("text_config") or {}
        if not isinstance(text, dict):
            raise ValueError("its config.json has a text_config that is no object")
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--model_name_or_path {name}: {first_line(error)}") from error
    except OSError as error:
        raise UsageError(
            f"--model_name_or_path {name}: no config.json could be had ({first_line(error)})."
            f" {_HUB_ADVICE.format(name)}"
        ) from error
    if text.get("attn_logit_softcapping") is not None:
        raise UsageError(
            f"--model_name_or_path {name}: its config.json sets attn_logit_softcapping to"
            f" {text['attn_logit_softcapping']}, which transformers' attention leaves out: another"
            " model than the trained one would run. null there means that this is intended"
        )


def _unusable(name: str, error: Exception) -> str:
    """Say that a file of the checkpoint is missing, damaged or of another kind."""
    advice = (
        ""
        if looks_local(name) or not isinstance(error, OSError)
        else f". {_HUB_ADVICE.format(name)}"
    )
    return f"--model_name_or_path {name}: {first_line(error)}{advice}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
