"""Count how often chance alone makes a warning: silenced labels, and mode collapse in Eq. 4.

    python tests/benchmarks/false_alarms.py          # about two minutes
    python tests/benchmarks/false_alarms.py --runs 20

Silenced labels: a policy says each label as often as it is true, but without looking at the image,
so nothing is silenced. Counted are the runs in which the monitor warns at any rollout. Each of the
G completions is drawn by itself, or all are alike, which is the least that completions can tell.

Mode collapse: a policy that is always right, so all G completions are alike. Counted are the
windows in which a label of this prevalence is in more than 70 % of the predictions.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence

import checkout  # noqa: F401  this checkout before an installed one

from data.answers import Answer
from data.labels import LABELS, Target
from rl.monitors import LabelWindow
from rl.rewards import NuancedReward

G, PROMPTS = 4, 16  # completions of an image, images of a rollout
# Prevalence by label, in CheXpert's order: the demo's site A, positive mentions of MIMIC-CXR's
# training split (rounded), and an even spread of rare labels, which is harder than both.
PREVALENCES: Mapping[str, Sequence[float]] = {
    "demo": (31, 11, 18, 12, 12, 13, 12, 9, 12, 11, 17, 8, 9, 26),
    "mimic": (33, 3, 20, 22, 2.8, 12, 4.7, 7, 20, 4.5, 24, 0.9, 1.9, 29),
    "rare labels": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 20),
}


def run_warns(
    prevalence: Sequence[float], images: int, rng: random.Random, *, alike: bool = False
) -> bool:
    """Tell whether the monitor names a label in a run whose policy says all at their prevalence."""
    window = LabelWindow()
    chances = [(label, percent / 100) for label, percent in zip(LABELS, prevalence, strict=True)]

    def drawn() -> tuple[str, ...]:
        return tuple(label for label, chance in chances if rng.random() < chance)

    for _rollout in range(images // PROMPTS):
        for _ in range(PROMPTS):
            said = [drawn()] * G if alike else [drawn() for _ in range(G)]
            window.add(
                Target(frozenset(drawn())),
                [Answer(valid=True, parsed=True, labels=labels) for labels in said],
            )
        if window.silenced():
            return True
    return False


def windows_collapse(
    prevalence: float, windows: int, rng: random.Random, *, by_images: bool = True
) -> float:
    """Return the share of full windows in which a perfect policy is told of a mode collapse.

    by_images: the reward's own rule. Else 100 completions, which are those of 100 / G images.
    """
    told = 0
    for _ in range(windows):
        reward = NuancedReward({})
        images = reward.window if by_images else reward.window // G
        answers, groups = [], []
        for image in range(images):
            labels = ("Edema",) if rng.random() < prevalence else ("Fracture",)
            answers += [Answer(valid=True, parsed=True, labels=labels)] * G
            groups += [image] * G
        reward.observe(answers, groups if by_images else None)
        told += "Edema" in reward.dominant_labels()
    return told / windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="simulated runs of each kind")
    parser.add_argument("--windows", type=int, default=2000, help="windows of each prevalence")
    arguments = parser.parse_args()
    rng = random.Random(0)

    print("| silenced labels, runs that warn | images | drawn one by one | all alike |")
    print("|---|---|---|---|")
    for name, prevalence in PREVALENCES.items():
        for images in (1000, 3200):
            shares = [
                sum(run_warns(prevalence, images, rng, alike=alike) for _ in range(arguments.runs))
                / arguments.runs
                for alike in (False, True)
            ]
            print(f"| {name} | {images} | {shares[0]:.1%} | {shares[1]:.1%} |", flush=True)

    print("\n| mode collapse, windows | 100 completions of 25 images | 100 images |")
    print("|---|---|---|")
    for share in (0.5, 0.55, 0.6, 0.65):
        told = [
            windows_collapse(share, arguments.windows, rng, by_images=by_images)
            for by_images in (False, True)
        ]
        print(f"| a label of {share:.0%} | {told[0]:.1%} | {told[1]:.1%} |", flush=True)


if __name__ == "__main__":
    main()
