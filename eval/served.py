"""Ask a server's model about data sets: vLLM, an API, whatever speaks OpenAI's protocol.

A request holds the text of the prompt, the image as PNG and how to sample, one request an answer.
What comes back is text, and is parsed and scored like any other answer. No weights are read, no
file of a base, and no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from data.examples import Example
from data.images import load_image
from data.predictions import Prediction, iter_predictions
from data.prompts import Prompt, build_messages
from engine.chat_api import PLAIN_SAMPLING, Answer, ask, ask_all, chat_messages
from engine.config import UsageError
from engine.launch import OneProcess
from engine.runtime import StepFailed
from engine.server import Server, ServerError, ServerGone
from eval.answering import Decoding, whole_images
from eval.folders import more_files, result_files
from eval.settings import EvalConfig

# Statuses of a request that the server understood and will not answer: of a filter, or of a limit.
REFUSALS = (400, 413, 415, 422)
# What a row holds beside the fields of every prediction, where its answer has it.
TRUNCATED, REFUSED, ANSWERED_BY = "truncated", "refused", "model"

ONE_ASKS = "--vllm_server_base_url: a server is asked by one process; start it without torchrun"


@dataclass(frozen=True)
class ServedModel:
    """Hold a model that a server has, and how it is asked.

    name: the server's for it. version: the server's own, None where it tells none. prompt: what the
    model is told beside an image. refused_counts: whether an image that the server refuses counts
    as an answer that cannot be read. Else it ends the evaluation.
    """

    server: Server
    name: str
    version: str | None
    prompt: Prompt
    refused_counts: bool

    @classmethod
    def of(cls, config: EvalConfig) -> ServedModel:
        """Find the model of a command line on its server.

        Raises UsageError for a key that cannot be sent or is refused, and where the address is not
        that of such a server, or it has no model of that name; StepFailed where no answer comes.
        """
        url, name = str(config.vllm_server_base_url), config.model_name_or_path
        try:
            server = Server.of(url, config.vllm_server_timeout)
            names, version = server.models(), server.version()
        except ServerGone as error:
            raise StepFailed(str(error)) from error
        except ServerError as error:
            raise UsageError(f"--vllm_server_base_url: {error}") from error
        if name not in names:
            raise UsageError(
                f"--vllm_server_base_url {url} has no model of the name {name}; it has"
                f" {', '.join(map(server.shown, names[:20])) or 'none'}"
            )
        refused_counts = config.refused_images == "empty"
        return cls(server, name, version, config.instruction, refused_counts)

    def record(self, decoding: Decoding) -> dict[str, Any]:
        """Say who was asked and what was sent, for the record of an evaluation."""
        return {
            "host": urlsplit(self.server.base_url).netloc,
            "model": self.name,
            "version": self.version,
            "request": self._options(decoding),
        }

    def banner(self) -> str:
        """Write who is asked in one line."""
        version = "tells no version" if self.version is None else f"version {self.version}"
        return f"server {self.server.base_url} | {version} | model {self.name}"

    def predict(
        self,
        examples: Sequence[Example],
        decoding: Decoding,
        *,
        done: Sequence[Prediction],
        should_stop: Callable[[], bool],
        on_prediction: Callable[[Prediction], None],
        ranks: OneProcess,
    ) -> list[Prediction]:
        """Answer every example, as `eval.decode.predict` does, in one process.

        The answers to an image are asked for one after the other, those of so many images at a time
        as decoding.batch_size says. Each has a seed of its own, made from the evaluation's, the
        image's place and the number of the sample, so the first ones do not depend on how many
        there are. on_prediction is called with all answers to an image once they are there.

        Raises StopRequested within a second of should_stop(), StepFailed where the server fails or
        refuses an image, DataError for an image that cannot be read.
        """
        predictions = whole_images(done, decoding.num_generations)
        missing = [i for i, example in enumerate(examples) if example.id not in predictions]

        def keep(_: int, rows: list[Prediction]) -> None:
            for row in rows:
                on_prediction(row)

        asks = [partial(self._answers, examples[i], i, decoding) for i in missing]
        new = ask_all(asks, decoding.batch_size, should_stop, keep)
        predictions |= {examples[i].id: rows for i, rows in zip(missing, new, strict=True)}
        return [row for example in examples for row in predictions[example.id]]

    def _answers(self, example: Example, position: int, decoding: Decoding) -> list[Prediction]:
        """Ask for all answers to an image. position: of the example in its data set."""
        messages = chat_messages(build_messages(self.prompt), [load_image(example)])
        k = decoding.num_generations
        rows = []
        for sample in range(k):
            body = self._options(decoding) | {"messages": messages}
            if "seed" in body:
                body["seed"] = seed_of(decoding.seed, position, sample)
            text, length, found = self._answer(example, body)
            rows.append(
                Prediction.of_example(
                    example,
                    prompt=self.prompt.name,
                    completion=text,
                    completion_length=length,
                    answer_format=decoding.answer_format,
                    extra=found | ({"sample": sample} if k > 1 else {}),
                )
            )
        return rows

    def _answer(
        self, example: Example, body: dict[str, Any]
    ) -> tuple[str, int | None, dict[str, Any]]:
        """Ask once -> (text, length in tokens, what else the row is to hold)."""
        try:
            answer: Answer = ask(self.server, body, with_ids=False)
        except ServerError as error:
            if error.status not in REFUSALS:
                raise StepFailed(str(error)) from error
            if not self.refused_counts:
                raise StepFailed(
                    f"image {example.id!r} was refused: {error}; where only some images are, give"
                    " --refused_images empty to count them as answers that cannot be read"
                ) from error
            return "", None, {REFUSED: str(error)}
        [choice] = answer.choices
        found: dict[str, Any] = {TRUNCATED: True} if choice.truncated else {}
        if answer.model != self.name:  # the model behind an alias
            found[ANSWERED_BY] = ascii(answer.model)[1:-1][:100]
        return choice.text, answer.completion_tokens, found

    def _options(self, decoding: Decoding) -> dict[str, Any]:
        """Make a request but for its messages, with the evaluation's own seed where one acts.

        Greedy decoding needs neither a nucleus nor a seed. A server that tells its version is taken
        for vLLM and is told to add nothing from the checkpoint's generation_config, such as a
        repetition penalty. Others know no such fields.
        """
        sampling = decoding.sampling
        options: dict[str, Any] = {
            "model": self.name,
            "max_tokens": sampling.max_completion_length,
            "temperature": sampling.temperature,
        }
        if sampling.temperature > 0:
            options |= {"top_p": sampling.top_p, "seed": decoding.seed}
        return options if self.version is None else options | PLAIN_SAMPLING


def seed_of(seed: int, position: int, sample: int) -> int:
    """Make the seed of one request from its place, in 31 bits, which every server takes.

    seed: the evaluation's. position: of the image in the data set. sample: number of the answer.
    """
    words = np.random.SeedSequence(seed, spawn_key=(position, sample)).generate_state(1, np.uint32)
    return int(words[0]) >> 1


def notes_on(output_dir: str | Path, names: Sequence[str]) -> list[str]:
    """Say of finished data sets what their scores do not show, one line each that has such answers.

    Those are answers that were cut, that are empty or were refused, and those of a model with
    another name than the one asked for, as the model behind an alias.
    """
    lines = []
    for name in names:
        file, samples = result_files(output_dir, name)[0], more_files(output_dir, name)["samples"]
        counts: Counter[str] = Counter()
        for row in iter_predictions(samples if samples.exists() else file):
            counts["answers"] += 1
            counts["cut at --max_completion_length"] += row.extra.get(TRUNCATED) is True
            counts["refused by the server"] += REFUSED in row.extra
            counts["empty"] += not row.completion.strip() and REFUSED not in row.extra
            if ANSWERED_BY in row.extra:
                counts[f"by {row.extra[ANSWERED_BY]}"] += 1
        total = counts.pop("answers")
        told = [f"{count} {what}" for what, count in counts.items() if count]
        if told:
            lines.append(f"{name}: of {total} answers {', '.join(told)}")
    return lines
