"""Compare two commits: do the same commands leave the same numbers, to the last bit?

    python tests/benchmarks/same_run.py 38fffba main               # about 10 minutes on one core
    python tests/benchmarks/same_run.py HEAD . --families gemma3 --quick
    python tests/benchmarks/same_run.py HEAD~1 HEAD --keep /tmp/runs     # to look at a difference

OLD and NEW are commits, which get a worktree each outside this repository for the time of the
comparison, or folders. A refactor that changes no number, no random draw and no key of a file of a
run passes: it is a proof for both scripts, every family and the evaluation, where tests look at
parts. Each checkout runs the same commands on the same small random models and X-rays:

    sft               2 epochs, validation on two sites, dropout, a checkpoint at every step
    sft-resumed       the same from the middle of an epoch
    grpo              --num_iterations 2, micro-batches that cut groups, completions of 1 to 6
                      tokens, truncated ones masked, two sites evaluated every 2 steps,
                      --dump_step 3
    grpo-nuanced      the same with Eq. 4
    grpo-resumed      the same from the middle of a rollout
    base, greedy, sampled, scored-again
                      evaluations of the base, of the trained adapter, and of its predictions
    old-adapter       the adapter that OLD trained, evaluated by both

Compared are the adapters and optimizer states of every checkpoint, dumps, metrics (values, keys and
their order; timings are left out by name), completions, predictions and scores. A resumed run is
also compared with the straight one. The models are random, but most of their tokens decode to a
whole answer or to a space (see `readable`), so completions of a group are rated differently and
every step of GRPO has a gradient, which is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  this checkout before an installed one
import torch
from safetensors import safe_open
from transformers.utils.logging import disable_progress_bar

from tests.helpers.repository import ROOT
from tests.helpers.tiny import SAVE, save_images

LABELS = ("Edema", "Pneumonia", "Fracture")
ANSWERS = ("Edema", "Pneumonia", "Fracture", "Edema, Fracture", "Pneumonia, Fracture")
# Metrics that are wall-clock times, by name.
TIMINGS = ("step_time", "time/")
# Keys of a row of completions.jsonl and of a predictions file that have another name since: old
# name -> new name. A row of NEW may have more keys; those of OLD must be there and be equal.
RENAMED: dict[str, str] = {}
# Settings in a dump that name files of the run itself.
PLACES = ("output_dir", "adapter_name_or_path", "resume_from_checkpoint")

COMMON = ["--min_visual_tokens", "4", "--max_visual_tokens", "16", "--no_bf16"]
TRAINING = [
    *["--no_gradient_checkpointing", "--max_completion_length", "6", "--save_steps", "1"],
    *["--save_total_limit", "none", "--learning_rate", "2e-3"],
]
# 16 rows, 4 to a step: 4 steps an epoch.
SFT = [
    *["--prompt", "demo", "--num_train_epochs", "2", "--per_device_train_batch_size", "2"],
    *["--gradient_accumulation_steps", "2"],
]
# A rollout of 5 prompts x 4 completions serves 4 steps: 2 passes of 2 steps of 5 micro-batches of
# 2. So a step holds two groups and a half, and step 5 begins the second rollout.
GRPO = [
    *["--max_steps", "5", "--num_generations", "4", "--per_device_train_batch_size", "2"],
    *["--gradient_accumulation_steps", "5", "--steps_per_generation", "10"],
    *["--num_iterations", "2", "--mask_truncated_completions", "--min_length", "4"],
    *["--temperature", "1.2", "--eval_steps", "2", "--dump_step", "3"],
]
INTO = ["--output_dir", "{out}/{name}"]
SFT_STOP, GRPO_STOP = 3, 2  # the checkpoints that the resumed runs start from
# What a run writes beside its checkpoints that one that was killed has not written yet.
FINISHED = ("predictions-*", "scores-*", "step-*.safetensors", "adapter_*")


@dataclass(frozen=True)
class Run:
    """Name a run and what one checkout runs for it.

    arguments: of python, with {out} for the folder of the checkout's runs of this family, {old} for
    OLD's, {data} for the models and data sets, {name} and {stop} as below. stopped: the run whose
    checkpoint of that step it goes on from, in a copy. quick: also run with --quick.
    """

    name: str  # and the name of its folder
    arguments: list[str]
    stopped: tuple[str, int] | None = None
    quick: bool = False


def plan(family: str) -> list[Run]:
    """List the runs of a family, in the order in which they need one another."""
    sites = ["a={data}/a.jsonl", "b={data}/b.jsonl"]
    train = ["--train_file", "{data}/a.jsonl", "--validation_file", *sites]
    base = ["--model_name_or_path", f"{{data}}/{family}", *COMMON]
    sft = ["run_sft.py", *base, *train, *TRAINING, *SFT]
    grpo = ["run_grpo.py", "--adapter_name_or_path", "{out}/sft", "--no_bf16", *train]
    grpo += [*TRAINING, *GRPO]
    resume = ["--resume_from_checkpoint", "{out}/{name}/checkpoint-{stop}"]
    evaluate = ["-m", "eval.evaluate", "--data_file", *sites, "--max_completion_length", "6"]
    trained = [*evaluate, "--adapter_name_or_path", "{out}/grpo"]
    again = [f"{site}={{out}}/greedy/predictions-{site}.jsonl" for site in "ab"]
    return [
        Run("sft", [*sft, *INTO], quick=True),
        Run("sft-resumed", ["run_sft.py", *resume], ("sft", SFT_STOP)),
        Run("grpo", [*grpo, *INTO], quick=True),
        Run("grpo-nuanced", [*grpo, "--reward", "nuanced", *INTO]),
        Run("grpo-resumed", ["run_grpo.py", *resume], ("grpo", GRPO_STOP), quick=True),
        Run("base", [*evaluate, *base, "--prompt", "demo", *INTO]),
        Run("greedy", [*trained, *INTO], quick=True),
        Run("sampled", [*trained, "--temperature", "1", "--train_file", "{data}/a.jsonl", *INTO]),
        Run("scored-again", ["-m", "eval.evaluate", "--predictions", *again, *INTO]),
        Run("old-adapter", [*evaluate, "--adapter_name_or_path", "{old}/grpo", *INTO]),
    ]


# ---- models and data -----------------------------------------------------------------------------
def written_by(index: int) -> str:
    """Return the answer that a token of `readable` decodes to."""
    return f"<think>{index}</think><solution>{ANSWERS[index // 6 % len(ANSWERS)]}</solution>"


def readable(folder: Path) -> Path:
    """Make the random completions of a saved model readable, and of different lengths.

    Its tokens are bytes. Of 18 of them three decode to a whole answer and the others to a space, so
    some 40 % of completions of 6 tokens hold exactly one answer. Two of 18 end a completion. An
    answer is read as the token that writes it, so it can be learnt.
    """
    file = folder / "tokenizer.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    bytes_ = [token for token, index in record["model"]["vocab"].items() if index < 256]
    texts = {token: written_by(i) for i, token in enumerate(bytes_) if i % 6 == 0}
    spaces = "".join(f"\\x{{{ord(token):x}}}" for token in bytes_ if token not in texts)
    # A letter of an answer must not become a space: whole tokens alone match.
    steps = [{"type": "Replace", "pattern": {"Regex": f"^[{spaces}]$"}, "content": " "}]
    record["decoder"] = {"type": "Sequence", "decoders": steps}
    vocabulary = record["model"]["vocab"]
    kinds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for token, text in texts.items():
        vocabulary[text] = vocabulary.pop(token)
        record["added_tokens"].append({"id": vocabulary[text], "content": text} | kinds)
    record["added_tokens"].sort(key=lambda added: added["id"])
    file.write_text(json.dumps(record), encoding="utf-8")
    file = folder / "generation_config.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    stops = record.get("eos_token_id") or []
    record["eos_token_id"] = [*(stops if isinstance(stops, list) else [stops]), *range(4, 256, 9)]
    file.write_text(json.dumps(record), encoding="utf-8")
    return folder


def make_data(folder: Path) -> None:
    """Write a.jsonl, 16 examples of 8 patients, and b.jsonl, 6 of another site, with two sizes of
    image.
    """
    for site, count in (("a", 16), ("b", 6)):
        sizes = [(56, save_images(folder / f"{site}56", count, size=56))]
        sizes += [(112, save_images(folder / f"{site}112", count, size=112))]
        rows = []
        for i in range(count):
            size, names = sizes[i % 3 == 2]
            label = LABELS[i % 3]
            row = {
                "id": f"{site}{i}",
                "patient_id": f"{site}-p{i // 2}",
                "image": f"{site}{size}/{names[i]}",
                "labels": [label, *(["Fracture"] if i % 4 == 1 and label != "Fracture" else [])],
                "dataset": site,
                # of one token, and blanks, which templates may drop
                "answer": written_by(6 * (i % 3 + 5 * (i % 8))) + " " * (i * i % 4),
            }
            if site == "b":
                row["evaluated_labels"] = [*LABELS, "No Finding"]
            rows.append(row)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{site}.jsonl").write_text(lines, encoding="utf-8")


# ---- run -----------------------------------------------------------------------------------------
@contextmanager
def working_tree(named: str, folder: Path) -> Iterator[Path]:
    """Give the folder of a checkout: `named` itself, or a worktree of that commit for a while."""
    if Path(named).is_dir():
        yield Path(named).resolve()
        return
    git = ["git", "-C", str(ROOT)]
    subprocess.run([*git, "worktree", "add", "-q", "--detach", str(folder), named], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True)


def execute(run: Run, tree: Path, out: Path, old: Path, data: Path) -> None:
    """Run one command of a checkout. RuntimeError with its last lines where it fails."""
    out.mkdir(parents=True, exist_ok=True)
    if run.stopped:
        shutil.copytree(out / run.stopped[0], out / run.name, symlinks=True)
        for pattern in FINISHED:
            for path in (out / run.name).glob(pattern):
                path.unlink()
    places = {"out": out, "old": old, "data": data, "name": run.name}
    places |= {"stop": run.stopped[1]} if run.stopped else {}
    command = [argument.format(**places) for argument in run.arguments]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{tree}$ python {' '.join(command)}\n{last}")


# ---- compare -------------------------------------------------------------------------------------
def difference(old: Any, new: Any, where: str = "") -> str | None:
    """Name the first place where two JSON values differ, or None. Numbers are equal to the bit,
    keys of an object in one order.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        if list(old) != list(new):
            return f"{where} has the keys {list(old)} and {list(new)}"
        pairs = [(f"{where}.{key}" if where else key, old[key], new[key]) for key in old]
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{where} has {len(old)} and {len(new)} entries"
        pairs = [(f"{where}[{i}]", *both) for i, both in enumerate(zip(old, new, strict=True))]
    else:
        same = type(old) is type(new) and repr(old) == repr(new)  # NaN is NaN, 1 is not 1.0
        return None if same else f"{where} is {old!r:.120} and {new!r:.120}"
    found = (difference(one, other, place) for place, one, other in pairs)
    return next((text for text in found if text), None)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_timings(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith(TIMINGS)}


def tensors_differ(old: Path, new: Path) -> str | None:
    """Name the first tensor of two safetensors files that is not equal to the bit, or None."""
    with safe_open(old, "pt") as first, safe_open(new, "pt") as second:
        if sorted(first.keys()) != sorted(second.keys()):
            return f"{old.name} has other tensors: {sorted(set(first.keys()) ^ set(second.keys()))}"
        for name in sorted(first.keys()):
            one, other = first.get_tensor(name), second.get_tensor(name)
            if one.dtype != other.dtype or one.shape != other.shape:
                return (
                    f"{name} is {one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
                )
            # as bytes: NaN equals itself, and -0.0 is not 0.0
            if not torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other))):
                gap = (one.double() - other.double()).abs().max().item()
                return f"{name} differs by at most {gap:.3g}"
    return None


def metrics_differ(old: Path, new: Path) -> str | None:
    rows = ([without_timings(row) for row in read_lines(path)] for path in (old, new))
    return difference(*rows, where="line")


def rows_differ(old: Path, new: Path) -> str | None:
    """Compare rows of completions or predictions in the keys of OLD, under their new names."""
    first, second = read_lines(old), read_lines(new)
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} rows"
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        for key, value in one.items():
            # a file that was written under the old names has them still
            name = RENAMED.get(key, key) if RENAMED.get(key, key) in other else key
            if name not in other:
                return f"row {number} has no {RENAMED.get(key, key)}"
            if text := difference(value, other[name], f"row {number}: {key}"):
                return text
    return None


def scores_differ(old: Path, new: Path) -> str | None:
    first, second = read_json(old), read_json(new)
    first.pop("run", None), second.pop("run", None)
    return difference(first, second)


def dumps_differ(old: Path, new: Path) -> str | None:
    """Compare the tensors of two dumps, and what is noted of the step; settings by their value,
    those that name a file of the run left out.
    """
    if text := tensors_differ(old, new):
        return text
    noted = []
    for path in (old, new):
        with safe_open(path, "pt") as file:
            notes = {key: json.loads(text) for key, text in file.metadata().items()
                     if key != "format"}  # fmt: skip
        for name in PLACES:
            notes["settings"].pop(name, None)
        noted.append(dict(sorted(notes.items())))
    return difference(*noted, where="metadata")


def optimizers_differ(old: Path, new: Path) -> str | None:
    return difference(read_json(old), read_json(new))


KINDS: list[tuple[str, list[str], Callable[[Path, Path], str | None]]] = [
    ("adapters", ["adapter_model.safetensors", "checkpoint-*/adapter_model.safetensors"],
     tensors_differ),
    ("optimizer states", ["checkpoint-*/optimizer.safetensors"], tensors_differ),
    ("optimizer settings", ["checkpoint-*/optimizer.json"], optimizers_differ),
    ("dumps", ["step-*.safetensors"], dumps_differ),
    ("metrics", ["metrics.jsonl"], metrics_differ),
    ("completions", ["completions.jsonl"], rows_differ),
    ("predictions", ["predictions-*.jsonl"], rows_differ),
    ("scores", ["scores-*.json"], scores_differ),
]  # fmt: skip


class Report:
    """Print one line for each comparison, and remember whether all were equal."""

    def __init__(self) -> None:
        self.same = True

    def line(self, what: str, problem: str | None) -> None:
        self.same = self.same and problem is None
        print(f"{what:64} {'equal' if problem is None else f'DIFFERENT: {problem}'}", flush=True)

    def folders(self, what: str, old: Path, new: Path) -> None:
        """Compare all files that two runs left, kind by kind."""
        for kind, patterns, differ in KINDS:
            first, second = (
                sorted(
                    path.relative_to(folder)
                    for pattern in patterns
                    for path in folder.glob(pattern)
                )
                for folder in (old, new)
            )
            if not first and not second:
                continue
            problem = None
            if first != second:
                problem = f"only one has {', '.join(map(str, sorted({*first} ^ {*second})))}"
            else:
                found = ((path, differ(old / path, new / path)) for path in first)
                problem = next((f"{path}: {text}" for path, text in found if text), None)
            self.line(f"{what}: {kind} ({len(first)})", problem)

    def gradients(self, what: str, run: Path) -> None:
        """Check that every step had a gradient: without one, two runs are equal for no reason."""
        log = [row for row in read_lines(run / "metrics.jsonl") if row["split"] == "train"]
        still = [row["step"] for row in log if not row["grad_norm"] > 0]
        self.line(
            f"{what}: a gradient in each of {len(log)} steps",
            f"none in steps {still}" if still or not log else None,
        )


def compare(family: str, trees: list[Path], folder: Path, runs: list[Run], report: Report) -> None:
    """Run a family in both checkouts, and compare after each run."""
    data = folder / "data"
    outs = [folder / side / family for side in ("old", "new")]
    for run in runs:
        with ThreadPoolExecutor(2) as pool:
            both = [
                pool.submit(execute, run, tree, out, outs[0], data)
                for tree, out in zip(trees, outs, strict=True)
            ]
        for done in both:
            done.result()
        old, new = (out / run.name for out in outs)
        report.folders(f"{family}, {run.name}", old, new)
        if run.arguments[0].startswith("run_"):
            report.gradients(f"{family}, {run.name}", new)
        if run.stopped:
            report.folders(f"{family}, {run.name} and straight", outs[1] / run.stopped[0], new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", metavar="OLD", help="a commit or a folder")
    parser.add_argument("new", metavar="NEW", help="a commit or a folder")
    parser.add_argument("--families", nargs="+", choices=SAVE, default=list(SAVE))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="SFT, GRPO with the hard reward, its resumption and one evaluation",
    )
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="leave models and runs here")
    arguments = parser.parse_args()
    disable_progress_bar()
    report = Report()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = arguments.keep.resolve() if arguments.keep else scratch / "runs"
        if folder.exists() and any(folder.iterdir()):
            parser.error(f"--keep {folder} is not empty")
        trees = [
            stack.enter_context(working_tree(named, scratch / side))
            for side, named in (("old-tree", arguments.old), ("new-tree", arguments.new))
        ]
        (folder / "data").mkdir(parents=True)
        make_data(folder / "data")
        for family in arguments.families:
            readable(SAVE[family](folder / "data" / family, tied=False))
            runs = [run for run in plan(family) if run.quick or not arguments.quick]
            try:
                compare(family, trees, folder, runs, report)
            except RuntimeError as error:
                report.line(f"{family}: a command failed", str(error))
    print("all equal" if report.same else "NOT the same")
    return 0 if report.same else 1


if __name__ == "__main__":
    raise SystemExit(main())
