"""How much memory a run will take, by part: arithmetic on a configuration, before anything is loaded or run.

    forecast(model_shape(config, ...), workload) -> Forecast: for every phase of a run its largest moment, part by part

A run holds something all the time (base, adapters, AdamW's state; in the update gradients as well) and more for a while. Each
phase has a few moments that can be its largest, one function each below; the phase takes the largest moment, the run the
largest phase. Bytes are those of live tensors. A GPU needs some more: CUDA's context (about half a GB) and what the caching
allocator cannot reuse; a process on a CPU needs Python's own memory.

What follows from the code, per token of a padded row and decoder layer, for the plain forward of engine/forward.py (h hidden,
q = heads x head_dim, k = kv_heads x head_dim, f intermediate, e bytes of the base's dtype, S tokens of the row):

    RMS norm        backward needs its fp32 input                                  4h; 4h, 4h, 4h and 4(q + k) more in Gemma 3
    LoRA's A        backward needs its fp32 input, which q, k, v (and gate, up)    4h for a bf16 base: three copies, one each;
                    share in an fp32 base without dropout                          with dropout: one each, and the mask
    attention       q, k and v repeated to all heads, output: e each               4eq
                    the bool mask becomes one of dtype e in every layer            eS
    MLP             gate, act(gate), up: e each; their product as LoRA's input     3ef + 4f
    checkpointing   only the layer's input, e                                      eh
    frozen weights  need nothing of the input: `base_layer(x)` keeps no x

Without gradient only one layer's temporaries are alive. The head never holds more than CHUNK_SIZE rows of the vocabulary, but
several copies of those. The cache grows by torch.cat, layer by layer: beside the whole cache one layer's keys exist twice.

Shapes: B rows, S tokens of a padded row, M scored tokens, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from engine.families import family_of
from engine.logprobs import CHUNK_SIZE

FP32 = 4
GIB = 2**30
Parts = dict[str, int]  # bytes by part


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that memory depends on. layer_norms, head_norms: RMS norms a layer over the hidden state, and
    whether queries and keys have theirs; mask_kinds: different attention masks. vision_*: the tower's; patches_per_token of
    pixel_values_per_patch fp32 numbers each make one visual token.
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
    mask_kinds: int
    vision_hidden: int
    vision_intermediate: int
    patches_per_token: int
    pixel_values_per_patch: int

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Workload:
    """What a run does with the model, at its largest. Lengths in tokens, counts in rows.

    element_size: bytes of the base's dtype, 4 or 2. adapters: 1 in SFT, 2 in GRPO. completion_length: of a training row.
    micro_batch: rows of one training forward over micro_batch_images distinct images. encoded_images: images that the loop
    holds in the host's memory. eval_rows: rows decoded together. rollout_prompts x num_generations rows are sampled together
    (0: SFT). device "cpu" or "cuda": they differ in dropout's mask and in sorting.
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
    micro_batch_images: int
    encoded_images: int
    eval_rows: int
    rollout_prompts: int = 0
    num_generations: int = 1

    @property
    def row_length(self) -> int:
        return self.prompt_length + self.completion_length


@dataclass(frozen=True)
class Forecast:
    """phases: for every phase of the run the parts of its largest moment, in bytes."""

    phases: dict[str, Parts]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        return sum(self.phases[self.peak_phase].values())


def model_shape(config: PretrainedConfig, base_parameters: int) -> ModelShape:
    """The sizes in a configuration of either family. base_parameters: the base's, tied ones once."""
    family, text, vision = family_of(config.model_type), config.get_text_config(), config.vision_config
    patches, values = family.patches(config)
    return ModelShape(
        base_parameters, text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads,
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads, text.intermediate_size, text.vocab_size,
        family.layer_norms, family.head_norms, len(family.mask_kinds), vision.hidden_size, vision.intermediate_size, patches, values)


def lora_parameters(model: ModelShape, r: int) -> int:
    """A [r,in] and B [out,r] of the seven projections of every layer."""
    h, q, k, f = model.hidden, model.query_width, model.key_width, model.intermediate
    return model.layers * r * ((h + q) + 2 * (h + k) + (q + h) + 2 * (h + f) + (f + h))


# ---- held all the time ----------------------------------------------------------------------------------------------
def static_parts(model: ModelShape, work: Workload) -> Parts:
    """Base in its own dtype; adapters and AdamW's two moments in fp32 (the moments of the policy alone)."""
    adapter = FP32 * lora_parameters(model, work.lora_r)
    return {"base": model.base_parameters * work.element_size, "adapters": work.adapters * adapter, "AdamW": 2 * adapter}


# ---- one decoder layer ----------------------------------------------------------------------------------------------
def lora_inputs(work: Workload, width: int, projections: int = 1) -> int:
    """What the backward pass of `projections` LoRA matrices A keeps of one token of an input that they share.

    Dropout makes an input of its own for each and keeps its mask: bool on a GPU, of the input's fp32 on a CPU.
    """
    if work.lora_dropout:
        return projections * width * (FP32 + (1 if work.device == "cuda" else FP32))
    return width * FP32 * (1 if work.element_size == FP32 else projections)


def kept_by_layer(model: ModelShape, work: Workload, length: int) -> int:
    """Bytes a token that one layer keeps for its backward pass, in rows of `length`."""
    e, q = work.element_size, model.query_width
    norms = FP32 * (model.layer_norms * model.hidden + (q + model.key_width if model.head_norms else 0))
    attention = 4 * e * q + e * length + FP32 * model.heads  # q, k, v, output; mask; logsumexp
    mlp = 3 * e * model.intermediate
    output_is_input = e == FP32 and not work.lora_dropout  # the attention's output is what o_proj's A keeps
    inputs = (lora_inputs(work, model.hidden, 3) + (0 if output_is_input else lora_inputs(work, q))
              + lora_inputs(work, model.hidden, 2) + lora_inputs(work, model.intermediate))
    return norms + attention + mlp + inputs + 7 * FP32 * work.lora_r


def layer_temporaries(model: ModelShape, work: Workload, length: int) -> int:
    """Bytes a token at the largest moment inside a layer that keeps nothing: the MLP's up projection with its LoRA update, or
    the attention's with all heads and the mask in the base's dtype.
    """
    e, h = work.element_size, model.hidden
    lora_input = 0 if e == FP32 else FP32 * h
    mixed = FP32 if work.device == "cpu" and e != FP32 else 0  # bf16 + fp32 on a CPU: the bf16 operand is copied first
    # the layer's input, residual and norm; act(gate), the base's output, LoRA's update twice
    mlp = 3 * e * h + lora_input + (2 * e + 2 * FP32 + mixed) * model.intermediate
    attention = 2 * e * h + e * (4 * model.query_width + 2 * model.key_width) + e * length
    return max(mlp, attention)


def backward_temporaries(model: ModelShape, work: Workload) -> int:
    """Bytes a token of gradients alive at once in the backward pass of one layer's MLP, the widest place: of down's input
    through LoRA (fp32) and through the base, and the same of the layer's output. What LoRA's A kept there is free by then.
    """
    return (work.element_size + FP32) * (model.intermediate + model.hidden)


# ---- vocabulary -----------------------------------------------------------------------------------------------------
def head_chunk(model: ModelShape, work: Workload, scored: int, *, gradient: bool, entropy: bool) -> int:
    """Bytes of the head for `scored` tokens, see engine/logprobs.py. Of [chunk,V] in fp32: logits, and two more where a value
    is computed from them (the division and index_fill; or probabilities and their intermediate), a fourth with entropy. From
    the second chunk on the first one's logits and probabilities are still bound while the next are made.
    """
    e = work.element_size
    logits = 2 * FP32 + (e if e != FP32 else 0)
    inside = (4 * FP32 if entropy else 3 * FP32) if gradient or entropy else 2 * FP32
    before = (2 * FP32 if gradient or entropy else FP32) if scored > CHUNK_SIZE else 0
    copies = max(logits + before, inside + (FP32 if before and gradient else 0))
    states = scored * model.hidden * e * (3 if gradient else 1)  # hidden states, their gradient, the result
    return min(scored, CHUNK_SIZE) * model.vocabulary * copies + states


def sampler_head(model: ModelShape, work: Workload, rows: int, *, greedy: bool) -> int:
    """Bytes of one sampled token for all rows: [rows,V] of log-probabilities, sorted values and ids (int64), probabilities,
    the mass before each and what is kept of them; a GPU's sort needs both double. Greedy: logits and log-probabilities.
    """
    e = work.element_size
    logits = FP32 + 2 * FP32 + (e if e != FP32 else 0)  # the step before's, the division and index_fill
    sort = FP32 + 2 * (FP32 + 8) if work.device == "cuda" else FP32 + FP32 + 8
    nucleus = FP32 + (FP32 + 8) + 3 * FP32 + 2
    return rows * model.vocabulary * (logits if greedy else max(logits, sort, nucleus))


# ---- inputs ---------------------------------------------------------------------------------------------------------
def pixels(model: ModelShape, work: Workload, images: int) -> int:
    return images * work.image_tokens * model.patches_per_token * model.pixel_values_per_patch * FP32


def inputs(model: ModelShape, work: Workload, rows: int, length: int, images: int) -> int:
    """Pixels, masks (bool), ids, embeddings of a batch, and the images that the loop holds beside it on a CPU."""
    held = images if work.device == "cuda" else max(images, work.encoded_images)
    masks = rows * length * length * model.mask_kinds
    return pixels(model, work, held) + masks + rows * length * (work.element_size * model.hidden + 24)


def vision_tower(model: ModelShape, work: Workload, images: int) -> int:
    """One image at a time without gradient: in a layer's MLP or, with rotary positions in fp32, its attention; and the
    features of the images so far.
    """
    e, h = work.element_size, model.vision_hidden
    widest = max(e * (2 * h + 3 * model.vision_intermediate), e * 6 * h + 6 * FP32 * h)
    return work.image_tokens * (model.patches_per_token * widest + images * model.hidden * e)


def kv_cache(model: ModelShape, work: Workload, rows: int, length: int) -> int:
    return 2 * model.layers * model.key_width * work.element_size * rows * length


# ---- phases: their moments ------------------------------------------------------------------------------------------
def update_moments(model: ModelShape, work: Workload) -> Iterator[Parts]:
    """One micro-batch with gradient: the tower, the head over all that the layers keep, the backward pass of one layer."""
    rows, length, e = work.micro_batch, work.row_length, work.element_size
    tokens, h = rows * length, model.hidden
    given = {"gradients": FP32 * lora_parameters(model, work.lora_r), "inputs": inputs(model, work, rows, length, work.micro_batch_images)}
    yield given | {"activations": vision_tower(model, work, work.micro_batch_images)}
    layer = tokens * kept_by_layer(model, work, length)
    kept = tokens * model.layers * e * h if work.gradient_checkpointing else model.layers * layer
    kept += tokens * FP32 * h  # the last norm's input
    scored = rows * work.completion_length
    yield given | {"activations": kept, "logits": head_chunk(model, work, scored, gradient=True, entropy=work.adapters > 1)}
    recomputed = layer if work.gradient_checkpointing else 0
    yield given | {"activations": kept + recomputed + tokens * backward_temporaries(model, work),
                   "logits": scored * h * e}


def scoring_moments(model: ModelShape, work: Workload, rows: int, images: int) -> Iterator[Parts]:
    """A teacher-forced forward without gradient."""
    length = work.row_length
    given = {"inputs": inputs(model, work, rows, length, images)}
    yield given | {"activations": vision_tower(model, work, images)}
    yield given | {"activations": rows * length * layer_temporaries(model, work, length)}
    yield given | {"activations": rows * length * work.element_size * model.hidden,
                   "logits": head_chunk(model, work, rows * work.completion_length, gradient=False, entropy=False)}


def decoding_moments(model: ModelShape, work: Workload, prompts: int, generations: int, *, greedy: bool) -> Iterator[Parts]:
    """The sampler: prompts read once, all together; then the last step, with no row finished before."""
    e, prompt, rows = work.element_size, work.prompt_length, prompts * generations
    given = {"inputs": inputs(model, work, prompts, prompt, prompts)}
    yield given | {"activations": vision_tower(model, work, prompts)}
    yield given | {"activations": prompts * prompt * layer_temporaries(model, work, prompt),
                   "KV cache": kv_cache(model, work, prompts, prompt)}
    length = prompt + work.max_completion_length
    cache = kv_cache(model, work, rows, length)
    growing = cache // (2 * model.layers)  # one layer's keys, old and new
    held = pixels(model, work, prompts if work.device == "cuda" else max(prompts, work.encoded_images))
    yield {"inputs": held + rows * length * 17, "KV cache": cache + growing, "logits": FP32 * rows * model.vocabulary}
    yield {"inputs": held + rows * length * 17, "KV cache": cache, "logits": sampler_head(model, work, rows, greedy=greedy)}


def forecast(model: ModelShape, work: Workload) -> Forecast:
    """The largest moment of every phase of a run, by part."""
    static = static_parts(model, work)
    moments = {"update": update_moments(model, work),
               "evaluation": decoding_moments(model, work, work.eval_rows, 1, greedy=True)}
    if work.rollout_prompts:
        moments["rollout"] = decoding_moments(model, work, work.rollout_prompts, work.num_generations, greedy=False)
        moments["scoring"] = scoring_moments(model, work, work.micro_batch, work.micro_batch_images)
    else:
        moments["validation"] = scoring_moments(model, work, work.eval_rows, work.eval_rows)
    order = ("rollout", "scoring", "update", "validation", "evaluation")
    return Forecast({phase: static | max(moments[phase], key=lambda parts: sum(parts.values())) for phase in order if phase in moments})
