"""Make long runs of both scripts and see that nothing grows: tensors, files, threads, memory.

    python tests/benchmarks/long_run.py                       # 1,000 steps each; about 15 minutes
    python tests/benchmarks/long_run.py --steps 200 --scripts grpo --family gemma3

Each script trains a tiny random model in a process of its own, with evaluations, saves, rotation
and a log line at every step. At equal intervals all live tensors are counted with the bytes of
their storages, and open file descriptors, threads and resident memory are read. What is compared is
the last third of the run with the third before it: the first holds warming up (caches of images,
compiled kernels). The exit code is 1 where something grows.

Tensors, files and threads may not grow by one. The bytes of the tensors may by LARGEST_GROWTH of
them: rollouts differ in length. What a run keeps of its history (log_history of trainer_state.json)
grows by design, by some kilobytes a step. Resident memory may grow by that and LARGEST_GROWTH.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
import pytest
import torch

from engine.run import Run
from tests.helpers.runs import grpo, sft, speak, write_data
from tests.helpers.tiny import SAVE

SCRIPTS = ("sft", "grpo")
HISTORY = 2.5e-3  # MB a step
LARGEST_GROWTH = 0.01  # between two thirds of a run: of memory, the allocator's own noise


@dataclass(frozen=True)
class Look:
    """Hold what a process holds after a step."""

    step: int
    tensors: int
    tensor_bytes: int
    files: int
    threads: int
    memory: float  # MB
    seconds: float  # a step since the look before

    @classmethod
    def at(cls, step: int, seconds: float) -> Look:
        gc.collect()
        with warnings.catch_warnings(action="ignore"):  # of deprecated objects that are looked at
            objects = gc.get_objects()
            tensors = [one for one in objects if isinstance(one, torch.Tensor)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            step,
            len(tensors),
            sum(storage.nbytes() for storage in storages.values()),
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            seconds,
        )


def looks_of(
    script: str,
    family: str,
    steps: int,
    every: int,
    folder: Path,
    often: int,
    show: Callable[[Look], object] = lambda look: None,
) -> list[Look]:
    """Train, look every so many steps and show it, and evaluate and save `often`."""
    model, data = SAVE[family](folder / "model"), write_data(folder)
    looks, began = [], [time.perf_counter()]
    step_done = Run.step_done

    def looked(run: Run, **arguments) -> None:
        step_done(run, **arguments)
        if run.step % every == 0:
            looks.append(Look.at(run.step, (time.perf_counter() - began[0]) / every))
            show(looks[-1])
            began[0] = time.perf_counter()

    validation = ["--validation_file", f"site={data}", "--save_total_limit", "2"]
    books = ["--max_steps", str(steps), "--save_steps", str(often)]
    with (
        pytest.MonkeyPatch.context() as patch,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        speak(patch)
        adapter = folder / "adapter"
        if script == "grpo":
            assert sft(model, data, adapter, "--max_steps", "1") == 0
        patch.setattr(Run, "step_done", looked)
        if script == "sft":
            flags = [*books, *validation, "--early_stopping_patience", "1000000"]
            assert sft(model, data, folder / "run", *flags) == 0
        else:
            assert (
                grpo(adapter, data, folder / "run", *books, *validation, "--eval_steps", str(often))
                == 0
            )
    return looks


def growth(looks: Sequence[Look]) -> list[str]:
    """Name what is larger in the last third than in the third before it, one line each."""
    third = len(looks) // 3
    before, after = looks[-2 * third : -third], looks[-third:]
    steps, found = after[0].step - before[0].step, []
    for name in ("tensors", "tensor_bytes", "files", "threads", "memory"):
        was, now = (
            statistics.median(getattr(look, name) for look in part) for part in (before, after)
        )
        allowed = LARGEST_GROWTH * was if name in ("tensor_bytes", "memory") else 0.0
        if name == "memory":
            allowed += HISTORY * steps
        if now > was + allowed:
            found.append(f"{name} grew from {was:,.1f} to {now:,.1f} in {steps} steps")
    return found


HEAD = "| script | step | tensors | their bytes | open files | threads | MB | ms a step |"


def row(script: str, look: Look) -> str:
    """Write a look as a row of a table in Markdown."""
    return (
        f"| {script} | {look.step} | {look.tensors:,} | {look.tensor_bytes:,} | {look.files} |"
        f" {look.threads} | {look.memory:.1f} | {1000 * look.seconds:.0f} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--looks", type=int, default=21, help="in a run")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--family", choices=sorted(SAVE), default="qwen2_5_vl")
    arguments = parser.parse_args(argv)
    if len(arguments.scripts) > 1:  # each in a process of its own
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
        codes = [
            subprocess.run([*command, "--scripts", script], check=False).returncode
            for script in arguments.scripts
        ]
        return max(codes)
    [script] = arguments.scripts
    every = max(1, arguments.steps // arguments.looks)
    out = sys.stdout  # what the run prints goes nowhere
    print(f"{HEAD}\n|---|---|---|---|---|---|---|---|", file=out, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        looks = looks_of(
            script,
            arguments.family,
            arguments.steps,
            every,
            Path(folder),
            often=max(1, arguments.steps // 20),
            show=lambda look: print(row(script, look), file=out, flush=True),
        )
    grown = growth(looks)
    for line in grown:
        print(f"error: {script}: {line}", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
