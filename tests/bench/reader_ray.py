"""Ray Data: Parquet of lists of fixed size, shuffled within a buffer, through ``iter_torch_batches``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from tests.bench.reader_pass import BATCH_SIZE, ROW_TOKENS, SHARD_SAMPLES, measure, run
from tests.bench.server import BUCKET

PREFIX = "parquet/"
ROW_GROUP = 1024  # samples, 4 MiB


def write(samples: npt.NDArray[np.uint16], directory: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, start in enumerate(range(0, len(samples), SHARD_SAMPLES)):
        part = samples[start : start + SHARD_SAMPLES]
        lists = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), ROW_TOKENS)
        path = Path(directory) / f"{number:05d}.parquet"
        pq.write_table(
            pa.table({"tokens": lists}), path, row_group_size=ROW_GROUP, compression="none", use_dictionary=False
        )


def read(cache: str, workers: int) -> None:
    """It keeps nothing on the node's disk, so ``cache`` is not used."""
    import ray
    import torch
    from pyarrow.fs import S3FileSystem
    from ray.data.collate_fn import ArrowBatchCollateFn

    class Collate(ArrowBatchCollateFn):  # type: ignore[misc]
        def __call__(self, batch: Any) -> torch.Tensor:
            flat = batch["tokens"].combine_chunks().flatten().to_numpy()
            return torch.from_numpy(flat.reshape(-1, ROW_TOKENS).astype(np.int64))

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.range(1000).map_batches(lambda batch: batch).materialize()  # its workers are up, and have imported
    server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    files = S3FileSystem(endpoint_override=server.netloc, scheme=server.scheme, region=os.environ["AWS_REGION"])
    dataset = ray.data.read_parquet(f"{BUCKET}/{PREFIX}", filesystem=files, shuffle="files")
    measure(
        dataset.iter_torch_batches(
            batch_size=BATCH_SIZE, local_shuffle_buffer_size=ROW_GROUP, collate_fn=Collate(), prefetch_batches=8
        )
    )


if __name__ == "__main__":
    run(write, read)
