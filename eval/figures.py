"""Draw the logs of training runs: what was learned, what transferred, and the paper's figures.

    # needs the extra: pip install -e '.[plots]'
    python -m eval.figures runs/sft-* runs/20260101-120000-grpo --output_dir figures

They are written as PNG and SVG, from each run's metrics.jsonl:

    macro-f1            macro-F1 of every evaluated set by step, and the gap between the sets
    figure-1            SFT: token accuracy, training and validation loss
    figure-2, figure-3  GRPO on the nuanced and on the hard reward, as in the paper
    training-<reward>   the same for any other reward, a mixture, or one of your own
    reward-by-hospital  the sampled reward of each hospital of a run on several
    reward-parts-...    the parts of the reward that was trained on
    policy              KL, entropy, valid and truncated answers of GRPO
    reward-hacking      what the reward has gained beside what the labels have
    reliability-<set>   of folders with votes: how often a label is true where so many say it

Faint lines are the logged values, bold lines their exponential moving average (`curves.ema`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import UsageError, parse_config, setting
from engine.reward_name import reward_name
from engine.runtime import check_writable, main_guard
from eval.curves import (
    BY_HOSPITAL,
    FIGURE_1,
    HACKING,
    POLICY,
    Log,
    TrainingRun,
    evaluated_sets,
    has_numbers,
    hospital_names,
    panels_to_draw,
    part_names,
    reward_names,
    reward_panels,
    smoothing_note,
    training_runs,
)
from eval.folders import Entry, flag_first, load_entries, part_of
from eval.page import Picture, picture_file
from eval.plots import draw_by_run, draw_macro_f1, draw_reliability, draw_training

_MOST_CHARTS = 4  # in one picture
_FIGURES = {"nuanced": "figure-2", "hard": "figure-3"}  # the paper's, by the reward trained on


# ---- which pictures ------------------------------------------------------------------------------
def training_pictures(entries: Sequence[Entry], form: str = "svg") -> list[Picture]:
    """Draw all that the logs of the entries' training runs have, as the head of this file lists it.

    Runs without a log are left out: `curves.training_runs` says which and why.
    """
    runs, _ = training_runs(entries)
    return [
        *_macro_f1_pictures(runs, form),
        *_stage_pictures(runs, form),
        *_hospital_pictures(runs, form),
        *_part_pictures(runs, form),
        *_policy_pictures(runs, form),
        *_hacking_pictures(runs, form),
    ]


def _chunks(
    name: str, runs: Sequence[TrainingRun], most: int = _MOST_CHARTS
) -> Iterator[tuple[str, dict[str, Log]]]:
    """Share runs out among pictures: (name of the picture, {run: its log})."""
    for first in range(0, len(runs), most):
        number = f"-{first // most + 1}" if len(runs) > most else ""
        yield f"{name}{number}", {run.name: run.log for run in runs[first : first + most]}


def _macro_f1_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    evaluated = [run for run in runs if evaluated_sets(run.log)]
    return [draw_macro_f1(name, part, form) for name, part in _chunks("macro-f1", evaluated)]


def _rewards(runs: Sequence[TrainingRun]) -> list[str]:
    """List the rewards that runs were trained on, the paper's first."""
    found = dict.fromkeys(run.reward for run in runs if run.stage == "grpo")
    return [
        *(name for name in _FIGURES if name in found),
        *(name for name in found if name not in _FIGURES),
    ]


def _stage_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    pictures = []
    sft = {run.name: run.log for run in runs if run.stage == "sft"}
    if panels_to_draw(FIGURE_1, sft)[0]:
        caption = (
            "SFT, as in figure 1 of the paper: token accuracy and loss, with the loss on the"
            f" validation set at each epoch as it is. {smoothing_note()}"
        )
        pictures.append(draw_training("figure-1", caption, sft, FIGURE_1, form, title="SFT"))
    for reward in _rewards(runs):
        logs = {run.name: run.log for run in runs if (run.stage, run.reward) == ("grpo", reward)}
        panels = reward_panels(reward)
        if panels_to_draw(panels, logs)[0]:
            figure = _FIGURES.get(reward)
            paper = f", as in figure {figure[-1]} of the paper" if figure else ""
            caption = f"GRPO on the {reward or 'unnamed'} reward{paper}. {smoothing_note()}"
            name = figure or (f"training-{reward}" if reward else "training")
            title = f"GRPO on the {reward or 'unnamed'} reward"
            pictures.append(draw_training(name, caption, logs, panels, form, title=title))
    return pictures


def _hospital_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    """Draw the sampled reward of each hospital, of the runs that were trained on several."""
    several = [run for run in runs if len(hospital_names(run.log)) > 1]
    title = "Sampled reward, as trained on, by hospital"
    caption = f"{title}. {smoothing_note()}"

    def rewards(log: Log) -> dict[str, str]:
        return {f"{BY_HOSPITAL}{hospital}": hospital for hospital in hospital_names(log)}

    return [
        draw_by_run(name, caption, part, rewards, "reward", form, title=title)
        for name, part in _chunks("reward-by-hospital", several)
    ]


def _part_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    """Draw the parts of each reward that was trained on, where it has more than one."""
    pictures = []
    for reward in _rewards(runs):
        logged = reward_name(reward)
        parted = [
            run
            for run in runs
            if (run.stage, run.reward) == ("grpo", reward) and len(part_names(run.log, logged)) > 1
        ]
        title = f"The parts of the {reward} reward, which add up to it"
        caption = f"{title}. {smoothing_note()}"

        def parts(log: Log, logged: str = logged) -> dict[str, str]:
            return {f"rewards/{logged}/{part}": part for part in part_names(log, logged)}

        pictures += [
            draw_by_run(name, caption, part, parts, "its own units", form, title=title)
            for name, part in _chunks(f"reward-parts-{reward}", parted)
        ]
    return pictures


def _policy_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    grpo = {run.name: run.log for run in runs if run.stage == "grpo"}
    if not panels_to_draw(POLICY, grpo)[0]:
        return []
    caption = (
        "The policy in GRPO: how far it has moved from its reference, how varied it still is, and"
        f" how many sampled answers have the right form or were cut off. {smoothing_note()}"
    )
    return [draw_training("policy", caption, grpo, POLICY, form, title="The policy in GRPO")]


def _hacking_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    watched = [run for run in runs if any(has_numbers(run.log, metric) for metric in HACKING)]
    caption = (
        "Reward hacking: the reward trained on, the other rewards and F1 of the sampled labels,"
        " over the last 200 completions, as changes since the run's start in standard deviations. A"
        f" reward that rises while F1 does not is being gamed. {smoothing_note()}"
    )
    title = "Reward against labels: changes since the start"
    return [
        draw_by_run(name, caption, part, _hacking, "change in its SD", form, title=title)
        for name, part in _chunks("reward-hacking", watched)
    ]


def _hacking(log: Log) -> dict[str, str]:
    """Choose the curves of reward hacking. Other rewards are drawn where there are any."""
    others = len(reward_names(log)) != 1
    return {
        metric: label
        for metric, label in HACKING.items()
        if has_numbers(log, metric) and (others or metric != "monitors/other_gain")
    }


def reliability_pictures(entries: Sequence[Entry], form: str = "svg") -> list[Picture]:
    """Draw the reliability of the entries that voted, one picture a data set."""
    voted: dict[str, dict[str, Any]] = {}
    for entry in entries:
        for data_set, record in entry.records.items():
            if part_of(record, "probabilities").get("reliability"):
                voted.setdefault(data_set, {})[entry.name] = record["probabilities"]
    return [draw_reliability(data_set, models, form) for data_set, models in voted.items()]


# ---- command -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FiguresConfig:
    """Hold the flags of `python -m eval.figures`."""

    run: tuple[str, ...] = setting(
        (), "runs to draw, each FOLDER or NAME=FOLDER; may stand first without the flag"
    )
    output_dir: str | None = setting(
        None, "folder for the PNG and SVG files", unset="it must be given"
    )


def config_problems(config: FiguresConfig) -> list[str]:
    """Check what is missing on the command line -> problems, one line each."""
    needed = {
        "run": "one or more FOLDER or NAME=FOLDER of training runs",
        "output_dir": "a folder for the pictures",
    }
    return [
        f"--{name} is missing: give {what}"
        for name, what in needed.items()
        if not getattr(config, name)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 usage."""
    return main_guard(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    resolved = parse_config(
        [FiguresConfig],
        flag_first(argv, "run"),
        script="eval",
        prog="python -m eval.figures",
        validate=config_problems,
        description="Draw what runs have learned and what transferred, from their logs.",
    )
    config: FiguresConfig = resolved.configs[0]
    check_writable(str(config.output_dir))
    entries = load_entries(config.run, "run")
    _, problems = training_runs(entries)
    pictures = [
        picture
        for form in ("svg", "png")
        for picture in training_pictures(entries, form) + reliability_pictures(entries, form)
    ]
    if not pictures:
        raise UsageError([f"nothing to draw: {problem}" for problem in problems])
    for problem in problems:
        print(f"warning: not drawn: {problem}", file=sys.stderr)
    folder = Path(str(config.output_dir))
    existing = [
        folder / picture_file(picture)
        for picture in pictures
        if (folder / picture_file(picture)).exists()
    ]
    if existing:
        raise UsageError(
            [
                f"{file} exists and nothing is overwritten; give another --output_dir"
                for file in existing
            ]
        )
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / picture_file(picture)).write_bytes(picture.data)
        print(folder / picture_file(picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
