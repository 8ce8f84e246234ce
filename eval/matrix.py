"""Evaluate every model with every prompt on every data set, and keep what is finished.

    python -m eval.matrix --model base=demo --model sft=runs/20260101-120000-sft --prompt demo \\
        --data_file a=demo:test-a b=demo:test-b --output_dir matrix

A model is a base (a folder or hub name) or the folder of an adapter, whose base and settings are
then its run's. The cell of a model and a prompt is <output_dir>/<model>.<prompt>/ with
predictions-<set>.jsonl and scores-<set>.json, as `python -m eval.evaluate` writes them, so a report
takes the cells as they are: python -m eval.report matrix/*. Started again with the same command, it
goes on after the last finished data set of a cell. Several ranks of torchrun share the images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import DataError, NameOrFile, named_files
from data.prompt_files import prompt_name, prompt_warnings
from data.prompts import PROMPTS
from data.sets import (
    bad_image_counts,
    bad_images_line,
    read_sets,
    read_training_examples,
    write_bad_images,
)
from engine.config import Resolved, UsageError, describe, parse_config, setting
from engine.inherited import settings_of_adapter
from engine.runtime import (
    SignalGuard,
    check_lock,
    check_writable,
    environment_banner,
    lock_run,
    main_guard,
    read_by_first,
)
from engine.settings import ENGINE, PROMPT_HELP
from eval.folders import made_folder, read_record, result_files
from eval.go_on import evaluation_record, finished_sets, read_partial
from eval.scores import format_scores
from eval.settings import DecodingConfig, EvalConfig, complete, decoding_problems, with_precision

if TYPE_CHECKING:
    import torch

    from engine.ranks import Ranks


@dataclass(frozen=True)
class MatrixConfig(DecodingConfig):
    """Hold the flags of `python -m eval.matrix`."""

    model: tuple[str, ...] = setting(
        (),
        "models, each NAME=BASE (a folder, a hub name, 'demo' or 'demo-gemma') or NAME=FOLDER of an"
        " adapter",
    )
    prompt: tuple[NameOrFile, ...] = setting((), f"one or more. {PROMPT_HELP}")
    output_dir: str | None = setting(
        None, "folder of the cells; one that holds some goes on", unset="it must be given"
    )
    vision_cache_gb: float = setting(
        4.0,
        "host memory for image features: a model's second prompt needs no second look at an image",
        unit="GB",
        source=ENGINE,
        within="[0, 1000000]",
    )


def config_problems(config: MatrixConfig) -> list[str]:
    """Check the values of one command line, beyond their types -> problems, one line each."""
    needed = {
        "model": "NAME=BASE or NAME=ADAPTER",
        "prompt": f"one or more of {', '.join(PROMPTS)}, or .toml files",
        "data_file": "NAME=FILE",
        "output_dir": "a folder for the cells",
    }
    problems = [
        f"--{name} is missing: give {what}"
        for name, what in needed.items()
        if not getattr(config, name)
    ]
    problems += named_files(config.model, "model")[1]
    problems += [
        f"--prompt {name} is given twice"
        for name, count in Counter(map(prompt_name, config.prompt)).items()
        if count > 1
    ]
    return problems + decoding_problems(config, list(dict.fromkeys(config.prompt)))


@dataclass(frozen=True)
class MatrixCell:
    """Describe one model with one prompt: how it is evaluated, where, and what is still to do."""

    model: str
    folder: Path
    resolved: Resolved
    records: Mapping[str, dict[str, Any]]  # by data set: the "run" of its scores
    missing: tuple[str, ...]

    @property
    def config(self) -> EvalConfig:
        """Return the cell's settings, as those of a single evaluation."""
        return self.resolved.configs[0]

    def record(self) -> dict[str, Any]:
        """Write it all in values that JSON keeps, for another rank (`of_record`)."""
        shared = {"model": self.model, "folder": str(self.folder), "records": dict(self.records)}
        return shared | {"resolved": self.resolved.record(), "missing": self.missing}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> MatrixCell:
        """Make again what `record` wrote."""
        resolved = Resolved.of_record([EvalConfig], record["resolved"])
        folder, missing = Path(record["folder"]), tuple(record["missing"])
        return cls(record["model"], folder, resolved, record["records"], missing)


def plan(
    resolved: Resolved,
    files: Mapping[str, Path],
    bad_images: Mapping[str, list[dict[str, Any]]],
    device: torch.device,
) -> list[MatrixCell]:
    """List every cell, model by model, with the data sets that are still to do.

    files: {data set: its file}. bad_images: {data set: rows of the examples left out}.

    Raises UsageError for a finished cell that was made with other settings or other data.
    """
    config: MatrixConfig = resolved.configs[0]
    cells, problems = [], []
    for model, path in named_files(config.model, "model")[0].items():
        for prompt in config.prompt:
            one = _evaluation(resolved, path, prompt, device)
            records = {
                name: evaluation_record(one, name, file, bad_images[name])
                for name, file in files.items()
            }
            folder = Path(str(config.output_dir)) / f"{model}.{prompt_name(prompt)}"
            try:
                finished = finished_sets(folder, records)
                for name in files:
                    read_partial(folder, name, records[name])
            except UsageError as error:
                problems += error.problems
                continue
            missing = tuple(name for name in files if name not in finished)
            cells.append(MatrixCell(model, folder, one, records, missing))
    if problems:
        raise UsageError(problems)
    return cells


def _evaluation(
    resolved: Resolved, model: str, prompt: NameOrFile, device: torch.device
) -> Resolved:
    """Put a cell's settings together, as the command line of a single evaluation would."""
    config: MatrixConfig = resolved.configs[0]
    is_adapter = (Path(model) / "adapter_config.json").is_file()
    given: dict[str, Any] = {
        "adapter_name_or_path" if is_adapter else "model_name_or_path": model,
        "prompt": prompt,
    }
    shared = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(DecodingConfig)
    }
    origins = {
        field.name: resolved.origins[field.name] if field.name in shared else "default"
        for field in dataclasses.fields(EvalConfig)
    }
    one = Resolved((EvalConfig(**shared, **given),), origins | dict.fromkeys(given, "flag"))
    return with_precision(complete(one), device)


# ---- run -----------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 usage or data, 130 or 143 a signal."""
    given = sys.argv[1:] if argv is None else argv
    return main_guard(lambda: _run(given), errors=(DataError,), of_ranks=True)


def _run(argv: Sequence[str]) -> int:
    resolved = read_by_first(_resolve, argv)
    # torch and transformers take seconds to import: not before the command line is accepted
    from engine.ranks import on_this_rank

    return on_this_rank(_fill, resolved, MatrixConfig)


def _resolve(argv: Sequence[str]) -> Resolved:
    """Read the command line, and check what can be known of it without a model."""
    resolved = parse_config(
        [MatrixConfig],
        argv,
        script="eval",
        prog="python -m eval.matrix",
        validate=config_problems,
        description=(
            "Evaluate every model with every prompt on every data set; finished cells are kept."
        ),
    )
    folder = Path(str(resolved.configs[0].output_dir))
    check_writable(folder)
    check_lock(folder)
    return _with_labels_of_models(resolved)


def _with_labels_of_models(resolved: Resolved) -> Resolved:
    """Take over the label file of the adapters' runs where none is given.

    Raises UsageError where two adapters were trained on other labels: one set is read for all.
    """
    config: MatrixConfig = resolved.configs[0]
    if config.label_file is not None:
        return resolved
    known = {
        name: settings_of_adapter(path, ("label_file",), config).get("label_file")
        for name, path in named_files(config.model, "model")[0].items()
        if (Path(path) / "adapter_config.json").is_file()
    }
    if len(set(known.values())) > 1:
        trained = ", ".join(f"{name} on {kept or 'the 14'}" for name, kept in known.items())
        raise UsageError(f"--model: the adapters were trained on other labels ({trained})")
    kept = next(iter(known.values()), None)
    return resolved if kept is None else resolved.with_value("label_file", kept, "adapter's run")


def _fill(resolved: Resolved, ranks: Ranks) -> int:
    """Evaluate what is missing of every cell, one model in memory at a time.

    Rank 0 alone looks at what is there, writes and shows.
    """
    from engine.device import pick_device
    from engine.fit import advise_answers, fitted_answers
    from eval.decode import Decoding, evaluate_sets, load_policy, note_cuts, note_fitted

    config: MatrixConfig = resolved.configs[0]
    named, _ = named_files(config.data_file, "data_file")
    read = partial(
        read_sets,
        named,
        config.image_root,
        config.bad_images,
        max_samples=config.max_samples,
        label_set=config.label_set,
    )
    files, sets, bad_images = ranks.first_then_others(read)  # the demo's are drawn first
    baseline_examples = read_training_examples(
        config.train_file, config.image_root, config.label_set
    )
    device = pick_device(ranks=ranks)
    cells = _told(plan(resolved, files, bad_images, device) if ranks.first else [], ranks)
    print(
        f"{len(cells)} cells x {len(sets)} data sets, {sum(len(cell.missing) for cell in cells)} to"
        f" do{bad_images_line(bad_images)}\n{describe(resolved)}",
        flush=True,
    )
    warnings = (
        line for cell in cells for line in prompt_warnings(cell.config.prompt, config.label_set)
    )
    for line in dict.fromkeys(warnings):
        print(f"warning: {line}", file=sys.stderr)
    left_out = bad_image_counts(sets, bad_images)
    with contextlib.ExitStack() as held, SignalGuard() as guard:
        if ranks.first:
            output_dir = made_folder(str(config.output_dir))
            held.enter_context(lock_run(output_dir))
            write_bad_images(output_dir, bad_images)
        policy, loaded = None, ""
        for cell in cells:
            if not cell.missing:
                continue
            if policy is None or loaded != cell.model:
                policy = None  # before the next is loaded: two would not fit
                device = pick_device(cell.config.num_threads, ranks, cell.config.tf32)
                print(environment_banner(device), flush=True)
                fitted = fitted_answers(cell.resolved, device, sets, ranks)
                fitting: EvalConfig = fitted.configs[0]
                policy = load_policy(fitting, device, vision_cache_gb=config.vision_cache_gb)
                advise_answers(policy.limits, fitting, device, sets)
                loaded = cell.model
            note_fitted(fitted, cell.records)
            note_cuts(policy.limits, cell.records)
            print(f"{cell.folder}: {', '.join(cell.missing)}", flush=True)
            try:
                evaluate_sets(
                    dataclasses.replace(policy, prompt=cell.config.instruction),
                    {name: sets[name] for name in cell.missing},
                    dataclasses.replace(
                        Decoding.of(cell.config), batch_size=fitting.per_device_eval_batch_size
                    ),
                    cell.folder,
                    baseline_examples=baseline_examples,
                    notes={
                        name: {"run": cell.records[name]} | left_out[name] for name in cell.missing
                    },
                    records=cell.records,
                    should_stop=lambda: guard.stop is not None,
                    ranks=ranks,
                )
            except KeyboardInterrupt as stop:
                print("stopped; the same command goes on")
                return guard.exit_code_after(stop, ranks.gather)
    ranks.on_first(lambda: _show(cells, list(sets)))
    return 0


def _told(cells: Sequence[MatrixCell], ranks: Ranks) -> Sequence[MatrixCell]:
    """Give the cells that rank 0 has planned to all."""
    if ranks.size == 1:
        return cells
    records = ranks.from_first([cell.record() for cell in cells])
    return [MatrixCell.of_record(record) for record in records]


def _show(cells: Sequence[MatrixCell], names: Sequence[str]) -> None:
    for cell in cells:
        results = {name: read_record(result_files(cell.folder, name)[1]) for name in names}
        print(f"\n{cell.folder}\n{format_scores(results)}")
    folders = [f"{cell.folder.name}={cell.folder}" for cell in cells]
    command = ["python", "-m", "eval.report", *folders, "--output_dir", "FOLDER"]
    print(f"\nnext: {shlex.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
