"""litdata, as its documentation has it for tokens: TokensLoader over optimised data."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.bench.reader_pass import BATCH_SIZE, ROW_TOKENS, SHARD_SAMPLES, measure, run
from tests.bench.server import BUCKET

PREFIX = "litdata/"


def write(samples: npt.NDArray[np.uint16], directory: str) -> None:
    from litdata import TokensLoader, optimize

    optimize(
        fn=partial(_sample, samples),
        inputs=list(range(len(samples))),
        output_dir=directory,
        chunk_size=SHARD_SAMPLES * ROW_TOKENS,
        num_workers=1,
        item_loader=TokensLoader(block_size=ROW_TOKENS),
        start_method="fork",
        keep_data_ordered=True,
        verbose=False,
    )


def _sample(samples: npt.NDArray[np.uint16], index: int) -> npt.NDArray[np.uint16]:
    return np.array(samples[index])


def read(cache: str, workers: int) -> None:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(
        f"s3://{BUCKET}/{PREFIX}",
        cache_dir=cache,
        item_loader=TokensLoader(block_size=ROW_TOKENS),
        shuffle=True,
    )
    loader = StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=workers, collate_fn=collate)
    measure(batch.to(torch.int64) for batch in loader)


def collate(rows: list[Any]) -> torch.Tensor:
    """They go from a worker to the training process as they are, 2 bytes each."""
    return torch.from_numpy(np.stack(rows))


if __name__ == "__main__":
    run(write, read)
