"""Forecast how much memory a run takes, part by part, from its configuration alone.

    forecast(model_shape(config, ...), workload) -> Forecast: the largest moment of every phase

A run holds something all the time: base, adapters, AdamW's state (and the gradients, in the
update). For a while it holds more. Each phase has a few moments that can be its largest, and a
function below computes them. The phase takes its largest moment, and the run takes its largest
phase. Bytes are those of live tensors, and on a GPU those that CUDA graphs hold. A GPU needs more:
CUDA's context (about half a GB) and what the caching allocator cannot reuse. A process on a CPU
also needs Python's own memory.

The table follows from the code. It counts bytes for each token of the packed row
(engine/forward.py) and each decoder layer. h hidden, q = heads x head_dim, k = kv_heads x head_dim,
f intermediate, r rank of LoRA, e bytes of the base's dtype:

    RMS norm        backward needs its fp32 input: 4h for each norm of the hidden state (4 in Gemma
                    3, 2 in Qwen's models), and 4(q + k) where queries and keys have norms (Gemma 3,
                    Qwen3-VL)
    LoRA's A        backward needs its input: eh, once for q, k and v and once for gate and up. With
                    dropout each layer has an input of its own, and dropout's factors in fp32
    LoRA's B        backward needs its input: er for each of the seven projections
    attention       2e(q + k) for queries, output, keys and values, and 4 heads for the logsumexp
                    2ek N(S + R) in all: keys and values that each completion sees, its prompt's and
                    its own
                    masks once a forward, for all layers: bool, and in dtype e for all query heads
                    of a key-value head
    MLP             3ef for gate, act(gate) and up, ef for their product as LoRA's input
    checkpointing   eh instead of all of this: only the layer's input
    frozen weights  nothing

Without gradient only one layer's temporaries are alive. The head holds at most CHUNK_SIZE rows of
the vocabulary, twice with the entropy. While sampling, a prompt's keys and values are held once for
all its completions, and those of the completions are allocated at the start. On a GPU lengths are
rounded up there, and the buffers and graphs of a rollout are kept for the next, while the policy
learns (engine/graphs.py).

Shapes: B prompts of S tokens, N completions of R tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from engine.decoding import MASKS_AHEAD, DecodingSteps, steps_on
from engine.families import family_of
from engine.generate import READ_TOKENS, parts_of_group
from engine.logprobs import CHUNK_SIZE

FP32 = 4
GIB = 2**30
COPIES = "sampling weights"  # the part that `Workload.sampling_copies` adds
STACKED = "stacked adapter"  # of low precision, as decoding multiplies with it
GRAPHS = "CUDA graphs"  # the memory of one decoding's graphs
KEPT = "kept to sample"  # from one rollout to the next, and given up where memory runs out
# Of a sharded base a GPU holds, beside its shards: the layer that runs, the next one, which is on
# its way, and the buffer in which it arrives.
GATHERED_LAYERS = 3
Parts = dict[str, int]  # bytes by part
PHASES = ("rollout", "scoring", "update", "validation", "evaluation")
SAMPLING_PHASES = ("rollout", "evaluation")  # those that write completions


@dataclass(frozen=True)
class ModelShape:
    """Hold the sizes of a model that memory depends on.

    layer_norms: RMS norms over the hidden state in a decoder layer.
    head_norms: whether queries and keys have norms of their own.
    window: tokens that sliding layers see, None without such layers.
    fixed_images: whether all images have the same number of tokens.
    vision_hidden, vision_intermediate: sizes of the vision tower.
    patches_per_token: patches of the tower that make one visual token.
    pixel_values_per_patch: fp32 numbers in a patch.
    extra_features: tensors like an image's features that the decoder takes beside them.
    """

    base_parameters: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    layer_norms: int
    head_norms: bool
    window: int | None
    fixed_images: bool
    vision_hidden: int
    vision_intermediate: int
    patches_per_token: int
    pixel_values_per_patch: int
    extra_features: int = 0

    @property
    def query_width(self) -> int:
        """Return q, the width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Return k, the width of all key heads together."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Workload:
    """Hold what a run does with the model, at its largest (lengths in tokens, counts in rows).

    element_size: bytes of the base's dtype, 4 or 2.
    device: "cpu" or "cuda", which differ in copies of weights.
    adapters: 1 in SFT, 2 in GRPO.
    completion_length: of a training row.
    micro_batch: completions of a micro-batch, num_generations of each prompt.
    max_tokens_per_forward: cuts the micro-batch, None for no bound.
    eval_rows: rows decoded, or scored, together.
    eval_sampled: whether some evaluation draws its answers (`--vote_baseline`), where others are
        greedy.
    rollout_prompts: prompts of a rollout, 0 in SFT. rollout_prompts x num_generations rows are
        sampled together.
    sampling_copies: whether the sampler copies weights (engine/sampling_layers.py).
    sampling_rows: of them that are sampled together at most, None for all.
    shards: GPUs of a node that share the frozen weights of decoder layers (engine/shard.py), 1
        where each has the whole base. All rows are those of one GPU.
    """

    element_size: int
    device: str
    lora_r: int
    lora_dropout: float
    adapters: int
    gradient_checkpointing: bool
    prompt_length: int
    image_tokens: int
    completion_length: int
    max_completion_length: int
    micro_batch: int
    eval_rows: int
    rollout_prompts: int = 0
    num_generations: int = 1
    max_tokens_per_forward: int | None = None
    sampling_copies: bool = True
    sampling_rows: int | None = None
    shards: int = 1
    eval_sampled: bool = False

    @property
    def steps(self) -> DecodingSteps:
        """Return in what steps the shapes of decoding change."""
        return steps_on(torch.device(self.device))

    def sampled(self) -> tuple[int, int]:
        """Return (prompts, completions of each) of a rollout that are decoded together."""
        prompts, group, rows = self.rollout_prompts, self.num_generations, self.sampling_rows
        if rows is None:
            return prompts, group
        parts = parts_of_group(group, rows)
        return min(prompts * parts, max(1, rows * parts // group)), group // parts

    def packed(self, completions: int) -> Packed:
        """Return the largest forward of so many completions, cut as engine/collate.py does."""

        def row(n: int) -> Packed:
            return Packed(
                -(-n // self.num_generations), self.prompt_length, n, self.completion_length
            )

        bound = self.max_tokens_per_forward
        fitting = [n for n in range(2, completions + 1) if bound is None or row(n).tokens <= bound]
        return row(max(fitting, default=1))


@dataclass(frozen=True)
class Packed:
    """Describe the packed row of one forward: B prompts of S tokens, N completions of R."""

    prompts: int
    prompt_length: int
    completions: int
    completion_length: int

    @property
    def tokens(self) -> int:
        """Return the tokens of the packed row."""
        return self.prompts * self.prompt_length + self.completions * self.completion_length

    @property
    def keys(self) -> int:
        """Return the keys that completions see, summed over completions."""
        return self.completions * (self.prompt_length + self.completion_length)


@dataclass(frozen=True)
class Forecast:
    """Hold the forecast: for each phase of the run, the parts of its largest moment, in bytes."""

    phases: dict[str, Parts]

    @property
    def peak_phase(self) -> str:
        """Return the name of the largest phase."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Return the bytes of the largest phase."""
        return sum(self.phases[self.peak_phase].values())


def model_shape(config: PretrainedConfig, base_parameters: int) -> ModelShape:
    """Read a model's sizes from a configuration of any family.

    base_parameters: number of the base's parameters, tied ones counted once.
    """
    family = family_of(config.model_type)
    text, vision = config.get_text_config(), config.vision_config
    patches, values = family.patches(config)
    return ModelShape(
        base_parameters,
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        text.intermediate_size,
        text.vocab_size,
        family.layer_norms,
        family.head_norms,
        text.sliding_window if family.sliding_layers else None,
        family.fixed_images,
        vision.hidden_size,
        vision.intermediate_size,
        patches,
        values,
        family.extra_features(config),
    )


def lora_parameters(shape: ModelShape, r: int) -> int:
    """Count the parameters of A [r,in] and B [out,r] on the seven projections of every layer."""
    h, q, k, f = shape.hidden, shape.query_width, shape.key_width, shape.intermediate
    return shape.layers * r * ((h + q) + 2 * (h + k) + (q + h) + 2 * (h + f) + (f + h))


def layer_parameters(shape: ModelShape) -> int:
    """Count the parameters of a decoder layer's seven projections, which are nearly all it has."""
    h, q, k, f = shape.hidden, shape.query_width, shape.key_width, shape.intermediate
    return h * (2 * q + 2 * k + 3 * f)


# ---- held all the time ---------------------------------------------------------------------------
def static_parts(shape: ModelShape, work: Workload) -> Parts:
    """Compute what is held all the time: base, adapters and AdamW's two moments.

    The base is in its own dtype, its decoder layers divided by `shards`. Adapters and moments are
    fp32, and only the policy has moments.
    """
    adapter = FP32 * lora_parameters(shape, work.lora_r)
    layers = shape.layers * layer_parameters(shape)
    base = shape.base_parameters - layers + -(-layers // work.shards)
    return {
        "base": base * work.element_size,
        "adapters": work.adapters * adapter,
        "AdamW": 2 * adapter,
    }


def gathered_parts(shape: ModelShape, work: Workload, *, sampling: bool) -> Parts:
    """Compute what a GPU holds of other GPUs' shards: a few layers, while sampling all of them."""
    if work.shards == 1:
        return {}
    layers = shape.layers if sampling else min(shape.layers, GATHERED_LAYERS)
    return {"gathered": layers * layer_parameters(shape) * work.element_size}


# ---- one decoder layer ---------------------------------------------------------------------------
def lora_inputs(work: Workload, width: int, projections: int = 1) -> int:
    """Compute the bytes that LoRA's A keeps of one token's input for the backward pass.

    width: of the input.
    projections: how many A matrices share it.

    Dropout makes an input of its own for each A and keeps its factors, which are fp32.
    """
    if work.lora_dropout:
        return projections * width * (work.element_size + FP32)
    return width * work.element_size


def kept_by_layer(shape: ModelShape, work: Workload, row: Packed) -> int:
    """Compute the bytes that one layer keeps for its backward pass."""
    e, q = work.element_size, shape.query_width
    norms = FP32 * (
        shape.layer_norms * shape.hidden + (q + shape.key_width if shape.head_norms else 0)
    )
    attention = 2 * e * (q + shape.key_width) + FP32 * shape.heads  # q, output, k, v and logsumexp
    mlp = 3 * e * shape.intermediate
    inputs = (
        lora_inputs(work, shape.hidden, 3)
        + lora_inputs(work, q)
        + lora_inputs(work, shape.hidden, 2)
        + lora_inputs(work, shape.intermediate)
    )
    each = norms + attention + mlp + inputs + 7 * e * work.lora_r
    return row.tokens * each + row.keys * 2 * e * shape.key_width


def layer_temporaries(shape: ModelShape, work: Workload, tokens: int, keys: int) -> int:
    """Compute the bytes at the largest moment inside a layer that keeps nothing.

    That is the MLP, or the attention, which holds q in both layouts, k, v, its output, and `keys`
    keys and values laid out anew.
    """
    e, h = work.element_size, shape.hidden
    # The layer's input, residual and norm, then gate, up and act(gate).
    mlp = 3 * e * h + 3 * e * shape.intermediate
    attention = 2 * e * h + e * (3 * shape.query_width + 2 * shape.key_width)
    return max(tokens * mlp, tokens * attention + keys * 2 * e * shape.key_width)


def backward_temporaries(shape: ModelShape, work: Workload) -> int:
    """Compute the bytes a token of gradients alive at once in the backward pass of one layer.

    The MLP is the widest place: two gradients of down's input, and two of the layer's output. What
    LoRA's A kept there is free by then.
    """
    return 2 * work.element_size * (shape.intermediate + shape.hidden)


# ---- vocabulary ----------------------------------------------------------------------------------
def head_chunk(
    shape: ModelShape, work: Workload, scored: int, *, gradient: bool, entropy: bool
) -> int:
    """Compute the bytes of the head for `scored` tokens, see engine/logprobs.py.

    In [chunk,V], fp32 logits become their exponentials and then a direction in place. The product
    in the base's dtype stands beside them at first, and the direction in that dtype at the end.
    With the entropy the exponentials stand beside the logits. Soft-capping, which no published
    model has, is left out.
    """
    e = work.element_size
    copies = max(FP32 + (e if e != FP32 else 0), 2 * FP32 if entropy else 0)
    # The hidden states, their gradient and the result.
    states = scored * shape.hidden * e * (3 if gradient else 1)
    return min(scored, CHUNK_SIZE) * shape.vocabulary * copies + states


def sampler_head(shape: ModelShape, rows: int, *, greedy: bool) -> int:
    """Compute the bytes of one sampled token for all rows, see engine/nucleus.py.

    Greedy decoding holds [rows,V] logits and log-probabilities. Sampling then holds log-
    probabilities, and where whole rows are searched their probabilities, a mask, what is kept, and
    the border's count.
    """
    return rows * shape.vocabulary * FP32 * (2 if greedy else 5)


# ---- inputs --------------------------------------------------------------------------------------
def inputs(shape: ModelShape, work: Workload, tokens: int, mask_elements: int) -> int:
    """Compute the bytes of ids, embeddings (they hold the images' features) and bool masks."""
    return tokens * (work.element_size * shape.hidden + 24) + mask_elements


def extra_inputs(shape: ModelShape, work: Workload, tokens: int) -> int:
    """Compute the bytes of `extra_features` of so many tokens.

    While the decoder runs they are laid out for all tokens of the packed row, text or image. The
    backward pass needs none of it.
    """
    return tokens * shape.extra_features * work.element_size * shape.hidden


def packed_inputs(shape: ModelShape, work: Workload, row: Packed) -> int:
    """Compute the bytes of a packed row's inputs, with its masks as bool and as numbers to add.

    The numbers are repeated for every query head of a key head. Prompts that are alike share one
    mask, and so do their completions. Sliding layers have masks of their own where the window is
    shorter than a row.
    """
    alike = row.prompts == 1 or shape.fixed_images
    length = row.prompt_length + row.completion_length
    prompts, completions = (1, min(row.completions, 1)) if alike else (row.prompts, row.completions)
    masks = (
        prompts * row.prompt_length**2 + completions * row.completion_length * length
    ) * mask_kinds(shape, length)
    return (
        inputs(shape, work, row.tokens, masks)
        + masks * (shape.heads // shape.kv_heads) * work.element_size
    )


def mask_kinds(shape: ModelShape, length: int) -> int:
    """Count the kinds of layers whose masks differ for rows of this length."""
    return 1 if shape.window is None or shape.window >= length else 2


def vision_tower(shape: ModelShape, work: Workload) -> int:
    """Compute the bytes of one image without gradient: its pixels and the widest place of a layer.

    That is the layer's MLP or, with rotary positions in fp32, its attention.
    """
    e, h = work.element_size, shape.vision_hidden
    widest = max(e * (2 * h + 3 * shape.vision_intermediate), e * 6 * h + 6 * FP32 * h)
    return (
        work.image_tokens * shape.patches_per_token * (widest + shape.pixel_values_per_patch * FP32)
    )


def kv_cache(shape: ModelShape, work: Workload, rows: int, length: int) -> int:
    """Compute the bytes of the KV cache of `rows` rows of `length` tokens."""
    return 2 * shape.layers * shape.key_width * work.element_size * rows * length


# ---- phases: their moments -----------------------------------------------------------------------
def update_moments(shape: ModelShape, work: Workload) -> Iterator[Parts]:
    """Yield the moments of one micro-batch with gradient.

    They are the head over all that the layers keep, and the backward pass of one layer. In SFT the
    vision tower runs before them. After the last micro-batch comes the optimizer step, which has
    copies of the adapter and of AdamW's two moments.
    """
    row, e, h = work.packed(work.micro_batch), work.element_size, shape.hidden
    adapter = FP32 * lora_parameters(shape, work.lora_r)
    gradients = {"gradients": adapter}
    if not work.rollout_prompts:
        yield gradients | {"activations": vision_tower(shape, work)}
    seen = extra_inputs(shape, work, row.prompts * work.image_tokens)
    given = gradients | {"inputs": packed_inputs(shape, work, row) + seen}
    layer = kept_by_layer(shape, work, row)
    # Checkpointing keeps each layer's input. The first layer's is counted among the inputs.
    kept = (
        row.tokens * (shape.layers - 1) * e * h
        if work.gradient_checkpointing
        else shape.layers * layer
    )
    kept += row.tokens * FP32 * h  # the last norm's input
    scored = row.completions * row.completion_length
    yield given | {
        "activations": kept,
        "logits": head_chunk(shape, work, scored, gradient=True, entropy=work.adapters > 1),
    }
    recomputed = layer if work.gradient_checkpointing else 0
    yield given | {
        "activations": kept + recomputed + row.tokens * backward_temporaries(shape, work),
        "logits": scored * h * e,
    }
    yield gradients | {"copies": adapter * 3}


def scoring_moments(shape: ModelShape, work: Workload, row: Packed) -> Iterator[Parts]:
    """Yield the moments of a teacher-forced forward without gradient."""
    given = {"inputs": packed_inputs(shape, work, row)}
    yield {
        "inputs": given["inputs"] + extra_inputs(shape, work, row.tokens),
        "activations": layer_temporaries(shape, work, row.tokens, row.keys),
    }
    yield given | {
        "activations": row.tokens * work.element_size * shape.hidden,
        "logits": head_chunk(
            shape, work, row.completions * row.completion_length, gradient=False, entropy=False
        ),
    }


def sampling_weights(shape: ModelShape, work: Workload) -> int:
    """Compute the bytes of the weights that engine/sampling_layers.py copies, in fp32 only.

    They are the seven projections with the adapter, on a CPU the head as well.
    """
    head = shape.vocabulary * shape.hidden if work.device == "cpu" else 0
    return (
        (shape.layers * layer_parameters(shape) + head) * FP32
        if work.element_size == FP32 and work.sampling_copies
        else 0
    )


def stacked_adapter(shape: ModelShape, work: Workload) -> int:
    """Compute the bytes of A and B as engine/token_layers.py stacks them, in low precision only.

    B of layers that share their input is block-diagonal: [3r,q+2k] of q, k and v, [2r,2f] of gate
    and up.
    """
    h, q, k, f = shape.hidden, shape.query_width, shape.key_width, shape.intermediate
    each = 3 * (h + q + 2 * k) + (q + h) + 2 * (h + 2 * f) + (f + h)
    is_low = work.element_size < FP32
    return shape.layers * work.lora_r * each * work.element_size if is_low else 0


def decoding_moments(
    shape: ModelShape, work: Workload, prompts: int, generations: int, *, greedy: bool
) -> Iterator[Parts]:
    """Yield the moments of the sampler: the vision tower, then those of `writing_moments`."""
    yield {"activations": vision_tower(shape, work)}
    for moment in writing_moments(shape, work, prompts, generations, greedy=greedy):
        yield moment | {
            COPIES: sampling_weights(shape, work),
            STACKED: stacked_adapter(shape, work),
        }


def writing_moments(
    shape: ModelShape, work: Workload, prompts: int, generations: int, *, greedy: bool
) -> Iterator[Parts]:
    """Yield the moments of prefill and decoding.

    They are the last prompts that are read together, with the whole cache there, and the last
    token, with no row finished before, in its attention and in its head.
    """
    e, rows = work.element_size, prompts * generations
    together = Packed(
        min(prompts, max(1, READ_TOKENS // work.prompt_length)), work.prompt_length, 0, 0
    )
    buffers = decoding_buffers(shape, work, prompts, generations)
    features = prompts * work.image_tokens * (1 + shape.extra_features) * shape.hidden * e
    held, cache = buffers["inputs"] + features, {"KV cache": buffers["KV cache"]}
    attention, head = token_temporaries(shape, work, rows, greedy=greedy)
    # Graphs hold their memory also while work runs beside them as it is.
    graphs = {GRAPHS: max(attention, head)} if work.steps.graphs else {}
    yield {
        "inputs": held
        + packed_inputs(shape, work, together)
        + extra_inputs(shape, work, together.tokens),
        **cache,
        "activations": layer_temporaries(shape, work, together.tokens, 0),
        **graphs,
    }
    yield {"inputs": held, **cache, "activations": attention, **graphs}
    yield {"inputs": held, **cache, "logits": head, **graphs}


def decoding_buffers(shape: ModelShape, work: Workload, prompts: int, generations: int) -> Parts:
    """Compute what engine/decoding.py holds all the time: cache, masks and what is written."""
    rows = prompts * generations
    prompt = work.steps.rounded(work.prompt_length)
    completion = work.steps.rounded(work.max_completion_length)
    length = prompt + completion
    masks = MASKS_AHEAD * rows * length * mask_kinds(shape, length) * work.element_size
    # 20 bytes: an id (int64), a log-probability, a mass and a uniform number (fp32).
    return {
        "inputs": rows * completion * 20 + masks,
        "KV cache": kv_cache(shape, work, prompts, prompt)
        + kv_cache(shape, work, rows, completion),
    }


def token_temporaries(
    shape: ModelShape, work: Workload, rows: int, *, greedy: bool
) -> tuple[int, int]:
    """Compute the bytes of the last token of all rows, in a layer's attention and in the head."""
    e = work.element_size
    length = sum(map(work.steps.rounded, (work.prompt_length, work.max_completion_length)))
    # Scores of prompts and of completions, both together, and their softmax.
    scores = rows * shape.heads * length * (2 * e + max(e, FP32))
    attention = scores + rows * layer_temporaries(shape, work, 1, 0)
    return attention, sampler_head(shape, rows, greedy=greedy)


def kept_parts(shape: ModelShape, work: Workload) -> Parts:
    """Compute what a rollout keeps for the next one: its buffers, its graphs' memory and what they
    read of the adapter.

    Graphs share one pool, as large as the largest of them needs. Nothing is kept on a CPU, in SFT
    or with a sharded base.
    """
    if not work.rollout_prompts or not work.steps.graphs or work.shards > 1:
        return {}
    prompts, generations = work.sampled()
    buffers = decoding_buffers(shape, work, prompts, generations)
    pool = max(token_temporaries(shape, work, prompts * generations, greedy=False))
    return {KEPT: sum(buffers.values()) + pool + stacked_adapter(shape, work)}


def forecast(shape: ModelShape, work: Workload) -> Forecast:
    """Forecast the largest moment of every phase of a run, part by part."""
    static, kept = static_parts(shape, work), kept_parts(shape, work)
    moments: dict[str, Iterable[Parts]] = {
        "update": update_moments(shape, work),
        "evaluation": decoding_moments(
            shape, work, work.eval_rows, 1, greedy=not work.eval_sampled
        ),
    }
    if work.rollout_prompts:
        # The images of the next rollout are seen while the last one's buffers are there.
        moments["rollout"] = [
            {"activations": vision_tower(shape, work)} | kept,
            *decoding_moments(shape, work, *work.sampled(), greedy=False),
        ]
        moments["scoring"] = scoring_moments(shape, work, work.packed(work.micro_batch))
    else:
        moments["validation"] = scoring_moments(shape, work, work.packed(work.eval_rows))
    return Forecast(
        {
            phase: static
            | gathered_parts(shape, work, sampling=phase in SAMPLING_PHASES)
            | (kept if phase in ("scoring", "update") else {})
            | max(moments[phase], key=lambda parts: sum(parts.values()))
            for phase in PHASES
            if phase in moments
        }
    )


def decoding_forecast(shape: ModelShape, work: Workload, *, greedy: bool) -> Forecast:
    """Forecast an evaluation of a model alone: eval_rows in all, num_generations of each prompt."""
    static = static_parts(shape, work)
    del static["AdamW"]
    prompts = max(1, work.eval_rows // work.num_generations)
    moments = decoding_moments(shape, work, prompts, work.num_generations, greedy=greedy)
    largest = max(moments, key=lambda parts: sum(parts.values()))
    return Forecast({"evaluation": static | largest})
