"""Find the nucleus of a next-token distribution (top-p), and draw a token from it.

The nucleus is the smallest set of most probable tokens whose mass reaches top_p. It nearly always
lies among a few candidates, the most probable tokens. So only these are looked through, and a row
whose nucleus does not lie among them is searched as a whole. Both ways give the same nucleus and
the same mass, bit for bit: a mass is always summed over a whole row, in the order of ids. So the
same token is drawn. On a GPU, which adds up in another order where there are fewer candidates, it
may be the next one where its number lies within rounding of a border.

Shapes: B rows, V vocabulary, k candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.logprobs import scaled_logits

# At 64 rows of 262,208 tokens a search of whole rows moves 12 GB, one among the candidates 0.5 GB.
CANDIDATES = 256
# Up to this size whole rows are searched as fast as candidates are found on a CPU.
SMALL_VOCABULARY = 8192
MASS_CHUNK = 64  # tokens: a search of whole rows holds five [64,V] fp32 tensors, 0.3 GB of Gemma's


def nucleus(logprobs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Find the nucleus: the smallest set of most probable tokens whose mass reaches `top_p`.

    The token that crosses `top_p` belongs to it. Among equally probable tokens at the border the
    smallest ids win. Nothing waits for a GPU, where the vocabulary is not sorted either.

    logprobs [B,V].
    Returns (probabilities [B,V], 0 outside the nucleus and not renormalised, and their sum [B],
    which is at least `top_p`).
    """
    return _search(logprobs.exp(), top_p)


def _search(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Find the nucleus of `probabilities` [B,V] as `nucleus` does."""
    if top_p >= 1:
        return probabilities, probabilities.sum(1)
    least = _border_by_sorting(probabilities, top_p)
    if least is None:
        least = _border_by_bits(probabilities, top_p)
    mask = torch.empty_like(probabilities)  # [B,V], see `_reaches`
    kept = torch.gt(probabilities, least, out=mask).mul(probabilities)  # [B,V] above the border
    needed = _needed(top_p, kept.sum(1, keepdim=True), least)
    # Counting in floats is exact here: the counts stay below 2^24.
    on_border = torch.eq(probabilities, least, out=mask)  # [B,V]
    kept += on_border.cumsum(1).le_(needed).mul_(on_border).mul_(probabilities)
    return kept, kept.sum(1)


def _border_by_bits(probabilities: Tensor, top_p: float) -> Tensor:
    """Find the least probability of the nucleus [B,1], one bit after the other.

    Floats that are not negative are ordered as their bits are.
    """
    # `highest` is the highest bit that is set in 1.0.
    integers, highest = (
        (torch.int32, 29) if probabilities.element_size() == 4 else (torch.int64, 61)
    )
    mask = torch.empty_like(probabilities)  # [B,V]
    # The tokens whose probability is at least `low` have a mass of at least top_p.
    low = torch.zeros(len(probabilities), 1, dtype=integers, device=probabilities.device)  # [B,1]
    for bit in range(highest, -1, -1):
        torch.ge(probabilities, (low + 2**bit).view(probabilities.dtype), out=mask)
        low.add_(_reaches(top_p, mask, probabilities), alpha=2**bit)
    # The most probable token stays, also at top_p 0.
    return torch.minimum(low.view(probabilities.dtype), probabilities.amax(1, keepdim=True))


def _border_by_sorting(probabilities: Tensor, top_p: float) -> Tensor | None:
    """Find on a CPU what `_border_by_bits` finds, in less time, or None.

    It is guessed from sums in another order and then proved. A mass within rounding of top_p can
    make the guess wrong. numpy sorts, for torch would sort the places as well, which takes longer.
    """
    if not _may_look(probabilities.device):
        return None
    descending = torch.from_numpy(np.sort(probabilities.detach().numpy(), axis=1)).flip(1)
    place = (descending.cumsum(1) < top_p).sum(1, keepdim=True)  # [B,1]
    least = descending.gather(1, place.clamp_(max=descending.shape[1] - 1))
    mask = torch.empty_like(probabilities)  # [B,V]
    is_enough = _reaches(top_p, torch.ge(probabilities, least, out=mask), probabilities)
    is_too_much = _reaches(top_p, torch.gt(probabilities, least, out=mask), probabilities)
    is_border = is_enough & (is_too_much.logical_not_() | (least == descending[:, :1]))
    return least if is_border.all() else None


def _reaches(top_p: float, mask: Tensor, probabilities: Tensor) -> Tensor:
    """Tell whether the tokens in a mask have a mass of at least top_p [B,1].

    mask [B,V]: 1 and 0 in the probabilities' own dtype, which takes a third of the time of a bool
        one. It is overwritten.
    """
    return mask.mul_(probabilities).sum(1, keepdim=True) >= top_p


def _needed(top_p: float, mass_above: Tensor, least: Tensor) -> Tensor:
    """Tell how many of the tokens at the border are needed to reach top_p, one at least [B,1]."""
    return ((top_p - mass_above) / least).ceil().clamp(min=1)


def among_candidates(
    probabilities: Tensor, top_p: float, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the nucleus among the `count` most probable tokens of every row.

    The border is guessed from the candidates' own sums and then proved as `nucleus` would find it:
    what lies above it does not reach `top_p` and what is kept does, both summed over the whole row.
    Sums of numbers that are not negative never shrink when one of them grows, also when rounded, so
    no other border can pass both tests. Candidates above the last one's probability are all the
    tokens above it, whichever of several equal ones came last.

    probabilities [B,V], V > count. top_p below 1.
    Returns (ids [B,k] int64, ascending; their probabilities [B,k], 0 outside the nucleus; mass [B]
    of the nucleus; [B] bool, False where the nucleus was not found, and then the rest means
    nothing).
    """

    def mass(own: Tensor) -> Tensor:
        # Summed as `nucleus` sums, so that not a bit of it depends on the way it was found.
        return torch.zeros_like(probabilities).scatter_(1, ids, own).sum(1, keepdim=True)  # [B,1]

    values, ids = probabilities.topk(count)  # [B,k], descending
    last = values[:, -1:]  # [B,1]
    place = (values.cumsum(1) < top_p).sum(1, keepdim=True).clamp(max=count - 1)  # [B,1]
    least = values.gather(1, place)  # [B,1]
    most = values[:, :1]
    ids, order = ids.sort(1)
    values = values.gather(1, order)
    above = values.where(values > least, 0)  # [B,k]
    mass_above = mass(above)
    on_border = values == least
    taken = on_border & (on_border.cumsum(1) <= _needed(top_p, mass_above, least))  # [B,k]
    kept = values.where(taken, above)
    mass_kept = mass(kept)
    found = (least > last) & (mass_kept >= top_p) & ((mass_above < top_p) | (least == most))
    return ids, kept, mass_kept[:, 0], found[:, 0]


def nucleus_mass(
    hidden: Tensor,
    lm_head_weight: Tensor,
    *,
    temperature: float,
    top_p: float,
    suppress_token_ids: Sequence[int] = (),
    softcap: float | None = None,
    chunk_size: int = MASS_CHUNK,
) -> Tensor:
    """Compute the mass of the nucleus at each token, without a [tokens, vocabulary] matrix.

    hidden [M,H], lm_head_weight [V,H] and the rest: as `engine.logprobs.token_logprobs` takes them.
    chunk_size: tokens at a time.
    Returns [M] fp32 (fp64 for fp64 input).
    """
    suppressed = torch.tensor(list(suppress_token_ids), dtype=torch.long, device=hidden.device)
    masses = []
    for chunk in hidden.split(chunk_size):
        logits = chunk.to(lm_head_weight.dtype) @ lm_head_weight.t()
        logprobs = scaled_logits(logits, temperature, suppressed, softcap).log_softmax(1)  # [m,V]
        masses.append(_mass(logprobs, top_p))
    return torch.cat(masses)


def _mass(logprobs: Tensor, top_p: float) -> Tensor:
    """Find the mass of each row's nucleus [B], among few candidates where that is enough."""
    if top_p >= 1 or logprobs.shape[1] <= SMALL_VOCABULARY:
        return nucleus(logprobs, top_p)[1]
    _, _, mass, found = among_candidates(logprobs.exp(), top_p, CANDIDATES)
    rows = found.logical_not().nonzero()[:, 0]
    if len(rows):
        mass[rows] = nucleus(logprobs[rows], top_p)[1]
    return mass


def draw(logprobs: Tensor, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row from the renormalised nucleus, by inverting its distribution.

    On a GPU nothing waits. In a CUDA graph the search of whole rows is a part that runs only where
    a row needs it. Without a graph it always runs there.

    logprobs [B,V].
    uniform [B], in [0, 1): where the cumulative distribution, in the order of ids, is inverted.
    Returns (token [B] int64, mass of the nucleus [B]).
    """
    if top_p >= 1 or logprobs.shape[1] <= SMALL_VOCABULARY:
        kept, mass = nucleus(logprobs, top_p)
        return _inverted(kept, mass, uniform), mass
    ids, kept, mass, found = among_candidates(logprobs.exp(), top_p, CANDIDATES)
    tokens = ids.gather(1, _inverted(kept, mass, uniform)[:, None])[:, 0]

    def search_some() -> None:
        rows = found.logical_not().nonzero()[:, 0]
        if len(rows) == 1 < len(found):
            rows = rows.repeat(2)  # torch sums one row in another order than each of several
        whole, own = _search(logprobs[rows].exp_(), top_p)
        tokens[rows], mass[rows] = _inverted(whole, own, uniform[rows]), own

    def search_all() -> None:
        whole, own = nucleus(logprobs, top_p)
        tokens.copy_(tokens.where(found, _inverted(whole, own, uniform)))
        mass.copy_(mass.where(found, own))

    search = search_some if _may_look(logprobs.device) else search_all
    _run_if(found.logical_not().any(), search)
    return tokens, mass


def _inverted(kept: Tensor, mass: Tensor, uniform: Tensor) -> Tensor:
    """Draw a column [B] of `kept` [B,n], whose sum is `mass` [B]."""
    cumulative = kept.cumsum(1)
    columns = (cumulative <= (uniform.to(mass.dtype) * mass)[:, None]).sum(1)
    last = (cumulative < cumulative[:, -1:]).sum(1)  # rounding must not step past the nucleus
    return torch.minimum(columns, last)


def _run_if(needed: Tensor, work: Callable[[], None]) -> None:
    """Call `work` where `needed` [] bool holds, without a wait for a GPU.

    On a GPU `work` overwrites results in place and may run without being needed. Only a CUDA graph
    can leave it out there: as a conditional node, which takes a driver of CUDA 12.4 or later.
    """
    if _may_look(needed.device):
        if needed:
            work()
    elif _has_conditional_nodes() and torch.cuda.is_current_stream_capturing():
        graph = torch.cuda.CUDAGraph.get_currently_capturing_graph()
        graph.begin_capture_to_if_node(needed)
        try:
            work()
        finally:
            graph.end_capture_to_conditional_node()
    else:
        work()


def _may_look(device: torch.device) -> bool:
    """Tell whether reading a number from the device waits for nothing."""
    return device.type == "cpu"


def _has_conditional_nodes() -> bool:
    """Tell whether torch and the driver know conditional nodes of CUDA graphs."""
    return (
        hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node")
        and torch.cuda.is_available()
        and torch._C._cuda_getDriverVersion() >= 12040  # type: ignore[attr-defined]  # not on a CPU
    )
