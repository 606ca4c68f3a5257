"""What saving, resuming and exporting all have to know of a model's tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state dict, by full name."""
    found = {}
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The name that safetensors gives a torch dtype."""
    return {
        torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
        torch.bool: "BOOL",
    }[dtype]  # fmt: skip


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as single bytes. Writing to it changes the tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
