"""What ranks tell each other: plain bytes over collectives. Nothing is pickled."""

from __future__ import annotations

import torch
from torch import distributed as dist

from orchestrator.errors import HeadwayError

_TEXT_BYTES = 4096


def tell_all(text: str, *, rank: int) -> str:
    """Rank 0's ``text`` (at most 4 kB of UTF-8) on every rank. Collective."""
    if not dist.is_initialized():
        return text
    message = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
    if rank == 0:
        encoded = text.encode()
        if len(encoded) > _TEXT_BYTES:
            raise HeadwayError(f"A message of {len(encoded)} bytes is longer than {_TEXT_BYTES}.")
        message[: len(encoded)] = torch.frombuffer(bytearray(encoded or b"\0"), dtype=torch.uint8)[: len(encoded)]
    message = message.to(_device())
    dist.broadcast(message, src=0)
    return bytes(message.tolist()).rstrip(b"\0").decode()


def all_agree(ok: bool) -> bool:
    """Whether every rank says yes. Collective."""
    if not dist.is_initialized():
        return ok
    agreed = torch.tensor([int(ok)], device=_device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed.item())


def _device() -> torch.device:
    """Where this group's collectives take tensors: on the CPU if any backend does, else on this rank's device."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
