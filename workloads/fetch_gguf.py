"""A GGUF file as a Hugging Face directory: its weights unpacked, its config, tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import EnvironmentUnusable, RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_SHARD_SIZE = "2GB"


def convert(path: Path, directory: Path, *, source: str) -> None:
    """Write the directory. Takes some 4 bytes of memory per weight beside torch and transformers.

    Args:
        source: what errors call the file.

    Raises:
        RunError: transformers cannot read the file, or does not know its architecture. EnvironmentUnusable: memory
        is short.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, use_safetensors=True, **_unpacked()
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as e:
        raise EnvironmentUnusable(
            f"model.pretrained: {source} cannot be converted here: {e}.", next_step="Install headway[train]."
        ) from e
    except Exception as e:  # of a file that is not sound the libraries raise whatever they run into
        reason = str(e).strip().splitlines() or [type(e).__name__]
        if _is_lack_of_memory(e):
            raise EnvironmentUnusable(
                f"model.pretrained: there is too little memory here to convert {source}: {reason[0]}",
                next_step="Converting takes some 4 bytes per weight; or name the model's Hugging Face directory.",
            ) from e
        raise RunError(
            f"model.pretrained: {source} cannot be read as a GGUF file of a causal language model: {reason[0]}",
            next_step="Name the model's Hugging Face directory instead.",
        ) from e
    _forget_quantisation(model)
    widest = narrow(model)
    model.save_pretrained(directory, max_shard_size=MAX_SHARD_SIZE)
    model.config.dtype = str(widest).removeprefix("torch.")
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _is_lack_of_memory(error: Exception) -> bool:
    """Python's own error, or what torch makes of an allocation that fails."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def narrow(model: nn.Module) -> Any:
    """Give each weight the narrowest of bf16, fp16 and fp32 that holds all its values exactly. Returns the widest.

    Dequantised values are products of an fp16 scale and an integer, plus a minimum: few fit 16 bits. Rounding those of
    SmolLM2-135M (Q4_1) to fp16 moves its logits by up to 0.035, to bf16 by 0.19. So nothing is rounded.
    """
    import torch

    used = {torch.bfloat16}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_exact_dtype(parameter.data))
        used.add(parameter.dtype)
    return max(used, key=[torch.bfloat16, torch.float16, torch.float32].index)


def _exact_dtype(values: Tensor) -> Any:
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return dtype
    return torch.float32


def _unpacked() -> dict[str, Any]:
    """What tells transformers to unpack the weights; versions that always do so know no such setting."""
    import transformers

    quantisation = getattr(transformers, "GgufConfig", None)
    return {} if quantisation is None else {"quantization_config": quantisation(dequantize=True)}


def _forget_quantisation(model: Any) -> None:
    """The weights are plain ones now, but the model still says that they are not, and so would refuse to be saved."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
