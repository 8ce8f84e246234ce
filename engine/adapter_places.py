"""Find where in a model a saved adapter goes: which modules have LoRA, of which rank and alpha.

The patterns of a foreign adapter_config.json are compared with the modules' names here. peft then
gets a plain list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers import PreTrainedModel

from engine.adapter_files import SavedAdapter
from engine.adapter_settings import PATTERN_SECONDS, time_limit
from engine.base_model import first_line
from engine.config import UsageError

# Settings that say where LoRA is and how large.
PLACES = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
_CAN_HAVE_LORA = (nn.Linear, nn.Embedding, nn.Conv2d, nn.Conv3d)


def placed_config(net: PreTrainedModel, saved: SavedAdapter) -> LoraConfig:
    """Find the modules that a saved adapter goes on -> a configuration that lists them.

    The patterns of adapter_config.json are compared with today's names of the modules and, where
    the adapter has former ones, with those. peft then gets a list: no pattern of a foreign file.

    net: the base, without adapters. Its weights are not looked at.

    Raises UsageError where the patterns hit a module that cannot have LoRA, take too long, or ask
    for a rank that no tensor of the adapter has.
    """
    where = f"{saved.folder}: adapter_config.json"
    try:
        config = LoraConfig(**saved.settings)
        with time_limit(PATTERN_SECONDS):
            layers = _layers_with_lora(net, _maybe_include_all_linear_layers(config, net), saved)
    except TimeoutError:
        raise UsageError(
            f"{where}: its patterns take too long to compare with the modules' names"
        ) from None
    except (ValueError, TypeError, re.error) as error:
        raise UsageError(f"{where} cannot be used ({first_line(error)})") from error
    modules = dict(net.named_modules())
    for name, (rank, _) in layers.items():
        if not isinstance(modules[name], _CAN_HAVE_LORA):
            raise UsageError(
                f"{where}: target_modules hits {name}, a {type(modules[name]).__name__}, which"
                " cannot have LoRA; it must name linear layers"
            )
        if rank > saved.largest_rank:
            raise UsageError(
                f"{where}: asks for rank {rank} at {name}; the largest in"
                f" adapter_model.safetensors is {saved.largest_rank}"
            )
    if not layers:
        raise UsageError(
            f"{where}: target_modules names no module of the model; it was trained on another model"
            " or by another version"
        )
    return explicit_config(layers, saved.settings)


def _layers_with_lora(
    net: PreTrainedModel, config: Any, saved: SavedAdapter
) -> dict[str, tuple[int, float]]:
    """Match all modules with a LoraConfig -> {name: (rank, alpha)} of those that have LoRA."""
    ranks, alphas = _compiled(config.rank_pattern), _compiled(config.alpha_pattern)
    found = {}
    for module, _ in net.named_modules():
        names = saved.names_of(module)
        matches = [check_target_module_exists(config, name) for name in names] if module else []
        if any(isinstance(match, _ExcludedModule) for match in matches) or not any(matches):
            continue
        found[module] = (
            _by_pattern(ranks, names, config.r),
            _by_pattern(alphas, names, config.lora_alpha),
        )
    return found


def _compiled(values: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Any]]:
    """Compile the keys of rank_pattern or alpha_pattern, as peft's get_pattern_key reads them."""
    return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in values.items()]


def _by_pattern(
    patterns: Sequence[tuple[re.Pattern[str], Any]], names: Sequence[str], default: Any
) -> Any:
    """Look up the value of the first pattern that one of a module's names has."""
    matching = (value for pattern, value in patterns if any(map(pattern.match, names)))
    return next(matching, default)


def explicit_config(
    layers: Mapping[str, tuple[int, float]], settings: Mapping[str, Any]
) -> LoraConfig:
    """Make a configuration that lists modules with their ranks and alphas, and has no dropout.

    settings: arguments of LoraConfig, of which those that say where LoRA is are left out.
    """
    (r, alpha), _ = Counter(layers.values()).most_common(1)[0]
    others = {re.escape(name): both for name, both in layers.items() if both != (r, alpha)}
    kept = {name: value for name, value in settings.items() if name not in PLACES}
    sizes: dict[str, Any] = {"r": r, "lora_alpha": alpha}  # peft's annotation lacks fractions
    return LoraConfig(
        **kept | sizes | {"lora_dropout": 0.0},
        target_modules=list(layers),
        rank_pattern={name: rank for name, (rank, _) in others.items()},
        alpha_pattern={name: own for name, (_, own) in others.items()},
    )
