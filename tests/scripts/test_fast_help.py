"""Protect the time to an answer.

Checked: --help, a typo and every usage error come before torch is loaded.

What is bounded is the imports, not the seconds: a subprocess says at its end which of the slow
packages it has loaded.

Run: pytest tests/scripts/test_fast_help.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.patches import patched
from tests.helpers.repository import ROOT

SLOW = ("torch", "transformers", "peft")
# argv as in `python ARGV`, then the end of stderr: whatever happens, a JSON list of slow packages.
PROGRAM = f"""
import atexit, json, runpy, sys
loaded = lambda: [name for name in {SLOW!r} if name in sys.modules]
atexit.register(lambda: print(json.dumps(loaded()), file=sys.stderr))
module, sys.argv = sys.argv[1], sys.argv[1:]
if module.endswith(".py"):
    sys.path.insert(0, ".")
    runpy.run_path(module, run_name="__main__")
else:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
"""

TRAINING = [
    (["--help"], 0, ""),
    (["--lerning_rate", "1"], 2, "unknown flag --lerning_rate; did you mean --learning_rate?"),
    (["--learning_rate", "fast"], 2, "--learning_rate: expected a number above 0, got 'fast'"),
    (["--warmup_ratio", "1"], 2, "--warmup_ratio: expected a number at least 0 and below 1, g"),
    (["--recipe", "demu"], 2, "--recipe demu: no such recipe; did you mean demo?"),
    (["--recipe", "no.toml"], 2, "--recipe no.toml: cannot be read: No such file or directory"),
    (["--resume_from_checkpoint", "no"], 2, "--resume_from_checkpoint no: no such folder"),
    (
        ["--adapter_name_or_path", "no", "--train_file", "x"],
        2,
        "no: no adapter there; an adapter folder holds adapter_config.json and",
    ),
]
SFT = [
    *TRAINING,
    (
        ["--model_name_or_path", "demo", "--train_file", "no.jsonl"],
        2,
        "no.jsonl: no such data file; give a JSONL file with one example a line",
    ),
    (["--train_file", "demo:sft"], 2, "--model_name_or_path is missing"),
    (
        ["--model_name_or_path", "./no", "--train_file", "demo:sft-train"],
        2,
        "--model_name_or_path ./no: no such folder; give a checkpoint's folder",
    ),
    (["--recipe", "demo", "--min_visual_tokens", "20"], 2, "--min_visual_tokens 20 is above"),
    (["--recipe", "demo", "--output_dir", "rl"], 2, "--output_dir rl is not empty (it holds "),
]
GRPO = [
    *TRAINING,
    (["--epsilon_low", "x"], 2, "--epsilon_low: expected a number at least 0 and below 1, got 'x'"),
    (["--beta", "-1"], 2, "--beta: expected a number at least 0"),
    (["--num_generations", "3"], 2, "does not divide into groups of --num_generations 3"),
    (["--recipe", "demo-gemma"], 2, "no finished SFT run of demo-gemma named runs/<time>-sft"),
]
MERGE = [
    (["--help"], 0, ""),
    (["--adapter", "x"], 2, "unknown flag --adapter; did you mean --adapter_name_or_path?"),
    ([], 2, "--adapter_name_or_path is missing"),
    (
        ["--adapter_name_or_path", "no", "--output_dir", "x"],
        2,
        "no: no adapter there; an adapter folder holds adapter_config.json and",
    ),
    (["--dtype", "int4"], 2, "--dtype: 'int4' is not one of bfloat16, float32"),
]
EVALUATE = [
    (["--help"], 0, "usage: python -m eval.evaluate"),
    (["--promt", "demo"], 2, "unknown flag --promt; did you mean --prompt?"),
    (["--data_file", "a=x"], 2, "no model: give --model_name_or_path"),
    (["--predictions", "a=no.jsonl"], 2, "no.jsonl: no such predictions file"),
    (
        ["--adapter_name_or_path", "no", "--data_file", "a=x"],
        2,
        "no: no adapter there; an adapter folder holds adapter_config.json and",
    ),
]
MATRIX = [
    (["--help"], 0, "usage: python -m eval.matrix"),
    ([], 2, "--model is missing: give NAME=BASE or NAME=ADAPTER"),
]
REPORT = [
    (["--help"], 0, "usage: python -m eval.report"),
    (["no"], 2, "--run no: no is no folder; give FOLDER or NAME=FOLDER"),
]
COMPARE = [
    (["--help"], 0, "usage: python -m eval.compare"),
    ([], 2, "--run: two runs or more are compared, got 0"),
]
FIGURES = [
    (["--help"], 0, "usage: python -m eval.figures"),
    ([], 2, "--run is missing: give one or more FOLDER or NAME=FOLDER"),
]
COMMANDS = {
    "run_sft.py": SFT,
    "run_grpo.py": GRPO,
    "engine.merge": MERGE,
    "eval.evaluate": EVALUATE,
    "eval.matrix": MATRIX,
    "eval.report": REPORT,
    "eval.compare": COMPARE,
    "eval.figures": FIGURES,
}


def answer(command: str, argv: list[str], tree: Path = ROOT) -> tuple[int, str, list[str]]:
    """Run a command -> (exit code, what it printed, the slow packages that it loaded)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, *argv],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    *errors, loaded = done.stderr.splitlines()
    return done.returncode, done.stdout + "\n".join(errors), json.loads(loaded)


@pytest.mark.parametrize(
    ("command", "argv", "code", "message"),
    [
        pytest.param(command, *case, id=f"{command} {' '.join(case[0])}")
        for command, cases in COMMANDS.items()
        for case in cases
    ],
)
def test_an_answer_comes_before_the_slow_imports(command, argv, code, message):
    found, said, loaded = answer(command, argv)
    assert (found, loaded) == (code, []), said
    assert message in said
    assert said.count("Traceback") == 0


# ---- commands that only read files ---------------------------------------------------------------
@pytest.mark.parametrize("command", ["eval.report", "eval.compare", "eval.figures"])
def test_a_command_that_only_reads_files_never_loads_a_slow_package(command, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"script": "sft", "settings": {}}')
        (tmp_path / name / "metrics.jsonl").write_text(
            '{"step": 1, "split": "train", "loss": 1, "mean_token_accuracy": 0.5}\n'
        )
    runs = [] if command == "eval.report" else [str(tmp_path / "one"), str(tmp_path / "two")]
    code, said, loaded = answer(command, [*runs, "--output_dir", str(tmp_path / "out")])
    assert (code, loaded) == (0, []), said
    assert any((tmp_path / "out").iterdir())


# ---- the flags of a fork -------------------------------------------------------------------------
@pytest.fixture
def fork(tmp_path):
    """Copy the project: `fork(text)` -> a copy in which rl/objective.py has this text."""

    def copy(text: str) -> Path:
        for package in ("data", "engine", "eval", "rl"):
            ignored = shutil.ignore_patterns("base*", "__pycache__")
            shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
        shutil.copy(ROOT / "run_grpo.py", tmp_path)
        (tmp_path / "rl/objective.py").write_text(text, encoding="utf-8")
        return tmp_path

    return copy


def test_the_flags_of_a_fork_are_answered_as_fast(fork):
    tree = fork(patched("gspo"))
    code, said, loaded = answer("run_grpo.py", ["--help"], tree)
    assert code == 0 and "--importance_sampling_level {token,sequence}" in said and loaded == []
    code, said, loaded = answer("run_grpo.py", ["--importance_sampling_level", "word"], tree)
    assert code == 2 and "'word' is not one of token, sequence" in said and loaded == []


@pytest.mark.parametrize(
    ("anchor", "addition"),
    [
        # a stand-in has no numbers
        ("STD_EPSILON = 1e-4", "SMALLEST = 2 * float(torch.finfo(torch.float32).eps)\n"),
        # the class itself asks torch
        ("    epsilon_low: float = field(", "    threads: int = torch.get_num_threads()\n"),
    ],
)
def test_a_fork_that_computes_at_its_top_is_only_slower(fork, anchor, addition):
    text = (ROOT / "rl/objective.py").read_text(encoding="utf-8")
    assert text.count(anchor) == 1
    code, said, loaded = answer(
        "run_grpo.py", ["--help"], fork(text.replace(anchor, addition + anchor))
    )
    assert code == 0 and "--epsilon_low" in said and loaded == ["torch"]


def test_a_fault_in_a_fork_is_shown_as_it_is(fork):
    tree = fork("import torch\n\nx = torch.zeros(2) +\n")
    code, said, _ = answer("run_grpo.py", ["--help"], tree)
    assert code == 1 and "SyntaxError" in said and "rl/objective.py" in said
