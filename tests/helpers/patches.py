"""Apply the diffs of tests/forks, most of them of rl/objective.py, and describe each one."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any, NamedTuple

from tests.helpers.repository import ROOT

FOLDER = ROOT / "tests" / "forks"
OBJECTIVE = (ROOT / "rl" / "objective.py").read_text(encoding="utf-8")
HEADER = "--- a/rl/objective.py\n+++ b/rl/objective.py\n"


class Fork(NamedTuple):
    """Describe a fork.

    field: the setting that the patch adds
    on: a value that switches the variant on
    metric: what it logs, if anything
    """

    field: str
    on: Any
    metric: str | None


FORKS = {
    "gspo": Fork("importance_sampling_level", "sequence", "token_ratio"),
    "cispo": Fork("policy_term", "cispo", "cispo_weight"),
    "dual_clip": Fork("dual_clip", 3.0, "dual_clipped"),
    "mis": Fork("mis_cap", 2.0, "mis_weight"),
    "kl_in_reward": Fork("kl_in_reward", True, None),
    "rloo": Fork("baseline", "leave_one_out", None),
    "entropy_bonus": Fork("entropy_bonus", 0.01, "entropy_bonus"),
    "drpo": Fork("domain_scaling", "drpo", None),
}


# Patches of other files: rewards, as {name: the files}.
REWARD_FORKS = {"image_fbeta": ("rl/reward_choice.py", "rl/rewards.py")}


def patch_of(name: str) -> str:
    return (FOLDER / f"{name}.patch").read_text(encoding="utf-8")


def size(patch: str) -> tuple[int, int]:
    """Count the lines that a patch adds and takes away."""
    body = patch.partition(HEADER)[2]
    return len(re.findall(r"^\+", body, re.MULTILINE)), len(re.findall(r"^-", body, re.MULTILINE))


def patched(name: str, source: str = OBJECTIVE) -> str:
    """Return the text of rl/objective.py with a patch applied. Raises AssertionError where it does
    not fit to the letter.
    """
    patch = re.sub(r"\Adiff --git .*\nindex .*\n", "", patch_of(name))
    assert patch.startswith(HEADER) and patch.count("\n--- ") == 0, (
        f"{name}.patch must touch rl/objective.py and nothing else"
    )
    return _applied(name, "rl/objective.py", patch.removeprefix(HEADER), source)


def patched_files(name: str) -> dict[str, str]:
    """Return the files that a patch of several changes, with it applied -> {path: text}."""
    parts = re.split(r"^--- a/(\S+)\n\+\+\+ b/\S+\n", patch_of(name), flags=re.MULTILINE)
    return {
        path: _applied(name, path, hunks, (ROOT / path).read_text(encoding="utf-8"))
        for path, hunks in zip(parts[1::2], parts[2::2], strict=True)
    }


def _applied(name: str, path: str, patch: str, source: str) -> str:
    """Apply the hunks of one file.

    This is done here and not by git or patch, which a machine that runs the tests need not have. It
    is stricter than both: a hunk's lines, context included, must stand exactly once, so there is no
    guessing where they belong.
    """
    hunks = re.split(r"^@@ -\d+,(\d+) \+\d+,(\d+) @@.*\n", patch, flags=re.MULTILINE)
    assert hunks.pop(0) == "" and hunks
    for old_length, new_length, hunk in zip(hunks[0::3], hunks[1::3], hunks[2::3], strict=True):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert (old.count("\n"), new.count("\n")) == (
            int(old_length),
            int(new_length),
        ), f"{name}.patch: wrong counts after @@"
        assert source.count(old) == 1, (
            f"tests/forks/{name}.patch no longer fits: {path} has moved under it. Put its lines in"
            f" by hand where they belong now, `git diff {path} > tests/forks/{name}.patch`, and"
            f" restore the file. The hunk:\n{hunk}"
        )
        source = source.replace(old, new)
    return source


def module_of(source: str, monkeypatch) -> ModuleType:
    """Run a source text as a module, registered while the test runs: a dataclass looks itself up
    there.
    """
    module = ModuleType("objective_copy")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "objective_copy.py", "exec"), module.__dict__)
    return module
