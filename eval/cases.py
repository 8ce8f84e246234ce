"""Sample cases of a report: images chosen over outcomes and labels, with what each model answered."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.answers import parse_answer
from data.examples import Example, read_jsonl
from data.files import DataError
from data.images import load_image
from data.labels import LABELS
from data.prompts import PROMPTS
from eval.contrasts import Comparison
from eval.evaluate import reparse
from eval.folders import Entry, Predictions, located
from eval.page import OUTCOMES, Case, Cases, ModelAnswer, Picture

MAX_SIDE = 384  # pixels of a picture in the report
_CANDIDATES = 400  # images looked at for the next case


def outcomes(answers: Predictions) -> list[str]:
    """right, wrong or failed of each answer: exactly the true labels, other labels, or no labels
    that could be read.
    """
    return [
        OUTCOMES[2] if not parsed else OUTCOMES[0] if right else OUTCOMES[1]
        for parsed, right in zip(answers.parsed, answers.right)
    ]


def chosen_ids(answers: Predictions, count: int, seed: int) -> list[str]:
    """`count` images: failed, wrong and right answers by turns while there are any, each time the
    one among random candidates whose true and predicted labels were shown least so far.
    """
    order = np.random.default_rng(seed).permutation(len(answers.ids))
    shown = outcomes(answers)
    waiting = {outcome: [n for n in order if shown[n] == outcome] for outcome in reversed(OUTCOMES)}
    seen: Counter = Counter()
    ids: list[str] = []
    while len(ids) < count and any(waiting.values()):
        for candidates in waiting.values():
            if candidates and len(ids) < count:
                labels = {
                    n: np.flatnonzero(answers.targets[n] | answers.predictions[n]).tolist()
                    for n in candidates[:_CANDIDATES]
                }
                best = min(
                    labels,
                    key=lambda n: (
                        sum(seen[k] for k in labels[n]) / max(1, len(labels[n])),
                        candidates.index(n),
                    ),
                )
                candidates.remove(best)
                seen.update(labels[best])
                ids.append(answers.ids[best])
    return ids


def sample_cases(
    entries: Sequence[Entry],
    comparisons: Sequence[Comparison],
    count: int,
    *,
    seed: int,
    image_root: str | None = None,
) -> Cases:
    """`count` cases over all data sets, by the answers of each set's last model. An image that
    cannot be read is left out.
    """
    cases, prompts = [], {}
    for place, comparison in enumerate(comparisons):
        share = count // len(comparisons) + (place < count % len(comparisons))
        models = [entry for entry in entries if entry.name in comparison.predictions]
        ids = chosen_ids(comparison.predictions[models[-1].name], share, seed)
        rows = {entry.name: _rows(entry.sets[comparison.data_set], set(ids)) for entry in models}
        pictures = _pictures(models, comparison.data_set, ids, image_root)
        places = {id: n for n, id in enumerate(comparison.first.ids)}
        shown = {
            entry.name: (
                comparison.predictions[entry.name],
                outcomes(comparison.predictions[entry.name]),
            )
            for entry in models
        }
        for id in ids:
            answers = [
                _answer(
                    entry.name,
                    rows[entry.name][id],
                    shown[entry.name][1][places[id]],
                    float(shown[entry.name][0].jaccard[places[id]]),
                )
                for entry in models
            ]
            row = rows[models[0].name][id]
            cases.append(
                Case(
                    f"{comparison.data_set}: {id}",
                    row["labels"],
                    [label for label in LABELS if label in row["evaluated_labels"]],
                    pictures.get(id),
                    answers,
                )
            )
            prompts |= {str(rows[entry.name][id].get("prompt")): None for entry in models}
    return Cases(
        cases,
        [
            (name, PROMPTS[name].text if name in PROMPTS else "(its text is not in this version)")
            for name in prompts
        ],
    )


def _rows(path: Path, ids: set[str]) -> dict[str, dict]:
    """The rows of these images, parsed anew; the file was found sound when it was first read."""
    with path.open(encoding="utf-8-sig") as lines:
        rows = (json.loads(line) for line in lines if line.strip())
        return {row["id"]: row for row in reparse([row for row in rows if row["id"] in ids])}


def _answer(model: str, row: Mapping, outcome: str, jaccard: float) -> ModelAnswer:
    answer = parse_answer(row["completion"], row["answer_format"])
    facts = [("Jaccard", f"{jaccard:.2f}"), ("tokens", f"{row['completion_length']:,}")]
    for name, reward in (
        (row.get("rewards") or {}).items() if isinstance(row.get("rewards"), dict) else ()
    ):
        if isinstance(reward, dict) and all(
            isinstance(value, (int, float)) for value in reward.values()
        ):
            parts = " ".join(
                f"{round(value, 3):+g} {part}" for part, value in reward.items() if part != "total"
            )
            facts.append((f"{name} reward", f"{round(reward.get('total', 0), 3):g} = {parts}"))
    facts += [
        (name, value)
        for name, value in (
            ("problem", row["problem"]),
            ("unknown entries", ", ".join(answer.unknown)),
            ("contradiction", "No Finding with a finding" if answer.contradictions else ""),
        )
        if value
    ]
    return ModelAnswer(
        model, outcome, (answer.think or "").strip(), list(answer.labels), row["completion"], facts
    )


def _pictures(
    models: Sequence[Entry], data_set: str, ids: Sequence[str], image_root: str | None
) -> dict[str, Picture]:
    """{id: its picture}, from the first model's data file that is still there and holds the images."""
    for entry in models:
        file = entry.data_file(data_set)
        root = image_root or entry.settings.get("image_root")
        if file is not None:
            try:
                examples = {
                    example.id: example
                    for example in read_jsonl(file, located(root, entry.folder) if root else None)
                }
            except DataError:
                continue
            return {
                id: picture for id in ids if id in examples and (picture := _picture(examples[id]))
            }
    return {}


def _picture(example: Example) -> Picture | None:
    try:
        image = load_image(example)
    except DataError:
        return None
    image = image.convert("L")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return Picture(f"case-{example.id}", file.getvalue(), "image/jpeg", f"Chest X-ray {example.id}")
