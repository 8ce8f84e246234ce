"""Protect the table of faults in README.md here: 45 rows, each with tests that exist.

Run: pytest tests/faults/test_table.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE / "README.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.split("## Forty-five faults")[1].splitlines()
    if re.match(r"\| \d", line)
]


def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_there_are_45_rows_in_order_with_a_fault_a_behaviour_and_a_test():
    assert [int(row[0]) for row in ROWS] == list(range(1, 46))
    assert all(len(row) == 4 and all(row) for row in ROWS)
    assert all("::test_" in row[3] for row in ROWS)


def test_every_test_that_is_named_exists():
    missing = [
        f"row {number}: {name}"
        for number, _, _, shown in ROWS
        for name in re.findall(r"`([^`]+)`", shown)
        if not (HERE.parent / name.partition("::")[0]).is_file()
        or "::" in name
        and name.partition("::")[2] not in functions_of(HERE.parent / name.partition("::")[0])
    ]
    assert missing == []


def test_the_map_is_the_files_of_this_folder():
    table = PAGE.split("| file | what it does |")[1].split("\n\n")[0]
    named = set(re.findall(r"^\| `(\w+\.py)`", table, re.MULTILINE))
    assert named == {path.name for path in HERE.glob("*.py")} - {"__init__.py"}
