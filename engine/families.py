"""List the model families, and find the parts that a model of any of them has.

A family's facts are in a file of its own (`engine/family.py` says which). A new one is written
beside those and listed here.

Shapes: B rows, S tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.config import UsageError
from engine.family import Family, ImageTensors, causal_mask, text_positions
from engine.gemma3 import Gemma3
from engine.qwen2_5_vl import PIXEL_BOUNDS, Qwen25VL
from engine.qwen3_vl import Qwen3VL

__all__ = [
    "FAMILIES",
    "LORA_TARGETS",
    "PIXEL_BOUNDS",
    "SHARED_INPUTS",
    "Family",
    "Gemma3",
    "ImageTensors",
    "Qwen25VL",
    "Qwen3VL",
    "causal_mask",
    "family_of",
    "language_model",
    "lm_head_weight",
    "logit_softcap",
    "next_positions",
    "stop_ids",
    "suppressed_ids",
    "text_positions",
    "unwrapped",
]

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Qwen25VL(), Gemma3(), Qwen3VL())
}

# The language model's attention and feed-forward projections. Anchored on `language_model`: both
# vision towers have projections of the same names (SigLIP q/k/v_proj, Qwen's visual
# gate/up/down_proj), which plain suffixes would catch.
LORA_TARGETS = (
    r"^(?:.*\.)?language_model\.(?:.*\.)?layers\.\d+\."
    r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)$"
)

# Projections of one module that read the same input, in the order in which it calls them.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def family_of(model_type: str | None) -> Family:
    """Find the family of a `model_type` of config.json.

    Raises ValueError for one that this engine does not train.
    """
    family = FAMILIES.get(model_type or "")
    if family is None:
        relatives = [other.relatives.get(model_type or "") for other in FAMILIES.values()]
        because = "".join(f", {reason}" for reason in relatives if reason)
        *others, last = FAMILIES
        raise ValueError(
            f"a {model_type!r} model{because}; this engine trains {', '.join(others)} and {last}"
            " models"
        )
    return family


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

    Raises UsageError where it holds anything but numbers of tokens.
    """
    configured = net.generation_config.eos_token_id if net.generation_config is not None else None
    if configured is None:
        configured = []
    listed = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    if not all(type(token) is int for token in listed):
        raise UsageError(
            f"{net.name_or_path}: generation_config.json says that completions end at"
            f" {configured!r} (eos_token_id); it takes the number of a token, or a list of them"
        )
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
