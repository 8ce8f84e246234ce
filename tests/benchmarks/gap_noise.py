"""Count how often chance alone makes a condition on the gap true, at 100 images a validation set.

    python tests/benchmarks/gap_noise.py          # about two minutes
    python tests/benchmarks/gap_noise.py --images 500 --runs 200

Home expresses 14 labels, the other site the paper's nine. Each answer is right or wrong label by
label at rates that give the demo's macro-F1 after SFT. Each evaluation answers the images anew, but
for a share of answers that stay as at the start, so that the changes are as noisy as the demo's.
All evaluations are of one model: nothing is gained and nothing is lost anywhere, and every
condition that comes true is a false alarm. A run stops at its first, so the last column is what a
user of --stop_when sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import checkout  # noqa: F401  this checkout before an installed one
import numpy as np

from data.labels import LABELS, NIH_NINE
from eval.metrics import patient_totals, scores_of_totals
from eval.paired import shared_resamples
from eval.transfer import Moved, gap_on_all_labels, gap_on_shared_labels

# percent of images by label, in CheXpert's order: the demo's site A
PREVALENCE = np.array((31, 11, 18, 12, 12, 13, 12, 9, 12, 11, 17, 8, 9, 26)) / 100
HIT, FALSE_ALARM = 0.57, 0.05  # of what is true, of what is not
STAYS = 0.55  # share of the label decisions that are those of the start
EVALUATIONS = 5  # after the start, as in the demo's recipe and one more


def answers(true: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Answer every image [N, K] bool, right or wrong by chance alone."""
    return rng.random(true.shape) < np.where(true, HIT, FALSE_ALARM)


def run(
    images: int, resamples: int, rng: np.random.Generator
) -> tuple[list[dict[str, float]], float]:
    """Make the evaluations of one run -> (their gaps, macro-F1 of home at the start)."""
    sites = []
    for labels in (LABELS, NIH_NINE):
        prevalence = PREVALENCE[[LABELS.index(label) for label in labels]]
        true = rng.random((images, len(labels))) < prevalence
        sites.append((labels, true, answers(true, rng)))
    found = []
    macro_f1 = 0.0
    for _ in range(EVALUATIONS):
        moved = []
        for name, (labels, true, start) in zip(("home", "away"), sites, strict=True):
            now = np.where(rng.random(true.shape) < STAYS, start, answers(true, rng))
            patients = [str(n) for n in range(images)]
            totals = {
                stage: patient_totals(true, said, None, patients)
                for stage, said in (("start", start), ("now", now))
            }
            values = [
                scores_of_totals(rows.sum(axis=0)[None])["label_f1"][0] for rows in totals.values()
            ]
            drawn = shared_resamples(totals, seed=int(rng.integers(2**31)), resamples=resamples)
            moved.append(
                Moved(name, tuple(labels), *values, *(one["label_f1"] for one in drawn.values()))
            )
        macro_f1 = float(moved[0].before.mean())
        whole = gap_on_all_labels(moved[:1], moved[1:])
        shared = gap_on_shared_labels(moved[:1], moved[1:])
        found.append(
            {
                "gap": whole.value,
                "gap_se": whole.standard_error,
                "gap_shared": shared.value,
                "gap_shared_se": shared.standard_error,
            }
        )
    return found, macro_f1


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rates of false alarms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="of each validation set")
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--resamples", type=int, default=1000, help="of each evaluation")
    given = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    runs = [run(given.images, given.resamples, rng) for _ in range(given.runs)]
    gaps = [[one[name] for found, _ in runs for one in found] for name in ("gap", "gap_shared")]
    errors = [
        np.mean([one[name] for found, _ in runs for one in found])
        for name in ("gap_se", "gap_shared_se")
    ]
    print(
        f"{given.images} images a set, {given.runs} runs of {EVALUATIONS} evaluations; macro-F1 at"
        f" home {np.mean([macro for _, macro in runs]):.3f}; spread of gap {np.std(gaps[0]):.3f}"
        f" (gap_se {errors[0]:.3f}), of gap_shared {np.std(gaps[1]):.3f} (gap_shared_se"
        f" {errors[1]:.3f})"
    )
    print(f"{'condition':36}  one evaluation  any of {EVALUATIONS}")
    conditions = {
        "gap > 0.05": lambda one: one["gap"] > 0.05,
        "gap_shared > 0.05": lambda one: one["gap_shared"] > 0.05,
        "gap - 2*gap_se > 0": lambda one: one["gap"] - 2 * one["gap_se"] > 0,
        "gap_shared - 2*gap_shared_se > 0": lambda one: (
            one["gap_shared"] - 2 * one["gap_shared_se"] > 0
        ),
    }
    for text, holds in conditions.items():
        each = np.array([[holds(one) for one in found] for found, _ in runs])
        print(f"{text:36}  {each.mean():14.3f}  {each.any(axis=1).mean():8.3f}")


if __name__ == "__main__":
    main()
