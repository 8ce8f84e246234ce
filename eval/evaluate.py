"""Decode data sets, score and keep the answers, or score kept answers again without a model.

    python -m eval.evaluate --adapter_name_or_path runs/20260101-120000-grpo \\
        --data_file nih=nih/test.jsonl
    python -m eval.evaluate --label_map nih_ten \\
        --predictions nih=runs/20260101-130000-eval/predictions-nih.jsonl
    python -m eval.evaluate --predictions rollouts=runs/20260101-120000-grpo/completions.jsonl
    python -m eval.evaluate --predictions nih=answers.jsonl --data_file nih=nih/test.jsonl
    python -m eval.evaluate --vllm_server_base_url http://127.0.0.1:8000 \\
        --model_name_or_path NAME --data_file nih=nih/test.jsonl
    torchrun --standalone --nproc_per_node 8 -m eval.evaluate --adapter_name_or_path ...

The first command writes predictions-nih.jsonl (one row an image, the completion as it came) and
scores-nih.json. Rows read back from a file are parsed anew, so a changed parser or metric applies
to old predictions too. --label_map takes the truth anew from their source_labels. The rows of a
run's rollouts are scored like any others: each completion counts once. Answers of any other model,
rows {"id", "completion"}, are joined with the data file that they answer. A server answers in the
place of a model that is loaded here (served.py). Several ranks of torchrun share the images that
are decoded.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.examples import Example, data_file, read_jsonl
from data.files import DataError, KeptFile, named_files, sha256_of, write_json
from data.join import read_answers
from data.label_sets import label_lines
from data.labels import CHEXPERT
from data.predictions import Prediction, first_label_set, read_predictions, relabel
from data.prompt_files import prompt_warnings
from data.sets import (
    bad_images_line,
    read_training_examples,
    write_bad_images,
)
from engine.config import Resolved, UsageError, describe, parse_config
from engine.launch import ONE_PROCESS, Launch
from engine.resume import run_record
from engine.runtime import (
    SignalGuard,
    check_writable,
    environment_banner,
    main_guard,
    read_by_first,
    run_directory,
)
from eval.answering import Decoding, EvaluationData, answer_sets
from eval.end_table import stage_title
from eval.faithfulness import format_faithfulness
from eval.folders import (
    load_entry,
    made_folder,
    more_files,
    read_record,
    refuse_existing,
    result_files,
    write_results,
)
from eval.go_on import finished_sets, read_partial
from eval.group_tables import format_groups
from eval.probabilities import format_probabilities, operating_points
from eval.record import scores_record
from eval.scores import format_scores
from eval.served import ONE_ASKS, ServedModel, notes_on
from eval.settings import (
    EvalConfig,
    complete,
    config_problems,
    is_given,
    joined_files,
    with_precision,
)
from eval.votes import format_samples, samples_of_file, vote, vote_predictions

if TYPE_CHECKING:
    from engine.ranks import Ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 usage or data, 130 or 143 a signal."""
    given = sys.argv[1:] if argv is None else argv
    return main_guard(lambda: _run(given), errors=(DataError,), of_ranks=True)


def _run(argv: Sequence[str]) -> int:
    resolved = read_by_first(_resolve, argv)
    if resolved is not None and resolved.configs[0].predictions:
        return _score_again(resolved)
    if resolved is not None and resolved.configs[0].vllm_server_base_url is not None:
        return _ask_and_score(resolved)
    # torch and transformers take seconds to import: not before the command line is accepted
    from engine.ranks import on_this_rank

    return on_this_rank(_decode_and_score, resolved, EvalConfig)


def _resolve(argv: Sequence[str]) -> Resolved:
    """Read the command line, and check what can be known of it without a model."""
    resolved = parse_config(
        [EvalConfig],
        argv,
        script="eval",
        prog="python -m eval.evaluate",
        validate=config_problems,
        description=(
            "Decode data sets with a model and score the answers, or score kept answers again."
        ),
    )
    config: EvalConfig = resolved.configs[0]
    check_writable("runs" if config.output_dir is None else config.output_dir)
    if config.output_dir is not None:
        names = named_files(config.predictions, "predictions")[0]
        refuse_existing(
            [
                file
                for name in names
                for file in (
                    *result_files(config.output_dir, name),
                    *more_files(config.output_dir, name).values(),
                )
            ]
        )
    if Launch.of().size > 1 and config.predictions:
        raise UsageError(
            "--predictions: kept answers are scored by one process; start it without torchrun"
        )
    if Launch.of().size > 1 and config.vllm_server_base_url is not None:
        raise UsageError(ONE_ASKS)
    return _with_labels_of_rows(resolved) if config.predictions else complete(resolved)


def _with_labels_of_rows(resolved: Resolved) -> Resolved:
    """Take over the labels that the answers bring along, where no label file is given.

    Raises UsageError where files of answers have other labels than the first, or than the label
    file.
    """
    config: EvalConfig = resolved.configs[0]
    named, _ = named_files(config.predictions, "predictions")
    found = {name: first_label_set(file) for name, file in named.items() if Path(file).is_file()}
    given = config.label_set if config.label_file or not found else next(iter(found.values()))
    for name, label_set in found.items():
        if label_set not in (given, CHEXPERT if config.label_file else given):
            raise UsageError(
                f"--predictions {name}={named[name]}: its rows have other labels than"
                f" {'--label_file' if config.label_file else 'the first file'}; score them apart"
            )
    if config.label_map and given != CHEXPERT:
        raise UsageError("--label_map: maps to CheXpert's labels, and these are other ones")
    if config.label_file or given == CHEXPERT:
        return resolved
    source = next(iter(named.values()))
    kept = KeptFile(source, "\n".join(label_lines(given)) + "\n")
    return resolved.with_value("label_file", kept, source)


def _score_again(resolved: Resolved) -> int:
    """Score kept predictions by today's parser and metrics, and write them to a new place."""
    config: EvalConfig = resolved.configs[0]
    baseline_examples = read_training_examples(
        config.train_file, config.image_root, config.label_set
    )
    label_set = config.label_set if config.label_file else None
    named, _ = named_files(config.predictions, "predictions")
    answer_format = config.answer_format if is_given(resolved, "answer_format") else None
    given_k = config.num_generations if is_given(resolved, "num_generations") else None
    predictions, samples, joined = {}, {}, _joined_sets(config)
    for name, file in named.items():
        if name in joined:
            data, examples = joined[name]
            rows = read_answers(
                file,
                examples,
                data_file=data,
                answer_format=answer_format,
                max_samples=config.max_samples,
            )
        else:
            rows = read_predictions(file, answer_format, label_set)
        if config.label_map:
            rows = relabel(rows, config.label_map, config.no_label, source=str(Path(file)))
        groups = samples_of_file(rows, given_k, source=str(Path(file)))
        if groups is None:
            predictions[name] = rows[: config.max_samples]
        else:
            samples[name] = [row for group in groups[: config.max_samples] for row in group]
            predictions[name] = vote_predictions(samples[name])
    results = {
        name: scores_record(
            predictions[name],
            samples.get(name, ()),
            baseline_examples=baseline_examples,
            seed=config.seed,
            source=file,
        )
        for name, file in named.items()
    }
    if config.thresholds_from is not None:
        _add_operating_points(results, predictions, config.thresholds_from, config.seed)
    output_dir = _output_directory(config)
    for name, scores in results.items():
        answers = Path(named[name])
        truth = joined[name][0] if name in joined else answers
        record = run_record(resolved, "eval", {name: truth}, {})
        if name in joined:
            record["answers"] = {name: {"file": str(answers), "sha256": sha256_of(answers)}}
        write_results(
            output_dir,
            name,
            predictions[name],
            scores | {"run": record},
            more={"samples": samples[name]} if name in samples else None,
        )
    return _show(results, output_dir)


def _joined_sets(config: EvalConfig) -> dict[str, tuple[Path, list[Example]]]:
    """Read the data files that answers are joined with -> {name: (file, its examples)}."""
    specs, _ = joined_files(config)
    files = {spec: data_file(spec, config.label_set) for spec in specs.values()}
    read = {
        spec: (file, read_jsonl(file, config.image_root, config.label_set))
        for spec, file in files.items()
    }
    return {name: read[spec] for name, spec in specs.items()}


def _decode_and_score(resolved: Resolved, ranks: Ranks) -> int:
    """Answer every data set that is not finished yet, and score it.

    Rank 0 alone looks at what is there, writes and shows.
    """
    from engine.device import pick_device
    from engine.fit import advise_answers, fitted_answers
    from eval.decode import evaluate_sets, load_policy, note_cuts, note_fitted

    config: EvalConfig = resolved.configs[0]
    data = ranks.first_then_others(partial(EvaluationData.read, config))  # it may draw the demo's
    device = pick_device(config.num_threads, ranks, config.tf32)
    resolved = with_precision(resolved, device)
    config = resolved.configs[0]
    records = ranks.on_first(lambda: data.records(resolved))
    missing = ranks.on_first(lambda: _missing(config, records))
    todo = {name: data.sets[name] for name in missing}
    resolved = fitted_answers(resolved, device, todo, ranks)
    config = resolved.configs[0]
    note_fitted(resolved, records)
    _announce(resolved, data, environment_banner(device))
    policy = load_policy(config, device)
    advise_answers(policy.limits, config, device, todo)
    note_cuts(policy.limits, records)
    output_dir = Path(ranks.on_first(lambda: str(_begun(config, data))))
    with SignalGuard() as guard, _told_where(config, output_dir):
        try:
            evaluate_sets(
                policy,
                todo,
                Decoding.of(config),
                output_dir,
                baseline_examples=data.baseline_examples,
                notes=data.notes(records),
                records=records,
                should_stop=lambda: guard.stop is not None,
                ranks=ranks,
            )
        except KeyboardInterrupt as stop:
            return guard.exit_code_after(stop, ranks.gather)
    return ranks.on_first(lambda: _finish(config, list(data.sets), output_dir))


def _ask_and_score(resolved: Resolved) -> int:
    """Have a server answer every data set that is not finished yet, and score it."""
    config: EvalConfig = resolved.configs[0]
    data, decoding = EvaluationData.read(config), Decoding.of(config)
    model = ServedModel.of(config)
    records = data.records(resolved, model.record(decoding))
    missing = _missing(config, records)
    _announce(resolved, data, model.banner())
    output_dir = _begun(config, data)
    with SignalGuard() as guard, _told_where(config, output_dir):
        try:
            answer_sets(
                model.predict,
                {name: data.sets[name] for name in missing},
                decoding,
                output_dir,
                baseline_examples=data.baseline_examples,
                notes=data.notes(records),
                records=records,
                should_stop=lambda: guard.stop is not None,
            )
        except KeyboardInterrupt as stop:
            return guard.exit_code_after(stop, ONE_PROCESS.gather)
    code = _finish(config, list(data.sets), output_dir)
    for line in notes_on(output_dir, list(data.sets)):
        print(line)
    return code


def _announce(resolved: Resolved, data: EvaluationData, banner: str) -> None:
    """Say who answers what, and with which settings."""
    config: EvalConfig = resolved.configs[0]
    for line in prompt_warnings(config.prompt, config.label_set):
        print(f"warning: {line}", file=sys.stderr)
    print(banner)
    print(describe(resolved))
    counts = ", ".join(f"{name} {len(examples)}" for name, examples in data.sets.items())
    print(f"images: {counts}{bad_images_line(data.bad_images)}", flush=True)


def _missing(config: EvalConfig, records: dict[str, dict[str, Any]]) -> list[str]:
    """List the data sets that are not finished yet.

    Raises UsageError where all are, and where something was begun otherwise.
    """
    if config.output_dir is None:
        return list(records)
    finished = finished_sets(config.output_dir, records)
    missing = [name for name in records if name not in finished]
    if not missing:
        refuse_existing([result_files(config.output_dir, name)[0] for name in finished])
    for name in missing:
        for kind in ("predictions", "swapped"):
            read_partial(config.output_dir, name, records[name], kind)
    return missing


def _begun(config: EvalConfig, data: EvaluationData) -> Path:
    """Make the folder of the results, with the list of unreadable images."""
    output_dir = _output_directory(config)
    write_bad_images(output_dir, data.bad_images)
    return output_dir


@contextlib.contextmanager
def _told_where(config: EvalConfig, output_dir: Path) -> Iterator[None]:
    """Say in which folder the same command goes on, where it does not name the folder itself."""
    try:
        yield
    finally:
        if config.output_dir is None and any(output_dir.glob("*.partial.json")):
            print(f"to go on there, give it --output_dir {output_dir}", file=sys.stderr)


def _finish(config: EvalConfig, names: Sequence[str], output_dir: Path) -> int:
    """Add what the data sets have in common to their scores, and show them."""
    results = {name: read_record(result_files(output_dir, name)[1]) for name in names}
    if config.thresholds_from is not None:
        votes = {name: read_predictions(result_files(output_dir, name)[0]) for name in names}
        _add_operating_points(results, votes, config.thresholds_from, config.seed)
        for name, scores in results.items():
            write_json(result_files(output_dir, name)[1], scores)
    return _show(results, output_dir)


def _add_operating_points(
    results: dict[str, dict[str, Any]],
    votes: dict[str, list[Prediction]],
    chosen_on: str,
    seed: int,
) -> None:
    """Judge every data set with the thresholds that one of them, or a file, chooses.

    Raises DataError where the votes, or those of the file, have no shares.
    """
    if chosen_on in votes:
        choosing = votes[chosen_on]
    else:
        rows = read_predictions(chosen_on)
        groups = samples_of_file(rows, None, source=chosen_on)
        choosing = rows if groups is None else [vote(group) for group in groups]
    for name, rows in votes.items():
        results[name]["probabilities"]["operating_points"] = operating_points(
            rows, choosing, chosen_on, seed=seed
        )


def _show(results: dict[str, dict[str, Any]], output_dir: Path) -> int:
    about = load_entry("answers", output_dir)
    shown = {
        name: scores | {"stage": stage_title(about, scores)} for name, scores in results.items()
    }
    print(format_scores(shown, per_label=True))
    for table in (
        format_samples(results),
        format_probabilities(results),
        format_faithfulness(results),
        format_groups(results),
    ):
        if table:
            print(f"\n{table}")
    print(f"\npredictions and scores: {output_dir}")
    return 0


def _output_directory(config: EvalConfig) -> Path:
    if config.output_dir is None:
        return run_directory(None, "eval")
    return made_folder(config.output_dir)


if __name__ == "__main__":
    sys.exit(main())
