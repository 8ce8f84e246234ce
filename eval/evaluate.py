"""Decode a data set, score the answers, keep both; score kept answers again without a model.

    python -m eval.evaluate --adapter_name_or_path runs/20260101-120000-grpo --data_file
    nih=nih/test.jsonl
    python -m eval.evaluate --predictions nih=runs/20260101-130000-eval/predictions-nih.jsonl
    [--label_map nih_ten]

The first command writes predictions-nih.jsonl (one row an image, the completion as it came) and
scores-nih.json. Rows read back from a file are parsed anew, so a changed parser or metric applies
to old predictions too; --label_map takes the truth anew from their source_labels.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from data.answers import ANSWER_FORMATS, parse_answer
from data.examples import Example, data_file, read_examples, read_jsonl
from data.files import MAX_PROBLEMS, DataError, sha256_of, write_json, write_jsonl
from data.labels import LABEL_MAPS, LABELS, chexpert_labels_of_nih
from data.prompts import PROMPTS, Prompt
from engine.config import ConfigError, Resolved, UsageError, describe, parse_config, setting
from engine.generate import Completion, SamplingConfig, generate
from engine.model import LoadedModel, adapter_config, attach_adapter, load_model
from engine.run import (
    bad_image_counts,
    bad_images_line,
    run_record,
    saved_settings,
    usable_examples,
    write_bad_images,
)
from engine.runtime import (
    SignalGuard,
    base_dtype,
    environment_banner,
    main_guard,
    pick_device,
    run_directory,
)
from engine.settings import ENGINE, FALLBACKS, OURS, PAPER_GRPO, PAPER_SFT, BadImages
from engine.tracking import Progress
from eval.metrics import (
    bootstrap_intervals,
    failure_policies,
    jaccard_per_image,
    label_matrix,
    multilabel_scores,
    predict_all_labels,
    predict_by_prevalence,
    predict_most_frequent,
)

WINDOW = 16  # batches whose prompts are there at once, the longest of which are decoded first
# the random baseline is a mean over draws: a single one is noisy on a few hundred images
PREVALENCE_DRAWS = 20


# ---- decode --------------------------------------------------------------------------------------
def predict(
    wrapped: nn.Module,
    model: LoadedModel,
    examples: Sequence[Example],
    prompt: Prompt,
    sampling: SamplingConfig,
    *,
    answer_format: str,
    batch_size: int,
    seed: int = 0,
    done: Mapping[str, dict] = {},
    should_stop: Callable[[], bool] = lambda: False,
    on_row: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """One completion of every example by the sampler of the rollouts -> rows of a predictions file,
    in the examples' order.

    wrapped: the model with its active adapter, or the base. `batch_size` completions are written
    together; a finished one makes room for the next. Images are looked at window by window. done:
    {id: row} of an earlier call with the same arguments that was cut short; these are not made
    again. on_row gets each row as soon as it is there; once should_stop says so, KeyboardInterrupt
    is raised and what is being written is lost. Every example has random numbers of its own, made
    from seed and its position, so completions depend on batch_size and on done only by rounding.
    Raises DataError for an image that cannot be read.
    """
    rows = {example.id: done[example.id] for example in examples if example.id in done}

    def keep(example: Example, completion: Completion) -> None:
        [row] = reparse(
            [
                {
                    "id": example.id,
                    "patient_id": example.patient_id,
                    "dataset": example.dataset,
                    "labels": list(example.labels),
                    "evaluated_labels": list(example.evaluated_labels),
                    "source_labels": list(example.source_labels),
                    "prompt": prompt.name,
                    "completion": model.encoder.decode(completion.ids),
                    "completion_length": len(completion.ids),
                }
            ],
            answer_format,
        )
        rows[example.id] = row
        on_row(row)

    for start in range(0, len(examples), WINDOW * batch_size):
        window = range(start, min(start + WINDOW * batch_size, len(examples)))
        missing = [i for i in window if examples[i].id not in done]
        encoded = []
        for i in missing:
            if should_stop():
                raise KeyboardInterrupt
            encoded.append(model.encode_prompt(examples[i], prompt))
        if encoded:
            generate(
                wrapped,
                model,
                encoded,
                sampling,
                max_rows=batch_size,
                should_stop=should_stop,
                generator=[torch.Generator().manual_seed(seed * 1_000_003 + i) for i in missing],
                on_finished=lambda i, completions: keep(examples[missing[i]], *completions),
            )
    return [rows[example.id] for example in examples]


def reparse(rows: Sequence[dict], answer_format: str | None = None) -> list[dict]:
    """The rows with everything that is read from the completion read anew.

    answer_format: of all rows; None for each row's own (think_solution where a row names none).
    Besides "predicted", "valid", "parsed" and "problem" a row gets "unknown", the entries that are
    no label, and "answer_format".
    """
    parsed_rows = []
    for row in rows:
        name = answer_format or row.get("answer_format") or "think_solution"
        answer = parse_answer(row["completion"], name)
        parsed_rows.append(
            row
            | {
                "predicted": list(answer.labels),
                "valid": answer.valid,
                "parsed": answer.parsed,
                "problem": answer.problem,
                "unknown": list(answer.unknown),
                "answer_format": name,
            }
        )
    return parsed_rows


def relabel(
    rows: Sequence[dict], label_map: str, no_label: str = "empty", *, source: str = "predictions"
) -> list[dict]:
    """The rows with labels and evaluated_labels made anew from their source_labels, NIH's own
    strings, by a map of LABEL_MAPS.

    no_label: a row without any label of the map keeps its empty set, becomes "no_finding", or is
    left out ("drop"). Raises DataError naming the rows whose source_labels are missing or not
    NIH's, as those of `source`.
    """
    evaluated = LABEL_MAPS[label_map]
    relabelled, problems = [], []
    for row in rows:
        strings = row.get("source_labels") or ()
        try:
            if not strings:
                raise ValueError("no source_labels")
            labels = chexpert_labels_of_nih(strings, evaluated, no_label)
        except ValueError as error:
            problems.append(
                f"{source}, id {row['id']!r}: {error}; --label_map {label_map} is for NIH"
                " ChestX-ray14"
            )
            continue
        if labels or no_label != "drop":
            relabelled.append(row | {"labels": list(labels), "evaluated_labels": list(evaluated)})
    if problems:
        raise DataError(problems[:MAX_PROBLEMS])
    return relabelled


# ---- score ---------------------------------------------------------------------------------------
def score(
    rows: Sequence[dict], *, reference: Sequence[Example] | None = None, seed: int = 0
) -> dict:
    """Everything that scores-<name>.json holds, from rows as `predict` and `read_predictions` make
    them.

    The labels (columns) are all that any row evaluates; each image counts in its own evaluated
    labels only. Top level: the dict of `multilabel_scores`, a failed answer counted as empty;
    "failure_policies" has F1 under the other two treatments too.

    "jaccard" is the mean of Eq. 3 without its length penalty: 0 for an answer that is not valid,
    and entries that are no label enlarge the union. "fail_rate" is the share of answers whose
    labels could not be read, "invalid_rate" of those not strictly in the format. "intervals" are 95
    %, by patient. reference: the training examples, whose label sets the baselines imitate; without
    them they imitate this data set, so they have seen the answers. seed: of the intervals and the
    random baseline.

    Raises DataError where there is no row, or no row evaluates any label.
    """
    columns = [label for label in LABELS if any(label in row["evaluated_labels"] for row in rows)]
    if not columns:
        raise DataError(
            [f"nothing to score: {len(rows)} rows, and evaluated_labels is empty in all of them"]
        )
    targets, predictions, evaluated = (
        # [N,K]
        label_matrix([row[field] for row in rows], columns)
        for field in ("labels", "predicted", "evaluated_labels")
    )
    parsed, valid = (np.array([row[field] for row in rows]) for field in ("parsed", "valid"))  # [N]
    num_unknown = np.array([len(row["unknown"]) for row in rows])
    # [N]
    jaccard = np.where(valid, jaccard_per_image(targets, predictions, evaluated, num_unknown), 0.0)

    policies = failure_policies(targets, predictions, parsed, columns, evaluated)
    patients = [row["patient_id"] for row in rows]
    intervals = bootstrap_intervals(
        targets, predictions & parsed[:, None], evaluated, patients, jaccard=jaccard, seed=seed
    )
    lengths = [row["completion_length"] for row in rows]
    return policies["empty"] | {
        "jaccard": float(jaccard.mean()),
        "fail_rate": float((~parsed).mean()),
        "invalid_rate": float((~valid).mean()),
        "problems": dict(Counter(row["problem"] for row in rows if row["problem"]).most_common()),
        "n": len(rows),
        "num_patients": len(set(patients)),
        "labels": columns,
        "failure_policies": {name: _f1(scores) for name, scores in policies.items()},
        "intervals": {name: list(bounds) for name, bounds in intervals.items()},
        "baselines": baselines(targets, evaluated, columns, reference, seed),
        "completion_length": {"mean": float(np.mean(lengths)), "max": max(lengths)},
    }


def baselines(
    targets: np.ndarray,
    evaluated: np.ndarray,
    columns: list[str],
    reference: Sequence[Example] | None,
    seed: int,
) -> dict[str, dict]:
    """{baseline: {"micro_f1", "macro_f1", "jaccard", "reference"}}; "reference" names the label
    sets that it imitates.
    """
    imitated, source = targets & evaluated, "this data set"
    if reference is not None:
        imitated, source = (
            label_matrix([example.target.labels for example in reference], columns),
            "train_file",
        )
    rng = np.random.default_rng(seed)
    num_images, num_labels = targets.shape

    def figures(predictions: np.ndarray) -> dict[str, float]:
        jaccard = float(jaccard_per_image(targets, predictions, evaluated).mean())
        return _f1(multilabel_scores(targets, predictions, columns, evaluated)) | {
            "jaccard": jaccard
        }

    draws = [
        figures(predict_by_prevalence(imitated, num_images, rng)) for _ in range(PREVALENCE_DRAWS)
    ]
    mean = {metric: float(np.mean([draw[metric] for draw in draws])) for metric in draws[0]}
    return {
        "most_frequent": (
            figures(predict_most_frequent(imitated, num_images)) | {"reference": source}
        ),
        "all_labels": figures(predict_all_labels(num_images, num_labels)) | {"reference": None},
        "prevalence_matched": mean | {"reference": source},
    }


def _f1(scores: dict) -> dict[str, float]:
    return {"micro_f1": scores["micro"]["f1"], "macro_f1": scores["macro"]["f1"]}


# ---- decode, score and keep ----------------------------------------------------------------------
def evaluate_sets(
    wrapped: nn.Module,
    model: LoadedModel,
    sets: Mapping[str, Sequence[Example]],
    prompt: Prompt,
    sampling: SamplingConfig,
    output_dir: str | Path,
    *,
    batch_size: int,
    reference: Sequence[Example] | None = None,
    answer_format: str | None = None,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    notes: Mapping[str, dict] | None = None,
    annotate: Callable[[list[dict]], list[dict]] = lambda rows: rows,
    extra: Callable[[list[dict]], dict] = lambda rows: {},
    resumable: Mapping[str, dict] | None = None,
) -> dict[str, dict]:
    """`predict`, `score` and `write_results` for every data set, with a progress bar -> {name:
    scores}.

    Results of these names in output_dir are replaced. answer_format: None for the prompt's own.
    notes: {name: keys to add to the scores}; annotate(rows): the rows with fields of the caller's
    own; extra(rows): more keys of the scores, computed from those rows. Until a data set is
    finished its answers so far are in predictions-<name>.partial.jsonl; an interrupt
    (KeyboardInterrupt, once should_stop says so) or an error leaves that file there and says so.
    resumable: {name: `evaluation_record`}, where answers that an earlier call with the same
    records left there are gone on from; raises UsageError where they are of another evaluation.
    """
    results = {}
    for name, examples in sets.items():
        done = [] if resumable is None else read_partial(output_dir, name, resumable[name])
        failed = 0
        with (
            Progress(len(examples), initial=len(done), description=f"{name} (images)") as progress,
            _kept(output_dir, name, done, None if resumable is None else resumable[name]) as keep,
        ):

            def on_row(row: dict) -> None:
                nonlocal failed
                keep(row)
                failed += not row["parsed"]
                progress.update({"failed": failed})

            rows = predict(
                wrapped,
                model,
                examples,
                prompt,
                sampling,
                answer_format=answer_format or prompt.answer_format,
                batch_size=batch_size,
                seed=seed,
                done={row["id"]: row for row in done},
                should_stop=should_stop,
                on_row=on_row,
            )
            rows = annotate(rows)
            results[name] = (
                score(rows, reference=reference, seed=seed)
                | extra(rows)
                | (notes or {}).get(name, {})
            )
            write_results(output_dir, name, rows, results[name], overwrite=True)
    return results


def _partial_files(output_dir: str | Path, name: str) -> tuple[Path, Path]:
    """(answers so far, the record of their evaluation)"""
    return tuple(
        Path(output_dir) / f"predictions-{name}.partial.{ending}" for ending in ("jsonl", "json")
    )


def read_partial(output_dir: str | Path, name: str, record: dict) -> list[dict]:
    """The answers that an interrupted evaluation of this record has left. Raises UsageError where
    it was another one.
    """
    answers, about = _partial_files(output_dir, name)
    if not answers.is_file():
        return []
    if not about.is_file():
        raise UsageError(
            f"{answers} was left there by another command; score it with --predictions, remove it,"
            " or give another --output_dir"
        )
    another = difference(json.loads(about.read_text(encoding="utf-8")), record)
    if another:
        raise UsageError(
            f"{answers} was begun with another {another}; finish that evaluation, remove the file,"
            " or give another --output_dir"
        )
    rows = []
    for line in answers.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # torn by the end of the process
            break
    return rows


@contextmanager
def _kept(
    output_dir: str | Path, name: str, done: list[dict], record: dict | None
) -> Iterator[Callable[[dict], None]]:
    """A function that appends a row to the file of partial answers at once. The file goes when the
    block ends well; else it stays and is named.
    """
    partial, about = _partial_files(output_dir, name)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if record is not None:
        write_json(about, record)
    write_jsonl(partial, done)  # without a torn line
    with partial.open("a", encoding="utf-8") as file:

        def keep(row: dict) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()

        try:
            yield keep
        except BaseException:
            if file.tell():
                how = (
                    "the same command goes on from there"
                    if record is not None
                    else (f"to score them: python -m eval.evaluate --predictions {name}={partial}")
                )
                print(f"the answers so far are kept in {partial}: {how}", file=sys.stderr)
            else:
                partial.unlink()
                about.unlink(missing_ok=True)
            raise
    partial.unlink()
    about.unlink(missing_ok=True)


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
)


def evaluation_record(resolved: Resolved, name: str, file: Path, bad_images: list[dict]) -> dict:
    """What says how a data set is evaluated: "run" of its scores."""
    config: EvalConfig = resolved.configs[0]
    adapter = Path(config.adapter_name_or_path or "") / "adapter_model.safetensors"
    return run_record(resolved, "eval", {name: file}, {name: bad_images}) | {
        "adapter_sha256": (
            sha256_of(adapter) if config.adapter_name_or_path and adapter.is_file() else None
        )
    }


def difference(before: Mapping, now: Mapping) -> str:
    """The first setting, or data, in which an evaluation differs from what is asked for now; ""
    where it does not.
    """
    was = before.get("settings") or {}
    greedy = now["settings"]["temperature"]["value"] == 0
    # one that an earlier version did not have cannot differ
    for name, entry in now["settings"].items():
        if name in _NO_MATTER or name not in was or greedy and name == "seed":
            continue
        if was[name].get("value") != entry["value"]:
            return f"{name} ({was[name].get('value')}, now {entry['value']})"
    for name, file in now["data"].items():
        if (before.get("data") or {}).get(name, {}).get("sha256") != file["sha256"]:
            return f"data file of {name}"
    if (before.get("bad_images") or now["bad_images"]) != now["bad_images"]:
        return "list of unreadable images"
    return (
        "adapter of the same name" if before.get("adapter_sha256") != now["adapter_sha256"] else ""
    )


def finished_sets(output_dir: str | Path, records: Mapping[str, dict]) -> list[str]:
    """Names of the data sets whose results are in output_dir. Raises UsageError for one that was
    evaluated otherwise.
    """
    finished, problems = [], []
    for name, record in records.items():
        predictions, scores = (
            Path(output_dir) / file for file in (f"predictions-{name}.jsonl", f"scores-{name}.json")
        )
        if not (predictions.is_file() and scores.is_file()):
            continue
        another = difference(
            json.loads(scores.read_text(encoding="utf-8")).get("run") or {}, record
        )
        if another:
            problems.append(
                f"{predictions} is finished, but with another {another}; give another --output_dir"
                " or NAME"
            )
        finished.append(name)
    if problems:
        raise UsageError(problems)
    return finished


# ---- show ----------------------------------------------------------------------------------------
_BASELINE_TITLES = {
    "most_frequent": "most frequent",
    "all_labels": "all labels",
    "prevalence_matched": "prevalence-matched",
}
# beside "empty", the row of the data set
_POLICY_TITLES = {"dropped": "failed left out", "all_wrong": "failed all wrong"}
_NAME_WIDTH = 22


def format_scores(results: dict[str, dict], *, per_label: bool = False) -> str:
    """The table of scores by data set, at most 100 columns wide: below each, its F1 under the other
    two treatments of failed answers (where there are any), and its baselines. per_label: all labels
    below.
    """
    table = [("data set", "n", "Jaccard", "micro-F1", "macro-F1", "fail")]
    for name, scores in results.items():
        values = {"jaccard": scores["jaccard"]} | _f1(scores)
        shown = [
            f"{values[metric]:.3f} ({low:.3f}-{high:.3f})"
            for metric, (low, high) in _in_order(scores["intervals"])
        ]
        table.append((_clipped(name), str(scores["n"]), *shown, f"{scores['fail_rate']:.3f}"))
        if scores["fail_rate"]:
            for key, title in _POLICY_TITLES.items():
                policy = scores["failure_policies"][key]
                table.append(
                    (
                        f"  {title}",
                        "",
                        "",
                        f"{policy['micro_f1']:.3f}",
                        f"{policy['macro_f1']:.3f}",
                        "",
                    )
                )
        for key, title in _BASELINE_TITLES.items():
            table.append(
                (
                    f"  {title}",
                    "",
                    *(f"{value:.3f}" for _, value in _in_order(scores["baselines"][key])),
                    "",
                )
            )
    references = sorted(
        {scores["baselines"]["most_frequent"]["reference"] for scores in results.values()}
    )
    lines = _aligned(table, "<><<<>") + [
        (
            "(95 % interval by patient); failed answers count as empty, answers not in the format"
            " have Jaccard 0;"
        ),
        f"label frequencies of the baselines are from: {', '.join(references)}",
    ]
    left_out = [
        f"{_clipped(name)} {scores['bad_images']}"
        for name, scores in results.items()
        if scores.get("bad_images")
    ]
    lines += [f"examples left out for their images: {', '.join(left_out)}"] if left_out else []
    if per_label:
        for name, scores in results.items():
            by_label = [
                (
                    label,
                    *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")),
                    str(row["support"]),
                )
                for label, row in scores["per_label"].items()
            ]
            lines += [
                "",
                *_aligned(
                    [(_clipped(name), "precision", "recall", "F1", "support"), *by_label], "<>>>>"
                ),
            ]
    return "\n".join(lines)


_PROGRESS_COLUMNS = {
    "reward": "reward",
    "jaccard": "Jaccard",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "fail_rate": "fail",
    "completion_length": "tokens",
}


def format_progress(log_history: Sequence[dict], names: Sequence[str], best: str | None) -> str:
    """A training run's evaluations of each set, from its log: the start, the best checkpoint (its
    folder's name), the last.
    """
    table = [("data set", "step", *_PROGRESS_COLUMNS.values())]
    best_step = int(best.rpartition("-")[2]) if best else -1
    for name in names:
        entries = {
            entry["step"]: entry for entry in log_history if f"eval_{name}_macro_f1" in entry
        }
        for step, title in dict.fromkeys(
            [(min(entries), "start"), (best_step, "best"), (max(entries), "last")]
        ):
            if step in entries:
                values = [entries[step][f"eval_{name}_{metric}"] for metric in _PROGRESS_COLUMNS]
                table.append(
                    (_clipped(name), f"{title} ({step})", *(f"{value:.3f}" for value in values))
                )
    return "\n".join(_aligned(table, "<<" + ">" * len(_PROGRESS_COLUMNS)))


def _in_order(by_metric: dict) -> list[tuple]:
    return [(metric, by_metric[metric]) for metric in ("jaccard", "micro_f1", "macro_f1")]


def _clipped(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else f"{name[:10]}...{name[-9:]}"


def _aligned(table: list[tuple[str, ...]], alignments: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table)]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, alignments, widths)
        ).rstrip()
        for row in table
    ]


# ---- files ---------------------------------------------------------------------------------------
def write_results(
    output_dir: str | Path,
    name: str,
    rows: Sequence[dict],
    scores: dict,
    *,
    overwrite: bool = False,
) -> None:
    """predictions-<name>.jsonl and scores-<name>.json, each whole or not at all.

    Raises UsageError where there are results of that name already. overwrite: for a training run,
    which replaces its own.
    """
    predictions_file, scores_file = (
        Path(output_dir) / f"predictions-{name}.jsonl",
        Path(output_dir) / f"scores-{name}.json",
    )
    if not overwrite:
        _refuse_existing([predictions_file, scores_file])
    write_jsonl(predictions_file, rows)
    write_json(scores_file, scores)


def _refuse_existing(files: Sequence[Path]) -> None:
    existing = [file for file in files if file.exists()]
    if existing:
        raise UsageError(
            [
                f"{file} exists and nothing is overwritten; give another --output_dir or NAME"
                for file in existing
            ]
        )


_ROW_FIELDS = {
    "id": str,
    "patient_id": str,
    "dataset": str,
    "labels": list,
    "evaluated_labels": list,
    "completion": str,
    "completion_length": int,
}


def read_predictions(path: str | Path, answer_format: str | None = None) -> list[dict]:
    """Rows of a predictions file, parsed anew (`reparse`). Raises DataError as `iter_predictions`
    does.
    """
    return list(iter_predictions(path, answer_format))


def iter_predictions(path: str | Path, answer_format: str | None = None) -> Iterator[dict]:
    """The rows of `read_predictions` one by one, for a file whose texts are not to be held in
    memory.

    Raises DataError with every problem of the file (line and field), after the last sound row; also
    where it is missing, empty or holds an id twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError([f"{path}: no such predictions file"])
    problems: list[str] = []
    line_of: dict[str, int] = {}
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                row, found = None, [f"not valid JSON ({error.msg}, column {error.colno})"]
            else:
                found = _row_problems(row)
            if not found and row["id"] in line_of:
                found = [
                    f"id {row['id']!r} is also on line {line_of[row['id']]}; each image counts once"
                ]
            problems += [f"{path}, line {number}: {problem}" for problem in found]
            if not found:
                line_of[row["id"]] = number
                yield reparse([row], answer_format)[0]
    if problems or not line_of:
        raise DataError(problems[:MAX_PROBLEMS] or [f"{path}: the file holds no predictions"])


def _row_problems(row: object) -> list[str]:
    if not isinstance(row, dict):
        return [f"holds {type(row).__name__}, not an object with fields {', '.join(_ROW_FIELDS)}"]
    problems = []
    for field, kind in _ROW_FIELDS.items():
        if type(row.get(field)) is not kind:
            problems.append(
                f"field {field!r} is {json.dumps(row.get(field))[:60]}; it must be {kind.__name__}"
            )
        elif kind is list:
            unknown = [label for label in row[field] if label not in LABELS]
            problems += (
                [f"field {field!r} holds {unknown[0]!r}; the labels are: {', '.join(LABELS)}"]
                if unknown
                else []
            )
    source = row.get("source_labels")
    if source is not None and not (
        isinstance(source, list) and all(isinstance(label, str) for label in source)
    ):
        problems.append(
            f"field 'source_labels' is {json.dumps(source)[:60]}; it must be a list of strings"
        )
    if row.get("answer_format") not in (None, *ANSWER_FORMATS):
        problems.append(
            f"field 'answer_format' is {row['answer_format']!r}; known: {', '.join(ANSWER_FORMATS)}"
        )
    return problems


# ---- command -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class EvalConfig:
    """Flags of `python -m eval.evaluate`. None: as in the run that trained the adapter, else as the
    help says.
    """

    model_name_or_path: str | None = setting(
        None, "base model: a folder, a hub name, 'demo' or 'demo-gemma'", unset="the adapter's base"
    )
    adapter_name_or_path: str | None = setting(
        None, "folder of a LoRA adapter", unset="none: the base model itself is evaluated"
    )
    data_file: tuple[str, ...] = setting(
        (),
        "data sets to decode, each NAME=FILE (JSONL) or NAME=demo:SPLIT",
        aliases=("validation_file",),
    )
    predictions: tuple[str, ...] = setting(
        (), "predictions files to score again without a model, each NAME=FILE"
    )
    label_map: Literal["nih_nine", "nih_ten"] | None = setting(
        None,
        "with --predictions: labels anew from NIH's own strings, the paper's nine categories or ten"
        " with Pleural Effusion",
        unset="the labels in the file",
    )
    no_label: Literal["empty", "no_finding", "drop"] = setting(
        "empty",
        "with --label_map: an image without any of its labels keeps its empty set, is called No"
        " Finding, or is left out",
        source="as in data.select for NIH",
    )
    image_root: str | None = setting(
        None, "folder that image paths are relative to", unset="each data file's own folder"
    )
    bad_images: BadImages = setting(
        "fail",
        "an unreadable image stops the command; or skip: all images are read first, and the"
        " examples of bad ones are left out of the scores and listed in bad-images-<name>.jsonl",
        source=ENGINE,
    )
    train_file: str | None = setting(
        None,
        "training data whose label frequencies the baselines imitate",
        unset="each data set's own frequencies",
    )
    output_dir: str | None = setting(
        None, "where predictions and scores go", unset="a new folder runs/<time>-eval"
    )
    max_samples: int | None = setting(
        None, "use only the first so many rows of each data set", unset="all", unit="rows"
    )
    prompt: str | None = setting(
        None, f"instruction: {', '.join(PROMPTS)}", unset="the adapter's run's, else free_reasoning"
    )
    answer_format: str | None = setting(
        None,
        f"form of a valid answer: {', '.join(ANSWER_FORMATS)}",
        unset="the adapter's run's where the prompt is, else the prompt's own",
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
        "an image is enlarged to at least this many visual tokens; Gemma 3 has a fixed number",
        unset="the adapter's run's, else 256",
        unit="tokens",
        source=PAPER_SFT,
    )
    max_visual_tokens: int | None = setting(
        None,
        "an image is reduced to at most this many visual tokens",
        unset="the adapter's run's, else 512",
        unit="tokens",
        source=PAPER_SFT,
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


# What an evaluation takes over from the run that trained the adapter: {setting: (type, value where
# there is no such run)}.
_INHERITED = {
    "prompt": (str, FALLBACKS["prompt"]),
    "answer_format": (str, None),
    "max_completion_length": (int, 512),
    "min_visual_tokens": (int, FALLBACKS["min_visual_tokens"]),
    "max_visual_tokens": (int, FALLBACKS["max_visual_tokens"]),
    "bf16": (bool, None),
    "num_threads": (int, None),
}


def named_files(values: Sequence[str], flag: str) -> tuple[dict[str, str], list[str]]:
    """Values of a repeatable NAME=FILE flag -> ({name: file}, problems). Names become parts of file
    names.
    """
    files: dict[str, str] = {}
    problems: list[str] = []
    for value in values:
        name, equals, file = value.partition("=")
        if not equals or not file or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            problems.append(
                f"--{flag} {value}: expected NAME=FILE, the name of letters, digits, - and _"
            )
        elif name in files:
            problems.append(f"--{flag} {value}: the name {name} is given twice")
        files.setdefault(name, file)
    return files, problems


def config_problems(config: EvalConfig) -> list[str]:
    """What is wrong with the values of one command line, beyond their types."""
    problems = (
        named_files(config.data_file, "data_file")[1]
        + named_files(config.predictions, "predictions")[1]
    )
    if config.predictions:
        for name in ("model_name_or_path", "adapter_name_or_path", "data_file"):
            if getattr(config, name):
                problems.append(
                    f"--{name}: has no place beside --predictions, which scores again without a"
                    " model"
                )
    elif config.label_map:
        problems.append(
            "--label_map: goes with --predictions; a data file gets its labels from data.select"
            " --label_map"
        )
    elif not config.data_file:
        problems.append(
            "nothing to evaluate: give --data_file NAME=FILE, or --predictions NAME=FILE to score"
            " again"
        )
    elif not config.model_name_or_path and not config.adapter_name_or_path:
        problems.append("no model: give --model_name_or_path, --adapter_name_or_path, or both")
    if config.prompt not in (None, *PROMPTS):
        problems.append(f"--prompt {config.prompt}: unknown; known: {', '.join(PROMPTS)}")
    if config.answer_format not in (None, *ANSWER_FORMATS):
        problems.append(
            f"--answer_format {config.answer_format}: unknown; known: {', '.join(ANSWER_FORMATS)}"
        )
    for name in (
        "max_samples",
        "max_completion_length",
        "per_device_eval_batch_size",
        "min_visual_tokens",
        "max_visual_tokens",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be at least 1")
    if not 0 <= config.temperature < float("inf"):
        problems.append(
            f"--temperature {config.temperature}: must be 0 (greedy) or a positive number"
        )
    if not 0 < config.top_p <= 1:
        problems.append(f"--top_p {config.top_p}: must be above 0 and at most 1")
    smallest, largest = config.min_visual_tokens, config.max_visual_tokens
    if smallest is not None and largest is not None and smallest > largest:
        problems.append(f"--min_visual_tokens {smallest} is above --max_visual_tokens {largest}")
    return problems


def complete(resolved: Resolved) -> Resolved:
    """Fill in what was not given: the adapter's base model, and settings of the run that trained it
    (its config.json).

    Raises UsageError for a folder without an adapter, one that names no base model, and a
    config.json that cannot be used.
    """
    config: EvalConfig = resolved.configs[0]
    settings, origin = {}, "default"
    if config.adapter_name_or_path is not None:
        folder = Path(config.adapter_name_or_path)
        base = adapter_config(folder).base_model_name_or_path
        settings, origin = _training_settings(folder), str(folder / "config.json")
        if config.model_name_or_path is None:
            if not base:
                raise UsageError(
                    f"{folder}: adapter_config.json names no base model; give --model_name_or_path"
                )
            resolved = resolved.with_value(
                "model_name_or_path", base, str(folder / "adapter_config.json")
            )
        if config.prompt not in (None, settings.get("prompt")):
            settings.pop("answer_format", None)  # another prompt asks for its own form
    for name, (_, default) in _INHERITED.items():
        if getattr(config, name) is None:
            resolved = resolved.with_value(
                name, settings.get(name, default), origin if name in settings else "default"
            )
    config = resolved.configs[0]
    problems = config_problems(config)
    if problems:
        raise ConfigError(problems)
    if config.answer_format is None:
        resolved = resolved.with_value(
            "answer_format", PROMPTS[config.prompt].answer_format, f"prompt {config.prompt}"
        )
    return resolved


def _training_settings(folder: Path) -> dict:
    """{setting: value} of the run that saved the adapter, those of _INHERITED; empty where it left
    no config.json.
    """
    saved = saved_settings(folder)
    settings = {name: saved[name] for name in _INHERITED if saved.get(name) is not None}
    for name, value in settings.items():
        if type(value) is not _INHERITED[name][0]:
            expected = _INHERITED[name][0].__name__
            raise UsageError(
                f"{folder / 'config.json'}: {name} is {value!r}, expected {expected}; repair or"
                " remove the file"
            )
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 usage or data, 130 or 143 after a signal."""
    return main_guard(lambda: _run(sys.argv[1:] if argv is None else argv), errors=(DataError,))


def _run(argv: Sequence[str]) -> int:
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
    if config.output_dir is not None and config.predictions:
        names = named_files(config.predictions, "predictions")[0]
        _refuse_existing(
            [
                Path(config.output_dir) / file.format(name)
                for name in names
                for file in ("predictions-{}.jsonl", "scores-{}.json")
            ]
        )
    reference = (
        None if config.train_file is None else read_examples(config.train_file, config.image_root)
    )
    return (
        _score_again(resolved, reference)
        if config.predictions
        else _decode_and_score(complete(resolved), reference)
    )


def _score_again(resolved: Resolved, reference: list[Example] | None) -> int:
    config: EvalConfig = resolved.configs[0]
    files = {
        name: Path(file) for name, file in named_files(config.predictions, "predictions")[0].items()
    }
    rows = {
        name: read_predictions(file, config.answer_format)[: config.max_samples]
        for name, file in files.items()
    }
    if config.label_map:
        rows = {
            name: relabel(rows[name], config.label_map, config.no_label, source=str(files[name]))
            for name in files
        }
    results = {name: score(rows[name], reference=reference, seed=config.seed) for name in files}
    output_dir = _output_directory(config)
    for name, scores in results.items():
        write_results(
            output_dir,
            name,
            rows[name],
            scores | {"run": run_record(resolved, "eval", {name: files[name]}, {})},
        )
    return _show(results, output_dir)


def _decode_and_score(resolved: Resolved, reference: list[Example] | None) -> int:
    config: EvalConfig = resolved.configs[0]
    files = {
        name: data_file(spec)
        for name, spec in named_files(config.data_file, "data_file")[0].items()
    }
    sets = {
        name: read_jsonl(file, config.image_root)[: config.max_samples]
        for name, file in files.items()
    }
    sets, bad_images = usable_examples(sets, config.bad_images)
    counts = bad_image_counts(sets, bad_images)
    records = {
        name: evaluation_record(resolved, name, file, bad_images[name])
        for name, file in files.items()
    }
    finished = [] if config.output_dir is None else finished_sets(config.output_dir, records)
    todo = {name: examples for name, examples in sets.items() if name not in finished}
    if config.output_dir is not None:
        if not todo:
            _refuse_existing(
                [Path(config.output_dir) / f"predictions-{name}.jsonl" for name in finished]
            )
        for name in todo:  # before the model is loaded
            read_partial(config.output_dir, name, records[name])
    device = pick_device(config.num_threads)
    bf16 = device.type == "cuda" if config.bf16 is None else config.bf16
    print(environment_banner(device))
    print(describe(resolved))
    print(
        "images: "
        + ", ".join(f"{name} {len(examples)}" for name, examples in sets.items())
        + bad_images_line(bad_images),
        flush=True,
    )
    model = load_model(
        config.model_name_or_path,
        dtype=base_dtype(bf16, device),
        device=device,
        min_visual_tokens=config.min_visual_tokens,
        max_visual_tokens=config.max_visual_tokens,
        vision_cache_dir=config.vision_cache_dir,
    )
    wrapped = (
        model.base
        if config.adapter_name_or_path is None
        else attach_adapter(model, config.adapter_name_or_path)
    )
    output_dir = _output_directory(config)
    write_bad_images(output_dir, bad_images)
    sampling = SamplingConfig(config.temperature, config.top_p, config.max_completion_length)
    with SignalGuard() as guard:
        try:
            evaluate_sets(
                wrapped,
                model,
                todo,
                PROMPTS[config.prompt],
                sampling,
                output_dir,
                reference=reference,
                resumable=records,
                notes={name: {"run": records[name]} | counts[name] for name in todo},
                batch_size=config.per_device_eval_batch_size,
                answer_format=config.answer_format,
                seed=config.seed,
                should_stop=lambda: guard.stop is not None,
            )
        except KeyboardInterrupt:
            return guard.exit_code or 130
    return _show(
        {
            name: json.loads((output_dir / f"scores-{name}.json").read_text(encoding="utf-8"))
            for name in sets
        },
        output_dir,
    )


def _show(results: dict[str, dict], output_dir: Path) -> int:
    print(format_scores(results, per_label=True))
    print(f"\npredictions and scores: {output_dir}")
    return 0


def _output_directory(config: EvalConfig) -> Path:
    if config.output_dir is None:
        return run_directory(None, "eval")
    directory = Path(config.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {directory}: cannot be used: {error.strerror}") from error
    return directory


if __name__ == "__main__":
    sys.exit(main())
