"""Make evaluations and runs that look finished, for reports, comparisons and figures."""

from __future__ import annotations

import json
from pathlib import Path

from data.files import write_jsonl
from data.labels import LABELS, NIH_NINE
from data.predictions import Prediction, write_predictions
from eval.contrasts import Contrast, contrast_models
from eval.curves import FIGURE_1, reward_panels
from eval.folders import load_answers, write_results
from eval.page import Cell, Table
from eval.scores import score

ABC = ("Edema", "Pneumonia", "Fracture")  # in CheXpert's order
FEW = ["--resamples", "50", "--permutations", "50"]


def row(
    completion: str, labels: tuple[str, ...], *, id="r1", evaluated=ABC, patient="p", **fields
) -> dict:
    """Make a row of a predictions file before its completion is parsed."""
    return {
        "id": id,
        "patient_id": patient,
        "dataset": "site",
        "labels": list(labels),
        "evaluated_labels": list(evaluated),
        "source_labels": [],
        "prompt": "short",
        "completion": completion,
        "completion_length": 10,
    } | fields


def parsed(rows: list[dict]) -> list[Prediction]:
    """Read rows as a predictions file would give them."""
    return [Prediction.from_row(row) for row in rows]


# ---- answers of two models to two data sets ------------------------------------------------------
def answer(*labels: str, think: str = "x") -> str:
    return f"<think>{think}</think><solution>{', '.join(labels)}</solution>"


def home_rows(*said: str) -> list[Prediction]:
    """Make answers to four images of three patients, of which all 14 labels are evaluated.

    True are Edema; Edema and Fracture; No Finding; Fracture.
    """
    true = (("Edema",), ("Edema", "Fracture"), ("No Finding",), ("Fracture",))
    return parsed(
        [
            row(
                text,
                labels,
                id=f"h{n}",
                patient=f"p{min(n, 2)}",
                evaluated=LABELS,
                completion_length=10 * n + 10,
            )
            for n, (text, labels) in enumerate(zip(said, true, strict=True))
        ]
    )


def nih_rows(*said: str) -> list[Prediction]:
    """Make answers to three images with NIH's own labels.

    They are Edema; Effusion; Mass and Infiltration.
    """
    source = (["Edema"], ["Effusion"], ["Mass", "Infiltration"])
    true = (("Edema",), (), ("Lung Lesion",))
    return parsed(
        [
            row(text, labels, id=f"n{n}", patient=f"q{n}", evaluated=NIH_NINE)
            | {"source_labels": list(names)}
            for n, (text, labels, names) in enumerate(zip(said, true, source, strict=True))
        ]
    )


BEFORE = home_rows(
    answer("Edema"), answer("Pneumonia"), "no idea", answer("No Finding", "Fracture")
)
AFTER = home_rows(
    answer("Edema"), answer("Edema", "Fracture"), answer("No Finding"), answer("Edema")
)
NIH_BEFORE = nih_rows(answer("Edema"), answer("Pleural Effusion"), answer("Lung Lesion"))
NIH_AFTER = nih_rows(answer("Edema"), answer("Edema"), answer("Pleural Effusion"))


def save(folder: Path, **sets: list[Prediction]) -> Path:
    for name, rows in sets.items():
        write_results(folder, name, rows, score(rows))
    return folder


# ---- contrasts and tables ------------------------------------------------------------------------
def compared(
    tmp_path: Path, before: list[Prediction], after: list[Prediction], name: str = "home"
) -> Contrast:
    """Set two models' answers to one data set side by side, as `base` and `sft`."""
    for model, rows in (("base", before), ("sft", after)):
        write_predictions(tmp_path / f"{model}.jsonl", rows)
    answers = {model: load_answers(tmp_path / f"{model}.jsonl") for model in ("base", "sft")}
    return contrast_models(name, answers, [("base", "sft")], resamples=200, permutations=200)


def texts(line) -> list[str]:
    return [cell.text if isinstance(cell, Cell) else cell for cell in line]


def line_of(table: Table, *start: str) -> list[str]:
    [line] = [texts(line) for line in table.rows if texts(line)[: len(start)] == list(start)]
    return line


# ---- runs ----------------------------------------------------------------------------------------
def training_run(folder: Path, script: str, reward: str = "hard") -> Path:
    """Make a folder that looks like a finished run of 30 steps."""
    folder.mkdir()
    values = {"reward": {"value": reward}, "prompt": {"value": "demo"}}
    (folder / "config.json").write_text(json.dumps({"script": script, "settings": values}))
    names = [panel.metric for panel in (FIGURE_1[:2] if script == "sft" else reward_panels(reward))]
    rows = [
        {"step": step, "split": "train"} | {name: step / 10 + (step % 3) for name in names}
        for step in range(1, 31)
    ]
    write_jsonl(
        folder / "metrics.jsonl", rows + [{"step": 30, "epoch": 1.0, "split": "eval", "loss": 99.0}]
    )
    return folder
