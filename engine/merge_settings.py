"""Declare and check the settings of `python -m engine.merge`, and place its folder.

Nothing here loads torch: a command line is answered before that.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.files import KeptFile
from engine.adapter_files import base_to_use, read_adapter
from engine.config import ConfigError, Resolved, UsageError, parse_config, setting
from engine.model_files import check_model_folder
from engine.runtime import check_writable
from engine.settings import THREADS

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
# "script" of config.json where engine/interpolate.py wrote the adapter, and the key of what it says
INTERPOLATION = "interpolation"


@dataclass(frozen=True)
class MergeConfig:
    """Hold the flags of `python -m engine.merge`."""

    adapter_name_or_path: str = setting(
        "", "folder of the adapter: a finished run, or a checkpoint-<step> of one", unset="none"
    )
    output_dir: str = setting(
        "", "new folder for the merged model, or for the interpolated adapters", unset="none"
    )
    model_name_or_path: str = setting(
        "",
        "base model, where it has moved: a folder, a hub name or 'demo'",
        unset="the base that the adapter names",
    )
    dtype: Literal["bfloat16", "float32"] | None = setting(
        None,
        "of the merged weights; the sum itself is always in float32",
        unset="bfloat16",
    )
    num_threads: int | None = setting(
        None,
        "CPU threads of torch",
        unset="torch's own choice",
        unit="threads",
        within=THREADS,
    )
    interpolate: tuple[str, ...] = setting(
        (),
        "two adapters of one base, such as SFT and the GRPO that began from it: writes adapters"
        " between them instead of a merged model",
        unset="none",
    )
    alpha: tuple[float, ...] = setting(
        ALPHAS,
        "with --interpolate: shares of the second adapter's change, one adapter alpha-<share> each;"
        " the first has the rest. 0 is the first itself, 1 the second",
        within="[0, 1]",
    )

    @property
    def precision(self) -> Literal["bfloat16", "float32"]:
        """Return the dtype of the merged weights."""
        return self.dtype or "bfloat16"


# Flags that fold an adapter into its base: adapters between two others have no use for them.
_OF_FOLDING = ("adapter_name_or_path", "dtype", "num_threads")


def merge_problems(config: MergeConfig) -> list[str]:
    """Name what is missing on the command line or does not go together, one line each."""
    if config.interpolate:
        return _interpolation_problems(config)
    problems = [
        f"--{name} is missing"
        for name in ("adapter_name_or_path", "output_dir")
        if not getattr(config, name)
    ]
    if config.alpha != ALPHAS:
        problems.append("--alpha goes with --interpolate FIRST SECOND; leave it out to fold in one")
    return problems


def _interpolation_problems(config: MergeConfig) -> list[str]:
    problems = [
        f"--{name} folds one adapter into its base, and --interpolate makes adapters between two:"
        " give one of them"
        for name in _OF_FOLDING
        if getattr(config, name)
    ]
    if len(config.interpolate) != 2:
        problems.append(
            "--interpolate: expected two adapters, first that of share 0 (SFT), then that of share"
            f" 1 (GRPO); got {len(config.interpolate)}"
        )
    names = [alpha_folder(alpha) for alpha in config.alpha]
    problems += [
        f"--alpha {name.removeprefix('alpha-')} is given {names.count(name)} times; give it once"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if not config.output_dir:
        problems.append("--output_dir is missing: give the new folder of the adapters")
    return problems


def alpha_folder(alpha: float) -> str:
    """Name the folder of an interpolated adapter: alpha-0.25."""
    return f"alpha-{alpha:.15g}"


def check_new_folder(output_dir: str) -> None:
    """Raise UsageError where something is at the place of the folder to be, or none can be made."""
    final = Path(output_dir)
    if os.path.lexists(final) and (not final.is_dir() or any(final.iterdir())):
        kind = "is not empty" if final.is_dir() else "is a file"
        raise UsageError(
            f"--output_dir {output_dir} {kind} and nothing is overwritten: name another folder"
        )
    check_writable(final)
    check_writable(merging_folder(final))


def merging_folder(final: Path) -> Path:
    """Name the folder beside the one to be, in which a merge writes until it is verified."""
    return final.absolute().with_name(f".tmp-{final.absolute().name}")


@contextmanager
def new_folder(output_dir: str) -> Iterator[Path]:
    """Make a folder that gets its name only once all is written: the block writes the temporary.

    Nothing stays where the block raises. Raises UsageError where something has the name already.
    """
    check_new_folder(output_dir)
    final = Path(output_dir).absolute()
    temporary = merging_folder(final)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a command that was killed
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir}: cannot be used: {error.strerror}") from error
    try:
        yield temporary
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def keep_asking(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write label file and prompt of the adapter's run into a folder, for later commands.

    Returns what merge.json says of them and of the answer's form: names, and of files the SHA-256.
    """
    found: dict[str, Any] = {"kept": {}, "answer_format": settings.get("answer_format")}
    for name in ("label_file", "prompt"):
        found[name] = kept = settings.get(name)
        if isinstance(kept, KeptFile):
            found[name] = f"{kept.name}.toml" if name == "prompt" else "labels.txt"
            (folder / found[name]).write_bytes(kept.text.encode("utf-8"))
            found["kept"][name] = kept.sha256
    return found


def resolve_merge(argv: Sequence[str]) -> Resolved:
    """Read a command line into a MergeConfig, and check the folders that it names.

    Raises ConfigError or UsageError for everything that the user can correct now.
    """
    resolved = parse_config(
        [MergeConfig],
        argv,
        script="merge",
        prog="python -m engine.merge",
        validate=merge_problems,
        description=(
            "Fold a trained adapter into its base and write a folder that plain transformers"
            " loads.\nWith --interpolate: write adapters between two others of one base."
        ),
    )
    config: MergeConfig = resolved.configs[0]
    problems = []
    for folder in config.interpolate or (config.adapter_name_or_path,):
        try:
            read_adapter(folder)
            base, _ = base_to_use(folder, config.model_name_or_path)
            check_model_folder(base)
        except UsageError as error:
            problems += [one for one in error.problems if one not in problems]
    if problems:
        raise ConfigError(problems)
    check_new_folder(config.output_dir)
    return resolved
