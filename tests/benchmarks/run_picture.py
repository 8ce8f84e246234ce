"""Draw the README's picture of a GRPO run: one X-ray with the answer, and Jaccard by step.

    python tests/benchmarks/run_picture.py runs/...-grpo --output .github/pictures/demo_run.png

Reads the run's last predictions and its metrics, so it needs a finished run of the demo and the
images in demo-data/. Needs the extra `plots`. The example shows the shortcut: a burned-in word, and
a sign that the model only claims.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from PIL import Image

COLOURS = {"site-a": "#0072b2", "site-a2": "#009e73", "site-b": "#d55e00"}
TITLES = {
    "site-a": "site A, trained on",
    "site-a2": "site A, marks without meaning",
    "site-b": "site B, marks reversed",
}


def jaccard_by_step(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Read each validation set's (step, Jaccard index) from metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "jaccard" in row:
            found.setdefault(row["dataset"], []).append((row["step"], row["jaccard"]))
    return found


def answer_of(run: Path, name: str, example: str) -> dict:
    """Find an example's row in the run's last predictions.

    Raises SystemExit where the data set has no such example.
    """
    for line in (run / f"predictions-{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["id"] == example:
            return row
    raise SystemExit(f"{run}/predictions-{name}.jsonl has no example {example}")


def shown_answer(completion: str, width: int) -> str:
    """Wrap a completion for the picture, each block on lines of its own."""
    blocks = re.sub(r"(</think>)\s*", r"\1\n", completion).splitlines()
    return "\n".join(textwrap.fill(block, width) for block in blocks)


def draw(image: Path, row: dict, curves: dict[str, list[tuple[int, float]]], output: Path) -> None:
    """Compose the X-ray, the answer and the curves, and write them as one PNG."""
    plt.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans"})
    figure = plt.figure(figsize=(10, 4.3), dpi=100)

    picture = figure.add_axes((0.01, 0.4, 0.27, 0.53))
    picture.imshow(Image.open(image), cmap="gray")
    picture.axis("off")
    figure.text(0.29, 0.9, "true labels", weight="bold", va="top")
    figure.text(0.29, 0.84, "\n".join(row["labels"]), va="top", linespacing=1.4)
    figure.text(0.29, 0.62, "the model says", weight="bold", va="top")
    figure.text(0.29, 0.56, "\n".join(row["predicted"]), va="top", linespacing=1.4)
    figure.text(
        0.015,
        0.34,
        shown_answer(row["completion"], 58),
        va="top",
        family="DejaVu Sans Mono",
        size=9.5,
        linespacing=1.35,
    )

    chart = figure.add_axes((0.57, 0.14, 0.415, 0.76))
    for name, points in curves.items():
        steps, scores = zip(*points, strict=True)
        chart.plot(steps, scores, "o-", color=COLOURS[name], linewidth=2, label=TITLES[name])
    chart.set_title("Jaccard index, greedy, 150 images each", size=11)
    chart.set_xlabel("optimizer step of GRPO (0: after SFT)")
    chart.set_xticks(sorted({step for points in curves.values() for step, _ in points}))
    chart.set_ylim(0, 1)
    chart.grid(alpha=0.3)
    chart.spines[["top", "right"]].set_visible(False)
    chart.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.46))

    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished GRPO run of the demo")
    parser.add_argument("--data_folder", type=Path, default=Path("demo-data"))
    parser.add_argument("--example", default="validation-a2-00001", help="id of a validation image")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    arguments = parser.parse_args()
    split = arguments.example.rpartition("-")[0]
    draw(
        arguments.data_folder / split / f"{arguments.example}.png",
        answer_of(arguments.run, split.replace("validation", "site"), arguments.example),
        jaccard_by_step(arguments.run),
        arguments.output,
    )
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
