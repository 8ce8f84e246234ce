"""Say what stands here for a flag of other trainers that is not here, in one sentence each.

The names are those of transformers' TrainingArguments, TRL, LLaMA-Factory, ms-swift and verl. A
test holds that none of them is a flag of a command here, and that every flag in a sentence is.
"""

from __future__ import annotations


def _each(names: str, sentence: str) -> dict[str, str]:
    """Give the same sentence to several names, separated by blanks."""
    return dict.fromkeys(names.split(), sentence)


_ONE_GPU = "a run is one process on one GPU or the CPU; start it with plain python"
_CHOOSE_DEVICE = (
    "the first CUDA device is used, else the CPU; choose a GPU with CUDA_VISIBLE_DEVICES, or the"
    " CPU with CUDA_VISIBLE_DEVICES=''"
)
_HUB = (
    "nothing is uploaded by a run; the finished folder has its card, README.md: `hf upload NAME"
    " FOLDER` takes it"
)
_LOGS = (
    "TensorBoard's files and metrics.jsonl are always written in the run's folder; for wandb:"
    " `wandb sync --sync-tensorboard FOLDER`"
)
_QUANTISED = (
    "the base is in bfloat16 (--bf16) or float32 (--no_bf16) and is not quantised; less memory:"
    " --max_visual_tokens, --per_device_train_batch_size, --gradient_checkpointing"
)
_TEMPLATE = "the chat template is the checkpoint's own; the instruction is --prompt"
_LORA = (
    "LoRA is on all projections of the language model's attention and MLP; its rank is --lora_r,"
    " its scaling --lora_alpha, its dropout --lora_dropout (run_sft.py)"
)
_FULL = "LoRA alone is trained, always; its rank is --lora_r"
_WHEN = (
    "run_sft.py evaluates and saves at every epoch, run_grpo.py every --eval_steps; further saves:"
    " --save_steps"
)
_SERVER = (
    "a vLLM server is started by itself, with its own flags (engine/README.md), and named by"
    " --vllm_server_base_url beside --use_vllm (run_grpo.py)"
)
_SHARED = "adapter and base are on one model, so there is no second reference to place or to sync"
_IMAGES = "the size of an image is bounded by --min_visual_tokens and --max_visual_tokens"
_STREAM = "the data file is read whole; choose rows with `python -m data.select`"

PEERS: dict[str, str] = {
    # ---- logs, hub, names ----
    **_each(
        "report_to logging_dir logging_strategy use_wandb wandb_project swanlab_project", _LOGS
    ),
    **_each("log_level disable_tqdm log_on_each_node", _LOGS),
    **_each("push_to_hub hub_model_id hub_token hub_strategy hub_private_repo use_hf", _HUB),
    **_each(
        "run_name experiment_name",
        "a run is named by its folder: --output_dir",
    ),
    **_each(
        "overwrite_output_dir overwrite_cache",
        "nothing is ever overwritten; name a new --output_dir",
    ),
    **_each(
        "log_completions num_completions_to_print log_unique_prompts",
        "every completion is in completions.jsonl of the run's folder",
    ),
    # ---- what runs ----
    **_each(
        "do_train do_eval do_predict do_sample",
        "the script is the task: run_sft.py and run_grpo.py train, `python -m eval.evaluate`"
        " evaluates",
    ),
    **_each(
        "stage train_type rlhf_type task",
        "the script is the stage: run_sft.py fine-tunes, run_grpo.py does GRPO",
    ),
    **_each(
        "trust_remote_code",
        "no code of a checkpoint is ever run; the families that are here need none",
    ),
    **_each(
        "ignore_data_skip restore_callback_states_from_checkpoint save_only_model"
        " resume_only_model",
        "checkpoints are whole and a resumed run goes on to the bit: --resume_from_checkpoint",
    ),
    # ---- devices ----
    **_each(
        "deepspeed fsdp fsdp_config accelerator_config nproc_per_node num_processes num_machines"
        " main_process_port master_port n_gpus_per_node nnodes tensor_parallel_size ddp_timeout"
        " ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers"
        " local_rank parallelism_config sequence_parallel_size",
        _ONE_GPU,
    ),
    **_each("use_cpu no_cuda device device_map gpu gpus cuda_devices", _CHOOSE_DEVICE),
    **_each(
        "dataloader_num_workers dataloader_pin_memory dataloader_drop_last"
        " dataloader_persistent_workers dataloader_prefetch_factor preprocessing_num_workers"
        " dataset_num_proc remove_unused_columns group_by_length",
        "an image is read once and its features are kept (--vision_cache_gb), so no workers load"
        " data",
    ),
    # ---- precision, memory ----
    **_each(
        "load_in_4bit load_in_8bit quantization_bit quant_method quant_bits bnb_4bit_quant_type"
        " bnb_4bit_compute_dtype use_bnb_nested_quant quantization_config",
        _QUANTISED,
    ),
    **_each(
        "fp16 fp16_opt_level half_precision_backend fp16_full_eval amp",
        "float16 needs loss scaling and is not here; --bf16 (the default), or --no_bf16 for"
        " float32",
    ),
    **_each("torch_dtype model_dtype pure_bf16", "--bf16 (the default), or --no_bf16 for float32"),
    **_each("bf16_full_eval", "an evaluation runs in the precision of the run: --bf16"),
    **_each(
        "attn_implementation flash_attn attn_impl use_flash_attention_2",
        "attention is torch's scaled_dot_product_attention, laid out by completion",
    ),
    **_each(
        "gradient_checkpointing_kwargs use_reentrant",
        "checkpointing is never reentrant; it is on or off by --gradient_checkpointing",
    ),
    **_each("torch_compile torch_compile_backend torch_compile_mode", "here it is --compile"),
    **_each(
        "use_liger_kernel use_liger_loss enable_liger_kernel use_unsloth",
        "the head never makes all logits at once, so there is no kernel to choose",
    ),
    **_each(
        "torch_empty_cache_steps empty_cache auto_find_batch_size",
        "the forecast of --dry_run says what fits; lower --per_device_train_batch_size",
    ),
    # ---- optimizer ----
    **_each(
        "optim optim_args optim_target_modules adafactor",
        "the optimizer is AdamW in float32, of the adapter alone; its settings are --learning_rate,"
        " --weight_decay and --max_grad_norm",
    ),
    **_each(
        "adam_beta1 adam_beta2 adam_epsilon",
        "AdamW has betas 0.9 and 0.999 and epsilon 1e-8 (engine/optim.py)",
    ),
    **_each(
        "warmup_steps",
        "give --warmup_ratio, a share of all steps",
    ),
    **_each(
        "lr_scheduler_kwargs",
        "--lr_scheduler_type has no options; the warm-up is --warmup_ratio",
    ),
    **_each("lr", "here it is --learning_rate"),
    **_each(
        "num_epochs epochs num_epoch total_epochs",
        "here it is --num_train_epochs, or --max_steps",
    ),
    **_each(
        "train_batch_size per_gpu_train_batch_size per_device_batch_size batch_size"
        " generation_batch_size",
        "here it is --per_device_train_batch_size, times --gradient_accumulation_steps an optimizer"
        " step",
    ),
    **_each("eval_batch_size per_gpu_eval_batch_size", "here it is --per_device_eval_batch_size"),
    **_each(
        "label_smoothing_factor neftune_noise_alpha loss_scale completion_only_loss"
        " assistant_only_loss train_on_inputs",
        "the loss is that of Eq. 1, over the answer's tokens and nothing else",
    ),
    **_each("data_seed full_determinism", "one --seed decides order, dropout and sampling"),
    # ---- adapter ----
    **_each(
        "lora_target_modules lora_target target_modules lora_modules_to_save modules_to_save"
        " lora_bias use_rslora use_dora lora_dtype init_weights loraplus_lr_ratio target_parameters"
        " additional_target",
        _LORA,
    ),
    **_each("lora_rank", "here it is --lora_r"),
    **_each(
        "use_peft use_lora finetuning_type tuner_type freeze_vision_tower freeze_vit freeze_llm"
        " freeze_aligner",
        _FULL,
    ),
    **_each(
        "adapter_name adapters adapter_path ref_adapters resume_adapter ckpt_dir",
        "here it is --adapter_name_or_path",
    ),
    **_each("model model_path model_name pretrained", "here it is --model_name_or_path"),
    **_each(
        "ref_model ref_model_mixup_alpha ref_model_sync_steps sync_ref_model reference_model",
        "the reference is the frozen adapter that the run starts from: --adapter_name_or_path"
        " (run_grpo.py); it never changes",
    ),
    # ---- data ----
    **_each(
        "dataset dataset_name dataset_dir dataset_config data_path train_files data_files"
        " dataset_train_split train_dataset",
        "here it is --train_file, a JSONL file (data/README.md)",
    ),
    **_each(
        "eval_dataset val_dataset val_files dataset_test_split eval_file test_file",
        "here it is --validation_file NAME=FILE, repeatable",
    ),
    **_each(
        "val_size split_dataset_ratio",
        "here it is --validation_split (run_sft.py), or --validation_file",
    ),
    **_each("max_samples_train max_train_samples streaming mix_strategy interleave_probs", _STREAM),
    **_each(
        "dataset_text_field text_field columns formatting",
        "the fields of a row are fixed: --train_file takes JSONL as in data/README.md",
    ),
    **_each(
        "max_seq_length max_length cutoff_len max_seq_len max_model_len",
        "no row is ever cut: images are bounded by --max_visual_tokens, sampled answers by"
        " --max_completion_length",
    ),
    **_each(
        "max_prompt_length truncation_strategy",
        "no prompt is ever cut: --max_visual_tokens bounds its image",
    ),
    **_each("max_new_tokens max_response_length max_tokens", "here it is --max_completion_length"),
    **_each(
        "packing padding_free eval_packing neat_packing packing_strategy pad_to_multiple_of",
        "rows are always packed without padding; --max_tokens_per_forward bounds a forward",
    ),
    **_each(
        "template chat_template chat_template_path system system_prompt default_system", _TEMPLATE
    ),
    **_each(
        "image_max_pixels image_min_pixels max_pixels min_pixels image_resolution",
        _IMAGES,
    ),
    **_each("image_dir image_folder media_dir images_dir", "here it is --image_root"),
    # ---- when ----
    **_each(
        "evaluation_strategy eval_strategy save_strategy eval_on_start eval_delay"
        " load_best_model greater_is_better",
        _WHEN,
    ),
    **_each(
        "early_stopping early_stopping_steps",
        "here it is --early_stopping_patience (run_sft.py), or --stop_when (run_grpo.py)",
    ),
    # ---- GRPO ----
    **_each(
        "epsilon",
        "TRL's one flag sets both sides of the clip, and here they differ (0.15 and 0.22): give"
        " --epsilon_low and --epsilon_high (run_grpo.py)",
    ),
    **_each("kl_coef kl_loss_coef init_kl_coef kl_coeff", "here it is --beta (run_grpo.py)"),
    **_each(
        "n num_return_sequences rollout_n group_size", "here it is --num_generations (run_grpo.py)"
    ),
    **_each(
        "reward_funcs reward_weights reward_model reward_processing_classes external_plugins"
        " custom_reward_function",
        "--reward (run_grpo.py) takes names, mixtures (hard+0.5*weighted) and yours (MODULE:NAME)",
    ),
    **_each(
        "vllm_gpu_memory_utilization vllm_server_host vllm_server_port vllm_group_port"
        " vllm_tensor_parallel_size vllm_max_model_len vllm_max_model_length"
        " vllm_enable_sleep_mode vllm_model_impl vllm_guided_decoding_regex"
        " vllm_structured_outputs_regex",
        _SERVER,
    ),
    **_each(
        "infer_backend use_transformers_paged cache_implementation",
        "the engine samples by itself, or on a vLLM server with --use_vllm (run_grpo.py)",
    ),
    **_each(
        "vllm_importance_sampling_cap",
        "here it is --vllm_importance_sampling_clip_max (run_grpo.py)",
    ),
    **_each(
        "vllm_importance_sampling_clip_min",
        "weights are cut above alone, at --vllm_importance_sampling_clip_max (run_grpo.py)",
    ),
    **_each("ds3_gather_for_generation ref_model_device", _SHARED),
    **_each("disable_dropout", "GRPO has no dropout; that of SFT is --lora_dropout (run_sft.py)"),
    **_each("shuffle_dataset", "prompts are always shuffled, by --seed"),
    **_each(
        "top_k min_p repetition_penalty generation_kwargs num_beams",
        "completions are drawn by --temperature and --top_p alone (run_grpo.py)",
    ),
    **_each(
        "delta importance_sampling_level use_bias_correction_kl"
        " top_entropy_quantile sapo_temperature_neg",
        "variants of the objective are patches of rl/objective.py (rl/README.md); the flags here"
        " are --epsilon_low, --epsilon_high, --beta and --loss_type (run_grpo.py)",
    ),
    **_each(
        "advantage_estimator adv_estimator",
        "advantages are the group's; what divides them is --scale_rewards (run_grpo.py)",
    ),
}

# Flags of which there are many are told by how they begin.
FAMILIES = {
    "ddp_": _ONE_GPU,
    "fsdp_": _ONE_GPU,
    "deepspeed_": _ONE_GPU,
    "hub_": _HUB,
    "vllm_": _SERVER,
    "bnb_": _QUANTISED,
    "dataloader_": PEERS["dataloader_num_workers"],
    "wandb_": _LOGS,
    "swanlab_": _LOGS,
    "torch_compile_": PEERS["torch_compile"],
}
# Values of other trainers for a choice that is here.
CHOICES = {
    "vllm_mode": (
        "colocate needs vLLM and the engine in one environment, and vLLM 0.32 wants transformers"
        " < 5.20, the engine >= 5.24"
    ),
    "vllm_importance_sampling_mode": (
        "sequence_mask is the patch tests/forks/mis.patch (rl/README.md)"
    ),
    "loss_type": "variants are patches of rl/objective.py (rl/README.md)",
    "lr_scheduler_type": "a course of one's own is a few lines in engine/optim.py",
}


def advice(flag: str) -> str | None:
    """Find the sentence for a flag that is not here, without its dashes, or None."""
    name = flag.lstrip("-").replace("-", "_").removeprefix("no_")
    family = next((FAMILIES[start] for start in FAMILIES if name.startswith(start)), None)
    return PEERS.get(name, family)
