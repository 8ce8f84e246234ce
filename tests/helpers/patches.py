"""Apply the diffs of tests/forks to rl/objective.py, and describe each one."""

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
    "tis": Fork("tis_cap", 2.0, "tis_weight"),
    "kl_in_reward": Fork("kl_in_reward", True, None),
    "rloo": Fork("baseline", "leave_one_out", None),
    "entropy_bonus": Fork("entropy_bonus", 0.01, "entropy_bonus"),
    "drpo": Fork("domain_scaling", "drpo", None),
}


def patch_of(name: str) -> str:
    return (FOLDER / f"{name}.patch").read_text(encoding="utf-8")


def size(patch: str) -> tuple[int, int]:
    """Count the lines that a patch adds and takes away."""
    body = patch.partition(HEADER)[2]
    return len(re.findall(r"^\+", body, re.MULTILINE)), len(re.findall(r"^-", body, re.MULTILINE))


def patched(name: str, source: str = OBJECTIVE) -> str:
    """Return `source` with a patch applied. Raises AssertionError where it does not fit to the
    letter.

    This is done here and not by git or patch, which a machine that runs the tests need not have. It
    is stricter than both: a hunk's lines, context included, must stand exactly once, so there is no
    guessing where they belong.
    """
    patch = re.sub(r"\Adiff --git .*\nindex .*\n", "", patch_of(name))
    assert patch.startswith(HEADER) and patch.count("\n--- ") == 0, (
        f"{name}.patch must touch rl/objective.py and nothing else"
    )
    hunks = re.split(
        r"^@@ -\d+,(\d+) \+\d+,(\d+) @@.*\n", patch.removeprefix(HEADER), flags=re.MULTILINE
    )
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
            f"tests/forks/{name}.patch no longer fits: rl/objective.py has moved under it. Put its"
            " lines in by hand where they belong now, `git diff rl/objective.py >"
            f" tests/forks/{name}.patch`, and restore the file. The hunk:\n{hunk}"
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
