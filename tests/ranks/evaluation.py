"""What tests/ranks/test_evaluation.py lets each of several ranks do, one evaluation after another.

Each prints [name, exit code] as a line. The last one kills rank 1.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

import eval.decode
import eval.evaluate
import eval.matrix
from data.predictions import Prediction
from tests.helpers.torchrun import meet_again

FAMILIES = ("qwen2_5_vl", "gemma3")
KINDS = {
    "swapped": ["--swap_images"],
    "votes": ["--num_generations", "3", "--temperature", "1.2", "--top_p", "1", "--seed", "5"],
}
SHARED = ["--min_visual_tokens", "4", "--max_visual_tokens", "16", "--max_completion_length", "8"]
SHARED += ["--no_bf16", "--per_device_eval_batch_size", "3"]


def evaluate(folder: Path, output: str, family: str, kind: str) -> list[str]:
    """Write the command line of an evaluation."""
    model = ["--model_name_or_path", str(folder / family), "--prompt", "demo"]
    files = ["--data_file", f"site={folder / 'data.jsonl'}", "--output_dir", str(folder / output)]
    return [*model, *files, *SHARED, *KINDS[kind]]


def matrix(folder: Path, output: str) -> list[str]:
    """Write the command line of a matrix of two models and two prompts."""
    models = [f"{family.partition('_')[0]}={folder / family}" for family in FAMILIES]
    cells = ["--model", *models, "--prompt", "demo", "free_reasoning", "--max_samples", "3"]
    files = ["--data_file", f"site={folder / 'data.jsonl'}", "--output_dir", str(folder / output)]
    return [*cells, *files, *SHARED]


def act_at(row: int, number: signal.Signals) -> None:
    """Let rank 1 get a signal before its answer of this number, from 1."""
    original, count = Prediction.of_example, [0]

    def counted(*arguments: object, **options: object) -> Prediction:
        count[0] += 1
        if os.environ["RANK"] == "1" and count[0] == row:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    Prediction.of_example = counted  # type: ignore[method-assign]


def tell(name: str, code: int) -> None:
    print(json.dumps([name, code]), flush=True)


def evaluations(given: str) -> None:
    """Evaluate as several ranks do, then be stopped, then be killed."""
    torch.set_num_threads(1)
    folder = Path(given)
    for family in FAMILIES:
        for kind in KINDS:
            meet_again()
            name = f"{family}-{kind}"
            tell(name, eval.evaluate.main(evaluate(folder, f"two/{name}", family, kind)))
    meet_again()
    tell("matrix", eval.matrix.main(matrix(folder, "two/matrix")))

    eval.decode.WINDOW = 1  # an image of each rank, since a batch of three is one image's votes
    original = Prediction.of_example
    act_at(2 * 3, signal.SIGTERM)
    meet_again()
    tell("stopped", eval.evaluate.main(evaluate(folder, "two/stopped", FAMILIES[0], "votes")))
    Prediction.of_example = original  # type: ignore[method-assign]

    act_at(3 * 3, signal.SIGKILL)
    meet_again()
    code = eval.evaluate.main(evaluate(folder, "two/killed", FAMILIES[1], "votes"))
    tell("killed", code)
    sys.exit(code)
