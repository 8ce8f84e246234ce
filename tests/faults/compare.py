"""Compare the folders of two runs: every file, every link, and what TensorBoard shows.

    problems = differences(straight, killed)         # {} where they are equal to the last bit
    problems = {"state": [...], "logs": [...], "links": [...], "TensorBoard": [...]}

Left out by name are wall-clock times (`TIMES`), the places, versions and random name of the run
(`OTHERS`), and what a process leaves of its own (`OWN`). A log of a killed run may have lines set
aside, which a resumed one wrote again.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS, EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from engine.checkpoint import verify_checkpoint

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every restart

# Values that are times, by their key in JSON, wherever it stands.
TIMES = re.compile(r"step_time|time/.*|eval_.*time.*|seconds|.*_seconds|train/(step_time|time/.*)")
# The places of a run, in the settings of config.json, its versions, and its random name.
OTHERS = ("output_dir", "resume_from_checkpoint", "versions", "run_id")
# Files that belong to one process, or whose bytes hold times: events are compared as shown.
OWN = (".lock", "events.out.tfevents.")
ASIDE = re.compile(r"(\w+)\.after-\d+\.jsonl")
KINDS = ("state", "logs", "links", "TensorBoard")
LOGS = (
    "metrics.jsonl", "completions.jsonl", "evaluations.jsonl", "warnings.jsonl", "README.md",
    "summary.json", "predictions-", "scores-", "samples-", "report", "start/", "start-vote/",
)  # fmt: skip


def differences(straight: Path, other: Path) -> dict[str, list[str]]:
    """Say how a run folder differs from the straight one, by kind of file, one line each.

    Kinds are "state" (checkpoints, final adapter, records), "logs" (logs, predictions, scores, run
    card), "links" (`best`, `last`) and "TensorBoard" (scalars, texts, images, charts).
    """
    found: dict[str, list[str]] = {}
    names = [set(_names(folder)) for folder in (straight, other)]
    for name in sorted(names[0] | names[1]):
        problem = _problem(name, straight, other)
        if problem:
            found.setdefault(_kind(name, straight, other), []).append(f"{name}: {problem}")
    run_ids = {json.loads(path.read_bytes()).get("run_id") for path in other.rglob("config.json")}
    if len(run_ids) > 1:
        found.setdefault("state", []).append(f"checkpoints of {len(run_ids)} runs: {run_ids}")
    shown = [tensorboard_of(folder) for folder in (straight, other)]
    for tag in sorted(shown[0].keys() | shown[1].keys()):
        one, two = (of.get(tag, []) for of in shown)
        if one != two:
            found.setdefault("TensorBoard", []).append(f"{tag}: {_first(one, two)}")
    return found


def _names(folder: Path) -> Iterator[str]:
    """List every file and link below a folder, and empty folders, without those of OWN."""
    for at, folders, files in os.walk(folder):
        place = Path(at).relative_to(folder)
        links = [name for name in folders if (Path(at) / name).is_symlink()]
        empty = [] if folders or files else [""]
        for name in [*files, *links, *empty]:
            if not name.startswith(OWN):
                yield str(place / name)


def _kind(name: str, straight: Path, other: Path) -> str:
    if (straight / name).is_symlink() or (other / name).is_symlink():
        return "links"
    if ASIDE.fullmatch(name) or name.startswith(LOGS):
        return "logs"
    return "state"


def _problem(name: str, straight: Path, other: Path) -> str | None:
    """Say how one file differs, None for not at all."""
    one, two = straight / name, other / name
    if not os.path.lexists(two):
        return "is missing"
    aside = ASIDE.fullmatch(name)
    if aside and not one.exists():
        return _lost_lines(two, other / f"{aside[1]}.jsonl")
    if not os.path.lexists(one):
        return "should not be there"
    if one.is_symlink() or two.is_symlink():
        targets = [os.readlink(path) if path.is_symlink() else None for path in (one, two)]
        return None if targets[0] == targets[1] else f"points to {targets[1]}, not {targets[0]}"
    if one.is_dir() or two.is_dir():
        return None if one.is_dir() and two.is_dir() else "is a folder in one of them"
    if name.endswith("manifest.json"):
        return _manifest_problem(one.parent, two.parent)
    if name.endswith(".safetensors"):
        return _tensor_problem(one, two)
    values = [_content(path, folder) for path, folder in ((one, straight), (two, other))]
    return None if values[0] == values[1] else _first(*values)


def _content(path: Path, folder: Path) -> Any:
    """Read a file as what is to be equal: JSON without times and places, else its bytes."""
    content = path.read_bytes().replace(str(folder).encode(), b"RUN")
    try:
        if path.suffix == ".jsonl":
            return [masked(json.loads(line)) for line in content.splitlines()]
        if path.suffix == ".json":
            return masked(json.loads(content))
    except ValueError:
        return content
    return content


def masked(value: Any) -> Any:
    """Take times, versions and the places of a run out of a JSON value."""
    if isinstance(value, dict):
        return {
            key: masked(item)
            for key, item in value.items()
            if not TIMES.fullmatch(key) and key not in OTHERS
        }
    return [masked(item) for item in value] if isinstance(value, list) else value


def _lost_lines(aside: Path, log: Path) -> str | None:
    """Say which whole line that was set aside is not in the log any more."""
    kept = [masked(json.loads(line)) for line in log.read_bytes().splitlines()]
    for line in aside.read_bytes().splitlines():
        try:
            row = masked(json.loads(line))
        except ValueError:
            continue  # torn by the kill
        if row not in kept:
            return f"a line that was set aside was not written again: {str(row)[:200]}"
    return None


def _manifest_problem(one: Path, two: Path) -> str | None:
    """Compare manifests without the hashes of files that hold times, and verify the second."""
    records = [masked(json.loads((at / "manifest.json").read_bytes())) for at in (one, two)]
    for record in records:
        record.get("notes", {}).pop("logs", None)  # their sizes, which hold times
        record["files"] = {
            name: entry if name.endswith(".safetensors") else None
            for name, entry in record["files"].items()
        }
    return "; ".join(verify_checkpoint(two)) or (
        None if records[0] == records[1] else _first(*records)
    )


def _tensor_problem(one: Path, two: Path) -> str | None:
    if one.read_bytes() == two.read_bytes():
        return None
    first, second = load_file(one), load_file(two)
    if first.keys() != second.keys():
        return f"has other tensors: {sorted(first.keys() ^ second.keys())[:3]}"
    wrong = [name for name in first if not torch.equal(first[name], second[name])]
    return f"{len(wrong)} of {len(first)} tensors differ: {wrong[0]}" if wrong else "other metadata"


def _first(one: Any, two: Any) -> str:
    """Name the first place where two values differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in [*one, *(key for key in two if key not in one)]:
            if one.get(key, _first) != two.get(key, _first):
                if key not in one or key not in two:
                    return f"{key} is {'missing' if key in one else 'new'}"
                return f"{key}: {_first(one[key], two[key])}"
        return "the order of keys"
    if isinstance(one, list) and isinstance(two, list):
        for number, (first, second) in enumerate(zip(one, two, strict=False)):
            if first != second:
                return f"[{number}] {_first(first, second)}"
        return (
            f"{len(two)} entries, not {len(one)}: {str((one + two)[min(len(one), len(two))])[:150]}"
        )
    return f"{str(two)[:150]}, not {str(one)[:150]}"


# ---- TensorBoard ---------------------------------------------------------------------------------
def tensorboard_of(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """Read what TensorBoard shows of a run folder -> {"run: tag": [(step, value)]}.

    A folder of event files is a run of TensorBoard's, of which a chart's lines are some. Both of
    its readers are asked: the one in Python, which drops what a marked restart repeats, and the
    rules of its data server, which drops points that a smaller or equal step follows
    (`as_data_server`). Times are left out.
    """
    folders = {path.parent for path in run.rglob("events.out.tfevents.*") if not _within(path, run)}
    shown: dict[str, list[tuple[int, Any]]] = {}
    for folder in sorted(folders):
        name = folder.relative_to(run).as_posix()
        accumulator = EventAccumulator(str(folder), size_guidance={TENSORS: 0}).Reload()
        for tag in accumulator.Tags()[TENSORS]:
            if not TIMES.fullmatch(tag):
                shown[f"{name}: {tag}"] = [
                    (event.step, make_ndarray(event.tensor_proto).tolist())
                    for event in accumulator.Tensors(tag)
                ]
        for tag, points in as_data_server(folder).items():
            if not TIMES.fullmatch(tag):
                shown[f"{name} (data server): {tag}"] = points
    return shown


def _within(path: Path, run: Path) -> bool:
    """Tell whether event files lie in a part of the folder that TensorBoard is not shown."""
    return path.relative_to(run).parts[0].startswith("checkpoint-")


def as_data_server(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Read event files by the rules of TensorBoard's data server -> {tag: [(step, value)]}.

    Files follow in the order of their names. In each tag, a point drops those of its step or later
    that came before it. A damaged record ends its file.
    """
    points: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                series = points.setdefault(value.tag, [])
                while series and series[-1][0] >= event.step:
                    series.pop()
                series.append((event.step, make_ndarray(value.tensor).tolist()))
    return points
