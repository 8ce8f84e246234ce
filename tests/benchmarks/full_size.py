"""Take a checkpoint of a real model's size through everything, and measure time and memory.

    python tests/benchmarks/full_size.py                         # Qwen2.5-VL-3B, fp32 on a CPU
    python tests/benchmarks/full_size.py --model gemma-3-4b --folder /tmp/gemma
    python tests/benchmarks/full_size.py --scale 16              # a small one, in a few minutes

It makes a folder of the real shape in the hub's form, with random weights (tests/helpers/
hub_folder.py), and a few X-rays of noise. Then each stage runs in a process of its own: --dry_run,
one SFT step with its validation and scores, one rollout of GRPO with its two steps, the second of
them again from the checkpoint of the first, an evaluation, and the merge. The resumed run must end
with the same adapter to the bit.

A table shows for every phase its seconds, the most memory it held over what the process held before
the model, and the forecast. On a CPU memory is resident (VmHWM), in which the pages of weights that
are being read count too. On a GPU it is what torch allocates. The 3B model needs 24 GiB in float32
(22 of them free), the 4B one 26, half of that in bfloat16, and 30 GB of disk. Everything it wrote
is removed at the end, but for --keep.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  this checkout before an installed one
import numpy as np
import torch
from PIL import Image

from tests.helpers.hub_folder import MODELS, make_hub_folder
from tests.helpers.memory import resident

GIB = 2**30
STAGES = ("dry_run", "sft", "grpo", "resume", "evaluate", "merge")
ANSWER = (
    "<think>Lungs are clear, the heart is of normal size, no effusion is seen.</think>"
    "<solution>No Finding</solution>"
)


# ---- what the stages work on ---------------------------------------------------------------------
def write_data(folder: Path) -> None:
    """Write train.jsonl, two X-rays of noise of 512 x 512, and test.jsonl, another."""
    rng = np.random.default_rng(0)
    for file, first, count in (("train.jsonl", 0, 2), ("test.jsonl", 2, 1)):
        lines = []
        for i in range(first, first + count):
            image = f"image-{i}.png"
            pixels = rng.integers(0, 256, (512, 512), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / image)
            row = {"id": f"e{i}", "patient_id": f"p{i}", "image": image, "dataset": "noise"}
            lines.append(json.dumps(row | {"labels": ["No Finding"], "answer": ANSWER}))
        (folder / file).write_text("\n".join(lines) + "\n")


def command_of(stage: str, folder: Path, bf16: bool, tokens: int, prompt: str) -> list[str]:
    """Give the command line of a stage, in `folder` with the model and the data.

    tokens: of an image, where the model lets one choose. prompt: the instruction.
    """
    size = ["--min_visual_tokens", str(tokens), "--max_visual_tokens", str(tokens)]
    short = ["--max_completion_length", "16", "--per_device_eval_batch_size", "1"]
    precision = ["--bf16" if bf16 else "--no_bf16"]
    test = f"noise={folder / 'test.jsonl'}"
    train = ["--train_file", str(folder / "train.jsonl"), "--validation_file", test]
    train += [*size, *short, *precision, "--prompt", prompt]
    train += ["--warmup_ratio", "0", "--learning_rate", "1e-3"]
    sft = ["--model_name_or_path", str(folder / "model"), *train, "--max_steps", "1"]
    sft += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    grpo = ["--adapter_name_or_path", str(folder / "sft"), *train, "--max_steps", "2"]
    grpo += ["--num_generations", "2", "--per_device_train_batch_size", "2", "--save_steps", "1"]
    grpo += ["--gradient_accumulation_steps", "1", "--steps_per_generation", "2"]
    # noise earns no reward: what the steps then change is the decay
    grpo += ["--min_length", "0", "--no_vote_baseline", "--weight_decay", "0.1"]
    evaluate = ["--adapter_name_or_path", str(folder / "grpo"), "--data_file", test]
    evaluate += [*size, *short, *precision]
    dtype = "bfloat16" if bf16 else "float32"
    merge = ["--adapter_name_or_path", str(folder / "grpo"), "--dtype", dtype]
    return {
        "dry_run": [*sft, "--dry_run"],
        "sft": [*sft, "--output_dir", str(folder / "sft")],
        "grpo": [*grpo, "--output_dir", str(folder / "grpo")],
        "resume": ["--resume_from_checkpoint", str(folder / "grpo" / "checkpoint-1")]
        + ["--output_dir", str(folder / "resumed")],
        "evaluate": [*evaluate, "--output_dir", str(folder / "evaluated")],
        "merge": [*merge, "--output_dir", str(folder / "merged")],
    }[stage]


# ---- one stage, in a process of its own ----------------------------------------------------------
class Phases:
    """Measure seconds and the peak of memory of phases, which may lie within each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.forecast: dict[str, int] = {}
        self._open: list[str] = []
        self._originals: list[tuple[Any, str, Callable[..., Any]]] = []
        self._since = time.perf_counter()
        self.before = self._peak()

    def _peak(self) -> int:
        """Read the peak since the last call, in bytes, and begin a new one."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        peak = resident("VmHWM")
        with suppress(OSError):  # where it cannot be reset, a phase has the largest peak so far
            Path("/proc/self/clear_refs").write_text("5")
        return peak

    def _turn(self) -> None:
        """Book time and memory since the last turn to the phase that is open."""
        now, peak = time.perf_counter(), self._peak()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            self.peaks[name] = max(self.peaks.get(name, 0), peak)
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as a phase, and none of it as the phase around it."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Measure every call of a function of a module or class as the phase `name`."""
        original = self._replaceable(owner, function)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name):
                return original(*arguments, **keywords)

        setattr(owner, function, watched)

    def keep_forecast(self, owner: Any, function: str) -> None:
        """Keep what the last call of a forecasting function said of each phase."""
        original = self._replaceable(owner, function)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            found = original(*arguments, **keywords)
            self.forecast = {name: sum(parts.values()) for name, parts in found.phases.items()}
            return found

        setattr(owner, function, watched)

    def _replaceable(self, owner: Any, function: str) -> Callable[..., Any]:
        original: Callable[..., Any] = getattr(owner, function)
        self._originals.append((owner, function, original))
        return original

    def put_back(self) -> None:
        """Put back every function that is watched."""
        for owner, function, original in reversed(self._originals):
            setattr(owner, function, original)

    def record(self) -> dict[str, Any]:
        """Return what was measured, memory over what was held before the model."""
        over = {name: peak - self.before for name, peak in self.peaks.items()}
        return {"seconds": self.seconds, "peaks": over, "forecast": self.forecast}


def run_stage(stage: str, argv: list[str]) -> tuple[int, dict[str, Any]]:
    """Run a stage's command in this process -> (exit code, what was measured)."""
    import engine.fit
    import engine.merge
    import eval.decode
    import eval.evaluate
    import run_grpo
    import run_sft
    from data.files import DataError
    from engine.runtime import main_guard
    from rl.rollout import Rollouts

    phases = Phases()
    watched: list[tuple[Any, str, str]] = [
        (run_sft, "policy_to_fine_tune", "load"),
        (run_sft, "train", "update"),
        (run_sft, "validation_metrics", "validation"),
        (run_sft, "evaluate_sets", "evaluation"),
        (run_sft, "save_training_checkpoint", "save"),
        (run_grpo, "policy_with_reference", "load"),
        (run_grpo, "train", "update"),
        (run_grpo, "evaluate_policy", "evaluation"),
        (run_grpo, "save_training_checkpoint", "save"),
        (Rollouts, "sample", "rollout"),
        (Rollouts, "score", "scoring"),
        (engine.merge, "load_model", "load"),
        (engine.merge, "merge_adapter", "merge"),
        (engine.merge, "probe_logits", "compare"),
    ]
    if stage == "evaluate":
        watched = [
            (eval.decode, "load_policy", "load"),
            (eval.decode, "evaluate_sets", "evaluation"),
        ]
    for owner, function, name in watched:
        phases.watch(owner, function, name)
    for function in ("forecast", "decoding_forecast"):
        phases.keep_forecast(engine.fit, function)
    main = {"grpo": run_grpo, "resume": run_grpo, "evaluate": eval.evaluate, "merge": engine.merge}
    with phases.phase("other"):
        code = main_guard(lambda: main.get(stage, run_sft).main(argv), errors=(DataError,))
    phases.put_back()
    return code, phases.record()


# ---- all stages ----------------------------------------------------------------------------------
def table(measured: dict[str, dict[str, Any]]) -> str:
    """Write seconds, peak memory and forecast of every phase of every stage, in Markdown."""
    lines = ["| stage | phase | s | peak GiB | forecast GiB |", "|---|---|---|---|---|"]
    for stage, found in measured.items():
        for phase, seconds in found["seconds"].items():
            forecast = found["forecast"].get(phase)
            said = "" if forecast is None else f"{forecast / GIB:.1f}"
            peak = found["peaks"][phase] / GIB
            lines.append(f"| {stage} | {phase} | {seconds:.0f} | {peak:.1f} | {said} |")
    return "\n".join(lines)


def same_adapter(first: Path, second: Path) -> bool:
    """Tell whether two runs end with the same adapter to the bit."""
    name = "adapter_model.safetensors"
    return (first / name).read_bytes() == (second / name).read_bytes()


def rehearse(arguments: argparse.Namespace) -> int:
    """Make the folder, run every stage, print the table, and return the exit code."""
    name, folder, scale = arguments.model, arguments.folder, arguments.scale
    began = time.perf_counter()
    if not (folder / "model").is_dir():
        size = make_hub_folder(name, folder / "model", scale)
        write_data(folder)
        print(f"{name}, scale {scale}: {size / GIB:.2f} GiB of bf16 weights in {folder / 'model'}")
        print(f"made in {time.perf_counter() - began:.0f} s", flush=True)
    measured: dict[str, dict[str, Any]] = {}
    for stage in arguments.stages:
        argv = command_of(stage, folder, arguments.bf16, arguments.visual_tokens, arguments.prompt)
        print(f"\n--- {stage}: {' '.join(argv)}", flush=True)
        out = folder / f"{stage}.json"
        code = subprocess.run(
            [sys.executable, __file__, "--stage", stage, "--out", str(out), *argv], check=False
        ).returncode
        if out.is_file():
            measured[stage] = json.loads(out.read_text())
        print(table(measured), flush=True)
        if code:
            print(f"{stage} ended with exit code {code}")
            return code
    if {"grpo", "resume"} <= measured.keys():
        same = same_adapter(folder / "grpo", folder / "resumed")
        print(f"resumed run ends with the same adapter: {'yes' if same else 'NO'}")
        return 0 if same else 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-vl-3b")
    parser.add_argument(
        "--folder", type=Path, default=Path("full_size"), help="a new one, or one kept"
    )
    parser.add_argument("--scale", type=int, default=1, help="divides widths, heads and layers")
    parser.add_argument("--bf16", action="store_true", help="the base in bfloat16, on a GPU")
    parser.add_argument("--visual_tokens", type=int, default=256, help="of an image (Qwen2.5-VL)")
    parser.add_argument("--prompt", default="free_reasoning", help="a short one is faster: demo")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--keep", action="store_true", help="remove nothing")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments, argv = parser.parse_known_args()
    if arguments.stage:
        code, record = run_stage(arguments.stage, argv)
        arguments.out.write_text(json.dumps(record))
        return code
    if argv:
        parser.error(f"unknown arguments {' '.join(argv)}")
    if arguments.folder.exists() and not (arguments.folder / "model").is_dir():
        parser.error(f"--folder {arguments.folder} is there, without a model; name a new one")
    try:
        return rehearse(arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
