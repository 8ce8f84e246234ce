"""Keep the answers of an evaluation as they come, and go on where one was cut short.

The file of partial answers is a help and not a result: where it cannot be written, the evaluation
goes on without it. Of several ranks each keeps its own answers in a file of its own. Whatever their
number is when the evaluation goes on, all these files are read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from data.files import sha256_of, write_json
from data.plain_files import is_plain, open_plain, plain_lines
from data.predictions import Prediction, parse_row, write_predictions
from engine.config import Resolved, UsageError, from_json
from engine.launch import ONE_PROCESS, OneProcess
from engine.resume import run_record
from engine.runtime import StepFailed, disk_line
from eval.folders import read_record, result_files
from eval.settings import OF_ENGINE, OF_SERVER, EvalConfig

Kind = Literal["predictions", "swapped"]  # of answers: to the own images, to swapped ones


def _partial_files(
    output_dir: str | Path, name: str, kind: Kind, rank: int = 0
) -> tuple[Path, Path]:
    """Return (file of a rank's answers so far, file of their evaluation's record)."""
    stem = Path(output_dir) / f"{kind}-{name}.partial"
    return Path(f"{stem}{f'-{rank}' if rank else ''}.jsonl"), Path(f"{stem}.json")


def _left(output_dir: str | Path, name: str, kind: Kind) -> list[Path]:
    """List the files of partial answers that there are, of all ranks, in their order."""
    first, _ = _partial_files(output_dir, name, kind)
    numbers = {
        path: re.fullmatch(r"-([1-9][0-9]*)\.jsonl", path.name.removeprefix(first.stem))
        for path in Path(output_dir).glob(f"{first.stem}-*.jsonl")
    }
    others = sorted((int(number[1]), path) for path, number in numbers.items() if number)
    return [first] * os.path.lexists(first) + [path for _, path in others]


def read_partial(
    output_dir: str | Path, name: str, record: Mapping[str, Any], kind: Kind = "predictions"
) -> list[Prediction]:
    """Read the answers that an interrupted evaluation left, so that the same one goes on.

    They are those of all its ranks, each answer once. record: `evaluation_record` of the evaluation
    that asks. kind: of the answers. Raises UsageError where they are of another evaluation.
    """
    _, about = _partial_files(output_dir, name, kind)
    files = _left(output_dir, name, kind)
    if not files:
        return []
    if not is_plain(about):
        raise UsageError(
            f"{files[0]} was left there by another command; score it with --predictions, remove it,"
            " or give another --output_dir"
        )
    another = difference(read_record(about), record)
    if another:
        raise UsageError(
            f"{files[0]} was begun with another {another}; finish that evaluation, remove the file,"
            " or give another --output_dir"
        )
    found: dict[tuple[str, Any], Prediction] = {}  # twice where files were being put together
    for file in files:
        for line in plain_lines(file):
            row, problems = parse_row(line)
            if problems:  # torn by the end of the process
                break
            answer = Prediction.from_row(row)
            found.setdefault((answer.id, answer.extra.get("sample")), answer)
    return list(found.values())


@contextlib.contextmanager
def kept(
    output_dir: str | Path,
    name: str,
    done: Sequence[Prediction],
    record: Mapping[str, Any] | None,
    kind: Kind,
    ranks: OneProcess = ONE_PROCESS,
) -> Iterator[Callable[[Prediction], None]]:
    """Give a function that appends a prediction to this rank's file of partial answers at once.

    done: answers of an earlier call, which rank 0's file holds first. record: of the evaluation,
    None where it does not go on from there. ranks: all of them enter the block. The files go when
    the block ends well. Else they stay, and rank 0 names them. Where one cannot be written, a
    warning says so and nothing more is kept.
    """
    rank = ranks.rank
    answers, about = _partial_files(output_dir, name, kind, rank)
    file = _PartialFile(answers)

    def begin() -> None:
        with file.failing():
            answers.parent.mkdir(parents=True, exist_ok=True)
            if rank == 0 and record is not None:
                write_json(about, record)
            write_predictions(answers, done if rank == 0 else [])  # without a torn line
            if rank == 0:  # what these hold is in `done`
                _remove(*(path for path in _left(output_dir, name, kind) if path != answers))
            file.opened = open_plain(answers, "ab")

    try:
        if rank == 0:
            begin()
        # no other rank begins before its file of an earlier call is in rank 0's
        if ranks.from_first(file.opened is not None) and rank > 0:
            begin()
        yield file.keep
    except BaseException:
        file.close()
        if rank == 0:
            _name_what_is_left(output_dir, name, kind, record)
        elif not _size(answers):
            _remove(answers)
        raise
    file.close()
    _remove(answers)
    if rank == 0:
        _remove(*_left(output_dir, name, kind), about)


def _name_what_is_left(
    output_dir: str | Path, name: str, kind: Kind, record: Mapping[str, Any] | None
) -> None:
    """Say where the answers so far are, or remove the files where these hold none."""
    left = _left(output_dir, name, kind)
    files = [path for path in left if _size(path)]
    if not files:
        _remove(*left, _partial_files(output_dir, name, kind)[1])
        return
    how = (
        "the same command goes on from there"
        if record is not None
        else f"to score them: {_score_command(name, files)}"
    )
    print(f"the answers so far are kept in {_listed(files)}: {how}", file=sys.stderr)


class _PartialFile:
    """Hold the file of partial answers, as long as it can be written."""

    def __init__(self, path: Path):
        self.path = path
        self.opened: IO[bytes] | None = None

    def keep(self, prediction: Prediction) -> None:
        """Append a prediction, where the file is still written."""
        if self.opened is None:
            return
        row = json.dumps(prediction.to_row(), ensure_ascii=False) + "\n"
        with self.failing():
            self.opened.write(row.encode(errors="backslashreplace"))
            self.opened.flush()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Turn an error of the disk within the block into a warning, and give the file up."""
        try:
            yield
        except OSError as error:
            self.close()
            print(
                f"warning: the answers so far cannot be kept ({self.path}:"
                f" {error.strerror or error}); the evaluation goes on, but answers from now on are"
                " lost if it is interrupted",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Close the file, whatever is left to be written."""
        opened, self.opened = self.opened, None
        if opened is not None:
            with contextlib.suppress(OSError):
                opened.close()


def not_written(
    output_dir: str | Path, name: str, answers: Sequence[Prediction], error: OSError
) -> StepFailed:
    """Say that a data set's results cannot be written, and where its answers are kept.

    Those are the files of partial answers, or a new folder for temporary files where they lack
    some.
    """
    files = _left(output_dir, name, "predictions")
    if sum(map(_rows, files)) < len(answers):
        try:
            folder = Path(tempfile.mkdtemp(prefix="answers-"))
            files = [write_predictions(folder / f"predictions-{name}.jsonl", answers)]
        except OSError:
            files = []
    where = (
        f"they are kept in {_listed(files)}; to score them: {_score_command(name, files)}"
        if files
        else "they can be kept nowhere else either"
    )
    return StepFailed(
        f"{name} is answered, but its results cannot be written ({disk_line(error)}). Its"
        f" {len(answers)} answers: {where}"
    )


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


def _score_command(name: str, files: Sequence[Path]) -> str:
    """Write the command that scores answers, of several ranks once they are in one file."""
    command = ["python", "-m", "eval.evaluate", "--predictions"]
    if len(files) == 1:
        return shlex.join([*command, f"{name}={files[0]}"])
    whole = f"{name}.jsonl"
    together = f"{shlex.join(['cat', *map(str, files)])} > {whole}"
    return f"{together}; {shlex.join([*command, f'{name}={whole}'])}"


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _rows(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n") if is_plain(path) else 0
    except OSError:
        return 0


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


# ---- whether two evaluations are the same --------------------------------------------------------
# Settings that may differ where an evaluation goes on: they change no answer.
_NO_MATTER = (
    "output_dir",
    "data_file",
    "predictions",
    "train_file",
    "num_threads",
    "image_root",
    "vision_cache_dir",
    "per_device_eval_batch_size",
    "thresholds_from",
    "sampling_copies",
    "sampling_product",
    "memory_check",
    *OF_SERVER,
)
# What an earlier version did, where its record does not have the setting.
_AS_BEFORE = {"num_generations": 1, "swap_images": False, "label_file": None, "tf32": False}


def evaluation_record(
    resolved: Resolved,
    name: str,
    file: Path,
    bad_images: list[dict[str, Any]],
    server: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Say how a data set is evaluated, which becomes "run" of its scores.

    server: `ServedModel.record` where a server answers, which decides settings of its own.
    """
    config: EvalConfig = resolved.configs[0]
    adapter = Path(config.adapter_name_or_path or "") / "adapter_model.safetensors"
    record = run_record(resolved, "eval", {name: file}, {name: bad_images}) | {
        "adapter_sha256": (
            sha256_of(adapter) if config.adapter_name_or_path and adapter.is_file() else None
        )
    }
    if server is None:
        return record
    for setting in OF_ENGINE:
        del record["settings"][setting]
    return record | {"server": dict(server)}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the first setting or data in which two evaluations differ, "" where in none.

    before, now: `evaluation_record` of what was done and of what is asked for.
    """
    was = before.get("settings") or {}
    swap = now["settings"].get("swap_images", {}).get("value", False)  # by the seed
    greedy = now["settings"]["temperature"]["value"] == 0 and not swap
    for name, entry in now["settings"].items():
        if name in _NO_MATTER or (greedy and name == "seed"):
            continue
        if name not in was:  # an earlier version did not have it, and cannot differ but in these
            if name in _AS_BEFORE and entry["value"] != _AS_BEFORE[name]:
                return f"{name} ({_AS_BEFORE[name]}, now {entry['value']})"
            continue
        # an earlier version recorded no value for what nobody had given
        if was[name].get("value") is None and was[name].get("origin") == entry["origin"]:
            continue
        had, has = from_json(was[name].get("value")), from_json(entry["value"])
        if had != has:
            return f"{name} ({had}, now {has})"
    for name, file in now["data"].items():
        if (before.get("data") or {}).get(name, {}).get("sha256") != file["sha256"]:
            return f"data file of {name}"
    if (before.get("bad_images") or now["bad_images"]) != now["bad_images"]:
        return "list of unreadable images"
    if another := _other_server(before.get("server") or {}, now.get("server") or {}):
        return another
    return (
        "adapter of the same name" if before.get("adapter_sha256") != now["adapter_sha256"] else ""
    )


def _other_server(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name what differs in the server that answers, "" where nothing does.

    Its address may: a server moves from host to host. before, now: {} where the engine answers.
    """
    if bool(before) != bool(now):
        kinds = ["a server's" if one else "the engine's own" for one in (before, now)]
        return "model ({}, now {})".format(*kinds)
    for name in ("version", "request"):  # the model's name is among the settings
        if before.get(name) != now.get(name):
            return f"{name} of the server ({before.get(name)}, now {now.get(name)})"
    return ""


def finished_sets(output_dir: str | Path, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the data sets whose results are in output_dir already.

    records: {name: `evaluation_record`} of the evaluation that asks. Raises UsageError for a set
    that was evaluated otherwise.
    """
    finished, problems = [], []
    for name, record in records.items():
        predictions, scores = result_files(output_dir, name)
        if not (predictions.is_file() and scores.is_file()):
            continue
        another = difference(read_record(scores).get("run") or {}, record)
        if another:
            problems.append(
                f"{predictions} is finished, but with another {another}; give another --output_dir"
                " or NAME"
            )
        finished.append(name)
    if problems:
        raise UsageError(problems)
    return finished
