"""Protect --compile.

Checked: log-probabilities and gradients are those without it but for rounding, the ratio is exactly
1 and the KL exactly 0 before the first update, one compilation serves batches of all sizes and both
adapters, and names of weights stay.

Compiling takes nearly all of the time, so one family is compiled to the end and the other only
traced (torch's backend aot_eager).

Run: pytest tests/engine/test_compile.py
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from data.prompts import Prompt
from engine.collate import collate_rows
from engine.config import ConfigError, UsageError
from engine.encode import EncodedRow
from engine.forward import completion_logprobs
from engine.model import (
    POLICY,
    REFERENCE,
    BaseModel,
    compile_decoder,
    enable_gradient_checkpointing,
    use_adapter,
)
from tests.helpers.runs import grpo, speak, train_log
from tests.helpers.tiny import attach_random_adapter, examples_of, load

TEXTS = ("Which?", "A longer question about this image?", "Where?")


@pytest.fixture(scope="module", autouse=True)
def needs_a_compiler():
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(3))
    except RuntimeError as error:
        pytest.skip(f"torch cannot compile here: {str(error).splitlines()[0]}")


@pytest.fixture(autouse=True)
def clean():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def only_traced(monkeypatch):
    """Capture the parts with all their guards, and run them by torch's ordinary kernels."""
    compile_part = nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda part, *, dynamic, options: compile_part(part, backend="aot_eager", dynamic=dynamic),
    )


def batches(model: BaseModel, images, count: int = 10) -> list:
    """Make batches of 1 to 3 prompts with images of all sizes.

    Each prompt has 1 to 3 completions of 2 to 39 tokens.
    """
    generator, found = torch.Generator().manual_seed(0), []

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    for i in range(count):
        sizes = [(56, 112, 84)[(i + j) % 3] for j in range(number(1, 4))]
        prompts = [
            model.encode_prompt(e, Prompt(f"{i}-{j}", TEXTS[(i + j) % 3]))
            for j, e in enumerate(examples_of(images, *sizes))
        ]
        lengths = [(prompt, number(2, 40)) for prompt in prompts for _ in range(number(1, 4))]
        found.append(
            collate_rows(
                [
                    EncodedRow(
                        prompt,
                        torch.randint(40, 200, (n,), generator=generator),
                        torch.ones(n, dtype=torch.bool),
                    )
                    for prompt, n in lengths
                ],
                0,
            )
        )
    return found


def logprobs_of(wrapped, model: BaseModel, batch) -> torch.Tensor:
    return completion_logprobs(
        wrapped, model.family, batch, temperature=0.8, suppress_token_ids=model.suppressed_ids
    )[0]


def policy(wrapped, model: BaseModel, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute log-probabilities and gradients under random weights of the tokens."""
    wrapped.train()
    logprobs = logprobs_of(wrapped, model, batch)
    (
        logprobs * torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    ).sum().backward()
    gradients = {
        name: parameter.grad
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    wrapped.zero_grad()
    return logprobs.detach(), gradients


def scored(wrapped, model: BaseModel, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute old and reference log-probabilities, as `Rollouts.score` does."""
    wrapped.eval()
    with torch.no_grad():
        old = logprobs_of(wrapped, model, batch)
    with use_adapter(wrapped, REFERENCE):
        return old, logprobs_of(wrapped, model, batch)


def with_reference(model: BaseModel):
    """Attach a policy adapter, and a reference that is its copy."""
    wrapped = attach_random_adapter(model)
    wrapped.add_adapter(REFERENCE, wrapped.peft_config[POLICY])
    weights = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name in weights:
            if f".{REFERENCE}." in name:
                weights[name].copy_(weights[name.replace(f".{REFERENCE}.", f".{POLICY}.")])
    wrapped.set_adapter(POLICY)
    enable_gradient_checkpointing(wrapped)
    return wrapped


@pytest.mark.timeout(900)  # it compiles for a minute and a half where nothing else runs
def test_compiled_parts_compute_the_same(tiny_checkpoint, tiny_images):
    """In bf16, where graphs with and without gradient would round differently if compilers were
    left to it. What remains is a sum in another order here and there, and the one bf16 step that
    follows from it, in a model of large weights. From fp32 both are twice as far.
    """
    model = load(tiny_checkpoint("gemma3"), dtype=torch.bfloat16)
    wrapped = with_reference(model)
    of_batches = batches(model, tiny_images)
    expected, names = (
        [policy(wrapped, model, batch) for batch in of_batches],
        list(wrapped.state_dict()),
    )
    compile_decoder(wrapped)
    assert list(wrapped.state_dict()) == names
    graphs = []
    for batch, (eager, eager_gradients) in zip(of_batches, expected, strict=True):
        old, reference = scored(wrapped, model, batch)
        logprobs, gradients = policy(wrapped, model, batch)
        assert torch.equal(logprobs, old) and torch.equal(old, reference)
        assert float((logprobs - eager).abs().max()) <= 0.1
        for name, gradient in gradients.items():
            assert float((gradient - eager_gradients[name]).norm()) <= 0.04 * float(
                eager_gradients[name].norm()
            ), name
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 4 and set(graphs) == {graphs[0]}  # the nine others need no compilation


@torch.no_grad()
def test_deepstack_features_are_added_between_compiled_parts(
    only_traced, tiny_checkpoint, tiny_images
):
    model = load(tiny_checkpoint("qwen3_vl"))
    of_batches = batches(model, tiny_images, 3)
    expected = [logprobs_of(model.net, model, batch) for batch in of_batches]
    compile_decoder(model.net)
    for batch, eager in zip(of_batches, expected, strict=True):
        torch.testing.assert_close(logprobs_of(model.net, model, batch), eager, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 4


def test_a_compiled_run_begins_at_ratio_1(
    only_traced, tiny_sft_run, tiny_data, tmp_path, monkeypatch
):
    speak(monkeypatch)
    source, run = tiny_sft_run("qwen2_5_vl"), tmp_path / "run"
    assert grpo(source, tiny_data, run, "--compile", "--max_steps", "2", "--save_steps", "1") == 0
    assert counters["stats"]["unique_graphs"] > 4
    first, second = train_log(run)
    assert (
        first["ratio/min"] == first["ratio/max"] == 1
        and first["kl"] == 0
        and second["ratio/max"] > 1
    )
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, run))
    assert before.keys() == after.keys() and any(
        not torch.equal(before[name], after[name]) for name in before
    )
    with pytest.raises(ConfigError, match="compile"):  # it would round differently from here on
        grpo(
            source,
            tiny_data,
            tmp_path / "resumed",
            "--resume_from_checkpoint",
            str(run / "checkpoint-1"),
            "--no_compile",
        )


def test_without_a_compiler_one_line_says_so(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled earlier
    model = load(tiny_checkpoint("qwen2_5_vl"))
    with pytest.raises(
        UsageError, match="^--compile: torch cannot compile on this machine: .*no-such-compiler"
    ):
        compile_decoder(model.net)
    assert "_compiled_call_impl" not in vars(model.net.model.language_model.layers[0].mlp)
