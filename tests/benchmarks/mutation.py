"""Run mutants of the files in which a silent mistake would spoil training or scores.

    pip install -e '.[test,bench]'
    python tests/benchmarks/mutation.py [--jobs 2] [--sample 50] [rl/objective.py ...]

A mutant is a copy of a file with one change by an operator of mutmut: a number plus 1, + for -, <=
for <, an argument dropped or None, and so on. A test of that file must fail on it, or it must stand
in tests/mutation_equivalents.toml with the reason why no test can. The exit code is 1 where a
mutant survives that is not listed, and where the list names one that no longer exists or is killed.

mutmut's own runner leaves out module level, class level and decorated functions. Here these hold
the published numbers, the metrics of the objective and the backward pass. So the mutants are run
here, in forked processes that have imported torch already. The mutated source is executed as the
module and never written to disk: a test that reads source text learns nothing from it. Left alone
are type annotations, docstrings, and prose: string literals with a space between two words, as in
messages and help texts. So is `non_blocking`, which changes no value.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import importlib.metadata
import os
import re
import signal
import sys
import time
import tomllib
import types
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401  this checkout before an installed one
import libcst
import pytest
from mutmut.mutation.mutators import mutation_operators
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENTS = ROOT / "tests" / "mutation_equivalents.toml"
TESTS = {  # each file's own tests, none of which reads its text
    "data/answers.py": ("data/test_answers.py",),
    "data/entries.py": ("data/test_entries.py", "data/test_answers.py"),
    "rl/rewards.py": ("rl/test_rewards.py",),
    "eval/metrics.py": ("eval/test_metrics.py",),
    "engine/optim.py": ("engine/test_optim.py",),
    "engine/logprobs.py": ("engine/test_logprobs.py",),
    "rl/objective.py": ("rl/test_objective.py", "rl/test_objective_properties.py"),
    "engine/order.py": ("engine/test_order.py",),
    "engine/collate.py": ("engine/test_collate.py", "engine/test_encode.py"),
    "engine/checkpoint.py": ("engine/test_checkpoint.py",),
    "engine/state_tensors.py": ("engine/test_checkpoint.py",),
    "engine/generate.py": ("engine/test_generate.py", "engine/test_devices.py"),
    "engine/nucleus.py": ("engine/test_nucleus.py",),
    "engine/lora.py": ("engine/test_lora.py",),
    "engine/token_layers.py": ("engine/test_token_layers.py",),
    "engine/decoding.py": ("engine/test_decoding.py", "engine/test_generate.py"),
    "engine/graphs.py": ("engine/test_graphs.py",),
    "engine/cache.py": ("engine/test_decoding.py", "engine/test_generate.py"),
    "engine/server_address.py": ("engine/test_server.py",),
    "engine/server.py": ("engine/test_server.py",),
    "engine/chat_api.py": ("engine/test_chat_api.py",),
    "engine/remote.py": ("engine/test_remote.py",),
    "engine/probe.py": ("engine/test_probe.py",),
    "rl/plan.py": ("rl/test_plan.py",),
    "rl/samples.py": ("rl/test_rollout.py",),
    "rl/rollout.py": ("rl/test_rollout.py",),
    "eval/paired.py": ("eval/test_paired.py",),
    "eval/votes.py": ("eval/test_votes.py",),
    "eval/probabilities.py": ("eval/test_probabilities.py",),
    "eval/faithfulness.py": ("eval/test_faithfulness.py",),
}
MODELS = (  # slow to import, and what tests with a small model need
    "torch._dynamo",
    "peft",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
)
# What these import, once before the forks; nothing of ours. torch._dynamo: the first optimizer.
PRELOADED = {
    "data/answers.py": ("hypothesis",),
    "data/entries.py": ("hypothesis",),
    "rl/rewards.py": (),
    "eval/metrics.py": ("sklearn.metrics",),
    "engine/optim.py": ("torch._dynamo",),
    "engine/logprobs.py": ("transformers",),
    "rl/objective.py": ("torch",),
    "engine/order.py": ("torch",),
    "engine/collate.py": MODELS,
    "engine/checkpoint.py": ("torch._dynamo", "safetensors.torch"),
    "engine/state_tensors.py": ("torch._dynamo", "safetensors.torch"),
    "engine/generate.py": MODELS,
    "engine/nucleus.py": ("hypothesis", "torch"),
    "engine/lora.py": MODELS,
    "engine/token_layers.py": MODELS,
    "engine/decoding.py": MODELS,
    "engine/graphs.py": MODELS,
    "engine/cache.py": MODELS,
    "engine/server_address.py": (),
    "engine/server.py": (),
    "engine/chat_api.py": ("numpy", "PIL.Image", "safetensors"),
    "engine/remote.py": MODELS,
    "engine/probe.py": MODELS,
    "rl/plan.py": ("torch",),
    "rl/samples.py": MODELS,
    "rl/rollout.py": MODELS,
    "eval/paired.py": ("numpy", "sklearn.metrics"),
    "eval/votes.py": ("numpy",),
    "eval/probabilities.py": ("numpy", "sklearn.calibration", "sklearn.metrics"),
    "eval/faithfulness.py": ("numpy",),
}
PROSE = re.compile(r"\w \w")
# Says when a copy is waited for, never what is copied.
TIMING = re.compile(r",\s*non_blocking=\w+")
Key = tuple[str, str, str, str]  # a mutant without its source, as the list of equivalents names it


class Mutant(NamedTuple):
    file: str
    where: str  # the function or class that it is in; "" at module level
    old: str  # lines without indentation
    new: str
    source: str

    @property
    def key(self) -> Key:
        return self.file, self.where, self.old, self.new


class Mutator(libcst.CSTVisitor):
    """Gather (where, node, mutated node) of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.scope: list[str] = []
        self.found: list[tuple[str, libcst.CSTNode, libcst.CSTNode]] = []

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, libcst.Annotation):
            return False
        if isinstance(node, libcst.SimpleString) and PROSE.search(node.value):
            return False
        if isinstance(node, (libcst.FunctionDef, libcst.ClassDef)):
            self.scope.append(node.name.value)
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                self.found += [(".".join(self.scope), node, mutated) for mutated in operator(node)]
        return True

    def on_leave(self, node: libcst.CSTNode) -> None:
        if isinstance(node, (libcst.FunctionDef, libcst.ClassDef)):
            self.scope.pop()


def mutants_of(file: str) -> Iterator[Mutant]:
    source = (ROOT / file).read_text(encoding="utf-8")
    module, seen = libcst.parse_module(source), {source}
    # only one is made anew for a mutant
    pieces = [module.code_for_node(statement) for statement in module.body]
    head, _, tail = source.partition("".join(pieces))
    for position, statement in enumerate(module.body):
        mutator = Mutator()
        statement.visit(mutator)
        for where, node, mutated in mutator.found:
            changed = mutated if node is statement else statement.deep_replace(node, mutated)
            code = (
                head
                + "".join(
                    [*pieces[:position], module.code_for_node(changed), *pieces[position + 1 :]]
                )
                + tail
            )
            if code in seen or TIMING.sub("", code) == TIMING.sub("", source):
                continue
            seen.add(code)
            diff = list(
                difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm="")
            )[2:]
            old, new = (
                "\n".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+"
            )
            yield Mutant(file, where, old, new, code)


class Mutants:
    """Fork for each mutant where pytest would collect the tests, as a plugin of pytest. The child
    goes on with the mutant.

    So pytest starts once for a file. `outcomes` holds killed, survived or timeout of each mutant,
    in order. That of the unchanged file stands first, and its time sets the limit of the others.
    """

    def __init__(self, file: str, jobs: int, listed: Collection[Key], sample: int | None) -> None:
        unchanged = Mutant(file, "", "", "", (ROOT / file).read_text(encoding="utf-8"))
        mutants = list(mutants_of(file))
        if sample:  # evenly spaced, the same each time
            count = min(sample, len(mutants))
            mutants = [mutants[i * len(mutants) // count] for i in range(count)]
        self.file, self.jobs, self.listed, self.mutants = file, jobs, listed, [unchanged, *mutants]
        self.outcomes: list[str] = [""] * len(self.mutants)
        self.limit = 600.0  # seconds
        self.running: dict[int, tuple[int, float]] = {}  # process -> index of the mutant, start

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool | None:
        gc.collect()
        gc.freeze()  # or each child's collector walks through all of torch: 0.8 s more for a mutant
        for index, mutant in enumerate(
            tqdm(self.mutants, desc=self.file, unit=" mutants", mininterval=10)
        ):
            child = os.fork()
            if child == 0:
                self.install(mutant)
                return None  # pytest collects and runs the tests, and `run` ends the process
            self.running[child] = index, time.monotonic()
            while len(self.running) >= (self.jobs if index else 1):
                self.wait_for_one()
            if index == 0 and self.outcomes[0] != "survived":
                pytest.exit(
                    f"the tests of {self.file} fail without any mutation: pytest"
                    f" {' '.join(TESTS[self.file])}"
                )
        while self.running:
            self.wait_for_one()
        return True  # collected, and nothing left to run in this process

    @staticmethod
    def install(mutant: Mutant) -> None:
        """Put the mutated source in the place of the module."""
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        package, name = mutant.file.removesuffix(".py").split("/")
        module = sys.modules[f"{package}.{name}"] = types.ModuleType(f"{package}.{name}")
        module.__file__ = str(ROOT / mutant.file)
        setattr(importlib.import_module(package), name, module)
        try:
            exec(compile(mutant.source, mutant.file, "exec"), module.__dict__)
        except Exception:
            os._exit(pytest.ExitCode.TESTS_FAILED)  # cannot even be imported

    def wait_for_one(self) -> None:
        while True:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                index, start = self.running.pop(child)
                code = os.waitstatus_to_exitcode(status)
                # below: passed, failed, interrupted by an error while the tests were collected,
                # ended by a signal
                if code > 2:
                    pytest.exit(
                        f"the tests ended with exit code {code} on {described(self.mutants[index])}"
                    )
                self.outcomes[index] = "killed" if code else "survived"
                if index == 0:
                    self.limit = 60 + 10 * (time.monotonic() - start)
                elif not code and self.mutants[index].key not in self.listed:
                    tqdm.write(f"SURVIVED {described(self.mutants[index])}")
                return
            for child, (index, start) in self.running.items():
                if time.monotonic() > start + self.limit:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    self.outcomes[index] = "timeout"
                    del self.running[child]
                    return
            time.sleep(0.01)


def described(mutant: Mutant) -> str:
    lines = [f"- {line}" for line in mutant.old.splitlines()] + [
        f"+ {line}" for line in mutant.new.splitlines()
    ]
    return "\n".join(
        [f"{mutant.file} {mutant.where or '(module)'}", *(f"    {line}" for line in lines)]
    )


def run(file: str, jobs: int, equivalents: dict[Key, str], sample: int | None) -> tuple[str, bool]:
    """Test the mutants of one file -> (row of the table, whether every mutant is accounted for).

    Prints what is not.
    """
    for name in PRELOADED[file]:
        importlib.import_module(name)
    listed = [key for key in equivalents if key[0] == file]
    start, parent, plugin = time.monotonic(), os.getpid(), Mutants(file, jobs, listed, sample)
    # hypothesis' profile ci: the same examples each time and no deadline, which a busy machine
    # would miss
    options = [
        "-x",
        "-q",
        "-s",
        "--disable-warnings",
        "-p",
        "no:cacheprovider",
        "--hypothesis-profile=ci",
        f"--rootdir={ROOT}",
    ]
    code = pytest.main(
        [*(f"{ROOT}/tests/{name}" for name in TESTS[file]), *options], plugins=[plugin]
    )
    if os.getpid() != parent:
        os._exit(code)
    if not all(plugin.outcomes):
        raise SystemExit(1)  # pytest has said why
    mutants, outcomes = plugin.mutants[1:], plugin.outcomes[1:]
    survived = {
        mutant.key
        for mutant, outcome in zip(mutants, outcomes, strict=True)
        if outcome == "survived"
    }
    if sample:
        listed = [key for key in listed if key in {mutant.key for mutant in mutants}]
    for key in listed:
        if key not in survived:
            state = (
                "killed" if key in {mutant.key for mutant in mutants} else "there is no such mutant"
            )
            print(f"LISTED as equivalent, but {state}:", described(Mutant(*key, "")))
    equivalent = sum(
        outcome == "survived" and mutant.key in listed
        for mutant, outcome in zip(mutants, outcomes, strict=True)
    )
    counts = (
        outcomes.count("killed"),
        outcomes.count("timeout"),
        equivalent,
        outcomes.count("survived") - equivalent,
    )
    row = f"| `{file}` | {len(mutants)} | " + " | ".join(map(str, counts)) + " |"
    print(f"{row} in {(time.monotonic() - start) / 60:.1f} min", flush=True)
    return row, survived == set(listed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help=f"of {', '.join(TESTS)}; all by default"
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="only N mutants of each file, evenly spaced"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.files) - set(TESTS):
        parser.error(
            f"no tests are named here for {', '.join(sorted(unknown))}; known: {', '.join(TESTS)}"
        )
    entries = tomllib.loads(EQUIVALENTS.read_text(encoding="utf-8"))["equivalent"]
    equivalents = {
        (entry["file"], entry["where"], entry["old"].strip(), new.strip()): entry["reason"]
        for entry in entries
        for new in (entry["new"] if isinstance(entry["new"], list) else [entry["new"]])
    }

    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    results = [
        run(file, arguments.jobs, equivalents, arguments.sample)
        for file in arguments.files or TESTS
    ]
    print(f"\nmutmut {importlib.metadata.version('mutmut')}'s operators\n")
    print(
        "| file | mutants | killed | timeouts | equivalent | survivors |\n|---|---|---|---|---|---|"
    )
    print("\n".join(row for row, _ in results))
    return 0 if all(complete for _, complete in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
