"""How many tokens' keys and values a batch may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import EnvironmentUnusable

MIN_BATCH_TOKENS = 1024
_SHARE = 0.5  # of what is available: prompts on their way, growing, and a next version that loads beside take theirs


def default_batch_tokens(available_bytes: int, *, bytes_per_token: int, max_batch: int, context_tokens: int) -> int:
    """Half of the available memory over the bytes of one token's keys and values, and no more than all rows of the
    batch can use at full length. Pure.

    Raises:
        EnvironmentUnusable: they are fewer than a context, and than :data:`MIN_BATCH_TOKENS`.
    """
    found, least = int(_SHARE * available_bytes) // bytes_per_token, min(context_tokens, MIN_BATCH_TOKENS)
    if found < least:
        raise EnvironmentUnusable(
            f"{available_bytes / 2**20:,.0f} MiB of memory are free, half of which holds the keys and values of "
            f"{found:,} tokens at {bytes_per_token:,} bytes each; {least:,} are the least.",
            next_step="Free memory, or set max_batch_tokens.",
        )
    return min(max_batch * context_tokens, found)


def available_bytes(device: Any) -> int:
    """Memory that is free: the GPU's, or the machine's and that of the control group, where it has a limit."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    fields = _numbers(Path("/proc/meminfo"))
    found = fields["MemAvailable:"] * 1024
    group = Path("/sys/fs/cgroup")  # version 2, as a container sees its own
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        cached = _numbers(group / "memory.stat")["inactive_file"]  # given back when it is needed
        found = min(found, int(text) - int((group / "memory.current").read_text()) + cached)
    return max(0, found)


def _numbers(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
