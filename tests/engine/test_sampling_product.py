"""Protect the choice of the sampler's product: measured at the start, kept as long as the run.

Times are those of a pretended clock.

Run: pytest tests/engine/test_sampling_product.py
"""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch

import engine.generate
import engine.sampling_product
from engine.config import Resolved
from engine.memory import ModelShape
from engine.sampling_product import faster_product, with_product
from engine.settings import SFTConfig
from tests.helpers.runs import sft
from tests.helpers.threads import in_threads

CPU = torch.device("cpu")
# hidden 8, 2 layers, 2 heads and 1 key head of 4, intermediate 16, vocabulary 100
SHAPE = ModelShape(0, 8, 2, 2, 1, 4, 16, 100, 2, False, None, False, 8, 8, 4, 8)


class Clock:
    """Pretend that products take the time that a test gives them, and note what is asked for."""

    def __init__(self, seconds) -> None:
        self.seconds, self.now, self.calls = seconds, 0.0, []

    def product(self, weight, bias, kind):
        def run(x):
            self.calls.append((kind, tuple(weight.shape), tuple(x.shape)))
            self.now += self.seconds(kind, weight)

        return run


@pytest.fixture
def clocked(monkeypatch):
    def use(seconds) -> Clock:
        clock = Clock(seconds)
        monkeypatch.setattr(engine.sampling_product, "product", clock.product)
        monkeypatch.setattr(engine.sampling_product.time, "perf_counter", lambda: clock.now)
        return clock

    faster_product.cache_clear()
    yield use
    faster_product.cache_clear()


@pytest.mark.parametrize(
    ("torchs", "onednns", "chosen"),
    [
        (1.0, 1.125, "torch"),
        (1.0, 1.0625, "onednn"),  # about as fast
        (1.0, 1.0, "onednn"),
        (3.0, 1.0, "onednn"),
        (1.0, 9.0, "torch"),
    ],
)
def test_torchs_product_is_taken_where_it_is_clearly_faster(clocked, torchs, onednns, chosen):
    clock = clocked(lambda kind, weight: torchs if kind == "torch" else onednns)
    assert faster_product(SHAPE, 3) == chosen
    # one token's products for 3 rows: of a layer, q with k and v, o, gate with up, down; the head
    weights = [(16, 8), (8, 8), (32, 8), (8, 16), (100, 8)]
    token = [(kind, weight, (3, weight[1])) for kind in ("torch", "onednn") for weight in weights]
    assert clock.calls == token * (engine.sampling_product.ROUNDS + 1)  # in turn
    assert faster_product(SHAPE, 3) == chosen and len(clock.calls) == len(token) * 8  # once


@pytest.mark.parametrize(("layers", "chosen"), [(1, "torch"), (2, "onednn"), (3, "onednn")])
def test_layers_count_as_often_as_they_are_there(clocked, layers, chosen):
    """Of the head torch's product takes 1 s and oneDNN's 10, of a layer 4 x 2 s and 4 x 1 s.

    One layer: 9 against 14. Two: 17 against 18, which is less than 1.1 times as much.
    """

    def seconds(kind, weight):
        if len(weight) == 100:
            return 1.0 if kind == "torch" else 10.0
        return 2.0 if kind == "torch" else 1.0

    clocked(seconds)
    assert faster_product(replace(SHAPE, layers=layers), 3) == chosen


def test_one_slow_call_decides_nothing(clocked):
    calls = []

    def seconds(kind, weight):
        calls.append(kind)
        # the first round compiles, and later another process takes the processor thrice
        if len(calls) <= 10 or len(calls) in (12, 23, 34):
            return 1000.0 if kind == "torch" else 0.0
        return 1.0 if kind == "torch" else 2.0

    clocked(seconds)
    assert faster_product(SHAPE, 3) == "torch"


def test_of_a_large_weight_a_part_is_measured(clocked):
    clock = clocked(lambda kind, weight: 1.0)
    faster_product(replace(SHAPE, hidden=4096, vocabulary=200_000), 1)
    assert {weight for _, weight, _ in clock.calls} == {
        (16, 2048),
        (2048, 8),
        (32, 2048),
        (2048, 16),
        (2048, 2048),
    }


def test_measuring_changes_no_random_state(clocked):
    before = torch.get_rng_state()
    clocked(lambda kind, weight: 1.0)
    faster_product(SHAPE, 2)
    assert torch.equal(torch.get_rng_state(), before)


# ---- settings ------------------------------------------------------------------------------------
def settings(**values) -> Resolved:
    origins = dict.fromkeys((field.name for field in fields(SFTConfig)), "default")
    return Resolved((SFTConfig(bf16=False, **values),), origins)


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Let every measurement find torch's product faster, and note the rows that it is for."""
    rows: list[int] = []
    monkeypatch.setattr(engine.sampling_product, "shape_of", lambda name: SHAPE)
    monkeypatch.setattr(
        engine.sampling_product, "faster_product", lambda shape, n: rows.append(n) or "torch"
    )
    return rows


def test_what_is_left_open_is_measured(measured):
    found = with_product(settings(), CPU, lambda config: 5)
    assert found.configs[0].sampling_product == "torch" and measured == [5]
    assert found.origins["sampling_product"] == "measured"


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ({"sampling_product": "torch"}, CPU),
        ({"sampling_product": "onednn"}, CPU),
        ({"sampling_copies": False}, CPU),
        ({}, torch.device("cuda")),
    ],
)
def test_elsewhere_nothing_is_measured(measured, given, device, capsys):
    resolved = settings(**given)
    assert with_product(resolved, device, lambda config: 5) == resolved and not measured
    assert capsys.readouterr().err == ""


def test_in_bf16_nothing_is_measured(measured, monkeypatch):
    monkeypatch.setattr(engine.sampling_product, "base_dtype", lambda *_: torch.bfloat16)
    assert with_product(settings(), CPU, lambda config: 5) == settings() and not measured


def test_a_product_that_is_not_there_is_said(measured, monkeypatch, capsys):
    """As in a run that began with oneDNN's and goes on with a torch that lacks it."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert with_product(settings(), CPU, lambda config: 5) == settings()
    assert capsys.readouterr().err == ""
    resolved = settings(sampling_product="onednn")
    assert with_product(resolved, CPU, lambda config: 5) == resolved and not measured
    assert capsys.readouterr().err == (
        "note: --sampling_product onednn: this torch was built without oneDNN, so torch's own"
        " products sample, the same but for rounding\n"
    )


def test_a_shape_that_nobody_knows_is_not_measured(measured, monkeypatch):
    monkeypatch.setattr(engine.sampling_product, "shape_of", lambda name: None)
    assert with_product(settings(), CPU, lambda config: 5) == settings()


def test_all_ranks_take_what_the_first_measures(measured):
    ends = in_threads(3, lambda ranks: with_product(settings(), CPU, lambda config: 5, ranks))
    assert [end.configs[0].sampling_product for end in ends] == ["torch"] * 3
    assert measured == [5]  # one rank alone


# ---- a run ---------------------------------------------------------------------------------------
def product_of(run) -> tuple[str, str]:
    entry = json.loads((run / "config.json").read_text())["settings"]["sampling_product"]
    return entry["value"], entry["origin"]


def test_a_resumed_run_keeps_its_product(tiny_checkpoint, tiny_data, tmp_path, monkeypatch):
    """Also where its command says auto. A flag that names one is obeyed."""
    used = []
    sampling_layers = engine.generate.sampling_layers

    def noted(net, *, copies, kind, placed):
        used.append(kind)
        return sampling_layers(net, copies=copies, kind=kind, placed=placed)

    monkeypatch.setattr(engine.generate, "sampling_layers", noted)
    model, run = tiny_checkpoint("gemma3"), tmp_path / "run"
    evaluated = ["--validation_file", f"a={tiny_data}", "--save_steps", "1"]

    def go(steps: int, found: str, *more: str) -> None:
        used.clear()
        monkeypatch.setattr(engine.sampling_product, "faster_product", lambda *_: found)
        flags = ["--max_steps", str(steps), *evaluated, *more]
        assert sft(model, tiny_data, run, *flags) == 0

    go(1, "torch")
    assert product_of(run) == ("torch", "measured") and set(used) == {"torch"}
    go(2, "onednn")
    assert product_of(run)[0] == "torch" and set(used) == {"torch"}
    go(3, "onednn", "--sampling_product", "auto")
    assert product_of(run)[0] == "torch" and set(used) == {"torch"}
    go(4, "torch", "--sampling_product", "onednn")
    assert product_of(run)[0] == "onednn" and set(used) == {"onednn"}
