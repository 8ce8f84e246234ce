"""Surround a run with what its loop does not care for: signals, its folder and lock, exit codes.

Everything in it is plain Python, so a command answers a wrong flag before torch is loaded. Seeds,
device and precision are in engine/device.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import itertools
import logging
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError, safe_open

from data.command_line import AFTER_THE_CAUSE, exit_code
from data.console import STDOUT, print_errors
from data.files import REPLACED, DataError, process_mark
from data.plain_files import (
    is_checkpoint_name,
    is_plain,
    open_plain,
    parse_record,
    read_plain,
    strange_entries,
)
from engine.adapter_files import adapter_record
from engine.checkpoint import RUN_ID
from engine.config import UsageError
from engine.launch import Launch
from engine.model_files import ADAPTER_FILES, same_base

LOCK_FILE = ".lock"
FINISHED = "finished"  # in config.json, once all is done: final adapter, scores, card
# Links to a checkpoint, and what a kill leaves of one that is being set.
_LINKS = ("best", "last", ".tmp-best", ".tmp-last")
# Every line of these logs has a "step", so a resume can tell which lines it will repeat.
STEP_LOGS = ("metrics.jsonl", "completions.jsonl", "evaluations.jsonl", "warnings.jsonl")
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "pillow", "tokenizers")
RunKind = Literal["sft", "grpo", "eval", "report", "matrix"]
Answer = TypeVar("Answer")
# What a disk says that is full, over its quota, broken, gone or read-only.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.EFBIG,
    errno.ESTALE,
    errno.ENODEV,
)


logger = logging.getLogger(__name__)


# ---- signals -------------------------------------------------------------------------------------
class StopRequested(KeyboardInterrupt):
    """Leave sampling or evaluation because a signal asked to: the state so far is to be saved."""


class StepFailed(RuntimeError):
    """Report a step that must not reach the weights, such as a reward that is no number.

    The text is one line. In training the state before the step is saved.
    """


class DoesNotFit(StepFailed):
    """Report work of which not even a single row fits into memory, with the setting to lower."""


class PeerError(RuntimeError):
    """Report that another rank has failed. Its own error says why."""


# A user's, a batch system's, a terminal's that closes, and two that a batch system may be told to
# send some time before its limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class SignalGuard:
    """Hold back SIGNALS within the block, so that a loop can finish its step and save.

    They only set `stop`, which loops poll. A SIGINT after any first signal raises KeyboardInterrupt
    at once, and the others change nothing then. The earlier handlers come back at the end of the
    block. Poll inside sampling and evaluation too: a step may be long, and the time between SIGTERM
    and SIGKILL short.

    stop: number of the first signal that this process received. agreed: of the first that all ranks
    know of (`agree`). What all ranks do together is decided by that one.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.agreed: int | None = None
        self._earlier: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """Return 128 + the signal's number (130 after SIGINT, 143 after SIGTERM), 0 without one."""
        number = self.agreed if self.stop is None else self.stop
        return 0 if number is None else 128 + number

    def agree(self, gather: Callable[[int | None], list[int | None]]) -> int | None:
        """Make every rank's signal known to all, at the same point of their work -> `agreed`.

        gather: gives every rank's value to all, in the ranks' order.
        """
        if self.agreed is None:
            self.agreed = next((one for one in gather(self.stop) if one is not None), None)
        return self.agreed

    def exit_code_after(
        self, stop: KeyboardInterrupt, gather: Callable[[int | None], list[int | None]]
    ) -> int:
        """Return the exit code where an interrupt has ended the work: that of any rank's signal.

        stop: StopRequested is what all ranks raise, any other can be of this one alone.
        """
        if isinstance(stop, StopRequested):
            self.agree(gather)
        return self.exit_code or 130

    def __enter__(self) -> SignalGuard:
        self._earlier = _handle_signals(self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int) -> None:
        if self.stop is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.stop = int(number)
        _notice(number, "stopping at the next safe point and saving; Ctrl-C stops at once")


def leave_at_signals() -> None:
    """End the process at one of SIGNALS with its exit code, wherever no SignalGuard holds it back.

    For the time before training begins, in which libraries, data and weights are read: nothing is
    lost by it, and whatever is open is closed.
    """
    told = False

    def leave(number: int) -> None:
        nonlocal told
        if told and number != signal.SIGINT:
            return  # it is leaving
        told = True
        _notice(number, "stopped")
        raise SystemExit(128 + number)

    _handle_signals(leave)


def _handle_signals(handle: Callable[[int], None]) -> dict[int, Any]:
    """Let a function take SIGNALS in this process -> {number: the handler before}.

    A SIGHUP that is ignored already stays so: nohup asks for it. A forked worker inherits the
    handlers, and dies quietly by the signal.
    """
    owner, earlier = os.getpid(), {}

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handle(number)
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in SIGNALS:
        before = signal.getsignal(number)
        if number != signal.SIGHUP or before is not signal.SIG_IGN:
            signal.signal(number, handler)
            # None: set by something that is not Python, which cannot be put back from here
            earlier[int(number)] = signal.SIG_DFL if before is None else before
    return earlier


def _notice(number: int, text: str) -> None:
    if os.environ.get("RANK", "0") != "0":  # rank 0 has it too, or says at the end that it stopped
        return
    # not print: it is not safe to call while another print is interrupted
    with contextlib.suppress(OSError):
        os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())


# ---- run folder ----------------------------------------------------------------------------------
def run_directory(
    output_dir: str | Path | None, kind: RunKind, *, root: Path = Path("runs")
) -> Path:
    """Create the folder of a run and return it, never one that holds anything already.

    output_dir: None for `root/<YYYYmmdd-HHMMSS>-<kind>`.

    Raises UsageError where `output_dir` holds anything already or cannot be created.
    """
    directory = Path(root if output_dir is None else output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if output_dir is None:
            return _new_directory(directory, f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}")
        refuse_content(directory, kind)
    except OSError as error:
        raise UsageError(f"--output_dir {directory}: cannot be used: {error.strerror}") from error
    return directory


def check_output_dir(output_dir: str | None, kind: RunKind, *, root: Path = Path("runs")) -> None:
    """Raise UsageError where `run_directory` or `lock_run` would, and leave no trace."""
    if output_dir is None:
        check_writable(root)
        return
    check_writable(output_dir)
    folder = Path(output_dir)
    if folder.exists():
        refuse_content(folder, kind)
        check_lock(folder)


def check_writable(output_dir: str | Path) -> None:
    """Raise UsageError where no folder can be made and written to there, and leave no trace.

    It is tried: what a name, a file in the way, permissions, a quota or a read-only disk forbid
    shows at once, before a model is loaded.
    """
    folder = Path(output_dir)
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        # of the length of the files that a run keeps there
        probe = folder / f".tmp-{process_mark()}-{'x' * 60}"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"--output_dir {_cut(folder)}: cannot be used: {reason}") from error
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another process has begun to write there
                path.rmdir()


def _cut(path: Path, most: int = 200) -> str:
    text = str(path)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def check_lock(run_dir: Path) -> None:
    """Raise UsageError where another process holds a folder, as `lock_run` does."""
    if os.path.lexists(run_dir / LOCK_FILE):
        with lock_run(run_dir):
            pass


def refuse_content(directory: Path, kind: RunKind) -> None:
    """Raise UsageError where a folder holds anything, but for what a run left before it got on.

    That is what a run of this kind leaves that was ended before its first checkpoint.
    """
    content = sorted(path.name for path in directory.iterdir() if path.name != LOCK_FILE)
    if content and not (kind in ("sft", "grpo") and _only_begun(directory, content, kind)):
        raise UsageError(
            f"--output_dir {directory} is not empty (it holds {content[0]}) and nothing is"
            " overwritten: "
            + (
                "name another folder, or go on with --resume_from_checkpoint"
                if kind in ("sft", "grpo")
                else "name another folder"
            )
        )


def _only_begun(directory: Path, content: Sequence[str], kind: RunKind) -> bool:
    """Tell whether a run of a kind was ended in this folder before its first checkpoint."""
    if any(is_checkpoint_name(name.removeprefix(REPLACED)) for name in content):
        return False
    try:
        record = parse_record(read_plain(directory / "config.json"))
    except FileNotFoundError:  # not even begun
        half = (".tmp-", REPLACED)
        inner = directory / "reference"  # what GRPO writes before config.json
        files = {path.name for path in inner.iterdir()} if inner.is_dir() else set()
        return files <= set(ADAPTER_FILES) and all(
            name.startswith(half) or name == inner.name for name in content
        )
    except (OSError, ValueError):
        return False
    begun = isinstance(record, dict) and record.get("script") == kind and RUN_ID in record
    return begun and not is_finished(directory, record) and ADAPTER_FILES[1] not in content


def is_finished(run_dir: Path, record: Mapping[str, Any]) -> bool:
    """Tell whether a run has come to its end, with its scores and its card.

    record: its config.json. A run of an earlier version says it by its final adapter.
    """
    if RUN_ID not in record:
        return all(is_plain(run_dir / name) for name in ADAPTER_FILES)
    return FINISHED in record


def runs_of(root: Path, kind: Literal["sft", "grpo"]) -> list[Path]:
    """List the run folders of a kind below `root` by the time in their names, the newest first."""
    if not Path(root).is_dir():
        return []
    names = {
        path: re.fullmatch(rf"(\d{{8}}-\d{{6}})-{kind}(?:-(\d+))?", path.name)
        for path in Path(root).iterdir()
    }
    found = [(match[1], int(match[2] or 1), path) for path, match in names.items() if match]
    return [path for _, _, path in sorted(found, reverse=True)]


def _new_directory(root: Path, name: str) -> Path:
    for attempt in itertools.count(1):
        directory = root / (name if attempt == 1 else f"{name}-{attempt}")
        with contextlib.suppress(FileExistsError):  # two runs that start in the same second
            directory.mkdir()
            return directory
    raise AssertionError("itertools.count never ends")


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process, so that no second one writes there.

    The kernel lets go when the process ends, however it ends. Raises UsageError, naming the other
    process, where another one holds it, where the folder is read-only, and where there is something
    in it that no run leaves there: a link, a pipe.
    """
    path = Path(run_dir) / LOCK_FILE
    try:
        file = open_plain(path, "r+b")
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        raise UsageError(f"{run_dir} cannot be written to: {error.strerror}{where}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                holder = file.read(20).decode("ascii", "replace").strip() or "unknown"
                raise UsageError(
                    f"{run_dir} is in use by another run (process {holder})"
                ) from error
            logger.warning(
                "%s cannot be locked (%s): make sure that no other run uses it",
                run_dir,
                error.strerror,
            )
        check_plain_folder(run_dir)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()).encode())
        file.flush()
        yield


def check_plain_folder(run_dir: Path) -> None:
    """Raise UsageError where a run's folder holds what no run leaves there: a link, a pipe."""
    try:
        strange = next(strange_entries(run_dir, _LINKS), None)
    except OSError as error:
        raise UsageError(f"{run_dir} cannot be read: {error.strerror}") from error
    if strange is not None:
        raise UsageError(
            f"{run_dir}: {strange}; in the folder of a run nothing but its own files is read or"
            " written: remove it, or put the file itself there"
        )


def newest_finished_run(
    root: Path, kind: Literal["sft", "grpo"], base: str | None = None
) -> Path | None:
    """Find the newest run of a kind below `root`, by the time in its name, that has an adapter.

    base: take only runs whose adapter names this base model, in any spelling.
    """
    for run in runs_of(root, kind):
        if (run / "config.json").is_file() and _is_adapter_of(run, base):
            return run
    return None


def _is_adapter_of(run: Path, base: str | None) -> bool:
    """Tell whether a run has an adapter of a base model, in any spelling. None: of any.

    A damaged one is none.
    """
    try:
        named = str(adapter_record(run).get("base_model_name_or_path") or "")
        with safe_open(run / ADAPTER_FILES[1], "numpy"):  # its header fits its size
            return base is None or same_base(base, named)
    except (UsageError, SafetensorError, OSError):
        return False


# ---- facts about the run -------------------------------------------------------------------------
def versions() -> dict[str, str]:
    """Gather the versions of Python and of the packages that decide numbers.

    CUDA's and the device's name are among them where torch is loaded and there is a GPU.
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    torch = sys.modules.get("torch")  # not imported for this: who computes has loaded it
    if torch is not None and torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "device": torch.cuda.get_device_name()}
    return found


def environment_banner(device: object) -> str:
    """Write device and versions in one line, for the top of the log and for bug reports."""
    return " | ".join(
        [f"device {device}", *(f"{name} {version}" for name, version in versions().items())]
    )


# ---- command line and exit codes -----------------------------------------------------------------
def main_guard(
    main: Callable[[], int | None],
    *,
    errors: tuple[type[Exception], ...] = (),
    of_ranks: bool = False,
) -> int:
    """Call a script's main and return the process's exit code.

    main: returns its own code (None is 0, SignalGuard.exit_code after a stop).
    errors: exception classes beside UsageError that the user can correct. They become 'error: '
    lines on stderr, from `.problems` where the exception has them, and code 2.
    of_ranks: whether torchrun may start several processes of the script (see `exit_code`).

    StepFailed is such a line too, and code 1: the run is at fault, or its model or its reward. So
    is a disk that is full or fails. PeerError is code 1 as well, and a line of rank 0 alone.
    KeyboardInterrupt becomes 130, and output that nobody reads any more 141. Anything else is a
    fault of ours and propagates with its traceback, which Python makes 1.
    """
    correctable: tuple[type[Exception], ...] = (UsageError, *errors)

    def told() -> int | None:
        try:
            return main()
        except correctable as error:
            print_errors(getattr(error, "problems", None) or [str(error)])
            return 2
        except StepFailed as error:
            print_errors([str(error)])
            return 1
        except PeerError as error:
            if Launch.of().first:
                print_errors([str(error)])
            time.sleep(AFTER_THE_CAUSE)
            return 1
        except (RuntimeError, MemoryError) as error:
            from engine.out_of_memory import is_out_of_memory, said_by  # here: it needs torch

            if not is_out_of_memory(error):
                raise
            print_errors(
                [f"out of memory ({said_by(error)}): take a smaller model, or free memory"]
            )
            return 1
        except OSError as error:
            if error.errno not in DISK_ERRORS or error.filename == STDOUT:
                raise
            print_errors([disk_line(error)])
            return 1
        except KeyboardInterrupt:
            print(
                "stopped at once; what was done since the last checkpoint is not saved",
                file=sys.stderr,
            )
            return 130

    return exit_code(told, of_ranks=of_ranks)


def disk_line(error: OSError) -> str:
    """Write an OSError in one line, with the file that it is about."""
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror or error}"


def accepted(resolve: Callable[[Sequence[str]], Answer]) -> Answer:
    """Read the command line by `resolve(argv)`, or end the process with its errors and exit code 2.

    A script calls it before its slow imports, so that --help and mistakes are answered at once.
    From here on a signal ends the process with its exit code, until a SignalGuard holds it back.
    """
    return _accepted(resolve)


def accepted_by_first(resolve: Callable[[Sequence[str]], Answer]) -> Answer | None:
    """Read the command line as `accepted` does, of a script that several ranks may run.

    Rank 0 alone reads. The others return None, and are told by it (`Ranks.resolved`).
    """
    return _accepted(lambda argv: read_by_first(resolve, argv), of_ranks=True)


def read_by_first(resolve: Callable[[Sequence[str]], Answer], argv: Sequence[str]) -> Answer | None:
    """Read a command line on rank 0 alone. The others return None, and end where it asks for help.

    Raises UsageError where the processes were not started as ranks (`Launch.of`).
    """
    if Launch.of().first:
        return resolve(argv)
    if {"-h", "--help"} & set(argv):  # which rank 0 answers, and ends
        sys.exit(0)
    return None


def _accepted(read: Callable[[Sequence[str]], Answer], *, of_ranks: bool = False) -> Answer:
    leave_at_signals()
    answers: list[Answer] = []
    errors = (DataError,)
    code = main_guard(lambda: answers.append(read(sys.argv[1:])), errors=errors, of_ranks=of_ranks)
    if not answers:
        sys.exit(code)
    return answers[0]
