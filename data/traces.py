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
import shlex
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.answers import blocks_of, parse_answer
from data.command_line import Parser, exit_code, plain_integer
from data.console import print_errors
from data.demo.teacher import trace_from_labels
from data.examples import (
    MAX_ANSWER_CHARACTERS,
    Example,
    data_file,
    read_jsonl,
    row_of,
    selection_file,
)
from data.files import DataError, KeptFile, NameOrFile, first_problems, write_jsonl
from data.label_sets import add_label_flag, labels_named
from data.labels import LabelSet
from data.leaks import leak
from data.prompt_files import prompt_of, prompt_warnings
from data.prompts import PROMPTS
from data.teacher_answers import ANSWER_FORMAT, TeacherAnswer, read_answers
from data.teacher_requests import FORMS, export, listed

TEACHER_PROMPTS = tuple(
    name for name, prompt in PROMPTS.items() if prompt.answer_format == ANSWER_FORMAT
)
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
        written = listed((*answer.labels, *answer.unknown, *answer.duplicates), labels)
        return "labels", f"{written}, not {listed(example.target.labels, labels)}"
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


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags of both commands."""
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
    _export_flags(out)
    _import_flags(back)
    return parser


def _export_flags(out: argparse.ArgumentParser) -> None:
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


def _import_flags(back: argparse.ArgumentParser) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code: 0 done, 1 no answer is good, 2 usage or data."""
    arguments = build_parser().parse_args(argv)
    try:
        return _export(arguments) if arguments.command == "export" else _import(arguments)
    except DataError as error:
        print_errors(error.problems)
        return 2


def _export(arguments: argparse.Namespace) -> int:
    label_set = labels_named(arguments.label_file)
    asked = _teacher_prompt(arguments.prompt, label_set)
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
    for line in prompt_warnings(asked, label_set):
        print(f"warning: --prompt {line}", file=sys.stderr)
    files = export(
        examples,
        prompt_of(asked, label_set),
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


def _teacher_prompt(named: str, label_set: LabelSet) -> NameOrFile:
    """Find the instruction that a teacher is asked with, a built-in one or one's own.

    Raises DataError for one that cannot be used, and for one without reasoning.
    """
    is_file = named.lower().endswith(".toml") and Path(named).exists()
    if not is_file and named not in PROMPTS:
        why = "no such file, and no" if named.lower().endswith(".toml") else "no such"
        why += " instruction variant"
    else:
        try:
            asked = KeptFile.read(named) if is_file else named
            prompt = prompt_of(asked, label_set)
        except DataError as error:
            raise DataError([f"--prompt {problem}" for problem in error.problems]) from error
        if prompt.answer_format == ANSWER_FORMAT:
            return asked
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
