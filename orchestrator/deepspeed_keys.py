"""What ``train.deepspeed`` may hold: DeepSpeed's own settings, but for those that Headway sets itself. Pure.

The names are those of DeepSpeed 0.19.8. A test compares them with what the installed one reads of its config.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

_SPLIT = "a model is divided by train.zero alone"
_MODEL = "it would change the model beside what a checkpoint holds"
_ORDER = "the order of samples follows from train.seed"
_CHECKPOINTS = "checkpoints are made as checkpoint.* says"
_PARTITIONS = "checkpoints know no partitions but those of train.zero"

_OWNED = {
    "train_batch_size": "it is set by train.global_batch_size",
    "train_micro_batch_size_per_gpu": "it is set by train.micro_batch_size",
    "gradient_accumulation_steps": "it follows from train.global_batch_size, micro_batch_size and the workers",
    "managed_gradient_accumulation": "it follows from train.global_batch_size, micro_batch_size and the workers",
    "gradient_allreduce_op": "the loss is divided by the targets of all workers, which needs the average",
    "optimizer": "it is set by train.optimizer",
    "zero_allow_untested_optimizer": "the optimizer is set by train.optimizer",
    "zero_force_ds_cpu_optimizer": "the optimizer is set by train.optimizer and train.zero.offload",
    "scheduler": "it is set by train.optimizer.schedule",
    "gradient_clipping": "it is set by train.max_grad_norm",
    "bf16": "it is set by train.precision",
    "fp16": "it is set by train.precision",
    "amp": "it is set by train.precision",
    "torch_autocast": "it is set by train.precision",
    "activation_checkpointing": "it is set by train.activation_checkpointing",
    "steps_per_print": "every step is among the run's events",
    "checkpoint": _CHECKPOINTS,
    "nebula": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "elasticity": "the number of workers is set by resources.workers",
    "autotuning": "it would start runs of its own",
    "pipeline": _SPLIT,
    "tensor_parallel": _SPLIT,
    "expert_parallel": _SPLIT,
    "use_data_before_expert_parallelism": _SPLIT,
    "hybrid_engine": _MODEL,
    "compression_training": _MODEL,
    "quantize_training": _MODEL,
    "weight_quantization": _MODEL,
    "progressive_layer_drop": _MODEL,
    "eigenvalue": _MODEL,
    "sparse_attention": _MODEL,
    "sparse_gradients": "ZeRO takes none",
    "data_efficiency": _ORDER,
    "curriculum_learning": _ORDER,
    "dataloader_drop_last": _ORDER,
    "vocabulary_size": "it is that of the tokenizer",
}
"""Why each key that Headway owns is refused."""

_FREE = (
    "aio",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "graph_harvesting",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
)

_OWNED_OF_ZERO = {
    "stage": "it is set by train.zero.stage",
    "offload_optimizer": "it is set by train.zero.offload",
    "offload_param": "train.zero.offload moves the optimizer's state alone",
    "cpu_offload": "it is set by train.zero.offload",
    "cpu_offload_param": "train.zero.offload moves the optimizer's state alone",
    "cpu_offload_use_pin_memory": "it is set by train.zero.offload",
    "zenflow": "train.zero.offload moves the optimizer's state alone",
    "elastic_checkpoint": _CHECKPOINTS,
    "load_from_fp32_weights": _CHECKPOINTS,
    "pipeline_loading_checkpoint": _CHECKPOINTS,
    "stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    "legacy_stage1": _PARTITIONS,
    "round_robin_gradients": _PARTITIONS,
    "zero_hpz_partition_size": _PARTITIONS,
    "zero_quantized_weights": _PARTITIONS,
    "zero_quantized_nontrainable_weights": _PARTITIONS,
    "zero_quantized_gradients": _PARTITIONS,
    "save_muon_momentum_buffer_in_memory": "the optimizer is set by train.optimizer",
    "override_module_apply": "the model is built by the task",
}

_FREE_OF_ZERO = (
    "allgather_bucket_size",
    "allgather_partitions",
    "compute_grad_norm",
    "contiguous_gradients",
    "enable_sanity_checks",
    "ignore_unused_parameters",
    "leaf_module",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "overlap_comm",
    "parameter_alignment",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_allgather_sequential",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
)

KNOWN = frozenset(_OWNED) | frozenset(_FREE)
"""Every key at the top of DeepSpeed's config."""
KNOWN_OF_ZERO = frozenset(_OWNED_OF_ZERO) | frozenset(_FREE_OF_ZERO)
"""Every key of its ``zero_optimization``."""


def check_keys(settings: Mapping[str, Any]) -> None:
    """Refuse what Headway owns, and what DeepSpeed does not know.

    Raises:
        ValueError: names the first such key, and who sets it or which name is near.
    """
    _check(settings, _OWNED, _FREE, prefix="")
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ValueError(f"zero_optimization must be a mapping of DeepSpeed's settings, not {zero!r}")
    _check(zero, _OWNED_OF_ZERO, _FREE_OF_ZERO, prefix="zero_optimization.")


def merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """``ours`` with ``theirs`` laid over it; mappings in both are merged in their turn."""
    found = dict(ours)
    for name, value in theirs.items():
        below = found.get(name)
        found[name] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return found


def _check(settings: Mapping[str, Any], owned: Mapping[str, str], free: tuple[str, ...], *, prefix: str) -> None:
    for name in settings:
        if name in owned:
            raise ValueError(f"may not hold {prefix}{name}: {owned[name]}")
        if name not in free:
            near = difflib.get_close_matches(str(name), [*free, *owned], n=1)
            hint = f"; did you mean {prefix}{near[0]}" if near else f"; it may hold {', '.join(free)}"
            raise ValueError(f"may not hold {prefix}{name}, which DeepSpeed does not know{hint}")
