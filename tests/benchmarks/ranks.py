"""Time a GRPO run on several ranks, and see that the same run twice is the same to the last bit.

    python tests/benchmarks/ranks.py                       # 1 and 2 ranks, a small random model
    python tests/benchmarks/ranks.py --ranks 1 2 4 8       # on a machine with eight GPUs: NCCL
    python tests/benchmarks/ranks.py --ranks 1 8 --completions 256 -- \\
        --recipe medgemma-4b --adapter_name_or_path runs/sft --train_file rl.jsonl

Every variant makes the same run: as many completions a step whatever the ranks are, so it is the
same work divided. On GPUs gradients travel by NCCL. Without one all goes by gloo, and the ranks
share the CPU. What follows `--` are flags of run_grpo.py in the place of the small model and its
data.

The variants alternate, and each round begins with another one. Of a run each phase counts with the
mean of its steps, without the first two. "times as fast" is the time of the least ranks by a row's
own, the median of the rounds with the smallest and the largest, and the efficiency is that by what
is possible. Phases are of rank 0. `exchange` is what messages take, with the wait for other ranks,
and lies within the others. At the end the largest number of ranks has made its run twice or more:
adapters, completions and metrics are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  this checkout before an installed one
import torch

from engine.ranks import Ranks
from engine.run import Run
from rl.rollout import Rollouts
from tests.helpers.runs import assert_same_run, overriding, write_data

GROUP, STEPS, WARM_UP = 4, 6, 2
PHASES = {
    "prompts": (Rollouts, "take"),
    "sampling": (Rollouts, "sample"),
    "rewards": (Rollouts, "reward"),
    "scoring": (Rollouts, "score"),
    "sum of gradients": (Ranks, "sum_gradients"),
    "exchange": (Ranks, "_exchange"),
}


# ---- one run, on each rank -----------------------------------------------------------------------
def timed_run(file: str, flags: Sequence[str]) -> int:
    """Run run_grpo.py with clocks in it, and write rank 0's seconds a step into a file."""
    import run_grpo

    steps: list[dict[str, float]] = []
    now: dict[str, float] = defaultdict(float)

    def clock() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(name: str, function: Callable) -> Callable:
        def run(*arguments: Any, **options: Any) -> Any:
            began = clock()
            try:
                return function(*arguments, **options)
            finally:
                now[name] += clock() - began

        return run

    def begun(run: Run) -> bool:
        goes_on = began(run)
        now.clear()
        now["step"] = -clock()
        return goes_on

    def ended(run: Run, **arguments: Any) -> None:
        now["step"] += clock()
        steps.append(dict(now))
        done(run, **arguments)

    began, done = Run.goes_on, Run.step_done
    Run.goes_on, Run.step_done = begun, ended  # type: ignore[method-assign]
    for name, (owner, function) in PHASES.items():
        setattr(owner, function, timed(name, getattr(owner, function)))
    code = run_grpo.main(list(flags))
    if os.environ.get("RANK", "0") == "0":
        Path(file).write_text(json.dumps(steps))
    return code


def seconds(ranks: int, flags: Sequence[str], folder: Path) -> dict[str, float]:
    """Make a run on so many ranks -> seconds of each phase, the mean of its steps.

    A mean, since sampling and scoring come once a rollout and not at every step.
    """
    file = folder.with_suffix(".json")
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*start, __file__, "--child", str(file), "--", *flags, "--output_dir", str(folder)]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        command, env=os.environ | quiet, capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise RuntimeError(f"{ranks} ranks: {child.stderr[-3000:]}")
    steps = json.loads(file.read_text())[WARM_UP:]
    found = {name: statistics.mean(step.get(name, 0.0) for step in steps) for name in PHASES}
    return {"step": statistics.mean(step["step"] for step in steps)} | found


# ---- the comparison ------------------------------------------------------------------------------
def flags_of(ranks: int, completions: int, more: Sequence[str], folder: Path) -> list[str]:
    """Write the flags of a run: the same completions a step, a group a micro-batch."""
    own = list(more) or [
        *[
            "--model_name_or_path",
            str(folder / "model"),
            "--train_file",
            str(folder / "data.jsonl"),
        ],
        *["--adapter_name_or_path", "none", "--prompt", "demo", "--max_completion_length", "64"],
        *["--min_visual_tokens", "4", "--max_visual_tokens", "16", "--no_bf16"],
    ]
    accumulation = completions // (GROUP * ranks)
    usual = {
        "num_generations": GROUP,
        "per_device_train_batch_size": GROUP,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": 2 * accumulation,
        "max_steps": STEPS + WARM_UP,
    }
    return overriding([*own, *(word for k, v in usual.items() for word in (f"--{k}", str(v)))])


def table(rounds: Sequence[dict[int, dict[str, float]]]) -> list[str]:
    """Write a line for each number of ranks."""
    sizes = sorted(rounds[0])
    least = sizes[0]
    names = list(rounds[0][least])
    lines = [
        f"| ranks | {' | '.join(f'{name}, s' for name in names)} | times as fast | efficiency |",
        f"|{'---|' * (len(names) + 3)}",
    ]
    for size in sizes:
        shown = [f"{statistics.median(one[size][name] for one in rounds):.3f}" for name in names]
        ratios = sorted(one[least]["step"] / one[size]["step"] for one in rounds)
        fast = statistics.median(ratios)
        lines.append(
            f"| {size} | {' | '.join(shown)} | {fast:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |"
            f" {fast * least / size:.2f} |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    gpus = torch.cuda.device_count()
    default = [size for size in (1, 2, 4, 8) if size <= max(gpus, 2)]
    parser.add_argument("--ranks", type=int, nargs="+", default=default)
    parser.add_argument("--completions", type=int, default=32, help="of a step, of all ranks")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant runs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments, more = parser.parse_args(given[:cut]), given[cut + 1 :]
    if arguments.child:
        return timed_run(arguments.child, more)
    if arguments.completions % (GROUP * max(arguments.ranks)):
        parser.error(f"--completions: must be a multiple of {GROUP} x {max(arguments.ranks)}")
    with tempfile.TemporaryDirectory() as name:
        folder, sizes = Path(name), arguments.ranks
        if not more:
            from tests.benchmarks import models

            models.save_checkpoint("qwen2_5_vl", folder / "model", models.Sizes())
            write_data(folder, 16)
        rounds: list[dict[int, dict[str, float]]] = []
        for number in range(arguments.rounds):
            turn = number % len(sizes)
            rounds.append(
                {
                    size: seconds(
                        size,
                        flags_of(size, arguments.completions, more, folder),
                        folder / f"{size}-ranks-{number}",
                    )
                    for size in (*sizes[turn:], *sizes[:turn])
                }
            )
        print(f"{gpus} GPUs, {os.cpu_count()} CPUs, torch {torch.__version__}")
        print("\n".join(table(rounds)))
        most = max(sizes)
        for number in range(1, arguments.rounds):
            assert_same_run(folder / f"{most}-ranks-0", folder / f"{most}-ranks-{number}")
        if arguments.rounds > 1:
            print(f"{arguments.rounds} runs of {most} ranks: equal to the last bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
