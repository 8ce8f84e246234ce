"""Write the card of a finished adapter or a merged model: README.md, in the form of the hub.

It is made from config.json and scores-<set>.json of the run. It names no file, no folder and no
patient: data sets appear by name, size and SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.answers import ANSWER_FORMATS, blocks_of
from data.files import written_whole
from data.label_sets import labels_of
from data.labels import CHEXPERT, LabelSet
from data.plain_files import is_plain, parse_record, read_plain
from data.prompt_files import prompt_of, prompt_problems
from engine.adapter_files import adapter_record
from engine.bases import UNKNOWN_TERMS, Base, base_facts, hub_name, source_of, titles_of
from engine.config import UsageError, recipes_of
from engine.families import PIXEL_BOUNDS
from engine.inherited import FRESH
from engine.merge_settings import INTERPOLATION
from engine.model_files import EMBEDDED
from engine.resume import saved_record

CARD = "README.md"
_LARGEST = 2**20  # bytes of a card; one of ours has some 5,000
# Ends a card that nobody has changed: the SHA-256 of all that stands before it.
_MARK = "\n<!-- card {} -->\n"
_METRICS = {"macro_f1": "macro-F1", "micro_f1": "micro-F1", "jaccard": "Jaccard index"}
_TITLES = {"sft": "SFT", "grpo": "SFT and GRPO"}
TRAINED_BEFORE = "train (before)"  # in the data of an interpolation: what the first of the two saw


def write_run_card(folder: Path) -> None:
    """Write the card of a finished run beside its adapter. A card that a person changed stays."""
    base = str(adapter_record(folder).get("base_model_name_or_path") or "")
    with _of_a_run(folder):
        text = card_of(folder, base)
    _write(folder, text)


def write_merged_card(folder: Path, adapter: Path, base: str) -> None:
    """Write the card of a merged model, from the run of the adapter that was folded in.

    folder: of the merged model. adapter: a run's folder, or a checkpoint's. base: its base model.
    """
    with _of_a_run(adapter):
        text = card_of(adapter, base, merged=True)
    _write(folder, text)


@contextlib.contextmanager
def _of_a_run(folder: Path) -> Iterator[None]:
    """Turn what records of another shape than a run's make the block raise into one UsageError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise UsageError(
            f"{folder}: config.json or scores-*.json is not as a run writes it"
            f" ({type(error).__name__}: {error}), so no card can be made; repair or remove it"
        ) from error


def _write(folder: Path, text: str) -> None:
    path = folder / CARD
    if os.path.lexists(path) and not (is_plain(path) and _is_unchanged(_text_of(path))):
        print(f"note: {path} was changed by hand and stays as it is", file=sys.stderr)
        return
    with written_whole(path) as temporary:
        temporary.write_text(text + _MARK.format(_digest(text)), encoding="utf-8")


def _text_of(path: Path) -> str:
    try:
        return read_plain(path, _LARGEST).decode(errors="replace")
    except OSError:
        return ""


def _is_unchanged(text: str) -> bool:
    body, mark, digest = text.rpartition(_MARK.partition("{}")[0])
    return bool(mark) and digest == f"{_digest(body)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the text ------------------------------------------------------------------------------------
def card_of(folder: Path, base: str, *, merged: bool = False) -> str:
    """Make a card -> front matter and Markdown.

    folder: with the run's config.json and scores-<set>.json, both where there are any.
    base: the base model's name. merged: for the merged model, else for the adapter.
    """
    (record, settings), scores = saved_record(folder), _scores_of(folder)
    facts, stage = base_facts(base), record.get("script")
    name = facts.title if facts else hub_name(base) or "an unnamed base"
    kind = "merged model" if merged else "LoRA adapter"
    made = "GRPO" if _is_from_base(settings) else _TITLES.get(str(stage), "fine-tuned")
    if stage == INTERPOLATION:
        made = _between(record)
    title = f"{name}, {made}: chest X-ray labels ({kind})"
    datasets = _datasets(record)
    front = _front_matter(title, base, facts, stage, datasets, scores, merged)
    return "\n".join(
        [
            *front,
            f"# {title}",
            "",
            f"A {kind} that names the findings of a frontal chest X-ray, of {_labels(settings)}"
            f"{_reasoned(settings)}. Made by {_how(record, settings)}.",
            "",
            *_base_section(base, facts),
            *_data_section(record, datasets),
            *_scores_section(scores),
            "## Intended use",
            "",
            "Research on vision-language models and on how their scores transfer between hospitals."
            " Scores of labels are all that was measured: nobody has judged the reasoning.",
            "",
            "## Limits",
            "",
            "* Not a medical device. Not for diagnosis, triage or any decision on a patient.",
            f"* Frontal X-rays, English prompts, {len(_label_set(settings).names)} labels. What it"
            " was not trained on it names wrongly or not at all.",
            "* Truth is what labelers or readers of the data sets say, with their errors.",
            "* A higher score on one hospital's data can go with a lower one elsewhere.",
            "* Vision-language models make things up: a fluent reading is no evidence.",
            "",
            *_use_section(base, facts, settings, merged),
        ]
    )


def _scores_of(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("scores-*.json")):
        try:
            record = parse_record(read_plain(path))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read ({error}); repair or remove it") from error
        if isinstance(record, dict):
            found[path.stem.removeprefix("scores-")] = record
    return found


def _datasets(record: Mapping[str, Any]) -> list[str]:
    """List the values of `dataset` in the run's data files, the training set's first."""
    found: dict[str, None] = {}
    for file in record.get("data", {}).values():
        found |= dict.fromkeys(_sources(file))
    return list(found)


def _sources(file: Mapping[str, Any]) -> list[str]:
    """Name the data sets in a file. An older record has only what data.select noted, if that."""
    noted = (file.get("selection") or {}).get("pool", {}).get("source")
    return file.get("datasets") or ([str(noted)] if noted else [])


def _label_set(settings: Mapping[str, Any]) -> LabelSet:
    return labels_of(settings.get("label_file"))


def _labels(settings: Mapping[str, Any]) -> str:
    """Say which labels there are: CheXpert's, or all names of a label file."""
    label_set = _label_set(settings)
    if label_set == CHEXPERT:
        return "CheXpert's 14 labels"
    return f"{len(label_set.names)} labels ({_cell(', '.join(label_set.names))})"


def _reasoned(settings: Mapping[str, Any]) -> str:
    form = settings.get("answer_format")
    reasons = form in ANSWER_FORMATS and len(blocks_of(form)) > 1
    return ", after its reasoning" if reasons else ""


def _is_from_base(settings: Mapping[str, Any]) -> bool:
    """Tell whether GRPO began with a fresh adapter, without an SFT run."""
    return settings.get("adapter_name_or_path") == FRESH


def _how(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    reward = str(settings.get("reward") or "")
    # of plain letters, whoever wrote it
    its_name = f" (`{reward}`)" if re.fullmatch(r"[\w.:+* -]{1,100}", reward) else ""
    grpo = f"GRPO against a verifiable reward{its_name}"
    methods = {
        "sft": "supervised fine-tuning on reasoning traces",
        "grpo": f"{grpo}, from the base itself"
        if _is_from_base(settings)
        else f"supervised fine-tuning and then {grpo}",
    }
    if record.get("script") == INTERPOLATION:
        return f"interpolating the weights of two adapters, {_between(record)}"
    how = methods.get(str(record.get("script")), "fine-tuning")
    # a recipe by path is a file of this machine
    named = [f"`{one}`" for one in recipes_of(record) if re.fullmatch(r"[\w.-]+", one)]
    word = "recipe" if len(named) == 1 else "recipes"
    return how + (f" ({word} {', '.join(named)})" if named else "")


def _between(record: Mapping[str, Any]) -> str:
    """Say how much of which adapter's change an interpolated one has."""
    source = record[INTERPOLATION]
    shares = (1 - source["alpha"], source["alpha"])
    first, second = (_TITLES.get(str(script), "an adapter") for script in source["scripts"])
    return f"{shares[0]:.6g} of {first} and {shares[1]:.6g} of {second}"


# ---- front matter --------------------------------------------------------------------------------
def _front_matter(
    title: str,
    base: str,
    facts: Base | None,
    stage: str | None,
    datasets: Sequence[str],
    scores: Mapping[str, Mapping[str, Any]],
    merged: bool,
) -> list[str]:
    """Write the YAML between two lines of ---. Every string is JSON, which is YAML too."""
    on_hub = None if base in EMBEDDED else hub_name(base)
    fields: dict[str, Any] = {"base_model": on_hub} if on_hub else {}
    fields |= {"library_name": "transformers" if merged else "peft"}
    fields |= dict(facts.licence) if facts else {"license": "unknown"}
    fields |= {"pipeline_tag": "image-text-to-text", "language": ["en"]}
    fields |= {"tags": ["chest-x-ray", "radiology", "medical", *(["lora"] if not merged else [])]}
    fields["tags"] += [stage] if stage else []
    if datasets:
        fields["datasets"] = [re.sub(r"[^\w.-]+", "-", name.lower()) for name in datasets]
    fields["metrics"] = ["f1"]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items())]
    if scores:
        results = [
            {
                "task": {"type": "image-text-to-text", "name": "chest X-ray labels"},
                "dataset": {"type": "chest-x-ray", "name": name},
                "metrics": [
                    {
                        "type": "f1" if key != "jaccard" else "jaccard",
                        "name": f"{shown} (95 % interval {low:.3f} to {high:.3f})",
                        "value": round(_value(of_set, key), 4),
                    }
                    for key, shown in _METRICS.items()
                    for low, high in [of_set["intervals"][key]]
                ],
            }
            for name, of_set in scores.items()
        ]
        lines.append(f"model-index: {json.dumps([{'name': title, 'results': results}])}")
    return [*lines, "---", ""]


def _value(scores: Mapping[str, Any], metric: str) -> float:
    average, _, is_f1 = metric.partition("_")
    return scores[average]["f1"] if is_f1 else scores[metric]


# ---- sections ------------------------------------------------------------------------------------
def _base_section(base: str, facts: Base | None) -> list[str]:
    shown = (
        f"`{base}`"
        if base in EMBEDDED
        else f"`{hub_name(base)}`"
        if hub_name(base)
        else ("a local folder" + (f", taken for {facts.title}" if facts else ""))
    )
    lines = ["## Base and licence", "", f"* Base: {shown}."]
    lines.append(
        f"* Its licence: {facts.licence_text}. It binds what is derived from it too."
        if facts
        else "* Its licence is not known here: look it up before you pass anything on."
    )
    if facts:
        lines.append(f"* Its declared training data: {facts.declared}.")
    return [*lines, ""]


def _data_section(record: Mapping[str, Any], datasets: Sequence[str]) -> list[str]:
    lines = ["## Data", ""]
    files = record.get("data", {})
    if not files:
        return [*lines, "Not known: the folder has no config.json of a run.", ""]
    lines += ["| data | source | images | patients | SHA-256 |", "|---|---|---|---|---|"]
    for name, file in files.items():
        trained, _, hospital = name.partition(".")
        role = f"evaluated: {name}"
        if trained in ("train", TRAINED_BEFORE):
            role = f"trained on: {hospital}" if hospital else "trained on"
        if file.get("weight"):
            role += f", weight {file['weight']}"
        cells = (titles_of(_sources(file)), file.get("images"), file.get("patients"))
        shown = [_cell(f"{cell:,}" if isinstance(cell, int) else cell or "-") for cell in cells]
        lines.append(
            f"| {_cell(role)} | {' | '.join(shown)} | `{_cell(str(file.get('sha256', '-')))}` |"
        )
    lines.append("")
    terms = {}  # by title: several names of a source are said once
    for dataset in datasets:
        source = source_of(dataset)
        terms[_cell(titles_of([dataset]))] = source.terms if source else UNKNOWN_TERMS
    lines += [f"* {title}: {text}." for title, text in terms.items()]
    return [
        *lines,
        "* Pass on the weights, their configuration and this file alone: predictions, completions,"
        " logs and checkpoints of a run hold rows of the data.",
        "",
    ]


def _cell(text: str) -> str:
    """Take out of a name what could become a cell, a tag, a link or an image."""
    return re.sub(r"[|<>\[\]`\x00-\x1f\x7f\x85\u2028\u2029]", " ", text)


def _scores_section(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["## Scores", ""]
    if not scores:
        return [*lines, "None: no scores lay beside the adapter. How well it reads is unknown.", ""]
    lines += [
        "| data set | images | patients | macro-F1 | micro-F1 | Jaccard | failed | macro-F1 of the"
        " most frequent answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, of_set in scores.items():
        cells = [
            f"{_value(of_set, key):.3f} ({low:.3f} to {high:.3f})"
            for key in _METRICS
            for low, high in [of_set["intervals"][key]]
        ]
        blind = of_set.get("baselines", {}).get("most_frequent", {}).get("macro_f1")
        cells = [f"{of_set['n']:,}", f"{of_set['num_patients']:,}", *cells]
        cells += [f"{of_set['fail_rate']:.3f}", "-" if blind is None else f"{blind:.3f}"]
        lines.append(f"| {_cell(name)} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Greedy decoding. In brackets: 95 % intervals, bootstrap by patient. Macro-F1 is the plain"
        " mean over the labels that a data set can express. Failed: answers without readable"
        " labels, which count as empty. Sets that chose the checkpoint flatter it.",
        "",
    ]


def _pixel_bounds(facts: Base | None, settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the image processor's options that keep an image's tokens within the run's bounds."""
    tokens = [settings.get(key) for key in ("min_visual_tokens", "max_visual_tokens")]
    if facts is None or facts.pixels_per_token is None or None in tokens:
        return {}
    pixels = [count * facts.pixels_per_token for count in tokens if count is not None]
    return dict(zip(PIXEL_BOUNDS, pixels, strict=True))


def _use_section(
    base: str, facts: Base | None, settings: Mapping[str, Any], merged: bool
) -> list[str]:
    name = (hub_name(base) if base not in EMBEDDED else None) or "PATH_OF_THE_BASE"
    bounds = _pixel_bounds(facts, settings)
    pixels = "".join(f", {option}={value}" for option, value in bounds.items())
    prompt, label_set = settings.get("prompt") or "", _label_set(settings)
    system, text = "SYSTEM", "PROMPT"
    if not prompt_problems(prompt, label_set):
        told = prompt_of(prompt, label_set)
        system, text = told.system, told.text
    length = settings.get("max_completion_length") or 512
    load = ["model = AutoModelForImageTextToText.from_pretrained("]
    load += [f'    {"FOLDER" if merged else "BASE"}, dtype="auto", device_map="auto"', ")"]
    load += [] if merged else ["model = PeftModel.from_pretrained(model, FOLDER).eval()"]
    return [
        "## Use it",
        "",
        "With transformers" + (":" if merged else " and peft:"),
        "",
        "```python",
        *([] if merged else ["from peft import PeftModel"]),
        "from PIL import Image",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        *([] if merged else [f"BASE = {json.dumps(name)}"]),
        'FOLDER = "PATH_OF_THIS_FOLDER"',
        f"SYSTEM = {json.dumps(system)}",
        f"PROMPT = {json.dumps(text)}",
        "",
        f"processor = AutoProcessor.from_pretrained({'FOLDER' if merged else 'BASE'}{pixels})",
        *load,
        'image = Image.open("xray.png").convert("RGB")',
        'content = [{"type": "image", "image": image}, {"type": "text", "text": PROMPT}]',
        'system = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}',
        "inputs = processor.apply_chat_template(",
        '    [system, {"role": "user", "content": content}],',
        '    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",',
        ").to(model.device)",
        f"output = model.generate(**inputs, max_new_tokens={length}, do_sample=False)",
        'start = inputs["input_ids"].shape[1]',
        "print(processor.decode(output[0, start:], skip_special_tokens=True))",
        "```",
        "",
        *_serve_lines(name, bounds, None if merged else settings.get("lora_r") or 16),
    ]


def _serve_lines(base: str, bounds: Mapping[str, int], rank: int | None) -> list[str]:
    """Write how vLLM serves it. rank: of the adapter, None for a merged model."""
    served = "PATH_OF_THIS_FOLDER" if rank is None else shlex.quote(base)
    command = f"vllm serve {served} --host 127.0.0.1 --generation-config vllm"
    if rank is not None:
        command += f" \\\n    --enable-lora --max-lora-rank {rank}"
        command += " --lora-modules chest=PATH_OF_THIS_FOLDER"
    if bounds:
        command += f" \\\n    --mm-processor-kwargs '{json.dumps(bounds)}'"
    asked = "With vLLM:" if rank is None else "With vLLM, asked for the model `chest`:"
    return [asked, "", "```", command, "```", ""]
