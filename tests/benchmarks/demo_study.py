"""Measure what GRPO adds on the embedded demo, with several seeds and both rewards.

A control spends the same images on more SFT.

    python tests/benchmarks/demo_study.py FOLDER [--seeds 1 2 3] [--jobs 2] [--recipe demo]

For each seed there are SFT, GRPO from it once trained on each reward, and the control, which goes
on with SFT on the images that GRPO drew, with the teacher's traces for them, for as many passes as
GRPO made. Each of them and the base answer the splits study-a and study-b, on which nothing was
ever chosen: greedily, and at the temperature of the rollouts with several sampling seeds. What is
finished in FOLDER is not done again, so a study that was stopped goes on. Its tables are in
FOLDER/study.md.

Differences are paired: an image's mean reward over the sampling seeds, minus the same of the SFT
adapter that the arm started from. Their standard error is over images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
import numpy as np

from data.demo.radiographs import draw
from data.demo.splits import seeds, write_split
from data.demo.teacher import reasoning_trace
from data.examples import read_jsonl
from data.files import write_jsonl
from data.predictions import read_predictions
from engine.resume import saved_settings
from rl.rewards import RewardFunction
from rl.settings import GRPOConfig, build_rewards

ROOT = Path(__file__).resolve().parents[2]
SITES = {"a": "study-a", "b": "study-b"}
REWARDS = ("hard", "nuanced")
MODES = ("greedy", "1", "2")  # greedy decoding, and sampling with these seeds
ARMS = {
    "sft": "SFT",
    "grpo-hard": "SFT + GRPO, hard",
    "grpo-nuanced": "SFT + GRPO, nuanced",
    "more-sft": "SFT + more SFT",
}
# The SFT adapter sampled otherwise, which costs no training: title, temperature (None: as rollouts
# do), further flags of eval.evaluate
SAMPLED = {
    "sft-vote": ("SFT, vote of 4", None, ("--num_generations", "4")),
    "sft-cool": ("SFT, T 0.4", 0.4, ()),
}


# ---- runs ----------------------------------------------------------------------------------------
def run(folder: Path, name: str, module: str, *arguments: str) -> None:
    """Run `python -m module ... --output_dir name` in the study's folder, logged to <name>.log."""
    print(f"{name} ...", flush=True)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *arguments, "--output_dir", name]
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        finished = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if finished.returncode:
        raise SystemExit(
            f"{name} ended with {finished.returncode}: see {folder / name}.log, remove that folder"
            " and start again"
        )


def train(folder: Path, name: str, module: str, *arguments: str) -> None:
    if not (folder / name / "adapter_model.safetensors").is_file():  # a run writes it last
        run(folder, name, module, *arguments)


def answer(
    folder: Path, name: str, *model: str, temperature: float, modes: Sequence[str] = MODES
) -> None:
    """Let one model answer both sites in these modes, in answers/<name>-<mode>/."""
    for mode in modes:
        target = f"answers/{name}-{mode}"
        if (folder / target / "scores-b.json").is_file():  # written last
            continue
        sampling = (
            ["--temperature", "0"]
            if mode == "greedy"
            else ["--temperature", str(temperature), "--seed", mode]
        )
        run(
            folder,
            target,
            "eval.evaluate",
            *model,
            *sampling,
            "--train_file",
            "demo:sft-train",
            "--per_device_eval_batch_size",
            "100",
            "--data_file",
            *(f"{site}=demo:{split}" for site, split in SITES.items()),
        )


def more_sft_data(folder: Path, seed: int) -> tuple[Path, float]:
    """Write the images of GRPO's rollouts with the teacher's traces -> (the file, passes over it).

    The passes are how often GRPO drew an image on average.
    """
    with open(folder / f"grpo-hard-{seed}/completions.jsonl", encoding="utf-8") as lines:
        drawn = [json.loads(line)["id"] for line in lines]  # once for each completion
    examples = read_jsonl(folder / "demo-data/rl-train.jsonl")
    rows = [
        {
            "id": example.id,
            "patient_id": example.patient_id,
            "image": example.image,
            "labels": list(example.labels),
            "dataset": example.dataset,
            "answer": reasoning_trace(draw(image_seed, "a"), image_seed),
        }
        for example, image_seed in zip(examples, seeds("rl-train"), strict=True)
        if example.id in set(drawn)
    ]
    passes = len(drawn) / grpo_settings(folder / f"grpo-hard-{seed}").num_generations / len(rows)
    return write_jsonl(folder / f"demo-data/more-sft-{seed}.jsonl", rows), passes


def grpo_settings(run_dir: Path) -> GRPOConfig:
    saved = saved_settings(run_dir)
    known = {field.name for field in fields(GRPOConfig)}
    return GRPOConfig(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in saved.items()
            if name in known
        }
    )


def study_seed(folder: Path, seed: int, recipe: str) -> None:
    """Make all runs and answers of one seed."""
    common, sft = ["--recipe", recipe, "--seed", str(seed)], f"sft-{seed}"
    train(folder, sft, "run_sft", *common)
    for reward in REWARDS:
        train(
            folder,
            f"grpo-{reward}-{seed}",
            "run_grpo",
            *common,
            "--adapter_name_or_path",
            sft,
            "--reward",
            reward,
        )
    data, passes = more_sft_data(folder, seed)
    train(
        folder,
        f"more-sft-{seed}",
        "run_sft",
        *common,
        "--adapter_name_or_path",
        sft,
        "--train_file",
        str(data),
        "--num_train_epochs",
        f"{passes:.2f}",
    )
    temperature = grpo_settings(folder / f"grpo-hard-{seed}").temperature
    for arm in ARMS:
        answer(
            folder,
            f"{arm}-{seed}",
            "--adapter_name_or_path",
            f"{arm}-{seed}",
            temperature=temperature,
        )
    for arm, (_, own, flags) in SAMPLED.items():
        answer(
            folder,
            f"{arm}-{seed}",
            "--adapter_name_or_path",
            sft,
            *flags,
            temperature=own or temperature,
            modes=MODES[1:],
        )


# ---- figures -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answers:
    """Say what one model's answers to one site are worth in some modes.

    rewards {name: [images]}: scaled as they are trained on, and averaged over the modes
    scores: means over the modes
    """

    rewards: dict[str, np.ndarray]
    scores: dict[str, float]


def read_answers(
    folder: Path, name: str, modes: Sequence[str], site: str, functions: dict[str, RewardFunction]
) -> Answers:
    rewards, scores = {reward: [] for reward in functions}, []
    for mode in modes:
        run_dir = folder / f"answers/{name}-{mode}"
        predictions = read_predictions(run_dir / f"predictions-{site}.jsonl")
        for reward, function in functions.items():
            rewards[reward].append(
                [
                    # the length matters to neither: the demo's min_length is 0
                    function.scaled(function(one.answer, one.target, one.completion_length or 0))
                    for one in predictions
                ]
            )
        record = json.loads((run_dir / f"scores-{site}.json").read_text(encoding="utf-8"))
        scores.append(
            [
                record["micro"]["f1"],
                record["macro"]["f1"],
                record["fail_rate"],
                record["invalid_rate"],
            ]
        )
    means = dict(zip(("micro", "macro", "fail", "invalid"), np.mean(scores, axis=0), strict=True))
    return Answers({reward: np.mean(values, axis=0) for reward, values in rewards.items()}, means)


def gain(arm: np.ndarray, start: np.ndarray) -> str:
    """Return the mean paired difference over images with its standard error."""
    difference = arm - start
    return f"{difference.mean():+.3f} ({difference.std(ddof=1) / np.sqrt(len(difference)):.3f})"


COLUMNS = (
    "hard, T",
    "gain",
    "nuanced, T",
    "gain",
    "hard, greedy",
    "gain",
    "micro-F1, T",
    "macro-F1, T",
    "micro-F1, greedy",
    "macro-F1, greedy",
    "fail, T",
    "invalid, T",
)


class Tables:
    """Make the tables of one site in Markdown, from the answers in the study's folder.

    T: at the rollouts' temperature.
    """

    def __init__(self, folder: Path, study_seeds: Sequence[int], site: str):
        self.folder, self.seeds, self.site = folder, study_seeds, site
        self.functions = build_rewards(
            grpo_settings(folder / f"grpo-hard-{study_seeds[0]}"),
            read_jsonl(folder / "demo-data/rl-train.jsonl"),
        )
        self.read: dict[str, tuple[Answers, Answers]] = {}

    def answers(self, name: str) -> tuple[Answers, Answers]:
        """Return the sampled and the greedy answers."""
        if name not in self.read:
            self.read[name] = tuple(
                read_answers(self.folder, name, modes, self.site, self.functions)
                for modes in (MODES[1:], MODES[:1])
            )
        return self.read[name]

    def figures(self, name: str) -> list[float]:
        """Return the columns that are no gain."""
        sampled, greedy = self.answers(name)
        return [
            sampled.rewards["hard"].mean(),
            sampled.rewards["nuanced"].mean(),
            greedy.rewards["hard"].mean(),
            sampled.scores["micro"],
            sampled.scores["macro"],
            greedy.scores["micro"],
            greedy.scores["macro"],
            sampled.scores["fail"],
            sampled.scores["invalid"],
        ]

    def sampled_row(self, *titles: str, arm: str, seeds: Sequence[int]) -> list[str]:
        """Make a row of an arm of SAMPLED, which has no greedy answers."""
        figures, gains = [], []
        for seed in seeds:
            own, start = (
                read_answers(self.folder, f"{name}-{seed}", MODES[1:], self.site, self.functions)
                for name in (arm, "sft")
            )
            rewards = [own.rewards[name] for name in REWARDS]
            figures.append([*(reward.mean() for reward in rewards), *own.scores.values()])
            gains.append([gain(own.rewards[name], start.rewards[name]) for name in REWARDS])
        hard, nuanced, micro, macro, fail, invalid = (
            f"{value:.3f}" for value in np.mean(figures, axis=0)
        )
        hard_gain, nuanced_gain = (", ".join(column) for column in zip(*gains, strict=True))
        cells = [hard, hard_gain, nuanced, nuanced_gain]
        return [*titles, *cells, "", "", micro, macro, "", "", fail, invalid]

    def gains(self, name: str, start: str) -> list[str]:
        """Return the three columns of gains over the SFT adapter `start`."""
        (sampled, greedy), (sampled_start, greedy_start) = self.answers(name), self.answers(start)
        return [
            gain(sampled.rewards["hard"], sampled_start.rewards["hard"]),
            gain(sampled.rewards["nuanced"], sampled_start.rewards["nuanced"]),
            gain(greedy.rewards["hard"], greedy_start.rewards["hard"]),
        ]

    def row(
        self, *titles: str, names: Sequence[str], gains: Sequence[str] = ("", "", "")
    ) -> list[str]:
        """Make a row whose numbers are means over `names`."""
        figures = [
            f"{value:.3f}" for value in np.mean([self.figures(name) for name in names], axis=0)
        ]
        return [
            *titles,
            *(cell for pair in zip(figures[:3], gains, strict=True) for cell in pair),
            *figures[3:],
        ]

    def baselines(self, *titles: str) -> list[list[str]]:
        scores = json.loads(
            (self.folder / f"answers/base-greedy/scores-{self.site}.json").read_text(
                encoding="utf-8"
            )
        )
        rows = []
        for name, figures in scores["baselines"].items():
            jaccard, micro, macro = (
                f"{figures[key]:.3f}" for key in ("jaccard", "micro_f1", "macro_f1")
            )
            rows.append(
                [
                    *titles,
                    name.replace("_", " "),
                    jaccard,
                    "",
                    "",
                    "",
                    jaccard,
                    "",
                    micro,
                    macro,
                    micro,
                    macro,
                    "",
                    "",
                ]
            )
        return rows

    def by_seed(self) -> list[str]:
        """Make a row for each seed and arm, with gains over the same seed's SFT adapter."""
        rows = [self.row("", "base", names=["base"])]
        for seed in self.seeds:
            for arm, title in ARMS.items():
                gains = ("", "", "") if arm == "sft" else self.gains(f"{arm}-{seed}", f"sft-{seed}")
                rows.append(self.row(str(seed), title, names=[f"{arm}-{seed}"], gains=gains))
            rows += [
                self.sampled_row(str(seed), title, arm=arm, seeds=[seed])
                for arm, (title, *_) in SAMPLED.items()
            ]
        return markdown(("seed", "", *COLUMNS), rows + self.baselines(""))

    def summary(self) -> list[str]:
        """Make a row for each arm: means over the seeds, and one gain for each seed."""
        rows = [self.row("base", names=["base"])]
        for arm, title in ARMS.items():
            gains = (
                [self.gains(f"{arm}-{seed}", f"sft-{seed}") for seed in self.seeds]
                if arm != "sft"
                else []
            )
            rows.append(
                self.row(
                    title,
                    names=[f"{arm}-{seed}" for seed in self.seeds],
                    gains=[", ".join(column) for column in zip(*gains, strict=True)]
                    or ("", "", ""),
                )
            )
        rows += [
            self.sampled_row(title, arm=arm, seeds=self.seeds)
            for arm, (title, *_) in SAMPLED.items()
        ]
        return markdown(("", *COLUMNS), rows + self.baselines())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where runs, answers and the table go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="seeds that are worked on at once, each in processes of one thread",
    )
    parser.add_argument("--recipe", default="demo", help="the recipe that is studied")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    for split in ("sft-train", "rl-train", "validation-a", "validation-b", *SITES.values()):
        # before the processes, which would draw them at the same time
        write_split(split, None, folder / "demo-data")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda seed: study_seed(folder, seed, arguments.recipe), arguments.seeds))
    answer(folder, "base", "--recipe", arguments.recipe, temperature=GRPOConfig().temperature)
    lines = []
    for site, split in SITES.items():
        tables = Tables(folder, arguments.seeds, site)
        lines += [
            f"Site {site}, {split}: means over seeds",
            "",
            *tables.summary(),
            "",
            f"Site {site}, {split}: each seed",
            "",
            *tables.by_seed(),
            "",
        ]
    (folder / "study.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
