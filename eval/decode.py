"""Decode data sets with a model, keep every answer at once, and go on where a call was stopped.

This file needs torch and transformers. Commands import it once their command line is accepted.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from data.examples import Example
from data.predictions import Prediction
from engine.completion import Completion, SamplingConfig
from engine.config import Resolved, to_json
from engine.eval_batch import CHOSEN
from engine.generate import generate
from engine.inherited import other_labels
from engine.model import NO_EFFECT, attach_adapter, check_adapter, has_no_effect
from engine.out_of_memory import EVALUATION, Cut, Limits
from engine.policy import Policy, load_base, sampled_by
from engine.random_numbers import uniform_numbers
from engine.ranks import ALONE, Ranks
from engine.resume import OUT_OF_MEMORY, changed_base_of
from engine.runtime import StopRequested
from engine.settings import TrainingConfig
from engine.tracking import Progress
from eval.faithfulness import faithfulness_scores, partners_of
from eval.folders import write_results
from eval.go_on import Kind, kept, not_written, read_partial
from eval.record import scores_record
from eval.settings import EvalConfig
from eval.votes import vote_predictions

# Prompts that are there at once, the longest of which are decoded first: those of so many batches,
# but no more than so many, since each holds its image's features.
WINDOW, LARGEST_WINDOW = 16, 512


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


def load_policy(
    config: EvalConfig, device: torch.device, *, vision_cache_gb: float = 0.0
) -> Policy:
    """Load what is to be evaluated: a base model, with its adapter where there is one.

    vision_cache_gb: host memory for image features, for a model that answers several prompts.
    """
    adapter = config.adapter_name_or_path
    if adapter is not None:
        check_adapter(config.model_name_or_path, adapter)
        if line := changed_base_of(adapter, config.model_name_or_path):
            print(f"warning: {line}", file=sys.stderr)
        if line := other_labels(adapter, config.label_file):
            print(f"warning: {line}, and is asked for others", file=sys.stderr)
    base = load_base(config, device, vision_cache_gb=vision_cache_gb)
    net = base.net if adapter is None else attach_adapter(base, adapter)
    policy = Policy(net, base, config.instruction, **sampled_by(config), limits=Limits(config))
    if adapter is not None and has_no_effect(policy.adapted):
        print(f"warning: {adapter}: {NO_EFFECT}", file=sys.stderr)
    return policy


def note_fitted(resolved: Resolved, records: Mapping[str, dict[str, Any]]) -> None:
    """Let the records of evaluations say what the memory forecast has decided.

    resolved: the settings as they fit. records: {name: `evaluation_record`}.
    """
    for record in records.values():
        for name, entry in to_json(resolved).items():
            if entry["origin"] == CHOSEN:
                record["settings"][name] = entry


def note_cuts(limits: Limits, records: Mapping[str, dict[str, Any]]) -> None:
    """Let the records of evaluations, which their scores keep, say what memory has cut so far.

    Of several ranks they have the smallest value. records: {name: `evaluation_record`}.
    """

    def note(setting: str) -> None:
        for record in records.values():
            value = {"value": limits.smallest[setting], "origin": OUT_OF_MEMORY}
            record["settings"][setting] = value

    def report(cut: Cut) -> None:
        print(f"warning: {cut.line()}", file=sys.stderr)
        note(cut.setting)

    limits.report = report
    for setting in limits.smallest:
        note(setting)


# ---- decode --------------------------------------------------------------------------------------
def predict(
    policy: Policy,
    examples: Sequence[Example],
    decoding: Decoding,
    *,
    done: Sequence[Prediction] = (),
    should_stop: Callable[[], bool] = lambda: False,
    on_prediction: Callable[[Prediction], None] = lambda prediction: None,
    ranks: Ranks = ALONE,
) -> list[Prediction]:
    """Answer every example, by the sampler that rollouts use too.

    policy: the model with its active adapter, or the base. done: predictions of an earlier call
    with the same arguments that was cut short, the same on all ranks. They are taken, not made
    again. on_prediction: called with each new prediction of this rank as soon as it is there.
    should_stop: once it says so on any rank, all raise StopRequested, and what is being written is
    lost. ranks: share what is to be answered. All get all predictions.

    Returns the predictions in the examples' order. With num_generations k above 1 each example has
    k in a row, whose "sample" says which it is. Its prompt is read once for all of them.

    A finished completion makes room for the next, and images are looked at window by window. Every
    example has random numbers of its own, made from the seed and its position, also where it has
    another patient's image. So completions depend on batch_size, done and ranks only by rounding.
    They come sample by sample, so the first ones do not depend on k either. Raises DataError for an
    image that cannot be read.
    """
    k = decoding.num_generations
    predictions = whole_images(done, k)
    missing = [i for i, example in enumerate(examples) if example.id not in predictions]
    own = missing[ranks.rank :: ranks.size]
    new: dict[str, list[Prediction]] = {}

    def keep(example: Example, completions: Sequence[Completion]) -> None:
        new[example.id] = [
            Prediction.of_example(
                example,
                prompt=policy.prompt.name,
                completion=policy.encoder.decode(completion.ids),
                completion_length=len(completion.ids),
                answer_format=decoding.answer_format,
                extra={"text_length": policy.encoder.text_length(completion.ids)}
                | ({"sample": number} if k > 1 else {}),
            )
            for number, completion in enumerate(completions)
        ]
        for prediction in new[example.id]:
            on_prediction(prediction)

    together = max(1, decoding.batch_size // k)
    size = min(WINDOW * together, max(together, LARGEST_WINDOW))
    policy.expect(examples[i] for i in own)
    policy.graphs.drop()  # what a rollout has kept is of no use here, and in the images' way
    # as many windows on every rank: all leave after the one in which one of them stops or fails
    with ranks.together(), policy.gathered():  # once, where the base is sharded
        for start in range(0, len(missing[:: ranks.size]), size):
            with ranks.together():
                window = own[start : start + size]
                _decode_window(policy, examples, window, decoding, should_stop, keep)
    policy.limits.tell_cuts(ranks.gather, ranks.rank)
    answers = [answer for of_image in new.values() for answer in of_image]
    predictions |= whole_images(of_all_ranks(answers, ranks), k)
    return [prediction for example in examples for prediction in predictions[example.id]]


def of_all_ranks(predictions: Sequence[Prediction], ranks: Ranks) -> list[Prediction]:
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


def _decode_window(
    policy: Policy,
    examples: Sequence[Example],
    positions: Sequence[int],
    decoding: Decoding,
    should_stop: Callable[[], bool],
    keep: Callable[[Example, Sequence[Completion]], None],
) -> None:
    """Answer the examples at `positions` by one call of the sampler.

    Where memory runs out, those without an answer are asked again, fewer of them together.
    """
    encoded = {}
    for i in positions:
        if should_stop():
            raise StopRequested
        encoded[i] = policy.encode(examples[i])
    k, limits, sampling = decoding.num_generations, policy.limits, decoding.sampling

    def decode(max_rows: int | None) -> None:
        asked, uniform = list(encoded), None
        if sampling.temperature > 0:
            numbers = partial(uniform_numbers, "evaluation", decoding.seed)
            uniform = [numbers(i, k, sampling.max_completion_length) for i in asked]

        def answered(place: int, completions: Sequence[Completion]) -> None:
            keep(examples[asked[place]], completions)
            del encoded[asked[place]]

        generate(
            policy,
            list(encoded.values()),
            sampling,
            num_generations=k,
            max_rows=max_rows,
            whole_groups=EVALUATION not in limits.halved,
            should_stop=should_stop,
            uniform=uniform,
            on_finished=answered,
        )

    if encoded:
        rows = decoding.batch_size
        limits.decoded("evaluation", EVALUATION, rows, lambda: k * len(encoded), decode, group=k)


def evaluate_sets(
    policy: Policy,
    sets: Mapping[str, Sequence[Example]],
    decoding: Decoding,
    output_dir: str | Path,
    *,
    baseline_examples: Sequence[Example] | None = None,
    annotate: Callable[[list[Prediction]], tuple[list[Prediction], dict[str, Any]]] | None = None,
    notes: Mapping[str, dict[str, Any]] | None = None,
    records: Mapping[str, dict[str, Any]] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> dict[str, dict[str, Any]]:
    """Decode and score every data set, with a progress bar, and keep both -> {name: scores}.

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
        with ExitStack() as partial_files:
            ask = partial(_answers, partial_files, policy, name, decoding, output_dir, record)
            answers, swapped = ask(examples, should_stop, ranks), None
            if decoding.swap_images:
                swapped = _swapped(examples, decoding.seed, ask, should_stop, ranks)
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


def _answers(
    partial_files: ExitStack,
    policy: Policy,
    name: str,
    decoding: Decoding,
    output_dir: str | Path,
    record: Mapping[str, Any] | None,
    examples: Sequence[Example],
    should_stop: Callable[[], bool],
    ranks: Ranks,
    kind: Kind = "predictions",
) -> list[Prediction]:
    """Answer a data set with a progress bar, and keep what is there in files until the stack ends.

    Rank 0 shows the bar of its share, and reads what an earlier call left. kind: "swapped" where
    the examples have another patient's images.
    """
    k = decoding.num_generations
    done: list[Prediction] = []
    with ranks.together():
        if record is not None and ranks.first:
            done = read_partial(output_dir, name, record, kind)
            done = [answer for found in whole_images(done, k).values() for answer in found]
    done = of_all_ranks(done, ranks)
    keep = partial_files.enter_context(kept(output_dir, name, done, record, kind, ranks))
    what = "samples" if k > 1 else "images" if kind == "predictions" else "swapped images"
    share = f", share of rank {ranks.rank}" if ranks.size > 1 else ""
    images = len(examples) - len(done) // k
    before, own = (len(range(ranks.rank, count, ranks.size)) for count in (len(done), images))
    with Progress(
        before + k * own,
        initial=before,
        description=f"{name} ({what}{share})",
        show_first=False,
    ) as progress:
        return predict(
            policy,
            examples,
            decoding,
            done=done,
            should_stop=should_stop,
            on_prediction=_shown(progress, keep),
            ranks=ranks,
        )


def _swapped(
    examples: Sequence[Example],
    seed: int,
    ask: Callable[..., list[Prediction]],
    should_stop: Callable[[], bool],
    ranks: Ranks,
) -> list[Prediction]:
    """Answer every example from another patient's image, and note whose image it was."""
    partners = partners_of(examples, seed)
    swapped = [
        dataclasses.replace(example, image=partner.image, image_root=partner.image_root)
        for example, partner in zip(examples, partners, strict=True)
    ]
    answers = ask(swapped, should_stop, ranks, "swapped")
    return [
        answer.with_extra(image_of=partner.id)
        for answer, partner in zip(answers, partners, strict=True)
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
