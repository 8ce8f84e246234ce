"""Write the instructions that the model is given, and the chat messages made from them.

    demo                   the embedded demo model's question
    reasoning_narrative    the nine variants of the paper's Table 1. Their texts are not published:
    reasoning_self_check   these are ours, written from the cues that it gives
    reasoning_hypothesis
    reasoning_a ... _f
    free_reasoning         with only_label, reasoning_narrative and reasoning_a the four SFT formats
                           of the paper's section 3.2.1
    only_label             labels without reasoning: no <think> block, also for the parser and the
                           rewards
    nv_reason              another system's own question, to score NV-Reason-CXR-3B fairly:
                           reasoning and an <answer> list
    label_list             a plain list without tags, to score a base model fairly

All but the other system's state the labels and the answer format, so that a base model can be
scored before any training. Texts have places for the labels, which `filled` fills: {labels} for
their names, {number} for how many there are, {rule} for what stands beside the exclusive one. {{
and }} are braces. Data never reaches a template engine: texts are plain strings, put together here.
A prompt of one's own is a file: prompt_files.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from data.answers import blocks_of
from data.labels import CHEXPERT, LabelSet

# Explicit for every family: a chat template's own default ("You are a helpful assistant.") differs
# between them.
SYSTEM_PROMPT = "You read chest X-rays."

_LABEL_RULES = "Use only these labels: {labels}.\n{rule}"
_ANSWER_RULES = (
    _LABEL_RULES + "Answer in exactly this form, with nothing before or after it:\n"
    "<think>your reasoning</think>\n"
    "<solution>label, label, ...</solution>"
)


@dataclass(frozen=True)
class Prompt:
    """Hold one instruction variant.

    text: what the model is told; of TEMPLATES, with the places that `filled` fills.
    answer_format: the parser's name for the form of answer that it asks for (`data.answers`).
    """

    name: str
    text: str
    answer_format: str = "think_solution"
    system: str = SYSTEM_PROMPT


def _prompts(*prompts: Prompt) -> dict[str, Prompt]:
    return {prompt.name: prompt for prompt in prompts}


# Each label on a frontal radiograph, for the variant that is guided by definitions.
_DEFINITIONS = (
    "- No Finding: none of the other labels except, possibly, Support Devices.\n- Enlarged"
    " Cardiomediastinum: the mediastinal silhouette is wide, beyond what projection and rotation"
    " explain, whatever the heart's own size.\n- Cardiomegaly: the heart is wider than half of the"
    " inner chest on a PA film taken in good inspiration; on an AP or supine film only if it is"
    " clearly beyond that.\n- Lung Opacity: any abnormal increase in density of the lung."
    " Consolidation, Edema, Atelectasis, Pneumonia and Lung Lesion are more exact names for some of"
    " its causes and may stand beside it.\n- Lung Lesion: a nodule or mass, a rounded density with"
    " a border of its own.\n- Edema: fluid in interstitium or alveoli: vessels redistributed to the"
    " upper zones and blurred, septal lines, peribronchial cuffing, perihilar haze, usually on both"
    " sides.\n- Consolidation: air spaces are filled: homogeneous density that hides the vessels,"
    " with air bronchograms, no loss of volume.\n- Pneumonia: consolidation or patchy opacity whose"
    " pattern makes infection the likely cause.\n- Atelectasis: loss of volume: linear or"
    " plate-like bands, displaced fissures, a raised hemidiaphragm, crowded vessels.\n-"
    " Pneumothorax: a visible visceral pleural line without lung markings beyond it; on a supine"
    " film also a deep, dark costophrenic sulcus.\n- Pleural Effusion: blunted costophrenic angle,"
    " meniscus, or a veil of density that layers on a supine film.\n- Pleural Other: pleural"
    " thickening, plaque or calcification, or another pleural abnormality that is neither effusion"
    " nor pneumothorax.\n- Fracture: a break or step in a rib, clavicle, the shoulder, sternum or"
    " spine, fresh or healed.\n- Support Devices: any tube, line, wire, pacemaker, valve, drain or"
    " other device.\n"
)

TEMPLATES: dict[str, Prompt] = _prompts(
    # Short on purpose: the embedded demo model reads it in about a hundred tokens, and was trained
    # on exactly this text.
    Prompt(
        "demo",
        "Which findings does this chest X-ray show? Labels: {labels}."
        " Reason inside <think></think>, then list the labels inside <solution></solution>.",
    ),
    Prompt(
        "free_reasoning",
        "Analyse this frontal chest X-ray concisely. Say what you see and what it means, weigh the"
        " findings that matter for the classification, and then give the labels.\n" + _ANSWER_RULES,
    ),
    Prompt(
        "only_label",
        "Which labels apply to this frontal chest X-ray? Give the labels only, without any"
        " explanation.\n"
        + _LABEL_RULES
        + "Answer in exactly this form, with nothing before or after it:\n"
        "<solution>label, label, ...</solution>",
        answer_format="solution",
    ),
    Prompt(
        "reasoning_narrative",
        "Read this frontal chest X-ray as an experienced chest radiologist who thinks aloud. Write"
        " a free narrative, not a checklist: judge the technique as far as it limits the reading,"
        " then describe what you see in heart, mediastinum, lungs, pleura, bones and devices, with"
        " side, zone, extent and certainty. As you go, gather the evidence: for each suspected"
        " finding weigh what speaks for it against what speaks against it, note which findings"
        " explain each other, and say which normal structures rule a diagnosis out. Close with the"
        " findings that the evidence as a whole supports.\n" + _ANSWER_RULES,
    ),
    Prompt(
        "reasoning_self_check",
        "Read this frontal chest X-ray in two passes.\nScan: go through it region by region -"
        " devices, airway and mediastinum, heart, hila, right lung, left lung, pleura and"
        " costophrenic angles, diaphragm and upper abdomen, bones and soft tissues - and note for"
        " each what is normal and what is not.\nVerify: then go through the labels that you are"
        " about to give, one by one. Look at the image again for the sign that would confirm it and"
        " for what could imitate it (rotation, poor inspiration, overlapping structures, skin"
        " folds, an AP projection that enlarges the heart). Keep, drop or add labels accordingly,"
        " and check that none contradicts another.\n" + _ANSWER_RULES,
    ),
    Prompt(
        "reasoning_hypothesis",
        "Read this frontal chest X-ray by testing hypotheses. From the first impression, state two"
        " to four candidate findings that could account for it, and always the hypothesis that the"
        " image is normal. For each, say which signs it predicts and where, whether they are"
        " present, and which signs speak against it. Compare the candidates with each other: which"
        " explains the signs best, which are needed beside it, and which can be given up? Then give"
        " the labels of those that remain.\n" + _ANSWER_RULES,
    ),
    Prompt(
        "reasoning_a",
        "Read this frontal chest X-ray in twelve mandatory steps. Write one numbered line for each"
        " step, also where it is normal:\n1. Projection, inspiration, rotation and exposure.\n2."
        " Tubes, lines, pacemakers and other devices, with the position of their tips.\n3. Trachea"
        " and main bronchi.\n4. Mediastinal contours and width.\n5. Heart size and borders.\n6."
        " Hila and pulmonary vessels.\n7. Right lung, upper, middle and lower zone.\n8. Left lung,"
        " upper, middle and lower zone.\n9. Pleura, fissures and costophrenic angles, free air in"
        " the pleural space.\n10. Diaphragm and the region below it.\n11. Ribs, clavicles,"
        " shoulders, spine and soft tissues.\n12. Impression: which labels the steps above support,"
        " and which they rule out.\n" + _ANSWER_RULES,
    ),
    Prompt(
        "reasoning_b",
        "Read this frontal chest X-ray zone by zone. Divide each lung into upper, middle and lower"
        " zone and compare each zone with the same zone of the other side: density, vessels,"
        " borders. For every zone that is not normal, tell the possible causes apart by pattern:"
        " filled air spaces with air bronchograms (Consolidation, Pneumonia), loss of volume with"
        " displaced structures (Atelectasis), septal lines and perihilar haze on both sides"
        " (Edema), a rounded density with a border (Lung Lesion), density that blunts the angle or"
        " layers (Pleural Effusion), thickened pleura (Pleural Other), a pleural line without"
        " markings beyond it (Pneumothorax). Then review heart and mediastinum, bones and"
        " devices.\n" + _ANSWER_RULES,
    ),
    Prompt(
        "reasoning_c",
        "Write a report of this frontal chest X-ray in which every statement rests on evidence."
        " Inside <think>, write three parts:\nFindings: each observation with side, zone, size or"
        " extent, density and border, and how certain it is.\nLabel-confidence matrix: one line for"
        " each of the {number} labels, as `label | evidence for | evidence against | confidence`,"
        " with the confidence as a whole number of percent.\nImpression: what follows from the"
        " matrix. A label with a confidence of 50 or more goes into the solution, no other does.\n"
        + _ANSWER_RULES,
    ),
    Prompt(
        "reasoning_d",
        "Read this frontal chest X-ray with the definitions below, and give a label only where its"
        " definition is met by what is visible:\n"
        + _DEFINITIONS
        + "Name for each label that you give the part of its definition that is met and where, and"
        " for each label that you considered and rejected the part that is missing.\n"
        + _ANSWER_RULES,
    ),
    Prompt(
        "reasoning_e",
        "Read this frontal chest X-ray twice. First read it as usual and note your findings. Then"
        " take a second look at the places where findings are missed: the apices behind clavicles"
        " and first ribs, the hila, the lung behind the heart, the lung behind and below the domes"
        " of the diaphragm, the costophrenic angles, the edges of the mediastinum, the paratracheal"
        " stripe, the chest wall, ribs, shoulders and spine, the soft tissues, the region below the"
        " diaphragm, and the tip of every device. Say for each whether the second look changes the"
        " first reading, and how.\n" + _ANSWER_RULES,
    ),
    Prompt(
        "reasoning_f",
        "Read this frontal chest X-ray and list its abnormalities. For each abnormality give a"
        " differential diagnosis: at least two causes, ordered by likelihood, with the sign that"
        " favours each and the sign that argues against it, and then the one that you accept, or"
        " that it cannot be decided on this image. Where nothing is abnormal, say which findings"
        " you looked for. Derive the labels from the abnormalities and the causes that you"
        " accepted.\n" + _ANSWER_RULES,
    ),
    # The question and system text with which NV-Reason-CXR-3B is shown by its authors, to be scored
    # in its own form.
    Prompt(
        "nv_reason",
        "Find abnormalities and support devices.",
        answer_format="answer_tag",
        system="You are a helpful assistant.",
    ),
    Prompt(
        "label_list",
        "Which labels apply to this frontal chest X-ray?\n"
        + _LABEL_RULES
        + "Answer with the labels that apply, separated by commas, and with nothing else.",
        answer_format="label_list",
    ),
)


# ---- the labels in a text ------------------------------------------------------------------------
_PLACE = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}|[{}]")
PLACES = ("labels", "number", "rule")


def text_problems(text: str) -> list[str]:
    """Name the braces of a text that are no place for labels, one line each."""
    problems = []
    for found in _PLACE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        if found[1] is not None and found[1] not in PLACES:
            known = ", ".join(f"{{{place}}}" for place in PLACES)
            problems.append(f"line {line}: {found[0]} is no place; there are {known}")
        elif found[0] in ("{", "}"):
            problems.append(f"line {line}: a lone {found[0]}; write {found[0] * 2} for a brace")
    return problems


def filled(template: Prompt, label_set: LabelSet = CHEXPERT) -> Prompt:
    """Write the labels into the places of a sound template -> what the model is told."""
    places = {
        "labels": ", ".join(label_set.names),
        "number": str(len(label_set.names)),
        "rule": exclusive_rule(label_set),
    }

    def written(found: re.Match[str]) -> str:
        return found[0][0] if found[1] is None else places[found[1]]

    return replace(template, text=_PLACE.sub(written, template.text))


def exclusive_rule(label_set: LabelSet) -> str:
    """Tell when the exclusive label is right, and what may accompany it. "" without one."""
    if label_set.exclusive is None:
        return ""
    beside = " and ".join(label_set.beside)
    rest = f"; {beside} may accompany it" if beside else ""
    return f"Report {label_set.exclusive} only if no abnormality is present{rest}.\n"


PROMPTS: dict[str, Prompt] = {name: filled(template) for name, template in TEMPLATES.items()}


def foreign_labels(name: str, label_set: LabelSet) -> tuple[str, ...]:
    """List the chest labels that a prompt's own text names and that are none of `label_set`."""
    found = (text.group() for text in CHEXPERT.in_text.finditer(TEMPLATES[name].text))
    labels = dict.fromkeys(CHEXPERT.find(text) for text in found)
    return tuple(label for label in labels if label and label not in label_set.names)


def solution_text(
    labels: Iterable[str], label_set: LabelSet = CHEXPERT, answer_format: str = "solution"
) -> str:
    """Write the answer block of a form, labels in the order of the set.

    For example "<solution>Edema, Fracture</solution>".
    """
    name = blocks_of(answer_format)[-1]
    return f"<{name}>{', '.join(label_set.ordered(set(labels)))}</{name}>"


def build_messages(prompt: Prompt, answer: str | None = None) -> list[dict]:
    """Build the chat messages for one image: system, user and, when given, the assistant's answer.

    The user's message is the image, then the instruction. The image itself is not in the messages.
    Its place is marked by `{"type": "image"}`.
    """
    messages: list[dict] = [
        {"role": "system", "content": [{"type": "text", "text": prompt.system}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.text}]},
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
