"""The keys that a DeepSpeed JSON may hold in this project, and the type of each.

    for section, kinds in SECTIONS.items(): ...

DeepSpeed 0.19.8 does not look at a top-level key that it does not know, nor at one in the sections
that it reads as plain dictionaries, nor at one that has no part in the file's ZeRO stage. Keys of
the other sections it checks when the engine is built, long after the recipe was read. So all are
listed here; a test compares the lists with the installed DeepSpeed. Left out is what has another
owner here, and what would break a promise: `zenflow` applies gradients later than asked,
`checkpoint.writer` may still be writing when a checkpoint is published, and without
`compute_grad_norm` the reported norm is none.
"""

from __future__ import annotations

Kinds = dict[str, type]

SECTIONS: dict[str, Kinds] = {
    "": {
        "train_batch_size": int,
        "train_micro_batch_size_per_gpu": int,
        "gradient_clipping": float,
        "bf16": dict,
        "fp16": dict,
        "data_types": dict,
        "communication_data_type": str,
        "optimizer": dict,
        "zero_optimization": dict,
        "aio": dict,
        "checkpoint": dict,
        "comms_logger": dict,
        "flops_profiler": dict,
        "timers": dict,
        "wall_clock_breakdown": bool,
        "memory_breakdown": bool,
        "steps_per_print": int,
        "dump_state": bool,
        "log_level": str,
        "disable_python_gc": bool,
    },
    "bf16": {
        "enabled": bool,
        "check_grad_overflow": bool,
        "immediate_grad_update": bool,
        "bf16_master_weights_and_grads": bool,
        "bf16_optimizer_states": bool,
    },
    "fp16": {"enabled": bool},
    "data_types": {"grad_accum_dtype": str},
    "optimizer": {"type": str, "params": dict},
    "optimizer.params": {
        "betas": list,
        "eps": float,
        "bias_correction": bool,
        "adam_w_mode": bool,
        "torch_adam": bool,
        "fused": bool,
        "fp32_optimizer_states": bool,
    },
    "zero_optimization": {
        "stage": int,
        "overlap_comm": bool,
        "contiguous_gradients": bool,
        "reduce_scatter": bool,
        "reduce_bucket_size": int,
        "offload_optimizer": dict,
        "allgather_partitions": bool,
        "allgather_bucket_size": int,
        "use_multi_rank_bucket_allreduce": bool,
        "round_robin_gradients": bool,
        "parameter_alignment": bool,
        "ignore_unused_parameters": bool,
        "sub_group_size": int,
        "stage3_prefetch_bucket_size": int,
        "stage3_param_persistence_threshold": int,
        "stage3_model_persistence_threshold": int,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
        "stage3_gather_16bit_weights_on_model_save": bool,
        "stage3_module_granularity_threshold": int,
        "stage3_use_all_reduce_for_fetch_params": bool,
        "stage3_allgather_sequential": bool,
        "offload_param": dict,
        "zero_hpz_partition_size": int,
        "zero_quantized_weights": bool,
        "zero_quantized_nontrainable_weights": bool,
        "zero_quantized_gradients": bool,
        "memory_efficient_linear": bool,
        "log_trace_cache_warnings": bool,
        "enable_sanity_checks": bool,
    },
    "zero_optimization.offload_optimizer": {
        "device": str,
        "nvme_path": str,
        "buffer_count": int,
        "pin_memory": bool,
        "pipeline_read": bool,
        "pipeline_write": bool,
        "fast_init": bool,
        "ratio": float,
        "super_offload": bool,
        "cpuadam_cores_perc": float,
    },
    "zero_optimization.offload_param": {
        "device": str,
        "nvme_path": str,
        "buffer_count": int,
        "buffer_size": int,
        "max_in_cpu": int,
        "pin_memory": bool,
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "checkpoint": {"tag_validation": str, "load_universal": bool, "checkpoint_serialization": bool},
    "comms_logger": {
        "enabled": bool,
        "prof_all": bool,
        "prof_ops": list,
        "verbose": bool,
        "debug": bool,
    },
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
    "timers": {"throughput": dict},
    "timers.throughput": {"enabled": bool, "synchronized": bool},
}
"""Keys by section, "" being the top level; an int will do for a float."""

STAGE_KEYS: dict[tuple[int, ...], tuple[str, ...]] = {
    (1, 2): (
        "allgather_partitions",
        "allgather_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "round_robin_gradients",
        "parameter_alignment",
        "ignore_unused_parameters",
    ),
    (3,): (
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "offload_param",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "memory_efficient_linear",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
    ),
}
"""Keys of `zero_optimization` that are read at some stages only, by these stages."""

OPTIMIZERS = ("adamw", "adam", "adagrad", "lion")
"""Optimizer types, in lower case, that ZeRO can divide among the ranks."""

DECOUPLED_OPTIMIZERS = ("adamw", "lion")
"""Those that decay the weights themselves, not by way of the gradient, whatever their keys say."""


def idle_zero_keys(stage: int) -> set[str]:
    """The keys of `zero_optimization` that are not read at a stage."""
    return {name for stages, names in STAGE_KEYS.items() if stage not in stages for name in names}


def optimizer_keys(optimizer: str, is_torch: bool) -> set[str]:
    """The keys of `optimizer.params` that an optimizer takes.

    optimizer  its type in lower case
    is_torch   whether `torch_adam` asks for torch's Adam; else it is DeepSpeed's, on the CPU where
               the optimizer is offloaded

    Source: DeepSpeed runtime/engine.py `_configure_basic_optimizer`, which passes them on.
    """
    if optimizer in ("adagrad", "lion"):
        return {"eps"} if optimizer == "adagrad" else {"betas"}
    own = {"fused"} if is_torch else {"bias_correction", "fp32_optimizer_states"}
    return {"betas", "eps", "torch_adam", *own} | (
        {"adam_w_mode"} if optimizer == "adam" else set()
    )
