"""The export that a person would script: download the checkpoint, DeepSpeed's zero_to_fp32, upload its safetensors.

Arguments: the prefixes that it reads and writes, a scratch directory, and zero_to_fp32's --max_shard_size.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.bench.server import download_directory, upload_directory


def main() -> None:
    source, target, scratch, max_shard = sys.argv[1:]
    checkpoint, weights = Path(scratch) / "checkpoint", Path(scratch) / "weights"
    download_directory(source, checkpoint)
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    # It loads lazily by itself: tensors are put together file by file, so max_shard bounds its memory.
    convert_zero_checkpoint_to_fp32_state_dict(
        str(checkpoint), str(weights), max_shard_size=max_shard, safe_serialization=True
    )
    upload_directory(weights, target)
