"""Write a teacher's requests: image, instruction and true labels, as batch files of services.

Nothing here opens a network connection.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data.examples import Example
from data.files import DataError, process_mark
from data.images import check_images, in_parallel, load_image
from data.labels import LabelSet
from data.prompts import Prompt

FORMS = ("gemini", "openai")
# Limits on one input file: Gemini's Batch API takes 2 GB, OpenAI's 200 MB and 50,000 requests. A
# server of one's own has none.
MAX_BYTES = {"gemini": 2_000_000_000, "openai": 200_000_000}
MAX_REQUESTS = 50_000


def listed(labels: Iterable[str], label_set: LabelSet) -> str:
    """List labels in the order of their set, with what is no label at the end."""
    order = {label: position for position, label in enumerate(label_set.names)}
    return ", ".join(sorted(labels, key=lambda label: order.get(label, len(order)))) or "none"


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
            f"present: {listed(truth, labels)}",
            f"absent: {listed(absent, labels)}",
            *(
                [f"not rated, and not to be used in <solution>: {listed(unrated, labels)}"]
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
    temporary = output_dir.with_name(f".{output_dir.name}.{process_mark()}.tmp")
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
