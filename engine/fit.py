"""Act on the memory forecast before weights are read: what is decoded how, or no run at all.

    fitted(resolved, ...)          a training run's settings, as they fit
    fitted_answers(resolved, ...)  those of an evaluation of a model alone

The forecast (engine/memory.py) needs the model's shape and the lengths of a few rows. Both are
known without weights. It is compared with what is free on the GPU, or on the host under every limit
(engine/free_memory.py). Four things follow:

    the sampler's copies do not fit         it samples without them
    no setting says how many rows are       as many as fit (engine/eval_batch.py)
    decoded together in an evaluation
    the image features' cache does not fit  it is as large as what is left
    a phase cannot fit at all               the run is refused, with the flag that shrinks it

A refusal must be no false alarm. A phase is refused only where it would not fit with its forecast a
fifth too high (tests hold the forecast to that) and with all swap. Base, adapters and AdamW are
known exactly. Where nothing tells what is free, nothing is refused.

Several ranks decide as one: by what is free to the rank that has least. Rank 0 compares, and the
others take what it has found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.examples import Example
from data.hospitals import by_hospital
from engine.config import Resolved, UsageError
from engine.device import base_dtype
from engine.encode import Encoder
from engine.eval_batch import CHOSEN, with_eval_batch
from engine.free_memory import Free, free_memory, free_on_host
from engine.memory import (
    COPIES,
    GIB,
    Forecast,
    ModelShape,
    Workload,
    decoding_forecast,
    forecast,
)
from engine.memory_table import memory_table
from engine.out_of_memory import SAMPLING, Limits
from engine.policy import encoder_of
from engine.ranks import ALONE, Ranks
from engine.remedies import COMFORTABLE, Question, needed
from engine.sampling_product import with_product
from engine.workload import (
    Lengths,
    Plan,
    image_tokens,
    lengths_of,
    rank_of,
    shape_of,
    shards_of,
    training_work,
)


# ---- compare with what is free -------------------------------------------------------------------
def without_copies(question: Question, free: Free) -> Question | None:
    """Return the question without the sampler's copies where these do not fit, else None."""
    found = question.forecast(question.config)
    copying = [parts for parts in found.phases.values() if parts.get(COPIES)]
    if all(needed(parts) <= COMFORTABLE * free.memory for parts in copying):
        return None
    return replace(question, config=replace(question.config, sampling_copies=False))


def _settled(resolved: Resolved, question: Question, free: Free) -> tuple[Resolved, Question]:
    """Sample without copies where they do not fit, evaluate in batches that do, refuse what cannot.

    Raises UsageError with a line for each phase.
    """
    asked, smaller = question, None
    if resolved.origins["sampling_copies"] == "default":
        smaller = without_copies(question, free)
        question = smaller or question
    resolved, question = with_eval_batch(resolved, question, free)
    problems = question.problems(free)
    found = question.forecast(question.config)
    if problems:
        if getattr(question.config, "dry_run", False):
            print(memory_table(found, question.device))
        problems[-1] += "; --no_memory_check tries it all the same"
        raise UsageError(problems)
    there = f"the {free.memory / GIB:.2f} GiB that are free ({free.limit})"
    if smaller is not None:
        phases = asked.forecast(asked.config).phases.values()
        copies = max(parts.get(COPIES, 0) for parts in phases)
        resolved = resolved.with_value("sampling_copies", False, CHOSEN)
        print(
            f"note: copies of the weights for sampling ({copies / GIB:.2f} GiB) do not fit into"
            f" {there}: completions are sampled without them, the same but for rounding, and more"
            " slowly",
            file=sys.stderr,
        )
    if found.peak > COMFORTABLE * free.memory:
        print(
            f"note: {found.peak_phase} may need {found.peak / GIB:.2f} of {there}; it is close",
            file=sys.stderr,
        )
    return resolved, question


def _loading_problem(shape: ModelShape, element_size: int, host: Free | None) -> list[str]:
    """Say where a GPU run has too little host memory to read the weights through."""
    needed = shape.base_parameters * element_size
    if host is None or needed <= host.total:
        return []
    return [
        f"memory: the weights are read through {needed / GIB:.2f} GiB of host memory and"
        f" {host.total / GIB:.2f} GiB are free ({host.limit}): free some, or take a smaller model"
    ]


def _with_room_for_images(
    resolved: Resolved, shape: ModelShape, lengths: Lengths, images: int, room: int | None
) -> Resolved:
    """Let the cache of image features be as large as the room for it, which changes no number.

    images: how many there are. room: bytes on the host beside all else, None where nobody knows.
    """
    config = resolved.configs[0]
    of_token = (1 + shape.extra_features) * shape.hidden * (2 if config.bf16 else 4)
    size = images * lengths.image * of_token
    wanted = min(size, int(config.vision_cache_gb * GIB))
    if room is None or wanted <= room or resolved.origins["vision_cache_gb"] != "default":
        return resolved
    gigabytes = round(max(0, room) / GIB, 1)
    print(
        f"note: {gigabytes} GB of host memory are left for image features, in place of"
        f" --vision_cache_gb {config.vision_cache_gb:g}: others are computed anew",
        file=sys.stderr,
    )
    return resolved.with_value("vision_cache_gb", gigabytes, CHOSEN)


# ---- the commands --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Known:
    """Hold what is known of a command without weights: its forecast, and what that is made of."""

    question: Question
    shape: ModelShape
    lengths: Lengths
    images: int


def _of_training(
    config: Any,
    device: torch.device,
    train: Sequence[Example],
    sets: Mapping[str, Sequence[Example]],
    adapter: str | Path | None,
    plan: Callable[[Any], Plan] | None,
    encoder: Encoder | None,
    local_size: int,
) -> Known | None:
    encoder, shape = encoder or encoder_of(config), shape_of(config.model_name_or_path)
    learned = train if plan is None else ()
    asked = [*by_hospital(train).values(), *sets.values()]
    lengths = lengths_of(encoder, config.instruction, learned, asked)
    if shape is None or lengths is None:
        return None
    rank = rank_of(adapter, config)

    def forecast_of(changed: Any) -> Forecast:
        rollouts = None if plan is None else plan(changed)
        shards = shards_of(changed, local_size)
        work = training_work(changed, shape, lengths, device, rank, rollouts, shards)
        found = forecast(shape, work)
        if not sets:  # then nothing is ever evaluated
            del found.phases["evaluation"]
        return found

    def allowed(changed: Any) -> bool:
        return plan is None or not plan(changed).problems()

    images = len(train) + sum(map(len, sets.values()))
    return Known(Question(config, device, forecast_of, allowed), shape, lengths, images)


def fitted(
    resolved: Resolved,
    device: torch.device,
    train: Sequence[Example],
    sets: Mapping[str, Sequence[Example]],
    adapter: str | Path | None,
    plan: Callable[[Any], Plan] | None = None,
    encoder: Encoder | None = None,
    ranks: Ranks = ALONE,
) -> Resolved:
    """Compare a training run's forecast with what is free, and return settings that fit.

    train, sets: the training examples, and the evaluated data sets by name.
    adapter: the folder that the run starts from, None for a fresh one.
    plan(config): of the rollouts, None in SFT.
    encoder: the model's, where it is loaded already.
    ranks: all of them call this, and get the same settings.

    Raises UsageError where a phase cannot fit, PeerError on the other ranks.
    """
    rows = partial(_sampled_rows, plan)
    if not resolved.configs[0].memory_check:
        return with_product(resolved, device, rows, ranks)
    free = _least_free(device, ranks)

    def found() -> Resolved:
        args = (resolved.configs[0], device, train, sets, adapter, plan, encoder)
        known = None if free is None else _of_training(*args, ranks.local_size)
        if free is None or known is None:
            return resolved
        return _training_that_fits(resolved, device, known, free, ranks.local_size)

    return with_product(_from_first(resolved, found, ranks), device, rows, ranks)


def _sampled_rows(plan: Callable[[Any], Plan] | None, config: Any) -> int:
    """Count the completions that are decoded together: of a rollout, else of an evaluation."""
    if plan is None:
        return config.per_device_eval_batch_size
    rollout = plan(config)
    rows = rollout.own_prompts * rollout.group
    return min(rows, getattr(config, SAMPLING, None) or rows)


def _training_that_fits(
    resolved: Resolved, device: torch.device, known: Known, free: Free, local_size: int
) -> Resolved:
    # Ranks of a node map the same files, so their pages are there once.
    host = free_on_host() if device.type == "cuda" else None
    element_size = base_dtype(resolved.configs[0].bf16, device).itemsize
    problems = _loading_problem(known.shape, element_size, host)
    if problems:
        raise UsageError(problems)
    resolved, question = _settled(resolved, known.question, free)
    taken = 0 if device.type == "cuda" else question.forecast(question.config).peak
    around = _shared(free_on_host(), local_size)
    room = None if around is None else int(COMFORTABLE * around.memory) - taken
    return _with_room_for_images(resolved, known.shape, known.lengths, known.images, room)


def _least_free(device: torch.device, ranks: Ranks) -> Free | None:
    """Find what is free to the rank that has least, None where one cannot tell.

    Ranks on the CPUs of a node share what is free there.
    """
    own = free_memory(device)
    if device.type != "cuda":
        own = _shared(own, ranks.local_size)
    told = ranks.gather({} if own is None else asdict(own))
    if not all(told):
        return None
    return min((Free(**free) for free in told), key=lambda free: free.total)


def _shared(free: Free | None, processes: int) -> Free | None:
    """Divide what is free on a host among processes."""
    if free is None or processes == 1:
        return free
    limit = f"{free.limit}, a share of {processes} ranks"
    return Free(free.memory // processes, free.swap // processes, limit)


def _from_first(resolved: Resolved, found: Callable[[], Resolved], ranks: Ranks) -> Resolved:
    """Let rank 0 find settings that fit, and take over on all what it changed."""

    def changes() -> list[list[Any]]:
        fitting = found()
        return [
            [name, getattr(fitting.configs[0], name), origin]
            for name, origin in fitting.origins.items()
            if origin != resolved.origins[name]
        ]

    for name, value, origin in ranks.on_first(changes):
        resolved = resolved.with_value(name, value, origin)
    return resolved


def advise_training(
    limits: Limits,
    config: Any,
    device: torch.device,
    train: Sequence[Example],
    sets: Mapping[str, Sequence[Example]],
    adapter: str | Path | None,
    plan: Callable[[Any], Plan] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Let a run that no cut makes fit say what to lower. The arguments are those of `fitted`."""
    args = (config, device, train, sets, adapter, plan, None, ranks.local_size)
    limits.advise = lambda work: _advice(work, lambda: _of_training(*args))


def _advice(work: str, known: Callable[[], Known | None]) -> str:
    """Say what to lower, or "" where nothing tells: the error itself must not be hidden."""
    try:
        found = known()
        return "" if found is None else found.question.last_advice(work)
    except Exception:  # memory is short, so anything may fail
        return ""


def _of_answers(
    config: Any, device: torch.device, sets: Mapping[str, Sequence[Example]]
) -> Known | None:
    encoder, shape = encoder_of(config), shape_of(config.model_name_or_path)
    lengths = lengths_of(encoder, config.instruction, (), sets.values())
    if shape is None or lengths is None:
        return None
    adapter = config.adapter_name_or_path
    rank = rank_of(adapter, config)

    def forecast_of(changed: Any) -> Forecast:
        image = image_tokens(changed, shape, lengths)
        work = Workload(
            element_size=base_dtype(changed.bf16, device).itemsize,
            device=device.type,
            lora_r=rank,
            lora_dropout=0.0,
            adapters=0 if adapter is None else 1,
            gradient_checkpointing=False,
            prompt_length=lengths.text + image,
            image_tokens=image,
            completion_length=0,
            max_completion_length=changed.max_completion_length,
            micro_batch=1,
            eval_rows=changed.per_device_eval_batch_size,
            num_generations=changed.num_generations,
            sampling_copies=changed.sampling_copies,
        )
        return decoding_forecast(shape, work, greedy=changed.temperature == 0)

    images = sum(map(len, sets.values()))
    return Known(Question(config, device, forecast_of), shape, lengths, images)


def fitted_answers(
    resolved: Resolved,
    device: torch.device,
    sets: Mapping[str, Sequence[Example]],
    ranks: Ranks = ALONE,
) -> Resolved:
    """Compare an evaluation's forecast with what is free, and return settings that fit.

    sets: the data sets to answer, by name. ranks: all of them call this, and get the same settings.

    Raises UsageError where decoding cannot fit, PeerError on the other ranks.
    """
    rows = partial(_sampled_rows, None)
    if not resolved.configs[0].memory_check:
        return with_product(resolved, device, rows, ranks)
    free = _least_free(device, ranks)

    def found() -> Resolved:
        known = None if free is None else _of_answers(resolved.configs[0], device, sets)
        if free is None or known is None:
            return resolved
        return _settled(resolved, known.question, free)[0]

    return with_product(_from_first(resolved, found, ranks), device, rows, ranks)


def advise_answers(
    limits: Limits, config: Any, device: torch.device, sets: Mapping[str, Sequence[Example]]
) -> None:
    """Let an evaluation that no cut makes fit say what to lower, as `advise_training` does."""
    limits.advise = lambda work: _advice(work, lambda: _of_answers(config, device, sets))
