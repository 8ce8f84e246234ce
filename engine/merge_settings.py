"""Declare and check the settings of `python -m engine.merge`, before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.adapter_files import base_to_use, read_adapter
from engine.config import Resolved, UsageError, parse_config, setting
from engine.model_files import check_model_folder
from engine.runtime import check_writable
from engine.settings import THREADS


@dataclass(frozen=True)
class MergeConfig:
    """Hold the flags of `python -m engine.merge`."""

    adapter_name_or_path: str = setting(
        "", "folder of the adapter: a finished run, or a checkpoint-<step> of one", unset="none"
    )
    output_dir: str = setting("", "new folder for the merged model", unset="none")
    model_name_or_path: str = setting(
        "",
        "base model, where it has moved: a folder, a hub name or 'demo'",
        unset="the base that the adapter names",
    )
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "of the merged weights; the sum itself is always in float32"
    )
    num_threads: int | None = setting(
        None,
        "CPU threads of torch",
        unset="torch's own choice",
        unit="threads",
        within=THREADS,
    )


def merge_problems(config: MergeConfig) -> list[str]:
    """Name what is missing on the command line, one line each."""
    return [
        f"--{name} is missing"
        for name in ("adapter_name_or_path", "output_dir")
        if not getattr(config, name)
    ]


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
            "Fold a trained adapter into its base and write a folder that plain transformers loads."
        ),
    )
    config: MergeConfig = resolved.configs[0]
    read_adapter(config.adapter_name_or_path)
    base, _ = base_to_use(config.adapter_name_or_path, config.model_name_or_path)
    check_model_folder(base)
    check_new_folder(config.output_dir)
    return resolved
