"""Run the transfer study of the demo, as transfer/PLAN.md decided it beforehand.

    python tests/benchmarks/transfer_study.py FOLDER [--seeds 1 2 3 4 5] [--jobs 2]

FOLDER gets the runs. What each arm and seed answered goes to transfer/cells in the repository as a
small JSON file, and the tables to transfer/TABLES.md. A cell that is there is not made again, and a
run that was broken off goes on, so the study can be stopped, and go on elsewhere: what a missing
cell needs (the SFT run of its seed) is then made anew. About an hour of CPU time a seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import checkout  # noqa: F401  this checkout before an installed one
from transfer_cells import PLACE, cell_file, pack, read_cell, write_truth
from transfer_tables import ARMS, BASE, GRPO, SETS, SFT, VOTE, Study, tables, whole_seeds

from data.demo.radiographs import GENERATOR_VERSION, draw
from data.demo.splits import seeds, write_split
from data.demo.teacher import reasoning_trace
from data.examples import read_jsonl
from data.files import sha256_of, write_json, write_jsonl
from data.predictions import read_predictions

ROOT = Path(__file__).resolve().parents[2]
COMMIT = subprocess.run(
    ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
).stdout.strip()
SAMPLES, TEMPERATURE = 4, 0.8
CHOSEN_ON = {"a": "study-validation-a", "b": "study-validation-b"}  # the alpha of interpolation
USED = ("sft-train", "rl-train", "rl-train-b", "validation-a", "validation-a2", "validation-b")
SWAPPED = (SFT, GRPO)  # arms that also answer other patients' images
BATCH = ("--per_device_eval_batch_size", "300")
ALPHAS = ("0", "0.25", "0.5", "0.75", "1")
UNWATCHED = ("--eval_steps", "none", "--no_vote_baseline")  # no evaluation but start and end
GRPO_ARMS: dict[str, tuple[str, ...]] = {
    GRPO: ("--reward", "hard", *UNWATCHED),
    "grpo-nuanced": ("--reward", "nuanced", *UNWATCHED),
    "grpo-weighted": ("--reward", "weighted", *UNWATCHED),
    "grpo-both": (
        "--train_file",
        "a=demo:rl-train@1",
        "--train_file",
        "b=demo:rl-train-b@1",
        *UNWATCHED,
    ),
    "grpo-stopped": (
        "--recipe",
        "robust",
        "--validation_file",
        "site-a=demo:validation-a",
        "site-b=demo:validation-b",
        "--no_vote_baseline",
    ),
}
OWN_ARMS = tuple(arm for arm in ARMS if arm != VOTE)  # the vote is made of SFT's samples


@dataclass
class Workshop:
    """Make the runs and the cells of one study in a folder."""

    folder: Path
    # one at a time may make a run that several cells need
    locks: defaultdict[str, Lock] = field(default_factory=lambda: defaultdict(Lock))

    # ---- runs ------------------------------------------------------------------------------------
    def run(self, name: str, module: str, *arguments: str) -> float:
        """Run `python -m module ... --output_dir name`, logged to <name>.log -> its CPU seconds."""
        print(f"{time.strftime('%H:%M:%S')}  {name}", flush=True)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", module, *arguments, "--output_dir", name]
        with open(self.folder / f"{name}.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(
                f"{name} ended with {os.waitstatus_to_exitcode(status)}: see"
                f" {self.folder / name}.log, and start again"
            )
        return usage.ru_utime + usage.ru_stime

    def train(self, name: str, module: str, *arguments: str) -> float:
        """Make a training run that is not finished. A broken one goes on by the same command."""
        with self.locks[name]:
            if (self.folder / name / "adapter_model.safetensors").is_file():  # a run writes it last
                return 0.0
            return self.run(name, module, *arguments)

    def answers(self, name: str, *model: str) -> tuple[dict[str, dict[str, Any]], float]:
        """Let a model answer all sets -> ({set: its packed answers}, CPU seconds).

        Greedily, by samples at the temperature of rollouts, and for SWAPPED from another patient's
        image.
        """
        swap = ("--swap_images",) if name.rpartition("-")[0] in SWAPPED else ()
        ways = {
            "greedy": ("--temperature", "0", *swap),
            "samples": ("--temperature", str(TEMPERATURE), "--num_generations", str(SAMPLES)),
        }
        seconds = 0.0
        for way, flags in ways.items():
            place = f"answers/{name}-{way}"
            if not (self.folder / place / f"scores-{SETS[-1]}.json").is_file():  # written last
                data = [f"{one}=demo:{one}" for one in SETS]
                flags = (*flags, *BATCH, "--data_file", *data)
                seconds += self.run(place, "eval.evaluate", *model, *flags)
        packed = {}
        for one in SETS:
            greedy, sampled = (self.folder / f"answers/{name}-{way}" for way in ways)
            samples = read_predictions(sampled / f"samples-{one}.jsonl")
            packed[one] = {
                "greedy": pack(read_predictions(greedy / f"predictions-{one}.jsonl")),
                "samples": [
                    pack([sample for sample in samples if sample.extra["sample"] == k])
                    for k in range(SAMPLES)
                ],
            }
            if swap:
                packed[one]["swapped"] = pack(read_predictions(greedy / f"swapped-{one}.jsonl"))
        return packed, seconds

    # ---- cells -----------------------------------------------------------------------------------
    def write_cell(self, arm: str, seed: int | None, model: Path | None, facts: dict) -> None:
        """Let the arm's model answer, and write its cell. facts: to keep beside the answers."""
        flags = (
            ("--adapter_name_or_path", str(model)) if model else ("--model_name_or_path", "demo")
        )
        if model is None:  # an adapter's run says these
            flags += ("--prompt", "demo", "--max_completion_length", "96", "--num_threads", "1")
            flags += ("--min_visual_tokens", "16", "--max_visual_tokens", "16", "--bf16", "false")
        name = arm if seed is None else f"{arm}-{seed}"
        answers, seconds = self.answers(name, *flags)
        record = {
            "arm": arm,
            "seed": seed,
            **facts,
            "cpu_seconds": round(facts.get("cpu_seconds", 0) + seconds),
            "made_with": made_with() | {"adapter": model and _sha256(model), "commit": COMMIT},
            "answers": answers,
        }
        write_json(cell_file(arm, seed), record)

    def base(self) -> None:
        self.write_cell(BASE, None, None, {})

    def sft(self, seed: int) -> None:
        seconds = self.make_sft(seed)
        self.write_cell(SFT, seed, self.folder / f"{SFT}-{seed}", {"cpu_seconds": seconds})

    def make_sft(self, seed: int) -> float:
        return self.train(f"{SFT}-{seed}", "run_sft", "--recipe", "demo", "--seed", str(seed))

    def grpo(self, arm: str, seed: int) -> None:
        seconds = self.make_grpo(arm, seed)
        facts = {"cpu_seconds": seconds, "started_from": _sha256(self.folder / f"{SFT}-{seed}")}
        record = json.loads((self.folder / f"{arm}-{seed}/config.json").read_text(encoding="utf-8"))
        facts["settings"] = {
            name: entry["value"]
            for name, entry in record["settings"].items()
            if entry["origin"] != "default"
        }
        self.write_cell(arm, seed, self.folder / f"{arm}-{seed}", facts)

    def make_grpo(self, arm: str, seed: int) -> float:
        self.make_sft(seed)
        start = ("--seed", str(seed), "--adapter_name_or_path", f"{SFT}-{seed}")
        flags = ("--recipe", "demo", *start, *GRPO_ARMS[arm])
        return self.train(f"{arm}-{seed}", "run_grpo", *flags)

    def more_sft(self, seed: int) -> None:
        """Go on with SFT on the images that GRPO drew, for as many passes as it made over them."""
        data, passes = self.data_of_more_sft(seed)
        start = ("--seed", str(seed), "--adapter_name_or_path", f"{SFT}-{seed}")
        flags = (*start, "--train_file", str(data), "--num_train_epochs", f"{passes:.2f}")
        seconds = self.train(f"more-sft-{seed}", "run_sft", "--recipe", "demo", *flags)
        facts = {"cpu_seconds": seconds, "passes": round(passes, 2)}
        facts["started_from"] = _sha256(self.folder / f"{SFT}-{seed}")
        self.write_cell("more-sft", seed, self.folder / f"more-sft-{seed}", facts)

    def data_of_more_sft(self, seed: int) -> tuple[Path, float]:
        """Write the images of GRPO's rollouts with the teacher's traces -> (the file, passes)."""
        self.make_grpo(GRPO, seed)
        with open(self.folder / f"{GRPO}-{seed}/completions.jsonl", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        images = {row["id"] for row in rows}
        groups = {(row["step"], row["group"]) for row in rows}
        folder = self.folder / "demo-data"
        examples = read_jsonl(folder / "rl-train.jsonl")
        learnt = [
            {
                "id": example.id,
                "patient_id": example.patient_id,
                "image": example.image,
                "labels": list(example.labels),
                "dataset": example.dataset,
                "answer": reasoning_trace(draw(image_seed, "a"), image_seed),
            }
            for example, image_seed in zip(examples, seeds("rl-train"), strict=True)
            if example.id in images
        ]
        file = write_jsonl(folder / f"more-sft-{seed}.jsonl", learnt)
        return file.resolve(), len(groups) / len(learnt)

    def interpolated(self, seed: int) -> None:
        """Choose alpha on validation images, as eval/README says, and answer with that adapter."""
        self.make_grpo(GRPO, seed)
        name, seconds = f"interpolated-{seed}", 0.0
        if not (self.folder / name).is_dir():  # engine.merge names it last
            flags = ("--interpolate", f"{SFT}-{seed}", f"{GRPO}-{seed}", "--alpha", *ALPHAS)
            seconds += self.run(name, "engine.merge", *flags)
        answers = [f"answers/{name}-{alpha}" for alpha in ALPHAS]
        for alpha, place in zip(ALPHAS, answers, strict=True):
            if not (self.folder / place / "scores-b.json").is_file():  # written last
                data = [f"{site}=demo:{split}" for site, split in CHOSEN_ON.items()]
                flags = ("--adapter_name_or_path", f"{name}/alpha-{alpha}", "--data_file", *data)
                seconds += self.run(place, "eval.evaluate", *flags, *BATCH)
        chosen = self.folder / f"choice-{seed}/chosen-alpha.json"
        if not chosen.is_file():
            seconds += self.run(f"choice-{seed}", "eval.report", *answers, "--in_distribution", "a")
        choice = json.loads(chosen.read_text(encoding="utf-8"))
        facts = {
            "alpha": choice["alpha"],
            "validation": [
                {key: point[key] for key in ("alpha", "home", "away", "gain", "error")}
                for point in choice["points"]
            ],
            "cpu_seconds": seconds,
        }
        model = self.folder / name / f"alpha-{choice['alpha']:g}"
        self.write_cell("interpolated", seed, model, facts)

    # ---- all of it -------------------------------------------------------------------------------
    def submit(
        self, pool: ThreadPoolExecutor, study_seeds: Sequence[int], arms: Sequence[str]
    ) -> list[Future]:
        """Hand the missing cells of these arms to the pool, what others need before them."""
        makers = {SFT: self.sft} | {arm: partial(self.grpo, arm) for arm in GRPO_ARMS}
        makers |= {"more-sft": self.more_sft, "interpolated": self.interpolated}
        jobs: list[tuple[str, int | None, Callable[[], None]]] = [(BASE, None, self.base)]
        for pair in (study_seeds[i : i + 2] for i in range(0, len(study_seeds), 2)):
            for arm, make in makers.items():
                jobs += [(arm, seed, partial(make, seed)) for seed in pair]
        return [
            pool.submit(job)
            for arm, seed, job in jobs
            if arm in arms and read_cell(arm, seed) is None
        ]


def _sha256(adapter: Path) -> str:
    return sha256_of(adapter / "adapter_model.safetensors")


def made_with() -> dict[str, str]:
    """Say what the demo was when a cell was made, whatever the comments of its recipe."""
    with open(ROOT / "engine/recipes/demo.toml", "rb") as file:
        recipe = tomllib.load(file)
    return {
        "generator_version": GENERATOR_VERSION,
        "base": sha256_of(ROOT / "data/demo/base/model.safetensors"),
        "recipe": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
    }


def claim(folder: Path) -> None:
    """Say in the folder which demo its runs are of, and refuse one with other runs.

    Raises SystemExit where there are files of another demo, or of something else.
    """
    note = folder / "study.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == made_with():
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} holds runs of another demo, or other files: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, made_with())


def check_cells(study_seeds: Sequence[int]) -> None:
    """Refuse to add to cells that were made with another demo."""
    arms = [(BASE, None), *((arm, seed) for arm in OWN_ARMS for seed in study_seeds)]
    for arm, seed in arms:
        cell = read_cell(arm, seed)
        if cell and not made_with().items() <= cell["made_with"].items():
            raise SystemExit(
                f"{cell_file(arm, seed)} was made with another demo than this checkout's: move the"
                " cells away to make all of them again"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--arms", nargs="+", choices=OWN_ARMS, default=list(OWN_ARMS))
    options = parser.parse_args(arguments)
    check_cells(options.seeds)
    folder = options.folder.resolve()
    claim(folder)
    used = (*USED, *CHOSEN_ON.values(), *SETS)
    for split in used:  # drawn here once, so that no two runs draw them at the same time
        write_split(split, None, folder / "demo-data")
    write_truth({one: read_jsonl(folder / f"demo-data/{one}.jsonl") for one in SETS})
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = Workshop(folder).submit(pool, options.seeds, options.arms)
        try:
            for job in jobs:
                job.result()
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
    if done := whole_seeds(options.seeds):
        (PLACE / "TABLES.md").write_text(tables(Study(done)), encoding="utf-8")
        print(PLACE / "TABLES.md")


if __name__ == "__main__":
    main()
