"""Write adapters between two others of one base, exactly: W0 + (1 - alpha) dW1 + alpha dW2.

    python -m engine.merge --interpolate SFT GRPO --alpha 0 0.25 0.5 0.75 1 --output_dir between

An adapter adds dW = s B A to each of its modules. The sum of two such products is one product of
stacked matrices, so nothing is rounded or left out, and the result is a plain LoRA of rank r1 + r2:

    A = [A1; A2]    B = [(1 - alpha) s1 B1, alpha s2 B2]    lora_alpha = rank, so its scale is 1

A module that only one of them has keeps that one's rank. At alpha 0 and 1 one adapter has no share,
so the other is copied as it is, byte for byte, at its own rank. Its scores are its run's, and a
difference beside them is no matter of rounding.

Shares lie in [0, 1]. Beyond them the weights leave what either training has seen, and a slip of the
point (25 for 0.25) would make an adapter that answers nonsense.

What is no product B A (DoRA, biases, whole modules, trained tokens) is refused.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import safe_open, save_file
from torch import Tensor

from data.files import sha256_of, write_json
from data.sets import TRAIN, is_trained_on
from engine.adapter_files import PREFIX, SavedAdapter, base_to_use, read_adapter
from engine.adapter_places import explicit_config
from engine.adapter_settings import LARGEST_RANK
from engine.card import TRAINED_BEFORE, write_run_card
from engine.config import UsageError
from engine.merge_settings import (
    INTERPOLATION,
    MergeConfig,
    alpha_folder,
    keep_asking,
    new_folder,
)
from engine.model import POLICY, check_adapter
from engine.model_files import ADAPTER_FILES, same_base
from engine.resume import changed_base_of, saved_record
from engine.runtime import versions
from engine.values import show

# Endings of the two sides of a product, by the kind of layer: linear and convolution, embedding.
_SIDES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
# What the two must have been asked alike, so that what lies between them can be asked at all.
_ASKED = ("label_file", "prompt", "answer_format", "min_visual_tokens", "max_visual_tokens")
_KEPT = (*_ASKED, "max_completion_length", "bf16", "num_threads")


@dataclass(frozen=True)
class Change:
    """Hold what an adapter adds to one module: scale * B A.

    a [r, ...], b [..., r], both fp32: in B the rank is the second dimension. sides: the endings of
    their names.
    """

    a: Tensor
    b: Tensor
    scale: float
    sides: tuple[str, str]


# ---- read ----------------------------------------------------------------------------------------
def changes_of(base: str, saved: SavedAdapter) -> dict[str, Change]:
    """Read what an adapter adds to each module -> {module: its change}.

    Scales are those that peft gives the modules of the base, from patterns, alphas and rsLoRA.

    Raises UsageError for an adapter that does not fit the base, and for one with anything that is
    no product of two matrices.
    """
    net = check_adapter(base, saved.folder)
    if net is None:
        raise UsageError(f"{base}: cannot be read as a model, so no adapter of it can be placed")
    modules = dict(net.named_modules())
    found: dict[str, Change] = {}
    names = set(saved.shapes)
    with safe_open(saved.folder / ADAPTER_FILES[1], "pt") as file:
        for name in sorted(names):
            for sides in _SIDES:
                module = name.removesuffix(sides[0])
                if module == name or module + sides[1] not in names:
                    continue
                layer = modules[module]
                assert isinstance(layer, LoraLayer)
                a, b = (file.get_tensor(saved.stored[module + side]).float() for side in sides)
                scale = float(layer.scaling[POLICY])
                found[module.removeprefix(PREFIX)] = Change(a, b, scale, sides)
                names -= {module + side for side in sides}
    rest = sorted(names & saved.shapes.keys())
    if rest:
        raise UsageError(
            f"{saved.folder}: has {rest[0].removeprefix(PREFIX)}, which is no low-rank product, so"
            " what lies between two adapters would not be exact (DoRA, biases, whole modules and"
            " trained tokens are refused); fold both adapters into their base and average those"
        )
    return found


def check_asked_alike(first: Path, second: Path) -> dict[str, Any]:
    """Compare how two adapters' runs asked -> {setting: value}, the second's before the first's.

    An adapter from elsewhere has no run and says nothing. Raises UsageError for every difference.
    """
    one, other = (saved_record(folder)[1] for folder in (first, second))
    different = [
        f"--interpolate: {name} is {show(one[name])} in {first} and {show(other[name])} in"
        f" {second}; adapters that were asked differently have nothing between them"
        for name in _ASKED
        if name in one and name in other and one[name] != other[name]
    ]
    if different:
        raise UsageError(different)
    return {name: value for name, value in (one | other).items() if name in _KEPT}


# ---- between -------------------------------------------------------------------------------------
def stacked(
    first: Mapping[str, Change], second: Mapping[str, Change], alpha: float
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Add the shares of two adapters' changes -> (tensors by peft's names, {module: rank}).

    alpha: the second's share, 1 - alpha is the first's. The scales are in B.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in sorted(first.keys() | second.keys()):
        parts = [
            (share, changes[module])
            for share, changes in ((1 - alpha, first), (alpha, second))
            if module in changes
        ]
        sides = parts[0][1].sides
        a = torch.cat([change.a for _, change in parts])
        b = torch.cat([share * change.scale * change.b for share, change in parts], dim=1)
        tensors |= {PREFIX + module + sides[0]: a, PREFIX + module + sides[1]: b}
        ranks[module] = len(a)
    return tensors, ranks


def write_between(
    folder: Path, base: str, first: Mapping[str, Change], second: Mapping[str, Change], alpha: float
) -> int:
    """Write the adapter of one share as plain peft loads it, and return its largest rank.

    folder: an empty one. base: the base's name, for adapter_config.json.

    Raises UsageError for a rank that no adapter may have here.
    """
    tensors, ranks = stacked(first, second, alpha)
    largest = max(ranks.values())
    if largest > LARGEST_RANK:
        raise UsageError(
            f"--interpolate: the two ranks add up to {largest:,}, and at most {LARGEST_RANK:,} can"
            " be used; interpolate adapters of smaller rank"
        )
    config = explicit_config({name: (rank, rank) for name, rank in ranks.items()}, {})
    config.base_model_name_or_path, config.task_type = base, "CAUSAL_LM"
    config.inference_mode = True
    record = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.to_dict().items()
    }
    write_json(folder / ADAPTER_FILES[0], record)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / ADAPTER_FILES[1], {"format": "pt"})
    (folder / ADAPTER_FILES[1]).chmod((folder / ADAPTER_FILES[0]).stat().st_mode & 0o777)
    return largest


# ---- command -------------------------------------------------------------------------------------
def interpolate(config: MergeConfig) -> str:
    """Write the adapters of all shares, each in a folder alpha-<share>, and say what comes next.

    Nothing is there before all of them are written and fit the base.

    Raises UsageError where the sum would not be exact or has no meaning: other bases, questions
    that were asked differently, an adapter that is more than LoRA, the same adapter twice.
    """
    places = Path(config.interpolate[0]), Path(config.interpolate[1])
    first, second = map(read_adapter, places)
    base = _one_base(config, first, second)
    settings = check_asked_alike(*places)
    digests = [sha256_of(place / ADAPTER_FILES[1]) for place in places]
    if digests[0] == digests[1]:
        raise UsageError(f"--interpolate: {places[0]} and {places[1]} hold the same adapter")
    changes = changes_of(base, first), changes_of(base, second)
    with new_folder(config.output_dir) as temporary:
        ranks = []
        for alpha in config.alpha:
            folder = temporary / alpha_folder(alpha)
            folder.mkdir()
            if alpha in (0, 1):
                copied = (first, second)[int(alpha)]
                for name in ADAPTER_FILES:
                    shutil.copyfile(copied.folder / name, folder / name)
                rank = copied.largest_rank
            else:
                rank = write_between(folder, base, *changes, alpha)
                check_adapter(base, folder)
            ranks.append(rank)
            source = {"alpha": alpha, "adapters": list(map(str, places)), "sha256": digests}
            write_json(folder / "config.json", _record(source, places, base, rank, settings))
            write_run_card(folder)
        asking = keep_asking(settings, temporary)
    return _told(config, asking, ranks)


def _one_base(config: MergeConfig, first: SavedAdapter, second: SavedAdapter) -> str:
    """Return the base of both adapters, and say on stderr where it is not as they were trained."""
    named = []
    for saved in (first, second):
        base, note = base_to_use(saved.folder, config.model_name_or_path)
        named.append(base)
        for line in (
            note,
            (changed := changed_base_of(saved.folder, base)) and f"warning: {changed}",
        ):
            if line:
                print(line, file=sys.stderr)
    if not same_base(*named):
        raise UsageError(
            f"--interpolate: {first.folder} was trained on {named[0]} and {second.folder} on"
            f" {named[1]}; adapters of different bases have nothing between them"
        )
    return named[0]


def _record(
    source: Mapping[str, Any],
    places: Sequence[Path],
    base: str,
    rank: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Make config.json of one adapter, as later commands read that of a run.

    source: its share, and of both adapters the folder and SHA-256.
    """
    records = [saved_record(place)[0] for place in places]
    runs = [record.get("script") for record in records]
    values = dict(settings) | {"model_name_or_path": base, "lora_r": rank}
    origin = {"model_name_or_path": "adapter", "lora_r": INTERPOLATION}
    before, after = (record.get("data") or {} for record in records)
    trained = {
        name.replace(TRAIN, TRAINED_BEFORE, 1): before[name]
        for name in before
        if is_trained_on(name)
    }
    data = trained | after
    noted = next((record["base"] for record in records if "base" in record), None)
    return {
        "script": INTERPOLATION,
        "recipe": None,
        INTERPOLATION: {**source, "scripts": runs},
        "settings": {
            name: {
                "value": value.record() if hasattr(value, "record") else value,
                "origin": origin.get(name, "interpolated runs"),
            }
            for name, value in values.items()
        },
        "data": data,
        **({} if noted is None else {"base": noted}),
        "versions": versions(),
    }


def _told(config: MergeConfig, asking: Mapping[str, Any], ranks: Sequence[int]) -> str:
    """Say what was written, and the command that scores it on validation data."""
    place, named = Path(config.output_dir), [alpha_folder(alpha) for alpha in config.alpha]
    prompt = asking["prompt"] or "PROMPT"
    if "prompt" in asking["kept"]:
        prompt = str(place / prompt)
    command = ["python", "-m", "eval.matrix", "--model"]
    command += [f"{name.replace('.', '_')}={place / name}" for name in named]  # as it takes names
    command += ["--prompt", prompt]
    command += ["--data_file", "HOME=VALIDATION", "ABROAD=VALIDATION", "--output_dir", "FOLDER"]
    shown = ", ".join(f"{name} of rank {rank}" for name, rank in zip(named, ranks, strict=True))
    return (
        f"{place}: {shown}; between {' and '.join(config.interpolate)}\nnext, on validation sets:"
        f" {shlex.join(command)}"
    )
