"""Decode data sets with a model, by the sampler that rollouts use too.

This file needs torch and transformers. Commands import it once their command line is accepted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.examples import Example
from data.predictions import Prediction
from engine.completion import Completion
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
from eval.answering import Decoding, answer_sets, of_all_ranks, whole_images
from eval.settings import EvalConfig

# Prompts that are there at once, the longest of which are decoded first: those of so many batches,
# but no more than so many, since each holds its image's features.
WINDOW, LARGEST_WINDOW = 16, 512


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
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Decode and score every data set with a policy, as `answer_sets` does, with its options."""
    return answer_sets(partial(predict, policy), sets, decoding, output_dir, **options)
