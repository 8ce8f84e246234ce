"""Ask a teacher for reasoning traces, and keep those of its answers that pass every check.

    python -m data.traces export --data_file sft.jsonl --form openai --model MODEL \
        --output_dir requests
    python -m data.traces import --data_file sft.jsonl --answers answers.jsonl \
        --output sft-traces.jsonl
    python -m data.traces import --data_file sft.jsonl --teacher template \
        --output sft-traces.jsonl

Export writes a request for every example: the image, the student's own instruction, the true
labels, and the demand to reason as if from the image alone. Import reads the service's answers and
keeps a trace only where it passes `check_trace`. Nothing here opens a network connection: data
leaves the machine only by what a person does with the exported files.

An answer is rejected as

    no_answer   the files hold none for this example
    failed      the service reports an error, a refusal, or a tool call in place of a text
    no_text     it is blank (detail: where the reasoning is, if there is any)
    damaged     it holds half a character, or U+FFFD in the place of one
    cut         it stopped at the length limit
    long        it has more characters than an answer of a data file may have
    control     it holds another tag than the form's four, as chat templates have for control
                tokens, which SFT refuses
    form        it is not strictly in the form <think>..</think><solution>..</solution> (detail:
                the parser's code)
    labels      its labels are not exactly the true ones
    leak        it lets on that the labels were known (detail: the phrase, of data/leaks.py)
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shlex
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data.answers import blocks_of, parse_answer
from data.command_line import Parser, exit_code, plain_integer
from data.demo.teacher import trace_from_labels
from data.examples import (
    MAX_ANSWER_CHARACTERS,
    Example,
    data_file,
    read_jsonl,
    row_of,
    selection_file,
)
from data.files import DataError, KeptFile, first_problems, write_jsonl
from data.images import check_images, in_parallel, load_image
from data.label_sets import add_label_flag, labels_named
from data.labels import CHEXPERT, LabelSet
from data.leaks import leak
from data.prompt_files import prompt_of
from data.prompts import PROMPTS, Prompt
from data.teacher_answers import ANSWER_FORMAT, TeacherAnswer, read_answers

TEACHER_PROMPTS = tuple(
    name for name, prompt in PROMPTS.items() if prompt.answer_format == ANSWER_FORMAT
)
FORMS = ("gemini", "openai")
# Limits on one input file: Gemini's Batch API takes 2 GB, OpenAI's 200 MB and 50,000 requests. A
# server of one's own has none.
MAX_BYTES = {"gemini": 2_000_000_000, "openai": 200_000_000}
MAX_REQUESTS = 50_000
LARGEST_SIDE = 65_536  # pixels of an image that is sent


# ---- checks --------------------------------------------------------------------------------------
def check_trace(text: str, example: Example) -> tuple[str, str] | None:
    """Say why a teacher's answer cannot be learnt from -> (code, detail), or None for a good one.

    The codes are those of the module's table.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        return "long", f"more than {MAX_ANSWER_CHARACTERS:,} characters"
    if control := _foreign_tag(text):
        return "control", control
    answer = parse_answer(text, ANSWER_FORMAT, example.label_set)
    if not answer.valid:
        return "form", answer.problem or ""
    if not (answer.think or "").strip():
        return "form", "empty think"
    said = {*answer.labels, *answer.unknown}
    if said != example.target.labels or answer.duplicates:
        labels = example.label_set
        written = _listed((*answer.labels, *answer.unknown, *answer.duplicates), labels)
        return "labels", f"{written}, not {_listed(example.target.labels, labels)}"
    if phrase := leak(text, example.label_set):
        return "leak", phrase
    return None


def _foreign_tag(text: str) -> str | None:
    """Find the first <name> in a text that is not a tag of the form's two blocks, or None.

    Names are those that control tokens have: letters, digits and _, between / or |.
    """
    for piece in text.split("<")[1:]:
        name, closed, _ = piece.partition(">")
        if (
            closed
            and name.strip("/|").replace("_", "").isalnum()
            and name.strip("/") not in blocks_of(ANSWER_FORMAT)
        ):
            return f"<{name}>"
    return None


def _listed(labels: Iterable[str], label_set: LabelSet = CHEXPERT) -> str:
    """List labels in the order of their set, with what is no label at the end."""
    order = {label: position for position, label in enumerate(label_set.names)}
    return ", ".join(sorted(labels, key=lambda label: order.get(label, len(order)))) or "none"


# ---- export --------------------------------------------------------------------------------------
def teacher_text(example: Example, prompt: Prompt) -> str:
    """Write the teacher's request: the student's instruction, the truth, and how to reason."""
    truth = example.target.labels
    absent = [label for label in example.evaluated_labels if label not in truth]
    labels = example.label_set
    unrated = [label for label in labels.names if label not in example.evaluated_labels]
    return "\n".join(
        [
            prompt.text,
            "",
            "For you alone, the reference standard of this image:",
            f"present: {_listed(truth, labels)}",
            f"absent: {_listed(absent, labels)}",
            *(
                [f"not rated, and not to be used in <solution>: {_listed(unrated, labels)}"]
                if unrated
                else []
            ),
            "",
            "Write the answer of a radiologist who sees nothing but the image and reasons"
            " independently from what is visible to exactly the labels that are present"
            + ("" if truth else ": here none, so <solution></solution> stays empty")
            + ". Support each of them by the signs that can be seen, with side and zone where you"
            " can tell, and say where the appearance is subtle or uncertain. Do not invent"
            " measurements, earlier images, symptoms or history. Nothing may show that the labels"
            " were known: mention no labels, reference, report, data set or instructions that you"
            " were given.",
        ]
    )


def jpeg(example: Example, max_side: int) -> bytes:
    """Encode the example's image for a request, without the file's metadata.

    max_side: pixels of the longer side at most.
    """
    image = load_image(example)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def request(
    example: Example, prompt: Prompt, form: str, *, model: str | None, max_side: int
) -> str:
    """Write one line of a batch file.

    form: "gemini", the Gemini API's batch form, or "openai", which other servers take too.
    model: name of the model on the server, for "openai".
    """
    data = base64.b64encode(jpeg(example, max_side)).decode("ascii")
    text = teacher_text(example, prompt)
    row: dict[str, Any]
    if form == "gemini":
        parts = [{"inline_data": {"mime_type": "image/jpeg", "data": data}}, {"text": text}]
        row = {"key": example.id, "request": {"contents": [{"role": "user", "parts": parts}]}}
    else:
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
            {"type": "text", "text": text},
        ]
        row = {
            "custom_id": example.id,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": [{"role": "user", "content": content}]},
        }
    return json.dumps(row, ensure_ascii=False) + "\n"


def export(
    examples: Sequence[Example],
    prompt: Prompt,
    form: str,
    output_dir: Path,
    *,
    model: str | None = None,
    max_side: int = 1024,
    max_bytes: int | None = None,
) -> list[Path]:
    """Write the requests of all examples to output_dir/requests-001.jsonl and so on -> the files.

    The folder is written whole or not at all.

    model, max_side: see `request`.
    max_bytes: of one file, or None for what the form's service takes.

    Raises DataError for an image that cannot be read, and where output_dir exists.
    """
    if output_dir.exists():
        raise DataError(
            [f"--output_dir {output_dir} exists and nothing is overwritten; name another folder"]
        )
    check_images(examples)
    max_bytes = max_bytes or MAX_BYTES[form]
    temporary = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        names: list[str] = []
        size = count = max_bytes  # the first request opens the first file
        for line in in_parallel(
            partial(request, prompt=prompt, form=form, model=model, max_side=max_side),
            examples,
            "requests",
        ):
            encoded = line.encode("utf-8")
            if size + len(encoded) > max_bytes or count >= MAX_REQUESTS:
                names.append(f"requests-{len(names) + 1:03}.jsonl")
                size = count = 0
            with (temporary / names[-1]).open("ab") as file:
                file.write(encoded)
            size, count = size + len(encoded), count + 1
        os.rename(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [output_dir / name for name in names]


# ---- import --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Imported:
    """Hold what became of a teacher's answers.

    kept: rows with answers.
    rejected: rows with "rejected" {"code", "detail", "text"} in place of the answer. They make a
    data file, so the same examples can be asked for again.
    unknown: ids of answers that no example has.
    joined: how many kept answers were joined with reasoning from elsewhere, by where it was.
    unread: lines of the files that could not be read, and why.
    """

    kept: list[dict]
    rejected: list[dict]
    unknown: list[str]
    joined: Counter[str] = field(default_factory=Counter)
    unread: list[str] = field(default_factory=list)


def accept(examples: Sequence[Example], answers: Iterable[TeacherAnswer]) -> Imported:
    """Keep the first good answer of each example, in the examples' order.

    An example without one is rejected, for what is wrong with its last answer.
    """
    by_id: dict[str, list[TeacherAnswer]] = {example.id: [] for example in examples}
    unknown: list[TeacherAnswer] = []
    unread = []
    for answer in answers:
        if answer.rejected and answer.rejected[0] == "unread":
            unread.append(answer.rejected[1])
        else:
            by_id.get(answer.id, unknown).append(answer)
    kept, rejected = [], []
    joined: Counter[str] = Counter()
    for example in examples:
        code, detail, text = "no_answer", "", ""
        for answer in by_id[example.id]:
            problem, text = answer.rejected or check_trace(answer.text, example), answer.text
            if problem is None:
                kept.append(_clean_row(example) | {"answer": answer.text.strip()})
                joined.update([answer.joined] if answer.joined else [])
                break
            code, detail = problem
        else:
            rejected.append(
                _clean_row(example) | {"rejected": {"code": code, "detail": detail, "text": text}}
            )
    return Imported(kept, rejected, [answer.id for answer in unknown], joined, unread)


def _clean_row(example: Example) -> dict:
    return {
        name: value for name, value in row_of(example).items() if name not in ("answer", "rejected")
    }


def template_answers(examples: Sequence[Example]) -> list[TeacherAnswer]:
    """Write the answers of the template teacher, which knows the labels and not the image."""
    return [
        TeacherAnswer(
            example.id,
            trace_from_labels(
                example.target.labels, zlib.crc32(example.id.encode("utf-8")), example.label_set
            ),
        )
        for example in examples
    ]


TEACHERS: dict[str, Callable[[Sequence[Example]], list[TeacherAnswer]]] = {
    "template": template_answers
}


def report(imported: Imported) -> str:
    """Count what was kept, and what was rejected by code and detail."""
    total = len(imported.kept) + len(imported.rejected)
    codes = Counter(row["rejected"]["code"] for row in imported.rejected)
    lines = [f"{'kept':<10} {len(imported.kept):6} of {total}"]
    for code, count in codes.most_common():
        details = Counter(
            row["rejected"]["detail"]
            for row in imported.rejected
            if row["rejected"]["code"] == code
        )
        shown = "; ".join(
            f"{detail} ({number})" for detail, number in details.most_common(5) if detail
        )
        lines.append(f"{code:<10} {count:6} {shown}{'; ...' if len(details) > 5 else ''}".rstrip())
    if imported.joined:
        shown = ", ".join(f"{where} ({count})" for where, count in imported.joined.most_common())
        lines.append(f"{'joined':<10} {imported.joined.total():6} with the reasoning in {shown}")
    if imported.unknown:
        lines.append(
            f"{len(imported.unknown)} answers belong to no example, such as {imported.unknown[0]!r}"
        )
    lines += [f"passed over: {problem}" for problem in first_problems(imported.unread)]
    return "\n".join(lines)


# ---- command -------------------------------------------------------------------------------------
_PRIVACY = (
    "Nothing is sent anywhere by this command. The files hold the images and their labels;"
    " MIMIC-CXR's and CheXpert's terms forbid giving them to others, public services included. For"
    " credentialed data use a server of your own."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code: 0 done, 1 no answer is good, 2 usage or data."""
    parser = Parser(
        prog="python -m data.traces",
        description="Teacher traces: requests out (export), answers in, with checks (import).",
        epilog=_PRIVACY,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser(
        "export",
        description="Write a teacher request for every example, as JSONL in a batch form.",
        epilog=_PRIVACY,
    )
    back = commands.add_parser(
        "import", description="Check a teacher's answers and write the SFT data file."
    )
    for command in (out, back):
        command.add_argument(
            "--data_file", required=True, help="examples with labels (JSONL), or demo:SPLIT"
        )
        command.add_argument(
            "--image_root",
            help="folder that image paths are relative to (default: the data file's own folder)",
        )
        add_label_flag(command)
    out.add_argument(
        "--form",
        required=True,
        choices=FORMS,
        help=(
            "gemini: the Gemini API's batch form; openai: OpenAI's, which vLLM's "
            "run-batch and other servers take"
        ),
    )
    out.add_argument(
        "--model",
        help="model's name on the server (openai; Gemini's is named when the job is made)",
    )
    out.add_argument(
        "--prompt",
        default="free_reasoning",
        help=(
            f"the student's instruction (default free_reasoning): {', '.join(TEACHER_PROMPTS)}; or"
            " one's own, a .toml file (data/README.md)"
        ),
    )
    out.add_argument(
        "--max_side",
        type=plain_integer,
        default=1024,
        help="images are reduced to this many pixels a side (default 1024)",
    )
    out.add_argument(
        "--output_dir", required=True, type=Path, help="new folder for requests-001.jsonl and so on"
    )
    source = back.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--answers",
        nargs="+",
        metavar="FILE",
        help="batch output files, of one or several rounds; the first good answer counts",
    )
    source.add_argument(
        "--teacher",
        choices=sorted(TEACHERS),
        help="template: write answers from the labels alone, to try the pipeline",
    )
    back.add_argument("--output", required=True, type=Path, help="SFT data file to write")
    back.add_argument(
        "--rejected",
        type=Path,
        help="where the rejected examples go, with reasons (default: <output>-rejected.jsonl)",
    )
    arguments = parser.parse_args(argv)
    try:
        return _export(arguments) if arguments.command == "export" else _import(arguments)
    except DataError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2


def _export(arguments: argparse.Namespace) -> int:
    label_set = labels_named(arguments.label_file)
    prompt = _teacher_prompt(arguments.prompt, label_set)
    if (arguments.form == "openai") != (arguments.model is not None):
        raise DataError(
            [
                "--model: needed with --form openai, and with no other: the Gemini API takes it"
                " when the job is made"
            ]
        )
    if not 1 <= arguments.max_side <= LARGEST_SIDE:
        raise DataError(
            [f"--max_side {arguments.max_side}: must be at least 1 and at most {LARGEST_SIDE}"]
        )
    examples = read_jsonl(
        data_file(arguments.data_file, label_set), arguments.image_root, label_set
    )
    files = export(
        examples,
        prompt,
        arguments.form,
        arguments.output_dir,
        model=arguments.model,
        max_side=arguments.max_side,
    )
    print(
        "\n".join(
            [
                f"{len(examples)} requests:",
                *(f"  {file}  {file.stat().st_size / 1e6:.1f} MB" for file in files),
                _PRIVACY,
            ]
        )
    )
    return 0


def _teacher_prompt(named: str, label_set: LabelSet) -> Prompt:
    """Find the instruction that a teacher is asked with, a built-in one or one's own.

    Raises DataError for one that cannot be used, and for one without reasoning.
    """
    is_file = named.lower().endswith(".toml") and Path(named).exists()
    if not is_file and named not in PROMPTS:
        why = "no such file, and no" if named.lower().endswith(".toml") else "no such"
        why += " instruction variant"
    else:
        try:
            prompt = prompt_of(KeptFile.read(named) if is_file else named, label_set)
        except DataError as error:
            raise DataError([f"--prompt {problem}" for problem in error.problems]) from error
        if prompt.answer_format == ANSWER_FORMAT:
            return prompt
        why = "has no reasoning; its answers are made from the labels"
        if len(blocks_of(prompt.answer_format)) != 1:
            why = f"has the form {prompt.answer_format}, not {ANSWER_FORMAT}"
    raise DataError(
        [f"--prompt {named}: {why}; a teacher can be asked with {', '.join(TEACHER_PROMPTS)}"]
    )


def _import(arguments: argparse.Namespace) -> int:
    output = arguments.output
    rejected_file = arguments.rejected or output.with_name(f"{output.stem}-rejected.jsonl")
    existing = [file for file in (output, rejected_file) if file.exists()]
    if existing or output == rejected_file:
        raise DataError(
            [
                f"{file} exists and nothing is overwritten; give another --output or --rejected"
                for file in existing
            ]
            or [f"--rejected {rejected_file} is the --output; give another"]
        )
    label_set = labels_named(arguments.label_file)
    path = data_file(arguments.data_file, label_set)
    examples = read_jsonl(path, arguments.image_root, label_set)
    answers = (
        TEACHERS[arguments.teacher](examples)
        if arguments.teacher
        else [answer for file in arguments.answers for answer in read_answers(file)]
    )
    imported = accept(examples, answers)
    print(report(imported))
    for file, rows in ((output, imported.kept), (rejected_file, imported.rejected)):
        if rows:
            write_jsonl(file, rows)
            print(f"written: {file}")
    # what data.select noted of these examples stays with them
    if imported.kept and selection_file(path).is_file():
        shutil.copyfile(selection_file(path), selection_file(output))
    root = Path(arguments.image_root) if arguments.image_root else path.parent
    if root.resolve() != output.parent.resolve():
        print(f"image paths stay relative to {root}: give --image_root {shlex.quote(str(root))}")
    return 0 if imported.kept else 1


if __name__ == "__main__":
    sys.exit(exit_code(main))
