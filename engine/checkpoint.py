"""Save checkpoints whole or not at all, verify them on loading, restore the state of a run.

A checkpoint is a directory `checkpoint-<step>/` of safetensors and JSON files (nothing is ever
unpickled), with a `manifest.json` of their sizes and SHA-256. It is written under a name that
starts with `.tmp-`, flushed to the disk and renamed last. So a run that dies at any point leaves
its earlier checkpoints as they were. A checkpoint of the same step is exchanged for the new one in
one step. Where the file system cannot, it is `.old-checkpoint-<step>` between two renames, and
counts as the checkpoint while that is missing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from data.files import REPLACED, flush_to_disk, process_mark, remove, replace_folder
from data.plain_files import is_checkpoint_name, is_plain, open_plain, parse_record, read_plain
from engine.config import UsageError
from engine.free_memory import free_on_host

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
TIMED = "timed"  # a note in the manifest
_TEMPORARY = ".tmp-"  # incomplete or being deleted: never read, removed by clean_leftovers
_SUFFIXES = (".safetensors", ".json")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.(?:safetensors|json)")
_LARGEST_MANIFEST = 16 * 2**20  # bytes; one of a run has some 2,000
RUN_ID = "run_id"  # in config.json and in the notes of a manifest
BY_PLACE = "numbers_by_place"  # in the notes of a manifest: see engine/random_numbers.py
OTHER_RUN = "is of another run"
_LARGEST_HEADER = 25_000_000  # bytes; one of 10,000 tensors has 1,500,000

logger = logging.getLogger(__name__)


class CheckpointError(UsageError):
    """Report a checkpoint that is missing, damaged, or does not fit what it is loaded into."""


def checkpoint_step(name: str) -> int | None:
    """Read the step in the name of a checkpoint's folder, None for a name that is none."""
    return int(name.removeprefix("checkpoint-")) if is_checkpoint_name(name) else None


def standing_place(path: Path) -> Path:
    """Find the folder that holds a checkpoint's files: its own, or the one that it is aside in.

    path: of the checkpoint, or of a link to it.
    """
    path = Path(path)
    if path.is_dir():
        return path
    own = path.resolve()
    aside = own.with_name(REPLACED + own.name)
    return aside if checkpoint_step(own.name) is not None and aside.is_dir() else path


# ---- save ----------------------------------------------------------------------------------------
# This file does not use data.files.written_folder: the hashes are taken from memory, not from what
# the disk gives back.
def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    records: Mapping[str, Any],
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write `run_dir/checkpoint-<step>` and return its path.

    A checkpoint of the same step is replaced.

    tensors: {file stem: {key: tensor}}, one `<stem>.safetensors` each.
    records: {file name.json: JSON value}.
    notes: JSON values kept in the manifest, such as the reference adapter's hash.

    Raises OSError, naming the path and the bytes needed, where the disk refuses. Then nothing
    incomplete stays behind and older checkpoints are untouched. Raises ValueError for a file name
    that ends in neither .safetensors nor .json.
    """
    from safetensors.torch import save  # here: a checkpoint is verified without torch

    run_dir = Path(run_dir)
    final = run_dir / f"checkpoint-{step}"
    temporary = run_dir / f"{_TEMPORARY}{final.name}-{process_mark()}"
    encoded = {name: _to_json(record) for name, record in records.items()}
    names = [*(f"{stem}.safetensors" for stem in tensors), *encoded]
    refused = [name for name in names if not _is_plain(name)]
    if refused or len(set(names)) < len(names):
        raise ValueError(
            f"checkpoint files need distinct plain names ending in {' or '.join(_SUFFIXES)}:"
            f" {refused or names}"
        )
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    needed += sum(map(len, encoded.values()))
    try:
        _check_space(run_dir, needed)
        os.mkdir(temporary)
        entries = {}
        for stem, group in tensors.items():
            payload = save(
                {key: _detached(tensor) for key, tensor in group.items()}, {"format": "pt"}
            )
            entries[f"{stem}.safetensors"] = _write(temporary / f"{stem}.safetensors", payload)
        for name, payload in encoded.items():
            entries[name] = _write(temporary / name, payload)
        manifest = {"step": step, "files": entries, "notes": dict(notes or {})}
        # The manifest is written last, so where it is, all other files are complete.
        _write(temporary / MANIFEST, _to_json(manifest))
        flush_to_disk(temporary)
        replace_folder(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        message = (
            f"checkpoint {final} was not saved: {error.strerror or error}; it needs {needed:,}"
            " bytes"
        )
        raise OSError(error.errno, message) from error
    return final


def _is_plain(name: str) -> bool:
    return _FILE.fullmatch(name) is not None and name != MANIFEST


def _to_json(record: Any) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    import torch  # here: a checkpoint is verified without it

    # Copied, because safetensors refuses views that share storage, and the tensors of a rollout are
    # often slices of one batch.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"only {free:,} bytes are free")


def _write(path: Path, payload: bytes) -> dict[str, Any]:
    """Write and flush one file, and return its manifest entry.

    The hash is taken from memory, not from what the disk gives back.
    """
    with open(path, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


# ---- load ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Checkpoint:
    """Give access to a verified checkpoint. Tensors are read when asked for, to the CPU."""

    path: Path
    step: int
    manifest: dict[str, Any]

    @property
    def place(self) -> Path:
        """Return the folder that holds the files now, also while another one replaces it."""
        return standing_place(self.path)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read `<name>.safetensors`. Raises CheckpointError where the checkpoint has none."""
        from safetensors.torch import load  # here: a checkpoint is verified without torch

        content = self._read(f"{name}.safetensors")
        if int.from_bytes(content[:8], "little") > _LARGEST_HEADER:
            raise CheckpointError(
                f"{self.path / name}.safetensors: is not a safetensors file: its header"
                f" has more than {_LARGEST_HEADER:,} bytes"
            )
        try:
            return load(content)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path / name}.safetensors: is not a safetensors file: {error}"
            ) from error

    def record(self, name: str) -> Any:
        """Read the JSON file `name`. Raises CheckpointError where the checkpoint has none."""
        try:
            return parse_record(self._read(name))
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path / name}: is not JSON: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["files"]

    def _read(self, name: str) -> bytes:
        if name not in self:
            raise CheckpointError(f"{self.path}: this checkpoint holds no {name}")
        size = self.manifest["files"][name]["size"]
        free = free_on_host()
        if free is not None and size > free.total:
            raise CheckpointError(
                f"{self.path / name}: has {size:,} bytes, and {free.total:,} bytes of memory are"
                " free"
            )
        try:
            return read_plain(self.place / name, size)
        except OSError as error:
            raise CheckpointError(
                f"{self.path / name}: cannot be read: {error.strerror}"
            ) from error


@contextmanager
def fitting(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn whatever a checkpoint's content makes the block raise into one CheckpointError.

    Its files are whole, but may have been written by anybody.
    """
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # of many classes: values can be anything
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{checkpoint.path}: its content does not fit this run ({type(error).__name__}: {said})"
        ) from error


def verify_checkpoint(path: Path) -> list[str]:
    """Check a checkpoint's files, step and run, and return what is wrong, one line a problem."""
    place = standing_place(path)
    try:
        manifest = _read_manifest(place)
    except OSError as error:
        return [f"{MANIFEST}: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: is not a checkpoint's manifest ({type(error).__name__}: {error})"]
    named = _own_path(place).name
    if is_checkpoint_name(named) and named != f"checkpoint-{manifest['step']}":
        return [f"{MANIFEST}: is of step {manifest['step']:,}, so the folder is not {named}"]
    own = run_id(place.parent)
    if own is not None and (manifest["notes"].get(RUN_ID) or "") != own:
        return [f"{MANIFEST}: {OTHER_RUN} than config.json beside it"]
    problems = (
        _file_problem(place, name, entry["size"], entry["sha256"])
        for name, entry in manifest["files"].items()
    )
    return [problem for problem in problems if problem]


def _read_manifest(place: Path) -> dict[str, Any]:
    """Read a manifest and check its form. Raises any of the errors that a damaged one can cause."""
    found = parse_record(read_plain(place / MANIFEST, _LARGEST_MANIFEST))
    manifest = {"notes": {}} | found
    sizes = [entry["size"] for entry in manifest["files"].values()]
    if any(type(number) is not int for number in (manifest["step"], *sizes)):
        raise TypeError("the step and every size must be integers")
    if not all(isinstance(entry["sha256"], str) for entry in manifest["files"].values()):
        raise TypeError("every SHA-256 must be text")
    if not isinstance(manifest["notes"], dict):
        raise TypeError("the notes must be an object")
    return manifest


def _own_path(place: Path) -> Path:
    """Return the path that a checkpoint has or had, whether or not it stands aside."""
    place = place.resolve()
    return place.with_name(place.name.removeprefix(REPLACED))


def run_id(run_dir: Path) -> str | None:
    """Read which run a folder belongs to, from its config.json.

    "" for a run of an earlier version, which has no id, and None where nothing tells.
    """
    try:
        record = parse_record(read_plain(Path(run_dir) / "config.json"))
        return str(record.get(RUN_ID) or "")
    except (OSError, ValueError, AttributeError):
        return None


def _file_problem(directory: Path, name: str, size: int, sha256: str) -> str | None:
    if not _is_plain(name):
        said = ascii(name)[1:-1][:80]
        return f"{said}: is not a plain name ending in {' or '.join(_SUFFIXES)}, so it is not read"
    path = directory / name
    try:
        if not is_plain(path):
            return f"{name}: is a link" if path.is_symlink() else f"{name}: is missing"
        if path.stat().st_size != size:
            return f"{name}: has {path.stat().st_size:,} bytes, the manifest says {size:,}"
        with open_plain(path) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror}"
    if found != sha256:
        return f"{name}: its content was altered (SHA-256 differs from the manifest)"
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint and open it.

    Raises CheckpointError with one line for each file that is missing, truncated or altered.
    """
    place = standing_place(path)
    if not place.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    problems = verify_checkpoint(place)
    if problems:
        raise CheckpointError([f"{path}: {problem}" for problem in problems])
    manifest = _read_manifest(place)
    return Checkpoint(_own_path(place), manifest["step"], manifest)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List a run's checkpoint directories, valid or not, lowest step first.

    One that stands aside while it is replaced is listed by its own name. Links and files are not
    listed. The list is empty where there is no run.
    """
    if not Path(run_dir).is_dir():
        return []
    found = {
        path.with_name(name)
        for path in Path(run_dir).iterdir()
        if checkpoint_step(name := path.name.removeprefix(REPLACED)) is not None
        and path.is_dir()
        and not path.is_symlink()
        and (name == path.name or not os.path.lexists(path.with_name(name)))
    }
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    step = checkpoint_step(path.name)
    assert step is not None, path
    return step


def latest_valid_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the valid checkpoint of the highest step, and say why each newer one was rejected."""
    rejected: list[str] = []
    for path in reversed(list_checkpoints(run_dir)):
        problems = verify_checkpoint(path)
        if not problems:
            return path, rejected
        rejected += [f"{path}: {problem}" for problem in problems]
    return None, rejected


# ---- housekeeping --------------------------------------------------------------------------------
def rotate_checkpoints(run_dir: Path, limit: int | None, keep: Collection[Path] = ()) -> list[Path]:
    """Delete the oldest checkpoints beyond `limit` in all, and earlier timed ones, and return them.

    limit: None keeps every checkpoint that is not timed: one that only the clock asked for goes
        once there is a later one.
    keep: checkpoints that stay in any case, such as the best (links are followed).

    The newest checkpoint always stays. A deletion that fails is only a warning, because training
    matters more than disk space.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return []
    kept = {Path(path).resolve() for path in keep} | {checkpoints[-1].resolve()}
    deletable = [path for path in checkpoints if path.resolve() not in kept]
    chosen = [path for path in deletable if _is_timed(path)]
    beyond = 0 if limit is None else max(0, len(checkpoints) - len(chosen) - limit)
    chosen += [path for path in deletable if path not in chosen][:beyond]
    deleted = []
    for path in chosen:
        # Renamed first, so that half a checkpoint is never visible.
        doomed = path.with_name(f"{_TEMPORARY}{path.name}-deleted")
        try:
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("old checkpoint %s could not be deleted: %s", path, error)
            continue
        deleted.append(path)
    return deleted


def _is_timed(path: Path) -> bool:
    """Tell whether a checkpoint was written only because of the time since the one before."""
    try:
        return _read_manifest(path)["notes"].get(TIMED) is True
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def set_later_checkpoints_aside(run_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to `after-<step>-checkpoint-<n>`, return the new paths.

    A run that continues from `step` takes another branch. The abandoned checkpoints must neither be
    taken for the newest nor be lost.
    """
    moved = []
    for path in list_checkpoints(run_dir):
        if _step_of(path) > step:
            names = (
                path.with_name(f"after-{step}-{path.name}{suffix}")
                for suffix in ("", *(f"-{n}" for n in range(2, 10_000)))
            )
            target = next(name for name in names if not name.exists())
            os.rename(path, target)
            moved.append(target)
    return moved


def clean_leftovers(run_dir: Path) -> list[Path]:
    """Remove what a killed run left half-written, and return what was removed.

    What was being replaced is put back.
    """
    removed = []
    for path in sorted(Path(run_dir).iterdir()):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if path.name.startswith(REPLACED) and not os.path.lexists(final):
            os.rename(path, final)
        elif path.name.startswith((_TEMPORARY, REPLACED)):
            remove(path)
            removed.append(path)
    return removed


def settle_checkpoints(run_dir: Path, last: Path, best: str | None, limit: int | None) -> None:
    """Point the links `last` and `best`, and delete old checkpoints beyond `limit`.

    last: the checkpoint at which the run stands. best: the name of the best one, None for none.
    """
    point_link(run_dir, "last", last)
    point_best(run_dir, best)
    rotate_checkpoints(run_dir, limit, keep={last} | ({run_dir / best} if best else set()))


def point_best(run_dir: Path, best: str | None) -> None:
    """Point the link `best` to the checkpoint of that name, or remove it where there is none."""
    if best is not None and (run_dir / best).is_dir():
        point_link(run_dir, "best", run_dir / best)
    elif (run_dir / "best").is_symlink():
        (run_dir / "best").unlink()


def point_link(run_dir: Path, name: str, target: Path) -> None:
    """Make `run_dir/name` a relative link to a checkpoint of this run, in one step.

    Links are a convenience, so a file system without them costs only a warning.
    """
    temporary = Path(run_dir) / f"{_TEMPORARY}{name}"
    try:
        temporary.unlink(missing_ok=True)
        os.symlink(Path(target).name, temporary)
        os.replace(temporary, Path(run_dir) / name)
    except OSError as error:
        logger.warning("link %s could not be set: %s", Path(run_dir) / name, error)
