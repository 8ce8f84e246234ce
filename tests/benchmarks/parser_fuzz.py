"""Fuzz the parser of answers: a million texts against an oracle, and its time against the length.

    python tests/benchmarks/parser_fuzz.py [--texts 1000000] [--seed 0]

Half of the texts are random: characters of all of Unicode, fragments of tags, labels, markup,
separators and negations. The other half are answers as models write them, with up to four random
changes. Each is parsed in one of the four formats. The oracle, a regular expression that shares no
code with the parser, says whether the form is strict, which block holds the labels, and so what
`valid`, `parsed` and `problem` must be. Of the labels it knows the bounds: one that is read stands
in the block with exactly its letters, and a text without letters or digits has none.

Then hostile texts are parsed at 1, 2, 4 and 8 times a length. Linear time doubles with the length.
The exit code is 1 where a text crashes the parser or contradicts the oracle, or where 8 times the
length take more than 16 times as long. Three to ten minutes.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import sys
import time
import unicodedata
from collections import Counter

import checkout  # noqa: F401  this checkout before an installed one

from data.answers import ANSWER_FORMATS, Answer, parse_answer
from data.entries import UNKNOWN_KINDS, unknown_kind
from data.labels import ALIASES, LABELS

TAGS = ["<think>", "</think>", "<solution>", "</solution>", "<answer>", "</answer>"]
FRAGMENTS = [
    *TAGS, *TAGS, "<", ">", "</", "<br>", "<SOLUTION>", "<think >", "Edema", "edema",
    "Pleural Effusion", "no finding", "No Findings", "Support Devices", "lung_opacity", "nodule",
    "no", "not", "without", "absent", "left", "mild", "(small)", "and", "or", "&", "/", "|", "\t",
    ",", ";", "\n", "\r\n", "\uff0c", "\u060c", ":", "yes", "0", "1", "1.", "2)", "(3)", "a)",
    "- ", "* ", "\u2022", "\u2013", "+", "**", "`", "```json", '"', "'", "\u201c", "\u201d", "[",
    "]", "{", "}", "(", ")", "[ ]", "[x]", "#", "Labels:", "Absent:", "\\boxed{", "\\n", "\u200b",
    "\ufeff", "\u0301", "\u0323\u0307", "\ud800", "\uff25\uff44\uff45\uff4d\uff41", " ", " ",
    "\u2460",
]  # fmt: skip
BODIES = [
    "Edema, Fracture", "1. Edema\n2. Pleural Effusion", "**Edema**, **No Finding**",
    '["Edema", "Fracture"]', "Edema and Cardiomegaly", "Pneumonia, Edema, and Fracture",
    "Labels: Edema, Fracture", "Edema: no", "no Edema, Fracture, or Pneumonia",
    "left Pleural Effusion", "Pleural Effusion (small), Edema", "Edema | absent",
    '{"Edema": 1, "Fracture": 0}', '{"labels": ["Edema", "Fracture"]}',
    "Absent:\n- Edema\n- Fracture", "- [ ] Edema", "Edema, no\nFracture, yes",
    "\\boxed{Edema, Fracture}", "No Finding", "", "The lungs are clear.", "Edema/Fracture",
]  # fmt: skip
FORMS = {
    "think_solution": "<think>Dense base.</think>\n<solution>{}</solution>",
    "solution": "<solution>{}</solution>",
    "answer_tag": "<think>Dense base.</think>\n<answer>{}</answer>",
    "label_list": "{}",
}
HOSTILE = {  # what is repeated inside the answer block
    "labels": "Edema, ", "entries": "nodule {}, ", "commas": ",", "lines": "\n", "spaces": " ",
    "one word": "x", "words": "x ", "brackets": "[", "nested brackets": "[({<", "bullets": "- ",
    "and": "Edema and ", "bars": "Edema|", "combining marks": "\u0301\u0323", "headings": "a:",
    "labels' names": "Labels:\n", "negations": "no Edema, ", "series": "no Edema, Fracture or ",
    "absent": "Edema and Fracture absent, ", "verdicts": "Edema, no, ", "digits": "1",
    "numbers": "1. ", "backslashes": "\\", "tags": "<think>", "full stops": ".", "dashes": " - ",
    "underscores": "_", "hyphens": "Edema-", "stars": "*a", "fences": "```\n",
    "JSON": '{"label": "Edema"}, ',
}  # fmt: skip


def random_text(rng: random.Random) -> str:
    pieces = []
    for _ in range(rng.randint(0, 25)):
        if rng.random() < 0.85:
            pieces.append(rng.choice(FRAGMENTS))
        else:  # anything, lone surrogates too
            pieces += [chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.3:
            pieces.append(" ")
    return "".join(pieces)


def mutated_text(rng: random.Random, answer_format: str) -> str:
    text = FORMS[answer_format].format(rng.choice(BODIES))
    for _ in range(rng.randint(0, 4)):
        i, j = sorted(rng.randint(0, len(text)) for _ in range(2))
        change = rng.randrange(5)
        if change == 0:
            text = text[:i] + rng.choice(FRAGMENTS) + text[i:]
        elif change == 1:
            text = text[:i] + text[min(j, i + 3) :]
        elif change == 2:
            text = text[:j] + text[i:]  # repeats a part
        elif change == 3:
            text = text[:i] + chr(rng.randrange(0x110000)) + text[i + 1 :]
        else:
            text = text[:i] + text[i:j].swapcase() + text[j:]
    return text


# ---- oracle --------------------------------------------------------------------------------------
def block(name: str, form: str) -> str:
    """Write the pattern of one block of a form, in which none of the form's tags occurs."""
    return rf"<{name}>((?:(?!</?(?:{form})>).)*)</{name}>"


ANSWER_TAG = {"think_solution": "solution", "solution": "solution", "answer_tag": "answer"}
STRICT = {
    "think_solution": (
        rf"\s*{block('think', 'think|solution')}\s*{block('solution', 'think|solution')}\s*"
    ),
    "solution": rf"\s*{block('solution', 'solution')}\s*",
    "answer_tag": rf"\s*{block('think', 'think|answer')}\s*{block('answer', 'think|answer')}\s*",
}
# what may name a list, and so be no entry: nothing else with a letter or a digit is no entry
NAMES = re.compile(r"[0-9]*\W*(?:labels?|findings?|answer)|json|br", re.I)


def answer_block(text: str, answer_format: str) -> str | None:
    """Find the labels' block: None where there is not exactly one."""
    if answer_format == "label_list":
        return None if any(tag in text for tag in TAGS) else text
    tag = ANSWER_TAG[answer_format]
    if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
        return None
    found = re.search(block(tag, tag), text, re.S)
    return found[1] if found else None


def letters(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if c.isalpha())


SPELT = {label: {letters(label)} for label in LABELS}
for alias, label in ALIASES.items():
    SPELT[label].add(letters(alias))


def contradictions(text: str, answer_format: str, answer: Answer) -> list[str]:
    """Compare an answer with the oracle -> what is wrong."""
    wrong = []
    body = answer_block(text, answer_format)
    said = body is not None and any(c.isalnum() for c in NAMES.sub("", body))
    if answer_format == "label_list":
        strict = bool(answer.labels)
    else:
        strict = re.fullmatch(STRICT[answer_format], text, re.S) is not None
    if answer.valid != strict:
        wrong.append(f"valid {answer.valid}")
    if body is None:
        if answer.parsed or answer.labels or answer.unknown:
            wrong.append("read without a block")
        return wrong
    if answer.parsed != (bool(answer.labels) or (answer.problem == "empty" and not said)) and (
        answer_format != "label_list" or answer.labels
    ):
        wrong.append(f"parsed {answer.parsed}")
    if (answer.problem == "no_label") != (bool(answer.unknown) and not answer.labels):
        wrong.append(f"problem {answer.problem}")
    if said and not (answer.labels or answer.unknown):
        wrong.append("entries are lost")
    inside = letters(body)
    wrong += [
        f"{label} is not in the text"
        for label in answer.labels
        if not any(spelling in inside for spelling in SPELT[label])
    ]
    if len(set(answer.labels)) < len(answer.labels) or len(set(answer.unknown)) < len(
        answer.unknown
    ):
        wrong.append("repeated")
    if not {unknown_kind(entry) for entry in answer.unknown} <= set(UNKNOWN_KINDS):
        wrong.append("kind")
    return wrong


def fuzz(count: int, seed: int) -> int:
    """Parse random and changed texts -> how many crashed or contradict the oracle."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    faults = 0
    for n in range(count):
        answer_format = rng.choice(ANSWER_FORMATS)
        text = random_text(rng) if n % 2 else mutated_text(rng, answer_format)
        try:
            answer = parse_answer(text, answer_format)
            wrong = contradictions(text, answer_format, answer)
        except Exception as error:  # whatever it is, it is a fault
            wrong = [repr(error)]
        else:
            seen[answer.problem or "none"] += 1
            seen["valid"] += answer.valid
            seen["with a label"] += bool(answer.labels)
        if wrong:
            faults += 1
            if faults <= 20:
                print(f"{answer_format} {text!r}: {', '.join(wrong)}", file=sys.stderr)
    shares = ", ".join(f"{name} {number:,}" for name, number in seen.most_common())
    print(f"{count:,} texts, {faults} faults: {shares}")
    return faults


def seconds(text: str, answer_format: str) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        parse_answer(text, answer_format)
        times.append(time.process_time() - start)
    return min(times)


def grow(length: int) -> int:
    """Parse hostile texts of 1 to 8 times a length -> how many grow faster than their length."""
    print(f"\nCPU seconds at {length:,} characters and 2, 4, 8 times that; times longer at 8")
    quadratic = 0
    for name, piece in HOSTILE.items():
        spent = []
        for size in (1, 2, 4, 8):
            pieces = itertools.count()
            text = ""
            if "{}" in piece:
                count = size * length // len(piece)
                text = "".join(piece.format(next(pieces)) for _ in range(count))
            else:
                text = piece * (size * length // len(piece))
            spent.append(seconds(FORMS["think_solution"].format(text), "think_solution"))
        ratio = spent[-1] / max(spent[0], 1e-6)
        slow = ratio > 16 and spent[-1] > 0.05  # what takes less is the clock's noise
        quadratic += slow
        print(
            f"{name:16} {' '.join(f'{value:8.3f}' for value in spent)} {ratio:6.1f}"
            + " not linear" * slow
        )
    entries = ",".join(str(i) for i in range(1_000_000))
    start = time.process_time()
    parse_answer(FORMS["solution"].format(entries), "solution")
    print(f"a million entries: {time.process_time() - start:.1f} s")
    return quadratic


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=100_000, help="characters of hostile texts")
    flags = parser.parse_args()
    faults = fuzz(flags.texts, flags.seed)
    return int(bool(faults + grow(flags.length)))


if __name__ == "__main__":
    sys.exit(main())
