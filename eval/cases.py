"""Choose sample cases for a report: varied images, with what each model answered."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data.examples import Example, read_jsonl
from data.files import DataError
from data.images import load_image
from data.predictions import Prediction, iter_predictions
from data.prompt_files import prompt_name, prompt_of, prompt_problems
from eval.contrasts import Contrast
from eval.folders import Answers, Entry, located
from eval.page import Case, Cases, ModelAnswer, Outcome, Picture, Strip, Turn

MAX_SIDE = 384  # pixels of a picture in the report
_SHORT = 40  # characters of labels that fit into a card of the first screen
_CANDIDATES = 400  # images looked at for the next case


def outcomes(answers: Answers) -> list[Outcome]:
    """Tell the outcome of each answer: right, wrong or failed.

    right: exactly the true labels. wrong: other labels. failed: no labels that could be read.
    """
    return [
        "failed" if not parsed else "right" if right else "wrong"
        for parsed, right in zip(answers.parsed, answers.right, strict=True)
    ]


def turns(before: Sequence[Outcome], after: Sequence[Outcome]) -> list[Turn]:
    """Tell of each image whether a model fixed or broke the answer of the one before it."""
    return [
        "fixed" if now == "right" != earlier else "broken" if earlier == "right" != now else ""
        for earlier, now in zip(before, after, strict=True)
    ]


def chosen_ids(answers: Answers, count: int, seed: int, before: Answers | None = None) -> list[str]:
    """Choose up to `count` images, labels varied.

    By turns they are answers that `before` had wrong and that are right now, the reverse, and
    failed, wrong and right ones. Each time it is the one among random candidates whose true and
    predicted labels were shown least so far.
    """
    order = np.random.default_rng(seed).permutation(len(answers.ids))
    shown = outcomes(answers)
    turned = turns(shown if before is None else outcomes(before), shown)
    kinds = [turn or outcome for turn, outcome in zip(turned, shown, strict=True)]
    waiting = [
        [n for n in order if kinds[n] == kind]
        for kind in ("fixed", "broken", "failed", "wrong", "right")
    ]
    seen: Counter[int] = Counter()
    ids: list[str] = []
    while len(ids) < count and any(waiting):
        for candidates in waiting:
            if candidates and len(ids) < count:
                best, labels = _least_shown(answers, candidates[:_CANDIDATES], seen)
                candidates.remove(best)
                seen.update(labels)
                ids.append(answers.ids[best])
    return ids


def _least_shown(
    answers: Answers, candidates: Sequence[int], seen: Counter[int]
) -> tuple[int, list[int]]:
    """Return the first candidate whose labels were seen least on average, and its labels."""
    best: tuple[float, int, list[int]] | None = None
    for n in candidates:
        labels = np.flatnonzero(answers.targets[n] | answers.predictions[n]).tolist()
        mean = sum(seen[k] for k in labels) / max(1, len(labels))
        if best is None or mean < best[0]:
            best = (mean, n, labels)
    assert best is not None  # there is a candidate
    return best[1:]


def sample_cases(
    entries: Sequence[Entry],
    contrasts: Sequence[Contrast],
    count: int,
    *,
    seed: int,
    step: tuple[str, str] | None = None,
    image_root: str | None = None,
) -> Cases:
    """Choose `count` cases over all data sets, by the answers of each set's last model.

    step: (before, after) of the models whose turns are shown. image_root: folder of the images,
    else that of the evaluation or of the data file. A case whose image cannot be read has no
    picture.
    """
    cases: list[Case] = []
    prompts: dict[str, str] = {}
    for index, contrast in enumerate(contrasts):
        share = count // len(contrasts) + (index < count % len(contrasts))
        models = [entry for entry in entries if entry.name in contrast.answers]
        of_step = step if step and set(step) <= set(contrast.answers) else None
        ids = chosen_ids(
            contrast.answers[of_step[1] if of_step else models[-1].name],
            share,
            seed,
            contrast.answers[of_step[0]] if of_step else None,
        )
        rows = {entry.name: _chosen(entry.sets[contrast.data_set], set(ids)) for entry in models}
        pictures = _pictures(models, contrast.data_set, ids, image_root)
        cases += _cases_of(contrast, rows, ids, of_step, pictures)
        asked = [(entry, rows[entry.name][id]) for id in ids for entry in models]
        prompts |= {row.prompt: _text_of_prompt(entry, row) for entry, row in asked}
    return Cases(cases, list(prompts.items()))


def _text_of_prompt(entry: Entry, row: Prediction) -> str:
    """Find what the model was told: the text that its run keeps, or that of a built-in prompt."""
    kept = entry.prompt_read
    prompt = kept if prompt_name(kept) == row.prompt else row.prompt
    if prompt_problems(prompt, row.label_set):
        return "(its text is not in this version)"
    return prompt_of(prompt, row.label_set).text


def _cases_of(
    contrast: Contrast,
    rows: Mapping[str, Mapping[str, Prediction]],
    ids: Sequence[str],
    step: tuple[str, str] | None,
    pictures: Mapping[str, Picture],
) -> list[Case]:
    """Put together the cases of one data set.

    rows: {model: {id: its prediction}}. ids: of the images. step: (before, after), whose turns are
    shown. pictures: {id: picture}.
    """
    position = {id: n for n, id in enumerate(contrast.first.ids)}
    shown = {name: outcomes(answers) for name, answers in contrast.answers.items()}
    turned = turns(*(shown[name] for name in step)) if step else []
    cases = []
    for id in ids:
        place = position[id]
        answers = [
            _answer(
                model, of[id], shown[model][place], float(contrast.answers[model].jaccard[place])
            )
            for model, of in rows.items()
        ]
        truth = next(iter(rows.values()))[id]
        evaluated = list(truth.label_set.ordered(truth.evaluated_labels))
        turn = turned[place] if turned else ""
        cases.append(
            Case(contrast.data_set, id, truth.labels, evaluated, pictures.get(id), answers, turn)
        )
    return cases


def case_strip(cases: Cases, step: tuple[str, str] | None, count: int = 4) -> Strip:
    """Choose the cases that a page shows first: what the last step fixed and broke, wrong, right.

    Those whose labels fit into a narrow card come first. step: (before, after). Kinds that are
    missing give way to further cases of the others.
    """
    kinds: list[tuple[str, Callable[[Case], bool]]] = [
        ("wrong", lambda case: not case.turn and case.answers[-1].outcome != "right"),
        ("right", lambda case: not case.turn and case.answers[-1].outcome == "right"),
    ]
    if step:
        kinds = [
            (f"fixed by {step[1]}", lambda case: case.turn == "fixed"),
            (f"broken by {step[1]}", lambda case: case.turn == "broken"),
            *((f"still {kind}", fits) for kind, fits in kinds),
        ]
    places = sorted(range(len(cases.cases)), key=lambda place: _is_long(cases.cases[place]))
    waiting = [
        (title, [place for place in places if fits(cases.cases[place])]) for title, fits in kinds
    ]
    shown: list[tuple[str, int]] = []
    for turn in range(count):
        for title, fitting in waiting:
            if turn < len(fitting) and len(shown) < count:
                shown.append((title, fitting[turn]))
    return Strip(cases.cases, shown, step or ())


def _is_long(case: Case) -> bool:
    said = [case.labels, *(answer.predicted for answer in case.answers)]
    return any(len(", ".join(labels)) > _SHORT for labels in said)


def _chosen(path: Path, ids: set[str]) -> dict[str, Prediction]:
    """Read the predictions of these images -> {id: prediction}."""
    return {prediction.id: prediction for prediction in iter_predictions(path, ids=ids)}


def _answer(model: str, prediction: Prediction, outcome: Outcome, jaccard: float) -> ModelAnswer:
    answer = prediction.answer
    length = prediction.completion_length
    tokens = "unknown" if length is None else f"{length:,}"
    facts = [("tokens", tokens)]
    contradiction = f"{prediction.label_set.exclusive} with a finding"
    facts += _reward_facts(prediction.extra.get("rewards"))
    facts += [
        (name, value)
        for name, value in (
            ("problem", answer.problem),
            ("unknown entries", ", ".join(answer.unknown)),
            ("contradiction", contradiction if answer.contradictions else ""),
        )
        if value
    ]
    return ModelAnswer(
        model,
        outcome,
        (answer.think or "").strip(),
        list(answer.labels),
        prediction.completion,
        jaccard,
        facts,
    )


def _reward_facts(rewards: object) -> list[tuple[str, str]]:
    """Show the rewards that a training run noted with its predictions, each as total = parts."""
    facts = []
    for name, reward in rewards.items() if isinstance(rewards, dict) else ():
        if isinstance(reward, dict) and all(
            isinstance(value, (int, float)) for value in reward.values()
        ):
            parts = " ".join(
                f"{round(value, 3):+g} {part}" for part, value in reward.items() if part != "total"
            )
            facts.append((f"{name} reward", f"{round(reward.get('total', 0), 3):g} = {parts}"))
    return facts


def _pictures(
    models: Sequence[Entry], data_set: str, ids: Sequence[str], image_root: str | None
) -> dict[str, Picture]:
    """Read the images -> {id: picture}, from the first model's data file that is still there."""
    for entry in models:
        file = entry.data_file(data_set)
        root = image_root or entry.settings.get("image_root")
        if file is not None:
            try:
                folder = located(root, entry.folder) if root else None
                rows = read_jsonl(file, folder, entry.label_set)
            except DataError:
                continue
            examples = {example.id: example for example in rows}
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
