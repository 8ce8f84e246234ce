"""Kill runs at random, give the same command again until it ends, and compare to the last bit.

    python tests/benchmarks/fault_campaign.py                          # 200 kills, two processes
    python tests/benchmarks/fault_campaign.py --kills 20 --seed 5 --families gemma3 --scripts grpo
    python tests/benchmarks/fault_campaign.py --only qwen2_5_vl-sft-3 --keep /tmp/case  # one again

SFT and GRPO of each family run once undisturbed, in each of several settings (`VARIANTS`). Then a
case is: the command is given, the process is ended by SIGKILL at a random file operation in the
run's folder (before it, after it, or with half of a write done) or after a random time, and the
command is given again. There are one to three kills a case, so resumes are killed too. At the end
every file, every link and what TensorBoard shows must be as the undisturbed run left them.
tests/faults/compare.py says what is left out. A run that does not reach its end by its command
alone is stuck. The end is exit code 0, or the refusal of a finished run, where the kill fell after
the last thing that it writes.

A table by the place of the kills is printed, and for each failure what differs and the command that
repeats the case. Kills at file operations of the main thread repeat exactly, those at times nearly.
With --out FILE the results are kept, and the same command goes on after them. The exit code is 1
where a case failed. 200 kills take some ten minutes of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  this checkout before an installed one
import pytest

import run_grpo
import run_sft
from tests.faults.acts import Act, Point, half_then_kill, kill, then_kill
from tests.faults.children import Ended, forked
from tests.faults.compare import KINDS, differences
from tests.faults.inject import at_files
from tests.helpers.runs import GRPO, SFT, lines, overriding, speak, write_data, write_rows
from tests.helpers.tiny import SAVE

FAMILIES, SCRIPTS = ("qwen2_5_vl", "gemma3", "qwen3_vl"), ("sft", "grpo")
MAINS = {"sft": run_sft.main, "grpo": run_grpo.main}
# Settings of the runs, by script. A case takes one of them.
VARIANTS: dict[str, list[list[str]]] = {
    "sft": [
        ["--save_steps", "1"],
        ["--save_total_limit", "2", "--logging_steps", "2", "--lora_dropout", "0.3"],
        ["--save_minutes", "0.0001"],  # so that every step is due
    ],
    "grpo": [
        ["--save_steps", "1"],
        ["--save_total_limit", "2", "--load_best_model_at_end", "--logging_steps", "2"],
        ["--save_steps", "1", "--save_total_limit", "2", "--reward", "nuanced"]
        + ["--num_iterations", "2"],
        ["--save_minutes", "0.0001", "--beta", "0.0"],
    ],
}
ACTS: dict[str, Act] = {"before": kill, "after": then_kill, "half": half_then_kill}
# How a run is given again: by the same command, by one that has "auto" from the beginning, or by
# naming the folder as soon as it holds a run.
WAYS = ("same", "auto", "folder")
# Where a kill fell: the first of these names that the stack holds, innermost first.
PLACES = {
    "point_link": "links", "keep_links": "links", "rotate_checkpoints": "rotation",
    "save_final_adapter": "final", "load_best_adapter": "final", "write_run_card": "final",
    "end_of_run": "final", "log_scores": "final", "validation_metrics": "evaluation",
    "evaluate_policy": "evaluation", "note_evaluation": "evaluation", "evaluate": "evaluation",
    "validate": "evaluation", "record_evaluation": "evaluation",
    "save_training_checkpoint": "save", "save_checkpoint": "save", "finish": "final",
    "sample": "rollout", "reward": "rollout", "score": "rollout", "take": "rollout",
    "log_rollout": "rollout", "train": "update", "opened_run": "start-up",
    "run_command": "start-up", "main": "start-up",
}  # fmt: skip
MOST_REPEATS, MOST_KILLS = 8, 3


@dataclass(frozen=True)
class Straight:
    """Hold an undisturbed run: its folder, its command, and how long it is."""

    folder: str
    script: str
    argv: list[str]  # without --output_dir
    operations: int
    seconds: float


@dataclass
class Result:
    """Hold how a case ended. kills: their places. problems: lines by kind, or under "stuck"."""

    name: str
    kills: list[str] = field(default_factory=list)
    how: list[str] = field(default_factory=list)
    commands: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)


# ---- the undisturbed runs ------------------------------------------------------------------------
def straight_runs(root: Path, family: str, settings: argparse.Namespace) -> Iterator[Straight]:
    """Make the undisturbed runs of a family, one for each script and variant."""
    model = SAVE[family](root / family)
    data = write_data(root / "data", 8)
    rows = lines(data)
    sites = [
        f"{name}={write_rows(data.with_name(f'{name}.jsonl'), some)}"
        for name, some in (("a", rows[:2]), ("b", rows[2:4]))
    ]
    short = ["--max_completion_length", "3", "--learning_rate", "2e-3"]
    train = ["--train_file", str(data), "--validation_file"]
    sft = ["--model_name_or_path", str(model), *train, sites[0], *SFT, *short]
    sft += ["--num_train_epochs", "2", "--per_device_train_batch_size", "2"]
    sft += ["--gradient_accumulation_steps", "2"]
    grpo = ["--adapter_name_or_path", str(root / f"{family}-sft-0"), *train, *sites, *GRPO]
    grpo += [*short, "--min_length", "1", "--max_steps", "4", "--eval_steps", "2"]
    grpo += ["--no_vote_baseline"]
    for script, argv in (("sft", sft), ("grpo", grpo)):
        for number, more in enumerate(VARIANTS[script]):
            wanted = script in settings.scripts and number in settings.variants
            if wanted or (script, number) == ("sft", 0):  # GRPO begins with the first
                yield _straight(root / f"{family}-{script}-{number}", script, argv + more)


def _straight(folder: Path, script: str, argv: list[str]) -> Straight:
    argv, report = overriding(argv), folder.with_name(f"{folder.name}.operations")

    def counted(argv: list[str]) -> int | None:
        with at_files(folder, main_thread=True) as seen:
            code = MAINS[script](argv)
        report.write_text(str(len(seen)))
        return code

    end = forked(counted, [*argv, "--output_dir", str(folder)], limit=600)
    if end.code != 0:
        raise RuntimeError(f"the undisturbed run {folder.name} failed: {end.err}")
    return Straight(str(folder), script, argv, int(report.read_text()), end.seconds)


# ---- a case --------------------------------------------------------------------------------------
def run_case(name: str, straight: Straight, folder: Path, settings: argparse.Namespace) -> Result:
    """Run one case: kills, then the command until it ends, then the comparison."""
    rng = random.Random(f"{settings.seed} {name}")
    result = Result(name)
    wanted = rng.choices((1, 2, MOST_KILLS), (6, 3, 1))[0]
    way = rng.choice(settings.ways)
    result.how.append(f"{Path(straight.folder).name} {way}")
    ended: list[Ended] = []
    while len(result.kills) < wanted and not (ended and ended[-1].code == 0):
        killed, how = _killed(rng, straight, _command(straight, folder, way), folder, settings.mode)
        ended.append(killed)
        result.how.append(how)
        if killed.signal == signal.SIGKILL:
            result.kills.append(_place(killed.where))
        elif killed.code != 0:
            break
    while len(ended) < MOST_REPEATS and ended[-1].code != 0:
        command = _command(straight, folder, way)
        ended.append(forked(MAINS[straight.script], command, limit=300))
        if ended[-1].code is not None and ended[-1].code == (ended[-2].code or -1):
            break  # twice the same refusal
    result.commands = len(ended)
    if ended[-1].code != 0 and not _finished(folder):
        said = (ended[-1].err.strip().splitlines() or ["no word"])[-1]
        result.problems["stuck"] = [f"exit code {ended[-1].code}: {said}"]
    else:
        result.problems |= differences(Path(straight.folder), folder)
    return result


def _finished(folder: Path) -> bool:
    """Tell whether a run has noted its end, after which its command is refused, and rightly so."""
    config = folder / "config.json"
    return config.exists() and "finished" in json.loads(config.read_bytes())


def _command(straight: Straight, folder: Path, way: str) -> list[str]:
    """Make the command that is given, for the first time or again."""
    command = [*straight.argv, "--output_dir", str(folder)]
    if way == "auto":
        command += ["--resume_from_checkpoint", "auto"]
    elif way == "folder" and (folder / "config.json").exists():
        command += ["--resume_from_checkpoint", str(folder)]
    return command


def _killed(
    rng: random.Random, straight: Straight, command: list[str], folder: Path, mode: str
) -> tuple[Ended, str]:
    """Give the command and kill it at a random place -> (how it ended, what was done)."""
    main = MAINS[straight.script]
    mode = rng.choice(("files", "times")) if mode == "both" else mode
    if mode == "times":  # the first third is imports and the model's loading
        seconds = straight.seconds * (0.2 + 0.8 * rng.random())
        return forked(main, command, after=[(seconds, signal.SIGKILL)]), f"{seconds:.2f} s"
    share = rng.random() ** 1.5  # more often early: a resumed run is shorter than the straight one
    number, act = 1 + int(share * straight.operations), rng.choice(list(ACTS))
    where = folder.with_name(f"{folder.name}.where")
    fault = at_files(folder, number, noting(where, ACTS[act]), main_thread=True)
    ended = forked(main, command, faults=[fault])
    kind, *names = where.read_text().splitlines() if where.exists() else ["not reached"]
    where.unlink(missing_ok=True)
    how = f"{act} operation {number} ({kind})"
    return Ended(**{**asdict(ended), "where": tuple(names)}), how


def noting(path: Path, act: Act) -> Act:
    """Write down what is about to be done, and the functions that do it, before an act."""

    def noted(point: Point) -> Any:
        names = [frame.name for frame in reversed(traceback.extract_stack())]
        path.write_text("\n".join([f"{point.kind} {point.name}", *names]))
        return act(point)

    return noted


def _place(functions: Sequence[str]) -> str:
    return next((PLACES[name] for name in functions if name in PLACES), "elsewhere")


# ---- all of them ---------------------------------------------------------------------------------
def run_campaign(
    root: Path, settings: argparse.Namespace, say: Callable[[str], object] = print
) -> list[Result]:
    """Run all cases, or those that --out does not hold yet, and return the results."""
    with pytest.MonkeyPatch.context() as patch:
        speak(patch)
        straight: dict[str, list[Straight]] = {}
        for family in settings.families:
            for run in straight_runs(root, family, settings):
                number = int(run.folder.rpartition("-")[2])
                if run.script in settings.scripts and number in settings.variants:
                    straight.setdefault(f"{family}-{run.script}", []).append(run)
        if settings.only:
            group = settings.only.rpartition("-")[0]
            return [_case_of(settings.only, straight[group], root, settings)]
        done = {result.name: result for result in _kept(settings.out)}
        results = list(done.values())
        share = -(-settings.kills // len(straight))
        with get_context("fork").Pool(settings.processes) as pool:
            # As many cases of each run as give its share of the kills, in rounds.
            number = dict.fromkeys(straight, 0)
            while True:
                todo = []
                for group in straight:
                    had = sum(len(r.kills) for r in results if r.name.startswith(f"{group}-"))
                    for _ in range(-(-(share - had) * 2 // 3) if had < share else 0):
                        number[group] += 1
                        todo.append((f"{group}-{number[group]}", straight[group], root, settings))
                todo = [case for case in todo if case[0] not in done]
                if not todo:
                    if all(_kills(results, group) >= share for group in straight):
                        return results
                    continue
                for result in pool.imap_unordered(_star, todo):
                    results.append(result)
                    _keep(settings.out, result)
                    say(_line(result))


def _kills(results: Sequence[Result], group: str) -> int:
    return sum(len(result.kills) for result in results if result.name.startswith(f"{group}-"))


def _star(arguments: tuple[str, list[Straight], Path, argparse.Namespace]) -> Result:
    return _case_of(*arguments)


def _case_of(
    name: str, runs: Sequence[Straight], root: Path, settings: argparse.Namespace
) -> Result:
    folder = root / f"case-{name}" if settings.keep is None else Path(settings.keep) / name
    straight = random.Random(f"{settings.seed} {name} run").choice(runs)
    try:
        return run_case(name, straight, folder, settings)
    finally:
        if settings.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _kept(out: str | None) -> list[Result]:
    if out is None or not os.path.exists(out):
        return []
    return [Result(**row) for row in lines(Path(out))]


def _keep(out: str | None, result: Result) -> None:
    if out is not None:
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")


def _line(result: Result) -> str:
    verdict = "equal" if not result.problems else ", ".join(result.problems)
    return f"{result.name}: {'; '.join(result.how)} | {', '.join(result.kills)} | {verdict}"


# ---- what is printed -----------------------------------------------------------------------------
def table(results: Sequence[Result]) -> str:
    """Write the table: for each place of a kill, how many kills, and what was equal at the end."""
    head = ["kill in", "kills", *(f"{kind} equal" for kind in KINDS), "stuck"]
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    counts: dict[str, Counter[str]] = {}
    for result in results:
        for place in [*result.kills, "all"]:
            count = counts.setdefault(place, Counter())
            weight = len(result.kills) if place == "all" else 1
            count["kills"] += weight
            count["stuck"] += weight * ("stuck" in result.problems)
            for kind in KINDS:
                count[kind] += weight * result.problems.keys().isdisjoint((kind, "stuck"))
    for place in sorted(counts, key=lambda name: (name == "all", name)):
        count = counts[place]
        cells = [place, *(str(count[name]) for name in ("kills", *KINDS, "stuck"))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def report(results: Sequence[Result], settings: argparse.Namespace) -> str:
    """Write each failure with the command that repeats it, then the table."""
    told = []
    for result in results:
        if result.problems:
            told.append(_line(result))
            for kind, of in result.problems.items():
                told += [f"    {kind}: {line}" for line in of[:4]]
                told += [f"    {kind}: and {len(of) - 4} more"] if len(of) > 4 else []
            chosen = {"variants": settings.variants, "ways": settings.ways, "mode": [settings.mode]}
            flags = "".join(f" --{name} {' '.join(map(str, of))}" for name, of in chosen.items())
            told.append(
                "    again: python tests/benchmarks/fault_campaign.py"
                f" --seed {settings.seed}{flags}"
                f" --families {result.name.partition('-')[0]} --only {result.name} --keep DIR"
            )
    kills = sum(len(result.kills) for result in results)
    commands = statistics.mean(result.commands for result in results) if results else 0
    told += [
        table(results),
        f"{len(results)} cases, {kills} kills, {commands:.1f} commands a case,"
        f" {sum(bool(result.problems) for result in results)} failed",
    ]
    return "\n".join(told)


def settings_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES[:2])
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument(
        "--variants", nargs="+", type=int, default=[0, 1, 2, 3], help="settings of the runs, from 0"
    )
    parser.add_argument("--mode", choices=("files", "times", "both"), default="both")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="how it is given again"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", metavar="CASE", help="this one case, such as gemma3-grpo-17")
    parser.add_argument("--keep", metavar="DIR", help="keep the cases' run folders there")
    parser.add_argument(
        "--out", metavar="FILE", help="keep the results there, and go on after them"
    )
    return parser.parse_args(argv)


def main() -> int:
    """Run the campaign, print the table, and return 1 where a case failed."""
    settings = settings_of()
    with tempfile.TemporaryDirectory(prefix="campaign-") as root:
        results = run_campaign(Path(root), settings, lambda line: print(line, flush=True))
    print(report(results, settings))
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
