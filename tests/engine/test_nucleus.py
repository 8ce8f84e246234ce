"""Protect the nucleus and the draw from it.

Checked: the distribution on paper; that the nucleus is what sorting finds; that what is found among
a few candidates is what a search of the whole row finds, to the last bit; that nothing waits for a
GPU.

Run: pytest tests/engine/test_nucleus.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import engine.nucleus
from engine.logprobs import scaled_logits, token_logprobs
from engine.nucleus import (
    _border_by_sorting,
    among_candidates,
    draw,
    nucleus,
    nucleus_mass,
)
from tests.helpers.op_counts import OpCounts, as_on_cuda

NOTHING = torch.tensor([], dtype=torch.long)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The distribution on paper


def test_p09_temperature_then_nucleus(case):
    with case("P09_temperature_topp") as p09:
        logits, temperature, token = (
            torch.tensor([p09.inputs["logits"]]),
            p09.inputs["temperature"],
            p09.inputs["token"],
        )
        size = logits.shape[1]
        head, every = torch.eye(size), torch.arange(size)
        logprobs, entropies = token_logprobs(
            logits.expand(size, -1), head, every, temperature=temperature, entropy=True
        )
        p09.close("logprobs_at_T", logprobs)
        p09.close("probs_at_T", logprobs.exp())
        p09.close("logp_token_T", logprobs[token])
        p09.close("logp_token_T1", token_logprobs(logits, head, torch.tensor([token]))[0][0])
        p09.close("entropy_full_at_T", entropies[0])

        kept, mass = nucleus(
            scaled_logits(logits.clone(), temperature, NOTHING).log_softmax(1), p09.inputs["top_p"]
        )
        p09.close("kept_token_ids", kept[0].nonzero()[:, 0])
        p09.close("kept_mass", mass[0])
        behaviour = kept[0] / mass[0]
        p09.close("behaviour_probs", behaviour)
        p09.close("logq_token", behaviour[token].log())
        # What the sampler records beside each token is that ratio.
        _, mass = draw(logprobs[None], p09.inputs["top_p"], torch.tensor([0.8]))
        p09.close("importance_ratio_pi_old_over_behaviour", mass[0])
        p09.close(
            "importance_ratio_pi_old_over_behaviour",
            (logprobs[token] - behaviour[token].log()).exp(),
        )


PROBABILITIES = torch.tensor([[0.1, 0.5, 0.06, 0.3, 0.04]])  # in order: 1, 3, 0, 2, 4


@pytest.mark.parametrize(
    ("top_p", "kept", "mass"),
    [
        (0.0, [1], 0.5),
        (0.3, [1], 0.5),
        (0.49, [1], 0.5),
        (0.6, [1, 3], 0.8),
        (0.79, [1, 3], 0.8),
        (0.81, [1, 3, 0], 0.9),
        (0.92, [1, 3, 0, 2], 0.96),
        (0.97, [1, 3, 0, 2, 4], 1.0),
        (1.0, [1, 3, 0, 2, 4], 1.0),
    ],
)
def test_the_nucleus_holds_the_token_that_crosses(top_p, kept, mass):
    for dtype in (torch.float32, torch.float64):
        probabilities, found = nucleus(PROBABILITIES.to(dtype).log(), top_p)
        assert set(probabilities[0].nonzero()[:, 0].tolist()) == set(kept)
        assert found.item() == pytest.approx(mass, abs=1e-6) and found.dtype == dtype
    for uniform, token in ((0.0, min(kept)), (1 - 2**-24, max(kept))):  # both ends of [0, 1)
        assert draw(PROBABILITIES.log(), top_p, torch.tensor([uniform]))[0].tolist() == [token]


def test_draw_inverts_the_distribution():
    # nucleus {0: 0.1, 1: 0.5, 3: 0.3} of mass 0.9: borders at 1/9 and 6/9
    uniforms = torch.tensor([0.11, 0.12, 0.66, 0.67])
    tokens, mass = draw(PROBABILITIES.log().expand(4, -1), 0.85, uniforms)
    assert tokens.tolist() == [0, 1, 1, 3] and mass.tolist() == pytest.approx([0.9] * 4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0])
def test_the_nucleus_is_what_sorting_finds(scale):
    """Flat and peaked distributions of 300 tokens; no two tokens are equally probable."""
    logprobs = (scale * torch.randn(50, 300, generator=seeded(), dtype=torch.float64)).log_softmax(
        1
    )
    for top_p in (0.0, 0.1, 0.5, 0.95, 0.999):
        kept, mass = nucleus(logprobs, top_p)
        for row, probabilities in zip(kept, logprobs.exp(), strict=True):
            ordered = probabilities.sort(descending=True)
            size = int((ordered.values.cumsum(0) < top_p).sum()) + 1
            assert sorted(ordered.indices[:size].tolist()) == row.nonzero()[:, 0].tolist()
        torch.testing.assert_close(kept, logprobs.exp() * (kept > 0), rtol=0, atol=0)
        torch.testing.assert_close(mass, kept.sum(1), rtol=0, atol=0)


def test_of_equally_probable_tokens_no_more_than_needed_are_kept():
    kept, mass = nucleus(torch.tensor([[0.2, 0.4, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]]).log(), 0.5)
    assert (kept > 0).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert mass.tolist() == pytest.approx([0.6, 0.5])


# Few candidates


def plain_draw(logprobs: Tensor, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from whole rows: the oracle of `draw`."""
    kept, mass = nucleus(logprobs, top_p)
    cumulative = kept.cumsum(1)
    tokens = (cumulative <= (uniform.to(mass.dtype) * mass)[:, None]).sum(1)
    return torch.minimum(tokens, (cumulative < cumulative[:, -1:]).sum(1)), mass


@pytest.fixture
def few(monkeypatch):
    """Let `draw` look among four candidates, however small the vocabulary is."""
    monkeypatch.setattr(engine.nucleus, "SMALL_VOCABULARY", 4)
    monkeypatch.setattr(engine.nucleus, "CANDIDATES", 4)


@pytest.fixture
def no_looks(monkeypatch):
    """Let the CPU be searched as a GPU is, without a look at a number."""
    monkeypatch.setattr(engine.nucleus, "_may_look", lambda device: False)


# Whole numbers make many equal probabilities. -60 makes a probability of 0 in fp32.
LOGITS = st.one_of(
    st.integers(-3, 3).map(float), st.floats(-12, 12, width=32), st.just(-60.0), st.just(-1e4)
)
TOP_P = st.one_of(
    st.sampled_from([0.0, 1e-9, 0.25, 0.5, 0.75, 0.95, 1 - 2**-24, 1.0]), st.floats(0, 1)
)


@st.composite
def distributions(draw_from) -> Tensor:
    """Draw log-probabilities [B,V] of one to four rows of 9 to 40 tokens, fp32 or fp64."""
    size = draw_from(st.integers(9, 40))
    rows = draw_from(
        st.lists(st.lists(LOGITS, min_size=size, max_size=size), min_size=1, max_size=4)
    )
    dtype = draw_from(st.sampled_from([torch.float32, torch.float64]))
    return torch.tensor(rows, dtype=dtype).log_softmax(1)


@settings(max_examples=250, deadline=None)
@given(
    logprobs=distributions(),
    top_p=TOP_P,
    count=st.integers(1, 9),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True, width=32), st.just(1 - 2**-24)),
    looks=st.booleans(),
)
def test_few_candidates_give_what_whole_rows_give(logprobs, top_p, count, uniform, looks):
    """Token and mass to the last bit, and each set that is said to be found is the nucleus."""
    uniforms = torch.full((len(logprobs),), uniform)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.nucleus, "SMALL_VOCABULARY", 8)
        patch.setattr(engine.nucleus, "CANDIDATES", count)
        patch.setattr(engine.nucleus, "_may_look", lambda device: looks)
        tokens, mass = draw(logprobs, top_p, uniforms)
    expected, expected_mass = plain_draw(logprobs, top_p, uniforms)
    assert torch.equal(tokens, expected) and torch.equal(mass, expected_mass)
    same_as_by_bits(logprobs, top_p)
    if top_p < 1 and count < logprobs.shape[1]:
        same_sets(logprobs, top_p, count)


def same_as_by_bits(logprobs: Tensor, top_p: float) -> None:
    """Compare the nucleus that sorting finds on a CPU with the one that is found bit by bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.nucleus, "_may_look", lambda device: False)
        expected = nucleus(logprobs, top_p)
    assert all(map(torch.equal, nucleus(logprobs, top_p), expected))


def same_sets(logprobs: Tensor, top_p: float, count: int) -> Tensor:
    """Compare the rows found among `count` candidates with the nucleus. Returns which those are."""
    ids, kept, mass, found = among_candidates(logprobs.exp(), top_p, count)
    assert (ids.diff(dim=1) > 0).all()
    whole, whole_mass = nucleus(logprobs, top_p)
    dense = torch.zeros_like(whole).scatter_(1, ids, kept)
    assert torch.equal(dense[found], whole[found])
    assert torch.equal(mass[found], whole_mass[found])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.95])
def test_a_large_vocabulary(top_p, dtype):
    """Peaked rows are found among the candidates, flat ones are not, and ties are there."""
    vocabulary, rows = 20_000, 12
    logits = torch.randn(rows, vocabulary, generator=seeded(4), dtype=dtype)
    logits *= torch.linspace(0.1, 12, rows, dtype=dtype)[:, None]
    logits[::2] = logits[::2].round()
    logprobs, uniform = logits.log_softmax(1), torch.rand(rows, generator=seeded(5))
    assert vocabulary > engine.nucleus.SMALL_VOCABULARY
    found = same_sets(logprobs, top_p, engine.nucleus.CANDIDATES)
    assert found.any() and not found.all()
    tokens, mass = draw(logprobs, top_p, uniform)
    expected, expected_mass = plain_draw(logprobs, top_p, uniform)
    assert torch.equal(tokens, expected) and torch.equal(mass, expected_mass)


def test_what_is_found_among_candidates():
    # in order 0.4, 0.3, 0.1 three times: four of the five are candidates
    probabilities = torch.tensor([[0.1, 0.3, 0.1, 0.4, 0.1]])
    for top_p, found in ((0.0, True), (0.3, True), (0.6, True), (0.75, False), (0.95, False)):
        # The last candidate is one of three equal ones, so a border at 0.1 is not known to hold
        # the smallest ids.
        assert among_candidates(probabilities, top_p, 4)[3].tolist() == [found]
    ids, kept, mass, _ = among_candidates(probabilities, 0.6, 4)
    assert ids[0, kept[0] > 0].tolist() == [1, 3] and mass.tolist() == [pytest.approx(0.7)]


def test_of_tied_candidates_the_smallest_ids_are_kept():
    # 0.5 needs both of 0.2 but not the third; the candidates hold all three
    probabilities = torch.tensor([[0.1, 0.2, 0.1, 0.2, 0.2, 0.15, 0.05]])
    ids, kept, mass, found = among_candidates(probabilities, 0.35, 5)
    assert found.tolist() == [True]
    assert ids[0, kept[0] > 0].tolist() == [1, 3] and mass.tolist() == [pytest.approx(0.4)]


def test_a_mass_that_just_reaches_top_p_is_found():
    probabilities = torch.tensor([[0.03125, 0.5, 0.0625, 0.25, 0.125]])
    for top_p, ids in ((0.5, [1]), (0.75, [1, 3]), (0.875, [1, 3, 4])):
        found_ids, kept, mass, found = among_candidates(probabilities, top_p, 4)
        assert found.tolist() == [True] and mass.tolist() == [top_p]
        assert found_ids[0, kept[0] > 0].tolist() == ids


def test_where_rounding_decides_the_sum_of_the_whole_row_does():
    """Every border of six rows, at the mass that a sum over the row finds and right beside it."""
    logprobs = torch.randn(6, 300, generator=seeded(6)).mul(3).log_softmax(1)
    probabilities = logprobs.exp()
    differs, wrong = False, 0
    for row, size in ((row, size) for row in range(6) for size in range(1, 30)):
        top = probabilities[row].sort(descending=True)
        prefix = torch.zeros_like(probabilities)
        prefix[row, top.indices[:size]] = top.values[:size]
        exact = prefix.sum(1)[row]
        differs = differs or bool(top.values[:size].cumsum(0)[-1] != exact)
        for top_p in (
            exact,
            exact.nextafter(torch.tensor(0.0)),
            exact.nextafter(torch.tensor(2.0)),
        ):
            same_sets(logprobs, top_p.item(), 40)
            same_as_by_bits(logprobs, top_p.item())
            wrong += _border_by_sorting(probabilities, top_p.item()) is None
    assert differs and 0 < wrong < 3 * 6 * 29 / 2  # else nothing was tested


def test_all_tokens_can_be_drawn_without_a_nucleus(few):
    # Two tokens of 0.5 reach the mass of 1, but at top_p 1 nothing is left out.
    logprobs = torch.tensor([[0.5, 0.5, 0.0625, 0.0625, 0.0625, 0.0625]]).log()
    tokens, mass = draw(logprobs, 1.0, torch.tensor([1 - 2**-24]))
    assert tokens.tolist() == [5] and mass.tolist() == [pytest.approx(1.25)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_that_is_searched_alone_is_summed_as_beside_others(rows, two_threads):
    """With two threads torch sums one long row in another order than each of several."""
    alone = []
    for seed in range(8):
        logprobs = torch.randn(rows, 50_000, generator=seeded(seed)).log_softmax(1)
        logprobs[1:] = torch.zeros(50_000).index_fill(0, torch.tensor([3]), 20.0).log_softmax(0)
        found = same_sets(logprobs, 0.95, engine.nucleus.CANDIDATES)
        assert found.tolist() == [False, True][:rows]
        _, mass = draw(logprobs, 0.95, torch.zeros(rows))
        assert torch.equal(mass, nucleus(logprobs, 0.95)[1])
        alone.append(nucleus(logprobs[:1], 0.95)[1].item() == mass[0].item())
    assert all(alone) == (rows == 1)  # else nothing was tested


def test_broken_logits_give_broken_masses(few):
    """A row that holds NaN has a mass of NaN, the row beside it its own."""
    good = torch.tensor([0.0, 1, 2, 3, 4, 5]).log_softmax(0)
    logprobs = torch.stack([torch.full_like(good, torch.nan), good])
    tokens, mass = draw(logprobs, 0.9, torch.tensor([0.3, 0.3]))
    assert mass[0].isnan() and 0 <= tokens[0] < 6
    expected, expected_mass = plain_draw(logprobs[1:], 0.9, torch.tensor([0.3]))
    assert tokens[1:].tolist() == expected.tolist() and mass[1:].tolist() == expected_mass.tolist()


# Nothing waits


@pytest.mark.parametrize("top_p", [0.95, 1.0])
def test_nothing_waits_for_a_device(few, top_p):
    """A fake tensor of the meta device has no values, so a look at one fails."""
    with FakeTensorMode():
        logprobs = torch.empty(3, 50, device="meta")
        tokens, mass = draw(logprobs, top_p, torch.empty(3, device="meta"))
    assert tokens.shape == mass.shape == (3,)
    assert (tokens.dtype, mass.dtype) == (torch.int64, torch.float32)


def test_a_draw_reads_and_writes_few_bytes(monkeypatch):
    """As in a CUDA graph, where no row needs the search of whole rows: limit 1.5 GB.

    Passes over [64,262208] of 67 MB: exp reads and writes one each, topk reads five, and each of
    the two sums over whole rows fills zeros and reads them.
    """
    monkeypatch.setattr(engine.nucleus, "_run_if", lambda needed, work: None)
    with as_on_cuda(), OpCounts() as count:
        logprobs, uniform = torch.empty(64, 262_208, device="meta"), torch.empty(64, device="meta")
        count.take()
        draw(logprobs, 0.95, uniform)
        found = count.take()
    passes = found.moved / (4 * logprobs.numel())
    assert 11 <= passes < 11.2 and found.moved < 1.5e9
    assert found.waits == 0


class Graph:
    """Note what a CUDA graph that is being captured is asked for."""

    def __init__(self):
        self.calls: list[object] = []

    def begin_capture_to_if_node(self, needed: Tensor) -> None:
        self.calls.append(needed.item())

    def end_capture_to_conditional_node(self) -> None:
        self.calls.append("end")


@pytest.fixture
def capturing(monkeypatch, no_looks) -> Graph:
    graph = Graph()
    monkeypatch.setattr(engine.nucleus, "_has_conditional_nodes", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "get_currently_capturing_graph", lambda: graph, raising=False
    )
    return graph


def test_a_graph_holds_the_search_of_whole_rows_in_a_condition(few, capturing):
    peaked, flat = torch.tensor([[9.0, 0, 0, 0, 0, 0]]), torch.zeros(1, 6)
    for logits, needed in ((peaked, False), (flat, True), (torch.cat([peaked, flat]), True)):
        capturing.calls.clear()
        uniform = torch.full((len(logits),), 0.7)
        tokens, _ = draw(logits.log_softmax(1), 0.9, uniform)
        assert capturing.calls == [needed, "end"]
        assert tokens.tolist() == plain_draw(logits.log_softmax(1), 0.9, uniform)[0].tolist()


def test_the_condition_is_closed_where_its_search_fails(few, capturing, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.nucleus, "nucleus", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        draw(torch.zeros(1, 6).log_softmax(1), 0.9, torch.tensor([0.7]))
    assert capturing.calls == [True, "end"]


def test_a_search_that_no_row_needs_is_left_out(few, monkeypatch):
    """On a CPU, where a look costs nothing."""

    def fails(*arguments):
        raise AssertionError("whole rows are searched")

    logprobs = torch.tensor([[9.0, 0, 0, 0, 0, 0]]).log_softmax(1)
    monkeypatch.setattr(engine.nucleus, "_search", fails)
    assert draw(logprobs, 0.9, torch.tensor([0.7]))[0].tolist() == [0]


# The mass alone, of states


@pytest.mark.parametrize("size", [50, 9000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_mass_of_states_is_that_of_their_nucleus(size, softcap):
    """In chunks, among candidates and in whole rows: as `nucleus` finds it in all at once."""
    hidden = torch.randn(11, 6, generator=seeded(1))
    hidden[5] = 0  # all tokens equally probable: candidates are not enough
    head = torch.randn(size, 6, generator=seeded(2))
    for temperature, top_p in ((0.7, 0.9), (1.0, 0.3), (1.3, 1.0)):
        suppressed = torch.tensor([3, 7])
        logits = scaled_logits(hidden @ head.t(), temperature, suppressed, softcap)
        _, expected = nucleus(logits.log_softmax(1), top_p)
        found = nucleus_mass(
            hidden,
            head,
            temperature=temperature,
            top_p=top_p,
            suppress_token_ids=(3, 7),
            softcap=softcap,
            chunk_size=4,
        )
        assert torch.allclose(found, expected, atol=1e-6, rtol=0)
        assert found.dtype == torch.float32 and (found >= min(top_p, 1 - 1e-6)).all()


def test_the_mass_never_holds_all_tokens_logits(monkeypatch):
    sizes = []

    def noting(logits, *rest):
        sizes.append(len(logits))
        return scaled_logits(logits, *rest)

    monkeypatch.setattr(engine.nucleus, "scaled_logits", noting)
    nucleus_mass(torch.randn(150, 4), torch.randn(20, 4), temperature=1.0, top_p=0.9)
    assert sizes == [64, 64, 22]
