"""Tiny random adapters, as a run with ``export.lora: adapter`` leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from workloads.tasks.tokenizer_files import copy_tokenizer


def save_adapter(directory: Path, base: Path, *, auto_class: str, head: Sequence[str] = (), **config: Any) -> Any:
    """A directory that holds an adapter of the model in ``base`` alone, and peft's model that was saved there.

    Args:
        head: modules that are trained whole beside the adapter.
        config: fields in which the model's config differs from the base's.
    """
    made = transformers.AutoConfig.from_pretrained(base, **config)
    model = getattr(transformers, auto_class).from_pretrained(
        base, config=made, use_safetensors=True, dtype="float32", ignore_mismatched_sizes=True
    )
    lora = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        modules_to_save=list(head) or None,
        init_lora_weights=False,  # random, else the adapter would add nothing
    )
    torch.manual_seed(7)
    adapted = peft.get_peft_model(model, lora).eval()
    adapted.save_pretrained(str(directory))
    made.save_pretrained(directory)
    copy_tokenizer(base, directory)
    return adapted
