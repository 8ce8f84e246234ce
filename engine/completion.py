"""Say how completions are drawn, what one is and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.settings import MAX_COMPLETION_LENGTH, TEMPERATURE, TOP_P

if TYPE_CHECKING:  # an evaluation of a served model says how to sample without torch
    from torch import Tensor


@dataclass(frozen=True)
class SamplingConfig:
    """Say how completions are drawn. Temperature 0 is greedy decoding."""

    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    max_completion_length: int = MAX_COMPLETION_LENGTH


@dataclass(frozen=True)
class Completion:
    """Hold one sampled completion.

    ids [C] int64: up to and including the stop token.
    logprobs [C] fp32: of these tokens, at the sampling temperature (1 when greedy), over the whole
        vocabulary without the suppressed ids.
    top_p_mass [C] fp32: probability that the nucleus held at each token.
    truncated: True where no stop token came.
    """

    ids: Tensor
    logprobs: Tensor
    top_p_mass: Tensor
    truncated: bool


def completion_mask(ids: Tensor, stop_ids: Sequence[int] | frozenset[int]) -> Tensor:
    """Mark the tokens up to and including the first stop token, or all where there is none.

    The stop token's position decides, never a comparison with the padding id, which may be a stop
    id.

    ids [N,T] int64.
    Returns [N,T] bool.
    """
    is_stop = _is_stop(ids, stop_ids)  # [N,T]
    stopped_before = is_stop.long().cumsum(1) - is_stop.long()  # [N,T] strictly before each token
    return stopped_before == 0


def is_truncated(ids: Tensor, stop_ids: Sequence[int] | frozenset[int]) -> Tensor:
    """Tell which rows hold no stop token. One at the last position is not a truncation.

    ids [N,T] int64.
    Returns [N] bool.
    """
    return ~_is_stop(ids, stop_ids).any(1)


def _is_stop(ids: Tensor, stop_ids: Sequence[int] | frozenset[int]) -> Tensor:
    """Mark the stop tokens of ids [N,T]."""
    return (ids[:, :, None] == ids.new_tensor(sorted(stop_ids))).any(2)
