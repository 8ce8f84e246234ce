"""Read a saved LoRA adapter and check what it says of itself, before any weight is loaded.

Of adapter_config.json only what engine/adapter_settings.py accepts is taken. The tensors' names and
shapes come from the header of adapter_model.safetensors, former names of modules as those of today.

Everything in it is plain Python, so a wrong adapter on a command line is answered without torch.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from data.files import sha256_of
from engine.adapter_settings import (
    accepted_settings,
    base_problem,
    settings_problems,
    shown,
    slow_pattern,
    unknown_settings,
)
from engine.config import UsageError
from engine.model_checks import MAX_HEADER
from engine.model_files import ADAPTER_FILES, EMBEDDED, looks_local, model_path, same_base

PREFIX = "base_model.model."  # of every name in an adapter's file, as peft writes it
LARGEST_CONFIG = 16 * 2**20  # bytes

# Names that modules had in earlier versions of transformers, with those of today. Gemma 3 until
# 4.51 and Qwen2.5-VL until 4.51 had no common `model.`, SigLIP until 4.57 a `vision_model`.
_FORMER = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("visual.", "model.visual."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens", "model.language_model.embed_tokens"),
    ("model.norm.", "model.language_model.norm."),
)
# The name of the adapter itself, which a plain state_dict has and peft's own files have not.
_ADAPTER_NAME = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save"
    r"|token_adapter\.trainable_tokens_delta)\.(?!(?:weight|bias)$)[^.]+(?=\.|$)"
)
_WRAPPERS = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|module)\.")


@dataclass(frozen=True)
class SavedAdapter:
    """Hold what an adapter's two files say of it.

    base: the base model that it names, None where it names none.
    settings: arguments of peft's LoraConfig, checked.
    shapes: of its tensors, by the names that today's peft and transformers give them.
    stored: the names in the file, by today's names.
    renamed: whether an earlier version of transformers named its modules.
    """

    folder: Path
    base: str | None
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, str]
    renamed: bool

    @property
    def largest_rank(self) -> int:
        """Return the largest rank among its tensors, 0 where it has none."""
        ends = (".lora_A.weight", ".lora_embedding_A")
        return max(
            (shape[0] for name, shape in self.shapes.items() if name.endswith(ends)), default=0
        )

    def names_of(self, module: str) -> list[str]:
        """List the names by which the adapter's settings may call a module: today's comes first."""
        former = [
            name + module.removeprefix(today)
            for name, today in _FORMER
            if self.renamed and module.startswith(today)
        ]
        return [module, *former]


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read and check an adapter's files.

    Raises UsageError that names every problem: a folder without an adapter, a file that cannot be
    read, a setting of another type or out of range, and a kind of adapter that cannot be run here.
    """
    folder = Path(folder)
    record = adapter_record(folder)
    where = f"{folder}: adapter_config.json"
    problems = [f"{where}: {problem}" for problem in settings_problems(record)]
    shapes, stored, renamed, of_tensors = _tensors(folder)
    problems += [f"{folder}: adapter_model.safetensors: {problem}" for problem in of_tensors]
    settings = {} if problems else accepted_settings(record)
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in shapes}
    if slow := slow_pattern(settings, modules):
        problems = [f"{where}: {slow}"]
    if problems:
        raise UsageError(problems)
    if unknown := unknown_settings(record):
        _say_once(
            f"note: {where} has settings that are not known here and left out:"
            f" {', '.join(unknown[:8])}"
        )
    base = record.get("base_model_name_or_path") or None
    return SavedAdapter(folder, base, settings, shapes, stored, renamed)


@lru_cache
def _say_once(note: str) -> None:
    """Print a note, which a command would repeat each time that it reads an adapter."""
    print(note, file=sys.stderr)


def adapter_record(folder: str | Path) -> dict[str, Any]:
    """Read adapter_config.json of an adapter's folder, as plain JSON.

    Raises UsageError where the folder holds no adapter, a file that cannot be read, or a base model
    that is no text.
    """
    folder = Path(folder)
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        raise UsageError(
            f"{folder}: no adapter there; an adapter folder holds {' and '.join(ADAPTER_FILES)}"
        )
    path = folder / "adapter_config.json"
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"it holds a {type(record).__name__}, not an object")
    except RecursionError:
        raise UsageError(
            f"{folder}: adapter_config.json cannot be read (it is nested too deeply)"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: adapter_config.json cannot be read ({error})") from error
    problem = base_problem(record.get("base_model_name_or_path"))
    if problem:
        raise UsageError(f"{folder}: adapter_config.json: base_model_name_or_path {problem}")
    return record


def base_of_adapter(folder: str | Path) -> str:
    """Return the base model that an adapter was trained on, as its adapter_config.json names it.

    Raises UsageError where the folder holds no adapter, or one that names no base.
    """
    base = adapter_record(folder).get("base_model_name_or_path")
    if not base:
        raise UsageError(
            f"{folder}: adapter_config.json names no base model; give --model_name_or_path"
        )
    return str(base)


# ---- the base of an adapter ----------------------------------------------------------------------
def base_to_use(folder: str | Path, given: str = "") -> tuple[str, str | None]:
    """Choose the base that an adapter goes on: the one that it names, or a copy of that.

    A folder may be a moved or downloaded copy of what the adapter names, and a hub model a mirror
    or the full-precision form of it. That keys and shapes fit is checked in any case.

    given: the base asked for, "" for the adapter's own.

    Returns the base, and a line that says so where it is taken for a copy. Raises UsageError where
    the adapter names none, where it names another model, and where it is in the base already.
    """
    named = adapter_record(folder).get("base_model_name_or_path")
    base = given or base_of_adapter(folder)
    _check_not_folded_in(folder, base, named)
    if named and same_base(base, named):
        return base, None
    on_disk = any(name not in EMBEDDED and looks_local(name) for name in (named, base) if name)
    if named and not on_disk and _bare_name(named) != _bare_name(base):
        raise UsageError(
            f"--model_name_or_path {base}: the adapter in {folder} was trained on {named}; give"
            " that model or a copy of it"
        )
    return base, (
        f"note: {folder} names {named or 'no model'} as its base; {base} is taken for a copy of it"
    )


def _check_not_folded_in(folder: str | Path, base: str, named: str | None) -> None:
    """Raise UsageError for a merged model that has this adapter, or one of the same base, in it."""
    path = Path(model_path(base)) / "merge.json"
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        digest, merged_into = record["adapter_sha256"], str(record["base"])
        # the base may have moved before the merge
        names = [merged_into, str(record.get("base_of_adapter") or "")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path}: is no record of a merge ({type(error).__name__}); restore or remove it"
        ) from error
    if digest == sha256_of(Path(folder) / ADAPTER_FILES[1]):
        raise UsageError(
            f"--model_name_or_path {base}: the adapter in {folder} is folded into it already"
            f" (merge.json there); give its base {merged_into}, or the merged model alone"
        )
    if named and any(same_base(named, name) for name in names):
        raise UsageError(
            f"--model_name_or_path {base}: it is {merged_into} with an adapter folded in, by its"
            f" merge.json, and the adapter in {folder} was trained on {named}; give that base"
        )


def _bare_name(name: str) -> str:
    """Take the owner and the kind of quantization from a hub name: a mirror has the same rest."""
    return _QUANTIZED.sub("", name.rpartition("/")[2].lower())


_QUANTIZED = re.compile(
    r"(?:-unsloth)?-(?:bnb|awq|gptq|fp8|int4|int8|4bit|8bit)(?:-(?:int4|int8|4bit|8bit))*$"
)


# ---- tensors -------------------------------------------------------------------------------------
def _tensors(
    folder: Path,
) -> tuple[dict[str, tuple[int, ...]], dict[str, str], bool, list[str]]:
    """Read the header of adapter_model.safetensors.

    Returns shapes and names in the file, both by today's names, whether modules have former names,
    and problems.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, str] = {}
    problems, renamed = [], False
    path = folder / "adapter_model.safetensors"
    try:
        with path.open("rb") as beginning:
            header = int.from_bytes(beginning.read(8), "little")
        if header > MAX_HEADER:
            raise SafetensorError(f"a header of {header:,} bytes, at most {MAX_HEADER:,} are read")
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                today = todays_name(name)
                renamed |= PREFIX + _plain_name(name) != today
                if today in stored:
                    same = f"{shown(stored[today])} and {shown(name)}"
                    problems.append(f"{same} are one tensor under two names")
                shapes[today], stored[today] = tuple(file.get_slice(name).get_shape()), name
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder}: adapter_model.safetensors cannot be read ({error})") from error
    on_head = [name for name in shapes if name.startswith(f"{PREFIX}lm_head.lora_")]
    if on_head:
        problems.append(
            "it has LoRA on lm_head, which cannot be used here; train it without lm_head in"
            " target_modules (modules_to_save is possible)"
        )
    return shapes, stored, renamed, problems


def todays_name(name: str) -> str:
    """Give the name that today's peft and transformers have for a tensor of an adapter."""
    inner = _plain_name(name)
    for former, today in _FORMER:
        if inner.startswith(former):
            return PREFIX + today + inner.removeprefix(former)
    return PREFIX + inner


def _plain_name(name: str) -> str:
    """Take out of a tensor's name what peft's own files do not have: wrappers, adapter names."""
    inner = _WRAPPERS.sub("", f".{name}")[1:].removeprefix(PREFIX)
    inner = _ADAPTER_NAME.sub(r".\1", f".{inner}")[1:]
    inner = inner.replace(".modules_to_save.", ".")
    return inner.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
