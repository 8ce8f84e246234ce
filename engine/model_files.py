"""Find base models on the disk and tell names from folders, loading nothing.

Everything in it is plain Python, so a wrong folder on a command line is answered without torch.
"""

from __future__ import annotations

from pathlib import Path

from engine.config import UsageError
from engine.model_checks import (
    check_not_quantised,
    holds_weights,
    quantised_name,
    read_object,
    refuse_quantised,
)

# The embedded checkpoints, by name, with their folders in data/demo. Adapters trained on one name
# their base so, not by a path of this machine.
EMBEDDED = {"demo": "base", "demo-gemma": "base_gemma"}
DEMO_RECIPES = ("demo", "demo-quick", "demo-gemma")  # those that name their model and data
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


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
    """Raise UsageError for a folder without a checkpoint, and for what says that it is quantised.

    A hub name says so by itself, before the hub is asked for anything.
    """
    folder = Path(model_path(name))
    if not looks_local(name):
        method = quantised_name(name)
        if method is not None:
            refuse_quantised(name, method, hub_name=True)
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
    try:
        check_not_quantised(name, folder, read_object(folder / "config.json"))
    except OSError as error:
        raise UsageError(f"--model_name_or_path {name}: {error}") from error
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--model_name_or_path {name}: {error}") from error


def lacks_weights(name: str) -> bool:
    """Tell whether a model is a folder that only describes it: its weights are elsewhere."""
    folder = Path(model_path(name))
    return folder.is_dir() and not holds_weights(folder)


def same_base(one: str, other: str) -> bool:
    """Tell whether two names are those of one base model, however they are spelled.

    A folder has many: relative or absolute, through a link, with or without a slash at its end.
    """
    if one == other or not one or not other:
        return one == other
    paths = [Path(model_path(name)) for name in (one, other)]
    return all(path.is_dir() for path in paths) and paths[0].resolve() == paths[1].resolve()
