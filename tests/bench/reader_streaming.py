"""mosaicml-streaming: StreamingDataset over MDS shards with its own DataLoader, each sample an array of fixed size."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.bench.reader_pass import BATCH_SIZE, ROW_TOKENS, SHARD_BYTES, measure, run
from tests.bench.server import BUCKET

PREFIX = "streaming/"


def write(samples: npt.NDArray[np.uint16], directory: str) -> None:
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{ROW_TOKENS}"}
    with MDSWriter(out=directory, columns=columns, size_limit=SHARD_BYTES) as writer:
        for sample in samples:
            writer.write({"tokens": np.array(sample)})


def read(cache: str, workers: int) -> None:
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        remote=f"s3://{BUCKET}/{PREFIX.rstrip('/')}", local=cache, shuffle=True, batch_size=BATCH_SIZE
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=workers, collate_fn=collate)
    measure(batch.to(torch.int64) for batch in loader)


def collate(rows: list[Any]) -> torch.Tensor:
    """They go from a worker to the training process as they are, 2 bytes each."""
    return torch.from_numpy(np.stack([row["tokens"] for row in rows]))


if __name__ == "__main__":
    run(write, read)
