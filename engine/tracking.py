"""Track a run: combine metrics over micro-batches, and log them.

Logs go to JSONL and TensorBoard. Logging never stops a training: a disk that is full or a
TensorBoard that fails costs one warning. Names of timings are `step_time` or begin with `time/`.
All other metrics of a run on one machine are reproducible.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from data.files import written_whole
from data.plain_files import LARGEST_LOG_LINE, open_plain
from engine.charts import FOLDER, Chart, ChartWriters, layout
from engine.runtime import STEP_LOGS

logger = logging.getLogger(__name__)


# ---- accumulate ----------------------------------------------------------------------------------
Reduction = Literal["mean", "min", "max", "sum"]


class WeightedMetric(Protocol):
    """Describe what `rl.objective.objective_metrics` returns for each name."""

    @property
    def value(self) -> float | torch.Tensor: ...
    @property
    def weight(self) -> float | torch.Tensor: ...
    @property
    def reduction(self) -> Reduction: ...


class MetricAccumulator:
    """Combine the metrics of micro-batches into those of the whole step.

    mean is sum(value * weight) / sum(weight). min and max are over the entries, and sum adds the
    values. An entry of weight 0 measured nothing and is ignored, whatever its value. A metric
    without any other entry is left out.
    """

    def __init__(self, state: Mapping[str, Any] | None = None):
        """Start empty, or from a `state_dict()` where a run is resumed between two logs."""
        self._entries: dict[str, list[tuple[Any, Any]]] = {}
        self._reductions: dict[str, str] = {}
        for name, (reduction, entries) in (state or {}).items():
            self._reductions[name] = reduction
            self._entries[name] = [tuple(entry) for entry in entries]

    def add(
        self,
        name: str,
        value: float | torch.Tensor,
        weight: float | torch.Tensor = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        """Add one measurement.

        Tensors (0-d) are kept as they are, so that nothing waits for the device before `collect`.
        Raises ValueError for an unknown reduction, or one that differs from the name's earlier one.
        """
        if reduction not in ("mean", "min", "max", "sum"):
            raise ValueError(f"metric {name}: unknown reduction {reduction!r}")
        if self._reductions.setdefault(name, reduction) != reduction:
            raise ValueError(
                f"metric {name}: reduction {reduction!r} after {self._reductions[name]!r}"
            )
        self._entries.setdefault(name, []).append((_detach(value), _detach(weight)))

    def add_all(self, metrics: Mapping[str, WeightedMetric]) -> None:
        """Add a dictionary of metrics that carry their own weight and reduction."""
        for name, metric in metrics.items():
            self.add(name, metric.value, metric.weight, metric.reduction)

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator holds. state: its `state_dict`."""
        for name, (reduction, entries) in state.items():
            for value, weight in entries:
                self.add(name, value, weight, reduction)

    def collect_all(self, gather: Callable[[dict], list[dict]]) -> dict[str, float]:
        """Combine what every rank has added. gather: gives every rank's value to all."""
        of_all = MetricAccumulator()
        for of_rank in gather(self.state_dict()):
            of_all.merge(of_rank)
        return of_all.collect()

    def mark(self) -> Callable[[], None]:
        """Return a function that drops what is added from here on, for work that is done again."""
        counts = {name: len(entries) for name, entries in self._entries.items()}

        def back() -> None:
            for name in list(self._entries):
                if name in counts:
                    del self._entries[name][counts[name] :]
                else:
                    del self._entries[name], self._reductions[name]

        return back

    def state_dict(self) -> dict[str, Any]:
        """Return what has been added since the last `collect`, as JSON can hold it."""
        return {
            name: [
                self._reductions[name],
                [[float(value), float(weight)] for value, weight in entries],
            ]
            for name, entries in self._entries.items()
        }

    def leave_out_not_finite(self) -> None:
        """Drop infinities and NaN of the metrics that have other values: a skipped step's."""
        for name, entries in self._entries.items():
            finite = [entry for entry in entries if math.isfinite(float(entry[0]))]
            self._entries[name] = finite or entries

    def collect(self) -> dict[str, float]:
        """Combine the metrics, in the order in which their names first came, and start afresh."""
        combined = {}
        for name, entries in self._entries.items():
            weighted = [(float(value), float(weight)) for value, weight in entries]
            weighted = [(value, weight) for value, weight in weighted if weight != 0]
            if weighted:
                combined[name] = _combine(weighted, self._reductions[name])
        self._entries.clear()
        self._reductions.clear()
        return combined


def _detach(value: float | torch.Tensor) -> float | torch.Tensor:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _combine(weighted: list[tuple[float, float]], reduction: str) -> float:
    values = [value for value, _ in weighted]
    if any(map(math.isnan, values)):
        return math.nan  # Python's min and max would hide it, depending on the order
    if reduction == "mean":
        return sum(value * weight for value, weight in weighted) / sum(
            weight for _, weight in weighted
        )
    combine: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max, "sum": sum}
    return combine[reduction](values)


# ---- write ---------------------------------------------------------------------------------------
class RunLogger:
    """Write one run's metrics to `metrics.jsonl`, TensorBoard and `log_history`.

    `log_history` is the list in HF's trainer_state.json. A checkpoint keeps how long the logs were
    (`marks`). With `resume_step`, what was logged after that is taken out first: lines go to
    `<name>.after-<step>.jsonl`, points of TensorBoard are cut off. So what a resumed run does again
    is logged once, wherever the earlier process ended.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int | None = None,
        log_history: Sequence[Mapping[str, Any]] = (),
        marks: Mapping[str, Any] | None = None,
        writes: bool = True,
    ):
        """Open the logs of a new run, or of one that goes on.

        resume_step: the step that the run goes on from. log_history: what it had logged by then.
        marks: `marks` of then, None where a checkpoint of an earlier version has none. Then lines
        of later steps alone are taken out, and TensorBoard drops its later points itself.
        writes: False for a rank that only keeps `log_history`.
        """
        self.run_dir, self.writes = Path(run_dir), writes
        self.log_history = [dict(entry) for entry in log_history]
        self._warned: set[str] = set()
        # Files whose last write failed, perhaps in the middle of a line.
        self._torn: set[str] = set()
        self._waiting: dict[str, str] = {}  # lines for files whose folder is gone
        self._resumed = resume_step is not None
        # A new run marks its start too, because TensorBoard takes only a second mark for a restart
        # and drops nothing at the first.
        self._purge_step = 0 if resume_step is None else resume_step + 1
        self._tensorboard = None
        self._charts: ChartWriters | None = None
        if not writes:
            return
        if resume_step is None:  # what is there is of a run that begins again
            marks = {}
        for name in STEP_LOGS:
            with self._degrading(name):
                size = None if marks is None else marks.get(name, 0)
                set_later_lines_aside(self.run_dir / name, resume_step or 0, size)
        if marks is not None:
            with self._degrading("TensorBoard"):
                cut_events(self.run_dir, marks)
        with self._degrading("TensorBoard"):
            wait_for_later_second(self.run_dir)
            self._tensorboard = self._writer(self.run_dir)

    def scalars(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        split: Literal["train", "eval"] = "train",
        dataset: str | None = None,
        epoch: float | None = None,
    ) -> None:
        """Log the metrics of an optimizer step, or of a data set in evaluation.

        JSONL gets {"step", "epoch", "split", "dataset", **metrics}. TensorBoard gets train/<name>
        or eval/<dataset>/<name>, and monitors/... as they are, so that they have a place of their
        own there. log_history gets <name> or eval_<dataset>_<name>, as HF's Trainer writes them.
        NaN and infinity become null in both JSON forms.
        """
        where = {"step": step, "epoch": epoch, "split": split, "dataset": dataset}
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(
            "metrics.jsonl",
            [{key: value for key, value in where.items() if value is not None} | finite],
        )
        prefix = _history_prefix(split, dataset)
        entry = {f"{prefix}{name}": value for name, value in finite.items()} | {"step": step}
        self.log_history.append(entry if epoch is None else entry | {"epoch": epoch})
        folder = f"{split}/{dataset}" if dataset else split
        tagged = {
            name if name.startswith("monitors/") else f"{folder}/{name}": value
            for name, value in values.items()
        }
        for tag, value in tagged.items():
            self._to_tensorboard("add_scalar", tag, value, step)
        if self._charts is not None and self._tensorboard is not None:
            with self._into_tensorboard():
                self._charts.write(tagged, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Log Markdown to TensorBoard.

        Text of a model or a file must have gone through `escape_markdown`.
        """
        self._to_tensorboard("add_text", tag, markdown, step)

    def image(self, tag: str, array: np.ndarray, step: int) -> None:
        """Log a grey image, uint8 [H,W], to TensorBoard."""
        self._to_tensorboard("add_image", tag, array, step, dataformats="HW")

    def charts(self, category: str, charts: Sequence[Chart]) -> None:
        """Draw charts in TensorBoard from what is logged from now on.

        category: their heading on its page of custom scalars. To be called before anything is
        logged, and in a resumed run too.
        """
        if not self._resumed:
            self._to_tensorboard("add_custom_scalars", layout(category, charts))
        if self._tensorboard is not None:
            with self._into_tensorboard():
                self._charts = ChartWriters(self.run_dir, charts, self._writer, self._tensorboard)

    def reopen(self, step: int) -> None:
        """Write the lines that waited and begin new TensorBoard files, in a folder made again.

        step: at which the run stands.
        """
        for filename in list(self._waiting):
            self._append(filename, [])
        charts, self._charts = self._charts, None
        with contextlib.suppress(Exception):  # their files are gone
            if charts is not None:
                charts.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
        self._purge_step, self._tensorboard = step + 1, None
        with self._degrading("TensorBoard"):
            self._tensorboard = self._writer(self.run_dir)
        if charts is not None and self._tensorboard is not None:
            with self._into_tensorboard():
                self._charts = ChartWriters(
                    self.run_dir, charts.charts, self._writer, self._tensorboard
                )

    def warn(self, line: str, step: int) -> None:
        """Keep a warning of the run in warnings.jsonl."""
        self._append("warnings.jsonl", [{"step": step, "warning": line}])

    def append_jsonl(self, filename: str, rows: Iterable[Mapping[str, Any]], step: int) -> None:
        """Append rows to a file of the run, each as {"step": step, **row}."""
        self._append(filename, [{"step": step} | dict(row) for row in rows])

    def marks(self) -> dict[str, int]:
        """Measure how long the logs are -> {file: bytes}. A checkpoint keeps it."""
        self._to_tensorboard("flush")
        if self._charts is not None and self._tensorboard is not None:
            with self._into_tensorboard():
                self._charts.flush()
        files = [self.run_dir / name for name in STEP_LOGS] + event_files(self.run_dir)
        return {
            str(path.relative_to(self.run_dir)): path.stat().st_size
            for path in files
            if path.is_file()
        }

    def close(self) -> None:
        """Flush and close TensorBoard's files."""
        if self._charts is not None and self._tensorboard is not None:
            with self._into_tensorboard():
                self._charts.close()
        self._to_tensorboard("close")
        self._tensorboard = None

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, filename: str, rows: list[dict[str, Any]]) -> None:
        if not self.writes:
            return
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self._degrading(filename):
            if not self.run_dir.is_dir():  # deleted under the run, which makes it again
                self._waiting[filename] = self._waiting.get(filename, "") + text
            text = self._waiting.get(filename, text)
            separator = "\n" if filename in self._torn else ""
            with open_plain(self.run_dir / filename, "ab") as file:
                self._torn.add(filename)
                file.write((separator + text).encode(errors="backslashreplace"))
            self._torn.discard(filename)
            self._waiting.pop(filename, None)

    def _to_tensorboard(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._tensorboard is None:
            return
        with self._into_tensorboard():
            getattr(self._tensorboard, method)(*arguments, **options)

    def _writer(self, folder: Path) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # late: importing takes a second

        _silence_writer_threads()
        return SummaryWriter(str(folder), purge_step=self._purge_step)

    @contextlib.contextmanager
    def _into_tensorboard(self) -> Iterator[None]:
        """Run a block that writes to TensorBoard, and give TensorBoard up where it fails."""
        failed = True
        with self._degrading("TensorBoard"):
            yield
            failed = False
        if failed:  # its background thread is dead, so every later call would fail
            self._tensorboard = None

    @contextlib.contextmanager
    def _degrading(self, what: str) -> Iterator[None]:
        """Turn a failure to log into one warning for each destination.

        Every exception is caught, because TensorBoard may raise anything.
        """
        try:
            yield
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                logger.warning(
                    "%s in %s cannot be written, the run goes on: %s: %s",
                    what,
                    self.run_dir,
                    type(error).__name__,
                    error,
                )


def _silence_writer_threads() -> None:
    """Print no traceback where a thread of TensorBoard dies: the next call raises what it died of.

    That becomes one warning.
    """
    before = threading.excepthook
    if getattr(before, "__name__", "") == "of_others":
        return

    def of_others(died: threading.ExceptHookArgs) -> None:
        if not type(died.thread).__module__.startswith("tensorboard."):
            before(died)

    threading.excepthook = of_others


def _history_prefix(split: str, dataset: str | None) -> str:
    """Return what stands in front of a metric's name in `log_history`, as HF's Trainer has it."""
    return "" if split == "train" else f"{split}_{dataset}_" if dataset else f"{split}_"


def event_files(run_dir: Path) -> list[Path]:
    """List TensorBoard's files of a run, those of its charts too."""
    events = "events.out.tfevents.*"
    return [*run_dir.glob(events), *run_dir.glob(f"{FOLDER}/*/{events}")]


def wait_for_later_second(run_dir: Path) -> None:
    """Wait until a new file of TensorBoard sorts after those that are there, a second at most.

    Their names begin with the second in which they were made, then comes the process. TensorBoard
    reads them in the order of their names, and what a resume drops must come first.
    """
    names = (re.match(r"events\.out\.tfevents\.(\d+)", path.name) for path in event_files(run_dir))
    newest = max((int(match[1]) for match in names if match), default=0)
    while int(time.time()) == newest:
        time.sleep(0.02)


def cut_events(run_dir: Path, marks: Mapping[str, Any]) -> None:
    """Cut off what TensorBoard's files got after `marks` were taken, and remove later files."""
    for path in event_files(run_dir):
        size = marks.get(str(path.relative_to(run_dir)))
        if type(size) is not int or size <= 0:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)
    for folder in run_dir.glob(f"{FOLDER}/*/"):
        with contextlib.suppress(OSError):  # it still has points
            folder.rmdir()


def set_later_lines_aside(path: Path, step: int, size: Any = None) -> int:
    """Move the lines of later steps, and torn lines, of a JSONL log to `<name>.after-<step>.jsonl`.

    step: the last step whose lines stay. size: the bytes after which no line stays, None where that
    is not known. A size at which no line ends, as of a file that was edited, is not used.

    The lines are appended there first and then taken out of `path` by an atomic replace, so none is
    lost. Returns how many moved.
    """
    if not os.path.lexists(path):
        return 0
    aside = path.with_name(f"{path.stem}.after-{step}.jsonl")
    end = size if size is not None and _ends_a_line(path, size) else math.inf
    moved = place = 0
    with (
        written_whole(path) as temporary,
        open_plain(path) as source,
        open(temporary, "wb") as kept,
        contextlib.ExitStack() as stack,
    ):
        later = None
        while line := source.readline(LARGEST_LOG_LINE):
            place += len(line)
            # The last line may be torn exactly before its newline.
            line = line.rstrip(b"\n") + b"\n"
            row = _row_of(line)
            if row is not None and row["step"] <= step and place <= end:
                kept.write(line)
                continue
            later = later or stack.enter_context(open_plain(aside, "ab"))
            later.write(line)
            moved += 1
        for file in filter(None, (later, kept)):
            file.flush()
            os.fsync(file.fileno())
    return moved


def _ends_a_line(path: Path, size: Any) -> bool:
    """Tell whether a line of a file ends after `size` bytes."""
    with open_plain(path) as file:
        if type(size) is not int or not 0 <= size <= os.fstat(file.fileno()).st_size:
            return False
        file.seek(max(0, size - 1))
        return size == 0 or bool(file.read(1) == b"\n")


def _row_of(line: bytes) -> dict[str, Any] | None:
    """Parse a line of a log, None for one that is torn or has no step."""
    try:
        row = json.loads(line)
        return row | {"step": int(row["step"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
