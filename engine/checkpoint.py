"""Save checkpoints whole or not at all, verify them on loading, restore the state of a run.

A checkpoint is a directory `checkpoint-<step>/` of safetensors and JSON files (nothing is ever
unpickled), with a `manifest.json` of their sizes and SHA-256. It is written under a name that
starts with `.tmp-`, flushed to the disk and renamed last. So a run that dies at any point leaves
its earlier checkpoints as they were.
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

from data.plain_files import is_checkpoint_name, is_plain, open_plain, parse_record, read_plain
from engine.config import UsageError
from engine.free_memory import free_on_host

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"  # incomplete or being deleted: never read, removed by clean_leftovers
_REPLACED = ".old-"  # complete, aside while a checkpoint of the same step takes its place
_SUFFIXES = (".safetensors", ".json")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.(?:safetensors|json)")
_LARGEST_MANIFEST = 16 * 2**20  # bytes; one of a run has some 2,000

logger = logging.getLogger(__name__)


class CheckpointError(UsageError):
    """Report a checkpoint that is missing, damaged, or does not fit what it is loaded into."""


# ---- save ----------------------------------------------------------------------------------------
# This file does not use data.files.written_whole: a checkpoint is a directory, and its files and
# the rename itself are flushed to the disk (fsync), so that it also survives a power cut.
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
    temporary = run_dir / f"{_TEMPORARY}{final.name}-{os.getpid()}"
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
        _sync_directory(temporary)
        _publish(temporary, final)
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


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _publish(temporary: Path, final: Path) -> None:
    """Rename a complete checkpoint into place.

    A directory that is not empty cannot be replaced in one call, so an old one steps aside first.
    """
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except BaseException:
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        raise
    _sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


# ---- load ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Checkpoint:
    """Give access to a verified checkpoint. Tensors are read when asked for, to the CPU."""

    path: Path
    step: int
    manifest: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read `<name>.safetensors`. Raises CheckpointError where the checkpoint has none."""
        from safetensors.torch import load  # here: a checkpoint is verified without torch

        try:
            return load(self._read(f"{name}.safetensors"))
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
            return read_plain(self.path / name, size)
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
    """Check every listed file's size and SHA-256, and return what is wrong, one line a file."""
    try:
        manifest = parse_record(read_plain(Path(path) / MANIFEST, _LARGEST_MANIFEST))
        files = {
            name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
        if any(
            type(number) is not int
            for number in (manifest["step"], *(size for size, _ in files.values()))
        ):
            raise TypeError("the step and every size must be integers")
    except OSError as error:
        return [f"{MANIFEST}: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: is not a checkpoint's manifest ({type(error).__name__}: {error})"]
    named = Path(path).resolve().name
    if is_checkpoint_name(named) and named != f"checkpoint-{manifest['step']}":
        return [f"{MANIFEST}: is of step {manifest['step']:,}, so the folder is not {named}"]
    problems = (
        _file_problem(Path(path), name, size, sha256) for name, (size, sha256) in files.items()
    )
    return [problem for problem in problems if problem]


def _file_problem(directory: Path, name: str, size: int, sha256: str) -> str | None:
    if not _is_plain(name):
        said = ascii(name)[1:-1][:80]
        return f"{said}: is not a plain name ending in {' or '.join(_SUFFIXES)}, so it is not read"
    path = directory / name
    if not is_plain(path):
        return f"{name}: is a link" if path.is_symlink() else f"{name}: is missing"
    if path.stat().st_size != size:
        return f"{name}: has {path.stat().st_size:,} bytes, the manifest says {size:,}"
    try:
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
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    problems = verify_checkpoint(path)
    if problems:
        raise CheckpointError([f"{path}: {problem}" for problem in problems])
    manifest = parse_record(read_plain(path / MANIFEST, _LARGEST_MANIFEST))
    return Checkpoint(path.resolve(), manifest["step"], manifest)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List a run's checkpoint directories, valid or not, lowest step first.

    The list is empty where there is no run.
    """
    if not Path(run_dir).is_dir():
        return []
    found = [
        path
        for path in Path(run_dir).iterdir()
        if is_checkpoint_name(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


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
    """Delete the oldest checkpoints beyond `limit` in all, and return them.

    limit: None keeps every checkpoint.
    keep: checkpoints that stay even beyond the limit, such as the best (links are followed).

    The newest checkpoint always stays. A deletion that fails is only a warning, because training
    matters more than disk space.
    """
    checkpoints = list_checkpoints(run_dir)
    if limit is None or not checkpoints:
        return []
    kept = {Path(path).resolve() for path in keep} | {checkpoints[-1].resolve()}
    deletable = [path for path in checkpoints if path.resolve() not in kept]
    deleted = []
    for path in deletable[: max(0, len(checkpoints) - limit)]:
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

    A checkpoint that was being replaced is put back.
    """
    removed = []
    for path in sorted(Path(run_dir).iterdir()):
        final = path.with_name(path.name.removeprefix(_REPLACED))
        replaced = path.name.startswith(_REPLACED) and is_checkpoint_name(final.name)
        if replaced and not final.exists():
            os.rename(path, final)
        elif path.name.startswith((_TEMPORARY, _REPLACED)):
            (
                shutil.rmtree(path, ignore_errors=True)
                if path.is_dir() and not path.is_symlink()
                else path.unlink()
            )
            removed.append(path)
    return removed


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
