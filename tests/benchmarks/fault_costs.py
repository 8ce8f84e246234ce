"""Time a step and a save of two commits against each other: what safety costs.

    python tests/benchmarks/fault_costs.py d1aa9a7 .          # about 15 minutes on one core
    python tests/benchmarks/fault_costs.py d1aa9a7 . --pairs 3 --sizes tiny

OLD and NEW are commits, which get a worktree each for the time of the comparison, or folders. Both
train the same models with the same settings, by SFT and by GRPO: the tests' tiny model, whose steps
are all book-keeping, and one of hidden size 512 with three layers. A child process of each checkout
makes both runs. The children alternate, and each pair begins with the other side.

A step goes from the end of one to the end of the next, with all that is checked, noted and logged
in between. Steps with a save among them and the first ones, which see new images, are left out. A
save is one call of `save_training_checkpoint`. Of each child the median counts. A ratio is NEW by
OLD: the median of the pairs with its 95 % interval from 2,000 resamples of the pairs. Seconds are
CPU seconds of the process. A save waits for the disk, so its wall clock is shown too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
from same_run import working_tree

from tests.benchmarks import models
from tests.helpers.runs import write_data
from tests.helpers.tiny import SAVE

STEPS, SAVE_EVERY, WARM_UP = 30, 6, 6
FAMILY = "qwen2_5_vl"
SIZES = ("tiny", "hidden 512")
# Runs in a checkout: times both scripts, and prints what `medians` takes as its last line.
CHILD = """
import json, sys, time
from pathlib import Path
import pytest
import torch
import run_grpo, run_sft
from engine.run import Run
from tests.helpers.runs import grpo, sft, speak

model, adapter, data, out, flags = json.loads(sys.argv[1])
torch.set_num_threads(1)
found, last, saved = {}, [], [False]

def now():
    return time.process_time(), time.perf_counter()

def note(name, began):
    found.setdefault(name, []).append([end - start for start, end in zip(began, now())])

def timed(script, save):
    def saving(*arguments, **more):
        began = now()
        save(*arguments, **more)
        note(f"{script} save", began)
        saved[0] = True
    return saving

def stepped(script, done):
    def step_done(run, **arguments):
        done(run, **arguments)
        if last and not saved[0]:
            note(f"{script} step", last[0])
        last[:], saved[0] = [now()], False
    return step_done

with pytest.MonkeyPatch.context() as patch:
    speak(patch)
    done = Run.step_done
    for script, main, run in (("SFT", run_sft, sft), ("GRPO", run_grpo, grpo)):
        last.clear()
        save = main.save_training_checkpoint
        patch.setattr(main, "save_training_checkpoint", timed(script, save))
        patch.setattr(Run, "step_done", stepped(script, done))
        start = Path(model if script == "SFT" else adapter)
        assert run(start, Path(data), Path(out) / script, *flags) == 0
print("\\n" + json.dumps(found))
"""


def medians(
    tree: Path, model: Path, adapter: Path, data: Path, steps: int
) -> dict[str, tuple[float, float]]:
    """Train with a checkout -> {"SFT step": (CPU seconds, wall clock)}, medians of the run."""
    flags = ["--max_steps", str(steps), "--save_steps", str(SAVE_EVERY), "--save_total_limit", "2"]
    with tempfile.TemporaryDirectory() as out:
        asked = json.dumps([str(path) for path in (model, adapter, data, out)] + [flags])
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        child = subprocess.run(
            [sys.executable, "-c", CHILD, asked],
            cwd=tree,
            env=os.environ | quiet | {"PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode:
        raise RuntimeError(f"{tree}: {child.stderr[-2000:]}")
    found: dict[str, list[list[float]]] = json.loads(child.stdout.splitlines()[-1])
    of_steps = {name: times[WARM_UP:] if "step" in name else times for name, times in found.items()}
    return {
        name: (statistics.median(t[0] for t in times), statistics.median(t[1] for t in times))
        for name, times in of_steps.items()
    }


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Find the 95 % interval of the median, from resamples of the pairs."""
    draw = random.Random(0)
    found = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return found[50], found[-51]


def made(size: str, folder: Path, tree: Path) -> tuple[Path, Path, Path]:
    """Make a model, its data and, by a checkout, an adapter to start from."""
    if size == "tiny":
        model = SAVE[FAMILY](folder / "model")
    else:
        model = models.save_checkpoint(FAMILY, folder / "model", models.Sizes())
    data = write_data(folder, 96)  # an epoch of SFT, which ends with a save, has 11 steps
    code = "import sys; from pathlib import Path; from tests.helpers.runs import sft; "
    code += "sys.exit(sft(*map(Path, sys.argv[1:4]), '--max_steps', '1'))"
    subprocess.run(
        [sys.executable, "-c", code, str(model), str(data), str(folder / "adapter")],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    return model, folder / "adapter", data


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", help="a commit, or a folder")
    parser.add_argument("new", help="a commit, or a folder")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    arguments = parser.parse_args(argv)
    print("| model | what | OLD, ms | NEW, ms | ratio | 95 % | OLD, wall ms | NEW, wall ms |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        old, new = (
            stack.enter_context(working_tree(getattr(arguments, side), scratch / side))
            for side in ("old", "new")
        )
        for size in arguments.sizes:
            inputs = made(size, scratch / size.replace(" ", "-"), old)
            pairs = []
            for number in range(arguments.pairs):
                sides = [(0, old), (1, new)][:: 1 if number % 2 else -1]
                pair = {side: medians(tree, *inputs, arguments.steps) for side, tree in sides}
                pairs.append((pair[0], pair[1]))
            for what in pairs[0][0]:
                cpu, wall = (
                    [(before[what][i], after[what][i]) for before, after in pairs] for i in (0, 1)
                )
                ratios = [after / before for before, after in cpu]
                low, high = interval(ratios)
                shown = [
                    f"{1000 * statistics.median(side):.1f}"
                    for side in (*zip(*cpu, strict=True), *zip(*wall, strict=True))
                ]
                print(
                    f"| {size} | {what} | {shown[0]} | {shown[1]} |"
                    f" {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} |"
                    f" {shown[2]} | {shown[3]} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
