"""Measure seconds and peak memory of scoring and reporting a test set of NIH's size.

    python tests/benchmarks/report_speed.py [--images 25596] [--patients 2797] [--models 3]

Writes synthetic predictions of several models (nine labels at NIH's prevalence, answers of 150
words) to a temporary folder, then scores one file with eval.evaluate and reports all of them with
eval.report, each in a process of its own. Its peak is the kernel's figure for that process, imports
included (the first line).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
import numpy as np

from data.files import write_jsonl
from data.labels import LABELS, NIH_NINE

ROOT = Path(__file__).resolve().parents[2]
# of the official test images
PREVALENCE = dict(
    zip(NIH_NINE, (0.385, 0.042, 0.119, 0.036, 0.071, 0.022, 0.128, 0.104, 0.045), strict=True)
)
NIH_NAMES = {"Lung Lesion": "Mass", "Pleural Other": "Pleural_Thickening"}


def rows(images: int, patients: int, seed: int):
    """Make predictions that are right for nine of ten labels, with one truth for all seeds."""
    truth, said = np.random.default_rng(0), np.random.default_rng(seed)
    share = np.array([PREVALENCE[label] for label in NIH_NINE])
    words = np.array(
        [
            "the",
            "heart",
            "lungs",
            "mediastinum",
            "pleura",
            "bones",
            "are",
            "is",
            "of",
            "normal",
            "size",
            "enlarged",
            "clear",
            "opacity",
            "left",
            "right",
            "lower",
            "upper",
            "zone",
        ]
    )
    for n in range(images):
        true = truth.random(9) < share
        predicted = np.where(said.random(9) < 0.9, true, said.random(9) < share)
        labels = [label for label, here in zip(NIH_NINE, true, strict=True) if here]
        answer = (
            ", ".join(label for label, here in zip(NIH_NINE, predicted, strict=True) if here)
            or "Support Devices"
        )
        think = " ".join(words[said.integers(len(words), size=150)])
        yield {
            "id": f"{n:08d}_000.png",
            "patient_id": f"{n * patients // images:05d}",
            "dataset": "nih",
            "labels": [label for label in LABELS if label in labels],
            "evaluated_labels": list(NIH_NINE),
            "source_labels": [NIH_NAMES.get(label, label) for label in labels] or ["Hernia"],
            "prompt": "demo",
            "completion": (
                f"<think>{think}</think><solution>{answer}</solution>"
                if said.random() < 0.98
                else think
            ),
            "completion_length": 180,
        }


def measured(name: str, *arguments: str) -> None:
    """Run python with the arguments, and print its wall time, CPU time and peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")
    print(
        f"{name:<44} {time.perf_counter() - started:6.1f} s  CPU"
        f" {usage.ru_utime + usage.ru_stime:6.1f} s  peak {usage.ru_maxrss / 1024:6.0f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=25_596)
    parser.add_argument("--patients", type=int, default=2_797)
    parser.add_argument("--models", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = [
            ("base", "sft", "grpo")[n] if n < 3 else f"model-{n}" for n in range(options.models)
        ]
        for seed, name in enumerate(names, start=1):
            write_jsonl(
                Path(folder) / name / "predictions-nih.jsonl",
                rows(options.images, options.patients, seed),
            )
        file = Path(folder) / names[0] / "predictions-nih.jsonl"
        print(
            f"{options.images:,} predictions of {options.patients:,} patients a model,"
            f" {file.stat().st_size / 2**20:.0f} MB each",
            flush=True,
        )
        measured("imports alone", "-c", "import eval.report")
        measured(
            "eval.evaluate --predictions, one model",
            "-m",
            "eval.evaluate",
            "--predictions",
            f"nih={file}",
            "--output_dir",
            f"{folder}/scores",
        )
        measured(
            f"eval.report, {options.models} models, 10,000 resamples",
            "-m",
            "eval.report",
            *(f"{folder}/{name}" for name in names),
            "--output_dir",
            f"{folder}/report",
            "--cases",
            "24",
        )


if __name__ == "__main__":
    main()
