"""Have data sets answered, keep every answer at once, go on where a call was stopped, and score.

Who answers is a function (`Predict`): a policy (decode.py) or a server (served.py). Nothing here
needs torch.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data.examples import Example
from data.files import named_files
from data.predictions import Prediction
from data.sets import bad_image_counts, read_sets, read_training_examples
from engine.completion import SamplingConfig
from engine.config import Resolved
from engine.launch import ONE_PROCESS, OneProcess
from engine.progress import Progress
from engine.settings import TrainingConfig
from eval.faithfulness import faithfulness_scores, partners_of
from eval.folders import write_results
from eval.go_on import Kind, evaluation_record, kept, not_written, read_partial
from eval.record import scores_record
from eval.settings import DecodingConfig, EvalConfig
from eval.votes import vote_predictions


@dataclass(frozen=True)
class Decoding:
    """Say how completions are decoded and read.

    sampling: temperature, top-p and length limit of the sampler.
    answer_format: the form of a valid answer. batch_size: completions written together.
    seed: of the sampler, and of the intervals and the random baseline of the scores.
    num_generations: k, the completions of each image. Above 1 they vote (see eval/votes.py).
    swap_images: answer once more from another patient's image (see eval/faithfulness.py).
    """

    sampling: SamplingConfig
    answer_format: str
    batch_size: int
    seed: int = 0
    num_generations: int = 1
    swap_images: bool = False

    @classmethod
    def of(cls, config: EvalConfig) -> Decoding:
        """Take what the command line says of decoding, once `complete` has filled it in."""
        return cls(
            SamplingConfig(config.temperature, config.top_p, config.max_completion_length),
            config.answer_format,
            config.per_device_eval_batch_size,
            config.seed,
            config.num_generations,
            config.swap_images,
        )

    @classmethod
    def greedy(cls, config: TrainingConfig) -> Decoding:
        """Decode greedily, as a training run evaluates itself."""
        return cls(
            SamplingConfig(0.0, max_completion_length=config.max_completion_length),
            config.answer_format,
            config.per_device_eval_batch_size,
        )

    def voting(self, rollout: Rollout) -> Decoding:
        """Sample the answers to each image as a rollout does, and let them vote."""
        sampling = SamplingConfig(
            rollout.temperature, rollout.top_p, self.sampling.max_completion_length
        )
        return replace(
            self, sampling=sampling, seed=rollout.seed, num_generations=rollout.num_generations
        )


class Rollout(Protocol):
    """Describe the settings of a GRPO run's rollouts, which eval does not know."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def num_generations(self) -> int: ...


@dataclass(frozen=True)
class EvaluationData:
    """Hold what is evaluated.

    files: the data file of every set. sets: their examples. bad_images: rows of the examples that
    are left out for their images, by set. baseline_examples: whose label frequencies baselines
    imitate, None for each set's own.
    """

    files: dict[str, Path]
    sets: dict[str, list[Example]]
    bad_images: dict[str, list[dict[str, Any]]]
    baseline_examples: list[Example] | None

    @classmethod
    def read(cls, config: DecodingConfig) -> EvaluationData:
        """Read what a command line names, before a model is loaded or asked.

        Raises DataError as `read_sets` does, and where images are to be swapped and cannot be.
        """
        named, _ = named_files(config.data_file, "data_file")
        files, sets, bad_images = read_sets(
            named,
            config.image_root,
            config.bad_images,
            max_samples=config.max_samples,
            label_set=config.label_set,
        )
        if isinstance(config, EvalConfig) and config.swap_images:
            for examples in sets.values():
                partners_of(examples, config.seed)
        training = read_training_examples(config.train_file, config.image_root, config.label_set)
        return cls(files, sets, bad_images, training)

    def records(
        self, resolved: Resolved, server: Mapping[str, Any] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Say how every data set is evaluated. server: see `evaluation_record`."""
        return {
            name: evaluation_record(resolved, name, file, self.bad_images[name], server)
            for name, file in self.files.items()
        }

    def notes(self, records: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Gather what the scores of every data set keep beside them."""
        left_out = bad_image_counts(self.sets, self.bad_images)
        return {name: {"run": record} | left_out[name] for name, record in records.items()}


class Predict(Protocol):
    """Answer every example, in the examples' order, as `eval.decode.predict` does."""

    def __call__(
        self,
        examples: Sequence[Example],
        decoding: Decoding,
        *,
        done: Sequence[Prediction],
        should_stop: Callable[[], bool],
        on_prediction: Callable[[Prediction], None],
        ranks: Any,
    ) -> list[Prediction]: ...


def of_all_ranks(predictions: Sequence[Prediction], ranks: OneProcess) -> list[Prediction]:
    """Give the predictions of every rank to all, in the ranks' order."""
    if ranks.size == 1:
        return list(predictions)
    rows = ranks.gather([prediction.to_row() for prediction in predictions])
    return [Prediction.from_row(row) for of_rank in rows for row in of_rank]


def whole_images(
    predictions: Sequence[Prediction], num_generations: int
) -> dict[str, list[Prediction]]:
    """Gather predictions by image, without the images that miss some of their num_generations."""
    by_image: defaultdict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_image[prediction.id].append(prediction)
    return {id: found for id, found in by_image.items() if len(found) == num_generations}


def answer_sets(
    predict: Predict,
    sets: Mapping[str, Sequence[Example]],
    decoding: Decoding,
    output_dir: str | Path,
    *,
    baseline_examples: Sequence[Example] | None = None,
    annotate: Callable[[list[Prediction]], tuple[list[Prediction], dict[str, Any]]] | None = None,
    notes: Mapping[str, dict[str, Any]] | None = None,
    records: Mapping[str, dict[str, Any]] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: OneProcess = ONE_PROCESS,
) -> dict[str, dict[str, Any]]:
    """Have every data set answered, with a progress bar, score and keep it -> {name: scores}.

    predict: who answers.

    Results of these names in output_dir are replaced. Until a data set is finished, its answers so
    far are in predictions-<name>.partial.jsonl, and those of rank 1 and higher in
    predictions-<name>.partial-<rank>.jsonl. An interrupt (StopRequested, once should_stop says so
    on any rank) or an error leaves them there and says so. Where one cannot be written, the
    evaluation goes on without it.

    baseline_examples: see `score`. annotate: called with a set's predictions, returns them with
    fields of the caller's own, and more keys for their scores. With num_generations above 1 these
    are the votes, and the samples are kept beside them. notes: {name: keys to add to the scores}.
    records: {name: `evaluation_record`}. With them, answers that an earlier call with the same
    records left behind are taken, whatever the number of its ranks. ranks: share the images. Rank 0
    alone scores and writes, and tells the scores. Raises UsageError where what was left behind is
    of another evaluation, StepFailed where the results cannot be written, which says where the
    answers are.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, examples in sets.items():
        record = None if records is None else records[name]
        with ExitStack() as files:
            asking = _Asking(predict, name, decoding, output_dir, record, should_stop, ranks, files)
            answers = asking.answers(examples)
            swapped = asking.swapped(examples) if decoding.swap_images else None
            note = dict((notes or {}).get(name, {}))
            score = partial(_scored, output_dir, name, answers, swapped, decoding)
            results[name] = ranks.on_first(partial(score, baseline_examples, annotate, note))
    return results


def _scored(
    output_dir: str | Path,
    name: str,
    answers: list[Prediction],
    swapped: list[Prediction] | None,
    decoding: Decoding,
    baseline_examples: Sequence[Example] | None,
    annotate: Callable[[list[Prediction]], tuple[list[Prediction], dict[str, Any]]] | None,
    note: dict[str, Any],
) -> dict[str, Any]:
    """Score the answers to a data set and write all of its results -> its scores.

    swapped: the answers from other patients' images. note: keys to add to the scores.
    """
    votes = decoding.num_generations > 1
    predictions = vote_predictions(answers) if votes else answers
    annotations: dict[str, Any] = {}
    if annotate is not None:
        predictions, annotations = annotate(predictions)
    samples, seed = answers if votes else [], decoding.seed
    scores = scores_record(predictions, samples, baseline_examples=baseline_examples, seed=seed)
    more = {"samples": samples} if votes else {}
    if swapped is not None:
        more["swapped"] = swapped
        scores["faithfulness"] = faithfulness_scores(predictions, swapped, seed=seed)
    scores |= annotations | note
    try:
        write_results(output_dir, name, predictions, scores, more=more, overwrite=True)
    except OSError as error:
        raise not_written(output_dir, name, answers, error) from error
    return scores


@dataclass(frozen=True)
class _Asking:
    """Ask for the answers to one data set, and keep what is there in files until a stack ends.

    All but the last: as of `answer_sets`. partial_files: that stack.
    """

    predict: Predict
    name: str
    decoding: Decoding
    output_dir: str | Path
    record: Mapping[str, Any] | None
    should_stop: Callable[[], bool]
    ranks: OneProcess
    partial_files: ExitStack

    def answers(self, examples: Sequence[Example], kind: Kind = "predictions") -> list[Prediction]:
        """Answer every example with a progress bar, which rank 0 shows of its share.

        Rank 0 reads what an earlier call left. kind: "swapped" where the examples have another
        patient's images.
        """
        k, ranks, where = self.decoding.num_generations, self.ranks, (self.output_dir, self.name)
        done: list[Prediction] = []
        with ranks.together():
            if self.record is not None and ranks.first:
                done = read_partial(*where, self.record, kind)
                done = [answer for found in whole_images(done, k).values() for answer in found]
        done = of_all_ranks(done, ranks)
        keep = self.partial_files.enter_context(kept(*where, done, self.record, kind, ranks))
        what = "samples" if k > 1 else "images" if kind == "predictions" else "swapped images"
        share = f", share of rank {ranks.rank}" if ranks.size > 1 else ""
        images = len(examples) - len(done) // k
        before, own = (len(range(ranks.rank, count, ranks.size)) for count in (len(done), images))
        with Progress(
            before + k * own,
            initial=before,
            description=f"{self.name} ({what}{share})",
            show_first=False,
        ) as progress:
            return self.predict(
                examples,
                self.decoding,
                done=done,
                should_stop=self.should_stop,
                on_prediction=_shown(progress, keep),
                ranks=ranks,
            )

    def swapped(self, examples: Sequence[Example]) -> list[Prediction]:
        """Answer every example from another patient's image, and note whose image it was."""
        partners = partners_of(examples, self.decoding.seed)
        swapped = [
            dataclasses.replace(example, image=partner.image, image_root=partner.image_root)
            for example, partner in zip(examples, partners, strict=True)
        ]
        return [
            answer.with_extra(image_of=partner.id)
            for answer, partner in zip(self.answers(swapped, "swapped"), partners, strict=True)
        ]


def _shown(progress: Progress, keep: Callable[[Prediction], None]) -> Callable[[Prediction], None]:
    """Make the function that keeps a new prediction and moves the bar."""
    failed = 0

    def on_prediction(prediction: Prediction) -> None:
        nonlocal failed
        keep(prediction)
        failed += not prediction.answer.parsed
        progress.update({"failed": failed})

    return on_prediction
