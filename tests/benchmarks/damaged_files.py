"""Damage the files that people bring, thousands of times, and see that no entry point breaks down.

    python tests/benchmarks/damaged_files.py [--files 2000] [--seed 0] [--kinds adapter_config.json]

Each file of a small checkpoint, of an adapter, of a run, and of data is changed at random: bytes
cut, flipped, doubled or replaced, JSON values replaced by others of every type, keys lost, renamed
or nested deep. Then the entry point that reads it is called in this process, as the commands do. It
has to work, or to raise one of the errors that become lines and exit code 2. Anything else, and
what takes over half a minute, is a breakdown. A table of kind x result is printed, with a line for
each breakdown. The exit code is 1 where there is one. About ten minutes for 2,000 files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  this checkout before an installed one
import torch

from data.answers import parse_answer
from data.check import main as check_data
from data.examples import read_jsonl
from data.files import DataError
from data.label_sets import labels_named
from data.predictions import read_predictions
from engine.config import UsageError
from engine.model import attach_adapter, check_adapter, load_encoder, load_model
from engine.resume import saved_record
from engine.runtime import main_guard
from tests.helpers.runs import write_data
from tests.helpers.tiny import SAVE, attach_random_adapter, load

SECONDS, GIGABYTES = 30, 8  # of one case; of this process beyond what it has at the start
FAMILIES = ("qwen2_5_vl", "gemma3")
VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 2**40, 10**400, 1e308, 0.5, float("nan"), "", "x", "\ud800",
    "../x", "\x00", [], {}, [[]], ["x"], [1, 2], {"x": 1}, {"x": {}}, "float32", "all-linear",
]  # fmt: skip
OTHER_FILES = (b"", b"\x00" * 64, b"<!DOCTYPE html><html>401</html>", b"{}", b"[]", b"null", b"1")


class TooLong(BaseException):
    """Report a case that did not end in time. No `except Exception` stops it."""


# ---- damage --------------------------------------------------------------------------------------
def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cut, flip, double or replace a part of a file, or all of it."""
    size = len(content)
    a, b = sorted(rng.randrange(size + 1) for _ in range(2))
    noise = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    return rng.choice(
        [
            lambda: content[:a],
            lambda: content[:a] + content[b:],
            lambda: content[:a] + noise + content[a:],
            lambda: content[:a] + noise + content[a + len(noise) :],
            lambda: content[:b] + content[a:],
            lambda: rng.choice(OTHER_FILES),
            lambda: content.decode(errors="replace").encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + content,
            lambda: (b"[" * 100_000) + content,
        ]
    )()


def damaged_json(rng: random.Random, content: bytes) -> bytes:
    """Change one to three places of a JSON document, wherever they are."""
    try:
        document = json.loads(content)
    except ValueError:
        return damaged_bytes(rng, content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = _place(rng, document)
        if holder is None:
            return json.dumps(rng.choice(VALUES)).encode()
        change = rng.randrange(5)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        elif change == 2:
            holder[key] = [holder[key]]
        else:
            holder[key] = rng.choice(VALUES)
    return json.dumps(document).encode()


def _place(rng: random.Random, node: Any) -> tuple[Any, Any]:
    """Choose a place in a document -> (its dict or list, its key)."""
    holder, key = None, None
    while isinstance(node, (dict, list)) and node:
        if holder is not None and rng.random() < 0.4:
            break
        holder, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = holder[key]
    return holder, key


def damaged(rng: random.Random, path: Path, lines: bool) -> bytes:
    """Damage a file: as bytes, as JSON, or one line of it as JSON."""
    content = path.read_bytes()
    if rng.random() < 0.4:
        return damaged_bytes(rng, content)
    if lines:
        rows = content.splitlines()
        number = rng.randrange(len(rows))
        rows[number] = damaged_json(rng, rows[number])
        return b"\n".join(rows)
    if path.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = damaged_json(rng, content[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    return damaged_json(rng, content) if path.suffix == ".json" else damaged_bytes(rng, content)


# ---- entry points --------------------------------------------------------------------------------
def open_model(folder: Path) -> None:
    load_model(
        str(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        min_visual_tokens=4,
        max_visual_tokens=16,
    )


def open_encoder(folder: Path) -> None:
    load_encoder(str(folder), min_visual_tokens=4, max_visual_tokens=16)


def open_data(folder: Path) -> None:
    for example in read_jsonl(folder / "data.jsonl"):
        parse_answer(example.answer or "")
    main_guard(lambda: check_data([str(folder / "data.jsonl")]), errors=(DataError,))


class Originals:
    """Make a whole checkpoint, adapter, run and data set, which cases copy and damage."""

    def __init__(self, folder: Path):
        self.folders = {family: SAVE[family](folder / family) for family in FAMILIES}
        for family, base in list(self.folders.items()):
            net = attach_random_adapter(load(base))
            adapter = folder / f"adapter-{family}"
            net.save_pretrained(adapter, save_embedding_layers=False)
            record = json.loads((adapter / "adapter_config.json").read_text())
            record["base_model_name_or_path"] = str(base)
            (adapter / "adapter_config.json").write_text(json.dumps(record))
            settings = {"prompt": {"value": "demo"}, "answer_format": {"value": "solution"}}
            noted = {"script": "sft", "recipe": None, "settings": settings, "data": {}}
            (adapter / "config.json").write_text(json.dumps(noted))
            self.folders[f"adapter-{family}"] = adapter
        data = folder / "data"
        write_data(data)
        rows = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
        answers = [
            row
            | {"evaluated_labels": None, "source_labels": [], "prompt": "demo", "predicted": []}
            | {"completion": row["answer"], "completion_length": 3, "valid": True, "parsed": True}
            | {"problem": None}
            for row in rows
        ]
        (data / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
        (data / "labels.txt").write_text("Edema = oedema\nFracture\nNormal (exclusive)\n")
        self.folders["data"] = data

    def open_adapter(self, folder: Path, family: str) -> None:
        base = str(self.folders[family])
        check_adapter(base, folder)
        attach_adapter(load(Path(base)), folder, trainable=True)


Kind = tuple[str, str, Callable[[Path], object], bool]  # original, file, entry point, of lines


def kinds_of(originals: Originals) -> dict[str, Kind]:
    """List what is damaged, by name."""
    kinds: dict[str, Kind] = {}
    readers = {
        "config.json": open_model,
        "generation_config.json": open_model,
        "model.safetensors": open_model,
        "tokenizer.json": open_encoder,
        "tokenizer_config.json": open_encoder,
        "chat_template.jinja": open_encoder,
        "preprocessor_config.json": open_encoder,
    }
    for family in FAMILIES:
        for file, reader in readers.items():
            kinds[f"{family} {file}"] = (family, file, reader, False)
        for file in ("adapter_config.json", "adapter_model.safetensors"):

            def reader(folder: Path, family: str = family) -> None:
                originals.open_adapter(folder, family)

            kinds[f"{family} {file}"] = (f"adapter-{family}", file, reader, False)
    kinds["run's config.json"] = (f"adapter-{FAMILIES[0]}", "config.json", saved_record, False)
    kinds["data row"] = ("data", "data.jsonl", open_data, True)
    kinds["row of answers"] = (
        "data",
        "answers.jsonl",
        lambda folder: read_predictions(folder / "answers.jsonl"),
        True,
    )
    kinds["label file"] = (
        "data",
        "labels.txt",
        lambda folder: labels_named(str(folder / "labels.txt")),
        False,
    )
    return kinds


# ---- one case ------------------------------------------------------------------------------------
@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooLong(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def result_of(reader: Callable[[Path], object], folder: Path) -> tuple[str, str]:
    """Call an entry point -> (works | one line | breaks down, the message or the last frames)."""
    silence = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
            limited(SECONDS),
        ):
            reader(folder)
    except (UsageError, DataError) as error:
        long = [line for line in error.problems if "\n" in line]
        return ("breaks down", f"a line with line ends: {long[0]!r}") if long else ("one line", "")
    except (Exception, TooLong) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "site-packages" not in f.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[::-1][:3])
        return "breaks down", f"{type(error).__name__}: {str(error)[:150]!r} at {where}"
    return "works", ""


def run_cases(files: int, seed: int, only: str = "") -> tuple[dict[str, Counter], list[str]]:
    """Damage `files` files -> (results by kind, a line for every breakdown)."""
    results: dict[str, Counter] = {}
    breakdowns: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        originals = Originals(Path(name) / "originals")
        kinds = {kind: of for kind, of in kinds_of(originals).items() if only in kind}
        for number in range(files):
            kind = list(kinds)[number % len(kinds)]
            original, file, reader, lines = kinds[kind]
            rng = random.Random(f"{seed} {number}")
            folder = Path(name) / "case"
            shutil.copytree(originals.folders[original], folder)
            (folder / file).write_bytes(damaged(rng, folder / file, lines))
            result, said = result_of(reader, folder)
            results.setdefault(kind, Counter())[result] += 1
            if result == "breaks down":
                breakdowns.append(f"{kind}, seed {seed}, number {number}: {said}")
            shutil.rmtree(folder)
    return results, breakdowns


def table(results: dict[str, Counter]) -> str:
    """Write results as a Markdown table, one kind a row."""
    names = ("works", "one line", "breaks down")
    total = sum(results.values(), Counter())
    rows = [*results.items(), ("all", total)]
    lines = [f"| damaged | {' | '.join(names)} |", "|---|---|---|---|"]
    lines += [f"| {kind} | {' | '.join(str(of[name]) for name in names)} |" for kind, of in rows]
    return "\n".join(lines)


def quiet() -> None:
    """Silence what libraries print of damaged files, and bound this process's memory."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + GIGABYTES * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    """Run the command and return 1 where something breaks down, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="only those with this in their name")
    options = parser.parse_args()
    quiet()
    results, breakdowns = run_cases(options.files, options.seed, options.kinds)
    print(table(results))
    print("\n".join(breakdowns) or "nothing breaks down")
    return 1 if breakdowns else 0


if __name__ == "__main__":
    sys.exit(main())
