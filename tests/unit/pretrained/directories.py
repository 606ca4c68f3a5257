"""Hugging Face directories of a few small tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"model_type": "llama", "hidden_size": 8}
SMALL = {
    "config.json": json.dumps(CONFIG).encode(),
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
NOT_NEEDED = {
    "README.md": b"#", "pytorch_model.bin": b"\x80\x02}.", "consolidated.safetensors": b"?", "modeling_own.py": b"boom",
    ".gitattributes": b"", "training_args.bin": b"\x80\x02}.",
}  # fmt: skip


def values(seed: int = 0) -> dict[str, Tensor]:
    """One tensor that fills some blocks, small ones of each float, and one of integers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(300, 200, generator=generator),
        "layer.half": torch.randn(70, 31, generator=generator).to(torch.float16),
        "layer.brain": torch.randn(71, 33, generator=generator).to(torch.bfloat16),
        "norm.weight": torch.randn(7, generator=generator),
        "position_ids": torch.arange(12).reshape(1, 12),
        "scalar": torch.tensor(0.5),
        "nothing": torch.empty(0, 4),
    }


def save_directory(path: Path, tensors: dict[str, Tensor] | None = None, *, num_files: int = 1) -> Path:
    """Write what ``save_pretrained`` would, and files beside it that nobody needs."""
    path.mkdir(parents=True, exist_ok=True)
    for name, data in {**SMALL, **NOT_NEEDED}.items():
        (path / name).write_bytes(data)
    given = values() if tensors is None else tensors
    if num_files == 1:
        save_file(given, path / "model.safetensors")
        return path
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: tensor for place, (name, tensor) in enumerate(given.items()) if place % num_files == number}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A file with any header at all."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data
