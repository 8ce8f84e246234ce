"""Find base models and adapters on the disk and read what they say of themselves, loading nothing.

Everything in it is plain Python, so a wrong folder on a command line is answered without torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.config import UsageError

# The embedded checkpoints, by name, with their folders in data/demo. Adapters trained on one name
# their base so, not by a path of this machine.
EMBEDDED = {"demo": "base", "demo-gemma": "base_gemma"}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


# ---- base models ---------------------------------------------------------------------------------
def model_path(name: str) -> str:
    """Return where transformers finds a model: the folder of an embedded one, else the name itself.

    name: a folder, a hub name, 'demo' or 'demo-gemma'.
    """
    import data.demo  # here: only an embedded model needs its folder

    return str(Path(data.demo.__path__[0]) / EMBEDDED[name]) if name in EMBEDDED else name


def looks_local(name: str) -> bool:
    """Tell whether `name` can only be a folder or an embedded model, never a hub name.

    That is anything but owner/model, and owner/model too where such a folder exists.
    """
    return (
        name in EMBEDDED
        or name.startswith((".", "~", "/"))
        or name.count("/") != 1
        or Path(name).is_dir()
    )


def check_model_folder(name: str) -> None:
    """Raise UsageError where `name` can only be a folder and none with a checkpoint is there."""
    folder = Path(model_path(name))
    if not looks_local(name):
        return
    if not folder.is_dir():
        raise UsageError(
            f"--model_name_or_path {name}: no such folder; give a checkpoint's folder, a hub name"
            " (owner/model) or 'demo'"
        )
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--model_name_or_path {name}: the folder holds no config.json, so it is no checkpoint"
        )


# ---- adapters ------------------------------------------------------------------------------------
def adapter_record(folder: str | Path) -> dict[str, Any]:
    """Read adapter_config.json of an adapter's folder, as plain JSON.

    Raises UsageError where the folder holds no adapter, or a file that cannot be read.
    """
    folder = Path(folder)
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        raise UsageError(
            f"{folder}: no adapter there; an adapter folder holds {' and '.join(ADAPTER_FILES)}"
        )
    try:
        record = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"it holds a {type(record).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: adapter_config.json cannot be read ({error})") from error
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
