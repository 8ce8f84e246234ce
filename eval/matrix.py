"""Evaluate every model with every prompt on every data set, and keep what is finished.

    python -m eval.matrix --model base=demo --model sft=runs/20260101-120000-sft --prompt demo \\
        --data_file a=demo:test-a b=demo:test-b --output_dir matrix

A model is a base (a folder or hub name), the folder of an adapter, whose base and settings are then
its run's, or served:NAME, what the server of --vllm_server_base_url has under that name. The cell
of a model and a prompt is <output_dir>/<model>.<prompt>/ with predictions-<set>.jsonl and
scores-<set>.json, as `python -m eval.evaluate` writes them, so a report takes the cells as they
are: python -m eval.report matrix/*. Started again with the same command, it goes on after the last
finished data set of a cell. Several ranks of torchrun share the images, unless a server answers.
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
from data.sets import bad_images_line, write_bad_images
from engine.config import (
    ConfigError,
    Resolved,
    UsageError,
    describe,
    parse_config,
    setting,
)
from engine.inherited import settings_of_adapter
from engine.launch import ONE_PROCESS, Launch, OneProcess
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
from eval.answering import Decoding, EvaluationData, Predict, answer_sets
from eval.folders import made_folder, read_record, result_files
from eval.go_on import finished_sets, read_partial
from eval.scores import format_scores
from eval.served import ONE_ASKS, ServedModel, notes_on
from eval.settings import (
    OF_ENGINE,
    OF_SERVER,
    DecodingConfig,
    EvalConfig,
    complete,
    decoding_problems,
    engine_problems,
    with_precision,
)

if TYPE_CHECKING:
    import torch

    from engine.policy import Policy

SERVED = "served:"  # in front of the name that a server has for a model


@dataclass(frozen=True)
class MatrixConfig(DecodingConfig):
    """Hold the flags of `python -m eval.matrix`."""

    model: tuple[str, ...] = setting(
        (),
        "models, each NAME=BASE (a folder, a hub name, 'demo' or 'demo-gemma'), NAME=FOLDER of an"
        " adapter, or NAME=served:ITS_NAME, a model of the server (--vllm_server_base_url)",
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


def served_name(model: str) -> str:
    """Return the name that a server has for a model, "" for one of the engine's own."""
    return model.removeprefix(SERVED) if model.startswith(SERVED) else ""


def all_served(config: MatrixConfig) -> bool:
    """Tell whether a server answers for all models, so that none is loaded."""
    return all(map(served_name, named_files(config.model, "model")[0].values()))


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
    models, found = named_files(config.model, "model")
    problems += found + [
        f"--model {name}={SERVED}: give the name that the server has for the model"
        for name, path in models.items()
        if path == SERVED
    ]
    served = any(map(served_name, models.values()))
    if served and config.vllm_server_base_url is None:
        problems.append(f"--model NAME={SERVED}ITS_NAME: needs --vllm_server_base_url URL")
    elif config.vllm_server_base_url is not None and not served:
        problems.append(
            f"--vllm_server_base_url: no --model is of a server; write NAME={SERVED}ITS_NAME"
        )
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
    served: ServedModel | None = None  # what answers, where a server does

    @property
    def config(self) -> EvalConfig:
        """Return the cell's settings, as those of a single evaluation."""
        return self.resolved.configs[0]

    def record(self) -> dict[str, Any]:
        """Write all in values that JSON keeps, for another rank (`of_record`): none is served."""
        shared = {"model": self.model, "folder": str(self.folder), "records": dict(self.records)}
        return shared | {"resolved": self.resolved.record(), "missing": self.missing}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> MatrixCell:
        """Make again what `record` wrote."""
        resolved = Resolved.of_record([EvalConfig], record["resolved"])
        folder, missing = Path(record["folder"]), tuple(record["missing"])
        return cls(record["model"], folder, resolved, record["records"], missing)


def plan(
    resolved: Resolved, data: EvaluationData, device: torch.device | None = None
) -> list[MatrixCell]:
    """List every cell, model by model, with the data sets that are still to do.

    device: where the engine's own models run. None where a server answers for all.

    Raises UsageError for a finished cell that was made with other settings or other data, and for
    a name that the server does not have.
    """
    config: MatrixConfig = resolved.configs[0]
    cells, problems = [], []
    for model, path in named_files(config.model, "model")[0].items():
        for prompt in config.prompt:
            folder = Path(str(config.output_dir)) / f"{model}.{prompt_name(prompt)}"
            one, served, server = _evaluation(resolved, path, prompt), None, None
            if device is not None and not served_name(path):
                one = with_precision(one, device)
            try:
                if served_name(path):
                    served = ServedModel.of(one.configs[0])
                    server = served.record(Decoding.of(one.configs[0]))
                records = data.records(one, server)
                finished = finished_sets(folder, records)
                for name in records:
                    read_partial(folder, name, records[name])
            except UsageError as error:
                problems += error.problems
                continue
            missing = tuple(name for name in records if name not in finished)
            cells.append(MatrixCell(model, folder, one, records, missing, served))
    if problems:
        raise UsageError(list(dict.fromkeys(problems)))  # a name is looked up for each prompt
    return cells


def _evaluation(resolved: Resolved, model: str, prompt: NameOrFile) -> Resolved:
    """Put a cell's settings together, as the command line of a single evaluation would."""
    config: MatrixConfig = resolved.configs[0]
    name = served_name(model)
    is_adapter = not name and (Path(model) / "adapter_config.json").is_file()
    given: dict[str, Any] = {
        "adapter_name_or_path" if is_adapter else "model_name_or_path": name or model,
        "prompt": prompt,
    }
    shared = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(DecodingConfig)
        if field.name not in (OF_ENGINE if name else OF_SERVER)
    }
    origins = {
        field.name: resolved.origins[field.name] if field.name in shared else "default"
        for field in dataclasses.fields(EvalConfig)
    }
    one = Resolved((EvalConfig(**shared, **given),), origins | dict.fromkeys(given, "flag"))
    return complete(one)


# ---- run -----------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 usage or data, 130 or 143 a signal."""
    given = sys.argv[1:] if argv is None else argv
    return main_guard(lambda: _run(given), errors=(DataError,), of_ranks=True)


def _run(argv: Sequence[str]) -> int:
    resolved = read_by_first(_resolve, argv)
    if resolved is not None and all_served(resolved.configs[0]):
        return _fill(resolved, ONE_PROCESS)
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
    config: MatrixConfig = resolved.configs[0]
    if all_served(config) and (problems := engine_problems(resolved, ("vision_cache_gb",))):
        raise ConfigError(problems)
    if config.vllm_server_base_url is not None and Launch.of().size > 1:
        raise UsageError(ONE_ASKS)
    folder = Path(str(config.output_dir))
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


def _fill(resolved: Resolved, ranks: OneProcess) -> int:
    """Evaluate what is missing of every cell, one model in memory at a time.

    Rank 0 alone looks at what is there, writes and shows. ranks: `Ranks` where any model is loaded.
    """
    config: MatrixConfig = resolved.configs[0]
    data = ranks.first_then_others(partial(EvaluationData.read, config))  # it may draw the demo's
    engine = None if all_served(config) else _Engine(config, data, ranks)
    device = None if engine is None else engine.device
    cells = _told(plan(resolved, data, device) if ranks.first else [], ranks)
    _announce(resolved, data, cells)
    with contextlib.ExitStack() as held, SignalGuard() as guard:
        if ranks.first:
            output_dir = made_folder(str(config.output_dir))
            held.enter_context(lock_run(output_dir))
            write_bad_images(output_dir, data.bad_images)
        for cell in cells:
            if not cell.missing:
                continue
            predict, decoding = (
                _of_server(cell) if engine is None or cell.served is not None else engine.of(cell)
            )
            print(f"{cell.folder}: {', '.join(cell.missing)}", flush=True)
            try:
                answer_sets(
                    predict,
                    {name: data.sets[name] for name in cell.missing},
                    decoding,
                    cell.folder,
                    baseline_examples=data.baseline_examples,
                    notes=data.notes(cell.records),
                    records=cell.records,
                    should_stop=lambda: guard.stop is not None,
                    ranks=ranks,
                )
            except KeyboardInterrupt as stop:
                print("stopped; the same command goes on")
                return guard.exit_code_after(stop, ranks.gather)
    ranks.on_first(lambda: _show(cells, list(data.sets)))
    return 0


def _announce(resolved: Resolved, data: EvaluationData, cells: Sequence[MatrixCell]) -> None:
    """Say how much there is to do, and with which settings."""
    config: MatrixConfig = resolved.configs[0]
    todo = sum(len(cell.missing) for cell in cells)
    print(
        f"{len(cells)} cells x {len(data.sets)} data sets, {todo} to"
        f" do{bad_images_line(data.bad_images)}\n{describe(resolved)}",
        flush=True,
    )
    warnings = (
        line for cell in cells for line in prompt_warnings(cell.config.prompt, config.label_set)
    )
    for line in dict.fromkeys(warnings):
        print(f"warning: {line}", file=sys.stderr)


def _of_server(cell: MatrixCell) -> tuple[Predict, Decoding]:
    """Find what answers a cell on its server, and how it is to decode."""
    assert cell.served is not None, "the engine answers for all others"
    print(cell.served.banner(), flush=True)
    return cell.served.predict, Decoding.of(cell.config)


class _Engine:
    """Answer with the engine's own models, one in memory at a time.

    device: where they run.
    """

    def __init__(self, config: MatrixConfig, data: EvaluationData, ranks: OneProcess):
        """Hold no model yet."""
        from engine.device import pick_device
        from engine.ranks import Ranks

        assert isinstance(ranks, Ranks), "a command that loads models runs among ranks"
        self.device = pick_device(ranks=ranks)
        self._config, self._data, self._ranks = config, data, ranks
        self._held: tuple[str, Policy, Resolved] | None = None  # a model's name, it, its settings

    def of(self, cell: MatrixCell) -> tuple[Predict, Decoding]:
        """Load a cell's model unless it is there -> (what answers, how it is to decode)."""
        from eval.decode import note_cuts, note_fitted, predict

        if self._held is None or self._held[0] != cell.model:
            self._held = None  # before the next is loaded: two would not fit
            self._held = cell.model, *self._loaded(cell)
        _, policy, fitted = self._held
        note_fitted(fitted, cell.records)
        note_cuts(policy.limits, cell.records)
        rows = fitted.configs[0].per_device_eval_batch_size
        decoding = dataclasses.replace(Decoding.of(cell.config), batch_size=rows)
        return partial(
            predict, dataclasses.replace(policy, prompt=cell.config.instruction)
        ), decoding

    def _loaded(self, cell: MatrixCell) -> tuple[Policy, Resolved]:
        """Load a cell's model, with what the memory forecast makes of its settings."""
        from engine.device import pick_device
        from engine.fit import advise_answers, fitted_answers
        from eval.decode import load_policy

        sets, ranks = self._data.sets, self._ranks
        device = pick_device(cell.config.num_threads, ranks, cell.config.tf32)
        print(environment_banner(device), flush=True)
        fitted = fitted_answers(cell.resolved, device, sets, ranks)
        config: EvalConfig = fitted.configs[0]
        policy = load_policy(config, device, vision_cache_gb=self._config.vision_cache_gb)
        advise_answers(policy.limits, config, device, sets)
        return policy, fitted


def _told(cells: Sequence[MatrixCell], ranks: OneProcess) -> Sequence[MatrixCell]:
    """Give the cells that rank 0 has planned to all."""
    if ranks.size == 1:
        return cells
    records = ranks.from_first([cell.record() for cell in cells])
    return [MatrixCell.of_record(record) for record in records]


def _show(cells: Sequence[MatrixCell], names: Sequence[str]) -> None:
    for cell in cells:
        results = {name: read_record(result_files(cell.folder, name)[1]) for name in names}
        print(f"\n{cell.folder}\n{format_scores(results)}")
        for line in notes_on(cell.folder, names if cell.served is not None else ()):
            print(line)
    folders = [f"{cell.folder.name}={cell.folder}" for cell in cells]
    command = ["python", "-m", "eval.report", *folders, "--output_dir", "FOLDER"]
    print(f"\nnext: {shlex.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
