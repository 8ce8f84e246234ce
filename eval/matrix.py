"""Every model with every prompt on every data set, one folder a cell; what is finished is not done
again.

    python -m eval.matrix --model base=demo --model sft=runs/20260101-120000-sft --prompt demo
    --data_file a=demo:test-a b=demo:test-b \\
        --output_dir matrix

A model is a base (a folder or hub name) or the folder of an adapter, whose base and settings are
then its run's. The cell of a model and a prompt is <output_dir>/<model>.<prompt>/ with
predictions-<set>.jsonl and scores-<set>.json, as `python -m eval.evaluate` writes them, so a report
takes the cells as they are: python -m eval.report matrix/*. Started again with the same command, it
goes on after the last finished data set of a cell.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.examples import Example, data_file, read_examples, read_jsonl
from data.files import DataError
from data.prompts import PROMPTS
from engine.config import ConfigError, Resolved, UsageError, describe, parse_config, setting
from engine.generate import SamplingConfig
from engine.model import LoadedModel, attach_adapter, load_model
from engine.run import bad_image_counts, bad_images_line, usable_examples, write_bad_images
from engine.runtime import (
    SignalGuard,
    base_dtype,
    environment_banner,
    lock_run,
    main_guard,
    pick_device,
)
from engine.settings import ENGINE, OURS, PAPER_GRPO, BadImages
from eval.evaluate import (
    EvalConfig,
    complete,
    evaluate_sets,
    evaluation_record,
    finished_sets,
    format_scores,
    named_files,
    read_partial,
)
from eval.evaluate import config_problems as evaluation_problems
from eval.folders import read_record


@dataclass(frozen=True)
class MatrixConfig:
    """Flags of `python -m eval.matrix`. What is not given is the adapter's run's, as in `python -m
    eval.evaluate`.
    """

    model: tuple[str, ...] = setting(
        (),
        "models, each NAME=BASE (a folder, a hub name, 'demo' or 'demo-gemma') or NAME=FOLDER of an"
        " adapter",
    )
    prompt: tuple[str, ...] = setting((), f"instructions: {', '.join(PROMPTS)}")
    data_file: tuple[str, ...] = setting(
        (), "data sets, each NAME=FILE (JSONL) or NAME=demo:SPLIT", aliases=("validation_file",)
    )
    output_dir: str | None = setting(
        None, "folder of the cells; one that holds some goes on", unset="it must be given"
    )
    image_root: str | None = setting(
        None, "folder that image paths are relative to", unset="each data file's own folder"
    )
    bad_images: BadImages = setting(
        "fail",
        "an unreadable image stops the command; or skip: all images are read first, and the"
        " examples of bad ones are left out of every cell and listed in bad-images-<name>.jsonl",
        source=ENGINE,
    )
    train_file: str | None = setting(
        None,
        "training data whose label frequencies the baselines imitate",
        unset="each data set's own frequencies",
    )
    max_samples: int | None = setting(
        None, "use only the first so many rows of each data set", unset="all", unit="rows"
    )
    temperature: float = setting(0.0, "of the sampler; 0 is greedy decoding", source=OURS)
    top_p: float = setting(
        0.95, "nucleus of the sampler; no effect at temperature 0", source=PAPER_GRPO
    )
    max_completion_length: int | None = setting(
        None,
        "where a completion is cut",
        unset="the adapter's run's, else 512",
        unit="tokens",
        source=OURS,
    )
    per_device_eval_batch_size: int = setting(
        8, "images decoded together; changes no answer", unit="images", source=ENGINE
    )
    min_visual_tokens: int | None = setting(
        None,
        "an image is enlarged to at least this many visual tokens",
        unset="the adapter's run's, else 256",
        unit="tokens",
    )
    max_visual_tokens: int | None = setting(
        None,
        "an image is reduced to at most this many visual tokens",
        unset="the adapter's run's, else 512",
        unit="tokens",
    )
    vision_cache_gb: float = setting(
        4.0,
        "host memory for image features: a model's second prompt needs no second look at an image",
        unit="GB",
        source=ENGINE,
    )
    vision_cache_dir: str | None = setting(
        None,
        "folder that keeps image features across runs, by tower, processor and image; only ever"
        " grows",
        unset="none",
        source=ENGINE,
    )
    num_threads: int | None = setting(
        None,
        "CPU threads of torch",
        unset="the adapter's run's, else torch's own choice",
        unit="threads",
    )
    bf16: bool | None = setting(
        None,
        "base model in bfloat16 rather than float32",
        unset="the adapter's run's, else true on a GPU and false on a CPU",
    )
    seed: int = setting(0, "of the sampler, the intervals and the random baseline", source=ENGINE)


def config_problems(config: MatrixConfig) -> list[str]:
    """What is wrong with the values of one command line, beyond their types."""
    needed = {
        "model": "NAME=BASE or NAME=ADAPTER",
        "prompt": f"one or more of {', '.join(PROMPTS)}",
        "data_file": "NAME=FILE",
        "output_dir": "a folder for the cells",
    }
    problems = [
        f"--{name} is missing: give {what}"
        for name, what in needed.items()
        if not getattr(config, name)
    ]
    problems += named_files(config.model, "model")[1]
    if not config.vision_cache_gb >= 0:
        problems.append(
            f"--vision_cache_gb is {config.vision_cache_gb}; it must not be negative (0 keeps"
            " nothing)"
        )
    problems += [
        f"--prompt {name} is given twice"
        for name in {name for name in config.prompt if config.prompt.count(name) > 1}
    ]
    if not problems:  # the rest is what one evaluation would say
        problems = [
            problem
            for prompt in config.prompt
            for problem in evaluation_problems(_evaluation(config, "demo", prompt))
        ]
    return list(dict.fromkeys(problems))


_SHARED = (
    "data_file",
    "image_root",
    "bad_images",
    "train_file",
    "max_samples",
    "temperature",
    "top_p",
    "max_completion_length",
    "per_device_eval_batch_size",
    "min_visual_tokens",
    "max_visual_tokens",
    "vision_cache_dir",
    "num_threads",
    "bf16",
    "seed",
)


def _evaluation(config: MatrixConfig, model: str, prompt: str) -> EvalConfig:
    is_adapter = (Path(model) / "adapter_config.json").is_file()
    named = {"adapter_name_or_path": model} if is_adapter else {"model_name_or_path": model}
    return EvalConfig(**named, prompt=prompt, **{name: getattr(config, name) for name in _SHARED})


@dataclass(frozen=True)
class MatrixCell:
    """One model with one prompt: how it is evaluated, where, and the data sets that are still to
    do.
    """

    model: str
    folder: Path
    resolved: Resolved
    records: Mapping[str, dict]  # by data set: the "run" of its scores
    missing: tuple[str, ...]

    @property
    def config(self) -> EvalConfig:
        return self.resolved.configs[0]


def plan(
    resolved: Resolved, files: Mapping[str, Path], bad_images: Mapping[str, list[dict]]
) -> list[MatrixCell]:
    """Every cell, by model. Raises UsageError for a finished one that was made with other settings
    or other data.
    """
    config: MatrixConfig = resolved.configs[0]
    cells, problems = [], []
    for model, path in named_files(config.model, "model")[0].items():
        for prompt in config.prompt:
            evaluation = _evaluation(config, path, prompt)
            origins = {
                name: resolved.origins.get(
                    name, "flag" if name.endswith("_name_or_path") else "default"
                )
                for name in EvalConfig.__dataclass_fields__
            }
            one = complete(Resolved((evaluation,), origins, None))
            records = {
                name: evaluation_record(one, name, file, bad_images[name])
                for name, file in files.items()
            }
            folder = Path(config.output_dir) / f"{model}.{prompt}"
            try:
                finished = finished_sets(folder, records)
                for name in files:
                    read_partial(folder, name, records[name])
            except UsageError as error:
                problems += error.problems
                continue
            cells.append(
                MatrixCell(
                    model,
                    folder,
                    one,
                    records,
                    tuple(name for name in files if name not in finished),
                )
            )
    if problems:
        raise UsageError(problems)
    return cells


# ---- run -----------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 usage or data, 130 or 143 after a signal."""
    return main_guard(lambda: _run(sys.argv[1:] if argv is None else argv), errors=(DataError,))


def _run(argv: Sequence[str]) -> int:
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
    files = {
        name: data_file(spec)
        for name, spec in named_files(config.data_file, "data_file")[0].items()
    }
    sets = {
        name: read_jsonl(file, config.image_root)[: config.max_samples]
        for name, file in files.items()
    }
    sets, bad_images = usable_examples(sets, config.bad_images)
    reference = (
        None if config.train_file is None else read_examples(config.train_file, config.image_root)
    )
    cells = plan(resolved, files, bad_images)
    todo = [cell for cell in cells if cell.missing]
    print(
        f"{len(cells)} cells x {len(sets)} data sets, {sum(len(cell.missing) for cell in cells)} to"
        f" do{bad_images_line(bad_images)}\n{describe(resolved)}",
        flush=True,
    )
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir}: cannot be used: {error.strerror}") from error
    with lock_run(output_dir), SignalGuard() as guard:
        write_bad_images(output_dir, bad_images)
        loaded: tuple[str, LoadedModel, object] | None = None
        for cell in todo:
            if loaded is None or loaded[0] != cell.model:
                loaded = None  # before the next is loaded: two would not fit
                loaded = (cell.model, *_load(cell, config.vision_cache_gb))
            try:
                _fill(cell, *loaded[1:], sets, bad_image_counts(sets, bad_images), reference, guard)
            except KeyboardInterrupt:
                print("stopped; the same command goes on")
                return guard.exit_code or 130
    for cell in cells:
        print(
            f"\n{cell.folder}\n"
            + format_scores(
                {name: read_record(cell.folder / f"scores-{name}.json") for name in sets}
            )
        )
    print(
        "\nnext: python -m eval.report "
        + " ".join(f"{cell.folder.name}={cell.folder}" for cell in cells)
        + " --output_dir FOLDER"
    )
    return 0


def _load(cell: MatrixCell, vision_cache_gb: float) -> tuple[LoadedModel, object]:
    config = cell.config
    device = pick_device(config.num_threads)
    bf16 = device.type == "cuda" if config.bf16 is None else config.bf16
    print(environment_banner(device), flush=True)
    model = load_model(
        config.model_name_or_path,
        dtype=base_dtype(bf16, device),
        device=device,
        min_visual_tokens=config.min_visual_tokens,
        max_visual_tokens=config.max_visual_tokens,
        vision_cache_gb=vision_cache_gb,
        vision_cache_dir=config.vision_cache_dir,
    )
    return model, (
        model.base
        if config.adapter_name_or_path is None
        else attach_adapter(model, config.adapter_name_or_path)
    )


def _fill(
    cell: MatrixCell,
    model: LoadedModel,
    wrapped: object,
    sets: Mapping[str, list[Example]],
    counts: Mapping[str, dict],
    reference: list[Example] | None,
    guard: SignalGuard,
) -> None:
    config = cell.config
    print(f"{cell.folder}: {', '.join(cell.missing)}", flush=True)
    evaluate_sets(
        wrapped,
        model,
        {name: sets[name] for name in cell.missing},
        PROMPTS[config.prompt],
        SamplingConfig(config.temperature, config.top_p, config.max_completion_length),
        cell.folder,
        batch_size=config.per_device_eval_batch_size,
        answer_format=config.answer_format,
        reference=reference,
        seed=config.seed,
        notes={name: {"run": cell.records[name]} | counts[name] for name in cell.missing},
        resumable=cell.records,
        should_stop=lambda: guard.stop is not None,
    )


if __name__ == "__main__":
    sys.exit(main())
